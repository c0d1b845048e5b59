/* test_tensor_names.c - every tensor the engine asks for is found in every kind of file, and it is the right one. A wrong
 * pair loads without complaint when shapes agree, and the picture is noise.
 *
 * Counts, sizes and spot names are those of the published files (engine-spec 1.2, 2.3 to 2.6, 2.9). golden/files/
 * bfl-bf16.json has the digests of a single file made with diffusers' converter in mind (golden/digests.py). */
#include "digest.h"
#include "safetensors.h"
#include "tensor.h"
#include "tensor_names.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <jansson.h>

#define NAMES_MAX 512

struct names {
    char text[NAMES_MAX][TENSOR_NAMES_BYTES_MAX];
    int count;
};

__attribute__((format(printf, 2, 3))) static void add(struct names *n, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(n->text[n->count++], TENSOR_NAMES_BYTES_MAX, format, args);
    va_end(args);
    assert_true(n->count < NAMES_MAX);
}

static void add_once(struct names *n, const char *name)
{
    for (int i = 0; i < n->count; i++)
        if (strcmp(n->text[i], name) == 0)
            return;
    add(n, "%s", name);
}

/* --- what the published models have ------------------------------------------------------------------------ */

static void transformer_names(struct names *n, int doubles, int singles)
{
    static const char *const once[] = {"x_embedder",
                                       "context_embedder",
                                       "time_guidance_embed.timestep_embedder.linear_1",
                                       "time_guidance_embed.timestep_embedder.linear_2",
                                       "double_stream_modulation_img.linear",
                                       "double_stream_modulation_txt.linear",
                                       "single_stream_modulation.linear",
                                       "norm_out.linear",
                                       "proj_out"};
    static const char *const twice[] = {"attn.to_q",
                                        "attn.to_k",
                                        "attn.to_v",
                                        "attn.to_out.0",
                                        "attn.add_q_proj",
                                        "attn.add_k_proj",
                                        "attn.add_v_proj",
                                        "attn.to_add_out",
                                        "attn.norm_q",
                                        "attn.norm_k",
                                        "attn.norm_added_q",
                                        "attn.norm_added_k",
                                        "ff.linear_in",
                                        "ff.linear_out",
                                        "ff_context.linear_in",
                                        "ff_context.linear_out"};
    static const char *const single[] = {"to_qkv_mlp_proj", "to_out", "norm_q", "norm_k"};
    n->count = 0;
    for (size_t i = 0; i < 9; i++)
        add(n, "%s.weight", once[i]);
    for (int b = 0; b < doubles; b++)
        for (size_t i = 0; i < 16; i++)
            add(n, "transformer_blocks.%d.%s.weight", b, twice[i]);
    for (int b = 0; b < singles; b++)
        for (size_t i = 0; i < 4; i++)
            add(n, "single_transformer_blocks.%d.attn.%s.weight", b, single[i]);
}

static void text_encoder_names(struct names *n, int layers, bool has_head)
{
    static const char *const members[] = {
        "input_layernorm",  "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
        "self_attn.o_proj", "self_attn.q_norm",         "self_attn.k_norm", "mlp.gate_proj",    "mlp.up_proj",
        "mlp.down_proj"};
    n->count = 0;
    add(n, "model.embed_tokens.weight");
    add(n, "model.norm.weight");
    if (has_head)
        add(n, "lm_head.weight");
    for (int l = 0; l < layers; l++)
        for (size_t i = 0; i < 11; i++)
            add(n, "model.layers.%d.%s.weight", l, members[i]);
}

static void add_pair(struct names *n, const char *name)
{
    add(n, "%s.weight", name);
    add(n, "%s.bias", name);
}

static void add_members(struct names *n, const char *block, const char *members)
{
    char list[256], name[TENSOR_NAMES_BYTES_MAX];
    snprintf(list, sizeof list, "%s", members);
    for (char *rest = NULL, *m = strtok_r(list, " ", &rest); m; m = strtok_r(NULL, " ", &rest)) {
        snprintf(name, sizeof name, "%s.%s", block, m);
        add_pair(n, name);
    }
}

