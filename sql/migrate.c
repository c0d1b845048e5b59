/* migrate.c - see migrate.h. Each file is a transaction of its own that also notes its number in schema_version,
 * so that `psql -f` does the same as this. A crash between two files leaves a database that the next run takes on. */
#include "migrate.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sql_text.h"

enum { MIGRATE_ANSWER_MS = 30 * 60 * 1000 }; /* a migration may rewrite a big table */

static int number_of(const struct sql_text *file)
{
    return atoi(file->name);
}

int migrate_version(void)
{
    int newest = 0;
    for (const struct sql_text *file = sql_text_migrations; file->name; file++)
        newest = number_of(file) > newest ? number_of(file) : newest;
    return newest;
}

bool migrate_check(int version, struct pg_error *why)
{
    if (version > migrate_version())
        return pg_error_set(why, PG_REFUSED,
                            "the database has schema version %d, which is newer than this program's %d: update kiln",
                            version, migrate_version());
    if (version < migrate_version())
        return pg_error_set(why, PG_REFUSED,
                            "the database has schema version %d, this program needs %d: 'kiln up' brings it there",
                            version, migrate_version());
    return true;
}

bool migrate_explain(struct pg_error *why)
{
    bool is_unborn = strcmp(why->sqlstate, "42P01") == 0 || strcmp(why->sqlstate, "3F000") == 0; /* no table, no schema */
    return is_unborn && pg_error_set(why, PG_REFUSED, "the database has no kiln tables: 'kiln up' makes them");
}

static bool read_version(struct pg *pg, int *ret, struct pg_error *why)
{
    struct pg_result *r = NULL;
    if (!pg_run(pg, "select to_regclass('kiln.schema_version') is not null", NULL, &r, why))
        return false;
    bool is_there = pg_row_bool(r, 0, 0);
    pg_result_free(r);
    *ret = 0;
    if (!is_there)
        return true;
    if (!pg_run(pg, sql_text_query("version"), NULL, &r, why))
        return false;
    *ret = (int)pg_row_i64(r, 0, 0);
    pg_result_free(r);
    return true;
}

static bool apply(struct pg *pg, const struct sql_text *file, struct pg_error *why)
{
    struct pg_error ignored;
    char context[96];
    if (pg_script(pg, file->text, why))
        return true;
    pg_script(pg, "rollback", &ignored);
    snprintf(context, sizeof context, "migration %.64s: ", file->name);
    return pg_error_prefix(why, context);
}

bool migrate_run(const char *uri, int *ret_from, int *ret_to, struct pg_error *why)
{
    struct pg *pg = NULL;
    int version = 0, from = 0;
    bool ok = false;
    if (!pg_open(&pg, uri, MIGRATE_ANSWER_MS, why))
        return false;
    /* The lock ends with the connection, whatever happens to us. Another migration may take its time. */
    if (!pg_script(pg, "set lock_timeout = 0; select pg_advisory_lock(x'6b696c6e'::bigint)", why) ||
        !read_version(pg, &from, why))
        goto done;
    version = from;
    if (version > migrate_version()) {
        migrate_check(version, why);
        goto done;
    }
    for (const struct sql_text *file = sql_text_migrations; file->name; file++)
        if (number_of(file) > version) {
            if (!apply(pg, file, why))
                goto done;
            version = number_of(file);
        }
    ok = true;
    *ret_from = from;
    *ret_to = version;
done:
    pg_close(pg);
    return ok;
}
