/* conversation.c - one function per message. proto/README.md has the order of a conversation.
 *
 * A worker's task has one owner of truth, the database, so nothing here decides what became of a task: results and failures
 * are queued, and a task is given back only for a reason that stands in the queue with it. */
#include "conversation.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "coordinator_metric.h"
#include "log.h"

#define HEAR_MAX 4000
#define BAD_LOG_MS 1000
#define HEARD_BEATS 3 /* a process that beat within so many heartbeats lives */

static bool say(struct coordinator *c, const char *peer, const struct msg *m)
{
    return link_send(c->link, peer, m) == LINK_SENT;
}

static void refuse(struct coordinator *c, const char *peer, bool is_final, const char *reason)
{
    struct msg m = {.kind = MSG_REFUSED, .refused = {.reason = reason, .is_final = is_final}};
    metric_add(coordinator_metric_all()->refused, 1);
    log_event(LOG_INFO, "refused", "peer=%s final=%d reason=%s", log_quote(peer), is_final, log_quote(reason));
    say(c, peer, &m);
}

static void give_back(struct coordinator *c, const struct fleet_held *h, enum task_failure kind, const char *reason)
{
    if (!report_give_back(&c->reports, h->task, h->token, kind, reason))
        log_event(LOG_WARN, "give_back_dropped", "task=%" PRIu64 " worker=%s until=lease_ends", h->task, log_quote(h->worker->name));
    if (kind == TASK_LOST)
        metric_add(coordinator_metric_all()->lost, 1);
}

void conversation_cancel(struct coordinator *c, struct fleet_worker *w, uint64_t *tasks, uint32_t count, const char *reason)
{
    struct msg m = {.kind = MSG_CANCEL, .cancel = {.count = count, .tasks = tasks, .reason = reason}};
    log_event(LOG_INFO, "cancel", "worker=%s tasks=%" PRIu32 " reason=%s", log_quote(w->name), count, log_quote(reason));
    say(c, w->peer, &m);
}

void conversation_ping(struct coordinator *c)
{
    struct msg m = {.kind = MSG_HEARTBEAT, .heartbeat = {.held = (uint32_t)fleet_held_count(c->fleet), .state = "coordinator"}};
    for (enum fleet_state s = 0; s < FLEET_GONE; s++)
        for (struct fleet_worker *w = fleet_first(c->fleet, s); w; w = w->next)
            say(c, w->peer, &m);
}

/* --- HELLO ----------------------------------------------------------------------------------------------------- */

/* A process that was killed closes its connection: the ROUTER knows at once. One that hangs beats no more. */
static bool is_alive(struct coordinator *c, const struct fleet_worker *w, int64_t now_ms)
{
    struct msg beat = {.kind = MSG_HEARTBEAT, .heartbeat = {.state = "coordinator"}};
    int limit_ms = HEARD_BEATS * c->options.pace.heartbeat_ms;
    if (w->state == FLEET_GONE || w->state == FLEET_SILENT)
        return false;
    if (limit_ms > c->options.pace.silent_ms)
        limit_ms = c->options.pace.silent_ms;
    return now_ms - w->heard_ms <= limit_ms && link_send(c->link, w->peer, &beat) != LINK_GONE;
}

static const char *digest_of_model(const struct fleet_worker *w, int model)
{
    for (int i = 0; i < w->model_count; i++)
        if (w->models[i].model == model)
            return w->digests[i];
    return NULL;
}

/* A worker that lives and has other weights under the name of one of these models. An image is a function of its row and the
 * weights: with two kinds of weights it would be one of whoever was free. */
static const struct fleet_worker *other_weights(struct coordinator *c, const struct msg_hello *h, const char **ret_model, const char **ret_digest,
                                                int64_t now_ms)
{
    for (uint32_t i = 0; i < h->model_count; i++) {
        const struct msg_model *m = &h->models[i];
        int id = fleet_name_find(c->fleet, m->name);
        *ret_model = m->name;
        for (enum fleet_state s = 0; id >= 0 && s < FLEET_GONE; s++)
            for (const struct fleet_worker *w = fleet_first(c->fleet, s); w; w = w->next) {
                *ret_digest = digest_of_model(w, id);
                if (*ret_digest && strcmp(*ret_digest, m->digest) != 0 && strcmp(w->name, h->worker) != 0 && is_alive(c, w, now_ms))
                    return w;
            }
    }
    return NULL;
}

