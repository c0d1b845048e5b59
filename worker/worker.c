/* worker.c - the I/O thread: a loop of named steps over one session, one spool, and what the threads report.
 *
 * Order matters in two places. Results and failures go out before READY, so that nothing finished is handed out
 * again. An answer is settled by the writer (publish, forget) and only then leaves the list, so that a process killed
 * in between says RESULT once more. */
#include "worker.h"

#include <inttypes.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "batch.h"
#include "clock.h"
#include "failure.h"
#include "heartbeat.h"
#include "lifecycle.h"
#include "log.h"
#include "need.h"
#include "painter.h"
#include "session.h"
#include "spool.h"
#include "worker_metric.h"
#include "writer.h"

#define HEAR_MAX 1000          /* messages in one round, so that heartbeats go out in a flood */
#define REPORT_MAX 256         /* results in one message */
#define WAIT_MAX_MS 250
#define DRAIN_FLUSH_MS 30000   /* for answers, once nothing is rendered any more */
#define DRAIN_ALONE_MS 2000    /* the same while no coordinator is there: the spool has it all */
#define BYE_LINGER_MS 1000
#define BYE_MOMENT_MS 200      /* at the second signal */

struct worker {
    struct worker_options options;
    char host[256];          /* its name, for HELLO */
    struct mailbox outcomes; /* from painter and writer */
    struct painter *painter;
    struct writer *writer;
    struct spool spool;
    struct session session;
    struct heartbeat heartbeat;
    struct batch *batches;   /* all that are not done, in no order */
    uint32_t held;           /* tasks without an outcome */
    int painting;            /* batches the painter has not given back */
    unsigned ready_session;  /* what READY said last, and in which session */
    uint32_t ready_credit;
    bool is_draining, is_over;
    int64_t flush_until_ms, alone_until_ms; /* 0: still rendering; alone: moved on while a coordinator is there */
    int exit_code;
    char state[600];         /* for heartbeats */
};

static atomic_bool is_ready; /* for /readyz, asked by another thread */

/* --- open and close --------------------------------------------------------------------------------- */

static bool readyz(void *context)
{
    (void)context;
    return atomic_load(&is_ready);
}

static bool worker_lock(const struct worker_options *o, char *why, size_t why_bytes)
{
    char path[4200];
    return spool_prepare(o->spool_dir, why, why_bytes) &&
           (snprintf(path, sizeof path, "%s/worker.pid", o->spool_dir), lifecycle_pid_file(path, why, why_bytes));
}

static bool worker_open(struct worker *w, const struct worker_options *o, char *why, size_t why_bytes)
{
    int bad_count;
    uint16_t port;
    w->options = *o;
    if (w->options.credit == 0)
        w->options.credit = 2 * o->batch_max;
    worker_metric_all();
    if (!mailbox_init(&w->outcomes, true)) {
        snprintf(why, why_bytes, "no file descriptor left");
        return false;
    }
    if (!worker_lock(o, why, why_bytes) || !spool_open(&w->spool, o->spool_dir, &bad_count, why, why_bytes))
        return false;
    if (bad_count > 0)
        log_event(LOG_ERROR, "spool_damaged", "records=%d dir=%s moved_to=*.bad", bad_count, log_quote(o->spool_dir));
    if (w->spool.count > 0)
        log_event(LOG_INFO, "spool_found", "results=%" PRIu32 " dir=%s", w->spool.count, log_quote(o->spool_dir));
    if (o->metrics_port >= 0) {
        if (!metric_serve((uint16_t)o->metrics_port, readyz, NULL, &port, why, why_bytes))
            return false;
        log_event(LOG_INFO, "metrics", "url=http://127.0.0.1:%u/metrics", (unsigned)port);
    }
    struct writer_options writing = {.spool_dir = w->spool.dir, .outcomes = &w->outcomes,
                                     .precision = engine_precision_name(o->precision)};
    if (!writer_open(&w->writer, &writing, why, why_bytes))
        return false;
    struct painter_options painting = {
        .sources = o->models, .source_count = o->model_count, .batch_max = o->batch_max,
        .engine = {.precision = o->precision, .threads = o->threads, .device = o->device, .placement = o->placement, .split = o->split,
                   .plan_count = o->batch_max},
        .outcomes = &w->outcomes, .writer = w->writer};
    return painter_open(&w->painter, &painting, why, why_bytes);
}

