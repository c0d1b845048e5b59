/* test_attention.c - attention: if this breaks, prompts leak into each other, padding is read, or images change with
 * the batch. */
#include "kernel_check.h"

#include <math.h>
#include <stdlib.h>

struct shape {
    int64_t b, rows, keys, heads, kv_heads, d;
    bool causal, counted;
    double scale; /* of q */
};

static const struct shape shapes[] = {
    {1, 1, 1, 1, 1, 1, false, false, 1},     {1, 1, 300, 2, 1, 16, false, false, 1}, {2, 7, 7, 4, 2, 24, true, false, 1},
    {1, 97, 255, 1, 1, 64, false, false, 3}, {2, 33, 257, 6, 3, 40, false, true, 2}, {2, 40, 40, 4, 1, 7, true, true, 2},
    {1, 20, 520, 2, 2, 128, false, false, 1}, {1, 300, 300, 2, 1, 32, true, false, 1}, {1, 9, 4, 2, 2, 8, true, false, 1},
    {1, 70, 700, 1, 1, 128, false, false, 1}};

static const int32_t counts[] = {3, 1000}; /* of sample 0 and 1; the second is beyond its keys */

static bool is_visible(const struct shape *s, int64_t b, int64_t row, int64_t key)
{
    return (!s->causal || key <= row) && (!s->counted || key < counts[b]);
}

/* Let e be the error of a score: d f32 products. A probability is then off by a factor within 1 +- (2 e + 8 U32), the
 * exponential being good to 4 U32; the sums over keys add U32 each; in bf16 each probability was rounded (2^-8 of
 * itself at most). All of that relative to sum p |v|. In bf16 the rounding of the probabilities is not in the definition, so equal
 * bits are not asked for: the result is compared in f32's terms. */
static void compare(struct kernel_check *c, const struct shape *s, struct tensor out, struct tensor q, struct tensor key, struct tensor value,
                    float scale)
{
    double *p = kernel_check_doubles(s->keys);
    for (int64_t i = 0; i < s->b * s->rows * s->heads; i++) {
        int64_t head = i % s->heads, row = i / s->heads % s->rows, b = i / s->heads / s->rows;
        int64_t kv = head / (s->heads / s->kv_heads);
        double top = -INFINITY, total = 0, e = 0;
        for (int64_t j = 0; j < s->keys; j++) {
            double score = 0, size = 0;
            for (int64_t t = 0; t < s->d; t++) {
                double product = kernel_check_get(q, i * s->d + t) * kernel_check_get(key, ((b * s->keys + j) * s->kv_heads + kv) * s->d + t);
                score += product;
                size += fabs(product);
            }
            p[j] = is_visible(s, b, row, j) ? score * (double)scale : -INFINITY;
            top = fmax(top, p[j]);
            e = fmax(e, (double)(s->d + 2) * KERNEL_CHECK_U32 * size * (double)scale);
        }
        for (int64_t j = 0; j < s->keys; j++)
            total += p[j] = exp(p[j] - top);
        for (int64_t t = 0; t < s->d; t++) {
            double want = 0, size = 0;
            for (int64_t j = 0; j < s->keys; j++) {
                double v = kernel_check_get(value, ((b * s->keys + j) * s->kv_heads + kv) * s->d + t);
                want += p[j] / total * v;
                size += p[j] / total * fabs(v);
            }
            double rounding = c->dtype == TENSOR_BF16 ? 0x1p-8 : 0, got = kernel_check_get(out, i * s->d + t);
            double bound = (4 * e + (double)(2 * s->keys + 16) * KERNEL_CHECK_U32 + rounding) * size + kernel_check_unit(c->dtype, want);
            if (!(fabs(got - want) <= bound))
                fail_msg("row %lld head %lld [%lld]: %.9g, want %.9g +- %.3g", (long long)row, (long long)head, (long long)t, got, want, bound);
        }
    }
    free(p);
}

static void equals_the_definition_at_every_shape_and_mask(struct kernel_check *c)
{
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const struct shape *s = &shapes[i];
        struct tensor q = kernel_check_random(c, 4, (int64_t[]){s->b, s->rows, s->heads, s->d}, 1, s->scale);
        struct tensor key = kernel_check_random(c, 4, (int64_t[]){s->b, s->keys, s->kv_heads, s->d}, 2, 1);
        struct tensor value = kernel_check_random(c, 4, (int64_t[]){s->b, s->keys, s->kv_heads, s->d}, 3, 1);
        struct tensor out = kernel_check_tensor(c, c->dtype, 4, q.shape);
        float scale = 1.0f / sqrtf((float)s->d);
        kern_attention(c->k, out, q, key, value, scale, (struct kern_mask){s->causal, s->counted ? counts : NULL});
        kernel_check_done(c->k);
        compare(c, s, out, q, key, value, scale);
    }
}

