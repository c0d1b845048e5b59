/* test_norm.c - RMS, layer and group norms: if this breaks, activations drift from layer to layer. */
#include "kernel_check.h"

#include <math.h>

static const int64_t widths[] = {1, 3, 4, 7, 8, 15, 16, 17, 33, 128, 1000};
#define WIDTHS (sizeof widths / sizeof *widths)

/* f32 sum of `width` squares, a root and a quotient: (width + 4) U32 of the factor, then one product each. */
static void check_rms(struct kernel_check *c, struct tensor out, struct tensor x, struct tensor weight, enum kern_rounding rounding)
{
    int64_t width = weight.shape[0], count = tensor_count(x);
    double *want = kernel_check_doubles(count), *slack = kernel_check_doubles(count);
    for (int64_t r = 0; r < count / width; r++) {
        double squares = 0;
        for (int64_t i = 0; i < width; i++)
            squares += pow(kernel_check_get(x, r * width + i), 2);
        double scale = 1 / sqrt(squares / (double)width + (double)1e-6f);
        for (int64_t i = 0; i < width; i++) {
            double normed = kernel_check_get(x, r * width + i) * scale, w = kernel_check_get(weight, i);
            bool rounds = rounding == KERN_ROUND_BEFORE_WEIGHT;
            double before = rounds ? kernel_check_round(c->dtype, normed) : normed;
            want[r * width + i] = kernel_check_round(c->dtype, before * w);
            slack[r * width + i] = (double)(width + 8) * KERNEL_CHECK_U32 * fabs(normed * w) +
                                   (rounds ? kernel_check_unit(c->dtype, normed) * fabs(w) : 0);
        }
    }
    kernel_check_compare(c, out, want, slack);
}

static void rms_norm_equals_the_definition(struct kernel_check *c)
{
    for (size_t s = 0; s < WIDTHS; s++)
        for (int rounding = 0; rounding < 2; rounding++) {
            struct tensor x = kernel_check_random(c, 3, (int64_t[]){2, 5, widths[s]}, 1, 3), out = kernel_check_tensor(c, c->dtype, 3, x.shape);
            struct tensor weight = kernel_check_random(c, 1, &widths[s], 2, 2);
            kern_rms_norm(c->k, out, kernel_check_strided(c, x, 3), weight, 1e-6f, (enum kern_rounding)rounding);
            check_rms(c, out, x, weight, (enum kern_rounding)rounding);
            struct tensor in_place = kernel_check_strided(c, x, 1);
            kern_rms_norm(c->one, in_place, in_place, weight, 1e-6f, (enum kern_rounding)rounding);
            kernel_check_same_bits(in_place, out);
        }
}

/* As RMS; the mean is subtracted first, which is an error of (width + 1) U32 of the largest |x| before the division. */
static void layer_norm_modulate_equals_the_definition(struct kernel_check *c)
{
    for (size_t s = 0; s < WIDTHS; s++) {
        int64_t width = widths[s], rows = 6;
        struct tensor x = kernel_check_random(c, 2, (int64_t[]){rows, width}, 1, 3), out = kernel_check_tensor(c, c->dtype, 2, x.shape);
        struct tensor scale = kernel_check_random(c, 1, &width, 2, 1), shift = kernel_check_random(c, 1, &width, 3, 1);
        kern_layer_norm_modulate(c->k, out, kernel_check_strided(c, x, 5), scale, shift, 1e-6f);
        double *want = kernel_check_doubles(rows * width), *slack = kernel_check_doubles(rows * width);
        for (int64_t r = 0; r < rows; r++) {
            double mean = 0, squares = 0;
            for (int64_t i = 0; i < width; i++)
                mean += kernel_check_get(x, r * width + i) / (double)width;
            for (int64_t i = 0; i < width; i++)
                squares += pow(kernel_check_get(x, r * width + i) - mean, 2);
            double rstd = 1 / sqrt(squares / (double)width + (double)1e-6f);
            for (int64_t i = 0; i < width; i++) {
                int64_t at = r * width + i;
                double exact = (kernel_check_get(x, at) - mean) * rstd, normed = kernel_check_round(c->dtype, exact);
                double factor = kernel_check_round(c->dtype, 1 + kernel_check_get(scale, i));
                double product = kernel_check_round(c->dtype, factor * normed);
                want[at] = kernel_check_round(c->dtype, product + kernel_check_get(shift, i));
                double f32 = (double)(width + 8) * KERNEL_CHECK_U32 * (fabs(exact) + 3 * rstd) * fabs(factor);
                slack[at] = f32 + kernel_check_unit(c->dtype, normed) * fabs(factor) + kernel_check_unit(c->dtype, product);
            }
        }
        kernel_check_compare(c, out, want, slack);
    }
}

