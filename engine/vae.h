/* vae.h - from the last latents to a picture: denormalise, unpatchify, decode; and for reference images the way back:
 * encode, patchify, normalise (engine-spec 7).
 *
 * Everything is channels last, [b, h, w, c]. A picture from text needs no encoder: it is loaded apart. */
#ifndef KILN_VAE_H
#define KILN_VAE_H

#include "model_config.h"
#include "weights.h"

#define VAE_LEVELS 4
#define VAE_RESNETS_MAX (MODEL_CONFIG_LAYERS_PER_BLOCK_MAX + 1)
#define VAE_SCALE 8      /* picture pixels per latent pixel, each way */

struct vae_norm {        /* group norm */
    struct tensor weight, bias; /* [c] */
};
struct vae_resnet {
    int64_t in, out;                                /* channels */
    struct vae_norm norm1, norm2;
    const struct kern_weight *conv1, *conv2;        /* [out, in, 3, 3], [out, out, 3, 3] */
    const struct kern_weight *shortcut;             /* [out, in, 1, 1]; NULL when in == out */
};
struct vae_attention {
    struct vae_norm norm;
    const struct kern_weight *q, *k, *v, *out;      /* [c, c] */
};
struct vae_level {
    struct vae_resnet resnets[VAE_RESNETS_MAX];     /* layers_per_block + 1 of them */
    const struct kern_weight *upsample;             /* [c, c, 3, 3]; NULL in the last level */
};

struct vae_encoder_level {
    struct vae_resnet resnets[MODEL_CONFIG_LAYERS_PER_BLOCK_MAX]; /* layers_per_block of them */
    const struct kern_weight *downsample;           /* [c, c, 3, 3]; NULL in the last level */
};
struct vae_encoder {
    const struct kern_weight *conv_in;              /* [c, 3, 3, 3] */
    struct vae_encoder_level levels[VAE_LEVELS];
    struct vae_resnet mid[2];
    struct vae_attention attention;
    struct vae_norm norm_out;
    const struct kern_weight *conv_out, *quant;     /* [2 latent, c, 3, 3]; 1x1. The mean, then the logarithm of the variance */
};

struct vae_weights {
    struct tensor mean, std;                        /* [4 * latent_channels], of the batch norm */
    const struct kern_weight *post_quant, *conv_in; /* 1x1; 3x3 */
    struct vae_resnet mid[2];
    struct vae_attention attention;
    struct vae_level levels[VAE_LEVELS];
    struct vae_norm norm_out;
    const struct kern_weight *conv_out;             /* [3, c, 3, 3] */
};

/* vae_load names what is taken; weights_done tells how it went. The pool owns everything. */
void vae_load(struct vae_weights *ret, const struct vae_config *c, struct weights *w);

void vae_load_encoder(struct vae_encoder *ret, const struct vae_config *c, struct weights *w);

/* vae_latents: out [b, 2 grid_h, 2 grid_w, 32] = tokens [b, grid_h * grid_w, 128], denormalised and unpatchified. */
void vae_latents(struct kern *k, const struct vae_weights *w, struct tensor out, struct tensor tokens);

/* vae_decode: image [b, 8h, 8w, 3], about -1 to 1, of latents [b, h, w, 32]. */
void vae_decode(struct kern *k, const struct vae_config *c, const struct vae_weights *w, struct tensor image,
                struct tensor latents);

/* vae_encode: latents [b, h, w, 32] of an image [b, 8h, 8w, 3] in -1 to 1: the mean of the distribution, nothing drawn. */
void vae_encode(struct kern *k, const struct vae_config *c, const struct vae_encoder *w, struct tensor latents,
                struct tensor image);

/* vae_tokens: tokens [b, h * w / 4, 128] of latents [b, h, w, 32]: patchified, then normalised. The inverse of vae_latents. */
void vae_tokens(struct kern *k, const struct vae_weights *w, struct tensor tokens, struct tensor latents);

#endif
