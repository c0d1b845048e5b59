/* test_rope.c - norm of heads and rotary embedding: if the layouts are mixed up, pictures are plausible noise. */
#include "kernel_check.h"

#include <math.h>

static const int64_t heads_d[][2] = {{1, 2}, {3, 4}, {2, 14}, {1, 16}, {2, 34}, {4, 128}};

/* Bit by bit kern_rms_norm before: of that result the definition turns. */
static void check(struct kernel_check *c, enum kern_rope_layout layout, enum kern_rounding rounding)
{
    enum tensor_dtype d = c->dtype;
    for (size_t s = 0; s < sizeof heads_d / sizeof *heads_d; s++) {
        int64_t heads = heads_d[s][0], width = heads_d[s][1], half = width / 2, rows = 5, batch = 2;
        struct tensor x = kernel_check_random(c, 4, (int64_t[]){batch, rows, heads, width}, 1, 2), out = kernel_check_strided(c, x, 3);
        struct tensor weight = kernel_check_random(c, 1, &width, 2, 2), normed = kernel_check_tensor(c, d, 4, x.shape);
        struct tensor cosine = kernel_check_tensor(c, TENSOR_F32, 2, (int64_t[]){rows, half}), sine = kernel_check_tensor(c, TENSOR_F32, 2, cosine.shape);
        kernel_check_fill(cosine, 5, 1);
        kernel_check_fill(sine, 6, 1);
        kern_rms_norm(c->k, normed, x, weight, 1e-6f, rounding);
        kern_rms_rope(c->k, out, x, weight, 1e-6f, rounding, cosine, sine, layout);
        int64_t count = tensor_count(x);
        double *want = kernel_check_doubles(count), *slack = kernel_check_doubles(count);
        for (int64_t i = 0; i < count; i++) {
            int64_t at = i % width, row = i / width / heads % rows;
            bool is_pairs = layout == KERN_ROPE_PAIRS, is_second = is_pairs ? at % 2 : at >= half;
            int64_t other = is_pairs ? i ^ 1 : is_second ? i - half : i + half, pair = is_pairs ? at / 2 : at % half;
            double co = kernel_check_get(cosine, row * half + pair), si = kernel_check_get(sine, row * half + pair);
            if (!is_pairs)
                co = kernel_check_round(d, co), si = kernel_check_round(d, si);
            double p = kernel_check_get(normed, i) * co, q = kernel_check_get(normed, other) * si * (is_second ? 1 : -1);
            if (!is_pairs)
                p = kernel_check_round(d, p), q = kernel_check_round(d, q);
            want[i] = kernel_check_round(d, p + q);
            slack[i] = 3 * KERNEL_CHECK_U32 * (fabs(p) + fabs(q)) + (is_pairs ? 0 : kernel_check_unit(d, p) + kernel_check_unit(d, q));
        }
        kernel_check_compare(c, out, want, slack);
        struct kern *others[] = {c->one, c->three};
        for (int t = 0; t < 2; t++) { /* threads, place in memory, a sample alone */
            struct tensor again = kernel_check_strided(c, x, 1), alone = tensor_slice(kernel_check_strided(c, x, 2), 0, 1, 1);
            kern_rms_rope(others[t], again, again, weight, 1e-6f, rounding, cosine, sine, layout);
            kern_rms_rope(others[t], alone, alone, weight, 1e-6f, rounding, cosine, sine, layout);
            kernel_check_same_bits(again, out);
            kernel_check_same_bits(alone, tensor_slice(out, 0, 1, 1));
        }
    }
}

static void halves_equal_the_definition(struct kernel_check *c)
{
    check(c, KERN_ROPE_HALVES, KERN_ROUND_BEFORE_WEIGHT);
}

static void pairs_equal_the_definition(struct kernel_check *c)
{
    check(c, KERN_ROPE_PAIRS, KERN_ROUND_ONCE);
}

int main(void)
{
    static const struct kernel_check_test tests[] = {
        KERNEL_CHECK_TEST(halves_equal_the_definition),
        KERNEL_CHECK_TEST(pairs_equal_the_definition),
    };
    return kernel_check_main(tests, sizeof tests / sizeof *tests);
}
