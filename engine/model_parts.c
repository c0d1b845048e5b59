/* model_parts.c - configurations of the folder, files of all parts, dimensions of those that are not the folder's. */
#include "model_parts.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "model_shape.h"
#include "model_variant.h"

static const struct {
    const char *name, *option;
    enum model_config_file config;
} kinds[3] = {
    [TENSOR_NAMES_TRANSFORMER] = {"transformer", "--transformer", MODEL_CONFIG_TRANSFORMER},
    [TENSOR_NAMES_TEXT_ENCODER] = {"text_encoder", "--text-encoder", MODEL_CONFIG_TEXT_ENCODER},
    [TENSOR_NAMES_VAE] = {"vae", "--vae", MODEL_CONFIG_VAE},
};

const char *model_parts_name(enum tensor_names_part part)
{
    return kinds[part].name;
}

/* The file or folder given for a part instead of the model folder's; NULL: none. */
static const char *own_path(const struct engine_options *o, int part)
{
    const char *const paths[3] = {[TENSOR_NAMES_TRANSFORMER] = o->transformer, [TENSOR_NAMES_TEXT_ENCODER] = o->text_encoder,
                                  [TENSOR_NAMES_VAE] = o->vae};
    return paths[part];
}

/* The options with the files that stand in the model folder instead of folders: as if each had been given. */
struct source {
    struct engine_options options;
    char paths[3][MODEL_FILE_PATH_MAX];
};

