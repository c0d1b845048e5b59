/* safetensors.c - maps .safetensors files and checks every claim of their headers before anything is used.
 *
 * A set is a list of mapped files and one table of entries sorted by name. Order of the checks of one file: header
 * length, JSON, each entry by itself, then all entries together (no holes, no overlap, end at the file's end). */
#include "safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define HEADER_BYTES_MAX 100000000u
#define INDEX_BYTES_MAX (64u << 20)
#define ENTRIES_MAX 100000u
#define SHARDS_MAX 1000u
#define NAME_BYTES_MAX 512u

struct file {
    char *name;
    const uint8_t *data;
    size_t bytes;
    bool is_mapped;
};

struct safetensors {
    struct file *files;
    size_t file_count;
    struct safetensors_entry *entries;
    size_t count, capacity;
    json_t *metadata; /* of the first file */
};

static const struct {
    const char *name;
    size_t bytes;
} dtypes[] = {
    {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E5M2", 1}, {"F8_E4M3", 1}, {"I16", 2}, {"U16", 2}, {"F16", 2},
    {"BF16", 2}, {"I32", 4}, {"U32", 4}, {"F32", 4},     {"F64", 8},     {"I64", 8}, {"U64", 8},
};

const char *safetensors_dtype_name(enum safetensors_dtype dtype)
{
    return dtypes[dtype].name;
}

static bool bad(struct engine_error *why, const char *file, const char *text)
{
    return engine_error_set(why, ENGINE_BAD_MODEL, "%s: %s", file, text);
}

static bool no_memory(struct engine_error *why)
{
    return engine_error_set(why, ENGINE_NO_MEMORY, "no memory for the table of tensors");
}

/* --- one entry ------------------------------------------------------------------------------------ */

static bool read_dtype(json_t *value, enum safetensors_dtype *ret, const char *file, const char *name,
                       struct engine_error *why)
{
    const char *text = json_string_value(value);
    for (size_t i = 0; text && i < sizeof dtypes / sizeof dtypes[0]; i++) {
        if (strcmp(text, dtypes[i].name) == 0) {
            *ret = (enum safetensors_dtype)i;
            return true;
        }
    }
    return engine_error_set(why, ENGINE_BAD_MODEL, "%s: tensor '%s': dtype %s is unknown", file, name,
                            text ? text : "(no text)");
}

static bool read_shape(json_t *value, struct safetensors_entry *e, const char *file, struct engine_error *why)
{
    if (!json_is_array(value) || json_array_size(value) > SAFETENSORS_RANK_MAX)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: tensor '%s': shape is not a list of at most %d sizes", file,
                                e->name, SAFETENSORS_RANK_MAX);
    e->rank = (int)json_array_size(value);
    size_t count = 1;
    for (int i = 0; i < e->rank; i++) {
        json_t *item = json_array_get(value, (size_t)i);
        json_int_t size = json_is_integer(item) ? json_integer_value(item) : -1;
        if (size < 0 || __builtin_mul_overflow(count, (size_t)size, &count))
            return engine_error_set(why, ENGINE_BAD_MODEL, "%s: tensor '%s': size %d of its shape is not usable", file,
                                    e->name, i);
        e->shape[i] = size;
    }
    if (__builtin_mul_overflow(count, dtypes[e->dtype].bytes, &e->bytes))
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: tensor '%s': its size overflows", file, e->name);
    return true;
}