static void add_side(struct names *n, const char *side, const char *blocks, int resnets, const char *sampler,
                     const bool *has_shortcut)
{
    char block[128];
    for (int i = 0; i < 4; i++) {
        for (int r = 0; r < resnets; r++) {
            snprintf(block, sizeof block, "%s.%s.%d.resnets.%d", side, blocks, i, r);
            add_members(n, block,
                        r == 0 && has_shortcut[i] ? "norm1 conv1 norm2 conv2 conv_shortcut"
                                                  : "norm1 conv1 norm2 conv2");
        }
        snprintf(block, sizeof block, "%s.%s.%d.%s.0", side, blocks, i, sampler);
        if (i < 3)
            add_members(n, block, "conv");
    }
    for (int r = 0; r < 2; r++) {
        snprintf(block, sizeof block, "%s.mid_block.resnets.%d", side, r);
        add_members(n, block, "norm1 conv1 norm2 conv2");
    }
    snprintf(block, sizeof block, "%s.mid_block.attentions.0", side);
    add_members(n, block, "group_norm to_q to_k to_v to_out.0");
    add_members(n, side, "conv_in conv_norm_out conv_out");
}

static void vae_names(struct names *n)
{
    n->count = 0;
    add_side(n, "encoder", "down_blocks", 2, "downsamplers", (bool[]){false, true, true, false});
    add_side(n, "decoder", "up_blocks", 3, "upsamplers", (bool[]){false, false, true, true});
    add_pair(n, "quant_conv");
    add_pair(n, "post_quant_conv");
    add(n, "bn.running_mean"), add(n, "bn.running_var"), add(n, "bn.num_batches_tracked");
}

/* --- maps ---------------------------------------------------------------------------------------------------- */

/* Every name has a place, no place is given twice, fused tensors are filled, and the way back leads home. */
static int expect_one_to_one(const struct names *ours, const struct tensor_names *style)
{
    static struct names theirs;
    theirs.count = 0;
    int held = 0;
    for (int i = 0; i < ours->count; i++) {
        struct tensor_names_place there, back[TENSOR_NAMES_PIECES_MAX];
        if (!tensor_names_in_file(&there, style, ours->text[i]))
            fail_msg("'%s' has no place", ours->text[i]);
        int count = tensor_names_of_file(back, style, there.name);
        assert_int_equal(count, there.pieces);
        int homes = 0;
        for (int b = 0; b < count; b++)
            if (strcmp(back[b].name, ours->text[i]) == 0) {
                assert_true(back[b].piece == there.piece && back[b].pieces == there.pieces &&
                            back[b].change == there.change);
                homes++;
            }
        if (homes != 1)
            fail_msg("'%s' is '%s', which is not it", ours->text[i], there.name);
        add_once(&theirs, there.name);
    }
    for (int i = 0; i < theirs.count; i++) {
        struct tensor_names_place back[TENSOR_NAMES_PIECES_MAX];
        held += tensor_names_of_file(back, style, theirs.text[i]);
    }
    assert_int_equal(held, ours->count);
    return theirs.count;
}

static void every_transformer_tensor_has_one_place(void **state)
{
    (void)state;
    static struct names n;
    static const struct {
        int doubles, singles, ours, bfl;
    } models[] = {{5, 20, 169, 149}, {8, 24, 233, 201}}; /* 4B, 9B */
    for (size_t i = 0; i < 2; i++) {
        transformer_names(&n, models[i].doubles, models[i].singles);
        assert_int_equal(n.count, models[i].ours);
        static const char *const prefixes[] = {"", "model.diffusion_model.", "diffusion_model."};
        for (size_t p = 0; p < 3; p++) {
            assert_int_equal(
                expect_one_to_one(&n, &(struct tensor_names){TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_BFL, prefixes[p]}),
                models[i].bfl);
            assert_int_equal(expect_one_to_one(&n, &(struct tensor_names){TENSOR_NAMES_TRANSFORMER,
                                                                          TENSOR_NAMES_DIFFUSERS, prefixes[p]}),
                             models[i].ours);
        }
    }
}

