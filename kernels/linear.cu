/* linear.cu - linear.c on the device: rows times a weight.
 *
 * bf16 without a bias goes to cuBLASLt (linear_blas.c) where rows begin on 16 bytes, else to the kernels of gpu_gemm.h;
 * that depends on the weight and on how the rows lie, never on their number. A weight that is kept quantised is decoded
 * first (dequant.cu), whole: then products are those of its decoded twin, to the bit.
 *
 * Who does what: see gpu_gemm.h; a block makes 128 rows x 128 (or 32) outputs.
 * Shared memory: 48 KB or 30 KB.
 * Limit: FLOPs on tensor cores (f32: on CUDA cores) above some 200 rows, below that the bytes of the weight.
 * Expected, not measured, of the bf16 peak: our own kernels 65 to 70 % on sm_80 and 86, 70 % on sm_89, 40 % on sm_90;
 *     the library 80 to 85 % on sm_80, 86 and 89, 70 to 75 % on sm_90. */
#include "cuda_weight.h"
#include "gpu_gemm.h"
#include "linear_blas.h"

struct tensor gemm_rows_cuda(struct kern *k, struct tensor x, int64_t inner)
{
    int64_t shape[2] = {x.shape[0], inner};
    if (x.shape[1] == inner && gpu_is_vector(x))
        return x;
    struct tensor copy = kern_temp(k, x.dtype, 2, shape);
    if (k->failed)
        return copy;
    if (x.shape[1] < inner)
        cuda_check(k, cudaMemsetAsync(copy.data, 0, tensor_bytes(copy), cuda_stream(k)), "rows");
    elementwise_copy_cuda(k, tensor_slice(copy, 1, 0, x.shape[1]), x);
    return copy;
}

/* w: values in its dtype. x: rows as gemm_rows gives them. */
static void multiply(struct kern *k, const struct tensor &out, const struct tensor &x, const struct kern_weight *w)
{
    const struct linear_blas_plan *plan = cuda_weight_of(w)->plan;
    int64_t depth = cuda_weight_depth(w);
    if (w->dtype == TENSOR_F32) {
        gemm_matrix<float> rows = {(const float *)x.data, x.stride[0], (int)x.shape[0], (int)depth};
        gemm_run_f32(k, "linear f32", rows, w, depth, out);
    } else if (plan && out.dtype == TENSOR_BF16 && gpu_is_vector(out)) {
        linear_blas_apply(k, plan, out, x, w->data);
    } else {
        gemm_matrix<bf16> rows = {(const bf16 *)x.data, x.stride[0], (int)x.shape[0], (int)depth};
        gemm_run_bf16(k, "linear", rows, w, depth, out);
    }
}

void linear_apply_cuda(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w)
{
    int64_t depth = cuda_weight_depth(w);
    assert(x.shape[0] < INT32_MAX && depth < INT32_MAX);
    if (tensor_count(out) == 0)
        return;
    size_t mark = kern_mark(k);
    struct kern_weight here = dequant_weight_cuda(k, w);
    struct tensor rows = w->dtype == TENSOR_F32 ? x : gemm_rows_cuda(k, x, depth);
    if (!k->failed)
        multiply(k, out, rows, &here);
    kern_rewind(k, mark);
}
