/* coordinator_options.h - the command line of `kiln-coordinator`, read and checked; nothing is opened yet. */
#ifndef KILN_COORDINATOR_OPTIONS_H
#define KILN_COORDINATOR_OPTIONS_H

#include "coordinator.h"
#include "daemon_options.h"

struct coordinator_options_read {
    struct coordinator_options coordinator;
    char name[TASK_STORE_NAME_MAX + 1];
    struct daemon_options daemon;
};

/* coordinator_options_read fills ret; false: why is the sentence to print. argv is borrowed. */
bool coordinator_options_read(struct coordinator_options_read *ret, int argc, char **argv, char *why, size_t why_bytes);
const char *coordinator_options_help(void);

#endif