/* The maximum of a row may be followed late, not lost: scores rise by less than one block after another, and in all by more
 * than an exponential can hold. */
static void a_maximum_that_creeps_up_is_followed(struct kernel_check *c)
{
    struct shape s = {1, 3, 1400, 1, 1, 8, false, false, 1};
    struct tensor q = kernel_check_tensor(c, c->dtype, 4, (int64_t[]){1, s.rows, 1, s.d});
    struct tensor key = kernel_check_random(c, 4, (int64_t[]){1, s.keys, 1, s.d}, 2, 0.1);
    struct tensor value = kernel_check_random(c, 4, (int64_t[]){1, s.keys, 1, s.d}, 3, 1), out = kernel_check_tensor(c, c->dtype, 4, q.shape);
    for (int64_t i = 0; i < s.rows * s.d; i++)
        kernel_check_set(q, i, (double)(i / s.d)); /* a row that is flat, one that creeps, one that rises twice as fast */
    for (int64_t i = 0; i < s.keys; i++)
        kernel_check_set(key, i * s.d, (double)i / 16);
    kern_attention(c->k, out, q, key, value, 1, (struct kern_mask){0});
    kernel_check_done(c->k);
    compare(c, &s, out, q, key, value, 1);
}

/* q, k and v as columns of one projection, the result into columns of a wider row: views, not copies. */
static void heads_inside_wider_rows_give_the_same_bits(struct kernel_check *c)
{
    int64_t rows = 50, heads = 3, d = 16, wide = heads * d;
    struct tensor all = kernel_check_random(c, 3, (int64_t[]){2, rows, 3 * wide + 5}, 1, 1), part[3], dense[3];
    for (int i = 0; i < 3; i++) {
        part[i] = tensor_split(tensor_slice(all, 2, i * wide, wide), d);
        dense[i] = kernel_check_tensor(c, c->dtype, 4, part[i].shape);
        kern_copy(c->k, dense[i], part[i]);
    }
    struct tensor out = kernel_check_tensor(c, c->dtype, 4, part[0].shape);
    struct tensor into = tensor_split(tensor_slice(kernel_check_tensor(c, c->dtype, 3, (int64_t[]){2, rows, wide + 9}), 2, 4, wide), d);
    kern_attention(c->k, out, dense[0], dense[1], dense[2], 0.25f, (struct kern_mask){0});
    kern_attention(c->k, into, part[0], part[1], part[2], 0.25f, (struct kern_mask){0});
    kernel_check_same_bits(into, out);
}

static void a_row_does_not_depend_on_other_rows_batch_or_threads(struct kernel_check *c)
{
    int64_t rows = 130, keys = 270, heads = 2, d = 32;
    struct tensor q = kernel_check_random(c, 4, (int64_t[]){2, rows, heads, d}, 1, 2);
    struct tensor key = kernel_check_random(c, 4, (int64_t[]){2, keys, 1, d}, 2, 1), value = kernel_check_random(c, 4, key.shape, 3, 1);
    struct tensor all = kernel_check_tensor(c, c->dtype, 4, q.shape);
    struct kern *backends[] = {c->k, c->one, c->three};
    for (int i = 0; i < 3; i++) {
        struct tensor out = kernel_check_tensor(c, c->dtype, 4, q.shape);
        kern_attention(backends[i], i ? out : all, q, key, value, 0.2f, (struct kern_mask){0});
        if (i)
            kernel_check_same_bits(out, all);
        for (int64_t r = 0; r < rows; r += 43) {
            struct tensor one = kernel_check_tensor(c, c->dtype, 4, (int64_t[]){1, 1, heads, d});
            kern_attention(backends[i], one, tensor_slice(tensor_slice(q, 0, 1, 1), 1, r, 1), tensor_slice(key, 0, 1, 1),
                           tensor_slice(value, 0, 1, 1), 0.2f, (struct kern_mask){0});
            kernel_check_same_bits(one, tensor_slice(tensor_slice(all, 0, 1, 1), 1, r, 1));
        }
    }
}

