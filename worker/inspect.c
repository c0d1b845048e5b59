/* inspect.c - `kiln-worker inspect`: family, variant, parameters, dtypes, licence, digest and memory of a model or a file.
 *
 * Everything is told from content: dimensions, headers, bytes; never from a folder's name. Opening the weight files checks
 * their headers whole, so a damaged model is refused here before a worker loads it. */
#include "inspect.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "daemon_options.h"
#include "lifecycle.h"
#include "model_parts.h"
#include "model_variant.h"
#include "weights_digest.h"

static const char usage_text[] =
    "usage: kiln-worker inspect DIR|FILE [--quick] [--json]\n"
    "       kiln-worker inspect [--model DIR] [--transformer F] [--text-encoder F] [--vae F] [--tokenizer DIR] ..\n"
    "\n"
    "Tells what a model folder (diffusers layout), a single weight file (.safetensors, .gguf) or a model of several files is. Of a model,\n"
    "also what a picture of 1024x1024 takes, and an edit of one reference: of memory on the CPU, and what a GPU must have beside its\n"
    "driver's memory under each --placement.\n"
    "\n"
    "  --model DIR|FILE     the same as DIR|FILE\n"
    "  --transformer F, --text-encoder F, --vae F, --tokenizer DIR\n"
    "                       a file or folder instead of the model folder's part\n"
    "  --distilled, --base  what the transformer is, where files cannot tell\n"
    "  --quick              leave out the SHA-256, which reads every byte\n"
    "  --json               one JSON object\n"
    "  --help, --version\n"
    "\n"
    "Exit: 0 done, 2 refused: missing, damaged or of another architecture.\n";

struct part {
    const char *name;
    uint64_t tensors, parameters, bytes;
    uint64_t kept_bytes, converted; /* of a render: quantised, parameters that are not */
    json_t *formats; /* parameters of each */
};

static int refuse(const char *text)
{
    fprintf(stderr, "kiln-worker inspect: %s\n", text);
    return LIFECYCLE_REFUSED;
}

static struct part sum_of(const char *name, const struct weight_files *f)
{
    struct part p = {.name = name, .formats = json_object()};
    struct weight_line line;
    for (size_t i = 0; weight_files_list(f, i, &line); i++) {
        json_int_t so_far = json_integer_value(json_object_get(p.formats, line.format));
        p.tensors++;
        p.bytes += line.bytes;
        p.parameters += line.parameters;
        p.kept_bytes += line.is_used ? line.kept_bytes : 0;
        p.converted += line.is_used && !line.kept_bytes ? line.parameters : 0;
        if (line.parameters)
            json_object_set_new(p.formats, line.format, json_integer(so_far + (json_int_t)line.parameters));
    }
    return p;
}

static json_t *part_json(const struct part *p)
{
    return json_pack("{s:s,s:I,s:I,s:I,s:o}", "part", p->name, "tensors", (json_int_t)p->tensors, "parameters",
                     (json_int_t)p->parameters, "bytes", (json_int_t)p->bytes, "dtypes", p->formats);
}

/* Quantised weights stay what they are; all others are held in the compute precision. */
static json_t *memory_json(const struct part *p)
{
    return json_pack("{s:I,s:I}", "bf16", (json_int_t)(p->kept_bytes + 2 * p->converted), "f32",
                     (json_int_t)(p->kept_bytes + 4 * p->converted));
}

static json_t *placements_json(const size_t bytes[ENGINE_STREAMED + 1])
{
    json_t *ret = json_object();
    for (enum engine_placement p = ENGINE_RESIDENT; p <= ENGINE_STREAMED; p++)
        json_object_set_new(ret, engine_placement_name(p), json_integer((json_int_t)bytes[p]));
    return ret;
}

/* A model whose plan cannot be made cannot be rendered: the note says why. On the CPU everything is resident: what is quantised in the
 * files' pages, the rest packed. */
