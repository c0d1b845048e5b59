/* kernel_check.h - what the kernel tests share: every test on every instruction set of this CPU, in f32 and bf16,
 * values that repeat, and the comparison with a definition in double precision.
 *
 * A definition rounds where kern.h says that the op rounds (kernel_check_round). Its sums are exact, those of the kernel
 * are f32, so just before a rounding the two differ by a few f32 units, and once in a while they round to neighbours.
 * Hence two demands in bf16: all values within `slack` plus one unit of bf16, and 98 of 100 equal to the bit. A
 * rounding point that is missing, or one too many, breaks the second. */
#ifndef KILN_KERNEL_CHECK_H
#define KILN_KERNEL_CHECK_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "kern.h"
#include "kern_cpu.h"

#define KERNEL_CHECK_U32 0x1p-24 /* largest relative error of one f32 operation */

struct kernel_check {
    const char *isa;
    enum tensor_dtype dtype;
    struct kern *k; /* two threads */
    struct kern *one, *three;
    void **memory;
    size_t memory_count;
};

/* kernel_check_main runs the tests and returns the exit code. Sets that this CPU lacks are skipped with a message. */
struct kernel_check_test {
    const char *name;
    void (*run)(struct kernel_check *c);
};
#define KERNEL_CHECK_TEST(f) {#f, f}
int kernel_check_main(const struct kernel_check_test *tests, size_t count);

/* Memory of exactly this size, so that the sanitizer sees a step beyond; freed after the test. Filled with 0xff: NaN. */
struct tensor kernel_check_tensor(struct kernel_check *c, enum tensor_dtype dtype, int rank, const int64_t *shape);
/* The same values in a tensor whose rows are `gap` elements further apart and begin at an odd place. */
struct tensor kernel_check_strided(struct kernel_check *c, struct tensor t, int64_t gap);
void kernel_check_fill(struct tensor t, uint32_t seed, double scale); /* uniform in +-scale */
struct tensor kernel_check_random(struct kernel_check *c, int rank, const int64_t *shape, uint32_t seed, double scale);

/* A matrix of random blocks, all finite; scales are swizzled where a format has them beside. */
struct quant_matrix kernel_check_matrix(struct kernel_check *c, enum quant_format format, int64_t n, int64_t k, uint32_t seed);

double kernel_check_get(struct tensor t, int64_t i); /* element i in row-major order, whatever the strides */
void kernel_check_set(struct tensor t, int64_t i, double value);
double kernel_check_round(enum tensor_dtype dtype, double x);
double kernel_check_unit(enum tensor_dtype dtype, double x); /* distance to the next value of this size */

/* got[i] must be within slack[i] plus one unit of want[i], which is already rounded. Frees both. */
void kernel_check_compare(struct kernel_check *c, struct tensor got, double *want, double *slack);
double *kernel_check_doubles(int64_t count);
void kernel_check_same_bits(struct tensor a, struct tensor b);
void kernel_check_done(struct kern *k); /* kern_sync says that nothing failed */

#endif
