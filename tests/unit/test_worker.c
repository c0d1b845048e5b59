/* Tests of a real worker process (with a fake engine) against a coordinator played by hand. What would break in
 * production: finished images rendered again after a crash, files published twice or without a commit, a batch lost to
 * one bad prompt, work that hangs because an answer was lost, a full disk that fails tasks. */
#include "fake_coordinator.h"

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static const char *program;
static const char *const four[] = {"one", "two", "three", "four"};
static const char *const slow[] = {"slow-me 1", "slow-me 2"};

#define LOG_MAX 65536

static void start(struct fake_coordinator *f, const char *fault)
{
    fake_coordinator_begin(f, program);
    fake_coordinator_start_worker(f, fault, NULL);
}

static void expect_ready(struct fake_coordinator *f, uint32_t credit)
{
    struct msg *m = fake_coordinator_expect(f, MSG_READY);
    assert_int_equal(m->ready.credit, credit);
}

static void join(struct fake_coordinator *f)
{
    fake_coordinator_welcome(f);
    expect_ready(f, 8);
}

/* Collects results until `count` came (repetitions counted once) and acknowledges each with the verdict. */
static void expect_results(struct fake_coordinator *f, uint64_t first_task, uint32_t count, enum msg_verdict verdict)
{
    uint64_t seen = 0;
    while (seen != (UINT64_C(1) << count) - 1) {
        struct msg *m = fake_coordinator_expect(f, MSG_RESULT);
        for (uint32_t i = 0; i < m->result.count; i++) {
            const struct msg_result_item *r = &m->result.items[i];
            assert_in_range(r->task, first_task, first_task + count - 1);
            assert_true(r->token == r->task + 1);
            assert_int_equal(strlen(r->sha256), 64);
            assert_int_equal(strlen(r->digest), 64);
            seen |= UINT64_C(1) << (r->task - first_task);
            fake_coordinator_ack(f, r->task, r->token, verdict);
        }
    }
}

static void read_log(struct fake_coordinator *f, char text[LOG_MAX])
{
    char path[128];
    snprintf(path, sizeof path, "%s/worker.log", f->dir);
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    text[fread(text, 1, LOG_MAX - 1, file)] = 0;
    fclose(file);
}

static void stop(struct fake_coordinator *f)
{
    kill(f->pid, SIGTERM);
    struct msg *m = fake_coordinator_expect_any(f);
    while (m->kind == MSG_READY) /* credit 0, unless there was nothing to wait for */
        m = fake_coordinator_expect_any(f);
    assert_int_equal(m->kind, MSG_BYE);
    assert_string_equal(m->bye.reason, "drained");
    assert_int_equal(fake_coordinator_worker_ended(f), 0);
}

/* --- a task's way -------------------------------------------------------------------------------------- */

static void an_image_is_official_only_after_the_commit(void **state)
{
    (void)state;
    struct fake_coordinator f;
    start(&f, NULL);
    struct msg *m = fake_coordinator_expect(&f, MSG_HELLO);
    assert_string_equal(m->hello.worker, "w1");
    assert_true(m->hello.boot_epoch > 0);
    assert_int_equal(m->hello.model_count, 1);
    assert_string_equal(m->hello.models[0].name, "m");
    assert_string_equal(m->hello.models[0].licence, "Apache-2.0");
    assert_int_equal(strlen(m->hello.models[0].digest), 64);
    assert_true(m->hello.models[0].is_distilled);
    assert_string_equal(m->hello.device, "cpu fake, 1 thread");
    struct msg welcome = {.kind = MSG_WELCOME, .welcome = {MSG_VERSION, "fake", 200, 3000}};
    fake_coordinator_say(&f, &welcome);
    m = fake_coordinator_expect(&f, MSG_READY);
    assert_int_equal(m->ready.credit, 8);
    assert_int_equal(m->ready.batch_max, 4);
    assert_int_equal(m->ready.held_count, 0);

    fake_coordinator_assign(&f, 10, four, 1);
    m = fake_coordinator_expect(&f, MSG_RESULT);
    assert_int_equal(m->result.count, 1);
    const struct msg_result_item *r = &m->result.items[0];
    assert_int_equal(r->width, 64);
    assert_int_equal(r->steps, 4);       /* as used, not as asked */
    assert_true(r->guidance == 1.0);
    assert_int_equal(r->seed, 42);
    assert_string_equal(r->file, "t10.png");
    assert_true(r->bytes > 100);
    assert_true(r->render_s > 0);
    assert_true(fake_coordinator_has(&f, ".staging/10-11"));
    assert_false(fake_coordinator_has(&f, "t10.png"));
    assert_int_equal(fake_coordinator_records(&f), 1);
    fake_coordinator_ack(&f, 10, 11, MSG_COMMITTED);
    fake_coordinator_wait_for(&f, "t10.png", true);
    assert_false(fake_coordinator_has(&f, ".staging/10-11"));
    stop(&f);
    assert_int_equal(fake_coordinator_records(&f), 0);
    fake_coordinator_end(&f);
}

