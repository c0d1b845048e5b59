/* test_task_store.c - the command line's side of the task store on a real server. If these break, a submit adds rows
 * twice or loses some, a seed comes back as another, or a cancelled campaign goes on burning GPU hours. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "test_server.h"

static struct test_server server;

static struct task_store *open_store(void)
{
    struct task_store *s = NULL;
    struct pg_error why;
    if (!task_store_open(&s, server.uri, &why))
        fail_msg("open: %s", why.text);
    return s;
}

static struct campaign find(struct task_store *s, const char *name)
{
    struct campaign c = {0};
    struct pg_error why;
    bool found = false;
    if (!task_store_campaign_find(s, name, &c, &found, &why) || !found)
        fail_msg("campaign %s is not there", name);
    free(c.out_dir);
    c.out_dir = NULL;
    return c;
}

static int64_t make(struct task_store *s, const char *name)
{
    struct campaign c = {0};
    struct pg_error why;
    char out_dir[300];
    snprintf(out_dir, sizeof out_dir, "/out/%s", name);
    struct campaign_spec spec = {.name = name, .out_dir = out_dir, .format = "png", .use = "", .base_seed = 7};
    if (!task_store_campaign(s, &spec, &c, &why))
        fail_msg("campaign: %s", why.text);
    int64_t id = c.id;
    task_store_campaign_done(&c);
    return id;
}

/* claim and end some tasks of the only group: `done` of them finish, `refused` fail, the rest stays running. */
static void work(int count, int done, int refused)
{
    struct task_turn *t = test_server_turn_open(&server);
    struct task_want want = {test_server_number(&server, "select min(id) from task_group"), "w", count, 60000};
    assert_true(test_server_turn(t, &(struct task_turn_request){.wants = &want, .want_count = 1}));
    const struct task_turn_result *r = task_turn_result(t);
    assert_int_equal(r->claimed_count, count);
    struct task_finish finishes[64];
    struct task_fail fails[64];
    for (int i = 0; i < done; i++)
        finishes[i] = test_server_finish(&r->claimed[i], "w");
    for (int i = 0; i < refused; i++)
        fails[i] = (struct task_fail){r->claimed[done + i].task, r->claimed[done + i].token, TASK_REFUSE, "prompt too long"};
    task_turn_finish(t);
    assert_true(test_server_turn(t, &(struct task_turn_request){.finishes = finishes, .finish_count = done, .fails = fails,
                                                                .fail_count = refused}));
    task_turn_finish(t);
    task_turn_close(t);
}

static void submitting_again_adds_nothing(void **state)
{
    (void)state;
    struct task_submitted first, second;
    test_server_submit(&server, "again", 45000, &first); /* more than two chunks */
    test_server_submit(&server, "again", 45000, &second);
    assert_int_equal(first.added, 45000);
    assert_int_equal(first.present, 0);
    assert_int_equal(second.added, 0);
    assert_int_equal(second.present, 45000);
    struct task_store *s = open_store();
    struct campaign c = find(s, "again");
    assert_int_equal(c.total, 45000);
    assert_int_equal(c.ready, 45000);
    assert_string_equal(c.state, "active");
    assert_true(isnan(c.images_per_second));
    assert_true(isnan(c.eta_s));
    task_store_close(s);
    /* ids follow the rows of the file, so claims do */
    assert_int_equal(test_server_number(&server, "select count(*) from task a join task b on b.row = a.row + 1 where b.id <= a.id"), 0);
    test_server_audit(&server);
}

static void lines_put_in_the_middle_are_all_that_is_added(void **state)
{
    (void)state;
    struct task_submitted ret;
    struct pg_error why;
    test_server_submit(&server, "middle", 100, NULL);
    work(10, 10, 0); /* ended ones are known as well */
    struct task_store *s = open_store();
    assert_true(task_store_submit_begin(s, make(s, "middle"), &why));
    for (int i = 0; i < 110; i++) { /* 10 new ones before row 50; the rows behind them have moved */
        char prompt[64], file[64];
        struct task_row row = test_server_row(i < 50 ? i : i < 60 ? 1000 + i : i - 10, prompt, file);
        row.row = i;
        assert_true(task_store_submit_row(s, &row, &why));
    }
    assert_true(task_store_submit_end(s, &ret, &why));
    assert_int_equal(ret.added, 10);
    assert_int_equal(ret.present, 100);
    assert_int_equal(find(s, "middle").total, 110);
    task_store_close(s);
    test_server_audit(&server);
}

