/* gemm.h - the matrix product inside linear, conv and attention: packing and one micro-kernel.
 *
 *   C[m,n] = sum_k A[m,k] B[k,n], f32 sums
 *
 *   B is packed in panels of NR columns: [cells][NR], a cell being one value (f32) or a pair of bf16 (k, k+1), k in
 *     the low half, an odd k filled with zero. This is how weights are stored.
 *   A is packed in tiles of MR rows: [words][MR]. Where the CPU multiplies pairs (AVX512_BF16) a word is a cell of B.
 *     Elsewhere it is one f32, so that a bf16 row is widened once and not once per panel. AMX reads 16 words of a row at
 *     once: [words / 16][MR][16], and its cells are filled up with zeros to a multiple of 16.
 *   C is [panel][tile][MR][NR] of f32.
 *
 * The micro-kernel keeps a block of C in registers over a run of k: GROUP x NR of it, or in AMX all MR x NR in four tile
 * registers. The order of the sum of one C[m,n] is k ascending (visits to memory between runs do not change it), whatever m,
 * the number of rows or the thread: rows and columns that do not exist are zeros in the packed tile, not another code path.
 *
 * Loops, from outside: run of k, panel, tile. During a run the tiles of A stay in the second-level cache and one
 * panel of B in the first (with AVX-512, whose panels are wide, it is fetched ahead); C is visited once per run. */
#ifndef KILN_GEMM_H
#define KILN_GEMM_H

#include "cpu.h"
#include "vec.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if defined(__AMX_BF16__)
#define GEMM_MR 32
#define GEMM_NV 2
#define GEMM_GROUP 8 /* rows of f32 in registers */
#define GEMM_FENCE __asm__ volatile("" ::: "memory") /* GCC 12 does not know that a tile load reads memory */
#elif defined(__AVX512F__)
#define GEMM_MR 6
#define GEMM_NV 4
#elif defined(__AVX2__)
#define GEMM_MR 6
#define GEMM_NV 2
#else
#define GEMM_MR 2
#define GEMM_NV 4
#endif
#ifndef GEMM_GROUP
#define GEMM_GROUP GEMM_MR
#endif
#define GEMM_NR (GEMM_NV * VEC)
#define GEMM_TILE (GEMM_MR * GEMM_NR)
#define GEMM_RUN 512 /* values of k between visits to C; of a panel 16 wide: 16 KiB in bf16, 32 KiB in f32; AMX: 32 KiB */
#ifdef __AMX_BF16__
#define GEMM_BLOCK 12 /* tiles of A that share a visit of a panel; a run of them is 384 KiB */
#else
#define GEMM_BLOCK 16
#endif
#define GEMM_ROWS (GEMM_MR * GEMM_BLOCK)
#ifdef __AVX512F__
#define GEMM_AHEAD 16 /* cells of B fetched ahead: a run of a panel as wide as this comes from the second-level cache */
#else
#define GEMM_AHEAD 0
#endif
#define GEMM_UNROLL _Pragma("GCC unroll 16")

/* gemm_begin comes before the products of a task, gemm_end after them: AMX wants the shape of its registers, per thread,
 * and a thread that has given them back costs the system nothing when it sleeps. */
