/* test_submit.c - what a submission computes before the database hears of it.
 * If this breaks, submitting a file again renders everything again, a new line changes the seeds of others, or prompts that
 * are too long are found after hours. */
#include "submit.h"

#include "audit.h"
#include "digest.h"
#include "image_file.h"
#include "image_plan.h"
#include "model_check.h"
#include "row_inputs.h"
#include "store_dir.h"
#include "table.h"
#include "token_check.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "put_file.h"

static char why[4096];
static const struct task_inputs no_inputs;

/* --- seeds and keys ------------------------------------------------------------------------------------- */

struct image { char prompt[64], file[256]; uint64_t seed; uint8_t key[16]; int row, variation, width, steps; };
struct images { struct image at[64]; int count; };

static bool keep(void *context, const struct task_row *r)
{
    struct images *list = context;
    struct image *image = &list->at[list->count++];
    snprintf(image->prompt, sizeof image->prompt, "%s", r->prompt);
    snprintf(image->file, sizeof image->file, "%s", r->file);
    memcpy(image->key, r->content_key, 16);
    image->seed = r->seed;
    image->row = r->row;
    image->variation = r->variation;
    image->width = r->width;
    image->steps = r->steps;
    return true;
}

static struct image_plan_defaults defaults(void)
{
    return (struct image_plan_defaults){.model = "m", .format = "png", .width = 512, .height = 512, .guidance = NAN, .variations = 1};
}

static struct images plan(const char *title, const char *text, const struct image_plan_defaults *d)
{
    struct images list = {0};
    struct image_plan p;
    struct prompt_file *f;
    struct prompt_row row;
    image_plan_init(&p, d);
    assert_true(prompt_file_open_memory(&f, text, strlen(text), title, PROMPT_AUTO, why, sizeof why));
    while (prompt_file_next(f, &row, why, sizeof why) == PROMPT_ROW)
        assert_true(image_plan_row(&p, &row, &no_inputs, keep, &list, why, sizeof why));
    prompt_file_close(f);
    image_plan_done(&p);
    return list;
}

static const struct image *with_key(const struct images *list, const uint8_t key[16])
{
    for (int i = 0; i < list->count; i++)
        if (memcmp(list->at[i].key, key, 16) == 0)
            return &list->at[i];
    return NULL;
}

static void lines_that_are_added_change_no_other_image(void **state)
{
    (void)state;
    struct image_plan_defaults d = defaults();
    d.variations = 3;
    struct images before = plan("a.txt", "fox\nowl\nfox\ncat\n", &d);
    struct images after = plan("a.txt", "new\nfox\nnewer\nowl\nfox\ncat\nlast\n", &d);
    assert_int_equal(before.count, 12);
    assert_int_equal(after.count, 21);
    for (int i = 0; i < before.count; i++) {
        const struct image *same = with_key(&after, before.at[i].key);
        assert_non_null(same);
        assert_true(same->seed == before.at[i].seed);
        assert_string_equal(same->prompt, before.at[i].prompt);
    }
}

static void line_that_stands_twice_is_two_images_with_two_seeds(void **state)
{
    (void)state;
    struct image_plan_defaults d = defaults();
    struct images list = plan("a.txt", "fox\nfox\nfox\n", &d);
    for (int i = 0; i < 3; i++)
        for (int k = 0; k < i; k++) {
            assert_true(list.at[i].seed != list.at[k].seed);
            assert_memory_not_equal(list.at[i].key, list.at[k].key, 16);
            assert_string_not_equal(list.at[i].file, list.at[k].file);
        }
    /* ... while the same prompt at two sizes keeps its seed: they are compared with each other */
    list = plan("a.csv", "prompt,width\nfox,64\nfox,128\n", &d);
    assert_true(list.at[0].seed == list.at[1].seed);
    assert_memory_not_equal(list.at[0].key, list.at[1].key, 16);
}

