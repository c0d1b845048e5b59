/* task_store.c - see task_store.h: the command line's side of the task store, blocking.
 * Each change of a campaign's state locks its row first, so that it and a submit, a failure or another change come one after
 * the other. What loses a deadlock or a lock is run again here; what the caller gets is final. */
#include "task_store.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "migrate.h"
#include "sql_text.h"

enum {
    ANSWER_MS = 10 * 60 * 1000, /* a cancel may move millions of rows */
    CHUNK_ROWS = 20000,
    CHUNK_BYTES = 16 << 20,
    ROW_FIELDS = 18,
    AGAIN_MAX = 5,
};

struct task_store {
    struct pg *pg;
    struct pg_values values;
    struct chunk { struct pg_values rows; int row_count; } filling, under_way; /* of a submit, as COPY streams */
    bool is_under_way;
    int64_t campaign_id;
    char campaign[TASK_STORE_NAME_MAX + 1];
    struct task_submitted submitted;
};

/* --- opening ------------------------------------------------------------------------------------------------ */

/* run runs a query file with the values at hand. */
static bool run(struct task_store *s, const char *query, struct pg_result **ret, struct pg_error *why)
{
    return pg_run(s->pg, sql_text_query(query), &s->values, ret, why);
}

static bool check_version(struct task_store *s, struct pg_error *why)
{
    struct pg_result *r = NULL;
    pg_values_clear(&s->values);
    if (!run(s, "version", &r, why))
        return migrate_explain(why);
    int version = (int)pg_row_i64(r, 0, 0);
    pg_result_free(r);
    return migrate_check(version, why);
}

bool task_store_open(struct task_store **ret, const char *uri, struct pg_error *why)
{
    struct task_store *s = calloc(1, sizeof *s);
    if (!s)
        return pg_error_set(why, PG_AWAY, "out of memory for the task store");
    if (!pg_open(&s->pg, uri, ANSWER_MS, why) || !check_version(s, why)) {
        task_store_close(s);
        return false;
    }
    *ret = s;
    return true;
}

void task_store_close(struct task_store *s)
{
    if (!s)
        return;
    pg_close(s->pg);
    pg_values_done(&s->values);
    pg_values_done(&s->filling.rows);
    pg_values_done(&s->under_way.rows);
    free(s);
}

static bool announce(struct task_store *s, struct pg_error *why)
{
    return pg_script(s->pg, sql_text_query("announce"), why);
}

/* transact runs `act` in a transaction, again when it met another one. */
static bool transact(struct task_store *s, bool (*act)(struct task_store *s, void *context, struct pg_error *why),
                     void *context, struct pg_error *why)
{
    struct pg_error ignored;
    for (int again = 0;; again++) {
        if (pg_script(s->pg, "begin", why) && act(s, context, why) && pg_script(s->pg, "commit", why))
            return true;
        if (why->fault == PG_AWAY)
            return false;
        pg_script(s->pg, "rollback", &ignored);
        if (why->fault != PG_CONFLICT || again == AGAIN_MAX)
            return false;
    }
}

/* --- campaigns ---------------------------------------------------------------------------------------------- */

static bool read_campaign(const struct pg_result *r, int row, struct campaign *ret, struct pg_error *why)
{
    struct campaign c = {
        .id = pg_row_i64(r, row, 0), .total = pg_row_i64(r, row, 3), .ready = pg_row_i64(r, row, 4),
        .running = pg_row_i64(r, row, 5), .done = pg_row_i64(r, row, 6), .failed = pg_row_i64(r, row, 7),
        .images_per_second = pg_row_f64(r, row, 8), .eta_s = pg_row_f64(r, row, 9),
        .out_dir = strdup(pg_row_text(r, row, 10)), .priority = (int)pg_row_i64(r, row, 13),
        .base_seed = pg_row_u64(r, row, 14), .cancelled = pg_row_i64(r, row, 15)};
    if (!c.out_dir)
        return pg_error_set(why, PG_AWAY, "out of memory for a campaign");
    snprintf(c.name, sizeof c.name, "%s", pg_row_text(r, row, 1));
    snprintf(c.state, sizeof c.state, "%s", pg_row_text(r, row, 2));
    snprintf(c.format, sizeof c.format, "%s", pg_row_text(r, row, 11));
    snprintf(c.use, sizeof c.use, "%s", pg_row_text(r, row, 12));
    *ret = c;
    return true;
}