static void gated_add_norm_is_the_two_it_is_made_of(struct kernel_check *c)
{
    for (size_t s = 0; s < WIDTHS; s++) {
        int64_t width = widths[s], shape[3] = {2, 3, width};
        struct tensor x = kernel_check_random(c, 3, shape, 1, 3), y = kernel_check_random(c, 3, shape, 2, 2);
        struct tensor gate = kernel_check_random(c, 1, &width, 3, 1), scale = kernel_check_random(c, 1, &width, 4, 1);
        struct tensor shift = kernel_check_random(c, 1, &width, 5, 1), want = kernel_check_tensor(c, c->dtype, 3, shape);
        struct tensor sum = kernel_check_strided(c, x, 5), work = kernel_check_strided(c, y, 3);
        kern_gated_add(c->k, x, gate, y);
        kern_layer_norm_modulate(c->k, want, x, scale, shift, 1e-6f);
        kern_gated_add_norm(c->one, work, sum, gate, work, scale, shift, 1e-6f); /* as the model does */
        kernel_check_same_bits(sum, x);
        kernel_check_same_bits(work, want);
    }
}

struct picture {
    int64_t b, h, w, channels;
    int groups;
};

/* Sums are double beyond 64 pixels: at most 64 U32 of the mean square; SiLU adds a few U32. */
static void group_norm_equals_the_definition(struct kernel_check *c)
{
    static const struct picture pictures[] = {{1, 1, 1, 2, 1}, {2, 3, 5, 12, 3}, {1, 9, 9, 64, 32}, {1, 70, 61, 6, 2}, {3, 8, 9, 20, 4}};
    for (size_t s = 0; s < sizeof pictures / sizeof *pictures; s++)
        for (int silu = 0; silu < 2; silu++) {
            struct picture p = pictures[s];
            struct tensor x = kernel_check_random(c, 4, (int64_t[]){p.b, p.h, p.w, p.channels}, 1, 2), out = kernel_check_tensor(c, c->dtype, 4, x.shape);
            struct tensor weight = kernel_check_random(c, 1, &p.channels, 2, 1), bias = kernel_check_random(c, 1, &p.channels, 3, 1);
            kern_group_norm(c->k, out, x, weight, bias, p.groups, 1e-6f, silu);
            int64_t count = tensor_count(x), pixels = p.h * p.w, size = p.channels / p.groups;
            double *want = kernel_check_doubles(count), *slack = kernel_check_doubles(count);
            for (int64_t g = 0; g < p.b * p.groups; g++) {
                double sum = 0, squares = 0, n = (double)(pixels * size);
                int64_t base = g / p.groups * pixels * p.channels + g % p.groups * size;
                for (int64_t i = 0; i < pixels * size; i++)
                    sum += kernel_check_get(x, base + i / size * p.channels + i % size);
                for (int64_t i = 0; i < pixels * size; i++)
                    squares += pow(kernel_check_get(x, base + i / size * p.channels + i % size) - sum / n, 2);
                double rstd = 1 / sqrt(squares / n + (double)1e-6f);
                for (int64_t i = 0; i < pixels * size; i++) {
                    int64_t at = base + i / size * p.channels + i % size, channel = at % p.channels;
                    double w = kernel_check_get(weight, channel), v = (kernel_check_get(x, at) - sum / n) * rstd * w + kernel_check_get(bias, channel);
                    double normed = kernel_check_round(c->dtype, v);
                    want[at] = silu ? kernel_check_round(c->dtype, normed / (1 + exp(-normed))) : normed;
                    slack[at] = 80 * KERNEL_CHECK_U32 * (4 * rstd * fabs(w) * (1 + 4 * rstd * rstd) + 2) +
                                (silu ? 1.2 * kernel_check_unit(c->dtype, normed) : 0); /* SiLU is at most 1.1 steep */
                }
            }
            kernel_check_compare(c, out, want, slack);
        }
}

