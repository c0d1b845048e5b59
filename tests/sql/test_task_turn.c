/* test_task_turn.c - the coordinator's turns on a real server. If these break, images are rendered twice, results are
 * lost, or a restarted database stops the farm. */
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "migrate.h"
#include "test_server.h"

static struct test_server server;

static int64_t group_id(void)
{
    return test_server_number(&server, "select min(id) from task_group");
}

/* claim takes up to count tasks for a worker; the claimed ones live until task_turn_finish. */
static const struct task_turn_result *claim(struct task_turn *t, const char *worker, int count, int lease_ms)
{
    static struct task_want want;
    want = (struct task_want){group_id(), worker, count, lease_ms};
    struct task_turn_request q = {.wants = &want, .want_count = 1};
    if (!test_server_turn(t, &q))
        fail_msg("claim: %s", task_turn_why(t));
    return task_turn_result(t);
}

static struct task_claimed claim_one(struct task_turn *t, const char *worker, int lease_ms)
{
    const struct task_turn_result *r = claim(t, worker, 1, lease_ms);
    assert_int_equal(r->claimed_count, 1);
    struct task_claimed c = r->claimed[0];
    c.prompt = c.negative = c.file = "gone";
    task_turn_finish(t);
    return c;
}

static bool finish_one(struct task_turn *t, const struct task_claimed *c, const char *worker)
{
    struct task_finish f = test_server_finish(c, worker);
    if (!test_server_turn(t, &(struct task_turn_request){.finishes = &f, .finish_count = 1}))
        fail_msg("finish: %s", task_turn_why(t));
    bool committed = task_turn_result(t)->finish_committed[0];
    task_turn_finish(t);
    return committed;
}

static bool fail_one(struct task_turn *t, const struct task_claimed *c, enum task_failure kind)
{
    struct task_fail f = {.task = c->task, .token = c->token, .kind = kind, .reason = "because"};
    if (!test_server_turn(t, &(struct task_turn_request){.fails = &f, .fail_count = 1}))
        fail_msg("fail: %s", task_turn_why(t));
    bool accepted = task_turn_result(t)->fail_accepted[0];
    task_turn_finish(t);
    return accepted;
}

static int sweep(struct task_turn *t, const char *coordinator)
{
    if (!test_server_turn(t, &(struct task_turn_request){.sweep = true, .coordinator = coordinator}))
        fail_msg("sweep: %s", task_turn_why(t));
    int swept = task_turn_result(t)->swept;
    task_turn_finish(t);
    return swept;
}

static void claims_follow_the_order_of_the_file(void **state)
{
    (void)state;
    test_server_submit(&server, "order", 100, NULL);
    struct task_turn *t = test_server_turn_open(&server);
    struct task_want wants[] = {{group_id(), "a", 3, 60000}, {group_id(), "b", 2, 30000}, {group_id(), "c", 4, 60000}};
    assert_true(test_server_turn(t, &(struct task_turn_request){.wants = wants, .want_count = 3}));
    const struct task_turn_result *r = task_turn_result(t);
    assert_int_equal(r->claimed_count, 9);
    assert_int_equal(r->claimed_of_want[0], 3);
    assert_int_equal(r->claimed_of_want[1], 2);
    assert_int_equal(r->claimed_of_want[2], 4);
    /* a and c have one lease, so one statement serves them: rows 0-2 and 3-6; then b: 7-8. */
    static const int rows[] = {0, 1, 2, 7, 8, 3, 4, 5, 6};
    for (int i = 0; i < 9; i++) {
        char prompt[32];
        snprintf(prompt, sizeof prompt, "prompt %d", rows[i]);
        assert_string_equal(r->claimed[i].prompt, prompt);
        assert_int_equal(r->claimed[i].seed, rows[i]);
        assert_int_equal(r->claimed[i].token, 1);
        assert_int_equal(r->claimed[i].attempt, 1);
    }
    task_turn_finish(t);
    assert_int_equal(test_server_number(&server, "select count(*) from task where worker = 'c' and state = 1"), 4);
    task_turn_close(t);
    test_server_audit(&server);
}

