/* test_dispatch.c - who gets what. If these break, campaigns starve, devices swap models all day, or a licence is broken.
 * Cases are tables: groups and workers in, wants out. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "dispatch.h"

#pragma GCC diagnostic ignored "-Woverride-init" /* a case names only what differs from WORKER() and GROUP() */

enum { KLEIN, BASE };
static const struct dispatch_model both[] = {{KLEIN, false}, {BASE, false}}, klein[] = {{KLEIN, false}}, not_sold[] = {{KLEIN, true}};

#define WORKER(...) {.batch_max = 4, .free = 8, .model = -1, .models = klein, .model_count = 1, __VA_ARGS__}
#define GROUP(...) {.model = KLEIN, .pixels = 512 * 512, .left = DISPATCH_PLENTY, .image_s = 1, __VA_ARGS__}
#define COUNT(list) ((int)(sizeof(list) / sizeof *(list)))

static struct dispatch_want wants[DISPATCH_WANTS_MAX];
static bool is_hungry;

static int plan(const struct dispatch_group *groups, int group_count, const struct dispatch_campaign *campaigns, int campaign_count,
                const struct dispatch_worker *workers, int worker_count, int slots)
{
    struct dispatch_view view = {.groups = groups, .group_count = group_count, .campaigns = campaigns, .campaign_count = campaign_count,
                                 .workers = workers, .worker_count = worker_count, .slots = slots};
    return dispatch_plan(&view, wants, DISPATCH_WANTS_MAX, &is_hungry);
}

static int given(int count, int worker, int group)
{
    int sum = 0;
    for (int i = 0; i < count; i++)
        if (wants[i].worker == worker && (group < 0 || wants[i].group == group))
            sum += wants[i].count;
    return sum;
}

static void batch_is_no_larger_than_anything_allows(void **state)
{
    (void)state;
    static const struct dispatch_cap cap2 = {KLEIN, 512 * 512, 2}, other_shape = {KLEIN, 1024 * 1024, 1}, other_model = {BASE, 512 * 512, 1};
    static const struct { struct dispatch_worker worker; int left, slots, first, all; } cases[] = {
        {WORKER(), DISPATCH_PLENTY, 1024, 4, 8},               /* a batch and the next one */
        {WORKER(.free = 4), DISPATCH_PLENTY, 1024, 4, 4},
        {WORKER(.free = 3), DISPATCH_PLENTY, 1024, 0, 0},      /* no half batches */
        {WORKER(.free = 0), DISPATCH_PLENTY, 1024, 0, 0},
        {WORKER(.batch_max = 0), DISPATCH_PLENTY, 1024, 0, 0},
        {WORKER(.free = 1, .batch_max = 1), DISPATCH_PLENTY, 1024, 1, 1},
        {WORKER(.caps = &cap2, .cap_count = 1), DISPATCH_PLENTY, 1024, 2, 8},
        {WORKER(.caps = &other_shape, .cap_count = 1), DISPATCH_PLENTY, 1024, 4, 8},
        {WORKER(.caps = &other_model, .cap_count = 1), DISPATCH_PLENTY, 1024, 4, 8},
        {WORKER(), 3, 1024, 3, 3},                             /* all that is left */
        {WORKER(), 6, 1024, 4, 6},
        {WORKER(), 0, 1024, 0, 0},
        {WORKER(), DISPATCH_PLENTY, 3, 3, 3},                  /* room in the turn */
        {WORKER(), DISPATCH_PLENTY, 0, 0, 0},
    };
    for (int i = 0; i < COUNT(cases); i++) {
        struct dispatch_group g = GROUP(.left = cases[i].left);
        struct dispatch_campaign c = {1, 0};
        int n = plan(&g, 1, &c, 1, &cases[i].worker, 1, cases[i].slots);
        if (given(n, 0, -1) != cases[i].all || (n > 0 ? wants[0].count : 0) != cases[i].first)
            fail_msg("case %d: first %d, all %d", i, n > 0 ? wants[0].count : 0, given(n, 0, -1));
    }
}

