/* weight_files.c - names through tensor_names, values through quant, one entry of either file format behind both.
 *
 * The steps of weight_files_find: where is the tensor by its scheme -> the entry of the file -> its number format, from its
 * own dtype and the tensors beside it -> the rows that are asked for. The file formats meet in `struct entry` and nowhere
 * else. */
#include "weight_files.h"

#include <assert.h>
#include <stdalign.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "model_file.h"

#define NOTE_BYTES_MAX (8u << 20)
#define NOTE_VALUES_MAX 200000u
#define TEXT_LAYERS_USED MODEL_CONFIG_TEXT_LAYERS

struct weight_files {
    struct safetensors *safetensors; /* one of the two */
    struct gguf *gguf;
    struct tensor_names names;
    bool is_part;
    json_t *note;                    /* "_quantization_metadata", or NULL */
    bool is_full_precision;          /* no product is in FP8: an older file without a note says so by a tensor of two values */
    char path[MODEL_FILE_PATH_MAX];
};

/* --- opening ------------------------------------------------------------------------------------------- */

static bool has_raw(const void *files, const char *name)
{
    const struct weight_files *f = files;
    return f->gguf ? gguf_find(f->gguf, name) != NULL : safetensors_find(f->safetensors, name) != NULL;
}

static bool has_two_values(const struct weight_files *f, const char *name)
{
    char whole[TENSOR_NAMES_BYTES_MAX];
    snprintf(whole, sizeof whole, "%s%s", f->names.prefix, name);
    const struct safetensors_entry *e = f->safetensors ? safetensors_find(f->safetensors, whole) : NULL;
    return e && e->rank == 1 && e->shape[0] == 2;
}

static bool read_note(struct weight_files *f, struct engine_error *why)
{
    const char *text = f->safetensors ? safetensors_metadata(f->safetensors, "_quantization_metadata") : NULL;
    if (!text) {
        f->is_full_precision = has_two_values(f, "scaled_fp8");
        return true;
    }
    size_t bytes = strlen(text);
    if (bytes > NOTE_BYTES_MAX)
        return engine_error_set(why, ENGINE_BAD_MODEL, "'_quantization_metadata' has %zu bytes, accepted: at most %u", bytes,
                                NOTE_BYTES_MAX);
    f->note = model_file_json(text, bytes, NOTE_VALUES_MAX, "'_quantization_metadata'", why);
    return f->note != NULL;
}

static bool check_architecture(const struct weight_files *f, struct engine_error *why)
{
    const char *name;
    if (!f->gguf || !f->is_part || f->names.part != TENSOR_NAMES_TEXT_ENCODER ||
        !gguf_has(f->gguf, "general.architecture"))
        return true;
    if (!gguf_text(f->gguf, &name, "general.architecture", why))
        return false;
    return strcmp(name, "qwen3") == 0 || engine_error_set(why, ENGINE_BAD_MODEL, "'general.architecture' is '%.60s', the text "
                                                          "encoder of this family is qwen3", name);
}

static struct weight_files *new_files(enum tensor_names_part part, const char *path, struct engine_error *why)
{
    struct weight_files *f = calloc(1, sizeof *f);
    if (!f) {
        engine_error_set(why, ENGINE_NO_MEMORY, "no memory for the list of tensors");
        return NULL;
    }
    f->names = (struct tensor_names){part, TENSOR_NAMES_DIFFUSERS, ""};
    snprintf(f->path, sizeof f->path, "%s", path);
    return f;
}

/* What is known once the headers are: names, metadata. */
static bool finish(struct weight_files *f, bool ok, struct weight_files **ret, struct engine_error *why)
{
    if (ok) {
        f->is_part = tensor_names_detect(&f->names, f->names.part, has_raw, f);
        const char *slash = strrchr(f->path, '/');
        ok = (read_note(f, why) && check_architecture(f, why)) || engine_error_at(why, "%s", slash ? slash + 1 : f->path);
    }
    if (!ok) {
        weight_files_close(f);
        return false;
    }
    *ret = f;
    return true;
}

