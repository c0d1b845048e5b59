/* cudasim.h - compiles a CUDA kernel source as ordinary C++17 and lets it run on the CPU.
 *
 *   g++ -std=c++17 -x c++ -DKILN_CUDASIM -I tests/cudasim -isystem <toolkit>/include -c kernel.cu
 *
 * A kernel includes gpu.h, which includes this. Every CUDA thread is a fiber; the fibers of one block share one OS
 * thread, blocks are spread over several. Barriers and warp collectives are meeting points in the scheduler
 * (schedule.cpp, warp.cpp). The toolkit's own headers give types and the conversions; this file adds what they keep
 * for the device: keywords, indices, barriers, shuffles; cudasim_math.h the arithmetic; cudasim_ptx.h the twins of
 * gpu.h's PTX wrappers.
 *
 * Everything a kernel calls is inline here, not in the library: so it is compiled with the kernel's own sanitizer and
 * instrumentation flags, and a race or an overflow inside it is reported with the kernel's line. */
#ifndef CUDASIM_H
#define CUDASIM_H

#ifdef __CUDACC__
#error "cudasim.h is the CPU build of the kernels; nvcc does not need it"
#endif

#include <cuda_runtime.h> /* before the macros below: it has parameters called gridDim */
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <vector_functions.h>

#include <cassert>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cudasim_control.h"

/* --- keywords ------------------------------------------------------------------------------------------------------ */

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __constant__    static const
#define __forceinline__ inline
#define __launch_bounds__(...)

/* A block never leaves its OS thread, so a thread's copy of a static is a block's copy. With one OS thread a plain
 * static will do, and AddressSanitizer puts red zones around it (it does not around thread_local). */
#ifdef CUDASIM_ONE_WORKER
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

namespace cudasim
{

/* --- what the scheduler keeps of a CUDA thread, as far as kernel code touches it ----------------------------------- */

enum { COPIES_MAX = 64, GROUPS_MAX = 16 };

struct AsyncCopy { /* one cp.async that has been issued and not yet waited for */
    void *to;
    const void *from; /* NULL: zeros */
};

struct Lane {
    uint3 thread, block;
    dim3 block_size, grid_size;
    void *shared; /* dynamic shared memory of the block */
    uint32_t shared_bytes;
    int index, warp, lane; /* linear in the block; index / 32; index % 32 */
    int copy_count, group_count;
    int group_end[GROUPS_MAX]; /* group i ends before copies[group_end[i]] */
    AsyncCopy copies[COPIES_MAX];
};

/* The lane that is running on this OS thread. __thread and not thread_local: no wrapper function around each use.
 * initial-exec: one load, also from a module that was opened with dlopen. */
extern __thread Lane *current __attribute__((tls_model("initial-exec")));

extern bool copies_are_early; /* CUDASIM_CPASYNC_EARLY: copy when issued; else when waited for. Both are legal. */

/* --- entries of the scheduler --------------------------------------------------------------------------------------- */

struct Where {
    const char *file;
    int line;
};

/* fail ends the kernel with this sentence and a sticky cudaErrorLaunchFailure. */
[[noreturn]] void fail(Where where, const char *format, ...) __attribute__((format(printf, 2, 3)));

enum class Barrier : uint8_t { PLAIN, OR, AND, COUNT };
int barrier(Where where, Barrier kind, int predicate);

enum class Op : uint8_t {
    SYNC,
    BALLOT,
    SHFL_INDEX,
    SHFL_UP,
    SHFL_DOWN,
    SHFL_XOR,
    LDMATRIX,
    LDMATRIX_TRANS,
    MMA_BF16,
    MMA_F16,
    MMA_E4M3
};

/* What one lane brings to a warp collective. Lives on the lane's stack until the collective is done. */
struct WarpOp {
    Op kind;
    uint8_t bytes;   /* SHFL: of the value */
    uint8_t count;   /* LDMATRIX: tiles */
    uint32_t mask;   /* lanes that take part */
    int argument;    /* BALLOT: predicate; SHFL: source lane, delta or xor mask */
    int width;       /* SHFL */
    const void *in;  /* SHFL: value; LDMATRIX: row of 16 bytes; MMA: a */
    const void *in2; /* MMA: b */
    void *out;       /* result; MMA: d, which is read too */
    Where where;
};
void warp_collective(WarpOp *op);

/* check_copy: is `to` shared and `from` device memory? Else it fails. */
void check_copy(Where where, const void *to, const void *from);

/* A module compiled with CUDASIM_ONE_WORKER says so when it is loaded. */
void need_one_worker();
#ifdef CUDASIM_ONE_WORKER
namespace
{
struct NeedOneWorker {
    NeedOneWorker()
    {
        need_one_worker();
    }
} const one_worker_needed;
} // namespace
#endif

struct Launch {
    dim3 grid, block;
    size_t shared_bytes;
    cudaStream_t stream;
    const void *function; /* identity for cudaFuncSetAttribute */
    const char *name;
    void (*run)(const void *arguments); /* the kernel for one CUDA thread */
    void (*release)(void *arguments);
    void *arguments;
};
/* launch puts the kernel into its stream; errors go where cudaGetLastError finds them. Owns arguments. */
void launch(const Launch &launch);

template <class... P, class... A>
void launch_kernel(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, A &&...arguments)
{
    using Pack = std::pair<void (*)(P...), std::tuple<std::decay_t<P>...>>;
    launch(Launch{grid, block, shared_bytes, stream, reinterpret_cast<const void *>(kernel), name,
                  [](const void *p) {
                      const Pack *pack = static_cast<const Pack *>(p);
                      std::apply(pack->first, pack->second);
                  },
                  [](void *p) { delete static_cast<Pack *>(p); },
                  new Pack(kernel, std::tuple<std::decay_t<P>...>(std::forward<A>(arguments)...))});
}

} // namespace cudasim

