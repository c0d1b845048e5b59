/* table.c - widths count characters, not bytes; a cell that could not be kept is shown as '?'. */
#include "table.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

static int width_of(const char *s)
{
    int width = 0;
    for (; *s; s++)
        width += ((unsigned char)*s & 0xc0) != 0x80;
    return width;
}

static void add(struct table *t, char *cell)
{
    if (t->count == t->room) {
        int room = t->room ? 2 * t->room : 64;
        char **grown = realloc(t->cells, (size_t)room * sizeof *grown);
        if (!grown) {
            free(cell);
            return;
        }
        t->cells = grown;
        t->room = room;
    }
    t->cells[t->count++] = cell;
}

void table_begin(struct table *t, const char *headings, const char *kinds)
{
    *t = (struct table){.columns = (int)strlen(kinds), .kinds = kinds};
    while (*headings) {
        size_t length = strcspn(headings, "|");
        add(t, strndup(headings, length));
        headings += length + (headings[length] == '|');
    }
}

void table_cell(struct table *t, const char *format, ...)
{
    char *cell = NULL;
    va_list args;
    va_start(args, format);
    if (vasprintf(&cell, format, args) < 0)
        cell = NULL;
    va_end(args);
    add(t, cell);
}

void table_print(struct table *t, FILE *out)
{
    int widths[TABLE_COLUMNS_MAX] = {0};
    for (int i = 0; i < t->count; i++) {
        int width = t->cells[i] ? width_of(t->cells[i]) : 1, column = i % t->columns;
        if (width > widths[column])
            widths[column] = width;
    }
    for (int i = 0; i < t->count; i++) {
        const char *cell = t->cells[i] ? t->cells[i] : "?";
        int column = i % t->columns, pad = widths[column] - width_of(cell);
        bool is_last = column == t->columns - 1, is_left = t->kinds[column] == 'l';
        fprintf(out, "%*s%s%*s%s", is_left ? 0 : pad, "", cell, is_left && !is_last ? pad : 0, "", is_last ? "\n" : "  ");
    }
    table_done(t);
}

void table_done(struct table *t)
{
    for (int i = 0; i < t->count; i++)
        free(t->cells[i]);
    free(t->cells);
    *t = (struct table){0};
}

void table_shown(char *ret, size_t bytes, const char *text, int columns)
{
    size_t out = 0;
    int shown = 0;
    for (; *text && out + 8 < bytes; text++) {
        unsigned char c = (unsigned char)*text;
        if ((c & 0xc0) != 0x80 && ++shown > columns - 3 && width_of(text) > 3) {
            memcpy(ret + out, "...", 3);
            out += 3;
            break;
        }
        ret[out++] = c < 0x20 || c == 0x7f ? ' ' : (char)c;
    }
    ret[out] = 0;
}
