/* cuda_weight.h - inside the CUDA backend: a weight's values on the device, or in a layer's pinned memory until it is fetched. */
#ifndef KILN_CUDA_WEIGHT_H
#define KILN_CUDA_WEIGHT_H

#include "cuda_ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The ops; their contracts are those of kern.h. */
struct kern_weight *cuda_weight_new(struct kern *k, enum tensor_dtype dtype, struct tensor w, struct tensor bias);
struct kern_weight *cuda_weight_quant(struct kern *k, enum tensor_dtype dtype, const struct quant_run *runs, int count);
void cuda_weight_free(struct kern *k, struct kern_weight *w); /* not NULL */

/* cuda_weight_inner: channels per tap of a weight on the device; bf16 is filled up with zeros to whole 16-byte chunks.
 * cuda_weight_depth: values of a row, [kh][kw][inner]. */
static inline int64_t cuda_weight_inner(const struct kern_weight *w)
{
    return w->dtype == TENSOR_BF16 ? (w->in + 7) / 8 * 8 : w->in;
}

static inline int64_t cuda_weight_depth(const struct kern_weight *w)
{
    return cuda_weight_inner(w) * w->kh * w->kw;
}

#ifdef __cplusplus
}
#endif

#endif
