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

#include "pocket_adapters.h"
#include "put_file.h"

#define DISTILLED "tests/golden/models/pocket"
#define BASE "tests/golden/models/base"
#define KV "tests/golden/models/kv"
#define NO_ENCODER "tests/golden/models/like-9b/vae/diffusion_pytorch_model.safetensors" /* trimmed: no case of it has a reference */

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

/* --- reference images ---------------------------------------------------------------------------------------- */

#define PICTURE_MAX (128 * 128 * 3)

/* A picture of its own for each seed: a gradient with noise. */
static struct engine_reference reference_of(uint8_t *pixels, int width, int height, uint32_t seed)
{
    uint32_t state = seed * 2654435761u + 1;
    assert_true(width * height * 3 <= PICTURE_MAX);
    for (int i = 0; i < width * height * 3; i++) {
        state = state * 1664525 + 1013904223;
        pixels[i] = (uint8_t)((unsigned)i * 200u / (unsigned)(width * height * 3) + (state >> 26));
    }
    return (struct engine_reference){width, height, pixels};
}

/* Three pictures, two references each: of equal layout (96x64, 64x96), of unequal sizes; the third shares the first's. */
struct edits {
    uint8_t pixels[4][PICTURE_MAX];
    struct engine_reference lists[3][2];
};

static struct edits *edits_new(void)
{
    struct edits *t = malloc(sizeof *t);
    t->lists[0][0] = reference_of(t->pixels[0], 101, 75, 1);
    t->lists[0][1] = reference_of(t->pixels[1], 70, 98, 2);
    t->lists[1][0] = reference_of(t->pixels[2], 96, 64, 3);
    t->lists[1][1] = reference_of(t->pixels[3], 79, 111, 4);
    memcpy(t->lists[2], t->lists[0], sizeof t->lists[0]);
    return t;
}

static void edit_requests(const struct engine *e, const struct edits *t, struct engine_request r[3])
{
    static const char *const prompts[3] = {"in winter", "at night", "in winter"};
    for (int i = 0; i < 3; i++) {
        r[i] = request_of(e, prompts[i], 20 + (uint64_t)i);
        r[i].references = t->lists[i];
        r[i].reference_count = 2;
    }
}

static void edits_change_no_pixel_in_batch_and_threads(const char *dir, enum engine_precision precision)
{
    struct edits *t = edits_new();
    struct engine *one = open_with(dir, precision, 1, NULL), *two = open_with(dir, precision, 2, NULL);
    struct engine_request r[3];
    struct engine_image of_one[3], of_two[3], alone;
    edit_requests(one, t, r);
    render(one, r, 3, of_one);
    render(two, r, 3, of_two);
    for (int i = 0; i < 3; i++) {
        render(i % 2 ? one : two, &r[i], 1, &alone);
        assert_same_pixels(&of_one[i], &alone);
        assert_same_pixels(&of_one[i], &of_two[i]);
        engine_image_done(&alone);
    }
    assert_false(has_same_pixels(&of_one[0], &of_one[1]));
    assert_false(has_same_pixels(&of_one[0], &of_one[2]));
    for (int i = 0; i < 3; i++) {
        engine_image_done(&of_one[i]);
        engine_image_done(&of_two[i]);
    }
    engine_close(one);
    engine_close(two);
    free(t);
}

static void a_batch_of_edits_equals_its_single_renders(void **state)
{
    (void)state;
    static const char *const models[] = {DISTILLED, BASE, KV};
    for (int i = 0; i < 3; i++) {
        edits_change_no_pixel_in_batch_and_threads(models[i], ENGINE_F32);
        edits_change_no_pixel_in_batch_and_threads(models[i], ENGINE_BF16);
    }
}