void task_store_campaign_done(struct campaign *c)
{
    free(c->out_dir);
    *c = (struct campaign){0};
}

void task_store_campaigns_free(struct campaign *list, int count)
{
    for (int i = 0; i < count; i++)
        free(list[i].out_dir);
    free(list);
}

bool task_store_campaign_find(struct task_store *s, const char *name, struct campaign *ret, bool *ret_found,
                              struct pg_error *why)
{
    struct pg_result *r = NULL;
    pg_values_clear(&s->values);
    pg_values_text(&s->values, name);
    if (!run(s, "campaign_status", &r, why))
        return false;
    bool found = pg_row_count(r) > 0, ok = !found || read_campaign(r, 0, ret, why);
    pg_result_free(r);
    if (ok)
        *ret_found = found;
    return ok;
}

bool task_store_campaigns(struct task_store *s, struct campaign **ret, int *ret_count, struct pg_error *why)
{
    struct pg_result *r = NULL;
    pg_values_clear(&s->values);
    pg_values_text(&s->values, NULL);
    if (!run(s, "campaign_status", &r, why))
        return false;
    int count = pg_row_count(r), read = 0;
    struct campaign *list = calloc((size_t)count + 1, sizeof *list);
    bool ok = list || pg_error_set(why, PG_AWAY, "out of memory for the campaigns");
    while (ok && read < count && (ok = read_campaign(r, read, &list[read], why)))
        read++;
    pg_result_free(r);
    if (ok) {
        *ret = list;
        *ret_count = count;
    } else {
        task_store_campaigns_free(list, read);
    }
    return ok;
}

/* unknown says that there is no such campaign. */
static bool unknown(const char *name, struct pg_error *why)
{
    return pg_error_set(why, PG_REFUSED, "there is no campaign '%s': 'kiln status' lists them", name);
}

static bool find_or_refuse(struct task_store *s, const char *name, struct campaign *ret, struct pg_error *why)
{
    bool found = false;
    if (!task_store_campaign_find(s, name, ret, &found, why))
        return false;
    return found || unknown(name, why);
}

/* is_same: a campaign is one folder, format, use and seed for life; otherwise its images would not be what they were. */
static bool is_same(const struct campaign *old, const struct campaign_spec *spec, struct pg_error *why)
{
    const char *use = spec->use ? spec->use : "";
    if (strcmp(old->out_dir, spec->out_dir) != 0)
        return pg_error_set(why, PG_REFUSED, "campaign '%s' writes to '%s', not to '%s': leave --out away or take another name",
                            old->name, old->out_dir, spec->out_dir);
    if (strcmp(old->format, spec->format) != 0)
        return pg_error_set(why, PG_REFUSED, "campaign '%s' has format %s, not %s: leave --format away or take another name",
                            old->name, old->format, spec->format);
    if (strcmp(old->use, use) != 0)
        return pg_error_set(why, PG_REFUSED, "campaign '%s' was made with use '%s' ('': none), not '%s': leave --use away or take another name",
                            old->name, old->use, use);
    if (old->base_seed != spec->base_seed)
        return pg_error_set(why, PG_REFUSED, "campaign '%s' has seed %llu, not %llu: leave --seed away or take another name",
                            old->name, (unsigned long long)old->base_seed, (unsigned long long)spec->base_seed);
    return true;
}

static bool create(struct task_store *s, const struct campaign_spec *spec, struct pg_error *why)
{
    pg_values_clear(&s->values);
    pg_values_text(&s->values, spec->name);
    pg_values_text(&s->values, spec->out_dir);
    pg_values_text(&s->values, spec->format);
    pg_values_text(&s->values, spec->use ? spec->use : "");
    pg_values_i32(&s->values, spec->priority);
    pg_values_u64(&s->values, spec->base_seed);
    return run(s, "campaign_create", NULL, why);
}

