/* kern_team.c - meetings under one lock. Who comes last moves the round on; the others spin a little, as meetings within an
 * operation follow each other within microseconds, and sleep then, looking now and again whether the missing ones are alive. */
#include "kern_team.h"

#include <assert.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cpu.h"

#define SPIN_COUNT 2000
#define LOOK_MS 20

struct meeting {
    atomic_ullong round;
    int arrived;
    bool is_here[KERN_TEAM_MAX];
    int64_t told[KERN_TEAM_MAX], heard[KERN_TEAM_MAX];
};

struct heart {
    _Alignas(64) atomic_llong last_ms; /* its last beat; on a cache line of its own */
};

/* Where a rank waits for the others; under the lock. */
struct pace {
    bool is_in_meeting, is_in_sum;
    int64_t together_ms;        /* when it was with all others last */
    int64_t came_ms, took_ms;   /* it waits since then, and had come within this */
};

struct kern_team {
    int ranks, patience_ms;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct meeting work, repair; /* of a broken team there is only the second */
    atomic_bool is_broken, is_stuck;
    atomic_ullong breaks;
    int breaker;
    bool is_suspicion; /* the reason */
    char why[256];
    struct heart hearts[KERN_TEAM_MAX];
    struct pace paces[KERN_TEAM_MAX];
};

int64_t kern_team_now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

struct kern_team *kern_team_open(int ranks, int patience_ms)
{
    assert(ranks >= 1 && ranks <= KERN_TEAM_MAX);
    struct kern_team *t = aligned_alloc(_Alignof(struct kern_team), sizeof *t);
    pthread_condattr_t monotonic;
    if (!t)
        return NULL;
    memset(t, 0, sizeof *t);
    t->ranks = ranks;
    t->patience_ms = patience_ms;
    for (int i = 0; i < ranks; i++) {
        kern_team_beat(t, i);
        t->paces[i].together_ms = kern_team_now_ms();
    }
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    return t;
}

void kern_team_close(struct kern_team *t)
{
    if (!t)
        return;
    pthread_cond_destroy(&t->changed);
    pthread_mutex_destroy(&t->lock);
    free(t);
}

int kern_team_ranks(const struct kern_team *t)
{
    return t->ranks;
}

int kern_team_patience_ms(const struct kern_team *t)
{
    return t->patience_ms;
}

void kern_team_beat(struct kern_team *t, int rank)
{
    atomic_store_explicit(&t->hearts[rank].last_ms, kern_team_now_ms(), memory_order_relaxed);
}

int64_t kern_team_silent_ms(const struct kern_team *t, int rank)
{
    return kern_team_now_ms() - atomic_load_explicit(&t->hearts[rank].last_ms, memory_order_relaxed);
}

int64_t kern_team_others_silent_ms(const struct kern_team *t, int rank)
{
    int64_t least = INT64_MAX;
    for (int i = 0; i < t->ranks; i++) {
        int64_t ms = i == rank ? INT64_MAX : kern_team_silent_ms(t, i);
        least = ms < least ? ms : least;
    }
    return least;
}

/* --- pace --------------------------------------------------------------------------------------------------- */

static void come_to(struct pace *p, bool *ret_is_there)
{
    if (!p->is_in_meeting && !p->is_in_sum) {
        p->came_ms = kern_team_now_ms();
        p->took_ms = p->came_ms - p->together_ms;
    }
    *ret_is_there = true;
}

static void go_from(struct pace *p, bool *ret_is_there)
{
    p->together_ms = kern_team_now_ms();
    *ret_is_there = false;
}

void kern_team_come(struct kern_team *t, int rank)
{
    pthread_mutex_lock(&t->lock);
    come_to(&t->paces[rank], &t->paces[rank].is_in_sum);
    pthread_mutex_unlock(&t->lock);
}

void kern_team_go(struct kern_team *t, int rank)
{
    pthread_mutex_lock(&t->lock);
    go_from(&t->paces[rank], &t->paces[rank].is_in_sum);
    pthread_mutex_unlock(&t->lock);
}

int64_t kern_team_awaited_ms(struct kern_team *t, int rank, int64_t *ret_took_ms)
{
    int64_t least = INT64_MAX, now_ms = kern_team_now_ms();
    *ret_took_ms = 0;
    pthread_mutex_lock(&t->lock);
    for (int i = 0; i < t->ranks; i++) {
        const struct pace *p = &t->paces[i];
        int64_t ms = i == rank ? INT64_MAX : p->is_in_meeting || p->is_in_sum ? now_ms - p->came_ms : 0;
        *ret_took_ms = i != rank && p->took_ms > *ret_took_ms ? p->took_ms : *ret_took_ms;
        least = ms < least ? ms : least;
    }
    pthread_mutex_unlock(&t->lock);
    return t->ranks > 1 ? least : 0;
}

/* --- breaking ---------------------------------------------------------------------------------------------- */

bool kern_team_is_broken(const struct kern_team *t)
{
    return atomic_load(&t->is_broken);
}

uint64_t kern_team_breaks(const struct kern_team *t)
{
    return atomic_load(&t->breaks);
}

static void break_locked(struct kern_team *t, int rank, const char *why, bool is_suspicion)
{
    bool is_broken = kern_team_is_broken(t);
    if (is_broken && (is_suspicion || !t->is_suspicion))
        return;
    snprintf(t->why, sizeof t->why, "%s (rank %d of %d)", why, rank, t->ranks);
    t->breaker = rank;
    t->is_suspicion = is_suspicion;
    if (is_broken)
        return;
    atomic_fetch_add(&t->breaks, 1);
    atomic_store(&t->is_broken, true);
    pthread_cond_broadcast(&t->changed);
}

