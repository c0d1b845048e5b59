/* dequant.c - quantised rows to f32 or bf16: one decoder per format. Compiled once per instruction set, like the ops.
 *
 * The decoders are definitions: short, a run of blocks at a time, with the operations in the order in which the reference
 * rounds them. Nothing is fused (CMakeLists.txt forbids contraction here), so that all instruction sets give the same
 * bits. Their loops are over 16 or 32 values, which is what a compiler makes wide. Blocks are read byte by byte: a mapped
 * file promises no alignment.
 *
 * To bf16, where codes are few, nothing is computed: quant_codes has said what each code becomes, and values are looked
 * up (AVX-512: 32 at a time, from registers). The bits are those of the decoders.
 *
 * K formats: 256 values in groups of 16 or 32 with a scale each. 6-bit scales are packed 8 + 8 into 12 bytes:
 *   byte 0..3   s0..s3 in the low 6 bits, top 2 bits: bits 4-5 of s4..s7
 *   byte 4..7   the same for the minima t
 *   byte 8..11  low nibble: bits 0-3 of s4..s7, high nibble: of t4..t7 */
#include "dequant.h"

#include "vec.h"

#define SPAN_VALUES 512 /* decoded at once on the way to bf16; whole blocks of every format */

static float read_f16(const uint8_t *p)
{
    return quant_f32_of_f16((uint16_t)(p[0] | p[1] << 8));
}

