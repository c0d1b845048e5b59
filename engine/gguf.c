/* gguf.c - one pass over the head of a GGUF file, then checks of all tensors together.
 *
 *   "GGUF" u32 version  u64 tensors  u64 values
 *   values   x { text key, u32 type, value }            text: u64 length, bytes; array: u32 type, u64 count, values
 *   tensors  x { text name, u32 rank, u64 sizes[rank], u32 format, u64 offset }
 *   padding to `general.alignment` (32), then the data; offsets count from here
 *
 * Nothing in the file says how long the head is (a tokenizer makes it 6 MB), so a file is read in growing pieces: a
 * cursor that runs off the piece says so, and the pass starts again on a larger one. Metadata is not unpacked: each key
 * points at its bytes in the head, and is read, with checks, when someone asks. */
#include "gguf.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "model_file.h"

#define HEAD_BYTES_FIRST (1u << 20)
#define HEAD_BYTES_MAX (256u << 20)
#define TENSORS_MAX 100000u
#define VALUES_MAX 100000u
#define NAME_BYTES_MAX 512u
#define ALIGNMENT_MAX (1u << 20)

enum value_type { U8, I8, U16, I16, U32, I32, F32, BOOL, TEXT, ARRAY, U64, I64, F64, TYPE_COUNT };
static const uint8_t type_bytes[TYPE_COUNT] = {[U8] = 1, [I8] = 1, [U16] = 2, [I16] = 2, [U32] = 4, [I32] = 4, [F32] = 4,
                                               [BOOL] = 1, [U64] = 8, [I64] = 8, [F64] = 8};
static const char *const type_names[TYPE_COUNT] = {"u8", "i8", "u16", "i16", "u32", "i32", "f32", "a flag", "a text",
                                                   "an array", "u64", "i64", "f64"};

struct value {
    char *key;
    enum value_type type, item; /* item: of an array */
    uint64_t count;             /* of an array */
    const uint8_t *data;        /* in the head; a text: its bytes */
    char *text;                 /* TEXT: a copy with an end */
};

struct gguf {
    char *name;
    const uint8_t *data; /* the whole file */
    size_t bytes;
    bool is_mapped;
    uint8_t *head; /* of a mapped file: what was read of it */
    struct value *values;
    size_t value_count;
    struct gguf_entry *entries;
    size_t count;
};

static bool bad(const struct gguf *g, struct engine_error *why, const char *text)
{
    return engine_error_set(why, ENGINE_BAD_MODEL, "%s: %s", g->name, text);
}

static bool no_memory(struct engine_error *why)
{
    return engine_error_set(why, ENGINE_NO_MEMORY, "no memory for the table of tensors");
}

/* --- the cursor: reads fields, remembers that it ran out ------------------------------------------------- */

struct cursor {
    const uint8_t *data;
    size_t bytes, at;
    bool ran_out;
};

static const uint8_t *take(struct cursor *c, uint64_t bytes)
{
    if (c->ran_out || bytes > c->bytes - c->at) {
        c->ran_out = true;
        return NULL;
    }
    const uint8_t *p = c->data + c->at;
    c->at += (size_t)bytes;
    return p;
}

static uint64_t little_endian(const uint8_t *p, int bytes)
{
    uint64_t v = 0;
    for (int i = 0; i < bytes; i++)
        v |= (uint64_t)p[i] << (8 * i);
    return v;
}

static uint64_t take_whole(struct cursor *c, int bytes)
{
    const uint8_t *p = take(c, (uint64_t)bytes);
    return p ? little_endian(p, bytes) : 0;
}

/* A name or key: printable enough to stand in a message, without NUL. NULL when it is not, or when the cursor ran out. */
static char *take_name(struct cursor *c, const struct gguf *g, const char *what, struct engine_error *why)
{
    uint64_t length = take_whole(c, 8);
    if (c->ran_out)
        return NULL;
    if (length == 0 || length > NAME_BYTES_MAX) {
        engine_error_set(why, ENGINE_BAD_MODEL, "%s: a %s of %llu bytes, accepted: 1 to %u", g->name, what,
                         (unsigned long long)length, NAME_BYTES_MAX);
        return NULL;
    }
    const uint8_t *p = take(c, length);
    if (!p)
        return NULL;
    for (uint64_t i = 0; i < length; i++)
        if (p[i] < 0x20 || p[i] == 0x7f) {
            engine_error_set(why, ENGINE_BAD_MODEL, "%s: a %s with a control character in it", g->name, what);
            return NULL;
        }
    char *name = strndup((const char *)p, (size_t)length);
    if (!name)
        no_memory(why);
    return name;
}

