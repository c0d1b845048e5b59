/* coordinator_metric.h - what the coordinator counts; names as Prometheus wants them, all beginning with kiln_coordinator_. */
#ifndef KILN_COORDINATOR_METRIC_H
#define KILN_COORDINATOR_METRIC_H

#include "fleet.h"
#include "metric.h"

struct coordinator_metric {
    struct metric *committed, *stale, *lost, *swept, *claimed, *assigned, *batches, *dropped, *bad_messages, *refused;
    struct metric *failures[MSG_FAILURE_RELEASED + 1];
    struct metric *stuck, *caps_lowered, *published, *discarded;
    struct metric *turn_seconds, *claim_to_commit_seconds;
    struct metric *workers[FLEET_STATES];
    struct metric *database_up, *held, *offered_groups, *queued;
};

const struct coordinator_metric *coordinator_metric_all(void); /* registered at the first call, which is the main thread's */

#endif