static bool admit(struct coordinator *c, const char *peer, const struct msg_hello *h, int64_t now_ms)
{
    char reason[640];
    const struct fleet_worker *known = fleet_find(c->fleet, h->worker);
    const struct fleet_worker *other;
    const char *model, *digest;
    bool is_final = true;
    if (h->protocol_min > MSG_VERSION || h->protocol_max < MSG_VERSION)
        snprintf(reason, sizeof reason, "%s speaks protocol %" PRIu32 " to %" PRIu32 ", this coordinator (kiln " KILN_VERSION
                 ") speaks %d: use the same release on both sides", h->software, h->protocol_min, h->protocol_max, MSG_VERSION);
    else if (!msg_worker_name_ok(h->worker))
        snprintf(reason, sizeof reason, "worker name '%s': want letters, digits, '.', '_' or '-', the first no '.'", h->worker);
    else if (known && known->boot_epoch != h->boot_epoch && is_alive(c, known, now_ms)) {
        snprintf(reason, sizeof reason, "a worker named '%s' is there already (host %s, pid %" PRIu32 ", heard %" PRId64 " ms ago): give each its own --name",
                 h->worker, known->host, known->pid, now_ms - known->heard_ms);
        is_final = false;
    } else if ((other = other_weights(c, h, &model, &digest, now_ms)) != NULL) {
        snprintf(reason, sizeof reason, "model '%s' has other weights here than on worker '%s' (digest %.12s...): an image must not depend on "
                 "who renders it; give other weights another name, or end that worker first", model, other->name, digest);
        is_final = false; /* it may be the other one that is to go */
    } else
        return true;
    refuse(c, peer, is_final, reason);
    return false;
}

static void hear_hello(struct coordinator *c, const char *peer, const struct msg_hello *h, int64_t now_ms)
{
    char why[512];
    if (!admit(c, peer, h, now_ms))
        return;
    struct fleet_worker *w = fleet_hello(c->fleet, h, peer, now_ms, why, sizeof why);
    if (!w) {
        refuse(c, peer, false, why);
        return;
    }
    struct msg m = {.kind = MSG_WELCOME, .welcome = {.protocol = MSG_VERSION, .coordinator = c->options.name,
                                                     .heartbeat_ms = (uint32_t)c->options.pace.heartbeat_ms,
                                                     .silent_ms = (uint32_t)c->options.pace.silent_ms}};
    log_event(LOG_INFO, "worker_hello", "worker=%s epoch=%" PRIu64 " host=%s pid=%" PRIu32 " device=%s models=%s session=%u held=%d",
              log_quote(w->name), w->boot_epoch, log_quote(w->host), w->pid, log_quote(w->device), log_quote(w->models_text), w->session, w->held_count);
    say(c, peer, &m);
}

/* --- READY ----------------------------------------------------------------------------------------------------- */

static void adopt(struct coordinator *c, struct fleet_worker *w, const struct msg_held *named)
{
    struct fleet_held *h = fleet_held_find(c->fleet, named->task, named->token);
    if (h && h->worker != w)
        return; /* a token belongs to one claim: somebody is wrong, and the database will say who */
    report_forgive(&c->reports, c->turn.is_running ? c->turn.request.fail_count : 0, named->task, named->token);
    if (!h)
        h = fleet_hold(c->fleet, w, named->task, named->token, 0);
    else if (h->is_before && !h->is_lost)
        fleet_lease_enter(c->fleet, h);
    if (h)
        h->is_before = false;
}

/* What the worker had before its HELLO and neither reported nor named now is not there any more: the process that had it
 * died (lost), or the message with it never arrived (released). A list at its limit may have been cut: leases decide. */
static void give_back_unnamed(struct coordinator *c, struct fleet_worker *w, bool is_list_whole)
{
    int count = 0;
    for (struct fleet_held *h = w->held, *next; h; h = next) {
        next = h->next;
        if (!h->is_before)
            continue;
        if (is_list_whole)
            give_back(c, h, w->is_new_process ? TASK_LOST : TASK_RELEASED,
                      w->is_new_process ? "the worker's process ended while it had the task" : "the task did not reach the worker");
        fleet_drop(c->fleet, h);
        count++;
    }
    if (count > 0)
        log_event(LOG_WARN, "tasks_given_back", "worker=%s tasks=%d new_process=%d", log_quote(w->name), count, w->is_new_process);
}

static void hear_ready(struct coordinator *c, struct fleet_worker *w, const struct msg_ready *r, int64_t now_ms)
{
    for (uint32_t i = 0; i < r->held_count; i++)
        adopt(c, w, &r->held[i]);
    if (w->state == FLEET_GREETING) {
        give_back_unnamed(c, w, r->held_count < MSG_ITEMS_MAX);
        fleet_move(c->fleet, w, FLEET_IDLE);
        w->step_ms = now_ms;
    }
    if (r->credit > 0 && r->batch_max == 0)
        log_event(LOG_WARN, "odd_ready", "worker=%s credit=%" PRIu32 " batch_max=0: it gets nothing", log_quote(w->name), r->credit);
    w->credit = r->credit;
    w->batch_max = r->batch_max < r->credit ? r->batch_max : r->credit;
    if (w->batch_max > MSG_ITEMS_MAX)
        w->batch_max = MSG_ITEMS_MAX; /* more does not fit in a message */
    fleet_review(c->fleet, w);
    log_event(LOG_INFO, "ready", "worker=%s credit=%" PRIu32 " batch_max=%" PRIu32 " held=%d", log_quote(w->name), r->credit, r->batch_max, w->held_count);
}

