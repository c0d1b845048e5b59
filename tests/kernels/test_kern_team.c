/* test_kern_team.c - backends that hold one model together: if this breaks, a picture of a team depends on luck, or one dead rank
 * keeps the others waiting for ever. Every rank has a thread; what it finds is judged afterwards, since an assertion must not
 * fail in a thread. */
#include "kernel_check.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define RANKS_MAX 3
#define PATIENCE_MS 300

struct rank {
    struct kernel_check *check;
    struct kern_team *team;
    int rank, ranks;
    void (*run)(struct rank *r, struct kern *k);
    struct tensor x;
    int64_t number;
    char error[256];
    bool ok;
};

static void *rank_main(void *argument)
{
    struct rank *r = argument;
    struct kern_cpu_options options = {.threads = 1 + r->rank % 2, .isa = r->check->isa, .member = {r->team, r->rank}};
    struct kern *k = kern_cpu_open(&options, r->error, sizeof r->error);
    if (!k)
        return NULL;
    r->run(r, k);
    r->ok = kern_sync(k);
    snprintf(r->error, sizeof r->error, "%s", kern_error(k));
    kern_close(k);
    return NULL;
}

/* All ranks run; those that have an x keep it. */
static void run(struct kernel_check *c, struct rank *r, int ranks, void (*one)(struct rank *, struct kern *))
{
    pthread_t threads[RANKS_MAX];
    struct kern_team *team = kern_team_open(ranks, PATIENCE_MS);
    assert_non_null(team);
    for (int i = 0; i < ranks; i++) {
        r[i].check = c, r[i].team = team, r[i].rank = i, r[i].ranks = ranks, r[i].run = one;
        assert_int_equal(pthread_create(&threads[i], NULL, rank_main, &r[i]), 0);
    }
    for (int i = 0; i < ranks; i++)
        pthread_join(threads[i], NULL);
    kern_team_close(team);
}

static void sleep_ms(long ms)
{
    nanosleep(&(struct timespec){ms / 1000, ms % 1000 * 1000000}, NULL);
}

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* --- sums ----------------------------------------------------------------------------------------------------- */

static void sum(struct rank *r, struct kern *k)
{
    struct tensor first = tensor_slice(r->x, 0, 0, 1), rest = tensor_slice(r->x, 0, 1, r->x.shape[0] - 1);
    kern_join(k);
    kern_sum_begin(k, first);
    kern_sum_begin(k, rest);
    kern_sum_end(k, first);
    kern_sum_end(k, rest);
}

/* From rank 0 on, in f32, rounded once: to the bit, whatever the shape and the threads. */
static void all_ranks_get_the_same_sum(struct kernel_check *c)
{
    static const int64_t shapes[][2] = {{1, 1}, {2, 31}, {1000, 48}};
    for (int ranks = 1; ranks <= RANKS_MAX; ranks++)
        for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
            struct rank r[RANKS_MAX] = {0};
            int64_t count = shapes[s][0] * shapes[s][1];
            float *want = calloc((size_t)count, sizeof *want);
            for (int i = 0; i < ranks; i++) {
                r[i].x = kernel_check_random(c, 2, shapes[s], (uint32_t)(10 * s + (size_t)i), 3);
                for (int64_t at = 0; at < count; at++)
                    want[at] = i ? want[at] + (float)kernel_check_get(r[i].x, at) : (float)kernel_check_get(r[i].x, at);
            }
            run(c, r, ranks, sum);
            for (int i = 0; i < ranks; i++) {
                assert_true(r[i].ok);
                for (int64_t at = 0; at < count; at++)
                    assert_true(kernel_check_get(r[i].x, at) == kernel_check_round(c->dtype, want[at]));
            }
            free(want);
        }
}

static void exchange(struct rank *r, struct kern *k)
{
    float minus_zero[3] = {-0.0f, -0.0f, -0.0f};
    int64_t width = 3;
    kern_hold_whole(k, true);
    kern_join(k);
    struct tensor row = kern_temp(k, r->check->dtype, 1, &width);
    kern_write(k, row, tensor_1d(minus_zero, TENSOR_F32, width));
    kern_sum_ranks(k, r->x); /* nothing: there are no shares */
    kern_exchange_ranks(k, r->x, row);
}

