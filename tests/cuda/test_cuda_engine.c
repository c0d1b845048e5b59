/* test_cuda_engine.c - pictures of a whole model on the device: if this breaks, what a customer gets depends on who else
 * was in the batch, or on what the card did before. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "engine.h"

#define MODEL "tests/golden/models/pocket"
#define IMAGES 3

static struct engine *open_placed(enum engine_precision precision, enum engine_placement placement)
{
    struct engine *e;
    struct engine_error why;
    if (!engine_open(&e, &(struct engine_options){.model_dir = MODEL, .precision = precision, .device = "cuda", .placement = placement},
                     &why))
        fail_msg("%s", why.text);
    return e;
}

static struct engine *open_engine(enum engine_precision precision)
{
    return open_placed(precision, ENGINE_PLACEMENT_AUTO);
}

static void paint(struct engine *e, const struct engine_request *r, int count, struct engine_image *images)
{
    struct engine_error why;
    if (!engine_generate(e, r, count, images, NULL, &why))
        fail_msg("%s", why.text);
}

static void requests_of(const struct engine *e, struct engine_request *r)
{
    static const char *const prompts[IMAGES] = {"a fox", "", "seven lamps on a long table, evening"};
    for (int i = 0; i < IMAGES; i++) {
        r[i] = (struct engine_request){.prompt = prompts[i], .width = 64, .height = 80, .steps = 1, .seed = (uint64_t)(i * 7), .guidance = NAN};
        engine_request_defaults(e, &r[i]);
    }
}

static void same_picture(const struct engine_image *a, const struct engine_image *b, const char *when, int image)
{
    if (memcmp(a->rgb, b->rgb, (size_t)a->width * (size_t)a->height * 3) != 0)
        fail_msg("image %d differs %s", image, when);
}

static void a_picture_depends_neither_on_its_batch_nor_on_the_run(void **state)
{
    static const enum engine_precision precisions[] = {ENGINE_BF16, ENGINE_F32};
    (void)state;
    for (int p = 0; p < 2; p++) {
        struct engine *e = open_engine(precisions[p]);
        struct engine_request r[IMAGES];
        struct engine_image batch[IMAGES], again[IMAGES], alone;
        requests_of(e, r);
        paint(e, r, IMAGES, batch);
        paint(e, r, IMAGES, again);
        for (int i = 0; i < IMAGES; i++) {
            same_picture(&batch[i], &again[i], "the second time", i);
            paint(e, &r[i], 1, &alone);
            same_picture(&batch[i], &alone, "when it is alone", i);
            engine_image_done(&alone);
            engine_image_done(&batch[i]);
            engine_image_done(&again[i]);
        }
        engine_close(e);
    }
}

/* Nor does one with adapters that came later. */
static void a_picture_does_not_depend_on_where_weights_are_kept(void **state)
{
    static const enum engine_placement placements[] = {ENGINE_RESIDENT, ENGINE_PHASES, ENGINE_STREAMED};
    static const struct engine_adapter adapters[] = {{"tests/golden/files/lora-peft.safetensors", 0.7f},
                                                     {"tests/golden/files/lora-bfl.safetensors", -0.4f}};
    struct engine_image first[IMAGES + 1], image[IMAGES + 1];
    (void)state;
    for (int p = 0; p < 3; p++) {
        struct engine *e = open_placed(ENGINE_BF16, placements[p]);
        struct engine_request r[IMAGES];
        struct engine_error why;
        requests_of(e, r);
        assert_int_equal(engine_info(e)->placement, placements[p]);
        size_t model_bytes = engine_info(e)->model_bytes;
        paint(e, r, IMAGES, p ? image : first);
        if (!engine_adapt(e, adapters, 2, &why))
            fail_msg("%s", why.text);
        assert_true(engine_info(e)->model_bytes > model_bytes);
        paint(e, r, 1, p ? image + IMAGES : first + IMAGES);
        for (int i = 0; i <= IMAGES && p; i++) {
            same_picture(&first[i], &image[i], engine_placement_name(placements[p]), i);
            engine_image_done(&image[i]);
        }
        engine_close(e);
    }
    assert_memory_not_equal(first[0].rgb, first[IMAGES].rgb, (size_t)first[0].width * (size_t)first[0].height * 3);
    for (int i = 0; i <= IMAGES; i++)
        engine_image_done(&first[i]);
}

static void the_engine_says_what_it_runs_on(void **state)
{
    (void)state;
    struct engine *e = open_engine(ENGINE_BF16);
    assert_non_null(strstr(engine_info(e)->device, "cuda:0"));
    engine_close(e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_picture_depends_neither_on_its_batch_nor_on_the_run),
        cmocka_unit_test(a_picture_does_not_depend_on_where_weights_are_kept),
        cmocka_unit_test(the_engine_says_what_it_runs_on),
    };
    return cmocka_run_group_tests_name("cuda_engine", tests, NULL, NULL);
}
