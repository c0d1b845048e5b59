/* test_linear.c - matrix times rows: if this breaks, every layer of every model is wrong, or an image depends on the
 * batch that it was rendered in. */
#include "kernel_check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static struct tensor none(void)
{
    return (struct tensor){0};
}

/* f32 sums of k products and a bias: each of the k + 1 additions errs by at most U32 of the sum of magnitudes. */
static void compare(struct kernel_check *c, struct tensor out, struct tensor x, struct tensor w, struct tensor bias)
{
    int64_t rows = x.shape[0], k = x.shape[1], n = w.shape[0];
    double *want = kernel_check_doubles(rows * n), *slack = kernel_check_doubles(rows * n);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < n; j++) {
            double sum = 0, size = 0;
            for (int64_t i = 0; i < k; i++) {
                double product = kernel_check_get(x, r * k + i) * kernel_check_round(c->dtype, kernel_check_get(w, j * k + i));
                sum += product;
                size += fabs(product);
            }
            double b = bias.data ? kernel_check_get(bias, j) : 0;
            want[r * n + j] = kernel_check_round(out.dtype, sum + b);
            slack[r * n + j] = (double)(k + 1) * KERNEL_CHECK_U32 * (size + fabs(b));
        }
    kernel_check_compare(c, out, want, slack);
}

static const int64_t shapes[][3] = { /* rows, n, k: one, odd, around tiles (2, 6, 32), panels (16, 32, 64), blocks (96, 384), runs (512) */
    {1, 1, 1}, {1, 16, 7}, {2, 3, 2}, {3, 17, 33}, {5, 63, 64}, {6, 64, 16}, {7, 65, 31}, {12, 129, 4},
    {95, 15, 130}, {96, 16, 511}, {97, 33, 512}, {193, 20, 513}, {13, 300, 1030}, {33, 31, 1057}, {385, 34, 96}};

static void equals_the_definition_at_every_shape(struct kernel_check *c)
{
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        int64_t rows = shapes[s][0], n = shapes[s][1], k = shapes[s][2];
        struct tensor x = kernel_check_random(c, 2, (int64_t[]){rows, k}, 1, 1), w = kernel_check_random(c, 2, (int64_t[]){n, k}, 2, 1);
        struct tensor bias = s % 2 ? kernel_check_random(c, 1, (int64_t[]){n}, 3, 2) : none();
        struct tensor out = kernel_check_tensor(c, c->dtype, 2, (int64_t[]){rows, n});
        struct kern_weight *packed = kern_weight_linear(c->k, c->dtype, w, bias);
        kern_linear(c->k, out, x, packed);
        kernel_check_done(c->k);
        compare(c, out, x, w, bias);
        kern_weight_free(c->k, packed);
    }
}

static void a_weight_of_the_other_dtype_is_converted_once(struct kernel_check *c)
{
    enum tensor_dtype other = c->dtype == TENSOR_F32 ? TENSOR_BF16 : TENSOR_F32;
    struct tensor w = kernel_check_tensor(c, other, 2, (int64_t[]){21, 45}), bias = kernel_check_tensor(c, other, 1, (int64_t[]){21});
    kernel_check_fill(w, 4, 1);
    kernel_check_fill(bias, 5, 1);
    struct tensor x = kernel_check_random(c, 2, (int64_t[]){9, 45}, 6, 1), out = kernel_check_tensor(c, TENSOR_F32, 2, (int64_t[]){9, 21});
    struct kern_weight *packed = kern_weight_linear(c->k, c->dtype, w, bias);
    kernel_check_fill(w, 99, 1); /* the source may go */
    struct tensor again = kernel_check_tensor(c, other, 2, (int64_t[]){21, 45});
    kernel_check_fill(again, 4, 1);
    kern_linear(c->k, out, x, packed);
    kernel_check_done(c->k);
    compare(c, out, x, again, bias);
    assert_true(kern_weight_bytes(packed) >= 21 * 45 * tensor_dtype_bytes(c->dtype));
    kern_weight_free(c->k, packed);
}

