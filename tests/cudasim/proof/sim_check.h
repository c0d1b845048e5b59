/* sim_check.h - what the simulator's tests share: cmocka from C++, device buffers, bf16, numbers by hash. */
#ifndef SIM_CHECK_H
#define SIM_CHECK_H

/* C++ first: cmocka's macros are called fail and skip. */
#include <cmath>
#include <fstream>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern "C" {
#include <cmocka.h>
}

#include <cuda_runtime_api.h>

#include "cudasim_control.h"
#include "sim_kernels.h"

#if defined(CUDASIM_TSAN)
#define SIM_BUILD "tsan"
#elif defined(__SANITIZE_ADDRESS__)
#define SIM_BUILD "asan"
#else
#define SIM_BUILD "plain"
#endif

/* must: the call succeeds, else the test says which one and why. */
#define must(call)                                                                                                     \
    do {                                                                                                               \
        cudaError_t must_code = (call);                                                                                \
        if (must_code != cudaSuccess)                                                                                  \
            fail_msg("%s: %s: %s", #call, cudaGetErrorName(must_code), cudasim_error());                               \
    } while (0)

/* must_fail: the call fails with this code. */
#define must_fail(call, code)                                                                                          \
    do {                                                                                                               \
        cudaError_t must_code = (call);                                                                                \
        if (must_code != (code))                                                                                       \
            fail_msg("%s: %s, want %s (%s)", #call, cudaGetErrorName(must_code), #code, cudasim_error());              \
    } while (0)

/* must_say: the simulator's last sentence contains this. */
inline void must_say(const char *words)
{
    if (!strstr(cudasim_error(), words))
        fail_msg("want a sentence with \"%s\", got \"%s\"", words, cudasim_error());
}

inline float sim_from_bf16(uint16_t bits)
{
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}

inline uint16_t sim_to_bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Roughly normal, by a hash of the index: the same on every machine. */
inline float sim_number(uint32_t seed, uint32_t i)
{
    float sum = 0;
    for (uint32_t j = 0; j < 4; j++) {
        uint32_t h = (seed * 0x9e3779b9u + i * 4 + j) * 0x85ebca6bu;
        h = (h ^ h >> 13) * 0xc2b2ae35u;
        h ^= h >> 16;
        sum += static_cast<float>(h) * (1.0f / 4294967296.0f) - 0.5f;
    }
    return sum * 1.7320508f;
}

inline std::vector<uint16_t> sim_numbers_bf16(uint32_t seed, size_t count)
{
    std::vector<uint16_t> v(count);
    for (size_t i = 0; i < count; i++)
        v[i] = sim_to_bf16(sim_number(seed, static_cast<uint32_t>(i)));
    return v;
}

inline std::vector<float> sim_numbers(uint32_t seed, size_t count)
{
    std::vector<float> v(count);
    for (size_t i = 0; i < count; i++)
        v[i] = sim_number(seed, static_cast<uint32_t>(i));
    return v;
}

/* Device memory for the length of a scope. */
template <class T> struct DeviceArray {
    T *data = nullptr;
    size_t count;
    explicit DeviceArray(size_t n) : count(n)
    {
        must(cudaMalloc(reinterpret_cast<void **>(&data), n * sizeof(T)));
    }
    explicit DeviceArray(const std::vector<T> &v) : DeviceArray(v.size())
    {
        must(cudaMemcpy(data, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    }
    DeviceArray(const DeviceArray &) = delete;
    ~DeviceArray()
    {
        cudaFree(data);
    }
    std::vector<T> read() const
    {
        std::vector<T> v(count);
        must(cudaMemcpy(v.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
        return v;
    }
};

/* Nothing is left: run after each test that must give everything back. */
inline int sim_nothing_left(void **)
{
    char text[1024];
    cudasim_fault(nullptr);
    cudasim_restore();
    cudaGetLastError();
    if (cudasim_leaks(text, sizeof text) == 0)
        return 0;
    print_error("left behind: %s", text);
    return -1;
}

#endif
