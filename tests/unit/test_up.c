/* test_up.c - `kiln up` and `kiln down` with real programs: PostgreSQL, coordinator, workers with the pocket model.
 * If this breaks, a farm does not come back after a power cut, something runs on without a supervisor, or a start that
 * fails leaves half of it running. The first argument is the kiln to test; the others are beside it. */
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#define WAIT_MS 60000

static const char *kiln;
static char folder[] = "/tmp/kiln-test-up.XXXXXX", home[64], output[1 << 16];

/* --- running ------------------------------------------------------------------------------------------------- */

/* What a file holds, in `output`. */
static const char *read_file(const char *path)
{
    FILE *f = fopen(path, "r");
    size_t length = f ? fread(output, 1, sizeof output - 1, f) : 0;
    output[length] = 0;
    if (f)
        fclose(f);
    return output;
}

/* Runs `kiln WORDS`, stdout and stderr to `output`; the exit code. */
static int run(const char *format, ...)
{
    char words[1024], command[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(words, sizeof words, format, args);
    va_end(args);
    snprintf(command, sizeof command, "timeout 120 %s %s >%s/output 2>&1", kiln, words, folder);
    int status = system(command);
    snprintf(command, sizeof command, "%s/output", folder);
    read_file(command);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

#define EXPECT(code, ...)                                                                                              \
    do {                                                                                                               \
        int got = run(__VA_ARGS__);                                                                                    \
        if (got != (code))                                                                                             \
            fail_msg("exit code %d, expected %d: %s", got, (code), output);                                            \
    } while (0)

static void expect_word(const char *word)
{
    if (!strstr(output, word))
        fail_msg("'%s' is not in: %s", word, output);
}

static pid_t pid_of(const char *name)
{
    char path[128];
    long pid = 0;
    snprintf(path, sizeof path, "%s/run/%s.pid", home, name);
    FILE *f = fopen(path, "r");
    if (!f)
        return 0;
    if (fscanf(f, "%ld", &pid) != 1)
        pid = 0;
    fclose(f);
    return (pid_t)pid;
}

/* A zombie that nobody reaps (in a container without init) has ended, too. */
static bool is_alive(pid_t pid)
{
    char path[64], state = 'X';
    snprintf(path, sizeof path, "/proc/%ld/stat", (long)pid);
    FILE *f = fopen(path, "r");
    if (!f)
        return false;
    if (fscanf(f, "%*d (%*[^)]) %c", &state) != 1)
        state = 'X';
    fclose(f);
    return state != 'Z' && state != 'X';
}

static void rest_ms(int ms)
{
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L}, NULL);
}

static void expect_gone(pid_t pid, const char *name)
{
    for (int waited = 0; is_alive(pid); waited += 50) {
        if (waited > WAIT_MS)
            fail_msg("%s (pid %ld) is still there", name, (long)pid);
        rest_ms(50);
    }
}

/* Another pid than before: it was started again. */
static pid_t expect_again(const char *name, pid_t before)
{
    for (int waited = 0; waited < WAIT_MS; waited += 50) {
        pid_t now = pid_of(name);
        if (now && now != before && is_alive(now))
            return now;
        rest_ms(50);
    }
    fail_msg("%s was not started again", name);
    return 0;
}

static int files_in_run(void)
{
    char path[128];
    int count = 0;
    snprintf(path, sizeof path, "%s/run", home);
    DIR *dir = opendir(path);
    for (struct dirent *e; dir && (e = readdir(dir));)
        count += strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0;
    if (dir)
        closedir(dir);
    return count;
}

static int lines(void)
{
    int count = 0;
    for (const char *p = output; *p; p++)
        count += *p == '\n';
    return count;
}

static const char *const names[] = {"kiln", "postgres", "coordinator", "worker-1", "worker-2"};
enum { NAMES = 5 };

static void pids(pid_t ret[NAMES])
{
    for (int i = 0; i < NAMES; i++) {
        ret[i] = pid_of(names[i]);
        if (!ret[i] || !is_alive(ret[i]))
            fail_msg("%s is not running", names[i]);
    }
}

static void up(void)
{
    EXPECT(0, "up --detach --workers 2 --model pocket=engine/pocket/model");
    expect_word("kiln is up: 2 workers");
    expect_word(home);
    expect_word("http://127.0.0.1:");
}

static int down_after(void **state)
{
    (void)state;
    return run("down --force");
}

/* --- tests ------------------------------------------------------------------------------------------------------ */

