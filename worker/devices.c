/* devices.c - `kiln-worker devices`: a line for each GPU, which is opened as a render opens it: one that is listed can be used. Those
 * of a team are opened one after the other. With models it is a line for each worker that should serve them (device_share.h). */
#include "devices.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "daemon_options.h"
#include "device_list.h"
#include "device_share.h"
#include "engine.h"
#include "kern_module.h"
#include "lifecycle.h"
#include "msg.h"

#define DEVICES_MAX 64
#define FORMS "cuda, cuda:N, cuda:I,J.. (different GPUs)"

static const char usage_text[] =
    "usage: kiln-worker devices [cuda|cuda:N|cuda:I,J..] [--model NAME=DIR]... [--json]\n"
    "\n"
    "Opens every CUDA device (or those that are named), as a render does, and says what it is.\n"
    "CUDA_VISIBLE_DEVICES in the environment says which there are.\n"
    "\n"
    "  --json               a line a device: {\"device\",\"name\",\"memory_bytes\",\"available_bytes\"}\n"
    "  --model NAME=DIR     how workers that serve these models are best laid over the devices, a line a worker: one on each device, which gives\n"
    "                       the most pictures; or, where only a share of a model fits one, one on each pair (device cuda:0,1).\n"
    "                       With --json: {\"device\",\"why\"}\n"
    "  --prefer P           with --model: throughput (default), or latency: a pair wherever two can share the models\n"
    "  --placement P, --precision P   with --model: as the workers will have them\n"
    "  --help, --version\n"
    "\n"
    "Exit: 0 all can be used, 2 refused: there is none, or one cannot be used.\n";

static int refuse(const char *text)
{
    fprintf(stderr, "kiln-worker devices: %s\n", text);
    return LIFECYCLE_REFUSED;
}

static void print(const char *device, const char *name, const struct kern_space *space, bool is_json)
{
    if (!is_json) {
        printf("%s, %.1f GB, %.1f available\n", name, (double)space->all / 1e9, (double)space->available / 1e9);
        return;
    }
    json_t *line = json_pack("{s:s,s:s,s:I,s:I}", "device", device, "name", name, "memory_bytes", (json_int_t)space->all,
                             "available_bytes", (json_int_t)space->available);
    json_dumpf(line, stdout, JSON_COMPACT);
    putchar('\n');
    json_decref(line);
}

/* What was asked for, and the devices as they are looked at. */
struct devices {
    bool is_json, prefers_latency;
    const char *models[MSG_MODELS_MAX]; /* NAME=DIR */
    int model_count;
    struct engine_options engine;   /* what they will be opened with */
    char names[DEVICES_MAX][64];
    int count;
    size_t memory_bytes;            /* of the smallest */
};

static bool look(struct devices *d, const char *device, char *why, size_t why_bytes)
{
    struct kern_space space = {0};
    if (d->count == DEVICES_MAX) {
        snprintf(why, why_bytes, "more than %d devices", DEVICES_MAX);
        return false;
    }
    struct kern *k = kern_module_open(device, NULL, why, why_bytes);
    if (!k)
        return false;
    bool ok = kern_memory(k, &space);
    if (ok && !d->model_count)
        print(device, kern_name(k), &space, d->is_json);
    snprintf(d->names[d->count++], sizeof d->names[0], "%s", device);
    d->memory_bytes = d->memory_bytes && d->memory_bytes < space.all ? d->memory_bytes : space.all;
    if (!ok)
        snprintf(why, why_bytes, "%s does not say how much memory it has: %s", device, kern_error(k));
    kern_close(k);
    return ok;
}

static int look_at_all(struct devices *d)
{
    char device[16], why[600];
    int count = kern_module_count(why, sizeof why);
    for (int i = 0; i < count; i++) {
        snprintf(device, sizeof device, "cuda:%d", i);
        if (!look(d, device, why, sizeof why))
            return refuse(why);
    }
    return count ? LIFECYCLE_DONE : refuse(why);
}

/* Dry devices for models only: they say how much memory they have. */
static int look_at_named(struct devices *d, const char *text)
{
    struct device_list list;
    char why[600];
    bool is_kind = strncmp(text, "cuda", 4) == 0 || (d->model_count && strncmp(text, "dry:", 4) == 0);
    if (!is_kind || !device_list_read(&list, text, why, sizeof why)) {
        snprintf(why, sizeof why, "device '%.400s', accepted: " FORMS "%s", text, d->model_count ? ", dry:NAME,.." : "");
        return refuse(why);
    }
    for (int i = 0; i < list.count; i++)
        if (!look(d, list.ranks[i].device, why, sizeof why))
            return refuse(why);
    return LIFECYCLE_DONE;
}

/* --- models ------------------------------------------------------------------------------------------------- */

