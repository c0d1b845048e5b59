/* weights_digest.h - the SHA-256 that pictures carry, of all weights they were made with, wherever the parts come from. */
#ifndef KILN_WEIGHTS_DIGEST_H
#define KILN_WEIGHTS_DIGEST_H

#include <pthread.h>
#include <stdatomic.h>

#include "engine.h"

/* weights_digest_of: of a model folder alone it is digest_model; with parts or adapters of their own, the digest of a list of
 * what there is and the digest of each; a part of the folder that another takes the place of is not there. adapters_hex: the
 * SHA-256 of the adapters' files, by who has read them; NULL without. weights_digest_file is an engine_options.sha256. */
bool weights_digest_of(const struct engine_options *o, const char *const *adapters_hex, char ret_hex[65], char *why, size_t why_bytes);
bool weights_digest_file(const char *path, char ret_hex[65]);

/* The same beside other work, on a thread of its own: 16 GB take a quarter of a minute, about as long as it takes to open them, and
 * both read the same pages. begin borrows o and the adapters' until end or drop; each begin has one of them. */
struct weights_digest_task {
    const struct engine_options *options;
    const char *const *adapters_hex;
    pthread_t thread;
    atomic_bool stop;
    bool ok;
    char hex[65], why[512];
};
bool weights_digest_begin(struct weights_digest_task *t, const struct engine_options *o, const char *const *adapters_hex, char *why,
                          size_t why_bytes);
bool weights_digest_end(struct weights_digest_task *t, char ret_hex[65], char *why, size_t why_bytes); /* waits */
void weights_digest_drop(struct weights_digest_task *t); /* nobody wants it any more */

#endif