VEC_INLINE void gemm_begin(void)
{
#ifdef __AMX_BF16__
    static const struct {
        uint8_t palette, start, zero[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&shape);
#endif
}

VEC_INLINE void gemm_end(void)
{
#ifdef __AMX_BF16__
    _tile_release();
#endif
}

/* Does a product in this dtype go through AMX? Then words of A come 16 at a time. */
VEC_INLINE bool gemm_is_tiled(enum tensor_dtype dtype)
{
#ifdef __AMX_BF16__
    return dtype == TENSOR_BF16;
#else
    return (void)dtype, false;
#endif
}

/* Cells along k: pairs for bf16. */
VEC_INLINE int64_t gemm_cells(int64_t k, enum tensor_dtype dtype)
{
    int64_t cells = dtype == TENSOR_BF16 ? (k + 1) / 2 : k;
    return gemm_is_tiled(dtype) ? (cells + 15) & ~INT64_C(15) : cells;
}

VEC_INLINE int64_t gemm_panels(int64_t n)
{
    return (n + GEMM_NR - 1) / GEMM_NR;
}

VEC_INLINE int64_t gemm_tiles(int64_t m)
{
    return (m + GEMM_MR - 1) / GEMM_MR;
}

/* Words of one row of A. */
VEC_INLINE int64_t gemm_words(int64_t k, enum tensor_dtype dtype)
{
#ifdef __AVX512BF16__
    return gemm_cells(k, dtype);
#else
    return gemm_cells(k, dtype) * (dtype == TENSOR_BF16 ? 2 : 1);
#endif
}

/* Is a word of A one f32, though the dtype is bf16? */
VEC_INLINE bool gemm_is_widened(enum tensor_dtype dtype)
{
#ifdef __AVX512BF16__
    return (void)dtype, false;
#else
    return dtype == TENSOR_BF16;
#endif
}

typedef uint32_t gemm_quad __attribute__((vector_size(16)));

/* The word at index w of a row, and four of them. `widen`: a bf16 becomes an f32. */
VEC_INLINE uint32_t gemm_word(const char *row, int64_t w, bool widen)
{
    uint32_t word;
    uint16_t half;
    if (!widen)
        return memcpy(&word, row + w * 4, 4), word;
    return memcpy(&half, row + w * 2, 2), (uint32_t)half << 16;
}

VEC_INLINE gemm_quad gemm_four(const char *row, int64_t w, bool widen)
{
    gemm_quad words;
    if (!row)
        return (gemm_quad){0};
    if (!widen)
        return memcpy(&words, row + w * 4, 16), words;
    typedef uint16_t four_halves __attribute__((vector_size(8)));
    four_halves h;
    return memcpy(&h, row + w * 2, 8), __builtin_convertvector(h, gemm_quad) << 16;
}

/* Words [0, whole) of two or four rows beside each other, four words at a time by transposing in registers. */
VEC_INLINE void gemm_transpose(uint32_t *to, const void *const *rows, int count, int wide, int64_t whole, bool widen)
{
    int64_t w = 0;
    for (; w + 4 <= whole; w += 4) {
        gemm_quad a = gemm_four(rows[0], w, widen), b = gemm_four(rows[1], w, widen);
        gemm_quad ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), AB = __builtin_shufflevector(a, b, 2, 6, 3, 7);
        if (count == 2) {
            for (int i = 0; i < 2; i++) {
                memcpy(to + (w + i) * wide, (const char *)&ab + 8 * i, 8);
                memcpy(to + (w + 2 + i) * wide, (const char *)&AB + 8 * i, 8);
            }
            continue;
        }
        gemm_quad c = gemm_four(rows[2], w, widen), d = gemm_four(rows[3], w, widen);
        gemm_quad cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), CD = __builtin_shufflevector(c, d, 2, 6, 3, 7);
        gemm_quad turned[] = {
            __builtin_shufflevector(ab, cd, 0, 1, 4, 5), __builtin_shufflevector(ab, cd, 2, 3, 6, 7),
            __builtin_shufflevector(AB, CD, 0, 1, 4, 5), __builtin_shufflevector(AB, CD, 2, 3, 6, 7)};
        for (int i = 0; i < 4; i++)
            memcpy(to + (w + i) * wide, &turned[i], 16);
    }
    for (; w < whole; w++)
        for (int i = 0; i < count; i++)
            to[w * wide + i] = rows[i] ? gemm_word(rows[i], w, widen) : 0;
}

