/* tensor_names.c - tables of name pairs and the matcher that reads them from either side.
 *
 * Names in the tables are patterns:  #  a number     %  3 minus the number on the other side (up levels of the VAE)
 *                                    @  weight or bias     $  norm1, conv1, norm2 or conv2
 * Wildcards stand in the same order on both sides, so what one side matched fills the other. */
#include "tensor_names.h"

#include <stdio.h>
#include <string.h>

#define UP_LEVELS 4
#define WILDCARDS_MAX 4
#define NUMBER_MAX 9999

/* An extent of a linear, as multiples of the model's sizes. */
struct extent {
    uint8_t hidden, mlp, context, channels, time, head;
};

struct row {
    const char *ours, *theirs;
    int piece, pieces; /* 0 of 0: the whole tensor */
    enum tensor_names_change change;
    struct extent n, k; /* transformer only; a vector has no k */
};

/* --- the tables ------------------------------------------------------------------------------------------ */

#define HIDDEN {.hidden = 1}
#define HEAD {.head = 1}
#define GATE_UP {.mlp = 2}
#define MLP {.mlp = 1}

static const struct row transformer_rows[] = {
    {"x_embedder.weight", "img_in.weight", .n = HIDDEN, .k = {.channels = 1}},
    {"context_embedder.weight", "txt_in.weight", .n = HIDDEN, .k = {.context = 1}},
    {"time_guidance_embed.timestep_embedder.linear_1.weight", "time_in.in_layer.weight", .n = HIDDEN, .k = {.time = 1}},
    {"time_guidance_embed.timestep_embedder.linear_2.weight", "time_in.out_layer.weight", .n = HIDDEN, .k = HIDDEN},
    {"double_stream_modulation_img.linear.weight", "double_stream_modulation_img.lin.weight", .n = {.hidden = 6}, .k = HIDDEN},
    {"double_stream_modulation_txt.linear.weight", "double_stream_modulation_txt.lin.weight", .n = {.hidden = 6}, .k = HIDDEN},
    {"single_stream_modulation.linear.weight", "single_stream_modulation.lin.weight", .n = {.hidden = 3}, .k = HIDDEN},
    {"transformer_blocks.#.attn.to_q.weight", "double_blocks.#.img_attn.qkv.weight", 0, 3, .n = HIDDEN, .k = HIDDEN},
    {"transformer_blocks.#.attn.to_k.weight", "double_blocks.#.img_attn.qkv.weight", 1, 3, .n = HIDDEN, .k = HIDDEN},
    {"transformer_blocks.#.attn.to_v.weight", "double_blocks.#.img_attn.qkv.weight", 2, 3, .n = HIDDEN, .k = HIDDEN},
    {"transformer_blocks.#.attn.add_q_proj.weight", "double_blocks.#.txt_attn.qkv.weight", 0, 3, .n = HIDDEN, .k = HIDDEN},
    {"transformer_blocks.#.attn.add_k_proj.weight", "double_blocks.#.txt_attn.qkv.weight", 1, 3, .n = HIDDEN, .k = HIDDEN},
    {"transformer_blocks.#.attn.add_v_proj.weight", "double_blocks.#.txt_attn.qkv.weight", 2, 3, .n = HIDDEN, .k = HIDDEN},
    {"transformer_blocks.#.attn.to_out.0.weight", "double_blocks.#.img_attn.proj.weight", .n = HIDDEN, .k = HIDDEN},
    {"transformer_blocks.#.attn.to_add_out.weight", "double_blocks.#.txt_attn.proj.weight", .n = HIDDEN, .k = HIDDEN},
    {"transformer_blocks.#.attn.norm_q.weight", "double_blocks.#.img_attn.norm.query_norm.scale", .n = HEAD},
    {"transformer_blocks.#.attn.norm_k.weight", "double_blocks.#.img_attn.norm.key_norm.scale", .n = HEAD},
    {"transformer_blocks.#.attn.norm_added_q.weight", "double_blocks.#.txt_attn.norm.query_norm.scale", .n = HEAD},
    {"transformer_blocks.#.attn.norm_added_k.weight", "double_blocks.#.txt_attn.norm.key_norm.scale", .n = HEAD},
    {"transformer_blocks.#.ff.linear_in.weight", "double_blocks.#.img_mlp.0.weight", .n = GATE_UP, .k = HIDDEN},
    {"transformer_blocks.#.ff.linear_out.weight", "double_blocks.#.img_mlp.2.weight", .n = HIDDEN, .k = MLP},
    {"transformer_blocks.#.ff_context.linear_in.weight", "double_blocks.#.txt_mlp.0.weight", .n = GATE_UP, .k = HIDDEN},
    {"transformer_blocks.#.ff_context.linear_out.weight", "double_blocks.#.txt_mlp.2.weight", .n = HIDDEN, .k = MLP},
    {"single_transformer_blocks.#.attn.to_qkv_mlp_proj.weight", "single_blocks.#.linear1.weight", .n = {.hidden = 3, .mlp = 2},
     .k = HIDDEN},
    {"single_transformer_blocks.#.attn.to_out.weight", "single_blocks.#.linear2.weight", .n = HIDDEN,
     .k = {.hidden = 1, .mlp = 1}},
    {"single_transformer_blocks.#.attn.norm_q.weight", "single_blocks.#.norm.query_norm.scale", .n = HEAD},
    {"single_transformer_blocks.#.attn.norm_k.weight", "single_blocks.#.norm.key_norm.scale", .n = HEAD},
    {"norm_out.linear.weight", "final_layer.adaLN_modulation.1.weight", .change = TENSOR_NAMES_SWAP_HALVES,
     .n = {.hidden = 2}, .k = HIDDEN},
    {"proj_out.weight", "final_layer.linear.weight", .n = {.channels = 1}, .k = HIDDEN},
};

