/* test_gguf.c - GGUF files are read as their writer meant them, and lies in them are refused with a sentence: a count, a
 * length or an offset believed unseen reads outside the mapping.
 *
 * data/sample.gguf is written by the Python package gguf (tests/golden/formats.py); hostile files are built here. */
#include "gguf.h"
#include "safetensors.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

/* --- a writer ------------------------------------------------------------------------------------------ */

struct writer {
    uint8_t data[8192];
    size_t bytes;
};

static void put(struct writer *w, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++)
        w->data[w->bytes++] = (uint8_t)(value >> (8 * i));
}

static void put_text(struct writer *w, const char *text)
{
    put(w, strlen(text), 8);
    memcpy(w->data + w->bytes, text, strlen(text));
    w->bytes += strlen(text);
}

static void put_start(struct writer *w, uint32_t version, uint64_t tensors, uint64_t values)
{
    memcpy(w->data, "GGUF", 4);
    w->bytes = 4;
    put(w, version, 4), put(w, tensors, 8), put(w, values, 8);
}

static void put_u32_value(struct writer *w, const char *key, uint32_t value)
{
    put_text(w, key), put(w, 4, 4), put(w, value, 4);
}

/* A row of `size` values. */
static void put_tensor(struct writer *w, const char *name, uint64_t size, uint32_t format, uint64_t offset)
{
    put_text(w, name), put(w, 1, 4), put(w, size, 8), put(w, format, 4), put(w, offset, 8);
}

static void pad(struct writer *w, size_t alignment, size_t more)
{
    while (w->bytes % alignment)
        w->data[w->bytes++] = 0;
    memset(w->data + w->bytes, 0x11, more);
    w->bytes += more;
}

/* Parses a copy of exactly the right size, so that a sanitizer sees the first byte beyond it. */
static bool parse(struct gguf **ret, const struct writer *w, struct engine_error *why, void **copy)
{
    *copy = malloc(w->bytes ? w->bytes : 1);
    memcpy(*copy, w->data, w->bytes);
    return gguf_parse(ret, *copy, w->bytes, why);
}

static void expect_refused(const struct writer *w, const char *word)
{
    struct gguf *g = NULL;
    struct engine_error why = {0};
    void *copy;
    if (parse(&g, w, &why, &copy))
        fail_msg("accepted, want a refusal that says '%s'", word);
    if (!strstr(why.text, word) || why.fault != ENGINE_BAD_MODEL)
        fail_msg("'%s' does not say '%s'", why.text, word);
    assert_null(g);
    free(copy);
}

static void expect_accepted(const struct writer *w)
{
    struct gguf *g = NULL;
    struct engine_error why = {0};
    void *copy;
    if (!parse(&g, w, &why, &copy))
        fail_msg("%s", why.text);
    gguf_close(g);
    free(copy);
}

/* --- good files ------------------------------------------------------------------------------------------ */

static struct gguf *open_sample(void)
{
    struct gguf *g;
    struct engine_error why;
    if (!gguf_open_file(&g, "tests/unit/data/sample.gguf", &why))
        fail_msg("%s", why.text);
    return g;
}

