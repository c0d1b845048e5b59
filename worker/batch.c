/* batch.c - batches, outcomes, and the caps that memory taught us. */
#include "batch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "need.h"

struct batch *batch_new(struct msg *assign, unsigned session)
{
    struct batch *b = need_zeroed(1, sizeof *b);
    b->message = *assign;
    memset(assign, 0, sizeof *assign);
    b->assign = &b->message.assign;
    b->tasks = need_zeroed(b->assign->count, sizeof *b->tasks);
    b->open = b->assign->count + 1;
    b->session = session;
    return b;
}

void batch_free(struct batch *b)
{
    if (!b)
        return;
    msg_done(&b->message);
    free(b->tasks);
    free(b);
}

bool batch_is_cancelled(const struct batch *b, uint32_t index)
{
    return atomic_load(&b->tasks[index].is_cancelled);
}

/* --- outcomes -------------------------------------------------------------------------------------- */

static struct batch_outcome *outcome_new(enum outcome_kind kind, struct batch *b, uint32_t index)
{
    struct batch_outcome *o = need_zeroed(1, sizeof *o);
    o->kind = kind;
    o->batch = b;
    o->index = index;
    return o;
}

struct batch_outcome *batch_outcome_result(struct batch *b, uint32_t index, struct spool_entry *entry)
{
    struct batch_outcome *o = outcome_new(OUTCOME_TASK, b, index);
    o->entry = entry;
    return o;
}

struct batch_outcome *batch_outcome_failed(struct batch *b, uint32_t index, const struct failure *failure)
{
    const struct msg_task *t = &b->assign->tasks[index];
    struct batch_outcome *o = outcome_new(OUTCOME_TASK, b, index);
    o->entry = need_memory(spool_entry_failed(t->task, t->token, failure));
    o->is_last = failure->is_last;
    return o;
}

struct batch_outcome *batch_outcome_over(struct batch *b)
{
    return outcome_new(OUTCOME_OVER, b, 0);
}

struct batch_outcome *batch_outcome_settled(uint64_t task, uint64_t token)
{
    struct batch_outcome *o = outcome_new(OUTCOME_SETTLED, NULL, 0);
    o->task = task;
    o->token = token;
    return o;
}

void batch_outcome_free(struct batch_outcome *o)
{
    if (!o)
        return;
    spool_entry_free(o->entry);
    free(o);
}

/* --- caps ------------------------------------------------------------------------------------------ */

static int caps_find(const struct batch_caps *c, const char *model, uint32_t width, uint32_t height)
{
    for (int i = 0; i < c->count; i++)
        if (c->shapes[i].width == width && c->shapes[i].height == height && strcmp(c->shapes[i].model, model) == 0)
            return i;
    return -1;
}

int batch_caps_of(const struct batch_caps *c, const char *model, uint32_t width, uint32_t height)
{
    int at = caps_find(c, model, width, height);
    return at < 0 ? c->most : c->shapes[at].cap;
}

int batch_caps_lower(struct batch_caps *c, const char *model, uint32_t width, uint32_t height, int count)
{
    int at = caps_find(c, model, width, height);
    int cap = count > 1 ? count / 2 : 1;
    if (at < 0) {
        /* A full table forgets its oldest shape: that one is learnt again by one failed batch. */
        if (c->count == BATCH_CAPS_MAX)
            memmove(&c->shapes[0], &c->shapes[1], sizeof c->shapes[0] * (size_t)--c->count);
        at = c->count++;
        snprintf(c->shapes[at].model, sizeof c->shapes[at].model, "%s", model);
        c->shapes[at].width = width;
        c->shapes[at].height = height;
        c->shapes[at].cap = c->most;
    }
    if (cap < c->shapes[at].cap)
        c->shapes[at].cap = cap;
    return c->shapes[at].cap;
}
