/* failure.c - engine faults become failure kinds; texts become reasons that can be sent.
 *
 *   BAD_REQUEST  refuse    the same row fails everywhere and always
 *   BAD_MODEL    retry     this host's files are damaged or missing; another worker's may not be
 *   NO_MEMORY    oom       a smaller batch, or a bigger worker
 *   IO           retry
 *   DEVICE       retry     and this process ends: a lost device stays lost until it is opened again
 *   NO_DEVICE    retry     likewise; another worker may have one
 *   BAD_RESULT   retry     NaN once may be a flipped bit; always NaN uses up the attempts and is shown
 *   CANCELLED    released  somebody asked for it, nobody failed */
#include "failure.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "json_text.h"

void failure_make_sendable(char *text)
{
    size_t bytes = strlen(text);
    for (size_t at = 0; (at += json_text_utf8_fault(text + at, bytes - at)) < bytes; at++)
        text[at] = '?';
}

static struct failure make(enum msg_failure kind, const char *format, va_list list)
{
    struct failure f = {.kind = kind};
    const size_t part = sizeof f.reason / 2 - 4;
    char text[8192]; /* a path and sentences */
    vsnprintf(text, sizeof text, format, list);
    size_t length = strlen(text);
    if (length < sizeof f.reason)
        memcpy(f.reason, text, length + 1);
    else /* places stand in front, the cause at the end */
        snprintf(f.reason, sizeof f.reason, "%.*s...%s", (int)part, text, text + length - part);
    failure_make_sendable(f.reason);
    return f;
}

#define MAKE(kind_of) \
    va_list list; \
    va_start(list, format); \
    struct failure f = make(kind_of, format, list); \
    va_end(list); \
    return f

struct failure failure_refuse(const char *format, ...)
{
    MAKE(MSG_FAILURE_REFUSE);
}

struct failure failure_retry(const char *format, ...)
{
    MAKE(MSG_FAILURE_RETRY);
}

struct failure failure_released(const char *format, ...)
{
    MAKE(MSG_FAILURE_RELEASED);
}

static enum msg_failure kind_of(enum engine_fault fault)
{
    switch (fault) {
    case ENGINE_BAD_REQUEST: return MSG_FAILURE_REFUSE;
    case ENGINE_NO_MEMORY: return MSG_FAILURE_OOM;
    case ENGINE_CANCELLED: return MSG_FAILURE_RELEASED;
    case ENGINE_OK:
    case ENGINE_BAD_MODEL:
    case ENGINE_IO:
    case ENGINE_DEVICE:
    case ENGINE_NO_DEVICE:
    case ENGINE_BAD_RESULT: break;
    }
    return MSG_FAILURE_RETRY;
}

struct failure failure_of_engine(const struct engine_error *why)
{
    struct failure f = failure_retry("%s", why->text);
    f.kind = kind_of(why->fault);
    f.is_last = why->fault == ENGINE_DEVICE || why->fault == ENGINE_NO_DEVICE;
    return f;
}

bool failure_is_of_one(enum engine_fault fault)
{
    return fault == ENGINE_BAD_REQUEST || fault == ENGINE_BAD_RESULT;
}
