/* noise.c - the Mersenne Twister and the vectorised Box-Muller of torch's CPU generator (engine-spec 13.1, 13.2).
 *
 * Bit-exactness needs the same polynomials and the same fused operations as torch's AVX build; where the text says fmaf
 * the fusion matters, everywhere else it must not happen (the project compiles without contraction). */
#include "noise.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

struct twister {
    uint32_t state[624];
    int at;
};

static void twister_seed(struct twister *t, uint32_t seed)
{
    t->state[0] = seed;
    for (uint32_t i = 1; i < 624; i++)
        t->state[i] = 1812433253u * (t->state[i - 1] ^ (t->state[i - 1] >> 30)) + i;
    t->at = 624;
}

static void twister_turn(struct twister *t)
{
    uint32_t *s = t->state;
    for (int i = 0; i < 624; i++) {
        uint32_t y = (s[i] & 0x80000000u) | (s[(i + 1) % 624] & 0x7fffffffu);
        s[i] = s[(i + 397) % 624] ^ (y >> 1) ^ (y & 1 ? 0x9908b0dfu : 0);
    }
    t->at = 0;
}

static uint32_t twister_next(struct twister *t)
{
    if (t->at == 624)
        twister_turn(t);
    uint32_t y = t->state[t->at++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
}

static float uniform(struct twister *t)
{
    return (float)(twister_next(t) & 0xffffffu) * 0x1p-24f;
}

static uint32_t bits_of(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

static float float_of(uint32_t u)
{
    float x;
    memcpy(&x, &u, 4);
    return x;
}

#define FUSED static inline __attribute__((always_inline))

FUSED float log_of(float x)
{
    x = x < 0x1p-126f ? 0x1p-126f : x;
    float e = (float)((int)(bits_of(x) >> 23) - 127 + 1);
    float m = float_of((bits_of(x) & 0x007fffffu) | 0x3f000000u);
    if (m < 0.707106781186547524f) {
        e -= 1.0f;
        x = (m - 1.0f) + m;
    } else {
        x = m - 1.0f;
    }
    float z = x * x, y = 7.0376836292e-2f;
    y = fmaf(y, x, -1.1514610310e-1f);
    y = fmaf(y, x, 1.1676998740e-1f);
    y = fmaf(y, x, -1.2420140846e-1f);
    y = fmaf(y, x, 1.4249322787e-1f);
    y = fmaf(y, x, -1.6668057665e-1f);
    y = fmaf(y, x, 2.0000714765e-1f);
    y = fmaf(y, x, -2.4999993993e-1f);
    y = fmaf(y, x, 3.3333331174e-1f);
    y = y * x;
    float correction = e * -2.12194440e-4f;
    y = fmaf(y, z, correction);
    y = fmaf(-0.5f, z, y);
    x = x + y;
    return fmaf(e, 0.693359375f, x);
}

FUSED void sin_cos_of(float x, float *ret_sin, float *ret_cos)
{
    int j = (int)(x * 1.27323954473516f);
    j = (j + 1) & ~1;
    float y = (float)j;
    float r = ((x - y * 0.78515625f) - y * 2.4187564849853515625e-4f) - y * 3.77489497744594108e-8f;
    float z = r * r;
    float c = 2.443315711809948e-5f;
    c = fmaf(c, z, -1.388731625493765e-3f);
    c = fmaf(c, z, 4.166664568298827e-2f);
    c = c * z;
    c = fmaf(c, z, -0.5f * z) + 1.0f;
    float s = -1.9515295891e-4f;
    s = fmaf(s, z, 8.3321608736e-3f);
    s = fmaf(s, z, -1.6666654611e-1f);
    s = s * z;
    s = fmaf(s, r, r);
    bool swap = (j & 2) != 0;
    float sine = swap ? c : s, cosine = swap ? s : c;
    *ret_sin = j & 4 ? -sine : sine;
    *ret_cos = ~(j - 2) & 4 ? -cosine : cosine;
}

/* Sixteen uniforms become sixteen normals: pairs (j, j + 8). */
FUSED void normal_block(float *d)
{
    for (int j = 0; j < 8; j++) {
        float radius = sqrtf(-2.0f * log_of(1.0f - d[j])), s, c;
        sin_cos_of(6.283185307179586f * d[j + 8], &s, &c);
        d[j] = radius * c;
        d[j + 8] = radius * s;
    }
}

FUSED void normal_blocks(float *out, size_t count)
{
    for (size_t i = 0; i + 16 <= count; i += 16)
        normal_block(out + i);
}

static void normal_blocks_portable(float *out, size_t count)
{
    normal_blocks(out, count);
}

#if defined(__x86_64__)
__attribute__((target("fma,avx2"))) static void normal_blocks_fma(float *out, size_t count)
{
    normal_blocks(out, count);
}
#endif

static void fill_normal(float *out, size_t count)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2")) {
        normal_blocks_fma(out, count);
        return;
    }
#endif
    normal_blocks_portable(out, count);
}

static double uniform_double(struct twister *t)
{
    uint64_t high = twister_next(t), low = twister_next(t);
    return (double)((high << 32 | low) & ((1ull << 53) - 1)) * 0x1p-53;
}

/* Fewer than 16 values take the scalar path in double precision. */
static void fill_small(struct twister *t, float *out, size_t count)
{
    for (size_t i = 0; i < count; i += 2) {
        double u1 = uniform_double(t), u2 = uniform_double(t);
        double radius = sqrt(-2.0 * log1p(-u2)), angle = 2.0 * 3.14159265358979323846 * u1;
        out[i] = (float)(radius * cos(angle));
        if (i + 1 < count)
            out[i + 1] = (float)(radius * sin(angle));
    }
}

void noise_fill(float *out, size_t count, uint64_t seed)
{
    struct twister t;
    twister_seed(&t, (uint32_t)seed);
    if (count < 16) {
        fill_small(&t, out, count);
        return;
    }
    for (size_t i = 0; i < count; i++)
        out[i] = uniform(&t);
    fill_normal(out, count);
    if (count % 16) {
        float *last = out + count - 16;
        for (int i = 0; i < 16; i++)
            last[i] = uniform(&t);
        fill_normal(last, 16);
    }
}
