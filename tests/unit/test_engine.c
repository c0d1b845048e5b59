/* test_engine.c - the engine as its callers use it: what is refused, and that a picture depends on its request alone.
 * If this breaks, batch size, threads or what was rendered before change pictures, or a bad row takes a worker down.
 * Models: the tiny ones of tests/golden. */
#include "engine.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define DISTILLED "tests/golden/models/pocket"
#define BASE "tests/golden/models/base"

static struct engine *open_with(const char *dir, enum engine_precision precision, int threads, const char *isa)
{
    struct engine *e;
    struct engine_error why;
    struct engine_options options = {.model_dir = dir, .precision = precision, .threads = threads, .isa = isa};
    if (!engine_open(&e, &options, &why))
        fail_msg("%s", why.text);
    return e;
}

static struct engine_request request_of(const struct engine *e, const char *prompt, uint64_t seed)
{
    struct engine_request r = {.prompt = prompt, .width = 80, .height = 64, .guidance = NAN, .seed = seed};
    engine_request_defaults(e, &r);
    if (r.steps > 6)
        r.steps = 3; /* base models: enough to see guidance at work */
    return r;
}

static void render(struct engine *e, const struct engine_request *r, int count, struct engine_image *images)
{
    struct engine_error why;
    if (!engine_generate(e, r, count, images, NULL, &why))
        fail_msg("%s", why.text);
}

static void assert_same_pixels(const struct engine_image *a, const struct engine_image *b)
{
    assert_int_equal(a->width, b->width);
    assert_int_equal(a->height, b->height);
    assert_memory_equal(a->rgb, b->rgb, (size_t)a->width * (size_t)a->height * 3);
}

static bool has_same_pixels(const struct engine_image *a, const struct engine_image *b)
{
    return memcmp(a->rgb, b->rgb, (size_t)a->width * (size_t)a->height * 3) == 0;
}

/* --- a picture is a function of its request ------------------------------------------------------------- */

static void batch_changes_no_pixel(const char *dir, enum engine_precision precision)
{
    struct engine *e = open_with(dir, precision, 2, NULL);
    struct engine_request r[7];
    struct engine_image together[7], alone;
    static const char *const prompts[7] = {"a red fox", "a tram in the rain", "a red fox", "", "seven hills", "a bowl", "x"};
    for (int i = 0; i < 7; i++)
        r[i] = request_of(e, prompts[i], 100 + (uint64_t)i);
    render(e, r, 3, together);
    for (int i = 0; i < 3; i++) {
        render(e, &r[i], 1, &alone);
        assert_same_pixels(&together[i], &alone);
        engine_image_done(&alone);
    }
    assert_false(has_same_pixels(&together[0], &together[2])); /* same prompt, other seed */
    for (int i = 0; i < 3; i++)
        engine_image_done(&together[i]);
    /* seven do not fit one group of any stage */
    render(e, r, 7, together);
    for (int i = 0; i < 7; i++) {
        render(e, &r[i], 1, &alone);
        assert_same_pixels(&together[i], &alone);
        engine_image_done(&alone);
        engine_image_done(&together[i]);
    }
    engine_close(e);
}

static void a_batch_of_f32_equals_its_single_renders(void **state)
{
    (void)state;
    batch_changes_no_pixel(DISTILLED, ENGINE_F32);
}

static void a_batch_of_bf16_equals_its_single_renders(void **state)
{
    (void)state;
    batch_changes_no_pixel(DISTILLED, ENGINE_BF16);
}

static void a_batch_with_guidance_equals_its_single_renders(void **state)
{
    (void)state;
    batch_changes_no_pixel(BASE, ENGINE_BF16);
    batch_changes_no_pixel(BASE, ENGINE_F32);
}

