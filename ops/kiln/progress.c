/* progress.c - a line is composed by a function without side effects and drawn by another.
 *
 * On a terminal the line is drawn over the one before, and never wider than the window: a line that wraps would
 * leave a trail. Elsewhere (a log, a pipe) a line every ten seconds is enough, and the last one. */
#include "progress.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "clock.h"

#define DRAW_EVERY_MS 250
#define PRINT_EVERY_MS 10000
#define LINE_MAX_BYTES 1024
#define BAR_MIN 10
#define BAR_MAX 40
#define WIDTH_DEFAULT 80

/* --- composing --------------------------------------------------------------------------------------------- */

void progress_duration(char *ret, size_t bytes, double seconds)
{
    if (!(seconds >= 0) || seconds > 1e9) {
        snprintf(ret, bytes, "?");
        return;
    }
    int64_t s = (int64_t)(seconds + 0.5);
    if (s < 60)
        snprintf(ret, bytes, "%" PRId64 " s", s);
    else if (s < 3600)
        snprintf(ret, bytes, "%" PRId64 ":%02" PRId64, s / 60, s % 60);
    else if (s < 24 * 3600)
        snprintf(ret, bytes, "%" PRId64 " h %02" PRId64 " min", s / 3600, s / 60 % 60);
    else
        snprintf(ret, bytes, "%" PRId64 " d %" PRId64 " h", s / 86400, s / 3600 % 24);
}

/* A text that grows in a buffer of fixed size, with its width on the screen. */
struct line { char *text; size_t room, used; int width; };

