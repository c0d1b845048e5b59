/* test_cuda_sums.c - sums of a team that run while the next product is computed give the bits of sums that are waited for. If this
 * breaks, a team adds up what is only half computed, or computes with what is only half added.
 *
 * The program stands between the backend and the runtime (its functions are found first) and makes computation slow, the simulator makes
 * sums slow, so that each of the two waits is needed; the broken twins are the same backend with one of them left out. */
#include <dlfcn.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "cuda_pair.h"
#include "cuda_simulator.h"
#include "kern_module.h"
#include "kern_team.h"

#define RANKS 2
#define PARTS 2
#define TURNS 3
#define ROWS 48
#define WIDTH 64
#define SLOW_US 10000
#define SHORT_PATIENCE_MS 2000
#define LONG_US 3000000
#define TWIN_TURNS 5 /* as in test_cuda_layers: ThreadSanitizer does not see each of them */

/* --- between backend and runtime ---------------------------------------------------------------------------- */

/* Of the runtime, as far as it is needed here; streams and events are pointers. */
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags);
int cudaEventRecord(void *event, void *stream);

static struct {
    int (*wait_event)(void *stream, void *event, unsigned flags);
    int (*record)(void *event, void *stream);
    int (*host_function)(void *stream, void (*fn)(void *), void *context);
} runtime;

enum side { NONE, COMPUTING, SUMMING, COMPUTING_ONCE };
static enum side slow, forgetful;     /* whose work takes long; which stream does not wait */
static _Thread_local void *summing;   /* the second stream of this thread's rank */
static _Thread_local bool has_slept;

static void sleep_a_while(void *context)
{
    (void)context;
    usleep(slow == COMPUTING_ONCE ? LONG_US : SLOW_US);
}

/* The first to wait for an event is the second stream: a sum is begun before one is ended. */
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags)
{
    if (!summing)
        summing = stream;
    enum side side = stream == summing ? SUMMING : COMPUTING;
    return side == forgetful ? 0 : runtime.wait_event(stream, event, flags);
}

/* What is computed behind the beginning of a sum comes late: the product that the next sum is of. */
int cudaEventRecord(void *event, void *stream)
{
    int status = runtime.record(event, stream);
    if ((slow == COMPUTING || (slow == COMPUTING_ONCE && !has_slept)) && summing && stream != summing) {
        has_slept = true;
        runtime.host_function(stream, sleep_a_while, NULL);
    }
    return status;
}

static int find_runtime(void **state)
{
    void *module = dlopen(getenv("KILN_CUDA_MODULE"), RTLD_NOW | RTLD_LOCAL);
    if (!module || cuda_simulator_find(state) != 0)
        return -1;
    *(void **)&runtime.wait_event = dlsym(module, "cudaStreamWaitEvent");
    *(void **)&runtime.record = dlsym(module, "cudaEventRecord");
    *(void **)&runtime.host_function = dlsym(module, "cudaLaunchHostFunc");
    return runtime.wait_event && runtime.record && runtime.host_function ? 0 : -1;
}

/* --- a chain of products and sums ------------------------------------------------------------------------------ */

struct rank {
    struct kern_team *team;
    int rank, parts;
    bool ok;
    float out[ROWS * WIDTH];
    char error[256];
};

static struct tensor part_of(struct tensor t, int part, int parts)
{
    return tensor_slice(t, 0, ROWS / parts * part, ROWS / parts);
}

/* x = W1 sum(W0 x), some times over. */
static void run_chain(struct rank *r, struct kern *k, struct kern_weight *const w[2])
{
    float values[ROWS * WIDTH];
    uint32_t seed = 11;
    struct tensor x = kern_temp(k, TENSOR_BF16, 2, (int64_t[]){ROWS, WIDTH}), y = kern_temp(k, TENSOR_BF16, 2, x.shape);
    for (int i = 0; i < ROWS * WIDTH; i++)
        values[i] = cuda_pair_random(&seed);
    kern_write(k, x, tensor_2d(values, TENSOR_F32, ROWS, WIDTH));
    for (int turn = 0; turn < TURNS; turn++) {
        for (int p = 0; p < r->parts; p++) {
            kern_linear(k, part_of(y, p, r->parts), part_of(x, p, r->parts), w[0]);
            kern_sum_begin(k, part_of(y, p, r->parts));
        }
        for (int p = 0; p < r->parts; p++) {
            kern_sum_end(k, part_of(y, p, r->parts));
            kern_linear(k, part_of(x, p, r->parts), part_of(y, p, r->parts), w[1]);
        }
    }
    kern_read(k, tensor_2d(r->out, TENSOR_F32, ROWS, WIDTH), x);
}

