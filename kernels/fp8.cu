/* fp8.cu - fp8.c on the device: rows divided by a scale and rounded to e4m3, as codes for the units that multiply them, or as numbers
 * of the dtype they came in where there are no such units; and results multiplied by their row's own scale, a power of two, so
 * that they are not rounded again.
 *
 * Who does what: a row belongs to a warp, eight rows to a block; a lane takes 8 values at a time, lanes next to each other. Where
 *     a row has a scale of its own it is read twice, the second time from the cache.
 * Shared memory: none. Limit: bytes, 2 in and 1 out a value (numbers: 2 out; scaling: 2 in, 2 out). Expected, not measured: 80 to
 *     90 % of the bandwidth on sm_89 and 90.
 *
 * Divisions and sums are written as intrinsics so that no compiler takes them for others: the definition rounds each. */
#include "cuda_ops.h"
#include "gpu_rows.h"

#define WARP_ROWS 8
#define THREADS (32 * WARP_ROWS)
#define LARGEST 448.0f
#define PIECE 8

namespace {

/* The rule is round_e4m3 of fp8.c. */
__device__ __forceinline__ float round_e4m3(float x)
{
    float a = fabsf(x);
    a = a > LARGEST ? LARGEST : a; /* a NaN stays one */
    float below = __uint_as_float(__float_as_uint(a) & 0x7f800000u);
    float step = fmaxf(below, 0x1p-6f) * 0x1p20f;
    return copysignf(__fsub_rn(__fadd_rn(a, step), step), x);
}

/* x is an e4m3 number: its exponent and the 3 bits behind, or multiples of 2^-9. */
__device__ __forceinline__ uint32_t code_of(float x)
{
    uint32_t bits = __float_as_uint(x), sign = bits >> 24 & 0x80;
    if (x != x) /* NaN */
        return 0x7f;
    float a = fabsf(x);
    return sign | (a < 0x1p-6f ? (uint32_t)(a * 512.0f) : (bits >> 20 & 0x7ff) - (120 << 3));
}

template <int N> __device__ __forceinline__ void put(uint8_t *to, const float (&v)[N])
{
    if constexpr (N == PIECE) {
        uint2 codes = {0, 0};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            codes.x |= code_of(v[i]) << 8 * i;
            codes.y |= code_of(v[4 + i]) << 8 * i;
        }
        *reinterpret_cast<uint2 *>(to) = codes;
    } else {
        to[0] = (uint8_t)code_of(v[0]);
    }
}

template <int N, typename T> __device__ __forceinline__ void put(T *to, const float (&v)[N])
{
    gpu_store<N>(to, v);
}

/* quant_row_scale. */
__device__ __forceinline__ float row_scale(float largest)
{
    uint32_t exponent = (__float_as_uint(largest) + 0x1fffffu) >> 23;
    return __uint_as_float((exponent > 9 ? exponent - 8 : 1) << 23);
}

template <typename T, int N> __device__ __forceinline__ float largest_of(const T *from, int width, int lane)
{
    float largest = 0, v[N];
    for (int i = lane * N; i < width; i += 32 * N) {
        gpu_load<N>(v, from + i);
#pragma unroll
        for (int j = 0; j < N; j++)
            largest = fmaxf(largest, fabsf(v[j]));
    }
#pragma unroll
    for (int distance = 16; distance; distance >>= 1)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
    return largest;
}

/* q: rows of `depth`, zeros from `width` on. scales NULL: all rows are divided by `scale`; else each by its own, which goes there. */
template <typename T, typename Q, int N>
__global__ void __launch_bounds__(THREADS) fp8_rows_kernel(Q *q, float *scales, gpu_rows<const T> x, uint32_t rows, int width, int depth,
                                                           float scale)
{
    uint32_t r = blockIdx.x * WARP_ROWS + threadIdx.x / 32;
    int lane = (int)threadIdx.x % 32;
    if (r >= rows) /* a whole warp at once */
        return;
    const T *from = x.at(r);
    Q *to = q + (int64_t)r * depth;
    if (scales) {
        scale = row_scale(largest_of<T, N>(from, width, lane));
        if (lane == 0)
            scales[r] = scale;
    }
    float v[N];
    for (int i = lane * N; i < depth; i += 32 * N) {
        if (i < width) {
            gpu_load<N>(v, from + i);
        } else {
#pragma unroll
            for (int j = 0; j < N; j++)
                v[j] = 0;
        }
#pragma unroll
        for (int j = 0; j < N; j++)
            v[j] = round_e4m3(__fdiv_rn(v[j], scale));
        put(to + i, v);
    }
}

