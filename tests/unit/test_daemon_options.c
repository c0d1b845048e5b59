/* Tests of ops/daemon/daemon_options.c. A sentence that names the wrong word sends people to look at what is right. */
#include "daemon_options.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

enum { OPTION_SIZE = DAEMON_OPTIONS_OWN, OPTION_FAST };
static const struct option words[] = {
    {"size", required_argument, NULL, OPTION_SIZE},
    {"fast", no_argument, NULL, OPTION_FAST},
    DAEMON_OPTIONS_WORDS,
};

struct own { int size; bool is_fast; };

static bool read_own(void *context, int word, const char *text, char *why, size_t why_bytes)
{
    struct own *o = context;
    if (word == OPTION_SIZE)
        return daemon_options_number("--size", text, 1, 10, &o->size, why, why_bytes);
    o->is_fast = true;
    return true;
}

#define WORDS_MAX 8
struct line { const char *words[WORDS_MAX]; const char *sentence; };

static int count(const struct line *line, char **ret)
{
    int n = 0;
    ret[n++] = "program";
    for (int i = 0; i < WORDS_MAX && line->words[i]; i++)
        ret[n++] = (char *)(uintptr_t)line->words[i];
    ret[n] = NULL;
    return n;
}

static bool read_line(const struct line *line, struct daemon_options *ret, struct own *own, char why[256])
{
    char *argv[WORDS_MAX + 2];
    int argc = count(line, argv);
    *own = (struct own){0};
    return daemon_options_read(ret, words, read_own, own, argc, argv, why, 256);
}

static void a_daemon_reads_its_own_options_and_the_common_ones(void **state)
{
    (void)state;
    struct daemon_options o;
    struct own own;
    char why[256];
    assert_true(read_line(&(struct line){{NULL}, NULL}, &o, &own, why));
    assert_true(o.log_level == LOG_INFO && !o.log_path && o.metrics_port == -1 && !o.wants_help && !o.wants_version);
    assert_true(read_line(&(struct line){{"--log-level", "warn", "--size=7", "--log", "x.log", "--metrics-port", "0", "--fast"}, NULL}, &o, &own, why));
    assert_true(o.log_level == LOG_WARN && o.metrics_port == 0 && own.size == 7 && own.is_fast);
    assert_string_equal(o.log_path, "x.log");
    assert_true(read_line(&(struct line){{"--help", "--size", "nonsense"}, NULL}, &o, &own, why));
    assert_true(o.wants_help && !o.wants_version);
    assert_true(read_line(&(struct line){{"--version", "nonsense"}, NULL}, &o, &own, why));
    assert_true(o.wants_version);
}

static void a_wrong_word_is_named(void **state)
{
    (void)state;
    static const struct line lines[] = {
        {{"--frobnicate"}, "unknown option '--frobnicate'; see --help"},
        {{"--size", "3", "--frobnicate=7", "--fast"}, "unknown option '--frobnicate=7'; see --help"},
        {{"--size", "3", "-abc"}, "unknown option '-abc'; see --help"}, /* not '3', the word before it */
        {{"-abc", "--size", "3"}, "unknown option '-abc'; see --help"},
        {{"--fast", "-x"}, "unknown option '-x'; see --help"},
        {{"word", "-x"}, "unknown option '-x'; see --help"},
        {{"word", "-xyz", "--fast"}, "unknown option '-xyz'; see --help"},
        {{"--fast", "--size"}, "--size needs a value"},
        {{"--fast=yes"}, "unknown option '--fast=yes'; see --help"},
        {{"--size", "11"}, "--size '11': want a number from 1 to 10"},
        {{"--size", "7x"}, "--size '7x': want a number from 1 to 10"},
        {{"--size", ""}, "--size '': want a number from 1 to 10"},
        {{"--metrics-port", "65536"}, "--metrics-port '65536': want a number from 0 to 65535"},
        {{"--log-level", "loud"}, "--log-level 'loud': want debug, info, warn or error"},
        {{"--fast", "word"}, "unknown word 'word'; see --help"},
    };
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
        struct daemon_options o;
        struct own own;
        char why[256] = "";
        assert_false(read_line(&lines[i], &o, &own, why));
        assert_string_equal(why, lines[i].sentence);
    }
}

static void letters_that_are_options_are_read_also_in_a_cluster(void **state)
{
    (void)state;
    static const struct { struct line line; int first, second; } cases[] = {
        {{{"-h"}, NULL}, 'h', -1},
        {{{"-hx"}, "unknown option '-hx'; see --help"}, 'h', '?'},
        {{{"--fast", "-xh"}, "unknown option '-xh'; see --help"}, OPTION_FAST, '?'},
        {{{"word", "--fast"}, NULL}, OPTION_FAST, -1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *argv[WORDS_MAX + 2], why[256] = "";
        int argc = count(&cases[i].line, argv);
        optind = 0;
        assert_int_equal(daemon_options_next(argc, argv, "h", words, why, sizeof why), cases[i].first);
        assert_int_equal(daemon_options_next(argc, argv, "h", words, why, sizeof why), cases[i].second);
        if (cases[i].line.sentence)
            assert_string_equal(why, cases[i].line.sentence);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_daemon_reads_its_own_options_and_the_common_ones),
        cmocka_unit_test(a_wrong_word_is_named),
        cmocka_unit_test(letters_that_are_options_are_read_also_in_a_cluster),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
