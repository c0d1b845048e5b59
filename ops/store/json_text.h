/* json_text.h - text that grows: lines of JSON and records, written piece by piece.
 *
 * The first failure (no memory, a string that is not UTF-8) sticks, later calls do nothing, and the caller looks at
 * `failed` once. Clearing keeps the memory, so that a million lines cost a few allocations. */
#ifndef KILN_JSON_TEXT_H
#define KILN_JSON_TEXT_H

#include <stdbool.h>
#include <stddef.h>

struct json_text { /* start from {0}; data is NUL-terminated after the first piece */
    char *data;
    size_t length, room;
    bool failed;
};

void json_text_clear(struct json_text *t);
void json_text_done(struct json_text *t);
void json_text_add(struct json_text *t, const void *data, size_t bytes);
void json_text_put(struct json_text *t, const char *s);
void json_text_format(struct json_text *t, const char *format, ...) __attribute__((format(printf, 2, 3))); /* at most 255 bytes */
/* json_text_string writes a quoted JSON string; json_text_text the same of a C string, NULL as "". */
void json_text_string(struct json_text *t, const char *s, size_t bytes);
void json_text_text(struct json_text *t, const char *s);
void json_text_double(struct json_text *t, double value); /* shortest that reads back the same; null unless finite */

/* json_text_utf8_fault: offset of the first byte at which data stops being UTF-8 (overlong forms, surrogates and
 * codes above U+10FFFF are none), or `bytes`. */
size_t json_text_utf8_fault(const char *data, size_t bytes);

#endif
