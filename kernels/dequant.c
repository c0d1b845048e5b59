/* dequant.c - quantised rows to f32 or bf16: one decoder per format. Compiled once per instruction set, like the ops.
 *
 * The decoders are definitions: short, a run of blocks at a time, with the operations in the order in which the reference
 * rounds them. Nothing is fused (CMakeLists.txt forbids contraction here), so that all instruction sets give the same
 * bits. Blocks are read byte by byte: a mapped file promises no alignment.
 *
 * To bf16, where codes are few, nothing is computed: quant_codes has said what each code becomes, and values are looked
 * up (AVX-512: 32 at a time, from registers). The bits are those of the decoders.
 *
 * K formats: 256 values in groups of 16 or 32 with a scale each. 6-bit scales are packed 8 + 8 into 12 bytes:
 *   byte 0..3   s0..s3 in the low 6 bits, top 2 bits: bits 4-5 of s4..s7
 *   byte 4..7   the same for the minima t
 *   byte 8..11  low nibble: bits 0-3 of s4..s7, high nibble: of t4..t7 */
#include "dequant.h"

#include <assert.h>

#include "vec.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

#define ROWS_AHEAD 6    /* fetched from memory before their turn */
#define SPAN_VALUES 512 /* decoded at once on the way to bf16; whole blocks of every format */

VEC_INLINE float read_f16(const uint8_t *p)
{
    uint16_t h = (uint16_t)(p[0] | p[1] << 8);
#ifdef __AVX512F__
    return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_castsi128_si256(_mm_cvtsi32_si128(h)))); /* the same, exact */
#else
    return quant_f32_of_f16(h);
#endif
}

static uint32_t read_u32(const uint8_t *p)
{
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* --- blocks of one value ------------------------------------------------------------------------------- */

static void decode_f32(void *values, enum tensor_dtype dtype, const uint8_t *restrict b, int64_t blocks)
{
    float *restrict to = values;
    assert(dtype == TENSOR_F32);
    (void)dtype;
    for (int64_t i = 0; i < blocks; i++)
        to[i] = quant_f32_of_bits(read_u32(b + 4 * i));
}

static void decode_f16(void *values, enum tensor_dtype dtype, const uint8_t *restrict b, int64_t blocks)
{
    float *restrict to = values;
    assert(dtype == TENSOR_F32);
    (void)dtype;
    for (int64_t i = 0; i < blocks; i++)
        to[i] = read_f16(b + 2 * i);
}

static void decode_bf16(void *values, enum tensor_dtype dtype, const uint8_t *restrict b, int64_t blocks)
{
    float *restrict to = values;
    assert(dtype == TENSOR_F32);
    (void)dtype;
    for (int64_t i = 0; i < blocks; i++)
        to[i] = tensor_f32_of((uint16_t)(b[2 * i] | b[2 * i + 1] << 8));
}

static void decode_fp8(void *values, enum tensor_dtype dtype, const uint8_t *restrict b, int64_t blocks)
{
    float *restrict to = values;
    assert(dtype == TENSOR_F32);
    (void)dtype;
    for (int64_t i = 0; i < blocks; i++)
        to[i] = quant_f32_of_e4m3(b[i]);
}

/* --- blocks of several values: codes of a byte each, then numbers ------------------------------------------- */

/* VEC codes as numbers. GCC 12 makes a detour of the conversion when left alone. */
VEC_INLINE vf numbers_of(const uint8_t *codes)
{
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes)));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)codes)));
#else
    return (vf){codes[0], codes[1], codes[2], codes[3]};
#endif
}

/* to[at..] = scale * (code - zero) - least, in f32 or rounded to bf16. code - zero is exact, and nothing changes where least
 * is 0. f16 numbers times small integers are 0 or at least 2^-24, so that the quicker rounding is exact. */
VEC_INLINE void spread(void *to, enum tensor_dtype dtype, int64_t at, const uint8_t *codes, int count, float zero, float scale,
                       float least)
{
    for (int i = 0; i < count; i += VEC) {
        vf q = numbers_of(codes + i) - vec_splat(zero);
        vf value = vec_splat(scale) * q - vec_splat(least);
        vh half = vec_narrow(value);
        if (dtype == TENSOR_F32)
            memcpy((float *)to + at + i, &value, sizeof value);
        else
            memcpy((uint16_t *)to + at + i, &half, sizeof half);
    }
}

