/* test_sim_graph.cpp - captured graphs replay what was captured, in any order their edges allow.
 * If this breaks, a graph with a missing edge, or a call that cannot be captured, would be found on a GPU only. */
#include "sim_check.h"

struct Fixture {
    cudaStream_t main, side;
    cudaEvent_t fork, join;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    Fixture()
    {
        must(cudaStreamCreateWithFlags(&main, cudaStreamNonBlocking));
        must(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking));
        must(cudaEventCreateWithFlags(&fork, cudaEventDisableTiming));
        must(cudaEventCreateWithFlags(&join, cudaEventDisableTiming));
    }
    ~Fixture()
    {
        if (exec)
            cudaGraphExecDestroy(exec);
        if (graph)
            cudaGraphDestroy(graph);
        cudaEventDestroy(fork);
        cudaEventDestroy(join);
        cudaStreamDestroy(main);
        cudaStreamDestroy(side);
    }
    void begin()
    {
        must(cudaStreamBeginCapture(main, cudaStreamCaptureModeThreadLocal));
    }
    void end()
    {
        must(cudaStreamEndCapture(main, &graph));
        must(cudaGraphInstantiate(&exec, graph, 0));
    }
};

static void a_graph_does_nothing_until_launched_and_then_every_time(void **)
{
    Fixture f;
    DeviceArray<float> x(std::vector<float>(300, 0.0f));
    f.begin();
    must(sim_add(x.data, 1, 300, f.main));
    must(sim_add(x.data, 10, 300, f.main));
    f.end();
    assert_true(x.read()[0] == 0.0f);
    struct cudasim_counters before, after;
    cudasim_counters_read(&before);
    for (int i = 0; i < 3; i++)
        must(cudaGraphLaunch(f.exec, f.main));
    must(cudaStreamSynchronize(f.main));
    cudasim_counters_read(&after);
    assert_true(x.read()[299] == 33.0f);
    assert_int_equal(after.graph_launches - before.graph_launches, 3);
    assert_int_equal(after.launches - before.launches, 6);
    assert_true(after.bytes - before.bytes == 6 * 8.0 * 300);
}

/* x = 0; then y on side and z on main, at once; then x from y. */
static void fork_and_join(Fixture *f, float *x, float *y, float *z)
{
    f->begin();
    must(cudaMemsetAsync(x, 0, 400, f->main));
    must(cudaEventRecord(f->fork, f->main));
    must(cudaStreamWaitEvent(f->side, f->fork, 0));
    must(cudaMemcpyAsync(y, x, 400, cudaMemcpyDeviceToDevice, f->side));
    must(sim_add(y, 2, 100, f->side));
    must(cudaEventRecord(f->join, f->side));
    must(cudaMemcpyAsync(z, x, 400, cudaMemcpyDeviceToDevice, f->main));
    must(cudaStreamWaitEvent(f->main, f->join, 0));
    must(cudaMemcpyAsync(x, y, 400, cudaMemcpyDeviceToDevice, f->main));
    f->end();
}

static void a_fork_is_right_in_every_order(void **)
{
    Fixture f;
    DeviceArray<float> x(100), y(100), z(100);
    fork_and_join(&f, x.data, y.data, z.data);
    size_t nodes;
    must(cudaGraphGetNodes(f.graph, nullptr, &nodes));
    assert_int_equal(nodes, 5);
    for (const char *order : {"fwd", "rev", "rand:1", "rand:2", "rand:3"}) {
        assert_true(cudasim_order(order));
        must(cudaGraphLaunch(f.exec, f.main));
        must(cudaStreamSynchronize(f.main));
        assert_true(x.read()[99] == 2.0f);
        assert_true(z.read()[99] == 0.0f);
    }
    cudasim_order("fwd");
}

