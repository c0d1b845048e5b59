/* team_nccl.c - NCCL, opened when a team is, so that a single GPU needs no such library.
 *
 * Sums have a stream of their own, so that the backend computes meanwhile. Two events order it: a sum is behind what was asked before it
 * was begun, and what is asked after it was ended is behind the sum.
 *
 * A sum whose other rank never comes occupies the stream for ever, and with it whoever waits for the stream. So a thread looks at
 * the team and at NCCL ten times a second and aborts the communicator when the team is broken, which ends what is queued; the
 * backend's own thread then finds the reason at its next sync. It breaks the team itself when the device has failed or is late
 * (cuda_progress.h); and, on suspicion, when NCCL tells of an error, or when a sum was begun and for as long as the team's patience none
 * ends and no other rank gives a sign of life: events before and behind each sum tell. The thread of a rank that computes does, as long as
 * it believes in its device, and it is told how long others have been waiting.
 *
 * After an abort there is no communicator until all ranks join again.
 *
 * The communicator is a nonblocking one: ncclCommInitRank would wait for ever for a rank that never comes. What NCCL does in the
 * background (joining; connecting, at a first sum; leaving) is asked for until it is done, or the team is broken, or its patience ends.
 *
 * A dry device is one rank of a team that is not there: its communicator has one rank, for the bytes to be counted, and no thread. */
#include "team_nccl.h"

#include <dlfcn.h>
#include <errno.h>
#include <nccl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cuda_progress.h"

#ifndef KILN_NCCL_LIBRARY
#define KILN_NCCL_LIBRARY "libnccl.so.2"
#endif

#define LOOK_MS 100
#define ASK_NS 200000 /* between two questions whether what is in progress is done */
#define SUMS_MAX 256 /* looked after at once; beyond that, only every so often one */

struct nccl_calls {
    ncclResult_t (*unique_id)(ncclUniqueId *);
    ncclResult_t (*init_rank)(ncclComm_t *, int, ncclUniqueId, int, ncclConfig_t *);
    ncclResult_t (*all_reduce)(const void *, void *, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t);
    ncclResult_t (*async_error)(ncclComm_t, ncclResult_t *);
    ncclResult_t (*finalize)(ncclComm_t);
    ncclResult_t (*destroy)(ncclComm_t);
    ncclResult_t (*end)(ncclComm_t);
    const char *(*error_text)(ncclResult_t);
};

struct team_nccl {
    struct kern *kern;
    void *library;
    struct nccl_calls nccl;
    pthread_t watch;
    bool has_watch;
    cudaStream_t stream;                 /* of sums */
    cudaEvent_t ready[KERN_SUMS_MAX];    /* by slot: what is to be summed is there */
    cudaEvent_t summed[KERN_SUMS_MAX];
    int open, last_slot;                 /* sums that were begun and not ended */

    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t closing;
    bool is_closing;
    ncclComm_t comm;      /* NULL: none, or aborted; may still be joining */
    uint64_t breaks;      /* of the team, when comm was made */
    cudaEvent_t begun[SUMS_MAX], ended[SUMS_MAX]; /* for the thread that looks */
    uint64_t queued, done; /* sums with an event, modulo SUMS_MAX where that is */
};

static struct kern_team *team_of(const struct team_nccl *t)
{
    return t->kern->team;
}

static uint64_t breaks_of(const struct kern *k)
{
    return k->team ? kern_team_breaks(k->team) : 0;
}

/* A dry device's other rank never fails. */
static int patience_ms(const struct team_nccl *t)
{
    return team_of(t) ? kern_team_patience_ms(team_of(t)) : KERN_TEAM_PATIENCE_MS;
}

/* --- the library ------------------------------------------------------------------------------------------- */