static void a_stale_result_is_discarded(void **state)
{
    (void)state;
    struct fake_coordinator f;
    start(&f, NULL);
    join(&f);
    fake_coordinator_assign(&f, 10, four, 2);
    expect_results(&f, 10, 2, MSG_STALE);
    fake_coordinator_wait_for(&f, ".staging/10-11", false);
    fake_coordinator_wait_for(&f, ".staging/11-12", false);
    stop(&f);
    assert_false(fake_coordinator_has(&f, "t10.png"));
    assert_int_equal(fake_coordinator_records(&f), 0);
    fake_coordinator_end(&f);
}

static void a_result_is_said_until_it_is_answered_and_answers_may_come_twice(void **state)
{
    (void)state;
    struct fake_coordinator f;
    start(&f, NULL);
    join(&f);
    fake_coordinator_assign(&f, 10, four, 1);
    for (int i = 0; i < 3; i++) {
        struct msg *m = fake_coordinator_expect(&f, MSG_RESULT);
        assert_int_equal(m->result.items[0].task, 10);
    }
    fake_coordinator_ack(&f, 10, 11, MSG_COMMITTED);
    fake_coordinator_ack(&f, 10, 11, MSG_COMMITTED);
    fake_coordinator_ack(&f, 99, 99, MSG_COMMITTED);
    fake_coordinator_wait_for(&f, "t10.png", true);
    fake_coordinator_ack(&f, 10, 11, MSG_STALE); /* too late to matter */
    fake_coordinator_expect_quiet(&f, 300);
    assert_true(fake_coordinator_has(&f, "t10.png"));
    stop(&f);
    fake_coordinator_end(&f);
}

/* --- killed --------------------------------------------------------------------------------------------- */

static void killed_after_staging_the_result_is_said_again_and_published_once(void **state)
{
    (void)state;
    struct fake_coordinator f;
    start(&f, "exit-after-stage:2");
    join(&f);
    fake_coordinator_assign(&f, 10, four, 2);
    assert_int_equal(fake_coordinator_worker_ended(&f), 128 + SIGKILL);
    assert_int_equal(fake_coordinator_records(&f), 2);
    fake_coordinator_close(&f); /* what the first process had sent is of no interest */
    fake_coordinator_open(&f);

    fake_coordinator_start_worker(&f, NULL, NULL);
    fake_coordinator_welcome(&f);
    expect_results(&f, 10, 2, MSG_COMMITTED); /* before READY: expect_results fails on any other kind */
    expect_ready(&f, 8);
    fake_coordinator_wait_for(&f, "t10.png", true);
    fake_coordinator_wait_for(&f, "t11.png", true);
    stop(&f);
    assert_int_equal(fake_coordinator_records(&f), 0);

    fake_coordinator_start_worker(&f, NULL, NULL); /* and never again */
    join(&f);
    fake_coordinator_expect_quiet(&f, 300);
    stop(&f);
    fake_coordinator_end(&f);
}

static void killed_between_commit_and_publish_the_file_becomes_official_later(void **state)
{
    (void)state;
    struct fake_coordinator f;
    start(&f, "exit-before-publish");
    join(&f);
    fake_coordinator_assign(&f, 10, four, 1);
    expect_results(&f, 10, 1, MSG_COMMITTED);
    assert_int_equal(fake_coordinator_worker_ended(&f), 128 + SIGKILL);
    assert_false(fake_coordinator_has(&f, "t10.png"));
    fake_coordinator_start_worker(&f, NULL, NULL);
    fake_coordinator_welcome(&f);
    expect_results(&f, 10, 1, MSG_COMMITTED);
    expect_ready(&f, 8);
    fake_coordinator_wait_for(&f, "t10.png", true);
    stop(&f);
    fake_coordinator_end(&f);
}

static void killed_before_staging_nothing_is_left_behind(void **state)
{
    (void)state;
    struct fake_coordinator f;
    start(&f, NULL);
    join(&f);
    fake_coordinator_assign(&f, 10, slow, 2);
    fake_coordinator_expect_state(&f, "rendering");
    kill(f.pid, SIGKILL);
    assert_int_equal(fake_coordinator_worker_ended(&f), 128 + SIGKILL);
    assert_int_equal(fake_coordinator_records(&f), 0);
    fake_coordinator_close(&f);
    fake_coordinator_open(&f);
    fake_coordinator_start_worker(&f, NULL, NULL);
    join(&f);
    stop(&f);
    fake_coordinator_end(&f);
}

/* --- failures -------------------------------------------------------------------------------------------- */

static void one_bad_request_does_not_fail_its_neighbours(void **state)
{
    (void)state;
    static const char *const prompts[] = {"fine", "refuse-me", "nan-me", "fine too"};
    struct fake_coordinator f;
    char outcomes[5];
    start(&f, NULL);
    join(&f);
    fake_coordinator_assign(&f, 10, prompts, 4);
    fake_coordinator_collect(&f, 10, 4, outcomes);
    assert_string_equal(outcomes, "RrtR");
    assert_string_equal(f.reasons[1], "prompt: 600 tokens, at most 512");
    assert_string_equal(f.reasons[2], "picture has NaN");
    fake_coordinator_wait_for(&f, "t10.png", true);
    fake_coordinator_wait_for(&f, "t13.png", true);
    stop(&f);
    fake_coordinator_end(&f);
}

