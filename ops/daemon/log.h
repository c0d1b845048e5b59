/* log.h - events, one line each: time level program event key=value ...  Only programs log, never libraries.
 *
 *   log_event(LOG_INFO, "lease_expired", "task=%" PRIu64 " worker=%s", task, log_quote(worker));
 *   2026-11-24T02:30:00.123Z info coordinator lease_expired task=17 worker=w1
 * Values with spaces, quotes, control characters or bytes that are no UTF-8 are written as JSON strings by log_quote.
 * Lines are written with one write(2), to stderr and, if asked, to a file; at most 8 KiB, then "...". Control characters
 * that nobody quoted become blanks: an event is one line whatever it quotes. Thread-safe. */
#ifndef KILN_LOG_H
#define KILN_LOG_H

#include <stdbool.h>

enum log_level { LOG_DEBUG, LOG_INFO, LOG_WARN, LOG_ERROR };

bool log_open(const char *program, const char *path, enum log_level least, char *why, unsigned long why_bytes); /* path NULL: stderr only */
void log_close(void);
bool log_level_of(const char *name, enum log_level *ret); /* debug info warn error */
void log_event(enum log_level level, const char *event, const char *format, ...) __attribute__((format(printf, 3, 4)));
const char *log_quote(const char *text); /* one of 16 buffers of the thread in turn; at most 1 KiB, then "..." */

#endif
