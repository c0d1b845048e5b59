/* pg.h - libpq, and the only file that names it: connecting, queries by name, arrays, without blocking.
 *
 * Two ways of use over one object: blocking (the command line, tests, migrations) and non-blocking
 * (the coordinator's loop, which polls pg_fd). Reconnects are the caller's decision with pg_backoff. */
#ifndef KILN_PG_H
#define KILN_PG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum pg_fault {
    PG_OK,
    PG_AWAY,      /* no server, connection lost, server shutting down, timeout: try again later (exit 75) */
    PG_CONFLICT,  /* serialization failure, deadlock, lock timeout: run it again now */
    PG_REFUSED,   /* the statement is wrong or not allowed: a bug or a wrong database */
};
struct pg_error { enum pg_fault fault; char sqlstate[6]; char text[1024]; };

#endif