static void one_key_twice_in_a_file_is_one_task(void **state)
{
    (void)state;
    struct task_submitted ret;
    struct pg_error why;
    struct task_store *s = open_store();
    assert_true(task_store_submit_begin(s, make(s, "double"), &why));
    for (int i = 0; i < 30; i++) {
        char prompt[64], file[64];
        struct task_row row = test_server_row(i % 10, prompt, file);
        assert_true(task_store_submit_row(s, &row, &why));
    }
    assert_true(task_store_submit_end(s, &ret, &why));
    assert_int_equal(ret.added, 10);
    assert_int_equal(ret.present, 20);
    task_store_close(s);
    test_server_audit(&server);
}

static void two_images_never_share_a_file(void **state)
{
    (void)state;
    struct task_submitted ret;
    struct pg_error why = {0};
    struct task_store *s = open_store();
    assert_true(task_store_submit_begin(s, make(s, "share"), &why));
    for (int i = 0; i < 2; i++) {
        char prompt[64], file[64];
        struct task_row row = test_server_row(i, prompt, file);
        row.file = "same.png";
        assert_true(task_store_submit_row(s, &row, &why));
    }
    assert_false(task_store_submit_end(s, &ret, &why));
    assert_int_equal(why.fault, PG_REFUSED);
    assert_true(strstr(why.text, "two images want one file name") != NULL);
    assert_non_null(strstr(why.text, "file name 'same.png', of this campaign"));
    assert_null(strstr(why.text, "unique"));
    assert_int_equal(find(s, "share").total, 0);
    task_store_close(s);
    test_server_audit(&server);
}

static void two_submits_at_once_share_the_work(void **state)
{
    (void)state;
    struct task_submitted ret;
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        test_server_submit(&server, "both", 30000, NULL);
        _exit(0);
    }
    test_server_submit(&server, "both", 30000, &ret);
    int status = 1;
    waitpid(child, &status, 0);
    assert_int_equal(status, 0);
    assert_int_equal(ret.added + ret.present, 30000);
    assert_int_equal(test_server_number(&server, "select count(*) from task"), 30000);
    test_server_audit(&server);
}

struct seen { int count; struct task_row rows[8]; uint64_t seeds[8]; };

static bool see_image(void *context, const struct image_row *row)
{
    struct seen *seen = context;
    const struct task_row *want = &seen->rows[seen->count];
    assert_int_equal(row->row, want->row);
    assert_string_equal(row->prompt, want->prompt);
    assert_string_equal(row->negative, want->negative);
    assert_true(row->seed == want->seed);
    assert_string_equal(row->model, want->model);
    assert_int_equal(row->truncated, false);
    char path[300];
    snprintf(path, sizeof path, "/out/hostile/%s", want->file);
    assert_string_equal(row->path, path);
    assert_int_equal(strlen(row->sha256), 64);
    if (want->labels_json) {
        assert_non_null(row->labels_json);
        assert_non_null(strstr(row->labels_json, "\xf0\x9f\x98\x80"));
    } else {
        assert_null(row->labels_json);
    }
    assert_null(row->inputs);
    seen->count++;
    return true;
}

