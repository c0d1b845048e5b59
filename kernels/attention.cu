/* attention.cu - attention.c on the device: streaming softmax attention (Dao et al., FlashAttention-2, 2023), no matrix of
 * scores in memory. Three kernels: heads up to 128 wide (the fast one), up to 512 (the VAE's single head), and f32.
 *
 * flash: a block of 8 warps has 128 query rows of one head, a warp 16 of them; it walks over tiles of 64 keys. Queries
 *     stay in registers as fragments; keys and values are double buffered by cp.async; S = QK^T and O += PV are
 *     mma.m16n8k16, and the result fragments of S are the operand fragments of P, so P never leaves the registers.
 *     Shared memory: 96 KB at 128 (128 + 4 x 64 rows of 256 bytes), chunk c of row r at c ^ (r % 8): no bank conflicts.
 *     Limit: FLOPs on tensor cores, 4 d per pair of query and key; the exponentials (one per pair, 16 per clock and SM
 *     quarter) are the second limit, about a third of the time at d = 128.
 *     Expected, not measured, share of the bf16 peak for d = 128 and 4608 rows: 55 to 60 % on sm_80, 60 to 65 % on
 *     sm_86 and sm_89, 35 % on sm_90 (no wgmma).
 * wide: a block of 8 warps has 64 query rows, tiles of 16 keys. For S a warp has 16 rows x 8 keys, for O all 64 rows x
 *     64 of the 512 columns; P goes through shared memory. 99 KB: all an sm_86 or sm_89 block can have.
 *     Limit: shared memory bandwidth (a fragment of Q is read for each 16 x 8 x 16 product).
 *     Expected, not measured: 20 to 25 % of the bf16 peak; it is 2 % of the FLOPs of a 1024 x 1024 picture.
 * f32: a block of 128 threads has 16 query rows, tiles of 16 keys in shared memory; the reference mode, CUDA cores.
 *
 * Tiles begin at row 0 and key 0, so a row's bits depend on its own inputs. A key that is hidden counts as minus infinity;
 * a row without visible keys gives zeros. P is rounded to bf16 before the second product, as in attention.c. */
#include "gpu_rows.h"

#include <math.h>
#include <string.h>

#define BATCH_MAX 64 /* samples whose key counts fit the arguments of one launch */
#define LOG2_E 1.4426950408889634f

