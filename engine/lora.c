/* lora.c - keys to modules, modules to targets, factors to numbers.
 *
 * Opening goes in four steps, each over the whole file: every key is cut into prefix, module and factor (what cannot be
 * cut, or whose module is no linear of the model, is collected and listed); keys of one module come together; a module's
 * factors are checked against the linear's shape; a fused module becomes a target for each part. Numbers are read only when
 * a change is asked for, except once for NaN. */
#include "lora.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model_file.h"
#include "quant.h"
#include "tensor_names.h"

#define UNKNOWN_SHOWN 4
#define RANK_MAX 65536
#define METADATA_VALUES_MAX 100000

/* One tensor of the file. */
struct key {
    const struct safetensors_entry *entry;
    size_t module_length; /* of the entry's name: up to the factor */
    enum lora_factor factor;
    enum lora_kind kind;
    bool has_kind; /* alpha and magnitude go with any */
};

struct lora {
    struct safetensors *files;
    char *name;
    json_t *metadata; /* lora_adapter_metadata, or NULL */
    struct lora_target *targets;
    size_t count, capacity;
};

static bool no_memory(struct engine_error *why)
{
    return engine_error_set(why, ENGINE_NO_MEMORY, "no memory for the adapter");
}

/* --- keys ------------------------------------------------------------------------------------------------ */

static const struct {
    const char *ending;
    enum lora_factor factor;
    enum lora_kind kind;
    bool has_kind;
} endings[] = {
    {".lora_A.weight", LORA_DOWN, LORA_PLAIN, true},
    {".lora_B.weight", LORA_UP, LORA_PLAIN, true},
    {".lora_A.default.weight", LORA_DOWN, LORA_PLAIN, true},
    {".lora_B.default.weight", LORA_UP, LORA_PLAIN, true},
    {".lora_down.weight", LORA_DOWN, LORA_PLAIN, true},
    {".lora_up.weight", LORA_UP, LORA_PLAIN, true},
    {".lora.down.weight", LORA_DOWN, LORA_PLAIN, true},
    {".lora.up.weight", LORA_UP, LORA_PLAIN, true},
    {".hada_w1_a", LORA_W1_A, LORA_LOHA, true},
    {".hada_w1_b", LORA_W1_B, LORA_LOHA, true},
    {".hada_w2_a", LORA_W2_A, LORA_LOHA, true},
    {".hada_w2_b", LORA_W2_B, LORA_LOHA, true},
    {".lokr_w1", LORA_W1, LORA_LOKR, true},
    {".lokr_w1_a", LORA_W1_A, LORA_LOKR, true},
    {".lokr_w1_b", LORA_W1_B, LORA_LOKR, true},
    {".lokr_w2", LORA_W2, LORA_LOKR, true},
    {".lokr_w2_a", LORA_W2_A, LORA_LOKR, true},
    {".lokr_w2_b", LORA_W2_B, LORA_LOKR, true},
    {".alpha", LORA_ALPHA, LORA_PLAIN, false},
    {".dora_scale", LORA_MAGNITUDE, LORA_PLAIN, false},
    {".lora_magnitude_vector", LORA_MAGNITUDE, LORA_PLAIN, false},
    {".lora_magnitude_vector.weight", LORA_MAGNITUDE, LORA_PLAIN, false},
    {".lora_magnitude_vector.default.weight", LORA_MAGNITUDE, LORA_PLAIN, false},
};

static bool read_key(struct key *ret, const struct safetensors_entry *e)
{
    size_t length = strlen(e->name);
    for (size_t i = 0; i < sizeof endings / sizeof *endings; i++) {
        size_t ending = strlen(endings[i].ending);
        if (length > ending && strcmp(e->name + length - ending, endings[i].ending) == 0) {
            *ret = (struct key){e, length - ending, endings[i].factor, endings[i].kind, endings[i].has_kind};
            return true;
        }
    }
    return false;
}

static bool strip(const char **text, const char *const *prefixes)
{
    for (const char *const *p = prefixes; *p; p++)
        if (strncmp(*text, *p, strlen(*p)) == 0) {
            *text += strlen(*p);
            return true;
        }
    return false;
}

