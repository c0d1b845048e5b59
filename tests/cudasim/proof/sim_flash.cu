/* sim_flash.cu - attention without the matrix of scores, heads of 128.
 *
 * A block of 4 warps handles 64 queries of a head, 16 a warp. Tiles of 64 keys and values come by cp.async into two
 * buffers in turn. A row of shared memory is 256 bytes, 16 chunks; chunk c of row r lies at c ^ (r & 7), so that the
 * eight rows of an ldmatrix tile fall into different banks. Softmax is online, in powers of 2. */
#include "gpu.h"

#include "sim_kernels.h"

namespace
{

enum { HEAD = 128, QUERIES = 64, KEYS = 64, THREADS = 128, CHUNKS = HEAD / 8, CHUNK_BITS = 3 };

__device__ __forceinline__ __nv_bfloat16 *chunk(__nv_bfloat16 *tile, int row, int c)
{
    return tile + row * HEAD + ((c ^ (row & 7)) << CHUNK_BITS);
}

/* Copies 64 rows from row `first`; those at and beyond `rows` become zeros. */
__device__ __forceinline__ void load_tile(__nv_bfloat16 *tile, const __nv_bfloat16 *from, int first, int rows)
{
#pragma unroll
    for (int i = 0; i < KEYS * CHUNKS / THREADS; i++) {
        int n = i * THREADS + threadIdx.x, row = n / CHUNKS, c = n % CHUNKS;
        bool is_inside = first + row < rows;
        gpu_cp_async_16(chunk(tile, row, c), from + static_cast<size_t>(is_inside ? first + row : 0) * HEAD + c * 8,
                        is_inside);
    }
}

__device__ __forceinline__ uint32_t pack(float low, float high)
{
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&pair);
}

/* s = q k^T for this warp's 16 queries and the tile's 64 keys. */
__device__ __forceinline__ void score(float (&s)[KEYS / 8][4], const uint32_t (&q)[HEAD / 16][4], __nv_bfloat16 *keys)
{
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int d = 0; d < HEAD / 16; d++)
#pragma unroll
        for (int n = 0; n < KEYS / 8; n += 2) {
            uint32_t b[4];
            gpu_ldmatrix_x4(b, chunk(keys, n * 8 + (lane & 7) + ((lane >> 4) << 3), d * 2 + ((lane >> 3) & 1)));
            gpu_mma_bf16_m16n8k16(s[n], q[d], b[0], b[1]);
            gpu_mma_bf16_m16n8k16(s[n + 1], q[d], b[2], b[3]);
        }
}

/* Keys that do not exist or may not be seen. Row and column are the fragment's, as gpu.h says. */
__device__ __forceinline__ void mask(float (&s)[KEYS / 8][4], int row0, int column0, int keys, bool is_causal)
{
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int column = column0 + n * 8 + (e & 1), row = row0 + (e >> 1) * 8;
            if (column >= keys || (is_causal && column > row))
                s[n][e] = -INFINITY;
        }
}

/* One row in four lanes: a running maximum and sum, and the factor for what was summed under the old maximum. */
__device__ __forceinline__ float soften(float (&s)[KEYS / 8][4], int half, float *row_max, float *row_sum, float scale)
{
    float top = *row_max;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
        top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    float base = top == -INFINITY ? 0 : top * scale, factor = gpu_exp2(*row_max * scale - base), sum = 0;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) {
            s[n][e] = gpu_exp2(s[n][e] * scale - base);
            sum += s[n][e];
        }
    *row_max = top;
    *row_sum = *row_sum * factor + sum;
    return factor;
}

/* o += p v */
__device__ __forceinline__ void weigh(float (&o)[HEAD / 8][4], const float (&s)[KEYS / 8][4], __nv_bfloat16 *values)
{
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < KEYS / 16; j++) {
        uint32_t p[4] = {pack(s[2 * j][0], s[2 * j][1]), pack(s[2 * j][2], s[2 * j][3]),
                         pack(s[2 * j + 1][0], s[2 * j + 1][1]), pack(s[2 * j + 1][2], s[2 * j + 1][3])};
#pragma unroll
        for (int n = 0; n < HEAD / 8; n += 2) {
            uint32_t b[4];
            gpu_ldmatrix_x4<true>(b, chunk(values, j * 16 + (lane & 15), n + (lane >> 4)));
            gpu_mma_bf16_m16n8k16(o[n], p, b[0], b[1]);
            gpu_mma_bf16_m16n8k16(o[n + 1], p, b[2], b[3]);
        }
    }
}

