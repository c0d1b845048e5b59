/* Tests of ops/daemon/clock.c. Deadlines, backoffs and leases pace themselves by it: a clock that follows the wall clock
 * back would make a farm wait for an hour when summer ends. */
#include "clock.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

static void time_only_goes_forward(void **state)
{
    (void)state;
    int64_t last_ms = clock_ms();
    double last_s = clock_s();
    for (int i = 0; i < 100000; i++) {
        int64_t ms = clock_ms();
        double s = clock_s();
        assert_true(ms >= last_ms);
        assert_true(s >= last_s);
        last_ms = ms;
        last_s = s;
    }
}

static void both_readings_are_one_clock(void **state)
{
    (void)state;
    int64_t before = clock_ms();
    double s = clock_s();
    int64_t after = clock_ms();
    assert_true((double)before / 1000 <= s + 0.001);
    assert_true(s <= (double)(after + 1) / 1000);
}

static void a_sleep_is_not_shorter_than_asked_and_none_for_nothing(void **state)
{
    (void)state;
    struct timespec from, to;
    clock_gettime(CLOCK_MONOTONIC, &from);
    clock_sleep_ms(30);
    clock_gettime(CLOCK_MONOTONIC, &to);
    assert_true((to.tv_sec - from.tv_sec) * 1000000000LL + to.tv_nsec - from.tv_nsec >= 30000000);
    clock_sleep_ms(0);
    clock_sleep_ms(-1000); /* a deadline that has passed */
}

static void on_alarm(int number)
{
    (void)number;
}

static void a_signal_does_not_shorten_a_sleep(void **state)
{
    (void)state;
    struct sigaction action = {.sa_handler = on_alarm}, old;
    sigaction(SIGALRM, &action, &old);
    struct itimerval every = {{0, 5000}, {0, 5000}}, never = {{0, 0}, {0, 0}};
    int64_t from = clock_ms();
    setitimer(ITIMER_REAL, &every, NULL);
    clock_sleep_ms(60);
    setitimer(ITIMER_REAL, &never, NULL);
    sigaction(SIGALRM, &old, NULL);
    assert_true(clock_ms() - from >= 59);
}

static void *epoch_of_thread(void *context)
{
    *(uint64_t *)context = clock_boot_epoch();
    return NULL;
}

/* name + epoch is a worker's identity: two lives under one epoch would be taken for one. */
static void an_epoch_belongs_to_one_process(void **state)
{
    (void)state;
    enum { COUNT = 20 };
    uint64_t all[COUNT];
    for (int i = 0; i < COUNT; i++) { /* before this process asked for its own */
        int ends[2];
        assert_int_equal(pipe(ends), 0);
        pid_t pid = fork();
        if (pid == 0) {
            uint64_t mine = clock_boot_epoch();
            _exit(write(ends[1], &mine, sizeof mine) != sizeof mine);
        }
        assert_int_equal(read(ends[0], &all[i], sizeof all[i]), sizeof all[i]);
        close(ends[0]);
        close(ends[1]);
        assert_int_equal(waitpid(pid, NULL, 0), pid);
        assert_true(all[i] != 0);
        assert_true(all[i] <= INT64_MAX); /* the database keeps it as a bigint */
        for (int j = 0; j < i; j++)
            assert_true(all[i] > all[j]); /* later lives are later */
    }
    uint64_t seen[4];
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, epoch_of_thread, &seen[i]), 0);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < 4; i++)
        assert_true(seen[i] == clock_boot_epoch());
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(time_only_goes_forward),
        cmocka_unit_test(both_readings_are_one_clock),
        cmocka_unit_test(a_sleep_is_not_shorter_than_asked_and_none_for_nothing),
        cmocka_unit_test(a_signal_does_not_shorten_a_sleep),
        cmocka_unit_test(an_epoch_belongs_to_one_process),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
