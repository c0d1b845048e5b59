/* model_parts.h - which files a model is made of, opened, and what they say it is: configuration and variant.
 *
 * A part comes from the model folder or from a file or folder of its own. The model folder has it as a folder (diffusers layout) or
 * as a file of its name: transformer.safetensors, text_encoder.gguf; a link will do. The folder's parts have their config.json. A file's
 * dimensions are those of the config.json beside it, if that is one of this part, else those of its tensors. index and
 * scheduler belong to the transformer: with a transformer from elsewhere, they are told again (model_variant.h). */
#ifndef KILN_MODEL_PARTS_H
#define KILN_MODEL_PARTS_H

#include "engine.h"
#include "model_config.h"
#include "model_file.h"
#include "weight_files.h"

struct model_parts {
    struct model_config config;
    struct weight_files *files[3];              /* by enum tensor_names_part */
    char tokenizer_dir[MODEL_FILE_PATH_MAX];
};

/* model_parts_open reads headers and metadata only. model_parts_close accepts a zeroed struct, and files that were taken
 * out (set to NULL). */
bool model_parts_open(struct model_parts *ret, const struct engine_options *options, struct engine_error *why);
void model_parts_close(struct model_parts *p);

/* model_parts_config: the dimensions of one part from a file or folder of its own. */
bool model_parts_config(struct model_config *c, enum tensor_names_part part, const char *path, const struct weight_files *files,
                        struct engine_error *why);

const char *model_parts_name(enum tensor_names_part part); /* "text_encoder" */

#endif
