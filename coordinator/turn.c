/* turn.c - see turn.h. A claim is held only when its ASSIGN was taken by the socket; everything else claimed goes back with
 * the next turn. A claim whose turn was lost belongs to nobody: its lease ends. */
#include "turn.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "clock.h"
#include "conversation.h"
#include "coordinator_metric.h"
#include "log.h"

#define OFFER_MS 1000       /* the poll is the truth, NOTIFY only makes it quicker */
#define OFFER_LEAST_MS 5
#define TURN_SLOW_MS 1000
#define PAUSE_MS 1000       /* after an ASSIGN that could not be delivered */

/* --- what goes in ---------------------------------------------------------------------------------------------- */

static int least(int a, int b)
{
    return a < b ? a : b;
}

/* What is reported in this turn is acknowledged with it: its credit can be claimed for in the same commit. */
static void put_reports(struct coordinator *c, struct coordinator_turn *t)
{
    int results = least(c->reports.result_count, TASK_STORE_TURN_MAX), failures = least(c->reports.failure_count, TASK_STORE_TURN_MAX);
    for (int i = 0; i < results; i++) {
        const struct report_result *r = report_result_at(&c->reports, i);
        t->finishes[i] = r->finish;
        r->held->worker->returning += r->held->is_counted;
    }
    for (int i = 0; i < failures; i++) {
        const struct report_failure *f = report_failure_at(&c->reports, i);
        t->fails[i] = f->fail;
        if (f->held)
            f->held->worker->returning += f->held->is_counted;
    }
    t->request.finishes = t->finishes;
    t->request.finish_count = results;
    t->request.fails = t->fails;
    t->request.fail_count = failures;
}

static void put_wants(struct coordinator *c, struct coordinator_turn *t, int64_t now_ms)
{
    int lease_ms = janitor_lease_ms(&c->janitor);
    c->is_hungry = false;
    if (c->is_stopping)
        return;
    int count = workload_plan(&c->workload, c->fleet, now_ms, TASK_STORE_TURN_MAX, t->plan, DISPATCH_WANTS_MAX, &c->is_hungry);
    for (int i = 0; i < count; i++) {
        struct fleet_worker *w = c->workload.taker_of[t->plan[i].worker];
        t->want_worker[i] = w;
        t->want_session[i] = w->session;
        t->wants[i] = (struct task_want){c->workload.items[t->plan[i].group].id, w->name, t->plan[i].count, lease_ms};
        w->pins++;
    }
    t->request.wants = t->wants;
    t->request.want_count = count;
}

static void put_times(struct coordinator *c, struct coordinator_turn *t, int64_t now_ms)
{
    t->request.extends = t->extends;
    t->request.extend_count = janitor_extend(&c->janitor, c->fleet, now_ms, t->extends, TASK_STORE_TURN_MAX);
    t->request.lease_ms = janitor_lease_ms(&c->janitor);
    t->request.beats = t->beats;
    t->request.beat_count = janitor_beat(c->fleet, now_ms, t->beats, t->beat_worker, COORDINATOR_BEATS_MAX);
    for (int i = 0; i < t->request.beat_count; i++)
        t->beat_worker[i]->pins++;
    t->request.sweep = !c->is_stopping && janitor_may_sweep(&c->janitor, c->fleet, now_ms);
    t->request.offer = !c->is_stopping && now_ms >= turn_offer_ms(c);
    t->request.folders = c->janitor.round == JANITOR_NEEDS_FOLDERS;
    if (c->janitor.round == JANITOR_NEEDS_VERDICTS) {
        t->request.staged = c->janitor.asked;
        t->request.staged_count = c->janitor.file_count;
    }
}

/* Nobody waits in vain: whoever found nothing looks again as soon as something may have changed. */
int64_t turn_offer_ms(const struct coordinator *c)
{
    bool is_urgent = c->is_offer_wanted || (c->is_hungry && c->workload.is_stale);
    return c->offer_ms + (is_urgent ? OFFER_LEAST_MS : OFFER_MS);
}

void turn_begin(struct coordinator *c, int64_t now_ms)
{
    struct coordinator_turn *t = &c->turn;
    struct task_turn_request *q = &t->request;
    *q = (struct task_turn_request){.coordinator = c->options.name};
    put_reports(c, t);
    put_wants(c, t, now_ms);
    put_times(c, t, now_ms);
    bool is_empty = q->finish_count + q->fail_count + q->want_count + q->extend_count + q->beat_count + q->staged_count == 0;
    if (is_empty && !q->sweep && !q->offer && !q->folders)
        return;
    if (q->sweep)
        janitor_swept(&c->janitor, now_ms);
    if (q->offer) {
        c->offer_ms = now_ms;
        c->is_offer_wanted = false;
    }
    t->is_running = true;
    t->start_s = clock_s();
    task_turn_start(c->database, q);
}

