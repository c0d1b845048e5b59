/* sim_broken_run.cpp - runs one broken kernel (or host mistake) and prints how it ended; test_sim_broken starts it, because
 * a sanitizer's finding ends the process.
 *   sim_broken_run NAME   prints "error NAME-OF-ERROR: sentence" or "values" and the 64 floats */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <vector>

#include "cudasim_control.h"
#include "sim_kernels.h"

static int finish(const float *x)
{
    cudaError_t e = cudaDeviceSynchronize();
    if (e != cudaSuccess) {
        printf("error %s: %s\n", cudaGetErrorName(e), cudasim_error());
        return 1;
    }
    float values[64];
    cudaMemcpy(values, x, sizeof values, cudaMemcpyDeviceToHost);
    printf("values");
    for (float v : values)
        printf(" %g", static_cast<double>(v));
    printf("\n");
    return 0;
}

/* What is put into a stream after a gate waits until the host has made its calls and opens it. Otherwise the work may be
 * over before the call that submits it returns, and then the simulator's own locks order the two. Opening orders nothing. */
static std::atomic<bool> gate_is_open;

static void put_gate(cudaStream_t stream)
{
    auto wait = [](void *) {
        while (!gate_is_open.load(std::memory_order_relaxed))
            usleep(100);
    };
    cudaLaunchHostFunc(stream, wait, nullptr);
}

static void open_gate()
{
    gate_is_open.store(true, std::memory_order_relaxed);
}

/* The host reads pinned memory without waiting for the stream that writes it, until it sees the value: a read after the write
 * is certain. */
static int unsynchronized_host()
{
    enum { READS_MAX = 20000, PAUSE_US = 1000 };
    float *x, *pinned;
    cudaStream_t stream;
    cudaMalloc(reinterpret_cast<void **>(&x), 256);
    cudaMallocHost(reinterpret_cast<void **>(&pinned), 256);
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    const volatile float *seen = &pinned[3];
    pinned[3] = 1;
    put_gate(stream);
    cudaMemsetAsync(x, 0, 256, stream);
    cudaMemcpyAsync(pinned, x, 256, cudaMemcpyDeviceToHost, stream);
    open_gate();
    for (int i = 0; i < READS_MAX && *seen != 0.0f; i++)
        usleep(PAUSE_US);
    printf("values %g\n", static_cast<double>(*seen));
    cudaStreamSynchronize(stream);
    return 0;
}

/* Two streams write one array; nothing orders them. The kernel runs until it sees the other stream's value, so both are at
 * it at once; the host waits for the kernel first, lest it carry the news of one stream to the other. */
static int unordered_streams()
{
    float *x;
    cudaStream_t streams[2];
    cudaMalloc(reinterpret_cast<void **>(&x), 256);
    cudaMemset(x, 0, 256);
    for (cudaStream_t &s : streams)
        cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking);
    put_gate(streams[1]);
    sim_broken(SIM_STREAM_RACE, x, streams[0]);
    cudaMemsetAsync(x, 0x3f, 256, streams[1]);
    open_gate();
    cudaStreamSynchronize(streams[0]);
    return finish(x);
}

/* gemm without its second barrier, attention that waits for one group of copies too few: wrong results. */
static int wrong_gemm()
{
    enum { N = 64, K = 64 };
    std::vector<float> ones(N * K, 1.0f);
    float *a, *c;
    cudaMalloc(reinterpret_cast<void **>(&a), sizeof(float) * N * K);
    cudaMalloc(reinterpret_cast<void **>(&c), sizeof(float) * N * N);
    for (int i = 0; i < N * K; i++)
        ones[static_cast<size_t>(i)] = static_cast<float>(i % 7);
    cudaMemcpy(a, ones.data(), sizeof(float) * N * K, cudaMemcpyHostToDevice);
    sim_gemm(a, a, c, N, N, K, true, nullptr);
    if (cudaDeviceSynchronize() != cudaSuccess)
        return finish(c);
    std::vector<float> got(N * N);
    cudaMemcpy(got.data(), c, sizeof(float) * N * N, cudaMemcpyDeviceToHost);
    double want = 0;
    for (int k = 0; k < K; k++)
        want += static_cast<double>(ones[static_cast<size_t>(5 * K + k)]) * ones[static_cast<size_t>(k * N + 9)];
    printf("values %s\n", fabs(got[5 * N + 9] - want) > 0.5 ? "wrong" : "right");
    return 0;
}

static int wrong_flash()
{
    enum { KEYS = 128 };
    std::vector<uint16_t> ones(KEYS * 128, 0x3f80);
    uint16_t *q, *o;
    cudaMalloc(reinterpret_cast<void **>(&q), ones.size() * 2);
    cudaMalloc(reinterpret_cast<void **>(&o), ones.size() * 2);
    cudaMemcpy(q, ones.data(), ones.size() * 2, cudaMemcpyHostToDevice);
    sim_flash(q, q, q, o, 1, KEYS, KEYS, false, 0.1f, true, nullptr);
    cudaDeviceSynchronize();
    cudaMemcpy(ones.data(), o, ones.size() * 2, cudaMemcpyDeviceToHost);
    printf("values %s\n", (ones[0] & 0x7fff) > 0x7f80 ? "nan" : "right");
    return 0;
}

int main(int argc, char **argv)
{
    const char *name = argc > 1 ? argv[1] : "";
    if (!strcmp(name, "unsynchronized-host"))
        return unsynchronized_host();
    if (!strcmp(name, "unordered-streams"))
        return unordered_streams();
    if (!strcmp(name, "wrong-gemm"))
        return wrong_gemm();
    if (!strcmp(name, "wrong-flash"))
        return wrong_flash();
    for (int bug = 0; bug < SIM_BUG_COUNT; bug++) {
        if (strcmp(name, sim_bug_names[bug]))
            continue;
        float *x;
        if (cudaMalloc(reinterpret_cast<void **>(&x), 64 * sizeof(float)) != cudaSuccess)
            return 2;
        if (bug == SIM_BLOCK_RACE || bug == SIM_STREAM_RACE || bug == SIM_ENDLESS_LOOP)
            cudaMemset(x, 0, 256);
        if (bug == SIM_USE_AFTER_FREE)
            cudaFree(x);
        cudaError_t e = sim_broken(static_cast<enum sim_bug>(bug), x, nullptr);
        if (e != cudaSuccess) {
            printf("refused %s: %s\n", cudaGetErrorName(e), cudasim_error());
            return 1;
        }
        return finish(x);
    }
    fprintf(stderr, "sim_broken_run: no bug '%s'\n", name);
    return 2;
}
