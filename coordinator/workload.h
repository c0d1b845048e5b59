/* workload.h - what there is to do, as the database last offered it, and what it costs: groups, campaigns with what they
 * are owed, shapes with their measured seconds. Feeds dispatch, which decides. */
#ifndef KILN_WORKLOAD_H
#define KILN_WORKLOAD_H

#include "fleet.h"
#include "task_turn.h"

#define WORKLOAD_SHAPES_MAX 1024

struct workload_group { struct task_group row; int shape; }; /* row.out_dir is ours */
struct workload_shape { int model, steps; int64_t pixels; double image_s; }; /* image_s 0: not measured yet */
struct workload_wait { int64_t campaign_id, since_ms; int model; bool is_offered; };

struct workload {
    struct workload_group groups[DISPATCH_GROUPS_MAX];
    struct dispatch_group items[DISPATCH_GROUPS_MAX]; /* the same, for dispatch */
    int group_count;
    struct dispatch_campaign campaigns[DISPATCH_GROUPS_MAX]; int campaign_count;
    struct workload_wait waits[DISPATCH_GROUPS_MAX]; int wait_count;
    struct workload_shape shapes[WORKLOAD_SHAPES_MAX]; int shape_count;
    struct dispatch_worker takers[FLEET_WORKERS_MAX];
    struct fleet_worker *taker_of[FLEET_WORKERS_MAX];
    bool is_stale; /* a group ran dry or something came back since the last offer */
};

void workload_done(struct workload *l);
bool workload_offer(struct workload *l, struct fleet *f, const struct task_group *offer, int count, int64_t now_ms); /* false: no memory */
/* workload_plan fills ret with wants; taker_of[want.worker] and groups[want.group] say who and what. */
int workload_plan(struct workload *l, const struct fleet *f, int64_t now_ms, int slots, struct dispatch_want *ret, int max, bool *is_hungry);
void workload_given(struct workload *l, int group, int wanted, int got, int64_t now_ms); /* what a plan's want really got */
void workload_measured(struct workload *l, int shape, double image_s);
int workload_open_groups(const struct workload *l);

#endif
