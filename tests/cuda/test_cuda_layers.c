/* test_cuda_layers.c - weights that come to the device layer by layer give the bits of weights that are there. If this breaks,
 * a model that is larger than its card computes with half of a layer, or with the one before.
 *
 * The program stands between the backend and the runtime (its functions are found first) and makes copies or computation
 * slow, so that each of the two waits is needed; the broken twins are the same backend with one of them left out. */
#include <dlfcn.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "cuda_pair.h"
#include "kern_module.h"

#define LAYERS 6
#define WIDTH 64
#define ROWS 32
#define SLOW_US 20000
#define TWIN_TURNS 10 /* ThreadSanitizer takes streams as ordered where they happen to meet at a lock: one turn in three */

/* --- between backend and runtime ---------------------------------------------------------------------------- */

/* Of the runtime, as far as it is needed here; streams and events are pointers. */
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags);
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream);
int cudaEventRecord(void *event, void *stream);

static struct {
    int (*wait_event)(void *stream, void *event, unsigned flags);
    int (*copy)(void *to, const void *from, size_t bytes, int kind, void *stream);
    int (*record)(void *event, void *stream);
    int (*host_function)(void *stream, void (*fn)(void *), void *context);
} runtime;

enum side { NONE, COMPUTING, COPYING };
static enum side slow, forgetful; /* whose work takes long; which stream does not wait */
static void *copying;             /* the second stream */

static enum side side_of(const void *stream)
{
    return stream == copying ? COPYING : COMPUTING;
}

static void sleep_a_while(void *context)
{
    (void)context;
    usleep(SLOW_US);
}

/* The first to wait for an event is the second stream: a layer is fetched before one is used. */
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags)
{
    if (!copying)
        copying = stream;
    return side_of(stream) == forgetful ? 0 : runtime.wait_event(stream, event, flags);
}

int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream)
{
    if (slow == COPYING && copying && side_of(stream) == COPYING)
        runtime.host_function(stream, sleep_a_while, NULL);
    return runtime.copy(to, from, bytes, kind, stream);
}

/* The computation with a layer is queued behind the event that the next fetch records. */
int cudaEventRecord(void *event, void *stream)
{
    int status = runtime.record(event, stream);
    if (slow == COMPUTING && copying && side_of(stream) == COMPUTING)
        runtime.host_function(stream, sleep_a_while, NULL);
    return status;
}

static int find_runtime(void **state)
{
    (void)state;
    void *module = dlopen(getenv("KILN_CUDA_MODULE"), RTLD_NOW | RTLD_LOCAL);
    if (!module)
        return -1;
    *(void **)&runtime.wait_event = dlsym(module, "cudaStreamWaitEvent");
    *(void **)&runtime.copy = dlsym(module, "cudaMemcpyAsync");
    *(void **)&runtime.record = dlsym(module, "cudaEventRecord");
    *(void **)&runtime.host_function = dlsym(module, "cudaLaunchHostFunc");
    return runtime.wait_event && runtime.copy && runtime.record && runtime.host_function ? 0 : -1;
}

/* --- a chain of layers --------------------------------------------------------------------------------------- */

struct chain {
    struct kern *k;
    struct kern_layer *layers[LAYERS];      /* NULL: the weights are on the device */
    struct kern_weight *weights[LAYERS][2];
};

static void make_chain(struct chain *c, struct kern *k, bool is_streamed)
{
    float values[WIDTH * WIDTH];
    uint32_t seed = 7;
    *c = (struct chain){.k = k};
    for (int i = 0; i < LAYERS; i++) {
        c->layers[i] = is_streamed ? kern_layer_begin(k) : NULL;
        for (int n = 0; n < 2; n++) {
            for (int v = 0; v < WIDTH * WIDTH; v++)
                values[v] = 0.2f * cuda_pair_random(&seed);
            c->weights[i][n] = kern_weight_linear(k, TENSOR_BF16, tensor_2d(values, TENSOR_F32, WIDTH, WIDTH), (struct tensor){0});
        }
        kern_layer_end(k, c->layers[i]);
    }
    if (!kern_sync(k))
        fail_msg("%s", kern_error(k));
}

static void end_chain(struct chain *c)
{
    for (int i = 0; i < LAYERS; i++) {
        kern_weight_free(c->k, c->weights[i][0]);
        kern_weight_free(c->k, c->weights[i][1]);
        kern_layer_free(c->k, c->layers[i]);
    }
}

/* The first from i on that is in host memory. */
static int next_late(const struct chain *c, int i)
{
    while (i < LAYERS && !c->layers[i])
        i++;
    return i;
}

/* What comes out at the end, as kern.h shows it. */
static void run_chain(const struct chain *c, float *out)
{
    int late = next_late(c, 0), seat = 0;
    struct kern *k = c->k;
    float values[ROWS * WIDTH];
    uint32_t seed = 11;
    size_t mark = kern_mark(k);
    struct tensor x = kern_temp(k, TENSOR_BF16, 2, (int64_t[]){ROWS, WIDTH}), y = kern_temp(k, TENSOR_BF16, 2, x.shape), seats[2];
    for (int i = 0; i < 2 && late < LAYERS; i++)
        seats[i] = kern_temp(k, TENSOR_U8, 1, (int64_t[]){(int64_t)kern_layer_bytes(c->layers[late])});
    for (int v = 0; v < ROWS * WIDTH; v++)
        values[v] = cuda_pair_random(&seed);
    kern_write(k, x, tensor_2d(values, TENSOR_F32, ROWS, WIDTH));
    if (late < LAYERS)
        kern_layer_fetch(k, c->layers[late], seats[seat]);
    for (int i = 0; i < LAYERS; i++) {
        if (c->layers[i]) {
            kern_layer_use(k, c->layers[i]);
            late = next_late(c, i + 1);
            seat = !seat;
        }
        if (c->layers[i] && late < LAYERS)
            kern_layer_fetch(k, c->layers[late], seats[seat]);
        kern_linear(k, y, x, c->weights[i][0]);
        kern_linear(k, x, y, c->weights[i][1]);
    }
    kern_read(k, tensor_2d(out, TENSOR_F32, ROWS, WIDTH), x);
    kern_rewind(k, mark);
    if (!kern_sync(k))
        fail_msg("%s", kern_error(k));
}