namespace {

struct place { /* of [batch, rows, heads, d], in elements */
    int64_t batch, row, head;
};

struct job {
    const void *q, *key, *value;
    void *out;
    struct place q_at, key_at, value_at, out_at;
    int rows, keys, group, d; /* group: query heads per key head */
    float scale;
    bool causal;
    int key_count[BATCH_MAX];
};

__device__ __forceinline__ int visible_keys(const struct job &j, int row, int limit)
{
    return j.causal && row + 1 < limit ? row + 1 : limit;
}

__device__ __forceinline__ uint32_t pack(float a, float b)
{
    __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<uint32_t *>(&v);
}

/* Over the four lanes that share a row of a fragment. */
__device__ __forceinline__ float quad_max(float v)
{
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

__device__ __forceinline__ float quad_sum(float v)
{
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

/* The address of 8 values in a tile whose rows are D long: 8 rows that are read together lie in different banks. */
template <int D> __device__ __forceinline__ bf16 *chunk_of(bf16 *tile, int r, int c)
{
    if (D == 16)
        return tile + r * D + ((c ^ (r >> 2 & 1)) << 3);
    if (D == 32)
        return tile + r * D + ((c ^ (r >> 1 & 3)) << 3);
    return tile + r * D + ((c ^ (r & 7)) << 3);
}

/* Queues the copy of ROWS rows from `first` on; rows and columns that do not exist become zeros. */
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void copy_rows(bf16 *tile, const bf16 *from, int64_t stride, int first, int count, int d)
{
    constexpr int CHUNKS = D / 8;
#pragma unroll
    for (int i = 0; i < ROWS * CHUNKS / THREADS; i++) {
        int e = i * THREADS + (int)threadIdx.x, r = e / CHUNKS, c = e % CHUNKS;
        bool valid = first + r < count && c * 8 < d;
        gpu_cp_async_16(chunk_of<D>(tile, r, c), valid ? from + (first + r) * stride + c * 8 : from, valid);
    }
}

/* --- heads up to 128 ------------------------------------------------------------------------------------ */

#define FLASH_THREADS 256
#define FLASH_ROWS 128
#define FLASH_KEYS 64

constexpr int flash_shared_bytes(int d)
{
    return (FLASH_ROWS + 4 * FLASH_KEYS) * d * (int)sizeof(bf16);
}

template <int D> __global__ void __launch_bounds__(FLASH_THREADS, 1) flash_kernel(const __grid_constant__ struct job j)
{
    GPU_SHARED(bf16, shared);
    bf16 *tile_q = shared, *tile_k = tile_q + FLASH_ROWS * D, *tile_v = tile_k + 2 * FLASH_KEYS * D;
    int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, b = (int)blockIdx.z, head = (int)blockIdx.y;
    int first_row = (int)blockIdx.x * FLASH_ROWS, warp_row = first_row + warp * 16;
    const bf16 *q = (const bf16 *)j.q + b * j.q_at.batch + head * j.q_at.head;
    const bf16 *key = (const bf16 *)j.key + b * j.key_at.batch + head / j.group * j.key_at.head;
    const bf16 *value = (const bf16 *)j.value + b * j.value_at.batch + head / j.group * j.value_at.head;
    int limit = j.key_count[b];
    int tiles = (visible_keys(j, first_row + FLASH_ROWS - 1, limit) + FLASH_KEYS - 1) / FLASH_KEYS;
    auto copy_keys = [&](int tile) {
        int at = tile % 2 * FLASH_KEYS * D;
        copy_rows<D, FLASH_KEYS, FLASH_THREADS>(tile_k + at, key, j.key_at.row, tile * FLASH_KEYS, limit, j.d);
        copy_rows<D, FLASH_KEYS, FLASH_THREADS>(tile_v + at, value, j.value_at.row, tile * FLASH_KEYS, limit, j.d);
    };

    copy_rows<D, FLASH_ROWS, FLASH_THREADS>(tile_q, q, j.q_at.row, first_row, j.rows, j.d);
    if (tiles > 0)
        copy_keys(0);
    gpu_cp_async_commit();

    uint32_t fq[D / 16][4];
    float o[D / 8][4] = {};
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {}; /* of rows lane / 4 and lane / 4 + 8 of the warp's 16 */
    float scale = j.scale * LOG2_E;
    for (int tile = 0; tile < tiles; tile++) {
        if (tile + 1 < tiles)
            copy_keys(tile + 1);
        gpu_cp_async_commit();
        gpu_cp_async_wait<1>();
        __syncthreads(); /* this tile is here for all */
        if (tile == 0)
#pragma unroll
            for (int i = 0; i < D / 16; i++)
                gpu_ldmatrix_x4(fq[i], chunk_of<D>(tile_q, warp * 16 + lane % 16, i * 2 + lane / 16));
        bf16 *k_now = tile_k + tile % 2 * FLASH_KEYS * D, *v_now = tile_v + tile % 2 * FLASH_KEYS * D;

        float s[FLASH_KEYS / 8][4] = {};
#pragma unroll
        for (int i = 0; i < D / 16; i++)
#pragma unroll
            for (int n = 0; n < FLASH_KEYS / 8; n += 2) {
                uint32_t f[4];
                gpu_ldmatrix_x4(f, chunk_of<D>(k_now, n * 8 + lane % 8 + lane / 16 * 8, i * 2 + lane / 8 % 2));
                gpu_mma_bf16_m16n8k16(s[n], fq[i], f[0], f[1]);
                gpu_mma_bf16_m16n8k16(s[n + 1], fq[i], f[2], f[3]);
            }

        if (visible_keys(j, warp_row, limit) < (tile + 1) * FLASH_KEYS) /* some row of this warp does not see all */
#pragma unroll
            for (int n = 0; n < FLASH_KEYS / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (tile * FLASH_KEYS + n * 8 + lane % 4 * 2 + e % 2 >= visible_keys(j, warp_row + lane / 4 + e / 2 * 8, limit))
                        s[n][e] = -INFINITY;

#pragma unroll
        for (int h = 0; h < 2; h++) {
            float best = top[h], sum = 0;
#pragma unroll
            for (int n = 0; n < FLASH_KEYS / 8; n++)
                best = fmaxf(best, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
            best = quad_max(best);
            float base = best == -INFINITY ? 0 : best * scale, keep = gpu_exp2(top[h] * scale - base);
            top[h] = best;
#pragma unroll
            for (int n = 0; n < FLASH_KEYS / 8; n++)
#pragma unroll
                for (int e = 2 * h; e < 2 * h + 2; e++) {
                    s[n][e] = gpu_exp2(s[n][e] * scale - base);
                    sum += s[n][e];
                }
            total[h] = total[h] * keep + sum;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                o[n][2 * h] *= keep;
                o[n][2 * h + 1] *= keep;
            }
        }

#pragma unroll
        for (int i = 0; i < FLASH_KEYS / 16; i++) {
            uint32_t p[4] = {pack(s[2 * i][0], s[2 * i][1]), pack(s[2 * i][2], s[2 * i][3]),
                             pack(s[2 * i + 1][0], s[2 * i + 1][1]), pack(s[2 * i + 1][2], s[2 * i + 1][3])};
#pragma unroll
            for (int n = 0; n < D / 8; n += 2) {
                uint32_t f[4];
                gpu_ldmatrix_x4<true>(f, chunk_of<D>(v_now, i * 16 + lane % 16, n + lane / 16));
                gpu_mma_bf16_m16n8k16(o[n], p, f[0], f[1]);
                gpu_mma_bf16_m16n8k16(o[n + 1], p, f[2], f[3]);
            }
        }
        __syncthreads(); /* nobody reads this tile any more */
    }
    gpu_cp_async_wait<0>();

    bf16 *out = (bf16 *)j.out + b * j.out_at.batch + head * j.out_at.head;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float sum = quad_sum(total[h]);
        float inverse = sum > 0 ? 1.0f / sum : 0;
        int row = warp_row + lane / 4 + h * 8;
        if (row < j.rows)
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                int column = n * 8 + lane % 4 * 2;
                if (column < j.d)
                    *reinterpret_cast<uint32_t *>(out + row * j.out_at.row + column) =
                        pack(o[n][2 * h] * inverse, o[n][2 * h + 1] * inverse);
            }
    }
}

/* --- heads up to 512 ------------------------------------------------------------------------------------ */

#define WIDE_THREADS 256
#define WIDE_ROWS 64
#define WIDE_KEYS 16
#define WIDE 512

constexpr int wide_shared_bytes = ((WIDE_ROWS + 2 * WIDE_KEYS) * WIDE + WIDE_ROWS * WIDE_KEYS) * (int)sizeof(bf16) +
                                  3 * WIDE_ROWS * (int)sizeof(float);

__global__ void __launch_bounds__(WIDE_THREADS, 1) wide_kernel(const __grid_constant__ struct job j)
{
    GPU_SHARED(bf16, shared);
    bf16 *tile_q = shared, *tile_k = tile_q + WIDE_ROWS * WIDE, *tile_v = tile_k + WIDE_KEYS * WIDE;
    bf16 *tile_p = tile_v + WIDE_KEYS * WIDE;
    float *half_of = reinterpret_cast<float *>(tile_p + WIDE_ROWS * WIDE_KEYS); /* [2][rows]: of each half of the keys */
    float *kept = half_of + 2 * WIDE_ROWS;                                      /* [rows] */
    int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, b = (int)blockIdx.z, head = (int)blockIdx.y;
    int first_row = (int)blockIdx.x * WIDE_ROWS, half = warp % 2, strip = warp / 2 * 16, g = lane / 4, t = lane % 4;
    const bf16 *q = (const bf16 *)j.q + b * j.q_at.batch + head * j.q_at.head;
    const bf16 *key = (const bf16 *)j.key + b * j.key_at.batch + head / j.group * j.key_at.head;
    const bf16 *value = (const bf16 *)j.value + b * j.value_at.batch + head / j.group * j.value_at.head;
    int limit = j.key_count[b];
    int tiles = (visible_keys(j, first_row + WIDE_ROWS - 1, limit) + WIDE_KEYS - 1) / WIDE_KEYS;
    auto copy_keys = [&](int tile) {
        copy_rows<WIDE, WIDE_KEYS, WIDE_THREADS>(tile_k, key, j.key_at.row, tile * WIDE_KEYS, limit, j.d);
    };
    auto copy_values = [&](int tile) {
        copy_rows<WIDE, WIDE_KEYS, WIDE_THREADS>(tile_v, value, j.value_at.row, tile * WIDE_KEYS, limit, j.d);
    };

    copy_rows<WIDE, WIDE_ROWS, WIDE_THREADS>(tile_q, q, j.q_at.row, first_row, j.rows, j.d);
    if (tiles > 0)
        copy_keys(0);
    gpu_cp_async_commit();
    if (tiles > 0)
        copy_values(0);
    gpu_cp_async_commit();

    float o[4][8][4] = {}; /* 64 rows x this warp's 64 columns */
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {}; /* rows g and g + 8 of the strip; total: of this half's keys */
    float scale = j.scale * LOG2_E;
    for (int tile = 0; tile < tiles; tile++) {
        gpu_cp_async_wait<1>();
        __syncthreads(); /* keys are here for all */
        float s[4] = {};
#pragma unroll 8
        for (int i = 0; i < WIDE / 16; i += 2) {
            uint32_t fa[4], fb[4];
            gpu_ldmatrix_x4(fb, chunk_of<WIDE>(tile_k, half * 8 + lane % 8, i * 2 + lane / 8));
            gpu_ldmatrix_x4(fa, chunk_of<WIDE>(tile_q, strip + lane % 16, i * 2 + lane / 16));
            gpu_mma_bf16_m16n8k16(s, fa, fb[0], fb[1]);
            gpu_ldmatrix_x4(fa, chunk_of<WIDE>(tile_q, strip + lane % 16, i * 2 + 2 + lane / 16));
            gpu_mma_bf16_m16n8k16(s, fa, fb[2], fb[3]);
        }
        float best[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int seen = visible_keys(j, first_row + strip + g + h * 8, limit);
#pragma unroll
            for (int e = 2 * h; e < 2 * h + 2; e++)
                if (tile * WIDE_KEYS + half * 8 + t * 2 + e % 2 >= seen)
                    s[e] = -INFINITY;
            best[h] = quad_max(fmaxf(s[2 * h], s[2 * h + 1]));
            if (t == 0)
                half_of[half * WIDE_ROWS + strip + g + h * 8] = best[h];
        }
        __syncthreads(); /* both halves' maxima are there, and the keys have been read */
        if (tile + 1 < tiles)
            copy_keys(tile + 1);
        gpu_cp_async_commit();
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int row = strip + g + h * 8;
            float now = fmaxf(top[h], fmaxf(half_of[row], half_of[WIDE_ROWS + row]));
            float base = now == -INFINITY ? 0 : now * scale, keep = gpu_exp2(top[h] * scale - base);
            top[h] = now;
            float p0 = gpu_exp2(s[2 * h] * scale - base), p1 = gpu_exp2(s[2 * h + 1] * scale - base);
            total[h] = total[h] * keep + p0 + p1;
            *reinterpret_cast<uint32_t *>(chunk_of<WIDE_KEYS>(tile_p, row, half) + t * 2) = pack(p0, p1);
            if (half == 0 && t == 0)
                kept[row] = keep;
        }
        gpu_cp_async_wait<1>();
        __syncthreads(); /* P and the values are here for all */
        uint32_t fp[4][4];
#pragma unroll
        for (int m = 0; m < 4; m++) {
            float keep0 = kept[m * 16 + g], keep1 = kept[m * 16 + g + 8];
            gpu_ldmatrix_x4(fp[m], chunk_of<WIDE_KEYS>(tile_p, m * 16 + lane % 16, lane / 16));
#pragma unroll
            for (int n = 0; n < 8; n++) {
                o[m][n][0] *= keep0, o[m][n][1] *= keep0;
                o[m][n][2] *= keep1, o[m][n][3] *= keep1;
            }
        }
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            uint32_t f[4];
            gpu_ldmatrix_x4<true>(f, chunk_of<WIDE>(tile_v, lane % 16, warp * 8 + n + lane / 16));
#pragma unroll
            for (int m = 0; m < 4; m++) {
                gpu_mma_bf16_m16n8k16(o[m][n], fp[m], f[0], f[1]);
                gpu_mma_bf16_m16n8k16(o[m][n + 1], fp[m], f[2], f[3]);
            }
        }
        __syncthreads(); /* values, P and maxima have been read */
        if (tile + 1 < tiles)
            copy_values(tile + 1);
        gpu_cp_async_commit();
    }
    gpu_cp_async_wait<0>();

#pragma unroll
    for (int h = 0; h < 2; h++) {
        float sum = quad_sum(total[h]);
        if (t == 0)
            half_of[half * WIDE_ROWS + strip + g + h * 8] = sum;
    }
    __syncthreads();
    bf16 *out = (bf16 *)j.out + b * j.out_at.batch + head * j.out_at.head;
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int local = m * 16 + g + h * 8, row = first_row + local;
            float sum = half_of[local] + half_of[WIDE_ROWS + local], inverse = sum > 0 ? 1.0f / sum : 0;
            if (row < j.rows)
#pragma unroll
                for (int n = 0; n < 8; n++) {
                    int column = warp * 64 + n * 8 + t * 2;
                    if (column < j.d)
                        *reinterpret_cast<uint32_t *>(out + row * j.out_at.row + column) =
                            pack(o[m][n][2 * h] * inverse, o[m][n][2 * h + 1] * inverse);
                }
        }
}

