/* task_turn.h - the coordinator's side of the task store: one turn = one pipeline = one commit.
 *
 *   struct task_turn *t;  task_turn_open(&t, uri, &why);
 *   loop: switch (task_turn_poll(t)) {
 *             case TASK_TURN_IDLE:  task_turn_start(t, &request); break;
 *             case TASK_TURN_READY: use(task_turn_result(t)); task_turn_finish(t); break;
 *             default: poll task_turn_fd(t) (or sleep task_turn_retry_ms(t)) and come back; }
 *
 * In a turn, in this order: leases extended, finishes, failures, janitor's sweep, claims, heartbeats, the offer.
 * Everything in a turn may be asked again: a finish or failure of the same task and token has the same answer. */
#ifndef KILN_TASK_TURN_H
#define KILN_TASK_TURN_H

#include "pg.h"

#define TASK_STORE_NAME_MAX 128
#define TASK_STORE_TURN_MAX 1024 /* finishes, failures or claims in one turn */
#define TASK_STORE_GROUPS_MAX 256 /* groups looked at for one turn's offer */
#define TASK_STORE_SEEN_MAX 64    /* claimable tasks counted per group of an offer (queries/offer.sql) */

/* --- shared row types ------------------------------------------------------------------------- */

struct task_group {
    int64_t id, campaign_id;
    char campaign[TASK_STORE_NAME_MAX + 1], model[TASK_STORE_NAME_MAX + 1];
    int64_t loras;             /* a number for its adapters: other ones, other number; 0: none */
    int width, height, steps;  /* steps 0: model's default */
    double guidance;           /* NaN: model's default */
    char *out_dir;             /* absolute */
    char format[8];            /* png jpg webp */
    char use[16];              /* commercial, non-commercial or "" */
    int priority;              /* campaign's: higher first */
    int ready;                 /* tasks to claim now; TASK_STORE_SEEN_MAX: so many or more */
};
struct task_claimed { /* strings live as long as the result they came in */
    uint64_t task, token;
    int64_t group_id;
    uint32_t attempt;
    const char *prompt, *negative, *file, *inputs; /* inputs NULL: none */
    uint64_t seed;
    bool truncate;
};
struct task_finish {
    uint64_t task, token;
    const char *worker, *sha256, *digest;
    uint64_t bytes, seed;
    int width, height, steps;
    double guidance, render_s;
    bool truncated;
};
enum task_failure { TASK_REFUSE, TASK_RETRY, TASK_LOST, TASK_RELEASED }; /* released: no attempt counted */
struct task_fail { uint64_t task, token; enum task_failure kind; const char *reason; };

/* --- one turn ------------------------------------------------------------------------------------- */

struct task_turn; /* a connection and at most one turn in flight */

struct task_want { int64_t group_id; const char *worker; int count; int lease_ms; };  /* claim up to count */
struct task_beat { const char *worker; uint64_t boot_epoch; const char *state, *device, *models; int held;
                   const char *host; /* NULL: unknown */ };
struct task_extend { uint64_t task, token; };

struct task_turn_request { /* pointers are borrowed until the turn is over */
    const struct task_finish *finishes; int finish_count;
    const struct task_fail *fails; int fail_count;
    const struct task_want *wants; int want_count;
    const struct task_extend *extends; int extend_count; int lease_ms; /* leases of tasks still held */
    const struct task_beat *beats; int beat_count;
    bool sweep;      /* give back expired leases, at most TASK_STORE_TURN_MAX */
    bool offer;      /* refresh the list of groups with ready tasks */
    const struct task_extend *staged; int staged_count; /* staged files found on disk: whose are they? */
    bool folders;    /* list the output folders of campaigns that may still have staged files */
    const char *coordinator; /* holder of duties */
};
struct task_turn_result {
    const uint8_t *finish_committed;  /* per finish: 1 committed (now or by the same task+token before), 0 stale, or not
                                         an image at all (sha256 not 64 hex digits, 0 bytes, size or steps impossible) */
    const uint8_t *fail_accepted;     /* per fail: 1 accepted, 0 stale */
    const uint8_t *extend_alive;      /* per extend: 1 still ours and wanted, 0 lost or cancelled: stop it */
    const struct task_claimed *claimed; int claimed_count; /* grouped by want, in want order */
    const int *claimed_of_want;
    const struct task_group *offer; int offer_count; /* groups of active campaigns with at least one task to claim,
                                                        by priority; the last list that was asked for */
    bool offer_fresh;                 /* it is of this turn */
    const char *staged_state;         /* per staged: 'c' committed: publish, 'r' running: leave, 's' stale: remove */
    const char *const *staged_file;   /* per staged: the official name when 'c', else NULL */
    const char *const *folders; int folder_count;
    int swept;
    int64_t ms;
};

enum task_turn_state { TASK_TURN_AWAY, TASK_TURN_CONNECTING, TASK_TURN_IDLE, TASK_TURN_BUSY, TASK_TURN_READY,
                       TASK_TURN_REFUSED /* newer schema, no rights: needs a person; task_turn_why says what */ };

bool task_turn_open(struct task_turn **ret, const char *uri, struct pg_error *why); /* uri NULL: libpq's environment */
void task_turn_close(struct task_turn *t);
/* task_turn_poll drives connecting (with backoff and jitter by itself), sending and reading; never waits. */
enum task_turn_state task_turn_poll(struct task_turn *t);
int task_turn_fd(const struct task_turn *t);      /* -1 while away */
bool task_turn_wants_write(const struct task_turn *t);
int task_turn_retry_ms(const struct task_turn *t); /* while away: until the next attempt */
const char *task_turn_why(const struct task_turn *t); /* last error */
/* task_turn_start may be called when IDLE. When READY, task_turn_result is valid until task_turn_finish, which makes
 * it IDLE. A turn whose connection dies ends in AWAY: nothing is known of it, and everything in it may
 * simply be asked again (finish of the same task and token twice is 'committed' both times). */
void task_turn_start(struct task_turn *t, const struct task_turn_request *request);
const struct task_turn_result *task_turn_result(const struct task_turn *t);
void task_turn_finish(struct task_turn *t);
bool task_turn_notified(struct task_turn *t);     /* a submit, resume or retry was announced since last asked */

#endif