static void up_serves_and_down_leaves_nothing_running(void **state)
{
    (void)state;
    pid_t before[NAMES];
    EXPECT(75, "status");
    expect_word("is not running on");
    EXPECT(0, "down");
    expect_word("was not running");
    up();
    pids(before);
    EXPECT(0, "status");
    EXPECT(0, "workers --json");
    assert_int_equal(lines(), 2);
    expect_word("\"worker\":\"worker-2\"");
    EXPECT(2, "up");
    expect_word("already running with pid");
    EXPECT(2, "up --detach");
    EXPECT(0, "down");
    expect_word("kiln is down");
    for (int i = 0; i < NAMES; i++)
        assert_false(is_alive(before[i]));
    assert_int_equal(files_in_run(), 1); /* kiln.json */
    EXPECT(75, "status");
}

static void campaign_is_rendered_and_survives_down_and_up(void **state)
{
    (void)state;
    char path[128];
    snprintf(path, sizeof path, "%s/prompts.txt", folder);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs("red heart\nfox\nowl\n", f);
    fclose(f);
    up();
    EXPECT(0, "submit %s --campaign three --size 64x64 --steps 2 --wait", path);
    expect_word("3/3");
    EXPECT(0, "images three --json");
    assert_int_equal(lines(), 3);
    EXPECT(0, "audit");
    expect_word("clean");
    EXPECT(0, "down");
    EXPECT(0, "up --detach"); /* the models of last time */
    expect_word("pocket");
    EXPECT(0, "watch three");
    EXPECT(0, "audit");
    EXPECT(2, "watch four");
    expect_word("no campaign 'four'");
}

static void what_dies_is_started_again(void **state)
{
    (void)state;
    pid_t before[NAMES];
    up();
    pids(before);
    for (int i = NAMES - 1; i > 0; i--)
        assert_int_equal(kill(before[i], SIGKILL), 0);
    for (int i = NAMES - 1; i > 0; i--)
        expect_again(names[i], before[i]);
    for (int waited = 0; run("status") != 0; waited += 200) {
        if (waited > WAIT_MS)
            fail_msg("the database does not come back: %s", output);
        rest_ms(200);
    }
    assert_int_equal(pid_of("kiln"), before[0]);
}

/* Power cut, OOM killer, kill -9 of everything: the next start needs no help. */
static void up_works_after_everything_was_killed(void **state)
{
    (void)state;
    pid_t before[NAMES];
    up();
    pids(before);
    for (int i = 0; i < NAMES; i++)
        assert_int_equal(kill(before[i], SIGKILL), 0);
    for (int i = 0; i < NAMES; i++)
        expect_gone(before[i], names[i]);
    EXPECT(75, "status");
    up();
    EXPECT(0, "status");
}

static void nothing_runs_on_without_its_supervisor(void **state)
{
    (void)state;
    pid_t before[NAMES];
    up();
    pids(before);
    assert_int_equal(kill(before[0], SIGKILL), 0);
    for (int i = 1; i < NAMES; i++)
        expect_gone(before[i], names[i]);
    up();
    pids(before);
    assert_int_equal(kill(before[0], SIGKILL), 0);
    up(); /* at once: what is still ending is waited for */
    pids(before);
    assert_int_equal(kill(before[0], SIGKILL), 0);
    EXPECT(0, "down"); /* waits for what the kernel told to end, if it has not ended before */
    for (int i = 0; i < NAMES; i++)
        assert_false(is_alive(before[i]));
}

/* A pid file may name a stranger after a reboot. */
static void strangers_with_a_reused_pid_are_left_alone(void **state)
{
    (void)state;
    char path[128];
    pid_t stranger = fork();
    if (stranger == 0) {
        pause();
        _exit(0);
    }
    for (int i = 1; i < NAMES; i++) {
        snprintf(path, sizeof path, "%s/run/%s.pid", home, names[i]);
        FILE *f = fopen(path, "w");
        assert_non_null(f);
        fprintf(f, "%ld\n", (long)stranger);
        fclose(f);
    }
    EXPECT(0, "down --force");
    expect_word("was not running");
    assert_true(is_alive(stranger));
    kill(stranger, SIGKILL);
    waitpid(stranger, NULL, 0);
}