/* --- what comes out: acks -------------------------------------------------------------------------------------- */

struct ack { struct fleet_worker *worker; struct msg_ack_item item; int next; };
struct acks { struct ack list[2 * TASK_STORE_TURN_MAX]; int count; struct fleet_worker *touched[2 * TASK_STORE_TURN_MAX]; int touched_count; };

/* mark is 1 + the worker's last ack in the list, 0 for none. */
static void acks_add(struct acks *a, const struct fleet_held *h, enum msg_verdict verdict)
{
    struct fleet_worker *w = h->worker;
    if (w->mark == 0)
        a->touched[a->touched_count++] = w;
    a->list[a->count] = (struct ack){w, {h->task, h->token, verdict}, w->mark};
    w->mark = ++a->count;
}

/* What is not delivered is asked again by the worker, and answered again. */
static void acks_say(struct coordinator *c, struct acks *a)
{
    struct msg_ack_item items[MSG_ITEMS_MAX];
    struct msg m = {.kind = MSG_ACK, .ack = {.items = items}};
    for (int i = 0; i < a->touched_count; i++) {
        struct fleet_worker *w = a->touched[i];
        while (w->mark > 0) {
            for (m.ack.count = 0; w->mark > 0 && m.ack.count < MSG_ITEMS_MAX; w->mark = a->list[w->mark - 1].next)
                items[m.ack.count++] = a->list[w->mark - 1].item;
            link_send(c->link, w->peer, &m);
        }
    }
}

static void log_stale(const char *sort, const struct fleet_held *h)
{
    metric_add(coordinator_metric_all()->stale, 1);
    log_event(LOG_WARN, "stale_result", "sort=%s task=%" PRIu64 " token=%" PRIu64 " worker=%s", sort, h->task, h->token, log_quote(h->worker->name));
}

static void end_held(struct coordinator *c, struct fleet_held *h)
{
    struct fleet_worker *w = h->worker;
    w->returning = 0; /* everything that was returning is answered now */
    w->pins--;
    fleet_drop(c->fleet, h);
}

static void end_results(struct coordinator *c, const struct task_turn_result *r, struct acks *acks)
{
    const struct coordinator_metric *metric = coordinator_metric_all();
    double now_s = clock_s();
    for (int i = 0; i < c->turn.request.finish_count; i++) {
        const struct report_result *report = report_result_at(&c->reports, i);
        struct fleet_held *h = report->held;
        bool is_committed = r->finish_committed[i];
        if (is_committed) {
            metric_add(metric->committed, 1);
            workload_measured(&c->workload, h->shape, report->finish.render_s);
            if (h->since_s > 0)
                metric_observe(metric->claim_to_commit_seconds, now_s - h->since_s);
        } else {
            log_stale("result", h);
        }
        acks_add(acks, h, is_committed ? MSG_COMMITTED : MSG_STALE);
        end_held(c, h);
    }
}

static void end_failures(struct coordinator *c, const struct task_turn_result *r, struct acks *acks)
{
    for (int i = 0; i < c->turn.request.fail_count; i++) {
        const struct report_failure *f = report_failure_at(&c->reports, i);
        c->workload.is_stale = c->workload.is_stale || r->fail_accepted[i];
        if (!f->held)
            continue;
        metric_add(coordinator_metric_all()->failures[f->kind], 1);
        if (!r->fail_accepted[i])
            log_stale("failure", f->held);
        if (f->kind != MSG_FAILURE_RELEASED)
            log_event(LOG_INFO, "task_failed", "task=%" PRIu64 " worker=%s kind=%s reason=%s", f->held->task, log_quote(f->held->worker->name),
                      msg_failure_name(f->kind), log_quote(f->reason));
        acks_add(acks, f->held, r->fail_accepted[i] ? MSG_COMMITTED : MSG_STALE);
        end_held(c, f->held);
    }
}

/* --- assignments ----------------------------------------------------------------------------------------------- */

