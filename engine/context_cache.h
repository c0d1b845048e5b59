/* context_cache.h - remembers the transformer's view of recent prompts: many seeds per prompt is the normal campaign.
 *
 * Key: the token ids. Value: the context, [512, hidden] in the compute dtype, kept in host memory. Bounded in entries and
 * bytes; the entry that was used longest ago makes room. */
#ifndef KILN_CONTEXT_CACHE_H
#define KILN_CONTEXT_CACHE_H

#include "tensor.h"

#define CONTEXT_CACHE_ENTRIES_MAX 256
#define CONTEXT_CACHE_BYTES_MAX (256u << 20)
#define CONTEXT_CACHE_IDS 512

struct context_cache; /* NULL is one that knows nothing and keeps nothing */

/* context_cache_new: for values of this shape and dtype. NULL when out of memory. */
struct context_cache *context_cache_new(enum tensor_dtype dtype, int64_t rows, int64_t width);
void context_cache_free(struct context_cache *cache); /* accepts NULL */

/* context_cache_find: true and a view of the value (the cache's, until the next context_cache_add) if these ids are known. */
bool context_cache_find(struct context_cache *cache, const int32_t ids[CONTEXT_CACHE_IDS], struct tensor *ret);

/* context_cache_add gives room for a new value, which the caller fills at once. NULL data when there is no memory: a cache
 * that cannot keep a value is slower, never wrong. */
struct tensor context_cache_add(struct context_cache *cache, const int32_t ids[CONTEXT_CACHE_IDS]);

size_t context_cache_bytes(const struct context_cache *cache);

#endif
