/* up_plan.c - the options of `kiln up`, one function per group, each refusing with a sentence. */
#include "up_plan.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lifecycle.h"
#include "process.h"
#include "up_child.h"

#define BATCH_MAX 64
#define THREADS_MAX 4096
#define HOST_MAX 64

const char up_plan_usage[] =
    "  --model NAME=DIR    a model in diffusers layout (parts may be files or links: transformer.gguf) and the name campaigns use\n"
    "                      for it; may be given many times\n"
    "                      (those of the last `kiln up` here; the bundled pocket model when there was none)\n"
    "  --workers N         1 to 256 (1; with --device cuda one for each GPU or pair)\n"
    "  --device D          what workers render on: cpu (default), cuda (every GPU, in turn), cuda:N,\n"
    "                      or cuda:I,J: one worker whose models are shared by these GPUs\n"
    "  --prefer P          with --device cuda: throughput (default): a worker on each GPU, on each pair only where a model fits no\n"
    "                      GPU and a share of it does; latency: on each pair wherever two can share the models\n"
    "  --placement P       of weights on a GPU: auto, resident, phases or streamed (auto; kiln-worker render --help says what these are)\n"
    "  --threads N         of each worker (cores / workers)\n"
    "  --batch N           images rendered at once, 1 to 64 (the worker's own choice)\n"
    "  --precision P       bf16, f32, fp8 or fp8-f32 (bf16); kiln-worker render --help says what they are\n"
    "  --bind ENDPOINT     where workers connect (ipc://HOME/run/kiln.sock)\n"
    "  --metrics-port P    the coordinator's metrics on 127.0.0.1:P (any free port)\n"
    "  --log-level L       debug, info, warn, error (info)\n"
    "  --database URI      one of your own; 'private' goes back to kiln's own PostgreSQL\n"
    "  --detach            go on in the background as soon as everything is ready\n"
    "\n"
    "  Without --detach it stays: Ctrl-C is `kiln down`. What dies is started again.\n";

struct options { /* as given */
    struct command_list models;
    const char *device, *placement, *prefer, *precision, *bind, *log_level;
    int64_t workers, threads, batch, metrics_port;
    bool is_detached;
};

/* --- models --------------------------------------------------------------------------------------------------- */

bool up_plan_model(struct home_model *ret, const char *text, char *why, size_t why_bytes)
{
    static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
    char dir[PATH_MAX];
    struct stat info;
    const char *equals = strchr(text, '=');
    size_t length = equals ? (size_t)(equals - text) : 0, plain = strspn(text, letters);
    if (!equals || !equals[1]) {
        snprintf(why, why_bytes, "--model '%.300s': accepted is NAME=DIR", text);
        return false;
    }
    if (length == 0 || length > UP_PLAN_NAME_MAX || plain != length || *text == '.') {
        snprintf(why, why_bytes, "--model '%.300s': a name has 1 to %d of A-Z a-z 0-9 . _ - and no '.' in front", text, UP_PLAN_NAME_MAX);
        return false;
    }
    if (!realpath(equals + 1, dir) || stat(dir, &info) != 0) {
        snprintf(why, why_bytes, "--model '%.300s': folder %.300s: %s", text, equals + 1, strerror(errno));
        return false;
    }
    if (!S_ISDIR(info.st_mode)) {
        snprintf(why, why_bytes, "--model '%.300s': %.300s is not a folder; accepted is one in diffusers layout", text, equals + 1);
        return false;
    }
    snprintf(ret->name, sizeof ret->name, "%.*s", (int)length, text);
    memcpy(ret->dir, dir, strlen(dir) + 1);
    return true;
}

static int take_models(struct up_plan *p, struct command_call *call, const struct command_list *given)
{
    char why[2048];
    p->config.model_count = 0;
    for (int i = 0; i < given->count; i++) {
        struct home_model *model = &p->config.models[i];
        if (!up_plan_model(model, given->items[i], why, sizeof why))
            return command_refuse(call, "%s", why);
        for (int k = 0; k < i; k++)
            if (strcmp(p->config.models[k].name, model->name) == 0)
                return command_refuse(call, "--model '%s': the name '%s' was given twice", given->items[i], model->name);
        p->config.model_count++;
    }
    return COMMAND_DONE;
}

