/* test_command.c - the command line is understood whole or refused with a sentence.
 * If this breaks, a mistyped option is taken for another or ignored, and a night is rendered with the wrong settings. */
#include "command.h"

#include "task_store.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "captured.h"

static char out[1 << 14], err[1 << 14]; /* of the last parse */

/* The options of a command, as submit has them. */
struct given {
    bool json;
    const char *size;
    int64_t seeds;
    struct command_list images;
    const char *words[3];
    int word_count;
    struct command_call call;
};

static bool parse(struct given *g, int words_min, int words_max, const char *const *argv)
{
    static const struct command command = {"try", "FILE [--json]", "tries the parser", "  --json  machine-readable\n", NULL};
    const struct command_option options[] = {
        {"json", COMMAND_FLAG, &g->json, 0, 0},
        {"size", COMMAND_TEXT, &g->size, 0, 0},
        {"seeds", COMMAND_NUMBER, &g->seeds, 1, 10000},
        {"image", COMMAND_LIST, &g->images, 0, 0},
    };
    int argc = 0;
    while (argv[argc])
        argc++;
    *g = (struct given){.seeds = 1};
    g->call = (struct command_call){.command = &command, .argc = argc, .argv = (char **)argv};
    fflush(stdout);
    int saved_out = captured_begin(STDOUT_FILENO), saved_err = captured_begin(STDERR_FILENO);
    bool ok = command_parse(&g->call, options, 4, g->words, words_min, words_max, &g->word_count);
    fflush(stdout);
    fflush(stderr);
    captured_end(STDOUT_FILENO, saved_out, out, sizeof out);
    captured_end(STDERR_FILENO, saved_err, err, sizeof err);
    return ok;
}

#define PARSE(g, least, most, ...) parse(g, least, most, (const char *const[]){__VA_ARGS__, NULL})

static void both_spellings_of_a_value_are_understood(void **state)
{
    (void)state;
    struct given g;
    assert_true(PARSE(&g, 1, 1, "--size", "64x64", "a.txt", "--seeds=3", "--json", "--image", "x", "--image=y", "--home", "/tmp/h"));
    assert_string_equal(g.size, "64x64");
    assert_int_equal(g.seeds, 3);
    assert_true(g.json);
    assert_int_equal(g.images.count, 2);
    assert_string_equal(g.images.items[1], "y");
    assert_string_equal(g.words[0], "a.txt");
    assert_string_equal(g.call.home.dir, "/tmp/h");
    assert_string_equal(err, "");
}

static void dash_is_a_word_and_two_dashes_end_the_options(void **state)
{
    (void)state;
    struct given g;
    assert_true(PARSE(&g, 1, 1, "-"));
    assert_string_equal(g.words[0], "-");
    assert_true(PARSE(&g, 1, 2, "--json", "--", "--size", "-x"));
    assert_int_equal(g.word_count, 2);
    assert_string_equal(g.words[0], "--size");
    assert_null(g.size);
    assert_true(PARSE(&g, 0, 0, "--size=--json")); /* with '=' everything is a value */
    assert_string_equal(g.size, "--json");
    assert_false(g.json);
    assert_true(PARSE(&g, 0, 0, "--size="));
    assert_string_equal(g.size, "");
}

static void what_is_not_understood_is_refused_with_a_sentence(void **state)
{
    (void)state;
    static const struct {
        const char *argv[5], *word;
    } bad[] = {
        {{"--sizes", "1"}, "did you mean --size?"},
        {{"--seed=3"}, "did you mean --seeds?"},
        {{"--homw", "x"}, "did you mean --home?"},
        {{"--frobnicate"}, "see kiln try --help"},
        {{"--"}, "a word is missing"},
        {{"-j"}, "unknown option '-j'"},
        {{"--size"}, "--size needs a value"},
        {{"--size", "--json"}, "write --size=--json"},
        {{"--size", "1", "--size", "2"}, "given twice"},
        {{"--seeds", "1", "--seeds=1"}, "given twice"},
        {{"--json=yes"}, "takes no value, found 'yes'"},
        {{"--seeds", "0"}, "from 1 to 10000"},
        {{"--seeds", "10001"}, "'10001'"},
        {{"--seeds", ""}, "''"},
        {{"--seeds", "3x"}, "'3x'"},
        {{"--seeds", " 3"}, "' 3'"},
        {{"--seeds", "+3"}, "'+3'"},
        {{"--seeds", "-3"}, "'-3'"},
        {{"--seeds", "99999999999999999999"}, "whole number"},
        {{"a", "b"}, "'b' is one word too many"},
        {{"a", "--home="}, "--home is empty"},
        {{"a", "new\nline \x1b[31m"}, "'new?line ?[31m' is one word too many"}, /* one line, and no orders for the terminal */
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct given g;
        assert_false(parse(&g, 1, 1, bad[i].argv));
        assert_int_equal(command_code(&g.call), COMMAND_REFUSED);
        assert_string_equal(out, "");
        if (strncmp(err, "kiln try: ", 10) != 0 || !strstr(err, bad[i].word))
            fail_msg("'%s' does not say %s", err, bad[i].word);
        if (strchr(err, '\n') != err + strlen(err) - 1)
            fail_msg("not one line: %s", err);
    }
}

