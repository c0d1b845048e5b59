/* test_quant.c - a weight file's bytes mean what the reference says. A decoder that is off by one nibble, group or
 * rounding renders noise or a slightly other picture and nothing else would notice.
 *
 * data/formats.safetensors is made by tests/golden/formats.py with the Python package gguf (dequantize) and numpy. */
#include "quant.h"
#include "safetensors.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static struct safetensors *vectors;

static int open_vectors(void **state)
{
    (void)state;
    struct engine_error why;
    return safetensors_open_file(&vectors, "tests/unit/data/formats.safetensors", &why) ? 0 : -1;
}

static int close_vectors(void **state)
{
    (void)state;
    safetensors_close(vectors);
    return 0;
}

static const struct safetensors_entry *vector(const char *format, const char *what)
{
    char name[64];
    snprintf(name, sizeof name, "%s%s%s", format, *what ? "." : "", what);
    const struct safetensors_entry *e = safetensors_find(vectors, name);
    if (!e)
        fail_msg("no vector '%s'", name);
    return e;
}

static float number_at(const struct safetensors_entry *e, size_t i)
{
    float f;
    memcpy(&f, (const char *)e->data + 4 * i, 4);
    return f;
}

/* The vectors of a format as a matrix. */
static struct quant_matrix matrix_of(enum quant_format format)
{
    const char *name = quant_info(format)->name;
    const struct safetensors_entry *values = vector(name, "values");
    struct quant_matrix m = {.format = format, .n = values->shape[0], .k = values->shape[1],
                             .data = vector(name, "blocks")->data};
    if (format == QUANT_FP8_E4M3 || format == QUANT_NVFP4)
        m.scale = number_at(vector(name, "scale"), 0);
    if (format == QUANT_NVFP4)
        m.block_scales = vector(name, "block_scales")->data;
    return m;
}

static void expect_values(const struct quant_matrix *m, const struct safetensors_entry *values)
{
    float *got = malloc((size_t)(m->n * m->k) * sizeof *got);
    quant_rows_f32(got, m, 0, m->n);
    for (int64_t i = 0; i < m->n * m->k; i++) {
        float want = number_at(values, (size_t)i);
        if (memcmp(&got[i], &want, 4) != 0)
            fail_msg("%s: value %lld is %a, the reference has %a", quant_info(m->format)->name, (long long)i,
                     (double)got[i], (double)want);
    }
    free(got);
}

static void every_format_equals_its_reference_to_the_bit(void **state)
{
    (void)state;
    for (int f = 0; f < QUANT_FORMAT_COUNT; f++) {
        struct quant_matrix m = matrix_of((enum quant_format)f);
        char why[256];
        const char *name = quant_info(m.format)->name;
        if (!quant_check(&m, vector(name, "blocks")->bytes, f == QUANT_NVFP4 ? vector(name, "block_scales")->bytes : 0, why, sizeof why))
            fail_msg("%s: %s", name, why);
        expect_values(&m, vector(name, "values"));
        assert_true(quant_is_finite(&m, 0, m.n));
        enum quant_format found;
        assert_true(quant_find(&found, name) && found == m.format);
    }
}

static void swizzled_block_scales_are_found(void **state)
{
    (void)state;
    struct quant_matrix m = matrix_of(QUANT_NVFP4);
    char why[256];
    const struct safetensors_entry *scales = vector("NVFP4", "block_scales_swizzled");
    m.block_scales = scales->data;
    m.is_swizzled = true;
    assert_true(quant_check(&m, vector("NVFP4", "blocks")->bytes, scales->bytes, why, sizeof why));
    expect_values(&m, vector("NVFP4", "values"));
}

