/* conv.c - convolution as an implicit matrix product: a task takes a rectangle of output pixels and copies the input under
 * it, with the zeros around the picture, to its scratch. There a tap (kh, kw) of one pixel after another is the same
 * distance apart, so the micro-kernel reads its rows in place and jumps from tap to tap; nothing is gathered per tap.
 *
 *   stride 2: the copy is 2 x 2 planes, of even and odd rows and columns; in its plane a tap moves by whole pixels.
 *
 *             output pixel p = y * width + x        input of tap (ky, kx): plane (ky % s, kx % s), pixel p + ky / s * width + kx / s
 *
 *   width: of a row of the rectangle and what the taps reach beyond it; outputs in that margin are computed and dropped.
 *
 * Panels are the outer loop: their sums stay in a near cache, and the copy in the second-level one. */
#include "cpu_ops.h"
#include "gemm.h"

#define ACROSS 128 /* most pixels of a rectangle's row */
#ifdef __AMX_BF16__
#define PIXELS 512 /* of a rectangle: 16 tiles */
#else
#define PIXELS 192
#endif

struct job {
    struct kern *k;
    struct tensor out, x;
    const struct kern_weight *w;
    int stride, pad;
    int64_t pixel_words, reach_x, reach_y;  /* of taps, in pixels of a plane */
    int64_t block_w, block_h, across, down; /* rectangles */
};

struct rectangle { /* of output pixels */
    int64_t b, y, x, h, w;
    int64_t width, plane; /* pixels of a row of a plane; of a plane */
};

static struct rectangle rectangle_of(const struct job *j, int64_t task)
{
    struct rectangle r = {.b = task / j->across / j->down, .y = task / j->across % j->down * j->block_h,
                          .x = task % j->across * j->block_w};
    r.h = cpu_least(j->block_h, j->out.shape[1] - r.y);
    r.w = cpu_least(j->block_w, j->out.shape[2] - r.x);
    r.width = r.w + j->reach_x;
    r.plane = (r.h + j->reach_y) * r.width;
    return r;
}

/* A plane: input pixels (Y * stride + py, X * stride + px) from the rectangle's corner on. */
static void copy_plane(const struct job *j, const struct rectangle *r, int py, int px, uint32_t *to)
{
    int64_t h = j->x.shape[1], w = j->x.shape[2];
    size_t pixel = (size_t)j->w->in * tensor_dtype_bytes(j->x.dtype);
    for (int64_t i = 0; i < r->plane; i++, to += j->pixel_words) {
        int64_t y = (r->y + i / r->width) * j->stride + py - j->pad, x = (r->x + i % r->width) * j->stride + px - j->pad;
        bool is_inside = y >= 0 && y < h && x >= 0 && x < w;
        const char *from = (const char *)j->x.data + (size_t)((r->b * h + y) * w + x) * pixel;
        gemm_put_row(to, is_inside ? from : NULL, j->w->in, j->w->dtype);
    }
}

/* Where each tap begins in the planes, in words. */
static void find_taps(const struct job *j, const struct rectangle *r, int64_t *jump)
{
    for (int ky = 0; ky < j->w->kh; ky++)
        for (int kx = 0; kx < j->w->kw; kx++) {
            int64_t plane = ky % j->stride * j->stride + kx % j->stride;
            *jump++ = (plane * r->plane + ky / j->stride * r->width + kx / j->stride) * j->pixel_words;
        }
}

/* Where each position goes; NULL in the margin. */
static void find_outputs(const struct job *j, const struct rectangle *r, void **out)
{
    for (int64_t y = r->y; y < r->y + r->h; y++)
        for (int64_t x = 0; x < r->width; x++)
            *out++ = x < r->w ? cpu_row(j->out, (r->b * j->out.shape[1] + y) * j->out.shape[2] + r->x + x) : NULL;
}

static void run(void *context, int64_t task, int thread)
{
    const struct job *j = context;
    struct rectangle r = rectangle_of(j, task);
    int64_t positions = r.h * r.width, tiles = gemm_tiles(positions), taps = j->w->kh * j->w->kw;
    int64_t planes = j->stride * j->stride, spare = tiles * GEMM_MR - positions + j->reach_x;
    int64_t cells = gemm_cells(j->w->in, j->w->dtype), panel_words = taps * cells * GEMM_NR;
    size_t copy_bytes = (size_t)((planes * r.plane + spare) * j->pixel_words * 4 + 63) & ~(size_t)63;
    size_t sums_bytes = (size_t)(tiles * GEMM_TILE) * 4;
    size_t jump_bytes = (size_t)taps * sizeof(int64_t), out_bytes = (size_t)positions * sizeof(void *);
    char *memory = cpu_scratch(j->k, thread, copy_bytes + sums_bytes + jump_bytes + out_bytes);
    if (!memory)
        return;
    uint32_t *copy = (uint32_t *)memory;
    float *sums = (float *)(memory + copy_bytes);
    int64_t *jump = (int64_t *)(memory + copy_bytes + sums_bytes);
    void **out = (void **)(memory + copy_bytes + sums_bytes + jump_bytes);
    for (int plane = 0; plane < planes; plane++)
        copy_plane(j, &r, plane / j->stride, plane % j->stride, copy + plane * r.plane * j->pixel_words);
    find_taps(j, &r, jump);
    find_outputs(j, &r, out);
    struct gemm_rows rows = gemm_plain(copy, j->pixel_words, j->w->dtype);
    rows.jump = jump, rows.segment = cells;
    gemm_begin();
    for (int64_t p = 0; p < gemm_panels(j->w->n); p++) {
        gemm_product(sums, rows, tiles, (const uint32_t *)j->w->data + p * panel_words, 1, taps * cells, j->w->dtype, false);
        gemm_store(sums, tiles, 1, positions, out, j->out.dtype, p * GEMM_NR, j->w->n, NULL, j->w->bias);
    }
    gemm_end();
}

void CPU_NAME(conv_apply)(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w,
                          int stride, int pad)
{
    struct job j = {.k = k, .out = out, .x = x, .w = w, .stride = stride, .pad = pad};
    int64_t height = out.shape[1], width = out.shape[2];
    if (tensor_count(out) == 0)
        return;
    j.pixel_words = gemm_words(w->in, w->dtype);
    j.reach_x = (w->kw - 1) / stride, j.reach_y = (w->kh - 1) / stride;
    j.across = (width + ACROSS - 1) / ACROSS;
    j.block_w = (width + j.across - 1) / j.across; /* even parts */
    j.block_h = cpu_least(PIXELS / (j.block_w + j.reach_x) + 1, height);
    j.down = (height + j.block_h - 1) / j.block_h;
    cpu_for(k, out.shape[0] * j.down * j.across, run, &j);
}