/* --- f32 ---------------------------------------------------------------------------------------------------- */

#define PLAIN_THREADS 128
#define PLAIN_ROWS 16
#define PLAIN_KEYS 16

/* Rows of d + 1 floats, so that equal columns of different rows lie in different banks. */
int plain_shared_bytes(int d)
{
    return ((PLAIN_ROWS + PLAIN_KEYS) * (d + 1) + PLAIN_ROWS * (PLAIN_KEYS + 1) + 3 * PLAIN_ROWS) * (int)sizeof(float);
}

__device__ __forceinline__ void plain_rows(float *tile, const float *from, int64_t stride, int first, int count, int d)
{
    for (int e = (int)threadIdx.x; e < PLAIN_ROWS * d; e += PLAIN_THREADS) {
        int r = e / d, c = e % d;
        tile[r * (d + 1) + c] = first + r < count ? from[(first + r) * stride + c] : 0;
    }
}

/* COLUMNS: of the result, per thread: d <= COLUMNS * PLAIN_THREADS. */
template <int COLUMNS> __global__ void __launch_bounds__(PLAIN_THREADS) plain_kernel(const __grid_constant__ struct job j)
{
    GPU_SHARED(float, shared);
    int d = j.d, tid = (int)threadIdx.x, b = (int)blockIdx.z, head = (int)blockIdx.y, first_row = (int)blockIdx.x * PLAIN_ROWS;
    float *tile_q = shared, *tile_kv = tile_q + PLAIN_ROWS * (d + 1), *p = tile_kv + PLAIN_KEYS * (d + 1);
    float *top = p + PLAIN_ROWS * (PLAIN_KEYS + 1), *total = top + PLAIN_ROWS, *kept = total + PLAIN_ROWS;
    const float *key = (const float *)j.key + b * j.key_at.batch + head / j.group * j.key_at.head;
    const float *value = (const float *)j.value + b * j.value_at.batch + head / j.group * j.value_at.head;
    int limit = j.key_count[b], last = visible_keys(j, first_row + PLAIN_ROWS - 1, limit);
    plain_rows(tile_q, (const float *)j.q + b * j.q_at.batch + head * j.q_at.head, j.q_at.row, first_row, j.rows, d);
    if (tid < PLAIN_ROWS)
        top[tid] = -INFINITY, total[tid] = 0;
    float o[COLUMNS][PLAIN_ROWS] = {};
    for (int first = 0; first < last; first += PLAIN_KEYS) {
        __syncthreads(); /* the tile before has been read */
        plain_rows(tile_kv, key, j.key_at.row, first, limit, d);
        __syncthreads();
        for (int e = tid; e < PLAIN_ROWS * PLAIN_KEYS; e += PLAIN_THREADS) {
            int r = e / PLAIN_KEYS, c = e % PLAIN_KEYS;
            float s = 0;
            for (int i = 0; i < d; i++)
                s += tile_q[r * (d + 1) + i] * tile_kv[c * (d + 1) + i];
            p[r * (PLAIN_KEYS + 1) + c] = first + c < visible_keys(j, first_row + r, limit) ? s * j.scale : -INFINITY;
        }
        __syncthreads();
        plain_rows(tile_kv, value, j.value_at.row, first, limit, d);
        if (tid < PLAIN_ROWS) {
            float *row = p + tid * (PLAIN_KEYS + 1), best = top[tid], sum = 0;
            for (int c = 0; c < PLAIN_KEYS; c++)
                best = fmaxf(best, row[c]);
            float base = best == -INFINITY ? 0 : best, keep = top[tid] == -INFINITY ? 0 : expf(top[tid] - base);
            for (int c = 0; c < PLAIN_KEYS; c++) {
                row[c] = expf(row[c] - base);
                sum += row[c];
            }
            total[tid] = total[tid] * keep + sum;
            top[tid] = best, kept[tid] = keep;
        }
        __syncthreads();
#pragma unroll
        for (int n = 0; n < COLUMNS; n++) {
            int column = n * PLAIN_THREADS + tid;
            if (column >= d)
                continue;
#pragma unroll
            for (int r = 0; r < PLAIN_ROWS; r++)
                o[n][r] *= kept[r];
#pragma unroll 1
            for (int c = 0; c < PLAIN_KEYS; c++) {
                float v = tile_kv[c * (d + 1) + column];
#pragma unroll
                for (int r = 0; r < PLAIN_ROWS; r++)
                    o[n][r] += p[r * (PLAIN_KEYS + 1) + c] * v;
            }
        }
    }
    __syncthreads(); /* with no tile at all, the totals */
    float *out = (float *)j.out + b * j.out_at.batch + head * j.out_at.head;
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) {
        int column = n * PLAIN_THREADS + tid;
        if (column < d)
#pragma unroll
            for (int r = 0; r < PLAIN_ROWS; r++)
                if (first_row + r < j.rows)
                    out[(first_row + r) * j.out_at.row + column] = total[r] > 0 ? o[n][r] / total[r] : 0;
    }
}

