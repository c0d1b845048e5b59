/* Tests of worker/failure.c. A wrong kind here would retry for ever what can never work, give up what would have
 * worked elsewhere, or count an attempt nobody made. */
#include "failure.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void every_engine_fault_has_its_kind(void **state)
{
    (void)state;
    static const struct { enum engine_fault fault; enum msg_failure kind; bool is_last, is_of_one; } rows[] = {
        {ENGINE_BAD_REQUEST, MSG_FAILURE_REFUSE, false, true},  {ENGINE_BAD_MODEL, MSG_FAILURE_RETRY, false, false},
        {ENGINE_NO_MEMORY, MSG_FAILURE_OOM, false, false},      {ENGINE_IO, MSG_FAILURE_RETRY, false, false},
        {ENGINE_DEVICE, MSG_FAILURE_RETRY, true, false},        {ENGINE_CANCELLED, MSG_FAILURE_RELEASED, false, false},
        {ENGINE_BAD_RESULT, MSG_FAILURE_RETRY, false, true},    {ENGINE_NO_DEVICE, MSG_FAILURE_RETRY, true, false},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct engine_error why = {rows[i].fault, "what happened"};
        struct failure f = failure_of_engine(&why);
        assert_int_equal(f.kind, rows[i].kind);
        assert_int_equal(f.is_last, rows[i].is_last);
        assert_int_equal(failure_is_of_one(rows[i].fault), rows[i].is_of_one);
        assert_string_equal(f.reason, "what happened");
    }
}

/* What a reason holds must be sendable, or the task would hang until its lease ends. */
static void reasons_are_text_whatever_they_quote(void **state)
{
    (void)state;
    static const struct { const char *from, *to; } rows[] = {
        {"plain", "plain"},
        {"\xc3\xa4 \xe2\x82\xac \xf0\x9f\xa6\x8a", "\xc3\xa4 \xe2\x82\xac \xf0\x9f\xa6\x8a"},
        {"cut \xf0\x9f\xa6", "cut ???"},
        {"\xff\xfe", "??"},
        {"\xc0\xaf", "??"},
        {"\xe0\x80\x80", "???"},
        {"\xed\xa0\x80", "???"},
        {"\xf4\x90\x80\x80", "????"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct failure f = failure_retry("%s", rows[i].from);
        assert_string_equal(f.reason, rows[i].to);
        struct msg_failed_item item = {1, 2, f.kind, f.reason};
        struct msg m = {.kind = MSG_FAILED, .failed = {1, &item}};
        uint8_t head[2];
        void *body;
        size_t bytes;
        char why[256];
        assert_true(msg_encode(&m, head, &body, &bytes, why, sizeof why));
        free(body);
    }
}

/* Places stand in front and the cause at the end: a long path must not push out what is wrong with it. */
static void long_reasons_are_cut_in_the_middle_and_say_so(void **state)
{
    (void)state;
    char text[4000];
    memset(text, 'x', sizeof text);
    text[3999] = 0;
    struct failure f = failure_refuse("file '%s': has changed", text);
    assert_true(strlen(f.reason) <= MSG_REASON_MAX);
    assert_int_equal(strncmp(f.reason, "file 'xxx", 9), 0);
    assert_non_null(strstr(f.reason, "x...x"));
    assert_string_equal(f.reason + strlen(f.reason) - 15, "x': has changed");
    assert_int_equal(f.kind, MSG_FAILURE_REFUSE);
    assert_int_equal(failure_released("x").kind, MSG_FAILURE_RELEASED);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_engine_fault_has_its_kind),
        cmocka_unit_test(reasons_are_text_whatever_they_quote),
        cmocka_unit_test(long_reasons_are_cut_in_the_middle_and_say_so),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