static void given_seeds_count_up_and_overlap_without_losing_images(void **state)
{
    (void)state;
    struct image_plan_defaults d = defaults();
    d.variations = 2;
    struct images list = plan("a.csv", "prompt,seed\nfox,5\nfox,6\nfox,5\n", &d);
    static const uint64_t seeds[] = {5, 6, 6, 7, 5, 6};
    assert_int_equal(list.count, 6);
    for (int i = 0; i < 6; i++) {
        assert_true(list.at[i].seed == seeds[i]);
        assert_int_equal(list.at[i].variation, i % 2);
        assert_int_equal(list.at[i].row, i / 2 + 1);
        assert_ptr_equal(with_key(&list, list.at[i].key), &list.at[i]); /* all keys differ */
    }
}

/* The encoding is a promise: if these change, old campaigns are rendered again when they are submitted again.
 * Computed from the encoding with Python's hashlib (lengths and numbers as 8 bytes, little end first). */
static void seeds_and_keys_are_those_of_the_first_release(void **state)
{
    (void)state;
    struct image_plan_defaults d = defaults();
    d.base_seed = 7;
    struct images list = plan("a.txt", "fox\nfox\n", &d);
    char hex[33];
    assert_true(list.at[0].seed == UINT64_C(2613631357));
    assert_true(list.at[1].seed == UINT64_C(209429981));
    digest_hex(list.at[1].key, 16, hex);
    assert_string_equal(hex, "58d365bb5708e0ec25a346615e122663");
    d = defaults();
    d.guidance = 3.5;
    d.steps = 4;
    d.negative = "blur";
    d.truncate = true;
    list = plan("a.csv", "prompt,seed\nF\xc3\xbc""chse,18446744073709551615\n", &d);
    digest_hex(list.at[0].key, 16, hex);
    assert_string_equal(hex, "e3616bc419c6dcb6d0de7d05412a829c");
}

static void every_setting_is_part_of_the_key_and_names_are_not(void **state)
{
    (void)state;
    struct image_plan_defaults base = defaults(), d;
    const char *const text = "prompt,seed\nfox,1\n";
    struct images first = plan("a.csv", text, &base);
#define CHANGED(change)                                                                                                \
    do {                                                                                                               \
        d = base;                                                                                                      \
        change;                                                                                                        \
        struct images other = plan("a.csv", text, &d);                                                                 \
        assert_memory_not_equal(first.at[0].key, other.at[0].key, 16);                                                 \
    } while (0)
    CHANGED(d.model = "n");
    CHANGED(d.negative = "x");
    CHANGED(d.format = "jpg");
    CHANGED(d.width = 528);
    CHANGED(d.height = 528);
    CHANGED(d.steps = 4);
    CHANGED(d.guidance = 1);
    CHANGED(d.truncate = true);
    struct images other = plan("a.csv", "prompt,seed,name,label\nfox,1,n,x\n", &base);
    assert_memory_equal(first.at[0].key, other.at[0].key, 16);
    assert_true(strncmp(other.at[0].file, "n-", 2) == 0);
    d = base;
    d.base_seed = 9; /* a given seed does not care */
    other = plan("a.csv", text, &d);
    assert_memory_equal(first.at[0].key, other.at[0].key, 16);
    other = plan("a.txt", "fox\n", &d);
    first = plan("a.txt", "fox\n", &base);
    assert_true(first.at[0].seed != other.at[0].seed);
    assert_true(first.at[0].seed <= UINT32_MAX);
}

