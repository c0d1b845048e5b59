/* test_list.c - the commands that talk to the database, on a real PostgreSQL, with real files.
 * If this breaks, people are told something else than what is true. A worker of a few lines claims and finishes
 * tasks the way the coordinator does; commands run in this process, what they print is read back. */
#include "list.h"

#include "audit.h"
#include "clock.h"
#include "migrate.h"
#include "store_dir.h"
#include "submit.h"
#include "task_store.h"

#include <fcntl.h>
#include <jansson.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utime.h>

#include <cmocka.h>

#include "captured.h"

static char folder[] = "/tmp/kiln-test-list.XXXXXX";
static char uri[512], home[600];
static char out[1 << 16], err[1 << 14]; /* of the last command */

/* --- running commands -------------------------------------------------------------------------------------- */

/* Runs `kiln COMMAND WORDS...` with the test's home and database. */
static int run_on(const char *database, const struct command *command, const char *const *words)
{
    char *argv[32];
    int argc = 0;
    while (words[argc]) {
        argv[argc] = (char *)words[argc];
        argc++;
    }
    argv[argc++] = "--database", argv[argc++] = (char *)database;
    argv[argc++] = "--home", argv[argc++] = home;
    argv[argc] = NULL;
    struct command_call call = {.command = command, .argc = argc, .argv = argv};
    fflush(stdout);
    int saved_out = captured_begin(STDOUT_FILENO), saved_err = captured_begin(STDERR_FILENO);
    int code = command->run(&call);
    fflush(stdout);
    fflush(stderr);
    captured_end(STDOUT_FILENO, saved_out, out, sizeof out);
    captured_end(STDERR_FILENO, saved_err, err, sizeof err);
    return code;
}

#define RUN(command, ...) run_on(uri, &command, (const char *const[]){__VA_ARGS__, NULL})

#define EXPECT(code, command, ...)                                                                                     \
    do {                                                                                                               \
        int got = RUN(command, __VA_ARGS__);                                                                           \
        if (got != (code))                                                                                             \
            fail_msg("exit code %d, expected %d\nout: %s\nerr: %s", got, (code), out, err);                            \
    } while (0)

static void expect_word(const char *text, const char *word)
{
    if (!strstr(text, word))
        fail_msg("'%s' is not in: %s", word, text);
}

static void expect_text(const char *path, const char *text)
{
    char found[64] = "";
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    found[fread(found, 1, sizeof found - 1, f)] = 0;
    fclose(f);
    assert_string_equal(found, text);
}

/* Line n (from 0) of what was printed, as JSON. */
static json_t *line_json(int n)
{
    const char *p = out;
    json_error_t error;
    for (; n > 0 && p; n--)
        p = strchr(p, '\n') ? strchr(p, '\n') + 1 : NULL;
    assert_non_null(p);
    json_t *value = json_loadb(p, strcspn(p, "\n"), 0, &error);
    if (!value)
        fail_msg("%s: %s", error.text, p);
    return value;
}

static int line_count(void)
{
    int count = 0;
    for (const char *p = out; *p; p++)
        count += *p == '\n';
    return count;
}

static const char *file_of(const char *name, const char *text)
{
    static char path[700];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    assert_true(fputs(text, f) >= 0);
    assert_int_equal(fclose(f), 0);
    return path;
}

/* --- a worker of a few lines ---------------------------------------------------------------------------------- */

static void turn_until(struct task_turn *t, enum task_turn_state state)
{
    const int64_t until = clock_ms() + 20000;
    for (enum task_turn_state now; (now = task_turn_poll(t)) != state;) {
        if (clock_ms() > until)
            fail_msg("the turn stays in state %d: %s", now, task_turn_why(t));
        clock_sleep_ms(1);
    }
}

static const struct task_turn_result *turn(struct task_turn *t, struct task_turn_request request)
{
    request.coordinator = "test";
    turn_until(t, TASK_TURN_IDLE);
    task_turn_start(t, &request);
    turn_until(t, TASK_TURN_READY);
    return task_turn_result(t);
}

