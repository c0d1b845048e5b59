/* test_resample.c - time sinusoid, unpatchify and patchify, upsampling, pixels: if this breaks, pictures are shuffled or banded. */
#include "kernel_check.h"

#include <math.h>

/* The angle is an f32 product of t and an f32 exponential (8 U32 of itself, up to 1000); cos and sin are no steeper than 1. */
static void timestep_embedding_equals_the_definition(struct kernel_check *c)
{
    static const float times[] = {0, 1, 249.75f, 1000};
    for (int s = 0; s < 4; s++) {
        struct tensor out = kernel_check_tensor(c, c->dtype, 2, (int64_t[]){1, 256});
        kern_timestep_embedding(c->k, out, times[s]);
        double *want = kernel_check_doubles(256), *slack = kernel_check_doubles(256);
        for (int64_t i = 0; i < 128; i++) {
            double angle = (double)times[s] * exp(-log(10000) * (double)i / 128);
            want[i] = kernel_check_round(c->dtype, cos(angle));
            want[128 + i] = kernel_check_round(c->dtype, sin(angle));
            slack[i] = slack[128 + i] = (8 + 4 * log(10000)) * KERNEL_CHECK_U32 * (angle + 1);
        }
        kernel_check_compare(c, out, want, slack);
    }
}

static void unpatchify_puts_every_value_where_it_belongs(struct kernel_check *c)
{
    int64_t b = 2, h = 3, w = 5, channels = 3, wide = 4 * channels;
    struct tensor tokens = kernel_check_random(c, 3, (int64_t[]){b, h * w, wide}, 1, 2), out = kernel_check_tensor(c, c->dtype, 4, (int64_t[]){b, 2 * h, 2 * w, channels});
    struct tensor mean = kernel_check_random(c, 1, &wide, 2, 1), std = kernel_check_random(c, 1, &wide, 3, 1);
    kern_unpatchify(c->k, out, tokens, mean, std);
    int64_t count = tensor_count(out);
    double *want = kernel_check_doubles(count), *slack = kernel_check_doubles(count);
    for (int64_t i = 0; i < count; i++) {
        int64_t ch = i % channels, x = i / channels % (2 * w), y = i / channels / (2 * w) % (2 * h), s = i / channels / (4 * w * h);
        int64_t from = 4 * ch + 2 * (y % 2) + x % 2;
        double product = kernel_check_get(tokens, (s * h * w + y / 2 * w + x / 2) * wide + from) * kernel_check_get(std, from);
        double rounded = kernel_check_round(c->dtype, product);
        want[i] = kernel_check_round(c->dtype, rounded + kernel_check_get(mean, from));
        slack[i] = kernel_check_unit(c->dtype, product);
    }
    kernel_check_compare(c, out, want, slack);
}

/* x is the lower half of the channels of a wider picture, as the encoder's means are. */
static void patchify_puts_every_value_where_it_belongs(struct kernel_check *c)
{
    int64_t b = 2, h = 3, w = 5, channels = 3, wide = 4 * channels;
    struct tensor all = kernel_check_random(c, 4, (int64_t[]){b, 2 * h, 2 * w, 2 * channels}, 1, 2);
    struct tensor x = tensor_slice(all, 3, 0, channels), tokens = kernel_check_tensor(c, c->dtype, 3, (int64_t[]){b, h * w, wide});
    struct tensor mean = kernel_check_random(c, 1, &wide, 2, 1), std = kernel_check_random(c, 1, &wide, 3, 1);
    for (int64_t i = 0; i < wide; i++)
        kernel_check_set(std, i, 1.5 + 0.25 * (double)i);
    kern_patchify(c->k, tokens, x, mean, std);
    int64_t count = tensor_count(tokens);
    double *want = kernel_check_doubles(count), *slack = kernel_check_doubles(count);
    for (int64_t i = 0; i < count; i++) {
        int64_t channel = i % wide, column = i / wide % w, row = i / wide / w % h, s = i / wide / w / h;
        int64_t py = 2 * row + channel / 2 % 2, px = 2 * column + channel % 2;
        double value = kernel_check_get(all, ((s * 2 * h + py) * 2 * w + px) * 2 * channels + channel / 4);
        double difference = kernel_check_round(c->dtype, value - kernel_check_get(mean, channel));
        want[i] = kernel_check_round(c->dtype, difference / kernel_check_get(std, channel));
        slack[i] = kernel_check_unit(c->dtype, want[i]);
    }
    kernel_check_compare(c, tokens, want, slack);
}

static void upsampling_repeats_each_pixel_four_times(struct kernel_check *c)
{
    struct tensor x = kernel_check_random(c, 4, (int64_t[]){2, 3, 4, 5}, 1, 1), out = kernel_check_tensor(c, c->dtype, 4, (int64_t[]){2, 6, 8, 5});
    kern_upsample2(c->k, out, x);
    for (int64_t i = 0; i < tensor_count(out); i++) {
        int64_t ch = i % 5, at = i / 5 % 8, y = i / 40 % 6, b = i / 240;
        assert_true(kernel_check_get(out, i) == kernel_check_get(x, ((b * 3 + y / 2) * 4 + at / 2) * 5 + ch));
    }
}

/* All of it is exact but the roundings, so it must be equal: no tolerance. */
static void pixels_round_and_stop_at_black_and_white(struct kernel_check *c)
{
    struct tensor x = kernel_check_random(c, 4, (int64_t[]){1, 20, 20, 3}, 1, 1.3), out = kernel_check_tensor(c, TENSOR_U8, 4, x.shape);
    static const double ends[] = {-1, 1, -1e30, 1e30, 0, 0x1p-30, INFINITY, -INFINITY};
    for (int i = 0; i < 8; i++)
        kernel_check_set(x, i, ends[i]);
    kern_pixels(c->k, out, x);
    for (int64_t i = 0; i < tensor_count(x); i++) {
        double v = kernel_check_round(c->dtype, kernel_check_round(c->dtype, 0.5 * kernel_check_get(x, i)) + 0.5);
        double level = nearbyint((double)((float)fmin(fmax(v, 0), 1) * 255.0f));
        /* f32: with FMA the sum is one rounding, without two; the level may differ where 255 v is a tie */
        assert_true(fabs(kernel_check_get(out, i) - level) <= (c->dtype == TENSOR_F32 && fabs(fabs(v * 255 - floor(v * 255)) - 0.5) < 1e-4));
    }
    assert_int_equal(kernel_check_get(out, 3), 255);
    assert_int_equal(kernel_check_get(out, 7), 0);
}

int main(void)
{
    static const struct kernel_check_test tests[] = {
        KERNEL_CHECK_TEST(timestep_embedding_equals_the_definition),
        KERNEL_CHECK_TEST(unpatchify_puts_every_value_where_it_belongs),
        KERNEL_CHECK_TEST(patchify_puts_every_value_where_it_belongs),
        KERNEL_CHECK_TEST(upsampling_repeats_each_pixel_four_times),
        KERNEL_CHECK_TEST(pixels_round_and_stop_at_black_and_white),
    };
    return kernel_check_main(tests, sizeof tests / sizeof *tests);
}
