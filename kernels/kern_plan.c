/* kern_plan.c - weights are descriptions, the arena is a number, operations do nothing but take and return what the CUDA
 * backend's take of the arena for themselves. Whoever runs a model on it learns its memory, exactly where sizes are concerned
 * and without a second set of formulas. */
#include "kern_plan.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kern_ops.h"

#define ALIGN ((size_t)256) /* of pieces of the arena */
#define CHUNK_PIXELS 1024   /* of group norm: sums of so many make one pair of doubles */

struct plan {
    struct kern kern;
    size_t used, peak, weights;
    struct kern_layer *open;
};

static struct plan *plan_of(const struct kern *k)
{
    return (struct plan *)k;
}

static size_t aligned(size_t bytes)
{
    return bytes ? (bytes + ALIGN - 1) / ALIGN * ALIGN : ALIGN;
}

/* --- memory ------------------------------------------------------------------------------------------------ */

static void take(struct plan *p, size_t bytes)
{
    p->used += aligned(bytes);
    p->peak = p->used > p->peak ? p->used : p->peak;
}

/* What an op takes and returns. */
static void touch(struct kern *k, size_t bytes)
{
    struct plan *p = plan_of(k);
    size_t mark = p->used;
    take(p, bytes);
    p->used = mark;
}

static struct tensor plan_temp(struct kern *k, enum tensor_dtype dtype, int rank, const int64_t *shape)
{
    struct plan *p = plan_of(k);
    struct tensor t = tensor_of((void *)(uintptr_t)(ALIGN + p->used), dtype, rank, shape); /* never looked at */
    take(p, tensor_bytes(t));
    return t;
}

static size_t plan_mark(struct kern *k)
{
    return plan_of(k)->used;
}

static void plan_rewind(struct kern *k, size_t mark)
{
    plan_of(k)->used = mark;
}

static size_t plan_peak_bytes(const struct kern *k)
{
    return plan_of(k)->peak + plan_of(k)->weights;
}

static bool plan_memory(struct kern *k, struct kern_space *ret)
{
    (void)k;
    *ret = (struct kern_space){.all = SIZE_MAX, .available = SIZE_MAX};
    return true;
}

static void plan_reserve(struct kern *k, size_t bytes)
{
    (void)k, (void)bytes;
}

static bool plan_sync(struct kern *k)
{
    (void)k;
    return true;
}

/* --- weights ------------------------------------------------------------------------------------------------ */

static struct tensor plan_upload(struct kern *k, enum tensor_dtype dtype, struct tensor host)
{
    struct tensor t = tensor_of((void *)(uintptr_t)ALIGN, dtype, host.rank, host.shape);
    plan_of(k)->weights += aligned(tensor_bytes(t));
    return t;
}

static void plan_release(struct kern *k, struct tensor t)
{
    plan_of(k)->weights -= aligned(tensor_bytes(t));
}

static int64_t whole_chunks(int64_t values, enum tensor_dtype dtype)
{
    return dtype == TENSOR_BF16 ? (values + 7) / 8 * 8 : values; /* of 16 bytes */
}

/* A weight of this description, with its bytes; NULL after the error is kept. */
static struct kern_weight *count_weight(struct kern *k, const struct kern_weight *described, bool has_bias)
{
    struct plan *p = plan_of(k);
    struct kern_weight *made = malloc(sizeof *made);
    if (!made) {
        kern_ops_fail(k, "no memory for a weight's description");
        return NULL;
    }
    *made = *described;
    if (p->open)
        p->open->bytes += aligned(made->bytes);
    else
        p->weights += aligned(made->bytes) + (has_bias ? aligned((size_t)made->n * sizeof(float)) : 0);
    return made;
}

/* In its dtype, as products want it. */
static size_t decoded_bytes(const struct kern_weight *w)
{
    return (size_t)(w->n * w->kh * w->kw * whole_chunks(w->in, w->dtype)) * tensor_dtype_bytes(w->dtype);
}

