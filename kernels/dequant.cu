/* dequant.cu - weights that the device keeps as their files have them, decoded before a product: dequant.c to the bit.
 *
 * The whole matrix goes into the arena, where the product reads it and the next product's goes to the same place. So the
 * memory is that of the largest matrix in use, known to the plan; and the product is the very one of a decoded weight:
 * same shape, same algorithm, same bits. Decoding inside the product would save the way through memory, and cost the
 * library's product for one of our own (gpu_gemm.h), which is the dearer of the two above some 1500 rows.
 *
 * Who does what: a thread decodes 8 values of one row that follow each other, so they are of one group of every format and,
 * in bf16, one store. Its neighbours read the same scales, which come from the cache.
 * Shared memory: none. Limit: bytes, those of the file and 2 (f32: 4) a value. Expected, not measured: 85 % of the bandwidth.
 *
 * Products and sums are written as intrinsics so that no compiler fuses them: the definition rounds each. */
#include "cuda_weight.h"
#include "gpu_rows.h"

#define THREADS 256
#define PIECE 8

namespace {

/* A run, and the width of its rows as they are and as they become. */
struct source {
    const uint8_t *data, *scales;
    enum quant_format format;
    bool low_first;
    float scale;
    int k, depth;
    uint32_t row_bytes;
};

/* --- numbers ------------------------------------------------------------------------------------------------ */

__device__ __forceinline__ uint32_t u16_at(const uint8_t *p) /* every block has an even number of bytes */
{
    return *reinterpret_cast<const uint16_t *>(p);
}

__device__ __forceinline__ float f16_at(const uint8_t *p)
{
    return __half2float(__ushort_as_half((unsigned short)u16_at(p)));
}

__device__ __forceinline__ float e4m3(uint32_t code)
{
    uint32_t magnitude = code & 0x7f;
    float f = magnitude < 8 ? (float)magnitude * 0x1p-9f : __uint_as_float((magnitude << 20) + (120u << 23));
    return code & 0x80 ? -f : f;
}

__device__ __forceinline__ float e2m1(uint32_t code) /* 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives */
{
    uint32_t exponent = code >> 1 & 3, half = code & 1;
    float f = exponent ? __uint_as_float((exponent + 126) << 23 | half << 22) : 0.5f * (float)half;
    return code & 8 ? -f : f;
}

/* Eight bytes, from an even address on. */
struct eight {
    uint32_t word[2];
    __device__ __forceinline__ explicit eight(const uint8_t *p)
        : word{u16_at(p) | u16_at(p + 2) << 16, u16_at(p + 4) | u16_at(p + 6) << 16}
    {
    }
    __device__ __forceinline__ uint32_t operator[](int i) const { return word[i / 4] >> i % 4 * 8 & 0xff; }
};

/* scale * code - least, rounded twice. */
__device__ __forceinline__ float value_of(float scale, int code, float least)
{
    return __fsub_rn(__fmul_rn(scale, (float)code), least);
}

/* --- blocks of 32: v = values [at, at + 8) ------------------------------------------------------------------- */

__device__ __forceinline__ void q8_0(float (&v)[PIECE], const uint8_t *b, int at)
{
    eight q(b + 2 + at);
    float d = f16_at(b);
#pragma unroll
    for (int i = 0; i < PIECE; i++)
        v[i] = value_of(d, (int8_t)q[i], 0);
}

/* Nibbles, low ones first, with a fifth bit or none, of which `zero` is 0: d (q - zero) + m. */
__device__ __forceinline__ void nibbles(float (&v)[PIECE], const uint8_t *b, int at, const uint8_t *data, uint32_t fifth, int zero,
                                        float least)
{
    eight q(data + at % 16);
    float d = f16_at(b);
#pragma unroll
    for (int i = 0; i < PIECE; i++)
        v[i] = value_of(d, (int)((q[i] >> at / 16 * 4 & 15) | (fifth >> (at + i) & 1) << 4) - zero, least);
}

__device__ __forceinline__ uint32_t bits_at(const uint8_t *p)
{
    return u16_at(p) | u16_at(p + 2) << 16;
}

/* --- blocks of 256, as dequant.c describes them -------------------------------------------------------------- */

/* Two bits of value `at` and its neighbours: 128 values share 32 bytes. */
__device__ __forceinline__ eight pairs_at(const uint8_t *p, int at)
{
    return eight(p + at / 128 * 32 + at % 32);
}

__device__ __forceinline__ void q2_k(float (&v)[PIECE], const uint8_t *b, int at)
{
    eight q = pairs_at(b + 16, at);
    int s = b[at / 16];
    float scale = __fmul_rn(f16_at(b + 80), (float)(s & 15)), least = __fmul_rn(f16_at(b + 82), (float)(s >> 4));
#pragma unroll
    for (int i = 0; i < PIECE; i++)
        v[i] = value_of(scale, (int)(q[i] >> at % 128 / 32 * 2 & 3), least);
}

__device__ __forceinline__ void q3_k(float (&v)[PIECE], const uint8_t *b, int at)
{
    eight high(b + at % 32), q = pairs_at(b + 32, at);
    const uint8_t *s = b + 96;
    int g = at / 16, low = g < 8 ? s[g] & 15 : s[g - 8] >> 4, top = s[8 + g % 4] >> g / 4 * 2 & 3;
    float scale = __fmul_rn(f16_at(b + 108), (float)((low | top << 4) - 32));
#pragma unroll
    for (int i = 0; i < PIECE; i++)
        v[i] = value_of(scale, (int)((q[i] >> at % 128 / 32 * 2 & 3) | (high[i] >> at / 32 & 1) << 2) - 4, 0);
}

/* Q4_K, or Q5_K: then the fifth bits, 32 bytes, are in front of the nibbles. */
template <bool has_fifth> __device__ __forceinline__ void q45_k(float (&v)[PIECE], const uint8_t *b, int at)
{
    const uint8_t *p = b + 4, *fifth = b + 16, *data = has_fifth ? fifth + 32 : fifth;
    int g = at / 32, j = g % 4;
    int s = g < 4 ? p[j] & 63 : (p[j + 8] & 15) | (p[j] >> 6) << 4, t = g < 4 ? p[j + 4] & 63 : p[j + 8] >> 4 | (p[j + 4] >> 6) << 4;
    float scale = __fmul_rn(f16_at(b), (float)s), least = __fmul_rn(f16_at(b + 2), (float)t);
    eight q(data + g / 2 * 32 + at % 32), top(fifth + at % 32);
#pragma unroll
    for (int i = 0; i < PIECE; i++)
        v[i] = value_of(scale, (int)((q[i] >> g % 2 * 4 & 15) | (has_fifth ? (top[i] >> g & 1) << 4 : 0)), least);
}

__device__ __forceinline__ void q6_k(float (&v)[PIECE], const uint8_t *b, int at)
{
    int half = at / 128, in = at % 128;
    eight q(b + 64 * half + in % 64), top = pairs_at(b + 128, at);
    float scale = __fmul_rn(f16_at(b + 208), (float)(int8_t)b[192 + at / 16]);
#pragma unroll
    for (int i = 0; i < PIECE; i++)
        v[i] = value_of(scale, (int)((q[i] >> in / 64 * 4 & 15) | (top[i] >> in / 32 * 2 & 3) << 4) - 32, 0);
}

/* --- the rest -------------------------------------------------------------------------------------------------- */

/* v = values [first, first + 8) of a row; b: their block of 16. */
__device__ __forceinline__ void nvfp4(float (&v)[PIECE], const uint8_t *b, int first, const struct source &s, uint32_t row)
{
    float scale = __fmul_rn(s.scale, e4m3(s.scales[(int64_t)row * (s.k / 16) + first / 16]));
    uint32_t bytes = *reinterpret_cast<const uint32_t *>(b + first % 16 / 2);
#pragma unroll
    for (int i = 0; i < PIECE; i++) {
        bool is_low = (i % 2 == 0) == s.low_first;
        v[i] = __fmul_rn(e2m1(bytes >> (i / 2 * 8 + (is_low ? 0 : 4)) & 15), scale);
    }
}

/* One value of a format without blocks. */
__device__ __forceinline__ float single(const uint8_t *row, int at, const struct source &s)
{
    switch (s.format) {
    case QUANT_F32:
        return reinterpret_cast<const float *>(row)[at];
    case QUANT_F16:
        return f16_at(row + 2 * at);
    case QUANT_BF16:
        return __uint_as_float(u16_at(row + 2 * at) << 16);
    default:
        return __fmul_rn(e4m3(row[at]), s.scale);
    }
}

/* FP8, whose rows and pieces begin on 8 bytes. */
__device__ __forceinline__ void fp8(float (&v)[PIECE], const uint8_t *b, float scale)
{
    uint2 bytes = *reinterpret_cast<const uint2 *>(b);
#pragma unroll
    for (int i = 0; i < PIECE; i++)
        v[i] = __fmul_rn(e4m3((i < 4 ? bytes.x : bytes.y) >> i % 4 * 8 & 0xff), scale);
}

__device__ __forceinline__ void singles(float (&v)[PIECE], const uint8_t *row, int first, const struct source &s)
{
    if (s.format == QUANT_FP8_E4M3 && s.k % PIECE == 0) {
        fp8(v, row + first, s.scale);
        return;
    }
#pragma unroll
    for (int i = 0; i < PIECE; i++)
        v[i] = first + i < s.k ? single(row, first + i, s) : 0;
}

__device__ __forceinline__ void decode(float (&v)[PIECE], const struct source &s, uint32_t row, int first)
{
    const uint8_t *data = s.data + (int64_t)row * s.row_bytes;
    const int at32 = first % 32, at256 = first % 256, block32 = first / 32, block256 = first / 256;
    const uint8_t *b;
    switch (s.format) {
    case QUANT_Q8_0:
        q8_0(v, data + block32 * 34, at32);
        break;
    case QUANT_Q4_0:
        b = data + block32 * 18;
        nibbles(v, b, at32, b + 2, 0, 8, 0);
        break;
    case QUANT_Q4_1:
        b = data + block32 * 20;
        nibbles(v, b, at32, b + 4, 0, 0, -f16_at(b + 2));
        break;
    case QUANT_Q5_0:
        b = data + block32 * 22;
        nibbles(v, b, at32, b + 6, bits_at(b + 2), 16, 0);
        break;
    case QUANT_Q5_1:
        b = data + block32 * 24;
        nibbles(v, b, at32, b + 8, bits_at(b + 4), 0, -f16_at(b + 2));
        break;
    case QUANT_Q2_K:
        q2_k(v, data + block256 * 84, at256);
        break;
    case QUANT_Q3_K:
        q3_k(v, data + block256 * 110, at256);
        break;
    case QUANT_Q4_K:
        q45_k<false>(v, data + block256 * 144, at256);
        break;
    case QUANT_Q5_K:
        q45_k<true>(v, data + block256 * 176, at256);
        break;
    case QUANT_Q6_K:
        q6_k(v, data + block256 * 210, at256);
        break;
    case QUANT_NVFP4:
        nvfp4(v, data + first / 16 * 8, first, s, row);
        break;
    default:
        singles(v, data, first, s);
    }
}

/* to: rows of depth values; what is behind k is zeros. */
template <typename T> __global__ void __launch_bounds__(THREADS) dequant_kernel(T *to, struct source s, uint32_t pieces)
{
    uint32_t piece = blockIdx.x * THREADS + threadIdx.x, per_row = (s.depth + PIECE - 1) / PIECE;
    if (piece >= pieces)
        return;
    uint32_t row = piece / per_row;
    int first = (int)(piece % per_row) * PIECE;
    float v[PIECE];
    decode(v, s, row, first);
    to += (int64_t)row * s.depth + first;
    if (s.depth % PIECE == 0) {
        gpu_store<PIECE>(to, v);
        return;
    }
    for (int i = 0; i < PIECE && first + i < s.depth; i++)
        to[i] = gpu_of<T>(v[i]);
}

template <typename T> void decode_run(struct kern *k, T *to, const struct source &s, int64_t rows)
{
    int64_t pieces = rows * ((s.depth + PIECE - 1) / PIECE);
    assert(pieces < UINT32_MAX - THREADS);
    GPU_COST((double)rows * (s.row_bytes + (s.scales ? s.k / 16 : 0) + s.depth * sizeof(T)), 0, false);
    GPU_LAUNCH((dequant_kernel<T>), dim3(gpu_blocks(pieces, THREADS)), dim3(THREADS), 0, cuda_stream(k), to, s, (uint32_t)pieces);
    cuda_launched(k, "decoding a weight");
}

/* to: rows of the weight's depth in its dtype. */
void decode_into(struct kern *k, void *to, const struct kern_weight *w, const struct cuda_weight_run *r, float scale)
{
    const uint8_t *memory = (const uint8_t *)w->data;
    struct source s = {memory + r->place.data, r->format == QUANT_NVFP4 ? memory + r->place.scales : NULL, r->format, r->low_first,
                       scale, (int)w->k, (int)cuda_weight_depth(w), (uint32_t)r->row_bytes};
    if (r->rows && w->dtype == TENSOR_F32)
        decode_run(k, (float *)to, s, r->rows);
    else if (r->rows)
        decode_run(k, (bf16 *)to, s, r->rows);
}

} // namespace