static void shapes_add_up_to_the_published_parameters(void **state)
{
    (void)state;
    static struct names n;
    static const struct {
        struct transformer_config config;
        int64_t parameters;
    } models[] = {
        {{.hidden = 3072,
          .attention_head_dim = 128,
          .num_layers = 5,
          .num_single_layers = 20,
          .joint_attention_dim = 7680,
          .in_channels = 128,
          .mlp_hidden = 9216,
          .timestep_guidance_channels = 256},
         INT64_C(3875544576)},
        {{.hidden = 4096,
          .attention_head_dim = 128,
          .num_layers = 8,
          .num_single_layers = 24,
          .joint_attention_dim = 12288,
          .in_channels = 128,
          .mlp_hidden = 12288,
          .timestep_guidance_channels = 256},
         INT64_C(9078581248)},
    };
    int64_t shape[2];
    for (size_t i = 0; i < 2; i++) {
        const struct transformer_config *c = &models[i].config;
        int64_t sum = 0;
        transformer_names(&n, c->num_layers, c->num_single_layers);
        for (int t = 0; t < n.count; t++) {
            int rank = tensor_names_shape(shape, c, n.text[t]);
            assert_true(rank == 1 || rank == 2);
            sum += shape[0] * (rank == 2 ? shape[1] : 1);
        }
        assert_int_equal(sum, models[i].parameters);
    }
    const struct transformer_config *c = &models[0].config;
    assert_int_equal(tensor_names_shape(shape, c, "transformer_blocks.5.attn.to_q.weight"), 0);
    assert_int_equal(tensor_names_shape(shape, c, "single_transformer_blocks.20.attn.to_out.weight"), 0);
    assert_int_equal(tensor_names_shape(shape, c, "single_transformer_blocks.19.attn.to_out.weight"), 2);
    assert_true(shape[0] == 3072 && shape[1] == 12288);
    assert_int_equal(tensor_names_shape(shape, c, "pos_embed.weight"), 0);
}

static void every_text_encoder_tensor_has_one_place(void **state)
{
    (void)state;
    static struct names n;
    for (int has_head = 0; has_head < 2; has_head++) {
        text_encoder_names(&n, 36, has_head);
        assert_int_equal(n.count, 398 + has_head);
        static const enum tensor_names_scheme schemes[] = {TENSOR_NAMES_DIFFUSERS, TENSOR_NAMES_BARE,
                                                           TENSOR_NAMES_LLAMA};
        for (size_t i = 0; i < 3; i++)
            assert_int_equal(expect_one_to_one(&n, &(struct tensor_names){TENSOR_NAMES_TEXT_ENCODER, schemes[i], ""}),
                             n.count);
    }
}

static void every_vae_tensor_has_one_place(void **state)
{
    (void)state;
    static struct names n;
    vae_names(&n);
    assert_int_equal(n.count, 251);
    assert_int_equal(expect_one_to_one(&n, &(struct tensor_names){TENSOR_NAMES_VAE, TENSOR_NAMES_BFL, ""}), 251);
    assert_int_equal(expect_one_to_one(&n, &(struct tensor_names){TENSOR_NAMES_VAE, TENSOR_NAMES_DIFFUSERS, "vae."}),
                     251);
}