static void low_nibble_first_swaps_neighbours_and_nothing_else(void **state)
{
    (void)state;
    struct quant_matrix m = matrix_of(QUANT_NVFP4);
    float high[80], low[80];
    for (int64_t row = 0; row < m.n; row++) {
        m.low_first = false;
        quant_rows_f32(high, &m, row, 1);
        m.low_first = true;
        quant_rows_f32(low, &m, row, 1);
        for (int i = 0; i < 80; i++)
            assert_memory_equal(&low[i], &high[i ^ 1], 4);
    }
}

static void bf16_is_the_rounded_f32_and_any_rows_can_be_asked_for(void **state)
{
    (void)state;
    for (int f = 0; f < QUANT_FORMAT_COUNT; f++) {
        struct quant_matrix m = matrix_of((enum quant_format)f);
        const struct safetensors_entry *values = vector(quant_info(m.format)->name, "values");
        uint16_t *got = malloc((size_t)m.k * sizeof *got);
        for (int64_t row = m.n - 1; row >= 0; row--) {
            quant_rows_bf16(got, &m, row, 1);
            for (int64_t i = 0; i < m.k; i++)
                assert_int_equal(got[i], tensor_bf16_of(number_at(values, (size_t)(row * m.k + i))));
        }
        free(got);
    }
}

static bool same_number(float a, float b)
{
    return isnan(a) ? isnan(b) : memcmp(&a, &b, 4) == 0;
}

static void all_codes_of_small_floats_are_exact(void **state)
{
    (void)state;
    for (int i = 0; i < 256; i++)
        assert_true(same_number(quant_f32_of_e4m3((uint8_t)i), number_at(vector("e4m3", ""), (size_t)i)));
    for (int i = 0; i < 16; i++)
        assert_true(same_number(quant_f32_of_e2m1((uint8_t)i), number_at(vector("e2m1", ""), (size_t)i)));
    assert_true(quant_f32_of_e4m3(0x7e) == 448 && isnan(quant_f32_of_e4m3(0x7f)) && isnan(quant_f32_of_e4m3(0xff)));
#ifdef __FLT16_MANT_DIG__
    for (int i = 0; i < 65536; i++) { /* the compiler's own conversion */
        uint16_t bits = (uint16_t)i;
        _Float16 h;
        memcpy(&h, &bits, 2);
        assert_true(same_number(quant_f32_of_f16(bits), (float)h));
    }
#endif
}

/* A NaN in a weight makes a black picture: it has to be found where it is, whichever number of the block holds it. */
static void nan_and_infinity_are_found_in_every_scale(void **state)
{
    (void)state;
    static const struct {
        enum quant_format format;
        int at;
    } scales[] = {{QUANT_F16, 0},  {QUANT_Q8_0, 0}, {QUANT_Q4_0, 0},  {QUANT_Q4_1, 0}, {QUANT_Q4_1, 2}, {QUANT_Q5_0, 0},
                  {QUANT_Q5_1, 0}, {QUANT_Q5_1, 2}, {QUANT_Q2_K, 80}, {QUANT_Q2_K, 82}, {QUANT_Q3_K, 108}, {QUANT_Q4_K, 0},
                  {QUANT_Q4_K, 2}, {QUANT_Q5_K, 0}, {QUANT_Q5_K, 2},  {QUANT_Q6_K, 208}};
    for (size_t i = 0; i < sizeof scales / sizeof *scales; i++) {
        struct quant_matrix m = matrix_of(scales[i].format);
        const struct quant_traits *info = quant_info(m.format);
        size_t bytes;
        assert_true(quant_bytes(&bytes, m.format, m.n, m.k));
        uint8_t *copy = malloc(bytes), *last = copy + bytes - info->bytes + scales[i].at;
        memcpy(copy, m.data, bytes);
        m.data = copy;
        assert_true(quant_is_finite(&m, 0, m.n));
        last[0] = 0x00, last[1] = 0x7c; /* infinity */
        assert_false(quant_is_finite(&m, m.n - 1, 1));
        assert_true(quant_is_finite(&m, 0, m.n - 1));
        last[0] = 0x01, last[1] = 0xfe; /* NaN */
        assert_false(quant_is_finite(&m, 0, m.n));
        float *values = malloc((size_t)m.k * 4);
        quant_rows_f32(values, &m, m.n - 1, 1);
        bool all = true;
        for (int64_t v = 0; v < m.k; v++)
            all = all && isfinite(values[v]);
        assert_false(all); /* the claim is about values, not about bytes */
        free(values);
        free(copy);
    }
    struct quant_matrix m = matrix_of(QUANT_FP8_E4M3);
    uint8_t *copy = malloc((size_t)(m.n * m.k));
    memcpy(copy, m.data, (size_t)(m.n * m.k));
    copy[m.k] = 0xff;
    m.data = copy;
    assert_true(quant_is_finite(&m, 0, 1));
    assert_false(quant_is_finite(&m, 1, 1));
    m.scale = 1e38f;
    assert_false(quant_is_finite(&m, 0, 1));
    free(copy);
    m = matrix_of(QUANT_NVFP4);
    size_t bytes;
    assert_true(quant_block_scale_bytes(&bytes, &m));
    copy = malloc(bytes);
    memcpy(copy, m.block_scales, bytes);
    copy[quant_block_scale_at(&m, 7, 2)] = 0x7f;
    m.block_scales = copy;
    assert_true(quant_is_finite(&m, 0, 7));
    assert_false(quant_is_finite(&m, 7, 1));
    free(copy);
}