/* engine/pocket/model of the source tree this program was built in, or where an installation puts it. */
static int take_pocket(struct up_plan *p, struct command_call *call)
{
    static const char *const places[] = {"../../../engine/pocket/model", "../share/kiln/pocket"};
    char self[PATH_MAX], path[PATH_MAX + 64], text[PATH_MAX + 96], why[2048];
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    self[length > 0 ? length : 0] = 0;
    char *slash = strrchr(self, '/');
    if (slash)
        *slash = 0;
    for (size_t i = 0; slash && i < sizeof places / sizeof *places; i++) {
        snprintf(path, sizeof path, "%s/%s", self, places[i]);
        if (access(path, F_OK) != 0)
            continue;
        snprintf(text, sizeof text, "pocket=%s", path);
        if (!up_plan_model(&p->config.models[0], text, why, sizeof why))
            return command_refuse(call, "%s", why);
        p->config.model_count = 1;
        return COMMAND_DONE;
    }
    return command_refuse(call, "--model NAME=DIR is needed: kiln was never up on %s, and the bundled pocket model is not beside this program",
                          call->home.dir);
}

int up_plan_models(const struct up_plan *p, struct command_call *call)
{
    char report[8192], why[PATH_MAX + 256];
    for (int i = 0; i < p->config.model_count; i++) {
        const struct home_model *m = &p->config.models[i];
        char *const argv[] = {(char *)p->worker, "inspect", "--quick", "--json", "--model", (char *)m->dir, NULL};
        int status = process_run(argv, NULL, NULL, report, sizeof report, why, sizeof why);
        if (status == -1)
            return command_refuse(call, "%s", why);
        if (lifecycle_stop_count() > 0)
            return lifecycle_stop_code();
        if (status != 0)
            return command_refuse(call, "model '%s' (%s) cannot be used: %s", m->name, m->dir, process_last_line(report));
    }
    return COMMAND_DONE;
}

/* --- the rest --------------------------------------------------------------------------------------------------- */

static bool is_one_of(const char *text, const char *const *words)
{
    while (*words && strcmp(text, *words) != 0)
        words++;
    return *words;
}

static int take_device(struct up_plan *p, struct command_call *call, const struct options *o)
{
    static const char *const precisions[] = {"bf16", "f32", "fp8", "fp8-f32", NULL}, *const placements[] = {"auto", "resident", "phases", "streamed", NULL};
    static const char *const preferences[] = {"throughput", "latency", NULL};
    p->placement = o->placement ? o->placement : "auto";
    if (!is_one_of(p->placement, placements))
        return command_refuse(call, "--placement '%s': accepted are auto, resident, phases, streamed", p->placement);
    if (o->precision && !is_one_of(o->precision, precisions))
        return command_refuse(call, "--precision '%s': accepted are bf16, f32, fp8, fp8-f32", o->precision);
    const char *device = o->device ? o->device : "cpu"; /* cuda..: kiln-worker says what it takes */
    if ((strcmp(device, "cpu") != 0 && strncmp(device, "cuda", 4) != 0) || strlen(device) >= sizeof p->config.device)
        return command_refuse(call, "--device '%.80s': accepted are cpu, cuda, cuda:N, cuda:I,J", device);
    if (o->prefer && (!is_one_of(o->prefer, preferences) || strcmp(device, "cuda") != 0))
        return command_refuse(call, "--prefer '%s' with --device %s: accepted are throughput, latency, with --device cuda", o->prefer, device);
    p->prefer = o->prefer ? o->prefer : "throughput";
    snprintf(p->config.device, sizeof p->config.device, "%s", device);
    snprintf(p->config.precision, sizeof p->config.precision, "%s", o->precision ? o->precision : "bf16");
    return COMMAND_DONE;
}

static int core_count(void)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0)
        return CPU_COUNT(&set);
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (int)online : 1;
}

/* One line of what kiln-worker lists, {"device":"cuda:0",..}; with models it has "why". */
static bool take_listed(struct up_plan *p, const char *line)
{
    json_t *root = json_loads(line, 0, NULL);
    const char *device = json_string_value(json_object_get(root, "device")), *reason = json_string_value(json_object_get(root, "why"));
    bool ok = device && p->device_count < UP_PLAN_DEVICES_MAX && strlen(device) < sizeof p->devices[0];
    if (ok)
        snprintf(p->devices[p->device_count++], sizeof p->devices[0], "%s", device);
    if (ok && reason)
        snprintf(p->device_why, sizeof p->device_why, "%s", reason);
    json_decref(root);
    return ok;
}