static bool open_folder(struct weight_files *f, struct engine_error *why)
{
    const char *stem = f->names.part == TENSOR_NAMES_TEXT_ENCODER ? "model" : "diffusion_pytorch_model";
    return safetensors_open(&f->safetensors, f->path, stem, why);
}

static bool open_file(struct weight_files *f, struct engine_error *why)
{
    char magic[4] = {0};
    int fd;
    size_t bytes;
    if (!model_file_open(&fd, &bytes, f->path, why))
        return false;
    bool ok = bytes < sizeof magic || model_file_at(fd, magic, sizeof magic, 0, f->path, why);
    close(fd);
    if (!ok)
        return false;
    return memcmp(magic, "GGUF", 4) == 0 ? gguf_open_file(&f->gguf, f->path, why)
                                         : safetensors_open_file(&f->safetensors, f->path, why);
}

bool weight_files_open(struct weight_files **ret, enum tensor_names_part part, const char *path, struct engine_error *why)
{
    struct stat st;
    if (strlen(path) >= MODEL_FILE_PATH_MAX)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%.80s..: the path has %zu bytes, accepted: less than %d", path,
                                strlen(path), MODEL_FILE_PATH_MAX);
    struct weight_files *f = new_files(part, path, why);
    if (!f)
        return false;
    bool is_folder = stat(path, &st) == 0 && S_ISDIR(st.st_mode);
    return finish(f, is_folder ? open_folder(f, why) : open_file(f, why), ret, why);
}

bool weight_files_parse(struct weight_files **ret, enum tensor_names_part part, const void *data, size_t bytes,
                        struct engine_error *why)
{
    struct weight_files *f = new_files(part, "memory", why);
    if (!f)
        return false;
    bool is_gguf = bytes >= 4 && memcmp(data, "GGUF", 4) == 0;
    return finish(f, is_gguf ? gguf_parse(&f->gguf, data, bytes, why) : safetensors_parse(&f->safetensors, data, bytes, why),
                  ret, why);
}

void weight_files_close(struct weight_files *f)
{
    if (!f)
        return;
    safetensors_close(f->safetensors);
    gguf_close(f->gguf);
    json_decref(f->note);
    free(f);
}

bool weight_files_is_part(const struct weight_files *f)
{
    return f->is_part;
}

const char *weight_files_path(const struct weight_files *f)
{
    return f->path;
}

const struct gguf *weight_files_gguf(const struct weight_files *f)
{
    return f->gguf;
}

/* --- number formats of safetensors ----------------------------------------------------------------------- */

static bool refuse(struct engine_error *why, const struct safetensors_entry *e, const char *text)
{
    return engine_error_set(why, ENGINE_BAD_MODEL, "%s: tensor '%s': %s", e->file, e->name, text);
}

static const struct safetensors_entry *beside(const struct weight_files *f, const char *weight, enum tensor_names_scale kind)
{
    char name[TENSOR_NAMES_BYTES_MAX];
    for (int spelling = 0; tensor_names_beside(name, weight, kind, spelling); spelling++) {
        const struct safetensors_entry *e = safetensors_find(f->safetensors, name);
        if (e)
            return e;
    }
    return NULL;
}

static int64_t count_of(int rank, const int64_t *shape)
{
    int64_t count = 1; /* the readers checked that the product fits, unless it is 0 */
    for (int i = 0; i < rank; i++)
        if (shape[i] == 0)
            return 0;
    for (int i = 0; i < rank; i++)
        count *= shape[i];
    return count;
}

/* One number, F32 or BF16. */
static bool read_scale(float *ret, const struct safetensors_entry *e, struct engine_error *why)
{
    uint16_t half;
    if (count_of(e->rank, e->shape) != 1)
        return refuse(why, e, "a scale of several values; accepted: one for the whole tensor");
    if (e->dtype == SAFETENSORS_F32) {
        memcpy(ret, e->data, 4);
    } else if (e->dtype == SAFETENSORS_BF16) {
        memcpy(&half, e->data, 2);
        *ret = tensor_f32_of(half);
    } else {
        return refuse(why, e, "a scale that is neither F32 nor BF16");
    }
    return true;
}

