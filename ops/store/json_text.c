/* json_text.c - growing text, JSON strings, UTF-8.
 *
 * Prompts are looked at byte by byte here a hundred thousand times a second: plain ASCII goes eight bytes at a
 * time through the UTF-8 check, and in runs through the escaping. */
#include "json_text.h"

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void json_text_clear(struct json_text *t)
{
    t->length = 0;
    t->failed = false;
    if (t->data)
        t->data[0] = 0;
}

void json_text_done(struct json_text *t)
{
    free(t->data);
    *t = (struct json_text){0};
}

void json_text_add(struct json_text *t, const void *data, size_t bytes)
{
    if (t->failed)
        return;
    if (t->length + bytes + 1 > t->room) {
        size_t room = 2 * (t->length + bytes) + 256;
        char *grown = realloc(t->data, room);
        if (!grown) {
            t->failed = true;
            return;
        }
        t->data = grown;
        t->room = room;
    }
    if (bytes)
        memcpy(t->data + t->length, data, bytes);
    t->length += bytes;
    t->data[t->length] = 0;
}

void json_text_put(struct json_text *t, const char *s)
{
    json_text_add(t, s, strlen(s));
}

void json_text_format(struct json_text *t, const char *format, ...)
{
    char line[256];
    va_list args;
    va_start(args, format);
    int length = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    if (length < 0 || (size_t)length >= sizeof line)
        t->failed = true;
    else
        json_text_add(t, line, (size_t)length);
}

static void add_escape(struct json_text *t, unsigned char c)
{
    static const char named[] = "\bb\ff\nn\rr\tt\"\"\\\\";
    for (const char *p = named; *p; p += 2)
        if ((unsigned char)*p == c) {
            char pair[2] = {'\\', p[1]};
            json_text_add(t, pair, 2);
            return;
        }
    json_text_format(t, "\\u%04x", c);
}

void json_text_string(struct json_text *t, const char *s, size_t bytes)
{
    if (json_text_utf8_fault(s, bytes) != bytes) {
        t->failed = true;
        return;
    }
    json_text_add(t, "\"", 1);
    size_t from = 0;
    for (size_t i = 0; i < bytes; i++) {
        unsigned char c = (unsigned char)s[i];
        if (c >= 0x20 && c != '"' && c != '\\' && c != 0x7f)
            continue;
        json_text_add(t, s + from, i - from);
        add_escape(t, c);
        from = i + 1;
    }
    json_text_add(t, s + from, bytes - from);
    json_text_add(t, "\"", 1);
}

void json_text_text(struct json_text *t, const char *s)
{
    json_text_string(t, s ? s : "", s ? strlen(s) : 0);
}

void json_text_double(struct json_text *t, double value)
{
    char line[40] = "null";
    if (isfinite(value))
        for (int figures = 6; figures <= 17; figures++) {
            snprintf(line, sizeof line, "%.*g", figures, value);
            if (strtod(line, NULL) == value)
                break;
        }
    json_text_put(t, line);
}

/* Bytes of the sequence that begins at p, or 0. Table 3-7 of the Unicode standard. */
static size_t sequence(const unsigned char *p, size_t left)
{
    unsigned char low = 0x80, high = 0xbf;
    size_t length = p[0] < 0x80 ? 1 : p[0] >= 0xc2 && p[0] <= 0xdf ? 2 : (p[0] & 0xf0) == 0xe0 ? 3 : p[0] >= 0xf0 && p[0] <= 0xf4 ? 4 : 0;
    if (length == 0 || length > left)
        return 0;
    if (p[0] == 0xe0)
        low = 0xa0;
    else if (p[0] == 0xed)
        high = 0x9f;
    else if (p[0] == 0xf0)
        low = 0x90;
    else if (p[0] == 0xf4)
        high = 0x8f;
    for (size_t i = 1; i < length; i++, low = 0x80, high = 0xbf)
        if (p[i] < low || p[i] > high)
            return 0;
    return length;
}

size_t json_text_utf8_fault(const char *data, size_t bytes)
{
    size_t at = 0;
    while (at < bytes) {
        uint64_t eight;
        if (bytes - at >= 8 && (memcpy(&eight, data + at, 8), (eight & UINT64_C(0x8080808080808080)) == 0)) {
            at += 8;
            continue;
        }
        size_t length = sequence((const unsigned char *)data + at, bytes - at);
        if (!length)
            return at;
        at += length;
    }
    return at;
}