/* A module name without its prefixes. Some files were made by cutting the 16 characters of "diffusion_model." off names
 * that began with "transformer.": their block names lost four characters of their own. */
static void bare_module(char ret[TENSOR_NAMES_BYTES_MAX], bool *is_flat, const char *name, size_t length)
{
    static const char *const dotted[] = {"base_model.model.", "model.diffusion_model.", "diffusion_model.",
                                         "transformer.", NULL};
    static const char *const flat[] = {"lora_unet_", "lora_transformer_", "lycoris_", NULL};
    char text[TENSOR_NAMES_BYTES_MAX];
    snprintf(text, sizeof text, "%.*s", length < sizeof text ? (int)length : 0, name);
    const char *rest = text;
    *is_flat = strip(&rest, flat);
    while (!*is_flat && strip(&rest, dotted))
        ;
    const char *lost = strncmp(rest, "sformer_blocks.", 15) == 0          ? "tran"
                       : strncmp(rest, "le_transformer_blocks.", 22) == 0 ? "sing"
                                                                          : "";
    if (snprintf(ret, TENSOR_NAMES_BYTES_MAX, "%s%s", lost, rest) >= TENSOR_NAMES_BYTES_MAX)
        ret[0] = 0;
}

/* The linears of the model that a key's module is; 0: none. */
static int linears_of(struct tensor_names_place places[TENSOR_NAMES_PIECES_MAX], const struct key *key,
                      const struct transformer_config *config)
{
    char module[TENSOR_NAMES_BYTES_MAX];
    bool is_flat;
    int64_t shape[2];
    bare_module(module, &is_flat, key->entry->name, key->module_length);
    int count = tensor_names_linears(places, module, is_flat);
    return count && tensor_names_shape(shape, config, places[0].name) == 2 ? count : 0;
}

static bool list_unknown(const struct lora *l, const char *const *unknown, size_t count, size_t of,
                         struct engine_error *why)
{
    char text[640] = "";
    size_t used = 0;
    for (size_t i = 0; i < count && i < UNKNOWN_SHOWN && used < sizeof text; i++)
        used += (size_t)snprintf(text + used, sizeof text - used, "%s'%.120s'", i ? ", " : "", unknown[i]);
    return engine_error_set(why, ENGINE_BAD_MODEL, "%s: %zu of %zu keys match no linear of the transformer: %s%s",
                            l->name, count, of, text, count > UNKNOWN_SHOWN ? ", .." : "");
}

/* All keys, or an error that lists those nothing is known about. */
static bool read_keys(struct key *keys, const struct lora *l, const struct transformer_config *config,
                      struct engine_error *why)
{
    size_t of = safetensors_count(l->files), unknown = 0;
    const char *names[UNKNOWN_SHOWN];
    for (size_t i = 0; i < of; i++) {
        struct tensor_names_place places[TENSOR_NAMES_PIECES_MAX];
        const struct safetensors_entry *e = safetensors_at(l->files, i);
        if (read_key(&keys[i], e) && linears_of(places, &keys[i], config))
            continue;
        if (unknown < UNKNOWN_SHOWN)
            names[unknown] = e->name;
        unknown++;
    }
    return !unknown || list_unknown(l, names, unknown, of, why);
}

/* --- factors --------------------------------------------------------------------------------------------- */

static bool format_of(const struct safetensors_entry *e, enum quant_format *ret)
{
    *ret = e->dtype == SAFETENSORS_F32 ? QUANT_F32 : e->dtype == SAFETENSORS_F16 ? QUANT_F16 : QUANT_BF16;
    return e->dtype == SAFETENSORS_F32 || e->dtype == SAFETENSORS_F16 || e->dtype == SAFETENSORS_BF16;
}

static struct quant_matrix numbers_of(const struct safetensors_entry *e)
{
    struct quant_matrix m = {.n = 1, .data = e->data};
    format_of(e, &m.format);
    m.k = (int64_t)(e->bytes / (size_t)quant_info(m.format)->bytes);
    return m;
}