#define PAIR(ours_, theirs_) {.ours = ours_, .theirs = theirs_}

static const struct row llama_rows[] = {
    PAIR("model.embed_tokens.weight", "token_embd.weight"),
    PAIR("model.norm.weight", "output_norm.weight"),
    PAIR("lm_head.weight", "output.weight"),
    PAIR("model.layers.#.input_layernorm.weight", "blk.#.attn_norm.weight"),
    PAIR("model.layers.#.post_attention_layernorm.weight", "blk.#.ffn_norm.weight"),
    PAIR("model.layers.#.self_attn.q_proj.weight", "blk.#.attn_q.weight"),
    PAIR("model.layers.#.self_attn.k_proj.weight", "blk.#.attn_k.weight"),
    PAIR("model.layers.#.self_attn.v_proj.weight", "blk.#.attn_v.weight"),
    PAIR("model.layers.#.self_attn.o_proj.weight", "blk.#.attn_output.weight"),
    PAIR("model.layers.#.self_attn.q_norm.weight", "blk.#.attn_q_norm.weight"),
    PAIR("model.layers.#.self_attn.k_norm.weight", "blk.#.attn_k_norm.weight"),
    PAIR("model.layers.#.mlp.gate_proj.weight", "blk.#.ffn_gate.weight"),
    PAIR("model.layers.#.mlp.up_proj.weight", "blk.#.ffn_up.weight"),
    PAIR("model.layers.#.mlp.down_proj.weight", "blk.#.ffn_down.weight"),
};

