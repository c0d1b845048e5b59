/* vae.c - the decoder: a middle with one attention, then four levels, three of which double the picture; the encoder: four
 * levels, three of which halve it, then the same middle.
 *
 * Memory is three slots, each as large as the largest tensor that ever stands in it. The picture so far is always
 * in slot 0; a residual block works in slots 1 and 2 and adds into 0:
 *
 *   slot 0   x ------------------------------------ + --> x        or shortcut(x) in slot 1, added into 0
 *   slot 1     norm1,silu        norm2,silu         |
 *   slot 2               conv1              conv2 --+ */
#include "vae.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define NORM_EPS 1e-6f /* of every group norm; the config's batch_norm_eps is another one */

/* --- weights -------------------------------------------------------------------------------------- */

static struct vae_norm load_norm(struct weights *w, int64_t channels, const char *name)
{
    return (struct vae_norm){weights_vector(w, channels, "%s.weight", name), weights_vector(w, channels, "%s.bias", name)};
}

static void load_resnet(struct vae_resnet *ret, struct weights *w, int64_t in, int64_t out, const char *name)
{
    char part[128];
    ret->in = in, ret->out = out;
    snprintf(part, sizeof part, "%s.norm1", name);
    ret->norm1 = load_norm(w, in, part);
    ret->conv1 = weights_conv_bias(w, out, in, 3, "%s.conv1", name);
    snprintf(part, sizeof part, "%s.norm2", name);
    ret->norm2 = load_norm(w, out, part);
    ret->conv2 = weights_conv_bias(w, out, out, 3, "%s.conv2", name);
    ret->shortcut = in == out ? NULL : weights_conv_bias(w, out, in, 1, "%s.conv_shortcut", name);
}

static void load_attention(struct vae_attention *ret, struct weights *w, int64_t channels, const char *name)
{
    char part[128];
    snprintf(part, sizeof part, "%s.group_norm", name);
    ret->norm = load_norm(w, channels, part);
    ret->q = weights_linear_bias(w, channels, channels, "%s.to_q", name);
    ret->k = weights_linear_bias(w, channels, channels, "%s.to_k", name);
    ret->v = weights_linear_bias(w, channels, channels, "%s.to_v", name);
    ret->out = weights_linear_bias(w, channels, channels, "%s.to_out.0", name);
}

/* The file holds the variance; std = sqrt(var + eps) in the compute dtype, each of the two steps rounded. */
static void load_batch_norm(struct vae_weights *ret, const struct vae_config *c, struct weights *w)
{
    int64_t n = 4 * (int64_t)c->latent_channels;
    ret->mean = weights_vector(w, n, "bn.running_mean");
    ret->std = weights_vector(w, n, "bn.running_var");
    if (w->failed)
        return;
    float *value = calloc((size_t)n, sizeof *value); /* a dry backend has none to read */
    if (!value) {
        w->failed = true;
        engine_error_set(&w->why, ENGINE_NO_MEMORY, "no memory for %lld batch norm statistics", (long long)n);
        return;
    }
    bool rounds = w->dtype == TENSOR_BF16;
    kern_read(w->kern, tensor_1d(value, TENSOR_F32, n), ret->std);
    for (int64_t i = 0; i < n; i++) {
        float sum = value[i] + c->batch_norm_eps;
        if (!(sum > 0) && !w->failed && !kern_is_dry(w->kern)) {
            w->failed = true;
            engine_error_set(&w->why, ENGINE_BAD_MODEL, "vae: tensor 'bn.running_var' has the variance %g at %lld", (double)value[i],
                             (long long)i);
        }
        value[i] = sqrtf(rounds ? tensor_f32_of(tensor_bf16_of(sum)) : sum);
    }
    kern_write(w->kern, ret->std, tensor_1d(value, TENSOR_F32, n));
    free(value);
}

static int64_t level_channels(const struct vae_config *c, int level)
{
    return c->decoder_block_out_channels[VAE_LEVELS - 1 - level];
}