static void a_batch_that_does_not_fit_is_halved_until_it_does(void **state)
{
    (void)state;
    static const char *const prompts[] = {"too-big 1", "too-big 2", "too-big 3"};
    struct fake_coordinator f;
    char outcomes[5], log[LOG_MAX];
    start(&f, NULL);
    join(&f);
    fake_coordinator_assign(&f, 10, prompts, 3);
    fake_coordinator_collect(&f, 10, 3, outcomes);
    assert_string_equal(outcomes, "RRR");
    fake_coordinator_assign(&f, 20, prompts, 3); /* the cap was learnt: no second failure */
    fake_coordinator_collect(&f, 20, 3, outcomes);
    assert_string_equal(outcomes, "RRR");
    read_log(&f, log);
    char *first = strstr(log, "batch_cap_lowered");
    assert_non_null(first);
    assert_null(strstr(first + 1, "batch_cap_lowered"));
    fake_coordinator_end(&f);
}

static void an_image_too_big_alone_is_reported_as_oom(void **state)
{
    (void)state;
    struct fake_coordinator f;
    char outcomes[5];
    start(&f, "oom");
    join(&f);
    fake_coordinator_assign(&f, 10, four, 1);
    fake_coordinator_collect(&f, 10, 1, outcomes);
    assert_string_equal(outcomes, "o");
    fake_coordinator_end(&f);
}

static void a_lost_device_ends_the_process_for_its_supervisor(void **state)
{
    (void)state;
    struct fake_coordinator f;
    char outcomes[7];
    start(&f, "lose-device:2");
    join(&f);
    fake_coordinator_assign(&f, 10, slow, 2);
    fake_coordinator_assign(&f, 12, four, 2);
    fake_coordinator_assign(&f, 14, four, 2);
    fake_coordinator_collect(&f, 10, 6, outcomes);
    assert_string_equal(outcomes, "RRttll"); /* the batch behind it waited here and is not attempted */
    while (fake_coordinator_expect_any(&f)->kind != MSG_BYE)
        assert_int_equal(f.said.kind, MSG_READY);
    assert_int_equal(fake_coordinator_worker_ended(&f), 75);
    fake_coordinator_end(&f);
}

static void assign_shape(struct fake_coordinator *f, const struct msg_assign *how, uint64_t task)
{
    struct msg_task t = {.task = task, .token = task + 1, .attempt = 1, .prompt = "p", .negative = "", .file = "t.png"};
    struct msg m = {.kind = MSG_ASSIGN, .assign = *how};
    if (how->tasks)
        t.file = how->tasks->file;
    m.assign.tasks = &t;
    m.assign.count = 1;
    fake_coordinator_say(f, &m);
}

static void rows_that_are_wrong_are_refused_with_a_sentence(void **state)
{
    (void)state;
    struct fake_coordinator f;
    char outcomes[5];
    start(&f, NULL);
    join(&f);
    struct msg_task escaping = {.file = "../t.png"};
    const struct msg_assign fine = {.batch = 1, .campaign = "c", .model = "m", .out_dir = f.out_dir, .format = "png", .use = "",
                                    .width = 64, .height = 64, .guidance = NAN};
    struct { struct msg_assign how; const char *outcome, *says; } rows[] = {
        {fine, "r", "65x64"}, {fine, "r", "4000000000x64"}, {fine, "r", "absolute"}, {fine, "r", "'gif' is not png"},
        {fine, "t", "model 'other' is not on this worker"}, {fine, "r", "'../t.png'"}, {fine, "R", ""}};
    rows[0].how.width = 65;
    rows[1].how.width = 4000000000u;
    rows[2].how.out_dir = "relative";
    rows[3].how.format = "gif";
    rows[4].how.model = "other";
    rows[5].how.tasks = &escaping;
    for (uint64_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        assign_shape(&f, &rows[i].how, 100 + i);
        fake_coordinator_collect(&f, 100 + i, 1, outcomes);
        assert_string_equal(outcomes, rows[i].outcome);
        if (*outcomes != 'R' && !strstr(f.reasons[0], rows[i].says))
            fail_msg("row %d says '%s', want '%s'", (int)i, f.reasons[0], rows[i].says);
    }
    fake_coordinator_end(&f);
}

