/* Tests of ops/daemon/lifecycle.c. A signal that is missed is a farm that cannot be stopped; a pid file that outlives its
 * process is a farm that cannot be started; a child that is restarted at once for ever burns a machine. */
#include "lifecycle.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "clock.h"

#define PATIENCE_MS 20000

static char dir[] = "/tmp/kiln-test-lifecycle-XXXXXX";

static char *in_dir(const char *name)
{
    static char paths[8][128];
    static int turn;
    char *path = paths[turn++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", dir, name);
    return path;
}

/* --- signals: each in a process of its own, because counts never go back ----------------------------------- */

/* in_child runs `body` in a fork; its return value is the exit code. */
static int in_child(int (*body)(void))
{
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0)
        _exit(body());
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

#define WANT(condition)        \
    do {                       \
        if (!(condition))      \
            return __LINE__ % 120 + 1; \
    } while (0)

static bool is_readable(int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};
    return poll(&p, 1, 0) == 1;
}

static int count_signals(void)
{
    WANT(lifecycle_signals());
    WANT(lifecycle_stop_count() == 0 && lifecycle_stop_signal() == 0);
    WANT(lifecycle_fd() >= 0 && !is_readable(lifecycle_fd()));
    kill(getpid(), SIGINT);
    WANT(is_readable(lifecycle_fd()));
    WANT(lifecycle_stop_count() == 1 && lifecycle_stop_signal() == SIGINT);
    WANT(!is_readable(lifecycle_fd())); /* asking drains it: a loop does not spin */
    kill(getpid(), SIGTERM);
    WANT(is_readable(lifecycle_fd()));
    WANT(lifecycle_stop_count() == 2 && lifecycle_stop_signal() == SIGINT); /* the exit code names the first */
    WANT(lifecycle_signals()); /* again: nothing is lost */
    WANT(lifecycle_stop_count() == 2);
    return 0;
}

static void signals_are_counted_and_wake_a_poll(void **state)
{
    (void)state;
    assert_int_equal(in_child(count_signals), 0);
}

static int wait_for_signals(void)
{
    WANT(lifecycle_signals());
    int64_t began_ms = clock_ms();
    WANT(lifecycle_wait(30) == 0 && clock_ms() - began_ms >= 29);
    for (int count = 1; count <= 3; count++) {
        kill(getpid(), SIGTERM);
        WANT(lifecycle_wait(PATIENCE_MS) == count);
        WANT(clock_ms() - began_ms < PATIENCE_MS);
        int64_t again_ms = clock_ms();
        WANT(lifecycle_wait(30) == count && clock_ms() - again_ms >= 29); /* also after the third: a loop does not spin */
    }
    return 0;
}

static void waiting_ends_with_a_signal_and_sleeps_again_after_it(void **state)
{
    (void)state;
    assert_int_equal(in_child(wait_for_signals), 0);
}

static int flood(void)
{
    WANT(lifecycle_signals());
    for (int i = 0; i < 70000; i++) /* more than a pipe holds */
        kill(getpid(), SIGTERM);
    WANT(lifecycle_stop_count() == 70000);
    WANT(!is_readable(lifecycle_fd()));
    return 0;
}

static void a_flood_of_signals_neither_blocks_nor_loses_count(void **state)
{
    (void)state;
    assert_int_equal(in_child(flood), 0);
}

static int write_to_nobody(void)
{
    int ends[2];
    WANT(lifecycle_signals());
    WANT(pipe(ends) == 0);
    close(ends[0]);
    WANT(write(ends[1], "x", 1) == -1 && errno == EPIPE);
    return 0;
}

static void a_reader_that_left_is_an_error_not_a_death(void **state)
{
    (void)state;
    assert_int_equal(in_child(write_to_nobody), 0);
}

/* --- pid files ------------------------------------------------------------------------------------------- */

/* hold starts a process that locks the file and waits. */
static pid_t hold(const char *path)
{
    int ends[2];
    char why[256], byte;
    assert_int_equal(pipe(ends), 0);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        bool ok = lifecycle_pid_file(path, why, sizeof why);
        if (write(ends[1], ok ? "y" : "n", 1) == 1)
            pause();
        _exit(1);
    }
    assert_int_equal(read(ends[0], &byte, 1), 1);
    assert_int_equal(byte, 'y');
    close(ends[0]);
    close(ends[1]);
    return pid;
}

static void end_by(pid_t pid, int number)
{
    kill(pid, number);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
}

