/* worker_options.c - long options only, each checked where it is read. */
#include "worker_options.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "device_list.h"
#include "home_dir.h"
#include "json_text.h"

#define BATCH_DEFAULT 4
#define CREDIT_MAX 1024

static const char help[] =
    "usage: kiln-worker --connect ENDPOINT --model NAME=DIR [--model NAME=DIR]... [options]\n"
    "       kiln-worker render | tokenize | inspect | devices ...      without a farm; each has --help\n"
    "\n"
    "Takes batches of images from a coordinator, renders them, writes the files, reports.\n"
    "\n"
    "  --connect ENDPOINT   the coordinator: tcp://127.0.0.1:PORT, tcp://[::1]:PORT or ipc:///PATH\n"
    "  --model NAME=DIR     a model in diffusers layout (parts may be files: transformer.gguf) and the name campaigns use for it\n"
    "  --device D           what it renders on: cpu (default), cuda or cuda:N; a team that shares each model: cuda:0,1 (two GPUs),\n"
    "                       cpu:0,1 (two memory nodes), which also bind it to their cores\n"
    "  --placement P        of weights on a GPU: auto (default), resident, phases, streamed; see render --help\n"
    "  --split S            what a team splits: auto (default), weights, passes; see render --help\n"
    "  --threads N          default: all cores\n"
    "  --precision P        bf16 (default), f32, fp8, fp8-f32; see render --help\n"
    "  --batch N            images rendered at once, 1 to 64; default 4\n"
    "  --credit N           images assigned and not yet acknowledged; default twice --batch\n"
    "  --name NAME          unique in the farm, the same after a restart; default: host name\n"
    "  --spool DIR          results not yet acknowledged are kept in DIR/NAME; default $KILN_HOME/spool\n"
    DAEMON_OPTIONS_USAGE
    "\n"
    "SIGTERM or SIGINT: finishes what runs, gives back the rest, exits 0. A second one: leaves at once.\n"
    "Exit codes: 0 drained, 2 usage, refused input or a model that cannot be used, 75 device lost or model changed, 128+n by signal.\n"
    "KILN_FAULT=NAME[:N] makes it fail on demand (worker/fault_switch.h).\n";

enum option_word {
    OPTION_CONNECT = DAEMON_OPTIONS_OWN,
    OPTION_MODEL,
    OPTION_DEVICE,
    OPTION_PLACEMENT,
    OPTION_SPLIT,
    OPTION_THREADS,
    OPTION_PRECISION,
    OPTION_BATCH,
    OPTION_CREDIT,
    OPTION_NAME,
    OPTION_SPOOL,
};

static const struct option words[] = {
    {"connect", required_argument, NULL, OPTION_CONNECT},
    {"model", required_argument, NULL, OPTION_MODEL},
    {"device", required_argument, NULL, OPTION_DEVICE},
    {"placement", required_argument, NULL, OPTION_PLACEMENT},
    {"split", required_argument, NULL, OPTION_SPLIT},
    {"threads", required_argument, NULL, OPTION_THREADS},
    {"precision", required_argument, NULL, OPTION_PRECISION},
    {"batch", required_argument, NULL, OPTION_BATCH},
    {"credit", required_argument, NULL, OPTION_CREDIT},
    {"name", required_argument, NULL, OPTION_NAME},
    {"spool", required_argument, NULL, OPTION_SPOOL},
    DAEMON_OPTIONS_WORDS,
};

const char *worker_options_help(void)
{
    return help;
}

static bool read_model(struct worker_options_read *o, const char *text, char *why, size_t why_bytes)
{
    int at = o->worker.model_count;
    const char *equals = strchr(text, '=');
    size_t name_bytes = equals ? (size_t)(equals - text) : 0;
    if (!equals || name_bytes == 0 || name_bytes > MSG_NAME_MAX || !equals[1]) {
        snprintf(why, why_bytes, "--model '%s': want NAME=DIR, a name of 1 to %d bytes", text, MSG_NAME_MAX);
        return false;
    }
    if (json_text_utf8_fault(text, name_bytes) != name_bytes) {
        snprintf(why, why_bytes, "--model '%s': the name is not UTF-8", text);
        return false;
    }
    if (at == MSG_MODELS_MAX) {
        snprintf(why, why_bytes, "--model '%s': at most %d models", text, MSG_MODELS_MAX);
        return false;
    }
    char *name = strndup(text, name_bytes);
    for (int i = 0; name && i < at; i++)
        if (strcmp(o->models[i].name, name) == 0) {
            snprintf(why, why_bytes, "--model '%s': the name '%s' was given twice", text, name);
            free(name);
            return false;
        }
    char *dir = realpath(equals + 1, NULL);
    if (!name || !dir) {
        snprintf(why, why_bytes, "--model '%s': folder '%s': %m", text, equals + 1);
        free(name);
        return false;
    }
    o->model_words[at] = name;
    o->model_dirs[at] = dir;
    o->models[at] = (struct model_source){name, dir};
    o->worker.model_count++;
    return true;
}