/* Every reference and its place counts; the size in a file counts only as far as it is not cut away. */
static void references_matter(void **state)
{
    (void)state;
    static const char *const models[] = {DISTILLED, KV};
    static uint8_t other[PICTURE_MAX], copy[PICTURE_MAX];
    for (int m = 0; m < 2; m++) {
        struct edits *t = edits_new();
        struct engine *e = open_with(models[m], ENGINE_F32, 2, NULL);
        struct engine_request r = request_of(e, "in winter", 3), plain = r;
        struct engine_image images[6];
        struct engine_reference list[2] = {t->lists[0][0], t->lists[0][1]};
        render(e, &plain, 1, &images[0]);
        r.references = list, r.reference_count = 1;
        render(e, &r, 1, &images[1]);
        r.reference_count = 2;
        render(e, &r, 1, &images[2]);
        list[1] = reference_of(other, 70, 98, 9);
        render(e, &r, 1, &images[3]);
        list[1] = list[0], list[0] = reference_of(other, 70, 98, 2);
        render(e, &r, 1, &images[4]);
        memcpy(copy, t->pixels[0], sizeof copy);
        list[1].rgb = copy, list[1].width = 101; /* other memory, same pixels */
        render(e, &r, 1, &images[5]);
        for (int i = 0; i < 5; i++)
            for (int j = 0; j < i; j++)
                assert_false(has_same_pixels(&images[i], &images[j]));
        assert_same_pixels(&images[4], &images[5]);
        for (int i = 0; i < 6; i++)
            engine_image_done(&images[i]);
        render(e, &plain, 1, &images[0]); /* what was edited before changes nothing */
        struct engine_request none = plain;
        none.references = list, none.reference_count = 0;
        render(e, &none, 1, &images[1]);
        assert_same_pixels(&images[0], &images[1]);
        engine_image_done(&images[0]);
        engine_image_done(&images[1]);
        engine_close(e);
        free(t);
    }
}

static void ten_references_are_rendered_and_bad_ones_refused(void **state)
{
    (void)state;
    static uint8_t pixels[PICTURE_MAX];
    static const struct { int width, height; const char *says; } bad[] = {
        {63, 64, "63x64"}, {64, 0, "64x0"}, {-100, 100, "-100x100"}, {16385, 4000, "16385x4000"}, {1 << 30, 1 << 30, "64 to 16384"},
        {640, 79, "8 times"}, {64, 513, "8 times"}, {0, 0, "0x0"},
    };
    struct engine *e = open_with(DISTILLED, ENGINE_F32, 2, NULL);
    struct engine_reference list[11];
    struct engine_request r = request_of(e, "a fox", 1);
    struct engine_image image;
    struct engine_error why;
    for (int i = 0; i < 11; i++)
        list[i] = reference_of(pixels, 64, 64, 1);
    r.references = list, r.reference_count = 10;
    assert_true(engine_check(e, &r, &why));
    render(e, &r, 1, &image);
    engine_image_done(&image);
    for (int count = -1; count <= 11; count += 12) {
        r.reference_count = count;
        assert_false(engine_check(e, &r, &why));
        assert_false(engine_generate(e, &r, 1, &image, NULL, &why));
        assert_int_equal(why.fault, ENGINE_BAD_REQUEST);
        assert_non_null(strstr(why.text, "up to 10"));
    }
    r.reference_count = 3;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        list[1].width = bad[i].width, list[1].height = bad[i].height;
        assert_false(engine_generate(e, &r, 1, &image, NULL, &why));
        assert_false(engine_check(e, &r, &why));
        assert_int_equal(why.fault, ENGINE_BAD_REQUEST);
        if (!strstr(why.text, bad[i].says) || !strstr(why.text, "reference 2 of 3"))
            fail_msg("'%s' does not say '%s'", why.text, bad[i].says);
    }
    list[1] = (struct engine_reference){64, 64, NULL};
    assert_false(engine_check(e, &r, &why));
    assert_non_null(strstr(why.text, "no pixels"));
    engine_close(e);
}

static void references_of_two_layouts_are_no_batch(void **state)
{
    (void)state;
    struct edits *t = edits_new();
    struct engine *e = open_with(DISTILLED, ENGINE_F32, 1, NULL);
    struct engine_request r[3];
    struct engine_image images[3];
    struct engine_error why;
    edit_requests(e, t, r);
    r[1].reference_count = 1;
    assert_false(engine_generate(e, r, 3, images, NULL, &why));
    assert_int_equal(why.fault, ENGINE_BAD_REQUEST);
    assert_non_null(strstr(why.text, "image 2 of 3"));
    r[1].reference_count = 2;
    t->lists[2][1] = (struct engine_reference){98, 70, t->pixels[1]}; /* as many tokens, but lying */
    assert_false(engine_generate(e, r, 3, images, NULL, &why));
    assert_non_null(strstr(why.text, "image 3 of 3"));
    engine_close(e);
    free(t);
}

/* White where the left half of the picture is. */
static struct engine_reference left_mask(uint8_t *pixels, int width, int height)
{
    for (int i = 0; i < width * height; i++)
        memset(pixels + 3 * i, i % width < width / 2 ? 255 : 0, 3);
    return (struct engine_reference){width, height, pixels};
}

