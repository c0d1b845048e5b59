/* test_server.h - a private PostgreSQL for a C test, by tests/sql/pg_server, and short-hands for looking into it.
 * Everything here ends the test with a message when it fails. Run from the repository's root (ctest does). */
#ifndef KILN_TEST_SERVER_H
#define KILN_TEST_SERVER_H

#include <stdint.h>

#include "task_store.h"

struct test_server { char dir[64], uri[256]; };

void test_server_start(struct test_server *s);           /* a cluster with kiln's schema */
void test_server_drop(struct test_server *s);
void test_server_control(struct test_server *s, const char *verb); /* "stop -m immediate", "start", "restart -m immediate" */
int test_server_pid(struct test_server *s);

/* test_server_empty empties every table, so that each test starts alone. */
void test_server_empty(struct test_server *s);
/* test_server_number runs SQL that answers one number (null: -1). The format is printf's. */
int64_t test_server_number(struct test_server *s, const char *format, ...) __attribute__((format(printf, 2, 3)));
void test_server_sql(struct test_server *s, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* test_server_submit adds `count` tasks (rows 0..count-1, key and prompt from the row) to a campaign, made if need be. */
void test_server_submit(struct test_server *s, const char *campaign, int count, struct task_submitted *ret);
struct task_row test_server_row(int row, char *prompt, char *file); /* 64 bytes each */
void test_server_audit(struct test_server *s);           /* fails the test when an audit finds anything */

/* Turns, waited for. test_server_turn runs one turn to its end; false when it ended in AWAY or REFUSED. */
struct task_turn *test_server_turn_open(struct test_server *s); /* idle */
bool test_server_turn(struct task_turn *t, const struct task_turn_request *request);
bool test_server_wait(struct task_turn *t, enum task_turn_state state, int limit_ms);

struct task_finish test_server_finish(const struct task_claimed *c, const char *worker);

#endif