static void columns_of_wider_rows_are_read_and_written_in_place(struct kernel_check *c)
{
    struct tensor x = kernel_check_random(c, 2, (int64_t[]){11, 35}, 1, 1), w = kernel_check_random(c, 2, (int64_t[]){19, 35}, 2, 1);
    struct tensor plain = kernel_check_tensor(c, c->dtype, 2, (int64_t[]){11, 19});
    struct tensor wide = kernel_check_random(c, 2, (int64_t[]){11, 27}, 7, 1), before = kernel_check_strided(c, wide, 3);
    struct kern_weight *packed = kern_weight_linear(c->k, c->dtype, kernel_check_strided(c, w, 5), none());
    kern_linear(c->k, plain, x, packed);
    kern_linear(c->k, tensor_slice(wide, 1, 3, 19), kernel_check_strided(c, x, 7), packed);
    kernel_check_done(c->k);
    compare(c, plain, x, w, none());
    kernel_check_same_bits(tensor_slice(wide, 1, 3, 19), plain);
    kernel_check_same_bits(tensor_slice(wide, 1, 0, 3), tensor_slice(before, 1, 0, 3)); /* neighbours untouched */
    kernel_check_same_bits(tensor_slice(wide, 1, 22, 5), tensor_slice(before, 1, 22, 5));
    kern_weight_free(c->k, packed);
}

static void a_row_does_not_depend_on_other_rows_or_threads(struct kernel_check *c)
{
    struct tensor x = kernel_check_random(c, 2, (int64_t[]){101, 700}, 1, 1), w = kernel_check_random(c, 2, (int64_t[]){150, 700}, 2, 1);
    struct tensor all = kernel_check_tensor(c, c->dtype, 2, (int64_t[]){101, 150});
    struct tensor alone = kernel_check_tensor(c, c->dtype, 2, (int64_t[]){1, 150});
    struct kern *backends[] = {c->k, c->one, c->three};
    for (int b = 0; b < 3; b++) {
        struct kern_weight *packed = kern_weight_linear(backends[b], c->dtype, w, none());
        struct tensor out = kernel_check_tensor(c, c->dtype, 2, (int64_t[]){101, 150});
        kern_linear(backends[b], b ? out : all, x, packed);
        if (b)
            kernel_check_same_bits(out, all);
        for (int64_t r = 0; r < 101; r += 10) {
            kern_linear(backends[b], alone, tensor_slice(x, 0, r, 1), packed);
            kernel_check_same_bits(alone, tensor_slice(all, 0, r, 1));
        }
        kern_weight_free(backends[b], packed);
        kernel_check_done(backends[b]);
    }
}

static void nan_and_infinity_reach_their_row_only(struct kernel_check *c)
{
    struct tensor x = kernel_check_random(c, 2, (int64_t[]){8, 40}, 1, 1), w = kernel_check_random(c, 2, (int64_t[]){20, 40}, 2, 1);
    struct tensor good = kernel_check_tensor(c, c->dtype, 2, (int64_t[]){8, 20}), bad = kernel_check_tensor(c, c->dtype, 2, (int64_t[]){8, 20});
    struct kern_weight *packed = kern_weight_linear(c->k, c->dtype, w, none());
    kern_linear(c->k, good, x, packed);
    kernel_check_set(x, 2 * 40 + 39, NAN);
    kernel_check_set(x, 5 * 40, INFINITY);
    kern_linear(c->k, bad, x, packed);
    for (int64_t r = 0; r < 8; r++) {
        if (r != 2 && r != 5)
            kernel_check_same_bits(tensor_slice(bad, 0, r, 1), tensor_slice(good, 0, r, 1));
        for (int64_t j = 0; j < 20; j++)
            assert_true(r == 2 ? isnan(kernel_check_get(bad, r * 20 + j)) : r == 5 ? isinf(kernel_check_get(bad, r * 20 + j)) : true);
    }
    kern_weight_free(c->k, packed);
}

