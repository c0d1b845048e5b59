/* up.c - the supervisor: starts in order, looks after what it started, stops in the opposite order.
 *
 *   lock run/kiln.pid · leftovers end · PostgreSQL · schema · coordinator · workers · ready
 *   ... a child that dies is started again with backoff; one that was refused for good (code 2) is not ...
 *   workers drain · coordinator · PostgreSQL · run/kiln.pid is removed
 *
 * Until everything is ready, a child that dies ends the start with its own last sentence. --detach is the same process
 * without a terminal: the caller waits on a pipe for its exit code. From the beginning stderr is log/kiln.log;
 * what people should read goes to the terminal's descriptors, kept aside. */
#include "up.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "clock.h"
#include "leftover.h"
#include "lifecycle.h"
#include "log.h"
#include "migrate.h"
#include "progress.h"
#include "task_store.h"
#include "up_child.h"
#include "up_plan.h"
#include "up_postgres.h"

#define TURN_MS 100
#define HEARD_EVERY_MS 300    /* how often the database is asked for new workers */
#define LOCK_TRIES 25         /* half a second */
#define LEFTOVER_PATIENCE_S 30
#define POSTGRES_STARTS 5     /* after a crash, old processes may hold its memory for a moment */
#define TOLD_AGAIN_MS 20000   /* a program that was told to leave at once */
#define COORDINATOR_MS 20000
#define POSTGRES_MS 120000    /* its last checkpoint */

struct up {
    struct command_call *call;
    struct up_plan *plan;
    const struct home *home;
    FILE *out, *err;           /* the terminal; NULL once detached */
    int code_fd;               /* --detach: who waits for the exit code; -1 */
    struct progress bar;
    bool has_bar;
    struct up_postgres server;
    struct up_child postgres, coordinator;
    struct up_child *workers;
    int worker_count;          /* initialised */
    struct { uint64_t epoch; bool is_heard; } *seen; /* per worker: boot epoch before this start */
    char state_file[HOME_PATH_MAX];
    int metrics_port;          /* 0: the coordinator is not ready yet */
    bool has_database;         /* it answered and has our tables */
};

/* --- saying -------------------------------------------------------------------------------------------------- */

