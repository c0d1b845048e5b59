/* cuda_weight.c - weights onto the device, row by row through pinned memory; those of a layer stay in pinned memory.
 *
 * A weight is [n][kh][kw][inner], rounded to its dtype by the host on the way. A matrix that is quantised in its file stays so
 * where that is smaller: its blocks are copied as they are, each run at its place (quant_place_of), and products decode it
 * (dequant.cu). So the file may go. */
#include "cuda_weight.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_graph.h"
#include "cuda_layer.h"
#include "linear_blas.h"

/* Rows in host memory, how one of them gets the form it has on the device, and where they begin in the weight's memory. */
struct rows {
    void (*put)(char *to, const struct kern_weight *w, const void *source, int64_t row);
    const void *source;
    int64_t count;
    size_t bytes; /* of one, on the device */
    size_t at;
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

static void put_blocks(char *to, const struct kern_weight *w, const void *source, int64_t row)
{
    const struct quant_run *run = source;
    (void)w;
    memcpy(to, quant_row(&run->matrix, run->first + row), quant_row_bytes(&run->matrix));
}

static void put_scales(char *to, const struct kern_weight *w, const void *source, int64_t row)
{
    const struct quant_run *run = source;
    const struct quant_matrix *m = &run->matrix;
    (void)w;
    for (size_t i = 0; i < quant_row_scales(m); i++)
        to[i] = (char)m->block_scales[quant_block_scale_at(m, run->first + row, (int64_t)i)];
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
        cuda_send(k, (char *)w->data + rows->at + (size_t)first * rows->bytes, (size_t)count * rows->bytes);
    }
    return !k->failed;
}

/* Memory for a weight: of a layer, which is sent when it is needed, in the host. */
static bool take_memory(struct kern *k, struct kern_weight *w)
{
    if (cuda_layer_is_open(k))
        return cuda_layer_add(k, w) != NULL;
    w->data = cuda_alloc(k, w->bytes);
    return w->data != NULL;
}

static bool place_rows(struct kern *k, struct kern_weight *w, const struct rows *rows)
{
    if (rows->count == 0)
        return true;
    if (!w->host)
        return send_rows(k, w, rows);
    for (int64_t r = 0; r < rows->count && !k->is_dry; r++)
        rows->put((char *)w->host + rows->at + (size_t)r * rows->bytes, w, rows->source, r);
    return true;
}

/* As in the file. */
static bool place_runs(struct kern *k, struct kern_weight *w, const struct quant_run *runs)
{
    const struct cuda_weight *kept = cuda_weight_of(w);
    for (int i = 0; i < kept->run_count; i++) {
        const struct quant_run *run = &runs[i];
        const struct quant_place *place = &kept->runs[i].place;
        size_t scales = quant_row_scales(&run->matrix);
        if (!place_rows(k, w, &(struct rows){put_blocks, run, run->count, quant_row_bytes(&run->matrix), place->data}) ||
            !place_rows(k, w, &(struct rows){put_scales, run, scales ? run->count : 0, scales, place->scales}))
            return false;
    }
    return true;
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
    struct cuda_weight *own = w->owner;
    for (int i = 0; i < own->run_count; i++)
        linear_blas_plan_free(own->runs[i].plan);
    linear_blas_plan_free(own->plan);
    free(own);
    if (w->host)
        cuda_layer_forget(k, w);
    else
        cuda_free(k, w->data);
    cuda_free(k, w->bias);
    free(w);
}

void cuda_weight_free(struct kern *k, struct kern_weight *w)
{
    cuda_count_weights(k, -(int64_t)bytes_here(w));
    cuda_graph_forget(cuda_graphs_of(k));
    release(k, w);
}

static struct kern_weight *finish(struct kern *k, struct kern_weight *w, bool is_whole)
{
    if (!is_whole) {
        release(k, w);
        return NULL;
    }
    cuda_count_weights(k, (int64_t)bytes_here(w));
    return w;
}

/* A weight of this description without its values, with room for this many kept runs; NULL after the error is kept. is_planned: the
 * library may multiply by all of it. */
static struct kern_weight *begin(struct kern *k, const struct kern_weight *described, bool is_planned, int run_count)
{
    struct kern_weight *w = malloc(sizeof *w);
    struct cuda_weight *own = calloc(1, sizeof *own + (size_t)run_count * sizeof own->runs[0]);
    if (!w || !own) {
        kern_ops_fail(k, "no memory for a weight's description");
        free(w);
        free(own);
        return NULL;
    }
    *w = *described;
    w->owner = own;
    w->bytes = (size_t)(w->n * cuda_weight_depth(w)) * tensor_dtype_bytes(w->dtype);
    own->run_count = run_count;
    if (w->dtype == TENSOR_BF16 && is_planned)
        own->plan = linear_blas_plan_new(cuda_blas(k), w->n, cuda_weight_depth(w), false);
    return w;
}

