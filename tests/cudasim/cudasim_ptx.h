/* cudasim_ptx.h - twins of the PTX wrappers of kernels/gpu.h: the same names, the same result in every lane.
 * Shapes of the fragments are explained there; the arithmetic of whole warps is in warp.cpp. Included by cudasim.h. */
#ifndef CUDASIM_PTX_H
#define CUDASIM_PTX_H

namespace cudasim
{

inline void multiply(Op kind, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Where where)
{
    uint32_t b[2] = {b0, b1};
    WarpOp op = {kind, 0, 0, 0xffffffffu, 0, 32, a, b, d, where};
    warp_collective(&op);
}

/* Each lane reads its own row here, in code compiled with the kernel: so sanitizers and counters see it. */
template <bool trans, int tiles> inline void load_tiles(uint32_t (&r)[tiles], const void *row, Where where)
{
    uint4 values = {};
    if (current->lane < 8 * tiles) {
        if (reinterpret_cast<uintptr_t>(row) % 16)
            fail(where, "ldmatrix: row address %p of lane %d is not 16-byte aligned", row, current->lane);
        values = *static_cast<const uint4 *>(row);
    }
    WarpOp op = {trans ? Op::LDMATRIX_TRANS : Op::LDMATRIX, 16, tiles, 0xffffffffu, 0, 32, &values, nullptr, r, where};
    warp_collective(&op);
}

inline void copy_now(const AsyncCopy &copy)
{
    uint4 value = {};
    if (copy.from)
        value = *static_cast<const uint4 *>(copy.from);
    *static_cast<uint4 *>(copy.to) = value;
}

/* finish_copies does the copies of all groups but the newest `pending`. */
inline void finish_copies(int pending)
{
    Lane *lane = current;
    int groups = lane->group_count - pending;
    if (groups <= 0)
        return;
    int copies = lane->group_end[groups - 1];
    for (int i = 0; i < copies; i++)
        copy_now(lane->copies[i]);
    for (int i = copies; i < lane->copy_count; i++)
        lane->copies[i - copies] = lane->copies[i];
    for (int i = groups; i < lane->group_count; i++)
        lane->group_end[i - groups] = lane->group_end[i] - copies;
    lane->copy_count -= copies;
    lane->group_count -= groups;
}

} // namespace cudasim

inline void gpu_mma_bf16_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, CUDASIM_HERE)
{
    cudasim::multiply(cudasim::Op::MMA_BF16, d, a, b0, b1, CUDASIM_WHERE);
}
inline void gpu_mma_f16_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, CUDASIM_HERE)
{
    cudasim::multiply(cudasim::Op::MMA_F16, d, a, b0, b1, CUDASIM_WHERE);
}
inline void gpu_mma_e4m3_m16n8k32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, CUDASIM_HERE)
{
    cudasim::multiply(cudasim::Op::MMA_E4M3, d, a, b0, b1, CUDASIM_WHERE);
}

template <bool trans = false> inline void gpu_ldmatrix_x1(uint32_t (&r)[1], const void *row, CUDASIM_HERE)
{
    cudasim::load_tiles<trans>(r, row, CUDASIM_WHERE);
}
template <bool trans = false> inline void gpu_ldmatrix_x2(uint32_t (&r)[2], const void *row, CUDASIM_HERE)
{
    cudasim::load_tiles<trans>(r, row, CUDASIM_WHERE);
}
template <bool trans = false> inline void gpu_ldmatrix_x4(uint32_t (&r)[4], const void *row, CUDASIM_HERE)
{
    cudasim::load_tiles<trans>(r, row, CUDASIM_WHERE);
}

inline void gpu_cp_async_16(void *dst, const void *src, bool valid = true, CUDASIM_HERE)
{
    cudasim::Lane *lane = cudasim::current;
    cudasim::check_copy(CUDASIM_WHERE, dst, valid ? src : nullptr);
    cudasim::AsyncCopy copy = {dst, valid ? src : nullptr};
    if (cudasim::copies_are_early) {
        cudasim::copy_now(copy);
        return;
    }
    if (lane->copy_count == cudasim::COPIES_MAX)
        cudasim::fail(CUDASIM_WHERE, "cp.async: more than %d copies of one thread under way", cudasim::COPIES_MAX);
    lane->copies[lane->copy_count++] = copy;
}
inline void gpu_cp_async_commit(CUDASIM_HERE)
{
    cudasim::Lane *lane = cudasim::current;
    if (lane->group_count == cudasim::GROUPS_MAX)
        cudasim::fail(CUDASIM_WHERE, "cp.async: more than %d groups of one thread under way", cudasim::GROUPS_MAX);
    lane->group_end[lane->group_count++] = lane->copy_count;
}
template <int pending> inline void gpu_cp_async_wait()
{
    cudasim::finish_copies(pending);
}

inline float gpu_exp2(float x)
{
    return exp2f(x);
}
inline float gpu_rcp(float x)
{
    return 1.0f / x;
}
inline float gpu_rsqrt(float x)
{
    return 1.0f / sqrtf(x);
}
inline float gpu_tanh(float x)
{
    return tanhf(x);
}

#endif