static bool find_calls(struct team_nccl *t)
{
    const struct { const char *name; void **to; } calls[] = {
        {"ncclGetUniqueId", (void **)&t->nccl.unique_id}, {"ncclCommInitRankConfig", (void **)&t->nccl.init_rank},
        {"ncclAllReduce", (void **)&t->nccl.all_reduce},  {"ncclCommGetAsyncError", (void **)&t->nccl.async_error},
        {"ncclCommFinalize", (void **)&t->nccl.finalize}, {"ncclCommDestroy", (void **)&t->nccl.destroy},
        {"ncclCommAbort", (void **)&t->nccl.end},         {"ncclGetErrorString", (void **)&t->nccl.error_text},
    };
    t->library = dlopen(KILN_NCCL_LIBRARY, RTLD_NOW | RTLD_LOCAL);
    bool ok = t->library != NULL;
    for (size_t i = 0; ok && i < sizeof calls / sizeof calls[0]; i++)
        ok = (*calls[i].to = dlsym(t->library, calls[i].name)) != NULL;
    if (!ok)
        kern_ops_fail(t->kern, "a team of GPUs needs NCCL, which cannot be opened (%s); install libnccl2 or render on one GPU",
                      dlerror());
    return ok;
}

/* What the device itself says. Of an event that no capture knows; whether it has come does not matter. */
static cudaError_t health(const struct team_nccl *t)
{
    cudaError_t status = cuda_progress_ask(t->summed[0]);
    return status == cudaErrorNotReady ? cudaSuccess : status;
}

/* NCCL knows only that its call failed: where the device did, that is why. */
static bool check(struct team_nccl *t, ncclResult_t result, const char *what)
{
    if (result == ncclSuccess)
        return true;
    if (cuda_check(t->kern, health(t), what))
        kern_ops_suspect(t->kern, "device failed: NCCL: %s: %s", what, t->nccl.error_text(result));
    return false;
}

/* The team is broken: the backend has its reason, if it has none of its own. */
static bool fail_with_team(struct team_nccl *t)
{
    return cuda_check(t->kern, health(t), "a sum of the team") && kern_ops_follow(t->kern);
}

static ncclResult_t ask(struct team_nccl *t)
{
    ncclResult_t state = ncclSuccess, error;
    pthread_mutex_lock(&t->lock);
    if (t->comm && (error = t->nccl.async_error(t->comm, &state)) != ncclSuccess)
        state = error;
    pthread_mutex_unlock(&t->lock);
    return state;
}

/* What was begun on the communicator and may be in progress, until it is done. No call but this is made on it before. */
static bool settle(struct team_nccl *t, ncclResult_t result, const char *what)
{
    int64_t begun_ms = kern_team_now_ms();
    while (result == ncclInProgress && t->breaks == breaks_of(t->kern)) {
        if (kern_team_now_ms() - begun_ms > patience_ms(t)) {
            kern_ops_suspect(t->kern, "device failed: NCCL: %s: another rank did not come for %.1f s", what, patience_ms(t) / 1e3);
            return false;
        }
        nanosleep(&(struct timespec){0, ASK_NS}, NULL);
        result = ask(t);
    }
    return t->breaks == breaks_of(t->kern) ? check(t, result, what) : fail_with_team(t);
}

/* --- the thread that looks ------------------------------------------------------------------------------------ */

/* Ends all that is queued. A call that blocks may hold the lock: then without it. */
static void abort_comm(struct team_nccl *t)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 1;
    bool has_lock = pthread_mutex_timedlock(&t->lock, &until) == 0;
    ncclComm_t comm = t->comm;
    t->comm = NULL;
    if (comm)
        t->nccl.end(comm);
    if (has_lock)
        pthread_mutex_unlock(&t->lock);
}

/* Under the lock: how many sums have ended. */
static uint64_t count_done(struct team_nccl *t)
{
    while (t->done < t->queued && cuda_progress_ask(t->ended[t->done % SUMS_MAX]) != cudaErrorNotReady)
        t->done++;
    return t->done;
}

/* Under the lock: does the device still compute what the next sum is of? */
static bool is_computing(struct team_nccl *t)
{
    return t->done < t->queued && cuda_progress_ask(t->begun[t->done % SUMS_MAX]) == cudaErrorNotReady;
}

struct look {
    uint64_t done;
    int64_t since_ms; /* since then no sum has ended though one was begun */
};

/* What the device does itself: it fails, which is the reason whatever was noticed before; or it is late; false then. A rank that waits in
 * a sum does nothing itself. */
