/* test_progress.c - a line that says how far something is.
 * If this breaks, the line wraps and fills the screen, or a log gets four lines a second. */
#include "progress.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static char line[1024];

static int width_of(const char *s)
{
    int width = 0;
    for (; *s; s++) {
        if (*s == '\033')
            s = strchr(s, 'm');
        else
            width += ((unsigned char)*s & 0xc0) != 0x80;
    }
    return width;
}

static void durations_are_short_and_exact_enough(void **state)
{
    (void)state;
    static const struct {
        double seconds;
        const char *text;
    } cases[] = {{0, "0 s"}, {4.2, "4 s"}, {59.4, "59 s"}, {59.6, "1:00"}, {187, "3:07"}, {3599, "59:59"}, {7500, "2 h 05 min"},
                 {86399, "23 h 59 min"}, {86400, "1 d 0 h"}, {273600, "3 d 4 h"}, {-1, "?"}, {1e12, "?"}};
    char text[32];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        progress_duration(text, sizeof text, cases[i].seconds);
        assert_string_equal(text, cases[i].text);
    }
    progress_duration(text, sizeof text, NAN);
    assert_string_equal(text, "?");
    progress_duration(text, sizeof text, INFINITY);
    assert_string_equal(text, "?");
}

static void line_says_what_is_known_and_nothing_else(void **state)
{
    (void)state;
    struct progress_now now = PROGRESS_UNKNOWN;
    now.done = 12;
    progress_line(line, sizeof line, 0, false, "submit", "rows", &now);
    assert_string_equal(line, "submit 12 rows");
    now = (struct progress_now){.done = 30, .total = 100, .per_second = 2, .left_s = 35, .workers = 1, .failed = 3, .note = "paused"};
    progress_line(line, sizeof line, 0, false, "spring", "images", &now);
    assert_string_equal(line, "spring 30/100  2.00 images/s  35 s left  1 worker  3 failed  paused");
    now.workers = 2;
    now.per_second = 0.01;
    now.failed = 0;
    now.note = NULL;
    progress_line(line, sizeof line, 0, false, "spring", "images", &now);
    assert_string_equal(line, "spring 30/100  36.0 images/h  35 s left  2 workers");
}

static void bar_is_drawn_when_there_is_room(void **state)
{
    (void)state;
    struct progress_now now = PROGRESS_UNKNOWN;
    now.done = 50;
    now.total = 100;
    progress_line(line, sizeof line, 31, false, "x", "images", &now);
    assert_string_equal(line, "x [##########..........] 50/100");
    now.done = 0;
    progress_line(line, sizeof line, 31, false, "x", "images", &now);
    assert_null(strchr(line, '#'));
    now.done = 99; /* not full before it is full */
    progress_line(line, sizeof line, 31, false, "x", "images", &now);
    assert_non_null(strchr(line, '.'));
    now.done = 100;
    progress_line(line, sizeof line, 31, false, "x", "images", &now);
    assert_null(strchr(line, '.'));
    now.total = now.done = 0;
    progress_line(line, sizeof line, 31, false, "x", "images", &now);
    assert_non_null(strstr(line, "0/0"));
}

/* Whatever the terminal's width, and however long the texts: never wider, never half a character, never left red. */
static void line_is_never_wider_than_the_terminal(void **state)
{
    (void)state;
    struct progress_now now = {.done = 123456789, .total = 987654321, .per_second = 1234.5, .left_s = 700000, .workers = 250,
                               .failed = 4242, .note = "f\xc3\xbcr immer und \xf0\x9f\xa6\x8a"};
    for (int color = 0; color < 2; color++)
        for (int width = 1; width < 200; width++) {
            int length = progress_line(line, sizeof line, width, color, "gr\xc3\xb6\xc3\x9f" "e", "images", &now);
            assert_int_equal(length, strlen(line));
            if (width_of(line) > width)
                fail_msg("%d columns in %d: %s", width_of(line), width, line);
            for (size_t i = 0; line[i]; i++) /* a character that began is whole */
                if (((unsigned char)line[i] & 0xe0) == 0xc0)
                    assert_true(((unsigned char)line[i + 1] & 0xc0) == 0x80);
            const char *last = strrchr(line, '\033');
            if (last)
                assert_true(strncmp(last, "\033[0m", 4) == 0);
        }
    char small[16]; /* a small buffer is as hard a limit */
    int length = progress_line(small, sizeof small, 0, true, "a label that is long", "images", &now);
    assert_true(length < (int)sizeof small);
    assert_int_equal(length, strlen(small));
}

static void file_gets_the_last_line_and_few_others(void **state)
{
    (void)state;
    char *text = NULL;
    size_t bytes = 0;
    FILE *f = tmpfile();
    struct progress p;
    struct progress_now now = PROGRESS_UNKNOWN;
    now.total = 10;
    progress_begin(&p, f, "spring", "images");
    assert_false(p.is_terminal);
    for (int i = 0; i <= 10; i++) {
        now.done = i;
        progress_update(&p, &now);
    }
    progress_end(&p, &now);
    progress_clear(&p); /* nothing is drawn: nothing to take away */
    rewind(f);
    assert_true(getline(&text, &bytes, f) > 0);
    assert_string_equal(text, "spring 10/10\n");
    assert_int_equal(getline(&text, &bytes, f), -1);
    free(text);
    fclose(f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(durations_are_short_and_exact_enough),
        cmocka_unit_test(line_says_what_is_known_and_nothing_else),
        cmocka_unit_test(bar_is_drawn_when_there_is_room),
        cmocka_unit_test(line_is_never_wider_than_the_terminal),
        cmocka_unit_test(file_gets_the_last_line_and_few_others),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
