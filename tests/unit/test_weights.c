/* test_weights.c - tensors are taken by name, checked, converted. If this breaks, a model whose shapes are not what its
 * config says is read past its end, or a NaN in a file shows only as a black picture. */
#include "weights.h"

#include <fcntl.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "kern_cpu.h"
#include "kern_plan.h"
#include "put_file.h"

static struct kern *kern;

/* A header for `fields` and the data behind it, parsed. The memory stays until the end of the test. */
static uint8_t file[64 << 10];

static struct weight_files *parse(const char *header, const void *data, size_t bytes)
{
    struct weight_files *s;
    struct engine_error why;
    size_t length = strlen(header);
    assert_true(8 + length + bytes <= sizeof file);
    memset(file, 0, 8);
    file[0] = (uint8_t)length, file[1] = (uint8_t)(length >> 8);
    memcpy(file + 8, header, length);
    memcpy(file + 8 + length, data, bytes);
    if (!weight_files_parse(&s, TENSOR_NAMES_TRANSFORMER, file, 8 + length + bytes, &why))
        fail_msg("%s", why.text);
    return s;
}

static struct weight_files *parse_one(const char *dtype, const char *shape, const void *data, size_t bytes)
{
    char header[256];
    snprintf(header, sizeof header, "{\"x.weight\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[0,%zu]}}", dtype, shape, bytes);
    return parse(header, data, bytes);
}

static struct weights begin(struct weights_pool *pool, const struct weight_files *files, enum tensor_dtype dtype)
{
    return (struct weights){.kern = kern, .pool = pool, .files = files, .dtype = dtype, .part = "transformer"};
}

static void expect_failure(struct weights *w, const char *says)
{
    struct engine_error why = {0};
    assert_false(weights_done(w, &why));
    assert_int_equal(why.fault, ENGINE_BAD_MODEL);
    if (!strstr(why.text, says))
        fail_msg("'%s' does not say '%s'", why.text, says);
}

static void a_missing_tensor_is_named(void **state)
{
    (void)state;
    float values[4] = {0};
    struct weight_files *s = parse_one("F32", "[2,2]", values, sizeof values);
    struct weights_pool *pool = weights_pool_new(kern);
    struct weights w = begin(pool, s, TENSOR_F32);
    assert_null(weights_linear(&w, 2, 2, "blocks.%d.weight", 7));
    assert_null(weights_linear(&w, 2, 2, "x.weight")); /* after a failure nothing is taken, the first stays */
    assert_null(weights_linear(&w, 9, 9, "other"));
    assert_null(weights_vector(&w, 9, "other").data);
    expect_failure(&w, "transformer: tensor 'blocks.7.weight' is missing");
    assert_int_equal(w.parameters, 0);
    weights_pool_free(pool);
    weight_files_close(s);
}

static void a_wrong_shape_says_what_was_found_and_what_is_wanted(void **state)
{
    (void)state;
    static const struct { const char *shape; int64_t n, k; const char *says; } cases[] = {
        {"[2,3]", 3, 2, "memory: tensor 'x.weight': shape [2,3], want [3,2]"},
        {"[6]", 2, 3, "shape [6], want [2,3]"},
        {"[1,2,3]", 2, 3, "shape [1,2,3], want [2,3]"},
        {"[2,3]", 2, 4, "shape [2,3], want [2,4]"},
    };
    float values[6] = {0};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct weight_files *s = parse_one("F32", cases[i].shape, values, sizeof values);
        struct weights_pool *pool = weights_pool_new(kern);
        struct weights w = begin(pool, s, TENSOR_F32);
        assert_null(weights_linear(&w, cases[i].n, cases[i].k, "x.weight"));
        expect_failure(&w, cases[i].says);
        weights_pool_free(pool);
        weight_files_close(s);
    }
}

static void a_dtype_that_is_no_number_of_a_model_is_refused(void **state)
{
    (void)state;
    static const struct { const char *dtype; size_t bytes; } cases[] = {{"I32", 16}, {"F64", 32}, {"I8", 4}, {"F8_E5M2", 4}};
    uint8_t values[32] = {0};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct weight_files *s = parse_one(cases[i].dtype, "[2,2]", values, cases[i].bytes);
        struct weights_pool *pool = weights_pool_new(kern);
        struct weights w = begin(pool, s, TENSOR_F32);
        assert_null(weights_table(&w, 2, 2, "x.weight").data);
        expect_failure(&w, "accepted: F32, BF16, F16");
        weights_pool_free(pool);
        weight_files_close(s);
    }
}

