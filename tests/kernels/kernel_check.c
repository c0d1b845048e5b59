/* kernel_check.c - see kernel_check.h. */
#include "kernel_check.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int set_up(void **state)
{
    struct kernel_check *c = *state;
    char why[256];
    c->k = kern_cpu_open(&(struct kern_cpu_options){.threads = 2, .isa = c->isa}, why, sizeof why);
    c->one = kern_cpu_open(&(struct kern_cpu_options){.threads = 1, .isa = c->isa}, why, sizeof why);
    c->three = kern_cpu_open(&(struct kern_cpu_options){.threads = 3, .isa = c->isa}, why, sizeof why);
    bool is_here = c->k && c->one && c->three;
    if (!is_here && !strstr(why, "this CPU has no")) {
        fprintf(stderr, "%s\n", why);
        return -1;
    }
    return 0;
}

static int tear_down(void **state)
{
    struct kernel_check *c = *state;
    kern_close(c->k);
    kern_close(c->one);
    kern_close(c->three);
    for (size_t i = 0; i < c->memory_count; i++)
        free(c->memory[i]);
    free(c->memory);
    *c = (struct kernel_check){.isa = c->isa, .dtype = c->dtype};
    return 0;
}

struct named {
    struct kernel_check check; /* first: the state is both */
    const struct kernel_check_test *test;
    char name[160];
};

static void run_named(void **state)
{
    struct named *n = *state;
    if (!n->check.k) {
        print_message("this CPU has no %s: not tested here\n", n->check.isa);
        skip();
    }
    n->test->run(&n->check);
}

