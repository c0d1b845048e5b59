/* test_fleet.c - workers and what they hold. If these break, a task is forgotten or counted twice, and a worker gets more than
 * it takes, or nothing for ever. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "fleet.h"

static char why[256];

static struct fleet_worker *hello(struct fleet *f, const char *name, uint64_t epoch, const char *peer, int64_t now_ms)
{
    struct msg_hello h = {.worker = name, .boot_epoch = epoch, .device = "cpu", .host = "here", .model_count = 2,
                          .models = {{"klein-4b", "d", "klein-4b", "Apache-2.0", true}, {"klein-9b", "d", "klein-9b", "FLUX Non-Commercial", true}}};
    struct fleet_worker *w = fleet_hello(f, &h, peer, now_ms, why, sizeof why);
    if (!w)
        fail_msg("%s", why);
    return w;
}

static struct fleet_worker *idle(struct fleet *f, const char *name, int credit)
{
    char peer[64];
    snprintf(peer, sizeof peer, "%s/1/1", name);
    struct fleet_worker *w = hello(f, name, 1, peer, 0);
    w->credit = (uint32_t)credit;
    fleet_move(f, w, FLEET_IDLE);
    return w;
}

static void worker_stands_in_the_list_of_its_state(void **state)
{
    (void)state;
    struct fleet *f = fleet_new();
    struct fleet_worker *a = hello(f, "a", 1, "a/1/1", 0), *b = hello(f, "b", 1, "b/1/1", 0);
    assert_int_equal(fleet_count(f, FLEET_GREETING), 2);
    fleet_review(f, a); /* what it says does not matter before READY */
    assert_int_equal(a->state, FLEET_GREETING);
    fleet_move(f, a, FLEET_IDLE);
    fleet_hold(f, a, 1, 1, 5);
    fleet_review(f, a);
    assert_int_equal(a->state, FLEET_BUSY);
    snprintf(a->said, sizeof a->said, "blocked: no space in /out");
    fleet_review(f, a);
    assert_int_equal(a->state, FLEET_BLOCKED);
    fleet_move(f, a, FLEET_SILENT);
    fleet_review(f, a);
    assert_int_equal(a->state, FLEET_SILENT);
    fleet_heard(f, a, 9);
    assert_int_equal(a->state, FLEET_BLOCKED);
    assert_int_equal(a->heard_ms, 9);
    snprintf(a->said, sizeof a->said, "draining");
    fleet_review(f, a);
    assert_int_equal(a->state, FLEET_DRAINING);
    int all = 0;
    for (enum fleet_state s = 0; s < FLEET_STATES; s++)
        all += fleet_count(f, s);
    assert_int_equal(all, 2);
    assert_ptr_equal(fleet_first(f, FLEET_GREETING), b);
    fleet_move(f, a, FLEET_GONE);
    fleet_forget(f, a);
    assert_null(fleet_find(f, "a"));
    assert_null(fleet_find_peer(f, "a/1/1"));
    assert_int_equal(fleet_held_count(f), 0);
    assert_ptr_equal(fleet_find_peer(f, "b/1/1"), b);
    fleet_free(f);
    fleet_free(NULL);
}

static void only_idle_and_busy_workers_have_credit(void **state)
{
    (void)state;
    struct fleet *f = fleet_new();
    struct fleet_worker *w = idle(f, "w", 8);
    assert_int_equal(fleet_free_credit(w), 8);
    struct fleet_held *h[10];
    for (uint64_t i = 0; i < 10; i++) {
        h[i] = fleet_hold(f, w, i + 1, 1, 1);
        fleet_count_held(h[i], i < 6); /* the last four are from before: beside the credit */
    }
    assert_int_equal(w->unacked, 6);
    assert_int_equal(fleet_free_credit(w), 2);
    w->returning = 3; /* answered with the running turn */
    assert_int_equal(fleet_free_credit(w), 5);
    w->returning = 0;
    fleet_drop(f, h[0]);
    fleet_drop(f, h[9]);
    assert_int_equal(fleet_free_credit(w), 3);
    w->credit = 1; /* the worker takes less now */
    assert_int_equal(fleet_free_credit(w), 0);
    w->credit = UINT32_MAX;
    assert_true(fleet_free_credit(w) > 1000);
    static const enum fleet_state none[] = {FLEET_GREETING, FLEET_BLOCKED, FLEET_DRAINING, FLEET_SILENT, FLEET_GONE};
    for (size_t i = 0; i < sizeof none / sizeof *none; i++) {
        fleet_move(f, w, none[i]);
        assert_int_equal(fleet_free_credit(w), 0);
    }
    fleet_free(f);
}

static void hello_again_puts_everything_into_question(void **state)
{
    (void)state;
    struct fleet *f = fleet_new();
    struct fleet_worker *w = idle(f, "w", 8);
    struct fleet_held *running = fleet_hold(f, w, 1, 1, 1), *reported = fleet_hold(f, w, 2, 1, 1), *lost = fleet_hold(f, w, 3, 1, 1);
    fleet_count_held(running, true);
    fleet_count_held(reported, true);
    reported->is_reported = true;
    lost->is_lost = true;
    fleet_cap(w, 0, 100, 2);
    assert_ptr_equal(hello(f, "w", 1, "w/1/2", 50), w); /* reconnected */
    assert_int_equal(w->session, 2);
    assert_false(w->is_new_process);
    assert_int_equal(w->unacked, 0);
    assert_int_equal(w->state, FLEET_GREETING);
    assert_true(running->is_before && running->is_leased);
    assert_false(reported->is_before);
    assert_null(fleet_held_find(f, 3, 1));
    assert_int_equal(w->cap_count, 1);
    assert_null(fleet_find_peer(f, "w/1/1"));
    assert_ptr_equal(fleet_find_peer(f, "w/1/2"), w);
    assert_ptr_equal(hello(f, "w", 2, "w/2/1", 60), w); /* another process */
    assert_true(w->is_new_process);
    assert_false(running->is_leased); /* nobody extends what a dead process had */
    assert_int_equal(w->cap_count, 0);
    fleet_free(f);
}