static const struct row bare_rows[] = {
    PAIR("model.embed_tokens.weight", "embed_tokens.weight"),
    PAIR("model.norm.weight", "norm.weight"),
    PAIR("lm_head.weight", "lm_head.weight"),
    PAIR("model.layers.#.input_layernorm.weight", "layers.#.input_layernorm.weight"),
    PAIR("model.layers.#.post_attention_layernorm.weight", "layers.#.post_attention_layernorm.weight"),
    PAIR("model.layers.#.self_attn.q_proj.weight", "layers.#.self_attn.q_proj.weight"),
    PAIR("model.layers.#.self_attn.k_proj.weight", "layers.#.self_attn.k_proj.weight"),
    PAIR("model.layers.#.self_attn.v_proj.weight", "layers.#.self_attn.v_proj.weight"),
    PAIR("model.layers.#.self_attn.o_proj.weight", "layers.#.self_attn.o_proj.weight"),
    PAIR("model.layers.#.self_attn.q_norm.weight", "layers.#.self_attn.q_norm.weight"),
    PAIR("model.layers.#.self_attn.k_norm.weight", "layers.#.self_attn.k_norm.weight"),
    PAIR("model.layers.#.mlp.gate_proj.weight", "layers.#.mlp.gate_proj.weight"),
    PAIR("model.layers.#.mlp.up_proj.weight", "layers.#.mlp.up_proj.weight"),
    PAIR("model.layers.#.mlp.down_proj.weight", "layers.#.mlp.down_proj.weight"),
};

/* The attention of a VAE's middle block is made of 1x1 convolutions in BFL files, of linears in diffusers. */
#define VAE_MIDDLE(side)                                                                                                  \
    PAIR(side ".mid_block.resnets.0.$.@", side ".mid.block_1.$.@"),                                                       \
    PAIR(side ".mid_block.resnets.1.$.@", side ".mid.block_2.$.@"),                                                       \
    PAIR(side ".mid_block.attentions.0.group_norm.@", side ".mid.attn_1.norm.@"),                                         \
    {side ".mid_block.attentions.0.to_q.weight", side ".mid.attn_1.q.weight", .change = TENSOR_NAMES_SQUEEZE},            \
    {side ".mid_block.attentions.0.to_k.weight", side ".mid.attn_1.k.weight", .change = TENSOR_NAMES_SQUEEZE},            \
    {side ".mid_block.attentions.0.to_v.weight", side ".mid.attn_1.v.weight", .change = TENSOR_NAMES_SQUEEZE},            \
    {side ".mid_block.attentions.0.to_out.0.weight", side ".mid.attn_1.proj_out.weight", .change = TENSOR_NAMES_SQUEEZE}, \
    PAIR(side ".mid_block.attentions.0.to_q.bias", side ".mid.attn_1.q.bias"),                                            \
    PAIR(side ".mid_block.attentions.0.to_k.bias", side ".mid.attn_1.k.bias"),                                            \
    PAIR(side ".mid_block.attentions.0.to_v.bias", side ".mid.attn_1.v.bias"),                                            \
    PAIR(side ".mid_block.attentions.0.to_out.0.bias", side ".mid.attn_1.proj_out.bias")

static const struct row vae_rows[] = {
    PAIR("encoder.conv_in.@", "encoder.conv_in.@"),
    PAIR("encoder.down_blocks.#.resnets.#.$.@", "encoder.down.#.block.#.$.@"),
    PAIR("encoder.down_blocks.#.resnets.#.conv_shortcut.@", "encoder.down.#.block.#.nin_shortcut.@"),
    PAIR("encoder.down_blocks.#.downsamplers.0.conv.@", "encoder.down.#.downsample.conv.@"),
    VAE_MIDDLE("encoder"),
    PAIR("encoder.conv_norm_out.@", "encoder.norm_out.@"),
    PAIR("encoder.conv_out.@", "encoder.conv_out.@"),
    PAIR("quant_conv.@", "encoder.quant_conv.@"),
    PAIR("post_quant_conv.@", "decoder.post_quant_conv.@"),
    PAIR("decoder.conv_in.@", "decoder.conv_in.@"),
    VAE_MIDDLE("decoder"),
    PAIR("decoder.up_blocks.#.resnets.#.$.@", "decoder.up.%.block.#.$.@"),
    PAIR("decoder.up_blocks.#.resnets.#.conv_shortcut.@", "decoder.up.%.block.#.nin_shortcut.@"),
    PAIR("decoder.up_blocks.#.upsamplers.0.conv.@", "decoder.up.%.upsample.conv.@"),
    PAIR("decoder.conv_norm_out.@", "decoder.norm_out.@"),
    PAIR("decoder.conv_out.@", "decoder.conv_out.@"),
    PAIR("bn.running_mean", "bn.running_mean"),
    PAIR("bn.running_var", "bn.running_var"),
    PAIR("bn.num_batches_tracked", "bn.num_batches_tracked"),
};

