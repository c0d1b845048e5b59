/* pg.c - libpq: see pg.h.
 * Values travel in binary, results come back as text. Every wait has an end: a server that is there but does not
 * answer is as good as away. Errors are sorted once, here, by what the caller can do about them. */
#include "pg.h"

#include <assert.h>
#include <errno.h>
#include <libpq-fe.h>
#include <math.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    CONNECT_MS = 10000,
    LOCK_MS = 10000,
    ANSWER_EXTRA_MS = 10000, /* the server's own timeout should come first: it says more */
    COPY_PIECE = 1 << 20,
};

struct pg {
    PGconn *conn;
    int answer_ms;
    bool is_up, wants_write, was_notified;
    PostgresPollingStatusType connecting;
};

/* libpq's own object under our name: pg.c is the only file that knows. */
static const PGresult *inner(const struct pg_result *r)
{
    return (const PGresult *)(const void *)r;
}

static struct pg_result *outer(PGresult *r)
{
    return (struct pg_result *)(void *)r;
}

/* --- errors ------------------------------------------------------------------------------------------------ */

bool pg_error_set(struct pg_error *why, enum pg_fault fault, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    why->fault = fault;
    why->sqlstate[0] = '\0';
    vsnprintf(why->text, sizeof why->text, format, list);
    va_end(list);
    return false;
}

bool pg_error_prefix(struct pg_error *why, const char *context)
{
    char old[sizeof why->text];
    memcpy(old, why->text, sizeof old);
    int used = snprintf(why->text, sizeof why->text, "%s", context);
    if (used > 0 && (size_t)used < sizeof why->text)
        snprintf(why->text + used, sizeof why->text - (size_t)used, "%.*s",
                 (int)(sizeof why->text - (size_t)used - 1), old);
    return false;
}

/* fault_of sorts SQLSTATEs. Classes 08, 53, 58 and 57P are a server in trouble; it may recover. */
static enum pg_fault fault_of(const char *state)
{
    static const char *const conflict[] = {"40001", "40P01", "55P03"};
    static const char *const away[] = {"57014", "25006", "25P03"};
    for (size_t i = 0; i < sizeof conflict / sizeof *conflict; i++)
        if (strcmp(state, conflict[i]) == 0)
            return PG_CONFLICT;
    for (size_t i = 0; i < sizeof away / sizeof *away; i++)
        if (strcmp(state, away[i]) == 0)
            return PG_AWAY;
    if (strncmp(state, "08", 2) == 0 || strncmp(state, "53", 2) == 0 || strncmp(state, "58", 2) == 0 ||
        strncmp(state, "57P", 3) == 0)
        return PG_AWAY;
    return state[0] == '\0' ? PG_AWAY : PG_REFUSED;
}

/* one_line copies a message of libpq with line ends as spaces and none at the end. */
static void one_line(char *to, size_t bytes, const char *from)
{
    size_t n = 0;
    for (; from && *from && n + 1 < bytes; from++) {
        char c = *from == '\n' || *from == '\t' ? ' ' : *from;
        if (c != ' ' || (n && to[n - 1] != ' '))
            to[n++] = c;
    }
    while (n && to[n - 1] == ' ')
        n--;
    to[n] = '\0';
}

/* says_no: while connecting libpq has no SQLSTATE for us, only the text. A wrong password or database will not
 * mend itself; a server that starts up or has no slot left will. */
static bool says_no(const char *text)
{
    static const char *const no[] = {"authentication failed", "does not exist", "no pg_hba.conf entry", "permission denied for"};
    for (size_t i = 0; strstr(text, "FATAL:") && i < sizeof no / sizeof *no; i++)
        if (strstr(text, no[i]))
            return true;
    return false;
}

static bool lost(const struct pg *pg, struct pg_error *why)
{
    char text[800];
    one_line(text, sizeof text, PQerrorMessage(pg->conn));
    if (!pg->is_up && says_no(text))
        return pg_error_set(why, PG_REFUSED, "PostgreSQL: %s", text);
    return pg_error_set(why, PG_AWAY, "PostgreSQL is away: %s", text[0] ? text : "the connection was lost");
}

