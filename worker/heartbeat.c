/* heartbeat.c - the two messages that nobody answers. */
#include "heartbeat.h"

#include <stdlib.h>
#include <string.h>

bool heartbeat_beat(struct heartbeat *h, int64_t now_ms, uint32_t interval_ms, const struct painter_view *view,
                    uint32_t held, uint32_t spooled, const char *state, struct msg *ret)
{
    double load = 0;
    if (now_ms < h->due_ms)
        return false;
    h->due_ms = now_ms + interval_ms;
    if (getloadavg(&load, 1) != 1)
        load = 0;
    memset(ret, 0, sizeof *ret);
    ret->kind = MSG_HEARTBEAT;
    ret->heartbeat = (struct msg_heartbeat){
        .step_counter = view->step_counter, .held = held, .spooled = spooled, .load = load, .state = state};
    return true;
}

bool heartbeat_progress(struct heartbeat *h, int64_t now_ms, const struct painter_view *view, struct msg *ret)
{
    bool is_new = view->batch != h->said_batch || view->step != h->said_step;
    if (!view->is_rendering || view->step == 0 || !is_new || now_ms < h->progress_due_ms)
        return false;
    h->progress_due_ms = now_ms + HEARTBEAT_PROGRESS_MS;
    h->said_batch = view->batch;
    h->said_step = view->step;
    memset(ret, 0, sizeof *ret);
    ret->kind = MSG_PROGRESS;
    ret->progress = (struct msg_progress){.batch = view->batch, .step = view->step, .steps = view->steps};
    return true;
}