/* Sixteen codes at a time everywhere: what is loaded in larger pieces than it was stored waits for the cache. */
typedef uint8_t sixteen __attribute__((vector_size(16)));
#define UNROLL _Pragma("GCC unroll 8") /* so that shifts are constants */

VEC_INLINE sixteen load(const uint8_t *bytes)
{
    sixteen v;
    return memcpy(&v, bytes, sizeof v), v;
}

VEC_INLINE void store(uint8_t *bytes, sixteen v)
{
    memcpy(bytes, &v, sizeof v);
}

/* `count` bytes are nibbles of twice as many codes: first the low ones. */
VEC_INLINE void nibbles(uint8_t *codes, const uint8_t *bytes, int count)
{
    for (int i = 0; i < count; i += 16) {
        store(codes + i, load(bytes + i) & 15);
        store(codes + count + i, load(bytes + i) >> 4);
    }
}

/* 16 more if bit i of 32 is set; `bytes` are 16, of which these bits are the first four. */
VEC_INLINE void fifth_bits(uint8_t *codes, const uint8_t *bytes)
{
    const sixteen bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    for (int i = 0; i < 2; i++) {
        const uint64_t eight = 0x0101010101010101, copies[2] = {bytes[2 * i] * eight, bytes[2 * i + 1] * eight};
        sixteen is_set = (sixteen)((load((const uint8_t *)copies) & bit) != (sixteen){0});
        store(codes + 16 * i, load(codes + 16 * i) | (is_set & 16));
    }
}

static void decode_q8_0(void *to, enum tensor_dtype dtype, const uint8_t *b, int64_t blocks)
{
    uint8_t codes[32];
    for (int64_t at = 0; at < 32 * blocks; at += 32, b += 34) {
        for (int i = 0; i < 32; i += 16)
            store(codes + i, load(b + 2 + i) ^ 0x80); /* signed bytes, 128 more */
        spread(to, dtype, at, codes, 32, 128, read_f16(b), 0);
    }
}

static void decode_q4_0(void *to, enum tensor_dtype dtype, const uint8_t *b, int64_t blocks)
{
    uint8_t codes[32];
    for (int64_t at = 0; at < 32 * blocks; at += 32, b += 18) {
        nibbles(codes, b + 2, 16);
        spread(to, dtype, at, codes, 32, 8, read_f16(b), 0);
    }
}

static void decode_q4_1(void *to, enum tensor_dtype dtype, const uint8_t *b, int64_t blocks)
{
    uint8_t codes[32];
    for (int64_t at = 0; at < 32 * blocks; at += 32, b += 20) {
        nibbles(codes, b + 4, 16);
        spread(to, dtype, at, codes, 32, 0, read_f16(b), -read_f16(b + 2));
    }
}

static void decode_q5_0(void *to, enum tensor_dtype dtype, const uint8_t *b, int64_t blocks)
{
    uint8_t codes[32];
    for (int64_t at = 0; at < 32 * blocks; at += 32, b += 22) {
        nibbles(codes, b + 6, 16);
        fifth_bits(codes, b + 2);
        spread(to, dtype, at, codes, 32, 16, read_f16(b), 0);
    }
}

static void decode_q5_1(void *to, enum tensor_dtype dtype, const uint8_t *b, int64_t blocks)
{
    uint8_t codes[32];
    for (int64_t at = 0; at < 32 * blocks; at += 32, b += 24) {
        nibbles(codes, b + 8, 16);
        fifth_bits(codes, b + 4);
        spread(to, dtype, at, codes, 32, 0, read_f16(b), -read_f16(b + 2));
    }
}

/* --- blocks of 256, in groups g of 16 or 32 values --------------------------------------------------------- */

/* Two-bit numbers of 128 codes: 32 bytes, four numbers a byte, 32 codes apart; they are the bits from `place` on. */
VEC_INLINE void two_bits(uint8_t *restrict codes, const uint8_t *restrict bytes, int place)
{
    UNROLL for (int part = 0; part < 4; part++)
        for (int i = 0; i < 32; i += 16) {
            uint8_t *at = codes + 32 * part + i;
            store(at, load(at) | (load(bytes + i) >> (uint8_t)(2 * part) & 3) << (uint8_t)place);
        }
}