static void tell_needs(json_t *report, const struct engine_options *o)
{
    struct engine_needs needs;
    struct engine_options bf16 = *o;
    struct engine_error why;
    bf16.precision = ENGINE_BF16;
    if (!engine_needs(&needs, &bf16, &why)) {
        json_object_set_new(report, "note", json_string(why.text));
        return;
    }
    json_t *cpu = json_pack("{s:I}", "image", (json_int_t)needs.image[ENGINE_RESIDENT]);
    json_t *gpu = json_pack("{s:o}", "image", placements_json(needs.image));
    if (needs.edit[ENGINE_RESIDENT]) {
        json_object_set_new(cpu, "edit", json_integer((json_int_t)needs.edit[ENGINE_RESIDENT]));
        json_object_set_new(gpu, "edit", placements_json(needs.edit));
    }
    json_object_set_new(report, "cpu_bytes", cpu);
    json_object_set_new(report, "gpu_bytes", gpu);
}

/* --- a single file ---------------------------------------------------------------------------------------- */

static void tell(json_t *report, const char *name, const char *value)
{
    json_object_set_new(report, name, json_string(value));
}

static void describe_transformer(json_t *report, const struct model_config *c, const struct engine_options *o)
{
    struct model_variant variant = {.is_distilled = o->variant == ENGINE_DISTILLED};
    struct engine_error why;
    bool is_known = o->variant != ENGINE_VARIANT_OF_FILES || model_variant_tell(&variant, o->model_dir, o->sha256, &why);
    tell(report, "family", model_config_family(c));
    tell(report, "licence", model_config_licence(c));
    tell(report, "variant", !is_known ? "unknown" : variant.is_distilled ? "distilled" : "base");
    if (is_known)
        tell(report, "pipeline", variant.is_kv ? "Flux2KleinKVPipeline" : "Flux2KleinPipeline");
    else
        tell(report, "note", why.text);
}

static void describe_text_encoder(json_t *report, const struct text_encoder_config *c)
{
    bool is_4b = c->hidden_size == 2560 && c->num_hidden_layers == 36, is_8b = c->hidden_size == 4096 && c->num_hidden_layers == 36;
    tell(report, "family", is_4b ? "qwen3-4b" : is_8b ? "qwen3-8b" : "qwen3-custom");
    tell(report, "licence", is_4b || is_8b ? "Apache-2.0" : "unknown");
}

static void describe_vae(json_t *report, const struct vae_config *c)
{
    static const int full[4] = {128, 256, 512, 512}, small[4] = {96, 192, 384, 384};
    bool is_full = memcmp(c->decoder_block_out_channels, full, sizeof full) == 0;
    bool is_small = memcmp(c->decoder_block_out_channels, small, sizeof small) == 0;
    bool is_known = memcmp(c->block_out_channels, full, sizeof full) == 0 && (is_full || is_small);
    tell(report, "family", !is_known ? "vae-custom" : is_small ? "flux2-vae-small-decoder" : "flux2-vae");
    tell(report, "licence", is_known ? "Apache-2.0" : "unknown");
}

static void describe(json_t *report, enum tensor_names_part part, const struct weight_files *f, const struct engine_options *o)
{
    struct model_config c = {0};
    struct engine_error why;
    if (!model_parts_config(&c, part, o->model_dir, f, &why))
        tell(report, "note", why.text);
    else if (part == TENSOR_NAMES_TRANSFORMER)
        describe_transformer(report, &c, o);
    else if (part == TENSOR_NAMES_TEXT_ENCODER)
        describe_text_encoder(report, &c.text);
    else
        describe_vae(report, &c.vae);
}

/* A file is the first part of a model that its names show; none: a file of tensors, an adapter for example. */
static json_t *look_at_file(const struct engine_options *o, struct engine_error *why)
{
    for (int part = 0; part < 3; part++) {
        struct weight_files *f;
        if (!weight_files_open(&f, (enum tensor_names_part)part, o->model_dir, why))
            return NULL;
        if (!weight_files_is_part(f) && part < 2) {
            weight_files_close(f);
            continue;
        }
        bool is_part = weight_files_is_part(f);
        if (o->variant != ENGINE_VARIANT_OF_FILES && (!is_part || part != TENSOR_NAMES_TRANSFORMER)) {
            weight_files_close(f);
            engine_error_set(why, ENGINE_BAD_REQUEST, "%s: --distilled and --base are for a transformer, which this is not", o->model_dir);
            return NULL;
        }
        struct part p = sum_of(is_part ? model_parts_name((enum tensor_names_part)part) : "file", f);
        json_t *report = json_pack("{s:s,s:I,s:[o]}", "kind", p.name, "parameters", (json_int_t)p.parameters, "parts", part_json(&p));
        if (is_part) {
            describe(report, (enum tensor_names_part)part, f, o);
            json_object_set_new(report, "weight_bytes_in_memory", memory_json(&p));
        }
        weight_files_close(f);
        return report;
    }
    return NULL;
}

