/* text_encoder.c - the Qwen3 decoder stack, used as an encoder.
 *
 * One pass works on all prompts of a batch at once, [b * 512, d]; only attention knows which rows belong
 * together. Rounding points in bf16 are those of transformers: RMSNorm rounds before its weight, the rotary
 * tables are rounded, each residual add rounds. */
#include "text_encoder.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>

#include "layer_stream.h"

enum { ROPE_VALUES = 1 << 14 }; /* 64 KB of a table at a time */

struct text_encoder_state { /* what one pass needs besides weights; rows = b * 512; H, K, f: of this rank */
    int64_t heads, kv, mlp; /* H, K, f */
    struct tensor hidden;   /* [rows, d], the residual stream */
    struct tensor normed;   /* [rows, d], and the output of a branch */
    struct tensor qkv;      /* [b, 512, H + 2K] */
    struct tensor mixed;    /* [b, 512, H] */
    struct tensor gate_up;  /* [rows, 2f] */
    struct tensor cos, sin; /* [512, head_dim / 2] f32 */
};

int64_t text_encoder_width(const struct text_encoder_config *c)
{
    return (int64_t)TEXT_ENCODER_TAPS * c->hidden_size;
}

static void load_layer(struct text_encoder_layer *ret, const struct text_encoder_config *c, struct weights *w, int i)
{
    int64_t d = c->hidden_size;
    struct shard_piece heads = {c->num_attention_heads, c->head_dim}, kv = {c->num_key_value_heads, c->head_dim};
    struct shard_piece f = {c->intermediate_size, 1};
    char name[5][80];
    static const char *const part[5] = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj",
                                        "mlp.up_proj"};
    for (int n = 0; n < 5; n++)
        snprintf(name[n], sizeof name[n], "model.layers.%d.%s.weight", i, part[n]);

    ret->input_norm = weights_vector(w, d, "model.layers.%d.input_layernorm.weight", i);
    ret->qkv = weights_linear_stack(w, (struct shard_piece[]){heads, kv, kv}, d, 3, (const char *[]){name[0], name[1], name[2]});
    ret->q_norm = weights_vector(w, c->head_dim, "model.layers.%d.self_attn.q_norm.weight", i);
    ret->k_norm = weights_vector(w, c->head_dim, "model.layers.%d.self_attn.k_norm.weight", i);
    ret->out = weights_linear_columns(w, d, &heads, 1, "model.layers.%d.self_attn.o_proj.weight", i);
    ret->post_norm = weights_vector(w, d, "model.layers.%d.post_attention_layernorm.weight", i);
    ret->gate_up = weights_linear_stack(w, (struct shard_piece[]){f, f}, d, 2, (const char *[]){name[3], name[4]});
    ret->down = weights_linear_columns(w, d, &f, 1, "model.layers.%d.mlp.down_proj.weight", i);
}

void text_encoder_load(struct text_encoder_weights *ret, const struct text_encoder_config *c, struct weights *w)
{
    ret->embed_tokens = weights_table(w, c->vocab_size, c->hidden_size, "model.embed_tokens.weight");
    ret->is_streamed = w->waiting > 0;
    for (int i = 0; i < TEXT_ENCODER_LAYERS; i++) {
        weights_layer_begin(w, i, TEXT_ENCODER_LAYERS);
        load_layer(&ret->layers[i], c, w, i);
        ret->streamed[i] = weights_layer_end(w);
    }
}

void text_encoder_wait(struct text_encoder_weights *t, struct weights *w)
{
    t->is_streamed = w->waiting > 0;
    for (int i = 0; i < TEXT_ENCODER_LAYERS; i++) {
        const struct text_encoder_layer *l = &t->layers[i];
        const struct kern_weight *const matrices[] = {l->qkv, l->out, l->gate_up, l->down};
        if (t->streamed[i])
            continue;
        weights_layer_begin(w, i, TEXT_ENCODER_LAYERS);
        for (int m = 0; m < 4; m++)
            weights_layer_take(w, matrices[m]);
        t->streamed[i] = weights_layer_end(w);
    }
}

/* The tables are small (512 rows) and computed in f32 as the reference does: 1 / theta^(2j / d), times the row. They are
 * written some hundred rows at a time: each write is a copy to the device. */
static void plan_rope(struct kern *k, struct text_encoder_state *s, const struct text_encoder_config *c)
{
    int half = c->head_dim / 2;
    int64_t shape[2] = {TEXT_ENCODER_ROWS, half}, step = ROPE_VALUES / half;
    float cos_rows[ROPE_VALUES], sin_rows[ROPE_VALUES];
    s->cos = kern_temp(k, TENSOR_F32, 2, shape);
    s->sin = kern_temp(k, TENSOR_F32, 2, shape);
    assert(half <= ROPE_VALUES);
    for (int64_t first = 0; first < TEXT_ENCODER_ROWS; first += step) {
        int64_t count = TEXT_ENCODER_ROWS - first < step ? TEXT_ENCODER_ROWS - first : step;
        for (int64_t i = 0; i < count * half; i++) {
            float frequency = 1.0f / powf((float)c->rope_theta, (float)(2 * (i % half)) / (float)c->head_dim);
            cos_rows[i] = cosf((float)(first + i / half) * frequency);
            sin_rows[i] = sinf((float)(first + i / half) * frequency);
        }
        kern_write(k, tensor_slice(s->cos, 0, first, count), tensor_2d(cos_rows, TENSOR_F32, count, half));
        kern_write(k, tensor_slice(s->sin, 0, first, count), tensor_2d(sin_rows, TENSOR_F32, count, half));
    }
}

