/* model_config.c - JSON files to dimensions. A `reader` keeps the first complaint, so each parser is a list of fields
 * with their bounds; a missing key, a wrong type and a value out of bounds are all refused by name. */
#include "model_config.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model_file.h"

#define CONFIG_BYTES_MAX (1u << 20)
#define CONFIG_VALUES_MAX 10000u

const char *model_config_file_name(enum model_config_file file)
{
    static const char *const names[MODEL_CONFIG_FILES] = {"model_index.json", "text_encoder/config.json",
                                                          "transformer/config.json", "vae/config.json",
                                                          "scheduler/scheduler_config.json"};
    return names[file];
}

struct reader {
    json_t *root;
    const char *file;
    struct engine_error *why;
    bool failed;
};

__attribute__((format(printf, 2, 3))) static void complain(struct reader *r, const char *format, ...)
{
    if (r->failed)
        return;
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    engine_error_set(r->why, ENGINE_BAD_MODEL, "%s: %s", r->file, text);
    r->failed = true;
}

static struct reader reader_open(const char *file, const char *json, size_t bytes, struct engine_error *why)
{
    struct reader r = {.file = file, .why = why};
    r.root = model_file_json(json, bytes, CONFIG_VALUES_MAX, file, why);
    r.failed = !r.root;
    return r;
}

static int whole_of(struct reader *r, json_t *value, const char *key, int least, int most)
{
    if (r->failed)
        return least;
    json_int_t v = json_is_integer(value) ? json_integer_value(value) : 0;
    if (!json_is_integer(value))
        complain(r, "'%s' is %s, want a whole number", key, value ? "something else" : "missing");
    else if (v < least || v > most)
        complain(r, "'%s' is %lld, accepted: %d to %d", key, (long long)v, least, most);
    return r->failed ? least : (int)v;
}

static int whole(struct reader *r, const char *key, int least, int most)
{
    return whole_of(r, json_object_get(r->root, key), key, least, most);
}

static double number(struct reader *r, const char *key, double least, double most)
{
    if (r->failed)
        return least;
    json_t *value = json_object_get(r->root, key);
    double v = json_number_value(value);
    if (!json_is_number(value))
        complain(r, "'%s' is %s, want a number", key, value ? "something else" : "missing");
    else if (!(v >= least && v <= most))
        complain(r, "'%s' is %g, accepted: %g to %g", key, v, least, most);
    return r->failed ? least : v;
}

static void text_must_be(struct reader *r, const char *key, const char *want)
{
    const char *v = json_string_value(json_object_get(r->root, key));
    if (!v || strcmp(v, want) != 0)
        complain(r, "'%s' is %s%s%s, kiln renders %s only", key, v ? "'" : "", v ? v : "missing", v ? "'" : "", want);
}

/* A key whose only supported values are absent, null and false. */
static void must_be_off(struct reader *r, const char *key)
{
    json_t *v = json_object_get(r->root, key);
    if (v && !json_is_null(v) && !json_is_false(v))
        complain(r, "'%s' is set, which kiln does not support", key);
}

static void must_be_on(struct reader *r, const char *key)
{
    json_t *v = json_object_get(r->root, key);
    if (v && !json_is_true(v))
        complain(r, "'%s' is off, which kiln does not support", key);
}

static void list(struct reader *r, const char *key, int *ret, size_t count, int least, int most)
{
    json_t *value = json_object_get(r->root, key);
    if (!json_is_array(value) || json_array_size(value) != count) {
        complain(r, "'%s' is not a list of %zu numbers", key, count);
        return;
    }
    for (size_t i = 0; i < count; i++)
        ret[i] = whole_of(r, json_array_get(value, i), key, least, most);
}

/* --- the files -------------------------------------------------------------------------------------- */

static void parse_index(struct reader *r, struct model_config *c)
{
    const char *name = json_string_value(json_object_get(r->root, "_class_name"));
    const json_t *distilled = json_object_get(r->root, "is_distilled");
    bool is_kv = name && strcmp(name, "Flux2KleinKVPipeline") == 0;
    if (!is_kv && (!name || strcmp(name, "Flux2KleinPipeline") != 0))
        complain(r, "'_class_name' is %.100s, kiln renders Flux2KleinPipeline", name ? name : "missing");
    if (distilled && !json_is_boolean(distilled))
        complain(r, "'is_distilled' is neither true nor false");
    snprintf(c->pipeline, sizeof c->pipeline, "%s", name ? name : "");
    c->is_distilled = json_is_true(distilled) || is_kv; /* the KV pipeline knows no guidance; its index does not say so */
}