template <bool is_causal, bool has_bug>
__global__ void __launch_bounds__(THREADS)
    flash_kernel(const __nv_bfloat16 *__restrict__ q, const __nv_bfloat16 *__restrict__ k,
                 const __nv_bfloat16 *__restrict__ v, __nv_bfloat16 *__restrict__ out, int queries, int keys, float scale)
{
    GPU_SHARED(__nv_bfloat16, shared);
    __nv_bfloat16 *q_tile = shared, *k_tiles = q_tile + QUERIES * HEAD, *v_tiles = k_tiles + 2 * KEYS * HEAD;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = lane >> 2, column = (lane & 3) * 2;
    const int q0 = blockIdx.x * QUERIES, row0 = q0 + warp * 16 + group;
    q += static_cast<size_t>(blockIdx.y) * queries * HEAD;
    out += static_cast<size_t>(blockIdx.y) * queries * HEAD;
    k += static_cast<size_t>(blockIdx.y) * keys * HEAD;
    v += static_cast<size_t>(blockIdx.y) * keys * HEAD;
    const int all_tiles = (keys + KEYS - 1) / KEYS;
    const int tiles = is_causal ? min(all_tiles, (q0 + QUERIES - 1) / KEYS + 1) : all_tiles;

    load_tile(q_tile, q, q0, queries);
    load_tile(k_tiles, k, 0, keys);
    load_tile(v_tiles, v, 0, keys);
    gpu_cp_async_commit();

    uint32_t q_part[HEAD / 16][4];
    float o[HEAD / 8][4] = {};
    float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {};
    for (int tile = 0; tile < tiles; tile++) {
        __nv_bfloat16 *k_now = k_tiles + (tile & 1) * KEYS * HEAD, *v_now = v_tiles + (tile & 1) * KEYS * HEAD;
        if (tile + 1 < tiles) {
            load_tile(k_tiles + ((tile + 1) & 1) * KEYS * HEAD, k, (tile + 1) * KEYS, keys);
            load_tile(v_tiles + ((tile + 1) & 1) * KEYS * HEAD, v, (tile + 1) * KEYS, keys);
        }
        gpu_cp_async_commit();
        gpu_cp_async_wait<has_bug ? 2 : 1>();
        __syncthreads();
        if (tile == 0)
#pragma unroll
            for (int d = 0; d < HEAD / 16; d++)
                gpu_ldmatrix_x4(q_part[d], chunk(q_tile, warp * 16 + (lane & 15), d * 2 + (lane >> 4)));
        float s[KEYS / 8][4] = {};
        score(s, q_part, k_now);
        if (tile * KEYS + KEYS > keys || (is_causal && tile * KEYS + KEYS > q0 + warp * 16))
            mask(s, row0, tile * KEYS + column, keys, is_causal);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float factor = soften(s, half, &row_max[half], &row_sum[half], scale);
#pragma unroll
            for (int n = 0; n < HEAD / 8; n++) {
                o[n][2 * half] *= factor;
                o[n][2 * half + 1] *= factor;
            }
        }
        weigh(o, s, v_now);
        __syncthreads();
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = row_sum[half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        float inverse = sum > 0 ? 1 / sum : 0;
        int row = row0 + half * 8;
        if (row >= queries)
            continue;
#pragma unroll
        for (int n = 0; n < HEAD / 8; n++)
            *reinterpret_cast<uint32_t *>(out + static_cast<size_t>(row) * HEAD + n * 8 + column) =
                pack(o[n][2 * half] * inverse, o[n][2 * half + 1] * inverse);
    }
}

} // namespace

cudaError_t sim_flash(const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *o, int heads, int queries,
                      int keys, bool is_causal, float scale, bool has_bug, cudaStream_t stream)
{
    const int shared_bytes = (QUERIES + 4 * KEYS) * HEAD * 2;
    auto kernel = is_causal ? flash_kernel<true, false> : has_bug ? flash_kernel<false, true> : flash_kernel<false, false>;
    cudaError_t e = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (e != cudaSuccess)
        return e;
    double scores = static_cast<double>(heads) * queries * keys;
    GPU_COST(4.0 * heads * (queries + keys) * HEAD, 4.0 * scores * HEAD, true);
    GPU_LAUNCH(kernel, dim3((queries + QUERIES - 1) / QUERIES, heads), THREADS, shared_bytes, stream,
               reinterpret_cast<const __nv_bfloat16 *>(q), reinterpret_cast<const __nv_bfloat16 *>(k),
               reinterpret_cast<const __nv_bfloat16 *>(v), reinterpret_cast<__nv_bfloat16 *>(o), queries, keys,
               scale * 1.4426950408889634f);
    return cudaGetLastError();
}
