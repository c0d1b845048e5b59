/* model_shape.c - extents of well-chosen tensors into configs. A `reader` keeps the first complaint, like the parsers of
 * model_config.c, so that each part is a list of names. */
#include "model_shape.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define BLOCKS_MAX 256

struct reader {
    const struct weight_files *files;
    struct engine_error *why;
    bool failed;
};

__attribute__((format(printf, 2, 3))) static void complain(struct reader *r, const char *format, ...)
{
    char text[400];
    va_list args;
    if (r->failed)
        return;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    engine_error_set(r->why, ENGINE_BAD_MODEL, "%s", text);
    r->failed = true;
}

/* Extent `axis` of a tensor of this rank. */
static int extent(struct reader *r, const char *name, int rank, int axis, int least, int most)
{
    struct weight w;
    if (r->failed)
        return least;
    if (!weight_files_find(r->files, &w, name, r->why)) {
        r->failed = true;
        return least;
    }
    if (w.rank != rank)
        complain(r, "%s: tensor '%s' has %d axes, want %d", w.file, w.name, w.rank, rank);
    else if (w.shape[axis] < least || w.shape[axis] > most)
        complain(r, "%s: tensor '%s' has %lld along axis %d, accepted: %d to %d", w.file, w.name, (long long)w.shape[axis],
                 axis, least, most);
    return r->failed ? least : (int)w.shape[axis];
}

/* The number of blocks: `format` has a number, the first that is not there. */
static int blocks(struct reader *r, const char *before, const char *behind, int least)
{
    int count = 0;
    for (char name[TENSOR_NAMES_BYTES_MAX]; !r->failed && count <= BLOCKS_MAX; count++) {
        snprintf(name, sizeof name, "%s.%d.%s", before, count, behind);
        if (!weight_files_has(r->files, name))
            break;
    }
    if (count < least || count > BLOCKS_MAX)
        complain(r, "%d of '%s.N.%s', accepted: %d to %d", count, before, behind, least, BLOCKS_MAX);
    return count;
}

static int quotient(struct reader *r, int whole, int part, const char *what)
{
    if (!r->failed && whole % part)
        complain(r, "%s: %d is no multiple of %d", what, whole, part);
    return r->failed ? 1 : whole / part;
}

static bool begin(struct reader *r, const char *what)
{
    if (!weight_files_is_part(r->files))
        complain(r, "has no tensors of a %s under any known name", what);
    return !r->failed;
}

/* --- transformer ------------------------------------------------------------------------------------------- */

/* FLUX.2 [dev] has the same blocks and an embedding of the guidance beside them. */
static void check_guidance(struct reader *r)
{
    struct weight_line line;
    for (size_t i = 0; !r->failed && weight_files_list(r->files, i, &line); i++)
        if (strstr(line.name, "guidance_in.") || strstr(line.name, "guidance_embedder."))
            complain(r, "tensor '%.120s' is an embedding of the guidance, which the klein family does not have", line.name);
}

bool model_shape_transformer(struct transformer_config *ret, const struct weight_files *f, struct engine_error *why)
{
    struct reader r = {f, why, false};
    if (!begin(&r, "FLUX.2 transformer"))
        return false;
    struct transformer_config c = {
        .hidden = extent(&r, "x_embedder.weight", 2, 0, 8, 131072),
        .in_channels = extent(&r, "x_embedder.weight", 2, 1, 128, 128),
        .joint_attention_dim = extent(&r, "context_embedder.weight", 2, 1, 24, 65536),
        .timestep_guidance_channels = extent(&r, "time_guidance_embed.timestep_embedder.linear_1.weight", 2, 1, 2, 4096),
        .attention_head_dim = extent(&r, "transformer_blocks.0.attn.norm_q.weight", 1, 0, 8, 512),
        .mlp_hidden = extent(&r, "transformer_blocks.0.ff.linear_out.weight", 2, 1, 4, 2097152),
        .num_layers = blocks(&r, "transformer_blocks", "attn.norm_q.weight", 1),
        .num_single_layers = blocks(&r, "single_transformer_blocks", "attn.norm_q.weight", 1),
        .rope_theta = 2000,
        .eps = 1e-6f,
    };
    check_guidance(&r);
    c.num_attention_heads = quotient(&r, c.hidden, c.attention_head_dim, "width of the transformer");
    quotient(&r, c.attention_head_dim, 8, "head size of the transformer");
    quotient(&r, c.timestep_guidance_channels, 2, "channels of the time embedding");
    if (!r.failed && c.num_attention_heads > 256)
        complain(&r, "%d heads, accepted: 1 to 256", c.num_attention_heads);
    for (int i = 0; i < 4; i++)
        c.axes_dims_rope[i] = c.attention_head_dim / 4;
    if (!r.failed)
        *ret = c;
    return !r.failed;
}

