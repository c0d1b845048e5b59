/* quant.c - one decoder per format and a table that names them.
 *
 * The decoders are definitions: short and scalar, a run of blocks at a time, with the operations in the order in which the
 * reference rounds them (nothing is fused: the build forbids contraction). Kernels that read quantised weights are
 * tested against them. Blocks are read byte by byte: a mapped file promises no alignment.
 *
 * K formats: 256 values in groups of 16 or 32 with a scale each. 6-bit scales are packed 8 + 8 into 12 bytes:
 *   byte 0..3   s0..s3 in the low 6 bits, top 2 bits: bits 4-5 of s4..s7
 *   byte 4..7   the same for the minima t
 *   byte 8..11  low nibble: bits 0-3 of s4..s7, high nibble: of t4..t7 */
#include "quant.h"

#include "tensor.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#define K_VALUES 256
#define SPAN_VALUES 1024 /* decoded at once on the way to bf16 */

/* --- single values ------------------------------------------------------------------------------------ */

static float f32_of_bits(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static uint32_t read_u16(const uint8_t *p)
{
    return p[0] | (uint32_t)p[1] << 8;
}

static uint32_t read_u32(const uint8_t *p)
{
    return read_u16(p) | read_u16(p + 2) << 16;
}

float quant_f32_of_f16(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;
    if (exponent == 31)
        return f32_of_bits(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0) { /* fraction * 2^-24, exact */
        float f = (float)fraction * 0x1p-24f;
        return sign ? -f : f;
    }
    return f32_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

/* A row: one exponent, eight fractions. The first row has no implied leading bit, the last value is NaN. */
#define FRACTIONS(least, unit)                                                                                           \
    (least) * (unit), (least + 1) * (unit), (least + 2) * (unit), (least + 3) * (unit), (least + 4) * (unit),            \
        (least + 5) * (unit), (least + 6) * (unit), (least + 7) * (unit)

float quant_f32_of_e4m3(uint8_t code)
{
    static const float values[128] = {
        FRACTIONS(0, 0x1p-9f), FRACTIONS(8, 0x1p-9f), FRACTIONS(8, 0x1p-8f), FRACTIONS(8, 0x1p-7f),
        FRACTIONS(8, 0x1p-6f), FRACTIONS(8, 0x1p-5f), FRACTIONS(8, 0x1p-4f), FRACTIONS(8, 0x1p-3f),
        FRACTIONS(8, 0x1p-2f), FRACTIONS(8, 0x1p-1f), FRACTIONS(8, 0x1p0f),  FRACTIONS(8, 0x1p1f),
        FRACTIONS(8, 0x1p2f),  FRACTIONS(8, 0x1p3f),  FRACTIONS(8, 0x1p4f),  256, 288, 320, 352, 384, 416, 448, NAN,
    };
    float f = values[code & 127];
    return code & 128 ? -f : f;
}

float quant_f32_of_e2m1(uint8_t code)
{
    static const float values[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
    return values[code & 15];
}

static float read_f16(const uint8_t *p)
{
    return quant_f32_of_f16((uint16_t)read_u16(p));
}

/* --- blocks of one value ------------------------------------------------------------------------------- */

static void decode_f32(float *to, const uint8_t *b, int64_t blocks)
{
    for (int64_t i = 0; i < blocks; i++)
        to[i] = f32_of_bits(read_u32(b + 4 * i));
}

static void decode_f16(float *to, const uint8_t *b, int64_t blocks)
{
    for (int64_t i = 0; i < blocks; i++)
        to[i] = read_f16(b + 2 * i);
}

static void decode_bf16(float *to, const uint8_t *b, int64_t blocks)
{
    for (int64_t i = 0; i < blocks; i++)
        to[i] = tensor_f32_of((uint16_t)read_u16(b + 2 * i));
}

static void decode_fp8(float *to, const uint8_t *b, int64_t blocks)
{
    for (int64_t i = 0; i < blocks; i++)
        to[i] = quant_f32_of_e4m3(b[i]);
}

/* --- blocks of 32: d [m] [fifth bits] nibbles; the low nibbles are values 0..15, the high ones 16..31 ----- */

static void decode_q8_0(float *to, const uint8_t *b, int64_t blocks)
{
    for (; blocks > 0; blocks--, to += 32, b += 34) {
        float d = read_f16(b);
        for (int i = 0; i < 32; i++)
            to[i] = d * (float)(int8_t)b[2 + i];
    }
}

static void decode_q4_0(float *to, const uint8_t *b, int64_t blocks)
{
    for (; blocks > 0; blocks--, to += 32, b += 18) {
        float d = read_f16(b);
        for (int i = 0; i < 16; i++) {
            to[i] = d * (float)((b[2 + i] & 15) - 8);
            to[16 + i] = d * (float)((b[2 + i] >> 4) - 8);
        }
    }
}

static void decode_q4_1(float *to, const uint8_t *b, int64_t blocks)
{
    for (; blocks > 0; blocks--, to += 32, b += 20) {
        float d = read_f16(b), m = read_f16(b + 2);
        for (int i = 0; i < 16; i++) {
            to[i] = d * (float)(b[4 + i] & 15) + m;
            to[16 + i] = d * (float)(b[4 + i] >> 4) + m;
        }
    }
}

static void decode_q5_0(float *to, const uint8_t *b, int64_t blocks)
{
    for (; blocks > 0; blocks--, to += 32, b += 22) {
        float d = read_f16(b);
        uint32_t fifth = read_u32(b + 2);
        for (int i = 0; i < 16; i++) {
            to[i] = d * (float)(((b[6 + i] & 15) | (int)(fifth >> i & 1) << 4) - 16);
            to[16 + i] = d * (float)((b[6 + i] >> 4 | (int)(fifth >> (16 + i) & 1) << 4) - 16);
        }
    }
}

static void decode_q5_1(float *to, const uint8_t *b, int64_t blocks)
{
    for (; blocks > 0; blocks--, to += 32, b += 24) {
        float d = read_f16(b), m = read_f16(b + 2);
        uint32_t fifth = read_u32(b + 4);
        for (int i = 0; i < 16; i++) {
            to[i] = d * (float)((b[8 + i] & 15) | (int)(fifth >> i & 1) << 4) + m;
            to[16 + i] = d * (float)(b[8 + i] >> 4 | (int)(fifth >> (16 + i) & 1) << 4) + m;
        }
    }
}

/* --- blocks of 256, in groups g of 16 or 32 values --------------------------------------------------------- */

/* Two-bit numbers: each half of 128 values shares 32 bytes, four numbers a byte, 32 values apart. */
struct two_bits {
    const uint8_t *bytes; /* of the group's first value */
    int shift;
};

static struct two_bits two_bits_of(const uint8_t *q, int first)
{
    return (struct two_bits){q + first / 128 * 32 + first % 32, first % 128 / 32 * 2};
}

/* scales[16] (s low, t high nibble), q[64], d, dmin */
static void decode_q2_k(float *to, const uint8_t *b, int64_t blocks)
{
    for (; blocks > 0; blocks--, b += 84) {
        float d = read_f16(b + 80), dmin = read_f16(b + 82);
        for (int g = 0; g < 16; g++, to += 16) {
            float scale = d * (float)(b[g] & 15), least = dmin * (float)(b[g] >> 4);
            struct two_bits q = two_bits_of(b + 16, 16 * g);
            for (int i = 0; i < 16; i++)
                to[i] = scale * (float)(q.bytes[i] >> q.shift & 3) - least;
        }
    }
}

/* high[32] (bit v / 32 of byte v % 32 for value v), q[64], scales[12], d. A high bit that is off takes 4 away. */
static void decode_q3_k(float *to, const uint8_t *b, int64_t blocks)
{
    for (; blocks > 0; blocks--, b += 110) {
        const uint8_t *s = b + 96;
        float d = read_f16(b + 108);
        for (int g = 0; g < 16; g++, to += 16) {
            int low = g < 8 ? s[g] & 15 : s[g - 8] >> 4, high = s[8 + g % 4] >> (g / 4 * 2) & 3;
            float scale = d * (float)((low | high << 4) - 32);
            struct two_bits q = two_bits_of(b + 32, 16 * g);
            const uint8_t *third = b + g % 2 * 16;
            for (int i = 0; i < 16; i++)
                to[i] = scale * (float)((q.bytes[i] >> q.shift & 3) - 4 + (third[i] >> (g / 2) & 1) * 4);
        }
    }
}

/* Scale and minimum of group g of 8 in the 12 bytes drawn above. */
static void scale_and_least(const uint8_t *p, int g, int *scale, int *least)
{
    if (g < 4) {
        *scale = p[g] & 63;
        *least = p[g + 4] & 63;
    } else {
        *scale = (p[g + 4] & 15) | (p[g - 4] >> 6) << 4;
        *least = p[g + 4] >> 4 | (p[g] >> 6) << 4;
    }
}

/* d, dmin, scales[12], q[128]: two groups share 32 bytes, low nibbles first */
static void decode_q4_k(float *to, const uint8_t *b, int64_t blocks)
{
    for (; blocks > 0; blocks--, b += 144) {
        float d = read_f16(b), dmin = read_f16(b + 2);
        for (int g = 0; g < 8; g++, to += 32) {
            const uint8_t *q = b + 16 + g / 2 * 32;
            int s, t, shift = g % 2 * 4;
            scale_and_least(b + 4, g, &s, &t);
            float scale = d * (float)s, least = dmin * (float)t;
            for (int i = 0; i < 32; i++)
                to[i] = scale * (float)(q[i] >> shift & 15) - least;
        }
    }
}

/* d, dmin, scales[12], fifth[32] (bit g of byte i), q[128] */
static void decode_q5_k(float *to, const uint8_t *b, int64_t blocks)
{
    for (; blocks > 0; blocks--, b += 176) {
        float d = read_f16(b), dmin = read_f16(b + 2);
        for (int g = 0; g < 8; g++, to += 32) {
            const uint8_t *q = b + 48 + g / 2 * 32, *fifth = b + 16;
            int s, t, shift = g % 2 * 4;
            scale_and_least(b + 4, g, &s, &t);
            float scale = d * (float)s, least = dmin * (float)t;
            for (int i = 0; i < 32; i++)
                to[i] = scale * (float)((q[i] >> shift & 15) | (fifth[i] >> g & 1) << 4) - least;
        }
    }
}

/* low[128] (halves of 128 values share 64 bytes of nibbles), high[64], scales[16] (signed), d */
static void decode_q6_k(float *to, const uint8_t *b, int64_t blocks)
{
    for (; blocks > 0; blocks--, b += 210) {
        float d = read_f16(b + 208);
        for (int g = 0; g < 16; g++, to += 16) {
            const uint8_t *low = b + g / 8 * 64 + g % 4 * 16;
            int shift = g % 8 / 4 * 4;
            struct two_bits high = two_bits_of(b + 128, 16 * g);
            float scale = d * (float)(int8_t)b[192 + g];
            for (int i = 0; i < 16; i++)
                to[i] = scale * (float)(((low[i] >> shift & 15) | (high.bytes[i] >> high.shift & 3) << 4) - 32);
        }
    }
}

/* High nibble first. */
static void decode_nvfp4(float *to, const uint8_t *b, int64_t blocks)
{
    for (int64_t i = 0; i < 8 * blocks; i++) {
        to[2 * i] = quant_f32_of_e2m1((uint8_t)(b[i] >> 4));
        to[2 * i + 1] = quant_f32_of_e2m1(b[i]);
    }
}

/* --- the table ------------------------------------------------------------------------------------------- */

static const struct quant_info formats[QUANT_FORMAT_COUNT] = {
    [QUANT_F32] = {"F32", 1, 4, decode_f32},
    [QUANT_F16] = {"F16", 1, 2, decode_f16},
    [QUANT_BF16] = {"BF16", 1, 2, decode_bf16},
    [QUANT_Q8_0] = {"Q8_0", 32, 34, decode_q8_0},
    [QUANT_Q4_0] = {"Q4_0", 32, 18, decode_q4_0},
    [QUANT_Q4_1] = {"Q4_1", 32, 20, decode_q4_1},
    [QUANT_Q5_0] = {"Q5_0", 32, 22, decode_q5_0},
    [QUANT_Q5_1] = {"Q5_1", 32, 24, decode_q5_1},
    [QUANT_Q2_K] = {"Q2_K", K_VALUES, 84, decode_q2_k},
    [QUANT_Q3_K] = {"Q3_K", K_VALUES, 110, decode_q3_k},
    [QUANT_Q4_K] = {"Q4_K", K_VALUES, 144, decode_q4_k},
    [QUANT_Q5_K] = {"Q5_K", K_VALUES, 176, decode_q5_k},
    [QUANT_Q6_K] = {"Q6_K", K_VALUES, 210, decode_q6_k},
    [QUANT_FP8_E4M3] = {"FP8_E4M3", 1, 1, decode_fp8},
    [QUANT_NVFP4] = {"NVFP4", 16, 8, decode_nvfp4},
};

/* Where the f16 numbers of a block are that make all its values NaN or infinite; -1: none. */
static const int16_t scales_at[QUANT_FORMAT_COUNT][2] = {
    [QUANT_F32] = {-1, -1}, [QUANT_F16] = {0, -1},   [QUANT_BF16] = {-1, -1}, [QUANT_Q8_0] = {0, -1},
    [QUANT_Q4_0] = {0, -1}, [QUANT_Q4_1] = {0, 2},   [QUANT_Q5_0] = {0, -1},  [QUANT_Q5_1] = {0, 2},
    [QUANT_Q2_K] = {80, 82}, [QUANT_Q3_K] = {108, -1}, [QUANT_Q4_K] = {0, 2},   [QUANT_Q5_K] = {0, 2},
    [QUANT_Q6_K] = {208, -1}, [QUANT_FP8_E4M3] = {-1, -1}, [QUANT_NVFP4] = {-1, -1},
};

const struct quant_info *quant_info(enum quant_format format)
{
    return &formats[format];
}

bool quant_find(enum quant_format *ret, const char *name)
{
    for (int i = 0; i < QUANT_FORMAT_COUNT; i++)
        if (strcmp(formats[i].name, name) == 0) {
            *ret = (enum quant_format)i;
            return true;
        }
    return false;
}

bool quant_bytes(size_t *ret, enum quant_format format, int64_t n, int64_t k)
{
    const struct quant_info *f = &formats[format];
    size_t blocks;
    return n >= 0 && k >= 0 && k % f->values == 0 &&
           !__builtin_mul_overflow((size_t)n, (size_t)(k / f->values), &blocks) &&
           !__builtin_mul_overflow(blocks, (size_t)f->bytes, ret);
}

/* --- matrices -------------------------------------------------------------------------------------------- */

static int64_t round_up(int64_t n, int64_t step)
{
    return (n + step - 1) / step * step;
}

size_t quant_block_scale_at(const struct quant_matrix *m, int64_t row, int64_t block)
{
    int64_t columns = m->k / 16;
    if (!m->is_swizzled)
        return (size_t)(row * columns + block);
    int64_t tiles = round_up(columns, 4) / 4, tile = row / 128 * tiles + block / 4;
    return (size_t)(tile * 512 + row % 32 * 16 + row % 128 / 32 * 4 + block % 4);
}

bool quant_block_scale_bytes(size_t *ret, const struct quant_matrix *m)
{
    if (m->n < 0 || m->k < 0 || m->n > INT64_MAX - 128 || m->k % 16)
        return false;
    int64_t rows = m->is_swizzled ? round_up(m->n, 128) : m->n, columns = m->is_swizzled ? round_up(m->k / 16, 4) : m->k / 16;
    return !__builtin_mul_overflow((size_t)rows, (size_t)columns, ret);
}

bool quant_check(const struct quant_matrix *m, size_t data_bytes, size_t block_scale_bytes, struct engine_error *why)
{
    const struct quant_info *f = &formats[m->format];
    size_t want;
    if (!quant_bytes(&want, m->format, m->n, m->k))
        return engine_error_set(why, ENGINE_BAD_MODEL, "[%lld,%lld] as %s: want rows of a whole number of %d values, and a "
                                "size that memory can have", (long long)m->n, (long long)m->k, f->name, f->values);
    if (data_bytes != want)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%zu bytes, [%lld,%lld] as %s needs %zu", data_bytes, (long long)m->n,
                                (long long)m->k, f->name, want);
    bool has_scale = m->format == QUANT_FP8_E4M3 || m->format == QUANT_NVFP4;
    if (has_scale && !(isfinite(m->scale) && m->scale >= 0))
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s with a scale of %g, want one that is finite and not negative",
                                f->name, (double)m->scale);
    if (m->format != QUANT_NVFP4)
        return true;
    if (!quant_block_scale_bytes(&want, m) || block_scale_bytes != want)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%zu block scales, [%lld,%lld] as NVFP4%s needs %zu", block_scale_bytes,
                                (long long)m->n, (long long)m->k, m->is_swizzled ? " (swizzled)" : "", want);
    return true;
}

