/* test_engine_batch.c - how a batch runs the two passes of guidance. If this breaks, a picture depends on how much memory was free
 * when it was made, or a batch takes twice the memory that its plan gave it.
 *
 *   test_engine_batch [DEVICE]     the CPU; else one step of an edit */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine_batch.h"
#include "golden.h"

#define BASE "tests/golden/models/base"
#define DISTILLED "tests/golden/models/pocket"

enum { IMAGES = 2, SIDE = 80 }; /* of references and masks */

static const char *device;

static void open_model(struct engine_model *m, const char *dir, enum engine_precision precision)
{
    struct engine_error why;
    struct engine_options o = {.model_dir = dir, .precision = precision, .threads = 2, .device = device, .plan_width = 96, .plan_height = 96,
                               .plan_count = IMAGES};
    if (!engine_model_open(m, &o, &why))
        fail_msg("%s", why.text);
}

/* Two pictures of a case that differ in seed and in one of the prompts, so that no pass and no picture can stand for another. */
static void requests_of(const struct golden_case *c, struct engine_request *ret, const struct engine_reference *pixels)
{
    bool is_edited = strstr(c->name, "edit") || strstr(c->name, "inpaint");
    ret[0] = c->requests[0];
    ret[0].references = pixels, ret[0].reference_count = is_edited;
    if (strstr(c->name, "inpaint"))
        ret[0].mask = &pixels[1], ret[0].strength = 1, ret[0].width = ret[0].height = SIDE;
    if (!ret[0].width)
        ret[0].width = ret[0].height = SIDE;
    ret[0].guidance = 4;
    ret[0].steps = device ? 1 : ret[0].steps;
    ret[1] = ret[0];
    ret[1].negative = "blurry";
    ret[1].seed++;
}

/* The latents behind the last step, malloc'ed. */
static void *latents_of(struct engine_model *m, const struct engine_request *r, enum engine_passes passes, size_t *ret_bytes)
{
    static struct engine_batch b;
    struct engine_error why;
    size_t mark = kern_mark(m->kern);
    m->passes = passes;
    bool ok = engine_batch_begin(&b, m, r, IMAGES, NULL, &why) && engine_batch_prompts(&b, &why) && engine_batch_noise(&b, &why) &&
              engine_batch_references(&b, &why);
    for (int step = b.first_step; ok && step < r->steps; step++)
        ok = engine_batch_step(&b, step, &why);
    if (!ok)
        fail_msg("%s", why.text);
    assert_int_equal(m->info.passes, passes);
    assert_int_equal(b.passes_at_once, passes == ENGINE_PASSES_TOGETHER ? 2 : 1);
    struct tensor host = tensor_of(NULL, b.latents.dtype, b.latents.rank, b.latents.shape);
    *ret_bytes = tensor_bytes(host);
    host.data = malloc(*ret_bytes);
    kern_read(m->kern, host, b.latents);
    assert_true(kern_sync(m->kern));
    kern_rewind(m->kern, mark);
    return host.data;
}

static void compare(struct engine_model *m, const char *name)
{
    static uint8_t rgb[2][SIDE * SIDE * 3];
    const struct engine_reference pixels[2] = {{SIDE, SIDE, rgb[0]}, {SIDE, SIDE, rgb[1]}};
    struct engine_request r[IMAGES];
    struct golden_case c;
    struct engine_error why;
    size_t bytes, again;
    for (size_t i = 0; i < sizeof rgb[0]; i++)
        rgb[0][i] = (uint8_t)(i * 7 + i / 240 * 3), rgb[1][i] = i < sizeof rgb[0] / 2 ? 255 : 0;
    if (!golden_open(&c, name, &why))
        fail_msg("%s", why.text);
    requests_of(&c, r, pixels);
    void *together = latents_of(m, r, ENGINE_PASSES_TOGETHER, &bytes);
    void *in_turn = latents_of(m, r, ENGINE_PASSES_IN_TURN, &again);
    assert_int_equal(bytes, again);
    if (memcmp(together, in_turn, bytes) != 0)
        fail_msg("%s: latents differ", name);
    assert_memory_not_equal(together, (char *)together + bytes / 2, bytes / 2); /* the two pictures */
    free(together);
    free(in_turn);
    golden_close(&c);
}

static void passes_together_and_in_turn_give_the_same_bits(void **state)
{
    static const char *const cases[] = {"edit-base-cfg", "base-cfg", "base-cfg-negative", "inpaint-base-cfg"};
    (void)state;
    for (int precision = 0; precision < 2; precision++) {
        struct engine_model m;
        open_model(&m, BASE, (enum engine_precision)precision);
        for (int i = 0; i < (device ? 1 : 4); i++)
            compare(&m, cases[i]);
        engine_model_close(&m);
    }
}

static enum engine_passes chosen(struct engine_model *m, int side, float guidance)
{
    static struct engine_batch b;
    struct engine_error why;
    struct engine_request r = {.prompt = "", .width = side, .height = side, .steps = 1, .guidance = guidance};
    assert_true(engine_batch_begin(&b, m, &r, 1, NULL, &why));
    assert_int_equal(b.passes, m->info.passes == ENGINE_PASSES_ONE ? 1 : 2);
    return m->info.passes;
}

/* Without a plan: 512 rows of text and one for each 16x16 pixels, twice, up to 8192. */
static void on_the_cpu_the_number_of_rows_decides(void **state)
{
    struct engine_model base, distilled;
    (void)state;
    open_model(&base, BASE, ENGINE_BF16);
    open_model(&distilled, DISTILLED, ENGINE_BF16);
    assert_int_equal(chosen(&base, 64, 4), ENGINE_PASSES_TOGETHER);
    assert_int_equal(chosen(&base, 944, 4), ENGINE_PASSES_TOGETHER);
    assert_int_equal(chosen(&base, 960, 4), ENGINE_PASSES_IN_TURN);
    assert_int_equal(chosen(&base, 2048, 1), ENGINE_PASSES_ONE);
    assert_int_equal(chosen(&distilled, 2048, 4), ENGINE_PASSES_ONE);
    engine_model_close(&base);
    engine_model_close(&distilled);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(passes_together_and_in_turn_give_the_same_bits),
        cmocka_unit_test(on_the_cpu_the_number_of_rows_decides),
    };
    device = argc > 1 ? argv[1] : NULL;
    return _cmocka_run_group_tests("engine_batch", tests, device ? 1 : 2, NULL, NULL);
}