/* Seeds at the ends of 64 bits, the longest prompt, quotes, backslashes, SQL, every kind of Unicode: all come back. */
static void hostile_values_come_back_as_they_were(void **state)
{
    (void)state;
    static const uint64_t seeds[] = {0, 1, INT64_MAX, (uint64_t)INT64_MAX + 1, UINT64_MAX, 9999, 10000, 100000000};
    struct seen seen = {0};
    struct pg_error why;
    struct task_submitted ret;
    char *huge = malloc(65537), prompt[64], file[8][64];
    for (int i = 0; i < 65536; i++)
        huge[i] = (char)('a' + (i * 7919 >> 3) % 26);
    huge[65536] = '\0';
    const char *prompts[8] = {"'; drop table kiln.task; --", "\\N \\. \\x00 \t\n\r", "{a,\"b\",NULL}", huge,
                              "\xf0\x9f\x90\xb1 \xe6\x97\xa5\xe6\x9c\xac \xd7\xa9\xd7\x9c", "", "%s%n $1 :x ?", "\xef\xbb\xbf\x7f\x01"};
    struct task_store *s = open_store();
    assert_true(task_store_submit_begin(s, make(s, "hostile"), &why));
    for (int i = 0; i < 8; i++) {
        seen.rows[i] = test_server_row(i, prompt, file[i]);
        seen.rows[i].prompt = prompts[i];
        seen.rows[i].negative = prompts[7 - i];
        seen.rows[i].seed = seeds[i];
        if (i % 2)
            seen.rows[i].labels_json = "{\"a'\\\"\\\\\": \"\xf0\x9f\x98\x80\"}";
        if (!task_store_submit_row(s, &seen.rows[i], &why))
            fail_msg("row %d: %s", i, why.text);
    }
    if (!task_store_submit_end(s, &ret, &why))
        fail_msg("%s", why.text);
    assert_int_equal(ret.added, 8);
    struct task_turn *t = test_server_turn_open(&server);
    struct task_want want = {test_server_number(&server, "select min(id) from task_group"), "w", 8, 60000};
    assert_true(test_server_turn(t, &(struct task_turn_request){.wants = &want, .want_count = 1}));
    struct task_finish finishes[8];
    for (int i = 0; i < 8; i++) {
        const struct task_claimed *c = &task_turn_result(t)->claimed[i];
        assert_true(c->seed == seeds[i]);
        assert_string_equal(c->prompt, prompts[i]);
        assert_string_equal(c->negative, prompts[7 - i]);
        finishes[i] = test_server_finish(c, "w");
    }
    task_turn_finish(t);
    assert_true(test_server_turn(t, &(struct task_turn_request){.finishes = finishes, .finish_count = 8}));
    task_turn_finish(t);
    task_turn_close(t);
    if (!task_store_images(s, "hostile", see_image, &seen, &why))
        fail_msg("%s", why.text);
    assert_int_equal(seen.count, 8);
    assert_int_equal(test_server_number(&server, "select count(*) from image where seed::text = '18446744073709551615'"), 1);
    task_store_close(s);
    free(huge);
    test_server_audit(&server);
}

static bool see_inputs(void *context, const struct image_row *row)
{
    struct seen *seen = context;
    assert_string_equal(row->inputs, seen->rows[row->row].inputs);
    seen->count++;
    return true;
}

/* Inputs come back byte by byte, through claim, failure, retry and finish; rows whose layout or adapters differ are of different
 * groups, and so never of one batch. */
static void inputs_stay_with_their_task(void **state)
{
    (void)state;
    static const char *const inputs[3] = {"{\"images\":[{\"path\":\"/a  b.png\"}]}", "{\"images\" : [1]}", "{\"loras\":[\"\xc3\xa9\"]}"};
    static const char *const layouts[3] = {"640x480", "512x512", ""}, *const loras[3] = {"", "", "00ff:0.5"};
    struct seen seen = {0};
    struct pg_error why;
    struct task_submitted ret;
    char prompt[64], file[3][64];
    struct task_store *s = open_store();
    assert_true(task_store_submit_begin(s, make(s, "inputs"), &why));
    for (int i = 0; i < 3; i++) {
        seen.rows[i] = test_server_row(i, prompt, file[i]);
        seen.rows[i].inputs = inputs[i];
        seen.rows[i].layout = layouts[i];
        seen.rows[i].loras = loras[i];
        if (!task_store_submit_row(s, &seen.rows[i], &why))
            fail_msg("row %d: %s", i, why.text);
    }
    if (!task_store_submit_end(s, &ret, &why))
        fail_msg("%s", why.text);
    assert_int_equal(test_server_number(&server, "select count(*) from task_group"), 3);
    struct task_turn *t = test_server_turn_open(&server);
    for (int round = 0; round < 2; round++) { /* failed and taken up again; then finished */
        int64_t first = test_server_number(&server, "select min(id) from task_group"), again = 0;
        struct task_want wants[3] = {{first, "w", 8, 60000}, {first + 1, "w", 8, 60000}, {first + 2, "w", 8, 60000}};
        struct task_finish finishes[3];
        struct task_fail fails[3];
        assert_true(test_server_turn(t, &(struct task_turn_request){.wants = wants, .want_count = 3}));
        assert_int_equal(task_turn_result(t)->claimed_count, 3);
        for (int i = 0; i < 3; i++) {
            const struct task_claimed *c = &task_turn_result(t)->claimed[i];
            assert_string_equal(c->inputs, inputs[c->seed]);
            finishes[i] = test_server_finish(c, "w");
            fails[i] = (struct task_fail){c->task, c->token, TASK_REFUSE, "no"};
        }
        task_turn_finish(t);
        struct task_turn_request failed = {.fails = fails, .fail_count = 3}, finished = {.finishes = finishes, .finish_count = 3};
        assert_true(test_server_turn(t, round ? &finished : &failed));
        task_turn_finish(t);
        if (!round)
            assert_true(task_store_retry(s, "inputs", &again, &why));
        assert_int_equal(again, round ? 0 : 3);
    }
    task_turn_close(t);
    if (!task_store_images(s, "inputs", see_inputs, &seen, &why))
        fail_msg("%s", why.text);
    assert_int_equal(seen.count, 3);
    task_store_close(s);
    test_server_audit(&server);
}