static void nan_and_infinity_are_reported_in_every_dtype(void **state)
{
    (void)state;
    static const uint32_t bad_f32[] = {0x7fc00000, 0xff800000, 0x7f800001};
    static const uint16_t bad_bf16[] = {0x7fc0, 0xff80, 0x7f81}, bad_f16[] = {0x7e00, 0xfc00, 0x7c01};
    for (int dtype = 0; dtype < 3; dtype++) {
        for (int i = 0; i < 3; i++) {
            uint8_t values[16] = {0};
            size_t bytes = dtype == 0 ? 16 : 8, each = bytes / 4;
            const void *bad = dtype == 0 ? (const void *)&bad_f32[i] : dtype == 1 ? &bad_bf16[i] : &bad_f16[i];
            memcpy(values + 3 * each, bad, each); /* the last value */
            struct weight_files *s = parse_one((const char *[]){"F32", "BF16", "F16"}[dtype], "[2,2]", values, bytes);
            struct weights_pool *pool = weights_pool_new(kern);
            struct weights w = begin(pool, s, TENSOR_BF16);
            assert_null(weights_linear(&w, 2, 2, "x.weight"));
            expect_failure(&w, "tensor 'x.weight' has NaN or infinite values");
            weights_pool_free(pool);
            weight_files_close(s);
        }
    }
}

/* The check reads blocks: the last value of one, the first of the next, those of the short block at the end. */
static void a_bad_value_is_found_wherever_it_is(void **state)
{
    (void)state;
    static const struct { const char *dtype; size_t bytes; uint32_t largest, bad; } dtypes[] = {
        {"F32", 4, 0xff7fffff, 0xff800000}, {"BF16", 2, 0xff7f, 0xff80}, {"F16", 2, 0xfbff, 0xfc00}};
    static const int at[] = {-1, 0, 2047, 2048, 4095, 4096, 8191, 8192, 8999};
    enum { COUNT = 9000 };
    static uint8_t values[4 * COUNT];
    for (size_t d = 0; d < sizeof dtypes / sizeof *dtypes; d++) {
        for (size_t i = 0; i < sizeof at / sizeof *at; i++) {
            for (size_t j = 0; j < COUNT; j++)
                memcpy(values + j * dtypes[d].bytes, (int)j == at[i] ? &dtypes[d].bad : &dtypes[d].largest, dtypes[d].bytes);
            struct weight_files *s = parse_one(dtypes[d].dtype, "[9000]", values, COUNT * dtypes[d].bytes);
            struct weights_pool *pool = weights_pool_new(kern);
            struct weights w = begin(pool, s, TENSOR_F32);
            struct tensor t = weights_vector(&w, COUNT, "x.weight");
            if (at[i] < 0)
                assert_non_null(t.data);
            else
                expect_failure(&w, "tensor 'x.weight' has NaN or infinite values");
            weights_pool_free(pool);
            weight_files_close(s);
        }
    }
}

static void values_are_converted_to_the_compute_dtype(void **state)
{
    (void)state;
    const float f32[4] = {1, -2.5f, 1.00390625f, 0}; /* the third lies between two bf16 */
    const uint16_t f16[4] = {0x3c00, 0xc100, 0x0001, 0x8000}; /* 1, -2.5, the smallest, -0 */
    struct weights_pool *pool = weights_pool_new(kern);

    struct weight_files *s = parse_one("F32", "[4]", f32, sizeof f32);
    struct weights w = begin(pool, s, TENSOR_BF16);
    struct tensor t = weights_vector(&w, 4, "x.weight");
    const uint16_t want[4] = {0x3f80, 0xc020, 0x3f80, 0};
    assert_int_equal(t.dtype, TENSOR_BF16);
    assert_memory_equal(t.data, want, sizeof want);
    assert_int_equal(w.parameters, 4);
    weight_files_close(s);

    s = parse_one("F16", "[4]", f16, sizeof f16);
    w = begin(pool, s, TENSOR_F32);
    t = weights_vector(&w, 4, "x.weight");
    const float *got = t.data;
    assert_true(got[0] == 1 && got[1] == -2.5f && got[2] == 0x1p-24f && got[3] == 0 && signbit(got[3]));
    weight_files_close(s);
    weights_pool_free(pool);
}

