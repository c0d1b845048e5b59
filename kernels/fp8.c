/* fp8.c - rows as products in FP8 see them: divided by a scale and rounded to e4m3. A row depends on itself alone, and values stay
 * in the dtype they came in, which holds every e4m3: so the product that follows is the ordinary one. */
#include "cpu_ops.h"

#include "vec.h"

#define LARGEST 448.0f /* e4m3 */

struct rows {
    struct tensor q, x;
    float *scales;
    const struct quant_matrix *m;
};

VEC_INLINE vf magnitude(vf x)
{
    return (vf)((vu)x & 0x7fffffffu);
}

/* To the nearest of 8 steps between powers of two, below 2^-6 to multiples of 2^-9. A number 2^20 times the power of two below has just
 * these steps, so that adding it rounds. NaN stays NaN. */
VEC_INLINE vf round_e4m3(vf x)
{
    vf a = magnitude(x);
    vu sign = (vu)x ^ (vu)a;
    a = vec_select(a > LARGEST, vec_splat(LARGEST), a);
    vf below = (vf)((vu)a & 0x7f800000u);
    vf step = vec_max(below, vec_splat(0x1p-6f)) * 0x1p20f;
    return (vf)((vu)(a + step - step) | sign);
}

static float largest_of(const void *row, enum tensor_dtype dtype, int64_t width)
{
    vf largest = {0};
    for (int64_t i = 0; i < width; i += VEC)
        largest = vec_max(magnitude(vec_load(row, dtype, i, width - i)), largest);
    return vec_max_all(largest);
}

static void run(void *context, int64_t first, int64_t end)
{
    const struct rows *j = context;
    int64_t width = j->x.shape[1];
    for (int64_t r = first; r < end; r++) {
        const void *x = cpu_row(j->x, r);
        void *q = cpu_row(j->q, r);
        float s = j->m->input_scale > 0 ? j->m->input_scale : quant_row_scale(largest_of(x, j->x.dtype, width));
        for (int64_t i = 0; i < width; i += VEC)
            vec_store(q, j->q.dtype, i, width - i, round_e4m3(vec_load(x, j->x.dtype, i, width - i) / s));
        j->scales[r] = j->m->scale * s;
    }
}

void CPU_NAME(fp8_rows)(struct kern *k, struct tensor q, float *scales, struct tensor x, const struct quant_matrix *m)
{
    cpu_rows(k, x.shape[0], x.shape[1], run, &(struct rows){q, x, scales, m});
}
