/* test_cuda_room.c - a device with room for the model and the batch it was opened for, and not much more. If this breaks, a
 * campaign of larger pictures fails on a card that could render it, or a picture that does not fit takes the next with it.
 *
 * The simulated device has 36 MiB, 32 of them the library's: 4.2 MB are left (CMakeLists.txt). The model's weights are 1.9 MB, 0.6 of
 * them the text encoder's; a picture takes 0.1 KB a pixel.
 *
 * test_cuda_room base: of 40 MiB 8.4 MB are left; the base model's weights are 2.6 MB, a picture of 64x64 takes 4.6, or 2.6 with its
 * passes in turn. */
#include <dlfcn.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "cuda_simulator.h"
#include "engine.h"
#include "pocket_adapters.h"

#define MODEL "tests/golden/models/pocket"

enum { AS_PLANNED = 64, LARGER = 160, STILL_LARGER = 176, TOO_LARGE = 256 };

static struct engine *open_engine(enum engine_placement placement, int side)
{
    struct engine *e;
    struct engine_error why;
    if (!engine_open(&e, &(struct engine_options){.model_dir = MODEL, .precision = ENGINE_BF16, .device = "cuda", .placement = placement,
                                                  .plan_width = side, .plan_height = side}, &why))
        fail_msg("%s", why.text);
    return e;
}

static bool paint(struct engine *e, int side, struct engine_image *image, struct engine_error *why)
{
    struct engine_request r = {.prompt = "a fox", .width = side, .height = side, .steps = 1, .seed = 5};
    engine_request_defaults(e, &r);
    return engine_generate(e, &r, 1, image, NULL, why);
}

static void paint_or_fail(struct engine *e, int side, struct engine_image *image)
{
    struct engine_error why;
    if (!paint(e, side, image, &why))
        fail_msg("%dx%d: %s", side, side, why.text);
}

/* A picture that finds no room, in a sentence with this size and word; nothing has moved. */
static void expect_no_room(struct engine *e, int side, const char *size, const char *word)
{
    struct engine_image image;
    struct engine_error why;
    assert_false(paint(e, side, &image, &why));
    assert_int_equal(why.fault, ENGINE_NO_MEMORY);
    assert_non_null(strstr(why.text, size));
    assert_non_null(strstr(why.text, word));
    assert_int_equal(engine_info(e)->placement, ENGINE_RESIDENT);
}

static void assert_same(const struct engine_image *a, const struct engine_image *b)
{
    assert_memory_equal(a->rgb, b->rgb, (size_t)a->width * (size_t)a->height * 3);
}

static void a_larger_picture_sends_the_text_encoder_away(void **state)
{
    (void)state;
    struct engine_image small, large, again, planned;
    struct engine *e = open_engine(ENGINE_PLACEMENT_AUTO, AS_PLANNED);
    assert_int_equal(engine_info(e)->placement, ENGINE_RESIDENT);
    paint_or_fail(e, AS_PLANNED, &small);
    size_t before = engine_info(e)->model_bytes;
    paint_or_fail(e, LARGER, &large);
    assert_int_equal(engine_info(e)->placement, ENGINE_PHASES);
    assert_true(engine_info(e)->model_bytes < before);
    paint_or_fail(e, AS_PLANNED, &again);
    assert_same(&small, &again);
    engine_close(e);

    e = open_engine(ENGINE_PHASES, LARGER);
    paint_or_fail(e, LARGER, &planned);
    assert_same(&large, &planned);
    engine_close(e);
    engine_image_done(&small);
    engine_image_done(&large);
    engine_image_done(&again);
    engine_image_done(&planned);
}

/* Then blocks of the transformer, no more than must. */
static void a_still_larger_picture_sends_blocks_after_it(void **state)
{
    (void)state;
    struct engine_image small, large, again;
    struct engine *e = open_engine(ENGINE_PLACEMENT_AUTO, AS_PLANNED);
    paint_or_fail(e, AS_PLANNED, &small);
    paint_or_fail(e, STILL_LARGER, &large);
    int waiting = engine_info(e)->waiting_blocks;
    assert_int_equal(engine_info(e)->placement, ENGINE_STREAMED);
    assert_in_range(waiting, 1, 4); /* of 5 */
    assert_true(engine_info(e)->model_bytes + engine_info(e)->arena_bytes < 4200000);
    paint_or_fail(e, AS_PLANNED, &again);
    assert_same(&small, &again);
    assert_int_equal(engine_info(e)->waiting_blocks, waiting);
    engine_close(e);

    e = open_engine(ENGINE_PLACEMENT_AUTO, STILL_LARGER);
    assert_int_equal(engine_info(e)->placement, ENGINE_STREAMED);
    assert_in_range(engine_info(e)->waiting_blocks, 1, 4);
    engine_close(e);
    engine_image_done(&small);
    engine_image_done(&large);
    engine_image_done(&again);
}