static void neither_threads_nor_batch_nor_both_change_a_pixel(void **state)
{
    (void)state;
    for (int precision = 0; precision < 2; precision++) {
        struct engine *one = open_with(DISTILLED, (enum engine_precision)precision, 1, NULL);
        struct engine *two = open_with(DISTILLED, (enum engine_precision)precision, 2, NULL);
        struct engine_request r[3] = {request_of(one, "a tram", 6), request_of(one, "a lighthouse", 7), request_of(one, "x", 8)};
        struct engine_image alone[2], of_one[3], of_two[3];
        render(one, &r[1], 1, &alone[0]);
        render(two, &r[1], 1, &alone[1]);
        render(one, r, 3, of_one);
        render(two, r, 3, of_two);
        assert_same_pixels(&alone[0], &alone[1]);
        assert_same_pixels(&alone[0], &of_one[1]);
        for (int i = 0; i < 3; i++) {
            assert_same_pixels(&of_one[i], &of_two[i]);
            engine_image_done(&of_one[i]);
            engine_image_done(&of_two[i]);
        }
        engine_image_done(&alone[0]);
        engine_image_done(&alone[1]);
        engine_close(one);
        engine_close(two);
    }
}

static void a_remembered_prompt_gives_the_same_pixels(void **state)
{
    (void)state;
    struct engine *e = open_with(BASE, ENGINE_BF16, 2, NULL);
    struct engine_request r = request_of(e, "a lighthouse", 7), other = request_of(e, "something else", 8);
    struct engine_image first, second;
    r.negative = "blurry";
    render(e, &r, 1, &first);
    assert_true(first.timing.encode_s > 0);
    render(e, &other, 1, &second);
    engine_image_done(&second);
    render(e, &r, 1, &second);
    assert_true(second.timing.encode_s == 0);
    assert_same_pixels(&first, &second);
    engine_image_done(&first);
    engine_image_done(&second);
    engine_close(e);
}

static void another_shape_in_between_changes_nothing(void **state)
{
    (void)state;
    struct engine *e = open_with(DISTILLED, ENGINE_BF16, 2, NULL);
    struct engine_request small = request_of(e, "a map", 3), large = request_of(e, "a map", 3);
    struct engine_image a, b, c;
    large.width = 176, large.height = 96;
    render(e, &small, 1, &a);
    render(e, &large, 1, &b);
    render(e, &small, 1, &c);
    assert_same_pixels(&a, &c);
    engine_image_done(&a);
    engine_image_done(&b);
    engine_image_done(&c);
    engine_close(e);
}

static void prompt_seed_and_negative_each_matter(void **state)
{
    (void)state;
    struct engine *e = open_with(BASE, ENGINE_F32, 2, NULL);
    struct engine_request r[4];
    struct engine_image images[4];
    for (int i = 0; i < 4; i++)
        r[i] = request_of(e, "a map", 3);
    r[1].prompt = "a lighthouse";
    r[2].seed = 4;
    r[3].negative = "a map";
    render(e, r, 4, images);
    for (int i = 1; i < 4; i++)
        assert_false(has_same_pixels(&images[0], &images[i]));
    for (int i = 0; i < 4; i++)
        engine_image_done(&images[i]);
    engine_close(e);
}

/* --- requests ---------------------------------------------------------------------------------------------- */