static void a_non_commercial_model_is_not_used_commercially(void **state)
{
    (void)state;
    struct fake_coordinator f;
    char outcomes[5], model[300], command[400];
    fake_coordinator_begin(&f, program);
    snprintf(model, sizeof model, "nc=%s/model-nc", f.dir);
    snprintf(command, sizeof command, "cp -r %s %s/model-nc", f.model_dir, f.dir);
    assert_int_equal(system(command), 0);
    fake_coordinator_start_worker(&f, NULL, (const char *[]){"--model", model, NULL});
    join(&f);
    struct msg_assign how = {.batch = 1, .campaign = "c", .model = "nc", .out_dir = f.out_dir, .format = "png", .use = "commercial",
                             .width = 64, .height = 64, .guidance = NAN};
    assign_shape(&f, &how, 10);
    fake_coordinator_collect(&f, 10, 1, outcomes);
    assert_string_equal(outcomes, "r");
    assert_non_null(strstr(f.reasons[0], "FLUX Non-Commercial"));
    how.use = "non-commercial";
    assign_shape(&f, &how, 11);
    fake_coordinator_collect(&f, 11, 1, outcomes);
    assert_string_equal(outcomes, "R");
    fake_coordinator_end(&f);
}

/* --- cancel, drain, signals -------------------------------------------------------------------------------- */

static void cancel_takes_effect_between_steps(void **state)
{
    (void)state;
    struct fake_coordinator f;
    char outcomes[5];
    uint64_t both[] = {10, 11};
    start(&f, NULL);
    join(&f);
    fake_coordinator_assign(&f, 10, slow, 2);
    fake_coordinator_assign(&f, 20, four, 1);
    fake_coordinator_expect_state(&f, "rendering");
    struct msg cancel = {.kind = MSG_CANCEL, .cancel = {2, both, "campaign cancelled"}};
    fake_coordinator_say(&f, &cancel);
    fake_coordinator_collect(&f, 10, 2, outcomes);
    assert_string_equal(outcomes, "ll");
    fake_coordinator_collect(&f, 20, 1, outcomes);
    assert_string_equal(outcomes, "R");
    assert_false(fake_coordinator_has(&f, ".staging/10-11"));
    stop(&f);
    fake_coordinator_end(&f);
}

static void one_cancelled_task_does_not_stop_its_neighbour(void **state)
{
    (void)state;
    struct fake_coordinator f;
    char outcomes[5];
    uint64_t one[] = {11};
    start(&f, NULL);
    join(&f);
    fake_coordinator_assign(&f, 10, slow, 2);
    fake_coordinator_expect_state(&f, "rendering");
    struct msg cancel = {.kind = MSG_CANCEL, .cancel = {1, one, "campaign cancelled"}};
    fake_coordinator_say(&f, &cancel);
    fake_coordinator_collect(&f, 10, 2, outcomes);
    assert_string_equal(outcomes, "Rl");
    stop(&f);
    fake_coordinator_end(&f);
}

static void told_to_stop_it_finishes_what_runs_and_returns_the_rest(void **state)
{
    (void)state;
    struct fake_coordinator f;
    char outcomes[5];
    start(&f, NULL);
    join(&f);
    fake_coordinator_assign(&f, 10, slow, 2);
    fake_coordinator_assign(&f, 12, four, 2);
    fake_coordinator_expect_state(&f, "rendering");
    kill(f.pid, SIGTERM);
    fake_coordinator_collect(&f, 10, 4, outcomes);
    assert_string_equal(outcomes, "RRll");
    assert_string_equal(f.reasons[2], "worker was told to stop");
    struct msg *m = fake_coordinator_expect_any(&f);
    if (m->kind == MSG_READY)
        m = fake_coordinator_expect(&f, MSG_BYE);
    assert_int_equal(m->kind, MSG_BYE);
    assert_int_equal(fake_coordinator_worker_ended(&f), 0);
    assert_true(fake_coordinator_has(&f, "t10.png"));
    assert_true(fake_coordinator_has(&f, "t11.png"));
    assert_int_equal(fake_coordinator_records(&f), 0);
    fake_coordinator_end(&f);
}

static void a_draining_worker_returns_new_work_at_once(void **state)
{
    (void)state;
    struct fake_coordinator f;
    char outcomes[5];
    start(&f, NULL);
    join(&f);
    fake_coordinator_assign(&f, 10, slow, 2);
    fake_coordinator_expect_state(&f, "rendering");
    struct msg drain = {.kind = MSG_DRAIN};
    fake_coordinator_say(&f, &drain);
    fake_coordinator_assign(&f, 12, four, 2);
    fake_coordinator_collect(&f, 10, 4, outcomes);
    assert_string_equal(outcomes, "RRll");
    fake_coordinator_end(&f);
}

/* Farm and machine go down together: the spool has what nobody answers any more, and half a minute of waiting helps nobody. */
static void a_draining_worker_does_not_wait_for_a_coordinator_that_is_gone(void **state)
{
    (void)state;
    struct fake_coordinator f;
    start(&f, NULL);
    join(&f);
    fake_coordinator_assign(&f, 10, four, 1);
    fake_coordinator_expect(&f, MSG_RESULT);
    kill(f.pid, SIGTERM);
    fake_coordinator_expect(&f, MSG_READY); /* credit 0: it has heard */
    fake_coordinator_close(&f);
    assert_int_equal(fake_coordinator_worker_ended(&f), 0);
    assert_int_equal(fake_coordinator_records(&f), 1);
    fake_coordinator_end(&f);
}

