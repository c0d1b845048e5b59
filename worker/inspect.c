/* inspect.c - `kiln-worker inspect`: family, variant, parameters, dtypes, licence, digest and memory of a model.
 *
 * Everything is told from content: dimensions, headers, bytes; never from the folder's name. Opening the three
 * weight files checks their headers whole, so a damaged model is refused here before a worker loads it. */
#include "inspect.h"

#include <getopt.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "digest.h"
#include "model_config.h"
#include "safetensors.h"

static const char usage_text[] =
    "usage: kiln-worker inspect --model DIR|FILE [--quick] [--json]\n"
    "\n"
    "Tells what a model folder (diffusers layout) or a .safetensors file is.\n"
    "\n"
    "  --model DIR|FILE   what to look at\n"
    "  --quick            leave out the SHA-256, which reads every byte\n"
    "  --json             one JSON object\n"
    "  --help, --version\n"
    "\n"
    "Exit: 0 done, 2 refused: missing, damaged or of another architecture.\n";

#define TEXT_LAYERS_USED 27
#define DTYPES 15

struct part {
    const char *name, *stem;
    uint64_t tensors, parameters, bytes;
    uint64_t used;             /* parameters that a render needs */
    uint64_t by_dtype[DTYPES]; /* parameters of each */
};

static int refuse(const char *text)
{
    fprintf(stderr, "kiln-worker inspect: %s\n", text);
    return 2;
}

/* Text layers behind the last one used, the final norm and the head are never loaded. */
static bool is_used(const char *name)
{
    int layer;
    if (sscanf(name, "model.layers.%d.", &layer) == 1)
        return layer < TEXT_LAYERS_USED;
    return strncmp(name, "lm_head.", 8) != 0 && strncmp(name, "encoder.", 8) != 0 && strcmp(name, "model.norm.weight") != 0;
}

static void add_tensors(struct part *p, const struct safetensors *files)
{
    for (size_t i = 0; i < safetensors_count(files); i++) {
        const struct safetensors_entry *e = safetensors_at(files, i);
        uint64_t count = 1;
        for (int a = 0; a < e->rank; a++)
            count *= (uint64_t)e->shape[a];
        p->tensors++;
        p->parameters += count;
        p->bytes += e->bytes;
        p->by_dtype[e->dtype] += count;
        if (is_used(e->name))
            p->used += count;
    }
}

static json_t *part_json(const struct part *p)
{
    json_t *dtypes = json_object();
    for (int d = 0; d < DTYPES; d++)
        if (p->by_dtype[d])
            json_object_set_new(dtypes, safetensors_dtype_name((enum safetensors_dtype)d),
                                json_integer((json_int_t)p->by_dtype[d]));
    return json_pack("{s:s,s:I,s:I,s:I,s:o}", "part", p->name, "tensors", (json_int_t)p->tensors, "parameters",
                     (json_int_t)p->parameters, "bytes", (json_int_t)p->bytes, "dtypes", dtypes);
}

static json_t *look_at_file(const char *path, struct engine_error *why)
{
    struct safetensors *files;
    if (!safetensors_open_file(&files, path, why))
        return NULL;
    struct part p = {.name = "file"};
    add_tensors(&p, files);
    safetensors_close(files);
    return json_pack("{s:s,s:I,s:[o]}", "kind", "file", "parameters", (json_int_t)p.parameters, "parts", part_json(&p));
}

