/* list_hash.h - a number that two different lists of numbers hardly share: FNV-1a, 32 bits at a time.
 * Ids of a prompt are found by it, and ranks of a team compare their checksums by it. */
#ifndef KILN_LIST_HASH_H
#define KILN_LIST_HASH_H

#include <stdint.h>

static inline uint64_t list_hash(const int32_t *list, int64_t count)
{
    uint64_t hash = 14695981039346656037u;
    for (int64_t i = 0; i < count; i++)
        hash = (hash ^ (uint32_t)list[i]) * 1099511628211u;
    return hash;
}

#endif