static void load_level(struct vae_level *ret, const struct vae_config *c, struct weights *w, int level)
{
    int64_t out = level_channels(c, level), in = level ? level_channels(c, level - 1) : out;
    char name[128];
    assert(c->layers_per_block + 1 <= VAE_RESNETS_MAX);
    for (int i = 0; i <= c->layers_per_block; i++) {
        snprintf(name, sizeof name, "decoder.up_blocks.%d.resnets.%d", level, i);
        load_resnet(&ret->resnets[i], w, i ? out : in, out, name);
    }
    ret->upsample = level == VAE_LEVELS - 1
                        ? NULL
                        : weights_conv_bias(w, out, out, 3, "decoder.up_blocks.%d.upsamplers.0.conv", level);
}

void vae_load(struct vae_weights *ret, const struct vae_config *c, struct weights *w)
{
    int64_t latent = c->latent_channels, deep = level_channels(c, 0), last = level_channels(c, VAE_LEVELS - 1);
    load_batch_norm(ret, c, w);
    ret->post_quant = weights_conv_bias(w, latent, latent, 1, "post_quant_conv");
    ret->conv_in = weights_conv_bias(w, deep, latent, 3, "decoder.conv_in");
    load_resnet(&ret->mid[0], w, deep, deep, "decoder.mid_block.resnets.0");
    load_attention(&ret->attention, w, deep, "decoder.mid_block.attentions.0");
    load_resnet(&ret->mid[1], w, deep, deep, "decoder.mid_block.resnets.1");
    for (int level = 0; level < VAE_LEVELS; level++)
        load_level(&ret->levels[level], c, w, level);
    ret->norm_out = load_norm(w, last, "decoder.conv_norm_out");
    ret->conv_out = weights_conv_bias(w, 3, last, 3, "decoder.conv_out");
}

void vae_load_encoder(struct vae_encoder *ret, const struct vae_config *c, struct weights *w)
{
    int64_t first = c->block_out_channels[0], deep = c->block_out_channels[VAE_LEVELS - 1], twice = 2 * (int64_t)c->latent_channels;
    char name[128];
    assert(c->layers_per_block <= MODEL_CONFIG_LAYERS_PER_BLOCK_MAX);
    for (int level = 0; level < VAE_LEVELS && !w->failed; level++)
        if (c->block_out_channels[level] % c->norm_num_groups) {
            w->failed = true;
            engine_error_set(&w->why, ENGINE_BAD_MODEL, "vae: %d channels are no multiple of %d groups", c->block_out_channels[level],
                             c->norm_num_groups);
        }
    ret->conv_in = weights_conv_bias(w, first, 3, 3, "encoder.conv_in");
    for (int level = 0; level < VAE_LEVELS; level++) {
        int64_t out = c->block_out_channels[level], in = level ? c->block_out_channels[level - 1] : out;
        for (int i = 0; i < c->layers_per_block; i++) {
            snprintf(name, sizeof name, "encoder.down_blocks.%d.resnets.%d", level, i);
            load_resnet(&ret->levels[level].resnets[i], w, i ? out : in, out, name);
        }
        if (level < VAE_LEVELS - 1)
            ret->levels[level].downsample = weights_conv_bias(w, out, out, 3, "encoder.down_blocks.%d.downsamplers.0.conv", level);
    }
    load_resnet(&ret->mid[0], w, deep, deep, "encoder.mid_block.resnets.0");
    load_attention(&ret->attention, w, deep, "encoder.mid_block.attentions.0");
    load_resnet(&ret->mid[1], w, deep, deep, "encoder.mid_block.resnets.1");
    ret->norm_out = load_norm(w, deep, "encoder.conv_norm_out");
    ret->conv_out = weights_conv_bias(w, twice, deep, 3, "encoder.conv_out");
    ret->quant = weights_conv_bias(w, twice, twice, 1, "quant_conv");
}

/* --- state ------------------------------------------------------------------------------------------ */

struct vae_state {
    int64_t batch, h, w;     /* of the picture so far */
    int groups;
    struct tensor slot[3];   /* flat arena memory */
    struct tensor x;         /* [b, h, w, c], in slot 0 */
};

