/* sim_probe.cu - small kernels the tests ask questions with; sim_kernels.h says what each does. */
#include "gpu.h"

#include "sim_kernels.h"

namespace
{

__global__ void add_kernel(float *x, float value, int count)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count)
        x[i] += value;
}

__global__ void gather_kernel(float *y, const float *x, int stride, int count)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count)
        y[i] = x[static_cast<size_t>(i) * stride];
}

__global__ void transpose_kernel(float *y, const float *x, int padding)
{
    GPU_SHARED(float, tile);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = 32 + padding;
    for (int row = warp; row < 32; row += 4)
        tile[row * width + lane] = x[row * 32 + lane];
    __syncthreads();
    for (int row = warp; row < 32; row += 4)
        y[row * 32 + lane] = tile[lane * width + row];
}

__global__ void mma_kernel(float *d, const uint32_t *a, const uint32_t *b, int kind)
{
    int lane = threadIdx.x;
    uint32_t ra[4];
    float rd[4];
    for (int i = 0; i < 4; i++) {
        ra[i] = a[lane * 4 + i];
        rd[i] = d[lane * 4 + i];
    }
    if (kind == 0)
        gpu_mma_bf16_m16n8k16(rd, ra, b[lane * 2], b[lane * 2 + 1]);
    else if (kind == 1)
        gpu_mma_f16_m16n8k16(rd, ra, b[lane * 2], b[lane * 2 + 1]);
    else
        gpu_mma_e4m3_m16n8k32(rd, ra, b[lane * 2], b[lane * 2 + 1]);
    for (int i = 0; i < 4; i++)
        d[lane * 4 + i] = rd[i];
}

template <bool trans> __global__ void ldmatrix_kernel(uint32_t *out, const uint16_t *rows, int tiles)
{
    __shared__ __align__(16) uint16_t shared[32][8];
    int lane = threadIdx.x;
    for (int i = 0; i < 8; i++)
        shared[lane][i] = rows[lane * 8 + i];
    __syncwarp();
    uint32_t one[1], two[2], four[4];
    if (tiles == 1) {
        gpu_ldmatrix_x1<trans>(one, shared[lane]);
        out[lane] = one[0];
    } else if (tiles == 2) {
        gpu_ldmatrix_x2<trans>(two, shared[lane]);
        for (int i = 0; i < 2; i++)
            out[lane * 2 + i] = two[i];
    } else {
        gpu_ldmatrix_x4<trans>(four, shared[lane]);
        for (int i = 0; i < 4; i++)
            out[lane * 4 + i] = four[i];
    }
}

__global__ void collect_kernel(int *out, int kind, int argument)
{
    int lane = threadIdx.x, value = 100 + lane, result = 0;
    switch (kind) {
    case SIM_SHFL:
        result = __shfl_sync(0xffffffffu, value, argument);
        break;
    case SIM_SHFL_UP:
        result = __shfl_up_sync(0xffffffffu, value, argument);
        break;
    case SIM_SHFL_DOWN:
        result = __shfl_down_sync(0xffffffffu, value, argument);
        break;
    case SIM_SHFL_XOR:
        result = __shfl_xor_sync(0xffffffffu, value, argument);
        break;
    case SIM_BALLOT:
        result = static_cast<int>(__ballot_sync(0xffffffffu, lane < argument));
        break;
    case SIM_ANY:
        result = __any_sync(0xffffffffu, lane == argument);
        break;
    case SIM_ALL:
        result = __all_sync(0xffffffffu, lane < argument);
        break;
    case SIM_WIDTH_8:
        result = __shfl_sync(0xffffffffu, value, argument, 8);
        break;
    }
    out[lane] = result;
}

__global__ void vote_block_kernel(int *out, int limit)
{
    int mine = static_cast<int>(threadIdx.x) < limit;
    int any = __syncthreads_or(mine);
    int all = __syncthreads_and(mine);
    int count = __syncthreads_count(mine);
    if (threadIdx.x == 0) {
        out[0] = any != 0;
        out[1] = all != 0;
        out[2] = count;
    }
}

