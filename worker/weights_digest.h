/* weights_digest.h - the SHA-256 that pictures carry, of all weights they were made with, wherever the parts come from. */
#ifndef KILN_WEIGHTS_DIGEST_H
#define KILN_WEIGHTS_DIGEST_H

#include "engine.h"

/* weights_digest_of: of a model folder alone it is digest_model; with parts or adapters of their own, the digest of a list of
 * what there is and the digest of each. weights_digest_file is an engine_options.sha256. */
bool weights_digest_of(const struct engine_options *o, char ret_hex[65], char *why, size_t why_bytes);
bool weights_digest_file(const char *path, char ret_hex[65]);

#endif
