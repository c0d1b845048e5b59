/* fake_coordinator.c - waits are bounded by FAKE_PATIENCE_MS and fail the test; nothing depends on how fast things are. */
#include "fake_coordinator.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

extern char **environ;

static pid_t left_pid; /* of the test that runs: a failed one leaves by longjmp */
static char left_dir[64];

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void make_file(const char *path, const char *text)
{
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fputs(text, file);
    fclose(file);
}

void fake_coordinator_begin(struct fake_coordinator *f, const char *program)
{
    char path[256];
    memset(f, 0, sizeof *f);
    f->program = program;
    snprintf(f->dir, sizeof f->dir, "/tmp/kiln-test-worker-XXXXXX");
    assert_non_null(mkdtemp(f->dir));
    memcpy(left_dir, f->dir, sizeof left_dir);
    snprintf(f->out_dir, sizeof f->out_dir, "%s/images", f->dir);
    snprintf(f->model_dir, sizeof f->model_dir, "%s/model", f->dir);
    snprintf(f->endpoint, sizeof f->endpoint, "ipc://%s/socket", f->dir);
    snprintf(f->spool_dir, sizeof f->spool_dir, "%s/spool", f->dir);
    assert_int_equal(mkdir(f->model_dir, 0777), 0);
    snprintf(path, sizeof path, "%s/fake.json", f->model_dir);
    make_file(path, "{}");
    fake_coordinator_open(f);
}

void fake_coordinator_end(struct fake_coordinator *f)
{
    char command[128];
    if (f->pid > 0) {
        kill(f->pid, SIGKILL);
        waitpid(f->pid, NULL, 0);
    }
    fake_coordinator_close(f);
    snprintf(command, sizeof command, "rm -rf '%s'", f->dir);
    assert_int_equal(system(command), 0);
    left_pid = 0;
    *left_dir = 0;
}

int fake_coordinator_abandon(void **state)
{
    char command[256];
    (void)state;
    if (left_pid > 0) {
        kill(left_pid, SIGKILL);
        waitpid(left_pid, NULL, 0);
    }
    if (*left_dir) {
        snprintf(command, sizeof command, "cat %s/worker.log >&2; ! mountpoint -q %s/disk || umount %s/disk; rm -rf %s", left_dir,
                 left_dir, left_dir, left_dir);
        if (system(command) != 0)
            return -1;
    }
    left_pid = 0;
    *left_dir = 0;
    return 0;
}

void fake_coordinator_open(struct fake_coordinator *f)
{
    char why[256];
    if (!link_bind(&f->link, f->endpoint, why, sizeof why))
        fail_msg("%s", why);
}

void fake_coordinator_close(struct fake_coordinator *f)
{
    msg_done(&f->said);
    link_close(&f->link, 0);
}

/* --- the worker -------------------------------------------------------------------------------------- */

