/* test_sim_matmul.cpp - cublasLtMatmul gives the product, its epilogues and scales, and refuses what the library refuses.
 * If this breaks, every layer of a model is wrong, or a call that fails on a GPU passes here.
 * Expected values: the definition in double precision. */
#include "sim_check.h"

#include <cublasLt.h>

#include <cuda_fp16.h>
#include <cuda_fp8.h>

/* d[n, m] = x[n, k] w[m, k]^T, as a linear layer: w is a, transposed; x is b. Column-major for the library. */
struct Linear {
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulAlgo_t algo;
    size_t workspace_bytes = 0;

    Linear(cudaDataType_t in, cudaDataType_t out, uint64_t m, uint64_t n, uint64_t k,
           cublasComputeType_t compute = CUBLAS_COMPUTE_32F)
    {
        int32_t trans = CUBLAS_OP_T;
        assert_int_equal(cublasLtCreate(&handle), CUBLAS_STATUS_SUCCESS);
        assert_int_equal(cublasLtMatmulDescCreate(&desc, compute, CUDA_R_32F), CUBLAS_STATUS_SUCCESS);
        set(CUBLASLT_MATMUL_DESC_TRANSA, trans);
        cublasLtMatrixLayoutCreate(&a, in, k, m, static_cast<int64_t>(k));
        cublasLtMatrixLayoutCreate(&b, in, k, n, static_cast<int64_t>(k));
        cublasLtMatrixLayoutCreate(&d, out, m, n, static_cast<int64_t>(m));
        cublasLtMatmulPreferenceCreate(&preference);
    }
    ~Linear()
    {
        cublasLtMatmulPreferenceDestroy(preference);
        cublasLtMatrixLayoutDestroy(a);
        cublasLtMatrixLayoutDestroy(b);
        cublasLtMatrixLayoutDestroy(d);
        cublasLtMatmulDescDestroy(desc);
        cublasLtDestroy(handle);
    }
    template <class T> void set(cublasLtMatmulDescAttributes_t attribute, T value)
    {
        assert_int_equal(cublasLtMatmulDescSetAttribute(desc, attribute, &value, sizeof value), CUBLAS_STATUS_SUCCESS);
    }
    template <class T> void prefer(cublasLtMatmulPreferenceAttributes_t attribute, T value)
    {
        assert_int_equal(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value),
                         CUBLAS_STATUS_SUCCESS);
    }
    cublasStatus_t choose()
    {
        cublasLtMatmulHeuristicResult_t result;
        int found;
        cublasStatus_t s =
            cublasLtMatmulAlgoGetHeuristic(handle, desc, a, b, d, d, preference, 1, &result, &found);
        if (s == CUBLAS_STATUS_SUCCESS) {
            algo = result.algo;
            workspace_bytes = result.workspaceSize;
        }
        return s;
    }
    cublasStatus_t run(const void *w, const void *x, void *y, void *workspace = nullptr, float alpha = 1, float beta = 0)
    {
        return cublasLtMatmul(handle, desc, &alpha, w, a, x, b, &beta, y, d, y, d, &algo, workspace, workspace_bytes,
                              nullptr);
    }
};

static double dot(const std::vector<float> &w, const std::vector<float> &x, size_t row, size_t column, size_t k)
{
    double sum = 0;
    for (size_t i = 0; i < k; i++)
        sum += static_cast<double>(w[row * k + i]) * x[column * k + i];
    return sum;
}

static std::vector<float> widen(const std::vector<uint16_t> &v)
{
    std::vector<float> f(v.size());
    for (size_t i = 0; i < v.size(); i++)
        f[i] = sim_from_bf16(v[i]);
    return f;
}

