/* kern_cpu.c - the CPU backend: which instruction set, the threads, the arena.
 *
 * Threads: one op is one cpu_for. The caller works too; helpers spin briefly for the next op (ops follow each
 * other within microseconds) and then sleep. Indexes are handed out by an atomic counter.
 *
 * Arena: one large reservation of address space with a bump pointer; pages become real when first touched and
 * stay, so the second pass over a shape allocates nothing. */
#include "kern_cpu.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu.h"
#include "cpu_table.h"

#if defined(__x86_64__)
#include <asm/prctl.h>
#include <cpuid.h>
#ifndef ARCH_REQ_XCOMP_PERM
#define ARCH_REQ_XCOMP_PERM 0x1023
#endif
#endif

#define THREADS_MAX 256
#define SPIN_COUNT 2000
#define ALIGN 64
#define HUGE_PAGE (2u << 20)

struct scratch {
    void *data;
    size_t bytes;
};

struct cpu {
    struct kern kern;
    const struct kern_ops *table; /* of the chosen instruction set */
    struct kern_ops ops;          /* the same, with life cycle and memory added */
    int threads;
    pthread_t helper[THREADS_MAX];
    struct scratch scratch[THREADS_MAX];

    pthread_mutex_t lock;
    pthread_cond_t wake, idle;
    atomic_uint round;  /* grows with each cpu_for */
    bool is_closing;
    cpu_task task;
    void *context;
    int64_t count;
    atomic_llong next;
    int busy; /* helpers still in this round; under the lock */

    char *arena;
    size_t arena_bytes, used, peak, weight_bytes;
};

/* --- threads ------------------------------------------------------------------------------------ */

struct helper_start {
    struct cpu *c;
    int thread;
};

static void work(struct cpu *c, int thread)
{
    for (;;) {
        int64_t i = atomic_fetch_add_explicit(&c->next, 1, memory_order_relaxed);
        if (i >= c->count)
            return;
        kern_ops_beat(&c->kern);
        c->task(c->context, i, thread);
    }
}

static void *helper_main(void *argument)
{
    struct helper_start start = *(struct helper_start *)argument;
    free(argument);
    struct cpu *c = start.c;
    unsigned seen = 0;
    for (;;) {
        for (int spin = 0; spin < SPIN_COUNT && atomic_load(&c->round) == seen; spin++)
            cpu_pause();
        pthread_mutex_lock(&c->lock);
        while (atomic_load(&c->round) == seen && !c->is_closing)
            pthread_cond_wait(&c->wake, &c->lock);
        seen = atomic_load(&c->round);
        bool is_closing = c->is_closing;
        pthread_mutex_unlock(&c->lock);
        if (is_closing)
            return NULL;
        work(c, start.thread);
        pthread_mutex_lock(&c->lock);
        if (--c->busy == 0)
            pthread_cond_signal(&c->idle);
        pthread_mutex_unlock(&c->lock);
    }
}

void cpu_for(struct kern *k, int64_t count, cpu_task fn, void *context)
{
    struct cpu *c = (struct cpu *)k;
    if (count <= 1 || c->threads == 1) {
        for (int64_t i = 0; i < count; i++) {
            kern_ops_beat(k);
            fn(context, i, 0);
        }
        return;
    }
    pthread_mutex_lock(&c->lock);
    c->task = fn, c->context = context, c->count = count;
    c->busy = c->threads - 1;
    atomic_store(&c->next, 0);
    atomic_fetch_add(&c->round, 1);
    pthread_cond_broadcast(&c->wake);
    pthread_mutex_unlock(&c->lock);
    work(c, 0);
    pthread_mutex_lock(&c->lock);
    while (c->busy)
        pthread_cond_wait(&c->idle, &c->lock);
    pthread_mutex_unlock(&c->lock);
}

int cpu_threads(const struct kern *k)
{
    return ((const struct cpu *)k)->threads;
}

#define RANGE_ELEMENTS 32768 /* a range smaller than this is not worth waking a thread for */

struct ranges {
    cpu_range fn;
    void *context;
    int64_t rows, step;
};

static void run_range(void *context, int64_t index, int thread)
{
    (void)thread;
    const struct ranges *r = context;
    int64_t first = index * r->step, end = first + r->step < r->rows ? first + r->step : r->rows;
    r->fn(r->context, first, end);
}

void cpu_rows(struct kern *k, int64_t rows, int64_t width, cpu_range fn, void *context)
{
    if (rows <= 0)
        return;
    int64_t step = (RANGE_ELEMENTS + width - 1) / width;
    struct ranges r = {fn, context, rows, step};
    cpu_for(k, (rows + step - 1) / step, run_range, &r);
}

