/* lora.h - adapters: small changes of a transformer's linears, in every key style people have.
 *
 * A file is a safetensors set of factors under the names of modules. Whatever the style, the result is one list of
 * targets, sorted by name: the diffusers name of a linear's weight W [n, k], and how its change is made of factors.
 * Fused BFL modules (qkv) become three targets that take their rows; the halves of a BFL final_layer.adaLN_modulation.1 are
 * swapped to the engine's order. All of a file is understood or it is refused: keys that match no linear are an error that
 * lists them, and so are missing factors, shapes of another model, NaN, and two changes of one target.
 *
 *   style                     key                                                           alpha
 *   diffusers / PEFT          transformer.MODULE.lora_A.weight                              metadata lora_adapter_metadata
 *   PEFT raw                  base_model.model.MODULE.lora_A.weight                         none
 *   BFL, ai-toolkit           diffusion_model.BFL_MODULE.lora_A.weight                      none
 *   ComfyUI                   diffusion_model.BFL_MODULE.lora_down.weight                   .alpha
 *   kohya, musubi, LyCORIS    lora_unet_BFL_MODULE_WITH_UNDERSCORES.lora_down.weight        .alpha
 *
 * Any prefix goes with any module name and any pair of factor names; `.alpha` is read wherever it stands and wins over
 * metadata. scale = alpha / rank, alpha / sqrt(rank) for metadata's use_rslora, 1 without alpha. The change of W at
 * strength 1:
 *
 *   LORA_PLAIN   D = scale B A               A lora_A / lora_down [rank, k], B lora_B / lora_up [n, rank]
 *   LORA_LOHA    D = scale (a1 b1) * (a2 b2)  hada_w1_a [n, rank] .. element by element  (LyCORIS, Yeh et al. 2024, eq. 4)
 *   LORA_LOKR    D = scale kron(w1, w2)      each lokr_w full, or lokr_w_a lokr_w_b; both full: scale = 1 (LyCORIS, eq. 5)
 *   magnitude    W' = m (W + D) / |W + D|    DoRA: on top of any kind; norms of rows, m dora_scale [n, 1] or
 *                                            lora_magnitude_vector [n]; of columns, m [1, k] (Liu et al. 2024, eq. 5)
 *
 * With strength s the weight is W + s D, with magnitude W + s (W' - W): linear in s either way, and s = 0 is no adapter. */
#ifndef KILN_LORA_H
#define KILN_LORA_H

#include "model_config.h"
#include "safetensors.h"

enum lora_kind { LORA_PLAIN, LORA_LOHA, LORA_LOKR };

enum lora_factor {
    LORA_DOWN, LORA_UP,                                       /* plain */
    LORA_W1, LORA_W1_A, LORA_W1_B, LORA_W2, LORA_W2_A, LORA_W2_B, /* LoHa has the four _A, _B; LoKr either form */
    LORA_ALPHA, LORA_MAGNITUDE,
};
#define LORA_FACTOR_COUNT 10

struct lora_target {
    const char *name;       /* "transformer_blocks.0.attn.to_q.weight"; owned by the file */
    enum lora_kind kind;
    int64_t n, k, rank;     /* of the target; rank 0: LoKr of two full factors */
    float scale;
    const struct safetensors_entry *factor[LORA_FACTOR_COUNT]; /* of the module in the file; NULL: not there */
    int piece, pieces;      /* the target is rows [piece * n, (piece + 1) * n) of the module */
    bool swap_halves;       /* the module's rows are [b; a] of the target's [a; b] */
    bool is_column_wise;    /* the magnitude is one per column */
};

struct lora;

/* lora_open reads a file for a transformer of these dimensions. lora_parse reads one from memory: data is borrowed. */
bool lora_open(struct lora **ret, const char *path, const struct transformer_config *config, struct engine_error *why);
bool lora_parse(struct lora **ret, const void *data, size_t bytes, const struct transformer_config *config,
                struct engine_error *why);
void lora_close(struct lora *l); /* accepts NULL */

size_t lora_count(const struct lora *l);
const struct lora_target *lora_at(const struct lora *l, size_t index); /* sorted by name */
const struct lora_target *lora_find(const struct lora *l, const char *name); /* or NULL */
const char *lora_kind_name(const struct lora_target *t); /* "lora", "loha", "lokr", "dora", "loha with dora", .. */

/* lora_is_low_rank: the change is B A without a magnitude, of factors that have together no more values than W, so that it
 * can run beside the weight: y += scale up (down x). lora_down fills [rank, k], lora_up [n, rank], rows in the target's order. */
bool lora_is_low_rank(const struct lora_target *t);
void lora_down(float *to, const struct lora_target *t);
bool lora_up(float *to, const struct lora_target *t, struct engine_error *why);

/* lora_delta fills to[n, k] with the change of W at strength 1: D, or W' - W. base: W [n, k], read with magnitude only
 * (lora_needs_base), else NULL. The definition that faster paths are tested against. Fails when memory does. */
bool lora_needs_base(const struct lora_target *t);
bool lora_delta(float *to, const struct lora_target *t, const float *base, struct engine_error *why);

#endif