static struct kern_weight *plan_weight(struct kern *k, enum tensor_dtype dtype, struct tensor w, struct tensor bias)
{
    bool is_conv = w.rank == 4;
    struct kern_weight described = {.dtype = dtype, .rank = w.rank, .n = w.shape[0], .k = tensor_count(w) / w.shape[0]};
    described.in = is_conv ? w.shape[1] : described.k;
    described.kh = is_conv ? (int)w.shape[2] : 1, described.kw = is_conv ? (int)w.shape[3] : 1;
    described.bytes = decoded_bytes(&described);
    return count_weight(k, &described, bias.data != NULL);
}

/* Runs that are products of their own, as at least one of them is in FP8, are remembered. False after the error is kept. */
static bool remember_runs(struct kern *k, struct kern_weight *w, const struct quant_run *runs, int count)
{
    if (!quant_runs_have_fp8(runs, count))
        return true;
    w->owner = malloc((size_t)count * sizeof *runs);
    if (!w->owner) {
        kern_ops_fail(k, "no memory for a weight's description");
        return false;
    }
    memcpy(w->owner, runs, (size_t)count * sizeof *runs);
    w->run_count = count;
    return true;
}

/* Quantised where that is smaller; else a weight like any other. */
static struct kern_weight *plan_weight_quant(struct kern *k, enum tensor_dtype dtype, const struct quant_run *runs, int count)
{
    struct kern_weight described = {.dtype = dtype, .rank = 2, .k = runs->matrix.k, .in = runs->matrix.k, .kh = 1, .kw = 1};
    for (int i = 0; i < count; i++)
        described.n += runs[i].count;
    described.bytes = decoded_bytes(&described);
    if (quant_runs_are_small(runs, count)) {
        described.decoded_bytes = described.bytes;
        described.bytes = 0;
        for (int i = 0; i < count; i++)
            described.bytes = quant_place_of(&runs[i], described.bytes).end;
    }
    if (!remember_runs(k, &described, runs, count))
        return NULL;
    struct kern_weight *made = count_weight(k, &described, false);
    if (!made)
        free(described.owner);
    return made;
}

static void plan_weight_free(struct kern *k, struct kern_weight *w)
{
    (void)k; /* a plan is closed with its weights: nobody asks for less of them */
    free(w->owner);
    free(w);
}

static struct kern_layer *plan_layer_begin(struct kern *k)
{
    struct kern_layer *l = plan_of(k)->open = calloc(1, sizeof *l);
    if (!l)
        kern_ops_fail(k, "no memory for a layer's description");
    return l;
}

static void plan_layer_take(struct kern *k, struct kern_layer *l, struct kern_weight *w)
{
    l->bytes += aligned(w->bytes);
    plan_of(k)->weights -= aligned(w->bytes);
}

static void plan_layer_end(struct kern *k, struct kern_layer *l)
{
    (void)l;
    plan_of(k)->open = NULL;
}

static void plan_layer_free(struct kern *k, struct kern_layer *l)
{
    (void)k;
    free(l);
}

static void plan_layer_fetch(struct kern *k, struct kern_layer *l, struct tensor seat)
{
    (void)k, (void)l, (void)seat;
}

static void plan_layer_use(struct kern *k, struct kern_layer *l)
{
    (void)k, (void)l;
}

/* --- operations ---------------------------------------------------------------------------------------------- */

/* Rows that are no whole chunks are copied. */
static size_t copied_rows(struct tensor x)
{
    int64_t width = x.shape[x.rank - 1], whole = whole_chunks(width, x.dtype);
    return whole == width ? 0 : (size_t)(tensor_count(x) / width * whole) * tensor_dtype_bytes(x.dtype);
}

/* NCCL's own memory is taken when a team is joined. */
static void plan_sum_ranks(struct kern *k, struct tensor x, int slot)
{
    (void)k, (void)x, (void)slot;
}

static void plan_sum_end(struct kern *k, int slot)
{
    (void)k, (void)slot;
}