static bool check_numbers(const struct safetensors_entry *e, struct engine_error *why)
{
    enum quant_format format;
    if (!format_of(e, &format))
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: '%s': dtype %s, accepted: F32, BF16, F16", e->file, e->name,
                                safetensors_dtype_name(e->dtype));
    struct quant_matrix m = numbers_of(e);
    return quant_is_finite(&m, 0, 1) ||
           engine_error_set(why, ENGINE_BAD_MODEL, "%s: '%s' has NaN or infinite values", e->file, e->name);
}

static const char *shape_text(char *to, size_t bytes, const struct safetensors_entry *e)
{
    size_t used = (size_t)snprintf(to, bytes, "[");
    for (int i = 0; i < e->rank && used < bytes; i++)
        used += (size_t)snprintf(to + used, bytes - used, "%s%lld", i ? "," : "", (long long)e->shape[i]);
    if (used < bytes)
        snprintf(to + used, bytes - used, "]");
    return to;
}

/* A matrix [n, k]; 0 for either: any, from 1 to RANK_MAX. */
static bool check_shape(const struct safetensors_entry *e, int64_t n, int64_t k, struct engine_error *why)
{
    char got[128];
    int64_t want[2] = {n, k};
    bool ok = e->rank == 2;
    for (int i = 0; ok && i < 2; i++)
        ok = want[i] ? e->shape[i] == want[i] : e->shape[i] >= 1 && e->shape[i] <= RANK_MAX;
    if (ok)
        return true;
    char rows[24] = "any", columns[24] = "any";
    if (n)
        snprintf(rows, sizeof rows, "%lld", (long long)n);
    if (k)
        snprintf(columns, sizeof columns, "%lld", (long long)k);
    return engine_error_set(why, ENGINE_BAD_MODEL,
                            "%s: '%s': shape %s, want [%s,%s]; is it an adapter of another model?", e->file, e->name,
                            shape_text(got, sizeof got, e), rows, columns);
}

static bool want_factors(const struct lora_target *t, const struct key *key, const enum lora_factor *wanted,
                         size_t count, struct engine_error *why)
{
    for (size_t i = 0; i < count; i++)
        if (!t->factor[wanted[i]])
            return engine_error_set(why, ENGINE_BAD_MODEL, "%s: module '%.*s': factors are missing (%s needs %zu)",
                                    key->entry->file, (int)key->module_length, key->entry->name, lora_kind_name(t),
                                    count);
    return true;
}

static bool check_plain(struct lora_target *t, const struct key *key, int64_t rows, struct engine_error *why)
{
    const struct safetensors_entry *down = t->factor[LORA_DOWN], *up = t->factor[LORA_UP];
    if (!want_factors(t, key, (enum lora_factor[]){LORA_DOWN, LORA_UP}, 2, why) || !check_shape(down, 0, t->k, why))
        return false;
    t->rank = down->shape[0];
    return check_shape(up, rows, t->rank, why);
}

static bool check_loha(struct lora_target *t, const struct key *key, int64_t rows, struct engine_error *why)
{
    static const enum lora_factor wanted[] = {LORA_W1_A, LORA_W1_B, LORA_W2_A, LORA_W2_B};
    if (!want_factors(t, key, wanted, 4, why) || !check_shape(t->factor[LORA_W1_B], 0, t->k, why))
        return false;
    t->rank = t->factor[LORA_W1_B]->shape[0];
    return check_shape(t->factor[LORA_W1_A], rows, t->rank, why) &&
           check_shape(t->factor[LORA_W2_A], rows, t->rank, why) &&
           check_shape(t->factor[LORA_W2_B], t->rank, t->k, why);
}

/* One side of a Kronecker product, [n, k] whole or of two factors; both sides of a file have the same rank. */
static bool check_side(struct lora_target *t, const struct key *key, enum lora_factor whole, int64_t *n, int64_t *k,
                       struct engine_error *why)
{
    const struct safetensors_entry *w = t->factor[whole], *a = t->factor[whole + 1], *b = t->factor[whole + 2];
    if (w ? a || b : !a || !b)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: module '%.*s': want lokr_w%d, or its _a and _b",
                                key->entry->file, (int)key->module_length, key->entry->name, whole == LORA_W1 ? 1 : 2);
    if (w) {
        *n = w->shape[0], *k = w->shape[1];
        return check_shape(w, 0, 0, why);
    }
    if (!check_shape(a, 0, t->rank, why) || !check_shape(b, a->shape[1], 0, why))
        return false;
    t->rank = a->shape[1];
    *n = a->shape[0], *k = b->shape[1];
    return true;
}