/* --- metadata ---------------------------------------------------------------------------------------------- */

static bool skip_texts(struct cursor *c, uint64_t count)
{
    for (uint64_t i = 0; i < count && !c->ran_out; i++)
        take(c, take_whole(c, 8));
    return !c->ran_out;
}

static bool read_array(struct cursor *c, const struct gguf *g, struct value *v, struct engine_error *why)
{
    uint32_t item = (uint32_t)take_whole(c, 4);
    v->count = take_whole(c, 8);
    if (c->ran_out)
        return false;
    if (item >= TYPE_COUNT || item == ARRAY)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: value '%s': an array of type %u, accepted: 0 to 12 except 9",
                                g->name, v->key, item);
    v->item = (enum value_type)item;
    v->data = c->data + c->at;
    if (item == TEXT)
        return skip_texts(c, v->count);
    uint64_t bytes;
    if (__builtin_mul_overflow(v->count, (uint64_t)type_bytes[item], &bytes))
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: value '%s': its size overflows", g->name, v->key);
    return take(c, bytes) != NULL;
}

static bool read_text(struct cursor *c, struct value *v, struct engine_error *why)
{
    v->count = take_whole(c, 8);
    v->data = take(c, v->count);
    if (!v->data)
        return false;
    v->text = strndup((const char *)v->data, (size_t)v->count);
    return v->text || no_memory(why);
}

/* False without a message when the cursor ran out. */
static bool read_value(struct cursor *c, struct gguf *g, struct engine_error *why)
{
    struct value *v = &g->values[g->value_count];
    *v = (struct value){.key = take_name(c, g, "key", why)};
    if (!v->key)
        return false;
    g->value_count++;
    uint32_t type = (uint32_t)take_whole(c, 4);
    if (c->ran_out)
        return false;
    if (type >= TYPE_COUNT)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: value '%s': type %u, accepted: 0 to 12", g->name, v->key, type);
    v->type = (enum value_type)type;
    if (type == ARRAY)
        return read_array(c, g, v, why);
    if (type == TEXT)
        return read_text(c, v, why);
    v->data = take(c, type_bytes[type]);
    if (v->data && type == BOOL && *v->data > 1)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: value '%s': a flag of %u", g->name, v->key, *v->data);
    return v->data != NULL;
}

static int by_key(const void *a, const void *b)
{
    return strcmp(((const struct value *)a)->key, ((const struct value *)b)->key);
}

static bool sort_values(struct gguf *g, struct engine_error *why)
{
    qsort(g->values, g->value_count, sizeof *g->values, by_key);
    for (size_t i = 1; i < g->value_count; i++)
        if (strcmp(g->values[i - 1].key, g->values[i].key) == 0)
            return engine_error_set(why, ENGINE_BAD_MODEL, "%s: value '%s' occurs twice", g->name, g->values[i].key);
    return true;
}

static const struct value *find_value(const struct gguf *g, const char *key)
{
    struct value wanted = {.key = (char *)key};
    return g->value_count ? bsearch(&wanted, g->values, g->value_count, sizeof *g->values, by_key) : NULL;
}

static const struct value *want_value(const struct gguf *g, const char *key, struct engine_error *why)
{
    const struct value *v = find_value(g, key);
    if (!v)
        engine_error_set(why, ENGINE_BAD_MODEL, "%s: no value '%s'", g->name, key);
    return v;
}

static bool other_type(const struct gguf *g, const struct value *v, const char *want, struct engine_error *why)
{
    return engine_error_set(why, ENGINE_BAD_MODEL, "%s: value '%s' is %s, want %s", g->name, v->key, type_names[v->type], want);
}

bool gguf_has(const struct gguf *g, const char *key)
{
    return find_value(g, key) != NULL;
}

bool gguf_text(const struct gguf *g, const char **ret, const char *key, struct engine_error *why)
{
    const struct value *v = want_value(g, key, why);
    if (!v)
        return false;
    if (v->type != TEXT || strlen(v->text) != v->count)
        return v->type != TEXT ? other_type(g, v, "a text", why)
                               : engine_error_set(why, ENGINE_BAD_MODEL, "%s: value '%s': a text with NUL in it", g->name, key);
    *ret = v->text;
    return true;
}

