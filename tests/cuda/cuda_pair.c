/* cuda_pair.c - see cuda_pair.h. */
#include "cuda_pair.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>

#include <cmocka.h>

#include "kern_cpu.h"
#include "kern_module.h"

int cuda_pair_setup(void **state)
{
    struct cuda_pair *p = calloc(1, sizeof *p);
    char why[512] = "";
    p->cpu = kern_cpu_open(&(struct kern_cpu_options){.threads = 1, .isa = "portable"}, why, sizeof why);
    p->cuda = p->cpu ? kern_module_open("cuda", NULL, why, sizeof why) : NULL;
    if (!p->cuda) {
        print_error("%s\n", why);
        kern_close(p->cpu);
        free(p);
        return -1;
    }
    *state = p;
    return 0;
}

int cuda_pair_teardown(void **state)
{
    struct cuda_pair *p = *state;
    if (!p)
        return 0; /* what could not be set up */
    kern_close(p->cuda);
    kern_close(p->cpu);
    free(p);
    return 0;
}

float cuda_pair_random(uint32_t *seed)
{
    *seed = *seed * 1664525u + 1013904223u;
    return (float)(int32_t)(*seed & 0xffffff00u) * 0x1p-31f;
}

struct tensor cuda_pair_space(struct cuda_pair_maker *m, int rank, const int64_t *shape)
{
    int64_t wide[TENSOR_RANK_MAX];
    for (int a = 0; a < rank; a++)
        wide[a] = shape[a];
    wide[rank - 1] += 2 * m->gap;
    struct tensor t = kern_temp(m->k, m->dtype, rank, wide);
    int64_t count = tensor_count(t);
    float *fill = malloc((size_t)count * sizeof *fill);
    for (int64_t i = 0; i < count; i++)
        fill[i] = NAN; /* whoever reads what was not written is seen */
    kern_write(m->k, t, tensor_of(fill, TENSOR_F32, rank, wide));
    free(fill);
    return tensor_slice(t, rank - 1, m->gap, shape[rank - 1]);
}

struct tensor cuda_pair_tensor(struct cuda_pair_maker *m, int rank, const int64_t *shape, float scale)
{
    struct tensor t = cuda_pair_space(m, rank, shape);
    int64_t count = tensor_count(t);
    float *values = malloc((size_t)(count + 1) * sizeof *values);
    for (int64_t i = 0; i < count; i++)
        values[i] = scale * cuda_pair_random(&m->seed);
    kern_write(m->k, t, tensor_of(values, TENSOR_F32, rank, shape));
    free(values);
    return t;
}

float *cuda_pair_floats(struct kern *k, struct tensor t)
{
    int64_t count = tensor_count(t);
    float *values = malloc((size_t)(count + 1) * sizeof *values);
    if (t.dtype == TENSOR_U8) {
        uint8_t *bytes = malloc((size_t)count + 1);
        kern_read(k, tensor_of(bytes, TENSOR_U8, t.rank, t.shape), t);
        for (int64_t i = 0; i < count; i++)
            values[i] = bytes[i];
        free(bytes);
        return values;
    }
    kern_read(k, tensor_of(values, TENSOR_F32, t.rank, t.shape), t);
    return values;
}

static float *run(struct kern *k, cuda_pair_op op, const void *shape, enum tensor_dtype dtype, int64_t gap, int64_t *ret_count)
{
    size_t mark = kern_mark(k);
    struct cuda_pair_maker m = {.k = k, .dtype = dtype, .gap = gap, .seed = 12345};
    struct tensor out = op(&m, shape);
    float *values = cuda_pair_floats(k, out);
    *ret_count = tensor_count(out);
    if (!kern_sync(k))
        fail_msg("%s: %s", kern_name(k), kern_error(k));
    kern_rewind(k, mark);
    return values;
}

void cuda_pair_agree(const struct cuda_pair *p, const char *name, cuda_pair_op op, const void *shape, enum tensor_dtype dtype,
                     int64_t gap, struct cuda_pair_bound bound)
{
    int64_t count, again;
    float *want = run(p->cpu, op, shape, dtype, gap, &count), *got = run(p->cuda, op, shape, dtype, gap, &count);
    float *second = CUDA_PAIR_IS_SANITIZED ? NULL : run(p->cuda, op, shape, dtype, gap, &again);
    double worst = 0;
    int64_t other = 0;
    for (int64_t i = 0; i < count; i++) {
        double difference = fabs((double)got[i] - (double)want[i]);
        double allowed = (double)bound.absolute + (double)bound.relative * fabs((double)want[i]);
        worst = difference > 0 ? fmax(worst, difference / allowed) : worst;
        other += difference > 0;
        if (!(difference <= allowed))
            fail_msg("%s %s, gap %lld: value %lld is %g, on the CPU %g; allowed %g", name, tensor_dtype_name(dtype),
                     (long long)gap, (long long)i, (double)got[i], (double)want[i], allowed);
        if (second && got[i] != second[i])
            fail_msg("%s %s: value %lld is %.9g, the second time %.9g", name, tensor_dtype_name(dtype), (long long)i,
                     (double)got[i], (double)second[i]);
    }
    print_message("%-28s %-5s gap %lld  %8lld values, %lld differ, at most %.2f of what is allowed\n", name,
                  tensor_dtype_name(dtype), (long long)gap, (long long)count, (long long)other, worst);
    if ((double)other > (double)bound.share * (double)count + 1)
        fail_msg("%s %s, gap %lld: %lld of %lld values differ, accepted: %g of them", name, tensor_dtype_name(dtype),
                 (long long)gap, (long long)other, (long long)count, (double)bound.share);
    free(want);
    free(got);
    free(second);
}
