/* gpu_gemm.h - the matrix product of our own, for linear.cu and conv.cu: out[m,n] = scale * sum_k a[m,k] w[n,k] (+ bias[n]).
 *
 * The rows of a come from a Source: rows of a matrix, or the pixels under a convolution's window, gathered on the way
 * into shared memory (an implicit matrix product: the gathered matrix never exists). w is [n][k], k contiguous.
 *
 * gemm_bf16: a block of 256 threads makes 128 x BN results; 8 warps share it. Tiles of 32 k are copied by cp.async into
 *     a ring of GEMM_STAGES; mma.m16n8k16 on fragments from ldmatrix. A row of a tile is 64 bytes = 4 chunks of 16;
 *     chunk c of row r lies at c ^ (r / 2 % 4), so the 8 rows of a fragment lie in 8 different groups of banks.
 * gemm_f32: 64 x 64 results per block, 4 x 4 per thread, plain multiplications: the reference mode.
 *
 * The sum of a result goes over k in ascending tiles, whatever m, the number of rows or BN: a row's bits depend on the
 * row and the weight alone. */
#ifndef KILN_GPU_GEMM_H
#define KILN_GPU_GEMM_H

#include "gpu_rows.h"

#define GEMM_ROWS 128
#define GEMM_DEPTH 32
#define GEMM_STAGES 3
#define GEMM_THREADS 256

/* Where results go: row m begins at data + m * stride. Pairs of results are stored at once where is_paired. */
struct gemm_output {
    void *data;
    int64_t stride;
    const float *bias; /* [n] or NULL */
    float scale;       /* of sums */
    bool is_f32, is_paired;
};

static inline struct gemm_output gemm_output_of(const struct tensor &out, const float *bias, float scale)
{
    struct tensor rows = tensor_rows(out);
    bool pairs = rows.stride[0] % 2 == 0 && rows.shape[1] % 2 == 0 && (uintptr_t)rows.data % 8 == 0;
    return {rows.data, rows.stride[0], bias, scale, rows.dtype == TENSOR_F32, pairs};
}

static __device__ __forceinline__ void gemm_put(const struct gemm_output &out, int64_t row, int n, int count, float a, float b)
{
    if (n >= count)
        return;
    bool both = n + 1 < count;
    a *= out.scale;
    b *= out.scale;
    if (out.bias) {
        a += out.bias[n];
        b += both ? out.bias[n + 1] : 0;
    }
    int64_t at = row * out.stride + n;
    if (out.is_f32) {
        float *to = (float *)out.data + at;
        to[0] = a;
        if (both)
            to[1] = b;
    } else if (out.is_paired) {
        *reinterpret_cast<__nv_bfloat162 *>((bf16 *)out.data + at) = __floats2bfloat162_rn(a, b);
    } else {
        bf16 *to = (bf16 *)out.data + at;
        to[0] = gpu_of<bf16>(a);
        if (both)
            to[1] = gpu_of<bf16>(b);
    }
}

/* --- sources -------------------------------------------------------------------------------------------- */

/* Rows of a matrix. k is a multiple of 8 and rows begin on 16 bytes (bf16). */
template <typename T> struct gemm_matrix {
    const T *data;
    int64_t stride;
    int rows, k;

    struct row {
        const T *data; /* NULL: no such row */
    };
    double bytes() const { return (double)rows * k * sizeof(T); }
    struct place {
        int k;
    };
    __device__ __forceinline__ row row_of(int m) const { return {m < rows ? data + m * stride : nullptr}; }
    __device__ __forceinline__ place begin(int first) const { return {first}; }
    __device__ __forceinline__ void advance(place &p, int step) const { p.k += step; }
    /* The values at a place of a row; NULL stands for zeros. */
    __device__ __forceinline__ const T *at(const row &r, const place &p) const
    {
        return r.data && p.k < k ? r.data + p.k : nullptr;
    }
};

/* Pixels under a window, channels last: k counts (ky, kx, channel). Channels are a multiple of 8 (bf16), so 8 values at
 * a multiple of 8 are in one pixel. */
