/* linear_blas.h - matrix products by cuBLASLt, bf16 and FP8, with one algorithm per weight. For linear.cu. */
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

/* linear_blas_plan_new chooses the algorithm of a weight [n, depth] in bf16, or with rows in e4m3 (then n and depth are multiples of 16);
 * NULL: the library has none for it, or a failure is kept in the kern: a weight is not served by the one or the other by chance. */
struct linear_blas_plan;
struct linear_blas_plan *linear_blas_plan_new(struct linear_blas *b, int64_t n, int64_t depth, bool is_fp8);
void linear_blas_plan_free(struct linear_blas_plan *p); /* accepts NULL */
bool linear_blas_is_fp8(const struct linear_blas_plan *p); /* accepts NULL */

/* linear_blas_apply: out = scale * x times weight; f32 sums, rounded once. out is bf16, x and the weight are bf16 or codes of e4m3 (U8), as
 * planned; all rows begin on 16 bytes. */
void linear_blas_apply(struct kern *k, const struct linear_blas_plan *p, struct tensor out, struct tensor x, const void *weight, float scale);

#ifdef __cplusplus
}
#endif

#endif
