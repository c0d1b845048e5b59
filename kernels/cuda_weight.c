/* cuda_weight.c - weights onto the device, row by row through pinned memory; those of a layer stay in pinned memory.
 *
 * A weight is [n][kh][kw][inner], rounded to its dtype by the host on the way; what is quantised in its file is decoded there,
 * too. */
#include "cuda_weight.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_layer.h"
#include "linear_blas.h"

/* Rows of a weight in host memory, and how one of them gets the form it has on the device. */
struct rows {
    void (*put)(char *to, const struct kern_weight *w, const void *source, int64_t row);
    const void *source;
    int64_t count;
    size_t bytes; /* of one, on the device */
};

/* --- rows ------------------------------------------------------------------------------------------------- */

static float host_value(const struct tensor *t, int64_t i)
{
    return t->dtype == TENSOR_F32 ? ((const float *)t->data)[i] : tensor_f32_of(((const uint16_t *)t->data)[i]);
}

/* Zeros behind the values of a tap. */
static void fill_up(char *row, const struct kern_weight *w)
{
    size_t size = tensor_dtype_bytes(w->dtype);
    memset(row + (size_t)w->in * size, 0, (size_t)(cuda_weight_inner(w) - w->in) * size);
}

/* [in][taps] in the source, [taps][inner] here. */
static void put_taps(char *to, const struct kern_weight *w, const struct tensor *t, int64_t row)
{
    int64_t taps = (int64_t)w->kh * w->kw, inner = cuda_weight_inner(w), begin = row * t->stride[0];
    for (int64_t tap = 0; tap < taps; tap++)
        for (int64_t i = 0; i < inner; i++) {
            float v = i < w->in ? host_value(t, begin + i * taps + tap) : 0;
            if (w->dtype == TENSOR_F32)
                ((float *)to)[tap * inner + i] = v;
            else
                ((uint16_t *)to)[tap * inner + i] = tensor_bf16_of(v);
        }
}

static void put_values(char *to, const struct kern_weight *w, const void *source, int64_t row)
{
    const struct tensor *t = source;
    if (w->kh * w->kw > 1) {
        put_taps(to, w, t, row);
        return;
    }
    char *from = (char *)t->data + (size_t)(row * t->stride[0]) * tensor_dtype_bytes(t->dtype);
    tensor_convert(tensor_1d(to, w->dtype, w->in), tensor_1d(from, t->dtype, w->in));
    fill_up(to, w);
}

static void put_decoded(char *to, const struct kern_weight *w, const void *source, int64_t row)
{
    const struct quant_run *run = source;
    for (; row >= run->count; run++)
        row -= run->count;
    quant_rows(to, w->dtype, &run->matrix, run->first + row, 1);
    fill_up(to, w);
}

/* --- onto the device ---------------------------------------------------------------------------------------- */

static bool send_rows(struct kern *k, struct kern_weight *w, const struct rows *rows)
{
    int64_t step = (int64_t)(CUDA_STAGE_BYTES / rows->bytes);
    if (step == 0) {
        kern_ops_fail(k, "a weight's row of %zu bytes, accepted: up to %zu", rows->bytes, CUDA_STAGE_BYTES);
        return false;
    }
    for (int64_t first = 0; first < rows->count; first += step) {
        int64_t count = rows->count - first < step ? rows->count - first : step;
        char *stage = cuda_stage(k, (size_t)count * rows->bytes);
        if (!stage)
            return false;
        for (int64_t r = 0; r < count && !k->is_dry; r++)
            rows->put(stage + (size_t)r * rows->bytes, w, rows->source, first + r);
        cuda_send(k, (char *)w->data + (size_t)first * rows->bytes, (size_t)count * rows->bytes);
    }
    return !k->failed;
}

