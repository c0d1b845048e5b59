/* migrate.h - brings a database to this program's schema: the numbered files of migrations/, each in a transaction,
 * under an advisory lock. A database newer than the program is refused with both versions. */
#ifndef KILN_MIGRATE_H
#define KILN_MIGRATE_H

#include "pg.h"

int migrate_version(void); /* the newest this program knows */
bool migrate_run(const char *uri, int *ret_from, int *ret_to, struct pg_error *why);

#endif
