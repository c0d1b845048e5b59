/* engine_edit.h - what a batch takes from its reference images: which are the same, how many tokens they make, and the
 * tokens themselves or, with a klein-9b-kv, the keys and values that the steps find instead. Inside engine/ only.
 *
 * Pictures of a batch may have different references of the same layout. References that several pictures share (many seeds
 * of one edit) are encoded once: they depend on nothing else. */
#ifndef KILN_ENGINE_EDIT_H
#define KILN_ENGINE_EDIT_H

#include "engine_model.h"
#include "reference.h"

struct engine_edit {
    int list_count;                 /* distinct lists of references; 0: the batch has none */
    int list_of[ENGINE_BATCH_MAX];  /* by picture */
    int first_of[ENGINE_BATCH_MAX]; /* by list: the first picture that has it */
    int count;                      /* references of a list */
    struct transformer_grid grids[ENGINE_REFERENCES_MAX];
    int64_t rows;                   /* R: tokens of a list */
    struct tensor tokens[ENGINE_BATCH_MAX];       /* by list: [R, 128] */
    struct transformer_kv kv[ENGINE_BATCH_MAX];   /* by list, of a KV model */
};

/* engine_edit_check: could these references be rendered? */
bool engine_edit_check(const struct engine_request *r, struct engine_error *why);
/* engine_edit_same: do two accepted requests fit one batch? Equal numbers of references, each cut to equal sizes. */
bool engine_edit_same(const struct engine_request *a, const struct engine_request *b);
/* engine_edit_plan finds the lists and their layout; nothing is computed. */
void engine_edit_plan(struct engine_edit *e, const struct engine_request *requests, int count);

/* engine_edit_encode fills tokens, from pixels to normalised latents. shown (or NULL) sees each latent [1, h/8, w/8, 32]
 * of the first list. */
bool engine_edit_encode(struct engine_edit *e, struct engine_model *m, const struct engine_request *requests,
                        void (*shown)(void *context, int reference, struct tensor latent), void *context,
                        struct engine_error *why);
/* engine_edit_keep fills kv: a run of the transformer over the references alone, at the time of row `step` of `times`.
 * cos, sin: the R rows of the references. */
void engine_edit_keep(struct engine_edit *e, struct engine_model *m, struct tensor cos, struct tensor sin,
                      const struct transformer_times *times, int step);

#endif
