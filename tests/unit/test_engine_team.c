/* test_engine_team.c - two ranks that share a model: if this breaks, their picture is another one than that of a rank alone, depends
 * on its batch, or one rank in trouble keeps the worker waiting. Models: the tiny ones of tests/golden, whose heads two can share;
 * test_golden does the comparison with diffusers. With a device as argument (cuda:0,1), there. */
#include "engine_team.h"

#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#define MODEL "tests/golden/models/pocket"
#define KV "tests/golden/models/kv"
#define BASE "tests/golden/models/base"
#define IMAGES 3

/* f32, the latents at the end, of size 1: sums in another order. Measured 4.3e-6 (test_golden.c allows 1e-4 against diffusers, ten times
 * what diffusers itself changes); guidance g makes u + g (c - u) of it, up to 2g - 1 times as much, here 7. */
#define F32_LATENTS(model) ((model) == GUIDED ? 7e-5 : 1e-5)

static const char *team = "cpu:0,0", *alone = "cpu";

/* base with guidance, distilled, or KV with a reference */
enum model { GUIDED, DISTILLED, WITH_KV };
static int model_count = 3, image_count = IMAGES; /* fewer where a GPU is simulated */
static bool is_simulated;

static uint8_t reference_rgb[64 * 64 * 3];

static struct engine_team *open_model(enum model model, enum engine_precision precision, const char *device)
{
    struct engine_team *t;
    struct engine_error why;
    struct engine_options o = {.model_dir = model == WITH_KV ? KV : MODEL, .precision = precision, .device = device};
    if (model == GUIDED) /* in a team with shares, although two ranks could take a pass each */
        o.transformer = MODEL "/transformer", o.variant = ENGINE_BASE, o.split = ENGINE_SPLIT_WEIGHTS;
    if (!engine_team_open(&t, &o, &why))
        fail_msg("%s", why.text);
    return t;
}

static void requests_of(const struct engine_team *t, enum model model, struct engine_request *r)
{
    static const char *const prompts[IMAGES] = {"a fox", "", "a fox"};
    static const struct engine_reference reference = {64, 64, reference_rgb};
    for (size_t i = 0; i < sizeof reference_rgb; i++)
        reference_rgb[i] = (uint8_t)(i * i / 97);
    for (int i = 0; i < IMAGES; i++) {
        r[i] = (struct engine_request){.prompt = prompts[i], .width = 64, .height = 80, .steps = 2, .seed = (uint64_t)i, .guidance = NAN};
        if (model == WITH_KV)
            r[i].references = &reference, r[i].reference_count = 1;
        engine_team_defaults(t, &r[i]);
    }
}

static void paint(struct engine_team *t, const struct engine_request *r, int count, struct engine_image *images, const struct engine_watch *watch)
{
    struct engine_error why;
    if (!engine_team_generate(t, r, count, images, watch, &why))
        fail_msg("%s", why.text);
}

static void same_picture(const struct engine_image *a, const struct engine_image *b, const char *when)
{
    if (memcmp(a->rgb, b->rgb, (size_t)a->width * (size_t)a->height * 3) != 0)
        fail_msg("the picture differs %s", when);
}

/* --- the picture -------------------------------------------------------------------------------------------- */

static void keep_latents(void *context, const char *name, struct tensor value)
{
    if (strcmp(name, "latents.1") == 0) /* of two steps */
        memcpy(context, value.data, tensor_bytes(value));
}

static void two_ranks_draw_the_picture_of_one(void **state)
{
    (void)state;
    for (int m = 0; m < model_count; m++) {
        static float latents[2][20 * 128];
        struct engine_request r[IMAGES];
        double largest = 0;
        for (int who = 0; who < 2; who++) {
            struct engine_team *t = open_model((enum model)m, ENGINE_F32, who ? team : alone);
            struct engine_image image;
            requests_of(t, (enum model)m, r);
            paint(t, r, 1, &image, &(struct engine_watch){.context = latents[who], .dump = keep_latents});
            engine_image_done(&image);
            engine_team_close(t);
        }
        for (int i = 0; i < 20 * 128; i++)
            largest = fmax(largest, fabs((double)latents[0][i] - (double)latents[1][i]));
        print_message("model %d: largest difference of latents %.2g\n", m, largest);
        assert_true(isfinite(latents[0][0]) && latents[0][0] != 0);
        assert_true(largest <= F32_LATENTS(m));
    }
}