/* The rows of a weight in a layer, which is sent when it is needed. */
static bool keep_rows(struct kern *k, struct kern_weight *w, const struct rows *rows)
{
    char *host = cuda_layer_add(k, w);
    for (int64_t r = 0; host && r < rows->count && !k->is_dry; r++)
        rows->put(host + (size_t)r * rows->bytes, w, rows->source, r);
    return host != NULL;
}

static bool place_rows(struct kern *k, struct kern_weight *w, const struct rows *rows)
{
    if (cuda_layer_is_open(k))
        return keep_rows(k, w, rows);
    w->data = cuda_alloc(k, w->bytes);
    return w->data && send_rows(k, w, rows);
}

/* The bias is in the weight's dtype and added in f32. */
static bool send_bias(struct kern *k, struct kern_weight *w, struct tensor bias)
{
    w->bias = cuda_alloc(k, (size_t)w->n * sizeof(float));
    float *stage = w->bias ? cuda_stage(k, (size_t)w->n * sizeof(float)) : NULL;
    if (!stage)
        return false;
    if (!k->is_dry)
        tensor_convert(tensor_1d(stage, TENSOR_F32, w->n), bias);
    cuda_send(k, w->bias, (size_t)w->n * sizeof(float));
    return !k->failed;
}

/* --- life --------------------------------------------------------------------------------------------------- */

/* Of the device's memory: a layer's weights are in the host's. */
static size_t bytes_here(const struct kern_weight *w)
{
    return w->host ? 0 : w->bytes;
}

static void release(struct kern *k, struct kern_weight *w)
{
    linear_blas_plan_free(w->owner);
    if (w->host)
        cuda_layer_forget(w);
    else
        cuda_free(k, w->data);
    cuda_free(k, w->bias);
    free(w);
}

void cuda_weight_free(struct kern *k, struct kern_weight *w)
{
    cuda_count_weights(k, -(int64_t)bytes_here(w));
    release(k, w);
}

/* A weight of this description with its values. */
static struct kern_weight *made_of(struct kern *k, const struct kern_weight *described, const void *source,
                                   void (*put)(char *, const struct kern_weight *, const void *, int64_t), struct tensor bias)
{
    struct kern_weight *w = malloc(sizeof *w);
    if (!w) {
        kern_ops_fail(k, "no memory for a weight's description");
        return NULL;
    }
    *w = *described;
    struct rows rows = {put, source, w->n, (size_t)cuda_weight_depth(w) * tensor_dtype_bytes(w->dtype)};
    w->bytes = (size_t)w->n * rows.bytes;
    if (w->dtype == TENSOR_BF16 && w->rank == 2 && !bias.data)
        w->owner = linear_blas_plan_new(cuda_blas(k), w->n, cuda_weight_depth(w));
    if (!place_rows(k, w, &rows) || (bias.data && !send_bias(k, w, bias))) {
        release(k, w);
        return NULL;
    }
    cuda_count_weights(k, (int64_t)bytes_here(w));
    return w;
}

struct kern_weight *cuda_weight_new(struct kern *k, enum tensor_dtype dtype, struct tensor w, struct tensor bias)
{
    bool is_conv = w.rank == 4;
    assert(!is_conv || tensor_is_contiguous(w));
    struct kern_weight described = {.dtype = dtype, .rank = w.rank, .n = w.shape[0], .k = tensor_count(w) / w.shape[0]};
    described.in = is_conv ? w.shape[1] : described.k;
    described.kh = is_conv ? (int)w.shape[2] : 1, described.kw = is_conv ? (int)w.shape[3] : 1;
    return made_of(k, &described, &w, put_values, bias);
}

struct kern_weight *cuda_weight_quant(struct kern *k, enum tensor_dtype dtype, const struct quant_run *runs, int count)
{
    struct kern_weight described = {.dtype = dtype, .rank = 2, .k = runs->matrix.k, .in = runs->matrix.k, .kh = 1, .kw = 1};
    for (int i = 0; i < count; i++)
        described.n += runs[i].count;
    return made_of(k, &described, runs, put_decoded, (struct tensor){0});
}