static bool look_at_device(struct team_nccl *t, bool is_waiting)
{
    char why[sizeof t->kern->error];
    struct cuda_progress *progress = cuda_progress_of(t->kern);
    cudaError_t status = health(t);
    if (is_waiting)
        cuda_progress_excuse(progress);
    enum cuda_progress_state state = cuda_progress_look(progress, why, sizeof why);
    if (status != cudaSuccess)
        cuda_sentence(t->kern, status, "work of the team", why, sizeof why);
    bool is_late = status == cudaSuccess && state == CUDA_PROGRESS_LATE;
    if (is_late)
        kern_team_set_stuck(team_of(t)); /* before others learn that they are to close */
    if (is_late || status != cudaSuccess) {
        kern_team_break(team_of(t), t->kern->rank, why);
        return false;
    }
    if (state == CUDA_PROGRESS_AT_WORK && !is_waiting)
        kern_ops_beat(t->kern);
    return true;
}

/* The others are told where the device is. */
static void tell_pace(struct team_nccl *t, bool has_gone_on, bool is_waiting)
{
    if (has_gone_on)
        kern_team_go(team_of(t), t->kern->rank);
    if (is_waiting)
        kern_team_come(team_of(t), t->kern->rank);
}

/* The others neither come nor live. */
static bool is_silent(const struct team_nccl *t, const struct look *l)
{
    return kern_team_now_ms() - l->since_ms > patience_ms(t) && kern_team_others_silent_ms(team_of(t), t->kern->rank) > patience_ms(t);
}

static void look(struct team_nccl *t, struct look *l)
{
    ncclResult_t error = ncclSuccess;
    char why[96];
    pthread_mutex_lock(&t->lock);
    uint64_t done = count_done(t);
    bool is_idle = done == t->queued, is_busy = is_computing(t), has_comm = t->comm != NULL;
    bool is_stale = has_comm && t->breaks != breaks_of(t->kern);
    if (has_comm && !is_stale)
        t->nccl.async_error(t->comm, &error);
    pthread_mutex_unlock(&t->lock);
    bool is_waiting = !is_idle && !is_busy;
    tell_pace(t, done != l->done, is_waiting);
    bool gets_on = look_at_device(t, is_waiting);
    if ((gets_on && is_busy) || done != l->done)
        kern_ops_beat(t->kern);
    if (!is_waiting || done != l->done)
        l->since_ms = kern_team_now_ms();
    l->done = done;
    if (is_stale) {
        abort_comm(t);
    } else if (error != ncclSuccess && error != ncclInProgress) {
        snprintf(why, sizeof why, "device failed: NCCL: %s", t->nccl.error_text(error));
        kern_team_suspect(team_of(t), t->kern->rank, why);
    } else if (has_comm && is_silent(t, l)) {
        snprintf(why, sizeof why, "device failed: a sum of the team does not end, for %.1f s", patience_ms(t) / 1e3);
        kern_team_suspect(team_of(t), t->kern->rank, why);
    }
}

static void *watch_main(void *argument)
{
    struct team_nccl *t = argument;
    struct look l = {.since_ms = kern_team_now_ms()};
    bool is_closing = false;
    cuda_stream(t->kern); /* on the backend's device */
    while (!is_closing) {
        look(t, &l);
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += LOOK_MS * 1000000L;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        pthread_mutex_lock(&t->lock);
        while (!t->is_closing && pthread_cond_timedwait(&t->closing, &t->lock, &until) != ETIMEDOUT)
            ;
        is_closing = t->is_closing;
        pthread_mutex_unlock(&t->lock);
    }
    return NULL;
}

/* --- life ------------------------------------------------------------------------------------------------------- */

/* Of the highest priority: little work that much waits for. */
static bool make_stream(struct team_nccl *t)
{
    int least, greatest;
    return cuda_check(t->kern, cudaDeviceGetStreamPriorityRange(&least, &greatest), "a stream") &&
           cuda_check(t->kern, cudaStreamCreateWithPriority(&t->stream, cudaStreamNonBlocking, greatest), "a stream");
}

static bool make_events(struct team_nccl *t, cudaEvent_t *events, int count)
{
    bool ok = true;
    for (int i = 0; ok && i < count; i++)
        ok = cuda_check(t->kern, cudaEventCreateWithFlags(&events[i], cudaEventDisableTiming), "an event");
    return ok;
}