/* Lines that do not begin with a brace are a library's talk on stderr. */
static int read_devices(struct up_plan *p, struct command_call *call, char *listing)
{
    char *rest = NULL;
    for (char *line = strtok_r(listing, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest))
        if (*line == '{' && !take_listed(p, line))
            return command_refuse(call, "--device %s: kiln-worker devices says '%.300s', which is not understood", p->config.device, line);
    return p->device_count ? COMMAND_DONE : command_refuse(call, "--device %s: kiln-worker devices lists none", p->config.device);
}

/* Who names no GPU leaves it to kiln-worker how the models are laid over them. */
static int ask_devices(const struct up_plan *p, char *listing, size_t listing_bytes, char *why, size_t why_bytes)
{
    const char *const words[] = {p->worker, "devices", "--json", p->config.device, "--prefer", p->prefer, "--placement", p->placement,
                                 "--precision", p->config.precision};
    struct up_child asked = {.is_whole = true};
    int status = -1;
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++)
        up_child_arg(&asked, "%s", words[i]);
    if (strcmp(p->config.device, "cuda") == 0)
        up_child_models(&asked, &p->config);
    if (asked.is_whole)
        status = process_run(asked.argv, NULL, NULL, listing, listing_bytes, why, why_bytes);
    else
        snprintf(why, why_bytes, "out of memory");
    up_child_done(&asked);
    return status;
}

static int look_at_devices(struct up_plan *p, struct command_call *call)
{
    char listing[UP_PLAN_DEVICES_MAX * 512], why[PATH_MAX + 256];
    int status = ask_devices(p, listing, sizeof listing, why, sizeof why);
    if (status == -1)
        return command_refuse(call, "%s", why);
    if (lifecycle_stop_count() > 0)
        return lifecycle_stop_code();
    if (status != 0)
        return command_refuse(call, "--device %s: %s", p->config.device, process_last_line(listing));
    int code = read_devices(p, call, listing);
    if (code == COMMAND_DONE && strchr(p->config.device, ',')) { /* each can be used; together they are one worker's */
        p->device_count = 1;
        snprintf(p->devices[0], sizeof p->devices[0], "%s", p->config.device);
    }
    return code;
}

int up_plan_devices(struct up_plan *p, struct command_call *call)
{
    int code = COMMAND_DONE;
    if (strcmp(p->config.device, "cpu") == 0)
        snprintf(p->devices[p->device_count++], sizeof p->devices[0], "cpu");
    else
        code = look_at_devices(p, call);
    if (code != COMMAND_DONE)
        return code;
    if (!p->config.workers)
        p->config.workers = p->device_count;
    int share = core_count() / p->config.workers;
    if (!p->config.threads)
        p->config.threads = share > 0 ? share : 1;
    return COMMAND_DONE;
}

static void take_sizes(struct up_plan *p, const struct options *o)
{
    p->config.workers = (int)o->workers;
    p->config.threads = (int)o->threads;
    p->config.batch = (int)o->batch;
    p->metrics_port = o->metrics_port;
    p->is_detached = o->is_detached;
}

static int take_endpoint(struct up_plan *p, struct command_call *call, const struct options *o)
{
    if (o->bind && (!*o->bind || strlen(o->bind) >= 1024))
        return command_refuse(call, "--bind: accepted is an endpoint, as tcp://127.0.0.1:5555 or ipc:///path");
    if (o->bind)
        snprintf(p->config.endpoint, sizeof p->config.endpoint, "%s", o->bind);
    else
        snprintf(p->config.endpoint, sizeof p->config.endpoint, "ipc://%s/run/kiln.sock", call->home.dir);
    p->log_level = o->log_level ? o->log_level : "info";
    if (!log_level_of(p->log_level, &p->log_least))
        return command_refuse(call, "--log-level '%s': accepted are debug, info, warn, error", p->log_level);
    return COMMAND_DONE;
}