/* What the metadata of the file, or a note beside the tensor, says of a layer. */
struct layer_note {
    const char *format;     /* NULL: nothing */
    bool is_full_precision; /* its products are never in FP8 */
    json_t *owner;          /* of a note beside the tensor: the text lives as long */
};

/* What else may stand there (a rotation of the inputs, for one) changes what the values mean. */
static bool read_note_of_layer(struct layer_note *ret, json_t *layer, const struct safetensors_entry *e, struct engine_error *why)
{
    const char *key;
    json_t *value;
    json_object_foreach(layer, key, value)
    {
        if (strcmp(key, "format") == 0 && json_is_string(value))
            ret->format = json_string_value(value);
        else if (strcmp(key, "full_precision_matrix_mult") == 0 && json_is_boolean(value))
            ret->is_full_precision = json_is_true(value);
        else if (!json_is_null(value) && !json_is_false(value))
            return engine_error_set(why, ENGINE_BAD_MODEL, "%s: tensor '%s': its metadata has '%.60s', accepted: 'format', a name, and "
                                    "'full_precision_matrix_mult', true or false", e->file, e->name, key);
    }
    return true;
}

/* The caller gives ret->owner back, whatever the answer. */
static bool find_note(const struct weight_files *f, struct layer_note *ret, const struct safetensors_entry *e, struct engine_error *why)
{
    char layer[TENSOR_NAMES_BYTES_MAX];
    size_t length = strlen(e->name);
    *ret = (struct layer_note){.is_full_precision = f->is_full_precision};
    if (length < 7 || strcmp(e->name + length - 7, ".weight") != 0 || length >= sizeof layer)
        return true;
    snprintf(layer, sizeof layer, "%.*s", (int)(length - 7), e->name);
    json_t *said = json_object_get(json_object_get(f->note, "layers"), layer);
    const struct safetensors_entry *note = beside(f, e->name, TENSOR_NAMES_QUANT_NOTE);
    if (said || !note)
        return read_note_of_layer(ret, said, e, why);
    if (note->dtype != SAFETENSORS_U8 || note->bytes > 4096)
        return refuse(why, note, "want a text of at most 4096 bytes");
    ret->owner = model_file_json(note->data, note->bytes, 64, note->name, why);
    return ret->owner && read_note_of_layer(ret, ret->owner, e, why);
}

/* What is said of the tensor is what stands there, and nothing is left to be guessed. */
static bool heed_note(const struct weight_files *f, struct quant_matrix *m, const struct safetensors_entry *e, struct engine_error *why)
{
    static const struct { const char *name; enum quant_format format; } known[] = {
        {"float8_e4m3fn", QUANT_FP8_E4M3}, {"nvfp4", QUANT_NVFP4}};
    const struct safetensors_entry *columns = beside(f, e->name, TENSOR_NAMES_COLUMN_SCALE);
    struct layer_note note;
    if (columns)
        return refuse(why, columns, "inputs scaled by columns (AWQ) are not accepted; accepted: float8_e4m3fn and nvfp4 without");
    bool ok = find_note(f, &note, e, why);
    bool is_known = !ok || !note.format;
    for (size_t i = 0; !is_known && i < sizeof known / sizeof *known; i++)
        is_known = strcmp(note.format, known[i].name) == 0 && known[i].format == m->format;
    if (!is_known)
        ok = engine_error_set(why, ENGINE_BAD_MODEL, "%s: tensor '%s': its metadata calls it '%.40s', what stands there is %s; "
                              "accepted: float8_e4m3fn and nvfp4 that are", e->file, e->name, note.format, quant_info(m->format)->name);
    m->has_fp8_products = m->has_fp8_products && !note.is_full_precision;
    json_decref(note.owner);
    return ok;
}

