/* task_turn.c - see task_turn.h. A small machine around one connection:
 *
 *   AWAY ──dial──▶ DIALLING ──▶ GREETING (session, schema's version) ──▶ PREPARING ──▶ IDLE ⇄ BUSY ──▶ READY ──▶ IDLE
 *     ▲                                                                                  │
 *     └────────────── any failure, any answer that does not come: backoff ───────────────┘
 *
 * All statements of a turn are queued before the first answer is read, and one sync commits them, so a turn costs
 * one round trip and one flush of the log. A turn that lost a deadlock is sent again as it was. Plans are made once, by
 * index, whatever the statistics say: a table that was empty when the plan was made may hold millions a minute later. */
#include "task_turn.h"

#include <assert.h>
#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "migrate.h"
#include "sql_text.h"

enum {
    DIAL_MS = 10000,
    ANSWER_MS = 30000,      /* a server that is silent for so long is away */
    STATEMENT_MS = 20000,   /* its own limit, which comes first and says more */
    LOCK_MS = 5000,
    AGAIN_MAX = 5,          /* times a turn is sent again after a deadlock */
    REFUSED_RETRY_MS = 5000,
    REASON_BYTES = 4000,
    FLOORS = 1024,
    FLOOR_MS = 3000,        /* so long may a claim overlook what came back below its floor */
};

enum phase { AWAY, DIALLING, GREETING, PREPARING, IDLE, BUSY, READY };

/* The steps of a turn, in their order, each a file in queries/. */
enum step { EXTEND, FINISH, FAIL, SWEEP, FOLD, CLAIM, BEAT, OFFER, STAGED, FOLDERS, STEP_KINDS };
static const char *const step_query[STEP_KINDS] = {"extend", "finish", "fail", "sweep", "fold", "claim", "beat", "offer",
                                                   "staged", "folders"};

struct sent { enum step step; int claim; };

/* One claim statement serves all wants for one group with one lease; slot n of it belongs to want `want`. */
struct claim { int64_t group_id; int lease_ms, slots, first_slot; int64_t next_floor; };
struct slot { int want, place; };

/* Below `floor`, this group has nothing to claim: we claimed it. All floors fall when we give something back ourselves
 * or are notified; what comes back by others is seen after FLOOR_MS, or when a claim gets less than it asked for. */
struct floor { int64_t group_id, floor, until_ms; };

struct results { struct pg_result **item; int count, room; };

struct task_turn {
    char *uri;
    struct pg *pg;
    enum phase phase;
    bool is_refused, notified, broken; /* broken: a statement of the turn failed */
    struct pg_backoff backoff;
    int64_t deadline_ms, start_ms;
    int again;
    struct pg_error why;
    struct pg_values values;

    struct task_turn_request request;
    struct sent *sent;
    int sent_count, sent_room, answered;
    struct claim *claims;
    int claim_count;
    struct slot *slots;
    int want_room;

    struct task_turn_result result;
    struct results kept;              /* what the result's texts live in */
    struct pg_result *offer_rows;     /* what the offer's texts live in */
    uint8_t *flags;                   /* finish_committed, fail_accepted, extend_alive, staged_state */
    size_t flag_room;
    int *positions;                   /* of sent finishes and fails in the request */
    int *fail_position;
    const char **staged_file;
    int staged_room;
    const char **folders;
    int folder_room;
    int *claimed_of_want;
    struct task_claimed *claimed;
    bool *is_filled;
    struct task_group *offer;
    struct floor *floors;
};

/* --- memory ------------------------------------------------------------------------------------------------ */

/* grow makes room for count elements; false when out of memory. */
static bool grow(void *array, int *room, int count, size_t bytes)
{
    void **at = array;
    if (count <= *room)
        return true;
    int wanted = *room ? *room : 64;
    while (wanted < count)
        wanted *= 2;
    void *grown = realloc(*at, (size_t)wanted * bytes);
    if (!grown)
        return false;
    *at = grown;
    *room = wanted;
    return true;
}

static bool keep(struct task_turn *t, struct pg_result *r)
{
    if (!grow(&t->kept.item, &t->kept.room, t->kept.count + 1, sizeof *t->kept.item))
        return false;
    t->kept.item[t->kept.count++] = r;
    return true;
}

