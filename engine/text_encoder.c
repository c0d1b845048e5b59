/* text_encoder.c - the Qwen3 decoder stack, used as an encoder.
 *
 * One pass works on all prompts of a batch at once, [b * 512, d]; only attention knows which rows belong
 * together. Rounding points in bf16 are those of transformers: RMSNorm rounds before its weight, the rotary
 * tables are rounded, each residual add rounds.
 *
 * In a team whose sums can run beside products the rows are cut in two, and the sum of one half of a branch is
 * ended when the block behind it begins with that half; attention sees all rows at once. That changes no bit.
 * Matrices that are decoded for each product would be decoded twice: 512 rows are too few to pay for that. */
#include "text_encoder.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>

#include "layer_stream.h"

enum { ROPE_VALUES = 1 << 14 }; /* 64 KB of a table at a time */

struct text_encoder_state { /* what one pass needs besides weights; rows = b * 512; H, K, f: of this rank */
    int64_t heads, kv, mlp; /* H, K, f */
    int parts;              /* that are summed apart */
    struct tensor hidden;   /* [rows, d], the residual stream */
    struct tensor normed;   /* [rows, d], and the output of a branch, which is added when the next block begins */
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

static struct tensor part_of(struct tensor rows, int part, int parts)
{
    int64_t first = rows.shape[0] * part / parts;
    return tensor_slice(rows, 0, first, rows.shape[0] * (part + 1) / parts - first);
}

/* x gets the branch that waits for it. */
static void add_branch(struct kern *k, const struct text_encoder_state *s, int part)
{
    struct tensor hidden = part_of(s->hidden, part, s->parts), branch = part_of(s->normed, part, s->parts);
    kern_sum_end(k, branch);
    kern_add(k, hidden, hidden, branch);
}

/* Of the branch that was computed last, until it is added. */
static void begin_sum(struct kern *k, const struct text_encoder_state *s, int part)
{
    kern_sum_begin(k, part_of(s->normed, part, s->parts));
}

static void norm(struct kern *k, const struct text_encoder_state *s, const struct text_encoder_config *c, struct tensor weight, int part)
{
    kern_rms_norm(k, part_of(s->normed, part, s->parts), part_of(s->hidden, part, s->parts), weight, c->rms_norm_eps,
                  KERN_ROUND_BEFORE_WEIGHT);
}

/* The branch Wo attention(rope(norm(q)), rope(norm(k)), v) of x. The layer before left one, whose sum tap shows (data NULL: it does not). */
static void attention_block(struct kern *k, struct text_encoder_state *s, const struct text_encoder_config *c,
                            const struct text_encoder_layer *w, const int32_t *token_count, bool is_first, struct tensor tap)
{
    int64_t dim = c->head_dim, heads = s->heads, kv = s->kv;
    struct tensor q = tensor_split(tensor_slice(s->qkv, 2, 0, heads), dim);
    struct tensor key = tensor_split(tensor_slice(s->qkv, 2, heads, kv), dim);
    struct tensor value = tensor_split(tensor_slice(s->qkv, 2, heads + kv, kv), dim);

    for (int p = 0; p < s->parts; p++) {
        if (!is_first)
            add_branch(k, s, p);
        if (tap.data)
            kern_copy(k, part_of(tap, p, s->parts), part_of(s->hidden, p, s->parts));
        norm(k, s, c, w->input_norm, p);
        kern_linear(k, part_of(tensor_rows(s->qkv), p, s->parts), part_of(s->normed, p, s->parts), w->qkv);
    }
    kern_rms_rope(k, q, q, w->q_norm, c->rms_norm_eps, KERN_ROUND_BEFORE_WEIGHT, s->cos, s->sin, KERN_ROPE_HALVES);
    kern_rms_rope(k, key, key, w->k_norm, c->rms_norm_eps, KERN_ROUND_BEFORE_WEIGHT, s->cos, s->sin, KERN_ROPE_HALVES);
    kern_attention(k, tensor_split(s->mixed, dim), q, key, value, 1.0f / sqrtf((float)dim),
                   (struct kern_mask){.causal = true, .key_count = token_count});
    for (int p = 0; p < s->parts; p++) {
        kern_linear(k, part_of(s->normed, p, s->parts), part_of(tensor_rows(s->mixed), p, s->parts), w->out);
        begin_sum(k, s, p);
    }
}

/* The branch Wdown (silu(Wgate x) * (Wup x)) of x with that of attention. */
static void mlp_block(struct kern *k, struct text_encoder_state *s, const struct text_encoder_config *c, const struct text_encoder_layer *w)
{
    for (int p = 0; p < s->parts; p++) {
        struct tensor normed = part_of(s->normed, p, s->parts), both = part_of(s->gate_up, p, s->parts);
        struct tensor gate = tensor_slice(both, 1, 0, s->mlp), up = tensor_slice(both, 1, s->mlp, s->mlp);
        add_branch(k, s, p);
        norm(k, s, c, w->post_norm, p);
        kern_linear(k, both, normed, w->gate_up);
        kern_silu_mul(k, gate, gate, up);
        kern_linear(k, normed, gate, w->down);
        begin_sum(k, s, p);
    }
}

/* Where the hidden state behind so many layers goes; data NULL: nowhere. */
static struct tensor tap_behind(const struct text_encoder_config *c, struct tensor out, int layers)
{
    const int every = TEXT_ENCODER_LAYERS / TEXT_ENCODER_TAPS;
    if (layers == 0 || layers % every != 0)
        return (struct tensor){0};
    return tensor_slice(tensor_rows(out), 1, (layers / every - 1) * (int64_t)c->hidden_size, c->hidden_size);
}

void text_encoder_run(struct kern *k, const struct text_encoder_config *c,
                      const struct text_encoder_weights *w, struct tensor out, struct tensor ids,
                      const int32_t *token_count)
{
    struct text_encoder_state s;
    struct layer_stream stream;
    size_t mark = kern_mark(k);
    plan(k, &s, c, out.dtype, out.shape[0]);
    s.parts = kern_weight_is_decoded(w->layers[0].gate_up) ? 1 : kern_sum_parts(k);
    layer_stream_begin(&stream, k, w->streamed, w->is_streamed ? TEXT_ENCODER_LAYERS : 0);
    kern_gather(k, s.hidden, &w->embed_tokens, ids);
    for (int i = 0; i < TEXT_ENCODER_LAYERS; i++) {
        layer_stream_need(&stream, i);
        attention_block(k, &s, c, &w->layers[i], token_count, i == 0, tap_behind(c, out, i));
        mlp_block(k, &s, c, &w->layers[i]);
    }
    for (int p = 0; p < s.parts; p++)
        add_branch(k, &s, p);
    kern_copy(k, tap_behind(c, out, TEXT_ENCODER_LAYERS), s.hidden);
    kern_rewind(k, mark);
}