static void neither_the_batch_nor_the_run_changes_a_bit(void **state)
{
    (void)state;
    for (int m = 0; m < model_count; m++) {
        struct engine_team *t = open_model((enum model)m, m == DISTILLED ? ENGINE_F32 : ENGINE_BF16, team);
        struct engine_request r[IMAGES];
        struct engine_image batch[IMAGES], again[IMAGES], single;
        requests_of(t, (enum model)m, r);
        paint(t, r, image_count, batch, NULL);
        paint(t, r, image_count, again, NULL);
        for (int i = 0; i < image_count; i++) {
            paint(t, &r[i], 1, &single, NULL);
            same_picture(&batch[i], &single, "when it is alone");
            same_picture(&batch[i], &again[i], "the second time");
            engine_image_done(&single);
            engine_image_done(&again[i]);
        }
        assert_true(memcmp(batch[0].rgb, batch[1].rgb, 64 * 80 * 3) != 0);
        for (int i = 0; i < image_count; i++)
            engine_image_done(&batch[i]);
        engine_team_close(t);
    }
}

/* --- a pass of guidance on each rank ---------------------------------------------------------------------------- */

/* What guidance may come with: other prompts, a negative one, a reference, a mask, none (then both ranks compute the one pass). */
static struct engine_request guided_request(int i)
{
    static const struct engine_reference reference = {64, 64, reference_rgb};
    struct engine_request r = {.prompt = i ? "a fox" : "an owl", .negative = i ? "blurry, dark" : NULL, .width = 64, .height = 64,
                               .steps = i == 3 ? 4 : 2, .seed = (uint64_t)i, .guidance = i < 4 ? 3 : 1};
    if (i == 2 || i == 3)
        r.references = &reference, r.reference_count = 1;
    if (i == 3)
        r.mask = &reference, r.strength = is_simulated ? 0.25 : 0.5;
    if (i == 4)
        r.negative = NULL, r.steps = is_simulated ? 1 : 2;
    return r;
}

/* Of a batch of two, then one at a time. Simulated: one with a mask, one without guidance, both of a step. */
static void paint_guided(const char *device, enum engine_precision precision, struct engine_image ret[5])
{
    struct engine_request r[5];
    struct engine_team *t;
    struct engine_error why;
    struct engine_options o = {.model_dir = BASE, .precision = precision, .device = device};
    if (!engine_team_open(&t, &o, &why))
        fail_msg("%s", why.text);
    assert_true(device == team ? strncmp(engine_team_info(t)->split, "passes, because all of the model", 32) == 0 : !*engine_team_info(t)->split);
    for (int i = 0; i < 5; i++)
        r[i] = guided_request(i);
    if (!is_simulated)
        paint(t, r, 2, ret, NULL);
    for (int i = is_simulated ? 3 : 2; i < 5; i++) {
        paint(t, &r[i], 1, &ret[i], NULL);
        if (i == 3)
            assert_int_equal(engine_team_info(t)->passes, device == team ? ENGINE_PASSES_SPLIT : ENGINE_PASSES_TOGETHER);
    }
    engine_team_close(t);
}

/* To the bit: nothing is summed, and guidance adds the same two velocities in the same order. One head: no share could be had. */
static void a_pass_on_each_of_two_ranks_is_the_picture_of_one(void **state)
{
    (void)state;
    for (int precision = is_simulated ? ENGINE_BF16 : ENGINE_F32; precision <= ENGINE_BF16; precision++) {
        struct engine_image one[5], two[5];
        paint_guided(alone, (enum engine_precision)precision, one);
        paint_guided(team, (enum engine_precision)precision, two);
        for (int i = is_simulated ? 3 : 0; i < 5; i++) {
            same_picture(&one[i], &two[i], "with a pass on each rank");
            engine_image_done(&one[i]);
            engine_image_done(&two[i]);
        }
    }
}

static void a_rank_holds_its_share(void **state)
{
    (void)state;
    size_t peak[2];
    for (int who = 0; who < 2; who++) {
        struct engine_team *t = open_model(DISTILLED, ENGINE_F32, who ? team : alone);
        struct engine_request r[IMAGES];
        struct engine_image image;
        requests_of(t, DISTILLED, r);
        paint(t, r, 1, &image, NULL);
        peak[who] = image.timing.peak_bytes;
        assert_int_equal(strncmp(engine_team_info(t)->device, "2 x ", 4) == 0, who);
        engine_image_done(&image);
        engine_team_close(t);
    }
    assert_true(peak[1] < peak[0]);
}

/* --- trouble -------------------------------------------------------------------------------------------------- */

static bool at_the_second_step(void *context)
{
    return ++*(int *)context == 2;
}