/* What the tables refuse, whoever asks. Each row of this list breaks one rule. */
static void impossible_rows_are_refused_whole(void **state)
{
    (void)state;
    char too_long[65540];
    memset(too_long, 'x', 65537);
    too_long[65537] = '\0';
    struct task_store *s = open_store();
    int64_t id = make(s, "bad");
    for (int rule = 0; rule < 10; rule++) {
        char prompt[64], file[64];
        struct pg_error why = {0};
        struct task_submitted ret;
        struct task_row good = test_server_row(1, prompt, file), bad = test_server_row(2, (char[64]){0}, (char[64]){0});
        bad.prompt = "p";
        bad.file = "f.png";
        switch (rule) {
        case 0: bad.width = 500; break;                        /* not a multiple of 16 */
        case 1: bad.height = 48; break;                        /* below 64 */
        case 2: bad.width = 4096, bad.height = 1040; break;    /* over 4 MP */
        case 3: bad.steps = -1; break;
        case 4: bad.model = ""; break;
        case 5: bad.file = "../../etc/passwd"; break;
        case 6: bad.file = ".hidden"; break;
        case 7: bad.prompt = too_long; break;
        case 8: bad.prompt = "not UTF-8 \xc3("; break;
        case 9: bad.labels_json = "{not json"; break;
        }
        assert_true(task_store_submit_begin(s, id, &why));
        assert_true(task_store_submit_row(s, &good, &why));
        assert_true(task_store_submit_row(s, &bad, &why));
        if (task_store_submit_end(s, &ret, &why))
            fail_msg("rule %d is not kept", rule);
        assert_int_equal(why.fault, PG_REFUSED);
        assert_int_equal(find(s, "bad").total, 0);
    }
    task_store_close(s);
    test_server_audit(&server);
}

/* The second would be done, and its files never there: a published file is not replaced. */
static void two_campaigns_in_one_folder_cannot_have_files_of_one_name(void **state)
{
    (void)state;
    struct task_store *s = open_store();
    struct campaign c = {0};
    struct pg_error why;
    struct task_submitted ret;
    char prompt[64], file[64];
    struct task_row row = test_server_row(1, prompt, file);
    for (int i = 0; i < 2; i++) {
        struct campaign_spec spec = {.name = i ? "shared-2" : "shared-1", .out_dir = "/shared", .format = "png", .base_seed = 7};
        assert_true(task_store_campaign(s, &spec, &c, &why));
        assert_true(task_store_submit_begin(s, c.id, &why));
        assert_true(task_store_submit_row(s, &row, &why));
        assert_true(task_store_submit_end(s, &ret, &why) == (i == 0));
        task_store_campaign_done(&c);
    }
    assert_int_equal(why.fault, PG_REFUSED);
    assert_non_null(strstr(why.text, "writes to the same folder"));
    assert_int_equal(find(s, "shared-2").total, 0);
    task_store_close(s);
    test_server_audit(&server);
}