#define GPU_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                                     \
    ::cudasim::launch_kernel(#kernel, kernel, (grid), (block), (shared_bytes), (stream), __VA_ARGS__)
#define GPU_COST(bytes, flops, is_tensor_core) cudasim_cost((double)(bytes), (double)(flops), (is_tensor_core))
#define GPU_SHARED(T, name)                    T *name = static_cast<T *>(::cudasim::current->shared)
#define GPU_FUNCTION                           static inline

#define threadIdx (::cudasim::current->thread)
#define blockIdx  (::cudasim::current->block)
#define blockDim  (::cudasim::current->block_size)
#define gridDim   (::cudasim::current->grid_size)
static constexpr int warpSize = 32;

/* --- barriers and warp collectives ---------------------------------------------------------------------------------- */

/* The default arguments are evaluated where the kernel calls: that is how messages know the line. */
#define CUDASIM_HERE  const char *file_here = __builtin_FILE(), int line_here = __builtin_LINE()
#define CUDASIM_WHERE (::cudasim::Where{file_here, line_here})

inline void __syncthreads(CUDASIM_HERE)
{
    ::cudasim::barrier(CUDASIM_WHERE, cudasim::Barrier::PLAIN, 0);
}
inline int __syncthreads_or(int predicate, CUDASIM_HERE)
{
    return ::cudasim::barrier(CUDASIM_WHERE, cudasim::Barrier::OR, predicate);
}
inline int __syncthreads_and(int predicate, CUDASIM_HERE)
{
    return ::cudasim::barrier(CUDASIM_WHERE, cudasim::Barrier::AND, predicate);
}
inline int __syncthreads_count(int predicate, CUDASIM_HERE)
{
    return ::cudasim::barrier(CUDASIM_WHERE, cudasim::Barrier::COUNT, predicate);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDASIM_HERE)
{
    cudasim::WarpOp op = {cudasim::Op::SYNC, 0, 0, mask, 0, 32, nullptr, nullptr, nullptr, CUDASIM_WHERE};
    cudasim::warp_collective(&op);
}

namespace cudasim
{

template <class T> inline T shuffle(Op kind, unsigned mask, T value, int argument, int width, Where where)
{
    static_assert(sizeof(T) <= 16 && std::is_trivially_copyable<T>::value, "a shuffle moves plain values");
    T result = value;
    WarpOp op = {kind, static_cast<uint8_t>(sizeof(T)), 0, mask, argument, width, &value, nullptr, &result, where};
    warp_collective(&op);
    return result;
}

struct Vote {
    unsigned yes, present;
};
inline Vote vote(unsigned mask, int predicate, Where where)
{
    Vote result;
    WarpOp op = {Op::BALLOT, 0, 0, mask, predicate, 32, nullptr, nullptr, &result, where};
    warp_collective(&op);
    return result;
}

} // namespace cudasim

template <class T> inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDASIM_HERE)
{
    return cudasim::shuffle(cudasim::Op::SHFL_INDEX, mask, value, source, width, CUDASIM_WHERE);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDASIM_HERE)
{
    return cudasim::shuffle(cudasim::Op::SHFL_UP, mask, value, static_cast<int>(delta), width, CUDASIM_WHERE);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDASIM_HERE)
{
    return cudasim::shuffle(cudasim::Op::SHFL_DOWN, mask, value, static_cast<int>(delta), width, CUDASIM_WHERE);
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CUDASIM_HERE)
{
    return cudasim::shuffle(cudasim::Op::SHFL_XOR, mask, value, lane_mask, width, CUDASIM_WHERE);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDASIM_HERE)
{
    return cudasim::vote(mask, predicate, CUDASIM_WHERE).yes;
}
inline int __any_sync(unsigned mask, int predicate, CUDASIM_HERE)
{
    return cudasim::vote(mask, predicate, CUDASIM_WHERE).yes != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDASIM_HERE)
{
    cudasim::Vote v = cudasim::vote(mask, predicate, CUDASIM_WHERE);
    return v.yes == v.present;
}

#include "cudasim_math.h"
#include "cudasim_ptx.h"

#endif