/* Claims up to `count` tasks of the campaign; the first `fails` of them are refused, the rest rendered and published. */
static int work(const char *campaign, int count, int fails)
{
    struct task_turn *t;
    struct pg_error why;
    assert_true(task_turn_open(&t, uri, &why));
    const struct task_turn_result *r = turn(t, (struct task_turn_request){.offer = true});
    struct task_group group = {0};
    for (int i = 0; i < r->offer_count; i++)
        if (strcmp(r->offer[i].campaign, campaign) == 0) {
            group = r->offer[i];
            group.out_dir = strdup(r->offer[i].out_dir);
            break;
        }
    assert_true(group.id != 0);
    task_turn_finish(t);
    struct task_want want = {.group_id = group.id, .worker = "w1", .count = count, .lease_ms = 60000};
    r = turn(t, (struct task_turn_request){.wants = &want, .want_count = 1});
    int claimed = r->claimed_count;
    struct task_finish *finishes = calloc((size_t)claimed + 1, sizeof *finishes);
    struct task_fail *refused = calloc((size_t)claimed + 1, sizeof *refused);
    char (*sha256)[65] = calloc((size_t)claimed + 1, sizeof *sha256), (*files)[256] = calloc((size_t)claimed + 1, sizeof *files);
    int finish_count = 0, fail_count = 0;
    for (int i = 0; i < claimed; i++) {
        const struct task_claimed *c = &r->claimed[i];
        struct store_error fault;
        if (i < fails) {
            refused[fail_count++] = (struct task_fail){c->task, c->token, TASK_REFUSE, "the prompt has 600 tokens"};
            continue;
        }
        int n = finish_count++;
        snprintf(files[n], sizeof files[n], "%s", c->file);
        assert_true(store_dir_stage(group.out_dir, c->task, c->token, c->file, strlen(c->file), sha256[n], &fault));
        finishes[n] = (struct task_finish){.task = c->task, .token = c->token, .worker = "w1", .sha256 = sha256[n],
                                           .digest = "d1", .bytes = strlen(c->file), .seed = c->seed, .width = group.width,
                                           .height = group.height, .steps = 4, .guidance = 1, .render_s = 0.25};
    }
    task_turn_finish(t);
    r = turn(t, (struct task_turn_request){.finishes = finishes, .finish_count = finish_count, .fails = refused, .fail_count = fail_count});
    for (int i = 0; i < finish_count; i++) {
        struct store_error fault;
        assert_int_equal(r->finish_committed[i], 1);
        assert_true(store_dir_publish(group.out_dir, finishes[i].task, finishes[i].token, files[i], &fault));
    }
    task_turn_finish(t);
    task_turn_close(t);
    free(finishes);
    free(refused);
    free(sha256);
    free(files);
    free(group.out_dir);
    return claimed;
}

/* --- submit ---------------------------------------------------------------------------------------------------- */

static void submitting_again_adds_only_what_is_missing(void **state)
{
    (void)state;
    const char *path = file_of("a.csv", "prompt,name,Note\nfox,f,x\nowl,,\n\"a \"\"red\"\" cat\",,\n");
    EXPECT(0, submit_command, path, "--campaign", "adds", "--model", "m", "--seeds", "2", "--size", "64x64");
    assert_string_equal(out, "campaign adds: 6 added, 0 already present\nlabels: Note\n");
    EXPECT(0, submit_command, path, "--campaign", "adds", "--model", "m", "--seeds", "2", "--size", "64x64", "--json");
    assert_string_equal(out, "{\"campaign\":\"adds\",\"added\":0,\"present\":6,\"total\":6}\n");
    path = file_of("a.csv", "prompt,name,Note\nnew,,\nfox,f,x\nowl,,\nowl,,\n\"a \"\"red\"\" cat\",,\n");
    EXPECT(0, submit_command, path, "--campaign", "adds", "--model", "m", "--seeds", "2", "--size", "64x64");
    assert_string_equal(out, "campaign adds: 4 added, 6 already present\nlabels: Note\n");
    EXPECT(0, list_status_command, "adds", "--json");
    json_t *line = line_json(0);
    assert_int_equal(json_integer_value(json_object_get(line, "total")), 10);
    assert_int_equal(json_integer_value(json_object_get(line, "ready")), 10);
    assert_int_equal(json_object_size(line), 10);
    assert_true(json_is_null(json_object_get(line, "images_per_second")));
    assert_string_equal(json_string_value(json_object_get(line, "state")), "active");
    json_decref(line);
}

