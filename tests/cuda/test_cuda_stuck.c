/* test_cuda_stuck.c - kernels that never end. If this breaks, a worker whose GPU hangs holds its tasks for ever and says that it lives; or
 * a slow one is given up in the middle of its work. Faults are the simulator's (tests/cudasim/README.md).
 *
 * What hangs cannot be closed, so each case has a process of its own, and that it ends, with the code it was given, is half of the test.
 * In it nothing may be asserted: what is wrong is said, and makes the code.
 *
 * A simulated picture takes seconds, more on a machine that does other things, too: times are bounded by what a picture takes when it is
 * well, measured in the same minute. One case of a kind has the patience that a farm has, the other a short one. */
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
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
#define CASE_LIMIT_S 240
#define SHORT_S_MAX 20 /* the simulator's NCCL waits for 30 */
#define ENDS_S 3 /* beyond the patience, and what the device takes when it is well */
#define HANGS "a kernel hangs"
#define NOBODY_WAITS "nothing it was asked has ended"
#define AWAITED "the team has waited"

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* --- processes --------------------------------------------------------------------------------------------------- */

struct in_case {
    void (*run)(const struct in_case *c);
    const char *device;     /* or list of them */
    enum engine_variant variant;
    const char *patience_s; /* KILN_CUDA_PATIENCE_S, or a farm's: NULL */
    const char *fault, *says;
    const char *prompt;     /* of the picture that hangs, or NULL: one that is known */
};

static void want(bool ok, const char *what)
{
    if (!ok) {
        fprintf(stderr, "wrong: %s\n", what);
        _exit(WRONG);
    }
}

static pid_t start(const struct in_case *c)
{
    fflush(NULL);
    pid_t child = fork();
    if (child != 0)
        return child;
    if (c->patience_s)
        setenv("KILN_CUDA_PATIENCE_S", c->patience_s, 1);
    c->run(c);
    exit(RIGHT);
}

static void finish(const struct in_case *c, pid_t child)
{
    int status = 0;
    for (double begun_s = now_s(); waitpid(child, &status, WNOHANG) == 0; usleep(10000))
        if (now_s() - begun_s > CASE_LIMIT_S)
            kill(child, SIGKILL);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != RIGHT)
        fail_msg("%s on %s: %s %d", c->fault, c->device, WIFEXITED(status) ? "exit code" : "signal",
                 WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status));
}

/* All at once: they sleep most of the time. */
static void run(const struct in_case *cases, int count)
{
    pid_t children[8];
    assert_true(count <= 8);
    for (int i = 0; i < count; i++)
        children[i] = start(&cases[i]);
    for (int i = 0; i < count; i++)
        finish(&cases[i], children[i]);
}

#define RUN(...) \
    do { \
        const struct in_case cases_[] = {__VA_ARGS__}; \
        run(cases_, (int)(sizeof cases_ / sizeof cases_[0])); \
    } while (0)

/* --- pictures ------------------------------------------------------------------------------------------------------ */

static char short_s[8]; /* KILN_CUDA_PATIENCE_S: longer than any piece of work of a picture that is well, also where others are tested beside */
static double *well_s;  /* what one takes on one device alone, whose prompt is known; shared with children */

/* Guided by one prompt only, which is encoded once. */
static bool paint(struct engine_team *t, const struct in_case *c, const char *prompt, struct engine_error *why)
{
    const char *negative = c->variant == ENGINE_BASE ? prompt : NULL;
    struct engine_request r = {.prompt = prompt, .negative = negative, .width = 64, .height = 64, .steps = 1, .guidance = NAN};
    struct engine_image image;
    engine_team_defaults(t, &r);
    if (!engine_team_generate(t, &r, 1, &image, NULL, why))
        return false;
    engine_image_done(&image);
    return true;
}

/* It has made a picture. */
static struct engine_team *open_team(const struct in_case *c)
{
    struct engine_team *t;
    struct engine_error why = {0};
    struct engine_options o = {.model_dir = MODEL, .precision = ENGINE_BF16, .device = c->device, .plan_width = 64, .plan_height = 64,
                               .transformer = MODEL "/transformer", .variant = c->variant};
    want(engine_team_open(&t, &o, &why) && paint(t, c, "a fox", &why), why.text);
    return t;
}

static void measure(const struct in_case *c)
{
    struct engine_error why = {0};
    struct engine_team *t = open_team(c);
    double begun_s = now_s();
    want(paint(t, c, "a fox", &why), why.text);
    *well_s = now_s() - begun_s;
}

