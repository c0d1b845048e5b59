/* test_cuda_graph.c - work that is launched as a graph does what it would do operation by operation. If this breaks, a step
 * computes with the memory, the weights or the numbers of another one, and the picture looks nearly right. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "cuda_pair.h"
#include "kern_module.h"

enum { ROWS = 12, WIDTH = 32 };

/* A few operations, and how often they were asked for. How often tells what became of them: a graph is launched without being
 * asked beyond the list (1), made (2), or could not be had (2 when the list is refused, 3 when a capture is). */
struct job {
    struct kern *k;
    struct tensor x, y, v; /* [ROWS, WIDTH] twice, [WIDTH] */
    const struct kern_weight *w;
    const int32_t *key_count;
    float g;
    int64_t columns; /* of x in the product: what is no multiple of 16 bytes takes memory inside the operation */
    int calls;
};

static void work(void *context)
{
    struct job *j = context;
    size_t mark = kern_mark(j->k);
    struct tensor t = kern_temp(j->k, j->x.dtype, 2, j->x.shape);
    int64_t heads[4] = {2, ROWS / 2, 2, WIDTH / 2};
    j->calls++;
    kern_linear(j->k, t, tensor_slice(j->x, 1, 0, j->columns), j->w);
    kern_gated_add_norm(j->k, j->y, t, j->v, j->x, j->v, j->v, 1e-6f);
    kern_attention(j->k, tensor_shape(t, 4, heads), tensor_shape(t, 4, heads), tensor_shape(j->y, 4, heads),
                   tensor_shape(j->y, 4, heads), 0.3f, (struct kern_mask){.key_count = j->key_count});
    kern_guide(j->k, j->y, t, j->x, j->g);
    kern_rewind(j->k, mark);
}

static void fill(struct kern *k, struct tensor t, uint32_t seed)
{
    float values[ROWS * WIDTH];
    for (int64_t i = 0; i < tensor_count(t); i++)
        values[i] = cuda_pair_random(&seed);
    kern_write(k, t, tensor_of(values, TENSOR_F32, t.rank, t.shape));
}

static struct kern_weight *weight_of(struct kern *k, int64_t columns, uint32_t seed)
{
    float values[WIDTH * WIDTH];
    for (int64_t i = 0; i < WIDTH * columns; i++)
        values[i] = cuda_pair_random(&seed);
    return kern_weight_linear(k, TENSOR_BF16, tensor_2d(values, TENSOR_F32, WIDTH, columns), (struct tensor){0});
}

/* Memory that lives until the caller rewinds. */
static struct job job_of(struct kern *k, uint32_t seed)
{
    int64_t n[2] = {ROWS, WIDTH};
    struct job j = {.k = k, .x = kern_temp(k, TENSOR_BF16, 2, n), .y = kern_temp(k, TENSOR_BF16, 2, n),
                    .v = kern_temp(k, TENSOR_BF16, 1, n + 1), .g = 1.5f, .columns = WIDTH};
    fill(k, j.x, seed);
    fill(k, j.v, seed + 1);
    return j;
}

/* Asks for the job as a graph and by itself: the bits must be equal, and the graph must be had the way `calls` says. */
static void check(struct job *j, int calls, const char *what)
{
    j->calls = 0;
    kern_graph(j->k, work, j);
    if (j->calls != calls)
        fail_msg("%s: asked %d times, want %d", what, j->calls, calls);
    float *got = cuda_pair_floats(j->k, j->y);
    fill(j->k, j->y, 99);
    work(j);
    float *want = cuda_pair_floats(j->k, j->y);
    if (!kern_sync(j->k))
        fail_msg("%s: %s", what, kern_error(j->k));
    if (memcmp(got, want, (size_t)tensor_count(j->y) * sizeof *got) != 0)
        fail_msg("%s: other bits than operation by operation", what);
    free(got);
    free(want);
}

static void the_same_work_is_launched_with_new_values(void **state)
{
    struct kern *k = ((const struct cuda_pair *)*state)->cuda;
    size_t mark = kern_mark(k);
    struct kern_weight *w = weight_of(k, WIDTH, 1);
    struct job j = job_of(k, 10);
    j.w = w;
    check(&j, 2, "the first time");
    for (uint32_t seed = 20; seed < 23; seed++) {
        fill(k, j.x, seed);
        fill(k, j.v, seed + 7);
        check(&j, 1, "again, other values");
    }
    kern_rewind(k, mark);
    j = job_of(k, 30);
    j.w = w;
    check(&j, 1, "the next batch, at the same addresses");
    kern_weight_free(k, w);
    kern_rewind(k, mark);
}

