/* writer.c - one thread, two kinds of jobs, each with the time of its next attempt.
 *
 * Answers go before images: they free names and records, and the coordinator has already committed them. A job that
 * must wait does not hold up those behind it: another campaign's folder may have room. */
#include "writer.h"

#include <inttypes.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "clock.h"
#include "fault_switch.h"
#include "image_file.h"
#include "log.h"
#include "need.h"
#include "store_dir.h"
#include "task_inputs.h"
#include "worker_metric.h"

#define RETRY_MS 3000
#define BLOCKED_BYTES 512

struct job {
    struct mail mail;
    struct job *next;
    bool is_image;
    int64_t due_ms;
    /* an image */
    struct batch *batch;
    uint32_t index;
    struct engine_image image;
    const char *digest, *licence;
    double render_s;
    void *data; /* encoded; kept while the disk is full */
    size_t bytes;
    /* an answer */
    struct spool_entry *entry; /* a copy of what settling needs */
};

struct writer {
    struct writer_options options;
    struct mailbox jobs;
    pthread_t thread;
    struct job *answers, *images; /* this thread's, oldest first */
    pthread_mutex_t lock;
    char blocked[BLOCKED_BYTES];  /* under the lock; "": not blocked */
};

enum step { STEP_DONE, STEP_WAIT };

/* --- being blocked ----------------------------------------------------------------------------------- */

static void set_blocked(struct writer *w, const char *text)
{
    pthread_mutex_lock(&w->lock);
    bool changed = strcmp(w->blocked, text) != 0;
    snprintf(w->blocked, sizeof w->blocked, "%s", text);
    pthread_mutex_unlock(&w->lock);
    if (!changed)
        return;
    if (*text)
        log_event(LOG_WARN, "blocked", "reason=%s", log_quote(text));
    else
        log_event(LOG_INFO, "unblocked", "reason=%s", log_quote("there is room again"));
    metric_set(worker_metric_all()->is_blocked, *text ? 1 : 0);
    mailbox_wake(w->options.outcomes);
}

bool writer_blocked(struct writer *w, char *ret_text, size_t bytes)
{
    pthread_mutex_lock(&w->lock);
    snprintf(ret_text, bytes, "%s", w->blocked);
    pthread_mutex_unlock(&w->lock);
    return *ret_text;
}

static const char *fault_words(enum store_fault fault)
{
    switch (fault) {
    case STORE_FULL: return "no space in";
    case STORE_READ_ONLY: return "read-only:";
    case STORE_MISSING: return "missing folder:";
    case STORE_DENIED: return "no permission in";
    default: return "cannot write to";
    }
}

static enum step wait_for_room(struct writer *w, struct job *j, enum store_fault fault, const char *dir, const char *why)
{
    char text[BLOCKED_BYTES];
    snprintf(text, sizeof text, "%s %.400s", fault_words(fault), dir);
    log_event(LOG_DEBUG, "stage_retry", "task=%" PRIu64 " why=%s", j->batch->assign->tasks[j->index].task, log_quote(why));
    set_blocked(w, text);
    j->due_ms = clock_ms() + RETRY_MS;
    return STEP_WAIT;
}

/* --- images ---------------------------------------------------------------------------------------- */

static enum step give_up(struct writer *w, struct job *j, const struct failure *f)
{
    mailbox_put(w->options.outcomes, &batch_outcome_failed(j->batch, j->index, f)->mail);
    return STEP_DONE;
}

static bool encode(const struct writer *w, struct job *j, char *why, size_t why_bytes)
{
    const struct msg_assign *a = j->batch->assign;
    const struct msg_task *t = &a->tasks[j->index];
    struct json_text inputs = {0};
    struct task_inputs told = {0};
    if (*t->inputs && !task_inputs_parse(&told, t->inputs, why, why_bytes))
        return false;
    task_inputs_record(&inputs, &told);
    task_inputs_done(&told);
    struct image_record record = {
        .prompt = t->prompt, .negative = t->negative, .model = a->model, .digest = j->digest, .licence = j->licence,
        .precision = w->options.precision, .software = "kiln " KILN_VERSION, .campaign = a->campaign, .inputs = inputs.data,
        .width = j->image.width, .height = j->image.height, .steps = j->image.steps, .guidance = j->image.guidance,
        .seed = j->image.seed, .truncated = j->image.truncated, .is_marked = true,
    };
    enum image_format format;
    if (!image_file_format_of(a->format, &format)) {
        snprintf(why, why_bytes, "format '%s' is not png, jpg or webp", a->format);
        json_text_done(&inputs);
        return false;
    }
    bool ok = image_file_encode(&j->data, &j->bytes, format, j->image.rgb, &record, why, why_bytes);
    json_text_done(&inputs);
    if (!ok)
        return false;
    free(j->image.rgb); /* the rest of the image is still needed; the pixels are not */
    j->image.rgb = NULL;
    return true;
}