static void worker_close(struct worker *w)
{
    session_close(&w->session, BYE_LINGER_MS);
    painter_close(w->painter);
    writer_close(w->writer);
    for (struct batch_outcome *o; (o = mailbox_take(&w->outcomes));)
        batch_outcome_free(o);
    while (w->batches) {
        struct batch *b = w->batches;
        w->batches = b->next;
        batch_free(b);
    }
    spool_done(&w->spool);
    mailbox_done(&w->outcomes);
    metric_stop();
}

/* Models take from seconds to minutes to open; a signal meanwhile ends the process, since nothing is held. 0, or the exit code. */
static int worker_load(struct worker *w)
{
    struct pollfd waits[] = {{.fd = w->outcomes.event_fd, .events = POLLIN}, {.fd = lifecycle_fd(), .events = POLLIN}};
    while (painter_state(w->painter) == PAINTER_LOADING) {
        if (lifecycle_stop_count() > 0) {
            log_event(LOG_INFO, "stopped", "while=loading");
            _exit(0);
        }
        poll(waits, 2, WAIT_MAX_MS);
    }
    if (painter_state(w->painter) == PAINTER_READY)
        return 0;
    const struct engine_error *why = painter_why(w->painter);
    log_event(LOG_ERROR, "model_refused", "why=%s", log_quote(why->text));
    fprintf(stderr, "kiln-worker: %s\n", why->text);
    return why->fault == ENGINE_DEVICE ? LIFECYCLE_TEMPORARY : LIFECYCLE_REFUSED;
}

static uint64_t memory_bytes(void)
{
    long pages = sysconf(_SC_PHYS_PAGES), page_bytes = sysconf(_SC_PAGESIZE);
    return pages > 0 && page_bytes > 0 ? (uint64_t)pages * (uint64_t)page_bytes : 0;
}

static bool worker_greet(struct worker *w, char *why, size_t why_bytes)
{
    struct msg_hello hello = {
        .protocol_min = MSG_VERSION, .protocol_max = MSG_VERSION, .software = "kiln " KILN_VERSION, .worker = w->options.name,
        .boot_epoch = clock_boot_epoch(), .memory_bytes = memory_bytes(), .host = w->host, .pid = (uint32_t)getpid()};
    if (gethostname(w->host, sizeof w->host - 1) != 0)
        snprintf(w->host, sizeof w->host, "unknown");
    model_set_describe(painter_models(w->painter), &hello);
    return session_open(&w->session, w->options.endpoint, &hello, clock_ms(), why, why_bytes);
}

/* --- draining --------------------------------------------------------------------------------------- */

static void release_batch(struct worker *w, struct batch *b, const char *reason)
{
    struct failure f = failure_released("%s", reason);
    for (uint32_t i = 0; i < b->assign->count; i++)
        mailbox_put(&w->outcomes, &batch_outcome_failed(b, i, &f)->mail);
    mailbox_put(&w->outcomes, &batch_outcome_over(b)->mail);
}

/* What runs is finished, what only waits goes back, what is finished is said until it is answered. */
static void worker_drain(struct worker *w, const char *reason, int exit_code)
{
    if (w->is_draining)
        return;
    w->is_draining = true;
    w->exit_code = exit_code;
    lifecycle_notify("STOPPING=1");
    log_event(LOG_INFO, "drain", "reason=%s held=%" PRIu32 " spooled=%" PRIu32, log_quote(reason), w->held, w->spool.count);
    for (struct batch *b; (b = painter_take_back(w->painter));)
        release_batch(w, b, reason);
}

static void leave_now(struct worker *w)
{
    struct msg bye = {.kind = MSG_BYE, .bye = {.reason = "second signal"}};
    log_event(LOG_WARN, "leaving_now", "held=%" PRIu32 " spooled=%" PRIu32, w->held, w->spool.count);
    session_send(&w->session, &bye);
    session_close(&w->session, BYE_MOMENT_MS);
    clock_sleep_ms(BYE_MOMENT_MS); /* closing only hands the word to libzmq's thread, which _exit would kill */
    _exit(lifecycle_stop_code());
}

static void say_bye(struct worker *w)
{
    struct msg bye = {.kind = MSG_BYE, .bye = {.reason = w->exit_code ? "it must be started again" : "drained"}};
    session_send(&w->session, &bye);
    log_event(LOG_INFO, "bye", "left_spooled=%" PRIu32 " left_held=%" PRIu32 " exit=%d", w->spool.count, w->held, w->exit_code);
    w->is_over = true;
}