/* --- RESULT, FAILED -------------------------------------------------------------------------------------------- */

/* A report of a task we do not know (this coordinator was restarted, or its answer was lost) is as good as any. NULL: it waits
 * for its answer already, or there is no memory; either way it is said again. */
static struct fleet_held *held_for_report(struct coordinator *c, struct fleet_worker *w, uint64_t task, uint64_t token)
{
    struct fleet_held *h = fleet_held_find(c->fleet, task, token);
    if (h)
        return h->is_reported ? NULL : h;
    h = fleet_hold(c->fleet, w, task, token, 0);
    if (h)
        fleet_lease_leave(c->fleet, h);
    return h;
}

static void queued(struct coordinator *c, struct fleet_held *h, bool is_taken)
{
    if (is_taken) {
        fleet_lease_leave(c->fleet, h);
        return;
    }
    metric_add(coordinator_metric_all()->dropped, 1);
    if (h->shape < 0 && !h->is_counted && !h->is_leased)
        fleet_drop(c->fleet, h); /* made for this report */
}

static void hear_result(struct coordinator *c, struct fleet_worker *w, const struct msg_result *r)
{
    for (uint32_t i = 0; i < r->count; i++) {
        struct fleet_held *h = held_for_report(c, w, r->items[i].task, r->items[i].token);
        if (h)
            queued(c, h, report_result(&c->reports, h, &r->items[i]));
    }
}

/* An image that did not fit: this worker gets half as many of this shape at once, already in the next turn. */
static void lower_cap(struct coordinator *c, const struct fleet_held *h)
{
    if (h->shape <= 0)
        return; /* from before this coordinator, or one of too many shapes */
    const struct workload_shape *shape = &c->workload.shapes[h->shape];
    struct dispatch_worker view = {.batch_max = h->batch_size, .caps = h->worker->caps, .cap_count = h->worker->cap_count};
    int before = dispatch_batch(&view, shape->model, shape->pixels), cap = h->batch_size > 1 ? h->batch_size / 2 : 1;
    if (cap >= before)
        return; /* the rest of a batch whose first failure lowered it, or a single image that does not fit */
    fleet_cap(h->worker, shape->model, shape->pixels, cap);
    metric_add(coordinator_metric_all()->caps_lowered, 1);
    log_event(LOG_WARN, "batch_cap_lowered", "worker=%s pixels=%" PRId64 " cap=%d", log_quote(h->worker->name), shape->pixels, cap);
}

static void hear_failed(struct coordinator *c, struct fleet_worker *w, const struct msg_failed *f)
{
    for (uint32_t i = 0; i < f->count; i++) {
        struct fleet_held *h = held_for_report(c, w, f->items[i].task, f->items[i].token);
        if (h && f->items[i].kind == MSG_FAILURE_OOM)
            lower_cap(c, h);
        if (h)
            queued(c, h, report_failed(&c->reports, h, &f->items[i]));
    }
}

/* --- HEARTBEAT, PROGRESS, BYE ---------------------------------------------------------------------------------- */

static void hear_heartbeat(struct coordinator *c, struct fleet_worker *w, const struct msg_heartbeat *b, int64_t now_ms)
{
    if (b->step_counter != w->step_counter || w->held_count == 0) {
        w->step_counter = b->step_counter;
        w->step_ms = now_ms;
        w->is_stuck = false;
    }
    if (strcmp(w->said, b->state) == 0)
        return;
    snprintf(w->said, sizeof w->said, "%s", b->state);
    if (w->state == FLEET_BLOCKED)
        w->is_changed = true; /* maybe another folder */
    fleet_review(c->fleet, w);
}

static void hear_bye(struct coordinator *c, struct fleet_worker *w, const struct msg_bye *b)
{
    char reason[MSG_REASON_MAX + 32];
    snprintf(reason, sizeof reason, "the worker left: %s", b->reason);
    log_event(LOG_INFO, "worker_gone", "worker=%s reason=%s held=%d", log_quote(w->name), log_quote(b->reason), w->held_count);
    for (struct fleet_held *h = w->held, *next; h; h = next) {
        next = h->next;
        if (h->is_reported)
            continue; /* its answer is under way */
        if (!h->is_lost)
            give_back(c, h, TASK_RELEASED, reason);
        fleet_drop(c->fleet, h);
    }
    fleet_move(c->fleet, w, FLEET_GONE);
}