static bool refused(const PGresult *r, struct pg_error *why)
{
    const char *state = PQresultErrorField(r, PG_DIAG_SQLSTATE);
    const char *message = PQresultErrorField(r, PG_DIAG_MESSAGE_PRIMARY);
    const char *detail = PQresultErrorField(r, PG_DIAG_MESSAGE_DETAIL);
    const char *hint = PQresultErrorField(r, PG_DIAG_MESSAGE_HINT);
    char text[900];
    one_line(text, sizeof text, message ? message : PQresultErrorMessage(r));
    pg_error_set(why, fault_of(state ? state : ""), "PostgreSQL: %s%s%.300s%s%s%.200s%s%s%s%s", text,
                 detail ? " (" : "", detail ? detail : "", detail ? ")" : "", hint ? " (" : "",
                 hint ? hint : "", hint ? ")" : "", state ? " [" : "", state ? state : "", state ? "]" : "");
    snprintf(why->sqlstate, sizeof why->sqlstate, "%s", state ? state : "");
    return false;
}

/* --- values ------------------------------------------------------------------------------------------------ */

void pg_values_clear(struct pg_values *v)
{
    v->used = v->array_at = 0;
    v->count = v->array_count = 0;
    v->in_array = v->is_copy = v->failed = false;
}

void pg_values_done(struct pg_values *v)
{
    free(v->bytes);
    *v = (struct pg_values){0};
}

static unsigned char *more(struct pg_values *v, size_t bytes)
{
    static unsigned char nowhere[8];
    if (v->used + bytes > v->room && !v->failed) {
        size_t room = v->room ? v->room : 4096;
        while (room < v->used + bytes)
            room *= 2;
        unsigned char *grown = realloc(v->bytes, room);
        if (grown) {
            v->bytes = grown;
            v->room = room;
        } else {
            v->failed = true;
        }
    }
    if (v->failed)
        return bytes <= sizeof nowhere ? nowhere : NULL;
    v->used += bytes;
    return v->bytes + v->used - bytes;
}

static void put_bytes(struct pg_values *v, const void *x, size_t bytes)
{
    unsigned char *to = more(v, bytes);
    if (to && bytes)
        memcpy(to, x, bytes);
}

static void write_u32(unsigned char *to, uint32_t x)
{
    for (int i = 0; i < 4; i++)
        to[i] = (unsigned char)(x >> (24 - 8 * i));
}

static void put_u32(struct pg_values *v, uint32_t x)
{
    write_u32(more(v, 4), x);
}

static void put_u16(struct pg_values *v, unsigned x)
{
    unsigned char *to = more(v, 2);
    to[0] = (unsigned char)(x >> 8);
    to[1] = (unsigned char)x;
}

static void put_u64(struct pg_values *v, uint64_t x)
{
    put_u32(v, (uint32_t)(x >> 32));
    put_u32(v, (uint32_t)x);
}

/* begin_value: a value is its length and its bytes, be it a parameter, an element or a field. */
static void begin_value(struct pg_values *v, uint32_t bytes)
{
    if (v->in_array) {
        v->array_count++;
    } else if (!v->is_copy) {
        assert(v->count < PG_VALUES_MAX);
        v->start[v->count++] = v->used;
    }
    put_u32(v, bytes);
}

void pg_values_null(struct pg_values *v)
{
    begin_value(v, UINT32_MAX);
}

void pg_values_bool(struct pg_values *v, bool x)
{
    begin_value(v, 1);
    *more(v, 1) = x;
}

void pg_values_i32(struct pg_values *v, int32_t x)
{
    begin_value(v, 4);
    put_u32(v, (uint32_t)x);
}

void pg_values_i64(struct pg_values *v, int64_t x)
{
    begin_value(v, 8);
    put_u64(v, (uint64_t)x);
}

