/* test_sim_nccl.cpp - teams of ranks sum, gather and exchange, and a rank that dies or disagrees ends the team.
 * If this breaks, a team of GPUs that would hang, or sum wrongly, passes here. Ranks are threads, as in the product, and
 * once processes. */
#include "sim_check.h"

#include <nccl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>

#define nccl(call) assert_int_equal((call), ncclSuccess)

struct Rank {
    int index;
    ncclComm_t comm;
    cudaStream_t stream;
};

/* team: `ranks` threads with a communicator and a stream each run the function; messages of failed asserts do not cross
 * threads, so it returns whether it was content. */
static bool team(int ranks, const std::function<bool(Rank *)> &run)
{
    ncclUniqueId id;
    nccl(ncclGetUniqueId(&id));
    std::vector<std::thread> threads;
    std::vector<char> is_good(static_cast<size_t>(ranks), 0);
    for (int i = 0; i < ranks; i++)
        threads.emplace_back([&, i] {
            Rank r = {i, nullptr, nullptr};
            cudaSetDevice(i);
            cudaStreamCreateWithFlags(&r.stream, cudaStreamNonBlocking);
            if (ncclCommInitRank(&r.comm, ranks, id, i) == ncclSuccess)
                is_good[static_cast<size_t>(i)] = run(&r);
            if (r.comm)
                ncclCommDestroy(r.comm);
            cudaStreamDestroy(r.stream);
        });
    for (std::thread &t : threads)
        t.join();
    for (char good : is_good)
        if (!good)
            return false;
    return true;
}

static void a_sum_is_the_same_on_all_ranks(void **)
{
    /* More than a chunk, and not a multiple of anything. */
    const size_t count = 700001;
    assert_true(team(3, [&](Rank *r) {
        std::vector<uint16_t> x(count);
        for (size_t i = 0; i < count; i++)
            x[i] = sim_to_bf16(static_cast<float>(r->index + 1) * static_cast<float>(i % 9));
        DeviceArray<uint16_t> d(x);
        if (ncclAllReduce(d.data, d.data, count, ncclBfloat16, ncclSum, r->comm, r->stream) ||
            cudaStreamSynchronize(r->stream))
            return false;
        x = d.read();
        for (size_t i = 0; i < count; i++)
            if (sim_from_bf16(x[i]) != 6.0f * static_cast<float>(i % 9))
                return false;
        return true;
    }));
}

static void gather_scatter_and_broadcast_put_parts_in_their_place(void **)
{
    const size_t count = 1000;
    assert_true(team(2, [&](Rank *r) {
        std::vector<float> x(count);
        for (size_t i = 0; i < count; i++)
            x[i] = static_cast<float>(r->index * 1000 + static_cast<int>(i));
        DeviceArray<float> in(x), all(2 * count), part(count), sent(x);
        if (ncclAllGather(in.data, all.data, count, ncclFloat32, r->comm, r->stream) ||
            ncclReduceScatter(all.data, part.data, count, ncclFloat32, ncclSum, r->comm, r->stream) ||
            ncclBroadcast(sent.data, sent.data, count, ncclFloat32, 1, r->comm, r->stream) ||
            cudaStreamSynchronize(r->stream))
            return false;
        std::vector<float> a = all.read(), p = part.read(), s = sent.read();
        for (size_t i = 0; i < count; i++)
            if (a[i] != static_cast<float>(i) || a[count + i] != static_cast<float>(1000 + i) ||
                p[i] != 2 * a[static_cast<size_t>(r->index) * count + i] || s[i] != static_cast<float>(1000 + i))
                return false;
        return true;
    }));
}

static void neighbours_exchange_in_a_group(void **)
{
    const size_t count = 200000; /* several messages */
    assert_true(team(3, [&](Rank *r) {
        DeviceArray<int> out(std::vector<int>(count, r->index)), in(count);
        if (ncclGroupStart() || ncclSend(out.data, count, ncclInt32, (r->index + 1) % 3, r->comm, r->stream) ||
            ncclRecv(in.data, count, ncclInt32, (r->index + 2) % 3, r->comm, r->stream) || ncclGroupEnd() ||
            cudaStreamSynchronize(r->stream))
            return false;
        std::vector<int> got = in.read();
        return got[0] == (r->index + 2) % 3 && got[count - 1] == (r->index + 2) % 3;
    }));
}