static void a_second_signal_leaves_at_once(void **state)
{
    (void)state;
    struct fake_coordinator f;
    start(&f, "hang");
    join(&f);
    fake_coordinator_assign(&f, 10, four, 1);
    fake_coordinator_expect_state(&f, "rendering");
    kill(f.pid, SIGTERM);
    fake_coordinator_expect_any(&f);
    assert_int_equal(f.said.kind, MSG_READY);
    fake_coordinator_expect_state(&f, "draining");
    kill(f.pid, SIGTERM);
    fake_coordinator_expect(&f, MSG_BYE);
    assert_int_equal(fake_coordinator_worker_ended(&f), 128 + SIGTERM);
    fake_coordinator_end(&f);
}

static void a_hung_device_is_seen_by_its_step_counter(void **state)
{
    (void)state;
    struct fake_coordinator f;
    start(&f, "hang");
    join(&f);
    fake_coordinator_assign(&f, 10, four, 1);
    fake_coordinator_expect_state(&f, "rendering");
    fake_coordinator_expect_quiet(&f, 300);
    uint64_t before = f.step_counter;
    fake_coordinator_expect_quiet(&f, 600); /* heartbeats go on, steps do not */
    assert_true(f.step_counter == before);
    assert_int_equal(f.held, 1);
    fake_coordinator_end(&f);
}

/* --- the coordinator goes away --------------------------------------------------------------------------------- */

static void while_the_coordinator_is_away_work_goes_on_and_is_settled_later(void **state)
{
    (void)state;
    struct fake_coordinator f;
    char outcomes[9];
    start(&f, NULL);
    join(&f);
    fake_coordinator_assign(&f, 10, four, 4);
    fake_coordinator_assign(&f, 14, four, 4);
    fake_coordinator_close(&f);
    while (fake_coordinator_records(&f) < 8) /* all that was held is rendered and spooled */
        usleep(20000);
    sleep(1);
    fake_coordinator_open(&f);
    /* The old socket may still bring words to a coordinator that does not know it; it asks for HELLO. */
    struct msg *m = fake_coordinator_expect_any(&f);
    while (m->kind != MSG_HELLO) {
        struct msg who = {.kind = MSG_REFUSED, .refused = {.reason = "say hello first"}};
        fake_coordinator_say(&f, &who);
        m = fake_coordinator_expect_any(&f);
    }
    struct msg welcome = {.kind = MSG_WELCOME, .welcome = {MSG_VERSION, "second", 200, 3000}};
    fake_coordinator_say(&f, &welcome);
    fake_coordinator_collect(&f, 10, 8, outcomes);
    assert_string_equal(outcomes, "RRRRRRRR");
    for (int i = 10; i < 18; i++) {
        char name[32];
        snprintf(name, sizeof name, "t%d.png", i);
        while (!fake_coordinator_has(&f, name))
            usleep(10000);
    }
    fake_coordinator_end(&f);
}

static void a_silent_coordinator_gets_a_new_connection_with_the_same_epoch(void **state)
{
    (void)state;
    struct fake_coordinator f;
    char first[LINK_PEER_MAX];
    start(&f, NULL);
    struct msg *m = fake_coordinator_expect(&f, MSG_HELLO);
    uint64_t epoch = m->hello.boot_epoch;
    struct msg welcome = {.kind = MSG_WELCOME, .welcome = {MSG_VERSION, "fake", 200, 1000}};
    fake_coordinator_say(&f, &welcome);
    expect_ready(&f, 8);
    fake_coordinator_assign(&f, 10, (const char *[]){"slow-me"}, 1);
    snprintf(first, sizeof first, "%s", f.peer);
    sleep(3); /* says nothing, hears nothing */
    do
        m = fake_coordinator_expect_any(&f);
    while (m->kind != MSG_HELLO);
    assert_true(m->hello.boot_epoch == epoch);
    assert_string_not_equal(f.peer, first);
    fake_coordinator_end(&f);
}

static void what_is_held_from_before_is_named_in_ready(void **state)
{
    (void)state;
    struct fake_coordinator f;
    start(&f, "slow-ms:700");
    join(&f);
    fake_coordinator_assign(&f, 10, slow, 2);
    fake_coordinator_expect_state(&f, "rendering");
    struct msg who = {.kind = MSG_REFUSED, .refused = {.reason = "say hello first"}};
    fake_coordinator_say(&f, &who);
    fake_coordinator_welcome(&f);
    struct msg *m = fake_coordinator_expect(&f, MSG_READY);
    assert_int_equal(m->ready.credit, 8);
    assert_int_equal(m->ready.held_count, 2);
    assert_true(m->ready.held[0].task == 10 && m->ready.held[0].token == 11);
    fake_coordinator_end(&f);
}