static void release(struct coordinator *c, const struct task_claimed *claimed, int count, enum task_failure kind, const char *reason)
{
    for (int i = 0; i < count; i++)
        if (!report_give_back(&c->reports, claimed[i].task, claimed[i].token, kind, reason))
            log_event(LOG_WARN, "give_back_dropped", "task=%" PRIu64 " until=lease_ends", claimed[i].task);
}

static void hold_all(struct coordinator *c, struct fleet_worker *w, const struct workload_group *g, const struct task_claimed *claimed, int count, int64_t now_ms)
{
    for (int i = 0; i < count; i++) {
        struct fleet_held *h = fleet_hold(c->fleet, w, claimed[i].task, claimed[i].token, now_ms);
        if (!h)
            return; /* out of memory: not extended, so it comes back; its result is welcome all the same */
        h->shape = g->shape;
        h->batch_size = count;
        h->since_s = c->turn.start_s;
        fleet_count_held(h, true);
    }
}

static bool assign(struct coordinator *c, struct fleet_worker *w, const struct workload_group *g, const struct task_claimed *claimed, int count, int64_t now_ms)
{
    struct msg_task tasks[MSG_ITEMS_MAX];
    for (int i = 0; i < count; i++)
        tasks[i] = (struct msg_task){.task = claimed[i].task, .token = claimed[i].token, .attempt = claimed[i].attempt, .prompt = claimed[i].prompt,
                                     .negative = claimed[i].negative, .seed = claimed[i].seed, .truncate = claimed[i].truncate, .file = claimed[i].file,
                                     .inputs = claimed[i].inputs ? claimed[i].inputs : ""};
    struct msg m = {.kind = MSG_ASSIGN,
                    .assign = {.batch = ++c->batch, .lease_ms = (uint32_t)janitor_lease_ms(&c->janitor), .campaign = g->row.campaign,
                               .model = g->row.model, .out_dir = g->row.out_dir, .format = g->row.format, .use = g->row.use,
                               .width = (uint32_t)g->row.width, .height = (uint32_t)g->row.height, .steps = (uint32_t)g->row.steps,
                               .guidance = g->row.guidance, .count = (uint32_t)count, .tasks = tasks}};
    enum link_sent sent = link_send(c->link, w->peer, &m);
    if (sent == LINK_SENT) {
        if (w->held_count == 0)
            w->step_ms = now_ms;
        hold_all(c, w, g, claimed, count, now_ms);
        w->model = c->workload.items[g - c->workload.groups].model;
        w->loras = g->row.loras;
        return true;
    }
    /* What cannot be written as a message will not be next time either: that counts as an attempt. */
    bool is_unwritable = sent == LINK_SEND_ERROR;
    w->pause_ms = now_ms + PAUSE_MS;
    log_event(LOG_WARN, "assign_failed", "worker=%s tasks=%d why=%s", log_quote(w->name), count, is_unwritable ? "unwritable" : sent == LINK_GONE ? "gone" : "full");
    release(c, claimed, count, is_unwritable ? TASK_RETRY : TASK_RELEASED,
            is_unwritable ? "the task could not be written as a message" : "the worker could not be reached");
    return false;
}

static void end_wants(struct coordinator *c, const struct task_turn_result *r, int64_t now_ms)
{
    const struct coordinator_metric *metric = coordinator_metric_all();
    const struct task_claimed *claimed = r->claimed;
    for (int i = 0; i < c->turn.request.want_count; i++) {
        int got = r->claimed_of_want[i], group = c->turn.plan[i].group;
        struct fleet_worker *w = c->turn.want_worker[i];
        const struct workload_group *g = &c->workload.groups[group];
        bool is_there = w->session == c->turn.want_session[i] && (w->state == FLEET_IDLE || w->state == FLEET_BUSY) && !c->is_stopping;
        workload_given(&c->workload, group, c->turn.plan[i].count, got, now_ms);
        metric_add(metric->claimed, got);
        if (got > 0 && !is_there) {
            release(c, claimed, got, TASK_RELEASED, "the worker was no longer ready for it");
        } else if (got > 0 && assign(c, w, g, claimed, got, now_ms)) {
            metric_add(metric->assigned, got);
            metric_add(metric->batches, 1);
            log_event(LOG_DEBUG, "assigned", "worker=%s batch=%" PRIu64 " campaign=%s tasks=%d", w->name, c->batch, log_quote(g->row.campaign), got);
        }
        claimed += got;
    }
}

/* --- leases, sweep, offer, staged files ------------------------------------------------------------------------ */

