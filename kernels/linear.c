/* linear.c - matrix times rows. Weights are packed once into panels; rows are packed once per call; then every
 * (block of columns, block of rows) is a task of its own, with its sums in that thread's scratch. Tasks that share
 * columns follow each other, so a block of the weight comes from memory once.
 *
 * A quantised weight is kept as its file has it, in the file's own mapping: no second copy, and what the system needs
 * back it may drop and read again. A task then owns its columns for a band of several blocks of rows: a stretch of k after
 * the other, it decodes and packs its panels into its scratch and multiplies all blocks by them. So a value is decoded once
 * per band (768 rows) by one thread, nobody waits for anybody, and the sums are those of a packed weight to the bit: same
 * panels, same runs, same order. Wide tasks pay: what they decode and the rows they read are read fewer times.
 *
 * Products in FP8: e4m3 numbers are bf16 numbers, so that theirs is the product of the codes as they are with rows that were
 * rounded to e4m3 (fp8.c); each sum is multiplied by its row's scale before it is rounded. Runs have scales of their own: each
 * is a product. */
#include "cpu_ops.h"
#include "dequant.h"
#include "gemm.h"

#include <stdlib.h>
#include <string.h>

#ifdef __AMX_BF16__
#define PANELS_PER_TASK (256 / GEMM_NR) /* the sums of one task are 384 KiB */
#define KEPT_PANELS (384 / GEMM_NR)     /* of a kept weight's: 1152 KiB, and as much decoded */
#define BAND_BLOCKS 2
#else
#define PANELS_PER_TASK (128 / GEMM_NR) /* 48 KiB */
#define KEPT_PANELS PANELS_PER_TASK     /* 384 KiB, and as much decoded */
#define BAND_BLOCKS 8
#endif
#define STRETCH (3 * GEMM_RUN) /* values of k that are decoded at once */

struct packing {
    struct kern_weight *w;
    struct tensor source; /* [n, k] in the stored dtype */
};

struct turning {
    struct tensor from, to; /* [n, in * taps], [n, taps * in] */
    int64_t in, taps;
};

static void pack_panel(void *context, int64_t panel, int thread)
{
    (void)thread;
    const struct packing *p = context;
    const void *rows[GEMM_NR];
    for (int i = 0; i < GEMM_NR; i++) {
        int64_t n = panel * GEMM_NR + i;
        rows[i] = n < p->w->n ? cpu_row(p->source, n) : NULL;
    }
    int64_t taps = p->w->kh * p->w->kw, cells = gemm_cells(p->w->in, p->w->dtype);
    uint32_t *to = (uint32_t *)p->w->data + panel * taps * cells * GEMM_NR;
    for (int64_t t = 0; t < taps; t++, to += cells * GEMM_NR) {
        gemm_pack_columns(to, rows, p->w->in, p->w->dtype);
        for (int i = 0; i < GEMM_NR; i++)
            rows[i] = rows[i] ? (const char *)rows[i] + (size_t)p->w->in * tensor_dtype_bytes(p->w->dtype) : NULL;
    }
}

static inline __attribute__((always_inline)) void turn(const struct turning *t, char *to, const char *from, size_t size)
{
    for (int64_t i = 0; i < t->in; i++)
        for (int64_t tap = 0; tap < t->taps; tap++)
            memcpy(to + (size_t)(tap * t->in + i) * size, from + (size_t)(i * t->taps + tap) * size, size);
}

/* One output of a convolution: [in, taps] of any dtype to [taps, in]. */
static void turn_taps(void *context, int64_t o, int thread)
{
    (void)thread;
    const struct turning *t = context;
    const char *from = cpu_row(t->from, o);
    char *to = cpu_row(t->to, o);
    if (t->from.dtype == t->to.dtype && t->to.dtype == TENSOR_BF16)
        turn(t, to, from, sizeof(uint16_t));
    else if (t->from.dtype == t->to.dtype)
        turn(t, to, from, sizeof(float));
    else
        for (int64_t i = 0; i < t->in * t->taps; i++)
            vec_store(to, t->to.dtype, i % t->taps * t->in + i / t->taps, 1, vec_load(from, t->from.dtype, i, 1));
}