void kern_team_break(struct kern_team *t, int rank, const char *why)
{
    pthread_mutex_lock(&t->lock);
    break_locked(t, rank, why, false);
    pthread_mutex_unlock(&t->lock);
}

void kern_team_suspect(struct kern_team *t, int rank, const char *why)
{
    pthread_mutex_lock(&t->lock);
    break_locked(t, rank, why, true);
    pthread_mutex_unlock(&t->lock);
}

static void break_silent_locked(struct kern_team *t, int rank)
{
    char why[96];
    snprintf(why, sizeof why, "device failed: no sign of life for %.1f s", t->patience_ms / 1e3);
    break_locked(t, rank, why, true);
}

void kern_team_break_silent(struct kern_team *t, int rank)
{
    pthread_mutex_lock(&t->lock);
    break_silent_locked(t, rank);
    pthread_mutex_unlock(&t->lock);
}

bool kern_team_why(struct kern_team *t, char *ret, size_t ret_bytes, int *ret_rank)
{
    pthread_mutex_lock(&t->lock);
    bool is_broken = kern_team_is_broken(t);
    if (is_broken)
        snprintf(ret, ret_bytes, "%s", t->why);
    if (is_broken && ret_rank)
        *ret_rank = t->breaker;
    pthread_mutex_unlock(&t->lock);
    return is_broken;
}

void kern_team_set_stuck(struct kern_team *t)
{
    atomic_store(&t->is_stuck, true);
}

bool kern_team_is_stuck(const struct kern_team *t)
{
    return atomic_load(&t->is_stuck);
}

/* --- meeting ----------------------------------------------------------------------------------------------- */

static void spin(struct kern_team *t, const struct meeting *m, uint64_t round)
{
    for (int i = 0; i < SPIN_COUNT && atomic_load(&m->round) == round && !kern_team_is_broken(t); i++)
        cpu_pause();
}

static void sleep_locked(struct kern_team *t)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += LOOK_MS * 1000000L;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_cond_timedwait(&t->changed, &t->lock, &until);
}

/* How long it has been since any of those who are not here gave a sign of life; *ret_missing is one of them. */
static int64_t silent_ms(const struct kern_team *t, const struct meeting *m, int *ret_missing)
{
    int64_t least = INT64_MAX;
    for (int i = 0; i < t->ranks; i++) {
        int64_t ms = m->is_here[i] ? INT64_MAX : kern_team_silent_ms(t, i);
        *ret_missing = m->is_here[i] ? *ret_missing : i;
        least = ms < least ? ms : least;
    }
    return least;
}

/* Until the round is over, the meeting is called off, or those who are missing have been silent for too long while we were waiting. */
static bool wait_locked(struct kern_team *t, struct meeting *m, uint64_t round)
{
    int missing = 0;
    int64_t begun_ms = kern_team_now_ms();
    while (atomic_load(&m->round) == round) {
        if (m == &t->work && kern_team_is_broken(t))
            return false;
        sleep_locked(t);
        if (atomic_load(&m->round) != round)
            break;
        bool is_long = kern_team_now_ms() - begun_ms > t->patience_ms;
        if (is_long && silent_ms(t, m, &missing) > t->patience_ms) {
            break_silent_locked(t, missing);
            return false;
        }
    }
    return true;
}

/* Everybody is here: of a broken team nobody is in the other meeting. */
static void mend_locked(struct kern_team *t)
{
    memset(t->work.is_here, 0, sizeof t->work.is_here);
    t->work.arrived = 0;
    atomic_store(&t->is_broken, false);
}

static void end_round(struct kern_team *t, struct meeting *m)
{
    if (m == &t->repair && kern_team_is_broken(t))
        mend_locked(t);
    memcpy(m->heard, m->told, sizeof m->heard);
    memset(m->is_here, 0, sizeof m->is_here);
    m->arrived = 0;
    atomic_fetch_add(&m->round, 1);
    pthread_cond_broadcast(&t->changed);
}

/* True with the lock held: all have come. False with the lock held: they have not. */
static bool come_locked(struct kern_team *t, struct meeting *m, int rank, int64_t number)
{
    uint64_t round = atomic_load(&m->round);
    struct pace *pace = &t->paces[rank];
    come_to(pace, &pace->is_in_meeting);
    m->told[rank] = number;
    m->is_here[rank] = true;
    bool ok = ++m->arrived == t->ranks;
    if (ok) {
        end_round(t, m);
    } else {
        pthread_mutex_unlock(&t->lock);
        spin(t, m, round);
        pthread_mutex_lock(&t->lock);
        ok = wait_locked(t, m, round);
    }
    go_from(pace, &pace->is_in_meeting);
    return ok;
}

bool kern_team_meet(struct kern_team *t, int rank, int64_t number, int64_t *ret)
{
    kern_team_beat(t, rank);
    pthread_mutex_lock(&t->lock);
    bool ok = !kern_team_is_broken(t) && come_locked(t, &t->work, rank, number);
    kern_team_beat(t, rank); /* it may have waited for long */
    if (ok)
        memcpy(ret, t->work.heard, (size_t)t->ranks * sizeof *ret); /* the next round ends with us at the earliest */
    pthread_mutex_unlock(&t->lock);
    return ok;
}

bool kern_team_mend(struct kern_team *t, int rank)
{
    kern_team_beat(t, rank);
    pthread_mutex_lock(&t->lock);
    bool ok = come_locked(t, &t->repair, rank, 0);
    kern_team_beat(t, rank);
    if (!ok) { /* it may come again */
        t->repair.is_here[rank] = false;
        t->repair.arrived--;
    }
    pthread_mutex_unlock(&t->lock);
    return ok;
}
