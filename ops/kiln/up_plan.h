/* up_plan.h - what `kiln up` was asked for, checked before anything is started.
 *
 * Models and the database are remembered: without --model it is those of the last `kiln up` on this home, without any the
 * bundled pocket model. Everything else is what the options say. */
#ifndef KILN_UP_PLAN_H
#define KILN_UP_PLAN_H

#include <stdbool.h>

#include "command.h"
#include "home.h"
#include "log.h"

#define UP_PLAN_WORKERS_MAX 256
#define UP_PLAN_NAME_MAX 100 /* of a model */
#define UP_PLAN_DEVICES_MAX 64

struct up_plan { /* large: keep it off the stack */
    struct home_config config; /* device: as asked for; endpoint, database, device, precision, workers, threads, batch, models */
    char devices[UP_PLAN_DEVICES_MAX][64]; /* worker i renders on devices[i % device_count]; a team is one */
    int device_count;
    char device_why[600];      /* --device cuda: so many renderers or teams, because ..; else empty */
    const char *placement, *prefer;
    bool is_private;           /* config.database is this home's own PostgreSQL */
    bool is_detached;
    int64_t metrics_port;      /* 0: any that is free */
    const char *log_level;
    enum log_level log_least;
    char worker[HOME_PATH_MAX], coordinator[HOME_PATH_MAX]; /* programs */
    char names_tag[160];       /* in front of the names of this home's programs; "" for a private database */
};

extern const char up_plan_usage[];

/* up_plan_read parses the command line; COMMAND_DONE, or the exit code (a sentence was printed; 0 after --help, with
 * call->is_help). */
int up_plan_read(struct up_plan *ret, struct command_call *call);

/* up_plan_devices finds the devices, by the program that will render on them, which also says whether the models need two GPUs a
 * worker; and decides what was not said: how many workers, how many threads each. Returns as up_plan_read. */
int up_plan_devices(struct up_plan *plan, struct command_call *call);

/* up_plan_models opens every model once, by the program that will load it: a wrong folder is refused here. */
int up_plan_models(const struct up_plan *plan, struct command_call *call);

/* up_plan_model reads NAME=DIR; the folder must exist. */
bool up_plan_model(struct home_model *ret, const char *text, char *why, size_t why_bytes);

/* up_plan_tag: "HOST-0a1b2c3d-", the same after a restart, another for another home or another database. Workers of many machines
 * may share a database, where names must differ; and results that wait in a spool belong to the database they came from. */
void up_plan_tag(char *ret, size_t bytes, const struct home *home, const char *database);

#endif