static bool fp8_format(const struct weight_files *f, const struct safetensors_entry *e, struct quant_matrix *ret,
                       struct engine_error *why)
{
    const struct safetensors_entry *scale = beside(f, e->name, TENSOR_NAMES_WEIGHT_SCALE);
    const struct safetensors_entry *input = beside(f, e->name, TENSOR_NAMES_INPUT_SCALE);
    ret->format = QUANT_FP8_E4M3;
    ret->has_fp8_products = true;
    ret->scale = 1;
    if ((scale && !read_scale(&ret->scale, scale, why)) || (input && !read_scale(&ret->input_scale, input, why)))
        return false;
    return !input || ret->input_scale != 0 || refuse(why, input, "a scale of 0, want one that is positive");
}

static bool nvfp4_format(const struct weight_files *f, const struct safetensors_entry *e, struct quant_matrix *ret,
                         const struct safetensors_entry **ret_blocks, struct engine_error *why)
{
    const struct safetensors_entry *blocks = beside(f, e->name, TENSOR_NAMES_WEIGHT_SCALE);
    const struct safetensors_entry *scale = beside(f, e->name, TENSOR_NAMES_WEIGHT_SCALE_2);
    if (e->rank != 2 || !blocks || !scale)
        return refuse(why, e, "dtype U8, accepted: NVFP4, a matrix with .weight_scale and .weight_scale_2 beside it");
    if (blocks->dtype != SAFETENSORS_F8_E4M3)
        return refuse(why, blocks, "block scales that are not F8_E4M3");
    ret->format = QUANT_NVFP4;
    ret->is_swizzled = true;
    ret->block_scales = blocks->data;
    *ret_blocks = blocks;
    return read_scale(&ret->scale, scale, why);
}

/* --- one tensor of the files -------------------------------------------------------------------------------- */

struct entry {
    const char *name, *file;
    int rank;
    int64_t shape[4];           /* in values */
    struct quant_matrix matrix; /* all of it */
    bool is_mapped;
};

static bool check_matrix(const struct quant_matrix *m, size_t bytes, size_t block_scale_bytes, const char *file,
                         const char *name, struct engine_error *why)
{
    char text[256];
    return quant_check(m, bytes, block_scale_bytes, text, sizeof text) ||
           engine_error_set(why, ENGINE_BAD_MODEL, "%s: tensor '%s': %s", file, name, text);
}

static bool entry_of_safetensors(const struct weight_files *f, struct entry *ret, const struct safetensors_entry *e,
                                 struct engine_error *why)
{
    const struct safetensors_entry *blocks = NULL;
    struct quant_matrix m = {.data = e->data};
    bool ok = true;
    if (e->rank > 4)
        return refuse(why, e, "more than 4 axes");
    if (e->dtype == SAFETENSORS_F32)
        m.format = QUANT_F32;
    else if (e->dtype == SAFETENSORS_BF16)
        m.format = QUANT_BF16;
    else if (e->dtype == SAFETENSORS_F16)
        m.format = QUANT_F16;
    else if (e->dtype == SAFETENSORS_F8_E4M3)
        ok = fp8_format(f, e, &m, why);
    else if (e->dtype == SAFETENSORS_U8)
        ok = nvfp4_format(f, e, &m, &blocks, why);
    else
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: tensor '%s': dtype %s, accepted: F32, BF16, F16, F8_E4M3, NVFP4",
                                e->file, e->name, safetensors_dtype_name(e->dtype));
    if (!ok || !heed_note(f, &m, e, why))
        return false;
    *ret = (struct entry){.name = e->name, .file = e->file, .rank = e->rank, .is_mapped = e->is_mapped};
    memcpy(ret->shape, e->shape, (size_t)e->rank * sizeof *ret->shape);
    int64_t count = count_of(e->rank, e->shape);
    if (m.format == QUANT_NVFP4) /* two values a byte */
        ok = !__builtin_mul_overflow(ret->shape[1], (int64_t)2, &ret->shape[1]) && !__builtin_mul_overflow(count, (int64_t)2, &count);
    m.n = e->rank > 1 && e->shape[0] ? e->shape[0] : 1;
    m.k = count / m.n;
    ret->matrix = m;
    if (!ok)
        return refuse(why, e, "more values than can be counted");
    return check_matrix(&m, e->bytes, blocks ? blocks->bytes : 0, e->file, e->name, why);
}