/* --- launching -------------------------------------------------------------------------------------------- */

template <typename K> bool ask(struct kern *k, K kernel, int bytes)
{
    return cuda_check(k, cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                      "attention's shared memory");
}

/* Pairs of a query and a key it sees, of all samples, for one head. */
double pairs_of(const struct job &j, int64_t batch)
{
    double pairs = 0;
    for (int64_t b = 0; b < batch; b++) {
        double limit = j.key_count[b], rows = j.rows, below = limit < rows ? limit : rows;
        pairs += j.causal ? below * (below + 1) / 2 + (rows - below) * limit : rows * limit;
    }
    return pairs;
}

void launch(struct kern *k, const struct job &j, int64_t heads, int64_t batch, enum tensor_dtype dtype)
{
    double rows_read = 2.0 * j.rows * heads + 2.0 * j.keys * heads / j.group;
    GPU_COST(rows_read * j.d * batch * tensor_dtype_bytes(dtype), 4.0 * j.d * heads * pairs_of(j, batch), dtype == TENSOR_BF16);
    int per = dtype == TENSOR_F32 ? PLAIN_ROWS : j.d <= 128 ? FLASH_ROWS : WIDE_ROWS;
    dim3 grid(gpu_blocks(j.rows, per), (uint32_t)heads, (uint32_t)batch);
    cudaStream_t stream = cuda_stream(k);
    if (dtype == TENSOR_F32 && j.d <= PLAIN_THREADS)
        GPU_LAUNCH((plain_kernel<1>), grid, dim3(PLAIN_THREADS), (size_t)plain_shared_bytes(j.d), stream, j);
    else if (dtype == TENSOR_F32)
        GPU_LAUNCH((plain_kernel<4>), grid, dim3(PLAIN_THREADS), (size_t)plain_shared_bytes(j.d), stream, j);
    else if (j.d <= 32)
        GPU_LAUNCH((flash_kernel<32>), grid, dim3(FLASH_THREADS), (size_t)flash_shared_bytes(32), stream, j);
    else if (j.d <= 64)
        GPU_LAUNCH((flash_kernel<64>), grid, dim3(FLASH_THREADS), (size_t)flash_shared_bytes(64), stream, j);
    else if (j.d <= 128)
        GPU_LAUNCH((flash_kernel<128>), grid, dim3(FLASH_THREADS), (size_t)flash_shared_bytes(128), stream, j);
    else
        GPU_LAUNCH(wide_kernel, grid, dim3(WIDE_THREADS), (size_t)wide_shared_bytes, stream, j);
    cuda_launched(k, "attention");
}