static void campaign_is_one_folder_format_use_and_seed(void **state)
{
    (void)state;
    struct task_store *s = open_store();
    struct campaign c = {0};
    struct pg_error why;
    struct campaign_spec spec = {.name = "same \xf0\x9f\x90\xb1 'x'", .out_dir = "/out", .format = "png", .use = "commercial", .base_seed = UINT64_MAX};
    assert_true(task_store_campaign(s, &spec, &c, &why));
    task_store_campaign_done(&c);
    spec.priority = 5;
    assert_true(task_store_campaign(s, &spec, &c, &why));
    assert_int_equal(c.priority, 5);
    assert_true(c.base_seed == UINT64_MAX);
    assert_string_equal(c.use, "commercial");
    task_store_campaign_done(&c);
    struct campaign_spec other[4] = {spec, spec, spec, spec};
    other[0].out_dir = "/elsewhere";
    other[1].format = "jpg";
    other[2].use = "";
    other[3].base_seed = 1;
    static const char *const says[] = {"/elsewhere", "jpg", "'commercial'", "18446744073709551615"};
    for (int i = 0; i < 4; i++) {
        assert_false(task_store_campaign(s, &other[i], &c, &why));
        assert_int_equal(why.fault, PG_REFUSED);
        assert_non_null(strstr(why.text, says[i]));
    }
    static const char *const bad[] = {"", "a/b", "..", ".", "line\nend"};
    for (int i = 0; i < 5; i++) {
        spec.name = bad[i];
        assert_false(task_store_campaign(s, &spec, &c, &why));
        assert_int_equal(why.fault, PG_REFUSED);
    }
    struct campaign *list = NULL;
    int count = 0;
    assert_true(task_store_campaigns(s, &list, &count, &why));
    assert_int_equal(count, 1);
    assert_string_equal(list[0].name, "same \xf0\x9f\x90\xb1 'x'");
    task_store_campaigns_free(list, count);
    task_store_close(s);
}

static void pause_cancel_and_retry(void **state)
{
    (void)state;
    int64_t count = -1;
    struct pg_error why;
    test_server_submit(&server, "states", 20, NULL);
    struct task_store *s = open_store();
    assert_false(task_store_pause(s, "nobody", &why));
    assert_int_equal(why.fault, PG_REFUSED);
    assert_non_null(strstr(why.text, "nobody"));
    work(9, 4, 2);
    struct campaign c = find(s, "states");
    assert_int_equal(c.done, 4);
    assert_int_equal(c.failed, 2);
    assert_int_equal(c.running, 3);
    assert_int_equal(c.ready, 11);
    assert_true(task_store_pause(s, "states", &why));
    assert_true(task_store_pause(s, "states", &why));
    assert_string_equal(find(s, "states").state, "paused");
    assert_true(task_store_resume(s, "states", &why));
    assert_string_equal(find(s, "states").state, "active");

    assert_true(task_store_cancel(s, "states", &count, &why));
    assert_int_equal(count, 11);
    c = find(s, "states");
    assert_string_equal(c.state, "cancelled");
    assert_int_equal(c.failed, 13);
    assert_int_equal(c.cancelled, 11);
    assert_int_equal(c.ready, 0);
    assert_int_equal(c.running, 3);
    assert_false(task_store_resume(s, "states", &why));
    assert_int_equal(why.fault, PG_REFUSED);
    assert_non_null(strstr(why.text, "kiln retry states"));
    assert_false(task_store_submit_begin(s, c.id, &why));
    assert_int_equal(why.fault, PG_REFUSED);
    /* those that ran when it was cancelled end as cancelled when their lease does */
    test_server_sql(&server, "update task set lease_until = now() - interval '1 s'");
    struct task_turn *t = test_server_turn_open(&server);
    assert_true(test_server_turn(t, &(struct task_turn_request){.sweep = true, .coordinator = "c"}));
    assert_int_equal(task_turn_result(t)->swept, 3);
    task_turn_finish(t);
    task_turn_close(t);
    assert_int_equal(find(s, "states").failed, 16);
    assert_int_equal(find(s, "states").cancelled, 14);
    test_server_sql(&server, "update campaign_count set at = at - interval '10 min'");
    t = test_server_turn_open(&server);
    assert_true(test_server_turn(t, &(struct task_turn_request){.sweep = true, .coordinator = "c"})); /* it folds */
    task_turn_finish(t);
    task_turn_close(t);
    assert_int_equal(test_server_number(&server, "select cancelled from campaign"), 14);
    test_server_audit(&server);

    assert_true(task_store_retry(s, "states", &count, &why));
    assert_int_equal(count, 16);
    c = find(s, "states");
    assert_string_equal(c.state, "active");
    assert_int_equal(c.ready, 16);
    assert_int_equal(c.failed, 0);
    assert_int_equal(c.cancelled, 0);
    assert_int_equal(c.done, 4);
    test_server_audit(&server);
    /* the tokens went on growing: a result of before the cancel is stale once its task is claimed again */
    work(16, 16, 0);
    assert_int_equal(test_server_number(&server, "select count(*) from image where lease_token = 2"), 5);
    c = find(s, "states");
    assert_string_equal(c.state, "done");
    assert_int_equal(c.done, 20);
    assert_false(task_store_cancel(s, "states", &count, &why));
    assert_int_equal(why.fault, PG_REFUSED);
    assert_false(task_store_pause(s, "states", &why));
    assert_non_null(strstr(why.text, "is done: there is nothing to pause"));
    task_store_close(s);
    test_server_audit(&server);
}