#define COUNT(a) (sizeof(a) / sizeof *(a))

/* A way to name a part, and a tensor that tells it. Without rows: the engine's own names. */
static const struct style {
    enum tensor_names_part part;
    enum tensor_names_scheme scheme;
    const char *marker;
    const struct row *rows;
    size_t count;
} styles[] = {
    {TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_DIFFUSERS, "x_embedder.weight", NULL, 0},
    {TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_BFL, "img_in.weight", transformer_rows, COUNT(transformer_rows)},
    {TENSOR_NAMES_TEXT_ENCODER, TENSOR_NAMES_DIFFUSERS, "model.embed_tokens.weight", NULL, 0},
    {TENSOR_NAMES_TEXT_ENCODER, TENSOR_NAMES_BARE, "embed_tokens.weight", bare_rows, COUNT(bare_rows)},
    {TENSOR_NAMES_TEXT_ENCODER, TENSOR_NAMES_LLAMA, "token_embd.weight", llama_rows, COUNT(llama_rows)},
    {TENSOR_NAMES_VAE, TENSOR_NAMES_DIFFUSERS, "decoder.conv_norm_out.weight", NULL, 0},
    {TENSOR_NAMES_VAE, TENSOR_NAMES_BFL, "decoder.norm_out.weight", vae_rows, COUNT(vae_rows)},
};

static const struct {
    enum tensor_names_part part;
    const char *prefix;
} prefixes[] = {
    {TENSOR_NAMES_TRANSFORMER, ""},
    {TENSOR_NAMES_TRANSFORMER, "model.diffusion_model."},
    {TENSOR_NAMES_TRANSFORMER, "diffusion_model."},
    {TENSOR_NAMES_TRANSFORMER, "transformer."},
    {TENSOR_NAMES_TRANSFORMER, "model."},
    {TENSOR_NAMES_TEXT_ENCODER, ""},
    {TENSOR_NAMES_TEXT_ENCODER, "text_encoders.qwen3_4b.transformer."},
    {TENSOR_NAMES_TEXT_ENCODER, "text_encoders.qwen3_8b.transformer."},
    {TENSOR_NAMES_TEXT_ENCODER, "text_encoders.llm."},
    {TENSOR_NAMES_TEXT_ENCODER, "text_encoder."},
    {TENSOR_NAMES_TEXT_ENCODER, "qwen3_4b.transformer."},
    {TENSOR_NAMES_TEXT_ENCODER, "qwen3_8b.transformer."},
    {TENSOR_NAMES_VAE, ""},
    {TENSOR_NAMES_VAE, "vae."},
    {TENSOR_NAMES_VAE, "first_stage_model."},
};

/* --- the matcher ------------------------------------------------------------------------------------------- */

struct captures {
    int numbers[WILDCARDS_MAX];
    const char *words[WILDCARDS_MAX];
    int count;
};

/* A decimal number without a sign or leading zeros, as writers print it. NULL: none here. */
static const char *match_number(const char *text, int *ret)
{
    if (*text < '0' || *text > '9' || (*text == '0' && text[1] >= '0' && text[1] <= '9'))
        return NULL;
    int n = 0;
    for (; *text >= '0' && *text <= '9'; text++) {
        n = 10 * n + (*text - '0');
        if (n > NUMBER_MAX)
            return NULL;
    }
    *ret = n;
    return text;
}

static const char *match_word(const char *text, char wildcard, const char **ret)
{
    static const char *const suffixes[] = {"weight", "bias", NULL}, *const members[] = {"norm1", "conv1", "norm2", "conv2", NULL};
    for (const char *const *word = wildcard == '@' ? suffixes : members; *word; word++)
        if (strncmp(text, *word, strlen(*word)) == 0) {
            *ret = *word;
            return text + strlen(*word);
        }
    return NULL;
}