static void drop_events(cudaEvent_t *events, int count)
{
    for (int i = 0; i < count && events[i]; i++)
        cudaEventDestroy(events[i]);
}

struct team_nccl *team_nccl_open(struct kern *k)
{
    struct team_nccl *t = calloc(1, sizeof *t);
    if (!t) {
        kern_ops_fail(k, "no memory for a team");
        return NULL;
    }
    t->kern = k;
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->closing, NULL);
    cuda_stream(k);
    bool ok = find_calls(t) && make_stream(t) && make_events(t, t->ready, KERN_SUMS_MAX) && make_events(t, t->summed, KERN_SUMS_MAX) &&
              make_events(t, t->begun, SUMS_MAX) && make_events(t, t->ended, SUMS_MAX);
    if (ok && !k->team)
        return t;
    if (ok) {
        t->has_watch = pthread_create(&t->watch, NULL, watch_main, t) == 0;
        if (t->has_watch)
            return t;
        kern_ops_fail(k, "no memory for a thread");
    }
    team_nccl_close(t);
    return NULL;
}

/* It may be in a call that does not return, as aborting does not while the device is stuck; but what others close it does not use then. */
void team_nccl_leave(struct team_nccl *t)
{
    struct timespec until;
    if (!t)
        return;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 1;
    bool has_lock = pthread_mutex_timedlock(&t->lock, &until) == 0;
    t->is_closing = true;
    pthread_cond_signal(&t->closing);
    if (has_lock)
        pthread_mutex_unlock(&t->lock);
    until.tv_sec += 1;
    if (t->has_watch)
        pthread_timedjoin_np(t->watch, NULL, &until);
}

/* Nobody else uses it any more. */
static void close_comm(struct team_nccl *t)
{
    bool is_whole = t->comm && t->breaks == breaks_of(t->kern);
    if (is_whole && settle(t, t->nccl.finalize(t->comm), "leaving a team"))
        t->nccl.destroy(t->comm);
    else if (t->comm)
        t->nccl.end(t->comm);
    t->comm = NULL;
}

void team_nccl_close(struct team_nccl *t)
{
    if (!t)
        return;
    pthread_mutex_lock(&t->lock);
    t->is_closing = true;
    pthread_cond_signal(&t->closing);
    pthread_mutex_unlock(&t->lock);
    if (t->has_watch)
        pthread_join(t->watch, NULL);
    cuda_stream(t->kern);
    close_comm(t);
    if (t->stream)
        cudaStreamDestroy(t->stream);
    drop_events(t->ready, KERN_SUMS_MAX);
    drop_events(t->summed, KERN_SUMS_MAX);
    drop_events(t->begun, SUMS_MAX);
    drop_events(t->ended, SUMS_MAX);
    if (t->library)
        dlclose(t->library);
    pthread_cond_destroy(&t->closing);
    pthread_mutex_destroy(&t->lock);
    free(t);
}

/* --- joining and summing ------------------------------------------------------------------------------------------ */

/* The first rank's id, told in meetings. */
static bool share_id(struct team_nccl *t, ncclUniqueId *id)
{
    int64_t words[sizeof *id / sizeof(int64_t)], all[KERN_TEAM_MAX];
    memset(words, 0, sizeof words);
    if (t->kern->rank == 0 && !check(t, t->nccl.unique_id(id), "an id for a team"))
        return false;
    if (t->kern->rank == 0)
        memcpy(words, id, sizeof words);
    for (size_t i = 0; t->kern->team && i < sizeof words / sizeof words[0]; i++) {
        if (!kern_ops_meet(t->kern, words[i], all))
            return false;
        words[i] = all[0];
    }
    memcpy(id, words, sizeof *id);
    return true;
}

/* The first sum makes NCCL take its memory, before anybody asks how much is left. */
static bool first_sum(struct team_nccl *t)
{
    struct kern *k = t->kern;
    struct tensor none = tensor_1d(cuda_alloc(k, sizeof(float)), TENSOR_F32, 1);
    if (none.data && cuda_check(k, cudaMemsetAsync(none.data, 0, sizeof(float), cuda_stream(k)), "the first sum of a team"))
        team_nccl_sum(k, none, 0), team_nccl_sum_end(k, 0);
    bool ok = kern_sync(k);
    cuda_free(k, none.data);
    return ok;
}

