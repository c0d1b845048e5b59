/* golden.c - cases from JSON, tensors from safetensors, everything compared as doubles. */
#include "golden.h"

#include <dirent.h>
#include <ftw.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "digest.h"
#include "noise.h"
#include "quant.h"
#include "tensor_names.h"

static int by_name(const void *a, const void *b)
{
    return strcmp(a, b);
}

int golden_list(char (*ret)[64], int max)
{
    int count = 0;
    DIR *dir = opendir(GOLDEN_FOLDER);
    for (struct dirent *e; dir && (e = readdir(dir)) && count < max;) {
        char path[512];
        snprintf(path, sizeof path, "%s/%s/case.json", GOLDEN_FOLDER, e->d_name);
        if (access(path, R_OK) == 0)
            snprintf(ret[count++], sizeof *ret, "%.63s", e->d_name);
    }
    if (dir)
        closedir(dir);
    qsort(ret, (size_t)count, sizeof *ret, by_name);
    return count;
}

/* A value of the call, or element i of it when it is a list. */
static const json_t *call_of(const json_t *call, const char *key, int i)
{
    const json_t *v = json_object_get(call, key);
    return json_is_array(v) ? json_array_get(v, (size_t)i) : v;
}

static void read_requests(struct golden_case *c)
{
    const json_t *call = json_object_get(c->json, "call");
    json_int_t copies = json_integer_value(json_object_get(call, "num_images_per_prompt"));
    size_t prompts = json_array_size(json_object_get(call, "prompt"));
    c->image_count = copies ? (int)copies : prompts ? (int)prompts : 1;
    c->one_generator = copies > 1;
    for (int i = 0; i < c->image_count; i++) {
        const json_t *guidance = json_object_get(call, "guidance_scale");
        c->requests[i] = (struct engine_request){
            .prompt = json_string_value(call_of(call, "prompt", i)),
            .negative = json_string_value(call_of(call, "negative_prompt", i)),
            .width = (int)json_integer_value(json_object_get(call, "width")),
            .height = (int)json_integer_value(json_object_get(call, "height")),
            .steps = (int)json_integer_value(json_object_get(call, "num_inference_steps")),
            .guidance = guidance ? (float)json_number_value(guidance) : NAN,
            .seed = (uint64_t)json_integer_value(call_of(call, "seed", i)),
        };
    }
}

static void read_adapters(struct golden_case *c)
{
    const json_t *list = json_object_get(c->json, "lora");
    c->adapter_count = (int)json_array_size(list);
    for (int i = 0; i < c->adapter_count; i++) {
        const json_t *one = json_array_get(list, (size_t)i);
        const char *file = json_string_value(json_object_get(one, "file"));
        snprintf(c->adapter_files[i], sizeof c->adapter_files[i], "%s/files/%s", GOLDEN_FOLDER, strrchr(file, '/') + 1);
        c->adapters[i] = (struct engine_adapter){NULL, (float)json_number_value(json_object_get(one, "scale"))};
    }
}

bool golden_open(struct golden_case *ret, const char *name, struct engine_error *why)
{
    struct golden_case c = {0};
    char path[512];
    json_error_t error;
    snprintf(c.name, sizeof c.name, "%s", name);
    snprintf(c.folder, sizeof c.folder, "%s/%s", GOLDEN_FOLDER, name);
    snprintf(path, sizeof path, "%s/case.json", c.folder);
    c.json = json_load_file(path, 0, &error);
    if (!c.json)
        return engine_error_set(why, ENGINE_IO, "%s: %s", path, error.text);
    const char *model = json_string_value(json_object_get(c.json, "model"));
    snprintf(c.model, sizeof c.model, "%s", strrchr(model, '/') + 1);
    bool is_bf16 = strcmp(json_string_value(json_object_get(c.json, "compute")), "bfloat16") == 0;
    c.precision = json_is_true(json_object_get(c.json, "quantise_inputs")) ? ENGINE_FP8_F32 : is_bf16 ? ENGINE_BF16 : ENGINE_F32;
    c.transformer_file = json_string_value(json_object_get(c.json, "transformer_file"));
    const char *vae = json_string_value(json_object_get(c.json, "vae"));
    if (vae)
        snprintf(c.vae, sizeof c.vae, "%s/files/%s", GOLDEN_FOLDER, strrchr(vae, '/') + 1);
    read_requests(&c);
    read_adapters(&c);
    snprintf(path, sizeof path, "%s/expected.safetensors", c.folder);
    if (!safetensors_open_file(&c.expected, path, why)) {
        json_decref(c.json);
        return false;
    }
    *ret = c;
    return true;
}

