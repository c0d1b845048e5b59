/* engine_plan.h - does it fit? Where weights are kept, and how much device memory a batch takes, before either is touched.
 * Inside engine/ only. Backends that work in the host's memory have no plan.
 *
 *   placement    on the device all the time                 in host memory, coming layer by layer (layer_stream.h)
 *   resident     all
 *   phases       transformer, VAE                           text encoder, while prompts are encoded
 *   streamed     VAE, what the transformer has once,        text encoder; blocks of the transformer, at each pass of each step
 *                those of its blocks that fit
 *
 * Passes of guidance are run in turn (engine_passes) before anything else is given up, but for streamed: there each pass would bring
 * the blocks, so that blocks are given up first.
 *
 * Seats of the layers are arena memory, so those of the text encoder are where the transformer's activations are later. */
#ifndef KILN_ENGINE_PLAN_H
#define KILN_ENGINE_PLAN_H

#include "engine_model.h"
#include "model_parts.h"

struct engine_plan;
struct engine_plan_need {
    enum engine_placement placement;
    int waiting;           /* blocks of the transformer, in host memory */
    enum engine_passes passes; /* of guidance, as the rehearsed batch ran them */
    size_t weights, arena; /* bytes of the device */
};

/* engine_plan_open checks all names and shapes of the parts on its way. m: configuration and dtype are there, and
 * its tokenizer where batches of prompts are planned. */
bool engine_plan_open(struct engine_plan **ret, const struct engine_model *m, const struct model_parts *parts, const struct adapters *a,
                      struct engine_error *why);
void engine_plan_close(struct engine_plan *p); /* accepts NULL */

/* engine_plan_choose: the placement asked for, or with AUTO the first of the table that fits what is available on the
 * device with the batch the options expect. False: none fits, and why has the figures. */
bool engine_plan_choose(struct engine_plan *p, struct kern *k, const struct engine_options *o, struct engine_plan_need *ret,
                        struct engine_error *why);

/* engine_plan_fits: has a rank whose memory is `all` room for what it is planned for, resident or in phases, with one picture of
 * 1024x1024? *ret_bytes is what that takes. Neither the batch that is expected nor what else is in memory changes the answer. */
bool engine_plan_fits(struct engine_plan *p, bool is_resident, size_t all, bool *ret, size_t *ret_bytes, struct engine_error *why);

/* engine_plan_least is one half of engine_needs. */
bool engine_plan_least(struct engine_plan *p, bool has_reference, size_t ret[ENGINE_STREAMED + 1], struct engine_error *why);

/* engine_plan_adapt counts these adapters from now on, and makes the room that they and the batch that was expected need on the
 * device of a loaded model that has none, as engine_plan_reserve does; or refuses them with the figures. */
bool engine_plan_adapt(struct engine_plan *p, struct engine_model *m, const struct adapters *a, struct engine_error *why);

/* engine_plan_encoder makes room for the encoder of the VAE beside the batch that was expected, where that can be done. */
bool engine_plan_encoder(struct engine_plan *p, struct engine_model *m, struct engine_error *why);

/* engine_plan_reserve makes the arena of a loaded model as large as this batch needs, if need be by moving the text encoder
 * and then blocks of a model whose placement was left open; or refuses the batch with the figures. It tells the model how the
 * batch is to run its passes. */
bool engine_plan_reserve(struct engine_plan *p, struct engine_model *m, const struct engine_request *requests, int count,
                         struct engine_error *why);

#endif
