/* safetensors.c - maps .safetensors files and checks every claim of their headers before anything is used.
 *
 * A set is a list of mapped files and one table of entries sorted by name. Order of the checks of one file: header
 * length, JSON, each entry by itself, then all entries together (no holes, no overlap, end at the file's end). */
#include "safetensors.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "model_file.h"

#define HEADER_BYTES_MAX 100000000u
#define INDEX_BYTES_MAX (64u << 20)
#define ENTRIES_MAX 20000u /* the largest models of the family have under 1000; parsed, a hostile header takes 200 MB */
#define SHARDS_MAX 1000u
#define NAME_BYTES_MAX 512u
#define ENTRY_VALUES_MAX 20u /* brackets and commas of one entry, at most: shape of 8, offsets, three keys */

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
    struct safetensors_entry e = {.file = f->name, .name = name, .is_mapped = f->is_mapped};
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

/* The length of the header, from the first eight bytes of a file. */
static bool header_length(const struct file *f, const uint8_t *first, size_t *ret, struct engine_error *why)
{
    uint64_t bytes = 0;
    for (int i = 0; i < 8; i++)
        bytes |= (uint64_t)first[i] << (8 * i);
    if (bytes > HEADER_BYTES_MAX || bytes > f->bytes - 8)
        return engine_error_set(why, ENGINE_BAD_MODEL,
                                "%s: not a safetensors file, or a damaged one: it would begin with a header of %llu bytes; accepted: at most %u, "
                                "no more than the file's %zu", f->name, (unsigned long long)bytes, HEADER_BYTES_MAX, f->bytes - 8);
    *ret = (size_t)bytes;
    return true;
}

static bool check_length(const struct file *f, struct engine_error *why)
{
    return f->bytes >= 8 || engine_error_set(why, ENGINE_BAD_MODEL, "%s: %zu bytes, too short for a safetensors file",
                                             f->name, f->bytes);
}

/* Adds the entries of a file whose header is `text`; addresses are computed, the data itself is not touched. */
static bool read_header(struct safetensors *s, const struct file *f, const char *text, size_t bytes,
                        struct engine_error *why)
{
    char label[300];
    const uint8_t *base = f->data + 8 + bytes;
    size_t first = s->count;
    if (bytes == 0 || text[0] != '{')
        return bad(why, f->name, "the header does not begin with '{'");
    snprintf(label, sizeof label, "%s: header", f->name);
    json_t *root = model_file_json(text, bytes, ENTRIES_MAX * ENTRY_VALUES_MAX, label, why);
    bool ok = root != NULL;
    const char *name;
    json_t *value;
    json_object_foreach(root, name, value)
    {
        if (strcmp(name, "__metadata__") != 0)
            ok = ok && add_entry(s, f, name, value, f->bytes - 8 - bytes, base, why);
        else if (!s->metadata)
            s->metadata = json_incref(value);
    }
    json_decref(root);
    return ok && check_tiling(s, first, f, base, why);
}

static bool map_file(struct file *f, int fd, const char *path, struct engine_error *why)
{
    void *data = mmap(NULL, f->bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED)
        return engine_error_set(why, ENGINE_IO, "%s: %s", path, strerror(errno));
    f->data = data;
    f->is_mapped = true;
    return true;
}

/* Maps a file and reads its header with pread, so that a file cut short meanwhile is an error and no signal. */
static bool map_and_read(struct safetensors *s, struct file *f, int fd, const char *path, struct engine_error *why)
{
    uint8_t first[8];
    size_t bytes;
    if (!check_length(f, why) || !model_file_at(fd, first, 8, 0, path, why) || !header_length(f, first, &bytes, why))
        return false;
    char *text = malloc(bytes + 1);
    bool ok = text || engine_error_set(why, ENGINE_NO_MEMORY, "no memory for the header of %s (%zu bytes)", path, bytes);
    ok = ok && model_file_at(fd, text, bytes, 8, path, why) && map_file(f, fd, path, why) &&
         read_header(s, f, text, bytes, why);
    free(text);
    return ok;
}

/* Entries point to the names of their files: files[] may move, the names do not. */
static struct file *new_file(struct safetensors *s, const char *name, struct engine_error *why)
{
    struct file *grown = realloc(s->files, (s->file_count + 1) * sizeof *grown);
    char *copy = strdup(name);
    if (grown)
        s->files = grown;
    if (!grown || !copy) {
        free(copy);
        no_memory(why);
        return NULL;
    }
    struct file *f = &s->files[s->file_count++];
    *f = (struct file){.name = copy};
    return f;
}

static bool add_file(struct safetensors *s, const char *path, const char *name, struct engine_error *why)
{
    int fd;
    struct file *f = new_file(s, name, why);
    if (!f || !model_file_open(&fd, &f->bytes, path, why))
        return false;
    bool ok = map_and_read(s, f, fd, path, why);
    close(fd);
    return ok;
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
        char path[MODEL_FILE_PATH_MAX];
        if (!model_file_path(path, dir, file, why) || !add_file(s, path, file, why))
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
    char *text;
    size_t bytes;
    if (!model_file_read(&text, &bytes, path, INDEX_BYTES_MAX, why))
        return false;
    json_t *root = model_file_json(text, bytes, 2 * ENTRIES_MAX, path, why);
    free(text);
    if (!root)
        return false;
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
    char name[256], index_name[256], single[MODEL_FILE_PATH_MAX], index[MODEL_FILE_PATH_MAX];
    snprintf(name, sizeof name, "%s.safetensors", stem);
    snprintf(index_name, sizeof index_name, "%s.safetensors.index.json", stem);
    if (!model_file_path(single, dir, name, why) || !model_file_path(index, dir, index_name, why))
        return false;
    struct safetensors *s = calloc(1, sizeof *s);
    if (!s)
        return no_memory(why);
    if (access(index, F_OK) == 0)
        return finish(s, open_index(s, dir, index, why), ret);
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
    struct file *f = s ? new_file(s, "memory", why) : NULL;
    size_t header;
    if (!f) {
        safetensors_close(s);
        return no_memory(why);
    }
    f->data = data, f->bytes = bytes;
    return finish(s, check_length(f, why) && header_length(f, data, &header, why) &&
                         read_header(s, f, (const char *)data + 8, header, why) && sort_entries(s, why), ret);
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

/* The kernel reads no more at once than the disk takes in one request, and forgets the rest. */
#define REQUEST_BYTES (128u << 10)

static void begin_to_read(uintptr_t first, uintptr_t end)
{
    for (; first < end; first += REQUEST_BYTES)
        madvise((void *)first, end - first < REQUEST_BYTES ? end - first : REQUEST_BYTES, MADV_WILLNEED);
}

void safetensors_advise(const struct safetensors_entry *e, enum safetensors_use use)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE); /* whole pages only: the others hold neighbours too */
    uintptr_t first = ((uintptr_t)e->data + page - 1) / page * page, end = ((uintptr_t)e->data + e->bytes) / page * page;
    if (!e->is_mapped || first >= end)
        return;
    if (use == SAFETENSORS_SOON)
        begin_to_read(first, end);
    else
        madvise((void *)first, end - first, use == SAFETENSORS_NOW ? MADV_POPULATE_READ : MADV_DONTNEED);
    if (use == SAFETENSORS_ROWS)
        madvise((void *)first, end - first, MADV_RANDOM);
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