/* Pairs read off the published tables, one for each rule that could be wrong. */
static void names_are_those_of_the_published_files(void **state)
{
    (void)state;
    static const struct {
        enum tensor_names_part part;
        enum tensor_names_scheme scheme;
        const char *ours, *theirs;
        int piece, pieces;
        enum tensor_names_change change;
    } pairs[] = {
        {TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_BFL, "transformer_blocks.4.attn.to_v.weight",
         "double_blocks.4.img_attn.qkv.weight", 2, 3, TENSOR_NAMES_AS_IS},
        {TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_BFL, "transformer_blocks.0.attn.add_k_proj.weight",
         "double_blocks.0.txt_attn.qkv.weight", 1, 3, TENSOR_NAMES_AS_IS},
        {TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_BFL, "transformer_blocks.0.ff_context.linear_out.weight",
         "double_blocks.0.txt_mlp.2.weight", 0, 1, TENSOR_NAMES_AS_IS},
        {TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_BFL, "single_transformer_blocks.19.attn.norm_k.weight",
         "single_blocks.19.norm.key_norm.scale", 0, 1, TENSOR_NAMES_AS_IS},
        {TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_BFL, "norm_out.linear.weight", "final_layer.adaLN_modulation.1.weight",
         0, 1, TENSOR_NAMES_SWAP_HALVES},
        {TENSOR_NAMES_TEXT_ENCODER, TENSOR_NAMES_LLAMA, "model.layers.35.post_attention_layernorm.weight",
         "blk.35.ffn_norm.weight", 0, 1, TENSOR_NAMES_AS_IS},
        {TENSOR_NAMES_TEXT_ENCODER, TENSOR_NAMES_LLAMA, "model.layers.0.self_attn.o_proj.weight",
         "blk.0.attn_output.weight", 0, 1, TENSOR_NAMES_AS_IS},
        {TENSOR_NAMES_VAE, TENSOR_NAMES_BFL, "decoder.up_blocks.0.resnets.2.conv1.weight",
         "decoder.up.3.block.2.conv1.weight", 0, 1, TENSOR_NAMES_AS_IS},
        {TENSOR_NAMES_VAE, TENSOR_NAMES_BFL, "decoder.up_blocks.2.resnets.0.conv_shortcut.bias",
         "decoder.up.1.block.0.nin_shortcut.bias", 0, 1, TENSOR_NAMES_AS_IS},
        {TENSOR_NAMES_VAE, TENSOR_NAMES_BFL, "decoder.up_blocks.2.upsamplers.0.conv.weight",
         "decoder.up.1.upsample.conv.weight", 0, 1, TENSOR_NAMES_AS_IS},
        {TENSOR_NAMES_VAE, TENSOR_NAMES_BFL, "encoder.down_blocks.1.downsamplers.0.conv.bias",
         "encoder.down.1.downsample.conv.bias", 0, 1, TENSOR_NAMES_AS_IS},
        {TENSOR_NAMES_VAE, TENSOR_NAMES_BFL, "decoder.mid_block.attentions.0.to_out.0.weight",
         "decoder.mid.attn_1.proj_out.weight", 0, 1, TENSOR_NAMES_SQUEEZE},
        {TENSOR_NAMES_VAE, TENSOR_NAMES_BFL, "encoder.mid_block.resnets.1.norm2.bias", "encoder.mid.block_2.norm2.bias",
         0, 1, TENSOR_NAMES_AS_IS},
        {TENSOR_NAMES_VAE, TENSOR_NAMES_BFL, "quant_conv.weight", "encoder.quant_conv.weight", 0, 1,
         TENSOR_NAMES_AS_IS},
        {TENSOR_NAMES_VAE, TENSOR_NAMES_BFL, "bn.running_var", "bn.running_var", 0, 1, TENSOR_NAMES_AS_IS},
    };
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        struct tensor_names style = {pairs[i].part, pairs[i].scheme, ""};
        struct tensor_names_place p;
        assert_true(tensor_names_in_file(&p, &style, pairs[i].ours));
        assert_string_equal(p.name, pairs[i].theirs);
        assert_true(p.piece == pairs[i].piece && p.pieces == pairs[i].pieces && p.change == pairs[i].change);
    }
}