/* --- silence --------------------------------------------------------------------------------------------------- */

void conversation_lose(struct coordinator *c, struct fleet_worker *w, int64_t now_ms)
{
    char reason[MSG_NAME_MAX + 96];
    int count = 0;
    snprintf(reason, sizeof reason, "nothing was heard of worker %s for %" PRId64 " ms", w->name, now_ms - w->heard_ms);
    for (struct fleet_held *h = w->held; h; h = h->next) {
        if (h->is_reported || h->is_lost)
            continue;
        give_back(c, h, TASK_LOST, reason);
        fleet_lease_leave(c->fleet, h);
        h->is_lost = true;
        count++;
    }
    log_event(LOG_WARN, "worker_silent", "worker=%s silent_ms=%" PRId64 " lost=%d", log_quote(w->name), now_ms - w->heard_ms, count);
    fleet_move(c->fleet, w, FLEET_SILENT);
}

/* What it lost still counts against its credit until it has spoken of it: it may be rendering. */
static void welcome_back(struct coordinator *c, struct fleet_worker *w)
{
    uint64_t tasks[MSG_ITEMS_MAX];
    uint32_t count = 0;
    log_event(LOG_INFO, "worker_back", "worker=%s held=%d", log_quote(w->name), w->held_count);
    for (struct fleet_held *h = w->held; h && count < MSG_ITEMS_MAX; h = h->next)
        if (h->is_lost && !h->is_reported)
            tasks[count++] = h->task;
    if (count > 0)
        conversation_cancel(c, w, tasks, count, "the worker was silent and its tasks were given back");
}

/* --- all of them ----------------------------------------------------------------------------------------------- */

static void hear_worker(struct coordinator *c, struct fleet_worker *w, const struct msg *m, int64_t now_ms)
{
    bool was_silent = w->state == FLEET_SILENT;
    fleet_heard(c->fleet, w, now_ms);
    if (was_silent)
        welcome_back(c, w);
    switch (m->kind) {
    case MSG_READY: hear_ready(c, w, &m->ready, now_ms); break;
    case MSG_RESULT: hear_result(c, w, &m->result); break;
    case MSG_FAILED: hear_failed(c, w, &m->failed); break;
    case MSG_HEARTBEAT: hear_heartbeat(c, w, &m->heartbeat, now_ms); break;
    case MSG_PROGRESS: w->step_ms = now_ms; break;
    case MSG_BYE: hear_bye(c, w, &m->bye); break;
    default:
        log_event(LOG_WARN, "unexpected_message", "worker=%s message=%s", log_quote(w->name), msg_kind_name(m->kind));
        break;
    }
}

static void hear_message(struct coordinator *c, const char *peer, const struct msg *m, int64_t now_ms)
{
    struct fleet_worker *w = fleet_find_peer(c->fleet, peer);
    if (m->kind == MSG_HELLO)
        hear_hello(c, peer, &m->hello, now_ms);
    else if (w && w->state != FLEET_GONE)
        hear_worker(c, w, m, now_ms);
    else if (m->kind != MSG_BYE)
        refuse(c, peer, false, "say hello first");
}

/* Garbage comes in floods: one line a second says how much of it. */
static void hear_garbage(struct coordinator *c, const char *peer, const char *why, int64_t now_ms)
{
    metric_add(coordinator_metric_all()->bad_messages, 1);
    c->bad_unlogged++;
    if (now_ms - c->bad_logged_ms >= BAD_LOG_MS) {
        log_event(LOG_WARN, "bad_message", "peer=%s count=%d why=%s", log_quote(peer), c->bad_unlogged, log_quote(why));
        c->bad_unlogged = 0;
        c->bad_logged_ms = now_ms;
    }
    struct msg m = {.kind = MSG_REFUSED, .refused = {.reason = why}};
    metric_add(coordinator_metric_all()->refused, 1);
    if (*peer)
        say(c, peer, &m);
}

void conversation_hear(struct coordinator *c, int64_t now_ms)
{
    char peer[LINK_PEER_MAX], why[512];
    struct msg m;
    for (int i = 0; i < HEAR_MAX; i++) {
        peer[0] = '\0';
        switch (link_receive(c->link, &m, peer, why, sizeof why)) {
        case LINK_EMPTY:
            c->is_deaf = false;
            return;
        case LINK_MESSAGE:
            hear_message(c, peer, &m, now_ms);
            msg_done(&m);
            break;
        case LINK_BAD:
            hear_garbage(c, peer, why, now_ms);
            break;
        case LINK_ERROR:
            log_event(LOG_ERROR, "receive_failed", "why=%s", log_quote(why));
            c->is_deaf = false;
            return;
        }
    }
    c->is_deaf = true;
}