static bool check_lokr(struct lora_target *t, const struct key *key, int64_t rows, struct engine_error *why)
{
    int64_t n1, k1, n2, k2;
    if (!check_side(t, key, LORA_W1, &n1, &k1, why) || !check_side(t, key, LORA_W2, &n2, &k2, why))
        return false;
    if (n1 * n2 == rows && k1 * k2 == t->k) /* each at most RANK_MAX */
        return true;
    return engine_error_set(
        why, ENGINE_BAD_MODEL,
        "%s: module '%.*s': [%lld,%lld] x [%lld,%lld] is not [%lld,%lld]; is it an adapter of another model?",
        key->entry->file, (int)key->module_length, key->entry->name, (long long)n1, (long long)k1, (long long)n2,
        (long long)k2, (long long)rows, (long long)t->k);
}

static bool check_magnitude(struct lora_target *t, int64_t rows, struct engine_error *why)
{
    const struct safetensors_entry *m = t->factor[LORA_MAGNITUDE];
    char got[128];
    if (!m)
        return true;
    bool by_row = (m->rank == 1 || (m->rank == 2 && m->shape[1] == 1)) && m->shape[0] == rows;
    t->is_column_wise = !by_row && m->rank == 2 && m->shape[0] == 1 && m->shape[1] == t->k;
    if (t->is_column_wise && t->pieces > 1)
        return engine_error_set(why, ENGINE_BAD_MODEL,
                                "%s: '%s': a magnitude for each column of a fused module, accepted: one for "
                                "each row",
                                m->file, m->name);
    return by_row || t->is_column_wise ||
           engine_error_set(why, ENGINE_BAD_MODEL, "%s: '%s': shape %s, want [%lld], [%lld,1] or [1,%lld]", m->file,
                            m->name, shape_text(got, sizeof got, m), (long long)rows, (long long)rows, (long long)t->k);
}

/* --- alpha ------------------------------------------------------------------------------------------------- */

static bool read_alpha(const struct safetensors_entry *e, double *ret, struct engine_error *why)
{
    int64_t count = 1, whole = 0;
    float f = 0;
    for (int i = 0; i < e->rank; i++)
        count *= e->shape[i]; /* as many as the file has bytes for */
    *ret = NAN;
    if (count == 1 && e->dtype == SAFETENSORS_F64) {
        memcpy(ret, e->data, 8);
    } else if (count == 1 && (e->dtype == SAFETENSORS_I64 || e->dtype == SAFETENSORS_I32)) {
        memcpy(&whole, e->data, e->bytes);
        *ret = e->dtype == SAFETENSORS_I64 ? (double)whole : (double)(int32_t)whole;
    } else if (count == 1 && check_numbers(e, why)) {
        struct quant_matrix m = numbers_of(e);
        quant_rows_f32(&f, &m, 0, 1);
        *ret = (double)f;
    }
    return isfinite(*ret) ||
           engine_error_set(why, ENGINE_BAD_MODEL, "%s: '%s' is not one finite number", e->file, e->name);
}

static json_t *metadata_of(const struct lora *l, const char *key)
{
    char name[64];
    snprintf(name, sizeof name, "transformer.%s", key);
    json_t *found = json_object_get(l->metadata, name);
    return found ? found : json_object_get(l->metadata, key);
}

/* A pattern of PEFT's alpha_pattern and rank_pattern names a module or the end of its name, '^' in front the whole. */
static bool pattern_matches(const char *pattern, const char *module)
{
    size_t m = strlen(module), p = strlen(pattern);
    if (*pattern == '^')
        return strcmp(pattern + 1, module) == 0;
    return m >= p && strcmp(module + m - p, pattern) == 0 && (m == p || module[m - p - 1] == '.');
}

