/* test_cuda_faults.c - every allocation and every launch of the CUDA backend made to fail, one after the other. If this
 * breaks, a card that is short of memory or falls off the bus takes a worker's memory with it, is blamed on the wrong
 * cause, or leaves pictures that are wrong.
 *
 * Faults are the simulator's (tests/cudasim/README.md): the program asks it through the module it opened. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "cuda_simulator.h"
#include "engine.h"
#include "kern_module.h"

#define MODEL "tests/golden/models/pocket"
#define SIDE 64
#define FAULTS_MAX 4000

static void nothing_is_left(const char *after, int n)
{
    char text[1024] = "";
    if (cuda_simulator.leaks(text, sizeof text) != 0)
        fail_msg("after %s %d: %s", after, n, text);
}

static void set_fault(const char *point, int n)
{
    char list[64];
    snprintf(list, sizeof list, "%s:%d", point, n);
    assert_true(cuda_simulator.fault(list));
}

/* --- a backend's life ------------------------------------------------------------------------------------- */

/* Some of every op; false when the backend says so at the end. */
static bool use(struct kern *k, char *text, size_t bytes, bool *ret_is_memory)
{
    static float values[128 * 128], out[128 * 128];
    size_t mark = kern_mark(k);
    bool ok = true;
    for (int d = 0; d < 2; d++) {
        enum tensor_dtype dtype = d ? TENSOR_BF16 : TENSOR_F32;
        struct tensor bias = d ? (struct tensor){0} : tensor_1d(values, TENSOR_F32, 64); /* without: by the library */
        struct kern_weight *w = kern_weight_linear(k, dtype, tensor_2d(values, TENSOR_F32, 64, 64), bias);
        struct kern_layer *layer = kern_layer_begin(k);
        struct kern_weight *late = kern_weight_linear(k, dtype, tensor_2d(values, TENSOR_F32, 64, 64), (struct tensor){0});
        kern_layer_end(k, layer);
        struct quant_run codes = {{.format = QUANT_FP8_E4M3, .n = 64, .k = 64, .data = values, .scale = 1}, 0, 64};
        struct kern_weight *kept = kern_weight_quant(k, dtype, &codes, 1);
        struct kern_layer *away = kern_layer_begin(k);
        if (kept && away)
            kern_layer_take(k, away, kept);
        kern_layer_end(k, away);
        struct kern_weight *c = kern_weight_conv(k, dtype, tensor_4d(values, TENSOR_F32, 16, 5, 3, 3), (struct tensor){0});
        struct tensor vector = kern_upload(k, dtype, tensor_1d(values, TENSOR_F32, 64));
        int64_t heads[4] = {2, 16, 2, 32}, picture[4] = {1, 8, 8, 5}, wide[4] = {1, 8, 8, 16}, rows[2] = {32, 64};
        struct tensor x = kern_temp(k, dtype, 2, rows), y = kern_temp(k, dtype, 2, rows);
        struct tensor p = kern_temp(k, dtype, 4, picture), q = kern_temp(k, dtype, 4, wide);
        struct tensor seat = kern_temp(k, TENSOR_U8, 1, (int64_t[]){64 * 64 * 4});
        if (w && c && late && kept && away && seat.data && vector.data && x.data && y.data && p.data && q.data) {
            kern_write(k, x, tensor_2d(values, TENSOR_F32, 32, 64));
            kern_layer_fetch(k, layer, seat);
            kern_layer_use(k, layer);
            kern_linear(k, y, x, late);
            kern_linear(k, x, y, w);
            kern_layer_fetch(k, away, seat);
            kern_layer_use(k, away);
            kern_linear(k, y, x, kept);
            kern_copy(k, y, x);
            kern_rms_norm(k, y, y, vector, 1e-6f, KERN_ROUND_ONCE);
            kern_attention(k, tensor_shape(x, 4, heads), tensor_shape(y, 4, heads), tensor_shape(y, 4, heads), tensor_shape(y, 4, heads),
                           0.1f, (struct kern_mask){0});
            kern_gated_add(k, x, vector, y);
            kern_write(k, p, tensor_4d(values, TENSOR_F32, 1, 8, 8, 5));
            kern_conv2d(k, q, p, c, 1, 1);
            kern_group_norm(k, q, q, tensor_slice(vector, 0, 0, 16), tensor_slice(vector, 0, 16, 16), 4, 1e-6f, true);
            kern_has_nan(k, q);
            kern_read(k, tensor_2d(out, TENSOR_F32, 32, 64), x);
        }
        ok = kern_sync(k);
        kern_release(k, vector);
        kern_weight_free(k, w);
        kern_weight_free(k, c);
        kern_weight_free(k, late);
        kern_weight_free(k, kept);
        kern_layer_free(k, layer);
        kern_layer_free(k, away);
        if (!ok)
            break;
    }
    snprintf(text, bytes, "%s", kern_error(k));
    *ret_is_memory = kern_error_is_memory(text);
    kern_rewind(k, mark);
    return ok;
}