static void worker_stop(struct worker *w, int64_t now_ms)
{
    if (lifecycle_stop_count() > 1)
        leave_now(w);
    if (lifecycle_stop_count() == 1)
        worker_drain(w, "worker was told to stop", 0);
    if (!w->is_draining || w->painting > 0)
        return;
    const bool is_alone = w->session.state != SESSION_WELCOME;
    if (w->flush_until_ms == 0)
        w->flush_until_ms = now_ms + DRAIN_FLUSH_MS;
    if (!is_alone || w->alone_until_ms == 0)
        w->alone_until_ms = now_ms + DRAIN_ALONE_MS;
    if ((!w->batches && w->spool.count == 0) || now_ms >= w->flush_until_ms || (is_alone && now_ms >= w->alone_until_ms))
        say_bye(w);
}

/* --- what the coordinator says ------------------------------------------------------------------------ */

static void fail_at_once(struct worker *w, const struct msg_assign *a, const char *reason)
{
    struct failure f = failure_released("%s", reason);
    log_event(LOG_WARN, "assign_returned", "batch=%" PRIu64 " count=%" PRIu32 " reason=%s", a->batch, a->count, log_quote(reason));
    for (uint32_t i = 0; i < a->count; i++)
        spool_add(&w->spool, need_memory(spool_entry_failed(a->tasks[i].task, a->tasks[i].token, &f)));
}

static uint32_t cancel_task(struct worker *w, uint64_t task, uint64_t below_token)
{
    uint32_t count = 0;
    for (struct batch *b = w->batches; b; b = b->next)
        for (uint32_t i = 0; i < b->assign->count; i++)
            if (b->assign->tasks[i].task == task && b->assign->tasks[i].token < below_token && !b->tasks[i].is_reported) {
                atomic_store(&b->tasks[i].is_cancelled, true);
                count++;
            }
    return count;
}

static void hear_assign(struct worker *w, struct msg *m)
{
    const struct msg_assign *a = &m->assign;
    if (w->is_draining) {
        fail_at_once(w, a, "worker is draining");
        return;
    }
    if (w->held + a->count > 2 * (uint32_t)w->options.credit) {
        fail_at_once(w, a, "more than this worker's credit");
        return;
    }
    /* A lease that ran out here and was given to us again: only the new token can win. */
    for (uint32_t i = 0; i < a->count; i++)
        cancel_task(w, a->tasks[i].task, a->tasks[i].token);
    struct batch *b = batch_new(m, w->session.number);
    log_event(LOG_DEBUG, "assign", "batch=%" PRIu64 " campaign=%s count=%" PRIu32, b->assign->batch,
              log_quote(b->assign->campaign), b->assign->count);
    b->next = w->batches;
    w->batches = b;
    w->held += b->assign->count;
    w->painting++;
    painter_give(w->painter, b);
}

static void hear_ack(struct worker *w, const struct msg_ack *acks)
{
    for (uint32_t i = 0; i < acks->count; i++) {
        const struct msg_ack_item *a = &acks->items[i];
        struct spool_entry *e = spool_find(&w->spool, a->task, a->token);
        if (!e || e->is_settling)
            continue; /* answered before */
        if (a->verdict == MSG_STALE) {
            log_event(LOG_WARN, "stale", "task=%" PRIu64 " token=%" PRIu64 " sort=%s", a->task, a->token,
                      e->is_result ? "result" : "failed");
            metric_add(worker_metric_all()->stale, 1);
        }
        if (e->is_result) {
            e->verdict = a->verdict;
            e->is_settling = true;
            writer_settle(w->writer, e);
        } else {
            spool_remove(&w->spool, e);
            spool_entry_free(e);
        }
    }
}

static void hear_cancel(struct worker *w, const struct msg_cancel *c)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < c->count; i++)
        count += cancel_task(w, c->tasks[i], UINT64_MAX);
    log_event(LOG_INFO, "cancel", "asked=%" PRIu32 " held=%" PRIu32 " reason=%s", c->count, count, log_quote(c->reason));
}

static void hear_word(struct worker *w, struct msg *m)
{
    switch (m->kind) {
    case MSG_ASSIGN: hear_assign(w, m); break;
    case MSG_ACK: hear_ack(w, &m->ack); break;
    case MSG_CANCEL: hear_cancel(w, &m->cancel); break;
    case MSG_DRAIN: worker_drain(w, "coordinator asked", 0); break;
    default: log_event(LOG_WARN, "unexpected_message", "message=%s", msg_kind_name(m->kind)); break;
    }
    msg_done(m);
}