static bool see_failure(void *context, const struct failure_row *row)
{
    int *count = context;
    assert_int_equal(row->row, 4 + *count);
    assert_string_equal(row->kind, "refuse");
    assert_string_equal(row->reason, "prompt too long");
    assert_string_equal(row->worker, "w");
    return ++*count < 3; /* stop early: the connection must survive it */
}

static bool count_image(void *context, const struct image_row *row)
{
    (void)row;
    ++*(int *)context;
    return true;
}

static void listings_are_in_order_and_may_stop_early(void **state)
{
    (void)state;
    struct pg_error why;
    int failures = 0, images = 0;
    test_server_submit(&server, "list", 30, NULL);
    work(14, 4, 8);
    struct task_store *s = open_store();
    assert_true(task_store_failures(s, "list", see_failure, &failures, &why));
    assert_int_equal(failures, 3);
    assert_true(task_store_images(s, "list", count_image, &images, &why));
    assert_int_equal(images, 4);
    assert_false(task_store_images(s, "nobody", count_image, &images, &why));
    assert_int_equal(why.fault, PG_REFUSED);
    task_store_close(s);
}

static bool see_worker(void *context, const struct worker_row *row)
{
    assert_string_equal(row->name, "w");
    assert_string_equal(row->state, "busy");
    assert_string_equal(row->device, "cpu");
    assert_string_equal(row->host, "node7");
    assert_int_equal(row->boot_epoch, 42);
    assert_int_equal(row->held, 3);
    assert_int_equal(row->done, 5);
    assert_true(row->seen_s >= 0 && row->seen_s < 60);
    ++*(int *)context;
    return true;
}

static void workers_are_listed_with_what_they_did(void **state)
{
    (void)state;
    struct pg_error why;
    int count = 0;
    struct task_beat beat = {"w", 42, "busy", "cpu", "tiny", 3, "node7"};
    struct task_turn *t = test_server_turn_open(&server);
    assert_true(test_server_turn(t, &(struct task_turn_request){.beats = &beat, .beat_count = 1}));
    task_turn_finish(t);
    test_server_submit(&server, "work", 10, NULL);
    work(5, 5, 0);
    struct task_store *s = open_store();
    assert_true(task_store_workers(s, see_worker, &count, &why));
    assert_int_equal(count, 1);
    task_store_close(s);
    task_turn_close(t);
}

/* Additions are folded into the campaign after five minutes; no reader may notice. */
static void folding_changes_no_counter(void **state)
{
    (void)state;
    test_server_submit(&server, "fold", 30, NULL);
    work(10, 6, 4);
    test_server_sql(&server, "update campaign_count set at = at - interval '10 min'");
    work(5, 5, 0);
    struct task_store *s = open_store();
    struct campaign before = find(s, "fold");
    struct task_turn *t = test_server_turn_open(&server);
    assert_true(test_server_turn(t, &(struct task_turn_request){.sweep = true, .coordinator = "c"}));
    task_turn_finish(t);
    task_turn_close(t);
    struct campaign after = find(s, "fold");
    assert_int_equal(test_server_number(&server, "select done from campaign"), 6);
    assert_int_equal(test_server_number(&server, "select count(*) from campaign_count"), 1);
    assert_int_equal(before.done, 11);
    assert_int_equal(after.done, 11);
    assert_int_equal(after.failed, before.failed);
    task_store_close(s);
    test_server_audit(&server);
}