static struct engine_request inpaint_request(const struct engine *e, const struct engine_reference *image,
                                             const struct engine_reference *mask, const char *prompt, uint64_t seed)
{
    struct engine_request r = {.prompt = prompt, .guidance = NAN, .seed = seed, .references = image, .reference_count = 1, .mask = mask};
    engine_request_defaults(e, &r);
    r.steps = 4;
    return r;
}

static double half_difference(const struct engine_image *a, const struct engine_image *b, bool left)
{
    double sum = 0;
    for (int y = 0; y < a->height; y++)
        for (int x = left ? 0 : a->width / 2 + 8; x < (left ? a->width / 2 - 8 : a->width); x++)
            for (int c = 0; c < 3; c++)
                sum += abs(a->rgb[(y * a->width + x) * 3 + c] - b->rgb[(y * b->width + x) * 3 + c]);
    return sum;
}

/* Only the white half follows prompt and seed; batches, threads and groups change nothing. */
static void inpainting_repaints_the_white_part(void **state)
{
    (void)state;
    struct edits *t = edits_new();
    static uint8_t white[PICTURE_MAX], narrow[PICTURE_MAX];
    for (int precision = 0; precision < 2; precision++) {
        struct engine *one = open_with(DISTILLED, (enum engine_precision)precision, 1, NULL);
        struct engine *two = open_with(DISTILLED, (enum engine_precision)precision, 2, NULL);
        struct engine_reference masks[2] = {left_mask(white, 96, 64), left_mask(narrow, 20, 30)};
        struct engine_request r[3] = {
            inpaint_request(one, t->lists[0], &masks[0], "in winter", 1),
            inpaint_request(one, t->lists[0], &masks[0], "at night", 2),
            inpaint_request(one, t->lists[1], &masks[1], "in winter", 1),
        };
        struct engine_image together[3], alone;
        assert_true(r[0].strength == 0.8 && r[0].width == 96 && r[0].height == 64);
        render(two, r, 3, together);
        for (int i = 0; i < 3; i++) {
            render(one, &r[i], 1, &alone);
            assert_same_pixels(&together[i], &alone);
            engine_image_done(&alone);
        }
        double painted = half_difference(&together[0], &together[1], true), kept = half_difference(&together[0], &together[1], false);
        if (!(painted > 4 * kept)) /* the decoder's norms and its attention see the whole picture: a little shows on the other side */
            fail_msg("the white half changes by %g, the black one by %g", painted, kept);
        r[0].strength = 0.3;
        render(one, r, 1, &alone);
        assert_false(has_same_pixels(&alone, &together[0]));
        engine_image_done(&alone);
        for (int i = 0; i < 3; i++)
            engine_image_done(&together[i]);
        engine_close(one);
        engine_close(two);
    }
    free(t);
}

static void steps_of_an_inpainting_are_those_that_are_run(void *context, int step, int steps)
{
    assert_int_equal(step, ++*(int *)context);
    assert_int_equal(steps, 2);
}