static void worker_gets_only_models_it_has_and_may_use(void **state)
{
    (void)state;
    static const struct { struct dispatch_worker worker; int model; bool is_commercial; int all; } cases[] = {
        {WORKER(), KLEIN, false, 8},
        {WORKER(), BASE, false, 0},
        {WORKER(.models = both, .model_count = 2), BASE, false, 8},
        {WORKER(.model_count = 0), KLEIN, false, 0},
        {WORKER(), KLEIN, true, 8},
        {WORKER(.models = not_sold), KLEIN, true, 0},
        {WORKER(.models = not_sold), KLEIN, false, 8},
    };
    for (int i = 0; i < COUNT(cases); i++) {
        struct dispatch_group g = GROUP(.model = cases[i].model, .is_commercial = cases[i].is_commercial);
        struct dispatch_campaign c = {1, 0};
        int n = plan(&g, 1, &c, 1, &cases[i].worker, 1, 1024);
        if (given(n, 0, -1) != cases[i].all)
            fail_msg("case %d: %d", i, given(n, 0, -1));
        assert_int_equal(is_hungry, cases[i].all == 0);
    }
}

static void highest_priority_comes_first_whatever_is_owed(void **state)
{
    (void)state;
    struct dispatch_group groups[] = {GROUP(.campaign = 0), GROUP(.campaign = 1, .priority = 5), GROUP(.campaign = 2, .priority = 9, .model = BASE)};
    struct dispatch_campaign campaigns[] = {{1, 0}, {2, -500}, {3, -500}};
    struct dispatch_worker workers[] = {WORKER(), WORKER(.models = both, .model_count = 2, .model = KLEIN)};
    int n = plan(groups, 3, campaigns, 3, workers, 2, 1024);
    assert_int_equal(given(n, 1, 2), 8); /* it has the model, though another is loaded */
    assert_int_equal(given(n, 0, 1), 8);
    assert_int_equal(given(n, 0, 0), 0);
}

static void equal_campaigns_get_equal_seconds_not_equal_images(void **state)
{
    (void)state;
    struct dispatch_group groups[] = {GROUP(.campaign = 0, .image_s = 1), GROUP(.campaign = 1, .image_s = 4)};
    struct dispatch_campaign campaigns[] = {{1, 0}, {2, 0}};
    struct dispatch_worker w = WORKER(.free = 4);
    double seconds[2] = {0};
    for (int round = 0; round < 1000; round++) {
        int n = plan(groups, 2, campaigns, 2, &w, 1, 1024);
        assert_int_equal(n, 1);
        int g = wants[0].group;
        seconds[g] += wants[0].count * groups[g].image_s;
        campaigns[g].owed_s -= wants[0].count * groups[g].image_s;
        dispatch_settle(campaigns, 2);
    }
    /* They differ by one batch of the dearer at most. */
    assert_true(seconds[0] - seconds[1] <= 16 && seconds[1] - seconds[0] <= 16);
}

static void what_is_owed_has_a_limit(void **state)
{
    (void)state;
    struct dispatch_campaign campaigns[] = {{1, -100000}, {2, 50}, {3, 40}};
    dispatch_settle(campaigns, 3);
    assert_true(campaigns[1].owed_s == 0);
    assert_true(campaigns[2].owed_s == -10);
    assert_true(campaigns[0].owed_s == -DISPATCH_OWED_MAX_S);
    dispatch_settle(NULL, 0);
}

static void model_is_switched_only_when_it_pays(void **state)
{
    (void)state;
    static const struct { double owed_s[2], waited_s[2]; int loaded, first; } cases[] = {
        {{0, -DISPATCH_SWITCH_S + 1}, {0, 0}, BASE, 1},  /* the other is owed a little more: stay */
        {{0, -DISPATCH_SWITCH_S - 1}, {0, 0}, BASE, 0},  /* much more: go */
        {{0, 0}, {0, 0}, BASE, 1},
        {{0, 0}, {0, 0}, KLEIN, 0},
        {{0, 0}, {0, 0}, -1, 0},                         /* nothing loaded: the earlier one */
        {{-5, 0}, {0, 0}, -1, 1},
        {{-500, 0}, {DISPATCH_STARVE_S, 0}, BASE, 0},    /* it has waited long enough, whatever it is owed */
        {{-500, 0}, {DISPATCH_STARVE_S - 1, 0}, BASE, 1},
        {{-500, 0}, {DISPATCH_STARVE_S, DISPATCH_STARVE_S + 1}, BASE, 1}, /* both have: the longer one */
    };
    for (int i = 0; i < COUNT(cases); i++) {
        struct dispatch_group groups[] = {GROUP(.campaign = 0, .waited_s = cases[i].waited_s[0]),
                                          GROUP(.campaign = 1, .model = BASE, .waited_s = cases[i].waited_s[1])};
        struct dispatch_campaign campaigns[] = {{1, cases[i].owed_s[0]}, {2, cases[i].owed_s[1]}};
        struct dispatch_worker w = WORKER(.models = both, .model_count = 2, .model = cases[i].loaded);
        int n = plan(groups, 2, campaigns, 2, &w, 1, 1024);
        if (n == 0 || wants[0].group != cases[i].first)
            fail_msg("case %d: group %d", i, n ? wants[0].group : -1);
    }
}