static void rate_and_eta_are_of_the_last_minute(void **state)
{
    (void)state;
    test_server_submit(&server, "rate", 200, NULL);
    struct task_store *s = open_store();
    test_server_sql(&server, "update campaign set touched_at = now() - interval '1 h'");
    test_server_sql(&server, "insert into worker (name, boot_epoch, state, device, models, held) values ('w', 1, 'busy', 'cpu', 'x,tiny', 0)");
    test_server_sql(&server, "insert into campaign_count (campaign_id, done, at) select id, 10, now() - n * interval '1 s'"
                             " from campaign, unnest('{10, 20, 30}'::int[]) n");
    struct campaign c = find(s, "rate"); /* 20 images since the first addition, 30 s ago */
    assert_true(fabs(c.images_per_second - 20 / 30.0) < 0.02);
    assert_true(fabs(c.eta_s - 170 / (20 / 30.0)) < 8);
    test_server_sql(&server, "update campaign set done = 100"); /* long at work: the window is full */
    c = find(s, "rate");
    assert_true(fabs(c.images_per_second - 30 / 60.0) < 0.02);
    test_server_sql(&server, "update campaign set touched_at = now() - interval '15 s'"); /* resumed: what was before says nothing */
    c = find(s, "rate");
    assert_true(fabs(c.images_per_second - 10 / 15.0) < 0.05);
    test_server_sql(&server, "update campaign set touched_at = now() - interval '1 h'");
    test_server_sql(&server, "update campaign_count set at = at - interval '2 min'");
    c = find(s, "rate");
    assert_true(fabs(c.images_per_second - 30 / 300.0) < 0.01);
    assert_false(isnan(c.eta_s));
    test_server_sql(&server, "update worker set models = 'x,tin'"); /* nobody has the model */
    assert_true(isnan(find(s, "rate").eta_s));
    test_server_sql(&server, "update worker set models = 'tiny', seen_at = now() - interval '1 min'");
    assert_true(isnan(find(s, "rate").eta_s));
    test_server_sql(&server, "update worker set seen_at = now()");
    assert_false(isnan(find(s, "rate").eta_s));
    test_server_sql(&server, "update campaign set state = 'paused'");
    assert_true(isnan(find(s, "rate").eta_s));
    test_server_sql(&server, "update campaign set total = done + 30");
    assert_true(isnan(find(s, "rate").images_per_second)); /* it is over: a rate would only sink */
    task_store_close(s);
}

static bool find_violation(void *context, const char *check, int64_t violations)
{
    char *list = context;
    if (violations)
        strcat(strcat(list, check), " ");
    return true;
}

/* An audit that cannot fail proves nothing: break each invariant and see it named. */
static void audit_names_what_is_broken(void **state)
{
    (void)state;
    static const struct { const char *damage, *check; } cases[] = {
        {"update campaign set done = done + 1", "counters "},
        {"update campaign set total = total + 1", "total "},
        {"delete from content where task_id = (select min(id) from task)", "content "},
        {"insert into task (id, campaign_id, group_id, row, variation, truncate, seed, content_key, file, prompt)"
         " select task_id, campaign_id, group_id, row, variation, truncate, seed, content_key, file, prompt from outcome limit 1", "hot_and_cold "},
        {"delete from image where task_id = (select min(task_id) from image)", "done_without_image "},
        {"update outcome set state = 'failed', kind = 'refuse', reason = 'x' where state = 'done'", "image_without_done "},
        {"update image set file = 'one.png'", "doubled_images "},
        {"update image set lease_token = 7", "tokens "},
        {"insert into duty values ('sweep', 'c', 1, now()); update task set lease_until = now() - interval '1 h' where state = 1", "leaked_leases "},
        {"update campaign set state = 'cancelled'", "cancelled_ready "},
        {"update task set group_id = group_id + 1", "groups "},
        {"insert into duty values ('sweep', 'c', 0, now())", "duties "},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char found[500] = "";
        struct pg_error why;
        test_server_empty(&server);
        test_server_submit(&server, "audit", 20, NULL);
        work(8, 3, 2);
        test_server_audit(&server);
        test_server_sql(&server, "%s", cases[i].damage);
        struct task_store *s = open_store();
        assert_true(task_store_audit(s, "audit", find_violation, found, &why));
        if (!strstr(found, cases[i].check))
            fail_msg("after '%s' the audit says '%s', not '%s'", cases[i].damage, found, cases[i].check);
        task_store_close(s);
    }
}