static void drop_results(struct task_turn *t)
{
    for (int i = 0; i < t->kept.count; i++)
        pg_result_free(t->kept.item[i]);
    t->kept.count = 0;
}

bool task_turn_open(struct task_turn **ret, const char *uri, struct pg_error *why)
{
    struct task_turn *t = calloc(1, sizeof *t);
    if (t) {
        t->uri = uri ? strdup(uri) : NULL;
        t->slots = calloc(TASK_STORE_TURN_MAX, sizeof *t->slots);
        t->positions = calloc(TASK_STORE_TURN_MAX, sizeof *t->positions);
        t->fail_position = calloc(TASK_STORE_TURN_MAX, sizeof *t->fail_position);
        t->claimed = calloc(TASK_STORE_TURN_MAX, sizeof *t->claimed);
        t->is_filled = calloc(TASK_STORE_TURN_MAX, sizeof *t->is_filled);
        t->offer = calloc(TASK_STORE_GROUPS_MAX, sizeof *t->offer);
        t->floors = calloc(FLOORS, sizeof *t->floors);
    }
    if (!t || (uri && !t->uri) || !t->slots || !t->positions || !t->fail_position || !t->claimed || !t->is_filled ||
        !t->offer || !t->floors) {
        task_turn_close(t);
        return pg_error_set(why, PG_AWAY, "out of memory for the coordinator's turns");
    }
    snprintf(t->why.text, sizeof t->why.text, "not connected yet");
    *ret = t;
    return true;
}

void task_turn_close(struct task_turn *t)
{
    if (!t)
        return;
    drop_results(t);
    pg_result_free(t->offer_rows);
    pg_close(t->pg);
    pg_values_done(&t->values);
    free(t->kept.item);
    free(t->flags);
    free(t->positions);
    free(t->fail_position);
    free(t->staged_file);
    free(t->folders);
    free(t->claimed_of_want);
    free(t->claims);
    free(t->slots);
    free(t->claimed);
    free(t->is_filled);
    free(t->offer);
    free(t->floors);
    free(t->sent);
    free(t->uri);
    free(t);
}

/* --- the connection ---------------------------------------------------------------------------------------- */

/* go_away ends the connection and whatever was under way; t->why says why. */
static void go_away(struct task_turn *t)
{
    pg_close(t->pg);
    t->pg = NULL;
    t->phase = AWAY;
    t->is_refused = t->why.fault == PG_REFUSED;
    if (t->is_refused)
        t->backoff.step_ms = REFUSED_RETRY_MS; /* a person has to act: ask again calmly */
    pg_backoff_wait(&t->backoff);
    drop_results(t);
}

static void dial(struct task_turn *t)
{
    if (!pg_begin(&t->pg, t->uri, &t->why)) {
        go_away(t);
        return;
    }
    t->phase = DIALLING;
    t->deadline_ms = pg_now_ms() + DIAL_MS;
}

static void greet(struct task_turn *t)
{
    pg_session_values(&t->values, STATEMENT_MS, LOCK_MS, true);
    if (!pg_pipe_sql(t->pg, pg_session_sql(), &t->values, &t->why) ||
        !pg_pipe_sql(t->pg, sql_text_query("version"), NULL, &t->why) || !pg_pipe_sync(t->pg, &t->why)) {
        go_away(t);
        return;
    }
    t->phase = GREETING;
    t->broken = false;
    t->answered = 0;
    t->deadline_ms = pg_now_ms() + DIAL_MS;
}

static void prepare(struct task_turn *t)
{
    bool ok = true;
    for (int i = 0; ok && i < STEP_KINDS; i++)
        ok = pg_pipe_prepare(t->pg, step_query[i], sql_text_query(step_query[i]), &t->why);
    if (!ok || !pg_pipe_sql(t->pg, "listen kiln_tasks", NULL, &t->why) || !pg_pipe_sync(t->pg, &t->why)) {
        go_away(t);
        return;
    }
    t->phase = PREPARING;
    t->deadline_ms = pg_now_ms() + DIAL_MS;
}

static void drop_floors(struct task_turn *t)
{
    memset(t->floors, 0, FLOORS * sizeof *t->floors);
}

