/* test_elementwise.c - ops on one element at a time: if a rounding point moves, bf16 pictures leave diffusers. */
#include "kernel_check.h"

#include <math.h>

#define ROWS 5
static const int64_t widths[] = {1, 3, 4, 5, 8, 15, 16, 17, 31, 100};
#define WIDTHS (sizeof widths / sizeof *widths)

struct args {
    double a, b, gate, scalar;
};

struct answer {
    double want, slack;
};

typedef void (*apply)(struct kern *k, struct tensor out, struct tensor a, struct tensor b, struct tensor gate, float scalar);
typedef struct answer (*define)(enum tensor_dtype d, struct args v);

static double r(enum tensor_dtype d, double x)
{
    return kernel_check_round(d, x);
}

/* SiLU in f32: the exponential within 4 U32, a sum and a quotient. Below -88 it is smaller than any normal number. */
static double silu(double x)
{
    return x / (1 + exp(-x));
}

#define SILU_ERROR(x) (8 * KERNEL_CHECK_U32 * fabs(silu(x)) + 0x1p-120)

static struct answer define_silu(enum tensor_dtype d, struct args v)
{
    return (struct answer){r(d, silu(v.a)), SILU_ERROR(v.a)};
}

static struct answer define_silu_mul(enum tensor_dtype d, struct args v)
{
    double s = r(d, silu(v.a));
    return (struct answer){r(d, s * v.b), (SILU_ERROR(v.a) + kernel_check_unit(d, s)) * fabs(v.b)};
}

static struct answer define_add(enum tensor_dtype d, struct args v)
{
    return (struct answer){r(d, v.a + v.b), 0};
}

static struct answer define_gated_add(enum tensor_dtype d, struct args v)
{
    double p = r(d, v.gate * v.b);
    return (struct answer){r(d, v.a + p), kernel_check_unit(d, p)};
}

static struct answer define_guide(enum tensor_dtype d, struct args v)
{
    double difference = r(d, v.a - v.b), p = r(d, v.scalar * difference);
    return (struct answer){r(d, v.b + p), kernel_check_unit(d, p) + fabs(v.scalar) * kernel_check_unit(d, difference)};
}

static struct answer define_euler(enum tensor_dtype d, struct args v)
{
    double p = r(d, r(d, v.scalar) * v.b);
    return (struct answer){r(d, v.a + p), kernel_check_unit(d, p)};
}

static struct answer define_add_scaled(enum tensor_dtype d, struct args v)
{
    double p = r(d, v.scalar * v.b);
    return (struct answer){r(d, v.a + p), kernel_check_unit(d, p)};
}

static void apply_silu(struct kern *k, struct tensor out, struct tensor a, struct tensor b, struct tensor gate, float scalar)
{
    (void)b, (void)gate, (void)scalar;
    kern_silu(k, out, a);
}

static void apply_silu_mul(struct kern *k, struct tensor out, struct tensor a, struct tensor b, struct tensor gate, float scalar)
{
    (void)gate, (void)scalar;
    kern_silu_mul(k, out, a, b);
}

static void apply_add(struct kern *k, struct tensor out, struct tensor a, struct tensor b, struct tensor gate, float scalar)
{
    (void)gate, (void)scalar;
    kern_add(k, out, a, b);
}

static void apply_gated_add(struct kern *k, struct tensor out, struct tensor a, struct tensor b, struct tensor gate, float scalar)
{
    (void)scalar;
    kern_copy(k, out, a);
    kern_gated_add(k, out, gate, b);
}

static void apply_guide(struct kern *k, struct tensor out, struct tensor a, struct tensor b, struct tensor gate, float scalar)
{
    (void)gate;
    kern_guide(k, out, a, b, scalar);
}

static void apply_euler(struct kern *k, struct tensor out, struct tensor a, struct tensor b, struct tensor gate, float scalar)
{
    (void)gate;
    kern_copy(k, out, a);
    kern_euler(k, out, b, scalar);
}

static void apply_add_scaled(struct kern *k, struct tensor out, struct tensor a, struct tensor b, struct tensor gate, float scalar)
{
    (void)gate;
    kern_copy(k, out, a);
    kern_add_scaled(k, out, b, scalar);
}

static const struct {
    apply apply;
    define define;
} ops[] = {{apply_silu, define_silu},           {apply_silu_mul, define_silu_mul}, {apply_add, define_add},
           {apply_gated_add, define_gated_add}, {apply_guide, define_guide},       {apply_euler, define_euler},
           {apply_add_scaled, define_add_scaled}};
#define OPS (sizeof ops / sizeof *ops)

