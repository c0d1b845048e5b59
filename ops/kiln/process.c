/* process.c - fork, read until the pipe closes, wait. What does not fit pushes out what came first, because programs say
 * at the end why they give up. */
#include "process.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lifecycle.h"

static void child(char *const argv[], int out, void (*before)(void *), void *context)
{
    signal(SIGPIPE, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
    signal(SIGINT, SIG_DFL);
    setpgid(0, 0); /* Ctrl-C comes to us, and we pass it on */
    int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    dup2(null, STDIN_FILENO);
    dup2(out, STDOUT_FILENO);
    dup2(out, STDERR_FILENO);
    if (before)
        before(context);
    execv(argv[0], argv);
    dprintf(STDERR_FILENO, "%s: %s\n", argv[0], strerror(errno));
    _exit(LIFECYCLE_NO_PROGRAM);
}

static void keep(char *ret, size_t bytes, size_t *used, const char *data, size_t count)
{
    size_t over = *used + count + 1 > bytes ? *used + count + 1 - bytes : 0;
    if (over >= *used) { /* nothing of before remains */
        size_t skip = over - *used;
        *used = count - skip;
        memcpy(ret, data + skip, *used);
    } else {
        memmove(ret, ret + over, *used - over);
        memcpy(ret + *used - over, data, count);
        *used += count - over;
    }
    ret[*used] = 0;
}

static void listen_to(int fd, pid_t pid, char *ret, size_t bytes)
{
    char data[4096];
    size_t used = 0;
    bool is_told = false;
    ret[0] = 0;
    for (;;) {
        struct pollfd fds[2] = {{.fd = fd, .events = POLLIN}, {.fd = is_told ? -1 : lifecycle_fd(), .events = POLLIN}};
        if (poll(fds, 2, -1) < 0 && errno != EINTR)
            return;
        if (lifecycle_stop_count() > 0 && !is_told) {
            kill(pid, SIGTERM);
            is_told = true;
        }
        if (!fds[0].revents)
            continue;
        ssize_t got = read(fd, data, sizeof data);
        if (got > 0)
            keep(ret, bytes, &used, data, (size_t)got);
        else if (got == 0 || errno != EINTR)
            return;
    }
}

int process_run(char *const argv[], void (*before)(void *), void *context, char *ret, size_t bytes, char *why, size_t why_bytes)
{
    int fds[2], status = -1;
    pid_t pid = -1;
    if (pipe2(fds, O_CLOEXEC) == 0) {
        pid = fork();
        if (pid == 0)
            child(argv, fds[1], before, context);
        int saved = errno;
        close(fds[1]);
        if (pid > 0)
            listen_to(fds[0], pid, ret, bytes);
        close(fds[0]);
        errno = saved;
    }
    if (pid < 0) {
        snprintf(why, why_bytes, "%s could not be started: %s", argv[0], strerror(errno));
        return -1;
    }
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        continue;
    return status;
}

char *process_last_line(char *text)
{
    size_t length = strlen(text);
    while (length > 0 && strchr(" \t\r\n", text[length - 1]))
        text[--length] = 0;
    char *newline = strrchr(text, '\n');
    return newline ? newline + 1 : text;
}