static void worker_hear(struct worker *w, int64_t now_ms)
{
    struct msg m;
    for (int i = 0; i < HEAR_MAX; i++) {
        switch (session_hear(&w->session, &m, now_ms)) {
        case SESSION_NOTHING: return;
        case SESSION_WORD: hear_word(w, &m); break;
        case SESSION_WELCOMED:
            spool_hurry(&w->spool, now_ms);
            lifecycle_notify("READY=1");
            break;
        case SESSION_REFUSED_FOR_GOOD:
            fprintf(stderr, "kiln-worker: %s refused this worker: %s\n", w->options.endpoint, w->session.refusal);
            w->exit_code = LIFECYCLE_REFUSED;
            w->is_over = true;
            return;
        }
    }
}

/* --- what the threads report ---------------------------------------------------------------------------- */

static void batch_came_back(struct worker *w, struct batch *b)
{
    if (--b->open > 0)
        return;
    struct batch **at = &w->batches;
    while (*at != b)
        at = &(*at)->next;
    *at = b->next;
    batch_free(b);
}

static void count_outcome(const struct spool_entry *e)
{
    if (e->is_result) {
        metric_add(worker_metric_all()->images, 1);
        return;
    }
    metric_add(worker_metric_all()->failures[e->kind], 1);
    log_event(e->kind == MSG_FAILURE_RELEASED ? LOG_INFO : LOG_WARN, "failed",
              "task=%" PRIu64 " token=%" PRIu64 " kind=%s reason=%s", e->task, e->token, msg_failure_name(e->kind), log_quote(e->reason));
}

static void task_came_back(struct worker *w, struct batch_outcome *o)
{
    o->batch->tasks[o->index].is_reported = true;
    w->held--;
    count_outcome(o->entry);
    spool_add(&w->spool, o->entry);
    o->entry = NULL;
    if (o->is_last)
        worker_drain(w, "device lost or model changed", LIFECYCLE_TEMPORARY);
    batch_came_back(w, o->batch);
}

static void worker_collect(struct worker *w)
{
    mailbox_calm(&w->outcomes);
    for (struct batch_outcome *o; (o = mailbox_take(&w->outcomes));) {
        struct spool_entry *e;
        switch (o->kind) {
        case OUTCOME_TASK: task_came_back(w, o); break;
        case OUTCOME_OVER:
            w->painting--;
            batch_came_back(w, o->batch);
            break;
        case OUTCOME_SETTLED:
            e = spool_find(&w->spool, o->task, o->token);
            spool_remove(&w->spool, e);
            spool_entry_free(e);
            break;
        }
        batch_outcome_free(o);
    }
}

/* --- what is said ----------------------------------------------------------------------------------------- */

static void count_repeats(struct spool_entry *const *due, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        if (due[i]->wait_ms > SPOOL_WAIT_MS)
            metric_add(worker_metric_all()->repeats, 1);
}

static bool say(struct worker *w, const struct msg *m, struct spool_entry *const *due, uint32_t count, int64_t now_ms)
{
    if (count == 0 || !session_send(&w->session, m))
        return false;
    count_repeats(due, count);
    for (uint32_t i = 0; i < count; i++)
        spool_said(due[i], now_ms);
    return true;
}

static bool say_results(struct worker *w, int64_t now_ms)
{
    struct spool_entry *due[REPORT_MAX];
    struct msg_result_item items[REPORT_MAX];
    uint32_t count = spool_due(&w->spool, true, now_ms, due, REPORT_MAX);
    for (uint32_t i = 0; i < count; i++) {
        const struct spool_entry *e = due[i];
        items[i] = (struct msg_result_item){
            .task = e->task, .token = e->token, .sha256 = e->sha256, .bytes = e->bytes, .width = e->width, .height = e->height,
            .steps = e->steps, .guidance = e->guidance, .seed = e->seed, .file = e->file, .digest = e->digest,
            .truncated = e->truncated, .render_s = e->render_s};
    }
    struct msg m = {.kind = MSG_RESULT, .result = {.count = count, .items = items}};
    return say(w, &m, due, count, now_ms);
}

static bool say_failures(struct worker *w, int64_t now_ms)
{
    struct spool_entry *due[REPORT_MAX];
    struct msg_failed_item items[REPORT_MAX];
    uint32_t count = spool_due(&w->spool, false, now_ms, due, REPORT_MAX);
    for (uint32_t i = 0; i < count; i++)
        items[i] = (struct msg_failed_item){.task = due[i]->task, .token = due[i]->token, .kind = due[i]->kind, .reason = due[i]->reason};
    struct msg m = {.kind = MSG_FAILED, .failed = {.count = count, .items = items}};
    return say(w, &m, due, count, now_ms);
}

static void worker_report(struct worker *w, int64_t now_ms)
{
    while (say_results(w, now_ms) || say_failures(w, now_ms))
        ;
}

