/* tally.c - open addressing with linear probing; a slot with count 0 is free. The key is a hash already. */
#include "tally.h"

#include <stdlib.h>
#include <string.h>

static struct tally_slot *find(struct tally_slot *slots, size_t room, const uint64_t key[2])
{
    size_t at = (size_t)key[0] & (room - 1);
    while (slots[at].count && (slots[at].key[0] != key[0] || slots[at].key[1] != key[1]))
        at = (at + 1) & (room - 1);
    return &slots[at];
}

static bool grow(struct tally *t)
{
    size_t room = t->room ? 2 * t->room : 1024;
    struct tally_slot *slots = calloc(room, sizeof *slots);
    if (!slots)
        return false;
    for (size_t i = 0; i < t->room; i++)
        if (t->slots[i].count)
            *find(slots, room, t->slots[i].key) = t->slots[i];
    free(t->slots);
    t->slots = slots;
    t->room = room;
    return true;
}

struct tally_slot *tally_add(struct tally *t, const uint8_t key[16])
{
    uint64_t words[2];
    memcpy(words, key, 16);
    if (4 * (t->count + 1) > 3 * t->room && !grow(t))
        return NULL;
    struct tally_slot *slot = find(t->slots, t->room, words);
    if (!slot->count) {
        memcpy(slot->key, words, 16);
        t->count++;
    }
    slot->count++;
    return slot;
}

void tally_done(struct tally *t)
{
    free(t->slots);
    *t = (struct tally){0};
}