static void results_do_not_depend_on_rows_batch_or_threads(struct kernel_check *c)
{
    int64_t width = 515;
    struct tensor x = kernel_check_random(c, 2, (int64_t[]){200, width}, 1, 2), weight = kernel_check_random(c, 1, &width, 2, 1);
    struct tensor pictures = kernel_check_random(c, 4, (int64_t[]){3, 80, 60, 8}, 4, 2), w8 = kernel_check_random(c, 1, (int64_t[]){8}, 5, 1);
    struct tensor rms = kernel_check_tensor(c, c->dtype, 2, x.shape), layer = kernel_check_tensor(c, c->dtype, 2, x.shape);
    struct tensor group = kernel_check_tensor(c, c->dtype, 4, pictures.shape);
    struct kern *backends[] = {c->k, c->one, c->three};
    for (int i = 0; i < 3; i++) {
        struct kern *k = backends[i];
        struct tensor a = i ? kernel_check_tensor(c, c->dtype, 2, x.shape) : rms, b = i ? kernel_check_tensor(c, c->dtype, 2, x.shape) : layer;
        struct tensor g = i ? kernel_check_tensor(c, c->dtype, 4, pictures.shape) : group;
        kern_rms_norm(k, a, x, weight, 1e-6f, KERN_ROUND_ONCE);
        kern_layer_norm_modulate(k, b, x, weight, weight, 1e-6f);
        kern_group_norm(k, g, pictures, w8, w8, 2, 1e-6f, true);
        kernel_check_same_bits(a, rms);
        kernel_check_same_bits(b, layer);
        kernel_check_same_bits(g, group);
        for (int64_t r = 0; r < 200; r += 37) {
            struct tensor one = kernel_check_tensor(c, c->dtype, 2, (int64_t[]){1, width});
            kern_rms_norm(k, one, tensor_slice(x, 0, r, 1), weight, 1e-6f, KERN_ROUND_ONCE);
            kernel_check_same_bits(one, tensor_slice(rms, 0, r, 1));
            kern_layer_norm_modulate(k, one, tensor_slice(x, 0, r, 1), weight, weight, 1e-6f);
            kernel_check_same_bits(one, tensor_slice(layer, 0, r, 1));
        }
        struct tensor single = kernel_check_tensor(c, c->dtype, 4, (int64_t[]){1, 80, 60, 8});
        kern_group_norm(k, single, tensor_slice(pictures, 0, 2, 1), w8, w8, 2, 1e-6f, true);
        kernel_check_same_bits(single, tensor_slice(group, 0, 2, 1));
    }
}

static void nan_reaches_its_row_only(struct kernel_check *c)
{
    int64_t width = 20;
    struct tensor x = kernel_check_random(c, 2, (int64_t[]){3, width}, 1, 1), out = kernel_check_tensor(c, c->dtype, 2, x.shape);
    struct tensor weight = kernel_check_random(c, 1, &width, 2, 1);
    kernel_check_set(x, width + 19, NAN);
    for (int op = 0; op < 2; op++) {
        if (op)
            kern_layer_norm_modulate(c->k, out, x, weight, weight, 1e-6f);
        else
            kern_rms_norm(c->k, out, x, weight, 1e-6f, KERN_ROUND_ONCE);
        for (int64_t i = 0; i < 3 * width; i++)
            assert_int_equal(isnan(kernel_check_get(out, i)), i / width == 1);
    }
}

int main(void)
{
    static const struct kernel_check_test tests[] = {
        KERNEL_CHECK_TEST(rms_norm_equals_the_definition),
        KERNEL_CHECK_TEST(layer_norm_modulate_equals_the_definition),
        KERNEL_CHECK_TEST(gated_add_norm_is_the_two_it_is_made_of),
        KERNEL_CHECK_TEST(group_norm_equals_the_definition),
        KERNEL_CHECK_TEST(results_do_not_depend_on_rows_batch_or_threads),
        KERNEL_CHECK_TEST(nan_reaches_its_row_only),
    };
    return kernel_check_main(tests, sizeof tests / sizeof *tests);
}
