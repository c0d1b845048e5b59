/* text_encoder.h - Qwen3 as far as the picture needs it: token ids in, hidden states 9, 18 and 27 out.
 *
 * FLUX.2 [klein] looks at the residual stream after layers 9, 18 and 27, side by side, for all 512 rows, padding
 * rows included. So exactly 27 layers are loaded and run; the final norm and lm_head never are (engine-spec 4). */
#ifndef KILN_TEXT_ENCODER_H
#define KILN_TEXT_ENCODER_H

#include "model_config.h"
#include "weights.h"

#define TEXT_ENCODER_ROWS 512  /* every prompt is padded to this */
#define TEXT_ENCODER_LAYERS MODEL_CONFIG_TEXT_LAYERS
#define TEXT_ENCODER_TAPS MODEL_CONFIG_TEXT_TAPS /* after layers 9, 18, 27 */

struct text_encoder_layer { /* d = hidden_size, H = heads * head_dim, K = kv heads * head_dim, f = intermediate_size; of a team, the rank's share of H, K and f */
    struct tensor input_norm, post_norm;  /* [d] */
    struct tensor q_norm, k_norm;         /* [head_dim] */
    const struct kern_weight *qkv;        /* [H + 2K, d]: q, k, v */
    const struct kern_weight *out;        /* [d, H] */
    const struct kern_weight *gate_up;    /* [2f, d]: gate, up */
    const struct kern_weight *down;       /* [d, f] */
};

struct text_encoder_weights {
    struct quant_matrix embed_tokens; /* [vocab, d]; in the file's mapping */
    struct text_encoder_layer layers[TEXT_ENCODER_LAYERS];
    struct kern_layer *streamed[TEXT_ENCODER_LAYERS]; /* their matrices; NULL: on the device */
    bool is_streamed;                                 /* some wait in host memory */
};

/* text_encoder_load names what is taken; weights_done tells how it went. The pool owns everything. */
void text_encoder_load(struct text_encoder_weights *ret, const struct text_encoder_config *c, struct weights *w);

/* text_encoder_wait moves matrices into host memory until w->waiting layers are there; w has the pool of them. After a failure, which
 * w keeps, some have moved. */
void text_encoder_wait(struct text_encoder_weights *t, struct weights *w);

/* text_encoder_width is the width of an embedding row: three hidden states. */
int64_t text_encoder_width(const struct text_encoder_config *c);

/* text_encoder_run encodes a batch of b prompts. A prompt's rows do not depend on the others in the batch.
 * out [b, 512, 3d]   ids [b * 512] i32 on the device, padded   token_count [b]: real tokens of each, host memory */
void text_encoder_run(struct kern *k, const struct text_encoder_config *c,
                      const struct text_encoder_weights *w, struct tensor out, struct tensor ids,
                      const int32_t *token_count);

#endif
