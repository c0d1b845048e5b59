/* bench_farm.c - what the farm itself costs: JSON lines {"name","value","unit","limit","ratio"}.
 *
 *   bench_farm --database URI --bin DIR [--tasks N] [--workers N] [--credit N] [--seconds S]
 *
 * A real kiln-coordinator on a real PostgreSQL; the workers speak the protocol and render nothing: they answer each
 * ASSIGN with its RESULT at once. Each is a thread with a link of its own in this process.
 *
 * farm_tasks             N tasks are ready; from the first ASSIGN to the last committed ACK
 * farm_claim_to_commit   100 tasks/s are submitted, one a transaction; from the begin of the turn that claims to the end of
 *                        the one that commits, as the coordinator's histogram has it, linear within a bucket
 * farm_assign_to_ack     the same tasks from ASSIGN to ACK, as the worker sees it: without the turn that claims
 * farm_submit_to_ack     the same tasks from the submit's commit to the ACK: also the wake-up
 *
 * The first is what the farm adds to a rendered image; the others are exact and bound it from below and above. The submits
 * run beside it on the same cores. The database must be empty and durable, or the figures mean nothing.
 * Limits: 20,000 tasks/s, 2 ms (p50) and 20 ms (p99). */
#include <arpa/inet.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "link.h"
#include "migrate.h"
#include "task_store.h"

extern char **environ;

enum { BATCH = 64, RATE = 100, WORKERS_MAX = 16, PATIENCE_S = 60, HEARTBEAT_S = 1 };

static const char sha256[] = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
static const char *uri, *bin;
static int task_count = 100000, worker_count = 3, credit = 256, second_count = 10;
static char dir[] = "/tmp/kiln-bench-farm-XXXXXX"; /* state file, socket, log */
static char endpoint[256];
static pid_t coordinator_pid;
static int metrics_port;

/* One run: what its tasks' times are, by the number in their prompt. */
static struct {
    int count;
    double *submitted_s, *assigned_s, *acked_s; /* each written by one thread, read once `left` is 0 */
    atomic_int left; /* not yet acknowledged */
} run;
static atomic_bool is_over;

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void sleep_until(double at_s)
{
    double left = at_s - now_s();
    if (left > 0)
        nanosleep(&(struct timespec){(time_t)left, (long)(1e9 * (left - floor(left)))}, NULL);
}

static void tidy(void)
{
    char command[64];
    if (coordinator_pid > 0) {
        kill(coordinator_pid, SIGKILL);
        waitpid(coordinator_pid, NULL, 0);
        coordinator_pid = 0;
    }
    snprintf(command, sizeof command, "rm -rf %s", dir);
    if (system(command) != 0)
        fprintf(stderr, "bench_farm: %s is left behind\n", dir);
}

static void stop(const char *what, const char *text)
{
    char command[96];
    fprintf(stderr, "bench_farm: %s: %s\n", what, text);
    snprintf(command, sizeof command, "tail -n 20 %s/coordinator.log >&2", dir);
    if (system(command) != 0)
        fprintf(stderr, "bench_farm: no log\n");
    tidy();
    _exit(1); /* threads may still be at work */
}

static void report(const char *name, double value, const char *unit, double limit)
{
    printf("{\"name\":\"%s\",\"value\":%.4g,\"unit\":\"%s\",\"limit\":%g,\"ratio\":%.3g}\n", name, value, unit, limit,
           value / limit);
    fflush(stdout);
}

/* --- the coordinator ------------------------------------------------------------------------------------------ */

static bool read_state_file(const char *path)
{
    json_t *state = json_load_file(path, 0, NULL);
    const char *text = json_string_value(json_object_get(state, "endpoint"));
    if (text)
        snprintf(endpoint, sizeof endpoint, "%s", text);
    metrics_port = (int)json_integer_value(json_object_get(state, "metrics_port"));
    json_decref(state);
    return text;
}

