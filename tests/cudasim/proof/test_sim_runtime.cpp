/* test_sim_runtime.cpp - devices, memory, streams and events behave as the CUDA runtime documents.
 * If this breaks, host code that is wrong on a GPU would pass here, or right code would fail. */
#include "sim_check.h"

#include <unistd.h>

#include <atomic>

static void devices_are_as_the_environment_says(void **)
{
    int count = 0, value = 0;
    must(cudaGetDeviceCount(&count));
    assert_int_equal(count, 2);
    struct cudaDeviceProp p;
    must(cudaGetDeviceProperties(&p, 1));
    assert_int_equal(p.major * 10 + p.minor, 86);
    assert_int_equal(p.totalGlobalMem, 128u << 20);
    must(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    assert_int_equal(value, 99 << 10);
    must_fail(cudaSetDevice(2), cudaErrorInvalidDevice);
    must_fail(cudaGetLastError(), cudaErrorInvalidDevice);
    must(cudaGetLastError());
}

static void memory_is_limited_per_device(void **)
{
    void *a, *b;
    size_t free_bytes, total_bytes;
    must(cudaMalloc(&a, 40u << 20));
    must(cudaMemGetInfo(&free_bytes, &total_bytes));
    assert_int_equal(total_bytes, 64u << 20);
    assert_int_equal(free_bytes, 24u << 20);
    must_fail(cudaMalloc(&b, (24u << 20) + 1), cudaErrorMemoryAllocation);
    must_say("cudaMalloc of 25165825 bytes: device 0 has 41943040 of 67108864 in use");
    assert_null(b);
    must(cudaSetDevice(1));
    must(cudaMalloc(&b, 120u << 20));
    must(cudaFree(b));
    must(cudaFree(a)); /* another device's memory */
    must(cudaSetDevice(0));
    must(cudaMalloc(&b, 64u << 20));
    must(cudaFree(b));
    struct cudasim_memory memory;
    assert_true(cudasim_memory_read(0, &memory));
    assert_int_equal(memory.peak_bytes, 64u << 20);
    assert_int_equal(memory.used_bytes, 0);
    cudasim_memory_reset_peak(0);
}

static void freed_memory_is_used_again(void **)
{
    void *blocks[16];
    for (int round = 0; round < 100; round++) {
        for (void *&b : blocks)
            must(cudaMalloc(&b, static_cast<size_t>(round) * 12345 + 1));
        for (int i = 0; i < 16; i++)
            must(cudaFree(blocks[i * 7 % 16]));
    }
    must_fail(cudaFree(blocks[0]), cudaErrorInvalidValue);
    must_say("not the start of an allocation");
}

static void copies_are_checked(void **)
{
    DeviceArray<char> d(1000);
    char host[1000];
    must_fail(cudaMemcpy(d.data, host, 1001, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    must_say("is not inside one allocation");
    must_fail(cudaMemcpy(d.data + 1, host, 1000, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    must_fail(cudaMemcpy(host, d.data, 1000, cudaMemcpyHostToDevice), cudaErrorInvalidMemcpyDirection);
    must_fail(cudaMemset(d.data, 0, 1001), cudaErrorInvalidValue);
    must_fail(cudaMemcpy2D(d.data, 100, host, 90, 95, 10, cudaMemcpyHostToDevice), cudaErrorInvalidPitchValue);
    must_fail(cudaMemcpy2D(d.data, 101, host, 100, 100, 10, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    must(cudaMemcpy2D(d.data, 100, host, 100, 100, 10, cudaMemcpyDefault));
    cudaGetLastError();
}

static void rows_are_copied_by_pitch(void **)
{
    std::vector<int> host(6 * 4, -1);
    std::vector<int> source(6 * 4);
    for (int i = 0; i < 24; i++)
        source[i] = i;
    DeviceArray<int> d(source);
    must(cudaMemcpy2D(host.data(), 16, d.data, 24, 12, 4, cudaMemcpyDeviceToHost));
    for (int r = 0; r < 4; r++)
        for (int c = 0; c < 4; c++)
            assert_int_equal(host[r * 4 + c], c < 3 ? r * 6 + c : -1);
}

static void launches_are_checked(void **)
{
    must_fail(sim_nothing(dim3(1), dim3(1025), 0, nullptr), cudaErrorInvalidConfiguration);
    must_say("a block of 1025 threads");
    must_fail(sim_nothing(dim3(0), dim3(32), 0, nullptr), cudaErrorInvalidConfiguration);
    must_fail(sim_nothing(dim3(1, 65536), dim3(32), 0, nullptr), cudaErrorInvalidConfiguration);
    must_fail(sim_nothing(dim3(1), dim3(32), (48 << 10) + 1, nullptr), cudaErrorInvalidValue);
    must_say("cudaFuncAttributeMaxDynamicSharedMemorySize");
    must(sim_nothing(dim3(2, 65535), dim3(1), 48 << 10, nullptr));
    must(cudaDeviceSynchronize());
}

/* Holds a stream until it is opened. */
struct Gate {
    std::atomic<bool> is_open{false};
    static void wait(void *gate)
    {
        while (!static_cast<Gate *>(gate)->is_open)
            usleep(100);
    }
};

static void a_failed_kernel_fails_its_device_and_no_other(void **)
{
    Gate gate;
    DeviceArray<float> x(64);
    must(cudaLaunchHostFunc(nullptr, Gate::wait, &gate)); /* a kernel that fails at once may fail its own launch */
    must(sim_broken(SIM_DIVERGENT_BARRIER, x.data, nullptr));
    gate.is_open = true;
    must_fail(cudaDeviceSynchronize(), cudaErrorLaunchFailure);
    must_say("divergent __syncthreads");
    void *p;
    must_fail(cudaMalloc(&p, 1), cudaErrorLaunchFailure);
    must_fail(sim_add(x.data, 1, 64, nullptr), cudaErrorLaunchFailure);
    must(cudaSetDevice(1));
    cudaGetLastError();
    {
        DeviceArray<float> y(std::vector<float>(64, 1.0f));
        must(sim_add(y.data, 1, 64, nullptr));
        must(cudaDeviceSynchronize());
        assert_true(y.read()[63] == 2.0f);
    }
    must(cudaSetDevice(0));
    cudasim_restore();
    must(sim_add(x.data, 1, 64, nullptr));
    must(cudaDeviceSynchronize());
}

/* --- streams ---------------------------------------------------------------------------------------------------------- */

struct Streams {
    cudaStream_t a, b;
    cudaEvent_t event;
    Streams()
    {
        must(cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking));
        must(cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking));
        must(cudaEventCreateWithFlags(&event, cudaEventDefault));
    }
    ~Streams()
    {
        cudaStreamDestroy(a);
        cudaStreamDestroy(b);
        cudaEventDestroy(event);
    }
};

static void the_host_does_not_wait_for_a_stream(void **)
{
    Streams s;
    Gate gate;
    DeviceArray<float> x(std::vector<float>(256, 0.0f));
    must(cudaLaunchHostFunc(s.a, Gate::wait, &gate));
    must(sim_add(x.data, 5, 256, s.a));
    must(cudaEventRecord(s.event, s.a));
    must_fail(cudaStreamQuery(s.a), cudaErrorNotReady);
    must_fail(cudaEventQuery(s.event), cudaErrorNotReady);
    must(cudaStreamSynchronize(s.b)); /* another stream: nothing to wait for */
    gate.is_open = true;
    must(cudaEventSynchronize(s.event));
    must(cudaStreamQuery(s.a));
    assert_true(x.read()[255] == 5.0f);
}

static void an_event_orders_two_streams(void **)
{
    Streams s;
    Gate gate;
    DeviceArray<float> x(std::vector<float>(256, 0.0f)), y(256);
    must(cudaLaunchHostFunc(s.a, Gate::wait, &gate));
    must(sim_add(x.data, 1, 256, s.a));
    must(cudaEventRecord(s.event, s.a));
    must(cudaStreamWaitEvent(s.b, s.event, 0));
    must(cudaMemcpyAsync(y.data, x.data, 256 * sizeof(float), cudaMemcpyDeviceToDevice, s.b));
    must_fail(cudaStreamQuery(s.b), cudaErrorNotReady);
    gate.is_open = true;
    must(cudaStreamSynchronize(s.b));
    assert_true(y.read()[255] == 1.0f);
}

static void the_default_stream_waits_for_blocking_streams(void **)
{
    cudaStream_t s;
    Gate gate;
    must(cudaStreamCreate(&s));
    DeviceArray<float> x(std::vector<float>(256, 0.0f));
    must(cudaLaunchHostFunc(s, Gate::wait, &gate));
    must(sim_add(x.data, 1, 256, s));
    must(sim_add(x.data, 2, 256, nullptr));
    must_fail(cudaStreamQuery(nullptr), cudaErrorNotReady);
    gate.is_open = true;
    must(cudaStreamSynchronize(nullptr));
    must(cudaStreamDestroy(s));
    assert_true(x.read()[0] == 3.0f);
}

static void pinned_copies_are_asynchronous_and_pageable_ones_are_not(void **)
{
    Streams s;
    Gate gate;
    float *pinned, pageable[64];
    must(cudaMallocHost(reinterpret_cast<void **>(&pinned), 256));
    memset(pinned, 0, 256);
    DeviceArray<float> x(std::vector<float>(64, 7.0f));
    must(cudaLaunchHostFunc(s.a, Gate::wait, &gate));
    must(cudaMemcpyAsync(pinned, x.data, 256, cudaMemcpyDeviceToHost, s.a));
    must_fail(cudaStreamQuery(s.a), cudaErrorNotReady);
    gate.is_open = true;
    must(cudaStreamSynchronize(s.a));
    assert_true(pinned[63] == 7.0f);
    must(cudaMemcpyAsync(pageable, x.data, 256, cudaMemcpyDeviceToHost, s.b));
    assert_true(pageable[63] == 7.0f);
    must(cudaFreeHost(pinned));
}

static void what_is_not_given_back_is_named(void **)
{
    char text[1024];
    cudaStream_t stream;
    cudaEvent_t event;
    void *device, *pinned;
    must(cudaStreamCreate(&stream));
    must(cudaEventCreate(&event));
    must(cudaMalloc(&device, 4321));
    must(cudaMallocHost(&pinned, 10));
    assert_int_equal(cudasim_leaks(text, sizeof text), 4);
    assert_non_null(strstr(text, "device 0: 4321 bytes not freed"));
    assert_non_null(strstr(text, "1 stream not closed"));
    assert_non_null(strstr(text, "1 event not closed"));
    assert_non_null(strstr(text, "1 pinned allocation not closed"));
    must(cudaStreamDestroy(stream));
    must(cudaEventDestroy(event));
    must(cudaFree(device));
    must(cudaFreeHost(pinned));
    assert_int_equal(cudasim_leaks(text, sizeof text), 0);
}

static void peers_copy_between_devices(void **)
{
    int can = 0;
    must(cudaDeviceCanAccessPeer(&can, 0, 1));
    assert_int_equal(can, 1);
    DeviceArray<int> x(std::vector<int>(100, 42));
    must(cudaSetDevice(1));
    must(cudaDeviceEnablePeerAccess(0, 0));
    {
        DeviceArray<int> y(100);
        must_fail(cudaMemcpyPeerAsync(y.data, 0, x.data, 0, 400, nullptr), cudaErrorInvalidValue);
        must(cudaMemcpyPeerAsync(y.data, 1, x.data, 0, 400, nullptr));
        must(cudaDeviceSynchronize());
        assert_int_equal(y.read()[99], 42);
    }
    must(cudaSetDevice(0));
}

int main(void)
{
    setenv("CUDASIM_DEVICES", "2", 1);
    setenv("CUDASIM_DEVICE", "rtx3090", 1);
    setenv("CUDASIM_VRAM_MB", "64,128", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(devices_are_as_the_environment_says, sim_nothing_left),
        cmocka_unit_test_teardown(memory_is_limited_per_device, sim_nothing_left),
        cmocka_unit_test_teardown(freed_memory_is_used_again, sim_nothing_left),
        cmocka_unit_test_teardown(copies_are_checked, sim_nothing_left),
        cmocka_unit_test_teardown(rows_are_copied_by_pitch, sim_nothing_left),
        cmocka_unit_test_teardown(launches_are_checked, sim_nothing_left),
        cmocka_unit_test_teardown(a_failed_kernel_fails_its_device_and_no_other, sim_nothing_left),
        cmocka_unit_test_teardown(the_host_does_not_wait_for_a_stream, sim_nothing_left),
        cmocka_unit_test_teardown(an_event_orders_two_streams, sim_nothing_left),
        cmocka_unit_test_teardown(the_default_stream_waits_for_blocking_streams, sim_nothing_left),
        cmocka_unit_test_teardown(pinned_copies_are_asynchronous_and_pageable_ones_are_not, sim_nothing_left),
        cmocka_unit_test_teardown(what_is_not_given_back_is_named, sim_nothing_left),
        cmocka_unit_test_teardown(peers_copy_between_devices, sim_nothing_left),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