static void plan(struct kern *k, struct text_encoder_state *s, const struct text_encoder_config *c,
                 enum tensor_dtype dtype, int64_t batch)
{
    int64_t rows = batch * TEXT_ENCODER_ROWS, d = c->hidden_size;
    s->heads = shard_units(c->num_attention_heads, kern_shares(k)) * c->head_dim;
    s->kv = shard_units(c->num_key_value_heads, kern_shares(k)) * c->head_dim;
    s->mlp = shard_units(c->intermediate_size, kern_shares(k));
    s->hidden = kern_temp(k, dtype, 2, (int64_t[]){rows, d});
    s->normed = kern_temp(k, dtype, 2, (int64_t[]){rows, d});
    s->qkv = kern_temp(k, dtype, 3, (int64_t[]){batch, TEXT_ENCODER_ROWS, s->heads + 2 * s->kv});
    s->mixed = kern_temp(k, dtype, 3, (int64_t[]){batch, TEXT_ENCODER_ROWS, s->heads});
    s->gate_up = kern_temp(k, dtype, 2, (int64_t[]){rows, 2 * s->mlp});
    plan_rope(k, s, c);
}

/* x = x + Wo attention(rope(norm(q)), rope(norm(k)), v) */
static void attention_block(struct kern *k, struct text_encoder_state *s,
                            const struct text_encoder_config *c, const struct text_encoder_layer *w,
                            const int32_t *token_count)
{
    int64_t dim = c->head_dim, heads = s->heads, kv = s->kv;
    struct tensor q = tensor_split(tensor_slice(s->qkv, 2, 0, heads), dim);
    struct tensor key = tensor_split(tensor_slice(s->qkv, 2, heads, kv), dim);
    struct tensor value = tensor_split(tensor_slice(s->qkv, 2, heads + kv, kv), dim);

    kern_rms_norm(k, s->normed, s->hidden, w->input_norm, c->rms_norm_eps, KERN_ROUND_BEFORE_WEIGHT);
    kern_linear(k, tensor_rows(s->qkv), s->normed, w->qkv);
    kern_rms_rope(k, q, q, w->q_norm, c->rms_norm_eps, KERN_ROUND_BEFORE_WEIGHT, s->cos, s->sin, KERN_ROPE_HALVES);
    kern_rms_rope(k, key, key, w->k_norm, c->rms_norm_eps, KERN_ROUND_BEFORE_WEIGHT, s->cos, s->sin, KERN_ROPE_HALVES);
    kern_attention(k, tensor_split(s->mixed, dim), q, key, value, 1.0f / sqrtf((float)dim),
                   (struct kern_mask){.causal = true, .key_count = token_count});
    kern_linear(k, s->normed, tensor_rows(s->mixed), w->out);
    kern_sum_ranks(k, s->normed);
    kern_add(k, s->hidden, s->hidden, s->normed);
}

/* x = x + Wdown (silu(Wgate b) * (Wup b)) */
static void mlp_block(struct kern *k, struct text_encoder_state *s,
                      const struct text_encoder_config *c, const struct text_encoder_layer *w)
{
    struct tensor gate = tensor_slice(s->gate_up, 1, 0, s->mlp);
    struct tensor up = tensor_slice(s->gate_up, 1, s->mlp, s->mlp);

    kern_rms_norm(k, s->normed, s->hidden, w->post_norm, c->rms_norm_eps, KERN_ROUND_BEFORE_WEIGHT);
    kern_linear(k, s->gate_up, s->normed, w->gate_up);
    kern_silu_mul(k, gate, gate, up);
    kern_linear(k, s->normed, gate, w->down);
    kern_sum_ranks(k, s->normed);
    kern_add(k, s->hidden, s->hidden, s->normed);
}

void text_encoder_run(struct kern *k, const struct text_encoder_config *c,
                      const struct text_encoder_weights *w, struct tensor out, struct tensor ids,
                      const int32_t *token_count)
{
    struct text_encoder_state s;
    struct layer_stream stream;
    const int every = TEXT_ENCODER_LAYERS / TEXT_ENCODER_TAPS;
    size_t mark = kern_mark(k);
    plan(k, &s, c, out.dtype, out.shape[0]);
    layer_stream_begin(&stream, k, w->streamed, w->is_streamed ? TEXT_ENCODER_LAYERS : 0);
    kern_gather(k, s.hidden, &w->embed_tokens, ids);
    for (int i = 0; i < TEXT_ENCODER_LAYERS; i++) {
        layer_stream_need(&stream, i);
        attention_block(k, &s, c, &w->layers[i], token_count);
        mlp_block(k, &s, c, &w->layers[i]);
        if ((i + 1) % every == 0) {
            struct tensor tap = tensor_slice(tensor_rows(out), 1, i / every * (int64_t)c->hidden_size, c->hidden_size);
            kern_copy(k, tap, s.hidden);
        }
    }
    kern_rewind(k, mark);
}
