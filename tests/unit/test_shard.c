/* test_shard.c - what a rank of a team takes of a matrix: if this breaks, a team's picture is noise, or a quantised file is decoded
 * where it need not be. Parts are compared with the same rows and columns of the decoded whole, to the bit. */
#include "shard.h"

#include <string.h>

#include "kernel_check.h"

#define ROWS 24
#define COLUMNS 1024 /* halves of a quarter are whole blocks of every format */

static const enum quant_format formats[] = {QUANT_F32, QUANT_F16, QUANT_BF16, QUANT_Q8_0, QUANT_Q4_0, QUANT_Q4_1, QUANT_Q5_0, QUANT_Q5_1,
                                            QUANT_Q2_K, QUANT_Q3_K, QUANT_Q4_K, QUANT_Q5_K, QUANT_Q6_K, QUANT_FP8_E4M3, QUANT_NVFP4};

static struct tensor decoded(struct kernel_check *c, const struct quant_matrix *m, int64_t first, int64_t count)
{
    struct tensor t = kernel_check_tensor(c, TENSOR_F32, 2, (int64_t[]){count, m->k});
    quant_rows_f32(t.data, m, first, count);
    return t;
}

static void shares_are_even_and_in_order(struct kernel_check *c)
{
    (void)c;
    const struct shard_piece qkv_mlp[5] = {{6, 32}, {6, 32}, {6, 32}, {96, 1}, {96, 1}};
    struct shard s = shard_of(SHARD_ROWS, qkv_mlp, 5, 1, 2);
    const int64_t first[5] = {96, 288, 480, 624, 720}, count[5] = {96, 96, 96, 48, 48};
    for (int i = 0; i < 5; i++) {
        assert_int_equal(s.ranges[i].first, first[i]);
        assert_int_equal(s.ranges[i].count, count[i]);
    }
    assert_int_equal(shard_length(&s), 384);
    /* two key heads for four ranks: 0 0 1 1 */
    for (int rank = 0; rank < 4; rank++) {
        s = shard_of(SHARD_ROWS, &(struct shard_piece){2, 16}, 1, rank, 4);
        assert_int_equal(s.ranges[0].first, rank / 2 * 16);
        assert_int_equal(s.ranges[0].count, 16);
    }
    assert_true(shard_divides(8, 2) && shard_divides(1, 2) && shard_divides(2, 4));
    assert_false(shard_divides(3, 2) || shard_divides(2, 3));
}

static void rows_of_runs_are_rows_of_the_whole(struct kernel_check *c)
{
    struct quant_matrix m = kernel_check_matrix(c, QUANT_F32, ROWS, 8, 3);
    const struct quant_run swapped[2] = {{m, 12, 12}, {m, 0, 12}}; /* halves of a file in the other order */
    const struct shard_piece pieces[2] = {{8, 1}, {16, 1}};
    for (int rank = 0; rank < 2; rank++) {
        struct shard s = shard_of(SHARD_ROWS, pieces, 2, rank, 2);
        struct quant_run part[2 * SHARD_PIECES_MAX];
        int count = shard_rows(part, swapped, 2, &s), at = 0;
        for (int i = 0; i < count; i++)
            for (int64_t r = 0; r < part[i].count; r++, at++) {
                int64_t logical = at < 4 ? 4 * rank + at : 8 + 8 * rank + at - 4;
                assert_int_equal(part[i].first + r, logical < 12 ? logical + 12 : logical - 12);
            }
        assert_int_equal(at, 12);
    }
}

static void columns_keep_every_format(struct kernel_check *c)
{
    const struct shard_piece pieces[2] = {{2, COLUMNS / 4}, {COLUMNS / 2, 1}}; /* as [attention, mlp] */
    for (size_t f = 0; f < sizeof formats / sizeof formats[0]; f++)
        for (int rank = 0; rank < 2; rank++) {
            struct quant_run run = {kernel_check_matrix(c, formats[f], ROWS, COLUMNS, 7), 5, 13};
            struct shard s = shard_of(SHARD_COLUMNS, pieces, 2, rank, 2);
            size_t bytes = shard_columns_bytes(&run, &s);
            assert_int_equal(bytes, quant_run_bytes(&run) / 2);
            struct tensor memory = kernel_check_tensor(c, TENSOR_U8, 1, (int64_t[]){(int64_t)bytes});
            struct quant_run part = shard_columns(memory.data, &run, &s);
            struct tensor whole = decoded(c, &run.matrix, run.first, run.count), want = kernel_check_tensor(c, TENSOR_F32, 2, (int64_t[]){13, COLUMNS / 2});
            shard_copy(want, whole, &s);
            assert_int_equal(part.matrix.k, COLUMNS / 2);
            kernel_check_same_bits(decoded(c, &part.matrix, part.first, part.count), want);
        }
}

static void a_block_is_not_cut(struct kernel_check *c)
{
    struct quant_run run = {kernel_check_matrix(c, QUANT_Q4_K, 2, 512, 1), 0, 2};
    struct shard s = shard_of(SHARD_COLUMNS, &(struct shard_piece){512, 1}, 1, 0, 4); /* 128 of a block's 256 */
    assert_int_equal(shard_columns_bytes(&run, &s), 0);
}

int main(void)
{
    const struct kernel_check_test tests[] = {
        KERNEL_CHECK_TEST(shares_are_even_and_in_order),
        KERNEL_CHECK_TEST(rows_of_runs_are_rows_of_the_whole),
        KERNEL_CHECK_TEST(columns_keep_every_format),
        KERNEL_CHECK_TEST(a_block_is_not_cut),
    };
    return kernel_check_main(tests, sizeof tests / sizeof tests[0]);
}
