/* test_layer_stream.c - which layers wait in host memory. If this breaks, a model that is a little too large for its card is copied
 * to it in one piece while nothing computes, or a larger batch moves more than it needs. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "layer_stream.h"

static void as_many_wait_as_are_asked_for_and_more_only_adds(void **state)
{
    static const int counts[] = {1, 2, 25, 32};
    (void)state;
    for (int c = 0; c < 4; c++)
        for (int waiting = 0; waiting <= counts[c]; waiting++) {
            int found = 0;
            for (int i = 0; i < counts[c]; i++) {
                bool waits = layer_stream_waits(i, counts[c], waiting);
                found += waits;
                assert_true(!waits || layer_stream_waits(i, counts[c], waiting + 1));
            }
            assert_int_equal(found, waiting);
        }
}

/* Between two that wait there is time for the copy of one: no gap is larger than twice the mean. */
static void those_that_wait_are_spread_and_the_first_has_time_to_come(void **state)
{
    enum { COUNT = 32 };
    (void)state;
    for (int waiting = 1; waiting <= COUNT; waiting++) {
        int last = -1;
        for (int i = 0; i < COUNT; i++)
            if (layer_stream_waits(i, COUNT, waiting)) {
                assert_true(i - last <= 2 * COUNT / waiting);
                last = i;
            }
        assert_int_equal(last, COUNT - 1);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(as_many_wait_as_are_asked_for_and_more_only_adds),
        cmocka_unit_test(those_that_wait_are_spread_and_the_first_has_time_to_come),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