static void start_coordinator(void)
{
    char program[4096], state_path[64], log_path[64], bind[64];
    snprintf(program, sizeof program, "%s/kiln-coordinator", bin);
    snprintf(state_path, sizeof state_path, "%s/coordinator.json", dir);
    snprintf(log_path, sizeof log_path, "%s/coordinator.log", dir);
    snprintf(bind, sizeof bind, "ipc://%s/socket", dir);
    const char *argv[] = {program, "--bind", bind, "--database", uri, "--state-file", state_path, "--metrics-port", "0", NULL};
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, log_path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (posix_spawn(&coordinator_pid, program, &actions, NULL, (char **)(uintptr_t)argv, environ) != 0)
        stop(program, "cannot be started");
    posix_spawn_file_actions_destroy(&actions);
    for (double until_s = now_s() + PATIENCE_S; !read_state_file(state_path); sleep_until(now_s() + 0.02)) {
        if (waitpid(coordinator_pid, NULL, WNOHANG) != 0) {
            coordinator_pid = 0;
            stop(program, "ended at once");
        }
        if (now_s() > until_s)
            stop(program, "writes no state file");
    }
}

/* The coordinator's histogram: how many tasks took at most le_s. */
enum { BUCKETS_MAX = 32 };
struct histogram { int count; double le_s[BUCKETS_MAX], tasks[BUCKETS_MAX]; };

static void read_page(char *ret, size_t bytes)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)metrics_port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    size_t n = 0;
    if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof to) != 0 ||
        dprintf(fd, "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n") < 0)
        stop("metrics page", "cannot be had");
    for (ssize_t got; n + 1 < bytes && (got = read(fd, ret + n, bytes - 1 - n)) > 0;)
        n += (size_t)got;
    ret[n] = 0;
    close(fd);
}

static struct histogram read_histogram(void)
{
    static const char name[] = "\nkiln_coordinator_claim_to_commit_seconds_bucket{le=\"";
    static char page[1 << 18];
    struct histogram h = {0};
    read_page(page, sizeof page);
    for (char *line = page; h.count < BUCKETS_MAX && (line = strstr(line, name)); h.count++) {
        line += strlen(name);
        char *end;
        h.le_s[h.count] = strtod(line, &end); /* "+Inf" too */
        h.tasks[h.count] = strtod(end + strlen("\"} "), NULL);
    }
    if (h.count == 0)
        stop("metrics page", "has no claim_to_commit");
    return h;
}

/* The q-quantile of what came between the two readings. */
static double quantile_s(const struct histogram *before, const struct histogram *after, double q)
{
    int last = after->count - 1;
    double wanted = q * (after->tasks[last] - before->tasks[last]), below = 0;
    for (int i = 0; i < last; i++) {
        double here = after->tasks[i] - before->tasks[i];
        double from_s = i ? after->le_s[i - 1] : 0;
        if (here >= wanted && here > below)
            return from_s + (after->le_s[i] - from_s) * (wanted - below) / (here - below);
        below = here;
    }
    return after->le_s[last];
}

/* --- submitting ----------------------------------------------------------------------------------------------- */

static struct task_store *open_store(void)
{
    struct task_store *s = NULL;
    struct pg_error why;
    if (!task_store_open(&s, uri, &why))
        stop("database", why.text);
    return s;
}

static int64_t make_campaign(struct task_store *s, const char *name)
{
    struct campaign c = {0};
    struct pg_error why;
    char out_dir[300];
    snprintf(out_dir, sizeof out_dir, "%s/images-%s", dir, name);
    struct campaign_spec spec = {.name = name, .out_dir = out_dir, .format = "png"};
    if (!task_store_campaign(s, &spec, &c, &why))
        stop("campaign", why.text);
    int64_t id = c.id;
    task_store_campaign_done(&c);
    return id;
}

