/* tally.h - how often was this seen before? A table of 128-bit hashes with a count each.
 *
 * Keys are halves of SHA-256: two different things do not meet in it. 24 bytes an entry, at most 3/4 full. */
#ifndef KILN_TALLY_H
#define KILN_TALLY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct tally_slot { uint64_t key[2]; uint32_t count; uint32_t mark; };
struct tally { /* start from {0} */
    struct tally_slot *slots;
    size_t count, room;
};

/* tally_add counts this key and returns its slot (count is 1 the first time), or NULL when out of memory. The
 * slot is good until the next call. `mark` is the caller's, 0 in a new slot. */
struct tally_slot *tally_add(struct tally *t, const uint8_t key[16]);
void tally_done(struct tally *t);

#endif