static void wrong_sizes_and_scales_are_refused(void **state)
{
    (void)state;
    static const struct {
        enum quant_format format;
        int64_t n, k;
        float scale;
        bool is_swizzled;
        size_t data, scales;
        const char *word;
    } cases[] = {
        {QUANT_Q4_K, 2, 255, 0, false, 288, 0, "whole number of 256"},
        {QUANT_Q8_0, 3, 64, 0, false, 203, 0, "203 bytes, [3,64] as Q8_0 needs 204"},
        {QUANT_Q4_0, INT64_MAX, 1 << 30, 0, false, 0, 0, "whole number"},
        {QUANT_F32, -1, 4, 0, false, 0, 0, "[-1,4]"},
        {QUANT_FP8_E4M3, 1, 4, NAN, false, 4, 0, "scale of"},
        {QUANT_FP8_E4M3, 1, 4, -1, false, 4, 0, "scale of -1"},
        {QUANT_NVFP4, 1, 16, INFINITY, false, 8, 1, "scale of inf"},
        {QUANT_NVFP4, 2, 32, 1, false, 32, 3, "3 block scales, [2,32] as NVFP4 needs 4"},
        {QUANT_NVFP4, 2, 32, 1, true, 32, 4, "(swizzled) needs 512"},
        {QUANT_NVFP4, 2, 24, 1, true, 24, 4, "whole number of 16"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct quant_matrix m = {.format = cases[i].format, .n = cases[i].n, .k = cases[i].k, .scale = cases[i].scale,
                                 .is_swizzled = cases[i].is_swizzled};
        char why[256] = "";
        assert_false(quant_check(&m, cases[i].data, cases[i].scales, why, sizeof why));
        if (!strstr(why, cases[i].word))
            fail_msg("case %zu: '%s' does not say '%s'", i, why, cases[i].word);
    }
    enum quant_format f;
    assert_false(quant_find(&f, "IQ4_XS"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_format_equals_its_reference_to_the_bit),
        cmocka_unit_test(swizzled_block_scales_are_found),
        cmocka_unit_test(low_nibble_first_swaps_neighbours_and_nothing_else),
        cmocka_unit_test(bf16_is_the_rounded_f32_and_any_rows_can_be_asked_for),
        cmocka_unit_test(all_codes_of_small_floats_are_exact),
        cmocka_unit_test(nan_and_infinity_are_found_in_every_scale),
        cmocka_unit_test(wrong_sizes_and_scales_are_refused),
    };
    return cmocka_run_group_tests(tests, open_vectors, close_vectors);
}
