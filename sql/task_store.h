/* task_store.h - the truth about tasks: one function per query in queries/, used by the coordinator and the
 * command line. Words are those of the tables: campaign, task_group, task, outcome, image, worker, duty.
 *
 *   task_group   a shape within a campaign: model, width, height, steps, guidance, layout of the inputs, LoRA adapters. Batches
 *                are of one group.
 *   task         hot: only what is ready or running        outcome, image   cold: what has ended
 *   lease_token  grows at each claim; finish, fail and release carry it; zero rows means stale.
 *
 * Two objects: `task_store` (blocking; the command line, tests) and `task_turn` (non-blocking; the
 * coordinator): one turn = one pipeline = one commit: finishes, failures, releases, lease extensions,
 * worker heartbeats, janitor's expiry, and the claims for the next batches. */
#ifndef KILN_TASK_STORE_H
#define KILN_TASK_STORE_H

#include "pg.h"
#include "task_turn.h"

/* --- command line: blocking ------------------------------------------------------------------------ */

struct task_store;
bool task_store_open(struct task_store **ret, const char *uri, struct pg_error *why); /* checks the schema's version */
void task_store_close(struct task_store *s);

struct campaign {
    int64_t id;
    char name[TASK_STORE_NAME_MAX + 1], state[16]; /* active, paused, cancelled, done */
    int64_t total, ready, running, done, failed;
    int64_t cancelled;                             /* of the failed */
    double images_per_second, eta_s;               /* NaN when unknown */
    char *out_dir, format[8], use[16];
    int priority;
    uint64_t base_seed;
};
struct campaign_spec { const char *name, *out_dir, *format, *use; int priority; uint64_t base_seed; };
struct task_row { /* one image to be, as submit computed it */
    const char *prompt, *negative, *model, *file, *name, *labels_json;
    const char *inputs, *layout, *loras; /* 002_inputs.sql; NULL: none */
    int row, variation, width, height, steps;
    double guidance;
    uint64_t seed;
    bool truncate;
    uint8_t content_key[16];
};
struct task_submitted { int64_t added, present; };

/* A campaign's out_dir is the caller's: task_store_campaign_done frees it and accepts {0}. */
void task_store_campaign_done(struct campaign *c);
void task_store_campaigns_free(struct campaign *list, int count);

/* task_store_campaign creates the campaign or finds it; an existing one with another out_dir, format, use or seed
 * is refused (PG_REFUSED) with both values. The priority is the last submit's. */
bool task_store_campaign(struct task_store *s, const struct campaign_spec *spec, struct campaign *ret, struct pg_error *why);
/* task_store_submit_* streams rows by COPY in chunks, each its own transaction; content keys that exist are 'present'.
 * The server works on one chunk while the caller makes the next, so an error may be of rows given before, and between
 * begin and end the store does nothing else. A cancelled campaign takes no rows (PG_REFUSED). After an error the rows of whole chunks before it are in the database;
 * the remedy is to submit the same again: only what is missing is added. */
bool task_store_submit_begin(struct task_store *s, int64_t campaign_id, struct pg_error *why);
bool task_store_submit_row(struct task_store *s, const struct task_row *row, struct pg_error *why);
bool task_store_submit_end(struct task_store *s, struct task_submitted *ret, struct pg_error *why);

bool task_store_campaign_find(struct task_store *s, const char *name, struct campaign *ret, bool *ret_found, struct pg_error *why);
bool task_store_campaigns(struct task_store *s, struct campaign **ret, int *ret_count, struct pg_error *why);
/* State changes: PG_REFUSED with a sentence when there is no such campaign or its state does not allow it.
 * pause: no new claims; what runs ends. cancel: ready tasks become failures of kind 'cancelled' (*ret_count), running ones
 * are told at their next extend. retry: all failures, cancelled ones too, become ready again (*ret_count), and a
 * cancelled campaign active. resume of a cancelled campaign is refused: retry is the way. */
bool task_store_pause(struct task_store *s, const char *name, struct pg_error *why);
bool task_store_resume(struct task_store *s, const char *name, struct pg_error *why);
bool task_store_cancel(struct task_store *s, const char *name, int64_t *ret_count, struct pg_error *why);
bool task_store_retry(struct task_store *s, const char *name, int64_t *ret_count, struct pg_error *why);
/* lost: done tasks, whose files are lost, become ready again and their images are forgotten. A cancelled campaign is refused. */
bool task_store_lost(struct task_store *s, const char *name, const uint64_t *tasks, size_t task_count, int64_t *ret_count, struct pg_error *why);

struct image_row {
    uint64_t task; const char *campaign; int row, variation; const char *path; const char *sha256; uint64_t bytes;
    int width, height, steps; double guidance; uint64_t seed; const char *prompt, *negative, *model, *digest, *worker;
    int attempt; double render_s; bool truncated; const char *labels_json;
    const char *inputs; /* NULL: none */
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