/* hear_greeting reads the answers of GREETING and PREPARING. False: nothing more to read now. */
static bool hear_greeting(struct task_turn *t)
{
    struct pg_result *r = NULL;
    struct pg_error why = {0};
    switch (pg_pipe_poll(t->pg, &r, &why)) {
    case PG_EVENT_NONE:
        return false;
    case PG_EVENT_ROWS:
        if (t->phase == GREETING && t->answered++ == 1 && !migrate_check((int)pg_row_i64(r, 0, 0), &t->why))
            t->broken = true;
        pg_result_free(r);
        return true;
    case PG_EVENT_FAILED:
        if (t->phase == GREETING)
            migrate_explain(&why);
        t->why = why;
        t->broken = true;
        return true;
    case PG_EVENT_SKIPPED:
        return true;
    case PG_EVENT_GONE:
        t->why = why;
        go_away(t);
        return true;
    case PG_EVENT_SYNCED:
        break;
    }
    if (t->broken) {
        go_away(t);
    } else if (t->phase == GREETING) {
        prepare(t);
    } else {
        t->phase = IDLE;
        t->is_refused = false;
        t->notified = true; /* what was announced while we were away was announced to nobody */
        drop_floors(t);
    }
    return true;
}

/* --- sending a turn ---------------------------------------------------------------------------------------- */

static bool is_id(uint64_t task, uint64_t token)
{
    return task > 0 && task <= INT64_MAX && token > 0 && token <= INT64_MAX;
}

/* is_image: one image that breaks a rule of the table would fail the whole turn, and everybody else's with it. */
static bool is_image(const struct task_finish *f)
{
    for (int i = 0; i < 64; i++)
        if (!f->sha256 || !isxdigit((unsigned char)f->sha256[i]))
            return false;
    return f->sha256[64] == '\0' && is_id(f->task, f->token) && f->bytes > 0 && f->bytes <= INT64_MAX && f->width >= 64 &&
           f->height >= 64 && f->width % 16 == 0 && f->height % 16 == 0 && f->steps > 0 && f->render_s >= 0 &&
           f->worker && f->worker[0];
}

static bool send(struct task_turn *t, enum step step, int claim)
{
    if (!grow(&t->sent, &t->sent_room, t->sent_count + 1, sizeof *t->sent))
        return pg_error_set(&t->why, PG_AWAY, "out of memory for a turn");
    t->sent[t->sent_count++] = (struct sent){step, claim};
    return pg_pipe_run(t->pg, step_query[step], &t->values, &t->why);
}

/* A column of n elements; x is the expression of element e. */
#define COLUMN(type, put, n, x)                                                                                \
    do {                                                                                                       \
        pg_values_array(&t->values, type);                                                                     \
        for (int e = 0; e < (n); e++)                                                                          \
            put(&t->values, x);                                                                                \
        pg_values_array_end(&t->values);                                                                       \
    } while (0)

static void put_clean_name(struct pg_values *v, const char *x)
{
    pg_values_text_clean(v, x && x[0] ? x : "unknown", TASK_STORE_NAME_MAX);
}

static void put_clean(struct pg_values *v, const char *x)
{
    pg_values_text_clean(v, x, REASON_BYTES);
}

static void put_sha256(struct pg_values *v, const char *hex)
{
    unsigned char bytes[32];
    for (int i = 0; i < 32; i++) {
        char pair[3] = {hex[2 * i], hex[2 * i + 1], '\0'};
        bytes[i] = (unsigned char)strtoul(pair, NULL, 16);
    }
    pg_values_bytes(v, bytes, sizeof bytes);
}

static bool send_extends(struct task_turn *t)
{
    const struct task_turn_request *q = &t->request;
    if (q->extend_count == 0)
        return true;
    pg_values_clear(&t->values);
    COLUMN(PG_I64, pg_values_i64, q->extend_count, (int64_t)q->extends[e].task);
    COLUMN(PG_I64, pg_values_i64, q->extend_count, (int64_t)q->extends[e].token);
    pg_values_i32(&t->values, q->lease_ms);
    return send(t, EXTEND, 0);
}