static void every_op_equals_its_definition(struct kernel_check *c)
{
    const float scalar = -0.3719f;
    for (size_t o = 0; o < OPS; o++)
        for (size_t s = 0; s < WIDTHS; s++) {
            int64_t width = widths[s], count = ROWS * width;
            struct tensor a = kernel_check_random(c, 2, (int64_t[]){ROWS, width}, 1, 4), b = kernel_check_random(c, 2, a.shape, 2, 4);
            struct tensor gate = kernel_check_random(c, 1, &width, 3, 2), out = kernel_check_tensor(c, c->dtype, 2, a.shape);
            ops[o].apply(c->k, out, kernel_check_strided(c, a, 3), kernel_check_strided(c, b, 2), gate, scalar);
            double *want = kernel_check_doubles(count), *slack = kernel_check_doubles(count);
            for (int64_t i = 0; i < count; i++) {
                struct args v = {kernel_check_get(a, i), kernel_check_get(b, i), kernel_check_get(gate, i % width), (double)scalar};
                struct answer answer = ops[o].define(c->dtype, v);
                want[i] = answer.want, slack[i] = answer.slack + 2 * KERNEL_CHECK_U32 * (fabs(v.a) + 4 * fabs(v.b));
            }
            kernel_check_compare(c, out, want, slack);
        }
}

static void a_mixture_takes_each_row_s_share(struct kernel_check *c)
{
    for (size_t s = 0; s < WIDTHS; s++) {
        int64_t width = widths[s], count = ROWS * width;
        struct tensor a = kernel_check_random(c, 2, (int64_t[]){ROWS, width}, 1, 4), b = kernel_check_random(c, 2, a.shape, 2, 4);
        struct tensor share = kernel_check_random(c, 1, (int64_t[]){ROWS}, 3, 1), out = kernel_check_tensor(c, c->dtype, 2, a.shape);
        double *want = kernel_check_doubles(count), *slack = kernel_check_doubles(count);
        kernel_check_set(share, 0, 0);
        kernel_check_set(share, 1, 1);
        kern_mix(c->k, out, kernel_check_strided(c, a, 3), kernel_check_strided(c, b, 2), share);
        for (int64_t i = 0; i < count; i++) {
            double m = kernel_check_get(share, i / width), x = kernel_check_get(a, i), y = kernel_check_get(b, i);
            double first = r(c->dtype, r(c->dtype, 1 - m) * x), second = r(c->dtype, m * y);
            want[i] = r(c->dtype, first + second);
            slack[i] = kernel_check_unit(c->dtype, first) + kernel_check_unit(c->dtype, second) + 4 * KERNEL_CHECK_U32 * (fabs(x) + fabs(y));
            if (i < 2 * width) /* no share, all of it: exact */
                assert_true(kernel_check_get(out, i) == (i < width ? x : y));
        }
        kernel_check_compare(c, out, want, slack);
    }
}

static void rows_threads_and_places_do_not_change_a_bit(struct kernel_check *c)
{
    for (size_t o = 0; o < OPS; o++) {
        int64_t width = 999;
        struct tensor a = kernel_check_random(c, 2, (int64_t[]){101, width}, 1, 4), b = kernel_check_random(c, 2, a.shape, 2, 4);
        struct tensor gate = kernel_check_random(c, 1, &width, 3, 2), all = kernel_check_tensor(c, c->dtype, 2, a.shape);
        ops[o].apply(c->k, all, a, b, gate, 0.7f);
        struct kern *backends[] = {c->one, c->three};
        for (int i = 0; i < 2; i++) {
            struct tensor out = kernel_check_strided(c, a, 1), in_place = kernel_check_strided(c, a, 3);
            ops[o].apply(backends[i], out, a, b, gate, 0.7f);
            kernel_check_same_bits(out, all);
            ops[o].apply(backends[i], in_place, in_place, b, gate, 0.7f); /* out may be an input */
            kernel_check_same_bits(in_place, all);
            struct tensor one = kernel_check_tensor(c, c->dtype, 2, (int64_t[]){1, width});
            ops[o].apply(backends[i], one, tensor_slice(a, 0, 57, 1), tensor_slice(b, 0, 57, 1), gate, 0.7f);
            kernel_check_same_bits(one, tensor_slice(all, 0, 57, 1));
        }
    }
}