static uint32_t read_u32(const uint8_t *p)
{
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* --- blocks of one value ------------------------------------------------------------------------------- */

static void decode_f32(float *restrict to, const uint8_t *restrict b, int64_t blocks)
{
    for (int64_t i = 0; i < blocks; i++)
        to[i] = quant_f32_of_bits(read_u32(b + 4 * i));
}

static void decode_f16(float *restrict to, const uint8_t *restrict b, int64_t blocks)
{
    for (int64_t i = 0; i < blocks; i++)
        to[i] = read_f16(b + 2 * i);
}

static void decode_bf16(float *restrict to, const uint8_t *restrict b, int64_t blocks)
{
    for (int64_t i = 0; i < blocks; i++)
        to[i] = tensor_f32_of((uint16_t)(b[2 * i] | b[2 * i + 1] << 8));
}

static void decode_fp8(float *restrict to, const uint8_t *restrict b, int64_t blocks)
{
    for (int64_t i = 0; i < blocks; i++)
        to[i] = quant_f32_of_e4m3(b[i]);
}

/* --- blocks of 32: d [m] [fifth bits] nibbles; the low nibbles are values 0..15, the high ones 16..31 ----- */

static void decode_q8_0(float *restrict to, const uint8_t *restrict b, int64_t blocks)
{
    for (; blocks > 0; blocks--, to += 32, b += 34) {
        float d = read_f16(b);
        for (int i = 0; i < 32; i++)
            to[i] = d * (float)(int8_t)b[2 + i];
    }
}

static void decode_q4_0(float *restrict to, const uint8_t *restrict b, int64_t blocks)
{
    for (; blocks > 0; blocks--, to += 32, b += 18) {
        float d = read_f16(b);
        for (int i = 0; i < 16; i++) {
            to[i] = d * (float)((b[2 + i] & 15) - 8);
            to[16 + i] = d * (float)((b[2 + i] >> 4) - 8);
        }
    }
}

static void decode_q4_1(float *restrict to, const uint8_t *restrict b, int64_t blocks)
{
    for (; blocks > 0; blocks--, to += 32, b += 20) {
        float d = read_f16(b), m = read_f16(b + 2);
        for (int i = 0; i < 16; i++) {
            to[i] = d * (float)(b[4 + i] & 15) + m;
            to[16 + i] = d * (float)(b[4 + i] >> 4) + m;
        }
    }
}

static void decode_q5_0(float *restrict to, const uint8_t *restrict b, int64_t blocks)
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

static void decode_q5_1(float *restrict to, const uint8_t *restrict b, int64_t blocks)
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
static void decode_q2_k(float *restrict to, const uint8_t *restrict b, int64_t blocks)
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
static void decode_q3_k(float *restrict to, const uint8_t *restrict b, int64_t blocks)
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
static void decode_q4_k(float *restrict to, const uint8_t *restrict b, int64_t blocks)
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
static void decode_q5_k(float *restrict to, const uint8_t *restrict b, int64_t blocks)
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
static void decode_q6_k(float *restrict to, const uint8_t *restrict b, int64_t blocks)
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
static void decode_nvfp4(float *restrict to, const uint8_t *restrict b, int64_t blocks)
{
    for (int64_t i = 0; i < 8 * blocks; i++) {
        to[2 * i] = quant_f32_of_e2m1((uint8_t)(b[i] >> 4));
        to[2 * i + 1] = quant_f32_of_e2m1(b[i]);
    }
}

static void (*const decoders[QUANT_FORMAT_COUNT])(float *restrict to, const uint8_t *restrict b, int64_t blocks) = {
    [QUANT_F32] = decode_f32,   [QUANT_F16] = decode_f16,   [QUANT_BF16] = decode_bf16, [QUANT_Q8_0] = decode_q8_0,
    [QUANT_Q4_0] = decode_q4_0, [QUANT_Q4_1] = decode_q4_1, [QUANT_Q5_0] = decode_q5_0, [QUANT_Q5_1] = decode_q5_1,
    [QUANT_Q2_K] = decode_q2_k, [QUANT_Q3_K] = decode_q3_k, [QUANT_Q4_K] = decode_q4_k, [QUANT_Q5_K] = decode_q5_k,
    [QUANT_Q6_K] = decode_q6_k, [QUANT_FP8_E4M3] = decode_fp8, [QUANT_NVFP4] = decode_nvfp4,
};

/* --- spans of a row -------------------------------------------------------------------------------------- */

static const uint8_t *data_at(const struct quant_matrix *m, int64_t row, int64_t first)
{
    const struct quant_info *f = quant_info(m->format);
    return (const uint8_t *)m->data + (size_t)((row * m->k + first) / f->values) * (size_t)f->bytes;
}

/* Block scales of NVFP4 on values of whole blocks; `low_first` exchanges neighbours, which share a scale. */
static void scale_nvfp4(float *to, const struct quant_matrix *m, int64_t row, int64_t first, int64_t count)
{
    for (int64_t block = first / 16; block < (first + count) / 16; block++, to += 16) {
        float scale = m->scale * quant_f32_of_e4m3(m->block_scales[quant_block_scale_at(m, row, block)]);
        for (int i = 0; i < 16; i += 2) {
            float high = to[i] * scale, low = to[i + 1] * scale;
            to[i] = m->low_first ? low : high;
            to[i + 1] = m->low_first ? high : low;
        }
    }
}

static void span_to_f32(float *to, const struct quant_matrix *m, int64_t row, int64_t first, int64_t count)
{
    decoders[m->format](to, data_at(m, row, first), count / quant_info(m->format)->values);
    if (m->format == QUANT_NVFP4)
        scale_nvfp4(to, m, row, first, count);
    for (int64_t i = 0; m->format == QUANT_FP8_E4M3 && i < count; i++)
        to[i] *= m->scale;
}

/* Blocks of f16 numbers times small integers are 0 or at least 2^-24, so the quicker rounding is exact for them. */
static void span_to_bf16(uint16_t *to, const struct quant_matrix *m, int64_t row, int64_t first, int64_t count)
{
    float values[SPAN_VALUES];
    int64_t i = 0;
    span_to_f32(values, m, row, first, count);
    if (quant_info(m->format)->values >= 2 * VEC)
        for (; i < count; i += 2 * VEC)
            vec_narrow_pair(to + i, vec_load(values, TENSOR_F32, i, VEC), vec_load(values, TENSOR_F32, i + VEC, VEC));
    for (; i < count; i += VEC)
        vec_store(to, TENSOR_BF16, i, count - i, vec_load(values, TENSOR_F32, i, count - i));
}

/* --- looked up -------------------------------------------------------------------------------------------- */

static void look_up_fp8(uint16_t *to, const uint16_t *codes, const uint8_t *data, int64_t count)
{
    int64_t i = 0;
#ifdef __AVX512BW__
    __m512i table[4];
    for (int t = 0; t < 4; t++)
        table[t] = _mm512_loadu_si512(codes + 32 * t);
    for (; i + 32 <= count; i += 32) {
        __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(data + i)));
        __m512i small = _mm512_permutex2var_epi16(table[0], code, table[1]);
        __m512i large = _mm512_permutex2var_epi16(table[2], code, table[3]);
        __m512i sign = _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(0x80)), 8);
        __m512i value = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(code, _mm512_set1_epi16(0x40)), small, large);
        _mm512_storeu_si512(to + i, _mm512_xor_si512(value, sign));
    }
