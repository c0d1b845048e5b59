/* worker.h - one process for one device: takes batches, renders, stages, reports, and forgets nothing.
 *
 *   I/O thread   everything that is said and heard; decides; never waits for the engine or a disk  (worker.c)
 *   painter      owns the engine                                                                   (painter.c)
 *   writer       owns the disk: files, spool records, publishing                                   (writer.c)
 *
 * A task's way: ASSIGN, rendered, encoded, staged + spool record, RESULT until ACK, published, forgotten. Wherever
 * the process dies on it, either the lease runs out and the task is made again, or the spool says RESULT again. */
#ifndef KILN_WORKER_H
#define KILN_WORKER_H

#include "model_set.h"

#define WORKER_NAME_MAX 100

struct worker_options {
    const char *endpoint, *name;
    const char *spool_dir;             /* this worker's own: SPOOL/NAME */
    const struct model_source *models;
    int model_count;
    enum engine_precision precision;
    int threads;                       /* 0: all */
    const char *device;                /* see engine.h; NULL: the CPU */
    enum engine_placement placement;
    enum engine_split split;
    int batch_max;                     /* images rendered at once, 1 .. ENGINE_BATCH_MAX */
    int credit;                        /* un-acknowledged images at most; 0: twice batch_max */
    int metrics_port;                  /* -1: none; 0: any */
};

/* worker_run works until it is told to stop. Returns the exit code: 0 drained, 2 refused input or a model that
 * cannot be used, 75 the device was lost. A second signal ends the process from inside. */
int worker_run(const struct worker_options *options);

#endif