void pg_values_f64(struct pg_values *v, double x)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    begin_value(v, 8);
    put_u64(v, bits);
}

/* numeric on the wire: count of digits in base 10,000, weight of the first, sign, decimals, digits. */
void pg_values_u64(struct pg_values *v, uint64_t x)
{
    unsigned digit[5];
    int count = 0;
    for (; x; x /= 10000)
        digit[count++] = (unsigned)(x % 10000);
    begin_value(v, 8 + 2 * (uint32_t)count);
    put_u16(v, (unsigned)count);
    put_u16(v, count ? (unsigned)count - 1 : 0);
    put_u16(v, 0);
    put_u16(v, 0);
    while (count)
        put_u16(v, digit[--count]);
}

void pg_values_bytes(struct pg_values *v, const void *x, size_t bytes)
{
    begin_value(v, (uint32_t)bytes);
    put_bytes(v, x, bytes);
}

void pg_values_text(struct pg_values *v, const char *x)
{
    if (x)
        pg_values_bytes(v, x, strlen(x));
    else
        pg_values_null(v);
}

/* sequence_bytes: length of the valid UTF-8 sequence at s, 0 when there is none. */
static size_t sequence_bytes(const unsigned char *s)
{
    if (s[0] < 0x80)
        return 1;
    size_t n = s[0] >= 0xf0 && s[0] < 0xf5 ? 4 : s[0] >= 0xe0 && s[0] < 0xf0 ? 3 : s[0] >= 0xc2 && s[0] < 0xe0 ? 2 : 0;
    for (size_t i = 1; i < n; i++)
        if ((s[i] & 0xc0) != 0x80)
            return 0;
    if ((s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xed && s[1] > 0x9f) || (s[0] == 0xf0 && s[1] < 0x90) ||
        (s[0] == 0xf4 && s[1] > 0x8f))
        return 0;
    return n;
}

void pg_values_text_clean(struct pg_values *v, const char *x, size_t bytes)
{
    static const char unknown[] = "\xef\xbf\xbd", ellipsis[] = "\xe2\x80\xa6";
    assert(bytes >= 3);
    begin_value(v, 0);
    size_t start = v->used, whole = v->used; /* whole: where an ellipsis would still fit */
    for (const unsigned char *s = (const unsigned char *)(x ? x : ""); *s;) {
        size_t n = sequence_bytes(s), out = n ? n : 3;
        if (v->used - start + out > bytes) {
            v->used = v->failed ? v->used : whole;
            put_bytes(v, ellipsis, 3);
            break;
        }
        put_bytes(v, n ? (const void *)s : unknown, out);
        s += n ? n : 1;
        if (v->used - start + 3 <= bytes)
            whole = v->used;
    }
    if (!v->failed)
        write_u32(v->bytes + start - 4, (uint32_t)(v->used - start));
}

void pg_values_jsonb(struct pg_values *v, const char *x)
{
    if (!x) {
        pg_values_null(v);
        return;
    }
    begin_value(v, (uint32_t)strlen(x) + 1);
    *more(v, 1) = 1; /* version of jsonb's wire format */
    put_bytes(v, x, strlen(x));
}

void pg_values_array(struct pg_values *v, enum pg_type element)
{
    assert(!v->in_array);
    begin_value(v, 0);
    v->array_at = v->used;
    put_u32(v, 1); /* dimensions */
    put_u32(v, 0); /* flags */
    put_u32(v, (uint32_t)element);
    put_u32(v, 0); /* elements, see the end */
    put_u32(v, 1); /* lower bound */
    v->array_count = 0;
    v->in_array = true;
}

void pg_values_array_end(struct pg_values *v)
{
    assert(v->in_array);
    v->in_array = false;
    if (v->failed)
        return;
    if (v->array_count == 0) {
        write_u32(v->bytes + v->array_at, 0);
        v->used = v->array_at + 12;
    } else {
        write_u32(v->bytes + v->array_at + 12, (uint32_t)v->array_count);
    }
    write_u32(v->bytes + v->array_at - 4, (uint32_t)(v->used - v->array_at));
}

