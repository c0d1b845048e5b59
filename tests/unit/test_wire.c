/* Tests of proto/wire.c. If reading believed a peer, one message could stop the coordinator: by asking for
 * gigabytes, by nesting until the stack ends, by texts that PostgreSQL refuses later. Expected bytes are written
 * by hand from the msgpack specification or by msgpack-c's own packer, never by wire_encode alone. */
#include "wire.h"

#include <math.h>
#include <msgpack.h>
#include <stdarg.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

struct leaf { const char *word; uint64_t wide; };
struct tree {
    uint32_t narrow;
    uint64_t wide;
    bool truth;
    double real;
    int choice;
    const char *text, *late;
    uint32_t number_count; uint64_t *numbers;
    uint32_t leaf_count; struct leaf *leaves;
    uint32_t inner_count; struct leaf inner[2];
};

static const struct wire_field leaf_fields[] = {
    {.key = "word", .type = WIRE_TEXT, .offset = offsetof(struct leaf, word), .max = 8},
    {.key = "wide", .type = WIRE_U64, .offset = offsetof(struct leaf, wide)},
};
static const struct wire_schema leaf_schema = {"leaf", sizeof(struct leaf), 2, leaf_fields};
static const struct wire_field tree_fields[] = {
    {.key = "narrow", .type = WIRE_U32, .offset = offsetof(struct tree, narrow)},
    {.key = "wide", .type = WIRE_U64, .offset = offsetof(struct tree, wide)},
    {.key = "truth", .type = WIRE_BOOL, .offset = offsetof(struct tree, truth)},
    {.key = "real", .type = WIRE_F64, .offset = offsetof(struct tree, real)},
    {.key = "choice", .type = WIRE_ENUM, .offset = offsetof(struct tree, choice), .max = 2},
    {.key = "text", .type = WIRE_TEXT, .offset = offsetof(struct tree, text), .max = 16},
    {.key = "late", .type = WIRE_TEXT, .offset = offsetof(struct tree, late), .max = 16, .is_optional = true},
    {.key = "numbers", .type = WIRE_NUMBERS, .offset = offsetof(struct tree, numbers),
     .count_offset = offsetof(struct tree, number_count), .max = 4},
    {.key = "leaves", .type = WIRE_LIST, .offset = offsetof(struct tree, leaves),
     .count_offset = offsetof(struct tree, leaf_count), .max = 3, .items = &leaf_schema},
    {.key = "inner", .type = WIRE_LIST, .offset = offsetof(struct tree, inner),
     .count_offset = offsetof(struct tree, inner_count), .max = 2, .items = &leaf_schema, .is_array = true},
};
static const struct wire_schema tree_schema = {"tree", sizeof(struct tree), 10, tree_fields};

struct small { uint32_t n; const char *text; };
static const struct wire_field small_fields[] = {
    {.key = "n", .type = WIRE_U32, .offset = offsetof(struct small, n)},
    {.key = "t", .type = WIRE_TEXT, .offset = offsetof(struct small, text), .max = 70000, .is_optional = true},
};
static const struct wire_schema small_schema = {"small", sizeof(struct small), 2, small_fields};