/* A sentence for people, and for the log. */
static void say(struct up *u, enum log_level level, const char *event, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
static void say(struct up *u, enum log_level level, const char *event, const char *format, ...)
{
    char text[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    log_event(level, event, "what=%s", log_quote(text));
    if (!u->err)
        return;
    if (u->has_bar)
        progress_clear(&u->bar);
    fprintf(u->err, "kiln up: %s\n", text);
    fflush(u->err);
}

static int refuse(struct up *u, int code, const char *text)
{
    say(u, LOG_ERROR, "not_started", "%s", text);
    return code;
}

static int ready_count(const struct up *u)
{
    int count = u->has_database + (u->metrics_port > 0);
    for (int i = 0; i < u->worker_count; i++)
        count += u->seen[i].is_heard;
    return count;
}

/* What is waited for: a line that stays in place on a terminal. */
static void show(struct up *u, const char *note)
{
    struct progress_now now = PROGRESS_UNKNOWN;
    if (!u->err || !u->has_bar)
        return;
    now.done = ready_count(u);
    now.total = 2 + u->plan->config.workers; /* database, coordinator */
    now.per_second = 0;
    now.left_s = -1;
    now.note = note;
    progress_update(&u->bar, &now);
}

static void show_leftover(void *context, const char *sentence)
{
    struct up *u = context;
    say(u, LOG_INFO, "leftover", "%s", sentence);
}

/* --- turns ----------------------------------------------------------------------------------------------------- */

/* Waits for a signal or the next turn; false when it is time to stop. */
static bool turn(void)
{
    return lifecycle_stop_count() == 0 && lifecycle_wait(TURN_MS) == 0;
}

static void note_start(struct up_child *c)
{
    log_event(LOG_INFO, "started", "name=%s pid=%ld start=%d", c->name, (long)c->process.pid, c->process.starts);
}

/* One step of a child; true when it died in it. */
static bool step(struct up_child *c)
{
    enum up_child_news news = up_child_step(c);
    if (news == UP_CHILD_STARTED)
        note_start(c);
    return news == UP_CHILD_DIED;
}

/* "worker-1 ended with code 2: the model ..." */
static void describe_death(const struct up_child *c, char *ret, size_t bytes)
{
    char death[HOME_PATH_MAX + 64], words[2048];
    up_child_death(c, death, sizeof death);
    up_child_last_words(c, words, sizeof words);
    snprintf(ret, bytes, "%s %s%s%s (%s)", c->name, death, *words ? ": " : "", words, c->log);
}

static int refuse_death(struct up *u, const struct up_child *c)
{
    char text[HOME_PATH_MAX + 4096];
    describe_death(c, text, sizeof text);
    return refuse(u, COMMAND_REFUSED, text);
}

/* --- PostgreSQL ------------------------------------------------------------------------------------------------- */

static int start_postgres(struct up *u)
{
    char why[HOME_PATH_MAX + 1024];
    struct pg_error fault;
    show(u, "making the database's folder");
    if (!up_postgres_prepare(&u->server, u->home, why, sizeof why))
        return lifecycle_stop_count() ? lifecycle_stop_code() : refuse(u, COMMAND_REFUSED, why);
    up_postgres_command(&u->server, u->home, &u->postgres);
    up_child_start(&u->postgres);
    for (;;) {
        if (step(&u->postgres) && (u->postgres.process.starts == POSTGRES_STARTS || up_child_is_refused(&u->postgres)))
            return refuse_death(u, &u->postgres);
        show(u, "waiting for PostgreSQL");
        if (up_child_is_running(&u->postgres) && up_postgres_ready(u->home, &fault))
            return COMMAND_DONE;
        if (!turn())
            return lifecycle_stop_code();
    }
}

static int migrate(struct up *u)
{
    struct pg_error fault;
    char text[1280];
    int from, to;
    const char *uri = u->plan->config.database;
    show(u, "preparing the database's tables");
    if (migrate_run(*uri ? uri : NULL, &from, &to, &fault)) {
        log_event(LOG_INFO, "schema", "from=%d to=%d", from, to);
        u->has_database = true;
        return COMMAND_DONE;
    }
    snprintf(text, sizeof text, "database: %.*s", (int)strcspn(fault.text, "\n"), fault.text);
    return refuse(u, fault.fault == PG_REFUSED ? COMMAND_REFUSED : COMMAND_AWAY, text);
}

/* --- the coordinator ------------------------------------------------------------------------------------------- */

static void command_coordinator(struct up *u)
{
    struct up_child *c = &u->coordinator;
    const struct up_plan *p = u->plan;
    up_child_init(c, u->home, "coordinator", SIGTERM);
    up_child_arg(c, "%s", p->coordinator);
    up_child_arg(c, "--bind");
    up_child_arg(c, "%s", p->config.endpoint);
    up_child_arg(c, "--state-file");
    up_child_arg(c, "%s", u->state_file);
    up_child_arg(c, "--metrics-port");
    up_child_arg(c, "%d", (int)p->metrics_port);
    up_child_arg(c, "--log-level");
    up_child_arg(c, "%s", p->log_level);
    if (*p->config.database) {
        up_child_arg(c, "--database");
        up_child_arg(c, "%s", p->config.database);
    }
}

/* The endpoint and port as really bound; true when the file is there. */
static bool read_state(struct up *u)
{
    json_t *root = json_load_file(u->state_file, 0, NULL);
    const char *endpoint = json_string_value(json_object_get(root, "endpoint"));
    json_int_t port = json_integer_value(json_object_get(root, "metrics_port"));
    bool ok = endpoint && strlen(endpoint) < sizeof u->plan->config.endpoint && port > 0 && port < 65536;
    if (ok) {
        memcpy(u->plan->config.endpoint, endpoint, strlen(endpoint) + 1);
        u->metrics_port = (int)port;
    }
    json_decref(root);
    return ok;
}

static int start_coordinator(struct up *u)
{
    char why[HOME_PATH_MAX + 256];
    unlink(u->state_file);
    command_coordinator(u);
    up_child_start(&u->coordinator);
    for (;;) {
        if (step(&u->coordinator))
            return refuse_death(u, &u->coordinator);
        step(&u->postgres);
        if (read_state(u))
            break;
        show(u, "waiting for the coordinator");
        if (!turn())
            return lifecycle_stop_code();
    }
    /* Started again it must be where it was: workers know no other place. */
    up_child_change(&u->coordinator, "--bind", "%s", u->plan->config.endpoint);
    up_child_change(&u->coordinator, "--metrics-port", "%d", u->metrics_port);
    if (!home_config_write(u->home, &u->plan->config, why, sizeof why))
        return refuse(u, COMMAND_REFUSED, why);
    return COMMAND_DONE;
}

/* --- workers ------------------------------------------------------------------------------------------------------- */

static void command_worker(struct up *u, int index)
{
    struct up_child *c = &u->workers[index];
    const struct home_config *o = &u->plan->config;
    char name[32];
    snprintf(name, sizeof name, "worker-%d", index + 1);
    up_child_init(c, u->home, name, SIGTERM);
    up_child_arg(c, "%s", u->plan->worker);
    up_child_arg(c, "--connect");
    up_child_arg(c, "%s", o->endpoint);
    up_child_arg(c, "--name");
    up_child_arg(c, "%s%s", u->plan->names_tag, name);
    up_child_arg(c, "--device");
    up_child_arg(c, "%s", u->plan->devices[index % u->plan->device_count]);
    up_child_arg(c, "--placement");
    up_child_arg(c, "%s", u->plan->placement);
    up_child_arg(c, "--threads");
    up_child_arg(c, "%d", o->threads);
    up_child_arg(c, "--precision");
    up_child_arg(c, "%s", o->precision);
    up_child_arg(c, "--spool");
    up_child_arg(c, "%s/spool", u->home->dir);
    up_child_arg(c, "--log-level");
    up_child_arg(c, "%s", u->plan->log_level);
    if (o->batch) {
        up_child_arg(c, "--batch");
        up_child_arg(c, "%d", o->batch);
    }
    up_child_models(c, o);
}

/* The worker this row of the database is about, or -1. */
static int worker_index(const struct up *u, const char *name)
{
    char expected[256];
    for (int i = 0; i < u->worker_count; i++) {
        snprintf(expected, sizeof expected, "%s%s", u->plan->names_tag, u->workers[i].name);
        if (strcmp(expected, name) == 0)
            return i;
    }
    return -1;
}

static bool note_before(void *context, const struct worker_row *r)
{
    struct up *u = context;
    int index = worker_index(u, r->name);
    if (index >= 0)
        u->seen[index].epoch = r->boot_epoch;
    return true;
}

/* A worker is ready when the coordinator has written down that it welcomed this very process; before, it is greeting. */
static bool note_heard(void *context, const struct worker_row *r)
{
    struct up *u = context;
    int index = worker_index(u, r->name);
    if (index >= 0 && r->boot_epoch != u->seen[index].epoch && strcmp(r->state, "greeting") != 0)
        u->seen[index].is_heard = true;
    return true;
}

/* Asks the database; when it is away for a moment, the next turn asks again. */
static bool ask_workers(struct up *u, struct task_store **store, bool (*each)(void *, const struct worker_row *))
{
    struct pg_error fault;
    const char *uri = u->plan->config.database;
    if ((*store || task_store_open(store, *uri ? uri : NULL, &fault)) && task_store_workers(*store, each, u, &fault))
        return true;
    log_event(LOG_WARN, "database_away", "why=%s", log_quote(fault.text));
    task_store_close(*store);
    *store = NULL;
    return false;
}

static int make_workers(struct up *u, struct task_store **store)
{
    const int count = u->plan->config.workers;
    u->workers = calloc((size_t)count, sizeof *u->workers);
    u->seen = calloc((size_t)count, sizeof *u->seen);
    if (!u->workers || !u->seen)
        return refuse(u, COMMAND_AWAY, "out of memory");
    for (int i = 0; i < count; i++) {
        command_worker(u, i);
        u->worker_count++;
    }
    while (!ask_workers(u, store, note_before))
        if (!turn())
            return lifecycle_stop_code();
    for (int i = 0; i < count; i++)
        up_child_start(&u->workers[i]);
    return COMMAND_DONE;
}

static int await_workers(struct up *u, struct task_store **store)
{
    for (int64_t asked_ms = 0;;) {
        int waiting = -1;
        for (int i = 0; i < u->worker_count; i++) {
            if (step(&u->workers[i]))
                return refuse_death(u, &u->workers[i]);
            if (waiting < 0 && !u->seen[i].is_heard)
                waiting = i;
        }
        if (step(&u->coordinator))
            return refuse_death(u, &u->coordinator);
        step(&u->postgres);
        if (waiting < 0)
            return COMMAND_DONE;
        char note[64];
        snprintf(note, sizeof note, "%s loads its models", u->workers[waiting].name);
        show(u, note);
        if (!turn())
            return lifecycle_stop_code();
        if (clock_ms() - asked_ms >= HEARD_EVERY_MS && ask_workers(u, store, note_heard))
            asked_ms = clock_ms();
    }
}

static int start_workers(struct up *u)
{
    struct task_store *store = NULL;
    int code = make_workers(u, &store);
    if (code == COMMAND_DONE)
        code = await_workers(u, &store);
    task_store_close(store);
    return code;
}

/* --- starting --------------------------------------------------------------------------------------------------------- */

/* The lock must be on the file that is there: the one before may have removed its own between our open and lock, and it may
 * end between our lock and our asking. */
static bool lock(struct up *u, char *why, size_t why_bytes)
{
    char path[HOME_PATH_MAX];
    home_path(u->home, path, sizeof path, "run/kiln.pid");
    for (int i = 0; i < LOCK_TRIES; i++) {
        bool is_locked = lifecycle_pid_file(path, why, why_bytes);
        pid_t holder = lifecycle_pid_alive(path);
        if (is_locked && holder == getpid())
            return true;
        if (!is_locked && holder)
            return false;
        snprintf(why, why_bytes, "%s is locked and removed again and again by somebody", path);
        clock_sleep_ms(20);
    }
    return false;
}

static int start(struct up *u)
{
    char why[HOME_PATH_MAX + 1024];
    int count = 0, code = COMMAND_DONE;
    if (!leftover_stop(u->home, LEFTOVER_PATIENCE_S, show_leftover, u, &count, why, sizeof why))
        return lifecycle_stop_count() ? lifecycle_stop_code() : refuse(u, COMMAND_REFUSED, why);
    if (!home_config_write(u->home, &u->plan->config, why, sizeof why))
        return refuse(u, COMMAND_REFUSED, why);
    if (u->plan->is_private)
        code = start_postgres(u);
    if (code == COMMAND_DONE)
        code = migrate(u);
    if (code == COMMAND_DONE)
        code = start_coordinator(u);
    if (code == COMMAND_DONE)
        code = start_workers(u);
    return code;
}

static void report(struct up *u)
{
    const struct home_config *c = &u->plan->config;
    if (u->has_bar)
        progress_clear(&u->bar);
    u->has_bar = false;
    log_event(LOG_INFO, "ready", "endpoint=%s metrics_port=%d workers=%d", c->endpoint, u->metrics_port, c->workers);
    fprintf(u->out, "kiln is up: %d worker%s on ", c->workers, c->workers == 1 ? "" : "s");
    for (int i = 0; i < c->workers && i < u->plan->device_count; i++)
        fprintf(u->out, "%s%s", i ? ", " : "", u->plan->devices[i]);
    fprintf(u->out, ", %d thread%s each\n", c->threads, c->threads == 1 ? "" : "s");
    if (*u->plan->device_why)
        fprintf(u->out, "  device    %s\n", u->plan->device_why);
    for (int i = 0; i < c->model_count; i++)
        fprintf(u->out, "  model     %s (%s)\n", c->models[i].name, c->models[i].dir);
    fprintf(u->out, "  home      %s\n  logs      %s/log\n  database  %s\n  endpoint  %s\n  metrics   http://127.0.0.1:%d/metrics\n",
            u->home->dir, u->home->dir, u->plan->is_private ? "private PostgreSQL" : *c->database ? "as given by --database" : "named by the environment",
            c->endpoint, u->metrics_port);
    fflush(u->out);
    lifecycle_notify("READY=1");
}

/* --- looking after ------------------------------------------------------------------------------------------------------ */

static void tell_death(struct up *u, struct up_child *c, bool may_give_up)
{
    char text[HOME_PATH_MAX + 4096];
    describe_death(c, text, sizeof text);
    if (may_give_up && up_child_is_refused(c)) {
        c->process.is_wanted = false;
        say(u, LOG_ERROR, "given_up", "%s; it is not started again: correct that, then kiln down and kiln up", text);
    } else {
        say(u, LOG_WARN, "died", "%s; it is started again in %d s", text, c->process.backoff_ms / 1000);
    }
}

static void look_after(struct up *u)
{
    if (step(&u->postgres))
        tell_death(u, &u->postgres, false);
    if (step(&u->coordinator))
        tell_death(u, &u->coordinator, false);
    for (int i = 0; i < u->worker_count; i++)
        if (step(&u->workers[i]))
            tell_death(u, &u->workers[i], true);
}

/* --- stopping ------------------------------------------------------------------------------------------------------------ */

static int running_workers(const struct up *u)
{
    int count = 0;
    for (int i = 0; i < u->worker_count; i++)
        count += up_child_is_running(&u->workers[i]);
    return count;
}

static void signal_workers(struct up *u, int number)
{
    for (int i = 0; i < u->worker_count; i++)
        up_child_signal(&u->workers[i], number);
}

/* Everything but the workers goes on while they drain: they hand over what they finished. */
static void stop_workers(struct up *u)
{
    int64_t told_again_ms = 0;
    signal_workers(u, SIGTERM);
    while (running_workers(u) > 0) {
        if (!told_again_ms && lifecycle_stop_count() > 1) {
            say(u, LOG_WARN, "forced", "second signal: workers leave at once");
            signal_workers(u, SIGTERM);
            told_again_ms = clock_ms();
        } else if (told_again_ms && clock_ms() - told_again_ms > TOLD_AGAIN_MS) {
            signal_workers(u, SIGKILL);
        }
        for (int i = 0; i < u->worker_count; i++)
            up_child_step(&u->workers[i]);
        up_child_step(&u->coordinator);
        up_child_step(&u->postgres);
        lifecycle_wait(TURN_MS);
    }
}

/* Asks, asks harder, ends. */
static void stop_child(struct up_child *c, int ms, int harder)
{
    const struct { int signal, ms; } asks[] = {{c->polite_signal, ms}, {harder, TOLD_AGAIN_MS}, {SIGKILL, TOLD_AGAIN_MS}};
    for (size_t i = 0; i < sizeof asks / sizeof *asks && up_child_is_running(c); i++) {
        const int64_t until_ms = clock_ms() + asks[i].ms;
        up_child_signal(c, asks[i].signal);
        while (up_child_is_running(c) && clock_ms() < until_ms) {
            up_child_step(c);
            clock_sleep_ms(20);
        }
    }
    c->process.is_wanted = false; /* it may have been dead, and waiting to be started again */
}

static void stop(struct up *u)
{
    char path[HOME_PATH_MAX];
    lifecycle_notify("STOPPING=1");
    if (running_workers(u) > 0)
        say(u, LOG_INFO, "stopping", "stopping: workers finish their batch (a second signal does not wait)");
    stop_workers(u);
    stop_child(&u->coordinator, COORDINATOR_MS, SIGTERM);
    stop_child(&u->postgres, POSTGRES_MS, SIGQUIT);
    unlink(u->state_file);
    home_path(u->home, path, sizeof path, "run/kiln.sock"); /* libzmq leaves it */
    unlink(path);
    home_path(u->home, path, sizeof path, "run/kiln.pid");
    unlink(path);
    log_event(LOG_INFO, "stopped", "signal=%d", lifecycle_stop_signal());
    for (int i = 0; i < u->worker_count; i++)
        up_child_done(&u->workers[i]);
    up_child_done(&u->coordinator);
    up_child_done(&u->postgres);
    free(u->workers);
    free(u->seen);
}

/* --- the terminal ---------------------------------------------------------------------------------------------------------- */

/* Keeps the terminal's descriptors for people; stdin, stdout and stderr are nobody's and the log from here on. */
static bool take_terminal(struct up *u, char *why, size_t why_bytes)
{
    char path[HOME_PATH_MAX];
    home_path(u->home, path, sizeof path, "log/kiln.log");
    int null = open("/dev/null", O_RDWR | O_CLOEXEC), log = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    int out = fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 3), err = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3);
    fflush(stdout);
    if (null >= 0 && log >= 0 && out >= 0 && err >= 0 && (u->out = fdopen(out, "w")) && (u->err = fdopen(err, "w")) &&
        dup2(null, STDIN_FILENO) >= 0 && dup2(null, STDOUT_FILENO) >= 0 && dup2(log, STDERR_FILENO) >= 0) {
        close(null);
        close(log);
        progress_begin(&u->bar, u->err, "kiln up", "ready");
        u->has_bar = true;
        return log_open("kiln", NULL, u->plan->log_least, why, why_bytes);
    }
    snprintf(why, why_bytes, "%s: %s", path, strerror(errno));
    return false;
}