/* One whole number of any width; false when it is no whole number or beyond int64. */
static bool whole_at(int64_t *ret, enum value_type type, const uint8_t *p)
{
    switch (type) {
    case U8: case U16: case U32: case U64: {
        uint64_t v = little_endian(p, type_bytes[type]);
        *ret = (int64_t)v;
        return v <= INT64_MAX;
    }
    case I8:
        *ret = (int8_t)*p;
        return true;
    case I16:
        *ret = (int16_t)little_endian(p, 2);
        return true;
    case I32:
        *ret = (int32_t)little_endian(p, 4);
        return true;
    case I64:
        *ret = (int64_t)little_endian(p, 8);
        return true;
    default:
        return false;
    }
}

bool gguf_whole(const struct gguf *g, int64_t *ret, const char *key, struct engine_error *why)
{
    const struct value *v = want_value(g, key, why);
    int64_t n;
    if (!v)
        return false;
    if (!whole_at(&n, v->type, v->data))
        return other_type(g, v, "a whole number below 2^63", why);
    *ret = n;
    return true;
}

bool gguf_wholes(const struct gguf *g, int64_t *ret, size_t capacity, size_t *ret_count, const char *key,
                 struct engine_error *why)
{
    const struct value *v = want_value(g, key, why);
    if (!v)
        return false;
    if (v->type != ARRAY)
        return other_type(g, v, "an array of whole numbers", why);
    if (v->count > capacity)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: value '%s': %llu numbers, accepted: at most %zu", g->name, key,
                                (unsigned long long)v->count, capacity);
    for (size_t i = 0; i < v->count; i++)
        if (!whole_at(&ret[i], v->item, v->data + i * type_bytes[v->item]))
            return engine_error_set(why, ENGINE_BAD_MODEL, "%s: value '%s': an array of %s, want whole numbers below 2^63",
                                    g->name, key, type_names[v->item]);
    *ret_count = (size_t)v->count;
    return true;
}

bool gguf_number(const struct gguf *g, double *ret, const char *key, struct engine_error *why)
{
    const struct value *v = want_value(g, key, why);
    int64_t n;
    if (!v)
        return false;
    if (v->type == F32) {
        float f;
        memcpy(&f, v->data, 4);
        *ret = (double)f;
    } else if (v->type == F64) {
        memcpy(ret, v->data, 8);
    } else if (whole_at(&n, v->type, v->data)) {
        *ret = (double)n;
    } else {
        return other_type(g, v, "a number", why);
    }
    return true;
}

bool gguf_flag(const struct gguf *g, bool *ret, const char *key, struct engine_error *why)
{
    const struct value *v = want_value(g, key, why);
    if (!v)
        return false;
    if (v->type != BOOL)
        return other_type(g, v, "a flag", why);
    *ret = *v->data;
    return true;
}

const char *gguf_key(const struct gguf *g, size_t index)
{
    return index < g->value_count ? g->values[index].key : NULL;
}

/* --- tensors ----------------------------------------------------------------------------------------------- */

/* Number formats by their code in the file. With a name only: known to exist, not read here. */
static const struct {
    uint32_t code;
    const char *name;
} format_codes[] = {
    {0, "F32"},     {1, "F16"},      {2, "Q4_0"},     {3, "Q4_1"},   {6, "Q5_0"},   {7, "Q5_1"},   {8, "Q8_0"},
    {9, "Q8_1"},    {10, "Q2_K"},    {11, "Q3_K"},    {12, "Q4_K"},  {13, "Q5_K"},  {14, "Q6_K"},  {15, "Q8_K"},
    {16, "IQ2_XXS"}, {17, "IQ2_XS"}, {18, "IQ3_XXS"}, {19, "IQ1_S"}, {20, "IQ4_NL"}, {21, "IQ3_S"}, {22, "IQ2_S"},
    {23, "IQ4_XS"}, {24, "I8"},      {25, "I16"},     {26, "I32"},   {27, "I64"},   {28, "F64"},   {29, "IQ1_M"},
    {30, "BF16"},   {34, "TQ1_0"},   {35, "TQ2_0"},   {39, "MXFP4"},
};

