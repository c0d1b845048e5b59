/* heartbeat.h - when this worker says that it lives, and what it says.
 *
 * Sent by the I/O thread, so that a long render is no silence; carrying the painter's step counter, so that a hung
 * kernel is no life. */
#ifndef KILN_HEARTBEAT_H
#define KILN_HEARTBEAT_H

#include "painter.h"

#define HEARTBEAT_PROGRESS_MS 250

struct heartbeat { /* start from {0} */
    int64_t due_ms, progress_due_ms;
    uint64_t said_batch;
    uint32_t said_step;
};

/* heartbeat_beat: true when it is time; ret is filled, state is borrowed. */
bool heartbeat_beat(struct heartbeat *h, int64_t now_ms, uint32_t interval_ms, const struct painter_view *view,
                    uint32_t held, uint32_t spooled, const char *state, struct msg *ret);
/* heartbeat_progress: true when a step was done since it was said last, four times a second at most. */
bool heartbeat_progress(struct heartbeat *h, int64_t now_ms, const struct painter_view *view, struct msg *ret);

#endif
