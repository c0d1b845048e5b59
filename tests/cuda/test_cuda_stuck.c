/* test_cuda_stuck.c - kernels that never end. If this breaks, a worker whose GPU hangs holds its tasks for ever and says that it lives; or
 * a slow one is given up in the middle of its work. Faults are the simulator's (tests/cudasim/README.md).
 *
 * What hangs cannot be closed, so each case has a process of its own, and that it ends, with the code it was given, is half of the test.
 * In it nothing may be asserted: what is wrong is said, and makes the code. */
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "cuda_simulator.h"
#include "engine_team.h"
#include "kern_module.h"
#include "kern_ops.h"

#define MODEL "tests/golden/models/pocket"
#define RIGHT 42 /* exit codes of a case */
#define WRONG 1
#define CASE_LIMIT_S 120
#define ENDS_S 10 /* beyond what a picture takes: on the simulator that is seconds, which may be before the fault */
#define HANGS "a kernel hangs"

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* --- processes --------------------------------------------------------------------------------------------------- */

struct in_case {
    const char *device;        /* or list of them */
    enum engine_variant variant;
    const char *patience_s;    /* KILN_CUDA_PATIENCE_S, or NULL */
    const char *fault, *says;
};

static void want(bool ok, const char *what)
{
    if (!ok) {
        fprintf(stderr, "wrong: %s\n", what);
        _exit(WRONG);
    }
}

static void run(void (*in_child)(const struct in_case *), const struct in_case *c)
{
    int status = 0;
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        if (c->patience_s)
            setenv("KILN_CUDA_PATIENCE_S", c->patience_s, 1);
        in_child(c);
        exit(RIGHT);
    }
    for (double begun_s = now_s(); waitpid(child, &status, WNOHANG) == 0; usleep(10000))
        if (now_s() - begun_s > CASE_LIMIT_S)
            kill(child, SIGKILL);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != RIGHT)
        fail_msg("%s on %s: %s %d", c->fault, c->device, WIFEXITED(status) ? "exit code" : "signal",
                 WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status));
}

/* --- pictures ------------------------------------------------------------------------------------------------------ */

static bool paint(struct engine_team *t, struct engine_error *why)
{
    struct engine_request r = {.prompt = "a fox", .width = 64, .height = 64, .steps = 1, .guidance = NAN};
    struct engine_image image;
    engine_team_defaults(t, &r);
    if (!engine_team_generate(t, &r, 1, &image, NULL, why))
        return false;
    engine_image_done(&image);
    return true;
}

/* A picture is well, the next one hangs, and so does no other call. */
static void hang(const struct in_case *c)
{
    struct engine_team *t;
    struct engine_error why = {0};
    struct engine_options o = {.model_dir = MODEL, .precision = ENGINE_BF16, .device = c->device, .plan_width = 64, .plan_height = 64,
                               .transformer = MODEL "/transformer", .variant = c->variant};
    want(engine_team_open(&t, &o, &why) && paint(t, &why), why.text);
    double well_s = now_s();
    want(paint(t, &why), why.text);
    well_s = now_s() - well_s;
    want(cuda_simulator.fault(c->fault), "a fault");
    double begun_s = now_s();
    want(!paint(t, &why), "a picture in spite of the fault");
    double took_s = now_s() - begun_s;
    printf("%s on %s: %.1f s, when well %.1f: %s\n", c->fault, c->device, took_s, well_s, why.text);
    fflush(stdout);
    want(why.fault == ENGINE_DEVICE, "the kind of the failure");
    want(strstr(why.text, c->says) != NULL, "the reason");
    want(took_s < ENDS_S + well_s, "the time");
    want(!paint(t, &why) && why.fault == ENGINE_DEVICE, "the next picture fails, too");
    engine_team_close(t);
}

/* Of a picture at 64x64 whose prompt is known, on one device: the first, one of a step, one of the decoder. */
static void one_device_that_hangs_is_given_up(void **state)
{
    (void)state;
    static const char *const faults[] = {"stuck:1", "stuck:40", "stuck:100"};
    for (size_t i = 0; i < sizeof faults / sizeof faults[0]; i++)
        run(hang, &(struct in_case){"cuda", ENGINE_DISTILLED, "2", faults[i], HANGS});
}

