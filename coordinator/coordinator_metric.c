/* coordinator_metric.c - the list of metrics. */
#include "coordinator_metric.h"

#include <stddef.h>

static struct coordinator_metric all;

#define COUNT(list) ((int)(sizeof(list) / sizeof *(list)))

const struct coordinator_metric *coordinator_metric_all(void)
{
    static const double turns[] = {0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5};
    static const double tasks[] = {0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800};
    char label[64];
    if (all.committed)
        return &all;
    all.committed = metric_counter("kiln_coordinator_committed_total", "Images the database made official.", NULL);
    all.stale = metric_counter("kiln_coordinator_stale_total", "Results and failures whose token was no longer good.", NULL);
    for (enum msg_failure i = 0; i <= MSG_FAILURE_RELEASED; i++)
        all.failures[i] = metric_counter("kiln_coordinator_failures_total", "Failures workers reported, by kind.",
                                         metric_label(label, sizeof label, "kind", msg_failure_name(i)));
    all.lost = metric_counter("kiln_coordinator_lost_total", "Tasks given back because their worker was silent or had died.", NULL);
    all.swept = metric_counter("kiln_coordinator_swept_total", "Tasks given back because their lease ended.", NULL);
    all.claimed = metric_counter("kiln_coordinator_claimed_total", "Tasks claimed.", NULL);
    all.assigned = metric_counter("kiln_coordinator_assigned_total", "Tasks sent to workers.", NULL);
    all.batches = metric_counter("kiln_coordinator_batches_total", "Batches sent to workers.", NULL);
    all.dropped = metric_counter("kiln_coordinator_dropped_total", "Reports not taken because the queue was full; they come again.", NULL);
    all.bad_messages = metric_counter("kiln_coordinator_bad_messages_total", "Messages that did not decode.", NULL);
    all.refused = metric_counter("kiln_coordinator_refused_total", "REFUSED said to a peer.", NULL);
    all.stuck = metric_counter("kiln_coordinator_stuck_total", "Workers that held tasks and made no step for --stuck-ms.", NULL);
    all.caps_lowered = metric_counter("kiln_coordinator_batch_caps_lowered_total", "Batch caps lowered because a worker ran out of memory.", NULL);
    all.published = metric_counter("kiln_coordinator_janitor_published_total", "Committed staged files the janitor published.", NULL);
    all.discarded = metric_counter("kiln_coordinator_janitor_discarded_total", "Stale staged files the janitor removed.", NULL);
    all.turn_seconds = metric_histogram("kiln_coordinator_turn_seconds", "Time of a turn with the database.", NULL, turns, COUNT(turns));
    all.claim_to_commit_seconds = metric_histogram("kiln_coordinator_claim_to_commit_seconds", "From the claim of a task to its commit.", NULL, tasks, COUNT(tasks));
    for (enum fleet_state i = 0; i < FLEET_STATES; i++)
        all.workers[i] = metric_gauge("kiln_coordinator_workers", "Workers, by state.", metric_label(label, sizeof label, "state", fleet_state_name(i)));
    all.database_up = metric_gauge("kiln_coordinator_database_up", "1 while the database answers.", NULL);
    all.held = metric_gauge("kiln_coordinator_held_tasks", "Tasks workers hold.", NULL);
    all.offered_groups = metric_gauge("kiln_coordinator_offered_groups", "Groups known to have tasks to claim.", NULL);
    all.queued = metric_gauge("kiln_coordinator_queued_reports", "Results and failures that wait for the database.", NULL);
    return &all;
}