static void refused_submission_leaves_nothing(void **state)
{
    (void)state;
    const char *path = file_of("bad.csv", "prompt,seed\nfox,1\nowl,99999999999999999999\n");
    EXPECT(2, submit_command, path, "--campaign", "refused", "--model", "m");
    expect_word(err, "bad.csv:3: seed");
    expect_word(err, "nothing was added");
    EXPECT(2, submit_command, path, "--campaign", "a/b", "--model", "m");
    expect_word(err, "'/' at position 2");
    path = file_of("good.txt", "fox\n");
    EXPECT(2, submit_command, path, "--campaign", "refused");
    expect_word(err, "--model");
    EXPECT(2, submit_command, path, "--campaign", "refused", "--model", "m", "--size", "100x100");
    EXPECT(2, submit_command, path, "--campaign", "refused", "--model", "m", "--out", "s3://bucket/x");
    expect_word(err, "folders only");
    EXPECT(2, submit_command, path, "--campaign", "refused", "--model", "m", "--lora", "x.safetensors");
    expect_word(err, "cannot be read");
    EXPECT(2, submit_command, path, "--campaign", "refused", "--model", "m", "--out", "/nowhere/at/all");
    expect_word(err, "parent must exist");
    EXPECT(2, submit_command, "/nowhere.txt", "--campaign", "refused", "--model", "m");
    EXPECT(2, submit_command, file_of("empty.txt", "# nothing\n\n"), "--campaign", "refused", "--model", "m");
    expect_word(err, "no prompts in it");
    EXPECT(0, submit_command, file_of("good.txt", "fox\n"), "--campaign", "refused", "--model", "m", "--dry-run");
    expect_word(out, "nothing was written");
    EXPECT(2, list_status_command, "refused");
    expect_word(err, "no campaign 'refused'");
}

static void campaign_keeps_its_settings(void **state)
{
    (void)state;
    char other[700];
    snprintf(other, sizeof other, "%s/other", folder);
    const char *path = file_of("k.txt", "fox\n");
    EXPECT(0, submit_command, path, "--campaign", "keeps", "--model", "m", "--out", other, "--format", "jpg", "--seed", "7");
    EXPECT(0, submit_command, path, "--campaign", "keeps", "--model", "m");
    assert_string_equal(out, "campaign keeps: 0 added, 1 already present\n");
    EXPECT(2, submit_command, path, "--campaign", "keeps", "--model", "m", "--format", "png");
    expect_word(err, "jpg");
    EXPECT(2, submit_command, path, "--campaign", "keeps", "--model", "m", "--seed", "8");
    expect_word(err, "7");
}

static void standard_input_is_a_file_too(void **state)
{
    (void)state;
    int saved = dup(STDIN_FILENO), fds[2];
    assert_int_equal(pipe(fds), 0);
    assert_int_equal(write(fds[1], "{\"prompt\":\"fox\"}\n", 17), 17);
    close(fds[1]);
    dup2(fds[0], STDIN_FILENO);
    close(fds[0]);
    EXPECT(0, submit_command, "-", "--campaign", "piped", "--model", "m");
    dup2(saved, STDIN_FILENO);
    close(saved);
    assert_string_equal(out, "campaign piped: 1 added, 0 already present\n");
}

/* --- looking ------------------------------------------------------------------------------------------------------ */

