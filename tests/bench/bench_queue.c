/* bench_queue.c - how fast the task store is on this machine: JSON lines {"name","value","unit","limit","ratio"}.
 *
 *   bench_queue --database URI [--rows N] [--tasks N] [--seconds S] [--pinned]
 *
 * submit_rows         rows with prompts of about 80 bytes, new keys, through task_store
 * submit_again_rows   the same rows once more: nothing to add
 * queue_turns         one connection: 256 finishes and 256 claims a turn, until N tasks are done
 * offer_ms            one look for groups with work, behind all the ready rows and 2,000 groups
 * claim_to_commit     one task at a time at 100/s: the turn that claims plus the turn that finishes, p50 and p99
 * --pinned            the last two once more while a transaction keeps vacuum from clearing anything
 *
 * The database must be empty but for kiln's tables, and durable, or the figures mean nothing. Limits: submit 100,000
 * rows/s, turns 8,000 tasks/s, latency 2 and 20 ms (twice that when pinned). */
#include <getopt.h>
#include <math.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "migrate.h"
#include "task_store.h"

enum { BATCH = 256, GROUPS = 2000, RATE = 100 };

static const char sha256[] = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
static const char *uri;
static int row_count = 400000, task_count = 60000, second_count = 5;

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void stop(const char *what, const char *text)
{
    fprintf(stderr, "bench_queue: %s: %s\n", what, text);
    exit(1);
}

static void report(const char *name, double value, const char *unit, double limit)
{
    printf("{\"name\":\"%s\",\"value\":%.4g,\"unit\":\"%s\",\"limit\":%g,\"ratio\":%.3g}\n", name, value, unit, limit,
           value / limit);
    fflush(stdout);
}

/* --- submit --------------------------------------------------------------------------------------------------- */

/* row_of makes row i: its key is as random as a hash, its prompt as long as people's. */
static struct task_row row_of(int i, int groups, char *prompt, char *file)
{
    uint64_t a = (uint64_t)(i + 1) * 0x9e3779b97f4a7c15u, b;
    a ^= a >> 31;
    a *= 0xbf58476d1ce4e5b9u;
    b = a ^ (a >> 29);
    snprintf(prompt, 128, "a portrait of traveller number %d in a market at dusk, 35 mm, soft light, grain", i);
    snprintf(file, 64, "%07d-%08x.png", i, (unsigned)b);
    struct task_row row = {.prompt = prompt, .negative = "", .model = "klein-4b", .file = file, .name = "", .row = i,
                           .width = 512, .height = 512, .steps = groups > 1 ? 1 + i % 1000 : 4,
                           .guidance = groups > 1000 ? 1 + i / 1000 % (groups / 1000) : 1, .seed = b};
    memcpy(row.content_key, &a, 8);
    memcpy(row.content_key + 8, &b, 8);
    return row;
}

static void submit(const char *campaign, int count, int groups, const char *name, double limit)
{
    struct task_store *s = NULL;
    struct campaign c = {0};
    struct task_submitted submitted;
    struct pg_error why;
    char out_dir[160];
    snprintf(out_dir, sizeof out_dir, "/bench/%s", campaign);
    struct campaign_spec spec = {.name = campaign, .out_dir = out_dir, .format = "png"};
    char prompt[128], file[64];
    if (!task_store_open(&s, uri, &why) || !task_store_campaign(s, &spec, &c, &why))
        stop("submit", why.text);
    double start_s = now_s();
    if (!task_store_submit_begin(s, c.id, &why))
        stop("submit", why.text);
    for (int i = 0; i < count; i++) {
        struct task_row row = row_of(i, groups, prompt, file);
        if (!task_store_submit_row(s, &row, &why))
            stop("submit", why.text);
    }
    if (!task_store_submit_end(s, &submitted, &why))
        stop("submit", why.text);
    if (name)
        report(name, count / (now_s() - start_s), "rows/s", limit);
    task_store_campaign_done(&c);
    task_store_close(s);
}

/* --- turns ---------------------------------------------------------------------------------------------------- */

static void await(struct task_turn *t, enum task_turn_state wanted)
{
    for (enum task_turn_state now; (now = task_turn_poll(t)) != wanted;) {
        if (now == TASK_TURN_REFUSED)
            stop("turn", task_turn_why(t));
        struct pollfd fd = {.fd = task_turn_fd(t), .events = task_turn_wants_write(t) ? POLLIN | POLLOUT : POLLIN};
        poll(&fd, 1, fd.fd < 0 ? 10 : 1000);
    }
}

static const struct task_turn_result *turn(struct task_turn *t, const struct task_turn_request *q)
{
    task_turn_start(t, q);
    await(t, TASK_TURN_READY);
    return task_turn_result(t);
}

static struct task_finish finish_of(const struct task_claimed *c)
{
    return (struct task_finish){.task = c->task, .token = c->token, .worker = "bench", .sha256 = sha256,
                                .digest = "0123456789abcdef", .bytes = 400000, .seed = c->seed, .width = 512,
                                .height = 512, .steps = 4, .guidance = 1, .render_s = 0.5};
}

