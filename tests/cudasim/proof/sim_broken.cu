/* sim_broken.cu - kernels with one deliberate bug each. The simulator must find every one of them; README.md says in
 * which build. If a kernel here is "fixed", a test fails. */
#include "gpu.h"

#include "sim_kernels.h"

const char *const sim_bug_names[SIM_BUG_COUNT] = {
    "divergent-barrier", "exited-barrier",  "exited-lane",     "half-warp",        "other-mask",      "missing-barrier",
    "missing-syncwarp",  "block-race",      "stream-race",     "dynamic-overflow", "static-overflow", "device-overflow",
    "use-after-free",    "unwritten-shared", "unwaited-copy",  "misaligned-tile",  "stack-overflow",  "endless-loop"};

namespace
{

__global__ void divergent_barrier(float *x)
{
    if (threadIdx.x < 40) {
        x[threadIdx.x] = 1;
        __syncthreads();
    } else {
        x[threadIdx.x] = 2;
        __syncthreads();
    }
}

__global__ void exited_barrier(float *x)
{
    if (threadIdx.x >= 40)
        return;
    __syncthreads();
    x[threadIdx.x] = 1;
}

__global__ void exited_lane(float *x)
{
    if (threadIdx.x >= 16)
        return;
    x[threadIdx.x] = __shfl_down_sync(0xffffffffu, static_cast<float>(threadIdx.x), 8);
}

__global__ void half_warp(float *x)
{
    if (threadIdx.x < 16)
        x[threadIdx.x] = __shfl_xor_sync(0xffffffffu, static_cast<float>(threadIdx.x), 1);
    else
        __syncthreads();
}

__global__ void other_mask(float *x)
{
    unsigned mask = threadIdx.x < 16 ? 0xffffffffu : 0xffff0000u;
    x[threadIdx.x] = __shfl_xor_sync(mask, static_cast<float>(threadIdx.x), 1);
}

__global__ void missing_barrier(float *x)
{
    __shared__ float s[64];
    s[threadIdx.x] = static_cast<float>(threadIdx.x);
    x[threadIdx.x] = s[63 - threadIdx.x];
}

__global__ void missing_syncwarp(float *x)
{
    __shared__ volatile float s[32];
    s[threadIdx.x] = static_cast<float>(threadIdx.x);
    x[threadIdx.x] = s[threadIdx.x ^ 1];
}

/* wait_for: a race must be certain to be one, however late the other side comes; and end if it never does. */
__device__ void wait_for(const volatile float *x, float least)
{
    for (int i = 0; i < 2000000000 && *x < least; i++) {
    }
}

__global__ void block_race(float *x)
{
    if (threadIdx.x == 0) {
        x[0] += 1;
        wait_for(x, 2);
    }
}

__global__ void stream_race(float *x)
{
    if (threadIdx.x == 0) {
        x[1] = 2;
        wait_for(x, 0.5f);
    }
}

__global__ void dynamic_overflow(float *x)
{
    GPU_SHARED(float, s);
    s[threadIdx.x + 1] = 1;
    x[threadIdx.x] = s[threadIdx.x + 1];
}

__global__ void static_overflow(float *x, int n)
{
    __shared__ float s[32];
    s[n] = 1;
    x[0] = s[n];
}

__global__ void write_at(float *x, int n)
{
    if (threadIdx.x == 0)
        x[n] = 1;
}

__global__ void unwritten_shared(float *x)
{
    GPU_SHARED(float, s);
    if (threadIdx.x)
        s[threadIdx.x] = 1;
    __syncthreads();
    x[threadIdx.x] = s[threadIdx.x];
}

__global__ void unwaited_copy(float *x)
{
    GPU_SHARED(float, s);
    x[threadIdx.x] = 1;
    __syncthreads();
    if (threadIdx.x < 16)
        gpu_cp_async_16(s + 4 * threadIdx.x, x + 4 * threadIdx.x);
    gpu_cp_async_commit();
    __syncthreads();
    x[threadIdx.x] = s[threadIdx.x];
}

__global__ void misaligned_tile(float *x)
{
    GPU_SHARED(unsigned char, s);
    s[threadIdx.x] = 0;
    __syncthreads();
    uint32_t r[1];
    gpu_ldmatrix_x1(r, s + 2);
    x[threadIdx.x] = static_cast<float>(r[0]);
}

/* Small frames, many of them: one large frame would step over the guard page and write to what lies below. */
__device__ __attribute__((noinline)) int descend(const volatile char *caller, int depth)
{
    volatile char frame[512];
    frame[depth % 512] = static_cast<char>(caller[0] + depth);
    return depth == 0 ? frame[0] : descend(frame, depth - 1) + frame[depth % 512];
}

__global__ void stack_overflow(float *x)
{
    volatile char first = 1;
    x[0] = static_cast<float>(descend(&first, 2000));
}

__global__ void endless_loop(float *x)
{
    const volatile float *v = x;
    while (v[0] != 12345.0f) {
    }
}

} // namespace