/* out = x W^T with W stacked of two, against the sum by hand. */
static void stacked_matrices_stand_one_under_the_other(void **state)
{
    (void)state;
    static const char header[] = "{\"q\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]},\"k\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[16,24]}}";
    const float values[6] = {1, 2, 3, 4, 5, 6};
    float x[2] = {10, 1}, y[3];
    struct weight_files *s = parse(header, values, sizeof values);
    struct weights_pool *pool = weights_pool_new(kern);
    struct weights w = begin(pool, s, TENSOR_F32);
    const struct kern_weight *both = weights_linear_stack(&w, (struct shard_piece[]){{2, 1}, {1, 1}}, 2, 2, (const char *[]){"q", "k"});
    struct engine_error why;
    assert_true(weights_done(&w, &why));
    assert_int_equal(w.parameters, 6);
    kern_linear(kern, tensor_2d(y, TENSOR_F32, 1, 3), tensor_2d(x, TENSOR_F32, 1, 2), both);
    assert_true(kern_sync(kern));
    assert_true(y[0] == 12 && y[1] == 34 && y[2] == 56);
    assert_null(weights_linear_stack(&w, (struct shard_piece[]){{2, 1}, {2, 1}}, 2, 2, (const char *[]){"q", "k"}));
    expect_failure(&w, "tensor 'k': shape [1,2], want [2,2]");
    weights_pool_free(pool);
    weight_files_close(s);
}

static void a_quantised_matrix_stays_in_its_file(void **state)
{
    (void)state;
    const uint8_t e4m3[8] = {0x38, 0xb8, 0x40, 0x48, 0x30, 0x7e, 0x01, 0x00}; /* 1 -1 2 4 / 0.5 448 2^-9 0 */
    const float one_each[4] = {1, 1, 1, 1}, want[2] = {6, 448.5f + 0x1p-9f};
    struct weights_pool *pool = weights_pool_new(kern);
    struct weight_files *s = parse_one("F8_E4M3", "[2,4]", e4m3, sizeof e4m3);
    struct weights w = begin(pool, s, TENSOR_F32);
    const struct kern_weight *kept = weights_linear(&w, 2, 4, "x.weight");
    assert_true(kern_weight_is_kept(kept));
    assert_int_equal(kern_weight_bytes(kept), 8);
    float y[2];
    kern_linear(kern, tensor_2d(y, TENSOR_F32, 1, 2), tensor_2d((void *)one_each, TENSOR_F32, 1, 4), kept);
    assert_true(kern_sync(kern));
    assert_memory_equal(y, want, sizeof want);
    weights_pool_free(pool);
    weight_files_close(s);
}

static void a_bias_is_part_of_the_weight(void **state)
{
    (void)state;
    static const char header[] = "{\"o.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[0,8]},\"o.bias\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[8,12]}}";
    const float values[3] = {1, 2, 100};
    float x[2] = {10, 1}, y[1];
    struct weight_files *s = parse(header, values, sizeof values);
    struct weights_pool *pool = weights_pool_new(kern);
    struct weights w = begin(pool, s, TENSOR_F32);
    const struct kern_weight *o = weights_linear_bias(&w, 1, 2, "%s", "o");
    struct engine_error why;
    assert_true(weights_done(&w, &why));
    kern_linear(kern, tensor_2d(y, TENSOR_F32, 1, 1), tensor_2d(x, TENSOR_F32, 1, 2), o);
    assert_true(kern_sync(kern) && y[0] == 112);
    assert_null(weights_conv_bias(&w, 1, 2, 3, "o"));
    expect_failure(&w, "tensor 'o.weight': shape [1,2], want [1,2,3,3]");
    weights_pool_free(pool);
    weight_files_close(s);
}