/* A convolution [n, in, kh, kw] as rows of k = (kh, kw, in); a matrix is itself. Converted to `dtype` when it
 * has another. Returns malloc'ed memory to free, or NULL when the source serves as it is. */
static void *source_rows(struct kern *k, enum tensor_dtype dtype, struct tensor w, struct tensor *ret)
{
    int64_t n = w.shape[0], width = tensor_count(w) / n;
    struct tensor flat = w.rank == 2 ? w : tensor_shape(w, 2, (int64_t[]){n, width});
    *ret = flat;
    if (w.rank == 2 && w.dtype == dtype)
        return NULL;
    void *memory = malloc((size_t)tensor_count(w) * tensor_dtype_bytes(dtype) + 64);
    if (!memory) {
        kern_ops_fail(k, "no memory for a weight of %lld values", (long long)tensor_count(w));
        return NULL;
    }
    *ret = tensor_2d(memory, dtype, n, width);
    if (w.rank == 2) {
        CPU_NAME(elementwise_copy)(k, *ret, flat);
        return memory;
    }
    struct turning t = {flat, *ret, w.shape[1], w.shape[2] * w.shape[3]};
    cpu_for(k, n, turn_taps, &t);
    return memory;
}

struct kern_weight *CPU_NAME(linear_weight)(struct kern *k, enum tensor_dtype dtype, struct tensor w,
                                            struct tensor bias)
{
    struct packing p = {.w = calloc(1, sizeof *p.w)};
    void *converted = NULL;
    if (!p.w)
        goto no_memory;
    converted = source_rows(k, dtype, w, &p.source);
    if (k->failed)
        goto failed;
    int64_t n = w.shape[0], width = tensor_count(w) / n;
    bool is_conv = w.rank == 4;
    *p.w = (struct kern_weight){.dtype = dtype, .rank = w.rank, .n = n, .k = width,
                                .in = is_conv ? w.shape[1] : width, .kh = is_conv ? (int)w.shape[2] : 1,
                                .kw = is_conv ? (int)w.shape[3] : 1};
    p.w->bytes = (size_t)(gemm_panels(n) * p.w->kh * p.w->kw * gemm_cells(p.w->in, dtype) * GEMM_NR) * 4;
    p.w->data = cpu_alloc(p.w->bytes);
    if (!p.w->data)
        goto no_memory;
    if (bias.data) {
        p.w->bias = malloc((size_t)n * sizeof(float));
        if (!p.w->bias)
            goto no_memory;
        CPU_NAME(elementwise_copy)(k, tensor_1d(p.w->bias, TENSOR_F32, n), bias);
    }
    cpu_for(k, gemm_panels(n), pack_panel, &p);
    free(converted);
    return p.w;
no_memory:
    kern_ops_fail(k, "no memory for a weight of %lld values", (long long)tensor_count(w));
failed:
    if (p.w) {
        cpu_free(p.w->data, p.w->bytes);
        free(p.w->bias);
    }
    free(p.w);
    free(converted);
    return NULL;
}

/* --- weights as in a file --------------------------------------------------------------------------------- */

#define ROW_STRIDE (GEMM_RUN + 32) /* rows a power of two apart would share few places of a cache */
#define ROWS_BYTES(dtype) ((size_t)(GEMM_NR * ROW_STRIDE) * tensor_dtype_bytes(dtype))

/* Packs at most a run of the panel's columns, values [first, first + count); `memory` is ROWS_BYTES for them as rows. */
static void pack_run(uint32_t *to, const struct kern_weight *w, int64_t panel, int64_t first, int64_t count, char *memory)
{
    const size_t stride = ROW_STRIDE * tensor_dtype_bytes(w->dtype);
    const void *rows[GEMM_NR] = {0};
    int64_t begin = panel * GEMM_NR, end = begin + GEMM_NR, at = 0;
    for (int i = 0; i < w->run_count; at += w->runs[i++].count) {
        const struct quant_run *run = &w->runs[i];
        int64_t from = begin > at ? begin : at, until = end < at + run->count ? end : at + run->count;
        if (from < until)
            CPU_NAME(dequant_rows)(memory + (size_t)(from - begin) * stride, w->dtype, ROW_STRIDE, &run->matrix,
                                   run->first + from - at, until - from, first, count);
    }
    for (int i = 0; i < GEMM_NR && begin + i < w->n; i++)
        rows[i] = memory + (size_t)i * stride;
    gemm_pack_columns(to, rows, count, w->dtype);
}