static void a_linear_layer_in_f32(void **)
{
    const size_t m = 37, n = 19, k = 101;
    std::vector<float> w = sim_numbers(1, m * k), x = sim_numbers(2, n * k);
    DeviceArray<float> dw(w), dx(x), dy(m * n);
    Linear l(CUDA_R_32F, CUDA_R_32F, m, n, k);
    assert_int_equal(l.choose(), CUBLAS_STATUS_SUCCESS);
    assert_int_equal(l.run(dw.data, dx.data, dy.data), CUBLAS_STATUS_SUCCESS);
    must(cudaDeviceSynchronize());
    std::vector<float> y = dy.read();
    for (size_t c = 0; c < n; c++)
        for (size_t r = 0; r < m; r++)
            assert_true(fabs(y[c * m + r] - dot(w, x, r, c, k)) < 1e-4);
}

static void bias_and_gelu_in_bf16(void **)
{
    const size_t m = 48, n = 20, k = 64;
    std::vector<uint16_t> w = sim_numbers_bf16(3, m * k), x = sim_numbers_bf16(4, n * k), bias = sim_numbers_bf16(5, m);
    DeviceArray<uint16_t> dw(w), dx(x), dbias(bias), dy(m * n);
    Linear l(CUDA_R_16BF, CUDA_R_16BF, m, n, k);
    l.set(CUBLASLT_MATMUL_DESC_EPILOGUE, static_cast<uint32_t>(CUBLASLT_EPILOGUE_GELU_BIAS));
    assert_int_equal(l.choose(), CUBLAS_STATUS_SUCCESS);
    assert_int_equal(l.run(dw.data, dx.data, dy.data), CUBLAS_STATUS_INVALID_VALUE); /* no bias yet */
    l.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<const void *>(dbias.data));
    assert_int_equal(l.run(dw.data, dx.data, dy.data), CUBLAS_STATUS_SUCCESS);
    must(cudaDeviceSynchronize());
    std::vector<uint16_t> y = dy.read();
    for (size_t c = 0; c < n; c++)
        for (size_t r = 0; r < m; r++) {
            double v = dot(widen(w), widen(x), r, c, k) + sim_from_bf16(bias[r]);
            double want = 0.5 * v * (1 + tanh(0.7978845608028654 * (v + 0.044715 * v * v * v)));
            assert_true(fabs(sim_from_bf16(y[c * m + r]) - want) <= fabs(want) / 256 + 1e-4);
        }
}

static void beta_adds_what_was_there(void **)
{
    const size_t m = 16, n = 8, k = 32;
    std::vector<float> w = sim_numbers(6, m * k), x = sim_numbers(7, n * k), y0 = sim_numbers(8, m * n);
    DeviceArray<float> dw(w), dx(x), dy(y0);
    Linear l(CUDA_R_32F, CUDA_R_32F, m, n, k);
    assert_int_equal(l.choose(), CUBLAS_STATUS_SUCCESS);
    assert_int_equal(l.run(dw.data, dx.data, dy.data, nullptr, 2, 0.5f), CUBLAS_STATUS_SUCCESS);
    must(cudaDeviceSynchronize());
    assert_true(fabs(dy.read()[3 * m + 5] - (2 * dot(w, x, 5, 3, k) + 0.5 * y0[3 * m + 5])) < 1e-4);
}

