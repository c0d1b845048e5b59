/* coordinator_options.c - long options only, each checked where it is read. */
#include "coordinator_options.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "clock.h"

#define DAY_MS (24 * 3600 * 1000)

static const char help[] =
    "usage: kiln-coordinator --bind ENDPOINT [options]\n"
    "\n"
    "Takes tasks from PostgreSQL, hands them to workers in batches, commits what they report.\n"
    "\n"
    "  --bind ENDPOINT      tcp://127.0.0.1:PORT, tcp://[::1]:PORT (PORT *: any free one) or ipc:///PATH\n"
    "  --database URI       default: libpq's environment (PGHOST, PGSERVICE, ...)\n"
    "  --migrate            bring the database to this program's schema first; waits while it is away\n"
    "  --name NAME          who holds duties in the database; default: host/pid/boot epoch\n"
    "  --lease-ms N         a task whose worker and coordinator died is ready again after N; default 15000\n"
    "  --heartbeat-ms N     default 1000\n"
    "  --silent-ms N        a worker not heard for so long loses its tasks; at least twice the heartbeat; default 5000\n"
    "  --stuck-ms N         a worker that makes no step for so long is logged; default 600000\n"
    "  --staged-ms N        how often staged files are looked at, and how old they must be; default 30000\n"
    "  --state-file FILE    while it runs: pid, endpoint, metrics port and state of the database, as JSON\n"
    DAEMON_OPTIONS_USAGE
    "\n"
    "SIGTERM or SIGINT: claims nothing more, settles what has arrived, exits 0; workers go on and settle with the next\n"
    "coordinator. A second one: leaves at once.\n"
    "Exit codes: 0 drained, 2 usage, bind or database refused, 128+n by signal.\n";

enum option_word {
    OPTION_BIND = DAEMON_OPTIONS_OWN,
    OPTION_DATABASE,
    OPTION_MIGRATE,
    OPTION_NAME,
    OPTION_LEASE_MS,
    OPTION_HEARTBEAT_MS,
    OPTION_SILENT_MS,
    OPTION_STUCK_MS,
    OPTION_STAGED_MS,
    OPTION_STATE_FILE,
};

static const struct option words[] = {
    {"bind", required_argument, NULL, OPTION_BIND},
    {"database", required_argument, NULL, OPTION_DATABASE},
    {"migrate", no_argument, NULL, OPTION_MIGRATE},
    {"name", required_argument, NULL, OPTION_NAME},
    {"lease-ms", required_argument, NULL, OPTION_LEASE_MS},
    {"heartbeat-ms", required_argument, NULL, OPTION_HEARTBEAT_MS},
    {"silent-ms", required_argument, NULL, OPTION_SILENT_MS},
    {"stuck-ms", required_argument, NULL, OPTION_STUCK_MS},
    {"staged-ms", required_argument, NULL, OPTION_STAGED_MS},
    {"state-file", required_argument, NULL, OPTION_STATE_FILE},
    DAEMON_OPTIONS_WORDS,
};

const char *coordinator_options_help(void)
{
    return help;
}

static bool read_name(struct coordinator_options_read *o, const char *text, char *why, size_t why_bytes)
{
    static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._/-";
    snprintf(o->name, sizeof o->name, "%s", text);
    if (*text && strlen(text) < sizeof o->name && strspn(text, letters) == strlen(text))
        return true;
    snprintf(why, why_bytes, "--name '%s': want 1 to %zu letters, digits, '.', '_', '/' or '-'", text, sizeof o->name - 1);
    return false;
}

static bool read_word(void *context, int word, const char *text, char *why, size_t why_bytes)
{
    struct coordinator_options_read *o = context;
    struct coordinator_options *c = &o->coordinator;
    struct janitor_options *pace = &c->pace;
    switch (word) {
    case OPTION_BIND: c->endpoint = text; return true;
    case OPTION_DATABASE: c->database = text; return true;
    case OPTION_MIGRATE: c->must_migrate = true; return true;
    case OPTION_NAME: return read_name(o, text, why, why_bytes);
    case OPTION_LEASE_MS: return daemon_options_number("--lease-ms", text, 500, DAY_MS, &pace->lease_ms, why, why_bytes);
    case OPTION_HEARTBEAT_MS: return daemon_options_number("--heartbeat-ms", text, 50, 60000, &pace->heartbeat_ms, why, why_bytes);
    case OPTION_SILENT_MS: return daemon_options_number("--silent-ms", text, 100, DAY_MS, &pace->silent_ms, why, why_bytes);
    case OPTION_STUCK_MS: return daemon_options_number("--stuck-ms", text, 100, DAY_MS, &pace->stuck_ms, why, why_bytes);
    case OPTION_STAGED_MS: return daemon_options_number("--staged-ms", text, 100, DAY_MS, &pace->staged_ms, why, why_bytes);
    case OPTION_STATE_FILE: c->state_file = text; return true;
    default: return false;
    }
}

static void default_name(struct coordinator_options_read *o)
{
    char host[65] = "";
    if (gethostname(host, sizeof host - 1) != 0 || !*host)
        snprintf(host, sizeof host, "unknown");
    snprintf(o->name, sizeof o->name, "%s/%ld/%" PRIu64, host, (long)getpid(), clock_boot_epoch());
}

static bool complete(struct coordinator_options_read *o, char *why, size_t why_bytes)
{
    const struct janitor_options *pace = &o->coordinator.pace;
    if (!o->coordinator.endpoint) {
        snprintf(why, why_bytes, "--bind ENDPOINT is missing; see --help");
        return false;
    }
    if (pace->silent_ms < 2 * pace->heartbeat_ms) {
        snprintf(why, why_bytes, "--silent-ms %d: at least twice --heartbeat-ms, which is %d", pace->silent_ms, pace->heartbeat_ms);
        return false;
    }
    if (!*o->name)
        default_name(o);
    o->coordinator.name = o->name;
    return true;
}

bool coordinator_options_read(struct coordinator_options_read *ret, int argc, char **argv, char *why, size_t why_bytes)
{
    memset(ret, 0, sizeof *ret);
    ret->coordinator.pace = (struct janitor_options){.lease_ms = 15000, .heartbeat_ms = 1000, .silent_ms = 5000,
                                                     .stuck_ms = 600000, .staged_ms = 30000};
    if (!daemon_options_read(&ret->daemon, words, read_word, ret, argc, argv, why, why_bytes))
        return false;
    ret->coordinator.metrics_port = ret->daemon.metrics_port;
    return ret->daemon.wants_help || ret->daemon.wants_version || complete(ret, why, why_bytes);
}