/* The same rows, decoded: what a quantised weight must be equal to. */
static struct tensor decoded(struct kernel_check *c, const struct quant_run *runs, int count)
{
    int64_t n = 0, at = 0, k = runs[0].matrix.k;
    for (int i = 0; i < count; i++)
        n += runs[i].count;
    struct tensor w = kernel_check_tensor(c, c->dtype, 2, (int64_t[]){n, k});
    for (int i = 0; i < count; at += runs[i++].count)
        if (runs[i].count)
            quant_rows(tensor_slice(w, 0, at, runs[i].count).data, c->dtype, &runs[i].matrix, runs[i].first, runs[i].count);
    return w;
}

static void compare_quant(struct kernel_check *c, const struct quant_run *runs, int count, int64_t rows)
{
    struct tensor w = decoded(c, runs, count), x = kernel_check_random(c, 2, (int64_t[]){rows, w.shape[1]}, 5, 1);
    struct tensor want = kernel_check_tensor(c, c->dtype, 2, (int64_t[]){rows, w.shape[0]});
    struct kern_weight *packed = kern_weight_linear(c->k, c->dtype, w, none());
    kern_linear(c->k, want, x, packed);
    kernel_check_done(c->k);
    kern_weight_free(c->k, packed);
    struct kern *backends[] = {c->k, c->one, c->three};
    for (int b = 0; b < 3; b++) {
        struct tensor out = kernel_check_tensor(c, c->dtype, 2, (int64_t[]){rows, w.shape[0]});
        struct kern_weight *quant = kern_weight_quant(backends[b], c->dtype, runs, count);
        kern_linear(backends[b], out, x, quant);
        kernel_check_done(backends[b]);
        kern_weight_free(backends[b], quant);
        if (memcmp(out.data, want.data, tensor_bytes(out)) != 0)
            fail_msg("%s, %lld rows, [%lld,%lld]: not what the decoded weight gives", quant_info(runs[0].matrix.format)->name,
                     (long long)rows, (long long)w.shape[0], (long long)w.shape[1]);
    }
}

static void a_quantised_weight_gives_the_bits_of_the_decoded_one(struct kernel_check *c)
{
    static const int64_t sizes[][3] = {/* rows, n, k: one, a panel and more, several bands of rows, beyond a stretch of k */
                                       {1, 1, 256}, {3, 70, 256}, {7, 33, 2048}, {801, 5, 256}};
    for (enum quant_format format = 0; format < QUANT_FORMAT_COUNT; format++)
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
            struct quant_matrix m = kernel_check_matrix(c, format, sizes[s][1], sizes[s][2], 7);
            compare_quant(c, &(struct quant_run){m, 0, m.n}, 1, sizes[s][0]);
        }
}

static void widths_of_odd_blocks_and_scales_in_any_order_are_read(struct kernel_check *c)
{
    struct quant_matrix bytes = kernel_check_matrix(c, QUANT_FP8_E4M3, 21, 1603, 1), blocks = kernel_check_matrix(c, QUANT_NVFP4, 150, 80, 2);
    compare_quant(c, &(struct quant_run){bytes, 0, 21}, 1, 9);
    compare_quant(c, &(struct quant_run){blocks, 0, 150}, 1, 9); /* 5 blocks a row: four and one */
    blocks.is_swizzled = false;
    compare_quant(c, &(struct quant_run){blocks, 0, 150}, 1, 9);
    blocks.low_first = true;
    compare_quant(c, &(struct quant_run){blocks, 0, 150}, 1, 9);
    bytes.scale = 1e-38f; /* values that only the exact rounding keeps */
    struct quant_run run = {bytes, 0, 21};
    struct tensor w = decoded(c, &run, 1);
    assert_true(fabs(kernel_check_get(w, 5)) < 0x1p-110);
    compare_quant(c, &run, 1, 9);
}