void pg_values_copy_begin(struct pg_values *v)
{
    pg_values_clear(v);
    v->is_copy = true;
    put_bytes(v, "PGCOPY\n\377\r\n\0\0\0\0\0\0\0\0\0", 19);
}

void pg_values_copy_row(struct pg_values *v, int fields)
{
    put_u16(v, (unsigned)fields);
}

void pg_values_copy_end(struct pg_values *v)
{
    put_u16(v, 0xffff);
}

/* bind lays a statement's values out as libpq wants them. */
struct binding { const char *value[PG_VALUES_MAX]; int length[PG_VALUES_MAX], format[PG_VALUES_MAX], count; };

static bool bind(struct binding *b, const struct pg_values *v, struct pg_error *why)
{
    b->count = v ? v->count : 0;
    if (v && v->failed)
        return pg_error_set(why, PG_AWAY, "out of memory for the values of a statement");
    for (int i = 0; i < b->count; i++) {
        const unsigned char *at = v->bytes + v->start[i];
        uint32_t bytes = (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
        b->value[i] = bytes == UINT32_MAX ? NULL : (const char *)at + 4;
        b->length[i] = bytes == UINT32_MAX ? 0 : (int)bytes;
        b->format[i] = 1;
    }
    return true;
}

/* --- results ----------------------------------------------------------------------------------------------- */

void pg_result_free(struct pg_result *r)
{
    PQclear((PGresult *)(void *)r);
}

int pg_row_count(const struct pg_result *r)
{
    return PQntuples(inner(r));
}

bool pg_row_is_null(const struct pg_result *r, int row, int column)
{
    return PQgetisnull(inner(r), row, column);
}

const char *pg_row_text(const struct pg_result *r, int row, int column)
{
    return PQgetvalue(inner(r), row, column);
}

int64_t pg_row_i64(const struct pg_result *r, int row, int column)
{
    return strtoll(pg_row_text(r, row, column), NULL, 10);
}

uint64_t pg_row_u64(const struct pg_result *r, int row, int column)
{
    return strtoull(pg_row_text(r, row, column), NULL, 10);
}

double pg_row_f64(const struct pg_result *r, int row, int column)
{
    return pg_row_is_null(r, row, column) ? (double)NAN : strtod(pg_row_text(r, row, column), NULL);
}

bool pg_row_bool(const struct pg_result *r, int row, int column)
{
    return pg_row_text(r, row, column)[0] == 't';
}

/* --- connecting -------------------------------------------------------------------------------------------- */

/* libpq would print notices on stderr; a library is quiet. */
static void quiet(void *context, const PGresult *notice)
{
    (void)context;
    (void)notice;
}

/* is_readable: a connection string that libpq cannot parse will not mend itself either. */
static bool is_readable(const char *uri, struct pg_error *why)
{
    char *message = NULL, text[400];
    if (!uri || (!strchr(uri, '=') && strncmp(uri, "postgres", 8) != 0))
        return true; /* the environment, or a database's name */
    PQconninfoOption *options = PQconninfoParse(uri, &message);
    if (!options) {
        one_line(text, sizeof text, message ? message : "out of memory");
        pg_error_set(why, PG_REFUSED, "the database address is not understood: %s", text);
    }
    PQconninfoFree(options);
    PQfreemem(message);
    return options != NULL;
}

bool pg_begin(struct pg **ret, const char *uri, struct pg_error *why)
{
    /* What stands before dbname can be said otherwise by the uri. A silent network is noticed within 30 s. */
    const char *const key[] = {"fallback_application_name", "client_encoding", "keepalives_idle", "keepalives_interval",
                               "keepalives_count", "tcp_user_timeout", "dbname", NULL};
    const char *const value[] = {"kiln", "UTF8", "10", "5", "3", "20000", uri, NULL};
    if (!is_readable(uri, why))
        return false;
    struct pg *pg = calloc(1, sizeof *pg);
    if (!pg)
        return pg_error_set(why, PG_AWAY, "out of memory for a database connection");
    pg->conn = PQconnectStartParams(key, value, 1);
    if (!pg->conn || PQstatus(pg->conn) == CONNECTION_BAD) {
        if (pg->conn)
            lost(pg, why);
        else
            pg_error_set(why, PG_AWAY, "out of memory for a database connection");
        pg_close(pg);
        return false;
    }
    PQsetNoticeReceiver(pg->conn, quiet, NULL);
    pg->connecting = PGRES_POLLING_WRITING;
    *ret = pg;
    return true;
}

enum pg_up pg_begin_poll(struct pg *pg, struct pg_error *why)
{
    struct pollfd fd = {.fd = PQsocket(pg->conn), .events = pg_wants_write(pg) ? POLLOUT : POLLIN};
    while (!pg->is_up && fd.fd >= 0 && poll(&fd, 1, 0) > 0) {
        pg->connecting = PQconnectPoll(pg->conn);
        if (pg->connecting == PGRES_POLLING_FAILED) {
            lost(pg, why);
            return PG_UP_DOWN;
        }
        pg->is_up = pg->connecting == PGRES_POLLING_OK;
        fd = (struct pollfd){.fd = PQsocket(pg->conn), .events = pg_wants_write(pg) ? POLLOUT : POLLIN};
    }
    if (!pg->is_up)
        return PG_UP_WAIT;
    pg->wants_write = false;
    if (PQsetnonblocking(pg->conn, 1) != 0 || PQenterPipelineMode(pg->conn) != 1) {
        lost(pg, why);
        return PG_UP_DOWN;
    }
    return PG_UP_READY;
}

int pg_fd(const struct pg *pg)
{
    return PQsocket(pg->conn);
}

bool pg_wants_write(const struct pg *pg)
{
    return pg->is_up ? pg->wants_write : pg->connecting == PGRES_POLLING_WRITING;
}

void pg_close(struct pg *pg)
{
    if (!pg)
        return;
    PQfinish(pg->conn);
    free(pg);
}

const char *pg_session_sql(void)
{
    return "select set_config('search_path', 'kiln', false), set_config('statement_timeout', $1::text, false),"
           " set_config('lock_timeout', $2::text, false),"
           " set_config('idle_in_transaction_session_timeout', '30s', false),"
           " set_config('client_connection_check_interval', '10s', false),"
           " set_config('tcp_keepalives_idle', '10', false), set_config('tcp_keepalives_interval', '5', false),"
           " set_config('tcp_keepalives_count', '3', false), set_config('jit', 'off', false),"
           " set_config('plan_cache_mode', $3::text, false), set_config('enable_seqscan', $4::text, false),"
           " set_config('enable_bitmapscan', $4::text, false), set_config('enable_mergejoin', $4::text, false),"
           " set_config('enable_hashjoin', $4::text, false)";
}

void pg_session_values(struct pg_values *v, int statement_ms, int lock_ms, bool steady)
{
    char number[16];
    pg_values_clear(v);
    snprintf(number, sizeof number, "%d", statement_ms);
    pg_values_text(v, number);
    snprintf(number, sizeof number, "%d", lock_ms);
    pg_values_text(v, number);
    pg_values_text(v, steady ? "force_generic_plan" : "auto");
    pg_values_text(v, steady ? "off" : "on");
}

/* --- blocking ---------------------------------------------------------------------------------------------- */

/* await waits until the socket is ready or the deadline is over. */
static bool await(struct pg *pg, short events, int64_t deadline_ms, struct pg_error *why)
{
    for (;;) {
        int64_t left = deadline_ms - pg_now_ms();
        struct pollfd fd = {.fd = PQsocket(pg->conn), .events = events};
        if (left <= 0)
            return pg_error_set(why, PG_AWAY, "PostgreSQL is away: the server is there but does not answer");
        int ready = poll(&fd, 1, left > 60000 ? 60000 : (int)left);
        if (ready > 0)
            return true;
        if (ready < 0 && errno != EINTR)
            return pg_error_set(why, PG_AWAY, "PostgreSQL is away: poll: %s", strerror(errno));
    }
}

/* next_result: the next result of what was sent, NULL after the last; false when the connection is lost. */
static bool next_result(struct pg *pg, PGresult **ret, struct pg_error *why)
{
    int64_t deadline_ms = pg_now_ms() + pg->answer_ms + ANSWER_EXTRA_MS;
    for (int unsent = 1;;) {
        if (unsent && (unsent = PQflush(pg->conn)) < 0)
            return lost(pg, why);
        if (!PQisBusy(pg->conn))
            break;
        if (!await(pg, unsent ? POLLIN | POLLOUT : POLLIN, deadline_ms, why))
            return false;
        if (!PQconsumeInput(pg->conn))
            return lost(pg, why);
    }
    *ret = PQgetResult(pg->conn);
    return true;
}

/* settle reads what is left of a statement; the first error wins over the last good result. */
static bool settle(struct pg *pg, struct pg_result **ret, struct pg_error *why)
{
    PGresult *r = NULL, *last = NULL;
    bool ok = true, alive;
    while ((alive = next_result(pg, &r, ok ? why : &(struct pg_error){0})) && r) {
        ExecStatusType status = PQresultStatus(r);
        if (ok && status != PGRES_COMMAND_OK && status != PGRES_TUPLES_OK && status != PGRES_SINGLE_TUPLE &&
            status != PGRES_EMPTY_QUERY)
            ok = refused(r, why);
        PQclear(last);
        last = r;
        if (PQstatus(pg->conn) == CONNECTION_BAD)
            break;
    }
    if (ok && !alive) {
        PQclear(last);
        return false;
    }
    if (ok && PQstatus(pg->conn) == CONNECTION_BAD)
        ok = lost(pg, why);
    if (!ok && PQstatus(pg->conn) == CONNECTION_BAD)
        why->fault = PG_AWAY;
    if (ok && ret)
        *ret = outer(last);
    else
        PQclear(last);
    return ok;
}

bool pg_open(struct pg **ret, const char *uri, int answer_ms, struct pg_error *why)
{
    struct pg *pg = NULL;
    struct pg_values v = {0};
    int64_t deadline_ms = pg_now_ms() + CONNECT_MS;
    bool ok = false;
    if (!pg_begin(&pg, uri, why))
        return false;
    pg->answer_ms = answer_ms;
    enum pg_up up;
    while ((up = pg_begin_poll(pg, why)) == PG_UP_WAIT)
        if (!await(pg, pg_wants_write(pg) ? POLLOUT : POLLIN, deadline_ms, why))
            goto done;
    if (up == PG_UP_DOWN)
        goto done;
    PQexitPipelineMode(pg->conn);
    pg_session_values(&v, answer_ms, LOCK_MS, false);
    ok = pg_run(pg, pg_session_sql(), &v, NULL, why);
done:
    pg_values_done(&v);
    if (ok)
        *ret = pg;
    else
        pg_close(pg);
    return ok;
}

bool pg_run(struct pg *pg, const char *sql, const struct pg_values *values, struct pg_result **ret, struct pg_error *why)
{
    struct binding b;
    if (!bind(&b, values, why))
        return false;
    if (!PQsendQueryParams(pg->conn, sql, b.count, NULL, b.value, b.length, b.format, 0))
        return lost(pg, why);
    return settle(pg, ret, why);
}

bool pg_script(struct pg *pg, const char *sql, struct pg_error *why)
{
    if (!PQsendQuery(pg->conn, sql))
        return lost(pg, why);
    return settle(pg, NULL, why);
}

static void cancel(struct pg *pg)
{
    char text[256];
    PGcancel *c = PQgetCancel(pg->conn);
    if (c)
        PQcancel(c, text, sizeof text);
    PQfreeCancel(c);
}

bool pg_each(struct pg *pg, const char *sql, const struct pg_values *values,
             bool (*each)(void *context, const struct pg_result *row), void *context, struct pg_error *why)
{
    struct binding b;
    PGresult *r = NULL;
    if (!bind(&b, values, why))
        return false;
    if (!PQsendQueryParams(pg->conn, sql, b.count, NULL, b.value, b.length, b.format, 0) || !PQsetSingleRowMode(pg->conn))
        return lost(pg, why);
    for (;;) {
        if (!next_result(pg, &r, why))
            return false;
        if (!r)
            return true;
        if (PQresultStatus(r) == PGRES_TUPLES_OK) {
            PQclear(r);
            continue;
        }
        if (PQresultStatus(r) != PGRES_SINGLE_TUPLE) {
            struct pg_error ignored;
            bool ok = refused(r, why);
            PQclear(r);
            settle(pg, NULL, &ignored);
            return ok;
        }
        bool go_on = each(context, outer(r));
        PQclear(r);
        if (!go_on) {
            struct pg_error cancelled;
            cancel(pg);
            if (!settle(pg, NULL, &cancelled) && strcmp(cancelled.sqlstate, "57014") != 0) {
                *why = cancelled;
                return false;
            }
            return true;
        }
    }
}

bool pg_copy(struct pg *pg, const char *sql, const struct pg_values *stream, struct pg_error *why)
{
    PGresult *r = NULL;
    if (stream->failed)
        return pg_error_set(why, PG_AWAY, "out of memory for rows to send");
    if (!PQsendQuery(pg->conn, sql))
        return lost(pg, why);
    if (!next_result(pg, &r, why))
        return false;
    bool ok = PQresultStatus(r) == PGRES_COPY_IN || refused(r, why);
    PQclear(r);
    int64_t deadline_ms = pg_now_ms() + pg->answer_ms + ANSWER_EXTRA_MS;
    for (size_t at = 0; ok && at < stream->used;) {
        size_t piece = stream->used - at < COPY_PIECE ? stream->used - at : COPY_PIECE;
        int sent = PQputCopyData(pg->conn, (const char *)stream->bytes + at, (int)piece);
        if (sent < 0)
            return lost(pg, why);
        if (sent > 0)
            at += piece;
        /* What is queued goes out before more is queued: libpq would keep it all in memory. */
        while (ok && (sent = PQflush(pg->conn)) > 0)
            ok = await(pg, POLLOUT | POLLIN, deadline_ms, why) && (PQconsumeInput(pg->conn) || lost(pg, why));
        if (sent < 0)
            return lost(pg, why);
        if (!ok)
            return false;
    }
    if (ok && PQputCopyEnd(pg->conn, NULL) < 0)
        return lost(pg, why);
    if (!ok) {
        struct pg_error ignored;
        settle(pg, NULL, &ignored);
        return false;
    }
    return settle(pg, NULL, why);
}

/* --- pipelines --------------------------------------------------------------------------------------------- */

bool pg_pipe_prepare(struct pg *pg, const char *name, const char *sql, struct pg_error *why)
{
    return PQsendPrepare(pg->conn, name, sql, 0, NULL) || lost(pg, why);
}

bool pg_pipe_run(struct pg *pg, const char *name, const struct pg_values *values, struct pg_error *why)
{
    struct binding b;
    return bind(&b, values, why) &&
           (PQsendQueryPrepared(pg->conn, name, b.count, b.value, b.length, b.format, 0) || lost(pg, why));
}

bool pg_pipe_sql(struct pg *pg, const char *sql, const struct pg_values *values, struct pg_error *why)
{
    struct binding b;
    return bind(&b, values, why) &&
           (PQsendQueryParams(pg->conn, sql, b.count, NULL, b.value, b.length, b.format, 0) || lost(pg, why));
}

bool pg_pipe_sync(struct pg *pg, struct pg_error *why)
{
    return PQpipelineSync(pg->conn) || lost(pg, why);
}

/* pump moves bytes both ways without waiting. */
static bool pump(struct pg *pg, struct pg_error *why)
{
    int unsent = PQflush(pg->conn);
    if (unsent < 0 || !PQconsumeInput(pg->conn))
        return lost(pg, why);
    pg->wants_write = unsent > 0;
    for (PGnotify *n; (n = PQnotifies(pg->conn)); PQfreemem(n))
        pg->was_notified = true;
    return true;
}

enum pg_event pg_pipe_poll(struct pg *pg, struct pg_result **ret, struct pg_error *why)
{
    if (!pump(pg, why))
        return PG_EVENT_GONE;
    /* Between two statements libpq answers NULL once; two NULLs in a row mean that nothing is under way. */
    for (int nothing = 0; nothing < 2 && !PQisBusy(pg->conn);) {
        PGresult *r = PQgetResult(pg->conn);
        if (!r) {
            nothing++;
            continue;
        }
        ExecStatusType status = PQresultStatus(r);
        if (status == PGRES_TUPLES_OK || status == PGRES_COMMAND_OK) {
            *ret = outer(r);
            return PG_EVENT_ROWS;
        }
        if (status == PGRES_PIPELINE_SYNC || status == PGRES_PIPELINE_ABORTED) {
            PQclear(r);
            return status == PGRES_PIPELINE_SYNC ? PG_EVENT_SYNCED : PG_EVENT_SKIPPED;
        }
        refused(r, why);
        PQclear(r);
        if (PQstatus(pg->conn) != CONNECTION_BAD)
            return PG_EVENT_FAILED;
        why->fault = PG_AWAY;
        return PG_EVENT_GONE;
    }
    if (PQstatus(pg->conn) == CONNECTION_BAD) {
        lost(pg, why);
        return PG_EVENT_GONE;
    }
    return PG_EVENT_NONE;
}

bool pg_pipe_enter(struct pg *pg, struct pg_error *why)
{
    return PQenterPipelineMode(pg->conn) || lost(pg, why);
}

enum pg_event pg_pipe_wait(struct pg *pg, struct pg_result **ret, struct pg_error *why)
{
    int64_t deadline_ms = pg_now_ms() + pg->answer_ms + ANSWER_EXTRA_MS;
    enum pg_event event;
    while ((event = pg_pipe_poll(pg, ret, why)) == PG_EVENT_NONE)
        if (!await(pg, pg->wants_write ? POLLIN | POLLOUT : POLLIN, deadline_ms, why))
            return PG_EVENT_GONE;
    return event;
}

bool pg_pipe_leave(struct pg *pg, struct pg_error *why)
{
    return PQexitPipelineMode(pg->conn) || lost(pg, why);
}

bool pg_notified(struct pg *pg)
{
    bool was = pg->was_notified;
    pg->was_notified = false;
    return was;
}

/* --- time -------------------------------------------------------------------------------------------------- */

int64_t pg_now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

void pg_backoff_reset(struct pg_backoff *b)
{
    b->step_ms = 0;
    b->until_ms = 0;
}

int pg_backoff_wait(struct pg_backoff *b)
{
    if (!b->random) {
        struct timespec t;
        clock_gettime(CLOCK_REALTIME, &t);
        b->random = (uint32_t)t.tv_nsec | 1;
    }
    b->random = b->random * 1664525u + 1013904223u;
    b->step_ms = b->step_ms == 0 ? 100 : b->step_ms >= 2500 ? 5000 : 2 * b->step_ms;
    /* The jitter keeps a hundred programs from knocking at a restarted server at the same moment. */
    int wait_ms = b->step_ms * 3 / 4 + (int)((b->random >> 8) % (uint32_t)(b->step_ms / 2));
    b->until_ms = pg_now_ms() + wait_ms;
    return wait_ms;
}

int pg_backoff_left_ms(const struct pg_backoff *b)
{
    int64_t left = b->until_ms - pg_now_ms();
    return left > 0 ? (int)left : 0;
}