static bool is_folder(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

/* DIR/transformer.safetensors or .gguf into ret; "" when there is none. Both: which one is meant? A link counts wherever it leads:
 * one that leads nowhere is to be named, not passed over. */
static bool find_file(char ret[MODEL_FILE_PATH_MAX], const char *dir, const char *part, struct engine_error *why)
{
    static const char *const endings[] = {"safetensors", "gguf"};
    char name[64], path[MODEL_FILE_PATH_MAX];
    struct stat st;
    ret[0] = 0;
    for (size_t i = 0; i < sizeof endings / sizeof *endings; i++) {
        snprintf(name, sizeof name, "%s.%s", part, endings[i]);
        if (!model_file_path(path, dir, name, why))
            return false;
        if (lstat(path, &st) != 0)
            continue;
        if (ret[0])
            return engine_error_set(why, ENGINE_BAD_MODEL, "%s: %s.safetensors and %s.gguf: one of the two is too many", dir, part, part);
        snprintf(ret, MODEL_FILE_PATH_MAX, "%s", path);
    }
    return true;
}

static bool find_files(struct source *s, struct engine_error *why)
{
    struct engine_options *o = &s->options;
    const char **const given[3] = {[TENSOR_NAMES_TRANSFORMER] = &o->transformer, [TENSOR_NAMES_TEXT_ENCODER] = &o->text_encoder,
                                   [TENSOR_NAMES_VAE] = &o->vae};
    for (int part = 0; part < 3 && o->model_dir; part++) {
        char folder[MODEL_FILE_PATH_MAX];
        if (*given[part])
            continue;
        if (!model_file_path(folder, o->model_dir, kinds[part].name, why))
            return false;
        if (!find_file(s->paths[part], o->model_dir, kinds[part].name, why))
            return false;
        if (s->paths[part][0] && is_folder(folder))
            return engine_error_set(why, ENGINE_BAD_MODEL, "%s and a folder %s: one of the two is too many", s->paths[part], kinds[part].name);
        *given[part] = s->paths[part][0] ? s->paths[part] : NULL;
    }
    return true;
}

static bool check_given(const struct engine_options *o, struct engine_error *why)
{
    for (int part = 0; part < 3 && !o->model_dir; part++)
        if (!own_path(o, part))
            return engine_error_set(why, ENGINE_BAD_MODEL, "no files for the %s: give a model folder (--model) or this part's "
                                    "file (%s)", kinds[part].name, kinds[part].option);
    if (!o->model_dir && !o->tokenizer)
        return engine_error_set(why, ENGINE_BAD_MODEL, "no tokenizer: give a model folder (--model) or a folder with vocab.json "
                                "and merges.txt of Qwen3 (--tokenizer)");
    return true;
}

/* --- configuration ------------------------------------------------------------------------------------------ */

static bool comes_from_folder(const struct engine_options *o, enum model_config_file file)
{
    int part = file == MODEL_CONFIG_TEXT_ENCODER ? TENSOR_NAMES_TEXT_ENCODER : file == MODEL_CONFIG_VAE ? TENSOR_NAMES_VAE
                                                                              : TENSOR_NAMES_TRANSFORMER;
    return o->model_dir && !own_path(o, part);
}

static bool read_folder(struct model_config *c, const struct engine_options *o, struct engine_error *why)
{
    for (enum model_config_file file = 0; file < MODEL_CONFIG_FILES; file++) {
        char path[MODEL_FILE_PATH_MAX];
        if (!comes_from_folder(o, file))
            continue;
        if (!model_file_path(path, o->model_dir, model_config_file_name(file), why))
            return false;
        if (!model_config_read(c, file, path, why))
            return file != MODEL_CONFIG_INDEX || access(path, F_OK) == 0
                       ? false
                       : engine_error_at(why, "a model is a folder in the diffusers layout");
    }
    return true;
}

/* The config.json in a part's folder, or in the folder of its file. */
static bool config_beside(char ret[MODEL_FILE_PATH_MAX], const char *path, struct engine_error *why)
{
    char folder[MODEL_FILE_PATH_MAX];
    const char *slash = strrchr(path, '/');
    if (is_folder(path))
        return model_file_path(ret, path, "config.json", why);
    snprintf(folder, sizeof folder, "%.*s", slash ? (int)(slash - path) : 1, slash ? path : ".");
    return model_file_path(ret, folder, "config.json", why);
}

static bool read_shapes(struct model_config *c, enum tensor_names_part part, const struct weight_files *files, struct engine_error *why)
{
    bool ok = part == TENSOR_NAMES_TRANSFORMER    ? model_shape_transformer(&c->transformer, files, why)
              : part == TENSOR_NAMES_TEXT_ENCODER ? model_shape_text_encoder(&c->text, files, why)
                                                  : model_shape_vae(&c->vae, files, why);
    return ok || engine_error_at(why, "%s: %s", kinds[part].name, weight_files_path(files));
}

bool model_parts_config(struct model_config *c, enum tensor_names_part part, const char *path, const struct weight_files *files,
                        struct engine_error *why)
{
    char config[MODEL_FILE_PATH_MAX];
    if (!config_beside(config, path, why))
        return false;
    return model_config_is(kinds[part].config, config) ? model_config_read(c, kinds[part].config, config, why)
                                                       : read_shapes(c, part, files, why);
}

static bool read_own(struct model_parts *p, const struct engine_options *o, struct engine_error *why)
{
    for (int part = 0; part < 3; part++)
        if (own_path(o, part) && !model_parts_config(&p->config, (enum tensor_names_part)part, own_path(o, part), p->files[part], why))
            return false;
    return true;
}

/* --- variant -------------------------------------------------------------------------------------------------- */

static bool tell_variant(struct model_config *c, const struct engine_options *o, struct engine_error *why)
{
    struct model_variant told = {c->is_distilled, strcmp(c->pipeline, "Flux2KleinKVPipeline") == 0};
    if (o->transformer && o->variant == ENGINE_VARIANT_OF_FILES && !model_variant_tell(&told, o->transformer, o->sha256, why))
        return false;
    if (o->variant == ENGINE_BASE && told.is_kv)
        return engine_error_set(why, ENGINE_BAD_MODEL, "--base: the model's index says Flux2KleinKVPipeline, which is distilled");
    if (o->variant != ENGINE_VARIANT_OF_FILES)
        told.is_distilled = o->variant == ENGINE_DISTILLED;
    c->is_distilled = told.is_distilled;
    snprintf(c->pipeline, sizeof c->pipeline, "%s", told.is_kv ? "Flux2KleinKVPipeline" : "Flux2KleinPipeline");
    return true;
}

/* --- all of it ------------------------------------------------------------------------------------------------- */

static bool open_files(struct model_parts *p, const struct engine_options *o, struct engine_error *why)
{
    for (int part = 0; part < 3; part++) {
        char path[MODEL_FILE_PATH_MAX];
        const char *own = own_path(o, part);
        if (!own && !model_file_path(path, o->model_dir, kinds[part].name, why))
            return false;
        if (!weight_files_open(&p->files[part], (enum tensor_names_part)part, own ? own : path, why))
            return engine_error_at(why, "%s", kinds[part].name);
    }
    return true;
}

static bool find_tokenizer(struct model_parts *p, const struct engine_options *o, struct engine_error *why)
{
    return o->tokenizer ? model_file_path(p->tokenizer_dir, o->tokenizer, ".", why)
                        : model_file_path(p->tokenizer_dir, o->model_dir, "tokenizer", why);
}

bool model_parts_open(struct model_parts *ret, const struct engine_options *options, struct engine_error *why)
{
    struct model_parts p = {0};
    struct source source = {.options = *options};
    const struct engine_options *o = &source.options;
    bool ok = find_files(&source, why) && check_given(o, why) && read_folder(&p.config, o, why) && find_tokenizer(&p, o, why) && open_files(&p, o, why) &&
              read_own(&p, o, why) && tell_variant(&p.config, o, why) && model_config_check(&p.config, why);
    if (!ok) {
        model_parts_close(&p);
        return false;
    }
    *ret = p;
    return true;
}

void model_parts_close(struct model_parts *p)
{
    for (int part = 0; part < 3; part++) {
        weight_files_close(p->files[part]);
        p->files[part] = NULL;
    }
}