static void fp8_uses_the_scales(void **)
{
    const size_t m = 32, n = 5, k = 48;
    std::vector<float> w(m * k), x(n * k);
    std::vector<uint8_t> w8(m * k), x8(n * k);
    auto round = [](float v, uint8_t *bits) {
        *bits = __nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3);
        return __half2float(__half(__nv_cvt_fp8_to_halfraw(*bits, __NV_E4M3)));
    };
    for (size_t i = 0; i < w.size(); i++)
        w[i] = round(sim_number(9, static_cast<uint32_t>(i)) * 50, &w8[i]);
    for (size_t i = 0; i < x.size(); i++)
        x[i] = round(sim_number(10, static_cast<uint32_t>(i)) * 50, &x8[i]);
    DeviceArray<uint8_t> dw(w8), dx(x8);
    DeviceArray<uint16_t> dy(m * n);
    DeviceArray<float> scales(std::vector<float>{0.01f, 0.03f});
    Linear l(CUDA_R_8F_E4M3, CUDA_R_16BF, m, n, k);
    l.set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, static_cast<const void *>(scales.data));
    l.set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, static_cast<const void *>(scales.data + 1));
    assert_int_equal(l.choose(), CUBLAS_STATUS_SUCCESS);
    assert_int_equal(l.run(dw.data, dx.data, dy.data), CUBLAS_STATUS_SUCCESS);
    must(cudaDeviceSynchronize());
    std::vector<uint16_t> y = dy.read();
    for (size_t c = 0; c < n; c++)
        for (size_t r = 0; r < m; r++) {
            double want = dot(w, x, r, c, k) * 0.01 * 0.03;
            assert_true(fabs(sim_from_bf16(y[c * m + r]) - want) <= fabs(want) / 256 + 1e-4);
        }
    Linear plain(CUDA_R_8F_E4M3, CUDA_R_16BF, m, n, k); /* without scales there is the factor that all products have */
    assert_int_equal(plain.choose(), CUBLAS_STATUS_SUCCESS);
    assert_int_equal(plain.run(dw.data, dx.data, dy.data, nullptr, 0.01f * 0.03f), CUBLAS_STATUS_SUCCESS);
    must(cudaDeviceSynchronize());
    y = dy.read();
    assert_true(fabs(sim_from_bf16(y[2 * m + 5]) / (dot(w, x, 5, 2, k) * 0.01 * 0.03) - 1) <= 1.0 / 256);
}

static void fp8_is_refused_where_the_library_refuses_it(void **)
{
    /* That a device before 8.9 refuses it is in test_sim_dry, which simulates one. */
    Linear odd(CUDA_R_8F_E4M3, CUDA_R_16BF, 24, 8, 64);
    assert_int_equal(odd.choose(), CUBLAS_STATUS_NOT_SUPPORTED);
    must_say("multiples of 16");
    Linear l(CUDA_R_8F_E4M3, CUDA_R_16BF, 32, 8, 64);
    l.set(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, static_cast<int32_t>(CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F));
    assert_int_equal(l.choose(), CUBLAS_STATUS_NOT_SUPPORTED);
    must_say("capability 9.0");
}

static void operands_must_lie_inside_their_allocations(void **)
{
    const size_t m = 16, n = 8, k = 32;
    DeviceArray<float> w(m * k), x(n * k), y(m * n - 1);
    std::vector<float> host(m * n);
    Linear l(CUDA_R_32F, CUDA_R_32F, m, n, k);
    assert_int_equal(l.choose(), CUBLAS_STATUS_SUCCESS);
    assert_int_equal(l.run(w.data, x.data, y.data), CUBLAS_STATUS_INVALID_VALUE);
    must_say("d of 512 bytes is not inside one allocation");
    assert_int_equal(l.run(host.data(), x.data, y.data), CUBLAS_STATUS_INVALID_VALUE);
    assert_int_equal(l.run(w.data, x.data + 1, y.data), CUBLAS_STATUS_NOT_SUPPORTED);
    must_say("not aligned to 16 bytes");
    l.prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<uint32_t>(4));
    assert_int_equal(l.choose(), CUBLAS_STATUS_SUCCESS);
    assert_int_equal(l.run(w.data, x.data + 1, y.data), CUBLAS_STATUS_INVALID_VALUE); /* beyond its end now */
}