static bool read_offsets(json_t *value, struct safetensors_entry *e, const struct file *f, size_t data_bytes,
                         const uint8_t *base, struct engine_error *why)
{
    json_t *first = json_array_get(value, 0), *second = json_array_get(value, 1);
    if (!json_is_array(value) || json_array_size(value) != 2 || !json_is_integer(first) || !json_is_integer(second))
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: tensor '%s': data_offsets is not two numbers", f->name,
                                e->name);
    json_int_t begin = json_integer_value(first), end = json_integer_value(second);
    if (begin < 0 || end < begin || (uint64_t)end > data_bytes)
        return engine_error_set(why, ENGINE_BAD_MODEL,
                                "%s: tensor '%s': data_offsets [%lld,%lld] outside the file's %zu bytes of data", f->name,
                                e->name, (long long)begin, (long long)end, data_bytes);
    if ((size_t)(end - begin) != e->bytes)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: tensor '%s': %lld bytes of data, its shape and dtype need %zu",
                                f->name, e->name, (long long)(end - begin), e->bytes);
    e->data = base + begin;
    return true;
}

static bool add_entry(struct safetensors *s, const struct file *f, const char *name, json_t *value, size_t data_bytes,
                      const uint8_t *base, struct engine_error *why)
{
    if (strlen(name) > NAME_BYTES_MAX || s->count >= ENTRIES_MAX)
        return bad(why, f->name, "more or longer tensor names than accepted");
    if (!json_is_object(value))
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: tensor '%s': not an object", f->name, name);
    struct safetensors_entry e = {.file = f->name, .name = name};
    if (!read_dtype(json_object_get(value, "dtype"), &e.dtype, f->name, name, why) ||
        !read_shape(json_object_get(value, "shape"), &e, f->name, why) ||
        !read_offsets(json_object_get(value, "data_offsets"), &e, f, data_bytes, base, why))
        return false;
    if (s->count == s->capacity) {
        size_t capacity = s->capacity ? 2 * s->capacity : 256;
        struct safetensors_entry *grown = realloc(s->entries, capacity * sizeof *grown);
        if (!grown)
            return no_memory(why);
        s->entries = grown;
        s->capacity = capacity;
    }
    char *copy = strdup(name);
    if (!copy)
        return no_memory(why);
    e.name = copy;
    s->entries[s->count++] = e;
    return true;
}

/* --- one file ---------------------------------------------------------------------------------------- */

static int by_offset(const void *a, const void *b)
{
    const struct safetensors_entry *const *x = a, *const *y = b;
    if ((*x)->data != (*y)->data)
        return (*x)->data < (*y)->data ? -1 : 1;
    return (*x)->bytes < (*y)->bytes ? -1 : (*x)->bytes > (*y)->bytes; /* empty ones first */
}

/* The entries [first, count) of one file must tile its data exactly. */
static bool check_tiling(const struct safetensors *s, size_t first, const struct file *f, const uint8_t *base,
                         struct engine_error *why)
{
    size_t n = s->count - first;
    const struct safetensors_entry **order = malloc((n + 1) * sizeof *order);
    if (!order)
        return no_memory(why);
    for (size_t i = 0; i < n; i++)
        order[i] = &s->entries[first + i];
    qsort(order, n, sizeof *order, by_offset);
    const uint8_t *at = base;
    bool ok = true;
    for (size_t i = 0; i < n && ok; i++) {
        if (order[i]->data != at)
            ok = engine_error_set(why, ENGINE_BAD_MODEL, "%s: tensor '%s' %s", f->name, order[i]->name,
                                  (const uint8_t *)order[i]->data < at ? "overlaps its neighbour"
                                                                       : "leaves a hole before it");
        at = (const uint8_t *)order[i]->data + order[i]->bytes;
    }
    if (ok && at != f->data + f->bytes)
        ok = engine_error_set(why, ENGINE_BAD_MODEL, "%s: %zu bytes at the end belong to no tensor", f->name,
                              (size_t)(f->data + f->bytes - at));
    free(order);
    return ok;
}

