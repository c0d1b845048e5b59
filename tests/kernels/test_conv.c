/* test_conv.c - convolution: if this breaks, pictures have seams, wrong edges, or change with the batch. */
#include "kernel_check.h"

#include <math.h>

struct shape {
    int64_t b, h, w, in, out, size;
    int stride, pad, more; /* more: rows and columns of zeros at the bottom and at the right besides the padding */
};

static const struct shape shapes[] = {
    {1, 1, 1, 1, 1, 1, 1, 0, 0}, {1, 3, 3, 3, 5, 3, 1, 1, 0},    {2, 5, 7, 4, 17, 3, 1, 1, 0},  {1, 9, 8, 16, 65, 3, 2, 1, 0},
    {3, 4, 4, 7, 3, 1, 1, 0, 0}, {1, 12, 11, 8, 16, 3, 1, 0, 0}, {2, 10, 10, 60, 12, 3, 1, 1, 0}, {1, 2, 2, 5, 6, 5, 1, 2, 0},
    {2, 8, 6, 5, 16, 3, 2, 0, 1}, {1, 3, 150, 33, 34, 3, 1, 1, 0}, {1, 13, 300, 6, 5, 3, 2, 0, 1}, {1, 400, 2, 2, 3, 4, 3, 1, 0}};

/* As in linear: k + 1 f32 additions, the bias among them. */
static void compare(struct kernel_check *c, const struct shape *s, struct tensor out, struct tensor x, struct tensor w, struct tensor bias)
{
    int64_t oh = out.shape[1], ow = out.shape[2], count = tensor_count(out);
    double *want = kernel_check_doubles(count), *slack = kernel_check_doubles(count);
    for (int64_t i = 0; i < count; i++) {
        int64_t o = i % s->out, px = i / s->out % ow, py = i / s->out / ow % oh, b = i / s->out / ow / oh;
        double sum = 0, size = 0;
        for (int64_t ky = 0; ky < s->size; ky++)
            for (int64_t kx = 0; kx < s->size; kx++)
                for (int64_t n = 0; n < s->in; n++) {
                    int64_t y = py * s->stride + ky - s->pad, at = px * s->stride + kx - s->pad;
                    if (y < 0 || y >= s->h || at < 0 || at >= s->w)
                        continue;
                    double product = kernel_check_get(x, ((b * s->h + y) * s->w + at) * s->in + n) *
                                     kernel_check_get(w, ((o * s->in + n) * s->size + ky) * s->size + kx);
                    sum += product;
                    size += fabs(product);
                }
        double add = bias.data ? kernel_check_get(bias, o) : 0;
        want[i] = kernel_check_round(c->dtype, sum + add);
        slack[i] = (double)(s->size * s->size * s->in + 1) * KERNEL_CHECK_U32 * (size + fabs(add));
    }
    kernel_check_compare(c, out, want, slack);
}

static struct tensor output(struct kernel_check *c, const struct shape *s)
{
    return kernel_check_tensor(c, c->dtype, 4, (int64_t[]){s->b, (s->h + 2 * s->pad + s->more - s->size) / s->stride + 1,
                                                           (s->w + 2 * s->pad + s->more - s->size) / s->stride + 1, s->out});
}

static void equals_the_definition_at_every_shape(struct kernel_check *c)
{
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const struct shape *s = &shapes[i];
        struct tensor x = kernel_check_random(c, 4, (int64_t[]){s->b, s->h, s->w, s->in}, 1, 1);
        struct tensor w = kernel_check_random(c, 4, (int64_t[]){s->out, s->in, s->size, s->size}, 2, 1);
        struct tensor bias = i % 2 ? kernel_check_random(c, 1, (int64_t[]){s->out}, 3, 1) : (struct tensor){0};
        struct tensor out = output(c, s);
        struct kern_weight *packed = kern_weight_conv(c->k, c->dtype, w, bias);
        kern_conv2d(c->k, out, x, packed, s->stride, s->pad);
        kernel_check_done(c->k);
        compare(c, s, out, x, w, bias);
        kern_weight_free(c->k, packed);
    }
}

static void a_picture_does_not_depend_on_its_batch_or_threads(struct kernel_check *c)
{
    struct shape s = {3, 13, 9, 20, 24, 3, 1, 1, 0};
    struct tensor x = kernel_check_random(c, 4, (int64_t[]){s.b, s.h, s.w, s.in}, 1, 1);
    struct tensor w = kernel_check_random(c, 4, (int64_t[]){s.out, s.in, 3, 3}, 2, 1), all = output(c, &s);
    struct kern *backends[] = {c->k, c->one, c->three};
    for (int i = 0; i < 3; i++) {
        struct kern_weight *packed = kern_weight_conv(backends[i], c->dtype, w, (struct tensor){0});
        struct tensor out = output(c, &s);
        kern_conv2d(backends[i], i ? out : all, x, packed, 1, 1);
        if (i)
            kernel_check_same_bits(out, all);
        for (int64_t b = 0; b < s.b; b++) {
            struct tensor one = tensor_slice(out, 0, b, 1);
            kern_conv2d(backends[i], one, tensor_slice(x, 0, b, 1), packed, 1, 1);
            kernel_check_same_bits(one, tensor_slice(all, 0, b, 1));
        }
        kern_weight_free(backends[i], packed);
    }
}

static void nan_reaches_the_pixels_around_it(struct kernel_check *c)
{
    struct tensor x = kernel_check_random(c, 4, (int64_t[]){1, 6, 6, 2}, 1, 1), w = kernel_check_random(c, 4, (int64_t[]){1, 2, 3, 3}, 2, 1);
    struct tensor out = kernel_check_tensor(c, c->dtype, 4, (int64_t[]){1, 6, 6, 1});
    kernel_check_set(x, (2 * 6 + 3) * 2, NAN);
    struct kern_weight *packed = kern_weight_conv(c->k, c->dtype, w, (struct tensor){0});
    kern_conv2d(c->k, out, x, packed, 1, 1);
    for (int64_t y = 0; y < 6; y++)
        for (int64_t i = 0; i < 6; i++)
            assert_int_equal(isnan(kernel_check_get(out, y * 6 + i)), y >= 1 && y <= 3 && i >= 2 && i <= 4);
    kern_weight_free(c->k, packed);
}

int main(void)
{
    static const struct kernel_check_test tests[] = {
        KERNEL_CHECK_TEST(equals_the_definition_at_every_shape),
        KERNEL_CHECK_TEST(a_picture_does_not_depend_on_its_batch_or_threads),
        KERNEL_CHECK_TEST(nan_reaches_the_pixels_around_it),
    };
    return kernel_check_main(tests, sizeof tests / sizeof *tests);
}