static void runs_of_several_matrices_stand_behind_each_other(struct kernel_check *c)
{
    struct quant_matrix q = kernel_check_matrix(c, QUANT_Q4_K, 90, 512, 1), v = kernel_check_matrix(c, QUANT_Q6_K, 40, 512, 2);
    struct quant_matrix plain = kernel_check_matrix(c, QUANT_BF16, 20, 512, 3);
    compare_quant(c, (struct quant_run[]){{q, 30, 60}, {q, 0, 30}, {v, 3, 37}, {plain, 0, 0}, {plain, 19, 1}}, 5, 50);
}

static void a_kept_weight_takes_the_bytes_of_its_file(struct kernel_check *c)
{
    static const struct { enum quant_format format; size_t bytes; } formats[] = { /* of 64 rows of 512 */
        {QUANT_FP8_E4M3, 64 * 512}, {QUANT_NVFP4, 64 * (256 + 32)}, {QUANT_Q8_0, 64 * 16 * 34}, {QUANT_Q4_K, 64 * 2 * 144}};
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++) {
        struct quant_matrix m = kernel_check_matrix(c, formats[i].format, 100, 512, 1);
        size_t before = kern_peak_bytes(c->k);
        struct kern_weight *w = kern_weight_quant(c->k, c->dtype, &(struct quant_run){m, 36, 64}, 1);
        assert_true(kern_weight_is_kept(w));
        assert_int_equal(kern_weight_bytes(w), formats[i].bytes);
        assert_int_equal(kern_peak_bytes(c->k) - before, formats[i].bytes);
        kern_weight_free(c->k, w);
    }
    struct quant_matrix plain = kernel_check_matrix(c, QUANT_F16, 64, 512, 1); /* as large as bf16: packed once */
    struct kern_weight *w = kern_weight_quant(c->k, c->dtype, &(struct quant_run){plain, 0, 64}, 1);
    assert_false(kern_weight_is_kept(w));
    assert_int_equal(kern_weight_bytes(w), 64 * 512 * tensor_dtype_bytes(c->dtype));
    kern_weight_free(c->k, w);
}

static void no_rows_are_no_work(struct kernel_check *c)
{
    struct tensor w = kernel_check_random(c, 2, (int64_t[]){5, 6}, 2, 1);
    struct kern_weight *packed = kern_weight_linear(c->k, c->dtype, w, none());
    kern_linear(c->k, kernel_check_tensor(c, c->dtype, 2, (int64_t[]){0, 5}), kernel_check_tensor(c, c->dtype, 2, (int64_t[]){0, 6}), packed);
    kernel_check_done(c->k);
    kern_weight_free(c->k, packed);
}

/* --- products in FP8 ------------------------------------------------------------------------------------- */

/* The nearest e4m3 number by looking at all, ties to the even code. */
static double nearest_e4m3(double x)
{
    int best = 0;
    for (int code = 1; code < 0x7f; code++) {
        double old = fabs(fabs(x) - (double)quant_f32_of_e4m3((uint8_t)best)), now = fabs(fabs(x) - (double)quant_f32_of_e4m3((uint8_t)code));
        if (now < old || (now == old && code % 2 == 0))
            best = code;
    }
    return copysign((double)quant_f32_of_e4m3((uint8_t)best), x);
}

/* What a row is divided by: 448 s is the first that is not smaller than any of it. */
static double row_scale(struct tensor x, int64_t r, float input_scale)
{
    double largest = 0, s = 0x1p-126;
    for (int64_t i = 0; i < x.shape[1]; i++)
        largest = fmax(largest, fabs(kernel_check_get(x, r * x.shape[1] + i)));
    while (448 * s < largest)
        s *= 2;
    return input_scale > 0 ? (double)input_scale : s;
}

