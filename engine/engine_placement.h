/* engine_placement.h - where weights are kept on a device with its own memory (engine_plan.h says what each placement means), and
 * what each rank of a team holds of them. */
#ifndef KILN_ENGINE_PLACEMENT_H
#define KILN_ENGINE_PLACEMENT_H

#include <stdbool.h>

enum engine_placement {
    ENGINE_PLACEMENT_AUTO, /* the first of the others that fits */
    ENGINE_RESIDENT,
    ENGINE_PHASES,
    ENGINE_STREAMED,
};
const char *engine_placement_name(enum engine_placement placement); /* "auto", "resident", "phases", "streamed" */
bool engine_placement_of(const char *name, enum engine_placement *ret);

/* weights: each rank has its share of them, and sums make hidden states whole. passes: each of two ranks has all and computes one of the
 * two passes of guidance; the velocities are exchanged once a step. */
enum engine_split {
    ENGINE_SPLIT_AUTO, /* passes, where the model has guidance and each of two ranks can hold it; else weights */
    ENGINE_SPLIT_WEIGHTS,
    ENGINE_SPLIT_PASSES,
};
#define ENGINE_SPLIT_WORDS "auto, weights, passes"
bool engine_placement_split_of(const char *name, enum engine_split *ret);

/* engine_placement_figures: "placement=phases waiting_blocks=0 model_bytes=.. arena_bytes=.. other_bytes=.. device_bytes=..", for a log. */
#define ENGINE_PLACEMENT_FIGURES_MAX 192
struct engine_info;
void engine_placement_figures(const struct engine_info *info, char ret[ENGINE_PLACEMENT_FIGURES_MAX]);

#endif