void golden_close(struct golden_case *c)
{
    safetensors_close(c->expected);
    json_decref(c->json);
    *c = (struct golden_case){0};
}

bool golden_other_order(const struct golden_case *c, const char *tensor, double ret[2])
{
    const json_t *all = json_object_get(json_object_get(c->json, "natural_error"), "other_order");
    const json_t *pair = json_object_get(all, tensor);
    if (!json_is_array(pair))
        return false;
    ret[0] = json_number_value(json_array_get(pair, 0));
    ret[1] = json_number_value(json_array_get(pair, 1));
    return true;
}

/* --- tensors ---------------------------------------------------------------------------------------- */

void golden_keep(void *context, const char *name, struct tensor value)
{
    struct golden_dump *d = context;
    if (d->count == (int)(sizeof d->items / sizeof d->items[0]))
        return;
    snprintf(d->items[d->count].name, sizeof d->items[0].name, "%s", name);
    void *copy = malloc(tensor_bytes(value));
    memcpy(copy, value.data, tensor_bytes(value));
    value.data = copy;
    d->items[d->count++].value = value;
}

const struct tensor *golden_find(const struct golden_dump *d, const char *name)
{
    for (int i = 0; i < d->count; i++)
        if (strcmp(d->items[i].name, name) == 0)
            return &d->items[i].value;
    return NULL;
}

void golden_dump_done(struct golden_dump *d)
{
    for (int i = 0; i < d->count; i++)
        free(d->items[i].value.data);
    *d = (struct golden_dump){0};
}

static void to_floats(float *out, const void *data, enum tensor_dtype dtype, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        uint16_t half;
        int32_t integer;
        if (dtype == TENSOR_BF16) {
            memcpy(&half, (const char *)data + 2 * i, 2);
            out[i] = tensor_f32_of(half);
        } else if (dtype == TENSOR_I32) {
            memcpy(&integer, (const char *)data + 4 * i, 4);
            out[i] = (float)integer;
        } else {
            memcpy(&out[i], (const char *)data + 4 * i, 4);
        }
    }
}

float *golden_floats(struct tensor t)
{
    size_t count = (size_t)tensor_count(t);
    float *out = malloc((count + 1) * sizeof *out);
    to_floats(out, t.data, t.dtype, count);
    return out;
}

float *golden_entry_floats(const struct safetensors_entry *e, size_t *ret_count)
{
    enum tensor_dtype dtype = e->dtype == SAFETENSORS_BF16  ? TENSOR_BF16
                              : e->dtype == SAFETENSORS_I32 ? TENSOR_I32
                                                            : TENSOR_F32;
    *ret_count = e->bytes / tensor_dtype_bytes(dtype);
    float *out = malloc((*ret_count + 1) * sizeof *out);
    to_floats(out, e->data, dtype, *ret_count);
    return out;
}

struct golden_difference golden_differ(const float *got, const float *want, size_t count)
{
    struct golden_difference d = {0};
    for (size_t i = 0; i < count; i++) {
        double difference = fabs((double)got[i] - (double)want[i]);
        if (!(difference <= d.largest))
            d.largest = difference; /* NaN too */
        d.rms += difference * difference;
        d.scale += (double)want[i] * (double)want[i];
    }
    d.rms = sqrt(d.rms / (double)count);
    d.scale = sqrt(d.scale / (double)count);
    return d;
}

