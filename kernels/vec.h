/* vec.h - VEC floats at a time: one register of this compilation (4 in SSE, 8 in AVX2, 16 in AVX-512).
 *
 * GCC's vector types, as wide as the registers and not wider: a type of two registers is kept in memory by
 * GCC 12, which made every kernel several times slower. A tail of a row is the same code on a zero-filled
 * vector, so an element's bits do not depend on where in a row or vector it stands. */
#ifndef KILN_VEC_H
#define KILN_VEC_H

#include <string.h>

#include "tensor.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VEC 16
#elif defined(__AVX2__)
#define VEC 8
#else
#define VEC 4
#endif
typedef float vf __attribute__((vector_size(VEC * 4)));
typedef int32_t vi __attribute__((vector_size(VEC * 4)));
typedef uint32_t vu __attribute__((vector_size(VEC * 4)));
typedef uint16_t vh __attribute__((vector_size(VEC * 2)));
#define VEC_INLINE static inline __attribute__((always_inline))

VEC_INLINE vf vec_splat(float x)
{
    return x - (vf){0}; /* minus, so that -0 stays -0 */
}

/* All bits set in the first n lanes. */
VEC_INLINE vi vec_first(int64_t n)
{
    const int32_t lanes[2 * VEC] = {
        -1, -1, -1, -1,
#if VEC >= 8
        -1, -1, -1, -1,
#endif
#if VEC >= 16
        -1, -1, -1, -1, -1, -1, -1, -1,
#endif
    };
    vi mask;
    memcpy(&mask, lanes + VEC - (n < 0 ? 0 : n < VEC ? n : VEC), sizeof mask);
    return mask;
}

VEC_INLINE vf vec_of_bf16(vh h)
{
    return (vf)(__builtin_convertvector(h, vu) << 16);
}

/* Rounded to bf16 and still an f32; NaN stays NaN. */
VEC_INLINE vu vec_round_bits(vf x)
{
    vu u = (vu)x;
    vu rounded = u + 0x7fffu + ((u >> 16) & 1u);
    vi is_nan = (vi)((u & 0x7fffffffu) > 0x7f800000u);
    return ((vu)is_nan & (u | 0x400000u)) | (~(vu)is_nan & rounded);
}

VEC_INLINE vf vec_round(vf x, enum tensor_dtype dtype)
{
    return dtype == TENSOR_BF16 ? (vf)(vec_round_bits(x) & 0xffff0000u) : x;
}

/* The first n (at most VEC) elements at index i of a row; beyond n zeros. */
VEC_INLINE vf vec_load(const void *row, enum tensor_dtype dtype, int64_t i, int64_t n)
{
    if (dtype == TENSOR_F32) {
        vf v = {0};
        if (n >= VEC)
            memcpy(&v, (const float *)row + i, sizeof v);
        else
            memcpy(&v, (const float *)row + i, (size_t)n * 4);
        return v;
    }
    vh h = {0};
    if (n >= VEC)
        memcpy(&h, (const uint16_t *)row + i, sizeof h);
    else
        memcpy(&h, (const uint16_t *)row + i, (size_t)n * 2);
    return vec_of_bf16(h);
}

VEC_INLINE void vec_store(void *row, enum tensor_dtype dtype, int64_t i, int64_t n, vf x)
{
    if (dtype == TENSOR_F32) {
        memcpy((float *)row + i, &x, n >= VEC ? sizeof x : (size_t)n * 4);
        return;
    }
    vh h = __builtin_convertvector(vec_round_bits(x) >> 16, vh);
    if (n >= VEC)
        memcpy((uint16_t *)row + i, &h, sizeof h);
    else
        memcpy((uint16_t *)row + i, &h, (size_t)n * 2);
}

/* Rounded like vec_store, quicker: AVX512_BF16 has an instruction, which makes values below 2^-126 zero. */
VEC_INLINE vh vec_narrow(vf x)
{
#ifdef __AVX512BF16__
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    return __builtin_convertvector(vec_round_bits(x) >> 16, vh);
#endif
}

