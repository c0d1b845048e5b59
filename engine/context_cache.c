/* context_cache.c - a short list, searched from one end: 256 comparisons of a hash are nothing beside one encoding. */
#include "context_cache.h"

#include <stdlib.h>
#include <string.h>

#include "list_hash.h"

struct entry {
    uint64_t hash, used; /* used: the clock at the last use */
    int32_t ids[CONTEXT_CACHE_IDS];
    void *value;
};

struct context_cache {
    enum tensor_dtype dtype;
    int64_t rows, width;
    size_t value_bytes;
    size_t count, limit;
    uint64_t clock;
    struct entry *entries[CONTEXT_CACHE_ENTRIES_MAX];
};

struct context_cache *context_cache_new(enum tensor_dtype dtype, int64_t rows, int64_t width)
{
    struct context_cache *c = calloc(1, sizeof *c);
    if (!c)
        return NULL;
    c->dtype = dtype, c->rows = rows, c->width = width;
    c->value_bytes = (size_t)rows * (size_t)width * tensor_dtype_bytes(dtype);
    c->limit = CONTEXT_CACHE_BYTES_MAX / c->value_bytes;
    if (c->limit > CONTEXT_CACHE_ENTRIES_MAX)
        c->limit = CONTEXT_CACHE_ENTRIES_MAX;
    if (c->limit < 1)
        c->limit = 1;
    return c;
}

static void entry_free(struct entry *e)
{
    if (e)
        free(e->value);
    free(e);
}

void context_cache_free(struct context_cache *c)
{
    if (!c)
        return;
    for (size_t i = 0; i < c->count; i++)
        entry_free(c->entries[i]);
    free(c);
}

static struct tensor view(const struct context_cache *c, const struct entry *e)
{
    return tensor_2d(e->value, c->dtype, c->rows, c->width);
}

static struct entry *lookup(const struct context_cache *c, const int32_t *ids, uint64_t hash)
{
    for (size_t i = 0; i < c->count; i++)
        if (c->entries[i]->hash == hash && memcmp(c->entries[i]->ids, ids, sizeof c->entries[i]->ids) == 0)
            return c->entries[i];
    return NULL;
}

bool context_cache_find(struct context_cache *c, const int32_t ids[CONTEXT_CACHE_IDS], struct tensor *ret)
{
    struct entry *e = c ? lookup(c, ids, list_hash(ids, CONTEXT_CACHE_IDS)) : NULL;
    if (!e)
        return false;
    e->used = ++c->clock;
    *ret = view(c, e);
    return true;
}

static struct entry *oldest(const struct context_cache *c)
{
    struct entry *found = c->entries[0];
    for (size_t i = 1; i < c->count; i++)
        if (c->entries[i]->used < found->used)
            found = c->entries[i];
    return found;
}

static struct entry *new_entry(struct context_cache *c)
{
    struct entry *e = calloc(1, sizeof *e);
    void *value = malloc(c->value_bytes);
    if (!e || !value) {
        free(e);
        free(value);
        return NULL;
    }
    e->value = value;
    c->entries[c->count++] = e;
    return e;
}

struct tensor context_cache_add(struct context_cache *c, const int32_t ids[CONTEXT_CACHE_IDS])
{
    uint64_t hash = list_hash(ids, CONTEXT_CACHE_IDS);
    if (!c)
        return (struct tensor){0};
    struct entry *e = lookup(c, ids, hash);
    if (!e && c->count < c->limit)
        e = new_entry(c);
    if (!e && c->count)
        e = oldest(c);
    if (!e)
        return tensor_2d(NULL, c->dtype, c->rows, c->width);
    e->hash = hash;
    e->used = ++c->clock;
    memcpy(e->ids, ids, sizeof e->ids);
    return view(c, e);
}

size_t context_cache_bytes(const struct context_cache *c)
{
    return c ? c->count * c->value_bytes : 0;
}