bool task_store_campaign(struct task_store *s, const struct campaign_spec *spec, struct campaign *ret, struct pg_error *why)
{
    struct campaign c = {0};
    if (!create(s, spec, why) || !find_or_refuse(s, spec->name, &c, why))
        return false;
    bool ok = is_same(&c, spec, why);
    if (ok && c.priority != spec->priority) {
        pg_values_clear(&s->values);
        pg_values_i64(&s->values, c.id);
        pg_values_i32(&s->values, spec->priority);
        ok = run(s, "campaign_priority", NULL, why);
        c.priority = spec->priority;
    }
    if (ok)
        *ret = c;
    else
        task_store_campaign_done(&c);
    return ok;
}

/* --- submit -------------------------------------------------------------------------------------------------- */

static bool cancelled_takes_nothing(struct task_store *s, struct pg_error *why)
{
    return pg_error_set(why, PG_REFUSED, "campaign '%s' is cancelled and takes no rows: 'kiln retry %s' takes it up again",
                        s->campaign, s->campaign);
}

static void begin_chunk(struct chunk *chunk)
{
    pg_values_copy_begin(&chunk->rows);
    chunk->row_count = 0;
}

bool task_store_submit_begin(struct task_store *s, int64_t campaign_id, struct pg_error *why)
{
    struct pg_result *r = NULL;
    pg_values_clear(&s->values);
    pg_values_i64(&s->values, campaign_id);
    if (!run(s, "submit_begin", &r, why))
        return false;
    bool found = pg_row_count(r) == 1, cancelled = found && pg_row_bool(r, 0, 1);
    snprintf(s->campaign, sizeof s->campaign, "%s", found ? pg_row_text(r, 0, 0) : "");
    pg_result_free(r);
    if (!found)
        return pg_error_set(why, PG_REFUSED, "there is no campaign with id %lld", (long long)campaign_id);
    if (cancelled)
        return cancelled_takes_nothing(s, why);
    s->campaign_id = campaign_id;
    s->submitted = (struct task_submitted){0};
    begin_chunk(&s->filling);
    return pg_script(s->pg, sql_text_query("submit_staging"), why);
}

/* The statements of a chunk that need no decision of ours, up to its commit. */
static const char *const chunk_steps[] = {"submit_groups", "submit_content", "submit_tasks", "submit_total"};
enum { CHUNK_STEPS = sizeof chunk_steps / sizeof *chunk_steps, CONTENT_STEP = 1, TASKS_STEP = 2 };

/* open_chunk begins the transaction of a chunk and copies its rows; what is left is queued by queue_chunk. */
static bool open_chunk(struct task_store *s, struct pg_error *why)
{
    struct pg_result *r = NULL;
    pg_values_clear(&s->values);
    pg_values_i64(&s->values, s->campaign_id);
    if (!pg_script(s->pg, "begin", why) || !run(s, "submit_lock", &r, why))
        return false;
    bool is_cancelled = pg_row_count(r) == 0 || pg_row_bool(r, 0, 0);
    pg_result_free(r);
    if (is_cancelled)
        return cancelled_takes_nothing(s, why);
    return pg_copy(s->pg, sql_text_query("submit_copy"), &s->under_way.rows, why);
}

static bool queue_chunk(struct task_store *s, struct pg_error *why)
{
    bool ok = pg_pipe_enter(s->pg, why);
    for (int i = 0; ok && i < CHUNK_STEPS; i++)
        ok = pg_pipe_sql(s->pg, sql_text_query(chunk_steps[i]), &s->values, why);
    return ok && pg_pipe_sql(s->pg, "commit", NULL, why) && pg_pipe_sync(s->pg, why);
}