static void finish_commits_once_and_says_so_twice(void **state)
{
    (void)state;
    test_server_submit(&server, "twice", 10, NULL);
    struct task_turn *t = test_server_turn_open(&server);
    struct task_claimed c = claim_one(t, "w", 60000);
    assert_true(finish_one(t, &c, "w"));
    assert_true(finish_one(t, &c, "w"));
    struct task_finish both[2] = {test_server_finish(&c, "w"), test_server_finish(&c, "w")};
    assert_true(test_server_turn(t, &(struct task_turn_request){.finishes = both, .finish_count = 2}));
    assert_int_equal(task_turn_result(t)->finish_committed[0] + task_turn_result(t)->finish_committed[1], 2);
    task_turn_finish(t);
    c.token++;
    assert_false(finish_one(t, &c, "w"));
    assert_int_equal(test_server_number(&server, "select count(*) from image"), 1);
    assert_int_equal(test_server_number(&server, "select sum(done) from campaign_count"), 1);
    task_turn_close(t);
    test_server_audit(&server);
}

static void stale_worker_cannot_finish(void **state)
{
    (void)state;
    test_server_submit(&server, "stale", 1, NULL);
    struct task_turn *t = test_server_turn_open(&server);
    struct task_claimed first = claim_one(t, "first", 1);
    usleep(20000);
    assert_int_equal(sweep(t, "c"), 1);
    struct task_claimed second = claim_one(t, "second", 60000);
    assert_int_equal(second.task, first.task);
    assert_int_equal(second.token, first.token + 1);
    assert_false(finish_one(t, &first, "first"));
    assert_false(fail_one(t, &first, TASK_REFUSE));
    assert_true(finish_one(t, &second, "second"));
    assert_false(finish_one(t, &first, "first"));
    assert_int_equal(test_server_number(&server, "select lost from outcome"), 1);
    task_turn_close(t);
    test_server_audit(&server);
}

static void image_of_an_ended_lease_is_welcome_while_nobody_claimed(void **state)
{
    (void)state;
    test_server_submit(&server, "adopt", 1, NULL);
    struct task_turn *t = test_server_turn_open(&server);
    struct task_claimed c = claim_one(t, "w", 1);
    usleep(20000);
    assert_int_equal(sweep(t, "c"), 1);
    assert_true(finish_one(t, &c, "w"));
    assert_int_equal(test_server_number(&server, "select count(*) from task"), 0);
    task_turn_close(t);
    test_server_audit(&server);
}

static void impossible_images_harm_nobody_else(void **state)
{
    (void)state;
    test_server_submit(&server, "harm", 8, NULL);
    struct task_turn *t = test_server_turn_open(&server);
    const struct task_turn_result *r = claim(t, "w", 8, 60000);
    struct task_finish f[8];
    for (int i = 0; i < 8; i++)
        f[i] = test_server_finish(&r->claimed[i], "w");
    task_turn_finish(t);
    f[1].sha256 = "0123";
    f[2].bytes = 0;
    f[3].width = 65;
    f[4].token = UINT64_MAX;
    f[5].worker = "\xff\xfe bad \xc3(";
    f[6].digest = "quote ' \" \\ {},NULL";
    assert_true(test_server_turn(t, &(struct task_turn_request){.finishes = f, .finish_count = 8}));
    static const int want[] = {1, 0, 0, 0, 0, 1, 1, 1};
    for (int i = 0; i < 8; i++)
        assert_int_equal(task_turn_result(t)->finish_committed[i], want[i]);
    task_turn_finish(t);
    assert_int_equal(test_server_number(&server, "select count(*) from image where digest = 'quote '' \" \\ {},NULL'"), 1);
    struct task_fail bad[2] = {{f[1].task, f[1].token, TASK_REFUSE, "\xed\xa0\x80 \xf5 'x'"}, {f[2].task, f[2].token, TASK_REFUSE, NULL}};
    char *huge = malloc(100001);
    memset(huge, 'y', 100000);
    huge[100000] = '\0';
    bad[1].reason = huge;
    assert_true(test_server_turn(t, &(struct task_turn_request){.fails = bad, .fail_count = 2}));
    assert_int_equal(task_turn_result(t)->fail_accepted[0] + task_turn_result(t)->fail_accepted[1], 2);
    task_turn_finish(t);
    assert_int_equal(test_server_number(&server, "select max(octet_length(reason)) from outcome"), 4000);
    free(huge);
    struct task_beat beats[2] = {{"same", 1, "idle", "cpu", "tiny", 0, "h"}, {"same", UINT64_MAX, "bu\xffsy", NULL, "", 2, NULL}};
    assert_true(test_server_turn(t, &(struct task_turn_request){.beats = beats, .beat_count = 2}));
    task_turn_finish(t);
    assert_int_equal(test_server_number(&server, "select count(*) from worker where name = 'same' and held = 2"
                                                 " and boot_epoch = 18446744073709551615"), 1);
    task_turn_close(t);
    test_server_audit(&server);
}