/* All of it by `put`. */
static bool place_whole(struct kern *k, struct kern_weight *w, const void *source,
                        void (*put)(char *, const struct kern_weight *, const void *, int64_t))
{
    size_t row_bytes = (size_t)cuda_weight_depth(w) * tensor_dtype_bytes(w->dtype);
    return take_memory(k, w) && place_rows(k, w, &(struct rows){put, source, w->n, row_bytes, 0});
}

struct kern_weight *cuda_weight_new(struct kern *k, enum tensor_dtype dtype, struct tensor w, struct tensor bias)
{
    bool is_conv = w.rank == 4;
    assert(!is_conv || tensor_is_contiguous(w));
    struct kern_weight described = {.dtype = dtype, .rank = w.rank, .n = w.shape[0], .k = tensor_count(w) / w.shape[0]};
    described.in = is_conv ? w.shape[1] : described.k;
    described.kh = is_conv ? (int)w.shape[2] : 1, described.kw = is_conv ? (int)w.shape[3] : 1;
    struct kern_weight *made = begin(k, &described, !is_conv && !bias.data, 0);
    return made ? finish(k, made, place_whole(k, made, &w, put_values) && (!bias.data || send_bias(k, made, bias))) : NULL;
}

/* In FP8 where the device and the library can; else of the same numbers in bf16. */
static struct linear_blas_plan *plan_run(struct kern *k, const struct kern_weight *w, const struct quant_run *run)
{
    struct linear_blas_plan *plan = NULL;
    if (kern_ops_in_fp8(k, w->dtype, run))
        plan = linear_blas_plan_new(cuda_blas(k), run->count, w->k, true);
    if (!plan && !k->failed && w->dtype == TENSOR_BF16 && run->count)
        plan = linear_blas_plan_new(cuda_blas(k), run->count, cuda_weight_depth(w), false);
    return plan;
}

/* Where each run goes, and so how many bytes the weight has. */
static void describe_runs(struct kern *k, struct kern_weight *w, const struct quant_run *runs)
{
    struct cuda_weight *own = w->owner;
    own->has_fp8_products = quant_runs_have_fp8(runs, own->run_count);
    w->decoded_bytes = own->has_fp8_products ? 0 : w->bytes;
    w->bytes = 0;
    for (int i = 0; i < own->run_count; i++) {
        const struct quant_matrix *m = &runs[i].matrix;
        own->runs[i] = (struct cuda_weight_run){.format = m->format, .rows = runs[i].count, .row_bytes = quant_row_bytes(m),
                                                .scale = m->scale, .input_scale = m->input_scale, .low_first = m->low_first,
                                                .has_fp8_products = m->has_fp8_products, .place = quant_place_of(&runs[i], w->bytes)};
        if (own->has_fp8_products)
            own->runs[i].plan = plan_run(k, w, &runs[i]);
        w->bytes = own->runs[i].place.end;
    }
}

struct kern_weight *cuda_weight_quant(struct kern *k, enum tensor_dtype dtype, const struct quant_run *runs, int count)
{
    struct kern_weight described = {.dtype = dtype, .rank = 2, .k = runs->matrix.k, .in = runs->matrix.k, .kh = 1, .kw = 1};
    bool is_kept = quant_runs_are_small(runs, count);
    for (int i = 0; i < count; i++)
        described.n += runs[i].count;
    struct kern_weight *made = begin(k, &described, !quant_runs_have_fp8(runs, count), is_kept ? count : 0);
    if (!made)
        return NULL;
    if (!is_kept)
        return finish(k, made, place_whole(k, made, runs, put_decoded));
    describe_runs(k, made, runs);
    return finish(k, made, !k->failed && take_memory(k, made) && place_runs(k, made, runs));
}

void cuda_weight_take(struct kern *k, struct kern_layer *l, struct kern_weight *w)
{
    void *here = w->data;
    cudaStream_t stream = cuda_stream(k);
    assert(!w->host);
    assert(cuda_layer_is_open(k));
    (void)l;
    void *host = cuda_layer_add(k, w);
    if (!host)
        return;
    if (cuda_check(k, cudaMemcpyAsync(host, here, w->bytes, cudaMemcpyDeviceToHost, stream), "moving a weight to the host"))
        cuda_wait(k, "moving a weight to the host");
    cuda_count_weights(k, -(int64_t)w->bytes);
    cuda_graph_forget(cuda_graphs_of(k));
    cuda_free(k, here);
    w->data = NULL;
}