static void plan_move(struct kern *k, struct tensor out, struct tensor x)
{
    (void)k, (void)out, (void)x;
}

/* A dense copy of what is not dense passes through the arena. */
static void plan_write(struct kern *k, struct tensor out, struct tensor host)
{
    (void)host;
    if (!tensor_is_contiguous(out))
        touch(k, tensor_bytes(out));
}

static void plan_read(struct kern *k, struct tensor host, struct tensor x)
{
    (void)host;
    if (!tensor_is_contiguous(x))
        touch(k, tensor_bytes(x));
}

static void plan_gather(struct kern *k, struct tensor out, const struct quant_matrix *table, struct tensor ids)
{
    (void)table;
    plan_write(k, out, ids);
}

/* A run that is a product of its own: rows in FP8 with their scales, or as they are; and the run decoded where it must be. */
static void plan_run(struct kern *k, struct tensor x, const struct kern_weight *w, const struct quant_run *r)
{
    struct plan *p = plan_of(k);
    bool is_fp8 = r->matrix.has_fp8_products, by_codes = kern_ops_in_fp8(k, w->dtype, r);
    size_t value = tensor_dtype_bytes(w->dtype), mark = p->used, depth = (size_t)whole_chunks(w->k, w->dtype), rows = (size_t)x.shape[0];
    if (is_fp8)
        take(p, rows * depth * (by_codes ? 1 : value));
    else if (copied_rows(x))
        take(p, copied_rows(x));
    if (is_fp8 && r->matrix.input_scale == 0)
        take(p, rows * sizeof(float));
    if (!by_codes)
        take(p, (size_t)r->count * depth * value);
    p->used = mark;
}

static void plan_linear(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w)
{
    struct plan *p = plan_of(k);
    size_t mark = p->used, rows = copied_rows(x);
    const struct quant_run *runs = w->owner;
    (void)out;
    for (int i = 0; i < w->run_count; i++)
        plan_run(k, x, w, &runs[i]);
    if (w->run_count)
        return;
    if (w->decoded_bytes)
        take(p, w->decoded_bytes);
    if (rows)
        take(p, rows);
    p->used = mark;
}

static void plan_conv2d(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w, int stride, int pad)
{
    (void)out, (void)w, (void)stride, (void)pad;
    if (copied_rows(x))
        touch(k, copied_rows(x));
}

static void plan_attention(struct kern *k, struct tensor out, struct tensor q, struct tensor key, struct tensor value, float scale,
                           struct kern_mask mask)
{
    (void)k, (void)out, (void)q, (void)key, (void)value, (void)scale, (void)mask;
}

static void plan_rms_norm(struct kern *k, struct tensor out, struct tensor x, struct tensor weight, float eps,
                          enum kern_rounding rounding)
{
    (void)k, (void)out, (void)x, (void)weight, (void)eps, (void)rounding;
}

static void plan_layer_norm_modulate(struct kern *k, struct tensor out, struct tensor x, struct tensor scale, struct tensor shift,
                                     float eps)
{
    (void)k, (void)out, (void)x, (void)scale, (void)shift, (void)eps;
}

static void plan_gated_add_norm(struct kern *k, struct tensor out, struct tensor x, struct tensor gate, struct tensor y,
                                struct tensor scale, struct tensor shift, float eps)
{
    (void)k, (void)out, (void)x, (void)gate, (void)y, (void)scale, (void)shift, (void)eps;
}

static void plan_group_norm(struct kern *k, struct tensor out, struct tensor x, struct tensor weight, struct tensor bias, int groups,
                            float eps, bool silu)
{
    int64_t chunks = (x.shape[1] * x.shape[2] + CHUNK_PIXELS - 1) / CHUNK_PIXELS;
    (void)out, (void)weight, (void)bias, (void)eps, (void)silu;
    touch(k, aligned((size_t)(x.shape[0] * chunks * groups) * 2 * sizeof(double)) + (size_t)(x.shape[0] * x.shape[3]) * 2 * sizeof(float));
}