/* Tells the waiting caller how it went, and lets go of its terminal. */
static void let_go(struct up *u, int code)
{
    unsigned char byte = (unsigned char)code;
    if (u->code_fd < 0)
        return;
    fclose(u->out);
    fclose(u->err);
    u->out = u->err = NULL;
    ssize_t ignored = write(u->code_fd, &byte, 1); /* the caller may be gone: then nobody asks */
    (void)ignored;
    close(u->code_fd);
    u->code_fd = -1;
}

/* --- the supervisor ---------------------------------------------------------------------------------------------------------- */

static int supervise(struct up *u)
{
    char why[HOME_PATH_MAX + 256];
    if (!lock(u, why, sizeof why))
        return command_refuse(u->call, "%s", why);
    if (!take_terminal(u, why, sizeof why))
        return command_refuse(u->call, "%s", why);
    log_event(LOG_INFO, "begin", "version=%s home=%s", KILN_VERSION, log_quote(u->home->dir));
    if (*u->plan->device_why)
        log_event(LOG_INFO, "device", "choice=%s", log_quote(u->plan->device_why));
    int code = start(u);
    if (code == COMMAND_DONE) {
        report(u);
        let_go(u, COMMAND_DONE);
        while (turn())
            look_after(u);
    }
    if (u->has_bar)
        progress_clear(&u->bar);
    u->has_bar = false;
    stop(u);
    if (u->err && code == COMMAND_DONE)
        fprintf(u->err, "kiln is down\n");
    return code;
}

