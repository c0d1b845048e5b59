/* fuzz_model_config.c - any text is a config within the bounds the engine relies on, or refused with a sentence. First
 * byte: which of the five files it is. */
#include "model_config.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(bool condition)
{
    if (!condition)
        abort();
}

/* What the model's code divides by, indexes with or allocates. */
static void check(const struct model_config *c, enum model_config_file file)
{
    const struct text_encoder_config *text = &c->text;
    const struct transformer_config *t = &c->transformer;
    const struct vae_config *v = &c->vae;
    if (file == MODEL_CONFIG_INDEX)
        must(strlen(c->pipeline) < sizeof c->pipeline && c->pipeline[0]);
    if (file == MODEL_CONFIG_TEXT_ENCODER) {
        must(text->num_attention_heads % text->num_key_value_heads == 0 && text->head_dim % 2 == 0 && text->head_dim <= 512);
        must(text->num_hidden_layers >= MODEL_CONFIG_TEXT_LAYERS && text->hidden_size <= 16384 && text->vocab_size <= 4000000);
        must(text->rms_norm_eps > 0 && text->rope_theta >= 1);
    }
    if (file == MODEL_CONFIG_TRANSFORMER) {
        must(t->hidden == t->num_attention_heads * t->attention_head_dim && t->hidden > 0 && t->mlp_hidden > 0);
        must(t->axes_dims_rope[0] + t->axes_dims_rope[1] + t->axes_dims_rope[2] + t->axes_dims_rope[3] == t->attention_head_dim);
        must(t->in_channels == 128 && t->timestep_guidance_channels % 2 == 0 && t->num_layers <= 256 && t->eps > 0);
    }
    for (int i = 0; file == MODEL_CONFIG_VAE && i < 4; i++)
        must(v->decoder_block_out_channels[i] > 0 && v->decoder_block_out_channels[i] % v->norm_num_groups == 0);
    must(file != MODEL_CONFIG_VAE || v->layers_per_block <= MODEL_CONFIG_LAYERS_PER_BLOCK_MAX);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct model_config c = {0};
    struct engine_error why = {0};
    if (size < 1)
        return 0;
    enum model_config_file file = data[0] % MODEL_CONFIG_FILES;
    if (model_config_parse(&c, file, (const char *)data + 1, size - 1, &why))
        check(&c, file);
    else
        must(why.text[0] && why.fault == ENGINE_BAD_MODEL);
    model_config_family(&c);
    model_config_licence(&c);
    return 0;
}