static void bad_requests_are_refused_with_a_reason(void **state)
{
    (void)state;
    static char long_prompt[4000];
    struct engine *e = open_with(DISTILLED, ENGINE_F32, 1, NULL), *base = open_with(BASE, ENGINE_F32, 1, NULL);
    struct engine_request good = request_of(e, "a fox", 1);
    struct { struct engine_request r; bool is_base; const char *says; } bad[16];
    int n = 0;
#define BAD(base_model, text, ...)                                                                                       \
    do {                                                                                                                 \
        bad[n].r = good, bad[n].is_base = base_model, bad[n].says = text;                                                \
        struct engine_request *r = &bad[n++].r;                                                                          \
        __VA_ARGS__;                                                                                                     \
    } while (0)
    for (size_t i = 0; i + 2 < sizeof long_prompt; i += 2)
        memcpy(long_prompt + i, "7 ", 2);
    BAD(false, "multiple of 16", r->width = 100);
    BAD(false, "below 64", r->height = 48);
    BAD(false, "4194304", r->width = 2064, r->height = 2048);
    BAD(false, "4194304", r->width = 1 << 30, r->height = 1 << 30);
    BAD(false, "below 64", r->width = -64);
    BAD(false, "1 to 1000", r->steps = 0);
    BAD(false, "1 to 1000", r->steps = 1001);
    BAD(false, "distilled", r->negative = "blurry");
    BAD(false, "tokens", r->prompt = long_prompt);
    BAD(false, "prompt", r->prompt = "broken \xC3 utf-8");
    BAD(false, "no prompt", r->prompt = NULL);
    BAD(true, "guidance", r->guidance = NAN);
    BAD(true, "guidance", r->guidance = INFINITY);
    BAD(true, "guidance", r->guidance = -1);
    BAD(true, "without effect", r->guidance = 1, r->negative = "blurry");
    for (int i = 0; i < n; i++) {
        struct engine_error why = {0};
        struct engine_image image;
        struct engine *which = bad[i].is_base ? base : e;
        assert_false(engine_check(which, &bad[i].r, &why));
        assert_int_equal(why.fault, ENGINE_BAD_REQUEST);
        if (!strstr(why.text, bad[i].says))
            fail_msg("'%s' does not say '%s'", why.text, bad[i].says);
        memset(&why, 0, sizeof why);
        assert_false(engine_generate(which, &bad[i].r, 1, &image, NULL, &why));
        assert_int_equal(why.fault, ENGINE_BAD_REQUEST);
    }
    struct engine_error why;
    assert_true(engine_check(e, &good, &why));
    engine_close(e);
    engine_close(base);
}

static void a_batch_of_two_shapes_is_refused(void **state)
{
    (void)state;
    struct engine *e = open_with(DISTILLED, ENGINE_F32, 1, NULL);
    struct engine_request r[2] = {request_of(e, "a", 1), request_of(e, "b", 2)};
    struct engine_image images[2];
    struct engine_error why;
    r[1].width += 16;
    assert_false(engine_generate(e, r, 2, images, NULL, &why));
    assert_int_equal(why.fault, ENGINE_BAD_REQUEST);
    assert_non_null(strstr(why.text, "image 2 of 2"));
    assert_false(engine_generate(e, r, 0, images, NULL, &why));
    assert_false(engine_generate(e, r, ENGINE_BATCH_MAX + 1, images, NULL, &why));
    engine_close(e);
}

static void defaults_are_those_of_the_model(void **state)
{
    (void)state;
    struct engine *e = open_with(DISTILLED, ENGINE_F32, 1, NULL), *base = open_with(BASE, ENGINE_F32, 1, NULL);
    struct engine_request r = {.prompt = "a", .guidance = NAN};
    engine_request_defaults(e, &r);
    assert_int_equal(r.steps, 4);
    assert_true(r.guidance == 1);
    r = (struct engine_request){.prompt = "a", .guidance = 7};
    engine_request_defaults(e, &r); /* a distilled model ignores guidance */
    assert_true(r.guidance == 1);
    r = (struct engine_request){.prompt = "a", .guidance = NAN};
    engine_request_defaults(base, &r);
    assert_int_equal(r.steps, 50);
    assert_true(r.guidance == 4);
    r = (struct engine_request){.prompt = "a", .guidance = 2.5f, .steps = 20};
    engine_request_defaults(base, &r);
    assert_int_equal(r.steps, 20);
    assert_true(r.guidance == 2.5f);
    engine_close(e);
    engine_close(base);
}

struct counter { int steps, cancel_at; };

static void count_step(void *context, int step, int steps)
{
    struct counter *c = context;
    assert_int_equal(step, ++c->steps);
    assert_int_equal(steps, 4);
}

static bool cancel_later(void *context)
{
    struct counter *c = context;
    return c->steps >= c->cancel_at;
}