/* Any number of values, which begin and end where runs do or the weight does. */
static void pack_stretch(uint32_t *to, const struct kern_weight *w, int64_t panel, int64_t first, int64_t count, char *memory)
{
    for (int64_t at = 0; at < count; at += GEMM_RUN)
        pack_run(to + gemm_cells(at, w->dtype) * GEMM_NR, w, panel, first + at, cpu_least(count - at, GEMM_RUN), memory);
}

struct loading {
    struct kern *k;
    const struct kern_weight *w;
};

static void pack_whole_panel(void *context, int64_t panel, int thread)
{
    const struct loading *l = context;
    char *memory = cpu_scratch(l->k, thread, ROWS_BYTES(l->w->dtype));
    uint32_t *to = (uint32_t *)l->w->data + panel * gemm_cells(l->w->k, l->w->dtype) * GEMM_NR;
    if (memory)
        pack_stretch(to, l->w, panel, 0, l->w->k, memory);
}

/* The codes of a run as they are, without the scale. */
static struct quant_matrix unscaled(const struct quant_run *run)
{
    struct quant_matrix m = run->matrix;
    m.scale = 1;
    return m;
}

/* The weight's own list of its runs, with the codes of each behind it. */
static bool copy_runs(struct kern_weight *w, const struct quant_run *runs, int count)
{
    size_t codes = 0;
    for (int i = 0; i < count; i++)
        codes += quant_code_count(&runs[i].matrix);
    w->runs = malloc((size_t)count * sizeof *runs + codes * sizeof(uint16_t));
    if (!w->runs)
        return false;
    w->run_count = count;
    uint16_t *next = (uint16_t *)(w->runs + count);
    for (int i = 0; i < count; i++) {
        struct quant_matrix coded = runs[i].matrix.has_fp8_products ? unscaled(&runs[i]) : runs[i].matrix;
        w->runs[i] = runs[i];
        quant_codes(next, &coded);
        w->runs[i].matrix.codes = quant_code_count(&runs[i].matrix) ? next : NULL;
        next += quant_code_count(&runs[i].matrix);
    }
    return true;
}

/* Decodes what is not kept, on all threads. */
static void pack_runs(struct kern *k, struct kern_weight *w)
{
    w->bytes = (size_t)(gemm_panels(w->n) * gemm_cells(w->k, w->dtype) * GEMM_NR) * 4;
    w->data = cpu_alloc(w->bytes);
    if (w->data)
        cpu_for(k, gemm_panels(w->n), pack_whole_panel, &(struct loading){k, w});
    else
        kern_ops_fail(k, "no memory for a weight of %lld values", (long long)(w->n * w->k));
    free(w->runs);
    w->runs = NULL, w->run_count = 0;
}

struct kern_weight *CPU_NAME(linear_weight_quant)(struct kern *k, enum tensor_dtype dtype, const struct quant_run *runs,
                                                  int count)
{
    struct kern_weight *w = calloc(1, sizeof *w);
    if (!w || !copy_runs(w, runs, count)) {
        kern_ops_fail(k, "no memory for a weight's description");
        free(w);
        return NULL;
    }
    w->dtype = dtype, w->rank = 2, w->k = w->in = runs[0].matrix.k, w->kh = w->kw = 1;
    for (int i = 0; i < count; i++) {
        w->n += runs[i].count;
        w->bytes += quant_run_bytes(&runs[i]);
    }
    if (!quant_runs_are_small(runs, count))
        pack_runs(k, w);
    if (!k->failed)
        return w;
    cpu_free(w->data, w->bytes);
    free(w->runs);
    free(w);
    return NULL;
}