/* A number of the metadata for a module: from `patterns` when one matches, else `key`. NAN: none. */
static bool module_number(const struct lora *l, const char *module, const char *patterns, const char *key, double *ret,
                          struct engine_error *why)
{
    const char *pattern;
    json_t *value, *found = metadata_of(l, key);
    json_object_foreach(metadata_of(l, patterns), pattern, value)
    {
        if (strpbrk(pattern, "$*+?()[]{}|\\"))
            return engine_error_set(why, ENGINE_BAD_MODEL,
                                    "%s: lora_adapter_metadata: %s has '%.100s', accepted: names of modules, not "
                                    "regular expressions",
                                    l->name, patterns, pattern);
        if (pattern_matches(pattern, module)) {
            found = value;
            break;
        }
    }
    *ret = NAN;
    if (!found || json_is_null(found))
        return true;
    *ret = json_number_value(found);
    return json_is_number(found) ||
           engine_error_set(why, ENGINE_BAD_MODEL, "%s: lora_adapter_metadata: %s of '%s' is no number", l->name, key,
                            module);
}

static bool read_scale(struct lora_target *t, const struct lora *l, const struct key *key, struct engine_error *why)
{
    double alpha = NAN, rank = NAN;
    char module[TENSOR_NAMES_BYTES_MAX];
    bool is_flat;
    bare_module(module, &is_flat, key->entry->name, key->module_length);
    if (!module_number(l, module, "alpha_pattern", "lora_alpha", &alpha, why) ||
        !module_number(l, module, "rank_pattern", "r", &rank, why))
        return false;
    if (!isnan(rank) && t->kind == LORA_PLAIN && rank != (double)t->rank)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: module '%s': rank %lld, lora_adapter_metadata says %g",
                                l->name, module, (long long)t->rank, rank);
    bool is_rooted = json_is_true(metadata_of(l, "use_rslora"));
    if (t->factor[LORA_ALPHA]) {
        is_rooted = false;
        if (!read_alpha(t->factor[LORA_ALPHA], &alpha, why))
            return false;
    }
    double over = is_rooted ? sqrt((double)t->rank) : (double)t->rank;
    t->scale = isnan(alpha) || !t->rank ? 1 : (float)(alpha / over);
    return isfinite(t->scale) ||
           engine_error_set(why, ENGINE_BAD_MODEL, "%s: module '%s': alpha %g is too large", l->name, module, alpha);
}

static bool read_metadata(struct lora *l, struct engine_error *why)
{
    const char *text = safetensors_metadata(l->files, "lora_adapter_metadata");
    if (!text)
        return true;
    l->metadata = model_file_json(text, strlen(text), METADATA_VALUES_MAX, "lora_adapter_metadata", why);
    return l->metadata || engine_error_at(why, "%s", l->name);
}

/* --- modules to targets -------------------------------------------------------------------------------------- */

static bool same_module(const struct key *a, const struct key *b)
{
    return a->module_length == b->module_length && memcmp(a->entry->name, b->entry->name, a->module_length) == 0;
}

static int by_module(const void *a, const void *b)
{
    const struct key *x = a, *y = b;
    size_t least = x->module_length < y->module_length ? x->module_length : y->module_length;
    int order = memcmp(x->entry->name, y->entry->name, least);
    return order ? order : (x->module_length > y->module_length) - (x->module_length < y->module_length);
}

/* The factors of one module: none twice, all of one kind. */
static bool gather(struct lora_target *t, const struct key *keys, size_t count, struct engine_error *why)
{
    bool has_kind = false;
    for (size_t i = 0; i < count; i++) {
        const struct safetensors_entry *e = keys[i].entry;
        if (t->factor[keys[i].factor] || (keys[i].has_kind && has_kind && keys[i].kind != t->kind))
            return engine_error_set(why, ENGINE_BAD_MODEL,
                                    "%s: '%s': the module has another such factor, or is of another kind", e->file,
                                    e->name);
        t->factor[keys[i].factor] = e;
        if (keys[i].has_kind) {
            t->kind = keys[i].kind;
            has_kind = true;
        }
        if (keys[i].factor != LORA_ALPHA && !check_numbers(e, why))
            return false;
    }
    return has_kind || engine_error_set(why, ENGINE_BAD_MODEL, "%s: module '%.*s': alpha or magnitude without factors",
                                        keys->entry->file, (int)keys->module_length, keys->entry->name);
}