static void server_that_dies_in_a_submit_leaves_whole_chunks(void **state)
{
    (void)state;
    struct task_submitted ret;
    struct pg_error why = {0};
    struct task_store *s = open_store();
    assert_true(task_store_submit_begin(s, make(s, "crash"), &why));
    bool ok = true;
    for (int i = 0; ok && i < 45000; i++) {
        char prompt[64], file[64];
        struct task_row row = test_server_row(i, prompt, file);
        if (i == 30000)
            test_server_control(&server, "restart -m immediate");
        ok = task_store_submit_row(s, &row, &why);
    }
    assert_false(ok && task_store_submit_end(s, &ret, &why));
    assert_int_equal(why.fault, PG_AWAY);
    task_store_close(s);
    int64_t there = test_server_number(&server, "select count(*) from task");
    assert_true(there == 0 || there == 20000); /* the first chunk may have been under way */
    test_server_audit(&server);
    test_server_submit(&server, "crash", 45000, &ret); /* the remedy */
    assert_int_equal(ret.added, 45000 - there);
    test_server_audit(&server);
}

static void wrong_addresses_are_refused_with_a_sentence(void **state)
{
    (void)state;
    struct task_store *s = NULL;
    struct pg_error why;
    char uri[300];
    assert_false(task_store_open(&s, "postgresql:///x?nonsense=1", &why));
    assert_int_equal(why.fault, PG_REFUSED);
    snprintf(uri, sizeof uri, "%s&dbname=absent", server.uri);
    assert_false(task_store_open(&s, uri, &why));
    assert_int_equal(why.fault, PG_REFUSED);
    assert_non_null(strstr(why.text, "absent"));
    snprintf(uri, sizeof uri, "%s&dbname=postgres", server.uri);
    assert_false(task_store_open(&s, uri, &why));
    assert_int_equal(why.fault, PG_REFUSED);
    assert_non_null(strstr(why.text, "no kiln tables"));
    assert_false(task_store_open(&s, "postgresql:///x?host=/nonexistent", &why));
    assert_int_equal(why.fault, PG_AWAY);
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
        cmocka_unit_test_setup(submitting_again_adds_nothing, empty),
        cmocka_unit_test_setup(lines_put_in_the_middle_are_all_that_is_added, empty),
        cmocka_unit_test_setup(one_key_twice_in_a_file_is_one_task, empty),
        cmocka_unit_test_setup(two_images_never_share_a_file, empty),
        cmocka_unit_test_setup(two_submits_at_once_share_the_work, empty),
        cmocka_unit_test_setup(hostile_values_come_back_as_they_were, empty),
        cmocka_unit_test_setup(inputs_stay_with_their_task, empty),
        cmocka_unit_test_setup(impossible_rows_are_refused_whole, empty),
        cmocka_unit_test_setup(two_campaigns_in_one_folder_cannot_have_files_of_one_name, empty),
        cmocka_unit_test_setup(campaign_is_one_folder_format_use_and_seed, empty),
        cmocka_unit_test_setup(pause_cancel_and_retry, empty),
        cmocka_unit_test_setup(listings_are_in_order_and_may_stop_early, empty),
        cmocka_unit_test_setup(workers_are_listed_with_what_they_did, empty),
        cmocka_unit_test_setup(folding_changes_no_counter, empty),
        cmocka_unit_test_setup(rate_and_eta_are_of_the_last_minute, empty),
        cmocka_unit_test_setup(audit_names_what_is_broken, empty),
        cmocka_unit_test_setup(server_that_dies_in_a_submit_leaves_whole_chunks, empty),
        cmocka_unit_test_setup(wrong_addresses_are_refused_with_a_sentence, empty),
    };
    return cmocka_run_group_tests(tests, start_server, drop_server);
}