/* The caller's half of --detach: signals are passed on, and the supervisor stops what it has started. */
static int await_supervisor(struct command_call *call, int fd, pid_t pid)
{
    unsigned char code = 0;
    int told = 0, status = 0;
    for (;;) {
        struct pollfd fds[2] = {{.fd = fd, .events = POLLIN}, {.fd = lifecycle_fd(), .events = POLLIN}};
        poll(fds, 2, -1);
        for (int count = lifecycle_stop_count(); told < count; told++)
            kill(pid, told == 0 ? SIGTERM : SIGINT);
        if (!fds[0].revents)
            continue;
        ssize_t got = read(fd, &code, 1);
        if (got == 1)
            return code;
        if (got < 0 && errno == EINTR)
            continue;
        while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
            continue;
        if (WIFEXITED(status))
            return told ? lifecycle_stop_code() : WEXITSTATUS(status);
        return command_say(call, COMMAND_AWAY, "the supervisor was ended by signal %d; see %s/log/kiln.log", WTERMSIG(status), call->home.dir);
    }
}

static int detach(struct up *u)
{
    int fds[2];
    if (pipe2(fds, O_CLOEXEC) != 0)
        return command_say(u->call, COMMAND_AWAY, "no pipe: %s", strerror(errno));
    pid_t pid = fork();
    if (pid < 0)
        return command_say(u->call, COMMAND_AWAY, "no process: %s", strerror(errno));
    if (pid == 0) {
        setsid();
        close(fds[0]);
        u->code_fd = fds[1];
        return chdir("/") == 0 ? supervise(u) : command_say(u->call, COMMAND_AWAY, "/: %s", strerror(errno));
    }
    close(fds[1]);
    int code = await_supervisor(u->call, fds[0], pid);
    close(fds[0]);
    return code;
}