/* hear_chunk waits for the answers of a chunk, to the sync; the first error is the chunk's. */
static bool hear_chunk(struct task_store *s, struct task_submitted *ret, struct pg_error *why)
{
    int64_t number[CHUNK_STEPS + 1] = {0}, rows = 0;
    bool ok = true;
    for (int step = 0;; step++) {
        struct pg_result *r = NULL;
        struct pg_error now = {0};
        switch (pg_pipe_wait(s->pg, &r, &now)) {
        case PG_EVENT_ROWS:
            if (step == CONTENT_STEP)
                rows = pg_row_i64(r, 0, 0);
            if (step == CONTENT_STEP || step == TASKS_STEP)
                number[step] = pg_row_i64(r, 0, step == CONTENT_STEP);
            pg_result_free(r);
            break;
        case PG_EVENT_FAILED:
            *why = ok ? now : *why;
            ok = false;
            break;
        case PG_EVENT_SYNCED:
            if (!pg_pipe_leave(s->pg, ok ? why : &now) || !ok)
                return false;
            *ret = (struct task_submitted){number[CONTENT_STEP], rows - number[CONTENT_STEP]};
            return number[CONTENT_STEP] == number[TASKS_STEP] ||
                   pg_error_set(why, PG_REFUSED, "submit: %lld new content keys gave %lld tasks: run 'kiln audit'",
                                (long long)number[CONTENT_STEP], (long long)number[TASKS_STEP]);
        case PG_EVENT_GONE:
            *why = now;
            return false;
        case PG_EVENT_SKIPPED:
        case PG_EVENT_NONE:
            break;
        }
    }
}

/* say_shared_file: the file stands in the server's text as "Key (folder, file)=(1234, NAME) already exists". */
static void say_shared_file(struct pg_error *why)
{
    const char *name = strstr(why->text, "(folder, file)=("), *end = name ? strstr(name, ") already exists") : NULL;
    name = name ? strstr(name, ", ") : NULL;
    name = name ? strstr(name + 2, ", ") : NULL;
    char file[300] = "";
    if (name && end && end > name)
        snprintf(file, sizeof file, " '%.*s'", (int)(end - name - 2), name + 2);
    pg_error_set(why, PG_REFUSED, "two images want one file name%s, of this campaign or of another that writes to the same folder: a new campaign "
                 "with an --out of its own has room for both", file);
}

/* give_up rolls a chunk back. True when it only met another transaction and may be sent again. */
static bool give_up(struct task_store *s, int again, struct pg_error *why)
{
    struct pg_error ignored;
    s->is_under_way = false;
    if (why->fault == PG_AWAY)
        return false;
    pg_script(s->pg, "rollback", &ignored);
    if (strstr(why->text, "content_file"))
        say_shared_file(why);
    return why->fault == PG_CONFLICT && again < AGAIN_MAX;
}

/* start_chunk puts the chunk under way; the server works on it while the caller makes the next one. */
static bool start_chunk(struct task_store *s, int *again, struct pg_error *why)
{
    while (!(s->is_under_way = open_chunk(s, why) && queue_chunk(s, why)))
        if (!give_up(s, (*again)++, why))
            return false;
    return true;
}

/* settle_chunk: after it nothing is under way. */
static bool settle_chunk(struct task_store *s, struct pg_error *why)
{
    struct task_submitted chunk = {0};
    int again = 0;
    if (!s->is_under_way)
        return true;
    while (!hear_chunk(s, &chunk, why))
        if (!give_up(s, again++, why) || !start_chunk(s, &again, why))
            return false;
    s->is_under_way = false;
    s->submitted.added += chunk.added;
    s->submitted.present += chunk.present;
    return true;
}

static bool send_chunk(struct task_store *s, struct pg_error *why)
{
    int again = 0;
    if (!settle_chunk(s, why))
        return false;
    if (s->filling.row_count == 0)
        return true;
    pg_values_copy_end(&s->filling.rows);
    struct chunk full = s->filling;
    s->filling = s->under_way;
    s->under_way = full;
    begin_chunk(&s->filling);
    return start_chunk(s, &again, why);
}

/* The order is that of queries/submit_copy.sql. */
bool task_store_submit_row(struct task_store *s, const struct task_row *row, struct pg_error *why)
{
    struct pg_values *v = &s->filling.rows;
    pg_values_copy_row(v, ROW_FIELDS);
    pg_values_i32(v, row->row);
    pg_values_i32(v, row->variation);
    pg_values_i32(v, row->width);
    pg_values_i32(v, row->height);
    pg_values_i32(v, row->steps);
    pg_values_f64(v, isnan(row->guidance) ? (double)NAN : row->guidance);
    pg_values_u64(v, row->seed);
    pg_values_bool(v, row->truncate);
    pg_values_bytes(v, row->content_key, sizeof row->content_key);
    pg_values_text(v, row->model ? row->model : "");
    pg_values_text(v, row->file ? row->file : "");
    pg_values_text(v, row->name ? row->name : "");
    pg_values_text(v, row->prompt ? row->prompt : "");
    pg_values_text(v, row->negative ? row->negative : "");
    pg_values_jsonb(v, row->labels_json && row->labels_json[0] ? row->labels_json : NULL);
    pg_values_text(v, row->inputs && row->inputs[0] ? row->inputs : NULL);
    pg_values_text(v, row->layout ? row->layout : "");
    pg_values_text(v, row->loras ? row->loras : "");
    s->filling.row_count++;
    if (s->filling.row_count >= CHUNK_ROWS || v->used >= CHUNK_BYTES)
        return send_chunk(s, why);
    return true;
}