static void parse_text_encoder(struct reader *r, struct text_encoder_config *c)
{
    text_must_be(r, "model_type", "qwen3");
    text_must_be(r, "hidden_act", "silu");
    must_be_off(r, "rope_scaling");
    must_be_off(r, "attention_bias");
    must_be_off(r, "use_sliding_window");
    struct text_encoder_config t = {
        .hidden_size = whole(r, "hidden_size", 8, 16384),
        .intermediate_size = whole(r, "intermediate_size", 8, 65536),
        .num_hidden_layers = whole(r, "num_hidden_layers", MODEL_CONFIG_TEXT_LAYERS, 256),
        .num_attention_heads = whole(r, "num_attention_heads", 1, 256),
        .num_key_value_heads = whole(r, "num_key_value_heads", 1, 256),
        .head_dim = whole(r, "head_dim", 8, 512),
        .vocab_size = whole(r, "vocab_size", 256, 4000000),
        .rms_norm_eps = (float)number(r, "rms_norm_eps", 1e-12, 1e-2),
        .rope_theta = number(r, "rope_theta", 1, 1e12),
    };
    if (t.num_attention_heads % t.num_key_value_heads)
        complain(r, "%d heads are no multiple of %d key-value heads", t.num_attention_heads, t.num_key_value_heads);
    if (t.head_dim % 2)
        complain(r, "'head_dim' is %d, want an even number", t.head_dim);
    *c = t;
}

static void check_transformer(struct reader *r, struct transformer_config *t, double mlp_ratio)
{
    t->hidden = t->num_attention_heads * t->attention_head_dim;
    double mlp = mlp_ratio * t->hidden;
    t->mlp_hidden = (int)mlp;
    if (mlp != floor(mlp))
        complain(r, "'mlp_ratio' %g times the width %d is no whole number", mlp_ratio, t->hidden);
    int sum = 0;
    for (int i = 0; i < 4; i++) {
        sum += t->axes_dims_rope[i];
        if (t->axes_dims_rope[i] % 2)
            complain(r, "'axes_dims_rope' has the odd number %d", t->axes_dims_rope[i]);
    }
    if (sum != t->attention_head_dim)
        complain(r, "'axes_dims_rope' sums to %d, the head size is %d", sum, t->attention_head_dim);
    if (t->timestep_guidance_channels % 2)
        complain(r, "'timestep_guidance_channels' is odd");
}

static void parse_transformer(struct reader *r, struct transformer_config *c)
{
    text_must_be(r, "_class_name", "Flux2Transformer2DModel");
    must_be_off(r, "guidance_embeds");
    must_be_off(r, "out_channels");
    struct transformer_config t = {
        .num_attention_heads = whole(r, "num_attention_heads", 1, 256),
        .attention_head_dim = whole(r, "attention_head_dim", 8, 512),
        .num_layers = whole(r, "num_layers", 1, 256),
        .num_single_layers = whole(r, "num_single_layers", 1, 256),
        .joint_attention_dim = whole(r, "joint_attention_dim", 24, 65536),
        .in_channels = whole(r, "in_channels", 128, 128),
        .rope_theta = number(r, "rope_theta", 1, 1e12),
        .eps = (float)number(r, "eps", 1e-12, 1e-2),
        .timestep_guidance_channels = whole(r, "timestep_guidance_channels", 2, 4096),
    };
    whole(r, "patch_size", 1, 1);
    list(r, "axes_dims_rope", t.axes_dims_rope, 4, 0, 512);
    check_transformer(r, &t, number(r, "mlp_ratio", 0.5, 16));
    *c = t;
}

static void parse_vae(struct reader *r, struct vae_config *c)
{
    text_must_be(r, "_class_name", "AutoencoderKLFlux2");
    text_must_be(r, "act_fn", "silu");
    must_be_on(r, "use_post_quant_conv");
    must_be_on(r, "mid_block_add_attention");
    struct vae_config v = {
        .latent_channels = whole(r, "latent_channels", 32, 32),
        .layers_per_block = whole(r, "layers_per_block", 1, MODEL_CONFIG_LAYERS_PER_BLOCK_MAX),
        .norm_num_groups = whole(r, "norm_num_groups", 1, 256),
        .batch_norm_eps = (float)number(r, "batch_norm_eps", 0, 1e-1),
    };
    whole(r, "in_channels", 3, 3);
    whole(r, "out_channels", 3, 3);
    list(r, "block_out_channels", v.block_out_channels, 4, 4, 4096);
    memcpy(v.decoder_block_out_channels, v.block_out_channels, sizeof v.block_out_channels);
    json_t *decoder = json_object_get(r->root, "decoder_block_out_channels");
    if (decoder && !json_is_null(decoder))
        list(r, "decoder_block_out_channels", v.decoder_block_out_channels, 4, 4, 4096);
    for (int i = 0; i < 4; i++) /* only the decoder is loaded */
        if (v.decoder_block_out_channels[i] % v.norm_num_groups)
            complain(r, "%d channels are no multiple of %d groups", v.decoder_block_out_channels[i], v.norm_num_groups);
    *c = v;
}

