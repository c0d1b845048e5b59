/* rope.cu - rope.c on the device: norm of a head, then rotary embedding in its two layouts.
 *
 * Who does what: a head belongs to 16 lanes of a warp or to all 32, whichever its 16-byte pieces fill; 4 warps to a block. A
 *     lane takes 16 bytes at a time. The normalised head waits in shared memory, rounded as it would be in a tensor, because
 *     the other value of a pair may be another lane's.
 * Shared memory: the block's heads (2 KB for 128 bf16).
 * Limit: bytes; each value is read and written once. The tables are read once per head and stay in the second-level cache.
 * Expected, not measured: 75 to 85 % of the memory bandwidth on sm_80, 89 and 90 for heads of 128.
 *
 * The sum of squares is that of norm.cu for the same width, lane for lane: lanes that it has beyond 16 hold zeros then. */
#include "gpu_rows.h"

#define WARPS 4

namespace {

struct angles {
    const float *cos, *sin; /* [rows, d / 2] */
    uint32_t rows, heads;
    int half;

    __device__ __forceinline__ int64_t at(uint32_t r) const { return (int64_t)(r / heads % rows) * half; }
};

struct norm {
    float eps;
    bool round_first;
};

template <typename T, int N, int LANES>
__device__ __forceinline__ void normalise(T *head, const T *from, const T *weight, int lane, int width, struct norm n)
{
    float sum = 0, v[N], w[N];
    for (int i = lane * N; i < width; i += LANES * N) {
        gpu_load<N>(v, from + i);
#pragma unroll
        for (int j = 0; j < N; j++)
            sum += v[j] * v[j];
    }
    float scale = 1.0f / sqrtf(gpu_warp_sum<LANES>(sum) / (float)width + n.eps);
    for (int i = lane * N; i < width; i += LANES * N) {
        gpu_load<N>(v, from + i);
        gpu_load<N>(w, weight + i);
#pragma unroll
        for (int j = 0; j < N; j++)
            v[j] = (n.round_first ? gpu_round<T>(v[j] * scale) : v[j] * scale) * w[j];
        gpu_store<N>(head + i, v);
    }
}

/* Values 2j and 2j + 1: both here, or one of them. */
template <typename T, int N>
__device__ __forceinline__ void turn_pairs(float (&v)[N], const T *head, const float *cos, const float *sin, int i)
{
    gpu_load<N>(v, head + i);
    if constexpr (N == 1) {
        float other = gpu_float(head[i ^ 1]), c = cos[i / 2], s = sin[i / 2];
        v[0] = i % 2 ? v[0] * c + other * s : v[0] * c - other * s;
    } else {
#pragma unroll
        for (int j = 0; j < N; j += 2) {
            float first = v[j], second = v[j + 1], c = cos[(i + j) / 2], s = sin[(i + j) / 2];
            v[j] = first * c - second * s;
            v[j + 1] = second * c + first * s;
        }
    }
}

/* Values j and j + half: those of the lower or of the upper half. */
template <typename T, int N>
__device__ __forceinline__ void turn_halves(float (&v)[N], const T *head, const float *cos, const float *sin, int i, int half)
{
    bool is_upper = i >= half;
    int at = is_upper ? i - half : i;
    float u[N];
    gpu_load<N>(v, head + i);
    gpu_load<N>(u, head + (is_upper ? at : at + half));
#pragma unroll
    for (int j = 0; j < N; j++) {
        float c = gpu_round<T>(cos[at + j]), s = gpu_round<T>(sin[at + j]);
        v[j] = is_upper ? gpu_round<T>(v[j] * c) + gpu_round<T>(u[j] * s) : gpu_round<T>(v[j] * c) - gpu_round<T>(u[j] * s);
    }
}

template <typename T, int N, int LANES, bool PAIRS>
__global__ void __launch_bounds__(32 * WARPS)
    rope_kernel(gpu_rows<T> out, gpu_rows<const T> x, const T *weight, struct norm n, struct angles a, uint32_t count, int width)
{
    GPU_SHARED(T, shared); /* [heads of the block][width] */
    constexpr int heads = 32 * WARPS / LANES;
    int lane = (int)threadIdx.x % LANES;
    uint32_t r = blockIdx.x * heads + threadIdx.x / LANES;
    bool is_head = r < count;
    r = is_head ? r : count - 1;
    T *head = shared + threadIdx.x / LANES * width, *to = out.at(r);
    const float *cos = a.cos + a.at(r), *sin = a.sin + a.at(r);
    float v[N];
    width = is_head ? width : 0; /* lanes without a head go along, for the shuffles, and read none: others write in place */
    normalise<T, N, LANES>(head, x.at(r), weight, lane, width, n);
    __syncwarp();
    for (int i = lane * N; i < width; i += LANES * N) {
        if constexpr (PAIRS)
            turn_pairs<T, N>(v, head, cos, sin, i);
        else
            turn_halves<T, N>(v, head, cos, sin, i, a.half);
        gpu_store<N>(to + i, v);
    }
}

struct job {
    struct tensor out, x, weight;
    struct norm norm;
    struct angles angles;
};

template <typename T, int N, int LANES, bool PAIRS> void run(struct kern *k, const struct job &j)
{
    uint32_t count = (uint32_t)gpu_row_count(j.x), heads = 32 * WARPS / LANES;
    int width = (int)j.x.shape[3];
    GPU_COST(2.0 * tensor_count(j.x) * sizeof(T) + 8.0 * j.angles.rows * j.angles.half, 7.0 * tensor_count(j.x), false);
    GPU_LAUNCH((rope_kernel<T, N, LANES, PAIRS>), dim3(gpu_blocks(count, heads)), dim3(32 * WARPS), heads * width * sizeof(T),
               cuda_stream(k), gpu_rows_of<T>(j.out), gpu_rows_of<const T>(j.x), (const T *)j.weight.data, j.norm, j.angles,
               count, width);
    cuda_launched(k, "rope");
}

template <typename T, int N, bool PAIRS> void lanes(struct kern *k, const struct job &j)
{
    j.x.shape[3] <= 16 * N ? run<T, N, 16, PAIRS>(k, j) : run<T, N, 32, PAIRS>(k, j);
}

template <typename T> void apply(struct kern *k, const struct job &j, enum kern_rope_layout layout)
{
    constexpr int per = gpu_vector<T>;
    bool vector = gpu_is_vector(j.x) && gpu_is_vector(j.out) && (uintptr_t)j.weight.data % 16 == 0;
    if (layout == KERN_ROPE_HALVES)
        vector && j.angles.half % per == 0 ? lanes<T, per, false>(k, j) : lanes<T, 1, false>(k, j);
    else
        vector ? lanes<T, per, true>(k, j) : lanes<T, 1, true>(k, j);
}

} // namespace

void rope_rms_cuda(struct kern *k, struct tensor out, struct tensor x, struct tensor weight, float eps,
                   enum kern_rounding rounding, struct tensor cos, struct tensor sin, enum kern_rope_layout layout)
{
    struct angles a = {(const float *)cos.data, (const float *)sin.data, (uint32_t)x.shape[1], (uint32_t)x.shape[2],
                       (int)(x.shape[3] / 2)};
    struct job j = {out, x, weight, {eps, rounding == KERN_ROUND_BEFORE_WEIGHT}, a};
    assert(tensor_is_contiguous(cos) && tensor_is_contiguous(sin) && tensor_count(x) < (int64_t)1 << 32);
    assert(out.dtype == x.dtype && weight.dtype == x.dtype);
    if (tensor_count(x) == 0)
        return;
    if (x.dtype == TENSOR_F32)
        apply<float>(k, j, layout);
    else
        apply<bf16>(k, j, layout);
}
