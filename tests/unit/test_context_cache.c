/* test_context_cache.c - remembered prompts. If this breaks, a picture is drawn from another prompt's text, or memory
 * grows with the number of prompts. */
#include "context_cache.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

static void ids_of(int32_t *ids, int number)
{
    memset(ids, 0, CONTEXT_CACHE_IDS * sizeof *ids);
    ids[3] = number;
}

static void add(struct context_cache *c, int number)
{
    int32_t ids[CONTEXT_CACHE_IDS];
    ids_of(ids, number);
    struct tensor t = context_cache_add(c, ids);
    assert_non_null(t.data);
    ((float *)t.data)[0] = (float)number;
}

static bool has(struct context_cache *c, int number)
{
    int32_t ids[CONTEXT_CACHE_IDS];
    struct tensor t;
    ids_of(ids, number);
    if (!context_cache_find(c, ids, &t))
        return false;
    assert_true(((float *)t.data)[0] == (float)number);
    return true;
}

static void what_was_added_is_found_and_nothing_else(void **state)
{
    (void)state;
    struct context_cache *c = context_cache_new(TENSOR_F32, 2, 3);
    assert_false(has(c, 1));
    add(c, 1);
    add(c, 2);
    assert_true(has(c, 1) && has(c, 2));
    assert_false(has(c, 3));
    assert_int_equal(context_cache_bytes(c), 2 * 2 * 3 * 4);
    context_cache_free(c);
    context_cache_free(NULL);
}

static void adding_twice_takes_no_second_place(void **state)
{
    (void)state;
    struct context_cache *c = context_cache_new(TENSOR_F32, 2, 3);
    add(c, 1);
    add(c, 1);
    assert_int_equal(context_cache_bytes(c), 2 * 3 * 4);
    context_cache_free(c);
}

static void the_one_used_longest_ago_makes_room(void **state)
{
    (void)state;
    struct context_cache *c = context_cache_new(TENSOR_F32, 2, 3);
    for (int i = 0; i < CONTEXT_CACHE_ENTRIES_MAX; i++)
        add(c, i);
    assert_true(has(c, 0)); /* used again: now 1 is the oldest */
    add(c, 1000);
    assert_true(has(c, 0) && has(c, 1000) && has(c, 2));
    assert_false(has(c, 1));
    assert_int_equal(context_cache_bytes(c), (size_t)CONTEXT_CACHE_ENTRIES_MAX * 2 * 3 * 4);
    context_cache_free(c);
}

static void large_values_are_bounded_by_bytes(void **state)
{
    (void)state;
    /* 96 MB each: two fit under 256 MB */
    struct context_cache *c = context_cache_new(TENSOR_F32, 512, 49152);
    for (int i = 0; i < 5; i++)
        add(c, i);
    assert_true(context_cache_bytes(c) <= CONTEXT_CACHE_BYTES_MAX);
    assert_true(has(c, 4) && has(c, 3));
    assert_false(has(c, 2));
    context_cache_free(c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_was_added_is_found_and_nothing_else),
        cmocka_unit_test(adding_twice_takes_no_second_place),
        cmocka_unit_test(the_one_used_longest_ago_makes_room),
        cmocka_unit_test(large_values_are_bounded_by_bytes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