static void a_table_stays_in_its_file(void **state)
{
    (void)state;
    static const char *const dtypes[] = {"BF16", "F16"};
    const uint16_t values[2][4] = {{0x3f80, 0x4000, 0x4040, 0x4080}, {0x3c00, 0x4000, 0x4200, 0x4400}};
    struct weights_pool *pool = weights_pool_new(kern);
    for (int i = 0; i < 2; i++) {
        struct weight_files *s = parse_one(dtypes[i], "[2,2]", values[i], sizeof values[i]);
        struct weights w = begin(pool, s, TENSOR_F32);
        struct quant_matrix t = weights_table(&w, 2, 2, "x.weight");
        struct weight in_file;
        struct engine_error why;
        assert_true(weight_files_find(s, &in_file, "x.weight", &why));
        float last[2];
        assert_ptr_equal(t.data, in_file.matrix.data);
        quant_rows_f32(last, &t, 1, 1);
        assert_true(last[1] == 4);
        weight_files_close(s);
    }
    weights_pool_free(pool);
    weights_pool_free(NULL);
}

/* Does the kernel think that a mapping will be read here and there, so that reading ahead is off? */
static bool is_random(const void *at)
{
    char line[512];
    unsigned long long first, end;
    bool is_here = false, is_random = false;
    FILE *f = fopen("/proc/self/smaps", "r");
    assert_non_null(f);
    while (fgets(line, sizeof line, f)) {
        if (sscanf(line, "%llx-%llx ", &first, &end) == 2)
            is_here = first <= (uintptr_t)at && (uintptr_t)at < end;
        if (is_here && strncmp(line, "VmFlags:", 8) == 0)
            is_random = strstr(line, " rr ");
    }
    fclose(f);
    return is_random;
}

static struct weight_files *map(const char *folder, const char *header, const void *data, size_t bytes)
{
    char path[512];
    struct weight_files *s;
    struct engine_error why;
    weight_files_close(parse(header, data, bytes));
    put_file(folder, "x.safetensors", file, 8 + strlen(header) + bytes);
    snprintf(path, sizeof path, "%s/x.safetensors", folder);
    if (!weight_files_open(&s, TENSOR_NAMES_TRANSFORMER, path, &why))
        fail_msg("%s", why.text);
    unlink(path);
    return s;
}

/* Counting a model before it is loaded must not make its embedding table come page by page. */
static void who_counts_says_nothing_about_pages(void **state)
{
    (void)state;
    static const uint16_t values[128 * 128] = {0};
    char folder[] = "/tmp/kiln-weights-XXXXXX";
    assert_non_null(mkdtemp(folder));
    struct weight_files *s = map(folder, "{\"x.weight\":{\"dtype\":\"BF16\",\"shape\":[128,128],\"data_offsets\":[0,32768]}}", values, sizeof values);
    struct kern *plan = kern_plan_open(0, 1, false), *cpu = kern;
    for (int i = 0; i < 2; i++) {
        kern = i ? cpu : plan;
        struct weights_pool *pool = weights_pool_new(kern);
        struct weights w = begin(pool, s, TENSOR_BF16);
        struct quant_matrix table = weights_table(&w, 128, 128, "x.weight");
        assert_false(w.failed);
        assert_int_equal(is_random((const char *)table.data + 16384), i);
        weights_pool_free(pool);
    }
    kern_close(plan);
    weight_files_close(s);
    rmdir(folder);
}

/* --- reading ahead -------------------------------------------------------------------------------------------- */

enum { SIDE = 4096, BLOCK_BYTES = 2 * SIDE * SIDE, BEFORE = 4096 }; /* a block is a matrix of BF16, and longer than what the kernel reads ahead unasked */