__global__ void count_threads_kernel(int *x)
{
    atomicAdd(x, 1);
}

__global__ void nothing_kernel(int)
{
}

__global__ void barriers_kernel(float *x, int count)
{
    float sum = 0;
    for (int i = 0; i < count; i++) {
        __syncthreads();
        sum += static_cast<float>(i);
    }
    x[threadIdx.x] = sum;
}

__global__ void shuffles_kernel(float *x, int count)
{
    float v = static_cast<float>(threadIdx.x);
    for (int i = 0; i < count; i++)
        v += __shfl_xor_sync(0xffffffffu, v, 1);
    x[threadIdx.x] = v;
}

__global__ void mmas_kernel(float *x, int count)
{
    float d[4] = {};
    uint32_t ones[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
    for (int i = 0; i < count; i++)
        gpu_mma_bf16_m16n8k16(d, ones, ones[0], ones[1]);
    x[threadIdx.x] = d[0];
}

} // namespace

cudaError_t sim_add(float *x, float value, int count, cudaStream_t stream)
{
    GPU_COST(8.0 * count, 1.0 * count, false);
    GPU_LAUNCH(add_kernel, (count + 255) / 256, 256, 0, stream, x, value, count);
    return cudaGetLastError();
}

cudaError_t sim_gather(float *y, const float *x, int stride, int count, cudaStream_t stream)
{
    GPU_LAUNCH(gather_kernel, (count + 31) / 32, 32, 0, stream, y, x, stride, count);
    return cudaGetLastError();
}

cudaError_t sim_transpose(float *y, const float *x, int padding, cudaStream_t stream)
{
    GPU_LAUNCH(transpose_kernel, 1, 128, 32 * (32 + static_cast<size_t>(padding)) * sizeof(float), stream, y, x, padding);
    return cudaGetLastError();
}

cudaError_t sim_mma(float *d, const uint32_t *a, const uint32_t *b, int kind, cudaStream_t stream)
{
    GPU_LAUNCH(mma_kernel, 1, 32, 0, stream, d, a, b, kind);
    return cudaGetLastError();
}

cudaError_t sim_ldmatrix(uint32_t *out, const uint16_t *rows, int tiles, bool trans, cudaStream_t stream)
{
    if (trans)
        GPU_LAUNCH((ldmatrix_kernel<true>), 1, 32, 0, stream, out, rows, tiles);
    else
        GPU_LAUNCH((ldmatrix_kernel<false>), 1, 32, 0, stream, out, rows, tiles);
    return cudaGetLastError();
}

cudaError_t sim_collect(int *out, enum sim_collective kind, int argument, cudaStream_t stream)
{
    GPU_LAUNCH(collect_kernel, 1, 32, 0, stream, out, static_cast<int>(kind), argument);
    return cudaGetLastError();
}

cudaError_t sim_vote_block(int *out, int limit, cudaStream_t stream)
{
    GPU_LAUNCH(vote_block_kernel, 1, 96, 0, stream, out, limit);
    return cudaGetLastError();
}

cudaError_t sim_count_threads(int *x, int blocks, int threads, cudaStream_t stream)
{
    GPU_LAUNCH(count_threads_kernel, blocks, threads, 0, stream, x);
    return cudaGetLastError();
}

cudaError_t sim_nothing(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream)
{
    GPU_LAUNCH(nothing_kernel, grid, block, shared_bytes, stream, 0);
    return cudaGetLastError();
}

cudaError_t sim_rate_run(enum sim_rate rate, float *x, int count, cudaStream_t stream)
{
    switch (rate) {
    case SIM_RATE_ELEMENTS:
        return sim_add(x, 1, count, stream);
    case SIM_RATE_BARRIERS:
        GPU_LAUNCH(barriers_kernel, 8, 256, 0, stream, x, count);
        break;
    case SIM_RATE_SHUFFLES:
        GPU_LAUNCH(shuffles_kernel, 8, 256, 0, stream, x, count);
        break;
    case SIM_RATE_MMA:
        GPU_LAUNCH(mmas_kernel, 8, 128, 0, stream, x, count);
        break;
    }
    return cudaGetLastError();
}