static void a_missing_edge_shows_in_some_order(void **)
{
    Fixture f;
    DeviceArray<float> x(std::vector<float>(100, 1.0f)), y(100);
    f.begin();
    must(cudaEventRecord(f.fork, f.main));
    must(cudaStreamWaitEvent(f.side, f.fork, 0));
    must(sim_add(x.data, 4, 100, f.main));
    must(cudaMemcpyAsync(y.data, x.data, 400, cudaMemcpyDeviceToDevice, f.side)); /* should wait for the add */
    must(cudaEventRecord(f.join, f.side));
    must(cudaStreamWaitEvent(f.main, f.join, 0));
    f.end();
    float seen[2];
    int i = 0;
    for (const char *order : {"fwd", "rev"}) {
        assert_true(cudasim_order(order));
        must(cudaMemsetAsync(x.data, 0, 400, f.main)); /* the default stream is not ordered with f.main */
        must(cudaGraphLaunch(f.exec, f.main));
        must(cudaStreamSynchronize(f.main));
        seen[i++] = y.read()[0];
    }
    cudasim_order("fwd");
    assert_true(seen[0] == 4.0f && seen[1] == 0.0f);
}

static void what_cannot_be_captured_breaks_the_capture(void **)
{
    Fixture f;
    void *p;
    cudaGraph_t graph;
    f.begin();
    must_fail(cudaMalloc(&p, 100), cudaErrorStreamCaptureUnsupported);
    must_say("cudaMalloc during a stream capture");
    must_fail(cudaStreamEndCapture(f.main, &graph), cudaErrorStreamCaptureInvalidated);
    assert_null(graph);
    f.begin();
    must_fail(cudaStreamSynchronize(f.main), cudaErrorStreamCaptureUnsupported);
    must_fail(cudaStreamEndCapture(f.main, &graph), cudaErrorStreamCaptureInvalidated);
    f.begin();
    must_fail(cudaDeviceSynchronize(), cudaErrorStreamCaptureUnsupported);
    must_fail(cudaStreamEndCapture(f.main, &graph), cudaErrorStreamCaptureInvalidated);
    must_fail(cudaStreamEndCapture(f.main, &graph), cudaErrorIllegalState);
    must_fail(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeRelaxed), cudaErrorStreamCaptureUnsupported);
}

static void a_fork_must_be_joined(void **)
{
    Fixture f;
    DeviceArray<float> x(100);
    cudaGraph_t graph;
    f.begin();
    must(cudaEventRecord(f.fork, f.main));
    must(cudaStreamWaitEvent(f.side, f.fork, 0));
    must(cudaMemsetAsync(x.data, 0, 400, f.side));
    must_fail(cudaStreamEndCapture(f.main, &graph), cudaErrorStreamCaptureUnjoined);
    must(cudaMemsetAsync(x.data, 0, 400, f.side)); /* the side stream works again */
    must(cudaStreamSynchronize(f.side));
}

static void a_graph_takes_new_arguments(void **)
{
    Fixture f;
    DeviceArray<float> x(std::vector<float>(100, 0.0f)), y(std::vector<float>(100, 0.0f));
    f.begin();
    must(sim_add(x.data, 1, 100, f.main));
    f.end();
    cudaGraph_t other;
    cudaGraphExecUpdateResultInfo info;
    f.begin();
    must(sim_add(y.data, 5, 100, f.main));
    must(cudaStreamEndCapture(f.main, &other));
    must(cudaGraphExecUpdate(f.exec, other, &info));
    must(cudaGraphDestroy(other));
    must(cudaGraphLaunch(f.exec, f.main));
    must(cudaStreamSynchronize(f.main));
    assert_true(x.read()[0] == 0.0f && y.read()[0] == 5.0f);
    f.begin();
    must(cudaMemsetAsync(y.data, 0, 400, f.main));
    must(cudaStreamEndCapture(f.main, &other));
    must_fail(cudaGraphExecUpdate(f.exec, other, &info), cudaErrorGraphExecUpdateFailure);
    must(cudaGraphDestroy(other));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(a_graph_does_nothing_until_launched_and_then_every_time, sim_nothing_left),
        cmocka_unit_test_teardown(a_fork_is_right_in_every_order, sim_nothing_left),
        cmocka_unit_test_teardown(a_missing_edge_shows_in_some_order, sim_nothing_left),
        cmocka_unit_test_teardown(what_cannot_be_captured_breaks_the_capture, sim_nothing_left),
        cmocka_unit_test_teardown(a_fork_must_be_joined, sim_nothing_left),
        cmocka_unit_test_teardown(a_graph_takes_new_arguments, sim_nothing_left),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
