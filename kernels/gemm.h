/* gemm.h - the matrix product inside linear, conv and attention: packing and one micro-kernel.
 *
 *   C[m,n] = sum_k A[m,k] B[k,n], f32 sums
 *
 *   A is packed in tiles of MR rows:      [k][MR]       one value (f32) or a pair of bf16 (k, k+1) per cell
 *   B is packed in panels of NR columns:  [k][NR]       likewise; this is how weights are stored
 *   a pair is 32 bits, k in the low half; an odd k is filled with zero
 *
 * The micro-kernel keeps an MR x NR block of C in registers over a run of k. The order of the sum of one
 * C[m,n] is k ascending in runs of GEMM_RUN cells, whatever m, the number of rows or the thread: rows and
 * columns that do not exist are zeros in the packed tile, not another code path. */
#ifndef KILN_GEMM_H
#define KILN_GEMM_H

#include "cpu.h"
#include "vec.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define GEMM_MR 6
#define GEMM_NV 4
#elif defined(__AVX2__)
#define GEMM_MR 6
#define GEMM_NV 1
#else
#define GEMM_MR 2
#define GEMM_NV 1
#endif
#define GEMM_NR (GEMM_NV * VEC)
#define GEMM_RUN 1024 /* cells of k between visits to C: a panel of B stays in the second-level cache */
#define GEMM_UNROLL _Pragma("GCC unroll 8")

/* Cells along k: pairs for bf16. */
VEC_INLINE int64_t gemm_cells(int64_t k, enum tensor_dtype dtype)
{
    return dtype == TENSOR_BF16 ? (k + 1) / 2 : k;
}

VEC_INLINE int64_t gemm_panels(int64_t n)
{
    return (n + GEMM_NR - 1) / GEMM_NR;
}

VEC_INLINE int64_t gemm_tiles(int64_t m)
{
    return (m + GEMM_MR - 1) / GEMM_MR;
}

/* gemm_pack writes `wide` rows of k values as cells [cells][wide]; rows[i] NULL is a row of zeros. Serves A (wide =
 * MR) and B given by its columns (wide = NR). Source and cells have one dtype. */
VEC_INLINE void gemm_pack(uint32_t *to, const void *const *rows, int wide, int64_t k, enum tensor_dtype dtype)
{
    int64_t cells = gemm_cells(k, dtype), whole = dtype == TENSOR_BF16 ? k / 2 : k;
    for (int64_t c0 = 0; c0 < cells; c0 += 16) {
        int64_t c1 = c0 + 16 < whole ? c0 + 16 : whole;
        for (int i = 0; i < wide; i++) {
            const char *row = rows[i];
            if (!row) {
                for (int64_t c = c0; c < c0 + 16 && c < cells; c++)
                    to[c * wide + i] = 0;
                continue;
            }
            for (int64_t c = c0; c < c1; c++)
                memcpy(&to[c * wide + i], row + c * 4, 4);
            if (whole < cells && c0 + 16 >= cells) {
                uint16_t last;
                memcpy(&last, row + whole * 4, 2);
                to[whole * wide + i] = last;
            }
        }
    }
}

/* gemm_pack_kn packs B given by its rows (k of them, `stride` elements apart) into one panel of columns [n0, n0 + NR)
 * of n. */
VEC_INLINE void gemm_pack_kn(uint32_t *to, const void *data, int64_t stride, int64_t k, int64_t n0, int64_t n,
                             enum tensor_dtype dtype)
{
    int64_t columns = n - n0 < GEMM_NR ? n - n0 : GEMM_NR, cells = gemm_cells(k, dtype);
    for (int64_t c = 0; c < cells; c++, to += GEMM_NR) {
        if (dtype == TENSOR_F32) {
            const uint32_t *row = (const uint32_t *)data + c * stride + n0;
            for (int64_t j = 0; j < GEMM_NR; j++)
                to[j] = j < columns ? row[j] : 0;
            continue;
        }
        const uint16_t *low = (const uint16_t *)data + 2 * c * stride + n0;
        const uint16_t *high = 2 * c + 1 < k ? low + stride : NULL;
        for (int64_t j = 0; j < GEMM_NR; j++)
            to[j] = j < columns ? low[j] | (high ? (uint32_t)high[j] << 16 : 0) : 0;
    }
}

#define GEMM_TILE (GEMM_MR * GEMM_NR)

VEC_INLINE void gemm_micro_f32(int64_t cells, const uint32_t *a, const uint32_t *b, float *tile, bool add)
{
    vf c[GEMM_MR][GEMM_NV];
    GEMM_UNROLL for (int i = 0; i < GEMM_MR; i++)
        GEMM_UNROLL for (int j = 0; j < GEMM_NV; j++)
            c[i][j] = add ? vec_load(tile, TENSOR_F32, i * GEMM_NR + j * VEC, VEC) : (vf){0};
    for (int64_t k = 0; k < cells; k++, a += GEMM_MR, b += GEMM_NR) {
        vf wide[GEMM_NV];
        GEMM_UNROLL for (int j = 0; j < GEMM_NV; j++)
            wide[j] = vec_load(b, TENSOR_F32, j * VEC, VEC);
        GEMM_UNROLL for (int i = 0; i < GEMM_MR; i++) {
            float x;
            memcpy(&x, a + i, 4);
            vf s = vec_splat(x);
            GEMM_UNROLL for (int j = 0; j < GEMM_NV; j++)
                c[i][j] += s * wide[j];
        }
    }
    GEMM_UNROLL for (int i = 0; i < GEMM_MR; i++)
        GEMM_UNROLL for (int j = 0; j < GEMM_NV; j++)
            vec_store(tile, TENSOR_F32, i * GEMM_NR + j * VEC, VEC, c[i][j]);
}