bool task_store_submit_end(struct task_store *s, struct task_submitted *ret, struct pg_error *why)
{
    if (!send_chunk(s, why) || !settle_chunk(s, why) || (s->submitted.added > 0 && !announce(s, why)))
        return false;
    *ret = s->submitted;
    return true;
}

/* --- states -------------------------------------------------------------------------------------------------- */

struct change {
    const char *name;
    const uint64_t *tasks; /* of task_store_lost */
    size_t task_count;
    int64_t id, count;
    char state[16];
};

/* hold locks the campaign's row and reads its state. */
static bool hold(struct task_store *s, struct change *c, struct pg_error *why)
{
    struct pg_result *r = NULL;
    pg_values_clear(&s->values);
    pg_values_text(&s->values, c->name);
    if (!run(s, "campaign_lock", &r, why))
        return false;
    bool found = pg_row_count(r) == 1;
    if (found) {
        c->id = pg_row_i64(r, 0, 0);
        snprintf(c->state, sizeof c->state, "%s", pg_row_text(r, 0, 1));
    }
    pg_result_free(r);
    return found || unknown(c->name, why);
}

static bool set_state(struct task_store *s, const struct change *c, const char *state, struct pg_error *why)
{
    if (strcmp(c->state, state) == 0)
        return true;
    pg_values_clear(&s->values);
    pg_values_i64(&s->values, c->id);
    pg_values_text(&s->values, state);
    return run(s, "campaign_state", NULL, why);
}

/* move runs a query that moves a campaign's tasks and answers how many. */
static bool move(struct task_store *s, const char *query, struct change *c, struct pg_error *why)
{
    struct pg_result *r = NULL;
    pg_values_clear(&s->values);
    pg_values_i64(&s->values, c->id);
    if (c->tasks) {
        pg_values_array(&s->values, PG_I64);
        for (size_t i = 0; i < c->task_count; i++)
            pg_values_i64(&s->values, (int64_t)c->tasks[i]);
        pg_values_array_end(&s->values);
    }
    if (!run(s, query, &r, why))
        return false;
    c->count = pg_row_i64(r, 0, 0);
    pg_result_free(r);
    return true;
}

static bool refuse_cancelled(const struct change *c, const char *verb, struct pg_error *why)
{
    return pg_error_set(why, PG_REFUSED, "campaign '%s' is cancelled and cannot be %s: 'kiln retry %s' takes it up again",
                        c->name, verb, c->name);
}

/* refuse_done: false, with a sentence, for a campaign that has nothing left to `verb`. */
static bool refuse_done(struct task_store *s, const struct change *c, const char *verb, struct pg_error *why)
{
    struct campaign now = {0};
    if (!find_or_refuse(s, c->name, &now, why))
        return false;
    bool is_over = strcmp(now.state, "done") == 0;
    task_store_campaign_done(&now);
    return !is_over || pg_error_set(why, PG_REFUSED, "campaign '%s' is done: there is nothing to %s", c->name, verb);
}

static bool act_pause(struct task_store *s, void *context, struct pg_error *why)
{
    struct change *c = context;
    if (!hold(s, c, why) || !refuse_done(s, c, "pause", why))
        return false;
    return strcmp(c->state, "cancelled") == 0 ? refuse_cancelled(c, "paused", why) : set_state(s, c, "paused", why);
}

