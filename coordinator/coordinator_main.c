/* coordinator_main.c - `kiln-coordinator`: options, log, signals, then the loop. */
#include <inttypes.h>
#include <stdio.h>

#include "coordinator_options.h"
#include "lifecycle.h"

static int refuse(const char *why)
{
    fprintf(stderr, "kiln-coordinator: %s\n", why);
    return LIFECYCLE_REFUSED;
}

static int coordinate(struct coordinator_options_read *o)
{
    char why[1200];
    if (!log_open("coordinator", o->daemon.log_path, o->daemon.log_level, why, sizeof why))
        return refuse(why);
    if (!lifecycle_signals())
        return refuse("cannot install signal handlers");
    uint64_t files = lifecycle_files();
    log_event(LOG_INFO, "started", "version=%s name=%s open_files=%" PRIu64, KILN_VERSION, log_quote(o->name), files);
    int code = coordinator_run(&o->coordinator, why, sizeof why);
    if (code == LIFECYCLE_REFUSED)
        refuse(why);
    log_event(LOG_INFO, "ended", "exit=%d", code);
    log_close();
    return code;
}

int main(int argc, char **argv)
{
    struct coordinator_options_read options;
    char why[1200];
    if (!coordinator_options_read(&options, argc, argv, why, sizeof why))
        return refuse(why);
    if (options.daemon.wants_help) {
        fputs(coordinator_options_help(), stdout);
        return 0;
    }
    if (options.daemon.wants_version) {
        printf("kiln-coordinator %s (protocol %d)\n", KILN_VERSION, MSG_VERSION);
        return 0;
    }
    return coordinate(&options);
}