static int choose_patience(void **state)
{
    well_s = mmap(NULL, sizeof *well_s, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (well_s == MAP_FAILED || cuda_simulator_find(state) != 0)
        return -1;
    RUN({measure, "cuda", ENGINE_DISTILLED, NULL, "", "", NULL});
    snprintf(short_s, sizeof short_s, "%d", (int)fmin(5 + ceil(3 * *well_s), SHORT_S_MAX));
    printf("a picture takes %.1f s when well; short patience: %s s\n", *well_s, short_s);
    return 0;
}

/* Of a team the patience of its ranks, and three times what the other rank took; two teams run at once, with a pass on each device. */
static double limit_s(const struct in_case *c)
{
    double patience_s = c->patience_s ? atof(c->patience_s) : KERN_TEAM_PATIENCE_MS / 1e3;
    return patience_s + ENDS_S + 8 * *well_s;
}

/* The next picture hangs, and so does no other call. */
static void hang(const struct in_case *c)
{
    struct engine_team *t = open_team(c);
    struct engine_error why = {0};
    const char *prompt = c->prompt ? c->prompt : "a fox";
    want(cuda_simulator.fault(c->fault), "a fault");
    double begun_s = now_s();
    want(!paint(t, c, prompt, &why), "a picture in spite of the fault");
    double took_s = now_s() - begun_s;
    printf("%s on %s: %.1f s: %s\n", c->fault, c->device, took_s, why.text);
    fflush(stdout);
    want(why.fault == ENGINE_DEVICE, "the kind of the failure");
    want(strstr(why.text, HANGS) && strstr(why.text, c->says), "the reason");
    want(took_s < limit_s(c), "the time");
    want(!paint(t, c, prompt, &why) && why.fault == ENGINE_DEVICE, "the next picture fails, too");
    engine_team_close(t);
}

/* Of a picture at 64x64 whose prompt is known, on one device: the first, one of a step, one of the decoder. */
static void one_device_that_hangs_is_given_up(void **state)
{
    (void)state;
    RUN({hang, "cuda", ENGINE_DISTILLED, short_s, "stuck:1", NOBODY_WAITS, NULL},
        {hang, "cuda", ENGINE_DISTILLED, short_s, "stuck:40", NOBODY_WAITS, NULL},
        {hang, "cuda", ENGINE_DISTILLED, short_s, "stuck:100", NOBODY_WAITS, NULL});
}

static void a_team_with_a_device_that_hangs_ends(void **state)
{
    (void)state;
    RUN({hang, "cuda:0,1", ENGINE_DISTILLED, NULL, "stuck:30@1", "", NULL}, {hang, "cuda:0,1", ENGINE_DISTILLED, short_s, "stuck:30@0", "", NULL});
}

/* Each rank holds the whole model: in its pass, which is one piece of work, and in a prompt's, which are many. */
static void a_team_of_passes_with_a_device_that_hangs_ends(void **state)
{
    (void)state;
    RUN({hang, "cuda:0,1", ENGINE_BASE, NULL, "stuck:30@1", AWAITED, NULL}, {hang, "cuda:0,1", ENGINE_BASE, short_s, "stuck:30@0", "", "an owl"});
}

/* The same kernel on the same numbers. */
static void a_team_both_of_which_hang_ends(void **state)
{
    (void)state;
    RUN({hang, "cuda:0,1", ENGINE_DISTILLED, short_s, "stuck:30@0,stuck:30@1", NOBODY_WAITS, NULL},
        {hang, "cuda:0,1", ENGINE_BASE, short_s, "stuck:30@0,stuck:30@1", NOBODY_WAITS, NULL});
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
    RUN({.run = do_piece_after_piece, .device = "cuda", .patience_s = "2", .fault = "long:1=1000*4"},
        {.run = do_much_at_once, .device = "cuda", .patience_s = "1", .fault = "long:1=2000"},
        {.run = do_little_at_once, .device = "cuda", .patience_s = "1", .fault = "long:1=2000"});
}

/* --- what a rank owes the others ------------------------------------------------------------------------------------ */

#define RANKS 2
#define TEAM_PATIENCE_MS 4000
#define PASS_FLOPS 50e12 /* by which alone a hundred seconds are allowed */

enum meeting_place { IN_A_SUM, IN_A_MEETING };
struct passes { enum meeting_place place; int well; }; /* well: so many before the fault */

struct member {
    const struct in_case *c;
    struct kern_team *team;
    struct passes passes;
    int rank;
    double took_s;
    bool ok;
    char error[256];
};

/* One piece of work, as a pass of guidance is, and then what the others are waited for in. */
static bool make_pass(struct member *m, struct kern *k, struct tensor x)
{
    k->flops = PASS_FLOPS;
    kern_silu(k, x, x);
    if (m->passes.place == IN_A_SUM)
        kern_sum_ranks(k, x);
    bool ok = kern_sync(k);
    kern_most(k, 0);
    return ok && !k->failed;
}

static void *member_main(void *argument)
{
    struct member *m = argument;
    float values[64] = {0};
    char device[16];
    snprintf(device, sizeof device, "cuda:%d", m->rank);
    struct kern *k = kern_module_open(device, &(struct kern_member){m->team, m->rank, RANKS}, m->error, sizeof m->error);
    want(k != NULL, m->error);
    struct tensor x = kern_temp(k, TENSOR_F32, 1, (int64_t[]){64});
    kern_write(k, x, tensor_1d(values, TENSOR_F32, 64));
    m->ok = kern_join(k) && kern_sync(k);
    for (int i = 0; m->ok && i < m->passes.well; i++)
        m->ok = make_pass(m, k, x);
    want(m->ok, kern_error(k));
    kern_most(k, 0);
    want(m->rank || cuda_simulator.fault(m->c->fault), "a fault");
    kern_most(k, 0);
    double begun_s = now_s();
    m->ok = make_pass(m, k, x);
    m->took_s = now_s() - begun_s;
    snprintf(m->error, sizeof m->error, "%s", kern_error(k));
    kern_close(k);
    return NULL;
}

static void run_passes(const struct in_case *c, struct passes passes, struct member m[RANKS])
{
    pthread_t threads[RANKS];
    struct kern_team *team = kern_team_open(RANKS, TEAM_PATIENCE_MS);
    for (int i = 0; i < RANKS; i++) {
        m[i] = (struct member){.c = c, .team = team, .passes = passes, .rank = i};
        want(pthread_create(&threads[i], NULL, member_main, &m[i]) == 0, "a thread");
    }
    for (int i = 0; i < RANKS; i++) {
        pthread_join(threads[i], NULL);
        printf("%s, rank %d: %.1f s: %s\n", c->fault, i, m[i].took_s, m[i].error);
    }
    fflush(stdout);
}

static void expect_an_end(const struct in_case *c, struct passes passes)
{
    struct member m[RANKS];
    run_passes(c, passes, m);
    for (int i = 0; i < RANKS; i++) {
        want(!m[i].ok && strstr(m[i].error, c->says), "the reason");
        want(m[i].took_s < TEAM_PATIENCE_MS / 1e3 + ENDS_S, "the time");
    }
}

static void hang_before_a_sum(const struct in_case *c)
{
    expect_an_end(c, (struct passes){IN_A_SUM, 0});
}

static void hang_before_a_meeting(const struct in_case *c)
{
    expect_an_end(c, (struct passes){IN_A_MEETING, 0});
}

static void hang_in_a_second_pass(const struct in_case *c)
{
    expect_an_end(c, (struct passes){IN_A_SUM, 1});
}

static void be_slower(const struct in_case *c)
{
    struct member m[RANKS];
    run_passes(c, (struct passes){IN_A_SUM, 0}, m);
    want(m[0].ok && m[1].ok, "the slower one was given up");
}

/* Its own work may take long; the other's of the same size did not. */
static void a_rank_that_is_waited_for_is_given_up_by_what_the_other_took(void **state)
{
    (void)state;
    RUN({.run = hang_before_a_sum, .device = "cuda:0,1", .fault = "stuck:1@1", .says = AWAITED},
        {.run = hang_before_a_sum, .device = "cuda:0,1", .fault = "stuck:1@0", .says = AWAITED},
        {.run = hang_before_a_meeting, .device = "cuda:0,1", .fault = "stuck:1@1", .says = AWAITED},
        {.run = be_slower, .device = "cuda:0,1", .fault = "long:1=1000@0,long:1=6500@1"}); /* 5.5 s are more than the patience */
}

/* Nobody waits for them; but they did the same before. */
static void ranks_both_of_which_hang_are_given_up_by_what_they_took_before(void **state)
{
    (void)state;
    RUN({.run = hang_in_a_second_pass, .device = "cuda:0,1", .fault = "stuck:1@0,stuck:1@1", .says = NOBODY_WAITS});
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
        RUN({.run = open_badly, .device = "cuda", .patience_s = given[i], .fault = ""});
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_device_that_gets_on_is_not_given_up),
        cmocka_unit_test(a_patience_that_is_none_is_refused),
        cmocka_unit_test(a_rank_that_is_waited_for_is_given_up_by_what_the_other_took),
        cmocka_unit_test(ranks_both_of_which_hang_are_given_up_by_what_they_took_before),
        cmocka_unit_test(one_device_that_hangs_is_given_up),
        cmocka_unit_test(a_team_with_a_device_that_hangs_ends),
        cmocka_unit_test(a_team_of_passes_with_a_device_that_hangs_ends),
        cmocka_unit_test(a_team_both_of_which_hang_ends),
    };
    return cmocka_run_group_tests_name("cuda_stuck", tests, choose_patience, NULL);
}