static void rows_are_checked_together_with_the_defaults(void **state)
{
    (void)state;
    struct image_plan_defaults d = defaults();
    struct image_plan p;
    struct prompt_row row = {.prompt = "fox", .guidance = NAN, .width = 65536};
    image_plan_init(&p, &d);
    assert_false(image_plan_check(&p, &row, &no_inputs, why, sizeof why)); /* 65536x512 */
    assert_non_null(strstr(why, "65536x512"));
    row.height = 64;
    assert_true(image_plan_check(&p, &row, &no_inputs, why, sizeof why));
    row = (struct prompt_row){.prompt = "fox", .guidance = NAN, .has_seed = true, .seed = UINT64_MAX};
    assert_true(image_plan_check(&p, &row, &no_inputs, why, sizeof why));
    p.defaults.variations = 2;
    assert_false(image_plan_check(&p, &row, &no_inputs, why, sizeof why));
    assert_non_null(strstr(why, "18446744073709551615"));
    p.defaults.variations = 1;
    p.defaults.model = NULL;
    assert_false(image_plan_check(&p, &row, &no_inputs, why, sizeof why));
    assert_non_null(strstr(why, "--model"));
    image_plan_done(&p);
}

/* --- words ---------------------------------------------------------------------------------------------- */

static void campaign_names_are_plain(void **state)
{
    (void)state;
    static const struct {
        const char *name, *word;
    } bad[] = {{"", "empty"}, {"a/b", "'/' at position 2"}, {"..", "begins with '.'"}, {".x", "begins with '.'"},
               {"a b", "' ' at position 2"}, {"fox\xf0\x9f\xa6\x8a", "'\xf0\x9f\xa6\x8a' at position 4"}, {"a\nb", "byte 0x0a"},
               {"\xff", "byte 0xff"}, {"f\xc3\xbc", "'\xc3\xbc' at position 2"}, {"\xf0\x9f", "byte 0xf0"}, {"a'b", "'''"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_false(submit_campaign_ok(bad[i].name, why, sizeof why));
        if (!strstr(why, bad[i].word) || !strstr(why, "accepted are 1 to 100"))
            fail_msg("'%s' does not say %s", why, bad[i].word);
    }
    char longest[102];
    memset(longest, 'a', sizeof longest);
    longest[100] = 0;
    assert_true(submit_campaign_ok(longest, why, sizeof why));
    longest[100] = 'a';
    longest[101] = 0;
    assert_false(submit_campaign_ok(longest, why, sizeof why));
    assert_non_null(strstr(why, "101"));
    assert_true(submit_campaign_ok("A-z_0.9", why, sizeof why));
}

static void sizes_are_two_numbers_within_the_rules(void **state)
{
    (void)state;
    int width = 0, height = 0;
    assert_true(prompt_file_read_size("512x768", &width, &height, why, sizeof why));
    assert_true(width == 512 && height == 768);
    assert_true(prompt_file_read_size("64X64", &width, &height, why, sizeof why));
    static const char *const bad[] = {"", "512", "512x", "x512", "512x512x512", "512 x 512", "-64x64", "100x100", "48x64",
                                      "4096x4096", "99999999999x64", "512x512 ", "0x0", "0x40x40"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        why[0] = 0;
        if (prompt_file_read_size(bad[i], &width, &height, why, sizeof why))
            fail_msg("'%s' was accepted", bad[i]);
        assert_true(why[0] != 0);
    }
    assert_true(width == 64 && height == 64);
}

static void licences_that_forbid_commercial_use_are_known(void **state)
{
    (void)state;
    assert_false(model_check_is_commercial("FLUX Non-Commercial"));
    assert_true(model_check_is_commercial("Apache-2.0"));
    assert_true(model_check_is_commercial("unknown"));
}

static void audit_knows_our_files_from_others(void **state)
{
    (void)state;
    char name[256];
    static const uint8_t key[16] = {0xab, 0xcd, 0xef, 0x12};
    static const char *const formats[] = {"png", "jpg", "webp"};
    for (int i = 0; i < 3; i++) {
        store_dir_file_name(name, sizeof name, i ? "fox.1" : NULL, 3, i, i + 1, key, formats[i]);
        assert_true(audit_is_ours(name));
    }
    static const char *const strangers[] = {"fox.png", "000012-0a1b2c3.png", "000012-0a1b2c3d.gif", "000012-0A1B2C3D.png", ".png",
                                            "-0a1b2c3d", "x-0a1b2c3d.png.bak", ".x-0a1b2c3d.png"};
    for (size_t i = 0; i < sizeof strangers / sizeof *strangers; i++)
        if (audit_is_ours(strangers[i]))
            fail_msg("%s", strangers[i]);
}

static void text_for_the_terminal_stays_on_its_line(void **state)
{
    (void)state;
    char shown[64];
    table_shown(shown, sizeof shown, "a\nb\x1b[31m\tc\x7f", 40);
    assert_string_equal(shown, "a b [31m c ");
    table_shown(shown, sizeof shown, "0123456789", 10);
    assert_string_equal(shown, "0123456789");
    table_shown(shown, sizeof shown, "0123456789a", 10);
    assert_string_equal(shown, "0123456...");
    table_shown(shown, sizeof shown, "\xc3\xbc\xc3\xbc\xc3\xbc\xc3\xbc\xc3\xbc\xc3\xbc", 5);
    assert_string_equal(shown, "\xc3\xbc\xc3\xbc...");
}

/* --- the tokenizer beside us ------------------------------------------------------------------------------ */

/* A program that counts a token a byte, in the place of kiln-worker. */
static const char *tool(const char *script)
{
    static char path[] = "/tmp/kiln-test-tool.XXXXXX";
    strcpy(strrchr(path, '.') + 1, "XXXXXX");
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, script, strlen(script)), (ssize_t)strlen(script));
    assert_int_equal(fchmod(fd, 0755), 0);
    assert_int_equal(close(fd), 0);
    return path;
}

