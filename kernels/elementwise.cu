/* elementwise.cu - elementwise.c on the device: copies, SiLU, additions, guidance, Euler, the search for NaN.
 *
 * Who does what: a thread takes 16 bytes of one row (8 bf16 or 4 f32; one value where rows are not aligned); blocks of
 *     256 threads. No shared memory. Rows may have any outer strides.
 * Limit: bytes. Reads each operand once and writes once: 2 or 3 values per element.
 * Expected, not measured: 85 to 90 % of the memory bandwidth on sm_80, 89 and 90 once a tensor has more than a few MB;
 *     below that the launch (2 to 4 us) decides. */
#include "gpu_rows.h"

#define THREADS 256
#define CHUNKS_PER_LAUNCH ((int64_t)1 << 30)

namespace {

enum op { OP_CAST, OP_SILU, OP_SILU_MUL, OP_ADD, OP_GATED_ADD, OP_GUIDE, OP_ADD_SCALED, OP_MIX };

struct operands {
    struct tensor out, a, b, gate; /* gate: by column; of OP_MIX by row */
    float scalar;
};

template <int OP> constexpr bool is_binary = OP != OP_CAST && OP != OP_SILU;

template <int OP, typename T> __device__ __forceinline__ float one(float a, float b, float gate, float scalar)
{
    switch (OP) {
    case OP_SILU:
        return gpu_silu(a);
    case OP_SILU_MUL:
        return gpu_round<T>(gpu_silu(a)) * b;
    case OP_ADD:
        return a + b;
    case OP_GATED_ADD:
        return a + gpu_round<T>(gate * b);
    case OP_ADD_SCALED:
        return a + gpu_round<T>(scalar * b);
    case OP_GUIDE:
        return b + gpu_round<T>(scalar * gpu_round<T>(a - b));
    case OP_MIX:
        return gpu_round<T>(gpu_round<T>(1.0f - gate) * a) + gpu_round<T>(gate * b);
    }
    return a;
}

/* T: of the result, U: of the operands. */
template <int OP, typename T, typename U, int N>
__global__ void __launch_bounds__(THREADS) elementwise_kernel(gpu_rows<T> out, gpu_rows<const U> a, gpu_rows<const U> b,
                                                              const U *gate, float scalar, uint32_t first_row,
                                                              uint32_t count, uint32_t chunks)
{
    uint32_t index = blockIdx.x * THREADS + threadIdx.x;
    if (index >= count)
        return;
    uint32_t row = first_row + index / chunks, column = index % chunks * N;
    float x[N], y[N] = {}, g[N] = {}, result[N];
    gpu_load<N>(x, a.at(row) + column);
    if (is_binary<OP>)
        gpu_load<N>(y, b.at(row) + column);
    if (OP == OP_GATED_ADD)
        gpu_load<N>(g, gate + column);
    float share = OP == OP_MIX ? gpu_float(gate[row]) : 0;
#pragma unroll
    for (int i = 0; i < N; i++)
        result[i] = one<OP, T>(x[i], y[i], OP == OP_MIX ? share : g[i], scalar);
    gpu_store<N>(out.at(row) + column, result);
}

/* Calls launch(first row, threads) over pieces that 32-bit indexes can count. */
template <typename F> void in_pieces(int64_t rows, int64_t chunks, F launch)
{
    int64_t step = CHUNKS_PER_LAUNCH / chunks;
    for (int64_t first = 0; first < rows; first += step)
        launch((uint32_t)first, (uint32_t)((rows - first < step ? rows - first : step) * chunks));
}

template <int OP, typename T, typename U, int N> void run(struct kern *k, const struct operands &o)
{
    int64_t rows = gpu_row_count(o.out), chunks = o.out.shape[o.out.rank - 1] / N;
    cudaStream_t stream = cuda_stream(k);
    constexpr int inputs = is_binary<OP> ? 2 : 1;
    in_pieces(rows, chunks, [&](uint32_t first, uint32_t count) {
        GPU_COST((double)count * N * (sizeof(T) + inputs * sizeof(U)), OP == OP_CAST ? 0.0 : (double)count * N * 2, false);
        GPU_LAUNCH((elementwise_kernel<OP, T, U, N>), dim3(gpu_blocks(count, THREADS)), dim3(THREADS), 0, stream,
               gpu_rows_of<T>(o.out), gpu_rows_of<const U>(o.a), gpu_rows_of<const U>(o.b), (const U *)o.gate.data,
               o.scalar, first, count, (uint32_t)chunks);
        cuda_launched(k, "elementwise");
    });
}

/* One dtype for all operands; the engine never mixes them outside kern_copy. */
template <int OP> void apply(struct kern *k, const struct operands &o)
{
    assert(o.a.dtype == o.out.dtype && o.b.dtype == o.out.dtype && (!o.gate.data || o.gate.dtype == o.out.dtype));
    if (tensor_count(o.out) == 0)
        return;
    bool vector = gpu_is_vector(o.out) && gpu_is_vector(o.a) && gpu_is_vector(o.b) && (uintptr_t)o.gate.data % 16 == 0;
    if (o.out.dtype == TENSOR_F32)
        vector ? run<OP, float, float, 4>(k, o) : run<OP, float, float, 1>(k, o);
    else
        vector ? run<OP, bf16, bf16, 8>(k, o) : run<OP, bf16, bf16, 1>(k, o);
}

/* --- copies ------------------------------------------------------------------------------------------- */

template <typename W>
__global__ void __launch_bounds__(THREADS) copy_kernel(gpu_rows<char> out, gpu_rows<const char> x, uint32_t first_row,
                                                       uint32_t count, uint32_t chunks)
{
    uint32_t index = blockIdx.x * THREADS + threadIdx.x;
    if (index >= count)
        return;
    uint32_t row = first_row + index / chunks, at = index % chunks * (uint32_t)sizeof(W);
    *reinterpret_cast<W *>(out.at(row) + at) = *reinterpret_cast<const W *>(x.at(row) + at);
}

template <typename W> void copy_run(struct kern *k, const struct tensor &out, const struct tensor &x)
{
    int64_t rows = gpu_row_count(out), chunks = out.shape[out.rank - 1] / (int64_t)sizeof(W);
    cudaStream_t stream = cuda_stream(k);
    in_pieces(rows, chunks, [&](uint32_t first, uint32_t count) {
        GPU_COST(2.0 * count * sizeof(W), 0.0, false);
        GPU_LAUNCH((copy_kernel<W>), dim3(gpu_blocks(count, THREADS)), dim3(THREADS), 0, stream,
               gpu_rows_of<char>(out), gpu_rows_of<const char>(x), first, count, (uint32_t)chunks);
        cuda_launched(k, "copy");
    });
}

void copy_raw(struct kern *k, const struct tensor &out, const struct tensor &x)
{
    size_t size = tensor_dtype_bytes(out.dtype);
    if (tensor_is_contiguous(out) && tensor_is_contiguous(x)) {
        cuda_check(k, cudaMemcpyAsync(out.data, x.data, tensor_bytes(out), cudaMemcpyDeviceToDevice, cuda_stream(k)),
                   "copy");
        return;
    }
    struct tensor to = gpu_bytes_of(out), from = gpu_bytes_of(x);
    if (gpu_is_vector(to) && gpu_is_vector(from))
        copy_run<uint4>(k, to, from);
    else if (size == 4)
        copy_run<uint32_t>(k, to, from);
    else if (size == 2)
        copy_run<uint16_t>(k, to, from);
    else
        copy_run<uint8_t>(k, to, from);
}

/* --- NaN -------------------------------------------------------------------------------------------------- */

template <typename T, int N>
__global__ void __launch_bounds__(THREADS) bad_kernel(int32_t *bad, gpu_rows<const T> x, uint32_t first_row,
                                                      uint32_t count, uint32_t chunks)
{
    uint32_t index = blockIdx.x * THREADS + threadIdx.x;
    bool is_bad = false;
    if (index < count) {
        float v[N];
        gpu_load<N>(v, x.at(first_row + index / chunks) + index % chunks * N);
#pragma unroll
        for (int i = 0; i < N; i++)
            is_bad |= (__float_as_uint(v[i]) & 0x7f800000u) == 0x7f800000u;
    }
    if (is_bad)
        atomicOr(bad, 1);
}

template <typename T, int N> void bad_run(struct kern *k, int32_t *bad, const struct tensor &x)
{
    int64_t chunks = x.shape[x.rank - 1] / N;
    cudaStream_t stream = cuda_stream(k);
    in_pieces(gpu_row_count(x), chunks, [&](uint32_t first, uint32_t count) {
        GPU_COST((double)count * N * sizeof(T), 0.0, false);
        GPU_LAUNCH((bad_kernel<T, N>), dim3(gpu_blocks(count, THREADS)), dim3(THREADS), 0, stream, bad,
               gpu_rows_of<const T>(x), first, count, (uint32_t)chunks);
        cuda_launched(k, "has_nan");
    });
}

/* --- checksums ---------------------------------------------------------------------------------------------- */

/* A warp takes a row; sums of integers have no order. */
template <typename T, int N>
__global__ void __launch_bounds__(THREADS) checksum_kernel(int32_t *out, gpu_rows<const T> x, uint32_t rows, uint32_t width)
{
    uint32_t row = (blockIdx.x * THREADS + threadIdx.x) / 32, lane = threadIdx.x % 32, sum = 0;
    if (row >= rows)
        return;
    for (uint32_t i = lane * N; i < width; i += 32 * N) {
        float v[N];
        gpu_load<N>(v, x.at(row) + i);
#pragma unroll
        for (int j = 0; j < N; j++)
            sum += (2 * (i + j) + 1) * __float_as_uint(v[j]);
    }
#pragma unroll
    for (int distance = 16; distance; distance >>= 1)
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane == 0)
        out[row] = (int32_t)sum;
}