static bool read_header(struct safetensors *s, const struct file *f, struct engine_error *why)
{
    uint64_t header = 0;
    if (f->bytes < 8)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: %zu bytes, too short for a safetensors file", f->name,
                                f->bytes);
    for (int i = 0; i < 8; i++)
        header |= (uint64_t)f->data[i] << (8 * i);
    if (header > HEADER_BYTES_MAX || header > f->bytes - 8)
        return engine_error_set(why, ENGINE_BAD_MODEL,
                                "%s: header of %llu bytes, accepted: at most %u and no more than the file's %zu", f->name,
                                (unsigned long long)header, HEADER_BYTES_MAX, f->bytes - 8);
    if (header == 0 || f->data[8] != '{')
        return bad(why, f->name, "the header does not begin with '{'");
    json_error_t at;
    json_t *root = json_loadb((const char *)f->data + 8, header, JSON_REJECT_DUPLICATES, &at);
    if (!root)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: header: %s (byte %d)", f->name, at.text, at.position);
    const uint8_t *base = f->data + 8 + header;
    size_t first = s->count;
    bool ok = json_is_object(root) || bad(why, f->name, "the header is not an object");
    const char *name;
    json_t *value;
    if (ok) {
        json_object_foreach(root, name, value)
        {
            if (strcmp(name, "__metadata__") == 0) {
                if (!s->metadata)
                    s->metadata = json_incref(value);
            } else if (!add_entry(s, f, name, value, f->bytes - 8 - header, base, why)) {
                ok = false;
                break;
            }
        }
    }
    json_decref(root);
    return ok && check_tiling(s, first, f, base, why);
}

static bool add_file(struct safetensors *s, const char *path, const char *name, struct engine_error *why)
{
    struct file f = {.name = strdup(name), .is_mapped = true};
    struct file *grown = realloc(s->files, (s->file_count + 1) * sizeof *grown);
    if (grown)
        s->files = grown;
    if (!f.name || !grown) {
        free(f.name);
        return no_memory(why);
    }
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
        engine_error_set(why, fd < 0 && errno != ENOENT ? ENGINE_IO : ENGINE_BAD_MODEL, "%s: %s", path,
                         fd < 0 ? strerror(errno) : "not a regular file");
        goto failed;
    }
    f.bytes = (size_t)st.st_size;
    if (f.bytes == 0) {
        bad(why, name, "the file is empty");
        goto failed;
    }
    f.data = mmap(NULL, f.bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    if (f.data == MAP_FAILED) {
        engine_error_set(why, ENGINE_IO, "%s: %s", path, strerror(errno));
        goto failed;
    }
    close(fd);
    s->files[s->file_count++] = f;
    return read_header(s, &s->files[s->file_count - 1], why);
failed:
    if (fd >= 0)
        close(fd);
    free(f.name);
    return false;
}

/* --- a set ----------------------------------------------------------------------------------------------- */

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct safetensors_entry *)a)->name, ((const struct safetensors_entry *)b)->name);
}

static bool sort_entries(struct safetensors *s, struct engine_error *why)
{
    if (s->count)
        qsort(s->entries, s->count, sizeof *s->entries, by_name);
    for (size_t i = 1; i < s->count; i++)
        if (strcmp(s->entries[i - 1].name, s->entries[i].name) == 0)
            return engine_error_set(why, ENGINE_BAD_MODEL, "tensor '%s' is in %s and in %s", s->entries[i].name,
                                    s->entries[i - 1].file, s->entries[i].file);
    return true;
}

static bool is_plain_name(const char *name)
{
    return name && *name && *name != '.' && !strchr(name, '/') && !strchr(name, '\\') && strlen(name) < 256;
}

static bool has_file(const struct safetensors *s, const char *name)
{
    for (size_t i = 0; i < s->file_count; i++)
        if (strcmp(s->files[i].name, name) == 0)
            return true;
    return false;
}