void *cpu_scratch(struct kern *k, int thread, size_t bytes)
{
    struct cpu *c = (struct cpu *)k;
    struct scratch *s = &c->scratch[thread];
    if (s->bytes >= bytes)
        return s->data;
    free(s->data);
    s->bytes = (bytes + bytes / 4 + ALIGN - 1) & ~(size_t)(ALIGN - 1);
    s->data = aligned_alloc(ALIGN, s->bytes);
    if (!s->data) {
        s->bytes = 0;
        pthread_mutex_lock(&c->lock);
        kern_ops_fail(k, "no memory for %zu bytes of scratch", bytes);
        pthread_mutex_unlock(&c->lock);
    }
    return s->data;
}

void *cpu_alloc(size_t bytes)
{
    if (bytes < HUGE_PAGE)
        return aligned_alloc(ALIGN, (bytes + ALIGN - 1) & ~(size_t)(ALIGN - 1));
    size_t whole = (bytes + HUGE_PAGE - 1) & ~(size_t)(HUGE_PAGE - 1);
    void *data = aligned_alloc(HUGE_PAGE, whole);
    if (data)
        madvise(data, whole, MADV_HUGEPAGE);
    return data;
}

void cpu_free(void *data, size_t bytes)
{
    (void)bytes;
    free(data);
}

/* --- memory --------------------------------------------------------------------------------------- */

static bool arena_open(struct cpu *c)
{
    long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    c->arena_bytes = (size_t)pages * (size_t)page;
    while (c->arena_bytes >= (64u << 20)) {
        void *p = mmap(NULL, c->arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p != MAP_FAILED) {
            madvise(p, c->arena_bytes, MADV_HUGEPAGE);
            c->arena = p;
            return true;
        }
        c->arena_bytes /= 2;
    }
    return false;
}

static struct tensor cpu_temp(struct kern *k, enum tensor_dtype dtype, int rank, const int64_t *shape)
{
    struct cpu *c = (struct cpu *)k;
    struct tensor t = tensor_of(NULL, dtype, rank, shape);
    size_t bytes = (tensor_bytes(t) + ALIGN - 1) & ~(size_t)(ALIGN - 1);
    if (bytes > c->arena_bytes - c->used) {
        kern_ops_fail(k, "no memory: %zu bytes more than the arena of %zu bytes has left", bytes, c->arena_bytes);
        return t;
    }
    t.data = c->arena + c->used;
    c->used += bytes;
    if (c->used > c->peak)
        c->peak = c->used;
    return t;
}

static size_t cpu_mark(struct kern *k)
{
    return ((struct cpu *)k)->used;
}

static void cpu_rewind(struct kern *k, size_t mark)
{
    ((struct cpu *)k)->used = mark;
}

static size_t cpu_peak_bytes(const struct kern *k)
{
    const struct cpu *c = (const struct cpu *)k;
    return c->peak + c->weight_bytes;
}

/* --- life ------------------------------------------------------------------------------------------- */

struct isa {
    const char *name;
    const struct kern_ops *table;
    bool is_here;
};

#if defined(__x86_64__)
/* Asked of the processor (leaf 7, edx: 22 amx-bf16, 24 amx-tile), as not every compiler's __builtin_cpu_supports knows the names;
 * and of the kernel, which keeps AMX's registers (8 KiB a thread) only for a process that has asked. */
static bool amx_is_here(void)
{
    const unsigned wanted = 1u << 22 | 1u << 24;
    const int tile_data = 18;
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & wanted) == wanted && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, tile_data) == 0;
}
#endif

static int isa_list(struct isa *ret)
{
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool amx = bf16 && amx_is_here();
    ret[n++] = (struct isa){"amx", &cpu_table_amx, amx};
    ret[n++] = (struct isa){"avx512_bf16", &cpu_table_avx512_bf16, bf16};
    ret[n++] = (struct isa){"avx512", &cpu_table_avx512, avx512};
    ret[n++] = (struct isa){"avx2", &cpu_table_avx2, avx2};
#endif
    ret[n++] = (struct isa){"portable", &cpu_table_portable, true};
    return n;
}

static bool isa_choose(struct isa *ret, const char *wanted, char *why, size_t why_bytes)
{
    struct isa list[5];
    int count = isa_list(list);
    for (int i = 0; i < count; i++) {
        if (wanted && *wanted ? strcmp(wanted, list[i].name) != 0 : !list[i].is_here)
            continue;
        *ret = list[i];
        if (!list[i].is_here)
            snprintf(why, why_bytes, "this CPU has no %s", wanted);
        return list[i].is_here;
    }
    snprintf(why, why_bytes, "instruction set '%s' is not one of amx, avx512_bf16, avx512, avx2, portable", wanted);
    return false;
}