static const char counting[] = "#!/bin/sh\nexec awk '{ print length($0) - 2 }'\n";

static char *repeat(char c, size_t count)
{
    char *text = malloc(count + 1);
    memset(text, c, count);
    text[count] = 0;
    return text;
}

static void only_texts_that_may_be_too_long_are_counted(void **state)
{
    (void)state;
    char *ascii = repeat('a', 480), *wide = repeat('a', 161);
    assert_false(token_check_may_be_long(ascii));
    ascii[479] = '\xc3'; /* not ASCII any more: normalisation may triple it */
    assert_true(token_check_may_be_long(ascii));
    memcpy(wide + 100, "\xc3\xbc", 2);
    assert_true(token_check_may_be_long(wide));
    wide[160] = 0;
    assert_false(token_check_may_be_long(wide));
    free(ascii);
    ascii = repeat('a', 481);
    assert_true(token_check_may_be_long(ascii));
    free(ascii);
    free(wide);
}

/* More questions than pipes hold, while the other side answers as it likes: nobody may wait for the other. */
static void hundred_thousand_long_prompts_pass_without_deadlock(void **state)
{
    (void)state;
    const char *path = tool(counting);
    struct token_check *c;
    int64_t line;
    char *text = repeat('a', 500);
    assert_true(token_check_open(&c, path, "/model", why, sizeof why));
    for (int i = 1; i <= 100000; i++)
        if (!token_check_add(c, i, "prompt", text, &line, why, sizeof why))
            fail_msg("line %d: %s", i, why);
    assert_true(token_check_finish(c, &line, why, sizeof why));
    token_check_close(c);
    free(text);
    unlink(path);
}

static void first_prompt_that_is_too_long_is_named_by_its_line(void **state)
{
    (void)state;
    const char *path = tool(counting);
    struct token_check *c;
    int64_t line = 0;
    char *good = repeat('a', 512), *bad = repeat('a', 513);
    assert_true(token_check_open(&c, path, "/model", why, sizeof why));
    for (int i = 1; i <= 50; i++)
        assert_true(token_check_add(c, i, "prompt", i == 17 || i == 30 ? bad : good, &line, why, sizeof why));
    assert_false(token_check_finish(c, &line, why, sizeof why));
    assert_int_equal(line, 17);
    assert_non_null(strstr(why, "513 tokens"));
    assert_non_null(strstr(why, "at most 512"));
    token_check_close(c);
    free(good);
    free(bad);
    unlink(path);
}

