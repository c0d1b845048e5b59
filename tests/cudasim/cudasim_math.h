/* cudasim_math.h - the arithmetic the toolkit's headers keep for the device: atomics, float intrinsics, cached loads.
 * Approximate intrinsics are exact here, to f32 rounding: a result that depends on their last bits on a GPU is not
 * reproduced. Included by cudasim.h. */
#ifndef CUDASIM_MATH_H
#define CUDASIM_MATH_H

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

/* --- fences and atomics: relaxed, as on the device --------------------------------------------------------------------- */

inline void __threadfence()
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
inline void __threadfence_block()
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

namespace cudasim
{

/* update: *p = change(*p) in one step; returns the old value. */
template <class T, class Change> inline T update(T *p, Change change)
{
    using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
    Bits old_bits = __atomic_load_n(reinterpret_cast<Bits *>(p), __ATOMIC_RELAXED), new_bits;
    T old_value;
    do {
        memcpy(static_cast<void *>(&old_value), &old_bits, sizeof old_value);
        T new_value = change(old_value);
        memcpy(&new_bits, static_cast<const void *>(&new_value), sizeof new_bits);
    } while (!__atomic_compare_exchange_n(reinterpret_cast<Bits *>(p), &old_bits, new_bits, true, __ATOMIC_RELAXED,
                                          __ATOMIC_RELAXED));
    return old_value;
}

} // namespace cudasim

template <class T> inline T atomicAdd(T *p, std::common_type_t<T> v)
{
    return cudasim::update(p, [v](T a) { return static_cast<T>(a + v); });
}
template <class T> inline T atomicSub(T *p, std::common_type_t<T> v)
{
    return cudasim::update(p, [v](T a) { return static_cast<T>(a - v); });
}
template <class T> inline T atomicMax(T *p, std::common_type_t<T> v)
{
    return cudasim::update(p, [v](T a) { return a > v ? a : v; });
}
template <class T> inline T atomicMin(T *p, std::common_type_t<T> v)
{
    return cudasim::update(p, [v](T a) { return a < v ? a : v; });
}
template <class T> inline T atomicAnd(T *p, std::common_type_t<T> v)
{
    return cudasim::update(p, [v](T a) { return static_cast<T>(a & v); });
}
template <class T> inline T atomicOr(T *p, std::common_type_t<T> v)
{
    return cudasim::update(p, [v](T a) { return static_cast<T>(a | v); });
}
template <class T> inline T atomicExch(T *p, std::common_type_t<T> v)
{
    return cudasim::update(p, [v](T) { return v; });
}
template <class T> inline T atomicCAS(T *p, std::common_type_t<T> expected, std::common_type_t<T> v)
{
    return cudasim::update(p, [expected, v](T a) { return a == expected ? v : a; });
}

/* --- float intrinsics ----------------------------------------------------------------------------------------------- */

inline float __expf(float x)
{
    return expf(x);
}
inline float __exp10f(float x)
{
    return powf(10.0f, x);
}
inline float __logf(float x)
{
    return logf(x);
}
inline float __log2f(float x)
{
    return log2f(x);
}
inline float __sinf(float x)
{
    return sinf(x);
}
inline float __cosf(float x)
{
    return cosf(x);
}
inline void __sincosf(float x, float *s, float *c)
{
    *s = sinf(x);
    *c = cosf(x);
}
inline float __powf(float x, float y)
{
    return powf(x, y);
}
inline float __fdividef(float a, float b)
{
    return a / b;
}
inline float __fdiv_rn(float a, float b)
{
    return a / b;
}
inline float __frcp_rn(float a)
{
    return 1.0f / a;
}
inline float __fsqrt_rn(float a)
{
    return sqrtf(a);
}
inline float __frsqrt_rn(float a)
{
    return static_cast<float>(1.0 / sqrt(static_cast<double>(a)));
}
/* volatile: the compiler must not contract these into a fused multiply-add, whatever its flags; nvcc never does. */
inline float __fmul_rn(float a, float b)
{
    volatile float product = a * b;
    return product;
}
inline float __fadd_rn(float a, float b)
{
    volatile float sum = a + b;
    return sum;
}
inline float __fsub_rn(float a, float b)
{
    volatile float difference = a - b;
    return difference;
}
inline float __fmaf_rn(float a, float b, float c)
{
    return fmaf(a, b, c);
}
inline float rsqrtf(float x)
{
    return 1.0f / sqrtf(x);
}
inline float __saturatef(float x)
{
    return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f;
}

/* --- bits -------------------------------------------------------------------------------------------------------------- */

inline int __float_as_int(float x)
{
    int bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline unsigned __float_as_uint(float x)
{
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float __int_as_float(int bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline float __uint_as_float(unsigned bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline int __float2int_rn(float x)
{
    return static_cast<int>(lrintf(x));
}
inline int __float2int_rd(float x)
{
    return static_cast<int>(floorf(x));
}
inline int __float2int_rz(float x)
{
    return static_cast<int>(x);
}
inline float __int2float_rn(int x)
{
    return static_cast<float>(x);
}
inline int __popc(unsigned x)
{
    return __builtin_popcount(x);
}
inline int __clz(int x)
{
    return x ? __builtin_clz(static_cast<unsigned>(x)) : 32;
}
inline int __ffs(int x)
{
    return __builtin_ffs(x);
}
inline unsigned __umulhi(unsigned a, unsigned b)
{
    return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}

/* --- loads and stores with a cache hint ------------------------------------------------------------------------------ */

template <class T> inline T __ldg(const T *p)
{
    return *p;
}
template <class T> inline T __ldcs(const T *p)
{
    return *p;
}
template <class T> inline T __ldcg(const T *p)
{
    return *p;
}
template <class T> inline void __stcs(T *p, const T &v)
{
    *p = v;
}
template <class T> inline void __stcg(T *p, const T &v)
{
    *p = v;
}

template <class A, class B> inline std::common_type_t<A, B> min(A a, B b)
{
    using C = std::common_type_t<A, B>;
    return static_cast<C>(a) < static_cast<C>(b) ? static_cast<C>(a) : static_cast<C>(b);
}
template <class A, class B> inline std::common_type_t<A, B> max(A a, B b)
{
    using C = std::common_type_t<A, B>;
    return static_cast<C>(a) > static_cast<C>(b) ? static_cast<C>(a) : static_cast<C>(b);
}

/* --- 16-bit floats: what cuda_bf16.h and cuda_fp16.h have no host path for ---------------------------------------------- */

inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c)
{
    return __float2bfloat16(fmaf(__bfloat162float(a), __bfloat162float(b), __bfloat162float(c)));
}
inline __half __hfma(__half a, __half b, __half c)
{
    return __float2half(fmaf(__half2float(a), __half2float(b), __half2float(c)));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c)
{
    return __nv_bfloat162(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c)
{
    return __half2(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y));
}

#endif