void golden_row_head(void)
{
    printf("%-22s %-9s %-28s %10s %10s  %-20s\n", "case", "precision", "tensor", "error", "rms", "tolerance");
}

bool golden_row(const char *name, const char *precision, const char *tensor, double largest, double rms, const char *bound,
                bool ok)
{
    printf("%-22s %-9s %-28s %10.3g %10.3g  %-20s %s\n", name, precision, tensor, largest, rms, bound, ok ? "ok" : "NOT OK");
    return ok;
}

/* --- models made here ----------------------------------------------------------------------------------- */

/* Writes every tensor of FROM/PART (any sharding) into one file, rounded to bf16; integers are dropped. */
static bool round_part(const char *dir, const char *from, const char *part, const char *stem, struct engine_error *why)
{
    char path[512];
    struct safetensors *files;
    snprintf(path, sizeof path, "%s/%s", from, part);
    if (!safetensors_open(&files, path, stem, why))
        return false;
    size_t count = safetensors_count(files), used = 0;
    struct safetensors_item *items = calloc(count, sizeof *items);
    for (size_t i = 0; i < count; i++) {
        const struct safetensors_entry *e = safetensors_at(files, i);
        if (e->dtype != SAFETENSORS_F32)
            continue;
        uint16_t *data = malloc(e->bytes / 2);
        for (size_t n = 0; n < e->bytes / 4; n++) {
            float value;
            memcpy(&value, (const char *)e->data + 4 * n, 4);
            data[n] = tensor_bf16_of(value);
        }
        items[used].name = e->name;
        items[used++].value = tensor_of(data, TENSOR_BF16, e->rank, e->shape);
    }
    snprintf(path, sizeof path, "%s/%s/%s.safetensors", dir, part, stem);
    bool ok = safetensors_write(path, items, used, why);
    for (size_t i = 0; i < used; i++)
        free(items[i].value.data);
    free(items);
    safetensors_close(files);
    return ok;
}

static bool write_rounded(const char *dir, struct engine_error *why)
{
    static const char from[] = GOLDEN_FOLDER "/models/pocket";
    return round_part(dir, from, "text_encoder", "model", why) &&
           round_part(dir, from, "transformer", "diffusion_pytorch_model", why) &&
           round_part(dir, from, "vae", "diffusion_pytorch_model", why);
}

/* zlib's crc32, which make.py seeds each parameter with. */
static uint32_t crc32_of(const char *text)
{
    uint32_t crc = ~0u;
    for (; *text; text++) {
        crc ^= (uint8_t)*text;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    }
    return ~crc;
}

/* make.py's GAIN, the part of it that text encoders and transformers need; 0: the values stay as drawn. */
static float gain_of(const char *name)
{
    static const struct { const char *part; float gain; } gains[] = {
        {"embed_tokens", 0},       {"o_proj", 0.6f},           {"down_proj", 0.6f},
        {"gate_proj", 1.2f},       {"up_proj", 1.2f},          {"context_embedder", 0.5f},
        {"timestep_embedder.linear_2", 2.5f}, {"_modulation", 1.6f}, {"norm_out.linear", 1.2f},
        {"linear_out", 1.3f},      {"attn.to_out", 1.3f}};
    for (size_t i = 0; i < sizeof gains / sizeof gains[0]; i++)
        if (strstr(name, gains[i].part))
            return gains[i].gain;
    return 1;
}