static void a_pid_file_is_held_by_one_process_and_freed_by_kill_9(void **state)
{
    (void)state;
    char why[256] = "", wanted[64];
    const char *path = in_dir("kiln.pid");
    assert_int_equal(lifecycle_pid_alive(path), 0); /* there is none */
    pid_t holder = hold(path);
    assert_int_equal(lifecycle_pid_alive(path), holder);
    assert_false(lifecycle_pid_file(path, why, sizeof why));
    snprintf(wanted, sizeof wanted, "already running with pid %d", (int)holder);
    assert_memory_equal(why, wanted, strlen(wanted));
    assert_non_null(strstr(why, path));
    end_by(holder, SIGKILL);
    assert_int_equal(lifecycle_pid_alive(path), 0); /* the file still names it; the lock is gone */
    pid_t next = hold(path);
    assert_int_equal(lifecycle_pid_alive(path), next);
    end_by(next, SIGKILL);
}

/* Who only asks must not be in the way of who starts: `kiln status` in a loop would keep `kiln up` from coming up. */
static void asking_who_runs_never_keeps_anybody_from_starting(void **state)
{
    (void)state;
    const char *path = in_dir("asked.pid");
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs("1\n", f); /* a number of somebody else's, left by a crash */
    fclose(f);
    pid_t asker = fork();
    assert_true(asker >= 0);
    if (asker == 0)
        for (;;)
            lifecycle_pid_alive(path);
    int refused = 0;
    for (int i = 0; i < 200; i++) {
        pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) {
            char why[256];
            _exit(lifecycle_pid_file(path, why, sizeof why) ? 0 : 1);
        }
        int status;
        assert_int_equal(waitpid(pid, &status, 0), pid);
        refused += WEXITSTATUS(status);
    }
    end_by(asker, SIGKILL);
    assert_int_equal(refused, 0);
}

static int exec_sleeper(const char *path)
{
    char why[256];
    if (!lifecycle_pid_file(path, why, sizeof why))
        return 1;
    pid_t pid = fork();
    if (pid == 0) {
        execl("/bin/sleep", "sleep", "60", NULL);
        _exit(127);
    }
    FILE *f = fopen(in_dir("sleeper"), "w");
    fprintf(f, "%d\n", (int)pid);
    fclose(f);
    return 0;
}

/* A worker that outlives its supervisor must not look like the supervisor. */
static void the_lock_does_not_pass_to_programs_it_starts(void **state)
{
    (void)state;
    const char *path = in_dir("parent.pid");
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0)
        _exit(exec_sleeper(path));
    int status, sleeper = 0;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(WEXITSTATUS(status), 0);
    FILE *f = fopen(in_dir("sleeper"), "r");
    assert_non_null(f);
    assert_int_equal(fscanf(f, "%d", &sleeper), 1);
    fclose(f);
    int64_t until_ms = clock_ms() + PATIENCE_MS; /* until it has become another program */
    while (lifecycle_pid_alive(path) != 0 && clock_ms() < until_ms)
        clock_sleep_ms(5);
    pid_t alive = lifecycle_pid_alive(path);
    kill(sleeper, SIGKILL);
    assert_int_equal(alive, 0);
}

static void a_pid_file_that_cannot_be_made_is_a_sentence(void **state)
{
    (void)state;
    char why[256] = "";
    assert_false(lifecycle_pid_file("/nonexistent/kiln.pid", why, sizeof why));
    assert_string_equal(why, "pid file /nonexistent/kiln.pid: No such file or directory");
    assert_int_equal(lifecycle_pid_alive("/nonexistent/kiln.pid"), 0);
}

/* --- systemd's socket -------------------------------------------------------------------------------------- */

static void expect_word(int fd, const char *word)
{
    char got[64] = "";
    struct pollfd p = {.fd = fd, .events = POLLIN};
    assert_int_equal(poll(&p, 1, PATIENCE_MS), 1);
    assert_int_equal(recv(fd, got, sizeof got - 1, 0), strlen(word));
    assert_string_equal(got, word);
}

static int listen_at(const char *name, socklen_t bytes)
{
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_DGRAM, 0);
    assert_true(fd >= 0);
    memcpy(at.sun_path, name, bytes);
    assert_int_equal(bind(fd, (struct sockaddr *)&at, (socklen_t)offsetof(struct sockaddr_un, sun_path) + bytes), 0);
    return fd;
}