static bool read_format(const struct gguf *g, struct gguf_entry *e, uint32_t code, struct engine_error *why)
{
    const char *name = NULL;
    for (size_t i = 0; i < sizeof format_codes / sizeof *format_codes; i++)
        if (format_codes[i].code == code)
            name = format_codes[i].name;
    if (name && quant_find(&e->format, name))
        return true;
    return engine_error_set(why, ENGINE_BAD_MODEL,
                            "%s: tensor '%s': number format %s (code %u), accepted: F32 F16 BF16 Q8_0 Q6_K Q5_K Q5_0 Q5_1 Q4_K "
                            "Q4_0 Q4_1 Q3_K Q2_K", g->name, e->name, name ? name : "unknown", code);
}

static bool read_shape(struct cursor *c, const struct gguf *g, struct gguf_entry *e, struct engine_error *why)
{
    uint32_t rank = (uint32_t)take_whole(c, 4);
    if (c->ran_out)
        return false;
    if (rank < 1 || rank > GGUF_RANK_MAX)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: tensor '%s': %u sizes, accepted: 1 to %d", g->name, e->name, rank,
                                GGUF_RANK_MAX);
    e->rank = (int)rank;
    int64_t elements = 1;
    for (int i = e->rank - 1; i >= 0; i--) { /* fastest first in the file */
        uint64_t size = take_whole(c, 8);
        if (c->ran_out)
            return false;
        if (size < 1 || size > INT64_MAX || __builtin_mul_overflow(elements, (int64_t)size, &elements))
            return engine_error_set(why, ENGINE_BAD_MODEL, "%s: tensor '%s': a size of %llu in its shape is not usable", g->name,
                                    e->name, (unsigned long long)size);
        e->shape[i] = (int64_t)size;
    }
    e->row_values = e->shape[e->rank - 1];
    return true;
}

static int64_t count_of(const struct gguf_entry *e)
{
    int64_t n = 1;
    for (int i = 0; i < e->rank; i++)
        n *= e->shape[i];
    return n;
}

/* `data` holds the offset until the head's length is known. False without a message when the cursor ran out. */
static bool read_tensor(struct cursor *c, struct gguf *g, struct engine_error *why)
{
    struct gguf_entry *e = &g->entries[g->count];
    *e = (struct gguf_entry){.name = take_name(c, g, "tensor name", why), .file = g->name, .is_mapped = g->is_mapped};
    if (!e->name)
        return false;
    g->count++;
    if (!read_shape(c, g, e, why))
        return false;
    uint32_t code = (uint32_t)take_whole(c, 4);
    uint64_t offset = take_whole(c, 8);
    if (c->ran_out || !read_format(g, e, code, why))
        return false;
    const struct quant_traits *f = quant_info(e->format);
    if (!quant_bytes(&e->bytes, e->format, count_of(e) / e->row_values, e->row_values))
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: tensor '%s': rows of %lld values, %s needs a multiple of %d", g->name,
                                e->name, (long long)e->row_values, f->name, f->values);
    if (offset > g->bytes)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: tensor '%s': at byte %llu of the data, the file has %zu bytes",
                                g->name, e->name, (unsigned long long)offset, g->bytes);
    e->data = (const void *)(uintptr_t)offset;
    return true;
}

static uint64_t offset_of(const struct gguf_entry *e)
{
    return (uint64_t)(uintptr_t)e->data;
}

static int by_offset(const void *a, const void *b)
{
    uint64_t x = offset_of(a), y = offset_of(b);
    return x < y ? -1 : x > y;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct gguf_entry *)a)->name, ((const struct gguf_entry *)b)->name);
}

static uint64_t padded(uint64_t n, uint64_t alignment)
{
    return (n + alignment - 1) / alignment * alignment;
}

/* Each tensor begins where the one before ends, padded; the file ends with the last. Then offsets become addresses. */
static bool place_tensors(struct gguf *g, uint64_t base, uint64_t alignment, struct engine_error *why)
{
    qsort(g->entries, g->count, sizeof *g->entries, by_offset);
    if (g->count && base > g->bytes)
        return bad(g, why, "the file ends before its data begins");
    uint64_t at = 0, end = 0, room = g->bytes > base ? g->bytes - base : 0;
    for (size_t i = 0; i < g->count; i++) {
        struct gguf_entry *e = &g->entries[i];
        if (offset_of(e) != at)
            return engine_error_set(why, ENGINE_BAD_MODEL, "%s: tensor '%s': at byte %llu of the data, want %llu: no holes, no "
                                    "overlap", g->name, e->name, (unsigned long long)offset_of(e), (unsigned long long)at);
        if (e->bytes > room || at > room - e->bytes)
            return engine_error_set(why, ENGINE_BAD_MODEL, "%s: tensor '%s': its %zu bytes end outside the file", g->name, e->name,
                                    e->bytes);
        e->data = g->data + base + at;
        end = at + e->bytes;
        at = padded(end, alignment);
    }
    if (room > at)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: %llu bytes behind the last tensor", g->name,
                                (unsigned long long)(room - end));
    qsort(g->entries, g->count, sizeof *g->entries, by_name);
    for (size_t i = 1; i < g->count; i++)
        if (strcmp(g->entries[i - 1].name, g->entries[i].name) == 0)
            return engine_error_set(why, ENGINE_BAD_MODEL, "%s: tensor '%s' occurs twice", g->name, g->entries[i].name);
    return true;
}

