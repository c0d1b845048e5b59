/* log.c - one event, one line, one write(2): lines of several threads and processes do not mix. */
#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define LINE_MAX_BYTES 8192
#define QUOTE_COUNT 16
#define QUOTE_BYTES 1100
#define QUOTE_TEXT_MAX 1024

static struct {
    char program[64];
    int file; /* -1: none */
    enum log_level least;
} state = {.program = "kiln", .file = -1, .least = LOG_INFO};

static const char *const level_names[] = {"debug", "info", "warn", "error"};

bool log_open(const char *program, const char *path, enum log_level least, char *why, unsigned long why_bytes)
{
    int file = -1;
    if (path) {
        file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
        if (file < 0) {
            snprintf(why, why_bytes, "log file %s: %s", path, strerror(errno));
            return false;
        }
    }
    log_close();
    snprintf(state.program, sizeof state.program, "%s", program);
    state.file = file;
    state.least = least;
    return true;
}

void log_close(void)
{
    if (state.file >= 0)
        close(state.file);
    state.file = -1;
}

bool log_level_of(const char *name, enum log_level *ret)
{
    for (int i = 0; i < 4; i++) {
        if (strcmp(name, level_names[i]) == 0) {
            *ret = (enum log_level)i;
            return true;
        }
    }
    return false;
}

static void write_all(int fd, const char *text, size_t bytes)
{
    while (bytes) {
        ssize_t n = write(fd, text, bytes);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return; /* a log that cannot be written must not stop the work */
        text += n;
        bytes -= (size_t)n;
    }
}

static size_t stamp(char *to, size_t bytes)
{
    struct timespec now;
    struct tm day;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &day);
    size_t n = strftime(to, bytes, "%Y-%m-%dT%H:%M:%S", &day);
    return n + (size_t)snprintf(to + n, bytes - n, ".%03dZ", (int)(now.tv_nsec / 1000000));
}

void log_event(enum log_level level, const char *event, const char *format, ...)
{
    if (level < state.least)
        return;
    char line[LINE_MAX_BYTES];
    size_t n = stamp(line, sizeof line);
    n += (size_t)snprintf(line + n, sizeof line - n, " %s %s %s ", level_names[level], state.program, event);
    va_list args;
    va_start(args, format);
    int wanted = vsnprintf(line + n, sizeof line - n - 1, format, args);
    va_end(args);
    size_t room = sizeof line - n - 2;
    n += wanted < 0 ? 0 : (size_t)wanted < room ? (size_t)wanted : room;
    while (n && line[n - 1] == ' ')
        n--;
    line[n++] = '\n';
    write_all(STDERR_FILENO, line, n);
    if (state.file >= 0)
        write_all(state.file, line, n);
}

static bool is_plain(const char *text)
{
    for (const unsigned char *c = (const unsigned char *)text; *c; c++)
        if (*c <= ' ' || *c == '"' || *c == '\\' || *c == '=' || *c == 127)
            return false;
    return *text && strlen(text) <= QUOTE_TEXT_MAX;
}

const char *log_quote(const char *text)
{
    static _Thread_local char buffers[QUOTE_COUNT][QUOTE_BYTES];
    static _Thread_local unsigned turn;
    if (!text)
        return "-";
    char *to = buffers[turn++ % QUOTE_COUNT];
    size_t n = 0;
    if (is_plain(text)) {
        memcpy(to, text, strlen(text) + 1);
        return to;
    }
    to[n++] = '"';
    for (const unsigned char *c = (const unsigned char *)text; *c; c++) {
        if (n > QUOTE_TEXT_MAX - 8) {
            n += (size_t)snprintf(to + n, QUOTE_BYTES - n, "...");
            break;
        }
        if (*c == '"' || *c == '\\')
            n += (size_t)snprintf(to + n, QUOTE_BYTES - n, "\\%c", *c);
        else if (*c == '\n')
            n += (size_t)snprintf(to + n, QUOTE_BYTES - n, "\\n");
        else if (*c < ' ' || *c == 127)
            n += (size_t)snprintf(to + n, QUOTE_BYTES - n, "\\u%04x", *c);
        else
            to[n++] = (char)*c;
    }
    to[n++] = '"';
    to[n] = 0;
    return to;
}
