/* engine_batch.h - the state of one batch on its way from prompts to pixels, and the steps in their order.
 * Inside engine/ only. All tensors are arena memory of the model's backend: the caller rewinds when done.
 *
 *   begin -> prompts -> noise -> references -> step 0 .. n-1 -> decode
 *
 * A batch is worked off in groups that bound memory; a group's size changes no bit of any image.
 *
 * Every step of every batch of a shape does the same to the same memory (kern_graph): what is taken of the arena before the
 * steps depends on the shape and the number of pictures alone, each picture has a context of its own even where prompts are equal,
 * and what depends on the time is copied to `now`. */
#ifndef KILN_ENGINE_BATCH_H
#define KILN_ENGINE_BATCH_H

#include "engine_edit.h"
#include "engine_model.h"
#include "scheduler.h"

#define ENGINE_BATCH_PASSES_MAX 2 /* guidance runs the model with the prompt and with the negative prompt */
#define ENGINE_BATCH_PROMPTS_MAX (ENGINE_BATCH_MAX * ENGINE_BATCH_PASSES_MAX)

struct engine_batch {
    struct engine_model *model;
    const struct engine_watch *watch;       /* or NULL */
    const struct engine_request *requests;  /* [count], of one shape */
    int count, passes;                      /* passes: 1, or 2 with guidance */
    int passes_at_once;                     /* in one call of the transformer: all, or 1 */
    int grid_h, grid_w;                     /* latent tokens */
    int64_t tokens;                         /* N = grid_h * grid_w */
    struct engine_edit edit;                /* the references */
    int first_step;                         /* 0, or with masks a later one: where the schedule begins */
    bool has_kv;                            /* a KV model with references */
    int first_pass, own_passes;             /* which of them this rank computes: all, or one where a team splits passes */
    struct schedule schedule;
    struct engine_timing timing;

    int prompt_count;                       /* distinct prompts */
    int prompt_of[ENGINE_BATCH_PASSES_MAX][ENGINE_BATCH_MAX];
    int32_t ids[ENGINE_BATCH_PROMPTS_MAX][ENGINE_TOKENS_MAX];
    int32_t token_count[ENGINE_BATCH_PROMPTS_MAX];
    bool is_truncated[ENGINE_BATCH_MAX];    /* per image */

    struct tensor contexts;                 /* [passes * count, 512, hidden] */
    struct tensor latents;                  /* [count, N, 128] */
    int drawn;                              /* latents that have their noise: before the first step those of its first group */
    struct tensor minus_zero;               /* [128]; where a team splits passes */
    struct tensor cos, sin;                 /* [512 + N + R, head_dim / 2] f32, in the order of keys */
    struct transformer_times times;         /* with has_kv a row more: time 0, that of the references */
    struct transformer_times now;           /* of the step under way */
};

bool engine_batch_begin(struct engine_batch *b, struct engine_model *m, const struct engine_request *requests, int count,
                        const struct engine_watch *watch, struct engine_error *why);
bool engine_batch_prompts(struct engine_batch *b, struct engine_error *why);
bool engine_batch_noise(struct engine_batch *b, struct engine_error *why);
bool engine_batch_references(struct engine_batch *b, struct engine_error *why);
bool engine_batch_step(struct engine_batch *b, int step, struct engine_error *why);
/* engine_batch_decode fills rgb[i], each height * width * 3 bytes of the caller; of a team, on the first rank only. */
bool engine_batch_decode(struct engine_batch *b, uint8_t *const *rgb, struct engine_error *why);

#endif