/* comfy.gguf.orig_shape.NAME: the shape before a converter made rows that fit blocks. */
static bool restore_shapes(struct gguf *g, struct engine_error *why)
{
    for (size_t i = 0; i < g->count; i++) {
        struct gguf_entry *e = &g->entries[i];
        char key[NAME_BYTES_MAX + 32];
        int64_t shape[GGUF_RANK_MAX], elements = 1;
        size_t rank;
        snprintf(key, sizeof key, "comfy.gguf.orig_shape.%s", e->name);
        if (!gguf_has(g, key))
            continue;
        if (!gguf_wholes(g, shape, GGUF_RANK_MAX, &rank, key, why))
            return false;
        bool ok = rank >= 1;
        for (size_t a = 0; ok && a < rank; a++)
            ok = shape[a] > 0 && !__builtin_mul_overflow(elements, shape[a], &elements);
        if (!ok || elements != count_of(e))
            return engine_error_set(why, ENGINE_BAD_MODEL, "%s: value '%s' is no shape for the tensor's %lld elements", g->name,
                                    key, (long long)count_of(e));
        e->rank = (int)rank;
        memcpy(e->shape, shape, rank * sizeof *shape);
    }
    return true;
}

/* --- the file ------------------------------------------------------------------------------------------------ */

static void forget(struct gguf *g)
{
    for (size_t i = 0; i < g->value_count; i++) {
        free(g->values[i].key);
        free(g->values[i].text);
    }
    for (size_t i = 0; i < g->count; i++)
        free((char *)g->entries[i].name);
    free(g->values);
    free(g->entries);
    g->values = NULL;
    g->entries = NULL;
    g->value_count = g->count = 0;
}

static bool read_start(struct cursor *c, struct gguf *g, uint64_t *tensors, uint64_t *values, struct engine_error *why)
{
    const uint8_t *magic = take(c, 4);
    uint32_t version = (uint32_t)take_whole(c, 4);
    *tensors = take_whole(c, 8);
    *values = take_whole(c, 8);
    if (!magic || c->ran_out)
        return false;
    if (memcmp(magic, "GGUF", 4) != 0)
        return bad(g, why, "not a GGUF file: it does not begin with 'GGUF'");
    if (version == 2u << 24 || version == 3u << 24)
        return bad(g, why, "a big-endian GGUF file, accepted: little-endian");
    if (version != 2 && version != 3)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: GGUF version %u, accepted: 2 and 3", g->name, version);
    if (*tensors > TENSORS_MAX || *values > VALUES_MAX)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: %llu tensors and %llu values, accepted: at most %u and %u", g->name,
                                (unsigned long long)*tensors, (unsigned long long)*values, TENSORS_MAX, VALUES_MAX);
    return true;
}

static bool read_alignment(const struct gguf *g, uint64_t *ret, struct engine_error *why)
{
    int64_t alignment = 32;
    if (gguf_has(g, "general.alignment") && !gguf_whole(g, &alignment, "general.alignment", why))
        return false;
    if (alignment < 1 || alignment > ALIGNMENT_MAX || (alignment & (alignment - 1)) != 0)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: general.alignment %lld, accepted: powers of two up to %u", g->name,
                                (long long)alignment, ALIGNMENT_MAX);
    *ret = (uint64_t)alignment;
    return true;
}

static bool check_whole_file(const struct gguf *g, struct engine_error *why)
{
    int64_t pieces = 1;
    if (gguf_has(g, "split.count") && !gguf_whole(g, &pieces, "split.count", why))
        return false;
    return pieces <= 1 || engine_error_set(why, ENGINE_BAD_MODEL, "%s: one of %lld pieces of a split file; merge them first",
                                           g->name, (long long)pieces);
}

