/* norm.c - RMS, layer and group norms; f32 sums, rounding points as kern.h says. */
#include "cpu_ops.h"

#include <math.h>

#include "vec.h"

struct rms {
    struct tensor out, x, weight;
    float eps;
    enum kern_rounding rounding;
};

void CPU_NAME(norm_rms_row)(void *out, const void *x, enum tensor_dtype d, struct tensor weight, float eps,
                            enum kern_rounding rounding)
{
    int64_t width = weight.shape[0];
    vf sum = {0};
    for (int64_t i = 0; i < width; i += VEC) {
        vf v = vec_load(x, d, i, width - i);
        sum += v * v;
    }
    vf scale = vec_splat(1.0f / sqrtf(vec_sum(sum) / (float)width + eps));
    for (int64_t i = 0; i < width; i += VEC) {
        vf v = vec_load(x, d, i, width - i) * scale;
        if (rounding == KERN_ROUND_BEFORE_WEIGHT)
            v = vec_round(v, d);
        v *= vec_load(weight.data, weight.dtype, i, width - i);
        vec_store(out, d, i, width - i, v);
    }
}

static void rms_rows(void *context, int64_t first, int64_t end)
{
    const struct rms *j = context;
    for (int64_t r = first; r < end; r++)
        CPU_NAME(norm_rms_row)(cpu_row(j->out, r), cpu_row(j->x, r), j->x.dtype, j->weight, j->eps, j->rounding);
}

void CPU_NAME(norm_rms)(struct kern *k, struct tensor out, struct tensor x, struct tensor weight, float eps,
                        enum kern_rounding rounding)
{
    int64_t width = x.shape[x.rank - 1];
    struct rms j = {out, x, weight, eps, rounding};
    cpu_rows(k, tensor_count(x) / width, width, rms_rows, &j);
}

struct layer {
    struct tensor out, x, scale, shift;
    float eps;
};

static void layer_rows(void *context, int64_t first, int64_t end)
{
    const struct layer *j = context;
    enum tensor_dtype d = j->x.dtype;
    int64_t width = j->x.shape[j->x.rank - 1];
    for (int64_t r = first; r < end; r++) {
        const void *x = cpu_row(j->x, r);
        void *out = cpu_row(j->out, r);
        vf sum = {0}, squares = {0};
        for (int64_t i = 0; i < width; i += VEC)
            sum += vec_load(x, d, i, width - i);
        vf mean = vec_splat(vec_sum(sum) / (float)width);
        for (int64_t i = 0; i < width; i += VEC) {
            vf v = vec_load(x, d, i, width - i) - mean;
            v = vec_select(vec_first(width - i), v, (vf){0}); /* the zero-filled lanes are no elements */
            squares += v * v;
        }
        vf rstd = vec_splat(1.0f / sqrtf(vec_sum(squares) / (float)width + j->eps));
        for (int64_t i = 0; i < width; i += VEC) {
            int64_t n = width - i;
            vf v = vec_round((vec_load(x, d, i, n) - mean) * rstd, d);
            vf scale = vec_round(vec_splat(1.0f) + vec_load(j->scale.data, j->scale.dtype, i, n), d);
            v = vec_round(scale * v, d) + vec_load(j->shift.data, j->shift.dtype, i, n);
            vec_store(out, j->out.dtype, i, n, v);
        }
    }
}

void CPU_NAME(norm_layer_modulate)(struct kern *k, struct tensor out, struct tensor x, struct tensor scale,
                                   struct tensor shift, float eps)
{
    int64_t width = x.shape[x.rank - 1];
    struct layer j = {out, x, scale, shift, eps};
    cpu_rows(k, tensor_count(x) / width, width, layer_rows, &j);
}

/* As kern.h defines it. Rows of a task are a small part of what its products take: one pass over them would not be seen. */
void CPU_NAME(norm_gated_add)(struct kern *k, struct tensor out, struct tensor x, struct tensor gate, struct tensor y,
                              struct tensor scale, struct tensor shift, float eps)
{
    CPU_NAME(elementwise_gated_add)(k, x, gate, y);
    CPU_NAME(norm_layer_modulate)(k, out, x, scale, shift, eps);
}

/* Group norm, channels last: chunks of pixels give per-channel sums (f32 over at most CHUNK_STEP pixels, then
 * double), which are added in chunk order, so the result does not depend on threads. */
#define CHUNK 4096
#define CHUNK_STEP 64

struct group {
    struct tensor out, x, weight, bias;
    int groups;
    float eps;
    bool silu;
    int64_t pixels, chunks, channels;
    double *sums;         /* [b][chunk][2][channels] */
    float *scale, *shift; /* [b][channels] */
};

