/* Tests of the real worker with the real engine and the pocket model of the golden tests, against a coordinator played
 * by hand. What would break in production: an image that depends on the batch it was in or the threads that made it,
 * a prompt over the limit that is cut or kills its batch. */
#include "fake_coordinator.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

static const char *program, *team;
static const char *const three[] = {"a red fox in fresh snow", "a lighthouse at dusk", "two cups of tea"};

static void start(struct fake_coordinator *f, const char *const *words)
{
    fake_coordinator_begin(f, program);
    snprintf(f->model_dir, sizeof f->model_dir, "tests/golden/models/pocket");
    fake_coordinator_start_worker(f, NULL, words);
    fake_coordinator_welcome(f);
    fake_coordinator_expect(f, MSG_READY);
}

/* The digests of the files of tasks 10, 11, 12, which have seeds 42, 43, 44. */
static void render_three(struct fake_coordinator *f, char sha256[3][65])
{
    uint32_t seen = 0;
    fake_coordinator_assign(f, 10, three, 3);
    while (seen != 7) {
        struct msg *m = fake_coordinator_expect(f, MSG_RESULT);
        for (uint32_t i = 0; i < m->result.count; i++) {
            const struct msg_result_item *r = &m->result.items[i];
            snprintf(sha256[r->task - 10], 65, "%s", r->sha256);
            seen |= 1u << (r->task - 10);
            fake_coordinator_ack(f, r->task, r->token, MSG_COMMITTED);
        }
    }
    fake_coordinator_wait_for(f, "t10.png", true);
    fake_coordinator_wait_for(f, "t12.png", true);
}

static void the_file_does_not_depend_on_batch_threads_or_worker(void **state)
{
    (void)state;
    struct fake_coordinator f;
    char together[3][65], alone[3][65];
    start(&f, (const char *[]){"--threads", "2", NULL});
    render_three(&f, together);
    fake_coordinator_end(&f);
    start(&f, (const char *[]){"--threads", "1", "--batch", "1", "--credit", "8", NULL});
    render_three(&f, alone);
    fake_coordinator_end(&f);
    for (int i = 0; i < 3; i++)
        assert_string_equal(together[i], alone[i]);
    assert_string_not_equal(together[0], together[1]);
}

static void a_prompt_over_the_limit_is_refused_and_its_neighbour_rendered(void **state)
{
    (void)state;
    struct fake_coordinator f;
    char outcomes[4], *prompt = malloc(8001);
    for (int i = 0; i < 2000; i++)
        memcpy(prompt + 4 * i, "q z ", 4);
    prompt[8000] = 0;
    start(&f, NULL);
    fake_coordinator_assign(&f, 10, (const char *[]){"a boat", prompt, "a house"}, 3);
    fake_coordinator_collect(&f, 10, 3, outcomes);
    assert_string_equal(outcomes, "RrR");
    assert_non_null(strstr(f.reasons[1], "512"));
    fake_coordinator_end(&f);
    free(prompt);
}

static void told_to_stop_it_leaves_cleanly(void **state)
{
    (void)state;
    struct fake_coordinator f;
    char outcomes[4];
    start(&f, NULL);
    fake_coordinator_assign(&f, 10, three, 2);
    fake_coordinator_collect(&f, 10, 2, outcomes);
    assert_string_equal(outcomes, "RR");
    kill(f.pid, SIGTERM);
    while (fake_coordinator_expect_any(&f)->kind != MSG_BYE)
        assert_int_equal(f.said.kind, MSG_READY);
    assert_int_equal(fake_coordinator_worker_ended(&f), 0);
    assert_int_equal(fake_coordinator_records(&f), 0);
    fake_coordinator_end(&f);
}

/* Two ranks on one memory node: their pictures depend on the batch as little as those of one. */
static void a_team_renders_the_same_files_whatever_the_batch(void **state)
{
    (void)state;
    struct fake_coordinator f;
    char together[3][65], alone[3][65];
    start(&f, (const char *[]){"--device", "cpu:0,0", NULL});
    render_three(&f, together);
    fake_coordinator_end(&f);
    start(&f, (const char *[]){"--device", "cpu:0,0", "--batch", "1", "--credit", "8", NULL});
    render_three(&f, alone);
    fake_coordinator_end(&f);
    for (int i = 0; i < 3; i++)
        assert_string_equal(together[i], alone[i]);
}

