/* test_kern_plan.c - the backend that counts counts right: if this breaks, a model that fits is refused, or one that does not
 * is loaded until the device has no more. Against real devices' sizes: tests/cuda/test_dry_ledger.py. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "kern_plan.h"

static int setup(void **state)
{
    *state = kern_plan_open(0, 1, true);
    return *state ? 0 : -1;
}

static int teardown(void **state)
{
    kern_close(*state);
    return 0;
}

static void it_reads_nothing_and_never_runs_out(void **state)
{
    struct kern_space space;
    assert_true(kern_is_dry(*state));
    assert_true(kern_memory(*state, &space));
    assert_true(space.available == SIZE_MAX);
    kern_temp(*state, TENSOR_F32, 1, (int64_t[]){1ll << 50});
    kern_rewind(*state, 0);
    assert_true(kern_sync(*state));
    kern_plan_arena(*state);
}

static void the_arena_is_as_large_as_it_ever_was(void **state)
{
    struct kern *k = *state;
    kern_temp(k, TENSOR_F32, 1, (int64_t[]){64}); /* 256 */
    size_t mark = kern_mark(k);
    kern_temp(k, TENSOR_BF16, 2, (int64_t[]){3, 100}); /* 600: 768 */
    kern_rewind(k, mark);
    kern_temp(k, TENSOR_U8, 1, (int64_t[]){1}); /* 256 */
    assert_int_equal(kern_plan_arena(k), 1024);
    assert_int_equal(kern_plan_arena(k), 512); /* what is still given out */
    kern_rewind(k, 0);
    kern_plan_arena(k);
    assert_int_equal(kern_plan_arena(k), 0);
}

static void weights_of_layers_are_counted_apart(void **state)
{
    struct kern *k = *state;
    struct tensor none = {0}, matrix = tensor_2d(NULL, TENSOR_F32, 64, 32);
    size_t before = kern_plan_weights(k);
    struct kern_weight *w = kern_weight_linear(k, TENSOR_BF16, matrix, none); /* 4096 */
    struct kern_weight *c = kern_weight_conv(k, TENSOR_BF16, tensor_4d(NULL, TENSOR_F32, 16, 3, 3, 3), none); /* 3 inputs as 8: 2304 */
    struct tensor vector = kern_upload(k, TENSOR_BF16, tensor_1d(NULL, TENSOR_F32, 128)); /* 256 */
    assert_int_equal(kern_plan_weights(k) - before, 4096 + 2304 + 256);
    struct kern_layer *l = kern_layer_begin(k);
    struct kern_weight *late = kern_weight_linear(k, TENSOR_BF16, matrix, none);
    kern_layer_end(k, l);
    assert_int_equal(kern_plan_weights(k) - before, 4096 + 2304 + 256);
    assert_int_equal(kern_layer_bytes(l), 4096);
    struct kern_layer *moved = kern_layer_begin(k);
    kern_layer_take(k, moved, w);
    kern_layer_end(k, moved);
    assert_int_equal(kern_plan_weights(k) - before, 2304 + 256);
    assert_int_equal(kern_layer_bytes(moved), 4096);
    kern_layer_free(k, moved);
    kern_release(k, vector);
    kern_weight_free(k, w);
    kern_weight_free(k, c);
    kern_weight_free(k, late);
    kern_layer_free(k, l);
}

static void what_an_op_takes_for_itself_is_counted(void **state)
{
    struct kern *k = *state;
    struct kern_weight *c = kern_weight_conv(k, TENSOR_BF16, tensor_4d(NULL, TENSOR_F32, 16, 3, 3, 3), (struct tensor){0});
    struct tensor x = kern_temp(k, TENSOR_BF16, 4, (int64_t[]){1, 32, 32, 3}), y = kern_temp(k, TENSOR_BF16, 4, (int64_t[]){1, 32, 32, 16});
    size_t held = kern_mark(k);
    kern_plan_arena(k);
    kern_conv2d(k, y, x, c, 1, 1);
    assert_int_equal(kern_plan_arena(k) - held, 32 * 32 * 8 * 2); /* rows of 3 as rows of 8 */
    assert_int_equal(kern_mark(k), held);
    kern_rewind(k, 0);
    kern_plan_arena(k);
    kern_weight_free(k, c);
}

