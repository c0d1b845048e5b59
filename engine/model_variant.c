/* model_variant.c - a table of published files, the words of a name, an index beside it. */
#include "model_variant.h"

#include <ctype.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "model_config.h"
#include "model_file.h"

/* engine-spec 2.8. Distilled and base files in bf16 have the same size; of the others the size is enough where nothing speaks against it. */
static const struct published {
    int64_t bytes;
    const char *sha256;
    struct model_variant variant;
} published[] = {
    {7751105712, "ec3d4e733a771f61c052fb4856c48b336c55eaf2c65487c2a1faeb9bbda7a343", {true, false}},
    {7751105712, "9c5fed22b76baea749d88fc2abe3ad53245e7b21a0d353a762665eea00043b92", {false, false}},
    {18157185168, "0975d6b77b5f510b99547d6724a208e36527df654e8f6134f59ece3f9f30da58", {true, false}},
    {18157185168, "4a54fad7f5f741b99eee217198daac20b8d8e515e2a1f5b064fd51cf074f95bd", {false, false}},
    {4070624520, "97ed34fe0567e436200f2faee3939b88f2b5d99f8af2a4dc16532c4245c0ccb6", {true, false}},
    {4089498488, "44bab3a86fe98b85d21dd2a4729ebdc3ae51fb8a39f76e457e18c724219e6840", {false, false}},
    {9433061528, "865ba09f5b4c3cbd3468a4bd3acb9fcb2f8740c54317482f0bcd4ed1d3655cee", {true, false}},
    {9567278472, "a9f5028c24a7a96f4f45beb883aad287d9bccc246227a6803edc898ddda42cf4", {false, false}},
    {9818935984, "33f7da5625a00798349a719742999d3c7dd20c1a7eda14663922c363640728f1", {true, true}},
    {2460413488, "d8c5007b6a3bbbdfd38538bbcef5101a55dfde81894f58d2e3c8701cdef3542b", {true, false}},
    {2487544776, "f66faefe951b8eefe0ff3d4082b393fb6dc76d9a34861bd9f4ac54dc3ef381ab", {false, false}},
    {5760960048, "5c72214496dd278f721a112e1bd1585fffed487bc0831c894bcbf30d12e9ee48", {true, false}},
    {5809193808, "730d6bdbd5069cd4cd263cfdc4801d0d06ca14457b903baa5d953a8c2f9e84c9", {false, false}},
};
#define PUBLISHED_COUNT (sizeof published / sizeof *published)

enum answer { SILENT, TOLD };

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/* is_denied(variant, said): what the name or the index says is another variant. */
static bool is_denied(const struct model_variant *v, const struct model_variant *said)
{
    return said && said->is_distilled != v->is_distilled;
}

/* By its size, when only one published file has it; somebody's own file may have it, too, so that a name or an index that says otherwise
 * is a matter for the hash. name, index: NULL where they say nothing. */
static enum answer by_publication(struct model_variant *ret, const char *path, model_variant_sha256 *sha256, const struct model_variant *name,
                                  const struct model_variant *index)
{
    struct stat st;
    char hex[65];
    const struct published *first = NULL;
    int count = 0;
    if (stat(path, &st) != 0 || !S_ISREG(st.st_mode))
        return SILENT;
    for (size_t i = 0; i < PUBLISHED_COUNT; i++)
        if (published[i].bytes == st.st_size) {
            first = first ? first : &published[i];
            count++;
        }
    if (count == 1 && !is_denied(&first->variant, name) && !is_denied(&first->variant, index)) {
        *ret = first->variant;
        return TOLD;
    }
    if (!count || !sha256 || !sha256(path, hex))
        return SILENT;
    for (size_t i = 0; i < PUBLISHED_COUNT; i++)
        if (strcmp(published[i].sha256, hex) == 0) {
            *ret = published[i].variant;
            return TOLD;
        }
    return SILENT;
}

static bool has_word(const char *text, const char *word)
{
    size_t length = strlen(word);
    for (const char *at = text; *at; at++) {
        bool starts = at == text || !isalnum((unsigned char)at[-1]);
        if (starts && strncasecmp(at, word, length) == 0 && !isalnum((unsigned char)at[length]))
            return true;
    }
    return false;
}

bool model_variant_of_name(struct model_variant *ret, const char *name)
{
    bool is_base = has_word(name, "base"), is_kv = has_word(name, "kv");
    bool is_distilled = has_word(name, "distilled") || is_kv;
    if (is_base == is_distilled && (is_base || !has_word(name, "klein")))
        return false; /* both words, or none and not a name of the family */
    *ret = (struct model_variant){!is_base, is_kv};
    return true;
}

/* FOLDER/model_index.json. */
static enum answer by_index(struct model_variant *ret, const char *folder)
{
    char path[MODEL_FILE_PATH_MAX];
    struct model_config c = {0};
    struct engine_error ignored;
    if (!model_file_path(path, folder, "model_index.json", &ignored) || !model_config_is(MODEL_CONFIG_INDEX, path) ||
        !model_config_read(&c, MODEL_CONFIG_INDEX, path, &ignored))
        return SILENT;
    *ret = (struct model_variant){c.is_distilled, strcmp(c.pipeline, "Flux2KleinKVPipeline") == 0};
    return TOLD;
}

/* The index in the folder of the file, or one above when that folder is a model's part. */
static enum answer by_sibling(struct model_variant *ret, const char *path)
{
    char folder[MODEL_FILE_PATH_MAX], above[MODEL_FILE_PATH_MAX + 4];
    struct stat st;
    bool is_folder = stat(path, &st) == 0 && S_ISDIR(st.st_mode);
    const char *end = is_folder ? path + strlen(path) : strrchr(path, '/');
    snprintf(folder, sizeof folder, "%.*s", end ? (int)(end - path) : 1, end ? path : ".");
    if (!is_folder && by_index(ret, folder) == TOLD)
        return TOLD;
    if (!is_folder && strcmp(base_name(folder), "transformer") != 0)
        return SILENT;
    snprintf(above, sizeof above, "%s/..", folder);
    return by_index(ret, above);
}

/* A file may be linked to by a name that says nothing ("transformer.gguf"); then its own name is asked. */
static enum answer by_name(struct model_variant *ret, const char *path)
{
    char *real = NULL;
    bool is_told = model_variant_of_name(ret, base_name(path)) ||
                   ((real = realpath(path, NULL)) && model_variant_of_name(ret, base_name(real)));
    free(real);
    return is_told ? TOLD : SILENT;
}

bool model_variant_tell(struct model_variant *ret, const char *path, model_variant_sha256 *sha256, struct engine_error *why)
{
    struct model_variant name, index;
    bool has_name = by_name(&name, path) == TOLD, has_index = by_sibling(&index, path) == TOLD;
    if (by_publication(ret, path, sha256, has_name ? &name : NULL, has_index ? &index : NULL) == TOLD)
        return true;
    if (has_name && has_index && name.is_distilled != index.is_distilled)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: distilled or base? Its name says one, the model_index.json beside "
                                "it the other; say which with --distilled or --base", path);
    if (!has_name && !has_index)
        return engine_error_set(why, ENGINE_BAD_MODEL, "%s: distilled or base? Their files look alike, and neither the name nor "
                                "a model_index.json beside it tells; say which with --distilled or --base, or put the model's index there", path);
    *ret = has_index ? index : name;
    return true;
}
