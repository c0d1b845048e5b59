/* linear.cu - linear.c on the device: weights onto it, and rows times a weight.
 *
 * bf16 without a bias goes to cuBLASLt (linear_blas.c) where rows begin on 16 bytes, else to the kernels of gpu_gemm.h;
 * that depends on the weight and on how the rows lie, never on their number.
 *
 * A weight is [n][kh][kw][in], rounded to its dtype on the host while it is copied into pinned memory; what is quantised
 * in its file is decoded there, too.
 *
 * Who does what: see gpu_gemm.h; a block makes 128 rows x 128 (or 32) outputs.
 * Shared memory: 48 KB or 30 KB.
 * Limit: FLOPs on tensor cores (f32: on CUDA cores) above some 200 rows, below that the bytes of the weight.
 * Expected, not measured, of the bf16 peak: our own kernels 65 to 70 % on sm_80 and 86, 70 % on sm_89, 40 % on sm_90;
 *     the library 80 to 85 % on sm_80, 86 and 89, 70 to 75 % on sm_90. */
#include "cuda_layer.h"
#include "gpu_gemm.h"
#include "linear_blas.h"

#include <stdlib.h>
#include <string.h>

/* --- weights ---------------------------------------------------------------------------------------------- */

namespace {

float host_value(const struct tensor &t, int64_t i)
{
    return t.dtype == TENSOR_F32 ? ((const float *)t.data)[i] : tensor_f32_of(((const uint16_t *)t.data)[i]);
}

/* Row r of a weight, [in][taps] in the source, as [taps][inner] in the dtype. */
void put_row(char *to, const struct kern_weight *w, const struct tensor &source, int64_t r)
{
    int64_t taps = (int64_t)w->kh * w->kw, inner = gemm_inner(w);
    size_t size = tensor_dtype_bytes(w->dtype);
    int64_t begin = r * source.stride[0];
    if (taps == 1) {
        char *row = (char *)source.data + (size_t)begin * tensor_dtype_bytes(source.dtype);
        tensor_convert(tensor_1d(to, w->dtype, w->in), tensor_1d(row, source.dtype, w->in));
        memset(to + (size_t)w->in * size, 0, (size_t)(inner - w->in) * size);
        return;
    }
    for (int64_t t = 0; t < taps; t++)
        for (int64_t i = 0; i < inner; i++) {
            float v = i < w->in ? host_value(source, begin + i * taps + t) : 0;
            if (w->dtype == TENSOR_F32)
                ((float *)to)[t * inner + i] = v;
            else
                ((uint16_t *)to)[t * inner + i] = tensor_bf16_of(v);
        }
}

/* The same of a weight that is in a file. */
void put_row(char *to, const struct kern_weight *w, const struct quant_run *run, int64_t r)
{
    for (; r >= run->count; run++)
        r -= run->count;
    size_t size = tensor_dtype_bytes(w->dtype);
    quant_rows(to, w->dtype, &run->matrix, run->first + r, 1);
    memset(to + (size_t)w->in * size, 0, (size_t)(gemm_inner(w) - w->in) * size);
}

template <class Source> bool send_rows(struct kern *k, struct kern_weight *w, const Source &source)
{
    size_t row_bytes = (size_t)gemm_depth(w) * tensor_dtype_bytes(w->dtype);
    int64_t step = (int64_t)(CUDA_STAGE_BYTES / row_bytes);
    if (step == 0) {
        kern_ops_fail(k, "a weight's row of %zu bytes, accepted: up to %zu", row_bytes, CUDA_STAGE_BYTES);
        return false;
    }
    for (int64_t first = 0; first < w->n; first += step) {
        int64_t count = w->n - first < step ? w->n - first : step;
        char *stage = (char *)cuda_stage(k, (size_t)count * row_bytes);
        if (!stage)
            return false;
        for (int64_t r = 0; r < count && !k->is_dry; r++)
            put_row(stage + (size_t)r * row_bytes, w, source, first + r);
        cuda_send(k, (char *)w->data + (size_t)first * row_bytes, (size_t)count * row_bytes);
    }
    return !k->failed;
}

/* The rows of a weight in a layer, which is sent when it is needed. */
template <class Source> bool keep_rows(struct kern *k, struct kern_weight *w, const Source &source)
{
    size_t row_bytes = (size_t)gemm_depth(w) * tensor_dtype_bytes(w->dtype);
    char *host = (char *)cuda_layer_add(k, w);
    for (int64_t r = 0; host && r < w->n && !k->is_dry; r++)
        put_row(host + (size_t)r * row_bytes, w, source, r);
    return host != NULL;
}

template <class Source> bool place_rows(struct kern *k, struct kern_weight *w, const Source &source)
{
    if (cuda_layer_is_open(k))
        return keep_rows(k, w, source);
    w->data = cuda_alloc(k, w->bytes);
    return w->data && send_rows(k, w, source);
}

/* The bias is in the weight's dtype and added in f32. */
bool send_bias(struct kern *k, struct kern_weight *w, const struct tensor &bias)
{
    w->bias = (float *)cuda_alloc(k, (size_t)w->n * sizeof(float));
    float *stage = w->bias ? (float *)cuda_stage(k, (size_t)w->n * sizeof(float)) : NULL;
    if (!stage)
        return false;
    if (!k->is_dry)
        tensor_convert(tensor_1d(stage, TENSOR_F32, w->n), bias);
    cuda_send(k, w->bias, (size_t)w->n * sizeof(float));
    return !k->failed;
}

} // namespace

