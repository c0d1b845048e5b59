/* gpu.h - the one header a .cu file includes: the launch macro, dynamic shared memory, and every PTX instruction the
 * kernels use, one instruction in one function.
 *
 * Two compilers read each .cu file. nvcc sees the asm below. g++ with -DKILN_CUDASIM sees cudasim.h (tests/cudasim),
 * whose functions of the same names do lane for lane what the instruction does, on a CPU and with checks. So that both
 * mean the same, kernels keep to this: no <<<>>>, asm or extern __shared__ outside this file; no __activemask; every
 * barrier on a line of its own (the simulator tells barriers apart by line); dynamic shared memory rather than static
 * where a tile is large (its bounds are guarded exactly).
 *
 * Kernels may use: __shared__, __syncthreads(_or/_and/_count), __syncwarp, __shfl*_sync, __ballot/any/all_sync, __ldg,
 * __ldcs, __stcs, atomics, the usual float intrinsics, cuda_bf16.h, cuda_fp16.h, cuda_fp8.h.
 *
 * Feature set: sm_80 (mma.sync, ldmatrix, cp.async); the fp8 product needs sm_89. */
#ifndef KILN_GPU_H
#define KILN_GPU_H

#ifdef KILN_CUDASIM
#include "cudasim.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <stdint.h>

/* GPU_LAUNCH(kernel, grid, block, shared_bytes, stream, args...): a template kernel goes in brackets, as in
 * GPU_LAUNCH((flash<128, true>), grid, 128, bytes, stream, q, k, v). Errors: cudaGetLastError, as ever. */
#define GPU_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                                     \
    kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)

/* GPU_COST(bytes, flops, is_tensor_core): what the next GPU_LAUNCH of this host thread reads and writes in device
 * memory at least, and computes. For the simulator's ledger; nothing under nvcc. */
#define GPU_COST(bytes, flops, is_tensor_core) ((void)sizeof(bytes), (void)sizeof(flops), (void)sizeof(is_tensor_core))

/* GPU_SHARED(T, name): T *name is the block's dynamic shared memory, 128-byte aligned. */
#define GPU_SHARED(T, name)                                                                                            \
    extern __shared__ __align__(128) unsigned char gpu_shared_bytes[];                                                 \
    T *name = reinterpret_cast<T *>(gpu_shared_bytes)

#define GPU_FUNCTION static __device__ __forceinline__

GPU_FUNCTION uint32_t gpu_shared_address(const void *p)
{
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

/* --- matrix products of one warp ------------------------------------------------------------------------------------
 * d += a * b; all 32 lanes call together. With g = lane / 4 and t = lane % 4, a lane holds of
 *   d [16, 8] f32    d[0] (g, 2t)   d[1] (g, 2t+1)   d[2] (g+8, 2t)   d[3] (g+8, 2t+1)
 *   a [16, 16]       a[0] (g, 2t..2t+1)   a[1] (g+8, 2t..)   a[2] (g, 2t+8..)   a[3] (g+8, 2t+8..)   two 16-bit values each
 *   b [16, 8]        b0 (2t..2t+1, g)     b1 (2t+8.., g)
 * The lower half of a register is the lower column (a) or row (b). */

/* mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 */
GPU_FUNCTION void gpu_mma_bf16_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 */
GPU_FUNCTION void gpu_mma_f16_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32: d as above, but four 8-bit values a register:
 *   a [16, 32]   a[0] (g, 4t..4t+3)   a[1] (g+8, 4t..)   a[2] (g, 4t+16..)   a[3] (g+8, 4t+16..)
 *   b [32, 8]    b0 (4t..4t+3, g)     b1 (4t+16.., g)
 * sm_89 and later. Code for earlier devices traps: the host must not launch it there. */
GPU_FUNCTION void gpu_mma_e4m3_m16n8k32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
    asm volatile("trap;");
#else
    asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

/* --- ldmatrix: 8x8 tiles of 16-bit values from shared memory -------------------------------------------------------
 * Tile i comes from the 16-byte rows whose addresses lanes 8i to 8i+7 bring; lane l receives in r[i] the values
 * (row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1) of tile i; with trans, of the transposed tile. All 32 lanes call
 * together; addresses of lanes whose tile is not loaded (x1, x2) are ignored. A row is 16-byte aligned. */

/* ldmatrix.sync.aligned.m8n8.x1(.trans).shared.b16 */
template <bool trans = false> GPU_FUNCTION void gpu_ldmatrix_x1(uint32_t (&r)[1], const void *row)
{
    if (trans)
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                     : "=r"(r[0])
                     : "r"(gpu_shared_address(row))
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                     : "=r"(r[0])
                     : "r"(gpu_shared_address(row))
                     : "memory");
}

/* ldmatrix.sync.aligned.m8n8.x2(.trans).shared.b16 */
template <bool trans = false> GPU_FUNCTION void gpu_ldmatrix_x2(uint32_t (&r)[2], const void *row)
{
    if (trans)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(gpu_shared_address(row))
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(gpu_shared_address(row))
                     : "memory");
}

/* ldmatrix.sync.aligned.m8n8.x4(.trans).shared.b16 */
template <bool trans = false> GPU_FUNCTION void gpu_ldmatrix_x4(uint32_t (&r)[4], const void *row)
{
    if (trans)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(gpu_shared_address(row))
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(gpu_shared_address(row))
                     : "memory");
}

/* --- asynchronous copies, device memory to shared memory ------------------------------------------------------------ */

/* cp.async.cg.shared.global: 16 bytes, both addresses 16-byte aligned. Not valid: dst is set to zeros and src is not
 * read (it must still be a legal pointer). dst may be read after commit, wait and a barrier, not before. */
GPU_FUNCTION void gpu_cp_async_16(void *dst, const void *src, bool valid = true)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(gpu_shared_address(dst)), "l"(src),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

/* cp.async.commit_group: closes this thread's group of copies. An empty group counts. */
GPU_FUNCTION void gpu_cp_async_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* cp.async.wait_group: waits until at most `pending` of this thread's newest groups are still under way. */
template <int pending> GPU_FUNCTION void gpu_cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

/* --- approximate f32 functions --------------------------------------------------------------------------------------
 * Relative error: ex2 2^-22, rcp 2^-23, rsqrt 2^-22.9, tanh 2^-11; subnormals are flushed to zero. */

/* ex2.approx.ftz.f32 */
GPU_FUNCTION float gpu_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* rcp.approx.ftz.f32 */
GPU_FUNCTION float gpu_rcp(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* rsqrt.approx.ftz.f32 */
GPU_FUNCTION float gpu_rsqrt(float x)
{
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* tanh.approx.f32 */
GPU_FUNCTION float gpu_tanh(float x)
{
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif
#endif
