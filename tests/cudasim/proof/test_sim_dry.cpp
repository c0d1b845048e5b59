/* test_sim_dry.cpp - the dry device counts everything and executes nothing, at sizes no test machine has.
 * If this breaks, the tables of memory, launches and bytes for full-size models are wrong. */
#include "sim_check.h"

#include <cublasLt.h>

static void sixty_gigabytes_are_only_numbers(void **)
{
    void *blocks[30];
    for (void *&b : blocks)
        must(cudaMalloc(&b, size_t{2} << 30));
    struct cudasim_memory memory;
    assert_true(cudasim_memory_read(0, &memory));
    assert_int_equal(memory.used_bytes, size_t{60} << 30);
    void *more;
    must_fail(cudaMalloc(&more, size_t{20} << 30), cudaErrorMemoryAllocation);
    must(cudaMemset(blocks[29], 0, size_t{2} << 30));
    for (void *b : blocks)
        must(cudaFree(b));
    assert_true(cudasim_memory_read(0, &memory));
    assert_int_equal(memory.used_bytes, 0);
    assert_int_equal(memory.peak_bytes, size_t{60} << 30);
}

static void launches_are_counted_with_their_cost(void **)
{
    struct cudasim_counters before, after;
    const int rows = 1 << 20, columns = 3072;
    DeviceArray<uint16_t> x(static_cast<size_t>(rows) * columns);
    DeviceArray<float> w(static_cast<size_t>(columns));
    cudasim_counters_read(&before);
    must(sim_rms_norm(x.data, w.data, x.data, rows, columns, 1e-6f, nullptr));
    must(sim_flash(x.data, x.data, x.data, x.data, 24, 4096, 4096, false, 1, false, nullptr));
    must(sim_nothing(dim3(1), dim3(1), 0, nullptr)); /* says nothing about its cost */
    must(cudaDeviceSynchronize());
    cudasim_counters_read(&after);
    assert_int_equal(after.launches - before.launches, 3);
    assert_int_equal(after.host_waits - before.host_waits, 1);
    double flash = 4.0 * 24 * 4096 * 4096 * 128;
    assert_true(after.tensor_core_flops - before.tensor_core_flops == flash);
    assert_true(after.flops - before.flops == flash + 4.0 * rows * columns);
    assert_true(after.bytes - before.bytes == 4.0 * rows * columns + 4.0 * columns + 4.0 * 24 * 8192 * 128);
}

static double watched_flops, watched_bytes;
static int watched_count;

static void each_launch_is_shown_to_the_watcher(void **)
{
    DeviceArray<float> x(1000);
    cudasim_watch([](const cudasim_launch *l) -> double {
        watched_flops += l->flops;
        watched_bytes += l->bytes;
        watched_count += !strcmp(l->name, "add_kernel") && !l->is_library && !l->is_tensor_core;
        return 0;
    });
    must(sim_add(x.data, 1, 1000, nullptr));
    must(sim_add(x.data, 1, 1000, nullptr));
    must(cudaMemcpy(x.data, x.data + 500, 2000, cudaMemcpyDeviceToDevice));
    cudasim_watch(nullptr);
    must(sim_add(x.data, 1, 1000, nullptr));
    assert_int_equal(watched_count, 2);
    assert_true(watched_flops == 2000);
    assert_true(watched_bytes == 2 * 8000 + 2 * 2000);
}

/* Each launch takes a second: two in one stream, two in another from the first one's first on, and one behind all. */
static void streams_have_clocks_and_events_order_them(void **)
{
    DeviceArray<float> x(1000);
    cudaStream_t a, b;
    cudaEvent_t event;
    must(cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking));
    must(cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking));
    must(cudaEventCreate(&event));
    auto pass = [&] {
        must(sim_add(x.data, 1, 1000, a));
        must(cudaEventRecord(event, a));
        must(cudaStreamWaitEvent(b, event, 0));
        must(sim_add(x.data, 1, 1000, a));
        must(sim_add(x.data, 1, 1000, b));
        must(sim_add(x.data, 1, 1000, b));
        must(cudaEventRecord(event, b));
        must(cudaStreamWaitEvent(a, event, 0));
        must(sim_add(x.data, 1, 1000, a));
    };
    cudasim_watch([](const cudasim_launch *) { return 1.0; });
    double begun = cudasim_clock();
    pass();
    assert_true(cudasim_clock() - begun == 4);
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    must(cudaStreamBeginCapture(a, cudaStreamCaptureModeThreadLocal));
    pass();
    must(cudaStreamEndCapture(a, &graph));
    must(cudaGraphInstantiate(&exec, graph, 0));
    must(cudaGraphLaunch(exec, a));
    assert_true(cudasim_clock() - begun == 8);
    cudasim_watch(nullptr);
    must(cudaGraphExecDestroy(exec));
    must(cudaGraphDestroy(graph));
    must(cudaEventDestroy(event));
    must(cudaStreamDestroy(a));
    must(cudaStreamDestroy(b));
}