/* Tasks of one batch stand together in the line of leases: they are cancelled with one message. */
static void end_extends(struct coordinator *c, const struct task_turn_result *r, int64_t now_ms)
{
    uint64_t tasks[MSG_ITEMS_MAX];
    uint32_t count = 0;
    struct fleet_worker *worker = NULL;
    static const char reason[] = "its campaign was cancelled, or the task was given to somebody else";
    for (int i = 0; i < c->turn.request.extend_count; i++) {
        struct fleet_held *h = fleet_held_find(c->fleet, c->turn.extends[i].task, c->turn.extends[i].token);
        if (!h || !h->is_leased)
            continue; /* it ended, was lost or left meanwhile */
        if (r->extend_alive[i]) {
            fleet_lease_renewed(c->fleet, h, now_ms);
            continue;
        }
        if (count > 0 && (h->worker != worker || count == MSG_ITEMS_MAX)) {
            conversation_cancel(c, worker, tasks, count, reason);
            count = 0;
        }
        worker = h->worker;
        tasks[count++] = h->task;
        fleet_lease_leave(c->fleet, h);
    }
    if (count > 0)
        conversation_cancel(c, worker, tasks, count, reason);
}

static void end_sweep(struct coordinator *c, const struct task_turn_result *r)
{
    if (r->swept == 0)
        return;
    metric_add(coordinator_metric_all()->swept, r->swept);
    log_event(LOG_WARN, "lease_expired", "tasks=%d", r->swept);
    c->workload.is_stale = true;
}

static void end_questions(struct coordinator *c, const struct task_turn_result *r, int64_t now_ms)
{
    if (r->offer_fresh && !workload_offer(&c->workload, c->fleet, r->offer, r->offer_count, now_ms))
        log_event(LOG_ERROR, "out_of_memory", "what=offer groups=%d", r->offer_count);
    if (c->turn.request.folders && !janitor_take_folders(&c->janitor, r->folders, r->folder_count))
        log_event(LOG_ERROR, "out_of_memory", "what=folders count=%d", r->folder_count);
    if (c->turn.request.staged_count > 0)
        janitor_take_verdicts(&c->janitor, r->staged_state, r->staged_file);
}

/* --- the end --------------------------------------------------------------------------------------------------- */

static void unpin(struct coordinator *c)
{
    for (int i = 0; i < c->turn.request.want_count; i++)
        c->turn.want_worker[i]->pins--;
    for (int i = 0; i < c->turn.request.beat_count; i++)
        c->turn.beat_worker[i]->pins--;
    c->turn.is_running = false;
}

static void review_all(struct coordinator *c)
{
    static const enum fleet_state states[] = {FLEET_IDLE, FLEET_BUSY};
    for (int s = 0; s < 2; s++)
        for (struct fleet_worker *w = fleet_first(c->fleet, states[s]), *next; w; w = next) {
            next = w->next;
            fleet_review(c->fleet, w);
        }
}

void turn_end(struct coordinator *c, int64_t now_ms)
{
    struct acks acks;
    const struct task_turn_result *r = task_turn_result(c->database);
    acks.count = acks.touched_count = 0;
    metric_observe(coordinator_metric_all()->turn_seconds, clock_s() - c->turn.start_s);
    if (r->ms > TURN_SLOW_MS)
        log_event(LOG_WARN, "turn_slow", "ms=%" PRId64 " finishes=%d fails=%d wants=%d extends=%d", r->ms, c->turn.request.finish_count,
                  c->turn.request.fail_count, c->turn.request.want_count, c->turn.request.extend_count);
    end_results(c, r, &acks);
    end_failures(c, r, &acks);
    report_answered(&c->reports, c->turn.request.finish_count, c->turn.request.fail_count);
    acks_say(c, &acks);
    end_wants(c, r, now_ms);
    end_extends(c, r, now_ms);
    end_sweep(c, r);
    end_questions(c, r, now_ms);
    unpin(c);
    review_all(c);
    task_turn_finish(c->database);
}

void turn_lost(struct coordinator *c)
{
    for (int i = 0; i < c->turn.request.finish_count; i++)
        report_result_at(&c->reports, i)->held->worker->returning = 0;
    for (int i = 0; i < c->turn.request.fail_count; i++)
        if (report_failure_at(&c->reports, i)->held)
            report_failure_at(&c->reports, i)->held->worker->returning = 0;
    for (int i = 0; i < c->turn.request.beat_count; i++)
        c->turn.beat_worker[i]->is_changed = true;
    unpin(c);
}
