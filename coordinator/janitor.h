/* janitor.h - what happens because time passed: leases that need extending, workers that fell silent or stand still, the
 * sweep, what the database is told about workers, and staged files nobody came back for.
 *
 * Only paces and decisions; the coordinator's turns carry them out. Time comes in as now_ms, which only goes forward.
 * Leases before the sweep: after a start or an outage nothing is swept until workers had the time to say hello and every
 * lease held was extended, or an outage would make lost work of all that runs. */
#ifndef KILN_JANITOR_H
#define KILN_JANITOR_H

#include "fleet.h"
#include "janitor_disk.h"
#include "task_turn.h"

#define JANITOR_SWEEP_MS 1000
#define JANITOR_BEAT_MS 2000          /* what the database knows of a worker is at most so old */
#define JANITOR_BEAT_CHANGED_MS 250   /* a change is told sooner, but no flood of them */
#define JANITOR_FORGET_MS 600000      /* a silent worker is forgotten */

struct janitor_options { int lease_ms, heartbeat_ms, silent_ms, stuck_ms, staged_ms; };

/* Staged files: the folders of campaigns, one after the other. */
enum janitor_round { JANITOR_RESTS, JANITOR_NEEDS_FOLDERS, JANITOR_LISTS, JANITOR_NEEDS_VERDICTS, JANITOR_SETTLES };

struct janitor {
    struct janitor_options options;
    int64_t back_ms;                  /* start, or when the database came back */
    int64_t sweep_from_ms, sweep_ms, ping_ms;
    enum janitor_round round;
    int64_t round_ms;                 /* when the next one begins */
    char **folders; int folder_count, folder;
    struct janitor_disk *disk;        /* NULL: staged files are not looked at */
    struct janitor_disk_file files[JANITOR_DISK_FILES_MAX]; int file_count;
    struct task_extend asked[JANITOR_DISK_FILES_MAX];
    bool is_whole;                    /* the folder's list was not cut */
};

void janitor_init(struct janitor *j, const struct janitor_options *o, struct janitor_disk *disk, int64_t now_ms);
void janitor_done(struct janitor *j);
void janitor_database_back(struct janitor *j, int64_t now_ms);

/* janitor_lease_ms: what a claim or an extension asks for: --lease-ms less the pace of the sweep, so that a task whose worker
 * and coordinator died is ready again within --lease-ms. */
int janitor_lease_ms(const struct janitor *j);
int janitor_sweep_pace_ms(const struct janitor *j);

/* janitor_extend lists the leases that are due, a third of a lease after they were last new, with those that would be due soon,
 * so that many go in one turn; all of them after an outage. They stay where they are in the line. */
int janitor_extend(const struct janitor *j, const struct fleet *f, int64_t now_ms, struct task_extend *ret, int max);
bool janitor_may_sweep(const struct janitor *j, const struct fleet *f, int64_t now_ms);
void janitor_swept(struct janitor *j, int64_t now_ms);
bool janitor_pings(struct janitor *j, int64_t now_ms); /* true once per heartbeat: say HEARTBEAT to everybody */

bool janitor_is_silent(const struct janitor *j, const struct fleet_worker *w, int64_t now_ms);
bool janitor_is_forgotten(const struct fleet_worker *w, int64_t now_ms);
/* janitor_is_stuck: it holds tasks and is heard, but no step was made for stuck_ms. */
bool janitor_is_stuck(const struct janitor *j, const struct fleet_worker *w, int64_t now_ms);
/* janitor_beat lists workers whose row is old or wrong, and takes them for told; texts are the workers'. */
int janitor_beat(struct fleet *f, int64_t now_ms, struct task_beat *ret, struct fleet_worker **ret_workers, int max);

/* Staged files. step moves the round on as time and disk allow. What round says is then asked in a turn, and
 * the answer given back. */
void janitor_step(struct janitor *j, int64_t now_ms);
bool janitor_take_folders(struct janitor *j, const char *const *folders, int count); /* false: out of memory */
void janitor_take_verdicts(struct janitor *j, const char *state, const char *const *file);

/* janitor_next_ms: when it has something to do, at the latest. */
int64_t janitor_next_ms(const struct janitor *j, const struct fleet *f);

#endif