void fake_coordinator_start_worker(struct fake_coordinator *f, const char *fault, const char *const *words)
{
    char model[200], log[200], log_word[] = "--log-level";
    snprintf(model, sizeof model, "m=%s", f->model_dir);
    snprintf(log, sizeof log, "%s/worker.log", f->dir);
    char *argv[32] = {(char *)(uintptr_t)f->program, "--connect", f->endpoint, "--model", model, "--name", "w1", "--spool", f->spool_dir,
                      "--batch", "4", log_word, "debug"};
    int argc = 13;
    for (int i = 0; words && words[i]; i++)
        argv[argc++] = (char *)(uintptr_t)words[i];
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 2, log, O_WRONLY | O_CREAT | O_APPEND, 0666);
    if (fault)
        setenv("KILN_FAULT", fault, 1);
    else
        unsetenv("KILN_FAULT");
    assert_int_equal(posix_spawn(&f->pid, f->program, &actions, NULL, argv, environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    left_pid = f->pid;
}

int fake_coordinator_worker_ended(struct fake_coordinator *f)
{
    int status = 0;
    int64_t until_ms = now_ms() + FAKE_PATIENCE_MS;
    while (waitpid(f->pid, &status, WNOHANG) == 0) {
        if (now_ms() > until_ms)
            fail_msg("the worker does not end");
        usleep(5000);
    }
    f->pid = left_pid = 0;
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

/* --- messages ---------------------------------------------------------------------------------------- */

/* The next word that is no heartbeat or progress, into f->said; false when the time is over. */
static bool next_word(struct fake_coordinator *f, int64_t until_ms)
{
    char why[256];
    msg_done(&f->said);
    while (now_ms() < until_ms) {
        enum link_got got = link_receive(f->link, &f->said, f->peer, why, sizeof why);
        if (got == LINK_EMPTY) {
            link_wait(f->link, NULL, 0, 20);
            continue;
        }
        if (got != LINK_MESSAGE)
            fail_msg("%s", why);
        if (f->said.kind == MSG_HEARTBEAT) {
            snprintf(f->state, sizeof f->state, "%s", f->said.heartbeat.state);
            f->held = f->said.heartbeat.held;
            f->spooled = f->said.heartbeat.spooled;
            f->step_counter = f->said.heartbeat.step_counter;
            struct msg alive = {.kind = MSG_HEARTBEAT, .heartbeat = {.state = ""}};
            link_send(f->link, f->peer, &alive);
        } else if (f->said.kind != MSG_PROGRESS) {
            return true;
        }
        msg_done(&f->said);
    }
    return false;
}

struct msg *fake_coordinator_expect(struct fake_coordinator *f, enum msg_kind kind)
{
    if (!next_word(f, now_ms() + FAKE_PATIENCE_MS))
        fail_msg("no %s came", msg_kind_name(kind));
    if (f->said.kind != kind)
        fail_msg("%s came instead of %s", msg_kind_name(f->said.kind), msg_kind_name(kind));
    return &f->said;
}

struct msg *fake_coordinator_expect_any(struct fake_coordinator *f)
{
    if (!next_word(f, now_ms() + FAKE_PATIENCE_MS))
        fail_msg("nothing came");
    return &f->said;
}

void fake_coordinator_collect(struct fake_coordinator *f, uint64_t first_task, uint32_t count, char *ret)
{
    static const char letters[] = {[MSG_FAILURE_REFUSE] = 'r', [MSG_FAILURE_RETRY] = 't', [MSG_FAILURE_OOM] = 'o', [MSG_FAILURE_RELEASED] = 'l'};
    memset(ret, '?', count);
    ret[count] = 0;
    while (strchr(ret, '?')) {
        const struct msg *m = fake_coordinator_expect_any(f);
        if (m->kind == MSG_READY)
            continue;
        if (m->kind != MSG_RESULT && m->kind != MSG_FAILED)
            fail_msg("%s came instead of result or failed", msg_kind_name(m->kind));
        for (uint32_t i = 0; m->kind == MSG_RESULT && i < m->result.count; i++) {
            ret[m->result.items[i].task - first_task] = 'R';
            fake_coordinator_ack(f, m->result.items[i].task, m->result.items[i].token, MSG_COMMITTED);
        }
        for (uint32_t i = 0; m->kind == MSG_FAILED && i < m->failed.count; i++) {
            uint64_t at = m->failed.items[i].task - first_task;
            ret[at] = letters[m->failed.items[i].kind];
            snprintf(f->reasons[at], sizeof f->reasons[at], "%.255s", m->failed.items[i].reason);
            fake_coordinator_ack(f, m->failed.items[i].task, m->failed.items[i].token, MSG_COMMITTED);
        }
    }
}

void fake_coordinator_expect_quiet(struct fake_coordinator *f, int ms)
{
    if (next_word(f, now_ms() + ms))
        fail_msg("%s came, nothing was expected", msg_kind_name(f->said.kind));
}

void fake_coordinator_expect_state(struct fake_coordinator *f, const char *prefix)
{
    int64_t until_ms = now_ms() + FAKE_PATIENCE_MS;
    while (strncmp(f->state, prefix, strlen(prefix)) != 0) {
        if (now_ms() > until_ms)
            fail_msg("state stayed '%s', want '%s'", f->state, prefix);
        fake_coordinator_expect_quiet(f, 100);
    }
}

void fake_coordinator_say(struct fake_coordinator *f, const struct msg *m)
{
    assert_int_equal(link_send(f->link, f->peer, m), LINK_SENT);
}

void fake_coordinator_welcome(struct fake_coordinator *f)
{
    fake_coordinator_expect(f, MSG_HELLO);
    struct msg m = {.kind = MSG_WELCOME, .welcome = {.protocol = MSG_VERSION, .coordinator = "fake", .heartbeat_ms = 200, .silent_ms = 3000}};
    fake_coordinator_say(f, &m);
}

void fake_coordinator_assign(struct fake_coordinator *f, uint64_t first_task, const char *const *prompts, uint32_t count)
{
    static char files[64][32];
    struct msg_task tasks[64] = {0};
    for (uint32_t i = 0; i < count; i++) {
        snprintf(files[i], sizeof files[i], "t%" PRIu64 ".png", first_task + i);
        tasks[i] = (struct msg_task){.task = first_task + i, .token = first_task + i + 1, .attempt = 1, .prompt = prompts[i],
                                     .negative = "", .seed = 42 + i, .file = files[i]};
    }
    struct msg m = {.kind = MSG_ASSIGN, .assign = {.batch = first_task, .lease_ms = 60000, .campaign = "c", .model = "m",
                    .out_dir = f->out_dir, .format = "png", .use = "", .width = 64, .height = 64, .steps = 0, .guidance = NAN,
                    .count = count, .tasks = tasks}};
    fake_coordinator_say(f, &m);
}

void fake_coordinator_ack(struct fake_coordinator *f, uint64_t task, uint64_t token, enum msg_verdict verdict)
{
    struct msg_ack_item item = {task, token, verdict};
    struct msg m = {.kind = MSG_ACK, .ack = {1, &item}};
    fake_coordinator_say(f, &m);
}

/* --- files ------------------------------------------------------------------------------------------- */

bool fake_coordinator_has(struct fake_coordinator *f, const char *relative)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", f->out_dir, relative);
    return access(path, F_OK) == 0;
}

void fake_coordinator_wait_for(struct fake_coordinator *f, const char *relative, bool there)
{
    int64_t until_ms = now_ms() + FAKE_PATIENCE_MS;
    while (fake_coordinator_has(f, relative) != there) {
        if (now_ms() > until_ms)
            fail_msg("%s is %s", relative, there ? "not there" : "still there");
        fake_coordinator_expect_quiet(f, 20);
    }
}

int fake_coordinator_records(struct fake_coordinator *f)
{
    char path[256];
    int count = 0;
    snprintf(path, sizeof path, "%s/w1", f->spool_dir);
    DIR *folder = opendir(path);
    for (struct dirent *d; folder && (d = readdir(folder));)
        count += strstr(d->d_name, ".json") != NULL;
    if (folder)
        closedir(folder);
    return count;
}