static void tensors_come_with_shape_format_and_values(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        enum quant_format format;
        int rank;
        int64_t shape[4], row_values;
    } want[] = {
        {"conv.weight", QUANT_F32, 4, {2, 3, 3, 9}, 9},
        {"half.weight", QUANT_F16, 2, {3, 64}, 64},
        {"norm.scale", QUANT_F32, 1, {5}, 5},
        {"plain.weight", QUANT_F32, 2, {3, 64}, 64},
        {"reshaped.weight", QUANT_Q4_K, 2, {6, 128}, 256}, /* comfy.gguf.orig_shape */
        {"small.weight", QUANT_Q8_0, 2, {3, 64}, 64},
    };
    struct gguf *g = open_sample();
    assert_int_equal(gguf_count(g), 6);
    for (size_t i = 0; i < 6; i++) {
        const struct gguf_entry *e = gguf_at(g, i);
        assert_string_equal(e->name, want[i].name);
        assert_ptr_equal(gguf_find(g, e->name), e);
        assert_int_equal(e->format, want[i].format);
        assert_int_equal(e->rank, want[i].rank);
        assert_memory_equal(e->shape, want[i].shape, sizeof(int64_t) * (size_t)e->rank);
        assert_int_equal(e->row_values, want[i].row_values);
        assert_string_equal(e->file, "sample.gguf");
    }
    assert_null(gguf_find(g, "plain"));
    struct safetensors *s;
    struct engine_error why;
    assert_true(safetensors_open_file(&s, "tests/unit/data/sample.safetensors", &why));
    const struct safetensors_entry *plain = safetensors_find(s, "plain");
    assert_int_equal(gguf_at(g, 3)->bytes, plain->bytes);
    assert_memory_equal(gguf_at(g, 3)->data, plain->data, plain->bytes);
    /* Q8_0 of numbers of a few units: a step is max / 127, half of that is the most a value is off. */
    struct quant_matrix m = {.format = QUANT_Q8_0, .n = 3, .k = 64, .data = gguf_at(g, 5)->data};
    float got[3 * 64], exact[3 * 64];
    char text[256];
    assert_true(quant_check(&m, gguf_at(g, 5)->bytes, 0, text, sizeof text));
    quant_rows_f32(got, &m, 0, 3);
    memcpy(exact, plain->data, plain->bytes);
    for (int i = 0; i < 3 * 64; i++)
        assert_true(got[i] - exact[i] < 0.02f && exact[i] - got[i] < 0.02f);
    safetensors_close(s);
    gguf_close(g);
}

static void metadata_is_read_by_type(void **state)
{
    (void)state;
    static const struct {
        const char *key;
        int64_t value;
    } wholes[] = {{"test.u8", 200}, {"test.i8", -7}, {"test.u16", 60000}, {"test.i16", -30000}, {"test.u32", 4000000000},
                  {"test.i32", -5}, {"test.i64", -(INT64_C(1) << 62)}};
    struct gguf *g = open_sample();
    struct engine_error why;
    for (size_t i = 0; i < sizeof wholes / sizeof *wholes; i++) {
        int64_t n;
        double d;
        assert_true(gguf_whole(g, &n, wholes[i].key, &why));
        assert_int_equal(n, wholes[i].value);
        assert_true(gguf_number(g, &d, wholes[i].key, &why) && d == (double)wholes[i].value);
    }
    double d;
    bool flag;
    const char *text;
    int64_t n, list[3];
    size_t count;
    assert_true(gguf_number(g, &d, "test.f32", &why) && d == 0.5);
    assert_true(gguf_number(g, &d, "test.f64", &why) && d == 0.1);
    assert_true(gguf_flag(g, &flag, "test.yes", &why) && flag);
    assert_true(gguf_flag(g, &flag, "test.no", &why) && !flag);
    assert_true(gguf_text(g, &text, "general.architecture", &why));
    assert_string_equal(text, "flux");
    assert_true(gguf_text(g, &text, "test.text", &why));
    assert_string_equal(text, "Füchse");
    assert_true(gguf_wholes(g, list, 3, &count, "test.numbers", &why) && count == 3);
    assert_true(list[0] == 3 && list[1] == 1 && list[2] == 2);
    /* What is something else is refused by name. */
    assert_false(gguf_whole(g, &n, "test.u64", &why)); /* 2^63 */
    assert_false(gguf_whole(g, &n, "test.f32", &why));
    assert_string_equal(why.text, "sample.gguf: value 'test.f32' is f32, want a whole number below 2^63");
    assert_false(gguf_text(g, &text, "test.u8", &why));
    assert_false(gguf_flag(g, &flag, "test.u8", &why));
    assert_false(gguf_number(g, &d, "test.text", &why));
    assert_false(gguf_wholes(g, list, 2, &count, "test.numbers", &why));
    assert_non_null(strstr(why.text, "3 numbers, accepted: at most 2"));
    assert_false(gguf_wholes(g, list, 3, &count, "test.texts", &why));
    assert_false(gguf_text(g, &text, "test.absent", &why));
    assert_string_equal(why.text, "sample.gguf: no value 'test.absent'");
    assert_true(gguf_has(g, "test.texts") && !gguf_has(g, "test"));
    assert_string_equal(gguf_key(g, 0), "comfy.gguf.orig_shape.reshaped.weight");
    gguf_close(g);
}

