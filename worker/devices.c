/* devices.c - `kiln-worker devices`: a line for each GPU, which is opened as a render opens it: one that is listed can be used. Those
 * of a team are opened one after the other. */
#include "devices.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "daemon_options.h"
#include "device_list.h"
#include "kern_module.h"
#include "lifecycle.h"

static const char usage_text[] =
    "usage: kiln-worker devices [cuda|cuda:N|cuda:I,J..] [--json]\n"
    "\n"
    "Opens every CUDA device (or those that are named), as a render does, and says what it is.\n"
    "CUDA_VISIBLE_DEVICES in the environment says which there are.\n"
    "\n"
    "  --json   a line a device: {\"device\",\"name\",\"memory_bytes\",\"available_bytes\"}\n"
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

static bool look(const char *device, bool is_json, char *why, size_t why_bytes)
{
    struct kern_space space = {0};
    struct kern *k = kern_module_open(device, NULL, why, why_bytes);
    if (!k)
        return false;
    bool ok = kern_memory(k, &space);
    if (ok)
        print(device, kern_name(k), &space, is_json);
    else
        snprintf(why, why_bytes, "%s does not say how much memory it has: %s", device, kern_error(k));
    kern_close(k);
    return ok;
}

static int look_at_all(bool is_json)
{
    char device[16], why[600];
    int count = kern_module_count(why, sizeof why);
    for (int i = 0; i < count; i++) {
        snprintf(device, sizeof device, "cuda:%d", i);
        if (!look(device, is_json, why, sizeof why))
            return refuse(why);
    }
    return count ? LIFECYCLE_DONE : refuse(why);
}

static int look_at_named(const char *text, bool is_json)
{
    struct device_list list;
    char why[600];
    if (strncmp(text, "cuda", 4) != 0) {
        snprintf(why, sizeof why, "device '%.500s', accepted: cuda, cuda:N, cuda:I,J..", text);
        return refuse(why);
    }
    if (!device_list_read(&list, text, why, sizeof why))
        return refuse(why);
    for (int i = 0; i < list.count; i++)
        if (!look(list.ranks[i].device, is_json, why, sizeof why))
            return refuse(why);
    return LIFECYCLE_DONE;
}

int devices_main(int argc, char **argv)
{
    enum { JSON = DAEMON_OPTIONS_OWN };
    static const struct option options[] = {{"json", no_argument, NULL, JSON}, {"help", no_argument, NULL, DAEMON_OPTIONS_HELP},
                                            {"version", no_argument, NULL, DAEMON_OPTIONS_VERSION}, {0}};
    char reason[600];
    bool is_json = false;
    for (int word; (word = daemon_options_next(argc, argv, "h", options, reason, sizeof reason)) != -1;) {
        switch (word) {
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
    if (argc - optind > 1)
        return refuse("more than one argument, accepted: cuda, cuda:N, cuda:I,J..; see --help");
    const char *device = optind < argc ? argv[optind] : "cuda";
    return strcmp(device, "cuda") == 0 ? look_at_all(is_json) : look_at_named(device, is_json);
}