static void a_team_with_a_device_that_hangs_ends(void **state)
{
    (void)state;
    run(hang, &(struct in_case){"cuda:0,1", ENGINE_DISTILLED, NULL, "stuck:30@1", HANGS});
    run(hang, &(struct in_case){"cuda:0,1", ENGINE_DISTILLED, NULL, "stuck:30@0", HANGS});
    run(hang, &(struct in_case){"cuda:0,1", ENGINE_BASE, "3", "stuck:30@1", ""});
}

/* The same kernel on the same numbers. */
static void a_team_both_of_which_hang_ends(void **state)
{
    (void)state;
    run(hang, &(struct in_case){"cuda:0,1", ENGINE_DISTILLED, NULL, "stuck:30@0,stuck:30@1", HANGS});
    run(hang, &(struct in_case){"cuda:0,1", ENGINE_BASE, "3", "stuck:30@0,stuck:30@1", HANGS});
}

/* --- what is slow --------------------------------------------------------------------------------------------------- */

/* So many pieces of work that are waited for, the first of which ends late, and before each so many FLOPs of products. */
static void work(const struct in_case *c, int pieces, double flops, bool is_right)
{
    char why[512];
    float values[64] = {0};
    struct kern *k = kern_module_open(c->device, NULL, why, sizeof why);
    want(k != NULL, why);
    struct tensor x = kern_temp(k, TENSOR_F32, 1, (int64_t[]){64});
    kern_write(k, x, tensor_1d(values, TENSOR_F32, 64));
    want(kern_sync(k), kern_error(k));
    want(cuda_simulator.fault(c->fault), "a fault");
    bool ok = true;
    for (int i = 0; ok && i < pieces; i++) {
        k->flops = flops;
        kern_silu(k, x, x);
        ok = kern_sync(k);
    }
    want(ok == is_right, ok ? "the device was not given up" : kern_error(k));
    kern_close(k);
}

static void do_piece_after_piece(const struct in_case *c)
{
    work(c, 4, 0, true);
}

static void do_much_at_once(const struct in_case *c)
{
    work(c, 1, 1e12, true);
}

static void do_little_at_once(const struct in_case *c)
{
    work(c, 1, 0, false);
}

/* What ends begins the time anew, and products have their own; without either it was too long. */
static void a_device_that_gets_on_is_not_given_up(void **state)
{
    (void)state;
    run(do_piece_after_piece, &(struct in_case){.device = "cuda", .patience_s = "2", .fault = "long:1=1000*4"});
    run(do_much_at_once, &(struct in_case){.device = "cuda", .patience_s = "1", .fault = "long:1=2000"});
    run(do_little_at_once, &(struct in_case){.device = "cuda", .patience_s = "1", .fault = "long:1=2000"});
}

static void open_badly(const struct in_case *c)
{
    char why[512] = "";
    want(!kern_module_open(c->device, NULL, why, sizeof why), "opened");
    want(strstr(why, "KILN_CUDA_PATIENCE_S='") && strstr(why, "accepted: seconds from 1 to 86400"), why);
}

static void a_patience_that_is_none_is_refused(void **state)
{
    (void)state;
    static const char *const given[] = {"0", "-1", "1.5", "long", "86401"};
    for (size_t i = 0; i < sizeof given / sizeof given[0]; i++)
        run(open_badly, &(struct in_case){.device = "cuda", .patience_s = given[i], .fault = ""});
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_device_that_gets_on_is_not_given_up),
        cmocka_unit_test(a_patience_that_is_none_is_refused),
        cmocka_unit_test(one_device_that_hangs_is_given_up),
        cmocka_unit_test(a_team_with_a_device_that_hangs_ends),
        cmocka_unit_test(a_team_both_of_which_hang_ends),
    };
    return cmocka_run_group_tests_name("cuda_stuck", tests, cuda_simulator_find, NULL);
}