static void images_and_failures_are_listed_in_the_order_of_the_file(void **state)
{
    (void)state;
    const char *path = file_of("l.csv", "prompt,seed\nfox,18446744073709551615\nowl,\n\"line\nbreak\",\ncat,\n");
    EXPECT(0, submit_command, path, "--campaign", "lists", "--model", "m", "--size", "64x64");
    EXPECT(0, list_images_command, "lists");
    assert_string_equal(out, "");
    assert_int_equal(work("lists", 1, 1), 1); /* the first fails */
    assert_int_equal(work("lists", 3, 0), 3);
    EXPECT(0, list_images_command, "lists", "--json");
    assert_int_equal(line_count(), 3);
    static const char *const prompts[] = {"owl", "line\nbreak", "cat"};
    static const char *const keys[] = {"task", "campaign", "row", "variation", "path", "sha256", "bytes", "width", "height",
                                       "seed", "prompt", "model", "worker", "attempt", "render_s"};
    for (int i = 0; i < 3; i++) {
        json_t *line = line_json(i);
        struct stat info;
        assert_int_equal(json_object_size(line), 15);
        for (int k = 0; k < 15; k++)
            assert_non_null(json_object_get(line, keys[k]));
        assert_string_equal(json_string_value(json_object_get(line, "prompt")), prompts[i]);
        assert_int_equal(json_integer_value(json_object_get(line, "row")), i + 2);
        assert_int_equal(stat(json_string_value(json_object_get(line, "path")), &info), 0);
        assert_true(json_string_value(json_object_get(line, "path"))[0] == '/');
        assert_int_equal(info.st_size, json_integer_value(json_object_get(line, "bytes")));
        json_decref(line);
    }
    EXPECT(0, list_images_command, "lists");
    assert_int_equal(line_count(), 3); /* a line break in a prompt breaks no line */
    expect_word(out, "line break");
    EXPECT(0, list_failures_command, "lists", "--json");
    assert_int_equal(line_count(), 1);
    json_t *line = line_json(0);
    assert_int_equal(json_object_size(line), 9);
    assert_string_equal(json_string_value(json_object_get(line, "kind")), "refuse");
    assert_string_equal(json_string_value(json_object_get(line, "reason")), "the prompt has 600 tokens");
    assert_string_equal(json_string_value(json_object_get(line, "prompt")), "fox");
    json_decref(line);
    EXPECT(0, list_failures_command, "lists");
    expect_word(out, "600 tokens");
    EXPECT(0, list_status_command, "lists", "--json");
    line = line_json(0);
    assert_string_equal(json_string_value(json_object_get(line, "state")), "done");
    assert_int_equal(json_integer_value(json_object_get(line, "done")), 3);
    assert_int_equal(json_integer_value(json_object_get(line, "failed")), 1);
    json_decref(line);
    EXPECT(0, list_status_command, NULL);
    expect_word(out, "CAMPAIGN");
    expect_word(out, "lists");
}

/* The largest seed comes back digit by digit. */
static void seeds_are_exact_in_json(void **state)
{
    (void)state;
    EXPECT(0, submit_command, file_of("s.csv", "prompt,seed\nfox,18446744073709551615\n"), "--campaign", "seeds", "--model", "m");
    assert_int_equal(work("seeds", 1, 0), 1);
    EXPECT(0, list_images_command, "seeds", "--json");
    expect_word(out, "\"seed\":18446744073709551615,");
}

