/* quant.h - number formats of weight files: what a block of bytes means in f32 and bf16.
 *
 * A quant_matrix is a weight as its file holds it; rows are decoded when they are needed (by products: linear.c), so that
 * what came quantised stays quantised. Definitions, all with f32 arithmetic in the order written and one rounding per
 * operation:
 *
 *   F32 F16 BF16       themselves
 *   Q8_0               32 values      d q                     d is f16
 *   Q4_0  Q5_0         32             d (q - 8), d (q - 16)
 *   Q4_1  Q5_1         32             d q + m                 d, m are f16
 *   Q2_K  Q4_K  Q5_K   256            (d s) q - (dmin t)      s, t: 4 or 6 bit per 16 or 32 values
 *   Q3_K  Q6_K         256            (d s) q                 s: 6 bit less 32, 8 bit; per 16 values
 *   FP8_E4M3           1              scale e4m3              scale: one f32 for the tensor
 *   NVFP4              16             (scale e4m3) e2m1       e4m3: one per block, in a tensor of its own
 *
 * The first ten groups are GGUF's; their reference is `dequantize` of the Python package gguf, which agrees to the bit.
 * FP8 and NVFP4 are those of the published klein files: engine-spec 2.8. */
#ifndef KILN_QUANT_H
#define KILN_QUANT_H

#include "tensor.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum quant_format {
    QUANT_F32, QUANT_F16, QUANT_BF16,
    QUANT_Q8_0, QUANT_Q4_0, QUANT_Q4_1, QUANT_Q5_0, QUANT_Q5_1,
    QUANT_Q2_K, QUANT_Q3_K, QUANT_Q4_K, QUANT_Q5_K, QUANT_Q6_K,
    QUANT_FP8_E4M3, QUANT_NVFP4,
};
#define QUANT_FORMAT_COUNT 15

struct quant_traits {
    const char *name;    /* "Q4_K" */
    int values, bytes;   /* of one block */
};
const struct quant_traits *quant_info(enum quant_format format);
bool quant_find(enum quant_format *ret, const char *name); /* by name, upper case */

/* quant_bytes is what n rows of k values take; false when k is no whole number of blocks or the size overflows. */
bool quant_bytes(size_t *ret, enum quant_format format, int64_t n, int64_t k);

/* A [n, k] weight as in the file; all memory is the caller's. */
struct quant_matrix {
    enum quant_format format;
    int64_t n, k;
    const void *data;             /* rows of whole blocks; any alignment */
    float scale;                  /* FP8_E4M3: weight_scale; NVFP4: weight_scale_2; others: unused */
    float input_scale;            /* FP8_E4M3: what a product in FP8 divides rows by; 0: each row by one of its own (quant_row_scale) */
    bool has_fp8_products;        /* FP8_E4M3: rows are rounded to e4m3 before they are multiplied by this (kern_linear) */
    const uint8_t *block_scales;  /* NVFP4: e4m3, [n, k / 16] */
    bool is_swizzled;             /* NVFP4: block_scales are in tiles, see quant_block_scale_at */
    bool low_first;               /* NVFP4: value 2i is the low nibble (ModelOpt); the klein files have it high */
    const uint16_t *codes;        /* quant_codes of it, or NULL: the same bits, later */
};

/* quant_check: do the memory sizes fit the matrix, is the scale usable? Every matrix from a file passes here first. If not,
 * `why` is told. */
bool quant_check(const struct quant_matrix *m, size_t data_bytes, size_t block_scale_bytes, char *why, size_t why_bytes);

/* Rows [first, first + count) of a checked matrix, to[count, k] contiguous. bf16 is the f32 value rounded to nearest even. */
void quant_rows(void *to, enum tensor_dtype dtype, const struct quant_matrix *m, int64_t first, int64_t count);
void quant_rows_f32(float *to, const struct quant_matrix *m, int64_t first, int64_t count);
void quant_rows_bf16(uint16_t *to, const struct quant_matrix *m, int64_t first, int64_t count);

/* Rows [first, first + count) of a matrix. A weight is one run, or several of equal width behind each other: q, k and v of
 * one layer, halves that are swapped. quant_run_bytes is what its values and scales take in the file. */