static bool send_finishes(struct task_turn *t)
{
    const struct task_turn_request *q = &t->request;
    const struct task_finish *f = q->finishes;
    const int *at = t->positions;
    int n = 0;
    for (int i = 0; i < q->finish_count; i++)
        if (is_image(&f[i]))
            t->positions[n++] = i;
    if (n == 0)
        return true;
    pg_values_clear(&t->values);
    COLUMN(PG_I64, pg_values_i64, n, (int64_t)f[at[e]].task);
    COLUMN(PG_I64, pg_values_i64, n, (int64_t)f[at[e]].token);
    COLUMN(PG_TEXT, put_clean_name, n, f[at[e]].worker);
    COLUMN(PG_BYTEA, put_sha256, n, f[at[e]].sha256);
    COLUMN(PG_TEXT, put_clean, n, f[at[e]].digest);
    COLUMN(PG_I64, pg_values_i64, n, (int64_t)f[at[e]].bytes);
    COLUMN(PG_NUMERIC, pg_values_u64, n, f[at[e]].seed);
    COLUMN(PG_I32, pg_values_i32, n, f[at[e]].width);
    COLUMN(PG_I32, pg_values_i32, n, f[at[e]].height);
    COLUMN(PG_I32, pg_values_i32, n, f[at[e]].steps);
    COLUMN(PG_F64, pg_values_f64, n, f[at[e]].guidance);
    COLUMN(PG_F64, pg_values_f64, n, f[at[e]].render_s);
    COLUMN(PG_BOOL, pg_values_bool, n, f[at[e]].truncated);
    return send(t, FINISH, 0);
}

static bool send_fails(struct task_turn *t)
{
    static const char *const kind[] = {"refuse", "retry", "lost", "released"};
    const struct task_turn_request *q = &t->request;
    const struct task_fail *f = q->fails;
    const int *at = t->fail_position;
    int n = 0;
    for (int i = 0; i < q->fail_count; i++)
        if (is_id(f[i].task, f[i].token))
            t->fail_position[n++] = i;
    if (n == 0)
        return true;
    pg_values_clear(&t->values);
    COLUMN(PG_I64, pg_values_i64, n, (int64_t)f[at[e]].task);
    COLUMN(PG_I64, pg_values_i64, n, (int64_t)f[at[e]].token);
    COLUMN(PG_TEXT, pg_values_text, n, kind[f[at[e]].kind]);
    COLUMN(PG_TEXT, put_clean, n, f[at[e]].reason && f[at[e]].reason[0] ? f[at[e]].reason : "no reason was given");
    return send(t, FAIL, 0);
}

static bool send_sweep(struct task_turn *t)
{
    if (!t->request.sweep)
        return true;
    pg_values_clear(&t->values);
    put_clean_name(&t->values, t->request.coordinator);
    pg_values_i32(&t->values, TASK_STORE_TURN_MAX);
    if (!send(t, SWEEP, 0))
        return false;
    pg_values_clear(&t->values);
    put_clean_name(&t->values, t->request.coordinator);
    return send(t, FOLD, 0);
}

static struct floor *floor_of(struct task_turn *t, int64_t group_id)
{
    return &t->floors[(uint64_t)group_id % FLOORS];
}

/* plan_claims puts wants of one group and lease into one statement and remembers whose each slot is. */
static void plan_claims(struct task_turn *t)
{
    const struct task_turn_request *q = &t->request;
    int slot_count = 0, place = 0;
    t->claim_count = 0;
    for (int w = 0; w < q->want_count; w++) {
        t->claimed_of_want[w] = place; /* where its places begin, until the answer says how many of them were filled */
        place += q->wants[w].count;
    }
    assert(place <= TASK_STORE_TURN_MAX);
    for (int w = 0; w < q->want_count; w++) {
        bool planned = q->wants[w].count <= 0;
        for (int c = 0; c < t->claim_count; c++)
            planned = planned || (t->claims[c].group_id == q->wants[w].group_id && t->claims[c].lease_ms == q->wants[w].lease_ms);
        if (planned)
            continue;
        struct claim *claim = &t->claims[t->claim_count++];
        *claim = (struct claim){.group_id = q->wants[w].group_id, .lease_ms = q->wants[w].lease_ms, .first_slot = slot_count};
        for (int v = w; v < q->want_count; v++)
            if (q->wants[v].group_id == claim->group_id && q->wants[v].lease_ms == claim->lease_ms)
                for (int k = 0; k < q->wants[v].count; k++)
                    t->slots[slot_count++] = (struct slot){v, t->claimed_of_want[v] + k};
        claim->slots = slot_count - claim->first_slot;
    }
}