static void silu_of_large_values_is_x_or_zero(struct kernel_check *c)
{
    static const double values[] = {100, -100, 1e30, -1e30, 0, -0.0, 88.5, -88.5, -87};
    struct tensor x = kernel_check_tensor(c, c->dtype, 1, (int64_t[]){9}), out = kernel_check_tensor(c, c->dtype, 1, x.shape);
    for (int i = 0; i < 9; i++)
        kernel_check_set(x, i, values[i]);
    kern_silu(c->k, out, x);
    for (int i = 0; i < 9; i++) {
        double v = kernel_check_get(x, i), got = kernel_check_get(out, i);
        /* e^x stops at e^88.38, so below -88 the quotient is |x| 2^-127.5 at least: no picture sees it */
        assert_true(fabs(got - (v > 0 ? v : 0)) <= kernel_check_unit(c->dtype, v) * (v > 0) + fabs(v) * 0x1p-125);
    }
}

static void nan_and_infinity_go_through_and_are_found(struct kernel_check *c)
{
    int64_t width = 37;
    struct tensor a = kernel_check_random(c, 2, (int64_t[]){ROWS, width}, 1, 4), b = kernel_check_random(c, 2, a.shape, 2, 4);
    struct tensor gate = kernel_check_random(c, 1, &width, 3, 2), out = kernel_check_tensor(c, c->dtype, 2, a.shape);
    assert_false(kern_has_nan(c->k, a));
    static const double bad[] = {NAN, INFINITY, -INFINITY};
    for (int v = 0; v < 3; v++)
        for (int64_t at = 0; at < ROWS * width; at += 41) {
            double keep = kernel_check_get(a, at);
            kernel_check_set(a, at, bad[v]);
            assert_true(kern_has_nan(c->k, a));
            for (size_t o = 0; o < OPS; o++) {
                ops[o].apply(c->k, out, a, b, gate, 0.5f);
                for (int64_t i = 0; i < ROWS * width; i++)
                    assert_int_equal(!isfinite(kernel_check_get(out, i)), i == at);
            }
            kernel_check_set(a, at, keep);
        }
    struct tensor empty = kernel_check_tensor(c, c->dtype, 2, (int64_t[]){0, 4});
    assert_false(kern_has_nan(c->k, empty));
}

/* Halfway cases go to the even neighbour; NaN stays NaN, the largest values become infinite. */
static void copies_convert_to_the_nearest(struct kernel_check *c)
{
    static const double values[] = {1, 1.00390625, 1.01171875, 1.00390637, -1.00390625, 3.4e38, -3.4e38, 0x1p-133, 0x1p-149, 0.1};
    int64_t width = 10;
    struct tensor wide = kernel_check_tensor(c, TENSOR_F32, 1, &width), half = kernel_check_tensor(c, TENSOR_BF16, 1, &width);
    struct tensor back = kernel_check_tensor(c, TENSOR_F32, 1, &width);
    for (int64_t i = 0; i < width; i++)
        kernel_check_set(wide, i, values[i]);
    kern_write(c->k, half, wide);
    kern_read(c->k, back, half);
    for (int64_t i = 0; i < width; i++) {
        double rounded = kernel_check_round(TENSOR_BF16, kernel_check_get(wide, i));
        double want = fabs(rounded) > 0x1.fep127 ? copysign(INFINITY, rounded) : rounded;
        assert_true(kernel_check_get(half, i) == want);
        assert_true(kernel_check_get(back, i) == want);
    }
    kernel_check_set(wide, 3, NAN);
    kern_copy(c->k, half, wide);
    assert_true(isnan(kernel_check_get(half, 3)));
}

static void copies_move_any_strides(struct kernel_check *c)
{
    struct tensor x = kernel_check_random(c, 4, (int64_t[]){2, 3, 5, 7}, 1, 1), far = kernel_check_strided(c, x, 4);
    struct tensor middle = tensor_slice(kernel_check_strided(c, x, 2), 1, 1, 2), out = kernel_check_tensor(c, c->dtype, 4, x.shape);
    kern_copy(c->k, out, far);
    kernel_check_same_bits(out, x);
    struct tensor part = kernel_check_tensor(c, c->dtype, 4, middle.shape);
    kern_copy(c->k, part, middle);
    kernel_check_same_bits(part, tensor_slice(x, 1, 1, 2));
}

int main(void)
{
    static const struct kernel_check_test tests[] = {
        KERNEL_CHECK_TEST(every_op_equals_its_definition),
        KERNEL_CHECK_TEST(a_mixture_takes_each_row_s_share),
        KERNEL_CHECK_TEST(rows_threads_and_places_do_not_change_a_bit),
        KERNEL_CHECK_TEST(silu_of_large_values_is_x_or_zero),
        KERNEL_CHECK_TEST(nan_and_infinity_go_through_and_are_found),
        KERNEL_CHECK_TEST(copies_convert_to_the_nearest),
        KERNEL_CHECK_TEST(copies_move_any_strides),
    };
    return kernel_check_main(tests, sizeof tests / sizeof *tests);
}