/* What each made is not changed by a bit on its way: the sign of zero, infinities, NaN. Else a picture would depend on the team. */
static void each_part_is_had_by_all(struct kernel_check *c)
{
    static const float values[] = {-0.0f, 0.0f, INFINITY, -INFINITY, NAN, -1.5f, 1e-40f, 3e38f, -1e-45f};
    for (int ranks = 1; ranks <= RANKS_MAX; ranks++) {
        struct rank r[RANKS_MAX] = {0};
        struct tensor want = kernel_check_tensor(c, c->dtype, 3, (int64_t[]){ranks, 3, 3});
        for (int i = 0; i < ranks; i++)
            for (int64_t at = 0; at < 9; at++)
                kernel_check_set(want, 9 * i + at, (double)values[(at + i) % 9]);
        for (int i = 0; i < ranks; i++) {
            r[i].x = kernel_check_random(c, 3, want.shape, (uint32_t)i, 3);
            tensor_convert(tensor_slice(r[i].x, 0, i, 1), tensor_slice(want, 0, i, 1));
        }
        run(c, r, ranks, exchange);
        for (int i = 0; i < ranks; i++) {
            assert_true(r[i].ok);
            kernel_check_same_bits(r[i].x, want);
        }
    }
}

static void tell(struct rank *r, struct kern *k)
{
    r->number = kern_most(k, r->number);
    kern_agree(k, r->number, "the largest number");
}

static void numbers_are_heard_by_all(struct kernel_check *c)
{
    struct rank r[RANKS_MAX] = {{.number = -4}, {.number = INT64_C(1) << 40}, {.number = 7}};
    run(c, r, RANKS_MAX, tell);
    for (int i = 0; i < RANKS_MAX; i++) {
        assert_true(r[i].ok);
        assert_true(r[i].number == INT64_C(1) << 40);
    }
}

static void alone_there_is_nothing_to_do(struct kernel_check *c)
{
    struct tensor x = kernel_check_random(c, 2, (int64_t[]){3, 5}, 1, 1), before = kernel_check_strided(c, x, 0);
    assert_int_equal(kern_rank(c->k), 0);
    assert_int_equal(kern_ranks(c->k), 1);
    assert_true(kern_join(c->k));
    kern_sum_ranks(c->k, x);
    kern_agree(c->k, 3, "a number");
    assert_true(kern_most(c->k, -3) == -3);
    kern_leave(c->k, "nobody is left behind");
    kernel_check_done(c->k);
    kernel_check_same_bits(x, before);
}

static void a_checksum_is_of_its_row_alone(struct kernel_check *c)
{
    enum { ROWS = 70, WIDTH = 43 };
    struct tensor x = kernel_check_random(c, 2, (int64_t[]){ROWS, WIDTH}, 5, 2), apart = kernel_check_strided(c, x, 3);
    struct tensor out = kernel_check_tensor(c, TENSOR_I32, 1, (int64_t[]){ROWS}), again = kernel_check_tensor(c, TENSOR_I32, 1, (int64_t[]){ROWS});
    kern_checksum(c->k, out, x);
    kern_checksum(c->k, again, apart);
    kernel_check_done(c->k);
    kernel_check_same_bits(out, again);
    for (int64_t row = 0; row < ROWS; row++) {
        uint32_t want = 0;
        for (int64_t i = 0; i < WIDTH; i++) {
            float value = (float)kernel_check_get(x, row * WIDTH + i);
            uint32_t bits;
            memcpy(&bits, &value, sizeof bits);
            want += (uint32_t)(2 * i + 1) * bits;
        }
        assert_int_equal((uint32_t)((int32_t *)out.data)[row], want);
    }
    kernel_check_set(x, 7 * WIDTH + 42, -kernel_check_get(x, 7 * WIDTH + 42)); /* one bit */
    kern_checksum(c->k, again, x);
    for (int64_t row = 0; row < ROWS; row++)
        assert_int_equal(((int32_t *)out.data)[row] != ((int32_t *)again.data)[row], row == 7);
}