static int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static void plan(struct kern *k, struct vae_state *s, const struct vae_config *c, struct tensor latents)
{
    int64_t pixels = latents.shape[0] * latents.shape[1] * latents.shape[2], deep = level_channels(c, 0);
    int64_t count[3] = {pixels * deep, pixels * larger(deep, c->latent_channels), pixels * deep};
    *s = (struct vae_state){.batch = latents.shape[0], .h = latents.shape[1], .w = latents.shape[2],
                            .groups = c->norm_num_groups};
    for (int level = 0; level < VAE_LEVELS; level++) {
        int64_t out = level_channels(c, level), in = level ? level_channels(c, level - 1) : out;
        count[0] = larger(count[0], pixels * larger(in, out));
        count[1] = larger(count[1], pixels * larger(in, out));
        count[2] = larger(count[2], pixels * out);
        if (level < VAE_LEVELS - 1) {
            pixels *= 4;
            count[0] = larger(count[0], pixels * out);
            count[1] = larger(count[1], pixels * out);
        }
    }
    for (int i = 0; i < 3; i++)
        s->slot[i] = kern_temp(k, latents.dtype, 1, &count[i]);
}

/* A picture of `channels` at the present size, in a slot. */
static struct tensor picture(const struct vae_state *s, int slot, int64_t channels)
{
    int64_t shape[4] = {s->batch, s->h, s->w, channels};
    return tensor_shape(tensor_slice(s->slot[slot], 0, 0, s->batch * s->h * s->w * channels), 4, shape);
}

/* --- blocks ------------------------------------------------------------------------------------------- */

static void norm_silu(struct kern *k, const struct vae_state *s, struct tensor out, struct tensor x,
                      const struct vae_norm *w)
{
    kern_group_norm(k, out, x, w->weight, w->bias, s->groups, NORM_EPS, true);
}

static void resnet(struct kern *k, struct vae_state *s, const struct vae_resnet *w)
{
    struct tensor wide = picture(s, 1, w->in), a = picture(s, 1, w->out), b = picture(s, 2, w->out);
    norm_silu(k, s, wide, s->x, &w->norm1);
    kern_conv2d(k, b, wide, w->conv1, 1, 1);
    norm_silu(k, s, a, b, &w->norm2);
    kern_conv2d(k, b, a, w->conv2, 1, 1);
    if (!w->shortcut) {
        kern_add(k, s->x, s->x, b);
        return;
    }
    kern_conv2d(k, a, s->x, w->shortcut, 1, 0);
    s->x = picture(s, 0, w->out);
    kern_add(k, s->x, a, b);
}

/* One head over all positions of a picture. */
static void attention(struct kern *k, struct vae_state *s, const struct vae_attention *w)
{
    int64_t c = s->x.shape[3], positions = s->h * s->w, rows = s->batch * positions;
    int64_t heads[4] = {s->batch, positions, 1, c};
    size_t mark = kern_mark(k);
    struct tensor normed = picture(s, 1, c);
    struct tensor q = kern_temp(k, s->x.dtype, 4, heads), key = kern_temp(k, s->x.dtype, 4, heads);
    struct tensor value = kern_temp(k, s->x.dtype, 4, heads);
    struct tensor mixed = tensor_shape(picture(s, 2, c), 4, heads), flat = tensor_rows(normed);

    kern_group_norm(k, normed, s->x, w->norm.weight, w->norm.bias, s->groups, NORM_EPS, false);
    kern_linear(k, tensor_shape(q, 2, (int64_t[]){rows, c}), flat, w->q);
    kern_linear(k, tensor_shape(key, 2, (int64_t[]){rows, c}), flat, w->k);
    kern_linear(k, tensor_shape(value, 2, (int64_t[]){rows, c}), flat, w->v);
    kern_attention(k, mixed, q, key, value, 1.0f / sqrtf((float)c), (struct kern_mask){0});
    kern_linear(k, flat, tensor_shape(mixed, 2, (int64_t[]){rows, c}), w->out);
    kern_add(k, s->x, s->x, normed);
    kern_rewind(k, mark);
}

static void upsample(struct kern *k, struct vae_state *s, const struct kern_weight *conv)
{
    struct tensor x = s->x;
    s->h *= 2, s->w *= 2;
    kern_upsample2(k, picture(s, 1, x.shape[3]), x);
    s->x = picture(s, 0, x.shape[3]);
    kern_conv2d(k, s->x, picture(s, 1, x.shape[3]), conv, 1, 1);
}

void vae_latents(struct kern *k, const struct vae_weights *w, struct tensor out, struct tensor tokens)
{
    kern_unpatchify(k, out, tokens, w->mean, w->std);
}

