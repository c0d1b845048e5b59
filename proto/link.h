/* link.h - the socket between worker and coordinator; the only file that knows CZMQ.
 *
 * The coordinator binds a ROUTER (ROUTER_MANDATORY, MAXMSGSIZE, explicit linger, heartbeats of libzmq off),
 * a worker connects a DEALER whose routing id is "name/boot epoch/N", N counting the sockets of its process: a ROUTER
 * silently ignores a second connection under an id that it still knows, so a reconnect must never reuse one.
 * A peer is therefore an address; who it is stands in HELLO (worker, boot_epoch), and a HELLO of the same worker and
 * epoch from another peer means: it reconnected, answer there from now on. Only loopback endpoints are accepted
 * (tcp://127.0.0.1:*, tcp://[::1]:*, ipc://): others are refused with a sentence until keys exist.
 * CZMQ's signal handlers are switched off. One thread per link. */
#ifndef KILN_LINK_H
#define KILN_LINK_H

#include "msg.h"

struct link;

bool link_bind(struct link **ret, const char *endpoint, char *why, size_t why_bytes);   /* "tcp://127.0.0.1:*" picks a port */
bool link_connect(struct link **ret, const char *endpoint, const char *identity, char *why, size_t why_bytes);
void link_close(struct link **link, int linger_ms); /* accepts NULL; what was sent is flushed for so long, by another thread:
                                                       * exit() waits for it, _exit() does not */
const char *link_endpoint(const struct link *l);    /* as bound: with the real port */

enum link_got { LINK_MESSAGE, LINK_EMPTY, LINK_BAD, LINK_ERROR };
/* link_receive never waits. peer (LINK_PEER_MAX bytes) gets the routing id (coordinator only; may be NULL).
 * LINK_BAD: a message that does not decode; why says what; the caller logs, counts, may refuse the peer. */
#define LINK_PEER_MAX 256
enum link_got link_receive(struct link *l, struct msg *ret, char *peer, char *why, size_t why_bytes);

enum link_sent { LINK_SENT, LINK_GONE, LINK_FULL, LINK_SEND_ERROR };
/* link_send never waits. peer: coordinator only (NULL for a worker). GONE: no such peer; FULL: its queue is full. */
enum link_sent link_send(struct link *l, const char *peer, const struct msg *m);

/* link_wait sleeps until something can be received, one of the extra fds is readable, or the time is over.
 * Returns a bit mask: bit 0 the link, bit 1+i extra[i]. */
unsigned link_wait(struct link *l, const int *extra, int extra_count, int timeout_ms);

#endif
