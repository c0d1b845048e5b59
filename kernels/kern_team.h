/* kern_team.h - backends that hold one model together: each has its share of the matrices, and products are summed over all.
 *
 * The ranks of a team are backends of one process, each driven by a thread of its own; all are asked the same operations in the
 * same order (kern.h: kern_sum_ranks). Whatever they must know of each other besides passes through meetings: each rank comes
 * with a number and leaves with the numbers of all.
 *
 * A rank that cannot go on breaks the team: every meeting ends, and what the backends wait for besides (they look) as well. So
 * does a rank that lets the others wait and gives no sign of life for as long as their patience lasts: a backend beats while it
 * works, and so does who drives it, where that takes long. A broken team is whole again when all its ranks have come to mend it. */
#ifndef KILN_KERN_TEAM_H
#define KILN_KERN_TEAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define KERN_TEAM_MAX 16          /* ranks */
#define KERN_TEAM_PATIENCE_MS 7000 /* a team with a dead rank is to end within 10 s */

struct kern_team;
/* Of a backend that is opened. team NULL: it works alone; or, with ranks above 1 and on a dry device, as the first of so many of whom the
 * others are not there: what it would do is counted. */
struct kern_member { struct kern_team *team; int rank, ranks; };

/* kern_team_open: 1 to KERN_TEAM_MAX ranks. NULL on no memory. It outlives the backends that are members of it. */
struct kern_team *kern_team_open(int ranks, int patience_ms);
void kern_team_close(struct kern_team *t); /* accepts NULL; nobody is in it any more */
int kern_team_ranks(const struct kern_team *t);

/* kern_team_meet returns when all ranks have come, with their numbers in ret[ranks]; false: the team is broken. */
bool kern_team_meet(struct kern_team *t, int rank, int64_t number, int64_t *ret);

/* kern_team_break keeps the first reason, with the rank behind it. kern_team_why copies it; false: the team is whole.
 * kern_team_suspect: what the rank sees is somebody else's trouble; whoever has it says it better, even later. */
void kern_team_break(struct kern_team *t, int rank, const char *why);
void kern_team_suspect(struct kern_team *t, int rank, const char *why);
bool kern_team_is_broken(const struct kern_team *t);
uint64_t kern_team_breaks(const struct kern_team *t); /* how often it was */
bool kern_team_why(struct kern_team *t, char *ret, size_t ret_bytes, int *ret_rank); /* ret_rank: who broke it; or NULL */

/* kern_team_set_stuck: a device of the team hangs, for good. Then none of its backends can be closed, for giving memory back may wait for
 * all devices: they are left, and the process is to end. */
void kern_team_set_stuck(struct kern_team *t);
bool kern_team_is_stuck(const struct kern_team *t);

/* kern_team_mend returns when all ranks have come; then the team is whole. False: one did not come. */
bool kern_team_mend(struct kern_team *t, int rank);

/* kern_team_beat: the rank lives; from any thread. kern_team_silent_ms: since its last sign of life; a meeting is one. */
void kern_team_beat(struct kern_team *t, int rank);
int64_t kern_team_silent_ms(const struct kern_team *t, int rank);
int kern_team_patience_ms(const struct kern_team *t);
int64_t kern_team_now_ms(void); /* the clock that patience is measured by: it only goes forward */

/* kern_team_others_silent_ms: since the last sign of life of any other rank. */
int64_t kern_team_others_silent_ms(const struct kern_team *t, int rank);

/* kern_team_come: the rank's device has come to where it waits for the others, and kern_team_go: they have come, too. Meetings say both
 * themselves. kern_team_awaited_ms: for how long all others have been waiting for the rank, or 0; ret_took_ms: what the slowest of them took to
 * come there from where all were together before: a measure of what the rank has to do, as all have the same. */
void kern_team_come(struct kern_team *t, int rank);
void kern_team_go(struct kern_team *t, int rank);
int64_t kern_team_awaited_ms(struct kern_team *t, int rank, int64_t *ret_took_ms);

/* kern_team_break_silent breaks the team because of a rank that has been silent for as long as the patience lasts. */
void kern_team_break_silent(struct kern_team *t, int rank);

#endif