/* --- products ------------------------------------------------------------------------------------------------ */

struct product {
    struct kern *k;
    struct tensor out, x;
    const struct kern_weight *w;
    const float *scales; /* of rows, or NULL */
    uint32_t *packed;
    int64_t rows, cells, words;
    int64_t blocks, block_rows; /* of rows */
    int64_t bands, band_blocks; /* of blocks: those of one task */
    int64_t panels;             /* of one task, at most */
};

static void pack_tile(void *context, int64_t tile, int thread)
{
    (void)thread;
    const struct product *p = context;
    const void *rows[GEMM_MR];
    for (int i = 0; i < GEMM_MR; i++) {
        int64_t r = tile * GEMM_MR + i;
        rows[i] = r < p->rows ? cpu_row(p->x, r) : NULL;
    }
    gemm_pack_rows(p->packed + tile * p->words * GEMM_MR, rows, p->w->k, p->w->dtype);
}

/* Sums of one block over `panels` panels. */
static int64_t block_sums(const struct product *p, int64_t panels)
{
    return panels * gemm_tiles(p->block_rows) * GEMM_TILE;
}

static int64_t rows_of_block(const struct product *p, int64_t block)
{
    return cpu_least(p->rows - block * p->block_rows, p->block_rows);
}

/* The rows of a block from `first` of k on. */
static struct gemm_rows block_at(const struct product *p, int64_t block, int64_t first)
{
    int64_t follow;
    struct gemm_rows a = gemm_packed(p->packed + block * p->block_rows * p->words, p->words, p->w->dtype);
    a.data = gemm_words_at(a, a.data, gemm_cells(first, p->w->dtype), p->w->dtype, &follow);
    return a;
}

static void store_block(const struct product *p, const float *c, int64_t block, int64_t panel, int64_t panels)
{
    void *out[GEMM_ROWS];
    int64_t count = rows_of_block(p, block);
    for (int64_t r = 0; r < count; r++)
        out[r] = cpu_row(p->out, block * p->block_rows + r);
    gemm_store(c, gemm_tiles(count), panels, count, out, p->out.dtype, panel * GEMM_NR, p->w->n,
               p->scales ? p->scales + block * p->block_rows : NULL, p->w->bias);
}

/* All of k in the panels that the weight has: a band is one block. */
static void multiply(void *context, int64_t task, int thread)
{
    const struct product *p = context;
    int64_t block = task % p->blocks, panel = task / p->blocks * p->panels;
    int64_t panels = cpu_least(gemm_panels(p->w->n) - panel, p->panels);
    float *c = cpu_scratch(p->k, thread, (size_t)block_sums(p, panels) * sizeof *c);
    if (!c)
        return;
    gemm_begin();
    gemm_product(c, block_at(p, block, 0), gemm_tiles(rows_of_block(p, block)),
                 (const uint32_t *)p->w->data + panel * p->cells * GEMM_NR, panels, p->cells, p->w->dtype, false);
    gemm_end();
    store_block(p, c, block, panel, panels);
}

/* A kept weight: each stretch of k is decoded for the band. */
static void multiply_kept(void *context, int64_t task, int thread)
{
    const struct product *p = context;
    enum tensor_dtype dtype = p->w->dtype;
    int64_t block = task % p->bands * p->band_blocks, blocks = cpu_least(p->blocks - block, p->band_blocks);
    int64_t panel = task / p->bands * p->panels, panels = cpu_least(gemm_panels(p->w->n) - panel, p->panels);
    int64_t sums = block_sums(p, panels), words = panels * gemm_cells(STRETCH, dtype) * GEMM_NR;
    float *c = cpu_scratch(p->k, thread, (size_t)(blocks * sums + words) * 4 + ROWS_BYTES(dtype));
    if (!c)
        return;
    uint32_t *decoded = (uint32_t *)(c + blocks * sums);
    gemm_begin();
    for (int64_t first = 0; first < p->w->k; first += STRETCH) {
        int64_t count = cpu_least(p->w->k - first, STRETCH), cells = gemm_cells(count, dtype);
        for (int64_t i = 0; i < panels; i++)
            pack_stretch(decoded + i * cells * GEMM_NR, p->w, panel + i, first, count, (char *)(decoded + words));
        for (int64_t i = 0; i < blocks; i++)
            gemm_product(c + i * sums, block_at(p, block + i, first), gemm_tiles(rows_of_block(p, block + i)), decoded, panels,
                         cells, dtype, first > 0);
    }
    gemm_end();
    for (int64_t i = 0; i < blocks; i++)
        store_block(p, c + i * sums, block + i, panel, panels);
}