static void a_struct_survives_the_way_there_and_back(void **state)
{
    (void)state;
    uint64_t numbers[] = {0, 127, UINT64_MAX};
    struct leaf leaves[] = {{"", 0}, {"\xf0\x9f\xa6\x8a", 1}, {"12345678", UINT64_MAX}};
    struct tree from = {
        .narrow = UINT32_MAX, .wide = UINT64_MAX, .truth = true, .real = -0.1, .choice = 2, .text = "fuchs \xc3\xa4", .late = NULL,
        .number_count = 3, .numbers = numbers, .leaf_count = 3, .leaves = leaves, .inner_count = 1, .inner = {{"in", 7}},
    };
    struct tree to;
    void *data, *block;
    size_t bytes;
    char why[256] = "";
    assert_true(wire_encode(&tree_schema, &from, &data, &bytes, why, sizeof why));
    assert_true(wire_decode(&tree_schema, data, bytes, &to, &block, why, sizeof why));
    assert_int_equal(to.narrow, UINT32_MAX);
    assert_true(to.wide == UINT64_MAX);
    assert_true(to.truth);
    assert_true(to.real == -0.1);
    assert_int_equal(to.choice, 2);
    assert_string_equal(to.text, from.text);
    assert_string_equal(to.late, "");
    assert_int_equal(to.number_count, 3);
    assert_memory_equal(to.numbers, numbers, sizeof numbers);
    assert_int_equal(to.leaf_count, 3);
    assert_string_equal(to.leaves[1].word, leaves[1].word);
    assert_true(to.leaves[2].wide == UINT64_MAX);
    assert_int_equal(to.inner_count, 1);
    assert_string_equal(to.inner[0].word, "in");

    /* The library agrees that this is one whole msgpack map. */
    msgpack_unpacked out;
    msgpack_unpacked_init(&out);
    size_t offset = 0;
    assert_int_equal(msgpack_unpack_next(&out, data, bytes, &offset), MSGPACK_UNPACK_SUCCESS);
    assert_int_equal(offset, bytes);
    assert_int_equal(out.data.type, MSGPACK_OBJECT_MAP);
    assert_int_equal(out.data.via.map.size, 10);
    msgpack_unpacked_destroy(&out);
    free(block);

    /* Every shorter message is refused, none reads beyond its end (the sanitizer watches a copy of exact size). */
    for (size_t cut = 0; cut < bytes; cut++) {
        char *part = malloc(cut ? cut : 1);
        memcpy(part, data, cut);
        assert_false(wire_decode(&tree_schema, part, cut, &to, &block, why, sizeof why));
        free(part);
    }
    free(data);
}

/* Unknown keys with every type that msgpack-c can pack: a newer peer may send them. */
static void unknown_keys_are_skipped_whatever_they_hold(void **state)
{
    (void)state;
    msgpack_sbuffer b;
    msgpack_packer p;
    msgpack_sbuffer_init(&b);
    msgpack_packer_init(&p, &b, msgpack_sbuffer_write);
    static char big[70000];
    size_t sizes[] = {0, 1, 31, 32, 255, 256, 65535, 65536};
    msgpack_pack_map(&p, 2 + 16 + 3 * 8);
    int key = 0;
#define KEY() (snprintf(big, 16, "x%d", key++), msgpack_pack_str(&p, strlen(big)), msgpack_pack_str_body(&p, big, strlen(big)))
    KEY(); msgpack_pack_nil(&p);
    KEY(); msgpack_pack_true(&p);
    KEY(); msgpack_pack_float(&p, 1.5f);
    KEY(); msgpack_pack_double(&p, 1.5);
    KEY(); msgpack_pack_int8(&p, -100);
    KEY(); msgpack_pack_int16(&p, -1000);
    KEY(); msgpack_pack_int32(&p, -100000);
    KEY(); msgpack_pack_int64(&p, INT64_MIN);
    KEY(); msgpack_pack_int(&p, -1);
    KEY(); msgpack_pack_uint8(&p, 200);
    KEY(); msgpack_pack_uint16(&p, 60000);
    KEY(); msgpack_pack_array(&p, 2); msgpack_pack_nil(&p); msgpack_pack_array(&p, 0);
    KEY(); msgpack_pack_map(&p, 1); msgpack_pack_int(&p, 1); msgpack_pack_false(&p);
    KEY(); msgpack_pack_array(&p, 20); for (int i = 0; i < 20; i++) msgpack_pack_int(&p, i);
    KEY(); msgpack_pack_map(&p, 20); for (int i = 0; i < 40; i++) msgpack_pack_int(&p, i);
    KEY(); msgpack_pack_array(&p, 70000); for (int i = 0; i < 70000; i++) msgpack_pack_nil(&p);
    for (size_t i = 0; i < 8; i++) {
        KEY(); msgpack_pack_bin(&p, sizes[i]); msgpack_pack_bin_body(&p, big, sizes[i]);
        KEY(); msgpack_pack_str(&p, sizes[i]); msgpack_pack_str_body(&p, big, sizes[i]);
        KEY(); msgpack_pack_ext(&p, sizes[i] ? sizes[i] : 16, 5); msgpack_pack_ext_body(&p, big, sizes[i] ? sizes[i] : 16);
    }
#undef KEY
    msgpack_pack_str(&p, 1); msgpack_pack_str_body(&p, "n", 1); msgpack_pack_int(&p, 9);
    msgpack_pack_str(&p, 1); msgpack_pack_str_body(&p, "t", 1); msgpack_pack_str(&p, 2); msgpack_pack_str_body(&p, "ok", 2);
    struct small s;
    void *block;
    char why[256] = "";
    bool ok = wire_decode(&small_schema, b.data, b.size, &s, &block, why, sizeof why);
    assert_string_equal(why, "");
    assert_true(ok);
    assert_int_equal(s.n, 9);
    assert_string_equal(s.text, "ok");
    free(block);
    msgpack_sbuffer_destroy(&b);
}

