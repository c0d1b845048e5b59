/* test_transformer.c - the parts of the transformer that are computed once per schedule or shape, against the trace of
 * the reference's first step. If this breaks, every picture is wrong and test_golden says only that it is. */
#include "transformer.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine_model.h"
#include "golden.h"

#define TRACE GOLDEN_FOLDER "/distilled-f32/trace.safetensors"
#define GRID 5 /* the case is 80 x 80 pixels */

static struct safetensors *trace;
static struct engine_model model;

static int open_all(void **state)
{
    (void)state;
    struct engine_error why;
    struct engine_options options = {.model_dir = GOLDEN_FOLDER "/models/pocket", .precision = ENGINE_F32, .threads = 1};
    if (safetensors_open_file(&trace, TRACE, &why) && engine_model_open(&model, &options, &why))
        return 0;
    print_error("%s\n", why.text);
    return -1;
}

static int close_all(void **state)
{
    (void)state;
    engine_model_close(&model);
    safetensors_close(trace);
    return 0;
}

/* Compares the first values of `got` with all of a trace tensor. */
static void assert_close(const char *name, struct tensor got, double largest)
{
    size_t count;
    const struct safetensors_entry *e = safetensors_find(trace, name);
    assert_non_null(e);
    float *want = golden_entry_floats(e, &count), *values = golden_floats(got);
    assert_true((size_t)tensor_count(got) >= count);
    struct golden_difference d = golden_differ(values, want, count);
    print_message("%s: largest %.3g, rms %.3g of %.3g\n", name, d.largest, d.rms, d.scale);
    if (!(d.largest <= largest))
        fail_msg("%s differs by %g, allowed %g", name, d.largest, largest);
    free(want);
    free(values);
}

/* f32 sums of up to 384 products of values near 1: 1e-5 is about ten roundings. The time embedding is sharper than that
 * only if exp, cos and sin of 1000 t agree with the reference's to the last bit or two. */
static void modulations_equal_the_reference(void **state)
{
    (void)state;
    struct transformer_times times;
    float time[4] = {1000, 500, 250, 125};
    size_t mark = kern_mark(model.kern);
    transformer_times(model.kern, &model.config.transformer, &model.transformer, TENSOR_F32, &times, time, 4);
    assert_true(kern_sync(model.kern));
    assert_close("temb", tensor_slice(times.temb, 0, 0, 1), 5e-6);
    assert_close("double_stream_modulation_img", tensor_slice(times.image, 0, 0, 1), 5e-6);
    assert_close("double_stream_modulation_txt", tensor_slice(times.text, 0, 0, 1), 5e-6);
    assert_close("single_stream_modulation", tensor_slice(times.single, 0, 0, 1), 5e-6);
    kern_rewind(model.kern, mark);
}

/* A row of several steps is the row of that step alone, bit by bit. */
static void a_step_does_not_depend_on_the_schedule_around_it(void **state)
{
    (void)state;
    struct transformer_times all, one;
    float time[5] = {1000, 877.5f, 500, 250, 125};
    size_t mark = kern_mark(model.kern);
    transformer_times(model.kern, &model.config.transformer, &model.transformer, TENSOR_F32, &all, time, 5);
    transformer_times(model.kern, &model.config.transformer, &model.transformer, TENSOR_F32, &one, time + 3, 1);
    assert_memory_equal(tensor_slice(all.image, 0, 3, 1).data, one.image.data, tensor_bytes(one.image));
    assert_memory_equal(tensor_slice(all.out, 0, 3, 1).data, one.out.data, tensor_bytes(one.out));
    kern_rewind(model.kern, mark);
}

static struct tensor rows_of(float *table, int64_t first, int64_t count)
{
    int64_t half = model.config.transformer.attention_head_dim / 2;
    return tensor_slice(tensor_2d(table, TENSOR_F32, TRANSFORMER_TEXT_ROWS + GRID * GRID, half), 0, first, count);
}

/* The trace repeats each value for both members of a pair. */
static void assert_table(const char *name, struct tensor got)
{
    size_t count;
    const struct safetensors_entry *e = safetensors_find(trace, name);
    assert_non_null(e);
    float *want = golden_entry_floats(e, &count), *values = golden_floats(got);
    assert_int_equal(count, 2 * tensor_count(got));
    for (size_t i = 0; i < count; i++)
        if (want[i] != values[i / 2])
            fail_msg("%s: value %zu is %.9g, want %.9g", name, i, (double)values[i / 2], (double)want[i]);
    free(want);
    free(values);
}

static void rotary_tables_equal_the_reference_bit_by_bit(void **state)
{
    (void)state;
    size_t count = (size_t)(TRANSFORMER_TEXT_ROWS + GRID * GRID) * (size_t)model.config.transformer.attention_head_dim / 2;
    float *cos_table = malloc(count * sizeof *cos_table), *sin_table = malloc(count * sizeof *sin_table);
    transformer_rope(&model.config.transformer, cos_table, sin_table, &(struct transformer_grid){GRID, GRID, 0}, 1);
    assert_table("rope.cos.txt", rows_of(cos_table, 0, 32));
    assert_table("rope.sin.txt", rows_of(sin_table, 0, 32));
    assert_table("rope.cos.img", rows_of(cos_table, TRANSFORMER_TEXT_ROWS, GRID * GRID));
    assert_table("rope.sin.img", rows_of(sin_table, TRANSFORMER_TEXT_ROWS, GRID * GRID));
    free(cos_table);
    free(sin_table);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(modulations_equal_the_reference),
        cmocka_unit_test(a_step_does_not_depend_on_the_schedule_around_it),
        cmocka_unit_test(rotary_tables_equal_the_reference_bit_by_bit),
    };
    return cmocka_run_group_tests(tests, open_all, close_all);
}