/* Whether there is such a device is the engine's to say. */
static bool device_ok(const char *text, char *why, size_t why_bytes)
{
    struct device_list list;
    char reason[256];
    if (!device_list_read(&list, text, reason, sizeof reason)) {
        snprintf(why, why_bytes, "--%s", reason);
        return false;
    }
    if (strncmp(text, "dry:", 4) != 0)
        return true;
    snprintf(why, why_bytes, "--device '%s': it renders nothing; accepted: " DEVICE_LIST_FORMS, text);
    return false;
}

static bool name_ok(const char *name)
{
    return strlen(name) <= WORKER_NAME_MAX && msg_worker_name_ok(name);
}

static bool read_word(void *context, int word, const char *text, char *why, size_t why_bytes)
{
    struct worker_options_read *o = context;
    struct worker_options *w = &o->worker;
    switch (word) {
    case OPTION_CONNECT: w->endpoint = text; return true;
    case OPTION_MODEL: return read_model(o, text, why, why_bytes);
    case OPTION_DEVICE:
        w->device = text;
        return device_ok(text, why, why_bytes);
    case OPTION_PLACEMENT:
        if (engine_placement_of(text, &w->placement))
            return true;
        snprintf(why, why_bytes, "--placement '%s', accepted: " ENGINE_PLACEMENT_WORDS, text);
        return false;
    case OPTION_SPLIT:
        if (engine_placement_split_of(text, &w->split))
            return true;
        snprintf(why, why_bytes, "--split '%s', accepted: " ENGINE_SPLIT_WORDS, text);
        return false;
    case OPTION_THREADS: return daemon_options_number("--threads", text, 1, 4096, &w->threads, why, why_bytes);
    case OPTION_PRECISION:
        if (engine_precision_of(text, &w->precision))
            return true;
        snprintf(why, why_bytes, "--precision '%s', accepted: " ENGINE_PRECISION_WORDS, text);
        return false;
    case OPTION_BATCH: return daemon_options_number("--batch", text, 1, ENGINE_BATCH_MAX, &w->batch_max, why, why_bytes);
    case OPTION_CREDIT: return daemon_options_number("--credit", text, 1, CREDIT_MAX, &w->credit, why, why_bytes);
    case OPTION_NAME:
        snprintf(o->name, sizeof o->name, "%s", text);
        if (name_ok(text))
            return true;
        snprintf(why, why_bytes, "--name '%s': want 1 to %d letters, digits, '.', '_' or '-', the first no '.'", text, WORKER_NAME_MAX);
        return false;
    case OPTION_SPOOL: w->spool_dir = text; return true;
    default: return false;
    }
}

static bool default_name(struct worker_options_read *o, char *why, size_t why_bytes)
{
    char host[256] = "";
    gethostname(host, sizeof host - 1);
    if (!name_ok(host)) {
        snprintf(why, why_bytes, "host name '%s' cannot be a worker's name; give one with --name", host);
        return false;
    }
    memcpy(o->name, host, strlen(host) + 1); /* name_ok bounds it */
    return true;
}

static bool complete(struct worker_options_read *o, char *why, size_t why_bytes)
{
    char base[PATH_MAX];
    struct worker_options *w = &o->worker;
    if (!w->endpoint) {
        snprintf(why, why_bytes, "--connect ENDPOINT is missing; see --help");
        return false;
    }
    if (w->model_count == 0) {
        snprintf(why, why_bytes, "--model NAME=DIR is missing; see --help");
        return false;
    }
    if (!*o->name && !default_name(o, why, why_bytes))
        return false;
    if (w->credit && w->credit < w->batch_max) {
        snprintf(why, why_bytes, "--credit %d: at least --batch, which is %d", w->credit, w->batch_max);
        return false;
    }
    if (!w->spool_dir && !home_dir_default(base, sizeof base)) {
        snprintf(why, why_bytes, "no folder for the spool: give --spool DIR or set KILN_HOME");
        return false;
    }
    int used = snprintf(o->spool_dir, sizeof o->spool_dir, "%s%s/%s", w->spool_dir ? w->spool_dir : base, w->spool_dir ? "" : "/spool",
                        o->name);
    if (used < 0 || (size_t)used >= sizeof o->spool_dir - 64) {
        snprintf(why, why_bytes, "--spool: the path is longer than %zu bytes", sizeof o->spool_dir - 64);
        return false;
    }
    w->spool_dir = o->spool_dir;
    w->name = o->name;
    w->models = o->models;
    return true;
}

bool worker_options_read(struct worker_options_read *ret, int argc, char **argv, char *why, size_t why_bytes)
{
    memset(ret, 0, sizeof *ret);
    ret->worker.precision = ENGINE_BF16;
    ret->worker.batch_max = BATCH_DEFAULT;
    if (!daemon_options_read(&ret->daemon, words, read_word, ret, argc, argv, why, why_bytes))
        return false;
    ret->worker.metrics_port = ret->daemon.metrics_port;
    return ret->daemon.wants_help || ret->daemon.wants_version || complete(ret, why, why_bytes);
}

void worker_options_done(struct worker_options_read *o)
{
    for (int i = 0; i < o->worker.model_count; i++) {
        free(o->model_words[i]);
        free(o->model_dirs[i]);
    }
}