static void a_cancelled_batch_ends_on_all_ranks_and_the_next_is_whole(void **state)
{
    (void)state;
    struct engine_team *t = open_model(DISTILLED, ENGINE_BF16, team);
    struct engine_request r[IMAGES];
    struct engine_image before, after, none;
    struct engine_error why;
    int asked = 0;
    requests_of(t, DISTILLED, r);
    paint(t, r, 1, &before, NULL);
    assert_false(engine_team_generate(t, r, 1, &none, &(struct engine_watch){.context = &asked, .cancelled = at_the_second_step}, &why));
    assert_int_equal(why.fault, ENGINE_CANCELLED);
    r[1].steps = 0; /* refused by all */
    assert_false(engine_team_generate(t, &r[1], 1, &none, NULL, &why));
    assert_int_equal(why.fault, ENGINE_BAD_REQUEST);
    paint(t, r, 1, &after, NULL);
    same_picture(&before, &after, "after a batch that was cancelled");
    engine_image_done(&before);
    engine_image_done(&after);
    engine_team_close(t);
}

/* Longer than the others' patience lasts; the time when it began is told. */
static bool hang(void *context)
{
    clock_gettime(CLOCK_MONOTONIC, context);
    nanosleep(&(struct timespec){KERN_TEAM_PATIENCE_MS / 1000 + 1, 0}, NULL);
    return false;
}

static void a_rank_that_hangs_ends_the_team_within_ten_seconds(void **state)
{
    (void)state;
    struct engine_team *t = open_model(DISTILLED, ENGINE_BF16, team);
    struct engine_request r[IMAGES];
    struct engine_image none;
    struct engine_error why;
    struct timespec begun = {0}, ended;
    requests_of(t, DISTILLED, r);
    assert_false(engine_team_generate(t, r, 1, &none, &(struct engine_watch){.context = &begun, .cancelled = hang}, &why));
    clock_gettime(CLOCK_MONOTONIC, &ended);
    assert_true(ended.tv_sec - begun.tv_sec <= 10);
    assert_int_equal(why.fault, ENGINE_DEVICE);
    assert_non_null(strstr(why.text, "no sign of life"));
    assert_false(engine_team_generate(t, r, 1, &none, NULL, &why)); /* a lost device stays lost */
    assert_int_equal(why.fault, ENGINE_DEVICE);
    engine_team_close(t);
}

/* --- ranks that are asked different things, as by an engine_team they never are -------------------------------------- */

struct side {
    struct kern_team *team;
    int rank;
    struct engine *engine;
    struct engine_watch watch;
    struct engine_image image;
    struct engine_error why;
    bool ok;
};

static void *open_side(void *argument)
{
    struct side *s = argument;
    s->ok = engine_open(&s->engine, &(struct engine_options){.model_dir = MODEL, .member = {s->team, s->rank, 2}, .threads = 1}, &s->why);
    return NULL;
}

static void *paint_side(void *argument)
{
    struct side *s = argument;
    struct engine_request r = {.prompt = "a fox", .width = 64, .height = 64, .steps = 1};
    s->ok = engine_generate(s->engine, &r, 1, &s->image, &s->watch, &s->why);
    return NULL;
}

static void both(void *(*work)(void *), struct side s[2])
{
    pthread_t other;
    assert_int_equal(pthread_create(&other, NULL, work, &s[1]), 0);
    work(&s[0]);
    pthread_join(other, NULL);
}

static void open_sides(struct side s[2])
{
    s[0].team = kern_team_open(2, KERN_TEAM_PATIENCE_MS);
    assert_non_null(s[0].team);
    s[1] = (struct side){.team = s[0].team, .rank = 1};
    both(open_side, s);
    if (!s[0].ok || !s[1].ok)
        fail_msg("%s", s[!s[1].ok].why.text);
}

static void close_sides(struct side s[2])
{
    engine_close(s[0].engine);
    engine_close(s[1].engine);
    kern_team_close(s[0].team);
}

/* What the second rank is given is no adapter. */
static void *adapt_side(void *argument)
{
    struct side *s = argument;
    static const struct engine_adapter none = {MODEL "/transformer/diffusion_pytorch_model.safetensors", 1};
    s->ok = engine_adapt(s->engine, &none, s->rank, &s->why);
    return NULL;
}

static void *without_adapters(void *argument)
{
    struct side *s = argument;
    s->ok = engine_adapt(s->engine, NULL, 0, &s->why);
    return NULL;
}