static void tokenizer_that_fails_is_a_sentence(void **state)
{
    (void)state;
    static const struct {
        const char *script, *word;
    } cases[] = {{"#!/bin/sh\nexit 3\n", "code 3"}, {"#!/bin/sh\nkill -9 $$\n", "signal 9"},
                 {"#!/bin/sh\nread x; echo '[1,2]'; cat >/dev/null\n", "not a count"},
                 {"#!/bin/sh\nread x; echo 5; echo 6; cat >/dev/null\n", "early with code 0"}}; /* too few answers */
    char *text = repeat('a', 500);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *path = tool(cases[i].script);
        struct token_check *c;
        int64_t line = 7;
        assert_true(token_check_open(&c, path, "/model", why, sizeof why));
        bool ok = true;
        for (int k = 0; ok && k < 2000; k++)
            ok = token_check_add(c, 1, "prompt", text, &line, why, sizeof why);
        assert_false(ok && token_check_finish(c, &line, why, sizeof why));
        assert_int_equal(line, 0);
        if (!strstr(why, cases[i].word))
            fail_msg("'%s' does not say %s", why, cases[i].word);
        token_check_close(c);
        unlink(path);
    }
    struct token_check *c;
    int64_t line;
    assert_true(token_check_open(&c, "/nowhere/kiln-worker", "/model", why, sizeof why));
    assert_true(token_check_add(c, 1, "prompt", "short", &line, why, sizeof why)); /* nothing is started for it */
    assert_false(token_check_add(c, 1, "prompt", text, &line, why, sizeof why));
    assert_non_null(strstr(why, "No such file"));
    token_check_close(c);
    free(text);
}

/* --- inputs ---------------------------------------------------------------------------------------------- */

static char folder[64];

static void put_image(const char *name, int width, int height, uint8_t shade)
{
    struct image_record record = {.prompt = "x", .width = width, .height = height};
    uint8_t *rgb = malloc((size_t)width * (size_t)height * 3);
    void *png;
    size_t bytes;
    memset(rgb, shade, (size_t)width * (size_t)height * 3);
    assert_true(image_file_encode(&png, &bytes, IMAGE_PNG, rgb, &record, why, sizeof why));
    put_file(folder, name, png, bytes);
    free(png);
    free(rgb);
}

static void make_folder(void)
{
    strcpy(folder, "/tmp/kiln-test-submit-XXXXXX");
    assert_non_null(mkdtemp(folder));
    put_image("a.png", 96, 128, 10);
    put_image("b.png", 64, 64, 200);
    put_file(folder, "x.safetensors", "lora", 4);
}

static void drop_folder(void)
{
    char command[100];
    snprintf(command, sizeof command, "rm -rf %s", folder);
    assert_int_equal(system(command), 0);
}

static bool inputs_of(struct row_inputs *r, const struct prompt_inputs *in, struct task_inputs *ret)
{
    struct prompt_row row = {.prompt = "fox", .guidance = NAN, .inputs = *in};
    return row_inputs_of(r, &row, ret, why, sizeof why);
}