/* Padding tokens have keys and values of their own; whatever they are, nothing of them may show. */
static void hidden_keys_are_not_read(struct kernel_check *c)
{
    int64_t keys = 300, seen = 270;
    struct tensor q = kernel_check_random(c, 4, (int64_t[]){1, 10, 2, 16}, 1, 1);
    struct tensor key = kernel_check_random(c, 4, (int64_t[]){1, keys, 2, 16}, 2, 1), value = kernel_check_random(c, 4, key.shape, 3, 1);
    struct tensor a = kernel_check_tensor(c, c->dtype, 4, q.shape), b = kernel_check_tensor(c, c->dtype, 4, q.shape);
    struct kern_mask mask = {.key_count = (int32_t[]){(int32_t)seen}};
    kern_attention(c->k, a, q, key, value, 1, mask);
    kernel_check_fill(tensor_slice(key, 1, seen, keys - seen), 9, 1e30);
    kernel_check_fill(tensor_slice(value, 1, seen, keys - seen), 10, 1e30);
    kern_attention(c->k, b, q, key, value, 1, mask);
    kernel_check_same_bits(a, b);
    mask.key_count = (int32_t[]){0};
    kern_attention(c->k, b, q, key, value, 1, mask);
    for (int64_t i = 0; i < tensor_count(b); i++)
        assert_true(kernel_check_get(b, i) == 0); /* nothing to see: zero, not 0 / 0 */
}

static void huge_scores_do_not_overflow(struct kernel_check *c)
{
    int64_t keys = 40;
    struct tensor q = kernel_check_tensor(c, c->dtype, 4, (int64_t[]){1, 1, 1, 4}), key = kernel_check_tensor(c, c->dtype, 4, (int64_t[]){1, keys, 1, 4});
    struct tensor value = kernel_check_random(c, 4, (int64_t[]){1, keys, 1, 4}, 3, 1), out = kernel_check_tensor(c, c->dtype, 4, q.shape);
    for (int64_t i = 0; i < 4; i++)
        kernel_check_set(q, i, 1e6);
    for (int64_t i = 0; i < keys * 4; i++)
        kernel_check_set(key, i, i / 4 == 17 ? 1e6 : -1e6);
    kern_attention(c->k, out, q, key, value, 1, (struct kern_mask){0});
    for (int64_t t = 0; t < 4; t++) /* one key outweighs all */
        assert_true(kernel_check_get(out, t) == kernel_check_get(value, 17 * 4 + t));
}

static void nan_reaches_its_row_only(struct kernel_check *c)
{
    struct tensor q = kernel_check_random(c, 4, (int64_t[]){1, 8, 1, 16}, 1, 1), key = kernel_check_random(c, 4, (int64_t[]){1, 20, 1, 16}, 2, 1);
    struct tensor value = kernel_check_random(c, 4, key.shape, 3, 1), good = kernel_check_tensor(c, c->dtype, 4, q.shape);
    struct tensor bad = kernel_check_tensor(c, c->dtype, 4, q.shape);
    kern_attention(c->k, good, q, key, value, 1, (struct kern_mask){0});
    kernel_check_set(q, 3 * 16 + 5, NAN);
    kern_attention(c->k, bad, q, key, value, 1, (struct kern_mask){0});
    for (int64_t r = 0; r < 8; r++)
        if (r != 3)
            kernel_check_same_bits(tensor_slice(bad, 1, r, 1), tensor_slice(good, 1, r, 1));
        else
            for (int64_t t = 0; t < 16; t++)
                assert_true(isnan(kernel_check_get(bad, r * 16 + t)));
}

int main(void)
{
    static const struct kernel_check_test tests[] = {
        KERNEL_CHECK_TEST(equals_the_definition_at_every_shape_and_mask),
        KERNEL_CHECK_TEST(a_maximum_that_creeps_up_is_followed),
        KERNEL_CHECK_TEST(heads_inside_wider_rows_give_the_same_bits),
        KERNEL_CHECK_TEST(a_row_does_not_depend_on_other_rows_batch_or_threads),
        KERNEL_CHECK_TEST(hidden_keys_are_not_read),
        KERNEL_CHECK_TEST(huge_scores_do_not_overflow),
        KERNEL_CHECK_TEST(nan_reaches_its_row_only),
    };
    return kernel_check_main(tests, sizeof tests / sizeof *tests);
}