struct kern_weight dequant_run_cuda(struct kern *k, const struct kern_weight *w, const struct cuda_weight_run *r)
{
    int64_t shape[2] = {r->rows, cuda_weight_depth(w)};
    struct tensor values = kern_temp(k, w->dtype, 2, shape);
    struct kern_weight decoded = *w;
    decoded.n = r->rows;
    decoded.data = values.data;
    if (!k->failed)
        decode_into(k, values.data, w, r, r->has_fp8_products ? 1 : r->scale);
    return decoded;
}

struct kern_weight dequant_weight_cuda(struct kern *k, const struct kern_weight *w)
{
    const struct cuda_weight *kept = cuda_weight_of(w);
    struct kern_weight decoded = *w;
    if (kept->run_count == 0)
        return decoded;
    int64_t shape[2] = {w->n, cuda_weight_depth(w)}, row = 0;
    struct tensor values = kern_temp(k, w->dtype, 2, shape);
    assert(tensor_bytes(values) == w->decoded_bytes);
    decoded.data = values.data;
    for (int i = 0; i < kept->run_count && !k->failed; row += kept->runs[i++].rows) {
        char *to = (char *)values.data + row * shape[1] * (int64_t)tensor_dtype_bytes(w->dtype);
        decode_into(k, to, w, &kept->runs[i], kept->runs[i].scale);
    }
    return decoded;
}
