/* token_check.c - a tokenizer behind two pipes, driven with poll so that neither side waits for the other.
 *
 * Texts gather in `out`; when it is large, pump() writes and reads until it is small again. Answers come in the order
 * of the questions, which wait in a ring. */
#include "token_check.h"

#include "json_text.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define OUT_HIGH (256u << 10)
#define TEMPLATE_TOKENS 32
#define ANSWER_MAX 64

extern char **environ;

struct question {
    int64_t line;
    const char *what;
};

struct token_check {
    char *tool, *model_dir;
    pid_t pid;                 /* 0: not started */
    int to, from;              /* pipes, -1 when closed */
    struct json_text out;      /* [sent, length) is still to be written */
    size_t sent;
    struct question *ring;     /* [head, head + waiting) modulo room */
    size_t head, waiting, room;
    char answer[ANSWER_MAX];
    size_t answer_length;
};

static bool fail(struct token_check *c, const char *reason, char *why, size_t why_bytes)
{
    snprintf(why, why_bytes, "the prompts' lengths could not be checked: %s (%s tokenize --model %s)", reason, c->tool, c->model_dir);
    return false;
}

bool token_check_may_be_long(const char *text)
{
    size_t length = strlen(text), most = length;
    for (size_t i = 0; i < length; i++)
        if ((unsigned char)text[i] >= 0x80) {
            most = 3 * length;
            break;
        }
    return most + TEMPLATE_TOKENS > TOKEN_CHECK_MAX;
}

bool token_check_open(struct token_check **ret, const char *tool, const char *model_dir, char *why, size_t why_bytes)
{
    struct token_check *c = calloc(1, sizeof *c);
    if (c) {
        c->to = c->from = -1;
        c->tool = strdup(tool);
        c->model_dir = strdup(model_dir);
    }
    if (!c || !c->tool || !c->model_dir) {
        snprintf(why, why_bytes, "no memory to check the prompts' lengths");
        token_check_close(c);
        return false;
    }
    *ret = c;
    return true;
}

/* --- the process ------------------------------------------------------------------------------------- */

static bool spawn(struct token_check *c, int in, int out, char *why, size_t why_bytes)
{
    char *const argv[] = {c->tool, "tokenize", "--model", c->model_dir, "--count", NULL};
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t pipe_signal;
    sigemptyset(&pipe_signal);
    sigaddset(&pipe_signal, SIGPIPE);
    posix_spawn_file_actions_init(&actions);
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGDEF);
    posix_spawnattr_setsigdefault(&attributes, &pipe_signal);
    posix_spawn_file_actions_adddup2(&actions, in, 0);
    posix_spawn_file_actions_adddup2(&actions, out, 1);
    int error = posix_spawn(&c->pid, c->tool, &actions, &attributes, argv, environ);
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&actions);
    if (error == 0)
        return true;
    c->pid = 0;
    return fail(c, strerror(error), why, why_bytes);
}

static bool start(struct token_check *c, char *why, size_t why_bytes)
{
    int to[2] = {-1, -1}, from[2] = {-1, -1};
    bool ok = pipe2(to, O_CLOEXEC) == 0 && pipe2(from, O_CLOEXEC) == 0;
    if (!ok)
        fail(c, strerror(errno), why, why_bytes);
    signal(SIGPIPE, SIG_IGN); /* a tokenizer that dies is a sentence, not our end */
    ok = ok && spawn(c, to[0], from[1], why, why_bytes);
    if (to[0] >= 0)
        close(to[0]);
    if (from[1] >= 0)
        close(from[1]);
    c->to = to[1];
    c->from = from[0];
    if (ok)
        ok = fcntl(c->to, F_SETFL, O_NONBLOCK) == 0;
    return ok;
}

/* Why it ended: its own sentence is on stderr already. */
static bool ended(struct token_check *c, char *why, size_t why_bytes)
{
    char reason[96];
    int status = 0;
    if (c->to >= 0)
        close(c->to);
    c->to = -1;
    while (waitpid(c->pid, &status, 0) < 0 && errno == EINTR)
        ;
    c->pid = 0;
    if (WIFSIGNALED(status))
        snprintf(reason, sizeof reason, "the tokenizer was ended by signal %d", WTERMSIG(status));
    else
        snprintf(reason, sizeof reason, "the tokenizer ended early with code %d", WEXITSTATUS(status));
    return fail(c, reason, why, why_bytes);
}

/* --- questions and answers ---------------------------------------------------------------------------- */

static bool push(struct token_check *c, struct question q)
{
    if (c->waiting == c->room) {
        size_t room = c->room ? 2 * c->room : 256;
        struct question *ring = malloc(room * sizeof *ring);
        if (!ring)
            return false;
        for (size_t i = 0; i < c->waiting; i++)
            ring[i] = c->ring[(c->head + i) % c->room];
        free(c->ring);
        c->ring = ring;
        c->room = room;
        c->head = 0;
    }
    c->ring[(c->head + c->waiting++) % c->room] = q;
    return true;
}