/* Are the bits those of weights on the device, in each of two runs? */
static bool is_right(enum side slow_side, enum side forgetful_side)
{
    char why[512];
    float want[ROWS * WIDTH], got[2][ROWS * WIDTH];
    struct chain resident, streamed;
    slow = slow_side, forgetful = forgetful_side, copying = NULL;
    struct kern *k = kern_module_open("cuda", NULL, why, sizeof why);
    if (!k)
        fail_msg("%s", why);
    make_chain(&resident, k, false);
    run_chain(&resident, want);
    make_chain(&streamed, k, true);
    run_chain(&streamed, got[0]);
    run_chain(&streamed, got[1]);
    end_chain(&resident);
    end_chain(&streamed);
    kern_close(k);
    slow = forgetful = NONE;
    return memcmp(want, got[0], sizeof want) == 0 && memcmp(want, got[1], sizeof want) == 0;
}

static void layers_that_come_late_are_waited_for(void **state)
{
    (void)state;
    assert_true(is_right(NONE, NONE));
    assert_true(is_right(COPYING, NONE));
}

static void a_seat_is_not_filled_while_it_is_read(void **state)
{
    (void)state;
    assert_true(is_right(COMPUTING, NONE));
}

static void without_either_wait_the_bits_are_wrong(void **state)
{
    (void)state;
    for (int turn = 0; turn < TWIN_TURNS; turn++) {
        assert_false(is_right(COPYING, COMPUTING));
        assert_false(is_right(COMPUTING, COPYING));
    }
}

static void move_layer(struct chain *c, int i)
{
    c->layers[i] = kern_layer_begin(c->k);
    kern_layer_take(c->k, c->layers[i], c->weights[i][0]);
    kern_layer_take(c->k, c->layers[i], c->weights[i][1]);
    kern_layer_end(c->k, c->layers[i]);
}

static void layers_move_to_the_host_and_keep_their_bits(void **state)
{
    char why[512];
    struct chain c;
    float before[ROWS * WIDTH], after[ROWS * WIDTH];
    static const int moved[] = {1, 3, 4, 0, 2, 5};
    (void)state;
    slow = COPYING, copying = NULL;
    struct kern *k = kern_module_open("cuda", NULL, why, sizeof why);
    make_chain(&c, k, false);
    run_chain(&c, before);
    size_t bytes = kern_peak_bytes(k);
    for (int i = 0; i < LAYERS; i++) {
        move_layer(&c, moved[i]);
        run_chain(&c, after);
        assert_memory_equal(before, after, sizeof before);
    }
    assert_true(kern_peak_bytes(k) <= bytes - (size_t)(LAYERS - 2) * 2 * WIDTH * WIDTH * 2); /* two seats are in the arena now */
    end_chain(&c);
    assert_true(kern_sync(k));
    kern_close(k);
    slow = NONE;
}

/* An error between fetch and use: the copy may still run when its seat is given to others. */
static void what_was_fetched_and_not_used_is_waited_for_at_recovery(void **state)
{
    char why[512];
    struct chain c;
    float before[ROWS * WIDTH], after[ROWS * WIDTH];
    (void)state;
    slow = COPYING, copying = NULL;
    struct kern *k = kern_module_open("cuda", NULL, why, sizeof why);
    make_chain(&c, k, true);
    run_chain(&c, before);
    size_t mark = kern_mark(k), bytes = kern_layer_bytes(c.layers[0]);
    kern_layer_fetch(k, c.layers[0], kern_temp(k, TENSOR_U8, 1, (int64_t[]){(int64_t)bytes}));
    kern_temp(k, TENSOR_U8, 1, (int64_t[]){INT64_MAX / 2});
    assert_true(kern_error_is_memory(kern_error(k)));
    kern_rewind(k, mark);
    assert_true(kern_recover(k));
    run_chain(&c, after);
    assert_memory_equal(before, after, sizeof before);
    end_chain(&c);
    kern_close(k);
    slow = NONE;
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(layers_that_come_late_are_waited_for),
        cmocka_unit_test(a_seat_is_not_filled_while_it_is_read),
        cmocka_unit_test(layers_move_to_the_host_and_keep_their_bits),
        cmocka_unit_test(what_was_fetched_and_not_used_is_waited_for_at_recovery),
    };
    const struct CMUnitTest twins[] = {cmocka_unit_test(without_either_wait_the_bits_are_wrong)};
    bool is_broken = argc == 2 && strcmp(argv[1], "broken") == 0; /* under ThreadSanitizer: two reports */
    return is_broken ? cmocka_run_group_tests_name("cuda_layers.broken", twins, find_runtime, NULL)
                     : cmocka_run_group_tests_name("cuda_layers", tests, find_runtime, NULL);
}