struct place place_of(const struct tensor &t)
{
    return {t.stride[0], t.stride[1], t.stride[2]};
}

/* x as the bf16 kernels read it: rows of whole 16-byte chunks. A copy in the arena where it is not so. */
struct tensor whole_chunks(struct kern *k, const struct tensor &x)
{
    if (x.dtype == TENSOR_F32 || gpu_is_vector(x))
        return x;
    int64_t shape[4] = {x.shape[0], x.shape[1], x.shape[2], (x.shape[3] + 7) / 8 * 8};
    struct tensor copy = kern_temp(k, x.dtype, 4, shape);
    if (k->failed)
        return copy;
    cuda_check(k, cudaMemsetAsync(copy.data, 0, tensor_bytes(copy), cuda_stream(k)), "attention");
    elementwise_copy_cuda(k, tensor_slice(copy, 3, 0, x.shape[3]), x);
    return copy;
}

} // namespace

bool attention_open_cuda(struct kern *k)
{
    return ask(k, flash_kernel<32>, flash_shared_bytes(32)) && ask(k, flash_kernel<64>, flash_shared_bytes(64)) &&
           ask(k, flash_kernel<128>, flash_shared_bytes(128)) && ask(k, wide_kernel, wide_shared_bytes) &&
           ask(k, plain_kernel<1>, plain_shared_bytes(128)) && ask(k, plain_kernel<4>, plain_shared_bytes(WIDE));
}