/* Fails the n-th of `point` for n = 1, 2 .. until a life goes by without a fault; the number of faults. */
static int every_fault(const char *point, bool must_be_memory)
{
    for (int n = 1; n < FAULTS_MAX; n++) {
        char text[512] = "";
        bool is_memory = false, ok = false;
        set_fault(point, n);
        struct kern *k = kern_module_open("cuda", NULL, text, sizeof text);
        if (k)
            ok = use(k, text, sizeof text, &is_memory);
        else
            is_memory = kern_error_is_memory(text);
        cuda_simulator.fault("");
        if (!ok && !*text)
            fail_msg("%s:%d: no sentence", point, n);
        if (!ok && must_be_memory != is_memory)
            fail_msg("%s:%d: '%s' is the wrong kind", point, n, text);
        if (k && !ok && is_memory) {
            char again[512];
            bool ignored;
            if (!kern_recover(k))
                fail_msg("%s:%d: '%s' is not got over: %s", point, n, text, kern_error(k));
            if (!use(k, again, sizeof again, &ignored))
                fail_msg("%s:%d: the next use: %s", point, n, again);
        }
        if (k && !ok && !is_memory)
            assert_false(kern_recover(k));
        kern_close(k);
        cuda_simulator.restore();
        nothing_is_left(point, n);
        if (ok)
            return n - 1;
    }
    fail_msg("%s: no end after %d faults", point, FAULTS_MAX);
    return 0;
}

static void every_allocation_may_fail(void **state)
{
    (void)state;
    int device = every_fault("malloc", true), host = every_fault("hostalloc", true);
    print_message("%d allocations of the device, %d of the host\n", device, host);
    assert_true(device > 10 && host == 6);
}

static void every_launch_may_fail(void **state)
{
    (void)state;
    int launches = every_fault("launch", false), kernels = every_fault("kernel", false), lost = every_fault("lost", false);
    print_message("%d launches refused, %d kernels crashed, device lost at %d points\n", launches, kernels, lost);
    assert_true(launches > 15 && kernels > 15 && lost > 15);
}

static void every_copy_wait_and_product_may_fail(void **state)
{
    (void)state;
    static const char *const points[] = {"copy", "sync", "stream", "event", "blas"};
    for (int i = 0; i < 5; i++)
        print_message("%s: %d points\n", points[i], every_fault(points[i], false));
}

/* --- a graph's ------------------------------------------------------------------------------------------------ */

struct twice {
    struct kern *k;
    struct tensor x;
};

static void add_and_silu(void *context)
{
    const struct twice *t = context;
    kern_add(t->k, t->x, t->x, t->x);
    kern_silu(t->k, t->x, t->x);
}

/* Two launches of one graph; ret gets the values. */
static bool use_graph(struct kern *k, float *ret)
{
    float values[64];
    size_t mark = kern_mark(k);
    for (int i = 0; i < 64; i++)
        values[i] = (float)(i - 32) / 16;
    struct twice t = {k, kern_temp(k, TENSOR_F32, 1, (int64_t[]){64})};
    if (t.x.data) {
        kern_write(k, t.x, tensor_1d(values, TENSOR_F32, 64));
        kern_graph(k, add_and_silu, &t);
        kern_graph(k, add_and_silu, &t);
        kern_read(k, tensor_1d(ret, TENSOR_F32, 64), t.x);
    }
    bool ok = kern_sync(k);
    kern_rewind(k, mark);
    return ok;
}

/* The n-th of `point` for n = 1 .. last: the values are right or there is a sentence, and nothing is left. How many were got
 * over. */
static int graph_faults(const char *point, int last, const float *want)
{
    int good = 0;
    for (int n = 1; n <= last; n++) {
        char why[512];
        float got[64] = {0};
        struct kern *k = kern_module_open("cuda", NULL, why, sizeof why);
        assert_non_null(k);
        set_fault(point, n);
        bool ok = use_graph(k, got);
        cuda_simulator.fault("");
        if (ok)
            assert_memory_equal(got, want, sizeof got);
        else
            assert_true(*kern_error(k));
        if (!ok && kern_error_is_memory(kern_error(k))) {
            assert_true(kern_recover(k));
            assert_true(use_graph(k, got));
            assert_memory_equal(got, want, sizeof got);
        }
        good += ok;
        kern_close(k);
        cuda_simulator.restore();
        nothing_is_left(point, n);
    }
    return good;
}