static void start_that_fails_says_why_and_leaves_nothing(void **state)
{
    (void)state;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int taken = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(taken, (struct sockaddr *)&address, length), 0);
    assert_int_equal(listen(taken, 1), 0);
    assert_int_equal(getsockname(taken, (struct sockaddr *)&address, &length), 0);
    EXPECT(2, "up --detach --model pocket=engine/pocket/model --bind tcp://127.0.0.1:%d", ntohs(address.sin_port));
    expect_word("in use");
    close(taken);
    assert_int_equal(files_in_run(), 1);
    EXPECT(2, "up --detach --model x=%s", folder);
    expect_word("model 'x'");
    EXPECT(2, "up --workers 0");
    EXPECT(2, "up --model a=/tmp --model a=/tmp");
    expect_word("given twice");
    EXPECT(2, "up --device cuda");
    expect_word("no CUDA device");
    EXPECT(2, "up --device gpu");
    expect_word("accepted are cpu, cuda, cuda:N");
    EXPECT(2, "up --placement best");
    expect_word("resident, phases, streamed");
    EXPECT(75, "up --detach --database 'postgresql:///x?host=/nowhere/at/all'");
    expect_word("/nowhere/at/all");
    assert_int_equal(files_in_run(), 1);
    EXPECT(0, "up --detach --database private"); /* ... and back */
}

static pid_t in_foreground(const char *path)
{
    pid_t pid = fork();
    if (pid == 0) {
        int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
        dup2(fd, 1);
        dup2(fd, 2);
        execl(kiln, kiln, "up", "--model", "pocket=engine/pocket/model", NULL);
        _exit(127);
    }
    return pid;
}

static void interrupt_in_the_foreground_is_down(void **state)
{
    (void)state;
    char path[128];
    int status = 0;
    snprintf(path, sizeof path, "%s/foreground", folder);
    pid_t pid = in_foreground(path);
    for (int waited = 0; !strstr(read_file(path), "kiln is up"); waited += 50) {
        if (waited > WAIT_MS)
            fail_msg("kiln up does not come up: %s", output);
        rest_ms(50);
    }
    pid_t worker = pid_of("worker-1");
    assert_true(is_alive(worker));
    assert_int_equal(kill(pid, SIGINT), 0);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    assert_non_null(strstr(read_file(path), "kiln is down"));
    assert_false(is_alive(worker));
    assert_int_equal(files_in_run(), 1);
}

/* Impatience while it starts: what was started is stopped, and the code says that a signal did it. */
static void interrupt_while_starting_leaves_nothing(void **state)
{
    (void)state;
    char path[128];
    int status = 0;
    snprintf(path, sizeof path, "%s/foreground", folder);
    pid_t pid = in_foreground(path), server = 0;
    for (int waited = 0; !(server = pid_of("postgres")) && waited < WAIT_MS; waited += 5)
        rest_ms(5);
    assert_true(server > 0);
    assert_int_equal(kill(pid, SIGINT), 0);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 128 + SIGINT);
    assert_false(is_alive(server));
    assert_int_equal(files_in_run(), 1);
}

/* --- set-up ------------------------------------------------------------------------------------------------------- */

static int start(void **state)
{
    (void)state;
    static const char *const unwanted[] = {"PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGSERVICE"};
    for (size_t i = 0; i < sizeof unwanted / sizeof *unwanted; i++)
        unsetenv(unwanted[i]);
    if (!mkdtemp(folder) || chmod(folder, 0755) != 0)
        return -1;
    snprintf(home, sizeof home, "%s/home", folder);
    return setenv("KILN_HOME", home, 1);
}

static int stop(void **state)
{
    (void)state;
    char command[128];
    run("down --force");
    snprintf(command, sizeof command, "rm -rf %s", folder);
    return system(command);
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: test_up KILN\n");
        return 2;
    }
    kiln = argv[1];
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(up_serves_and_down_leaves_nothing_running),
        cmocka_unit_test_teardown(campaign_is_rendered_and_survives_down_and_up, down_after),
        cmocka_unit_test_teardown(what_dies_is_started_again, down_after),
        cmocka_unit_test_teardown(up_works_after_everything_was_killed, down_after),
        cmocka_unit_test_teardown(nothing_runs_on_without_its_supervisor, down_after),
        cmocka_unit_test(strangers_with_a_reused_pid_are_left_alone),
        cmocka_unit_test_teardown(start_that_fails_says_why_and_leaves_nothing, down_after),
        cmocka_unit_test(interrupt_in_the_foreground_is_down),
        cmocka_unit_test(interrupt_while_starting_leaves_nothing),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
