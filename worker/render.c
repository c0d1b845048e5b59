/* render.c - `kiln-worker render`: reads options, prompts and reference images, opens the model, renders batch after batch, writes files.
 *
 * A file appears whole or not at all: it is written under a temporary name beside its place and renamed. One picture goes
 * to --out itself; several (--batch or --prompt-file) go into the folder --out as 000001.png, 000002.png .. in their order.
 * The first SIGINT or SIGTERM ends the run after the step that runs, a second one at once. */
#include "render.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon_options.h"
#include "device_list.h"
#include "digest.h"
#include "dry.h"
#include "engine_team.h"
#include "image_file.h"
#include "inputs.h"
#include "lifecycle.h"
#include "safetensors.h"
#include "weights_digest.h"
#include "worker_options.h"

#define PROMPTS_MAX 999999
#define DUMP_MAX 4096

static const char usage_text[] =
    "usage: kiln-worker render --model DIR --prompt TEXT --seed N --size WxH --out FILE [options]\n"
    "       kiln-worker render --model DIR --prompt-file FILE --seed N --size WxH --out FOLDER [options]\n"
    "       kiln-worker render --model DIR --prompt TEXT --seed N --size WxH --device dry:NAME [--trace FILE] [options]\n"
    "\n"
    "Renders prompts to image files, without database or coordinator.\n"
    "\n"
    "  --model DIR          model folder (diffusers layout); in the place of a part's folder there may be a file or a link to\n"
    "                       one: transformer.gguf, text_encoder.safetensors\n"
    "  --transformer F, --text-encoder F, --vae F\n"
    "                       a file (.safetensors, .gguf) or folder instead of the model's part; with all three and\n"
    "                       --tokenizer no model folder is needed\n"
    "  --tokenizer DIR      folder with vocab.json and merges.txt\n"
    "  --distilled, --base  what the transformer is, where its file cannot tell\n"
    "  --lora FILE[:SCALE]  an adapter of the transformer (LoRA, LoHa, LoKr, DoRA); repeatable, up to 16; scale 1. LoRA runs\n"
    "                       beside the weights, which costs a tenth to a quarter of the time on the CPU; the others are merged at load\n"
    "  --prompt TEXT        one prompt\n"
    "  --prompt-file FILE   a prompt a line; empty lines and lines that begin with # are skipped; - is stdin\n"
    "  --negative TEXT      negative prompt (base models, guidance above 1)\n"
    "  --seed N             seed of the first picture; picture i has seed N + i\n"
    "  --size WxH           pixels: multiples of 16, at least 64, at most 4 MP in all; with --image it may be left out\n"
    "  --image FILE         a reference image to edit: PNG, JPEG or WebP, at least 64 pixels a side; up to 10 times.\n"
    "                       The first gives the size when --size does not\n"
    "  --mask FILE          repaint the first --image where this picture is white; any size\n"
    "  --strength S         with --mask: above 0, at most 1 (everything is new); default 0.8\n"
    "  --steps N            1 to 1000; default: 4 for distilled models, 50 for base models\n"
    "  --guidance G         base models; default 4. Distilled models ignore it\n"
    "  --truncate           cut a prompt of more than 512 tokens instead of refusing it\n"
    "  --batch N            pictures rendered together, 1 to 64. With --prompt: so many pictures of the prompt\n"
    "  --out FILE           .png, .jpg or .webp; with --prompt-file or --batch above 1 a folder (made if missing)\n"
    "                       that gets 000001.png, 000002.png ..\n"
    "  --dump FILE          tensors of the run as .safetensors (names: tests/golden/README.md); one batch only\n"
    "  --device D           where to run: cpu (default), cuda or cuda:N; a team that shares the model: cuda:0,1 (two GPUs),\n"
    "                       cpu:0,1 (the cores of two memory nodes; a node named twice is shared); dry:NAME (preset sim) renders nothing and\n"
    "                       reports what a GPU would do\n"
    "                       (memory, launches, FLOPs, time at best): h100, rtx4090, rtx3090, rtx4070ti; weights are not read.\n"
    "                       dry:NAME:GB: as if it had so much memory\n"
    "  --placement P        of weights on a GPU: resident; phases (the text encoder waits in host memory and its layers come while\n"
    "                       prompts are encoded); streamed (blocks of the transformer, too, at each step); auto (default): the\n"
    "                       first of these that fits, streamed with no more blocks than must. The pictures are the same. On\n"
    "                       the CPU: auto, resident\n"
    "  --split S            what a team splits: weights (each rank has its share of every matrix); passes (of two ranks each has\n"
    "                       the whole model and computes one of the two passes of guidance: base models; the picture is that\n"
    "                       of one device, to the bit); auto (default): passes, where each rank can hold the model\n"
    "  --trace FILE         with --device dry:NAME: a line of JSON for each launch, copy, allocation and wait\n"
    "  --precision P        bf16 (default); f32; fp8: as bf16, but linears whose weights are FP8 in their file multiply in FP8, which changes\n"
    "                       pictures a little and is faster on GPUs that have units for it; fp8-f32: its reference\n"
    "  --threads N          default: all\n"
    "  --json               a line per picture: path, sha256, load_s, encode_s, denoise_s, decode_s, peak_bytes, backend_bytes,\n"
    "                       remembered_bytes, precision, device, passes; times are those of its batch, peak_bytes those of the process,\n"
    "                       backend_bytes what the device gave for weights and activations at most, remembered_bytes prompts on the host;\n"
    "                       passes: of guidance, one, together, in_turn or split\n"
    "  --help, --version\n"
    "\n"
    "Exit: 0 done, 1 a picture failed, 2 refused, 128 + n stopped by signal n.\n";

