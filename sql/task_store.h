/* task_store.h - the truth about tasks: one function per query in queries/, used by the coordinator and the
 * command line. Words are those of the tables: campaign, task_group, task, outcome, image, worker, duty.
 *
 *   task_group   a shape within a campaign: model, width, height, steps, guidance. Batches are of one group.
 *   task         hot: only what is ready or running        outcome, image   cold: what has ended
 *   lease_token  grows at each claim; finish, fail and release carry it; zero rows means stale.
 *
 * Two objects: `task_store` (blocking; the command line, tests) and `task_turn` (non-blocking; the
 * coordinator): one turn = one pipeline = one commit: finishes, failures, releases, lease extensions,
 * worker heartbeats, janitor's expiry, and the claims for the next batches. */
#ifndef KILN_TASK_STORE_H
#define KILN_TASK_STORE_H

#include "pg.h"

#define TASK_STORE_NAME_MAX 128
#define TASK_STORE_TURN_MAX 1024 /* finishes, failures or claims in one turn */
#define TASK_STORE_GROUPS_MAX 256 /* groups looked at for one turn's offer */

/* --- shared row types ------------------------------------------------------------------------- */

struct task_group {
    int64_t id, campaign_id;
    char campaign[TASK_STORE_NAME_MAX + 1], model[TASK_STORE_NAME_MAX + 1];
    int width, height, steps;  /* steps 0: model's default */
    double guidance;           /* NaN: model's default */
    char *out_dir;             /* absolute */
    char format[8];            /* png jpg webp */
    char use[16];              /* commercial, non-commercial or "" */
    int priority;              /* campaign's: higher first */
};
struct task_claimed { /* strings live as long as the result they came in */
    uint64_t task, token;
    int64_t group_id;
    uint32_t attempt;
    const char *prompt, *negative, *file;
    uint64_t seed;
    bool truncate;
};
struct task_finish {
    uint64_t task, token;
    const char *worker, *file, *sha256, *digest;
    uint64_t bytes, seed;
    int width, height, steps;
    double guidance, render_s;
    bool truncated;
};
enum task_failure { TASK_REFUSE, TASK_RETRY, TASK_LOST, TASK_RELEASED }; /* released: no attempt counted */
struct task_fail { uint64_t task, token; enum task_failure kind; const char *reason, *worker; };

/* --- coordinator: non-blocking turns ------------------------------------------------------------- */

struct task_turn; /* a connection and at most one turn in flight */

struct task_want { int64_t group_id; const char *worker; int count; int lease_ms; };  /* claim up to count */
struct task_beat { const char *worker; uint64_t boot_epoch; const char *state, *device, *models; int held; };
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
    const uint8_t *finish_committed;  /* per finish: 1 committed (now or by the same task+token before), 0 stale */
    const uint8_t *fail_accepted;     /* per fail: 1 accepted, 0 stale */
    const uint8_t *extend_alive;      /* per extend: 1 still ours and wanted, 0 lost or cancelled: stop it */
    const struct task_claimed *claimed; int claimed_count; /* grouped by want, in want order */
    const int *claimed_of_want;
    const struct task_group *offer; int offer_count; bool offer_fresh; /* groups with at least one ready task of
                                                                          an active campaign */
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

/* --- command line: blocking ------------------------------------------------------------------------ */

struct task_store;
bool task_store_open(struct task_store **ret, const char *uri, struct pg_error *why); /* checks the schema's version */
void task_store_close(struct task_store *s);

struct campaign {
    int64_t id;
    char name[TASK_STORE_NAME_MAX + 1], state[16]; /* active, paused, cancelled, done */
    int64_t total, ready, running, done, failed;
    double images_per_second, eta_s;               /* NaN when unknown */
    char *out_dir, format[8], use[16];
    int priority;
    uint64_t base_seed;
};
struct campaign_spec { const char *name, *out_dir, *format, *use; int priority; uint64_t base_seed; };
struct task_row { /* one image to be, as submit computed it */
    const char *prompt, *negative, *model, *file, *name, *labels_json;
    int row, variation, width, height, steps;
    double guidance;
    uint64_t seed;
    bool truncate;
    uint8_t content_key[16];
};
struct task_submitted { int64_t added, present; };

/* task_store_campaign creates the campaign or finds it; an existing one with another out_dir, format, use or seed
 * is refused (PG_REFUSED) with both values. */
bool task_store_campaign(struct task_store *s, const struct campaign_spec *spec, struct campaign *ret, struct pg_error *why);
/* task_store_submit_* streams rows by COPY in chunks, each its own transaction; content keys that exist are 'present'. */
bool task_store_submit_begin(struct task_store *s, int64_t campaign_id, struct pg_error *why);
bool task_store_submit_row(struct task_store *s, const struct task_row *row, struct pg_error *why);
bool task_store_submit_end(struct task_store *s, struct task_submitted *ret, struct pg_error *why);

bool task_store_campaign_find(struct task_store *s, const char *name, struct campaign *ret, bool *ret_found, struct pg_error *why);
bool task_store_campaigns(struct task_store *s, struct campaign **ret, int *ret_count, struct pg_error *why);
/* state changes: each says how many tasks it moved; PG_REFUSED with a sentence when the state does not allow it */
bool task_store_pause(struct task_store *s, const char *name, struct pg_error *why);
bool task_store_resume(struct task_store *s, const char *name, struct pg_error *why);
bool task_store_cancel(struct task_store *s, const char *name, int64_t *ret_count, struct pg_error *why);
bool task_store_retry(struct task_store *s, const char *name, int64_t *ret_count, struct pg_error *why);

struct image_row {
    uint64_t task; const char *campaign; int row, variation; const char *path; const char *sha256; uint64_t bytes;
    int width, height, steps; double guidance; uint64_t seed; const char *prompt, *negative, *model, *digest, *worker;
    int attempt; double render_s; bool truncated; const char *labels_json;
};
struct failure_row { uint64_t task; const char *campaign; int row, variation; const char *prompt, *kind, *reason, *worker; int attempt; };
struct worker_row { const char *name, *state, *device, *models, *host; uint64_t boot_epoch; int held; double seen_s; int64_t done; };
/* Each calls `each` for every row, in (row, variation) order, through a cursor: a million rows do not need memory. */
bool task_store_images(struct task_store *s, const char *name, bool (*each)(void *, const struct image_row *), void *, struct pg_error *why);
bool task_store_failures(struct task_store *s, const char *name, bool (*each)(void *, const struct failure_row *), void *, struct pg_error *why);
bool task_store_workers(struct task_store *s, bool (*each)(void *, const struct worker_row *), void *, struct pg_error *why);

/* task_store_audit runs the invariants as SQL (each a file in queries/audit_*.sql) and calls `each` with name and
 * number of violations; 0 everywhere is clean. Files on disk are the caller's part. */
bool task_store_audit(struct task_store *s, const char *name, bool (*each)(void *, const char *check, int64_t violations), void *, struct pg_error *why);

#endif