template <typename T, int N> void checksum_run(struct kern *k, const struct tensor &out, const struct tensor &x)
{
    int64_t rows = x.shape[0];
    GPU_COST((double)tensor_bytes(x) + (double)tensor_bytes(out), 0.0, false);
    GPU_LAUNCH((checksum_kernel<T, N>), dim3(gpu_blocks(rows, THREADS / 32)), dim3(THREADS), 0, cuda_stream(k), (int32_t *)out.data,
           gpu_rows_of<const T>(x), (uint32_t)rows, (uint32_t)x.shape[1]);
    cuda_launched(k, "checksum");
}

} // namespace

void elementwise_checksum_cuda(struct kern *k, struct tensor out, struct tensor x)
{
    bool vector = gpu_is_vector(x);
    assert(tensor_is_contiguous(out));
    if (tensor_count(x) == 0)
        return;
    if (x.dtype == TENSOR_F32)
        vector ? checksum_run<float, 4>(k, out, x) : checksum_run<float, 1>(k, out, x);
    else
        vector ? checksum_run<bf16, 8>(k, out, x) : checksum_run<bf16, 1>(k, out, x);
}

void elementwise_copy_cuda(struct kern *k, struct tensor out, struct tensor x)
{
    struct operands o = {out, x, x, {}, 0};
    bool vector = gpu_is_vector(out) && gpu_is_vector(x) && out.shape[out.rank - 1] % 8 == 0;
    if (tensor_count(out) == 0)
        return;
    if (out.dtype == x.dtype)
        copy_raw(k, out, x);
    else if (out.dtype == TENSOR_F32) /* 8 values: 16 bytes of bf16, 32 of f32 */
        vector ? run<OP_CAST, float, bf16, 8>(k, o) : run<OP_CAST, float, bf16, 1>(k, o);
    else
        vector ? run<OP_CAST, bf16, float, 8>(k, o) : run<OP_CAST, bf16, float, 1>(k, o);
}

