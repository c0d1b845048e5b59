/* test_server.c - see test_server.h. */
#include "test_server.h"

#include <math.h>
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "migrate.h"

static void script(struct test_server *s, const char *verb, char *ret, size_t bytes)
{
    char command[256];
    const char *rest = strchr(verb, ' ');
    snprintf(command, sizeof command, "tests/sql/pg_server %.*s %s%s", rest ? (int)(rest - verb) : (int)strlen(verb), verb,
             s->dir, rest ? rest : "");
    FILE *pipe = popen(command, "r");
    if (!pipe)
        fail_msg("%s does not start", command);
    if (ret && !fgets(ret, (int)bytes, pipe))
        ret[0] = '\0';
    while (fgetc(pipe) != EOF)
        ;
    if (pclose(pipe) != 0)
        fail_msg("%s failed", command);
    if (ret)
        ret[strcspn(ret, "\n")] = '\0';
}

void test_server_start(struct test_server *s)
{
    struct pg_error why;
    int from, to;
    char verb[64];
    snprintf(s->dir, sizeof s->dir, "/tmp/kiln-test-XXXXXX");
    if (!mkdtemp(s->dir))
        fail_msg("no temporary folder %s", s->dir);
    snprintf(verb, sizeof verb, "start --owner %ld", (long)getpid());
    script(s, verb, s->uri, sizeof s->uri);
    if (!migrate_run(s->uri, &from, &to, &why))
        fail_msg("migrate: %s", why.text);
    assert_int_equal(from, 0);
    assert_int_equal(to, migrate_version());
}

void test_server_drop(struct test_server *s)
{
    if (s->dir[0])
        script(s, "drop", NULL, 0);
    s->dir[0] = '\0';
}

void test_server_control(struct test_server *s, const char *verb)
{
    script(s, verb, NULL, 0);
}

int test_server_pid(struct test_server *s)
{
    char text[32];
    script(s, "pid", text, sizeof text);
    return atoi(text);
}

void test_server_sql(struct test_server *s, const char *format, ...)
{
    struct pg *pg = NULL;
    struct pg_error why;
    char sql[2000];
    va_list list;
    va_start(list, format);
    vsnprintf(sql, sizeof sql, format, list);
    va_end(list);
    if (!pg_open(&pg, s->uri, 60000, &why) || !pg_script(pg, sql, &why))
        fail_msg("%s: %s", sql, why.text);
    pg_close(pg);
}

int64_t test_server_number(struct test_server *s, const char *format, ...)
{
    struct pg *pg = NULL;
    struct pg_error why;
    struct pg_result *r = NULL;
    char sql[2000];
    va_list list;
    va_start(list, format);
    vsnprintf(sql, sizeof sql, format, list);
    va_end(list);
    if (!pg_open(&pg, s->uri, 60000, &why) || !pg_run(pg, sql, NULL, &r, &why))
        fail_msg("%s: %s", sql, why.text);
    int64_t number = pg_row_count(r) == 0 || pg_row_is_null(r, 0, 0) ? -1 : pg_row_i64(r, 0, 0);
    pg_result_free(r);
    pg_close(pg);
    return number;
}

void test_server_empty(struct test_server *s)
{
    test_server_sql(s, "truncate campaign, campaign_count, task_group, content, task, outcome, image, worker, duty");
}

struct task_row test_server_row(int row, char *prompt, char *file)
{
    snprintf(prompt, 64, "prompt %d", row);
    snprintf(file, 64, "%06d.png", row);
    struct task_row r = {.prompt = prompt, .negative = "", .model = "tiny", .file = file, .name = "", .row = row,
                         .width = 512, .height = 512, .steps = 4, .guidance = (double)NAN, .seed = (uint64_t)row};
    for (int i = 0; i < 16; i++)
        r.content_key[i] = (uint8_t)(((unsigned)row * 2654435761u) >> (i % 4 * 8)) ^ (uint8_t)(i / 4 * 17);
    return r;
}

void test_server_submit(struct test_server *s, const char *campaign, int count, struct task_submitted *ret)
{
    struct task_store *store = NULL;
    struct campaign c = {0};
    struct task_submitted submitted;
    struct pg_error why;
    char out_dir[160];
    snprintf(out_dir, sizeof out_dir, "/out/%s", campaign);
    struct campaign_spec spec = {.name = campaign, .out_dir = out_dir, .format = "png", .use = "", .base_seed = 7};
    if (!task_store_open(&store, s->uri, &why) || !task_store_campaign(store, &spec, &c, &why) ||
        !task_store_submit_begin(store, c.id, &why))
        fail_msg("submit: %s", why.text);
    for (int i = 0; i < count; i++) {
        char prompt[64], file[64];
        struct task_row row = test_server_row(i, prompt, file);
        if (!task_store_submit_row(store, &row, &why))
            fail_msg("row %d: %s", i, why.text);
    }
    if (!task_store_submit_end(store, ret ? ret : &submitted, &why))
        fail_msg("submit: %s", why.text);
    task_store_campaign_done(&c);
    task_store_close(store);
}

static bool audited(void *context, const char *check, int64_t violations)
{
    int *count = context;
    if (violations != 0)
        fail_msg("audit: %s: %lld", check, (long long)violations);
    (*count)++;
    return true;
}

void test_server_audit(struct test_server *s)
{
    struct task_store *store = NULL;
    struct pg_error why;
    int count = 0;
    if (!task_store_open(&store, s->uri, &why) || !task_store_audit(store, NULL, audited, &count, &why))
        fail_msg("audit: %s", why.text);
    assert_true(count >= 10);
    task_store_close(store);
}

bool test_server_wait(struct task_turn *t, enum task_turn_state state, int limit_ms)
{
    int64_t end_ms = pg_now_ms() + limit_ms;
    for (;;) {
        enum task_turn_state now = task_turn_poll(t);
        if (now == state)
            return true;
        if (pg_now_ms() >= end_ms)
            return false;
        struct pollfd fd = {.fd = task_turn_fd(t), .events = task_turn_wants_write(t) ? POLLIN | POLLOUT : POLLIN};
        poll(&fd, 1, fd.fd < 0 ? 5 : 20);
    }
}

struct task_turn *test_server_turn_open(struct test_server *s)
{
    struct task_turn *t = NULL;
    struct pg_error why;
    if (!task_turn_open(&t, s->uri, &why))
        fail_msg("turn: %s", why.text);
    if (!test_server_wait(t, TASK_TURN_IDLE, 10000))
        fail_msg("turn: %s", task_turn_why(t));
    return t;
}

bool test_server_turn(struct task_turn *t, const struct task_turn_request *request)
{
    task_turn_start(t, request);
    for (;;) {
        switch (task_turn_poll(t)) {
        case TASK_TURN_READY:
            return true;
        case TASK_TURN_BUSY:
            break;
        default:
            return false;
        }
        struct pollfd fd = {.fd = task_turn_fd(t), .events = task_turn_wants_write(t) ? POLLIN | POLLOUT : POLLIN};
        poll(&fd, 1, 20);
    }
}

struct task_finish test_server_finish(const struct task_claimed *c, const char *worker)
{
    return (struct task_finish){
        .task = c->task, .token = c->token, .worker = worker,
        .sha256 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef", .digest = "d", .bytes = 1000,
        .seed = c->seed, .width = 512, .height = 512, .steps = 4, .guidance = 1, .render_s = 0.5};
}