/* One parameter as make.py's fill draws it, operation by operation in f32, rounded to bf16; malloc'ed. */
static struct tensor draw(const char *seed, const char *name, int rank, const int64_t *shape)
{
    char key[256];
    size_t count = 1;
    for (int i = 0; i < rank; i++)
        count *= (size_t)shape[i];
    float *noise = malloc(count * sizeof *noise);
    uint16_t *data = malloc(count * sizeof *data);
    snprintf(key, sizeof key, "%s/%s", seed, name);
    noise_fill(noise, count, crc32_of(key));
    float gain = gain_of(name), root = (float)sqrt((double)count / (double)shape[0]);
    bool is_qk_norm = strstr(name, "q_norm") || strstr(name, "k_norm") || strstr(name, "norm_q") || strstr(name, "norm_k") ||
                      strstr(name, "norm_added");
    for (size_t i = 0; i < count; i++) {
        float value = rank == 1 ? (is_qk_norm ? 1.6f : 1.0f) * (1 + 0.25f * noise[i]) : gain ? noise[i] * gain / root : noise[i];
        data[i] = tensor_bf16_of(value);
    }
    free(noise);
    return tensor_of(data, TENSOR_BF16, rank, shape);
}

/* Writes one file of a list: {"seed", "sha256" of its values, "shapes": {name: shape}}. */
static bool draw_file(const char *path, const json_t *row, struct engine_error *why)
{
    json_t *shapes = json_object_get(row, "shapes"), *shape;
    struct safetensors_item *items = calloc(json_object_size(shapes), sizeof *items);
    struct digest *digest = digest_new();
    uint8_t sum[32];
    char hex[65];
    const char *name;
    size_t used = 0;
    json_object_foreach(shapes, name, shape)
    {
        int64_t sides[2] = {json_integer_value(json_array_get(shape, 0)), json_integer_value(json_array_get(shape, 1))};
        struct tensor value = draw(json_string_value(json_object_get(row, "seed")), name, (int)json_array_size(shape), sides);
        digest_add(digest, value.data, tensor_bytes(value));
        items[used++] = (struct safetensors_item){name, value};
    }
    digest_done(digest, sum);
    digest_hex(sum, sizeof sum, hex);
    bool ok = strcmp(hex, json_string_value(json_object_get(row, "sha256"))) == 0
                  ? safetensors_write(path, items, used, why)
                  : engine_error_set(why, ENGINE_IO, "%s: the values drawn are not those that make.py drew", path);
    for (size_t i = 0; i < used; i++)
        free(items[i].value.data);
    free(items);
    return ok;
}

static bool write_drawn(const char *dir, struct engine_error *why)
{
    json_t *list = json_load_file(GOLDEN_FOLDER "/files/like-9b.json", 0, NULL), *row;
    const char *file;
    bool ok = list || engine_error_set(why, ENGINE_IO, "cannot read files/like-9b.json");
    json_object_foreach(list, file, row)
    {
        char path[256];
        snprintf(path, sizeof path, "%s/%s", dir, file);
        ok = ok && draw_file(path, row, why);
    }
    json_decref(list);
    return ok;
}

/* A model whose weights are made in a temporary folder; the rest of it is links to the one in models/. */
static struct made_model {
    const char *name, *from;
    const char *links[10];
    bool (*write)(const char *dir, struct engine_error *why);
    char dir[64]; /* "" until somebody asks for it */
} made_models[] = {
    {"pocket-bf16", "pocket",
     {"model_index.json", "scheduler", "tokenizer", "text_encoder/config.json", "transformer/config.json", "vae/config.json"},
     write_rounded, ""},
    {"like-9b", "like-9b",
     {"model_index.json", "scheduler", "tokenizer", "text_encoder/config.json", "text_encoder/model.safetensors.index.json",
      "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors.index.json", "vae/config.json",
      "vae/diffusion_pytorch_model.safetensors"},
     write_drawn, ""},
};
#define MADE_MODELS (sizeof made_models / sizeof made_models[0])