static bool open_shards(struct safetensors *s, const char *dir, json_t *map, struct engine_error *why)
{
    const char *name;
    json_t *value;
    json_object_foreach(map, name, value)
    {
        const char *file = json_string_value(value);
        if (!is_plain_name(file))
            return engine_error_set(why, ENGINE_BAD_MODEL, "index: tensor '%s': its file is not a plain file name", name);
        if (has_file(s, file))
            continue;
        if (s->file_count >= SHARDS_MAX)
            return engine_error_set(why, ENGINE_BAD_MODEL, "index: more than %u files", SHARDS_MAX);
        /* names of earlier files are pointed to by entries: files[] may move, the names do not */
        char path[4096];
        if (snprintf(path, sizeof path, "%s/%s", dir, file) >= (int)sizeof path)
            return engine_error_set(why, ENGINE_BAD_MODEL, "%s: path too long", dir);
        if (!add_file(s, path, file, why))
            return false;
    }
    return true;
}

static bool check_index(const struct safetensors *s, json_t *map, struct engine_error *why)
{
    const char *name;
    json_t *value;
    json_object_foreach(map, name, value)
    {
        const struct safetensors_entry *e = safetensors_find(s, name);
        if (!e || strcmp(e->file, json_string_value(value)) != 0)
            return engine_error_set(why, ENGINE_BAD_MODEL, "index: tensor '%s' is not in %s", name,
                                    json_string_value(value));
    }
    for (size_t i = 0; i < s->count; i++)
        if (!json_object_get(map, s->entries[i].name))
            return engine_error_set(why, ENGINE_BAD_MODEL, "%s: tensor '%s' is not in the index", s->entries[i].file,
                                    s->entries[i].name);
    return true;
}

static bool open_index(struct safetensors *s, const char *dir, const char *path, struct engine_error *why)
{
    struct stat st;
    if (stat(path, &st) == 0 && st.st_size > (off_t)INDEX_BYTES_MAX)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: over %u bytes", path, INDEX_BYTES_MAX);
    json_error_t at;
    json_t *root = json_load_file(path, JSON_REJECT_DUPLICATES, &at);
    if (!root)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: %s (line %d)", path, at.text, at.line);
    json_t *map = json_object_get(root, "weight_map");
    bool ok = json_is_object(map) || bad(why, path, "no weight_map");
    ok = ok && open_shards(s, dir, map, why) && sort_entries(s, why) && check_index(s, map, why);
    json_decref(root);
    return ok;
}

static bool finish(struct safetensors *s, bool ok, struct safetensors **ret)
{
    if (ok)
        *ret = s;
    else
        safetensors_close(s);
    return ok;
}

bool safetensors_open(struct safetensors **ret, const char *dir, const char *stem, struct engine_error *why)
{
    char single[4096], index[4096];
    if (snprintf(single, sizeof single, "%s/%s.safetensors", dir, stem) >= (int)sizeof single ||
        snprintf(index, sizeof index, "%s/%s.safetensors.index.json", dir, stem) >= (int)sizeof index)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: path too long", dir);
    struct safetensors *s = calloc(1, sizeof *s);
    if (!s)
        return no_memory(why);
    if (access(index, F_OK) == 0)
        return finish(s, open_index(s, dir, index, why), ret);
    char name[512];
    snprintf(name, sizeof name, "%s.safetensors", stem);
    return finish(s, add_file(s, single, name, why) && sort_entries(s, why), ret);
}

bool safetensors_open_file(struct safetensors **ret, const char *path, struct engine_error *why)
{
    struct safetensors *s = calloc(1, sizeof *s);
    if (!s)
        return no_memory(why);
    const char *slash = strrchr(path, '/');
    return finish(s, add_file(s, path, slash ? slash + 1 : path, why) && sort_entries(s, why), ret);
}

bool safetensors_parse(struct safetensors **ret, const void *data, size_t bytes, struct engine_error *why)
{
    struct safetensors *s = calloc(1, sizeof *s);
    if (!s || !(s->files = calloc(1, sizeof *s->files)) || !(s->files[0].name = strdup("memory"))) {
        safetensors_close(s);
        return no_memory(why);
    }
    s->files[0].data = data, s->files[0].bytes = bytes;
    s->file_count = 1;
    return finish(s, read_header(s, &s->files[0], why) && sort_entries(s, why), ret);
}