#ifdef __AVX512BF16__
VEC_INLINE void gemm_micro_bf16(int64_t cells, const uint32_t *a, const uint32_t *b, float *tile, bool add)
{
    __m512 c[GEMM_MR][GEMM_NV];
    GEMM_UNROLL for (int i = 0; i < GEMM_MR; i++)
        GEMM_UNROLL for (int j = 0; j < GEMM_NV; j++)
            c[i][j] = add ? _mm512_loadu_ps(tile + i * GEMM_NR + j * VEC) : _mm512_setzero_ps();
    for (int64_t k = 0; k < cells; k++, a += GEMM_MR, b += GEMM_NR) {
        __m512bh wide[GEMM_NV];
        GEMM_UNROLL for (int j = 0; j < GEMM_NV; j++)
            wide[j] = (__m512bh)_mm512_loadu_si512(b + j * VEC);
        GEMM_UNROLL for (int i = 0; i < GEMM_MR; i++) {
            __m512bh s = (__m512bh)_mm512_set1_epi32((int)a[i]);
            GEMM_UNROLL for (int j = 0; j < GEMM_NV; j++)
                c[i][j] = _mm512_dpbf16_ps(c[i][j], s, wide[j]);
        }
    }
    GEMM_UNROLL for (int i = 0; i < GEMM_MR; i++)
        GEMM_UNROLL for (int j = 0; j < GEMM_NV; j++)
            _mm512_storeu_ps(tile + i * GEMM_NR + j * VEC, c[i][j]);
}
#else
VEC_INLINE void gemm_micro_bf16(int64_t cells, const uint32_t *a, const uint32_t *b, float *tile, bool add)
{
    vf c[GEMM_MR][GEMM_NV];
    GEMM_UNROLL for (int i = 0; i < GEMM_MR; i++)
        GEMM_UNROLL for (int j = 0; j < GEMM_NV; j++)
            c[i][j] = add ? vec_load(tile, TENSOR_F32, i * GEMM_NR + j * VEC, VEC) : (vf){0};
    for (int64_t k = 0; k < cells; k++, a += GEMM_MR, b += GEMM_NR) {
        vf low[GEMM_NV], high[GEMM_NV];
        GEMM_UNROLL for (int j = 0; j < GEMM_NV; j++) {
            vu pair = (vu)vec_load(b, TENSOR_F32, j * VEC, VEC);
            low[j] = (vf)(pair << 16);
            high[j] = (vf)(pair & 0xffff0000u);
        }
        GEMM_UNROLL for (int i = 0; i < GEMM_MR; i++) {
            vf s = vec_splat(tensor_f32_of((uint16_t)a[i])), t = vec_splat(tensor_f32_of((uint16_t)(a[i] >> 16)));
            GEMM_UNROLL for (int j = 0; j < GEMM_NV; j++) {
                c[i][j] += s * low[j];
                c[i][j] += t * high[j];
            }
        }
    }
    GEMM_UNROLL for (int i = 0; i < GEMM_MR; i++)
        GEMM_UNROLL for (int j = 0; j < GEMM_NV; j++)
            vec_store(tile, TENSOR_F32, i * GEMM_NR + j * VEC, VEC, c[i][j]);
}
#endif

/* gemm_panel: tiles [tile count][MR][NR] (+)= packed rows (tiles `tile_cells` cells of MR apart) times one panel. */
VEC_INLINE void gemm_panel(float *c, const uint32_t *a, int64_t tiles, int64_t cells, const uint32_t *b,
                           enum tensor_dtype dtype, bool add)
{
    for (int64_t run = 0; run < cells; run += GEMM_RUN) {
        int64_t length = cells - run < GEMM_RUN ? cells - run : GEMM_RUN;
        for (int64_t t = 0; t < tiles; t++) {
            const uint32_t *from = a + (t * cells + run) * GEMM_MR;
            if (dtype == TENSOR_BF16)
                gemm_micro_bf16(length, from, b + run * GEMM_NR, c + t * GEMM_TILE, add || run > 0);
            else
                gemm_micro_f32(length, from, b + run * GEMM_NR, c + t * GEMM_TILE, add || run > 0);
        }
    }
}

/* gemm_store writes rows [0, rows) of a panel's tiles to out rows at columns [n0, n): bias added in f32, one rounding. */
VEC_INLINE void gemm_store(const float *c, int64_t rows, void *const *out, enum tensor_dtype dtype, int64_t n0,
                           int64_t n, const float *bias)
{
    int64_t columns = n - n0 < GEMM_NR ? n - n0 : GEMM_NR;
    for (int64_t r = 0; r < rows; r++) {
        const float *from = c + r / GEMM_MR * GEMM_TILE + r % GEMM_MR * GEMM_NR;
        for (int64_t j = 0; j < columns; j += VEC) {
            vf v = vec_load(from, TENSOR_F32, j, VEC);
            if (bias)
                v += vec_load(bias, TENSOR_F32, n0 + j, columns - j);
            vec_store(out[r], dtype, n0 + j, columns - j, v);
        }
    }
}

#endif