void attention_apply_cuda(struct kern *k, struct tensor out, struct tensor q, struct tensor key, struct tensor value,
                          float scale, struct kern_mask mask)
{
    int64_t batch = q.shape[0], heads = q.shape[2];
    assert(q.shape[3] <= WIDE && out.dtype == q.dtype);
    if (tensor_count(out) == 0)
        return;
    size_t mark = kern_mark(k);
    struct tensor q_in = whole_chunks(k, q), key_in = whole_chunks(k, key), value_in = whole_chunks(k, value), to = out;
    if (out.dtype == TENSOR_BF16 && !gpu_is_vector(out))
        to = kern_temp(k, out.dtype, 4, q_in.shape);
    struct job j = {};
    j.q_at = place_of(q_in), j.key_at = place_of(key_in), j.value_at = place_of(value_in), j.out_at = place_of(to);
    j.rows = (int)q.shape[1], j.keys = (int)key.shape[1], j.group = (int)(heads / key.shape[2]), j.d = (int)q_in.shape[3];
    j.scale = scale, j.causal = mask.causal;
    for (int64_t first = 0; first < batch && !k->failed; first += BATCH_MAX) {
        int64_t count = batch - first < BATCH_MAX ? batch - first : BATCH_MAX;
        size_t size = tensor_dtype_bytes(q.dtype);
        j.q = (const char *)q_in.data + (size_t)(first * j.q_at.batch) * size;
        j.key = (const char *)key_in.data + (size_t)(first * j.key_at.batch) * size;
        j.value = (const char *)value_in.data + (size_t)(first * j.value_at.batch) * size;
        j.out = (char *)to.data + (size_t)(first * j.out_at.batch) * size;
        for (int64_t b = 0; b < count; b++)
            j.key_count[b] = mask.key_count && mask.key_count[first + b] < j.keys ? mask.key_count[first + b] : j.keys;
        launch(k, j, heads, count, q.dtype);
    }
    if (to.data != out.data && !k->failed)
        elementwise_copy_cuda(k, out, tensor_slice(to, 3, 0, out.shape[3]));
    kern_rewind(k, mark);
}