static bool send_claims(struct task_turn *t)
{
    plan_claims(t);
    if (t->request.fail_count > 0)
        drop_floors(t);
    for (int c = 0; c < t->claim_count; c++) {
        const struct claim *claim = &t->claims[c];
        const struct floor *floor = floor_of(t, claim->group_id);
        bool is_known = floor->group_id == claim->group_id && pg_now_ms() < floor->until_ms;
        pg_values_clear(&t->values);
        pg_values_i64(&t->values, claim->group_id);
        COLUMN(PG_TEXT, put_clean_name, claim->slots, t->request.wants[t->slots[claim->first_slot + e].want].worker);
        pg_values_i32(&t->values, claim->lease_ms);
        pg_values_i64(&t->values, is_known ? floor->floor : 0);
        if (!send(t, CLAIM, c))
            return false;
    }
    return true;
}

static bool send_beats(struct task_turn *t)
{
    const struct task_beat *b = t->request.beats;
    int n = t->request.beat_count;
    if (n == 0)
        return true;
    pg_values_clear(&t->values);
    COLUMN(PG_TEXT, put_clean_name, n, b[e].worker);
    COLUMN(PG_NUMERIC, pg_values_u64, n, b[e].boot_epoch);
    COLUMN(PG_TEXT, put_clean, n, b[e].state);
    COLUMN(PG_TEXT, put_clean, n, b[e].device);
    COLUMN(PG_TEXT, put_clean, n, b[e].models);
    COLUMN(PG_I32, pg_values_i32, n, b[e].held);
    COLUMN(PG_TEXT, put_clean, n, b[e].host);
    return send(t, BEAT, 0);
}

static bool send_questions(struct task_turn *t)
{
    const struct task_turn_request *q = &t->request;
    pg_values_clear(&t->values);
    pg_values_i32(&t->values, TASK_STORE_GROUPS_MAX);
    if (q->offer && !send(t, OFFER, 0))
        return false;
    if (q->staged_count > 0) {
        pg_values_clear(&t->values);
        COLUMN(PG_I64, pg_values_i64, q->staged_count, (int64_t)q->staged[e].task);
        COLUMN(PG_I64, pg_values_i64, q->staged_count, (int64_t)q->staged[e].token);
        if (!send(t, STAGED, 0))
            return false;
    }
    pg_values_clear(&t->values);
    return !q->folders || send(t, FOLDERS, 0);
}

/* make_room gets the arrays of the answer, all zero: nothing committed, nothing alive. */
static bool make_room(struct task_turn *t)
{
    const struct task_turn_request *q = &t->request;
    size_t flags = (size_t)q->finish_count + (size_t)q->fail_count + (size_t)q->extend_count + (size_t)q->staged_count;
    int claim_room = t->want_room;
    assert(q->finish_count <= TASK_STORE_TURN_MAX);
    assert(q->fail_count <= TASK_STORE_TURN_MAX);
    if (flags > t->flag_room || !t->flags) {
        uint8_t *grown = realloc(t->flags, flags + 1);
        if (!grown)
            return false;
        t->flags = grown;
        t->flag_room = flags;
    }
    if (!grow(&t->claims, &claim_room, q->want_count, sizeof *t->claims) ||
        !grow(&t->claimed_of_want, &t->want_room, q->want_count, sizeof *t->claimed_of_want) ||
        !grow(&t->staged_file, &t->staged_room, q->staged_count, sizeof *t->staged_file))
        return false;
    memset(t->flags, 0, flags);
    memset(t->is_filled, 0, TASK_STORE_TURN_MAX * sizeof *t->is_filled);
    uint8_t *fail = t->flags + q->finish_count, *extend = fail + q->fail_count, *staged = extend + q->extend_count;
    memset(staged, 's', (size_t)q->staged_count);
    for (int i = 0; i < q->staged_count; i++)
        t->staged_file[i] = NULL;
    struct task_turn_result *r = &t->result;
    *r = (struct task_turn_result){.finish_committed = t->flags, .fail_accepted = fail, .extend_alive = extend,
                                   .claimed = t->claimed, .claimed_of_want = t->claimed_of_want, .offer = t->offer,
                                   .offer_count = r->offer_count, .staged_state = (const char *)staged,
                                   .staged_file = t->staged_file};
    return true;
}

