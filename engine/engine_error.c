/* engine_error.c - the first cause is written once; callers put their context in front of it. */
#include "engine_error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* A sentence that was cut ends in "...", and never inside a UTF-8 character: databases refuse such text. */
static void mark_cut(char *text, size_t bytes, int wanted)
{
    if (wanted >= 0 && (size_t)wanted < bytes)
        return;
    size_t end = bytes - 4;
    while (end && ((unsigned char)text[end] & 0xc0) == 0x80)
        end--;
    memcpy(text + end, "...", 4);
}

bool engine_error_set(struct engine_error *why, enum engine_fault fault, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int wanted = vsnprintf(why->text, sizeof why->text, format, args);
    va_end(args);
    mark_cut(why->text, sizeof why->text, wanted);
    why->fault = fault;
    return false;
}

bool engine_error_at(struct engine_error *why, const char *format, ...)
{
    char cause[sizeof why->text], context[sizeof why->text];
    memcpy(cause, why->text, sizeof cause);
    va_list args;
    va_start(args, format);
    int used = vsnprintf(context, sizeof context, format, args);
    va_end(args);
    mark_cut(context, sizeof context, used);
    int wanted = snprintf(why->text, sizeof why->text, "%s: %s", context, cause);
    mark_cut(why->text, sizeof why->text, wanted);
    return false;
}

const char *engine_error_fault(enum engine_fault fault)
{
    static const char *const names[] = {"ok", "bad_request", "bad_model", "no_memory", "io", "device", "no_device",
                                        "cancelled", "bad_result"};
    return names[fault];
}
