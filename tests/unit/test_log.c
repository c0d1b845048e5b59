/* Tests of ops/daemon/log.c. Whoever reads the log at night, or greps it, trusts that one line is one event and that what
 * stands in quotes is what somebody said: a prompt with a line end must not be able to forge an event. */
#include "log.h"

#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static char dir[] = "/tmp/kiln-test-log-XXXXXX";
static char path[128], errors_path[128];
static int errors_kept = -1;

/* stderr goes to a file while a test logs, so that both places can be read. */
static void begin(enum log_level least)
{
    char why[256];
    unlink(path);
    unlink(errors_path);
    assert_true(log_open("tester", path, least, why, sizeof why));
    int file = open(errors_path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    assert_true(file >= 0);
    errors_kept = dup(STDERR_FILENO);
    dup2(file, STDERR_FILENO);
    close(file);
}

static char *slurp(const char *name)
{
    FILE *f = fopen(name, "r");
    assert_non_null(f);
    char *text = calloc(1, 1 << 20);
    assert_non_null(text);
    assert_true(fread(text, 1, (1 << 20) - 1, f) < (1 << 20) - 1);
    fclose(f);
    return text;
}

/* end returns what the file holds; stderr must hold as much (threads may reach the two places in different order). */
static char *end(void)
{
    log_close();
    dup2(errors_kept, STDERR_FILENO);
    close(errors_kept);
    char *text = slurp(path), *errors = slurp(errors_path);
    assert_int_equal(strlen(text), strlen(errors));
    free(errors);
    return text;
}

static int lines_of(const char *text)
{
    int count = 0;
    for (; *text; text++)
        count += *text == '\n';
    return count;
}

static void an_event_is_time_level_program_name_and_values(void **state)
{
    (void)state;
    begin(LOG_INFO);
    log_event(LOG_INFO, "lease_expired", "task=%d worker=%s", 17, log_quote("w1"));
    log_event(LOG_WARN, "bare", " ");
    char *text = end();
    int year, month, day, hour, minute, second, ms, used = 0;
    assert_int_equal(sscanf(text, "%4d-%2d-%2dT%2d:%2d:%2d.%3dZ%n", &year, &month, &day, &hour, &minute, &second, &ms, &used), 7);
    assert_int_equal(used, 24);
    assert_true(year > 2020);
    assert_memory_equal(text + used, " info tester lease_expired task=17 worker=w1\n", 44);
    assert_non_null(strstr(text, " warn tester bare\n"));
    free(text);
}

static void levels_below_the_least_are_silent(void **state)
{
    (void)state;
    begin(LOG_WARN);
    log_event(LOG_DEBUG, "a", "x=1");
    log_event(LOG_INFO, "b", "x=1");
    log_event(LOG_WARN, "c", "x=1");
    log_event(LOG_ERROR, "d", "x=1");
    char *text = end();
    assert_int_equal(lines_of(text), 2);
    assert_non_null(strstr(text, " warn tester c x=1\n"));
    assert_non_null(strstr(text, " error tester d x=1\n"));
    free(text);
}

static void level_names_are_those_of_the_options(void **state)
{
    (void)state;
    enum log_level level;
    assert_true(log_level_of("debug", &level) && level == LOG_DEBUG);
    assert_true(log_level_of("error", &level) && level == LOG_ERROR);
    assert_false(log_level_of("WARN", &level));
    assert_false(log_level_of("", &level));
}

static void values_that_could_be_misread_become_json_strings(void **state)
{
    (void)state;
    static const struct { const char *from, *to; } rows[] = {
        {"plain-1.0/x:y", "plain-1.0/x:y"},
        {NULL, "-"},
        {"", "\"\""},
        {"two words", "\"two words\""},
        {"a=b", "\"a=b\""},
        {"say \"hi\" \\", "\"say \\\"hi\\\" \\\\\""},
        {"line\nend\tand\x01\x7f", "\"line\\nend\\u0009and\\u0001\\u007f\""},
        {"\xc3\xa4\xf0\x9f\xa6\x8a", "\xc3\xa4\xf0\x9f\xa6\x8a"},
        {"bad \xff\xfe", "\"bad \\ufffd\\ufffd\""},
        {"\xff", "\"\\ufffd\""},
        {"\xc0\xaf", "\"\\ufffd\\ufffd\""},         /* overlong */
        {"\xed\xa0\x80", "\"\\ufffd\\ufffd\\ufffd\""}, /* a surrogate */
        {"\xe2\x82", "\"\\ufffd\\ufffd\""},         /* ends in the middle */
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        assert_string_equal(log_quote(rows[i].from), rows[i].to);
}

/* A line may quote many values: none may be the buffer of another. */
static void sixteen_quoted_values_live_side_by_side(void **state)
{
    (void)state;
    const char *all[16];
    char text[16];
    for (int i = 0; i < 16; i++) {
        snprintf(text, sizeof text, "value %d", i);
        all[i] = log_quote(text);
    }
    for (int i = 0; i < 16; i++) {
        snprintf(text, sizeof text, "\"value %d\"", i);
        assert_string_equal(all[i], text);
    }
}

static void a_long_value_says_that_it_was_cut_and_never_ends_in_half_a_character(void **state)
{
    (void)state;
    char text[4001];
    for (int shift = 0; shift < 4; shift++) {
        memset(text, 'x', sizeof text);
        for (int i = shift; i + 4 < 4000; i += 4)
            memcpy(text + i, "\xf0\x9f\xa6\x8a", 4);
        text[4000] = 0;
        const char *quoted = log_quote(text);
        size_t n = strlen(quoted);
        assert_true(n <= 1100);
        assert_string_equal(quoted + n - 4, "...\"");
        assert_memory_equal(quoted + n - 8, "\xf0\x9f\xa6\x8a", 4);
    }
}

static void an_unquoted_line_end_forges_no_event(void **state)
{
    (void)state;
    begin(LOG_INFO);
    log_event(LOG_INFO, "prompt", "text=%s", "fox\n2026-01-01T00:00:00.000Z error tester disk_lost\x1b[2J");
    char *text = end();
    assert_int_equal(lines_of(text), 1);
    assert_null(strchr(text, '\x1b'));
    free(text);
}

static void a_line_that_is_too_long_is_one_line_and_says_so(void **state)
{
    (void)state;
    char *huge = malloc(100001);
    assert_non_null(huge);
    for (int shift = 0; shift < 2; shift++) {
        memset(huge, 'x', 100000);
        for (int i = shift; i + 2 < 100000; i += 2)
            memcpy(huge + i, "\xc3\xa4", 2);
        huge[100000] = 0;
        begin(LOG_INFO);
        log_event(LOG_INFO, "huge", "text=%s", huge);
        log_event(LOG_INFO, "next", "x=1");
        char *text = end();
        assert_int_equal(lines_of(text), 2);
        char *line_end = strchr(text, '\n');
        assert_true(line_end - text <= 8200 && line_end - text > 8000);
        assert_memory_equal(line_end - 5, "\xc3\xa4...", 5);
        assert_non_null(strstr(text, " info tester next x=1\n"));
        free(text);
    }
    free(huge);
}

enum { THREADS = 4, EACH = 300 };

static void *chatter(void *context)
{
    char filler[600];
    int id = *(int *)context;
    memset(filler, 'a' + id, sizeof filler - 1);
    filler[sizeof filler - 1] = 0;
    for (int i = 0; i < EACH; i++)
        log_event(LOG_INFO, "chat", "id=%d i=%d filler=%s end=%s", id, i, filler, log_quote("over and out"));
    return NULL;
}

static void lines_of_threads_do_not_mix(void **state)
{
    (void)state;
    pthread_t threads[THREADS];
    int ids[THREADS], seen[THREADS] = {0};
    begin(LOG_INFO);
    for (int i = 0; i < THREADS; i++) {
        ids[i] = i;
        assert_int_equal(pthread_create(&threads[i], NULL, chatter, &ids[i]), 0);
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    char *text = end(), *rest = NULL;
    for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        int id, i;
        char *values = strstr(line, " chat ");
        assert_non_null(values);
        assert_int_equal(sscanf(values, " chat id=%d i=%d", &id, &i), 2);
        assert_int_equal(i, seen[id]++);
        char *filler = strstr(values, "filler=") + 7;
        assert_int_equal(strspn(filler, (char[]){(char)('a' + id), 0}), 599);
        assert_string_equal(filler + 599, " end=\"over and out\"");
    }
    for (int i = 0; i < THREADS; i++)
        assert_int_equal(seen[i], EACH);
    free(text);
}

static void a_log_that_cannot_be_opened_is_a_sentence(void **state)
{
    (void)state;
    char why[256] = "";
    assert_false(log_open("tester", "/nonexistent/x.log", LOG_INFO, why, sizeof why));
    assert_string_equal(why, "log file /nonexistent/x.log: No such file or directory");
}

/* A full disk under the log must not stop the work. */
static void a_log_that_cannot_be_written_stops_nothing(void **state)
{
    (void)state;
    char why[256];
    assert_true(log_open("tester", "/dev/full", LOG_INFO, why, sizeof why));
    int kept = dup(STDERR_FILENO), full = open("/dev/full", O_WRONLY);
    dup2(full, STDERR_FILENO);
    log_event(LOG_INFO, "into_the_void", "x=1");
    dup2(kept, STDERR_FILENO);
    close(kept);
    close(full);
    log_close();
}

static int make_dir(void **state)
{
    (void)state;
    if (!mkdtemp(dir))
        return -1;
    snprintf(path, sizeof path, "%s/log", dir);
    snprintf(errors_path, sizeof errors_path, "%s/stderr", dir);
    return 0;
}

static int remove_dir(void **state)
{
    (void)state;
    unlink(path);
    unlink(errors_path);
    return rmdir(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_event_is_time_level_program_name_and_values),
        cmocka_unit_test(levels_below_the_least_are_silent),
        cmocka_unit_test(level_names_are_those_of_the_options),
        cmocka_unit_test(values_that_could_be_misread_become_json_strings),
        cmocka_unit_test(sixteen_quoted_values_live_side_by_side),
        cmocka_unit_test(a_long_value_says_that_it_was_cut_and_never_ends_in_half_a_character),
        cmocka_unit_test(an_unquoted_line_end_forges_no_event),
        cmocka_unit_test(a_line_that_is_too_long_is_one_line_and_says_so),
        cmocka_unit_test(lines_of_threads_do_not_mix),
        cmocka_unit_test(a_log_that_cannot_be_opened_is_a_sentence),
        cmocka_unit_test(a_log_that_cannot_be_written_stops_nothing),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
