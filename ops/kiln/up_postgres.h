/* up_postgres.h - the private PostgreSQL of a home: programs, data folder, settings.
 *
 *   up_postgres_find      which programs, which user         before the home is made
 *   up_postgres_prepare   initdb, at the first start         the folder appears under its name only when it is whole
 *   up_postgres_command   the server's command line
 *   up_postgres_ready     does it answer? makes the database `kiln` */
#ifndef KILN_UP_POSTGRES_H
#define KILN_UP_POSTGRES_H

#include "pg.h"
#include "up_child.h"

#define UP_POSTGRES_LEAST 15 /* the oldest major version */

struct up_postgres {
    char bin[1024];       /* folder of initdb and postgres */
    int major;
    struct up_user user;  /* name "": the caller; as root: postgres */
};

/* False with a sentence that names the package that is missing, or the version the data folder needs. */
bool up_postgres_find(struct up_postgres *ret, const struct home *home, char *why, size_t why_bytes);
bool up_postgres_prepare(const struct up_postgres *p, const struct home *home, char *why, size_t why_bytes);
void up_postgres_command(const struct up_postgres *p, const struct home *home, struct up_child *ret);
bool up_postgres_ready(const struct home *home, struct pg_error *why);

#endif