/* --- failures --------------------------------------------------------------------------------------------------- */

static void run_out_of_memory(struct rank *r, struct kern *k)
{
    int64_t shape[1] = {INT64_C(1) << 50};
    if (r->rank == 1)
        kern_temp(k, TENSOR_F32, 1, shape);
    kern_sum_ranks(k, r->x); /* the others wait here */
    snprintf(r->error, sizeof r->error, "%s", kern_error(k));
    r->number = kern_recover(k); /* of all: it may pass */
    kern_join(k);
    kern_sum_ranks(k, r->x);
}

static void what_one_rank_lacks_all_lack_and_the_next_piece_succeeds(struct kernel_check *c)
{
    struct rank r[RANKS_MAX] = {0};
    for (int i = 0; i < RANKS_MAX; i++) {
        r[i].x = kernel_check_tensor(c, c->dtype, 2, (int64_t[]){4, 4});
        for (int64_t at = 0; at < 16; at++)
            kernel_check_set(r[i].x, at, i + 1);
    }
    run(c, r, RANKS_MAX, run_out_of_memory);
    for (int i = 0; i < RANKS_MAX; i++) {
        assert_true(r[i].ok);
        assert_int_equal(r[i].number, 1);
        assert_true(kernel_check_get(r[i].x, 5) == 6); /* 1 + 2 + 3: the first sum was not made */
    }
}

static void leave(struct rank *r, struct kern *k)
{
    if (r->rank == 0)
        kern_leave(k, "a reason of the caller");
    kern_most(k, 0);
    snprintf(r->error, sizeof r->error, "%s", kern_error(k));
    r->number = strstr(kern_error(k), "team interrupted: a reason of the caller (rank 0 of 2)") != NULL;
    r->number += kern_recover(k);
}

static void who_leaves_says_why(struct kernel_check *c)
{
    struct rank r[2] = {0};
    run(c, r, 2, leave);
    for (int i = 0; i < 2; i++)
        assert_int_equal(r[i].number, 2);
}

/* A rank sees that a sum fails; the one whose device is lost says so a little later. The farm and its owner are told of the device. */
static void the_rank_that_has_the_trouble_is_believed(struct kernel_check *c)
{
    (void)c;
    static const struct { bool is_suspicion; int rank; const char *why, *kept; } told[] = {
        {true, 0, "a sum fails", "a sum fails (rank 0 of 2)"},         {true, 1, "no sign of life", "a sum fails (rank 0 of 2)"},
        {false, 1, "device lost", "device lost (rank 1 of 2)"},        {false, 0, "no memory", "device lost (rank 1 of 2)"},
        {true, 0, "a sum does not end", "device lost (rank 1 of 2)"},
    };
    struct kern_team *team = kern_team_open(2, PATIENCE_MS);
    char why[256];
    int rank;
    for (size_t i = 0; i < sizeof told / sizeof told[0]; i++) {
        (told[i].is_suspicion ? kern_team_suspect : kern_team_break)(team, told[i].rank, told[i].why);
        assert_true(kern_team_why(team, why, sizeof why, &rank));
        assert_string_equal(why, told[i].kept);
        assert_int_equal(rank, i >= 2);
        assert_int_equal(kern_team_breaks(team), 1);
    }
    kern_team_close(team);
}

