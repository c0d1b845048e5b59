/* report.c - two rings. */
#include "report.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool report_open(struct report_queue *q)
{
    *q = (struct report_queue){0};
    q->results = calloc(REPORT_QUEUE_MAX, sizeof *q->results);
    q->failures = calloc(REPORT_QUEUE_MAX, sizeof *q->failures);
    if (q->results && q->failures)
        return true;
    report_close(q);
    return false;
}

void report_close(struct report_queue *q)
{
    if (q->failures)
        for (int i = 0; i < q->failure_count; i++)
            free(report_failure_at(q, i)->reason);
    free(q->results);
    free(q->failures);
    *q = (struct report_queue){0};
}

struct report_result *report_result_at(struct report_queue *q, int i)
{
    return &q->results[(q->result_first + i) % REPORT_QUEUE_MAX];
}

struct report_failure *report_failure_at(struct report_queue *q, int i)
{
    return &q->failures[(q->failure_first + i) % REPORT_QUEUE_MAX];
}

static void mark(struct fleet_held *held)
{
    held->is_reported = true;
    held->is_before = false;
    held->worker->pins++;
}

/* What no image can be goes to the database as 0, which refuses it: a wrong number from a worker is stale, no fault of ours. */
static int as_int(uint32_t value)
{
    return value <= INT32_MAX ? (int)value : 0;
}

bool report_result(struct report_queue *q, struct fleet_held *held, const struct msg_result_item *item)
{
    if (q->result_count == REPORT_QUEUE_MAX)
        return false;
    struct report_result *r = report_result_at(q, q->result_count++);
    r->held = held;
    snprintf(r->sha256, sizeof r->sha256, "%s", item->sha256);
    snprintf(r->digest, sizeof r->digest, "%s", item->digest);
    r->finish = (struct task_finish){
        .task = item->task, .token = item->token, .worker = held->worker->name, .sha256 = r->sha256, .digest = r->digest,
        .bytes = item->bytes, .seed = item->seed, .width = as_int(item->width), .height = as_int(item->height),
        .steps = as_int(item->steps), .guidance = item->guidance, .render_s = item->render_s, .truncated = item->truncated};
    mark(held);
    return true;
}

static struct report_failure *add_failure(struct report_queue *q, const char *reason)
{
    char *copy = q->failure_count < REPORT_QUEUE_MAX ? strdup(reason) : NULL;
    if (!copy)
        return NULL;
    struct report_failure *f = report_failure_at(q, q->failure_count++);
    *f = (struct report_failure){.reason = copy};
    return f;
}

bool report_failed(struct report_queue *q, struct fleet_held *held, const struct msg_failed_item *item)
{
    static const enum task_failure kind[] = {[MSG_FAILURE_REFUSE] = TASK_REFUSE, [MSG_FAILURE_RETRY] = TASK_RETRY,
                                             [MSG_FAILURE_OOM] = TASK_RETRY, [MSG_FAILURE_RELEASED] = TASK_RELEASED};
    struct report_failure *f = add_failure(q, item->reason);
    if (!f)
        return false;
    f->held = held;
    f->kind = item->kind;
    f->fail = (struct task_fail){.task = item->task, .token = item->token, .kind = kind[item->kind], .reason = f->reason};
    mark(held);
    return true;
}

bool report_give_back(struct report_queue *q, uint64_t task, uint64_t token, enum task_failure kind, const char *reason)
{
    struct report_failure *f = add_failure(q, reason);
    if (!f)
        return false;
    f->fail = (struct task_fail){.task = task, .token = token, .kind = kind, .reason = f->reason};
    return true;
}

void report_forgive(struct report_queue *q, int running, uint64_t task, uint64_t token)
{
    for (int i = running; i < q->failure_count; i++) {
        struct report_failure *f = report_failure_at(q, i);
        if (!f->held && f->fail.task == task && f->fail.token == token)
            f->fail.task = 0; /* no task: the turn passes over it */
    }
}

void report_answered(struct report_queue *q, int results, int failures)
{
    assert(results <= q->result_count);
    assert(failures <= q->failure_count);
    for (int i = 0; i < failures; i++)
        free(report_failure_at(q, i)->reason);
    q->result_first = (q->result_first + results) % REPORT_QUEUE_MAX;
    q->result_count -= results;
    q->failure_first = (q->failure_first + failures) % REPORT_QUEUE_MAX;
    q->failure_count -= failures;
}