void elementwise_silu_cuda(struct kern *k, struct tensor out, struct tensor x)
{
    apply<OP_SILU>(k, {out, x, x, {}, 0});
}

void elementwise_silu_mul_cuda(struct kern *k, struct tensor out, struct tensor gate, struct tensor up)
{
    apply<OP_SILU_MUL>(k, {out, gate, up, {}, 0});
}

void elementwise_add_cuda(struct kern *k, struct tensor out, struct tensor a, struct tensor b)
{
    apply<OP_ADD>(k, {out, a, b, {}, 0});
}

void elementwise_gated_add_cuda(struct kern *k, struct tensor x, struct tensor gate, struct tensor y)
{
    apply<OP_GATED_ADD>(k, {x, x, y, gate, 0});
}

void elementwise_add_scaled_cuda(struct kern *k, struct tensor x, struct tensor y, float s)
{
    apply<OP_ADD_SCALED>(k, {x, x, y, {}, s});
}

void elementwise_guide_cuda(struct kern *k, struct tensor out, struct tensor c, struct tensor u, float g)
{
    apply<OP_GUIDE>(k, {out, c, u, {}, g});
}

void elementwise_mix_cuda(struct kern *k, struct tensor out, struct tensor a, struct tensor b, struct tensor share)
{
    apply<OP_MIX>(k, {out, a, b, share, 0});
}

void elementwise_bad_cuda(struct kern *k, int32_t *bad, struct tensor x)
{
    bool vector = gpu_is_vector(x);
    if (tensor_count(x) == 0)
        return;
    if (x.dtype == TENSOR_F32)
        vector ? bad_run<float, 4>(k, bad, x) : bad_run<float, 1>(k, bad, x);
    else
        vector ? bad_run<bf16, 8>(k, bad, x) : bad_run<bf16, 1>(k, bad, x);
}