/* --- the command -------------------------------------------------------------------------------------------------------------- */

static int steps(struct up *u)
{
    char why[HOME_PATH_MAX + 1024], path[HOME_PATH_MAX];
    int code = up_plan_read(u->plan, u->call);
    if (code != COMMAND_DONE || u->call->is_help)
        return code;
    u->home = &u->call->home;
    home_path(u->home, u->state_file, sizeof u->state_file, "run/coordinator.json");
    home_path(u->home, path, sizeof path, "run/kiln.pid");
    pid_t other = lifecycle_pid_alive(path);
    if (other)
        return command_refuse(u->call, "already running with pid %ld (%s)", (long)other, path);
    if (!lifecycle_signals())
        return command_say(u->call, COMMAND_AWAY, "no signal handlers could be installed");
    u->server.user = (struct up_user){.uid = (unsigned)-1, .gid = (unsigned)-1};
    if (u->plan->is_private && !up_postgres_find(&u->server, u->home, why, sizeof why))
        return command_refuse(u->call, "%s", why);
    code = up_plan_models(u->plan, u->call);
    if (code == COMMAND_DONE)
        code = up_plan_devices(u->plan, u->call);
    if (code != COMMAND_DONE)
        return code;
    if (!home_create(u->home, u->server.user.uid, u->server.user.gid, why, sizeof why))
        return command_refuse(u->call, "%s", why);
    return u->plan->is_detached ? detach(u) : supervise(u);
}

static int up_run(struct command_call *call)
{
    struct up_plan *plan = malloc(sizeof *plan);
    struct up *u = calloc(1, sizeof *u);
    int code = COMMAND_AWAY;
    if (plan && u) {
        u->call = call;
        u->plan = plan;
        u->code_fd = -1;
        code = steps(u);
    } else {
        command_say(call, code, "out of memory");
    }
    free(plan);
    free(u);
    return code;
}

const struct command up_command = {"up", "[--model NAME=DIR]... [--workers N] [--detach] [options]",
                                   "start a private PostgreSQL, a coordinator, workers", up_plan_usage, up_run};
