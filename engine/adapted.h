/* adapted.h - a linear of the transformer and the adapters that run beside it.
 *
 *   out = W x;  for each adapter that changes it, in the order in which they were given:  out += s * (up (down x))
 *
 * That is what PEFT computes for diffusers, rounding where it does: down x, up (..), s * (..) and each sum, with factors in the
 * compute precision and s in f32. A weight of several tensors by rows (q, k, v) has adapters for each: they change their rows
 * of the output. W never knows of it, so adapters come and go while the model stays.
 *
 * A rank of a team that has some rows of W has as many of up; one that has some columns has those of down, and the ranks' sums of
 * W x are those of up (down x) as well.
 *
 *            ┌ rows of to_q: out[:, 0 .. h)      += s up_q (down_q x)        down [rank, k], up [rows, rank]
 *   out [h3] ┤ rows of to_k: out[:, h .. 2h)     += ..
 *            └ rows of to_v: out[:, 2h .. 3h)    += .. */
#ifndef KILN_ADAPTED_H
#define KILN_ADAPTED_H

#include "adapters.h"
#include "weights.h"

struct adapted_change {                  /* by one adapter, of some rows of W */
    const struct kern_weight *down, *up; /* [rank, k], [rows, rank] */
    float scale;
    int64_t rank, first, rows;
};

struct adapted_part { /* a tensor, "transformer_blocks.0.attn.to_q.weight"; of a team, what of it this rank has */
    char name[96];
    int64_t n;
    struct shard shard;
};

struct adapted_linear {
    const struct kern_weight *weight; /* [rows of all parts, k], or this rank's share of rows or columns */
    struct adapted_part parts[WEIGHTS_STACK_MAX];
    int part_count;
    int64_t k;
    struct adapted_change *changes;
    int change_count;
};

struct adapted_list { /* all of a transformer; owns them, not their weights */
    struct adapted_linear **linears;
    int count;
};

/* adapted_take.. are weights_linear, .._rows, .._columns and .._stack: what they give is in the list, NULL after a failure, which w
 * keeps. adapted_done accepts a zeroed list. */
const struct adapted_linear *adapted_take(struct adapted_list *l, struct weights *w, int64_t n, int64_t k, const char *name, ...)
    __attribute__((format(printf, 5, 6)));
const struct adapted_linear *adapted_take_rows(struct adapted_list *l, struct weights *w, const struct shard_piece *pieces, int count,
                                               int64_t k, const char *name, ...) __attribute__((format(printf, 6, 7)));
const struct adapted_linear *adapted_take_columns(struct adapted_list *l, struct weights *w, int64_t n, const struct shard_piece *pieces,
                                                  int count, const char *name, ...) __attribute__((format(printf, 6, 7)));
const struct adapted_linear *adapted_take_stack(struct adapted_list *l, struct weights *w, const struct shard_piece *pieces, int64_t k,
                                                int count, const char *const *names);
void adapted_done(struct adapted_list *l);

/* adapted_set puts the adapters that run beside the linears there, in the place of others; a NULL has none. Their factors belong
 * to the pool of w, which keeps the first failure: then none is there. They stay on the device, whatever the linears' layers
 * do, and take at most as much as these (lora_is_low_rank) for each file; what people train takes a hundredth. */
void adapted_set(struct adapted_list *l, const struct adapters *a, struct weights *w);

/* adapted_apply: out [rows, n] from x [rows, k], as kern_linear. */
void adapted_apply(struct kern *k, struct tensor out, struct tensor x, const struct adapted_linear *l);

#endif
