/* sim_rms_norm.cu - one block of 256 threads for a row; 16 bytes a load; warps add by shuffles, then the first warp
 * adds the warps' sums, which meet in shared memory. */
#include "gpu.h"

#include "sim_kernels.h"

static __device__ __forceinline__ float warp_sum(float v)
{
#pragma unroll
    for (int distance = 16; distance; distance >>= 1)
        v += __shfl_xor_sync(0xffffffffu, v, distance);
    return v;
}

static __global__ void __launch_bounds__(256)
    rms_norm_kernel(const __nv_bfloat16 *__restrict__ x, const float *__restrict__ w, __nv_bfloat16 *__restrict__ y,
                    int columns, float eps)
{
    __shared__ float sums[8];
    __shared__ float scale;
    const uint4 *row = reinterpret_cast<const uint4 *>(x + static_cast<size_t>(blockIdx.x) * columns);
    uint4 *out = reinterpret_cast<uint4 *>(y + static_cast<size_t>(blockIdx.x) * columns);
    int vectors = columns / 8, thread = threadIdx.x;

    float sum = 0;
    for (int i = thread; i < vectors; i += blockDim.x) {
        uint4 v = row[i];
        const __nv_bfloat162 *pair = reinterpret_cast<const __nv_bfloat162 *>(&v);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 f = __bfloat1622float2(pair[j]);
            sum += f.x * f.x + f.y * f.y;
        }
    }
    sum = warp_sum(sum);
    if (thread % 32 == 0)
        sums[thread / 32] = sum;
    __syncthreads();
    if (thread < 32) {
        float total = warp_sum(thread < 8 ? sums[thread] : 0);
        if (thread == 0)
            scale = rsqrtf(total / static_cast<float>(columns) + eps);
    }
    __syncthreads();

    for (int i = thread; i < vectors; i += blockDim.x) {
        uint4 v = row[i];
        __nv_bfloat162 *pair = reinterpret_cast<__nv_bfloat162 *>(&v);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 f = __bfloat1622float2(pair[j]);
            pair[j] = __floats2bfloat162_rn(f.x * scale * w[8 * i + 2 * j], f.y * scale * w[8 * i + 2 * j + 1]);
        }
        out[i] = v;
    }
}

cudaError_t sim_rms_norm(const uint16_t *x, const float *w, uint16_t *y, int rows, int columns, float eps,
                         cudaStream_t stream)
{
    GPU_COST(4.0 * rows * columns + 4.0 * columns, 4.0 * rows * columns, false);
    GPU_LAUNCH(rms_norm_kernel, rows, 256, 0, stream, reinterpret_cast<const __nv_bfloat16 *>(x), w,
               reinterpret_cast<__nv_bfloat16 *>(y), columns, eps);
    return cudaGetLastError();
}