/* The head, from a cursor on its first bytes. False with c->ran_out and no message: more bytes are needed. */
static bool read_head(struct cursor *c, struct gguf *g, struct engine_error *why)
{
    uint64_t tensors, values, alignment = 0;
    if (!read_start(c, g, &tensors, &values, why))
        return false;
    g->values = calloc((size_t)values + 1, sizeof *g->values);
    g->entries = calloc((size_t)tensors + 1, sizeof *g->entries);
    if (!g->values || !g->entries)
        return no_memory(why);
    for (uint64_t i = 0; i < values; i++)
        if (!read_value(c, g, why))
            return false;
    if (!sort_values(g, why) || !check_whole_file(g, why) || !read_alignment(g, &alignment, why))
        return false;
    for (uint64_t i = 0; i < tensors; i++)
        if (!read_tensor(c, g, why))
            return false;
    return place_tensors(g, padded(c->at, alignment), alignment, why) && restore_shapes(g, why);
}

static bool read_piece(struct gguf *g, int fd, size_t bytes, const char *path, struct engine_error *why)
{
    uint8_t *grown = realloc(g->head, bytes);
    if (!grown)
        return no_memory(why);
    g->head = grown;
    return model_file_at(fd, g->head, bytes, 0, path, why);
}

static bool read_file(struct gguf *g, int fd, const char *path, struct engine_error *why)
{
    size_t most = g->bytes < HEAD_BYTES_MAX ? g->bytes : HEAD_BYTES_MAX;
    for (size_t bytes = HEAD_BYTES_FIRST;; bytes *= 4) {
        bytes = bytes < most ? bytes : most;
        if (!read_piece(g, fd, bytes, path, why))
            return false;
        struct cursor c = {.data = g->head, .bytes = bytes};
        if (read_head(&c, g, why))
            return true;
        if (!c.ran_out)
            return false;
        if (bytes == most)
            return bad(g, why, most == g->bytes ? "the file ends inside its head" : "a head of more than 256 MiB");
        forget(g);
    }
}

static struct gguf *new_file(const char *name)
{
    struct gguf *g = calloc(1, sizeof *g);
    if (g && !(g->name = strdup(name))) {
        free(g);
        return NULL;
    }
    return g;
}

static bool map_file(struct gguf *g, int fd, const char *path, struct engine_error *why)
{
    if (g->bytes == 0)
        return bad(g, why, "the file is empty");
    void *data = mmap(NULL, g->bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED)
        return engine_error_set(why, ENGINE_IO, "%s: %s", path, strerror(errno));
    g->data = data;
    g->is_mapped = true;
    return true;
}

bool gguf_open_file(struct gguf **ret, const char *path, struct engine_error *why)
{
    const char *slash = strrchr(path, '/');
    int fd;
    struct gguf *g = new_file(slash ? slash + 1 : path);
    if (!g)
        return no_memory(why);
    bool ok = model_file_open(&fd, &g->bytes, path, why);
    if (ok) {
        ok = map_file(g, fd, path, why) && read_file(g, fd, path, why);
        close(fd);
    }
    if (ok)
        *ret = g;
    else
        gguf_close(g);
    return ok;
}

bool gguf_parse(struct gguf **ret, const void *data, size_t bytes, struct engine_error *why)
{
    struct gguf *g = new_file("memory");
    if (!g)
        return no_memory(why);
    g->data = data, g->bytes = bytes;
    struct cursor c = {.data = data, .bytes = bytes};
    bool ok = read_head(&c, g, why);
    if (!ok && c.ran_out)
        bad(g, why, "the file ends inside its head");
    if (ok)
        *ret = g;
    else
        gguf_close(g);
    return ok;
}

void gguf_close(struct gguf *g)
{
    if (!g)
        return;
    forget(g);
    if (g->is_mapped)
        munmap((void *)g->data, g->bytes);
    free(g->head);
    free(g->name);
    free(g);
}

size_t gguf_count(const struct gguf *g)
{
    return g->count;
}

const struct gguf_entry *gguf_at(const struct gguf *g, size_t index)
{
    assert(index < g->count);
    return &g->entries[index];
}

const struct gguf_entry *gguf_find(const struct gguf *g, const char *name)
{
    struct gguf_entry wanted = {.name = name};
    return g->count ? bsearch(&wanted, g->entries, g->count, sizeof *g->entries, by_name) : NULL;
}