static void failures_go_where_their_kind_says(void **state)
{
    (void)state;
    test_server_submit(&server, "kinds", 4, NULL);
    struct task_turn *t = test_server_turn_open(&server);
    struct task_claimed refuse = claim_one(t, "w", 60000), retry = claim_one(t, "w", 60000), lost = claim_one(t, "w", 60000),
                        released = claim_one(t, "w", 60000);
    for (int again = 0; again < 2; again++) { /* the answer is the same the second time */
        assert_true(fail_one(t, &refuse, TASK_REFUSE));
        assert_true(fail_one(t, &retry, TASK_RETRY));
        assert_true(fail_one(t, &lost, TASK_LOST));
        assert_true(fail_one(t, &released, TASK_RELEASED));
    }
    assert_int_equal(test_server_number(&server, "select count(*) from outcome where kind = 'refuse' and reason = 'because'"), 1);
    assert_int_equal(test_server_number(&server, "select count(*) from task where attempt = 1 and lost = 0 and not_before > now()"
                                                 " and not_before < now() + interval '4 s' and id = %llu",
                                        (unsigned long long)retry.task), 1);
    assert_int_equal(test_server_number(&server, "select count(*) from task where attempt = 0 and lost = 1 and id = %llu",
                                        (unsigned long long)lost.task), 1);
    assert_int_equal(test_server_number(&server, "select count(*) from task where attempt = 0 and lost = 0 and id = %llu",
                                        (unsigned long long)released.task), 1);
    /* Backoff: the one to retry is not claimed yet. The two others come back at once. */
    assert_int_equal(claim(t, "w", 4, 60000)->claimed_count, 2);
    task_turn_finish(t);
    assert_false(fail_one(t, &lost, TASK_RETRY)); /* claimed by another meanwhile */
    task_turn_close(t);
    test_server_audit(&server);
}

static void attempts_and_losses_have_their_own_limits(void **state)
{
    (void)state;
    test_server_submit(&server, "limits", 1, NULL);
    struct task_turn *t = test_server_turn_open(&server);
    for (int i = 0; i < 5; i++) {
        test_server_sql(&server, "update task set not_before = '-infinity'");
        struct task_claimed c = claim_one(t, "w", 60000);
        assert_int_equal(c.attempt, i + 1);
        assert_true(fail_one(t, &c, TASK_RETRY));
        assert_int_equal(test_server_number(&server, "select count(*) from outcome"), i == 4);
    }
    assert_int_equal(test_server_number(&server, "select count(*) from outcome where kind = 'retry' and attempt = 5"), 1);
    test_server_empty(&server);
    test_server_submit(&server, "losses", 1, NULL);
    for (int i = 0; i < 20; i++) {
        assert_int_equal(test_server_number(&server, "select count(*) from task"), 1);
        struct task_claimed c = claim_one(t, "w", 60000);
        assert_true(fail_one(t, &c, TASK_LOST));
    }
    assert_int_equal(test_server_number(&server, "select count(*) from outcome where kind = 'lost' and lost = 20"), 1);
    task_turn_close(t);
    test_server_audit(&server);
}

