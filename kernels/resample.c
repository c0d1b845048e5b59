/* resample.c - where tokens become pictures and pictures become bytes: time sinusoid, unpatchify and patchify, upsampling, pixels. */
#include "cpu_ops.h"

#include <math.h>

#include "vec.h"

void CPU_NAME(resample_timestep)(struct kern *k, struct tensor out, float t)
{
    (void)k;
    int64_t half = out.shape[1] / 2;
    for (int64_t i = 0; i < half; i++) {
        float angle = t * kern_ops_frequency(i, half);
        vec_store(out.data, out.dtype, i, 1, vec_splat(cosf(angle)));
        vec_store(out.data, out.dtype, half + i, 1, vec_splat(sinf(angle)));
    }
}

struct patches {
    struct tensor out, tokens, mean, std; /* out: the picture, which patchify reads */
};

static void unpatchify_rows(void *context, int64_t first, int64_t end)
{
    const struct patches *j = context;
    int64_t w = j->out.shape[2] / 2, c = j->out.shape[3];
    enum tensor_dtype d = j->out.dtype;
    for (int64_t r = first; r < end; r++) { /* r counts tokens of the whole batch */
        int64_t tokens = j->tokens.shape[1], b = r / tokens, y = r % tokens / w, x = r % tokens % w;
        const void *token = cpu_row(j->tokens, r);
        for (int64_t i = 0; i < 4 * c; i++) {
            float v = vec_load(token, j->tokens.dtype, i, 1)[0];
            vf s = vec_splat(v) * vec_splat(vec_load(j->std.data, j->std.dtype, i, 1)[0]);
            s = vec_round(s, d) + vec_splat(vec_load(j->mean.data, j->mean.dtype, i, 1)[0]);
            int64_t row = 2 * y + i % 4 / 2, column = 2 * x + i % 2;
            void *to = cpu_row(j->out, (b * j->out.shape[1] + row) * j->out.shape[2] + column);
            vec_store(to, d, i / 4, 1, s);
        }
    }
}

void CPU_NAME(resample_unpatchify)(struct kern *k, struct tensor out, struct tensor tokens, struct tensor mean,
                                   struct tensor std)
{
    struct patches j = {out, tokens, mean, std};
    cpu_rows(k, tokens.shape[0] * tokens.shape[1], tokens.shape[2], unpatchify_rows, &j);
}

static void patchify_rows(void *context, int64_t first, int64_t end)
{
    const struct patches *j = context;
    int64_t w = j->out.shape[2] / 2, wide = 4 * j->out.shape[3], tokens = j->tokens.shape[1];
    enum tensor_dtype d = j->out.dtype;
    for (int64_t r = first; r < end; r++) {
        int64_t b = r / tokens, y = r % tokens / w, x = r % tokens % w;
        void *token = cpu_row(j->tokens, r);
        for (int64_t i = 0; i < wide; i++) {
            int64_t row = 2 * y + i % 4 / 2, column = 2 * x + i % 2;
            const void *from = cpu_row(j->out, (b * j->out.shape[1] + row) * j->out.shape[2] + column);
            vf v = vec_splat(vec_load(from, d, i / 4, 1)[0]) - vec_splat(vec_load(j->mean.data, j->mean.dtype, i, 1)[0]);
            v = vec_round(v, d) / vec_splat(vec_load(j->std.data, j->std.dtype, i, 1)[0]);
            vec_store(token, j->tokens.dtype, i, 1, v);
        }
    }
}

void CPU_NAME(resample_patchify)(struct kern *k, struct tensor tokens, struct tensor x, struct tensor mean,
                                 struct tensor std)
{
    struct patches j = {x, tokens, mean, std};
    cpu_rows(k, tokens.shape[0] * tokens.shape[1], tokens.shape[2], patchify_rows, &j);
}

struct upsample {
    struct tensor out, x;
};

static void upsample_rows(void *context, int64_t first, int64_t end)
{
    const struct upsample *j = context;
    int64_t width = j->out.shape[2], height = j->out.shape[1];
    size_t bytes = (size_t)j->x.shape[3] * tensor_dtype_bytes(j->x.dtype);
    for (int64_t r = first; r < end; r++) { /* r counts output pixels */
        int64_t x = r % width, y = r / width % height, b = r / width / height;
        int64_t from = (b * (height / 2) + y / 2) * (width / 2) + x / 2;
        memcpy(cpu_row(j->out, r), cpu_row(j->x, from), bytes);
    }
}

void CPU_NAME(resample_upsample2)(struct kern *k, struct tensor out, struct tensor x)
{
    struct upsample j = {out, x};
    cpu_rows(k, tensor_count(out) / out.shape[3], out.shape[3], upsample_rows, &j);
}

static void pixel_rows(void *context, int64_t first, int64_t end)
{
    const struct upsample *j = context;
    int64_t width = j->x.shape[j->x.rank - 1];
    for (int64_t r = first; r < end; r++) {
        const void *x = cpu_row(j->x, r);
        uint8_t *out = cpu_row(j->out, r);
        for (int64_t i = 0; i < width; i++) {
            vf half = vec_round(vec_splat(0.5f) * vec_splat(vec_load(x, j->x.dtype, i, 1)[0]), j->x.dtype);
            float v = vec_round(half + vec_splat(0.5f), j->x.dtype)[0];
            v = v > 0 ? v < 1 ? v : 1 : 0;
            out[i] = (uint8_t)nearbyintf(v * 255.0f);
        }
    }
}

void CPU_NAME(resample_pixels)(struct kern *k, struct tensor out, struct tensor x)
{
    struct upsample j = {out, x};
    int64_t width = x.shape[x.rank - 1];
    cpu_rows(k, tensor_count(x) / width, width * 8, pixel_rows, &j);
}