static bool entry_of_gguf(struct entry *ret, const struct gguf_entry *e, struct engine_error *why)
{
    *ret = (struct entry){.name = e->name, .file = e->file, .rank = e->rank, .is_mapped = e->is_mapped};
    memcpy(ret->shape, e->shape, sizeof ret->shape);
    int64_t count = count_of(e->rank, e->shape);
    ret->matrix = (struct quant_matrix){.format = e->format, .k = e->row_values,
                                        .n = e->row_values ? count / e->row_values : 0, .data = e->data};
    return check_matrix(&ret->matrix, e->bytes, 0, e->file, e->name, why);
}

static bool find_entry(const struct weight_files *f, struct entry *ret, const char *name, const char *asked,
                       struct engine_error *why)
{
    const struct gguf_entry *g = f->gguf ? gguf_find(f->gguf, name) : NULL;
    const struct safetensors_entry *s = f->safetensors ? safetensors_find(f->safetensors, name) : NULL;
    if (g)
        return entry_of_gguf(ret, g, why);
    if (s)
        return entry_of_safetensors(f, ret, s, why);
    if (strcmp(name, asked) == 0)
        return engine_error_set(why, ENGINE_BAD_MODEL, "tensor '%s' is missing", asked);
    return engine_error_set(why, ENGINE_BAD_MODEL, "tensor '%s' is missing ('%s' here)", name, asked);
}

/* --- asking --------------------------------------------------------------------------------------------------- */

static bool cut_piece(struct weight *w, const struct tensor_names_place *place, struct engine_error *why)
{
    int64_t count = weight_files_values(w), each = w->rank ? w->shape[0] / place->pieces : 0;
    bool ok = place->pieces == 1 || (w->rank == 2 && w->shape[0] % place->pieces == 0 && w->rows % place->pieces == 0);
    if (!ok)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: tensor '%s': %lld values in rows of %lld cannot be cut into %d "
                                "equal parts", w->file, w->name, (long long)count, (long long)w->matrix.k, place->pieces);
    if (place->pieces > 1) {
        w->shape[0] = each;
        w->rows /= place->pieces;
        w->first = place->piece * w->rows;
    }
    return true;
}

static bool change(struct weight *w, const struct tensor_names_place *place, struct engine_error *why)
{
    if (place->change == TENSOR_NAMES_SQUEEZE && w->rank == 4 && w->shape[2] == 1 && w->shape[3] == 1)
        w->rank = 2;
    w->swap_halves = place->change == TENSOR_NAMES_SWAP_HALVES;
    return !w->swap_halves || w->rows % 2 == 0 ||
           engine_error_set(why, ENGINE_BAD_MODEL, "%s: tensor '%s': an odd number of rows has no halves", w->file, w->name);
}

bool weight_files_find(const struct weight_files *f, struct weight *ret, const char *name, struct engine_error *why)
{
    struct tensor_names_place place;
    struct entry e;
    if (!tensor_names_in_file(&place, &f->names, name))
        return engine_error_set(why, ENGINE_BAD_MODEL, "tensor '%s' is missing: files of this kind have no such tensor", name);
    if (!find_entry(f, &e, place.name, name, why))
        return false;
    struct weight w = {.file = e.file, .name = e.name, .rank = e.rank, .matrix = e.matrix, .rows = e.matrix.n,
                       .is_mapped = e.is_mapped};
    memcpy(w.shape, e.shape, sizeof w.shape);
    snprintf(w.asked, sizeof w.asked, "%s", name);
    if (!cut_piece(&w, &place, why) || !change(&w, &place, why))
        return false;
    *ret = w;
    return true;
}

bool weight_files_has(const struct weight_files *f, const char *name)
{
    struct tensor_names_place place;
    return tensor_names_in_file(&place, &f->names, name) && has_raw(f, place.name);
}

/* --- listing -------------------------------------------------------------------------------------------------- */

