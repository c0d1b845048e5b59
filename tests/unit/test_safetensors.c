/* test_safetensors.c - files that tell the truth are read; every lie of a header is refused with a sentence that names it.
 * If this breaks, a damaged or hostile model file is read past its end or renders noise. */
#include "safetensors.h"

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

static char dir[64];

/* A file's bytes: length, header, data of zeros. */
static size_t make(uint8_t *to, const char *header, size_t data_bytes)
{
    size_t length = strlen(header);
    for (int i = 0; i < 8; i++)
        to[i] = (uint8_t)(length >> (8 * i));
    memcpy(to + 8, header, length);
    memset(to + 8 + length, 0, data_bytes);
    return 8 + length + data_bytes;
}

static void expect_parse(const char *header, size_t data_bytes, const char *says)
{
    static uint8_t file[1 << 16];
    struct safetensors *s = NULL;
    struct engine_error why = {0};
    size_t bytes = make(file, header, data_bytes);
    uint8_t *exact = malloc(bytes); /* sanitizers see a byte read too far */
    memcpy(exact, file, bytes);
    bool ok = safetensors_parse(&s, exact, bytes, &why);
    if (!says && !ok)
        fail_msg("refused: %s", why.text);
    if (says && (ok || why.fault != ENGINE_BAD_MODEL || !strstr(why.text, says)))
        fail_msg("'%s' does not say '%s' of %s", why.text, says, header);
    safetensors_close(s);
    free(exact);
}

/* --- headers ------------------------------------------------------------------------------------------- */

static void a_true_header_gives_its_tensors_sorted_by_name(void **state)
{
    (void)state;
    static const char header[] = "{\"__metadata__\":{\"format\":\"pt\",\"n\":3},"
                                 "\"b\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]},"
                                 "\"scalar\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[24,32]},"
                                 "\"a\":{\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[32,40]},"
                                 "\"empty\":{\"dtype\":\"F32\",\"shape\":[0,7],\"data_offsets\":[40,40]}}   ";
    uint8_t file[1024];
    struct safetensors *s;
    struct engine_error why;
    size_t bytes = make(file, header, 40);
    assert_true(safetensors_parse(&s, file, bytes, &why));
    assert_int_equal(safetensors_count(s), 4);
    assert_string_equal(safetensors_at(s, 0)->name, "a");
    assert_string_equal(safetensors_at(s, 3)->name, "scalar");
    const struct safetensors_entry *b = safetensors_find(s, "b");
    assert_int_equal(b->rank, 2);
    assert_true(b->shape[0] == 2 && b->shape[1] == 3 && b->bytes == 24 && b->dtype == SAFETENSORS_F32);
    assert_ptr_equal(b->data, file + 8 + strlen(header));
    assert_int_equal(safetensors_find(s, "scalar")->rank, 0);
    assert_false(b->is_mapped);
    assert_null(safetensors_find(s, "c"));
    assert_string_equal(safetensors_metadata(s, "format"), "pt");
    assert_null(safetensors_metadata(s, "n"));
    assert_null(safetensors_metadata(s, "none"));
    safetensors_advise(b, SAFETENSORS_DONE); /* memory of the caller stays as it is */
    safetensors_close(s);
    safetensors_close(NULL);
    expect_parse("{}", 0, NULL);
}

#define ONE(fields) "{\"x\":{" fields "}}"
#define F32_OF(shape, offsets) ONE("\"dtype\":\"F32\",\"shape\":" shape ",\"data_offsets\":" offsets)

