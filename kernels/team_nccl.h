/* team_nccl.h - a team of GPUs: sums over NCCL on a stream of their own, and a thread that ends them when they would never end. */
#ifndef KILN_TEAM_NCCL_H
#define KILN_TEAM_NCCL_H

#include "cuda_ops.h"

/* team_nccl_open is for one backend of a team: NCCL's library and the thread; the first error is the backend's. NULL then. */
struct team_nccl *team_nccl_open(struct kern *k);
void team_nccl_close(struct team_nccl *t); /* accepts NULL; before anything else of the backend ends */

/* team_nccl_leave instead, when the device is stuck: nothing is given back, and nobody looks any more. Accepts NULL. */
void team_nccl_leave(struct team_nccl *t);

/* The ops of kern_ops.h. */
bool team_nccl_join(struct kern *k);
void team_nccl_sum(struct kern *k, struct tensor x, int slot);
void team_nccl_sum_end(struct kern *k, int slot);

/* team_nccl_settle ends what was begun and, after an error, not ended. NULL: nothing. */
void team_nccl_settle(struct team_nccl *t);

/* Two: their sum has one order, a + b = b + a. Of more, NCCL adds in an order that depends on where in the tensor a value stands, so
 * that a picture would depend on its place in the batch. */
#define TEAM_NCCL_RANKS 2

#endif
