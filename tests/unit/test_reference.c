/* test_reference.c - a reference image reaches the VAE with the very pixels diffusers gives it. One level off in a few
 * pixels is not seen, but then no edit can be compared with diffusers to better than that.
 *
 * golden/resize/resize.json is what diffusers made of three files (golden/tables.py), pillow.json what Pillow makes of
 * these, of the references of the editing cases, and of noise (golden/references.py). */
#include "digest.h"
#include "engine.h"
#include "image_file.h"
#include "reference.h"

#include <jansson.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static json_t *load_json(const char *name)
{
    char path[256];
    json_error_t at;
    snprintf(path, sizeof path, "tests/golden/resize/%s", name);
    json_t *root = json_load_file(path, 0, &at);
    if (!root)
        fail_msg("%s: %s", path, at.text);
    return root;
}

static int at(json_t *row, const char *key, size_t i)
{
    return (int)json_integer_value(json_array_get(json_object_get(row, key), i));
}

static const char *text(json_t *row, const char *key)
{
    return json_string_value(json_object_get(row, key));
}

static uint8_t *read_image(const char *name, int *width, int *height)
{
    static uint8_t file[1 << 18];
    char path[256], why[256] = "";
    uint8_t *rgb;
    snprintf(path, sizeof path, "tests/golden/resize/%s", name);
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    size_t bytes = fread(file, 1, sizeof file, f);
    fclose(f);
    if (!image_file_decode(&rgb, width, height, NULL, file, bytes, why, sizeof why))
        fail_msg("%s: %s", path, why);
    return rgb;
}

/* The noise of references.py. */
static uint8_t *noise(int width, int height)
{
    size_t count = (size_t)width * (size_t)height * 3;
    uint8_t *rgb = malloc(count);
    for (size_t i = 0; i < count; i++) {
        uint32_t x = (uint32_t)i * 2654435761u;
        x ^= x >> 15;
        rgb[i] = (uint8_t)((x * 2246822519u) >> 24);
    }
    return rgb;
}

static void expect_digest(const void *data, size_t bytes, const char *want, const char *of)
{
    char hex[65];
    assert_true(digest_of(data, bytes, hex));
    if (strcmp(hex, want) != 0)
        fail_msg("%s: other pixels than the reference's", of);
}

static struct reference_layout layout_of(int width, int height)
{
    struct reference_layout l;
    struct engine_error why;
    if (!reference_layout_of(&l, width, height, &why))
        fail_msg("%s", why.text);
    return l;
}

static void expect_prepared(uint8_t *pixels, int width, int height, json_t *row, const char *of)
{
    struct reference_layout l = layout_of(width, height);
    uint8_t *got;
    assert_true(width == at(row, "size", 0) && height == at(row, "size", 1));
    assert_true(reference_prepare(&got, &l, pixels, width, height));
    assert_true(l.scaled_width == at(row, "scaled", 0) && l.scaled_height == at(row, "scaled", 1));
    assert_true(l.left == at(row, "crop", 0) && l.top == at(row, "crop", 1));
    assert_true(l.width == at(row, "crop", 2) && l.height == at(row, "crop", 3));
    expect_digest(got, (size_t)l.width * (size_t)l.height * 3, text(row, "sha256"), of);
    free(got);
    free(pixels);
}

static void files_give_the_pixels_of_diffusers(void **state)
{
    (void)state;
    json_t *rows = load_json("resize.json"), *row;
    size_t i;
    json_array_foreach(rows, i, row)
    {
        int width, height;
        uint8_t *rgb = read_image(text(row, "file"), &width, &height), *got;
        struct reference_layout l = layout_of(width, height);
        assert_true(reference_resize(&got, at(row, "scaled", 0), at(row, "scaled", 1), rgb, width, height));
        expect_digest(got, (size_t)at(row, "scaled", 0) * (size_t)at(row, "scaled", 1) * 3,
                      text(row, "scaled_rgb_sha256"), text(row, "file"));
        free(got);
        assert_true(reference_prepare(&got, &l, rgb, width, height));
        assert_true(l.width == at(row, "cropped", 0) && l.height == at(row, "cropped", 1));
        expect_digest(got, (size_t)l.width * (size_t)l.height * 3, text(row, "cropped_rgb_sha256"), text(row, "file"));
        free(got);
        free(rgb);
    }
    assert_int_equal(i, 3);
    json_decref(rows);
}