int kernel_check_main(const struct kernel_check_test *tests, size_t count)
{
    static const char *const sets[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
    static const enum tensor_dtype dtypes[] = {TENSOR_F32, TENSOR_BF16};
    size_t set_count = 1, total = 0;
#if defined(__x86_64__)
    set_count = sizeof sets / sizeof *sets;
#endif
    struct named *named = calloc(count * set_count * 2, sizeof *named);
    struct CMUnitTest *list = calloc(count * set_count * 2, sizeof *list);
    for (size_t s = 0; s < set_count; s++)
        for (size_t d = 0; d < 2; d++)
            for (size_t t = 0; t < count; t++, total++) {
                struct named *n = &named[total];
                *n = (struct named){.check = {.isa = sets[s], .dtype = dtypes[d]}, .test = &tests[t]};
                snprintf(n->name, sizeof n->name, "%s (%s, %s)", tests[t].name, sets[s], tensor_dtype_name(dtypes[d]));
                list[total] = (struct CMUnitTest){n->name, run_named, set_up, tear_down, n};
            }
    int failed = _cmocka_run_group_tests("kernels", list, total, NULL, NULL);
    free(list);
    free(named);
    return failed;
}

struct tensor kernel_check_tensor(struct kernel_check *c, enum tensor_dtype dtype, int rank, const int64_t *shape)
{
    struct tensor t = tensor_of(NULL, dtype, rank, shape);
    size_t bytes = tensor_bytes(t);
    c->memory = realloc(c->memory, (c->memory_count + 1) * sizeof *c->memory);
    assert_non_null(c->memory);
    t.data = c->memory[c->memory_count++] = malloc(bytes ? bytes : 1);
    assert_non_null(t.data);
    memset(t.data, 0xff, bytes);
    return t;
}

struct tensor kernel_check_strided(struct kernel_check *c, struct tensor t, int64_t gap)
{
    int64_t width = t.shape[t.rank - 1], wide[TENSOR_RANK_MAX];
    memcpy(wide, t.shape, sizeof wide);
    wide[t.rank - 1] = width + gap;
    struct tensor whole = kernel_check_tensor(c, t.dtype, t.rank, wide);
    struct tensor part = tensor_slice(whole, t.rank - 1, gap > 1 ? 1 : 0, width);
    for (int64_t i = 0; i < tensor_count(t); i++)
        kernel_check_set(part, i, kernel_check_get(t, i));
    return part;
}

void kernel_check_fill(struct tensor t, uint32_t seed, double scale)
{
    uint32_t state = seed * 2654435761u + 12345u;
    for (int64_t i = 0; i < tensor_count(t); i++) {
        state = state * 1664525u + 1013904223u;
        kernel_check_set(t, i, scale * (double)(int32_t)state / 2147483648.0);
    }
}

struct tensor kernel_check_random(struct kernel_check *c, int rank, const int64_t *shape, uint32_t seed, double scale)
{
    struct tensor t = kernel_check_tensor(c, c->dtype, rank, shape);
    kernel_check_fill(t, seed, scale);
    return t;
}

static void fill_bytes(uint8_t *to, size_t bytes, uint32_t *state)
{
    for (size_t i = 0; i < bytes; i++) {
        *state = *state * 1664525u + 1013904223u;
        to[i] = (uint8_t)(*state >> 24);
    }
}

struct quant_matrix kernel_check_matrix(struct kernel_check *c, enum quant_format format, int64_t n, int64_t k, uint32_t seed)
{
    const struct quant_traits *info = quant_info(format);
    struct quant_matrix m = {.format = format, .n = n, .k = k, .scale = 0.37f, .is_swizzled = true}, block = m;
    size_t bytes, scales;
    assert_true(quant_bytes(&bytes, format, n, k));
    if (!quant_block_scale_bytes(&scales, &m))
        scales = 0;
    uint8_t *data = kernel_check_tensor(c, TENSOR_U8, 1, (int64_t[]){(int64_t)bytes}).data;
    uint8_t *block_scales = kernel_check_tensor(c, TENSOR_U8, 1, (int64_t[]){(int64_t)scales}).data;
    fill_bytes(block_scales, scales, &seed);
    for (size_t i = 0; i < scales; i++)
        block_scales[i] &= (block_scales[i] & 0x7f) == 0x7f ? 0x80 : 0xff;
    m.data = data, m.block_scales = block.block_scales = block_scales;
    block.n = 1, block.k = info->values;
    for (size_t at = 0; at < bytes; at += (size_t)info->bytes) /* a scale that is no number: once more */
        do {
            block.data = data + at;
            fill_bytes(data + at, (size_t)info->bytes, &seed);
        } while (!quant_is_finite(&block, 0, 1));
    return m;
}

static void *address(struct tensor t, int64_t i)
{
    int64_t offset = 0;
    for (int a = t.rank - 1; a >= 0; a--) {
        offset += i % t.shape[a] * t.stride[a];
        i /= t.shape[a];
    }
    return (char *)t.data + (size_t)offset * tensor_dtype_bytes(t.dtype);
}

double kernel_check_get(struct tensor t, int64_t i)
{
    const void *p = address(t, i);
    float f;
    uint16_t h;
    switch (t.dtype) {
    case TENSOR_F32:
        return memcpy(&f, p, 4), (double)f;
    case TENSOR_BF16:
        return memcpy(&h, p, 2), (double)tensor_f32_of(h);
    case TENSOR_I32:
        return *(const int32_t *)p;
    case TENSOR_U8:
        return *(const uint8_t *)p;
    }
    return NAN;
}

void kernel_check_set(struct tensor t, int64_t i, double value)
{
    float f = (float)value;
    uint16_t h = tensor_bf16_of(f);
    memcpy(address(t, i), t.dtype == TENSOR_BF16 ? (void *)&h : (void *)&f, tensor_dtype_bytes(t.dtype));
}

double kernel_check_unit(enum tensor_dtype dtype, double x)
{
    int bits = dtype == TENSOR_BF16 ? 8 : 24, exponent;
    frexp(x, &exponent);
    return ldexp(1.0, (exponent > -125 ? exponent : -125) - bits);
}

double kernel_check_round(enum tensor_dtype dtype, double x)
{
    if (!isfinite(x))
        return x;
    double unit = kernel_check_unit(dtype, x);
    return nearbyint(x / unit) * unit; /* ties to even */
}

double *kernel_check_doubles(int64_t count)
{
    double *d = calloc((size_t)count + 1, sizeof *d);
    assert_non_null(d);
    return d;
}

void kernel_check_compare(struct kernel_check *c, struct tensor got, double *want, double *slack)
{
    int64_t count = tensor_count(got), unequal = 0;
    double worst = 0;
    for (int64_t i = 0; i < count; i++) {
        double v = kernel_check_get(got, i), bound = slack[i] + kernel_check_unit(got.dtype, want[i]);
        if (isnan(want[i]) && isnan(v))
            continue;
        if (v == want[i])
            continue;
        unequal++;
        if (!(fabs(v - want[i]) <= bound))
            fail_msg("element %lld of %lld: %.9g, the definition says %.9g +- %.3g (%s)", (long long)i, (long long)count, v,
                     want[i], bound, c->isa);
        worst = fmax(worst, fabs(v - want[i]) / bound);
    }
    if (got.dtype == TENSOR_BF16 && unequal > 2 + count / 50)
        fail_msg("%lld of %lld values differ from the definition (worst at %.2f of the bound): a rounding is missing or too "
                 "many (%s)", (long long)unequal, (long long)count, worst, c->isa);
    free(want);
    free(slack);
}

void kernel_check_same_bits(struct tensor a, struct tensor b)
{
    assert_true(tensor_same_shape(a, b));
    assert_int_equal(a.dtype, b.dtype);
    for (int64_t i = 0; i < tensor_count(a); i++)
        if (memcmp(address(a, i), address(b, i), tensor_dtype_bytes(a.dtype)) != 0)
            fail_msg("element %lld: %.9g and %.9g", (long long)i, kernel_check_get(a, i), kernel_check_get(b, i));
}

void kernel_check_done(struct kern *k)
{
    if (!kern_sync(k))
        fail_msg("%s", kern_error(k));
}
