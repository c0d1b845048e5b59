/* cuda_progress.c - marks in the stream of work, and a clock that begins anew whenever one is passed.
 *
 * A kernel that never ends would keep everybody who waits for its stream, and CUDA has no wait with an end. So waiting is asking, again
 * and again, whether an event has come; what lies between two marks may take
 *
 *   60 s, or 7 s where a team sums the shares of its ranks, which must end within 10 s, and 2 s for each TFLOP of products in it:
 *
 * half a TFLOP/s, where the slowest GPU with sm_80 or later has ten; everything but products takes milliseconds. Between two marks are
 * at most LAUNCHES_MAX launches or MARK_FLOPS and one operation, or one graph: a whole step. So one device that hangs in a step of klein-4B
 * at 1024x1024 is given up after 130 s, of klein-9B after 211; a team, whose sums are not in graphs, after 9. KILN_CUDA_PATIENCE_S is
 * instead of the 60 and the 7.
 *
 * Never are more than MARKS_MAX marks ahead: with some 1000 launches queued a launch itself would wait, where nobody could look. They
 * are 13 TFLOP or 256 launches, far more than the device does before whoever waits looks again.
 *
 * In a team it is the thread of team_nccl.c that judges, for it knows whether a sum waits for another rank; and who waits goes on waiting
 * until the team is broken. A device that is late then is stuck. Where ranks hold the whole model, their passes are graphs: one that hangs
 * in its pass is given up as a device alone is, though its team is broken before. */
#include "cuda_progress.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "cuda_graph.h"

#define PATIENCE_MS 60000
#define PATIENCE_OF_SHARES_MS 7000
#define MS_PER_TFLOP 2000
#define MARK_FLOPS 2e11
#define LAUNCHES_MAX 4
#define MARKS_MAX 64
#define PATIENCE_S_MAX 86400
#define ASK_MIN_NS 10000
#define ASK_MAX_NS 200000

struct mark {
    cudaEvent_t event;
    int64_t allowed_ms; /* for what is before it, behind the mark before */
};

struct cuda_progress {
    struct kern *kern;
    int64_t given_ms; /* KILN_CUDA_PATIENCE_S; or 0 */
    int launches;     /* since the last mark */
    atomic_bool is_stuck; /* this device; the team has its own */

    pthread_mutex_t lock; /* guards what follows */
    struct mark marks[MARKS_MAX];
    uint64_t set, passed; /* modulo MARKS_MAX where it is */
    int64_t since_ms;     /* the last one was passed, or the first of those ahead was set */
};

/* --- asking ---------------------------------------------------------------------------------------------------- */

cudaError_t cuda_progress_ask(cudaEvent_t event)
{
    cudaError_t status = cudaEventQuery(event);
    if (status == cudaErrorNotReady)
        cudaGetLastError();
    return status;
}

static void pass_locked(struct cuda_progress *p)
{
    while (p->passed < p->set && cuda_progress_ask(p->marks[p->passed % MARKS_MAX].event) != cudaErrorNotReady) {
        p->passed++;
        p->since_ms = kern_team_now_ms();
    }
}

enum cuda_progress_state cuda_progress_look(struct cuda_progress *p, char *why, size_t why_bytes)
{
    enum cuda_progress_state state = CUDA_PROGRESS_IDLE;
    pthread_mutex_lock(&p->lock);
    pass_locked(p);
    int64_t waited_ms = kern_team_now_ms() - p->since_ms, allowed_ms = p->marks[p->passed % MARKS_MAX].allowed_ms;
    if (p->passed < p->set)
        state = waited_ms > allowed_ms ? CUDA_PROGRESS_LATE : CUDA_PROGRESS_AT_WORK;
    pthread_mutex_unlock(&p->lock);
    if (state == CUDA_PROGRESS_LATE)
        snprintf(why, why_bytes, "device failed: %s: nothing it was asked has ended for %.1f s: a kernel hangs", p->kern->name, (double)waited_ms / 1e3);
    return state;
}

void cuda_progress_excuse(struct cuda_progress *p)
{
    pthread_mutex_lock(&p->lock);
    p->since_ms = kern_team_now_ms();
    pthread_mutex_unlock(&p->lock);
}

bool cuda_progress_is_stuck(const struct cuda_progress *p)
{
    return p && (atomic_load(&p->is_stuck) || (p->kern->team && kern_team_is_stuck(p->kern->team)));
}

/* --- waiting ---------------------------------------------------------------------------------------------------- */

/* Is there nothing to wait for any more? */
static bool gives_up(struct cuda_progress *p)
{
    struct kern *k = p->kern;
    char why[sizeof k->error];
    if ((k->team && !kern_team_is_broken(k->team)) || cuda_progress_look(p, why, sizeof why) != CUDA_PROGRESS_LATE)
        return false;
    atomic_store(&p->is_stuck, true);
    if (k->team)
        kern_team_set_stuck(k->team);
    kern_ops_fail(k, "%s", why); /* better than what others suspect */
    return true;
}