/* --- a model ------------------------------------------------------------------------------------------------ */

static json_t *look_at_model(const struct engine_options *o, struct engine_error *why)
{
    static const enum tensor_names_part order[3] = {TENSOR_NAMES_TEXT_ENCODER, TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_VAE};
    struct model_parts parts;
    if (!model_parts_open(&parts, o, why))
        return NULL;
    const struct model_config *c = &parts.config;
    json_t *list = json_array();
    uint64_t parameters = 0;
    struct part sum = {0};
    for (int i = 0; i < 3; i++) {
        struct part p = sum_of(model_parts_name(order[i]), parts.files[order[i]]);
        parameters += p.parameters;
        sum.kept_bytes += p.kept_bytes, sum.converted += p.converted;
        json_array_append_new(list, part_json(&p));
    }
    json_t *report = json_pack("{s:s,s:s,s:s,s:s,s:s,s:I,s:o,s:o}", "kind", "folder", "family", model_config_family(c), "variant",
                               c->is_distilled ? "distilled" : "base", "pipeline", c->pipeline, "licence",
                               model_config_licence(c), "parameters", (json_int_t)parameters, "weight_bytes_in_memory",
                               memory_json(&sum), "parts", list);
    model_parts_close(&parts);
    tell_needs(report, o);
    return report;
}

/* --- printing ------------------------------------------------------------------------------------------------- */

static void print_value(const char *name, json_t *value)
{
    if (json_is_string(value))
        printf("%-22s %s\n", name, json_string_value(value));
    else if (json_is_integer(value))
        printf("%-22s %lld\n", name, (long long)json_integer_value(value));
}

static void print_needs(json_t *cpu, json_t *gpu)
{
    const char *mode, *placement;
    json_t *placements, *bytes;
    json_object_foreach(cpu, mode, bytes)
        printf("%-22s 1024x1024 %s in bf16: %.2f GB\n", "on the CPU", mode, (double)json_integer_value(bytes) / 1e9);
    json_object_foreach(gpu, mode, placements)
    {
        printf("%-22s 1024x1024 %s in bf16:", "on a GPU", mode);
        json_object_foreach(placements, placement, bytes)
            printf(" %s %.2f GB", placement, (double)json_integer_value(bytes) / 1e9);
        putchar('\n');
    }
}