static bool weigh(const struct devices *d, const char *text, char *name, struct device_share_model *ret, char *why, size_t why_bytes)
{
    struct engine_options o = d->engine;
    struct engine_error reason;
    const char *equals = strchr(text, '=');
    if (!equals || equals == text || !equals[1] || equals - text > MSG_NAME_MAX) {
        snprintf(why, why_bytes, "--model '%.200s': want NAME=DIR, a name of 1 to %d bytes", text, MSG_NAME_MAX);
        return false;
    }
    snprintf(name, MSG_NAME_MAX + 1, "%.*s", (int)(equals - text), text);
    o.model_dir = equals + 1;
    *ret = (struct device_share_model){.name = name};
    if (engine_fits(&o, 1, d->memory_bytes, &ret->fits_one, &ret->one_bytes, &reason) &&
        engine_fits(&o, 2, d->memory_bytes, &ret->fits_team, &ret->team_bytes, &reason))
        return true;
    snprintf(why, why_bytes, "%s", reason.text);
    return false;
}

static void print_worker(const char *device, const char *why, bool is_json)
{
    json_t *line = json_pack("{s:s,s:s}", "device", device, "why", why);
    if (is_json)
        json_dumpf(line, stdout, JSON_COMPACT);
    else
        printf("%s", device);
    putchar('\n');
    json_decref(line);
}

/* "cuda:0" and "cuda:1": "cuda:0,1" */
static void print_workers(const struct devices *d, bool is_teams, const char *why)
{
    char device[192];
    if (!d->is_json)
        printf("%s\n", why);
    for (int i = 0; i < d->count; i += is_teams ? 2 : 1) {
        snprintf(device, sizeof device, is_teams ? "%s,%s" : "%s", d->names[i], is_teams ? strchr(d->names[i + 1], ':') + 1 : "");
        print_worker(device, why, d->is_json);
    }
}

static int lay_over(const struct devices *d)
{
    struct device_share_model models[MSG_MODELS_MAX];
    static char names[MSG_MODELS_MAX][MSG_NAME_MAX + 1];
    char why[600];
    for (int i = 0; i < d->model_count; i++)
        if (!weigh(d, d->models[i], names[i], &models[i], why, sizeof why))
            return refuse(why);
    bool is_teams = device_share_is_teams(d->count, d->memory_bytes, d->prefers_latency, models, d->model_count, why, sizeof why);
    print_workers(d, is_teams, why);
    return LIFECYCLE_DONE;
}

/* --- options ------------------------------------------------------------------------------------------------ */

enum { JSON = DAEMON_OPTIONS_OWN, MODEL, PREFER, PLACEMENT, PRECISION };

static bool read_word(struct devices *d, int word, const char *text, char *why, size_t why_bytes)
{
    switch (word) {
    case MODEL:
        if (d->model_count == MSG_MODELS_MAX) {
            snprintf(why, why_bytes, "--model: at most %d", MSG_MODELS_MAX);
            return false;
        }
        d->models[d->model_count++] = text;
        return true;
    case PREFER:
        d->prefers_latency = strcmp(text, "latency") == 0;
        if (d->prefers_latency || strcmp(text, "throughput") == 0)
            return true;
        snprintf(why, why_bytes, "--prefer '%.200s', accepted: throughput, latency", text);
        return false;
    case PLACEMENT:
        if (engine_placement_of(text, &d->engine.placement))
            return true;
        snprintf(why, why_bytes, "--placement '%.200s', accepted: " ENGINE_PLACEMENT_WORDS, text);
        return false;
    default:
        if (engine_precision_of(text, &d->engine.precision))
            return true;
        snprintf(why, why_bytes, "--precision '%.200s', accepted: " ENGINE_PRECISION_WORDS, text);
        return false;
    }
}

int devices_main(int argc, char **argv)
{
    static const struct option options[] = {{"json", no_argument, NULL, JSON}, {"model", required_argument, NULL, MODEL},
                                            {"prefer", required_argument, NULL, PREFER}, {"placement", required_argument, NULL, PLACEMENT},
                                            {"precision", required_argument, NULL, PRECISION}, {"help", no_argument, NULL, DAEMON_OPTIONS_HELP},
                                            {"version", no_argument, NULL, DAEMON_OPTIONS_VERSION}, {0}};
    char reason[600];
    struct devices d = {.engine = {.precision = ENGINE_BF16}};
    for (int word; (word = daemon_options_next(argc, argv, "h", options, reason, sizeof reason)) != -1;) {
        switch (word) {
        case JSON: d.is_json = true; break;
        case MODEL: case PREFER: case PLACEMENT: case PRECISION:
            if (!read_word(&d, word, optarg, reason, sizeof reason))
                return refuse(reason);
            break;
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
    if (argc - optind > 1)
        return refuse("more than one argument, accepted: " FORMS "; see --help");
    const char *device = optind < argc ? argv[optind] : "cuda";
    int code = strcmp(device, "cuda") == 0 ? look_at_all(&d) : look_at_named(&d, device);
    return code || !d.model_count ? code : lay_over(&d);
}