#ifdef __AVX512F__
/* 16 words of 16 rows, turned: pairs of rows, pairs of pairs, then quarters of registers change places. */
VEC_INLINE void gemm_turn(__m512i r[16])
{
    __m512i t[16];
    GEMM_UNROLL for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    GEMM_UNROLL for (int i = 0; i < 4; i++) {
        for (int h = 0; h < 2; h++) {
            r[4 * i + 2 * h] = _mm512_unpacklo_epi64(t[4 * i + h], t[4 * i + 2 + h]);
            r[4 * i + 2 * h + 1] = _mm512_unpackhi_epi64(t[4 * i + h], t[4 * i + 2 + h]);
        }
    }
    GEMM_UNROLL for (int i = 0; i < 4; i++) {
        for (int h = 0; h < 2; h++) {
            t[8 * h + i] = _mm512_shuffle_i32x4(r[8 * h + i], r[8 * h + 4 + i], 0x88);
            t[8 * h + 4 + i] = _mm512_shuffle_i32x4(r[8 * h + i], r[8 * h + 4 + i], 0xdd);
        }
    }
    GEMM_UNROLL for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    }
}

/* gemm_transpose of 16 rows, whose words are whole cells. */
VEC_INLINE void gemm_transpose_16(uint32_t *to, const void *const *rows, int wide, int64_t whole)
{
    __m512i r[16];
    for (int64_t w = 0; w < whole; w += 16) {
        __mmask16 left = (__mmask16)(whole - w >= 16 ? 0xffff : (1 << (whole - w)) - 1);
        GEMM_UNROLL for (int i = 0; i < 16; i++)
            r[i] = rows[i] ? _mm512_maskz_loadu_epi32(left, (const uint32_t *)rows[i] + w) : _mm512_setzero_si512();
        gemm_turn(r);
        GEMM_UNROLL for (int i = 0; i < 16; i++)
            if (left >> i & 1)
                _mm512_storeu_si512(to + (w + i) * wide, r[i]);
    }
}
#endif

VEC_INLINE void gemm_interleave(uint32_t *to, const void *const *rows, int wide, int64_t whole, bool widen)
{
    int i = 0;
#ifdef __AVX512F__
    for (; !widen && i + 16 <= wide; i += 16)
        gemm_transpose_16(to + i, rows + i, wide, whole);
#endif
    for (; i + 4 <= wide; i += 4)
        gemm_transpose(to + i, rows + i, 4, wide, whole, widen);
    for (; i < wide; i += 2)
        gemm_transpose(to + i, rows + i, 2, wide, whole, widen);
}

/* `wide` vectors of k values as cells. The last cell of an odd k: its value in the low half, zero in the high one; cells beyond k
 * are zeros. */
VEC_INLINE void gemm_pack_cells(uint32_t *to, const void *const *vectors, int wide, int64_t k, enum tensor_dtype dtype)
{
    int64_t whole = dtype == TENSOR_BF16 ? k / 2 : k, used = dtype == TENSOR_BF16 ? (k + 1) / 2 : k;
    gemm_interleave(to, vectors, wide, whole, false);
    for (int i = 0; whole < used && i < wide; i++)
        to[whole * wide + i] = vectors[i] ? gemm_word((const char *)vectors[i] + (k - 1) * 2, 0, true) >> 16 : 0;
    memset(to + used * wide, 0, (size_t)((gemm_cells(k, dtype) - used) * wide) * sizeof *to);
}

/* gemm_pack_columns packs one panel of B from its NR columns, each k values long; NULL is a column of zeros. */
VEC_INLINE void gemm_pack_columns(uint32_t *to, const void *const *columns, int64_t k, enum tensor_dtype dtype)
{
    gemm_pack_cells(to, columns, GEMM_NR, k, dtype);
}

/* For AMX: pieces of 64 bytes, filled up with zeros. */
VEC_INLINE void gemm_pack_pieces(uint32_t *to, const void *const *rows, int64_t k)
{
    for (int64_t piece = 0; piece < k * 2; piece += 64, to += GEMM_MR * 16)
        for (int i = 0; i < GEMM_MR; i++) {
            const char *from = rows[i] ? (const char *)rows[i] + piece : NULL;
            if (from && piece + 64 <= k * 2) {
                memcpy(to + i * 16, from, 64);
                continue;
            }
            memset(to + i * 16, 0, 64);
            if (from)
                memcpy(to + i * 16, from, (size_t)(k * 2 - piece));
        }
}

