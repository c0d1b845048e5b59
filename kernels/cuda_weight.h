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
void cuda_weight_take(struct kern *k, struct kern_layer *l, struct kern_weight *w);

/* A run of a weight that is kept as in its file, in the weight's memory. */
struct cuda_weight_run {
    enum quant_format format;
    int64_t rows;
    size_t row_bytes; /* of blocks */
    float scale, input_scale; /* those of quant_matrix; block scales are row by row here */
    bool low_first, has_fp8_products;
    struct linear_blas_plan *plan; /* where the weight has products in FP8: of this run's own product, as cuda_weight.plan */
    struct quant_place place;
};

/* kern_weight.owner. */
struct cuda_weight {
    struct linear_blas_plan *plan; /* NULL: the kernels of our own serve it */
    bool has_fp8_products;         /* some run of it: each run is a product then */
    int run_count;                 /* 0: its values are in its dtype */
    struct cuda_weight_run runs[];
};

static inline const struct cuda_weight *cuda_weight_of(const struct kern_weight *w)
{
    return (const struct cuda_weight *)w->owner;
}

/* dequant_weight: w as products want it: itself, or its description with values decoded into arena memory, which the caller
 * rewinds. dequant_run: a run of it as a weight; one that has products in FP8 without its scale. Nothing is there after a failure. (dequant.cu) */
struct kern_weight dequant_weight_cuda(struct kern *k, const struct kern_weight *w);
struct kern_weight dequant_run_cuda(struct kern *k, const struct kern_weight *w, const struct cuda_weight_run *r);

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
