/* model_config.h - every dimension of a model, read from its JSON files and checked.
 *
 * Names follow the JSON keys. All sizes are bounded (model_config.c says by what), divisibility is
 * checked, and an architecture that is not FLUX.2 [klein] is refused by name. */
#ifndef KILN_MODEL_CONFIG_H
#define KILN_MODEL_CONFIG_H

#include <stddef.h>
#include <stdint.h>

#include "engine_error.h"

/* Fixed in the whole family: the picture sees the text encoder after layers 9, 18 and 27. */
#define MODEL_CONFIG_TEXT_LAYERS 27
#define MODEL_CONFIG_TEXT_TAPS 3
#define MODEL_CONFIG_LAYERS_PER_BLOCK_MAX 7 /* of the VAE */

struct text_encoder_config { /* text_encoder/config.json, Qwen3ForCausalLM */
    int hidden_size, intermediate_size, num_hidden_layers;
    int num_attention_heads, num_key_value_heads, head_dim;
    int vocab_size;
    float rms_norm_eps;
    double rope_theta;
};

struct transformer_config { /* transformer/config.json, Flux2Transformer2DModel */
    int num_attention_heads, attention_head_dim, hidden; /* hidden = heads * head_dim */
    int num_layers, num_single_layers;                   /* double, single blocks */
    int joint_attention_dim, in_channels, mlp_hidden;    /* mlp_hidden = mlp_ratio * hidden */
    int axes_dims_rope[4];
    double rope_theta;
    float eps;
    int timestep_guidance_channels;
};

struct vae_config { /* vae/config.json, AutoencoderKLFlux2 */
    int latent_channels, block_out_channels[4], layers_per_block, norm_num_groups;
    float batch_norm_eps;
    int decoder_block_out_channels[4]; /* = block_out_channels unless the file says otherwise */
};

struct model_config {
    bool is_distilled;                 /* model_index.json; absent: false, but true for Flux2KleinKVPipeline */
    char pipeline[64];                 /* "Flux2KleinPipeline" */
    struct text_encoder_config text;
    struct transformer_config transformer;
    struct vae_config vae;
};

/* model_config_load reads the five JSON files of a diffusers folder. */
bool model_config_load(struct model_config *ret, const char *model_dir, struct engine_error *why);

/* model_config_parse reads the text of one of them, for tests and the fuzzer. What it fills is changed on success only. */
enum model_config_file {
    MODEL_CONFIG_INDEX,        /* model_index.json */
    MODEL_CONFIG_TEXT_ENCODER, /* text_encoder/config.json */
    MODEL_CONFIG_TRANSFORMER,
    MODEL_CONFIG_VAE,
    MODEL_CONFIG_SCHEDULER,    /* scheduler/scheduler_config.json */
    MODEL_CONFIG_FILES,
};
bool model_config_parse(struct model_config *c, enum model_config_file file, const char *json, size_t bytes,
                        struct engine_error *why);
const char *model_config_file_name(enum model_config_file file); /* "vae/config.json" */

/* The steps of model_config_load, for models whose parts come from several places. _read reads one of the files wherever it
 * is; _is tells whether a file there is one of this kind at all (another program's config.json is not, and no file); _check
 * compares what one part gives with what another takes. */
bool model_config_read(struct model_config *c, enum model_config_file file, const char *path, struct engine_error *why);
bool model_config_is(enum model_config_file file, const char *path);
bool model_config_check(const struct model_config *c, struct engine_error *why);

/* "klein-4b", "klein-9b" or "klein-custom", and its licence ("Apache-2.0", "FLUX Non-Commercial",
 * "unknown"), told from the dimensions. */
const char *model_config_family(const struct model_config *c);
const char *model_config_licence(const struct model_config *c);

#endif
