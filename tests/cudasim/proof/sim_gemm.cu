/* sim_gemm.cu - a block computes a 64 x 64 tile of c, each thread 4 x 4 of it, from tiles in static shared memory. */
#include "gpu.h"

#include "sim_kernels.h"

enum { TILE = 64, DEPTH = 16, PER_THREAD = 4 };

template <bool has_bug>
static __global__ void __launch_bounds__(256)
    gemm_kernel(const float *__restrict__ a, const float *__restrict__ b, float *__restrict__ c, int m, int n, int k)
{
    __shared__ float a_tile[DEPTH][TILE + 4];
    __shared__ float b_tile[DEPTH][TILE + 4];
    int column = threadIdx.x * PER_THREAD, row = threadIdx.y * PER_THREAD;
    int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
    int m0 = blockIdx.y * TILE, n0 = blockIdx.x * TILE;
    float sum[PER_THREAD][PER_THREAD] = {};
    for (int k0 = 0; k0 < k; k0 += DEPTH) {
        for (int i = thread; i < TILE * DEPTH; i += threads) {
            int r = i / DEPTH, d = i % DEPTH;
            a_tile[d][r] = m0 + r < m && k0 + d < k ? a[static_cast<size_t>(m0 + r) * k + k0 + d] : 0;
        }
        for (int i = thread; i < TILE * DEPTH; i += threads) {
            int d = i / TILE, s = i % TILE;
            b_tile[d][s] = n0 + s < n && k0 + d < k ? b[static_cast<size_t>(k0 + d) * n + n0 + s] : 0;
        }
        __syncthreads();
#pragma unroll
        for (int d = 0; d < DEPTH; d++)
#pragma unroll
            for (int i = 0; i < PER_THREAD; i++)
#pragma unroll
                for (int j = 0; j < PER_THREAD; j++)
                    sum[i][j] += a_tile[d][row + i] * b_tile[d][column + j];
        if (!has_bug)
            __syncthreads();
    }
    for (int i = 0; i < PER_THREAD; i++)
        for (int j = 0; j < PER_THREAD; j++)
            if (m0 + row + i < m && n0 + column + j < n)
                c[static_cast<size_t>(m0 + row + i) * n + n0 + column + j] = sum[i][j];
}

cudaError_t sim_gemm(const float *a, const float *b, float *c, int m, int n, int k, bool has_bug, cudaStream_t stream)
{
    dim3 grid((n + TILE - 1) / TILE, (m + TILE - 1) / TILE), block(TILE / PER_THREAD, TILE / PER_THREAD);
    GPU_COST(4.0 * m * k + 4.0 * k * n + 4.0 * m * n, 2.0 * m * n * k, false);
    if (has_bug)
        GPU_LAUNCH((gemm_kernel<true>), grid, block, 0, stream, a, b, c, m, n, k);
    else
        GPU_LAUNCH((gemm_kernel<false>), grid, block, 0, stream, a, b, c, m, n, k);
    return cudaGetLastError();
}
