/* test_scheduler.c - every schedule that can be asked for goes down from 1 to 0. If this breaks, some number of steps or
 * some size renders noise. That the values are the reference's is shown by the tables of test_golden. */
#include "scheduler.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

static void sigmas_fall_from_one_to_zero_for_all_steps_and_sizes(void **state)
{
    (void)state;
    static const int tokens[] = {16, 17, 1024, 4300, 4301, ENGINE_PIXELS_MAX / 256}; /* the formula changes at 4300 */
    static struct schedule s;
    for (size_t t = 0; t < sizeof tokens / sizeof tokens[0]; t++) {
        for (int steps = 1; steps <= ENGINE_STEPS_MAX; steps++) {
            scheduler_plan(&s, steps, tokens[t]);
            assert_int_equal(s.steps, steps);
            assert_true(s.sigma[0] == 1.0f && s.sigma[steps] == 0.0f && isfinite(s.mu));
            for (int i = 0; i < steps; i++)
                assert_true(s.sigma[i] > s.sigma[i + 1] && s.timestep[i] == s.sigma[i] * 1000.0f);
        }
    }
}

static void bf16_rounds_the_time_and_f32_does_not(void **state)
{
    (void)state;
    struct schedule s;
    scheduler_plan(&s, 4, 16);
    for (int i = 0; i < 4; i++) {
        float exact = scheduler_model_time(&s, i, ENGINE_F32), rounded = scheduler_model_time(&s, i, ENGINE_BF16);
        assert_true(fabsf(exact - s.timestep[i]) <= 1e-4f);
        assert_true(tensor_f32_of(tensor_bf16_of(rounded)) == rounded);
        assert_true(fabsf(rounded - exact) <= exact / 64); /* three roundings to 8 bits */
    }
    assert_true(scheduler_model_time(&s, 0, ENGINE_BF16) == 1000);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sigmas_fall_from_one_to_zero_for_all_steps_and_sizes),
        cmocka_unit_test(bf16_rounds_the_time_and_f32_does_not),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