/* submit gives tasks [from, to) to the database, in one submit. */
static void submit(struct task_store *s, int64_t campaign, int from, int to)
{
    struct pg_error why;
    struct task_submitted done;
    char prompt[128], file[64];
    if (!task_store_submit_begin(s, campaign, &why))
        stop("submit", why.text);
    for (int i = from; i < to; i++) {
        uint64_t a = (uint64_t)(i + 1) * 0x9e3779b97f4a7c15u;
        a ^= a >> 31;
        uint64_t b = a * 0xbf58476d1ce4e5b9u;
        snprintf(prompt, sizeof prompt, "%d travellers in a market at dusk, 35 mm, soft light, grain, a long way from home", i);
        snprintf(file, sizeof file, "%06d-%08x.png", i, (unsigned)b);
        struct task_row row = {.prompt = prompt, .negative = "", .model = "bench", .file = file, .name = "", .row = i, .width = 512,
                               .height = 512, .steps = 4, .guidance = 1, .seed = b};
        memcpy(row.content_key, &a, 8);
        memcpy(row.content_key + 8, &b, 8);
        if (!task_store_submit_row(s, &row, &why))
            stop("submit", why.text);
    }
    if (!task_store_submit_end(s, &done, &why))
        stop("submit", why.text);
    if (done.added != to - from)
        stop("submit", "some tasks were already there; the database must be empty");
}

/* --- a worker that renders nothing ------------------------------------------------------------------------------ */

/* What a worker holds: claims go in the order of ids, so a slot is free again long before its turn comes round. */
enum { SLOTS = 1 << 14 };
struct slot { uint64_t task; int index; }; /* task 0: free; index: the task's number in this run */

struct idler {
    char name[16];
    int number;
    struct link *link;
    int held; /* assigned and not acknowledged */
    struct slot slots[SLOTS];
};

static void say(struct idler *w, const struct msg *m)
{
    for (double until_s = now_s() + PATIENCE_S;;) {
        enum link_sent sent = link_send(w->link, NULL, m);
        if (sent == LINK_SENT)
            return;
        if (sent != LINK_FULL || now_s() > until_s)
            stop(w->name, "cannot send");
        sleep_until(now_s() + 0.001);
    }
}

static void say_hello(struct idler *w)
{
    struct msg m = {.kind = MSG_HELLO,
                    .hello = {.protocol_min = MSG_VERSION, .protocol_max = MSG_VERSION, .software = "bench_farm", .worker = w->name,
                              .boot_epoch = (uint64_t)getpid() * WORKERS_MAX + (uint64_t)w->number + 1, .device = "none",
                              .precision = "bf16", .host = "localhost", .pid = (uint32_t)getpid(), .model_count = 1,
                              .models = {{"bench", sha256, "flux2-klein", "Apache-2.0", true}}}};
    say(w, &m);
}

static void say_ready(struct idler *w)
{
    struct msg m = {.kind = MSG_READY, .ready = {.credit = (uint32_t)credit, .batch_max = BATCH}};
    say(w, &m);
}

static void say_heartbeat(struct idler *w)
{
    struct msg m = {.kind = MSG_HEARTBEAT, .heartbeat = {.held = (uint32_t)w->held, .state = w->held ? "rendering" : "idle"}};
    say(w, &m);
}

static void answer_assign(struct idler *w, const struct msg_assign *a)
{
    double at_s = now_s();
    struct msg_result_item items[MSG_ITEMS_MAX];
    for (uint32_t i = 0; i < a->count; i++) {
        const struct msg_task *t = &a->tasks[i];
        struct slot *slot = &w->slots[t->task % SLOTS];
        if (slot->task)
            stop(w->name, "holds a task for too long, or was given it twice");
        *slot = (struct slot){t->task, atoi(t->prompt)};
        run.assigned_s[slot->index] = at_s;
        items[i] = (struct msg_result_item){.task = t->task, .token = t->token, .sha256 = sha256, .bytes = 400000, .width = a->width,
                                            .height = a->height, .steps = a->steps, .guidance = a->guidance, .seed = t->seed,
                                            .file = t->file, .digest = sha256, .render_s = 0.001};
    }
    w->held += (int)a->count;
    struct msg m = {.kind = MSG_RESULT, .result = {a->count, items}};
    say(w, &m);
}