static uint32_t list_held(const struct worker *w, struct msg_held *ret)
{
    uint32_t count = 0;
    for (const struct batch *b = w->batches; b; b = b->next)
        for (uint32_t i = 0; i < b->assign->count && count < MSG_ITEMS_MAX; i++)
            if (b->session != w->session.number && !b->tasks[i].is_reported)
                ret[count++] = (struct msg_held){b->assign->tasks[i].task, b->assign->tasks[i].token};
    return count;
}

static void worker_offer(struct worker *w, bool is_blocked)
{
    struct msg_held held[MSG_ITEMS_MAX];
    uint32_t credit = w->is_draining || is_blocked ? 0 : (uint32_t)w->options.credit;
    if (w->session.state != SESSION_WELCOME || (w->ready_session == w->session.number && w->ready_credit == credit))
        return;
    struct msg m = {.kind = MSG_READY, .ready = {.credit = credit, .batch_max = (uint32_t)w->options.batch_max,
                                                 .held_count = list_held(w, held), .held = held}};
    if (!session_send(&w->session, &m))
        return;
    w->ready_session = w->session.number;
    w->ready_credit = credit;
    log_event(LOG_INFO, "ready", "credit=%" PRIu32 " batch_max=%d held=%" PRIu32, credit, w->options.batch_max, w->held);
}

static void worker_beat(struct worker *w, int64_t now_ms, const char *blocked)
{
    struct msg m;
    struct painter_view view = painter_look(w->painter);
    const struct worker_metric *metrics = worker_metric_all();
    bool is_connected = w->session.state == SESSION_WELCOME;
    if (*blocked)
        snprintf(w->state, sizeof w->state, "blocked: %s", blocked);
    else
        snprintf(w->state, sizeof w->state, "%s", w->is_draining ? "draining" : view.is_rendering ? "rendering" : "idle");
    failure_make_sendable(w->state); /* it may quote a path; without a heartbeat this worker is taken for dead */
    metric_set(metrics->held, w->held);
    metric_set(metrics->spooled, w->spool.result_count);
    metric_set(metrics->is_connected, is_connected);
    atomic_store(&is_ready, is_connected && !*blocked && !w->is_draining);
    if (heartbeat_progress(&w->heartbeat, now_ms, &view, &m))
        session_send(&w->session, &m);
    if (is_connected && heartbeat_beat(&w->heartbeat, now_ms, w->session.heartbeat_ms, &view, w->held, w->spool.result_count, w->state, &m))
        session_send(&w->session, &m);
}

/* --- the loop ----------------------------------------------------------------------------------------- */

static void worker_sleep(struct worker *w, int64_t now_ms)
{
    int extra[] = {w->outcomes.event_fd, lifecycle_fd()};
    int64_t wake_ms = now_ms + WAIT_MAX_MS;
    if (session_next_ms(&w->session) < wake_ms)
        wake_ms = session_next_ms(&w->session);
    if (w->heartbeat.due_ms > now_ms && w->heartbeat.due_ms < wake_ms)
        wake_ms = w->heartbeat.due_ms;
    link_wait(w->session.link, extra, 2, wake_ms > now_ms ? (int)(wake_ms - now_ms) : 0);
}

static void worker_round(struct worker *w)
{
    char blocked[512];
    int64_t now_ms = clock_ms();
    bool is_blocked = writer_blocked(w->writer, blocked, sizeof blocked);
    worker_hear(w, now_ms);
    worker_collect(w);
    session_step(&w->session, now_ms);
    worker_report(w, now_ms);
    worker_offer(w, is_blocked);
    worker_beat(w, now_ms, blocked);
    worker_stop(w, now_ms);
}

int worker_run(const struct worker_options *options)
{
    struct worker w = {.exit_code = 0};
    char why[1100];
    if (!worker_open(&w, options, why, sizeof why)) {
        fprintf(stderr, "kiln-worker: %s\n", why);
        return LIFECYCLE_REFUSED; /* the threads and files of a process that ends at once need no closing */
    }
    if ((w.exit_code = worker_load(&w)) != 0) {
        worker_close(&w);
        return w.exit_code;
    }
    if (!worker_greet(&w, why, sizeof why)) {
        fprintf(stderr, "kiln-worker: %s\n", why);
        worker_close(&w);
        return LIFECYCLE_REFUSED;
    }
    while (!w.is_over) {
        worker_round(&w);
        if (!w.is_over)
            worker_sleep(&w, clock_ms());
    }
    if (w.exit_code == LIFECYCLE_REFUSED)
        worker_drain(&w, "refused", LIFECYCLE_REFUSED);
    worker_close(&w);
    return w.exit_code;
}
