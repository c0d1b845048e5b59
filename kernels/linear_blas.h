/* linear_blas.h - bf16 matrix products by cuBLASLt, with one algorithm per weight. For linear.cu. */
#ifndef KILN_LINEAR_BLAS_H
#define KILN_LINEAR_BLAS_H

#include "cuda_ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One per backend. linear_blas_open gives NULL where the library is not wanted (KILN_CUDA_GEMM=own) or after a failure,
 * which is kept in k. */
struct linear_blas;
struct linear_blas *linear_blas_open(struct kern *k);
void linear_blas_close(struct linear_blas *b); /* accepts NULL */

/* linear_blas_plan_new chooses the algorithm of a weight [n, depth] in bf16; NULL: the kernels of our own serve it,
 * or a failure is kept in the kern: a weight is not served by the one or the other by chance. */
struct linear_blas_plan;
struct linear_blas_plan *linear_blas_plan_new(struct linear_blas *b, int64_t n, int64_t depth);
void linear_blas_plan_free(struct linear_blas_plan *p); /* accepts NULL */

/* linear_blas_apply: out = x times weight. Both tensors are bf16 whose rows begin on 16 bytes. */
void linear_blas_apply(struct kern *k, const struct linear_blas_plan *p, struct tensor out, struct tensor x, const void *weight);

#ifdef __cplusplus
}
#endif

#endif