static void bad_masks_and_strengths_are_refused_with_a_reason(void **state)
{
    (void)state;
    struct edits *t = edits_new();
    static uint8_t pixels[PICTURE_MAX];
    struct engine *e = open_with(DISTILLED, ENGINE_F32, 1, NULL), *kv = open_with(KV, ENGINE_F32, 1, NULL);
    struct engine_reference mask = left_mask(pixels, 96, 64), none = {96, 64, NULL}, flat = {96, 0, pixels}, wide = {20000, 64, pixels};
    struct engine_request good = inpaint_request(e, t->lists[0], &mask, "in winter", 1), pair[2];
    struct engine_image images[2];
    struct engine_error why;
    int made = 0;
    good.strength = 0.5;
    if (!engine_generate(e, &good, 1, images, &(struct engine_watch){.context = &made, .step = steps_of_an_inpainting_are_those_that_are_run}, &why))
        fail_msg("%s", why.text);
    assert_int_equal(made, 2);
    engine_image_done(&images[0]);
    struct { struct engine_request r; struct engine *e; const char *says; } bad[16];
    int n = 0;
#define BAD_MASK(model, text, ...)                                                                                       \
    do {                                                                                                                 \
        bad[n].r = good, bad[n].e = model, bad[n].says = text;                                                           \
        struct engine_request *r = &bad[n++].r;                                                                          \
        __VA_ARGS__;                                                                                                     \
    } while (0)
    BAD_MASK(e, "without a mask", r->mask = NULL);
    BAD_MASK(e, "without a mask", r->mask = NULL, r->reference_count = 0);
    BAD_MASK(e, "without a mask", r->mask = NULL, r->strength = NAN);
    BAD_MASK(e, "first reference", r->reference_count = 0);
    BAD_MASK(e, "no pixels", r->mask = &none);
    BAD_MASK(e, "96x0", r->mask = &flat);
    BAD_MASK(e, "20000x64", r->mask = &wide);
    BAD_MASK(e, "at most 1", r->strength = 1.5);
    BAD_MASK(e, "at most 1", r->strength = -0.5);
    BAD_MASK(e, "at most 1", r->strength = NAN);
    BAD_MASK(e, "is none", r->strength = 1e-300);
    BAD_MASK(e, "96x64", r->width = 80);
    BAD_MASK(kv, "KV model", (void)r);
    for (int i = 0; i < n; i++) {
        assert_false(engine_check(bad[i].e, &bad[i].r, &why));
        assert_int_equal(why.fault, ENGINE_BAD_REQUEST);
        if (!strstr(why.text, bad[i].says))
            fail_msg("%d: '%s' does not say '%s'", i, why.text, bad[i].says);
        assert_false(engine_generate(bad[i].e, &bad[i].r, 1, images, NULL, &why));
    }
    pair[0] = pair[1] = good;
    pair[1].strength = 1;
    assert_false(engine_generate(e, pair, 2, images, NULL, &why));
    assert_non_null(strstr(why.text, "image 2 of 2"));
    pair[1].strength = 0, pair[1].mask = NULL;
    assert_false(engine_generate(e, pair, 2, images, NULL, &why));
    engine_close(e);
    engine_close(kv);
    free(t);
}

static void a_size_that_is_left_open_is_that_of_the_first_reference(void **state)
{
    (void)state;
    struct edits *t = edits_new();
    struct engine *e = open_with(DISTILLED, ENGINE_F32, 1, NULL);
    struct engine_error why;
    int width, height;
    struct engine_request r = {.prompt = "a", .references = t->lists[1] + 1, .reference_count = 1};
    engine_request_defaults(e, &r);
    assert_int_equal(r.width, 64); /* 79 x 111 */
    assert_int_equal(r.height, 96);
    assert_true(engine_reference_size(4000, 3000, &width, &height, &why));
    assert_int_equal(width, 1168); /* 1182 x 886 is the largest of this shape within a megapixel */
    assert_int_equal(height, 880);
    assert_false(engine_reference_size(40, 3000, &width, &height, &why));
    r = (struct engine_request){.prompt = "a"};
    engine_request_defaults(e, &r);
    assert_int_equal(r.width, 0);
    assert_false(engine_check(e, &r, &why));
    engine_close(e);
    free(t);
}

