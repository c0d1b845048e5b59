/* test_sim_kernels.cpp - correct kernels give the right numbers, whatever the order of threads, blocks and copies.
 * If this breaks, nothing the simulator says about the product's kernels can be believed.
 * Expected values: the definition of each operation in double precision, below. ctest runs this program under several
 * schedules (CMakeLists.txt). */
#include "sim_check.h"

static void rms_norm_is_right(void **)
{
    const int rows = 24, columns = 1032;
    std::vector<uint16_t> x = sim_numbers_bf16(1, static_cast<size_t>(rows) * columns);
    std::vector<float> w = sim_numbers(2, columns);
    DeviceArray<uint16_t> dx(x), dy(x.size());
    DeviceArray<float> dw(w);
    must(sim_rms_norm(dx.data, dw.data, dy.data, rows, columns, 1e-6f, nullptr));
    must(cudaDeviceSynchronize());
    std::vector<uint16_t> y = dy.read();
    for (int r = 0; r < rows; r++) {
        double sum = 0;
        for (int c = 0; c < columns; c++)
            sum += pow(sim_from_bf16(x[r * columns + c]), 2);
        double scale = 1 / sqrt(sum / columns + 1e-6);
        for (int c = 0; c < columns; c++) {
            double want = sim_from_bf16(x[r * columns + c]) * scale * w[c];
            /* One rounding to bf16 (2^-8), and f32 sums of 1032 terms. */
            assert_true(fabs(sim_from_bf16(y[r * columns + c]) - want) <= fabs(want) * (1.0 / 256 + 1e-5) + 1e-30);
        }
    }
}

static void gemm_is_right(void **)
{
    const int m = 130, n = 70, k = 97; /* none a multiple of the tile */
    std::vector<float> a = sim_numbers(3, m * k), b = sim_numbers(4, k * n);
    DeviceArray<float> da(a), db(b), dc(m * n);
    must(sim_gemm(da.data, db.data, dc.data, m, n, k, false, nullptr));
    must(cudaDeviceSynchronize());
    std::vector<float> c = dc.read();
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            double want = 0, size = 0;
            for (int d = 0; d < k; d++) {
                want += static_cast<double>(a[i * k + d]) * b[d * n + j];
                size += fabs(static_cast<double>(a[i * k + d]) * b[d * n + j]);
            }
            assert_true(fabs(c[i * n + j] - want) <= size * k * 6e-8);
        }
}

static void check_flash(int heads, int queries, int keys, bool is_causal)
{
    const int width = 128;
    std::vector<uint16_t> q = sim_numbers_bf16(5, static_cast<size_t>(heads) * queries * width);
    std::vector<uint16_t> k = sim_numbers_bf16(6, static_cast<size_t>(heads) * keys * width);
    std::vector<uint16_t> v = sim_numbers_bf16(7, static_cast<size_t>(heads) * keys * width);
    DeviceArray<uint16_t> dq(q), dk(k), dv(v), out(q.size());
    const float scale = 1 / sqrtf(width);
    must(sim_flash(dq.data, dk.data, dv.data, out.data, heads, queries, keys, is_causal, scale, false, nullptr));
    must(cudaDeviceSynchronize());
    std::vector<uint16_t> o = out.read();
    std::vector<double> p(keys);
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < queries; i++) {
            int seen = is_causal && i + 1 < keys ? i + 1 : keys;
            double sum = 0;
            for (int j = 0; j < seen; j++) {
                double s = 0;
                for (int d = 0; d < width; d++)
                    s += static_cast<double>(sim_from_bf16(q[(h * queries + i) * width + d])) *
                         sim_from_bf16(k[(h * keys + j) * width + d]);
                p[j] = exp(s * scale);
                sum += p[j];
            }
            for (int d = 0; d < width; d++) {
                double want = 0, size = 0;
                for (int j = 0; j < seen; j++) {
                    want += p[j] / sum * sim_from_bf16(v[(h * keys + j) * width + d]);
                    size += p[j] / sum * fabs(sim_from_bf16(v[(h * keys + j) * width + d]));
                }
                /* Weights are rounded to bf16 before the second product, the result once more. */
                double error = fabs(sim_from_bf16(o[(h * queries + i) * width + d]) - want);
                assert_true(error <= size / 256 + fabs(want) / 256 + 1e-6);
            }
        }
}

static void attention_is_right(void **)
{
    check_flash(2, 128, 192, false);
}

static void ragged_attention_is_right(void **)
{
    check_flash(2, 70, 77, false);
}

static void causal_attention_is_right(void **)
{
    check_flash(1, 77, 130, true);
}

static void results_do_not_depend_on_the_schedule(void **)
{
    const int keys = 77;
    std::vector<uint16_t> q = sim_numbers_bf16(8, keys * 128);
    DeviceArray<uint16_t> dq(q), out(q.size());
    std::vector<uint16_t> first;
    for (const char *order : {"fwd", "rev", "rand:1", "rand:2"}) {
        assert_true(cudasim_order(order));
        must(sim_flash(dq.data, dq.data, dq.data, out.data, 1, keys, keys, false, 0.1f, false, nullptr));
        must(cudaDeviceSynchronize());
        std::vector<uint16_t> now = out.read();
        if (first.empty())
            first = now;
        assert_memory_equal(first.data(), now.data(), first.size() * 2);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(rms_norm_is_right, sim_nothing_left),
        cmocka_unit_test_teardown(gemm_is_right, sim_nothing_left),
        cmocka_unit_test_teardown(attention_is_right, sim_nothing_left),
        cmocka_unit_test_teardown(ragged_attention_is_right, sim_nothing_left),
        cmocka_unit_test_teardown(causal_attention_is_right, sim_nothing_left),
        cmocka_unit_test_teardown(results_do_not_depend_on_the_schedule, sim_nothing_left),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