static const uint8_t *row_data(const struct quant_matrix *m, int64_t row)
{
    const struct quant_info *f = &formats[m->format];
    return (const uint8_t *)m->data + (size_t)row * (size_t)(m->k / f->values) * (size_t)f->bytes;
}

/* Block scales of NVFP4 on values of whole blocks; `low_first` exchanges neighbours, which share a scale. */
static void scale_nvfp4(float *to, const struct quant_matrix *m, int64_t row, int64_t first, int64_t blocks)
{
    for (int64_t block = first; block < first + blocks; block++, to += 16) {
        float scale = m->scale * quant_f32_of_e4m3(m->block_scales[quant_block_scale_at(m, row, block)]);
        for (int i = 0; i < 16; i += 2) {
            float high = to[i] * scale, low = to[i + 1] * scale;
            to[i] = m->low_first ? low : high;
            to[i + 1] = m->low_first ? high : low;
        }
    }
}

/* Blocks [first, first + blocks) of a row, every scale applied. */
static void decode_span(float *to, const struct quant_matrix *m, int64_t row, int64_t first, int64_t blocks)
{
    const struct quant_info *f = &formats[m->format];
    f->decode(to, row_data(m, row) + (size_t)first * (size_t)f->bytes, blocks);
    if (m->format == QUANT_NVFP4)
        scale_nvfp4(to, m, row, first, blocks);
    for (int64_t i = 0; m->format == QUANT_FP8_E4M3 && i < blocks; i++)
        to[i] *= m->scale;
}