/* --- text encoder -------------------------------------------------------------------------------------------- */

static double metadata(struct reader *r, const char *key, double otherwise, double least, double most)
{
    const struct gguf *g = weight_files_gguf(r->files);
    double value = otherwise;
    if (r->failed || !g || !gguf_has(g, key))
        return otherwise;
    if (!gguf_number(g, &value, key, r->why))
        r->failed = true;
    else if (!(value >= least && value <= most))
        complain(r, "'%s' is %g, accepted: %g to %g", key, value, least, most);
    return r->failed ? otherwise : value;
}

bool model_shape_text_encoder(struct text_encoder_config *ret, const struct weight_files *f, struct engine_error *why)
{
    struct reader r = {f, why, false};
    if (!begin(&r, "Qwen3 text encoder"))
        return false;
    struct text_encoder_config c = {
        .vocab_size = extent(&r, "model.embed_tokens.weight", 2, 0, 256, 4000000),
        .hidden_size = extent(&r, "model.embed_tokens.weight", 2, 1, 8, 16384),
        .intermediate_size = extent(&r, "model.layers.0.mlp.gate_proj.weight", 2, 0, 8, 65536),
        .head_dim = extent(&r, "model.layers.0.self_attn.q_norm.weight", 1, 0, 8, 512),
        .num_hidden_layers = blocks(&r, "model.layers", "input_layernorm.weight", MODEL_CONFIG_TEXT_LAYERS),
        .rms_norm_eps = (float)metadata(&r, "qwen3.attention.layer_norm_rms_epsilon", 1e-6, 1e-12, 1e-2),
        .rope_theta = metadata(&r, "qwen3.rope.freq_base", 1e6, 1, 1e12),
    };
    int q = extent(&r, "model.layers.0.self_attn.q_proj.weight", 2, 0, c.head_dim, 256 * c.head_dim);
    int kv = extent(&r, "model.layers.0.self_attn.k_proj.weight", 2, 0, c.head_dim, 256 * c.head_dim);
    quotient(&r, c.head_dim, 2, "head size of the text encoder");
    c.num_attention_heads = quotient(&r, q, c.head_dim, "rows of q_proj");
    c.num_key_value_heads = quotient(&r, kv, c.head_dim, "rows of k_proj");
    quotient(&r, c.num_attention_heads, c.num_key_value_heads, "heads of the text encoder");
    if (!r.failed)
        *ret = c;
    return !r.failed;
}

/* --- VAE -------------------------------------------------------------------------------------------------------- */

static void decoder_widths(struct reader *r, struct vae_config *c)
{
    for (int level = 0; level < 4; level++) {
        char name[80];
        snprintf(name, sizeof name, "decoder.up_blocks.%d.resnets.0.conv1.weight", level);
        c->decoder_block_out_channels[3 - level] = extent(r, name, 4, 0, 4, 4096);
    }
}

/* Files without an encoder have the decoder's widths: nothing reads the encoder's there. */
static void encoder_widths(struct reader *r, struct vae_config *c)
{
    memcpy(c->block_out_channels, c->decoder_block_out_channels, sizeof c->block_out_channels);
    for (int level = 0; level < 4 && weight_files_has(r->files, "encoder.conv_in.weight"); level++) {
        char name[80];
        snprintf(name, sizeof name, "encoder.down_blocks.%d.resnets.0.conv1.weight", level);
        c->block_out_channels[level] = extent(r, name, 4, 0, 4, 4096);
    }
}

bool model_shape_vae(struct vae_config *ret, const struct weight_files *f, struct engine_error *why)
{
    struct reader r = {f, why, false};
    if (!begin(&r, "FLUX.2 VAE"))
        return false;
    struct vae_config c = {
        .latent_channels = extent(&r, "post_quant_conv.weight", 4, 0, 32, 32),
        .norm_num_groups = 32,
        .batch_norm_eps = 1e-4f,
    };
    c.layers_per_block = blocks(&r, "decoder.up_blocks.0.resnets", "conv1.weight", 2) - 1;
    if (!r.failed && c.layers_per_block > MODEL_CONFIG_LAYERS_PER_BLOCK_MAX)
        complain(&r, "%d blocks a level, accepted: 2 to %d", c.layers_per_block + 1, MODEL_CONFIG_LAYERS_PER_BLOCK_MAX + 1);
    decoder_widths(&r, &c);
    encoder_widths(&r, &c);
    for (int i = 0; i < 4; i++)
        if (!r.failed && (c.decoder_block_out_channels[i] % 32 || c.block_out_channels[i] % 32))
            complain(&r, "%d and %d channels at level %d are no multiples of the family's 32 groups; a VAE with other groups "
                     "needs its config.json beside the file", c.block_out_channels[i], c.decoder_block_out_channels[i], i);
    if (!r.failed)
        *ret = c;
    return !r.failed;
}
