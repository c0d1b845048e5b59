/* test_image_file.c - pixels and records through PNG, JPEG and WebP.
 * If this breaks, the same row gives other bytes on another day, other programs cannot read the prompt, or a hostile
 * file takes a worker down. Layouts looked for are those of the PNG, EXIF and XMP specifications. */
#include "image_file.h"

#include <jansson.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const enum image_format formats[] = {IMAGE_PNG, IMAGE_JPG, IMAGE_WEBP};

static struct image_record record_of(int width, int height)
{
    return (struct image_record){.prompt = "a fox, red", .negative = "blur", .model = "klein, 4B", .digest =
        "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef", .licence = "apache-2.0", .precision = "bf16",
        .software = "kiln 0.1.0", .campaign = "foxes", .width = width, .height = height, .steps = 4, .guidance = 1,
        .seed = UINT64_MAX, .is_marked = true};
}

/* Smooth colours, as a picture has, with a hard edge. */
static uint8_t *picture(int width, int height)
{
    uint8_t *rgb = malloc((size_t)width * (size_t)height * 3);
    for (int y = 0; y < height; y++)
        for (int x = 0; x < width; x++) {
            uint8_t *p = rgb + 3 * ((size_t)y * (size_t)width + (size_t)x);
            p[0] = (uint8_t)(255 * x / width);
            p[1] = (uint8_t)(255 * y / height);
            p[2] = x > width / 2 ? 200 : 40;
        }
    return rgb;
}

static void *find(const void *data, size_t bytes, const char *text)
{
    return memmem(data, bytes, text, strlen(text));
}

static void encode(void **data, size_t *bytes, enum image_format f, const uint8_t *rgb, const struct image_record *r)
{
    char why[256] = "";
    if (!image_file_encode(data, bytes, f, rgb, r, why, sizeof why))
        fail_msg("%s: %s", image_file_format_name(f), why);
}

static void pixels_and_record_come_back(void **state)
{
    (void)state;
    static const int sizes[][2] = {{64, 48}, {1, 1}, {17, 3}, {512, 512}};
    for (size_t s = 0; s < 4; s++)
        for (size_t i = 0; i < 3; i++) {
            int width = sizes[s][0], height = sizes[s][1], w, h, worst = 0;
            uint8_t *rgb = picture(width, height), *back = NULL;
            struct image_record r = record_of(width, height);
            void *data;
            size_t bytes;
            char why[256] = "", *json = NULL;
            encode(&data, &bytes, formats[i], rgb, &r);
            assert_true(image_file_decode(&back, &w, &h, &json, data, bytes, why, sizeof why));
            assert_int_equal(w, width);
            assert_int_equal(h, height);
            for (int k = 0; k < w * h * 3; k++)
                worst = abs(rgb[k] - back[k]) > worst ? abs(rgb[k] - back[k]) : worst;
            /* PNG and WebP are exact; JPEG at quality 95 rounds each coefficient by at most half a small step. */
            assert_true(worst <= (formats[i] == IMAGE_JPG ? 16 : 0));
            char expected[600];
            snprintf(expected, sizeof expected,
                     "{\"prompt\":\"a fox, red\",\"negative\":\"blur\",\"model\":\"klein, 4B\",\"digest\":\"%s\","
                     "\"licence\":\"apache-2.0\",\"precision\":\"bf16\",\"software\":\"kiln 0.1.0\","
                     "\"campaign\":\"foxes\",\"width\":%d,\"height\":%d,\"steps\":4,\"guidance\":1,"
                     "\"seed\":18446744073709551615,\"truncated\":false}", r.digest, width, height);
            assert_non_null(json);
            assert_string_equal(json, expected);
            free(json);
            free(back);
            free(rgb);
            free(data);
        }
}

static void same_row_gives_the_same_bytes(void **state)
{
    (void)state;
    uint8_t *rgb = picture(96, 64);
    for (size_t i = 0; i < 3; i++) {
        struct image_record r = record_of(96, 64);
        void *one, *two;
        size_t one_bytes, two_bytes;
        encode(&one, &one_bytes, formats[i], rgb, &r);
        encode(&two, &two_bytes, formats[i], rgb, &r);
        assert_int_equal(one_bytes, two_bytes);
        assert_memory_equal(one, two, one_bytes);
        free(one);
        free(two);
    }
    free(rgb);
}

/* The text as A1111's parser wants it: values with a comma quoted, at least three pairs in the last line. */
static const char expected_parameters[] =
    "a fox, red\nNegative prompt: blur\nSteps: 4, Sampler: Euler, CFG scale: 1, Seed: 18446744073709551615, Size: 64x48, "
    "Model hash: 0123456789, Model: \"klein, 4B\", Version: kiln 0.1.0";

