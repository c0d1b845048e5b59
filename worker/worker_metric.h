/* worker_metric.h - what a worker counts; names as Prometheus wants them, all beginning with kiln_worker_. */
#ifndef KILN_WORKER_METRIC_H
#define KILN_WORKER_METRIC_H

#include "metric.h"
#include "msg.h"

struct worker_metric {
    struct metric *images, *stale, *publish_failures, *repeats;
    struct metric *failures[MSG_FAILURE_RELEASED + 1];
    struct metric *batch_size, *render_seconds, *stage_seconds;
    struct metric *held, *spooled, *is_blocked, *is_connected;
};

const struct worker_metric *worker_metric_all(void); /* registered at the first call, which is the main thread's */

#endif
