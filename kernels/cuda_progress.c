/* cuda_progress.c - marks in the stream of work, and a clock that begins anew whenever one is passed.
 *
 * A kernel that never ends would keep everybody who waits for its stream, and CUDA has no wait with an end. So waiting is asking, again
 * and again, whether an event has come. What lies between two marks may take
 *
 *   60 s and 2 s for each TFLOP of products: half a TFLOP/s, where the slowest GPU with sm_80 or later has ten; everything but products takes
 *        milliseconds; in a team, which must end within 10 s, only where nothing is known:
 *   7 s and 2 for each TFLOP where weights are shared, because little lies between two sums;
 *   7 s and SLOWER_MAX times what the same took on this device the last time;
 *   7 s and SLOWER_MAX times what the other ranks took just now, from when they begin to wait for this one.
 *
 * Other ranks are a measure because they have the same to do between two places where all meet: shares of one size, or each one pass of
 * guidance, with all that comes with it the first time (modules are loaded, graphs made) or every time (layers come from the host). The
 * slowest card of a team may be four times as slow as the fastest.
 *
 * Between two marks are at most LAUNCHES_MAX launches or MARK_FLOPS and one operation, or one graph: a whole step. So one device that hangs
 * in a step of klein-4B at 1024x1024 is given up after 130 s, of klein-9B after 211. A team takes 9 s where weights are shared, whose sums are
 * not in graphs; and where passes are split, because the other rank has made its own in half a second (klein-9B on RTX 4090). Longer takes
 * only what nobody did before and nobody else does: a first decoder, 28 s or 81, and a first pass in which both hang, as alone.
 * KILN_CUDA_PATIENCE_S is instead of the 60 and the 7.
 *
 * Never are more than MARKS_MAX marks ahead: with some 1000 launches queued a launch itself would wait, where nobody could look. They
 * are 13 TFLOP or 256 launches, far more than the device does before whoever waits looks again.
 *
 * In a team it is the thread of team_nccl.c that looks, for it knows whether a sum waits for another rank; and who waits goes on waiting
 * until the team is broken. A device that is late then is stuck. */
#include "cuda_progress.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "cuda_graph.h"

#define PATIENCE_MS 60000 /* of one device; a team has its own */
#define MS_PER_TFLOP 2000
#define SLOWER_MAX 3
#define MARK_FLOPS 2e11
#define LAUNCHES_MAX 4
#define MARKS_MAX 64
#define PATIENCE_S_MAX 86400
#define PIECE_FLOPS 1e12 /* of smaller ones it need not be known what they take */
#define PIECES_MAX 16
#define ASK_MIN_NS 10000
#define ASK_MAX_NS 200000

/* Of what is before it, behind the mark before. */
struct mark {
    cudaEvent_t event;
    double flops;
    int64_t allowed_ms; /* where nothing else is known */
};

/* What was done before is the same if it has as many FLOPs: a graph of the same shape. */
struct piece {
    double flops;
    int64_t took_ms;
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
    struct piece pieces[PIECES_MAX];
    int piece_count, next_piece;
    char late[256];       /* why the device was given up; or empty */
};

/* --- asking ---------------------------------------------------------------------------------------------------- */

cudaError_t cuda_progress_ask(cudaEvent_t event)
{
    cudaError_t status = cudaEventQuery(event);
    if (status == cudaErrorNotReady)
        cudaGetLastError();
    return status;
}

static struct piece *find_piece(struct cuda_progress *p, double flops)
{
    for (int i = 0; i < p->piece_count; i++)
        if (p->pieces[i].flops == flops)
            return &p->pieces[i];
    return NULL;
}

static void keep_piece(struct cuda_progress *p, double flops, int64_t took_ms)
{
    struct piece *piece = find_piece(p, flops);
    if (flops < PIECE_FLOPS)
        return;
    if (!piece) {
        piece = &p->pieces[p->next_piece];
        p->next_piece = (p->next_piece + 1) % PIECES_MAX;
        p->piece_count += p->piece_count < PIECES_MAX;
    }
    *piece = (struct piece){flops, took_ms};
}

static struct mark *next_mark(struct cuda_progress *p)
{
    return &p->marks[p->passed % MARKS_MAX];
}

static void pass_locked(struct cuda_progress *p)
{
    while (p->passed < p->set && cuda_progress_ask(next_mark(p)->event) != cudaErrorNotReady) {
        int64_t now_ms = kern_team_now_ms();
        keep_piece(p, next_mark(p)->flops, now_ms - p->since_ms);
        p->since_ms = now_ms;
        p->passed++;
    }
}

/* --- judging ---------------------------------------------------------------------------------------------------- */

static int64_t patience_ms(const struct cuda_progress *p, bool is_known)
{
    const struct kern *k = p->kern;
    return p->given_ms ? p->given_ms : k->team && is_known ? kern_team_patience_ms(k->team) : PATIENCE_MS;
}

/* Gives the device up, for good: whoever asks later, when the others wait no more, is told the same. */
static void judge_locked(struct cuda_progress *p)
{
    struct kern *k = p->kern;
    const struct piece *before = find_piece(p, next_mark(p)->flops);
    int64_t waited_ms = kern_team_now_ms() - p->since_ms, took_ms = 0;
    int64_t allowed_ms = before ? patience_ms(p, true) + SLOWER_MAX * before->took_ms : next_mark(p)->allowed_ms;
    int64_t awaited_ms = k->team ? kern_team_awaited_ms(k->team, k->rank, &took_ms) : 0;
    int64_t both_ms = awaited_ms < waited_ms ? awaited_ms : waited_ms;
    if (waited_ms > allowed_ms)
        snprintf(p->late, sizeof p->late, "device failed: %s: nothing it was asked has ended for %.1f s: a kernel hangs", k->name, (double)waited_ms / 1e3);
    else if (both_ms > patience_ms(p, true) + SLOWER_MAX * took_ms)
        snprintf(p->late, sizeof p->late, "device failed: %s: the team has waited %.1f s for what took another rank %.1f: a kernel hangs", k->name,
                 (double)both_ms / 1e3, (double)took_ms / 1e3);
}

enum cuda_progress_state cuda_progress_look(struct cuda_progress *p, char *why, size_t why_bytes)
{
    pthread_mutex_lock(&p->lock);
    pass_locked(p);
    bool is_at_work = p->passed < p->set;
    if (is_at_work && !*p->late)
        judge_locked(p);
    bool is_late = *p->late;
    if (is_late)
        snprintf(why, why_bytes, "%s", p->late);
    pthread_mutex_unlock(&p->lock);
    return is_late ? CUDA_PROGRESS_LATE : is_at_work ? CUDA_PROGRESS_AT_WORK : CUDA_PROGRESS_IDLE;
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

void cuda_progress_mark(struct cuda_progress *p)
{
    struct kern *k = p->kern;
    if (k->is_dry || atomic_load(&p->is_stuck) || !wait_for(p, p->set < MARKS_MAX ? 0 : p->set - MARKS_MAX + 1, NULL))
        return;
    pthread_mutex_lock(&p->lock);
    struct mark *m = &p->marks[p->set % MARKS_MAX];
    m->flops = k->flops;
    m->allowed_ms = patience_ms(p, kern_shares(k) > 1) + (int64_t)(k->flops / 1e12 * MS_PER_TFLOP);
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
