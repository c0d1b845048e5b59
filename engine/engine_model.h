/* engine_model.h - everything that stays between batches: configuration, weights, tokenizer, backend, caches.
 * Inside engine/ only; programs use engine.h. */
#ifndef KILN_ENGINE_MODEL_H
#define KILN_ENGINE_MODEL_H

#include "adapters.h"
#include "context_cache.h"
#include "engine.h"
#include "kern.h"
#include "model_config.h"
#include "text_encoder.h"
#include "tokenizer.h"
#include "transformer.h"
#include "vae.h"
#include "weights.h"

struct engine_rope { /* host tables of the last shape: [512 + tokens of all grids, head_dim / 2] */
    struct transformer_grid grids[ENGINE_REFERENCES_MAX + 1];
    int count;
    int64_t rows;
    float *cos, *sin;
};

struct engine_plan;

struct engine_model {
    struct model_config config;
    struct engine_info info;
    enum engine_precision precision;
    enum tensor_dtype dtype;            /* of weights and activations: the compute precision */
    struct kern *kern;
    struct weights_pool *pool;          /* of the VAE */
    struct weights_pool *text_pool;     /* of the text encoder, which may move */
    struct weights_pool *transformer_pool, *adapter_pool; /* of the transformer and what runs beside it, which may change */
    struct tokenizer *tokenizer; /* NULL: the model is only counted */
    struct weight_files *transformer_files; /* stay open: quantised weights are read from their mappings, */
    struct weight_files *text_files;        /* and embedding rows */
    struct text_encoder_weights text;
    struct transformer_weights transformer;
    bool is_adapted;                    /* the transformer is there, with the adapters that were asked for last */
    bool is_merged;                     /* some of them are in its weights */
    bool is_context_adapted;            /* some change what is remembered of prompts */
    struct vae_weights vae;
    struct weight_files *vae_files;     /* stays open until the encoder is loaded from it */
    struct vae_encoder encoder;
    struct weights_pool *encoder_pool;  /* NULL: no reference image was rendered yet */
    struct context_cache *contexts;
    struct engine_plan *plan;           /* NULL: the backend works in the host's memory */
    bool may_move;                      /* nobody asked for this placement */
    enum engine_passes passes;          /* of guidance, if the next batch has two: what its plan says. OPEN: nothing is planned */
    struct engine_rope rope;
    double load_s;
};

/* engine_model_open loads a folder; on failure nothing is left. engine_model_close accepts a zeroed struct. */
bool engine_model_open(struct engine_model *ret, const struct engine_options *options, struct engine_error *why);
void engine_model_close(struct engine_model *m);

bool engine_model_fits(const struct engine_options *o, int ranks, size_t memory, bool *ret, size_t *ret_bytes, struct engine_error *why); /* engine_fits */

/* engine_model_needs is engine_needs. */
bool engine_model_needs(struct engine_needs *ret, const struct engine_options *o, struct engine_error *why);

/* engine_model_adapt puts adapters in the place of those that are there. What runs beside weights is exchanged; when files of
 * another kind come or go, the transformer is loaded anew, from the files that were there when the model was opened. After a
 * failure the model renders nothing until it succeeds. */
bool engine_model_adapt(struct engine_model *m, const struct engine_adapter *list, int count, struct engine_error *why);

/* engine_model_beside is the first half of it, for a plan as well. */
bool engine_model_beside(struct engine_model *m, const struct adapters *a, struct engine_error *why);

/* engine_model_ids turns a prompt into 512 padded ids; more than 512 are refused, or cut from the right (which loses
 * the end of the template, as in the reference) when asked. Outputs are written on success. */
bool engine_model_ids(const struct engine_model *m, const char *prompt, bool truncate, int32_t ids[ENGINE_TOKENS_MAX],
                      int32_t *ret_count, bool *ret_truncated, struct engine_error *why);

/* engine_model_forget: contexts of prompts that are remembered, all of them. */
void engine_model_forget(struct engine_model *m);

/* engine_model_rope gives the tables of a shape (pictures in the order of the sequence), computed when the shape changes. */
bool engine_model_rope(struct engine_model *m, const struct transformer_grid *grids, int count, struct engine_error *why);

/* engine_model_encoder loads the encoder of the VAE at the first call: from the file that was there when the model was opened. */
bool engine_model_encoder(struct engine_model *m, struct engine_error *why);

/* engine_model_wait moves a resident text encoder into host memory, and blocks of the transformer until so many are there, for a
 * batch that needs the room. After a failure some have moved; the model renders as ever. */
bool engine_model_wait(struct engine_model *m, int blocks, struct engine_error *why);

/* engine_model_checksums: of a team, arena memory for checksums of so many rows; else data NULL. engine_model_compare waits for
 * them and makes it an error if they differ between ranks; nothing to do for data NULL. */
struct tensor engine_model_checksums(struct engine_model *m, int64_t rows);
void engine_model_compare(struct engine_model *m, struct tensor checksums);

/* engine_model_has_kv: keys and values of references are kept (klein-9b-kv). */
bool engine_model_has_kv(const struct engine_model *m);

/* engine_model_sync waits for the backend; false and the backend's reason if anything failed since open. */
bool engine_model_sync(struct engine_model *m, struct engine_error *why);

double engine_model_now_s(void); /* monotonic */

#endif
