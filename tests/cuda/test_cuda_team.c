/* test_cuda_team.c - two devices that share a model, and what may happen to one of them. If this breaks, a dead GPU keeps the other
 * one waiting for ever, or a wrong one makes pictures. Faults and counters are the simulator's (tests/cudasim/README.md); pictures are
 * compared by test_engine_team and test_golden, which run on these devices, too. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "cuda_simulator.h"
#include "engine_team.h"

#define MODEL "tests/golden/models/pocket"

/* Of this model, in bf16 at 64x64. */
enum { LOST_FIRST = 40, LOST_END = 48 }; /* calls of a step */
enum { DOUBLES = 2, SINGLES = 3, WIDTH = 64, ROWS = 512 + 16, TEXT_LAYERS = 27, TEXT_WIDTH = 32, RANKS = 2, BF16 = 2 };

static struct engine_team *open_as(enum engine_variant variant)
{
    struct engine_team *t;
    struct engine_error why;
    struct engine_options o = {.model_dir = MODEL, .precision = ENGINE_BF16, .device = "cuda:0,1", .plan_width = 64, .plan_height = 64,
                               .transformer = MODEL "/transformer", .variant = variant};
    if (!engine_team_open(&t, &o, &why))
        fail_msg("%s", why.text);
    return t;
}

static struct engine_team *open_team(void)
{
    return open_as(ENGINE_DISTILLED);
}

static void close_team(struct engine_team *t)
{
    char text[1024] = "";
    engine_team_close(t);
    cuda_simulator.fault("");
    cuda_simulator.restore();
    if (cuda_simulator.leaks(text, sizeof text) != 0)
        fail_msg("left behind: %s", text);
}

static bool paint(struct engine_team *t, int steps, int side, uint8_t *ret_rgb, struct engine_error *why)
{
    struct engine_request r = {.prompt = "a fox", .width = side, .height = side, .steps = steps, .guidance = NAN};
    struct engine_image image;
    engine_team_defaults(t, &r);
    if (!engine_team_generate(t, &r, 1, &image, NULL, why))
        return false;
    if (ret_rgb)
        memcpy(ret_rgb, image.rgb, 64 * 64 * 3);
    engine_image_done(&image);
    return true;
}

static void must_paint(struct engine_team *t, int steps, uint8_t *ret_rgb)
{
    struct engine_error why;
    if (!paint(t, steps, 64, ret_rgb, &why))
        fail_msg("%s", why.text);
}

/* --- what goes between them ------------------------------------------------------------------------------------ */

static struct cudasim_counters counted(struct engine_team *t, int steps)
{
    struct cudasim_counters c;
    cuda_simulator.counters_reset();
    must_paint(t, steps, NULL);
    cuda_simulator.counters(&c);
    return c;
}

/* Two sums per double block, over both streams, one per single block, two per layer of the text encoder, each in two parts: engine-spec's bytes. */
static void a_step_moves_what_the_plan_says(void **state)
{
    (void)state;
    struct engine_team *t = open_team();
    struct cudasim_counters first = counted(t, 1), one = counted(t, 1), two = counted(t, 2);
    const uint64_t sums = 2 * DOUBLES + SINGLES, parts = 2, text = 2 * TEXT_LAYERS;
    assert_int_equal(two.collectives - one.collectives, RANKS * parts * sums);
    assert_int_equal(two.collective_bytes - one.collective_bytes, RANKS * sums * ROWS * WIDTH * BF16);
    assert_int_equal(first.collectives - one.collectives, RANKS * parts * text); /* the prompt is known the second time */
    assert_int_equal(first.collective_bytes - one.collective_bytes, RANKS * text * 512 * TEXT_WIDTH * BF16);
    close_team(t);
}

