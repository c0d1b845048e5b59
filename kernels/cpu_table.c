/* cpu_table.c - the op table of one instruction set; compiled once per set, like the ops it names. */
#include "cpu_table.h"

#include "cpu_ops.h"

const struct kern_ops CPU_NAME(cpu_table) = {
    .weight = CPU_NAME(linear_weight),
    .weight_quant = CPU_NAME(linear_weight_quant),
    .sum_ranks = CPU_NAME(elementwise_sum_ranks),
    .checksum = CPU_NAME(elementwise_checksum),
    .copy = CPU_NAME(elementwise_copy),
    .gather = CPU_NAME(gather_rows),
    .linear = CPU_NAME(linear_apply),
    .conv2d = CPU_NAME(conv_apply),
    .attention = CPU_NAME(attention_apply),
    .rms_norm = CPU_NAME(norm_rms),
    .layer_norm_modulate = CPU_NAME(norm_layer_modulate),
    .gated_add_norm = CPU_NAME(norm_gated_add),
    .group_norm = CPU_NAME(norm_group),
    .silu = CPU_NAME(elementwise_silu),
    .silu_mul = CPU_NAME(elementwise_silu_mul),
    .add = CPU_NAME(elementwise_add),
    .gated_add = CPU_NAME(elementwise_gated_add),
    .add_scaled = CPU_NAME(elementwise_add_scaled),
    .rms_rope = CPU_NAME(rope_rms),
    .timestep_embedding = CPU_NAME(resample_timestep),
    .guide = CPU_NAME(elementwise_guide),
    .mix = CPU_NAME(elementwise_mix),
    .unpatchify = CPU_NAME(resample_unpatchify),
    .patchify = CPU_NAME(resample_patchify),
    .upsample2 = CPU_NAME(resample_upsample2),
    .pixels = CPU_NAME(resample_pixels),
    .has_nan = CPU_NAME(elementwise_has_nan),
};
