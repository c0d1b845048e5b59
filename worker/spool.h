/* spool.h - what this worker has to say until it is acknowledged: results, with a record on disk; failures, in memory.
 *
 *   SPOOL/WORKER/TASK-TOKEN.json   written, fsynced and renamed before RESULT is sent the first time;
 *                                  removed when the answer was carried out (published or discarded)
 *
 * A worker that was killed finds its records again and repeats RESULT: a finished image is not rendered twice. The list
 * belongs to the I/O thread; spool_save and spool_forget only touch files and may be called by the writer. */
#ifndef KILN_SPOOL_H
#define KILN_SPOOL_H

#include "failure.h"
#include "mailbox.h"

#define SPOOL_WAIT_MS 1000      /* until the first repetition; doubles */
#define SPOOL_WAIT_MAX_MS 10000

struct spool_entry {
    struct mail mail; /* travels between threads, then stands in the list */
    uint64_t task, token;
    bool is_result;
    bool is_settling; /* acknowledged: the writer publishes or discards */
    enum msg_verdict verdict;
    /* a result */
    char *out_dir, *file; /* owned */
    char sha256[65], digest[65];
    uint64_t bytes, seed;
    uint32_t width, height, steps;
    double guidance, render_s;
    bool truncated;
    /* a failure */
    enum msg_failure kind;
    char *reason; /* owned */
    /* when to say it next */
    int64_t due_ms;
    int wait_ms;
};

struct spool {
    char *dir;
    struct spool_entry *first, *last;
    uint32_t count, result_count; /* settling ones included */
};

/* spool_prepare makes the folder, so that the caller can lock it. spool_open, by the only process that has it, reads its
 * records. One that cannot be read is renamed NAME.bad and counted. */
bool spool_prepare(const char *dir, char *why, size_t why_bytes);
bool spool_open(struct spool *s, const char *dir, int *ret_bad_count, char *why, size_t why_bytes);
void spool_done(struct spool *s); /* frees the list, leaves the files */

struct spool_entry *spool_entry_failed(uint64_t task, uint64_t token, const struct failure *failure);
struct spool_entry *spool_entry_result(uint64_t task, uint64_t token, const char *out_dir, const char *file);
void spool_entry_free(struct spool_entry *e);

bool spool_save(const char *dir, const struct spool_entry *e, char *why, size_t why_bytes);
bool spool_forget(const char *dir, uint64_t task, uint64_t token, char *why, size_t why_bytes); /* absent: fine */

void spool_add(struct spool *s, struct spool_entry *e);
struct spool_entry *spool_find(const struct spool *s, uint64_t task, uint64_t token);
void spool_remove(struct spool *s, struct spool_entry *e); /* takes it out of the list; the caller frees it */

/* spool_due collects at most max entries of one sort that are to be said now; spool_said sets the next time. */
uint32_t spool_due(const struct spool *s, bool results, int64_t now_ms, struct spool_entry **ret, uint32_t max);
void spool_said(struct spool_entry *e, int64_t now_ms);
void spool_hurry(struct spool *s, int64_t now_ms); /* a new session: everything is due at once */

#endif