static void adapters_are_changed_on_all_ranks_or_on_none(void **state)
{
    (void)state;
    struct side s[2] = {0};
    open_sides(s);
    both(adapt_side, s);
    assert_true(!s[0].ok && !s[1].ok);
    both(paint_side, s);
    for (int i = 0; i < 2; i++) {
        assert_true(!s[i].ok);
        assert_non_null(strstr(s[i].why.text, "the last change of adapters failed"));
    }
    both(without_adapters, s);
    assert_true(s[0].ok && s[1].ok);
    both(paint_side, s);
    assert_true(s[0].ok && s[1].ok);
    engine_image_done(&s[0].image);
    close_sides(s);
}

/* Before the prompt is encoded. */
static void interrupt(void *context, const char *name, struct tensor value)
{
    (void)value;
    if (strcmp(name, "sigmas") == 0)
        kern_team_break(context, 0, "team interrupted: by a test");
}

static void a_prompt_that_was_not_encoded_is_not_remembered(void **state)
{
    (void)state;
    struct side s[2] = {0}, fresh[2] = {0};
    open_sides(s);
    s[0].watch = (struct engine_watch){.context = s[0].team, .dump = interrupt};
    both(paint_side, s);
    assert_true(!s[0].ok && !s[1].ok);
    s[0].watch = (struct engine_watch){0};
    both(paint_side, s);
    if (!s[0].ok || !s[1].ok)
        fail_msg("%s", s[!s[1].ok].why.text);
    open_sides(fresh);
    both(paint_side, fresh);
    assert_true(fresh[0].ok);
    same_picture(&s[0].image, &fresh[0].image, "after one whose prompt was not encoded");
    engine_image_done(&s[0].image);
    engine_image_done(&fresh[0].image);
    close_sides(s);
    close_sides(fresh);
}

static void refused(struct engine_options o, const char *says)
{
    struct engine_team *t;
    struct engine_error why;
    o.model_dir = o.model_dir ? o.model_dir : MODEL;
    assert_false(engine_team_open(&t, &o, &why));
    assert_int_equal(why.fault, ENGINE_BAD_REQUEST);
    if (!strstr(why.text, says))
        fail_msg("'%s' does not say '%s'", why.text, says);
}

static void what_cannot_be_shared_is_refused(void **state)
{
    (void)state;
    refused((struct engine_options){.device = "cpu:0,0,0"}, "a team of 3: 2 heads of the transformer");
    refused((struct engine_options){.device = "cpu:0,0", .model_dir = BASE, .split = ENGINE_SPLIT_WEIGHTS}, "a team of 2: 1 heads of the transformer");
    refused((struct engine_options){.device = "cpu:0,0", .split = ENGINE_SPLIT_PASSES}, "split passes: a distilled model on 2 ranks");
    refused((struct engine_options){.device = "cpu", .model_dir = BASE, .split = ENGINE_SPLIT_PASSES}, "split passes: a base model on 1 rank;");
    refused((struct engine_options){.device = "cpu:0,0,0", .model_dir = BASE, .split = ENGINE_SPLIT_PASSES}, "split passes: a base model on 3 ranks");
    refused((struct engine_options){.device = "cpu:0,0", .threads = 1}, "1 threads for a team of 2");
    refused((struct engine_options){.device = "cpu:0,63"}, "no memory node 63");
    static const char *const forms[] = {"cpu:", "cpu:0,", "cpu:,0", "cpu:a", "cpu:100", "cuda:0,0", "cuda:0,x", "cuda:", "gpu", "", "dry:",
                                        "cpu:0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0"};
    for (size_t i = 0; i < sizeof forms / sizeof forms[0]; i++)
        refused((struct engine_options){.device = forms[i]}, "accepted: cpu, cuda, cuda:N, or a team");
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(two_ranks_draw_the_picture_of_one),
        cmocka_unit_test(neither_the_batch_nor_the_run_changes_a_bit),
        cmocka_unit_test(a_pass_on_each_of_two_ranks_is_the_picture_of_one),
        cmocka_unit_test(a_rank_holds_its_share),
        cmocka_unit_test(a_cancelled_batch_ends_on_all_ranks_and_the_next_is_whole),
        cmocka_unit_test(adapters_are_changed_on_all_ranks_or_on_none),
        cmocka_unit_test(a_prompt_that_was_not_encoded_is_not_remembered),
        cmocka_unit_test(what_cannot_be_shared_is_refused),
        cmocka_unit_test(a_rank_that_hangs_ends_the_team_within_ten_seconds),
    };
    if (argc > 1)
        team = argv[1], alone = "cuda", model_count = 1, image_count = 2, is_simulated = true;
    return cmocka_run_group_tests_name("engine_team", tests, NULL, NULL);
}