static void each_lie_of_a_header_is_named(void **state)
{
    (void)state;
    static const struct { const char *header; size_t data_bytes; const char *says; } lies[] = {
        /* JSON */
        {"", 0, "does not begin with '{'"},
        {"[1]", 0, "does not begin with '{'"},
        {"{\"x\":", 0, "not valid JSON"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]},\"x\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}}", 4, "duplicate"},
        {"{\"\xff\":1}", 0, "not valid JSON"},
        {"{\"x\":[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]}", 0, "nested deeper"},
        {"{\"x\":7}", 0, "'x': not an object"},
        /* dtype */
        {ONE("\"shape\":[1],\"data_offsets\":[0,4]"), 4, "dtype (no text)"},
        {ONE("\"dtype\":32,\"shape\":[1],\"data_offsets\":[0,4]"), 4, "dtype (no text)"},
        {ONE("\"dtype\":\"F4\",\"shape\":[1],\"data_offsets\":[0,4]"), 4, "dtype F4 is unknown"},
        {ONE("\"dtype\":\"f32\",\"shape\":[1],\"data_offsets\":[0,4]"), 4, "dtype f32 is unknown"},
        /* shape */
        {ONE("\"dtype\":\"F32\",\"data_offsets\":[0,4]"), 4, "shape is not a list"},
        {F32_OF("4", "[0,4]"), 4, "shape is not a list"},
        {F32_OF("[1,1,1,1,1,1,1,1,1]", "[0,4]"), 4, "at most 8"},
        {F32_OF("[-1]", "[0,4]"), 4, "size 0 of its shape"},
        {F32_OF("[1,1.5]", "[0,4]"), 4, "size 1 of its shape"},
        {F32_OF("[1,\"1\"]", "[0,4]"), 4, "size 1 of its shape"},
        {F32_OF("[99999999999999999999]", "[0,4]"), 4, "not valid JSON"},
        {F32_OF("[4294967296,4294967296]", "[0,4]"), 4, "size 1 of its shape"},
        {F32_OF("[9223372036854775807]", "[0,4]"), 4, "overflows"},
        {F32_OF("[4611686018427387904]", "[0,0]"), 0, "overflows"}, /* times 4 is 0 in 64 bits */
        /* offsets */
        {ONE("\"dtype\":\"F32\",\"shape\":[1]"), 4, "not two numbers"},
        {F32_OF("[1]", "[0]"), 4, "not two numbers"},
        {F32_OF("[1]", "[0,4,8]"), 4, "not two numbers"},
        {F32_OF("[1]", "[0.0,4]"), 4, "not two numbers"},
        {F32_OF("[1]", "[-4,0]"), 4, "outside the file's 4 bytes"},
        {F32_OF("[1]", "[4,0]"), 4, "outside"},
        {F32_OF("[1]", "[0,8]"), 4, "outside"},
        {F32_OF("[2]", "[0,9223372036854775807]"), 8, "outside"},
        {F32_OF("[2]", "[0,4]"), 4, "its shape and dtype need 8"},
        {F32_OF("[1]", "[0,8]"), 8, "8 bytes of data"},
        /* together */
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]}}", 12, "overlaps"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "overlaps"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[8,12]}}", 12, "hole"},
        {F32_OF("[1]", "[4,8]"), 8, "hole"},
        {F32_OF("[1]", "[0,4]"), 5, "1 bytes at the end"},
        {"{}", 3, "3 bytes at the end"},
    };
    for (size_t i = 0; i < sizeof lies / sizeof lies[0]; i++)
        expect_parse(lies[i].header, lies[i].data_bytes, lies[i].says);
}

static void a_header_longer_than_its_file_or_than_accepted_is_refused(void **state)
{
    (void)state;
    struct safetensors *s;
    struct engine_error why;
    uint8_t file[16] = {0};
    static const uint64_t lengths[] = {9, 10000000000u, UINT64_MAX, UINT64_MAX - 7, 100000001};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        for (int b = 0; b < 8; b++)
            file[b] = (uint8_t)(lengths[i] >> (8 * b));
        assert_false(safetensors_parse(&s, file, sizeof file, &why));
        assert_non_null(strstr(why.text, "accepted: at most 100000000"));
    }
    for (size_t bytes = 0; bytes < 8; bytes++) {
        assert_false(safetensors_parse(&s, file, bytes, &why));
        assert_non_null(strstr(why.text, "too short"));
    }
}

static void names_are_bounded(void **state)
{
    (void)state;
    static char header[2048];
    char name[600];
    memset(name, 'n', sizeof name);
    for (int longest = 512; longest <= 513; longest++) {
        snprintf(header, sizeof header, "{\"%.*s\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1]}}", longest, name);
        expect_parse(header, 1, longest == 512 ? NULL : "longer tensor names than accepted");
    }
}

/* --- files ------------------------------------------------------------------------------------------------- */

static void write_text(const char *name, const char *text)
{
    put_file(dir, name, text, strlen(text));
}

static void write_tensor(const char *file, const char *tensor, float value)
{
    char header[256];
    uint8_t bytes[512];
    snprintf(header, sizeof header, "{\"%s\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", tensor);
    size_t count = make(bytes, header, 4);
    memcpy(bytes + count - 4, &value, 4);
    put_file(dir, file, bytes, count);
}

static void expect_open(const char *stem, enum engine_fault fault, const char *says)
{
    struct safetensors *s = NULL;
    struct engine_error why = {0};
    assert_false(safetensors_open(&s, dir, stem, &why));
    if (why.fault != fault || !strstr(why.text, says))
        fail_msg("%s: '%s' does not say '%s'", engine_error_fault(why.fault), why.text, says);
}

