/* batch.h - an assignment on its way through the worker, and what becomes of each of its tasks.
 *
 *   I/O thread ──batch──▶ painter ──image──▶ writer
 *        ◀──────────────outcome────────────────┘
 *
 * The I/O thread owns every batch. It may free one when `open` outcomes have come back: one for each task and one
 * with which the painter says that it will not look at the batch again. Between the threads only the
 * is_cancelled flags are shared. */
#ifndef KILN_BATCH_H
#define KILN_BATCH_H

#include <stdatomic.h>

#include "mailbox.h"
#include "msg.h"
#include "spool.h"

struct batch_task {
    atomic_bool is_cancelled; /* set by the I/O thread, asked by painter and writer */
    bool is_reported;         /* I/O thread: its outcome came */
};
struct batch {
    struct mail mail;
    struct batch *next;       /* I/O thread: the list of all */
    struct msg message;       /* the ASSIGN, owned */
    const struct msg_assign *assign;
    struct batch_task *tasks; /* as assign->tasks */
    uint32_t open;
    unsigned session;         /* the WELCOME it came under */
};

struct batch *batch_new(struct msg *assign, unsigned session); /* takes the message over */
void batch_free(struct batch *b);
bool batch_is_cancelled(const struct batch *b, uint32_t index);

enum outcome_kind {
    OUTCOME_TASK,    /* entry: a result that is staged and spooled, or a failure */
    OUTCOME_OVER,    /* the painter is done with the batch */
    OUTCOME_SETTLED, /* the answer to (task, token) was carried out, the record removed */
};
struct batch_outcome {
    struct mail mail;
    enum outcome_kind kind;
    struct batch *batch;
    uint32_t index;
    struct spool_entry *entry; /* owned */
    uint64_t task, token;
    bool is_last; /* the device is gone or the weights are others: end this process */
};

struct batch_outcome *batch_outcome_result(struct batch *b, uint32_t index, struct spool_entry *entry);
struct batch_outcome *batch_outcome_failed(struct batch *b, uint32_t index, const struct failure *failure);
struct batch_outcome *batch_outcome_over(struct batch *b);
struct batch_outcome *batch_outcome_settled(uint64_t task, uint64_t token);
void batch_outcome_free(struct batch_outcome *o);

/* How many images of a shape this worker renders at once: batch_max until memory said no, then half of it. */
#define BATCH_CAPS_MAX 64
struct batch_caps {
    int most, count;
    struct { char model[MSG_NAME_MAX + 1]; uint32_t width, height; int cap; } shapes[BATCH_CAPS_MAX];
};
int batch_caps_of(const struct batch_caps *c, const char *model, uint32_t width, uint32_t height);
/* batch_caps_lower: a batch of this many did not fit. Returns the new cap, at least 1. */
int batch_caps_lower(struct batch_caps *c, const char *model, uint32_t width, uint32_t height, int count);

#endif