/* scales[16] (s low, t high nibble), q[64], d, dmin */
static void decode_q2_k(void *to, enum tensor_dtype dtype, const uint8_t *b, int64_t blocks)
{
    for (int64_t at = 0; at < 256 * blocks; b += 84) {
        uint8_t codes[256] = {0};
        float d = read_f16(b + 80), dmin = read_f16(b + 82);
        two_bits(codes, b + 16, 0);
        two_bits(codes + 128, b + 48, 0);
        for (int g = 0; g < 16; g++, at += 16)
            spread(to, dtype, at, codes + 16 * g, 16, 0, d * (float)(b[g] & 15), dmin * (float)(b[g] >> 4));
    }
}

/* high[32] (bit v / 32 of byte v % 32 for value v), q[64], scales[12], d. A high bit that is off takes 4 away. */
static void decode_q3_k(void *to, enum tensor_dtype dtype, const uint8_t *b, int64_t blocks)
{
    for (int64_t at = 0; at < 256 * blocks; b += 110) {
        uint8_t codes[256];
        const uint8_t *s = b + 96;
        float d = read_f16(b + 108);
        UNROLL for (int part = 0; part < 8; part++)
            for (int i = 0; i < 32; i += 16)
                store(codes + 32 * part + i, (load(b + i) >> (uint8_t)part & 1) << 2);
        two_bits(codes, b + 32, 0);
        two_bits(codes + 128, b + 64, 0);
        for (int g = 0; g < 16; g++, at += 16) {
            int low = g < 8 ? s[g] & 15 : s[g - 8] >> 4, high = s[8 + g % 4] >> (g / 4 * 2) & 3;
            spread(to, dtype, at, codes + 16 * g, 16, 4, d * (float)((low | high << 4) - 32), 0);
        }
    }
}

/* Scales and minima of the 8 groups in the 12 bytes drawn above, times those of the block, which stand before them. */
struct groups {
    float scale[8], least[8];
};

VEC_INLINE struct groups groups_of(const uint8_t *b)
{
    const uint8_t *p = b + 4;
    const float d = read_f16(b), dmin = read_f16(b + 2);
    struct groups ret;
    for (int g = 0; g < 4; g++) {
        ret.scale[g] = d * (float)(p[g] & 63);
        ret.least[g] = dmin * (float)(p[g + 4] & 63);
        ret.scale[4 + g] = d * (float)((p[g + 8] & 15) | (p[g] >> 6) << 4);
        ret.least[4 + g] = dmin * (float)(p[g + 8] >> 4 | (p[g + 4] >> 6) << 4);
    }
    return ret;
}

/* d, dmin, scales[12], q[128]: two groups share 32 bytes, low nibbles first */
static void decode_q4_k(void *to, enum tensor_dtype dtype, const uint8_t *b, int64_t blocks)
{
    uint8_t codes[64];
    for (int64_t at = 0; at < 256 * blocks; b += 144) {
        struct groups groups = groups_of(b);
        for (int g = 0; g < 8; g += 2, at += 64) {
            nibbles(codes, b + 16 + g * 16, 32);
            spread(to, dtype, at, codes, 32, 0, groups.scale[g], groups.least[g]);
            spread(to, dtype, at + 32, codes + 32, 32, 0, groups.scale[g + 1], groups.least[g + 1]);
        }
    }
}

/* d, dmin, scales[12], fifth[32] (bit g of byte i), q[128] */
static void decode_q5_k(void *to, enum tensor_dtype dtype, const uint8_t *b, int64_t blocks)
{
    uint8_t codes[64];
    for (int64_t at = 0; at < 256 * blocks; b += 176) {
        struct groups groups = groups_of(b);
        UNROLL for (int g = 0; g < 8; g += 2, at += 64) {
            nibbles(codes, b + 48 + g * 16, 32);
            for (int i = 0; i < 64; i += 16)
                store(codes + i, load(codes + i) | (load(b + 16 + i % 32) >> (uint8_t)(g + i / 32) & 1) << 4);
            spread(to, dtype, at, codes, 32, 0, groups.scale[g], groups.least[g]);
            spread(to, dtype, at + 32, codes + 32, 32, 0, groups.scale[g + 1], groups.least[g + 1]);
        }
    }
}