/* The host has no memory for the third matrix of a layer: that layer is half here and half there, and renders. */
static void weights_that_moved_in_part_render_the_same(void **state)
{
    (void)state;
    struct engine_image small, large, again;
    struct engine_error why;
    struct engine *e = open_engine(ENGINE_PLACEMENT_AUTO, AS_PLANNED);
    paint_or_fail(e, AS_PLANNED, &small);
    assert_true(cuda_simulator.fault("hostalloc:3"));
    assert_false(paint(e, LARGER, &large, &why));
    assert_int_equal(why.fault, ENGINE_NO_MEMORY);
    assert_non_null(strstr(why.text, "moving weights to host memory"));
    cuda_simulator.fault("");
    paint_or_fail(e, AS_PLANNED, &again);
    assert_same(&small, &again);
    paint_or_fail(e, LARGER, &large);
    engine_close(e);
    engine_image_done(&small);
    engine_image_done(&large);
    engine_image_done(&again);
}

static void a_placement_that_was_asked_for_stays(void **state)
{
    (void)state;
    struct engine *e = open_engine(ENGINE_RESIDENT, AS_PLANNED);
    expect_no_room(e, LARGER, "160x160", "placement resident");
    engine_close(e);
}

static void what_fits_nowhere_is_refused_and_the_next_is_rendered(void **state)
{
    (void)state;
    struct engine_image image;
    struct engine_error why;
    struct engine *e = open_engine(ENGINE_PLACEMENT_AUTO, AS_PLANNED);
    expect_no_room(e, TOO_LARGE, "256x256", "no memory");
    paint_or_fail(e, AS_PLANNED, &image);
    engine_image_done(&image);
    engine_close(e);
    assert_false(engine_open(&e, &(struct engine_options){.model_dir = MODEL, .precision = ENGINE_BF16, .device = "cuda", .plan_width = 512,
                                                          .plan_height = 512}, &why));
    assert_int_equal(why.fault, ENGINE_NO_MEMORY);
    assert_non_null(strstr(why.text, "streamed"));
}

/* More and more adapters: some fit, some more where the text encoder was, the rest nowhere. */
static void adapters_send_the_text_encoder_away_or_are_refused(void **state)
{
    (void)state;
    enum { SIDE = 112, MOST = ENGINE_ADAPTERS_MAX };
    struct engine_adapter many[MOST];
    struct engine_error why = {0};
    struct engine_image plain, image;
    struct engine *e = open_engine(ENGINE_PLACEMENT_AUTO, SIDE);
    int count = 0;
    for (int i = 0; i < MOST; i++)
        many[i] = (struct engine_adapter){"tests/golden/files/lora-kohya.safetensors", 0.1f};
    paint_or_fail(e, SIDE, &plain);
    while (engine_info(e)->placement == ENGINE_RESIDENT && ++count <= MOST)
        if (!engine_adapt(e, many, count, &why))
            fail_msg("%d adapters: %s", count, why.text);
    assert_int_equal(engine_info(e)->placement, ENGINE_PHASES);
    assert_true(count > 1);
    paint_or_fail(e, SIDE, &image);
    engine_image_done(&image);
    for (; count <= MOST && engine_adapt(e, many, count, &why); count++)
        assert_true(engine_info(e)->model_bytes + engine_info(e)->arena_bytes < 4200000);
    assert_int_equal(why.fault, ENGINE_NO_MEMORY);
    assert_non_null(strstr(why.text, "and the adapters, which take 0."));
    assert_true(engine_adapt(e, NULL, 0, &why));
    paint_or_fail(e, SIDE, &image);
    assert_same(&plain, &image);
    engine_close(e);
    engine_image_done(&plain);
    engine_image_done(&image);
}

/* Adapters to be merged that found no memory left no transformer; then somebody else takes the memory that is free, and what makes
 * room finds nothing to move. */
