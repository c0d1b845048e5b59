/* pg.h - libpq, and the only file that names it: connecting, statements, binary values, COPY, pipelines.
 *
 * Two ways of use over one object: blocking (the command line, tests, migrations) and non-blocking
 * (the coordinator's loop, which polls pg_fd). Reconnecting is the caller's decision, paced by pg_backoff.
 *
 *   struct pg_values v = {0};                       parameters, in binary: nothing is quoted, nothing can be injected
 *   pg_values_i64(&v, id);
 *   pg_values_array(&v, PG_TEXT); for (...) pg_values_text(&v, names[i]); pg_values_array_end(&v);
 *   if (!pg_run(pg, sql, &v, &rows, why)) ...
 *   for (int i = 0; i < pg_row_count(rows); i++) use(pg_row_i64(rows, i, 0), pg_row_text(rows, i, 1));
 *   pg_result_free(rows); pg_values_done(&v); */
#ifndef KILN_PG_H
#define KILN_PG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum pg_fault {
    PG_OK,
    PG_AWAY,      /* no server, connection lost, server shutting down, out of room, timeout: try again later (exit 75) */
    PG_CONFLICT,  /* serialization failure, deadlock, lock timeout: run it again now */
    PG_REFUSED,   /* the statement is wrong or not allowed: a bug or a wrong database */
};
struct pg_error { enum pg_fault fault; char sqlstate[6]; char text[1024]; };