/* With a pass of guidance on each rank it is the velocities, both of them, in one sum, and no byte for a prompt. The steps are graphs. */
static void passes_move_velocities_only(void **state)
{
    (void)state;
    struct engine_team *t = open_as(ENGINE_BASE);
    struct cudasim_counters first = counted(t, 1), one = counted(t, 1), three = counted(t, 3);
    assert_int_equal(first.collectives, RANKS);
    assert_int_equal(one.collectives, RANKS);
    assert_int_equal(one.collective_bytes, RANKS * 2 * 16 * 128 * BF16);
    assert_int_equal(three.collective_bytes, 3 * one.collective_bytes);
    close_team(t);
}

/* What a reference needs is loaded by all ranks when it is checked, or by none: then a picture without is as ever. */
static void a_reference_is_checked_by_all(void **state)
{
    (void)state;
    static const uint8_t rgb[64 * 64 * 3];
    const struct engine_reference reference = {64, 64, rgb};
    struct engine_team *t = open_team();
    struct engine_request r = {.prompt = "a fox", .width = 64, .height = 64, .guidance = NAN, .references = &reference, .reference_count = 1};
    struct engine_error why;
    engine_team_defaults(t, &r);
    assert_true(cuda_simulator.fault("malloc:1@1"));
    assert_false(engine_team_check(t, &r, &why));
    assert_int_equal(why.fault, ENGINE_NO_MEMORY);
    assert_true(cuda_simulator.fault(""));
    must_paint(t, 1, NULL);
    if (!engine_team_check(t, &r, &why))
        fail_msg("%s", why.text);
    r.steps = 0;
    assert_false(engine_team_check(t, &r, &why));
    assert_int_equal(why.fault, ENGINE_BAD_REQUEST);
    must_paint(t, 1, NULL);
    close_team(t);
}

/* --- trouble ----------------------------------------------------------------------------------------------------- */

static bool paint_again(struct engine_team *t, struct engine_error *why)
{
    return paint(t, 1, 64, NULL, why);
}

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The fault comes in a piece of work behind the first picture. The team must end within 10 s beyond what a picture takes (here and now: the
 * machine may do other things), tell of a failed device, stay so and leave nothing. */
static void ends_in(enum engine_variant variant, bool (*work)(struct engine_team *, struct engine_error *), const char *fault, const char *says)
{
    struct engine_team *t = open_as(variant);
    struct engine_error why = {0};
    double well_s = now_s();
    must_paint(t, 1, NULL);
    well_s = now_s() - well_s;
    assert_true(cuda_simulator.fault(fault));
    double begun_s = now_s();
    assert_false(work(t, &why));
    double took_s = now_s() - begun_s;
    print_message("%s: %.1f s, a picture %.1f: %s\n", fault, took_s, well_s, why.text);
    assert_int_equal(why.fault, ENGINE_DEVICE);
    assert_non_null(strstr(why.text, says));
    assert_true(took_s < 10 + well_s);
    assert_false(work(t, &why));
    assert_int_equal(why.fault, ENGINE_DEVICE);
    close_team(t);
}

static void ends_the_team(enum engine_variant variant, const char *fault, const char *says)
{
    ends_in(variant, paint_again, fault, says);
}

static void a_dead_rank_ends_the_team(void **state)
{
    (void)state;
    ends_the_team(ENGINE_DISTILLED, "dead:3@1", "a sum of the team does not end");
}

static void a_wrong_rank_ends_the_team(void **state)
{
    (void)state;
    ends_the_team(ENGINE_DISTILLED, "wrong:3@1", "differs between ranks"); /* a row of the text, which no picture shows */
    ends_the_team(ENGINE_DISTILLED, "wrong:7@0", "differs between ranks");
    ends_the_team(ENGINE_BASE, "wrong:1@1", "differs between ranks"); /* a velocity on its way */
}