static void systemd_is_told_by_path_and_by_abstract_name(void **state)
{
    (void)state;
    char name[128];
    unsetenv("NOTIFY_SOCKET");
    lifecycle_notify("READY=1"); /* nobody asked: nothing happens */
    const char *path = in_dir("notify");
    int fd = listen_at(path, (socklen_t)strlen(path) + 1);
    setenv("NOTIFY_SOCKET", path, 1);
    lifecycle_notify("READY=1");
    expect_word(fd, "READY=1");
    close(fd);
    lifecycle_notify("STOPPING=1"); /* nobody listens any more */
    snprintf(name, sizeof name, "@kiln-test-%d", (int)getpid());
    name[0] = 0;
    fd = listen_at(name, (socklen_t)strlen(name + 1) + 1);
    name[0] = '@';
    setenv("NOTIFY_SOCKET", name, 1);
    lifecycle_notify("STOPPING=1");
    expect_word(fd, "STOPPING=1");
    close(fd);
    char longer[300];
    memset(longer, 'x', sizeof longer - 1);
    longer[sizeof longer - 1] = 0;
    setenv("NOTIFY_SOCKET", longer, 1);
    lifecycle_notify("READY=1");
    unsetenv("NOTIFY_SOCKET");
}

/* --- children ---------------------------------------------------------------------------------------------- */

/* run_for steps the child until `condition` holds. */
#define STEP_UNTIL(child, condition)                       \
    do {                                                   \
        int64_t until_ms = clock_ms() + PATIENCE_MS;       \
        while (lifecycle_child_step(child), !(condition)) { \
            assert_true(clock_ms() < until_ms);            \
            clock_sleep_ms(2);                             \
        }                                                  \
    } while (0)

static void a_child_that_dies_is_started_again_ever_later(void **state)
{
    (void)state;
    char *argv[] = {(char[]){"/bin/false"}, NULL};
    struct lifecycle_child c = {.name = "false", .argv = argv, .is_wanted = true};
    static const int backoffs_ms[] = {1000, 2000, 4000, 8000, 16000, 30000, 30000};
    for (size_t i = 0; i < sizeof backoffs_ms / sizeof *backoffs_ms; i++) {
        STEP_UNTIL(&c, c.starts == (int)i + 1 && c.pid == 0);
        int64_t now = clock_ms();
        assert_int_equal(c.backoff_ms, backoffs_ms[i]);
        assert_true(c.start_at_ms > now + backoffs_ms[i] - 1000 && c.start_at_ms <= now + backoffs_ms[i]);
        assert_true(WIFEXITED(c.last_status) && WEXITSTATUS(c.last_status) == 1);
        lifecycle_child_step(&c); /* too early */
        assert_int_equal(c.starts, i + 1);
        c.start_at_ms = now; /* the test does not wait that long */
    }
}

static void a_minute_of_life_makes_the_next_start_quick_again(void **state)
{
    (void)state;
    char *argv[] = {(char[]){"/bin/sleep"}, (char[]){"60"}, NULL};
    struct lifecycle_child c = {.name = "sleep", .argv = argv, .is_wanted = true, .backoff_ms = 16000};
    STEP_UNTIL(&c, c.pid > 0);
    c.started_ms -= 61000; /* as if it had lived */
    kill(c.pid, SIGKILL);
    STEP_UNTIL(&c, c.pid == 0);
    assert_int_equal(c.backoff_ms, 1000);
    assert_true(WIFSIGNALED(c.last_status) && WTERMSIG(c.last_status) == SIGKILL);
}

static void a_child_that_is_not_wanted_stays_away(void **state)
{
    (void)state;
    char *argv[] = {(char[]){"/bin/sleep"}, (char[]){"60"}, NULL};
    struct lifecycle_child c = {.name = "sleep", .argv = argv};
    lifecycle_child_step(&c);
    assert_int_equal(c.pid, 0);
    c.is_wanted = true;
    STEP_UNTIL(&c, c.pid > 0);
    lifecycle_child_stop(&c, SIGTERM);
    STEP_UNTIL(&c, c.pid == 0);
    assert_int_equal(WTERMSIG(c.last_status), SIGTERM);
    c.start_at_ms = 0;
    lifecycle_child_step(&c);
    assert_int_equal(c.starts, 1);
    lifecycle_child_stop(&c, SIGTERM); /* there is none: nothing is killed */
}

