/* model_variant.h - distilled or base? The files look alike, so: the published file of this size, by hash where two have
 * the same or what follows says otherwise; the words of the file's name; the model_index.json it came with. What disagrees or says nothing is not guessed. */
#ifndef KILN_MODEL_VARIANT_H
#define KILN_MODEL_VARIANT_H

#include "engine_error.h"

struct model_variant { bool is_distilled, is_kv; };

typedef bool model_variant_sha256(const char *path, char ret_hex[65]);

/* model_variant_tell asks about the transformer at `path` (a file or folder); sha256 may be NULL: then hashes are not asked. */
bool model_variant_tell(struct model_variant *ret, const char *path, model_variant_sha256 *sha256, struct engine_error *why);

/* model_variant_of_name: by the words of a file name alone; false: it says nothing. */
bool model_variant_of_name(struct model_variant *ret, const char *name);

#endif
