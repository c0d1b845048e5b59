/* kern_plan.h - a backend that computes nothing and takes no memory: it counts what a device with its own memory would give
 * out, so that a model and a batch are known to fit before anything is loaded or rendered. */
#ifndef KILN_KERN_PLAN_H
#define KILN_KERN_PLAN_H

#include "kern.h"

/* kern_plan_open: a dry backend (kern_is_dry) for what a device of kern_cuda.h would hold; it has kern_memory, without end; of
 * one rank of a team, whose others are not there; has_fp8: kern_has_fp8 of the device. NULL on no memory. */
struct kern *kern_plan_open(int rank, int ranks, bool has_fp8);

size_t kern_plan_weights(const struct kern *k); /* bytes of weights and vectors, but for weights of layers */
size_t kern_plan_arena(struct kern *k);         /* the arena's high-water mark since this was asked last */

#endif
