/* linear.cu - linear.c on the device: rows times a weight.
 *
 * bf16 without a bias goes to cuBLASLt (linear_blas.c) where rows begin on 16 bytes, else to the kernels of gpu_gemm.h;
 * that depends on the weight and on how the rows lie, never on their number. A weight that is kept quantised is decoded
 * first (dequant.cu), whole: then products are those of its decoded twin, to the bit.
 *
 * Products in FP8: each run of the weight is a product of its own. Rows are rounded to e4m3 (fp8.cu) and multiplied by the run's
 * codes where they are; where the device has no units for that (before sm_89), or widths are no multiples of 16, the same numbers
 * are multiplied in bf16: codes are decoded without their scale. Either way the sums are of the same products.
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

/* out = scale * x times w. w: values in its dtype. x: rows as gemm_rows gives them. plan: NULL for a product of our own. */
static void multiply(struct kern *k, const struct tensor &out, const struct tensor &x, const struct kern_weight *w,
                     const struct linear_blas_plan *plan, float scale)
{
    int64_t depth = cuda_weight_depth(w);
    if (w->dtype == TENSOR_F32) {
        gemm_matrix<float> rows = {(const float *)x.data, x.stride[0], (int)x.shape[0], (int)depth};
        gemm_run_f32(k, "linear f32", rows, w, depth, out, scale);
    } else if (plan && out.dtype == TENSOR_BF16 && gpu_is_vector(out)) {
        linear_blas_apply(k, plan, out, x, w->data, scale);
    } else {
        gemm_matrix<bf16> rows = {(const bf16 *)x.data, x.stride[0], (int)x.shape[0], (int)depth};
        gemm_run_bf16(k, "linear", rows, w, depth, out, scale);
    }
}

static struct tensor rows_for(struct kern *k, const struct tensor &x, const struct kern_weight *w)
{
    return w->dtype == TENSOR_F32 ? x : gemm_rows_cuda(k, x, cuda_weight_depth(w));
}

static void apply_whole(struct kern *k, const struct tensor &out, const struct tensor &x, const struct kern_weight *w)
{
    struct kern_weight here = dequant_weight_cuda(k, w);
    struct tensor rows = rows_for(k, x, w);
    if (!k->failed)
        multiply(k, out, rows, &here, cuda_weight_of(w)->plan, 1);
}

static void apply_run(struct kern *k, const struct tensor &out, const struct tensor &x, const struct kern_weight *w,
                      const struct cuda_weight_run *r)
{
    struct kern_weight here = dequant_run_cuda(k, w, r);
    struct tensor rows = rows_for(k, x, w);
    if (!k->failed)
        multiply(k, out, rows, &here, r->plan, 1);
}

/* Rows that were rounded to e4m3, in the arena. */
struct rounded_rows {
    struct tensor q;
    float *scales;     /* by row, where input_scale is 0 */
    float input_scale;
};

static struct rounded_rows round_rows(struct kern *k, const struct tensor &x, const struct kern_weight *w, float input_scale, enum tensor_dtype dtype)
{
    int64_t shape[2] = {x.shape[0], cuda_weight_depth(w)};
    struct rounded_rows made = {kern_temp(k, dtype, 2, shape), NULL, input_scale};
    if (input_scale == 0)
        made.scales = (float *)kern_temp(k, TENSOR_F32, 1, shape).data;
    if (!k->failed)
        fp8_rows_cuda(k, made.q, made.scales, x, input_scale);
    return made;
}

/* Codes for the units that multiply them, else numbers. */
static enum tensor_dtype rounded_dtype(const struct kern_weight *w, const struct cuda_weight_run *r, const struct tensor &out)
{
    return linear_blas_is_fp8(r->plan) && out.dtype == TENSOR_BF16 && gpu_is_vector(out) ? TENSOR_U8 : w->dtype;
}

static void apply_fp8(struct kern *k, const struct tensor &out, const struct rounded_rows &x, const struct kern_weight *w,
                      const struct cuda_weight_run *r)
{
    bool by_codes = x.q.dtype == TENSOR_U8;
    float scale = x.scales ? r->scale : r->scale * x.input_scale;
    struct kern_weight here = by_codes ? *w : dequant_run_cuda(k, w, r);
    if (k->failed)
        return;
    if (by_codes)
        linear_blas_apply(k, r->plan, out, x.q, (const char *)w->data + r->place.data, scale);
    else
        multiply(k, out, x.q, &here, linear_blas_is_fp8(r->plan) ? NULL : r->plan, scale);
    if (x.scales)
        fp8_scale_cuda(k, out, x.scales);
}

/* Runs behind each other that see the same rounded rows share them. */
static void apply_runs(struct kern *k, const struct tensor &out, const struct tensor &x, const struct kern_weight *w)
{
    const struct cuda_weight *kept = cuda_weight_of(w);
    struct rounded_rows rounded = {};
    size_t begin = kern_mark(k), mark = begin; /* mark: behind the rounded rows */
    int64_t at = 0;
    for (int i = 0; i < kept->run_count; at += kept->runs[i++].rows) {
        const struct cuda_weight_run *r = &kept->runs[i];
        if (r->rows == 0)
            continue;
        struct tensor columns = tensor_slice(out, 1, at, r->rows);
        enum tensor_dtype dtype = rounded_dtype(w, r, columns);
        bool is_rounded = rounded.q.data && rounded.q.dtype == dtype && rounded.input_scale == r->input_scale;
        if (!r->has_fp8_products || !is_rounded) {
            kern_rewind(k, begin);
            rounded = r->has_fp8_products ? round_rows(k, x, w, r->input_scale, dtype) : rounded_rows{};
            mark = kern_mark(k);
        }
        if (r->has_fp8_products)
            apply_fp8(k, columns, rounded, w, r);
        else
            apply_run(k, columns, x, w, r);
        kern_rewind(k, mark);
    }
}

void linear_apply_cuda(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w)
{
    assert(x.shape[0] < INT32_MAX && cuda_weight_depth(w) < INT32_MAX);
    if (tensor_count(out) == 0)
        return;
    size_t mark = kern_mark(k);
    if (cuda_weight_of(w)->has_fp8_products)
        apply_runs(k, out, x, w);
    else
        apply_whole(k, out, x, w);
    kern_rewind(k, mark);
}