/* Nothing of it is kept: what the engine does not compute is refused. */
static void check_scheduler(struct reader *r)
{
    text_must_be(r, "_class_name", "FlowMatchEulerDiscreteScheduler");
    text_must_be(r, "time_shift_type", "exponential");
    must_be_on(r, "use_dynamic_shifting");
    must_be_off(r, "invert_sigmas");
    must_be_off(r, "stochastic_sampling");
    must_be_off(r, "use_karras_sigmas");
    must_be_off(r, "use_exponential_sigmas");
    must_be_off(r, "use_beta_sigmas");
    must_be_off(r, "shift_terminal");
    whole(r, "num_train_timesteps", 1000, 1000);
}

/* --- a folder ------------------------------------------------------------------------------------------ */

/* The dimensions where one part's output is another's input. */
bool model_config_check(const struct model_config *c, struct engine_error *why)
{
    if (c->transformer.joint_attention_dim == MODEL_CONFIG_TEXT_TAPS * c->text.hidden_size)
        return true;
    return engine_error_set(why, ENGINE_BAD_MODEL,
                            "transformer/config.json: 'joint_attention_dim' is %d, but %d hidden states of the text encoder "
                            "are %d wide",
                            c->transformer.joint_attention_dim, MODEL_CONFIG_TEXT_TAPS,
                            MODEL_CONFIG_TEXT_TAPS * c->text.hidden_size);
}

bool model_config_parse(struct model_config *c, enum model_config_file file, const char *json, size_t bytes,
                        struct engine_error *why)
{
    struct reader r = reader_open(model_config_file_name(file), json, bytes, why);
    struct model_config read = *c;
    if (!r.failed && file == MODEL_CONFIG_INDEX)
        parse_index(&r, &read);
    else if (!r.failed && file == MODEL_CONFIG_TEXT_ENCODER)
        parse_text_encoder(&r, &read.text);
    else if (!r.failed && file == MODEL_CONFIG_TRANSFORMER)
        parse_transformer(&r, &read.transformer);
    else if (!r.failed && file == MODEL_CONFIG_VAE)
        parse_vae(&r, &read.vae);
    else if (!r.failed)
        check_scheduler(&r);
    json_decref(r.root);
    if (!r.failed)
        *c = read;
    return !r.failed;
}

bool model_config_read(struct model_config *c, enum model_config_file file, const char *path, struct engine_error *why)
{
    char *text;
    size_t bytes;
    if (!model_file_read(&text, &bytes, path, CONFIG_BYTES_MAX, why))
        return false;
    bool ok = model_config_parse(c, file, text, bytes, why);
    free(text);
    return ok;
}

bool model_config_is(enum model_config_file file, const char *path)
{
    static const struct { const char *key, *value; } marks[MODEL_CONFIG_FILES] = {
        [MODEL_CONFIG_INDEX] = {"_class_name", "Flux2Klein"},
        [MODEL_CONFIG_TEXT_ENCODER] = {"model_type", "qwen3"},
        [MODEL_CONFIG_TRANSFORMER] = {"_class_name", "Flux2Transformer2DModel"},
        [MODEL_CONFIG_VAE] = {"_class_name", "AutoencoderKLFlux2"},
        [MODEL_CONFIG_SCHEDULER] = {"_class_name", "FlowMatchEulerDiscreteScheduler"},
    };
    struct engine_error why;
    char *text;
    size_t bytes;
    if (!model_file_read(&text, &bytes, path, CONFIG_BYTES_MAX, &why))
        return false;
    json_t *root = model_file_json(text, bytes, CONFIG_VALUES_MAX, path, &why);
    const char *value = json_string_value(json_object_get(root, marks[file].key));
    bool is = value && strncmp(value, marks[file].value, strlen(marks[file].value)) == 0;
    json_decref(root);
    free(text);
    return is;
}

bool model_config_load(struct model_config *ret, const char *model_dir, struct engine_error *why)
{
    struct model_config c = {0};
    for (int i = 0; i < MODEL_CONFIG_FILES; i++) {
        enum model_config_file file = (enum model_config_file)i;
        char path[MODEL_FILE_PATH_MAX];
        if (!model_file_path(path, model_dir, model_config_file_name(file), why))
            return false;
        if (!model_config_read(&c, file, path, why))
            return i || access(path, F_OK) == 0 ? false : engine_error_at(why, "a model is a folder in the diffusers layout");
    }
    if (!model_config_check(&c, why))
        return false;
    *ret = c;
    return true;
}

/* engine-spec 1.1: the published shapes. */
const char *model_config_family(const struct model_config *c)
{
    const struct transformer_config *t = &c->transformer;
    if (t->hidden == 3072 && t->num_layers == 5 && t->num_single_layers == 20)
        return "klein-4b";
    if (t->hidden == 4096 && t->num_layers == 8 && t->num_single_layers == 24)
        return "klein-9b";
    return "klein-custom";
}

const char *model_config_licence(const struct model_config *c)
{
    const char *family = model_config_family(c);
    if (strcmp(family, "klein-4b") == 0)
        return "Apache-2.0";
    return strcmp(family, "klein-9b") == 0 ? "FLUX Non-Commercial" : "unknown";
}
