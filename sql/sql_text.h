/* sql_text.h - the SQL files of this folder, built into the program. The data is made by embed.cmake. */
#ifndef KILN_SQL_TEXT_H
#define KILN_SQL_TEXT_H

struct sql_text { const char *name, *text; }; /* name: the file's, without folder and .sql */

extern const struct sql_text sql_text_queries[], sql_text_migrations[]; /* sorted by name; the last has name NULL */

/* sql_text_query returns the text of queries/NAME.sql. A name that is not there is a bug: it asserts. */
const char *sql_text_query(const char *name);

#endif