/* On simulated devices. Opening and warming up take 69 sums, a prompt 54, so that the rank dies under way: what it had goes back to
 * be tried again, the process ends, and the one its supervisor starts renders each of them once. */
static void a_rank_that_dies_gives_its_batch_back(void **state)
{
    (void)state;
    struct fake_coordinator f;
    char outcomes[4] = "";
    setenv("CUDASIM_FAULT", "dead:125@1", 1);
    start(&f, (const char *[]){"--device", team, NULL});
    fake_coordinator_assign(&f, 10, three, 2);
    fake_coordinator_collect(&f, 10, 2, outcomes);
    assert_string_equal(outcomes, "tt");
    assert_non_null(strstr(f.reasons[0], "a sum of the team does not end"));
    while (fake_coordinator_expect_any(&f)->kind != MSG_BYE)
        assert_int_equal(f.said.kind, MSG_READY);
    assert_int_equal(fake_coordinator_worker_ended(&f), 75);
    assert_int_equal(fake_coordinator_records(&f), 0);
    assert_false(fake_coordinator_has(&f, "t10.png") || fake_coordinator_has(&f, "t11.png"));

    unsetenv("CUDASIM_FAULT");
    fake_coordinator_start_worker(&f, NULL, (const char *[]){"--device", team, NULL});
    fake_coordinator_welcome(&f);
    fake_coordinator_expect(&f, MSG_READY);
    fake_coordinator_assign(&f, 10, three, 2);
    fake_coordinator_collect(&f, 10, 2, outcomes);
    assert_string_equal(outcomes, "RR");
    fake_coordinator_wait_for(&f, "t10.png", true);
    fake_coordinator_wait_for(&f, "t11.png", true);
    fake_coordinator_end(&f);
}

/* A rank that hangs for good while the model is opened: the process says why, and ends for its supervisor to start it again. */
static void a_rank_that_hangs_ends_the_opening(void **state)
{
    (void)state;
    struct fake_coordinator f;
    setenv("CUDASIM_FAULT", "hang:300=600000@1", 1);
    fake_coordinator_begin(&f, program);
    snprintf(f.model_dir, sizeof f.model_dir, "tests/golden/models/pocket");
    time_t begun = time(NULL);
    fake_coordinator_start_worker(&f, NULL, (const char *[]){"--device", team, NULL});
    assert_int_equal(fake_coordinator_worker_ended(&f), 75);
    assert_true(time(NULL) - begun <= 12); /* 9 s of silence, and what came before */
    unsetenv("CUDASIM_FAULT");
    fake_coordinator_end(&f);
}

/* WORKER_PROGRAM [DEVICES]: with devices, what only a simulated team can suffer. */
int main(int argc, char **argv)
{
    const struct CMUnitTest of_team[] = {
        cmocka_unit_test_teardown(a_rank_that_dies_gives_its_batch_back, fake_coordinator_abandon),
        cmocka_unit_test_teardown(a_rank_that_hangs_ends_the_opening, fake_coordinator_abandon),
    };
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(the_file_does_not_depend_on_batch_threads_or_worker, fake_coordinator_abandon),
        cmocka_unit_test_teardown(a_prompt_over_the_limit_is_refused_and_its_neighbour_rendered, fake_coordinator_abandon),
        cmocka_unit_test_teardown(told_to_stop_it_leaves_cleanly, fake_coordinator_abandon),
        cmocka_unit_test_teardown(a_team_renders_the_same_files_whatever_the_batch, fake_coordinator_abandon),
    };
    if (argc < 2) {
        fprintf(stderr, "usage: test_worker_engine WORKER_PROGRAM [DEVICES]\n");
        return 2;
    }
    program = argv[1];
    team = argc > 2 ? argv[2] : NULL;
    return team ? cmocka_run_group_tests(of_team, NULL, NULL) : cmocka_run_group_tests(tests, NULL, NULL);
}