static void head_longer_than_the_first_piece_is_read(void **state)
{
    (void)state;
    /* 3 MiB of metadata, as a tokenizer makes: the head is read in pieces that grow. */
    char path[] = "/tmp/kiln-gguf-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    FILE *f = fdopen(fd, "wb");
    struct writer w = {0};
    put_start(&w, 2, 1, 1);
    put_text(&w, "tokenizer.ggml.tokens"), put(&w, 9, 4), put(&w, 8, 4), put(&w, 200000, 8);
    fwrite(w.data, 1, w.bytes, f);
    size_t head = w.bytes;
    w.bytes = 0;
    put_text(&w, "abcdefgh");
    for (int i = 0; i < 200000; i++)
        fwrite(w.data, 1, w.bytes, f);
    head += 200000 * w.bytes;
    w.bytes = 0;
    put_tensor(&w, "x", 4, 0, 0);
    head += w.bytes;
    memset(w.data + w.bytes, 0, (32 - head % 32) % 32);
    w.bytes += (32 - head % 32) % 32;
    put(&w, 0x3f800000, 4), put(&w, 0, 4), put(&w, 0, 4), put(&w, 0x40000000, 4);
    fwrite(w.data, 1, w.bytes, f);
    fclose(f);
    struct gguf *g;
    struct engine_error why;
    if (!gguf_open_file(&g, path, &why))
        fail_msg("%s", why.text);
    float values[4];
    memcpy(values, gguf_find(g, "x")->data, sizeof values);
    assert_true(values[0] == 1 && values[3] == 2);
    gguf_close(g);
    assert_int_equal(truncate(path, 2000000), 0);
    assert_false(gguf_open_file(&g, path, &why));
    assert_non_null(strstr(why.text, "ends inside its head"));
    assert_int_equal(truncate(path, 0), 0);
    assert_false(gguf_open_file(&g, path, &why));
    assert_non_null(strstr(why.text, "empty"));
    unlink(path);
    assert_false(gguf_open_file(&g, path, &why));
    assert_int_equal(why.fault, ENGINE_BAD_MODEL);
    assert_false(gguf_open_file(&g, "/tmp", &why));
    assert_non_null(strstr(why.text, "want a regular file"));
}

/* --- hostile files --------------------------------------------------------------------------------------- */

/* One F32 row of 4 under general.alignment 64; the parts that cases change. */
static struct writer small_file(uint32_t version, uint64_t size, uint32_t format, uint64_t offset, size_t data)
{
    struct writer w = {0};
    put_start(&w, version, 1, 1);
    put_u32_value(&w, "general.alignment", 64);
    put_tensor(&w, "x.weight", size, format, offset);
    pad(&w, 64, data);
    return w;
}