static void a_list_has_an_end(void **state)
{
    (void)state;
    const char *argv[2 * COMMAND_LIST_MAX + 3] = {0};
    struct given g;
    for (int i = 0; i < 2 * COMMAND_LIST_MAX; i += 2) {
        argv[i] = "--image";
        argv[i + 1] = "x";
    }
    assert_true(parse(&g, 0, 0, argv));
    argv[2 * COMMAND_LIST_MAX] = "--image=last";
    assert_false(parse(&g, 0, 0, argv));
    assert_non_null(strstr(err, "'last'"));
    assert_non_null(strstr(err, "64 times"));
}

/* Help is no error, wherever it stands, and what stands with it does not matter. */
static void help_is_printed_and_is_no_error(void **state)
{
    (void)state;
    struct given g;
    assert_false(PARSE(&g, 1, 1, "--help"));
    assert_true(g.call.is_help);
    assert_int_equal(command_code(&g.call), COMMAND_DONE);
    assert_non_null(strstr(out, "usage: kiln try FILE [--json]"));
    assert_non_null(strstr(out, "--database URI"));
    assert_string_equal(err, "");
    assert_false(PARSE(&g, 2, 2, "x", "-h", "--nonsense"));
    assert_int_equal(command_code(&g.call), COMMAND_DONE);
}

static void nearest_word_is_near(void **state)
{
    (void)state;
    static const char *const words[] = {"status", "submit", "images", "failures", "pause", "resume", "up", "down", "workers"};
    static const struct {
        const char *word, *near;
    } cases[] = {{"stauts", "status"}, {"sumbit", "submit"}, {"image", "images"}, {"fail", "failures"}, {"resum", "resume"},
                 {"pasue", "pause"}, {"wokers", "workers"}, {"dwon", "down"}, {"u", NULL}, {"x", NULL}, {"render", NULL}, {"", NULL},
                 {"zzzzzz", NULL}};
    char longest[4096];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *near = command_nearest(cases[i].word, words, 9);
        if (cases[i].near ? !near || strcmp(near, cases[i].near) != 0 : near != NULL)
            fail_msg("'%s' is near '%s', expected '%s'", cases[i].word, near ? near : "nothing", cases[i].near ? cases[i].near : "nothing");
    }
    memset(longest, 'a', sizeof longest);
    longest[sizeof longest - 1] = 0;
    assert_null(command_nearest(longest, words, 9));
}

/* A database that does not answer: whose it is decides the sentence. */
static void home_that_is_not_up_says_how_to_start_it(void **state)
{
    (void)state;
    struct given g;
    struct task_store *store = NULL;
    assert_true(PARSE(&g, 0, 0, "--home", "/tmp/kiln-test-nowhere"));
    int saved = captured_begin(STDERR_FILENO);
    int code = command_store(&g.call, &store);
    fflush(stderr);
    captured_end(STDERR_FILENO, saved, err, sizeof err);
    assert_int_equal(code, COMMAND_AWAY);
    assert_string_equal(err, "kiln try: kiln is not running on /tmp/kiln-test-nowhere: start it with `kiln up`\n");

    assert_true(PARSE(&g, 0, 0, "--home", "/tmp/kiln-test-nowhere", "--database", "postgresql:///x?host=/nowhere"));
    saved = captured_begin(STDERR_FILENO);
    code = command_store(&g.call, &store);
    fflush(stderr);
    captured_end(STDERR_FILENO, saved, err, sizeof err);
    assert_int_equal(code, COMMAND_AWAY);
    assert_non_null(strstr(err, "/nowhere"));
    assert_null(strstr(err, "kiln up"));
}

static int clear_environment(void **state)
{
    (void)state;
    static const char *const names[] = {"PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGSERVICE", "KILN_HOME"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        unsetenv(names[i]);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(both_spellings_of_a_value_are_understood),
        cmocka_unit_test(dash_is_a_word_and_two_dashes_end_the_options),
        cmocka_unit_test(what_is_not_understood_is_refused_with_a_sentence),
        cmocka_unit_test(a_list_has_an_end),
        cmocka_unit_test(help_is_printed_and_is_no_error),
        cmocka_unit_test(nearest_word_is_near),
        cmocka_unit_test(home_that_is_not_up_says_how_to_start_it),
    };
    return cmocka_run_group_tests(tests, clear_environment, NULL);
}
