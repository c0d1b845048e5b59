/* table.h - aligned columns on a terminal or in a pipe; text that is safe to show. */
#ifndef KILN_TABLE_H
#define KILN_TABLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

#define TABLE_COLUMNS_MAX 16

struct table { /* start with table_begin; rows are kept until table_print */
    char **cells;
    int count, room, columns;
    const char *kinds;     /* a letter a column: 'l' left, 'r' right */
};

/* table_begin: headings is "CAMPAIGN|STATE|DONE", kinds "llr". */
void table_begin(struct table *t, const char *headings, const char *kinds);
void table_cell(struct table *t, const char *format, ...) __attribute__((format(printf, 2, 3)));
void table_print(struct table *t, FILE *out); /* and frees */
void table_done(struct table *t);             /* frees only */

/* table_shown writes text on one line: control characters become blanks, longer than `columns` characters ends in "...". */
void table_shown(char *ret, size_t bytes, const char *text, int columns);

#endif
