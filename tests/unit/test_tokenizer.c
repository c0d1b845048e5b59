/* test_tokenizer.c - what the golden tables do not show: damaged vocabularies, hostile text, limits. If this breaks, a bad
 * file or prompt takes a worker down or is encoded as something else. That ids equal the reference is test_golden's. */
#include "tokenizer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "byte_vocabulary.h"
#include "engine_model.h"

#define POCKET "tests/golden/models/pocket"

static struct tokenizer *pocket;

/* --- vocabularies ------------------------------------------------------------------------------------------ */

static const char specials[] = "{\"<|endoftext|>\":300,\"<|im_start|>\":301,\"<|im_end|>\":302}";

static bool parse(struct tokenizer **ret, const char *vocab, const char *merges, const char *added, struct engine_error *why)
{
    return tokenizer_parse(ret, (struct tokenizer_file){vocab, strlen(vocab)},
                           (struct tokenizer_file){merges, strlen(merges)},
                           (struct tokenizer_file){added, strlen(added)}, why);
}

static void a_small_vocabulary_merges_by_rank(void **state)
{
    (void)state;
    static char vocab[BYTE_VOCABULARY_MAX];
    struct tokenizer *t;
    struct engine_error why;
    int32_t *ids;
    size_t count;
    byte_vocabulary(vocab, "");
    if (!parse(&t, vocab, "#version: 0.2\r\na b\r\nab c\r\n", specials, &why))
        fail_msg("%s", why.text);
    assert_int_equal(tokenizer_vocab_size(t), 303);
    assert_int_equal(tokenizer_pad_id(t), 300);
    assert_true(tokenizer_encode(t, "abcab", 5, &ids, &count, &why));
    assert_int_equal(count, 2);
    assert_true(ids[0] == 257 && ids[1] == 256);
    free(ids);
    assert_true(tokenizer_encode(t, "a\0b", 3, &ids, &count, &why));
    assert_true(count == 3 && ids[0] == 'a' && ids[1] == 0 && ids[2] == 'b');
    free(ids);
    assert_true(tokenizer_encode_chat(t, "<|im_end|>", 10, &ids, &count, &why)); /* typed: the token itself */
    assert_int_equal(ids[0], 301);
    free(ids);
    tokenizer_close(t);
    tokenizer_close(NULL);
}