static bool make_model(struct made_model *m, struct engine_error *why)
{
    static const char *const parts[] = {"text_encoder", "transformer", "vae"};
    char root[512], path[768], target[1280];
    snprintf(m->dir, sizeof m->dir, "/tmp/kiln-golden.XXXXXX");
    if (!mkdtemp(m->dir) || !getcwd(root, sizeof root))
        return engine_error_set(why, ENGINE_IO, "no temporary folder %s", m->dir);
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/%s", m->dir, parts[i]);
        mkdir(path, 0755);
    }
    for (const char *const *link = m->links; *link; link++) {
        snprintf(path, sizeof path, "%s/%s", m->dir, *link);
        snprintf(target, sizeof target, "%s/%s/models/%s/%s", root, GOLDEN_FOLDER, m->from, *link);
        if (symlink(target, path) != 0)
            return engine_error_set(why, ENGINE_IO, "cannot link %s", path);
    }
    return m->write(m->dir, why);
}

bool golden_model(char *ret, size_t ret_bytes, const char *model, struct engine_error *why)
{
    snprintf(ret, ret_bytes, "%s/models/%s", GOLDEN_FOLDER, model);
    for (struct made_model *m = made_models; m < made_models + MADE_MODELS; m++) {
        if (strcmp(model, m->name) != 0)
            continue;
        if (!*m->dir && !make_model(m, why))
            return false;
        snprintf(ret, ret_bytes, "%s", m->dir);
    }
    return true;
}

/* --- single files --------------------------------------------------------------------------------------- */

static char made_files[2][96];

/* The values of a BFL tensor in bf16, from the tensors it is made of; malloc'ed. */
static uint16_t *fuse(const struct safetensors *from, const struct tensor_names *names, const char *name, size_t *ret_count)
{
    struct tensor_names_place parts[TENSOR_NAMES_PIECES_MAX];
    int count = tensor_names_of_file(parts, names, name);
    uint16_t *out = NULL;
    *ret_count = 0;
    for (int i = 0; i < count; i++) {
        const struct safetensors_entry *e = safetensors_find(from, parts[i].name);
        if (!e || e->dtype != SAFETENSORS_BF16 || parts[i].piece != (parts[i].pieces > 1 ? i : 0))
            break;
        size_t n = e->bytes / 2, half = parts[i].change == TENSOR_NAMES_SWAP_HALVES ? e->bytes / 2 : 0;
        out = realloc(out, (*ret_count + n) * sizeof *out);
        memcpy(out + *ret_count, (const char *)e->data + half, e->bytes - half);
        memcpy((char *)(out + *ret_count) + e->bytes - half, e->data, half);
        *ret_count += n;
    }
    return out;
}

/* Nearest e4m3 to an f32 of at most 448, ties to even: by trying all. */
static uint8_t e4m3_of(float value)
{
    int best = 0;
    for (int code = 1; code < 0x7f; code++) {
        double now = fabs((double)quant_f32_of_e4m3((uint8_t)code) - fabs((double)value));
        double then = fabs((double)quant_f32_of_e4m3((uint8_t)best) - fabs((double)value));
        if (now < then || (now == then && code % 2 == 0))
            best = code;
    }
    return (uint8_t)(best | (signbit(value) ? 0x80 : 0));
}

/* One tensor of the list as the file has it: bf16, e4m3 of it, or a scale. Written to f; false if the digest differs. */
static bool write_tensor(FILE *f, const struct safetensors *from, const json_t *list, const char *name)
{
    static const struct tensor_names bfl = {TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_BFL, ""};
    const json_t *row = json_object_get(list, name), *value = json_object_get(row, "value");
    char hex[65];
    size_t count = 0, bytes;
    float scale = (float)json_number_value(value);
    if (value) {
        fwrite(&scale, 4, 1, f);
        return true;
    }
    uint16_t *values = fuse(from, &bfl, name, &count);
    bytes = 2 * count;
    if (strcmp(json_string_value(json_object_get(row, "dtype")), "F8_E4M3") == 0) {
        char beside[300];
        snprintf(beside, sizeof beside, "%s_scale", name);
        scale = (float)json_number_value(json_object_get(json_object_get(list, beside), "value"));
        for (size_t i = 0; i < count; i++)
            ((uint8_t *)values)[i] = e4m3_of(tensor_f32_of(values[i]) / scale);
        bytes = count;
    }
    bool ok = values && digest_of(values, bytes, hex) && strcmp(hex, json_string_value(json_object_get(row, "sha256"))) == 0;
    fwrite(values, 1, bytes, f);
    free(values);
    return ok;
}