static void names_nobody_uses_have_no_place(void **state)
{
    (void)state;
    static const char *const wrong[] = {"",
                                        "x_embedder",
                                        "x_embedder.weight2",
                                        "transformer_blocks..attn.to_q.weight",
                                        "transformer_blocks.01.attn.to_q.weight",
                                        "transformer_blocks.-1.attn.to_q.weight",
                                        "transformer_blocks.99999999999999999999.attn.to_q.weight",
                                        "img_in.weight",
                                        "transformer_blocks.0.attn.to_q.bias",
                                        "decoder.up_blocks.0.resnets.0.norm3.weight"};
    struct tensor_names bfl = {TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_BFL, ""},
                        vae = {TENSOR_NAMES_VAE, TENSOR_NAMES_BFL, ""};
    struct tensor_names_place p[TENSOR_NAMES_PIECES_MAX];
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        assert_false(tensor_names_in_file(p, &bfl, wrong[i]));
        assert_false(tensor_names_in_file(p, &vae, wrong[i]));
    }
    assert_false(tensor_names_in_file(p, &vae, "decoder.up_blocks.4.resnets.0.conv1.weight")); /* 3 - 4 */
    assert_int_equal(tensor_names_of_file(p, &vae, "decoder.up.4.block.0.conv1.weight"), 0);
    assert_int_equal(tensor_names_of_file(p, &bfl, "x_embedder.weight"), 0);
    bfl.prefix = "model.diffusion_model.";
    assert_int_equal(tensor_names_of_file(p, &bfl, "img_in.weight"), 0);
    assert_int_equal(tensor_names_of_file(p, &bfl, "model.diffusion_model.img_in.weight"), 1);
    char long_name[TENSOR_NAMES_BYTES_MAX + 8];
    memset(long_name, 'a', sizeof long_name);
    long_name[sizeof long_name - 1] = 0;
    struct tensor_names own = {TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_DIFFUSERS, ""};
    assert_false(tensor_names_in_file(p, &own, long_name));
    assert_int_equal(tensor_names_linears(p, long_name, false), 0);
}

static bool is_that(const void *files, const char *name)
{
    return strcmp(files, name) == 0;
}

static void files_are_recognised_by_a_tensor(void **state)
{
    (void)state;
    static const struct {
        const char *tensor;
        enum tensor_names_part part;
        enum tensor_names_scheme scheme;
        const char *prefix;
    } files[] = {
        {"x_embedder.weight", TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_DIFFUSERS, ""},
        {"img_in.weight", TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_BFL, ""},
        {"model.diffusion_model.img_in.weight", TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_BFL, "model.diffusion_model."},
        {"diffusion_model.x_embedder.weight", TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_DIFFUSERS, "diffusion_model."},
        {"model.embed_tokens.weight", TENSOR_NAMES_TEXT_ENCODER, TENSOR_NAMES_DIFFUSERS, ""},
        {"text_encoders.qwen3_4b.transformer.model.embed_tokens.weight", TENSOR_NAMES_TEXT_ENCODER,
         TENSOR_NAMES_DIFFUSERS, "text_encoders.qwen3_4b.transformer."},
        {"embed_tokens.weight", TENSOR_NAMES_TEXT_ENCODER, TENSOR_NAMES_BARE, ""},
        {"token_embd.weight", TENSOR_NAMES_TEXT_ENCODER, TENSOR_NAMES_LLAMA, ""},
        {"decoder.conv_norm_out.weight", TENSOR_NAMES_VAE, TENSOR_NAMES_DIFFUSERS, ""},
        {"first_stage_model.decoder.norm_out.weight", TENSOR_NAMES_VAE, TENSOR_NAMES_BFL, "first_stage_model."},
    };
    struct tensor_names found;
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        assert_true(tensor_names_detect(&found, files[i].part, is_that, files[i].tensor));
        assert_int_equal(found.scheme, files[i].scheme);
        assert_string_equal(found.prefix, files[i].prefix);
    }
    assert_false(tensor_names_detect(&found, TENSOR_NAMES_TRANSFORMER, is_that, "model.embed_tokens.weight"));
    assert_false(
        tensor_names_detect(&found, TENSOR_NAMES_TRANSFORMER, is_that, "input_blocks.0.0.weight")); /* another model */
}

