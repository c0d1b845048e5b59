/* rope.cu - rope.c on the device: rotary embedding in place, in its two layouts.
 *
 * Who does what: a thread turns 16 bytes of a row (4 pairs of bf16, 2 of f32) or, where halves are paired, 16 bytes of
 *     each half. No shared memory.
 * Limit: bytes; the tables are read once per head and stay in the second-level cache.
 * Expected, not measured: 80 to 85 % of the memory bandwidth on sm_80, 89 and 90. */
#include "gpu_rows.h"

#define THREADS 256

namespace {

struct angles {
    const float *cos, *sin; /* [rows, d / 2] */
    uint32_t rows, heads;
    int half;

    __device__ __forceinline__ int64_t at(uint32_t r) const { return (int64_t)(r / heads % rows) * half; }
};

template <typename T, int N>
__global__ void __launch_bounds__(THREADS) pairs_kernel(gpu_rows<T> x, struct angles a, uint32_t count, uint32_t chunks)
{
    uint32_t index = blockIdx.x * THREADS + threadIdx.x;
    if (index >= count)
        return;
    uint32_t r = index / chunks, column = index % chunks * N;
    const float *cos = a.cos + a.at(r) + column / 2, *sin = a.sin + a.at(r) + column / 2;
    T *row = x.at(r) + column;
    float v[N];
    gpu_load<N>(v, row);
#pragma unroll
    for (int i = 0; i < N; i += 2) {
        float first = v[i], second = v[i + 1];
        v[i] = first * cos[i / 2] - second * sin[i / 2];
        v[i + 1] = second * cos[i / 2] + first * sin[i / 2];
    }
    gpu_store<N>(row, v);
}

template <typename T, int N>
__global__ void __launch_bounds__(THREADS) halves_kernel(gpu_rows<T> x, struct angles a, uint32_t count, uint32_t chunks)
{
    uint32_t index = blockIdx.x * THREADS + threadIdx.x;
    if (index >= count)
        return;
    uint32_t r = index / chunks, column = index % chunks * N;
    const float *cos = a.cos + a.at(r) + column, *sin = a.sin + a.at(r) + column;
    T *lower = x.at(r) + column, *upper = lower + a.half;
    float u[N], v[N];
    gpu_load<N>(u, lower);
    gpu_load<N>(v, upper);
#pragma unroll
    for (int i = 0; i < N; i++) {
        float c = gpu_round<T>(cos[i]), s = gpu_round<T>(sin[i]), first = u[i], second = v[i];
        u[i] = gpu_round<T>(first * c) - gpu_round<T>(second * s);
        v[i] = gpu_round<T>(second * c) + gpu_round<T>(first * s);
    }
    gpu_store<N>(lower, u);
    gpu_store<N>(upper, v);
}

template <typename T, int N> void pairs(struct kern *k, const struct tensor &x, const struct angles &a)
{
    uint32_t chunks = (uint32_t)(x.shape[3] / N), count = (uint32_t)gpu_row_count(x) * chunks;
    GPU_COST(2.0 * tensor_count(x) * sizeof(T) + 8.0 * a.rows * a.half, 3.0 * tensor_count(x), false);
    GPU_LAUNCH((pairs_kernel<T, N>), dim3(gpu_blocks(count, THREADS)), dim3(THREADS), 0, cuda_stream(k),
           gpu_rows_of<T>(x), a, count, chunks);
    cuda_launched(k, "rope pairs");
}

template <typename T, int N> void halves(struct kern *k, const struct tensor &x, const struct angles &a)
{
    uint32_t chunks = (uint32_t)(a.half / N), count = (uint32_t)gpu_row_count(x) * chunks;
    GPU_COST(2.0 * tensor_count(x) * sizeof(T) + 8.0 * a.rows * a.half, 3.0 * tensor_count(x), false);
    GPU_LAUNCH((halves_kernel<T, N>), dim3(gpu_blocks(count, THREADS)), dim3(THREADS), 0, cuda_stream(k),
           gpu_rows_of<T>(x), a, count, chunks);
    cuda_launched(k, "rope halves");
}

template <typename T> void rotate(struct kern *k, const struct tensor &x, const struct angles &a, enum kern_rope_layout layout)
{
    constexpr int per = gpu_vector<T>;
    bool vector = gpu_is_vector(x);
    if (layout == KERN_ROPE_HALVES)
        vector && a.half % per == 0 ? halves<T, per>(k, x, a) : halves<T, 1>(k, x, a);
    else
        vector ? pairs<T, per>(k, x, a) : pairs<T, 2>(k, x, a);
}

} // namespace

void rope_rotate_cuda(struct kern *k, struct tensor x, struct tensor cos, struct tensor sin, enum kern_rope_layout layout)
{
    struct angles a = {(const float *)cos.data, (const float *)sin.data, (uint32_t)x.shape[1], (uint32_t)x.shape[2],
                       (int)(x.shape[3] / 2)};
    assert(tensor_is_contiguous(cos) && tensor_is_contiguous(sin) && tensor_count(x) < (int64_t)1 << 32);
    if (tensor_count(x) == 0)
        return;
    if (x.dtype == TENSOR_F32)
        rotate<float>(k, x, a, layout);
    else
        rotate<bf16>(k, x, a, layout);
}