static void put(struct line *l, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void put(struct line *l, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int n = vsnprintf(l->text + l->used, l->room - l->used, format, args);
    va_end(args);
    size_t end = n < 0 ? l->used : l->used + (size_t)n;
    if (end >= l->room)
        end = l->room - 1;
    for (; l->used < end; l->used++)
        l->width += ((unsigned char)l->text[l->used] & 0xc0) != 0x80;
}

static void put_color(struct line *l, bool has_color, const char *code)
{
    int width = l->width;
    if (has_color)
        put(l, "\033[%sm", code);
    l->width = width; /* escapes take no room on the screen */
}

static void put_rate(struct line *l, double per_second, const char *unit)
{
    if (!isfinite(per_second) || per_second <= 0)
        return;
    if (per_second >= 100)
        put(l, "  %.0f %s/s", per_second, unit);
    else if (per_second >= 0.1)
        put(l, "  %.2f %s/s", per_second, unit);
    else
        put(l, "  %.1f %s/h", per_second * 3600, unit); /* 0.01 images/s says little */
}

/* What comes behind the bar. */
static void put_figures(struct line *l, bool has_color, const char *unit, const struct progress_now *now)
{
    char left[32];
    if (now->total >= 0)
        put(l, " %" PRId64 "/%" PRId64, now->done, now->total);
    else
        put(l, " %" PRId64 " %s", now->done, unit);
    put_rate(l, now->per_second, unit);
    if (isfinite(now->left_s) && now->left_s >= 0) {
        progress_duration(left, sizeof left, now->left_s);
        put(l, "  %s left", left);
    }
    if (now->workers >= 0)
        put(l, "  %d worker%s", now->workers, now->workers == 1 ? "" : "s");
    if (now->failed > 0) {
        put_color(l, has_color, "31");
        put(l, "  %" PRId64 " failed", now->failed);
        put_color(l, has_color, "0");
    }
    if (now->note)
        put(l, "  %s", now->note);
}

static void put_bar(struct line *l, int cells, const struct progress_now *now)
{
    double share = now->total > 0 ? (double)now->done / (double)now->total : 1;
    int full = share >= 1 ? cells : share > 0 ? (int)(share * cells) : 0;
    put(l, " [");
    for (int i = 0; i < cells; i++)
        put(l, i < full ? "#" : ".");
    put(l, "]");
}

/* Cuts the line to width characters; an escape is kept whole and costs nothing. */
static void cut(struct line *l, int width)
{
    int shown = 0;
    size_t i = 0;
    while (i < l->used) {
        if (l->text[i] == '\033') {
            while (i < l->used && l->text[i] != 'm')
                i++;
            i += i < l->used;
            continue;
        }
        size_t next = i + 1;
        while (next < l->used && ((unsigned char)l->text[next] & 0xc0) == 0x80)
            next++;
        if (++shown > width)
            break;
        i = next;
    }
    l->used = i;
    l->text[i] = 0;
}

int progress_line(char *ret, size_t bytes, int width, bool has_color, const char *label, const char *unit,
                  const struct progress_now *now)
{
    char figures_text[LINE_MAX_BYTES];
    struct line l = {.text = ret, .room = bytes}, figures = {.text = figures_text, .room = sizeof figures_text};
    ret[0] = figures_text[0] = 0;
    put_figures(&figures, has_color, unit, now);
    put(&l, "%s", label);
    int room = width - l.width - figures.width - 3; /* " [" and "]" */
    if (width > 0 && now->total >= 0 && room >= BAR_MIN)
        put_bar(&l, room < BAR_MAX ? room : BAR_MAX, now);
    put(&l, "%s", figures_text);
    if (width > 0) {
        cut(&l, width);
        if (has_color && memchr(ret, '\033', l.used) && l.used + 5 < bytes) { /* a cut must not leave the screen red */
            memcpy(ret + l.used, "\033[0m", 5);
            l.used += 4;
        }
    }
    return (int)l.used;
}

/* --- drawing ----------------------------------------------------------------------------------------------- */

static int terminal_width(FILE *out)
{
    struct winsize size;
    if (ioctl(fileno(out), TIOCGWINSZ, &size) == 0 && size.ws_col > 1)
        return size.ws_col - 1; /* the last column makes some terminals wrap */
    return WIDTH_DEFAULT - 1;
}

void progress_begin(struct progress *p, FILE *out, const char *label, const char *unit)
{
    const char *term = getenv("TERM"), *no_color = getenv("NO_COLOR");
    bool is_dumb = !term || !*term || strcmp(term, "dumb") == 0;
    *p = (struct progress){.out = out, .label = label, .unit = unit, .first_done = -1};
    p->is_terminal = isatty(fileno(out)) && !is_dumb;
    p->has_color = p->is_terminal && !(no_color && *no_color);
    p->began_ms = clock_ms();
    p->drawn_ms = p->is_terminal ? p->began_ms - DRAW_EVERY_MS : p->began_ms;
}

/* What the caller does not know follows from what was done since the begin. */
static struct progress_now complete(struct progress *p, const struct progress_now *now)
{
    struct progress_now known = *now;
    if (p->first_done < 0)
        p->first_done = now->done;
    double passed_s = (double)(clock_ms() - p->began_ms) / 1000;
    if (isnan(known.per_second) && passed_s >= 1)
        known.per_second = (double)(now->done - p->first_done) / passed_s;
    if (isnan(known.left_s) && known.total > known.done && known.per_second > 0)
        known.left_s = (double)(known.total - known.done) / known.per_second;
    return known;
}

static void draw(struct progress *p, const struct progress_now *now)
{
    char text[LINE_MAX_BYTES];
    progress_line(text, sizeof text, p->is_terminal ? terminal_width(p->out) : 0, p->has_color, p->label, p->unit, now);
    if (p->is_terminal)
        fprintf(p->out, "\r%s\033[K", text);
    else
        fprintf(p->out, "%s\n", text);
    fflush(p->out);
    p->drawn_ms = clock_ms();
    p->is_drawn = p->is_terminal;
}

void progress_update(struct progress *p, const struct progress_now *now)
{
    struct progress_now known = complete(p, now);
    if (clock_ms() - p->drawn_ms >= (p->is_terminal ? DRAW_EVERY_MS : PRINT_EVERY_MS))
        draw(p, &known);
}

void progress_end(struct progress *p, const struct progress_now *now)
{
    struct progress_now known = complete(p, now);
    draw(p, &known);
    if (p->is_terminal)
        fputc('\n', p->out);
    fflush(p->out);
    p->is_drawn = false;
}

void progress_clear(struct progress *p)
{
    if (!p->is_drawn)
        return;
    fputs("\r\033[K", p->out);
    fflush(p->out);
    p->is_drawn = false;
    p->drawn_ms = clock_ms() - DRAW_EVERY_MS; /* the next update draws it again */
}
