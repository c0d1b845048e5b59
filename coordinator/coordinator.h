/* coordinator.h - the coordinator: one loop of named steps between workers (link) and the database (task_turn).
 *
 *   hear    waiting messages, at most HEAR_MAX            conversation.c
 *   turn    the answer of the turn that ran: acks, then assignments, cancels     turn.c
 *   sweep   what time has changed                         coordinator.c, janitor.c
 *   assign  plan and begin the next turn: what finished goes, what is free is claimed    turn.c, workload.c, dispatch.c
 *   report  metrics, readiness, state file
 *
 * Nothing in memory is the truth: kill it at any line, and the next coordinator learns from the database and from what
 * workers say. */
#ifndef KILN_COORDINATOR_H
#define KILN_COORDINATOR_H

#include "janitor.h"
#include "link.h"
#include "report.h"
#include "workload.h"

struct coordinator_options {
    const char *endpoint, *database, *name, *state_file; /* database, state_file may be NULL */
    int metrics_port;                                    /* -1: none */
    bool must_migrate;
    struct janitor_options pace;
};

#define COORDINATOR_BEATS_MAX 1024

struct coordinator_turn { /* the request of the turn that runs: it must not move meanwhile */
    bool is_running;
    double start_s;
    struct task_turn_request request;
    struct task_finish finishes[TASK_STORE_TURN_MAX];
    struct task_fail fails[TASK_STORE_TURN_MAX];
    struct task_want wants[DISPATCH_WANTS_MAX];
    struct dispatch_want plan[DISPATCH_WANTS_MAX];
    struct fleet_worker *want_worker[DISPATCH_WANTS_MAX];
    unsigned want_session[DISPATCH_WANTS_MAX];
    struct task_extend extends[TASK_STORE_TURN_MAX];
    struct task_beat beats[COORDINATOR_BEATS_MAX];
    struct fleet_worker *beat_worker[COORDINATOR_BEATS_MAX];
};

enum coordinator_database { DATABASE_CONNECTING, DATABASE_UP, DATABASE_AWAY, DATABASE_REFUSED };

struct coordinator {
    struct coordinator_options options;
    struct link *link;
    struct task_turn *database;
    struct fleet *fleet;
    struct workload workload;
    struct report_queue reports;
    struct janitor janitor;
    struct coordinator_turn turn;
    int metrics_port;
    enum coordinator_database database_state;
    bool was_up;            /* since the start */
    uint64_t batch;         /* number of the last one sent */
    int64_t offer_ms;       /* when the offer was last asked for */
    bool is_offer_wanted, is_hungry;
    bool is_deaf;           /* more messages wait than one round takes: nobody can be called silent */
    bool is_stopping, is_over;
    int64_t stop_until_ms, report_ms, bad_logged_ms;
    int bad_unlogged;
    int exit_code;
    char why[1200];         /* of exit code 2 */
};

/* coordinator_run returns the process's exit code; for 2, why is the sentence. */
int coordinator_run(const struct coordinator_options *options, char *why, size_t why_bytes);

#endif
