/* lora_shape.h - the transformer that the adapters of tests/unit/data are for (tests/golden/adapters.py makes them): one double
 * and one single block. For the test of adapters and their fuzzer. */
#ifndef KILN_LORA_SHAPE_H
#define KILN_LORA_SHAPE_H

#include "model_config.h"

static const struct transformer_config lora_shape = {.hidden = 16,
                                                     .attention_head_dim = 16,
                                                     .num_attention_heads = 1,
                                                     .num_layers = 1,
                                                     .num_single_layers = 1,
                                                     .joint_attention_dim = 24,
                                                     .in_channels = 8,
                                                     .mlp_hidden = 48,
                                                     .timestep_guidance_channels = 8};

#endif
