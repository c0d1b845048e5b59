/* lifecycle.c - signals become a count and a readable pipe, so that loops see them where they poll; a pid file is a lock
 * that the kernel gives back when the process ends, however it ends.
 *
 * The lock is one of an open file description (F_OFD_SETLK): like flock it outlives a close of another descriptor of the
 * file, and unlike flock others can ask for it (F_OFD_GETLK) without taking it for a moment. With flock a program that
 * asks "does it run already?" at the wrong instant makes the one that starts believe that it does. */
#include "lifecycle.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "clock.h"

#define BACKOFF_FIRST_MS 1000
#define BACKOFF_MAX_MS 30000
#define STEADY_MS 60000 /* a child that lived so long starts again at once with the first backoff */

static atomic_int stop_count, stop_signal;
static int pipe_ends[2] = {-1, -1};

static void on_signal(int number)
{
    int saved = errno;
    int none = 0;
    atomic_compare_exchange_strong(&stop_signal, &none, number);
    atomic_fetch_add(&stop_count, 1);
    ssize_t ignored = write(pipe_ends[1], "", 1);
    (void)ignored;
    errno = saved;
}

bool lifecycle_signals(void)
{
    if (pipe_ends[0] < 0 && pipe2(pipe_ends, O_NONBLOCK | O_CLOEXEC) != 0)
        return false;
    struct sigaction action = {.sa_handler = on_signal};
    sigemptyset(&action.sa_mask);
    bool ok = sigaction(SIGTERM, &action, NULL) == 0 && sigaction(SIGINT, &action, NULL) == 0;
    action.sa_handler = SIG_IGN;
    return sigaction(SIGPIPE, &action, NULL) == 0 && ok;
}

int lifecycle_stop_count(void)
{
    char drained[64];
    while (pipe_ends[0] >= 0 && read(pipe_ends[0], drained, sizeof drained) > 0)
        continue;
    return atomic_load(&stop_count);
}

int lifecycle_stop_signal(void)
{
    return atomic_load(&stop_signal);
}

int lifecycle_stop_code(void)
{
    return LIFECYCLE_BY_SIGNAL + lifecycle_stop_signal();
}

int lifecycle_fd(void)
{
    return pipe_ends[0];
}

int lifecycle_wait(int ms)
{
    struct pollfd signal = {.fd = pipe_ends[0], .events = POLLIN};
    poll(&signal, 1, ms);
    return lifecycle_stop_count();
}

uint64_t lifecycle_files(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
        return 0;
    rlim_t before = limit.rlim_cur;
    limit.rlim_cur = limit.rlim_max;
    return setrlimit(RLIMIT_NOFILE, &limit) == 0 ? limit.rlim_cur : before;
}

/* --- pid files ----------------------------------------------------------------------------------------- */

static pid_t read_pid(int fd)
{
    char text[32] = {0};
    return pread(fd, text, sizeof text - 1, 0) > 0 ? (pid_t)atol(text) : 0;
}

static struct flock whole_file(short type)
{
    return (struct flock){.l_type = type, .l_whence = SEEK_SET};
}

bool lifecycle_pid_file(const char *path, char *why, unsigned long why_bytes)
{
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0) {
        snprintf(why, why_bytes, "pid file %s: %s", path, strerror(errno));
        return false;
    }
    struct flock lock = whole_file(F_WRLCK);
    if (fcntl(fd, F_OFD_SETLK, &lock) != 0) {
        if (errno == EAGAIN || errno == EACCES)
            snprintf(why, why_bytes, "already running with pid %ld (%s)", (long)read_pid(fd), path);
        else
            snprintf(why, why_bytes, "pid file %s cannot be locked: %s", path, strerror(errno));
        close(fd);
        return false;
    }
    char text[32];
    int n = snprintf(text, sizeof text, "%ld\n", (long)getpid());
    if (ftruncate(fd, 0) != 0 || pwrite(fd, text, (size_t)n, 0) != n) {
        snprintf(why, why_bytes, "pid file %s: %s", path, strerror(errno));
        close(fd);
        return false;
    }
    return true; /* the descriptor stays open: it holds the lock */
}

pid_t lifecycle_pid_alive(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    struct flock lock = whole_file(F_WRLCK);
    bool is_held = fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
    pid_t pid = is_held ? read_pid(fd) : 0;
    close(fd);
    return pid;
}

void lifecycle_notify(const char *state)
{
    const char *path = getenv("NOTIFY_SOCKET");
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    if (!path || !*path || strlen(path) >= sizeof to.sun_path)
        return;
    memcpy(to.sun_path, path, strlen(path));
    if (to.sun_path[0] == '@') /* abstract socket */
        to.sun_path[0] = 0;
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return;
    sendto(fd, state, strlen(state), MSG_NOSIGNAL, (struct sockaddr *)&to,
           (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(path)));
    close(fd);
}

/* --- children -------------------------------------------------------------------------------------------- */

static void child_run(struct lifecycle_child *c)
{
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
    signal(SIGINT, SIG_DFL);
    setpgid(0, 0); /* Ctrl-C goes to the supervisor, which decides the order of stopping */
    if (c->log_path) {
        int fd = open(c->log_path, O_WRONLY | O_CREAT | O_APPEND, 0644);
        if (fd >= 0) {
            dup2(fd, STDOUT_FILENO);
            dup2(fd, STDERR_FILENO);
            close(fd);
        }
    }
    if (c->before)
        c->before(c->context);
    execv(c->argv[0], c->argv);
    dprintf(STDERR_FILENO, "%s cannot be started: %s: %s\n", c->name, c->argv[0], strerror(errno));
    _exit(LIFECYCLE_NO_PROGRAM);
}

static void child_start(struct lifecycle_child *c)
{
    pid_t pid = fork();
    if (pid == 0)
        child_run(c);
    c->started_ms = clock_ms();
    if (pid < 0) { /* no process to be had: as if it had died at once */
        c->start_at_ms = c->started_ms + BACKOFF_MAX_MS;
        return;
    }
    c->pid = pid;
    c->starts++;
}

static void child_reap(struct lifecycle_child *c)
{
    int status = 0;
    pid_t got = waitpid(c->pid, &status, WNOHANG);
    if (got == 0 || (got < 0 && errno != ECHILD)) /* ECHILD: somebody else has waited for it; it is gone all the same */
        return;
    int64_t now = clock_ms();
    c->last_status = status;
    c->pid = 0;
    if (now - c->started_ms > STEADY_MS || c->backoff_ms == 0)
        c->backoff_ms = BACKOFF_FIRST_MS;
    else
        c->backoff_ms = c->backoff_ms * 2 < BACKOFF_MAX_MS ? c->backoff_ms * 2 : BACKOFF_MAX_MS;
    c->start_at_ms = now + c->backoff_ms;
}

void lifecycle_child_step(struct lifecycle_child *c)
{
    if (c->pid)
        child_reap(c);
    if (!c->pid && c->is_wanted && clock_ms() >= c->start_at_ms)
        child_start(c);
}

void lifecycle_child_stop(struct lifecycle_child *c, int number)
{
    c->is_wanted = false;
    if (c->pid)
        kill(c->pid, number);
}
