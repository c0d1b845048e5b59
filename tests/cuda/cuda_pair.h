/* cuda_pair.h - the same op on the CPU (portable, the definition) and on the CUDA module, and how far apart they may be.
 * For tests. The module is what KILN_CUDA_MODULE names: the simulator's, or nvcc's on a machine with a GPU. */
#ifndef KILN_CUDA_PAIR_H
#define KILN_CUDA_PAIR_H

#include "kern.h"

/* Sanitizers judge accesses, which do not depend on a tensor's size or on how often an op runs: their builds run each op
 * once on the device, large shapes only dense, and long products shorter. Every kernel and every variant still runs. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CUDA_PAIR_IS_SANITIZED 1
#else
#define CUDA_PAIR_IS_SANITIZED 0
#endif

struct cuda_pair {
    struct kern *cpu, *cuda;
};

/* cuda_pair_setup, cuda_pair_teardown: cmocka group fixtures; the state is a struct cuda_pair. */
int cuda_pair_setup(void **state);
int cuda_pair_teardown(void **state);

/* What makes inputs: the same numbers for both backends. A tensor is [.., width] whose rows lie `gap` elements further
 * apart than they are wide and begin `gap` elements into memory: 0 is dense, 8 keeps 16 bytes, 3 breaks every alignment. */
struct cuda_pair_maker {
    struct kern *k;
    enum tensor_dtype dtype;
    int64_t gap;
    uint32_t seed;
};
struct tensor cuda_pair_tensor(struct cuda_pair_maker *m, int rank, const int64_t *shape, float scale); /* random */
struct tensor cuda_pair_space(struct cuda_pair_maker *m, int rank, const int64_t *shape);               /* NaN */
float cuda_pair_random(uint32_t *seed); /* -1 .. 1 */

/* An op with everything it needs; returns its result. */
typedef struct tensor (*cuda_pair_op)(struct cuda_pair_maker *m, const void *shape);

/* cuda_pair_agree runs op on both backends, on the device twice (sanitized: once). It fails the test where |cuda - cpu| >
 * absolute + relative * |cpu|, where more than a share of all values (and one) differs at all, or where the second run
 * differs. */
struct cuda_pair_bound {
    float absolute, relative, share;
};
void cuda_pair_agree(const struct cuda_pair *p, const char *name, cuda_pair_op op, const void *shape, enum tensor_dtype dtype,
                     int64_t gap, struct cuda_pair_bound bound);

/* cuda_pair_floats: all values of a backend's tensor, malloc'ed. */
float *cuda_pair_floats(struct kern *k, struct tensor t);

#endif