template <typename T> struct gemm_window {
    const T *data; /* [batch, h, w, in] */
    int rows, h, w, in, kh, kw, stride, pad, out_h, out_w;

    double bytes() const { return (double)rows / out_h / out_w * h * w * in * sizeof(T); } /* each value once */
    struct row {
        int64_t image; /* where the picture begins; -1: no such row */
        int y, x;      /* of the window's corner */
    };
    struct place {
        int ky, kx, channel;
    };
    __device__ __forceinline__ row row_of(int m) const
    {
        if (m >= rows)
            return {-1, 0, 0};
        int x = m % out_w, rest = m / out_w, y = rest % out_h, b = rest / out_h;
        return {(int64_t)b * h * w, y * stride - pad, x * stride - pad};
    }
    __device__ __forceinline__ place begin(int first) const
    {
        int tap = first / in;
        return {tap / kw, tap % kw, first % in};
    }
    __device__ __forceinline__ void advance(place &p, int step) const
    {
        p.channel += step;
        while (p.channel >= in) {
            p.channel -= in;
            if (++p.kx == kw)
                p.kx = 0, p.ky++;
        }
    }
    __device__ __forceinline__ const T *at(const row &r, const place &p) const
    {
        int y = r.y + p.ky, x = r.x + p.kx;
        if (r.image < 0 || p.ky >= kh || y < 0 || y >= h || x < 0 || x >= w)
            return nullptr;
        return data + (r.image + (int64_t)y * w + x) * in + p.channel;
    }
};

/* --- bf16 on tensor cores --------------------------------------------------------------------------------- */

/* The address of 8 values: chunk c of row r of a tile. */
static __device__ __forceinline__ bf16 *gemm_chunk(bf16 *tile, int r, int c)
{
    return tile + r * GEMM_DEPTH + ((c ^ (r >> 1 & 3)) << 3);
}

static constexpr int gemm_shared_bytes(int columns)
{
    return GEMM_STAGES * (GEMM_ROWS + columns) * GEMM_DEPTH * (int)sizeof(bf16);
}