static void modules_of_adapters_are_found_in_either_scheme(void **state)
{
    (void)state;
    static const struct {
        const char *module;
        bool is_flat;
        int count;
        const char *first;
        int pieces;
    } modules[] = {
        {"double_blocks.1.img_attn.qkv", false, 3, "transformer_blocks.1.attn.to_q.weight", 3},
        {"double_blocks_1_img_attn_qkv", true, 3, "transformer_blocks.1.attn.to_q.weight", 3},
        {"transformer_blocks.1.attn.to_out.0", false, 1, "transformer_blocks.1.attn.to_out.0.weight", 1},
        {"single_transformer_blocks_12_attn_to_qkv_mlp_proj", true, 1,
         "single_transformer_blocks.12.attn.to_qkv_mlp_proj.weight", 1},
        {"single_blocks_0_linear2", true, 1, "single_transformer_blocks.0.attn.to_out.weight", 1},
        {"norm_out.linear", false, 1, "norm_out.linear.weight", 1},
        {"final_layer_adaLN_modulation_1", true, 1, "norm_out.linear.weight", 1},
        {"transformer_blocks.1.attn.norm_q", false, 0, "", 0}, /* no linear */
        {"double_blocks_1_img_attn_qkv", false, 0, "", 0},
        {"double_blocks.1.img_attn.qkv", true, 0, "", 0},
    };
    for (size_t i = 0; i < sizeof modules / sizeof *modules; i++) {
        struct tensor_names_place p[TENSOR_NAMES_PIECES_MAX];
        assert_int_equal(tensor_names_linears(p, modules[i].module, modules[i].is_flat), modules[i].count);
        if (!modules[i].count)
            continue;
        assert_string_equal(p[0].name, modules[i].first);
        assert_int_equal(p[0].pieces, modules[i].pieces);
        bool is_bfl_final = strncmp(modules[i].module, "final", 5) == 0;
        assert_int_equal(p[0].change, is_bfl_final ? TENSOR_NAMES_SWAP_HALVES : TENSOR_NAMES_AS_IS);
    }
}

static void scales_beside_a_weight_are_named(void **state)
{
    (void)state;
    char name[TENSOR_NAMES_BYTES_MAX];
    assert_true(tensor_names_beside(name, "img_in.weight", TENSOR_NAMES_WEIGHT_SCALE, 0));
    assert_string_equal(name, "img_in.weight_scale");
    assert_true(tensor_names_beside(name, "img_in.weight", TENSOR_NAMES_INPUT_SCALE, 1));
    assert_string_equal(name, "img_in.scale_input");
    assert_true(tensor_names_beside(name, "img_in.weight", TENSOR_NAMES_QUANT_NOTE, 0));
    assert_string_equal(name, "img_in.comfy_quant");
    assert_false(tensor_names_beside(name, "img_in.weight", TENSOR_NAMES_WEIGHT_SCALE_2, 1));
    assert_false(tensor_names_beside(name, "img_in.weight", TENSOR_NAMES_WEIGHT_SCALE, 2));
    assert_false(tensor_names_beside(name, "img_in.bias", TENSOR_NAMES_WEIGHT_SCALE, 0));
    assert_false(tensor_names_beside(name, "weight", TENSOR_NAMES_WEIGHT_SCALE, 0));
}

/* --- real files ---------------------------------------------------------------------------------------------- */

static struct safetensors *open_part(const char *model, const char *part, const char *stem)
{
    char dir[256];
    struct safetensors *s;
    struct engine_error why;
    snprintf(dir, sizeof dir, "tests/golden/models/%s/%s", model, part);
    if (!safetensors_open(&s, dir, stem, &why))
        fail_msg("%s: %s", dir, why.text);
    return s;
}

static bool in_files(const void *files, const char *name)
{
    return safetensors_find(files, name) != NULL;
}

