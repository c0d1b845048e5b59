/* clock.c - CLOCK_MONOTONIC in milliseconds; the wall clock is read for the boot epoch only. */
#include "clock.h"

#include <errno.h>
#include <pthread.h>
#include <time.h>
#include <unistd.h>

double clock_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int64_t clock_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

void clock_sleep_ms(int64_t ms)
{
    if (ms <= 0)
        return;
    struct timespec left = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    while (nanosleep(&left, &left) != 0 && errno == EINTR)
        continue;
}

static uint64_t epoch;

static void epoch_set(void)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    /* Two processes started in one microsecond still differ by their pid. */
    epoch = ((uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000) * 16 + (uint64_t)getpid() % 16 + 1;
}

uint64_t clock_boot_epoch(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, epoch_set);
    return epoch;
}