static bool act_resume(struct task_store *s, void *context, struct pg_error *why)
{
    struct change *c = context;
    if (!hold(s, c, why))
        return false;
    if (strcmp(c->state, "cancelled") == 0)
        return refuse_cancelled(c, "resumed", why);
    return set_state(s, c, "active", why) && announce(s, why);
}

static bool act_cancel(struct task_store *s, void *context, struct pg_error *why)
{
    struct change *c = context;
    if (!hold(s, c, why) || !refuse_done(s, c, "cancel", why))
        return false;
    return set_state(s, c, "cancelled", why) && move(s, "campaign_cancel", c, why);
}

static bool act_retry(struct task_store *s, void *context, struct pg_error *why)
{
    struct change *c = context;
    if (!hold(s, c, why))
        return false;
    /* A paused campaign stays paused: retry is about tasks, resume about claiming. */
    const char *state = strcmp(c->state, "cancelled") == 0 ? "active" : c->state;
    return set_state(s, c, state, why) && move(s, "campaign_retry", c, why) && announce(s, why);
}

static bool act_lost(struct task_store *s, void *context, struct pg_error *why)
{
    struct change *c = context;
    if (!hold(s, c, why))
        return false;
    if (strcmp(c->state, "cancelled") == 0)
        return refuse_cancelled(c, "rendered again", why);
    return move(s, "campaign_lost", c, why) && announce(s, why);
}

bool task_store_pause(struct task_store *s, const char *name, struct pg_error *why)
{
    return transact(s, act_pause, &(struct change){.name = name}, why);
}

bool task_store_resume(struct task_store *s, const char *name, struct pg_error *why)
{
    return transact(s, act_resume, &(struct change){.name = name}, why);
}

bool task_store_cancel(struct task_store *s, const char *name, int64_t *ret_count, struct pg_error *why)
{
    struct change c = {.name = name};
    bool ok = transact(s, act_cancel, &c, why);
    if (ok)
        *ret_count = c.count;
    return ok;
}

bool task_store_retry(struct task_store *s, const char *name, int64_t *ret_count, struct pg_error *why)
{
    struct change c = {.name = name};
    bool ok = transact(s, act_retry, &c, why);
    if (ok)
        *ret_count = c.count;
    return ok;
}

bool task_store_lost(struct task_store *s, const char *name, const uint64_t *tasks, size_t task_count, int64_t *ret_count, struct pg_error *why)
{
    struct change c = {.name = name, .tasks = tasks, .task_count = task_count};
    bool ok = transact(s, act_lost, &c, why);
    if (ok)
        *ret_count = c.count;
    return ok;
}

/* --- listings ------------------------------------------------------------------------------------------------ */

struct listing {
    bool (*image)(void *, const struct image_row *);
    bool (*failure)(void *, const struct failure_row *);
    bool (*worker)(void *, const struct worker_row *);
    void *context;
};

static const char *text_or_null(const struct pg_result *r, int column)
{
    return pg_row_is_null(r, 0, column) ? NULL : pg_row_text(r, 0, column);
}

static bool each_image(void *context, const struct pg_result *r)
{
    const struct listing *l = context;
    struct image_row row = {
        .task = pg_row_u64(r, 0, 0), .campaign = pg_row_text(r, 0, 1), .row = (int)pg_row_i64(r, 0, 2),
        .variation = (int)pg_row_i64(r, 0, 3), .path = pg_row_text(r, 0, 4), .sha256 = pg_row_text(r, 0, 5),
        .bytes = pg_row_u64(r, 0, 6), .width = (int)pg_row_i64(r, 0, 7), .height = (int)pg_row_i64(r, 0, 8),
        .steps = (int)pg_row_i64(r, 0, 9), .guidance = pg_row_f64(r, 0, 10), .seed = pg_row_u64(r, 0, 11),
        .prompt = pg_row_text(r, 0, 12), .negative = pg_row_text(r, 0, 13), .model = pg_row_text(r, 0, 14),
        .digest = pg_row_text(r, 0, 15), .worker = pg_row_text(r, 0, 16), .attempt = (int)pg_row_i64(r, 0, 17),
        .render_s = pg_row_f64(r, 0, 18), .truncated = pg_row_bool(r, 0, 19), .labels_json = text_or_null(r, 20),
        .inputs = text_or_null(r, 21)};
    return l->image(l->context, &row);
}