/* At whatever call it is noticed: one of NCCL is among these, and another thread's question may be. */
static void a_lost_device_ends_the_team(void **state)
{
    (void)state;
    for (int call = LOST_FIRST; call < LOST_END; call++) {
        char fault[32];
        snprintf(fault, sizeof fault, "lost:%d@1", call);
        ends_the_team(ENGINE_DISTILLED, fault, "device lost");
    }
    ends_the_team(ENGINE_BASE, "lost:40@1", "device lost");
}

static bool adapt(struct engine_team *t, struct engine_error *why)
{
    return engine_team_adapt(t, &(struct engine_adapter){"tests/golden/files/lora-peft.safetensors", 1}, 1, why);
}

static bool check(struct engine_team *t, struct engine_error *why)
{
    static const uint8_t rgb[64 * 64 * 3];
    const struct engine_reference reference = {64, 64, rgb};
    struct engine_request r = {.prompt = "a fox", .width = 64, .height = 64, .guidance = NAN, .references = &reference, .reference_count = 1};
    engine_team_defaults(t, &r);
    return engine_team_check(t, &r, why);
}

/* Its host thread, in a call of the driver; it comes back when the others have given it up, so that all can be closed. Behind the
 * first that gives no sign of life the others wait in a meeting or have returned. */
static void a_rank_that_hangs_ends_the_team_whatever_it_does(void **state)
{
    (void)state;
    ends_in(ENGINE_DISTILLED, adapt, "hang:2=8000@1", "no sign of life for 7.0 s");
    ends_in(ENGINE_DISTILLED, check, "hang:2=8000@1", "no sign of life for 7.0 s");
}