static void print_plain(json_t *report)
{
    static const char *const names[] = {"family", "variant", "pipeline", "licence", "parameters", "sha256", "note"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        print_value(names[i], json_object_get(report, names[i]));
    json_t *memory = json_object_get(report, "weight_bytes_in_memory"), *part, *count;
    if (memory)
        printf("%-22s %.2f GB in bf16, %.2f GB in f32\n", "weights in memory",
               (double)json_integer_value(json_object_get(memory, "bf16")) / 1e9,
               (double)json_integer_value(json_object_get(memory, "f32")) / 1e9);
    print_needs(json_object_get(report, "cpu_bytes"), json_object_get(report, "gpu_bytes"));
    size_t i;
    const char *dtype;
    json_array_foreach(json_object_get(report, "parts"), i, part)
    {
        printf("%-22s %lld tensors, %lld parameters:", json_string_value(json_object_get(part, "part")),
               (long long)json_integer_value(json_object_get(part, "tensors")),
               (long long)json_integer_value(json_object_get(part, "parameters")));
        json_object_foreach(json_object_get(part, "dtypes"), dtype, count)
            printf(" %s %lld", dtype, (long long)json_integer_value(count));
        putchar('\n');
    }
}

static bool is_file(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && !S_ISDIR(st.st_mode);
}

static bool add_digest(json_t *report, const struct engine_options *o, bool is_single, char *why, size_t why_bytes)
{
    char hex[65];
    bool ok = is_single ? weights_digest_file(o->model_dir, hex) : weights_digest_of(o, NULL, hex, why, why_bytes);
    if (!ok && is_single)
        snprintf(why, why_bytes, "%s: cannot be read", o->model_dir);
    if (ok)
        json_object_set_new(report, "sha256", json_string(hex));
    return ok;
}

static int look(const struct engine_options *o, bool is_quick, bool is_json)
{
    struct stat st;
    struct engine_error why;
    char reason[600];
    if (o->model_dir && stat(o->model_dir, &st) != 0) {
        snprintf(reason, sizeof reason, "%.500s: no such folder or file", o->model_dir);
        return refuse(reason);
    }
    bool is_single = o->model_dir && is_file(o->model_dir);
    if (is_single && (o->transformer || o->text_encoder || o->vae || o->tokenizer))
        return refuse("a single file is looked at alone; for a model of several files name each with its option");
    json_t *report = is_single ? look_at_file(o, &why) : look_at_model(o, &why);
    if (!report)
        return refuse(why.text);
    if (!is_quick && !add_digest(report, o, is_single, reason, sizeof reason)) {
        json_decref(report);
        return refuse(reason);
    }
    if (is_json) {
        json_dumpf(report, stdout, JSON_COMPACT);
        putchar('\n');
    } else {
        print_plain(report);
    }
    json_decref(report);
    return 0;
}

int inspect_main(int argc, char **argv)
{
    enum { MODEL = DAEMON_OPTIONS_OWN, TRANSFORMER, TEXT_ENCODER, VAE, TOKENIZER, DISTILLED, BASE, QUICK, JSON };
    static const struct option options[] = {
        {"model", required_argument, NULL, MODEL},         {"transformer", required_argument, NULL, TRANSFORMER},
        {"text-encoder", required_argument, NULL, TEXT_ENCODER}, {"vae", required_argument, NULL, VAE},
        {"tokenizer", required_argument, NULL, TOKENIZER}, {"distilled", no_argument, NULL, DISTILLED},
        {"base", no_argument, NULL, BASE},                 {"quick", no_argument, NULL, QUICK},
        {"json", no_argument, NULL, JSON},                 {"help", no_argument, NULL, DAEMON_OPTIONS_HELP},
        {"version", no_argument, NULL, DAEMON_OPTIONS_VERSION}, {0}};
    char reason[300];
    struct engine_options o = {0};
    bool is_quick = false, is_json = false;
    for (int word; (word = daemon_options_next(argc, argv, "h", options, reason, sizeof reason)) != -1;) {
        switch (word) {
        case MODEL: o.model_dir = optarg; break;
        case TRANSFORMER: o.transformer = optarg; break;
        case TEXT_ENCODER: o.text_encoder = optarg; break;
        case VAE: o.vae = optarg; break;
        case TOKENIZER: o.tokenizer = optarg; break;
        case DISTILLED: o.variant = ENGINE_DISTILLED; break;
        case BASE: o.variant = ENGINE_BASE; break;
        case QUICK: is_quick = true; break;
        case JSON: is_json = true; break;
        case 'h':
        case DAEMON_OPTIONS_HELP:
            fputs(usage_text, stdout);
            return LIFECYCLE_DONE;
        case DAEMON_OPTIONS_VERSION:
            puts("kiln-worker " KILN_VERSION);
            return LIFECYCLE_DONE;
        default: return refuse(reason);
        }
    }
    o.sha256 = is_quick ? NULL : weights_digest_file;
    if (optind < argc && !o.model_dir)
        o.model_dir = argv[optind++];
    if (optind < argc)
        return refuse("one folder or file at a time; see --help");
    if (!o.model_dir && !o.transformer && !o.text_encoder && !o.vae)
        return refuse("a model folder or file is needed; see --help");
    return look(&o, is_quick, is_json);
}