static bool take_answer(struct token_check *c, int64_t *ret_line, char *why, size_t why_bytes)
{
    char *end;
    c->answer[c->answer_length] = 0;
    long long count = strtoll(c->answer, &end, 10);
    if (end == c->answer || *end || count < 0 || c->waiting == 0)
        return fail(c, "the tokenizer answered something that is not a count", why, why_bytes);
    struct question q = c->ring[c->head];
    c->head = (c->head + 1) % c->room;
    c->waiting--;
    c->answer_length = 0;
    if (count <= TOKEN_CHECK_MAX)
        return true;
    *ret_line = q.line;
    snprintf(why, why_bytes, "the %s has %lld tokens: accepted are at most %d; shorten it, or let --truncate cut it", q.what, count,
             TOKEN_CHECK_MAX);
    return false;
}

static bool take_bytes(struct token_check *c, const char *data, size_t bytes, int64_t *ret_line, char *why, size_t why_bytes)
{
    for (size_t i = 0; i < bytes; i++) {
        if (data[i] == '\n') {
            if (!take_answer(c, ret_line, why, why_bytes))
                return false;
        } else if (c->answer_length == ANSWER_MAX - 1) {
            return fail(c, "the tokenizer answered something that is not a count", why, why_bytes);
        } else {
            c->answer[c->answer_length++] = data[i];
        }
    }
    return true;
}

static bool write_some(struct token_check *c, char *why, size_t why_bytes)
{
    ssize_t put = write(c->to, c->out.data + c->sent, c->out.length - c->sent);
    if (put >= 0)
        c->sent += (size_t)put;
    else if (errno == EPIPE)
        return ended(c, why, why_bytes);
    else if (errno != EAGAIN && errno != EINTR)
        return fail(c, strerror(errno), why, why_bytes);
    if (c->sent == c->out.length) {
        json_text_clear(&c->out);
        c->sent = 0;
    }
    return true;
}

static bool read_some(struct token_check *c, int64_t *ret_line, char *why, size_t why_bytes)
{
    char data[16384];
    ssize_t got = read(c->from, data, sizeof data);
    if (got < 0)
        return errno == EINTR || fail(c, strerror(errno), why, why_bytes);
    if (got == 0)
        return ended(c, why, why_bytes);
    return take_bytes(c, data, (size_t)got, ret_line, why, why_bytes);
}

/* Writes and reads until all is written and, with `all`, answered. */
static bool pump(struct token_check *c, bool all, int64_t *ret_line, char *why, size_t why_bytes)
{
    while (c->out.length > 0 || (all && c->waiting > 0)) {
        struct pollfd fds[2] = {{.fd = c->from, .events = POLLIN}, {.fd = c->to, .events = c->out.length ? POLLOUT : 0}};
        if (poll(fds, 2, -1) < 0 && errno != EINTR)
            return fail(c, strerror(errno), why, why_bytes);
        if (fds[0].revents && !read_some(c, ret_line, why, why_bytes))
            return false;
        if (c->out.length && fds[1].revents && !write_some(c, why, why_bytes))
            return false;
        if (all && c->out.length == 0 && c->to >= 0) { /* no more questions: a tokenizer that buffers answers now */
            close(c->to);
            c->to = -1;
        }
    }
    return true;
}

bool token_check_add(struct token_check *c, int64_t line, const char *what, const char *text, int64_t *ret_line, char *why,
                     size_t why_bytes)
{
    *ret_line = 0;
    if (!token_check_may_be_long(text))
        return true;
    if (!c->pid && !start(c, why, why_bytes))
        return false;
    json_text_text(&c->out, text);
    json_text_put(&c->out, "\n");
    if (c->out.failed || !push(c, (struct question){line, what}))
        return fail(c, "no memory", why, why_bytes);
    return c->out.length < OUT_HIGH || pump(c, false, ret_line, why, why_bytes);
}

bool token_check_finish(struct token_check *c, int64_t *ret_line, char *why, size_t why_bytes)
{
    *ret_line = 0;
    return pump(c, true, ret_line, why, why_bytes);
}

void token_check_close(struct token_check *c)
{
    if (!c)
        return;
    if (c->to >= 0)
        close(c->to);
    if (c->from >= 0)
        close(c->from);
    if (c->pid) {
        kill(c->pid, SIGKILL); /* our own child, whose answers nobody wants any more */
        while (waitpid(c->pid, NULL, 0) < 0 && errno == EINTR)
            ;
    }
    json_text_done(&c->out);
    free(c->ring);
    free(c->tool);
    free(c->model_dir);
    free(c);
}