/* One capture has three calls that may be refused: it begins, it ends, it becomes a graph. Of launches, the two inside the capture
 * are got over and those of the graph are not; a kernel that crashes has crashed. */
static void a_graph_that_cannot_be_had_is_done_without(void **state)
{
    (void)state;
    float want[64];
    char why[512];
    struct kern *k = kern_module_open("cuda", NULL, why, sizeof why);
    assert_non_null(k);
    assert_true(use_graph(k, want));
    kern_close(k);
    assert_int_equal(graph_faults("graph", 4, want), 4);
    assert_int_equal(graph_faults("launch", 4, want), 2);
    assert_int_equal(graph_faults("malloc", 1, want), 0);
    assert_int_equal(graph_faults("kernel", 4, want), 0);
    graph_faults("any", 24, want);
    graph_faults("lost", 16, want);
}

/* --- an engine's --------------------------------------------------------------------------------------------- */

static bool open_engine(struct engine **ret, struct engine_error *why)
{
    return engine_open(ret, &(struct engine_options){.model_dir = MODEL, .precision = ENGINE_BF16, .device = "cuda",
                                                       .plan_width = SIDE, .plan_height = SIDE}, why);
}

static bool paint_size(struct engine *e, int side, struct engine_image *image, struct engine_error *why)
{
    struct engine_request r = {.prompt = "a fox", .width = side, .height = side, .steps = 1, .seed = 3};
    engine_request_defaults(e, &r);
    return engine_generate(e, &r, 1, image, NULL, why);
}

static bool paint(struct engine *e, struct engine_image *image, struct engine_error *why)
{
    return paint_size(e, SIDE, image, why);
}

/* Opening a model that does not fit at its 1st, 2nd, 4th, 8th .. allocation. */
static void a_model_that_does_not_fit_leaves_nothing(void **state)
{
    (void)state;
    for (int n = 1;; n *= 2) {
        struct engine *e = NULL;
        struct engine_error why = {0};
        set_fault("malloc", n);
        bool ok = open_engine(&e, &why);
        cuda_simulator.fault("");
        if (ok) {
            engine_close(e);
            nothing_is_left("malloc", n);
            assert_true(n > 100);
            return;
        }
        if (why.fault != ENGINE_NO_MEMORY)
            fail_msg("malloc:%d: %s: %s", n, engine_error_fault(why.fault), why.text);
        nothing_is_left("malloc", n);
    }
}

static void after_a_batch_without_memory_the_next_is_the_same_as_ever(void **state)
{
    (void)state;
    struct engine *e;
    struct engine_error why = {0};
    struct engine_image good, image;
    assert_true(open_engine(&e, &why));
    set_fault("malloc", 1);
    if (!paint(e, &good, &why))
        fail_msg("a batch as expected at open allocates: %s", why.text);
    assert_false(paint_size(e, 4 * SIDE, &image, &why));
    assert_int_equal(why.fault, ENGINE_NO_MEMORY);
    cuda_simulator.fault("");
    if (!paint(e, &image, &why))
        fail_msg("%s", why.text);
    assert_memory_equal(image.rgb, good.rgb, (size_t)good.width * (size_t)good.height * 3);
    engine_image_done(&image);
    set_fault("malloc", 1);
    if (!paint(e, &image, &why))
        fail_msg("the next batch of a shape allocates: %s", why.text);
    cuda_simulator.fault("");
    engine_image_done(&image);
    engine_image_done(&good);
    engine_close(e);
    nothing_is_left("close", 0);
}

/* What references need finds no memory when the first is checked: the next picture knows nothing of it. */
static void a_check_without_memory_is_not_the_next_pictures(void **state)
{
    (void)state;
    static const uint8_t rgb[SIDE * SIDE * 3];
    const struct engine_reference reference = {SIDE, SIDE, rgb};
    struct engine_request r = {.prompt = "", .width = SIDE, .height = SIDE, .steps = 1, .references = &reference, .reference_count = 1};
    struct engine *e;
    struct engine_error why = {0};
    struct engine_image image;
    assert_true(open_engine(&e, &why));
    set_fault("malloc", 2);
    assert_false(engine_check(e, &r, &why));
    assert_int_equal(why.fault, ENGINE_NO_MEMORY);
    cuda_simulator.fault("");
    if (!paint(e, &image, &why))
        fail_msg("%s", why.text);
    engine_image_done(&image);
    assert_true(engine_check(e, &r, &why));
    engine_close(e);
    nothing_is_left("close", 0);
}

