/* session.h - being known to a coordinator: HELLO until WELCOME, silence, refusals, a new socket when needed.
 *
 *   GREETING   HELLO was sent; nothing else is said until WELCOME. No answer in time: new socket, HELLO again, and
 *              twice the patience (1 s .. 32 s; libzmq itself reconnects every 2 s meanwhile)
 *   WELCOME    any word counts as life; silent_ms without one: back to GREETING
 *
 * The identity (name, boot epoch) stays the same for the life of the process. */
#ifndef KILN_SESSION_H
#define KILN_SESSION_H

#include "link.h"

enum session_state { SESSION_GREETING, SESSION_WELCOME };
enum session_event { SESSION_NOTHING, SESSION_WELCOMED, SESSION_WORD, SESSION_REFUSED_FOR_GOOD };

struct session {
    struct link *link;
    const char *endpoint;       /* borrowed */
    char identity[200];
    struct msg hello;           /* texts borrowed */
    enum session_state state;
    unsigned number;            /* counts WELCOMEs */
    int64_t heard_ms, greet_ms; /* last word; when HELLO is repeated or the socket replaced */
    int wait_ms;
    bool must_greet;            /* at greet_ms on the same socket: a coordinator asked for it */
    uint32_t heartbeat_ms, silent_ms;
    char refusal[MSG_REASON_MAX + 1];
};

/* session_open connects and says HELLO. False: the endpoint is not acceptable. */
bool session_open(struct session *s, const char *endpoint, const struct msg_hello *hello, int64_t now_ms, char *why,
                  size_t why_bytes);
void session_close(struct session *s, int linger_ms);

void session_step(struct session *s, int64_t now_ms);       /* what time has changed */
int64_t session_next_ms(const struct session *s);           /* when session_step has something to do */
bool session_send(struct session *s, const struct msg *m);  /* false: not now; say it again later */

/* session_hear takes one waiting message. WORD: *ret is the caller's, who calls msg_done. NOTHING: none is waiting. */
enum session_event session_hear(struct session *s, struct msg *ret, int64_t now_ms);

#endif