static void files_of_a_row_are_beside_the_prompt_file_and_read_once(void **state)
{
    (void)state;
    struct row_inputs r;
    struct task_inputs in;
    char title[100], mask[100];
    make_folder();
    snprintf(title, sizeof title, "%s/prompts.csv", folder);
    snprintf(mask, sizeof mask, "%s/b.png", folder);
    assert_true(row_inputs_begin(&r, title, &(struct prompt_inputs){.mask = mask, .strength = 0.5}));
    struct prompt_inputs row = {.image_count = 2, .images = {"a.png", "./b.png"}, .lora_count = 1, .loras = {"x.safetensors:-0.5"}};
    for (int turn = 0; turn < 2; turn++) {
        assert_true(inputs_of(&r, &row, &in));
        assert_int_equal(in.image_count, 2);
        assert_int_equal(in.images[0].width, 96);
        assert_int_equal(in.images[0].height, 128);
        assert_string_equal(in.images[1].path, in.mask.path);
        assert_string_equal(in.images[1].sha256, in.mask.sha256);
        assert_true(in.loras[0].scale == -0.5 && in.strength == 0.5);
        task_inputs_done(&in);
    }
    assert_int_equal(r.count, 3);
    put_image("a.png", 64, 64, 11); /* what was read stays: the worker will say that it changed */
    assert_true(inputs_of(&r, &row, &in));
    assert_int_equal(in.images[0].width, 96);
    task_inputs_done(&in);
    row_inputs_done(&r);
    drop_folder();
}

static void files_that_are_missing_or_no_pictures_are_named(void **state)
{
    (void)state;
    struct row_inputs r;
    struct task_inputs in;
    char title[100];
    make_folder();
    snprintf(title, sizeof title, "%s/prompts.csv", folder);
    assert_true(row_inputs_begin(&r, title, &(struct prompt_inputs){0}));
    assert_false(inputs_of(&r, &(struct prompt_inputs){.image_count = 1, .images = {"none.png"}}, &in));
    assert_non_null(strstr(why, "image 'none.png': cannot be read: No such file"));
    assert_false(inputs_of(&r, &(struct prompt_inputs){.image_count = 2, .images = {"a.png", "x.safetensors"}}, &in));
    assert_non_null(strstr(why, "x.safetensors"));
    assert_false(inputs_of(&r, &(struct prompt_inputs){.image_count = 1, .images = {"."}}, &in));
    assert_non_null(strstr(why, "not a file"));
    assert_false(inputs_of(&r, &(struct prompt_inputs){.mask = "b.png"}, &in));
    assert_non_null(strstr(why, "a mask without an image"));
    assert_false(inputs_of(&r, &(struct prompt_inputs){.image_count = 1, .images = {"a.png"}, .strength = 0.5}, &in));
    assert_non_null(strstr(why, "a strength without a mask"));
    row_inputs_done(&r);
    drop_folder();
}

/* A refused submission leaves nothing behind: the database would say no when the campaign is made already. */
static void files_whose_names_cannot_be_written_down_are_refused(void **state)
{
    (void)state;
    struct row_inputs r;
    struct task_inputs in;
    struct prompt_inputs row = {.image_count = 1, .images = {"link.png"}};
    char path[200], target[200], title[100], deep[4000];
    make_folder();
    snprintf(title, sizeof title, "%s/prompts.csv", folder);
    snprintf(path, sizeof path, "%s/link.png", folder);
    snprintf(target, sizeof target, "%s/\xff.png", folder);
    put_image("\xff.png", 64, 64, 1);
    assert_int_equal(symlink(target, path), 0);
    assert_true(row_inputs_begin(&r, title, &(struct prompt_inputs){0}));
    assert_false(inputs_of(&r, &row, &in));
    assert_non_null(strstr(why, "image 'link.png'"));
    assert_non_null(strstr(why, "no UTF-8"));
    int used = snprintf(deep, sizeof deep, "%s", folder); /* a control character is six in JSON */
    for (int i = 0; i < 14; i++) {
        deep[used] = '/';
        memset(deep + used + 1, 1, 240);
        used += 241;
        deep[used] = 0;
        assert_int_equal(mkdir(deep, 0700), 0);
    }
    snprintf(deep + used, sizeof deep - (size_t)used, "/a.png");
    snprintf(path, sizeof path, "%s/a.png", folder);
    assert_int_equal(link(path, deep), 0);
    row = (struct prompt_inputs){.image_count = 10, .images = {deep, deep, deep, deep, deep, deep, deep, deep, deep, deep}};
    assert_false(inputs_of(&r, &row, &in));
    assert_non_null(strstr(why, "the paths of its files"));
    row.image_count = 5;
    assert_true(inputs_of(&r, &row, &in));
    task_inputs_done(&in);
    row_inputs_done(&r);
    drop_folder();
}