/* What makes the product fix its algorithm: another batch, another algorithm, another last bit. */
static void the_heuristic_depends_on_the_batch_and_a_fixed_algorithm_does_not(void **)
{
    const size_t m = 64, k = 2048, small = 2, large = 512;
    std::vector<float> w = sim_numbers(11, m * k), x = sim_numbers(12, large * k);
    DeviceArray<float> dw(w), dx(x), dy(m * large), scratch(m * large * 4);
    Linear a(CUDA_R_32F, CUDA_R_32F, m, small, k), b(CUDA_R_32F, CUDA_R_32F, m, large, k);
    for (Linear *l : {&a, &b}) {
        l->prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(scratch.count * 4));
        assert_int_equal(l->choose(), CUBLAS_STATUS_SUCCESS);
    }
    assert_int_equal(a.run(dw.data, dx.data, dy.data, scratch.data), CUBLAS_STATUS_SUCCESS);
    must(cudaDeviceSynchronize());
    std::vector<float> chosen_small = dy.read();
    assert_int_equal(b.run(dw.data, dx.data, dy.data, scratch.data), CUBLAS_STATUS_SUCCESS);
    must(cudaDeviceSynchronize());
    std::vector<float> chosen_large = dy.read();
    assert_memory_not_equal(chosen_small.data(), chosen_large.data(), m * small * sizeof(float));
    a.algo = b.algo; /* the weight's algorithm, whatever the batch */
    a.workspace_bytes = b.workspace_bytes;
    assert_int_equal(a.run(dw.data, dx.data, dy.data, scratch.data), CUBLAS_STATUS_SUCCESS);
    must(cudaDeviceSynchronize());
    assert_memory_equal(dy.read().data(), chosen_large.data(), m * small * sizeof(float));
}

static void batches_go_by_their_strides(void **)
{
    const size_t m = 16, n = 4, k = 16, batch = 3;
    std::vector<float> w = sim_numbers(13, m * k * batch), x = sim_numbers(14, n * k * batch);
    DeviceArray<float> dw(w), dx(x), dy(m * n * batch);
    Linear l(CUDA_R_32F, CUDA_R_32F, m, n, k);
    int32_t count = batch;
    int64_t strides[] = {static_cast<int64_t>(m * k), static_cast<int64_t>(n * k), static_cast<int64_t>(m * n)};
    cublasLtMatrixLayout_t layouts[] = {l.a, l.b, l.d};
    for (int i = 0; i < 3; i++) {
        cublasLtMatrixLayoutSetAttribute(layouts[i], CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count);
        cublasLtMatrixLayoutSetAttribute(layouts[i], CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &strides[i], 8);
    }
    assert_int_equal(l.choose(), CUBLAS_STATUS_SUCCESS);
    struct cudasim_counters before, after;
    cudasim_counters_read(&before);
    assert_int_equal(l.run(dw.data, dx.data, dy.data), CUBLAS_STATUS_SUCCESS);
    must(cudaDeviceSynchronize());
    cudasim_counters_read(&after);
    assert_true(after.flops - before.flops == 2.0 * m * n * k * batch);
    std::vector<float> y = dy.read(), w2(w.begin() + 2 * m * k, w.end()), x2(x.begin() + 2 * n * k, x.end());
    assert_true(fabs(y[2 * m * n + 3 * m + 7] - dot(w2, x2, 7, 3, k)) < 1e-4);
}

int main(void)
{
    setenv("CUDASIM_DEVICE", "rtx4090", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(a_linear_layer_in_f32, sim_nothing_left),
        cmocka_unit_test_teardown(bias_and_gelu_in_bf16, sim_nothing_left),
        cmocka_unit_test_teardown(beta_adds_what_was_there, sim_nothing_left),
        cmocka_unit_test_teardown(fp8_uses_the_scales, sim_nothing_left),
        cmocka_unit_test_teardown(fp8_is_refused_where_the_library_refuses_it, sim_nothing_left),
        cmocka_unit_test_teardown(operands_must_lie_inside_their_allocations, sim_nothing_left),
        cmocka_unit_test_teardown(the_heuristic_depends_on_the_batch_and_a_fixed_algorithm_does_not, sim_nothing_left),
        cmocka_unit_test_teardown(batches_go_by_their_strides, sim_nothing_left),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