cudaError_t sim_broken(enum sim_bug bug, float *x, cudaStream_t stream)
{
    switch (bug) {
    case SIM_DIVERGENT_BARRIER:
        GPU_LAUNCH(divergent_barrier, 1, 64, 0, stream, x);
        break;
    case SIM_EXITED_BARRIER:
        GPU_LAUNCH(exited_barrier, 1, 64, 0, stream, x);
        break;
    case SIM_EXITED_LANE:
        GPU_LAUNCH(exited_lane, 1, 32, 0, stream, x);
        break;
    case SIM_HALF_WARP:
        GPU_LAUNCH(half_warp, 1, 32, 0, stream, x);
        break;
    case SIM_OTHER_MASK:
        GPU_LAUNCH(other_mask, 1, 32, 0, stream, x);
        break;
    case SIM_MISSING_BARRIER:
        GPU_LAUNCH(missing_barrier, 1, 64, 0, stream, x);
        break;
    case SIM_MISSING_SYNCWARP:
        GPU_LAUNCH(missing_syncwarp, 1, 32, 0, stream, x);
        break;
    case SIM_BLOCK_RACE:
        GPU_LAUNCH(block_race, 2, 32, 0, stream, x);
        break;
    case SIM_STREAM_RACE:
        GPU_LAUNCH(stream_race, 1, 32, 0, stream, x);
        break;
    case SIM_DYNAMIC_OVERFLOW:
        GPU_LAUNCH(dynamic_overflow, 1, 64, 64 * sizeof(float), stream, x);
        break;
    case SIM_STATIC_OVERFLOW:
        GPU_LAUNCH(static_overflow, 1, 1, 0, stream, x, 32);
        break;
    case SIM_DEVICE_OVERFLOW:
    case SIM_USE_AFTER_FREE:
        GPU_LAUNCH(write_at, 1, 32, 0, stream, x, bug == SIM_DEVICE_OVERFLOW ? 64 : 3);
        break;
    case SIM_UNWRITTEN_SHARED:
        GPU_LAUNCH(unwritten_shared, 1, 64, 64 * sizeof(float), stream, x);
        break;
    case SIM_UNWAITED_COPY:
        GPU_LAUNCH(unwaited_copy, 1, 64, 64 * sizeof(float), stream, x);
        break;
    case SIM_MISALIGNED_TILE:
        GPU_LAUNCH(misaligned_tile, 1, 32, 64, stream, x);
        break;
    case SIM_STACK_OVERFLOW:
        GPU_LAUNCH(stack_overflow, 1, 1, 0, stream, x);
        break;
    case SIM_ENDLESS_LOOP:
        GPU_LAUNCH(endless_loop, 1, 1, 0, stream, x);
        break;
    case SIM_BUG_COUNT:
        break;
    }
    return cudaGetLastError();
}