static void files_and_noise_give_the_pixels_of_pillow(void **state)
{
    (void)state;
    json_t *root = load_json("pillow.json"), *row;
    size_t i;
    json_array_foreach(json_object_get(root, "files"), i, row)
    {
        int width, height;
        uint8_t *rgb = read_image(text(row, "file"), &width, &height);
        expect_prepared(rgb, width, height, row, text(row, "file"));
    }
    assert_int_equal(i, 5);
    json_array_foreach(json_object_get(root, "noise"), i, row)
    {
        char of[64];
        snprintf(of, sizeof of, "noise of %dx%d", at(row, "size", 0), at(row, "size", 1));
        expect_prepared(noise(at(row, "size", 0), at(row, "size", 1)), at(row, "size", 0), at(row, "size", 1), row, of);
    }
    assert_int_equal(i, 10);
    json_array_foreach(json_object_get(root, "resizes"), i, row)
    {
        int width = at(row, "to", 0), height = at(row, "to", 1);
        uint8_t *rgb = noise(at(row, "from", 0), at(row, "from", 1)), *got;
        assert_true(reference_resize(&got, width, height, rgb, at(row, "from", 0), at(row, "from", 1)));
        expect_digest(got, (size_t)width * (size_t)height * 3, text(row, "sha256"), "a resize");
        free(got);
        free(rgb);
    }
    assert_int_equal(i, 6);
    json_decref(root);
}

static void the_crop_is_in_the_middle(void **state)
{
    (void)state;
    enum { WIDTH = 70, HEIGHT = 67 };
    uint8_t *rgb = noise(WIDTH, HEIGHT), *cut;
    struct reference_layout l = layout_of(WIDTH, HEIGHT);
    assert_true(reference_prepare(&cut, &l, rgb, WIDTH, HEIGHT));
    assert_true(l.left == 3 && l.top == 1 && l.width == 64 && l.height == 64);
    for (int y = 0; y < 64; y++)
        assert_memory_equal(cut + y * 64 * 3, rgb + ((y + 1) * WIDTH + 3) * 3, 64 * 3);
    free(cut), free(rgb);
}

/* What a worker keeps of a file: a few megabytes that are seen as the whole was. */
static void scaled_pixels_are_seen_as_the_file_was(void **state)
{
    (void)state;
    static const struct { int width, height; } sizes[] = {{70, 67}, {1024, 1024}, {1025, 1024}, {3001, 999}, {8192, 1024}, {1001, 8008}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        int width = sizes[i].width, height = sizes[i].height;
        uint8_t *rgb = noise(width, height), *want[2], *got[2], *mask = noise(height, 100);
        static float shares[2][64 * 64];
        struct reference_layout l = layout_of(width, height);
        struct engine_reference kept = {.width = width, .height = height, .rgb = noise(width, height)};
        struct engine_reference kept_mask = {.width = height, .height = 100, .rgb = noise(height, 100)};
        struct engine_error why;
        assert_true(reference_prepare(&want[0], &l, rgb, width, height) && reference_fit(&want[1], &l, rgb, width, height));
        assert_true(reference_mask(shares[0], l.width, l.height, mask, height, 100, &why));
        assert_true(engine_reference_scale(&kept, &why) && kept.width * kept.height <= REFERENCE_PIXELS_MAX);
        assert_true(engine_mask_scale(&kept_mask, &kept, &why) && kept_mask.width == l.width && kept_mask.height == l.height);
        struct reference_layout scaled = layout_of(kept.width, kept.height);
        assert_true(scaled.width == l.width && scaled.height == l.height);
        assert_true(reference_prepare(&got[0], &scaled, kept.rgb, kept.width, kept.height));
        assert_true(reference_fit(&got[1], &scaled, kept.rgb, kept.width, kept.height));
        assert_true(reference_mask(shares[1], l.width, l.height, kept_mask.rgb, kept_mask.width, kept_mask.height, &why));
        for (int how = 0; how < 2; how++) {
            assert_memory_equal(got[how], want[how], (size_t)l.width * (size_t)l.height * 3);
            free(got[how]), free(want[how]);
        }
        assert_memory_equal(shares[0], shares[1], (size_t)(l.width / 16 * (l.height / 16)) * sizeof shares[0][0]);
        free(rgb), free(mask), free((void *)(uintptr_t)kept.rgb), free((void *)(uintptr_t)kept_mask.rgb);
    }
}

