/* rope.c - norm of a head, then rotary position embedding in its two layouts; mixing them up yields plausible noise. */
#include "cpu_ops.h"

#include "vec.h"

struct job {
    struct tensor out, x, weight, cos, sin;
    float eps;
    enum kern_rounding rounding;
    enum kern_rope_layout layout;
};

static void rotate_halves(const struct job *j, void *row, const float *cos, const float *sin)
{
    enum tensor_dtype d = j->x.dtype;
    int64_t half = j->x.shape[3] / 2;
    char *upper = (char *)row + (size_t)half * tensor_dtype_bytes(d);
    for (int64_t i = 0; i < half; i += VEC) {
        int64_t n = half - i;
        vf a = vec_load(row, d, i, n), b = vec_load(upper, d, i, n);
        vf c = vec_round(vec_load(cos, TENSOR_F32, i, n), d), s = vec_round(vec_load(sin, TENSOR_F32, i, n), d);
        vec_store(row, d, i, n, vec_round(a * c, d) - vec_round(b * s, d));
        vec_store(upper, d, i, n, vec_round(b * c, d) + vec_round(a * s, d));
    }
}

static void rotate_pairs(const struct job *j, void *row, const float *cos, const float *sin)
{
    enum tensor_dtype d = j->x.dtype;
    int64_t width = j->x.shape[3];
    for (int64_t i = 0; i < width; i += VEC) {
        int64_t n = width - i < VEC ? width - i : VEC;
        vf x = vec_load(row, d, i, n), turned = x, c = {0}, s = {0};
        for (int64_t t = 0; t < n; t += 2) {
            c[t] = c[t + 1] = cos[(i + t) / 2];
            s[t] = -sin[(i + t) / 2];
            s[t + 1] = sin[(i + t) / 2];
            turned[t] = x[t + 1];
            turned[t + 1] = x[t];
        }
        vec_store(row, d, i, n, x * c + turned * s);
    }
}

static void run(void *context, int64_t first, int64_t end)
{
    const struct job *j = context;
    int64_t heads = j->x.shape[2], rows = j->x.shape[1], half = j->x.shape[3] / 2;
    for (int64_t r = first; r < end; r++) {
        int64_t position = r / heads % rows;
        const float *cos = (const float *)j->cos.data + position * half;
        const float *sin = (const float *)j->sin.data + position * half;
        void *out = cpu_row(j->out, r);
        CPU_NAME(norm_rms_row)(out, cpu_row(j->x, r), j->x.dtype, j->weight, j->eps, j->rounding);
        if (j->layout == KERN_ROPE_HALVES)
            rotate_halves(j, out, cos, sin);
        else
            rotate_pairs(j, out, cos, sin);
    }
}

void CPU_NAME(rope_rms)(struct kern *k, struct tensor out, struct tensor x, struct tensor weight, float eps,
                        enum kern_rounding rounding, struct tensor cos, struct tensor sin, enum kern_rope_layout layout)
{
    struct job j = {out, x, weight, cos, sin, eps, rounding, layout};
    cpu_rows(k, x.shape[0] * x.shape[1] * x.shape[2], x.shape[3], run, &j);
}
