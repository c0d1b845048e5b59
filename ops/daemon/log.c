/* log.c - one event, one line, one write(2): lines of several threads and processes do not mix.
 *
 * What a caller forgot to quote may hold line ends and worse; it cannot forge a second event, because control characters
 * become blanks here. A line that is too long says so by ending in "...". */
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

/* utf8_length: bytes of the character at c, 0 when it is none. */
static size_t utf8_length(const unsigned char *c)
{
    static const unsigned least[] = {0, 0, 0x80, 0x800, 0x10000};
    size_t length = *c < 0x80 ? 1 : *c >= 0xf0 && *c < 0xf8 ? 4 : *c >= 0xe0 && *c < 0xf0 ? 3 : *c >= 0xc0 && *c < 0xe0 ? 2 : 0;
    unsigned code = length > 1 ? *c & (0x7f >> length) : *c;
    for (size_t i = 1; i < length; i++) {
        if ((c[i] & 0xc0) != 0x80)
            return 0;
        code = code << 6 | (c[i] & 0x3f);
    }
    bool is_ok = length && code >= least[length] && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff);
    return is_ok ? length : 0;
}

/* cut_end: where text of n bytes can end without half a character. */
static size_t cut_end(const char *text, size_t n)
{
    size_t back = 0;
    while (back < 3 && back < n && ((unsigned char)text[n - back - 1] & 0xc0) == 0x80)
        back++;
    if (back < n && utf8_length((const unsigned char *)text + n - back - 1) == back + 1)
        return n;
    return back < n && (unsigned char)text[n - back - 1] >= 0xc0 ? n - back - 1 : n;
}

void log_event(enum log_level level, const char *event, const char *format, ...)
{
    if (level < state.least)
        return;
    char line[LINE_MAX_BYTES + 8]; /* room for "..." and the line end */
    size_t n = stamp(line, LINE_MAX_BYTES);
    n += (size_t)snprintf(line + n, LINE_MAX_BYTES - n, " %s %s %.64s ", level_names[level], state.program, event);
    va_list args;
    va_start(args, format);
    int wanted = vsnprintf(line + n, LINE_MAX_BYTES - n, format, args);
    va_end(args);
    size_t room = LINE_MAX_BYTES - n - 1;
    bool is_cut = wanted > 0 && (size_t)wanted > room;
    n += wanted < 0 ? 0 : is_cut ? room : (size_t)wanted;
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)line[i] < ' ' || line[i] == 127)
            line[i] = ' ';
    while (n && line[n - 1] == ' ')
        n--;
    if (is_cut) {
        n = cut_end(line, n);
        n += (size_t)snprintf(line + n, sizeof line - n, "...");
    }
    line[n++] = '\n';
    write_all(STDERR_FILENO, line, n);
    if (state.file >= 0)
        write_all(state.file, line, n);
}

static bool is_plain(const char *text)
{
    const unsigned char *c = (const unsigned char *)text;
    for (size_t length; *c; c += length) {
        length = utf8_length(c);
        if (length == 0 || *c <= ' ' || *c == '"' || *c == '\\' || *c == '=' || *c == 127)
            return false;
    }
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
    size_t length;
    for (const unsigned char *c = (const unsigned char *)text; *c; c += length ? length : 1) {
        length = utf8_length(c);
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
        else if (length == 0)
            n += (size_t)snprintf(to + n, QUOTE_BYTES - n, "\\ufffd"); /* a path may hold any byte, a JSON string may not */
        else {
            memcpy(to + n, c, length);
            n += length;
        }
    }
    to[n++] = '"';
    to[n] = 0;
    return to;
}