static void a_sharded_set_is_one_table(void **state)
{
    (void)state;
    struct safetensors *s;
    struct engine_error why;
    write_tensor("one.safetensors", "z", 1);
    write_tensor("two.safetensors", "a", 2);
    write_text("set.safetensors.index.json", "{\"metadata\":{\"total_size\":8},\"weight_map\":{\"z\":\"one.safetensors\",\"a\":\"two.safetensors\"}}");
    if (!safetensors_open(&s, dir, "set", &why))
        fail_msg("%s", why.text);
    assert_int_equal(safetensors_count(s), 2);
    const struct safetensors_entry *a = safetensors_find(s, "a");
    float value;
    assert_string_equal(a->file, "two.safetensors");
    assert_true(a->is_mapped);
    safetensors_advise(a, SAFETENSORS_DONE);
    memcpy(&value, a->data, 4);
    assert_true(value == 2);
    safetensors_close(s);
}

static void an_index_must_agree_with_its_files(void **state)
{
    (void)state;
    static const struct { const char *index, *says; } lies[] = {
        {"[]", "not a JSON object"},
        {"{}", "no weight_map"},
        {"{\"weight_map\":[]}", "no weight_map"},
        {"{\"weight_map\":{\"z\":7}}", "not a plain file name"},
        {"{\"weight_map\":{\"z\":\"../one.safetensors\"}}", "not a plain file name"},
        {"{\"weight_map\":{\"z\":\"/etc/passwd\"}}", "not a plain file name"},
        {"{\"weight_map\":{\"z\":\"..\"}}", "not a plain file name"},
        {"{\"weight_map\":{\"z\":\"\"}}", "not a plain file name"},
        {"{\"weight_map\":{\"z\":\"none.safetensors\"}}", "No such file"},
        {"{\"weight_map\":{\"z\":\"one.safetensors\",\"b\":\"two.safetensors\"}}", "tensor 'b' is not in two.safetensors"},
        {"{\"weight_map\":{\"z\":\"two.safetensors\",\"a\":\"one.safetensors\"}}", "is not in"},
        {"{\"weight_map\":{\"z\":\"one.safetensors\",\"a\":\"double.safetensors\",\"y\":\"two.safetensors\"}}", "tensor 'a' is in"},
        {"{\"weight_map\":{\"z\":\"one.safetensors\",\"z\":\"one.safetensors\"}}", "duplicate"},
    };
    write_tensor("one.safetensors", "z", 1);
    write_tensor("two.safetensors", "a", 2);
    write_tensor("double.safetensors", "a", 3);
    for (size_t i = 0; i < sizeof lies / sizeof lies[0]; i++) {
        write_text("lie.safetensors.index.json", lies[i].index);
        expect_open("lie", ENGINE_BAD_MODEL, lies[i].says);
    }
    /* a file with a tensor more than the index knows */
    write_text("lie.safetensors.index.json", "{\"weight_map\":{}}");
    struct safetensors *s;
    struct engine_error why;
    assert_true(safetensors_open(&s, dir, "lie", &why));
    assert_int_equal(safetensors_count(s), 0);
    safetensors_close(s);
}

static void what_is_no_readable_file_is_refused_and_nothing_waits(void **state)
{
    (void)state;
    char path[256];
    expect_open("none", ENGINE_BAD_MODEL, "none.safetensors: No such file");
    write_text("void.safetensors", "");
    expect_open("void", ENGINE_BAD_MODEL, "0 bytes, too short");
    snprintf(path, sizeof path, "%s/folder.safetensors", dir);
    mkdir(path, 0755);
    expect_open("folder", ENGINE_BAD_MODEL, "a folder, want a regular file");
    snprintf(path, sizeof path, "%s/pipe.safetensors", dir);
    assert_int_equal(mkfifo(path, 0644), 0);
    expect_open("pipe", ENGINE_BAD_MODEL, "a pipe, socket or device");
    snprintf(path, sizeof path, "%s/loop.safetensors", dir);
    assert_int_equal(symlink("loop.safetensors", path), 0);
    expect_open("loop", ENGINE_BAD_MODEL, "loop.safetensors: Too many levels");
    static char long_path[5000];
    memset(long_path, 'p', sizeof long_path - 1);
    struct safetensors *s;
    struct engine_error why;
    assert_false(safetensors_open(&s, long_path, "x", &why));
    assert_non_null(strstr(why.text, "less than 4096"));
}

