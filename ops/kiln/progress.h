/* progress.h - one line that says how far something is: redrawn in place on a terminal, else a line now and then.
 *
 *   struct progress bar;
 *   progress_begin(&bar, stderr, "submit", "rows");
 *   while (...) {
 *       struct progress_now now = PROGRESS_UNKNOWN;
 *       now.done = rows; now.total = -1;            -- -1: how many there are is not known yet
 *       progress_update(&bar, &now);                -- cheap: draws at most 4 times a second
 *   }
 *   progress_end(&bar, &now);                       -- the last state stays on the screen
 *
 * A terminal gets at most its width; NO_COLOR and TERM=dumb are respected. */
#ifndef KILN_PROGRESS_H
#define KILN_PROGRESS_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

struct progress_now {
    int64_t done, total;     /* total -1: unknown */
    int64_t failed;          /* 0 is not shown */
    double per_second;       /* NaN: computed from done and the time since the begin */
    double left_s;           /* NaN: computed when total is known */
    int workers;             /* -1: not shown */
    const char *note;        /* "paused", "waiting for a worker"; NULL: none */
};
#define PROGRESS_UNKNOWN ((struct progress_now){.total = -1, .per_second = NAN, .left_s = NAN, .workers = -1})

struct progress {
    FILE *out;
    const char *label, *unit;   /* borrowed */
    bool is_terminal, has_color, is_drawn;
    int64_t began_ms, drawn_ms, first_done;
};

void progress_begin(struct progress *p, FILE *out, const char *label, const char *unit);
void progress_update(struct progress *p, const struct progress_now *now);
void progress_end(struct progress *p, const struct progress_now *now);
void progress_clear(struct progress *p); /* takes the drawn line away, so that something else can be printed */

/* progress_line composes the line: width columns at most (0: no limit, no bar). Returns its length in bytes. */
int progress_line(char *ret, size_t bytes, int width, bool has_color, const char *label, const char *unit,
                  const struct progress_now *now);
void progress_duration(char *ret, size_t bytes, double seconds); /* "4 s", "3:07", "2 h 05 min", "3 d 4 h", "?" */

#endif