/* By how long the others wait and what they took it is judged whether a device hangs: of one that nobody waits for nothing is known. */
static void a_rank_is_waited_for_when_all_others_have_come(struct kernel_check *c)
{
    (void)c;
    struct kern_team *team = kern_team_open(3, PATIENCE_MS), *one = kern_team_open(1, PATIENCE_MS);
    int64_t took_ms, waited_ms, together_ms;
    assert_true(kern_team_awaited_ms(one, 0, &took_ms) == 0);
    sleep_ms(40);
    kern_team_come(team, 0);
    assert_true(kern_team_awaited_ms(team, 1, &took_ms) == 0); /* rank 2 is not there */
    sleep_ms(40);
    kern_team_come(team, 2);
    kern_team_come(team, 2); /* it is still there */
    sleep_ms(20);
    waited_ms = kern_team_awaited_ms(team, 1, &took_ms);
    assert_true(waited_ms >= 20 && took_ms >= 80 && kern_team_awaited_ms(team, 0, &took_ms) == 0);
    together_ms = kern_team_now_ms();
    for (int i = 0; i < 3; i++)
        kern_team_go(team, i);
    assert_true(kern_team_awaited_ms(team, 1, &took_ms) == 0);
    kern_team_come(team, 0);
    kern_team_come(team, 2);
    kern_team_awaited_ms(team, 1, &took_ms);
    assert_true(took_ms <= kern_team_now_ms() - together_ms);
    kern_team_close(team);
    kern_team_close(one);
}

static void be_silent(struct rank *r, struct kern *k)
{
    if (r->rank == 1) /* dead */
        return;
    double start = now_s();
    kern_sum_ranks(k, r->x);
    r->number = now_s() - start < 20.0 * PATIENCE_MS / 1e3;
}

static void a_silent_rank_ends_the_team(struct kernel_check *c)
{
    struct rank r[2] = {0};
    r[0].x = kernel_check_random(c, 2, (int64_t[]){2, 2}, 1, 1);
    run(c, r, 2, be_silent);
    assert_false(r[0].ok);
    assert_int_equal(r[0].number, 1);
    assert_non_null(strstr(r[0].error, "device failed: no sign of life"));
    assert_non_null(strstr(r[0].error, "rank 1 of 2"));
}

static void be_slow(struct rank *r, struct kern *k)
{
    for (int i = 0; r->rank == 1 && i < 6; i++) {
        struct tensor x = r[0].x;
        sleep_ms(PATIENCE_MS / 4);
        kern_silu(k, x, x);
    }
    kern_most(k, 0);
}

static void who_works_is_waited_for(struct kernel_check *c)
{
    struct rank r[2] = {0};
    r[1].x = kernel_check_random(c, 2, (int64_t[]){2, 2}, 1, 1);
    run(c, r, 2, be_slow);
    assert_true(r[0].ok && r[1].ok);
}

static void differ(struct rank *r, struct kern *k)
{
    kern_agree(k, r->rank, "the rank");
}

static void ranks_that_differ_are_an_error_of_all(struct kernel_check *c)
{
    struct rank r[2] = {0};
    run(c, r, 2, differ);
    for (int i = 0; i < 2; i++) {
        assert_false(r[i].ok);
        assert_non_null(strstr(r[i].error, "the rank differs between ranks"));
    }
}

int main(void)
{
    const struct kernel_check_test tests[] = {
        KERNEL_CHECK_TEST(all_ranks_get_the_same_sum),
        KERNEL_CHECK_TEST(each_part_is_had_by_all),
        KERNEL_CHECK_TEST(numbers_are_heard_by_all),
        KERNEL_CHECK_TEST(alone_there_is_nothing_to_do),
        KERNEL_CHECK_TEST(a_checksum_is_of_its_row_alone),
        KERNEL_CHECK_TEST(what_one_rank_lacks_all_lack_and_the_next_piece_succeeds),
        KERNEL_CHECK_TEST(who_leaves_says_why),
        KERNEL_CHECK_TEST(the_rank_that_has_the_trouble_is_believed),
        KERNEL_CHECK_TEST(a_rank_is_waited_for_when_all_others_have_come),
        KERNEL_CHECK_TEST(a_silent_rank_ends_the_team),
        KERNEL_CHECK_TEST(who_works_is_waited_for),
        KERNEL_CHECK_TEST(ranks_that_differ_are_an_error_of_all),
    };
    return kernel_check_main(tests, sizeof tests / sizeof tests[0]);
}