static void expired_leases_are_swept_by_one_holder(void **state)
{
    (void)state;
    test_server_submit(&server, "sweep", 10, NULL);
    struct task_turn *a = test_server_turn_open(&server), *b = test_server_turn_open(&server);
    assert_int_equal(sweep(a, "a"), 0);
    claim(a, "w", 5, 1);
    task_turn_finish(a);
    claim(a, "w", 5, 60000);
    task_turn_finish(a);
    usleep(20000);
    assert_int_equal(sweep(b, "b"), 0); /* a has the duty */
    assert_int_equal(sweep(a, "a"), 5);
    assert_int_equal(sweep(a, "a"), 0);
    test_server_sql(&server, "update duty set until = now() - interval '1 s'");
    claim(b, "w", 1, 1);
    task_turn_finish(b);
    usleep(20000);
    assert_int_equal(sweep(b, "b"), 1); /* a was silent for too long */
    assert_int_equal(test_server_number(&server, "select term from duty where holder = 'b'"), 2);
    task_turn_close(a);
    task_turn_close(b);
    test_server_audit(&server);
}

static void extend_keeps_a_lease_and_tells_of_a_cancel(void **state)
{
    (void)state;
    test_server_submit(&server, "extend", 3, NULL);
    struct task_turn *t = test_server_turn_open(&server);
    struct task_claimed c = claim_one(t, "w", 50), d = claim_one(t, "w", 60000);
    struct task_extend e[3] = {{c.task, c.token}, {d.task, d.token + 1}, {UINT64_MAX, 1}};
    struct task_turn_request q = {.extends = e, .extend_count = 3, .lease_ms = 60000};
    assert_true(test_server_turn(t, &q));
    assert_int_equal(task_turn_result(t)->extend_alive[0], 1);
    assert_int_equal(task_turn_result(t)->extend_alive[1], 0);
    assert_int_equal(task_turn_result(t)->extend_alive[2], 0);
    task_turn_finish(t);
    usleep(80000);
    assert_int_equal(sweep(t, "c"), 0);

    struct task_store *store = NULL;
    struct pg_error why;
    int64_t count = 0;
    assert_true(task_store_open(&store, server.uri, &why));
    assert_true(task_store_cancel(store, "extend", &count, &why));
    assert_int_equal(count, 1);
    assert_true(test_server_turn(t, &q));
    assert_int_equal(task_turn_result(t)->extend_alive[0], 0);
    task_turn_finish(t);
    assert_true(fail_one(t, &c, TASK_RELEASED)); /* the worker stopped: buried */
    assert_true(finish_one(t, &d, "w"));         /* was faster than the cancel: an image like any other */
    assert_int_equal(test_server_number(&server, "select count(*) from outcome where kind = 'cancelled'"), 2);
    assert_int_equal(test_server_number(&server, "select count(*) from task"), 0);
    task_store_close(store);
    task_turn_close(t);
    test_server_audit(&server);
}

