/* linear.c - matrix times rows. Weights are packed once into panels; rows are packed once per call; then every
 * (block of columns, block of rows) is a task of its own, with its sums in that thread's scratch. Tasks that share
 * columns follow each other, so a block of the weight comes from memory once. */
#include "cpu_ops.h"
#include "gemm.h"

#include <stdlib.h>

#ifdef __AMX_BF16__
#define PANELS_PER_TASK (256 / GEMM_NR) /* the sums of one task are 384 KiB */
#else
#define PANELS_PER_TASK (128 / GEMM_NR) /* 48 KiB */
#endif

struct packing {
    struct kern_weight *w;
    struct tensor source; /* [n, k] in the stored dtype */
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
    int64_t in = w.shape[1], taps = w.shape[2] * w.shape[3];
    for (int64_t o = 0; o < n; o++)
        for (int64_t i = 0; i < in; i++)
            for (int64_t t = 0; t < taps; t++)
                vec_store(cpu_row(*ret, o), dtype, t * in + i, 1,
                          vec_load(cpu_row(flat, o), w.dtype, i * taps + t, 1));
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

struct product {
    struct kern *k;
    struct tensor out, x;
    const struct kern_weight *w;
    uint32_t *packed;
    int64_t rows, cells, words, blocks, block_rows;
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

static void multiply(void *context, int64_t task, int thread)
{
    const struct product *p = context;
    int64_t first = task % p->blocks * p->block_rows, left = p->rows - first;
    int64_t count = left < p->block_rows ? left : p->block_rows;
    int64_t panel = task / p->blocks * PANELS_PER_TASK, panels = gemm_panels(p->w->n) - panel, tiles = gemm_tiles(count);
    if (panels > PANELS_PER_TASK)
        panels = PANELS_PER_TASK;
    float *c = cpu_scratch(p->k, thread, (size_t)(panels * tiles * GEMM_TILE) * sizeof *c);
    if (!c)
        return;
    gemm_begin();
    gemm_product(c, gemm_packed(p->packed + first * p->words, p->words, p->w->dtype), tiles,
                 (const uint32_t *)p->w->data + panel * p->cells * GEMM_NR, panels, p->cells, p->w->dtype, false);
    gemm_end();
    void *out[GEMM_ROWS];
    for (int64_t r = 0; r < count; r++)
        out[r] = cpu_row(p->out, first + r);
    gemm_store(c, tiles, panels, count, out, p->out.dtype, panel * GEMM_NR, p->w->n, p->w->bias);
}

void CPU_NAME(linear_apply)(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w)
{
    struct product p = {.k = k, .out = out, .x = x, .w = w, .rows = x.shape[0]};
    p.cells = gemm_cells(w->k, w->dtype);
    p.words = gemm_words(w->k, w->dtype);
    if (p.rows == 0)
        return;
    p.blocks = (p.rows + GEMM_ROWS - 1) / GEMM_ROWS;
    p.block_rows = gemm_tiles((p.rows + p.blocks - 1) / p.blocks) * GEMM_MR; /* even blocks: threads end together */
    p.blocks = (p.rows + p.block_rows - 1) / p.block_rows;
    size_t mark = kern_mark(k);
    p.packed = kern_temp(k, TENSOR_F32, 1, (int64_t[]){gemm_tiles(p.rows) * p.words * GEMM_MR}).data;
    if (p.packed) {
        cpu_for(k, gemm_tiles(p.rows), pack_tile, &p);
        cpu_for(k, (gemm_panels(w->n) + PANELS_PER_TASK - 1) / PANELS_PER_TASK * p.blocks, multiply, &p);
    }
    kern_rewind(k, mark);
}
