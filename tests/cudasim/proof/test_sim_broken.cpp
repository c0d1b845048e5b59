/* test_sim_broken.cpp - every kind of bug is caught, in the build that is there to catch it.
 * If this breaks, a race or an overflow in a kernel would reach a user's GPU unseen.
 * The table is the promise README.md prints; each line is a run of sim_broken_run and what its output must contain. */
#include "sim_check.h"

#include <sys/wait.h>
#include <unistd.h>

struct Case {
    const char *build; /* "plain", "asan", "tsan" */
    const char *bug, *environment, *words;
};

static const Case cases[] = {
    /* errors of the scheduler: with both lines, or lanes and mask */
    {"plain", "divergent-barrier", "", "divergent __syncthreads in divergent_barrier block (0,0,0): threads 0-39 at "},
    {"plain", "exited-barrier", "", "threads 40-63 exited"},
    {"plain", "exited-lane", "", "which is not in the mask ffffffff or has exited at "},
    {"plain", "half-warp", "", "deadlock in half_warp block (0,0,0): threads 0-15 at warp collective "},
    {"plain", "other-mask", "", "warp collectives do not match: lane "},
    {"plain", "misaligned-tile", "", "is not 16-byte aligned at "},
    /* memory: NaN patterns, guard pages */
    {"plain", "unwritten-shared", "", "values -nan 1 1"},
    {"plain", "unwaited-copy", "", "values -nan -nan -nan"},
    {"plain", "unwaited-copy", "CUDASIM_CPASYNC_EARLY=1", "values 1 1"},
    {"plain", "wrong-flash", "", "values nan"},
    {"plain", "wrong-flash", "CUDASIM_CPASYNC_EARLY=1", "values right"},
    {"plain", "dynamic-overflow", "", "cudaErrorIllegalAddress: illegal address in dynamic_overflow block (0,0,0): byte 256 of "
                                      "256 bytes of dynamic shared memory"},
    {"plain", "device-overflow", "", "cudaErrorIllegalAddress: illegal address in write_at block (0,0,0): 0 bytes past the end "
                                     "of an allocation of 256 bytes on device 0"},
    {"plain", "use-after-free", "", "in no allocation of device 0 (freed?)"},
    {"plain", "stack-overflow", "", "cudaErrorIllegalAddress"},
    {"plain", "endless-loop", "CUDASIM_KERNEL_LIMIT_MS=200", "cudaErrorLaunchTimeout: endless_loop block (0,0,0) ran longer"},
    /* order: the result changes with the schedule */
    {"plain", "missing-barrier", "CUDASIM_ORDER=fwd", "values 0 0 0"}, /* static shared memory starts as zeros: a limit */
    {"plain", "missing-barrier", "CUDASIM_ORDER=rev", "values 63 62 61"},
    {"plain", "missing-syncwarp", "CUDASIM_ORDER=fwd", "values 0 0 0 2 0 4"},
    {"plain", "missing-syncwarp", "CUDASIM_ORDER=rev", "values 1 0 3 0 5 0"},
    {"plain", "wrong-gemm", "", "values wrong"},

    {"asan", "dynamic-overflow", "", "sim_broken.cu:"},
    {"asan", "static-overflow", "", "out of bounds"},
    {"asan", "static-overflow", "", "sim_broken.cu:"},
    {"asan", "device-overflow", "", "sim_broken.cu:"},
    {"asan", "use-after-free", "", "sim_broken.cu:"},
    {"asan", "stack-overflow", "", "stack-overflow"},
    {"asan", "divergent-barrier", "", "divergent __syncthreads"},

    {"tsan", "missing-barrier", "", "data race"},
    {"tsan", "missing-barrier", "", "sim_broken.cu:"},
    {"tsan", "missing-syncwarp", "", "data race"},
    {"tsan", "block-race", "CUDASIM_THREADS=2", "data race"},
    {"tsan", "wrong-gemm", "", "sim_gemm.cu:"},
    {"tsan", "unsynchronized-host", "", "sim_broken_run.cpp:"},
    {"tsan", "unordered-streams", "", "data race"},
    {"tsan", "divergent-barrier", "", "divergent __syncthreads"},
};

/* A finding means nothing if correct programs have findings too: the correct twins run in test_sim_kernels under the
 * same sanitizers, which end a program at their first report. */

/* run: everything the program prints, stderr included. */
static std::string run(const char *bug, const char *environment)
{
    std::string command = std::string(environment) + " ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS=halt_on_error=0:atexit_sleep_ms=0 '" +
                          SIM_BROKEN_RUN + "' " + bug + " 2>&1";
    FILE *pipe = popen(command.c_str(), "r");
    assert_non_null(pipe);
    std::string out;
    char buffer[4096];
    for (size_t n; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;)
        out.append(buffer, n);
    pclose(pipe);
    return out;
}

static void every_bug_is_caught(void **)
{
    int ran = 0;
    for (const Case &c : cases) {
        if (strcmp(c.build, SIM_BUILD))
            continue;
        std::string out = run(c.bug, c.environment);
        if (out.find(c.words) == std::string::npos)
            fail_msg("%s %s: want \"%s\" in:\n%s", c.environment, c.bug, c.words, out.c_str());
        ran++;
    }
    assert_true(ran > 5);
}

/* What a missing barrier gives depends on the order, and on nothing else: the same order gives the same. */
static void order_decides_what_a_missing_barrier_gives(void **)
{
    if (strcmp(SIM_BUILD, "plain"))
        skip();
    std::string forward = run("missing-barrier", "CUDASIM_ORDER=fwd"), reverse = run("missing-barrier", "CUDASIM_ORDER=rev");
    assert_true(forward != reverse);
    assert_string_equal(run("missing-barrier", "CUDASIM_ORDER=rand:5").c_str(),
                        run("missing-barrier", "CUDASIM_ORDER=rand:5").c_str());
}

/* What a process leaves behind is said at its end, and what the environment says wrongly at its start. */
static void leaks_and_bad_settings_are_said(void **)
{
    char path[] = "/tmp/sim-report.XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    std::string out = run("unwritten-shared", (std::string("CUDASIM_LEAKS=report CUDASIM_REPORT=") + path).c_str());
    assert_true(out.find("left behind at the end of the process:\ndevice 0: 256 bytes not freed") != std::string::npos);
    std::ifstream file(path);
    std::string report;
    std::getline(file, report);
    remove(path);
    assert_true(report.find("\"peak_bytes\":512") != std::string::npos); /* charged in units of 512 */
    assert_true(report.find("\"launches\":1,") != std::string::npos);
    assert_true(report.find("\"leak_count\":1,") != std::string::npos);
    assert_int_equal(WEXITSTATUS(system("CUDASIM_LEAKS=fail '" SIM_BROKEN_RUN "' unwritten-shared >/dev/null 2>&1")), 23);
    assert_true(run("unwritten-shared", "CUDASIM_ORDER=sideways").find("CUDASIM_ORDER=sideways: want fwd, rev or rand:N") !=
                std::string::npos);
    assert_true(run("unwritten-shared", "CUDASIM_VRAM_MB=12x").find("want megabytes") != std::string::npos);
    assert_true(run("unwritten-shared", "CUDASIM_FAULT=mallok:1").find("unknown point 'mallok'") != std::string::npos);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_bug_is_caught),
        cmocka_unit_test(order_decides_what_a_missing_barrier_gives),
        cmocka_unit_test(leaks_and_bad_settings_are_said),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