static void offer_lists_groups_that_may_be_claimed(void **state)
{
    (void)state;
    test_server_submit(&server, "first", 3, NULL);
    test_server_submit(&server, "urgent", 3, NULL);
    test_server_submit(&server, "paused", 3, NULL);
    test_server_sql(&server, "update campaign set priority = 9 where name = 'urgent'; "
                             "update campaign set state = 'paused' where name = 'paused'");
    struct task_turn *t = test_server_turn_open(&server);
    assert_true(test_server_turn(t, &(struct task_turn_request){.offer = true}));
    const struct task_turn_result *r = task_turn_result(t);
    assert_true(r->offer_fresh);
    assert_int_equal(r->offer_count, 2);
    assert_string_equal(r->offer[0].campaign, "urgent");
    assert_string_equal(r->offer[1].campaign, "first");
    assert_string_equal(r->offer[1].model, "tiny");
    assert_string_equal(r->offer[1].out_dir, "/out/first");
    assert_int_equal(r->offer[1].width, 512);
    assert_int_equal(r->offer[0].ready, 3);
    assert_int_equal(r->offer[1].ready, 3);
    int64_t first = r->offer[1].id;
    task_turn_finish(t);
    /* all of `first` wait out a backoff: nothing to claim there */
    test_server_sql(&server, "update task set not_before = now() + interval '1 h' where group_id = %lld", (long long)first);
    assert_true(test_server_turn(t, &(struct task_turn_request){.offer = true}));
    assert_int_equal(task_turn_result(t)->offer_count, 1);
    task_turn_finish(t);
    /* a paused campaign gives nothing even to who asks */
    struct task_want want = {test_server_number(&server, "select g.id from task_group g join campaign c on c.id = campaign_id"
                                                         " where c.name = 'paused'"), "w", 3, 60000};
    assert_true(test_server_turn(t, &(struct task_turn_request){.wants = &want, .want_count = 1}));
    assert_int_equal(task_turn_result(t)->claimed_count, 0);
    assert_false(task_turn_result(t)->offer_fresh);
    task_turn_finish(t);
    task_turn_close(t);
}

static void staged_files_have_an_owner(void **state)
{
    (void)state;
    test_server_submit(&server, "staged", 3, NULL);
    struct task_turn *t = test_server_turn_open(&server);
    struct task_claimed done = claim_one(t, "w", 60000), running = claim_one(t, "w", 60000);
    assert_true(finish_one(t, &done, "w"));
    struct task_extend e[4] = {{done.task, done.token}, {running.task, running.token}, {done.task, done.token + 1}, {99999, 1}};
    assert_true(test_server_turn(t, &(struct task_turn_request){.staged = e, .staged_count = 4, .folders = true}));
    const struct task_turn_result *r = task_turn_result(t);
    assert_memory_equal(r->staged_state, "crsr", 4); /* the last one is another farm's */
    assert_string_equal(r->staged_file[0], "000000.png");
    assert_null(r->staged_file[1]);
    assert_int_equal(r->folder_count, 1);
    assert_string_equal(r->folders[0], "/out/staged");
    task_turn_finish(t);
    task_turn_close(t);
}

static void submit_is_announced(void **state)
{
    (void)state;
    struct task_turn *t = test_server_turn_open(&server);
    assert_true(task_turn_notified(t)); /* after connecting: look, whoever was announced while we were away */
    assert_false(task_turn_notified(t));
    test_server_submit(&server, "news", 1, NULL);
    bool notified = false;
    for (int i = 0; i < 200 && !notified; i++) {
        usleep(5000);
        assert_int_equal(task_turn_poll(t), TASK_TURN_IDLE);
        notified = task_turn_notified(t);
    }
    assert_true(notified);
    task_turn_close(t);
}

/* A child of the race: claims and finishes until nothing is left. Two of them must never get one task. */
static void race(const char *name)
{
    struct task_turn *t = test_server_turn_open(&server);
    struct task_finish finishes[64];
    struct task_want want = {group_id(), name, 0, 60000};
    int finish_count = 0, empty = 0;
    while (empty < 20) {
        want.count = 1 + (int)((unsigned)pg_now_ms() % 64);
        struct task_turn_request q = {.finishes = finishes, .finish_count = finish_count, .wants = &want, .want_count = 1};
        if (!test_server_turn(t, &q))
            fail_msg("%s: %s", name, task_turn_why(t));
        const struct task_turn_result *r = task_turn_result(t);
        for (int i = 0; i < finish_count; i++)
            assert_int_equal(r->finish_committed[i], 1);
        finish_count = r->claimed_count;
        for (int i = 0; i < finish_count; i++)
            finishes[i] = test_server_finish(&r->claimed[i], name);
        empty = finish_count ? 0 : empty + 1;
        task_turn_finish(t);
    }
    task_turn_close(t);
}

