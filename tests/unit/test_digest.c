/* test_digest.c - SHA-256 and the digest of a model folder.
 * If this breaks, images name the wrong weights, and audits call good files damaged.
 * Expected values: FIPS 180-2 examples; `printf x | sha256sum`. */
#include "digest.h"

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

static char folder[] = "/tmp/kiln-test-digest.XXXXXX";

static void make_folder(const char *name)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    assert_int_equal(mkdir(path, 0777), 0);
}

static void move(const char *from, const char *to)
{
    char a[512], b[512];
    snprintf(a, sizeof a, "%s/%s", folder, from);
    snprintf(b, sizeof b, "%s/%s", folder, to);
    assert_int_equal(rename(a, b), 0);
}

static int set_up(void **state)
{
    (void)state;
    strcpy(strrchr(folder, '.') + 1, "XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int tear_down(void **state)
{
    (void)state;
    char command[600];
    snprintf(command, sizeof command, "rm -rf '%s'", folder);
    return system(command);
}

static void published_vectors_hold(void **state)
{
    (void)state;
    char hex[65];
    assert_true(digest_of("", 0, hex));
    assert_string_equal(hex, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    assert_true(digest_of("abc", 3, hex));
    assert_string_equal(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    struct digest *d = digest_new();
    char thousand[1000];
    memset(thousand, 'a', sizeof thousand);
    for (int i = 0; i < 1000; i++)
        digest_add(d, thousand, sizeof thousand);
    uint8_t raw[32];
    assert_true(digest_done(d, raw));
    digest_hex(raw, 32, hex);
    assert_string_equal(hex, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

static void file_gives_digest_and_size_and_a_missing_one_a_sentence(void **state)
{
    (void)state;
    char hex[65], path[512], why[256] = "";
    uint64_t bytes = 0;
    put_file(folder, "a.bin", "abc", 3);
    snprintf(path, sizeof path, "%s/a.bin", folder);
    assert_true(digest_file(path, hex, &bytes, why, sizeof why));
    assert_int_equal(bytes, 3);
    assert_string_equal(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    snprintf(path, sizeof path, "%s/absent", folder);
    assert_false(digest_file(path, hex, &bytes, why, sizeof why));
    assert_non_null(strstr(why, path));
    assert_non_null(strstr(why, "No such file"));
    assert_false(digest_file(folder, hex, NULL, why, sizeof why)); /* a folder is no file */
}

/* A pipe without a writer and a device without an end are never read to their end. */
static void what_is_no_file_is_refused_and_not_read(void **state)
{
    (void)state;
    char hex[65], path[512], why[256] = "";
    snprintf(path, sizeof path, "%s/pipe", folder);
    assert_int_equal(mkfifo(path, 0600), 0);
    alarm(20); /* a program that hangs here fails */
    assert_false(digest_file(path, hex, NULL, why, sizeof why));
    assert_non_null(strstr(why, "not a file"));
    assert_false(digest_file("/dev/zero", hex, NULL, why, sizeof why));
    assert_non_null(strstr(why, "not a file"));
    alarm(0);
}

/* A model digest must see content, names and parts, and nothing else. */
static void model_digest_sees_every_change_of_weights_and_no_other(void **state)
{
    (void)state;
    char first[65], now[65], why[256];
    assert_false(digest_model(folder, now, why, sizeof why));
    assert_non_null(strstr(why, "not a model folder"));

    make_folder("transformer");
    make_folder("vae");
    put_file(folder, "model_index.json", "{}", 2);
    put_file(folder, "transformer/config.json", "{}", 2);
    put_file(folder, "transformer/a.safetensors", "weights", 7);
    put_file(folder, "vae/config.json", "{1}", 3);
    assert_true(digest_model(folder, first, why, sizeof why));

    put_file(folder, "README.md", "words", 5);
    put_file(folder, ".hidden.json", "words", 5);
    make_folder("vae/deeper");
    put_file(folder, "vae/deeper/x.json", "words", 5);
    assert_true(digest_model(folder, now, why, sizeof why));
    assert_string_equal(first, now);

    put_file(folder, "transformer/a.safetensors", "weightz", 7);
    assert_true(digest_model(folder, now, why, sizeof why));
    assert_string_not_equal(first, now);

    put_file(folder, "transformer/a.safetensors", "weights", 7);
    move("vae/config.json", "transformer/config2.json");
    assert_true(digest_model(folder, now, why, sizeof why));
    assert_string_not_equal(first, now);

    move("transformer/config2.json", "vae/config.json");
    assert_true(digest_model(folder, now, why, sizeof why));
    assert_string_equal(first, now);
}

/* Anybody can compute it: (cd MODEL && sha256sum FILE.. | sha256sum), files in the order of their names. */
static void model_digest_is_that_of_sha256sums_lines(void **state)
{
    (void)state;
    char model[65], lines[65], why[256];
    make_folder("vae");
    put_file(folder, "model_index.json", "abc", 3);
    put_file(folder, "vae/a.safetensors", "", 0);
    static const char text[] = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  model_index.json\n"
                               "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855  vae/a.safetensors\n";
    assert_true(digest_model(folder, model, why, sizeof why));
    assert_true(digest_of(text, strlen(text), lines));
    assert_string_equal(model, lines);
    put_file(folder, "two\nlines.json", "{}", 2);
    assert_false(digest_model(folder, model, why, sizeof why));
    assert_non_null(strstr(why, "line break"));
}

/* A part that comes from elsewhere is not hashed, in either form; a file that only begins like it is. */
static void model_digest_leaves_out_parts(void **state)
{
    (void)state;
    static const char *const parts[] = {"transformer", "vae", NULL};
    char all[65], one[65], two[65], why[256];
    make_folder("transformer");
    put_file(folder, "transformer.gguf", "12", 2);
    put_file(folder, "transformer/config.json", "34", 2);
    put_file(folder, "transformers.txt", "5", 1);
    assert_true(digest_model(folder, all, why, sizeof why) && digest_model_without(folder, parts, one, why, sizeof why));
    assert_string_not_equal(all, one);
    put_file(folder, "transformer.gguf", "00", 2);
    put_file(folder, "transformer/config.json", "00", 2);
    assert_true(digest_model_without(folder, parts, two, why, sizeof why));
    assert_string_equal(one, two);
    put_file(folder, "transformers.txt", "6", 1);
    assert_true(digest_model_without(folder, parts, two, why, sizeof why));
    assert_string_not_equal(one, two);
}

/* Bytes moved over a file border must not go unseen. */
static void model_digest_knows_where_files_end(void **state)
{
    (void)state;
    char one[65], two[65], why[256];
    put_file(folder, "a.txt", "12", 2);
    put_file(folder, "b.txt", "3", 1);
    assert_true(digest_model(folder, one, why, sizeof why));
    put_file(folder, "a.txt", "1", 1);
    put_file(folder, "b.txt", "23", 2);
    assert_true(digest_model(folder, two, why, sizeof why));
    assert_string_not_equal(one, two);
}

/* Downloaded models are folders of links into a cache. */
static void model_of_links_has_the_digest_of_its_files(void **state)
{
    (void)state;
    char one[65], two[65], why[256], link[512];
    put_file(folder, "a.txt", "12", 2);
    assert_true(digest_model(folder, one, why, sizeof why));
    put_file(folder, "blob", "12", 2);
    snprintf(link, sizeof link, "%s/a.txt", folder);
    assert_int_equal(unlink(link), 0);
    assert_int_equal(symlink("blob", link), 0);
    assert_true(digest_model(folder, two, why, sizeof why));
    assert_string_equal(one, two);
    assert_int_equal(unlink(link), 0);
    assert_int_equal(symlink("gone", link), 0);
    assert_false(digest_model(folder, two, why, sizeof why));
    assert_non_null(strstr(why, "a.txt"));
}

/* A program that ends does not wait for sixteen gigabytes. */
static void hashing_is_given_up_when_told_so(void **state)
{
    (void)state;
    char why[512], hex[65], path[512];
    atomic_bool stop = true;
    put_file(folder, "big", "12345", 5);
    snprintf(path, sizeof path, "%s/big", folder);
    digest_stop_when(&stop);
    assert_false(digest_file(path, hex, NULL, why, sizeof why));
    assert_non_null(strstr(why, "given up"));
    put_file(folder, "a.txt", "12", 2);
    put_file(folder, "b.txt", "3", 1);
    assert_false(digest_model(folder, hex, why, sizeof why));
    assert_non_null(strstr(why, "given up"));
    stop = false;
    assert_true(digest_file(path, hex, NULL, why, sizeof why));
    assert_true(digest_model(folder, hex, why, sizeof why));
    digest_stop_when(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(published_vectors_hold),
        cmocka_unit_test_setup_teardown(file_gives_digest_and_size_and_a_missing_one_a_sentence, set_up, tear_down),
        cmocka_unit_test_setup_teardown(what_is_no_file_is_refused_and_not_read, set_up, tear_down),
        cmocka_unit_test_setup_teardown(model_digest_sees_every_change_of_weights_and_no_other, set_up, tear_down),
        cmocka_unit_test_setup_teardown(model_digest_is_that_of_sha256sums_lines, set_up, tear_down),
        cmocka_unit_test_setup_teardown(hashing_is_given_up_when_told_so, set_up, tear_down),
        cmocka_unit_test_setup_teardown(model_digest_leaves_out_parts, set_up, tear_down),
        cmocka_unit_test_setup_teardown(model_digest_knows_where_files_end, set_up, tear_down),
        cmocka_unit_test_setup_teardown(model_of_links_has_the_digest_of_its_files, set_up, tear_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