static int take_database(struct up_plan *p, struct command_call *call)
{
    char private_uri[HOME_PATH_MAX], why[HOME_PATH_MAX + 256];
    home_private_uri(&call->home, private_uri, sizeof private_uri);
    const char *option = call->database && strcmp(call->database, "private") == 0 ? private_uri : call->database;
    if (!home_database(&call->home, option, p->config.database, sizeof p->config.database, why, sizeof why))
        return command_refuse(call, "%s", why);
    p->is_private = strcmp(p->config.database, private_uri) == 0;
    if (!p->is_private)
        up_plan_tag(p->names_tag, sizeof p->names_tag, &call->home, p->config.database);
    return COMMAND_DONE;
}

static void hash(uint32_t *h, const char *text)
{
    for (; text && *text; text++)
        *h = (*h ^ (unsigned char)*text) * 16777619u; /* FNV-1a: a name, not a secret */
    *h = (*h ^ 0xff) * 16777619u;
}

void up_plan_tag(char *ret, size_t bytes, const struct home *home, const char *database)
{
    char host[HOST_MAX + 1] = "";
    uint32_t h = 2166136261u;
    gethostname(host, sizeof host - 1);
    for (char *c = host; *c; c++)
        if (!strchr("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-", *c))
            *c = '-';
    hash(&h, home->dir);
    hash(&h, database);
    for (int i = 0; !*database && i < HOME_DATABASE_VARIABLES; i++)
        hash(&h, getenv(home_database_variables[i]));
    snprintf(ret, bytes, "%s-%08" PRIx32 "-", *host ? host : "host", h);
}

static int find_tools(struct up_plan *p, struct command_call *call)
{
    char why[PATH_MAX + 256];
    if (!home_tool("kiln-worker", p->worker, sizeof p->worker, why, sizeof why) ||
        !home_tool("kiln-coordinator", p->coordinator, sizeof p->coordinator, why, sizeof why))
        return command_refuse(call, "%s", why);
    return COMMAND_DONE;
}

/* What the last `kiln up` served stays in config when no option says otherwise. */
static int take_last(struct up_plan *p, struct command_call *call, const struct options *o)
{
    char why[HOME_PATH_MAX + 256];
    bool is_found = false;
    if (o->models.count > 0)
        return take_models(p, call, &o->models);
    if (!home_config_read(&call->home, &p->config, &is_found, why, sizeof why))
        return command_refuse(call, "%s", why);
    return is_found && p->config.model_count > 0 ? COMMAND_DONE : take_pocket(p, call);
}

int up_plan_read(struct up_plan *p, struct command_call *call)
{
    struct options o = {0};
    const struct command_option options[] = {
        {"model", COMMAND_LIST, &o.models, 0, 0},
        {"workers", COMMAND_NUMBER, &o.workers, 1, UP_PLAN_WORKERS_MAX},
        {"device", COMMAND_TEXT, &o.device, 0, 0},
        {"placement", COMMAND_TEXT, &o.placement, 0, 0},
        {"prefer", COMMAND_TEXT, &o.prefer, 0, 0},
        {"threads", COMMAND_NUMBER, &o.threads, 1, THREADS_MAX},
        {"batch", COMMAND_NUMBER, &o.batch, 1, BATCH_MAX},
        {"precision", COMMAND_TEXT, &o.precision, 0, 0},
        {"bind", COMMAND_TEXT, &o.bind, 0, 0},
        {"metrics-port", COMMAND_NUMBER, &o.metrics_port, 0, 65535},
        {"log-level", COMMAND_TEXT, &o.log_level, 0, 0},
        {"detach", COMMAND_FLAG, &o.is_detached, 0, 0},
    };
    int word_count;
    memset(p, 0, sizeof *p);
    if (!command_parse(call, options, sizeof options / sizeof *options, NULL, 0, 0, &word_count))
        return command_code(call);
    int code = take_last(p, call, &o);
    if (code == COMMAND_DONE)
        code = take_device(p, call, &o);
    if (code == COMMAND_DONE)
        code = take_endpoint(p, call, &o);
    if (code == COMMAND_DONE)
        code = take_database(p, call);
    if (code == COMMAND_DONE)
        code = find_tools(p, call);
    if (code == COMMAND_DONE)
        take_sizes(p, &o);
    return code;
}