struct lora { const char *file; double scale; };

struct options {
    const char *model, *transformer, *text_encoder, *vae, *tokenizer;
    enum engine_variant variant;
    enum engine_precision precision;
    struct lora loras[ENGINE_ADAPTERS_MAX];
    int lora_count;
    const char *prompt, *prompt_file, *negative, *out, *dump, *device, *trace;
    uint64_t seed;
    int width, height, steps, threads, batch;
    float guidance;
    bool has_seed, truncate, json;
    const char *images[ENGINE_REFERENCES_MAX];
    int image_count;
    enum engine_placement placement;
    enum engine_split split;
    const char *mask;
    double strength; /* 0: not given */
};

struct prompts { /* owned texts */
    int count;
    char **text;
};

struct dump {
    size_t count;
    struct safetensors_item items[DUMP_MAX];
    bool no_memory;
};

struct run {
    struct options options;
    struct prompts prompts;
    struct inputs inputs;
    struct engine_adapter adapters[ENGINE_ADAPTERS_MAX];
    const char *adapters_hex[ENGINE_ADAPTERS_MAX]; /* their files', of the inputs */
    struct engine_options model; /* points to these adapters */
    struct engine_team *engine;
    struct dry *dry; /* NULL: a real device */
    char digest[65];
    struct weights_digest_task hashing;
    bool is_hashing;
    bool to_folder, is_terminal;
    int done; /* pictures written */
    struct dump dump;
};

static volatile sig_atomic_t stop_signal;

static void on_signal(int number)
{
    stop_signal = number;
}