template <int BN, typename Source>
static __global__ void __launch_bounds__(GEMM_THREADS, 2)
    gemm_bf16_kernel(Source a, const bf16 *__restrict__ w, int64_t w_stride, int n_count, int k, struct gemm_output out)
{
    constexpr int WARPS_N = BN == 128 ? 4 : 1, WARPS_M = 8 / WARPS_N;
    constexpr int TILES_M = GEMM_ROWS / WARPS_M / 16, TILES_N = BN / WARPS_N / 8;
    constexpr int A_COPIES = GEMM_ROWS * 4 / GEMM_THREADS, B_COPIES = (BN * 4 + GEMM_THREADS - 1) / GEMM_THREADS;
    GPU_SHARED(bf16, shared);
    bf16 *tile_a = shared, *tile_b = shared + GEMM_STAGES * GEMM_ROWS * GEMM_DEPTH;
    int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    int m0 = blockIdx.x * GEMM_ROWS, n0 = blockIdx.y * BN;
    int copy_row = tid / 4, copy_chunk = tid % 4;

    /* What this thread copies: the same chunk of A_COPIES rows of a and B_COPIES rows of w. */
    typename Source::row rows[A_COPIES];
#pragma unroll
    for (int i = 0; i < A_COPIES; i++)
        rows[i] = a.row_of(m0 + copy_row + i * (GEMM_THREADS / 4));
    typename Source::place place = a.begin(copy_chunk * 8);
    int copied_k = copy_chunk * 8;
    auto copy_tile = [&](int stage) {
#pragma unroll
        for (int i = 0; i < A_COPIES; i++) {
            const bf16 *from = a.at(rows[i], place);
            gpu_cp_async_16(gemm_chunk(tile_a + stage * GEMM_ROWS * GEMM_DEPTH, copy_row + i * (GEMM_THREADS / 4), copy_chunk),
                            from ? from : w, from != nullptr);
        }
#pragma unroll
        for (int i = 0; i < B_COPIES; i++) {
            int r = copy_row + i * (GEMM_THREADS / 4);
            bool valid = n0 + r < n_count && copied_k < k;
            if (r < BN)
                gpu_cp_async_16(gemm_chunk(tile_b + stage * BN * GEMM_DEPTH, r, copy_chunk),
                                valid ? w + (n0 + r) * w_stride + copied_k : w, valid);
        }
        a.advance(place, GEMM_DEPTH);
        copied_k += GEMM_DEPTH;
    };

    int steps = (k + GEMM_DEPTH - 1) / GEMM_DEPTH;
#pragma unroll
    for (int s = 0; s < GEMM_STAGES - 1; s++) {
        if (s < steps)
            copy_tile(s);
        gpu_cp_async_commit();
    }

    float sum[TILES_M][TILES_N][4] = {};
    int warp_m = warp / WARPS_N * TILES_M * 16, warp_n = warp % WARPS_N * TILES_N * 8;
    for (int step = 0; step < steps; step++) {
        gpu_cp_async_wait<GEMM_STAGES - 2>();
        __syncthreads(); /* tile `step` is here for all, and nobody reads the tile before it any more */
        if (step + GEMM_STAGES - 1 < steps)
            copy_tile((step + GEMM_STAGES - 1) % GEMM_STAGES);
        gpu_cp_async_commit();
        bf16 *ta = tile_a + step % GEMM_STAGES * GEMM_ROWS * GEMM_DEPTH, *tb = tile_b + step % GEMM_STAGES * BN * GEMM_DEPTH;
#pragma unroll
        for (int part = 0; part < GEMM_DEPTH / 16; part++) {
            uint32_t fa[TILES_M][4];
#pragma unroll
            for (int i = 0; i < TILES_M; i++)
                gpu_ldmatrix_x4(fa[i], gemm_chunk(ta, warp_m + i * 16 + lane % 16, part * 2 + lane / 16));
#pragma unroll
            for (int j = 0; j < TILES_N; j += 2) {
                uint32_t fb[4];
                gpu_ldmatrix_x4(fb, gemm_chunk(tb, warp_n + j * 8 + lane % 8 + lane / 16 * 8, part * 2 + lane / 8 % 2));
#pragma unroll
                for (int i = 0; i < TILES_M; i++) {
                    gpu_mma_bf16_m16n8k16(sum[i][j], fa[i], fb[0], fb[1]);
                    gpu_mma_bf16_m16n8k16(sum[i][j + 1], fa[i], fb[2], fb[3]);
                }
            }
        }
    }
    gpu_cp_async_wait<0>(); /* only empty groups are left; a block ends with none under way */

#pragma unroll
    for (int i = 0; i < TILES_M; i++)
#pragma unroll
        for (int j = 0; j < TILES_N; j++) {
            int m = m0 + warp_m + i * 16 + lane / 4, n = n0 + warp_n + j * 8 + lane % 4 * 2;
            if (m < a.rows)
                gemm_put(out, m, n, n_count, sum[i][j][0], sum[i][j][1]);
            if (m + 8 < a.rows)
                gemm_put(out, m + 8, n, n_count, sum[i][j][2], sum[i][j][3]);
        }
}

/* --- f32 -------------------------------------------------------------------------------------------------- */

#define GEMM_F32_TILE 64
#define GEMM_F32_DEPTH 16