/* Each length of a good file but the whole one, and each of its header's bits turned: refused or read, never a crash. */
static void a_cut_or_damaged_file_never_crashes(void **state)
{
    (void)state;
    static const char header[] = "{\"a\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]},\"b\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[16,19]}}";
    uint8_t file[512];
    size_t bytes = make(file, header, 19), accepted = 0;
    struct safetensors *s;
    struct engine_error why;
    for (size_t cut = 0; cut < bytes; cut++) {
        put_file(dir, "cut.safetensors", file, cut);
        assert_false(safetensors_open(&s, dir, "cut", &why));
    }
    for (size_t bit = 0; bit < 8 * (bytes - 19); bit++) {
        file[bit / 8] ^= (uint8_t)(1 << bit % 8);
        if (safetensors_parse(&s, file, bytes, &why)) {
            accepted++; /* a letter of a name */
            safetensors_close(s);
        }
        file[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    assert_true(accepted > 0 && accepted < 40);
}

static void what_is_written_is_read_again(void **state)
{
    (void)state;
    char path[256];
    float values[6] = {1, 2, 3, 4, 5, 6};
    int32_t ids[2] = {-1, 7};
    struct tensor wide = tensor_2d(values, TENSOR_F32, 2, 3);
    const struct safetensors_item items[] = {{"columns", tensor_slice(wide, 1, 1, 2)},
                                             {"ids", tensor_1d(ids, TENSOR_I32, 2)}};
    struct safetensors *s;
    struct engine_error why;
    snprintf(path, sizeof path, "%s/out.safetensors", dir);
    if (!safetensors_write(path, items, 2, &why) || !safetensors_open_file(&s, path, &why))
        fail_msg("%s", why.text);
    const struct safetensors_entry *columns = safetensors_find(s, "columns");
    const float want[4] = {2, 3, 5, 6};
    assert_memory_equal(columns->data, want, sizeof want); /* a view is written dense */
    assert_memory_equal(safetensors_find(s, "ids")->data, ids, sizeof ids);
    safetensors_close(s);
    assert_false(safetensors_write("/nonexistent/x", items, 2, &why));
    assert_int_equal(why.fault, ENGINE_IO);
}

static size_t resident_bytes(void)
{
    unsigned long pages[2] = {0};
    FILE *f = fopen("/proc/self/statm", "r");
    assert_non_null(f);
    assert_int_equal(fscanf(f, "%lu %lu", &pages[0], &pages[1]), 2);
    fclose(f);
    return pages[1] * (size_t)sysconf(_SC_PAGESIZE);
}

static uint64_t sum_of(const struct safetensors_entry *e)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < e->bytes; i++)
        sum += ((const uint8_t *)e->data)[i];
    return sum;
}

/* A model is held once, in the kernels' layout: what was read leaves memory, and comes back unchanged when asked for. */
static void pages_that_are_done_leave_memory_and_can_be_read_again(void **state)
{
    (void)state;
    enum { BYTES = 32 << 20 };
    char path[256];
    uint8_t *values = malloc(BYTES);
    for (size_t i = 0; i < BYTES; i++)
        values[i] = (uint8_t)(i * 2654435761u >> 24);
    struct safetensors *s;
    struct engine_error why;
    snprintf(path, sizeof path, "%s/large.safetensors", dir);
    const struct safetensors_item item = {"x", tensor_1d(values, TENSOR_U8, BYTES)};
    assert_true(safetensors_write(path, &item, 1, &why) && safetensors_open_file(&s, path, &why));
    free(values);
    const struct safetensors_entry *e = safetensors_find(s, "x");
    uint64_t sum = sum_of(e);
    size_t before = resident_bytes();
    safetensors_advise(e, SAFETENSORS_DONE);
    assert_true(resident_bytes() + BYTES / 2 < before);
    assert_true(sum_of(e) == sum);
    safetensors_advise(e, SAFETENSORS_ROWS);
    assert_true(resident_bytes() + BYTES / 2 < before);
    assert_true(sum_of(e) == sum);
    safetensors_close(s);
}

static int make_dir(void **state)
{
    (void)state;
    snprintf(dir, sizeof dir, "/tmp/kiln-safetensors.XXXXXX");
    return mkdtemp(dir) ? 0 : 1;
}

static int remove_dir(void **state)
{
    (void)state;
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", dir);
    return system(command);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_true_header_gives_its_tensors_sorted_by_name),
        cmocka_unit_test(each_lie_of_a_header_is_named),
        cmocka_unit_test(a_header_longer_than_its_file_or_than_accepted_is_refused),
        cmocka_unit_test(names_are_bounded),
        cmocka_unit_test(a_sharded_set_is_one_table),
        cmocka_unit_test(an_index_must_agree_with_its_files),
        cmocka_unit_test(what_is_no_readable_file_is_refused_and_nothing_waits),
        cmocka_unit_test(a_cut_or_damaged_file_never_crashes),
        cmocka_unit_test(what_is_written_is_read_again),
        cmocka_unit_test(pages_that_are_done_leave_memory_and_can_be_read_again),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