void linear_weight_free_cuda(struct kern *k, struct kern_weight *w)
{
    if (!w)
        return;
    linear_blas_plan_free((struct linear_blas_plan *)w->owner);
    if (w->host)
        cuda_layer_forget(w);
    else
        cuda_free(k, w->data);
    cuda_free(k, w->bias);
    free(w);
}

/* A weight of this description with its values on the device. */
template <class Source>
static struct kern_weight *weight_of(struct kern *k, const struct kern_weight &described, const Source &source, struct tensor bias)
{
    struct kern_weight *made = (struct kern_weight *)malloc(sizeof *made);
    if (!made) {
        kern_ops_fail(k, "no memory for a weight's description");
        return NULL;
    }
    *made = described;
    made->bytes = (size_t)(made->n * gemm_depth(made)) * tensor_dtype_bytes(made->dtype);
    if (made->dtype == TENSOR_BF16 && made->rank == 2 && !bias.data)
        made->owner = linear_blas_plan_new(cuda_blas(k), made->n, gemm_depth(made));
    if (place_rows(k, made, source) && (!bias.data || send_bias(k, made, bias)))
        return made;
    linear_weight_free_cuda(k, made);
    return NULL;
}

struct kern_weight *linear_weight_cuda(struct kern *k, enum tensor_dtype dtype, struct tensor w, struct tensor bias)
{
    bool is_conv = w.rank == 4;
    assert(!is_conv || tensor_is_contiguous(w));
    struct kern_weight described = {};
    described.dtype = dtype, described.rank = w.rank, described.n = w.shape[0], described.k = tensor_count(w) / w.shape[0];
    described.in = is_conv ? w.shape[1] : described.k;
    described.kh = is_conv ? (int)w.shape[2] : 1, described.kw = is_conv ? (int)w.shape[3] : 1;
    return weight_of(k, described, w, bias);
}

struct kern_weight *linear_weight_quant_cuda(struct kern *k, enum tensor_dtype dtype, const struct quant_run *runs, int count)
{
    struct kern_weight described = {};
    described.dtype = dtype, described.rank = 2, described.k = described.in = runs->matrix.k;
    described.kh = described.kw = 1;
    for (int i = 0; i < count; i++)
        described.n += runs[i].count;
    return weight_of(k, described, runs, (struct tensor){});
}

/* --- rows times a weight ------------------------------------------------------------------------------------ */

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

void linear_apply_cuda(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w)
{
    int64_t depth = gemm_depth(w);
    assert(x.shape[0] < INT32_MAX && depth < INT32_MAX);
    if (tensor_count(out) == 0)
        return;
    if (w->dtype == TENSOR_F32) {
        gemm_matrix<float> rows = {(const float *)x.data, x.stride[0], (int)x.shape[0], (int)depth};
        gemm_run_f32(k, "linear f32", rows, w, depth, out);
        return;
    }
    size_t mark = kern_mark(k);
    struct tensor aligned = gemm_rows_cuda(k, x, depth);
    if (!k->failed && w->owner && out.dtype == TENSOR_BF16 && gpu_is_vector(out)) {
        linear_blas_apply(k, (const struct linear_blas_plan *)w->owner, out, aligned, w->data);
    } else if (!k->failed) {
        gemm_matrix<bf16> rows = {(const bf16 *)aligned.data, aligned.stride[0], (int)x.shape[0], (int)depth};
        gemm_run_bf16(k, "linear", rows, w, depth, out);
    }
    kern_rewind(k, mark);
}