static void a_model_without_encoder_refuses_references_and_renders_on(void **state)
{
    (void)state;
    struct edits *t = edits_new();
    struct engine *e;
    struct engine_image before, image, after;
    struct engine_error why;
    if (!engine_open(&e, &(struct engine_options){.model_dir = BASE, .vae = NO_ENCODER, .precision = ENGINE_F32, .threads = 1}, &why))
        fail_msg("%s", why.text);
    struct engine_request r = request_of(e, "a fox", 1);
    render(e, &r, 1, &before);
    r.references = t->lists[0], r.reference_count = 2;
    for (int i = 0; i < 2; i++) {
        assert_false(engine_check(e, &r, &why));
        assert_int_equal(why.fault, ENGINE_BAD_MODEL);
        assert_non_null(strstr(why.text, "encoder.conv_in"));
        assert_false(engine_generate(e, &r, 1, &image, NULL, &why));
        assert_int_equal(why.fault, ENGINE_BAD_MODEL);
    }
    r.reference_count = 0;
    render(e, &r, 1, &after);
    assert_same_pixels(&before, &after);
    engine_image_done(&before);
    engine_image_done(&after);
    engine_close(e);
    free(t);
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

/* A model is counted before its values are read: a variance that nobody knows yet is not 0. */
static void a_model_is_counted_though_its_epsilon_is_0(void **state)
{
    (void)state;
    char folder[] = "/tmp/kiln-engine-XXXXXX", path[512], text[1024];
    assert_non_null(mkdtemp(folder));
    FILE *f = fopen(DISTILLED "/vae/config.json", "r");
    assert_non_null(f);
    size_t length = fread(text, 1, sizeof text - 1, f);
    fclose(f);
    text[length] = 0;
    char *epsilon = strstr(text, "0.0001");
    assert_non_null(epsilon);
    memcpy(epsilon, "0.0000", 6);
    put_file(folder, "config.json", text, length);
    char *weights = realpath(DISTILLED "/vae/diffusion_pytorch_model.safetensors", NULL);
    assert_non_null(weights);
    snprintf(path, sizeof path, "%s/diffusion_pytorch_model.safetensors", folder);
    assert_int_equal(symlink(weights, path), 0);
    free(weights);
    struct engine_options o = {.model_dir = DISTILLED, .vae = folder, .threads = 1};
    struct engine_needs needs;
    struct engine *e;
    struct engine_error why;
    if (!engine_needs(&needs, &o, &why) || !engine_open(&e, &o, &why))
        fail_msg("%s", why.text);
    engine_close(e);
    unlink(path);
    snprintf(path, sizeof path, "%s/config.json", folder);
    unlink(path);
    rmdir(folder);
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

/* --- adapters come and go -------------------------------------------------------------------------------- */

#define PEFT "tests/golden/files/lora-peft.safetensors"
#define BFL "tests/golden/files/lora-bfl.safetensors"

struct set { struct engine_adapter list[2]; int count; };

static void render_adapted(struct engine *e, struct engine_image *ret)
{
    struct engine_request r = request_of(e, "a fox", 3);
    r.steps = 2;
    render(e, &r, 1, ret);
}

/* One engine through all sets, each picture against that of an engine opened with the set. */
static void walk(const struct set *sets, int count, enum engine_precision precision)
{
    struct engine *walker = open_with(DISTILLED, precision, 1, NULL);
    struct engine_error why;
    struct engine_image first = {0};
    uint64_t parameters = engine_info(walker)->parameters;
    for (int i = 0; i < count; i++) {
        struct engine *fresh;
        struct engine_image got, want;
        struct engine_options o = {.model_dir = DISTILLED, .precision = precision, .threads = 2, .adapters = sets[i].list,
                                   .adapter_count = sets[i].count};
        if (!engine_adapt(walker, sets[i].list, sets[i].count, &why) || !engine_open(&fresh, &o, &why))
            fail_msg("set %d: %s", i, why.text);
        render_adapted(walker, &got);
        render_adapted(fresh, &want);
        assert_same_pixels(&got, &want);
        assert_true(i == 0 || i + 1 == count || !has_same_pixels(&got, &first));
        assert_int_equal(engine_info(walker)->parameters, parameters);
        engine_image_done(&want);
        if (i)
            engine_image_done(&got);
        else
            first = got;
        engine_close(fresh);
    }
    engine_image_done(&first);
    engine_close(walker);
}

static void adapters_that_change_leave_no_trace(void **state)
{
    (void)state;
    char folder[] = "/tmp/kiln-engine-XXXXXX";
    assert_non_null(mkdtemp(folder));
    struct pocket_adapters own = pocket_adapters_make(folder);
    const struct set sets[] = {
        {.count = 0},
        {{{PEFT, 0.7f}}, 1},
        {{{PEFT, -0.5f}, {BFL, 1}}, 2},
        {{{own.context, 1}}, 1},
        {{{own.lokr, 1}}, 1},               /* merged: the transformer is loaded anew */
        {{{own.lokr, 1}, {PEFT, 0.7f}}, 2},
        {{{PEFT, 0.7f}}, 1},
        {.count = 0},
    };
    walk(sets, sizeof sets / sizeof *sets, ENGINE_BF16);
    walk(sets + 4, 3, ENGINE_F32);
    unlink(own.lokr);
    unlink(own.context);
    rmdir(folder);
}

static void after_adapters_that_do_not_fit_others_are_taken(void **state)
{
    (void)state;
    struct engine *e = open_with(DISTILLED, ENGINE_BF16, 1, NULL);
    struct engine_image before, after;
    struct engine_error why;
    struct engine_request r = request_of(e, "a fox", 3);
    render_adapted(e, &before);
    assert_false(engine_adapt(e, &(struct engine_adapter){DISTILLED "/vae/diffusion_pytorch_model.safetensors", 1}, 1, &why));
    assert_int_equal(why.fault, ENGINE_BAD_MODEL);
    assert_non_null(strstr(why.text, "match no linear"));
    assert_false(engine_generate(e, &r, 1, &after, NULL, &why));
    assert_int_equal(why.fault, ENGINE_BAD_MODEL);
    assert_non_null(strstr(why.text, "change of adapters failed"));
    assert_true(engine_adapt(e, NULL, 0, &why));
    render_adapted(e, &after);
    assert_same_pixels(&before, &after);
    engine_image_done(&before);
    engine_image_done(&after);
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

/* On the CPU there is one memory: nothing to place and nothing planned. */
static void the_cpu_takes_a_placement_that_means_something_there(void **state)
{
    (void)state;
    struct engine *e;
    struct engine_error why;
    assert_true(engine_open(&e, &(struct engine_options){.model_dir = DISTILLED, .placement = ENGINE_RESIDENT}, &why));
    assert_int_equal(engine_info(e)->placement, ENGINE_RESIDENT);
    assert_int_equal(engine_info(e)->device_bytes, 0);
    engine_close(e);
    for (enum engine_placement p = ENGINE_PHASES; p <= ENGINE_STREAMED; p++) {
        assert_false(engine_open(&e, &(struct engine_options){.model_dir = DISTILLED, .placement = p}, &why));
        assert_int_equal(why.fault, ENGINE_BAD_REQUEST);
        assert_non_null(strstr(why.text, engine_placement_name(p)));
        assert_non_null(strstr(why.text, "accepted: auto, resident"));
    }
}

static void what_could_never_be_rendered_is_no_plan(void **state)
{
    static const struct engine_reference tiny = {.width = 8, .height = 8, .rgb = (const uint8_t *)""};
    (void)state;
    struct engine *e;
    struct engine_error why;
    assert_false(engine_open(&e, &(struct engine_options){.model_dir = DISTILLED, .plan_width = 100, .plan_height = 64}, &why));
    assert_int_equal(why.fault, ENGINE_BAD_REQUEST);
    assert_non_null(strstr(why.text, "100x64"));
    assert_false(engine_open(&e, &(struct engine_options){.model_dir = DISTILLED, .plan_references = &tiny, .plan_reference_count = 1}, &why));
    assert_int_equal(why.fault, ENGINE_BAD_REQUEST);
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

/* Pictures compared with each other, over and over: what a sanitizer could see there, it sees in the others as well. */
static const struct CMUnitTest comparisons[] = {
    cmocka_unit_test(a_batch_of_f32_equals_its_single_renders),
    cmocka_unit_test(a_batch_of_bf16_equals_its_single_renders),
    cmocka_unit_test(a_batch_with_guidance_equals_its_single_renders),
    cmocka_unit_test(neither_threads_nor_batch_nor_both_change_a_pixel),
    cmocka_unit_test(a_batch_of_edits_equals_its_single_renders),
};

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_remembered_prompt_gives_the_same_pixels),
        cmocka_unit_test(another_shape_in_between_changes_nothing),
        cmocka_unit_test(prompt_seed_and_negative_each_matter),
        cmocka_unit_test(references_matter),
        cmocka_unit_test(ten_references_are_rendered_and_bad_ones_refused),
        cmocka_unit_test(references_of_two_layouts_are_no_batch),
        cmocka_unit_test(inpainting_repaints_the_white_part),
        cmocka_unit_test(bad_masks_and_strengths_are_refused_with_a_reason),
        cmocka_unit_test(a_size_that_is_left_open_is_that_of_the_first_reference),
        cmocka_unit_test(a_model_without_encoder_refuses_references_and_renders_on),
        cmocka_unit_test(bad_requests_are_refused_with_a_reason),
        cmocka_unit_test(a_batch_of_two_shapes_is_refused),
        cmocka_unit_test(defaults_are_those_of_the_model),
        cmocka_unit_test(a_cancelled_batch_ends_between_steps_and_the_next_is_whole),
        cmocka_unit_test(a_model_is_counted_though_its_epsilon_is_0),
        cmocka_unit_test(a_picture_of_nan_is_an_error),
        cmocka_unit_test(adapters_that_change_leave_no_trace),
        cmocka_unit_test(after_adapters_that_do_not_fit_others_are_taken),
        cmocka_unit_test(the_model_describes_itself),
        cmocka_unit_test(the_cpu_takes_a_placement_that_means_something_there),
        cmocka_unit_test(what_could_never_be_rendered_is_no_plan),
        cmocka_unit_test(a_folder_that_is_no_model_is_refused),
    };
    bool is_quick = argc > 1 && strcmp(argv[1], "quick") == 0;
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    return failed + (is_quick ? 0 : cmocka_run_group_tests(comparisons, NULL, NULL));
}