static bool cpu_sync(struct kern *k)
{
    return !k->failed; /* every op has ended when it returns */
}

static void cpu_weight_free(struct kern *k, struct kern_weight *w)
{
    ((struct cpu *)k)->weight_bytes -= w->bytes;
    cpu_free(w->data, w->bytes);
    free(w->runs);
    free(w->bias);
    free(w);
}

static struct tensor cpu_upload(struct kern *k, enum tensor_dtype dtype, struct tensor host)
{
    struct cpu *c = (struct cpu *)k;
    struct tensor t = tensor_of(NULL, dtype, host.rank, host.shape);
    t.data = cpu_alloc(tensor_bytes(t));
    if (!t.data) {
        kern_ops_fail(k, "no memory for %zu bytes of a model", tensor_bytes(t));
        return t;
    }
    c->weight_bytes += tensor_bytes(t);
    c->table->copy(k, t, host);
    return t;
}

static void cpu_release(struct kern *k, struct tensor t)
{
    ((struct cpu *)k)->weight_bytes -= tensor_bytes(t);
    cpu_free(t.data, tensor_bytes(t));
}

static struct kern_weight *counted(struct cpu *c, struct kern_weight *made)
{
    c->weight_bytes += made ? made->bytes : 0;
    return made;
}

static struct kern_weight *cpu_weight(struct kern *k, enum tensor_dtype dtype, struct tensor w, struct tensor bias)
{
    struct cpu *c = (struct cpu *)k;
    return counted(c, c->table->weight(k, dtype, w, bias));
}

static struct kern_weight *cpu_weight_quant(struct kern *k, enum tensor_dtype dtype, const struct quant_run *runs, int count)
{
    struct cpu *c = (struct cpu *)k;
    return counted(c, c->table->weight_quant(k, dtype, runs, count));
}

static void cpu_close(struct kern *k)
{
    struct cpu *c = (struct cpu *)k;
    pthread_mutex_lock(&c->lock);
    c->is_closing = true;
    pthread_cond_broadcast(&c->wake);
    pthread_mutex_unlock(&c->lock);
    for (int i = 1; i < c->threads; i++)
        pthread_join(c->helper[i], NULL);
    for (int i = 0; i < THREADS_MAX; i++)
        free(c->scratch[i].data);
    if (c->arena)
        munmap(c->arena, c->arena_bytes);
    pthread_cond_destroy(&c->wake);
    pthread_cond_destroy(&c->idle);
    pthread_mutex_destroy(&c->lock);
    free(c);
}

static int threads_here(void)
{
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : (int)sysconf(_SC_NPROCESSORS_ONLN);
}

struct kern *kern_cpu_open(const struct kern_cpu_options *options, char *why, size_t why_bytes)
{
    int threads = options->threads ? options->threads : threads_here();
    if (threads < 1 || threads > THREADS_MAX) {
        snprintf(why, why_bytes, "threads: %d, accepted: 1 to %d", threads, THREADS_MAX);
        return NULL;
    }
    const char *wanted = options->isa ? options->isa : getenv("KILN_ISA");
    struct isa isa;
    if (!isa_choose(&isa, wanted, why, why_bytes))
        return NULL;
    struct cpu *c = calloc(1, sizeof *c);
    if (!c || !arena_open(c)) {
        snprintf(why, why_bytes, "no memory for the CPU backend");
        free(c);
        return NULL;
    }
    c->table = isa.table;
    c->ops = *isa.table;
    c->ops.close = cpu_close, c->ops.sync = cpu_sync, c->ops.temp = cpu_temp, c->ops.mark = cpu_mark;
    c->ops.rewind = cpu_rewind, c->ops.peak_bytes = cpu_peak_bytes;
    c->ops.weight = cpu_weight, c->ops.weight_quant = cpu_weight_quant, c->ops.weight_free = cpu_weight_free;
    c->ops.write = c->ops.read = isa.table->copy, c->ops.upload = cpu_upload, c->ops.release = cpu_release;
    c->kern.ops = &c->ops;
    kern_ops_member(&c->kern, &options->member);
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->wake, NULL);
    pthread_cond_init(&c->idle, NULL);
    c->threads = 1;
    for (int i = 1; i < threads; i++) {
        struct helper_start *start = malloc(sizeof *start);
        if (start)
            *start = (struct helper_start){c, i};
        if (!start || pthread_create(&c->helper[i], NULL, helper_main, start) != 0) {
            snprintf(why, why_bytes, "could start %d of %d threads", i, threads);
            free(start);
            cpu_close(&c->kern);
            return NULL;
        }
        c->threads++;
    }
    snprintf(c->kern.name, sizeof c->kern.name, "cpu %s, %d thread%s", isa.name, threads, threads == 1 ? "" : "s");
    return &c->kern;
}