/* Makes the last folder of the path, never its parents: those missing mean that a disk is not mounted. */
static bool prepare(const char *out_dir, struct store_error *why)
{
    char parent[PATH_MAX];
    struct stat info;
    snprintf(parent, sizeof parent, "%s", out_dir);
    size_t bytes = strlen(parent);
    while (bytes > 1 && parent[bytes - 1] == '/')
        parent[--bytes] = 0;
    char *slash = strrchr(parent, '/');
    if (slash)
        slash[slash == parent ? 1 : 0] = 0;
    bool has_parent = slash && stat(parent, &info) == 0 && S_ISDIR(info.st_mode);
    return store_dir_prepare(out_dir, has_parent, why);
}

static struct spool_entry *entry_of(const struct job *j)
{
    const struct msg_assign *a = j->batch->assign;
    const struct msg_task *t = &a->tasks[j->index];
    struct spool_entry *e = need_memory(spool_entry_result(t->task, t->token, a->out_dir, t->file));
    snprintf(e->digest, sizeof e->digest, "%s", j->digest);
    e->bytes = j->bytes;
    e->seed = j->image.seed;
    e->width = (uint32_t)j->image.width;
    e->height = (uint32_t)j->image.height;
    e->steps = (uint32_t)j->image.steps;
    e->guidance = (double)j->image.guidance;
    e->render_s = j->render_s;
    e->truncated = j->image.truncated;
    return e;
}

static enum step write_image(struct writer *w, struct job *j)
{
    const struct msg_assign *a = j->batch->assign;
    const struct msg_task *t = &a->tasks[j->index];
    double start_s = clock_s();
    char why[1024];
    struct store_error store = {0};
    if (batch_is_cancelled(j->batch, j->index)) {
        struct failure f = failure_released("cancelled");
        store_dir_discard(a->out_dir, t->task, t->token, &store); /* an attempt may have got as far as that */
        return give_up(w, j, &f);
    }
    if (!j->data && !encode(w, j, why, sizeof why)) {
        struct failure f = failure_retry("encode %s: %s", t->file, why);
        return give_up(w, j, &f);
    }
    struct spool_entry *e = entry_of(j);
    if (!prepare(a->out_dir, &store) || !store_dir_stage(a->out_dir, t->task, t->token, j->data, j->bytes, e->sha256, &store)) {
        spool_entry_free(e);
        return wait_for_room(w, j, store.fault, a->out_dir, store.text);
    }
    if (!spool_save(w->options.spool_dir, e, why, sizeof why)) {
        spool_entry_free(e);
        return wait_for_room(w, j, STORE_IO, w->options.spool_dir, why);
    }
    if (fault_switch_is_due(FAULT_EXIT_AFTER_STAGE))
        fault_switch_die();
    metric_observe(worker_metric_all()->stage_seconds, clock_s() - start_s);
    mailbox_put(w->options.outcomes, &batch_outcome_result(j->batch, j->index, e)->mail);
    return STEP_DONE;
}

/* --- answers --------------------------------------------------------------------------------------- */

static bool can_wait(enum store_fault fault)
{
    return fault == STORE_FULL || fault == STORE_READ_ONLY || fault == STORE_DENIED || fault == STORE_IO;
}

/* A folder that is not there is a disk not mounted; a staged file that is not there will not come back. */
static bool folder_is_there(const char *dir)
{
    struct stat info;
    return stat(dir, &info) == 0 && S_ISDIR(info.st_mode);
}

static bool carry_out(const struct spool_entry *e, struct store_error *why)
{
    if (e->verdict == MSG_STALE)
        return store_dir_discard(e->out_dir, e->task, e->token, why);
    if (fault_switch_is_due(FAULT_EXIT_BEFORE_PUBLISH))
        fault_switch_die();
    return store_dir_publish(e->out_dir, e->task, e->token, e->file, why);
}

