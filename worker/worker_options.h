/* worker_options.h - the command line of `kiln-worker`, read and checked; nothing is opened yet. */
#ifndef KILN_WORKER_OPTIONS_H
#define KILN_WORKER_OPTIONS_H

#include "daemon_options.h"
#include "worker.h"

struct worker_options_read {
    struct worker_options worker;
    struct model_source models[MSG_MODELS_MAX];
    char spool_dir[4096];
    char *model_words[MSG_MODELS_MAX]; /* owned: NAME=DIR, cut in two */
    char *model_dirs[MSG_MODELS_MAX];  /* owned: absolute */
    char name[WORKER_NAME_MAX + 1];
    struct daemon_options daemon;
};

/* worker_options_read fills ret; false: why is the sentence to print. argv is borrowed. */
bool worker_options_read(struct worker_options_read *ret, int argc, char **argv, char *why, size_t why_bytes);
void worker_options_done(struct worker_options_read *o);
const char *worker_options_help(void);

#endif