/* send_turn queues the whole turn. The order matters: leases are extended before anything may sweep them, and what
 * finished is gone before new work is claimed. */
static void send_turn(struct task_turn *t)
{
    drop_results(t);
    t->sent_count = t->answered = 0;
    t->broken = false;
    if (!make_room(t))
        pg_error_set(&t->why, PG_AWAY, "out of memory for a turn");
    else if (send_extends(t) && send_finishes(t) && send_fails(t) && send_sweep(t) && send_claims(t) && send_beats(t) &&
             send_questions(t) && pg_pipe_sync(t->pg, &t->why)) {
        t->phase = BUSY;
        t->deadline_ms = pg_now_ms() + ANSWER_MS;
        return;
    }
    go_away(t);
}

void task_turn_start(struct task_turn *t, const struct task_turn_request *request)
{
    assert(t->phase == IDLE);
    t->request = *request;
    t->again = 0;
    t->start_ms = pg_now_ms();
    send_turn(t);
}

/* --- reading the answers ------------------------------------------------------------------------------------ */

/* mark sets the flags of the positions (from 1) a statement answered. */
static void mark(uint8_t *flags, const int *position, const struct pg_result *rows)
{
    for (int i = 0; i < pg_row_count(rows); i++) {
        int n = (int)pg_row_i64(rows, i, 0) - 1;
        flags[position ? position[n] : n] = 1;
    }
}

static void read_claim(struct task_turn *t, struct claim *claim, const struct pg_result *rows)
{
    int64_t highest = 0;
    bool is_whole = pg_row_count(rows) == claim->slots;
    for (int i = 0; i < pg_row_count(rows); i++) {
        const struct slot *slot = &t->slots[claim->first_slot + (int)pg_row_i64(rows, i, 0) - 1];
        t->claimed[slot->place] = (struct task_claimed){
            .task = pg_row_u64(rows, i, 1), .token = pg_row_u64(rows, i, 2), .group_id = claim->group_id,
            .attempt = (uint32_t)pg_row_i64(rows, i, 3), .seed = pg_row_u64(rows, i, 4),
            .truncate = pg_row_bool(rows, i, 5), .file = pg_row_text(rows, i, 6), .prompt = pg_row_text(rows, i, 7),
            .negative = pg_row_text(rows, i, 8), .inputs = pg_row_is_null(rows, i, 10) ? NULL : pg_row_text(rows, i, 10)};
        t->is_filled[slot->place] = true;
        is_whole = is_whole && pg_row_bool(rows, i, 9);
        if (pg_row_i64(rows, i, 1) > highest)
            highest = pg_row_i64(rows, i, 1);
    }
    claim->next_floor = is_whole ? highest + 1 : 0;
}

static void read_offer(struct task_turn *t, struct pg_result *rows)
{
    pg_result_free(t->offer_rows);
    t->offer_rows = rows;
    t->result.offer_fresh = true;
    t->result.offer_count = pg_row_count(rows);
    for (int i = 0; i < pg_row_count(rows); i++) {
        struct task_group *g = &t->offer[i];
        *g = (struct task_group){
            .id = pg_row_i64(rows, i, 0), .campaign_id = pg_row_i64(rows, i, 1), .width = (int)pg_row_i64(rows, i, 4),
            .height = (int)pg_row_i64(rows, i, 5), .steps = (int)pg_row_i64(rows, i, 6), .guidance = pg_row_f64(rows, i, 7),
            .out_dir = (char *)(uintptr_t)pg_row_text(rows, i, 8), .priority = (int)pg_row_i64(rows, i, 11),
            .ready = (int)pg_row_i64(rows, i, 12), .loras = pg_row_i64(rows, i, 13)};
        snprintf(g->campaign, sizeof g->campaign, "%s", pg_row_text(rows, i, 2));
        snprintf(g->model, sizeof g->model, "%s", pg_row_text(rows, i, 3));
        snprintf(g->format, sizeof g->format, "%s", pg_row_text(rows, i, 9));
        snprintf(g->use, sizeof g->use, "%s", pg_row_text(rows, i, 10));
    }
}

