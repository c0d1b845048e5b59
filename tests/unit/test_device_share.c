/* test_device_share.c - two GPUs: a renderer on each or a team of both. If this breaks, a farm renders half of what it could, or its model is
 * brought to the card at each step though two cards hold it. The figures of real models are in tests/cuda/test_dry_ledger.py. */
#include "device_share.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#define GB(x) ((size_t)((x) * 1e9))
#define SMALL {"klein-4b", GB(8.7), GB(4.9), true, true}
#define LARGE {"klein-9b", GB(20.1), GB(10.6), false, true}
#define TOO_LARGE {"klein-9b", GB(20.1), GB(10.6), false, false}
#define UNEVEN {"one-head", GB(20.1), 0, false, false}

static void a_renderer_where_the_model_fits_a_team_where_its_share_does(void **state)
{
    (void)state;
    static const struct {
        struct device_share_model models[2];
        int count, gpus;
        bool prefers_latency, is_teams;
        const char *why;
    } cases[] = {
        {{SMALL}, 1, 2, false, false, "2 renderers, because klein-4b needs 8.7 GB of 12.0"},
        {{SMALL}, 1, 4, false, false, "4 renderers, because klein-4b needs 8.7 GB of 12.0"},
        {{SMALL}, 1, 1, true, false, "1 renderer, because 1 GPU is no pair"},
        {{LARGE}, 1, 3, false, false, "3 renderers, because 3 GPUs are no pairs"},
        {{LARGE}, 1, 2, false, true, "1 team of two, because klein-9b needs 20.1 GB of 12.0 alone and 10.6 as a share"},
        {{SMALL, LARGE}, 2, 4, false, true, "2 teams of two, because klein-9b needs 20.1 GB of 12.0 alone and 10.6 as a share"},
        {{SMALL}, 1, 2, true, true, "1 team of two, because latency is preferred"},
        {{TOO_LARGE, SMALL}, 2, 2, true, false,
         "2 renderers that bring what does not fit at each step, because klein-9b needs 20.1 GB of 12.0, and a share of klein-9b needs 10.6 GB of 12.0, too"},
        {{SMALL, UNEVEN}, 2, 2, false, false,
         "2 renderers that bring what does not fit at each step, because one-head needs 20.1 GB of 12.0, and two GPUs cannot share one-head evenly"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char why[256];
        assert_int_equal(device_share_is_teams(cases[i].gpus, GB(12), cases[i].prefers_latency, cases[i].models, cases[i].count, why, sizeof why),
                         cases[i].is_teams);
        assert_string_equal(why, cases[i].why);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(a_renderer_where_the_model_fits_a_team_where_its_share_does)};
    return cmocka_run_group_tests_name("device_share", tests, NULL, NULL);
}