static void lies_about_one_tensor_are_refused(void **state)
{
    (void)state;
    struct writer w = small_file(3, 4, 0, 0, 16);
    expect_accepted(&w);
    w = small_file(2, 4, 0, 0, 64); /* the last tensor's padding may be there */
    expect_accepted(&w);
    static const struct {
        uint32_t version;
        uint64_t size;
        uint32_t format;
        uint64_t offset;
        size_t data;
        const char *word;
    } cases[] = {
        {1, 4, 0, 0, 16, "version 1, accepted: 2 and 3"},
        {4, 4, 0, 0, 16, "version 4"},
        {3u << 24, 4, 0, 0, 16, "big-endian"},
        {3, 0, 0, 0, 16, "a size of 0"},
        {3, UINT64_C(1) << 63, 0, 0, 16, "not usable"},
        {3, INT64_MAX, 0, 0, 16, "needs a multiple of 1"}, /* times 4 bytes overflows */
        {3, 33, 8, 0, 34, "rows of 33 values, Q8_0 needs a multiple of 32"},
        {3, 256, 23, 0, 256, "IQ4_XS (code 23), accepted: F32"},
        {3, 4, 4, 0, 16, "unknown (code 4)"},
        {3, 4, 0, 64, 80, "at byte 64 of the data, want 0"},
        {3, 4, 0, UINT64_MAX, 16, "the file has"},
        {3, 4, 0, 0, 15, "end outside the file"},
        {3, 4, 0, 0, 65, "49 bytes behind the last tensor"},
        {3, 4, 0, 0, 0, "end outside the file"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        w = small_file(cases[i].version, cases[i].size, cases[i].format, cases[i].offset, cases[i].data);
        expect_refused(&w, cases[i].word);
    }
}

static void tensors_together_must_tile_the_data(void **state)
{
    (void)state;
    static const struct {
        const char *names[2];
        uint64_t offsets[2];
        const char *word; /* NULL: accepted */
    } cases[] = {
        {{"a", "b"}, {0, 32}, NULL},
        {{"a", "b"}, {32, 0}, NULL}, /* the table may be in any order */
        {{"a", "b"}, {0, 16}, "want 32: no holes, no overlap"},
        {{"a", "b"}, {0, 0}, "no overlap"},
        {{"a", "b"}, {0, 64}, "no holes"},
        {{"a", "a"}, {0, 32}, "tensor 'a' occurs twice"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct writer w = {0};
        put_start(&w, 3, 2, 0);
        for (int t = 0; t < 2; t++)
            put_tensor(&w, cases[i].names[t], 4, 0, cases[i].offsets[t]);
        pad(&w, 32, cases[i].offsets[1] == 64 ? 80 : 48);
        if (cases[i].word)
            expect_refused(&w, cases[i].word);
        else
            expect_accepted(&w);
    }
}

static void lies_in_the_metadata_are_refused(void **state)
{
    (void)state;
    struct writer w;
    put_start(&w, 3, 100001, 0);
    expect_refused(&w, "100001 tensors");
    put_start(&w, 3, 0, UINT64_MAX);
    expect_refused(&w, "18446744073709551615 values");
    put_start(&w, 3, 0, 1);
    put(&w, UINT64_MAX, 8);
    expect_refused(&w, "a key of 18446744073709551615 bytes");
    put_start(&w, 3, 0, 1);
    put_text(&w, "");
    expect_refused(&w, "a key of 0 bytes");
    put_start(&w, 3, 0, 1);
    put_text(&w, "a\nb"), put(&w, 4, 4), put(&w, 1, 4);
    expect_refused(&w, "control character");
    put_start(&w, 3, 0, 1);
    put_text(&w, "k"), put(&w, 13, 4), put(&w, 0, 8);
    expect_refused(&w, "value 'k': type 13");
    put_start(&w, 3, 0, 1);
    put_text(&w, "k"), put(&w, 7, 4), put(&w, 2, 1);
    expect_refused(&w, "a flag of 2");
    put_start(&w, 3, 0, 1);
    put_text(&w, "k"), put(&w, 8, 4), put(&w, UINT64_MAX, 8);
    expect_refused(&w, "ends inside its head");
    put_start(&w, 3, 0, 1);
    put_text(&w, "k"), put(&w, 9, 4), put(&w, 9, 4), put(&w, 1, 8);
    expect_refused(&w, "an array of type 9");
    put_start(&w, 3, 0, 1);
    put_text(&w, "k"), put(&w, 9, 4), put(&w, 12, 4), put(&w, UINT64_C(1) << 62, 8);
    expect_refused(&w, "its size overflows");
    put_start(&w, 3, 0, 1);
    put_text(&w, "k"), put(&w, 9, 4), put(&w, 8, 4), put(&w, UINT64_MAX, 8), put(&w, 0, 8);
    expect_refused(&w, "ends inside its head");
    put_start(&w, 3, 0, 2);
    put_u32_value(&w, "k", 1), put_u32_value(&w, "k", 1);
    expect_refused(&w, "'k' occurs twice");
    put_start(&w, 3, 0, 1);
    put_u32_value(&w, "general.alignment", 48);
    expect_refused(&w, "general.alignment 48");
    put_start(&w, 3, 0, 1);
    put_u32_value(&w, "general.alignment", 0);
    expect_refused(&w, "general.alignment 0");
    put_start(&w, 3, 0, 1);
    put_text(&w, "general.alignment"), put(&w, 8, 4), put_text(&w, "32");
    expect_refused(&w, "'general.alignment' is a text");
    put_start(&w, 3, 0, 1);
    put_u32_value(&w, "split.count", 3);
    expect_refused(&w, "one of 3 pieces");
    put_start(&w, 3, 1, 0);
    put_text(&w, "x"), put(&w, 5, 4);
    expect_refused(&w, "5 sizes, accepted: 1 to 4");
    put_start(&w, 3, 1, 0);
    put_text(&w, "x"), put(&w, 2, 4), put(&w, UINT64_C(1) << 40, 8), put(&w, UINT64_C(1) << 40, 8);
    expect_refused(&w, "not usable");
    static const uint64_t shapes[][3] = {{2, 3, 0}, {2, 0, 0}, {2, UINT64_C(1) << 40, UINT64_C(1) << 40}, {1, UINT64_MAX, 0}};
    for (size_t i = 0; i < 4; i++) {
        put_start(&w, 3, 1, 1);
        put_text(&w, "comfy.gguf.orig_shape.x"), put(&w, 9, 4), put(&w, 11, 4), put(&w, shapes[i][0], 8);
        for (uint64_t a = 0; a < shapes[i][0]; a++)
            put(&w, shapes[i][1 + a], 8);
        put_tensor(&w, "x", 4, 0, 0);
        pad(&w, 32, 16);
        expect_refused(&w, "no shape for the tensor's 4 elements");
    }
    memcpy(w.data, "GGML", 4);
    expect_refused(&w, "does not begin with 'GGUF'");
    w.bytes = 0;
    expect_refused(&w, "ends inside its head");
}

/* Every cut and a change of every byte of a real file: refused with a sentence or read, never a crash (sanitizers watch). */
static void damaged_files_are_refused_or_read(void **state)
{
    (void)state;
    struct writer w = {0};
    FILE *f = fopen("tests/unit/data/sample.gguf", "rb");
    w.bytes = fread(w.data, 1, sizeof w.data, f);
    fclose(f);
    size_t whole = w.bytes;
    for (size_t round = 0; round < 2 * whole; round++) {
        struct gguf *g = NULL;
        struct engine_error why = {0};
        void *copy;
        size_t at = round % whole;
        bool is_cut = round < whole;
        w.bytes = is_cut ? at : whole;
        w.data[at] ^= is_cut ? 0 : 0x81;
        if (parse(&g, &w, &why, &copy))
            assert_false(is_cut && at + 32 < whole);
        else
            assert_true(why.text[0] && why.fault == ENGINE_BAD_MODEL);
        gguf_close(g);
        free(copy);
        w.data[at] ^= is_cut ? 0 : 0x81;
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tensors_come_with_shape_format_and_values),
        cmocka_unit_test(metadata_is_read_by_type),
        cmocka_unit_test(head_longer_than_the_first_piece_is_read),
        cmocka_unit_test(lies_about_one_tensor_are_refused),
        cmocka_unit_test(tensors_together_must_tile_the_data),
        cmocka_unit_test(lies_in_the_metadata_are_refused),
        cmocka_unit_test(damaged_files_are_refused_or_read),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
