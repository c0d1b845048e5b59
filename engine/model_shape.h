/* model_shape.h - the dimensions of a part told from its tensors, for files that come without config.json.
 *
 * Every size that is an extent of some tensor is read there; what no tensor shows is fixed in the family: rotary base
 * (2000; text encoder 1e6), epsilons, axes of a quarter of the head each, 32 groups in the VAE's norms. A GGUF text encoder
 * says its rotary base and epsilon itself. All sizes have the bounds of model_config.c; a file of another architecture is
 * refused by the first tensor that is missing or has another extent. */
#ifndef KILN_MODEL_SHAPE_H
#define KILN_MODEL_SHAPE_H

#include "model_config.h"
#include "weight_files.h"

bool model_shape_transformer(struct transformer_config *ret, const struct weight_files *f, struct engine_error *why);
bool model_shape_text_encoder(struct text_encoder_config *ret, const struct weight_files *f, struct engine_error *why);
bool model_shape_vae(struct vae_config *ret, const struct weight_files *f, struct engine_error *why);

#endif
