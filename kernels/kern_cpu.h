/* kern_cpu.h - the CPU backend: portable C (the definition), AVX2+FMA, AVX-512, AVX512_BF16, AMX, chosen at run time. */
#ifndef KILN_KERN_CPU_H
#define KILN_KERN_CPU_H

#include "kern.h"
#include "kern_team.h"

struct kern_cpu_options {
    int threads;     /* 0: all cores this process may use */
    const char *isa; /* NULL: best the CPU has; else "portable", "avx2", "avx512", "avx512_bf16", "amx" (also from
                        the environment variable KILN_ISA); one the CPU lacks is refused */
    struct kern_member member; /* in a team */
};

/* kern_cpu_open starts the threads. NULL on failure, then why (a sentence, at most why_bytes) says what. */
struct kern *kern_cpu_open(const struct kern_cpu_options *options, char *why, size_t why_bytes);

#endif