static void every_tensor_of_the_tiny_models_goes_there_and_back(void **state)
{
    (void)state;
    static const char *const models[] = {"pocket", "base", "kv"};
    static const struct {
        enum tensor_names_part part;
        const char *folder, *stem;
        enum tensor_names_scheme scheme;
    } parts[] = {{TENSOR_NAMES_TRANSFORMER, "transformer", "diffusion_pytorch_model", TENSOR_NAMES_BFL},
                 {TENSOR_NAMES_TEXT_ENCODER, "text_encoder", "model", TENSOR_NAMES_LLAMA},
                 {TENSOR_NAMES_TEXT_ENCODER, "text_encoder", "model", TENSOR_NAMES_BARE},
                 {TENSOR_NAMES_VAE, "vae", "diffusion_pytorch_model", TENSOR_NAMES_BFL}};
    static struct names n;
    for (size_t m = 0; m < 3; m++)
        for (size_t p = 0; p < 4; p++) {
            struct safetensors *s = open_part(models[m], parts[p].folder, parts[p].stem);
            struct tensor_names found;
            assert_true(tensor_names_detect(&found, parts[p].part, in_files, s));
            assert_true(found.scheme == TENSOR_NAMES_DIFFUSERS && !*found.prefix);
            n.count = 0;
            for (size_t i = 0; i < safetensors_count(s); i++)
                add(&n, "%s", safetensors_at(s, i)->name);
            expect_one_to_one(&n, &(struct tensor_names){parts[p].part, parts[p].scheme, ""});
            safetensors_close(s);
        }
}

static size_t bytes_of_bf16(uint16_t *to, const struct safetensors_entry *e)
{
    for (size_t i = 0; i < e->bytes / 4; i++) {
        float f;
        memcpy(&f, (const char *)e->data + 4 * i, 4);
        to[i] = tensor_bf16_of(f);
    }
    return e->bytes / 2;
}

/* A tensor of the single file, put together from pocket's as the table says. */
static size_t assemble(uint8_t *to, const struct safetensors *pocket, const struct tensor_names *bfl, const char *name)
{
    struct tensor_names_place p[TENSOR_NAMES_PIECES_MAX];
    int count = tensor_names_of_file(p, bfl, name);
    if (!count)
        fail_msg("'%s' is nothing we know", name);
    size_t bytes = 0;
    for (int i = 0; i < count; i++) {
        const struct safetensors_entry *e = safetensors_find(pocket, p[i].name);
        assert_non_null(e);
        assert_int_equal(p[i].piece, i);
        size_t part = bytes_of_bf16((uint16_t *)(void *)(to + bytes), e);
        if (p[i].change == TENSOR_NAMES_SWAP_HALVES) {
            uint8_t *half = malloc(part / 2);
            memcpy(half, to + bytes, part / 2);
            memcpy(to + bytes, to + bytes + part / 2, part / 2);
            memcpy(to + bytes + part / 2, half, part / 2);
            free(half);
        }
        bytes += part;
    }
    return bytes;
}

static void single_file_made_from_the_folder_has_the_golden_values(void **state)
{
    (void)state;
    json_error_t at;
    json_t *golden = json_load_file("tests/golden/files/bfl-bf16.json", 0, &at), *row;
    assert_non_null(golden);
    struct safetensors *pocket = open_part("pocket", "transformer", "diffusion_pytorch_model");
    struct tensor_names bfl = {TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_BFL, ""};
    uint8_t *data = malloc(1 << 20);
    const char *name;
    size_t tensors = 0;
    json_object_foreach(golden, name, row)
    {
        char hex[65];
        assert_true(digest_of(data, assemble(data, pocket, &bfl, name), hex));
        if (strcmp(hex, json_string_value(json_object_get(row, "sha256"))) != 0)
            fail_msg("'%s' has other values", name);
        tensors++;
    }
    assert_int_equal(tensors, 45);
    free(data);
    safetensors_close(pocket);
    json_decref(golden);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_transformer_tensor_has_one_place),
        cmocka_unit_test(shapes_add_up_to_the_published_parameters),
        cmocka_unit_test(every_text_encoder_tensor_has_one_place),
        cmocka_unit_test(every_vae_tensor_has_one_place),
        cmocka_unit_test(names_are_those_of_the_published_files),
        cmocka_unit_test(names_nobody_uses_have_no_place),
        cmocka_unit_test(files_are_recognised_by_a_tensor),
        cmocka_unit_test(modules_of_adapters_are_found_in_either_scheme),
        cmocka_unit_test(scales_beside_a_weight_are_named),
        cmocka_unit_test(every_tensor_of_the_tiny_models_goes_there_and_back),
        cmocka_unit_test(single_file_made_from_the_folder_has_the_golden_values),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