/* pg_error_set writes a sentence; sqlstate "" when it is not the server's. Always false, so one can return it. */
bool pg_error_set(struct pg_error *why, enum pg_fault fault, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* pg_error_prefix puts the context in front: "submit: row 7: " + what was there. Always false. */
bool pg_error_prefix(struct pg_error *why, const char *context);

/* --- values: parameters of a statement, elements of an array, fields of a COPY row ---------------------- */

#define PG_VALUES_MAX 16 /* parameters of one statement */

enum pg_type { PG_BOOL = 16, PG_BYTEA = 17, PG_I64 = 20, PG_I32 = 23, PG_TEXT = 25, PG_F64 = 701, PG_NUMERIC = 1700 };

struct pg_values { /* starts as {0}; its memory is kept by pg_values_clear and freed by pg_values_done */
    unsigned char *bytes;
    size_t used, room;
    size_t start[PG_VALUES_MAX];
    int count;                    /* parameters so far */
    size_t array_at; int array_count; bool in_array;
    bool is_copy, failed;         /* failed: out of memory; the statement it is given to says so */
};
void pg_values_clear(struct pg_values *v);
void pg_values_done(struct pg_values *v);
void pg_values_null(struct pg_values *v);
void pg_values_bool(struct pg_values *v, bool x);
void pg_values_i32(struct pg_values *v, int32_t x);
void pg_values_i64(struct pg_values *v, int64_t x);
void pg_values_u64(struct pg_values *v, uint64_t x);  /* as numeric: 64 bits unsigned, exact, readable in psql */
void pg_values_f64(struct pg_values *v, double x);
void pg_values_text(struct pg_values *v, const char *x);  /* NULL: null. Must be UTF-8, or the server refuses */
/* pg_values_text_clean: text from strangers. Bytes that are not UTF-8 become U+FFFD, more than `bytes` is cut off
 * with an ellipsis, so that one worker's bad text cannot fail everybody's statement. */
void pg_values_text_clean(struct pg_values *v, const char *x, size_t bytes);
void pg_values_bytes(struct pg_values *v, const void *x, size_t bytes); /* bytea; 16 of them: uuid */
void pg_values_jsonb(struct pg_values *v, const char *x);               /* NULL: null */
void pg_values_array(struct pg_values *v, enum pg_type element);
void pg_values_array_end(struct pg_values *v);
void pg_values_copy_begin(struct pg_values *v);            /* v becomes a binary COPY stream: */
void pg_values_copy_row(struct pg_values *v, int fields);  /* ... then that many values */
void pg_values_copy_end(struct pg_values *v);

/* --- results ------------------------------------------------------------------------------------------ */

struct pg_result; /* rows of one statement; texts live as long as it */
void pg_result_free(struct pg_result *r);
int pg_row_count(const struct pg_result *r);
bool pg_row_is_null(const struct pg_result *r, int row, int column);
const char *pg_row_text(const struct pg_result *r, int row, int column); /* "" for null */
int64_t pg_row_i64(const struct pg_result *r, int row, int column);
uint64_t pg_row_u64(const struct pg_result *r, int row, int column);
double pg_row_f64(const struct pg_result *r, int row, int column);       /* NaN for null */
bool pg_row_bool(const struct pg_result *r, int row, int column);

/* --- blocking ------------------------------------------------------------------------------------------- */

struct pg;

/* pg_open connects (uri NULL: libpq's environment), schema kiln first, within 10 s. answer_ms: how long a
 * statement may take, at the server and (a little more) here; lock waits end after 10 s as PG_CONFLICT. */
bool pg_open(struct pg **ret, const char *uri, int answer_ms, struct pg_error *why);
void pg_close(struct pg *pg);
bool pg_run(struct pg *pg, const char *sql, const struct pg_values *values, struct pg_result **ret, struct pg_error *why);
bool pg_script(struct pg *pg, const char *sql, struct pg_error *why); /* several statements, no parameters */
/* pg_each runs a query row by row, so that a million rows need no memory. `each` gets a result with one row;
 * when it answers false the query is cancelled, and pg_each is true with the connection usable. */
bool pg_each(struct pg *pg, const char *sql, const struct pg_values *values,
             bool (*each)(void *context, const struct pg_result *row), void *context, struct pg_error *why);
/* pg_copy sends a whole COPY stream made by pg_values_copy_*. */
bool pg_copy(struct pg *pg, const char *sql, const struct pg_values *stream, struct pg_error *why);

/* --- non-blocking --------------------------------------------------------------------------------------- */

enum pg_up { PG_UP_WAIT, PG_UP_READY, PG_UP_DOWN };
bool pg_begin(struct pg **ret, const char *uri, struct pg_error *why);
enum pg_up pg_begin_poll(struct pg *pg, struct pg_error *why);
int pg_fd(const struct pg *pg);
bool pg_wants_write(const struct pg *pg);

/* A pipeline: statements up to pg_pipe_sync are one transaction, answered in order. Each call only queues;
 * pg_pipe_poll sends and reads, and never waits. */
bool pg_pipe_prepare(struct pg *pg, const char *name, const char *sql, struct pg_error *why);
bool pg_pipe_run(struct pg *pg, const char *name, const struct pg_values *values, struct pg_error *why);
bool pg_pipe_sql(struct pg *pg, const char *sql, const struct pg_values *values, struct pg_error *why);
bool pg_pipe_sync(struct pg *pg, struct pg_error *why);
enum pg_event {
    PG_EVENT_NONE,    /* nothing yet */
    PG_EVENT_ROWS,    /* the next statement is done: *ret, yours */
    PG_EVENT_FAILED,  /* the next statement failed: why */
    PG_EVENT_SKIPPED, /* the next statement was not run, because an earlier one failed */
    PG_EVENT_SYNCED,  /* committed, if nothing failed before */
    PG_EVENT_GONE,    /* the connection is lost: why */
};
enum pg_event pg_pipe_poll(struct pg *pg, struct pg_result **ret, struct pg_error *why);
/* On a blocking connection: a pipeline between enter and leave. pg_pipe_wait is pg_pipe_poll that waits, and is never
 * PG_EVENT_NONE. Leave when every answer up to the sync has been read. */
bool pg_pipe_enter(struct pg *pg, struct pg_error *why);
enum pg_event pg_pipe_wait(struct pg *pg, struct pg_result **ret, struct pg_error *why);
bool pg_pipe_leave(struct pg *pg, struct pg_error *why);
bool pg_notified(struct pg *pg); /* a NOTIFY arrived since last asked */

/* pg_session_sql sets timeouts, schema and keepalives: parameters are those of pg_session_values. The first statement
 * of a non-blocking connection. steady: plans by index, made once, whatever the statistics say at the moment. */
const char *pg_session_sql(void);
void pg_session_values(struct pg_values *v, int statement_ms, int lock_ms, bool steady);

/* --- time ------------------------------------------------------------------------------------------------ */

int64_t pg_now_ms(void); /* monotonic */
struct pg_backoff { int step_ms; int64_t until_ms; uint32_t random; }; /* {0} */
void pg_backoff_reset(struct pg_backoff *b);
int pg_backoff_wait(struct pg_backoff *b);      /* 0.1 s doubling to 5 s, each plus or minus a quarter: ms to wait now */
int pg_backoff_left_ms(const struct pg_backoff *b);

#endif
