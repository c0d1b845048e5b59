/* report.h - what workers said about tasks and the database has not answered yet: two bounded queues, results and failures.
 *
 * The first ones go into a turn and leave when it is answered; a turn that is lost leaves them where they are. A full queue
 * takes nothing: who said it was not answered and says it again. Entries do not move, so a turn borrows their texts. */
#ifndef KILN_REPORT_H
#define KILN_REPORT_H

#include "fleet.h"
#include "task_turn.h"

#define REPORT_QUEUE_MAX 4096

struct report_result { struct fleet_held *held; struct task_finish finish; char sha256[65], digest[65]; };
struct report_failure {
    struct fleet_held *held;  /* NULL: the coordinator itself gives the task back; nobody is answered */
    struct task_fail fail;
    enum msg_failure kind;    /* as the worker said it */
    char *reason;
};
struct report_queue {
    struct report_result *results; int result_first, result_count;
    struct report_failure *failures; int failure_first, failure_count;
};

bool report_open(struct report_queue *q);
void report_close(struct report_queue *q);
/* False: the queue is full or out of memory. held gets is_reported, and its worker a pin, until it is answered. */
bool report_result(struct report_queue *q, struct fleet_held *held, const struct msg_result_item *item);
bool report_failed(struct report_queue *q, struct fleet_held *held, const struct msg_failed_item *item);
bool report_give_back(struct report_queue *q, uint64_t task, uint64_t token, enum task_failure kind, const char *reason);
/* report_forgive: the worker still has it after all; what the turn that runs has taken (the first `running`) stays. */
void report_forgive(struct report_queue *q, int running, uint64_t task, uint64_t token);
struct report_result *report_result_at(struct report_queue *q, int i);   /* 0: the oldest */
struct report_failure *report_failure_at(struct report_queue *q, int i);
void report_answered(struct report_queue *q, int results, int failures); /* the oldest ones leave */

#endif