/* An adapter is merged when a model is opened: rows of one stay together, also within a campaign. */
static void same_adapters_stay_together(void **state)
{
    (void)state;
    struct dispatch_group groups[] = {GROUP(.loras = 0, .left = 8), GROUP(.loras = 7, .left = 8), GROUP(.loras = -7, .left = 8)};
    struct dispatch_campaign campaigns[] = {{1, 0}};
    struct dispatch_worker w = WORKER(.model = KLEIN, .loras = 7, .free = 24);
    static const int order[] = {1, 1, 0, 0, 2, 2};
    assert_int_equal(plan(groups, 3, campaigns, 1, &w, 1, 1024), COUNT(order));
    for (int i = 0; i < COUNT(order); i++)
        assert_int_equal(wants[i].group, order[i]);
}

/* One worker in a simulated day: A is endless, B came later with another model and is never owed enough to pay for a switch. */
static void other_model_waits_no_longer_than_the_limit(void **state)
{
    (void)state;
    struct dispatch_group groups[] = {GROUP(.campaign = 0), GROUP(.campaign = 1, .model = BASE)};
    struct dispatch_campaign campaigns[] = {{1, 0}, {2, -DISPATCH_OWED_MAX_S}};
    struct dispatch_worker w = WORKER(.models = both, .model_count = 2, .model = KLEIN, .free = 4);
    double now_s = 0, served_s[2] = {0}, longest_s = 0;
    for (int i = 0; i < 1000; i++) {
        for (int g = 0; g < 2; g++)
            groups[g].waited_s = now_s - served_s[g];
        assert_int_equal(plan(groups, 2, campaigns, 2, &w, 1, 1024), 1);
        int g = wants[0].group;
        if (groups[g].waited_s > longest_s)
            longest_s = groups[g].waited_s;
        w.model = groups[g].model;
        now_s += 4 * groups[g].image_s;
        served_s[g] = now_s;
        campaigns[1].owed_s = -DISPATCH_OWED_MAX_S;
    }
    assert_true(longest_s >= DISPATCH_STARVE_S);
    assert_true(longest_s <= DISPATCH_STARVE_S + 4); /* one batch more, which was running */
}

static void only_one_worker_turns_to_who_starves(void **state)
{
    (void)state;
    struct dispatch_group groups[] = {GROUP(.campaign = 0), GROUP(.campaign = 1, .model = BASE, .waited_s = 100)};
    struct dispatch_campaign campaigns[] = {{1, 0}, {2, -200}};
    struct dispatch_worker workers[3];
    for (int i = 0; i < 3; i++)
        workers[i] = (struct dispatch_worker)WORKER(.models = both, .model_count = 2, .model = KLEIN, .free = 4);
    int n = plan(groups, 2, campaigns, 2, workers, 3, 1024);
    assert_int_equal(n, 3);
    assert_int_equal(given(n, 0, 1), 4);
    assert_int_equal(given(n, 1, 0), 4);
    assert_int_equal(given(n, 2, 0), 4);
}

static void few_tasks_are_shared_by_all_who_are_free(void **state)
{
    (void)state;
    static const struct { int left, workers, most, least; } cases[] = {
        {10, 3, 4, 3}, {3, 3, 1, 1}, {2, 3, 1, 0}, {24, 3, 8, 8}, {1, 1, 1, 1}, {13, 4, 4, 3}, {63, 4, 8, 8},
    };
    for (int i = 0; i < COUNT(cases); i++) {
        struct dispatch_worker workers[4];
        struct dispatch_group g = GROUP(.left = cases[i].left);
        struct dispatch_campaign c = {1, 0};
        for (int k = 0; k < cases[i].workers; k++)
            workers[k] = (struct dispatch_worker)WORKER();
        int n = plan(&g, 1, &c, 1, workers, cases[i].workers, 1024), all = 0;
        for (int k = 0; k < cases[i].workers; k++) {
            int got = given(n, k, -1);
            if (got > cases[i].most || got < cases[i].least)
                fail_msg("case %d: worker %d gets %d", i, k, got);
            all += got;
        }
        assert_int_equal(all, cases[i].left < 8 * cases[i].workers ? cases[i].left : 8 * cases[i].workers);
    }
}