static bool add_target(struct lora *l, struct lora_target *t, const char *name, struct engine_error *why)
{
    if (l->count == l->capacity) {
        size_t capacity = l->capacity ? 2 * l->capacity : 128;
        struct lora_target *grown = realloc(l->targets, capacity * sizeof *grown);
        if (!grown)
            return no_memory(why);
        l->targets = grown;
        l->capacity = capacity;
    }
    if (!(t->name = strdup(name)))
        return no_memory(why);
    l->targets[l->count++] = *t;
    return true;
}

static bool add_module(struct lora *l, const struct key *keys, size_t count, const struct transformer_config *config,
                       struct engine_error *why)
{
    struct tensor_names_place places[TENSOR_NAMES_PIECES_MAX];
    struct lora_target t = {0};
    int64_t shape[2];
    int linears = linears_of(places, keys, config);
    assert(linears >= 1);
    tensor_names_shape(shape, config, places[0].name);
    t.n = shape[0], t.k = shape[1];
    t.pieces = places[0].pieces;
    t.swap_halves = places[0].change == TENSOR_NAMES_SWAP_HALVES;
    int64_t rows = t.n * t.pieces;
    if (!gather(&t, keys, count, why) || !(t.kind == LORA_PLAIN  ? check_plain(&t, keys, rows, why)
                                           : t.kind == LORA_LOHA ? check_loha(&t, keys, rows, why)
                                                                 : check_lokr(&t, keys, rows, why)))
        return false;
    if (!check_magnitude(&t, rows, why) || !read_scale(&t, l, keys, why))
        return false;
    for (int i = 0; i < linears; i++) {
        t.piece = places[i].piece;
        if (!add_target(l, &t, places[i].name, why))
            return false;
    }
    return true;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct lora_target *)a)->name, ((const struct lora_target *)b)->name);
}

static bool sort_targets(struct lora *l, struct engine_error *why)
{
    qsort(l->targets, l->count, sizeof *l->targets, by_name);
    for (size_t i = 1; i < l->count; i++)
        if (strcmp(l->targets[i - 1].name, l->targets[i].name) == 0)
            return engine_error_set(why, ENGINE_BAD_MODEL, "%s: two modules change '%s'", l->name, l->targets[i].name);
    return true;
}

static bool read_modules(struct lora *l, struct key *keys, const struct transformer_config *config,
                         struct engine_error *why)
{
    size_t count = safetensors_count(l->files);
    if (!count)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: no tensors", l->name);
    if (!read_keys(keys, l, config, why))
        return false;
    qsort(keys, count, sizeof *keys, by_module);
    for (size_t first = 0, end; first < count; first = end) {
        for (end = first + 1; end < count && same_module(&keys[first], &keys[end]); end++)
            ;
        if (!add_module(l, keys + first, end - first, config, why))
            return false;
    }
    return sort_targets(l, why);
}

/* Takes over `files`. */
static bool finish(struct lora **ret, struct safetensors *files, const char *name,
                   const struct transformer_config *config, struct engine_error *why)
{
    struct lora *l = calloc(1, sizeof *l);
    struct key *keys = calloc(safetensors_count(files) + 1, sizeof *keys);
    bool ok = l && keys && (l->name = strdup(name));
    if (l)
        l->files = files;
    else
        safetensors_close(files);
    ok = ok ? read_metadata(l, why) && read_modules(l, keys, config, why) : no_memory(why);
    free(keys);
    if (ok)
        *ret = l;
    else
        lora_close(l);
    return ok;
}

bool lora_open(struct lora **ret, const char *path, const struct transformer_config *config, struct engine_error *why)
{
    struct safetensors *files;
    const char *slash = strrchr(path, '/');
    return safetensors_open_file(&files, path, why) && finish(ret, files, slash ? slash + 1 : path, config, why);
}

