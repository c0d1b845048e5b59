/* engine_error.c - the first cause is written once; callers put their context in front of it. */
#include "engine_error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static void end_with_dots(char *text, size_t bytes, int wanted)
{
    if (wanted >= (int)bytes)
        memcpy(text + bytes - 4, "...", 4);
}

bool engine_error_set(struct engine_error *why, enum engine_fault fault, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int wanted = vsnprintf(why->text, sizeof why->text, format, args);
    va_end(args);
    end_with_dots(why->text, sizeof why->text, wanted);
    why->fault = fault;
    return false;
}

bool engine_error_at(struct engine_error *why, const char *format, ...)
{
    char cause[sizeof why->text];
    memcpy(cause, why->text, sizeof cause);
    va_list args;
    va_start(args, format);
    int used = vsnprintf(why->text, sizeof why->text, format, args);
    va_end(args);
    if (used >= 0 && used < (int)sizeof why->text) {
        size_t left = sizeof why->text - (size_t)used;
        int wanted = snprintf(why->text + used, left, ": %s", cause);
        end_with_dots(why->text + used, left < 4 ? 4 : left, left < 4 ? 0 : wanted);
    }
    return false;
}

const char *engine_error_fault(enum engine_fault fault)
{
    static const char *const names[] = {"ok", "bad_request", "bad_model", "no_memory", "io", "device", "cancelled",
                                        "bad_result"};
    return names[fault];
}