static void hear_ack(struct idler *w, const struct msg_ack *a)
{
    double at_s = now_s();
    for (uint32_t i = 0; i < a->count; i++) {
        struct slot *slot = &w->slots[a->items[i].task % SLOTS];
        if (slot->task != a->items[i].task || a->items[i].verdict != MSG_COMMITTED)
            stop(w->name, "an answer is stale, or of a task it does not hold");
        run.acked_s[slot->index] = at_s;
        slot->task = 0;
    }
    w->held -= (int)a->count;
    atomic_fetch_sub(&run.left, (int)a->count);
}

static void hear(struct idler *w)
{
    char why[256];
    struct msg m;
    enum link_got got;
    while ((got = link_receive(w->link, &m, NULL, why, sizeof why)) == LINK_MESSAGE) {
        switch (m.kind) {
        case MSG_WELCOME: say_ready(w); break;
        case MSG_ASSIGN: answer_assign(w, &m.assign); break;
        case MSG_ACK: hear_ack(w, &m.ack); break;
        case MSG_REFUSED: stop(w->name, m.refused.reason); break;
        case MSG_HEARTBEAT: break;
        default: stop(w->name, msg_kind_name(m.kind));
        }
        msg_done(&m);
    }
    if (got != LINK_EMPTY)
        stop(w->name, why);
}

static void *idle(void *context)
{
    struct idler *w = context;
    char identity[64], why[256];
    snprintf(identity, sizeof identity, "%s/%d", w->name, (int)getpid());
    if (!link_connect(&w->link, endpoint, identity, why, sizeof why))
        stop(w->name, why);
    say_hello(w);
    for (double beat_s = now_s() + HEARTBEAT_S; !atomic_load(&is_over);) {
        link_wait(w->link, NULL, 0, 100);
        hear(w);
        if (now_s() >= beat_s) {
            say_heartbeat(w);
            beat_s = now_s() + HEARTBEAT_S;
        }
    }
    say(w, &(struct msg){.kind = MSG_BYE, .bye = {"the benchmark is over"}});
    link_close(&w->link, 1000);
    return NULL;
}

/* --- the runs ---------------------------------------------------------------------------------------------------- */

static void begin_run(int count)
{
    run.count = count;
    run.submitted_s = calloc((size_t)count, sizeof(double));
    run.assigned_s = calloc((size_t)count, sizeof(double));
    run.acked_s = calloc((size_t)count, sizeof(double));
    if (!run.submitted_s || !run.assigned_s || !run.acked_s)
        stop("run", "out of memory");
    atomic_store(&run.left, count);
}

static void await_run(void)
{
    int last = run.count;
    for (double until_s = now_s() + PATIENCE_S; atomic_load(&run.left) > 0; sleep_until(now_s() + 0.005)) {
        if (atomic_load(&run.left) < last) {
            last = atomic_load(&run.left);
            until_s = now_s() + PATIENCE_S;
        }
        if (now_s() > until_s)
            stop("run", "no task was committed for a minute");
    }
}