/* Somebody else waited for it (a library, a shell): it is gone all the same, and must come back. */
static void a_child_somebody_else_waited_for_is_started_again(void **state)
{
    (void)state;
    char *argv[] = {(char[]){"/bin/true"}, NULL};
    struct lifecycle_child c = {.name = "true", .argv = argv, .is_wanted = true};
    STEP_UNTIL(&c, c.pid > 0);
    assert_int_equal(waitpid(c.pid, NULL, 0), c.pid);
    lifecycle_child_step(&c);
    assert_int_equal(c.pid, 0);
    c.start_at_ms = 0;
    STEP_UNTIL(&c, c.starts == 2 && c.pid == 0);
}

static void set_word(void *context)
{
    setenv("KILN_TEST_WORD", context, 1);
}

static char *text_of(const char *path)
{
    static char text[4096];
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    text[fread(text, 1, sizeof text - 1, f)] = 0;
    fclose(f);
    return text;
}

static void a_child_speaks_into_its_log_and_has_clean_signals(void **state)
{
    (void)state;
    /* Its own process group: Ctrl-C in the supervisor's terminal must not reach it. */
    char script[] = "echo word=$KILN_TEST_WORD; echo error >&2; grep SigCgt /proc/self/status; grep SigIgn /proc/self/status;"
                    "[ $(ps -o pgid= -p $$) = $$ ] && echo own group";
    char *argv[] = {(char[]){"/bin/sh"}, (char[]){"-c"}, script, NULL};
    char *log_path = in_dir("child.log");
    char word[] = "hello";
    struct lifecycle_child c = {.name = "sh", .argv = argv, .log_path = log_path, .before = set_word, .context = word,
                                .is_wanted = true};
    signal(SIGPIPE, SIG_IGN);
    STEP_UNTIL(&c, c.starts == 1 && c.pid == 0);
    const char *text = text_of(log_path);
    assert_memory_equal(text, "word=hello\nerror\n", 17);
    unsigned long long ignored = 0;
    assert_int_equal(sscanf(strstr(text, "SigIgn:"), "SigIgn: %llx", &ignored), 1);
    assert_int_equal(ignored & (1ULL << (SIGPIPE - 1) | 1ULL << (SIGTERM - 1) | 1ULL << (SIGINT - 1)), 0);
    assert_non_null(strstr(text, "own group"));
    c.start_at_ms = 0;
    STEP_UNTIL(&c, c.starts == 2 && c.pid == 0);
    const char *first = text_of(log_path);
    assert_non_null(strstr(first + 1, "word=hello")); /* appended, not begun anew */
}

static void a_program_that_is_missing_says_so_in_the_log(void **state)
{
    (void)state;
    char *argv[] = {(char[]){"/nonexistent/kiln-worker"}, NULL};
    char *log_path = in_dir("missing.log");
    struct lifecycle_child c = {.name = "worker-1", .argv = argv, .log_path = log_path, .is_wanted = true};
    STEP_UNTIL(&c, c.starts == 1 && c.pid == 0);
    assert_int_equal(WEXITSTATUS(c.last_status), 127);
    assert_string_equal(text_of(log_path), "worker-1 cannot be started: /nonexistent/kiln-worker: No such file or directory\n");
}

static int make_dir(void **state)
{
    (void)state;
    return mkdtemp(dir) ? 0 : -1;
}

static int remove_dir(void **state)
{
    (void)state;
    char command[64];
    snprintf(command, sizeof command, "rm -rf %s", dir);
    return system(command);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(signals_are_counted_and_wake_a_poll),
        cmocka_unit_test(waiting_ends_with_a_signal_and_sleeps_again_after_it),
        cmocka_unit_test(a_flood_of_signals_neither_blocks_nor_loses_count),
        cmocka_unit_test(a_reader_that_left_is_an_error_not_a_death),
        cmocka_unit_test(a_pid_file_is_held_by_one_process_and_freed_by_kill_9),
        cmocka_unit_test(asking_who_runs_never_keeps_anybody_from_starting),
        cmocka_unit_test(the_lock_does_not_pass_to_programs_it_starts),
        cmocka_unit_test(a_pid_file_that_cannot_be_made_is_a_sentence),
        cmocka_unit_test(systemd_is_told_by_path_and_by_abstract_name),
        cmocka_unit_test(a_child_that_dies_is_started_again_ever_later),
        cmocka_unit_test(a_minute_of_life_makes_the_next_start_quick_again),
        cmocka_unit_test(a_child_that_is_not_wanted_stays_away),
        cmocka_unit_test(a_child_somebody_else_waited_for_is_started_again),
        cmocka_unit_test(a_child_speaks_into_its_log_and_has_clean_signals),
        cmocka_unit_test(a_program_that_is_missing_says_so_in_the_log),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
