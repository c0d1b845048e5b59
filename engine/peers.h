/* peers.h - what tensor parallelism needs from outside: who am I, how many are we, add this up.
 *
 * The engine asks; worker/team_*.c answers with threads or NCCL. A single rank is {0, 1, NULL}. */
#ifndef KILN_PEERS_H
#define KILN_PEERS_H

#include "kern.h"

struct peers {
    int rank, count;
    void *context;
    void (*sum)(void *context, struct kern *k, struct tensor x); /* x = sum of x over all ranks, on every rank */
};

/* peers_sum is where a row-split matrix becomes whole again; nothing to do alone. */
static inline void peers_sum(const struct peers *p, struct kern *k, struct tensor x)
{
    if (p && p->count > 1)
        p->sum(p->context, k, x);
}

#endif