bool lora_parse(struct lora **ret, const void *data, size_t bytes, const struct transformer_config *config,
                struct engine_error *why)
{
    struct safetensors *files;
    return safetensors_parse(&files, data, bytes, why) && finish(ret, files, "memory", config, why);
}

void lora_close(struct lora *l)
{
    if (!l)
        return;
    for (size_t i = 0; i < l->count; i++)
        free((char *)l->targets[i].name);
    free(l->targets);
    json_decref(l->metadata);
    safetensors_close(l->files);
    free(l->name);
    free(l);
}

size_t lora_count(const struct lora *l)
{
    return l->count;
}

const struct lora_target *lora_at(const struct lora *l, size_t index)
{
    assert(index < l->count);
    return &l->targets[index];
}

const struct lora_target *lora_find(const struct lora *l, const char *name)
{
    struct lora_target wanted = {.name = name};
    return l->count ? bsearch(&wanted, l->targets, l->count, sizeof *l->targets, by_name) : NULL;
}

const char *lora_kind_name(const struct lora_target *t)
{
    static const char *const names[][2] = {{"lora", "dora"}, {"loha", "loha with dora"}, {"lokr", "lokr with dora"}};
    return names[t->kind][t->factor[LORA_MAGNITUDE] != NULL];
}

/* --- numbers ------------------------------------------------------------------------------------------------- */

/* The module's row that is row i of the target. */
static int64_t module_row(const struct lora_target *t, int64_t i)
{
    return (int64_t)t->piece * t->n + (t->swap_halves ? (i + t->n / 2) % t->n : i);
}

static void read_factor(float *to, const struct lora_target *t, enum lora_factor factor)
{
    struct quant_matrix m = numbers_of(t->factor[factor]);
    quant_rows_f32(to, &m, 0, 1);
}

/* A factor in f32, malloc'ed. NULL: no memory. */
static float *load_factor(const struct lora_target *t, enum lora_factor factor)
{
    struct quant_matrix m = numbers_of(t->factor[factor]);
    float *values = malloc((size_t)m.k * sizeof *values);
    if (values)
        read_factor(values, t, factor);
    return values;
}

/* to[k] = a[rank] b[rank, k] */
static void row_times(float *to, const float *a, const float *b, int64_t rank, int64_t k)
{
    for (int64_t j = 0; j < k; j++)
        to[j] = 0;
    for (int64_t r = 0; r < rank; r++)
        for (int64_t j = 0; j < k; j++)
            to[j] += a[r] * b[r * k + j];
}

/* One side of LoKr: the whole factor, or the product of its two. */
static float *load_side(const struct lora_target *t, enum lora_factor whole, int64_t *n, int64_t *k)
{
    const struct safetensors_entry *w = t->factor[whole];
    if (w) {
        *n = w->shape[0], *k = w->shape[1];
        return load_factor(t, whole);
    }
    *n = t->factor[whole + 1]->shape[0], *k = t->factor[whole + 2]->shape[1];
    float *a = load_factor(t, whole + 1), *b = load_factor(t, whole + 2);
    float *product = a && b ? malloc((size_t)(*n * *k) * sizeof *product) : NULL;
    for (int64_t i = 0; product && i < *n; i++)
        row_times(product + i * *k, a + i * t->rank, b, t->rank, *k);
    free(a);
    free(b);
    return product;
}

static bool delta_plain(float *to, const struct lora_target *t)
{
    float *up = load_factor(t, LORA_UP), *down = load_factor(t, LORA_DOWN);
    bool ok = up && down;
    for (int64_t i = 0; ok && i < t->n; i++)
        row_times(to + i * t->k, up + module_row(t, i) * t->rank, down, t->rank, t->k);
    free(up);
    free(down);
    return ok;
}

