/* mailbox.h - how the worker's threads hand things to each other: a first-in first-out list under a lock.
 *
 * What is put changes hands: the taker owns it. The item's first member is a struct mail; the list is
 * intrusive, so putting never allocates and never fails. How much may be in it at once is bounded by the credit
 * the coordinator was told, not here. */
#ifndef KILN_MAILBOX_H
#define KILN_MAILBOX_H

#include <pthread.h>
#include <stdbool.h>

struct mail { struct mail *next; };

struct mailbox {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct mail *first, *last;
    bool is_closed;
    int event_fd; /* readable while something was put since mailbox_calm; -1: none */
};

bool mailbox_init(struct mailbox *m, bool has_fd); /* false: no file descriptor left */
void mailbox_done(struct mailbox *m);              /* must be empty */
void mailbox_put(struct mailbox *m, struct mail *item);
void *mailbox_take(struct mailbox *m);             /* NULL: nothing there */
/* mailbox_wait waits at most timeout_ms (-1: for ever) and returns NULL when the time is over, or when the box is
 * closed and empty. */
void *mailbox_wait(struct mailbox *m, int timeout_ms);
void mailbox_close(struct mailbox *m);             /* nothing more will be put; waiters go home */
bool mailbox_is_closed(struct mailbox *m);
void mailbox_wake(struct mailbox *m);              /* makes the file descriptor readable */
void mailbox_calm(struct mailbox *m);              /* before taking what is there */

#endif