static void two_coordinators_never_claim_one_task(void **state)
{
    (void)state;
    enum { TASKS = 6000 };
    test_server_submit(&server, "race", TASKS, NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        race("child");
        _exit(0);
    }
    race("parent");
    int status = 1;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    assert_int_equal(test_server_number(&server, "select count(*) from image"), TASKS);
    assert_int_equal(test_server_number(&server, "select count(*) from image where lease_token <> 1"), 0);
    assert_int_equal(test_server_number(&server, "select sum(done) from campaign_count"), TASKS);
    assert_true(test_server_number(&server, "select count(distinct worker) from image") == 2);
    test_server_audit(&server);
}

static void server_killed_in_mid_turn_loses_and_doubles_nothing(void **state)
{
    (void)state;
    enum { TASKS = 900 };
    test_server_submit(&server, "killed", TASKS, NULL);
    struct task_turn *t = test_server_turn_open(&server);
    struct task_finish finishes[32];
    struct task_want want = {group_id(), "w", 32, 60000};
    int finish_count = 0, done = 0, kills = 0;
    for (int turn = 0; done < TASKS; turn++) {
        assert_true(turn < 200);
        struct task_turn_request q = {.finishes = finishes, .finish_count = finish_count, .wants = &want, .want_count = 1,
                                      .sweep = true, .coordinator = "c"};
        assert_true(test_server_wait(t, TASK_TURN_IDLE, 20000));
        bool ok;
        if (turn % 4 == 2 && kills < 5) { /* queued and half on its way when the server dies */
            kills++;
            task_turn_start(t, &q);
            task_turn_poll(t);
            test_server_control(&server, "restart -m immediate");
            ok = test_server_wait(t, TASK_TURN_READY, 50); /* the answer may have been faster than the crash */
            if (!ok)
                assert_true(strstr(task_turn_why(t), "PostgreSQL") != NULL);
        } else {
            ok = test_server_turn(t, &q);
        }
        if (!ok) { /* nothing is known: ask the same finishes again; tasks claimed for nobody come back by the sweep */
            test_server_sql(&server, "update task set lease_until = now() - interval '1 s' where state = 1 and"
                                     " not id = any('{%llu}')", finish_count ? (unsigned long long)finishes[0].task : 0ull);
            continue;
        }
        const struct task_turn_result *r = task_turn_result(t);
        for (int i = 0; i < finish_count; i++)
            done += r->finish_committed[i];
        finish_count = r->claimed_count;
        for (int i = 0; i < finish_count; i++)
            finishes[i] = test_server_finish(&r->claimed[i], "w");
        task_turn_finish(t);
        done = (int)test_server_number(&server, "select count(*) from image");
    }
    assert_int_equal(kills, 5);
    assert_int_equal(test_server_number(&server, "select count(*) from image"), TASKS);
    assert_int_equal(test_server_number(&server, "select coalesce(sum(done), 0) from campaign_count"), TASKS);
    task_turn_close(t);
    test_server_audit(&server);
}

static void stopped_server_is_away_and_comes_back_by_itself(void **state)
{
    (void)state;
    struct task_turn *t = test_server_turn_open(&server);
    test_server_control(&server, "stop -m fast");
    assert_true(test_server_wait(t, TASK_TURN_AWAY, 2000));
    assert_int_equal(task_turn_fd(t), -1);
    assert_true(task_turn_retry_ms(t) <= 6250);
    assert_true(strstr(task_turn_why(t), "away") != NULL);
    struct task_store *store = NULL;
    struct pg_error why;
    assert_false(task_store_open(&store, server.uri, &why));
    assert_int_equal(why.fault, PG_AWAY);
    test_server_control(&server, "start");
    assert_true(test_server_wait(t, TASK_TURN_IDLE, 10000));
    assert_true(task_turn_notified(t));
    task_turn_close(t);
}