static void state_changes_do_what_they_say(void **state)
{
    (void)state;
    EXPECT(0, submit_command, file_of("c.txt", "a\nb\nc\n"), "--campaign", "states", "--model", "m");
    EXPECT(0, list_pause_command, "states");
    EXPECT(0, list_status_command, "states", "--json");
    expect_word(out, "\"state\":\"paused\"");
    EXPECT(0, list_resume_command, "states", "--json");
    assert_string_equal(out, "{\"campaign\":\"states\",\"state\":\"active\"}\n");
    EXPECT(0, submit_command, file_of("o.txt", "a\n"), "--campaign", "over", "--model", "m");
    work("over", 1, 0);
    EXPECT(0, list_resume_command, "over");
    expect_word(out, "campaign over is done: there is nothing left to go on with");
    EXPECT(0, list_resume_command, "over", "--json");
    assert_string_equal(out, "{\"campaign\":\"over\",\"state\":\"done\"}\n");
    work("states", 1, 1);
    EXPECT(0, list_retry_command, "states", "--json");
    assert_string_equal(out, "{\"campaign\":\"states\",\"state\":\"active\",\"tasks\":1}\n");
    EXPECT(0, list_cancel_command, "states");
    expect_word(out, "3 tasks taken out");
    EXPECT(0, list_status_command, "states", "--json");
    expect_word(out, "\"state\":\"cancelled\"");
    expect_word(out, "\"failed\":3,\"cancelled\":3,");
    EXPECT(0, submit_command, file_of("o.txt", "a\n"), "--campaign", "one", "--model", "m");
    EXPECT(0, list_cancel_command, "one");
    expect_word(out, "1 task taken out");
    EXPECT(2, list_pause_command, "nobody");
    EXPECT(2, list_images_command, "nobody", "--json");
    EXPECT(2, list_failures_command, "nobody");
    EXPECT(2, audit_command, "nobody");
    expect_word(err, "no campaign 'nobody'");
}

static void database_that_is_away_is_exit_code_75(void **state)
{
    (void)state;
    static const char nowhere[] = "postgresql:///kiln?host=/nowhere/at/all&port=5432&connect_timeout=2";
    const char *const words[] = {"x", NULL}, *const none[] = {NULL};
    assert_int_equal(run_on(nowhere, &list_status_command, none), 75);
    assert_int_equal(run_on(nowhere, &list_images_command, words), 75);
    assert_int_equal(run_on(nowhere, &audit_command, none), 75);
    assert_true(err[0] != 0 && out[0] == 0);
    const char *path = file_of("away.txt", "fox\n");
    const char *const submit[] = {path, "--campaign", "away", "--model", "m", NULL};
    assert_int_equal(run_on(nowhere, &submit_command, submit), 75);
}

/* --- audit --------------------------------------------------------------------------------------------------------- */

static void image_path(int n, char ret[1024])
{
    EXPECT(0, list_images_command, "audited", "--json");
    json_t *line = line_json(n);
    snprintf(ret, 1024, "%s", json_string_value(json_object_get(line, "path")));
    json_decref(line);
}

static void write_text(const char *path, const char *text)
{
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    assert_int_equal(fclose(f), 0);
}

static void audit_finds_what_was_done_to_files(void **state)
{
    (void)state;
    char path[1024], moved[1040], stray[1100], text[300];
    EXPECT(0, submit_command, file_of("u.txt", "a\nb\nc\n"), "--campaign", "audited", "--model", "m");
    assert_int_equal(work("audited", 3, 0), 3);
    EXPECT(0, audit_command, "audited");
    expect_word(out, "clean\n");
    EXPECT(0, audit_command, NULL);

    image_path(0, path);
    const char *name = strrchr(path, '/') + 1;
    snprintf(text, sizeof text, "%s", name);
    text[0] ^= 1;
    write_text(path, text); /* same size, another byte */
    EXPECT(1, audit_command, "audited");
    expect_word(out, "image_file_damaged");
    expect_word(out, path);
    expect_word(out, "SHA-256");
    write_text(path, "short");
    EXPECT(1, audit_command, "audited", "--json");
    expect_word(out, "{\"check\":\"image_file_damaged\",\"violations\":1,\"examples\":[\"");
    snprintf(moved, sizeof moved, "%s.moved", path);
    assert_int_equal(rename(path, moved), 0);
    EXPECT(1, audit_command, "audited");
    expect_word(out, "image_file_missing");
    assert_int_equal(rename(moved, path), 0);
    write_text(path, name);
    EXPECT(0, audit_command, "audited");

    snprintf(stray, sizeof stray, "%.*s/000099-0a1b2c3d.png", (int)(name - path - 1), path);
    write_text(stray, "x");
    EXPECT(1, audit_command, "audited");
    expect_word(out, "file_without_row");
    expect_word(out, stray);
    assert_int_equal(unlink(stray), 0);
    snprintf(stray, sizeof stray, "%.*s/notes.txt", (int)(name - path - 1), path);
    write_text(stray, "x"); /* not ours */
    EXPECT(0, audit_command, "audited");

    snprintf(stray, sizeof stray, "%.*s/.staging/7-9", (int)(name - path - 1), path);
    write_text(stray, "x");
    EXPECT(0, audit_command, "audited"); /* the janitor has not had its time */
    struct utimbuf old = {.actime = 1000000000, .modtime = 1000000000};
    assert_int_equal(utime(stray, &old), 0);
    EXPECT(1, audit_command, "audited");
    expect_word(out, "stale_staged_file");
    expect_word(out, "7-9");
    assert_int_equal(unlink(stray), 0);
}