static void a_cancelled_batch_ends_between_steps_and_the_next_is_whole(void **state)
{
    (void)state;
    struct engine *e = open_with(DISTILLED, ENGINE_F32, 2, NULL);
    struct engine_request r = request_of(e, "a fox", 1);
    struct engine_image before, image, after;
    struct engine_error why;
    struct counter c = {.cancel_at = 2};
    struct engine_watch watch = {.context = &c, .cancelled = cancel_later, .step = count_step};
    render(e, &r, 1, &before);
    assert_false(engine_generate(e, &r, 1, &image, &watch, &why));
    assert_int_equal(why.fault, ENGINE_CANCELLED);
    assert_int_equal(c.steps, 2);
    render(e, &r, 1, &after);
    assert_same_pixels(&before, &after);
    engine_image_done(&before);
    engine_image_done(&after);
    engine_close(e);
}

static void a_picture_of_nan_is_an_error(void **state)
{
    (void)state;
    struct engine *e = open_with(DISTILLED, ENGINE_F32, 1, NULL);
    struct engine_request r = request_of(e, "a fox", 1);
    static float values[128 * 4 * 5];
    for (size_t i = 0; i < sizeof values / sizeof values[0]; i++)
        values[i] = NAN;
    struct tensor noise = tensor_3d(values, TENSOR_F32, 128, 4, 5);
    struct engine_image image;
    struct engine_error why;
    r.noise = &noise;
    assert_false(engine_generate(e, &r, 1, &image, NULL, &why));
    assert_int_equal(why.fault, ENGINE_BAD_RESULT);
    engine_close(e);
}

static void the_model_describes_itself(void **state)
{
    (void)state;
    struct engine *e = open_with(DISTILLED, ENGINE_F32, 2, "portable");
    const struct engine_info *info = engine_info(e);
    assert_true(info->is_distilled);
    assert_string_equal(info->family, "klein-custom");
    assert_string_equal(info->device, "cpu portable, 2 threads");
    assert_true(info->parameters > 900000 && info->parameters < 1200000); /* 4.3 MB of f32 in the folder */
    engine_close(e);
    e = open_with("tests/golden/models/kv", ENGINE_F32, 1, NULL);
    assert_true(engine_info(e)->is_distilled); /* by its pipeline: the index does not say */
    engine_close(e);
}

static void a_folder_that_is_no_model_is_refused(void **state)
{
    (void)state;
    struct engine *e;
    struct engine_error why;
    assert_false(engine_open(&e, &(struct engine_options){.model_dir = "tests/unit"}, &why));
    assert_int_equal(why.fault, ENGINE_BAD_MODEL);
    assert_non_null(strstr(why.text, "tests/unit"));
    assert_false(engine_open(&e, &(struct engine_options){.model_dir = DISTILLED, .isa = "abacus"}, &why));
    assert_non_null(strstr(why.text, "abacus"));
    engine_close(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_batch_of_f32_equals_its_single_renders),
        cmocka_unit_test(a_batch_of_bf16_equals_its_single_renders),
        cmocka_unit_test(a_batch_with_guidance_equals_its_single_renders),
        cmocka_unit_test(neither_threads_nor_batch_nor_both_change_a_pixel),
        cmocka_unit_test(a_remembered_prompt_gives_the_same_pixels),
        cmocka_unit_test(another_shape_in_between_changes_nothing),
        cmocka_unit_test(prompt_seed_and_negative_each_matter),
        cmocka_unit_test(bad_requests_are_refused_with_a_reason),
        cmocka_unit_test(a_batch_of_two_shapes_is_refused),
        cmocka_unit_test(defaults_are_those_of_the_model),
        cmocka_unit_test(a_cancelled_batch_ends_between_steps_and_the_next_is_whole),
        cmocka_unit_test(a_picture_of_nan_is_an_error),
        cmocka_unit_test(the_model_describes_itself),
        cmocka_unit_test(a_folder_that_is_no_model_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