/* Text layers behind the last one used, the final norm and the head are never loaded. */
static bool is_used(const struct weight_files *f, const char *name)
{
    struct tensor_names_place ours[TENSOR_NAMES_PIECES_MAX];
    int layer;
    if (!tensor_names_of_file(ours, &f->names, name))
        return false;
    if (sscanf(ours[0].name, "model.layers.%d.", &layer) == 1)
        return layer < TEXT_LAYERS_USED;
    return strncmp(ours[0].name, "lm_head.", 8) != 0 && strncmp(ours[0].name, "encoder.", 8) != 0 &&
           strncmp(ours[0].name, "quant_conv.", 11) != 0 && strcmp(ours[0].name, "model.norm.weight") != 0;
}

static bool is_beside(const char *name)
{
    static const char *const endings[] = {".weight_scale", ".scale_weight", ".weight_scale_2", ".input_scale", ".scale_input",
                                          ".pre_quant_scale", ".comfy_quant", "scaled_fp8"};
    size_t length = strlen(name);
    for (size_t i = 0; i < sizeof endings / sizeof *endings; i++)
        if (length >= strlen(endings[i]) && strcmp(name + length - strlen(endings[i]), endings[i]) == 0)
            return true;
    return false;
}

/* The VAE's matrices have a bias and are decoded. */
static bool is_kept(const struct weight_files *f, int rank)
{
    return rank == 2 && f->names.part != TENSOR_NAMES_VAE;
}

bool weight_files_list(const struct weight_files *f, size_t index, struct weight_line *ret)
{
    if (index >= (f->gguf ? gguf_count(f->gguf) : safetensors_count(f->safetensors)))
        return false;
    if (f->gguf) {
        const struct gguf_entry *e = gguf_at(f->gguf, index);
        *ret = (struct weight_line){.name = e->name, .format = quant_info(e->format)->name, .bytes = e->bytes,
                                    .parameters = (uint64_t)count_of(e->rank, e->shape), .is_used = is_used(f, e->name)};
        bool stays = is_kept(f, e->rank) && quant_is_small(e->format);
        ret->kept_bytes = stays ? e->bytes : 0;
        return true;
    }
    const struct safetensors_entry *e = safetensors_at(f->safetensors, index);
    bool is_nvfp4 = e->dtype == SAFETENSORS_U8 && beside(f, e->name, TENSOR_NAMES_WEIGHT_SCALE_2);
    *ret = (struct weight_line){.name = e->name, .format = is_nvfp4 ? "NVFP4" : safetensors_dtype_name(e->dtype),
                                .bytes = e->bytes};
    if (is_beside(e->name))
        return true;
    ret->parameters = (uint64_t)count_of(e->rank, e->shape) * (is_nvfp4 ? 2 : 1);
    ret->is_used = is_used(f, e->name);
    if (is_kept(f, e->rank) && (is_nvfp4 || e->dtype == SAFETENSORS_F8_E4M3))
        ret->kept_bytes = e->bytes + (is_nvfp4 ? ret->parameters / 16 : 0);
    struct entry entry;
    struct engine_error ignored;
    ret->has_fp8_products = e->dtype == SAFETENSORS_F8_E4M3 && entry_of_safetensors(f, &entry, e, &ignored) && entry.matrix.has_fp8_products;
    return true;
}

/* --- values --------------------------------------------------------------------------------------------------- */

int64_t weight_files_values(const struct weight *w)
{
    return count_of(w->rank, w->shape);
}

static const uint8_t *bytes_of(const struct weight *w, size_t *ret_bytes)
{
    size_t skip = 0;
    bool ok = quant_bytes(&skip, w->matrix.format, w->first, w->matrix.k) &&
              quant_bytes(ret_bytes, w->matrix.format, w->rows, w->matrix.k);
    assert(ok); /* a part of what quant_check has seen */
    (void)ok;
    return (const uint8_t *)w->matrix.data + skip;
}

/* Blocks of a fixed length, because a compiler makes only such loops wide at -O2; one value after the other would take longer than
 * reading 16 GB from a disk. */
#define BLOCK_BYTES 8192

static bool is_bad_f32(const void *block, uint32_t exponent)
{
    const uint32_t *u = block;
    uint32_t bad = 0;
    for (int i = 0; i < BLOCK_BYTES / 4; i++)
        bad |= (u[i] & exponent) == exponent;
    return bad;
}

