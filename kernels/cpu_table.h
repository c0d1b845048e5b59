/* cpu_table.h - the op tables the CPU backend chooses from; life cycle and memory slots are filled by kern_cpu.c. */
#ifndef KILN_CPU_TABLE_H
#define KILN_CPU_TABLE_H

#include "kern_ops.h"

extern const struct kern_ops cpu_table_portable;
#if defined(__x86_64__)
extern const struct kern_ops cpu_table_avx2, cpu_table_avx512, cpu_table_avx512_bf16, cpu_table_amx;
#endif

#endif