static json_t *look_at_folder(const char *dir, struct engine_error *why)
{
    struct part parts[] = {{.name = "text_encoder", .stem = "model"},
                           {.name = "transformer", .stem = "diffusion_pytorch_model"},
                           {.name = "vae", .stem = "diffusion_pytorch_model"}};
    struct model_config c;
    if (!model_config_load(&c, dir, why))
        return NULL;
    json_t *list = json_array();
    uint64_t parameters = 0, used = 0;
    for (int i = 0; i < 3; i++) {
        char path[4096];
        struct safetensors *files;
        snprintf(path, sizeof path, "%s/%s", dir, parts[i].name);
        if (!safetensors_open(&files, path, parts[i].stem, why)) {
            engine_error_at(why, "%s", parts[i].name);
            json_decref(list);
            return NULL;
        }
        add_tensors(&parts[i], files);
        safetensors_close(files);
        parameters += parts[i].parameters;
        used += parts[i].used;
        json_array_append_new(list, part_json(&parts[i]));
    }
    return json_pack("{s:s,s:s,s:s,s:s,s:s,s:I,s:{s:I,s:I},s:o}", "kind", "folder", "family", model_config_family(&c),
                     "variant", c.is_distilled ? "distilled" : "base", "pipeline", c.pipeline, "licence",
                     model_config_licence(&c), "parameters", (json_int_t)parameters, "weight_bytes_in_memory", "bf16",
                     (json_int_t)(2 * used), "f32", (json_int_t)(4 * used), "parts", list);
}

static void print_value(const char *name, json_t *value)
{
    if (json_is_string(value))
        printf("%-22s %s\n", name, json_string_value(value));
    else if (json_is_integer(value))
        printf("%-22s %lld\n", name, (long long)json_integer_value(value));
}

static void print_plain(json_t *report)
{
    static const char *const names[] = {"family", "variant", "pipeline", "licence", "parameters", "sha256"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        print_value(names[i], json_object_get(report, names[i]));
    json_t *memory = json_object_get(report, "weight_bytes_in_memory"), *part, *count;
    if (memory)
        printf("%-22s %.2f GB in bf16, %.2f GB in f32\n", "weights in memory",
               (double)json_integer_value(json_object_get(memory, "bf16")) / 1e9,
               (double)json_integer_value(json_object_get(memory, "f32")) / 1e9);
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

static bool add_digest(json_t *report, const char *path, bool is_folder, char *why, size_t why_bytes)
{
    char hex[65];
    uint64_t bytes;
    if (!(is_folder ? digest_model(path, hex, why, why_bytes) : digest_file(path, hex, &bytes, why, why_bytes)))
        return false;
    json_object_set_new(report, "sha256", json_string(hex));
    return true;
}

static int look(const char *path, bool is_quick, bool is_json)
{
    struct stat st;
    struct engine_error why;
    char reason[512];
    if (stat(path, &st) != 0) {
        snprintf(reason, sizeof reason, "%s: no such folder or file", path);
        return refuse(reason);
    }
    bool is_folder = S_ISDIR(st.st_mode);
    json_t *report = is_folder ? look_at_folder(path, &why) : look_at_file(path, &why);
    if (!report)
        return refuse(why.text);
    if (!is_quick && !add_digest(report, path, is_folder, reason, sizeof reason)) {
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
    static const struct option options[] = {{"model", required_argument, NULL, 'm'}, {"quick", no_argument, NULL, 'q'},
                                            {"json", no_argument, NULL, 'j'},        {"help", no_argument, NULL, 'h'},
                                            {"version", no_argument, NULL, 'v'},     {0}};
    char reason[300];
    const char *model = NULL;
    bool is_quick = false, is_json = false;
    opterr = 0; /* one sentence, ours */
    for (int c; (c = getopt_long(argc, argv, ":h", options, NULL)) != -1;) {
        switch (c) {
        case 'm':
            model = optarg;
            break;
        case 'q':
            is_quick = true;
            break;
        case 'j':
            is_json = true;
            break;
        case 'h':
            fputs(usage_text, stdout);
            return 0;
        case 'v':
            puts("kiln-worker " KILN_VERSION);
            return 0;
        default:
            snprintf(reason, sizeof reason, c == ':' ? "'%s' needs a value" : "unknown option '%s'; see --help", argv[optind - 1]);
            return refuse(reason);
        }
    }
    if (!model || optind < argc)
        return refuse(model ? "takes options only" : "--model DIR or FILE is needed");
    return look(model, is_quick, is_json);
}