void vae_decode(struct kern *k, const struct vae_config *c, const struct vae_weights *w, struct tensor image,
                struct tensor latents)
{
    struct vae_state s;
    size_t mark = kern_mark(k);
    plan(k, &s, c, latents);
    kern_conv2d(k, picture(&s, 1, c->latent_channels), latents, w->post_quant, 1, 0);
    s.x = picture(&s, 0, level_channels(c, 0));
    kern_conv2d(k, s.x, picture(&s, 1, c->latent_channels), w->conv_in, 1, 1);
    resnet(k, &s, &w->mid[0]);
    attention(k, &s, &w->attention);
    resnet(k, &s, &w->mid[1]);
    for (int level = 0; level < VAE_LEVELS; level++) {
        for (int i = 0; i <= c->layers_per_block; i++)
            resnet(k, &s, &w->levels[level].resnets[i]);
        if (w->levels[level].upsample)
            upsample(k, &s, w->levels[level].upsample);
    }
    norm_silu(k, &s, picture(&s, 1, s.x.shape[3]), s.x, &w->norm_out);
    kern_conv2d(k, image, picture(&s, 1, s.x.shape[3]), w->conv_out, 1, 1);
    kern_rewind(k, mark);
}

/* --- encoder -------------------------------------------------------------------------------------------- */

/* All three slots are as large as the largest tensor: the picture changes slots when it is halved. */
static void plan_encoder(struct kern *k, struct vae_state *s, const struct vae_config *c, struct tensor image)
{
    int64_t pixels = image.shape[0] * image.shape[1] * image.shape[2];
    int64_t count = pixels / (VAE_SCALE * VAE_SCALE) * 2 * c->latent_channels;
    *s = (struct vae_state){.batch = image.shape[0], .h = image.shape[1], .w = image.shape[2], .groups = c->norm_num_groups};
    for (int level = 0; level < VAE_LEVELS; level++) {
        int64_t out = c->block_out_channels[level], in = level ? c->block_out_channels[level - 1] : out;
        count = larger(count, (pixels >> 2 * level) * larger(in, out));
    }
    for (int i = 0; i < 3; i++)
        s->slot[i] = kern_temp(k, image.dtype, 1, &count);
}

/* Zeros stand at the right and at the bottom only: windows begin at even pixels, and the last reaches one beyond the picture. */
static void downsample(struct kern *k, struct vae_state *s, const struct kern_weight *conv)
{
    struct tensor x = s->x, old = s->slot[0];
    s->h /= 2, s->w /= 2;
    s->x = picture(s, 1, x.shape[3]);
    kern_conv2d(k, s->x, x, conv, 2, 0);
    s->slot[0] = s->slot[1], s->slot[1] = old;
}

void vae_encode(struct kern *k, const struct vae_config *c, const struct vae_encoder *w, struct tensor latents,
                struct tensor image)
{
    struct vae_state s;
    size_t mark = kern_mark(k);
    plan_encoder(k, &s, c, image);
    s.x = picture(&s, 0, c->block_out_channels[0]);
    kern_conv2d(k, s.x, image, w->conv_in, 1, 1);
    for (int level = 0; level < VAE_LEVELS; level++) {
        for (int i = 0; i < c->layers_per_block; i++)
            resnet(k, &s, &w->levels[level].resnets[i]);
        if (w->levels[level].downsample)
            downsample(k, &s, w->levels[level].downsample);
    }
    resnet(k, &s, &w->mid[0]);
    attention(k, &s, &w->attention);
    resnet(k, &s, &w->mid[1]);
    struct tensor normed = picture(&s, 1, s.x.shape[3]), both = picture(&s, 2, 2 * c->latent_channels);
    norm_silu(k, &s, normed, s.x, &w->norm_out);
    kern_conv2d(k, both, normed, w->conv_out, 1, 1);
    struct tensor quantised = picture(&s, 0, 2 * c->latent_channels);
    kern_conv2d(k, quantised, both, w->quant, 1, 0);
    kern_copy(k, latents, tensor_slice(quantised, 3, 0, c->latent_channels));
    kern_rewind(k, mark);
}

void vae_tokens(struct kern *k, const struct vae_weights *w, struct tensor tokens, struct tensor latents)
{
    kern_patchify(k, tokens, latents, w->mean, w->std);
}
