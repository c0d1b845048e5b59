/* test_sim_faults.cpp - injected faults happen where, when and as often as they were asked for.
 * If this breaks, tests of the product's failure paths would pass without a failure. */
#include "sim_check.h"

static void the_nth_allocation_fails_once(void **)
{
    void *p[4] = {};
    assert_true(cudasim_fault("malloc:3"));
    for (int i = 0; i < 4; i++)
        if (i == 2)
            must_fail(cudaMalloc(&p[i], 100), cudaErrorMemoryAllocation);
        else
            must(cudaMalloc(&p[i], 100));
    for (void *q : p)
        must(cudaFree(q));
}

static void a_launch_fails_at_the_launch_and_a_kernel_later(void **)
{
    DeviceArray<float> x(std::vector<float>(64, 0.0f));
    assert_true(cudasim_fault("launch:2"));
    must(sim_add(x.data, 1, 64, nullptr));
    must_fail(sim_add(x.data, 1, 64, nullptr), cudaErrorLaunchOutOfResources);
    must(sim_add(x.data, 1, 64, nullptr));
    must(cudaDeviceSynchronize()); /* not sticky */
    assert_true(x.read()[0] == 2.0f);

    assert_true(cudasim_fault("kernel:2=cudaErrorECCUncorrectable"));
    must(sim_add(x.data, 1, 64, nullptr));
    cudaError_t launched = sim_add(x.data, 1, 64, nullptr); /* may or may not have run already */
    assert_true(launched == cudaSuccess || launched == cudaErrorECCUncorrectable);
    must_fail(cudaDeviceSynchronize(), cudaErrorECCUncorrectable);
    must_fail(sim_add(x.data, 1, 64, nullptr), cudaErrorECCUncorrectable); /* sticky */
}

static void a_lost_device_stays_lost(void **)
{
    void *p;
    assert_true(cudasim_fault("lost:2@0"));
    must(cudaMalloc(&p, 100));
    must_fail(cudaStreamSynchronize(nullptr), cudaErrorDevicesUnavailable);
    must_fail(cudaDeviceSynchronize(), cudaErrorDevicesUnavailable);
    must_say("was lost at cudaStreamSynchronize (injected)");
    assert_int_equal(cudaFree(p), cudaErrorDevicesUnavailable); /* gives it back none the less */
    must(cudaSetDevice(1));                                     /* the other one works */
    must(cudaDeviceSynchronize());
    cudasim_restore();
    must(cudaSetDevice(0));
    must(cudaDeviceSynchronize());
}

static void any_call_can_be_made_to_fail(void **)
{
    int failures = 0;
    for (int n = 1; n <= 6; n++) {
        cudasim_fault(("any:" + std::to_string(n)).c_str());
        void *p = nullptr;
        cudaStream_t s = nullptr;
        failures += cudaStreamCreate(&s) != cudaSuccess;
        failures += cudaMalloc(&p, 400) != cudaSuccess;
        if (p && s) {
            failures += cudaMemsetAsync(p, 0, 400, s) != cudaSuccess;
            cudaGetLastError();
            failures += sim_add(static_cast<float *>(p), 1, 100, s) != cudaSuccess;
            failures += cudaStreamSynchronize(s) != cudaSuccess;
        }
        cudasim_fault(nullptr);
        if (s)
            must(cudaStreamDestroy(s));
        must(cudaFree(p));
    }
    assert_int_equal(failures, 5); /* there are five calls; the sixth fault never came */
}

static void a_stuck_kernel_is_ended_by_the_limit(void **)
{
    DeviceArray<float> x(std::vector<float>(64, 0.0f));
    assert_true(cudasim_fault("stuck:1"));
    must(sim_add(x.data, 1, 64, nullptr));
    must_fail(cudaStreamQuery(nullptr), cudaErrorNotReady);
    must_fail(cudaDeviceSynchronize(), cudaErrorLaunchTimeout);
    must_say("did not end (injected)");
    cudasim_restore();
    assert_true(x.read()[0] == 0.0f);
}

static void a_list_that_cannot_be_read_changes_nothing(void **)
{
    assert_false(cudasim_fault("mallok:3"));
    assert_false(cudasim_fault("malloc"));
    assert_false(cudasim_fault("malloc:0"));
    assert_false(cudasim_fault("malloc:1,launch:x"));
    assert_false(cudasim_fault("slow:1"));
    assert_false(cudasim_fault("kernel:1=cudaErrorBogus"));
    assert_false(cudasim_fault("malloc:1;launch:2"));
    assert_true(cudasim_fault("malloc:1*2,launch:1=cudaErrorUnknown@0,slow:2=50@1"));
    void *p;
    must_fail(cudaMalloc(&p, 1), cudaErrorMemoryAllocation);
    must_fail(cudaMalloc(&p, 1), cudaErrorMemoryAllocation);
    must(cudaMalloc(&p, 1));
    must(cudaFree(p));
}

int main(void)
{
    setenv("CUDASIM_DEVICES", "2", 1);
    setenv("CUDASIM_KERNEL_LIMIT_MS", "2000", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(the_nth_allocation_fails_once, sim_nothing_left),
        cmocka_unit_test_teardown(a_launch_fails_at_the_launch_and_a_kernel_later, sim_nothing_left),
        cmocka_unit_test_teardown(a_lost_device_stays_lost, sim_nothing_left),
        cmocka_unit_test_teardown(any_call_can_be_made_to_fail, sim_nothing_left),
        cmocka_unit_test_teardown(a_stuck_kernel_is_ended_by_the_limit, sim_nothing_left),
        cmocka_unit_test_teardown(a_list_that_cannot_be_read_changes_nothing, sim_nothing_left),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