/* Each row: bytes, and a part of the sentence that must come back. */
static void hostile_bytes_are_refused_with_a_sentence(void **state)
{
    (void)state;
    static const struct { const char *bytes; size_t count; const char *says; } rows[] = {
#define ROW(text, says) {text, sizeof(text) - 1, says}
        ROW("", "ends too early"),
        ROW("\xc1", "0xc1 begins no value"),
        ROW("\x90", "found a list, want a map"),
        ROW("\x80", "n is missing"),
        ROW("\x81\x01\x01", "found a number, want a text"),
        ROW("\x81\xa1n\xff", "n: found a negative number, want a number"),
        ROW("\x81\xa1n\xd0\x80", "n: found a negative number"),
        ROW("\x81\xa1n\xcf\x00\x00\x00\x01\x00\x00\x00\x00", "n: 4294967296, at most 4294967295"),
        ROW("\x81\xa1n\xa1" "5", "n: found a text, want a number"),
        ROW("\x81\xa1n\xca\x00\x00\x00\x00", "n: found a fraction"),
        ROW("\x82\xa1n\x01\xa1n\x02", "n stands twice"),
        ROW("\x81\xa1n\x01\x00", "1 bytes are left over"),
        ROW("\x82\xa1n\x01", "says 2 pairs"),
        ROW("\xdf\xff\xff\xff\xff\xa1n\x01", "says 4294967295 pairs"),
        ROW("\x82\xa1n\x01\xa1x\xdd\xff\xff\xff\xff", "says 4294967295 items"),
        ROW("\x82\xa1n\x01\xa1x\xc6\xff\xff\xff\xff", "says 4294967295 bytes"),
        ROW("\x82\xa1n\x01\xa1x\xc9\xff\xff\xff\xff\x01", "says 4294967296 bytes"),
        ROW("\x82\xa1n\x01\xa1t\xdb\xff\xff\xff\xff", "t: says 4294967295 bytes"),
        ROW("\x82\xa1n\x01\xa1t\xc4\x01" "a", "t: found bytes, want a text"),
        ROW("\x82\xa1n\x01\xa1t\xa3" "a\x00" "b", "t: byte 1 of 3 is 0x00"),
        ROW("\x82\xa1n\x01\xa1t\xa1\xff", "t: byte 0 of 1 is 0xff"),
        ROW("\x82\xa1n\x01\xa1t\xa2\xc0\xaf", "t: byte 0 of 2 is 0xc0"),
        ROW("\x82\xa1n\x01\xa1t\xa3\xe0\x80\x80", "t: byte 0 of 3 is 0xe0"),
        ROW("\x82\xa1n\x01\xa1t\xa3\xed\xa0\x80", "t: byte 0 of 3 is 0xed"),
        ROW("\x82\xa1n\x01\xa1t\xa4\xf4\x90\x80\x80", "t: byte 0 of 4 is 0xf4"),
        ROW("\x82\xa1n\x01\xa1t\xa4\xf0\x8f\xbf\xbf", "t: byte 0 of 4 is 0xf0"),
        ROW("\x82\xa1n\x01\xa1t\xa2" "a\xc3", "t: byte 1 of 2 is 0xc3"),
        ROW("\x82\xa1n\x01\xa1x\x91\x91\x91\x91\x91\x91\x91\x91\x90", "nested more than 8 deep"),
#undef ROW
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct small s;
        void *block = NULL;
        char why[256] = "", *exact = malloc(rows[i].count ? rows[i].count : 1);
        memcpy(exact, rows[i].bytes, rows[i].count);
        bool ok = wire_decode(&small_schema, exact, rows[i].count, &s, &block, why, sizeof why);
        if (ok || !strstr(why, rows[i].says))
            fail_msg("row %zu: ok=%d, says '%s', want '%s'", i, ok, why, rows[i].says);
        assert_ptr_equal(strstr(why, "small: "), why);
        assert_null(block);
        free(exact);
    }
}