static void read_staged(struct task_turn *t, const struct pg_result *rows)
{
    uint8_t *state = t->flags + t->request.finish_count + t->request.fail_count + t->request.extend_count;
    for (int i = 0; i < pg_row_count(rows); i++) {
        int n = (int)pg_row_i64(rows, i, 0) - 1;
        state[n] = (uint8_t)pg_row_text(rows, i, 1)[0];
        t->staged_file[n] = pg_row_is_null(rows, i, 2) ? NULL : pg_row_text(rows, i, 2);
    }
}

static bool read_folders(struct task_turn *t, const struct pg_result *rows)
{
    if (!grow(&t->folders, &t->folder_room, pg_row_count(rows), sizeof *t->folders))
        return false;
    for (int i = 0; i < pg_row_count(rows); i++)
        t->folders[i] = pg_row_text(rows, i, 0);
    t->result.folders = t->folders;
    t->result.folder_count = pg_row_count(rows);
    return true;
}

/* read_answer takes the rows of one step; they live until the turn is over, the offer's until the next offer. */
static bool read_answer(struct task_turn *t, const struct sent *sent, struct pg_result *rows)
{
    const struct task_turn_request *q = &t->request;
    bool ok = true;
    if (sent->step == OFFER) {
        read_offer(t, rows);
        return true;
    }
    if (!keep(t, rows)) {
        pg_result_free(rows);
        return false;
    }
    switch (sent->step) {
    case EXTEND:
        mark(t->flags + q->finish_count + q->fail_count, NULL, rows);
        break;
    case FINISH:
        mark(t->flags, t->positions, rows);
        break;
    case FAIL:
        mark(t->flags + q->finish_count, t->fail_position, rows);
        break;
    case SWEEP:
        t->result.swept = pg_row_count(rows);
        break;
    case CLAIM:
        read_claim(t, &t->claims[sent->claim], rows);
        break;
    case STAGED:
        read_staged(t, rows);
        break;
    case FOLDERS:
        ok = read_folders(t, rows);
        break;
    case FOLD:
    case BEAT:
    case OFFER:
    case STEP_KINDS:
        break;
    }
    return ok;
}

/* settle_claims closes the gaps of slots that got nothing, and moves the floors: only now are the claims committed. */
static void settle_claims(struct task_turn *t)
{
    int place = 0, count = 0;
    for (int w = 0; w < t->request.want_count; w++) {
        int got = 0;
        for (int k = 0; k < t->request.wants[w].count; k++, place++)
            if (t->is_filled[place]) {
                t->claimed[count++] = t->claimed[place];
                got++;
            }
        t->claimed_of_want[w] = got;
    }
    t->result.claimed_count = count;
    for (int c = 0; c < t->claim_count; c++) {
        const struct claim *claim = &t->claims[c];
        struct floor *floor = floor_of(t, claim->group_id);
        bool is_known = floor->group_id == claim->group_id && floor->floor > 0 && pg_now_ms() < floor->until_ms;
        if (claim->next_floor == 0)
            *floor = (struct floor){0};
        else
            *floor = (struct floor){claim->group_id, claim->next_floor,
                                    is_known ? floor->until_ms : pg_now_ms() + FLOOR_MS};
    }
}

static void end_turn(struct task_turn *t)
{
    if (!t->broken) {
        settle_claims(t);
        if (t->result.swept > 0)
            drop_floors(t);
        t->result.ms = pg_now_ms() - t->start_ms;
        t->phase = READY;
        pg_backoff_reset(&t->backoff);
    } else if (t->why.fault == PG_CONFLICT && t->again++ < AGAIN_MAX) {
        send_turn(t);
    } else {
        if (t->why.fault == PG_CONFLICT)
            t->why.fault = PG_AWAY;
        go_away(t);
    }
}

