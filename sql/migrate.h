/* migrate.h - brings a database to this program's schema: the numbered files of migrations/, each in a transaction,
 * under an advisory lock, so that two programs starting at once take turns. A database newer than the program is
 * refused with both versions. Running it again does nothing. */
#ifndef KILN_MIGRATE_H
#define KILN_MIGRATE_H

#include "pg.h"

int migrate_version(void); /* the newest this program knows */
/* migrate_run: from is 0 for an empty database. uri NULL: libpq's environment. */
bool migrate_run(const char *uri, int *ret_from, int *ret_to, struct pg_error *why);
/* migrate_check says whether a database of this version may be used; a sentence with both versions when not. */
bool migrate_check(int version, struct pg_error *why);

/* migrate_explain: an error of asking for the version that only means "no tables yet" says so. Always false. */
bool migrate_explain(struct pg_error *why);

#endif