static struct image one_image(const struct image_plan_defaults *d, const struct task_inputs *in)
{
    struct images list = {0};
    struct image_plan p;
    struct prompt_row row = {.prompt = "fox", .guidance = NAN};
    image_plan_init(&p, d);
    assert_true(image_plan_row(&p, &row, in, keep, &list, why, sizeof why));
    image_plan_done(&p);
    return list.at[0];
}

/* Same prompt and seed with another reference, mask or adapter is another image; the place of a file is no part of it. */
static void inputs_are_part_of_the_content_key_and_give_the_size(void **state)
{
    (void)state;
    struct image_plan_defaults d = defaults();
    d.width = d.height = 0;
    struct task_inputs in = {0};
    struct image plain = one_image(&d, &in), images[5];
    assert_int_equal(plain.width, 512);
    in = (struct task_inputs){.image_count = 1, .images = {{.path = "/a/x.png", .width = 100, .height = 70}}};
    strcpy(in.images[0].sha256, "aa");
    images[0] = one_image(&d, &in);
    assert_int_equal(images[0].width, 96);
    in.images[0].path = "/b/y.png";
    images[1] = one_image(&d, &in);
    assert_memory_equal(images[0].key, images[1].key, 16);
    strcpy(in.images[0].sha256, "ab");
    images[1] = one_image(&d, &in);
    in.mask = (struct task_inputs_file){.path = "/m.png", .sha256 = "cc"};
    images[2] = one_image(&d, &in);
    in.strength = 0.5;
    images[3] = one_image(&d, &in);
    in.lora_count = 1;
    in.loras[0] = (struct task_inputs_lora){{.path = "/l", .sha256 = "dd"}, 1};
    images[4] = one_image(&d, &in);
    for (int i = 0; i < 5; i++) {
        assert_memory_not_equal(images[i].key, plain.key, 16);
        for (int k = 0; k < i; k++)
            assert_memory_not_equal(images[i].key, images[k].key, 16);
    }
    d.width = d.height = 128;
    assert_int_equal(one_image(&d, &in).width, 128);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lines_that_are_added_change_no_other_image),
        cmocka_unit_test(line_that_stands_twice_is_two_images_with_two_seeds),
        cmocka_unit_test(given_seeds_count_up_and_overlap_without_losing_images),
        cmocka_unit_test(seeds_and_keys_are_those_of_the_first_release),
        cmocka_unit_test(files_of_a_row_are_beside_the_prompt_file_and_read_once),
        cmocka_unit_test(files_that_are_missing_or_no_pictures_are_named),
        cmocka_unit_test(files_whose_names_cannot_be_written_down_are_refused),
        cmocka_unit_test(inputs_are_part_of_the_content_key_and_give_the_size),
        cmocka_unit_test(every_setting_is_part_of_the_key_and_names_are_not),
        cmocka_unit_test(rows_are_checked_together_with_the_defaults),
        cmocka_unit_test(campaign_names_are_plain),
        cmocka_unit_test(sizes_are_two_numbers_within_the_rules),
        cmocka_unit_test(licences_that_forbid_commercial_use_are_known),
        cmocka_unit_test(audit_knows_our_files_from_others),
        cmocka_unit_test(text_for_the_terminal_stays_on_its_line),
        cmocka_unit_test(only_texts_that_may_be_too_long_are_counted),
        cmocka_unit_test(hundred_thousand_long_prompts_pass_without_deadlock),
        cmocka_unit_test(first_prompt_that_is_too_long_is_named_by_its_line),
        cmocka_unit_test(tokenizer_that_fails_is_a_sentence),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
