/* conv.c - convolution as an implicit matrix product: a task takes a block of output pixels, gathers the input
 * values under each (kh, kw, in, channels last, so a tap is one copy), packs them, and runs all panels of the weight. */
#include "cpu_ops.h"
#include "gemm.h"

struct job {
    struct kern *k;
    struct tensor out, x;
    const struct kern_weight *w;
    int stride, pad;
    int64_t pixels, cells, words;
};

/* The k input values under output pixel p (counted over the batch), zeros outside the picture. */
static void gather_pixel(const struct job *j, int64_t p, char *to)
{
    int64_t ow = j->out.shape[2], oh = j->out.shape[1], h = j->x.shape[1], w = j->x.shape[2];
    int64_t ox = p % ow, oy = p / ow % oh, b = p / ow / oh;
    size_t tap = (size_t)j->w->in * tensor_dtype_bytes(j->x.dtype);
    for (int ky = 0; ky < j->w->kh; ky++) {
        int64_t y = oy * j->stride - j->pad + ky;
        for (int kx = 0; kx < j->w->kw; kx++, to += tap) {
            int64_t x = ox * j->stride - j->pad + kx;
            if (y < 0 || y >= h || x < 0 || x >= w)
                memset(to, 0, tap);
            else
                memcpy(to, (const char *)j->x.data + (size_t)((b * h + y) * w + x) * tap, tap);
        }
    }
}

static void run(void *context, int64_t task, int thread)
{
    const struct job *j = context;
    int64_t first = task * GEMM_ROWS;
    int64_t count = j->pixels - first < GEMM_ROWS ? j->pixels - first : GEMM_ROWS;
    int64_t tiles = gemm_tiles(count);
    size_t row_bytes = ((size_t)j->w->k * tensor_dtype_bytes(j->x.dtype) + 63) & ~(size_t)63;
    int64_t panels = gemm_panels(j->w->n);
    size_t packed_bytes = (size_t)(tiles * j->words * GEMM_MR) * 4, tile_bytes = (size_t)(panels * tiles * GEMM_TILE) * 4;
    char *memory = cpu_scratch(j->k, thread, packed_bytes + tile_bytes + GEMM_MR * row_bytes + 256);
    if (!memory)
        return;
    float *c = (float *)memory;
    uint32_t *packed = (uint32_t *)(memory + tile_bytes);
    char *gathered = memory + tile_bytes + ((packed_bytes + 63) & ~(size_t)63);
    void *out[GEMM_ROWS];
    for (int64_t t = 0; t < tiles; t++) {
        const void *rows[GEMM_MR];
        for (int i = 0; i < GEMM_MR; i++) {
            int64_t p = t * GEMM_MR + i;
            rows[i] = p < count ? gathered + (size_t)i * row_bytes : NULL;
            if (p < count) {
                gather_pixel(j, first + p, gathered + (size_t)i * row_bytes);
                out[p] = cpu_row(j->out, first + p);
            }
        }
        gemm_pack_rows(packed + t * j->words * GEMM_MR, rows, j->w->k, j->w->dtype);
    }
    gemm_begin();
    gemm_product(c, gemm_packed(packed, j->words, j->w->dtype), tiles, j->w->data, panels, j->cells, j->w->dtype, false);
    gemm_end();
    gemm_store(c, tiles, panels, count, out, j->out.dtype, 0, j->w->n, j->w->bias);
}

void CPU_NAME(conv_apply)(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w,
                          int stride, int pad)
{
    struct job j = {.k = k, .out = out, .x = x, .w = w, .stride = stride, .pad = pad};
    j.pixels = out.shape[0] * out.shape[1] * out.shape[2];
    j.cells = gemm_cells(w->k, w->dtype);
    j.words = gemm_words(w->k, w->dtype);
    cpu_for(k, (j.pixels + GEMM_ROWS - 1) / GEMM_ROWS, run, &j);
}
