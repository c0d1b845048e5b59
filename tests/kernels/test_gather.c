/* test_gather.c - rows of a table by index: if this breaks, prompts are read as other words. */
#include "kernel_check.h"

static void rows_arrive_in_the_order_of_the_ids(struct kernel_check *c)
{
    static const int64_t widths[] = {1, 5, 16, 33};
    static const int32_t order[] = {6, 0, 3, 3, 6};
    for (int s = 0; s < 4; s++)
        for (int d = 0; d < 2; d++) { /* the table may have the other dtype: exact to f32, rounded to bf16 */
            struct tensor table = kernel_check_tensor(c, d ? TENSOR_F32 : TENSOR_BF16, 2, (int64_t[]){7, widths[s]});
            kernel_check_fill(table, 1, 3);
            struct tensor out = kernel_check_tensor(c, c->dtype, 2, (int64_t[]){5, widths[s]});
            struct quant_matrix rows = {.format = d ? QUANT_F32 : QUANT_BF16, .n = 7, .k = widths[s], .data = table.data};
            struct tensor wide = kernel_check_strided(c, out, 3);
            kern_gather(c->k, out, &rows, tensor_1d((void *)order, TENSOR_I32, 5));
            kern_gather(c->k, wide, &rows, tensor_1d((void *)order, TENSOR_I32, 5));
            kernel_check_same_bits(wide, out);
            for (int64_t i = 0; i < 5 * widths[s]; i++) {
                double want = kernel_check_get(table, order[i / widths[s]] * widths[s] + i % widths[s]);
                assert_true(kernel_check_get(out, i) == kernel_check_round(c->dtype, want));
            }
        }
}

static void a_table_may_be_in_any_format(struct kernel_check *c)
{
    static const int32_t order[] = {6, 0, 3, 3, 6};
    for (enum quant_format format = 0; format < QUANT_FORMAT_COUNT; format++) {
        struct quant_matrix table = kernel_check_matrix(c, format, 7, 768, 3);
        struct tensor out = kernel_check_tensor(c, c->dtype, 2, (int64_t[]){5, 768}), want = kernel_check_tensor(c, c->dtype, 2, (int64_t[]){5, 768});
        kern_gather(c->k, out, &table, tensor_1d((void *)order, TENSOR_I32, 5));
        for (int i = 0; i < 5; i++)
            quant_rows(tensor_slice(want, 0, i, 1).data, c->dtype, &table, order[i], 1);
        kernel_check_same_bits(out, want);
    }
}

int main(void)
{
    static const struct kernel_check_test tests[] = {KERNEL_CHECK_TEST(rows_arrive_in_the_order_of_the_ids),
                                                     KERNEL_CHECK_TEST(a_table_may_be_in_any_format)};
    return kernel_check_main(tests, sizeof tests / sizeof *tests);
}