static void one_thread_drives_two_ranks_in_a_group(void **)
{
    ncclComm_t comms[2];
    nccl(ncclCommInitAll(comms, 2, nullptr));
    cudaStream_t streams[2];
    float *x[2];
    for (int i = 0; i < 2; i++) {
        must(cudaSetDevice(i));
        must(cudaStreamCreate(&streams[i]));
        must(cudaMalloc(reinterpret_cast<void **>(&x[i]), 400));
        must(cudaMemsetAsync(x[i], 0, 400, streams[i]));
        must(sim_add(x[i], static_cast<float>(i + 1), 100, streams[i]));
    }
    nccl(ncclGroupStart());
    for (int i = 0; i < 2; i++)
        nccl(ncclAllReduce(x[i], x[i], 100, ncclFloat32, ncclSum, comms[i], streams[i]));
    nccl(ncclGroupEnd());
    for (int i = 0; i < 2; i++) {
        float got[100];
        must(cudaStreamSynchronize(streams[i]));
        must(cudaMemcpy(got, x[i], 400, cudaMemcpyDeviceToHost));
        assert_true(got[99] == 3.0f);
        must(cudaFree(x[i]));
        must(cudaStreamDestroy(streams[i]));
        nccl(ncclCommDestroy(comms[i]));
    }
    must(cudaSetDevice(0));
}

static void ranks_that_disagree_are_told(void **)
{
    assert_true(team(2, [&](Rank *r) {
        DeviceArray<float> x(100);
        size_t count = r->index ? 100 : 99;
        ncclResult_t asynchronous = ncclSuccess;
        if (ncclAllReduce(x.data, x.data, count, ncclFloat32, ncclSum, r->comm, r->stream) ||
            cudaStreamSynchronize(r->stream) || ncclCommGetAsyncError(r->comm, &asynchronous))
            return false;
        return asynchronous == ncclInvalidUsage;
    }));
    must_say("calls ncclAllReduce of ");
}

static void a_dead_rank_is_ended_by_abort(void **)
{
    if (getenv("CUDASIM_SYNC")) /* the call itself would wait */
        skip();
    assert_true(cudasim_fault("dead:1@1"));
    ncclUniqueId id;
    nccl(ncclGetUniqueId(&id));
    std::thread ranks[2];
    ncclComm_t comms[2];
    bool ended[2] = {};
    for (int i = 0; i < 2; i++)
        ranks[i] = std::thread([&, i] {
            cudaSetDevice(i);
            cudaStream_t stream;
            cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
            DeviceArray<float> x(100);
            ncclCommInitRank(&comms[i], 2, id, i);
            ncclAllReduce(x.data, x.data, 100, ncclFloat32, ncclSum, comms[i], stream);
            usleep(50000);
            bool is_waiting = cudaStreamQuery(stream) == cudaErrorNotReady;
            ncclCommAbort(comms[i]);
            ended[i] = is_waiting && cudaStreamSynchronize(stream) == cudaSuccess;
            cudaStreamDestroy(stream);
        });
    for (std::thread &t : ranks)
        t.join();
    /* The first abort ends both; the other rank may be seen waiting or not. */
    assert_true(ended[0] || ended[1]);
}

/* The state of a nonblocking communicator when nothing is in progress any more, or after some seconds. */
static ncclResult_t settled(ncclComm_t comm)
{
    ncclResult_t state = ncclInProgress;
    for (int i = 0; i < 20000 && state == ncclInProgress; i++, usleep(200))
        ncclCommGetAsyncError(comm, &state);
    return state;
}

/* Each rank's comm and whether it is content; `run` is given a communicator that is joining. */
static bool nonblocking_team(const std::function<bool(Rank *)> &run)
{
    ncclUniqueId id;
    nccl(ncclGetUniqueId(&id));
    std::thread ranks[2];
    bool is_good[2] = {};
    for (int i = 0; i < 2; i++)
        ranks[i] = std::thread([&, i] {
            Rank r = {i, nullptr, nullptr};
            ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
            config.blocking = 0;
            cudaSetDevice(i);
            cudaStreamCreateWithFlags(&r.stream, cudaStreamNonBlocking);
            is_good[i] = ncclCommInitRankConfig(&r.comm, 2, id, i, &config) == ncclInProgress && run(&r);
            ncclCommAbort(r.comm);
            cudaStreamDestroy(r.stream);
        });
    for (std::thread &t : ranks)
        t.join();
    return is_good[0] && is_good[1];
}

static void what_a_nonblocking_communicator_has_in_progress_is_asked_for(void **)
{
    std::atomic<int> arrived{0};
    assert_true(nonblocking_team([&](Rank *r) {
        DeviceArray<float> x(10);
        auto sum = [&] { return ncclAllReduce(x.data, x.data, 10, ncclFloat32, ncclSum, r->comm, r->stream); };
        if (settled(r->comm) || sum() != ncclInProgress || sum() != ncclInvalidUsage) /* it connects: nothing is in the stream */
            return false;
        bool ok = !settled(r->comm) && sum() == ncclSuccess && cudaStreamSynchronize(r->stream) == cudaSuccess;
        for (arrived++; arrived < 2;) /* an abort ends both */
            usleep(200);
        return ok;
    }));
}