/* Blocks as in the file, each run and its scales from 256 bytes on; a product decodes all of it, and lays odd rows out anew. */
static void a_quantised_weight_takes_its_file_s_bytes_and_its_product_the_decoded_ones(void **state)
{
    struct kern *k = *state;
    struct quant_run runs[] = {{{.format = QUANT_NVFP4, .n = 9, .k = 48}, 4, 5}, {{.format = QUANT_BF16, .n = 3, .k = 48}, 0, 3}};
    size_t before = kern_plan_weights(k);
    struct kern_weight *w = kern_weight_quant(k, TENSOR_BF16, runs, 2);
    assert_int_equal(kern_plan_weights(k) - before, 256 + 256 + 512); /* 5 x 24, 5 x 3, 3 x 96 */
    runs[0].matrix.format = QUANT_FP8_E4M3, runs[0].matrix.k = 37;
    struct kern_weight *odd = kern_weight_quant(k, TENSOR_BF16, runs, 1);
    struct tensor x = kern_temp(k, TENSOR_BF16, 2, (int64_t[]){16, 48}), y = kern_temp(k, TENSOR_BF16, 2, (int64_t[]){16, 8});
    size_t held = kern_mark(k);
    kern_plan_arena(k);
    kern_linear(k, y, x, w);
    assert_int_equal(kern_plan_arena(k) - held, 8 * 48 * 2);
    kern_linear(k, tensor_slice(y, 1, 0, 5), tensor_slice(x, 1, 0, 37), odd);
    assert_int_equal(kern_plan_arena(k) - held, 512 + 1280); /* 5 x 40 x 2, 16 x 40 x 2 */
    kern_rewind(k, 0);
    kern_plan_arena(k);
    runs[1].matrix.format = QUANT_F16;
    struct kern_weight *wide = kern_weight_quant(k, TENSOR_BF16, &runs[1], 1); /* not smaller than bf16: decoded at load */
    kern_linear(k, tensor_slice(y, 1, 0, 3), x, wide);
    assert_int_equal(kern_plan_arena(k), 0);
    kern_weight_free(k, w);
    kern_weight_free(k, odd);
    kern_weight_free(k, wide);
}

/* What one product of 16 rows takes beside the weight, on a device with units for FP8 or without. */
static size_t product_takes(bool has_fp8, const struct quant_run *run)
{
    struct kern *k = kern_plan_open(0, 1, has_fp8);
    struct kern_weight *w = kern_weight_quant(k, TENSOR_BF16, run, 1);
    struct tensor x = kern_temp(k, TENSOR_BF16, 2, (int64_t[]){16, run->matrix.k}), y = kern_temp(k, TENSOR_BF16, 2, (int64_t[]){16, run->count});
    size_t held = kern_mark(k);
    kern_linear(k, y, x, w);
    size_t taken = kern_plan_arena(k) - held;
    kern_weight_free(k, w);
    kern_close(k);
    return taken;
}

static void a_product_in_fp8_takes_rows_of_a_byte_a_value_and_decodes_nothing(void **state)
{
    struct quant_run run = {{.format = QUANT_FP8_E4M3, .n = 32, .k = 64, .input_scale = 1, .has_fp8_products = true}, 0, 32};
    (void)state;
    assert_int_equal(product_takes(true, &run), 16 * 64);
    assert_int_equal(product_takes(false, &run), 16 * 64 * 2 + 32 * 64 * 2);
    run.matrix.input_scale = 0; /* then rows have scales of their own */
    assert_int_equal(product_takes(true, &run), 16 * 64 + 256);
    run.count = 24; /* the units want multiples of 16 */
    assert_int_equal(product_takes(true, &run), 16 * 64 * 2 + 256 + 24 * 64 * 2);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(it_reads_nothing_and_never_runs_out),
        cmocka_unit_test(the_arena_is_as_large_as_it_ever_was),
        cmocka_unit_test(weights_of_layers_are_counted_apart),
        cmocka_unit_test(what_an_op_takes_for_itself_is_counted),
        cmocka_unit_test(a_quantised_weight_takes_its_file_s_bytes_and_its_product_the_decoded_ones),
        cmocka_unit_test(a_product_in_fp8_takes_rows_of_a_byte_a_value_and_decodes_nothing),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