static void held_tasks_are_found_among_many(void **state)
{
    (void)state;
    struct fleet *f = fleet_new();
    struct fleet_worker *w = idle(f, "w", 8);
    for (uint64_t i = 1; i <= 50000; i++)
        assert_non_null(fleet_hold(f, w, i, i % 3 + 1, 1));
    assert_int_equal(fleet_held_count(f), 50000);
    for (uint64_t i = 1; i <= 50000; i++) {
        struct fleet_held *h = fleet_held_find(f, i, i % 3 + 1);
        assert_non_null(h);
        assert_int_equal(h->task, i);
        assert_null(fleet_held_find(f, i, i % 3 + 2)); /* another token is another task */
    }
    for (uint64_t i = 1; i <= 50000; i += 2)
        fleet_drop(f, fleet_held_find(f, i, i % 3 + 1));
    assert_int_equal(fleet_held_count(f), 25000);
    assert_int_equal(w->held_count, 25000);
    assert_null(fleet_held_find(f, 1, 2));
    assert_non_null(fleet_held_find(f, 2, 3));
    fleet_free(f);
}

static void leases_stand_in_line_the_oldest_first(void **state)
{
    (void)state;
    struct fleet *f = fleet_new();
    struct fleet_worker *w = idle(f, "w", 8);
    struct fleet_held *a = fleet_hold(f, w, 1, 1, 10), *b = fleet_hold(f, w, 2, 1, 20), *c = fleet_hold(f, w, 3, 1, 0);
    assert_ptr_equal(fleet_lease_first(f), c); /* never extended: at once */
    fleet_lease_renewed(f, c, 30);
    assert_ptr_equal(fleet_lease_first(f), a);
    fleet_lease_renewed(f, a, 40);
    assert_ptr_equal(fleet_lease_first(f), b);
    fleet_lease_leave(f, b);
    fleet_lease_leave(f, b);
    assert_ptr_equal(fleet_lease_first(f), c);
    fleet_lease_renewed(f, b, 50); /* who left does not come back by itself */
    assert_ptr_equal(fleet_lease_first(f)->lease_next, a);
    assert_null(a->lease_next);
    fleet_lease_enter(f, b);
    assert_ptr_equal(fleet_lease_first(f), b);
    fleet_drop(f, b);
    fleet_drop(f, c);
    fleet_drop(f, a);
    assert_null(fleet_lease_first(f));
    fleet_free(f);
}

static void caps_are_kept_for_the_last_shapes(void **state)
{
    (void)state;
    struct fleet *f = fleet_new();
    struct fleet_worker *w = idle(f, "w", 8);
    for (int i = 0; i < DISPATCH_CAPS_MAX + 3; i++)
        fleet_cap(w, 0, 1000 + i, 2);
    fleet_cap(w, 0, 1000 + DISPATCH_CAPS_MAX, 1);
    assert_int_equal(w->cap_count, DISPATCH_CAPS_MAX);
    struct dispatch_worker view = {.batch_max = 8, .caps = w->caps, .cap_count = w->cap_count};
    assert_int_equal(dispatch_batch(&view, 0, 1000 + DISPATCH_CAPS_MAX), 1);
    assert_int_equal(dispatch_batch(&view, 0, 1000 + DISPATCH_CAPS_MAX + 2), 2);
    assert_int_equal(dispatch_batch(&view, 0, 1000), 8); /* forgotten: it will be learnt again */
    fleet_free(f);
}

static void full_fleet_says_so(void **state)
{
    (void)state;
    struct fleet *f = fleet_new();
    char name[32];
    struct msg_hello h = {.worker = name, .boot_epoch = 1, .device = "", .host = ""};
    for (int i = 0; i < FLEET_WORKERS_MAX; i++) {
        snprintf(name, sizeof name, "w%d", i);
        assert_non_null(fleet_hello(f, &h, name, 0, why, sizeof why));
    }
    snprintf(name, sizeof name, "one-more");
    assert_null(fleet_hello(f, &h, name, 0, why, sizeof why));
    assert_string_equal(why, "this coordinator has 4096 workers, which is all it takes");
    snprintf(name, sizeof name, "w7");
    assert_non_null(fleet_hello(f, &h, "w7/again", 0, why, sizeof why));
    for (int i = 0; i < FLEET_NAMES_MAX; i++) {
        snprintf(name, sizeof name, "model-%d", i);
        assert_true(fleet_name_id(f, name) >= 0);
    }
    assert_int_equal(fleet_name_id(f, "one-more"), -1);
    assert_int_equal(fleet_name_id(f, "model-5"), 5);
    assert_int_equal(fleet_name_find(f, "model-5"), 5);
    assert_int_equal(fleet_name_find(f, "one-more"), -1);
    fleet_free(f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(worker_stands_in_the_list_of_its_state),
        cmocka_unit_test(only_idle_and_busy_workers_have_credit),
        cmocka_unit_test(hello_again_puts_everything_into_question),
        cmocka_unit_test(held_tasks_are_found_among_many),
        cmocka_unit_test(leases_stand_in_line_the_oldest_first),
        cmocka_unit_test(caps_are_kept_for_the_last_shapes),
        cmocka_unit_test(full_fleet_says_so),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
