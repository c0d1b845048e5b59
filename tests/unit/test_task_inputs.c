/* Tests of ops/store/task_inputs.c: what is written is read back; what nobody wrote is refused; the forms say what they must. */
#include "task_inputs.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine.h"

#define SHA_A "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
#define SHA_B "ff112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"

static char why[512];

static struct task_inputs_file file_of(const char *path, const char *sha256, int width, int height)
{
    struct task_inputs_file f = {.path = strdup(path), .width = width, .height = height};
    strcpy(f.sha256, sha256);
    return f;
}

static struct task_inputs full(void)
{
    struct task_inputs in = {.image_count = 2, .lora_count = 1, .strength = 0.7};
    in.images[0] = file_of("/data/a fox \"1\".png", SHA_A, 640, 480);
    in.images[1] = file_of("/data/b.webp", SHA_B, 512, 512);
    in.mask = file_of("/data/mask.png", SHA_B, 10, 20);
    in.loras[0] = (struct task_inputs_lora){file_of("/data/style.safetensors", SHA_A, 0, 0), -0.75};
    return in;
}

static char *form(void (*write)(struct json_text *, const struct task_inputs *), const struct task_inputs *in)
{
    struct json_text t = {0};
    json_text_put(&t, "");
    write(&t, in);
    assert_false(t.failed);
    return t.data ? t.data : strdup("");
}

static void expect(void (*write)(struct json_text *, const struct task_inputs *), const struct task_inputs *in, const char *text)
{
    char *got = form(write, in);
    assert_string_equal(got, text);
    free(got);
}

static void what_is_written_is_read_back(void **state)
{
    (void)state;
    struct task_inputs in = full(), back;
    char *text = form(task_inputs_text, &in);
    if (!task_inputs_parse(&back, text, why, sizeof why))
        fail_msg("%s: %s", why, text);
    assert_int_equal(back.image_count, 2);
    assert_string_equal(back.images[0].path, "/data/a fox \"1\".png");
    assert_int_equal(back.images[0].height, 480);
    assert_string_equal(back.mask.sha256, SHA_B);
    assert_float_equal(back.strength, 0.7, 0);
    assert_float_equal(back.loras[0].scale, -0.75, 0);
    expect(task_inputs_text, &back, text);
    free(text);
    task_inputs_done(&back);
    task_inputs_done(&in);
    assert_true(task_inputs_is_empty(&in));
}

static void forms_say_what_they_must(void **state)
{
    (void)state;
    struct task_inputs in = full(), none = {0};
    expect(task_inputs_layout, &in, "640x480 512x512 mask 0.7");
    expect(task_inputs_loras, &in, SHA_A ":-0.75");
    expect(task_inputs_identity, &in,
           "inputs 1 image " SHA_A " image " SHA_B " mask " SHA_B " strength 0.7 loras " SHA_A ":-0.75");
    expect(task_inputs_record, &in,
           "{\"images\":[{\"name\":\"a fox \\\"1\\\".png\",\"sha256\":\"" SHA_A "\"},{\"name\":\"b.webp\",\"sha256\":\"" SHA_B
           "\"}],\"mask\":{\"name\":\"mask.png\",\"sha256\":\"" SHA_B
           "\"},\"strength\":0.7,\"loras\":[{\"name\":\"style.safetensors\",\"sha256\":\"" SHA_A "\",\"scale\":-0.75}]}");
    expect(task_inputs_text, &none, "");
    expect(task_inputs_layout, &none, "");
    expect(task_inputs_identity, &none, "");
    task_inputs_done(&in);
}

static void identity_is_of_contents_not_places(void **state)
{
    (void)state;
    struct task_inputs in = full();
    char *before = form(task_inputs_identity, &in);
    strcpy(in.images[1].path, "/x.png");
    expect(task_inputs_identity, &in, before);
    free(before);
    task_inputs_done(&in);
}