static void without_a_transformer_there_is_less_to_send_away(void **state)
{
    (void)state;
    static const struct engine_adapter beside = {"tests/golden/files/lora-kohya.safetensors", 0.1f};
    char folder[] = "/tmp/kiln-room-XXXXXX";
    int (*device_malloc)(void **, size_t), (*device_free)(void *), (*forget_error)(void);
    struct engine_error why;
    struct engine_image before, after;
    size_t bytes = 4 << 20;
    void *taken;
    void *module = dlopen(getenv("KILN_CUDA_MODULE"), RTLD_NOW | RTLD_LOCAL);
    assert_non_null(module);
    *(void **)&device_malloc = dlsym(module, "cudaMalloc");
    *(void **)&device_free = dlsym(module, "cudaFree");
    *(void **)&forget_error = dlsym(module, "cudaGetLastError");
    assert_non_null(mkdtemp(folder));
    struct pocket_adapters own = pocket_adapters_make(folder);
    struct engine *e = open_engine(ENGINE_PLACEMENT_AUTO, AS_PLANNED);
    paint_or_fail(e, AS_PLANNED, &before);
    assert_true(cuda_simulator.fault("malloc:5"));
    assert_false(engine_adapt(e, &(struct engine_adapter){own.lokr, 1}, 1, &why));
    assert_int_equal(why.fault, ENGINE_NO_MEMORY);
    cuda_simulator.fault("");
    while (device_malloc(&taken, bytes) != 0)
        bytes -= 4096;
    forget_error();
    assert_false(engine_adapt(e, &beside, 1, &why));
    assert_int_equal(why.fault, ENGINE_NO_MEMORY);
    assert_true(engine_info(e)->placement > ENGINE_RESIDENT);
    device_free(taken);
    if (!engine_adapt(e, NULL, 0, &why))
        fail_msg("%s", why.text);
    paint_or_fail(e, AS_PLANNED, &after);
    assert_same(&before, &after);
    engine_close(e);
    engine_image_done(&before);
    engine_image_done(&after);
    unlink(own.lokr);
    unlink(own.context);
    rmdir(folder);
}

static void paint_guided(struct engine *e, int count, float guidance, struct engine_image *images)
{
    struct engine_request r[2];
    struct engine_error why;
    for (int i = 0; i < count; i++)
        r[i] = (struct engine_request){.prompt = "a fox", .width = AS_PLANNED, .height = AS_PLANNED, .steps = 1, .seed = (uint64_t)i,
                                       .guidance = guidance};
    if (!engine_generate(e, r, count, images, NULL, &why))
        fail_msg("%d pictures: %s", count, why.text);
    assert_int_equal(engine_info(e)->placement, ENGINE_RESIDENT);
}

static void passes_run_in_turn_before_weights_move(void **state)
{
    struct engine_options o = {.model_dir = "tests/golden/models/base", .precision = ENGINE_BF16, .device = "cuda", .plan_width = AS_PLANNED,
                               .plan_height = AS_PLANNED, .plan_count = 2};
    struct engine_error why;
    struct engine_image one, two[2], unguided;
    struct engine *e;
    (void)state;
    assert_true(engine_open(&e, &o, &why));
    assert_int_equal(engine_info(e)->placement, ENGINE_RESIDENT);
    assert_int_equal(engine_info(e)->passes, ENGINE_PASSES_IN_TURN);
    engine_close(e);

    o.plan_count = 1;
    assert_true(engine_open(&e, &o, &why));
    assert_int_equal(engine_info(e)->passes, ENGINE_PASSES_TOGETHER);
    paint_guided(e, 1, 4, &one);
    assert_int_equal(engine_info(e)->passes, ENGINE_PASSES_TOGETHER);
    paint_guided(e, 2, 4, two);
    assert_int_equal(engine_info(e)->passes, ENGINE_PASSES_IN_TURN);
    assert_same(&one, &two[0]);
    paint_guided(e, 1, 1, &unguided);
    assert_int_equal(engine_info(e)->passes, ENGINE_PASSES_ONE);
    engine_close(e);
    engine_image_done(&one);
    engine_image_done(&two[0]);
    engine_image_done(&two[1]);
    engine_image_done(&unguided);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest guided[] = {cmocka_unit_test(passes_run_in_turn_before_weights_move)};
    if (argc > 1 && strcmp(argv[1], "base") == 0)
        return cmocka_run_group_tests_name("cuda_room_base", guided, cuda_simulator_find, NULL);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_larger_picture_sends_the_text_encoder_away),
        cmocka_unit_test(a_still_larger_picture_sends_blocks_after_it),
        cmocka_unit_test(weights_that_moved_in_part_render_the_same),
        cmocka_unit_test(a_placement_that_was_asked_for_stays),
        cmocka_unit_test(adapters_send_the_text_encoder_away_or_are_refused),
        cmocka_unit_test(without_a_transformer_there_is_less_to_send_away),
        cmocka_unit_test(what_fits_nowhere_is_refused_and_the_next_is_rendered),
    };
    return cmocka_run_group_tests_name("cuda_room", tests, cuda_simulator_find, NULL);
}