static void a_refusal_for_good_ends_the_process(void **state)
{
    (void)state;
    struct fake_coordinator f;
    char log[LOG_MAX];
    start(&f, NULL);
    fake_coordinator_expect(&f, MSG_HELLO);
    struct msg later = {.kind = MSG_REFUSED, .refused = {.reason = "another worker has this name"}};
    fake_coordinator_say(&f, &later);
    fake_coordinator_expect(&f, MSG_HELLO); /* tries again */
    struct msg final = {.kind = MSG_REFUSED, .refused = {.reason = "protocol 1 is too old", .is_final = true}};
    fake_coordinator_say(&f, &final);
    assert_int_equal(fake_coordinator_worker_ended(&f), 2);
    read_log(&f, log);
    assert_non_null(strstr(log, "refused this worker: protocol 1 is too old"));
    fake_coordinator_end(&f);
}

/* --- disks ----------------------------------------------------------------------------------------------------- */

static void a_missing_disk_stops_the_work_not_the_task(void **state)
{
    (void)state;
    struct fake_coordinator f;
    char out_dir[192], outcomes[5];
    start(&f, NULL);
    snprintf(out_dir, sizeof out_dir, "%s/images", f.dir);
    snprintf(f.out_dir, sizeof f.out_dir, "%s/mount/images", f.dir);
    join(&f);
    fake_coordinator_assign(&f, 10, four, 3);
    struct msg *m = fake_coordinator_expect(&f, MSG_READY);
    assert_int_equal(m->ready.credit, 0);
    fake_coordinator_expect_state(&f, "blocked: missing folder: ");
    assert_non_null(strstr(f.state, "/mount/images"));
    assert_int_equal(f.held, 3);
    snprintf(f.out_dir, sizeof f.out_dir, "%s", out_dir); /* another campaign's folder is fine */
    fake_coordinator_assign(&f, 20, four, 1);
    fake_coordinator_collect(&f, 20, 1, outcomes);
    assert_string_equal(outcomes, "R");
    snprintf(f.out_dir, sizeof f.out_dir, "%s/mount", f.dir);
    assert_int_equal(mkdir(f.out_dir, 0777), 0);
    fake_coordinator_collect(&f, 10, 3, outcomes);
    assert_string_equal(outcomes, "RRR");
    expect_ready(&f, 8);
    fake_coordinator_expect_state(&f, "idle");
    fake_coordinator_wait_for(&f, "images/t12.png", true);
    fake_coordinator_end(&f);
}

/* The state names the folder, cut where it gets long. Half a character there made every heartbeat unsendable: the worker was
 * taken for dead and its images were rendered again, until the disk was back. */
static void a_long_folder_with_accents_does_not_silence_the_worker(void **state)
{
    (void)state;
    struct fake_coordinator f;
    char outcomes[5], command[1100];
    const size_t cut = 400; /* writer.c shows so much of a folder */
    start(&f, NULL);
    size_t used = (size_t)snprintf(f.out_dir, sizeof f.out_dir, "%s/mount/%s", f.dir, "");
    if (used % 2 == cut % 2)
        f.out_dir[used++] = 'x';
    for (; used < cut + 100; used += 2)
        memcpy(f.out_dir + used, used % 100 < 2 ? "x/" : "\xc3\xa4", 2);
    f.out_dir[used] = 0;
    assert_true(((unsigned char)f.out_dir[cut] & 0xc0) == 0x80);
    join(&f);
    fake_coordinator_assign(&f, 10, four, 1);
    fake_coordinator_expect(&f, MSG_READY);
    fake_coordinator_expect_state(&f, "blocked: missing folder: ");
    snprintf(command, sizeof command, "mkdir -p '%s'", f.out_dir);
    assert_int_equal(system(command), 0);
    fake_coordinator_collect(&f, 10, 1, outcomes);
    assert_string_equal(outcomes, "R");
    expect_ready(&f, 8);
    stop(&f);
    fake_coordinator_end(&f);
}

static void fill(const char *path)
{
    static const char block[4096];
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    while (fwrite(block, 1, sizeof block, file) == sizeof block && fflush(file) == 0)
        ;
    fclose(file);
}

static void a_full_disk_stops_the_work_and_room_lets_it_go_on(void **state)
{
    (void)state;
    struct fake_coordinator f;
    char disk[80], filler[128], outcomes[5];
    fake_coordinator_begin(&f, program);
    snprintf(disk, sizeof disk, "%s/disk", f.dir);
    snprintf(filler, sizeof filler, "%s/filler", disk);
    assert_int_equal(mkdir(disk, 0777), 0);
    if (mount("tmpfs", disk, "tmpfs", 0, "size=128k") != 0) {
        fake_coordinator_end(&f);
        skip(); /* only root may mount a small disk */
    }
    snprintf(f.out_dir, sizeof f.out_dir, "%s/images", disk);
    fill(filler);
    fake_coordinator_start_worker(&f, NULL, NULL);
    join(&f);
    fake_coordinator_assign(&f, 10, four, 4);
    struct msg *m = fake_coordinator_expect(&f, MSG_READY);
    assert_int_equal(m->ready.credit, 0);
    fake_coordinator_expect_state(&f, "blocked: no space in ");
    assert_int_equal(f.held, 4);
    assert_int_equal(unlink(filler), 0);
    fake_coordinator_collect(&f, 10, 4, outcomes);
    assert_string_equal(outcomes, "RRRR");
    expect_ready(&f, 8);
    fake_coordinator_wait_for(&f, "t13.png", true);
    stop(&f);
    assert_int_equal(umount(disk), 0);
    fake_coordinator_end(&f);
}