static json_t *header_of(const json_t *list)
{
    json_t *head = json_object();
    const char *name;
    json_t *row;
    json_int_t at = 0;
    json_object_foreach((json_t *)(uintptr_t)list, name, row)
    {
        const char *dtype = json_string_value(json_object_get(row, "dtype"));
        json_int_t bytes = dtype[0] == 'B' ? 2 : strcmp(dtype, "F32") == 0 ? 4 : 1;
        json_t *shape = json_object_get(row, "shape"), *side;
        size_t i;
        json_array_foreach(shape, i, side)
            bytes *= json_integer_value(side);
        json_object_set_new(head, name, json_pack("{s:s,s:O,s:[I,I]}", "dtype", dtype, "shape", shape, "data_offsets", at, at + bytes));
        at += bytes;
    }
    return head;
}

static bool make_file(const char *path, const char *list_path, struct engine_error *why)
{
    char model[512], part[600];
    struct safetensors *from;
    json_t *list = json_load_file(list_path, 0, NULL), *row;
    if (!list || !golden_model(model, sizeof model, "pocket-bf16", why))
        return engine_error_set(why, ENGINE_IO, "cannot read %s", list_path);
    snprintf(part, sizeof part, "%s/transformer", model);
    if (!safetensors_open(&from, part, "diffusion_pytorch_model", why))
        return false;
    json_t *head = header_of(list);
    char *text = json_dumps(head, JSON_COMPACT);
    uint64_t length = strlen(text);
    FILE *f = fopen(path, "wb");
    bool ok = f != NULL;
    fwrite(&length, 8, 1, f);
    fwrite(text, 1, length, f);
    const char *name;
    json_object_foreach(list, name, row)
        if (ok && !write_tensor(f, from, list, name))
            ok = engine_error_set(why, ENGINE_IO, "%s: '%s' is not what the reference's script wrote", list_path, name);
    fclose(f);
    free(text);
    json_decref(head);
    json_decref(list);
    safetensors_close(from);
    return ok;
}

bool golden_file(char *ret, size_t ret_bytes, const char *file, struct engine_error *why)
{
    static const char *const names[2] = {"bfl-bf16", "bfl-fp8"};
    const char *name = strrchr(file, '/') ? strrchr(file, '/') + 1 : file;
    snprintf(ret, ret_bytes, "%s/files/%s", GOLDEN_FOLDER, name);
    for (int i = 0; i < 2; i++) {
        char list[512];
        if (strncmp(name, names[i], strlen(names[i])) != 0)
            continue;
        snprintf(list, sizeof list, "%s/files/%s.json", GOLDEN_FOLDER, names[i]);
        if (!*made_files[i]) {
            snprintf(made_files[i], sizeof made_files[i], "/tmp/kiln-golden.%d.%s.safetensors", (int)getpid(), names[i]);
            if (!make_file(made_files[i], list, why))
                return false;
        }
        snprintf(ret, ret_bytes, "%s", made_files[i]);
    }
    return true;
}

static int remove_one(const char *path, const struct stat *info, int type, struct FTW *at)
{
    (void)info, (void)type, (void)at;
    return remove(path);
}

void golden_remove_made(void)
{
    for (int i = 0; i < 2; i++)
        if (*made_files[i])
            unlink(made_files[i]);
    for (size_t i = 0; i < MADE_MODELS; i++)
        if (*made_models[i].dir)
            nftw(made_models[i].dir, remove_one, 8, FTW_DEPTH | FTW_PHYS);
}