/* hear_turn reads one answer of BUSY. False: nothing more to read now. */
static bool hear_turn(struct task_turn *t)
{
    struct pg_result *r = NULL;
    struct pg_error why = {0};
    switch (pg_pipe_poll(t->pg, &r, &why)) {
    case PG_EVENT_NONE:
        return false;
    case PG_EVENT_ROWS:
        if (!read_answer(t, &t->sent[t->answered++], r)) {
            pg_error_set(&t->why, PG_AWAY, "out of memory for the answers of a turn");
            go_away(t);
        }
        break;
    case PG_EVENT_FAILED: {
        char context[64];
        t->why = why;
        snprintf(context, sizeof context, "%s: ", step_query[t->sent[t->answered++].step]);
        pg_error_prefix(&t->why, context);
        t->broken = true;
        break;
    }
    case PG_EVENT_SKIPPED:
        t->answered++;
        break;
    case PG_EVENT_SYNCED:
        end_turn(t);
        break;
    case PG_EVENT_GONE:
        t->why = why;
        go_away(t);
        break;
    }
    return true;
}

/* --- the machine ------------------------------------------------------------------------------------------- */

static void check_deadline(struct task_turn *t)
{
    if (pg_now_ms() < t->deadline_ms)
        return;
    pg_error_set(&t->why, PG_AWAY, "PostgreSQL is away: the server is there but does not answer");
    go_away(t);
}

/* advance does one thing. False: there is nothing to do until something arrives or time passes. */
static bool advance(struct task_turn *t)
{
    bool moved = false;
    struct pg_result *stray = NULL;
    switch (t->phase) {
    case AWAY:
        if (pg_backoff_left_ms(&t->backoff) > 0)
            return false;
        dial(t);
        return t->phase != AWAY;
    case DIALLING: {
        enum pg_up up = pg_begin_poll(t->pg, &t->why);
        if (up == PG_UP_READY)
            greet(t);
        else if (up == PG_UP_DOWN)
            go_away(t);
        moved = up != PG_UP_WAIT;
        break;
    }
    case GREETING:
    case PREPARING:
        moved = hear_greeting(t);
        break;
    case BUSY:
        moved = hear_turn(t);
        break;
    case IDLE:
    case READY:
        if (pg_pipe_poll(t->pg, &stray, &t->why) == PG_EVENT_GONE && t->phase == IDLE)
            go_away(t);
        pg_result_free(stray);
        return false;
    }
    if (!moved)
        check_deadline(t);
    return moved;
}

enum task_turn_state task_turn_poll(struct task_turn *t)
{
    while (advance(t))
        ;
    if (t->is_refused)
        return TASK_TURN_REFUSED;
    switch (t->phase) {
    case AWAY:
        return TASK_TURN_AWAY;
    case DIALLING:
    case GREETING:
    case PREPARING:
        return TASK_TURN_CONNECTING;
    case IDLE:
        return TASK_TURN_IDLE;
    case BUSY:
        return TASK_TURN_BUSY;
    case READY:
        break;
    }
    return TASK_TURN_READY;
}

int task_turn_fd(const struct task_turn *t)
{
    return t->pg ? pg_fd(t->pg) : -1;
}

bool task_turn_wants_write(const struct task_turn *t)
{
    return t->pg && pg_wants_write(t->pg);
}

int task_turn_retry_ms(const struct task_turn *t)
{
    return t->phase == AWAY ? pg_backoff_left_ms(&t->backoff) : 0;
}

const char *task_turn_why(const struct task_turn *t)
{
    return t->why.text;
}

const struct task_turn_result *task_turn_result(const struct task_turn *t)
{
    assert(t->phase == READY);
    return &t->result;
}

void task_turn_finish(struct task_turn *t)
{
    assert(t->phase == READY);
    drop_results(t);
    t->phase = IDLE;
}

bool task_turn_notified(struct task_turn *t)
{
    bool was = t->notified;
    t->notified = false;
    if (t->pg && t->phase >= IDLE)
        was = pg_notified(t->pg) || was;
    if (was)
        drop_floors(t);
    return was;
}