template <typename T, int N>
__global__ void __launch_bounds__(THREADS) fp8_scale_kernel(gpu_rows<T> out, const float *scales, uint32_t rows, int width)
{
    uint32_t r = blockIdx.x * WARP_ROWS + threadIdx.x / 32;
    if (r >= rows)
        return;
    T *row = out.at(r);
    float scale = scales[r], v[N];
    for (int i = (int)(threadIdx.x % 32) * N; i < width; i += 32 * N) {
        gpu_load<N>(v, row + i);
#pragma unroll
        for (int j = 0; j < N; j++)
            v[j] *= scale;
        gpu_store<N>(row + i, v);
    }
}

template <typename T, typename Q> void encode(struct kern *k, const struct tensor &q, float *scales, const struct tensor &x, float scale)
{
    uint32_t rows = (uint32_t)x.shape[0];
    int width = (int)x.shape[1], depth = (int)q.shape[1];
    bool pieces = gpu_is_vector(x) && width % PIECE == 0 && depth % PIECE == 0;
    GPU_COST((double)tensor_bytes(x) + (double)tensor_bytes(q), 0, false);
    if (pieces)
        GPU_LAUNCH((fp8_rows_kernel<T, Q, PIECE>), dim3(gpu_blocks(rows, WARP_ROWS)), dim3(THREADS), 0, cuda_stream(k), (Q *)q.data, scales,
                   gpu_rows_of<const T>(x), rows, width, depth, scale);
    else
        GPU_LAUNCH((fp8_rows_kernel<T, Q, 1>), dim3(gpu_blocks(rows, WARP_ROWS)), dim3(THREADS), 0, cuda_stream(k), (Q *)q.data, scales,
                   gpu_rows_of<const T>(x), rows, width, depth, scale);
    cuda_launched(k, "rows in FP8");
}

template <typename T> void scale_rows(struct kern *k, const struct tensor &out, const float *scales)
{
    uint32_t rows = (uint32_t)out.shape[0];
    int width = (int)out.shape[1];
    GPU_COST(2.0 * (double)tensor_bytes(out), 0, false);
    if (gpu_is_vector(out) && width % PIECE == 0)
        GPU_LAUNCH((fp8_scale_kernel<T, PIECE>), dim3(gpu_blocks(rows, WARP_ROWS)), dim3(THREADS), 0, cuda_stream(k), gpu_rows_of<T>(out),
                   scales, rows, width);
    else
        GPU_LAUNCH((fp8_scale_kernel<T, 1>), dim3(gpu_blocks(rows, WARP_ROWS)), dim3(THREADS), 0, cuda_stream(k), gpu_rows_of<T>(out), scales,
                   rows, width);
    cuda_launched(k, "scales of rows");
}

} // namespace

void fp8_rows_cuda(struct kern *k, struct tensor q, float *scales, struct tensor x, float scale)
{
    if (q.dtype == TENSOR_U8 && x.dtype == TENSOR_BF16)
        encode<bf16, uint8_t>(k, q, scales, x, scale);
    else if (x.dtype == TENSOR_BF16)
        encode<bf16, bf16>(k, q, scales, x, scale);
    else
        encode<float, float>(k, q, scales, x, scale);
}

void fp8_scale_cuda(struct kern *k, struct tensor out, const float *scales)
{
    if (out.dtype == TENSOR_BF16)
        scale_rows<bf16>(k, out, scales);
    else
        scale_rows<float>(k, out, scales);
}