static void depth_of_eight_is_still_skipped(void **state)
{
    (void)state;
    static const char data[] = "\x82\xa1n\x01\xa1x\x91\x91\x91\x91\x91\x91\x91\x90";
    struct small s;
    void *block;
    char why[256];
    assert_true(wire_decode(&small_schema, data, sizeof data - 1, &s, &block, why, sizeof why));
    assert_int_equal(s.n, 1);
    assert_string_equal(s.text, "");
    free(block);
}

static void what_may_not_be_read_is_not_written(void **state)
{
    (void)state;
    uint64_t numbers[5] = {0};
    struct leaf leaves[] = {{"fine", 0}, {"123456789", 0}};
    struct tree ok = {.text = "t"}, t;
    void *data;
    size_t bytes;
    char why[256];
#define REFUSED(says) \
    assert_false(wire_encode(&tree_schema, &t, &data, &bytes, why, sizeof why)); \
    assert_string_equal(why, says)
    t = ok; t.text = "12345678901234567";
    REFUSED("tree: text: 17 bytes, at most 16");
    t = ok; t.text = "cut \xc3";
    REFUSED("tree: text: byte 4 of 5 is 0xc3, which is no UTF-8 text");
    t = ok; t.number_count = 5; t.numbers = numbers;
    REFUSED("tree: numbers: 5 items, at most 4");
    t = ok; t.leaf_count = 2; t.leaves = leaves;
    REFUSED("tree: leaves: item 1: word: 9 bytes, at most 8");
#undef REFUSED
}

static void nan_infinity_and_whole_numbers_are_doubles(void **state)
{
    (void)state;
    struct tree from = {.real = NAN, .text = ""}, to;
    void *data, *block;
    size_t bytes;
    char why[256];
    assert_true(wire_encode(&tree_schema, &from, &data, &bytes, why, sizeof why));
    assert_true(wire_decode(&tree_schema, data, bytes, &to, &block, why, sizeof why));
    assert_true(isnan(to.real));
    assert_null(to.leaves);
    assert_null(to.numbers);
    free(block);
    /* "real" followed by a float64: put the small integer 4 there instead, as other packers would. */
    char *at = memmem(data, bytes, "\xa4real\xcb", 6);
    assert_non_null(at);
    at[5] = 4;
    memmove(at + 6, at + 14, bytes - (size_t)(at + 14 - (char *)data));
    assert_true(wire_decode(&tree_schema, data, bytes - 8, &to, &block, why, sizeof why));
    assert_true(to.real == 4.0);
    free(block);
    free(data);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_struct_survives_the_way_there_and_back),
        cmocka_unit_test(unknown_keys_are_skipped_whatever_they_hold),
        cmocka_unit_test(hostile_bytes_are_refused_with_a_sentence),
        cmocka_unit_test(depth_of_eight_is_still_skipped),
        cmocka_unit_test(what_may_not_be_read_is_not_written),
        cmocka_unit_test(nan_infinity_and_whole_numbers_are_doubles),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