static void a_rank_that_hangs_or_never_comes_ends_the_opening(void **state)
{
    (void)state;
    static const struct { const char *fault, *says; } cases[] = {
        {"absent:1@1", "making a team: another rank did not come for 7.0 s"},
        {"hang:300=8000@1", "no sign of life for 7.0 s"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct engine_team *t = NULL;
        struct engine_error why = {0};
        struct engine_options o = {.model_dir = MODEL, .precision = ENGINE_BF16, .device = "cuda:0,1", .plan_width = 64, .plan_height = 64};
        assert_true(cuda_simulator.fault(cases[i].fault));
        double begun_s = now_s();
        assert_false(engine_team_open(&t, &o, &why));
        double took_s = now_s() - begun_s;
        print_message("%s: %.1f s: %s\n", cases[i].fault, took_s, why.text);
        assert_int_equal(why.fault, ENGINE_DEVICE);
        assert_non_null(strstr(why.text, cases[i].says));
        assert_true(took_s < 10);
        close_team(NULL);
    }
}

static void a_slow_rank_is_waited_for(void **state)
{
    (void)state;
    static uint8_t before[64 * 64 * 3], after[64 * 64 * 3];
    struct engine_team *t = open_team();
    must_paint(t, 1, before);
    assert_true(cuda_simulator.fault("slow:2=1500@1"));
    must_paint(t, 1, after);
    assert_memory_equal(before, after, sizeof before);
    close_team(t);
}

/* A lack of memory on one device is one of the team, and passes: a new communicator, the same picture. */
static void what_does_not_fit_one_device_is_refused_and_the_next_is_whole(void **state)
{
    (void)state;
    static uint8_t before[64 * 64 * 3], after[64 * 64 * 3];
    struct engine_team *t = open_team();
    struct engine_error why = {0};
    must_paint(t, 1, before);
    assert_true(cuda_simulator.fault("malloc:1@1"));
    assert_false(paint(t, 1, 128, NULL, &why)); /* more than was planned: asks for memory */
    assert_int_equal(why.fault, ENGINE_NO_MEMORY);
    assert_true(cuda_simulator.fault(""));
    must_paint(t, 1, after);
    assert_memory_equal(before, after, sizeof before);
    close_team(t);
}

static void a_team_that_cannot_open_leaves_nothing(void **state)
{
    (void)state;
    static const char *const faults[] = {"malloc:1@1", "malloc:9@0", "stream:1@1", "nccl:1", "nccl:2", "event:60@1"};
    for (size_t i = 0; i < sizeof faults / sizeof faults[0]; i++) {
        struct engine_team *t = NULL;
        struct engine_error why = {0};
        struct engine_options o = {.model_dir = MODEL, .precision = ENGINE_BF16, .device = "cuda:0,1", .plan_width = 64, .plan_height = 64};
        assert_true(cuda_simulator.fault(faults[i]));
        if (engine_team_open(&t, &o, &why))
            fail_msg("%s: opened", faults[i]);
        assert_true(why.fault == ENGINE_DEVICE || why.fault == ENGINE_NO_MEMORY);
        close_team(t);
    }
    struct engine_team *t;
    struct engine_error why;
    assert_false(engine_team_open(&t, &(struct engine_options){.model_dir = MODEL, .device = "cuda:0,7"}, &why));
    assert_non_null(strstr(why.text, "no CUDA device 7"));
    close_team(NULL);
}

/* --- room: with devices of little memory (CMakeLists.txt) ---------------------------------------------------------- */

static const char *lacking; /* the device with too little for a picture of this side */
static int too_large;

static void expect_no_room(const struct engine_error *why, int turn)
{
    if (why->fault != ENGINE_NO_MEMORY || !strstr(why->text, lacking))
        fail_msg("turn %d: %s: %s", turn, engine_error_fault(why->fault), why->text);
}

/* The ranks need different amounts, as the first alone decodes, and may have different cards. Whoever is told the figures of one that has
 * room looks for a mistake in the wrong place. */
static void the_rank_that_lacks_room_says_what_it_lacks(void **state)
{
    (void)state;
    static uint8_t before[64 * 64 * 3], after[64 * 64 * 3];
    struct engine_team *t = open_team();
    struct engine_error why = {0};
    must_paint(t, 1, before);
    for (int turn = 0; turn < 20; turn++) {
        assert_false(paint(t, 1, too_large, NULL, &why));
        expect_no_room(&why, turn);
    }
    must_paint(t, 1, after);
    assert_memory_equal(before, after, sizeof before);
    close_team(t);
    for (int turn = 0; turn < 10; turn++) {
        struct engine_options o = {.model_dir = MODEL, .precision = ENGINE_BF16, .device = "cuda:0,1", .plan_width = too_large,
                                   .plan_height = too_large, .placement = ENGINE_RESIDENT};
        assert_false(engine_team_open(&t, &o, &why));
        expect_no_room(&why, turn);
        close_team(NULL);
    }
}

int main(int argc, char **argv)
{
    const struct CMUnitTest room[] = {cmocka_unit_test(the_rank_that_lacks_room_says_what_it_lacks)};
    if (argc == 4 && strcmp(argv[1], "room") == 0) {
        lacking = argv[2], too_large = atoi(argv[3]);
        return cmocka_run_group_tests_name("cuda_team.room", room, cuda_simulator_find, NULL);
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_step_moves_what_the_plan_says),
        cmocka_unit_test(passes_move_velocities_only),
        cmocka_unit_test(a_reference_is_checked_by_all),
        cmocka_unit_test(a_slow_rank_is_waited_for),
        cmocka_unit_test(what_does_not_fit_one_device_is_refused_and_the_next_is_whole),
        cmocka_unit_test(a_team_that_cannot_open_leaves_nothing),
        cmocka_unit_test(a_wrong_rank_ends_the_team),
        cmocka_unit_test(a_lost_device_ends_the_team),
        cmocka_unit_test(a_dead_rank_ends_the_team),
        cmocka_unit_test(a_rank_that_hangs_ends_the_team_whatever_it_does),
        cmocka_unit_test(a_rank_that_hangs_or_never_comes_ends_the_opening),
    };
    return cmocka_run_group_tests_name("cuda_team", tests, cuda_simulator_find, NULL);
}