/* --- starting --------------------------------------------------------------------------------------------------- */

static void expect_refusal_to_start(struct fake_coordinator *f, const char *const *words, const char *fault, const char *says)
{
    char log[LOG_MAX];
    fake_coordinator_start_worker(f, fault, words);
    assert_int_equal(fake_coordinator_worker_ended(f), 2);
    read_log(f, log);
    if (!strstr(log, says))
        fail_msg("says '%s', want '%s'", log, says);
}

static void what_cannot_work_is_refused_at_start(void **state)
{
    (void)state;
    struct fake_coordinator f;
    char bad[300], command[400];
    fake_coordinator_begin(&f, program);
    snprintf(command, sizeof command, "cp -r %s %s/bad", f.model_dir, f.dir);
    assert_int_equal(system(command), 0);
    snprintf(bad, sizeof bad, "b=%s/bad", f.dir);
    expect_refusal_to_start(&f, (const char *[]){"--model", bad, NULL}, NULL, "kiln-worker: model 'b' (");
    expect_refusal_to_start(&f, (const char *[]){"--model", bad, NULL}, NULL, "open model: transformer: shape [1,2], want [3,4]");
    expect_refusal_to_start(&f, (const char *[]){"--model", "x=/no/such/folder", NULL}, NULL, "/no/such/folder");
    expect_refusal_to_start(&f, (const char *[]){"--model", bad + 2, NULL}, NULL, "want NAME=DIR");
    expect_refusal_to_start(&f, (const char *[]){"--model", bad, "--model", bad, NULL}, NULL, "given twice");
    expect_refusal_to_start(&f, (const char *[]){"--connect", "tcp://10.0.0.1:5", NULL}, NULL, "only this machine");
    static const char *const devices[] = {"gpu", "", "cpu0", "cudaX", "cuda0", "cuda:", "cuda:X", "cuda:1x", "cuda:-1", "cuda: 1"};
    for (size_t i = 0; i < sizeof devices / sizeof *devices; i++)
        expect_refusal_to_start(&f, (const char *[]){"--device", devices[i], NULL}, NULL, "accepted: cpu, cuda, cuda:N");
    expect_refusal_to_start(&f, (const char *[]){"--batch", "65", NULL}, NULL, "from 1 to 64");
    expect_refusal_to_start(&f, (const char *[]){"--batch", "0", NULL}, NULL, "from 1 to 64");
    expect_refusal_to_start(&f, (const char *[]){"--threads", "0", NULL}, NULL, "from 1 to 4096");
    expect_refusal_to_start(&f, (const char *[]){"--model", "\xc3=/tmp", NULL}, NULL, "not UTF-8");
    expect_refusal_to_start(&f, (const char *[]){"--name", "a/b", NULL}, NULL, "--name 'a/b'");
    expect_refusal_to_start(&f, (const char *[]){"--precision", "f16", NULL}, NULL, "accepted: bf16, f32, fp8, fp8-f32");
    expect_refusal_to_start(&f, (const char *[]){"--credit", "2", NULL}, NULL, "at least --batch");
    expect_refusal_to_start(&f, (const char *[]){"--spool", "/proc/nowhere", NULL}, NULL, "spool folder /proc/nowhere/w1");
    expect_refusal_to_start(&f, (const char *[]){"--wat", NULL}, NULL, "unknown option '--wat'");
    expect_refusal_to_start(&f, (const char *[]){"word", NULL}, NULL, "unknown word 'word'");
    expect_refusal_to_start(&f, NULL, "explode", "want NAME or NAME:NUMBER");
    fake_coordinator_end(&f);
}

static void two_workers_of_one_name_do_not_share_a_spool(void **state)
{
    (void)state;
    struct fake_coordinator f;
    start(&f, NULL);
    join(&f);
    pid_t first = f.pid;
    fake_coordinator_start_worker(&f, NULL, NULL);
    assert_int_equal(fake_coordinator_worker_ended(&f), 2);
    f.pid = first;
    stop(&f);
    fake_coordinator_end(&f);
}

static void more_than_the_credit_is_returned(void **state)
{
    (void)state;
    struct fake_coordinator f;
    static const char *prompts[17];
    char outcomes[18];
    for (int i = 0; i < 17; i++)
        prompts[i] = "slow-me";
    start(&f, NULL);
    join(&f);
    fake_coordinator_assign(&f, 100, prompts, 17);
    fake_coordinator_collect(&f, 100, 17, outcomes);
    assert_string_equal(outcomes, "lllllllllllllllll");
    assert_string_equal(f.reasons[0], "more than this worker's credit");
    fake_coordinator_end(&f);
}