void quant_rows_f32(float *to, const struct quant_matrix *m, int64_t first, int64_t count)
{
    assert(first >= 0 && count >= 0 && first + count <= m->n);
    for (int64_t row = first; row < first + count; row++, to += m->k)
        decode_span(to, m, row, 0, m->k / formats[m->format].values);
}

void quant_rows_bf16(uint16_t *to, const struct quant_matrix *m, int64_t first, int64_t count)
{
    assert(first >= 0 && count >= 0 && first + count <= m->n);
    float values[SPAN_VALUES];
    int64_t per_block = formats[m->format].values, in_row = m->k / per_block, at_once = SPAN_VALUES / per_block;
    for (int64_t row = first; row < first + count; row++)
        for (int64_t block = 0; block < in_row; block += at_once) {
            int64_t blocks = in_row - block < at_once ? in_row - block : at_once;
            decode_span(values, m, row, block, blocks);
            for (int64_t i = 0; i < blocks * per_block; i++)
                *to++ = tensor_bf16_of(values[i]);
        }
}

/* --- finite? ----------------------------------------------------------------------------------------------- */

static bool has_bad_f16(const uint8_t *p)
{
    return (read_u16(p) & 0x7c00) == 0x7c00;
}

static bool block_is_finite(enum quant_format format, const uint8_t *b)
{
    switch (format) {
    case QUANT_F32:
        return (read_u32(b) & 0x7f800000u) != 0x7f800000u;
    case QUANT_BF16:
        return (read_u16(b) & 0x7f80) != 0x7f80;
    case QUANT_FP8_E4M3:
        return (*b & 0x7f) != 0x7f;
    case QUANT_NVFP4:
        return true; /* its block scale is looked at by the caller */
    default:
        return !has_bad_f16(b + scales_at[format][0]) &&
               (scales_at[format][1] < 0 || !has_bad_f16(b + scales_at[format][1]));
    }
}

/* FP8 and NVFP4 overflow f32 only through the tensor's scale: 448 * 6 times it must stay finite. */
static bool scale_is_finite(const struct quant_matrix *m)
{
    return (m->format != QUANT_FP8_E4M3 && m->format != QUANT_NVFP4) || isfinite(m->scale * 448 * 6);
}

bool quant_is_finite(const struct quant_matrix *m, int64_t first, int64_t count)
{
    assert(first >= 0 && count >= 0 && first + count <= m->n);
    const struct quant_info *f = &formats[m->format];
    bool ok = scale_is_finite(m);
    for (int64_t row = first; ok && row < first + count; row++) {
        const uint8_t *data = row_data(m, row);
        for (int64_t block = 0; ok && block < m->k / f->values; block++, data += f->bytes) {
            ok = block_is_finite(m->format, data);
            if (m->format == QUANT_NVFP4)
                ok = (m->block_scales[quant_block_scale_at(m, row, block)] & 0x7f) != 0x7f;
        }
    }
    return ok;
}