static bool match(const char *pattern, const char *text, bool is_flat, struct captures *c)
{
    c->count = 0;
    for (; *pattern; pattern++) {
        int *number = &c->numbers[c->count];
        if (*pattern == '#' || *pattern == '%') {
            if (!(text = match_number(text, number)))
                return false;
            if (*pattern == '%' && (*number = UP_LEVELS - 1 - *number) < 0)
                return false;
            c->count++;
        } else if (*pattern == '@' || *pattern == '$') {
            if (!(text = match_word(text, *pattern, &c->words[c->count])))
                return false;
            c->count++;
        } else if (*text++ != (is_flat && *pattern == '.' ? '_' : *pattern)) {
            return false;
        }
    }
    return *text == 0;
}

static bool fill(char ret[TENSOR_NAMES_BYTES_MAX], const char *prefix, const char *pattern, const struct captures *c)
{
    size_t used = (size_t)snprintf(ret, TENSOR_NAMES_BYTES_MAX, "%s", prefix);
    int at = 0;
    for (; *pattern; pattern++) {
        char piece[16] = {*pattern};
        if (*pattern == '%' && c->numbers[at] >= UP_LEVELS)
            return false;
        if (*pattern == '#' || *pattern == '%')
            snprintf(piece, sizeof piece, "%d", *pattern == '#' ? c->numbers[at] : UP_LEVELS - 1 - c->numbers[at]);
        else if (*pattern == '@' || *pattern == '$')
            snprintf(piece, sizeof piece, "%s", c->words[at]);
        at += strchr("#%@$", *pattern) != NULL;
        if (used + strlen(piece) >= TENSOR_NAMES_BYTES_MAX)
            return false;
        used += (size_t)snprintf(ret + used, TENSOR_NAMES_BYTES_MAX - used, "%s", piece);
    }
    return true;
}

static bool place(struct tensor_names_place *ret, const struct row *row, const char *prefix, const char *pattern,
                  const struct captures *c)
{
    *ret = (struct tensor_names_place){.piece = row->piece, .pieces = row->pieces ? row->pieces : 1, .change = row->change};
    return fill(ret->name, prefix, pattern, c);
}

/* --- asking ------------------------------------------------------------------------------------------------ */

static const struct style *style_of(const struct tensor_names *names)
{
    for (size_t i = 0; i < COUNT(styles); i++)
        if (styles[i].part == names->part && styles[i].scheme == names->scheme)
            return &styles[i];
    return NULL;
}

bool tensor_names_detect(struct tensor_names *ret, enum tensor_names_part part, tensor_names_has *has, const void *files)
{
    for (size_t p = 0; p < COUNT(prefixes); p++)
        for (size_t s = 0; prefixes[p].part == part && s < COUNT(styles); s++) {
            char name[TENSOR_NAMES_BYTES_MAX];
            if (styles[s].part != part)
                continue;
            snprintf(name, sizeof name, "%s%s", prefixes[p].prefix, styles[s].marker);
            if (has(files, name)) {
                *ret = (struct tensor_names){part, styles[s].scheme, prefixes[p].prefix};
                return true;
            }
        }
    return false;
}

static bool same_name(struct tensor_names_place *ret, const char *prefix, const char *name)
{
    *ret = (struct tensor_names_place){.pieces = 1};
    return snprintf(ret->name, sizeof ret->name, "%s%s", prefix, name) < (int)sizeof ret->name;
}

bool tensor_names_in_file(struct tensor_names_place *ret, const struct tensor_names *names, const char *asked)
{
    const struct style *style = style_of(names);
    struct captures c;
    if (style && !style->rows)
        return same_name(ret, names->prefix, asked);
    for (size_t i = 0; style && i < style->count; i++)
        if (match(style->rows[i].ours, asked, false, &c))
            return place(ret, &style->rows[i], names->prefix, style->rows[i].theirs, &c);
    return false;
}