/* A disk that lost files: their images are rendered again, and nothing else is. */
static void repair_has_lost_and_damaged_images_rendered_again(void **state)
{
    (void)state;
    char damaged[1024], lost[1024], aside[1040], staged[1100], moved[1100];
    EXPECT(0, audit_command, "audited", "--repair");
    expect_word(out, "0 images are rendered again");
    image_path(0, damaged);
    image_path(1, lost);
    write_text(damaged, "short");
    assert_int_equal(unlink(lost), 0);
    EXPECT(1, audit_command, "audited", "--repair", "--json");
    expect_word(out, "{\"rendered_again\":2}");
    snprintf(aside, sizeof aside, "%s.damaged", damaged);
    assert_int_equal(access(aside, F_OK), 0);
    assert_int_equal(access(damaged, F_OK), -1);
    EXPECT(0, audit_command, "audited"); /* tasks that wait have no files; what was put aside is nobody's */
    EXPECT(0, list_status_command, "audited", "--json");
    expect_word(out, "\"state\":\"active\",\"total\":3,\"ready\":2,\"running\":0,\"done\":1,\"failed\":0");
    assert_int_equal(work("audited", 3, 0), 2);
    EXPECT(0, audit_command, "audited");
    image_path(0, lost);
    assert_string_equal(lost, damaged); /* the same place */

    /* damaged once more: what was put aside before stays */
    write_text(damaged, "shorter");
    EXPECT(1, audit_command, "audited", "--repair");
    expect_word(out, "1 image is rendered again");
    expect_text(aside, "short");
    snprintf(aside, sizeof aside, "%s.damaged-2", damaged);
    expect_text(aside, "shorter");
    assert_int_equal(work("audited", 3, 0), 1);

    /* one whose file waits to be published is on its way; a folder that is gone is no reason to render all of it */
    EXPECT(0, list_images_command, "audited", "--json");
    json_t *line = line_json(2);
    snprintf(lost, sizeof lost, "%s", json_string_value(json_object_get(line, "path")));
    snprintf(staged, sizeof staged, "%.*s/.staging/%lld-1", (int)(strrchr(lost, '/') - lost), lost,
             (long long)json_integer_value(json_object_get(line, "task")));
    json_decref(line);
    assert_int_equal(rename(lost, staged), 0);
    EXPECT(1, audit_command, "audited", "--repair");
    expect_word(out, "0 images are rendered again");
    expect_word(err, "its file is staged");
    assert_int_equal(rename(staged, lost), 0);
    *strrchr(lost, '/') = 0;
    snprintf(moved, sizeof moved, "%s.moved", lost);
    assert_int_equal(rename(lost, moved), 0);
    EXPECT(1, audit_command, "audited", "--repair");
    expect_word(out, "0 images are rendered again");
    expect_word(err, "its folder is not there");
    assert_int_equal(rename(moved, lost), 0);
    EXPECT(0, audit_command, "audited");
}