static void what_is_no_reference_is_left_to_the_check(void **state)
{
    (void)state;
    struct engine_reference thin = {.width = 63, .height = 2000, .rgb = noise(63, 2000)};
    struct engine_error why;
    const uint8_t *before = thin.rgb;
    assert_true(engine_reference_scale(&thin, &why));
    assert_true(thin.rgb == before && thin.width == 63);
    free((void *)(uintptr_t)thin.rgb);
}

static void sizes_have_limits_with_sentences(void **state)
{
    (void)state;
    static const struct {
        int width, height;
        const char *word; /* NULL: accepted */
    } cases[] = {
        {64, 64, NULL},           {63, 64, "63x64, accepted: 64 to 16384 pixels a side"},
        {64, 63, "64x63"},        {0, 0, "0x0"},
        {-5, 100, "-5x100"},      {16385, 16385, "16385x16385"},
        {512, 64, NULL},          {513, 64, "513x64, accepted: one side at most 8 times the other"},
        {64, 513, "64x513"},      {16384, 2048, NULL},
        {16384, 2047, "8 times"}, {1024, 1024, NULL},
        {16384, 16384, NULL},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct reference_layout l = {0};
        struct engine_error why = {0};
        bool ok = reference_layout_of(&l, cases[i].width, cases[i].height, &why);
        assert_int_equal(ok, cases[i].word == NULL);
        if (!ok && (!strstr(why.text, cases[i].word) || why.fault != ENGINE_BAD_REQUEST))
            fail_msg("'%s' does not say '%s'", why.text, cases[i].word);
        if (ok)
            assert_true(l.width % 16 == 0 && l.height % 16 == 0 && l.width >= 64 && l.height >= 64 &&
                        l.width * l.height <= REFERENCE_PIXELS_MAX);
    }
}

static void bytes_become_numbers_as_torch_makes_them(void **state)
{
    (void)state;
    /* torch: torch.tensor([0, 1, 127, 128, 254, 255]).float() / 255 * 2 - 1, as bits. */
    static const struct {
        uint8_t byte;
        float value;
    } pairs[] = {
        {0, -1}, {255, 1}, {1, -0x1.fbfbfcp-1f}, {127, -0x1.0101p-8f}, {128, 0x1.0102p-8f}, {51, -0x1.333334p-1f}};
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++)
        assert_memory_equal(&(float){reference_value(pairs[i].byte)}, &pairs[i].value, 4);
}

/* A token sees the four pixels in its middle: white there is what counts, in quarters; the grey level decides at 128. */
static void a_mask_has_a_value_per_token(void **state)
{
    (void)state;
    enum { W = 64, H = 32 };
    static uint8_t rgb[W * H * 3];
    struct engine_error why;
    float got[8];
    memset(rgb, 127, sizeof rgb);
    for (int y = 0; y < 8; y++) /* rows 0 to 7: the upper half of the middle of the first row of tokens */
        memset(rgb + y * W * 3, 128, 32 * 3);
    memset(rgb + (24 * W + 56) * 3, 255, 3);
    assert_true(reference_mask(got, W, H, rgb, W, H, &why));
    static const float want[8] = {0.5f, 0.5f, 0, 0, 0, 0, 0, 0.25f};
    assert_memory_equal(got, want, sizeof want);
    uint8_t one[3] = {255, 60, 255}; /* any size; 0.299, 0.587, 0.114: level 140 */
    assert_true(reference_mask(got, W, H, one, 1, 1, &why));
    for (int i = 0; i < 8; i++)
        assert_true(got[i] == 1);
    one[1] = 30;
    assert_true(reference_mask(got, W, H, one, 1, 1, &why));
    for (int i = 0; i < 8; i++)
        assert_true(got[i] == 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(files_give_the_pixels_of_diffusers),
        cmocka_unit_test(files_and_noise_give_the_pixels_of_pillow),
        cmocka_unit_test(the_crop_is_in_the_middle),
        cmocka_unit_test(scaled_pixels_are_seen_as_the_file_was),
        cmocka_unit_test(what_is_no_reference_is_left_to_the_check),
        cmocka_unit_test(sizes_have_limits_with_sentences),
        cmocka_unit_test(bytes_become_numbers_as_torch_makes_them),
        cmocka_unit_test(a_mask_has_a_value_per_token),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
