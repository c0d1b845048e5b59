/* engine_placement.h - where weights are kept on a device with its own memory (engine_plan.h says what each placement means), what
 * each rank of a team holds of them, and how the two passes of guidance are run. */
#ifndef KILN_ENGINE_PLACEMENT_H
#define KILN_ENGINE_PLACEMENT_H

#include <stdbool.h>

enum engine_placement {
    ENGINE_PLACEMENT_AUTO, /* the first of the others that fits */
    ENGINE_RESIDENT,
    ENGINE_PHASES,
    ENGINE_STREAMED,
};
#define ENGINE_PLACEMENT_WORDS "auto, resident, phases, streamed"
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

/* A step of a base model sees the latents with the prompt and with the negative one. Both passes have the same rows, references
 * too, so that one call of the transformer can do both; no bit depends on it. engine_batch.c decides. */
enum engine_passes {
    ENGINE_PASSES_OPEN,     /* not decided */
    ENGINE_PASSES_ONE,      /* there is one: a distilled model, or no guidance */
    ENGINE_PASSES_TOGETHER,
    ENGINE_PASSES_IN_TURN,  /* two calls, in half the memory */
    ENGINE_PASSES_SPLIT,    /* one on each of two ranks */
};
const char *engine_placement_passes(enum engine_passes passes); /* "open", "one", "together", "in_turn", "split" */

/* engine_placement_figures: "placement=phases waiting_blocks=0 passes=one model_bytes=.. arena_bytes=.. other_bytes=.. device_bytes=..", for
 * a log. */
#define ENGINE_PLACEMENT_FIGURES_MAX 224
struct engine_info;
void engine_placement_figures(const struct engine_info *info, char ret[ENGINE_PLACEMENT_FIGURES_MAX]);

#endif