/* Adapters that find no memory at their 1st, 2nd, 4th .. allocation are refused; then they, or none, are taken. */
static void adapters_without_memory_leave_the_model_as_it_was(void **state)
{
    (void)state;
    static const struct engine_adapter adapter = {"tests/golden/files/lora-peft.safetensors", 0.7f};
    struct engine *e;
    struct engine_error why = {0};
    struct engine_image plain, adapted, image;
    assert_true(open_engine(&e, &why) && paint(e, &plain, &why));
    for (int n = 1, is_over = 0; !is_over; n *= 2) {
        set_fault("malloc", n);
        is_over = engine_adapt(e, &adapter, 1, &why);
        cuda_simulator.fault("");
        if (!is_over && why.fault != ENGINE_NO_MEMORY)
            fail_msg("malloc:%d: %s: %s", n, engine_error_fault(why.fault), why.text);
        assert_true(is_over || !paint(e, &image, &why));
        if (!engine_adapt(e, NULL, 0, &why) || !paint(e, &image, &why))
            fail_msg("malloc:%d: then without adapters: %s", n, why.text);
        assert_memory_equal(image.rgb, plain.rgb, (size_t)plain.width * (size_t)plain.height * 3);
        engine_image_done(&image);
        assert_true(!is_over || n > 16);
    }
    assert_true(engine_adapt(e, &adapter, 1, &why) && paint(e, &adapted, &why));
    assert_memory_not_equal(adapted.rgb, plain.rgb, (size_t)plain.width * (size_t)plain.height * 3);
    engine_image_done(&plain);
    engine_image_done(&adapted);
    engine_close(e);
    nothing_is_left("close", 0);
}

/* The step's and the decoder's: without either the picture is the same. */
static void a_batch_without_a_graph_is_the_same_picture(void **state)
{
    (void)state;
    struct engine_image good, image;
    struct engine_error why = {0};
    for (int n = 0; n <= 4; n += 2) {
        struct engine *e;
        assert_true(open_engine(&e, &why));
        if (n)
            set_fault("graph", n);
        if (!paint(e, n ? &image : &good, &why))
            fail_msg("graph:%d: %s", n, why.text);
        cuda_simulator.fault("");
        if (n) {
            assert_memory_equal(image.rgb, good.rgb, (size_t)good.width * (size_t)good.height * 3);
            engine_image_done(&image);
        }
        engine_close(e);
        nothing_is_left("graph", n);
    }
    engine_image_done(&good);
}

static void a_lost_device_is_called_so(void **state)
{
    (void)state;
    static const int when[] = {1, 50, 333};
    for (int i = 0; i < 3; i++) {
        struct engine *e;
        struct engine_error why = {0};
        struct engine_image image;
        assert_true(open_engine(&e, &why));
        set_fault("kernel", when[i]);
        assert_false(paint(e, &image, &why));
        assert_int_equal(why.fault, ENGINE_DEVICE);
        assert_non_null(strstr(why.text, "device lost"));
        assert_false(paint(e, &image, &why));
        assert_int_equal(why.fault, ENGINE_DEVICE);
        engine_close(e);
        cuda_simulator.fault("");
        cuda_simulator.restore(); /* the process is started again */
        nothing_is_left("kernel", when[i]);
        assert_true(open_engine(&e, &why));
        if (!paint(e, &image, &why))
            fail_msg("%s", why.text);
        engine_image_done(&image);
        engine_close(e);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_allocation_may_fail),
        cmocka_unit_test(every_launch_may_fail),
        cmocka_unit_test(every_copy_wait_and_product_may_fail),
        cmocka_unit_test(a_graph_that_cannot_be_had_is_done_without),
        cmocka_unit_test(a_model_that_does_not_fit_leaves_nothing),
        cmocka_unit_test(after_a_batch_without_memory_the_next_is_the_same_as_ever),
        cmocka_unit_test(a_check_without_memory_is_not_the_next_pictures),
        cmocka_unit_test(adapters_without_memory_leave_the_model_as_it_was),
        cmocka_unit_test(a_batch_without_a_graph_is_the_same_picture),
        cmocka_unit_test(a_lost_device_is_called_so),
    };
    return cmocka_run_group_tests_name("cuda_faults", tests, cuda_simulator_find, NULL);
}
