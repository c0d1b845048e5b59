/* engine_team.h - an engine on one device, or on several that share one model: the same calls either way.
 *
 * A device is a text: "cpu", "cuda", "cuda:1", "dry:rtx4090"; a list of devices of one kind is a team, with a rank on each:
 *
 *   cuda:0,1                  two GPUs
 *   cpu:0,1                   the cores of memory nodes 0 and 1; a node named twice is shared ("cpu:0" is that node alone)
 *   dry:rtx4090,rtx4090       counted, not run: the first rank alone
 *
 * The first rank works on the caller's thread and calls engine_watch there, each other one has a thread of its own. A failure of
 * one rank is one error; a rank that is silent for longer than KERN_TEAM_PATIENCE_MS is a failed device, whether it opens, checks,
 * changes adapters or renders: the team ends within 10 s of its last sign of life, or of the others' waiting for one. A device that
 * computes gives signs of life for as long as it may take (kernels/cuda_progress.c). */
#ifndef KILN_ENGINE_TEAM_H
#define KILN_ENGINE_TEAM_H

#include "engine.h"

struct engine_team;

/* engine_team_open: options->member is the team's to fill; options->threads are those of all ranks together. */
bool engine_team_open(struct engine_team **ret, const struct engine_options *options, struct engine_error *why);
void engine_team_close(struct engine_team *t); /* accepts NULL. A rank that never came back is left as it is */

/* As engine_adapt, engine_request_defaults, _check, _generate. */
bool engine_team_adapt(struct engine_team *t, const struct engine_adapter *adapters, int count, struct engine_error *why);
void engine_team_defaults(const struct engine_team *t, struct engine_request *r);
bool engine_team_check(struct engine_team *t, const struct engine_request *r, struct engine_error *why);
bool engine_team_generate(struct engine_team *t, const struct engine_request *requests, int count, struct engine_image *images,
                          const struct engine_watch *watch, struct engine_error *why);

/* engine_team_info: of the first rank, with the device of all; valid until the next call. */
const struct engine_info *engine_team_info(struct engine_team *t);

#endif