static void idle_workers_come_before_busy_ones(void **state)
{
    (void)state;
    struct dispatch_group g = GROUP();
    struct dispatch_campaign c = {1, 0};
    struct dispatch_worker workers[] = {WORKER(.free = 4, .held = 4), WORKER(), WORKER(.free = 4, .held = 4), WORKER()};
    int n = plan(&g, 1, &c, 1, workers, 4, 8); /* room for two batches in this turn */
    assert_int_equal(n, 2);
    assert_int_equal(given(n, 1, -1), 4);
    assert_int_equal(given(n, 3, -1), 4);
}

static void same_view_gives_same_plan_and_is_left_alone(void **state)
{
    (void)state;
    struct dispatch_group groups[64];
    struct dispatch_campaign campaigns[8];
    struct dispatch_worker workers[40];
    for (int i = 0; i < 64; i++)
        groups[i] = (struct dispatch_group)GROUP(.campaign = i % 8, .model = i % 2, .left = i % 5 ? DISPATCH_PLENTY : i, .priority = i % 3, .image_s = 1 + i % 7);
    for (int i = 0; i < 8; i++)
        campaigns[i] = (struct dispatch_campaign){i, -i};
    for (int i = 0; i < 40; i++)
        workers[i] = (struct dispatch_worker)WORKER(.free = i % 10, .batch_max = 1 + i % 4, .models = both, .model_count = 1 + i % 2, .held = i % 3);
    static struct dispatch_want before[DISPATCH_WANTS_MAX];
    struct dispatch_group kept[64];
    memcpy(kept, groups, sizeof groups);
    int n = plan(groups, 64, campaigns, 8, workers, 40, 100), sum = 0;
    memcpy(before, wants, sizeof before);
    assert_int_equal(plan(groups, 64, campaigns, 8, workers, 40, 100), n);
    assert_memory_equal(before, wants, (size_t)n * sizeof *wants);
    assert_memory_equal(kept, groups, sizeof groups);
    for (int i = 0; i < n; i++)
        sum += wants[i].count;
    assert_true(sum <= 100);
    for (int k = 0; k < 40; k++)
        assert_true(given(n, k, -1) <= workers[k].free);
}

static void cost_is_guessed_then_learnt(void **state)
{
    (void)state;
    assert_true(dispatch_guess_s(1024 * 1024, 4) > dispatch_guess_s(512 * 512, 4));
    assert_true(dispatch_guess_s(512 * 512, 50) > dispatch_guess_s(512 * 512, 4));
    assert_true(dispatch_guess_s(512 * 512, 0) == dispatch_guess_s(512 * 512, 4)); /* the model's default */
    double known_s = dispatch_learn_s(0, 8);
    assert_true(known_s == 8);
    for (int i = 0; i < 50; i++)
        known_s = dispatch_learn_s(known_s, 2);
    assert_true(known_s > 1.99 && known_s < 2.01);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(batch_is_no_larger_than_anything_allows),
        cmocka_unit_test(worker_gets_only_models_it_has_and_may_use),
        cmocka_unit_test(highest_priority_comes_first_whatever_is_owed),
        cmocka_unit_test(equal_campaigns_get_equal_seconds_not_equal_images),
        cmocka_unit_test(what_is_owed_has_a_limit),
        cmocka_unit_test(model_is_switched_only_when_it_pays),
        cmocka_unit_test(same_adapters_stay_together),
        cmocka_unit_test(other_model_waits_no_longer_than_the_limit),
        cmocka_unit_test(only_one_worker_turns_to_who_starves),
        cmocka_unit_test(few_tasks_are_shared_by_all_who_are_free),
        cmocka_unit_test(idle_workers_come_before_busy_ones),
        cmocka_unit_test(same_view_gives_same_plan_and_is_left_alone),
        cmocka_unit_test(cost_is_guessed_then_learnt),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