static void a_rank_that_never_comes_leaves_the_other_in_progress_until_it_aborts(void **)
{
    assert_true(cudasim_fault("absent:1@1"));
    std::atomic<int> arrived{0};
    assert_true(nonblocking_team([&](Rank *r) {
        ncclResult_t state;
        usleep(50000);
        bool ok = ncclCommGetAsyncError(r->comm, &state) == ncclSuccess && state == ncclInProgress;
        for (arrived++; arrived < 2;)
            usleep(200);
        return ok;
    }));
    assert_true(cudasim_fault(""));
}

static void a_slow_rank_delays_and_a_wrong_one_is_seen(void **)
{
    assert_true(cudasim_fault("slow:1=30@0,wrong:2@1"));
    assert_true(team(2, [&](Rank *r) {
        DeviceArray<float> x(std::vector<float>(10, 1.0f)), y(std::vector<float>(10, 1.0f));
        if (ncclAllReduce(x.data, x.data, 10, ncclFloat32, ncclSum, r->comm, r->stream) ||
            ncclAllReduce(y.data, y.data, 10, ncclFloat32, ncclSum, r->comm, r->stream) ||
            cudaStreamSynchronize(r->stream))
            return false;
        return x.read()[0] == 2.0f && (y.read()[0] == 2.0f) == (r->index == 0);
    }));
}

/* The child is killed between two sums; the parent's second must end with an error, in time. */
static void a_killed_process_ends_the_team(void **)
{
    ncclUniqueId id;
    nccl(ncclGetUniqueId(&id));
    std::string command = std::string("'") + program_invocation_name + "' rank 1 " + id.internal + " &";
    assert_int_equal(system(command.c_str()), 0);
    ncclComm_t comm;
    nccl(ncclCommInitRank(&comm, 2, id, 0));
    ncclResult_t asynchronous;
    {
        DeviceArray<float> x(std::vector<float>(10, 1.0f));
        nccl(ncclAllReduce(x.data, x.data, 10, ncclFloat32, ncclSum, comm, nullptr));
        must(cudaStreamSynchronize(nullptr));
        assert_true(x.read()[9] == 11.0f);
        nccl(ncclAllReduce(x.data, x.data, 10, ncclFloat32, ncclSum, comm, nullptr));
        must(cudaStreamSynchronize(nullptr));
    }
    nccl(ncclCommGetAsyncError(comm, &asynchronous));
    assert_int_equal(asynchronous, ncclRemoteError);
    nccl(ncclCommDestroy(comm));
}

static int be_a_rank_that_is_killed(const char *name)
{
    ncclUniqueId id;
    ncclComm_t comm;
    snprintf(id.internal, sizeof id.internal, "%s", name);
    float *x;
    if (ncclCommInitRank(&comm, 2, id, 1) || cudaMalloc(reinterpret_cast<void **>(&x), 40))
        return 1;
    cudaMemset(x, 0, 40);
    sim_add(x, 10, 10, nullptr);
    ncclAllReduce(x, x, 10, ncclFloat32, ncclSum, comm, nullptr);
    cudaStreamSynchronize(nullptr);
    return kill(getpid(), SIGKILL);
}

int main(int argc, char **argv)
{
    setenv("CUDASIM_DEVICES", "3", 1);
    setenv("CUDASIM_VRAM_MB", "256", 1);
    setenv("CUDASIM_NCCL_TIMEOUT_MS", "3000", 1);
    if (argc == 4 && !strcmp(argv[1], "rank"))
        return be_a_rank_that_is_killed(argv[3]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(a_sum_is_the_same_on_all_ranks, sim_nothing_left),
        cmocka_unit_test_teardown(gather_scatter_and_broadcast_put_parts_in_their_place, sim_nothing_left),
        cmocka_unit_test_teardown(neighbours_exchange_in_a_group, sim_nothing_left),
        cmocka_unit_test_teardown(one_thread_drives_two_ranks_in_a_group, sim_nothing_left),
        cmocka_unit_test_teardown(ranks_that_disagree_are_told, sim_nothing_left),
        cmocka_unit_test_teardown(a_dead_rank_is_ended_by_abort, sim_nothing_left),
        cmocka_unit_test_teardown(what_a_nonblocking_communicator_has_in_progress_is_asked_for, sim_nothing_left),
        cmocka_unit_test_teardown(a_rank_that_never_comes_leaves_the_other_in_progress_until_it_aborts, sim_nothing_left),
        cmocka_unit_test_teardown(a_slow_rank_delays_and_a_wrong_one_is_seen, sim_nothing_left),
        cmocka_unit_test_teardown(a_killed_process_ends_the_team, sim_nothing_left),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