static bool each_failure(void *context, const struct pg_result *r)
{
    const struct listing *l = context;
    struct failure_row row = {
        .task = pg_row_u64(r, 0, 0), .campaign = pg_row_text(r, 0, 1), .row = (int)pg_row_i64(r, 0, 2),
        .variation = (int)pg_row_i64(r, 0, 3), .prompt = pg_row_text(r, 0, 4), .kind = pg_row_text(r, 0, 5),
        .reason = pg_row_text(r, 0, 6), .worker = text_or_null(r, 7), .attempt = (int)pg_row_i64(r, 0, 8)};
    return l->failure(l->context, &row);
}

static bool each_worker(void *context, const struct pg_result *r)
{
    const struct listing *l = context;
    struct worker_row row = {
        .name = pg_row_text(r, 0, 0), .state = pg_row_text(r, 0, 1), .device = pg_row_text(r, 0, 2),
        .models = pg_row_text(r, 0, 3), .host = pg_row_text(r, 0, 4), .boot_epoch = pg_row_u64(r, 0, 5),
        .held = (int)pg_row_i64(r, 0, 6), .seen_s = pg_row_f64(r, 0, 7), .done = pg_row_i64(r, 0, 8)};
    return l->worker(l->context, &row);
}

/* list runs a listing of one campaign, which must exist: an empty list and a wrong name are different answers. */
static bool list(struct task_store *s, const char *query, const char *name,
                 bool (*each)(void *, const struct pg_result *), struct listing *l, struct pg_error *why)
{
    struct campaign c = {0};
    if (!find_or_refuse(s, name, &c, why))
        return false;
    task_store_campaign_done(&c);
    pg_values_clear(&s->values);
    pg_values_text(&s->values, name);
    return pg_each(s->pg, sql_text_query(query), &s->values, each, l, why);
}

bool task_store_images(struct task_store *s, const char *name, bool (*each)(void *, const struct image_row *), void *context,
                       struct pg_error *why)
{
    return list(s, "images", name, each_image, &(struct listing){.image = each, .context = context}, why);
}

bool task_store_failures(struct task_store *s, const char *name, bool (*each)(void *, const struct failure_row *),
                         void *context, struct pg_error *why)
{
    return list(s, "failures", name, each_failure, &(struct listing){.failure = each, .context = context}, why);
}

bool task_store_workers(struct task_store *s, bool (*each)(void *, const struct worker_row *), void *context,
                        struct pg_error *why)
{
    pg_values_clear(&s->values);
    return pg_each(s->pg, sql_text_query("workers"), &s->values, each_worker,
                   &(struct listing){.worker = each, .context = context}, why);
}

/* --- audit --------------------------------------------------------------------------------------------------- */

static bool run_audit(struct task_store *s, const struct sql_text *audit, const char *name, int64_t *ret, struct pg_error *why)
{
    struct pg_result *r = NULL;
    pg_values_clear(&s->values);
    pg_values_text(&s->values, name);
    if (!pg_run(s->pg, audit->text, &s->values, &r, why))
        return false;
    *ret = pg_row_i64(r, 0, 0);
    pg_result_free(r);
    return true;
}

/* All checks see one moment, so a farm at work does not look wrong between two of them. */
bool task_store_audit(struct task_store *s, const char *name, bool (*each)(void *, const char *check, int64_t violations),
                      void *context, struct pg_error *why)
{
    static const char prefix[] = "audit_";
    struct campaign c = {0};
    struct pg_error ignored;
    bool ok = true, go_on = true;
    if (name && !find_or_refuse(s, name, &c, why))
        return false;
    task_store_campaign_done(&c);
    if (!pg_script(s->pg, "begin isolation level repeatable read read only", why))
        return false;
    for (const struct sql_text *t = sql_text_queries; ok && go_on && t->name; t++) {
        int64_t violations = 0;
        if (strncmp(t->name, prefix, sizeof prefix - 1) != 0)
            continue;
        ok = run_audit(s, t, name, &violations, why);
        if (ok)
            go_on = each(context, t->name + sizeof prefix - 1, violations);
    }
    pg_script(s->pg, "rollback", &ignored);
    return ok;
}
