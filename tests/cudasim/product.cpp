/* product.cpp - see product.h. Blocks of 16 x 4 results stay in registers while k runs; both inputs are first
 * converted to f32 and packed so that the inner loop reads them in order. */
#include "product.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstring>
#include <vector>

namespace cudasim
{

size_t type_bytes(cudaDataType_t type)
{
    switch (type) {
    case CUDA_R_32F:
        return 4;
    case CUDA_R_16BF:
    case CUDA_R_16F:
        return 2;
    case CUDA_R_8F_E4M3:
    case CUDA_R_8F_E5M2:
        return 1;
    default:
        return 0;
    }
}

static float from_fp8(uint8_t bits, __nv_fp8_interpretation_t kind)
{
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(bits, kind)));
}

float type_load(const void *data, cudaDataType_t type, size_t i)
{
    switch (type) {
    case CUDA_R_32F:
        return static_cast<const float *>(data)[i];
    case CUDA_R_16BF: {
        uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t *>(data)[i]) << 16;
        float x;
        memcpy(&x, &bits, 4);
        return x;
    }
    case CUDA_R_16F:
        return __half2float(static_cast<const __half *>(data)[i]);
    default:
        return from_fp8(static_cast<const uint8_t *>(data)[i], type == CUDA_R_8F_E4M3 ? __NV_E4M3 : __NV_E5M2);
    }
}

void type_store(void *data, cudaDataType_t type, size_t i, float value)
{
    switch (type) {
    case CUDA_R_32F:
        static_cast<float *>(data)[i] = value;
        return;
    case CUDA_R_16BF:
        static_cast<__nv_bfloat16 *>(data)[i] = __float2bfloat16(value);
        return;
    case CUDA_R_16F:
        static_cast<__half *>(data)[i] = __float2half(value);
        return;
    default:
        static_cast<uint8_t *>(data)[i] =
            __nv_cvt_float_to_fp8(value, __NV_SATFINITE, type == CUDA_R_8F_E4M3 ? __NV_E4M3 : __NV_E5M2);
    }
}

/* To nearest, ties away from zero, as cvt.rna.tf32. */
static float to_tf32(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7f800000u) != 0x7f800000u)
        bits = (bits + 0x1000u) & ~0x1fffu;
    memcpy(&x, &bits, 4);
    return x;
}

/* 16 x 4 f32 are 8 registers of 8: they stay there while k runs. No fused multiply-add, so that every CPU gives the same
 * bits. */
enum { BLOCK_M = 16, BLOCK_N = 4 };

/* pack: panels of `width` rows of op(x), each stored [k][width], zero beyond the last row. */
static std::vector<float> pack(const Matrix &x, size_t rows, size_t k, size_t width, bool is_column, bool round_tf32)
{
    std::vector<float> out((rows + width - 1) / width * width * k);
    float fp8[256];
    bool is_fp8 = type_bytes(x.type) == 1;
    for (size_t i = 0; is_fp8 && i < 256; i++)
        fp8[i] = from_fp8(static_cast<uint8_t>(i), x.type == CUDA_R_8F_E4M3 ? __NV_E4M3 : __NV_E5M2);
    /* a: op(a)(row, i); b: op(b)(i, row). Either way row is the strided index when stored with k contiguous. */
    bool is_k_contiguous = x.is_transposed != is_column;
    for (size_t row = 0; row < rows; row++) {
        float *panel = &out[row / width * width * k + row % width];
        for (size_t i = 0; i < k; i++) {
            size_t at = is_k_contiguous ? row * x.stride + i : i * x.stride + row;
            float v = is_fp8 ? fp8[static_cast<const uint8_t *>(x.data)[at]] : type_load(x.data, x.type, at);
            panel[i * width] = round_tf32 ? to_tf32(v) : v;
        }
    }
    return out;
}

/* sum += a b for one block. Inlined into both functions below, so that the compiler vectorises it for each. */
static inline __attribute__((always_inline)) void add_block(float *sum, const float *a, const float *b, size_t k)
{
    float acc[BLOCK_N][BLOCK_M] = {};
    for (size_t i = 0; i < k; i++)
        for (int c = 0; c < BLOCK_N; c++) {
            float v = b[i * BLOCK_N + c];
            for (int r = 0; r < BLOCK_M; r++)
                acc[c][r] += a[i * BLOCK_M + r] * v;
        }
    for (int c = 0; c < BLOCK_N; c++)
        for (int r = 0; r < BLOCK_M; r++)
            sum[c * BLOCK_M + r] += acc[c][r];
}

static void add_block_plain(float *sum, const float *a, const float *b, size_t k)
{
    add_block(sum, a, b, k);
}

#ifdef __x86_64__
__attribute__((target("avx2"))) static void add_block_avx2(float *sum, const float *a, const float *b, size_t k)
{
    add_block(sum, a, b, k);
}
#endif

static auto choose_block()
{
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2"))
        return add_block_avx2;
#endif
    return add_block_plain;
}

void product(float *out, const Matrix &a, const Matrix &b, size_t m, size_t n, size_t k, int splits, bool round_tf32)
{
    std::vector<float> pa = pack(a, m, k, BLOCK_M, false, round_tf32), pb = pack(b, n, k, BLOCK_N, true, round_tf32);
    static const auto block = choose_block();
    size_t run = (k + static_cast<size_t>(splits) - 1) / static_cast<size_t>(splits);
    for (size_t c0 = 0; c0 < n; c0 += BLOCK_N)
        for (size_t r0 = 0; r0 < m; r0 += BLOCK_M) {
            float sum[BLOCK_N * BLOCK_M] = {};
            for (size_t i = 0; i < k; i += run)
                block(sum, &pa[r0 * k + i * BLOCK_M], &pb[c0 * k + i * BLOCK_N], run < k - i ? run : k - i);
            for (size_t c = c0; c < c0 + BLOCK_N && c < n; c++)
                for (size_t r = r0; r < r0 + BLOCK_M && r < m; r++)
                    out[c * m + r] = sum[(c - c0) * BLOCK_M + r - r0];
        }
}

} // namespace cudasim