static void other_programs_find_parameters_and_mark(void **state)
{
    (void)state;
    uint8_t *rgb = picture(64, 48);
    struct image_record r = record_of(64, 48);
    char wide[2 * sizeof expected_parameters];
    for (size_t i = 0; i < sizeof expected_parameters; i++) { /* UTF-16, big-endian */
        wide[2 * i] = 0;
        wide[2 * i + 1] = expected_parameters[i];
    }
    for (size_t i = 0; i < 3; i++) {
        void *data;
        size_t bytes;
        encode(&data, &bytes, formats[i], rgb, &r);
        if (formats[i] == IMAGE_PNG) {
            char *at = memmem(data, bytes, "tEXtparameters", 15);
            assert_non_null(at);
            assert_memory_equal(at + 15, expected_parameters, strlen(expected_parameters));
            assert_non_null(memmem(data, bytes, "iTXtXML:com.adobe.xmp\0\0\0\0\0<?xpacket", 35));
        } else {
            char *at = memmem(data, bytes, "UNICODE", 8);
            assert_non_null(at);
            assert_memory_equal(at + 8, wide, 2 * strlen(expected_parameters));
            assert_memory_equal(at - 44, "MM\0*\0\0\0\x08", 8);
        }
        if (formats[i] == IMAGE_JPG)
            assert_non_null(memmem(data, bytes, "http://ns.adobe.com/xap/1.0/\0<?xpacket", 38));
        assert_non_null(find(data, bytes, "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"));
        free(data);
        r.is_marked = false;
        encode(&data, &bytes, formats[i], rgb, &r);
        assert_null(find(data, bytes, "trainedAlgorithmicMedia"));
        r.is_marked = true;
        free(data);
    }
    free(rgb);
}

static void prompt_in_any_script_is_kept(void **state)
{
    (void)state;
    uint8_t *rgb = picture(16, 16);
    static const char prompt[] = "Füchse \"im\" Schnee\n狐 🦊 \\ \t";
    for (size_t i = 0; i < 3; i++) {
        struct image_record r = record_of(16, 16);
        void *data;
        size_t bytes;
        char why[256], *json;
        uint8_t *back;
        int w, h;
        r.prompt = prompt;
        r.guidance = NAN; /* a distilled model has none */
        r.negative = NULL;
        r.campaign = NULL;
        r.seed = 7;
        encode(&data, &bytes, formats[i], rgb, &r);
        assert_true(image_file_decode(&back, &w, &h, &json, data, bytes, why, sizeof why));
        json_t *record = json_loads(json, 0, NULL);
        assert_non_null(record);
        assert_string_equal(json_string_value(json_object_get(record, "prompt")), prompt);
        assert_string_equal(json_string_value(json_object_get(record, "negative")), "");
        assert_true(json_is_null(json_object_get(record, "guidance")));
        assert_null(json_object_get(record, "campaign"));
        assert_int_equal(json_integer_value(json_object_get(record, "seed")), 7);
        if (formats[i] == IMAGE_PNG) /* not Latin-1: only iTXt may hold it */
            assert_non_null(memmem(data, bytes, "iTXtparameters\0\0\0\0\0F\xc3\xbc", 22));
        else /* the fox beyond 16 bits is a surrogate pair */
            assert_non_null(memmem(data, bytes, "\x72\xd0\0 \xd8\x3e\xdd\x8a", 8));
        json_decref(record);
        free(json);
        free(back);
        free(data);
    }
    free(rgb);
}

static void prompt_that_is_not_utf8_is_refused(void **state)
{
    (void)state;
    uint8_t rgb[3] = {0};
    struct image_record r = record_of(1, 1);
    void *data = NULL;
    size_t bytes;
    char why[256] = "";
    r.prompt = "fox \xff";
    for (size_t i = 0; i < 3; i++) {
        assert_false(image_file_encode(&data, &bytes, formats[i], rgb, &r, why, sizeof why));
        assert_non_null(strstr(why, "UTF-8"));
    }
    r = record_of(0, 5);
    assert_false(image_file_encode(&data, &bytes, IMAGE_PNG, rgb, &r, why, sizeof why));
    assert_non_null(strstr(why, "0x5"));
}

