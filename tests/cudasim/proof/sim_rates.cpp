/* sim_rates.cpp - how fast the simulator is on this machine: the table of README.md. JSON lines, as ops/bench prints. */
#include <cuda_runtime_api.h>
#include <cublasLt.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include <vector>

#include "sim_kernels.h"

static double now()
{
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

template <class Run> static double best_of(int times, Run run)
{
    double best = 1e30;
    for (int i = 0; i < times; i++) {
        double start = now();
        run();
        cudaDeviceSynchronize();
        double s = now() - start;
        best = s < best ? s : best;
    }
    return best;
}

static void print(const char *name, double value, const char *unit)
{
    printf("{\"name\":\"sim.%s\",\"value\":%.4g,\"unit\":\"%s\"}\n", name, value, unit);
}

static double linear_seconds(float *x, int m, int n, int k)
{
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, d;
    int32_t trans = CUBLAS_OP_T;
    float one = 1, zero = 0;
    cublasLtCreate(&handle);
    cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &trans, sizeof trans);
    cublasLtMatrixLayoutCreate(&a, CUDA_R_16BF, k, m, k);
    cublasLtMatrixLayoutCreate(&b, CUDA_R_16BF, k, n, k);
    cublasLtMatrixLayoutCreate(&d, CUDA_R_16BF, m, n, m);
    double s = best_of(3, [&] {
        cublasLtMatmul(handle, desc, &one, x, a, x, b, &zero, x + (1 << 22), d, x + (1 << 22), d, nullptr, nullptr, 0, nullptr);
    });
    cublasLtMatrixLayoutDestroy(a);
    cublasLtMatrixLayoutDestroy(b);
    cublasLtMatrixLayoutDestroy(d);
    cublasLtMatmulDescDestroy(desc);
    cublasLtDestroy(handle);
    return s;
}

int main()
{
    enum { N = 1 << 23 };
    float *x;
    if (cudaMalloc(reinterpret_cast<void **>(&x), N * sizeof(float)) != cudaSuccess)
        return 1;
    cudaMemset(x, 0, N * sizeof(float));
    sim_nothing(dim3(8), dim3(1024), 0, nullptr); /* makes the fibers */
    print("elements", 4e6 / best_of(3, [&] { sim_rate_run(SIM_RATE_ELEMENTS, x, 4000000, nullptr); }), "threads/s");
    print("barriers", 8.0 * 256 * 10000 / best_of(3, [&] { sim_rate_run(SIM_RATE_BARRIERS, x, 10000, nullptr); }), "arrivals/s");
    print("shuffles", 8.0 * 256 * 10000 / best_of(3, [&] { sim_rate_run(SIM_RATE_SHUFFLES, x, 10000, nullptr); }), "lanes/s");
    double mma = best_of(3, [&] { sim_rate_run(SIM_RATE_MMA, x, 5000, nullptr); });
    print("mma", 8.0 * 4 * 5000 / mma, "warp instructions/s");
    uint16_t *h = reinterpret_cast<uint16_t *>(x);
    print("flash_2x256x128", best_of(3, [&] {
              sim_flash(h, h, h, h + (1 << 22), 2, 256, 256, false, 0.1f, false, nullptr);
          }) * 1e3, "ms");
    print("matmul_bf16", 2.0 * 1024 * 256 * 1024 / linear_seconds(x, 1024, 256, 1024) * 1e-9, "GFLOP/s");
    print("launch", best_of(3, [&] {
              for (int i = 0; i < 1000; i++)
                  sim_nothing(dim3(1), dim3(32), 0, nullptr);
          }) * 1e3, "us");
    cudaFree(x);
    return 0;
}