static void plan_three(struct kern *k, struct tensor out, struct tensor a, struct tensor b)
{
    (void)k, (void)out, (void)a, (void)b;
}

static void plan_rms_rope(struct kern *k, struct tensor out, struct tensor x, struct tensor weight, float eps,
                          enum kern_rounding rounding, struct tensor cos, struct tensor sin, enum kern_rope_layout layout)
{
    (void)k, (void)out, (void)x, (void)weight, (void)eps, (void)rounding, (void)cos, (void)sin, (void)layout;
}

static void plan_timestep_embedding(struct kern *k, struct tensor out, float t)
{
    (void)k, (void)out, (void)t;
}

static void plan_guide(struct kern *k, struct tensor out, struct tensor c, struct tensor u, float g)
{
    (void)k, (void)out, (void)c, (void)u, (void)g;
}

static void plan_add_scaled(struct kern *k, struct tensor x, struct tensor y, float s)
{
    (void)k, (void)x, (void)y, (void)s;
}

static void plan_four(struct kern *k, struct tensor out, struct tensor a, struct tensor b, struct tensor c)
{
    (void)k, (void)out, (void)a, (void)b, (void)c;
}

static bool plan_has_nan(struct kern *k, struct tensor x)
{
    (void)k, (void)x;
    return false;
}

/* --- life ---------------------------------------------------------------------------------------------------- */

static void plan_close(struct kern *k)
{
    free(k);
}

static const struct kern_ops plan_table = {
    .close = plan_close,
    .sync = plan_sync,
    .temp = plan_temp,
    .mark = plan_mark,
    .rewind = plan_rewind,
    .peak_bytes = plan_peak_bytes,
    .memory = plan_memory,
    .reserve = plan_reserve,
    .write = plan_write,
    .read = plan_read,
    .upload = plan_upload,
    .release = plan_release,
    .weight = plan_weight,
    .weight_quant = plan_weight_quant,
    .weight_free = plan_weight_free,
    .layer_begin = plan_layer_begin,
    .layer_take = plan_layer_take,
    .layer_end = plan_layer_end,
    .layer_free = plan_layer_free,
    .layer_fetch = plan_layer_fetch,
    .layer_use = plan_layer_use,
    .sum_ranks = plan_sum_ranks,
    .sum_end = plan_sum_end,
    .checksum = plan_move,
    .copy = plan_move,
    .gather = plan_gather,
    .linear = plan_linear,
    .conv2d = plan_conv2d,
    .attention = plan_attention,
    .rms_norm = plan_rms_norm,
    .layer_norm_modulate = plan_layer_norm_modulate,
    .gated_add_norm = plan_gated_add_norm,
    .group_norm = plan_group_norm,
    .silu = plan_move,
    .silu_mul = plan_three,
    .add = plan_three,
    .gated_add = plan_three,
    .add_scaled = plan_add_scaled,
    .rms_rope = plan_rms_rope,
    .timestep_embedding = plan_timestep_embedding,
    .guide = plan_guide,
    .mix = plan_four,
    .unpatchify = plan_four,
    .patchify = plan_four,
    .upsample2 = plan_move,
    .pixels = plan_move,
    .has_nan = plan_has_nan,
};

struct kern *kern_plan_open(int rank, int ranks, bool has_fp8)
{
    struct plan *p = calloc(1, sizeof *p);
    if (!p)
        return NULL;
    p->kern = (struct kern){.ops = &plan_table, .is_dry = true, .has_fp8 = has_fp8, .rank = rank, .ranks = ranks, .name = "plan"};
    return &p->kern;
}

size_t kern_plan_weights(const struct kern *k)
{
    return plan_of(k)->weights;
}

size_t kern_plan_arena(struct kern *k)
{
    size_t peak = plan_of(k)->peak;
    plan_of(k)->peak = plan_of(k)->used;
    return peak;
}