static void a_wait_with_launches_behind_it_is_a_stall(void **)
{
    struct cudasim_counters c;
    DeviceArray<float> x(1000);
    cudasim_counters_reset();
    must(cudaDeviceSynchronize()); /* nothing was launched before, but the device is idle until the next launch */
    must(sim_add(x.data, 1, 1000, nullptr));
    must(sim_add(x.data, 1, 1000, nullptr));
    must(cudaDeviceSynchronize());
    must(cudaDeviceSynchronize());
    cudasim_counters_read(&c);
    assert_int_equal(c.host_waits, 3);
    assert_int_equal(c.host_stalls, 1); /* the last two end the work */
}

static void checks_stay_on(void **)
{
    DeviceArray<float> x(100);
    float host[101] = {1};
    must_fail(cudaMemcpy(x.data, host, 404, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    must_fail(sim_nothing(dim3(1), dim3(2000), 0, nullptr), cudaErrorInvalidConfiguration);
    must(cudaMemcpy(host, x.data, 400, cudaMemcpyDeviceToHost));
    assert_true(host[0] == 0.0f); /* a dry device has no values: zeros */
}

static void a_device_before_fp8_refuses_it(void **)
{
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, d;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t result;
    int32_t trans = CUBLAS_OP_T;
    int found;
    cublasLtCreate(&handle);
    cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &trans, sizeof trans);
    cublasLtMatrixLayoutCreate(&a, CUDA_R_8F_E4M3, 64, 32, 64);
    cublasLtMatrixLayoutCreate(&d, CUDA_R_16BF, 32, 32, 32);
    cublasLtMatmulPreferenceCreate(&preference);
    assert_int_equal(cublasLtMatmulAlgoGetHeuristic(handle, desc, a, a, d, d, preference, 1, &result, &found),
                     CUBLAS_STATUS_NOT_SUPPORTED);
    must_say("fp8 needs compute capability 8.9, a100 has 8.0");
    cublasLtMatmulPreferenceDestroy(preference);
    cublasLtMatrixLayoutDestroy(a);
    cublasLtMatrixLayoutDestroy(d);
    cublasLtMatmulDescDestroy(desc);
    cublasLtDestroy(handle);
}

static void the_trace_has_a_line_for_everything(void **)
{
    char path[] = "/tmp/sim-trace.XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    fclose(fdopen(fd, "w"));
    assert_true(cudasim_trace(path));
    {
        DeviceArray<float> x(1000);
        cudasim_mark("step \"1\"");
        must(sim_add(x.data, 1, 1000, nullptr));
        must(cudaDeviceSynchronize());
    }
    assert_true(cudasim_trace(nullptr));
    assert_false(cudasim_trace("/nowhere/trace"));
    std::ifstream file(path);
    std::vector<std::string> lines;
    for (std::string line; std::getline(file, line);)
        lines.push_back(line);
    remove(path);
    const char *const want[] = {
        "{\"op\":\"malloc\",\"device\":0,\"bytes\":4000}",
        "{\"op\":\"mark\",\"name\":\"step \\\"1\\\"\"}",
        "{\"op\":\"kernel\",\"name\":\"add_kernel\",\"device\":0,\"stream\":0,\"grid\":[4,1,1],\"block\":[256,1,1],"
        "\"shared\":0,\"bytes\":8000,\"flops\":1000,\"tensor_core\":false}",
        "{\"op\":\"host_wait\",\"name\":\"cudaDeviceSynchronize\",\"device\":0}",
        "{\"op\":\"free\",\"device\":0,\"bytes\":4000}",
    };
    assert_int_equal(lines.size(), 5);
    for (int i = 0; i < 5; i++)
        assert_string_equal(lines[i].c_str(), want[i]);
}

int main(void)
{
    setenv("CUDASIM_MODE", "dry", 1);
    setenv("CUDASIM_VRAM_MB", "65536", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(sixty_gigabytes_are_only_numbers, sim_nothing_left),
        cmocka_unit_test_teardown(launches_are_counted_with_their_cost, sim_nothing_left),
        cmocka_unit_test_teardown(each_launch_is_shown_to_the_watcher, sim_nothing_left),
        cmocka_unit_test_teardown(streams_have_clocks_and_events_order_them, sim_nothing_left),
        cmocka_unit_test_teardown(a_wait_with_launches_behind_it_is_a_stall, sim_nothing_left),
        cmocka_unit_test_teardown(checks_stay_on, sim_nothing_left),
        cmocka_unit_test_teardown(a_device_before_fp8_refuses_it, sim_nothing_left),
        cmocka_unit_test_teardown(the_trace_has_a_line_for_everything, sim_nothing_left),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