static void texts_that_nobody_wrote_are_refused(void **state)
{
    (void)state;
    static const char *const bad[][2] = {
        {"", "inputs: "},
        {"[]", "no JSON object"},
        {"{\"images\":[]}", "'images' is no list"},
        {"{\"images\":[{\"path\":\"a.png\"}]}", "absolute path"},
        {"{\"images\":[{\"path\":\"/a.png\",\"sha256\":\"12\"}]}", "64 hexadecimal digits"},
        {"{\"images\":[{\"path\":\"/a.png\",\"sha256\":\"" SHA_A "\",\"width\":0,\"height\":5}]}", "width and height"},
        {"{\"images\":[{\"path\":\"/a.png\",\"sha256\":\"" SHA_A "\",\"width\":1.5,\"height\":5}]}", "width and height"},
        {"{\"loras\":[{\"path\":\"/a\",\"sha256\":\"" SHA_A "\",\"scale\":\"1\"}]}", "'scale'"},
        {"{\"loras\":[{\"path\":\"/a\",\"sha256\":\"" SHA_A "\",\"scale\":101}]}", "'scale'"},
        {"{\"mask\":{\"path\":\"/a\",\"sha256\":\"" SHA_A "\",\"width\":8,\"height\":8}}", "mask without an image"},
        {"{\"strength\":0.5}", "strength without a mask"},
        {"{\"strength\":\"x\"}", "'strength' is no number"},
        {"{\"depth\":1}", "'depth' is not known"},
        {"{\"strength\":0.5,\"strength\":0.6}", "duplicate"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct task_inputs in;
        if (task_inputs_parse(&in, bad[i][0], why, sizeof why))
            fail_msg("taken: %s", bad[i][0]);
        if (!strstr(why, bad[i][1]))
            fail_msg("%s: '%s' is not in '%s'", bad[i][0], bad[i][1], why);
        assert_true(task_inputs_is_empty(&in));
    }
}

static void a_strength_out_of_bounds_is_refused(void **state)
{
    (void)state;
    struct task_inputs in = full();
    for (int i = 0; i < 3; i++) {
        in.strength = (double[]){-0.1, 1.1, 2}[i];
        assert_false(task_inputs_ok(&in, why, sizeof why));
        assert_non_null(strstr(why, "accepted is more than 0, at most 1"));
    }
    task_inputs_done(&in);
}

/* The engine has the same rule in its own house; submit needs it without an engine. */
static void pictures_have_the_size_the_engine_gives_them(void **state)
{
    (void)state;
    for (int width = 64; width < 5000; width += 137)
        for (int height = 64; height < 5000; height += 211) {
            struct engine_error error;
            int engine[2], ours[2];
            if (!engine_reference_size(width, height, &engine[0], &engine[1], &error))
                continue;
            task_inputs_picture_size(width, height, &ours[0], &ours[1]);
            assert_int_equal(ours[0], engine[0]);
            assert_int_equal(ours[1], engine[1]);
        }
}

/* A colon belongs to the name unless a number stands behind it: a scale of 0 would leave the adapter out in silence. */
static void scale_is_what_stands_behind_the_last_colon_if_it_is_a_number(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        size_t length;
        double scale;
    } rows[] = {{"x", 1, 1}, {"x:0.5", 1, 0.5}, {"x:-2", 1, -2}, {"x:0", 1, 0}, {"a:b.safetensors", 15, 1}, {"a:b:3", 3, 3}, {"a:2b", 4, 1},
                {"x:", 2, 1}, {"x:nan", 5, 1}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        size_t length;
        double scale;
        assert_true(task_inputs_read_lora(rows[i].text, &length, &scale, why, sizeof why));
        assert_int_equal(length, rows[i].length);
        if (scale != rows[i].scale)
            fail_msg("%s: scale %g", rows[i].text, scale);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(scale_is_what_stands_behind_the_last_colon_if_it_is_a_number),
        cmocka_unit_test(what_is_written_is_read_back),
        cmocka_unit_test(forms_say_what_they_must),
        cmocka_unit_test(identity_is_of_contents_not_places),
        cmocka_unit_test(texts_that_nobody_wrote_are_refused),
        cmocka_unit_test(a_strength_out_of_bounds_is_refused),
        cmocka_unit_test(pictures_have_the_size_the_engine_gives_them),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
