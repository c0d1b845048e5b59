/* cpu.h - inside the CPU backend: its threads, scratch memory, and the name a function has per instruction set.
 *
 * The op files (elementwise.c, norm.c, ...) are written once, with 16-wide vector types, and compiled once per
 * instruction set; CPU_ISA is the suffix of this compilation. The portable one is the definition, the others
 * are the same source in wider registers. kern_cpu.c picks a table when the backend opens. */
#ifndef KILN_CPU_H
#define KILN_CPU_H

#include "kern_ops.h"

#define CPU_JOIN2(a, b) a##_##b
#define CPU_JOIN(a, b) CPU_JOIN2(a, b)
#define CPU_NAME(name) CPU_JOIN(name, CPU_ISA)

/* cpu_for runs fn(context, index, thread) for every index < count on all threads and returns when all are
 * done. Which thread gets which index varies; results must not depend on it. */
typedef void (*cpu_task)(void *context, int64_t index, int thread);
void cpu_for(struct kern *k, int64_t count, cpu_task fn, void *context);

int cpu_threads(const struct kern *k);

/* cpu_rows splits `rows` rows of `width` elements into ranges and runs fn on them; small work stays on the caller. */
typedef void (*cpu_range)(void *context, int64_t first, int64_t end);
void cpu_rows(struct kern *k, int64_t rows, int64_t width, cpu_range fn, void *context);

/* cpu_scratch is memory of one thread, 64-byte aligned, valid until the thread asks again; NULL after kern_ops_fail. */
void *cpu_scratch(struct kern *k, int thread, size_t bytes);
/* cpu_alloc and cpu_free are for weights: aligned, on huge pages when large. */
void *cpu_alloc(size_t bytes);
void cpu_free(void *data, size_t bytes);

/* cpu_pause tells the core that this is a loop that waits, where it has a word for that. */
static inline void cpu_pause(void)
{
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
}

static inline int64_t cpu_least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* cpu_row is the address of row r (all leading axes counted together) of a tensor with any outer strides. */
static inline void *cpu_row(struct tensor t, int64_t r)
{
    int64_t offset = 0;
    for (int a = t.rank - 2; a >= 0; a--) {
        offset += r % t.shape[a] * t.stride[a];
        r /= t.shape[a];
    }
    return (char *)t.data + (size_t)offset * tensor_dtype_bytes(t.dtype);
}

#endif
