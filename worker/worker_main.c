/* worker_main.c - `kiln-worker`: a sub-command, or a worker of the farm. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "devices.h"
#include "fault_switch.h"
#include "inspect.h"
#include "lifecycle.h"
#include "log.h"
#include "msg.h"
#include "render.h"
#include "tokenize.h"
#include "worker_options.h"

static const struct { const char *name; int (*main)(int argc, char **argv); } commands[] = {
    {"render", render_main},
    {"tokenize", tokenize_main},
    {"inspect", inspect_main},
    {"devices", devices_main},
};

static int refuse(const char *why)
{
    fprintf(stderr, "kiln-worker: %s\n", why);
    return LIFECYCLE_REFUSED;
}

/* Weights are mapped files. One that is cut under way, or whose disk fails, answers with SIGBUS at any place; nothing that
 * was rendered is kept, and the next start looks at the files as they are then. */
static void on_lost_page(int number)
{
    static const char text[] = "kiln-worker: a file of a model could not be read while it was in use: it was cut or written over, or its disk "
                               "failed; make it whole again\n";
    (void)number;
    ssize_t ignored = write(STDERR_FILENO, text, sizeof text - 1);
    (void)ignored;
    _exit(LIFECYCLE_TEMPORARY);
}

static int work(struct worker_options_read *o)
{
    char why[512];
    if (!fault_switch_read(getenv("KILN_FAULT"), why, sizeof why) ||
        !log_open("worker", o->daemon.log_path, o->daemon.log_level, why, sizeof why))
        return refuse(why);
    if (!lifecycle_signals())
        return refuse("cannot install signal handlers");
    lifecycle_files();
    log_event(LOG_INFO, "started", "version=%s name=%s endpoint=%s batch=%d", KILN_VERSION, o->name, o->worker.endpoint,
              o->worker.batch_max);
    int code = worker_run(&o->worker);
    log_event(LOG_INFO, "ended", "exit=%d", code);
    log_close();
    return code;
}

int main(int argc, char **argv)
{
    static struct worker_options_read options; /* a thread that nobody waited for may read it while the process ends */
    char why[1024];
    signal(SIGBUS, on_lost_page);
    for (size_t i = 0; argc > 1 && i < sizeof commands / sizeof *commands; i++)
        if (strcmp(argv[1], commands[i].name) == 0)
            return commands[i].main(argc - 1, argv + 1);
    int code = 0;
    if (!worker_options_read(&options, argc, argv, why, sizeof why))
        code = refuse(why);
    else if (options.daemon.wants_help)
        fputs(worker_options_help(), stdout);
    else if (options.daemon.wants_version)
        printf("kiln-worker %s (protocol %d)\n", KILN_VERSION, MSG_VERSION);
    else
        code = work(&options);
    worker_options_done(&options);
    if (code == LIFECYCLE_TEMPORARY) /* all is said and settled; the driver, which ends with the process, would wait for a device that hangs */
        _exit(code);
    return code;
}
