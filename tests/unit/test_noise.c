/* test_noise.c - what noise depends on: the low half of the seed and the count, nothing else. If this breaks, a seed does
 * not give its picture again. That the bits are torch's is shown by the tables of test_golden. */
#include "noise.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

static void only_the_low_half_of_a_seed_counts_as_in_torch(void **state)
{
    (void)state;
    float a[128], b[128];
    static const uint64_t seeds[] = {0, 5, 42, UINT32_MAX};
    for (size_t i = 0; i < sizeof seeds / sizeof seeds[0]; i++) {
        noise_fill(a, 128, seeds[i]);
        noise_fill(b, 128, seeds[i] + (UINT64_C(0xabcdef01) << 32));
        assert_memory_equal(a, b, sizeof a);
        noise_fill(b, 128, seeds[i] + 1);
        assert_memory_not_equal(a, b, sizeof a);
    }
}

/* Blocks of 16 are drawn one after the other, so a longer draw continues a shorter one: what one generator for two
 * images relies on. */
static void a_longer_draw_begins_like_a_shorter_one(void **state)
{
    (void)state;
    float a[64], b[160];
    noise_fill(b, 160, 7);
    noise_fill(a, 64, 7);
    assert_memory_equal(a, b, sizeof a);
}

static void no_value_outside_the_count_is_written(void **state)
{
    (void)state;
    for (size_t count = 0; count <= 50; count++) {
        float out[64];
        for (int i = 0; i < 64; i++)
            out[i] = 1234.5f;
        noise_fill(out + 1, count, 3);
        assert_true(out[0] == 1234.5f && out[count + 1] == 1234.5f);
        for (size_t i = 1; i <= count; i++)
            assert_true(isfinite(out[i]) && fabsf(out[i]) < 7);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(only_the_low_half_of_a_seed_counts_as_in_torch),
        cmocka_unit_test(a_longer_draw_begins_like_a_shorter_one),
        cmocka_unit_test(no_value_outside_the_count_is_written),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