static bool has_passed(struct cuda_progress *p, uint64_t until)
{
    pthread_mutex_lock(&p->lock);
    pass_locked(p);
    bool yes = p->passed >= until;
    pthread_mutex_unlock(&p->lock);
    return yes;
}

/* Until so many marks were passed, or the event has come. */
static bool wait_for(struct cuda_progress *p, uint64_t until, cudaEvent_t event)
{
    long ns = ASK_MIN_NS;
    while (event ? cuda_progress_ask(event) == cudaErrorNotReady : !has_passed(p, until)) {
        if (gives_up(p))
            return false;
        nanosleep(&(struct timespec){0, ns}, NULL);
        ns = 2 * ns < ASK_MAX_NS ? 2 * ns : ASK_MAX_NS;
    }
    return true;
}

bool cuda_progress_wait(struct cuda_progress *p, cudaEvent_t event)
{
    if (!p || p->kern->is_dry)
        return true;
    if (atomic_load(&p->is_stuck)) { /* whatever error was got over */
        kern_ops_fail(p->kern, "device failed: %s hangs", p->kern->name);
        return false;
    }
    if (event && cuda_progress_ask(event) != cudaErrorNotReady)
        return true;
    cuda_progress_mark(p); /* so that all that is waited for is before one */
    return !atomic_load(&p->is_stuck) && wait_for(p, p->set, event);
}

/* --- marks ------------------------------------------------------------------------------------------------------ */

static int64_t allowed_ms(const struct cuda_progress *p)
{
    const struct kern *k = p->kern;
    int64_t patience_ms = k->team && kern_shares(k) > 1 ? PATIENCE_OF_SHARES_MS : PATIENCE_MS;
    return (p->given_ms ? p->given_ms : patience_ms) + (int64_t)(k->flops / 1e12 * MS_PER_TFLOP);
}

void cuda_progress_mark(struct cuda_progress *p)
{
    struct kern *k = p->kern;
    if (k->is_dry || atomic_load(&p->is_stuck) || !wait_for(p, p->set < MARKS_MAX ? 0 : p->set - MARKS_MAX + 1, NULL))
        return;
    pthread_mutex_lock(&p->lock);
    struct mark *m = &p->marks[p->set % MARKS_MAX];
    m->allowed_ms = allowed_ms(p);
    if (cuda_check(k, cudaEventRecord(m->event, cuda_stream(k)), "a mark")) {
        p->since_ms = p->passed == p->set ? kern_team_now_ms() : p->since_ms;
        p->set++;
        p->launches = 0;
        k->flops = 0;
    }
    pthread_mutex_unlock(&p->lock);
}

void cuda_progress_launched(struct cuda_progress *p)
{
    if (cuda_graph_is_capturing(cuda_graphs_of(p->kern)))
        return;
    p->launches++;
    if (p->launches >= LAUNCHES_MAX || p->kern->flops >= MARK_FLOPS)
        cuda_progress_mark(p);
}

/* --- life -------------------------------------------------------------------------------------------------------- */

static bool read_patience(struct cuda_progress *p)
{
    const char *given = getenv("KILN_CUDA_PATIENCE_S");
    char *end = NULL;
    if (!given || !*given)
        return true;
    long seconds = strtol(given, &end, 10);
    p->given_ms = 1000 * seconds;
    if (*end || seconds < 1 || seconds > PATIENCE_S_MAX)
        kern_ops_fail(p->kern, "KILN_CUDA_PATIENCE_S='%s', accepted: seconds from 1 to %d", given, PATIENCE_S_MAX);
    return !p->kern->failed;
}

struct cuda_progress *cuda_progress_open(struct kern *k)
{
    struct cuda_progress *p = calloc(1, sizeof *p);
    if (!p) {
        kern_ops_fail(k, "no memory for the marks of the device's work");
        return NULL;
    }
    p->kern = k;
    pthread_mutex_init(&p->lock, NULL);
    bool ok = read_patience(p);
    for (int i = 0; ok && i < MARKS_MAX; i++)
        ok = cuda_check(k, cudaEventCreateWithFlags(&p->marks[i].event, cudaEventDisableTiming), "an event");
    if (ok)
        return p;
    cuda_progress_close(p);
    return NULL;
}

void cuda_progress_close(struct cuda_progress *p)
{
    if (!p)
        return;
    for (int i = 0; i < MARKS_MAX && p->marks[i].event; i++)
        cudaEventDestroy(p->marks[i].event);
    pthread_mutex_destroy(&p->lock);
    free(p);
}