/* first_group is the one group of the campaign that is benched: the offer names it. */
static int64_t first_group(struct task_turn *t, const char *campaign)
{
    int64_t id = 0;
    const struct task_turn_result *r = turn(t, &(struct task_turn_request){.offer = true});
    for (int i = 0; i < r->offer_count; i++)
        if (strcmp(r->offer[i].campaign, campaign) == 0)
            id = r->offer[i].id;
    task_turn_finish(t);
    if (id == 0)
        stop("offer", "the group is not in it");
    return id;
}

static void bench_turns(struct task_turn *t, int64_t group)
{
    struct task_finish finishes[BATCH];
    int finish_count = 0, done = 0;
    double start_s = now_s();
    while (done < task_count) {
        struct task_want want = {group, "bench", BATCH, 60000};
        struct task_turn_request q = {.finishes = finishes, .finish_count = finish_count, .wants = &want, .want_count = 1};
        const struct task_turn_result *r = turn(t, &q);
        for (int i = 0; i < finish_count; i++)
            done += r->finish_committed[i];
        finish_count = r->claimed_count;
        for (int i = 0; i < finish_count; i++)
            finishes[i] = finish_of(&r->claimed[i]);
        task_turn_finish(t);
        if (finish_count == 0)
            stop("turns", "no tasks left: --rows must exceed --tasks");
    }
    report("queue_turns", done / (now_s() - start_s), "tasks/s", 8000);
    struct task_turn_request rest = {.finishes = finishes, .finish_count = finish_count};
    turn(t, &rest);
    task_turn_finish(t);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void sleep_until(double at_s)
{
    double left = at_s - now_s();
    if (left > 0)
        nanosleep(&(struct timespec){(time_t)left, (long)(1e9 * (left - floor(left)))}, NULL);
}

static void bench_latency(struct task_turn *t, int64_t group, const char *suffix, double factor)
{
    int count = second_count * RATE;
    double *ms = calloc((size_t)count, sizeof *ms), start_s = now_s();
    char name[64];
    if (!ms)
        stop("latency", "out of memory");
    for (int i = 0; i < count; i++) {
        sleep_until(start_s + (double)i / RATE);
        double from_s = now_s();
        struct task_want want = {group, "bench", 1, 60000};
        const struct task_turn_result *r = turn(t, &(struct task_turn_request){.wants = &want, .want_count = 1});
        if (r->claimed_count != 1)
            stop("latency", "no task left");
        struct task_finish f = finish_of(&r->claimed[0]);
        task_turn_finish(t);
        if (!turn(t, &(struct task_turn_request){.finishes = &f, .finish_count = 1})->finish_committed[0])
            stop("latency", "a finish is stale");
        task_turn_finish(t);
        ms[i] = 1000 * (now_s() - from_s);
    }
    qsort(ms, (size_t)count, sizeof *ms, by_value);
    snprintf(name, sizeof name, "claim_to_commit_p50%s", suffix);
    report(name, ms[count / 2], "ms", 2 * factor);
    snprintf(name, sizeof name, "claim_to_commit_p99%s", suffix);
    report(name, ms[count * 99 / 100], "ms", 20 * factor);
    free(ms);
}

static void bench_offer(struct task_turn *t)
{
    double ms[20];
    for (int i = 0; i < 20; i++) {
        double from_s = now_s();
        turn(t, &(struct task_turn_request){.offer = true});
        task_turn_finish(t);
        ms[i] = 1000 * (now_s() - from_s);
    }
    qsort(ms, 20, sizeof *ms, by_value);
    report("offer_p50", ms[10], "ms", 100);
}

/* pin opens a transaction that sees the database as it is now, and keeps it open. */
static struct pg *pin(void)
{
    struct pg *pg = NULL;
    struct pg_error why;
    if (!pg_open(&pg, uri, 600000, &why) ||
        !pg_script(pg, "set idle_in_transaction_session_timeout = 0; begin isolation level repeatable read;"
                       " select count(*) from campaign", &why))
        stop("pin", why.text);
    return pg;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"database", required_argument, NULL, 'd'}, {"rows", required_argument, NULL, 'r'},
                                            {"tasks", required_argument, NULL, 't'}, {"seconds", required_argument, NULL, 's'},
                                            {"pinned", no_argument, NULL, 'p'}, {NULL, 0, NULL, 0}};
    bool pinned = false;
    struct pg_error why;
    int from, to;
    for (int o; (o = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (o) {
        case 'd': uri = optarg; break;
        case 'r': row_count = atoi(optarg); break;
        case 't': task_count = atoi(optarg); break;
        case 's': second_count = atoi(optarg); break;
        case 'p': pinned = true; break;
        default: return 2;
        }
    }
    if (!migrate_run(uri, &from, &to, &why))
        stop("migrate", why.text);
    submit("bench", row_count, 1, "submit_rows", 100000);
    submit("bench", row_count, 1, "submit_again_rows", 100000);
    struct task_turn *t = NULL;
    if (!task_turn_open(&t, uri, &why))
        stop("turn", why.text);
    await(t, TASK_TURN_IDLE);
    int64_t group = first_group(t, "bench");
    bench_turns(t, group);
    bench_latency(t, group, "", 1);
    submit("bench-groups", 5 * GROUPS, GROUPS, NULL, 0);
    bench_offer(t);
    if (pinned) {
        struct pg *held = pin();
        bench_turns(t, group);
        bench_latency(t, group, "_pinned", 2);
        pg_close(held);
    }
    task_turn_close(t);
    return 0;
}