/* Begins to join; the communicator is there at once, to be aborted. */
static ncclResult_t begin_to_join(struct team_nccl *t, ncclUniqueId id)
{
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    ncclComm_t comm = NULL;
    config.blocking = 0;
    ncclResult_t result = t->nccl.init_rank(&comm, team_of(t) ? t->kern->ranks : 1, id, t->kern->rank, &config);
    pthread_mutex_lock(&t->lock);
    t->comm = comm;
    pthread_mutex_unlock(&t->lock);
    return result;
}

bool team_nccl_join(struct kern *k)
{
    struct team_nccl *t = cuda_team(k);
    ncclUniqueId id;
    uint64_t breaks = breaks_of(k);
    pthread_mutex_lock(&t->lock);
    bool is_joined = t->comm && t->breaks == breaks;
    pthread_mutex_unlock(&t->lock);
    if (is_joined)
        return true;
    abort_comm(t);
    cuda_stream(k);
    cudaStreamSynchronize(t->stream); /* what was aborted is over */
    pthread_mutex_lock(&t->lock);
    t->breaks = breaks;
    pthread_mutex_unlock(&t->lock);
    return share_id(t, &id) && settle(t, begin_to_join(t, id), "making a team") && first_sum(t);
}

/* Under the lock: an event before the sum, if two are free for it: all of them may be in flight. */
static bool mark_begin(struct team_nccl *t)
{
    return t->queued - count_done(t) < SUMS_MAX &&
           cuda_check(t->kern, cudaEventRecord(t->begun[t->queued % SUMS_MAX], t->stream), "a sum of the team");
}

/* And one behind it. */
static void mark_end(struct team_nccl *t)
{
    pthread_mutex_lock(&t->lock);
    if (cuda_check(t->kern, cudaEventRecord(t->ended[t->queued % SUMS_MAX], t->stream), "a sum of the team"))
        t->queued++;
    pthread_mutex_unlock(&t->lock);
}

/* In the stream of sums, behind what the backend was asked before. */
static void add(struct team_nccl *t, struct tensor x)
{
    ncclDataType_t type = x.dtype == TENSOR_F32 ? ncclFloat32 : ncclBfloat16;
    ncclResult_t result = ncclSuccess;
    pthread_mutex_lock(&t->lock);
    bool is_whole = t->comm && t->breaks == breaks_of(t->kern), is_marked = is_whole && mark_begin(t);
    if (is_whole)
        result = t->nccl.all_reduce(x.data, x.data, (size_t)tensor_count(x), type, ncclSum, t->comm, t->stream);
    pthread_mutex_unlock(&t->lock);
    if (!is_whole)
        fail_with_team(t);
    else if (settle(t, result, "a sum of the team") && is_marked)
        mark_end(t);
}

void team_nccl_sum(struct kern *k, struct tensor x, int slot)
{
    struct team_nccl *t = cuda_team(k);
    if (cuda_check(k, cudaEventRecord(t->ready[slot], cuda_stream(k)), "a sum of the team") &&
        cuda_check(k, cudaStreamWaitEvent(t->stream, t->ready[slot], 0), "a sum of the team"))
        add(t, x);
    if (!k->failed && cuda_check(k, cudaEventRecord(t->summed[slot], t->stream), "a sum of the team"))
        t->open++, t->last_slot = slot;
}

void team_nccl_sum_end(struct kern *k, int slot)
{
    struct team_nccl *t = cuda_team(k);
    if (cuda_check(k, cudaStreamWaitEvent(cuda_stream(k), t->summed[slot], 0), "a sum of the team"))
        t->open--;
}

/* Sums end in their order: behind the last are all. */
void team_nccl_settle(struct team_nccl *t)
{
    if (t && t->open) {
        cudaStreamWaitEvent(cuda_stream(t->kern), t->summed[t->last_slot], 0);
        t->open = 0;
    }
}