template <typename Source>
static __global__ void __launch_bounds__(GEMM_THREADS)
    gemm_f32_kernel(Source a, const float *__restrict__ w, int64_t w_stride, int n_count, int k, struct gemm_output out)
{
    __shared__ __align__(16) float ta[GEMM_F32_DEPTH][GEMM_F32_TILE + 4];
    __shared__ __align__(16) float tb[GEMM_F32_DEPTH][GEMM_F32_TILE + 4];
    int tid = threadIdx.x, tx = tid % 16, ty = tid / 16;
    int m0 = blockIdx.x * GEMM_F32_TILE, n0 = blockIdx.y * GEMM_F32_TILE;
    constexpr int COPIES = GEMM_F32_TILE * GEMM_F32_DEPTH / GEMM_THREADS;
    int copy_k = tid % GEMM_F32_DEPTH, copy_row = tid / GEMM_F32_DEPTH;
    typename Source::row rows[COPIES];
#pragma unroll
    for (int i = 0; i < COPIES; i++)
        rows[i] = a.row_of(m0 + copy_row + i * (GEMM_THREADS / GEMM_F32_DEPTH));
    typename Source::place place = a.begin(copy_k);
    float sum[4][4] = {};
    for (int k0 = 0; k0 < k; k0 += GEMM_F32_DEPTH) {
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            int r = copy_row + i * (GEMM_THREADS / GEMM_F32_DEPTH), kk = k0 + copy_k;
            const float *from = a.at(rows[i], place);
            ta[copy_k][r] = from ? *from : 0;
            tb[copy_k][r] = n0 + r < n_count && kk < k ? w[(n0 + r) * w_stride + kk] : 0;
        }
        a.advance(place, GEMM_F32_DEPTH);
        __syncthreads();
#pragma unroll
        for (int kk = 0; kk < GEMM_F32_DEPTH; kk++) {
            float4 va = *reinterpret_cast<const float4 *>(&ta[kk][ty * 4]), vb = *reinterpret_cast<const float4 *>(&tb[kk][tx * 4]);
            float x[4] = {va.x, va.y, va.z, va.w}, y[4] = {vb.x, vb.y, vb.z, vb.w};
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    sum[i][j] += x[i] * y[j];
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int m = m0 + ty * 4 + i;
        if (m < a.rows) {
            gemm_put(out, m, n0 + tx * 4, n_count, sum[i][0], sum[i][1]);
            gemm_put(out, m, n0 + tx * 4 + 2, n_count, sum[i][2], sum[i][3]);
        }
    }
}

/* --- launching -------------------------------------------------------------------------------------------- */

/* w: data, n, dtype; k: values of a row of w, w_stride apart. */
template <typename Source>
static void gemm_run_bf16(struct kern *k, const char *name, const Source &a, const struct kern_weight *w, int64_t depth,
                   const struct tensor &out, float scale)
{
    struct gemm_output to = gemm_output_of(out, w->bias, scale);
    const bf16 *weight = (const bf16 *)w->data;
    GPU_COST(a.bytes() + (double)w->n * depth * sizeof(bf16) + (double)tensor_bytes(out), 2.0 * a.rows * w->n * depth, true);
    if (w->n > 32)
        GPU_LAUNCH((gemm_bf16_kernel<128, Source>), dim3(gpu_blocks(a.rows, GEMM_ROWS), gpu_blocks(w->n, 128)),
                   dim3(GEMM_THREADS), gemm_shared_bytes(128), cuda_stream(k), a, weight, depth, (int)w->n, (int)depth, to);
    else
        GPU_LAUNCH((gemm_bf16_kernel<32, Source>), dim3(gpu_blocks(a.rows, GEMM_ROWS), gpu_blocks(w->n, 32)),
                   dim3(GEMM_THREADS), gemm_shared_bytes(32), cuda_stream(k), a, weight, depth, (int)w->n, (int)depth, to);
    cuda_launched(k, name);
}

template <typename Source>
static void gemm_run_f32(struct kern *k, const char *name, const Source &a, const struct kern_weight *w, int64_t depth,
                  const struct tensor &out, float scale)
{
    GPU_COST(a.bytes() + (double)w->n * depth * sizeof(float) + (double)tensor_bytes(out), 2.0 * a.rows * w->n * depth, false);
    GPU_LAUNCH((gemm_f32_kernel<Source>), dim3(gpu_blocks(a.rows, GEMM_F32_TILE), gpu_blocks(w->n, GEMM_F32_TILE)),
               dim3(GEMM_THREADS), 0, cuda_stream(k), a, (const float *)w->data, depth, (int)w->n, (int)depth,
               gemm_output_of(out, w->bias, scale));
    cuda_launched(k, name);
}

/* --- rows as the kernels want them ------------------------------------------------------------------------ */

#ifdef __cplusplus
extern "C" {
#endif
/* gemm_rows gives x [rows, width] as rows of `inner` values that begin on 16 bytes: x itself where it is so, else a copy
 * in the arena, filled up with zeros. (linear.cu) */
struct tensor gemm_rows_cuda(struct kern *k, struct tensor x, int64_t inner);
#ifdef __cplusplus
}
#endif

#endif