/* What people gave up is left alone, and does not keep the campaigns behind it from being repaired. */
static void repair_passes_over_a_cancelled_campaign(void **state)
{
    (void)state;
    char path[1024];
    for (int i = 0; i < 2; i++) {
        const char *name = i ? "given-up-not" : "given-up";
        EXPECT(0, submit_command, file_of("g.txt", "a\nb\n"), "--campaign", name, "--model", "m");
        assert_int_equal(work(name, 1, 0), 1);
        EXPECT(0, list_images_command, name, "--json");
        json_t *line = line_json(0);
        snprintf(path, sizeof path, "%s", json_string_value(json_object_get(line, "path")));
        json_decref(line);
        assert_int_equal(unlink(path), 0);
    }
    EXPECT(0, list_cancel_command, "given-up");
    EXPECT(1, audit_command, "--repair");
    expect_word(err, "campaign 'given-up' is cancelled; 'kiln retry given-up' takes it up again");
    EXPECT(0, list_status_command, "given-up-not", "--json");
    expect_word(out, "\"ready\":2,");
    EXPECT(0, list_retry_command, "given-up");
    EXPECT(1, audit_command, "given-up", "--repair");
    expect_word(out, "1 image is rendered again");
    work("given-up", 2, 0);
    work("given-up-not", 2, 0);
    EXPECT(0, audit_command, "given-up");
    EXPECT(0, audit_command, "given-up-not");
}

/* Two campaigns that write to one folder are no strangers to each other. */
static void audit_knows_folders_that_are_shared(void **state)
{
    (void)state;
    char shared[700];
    snprintf(shared, sizeof shared, "%s/shared", folder);
    EXPECT(0, submit_command, file_of("1.txt", "one\n"), "--campaign", "shared1", "--model", "m", "--out", shared);
    EXPECT(0, submit_command, file_of("2.txt", "two\n"), "--campaign", "shared2", "--model", "m", "--out", shared);
    work("shared1", 1, 0);
    work("shared2", 1, 0);
    EXPECT(0, audit_command, "shared1");
    EXPECT(0, audit_command, "shared2", "--json");
}

/* --- the server ------------------------------------------------------------------------------------------------------ */

static int shell(const char *format, ...)
{
    char command[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(command, sizeof command, format, args);
    va_end(args);
    return system(command);
}

static int start(void **state)
{
    (void)state;
    struct pg_error why;
    int from, to;
    char path[700];
    if (!mkdtemp(folder) || chmod(folder, 0755) != 0)
        return -1;
    snprintf(home, sizeof home, "%s/home", folder);
    snprintf(path, sizeof path, "%s/uri", folder);
    if (shell("tests/sql/pg_server start %s/pg >%s", folder, path) != 0)
        return -1;
    FILE *f = fopen(path, "r");
    if (!f || fscanf(f, "%511s", uri) != 1)
        return -1;
    fclose(f);
    if (!migrate_run(uri, &from, &to, &why)) {
        print_error("%s\n", why.text);
        return -1;
    }
    return 0;
}

static int stop(void **state)
{
    (void)state;
    shell("tests/sql/pg_server drop %s/pg", folder);
    return shell("rm -rf %s", folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(submitting_again_adds_only_what_is_missing),
        cmocka_unit_test(refused_submission_leaves_nothing),
        cmocka_unit_test(campaign_keeps_its_settings),
        cmocka_unit_test(standard_input_is_a_file_too),
        cmocka_unit_test(images_and_failures_are_listed_in_the_order_of_the_file),
        cmocka_unit_test(seeds_are_exact_in_json),
        cmocka_unit_test(state_changes_do_what_they_say),
        cmocka_unit_test(database_that_is_away_is_exit_code_75),
        cmocka_unit_test(audit_finds_what_was_done_to_files),
        cmocka_unit_test(repair_has_lost_and_damaged_images_rendered_again),
        cmocka_unit_test(repair_passes_over_a_cancelled_campaign),
        cmocka_unit_test(audit_knows_folders_that_are_shared),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