static int refuse(const char *format, ...) __attribute__((format(printf, 1, 2)));
static int refuse(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs("kiln-worker render: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    return LIFECYCLE_REFUSED;
}

/* --- options ------------------------------------------------------------------------------------------- */

/* The whole text is a decimal number from 0 to max. */
static bool parse_number(const char *text, uint64_t max, uint64_t *ret)
{
    uint64_t value = 0;
    if (!*text)
        return false;
    for (; *text; text++) {
        if (*text < '0' || *text > '9' || value > (max - (uint64_t)(*text - '0')) / 10)
            return false;
        value = value * 10 + (uint64_t)(*text - '0');
    }
    *ret = value;
    return true;
}

static bool parse_int(const char *text, int max, int *ret)
{
    uint64_t value;
    if (!parse_number(text, (uint64_t)max, &value))
        return false;
    *ret = (int)value;
    return true;
}

static bool parse_size(const char *text, int *width, int *height)
{
    char first[16];
    const char *x = strchr(text, 'x');
    if (!x || x - text >= (int)sizeof first)
        return false;
    snprintf(first, sizeof first, "%.*s", (int)(x - text), text);
    return parse_int(first, 1000000, width) && parse_int(x + 1, 1000000, height);
}

static bool parse_guidance(const char *text, float *ret)
{
    char *end;
    errno = 0;
    float value = strtof(text, &end);
    if (end == text || *end || errno || !isfinite(value))
        return false;
    *ret = value;
    return true;
}

/* The text is cut in place, as getopt gives it out of argv. */
static bool parse_lora(char *text, struct lora *ret, char *why, size_t why_bytes)
{
    size_t length;
    if (!task_inputs_read_lora(text, &length, &ret->scale, why, why_bytes))
        return false;
    text[length] = 0;
    ret->file = text;
    return true;
}

enum option_id { OPT_MODEL = DAEMON_OPTIONS_OWN, OPT_TRANSFORMER, OPT_TEXT_ENCODER, OPT_VAE, OPT_TOKENIZER, OPT_DISTILLED, OPT_BASE, OPT_LORA, OPT_PROMPT, OPT_PROMPT_FILE, OPT_NEGATIVE, OPT_SEED, OPT_SIZE, OPT_IMAGE, OPT_MASK, OPT_STRENGTH,
                 OPT_STEPS, OPT_GUIDANCE,
                 OPT_TRUNCATE, OPT_BATCH, OPT_OUT, OPT_DUMP, OPT_DEVICE, OPT_PLACEMENT, OPT_SPLIT, OPT_TRACE, OPT_PRECISION, OPT_THREADS, OPT_JSON };

static const struct option long_options[] = {
    {"model", required_argument, NULL, OPT_MODEL},         {"prompt", required_argument, NULL, OPT_PROMPT},
    {"prompt-file", required_argument, NULL, OPT_PROMPT_FILE}, {"negative", required_argument, NULL, OPT_NEGATIVE},
    {"seed", required_argument, NULL, OPT_SEED},           {"size", required_argument, NULL, OPT_SIZE},
    {"steps", required_argument, NULL, OPT_STEPS},         {"guidance", required_argument, NULL, OPT_GUIDANCE},
    {"truncate", no_argument, NULL, OPT_TRUNCATE},         {"batch", required_argument, NULL, OPT_BATCH},
    {"out", required_argument, NULL, OPT_OUT},             {"dump", required_argument, NULL, OPT_DUMP},
    {"transformer", required_argument, NULL, OPT_TRANSFORMER}, {"text-encoder", required_argument, NULL, OPT_TEXT_ENCODER},
    {"vae", required_argument, NULL, OPT_VAE},             {"tokenizer", required_argument, NULL, OPT_TOKENIZER},
    {"distilled", no_argument, NULL, OPT_DISTILLED},       {"base", no_argument, NULL, OPT_BASE},
    {"lora", required_argument, NULL, OPT_LORA},
    {"device", required_argument, NULL, OPT_DEVICE},       {"trace", required_argument, NULL, OPT_TRACE},
    {"precision", required_argument, NULL, OPT_PRECISION}, {"placement", required_argument, NULL, OPT_PLACEMENT},
    {"split", required_argument, NULL, OPT_SPLIT},
    {"threads", required_argument, NULL, OPT_THREADS},     {"json", no_argument, NULL, OPT_JSON},
    {"image", required_argument, NULL, OPT_IMAGE},         {"mask", required_argument, NULL, OPT_MASK},
    {"strength", required_argument, NULL, OPT_STRENGTH},
    {"help", no_argument, NULL, DAEMON_OPTIONS_HELP},      {"version", no_argument, NULL, DAEMON_OPTIONS_VERSION},
    {NULL, 0, NULL, 0},
};

/* One option into o; 0, or the exit code. */
static int take_option(struct options *o, int option, char *value)
{
    char why[512];
    struct device_list devices;
    switch (option) {
    case OPT_MODEL: o->model = value; break;
    case OPT_TRANSFORMER: o->transformer = value; break;
    case OPT_TEXT_ENCODER: o->text_encoder = value; break;
    case OPT_VAE: o->vae = value; break;
    case OPT_TOKENIZER: o->tokenizer = value; break;
    case OPT_DISTILLED:
    case OPT_BASE:
        if (o->variant != ENGINE_VARIANT_OF_FILES)
            return refuse("--distilled and --base: give one of the two, once");
        o->variant = option == OPT_BASE ? ENGINE_BASE : ENGINE_DISTILLED;
        break;
    case OPT_LORA:
        if (o->lora_count == ENGINE_ADAPTERS_MAX)
            return refuse("--lora '%s': more than %d adapters", value, ENGINE_ADAPTERS_MAX);
        if (!parse_lora(value, &o->loras[o->lora_count++], why, sizeof why))
            return refuse("--%s", why);
        break;
    case OPT_PROMPT: o->prompt = value; break;
    case OPT_PROMPT_FILE: o->prompt_file = value; break;
    case OPT_NEGATIVE: o->negative = value; break;
    case OPT_OUT: o->out = value; break;
    case OPT_DUMP: o->dump = value; break;
    case OPT_TRACE: o->trace = value; break;
    case OPT_TRUNCATE: o->truncate = true; break;
    case OPT_JSON: o->json = true; break;
    case OPT_SEED:
        o->has_seed = true;
        if (!parse_number(value, UINT64_MAX, &o->seed))
            return refuse("--seed '%s': accepted: a number from 0 to 18446744073709551615", value);
        break;
    case OPT_SIZE:
        if (!parse_size(value, &o->width, &o->height))
            return refuse("--size '%s': accepted: WIDTHxHEIGHT, for example 512x512", value);
        break;
    case OPT_IMAGE:
        if (o->image_count == ENGINE_REFERENCES_MAX)
            return refuse("--image '%s': accepted: up to %d images", value, ENGINE_REFERENCES_MAX);
        o->images[o->image_count++] = value;
        break;
    case OPT_MASK: o->mask = value; break;
    case OPT_STRENGTH:
        if (!task_inputs_read_strength(value, &o->strength, why, sizeof why))
            return refuse("--%s", why);
        break;
    case OPT_STEPS:
        if (!parse_int(value, ENGINE_STEPS_MAX, &o->steps) || o->steps < 1)
            return refuse("--steps '%s': accepted: 1 to %d", value, ENGINE_STEPS_MAX);
        break;
    case OPT_GUIDANCE:
        if (!parse_guidance(value, &o->guidance))
            return refuse("--guidance '%s': accepted: a number", value);
        break;
    case OPT_BATCH:
        if (!parse_int(value, ENGINE_BATCH_MAX, &o->batch) || o->batch < 1)
            return refuse("--batch '%s': accepted: 1 to %d", value, ENGINE_BATCH_MAX);
        break;
    case OPT_THREADS:
        if (!parse_int(value, 256, &o->threads) || o->threads < 1)
            return refuse("--threads '%s': accepted: 1 to 256", value);
        break;
    case OPT_PRECISION:
        if (!engine_precision_of(value, &o->precision))
            return refuse("--precision '%s': accepted: " ENGINE_PRECISION_WORDS, value);
        break;
    case OPT_PLACEMENT:
        if (!engine_placement_of(value, &o->placement))
            return refuse("--placement '%s': accepted: " ENGINE_PLACEMENT_WORDS, value);
        break;
    case OPT_SPLIT:
        if (!engine_placement_split_of(value, &o->split))
            return refuse("--split '%s': accepted: " ENGINE_SPLIT_WORDS, value);
        break;
    case OPT_DEVICE:
        if (!device_list_read(&devices, value, why, sizeof why))
            return refuse("--%s, dry:NAME", why);
        o->device = value;
        break;
    }
    return 0;
}

static int check_options(const struct options *o)
{
    enum image_format format;
    if (!o->model && !o->transformer)
        return refuse("--model DIR is missing");
    if (!o->prompt == !o->prompt_file)
        return refuse(o->prompt ? "--prompt and --prompt-file: give one of the two" : "--prompt TEXT or --prompt-file FILE is missing");
    if (!o->has_seed)
        return refuse("--seed N is missing");
    if (o->strength != 0 && !o->mask)
        return refuse("--strength without --mask: klein takes an image as a reference and cannot begin with a part of its noise; give a "
                      "--mask of what is to be repainted, or leave --strength out");
    if (o->mask && !o->image_count)
        return refuse("--mask without --image: give the image that is to be repainted");
    if (!o->width && !o->image_count)
        return refuse("--size WxH is missing");
    if (dry_is(o->device))
        return o->dump ? refuse("--dump with --device %s: a dry device has no values", o->device) : 0;
    if (o->trace)
        return refuse("--trace needs --device dry:NAME");
    if (!o->out || !*o->out)
        return refuse("--out is missing");
    if (o->prompt && o->batch == 1 && !image_file_format_of(o->out, &format))
        return refuse("--out '%s': accepted: a name that ends in .png, .jpg or .webp", o->out);
    return 0;
}

/* -1 when a run is wanted, else the exit code. */
static int read_options(struct options *o, int argc, char **argv)
{
    *o = (struct options){.precision = ENGINE_BF16, .batch = 1, .guidance = NAN};
    char why[512];
    for (int option; (option = daemon_options_next(argc, argv, "", long_options, why, sizeof why)) != -1;) {
        if (option == '?')
            return refuse("%s", why);
        if (option == DAEMON_OPTIONS_HELP) {
            fputs(usage_text, stdout);
            return LIFECYCLE_DONE;
        }
        if (option == DAEMON_OPTIONS_VERSION) {
            puts("kiln-worker " KILN_VERSION);
            return LIFECYCLE_DONE;
        }
        int code = take_option(o, option, optarg);
        if (code)
            return code;
    }
    if (optind < argc)
        return refuse("'%s' is not an option; see --help", argv[optind]);
    int code = check_options(o);
    return code ? code : -1;
}

/* --- prompts --------------------------------------------------------------------------------------------- */

static bool add_prompt(struct prompts *p, const char *text)
{
    if (p->count % 256 == 0) {
        char **more = realloc(p->text, ((size_t)p->count + 256) * sizeof *more);
        if (!more)
            return false;
        p->text = more;
    }
    p->text[p->count] = strdup(text);
    return p->text[p->count++] != NULL;
}

/* The prompt of a line, or NULL when there is none; line endings, a byte order mark and comments are no part of it. */
static char *prompt_of_line(char *line, size_t bytes, int number)
{
    if (number == 1 && bytes >= 3 && memcmp(line, "\xEF\xBB\xBF", 3) == 0)
        line += 3;
    size_t length = strlen(line);
    while (length && (line[length - 1] == '\n' || line[length - 1] == '\r'))
        line[--length] = 0;
    return *line == 0 || *line == '#' ? NULL : line;
}

static int read_lines(struct prompts *p, FILE *f, const char *name)
{
    char *line = NULL;
    size_t capacity = 0;
    int number = 0, code = 0;
    for (ssize_t bytes; !code && (bytes = getline(&line, &capacity, f)) != -1;) {
        number++;
        if (strlen(line) != (size_t)bytes) {
            code = refuse("%s line %d: has a NUL byte", name, number);
            break;
        }
        char *prompt = prompt_of_line(line, (size_t)bytes, number);
        if (prompt && p->count == PROMPTS_MAX)
            code = refuse("%s line %d: more than %d prompts", name, number, PROMPTS_MAX);
        else if (prompt && !add_prompt(p, prompt))
            code = refuse("%s line %d: no memory", name, number);
    }
    if (!code && ferror(f))
        code = refuse("%s: %s", name, strerror(errno));
    if (!code && p->count == 0)
        code = refuse("%s: has no prompt", name);
    free(line);
    return code;
}

static int read_prompts(struct run *r)
{
    const struct options *o = &r->options;
    if (o->prompt) {
        for (int i = 0; i < o->batch; i++)
            if (!add_prompt(&r->prompts, o->prompt))
                return refuse("no memory");
    } else {
        bool is_stdin = strcmp(o->prompt_file, "-") == 0;
        FILE *f = is_stdin ? stdin : fopen(o->prompt_file, "rb");
        if (!f)
            return refuse("--prompt-file '%s': %s", o->prompt_file, strerror(errno));
        int code = read_lines(&r->prompts, f, is_stdin ? "stdin" : o->prompt_file);
        if (!is_stdin)
            fclose(f);
        if (code)
            return code;
    }
    if (o->seed > UINT64_MAX - (uint64_t)(r->prompts.count - 1))
        return refuse("--seed %" PRIu64 ": the last of %d pictures would have a seed over 64 bits", o->seed, r->prompts.count);
    if (o->dump && r->prompts.count > o->batch)
        return refuse("--dump: %d pictures in batches of %d; a dump holds one batch, give --batch %d or fewer prompts",
                      r->prompts.count, o->batch, r->prompts.count);
    r->to_folder = o->prompt_file || o->batch > 1;
    return 0;
}

/* --- reference images -------------------------------------------------------------------------------------- */

static char *absolute(const char *path)
{
    char *found = realpath(path, NULL);
    return found ? found : strdup(path); /* what is not there is named when it is opened */
}

static int read_images(struct run *r)
{
    const struct options *o = &r->options;
    struct task_inputs *told = &r->inputs.told;
    struct failure f;
    for (int i = 0; i < o->image_count; i++) {
        told->images[i].path = absolute(o->images[i]);
        told->image_count = i + 1;
        if (!inputs_image(&r->inputs, i, &f))
            return refuse("--image %s", f.reason);
    }
    if (o->mask) {
        told->mask.path = absolute(o->mask);
        if (!inputs_mask(&r->inputs, &f))
            return refuse("--mask %s", f.reason);
    }
    for (int i = 0; i < o->lora_count; i++) {
        told->loras[i] = (struct task_inputs_lora){.file.path = absolute(o->loras[i].file), .scale = o->loras[i].scale};
        told->lora_count = i + 1;
        if (!inputs_adapter(&told->loras[i].file, &f))
            return refuse("--lora %s", f.reason);
    }
    told->strength = o->strength;
    return 0;
}

/* --- files ---------------------------------------------------------------------------------------------- */

/* PATH.XXXXXX beside PATH: a rename within one folder is atomic. */
static int temporary(char *ret, size_t bytes, const char *path)
{
    snprintf(ret, bytes, "%s.XXXXXX", path);
    int fd = mkstemp(ret);
    mode_t mask = umask(0);
    umask(mask);
    if (fd >= 0)
        fchmod(fd, 0666 & ~mask);
    return fd;
}

static bool write_all(int fd, const char *data, size_t bytes)
{
    while (bytes) {
        ssize_t n = write(fd, data, bytes);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return false;
        data += n, bytes -= (size_t)n;
    }
    return true;
}

static bool write_file(const char *path, const void *data, size_t bytes)
{
    char name[4200];
    int fd = temporary(name, sizeof name, path);
    bool ok = fd >= 0 && write_all(fd, data, bytes) && fsync(fd) == 0;
    int error = errno;
    if (fd >= 0 && close(fd) != 0 && ok)
        ok = false, error = errno;
    if (ok && rename(name, path) != 0)
        ok = false, error = errno;
    if (!ok) {
        fprintf(stderr, "kiln-worker render: cannot write %s: %s\n", path, strerror(error));
        if (fd >= 0)
            unlink(name);
    }
    return ok;
}

static bool write_dump(struct run *r)
{
    char name[4200];
    struct engine_error why;
    const char *path = r->options.dump;
    if (r->dump.no_memory) {
        fprintf(stderr, "kiln-worker render: --dump: no memory for the tensors\n");
        return false;
    }
    int fd = temporary(name, sizeof name, path);
    if (fd < 0) {
        fprintf(stderr, "kiln-worker render: cannot write %s: %s\n", path, strerror(errno));
        return false;
    }
    close(fd);
    bool ok = safetensors_write(name, r->dump.items, r->dump.count, &why);
    if (!ok)
        fprintf(stderr, "kiln-worker render: cannot write %s: %s\n", path, why.text);
    else if (rename(name, path) != 0) {
        ok = false;
        fprintf(stderr, "kiln-worker render: cannot write %s: %s\n", path, strerror(errno));
    }
    if (!ok)
        unlink(name);
    return ok;
}

static bool path_of(const struct run *r, int index, char *ret, size_t bytes)
{
    int used = r->to_folder ? snprintf(ret, bytes, "%s/%06d.png", r->options.out, index + 1)
                            : snprintf(ret, bytes, "%s", r->options.out);
    return used > 0 && (size_t)used < bytes;
}

static bool encode_image(const struct run *r, const struct engine_request *request, const struct engine_image *image,
                         const char *path, void **ret, size_t *ret_bytes)
{
    char why[256], model[256];
    enum image_format format;
    const char *named = r->options.transformer ? r->options.transformer : r->options.model;
    const char *end = named + strlen(named);
    while (end > named + 1 && end[-1] == '/')
        end--;
    const char *start = end;
    while (start > named && start[-1] != '/')
        start--;
    snprintf(model, sizeof model, "%.*s", (int)(end - start), start);
    struct image_record record = {
        .prompt = request->prompt, .negative = request->negative, .model = model, .digest = r->digest,
        .licence = engine_team_info(r->engine)->licence, .precision = engine_precision_name(r->options.precision), .software = "kiln " KILN_VERSION,
        .width = image->width, .height = image->height, .steps = image->steps, .guidance = image->guidance,
        .seed = image->seed, .truncated = image->truncated, .is_marked = true,
    };
    struct json_text inputs = {0};
    task_inputs_record(&inputs, &r->inputs.told);
    record.inputs = inputs.data;
    bool ok = image_file_format_of(path, &format) &&
              image_file_encode(ret, ret_bytes, format, image->rgb, &record, why, sizeof why);
    json_text_done(&inputs);
    if (ok)
        return true;
    fprintf(stderr, "kiln-worker render: cannot encode %s: %s\n", path, why);
    return false;
}

static void report(const struct run *r, const struct engine_image *image, const char *path, const char *sha256)
{
    struct rusage usage;
    const struct engine_timing *t = &image->timing;
    getrusage(RUSAGE_SELF, &usage);
    if (!r->options.json) {
        printf("%s  seed %" PRIu64 "  load %.2f s  encode %.2f s  denoise %.2f s  decode %.2f s\n", path, image->seed,
               t->load_s, t->encode_s, t->denoise_s, t->decode_s);
        return;
    }
    json_t *line = json_pack("{s:s, s:s, s:f, s:f, s:f, s:f, s:I, s:I, s:I, s:s, s:s, s:s}", "path", path, "sha256", sha256, "load_s",
                             t->load_s, "encode_s", t->encode_s, "denoise_s", t->denoise_s, "decode_s", t->decode_s,
                             "peak_bytes", (json_int_t)usage.ru_maxrss * 1024, "backend_bytes", (json_int_t)t->peak_bytes,
                             "remembered_bytes", (json_int_t)t->remembered_bytes, "precision", engine_precision_name(r->options.precision),
                             "device", engine_team_info(r->engine)->device, "passes",
                             engine_placement_passes(engine_team_info(r->engine)->passes));
    char *text = line ? json_dumps(line, JSON_COMPACT | JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(6)) : NULL;
    if (text)
        puts(text);
    else
        fprintf(stderr, "kiln-worker render: %s: its name is not UTF-8, no JSON line\n", path);
    free(text);
    json_decref(line);
}

static bool write_image(struct run *r, int index, const struct engine_request *request, const struct engine_image *image)
{
    char path[4096], sha256[65];
    void *data = NULL;
    size_t bytes;
    if (!path_of(r, index, path, sizeof path)) {
        fprintf(stderr, "kiln-worker render: --out: the path is too long\n");
        return false;
    }
    bool ok = encode_image(r, request, image, path, &data, &bytes) && digest_of(data, bytes, sha256) &&
              write_file(path, data, bytes);
    if (ok)
        report(r, image, path, sha256);
    free(data);
    return ok;
}

/* --- run ------------------------------------------------------------------------------------------------ */

static bool is_cancelled(void *context)
{
    const struct run *r = context;
    if (r->dry)
        dry_phase(r->dry, DRY_STEP);
    return stop_signal != 0;
}

static void show_step(void *context, int step, int steps)
{
    const struct run *r = context;
    char bar[31];
    if (r->dry && step == steps)
        dry_phase(r->dry, DRY_DECODE);
    if (!r->is_terminal)
        return;
    int filled = (int)((int64_t)step * 30 / steps);
    memset(bar, '#', (size_t)filled);
    memset(bar + filled, '.', (size_t)(30 - filled));
    bar[30] = 0;
    fprintf(stderr, "\r[%s] step %d of %d, picture %d of %d ", bar, step, steps, r->done + 1, r->prompts.count);
}

static void keep_tensor(void *context, const char *name, struct tensor value)
{
    struct dump *d = &((struct run *)context)->dump;
    char *copy = malloc(tensor_bytes(value)), *label = strdup(name);
    if (!copy || !label || d->count == DUMP_MAX) {
        free(copy);
        free(label);
        d->no_memory = true;
        return;
    }
    memcpy(copy, value.data, tensor_bytes(value));
    value.data = copy;
    d->items[d->count++] = (struct safetensors_item){label, value};
}

static void clear_bar(const struct run *r)
{
    if (r->is_terminal)
        fputs("\r\033[K", stderr);
}

static int fault_code(enum engine_fault fault)
{
    if (fault == ENGINE_CANCELLED)
        return LIFECYCLE_BY_SIGNAL + stop_signal;
    return fault == ENGINE_BAD_REQUEST || fault == ENGINE_BAD_MODEL ? LIFECYCLE_REFUSED : LIFECYCLE_FAILED;
}

static struct engine_request request_of(const struct run *r, int index)
{
    const struct options *o = &r->options;
    struct engine_request request = {.prompt = r->prompts.text[index], .negative = o->negative, .width = o->width,
                                     .height = o->height, .steps = o->steps, .guidance = o->guidance,
                                     .seed = o->seed + (uint64_t)index, .truncate = o->truncate};
    inputs_into(&r->inputs, &request);
    engine_team_defaults(r->engine, &request);
    return request;
}

/* The weights' digest, which pictures carry: it was hashed meanwhile. */
static int know_digest(struct run *r)
{
    char why[512];
    if (!r->is_hashing)
        return LIFECYCLE_DONE;
    r->is_hashing = false;
    return weights_digest_end(&r->hashing, r->digest, why, sizeof why) ? LIFECYCLE_DONE : refuse("%s", why);
}

static int render_batch(struct run *r, int first, int count)
{
    struct engine_request requests[ENGINE_BATCH_MAX];
    struct engine_image images[ENGINE_BATCH_MAX];
    struct engine_error why;
    struct engine_watch watch = {.context = r, .cancelled = is_cancelled, .step = show_step,
                                 .dump = r->options.dump ? keep_tensor : NULL};
    for (int i = 0; i < count; i++)
        requests[i] = request_of(r, first + i);
    if (r->dry)
        dry_phase(r->dry, DRY_PROMPT);
    bool ok = engine_team_generate(r->engine, requests, count, images, &watch, &why);
    clear_bar(r);
    if (r->dry)
        dry_phase(r->dry, DRY_IDLE);
    if (!ok) {
        fprintf(stderr, "kiln-worker render: %s\n", why.text);
        return fault_code(why.fault);
    }
    int code = know_digest(r);
    for (int i = 0; i < count; i++) {
        if (!code && !r->dry && !write_image(r, first + i, &requests[i], &images[i]))
            code = LIFECYCLE_FAILED;
        engine_image_done(&images[i]);
    }
    r->done += count;
    return code;
}

/* Every prompt is checked before the first is rendered: a night's work does not end at line 900. */
static int check_all(struct run *r)
{
    struct engine_error why;
    for (int i = 0; i < r->prompts.count; i++) {
        struct engine_request request = request_of(r, i);
        if (!engine_team_check(r->engine, &request, &why))
            return r->options.prompt ? refuse("%s", why.text) : refuse("prompt %d: %s", i + 1, why.text);
        if (r->options.prompt)
            break; /* all the same */
    }
    return 0;
}

static int render_all(struct run *r)
{
    int code = check_all(r);
    if (!code && r->to_folder && !r->dry && mkdir(r->options.out, 0777) != 0 && errno != EEXIST)
        code = refuse("--out '%s': %s", r->options.out, strerror(errno));
    for (int first = 0; !code && first < r->prompts.count; first += r->options.batch) {
        int rest = r->prompts.count - first;
        code = render_batch(r, first, rest < r->options.batch ? rest : r->options.batch);
    }
    if (!code && r->options.dump && !write_dump(r))
        code = LIFECYCLE_FAILED;
    return code;
}

/* On the CPU there is nothing to place, and alone nothing to split. */
static void show_placement(const struct engine_info *info)
{
    char figures[ENGINE_PLACEMENT_FIGURES_MAX];
    engine_placement_figures(info, figures);
    if (*info->split)
        fprintf(stderr, "kiln-worker render: split=%s\n", info->split);
    if (info->device_bytes)
        fprintf(stderr, "kiln-worker render: %s\n", figures);
}

static void show_products(enum engine_precision precision, const struct engine_info *info)
{
    if (engine_precision_has_fp8(precision) && !info->has_fp8_units)
        fprintf(stderr, "kiln-worker render: precision %s: %s has no units for FP8; the same numbers are multiplied in wider ones\n",
                engine_precision_name(precision), info->device);
}

static int smaller(int a, int b)
{
    return a < b ? a : b;
}

static int open_model(struct run *r)
{
    const struct options *o = &r->options;
    struct engine_error why;
    char text[512];
    struct engine_request planned = {0};
    inputs_into(&r->inputs, &planned);
    for (int i = 0; i < o->lora_count; i++) {
        r->adapters[i] = (struct engine_adapter){o->loras[i].file, (float)o->loras[i].scale};
        r->adapters_hex[i] = r->inputs.told.loras[i].file.sha256;
    }
    r->model = (struct engine_options){.model_dir = o->model, .transformer = o->transformer, .text_encoder = o->text_encoder,
                                     .vae = o->vae, .tokenizer = o->tokenizer, .variant = o->variant,
                                     .sha256 = weights_digest_file, .adapters = r->adapters,
                                     .adapter_count = o->lora_count, .threads = o->threads, .device = o->device,
                                     .precision = o->precision,
                                     .placement = o->placement, .split = o->split, .plan_width = o->width, .plan_height = o->height,
                                     .plan_count = smaller(o->batch, r->prompts.count),
                                     .plan_references = planned.references, .plan_reference_count = planned.reference_count};
    if (dry_is(o->device) && !dry_open(&r->dry, o->trace, text, sizeof text))
        return refuse("%s", text);
    r->is_hashing = !r->dry && weights_digest_begin(&r->hashing, &r->model, r->adapters_hex, text, sizeof text);
    if (!r->dry && !r->is_hashing)
        return refuse("%s", text);
    if (!engine_team_open(&r->engine, &r->model, &why)) {
        fprintf(stderr, "kiln-worker render: %s\n", why.text);
        return why.fault == ENGINE_NO_DEVICE || why.fault == ENGINE_NO_MEMORY ? LIFECYCLE_REFUSED : fault_code(why.fault);
    }
    show_placement(engine_team_info(r->engine));
    show_products(o->precision, engine_team_info(r->engine));
    return 0;
}

static int report_dry(struct run *r)
{
    char why[512];
    struct engine_request request = request_of(r, 0);
    return dry_report(r->dry, &r->model, &request, r->model.plan_count, engine_team_info(r->engine), r->options.json, why, sizeof why)
               ? LIFECYCLE_DONE : refuse("%s", why);
}

static void run_done(struct run *r)
{
    if (r->is_hashing)
        weights_digest_drop(&r->hashing);
    engine_team_close(r->engine);
    dry_close(r->dry);
    for (int i = 0; i < r->prompts.count; i++)
        free(r->prompts.text[i]);
    free(r->prompts.text);
    inputs_done(&r->inputs);
    for (size_t i = 0; i < r->dump.count; i++) {
        free((void *)(uintptr_t)r->dump.items[i].name);
        free(r->dump.items[i].value.data);
    }
    free(r);
}

int render_main(int argc, char **argv)
{
    struct run *r = calloc(1, sizeof *r);
    if (!r)
        return refuse("no memory");
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = (int)SA_RESETHAND};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    r->is_terminal = isatty(STDERR_FILENO);
    int code = read_options(&r->options, argc, argv);
    if (code < 0)
        code = read_prompts(r);
    else {
        run_done(r);
        return code;
    }
    if (!code)
        code = read_images(r);
    if (!code)
        code = open_model(r);
    if (!code)
        code = render_all(r);
    if (!code && r->dry)
        code = report_dry(r);
    run_done(r);
    return code;
}
