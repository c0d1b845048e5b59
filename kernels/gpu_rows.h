/* gpu_rows.h - what every kernel does with a tensor: find its rows, load a few values as floats, round, store.
 *
 * A vector is 16 bytes (8 bf16 or 4 f32), the widest load a lane has. Kernels are templates over the count of values per
 * access: 16 bytes' worth where every row begins and ends on 16 bytes, else one at a time. The arithmetic per element
 * is the same, so an element's bits do not depend on which is taken. */
#ifndef KILN_GPU_ROWS_H
#define KILN_GPU_ROWS_H

#include "cuda_ops.h"
#include "gpu.h"

#include <assert.h>

typedef __nv_bfloat16 bf16;

/* The rows of a tensor, all leading axes counted together. */
template <typename T> struct gpu_rows {
    T *data;
    int64_t stride0, stride1, stride2; /* in elements */
    uint32_t n1, n2;

    __device__ __forceinline__ T *at(uint32_t r) const
    {
        if (n1 == 1 && n2 == 1) /* the common case: rows at one distance */
            return data + r * stride0;
        uint32_t i2 = r % n2, rest = r / n2;
        return data + rest / n1 * stride0 + rest % n1 * stride1 + i2 * stride2;
    }
};

template <typename T> static inline gpu_rows<T> gpu_rows_of(const struct tensor &t)
{
    int64_t n[3] = {1, 1, 1}, stride[3] = {0, 0, 0};
    int used = 0; /* axes from the last to the first, dense neighbours joined */
    for (int a = t.rank - 2; a >= 0; a--) {
        if (t.shape[a] == 1)
            continue;
        if (used && t.stride[a] == stride[used - 1] * n[used - 1]) {
            n[used - 1] *= t.shape[a];
            continue;
        }
        n[used] = t.shape[a], stride[used] = t.stride[a];
        used++;
    }
    if (used <= 1)
        return gpu_rows<T>{(T *)t.data, stride[0], 0, 0, 1, 1};
    if (used == 2)
        return gpu_rows<T>{(T *)t.data, stride[1], 0, stride[0], 1, (uint32_t)n[0]};
    return gpu_rows<T>{(T *)t.data, stride[2], stride[1], stride[0], (uint32_t)n[1], (uint32_t)n[0]};
}

/* How many values of T one 16-byte access holds. */
template <typename T> constexpr int gpu_vector = 16 / (int)sizeof(T);

/* Whether every row of t can be taken in 16-byte accesses. */
static inline bool gpu_is_vector(const struct tensor &t)
{
    int64_t per = 16 / (int64_t)tensor_dtype_bytes(t.dtype);
    bool fits = (uintptr_t)t.data % 16 == 0 && t.shape[t.rank - 1] % per == 0;
    for (int a = 0; a < t.rank - 1; a++)
        fits = fits && (t.shape[a] == 1 || t.stride[a] % per == 0);
    return fits;
}

/* The same tensor seen as bytes, for copies that do not look at the values. */
static inline struct tensor gpu_bytes_of(struct tensor t)
{
    int64_t size = (int64_t)tensor_dtype_bytes(t.dtype);
    for (int a = 0; a < t.rank - 1; a++)
        t.stride[a] *= size;
    t.shape[t.rank - 1] *= size;
    t.dtype = TENSOR_U8;
    return t;
}

static inline int64_t gpu_row_count(const struct tensor &t)
{
    int64_t rows = 1;
    for (int a = 0; a < t.rank - 1; a++)
        rows *= t.shape[a];
    return rows;
}

/* Blocks of `per` items each that hold `count`. */
static inline uint32_t gpu_blocks(int64_t count, int64_t per)
{
    return (uint32_t)((count + per - 1) / per);
}

static __device__ __forceinline__ float gpu_float(float x) { return x; }
static __device__ __forceinline__ float gpu_float(bf16 x) { return __bfloat162float(x); }

template <typename T> static __device__ __forceinline__ T gpu_of(float x);
template <> __device__ __forceinline__ float gpu_of<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 gpu_of<bf16>(float x) { return __float2bfloat16(x); }

/* A rounding point: the value as T has it. */
template <typename T> static __device__ __forceinline__ float gpu_round(float x) { return gpu_float(gpu_of<T>(x)); }

template <int N, typename T> static __device__ __forceinline__ void gpu_load(float (&v)[N], const T *from)
{
    constexpr int per = gpu_vector<T>;
    if constexpr (N % per == 0) {
#pragma unroll
        for (int first = 0; first < N; first += per) {
            uint4 bits = *reinterpret_cast<const uint4 *>(from + first);
            const T *value = reinterpret_cast<const T *>(&bits);
#pragma unroll
            for (int i = 0; i < per; i++)
                v[first + i] = gpu_float(value[i]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++)
            v[i] = gpu_float(from[i]);
    }
}

template <int N, typename T> static __device__ __forceinline__ void gpu_store(T *to, const float (&v)[N])
{
    constexpr int per = gpu_vector<T>;
    if constexpr (N % per == 0) {
#pragma unroll
        for (int first = 0; first < N; first += per) {
            uint4 bits;
            T *value = reinterpret_cast<T *>(&bits);
#pragma unroll
            for (int i = 0; i < per; i++)
                value[i] = gpu_of<T>(v[first + i]);
            *reinterpret_cast<uint4 *>(to + first) = bits;
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++)
            to[i] = gpu_of<T>(v[i]);
    }
}

static __device__ __forceinline__ float gpu_silu(float x) { return x / (1.0f + expf(-x)); }

/* The sum over `LANES` neighbours, the same in each of them. All lanes of the warp call together. */
template <int LANES = 32> static __device__ __forceinline__ float gpu_warp_sum(float v)
{
#pragma unroll
    for (int distance = LANES / 2; distance; distance >>= 1)
        v += __shfl_xor_sync(0xffffffffu, v, distance);
    return v;
}

#endif