static void other_work_is_another_graph(void **state)
{
    struct kern *k = ((const struct cuda_pair *)*state)->cuda;
    size_t mark = kern_mark(k);
    struct kern_weight *w = weight_of(k, WIDTH, 1), *other = weight_of(k, WIDTH, 2);
    struct job j = job_of(k, 40), next;
    j.w = w;
    j.g = 2;
    check(&j, 2, "another number");
    check(&j, 1, "the same number");
    j.w = other;
    check(&j, 2, "another weight");
    next = job_of(k, 50);
    next.w = w;
    next.g = 2;
    check(&next, 2, "other addresses");
    next.x = tensor_slice(next.x, 0, 0, ROWS); /* the same view, made another way */
    check(&next, 1, "the same addresses");
    next.x = j.x;
    check(&next, 2, "one other tensor");
    kern_weight_free(k, other);
    next.w = other = weight_of(k, WIDTH, 3);
    check(&next, 2, "a weight in the place of another");
    kern_weight_free(k, w);
    kern_weight_free(k, other);
    kern_rewind(k, mark);
}

static void what_cannot_be_a_graph_is_done_without(void **state)
{
    static const int32_t key_count[2] = {3, 5};
    struct kern *k = ((const struct cuda_pair *)*state)->cuda;
    size_t mark = kern_mark(k);
    struct kern_weight *w = weight_of(k, WIDTH, 1);
    struct job j = job_of(k, 60);
    j.w = w;
    j.key_count = key_count;
    check(&j, 2, "counts in the host's memory");
    check(&j, 2, "and again");
    kern_weight_free(k, w);
    kern_rewind(k, mark);
}

static void a_weight_that_left_the_device_took_its_graph_with_it(void **state)
{
    struct kern *k = ((const struct cuda_pair *)*state)->cuda;
    size_t mark = kern_mark(k);
    struct kern_weight *w = weight_of(k, WIDTH, 1);
    struct job j = job_of(k, 65);
    j.w = w;
    j.g = 2.5f;
    check(&j, 2, "on the device");
    check(&j, 1, "its graph");
    struct kern_layer *l = kern_layer_begin(k);
    kern_layer_take(k, l, w);
    kern_layer_end(k, l);
    struct tensor seat = kern_temp(k, TENSOR_U8, 1, (int64_t[]){(int64_t)kern_layer_bytes(l)});
    kern_layer_fetch(k, l, seat);
    kern_layer_use(k, l);
    check(&j, 2, "back, elsewhere");
    kern_weight_free(k, w);
    kern_layer_free(k, l);
    kern_rewind(k, mark);
}

/* The arena of a device that was just opened has one block. Its end is reached inside an operation, while a graph is made. */
static void an_arena_that_grows_costs_the_graph_and_nothing_else(void **state)
{
    (void)state;
    char why[256];
    struct kern *k = kern_module_open("cuda", NULL, why, sizeof why);
    if (!k)
        fail_msg("%s", why);
    kern_reserve(k, 1 << 20);
    struct kern_weight *w = weight_of(k, WIDTH - 3, 1);
    struct job j = job_of(k, 70);
    j.w = w;
    j.columns = WIDTH - 3;
    size_t inside = 0x400; /* the temporary of `work`, rounded up: what is left is too little for the operation's own */
    kern_temp(k, TENSOR_U8, 1, (int64_t[]){(int64_t)((1 << 20) - kern_mark(k) - inside)});
    check(&j, 3, "no room while the graph is made");
    check(&j, 2, "there is room now");
    check(&j, 1, "and a graph");
    kern_rewind(k, 0);
    j = job_of(k, 80); /* the pointer is at 0: two blocks become one, elsewhere */
    j.w = w;
    j.columns = WIDTH - 3;
    check(&j, 2, "another arena");
    check(&j, 1, "its graph");
    kern_weight_free(k, w);
    kern_close(k);
}

static void more_shapes_than_there_are_graphs_take_turns(void **state)
{
    enum { MANY = 70 };
    struct kern *k = ((const struct cuda_pair *)*state)->cuda;
    size_t mark = kern_mark(k);
    struct kern_weight *w = weight_of(k, WIDTH, 1);
    struct job j = job_of(k, 90);
    j.w = w;
    for (int i = 0; i < (CUDA_PAIR_IS_SANITIZED ? 2 : MANY); i++) {
        j.g = 3 + (float)i;
        check(&j, 2, "one more");
    }
    check(&j, 1, "the last is there");
    j.g = 3;
    check(&j, CUDA_PAIR_IS_SANITIZED ? 1 : 2, "the first went");
    kern_weight_free(k, w);
    kern_rewind(k, mark);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_same_work_is_launched_with_new_values),
        cmocka_unit_test(other_work_is_another_graph),
        cmocka_unit_test(what_cannot_be_a_graph_is_done_without),
        cmocka_unit_test(a_weight_that_left_the_device_took_its_graph_with_it),
        cmocka_unit_test(an_arena_that_grows_costs_the_graph_and_nothing_else),
        cmocka_unit_test(more_shapes_than_there_are_graphs_take_turns),
    };
    return cmocka_run_group_tests_name("cuda_graph", tests, cuda_pair_setup, cuda_pair_teardown);
}
