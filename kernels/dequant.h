/* dequant.h - rows of a quantised matrix as numbers, one function per instruction set (CPU_ISA); see cpu.h. Outside the
 * op files it is the portable one. */
#ifndef KILN_DEQUANT_H
#define KILN_DEQUANT_H

#include "quant.h"

#ifndef CPU_ISA
#define CPU_ISA portable
#endif
#include "cpu.h"

/* dequant_rows: values [first, first + count) of rows [row, row + rows), whole blocks of them, as f32 or bf16 rounded to
 * nearest even. Row i of the result begins at element i * stride of `to`. */
void CPU_NAME(dequant_rows)(void *to, enum tensor_dtype dtype, int64_t stride, const struct quant_matrix *m, int64_t row,
                            int64_t rows, int64_t first, int64_t count);

#endif