/* Two registers as bf16, beside each other. */
VEC_INLINE void vec_narrow_pair(void *to, vf low, vf high)
{
#ifdef __AVX512BF16__
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
    vh h[2] = {vec_narrow(low), vec_narrow(high)};
    memcpy(to, h, sizeof h);
#endif
}

VEC_INLINE vf vec_select(vi mask, vf yes, vf no)
{
    return (vf)(((vi)yes & mask) | ((vi)no & ~mask));
}

/* The larger one; b when one of them is NaN. */
VEC_INLINE vf vec_max(vf a, vf b)
{
#ifdef __AVX512F__
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return vec_select(a > b, a, b);
#endif
}

/* Lanes are added by halves: lane i and i + VEC / 2, and so on. */
VEC_INLINE float vec_sum(vf x)
{
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x); /* in this order */
#else
    float lane[VEC];
    memcpy(lane, &x, sizeof lane);
    for (int width = VEC / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++)
            lane[i] += lane[i + width];
    return lane[0];
#endif
}

VEC_INLINE float vec_max_all(vf x)
{
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)x);
#else
    float lane[VEC], best;
    memcpy(lane, &x, sizeof lane);
    best = lane[0];
    for (int i = 1; i < VEC; i++)
        best = lane[i] > best ? lane[i] : best;
    return best;
#endif
}

/* e^x to about 1 ulp: x = n ln 2 + r, polynomial in r (the coefficients of Cephes expf). Below -87.3: 0. */
VEC_INLINE vf vec_exp(vf x)
{
    const vf magic = vec_splat(12582912.0f); /* adding it rounds to an integer */
    vf top = vec_splat(88.3762626647949f), low = vec_splat(-87.3365447504019f);
    vf c = vec_select(x > top, top, x);
    c = vec_select(c < low, low, c);
    vf n = (c * vec_splat(1.44269504088896341f) + magic) - magic;
    vf r = c - n * vec_splat(0.693359375f);
    r = r - n * vec_splat(-2.12194440e-4f);
    vf p = vec_splat(1.9875691500e-4f);
    p = p * r + vec_splat(1.3981999507e-3f);
    p = p * r + vec_splat(8.3334519073e-3f);
    p = p * r + vec_splat(4.1665795894e-2f);
    p = p * r + vec_splat(1.6666665459e-1f);
    p = p * r + vec_splat(5.0000001201e-1f);
    vf y = p * (r * r) + r + vec_splat(1.0f);
    vi power = __builtin_convertvector(n, vi) << 23;
    y = (vf)((vi)y + power);
    return vec_select(x < low, vec_splat(0.0f), y);
}

/* 2^x for x not above 127; below -126: 2^-126. x = n + r, |r| <= 1/2; a polynomial in r with the least relative error that
 * is 1 at 0: 3e-6 when the result will be rounded to bf16, else that of f32. */
VEC_INLINE vf vec_exp2(vf x, enum tensor_dtype dtype)
{
    const vf magic = vec_splat(12582912.0f); /* adding it rounds to an integer, in the low bits */
    vf c = vec_max(vec_splat(-126.0f), x), n = c + magic, r = c - (n - magic), p;
    if (dtype == TENSOR_BF16) {
        p = vec_splat(9.5828548074e-3f) * r + vec_splat(5.5906433612e-2f);
        p = p * r + vec_splat(2.4024099112e-1f);
        p = p * r + vec_splat(6.9312417507e-1f);
    } else {
        p = vec_splat(1.5353364870e-4f) * r + vec_splat(1.3398875017e-3f);
        p = p * r + vec_splat(9.6184369177e-3f);
        p = p * r + vec_splat(5.5503323674e-2f);
        p = p * r + vec_splat(2.4022647738e-1f);
        p = p * r + vec_splat(6.9314718246e-1f);
    }
    p = p * r + vec_splat(1.0f);
#ifdef __AVX512F__
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)(n - magic));
#else
    return (vf)((vu)p + ((vu)n << 23));
#endif
}

VEC_INLINE vf vec_silu(vf x)
{
    return x / (vec_splat(1.0f) + vec_exp(-x));
}

#endif