static void end_run(void)
{
    free(run.submitted_s);
    free(run.assigned_s);
    free(run.acked_s);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void report_times(const char *name, const double *from_s)
{
    char full[64];
    double *ms = calloc((size_t)run.count, sizeof *ms);
    if (!ms)
        stop(name, "out of memory");
    for (int i = 0; i < run.count; i++)
        ms[i] = 1000 * (run.acked_s[i] - from_s[i]);
    qsort(ms, (size_t)run.count, sizeof *ms, by_value);
    snprintf(full, sizeof full, "%s_p50", name);
    report(full, ms[run.count / 2], "ms", 2);
    snprintf(full, sizeof full, "%s_p99", name);
    report(full, ms[run.count * 99 / 100], "ms", 20);
    free(ms);
}

static void bench_rate(struct idler *workers, pthread_t *threads, struct task_store *s)
{
    begin_run(task_count);
    submit(s, make_campaign(s, "bench-farm-rate"), 0, task_count);
    for (int i = 0; i < worker_count; i++) {
        snprintf(workers[i].name, sizeof workers[i].name, "idle-%d", i + 1);
        workers[i].number = i;
        if (pthread_create(&threads[i], NULL, idle, &workers[i]) != 0)
            stop("workers", "no thread to be had");
    }
    await_run();
    double first_s = INFINITY, last_s = 0;
    for (int i = 0; i < run.count; i++) {
        first_s = fmin(first_s, run.assigned_s[i]);
        last_s = fmax(last_s, run.acked_s[i]);
    }
    report("farm_tasks", run.count / (last_s - first_s), "tasks/s", 20000);
    end_run();
}

static void bench_latency(struct task_store *s)
{
    int64_t campaign = make_campaign(s, "bench-farm-latency");
    struct histogram before = read_histogram();
    begin_run(second_count * RATE);
    double start_s = now_s();
    for (int i = 0; i < run.count; i++) {
        sleep_until(start_s + (double)i / RATE);
        submit(s, campaign, i, i + 1);
        run.submitted_s[i] = now_s();
    }
    await_run();
    struct histogram after = read_histogram();
    report("farm_claim_to_commit_p50", 1000 * quantile_s(&before, &after, 0.5), "ms", 2);
    report("farm_claim_to_commit_p99", 1000 * quantile_s(&before, &after, 0.99), "ms", 20);
    report_times("farm_assign_to_ack", run.assigned_s);
    report_times("farm_submit_to_ack", run.submitted_s);
    end_run();
}

static const char usage_text[] =
    "usage: bench_farm --database URI --bin DIR [options]\n"
    "\n"
    "What the farm itself costs, as JSON lines: a real coordinator, workers that render nothing.\n"
    "\n"
    "  --database URI    empty and durable, or the figures mean nothing\n"
    "  --bin DIR         where kiln-coordinator is\n"
    "  --tasks N         for the rate; default 100000\n"
    "  --workers N       default 3\n"
    "  --credit N        tasks that a worker holds at once; default 256\n"
    "  --seconds S       of 100 tasks each, for the latencies; default 10\n"
    "  --help\n";

static int number(const char *option, const char *text, int least, int most)
{
    char *end;
    long value = strtol(text, &end, 10);
    if (!*text || *end || value < least || value > most) {
        fprintf(stderr, "bench_farm: --%s '%s': accepted are %d to %d\n", option, text, least, most);
        exit(2);
    }
    return (int)value;
}

static void read_words(int argc, char **argv)
{
    static const struct option options[] = {{"database", required_argument, NULL, 'd'}, {"bin", required_argument, NULL, 'b'},
                                            {"tasks", required_argument, NULL, 't'}, {"workers", required_argument, NULL, 'w'},
                                            {"credit", required_argument, NULL, 'c'}, {"seconds", required_argument, NULL, 's'},
                                            {"help", no_argument, NULL, 'h'},
                                            {NULL, 0, NULL, 0}};
    for (int o; (o = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (o) {
        case 'd': uri = optarg; break;
        case 'b': bin = optarg; break;
        case 't': task_count = number("tasks", optarg, 1, 10000000); break;
        case 'w': worker_count = number("workers", optarg, 1, WORKERS_MAX); break;
        case 'c': credit = number("credit", optarg, 1, MSG_ITEMS_MAX); break;
        case 's': second_count = number("seconds", optarg, 1, 3600); break;
        case 'h': fputs(usage_text, stdout); exit(0);
        default: exit(2);
        }
    }
    if (!uri || !bin) {
        fputs(usage_text, stderr);
        exit(2);
    }
}

int main(int argc, char **argv)
{
    struct pg_error why;
    int from, to;
    pthread_t threads[WORKERS_MAX];
    read_words(argc, argv);
    struct idler *workers = calloc((size_t)worker_count, sizeof *workers);
    if (!workers || !mkdtemp(dir))
        stop("start", "no memory, or no folder in /tmp");
    if (!migrate_run(uri, &from, &to, &why))
        stop("migrate", why.text);
    struct task_store *s = open_store();
    start_coordinator();
    bench_rate(workers, threads, s);
    bench_latency(s);
    atomic_store(&is_over, true);
    for (int i = 0; i < worker_count; i++)
        pthread_join(threads[i], NULL);
    task_store_close(s);
    free(workers);
    tidy();
    return 0;
}