static void compare_fp8(struct kernel_check *c, struct tensor out, struct tensor x, const struct quant_run *run)
{
    int64_t rows = x.shape[0], k = x.shape[1], n = run->count;
    const struct quant_matrix *m = &run->matrix;
    double *want = kernel_check_doubles(rows * n), *slack = kernel_check_doubles(rows * n);
    double *q = kernel_check_doubles(k);
    for (int64_t r = 0; r < rows; r++) {
        double s = row_scale(x, r, m->input_scale);
        for (int64_t i = 0; i < k; i++)
            q[i] = nearest_e4m3((double)((float)kernel_check_get(x, r * k + i) / (float)s));
        for (int64_t j = 0; j < n; j++) {
            double sum = 0, size = 0;
            for (int64_t i = 0; i < k; i++) {
                double product = q[i] * (double)quant_f32_of_e4m3(quant_row(m, run->first + j)[i]);
                sum += product;
                size += fabs(product);
            }
            double scale = (double)(float)(s * (double)m->scale);
            want[r * n + j] = kernel_check_round(out.dtype, sum * scale);
            slack[r * n + j] = (double)(k + 1) * KERNEL_CHECK_U32 * size * scale;
        }
    }
    free(q);
    kernel_check_compare(c, out, want, slack);
}

/* Rows of every size: of zeros, far beyond 448 scales, of the smallest numbers. */
static struct tensor uneven_rows(struct kernel_check *c, int64_t rows, int64_t k)
{
    static const double sizes[] = {1, 0, 3000, 0.004, 1e-20, 30};
    struct tensor x = kernel_check_random(c, 2, (int64_t[]){rows, k}, 3, 1);
    for (int64_t i = 0; i < rows * k; i++)
        kernel_check_set(x, i, kernel_check_get(x, i) * sizes[i / k % 6]);
    return x;
}

static void products_in_fp8_are_those_of_rounded_rows_and_codes(struct kernel_check *c)
{
    static const int64_t sizes[][3] = {{1, 1, 1}, {7, 33, 40}, {40, 70, 129}, {97, 20, 1600}};
    static const float input_scales[] = {0, 0.02f};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
        for (int i = 0; i < 2; i++) {
            struct quant_matrix m = kernel_check_matrix(c, QUANT_FP8_E4M3, sizes[s][1], sizes[s][2], 7);
            m.input_scale = input_scales[i];
            m.has_fp8_products = true;
            struct quant_run run = {m, 0, m.n};
            struct tensor x = uneven_rows(c, sizes[s][0], m.k), out = kernel_check_tensor(c, c->dtype, 2, (int64_t[]){x.shape[0], m.n});
            struct kern_weight *w = kern_weight_quant(c->k, c->dtype, &run, 1);
            kern_linear(c->k, out, kernel_check_strided(c, x, 3), w);
            kernel_check_done(c->k);
            compare_fp8(c, out, x, &run);
            kern_weight_free(c->k, w);
        }
}

/* Two scales, and a run that is multiplied as ever, in one weight; and no row sees another. */
static void runs_and_rows_have_products_in_fp8_of_their_own(struct kernel_check *c)
{
    struct quant_matrix a = kernel_check_matrix(c, QUANT_FP8_E4M3, 30, 96, 1), b = kernel_check_matrix(c, QUANT_FP8_E4M3, 9, 96, 2);
    struct quant_matrix decoded = a;
    a.input_scale = 0.01f;
    a.has_fp8_products = b.has_fp8_products = true;
    struct quant_run runs[] = {{a, 10, 20}, {decoded, 0, 10}, {b, 0, 9}};
    struct tensor x = uneven_rows(c, 50, 96), out = kernel_check_tensor(c, c->dtype, 2, (int64_t[]){50, 39});
    struct tensor plain = kernel_check_tensor(c, c->dtype, 2, (int64_t[]){50, 10}), alone = kernel_check_tensor(c, c->dtype, 2, (int64_t[]){1, 39});
    struct kern_weight *w = kern_weight_quant(c->k, c->dtype, runs, 3), *part = kern_weight_quant(c->k, c->dtype, &runs[1], 1);
    kern_linear(c->k, out, x, w);
    kern_linear(c->k, plain, x, part);
    for (int64_t r = 0; r < 50; r += 7) {
        kern_linear(c->k, alone, tensor_slice(x, 0, r, 1), w);
        kernel_check_same_bits(alone, tensor_slice(out, 0, r, 1));
    }
    kernel_check_done(c->k);
    compare_fp8(c, tensor_slice(out, 1, 0, 20), x, &runs[0]);
    kernel_check_same_bits(tensor_slice(out, 1, 20, 10), plain);
    compare_fp8(c, tensor_slice(out, 1, 30, 9), x, &runs[2]);
    kern_weight_free(c->k, w);
    kern_weight_free(c->k, part);
}