/* gemm_pack_rows packs one tile of A from its MR rows; NULL is a row of zeros. */
VEC_INLINE void gemm_pack_rows(uint32_t *to, const void *const *rows, int64_t k, enum tensor_dtype dtype)
{
    if (gemm_is_tiled(dtype)) {
        gemm_pack_pieces(to, rows, k);
        return;
    }
#ifdef __AVX512BF16__
    gemm_pack_cells(to, rows, GEMM_MR, k, dtype);
#else
    gemm_interleave(to, rows, GEMM_MR, k, dtype == TENSOR_BF16);
    if (k < gemm_words(k, dtype))
        memset(to + k * GEMM_MR, 0, GEMM_MR * sizeof *to);
#endif
}

/* gemm_pack_kn packs B given by its rows (k of them, `stride` elements apart) into one panel of columns [n0, n0 + NR)
 * of n. */
VEC_INLINE void gemm_pack_kn(uint32_t *to, const void *data, int64_t stride, int64_t k, int64_t n0, int64_t n,
                             enum tensor_dtype dtype)
{
    int64_t columns = n - n0 < GEMM_NR ? n - n0 : GEMM_NR, used = dtype == TENSOR_BF16 ? (k + 1) / 2 : k;
    memset(to + used * GEMM_NR, 0, (size_t)((gemm_cells(k, dtype) - used) * GEMM_NR) * sizeof *to);
    for (int64_t c = 0; c < used; c++, to += GEMM_NR) {
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

/* Where the micro-kernel finds A, in words: tile t begins at data + t * tile, its row i is `row` further, the next
 * word `step` further (in AMX: the next 16 words). With jumps, cells [s * segment, (s + 1) * segment) begin anew at
 * data + jump[s]. */
struct gemm_rows {
    const uint32_t *data;
    int64_t tile, row, step;
    const int64_t *jump;
    int64_t segment;
};

VEC_INLINE struct gemm_rows gemm_packed(const uint32_t *data, int64_t words, enum tensor_dtype dtype)
{
    bool is_tiled = gemm_is_tiled(dtype);
    return (struct gemm_rows){data, words * GEMM_MR, is_tiled ? 16 : 1, is_tiled ? 16 * GEMM_MR : GEMM_MR, NULL, 0};
}

/* Rows of words as they are, `row` words apart. */
VEC_INLINE struct gemm_rows gemm_plain(const uint32_t *data, int64_t row, enum tensor_dtype dtype)
{
    return (struct gemm_rows){data, row * GEMM_MR, row, gemm_is_tiled(dtype) ? 16 : 1, NULL, 0};
}

/* gemm_put_row writes such a row: gemm_words(k) words; NULL is zeros. */
VEC_INLINE void gemm_put_row(uint32_t *to, const void *row, int64_t k, enum tensor_dtype dtype)
{
    size_t bytes = 0;
    if (row && gemm_is_widened(dtype)) {
        bytes = (size_t)k * 4;
        for (int64_t i = 0; i < k; i += VEC)
            vec_store(to, TENSOR_F32, i, k - i, vec_load(row, TENSOR_BF16, i, k - i));
    } else if (row) {
        bytes = (size_t)k * tensor_dtype_bytes(dtype);
        memcpy(to, row, bytes);
    }
    memset((char *)to + bytes, 0, (size_t)gemm_words(k, dtype) * 4 - bytes);
}

/* Words of a tile whose first is `tile`, from cell `cell` on; *ret: how many cells follow there. */
VEC_INLINE const uint32_t *gemm_words_at(struct gemm_rows a, const uint32_t *tile, int64_t cell, enum tensor_dtype dtype,
                                         int64_t *ret)
{
    *ret = INT64_MAX;
    if (a.jump) {
        int64_t s = (int64_t)((uint64_t)cell / (uint64_t)a.segment);
        tile += a.jump[s];
        cell -= s * a.segment;
        *ret = a.segment - cell;
    }
    if (gemm_is_tiled(dtype))
        return tile + cell / 16 * a.step;
    return tile + cell * (gemm_words(2, dtype) / gemm_cells(2, dtype)) * a.step;
}

/* c += one word of each row times the columns b. */
VEC_INLINE void gemm_multiply(vf c[GEMM_GROUP][GEMM_NV], const uint32_t *a, int64_t row, const vf b[GEMM_NV])
{
    GEMM_UNROLL for (int i = 0; i < GEMM_GROUP; i++) {
        float x;
        memcpy(&x, a + i * row, 4);
        vf s = vec_splat(x);
        GEMM_UNROLL for (int j = 0; j < GEMM_NV; j++)
            c[i][j] += s * b[j];
    }
}

#ifdef __AVX512BF16__
VEC_INLINE void gemm_multiply_pair(vf c[GEMM_GROUP][GEMM_NV], struct gemm_rows a, const uint32_t *word, const uint32_t *b)
{
    __m512bh wide[GEMM_NV];
    GEMM_UNROLL for (int j = 0; j < GEMM_NV; j++)
        wide[j] = (__m512bh)_mm512_loadu_si512(b + j * VEC);
    GEMM_UNROLL for (int i = 0; i < GEMM_GROUP; i++) {
        int pair;
        memcpy(&pair, word + i * a.row, 4);
        __m512bh s = (__m512bh)_mm512_set1_epi32(pair);
        GEMM_UNROLL for (int j = 0; j < GEMM_NV; j++)
            c[i][j] = (vf)_mm512_dpbf16_ps((__m512)c[i][j], s, wide[j]);
    }
}
#else
/* Two words of A, f32 each, against a pair of bf16: the low halves first, then the high ones. */
VEC_INLINE void gemm_multiply_pair(vf c[GEMM_GROUP][GEMM_NV], struct gemm_rows a, const uint32_t *word, const uint32_t *b)
{
    vf half[GEMM_NV];
    GEMM_UNROLL for (int j = 0; j < GEMM_NV; j++)
        half[j] = (vf)((vu)vec_load(b, TENSOR_F32, j * VEC, VEC) << 16);
    gemm_multiply(c, word, a.row, half);
    GEMM_UNROLL for (int j = 0; j < GEMM_NV; j++)
        half[j] = (vf)((vu)vec_load(b, TENSOR_F32, j * VEC, VEC) & 0xffff0000u);
    gemm_multiply(c, word + a.step, a.row, half);
}
#endif

/* GROUP rows of a tile of C += cells [from, end) of A, whose tile begins at `word`, times those of b, a panel. */
VEC_INLINE void gemm_micro(float *tile, struct gemm_rows a, const uint32_t *word, const uint32_t *b, int64_t from,
                           int64_t end, enum tensor_dtype dtype, bool add)
{
    vf c[GEMM_GROUP][GEMM_NV];
    int64_t per_cell = gemm_words(2, dtype) / gemm_cells(2, dtype);
    GEMM_UNROLL for (int i = 0; i < GEMM_GROUP; i++)
        GEMM_UNROLL for (int j = 0; j < GEMM_NV; j++)
            c[i][j] = add ? vec_load(tile, TENSOR_F32, i * GEMM_NR + j * VEC, VEC) : (vf){0};
    b += from * GEMM_NR;
    while (from < end) {
        int64_t count;
        const uint32_t *at = gemm_words_at(a, word, from, dtype, &count);
        count = count < end - from ? count : end - from;
        from += count;
        for (; count > 0; count--, at += per_cell * a.step, b += GEMM_NR) {
            if (GEMM_AHEAD)
                GEMM_UNROLL for (int j = 0; j < GEMM_NV; j++)
                    __builtin_prefetch(b + GEMM_AHEAD * GEMM_NR + j * VEC);
            if (dtype == TENSOR_BF16) {
                gemm_multiply_pair(c, a, at, b);
                continue;
            }
            vf wide[GEMM_NV];
            GEMM_UNROLL for (int j = 0; j < GEMM_NV; j++)
                wide[j] = vec_load(b, TENSOR_F32, j * VEC, VEC);
            gemm_multiply(c, at, a.row, wide);
        }
    }
    GEMM_UNROLL for (int i = 0; i < GEMM_GROUP; i++)
        GEMM_UNROLL for (int j = 0; j < GEMM_NV; j++)
            vec_store(tile, TENSOR_F32, i * GEMM_NR + j * VEC, VEC, c[i][j]);
}

/* One tile of C over a run. */
VEC_INLINE void gemm_tile(float *tile, struct gemm_rows a, const uint32_t *word, const uint32_t *b, int64_t from,
                          int64_t end, enum tensor_dtype dtype, bool add)
{
    for (int i = 0; i < GEMM_MR; i += GEMM_GROUP, tile += GEMM_GROUP * GEMM_NR, word += GEMM_GROUP * a.row)
        gemm_micro(tile, a, word, b, from, end, dtype, add);
}

#ifdef __AMX_BF16__
/* A tile of C in tile registers: 2 x 2 of 16 x 16 sums. */
VEC_INLINE void gemm_sums_load(const float *c, bool add)
{
    GEMM_FENCE;
    if (add) {
        _tile_loadd(0, c, GEMM_NR * 4);
        _tile_loadd(1, c + 16, GEMM_NR * 4);
        _tile_loadd(2, c + 16 * GEMM_NR, GEMM_NR * 4);
        _tile_loadd(3, c + 16 * GEMM_NR + 16, GEMM_NR * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
}

VEC_INLINE void gemm_sums_store(float *c)
{
    _tile_stored(0, c, GEMM_NR * 4);
    _tile_stored(1, c + 16, GEMM_NR * 4);
    _tile_stored(2, c + 16 * GEMM_NR, GEMM_NR * 4);
    _tile_stored(3, c + 16 * GEMM_NR + 16, GEMM_NR * 4);
}

/* What a tile of C fetches for those after it, a little at every step: their C into the first-level cache, A and B of the
 * next run and the next panel into the second. */
struct gemm_ahead {
    const char *c, *a, *b;
    int c_lines, a_lines, b_lines; /* per step */
};

VEC_INLINE const char *gemm_fetch(const char *p, int lines, bool is_near)
{
    for (; lines > 0; lines--, p += 64)
        is_near ? __builtin_prefetch(p, 0, 3) : __builtin_prefetch(p, 0, 2);
    return p;
}

/* One tile of C over cells [from, end); a function of its own for the sake of its registers. A is loaded past the
 * first-level cache's order of use, so that the panel of B stays there. */
static __attribute__((noinline, unused)) void gemm_tile_amx(float *c, const struct gemm_rows *rows, const uint32_t *word,
                                                            const uint32_t *b, int64_t from, int64_t end, bool add,
                                                            const struct gemm_ahead *next)
{
    const struct gemm_rows a = *rows;
    struct gemm_ahead ahead = *next;
    gemm_sums_load(c, add);
    b += from * GEMM_NR;
    while (from < end) {
        int64_t count;
        const uint32_t *at = gemm_words_at(a, word, from, TENSOR_BF16, &count);
        count = count < end - from ? count : end - from;
        from += count;
        for (; count > 0; count -= 16, at += a.step, b += 16 * GEMM_NR) {
            ahead.c = gemm_fetch(ahead.c, ahead.c_lines, true);
            ahead.a = gemm_fetch(ahead.a, ahead.a_lines, false);
            ahead.b = gemm_fetch(ahead.b, ahead.b_lines, false);
            _tile_stream_loadd(4, at, a.row * 4);
            _tile_stream_loadd(5, at + 16 * a.row, a.row * 4);
            _tile_loadd(6, b, GEMM_NR * 4);
            _tile_loadd(7, b + 16, GEMM_NR * 4);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    gemm_sums_store(c);
}

/* gemm_product by AMX, the same loops. */
VEC_INLINE void gemm_product_amx(float *c, struct gemm_rows a, int64_t tiles, const uint32_t *b, int64_t panels,
                                 int64_t cells, bool add)
{
    const int64_t run_cells = GEMM_RUN / 2, run_steps = run_cells / 16, lines = GEMM_NR;
    struct gemm_ahead ahead = {.c_lines = (int)(GEMM_TILE / 16 / run_steps), .b_lines = (int)((lines + tiles - 1) / tiles)};
    if (!a.jump)
        ahead.a_lines = (int)((lines + panels - 1) / panels);
    for (int64_t run = 0; run < cells; run += run_cells) {
        int64_t end = run + run_cells < cells ? run + run_cells : cells, steps = (end - run) / 16;
        for (int64_t p = 0; p < panels; p++)
            for (int64_t t = 0; t < tiles; t++) {
                float *tile = c + (p * tiles + t) * GEMM_TILE;
                const uint32_t *word = a.data + t * a.tile;
                int64_t next_panel = p + 1 < panels ? (p + 1) * cells + run : run + run_cells;
                ahead.c = (const char *)(tile + GEMM_TILE);
                ahead.a = (const char *)(word + (run / 16 + run_steps) * a.step) + p * steps * ahead.a_lines * 64;
                ahead.b = (const char *)(b + next_panel * GEMM_NR) + t * steps * ahead.b_lines * 64;
                gemm_tile_amx(tile, &a, word, b + p * cells * GEMM_NR, run, end, add || run > 0, &ahead);
            }
    }
}
#endif

/* gemm_product: C (+)= tiles of A times panels of B; dtype is that of B. */
VEC_INLINE void gemm_product(float *c, struct gemm_rows a, int64_t tiles, const uint32_t *b, int64_t panels,
                             int64_t cells, enum tensor_dtype dtype, bool add)
{
#ifdef __AMX_BF16__
    if (dtype == TENSOR_BF16) {
        gemm_product_amx(c, a, tiles, b, panels, cells, add);
        return;
    }
#endif
    int64_t step = gemm_cells(GEMM_RUN, dtype);
    for (int64_t run = 0; run < cells; run += step) {
        int64_t end = cells - run < step ? cells : run + step;
        for (int64_t p = 0; p < panels; p++)
            for (int64_t t = 0; t < tiles; t++) {
                float *tile = c + (p * tiles + t) * GEMM_TILE;
                const uint32_t *word = a.data + t * a.tile, *panel = b + p * cells * GEMM_NR;
                if (dtype == TENSOR_BF16)
                    gemm_tile(tile, a, word, panel, run, end, TENSOR_BF16, add || run > 0);
                else
                    gemm_tile(tile, a, word, panel, run, end, TENSOR_F32, add || run > 0);
            }
    }
}

/* A product that may go on while the caller does something else: AMX multiplies beside the vector registers, when A is one
 * tile. gemm_left says how many steps it has; each is begun, done in quarters with other work between them, and ended.
 * gemm_finish does what is left. In a thread only one product may be under way. */
struct gemm_background {
    float *c;
    struct gemm_rows a;
    int64_t tiles;
    const uint32_t *b;
    int64_t panels, cells;
    enum tensor_dtype dtype;
    bool add;
    int64_t panel, cell; /* done so far */
};

/* Steps of 32 values of k that are left and can be done beside other work. */
VEC_INLINE int64_t gemm_left(const struct gemm_background *g)
{
    bool can = gemm_is_tiled(g->dtype) && g->tiles == 1;
    return can ? ((g->panels - g->panel) * g->cells - g->cell) / 16 : 0;
}

struct gemm_step {
    const uint32_t *a, *b;
    int64_t row;
};

VEC_INLINE struct gemm_step gemm_step_begin(const struct gemm_background *g)
{
#ifdef __AMX_BF16__
    if (g->cell == 0)
        gemm_sums_load(g->c + g->panel * GEMM_TILE, g->add);
#endif
    return (struct gemm_step){g->a.data + g->cell / 16 * g->a.step, g->b + (g->panel * g->cells + g->cell) * GEMM_NR,
                              g->a.row};
}

VEC_INLINE void gemm_step_quarter(struct gemm_step s, int quarter)
{
#ifdef __AMX_BF16__
    switch (quarter) {
    case 0:
        _tile_loadd(6, s.b, GEMM_NR * 4);
        _tile_loadd(4, s.a, s.row * 4);
        _tile_dpbf16ps(0, 4, 6);
        return;
    case 1:
        _tile_loadd(7, s.b + 16, GEMM_NR * 4);
        _tile_dpbf16ps(1, 4, 7);
        return;
    case 2:
        _tile_loadd(5, s.a + 16 * s.row, s.row * 4);
        _tile_dpbf16ps(2, 5, 6);
        return;
    default:
        _tile_dpbf16ps(3, 5, 7);
    }
#else
    (void)s, (void)quarter;
#endif
}

VEC_INLINE void gemm_step_end(struct gemm_background *g)
{
    g->cell += 16;
    if (g->cell < g->cells)
        return;
#ifdef __AMX_BF16__
    gemm_sums_store(g->c + g->panel * GEMM_TILE);
#endif
    g->panel++, g->cell = 0;
}

VEC_INLINE void gemm_finish(struct gemm_background *g)
{
    if (g->tiles != 1 || !gemm_is_tiled(g->dtype)) {
        gemm_product(g->c, g->a, g->tiles, g->b, g->panels, g->cells, g->dtype, g->add);
        return;
    }
    while (gemm_left(g)) {
        struct gemm_step step = gemm_step_begin(g);
        for (int quarter = 0; quarter < 4; quarter++)
            gemm_step_quarter(step, quarter);
        gemm_step_end(g);
    }
}

/* vec_store of a product: by vec_narrow. */
VEC_INLINE void gemm_store_part(void *row, enum tensor_dtype dtype, int64_t i, int64_t n, vf v)
{
    if (dtype == TENSOR_F32) {
        vec_store(row, TENSOR_F32, i, n, v);
        return;
    }
    vh h = vec_narrow(v);
    memcpy((uint16_t *)row + i, &h, n >= VEC ? sizeof h : (size_t)n * 2);
}

/* gemm_store writes rows [0, rows) of the tiles of `panels` panels to out rows at columns [n0, n): times the row's scale (NULL: 1),
 * bias added in f32, one rounding. A row whose out is NULL is left out. */
VEC_INLINE void gemm_store(const float *c, int64_t tiles, int64_t panels, int64_t rows, void *const *out,
                           enum tensor_dtype dtype, int64_t n0, int64_t n, const float *scales, const float *bias)
{
    int64_t columns = n - n0 < panels * GEMM_NR ? n - n0 : panels * GEMM_NR;
    for (int64_t r = 0; r < rows; r++) {
        if (!out[r])
            continue;
        const float *row = c + r / GEMM_MR * GEMM_TILE + r % GEMM_MR * GEMM_NR;
        for (int64_t j = 0; j < columns; j += VEC) {
            vf v = vec_load(row + j / GEMM_NR * tiles * GEMM_TILE, TENSOR_F32, j % GEMM_NR, VEC);
            if (scales)
                v *= scales[r];
            if (bias)
                v += vec_load(bias, TENSOR_F32, n0 + j, columns - j);
            gemm_store_part(out[r], dtype, n0 + j, columns - j, v);
        }
    }
}

#endif