static void damaged_vocabularies_are_refused_with_a_sentence(void **state)
{
    (void)state;
    static char good[BYTE_VOCABULARY_MAX], huge[BYTE_VOCABULARY_MAX], text_id[BYTE_VOCABULARY_MAX], fraction[BYTE_VOCABULARY_MAX];
    static const char ok_merges[] = "a b\nab c\n";
    byte_vocabulary(good, "");
    byte_vocabulary(huge, ",\"zz\":4000001");
    byte_vocabulary(text_id, ",\"zz\":\"7\"");
    byte_vocabulary(fraction, ",\"zz\":1.5");
    static char long_merge[3000];
    memset(long_merge, 'a', sizeof long_merge - 1);
    long_merge[1000] = ' ';
    const struct { const char *vocab, *merges, *added, *says; } cases[] = {
        {"", ok_merges, specials, "vocab.json: not valid JSON"},
        {"[]", ok_merges, specials, "vocab.json: not a JSON object"},
        {"{}", ok_merges, specials, "vocab.json: no token for byte 0"},
        {"{\"a\":1,\"a\":2}", ok_merges, specials, "duplicate"},
        {huge, ok_merges, specials, "'zz' has no usable id, accepted: 0 to 4000000"},
        {text_id, ok_merges, specials, "'zz' has no usable id"},
        {fraction, ok_merges, specials, "'zz' has no usable id"},
        {good, "ab\n", specials, "merge 0 is not two tokens"},
        {good, "a b\na b c\n", specials, "merge 1 is not two tokens"},
        {good, " b\n", specials, "merge 0 is not two tokens"},
        {good, "a \n", specials, "merge 0 is not two tokens"},
        {good, "a c\n", specials, "merge 0 joins what is no token"},
        {good, "no b\n", specials, "merge 0 joins what is no token"},
        {good, "\xff \xfe\n", specials, "merge 0 joins what is no token"},
        {good, long_merge, specials, "merge 0 is not two tokens"},
        {good, "", specials, "0 merges, but vocab.json has 2 tokens that need one"},
        {good, "a b\n", specials, "1 merges, but"},
        {good, ok_merges, "", "added_tokens.json: not valid JSON"},
        {good, ok_merges, "{}", "'<|endoftext|>' is missing"},
        {good, ok_merges, "{\"<|endoftext|>\":300}", "'<|im_start|>' is missing"},
        {good, ok_merges, "{\"\":300}", "an empty token"},
        {good, ok_merges, "{\"x\":-1}", "'x' has no usable id"},
        {good, ok_merges, "{\"x\":[1]}", "'x' has no usable id"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct tokenizer *t;
        struct engine_error why = {0};
        if (parse(&t, cases[i].vocab, cases[i].merges, cases[i].added, &why))
            fail_msg("case %zu was accepted, '%s' expected", i, cases[i].says);
        if (why.fault != ENGINE_BAD_MODEL || !strstr(why.text, cases[i].says))
            fail_msg("'%s' does not say '%s'", why.text, cases[i].says);
    }
    struct tokenizer *t;
    struct engine_error why;
    assert_false(tokenizer_open(&t, "tests/unit", &why));
    assert_non_null(strstr(why.text, "tests/unit/vocab.json: No such file"));
}

static void special_tokens_are_bounded(void **state)
{
    (void)state;
    static char vocab[BYTE_VOCABULARY_MAX], added[20000];
    struct tokenizer *t;
    struct engine_error why;
    size_t used = (size_t)sprintf(added, "{\"x\":1");
    byte_vocabulary(vocab, "");
    for (int i = 0; i < 512; i++)
        used += (size_t)sprintf(added + used, ",\"<%d>\":%d", i, 300 + i);
    strcat(added, "}");
    assert_false(parse(&t, vocab, "", added, &why));
    assert_non_null(strstr(why.text, "more than 512"));
}

/* --- text ---------------------------------------------------------------------------------------------------- */

static void text_that_is_not_utf8_is_refused_with_its_place(void **state)
{
    (void)state;
    static const struct { const char *text; size_t bytes, at; } cases[] = {
        {"\xff", 1, 0},               {"ab\x80", 3, 2},         {"a\xc3", 2, 1},
        {"\xc0\xaf", 2, 0},           {"x\xed\xa0\x80", 4, 1},  {"\xf4\x90\x80\x80", 4, 0},
        {"abc\xe2\x82", 5, 3},        {"\xf0\x9f\x98", 3, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct engine_error why = {0};
        int32_t *ids;
        size_t count;
        char place[64];
        snprintf(place, sizeof place, "byte %zu of the text is not valid UTF-8", cases[i].at);
        assert_false(tokenizer_encode(pocket, cases[i].text, cases[i].bytes, &ids, &count, &why));
        assert_int_equal(why.fault, ENGINE_BAD_REQUEST);
        assert_string_equal(why.text, place);
        assert_false(tokenizer_encode_chat(pocket, cases[i].text, cases[i].bytes, &ids, &count, &why));
    }
}

static double encode_seconds(const char *text, size_t bytes)
{
    struct engine_error why;
    int32_t *ids;
    size_t count;
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    if (!tokenizer_encode(pocket, text, bytes, &ids, &count, &why))
        fail_msg("%s", why.text);
    clock_gettime(CLOCK_MONOTONIC, &b);
    assert_true(count > 0);
    free(ids);
    return (double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec);
}

/* The longest texts of the kinds that make naive tokenizers quadratic: a second each would already be a bug. */
static void the_longest_text_takes_no_time_whatever_it_is(void **state)
{
    (void)state;
    static const char *const units[] = {"a", " ", "\n", "!", "'", "\xcc\x81", "<|", "a\xcc\x81", " \n", "\xef\xb7\xba", "\t x"};
    static char text[TOKENIZER_PROMPT_BYTES_MAX + 1];
    for (size_t i = 0; i < sizeof units / sizeof units[0]; i++) {
        size_t each = strlen(units[i]), bytes = TOKENIZER_PROMPT_BYTES_MAX / each * each;
        for (size_t at = 0; at < bytes; at += each)
            memcpy(text + at, units[i], each);
        double seconds = encode_seconds(text, bytes);
        if (seconds > 5) /* sanitizers and busy machines are slow, quadratic is minutes */
            fail_msg("'%s' repeated took %.1f s", units[i], seconds);
    }
    struct engine_error why;
    int32_t *ids;
    size_t count;
    memset(text, 'a', sizeof text);
    assert_false(tokenizer_encode(pocket, text, sizeof text, &ids, &count, &why));
    assert_string_equal(why.text, "the text has 65537 bytes, accepted: at most 65536");
}

/* --- 512 -------------------------------------------------------------------------------------------------------- */

static size_t chat_count(const char *text)
{
    struct engine_error why;
    int32_t *ids;
    size_t count;
    assert_true(tokenizer_encode_chat(pocket, text, strlen(text), &ids, &count, &why));
    free(ids);
    return count;
}

static void five_hundred_and_twelve_tokens_are_the_limit(void **state)
{
    (void)state;
    struct engine_model m = {.tokenizer = pocket};
    struct engine_error why;
    int32_t ids[ENGINE_TOKENS_MAX], count;
    bool is_truncated;
    char text[1024] = "";
    size_t fixed = chat_count("");
    memset(text, '7', ENGINE_TOKENS_MAX - fixed); /* a digit is a token of its own */
    assert_int_equal(chat_count(text), ENGINE_TOKENS_MAX);
    assert_true(engine_model_ids(&m, text, false, ids, &count, &is_truncated, &why));
    assert_int_equal(count, ENGINE_TOKENS_MAX);
    assert_false(is_truncated);
    int32_t last = ids[ENGINE_TOKENS_MAX - 1];

    strcat(text, "7");
    assert_false(engine_model_ids(&m, text, false, ids, &count, &is_truncated, &why));
    assert_int_equal(why.fault, ENGINE_BAD_REQUEST);
    assert_non_null(strstr(why.text, "513 tokens with the chat template, accepted: up to 512"));
    assert_true(engine_model_ids(&m, text, true, ids, &count, &is_truncated, &why));
    assert_true(is_truncated);
    assert_int_equal(count, ENGINE_TOKENS_MAX);
    assert_true(ids[ENGINE_TOKENS_MAX - 1] != last); /* the end of the template is what is lost */

    assert_true(engine_model_ids(&m, "", true, ids, &count, &is_truncated, &why));
    assert_int_equal(count, fixed);
    assert_false(is_truncated);
    for (int i = count; i < ENGINE_TOKENS_MAX; i++)
        assert_int_equal(ids[i], tokenizer_pad_id(pocket));
}

static int open_pocket(void **state)
{
    (void)state;
    struct engine_error why;
    return tokenizer_open(&pocket, POCKET "/tokenizer", &why) ? 0 : 1;
}

static int close_pocket(void **state)
{
    (void)state;
    tokenizer_close(pocket);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_small_vocabulary_merges_by_rank),
        cmocka_unit_test(damaged_vocabularies_are_refused_with_a_sentence),
        cmocka_unit_test(special_tokens_are_bounded),
        cmocka_unit_test(text_that_is_not_utf8_is_refused_with_its_place),
        cmocka_unit_test(the_longest_text_takes_no_time_whatever_it_is),
        cmocka_unit_test(five_hundred_and_twelve_tokens_are_the_limit),
    };
    return cmocka_run_group_tests(tests, open_pocket, close_pocket);
}
