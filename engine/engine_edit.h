/* engine_edit.h - what a batch takes from its reference images: which are the same, how many tokens they make, and the
 * tokens themselves or, with a klein-9b-kv, the keys and values that the steps find instead. Inside engine/ only.
 *
 * Pictures of a batch may have different references of the same layout. References that several pictures share (many seeds
 * of one edit) are encoded once: they depend on nothing else.
 *
 * Inpainting: the first reference is what is repainted. Its latents, noised to the sigma of the step, stand where the mask is
 * black, before the first step and after each. */
#ifndef KILN_ENGINE_EDIT_H
#define KILN_ENGINE_EDIT_H

#include "engine_model.h"
#include "reference.h"
#include "scheduler.h"

struct engine_edit {
    int list_count;                 /* distinct lists of references; 0: the batch has none */
    int list_of[ENGINE_BATCH_MAX];  /* by picture */
    int first_of[ENGINE_BATCH_MAX]; /* by list: the first picture that has it */
    int count;                      /* references of a list */
    struct transformer_grid grids[ENGINE_REFERENCES_MAX];
    int64_t rows;                   /* R: tokens of a list */
    struct tensor tokens[ENGINE_BATCH_MAX];       /* by list: [R, 128] */
    struct transformer_kv kv[ENGINE_BATCH_MAX];   /* by list, of a KV model */
    bool has_mask;
    struct tensor noise;            /* with masks: [batch, N, 128] as drawn */
    struct tensor mask, sigma;      /* [batch, N]: 1 where it is repainted; [steps + 1, N]: a row holds one value */
};

/* engine_edit_check: could these references be rendered? */
bool engine_edit_check(const struct engine_request *r, struct engine_error *why);
bool engine_edit_check_mask(const struct engine_request *r, struct engine_error *why);
/* engine_edit_same: do two accepted requests fit one batch? Equal numbers of references, each cut to equal sizes; both with
 * a mask and of one strength, or both without. */
bool engine_edit_same(const struct engine_request *a, const struct engine_request *b);
/* engine_edit_first_step: where a schedule of `steps` begins; 0 without a mask. */
int engine_edit_first_step(const struct engine_request *r);
/* engine_edit_plan finds the lists and their layout; nothing is computed. */
void engine_edit_plan(struct engine_edit *e, const struct engine_request *requests, int count);

/* engine_edit_encode fills tokens, from pixels to normalised latents. shown (or NULL) sees each latent [1, h/8, w/8, 32]
 * of the first list. */
bool engine_edit_encode(struct engine_edit *e, struct engine_model *m, const struct engine_request *requests,
                        void (*shown)(void *context, int reference, struct tensor latent), void *context,
                        struct engine_error *why);
/* engine_edit_keep fills kv: a run of the transformer over the references alone, at the time of `times`, one row.
 * cos, sin: the R rows of the references. */
void engine_edit_keep(struct engine_edit *e, struct engine_model *m, struct tensor cos, struct tensor sin,
                      struct transformer_times times);

/* engine_edit_mask reads the masks, keeps the noise that `latents` [batch, N, 128] are, and noises the first reference to
 * sigma[first_step] into them. After engine_edit_encode. */
bool engine_edit_mask(struct engine_edit *e, struct engine_model *m, const struct engine_request *requests, struct tensor latents,
                      const struct schedule *schedule, int first_step, struct engine_error *why);
/* engine_edit_blend puts back what the mask does not repaint into latents [count, N, 128] of pictures first .., at the sigma
 * that follows the step. */
void engine_edit_blend(struct engine_edit *e, struct engine_model *m, struct tensor latents, int first, int step);

#endif