/* A JPEG segment holds 64 KiB; the record goes over several and comes back whole. */
static void record_longer_than_a_jpeg_segment_is_kept_whole(void **state)
{
    (void)state;
    enum { LENGTH = 65536 * 2 };
    char *prompt = malloc(LENGTH + 1), why[256], *json;
    for (int i = 0; i < LENGTH; i++)
        prompt[i] = (char)('a' + i % 26);
    prompt[LENGTH] = 0;
    uint8_t *rgb = picture(16, 16), *back;
    for (size_t i = 0; i < 3; i++) {
        struct image_record r = record_of(16, 16);
        void *data;
        size_t bytes;
        int w, h;
        r.prompt = prompt;
        r.seed = 7; /* jansson's integers end at 2^63 - 1 */
        encode(&data, &bytes, formats[i], rgb, &r);
        assert_true(image_file_decode(&back, &w, &h, &json, data, bytes, why, sizeof why));
        assert_non_null(json);
        json_t *record = json_loads(json, 0, NULL);
        assert_string_equal(json_string_value(json_object_get(record, "prompt")), prompt);
        json_decref(record);
        free(json);
        free(back);
        free(data);
    }
    free(rgb);
    free(prompt);
}

/* Every cut and a flip of every byte of a small file: refused or decoded, never a crash (sanitizers watch). */
static void damaged_files_are_refused_or_decoded(void **state)
{
    (void)state;
    uint8_t *rgb = picture(20, 9);
    for (size_t i = 0; i < 3; i++) {
        struct image_record r = record_of(20, 9);
        void *data;
        size_t bytes;
        encode(&data, &bytes, formats[i], rgb, &r);
        for (size_t cut = 0; cut < bytes; cut++) {
            uint8_t *exact = malloc(cut ? cut : 1), *back = NULL;
            char why[256] = "", *json = NULL;
            int w, h;
            memcpy(exact, data, cut);
            if (image_file_decode(&back, &w, &h, &json, exact, cut, why, sizeof why)) {
                assert_true(w == 20 && h == 9);
                assert_true(cut > bytes / 2); /* only the end mark may be missing */
                free(back);
                free(json);
            } else {
                assert_true(why[0] != 0);
            }
            free(exact);
        }
        for (size_t at = 0; at < bytes; at++) {
            uint8_t *copy = malloc(bytes), *back = NULL;
            char why[256] = "", *json = NULL;
            int w, h;
            memcpy(copy, data, bytes);
            copy[at] ^= 0x41;
            if (image_file_decode(&back, &w, &h, &json, copy, bytes, why, sizeof why)) {
                free(back);
                free(json);
            } else {
                assert_true(why[0] != 0);
            }
            free(copy);
        }
        free(data);
    }
    free(rgb);
}

static void lying_sizes_are_refused_before_memory_is_taken(void **state)
{
    (void)state;
    /* A PNG whose header says 2^30 x 2^30; its CRC is right (computed with zlib's crc32). */
    static const uint8_t png[] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n', 0, 0, 0, 13, 'I', 'H', 'D', 'R',
                                  0x40, 0, 0, 0, 0x40, 0, 0, 0, 8, 2, 0, 0, 0, 0xd7, 0xf6, 0x79, 0xe9};
    /* A JPEG frame header of 65499 x 65499. */
    static const uint8_t jpg[] = {0xff, 0xd8, 0xff, 0xc0, 0, 17, 8, 0xff, 0xdb, 0xff, 0xdb, 3, 1, 0x11, 0, 2, 0x11, 0,
                                  3, 0x11, 0, 0xff, 0xda, 0, 12, 3, 1, 0, 2, 0, 3, 0, 0, 63, 0, 0xff, 0xd9};
    /* Lossless WebP of 16384 x 16384: a legal side, too many pixels. */
    static const uint8_t webp[] = {'R', 'I', 'F', 'F', 22, 0, 0, 0, 'W', 'E', 'B', 'P', 'V', 'P', '8', 'L', 10, 0, 0, 0,
                                   0x2f, 0xff, 0xff, 0xff, 0x0f, 0, 0, 0, 0, 0};
    const struct {
        const void *data;
        size_t bytes;
        const char *word;
    } cases[] = {{png, sizeof png, "1073741824x1073741824"}, {jpg, sizeof jpg, "65499x65499"}, {webp, sizeof webp, "16384x16384"}};
    for (size_t i = 0; i < 3; i++) {
        uint8_t *back = NULL;
        int w, h;
        char why[256] = "";
        assert_false(image_file_decode(&back, &w, &h, NULL, cases[i].data, cases[i].bytes, why, sizeof why));
        if (!strstr(why, cases[i].word))
            fail_msg("'%s' does not name %s", why, cases[i].word);
        assert_null(back);
    }
    uint8_t *back;
    int w, h;
    char why[256] = "";
    assert_false(image_file_decode(&back, &w, &h, NULL, "GIF89a", 6, why, sizeof why));
    assert_non_null(strstr(why, "neither PNG"));
}

static size_t from_base64(uint8_t *to, const char *text)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    size_t count = 0;
    uint32_t bits = 0;
    int held = 0;
    for (; *text && *text != '='; text++) {
        bits = bits << 6 | (uint32_t)(strchr(digits, *text) - digits);
        held += 6;
        if (held >= 8) {
            held -= 8;
            to[count++] = (uint8_t)(bits >> held);
        }
    }
    return count;
}