static bool delta_loha(float *to, const struct lora_target *t)
{
    float *a1 = load_factor(t, LORA_W1_A), *b1 = load_factor(t, LORA_W1_B), *a2 = load_factor(t, LORA_W2_A);
    float *b2 = load_factor(t, LORA_W2_B), *other = malloc((size_t)t->k * sizeof *other);
    bool ok = a1 && b1 && a2 && b2 && other;
    for (int64_t i = 0; ok && i < t->n; i++) {
        int64_t row = module_row(t, i);
        row_times(to + i * t->k, a1 + row * t->rank, b1, t->rank, t->k);
        row_times(other, a2 + row * t->rank, b2, t->rank, t->k);
        for (int64_t j = 0; j < t->k; j++)
            to[i * t->k + j] *= other[j];
    }
    free(a1), free(b1), free(a2), free(b2), free(other);
    return ok;
}

/* kron(w1, w2)[i1 n2 + i2, j1 k2 + j2] = w1[i1, j1] w2[i2, j2] */
static bool delta_lokr(float *to, const struct lora_target *t)
{
    int64_t n1, k1, n2, k2;
    float *w1 = load_side(t, LORA_W1, &n1, &k1), *w2 = load_side(t, LORA_W2, &n2, &k2);
    bool ok = w1 && w2;
    for (int64_t i = 0; ok && i < t->n; i++) {
        int64_t row = module_row(t, i);
        const float *a = w1 + row / n2 * k1, *b = w2 + row % n2 * k2;
        for (int64_t j = 0; j < t->k; j++)
            to[i * t->k + j] = a[j / k2] * b[j % k2];
    }
    free(w1);
    free(w2);
    return ok;
}

/* d = m w / |w| - base for w = base + d, over `count` values `step` apart. A vector of zeros stays one. */
static void decompose(float *d, const float *base, int64_t count, int64_t step, float magnitude)
{
    double squares = 0;
    for (int64_t i = 0; i < count; i++) {
        double w = (double)base[i * step] + (double)d[i * step];
        squares += w * w;
    }
    double factor = squares > 0 ? (double)magnitude / sqrt(squares) : 0;
    for (int64_t i = 0; i < count; i++) {
        double w = (double)base[i * step] + (double)d[i * step];
        d[i * step] = (float)(factor * w - (double)base[i * step]);
    }
}

static bool apply_magnitude(float *to, const struct lora_target *t, const float *base)
{
    float *m = load_factor(t, LORA_MAGNITUDE);
    for (int64_t j = 0; m && t->is_column_wise && j < t->k; j++)
        decompose(to + j, base + j, t->n, t->k, m[j]);
    for (int64_t i = 0; m && !t->is_column_wise && i < t->n; i++)
        decompose(to + i * t->k, base + i * t->k, t->k, 1, m[module_row(t, i)]);
    free(m);
    return m != NULL;
}

bool lora_needs_base(const struct lora_target *t)
{
    return t->factor[LORA_MAGNITUDE] != NULL;
}

bool lora_delta(float *to, const struct lora_target *t, const float *base, struct engine_error *why)
{
    assert(base || !lora_needs_base(t));
    bool ok = t->kind == LORA_PLAIN ? delta_plain(to, t) : t->kind == LORA_LOHA ? delta_loha(to, t) : delta_lokr(to, t);
    for (int64_t i = 0; ok && i < t->n * t->k; i++)
        to[i] *= t->scale;
    if (ok && lora_needs_base(t))
        ok = apply_magnitude(to, t, base);
    return ok || no_memory(why);
}

bool lora_is_low_rank(const struct lora_target *t)
{
    return t->kind == LORA_PLAIN && !lora_needs_base(t) && t->rank * (t->n + t->k) <= t->n * t->k;
}

void lora_down(float *to, const struct lora_target *t)
{
    assert(lora_is_low_rank(t));
    read_factor(to, t, LORA_DOWN);
}

bool lora_up(float *to, const struct lora_target *t, struct engine_error *why)
{
    assert(lora_is_low_rank(t));
    float *up = load_factor(t, LORA_UP);
    for (int64_t i = 0; up && i < t->n; i++)
        memcpy(to + i * t->rank, up + module_row(t, i) * t->rank, (size_t)t->rank * sizeof *to);
    free(up);
    return up || no_memory(why);
}