struct quant_run {
    struct quant_matrix matrix;
    int64_t first, count;
};
size_t quant_run_bytes(const struct quant_run *r);
bool quant_is_small(enum quant_format format); /* less than two bytes a value */
bool quant_runs_are_small(const struct quant_run *runs, int count); /* one of them is: worth keeping as they are */
bool quant_runs_have_fp8(const struct quant_run *runs, int count);  /* one of them has products in FP8: each is a product then */

/* Where a run lies that is kept in memory of its own, free from `begin` on: its rows of blocks one behind the other, then the
 * block scales of NVFP4, row by row; each of the two, and what comes behind `end`, on QUANT_PLACE_ALIGN bytes. */
#define QUANT_PLACE_ALIGN ((size_t)256)
struct quant_place {
    size_t data, scales, end;
};
struct quant_place quant_place_of(const struct quant_run *r, size_t begin);

/* quant_row: the blocks of a row, quant_row_bytes of them; quant_row_scales: how many block scales it has. */
const uint8_t *quant_row(const struct quant_matrix *m, int64_t row);
size_t quant_row_bytes(const struct quant_matrix *m);
size_t quant_row_scales(const struct quant_matrix *m);

/* quant_codes: what the scale of a matrix makes of each code, in bf16; quant_code_count of them, 0 for other formats.
 *   FP8_E4M3 [128]      of the code without its sign
 *   NVFP4    [256][8]   of a block scale's code and a value's code without its sign */
size_t quant_code_count(const struct quant_matrix *m);
void quant_codes(uint16_t *to, const struct quant_matrix *m);

/* quant_is_finite: no value of these rows is NaN or infinite (told from scales and codes, without decoding when the
 * format allows it). */
bool quant_is_finite(const struct quant_matrix *m, int64_t first, int64_t count);

/* quant_block_scale_at is where the scale of (row, block) is: row-major, or swizzled: rows padded to 128, columns to 4,
 * tiles of 128 x 4 stored row-major, inside a tile at (row % 32) * 16 + (row % 128 / 32) * 4 + column % 4.
 * quant_block_scale_bytes is the size of all of them. */
size_t quant_block_scale_at(const struct quant_matrix *m, int64_t row, int64_t block);
bool quant_block_scale_bytes(size_t *ret, const struct quant_matrix *m);

/* Single values. e4m3 is the "fn" kind: no infinities, largest 448, codes 0x7f and 0xff are NaN. */
static inline float quant_f32_of_bits(uint32_t bits)
{
    union { uint32_t u; float f; } v = {.u = bits};
    return v.f;
}

static inline float quant_f32_of_f16(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;
    if (exponent == 31)
        return quant_f32_of_bits(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0) { /* fraction * 2^-24, exact */
        float f = (float)fraction * 0x1p-24f;
        return sign ? -f : f;
    }
    return quant_f32_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

static inline float quant_f32_of_e4m3(uint8_t code)
{
    uint32_t magnitude = code & 0x7f;
    float f = quant_f32_of_bits((magnitude << 20) + (120u << 23));
    f = magnitude < 8 ? (float)magnitude * 0x1p-9f : f; /* no implied leading bit */
    f = magnitude == 0x7f ? quant_f32_of_bits(0x7fc00000u) : f;
    return code & 0x80 ? -f : f;
}

/* quant_row_scale: the smallest power of two, 2^-126 at least, by which a row whose largest magnitude this is may be divided so
 * that it fits e4m3 (448 is 1.75 x 2^8). A power of two, because a result may be multiplied by it without being rounded again. */
static inline float quant_row_scale(float largest)
{
    union { float f; uint32_t u; } v = {.f = largest};
    uint32_t exponent = (v.u + 0x1fffffu) >> 23; /* one more above 1.75 x 2^e */
    return quant_f32_of_bits((exponent > 9 ? exponent - 8 : 1) << 23);
}

static inline float quant_f32_of_e2m1(uint8_t code) /* low four bits */
{
    static const float values[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
    return values[code & 15];
}

#endif