static void group_sums(void *context, int64_t index, int thread)
{
    (void)thread;
    const struct group *j = context;
    int64_t b = index / j->chunks, first = index % j->chunks * CHUNK, c = j->channels;
    int64_t end = first + CHUNK < j->pixels ? first + CHUNK : j->pixels;
    double *sum = j->sums + index * 2 * c, *square = sum + c;
    size_t size = tensor_dtype_bytes(j->x.dtype);
    const char *x = (const char *)j->x.data + (size_t)(b * j->pixels * c) * size;
    for (int64_t i = 0; i < c; i += VEC) {
        int64_t n = c - i < VEC ? c - i : VEC;
        for (int64_t t = 0; t < n; t++)
            sum[i + t] = square[i + t] = 0;
        for (int64_t p = first; p < end; p += CHUNK_STEP) {
            vf s = {0}, q = {0};
            for (int64_t o = p; o < end && o < p + CHUNK_STEP; o++) {
                vf v = vec_load(x + (size_t)(o * c) * size, j->x.dtype, i, n);
                s += v;
                q += v * v;
            }
            for (int64_t t = 0; t < n; t++) {
                sum[i + t] += (double)s[t];
                square[i + t] += (double)q[t];
            }
        }
    }
}

static void group_statistics(const struct group *j, int64_t b)
{
    int64_t c = j->channels, size = c / j->groups;
    for (int64_t g = 0; g < j->groups; g++) {
        double sum = 0, square = 0, count = (double)(j->pixels * size);
        for (int64_t chunk = 0; chunk < j->chunks; chunk++) {
            const double *s = j->sums + (b * j->chunks + chunk) * 2 * c;
            for (int64_t i = g * size; i < (g + 1) * size; i++) {
                sum += s[i];
                square += s[c + i];
            }
        }
        double mean = sum / count, variance = square / count - mean * mean;
        double rstd = 1.0 / sqrt((variance > 0 ? variance : 0) + (double)j->eps);
        for (int64_t i = g * size; i < (g + 1) * size; i++) {
            float w = vec_load(j->weight.data, j->weight.dtype, i, 1)[0];
            float bias = vec_load(j->bias.data, j->bias.dtype, i, 1)[0];
            j->scale[b * c + i] = (float)((double)w * rstd);
            j->shift[b * c + i] = (float)((double)bias - mean * (double)w * rstd);
        }
    }
}

static void group_rows(void *context, int64_t first, int64_t end)
{
    const struct group *j = context;
    int64_t c = j->channels;
    enum tensor_dtype d = j->out.dtype;
    size_t in = tensor_dtype_bytes(j->x.dtype), to = tensor_dtype_bytes(d);
    for (int64_t r = first; r < end; r++) {
        const char *x = (const char *)j->x.data + (size_t)(r * c) * in;
        char *out = (char *)j->out.data + (size_t)(r * c) * to;
        const float *scale = j->scale + r / j->pixels * c, *shift = j->shift + r / j->pixels * c;
        for (int64_t i = 0; i < c; i += VEC) {
            int64_t n = c - i;
            vf v = vec_load(x, j->x.dtype, i, n) * vec_load(scale, TENSOR_F32, i, n) +
                   vec_load(shift, TENSOR_F32, i, n);
            if (j->silu)
                v = vec_silu(vec_round(v, d));
            vec_store(out, d, i, n, v);
        }
    }
}

void CPU_NAME(norm_group)(struct kern *k, struct tensor out, struct tensor x, struct tensor weight,
                          struct tensor bias, int groups, float eps, bool silu)
{
    int64_t batch = x.shape[0], pixels = x.shape[1] * x.shape[2], c = x.shape[3];
    int64_t chunks = (pixels + CHUNK - 1) / CHUNK;
    struct group j = {.out = out, .x = x, .weight = weight, .bias = bias, .groups = groups, .eps = eps,
                      .silu = silu, .pixels = pixels, .chunks = chunks, .channels = c};
    size_t mark = kern_mark(k);
    struct tensor sums = kern_temp(k, TENSOR_F32, 1, (int64_t[]){batch * chunks * c * 4});
    struct tensor scale = kern_temp(k, TENSOR_F32, 1, (int64_t[]){batch * c});
    struct tensor shift = kern_temp(k, TENSOR_F32, 1, (int64_t[]){batch * c});
    if (!k->failed) {
        j.sums = sums.data, j.scale = scale.data, j.shift = shift.data;
        cpu_for(k, batch * chunks, group_sums, &j);
        for (int64_t b = 0; b < batch; b++)
            group_statistics(&j, b);
        cpu_rows(k, batch * pixels, c, group_rows, &j);
    }
    kern_rewind(k, mark);
}