static struct kern_weight *new_weight(struct kern *k, uint32_t seed)
{
    float values[WIDTH * WIDTH];
    for (int i = 0; i < WIDTH * WIDTH; i++)
        values[i] = 0.2f * cuda_pair_random(&seed);
    return kern_weight_linear(k, TENSOR_BF16, tensor_2d(values, TENSOR_F32, WIDTH, WIDTH), (struct tensor){0});
}

static void *rank_main(void *argument)
{
    struct rank *r = argument;
    char device[16];
    snprintf(device, sizeof device, "cuda:%d", r->rank);
    summing = NULL, has_slept = false;
    struct kern *k = kern_module_open(device, &(struct kern_member){r->team, r->rank, RANKS}, r->error, sizeof r->error);
    if (!k)
        return NULL;
    struct kern_weight *w[2] = {new_weight(k, (uint32_t)r->rank), new_weight(k, 7)};
    r->ok = kern_join(k) && kern_sum_parts(k) == PARTS;
    run_chain(r, k, w);
    r->ok = kern_sync(k) && r->ok;
    snprintf(r->error, sizeof r->error, "%s", kern_error(k));
    kern_weight_free(k, w[0]);
    kern_weight_free(k, w[1]);
    kern_close(k);
    return NULL;
}

static void run_team(struct rank *r, int parts, int patience_ms)
{
    pthread_t threads[RANKS];
    struct kern_team *team = kern_team_open(RANKS, patience_ms);
    for (int i = 0; i < RANKS; i++) {
        r[i] = (struct rank){.team = team, .rank = i, .parts = parts};
        assert_int_equal(pthread_create(&threads[i], NULL, rank_main, &r[i]), 0);
    }
    for (int i = 0; i < RANKS; i++)
        pthread_join(threads[i], NULL);
    kern_team_close(team);
    for (int i = 0; i < RANKS; i++)
        if (!r[i].ok)
            fail_msg("rank %d: %s", i, r[i].error);
}

static struct rank whole[RANKS], cut[RANKS];

/* Are the bits those of sums in one piece, which nothing runs beside, on both ranks? */
static bool is_right(enum side slow_side, enum side forgetful_side)
{
    char fault[32];
    if (!whole[0].ok)
        run_team(whole, 1, KERN_TEAM_PATIENCE_MS);
    snprintf(fault, sizeof fault, "slow:1=%d", SLOW_US / 1000);
    assert_true(cuda_simulator.fault(slow_side == SUMMING ? fault : ""));
    slow = slow_side, forgetful = forgetful_side;
    run_team(cut, PARTS, KERN_TEAM_PATIENCE_MS);
    slow = forgetful = NONE;
    assert_true(cuda_simulator.fault(""));
    assert_memory_equal(whole[0].out, whole[1].out, sizeof whole[0].out);
    return memcmp(whole[0].out, cut[0].out, sizeof cut[0].out) == 0 && memcmp(whole[1].out, cut[1].out, sizeof cut[1].out) == 0;
}

static void sums_that_come_late_are_waited_for(void **state)
{
    (void)state;
    assert_true(is_right(NONE, NONE));
    assert_true(is_right(SUMMING, NONE));
}

static void what_is_summed_is_waited_for(void **state)
{
    (void)state;
    assert_true(is_right(COMPUTING, NONE));
}

/* A pass of a large picture is one piece of work before one sum: it may last longer than ranks that hang are waited for. */
static void a_rank_that_computes_for_long_is_not_given_up(void **state)
{
    (void)state;
    slow = COMPUTING_ONCE;
    run_team(cut, 1, SHORT_PATIENCE_MS);
    slow = NONE;
}

static void without_either_wait_the_bits_are_wrong(void **state)
{
    (void)state;
    for (int turn = 0; turn < TWIN_TURNS; turn++) {
        assert_false(is_right(SUMMING, COMPUTING));
        assert_false(is_right(COMPUTING, SUMMING));
    }
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sums_that_come_late_are_waited_for),
        cmocka_unit_test(what_is_summed_is_waited_for),
        cmocka_unit_test(a_rank_that_computes_for_long_is_not_given_up),
    };
    const struct CMUnitTest twins[] = {cmocka_unit_test(without_either_wait_the_bits_are_wrong)};
    bool is_broken = argc == 2 && strcmp(argv[1], "broken") == 0; /* under ThreadSanitizer: reports */
    return is_broken ? cmocka_run_group_tests_name("cuda_sums.broken", twins, find_runtime, NULL)
                     : cmocka_run_group_tests_name("cuda_sums", tests, find_runtime, NULL);
}