/* On a disk, where the kernel holds nothing of it: three blocks of zeros behind a header of BEFORE bytes. (tmpfs holds all.) */
static int put_blocks(const char *path)
{
    char header[BEFORE - 8 + 1];
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL, 0600), at = snprintf(header, sizeof header, "{");
    assert_true(fd >= 0);
    for (int i = 0; i < 3; i++)
        at += snprintf(header + at, sizeof header - (size_t)at, "%s\"blocks.%d.weight\":{\"dtype\":\"BF16\",\"shape\":[%d,%d],\"data_offsets\":[%d,%d]}",
                       i ? "," : "", i, SIDE, SIDE, i * BLOCK_BYTES, (i + 1) * BLOCK_BYTES);
    snprintf(header + at, sizeof header - (size_t)at, "}%*s", (int)sizeof header - 2 - at, "");
    assert_int_equal(write(fd, (uint8_t[8]){(uint8_t)(BEFORE - 8), (BEFORE - 8) >> 8}, 8), 8);
    assert_int_equal(write(fd, header, BEFORE - 8), BEFORE - 8);
    assert_int_equal(ftruncate(fd, BEFORE + 3 * BLOCK_BYTES), 0);
    assert_int_equal(fsync(fd), 0);
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    return fd;
}

/* Pages of a block that the kernel holds, of BLOCK_BYTES / 4096. */
static int held_pages(int fd, int block)
{
    unsigned char pages[BLOCK_BYTES / 4096];
    int count = 0;
    void *map = mmap(NULL, BLOCK_BYTES, PROT_READ, MAP_SHARED, fd, BEFORE + block * BLOCK_BYTES);
    assert_ptr_not_equal(map, MAP_FAILED);
    assert_int_equal(mincore(map, BLOCK_BYTES, pages), 0);
    for (size_t i = 0; i < sizeof pages; i++)
        count += pages[i] & 1;
    munmap(map, BLOCK_BYTES);
    return count;
}

/* If this breaks, the disk idles while a block is packed, and opening a model takes half as long again. */
static void the_next_block_is_read_while_one_is_packed(void **state)
{
    (void)state;
    struct weight_files *s;
    struct engine_error why;
    char folder[] = "/var/tmp/kiln-weights-XXXXXX", path[64];
    assert_non_null(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/x.safetensors", folder);
    int fd = put_blocks(path);
    bool is_on_disk = held_pages(fd, 1) == 0;
    assert_true(weight_files_open(&s, TENSOR_NAMES_TRANSFORMER, path, &why));
    struct weights_pool *pool = weights_pool_new(kern);
    struct weights w = begin(pool, s, TENSOR_BF16);
    assert_non_null(weights_linear(&w, SIDE, SIDE, "blocks.%d.weight", 0));
    for (int i = 0; is_on_disk && held_pages(fd, 1) < BLOCK_BYTES / 4096; i++) {
        assert_true(i < 6000);
        nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    }
    assert_non_null(weights_linear(&w, SIDE, SIDE, "blocks.%d.weight", 1));
    assert_non_null(weights_linear(&w, SIDE, SIDE, "blocks.%d.weight", 2)); /* the last has no next one */
    assert_true(weights_done(&w, &why));
    weights_pool_free(pool);
    weight_files_close(s);
    close(fd);
    unlink(path);
    rmdir(folder);
    if (!is_on_disk)
        skip();
}

static int open_kern(void **state)
{
    (void)state;
    char why[256];
    kern = kern_cpu_open(&(struct kern_cpu_options){.threads = 1}, why, sizeof why);
    return kern ? 0 : 1;
}

static int close_kern(void **state)
{
    (void)state;
    kern_close(kern);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_missing_tensor_is_named),
        cmocka_unit_test(a_wrong_shape_says_what_was_found_and_what_is_wanted),
        cmocka_unit_test(a_dtype_that_is_no_number_of_a_model_is_refused),
        cmocka_unit_test(nan_and_infinity_are_reported_in_every_dtype),
        cmocka_unit_test(a_bad_value_is_found_wherever_it_is),
        cmocka_unit_test(values_are_converted_to_the_compute_dtype),
        cmocka_unit_test(stacked_matrices_stand_one_under_the_other),
        cmocka_unit_test(a_quantised_matrix_stays_in_its_file),
        cmocka_unit_test(a_bias_is_part_of_the_weight),
        cmocka_unit_test(a_table_stays_in_its_file),
        cmocka_unit_test(who_counts_says_nothing_about_pages),
        cmocka_unit_test(the_next_block_is_read_while_one_is_packed),
    };
    return cmocka_run_group_tests(tests, open_kern, close_kern);
}