int tensor_names_of_file(struct tensor_names_place ret[TENSOR_NAMES_PIECES_MAX], const struct tensor_names *names,
                         const char *file_name)
{
    const struct style *style = style_of(names);
    size_t skip = strlen(names->prefix);
    struct captures c;
    int count = 0;
    if (!style || strncmp(file_name, names->prefix, skip) != 0)
        return 0;
    if (!style->rows)
        return same_name(ret, "", file_name + skip);
    for (size_t i = 0; i < style->count && count < TENSOR_NAMES_PIECES_MAX; i++)
        if (match(style->rows[i].theirs, file_name + skip, false, &c))
            count += place(&ret[count], &style->rows[i], "", style->rows[i].ours, &c);
    return count;
}

int tensor_names_linears(struct tensor_names_place ret[TENSOR_NAMES_PIECES_MAX], const char *module, bool is_flat)
{
    char name[TENSOR_NAMES_BYTES_MAX];
    if (snprintf(name, sizeof name, "%s%sweight", module, is_flat ? "_" : ".") >= (int)sizeof name)
        return 0;
    int count = 0;
    struct captures c;
    for (size_t i = 0; i < COUNT(transformer_rows) && count < TENSOR_NAMES_PIECES_MAX; i++) {
        const struct row *row = &transformer_rows[i];
        const struct row whole = {.n = row->n, .k = row->k}; /* under our own name nothing is fused or swapped */
        bool is_linear = memcmp(&row->k, &(struct extent){0}, sizeof row->k) != 0;
        if (is_linear && match(row->ours, name, is_flat, &c))
            count += place(&ret[count], &whole, "", row->ours, &c);
        else if (is_linear && match(row->theirs, name, is_flat, &c))
            count += place(&ret[count], row, "", row->ours, &c);
    }
    return count;
}

static int64_t size_of(struct extent e, const struct transformer_config *c)
{
    return (int64_t)e.hidden * c->hidden + (int64_t)e.mlp * c->mlp_hidden + (int64_t)e.context * c->joint_attention_dim +
           (int64_t)e.channels * c->in_channels + (int64_t)e.time * c->timestep_guidance_channels +
           (int64_t)e.head * c->attention_head_dim;
}

int tensor_names_shape(int64_t shape[2], const struct transformer_config *config, const char *name)
{
    for (size_t i = 0; i < COUNT(transformer_rows); i++) {
        struct captures c;
        const struct row *row = &transformer_rows[i];
        if (!match(row->ours, name, false, &c))
            continue;
        int blocks = strncmp(name, "single_", 7) == 0 ? config->num_single_layers : config->num_layers;
        if (c.count && c.numbers[0] >= blocks)
            return 0;
        shape[0] = size_of(row->n, config);
        shape[1] = size_of(row->k, config);
        return shape[1] ? 2 : 1;
    }
    return 0;
}

bool tensor_names_beside(char ret[TENSOR_NAMES_BYTES_MAX], const char *weight, enum tensor_names_scale kind, int spelling)
{
    static const char *const spellings[][2] = {
        [TENSOR_NAMES_WEIGHT_SCALE] = {"weight_scale", "scale_weight"},
        [TENSOR_NAMES_WEIGHT_SCALE_2] = {"weight_scale_2", NULL},
        [TENSOR_NAMES_INPUT_SCALE] = {"input_scale", "scale_input"},
        [TENSOR_NAMES_COLUMN_SCALE] = {"pre_quant_scale", NULL},
        [TENSOR_NAMES_QUANT_NOTE] = {"comfy_quant", NULL},
    };
    static const char ending[] = "weight";
    size_t length = strlen(weight);
    if (spelling < 0 || spelling > 1 || !spellings[kind][spelling] || length < sizeof ending ||
        strcmp(weight + length - 6, ending) != 0 || weight[length - 7] != '.')
        return false;
    return snprintf(ret, TENSOR_NAMES_BYTES_MAX, "%.*s%s", (int)(length - 6), weight, spellings[kind][spelling]) <
           TENSOR_NAMES_BYTES_MAX;
}