void safetensors_close(struct safetensors *s)
{
    if (!s)
        return;
    for (size_t i = 0; i < s->count; i++)
        free((char *)s->entries[i].name);
    for (size_t i = 0; i < s->file_count; i++) {
        if (s->files[i].is_mapped)
            munmap((void *)s->files[i].data, s->files[i].bytes);
        free(s->files[i].name);
    }
    free(s->files);
    free(s->entries);
    json_decref(s->metadata);
    free(s);
}

size_t safetensors_count(const struct safetensors *s)
{
    return s->count;
}

const struct safetensors_entry *safetensors_at(const struct safetensors *s, size_t index)
{
    return &s->entries[index];
}

const struct safetensors_entry *safetensors_find(const struct safetensors *s, const char *name)
{
    struct safetensors_entry wanted = {.name = name};
    return s->count ? bsearch(&wanted, s->entries, s->count, sizeof *s->entries, by_name) : NULL;
}

const char *safetensors_metadata(const struct safetensors *s, const char *key)
{
    return json_string_value(json_object_get(s->metadata, key));
}

/* --- writing ------------------------------------------------------------------------------------------------ */

static const char *file_dtype(enum tensor_dtype dtype)
{
    static const char *const names[] = {[TENSOR_F32] = "F32", [TENSOR_BF16] = "BF16", [TENSOR_I32] = "I32",
                                        [TENSOR_U8] = "U8"};
    return names[dtype];
}

static char *header_text(const struct safetensors_item *items, size_t count)
{
    json_t *root = json_object();
    size_t at = 0;
    for (size_t i = 0; i < count; i++) {
        json_t *shape = json_array();
        for (int a = 0; a < items[i].value.rank; a++)
            json_array_append_new(shape, json_integer(items[i].value.shape[a]));
        size_t end = at + tensor_bytes(items[i].value);
        json_object_set_new(root, items[i].name,
                            json_pack("{s:s,s:o,s:[I,I]}", "dtype", file_dtype(items[i].value.dtype), "shape", shape,
                                      "data_offsets", (json_int_t)at, (json_int_t)end));
        at = end;
    }
    char *text = json_dumps(root, JSON_COMPACT);
    json_decref(root);
    return text;
}

static bool write_values(FILE *f, struct tensor t)
{
    int64_t width = t.shape[t.rank - 1], rows = width ? tensor_count(t) / width : 0;
    size_t bytes = (size_t)width * tensor_dtype_bytes(t.dtype);
    for (int64_t r = 0; r < rows; r++) {
        struct tensor row = t;
        int64_t rest = r;
        for (int a = t.rank - 2; a >= 0; a--) {
            row = tensor_slice(row, a, rest % t.shape[a], 1);
            rest /= t.shape[a];
        }
        if (fwrite(row.data, 1, bytes, f) != bytes)
            return false;
    }
    return true;
}

bool safetensors_write(const char *path, const struct safetensors_item *items, size_t count, struct engine_error *why)
{
    char *text = header_text(items, count);
    FILE *f = text ? fopen(path, "wb") : NULL;
    bool ok = f != NULL;
    if (ok) {
        size_t length = strlen(text), padded = (length + 7) & ~(size_t)7;
        uint8_t head[8];
        for (int i = 0; i < 8; i++)
            head[i] = (uint8_t)(padded >> (8 * i));
        ok = fwrite(head, 1, 8, f) == 8 && fprintf(f, "%-*s", (int)padded, text) == (int)padded;
        for (size_t i = 0; ok && i < count; i++)
            ok = write_values(f, items[i].value);
        ok = fclose(f) == 0 && ok;
    }
    free(text);
    return ok || engine_error_set(why, ENGINE_IO, "%s: %s", path, strerror(errno));
}