static bool is_bad_16(const void *block, uint32_t exponent)
{
    const uint16_t *u = block;
    uint16_t bad = 0, mask = (uint16_t)exponent;
    for (int i = 0; i < BLOCK_BYTES / 2; i++)
        bad |= (u[i] & mask) == mask;
    return bad;
}

static bool is_bad_8(const void *block, uint32_t exponent)
{
    const uint8_t *u = block;
    uint8_t bad = 0, mask = (uint8_t)exponent;
    for (int i = 0; i < BLOCK_BYTES; i++)
        bad |= (u[i] & mask) == mask;
    return bad;
}

/* Has a value all bits of `exponent`, as NaN and infinity have? */
static bool has_bad(const uint8_t *data, size_t bytes, uint32_t exponent, bool (*is_bad)(const void *block, uint32_t exponent))
{
    alignas(8) uint8_t block[BLOCK_BYTES];
    for (; bytes >= BLOCK_BYTES; data += BLOCK_BYTES, bytes -= BLOCK_BYTES) {
        memcpy(block, data, BLOCK_BYTES);
        if (is_bad(block, exponent))
            return true;
    }
    memset(block, 0, sizeof block);
    memcpy(block, data, bytes);
    return is_bad(block, exponent);
}

/* The formats of single values in loops that a compiler makes wide; the others are told from their scales. */
bool weight_files_is_finite(const struct weight *w)
{
    size_t bytes;
    const uint8_t *data = bytes_of(w, &bytes);
    switch (w->matrix.format) {
    case QUANT_F32:
        return !has_bad(data, bytes, 0x7f800000, is_bad_f32);
    case QUANT_BF16:
        return !has_bad(data, bytes, 0x7f80, is_bad_16);
    case QUANT_F16:
        return !has_bad(data, bytes, 0x7c00, is_bad_16);
    case QUANT_FP8_E4M3:
        return quant_is_finite(&w->matrix, 0, 0) && !has_bad(data, bytes, 0x7f, is_bad_8);
    default:
        return quant_is_finite(&w->matrix, w->first, w->rows);
    }
}

struct tensor weight_files_view(const struct weight *w)
{
    size_t bytes;
    bool is_f32 = w->matrix.format == QUANT_F32;
    if (w->swap_halves || (!is_f32 && w->matrix.format != QUANT_BF16))
        return (struct tensor){0};
    return tensor_of((void *)(uintptr_t)bytes_of(w, &bytes), is_f32 ? TENSOR_F32 : TENSOR_BF16, w->rank, w->shape);
}

static int runs_of(const struct weight *w, struct quant_run ret[WEIGHT_FILES_RUNS_MAX])
{
    int64_t half = w->swap_halves ? w->rows / 2 : 0;
    ret[0] = (struct quant_run){w->matrix, w->first + half, w->rows - half};
    ret[1] = (struct quant_run){w->matrix, w->first, half};
    return half ? 2 : 1;
}

void weight_files_decode(struct tensor to, const struct weight *w)
{
    assert(to.dtype == TENSOR_F32 || to.dtype == TENSOR_BF16);
    assert(tensor_count(to) == weight_files_values(w));
    struct quant_run runs[WEIGHT_FILES_RUNS_MAX];
    int count = runs_of(w, runs);
    char *at = to.data;
    for (int i = 0; i < count; i++) {
        quant_rows(at, to.dtype, &w->matrix, runs[i].first, runs[i].count);
        at += (size_t)(runs[i].count * w->matrix.k) * tensor_dtype_bytes(to.dtype);
    }
}

int weight_files_runs(const struct weight *w, struct quant_run ret[WEIGHT_FILES_RUNS_MAX])
{
    return w->rank == 2 && w->matrix.k == w->shape[1] ? runs_of(w, ret) : 0;
}

void weight_files_advise(const struct weight *w, enum safetensors_use use)
{
    struct safetensors_entry e = {.is_mapped = w->is_mapped};
    e.data = bytes_of(w, &e.bytes);
    safetensors_advise(&e, use);
}
