/* sql_text.c - finds a query by its file's name. */
#include "sql_text.h"

#include <assert.h>
#include <stddef.h>
#include <string.h>

const char *sql_text_query(const char *name)
{
    for (const struct sql_text *t = sql_text_queries; t->name; t++)
        if (strcmp(t->name, name) == 0)
            return t->text;
    assert(!"no such query file");
    return "";
}