/* A lease ran out here and came back with a new token: the old rendering is of no use. */
static void a_task_given_again_replaces_its_older_lease(void **state)
{
    (void)state;
    struct fake_coordinator f;
    start(&f, NULL);
    join(&f);
    fake_coordinator_assign(&f, 10, (const char *[]){"slow-me"}, 1);
    fake_coordinator_expect_state(&f, "rendering");
    struct msg_task t = {.task = 10, .token = 12, .prompt = "again", .negative = "", .file = "t10.png"};
    struct msg m = {.kind = MSG_ASSIGN, .assign = {.batch = 2, .campaign = "c", .model = "m", .out_dir = f.out_dir, .format = "png",
                    .use = "", .width = 64, .height = 64, .guidance = NAN, .count = 1, .tasks = &t}};
    fake_coordinator_say(&f, &m);
    struct msg *said = fake_coordinator_expect(&f, MSG_FAILED);
    assert_int_equal(said->failed.items[0].kind, MSG_FAILURE_RELEASED);
    assert_true(said->failed.items[0].token == 11);
    fake_coordinator_ack(&f, 10, 11, MSG_STALE);
    said = fake_coordinator_expect(&f, MSG_RESULT);
    assert_true(said->result.items[0].token == 12);
    fake_coordinator_end(&f);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(an_image_is_official_only_after_the_commit, fake_coordinator_abandon),
        cmocka_unit_test_teardown(a_stale_result_is_discarded, fake_coordinator_abandon),
        cmocka_unit_test_teardown(a_result_is_said_until_it_is_answered_and_answers_may_come_twice, fake_coordinator_abandon),
        cmocka_unit_test_teardown(killed_after_staging_the_result_is_said_again_and_published_once, fake_coordinator_abandon),
        cmocka_unit_test_teardown(killed_between_commit_and_publish_the_file_becomes_official_later, fake_coordinator_abandon),
        cmocka_unit_test_teardown(killed_before_staging_nothing_is_left_behind, fake_coordinator_abandon),
        cmocka_unit_test_teardown(one_bad_request_does_not_fail_its_neighbours, fake_coordinator_abandon),
        cmocka_unit_test_teardown(a_batch_that_does_not_fit_is_halved_until_it_does, fake_coordinator_abandon),
        cmocka_unit_test_teardown(an_image_too_big_alone_is_reported_as_oom, fake_coordinator_abandon),
        cmocka_unit_test_teardown(a_lost_device_ends_the_process_for_its_supervisor, fake_coordinator_abandon),
        cmocka_unit_test_teardown(rows_that_are_wrong_are_refused_with_a_sentence, fake_coordinator_abandon),
        cmocka_unit_test_teardown(a_non_commercial_model_is_not_used_commercially, fake_coordinator_abandon),
        cmocka_unit_test_teardown(cancel_takes_effect_between_steps, fake_coordinator_abandon),
        cmocka_unit_test_teardown(one_cancelled_task_does_not_stop_its_neighbour, fake_coordinator_abandon),
        cmocka_unit_test_teardown(told_to_stop_it_finishes_what_runs_and_returns_the_rest, fake_coordinator_abandon),
        cmocka_unit_test_teardown(a_draining_worker_returns_new_work_at_once, fake_coordinator_abandon),
        cmocka_unit_test_teardown(a_draining_worker_does_not_wait_for_a_coordinator_that_is_gone, fake_coordinator_abandon),
        cmocka_unit_test_teardown(a_second_signal_leaves_at_once, fake_coordinator_abandon),
        cmocka_unit_test_teardown(a_hung_device_is_seen_by_its_step_counter, fake_coordinator_abandon),
        cmocka_unit_test_teardown(while_the_coordinator_is_away_work_goes_on_and_is_settled_later, fake_coordinator_abandon),
        cmocka_unit_test_teardown(a_silent_coordinator_gets_a_new_connection_with_the_same_epoch, fake_coordinator_abandon),
        cmocka_unit_test_teardown(what_is_held_from_before_is_named_in_ready, fake_coordinator_abandon),
        cmocka_unit_test_teardown(a_refusal_for_good_ends_the_process, fake_coordinator_abandon),
        cmocka_unit_test_teardown(a_missing_disk_stops_the_work_not_the_task, fake_coordinator_abandon),
        cmocka_unit_test_teardown(a_long_folder_with_accents_does_not_silence_the_worker, fake_coordinator_abandon),
        cmocka_unit_test_teardown(a_full_disk_stops_the_work_and_room_lets_it_go_on, fake_coordinator_abandon),
        cmocka_unit_test_teardown(what_cannot_work_is_refused_at_start, fake_coordinator_abandon),
        cmocka_unit_test_teardown(two_workers_of_one_name_do_not_share_a_spool, fake_coordinator_abandon),
        cmocka_unit_test_teardown(more_than_the_credit_is_returned, fake_coordinator_abandon),
        cmocka_unit_test_teardown(a_task_given_again_replaces_its_older_lease, fake_coordinator_abandon),
    };
    if (argc < 2) {
        fprintf(stderr, "usage: test_worker WORKER_PROGRAM [TEST]\n");
        return 2;
    }
    program = argv[1];
    if (argc > 2)
        cmocka_set_test_filter(argv[2]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