/* data/orientations.json is made by golden/orientations.py; upright pixels are Pillow's. A photo taken with the phone held
 * upright is edited lying on its side otherwise. */
static void pictures_are_turned_as_exif_says(void **state)
{
    (void)state;
    json_error_t at;
    json_t *rows = json_load_file("tests/unit/data/orientations.json", 0, &at), *row;
    size_t i;
    assert_non_null(rows);
    json_array_foreach(rows, i, row)
    {
        static uint8_t file[1 << 14], want[1 << 10];
        const char *format = json_string_value(json_object_get(row, "format"));
        size_t bytes = from_base64(file, json_string_value(json_object_get(row, "file")));
        size_t pixels = from_base64(want, json_string_value(json_object_get(row, "rgb")));
        int w, h, allowed = strcmp(format, "jpg") == 0 ? 2 : 0; /* another inverse DCT may round once or twice otherwise */
        uint8_t *got, *exact = malloc(bytes);
        char why[256];
        memcpy(exact, file, bytes);
        if (!image_file_decode(&got, &w, &h, NULL, exact, bytes, why, sizeof why))
            fail_msg("%s: %s", format, why);
        assert_int_equal(w, json_integer_value(json_array_get(json_object_get(row, "size"), 0)));
        assert_int_equal(h, json_integer_value(json_array_get(json_object_get(row, "size"), 1)));
        assert_int_equal(pixels, w * h * 3);
        for (size_t p = 0; p < pixels; p++)
            if (abs(got[p] - want[p]) > allowed)
                fail_msg("%s with orientation %d: value %zu is %d, want %d", format,
                         (int)json_integer_value(json_object_get(row, "orientation")), p, got[p], want[p]);
        free(got);
        free(exact);
    }
    assert_int_equal(i, 24);
    json_decref(rows);
}

/* Every byte of the EXIF block changed, and lengths that lie: the picture is decoded, upright or turned. */
static void damaged_exif_is_no_damage_to_the_picture(void **state)
{
    (void)state;
    json_error_t at;
    json_t *rows = json_load_file("tests/unit/data/orientations.json", 0, &at), *row;
    size_t i;
    json_array_foreach(rows, i, row)
    {
        static uint8_t file[1 << 14];
        size_t bytes = from_base64(file, json_string_value(json_object_get(row, "file")));
        uint8_t *tiff = memmem(file, bytes, "II*", 4), *other = memmem(file, bytes, "MM\0*", 4);
        tiff = tiff ? tiff : other;
        assert_non_null(tiff);
        if (strcmp(json_string_value(json_object_get(row, "format")), "png") == 0)
            continue; /* its checksum would refuse the file */
        for (size_t b = 0; b < 50; b++)
            for (int value = 0; value < 256; value += 51) {
                uint8_t before = tiff[b], *got;
                char why[256];
                int w, h;
                tiff[b] = (uint8_t)value;
                if (!image_file_decode(&got, &w, &h, NULL, file, bytes, why, sizeof why))
                    fail_msg("byte %zu of EXIF: %s", b, why);
                assert_true((w == 7 && h == 4) || (w == 4 && h == 7));
                tiff[b] = before;
                free(got);
            }
    }
    json_decref(rows);
}

static void formats_are_known_by_name_and_ending(void **state)
{
    (void)state;
    enum image_format f;
    assert_true(image_file_format_of("png", &f) && f == IMAGE_PNG);
    assert_true(image_file_format_of("jpg", &f) && f == IMAGE_JPG);
    assert_true(image_file_format_of("/a.png/b.JPEG", &f) && f == IMAGE_JPG);
    assert_true(image_file_format_of("x.y.webp", &f) && f == IMAGE_WEBP);
    assert_false(image_file_format_of("gif", &f));
    assert_false(image_file_format_of("a.png/b", &f));
    assert_false(image_file_format_of("", &f));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pixels_and_record_come_back),
        cmocka_unit_test(same_row_gives_the_same_bytes),
        cmocka_unit_test(other_programs_find_parameters_and_mark),
        cmocka_unit_test(prompt_in_any_script_is_kept),
        cmocka_unit_test(prompt_that_is_not_utf8_is_refused),
        cmocka_unit_test(record_longer_than_a_jpeg_segment_is_kept_whole),
        cmocka_unit_test(damaged_files_are_refused_or_decoded),
        cmocka_unit_test(lying_sizes_are_refused_before_memory_is_taken),
        cmocka_unit_test(pictures_are_turned_as_exif_says),
        cmocka_unit_test(damaged_exif_is_no_damage_to_the_picture),
        cmocka_unit_test(formats_are_known_by_name_and_ending),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