#endif
    for (; i < count; i++)
        to[i] = (uint16_t)(codes[data[i] & 0x7f] ^ (data[i] & 0x80) << 8);
}

static uint16_t look_up_e2m1(const uint16_t *magnitudes, int code)
{
    return (uint16_t)(magnitudes[code & 7] ^ (code & 8) << 12);
}

/* `data` is a block whose scale has this code. */
static void look_up_block(uint16_t *to, const uint16_t *codes, const uint8_t *data, uint8_t scale)
{
    const uint16_t *magnitudes = codes + 8 * scale;
    for (int i = 0; i < 8; i++) {
        to[2 * i] = look_up_e2m1(magnitudes, data[i] >> 4);
        to[2 * i + 1] = look_up_e2m1(magnitudes, data[i] & 15);
    }
}

#ifdef __AVX512BW__
/* 32 values, the blocks `block` and block + 1 of the four whose magnitudes are in `table`. */
VEC_INLINE void look_up_pair(uint16_t *to, __m512i table, const uint8_t *data, int block)
{
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)data));
    __m512i codes = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16)); /* high nibble first */
    __m512i first = _mm512_inserti64x4(_mm512_set1_epi16((short)(8 * block)), _mm256_set1_epi16((short)(8 * block + 8)), 1);
    __m512i at = _mm512_or_si512(_mm512_and_si512(codes, _mm512_set1_epi16(7)), first);
    __m512i sign = _mm512_and_si512(_mm512_slli_epi16(codes, 12), _mm512_set1_epi16((short)0x8000));
    _mm512_storeu_si512(to, _mm512_xor_si512(_mm512_permutexvar_epi16(at, table), sign));
}

/* Four blocks, whose scales lie side by side. */
VEC_INLINE void look_up_four(uint16_t *to, const uint16_t *codes, const uint8_t *data, const uint8_t *scales)
{
    __m512i table = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(codes + 8 * scales[0])));
    table = _mm512_inserti64x2(table, _mm_loadu_si128((const __m128i *)(codes + 8 * scales[1])), 1);
    table = _mm512_inserti64x2(table, _mm_loadu_si128((const __m128i *)(codes + 8 * scales[2])), 2);
    table = _mm512_inserti64x2(table, _mm_loadu_si128((const __m128i *)(codes + 8 * scales[3])), 3);
    look_up_pair(to, table, data, 0);
    look_up_pair(to + 32, table, data + 16, 2);
}
#endif

static void look_up_nvfp4(uint16_t *to, const struct quant_matrix *m, int64_t row, int64_t first, int64_t count)
{
    const uint8_t *data = data_at(m, row, first);
    int64_t block = first / 16, end = (first + count) / 16;
#ifdef __AVX512BW__
    for (; block % 4 == 0 && block + 4 <= end; block += 4, data += 32, to += 64)
        look_up_four(to, m->codes, data, m->block_scales + quant_block_scale_at(m, row, block));
#endif
    for (; block < end; block++, data += 8, to += 16)
        look_up_block(to, m->codes, data, m->block_scales[quant_block_scale_at(m, row, block)]);
}

/* --- rows ---------------------------------------------------------------------------------------------------- */

static void row_to_bf16(uint16_t *to, const struct quant_matrix *m, int64_t row, int64_t first, int64_t count)
{
    if (m->format == QUANT_BF16) {
        memcpy(to, data_at(m, row, first), (size_t)count * sizeof *to);
    } else if (m->codes && m->format == QUANT_FP8_E4M3) {
        look_up_fp8(to, m->codes, data_at(m, row, first), count);
    } else if (m->codes) {
        look_up_nvfp4(to, m, row, first, count);
    } else {
        for (int64_t i = 0; i < count; i += SPAN_VALUES)
            span_to_bf16(to + i, m, row, first + i, count - i < SPAN_VALUES ? count - i : SPAN_VALUES);
    }
}

void CPU_NAME(dequant_rows)(void *to, enum tensor_dtype dtype, int64_t stride, const struct quant_matrix *m, int64_t row,
                            int64_t rows, int64_t first, int64_t count)
{
    for (int64_t r = 0; r < rows; r++)
        if (dtype == TENSOR_F32)
            span_to_f32((float *)to + r * stride, m, row + r, first, count);
        else
            row_to_bf16((uint16_t *)to + r * stride, m, row + r, first, count);
}