/* Of every f32 exponent and around every tie; a row with a NaN is NaN, and no other. */
static void rounding_to_e4m3_is_to_the_nearest(struct kernel_check *c)
{
    struct quant_matrix one = {.format = QUANT_FP8_E4M3, .n = 1, .k = 1, .data = "\x38", .scale = 1, .input_scale = 1, .has_fp8_products = true};
    struct tensor x = kernel_check_tensor(c, c->dtype, 2, (int64_t[]){4 * 127 + 1, 1}), out = kernel_check_tensor(c, TENSOR_F32, 2, x.shape);
    for (int i = 0; i < 127; i++) {
        double low = (double)quant_f32_of_e4m3((uint8_t)i), high = i < 126 ? (double)quant_f32_of_e4m3((uint8_t)(i + 1)) : 480;
        kernel_check_set(x, 4 * i, low);
        kernel_check_set(x, 4 * i + 1, -(low + high) / 2);
        kernel_check_set(x, 4 * i + 2, low + 0.45 * (high - low));
        kernel_check_set(x, 4 * i + 3, low + 0.55 * (high - low));
    }
    kernel_check_set(x, 4 * 127, NAN);
    struct kern_weight *w = kern_weight_quant(c->k, c->dtype, &(struct quant_run){one, 0, 1}, 1);
    kern_linear(c->k, out, x, w);
    kernel_check_done(c->k);
    for (int64_t i = 0; i < 4 * 127; i++)
        if (kernel_check_get(out, i) != nearest_e4m3(kernel_check_get(x, i)))
            fail_msg("%.9g became %.9g, want %.9g", kernel_check_get(x, i), kernel_check_get(out, i), nearest_e4m3(kernel_check_get(x, i)));
    assert_true(isnan(kernel_check_get(out, 4 * 127)));
    kern_weight_free(c->k, w);
}

int main(void)
{
    static const struct kernel_check_test tests[] = {
        KERNEL_CHECK_TEST(equals_the_definition_at_every_shape),
        KERNEL_CHECK_TEST(a_weight_of_the_other_dtype_is_converted_once),
        KERNEL_CHECK_TEST(columns_of_wider_rows_are_read_and_written_in_place),
        KERNEL_CHECK_TEST(a_row_does_not_depend_on_other_rows_or_threads),
        KERNEL_CHECK_TEST(nan_and_infinity_reach_their_row_only),
        KERNEL_CHECK_TEST(a_quantised_weight_gives_the_bits_of_the_decoded_one),
        KERNEL_CHECK_TEST(widths_of_odd_blocks_and_scales_in_any_order_are_read),
        KERNEL_CHECK_TEST(runs_of_several_matrices_stand_behind_each_other),
        KERNEL_CHECK_TEST(a_kept_weight_takes_the_bytes_of_its_file),
        KERNEL_CHECK_TEST(products_in_fp8_are_those_of_rounded_rows_and_codes),
        KERNEL_CHECK_TEST(runs_and_rows_have_products_in_fp8_of_their_own),
        KERNEL_CHECK_TEST(rounding_to_e4m3_is_to_the_nearest),
        KERNEL_CHECK_TEST(no_rows_are_no_work),
    };
    return kernel_check_main(tests, sizeof tests / sizeof *tests);
}
