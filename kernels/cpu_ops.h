/* cpu_ops.h - the CPU functions behind the op table, one set per instruction set (CPU_ISA); see cpu.h.
 * Their contracts are those of kern.h. */
#ifndef KILN_CPU_OPS_H
#define KILN_CPU_OPS_H

#include "cpu.h"

void CPU_NAME(elementwise_copy)(struct kern *k, struct tensor out, struct tensor x);
void CPU_NAME(elementwise_silu)(struct kern *k, struct tensor out, struct tensor x);
void CPU_NAME(elementwise_silu_mul)(struct kern *k, struct tensor out, struct tensor gate, struct tensor up);
void CPU_NAME(elementwise_add)(struct kern *k, struct tensor out, struct tensor a, struct tensor b);
void CPU_NAME(elementwise_gated_add)(struct kern *k, struct tensor x, struct tensor gate, struct tensor y);
void CPU_NAME(elementwise_guide)(struct kern *k, struct tensor out, struct tensor c, struct tensor u, float g);
void CPU_NAME(elementwise_add_scaled)(struct kern *k, struct tensor x, struct tensor y, float s);
void CPU_NAME(elementwise_mix)(struct kern *k, struct tensor out, struct tensor a, struct tensor b, struct tensor share);
bool CPU_NAME(elementwise_has_nan)(struct kern *k, struct tensor x);
void CPU_NAME(elementwise_sum_ranks)(struct kern *k, struct tensor x, int slot);
void CPU_NAME(elementwise_checksum)(struct kern *k, struct tensor out, struct tensor x);
void CPU_NAME(norm_rms)(struct kern *k, struct tensor out, struct tensor x, struct tensor weight, float eps,
                        enum kern_rounding rounding);
void CPU_NAME(norm_layer_modulate)(struct kern *k, struct tensor out, struct tensor x, struct tensor scale,
                                   struct tensor shift, float eps);
void CPU_NAME(norm_gated_add)(struct kern *k, struct tensor out, struct tensor x, struct tensor gate, struct tensor y,
                              struct tensor scale, struct tensor shift, float eps);
/* norm_rms_row is norm_rms of one row. */
void CPU_NAME(norm_rms_row)(void *out, const void *x, enum tensor_dtype dtype, struct tensor weight, float eps,
                            enum kern_rounding rounding);
void CPU_NAME(norm_group)(struct kern *k, struct tensor out, struct tensor x, struct tensor weight,
                          struct tensor bias, int groups, float eps, bool silu);
void CPU_NAME(rope_rms)(struct kern *k, struct tensor out, struct tensor x, struct tensor weight, float eps,
                        enum kern_rounding rounding, struct tensor cos, struct tensor sin, enum kern_rope_layout layout);
void CPU_NAME(gather_rows)(struct kern *k, struct tensor out, const struct quant_matrix *table, struct tensor ids);
void CPU_NAME(resample_timestep)(struct kern *k, struct tensor out, float t);
void CPU_NAME(resample_unpatchify)(struct kern *k, struct tensor out, struct tensor tokens, struct tensor mean,
                                   struct tensor std);
void CPU_NAME(resample_patchify)(struct kern *k, struct tensor tokens, struct tensor x, struct tensor mean,
                                 struct tensor std);
void CPU_NAME(resample_upsample2)(struct kern *k, struct tensor out, struct tensor x);
void CPU_NAME(resample_pixels)(struct kern *k, struct tensor out, struct tensor x);
struct kern_weight *CPU_NAME(linear_weight)(struct kern *k, enum tensor_dtype dtype, struct tensor w,
                                            struct tensor bias);
struct kern_weight *CPU_NAME(linear_weight_quant)(struct kern *k, enum tensor_dtype dtype, const struct quant_run *runs,
                                                  int count);
void CPU_NAME(linear_apply)(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w);
/* fp8_rows: q of kern_linear, in the dtype of x: it holds every e4m3. scales[r]: what a sum of row r is multiplied by. q: contiguous */
void CPU_NAME(fp8_rows)(struct kern *k, struct tensor q, float *scales, struct tensor x, const struct quant_matrix *m);
void CPU_NAME(conv_apply)(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w,
                          int stride, int pad);
void CPU_NAME(attention_apply)(struct kern *k, struct tensor out, struct tensor q, struct tensor key,
                               struct tensor value, float scale, struct kern_mask mask);

#endif