/* low[128] (halves of 128 values share 64 bytes of nibbles), high[64], scales[16] (signed), d */
static void decode_q6_k(void *to, enum tensor_dtype dtype, const uint8_t *b, int64_t blocks)
{
    uint8_t codes[128];
    for (int64_t at = 0; at < 256 * blocks; b += 210) {
        float d = read_f16(b + 208);
        for (int half = 0; half < 2; half++) {
            nibbles(codes, b + 64 * half, 64);
            two_bits(codes, b + 128 + 32 * half, 4);
            for (int g = 0; g < 8; g++, at += 16)
                spread(to, dtype, at, codes + 16 * g, 16, 32, d * (float)(int8_t)b[192 + 8 * half + g], 0);
        }
    }
}

/* High nibble first. */
static void decode_nvfp4(void *values, enum tensor_dtype dtype, const uint8_t *restrict b, int64_t blocks)
{
    float *restrict to = values;
    assert(dtype == TENSOR_F32);
    (void)dtype;
    for (int64_t i = 0; i < 8 * blocks; i++) {
        to[2 * i] = quant_f32_of_e2m1((uint8_t)(b[i] >> 4));
        to[2 * i + 1] = quant_f32_of_e2m1(b[i]);
    }
}

/* To bf16 only formats of several values: the others have a scale outside their blocks, or need the exact rounding. */
static void (*const decoders[QUANT_FORMAT_COUNT])(void *to, enum tensor_dtype dtype, const uint8_t *b, int64_t blocks) = {
    [QUANT_F32] = decode_f32,   [QUANT_F16] = decode_f16,   [QUANT_BF16] = decode_bf16, [QUANT_Q8_0] = decode_q8_0,
    [QUANT_Q4_0] = decode_q4_0, [QUANT_Q4_1] = decode_q4_1, [QUANT_Q5_0] = decode_q5_0, [QUANT_Q5_1] = decode_q5_1,
    [QUANT_Q2_K] = decode_q2_k, [QUANT_Q3_K] = decode_q3_k, [QUANT_Q4_K] = decode_q4_k, [QUANT_Q5_K] = decode_q5_k,
    [QUANT_Q6_K] = decode_q6_k, [QUANT_FP8_E4M3] = decode_fp8, [QUANT_NVFP4] = decode_nvfp4,
};

/* --- spans of a row -------------------------------------------------------------------------------------- */

static const uint8_t *data_at(const struct quant_matrix *m, int64_t row, int64_t first)
{
    const struct quant_traits *f = quant_info(m->format);
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
    decoders[m->format](to, TENSOR_F32, data_at(m, row, first), count / quant_info(m->format)->values);
    if (m->format == QUANT_NVFP4)
        scale_nvfp4(to, m, row, first, count);
    for (int64_t i = 0; m->format == QUANT_FP8_E4M3 && i < count; i++)
        to[i] *= m->scale;
}

static void span_to_bf16(uint16_t *to, const struct quant_matrix *m, int64_t row, int64_t first, int64_t count)
{
    float values[SPAN_VALUES];
    span_to_f32(values, m, row, first, count);
    for (int64_t i = 0; i < count; i += VEC)
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
    } else if (quant_info(m->format)->values >= 32) {
        decoders[m->format](to, TENSOR_BF16, data_at(m, row, first), count / quant_info(m->format)->values);
    } else {
        for (int64_t i = 0; i < count; i += SPAN_VALUES)
            span_to_bf16(to + i, m, row, first + i, count - i < SPAN_VALUES ? count - i : SPAN_VALUES);
    }
}

/* Pieces of rows are too short for the processor to guess what comes next from memory. */
static void fetch(const struct quant_matrix *m, int64_t row, int64_t first, int64_t count)
{
    if (row >= m->n)
        return;
    const uint8_t *data = data_at(m, row, first), *end = data_at(m, row, first + count);
    for (; data < end; data += 64)
        __builtin_prefetch(data);
}

void CPU_NAME(dequant_rows)(void *to, enum tensor_dtype dtype, int64_t stride, const struct quant_matrix *m, int64_t row,
                            int64_t rows, int64_t first, int64_t count)
{
    for (int64_t r = 0; r < rows; r++) {
        fetch(m, row + r + ROWS_AHEAD, first, count);
        if (dtype == TENSOR_F32)
            span_to_f32((float *)to + r * stride, m, row + r, first, count);
        else
            row_to_bf16((uint16_t *)to + r * stride, m, row + r, first, count);
    }
}