static enum step settle(struct writer *w, struct job *j)
{
    const struct spool_entry *e = j->entry;
    struct store_error store = {0};
    char why[1024];
    if (!carry_out(e, &store)) {
        if (can_wait(store.fault) || !folder_is_there(e->out_dir)) {
            log_event(LOG_WARN, "settle_waits", "task=%" PRIu64 " why=%s", e->task, log_quote(store.text));
            j->due_ms = clock_ms() + RETRY_MS;
            return STEP_WAIT;
        }
        /* Nothing here can mend it; the row names a file that `kiln audit` will miss. */
        log_event(LOG_ERROR, "publish_failed", "task=%" PRIu64 " token=%" PRIu64 " file=%s why=%s", e->task, e->token,
                  log_quote(e->file), log_quote(store.text));
        metric_add(worker_metric_all()->publish_failures, 1);
    }
    if (!spool_forget(w->options.spool_dir, e->task, e->token, why, sizeof why))
        log_event(LOG_WARN, "spool_forget_failed", "why=%s", log_quote(why)); /* said again at the next start: harmless */
    mailbox_put(w->options.outcomes, &batch_outcome_settled(e->task, e->token)->mail);
    return STEP_DONE;
}

/* --- the thread ------------------------------------------------------------------------------------ */

static void job_free(struct job *j)
{
    if (!j)
        return;
    if (j->is_image)
        engine_image_done(&j->image);
    free(j->data);
    spool_entry_free(j->entry);
    free(j);
}

static void append(struct job **list, struct job *j)
{
    while (*list)
        list = &(*list)->next;
    j->next = NULL;
    *list = j;
}

/* Tries what is due in one list; returns the time of the next attempt, or INT64_MAX. */
static int64_t work_off(struct writer *w, struct job **list, enum step (*act)(struct writer *, struct job *))
{
    int64_t next_ms = INT64_MAX;
    while (*list) {
        struct job *j = *list;
        if (j->due_ms <= clock_ms() && act(w, j) == STEP_DONE) {
            *list = j->next;
            job_free(j);
            continue;
        }
        next_ms = j->due_ms < next_ms ? j->due_ms : next_ms;
        list = &j->next;
    }
    return next_ms;
}

static void accept_jobs(struct writer *w, int timeout_ms)
{
    struct job *j = mailbox_wait(&w->jobs, timeout_ms);
    for (; j; j = mailbox_take(&w->jobs))
        append(j->is_image ? &w->images : &w->answers, j);
}

static void *writer_main(void *context)
{
    struct writer *w = context;
    int64_t next_ms = INT64_MAX;
    for (;;) {
        int64_t left_ms = next_ms - clock_ms();
        accept_jobs(w, next_ms == INT64_MAX ? -1 : left_ms > 0 ? (int)left_ms : 0);
        bool is_closing = mailbox_is_closed(&w->jobs);
        int64_t answers_ms = work_off(w, &w->answers, settle);
        int64_t images_ms = work_off(w, &w->images, write_image);
        if (!w->images)
            set_blocked(w, "");
        if (is_closing)
            return NULL;
        next_ms = answers_ms < images_ms ? answers_ms : images_ms;
    }
}

bool writer_open(struct writer **ret, const struct writer_options *options, char *why, size_t why_bytes)
{
    struct writer *w = need_zeroed(1, sizeof *w);
    w->options = *options;
    pthread_mutex_init(&w->lock, NULL);
    mailbox_init(&w->jobs, false);
    int error = pthread_create(&w->thread, NULL, writer_main, w);
    if (error) {
        snprintf(why, why_bytes, "cannot start the writer thread: %s", strerror(error));
        mailbox_done(&w->jobs);
        pthread_mutex_destroy(&w->lock);
        free(w);
        return false;
    }
    *ret = w;
    return true;
}

static void free_list(struct job *list)
{
    while (list) {
        struct job *next = list->next;
        job_free(list);
        list = next;
    }
}

void writer_close(struct writer *w)
{
    if (!w)
        return;
    mailbox_close(&w->jobs);
    pthread_join(w->thread, NULL);
    for (struct job *j; (j = mailbox_take(&w->jobs));)
        job_free(j);
    free_list(w->answers);
    free_list(w->images);
    mailbox_done(&w->jobs);
    pthread_mutex_destroy(&w->lock);
    free(w);
}

void writer_image(struct writer *w, struct batch *b, uint32_t index, struct engine_image *image, const char *digest,
                  const char *licence, double render_s)
{
    struct job *j = need_zeroed(1, sizeof *j);
    j->is_image = true;
    j->batch = b;
    j->index = index;
    j->image = *image;
    memset(image, 0, sizeof *image);
    j->digest = digest;
    j->licence = licence;
    j->render_s = render_s;
    mailbox_put(&w->jobs, &j->mail);
}

void writer_settle(struct writer *w, const struct spool_entry *e)
{
    struct job *j = need_zeroed(1, sizeof *j);
    j->entry = need_memory(spool_entry_result(e->task, e->token, e->out_dir, e->file));
    j->entry->verdict = e->verdict;
    mailbox_put(&w->jobs, &j->mail);
}