/* A server that is there but frozen (a disk that hangs, a paused machine) must not freeze the coordinator with it. */
static void frozen_server_counts_as_away(void **state)
{
    (void)state;
    struct task_turn *t = test_server_turn_open(&server);
    pid_t backend = (pid_t)test_server_number(&server, "select pid from pg_stat_activity where query like '%%kiln_tasks%%'"
                                                       " and pid <> pg_backend_pid() order by backend_start desc limit 1");
    assert_true(backend > 1);
    assert_int_equal(kill(backend, SIGSTOP), 0);
    int64_t start_ms = pg_now_ms();
    task_turn_start(t, &(struct task_turn_request){.offer = true});
    bool is_away = test_server_wait(t, TASK_TURN_AWAY, 40000);
    int64_t took_ms = pg_now_ms() - start_ms;
    kill(backend, SIGCONT);
    assert_true(is_away);
    assert_in_range(took_ms, 25000, 35000);
    assert_non_null(strstr(task_turn_why(t), "does not answer"));
    assert_true(test_server_wait(t, TASK_TURN_IDLE, 10000));
    task_turn_close(t);
}

static void newer_schema_is_refused_with_both_versions(void **state)
{
    (void)state;
    struct task_turn *t = NULL;
    struct pg_error why;
    int from, to;
    test_server_sql(&server, "insert into schema_version (version, name) values (99, 'future')");
    assert_true(task_turn_open(&t, server.uri, &why));
    assert_true(test_server_wait(t, TASK_TURN_REFUSED, 5000));
    assert_true(strstr(task_turn_why(t), "99") != NULL);
    assert_true(strstr(task_turn_why(t), "newer") != NULL);
    struct task_store *store = NULL;
    assert_false(task_store_open(&store, server.uri, &why));
    assert_int_equal(why.fault, PG_REFUSED);
    assert_false(migrate_run(server.uri, &from, &to, &why));
    assert_int_equal(why.fault, PG_REFUSED);
    assert_true(strstr(why.text, "99") != NULL);
    test_server_sql(&server, "delete from schema_version where version = 99");
    assert_true(test_server_wait(t, TASK_TURN_IDLE, 10000)); /* once a person has acted */
    assert_true(migrate_run(server.uri, &from, &to, &why));
    assert_int_equal(from, migrate_version());
    task_turn_close(t);
}

static int start_server(void **state)
{
    (void)state;
    test_server_start(&server);
    return 0;
}

static int drop_server(void **state)
{
    (void)state;
    test_server_drop(&server);
    return 0;
}

static int empty(void **state)
{
    (void)state;
    test_server_empty(&server);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(claims_follow_the_order_of_the_file, empty),
        cmocka_unit_test_setup(finish_commits_once_and_says_so_twice, empty),
        cmocka_unit_test_setup(stale_worker_cannot_finish, empty),
        cmocka_unit_test_setup(image_of_an_ended_lease_is_welcome_while_nobody_claimed, empty),
        cmocka_unit_test_setup(impossible_images_harm_nobody_else, empty),
        cmocka_unit_test_setup(failures_go_where_their_kind_says, empty),
        cmocka_unit_test_setup(attempts_and_losses_have_their_own_limits, empty),
        cmocka_unit_test_setup(expired_leases_are_swept_by_one_holder, empty),
        cmocka_unit_test_setup(extend_keeps_a_lease_and_tells_of_a_cancel, empty),
        cmocka_unit_test_setup(offer_lists_groups_that_may_be_claimed, empty),
        cmocka_unit_test_setup(staged_files_have_an_owner, empty),
        cmocka_unit_test_setup(submit_is_announced, empty),
        cmocka_unit_test_setup(two_coordinators_never_claim_one_task, empty),
        cmocka_unit_test_setup(server_killed_in_mid_turn_loses_and_doubles_nothing, empty),
        cmocka_unit_test_setup(stopped_server_is_away_and_comes_back_by_itself, empty),
        cmocka_unit_test_setup(frozen_server_counts_as_away, empty),
        cmocka_unit_test_setup(newer_schema_is_refused_with_both_versions, empty),
    };
    return cmocka_run_group_tests(tests, start_server, drop_server);
}