static int64_t plan_tasks(struct product *p)
{
    p->bands = (p->blocks + p->band_blocks - 1) / p->band_blocks;
    return (gemm_panels(p->w->n) + p->panels - 1) / p->panels * p->bands;
}

/* Even blocks and bands, so that threads end together. With many threads the tasks of a kept weight get narrower, then shorter. */
static int64_t plan(struct product *p)
{
    p->blocks = (p->rows + GEMM_ROWS - 1) / GEMM_ROWS;
    p->block_rows = gemm_tiles((p->rows + p->blocks - 1) / p->blocks) * GEMM_MR;
    p->blocks = (p->rows + p->block_rows - 1) / p->block_rows;
    p->panels = p->w->runs ? KEPT_PANELS : PANELS_PER_TASK;
    p->band_blocks = 1;
    if (!p->w->runs)
        return plan_tasks(p);
    int64_t bands = (p->blocks + BAND_BLOCKS - 1) / BAND_BLOCKS;
    p->band_blocks = (p->blocks + bands - 1) / bands;
    while (plan_tasks(p) < 2 * cpu_threads(p->k) && (p->panels > 1 || p->band_blocks > 1))
        *(p->panels > 1 ? &p->panels : &p->band_blocks) /= 2;
    return plan_tasks(p);
}

static void apply(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w, const float *scales)
{
    struct product p = {.k = k, .out = out, .x = x, .w = w, .scales = scales, .rows = x.shape[0]};
    p.cells = gemm_cells(w->k, w->dtype);
    p.words = gemm_words(w->k, w->dtype);
    if (p.rows == 0)
        return;
    int64_t tasks = plan(&p);
    size_t mark = kern_mark(k);
    p.packed = kern_temp(k, TENSOR_F32, 1, (int64_t[]){gemm_tiles(p.rows) * p.words * GEMM_MR}).data;
    if (p.packed) {
        cpu_for(k, gemm_tiles(p.rows), pack_tile, &p);
        cpu_for(k, tasks, w->runs ? multiply_kept : multiply, &p);
    }
    kern_rewind(k, mark);
}

static void apply_fp8(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w)
{
    struct tensor q = kern_temp(k, x.dtype, 2, x.shape), scales = kern_temp(k, TENSOR_F32, 1, x.shape);
    struct quant_run codes = *w->runs;
    struct kern_weight unit = *w;
    codes.matrix = unscaled(w->runs);
    unit.runs = &codes;
    if (k->failed)
        return;
    CPU_NAME(fp8_rows)(k, q, scales.data, x, &w->runs->matrix);
    apply(k, out, q, &unit, scales.data);
}

/* Each run is a product. */
static void apply_runs(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w)
{
    size_t mark = kern_mark(k);
    int64_t at = 0;
    for (int i = 0; i < w->run_count; at += w->runs[i++].count) {
        struct kern_weight part = *w;
        struct tensor columns = tensor_slice(out, 1, at, w->runs[i].count);
        part.runs = &w->runs[i], part.run_count = 1, part.n = w->runs[i].count;
        if (w->runs[i].matrix.has_fp8_products)
            apply_fp8(k, columns, x, &part);
        else
            apply(k, columns, x, &part, NULL);
        kern_rewind(k, mark);
    }
}

void CPU_NAME(linear_apply)(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w)
{
    if (quant_runs_have_fp8(w->runs, w->run_count))
        apply_runs(k, out, x, w);
    else
        apply(k, out, x, w, NULL);
}
