/* transformer.c - double blocks with a text and an image stream, then single blocks on both joined.
 *
 * A pass over b images of I = N + R image rows. Streams are dense, [b * 512, h] and [b * I, h], so that every matrix
 * product sees all rows at once; only queries, keys and values are laid out per image, [b, S, heads, D], text first,
 * and the norms of q and k do that move on their way. Keys and values have room for what a transformer_kv brings:
 *
 *   queries            text | image rows
 *   keys and values    text | kv | image rows          (rows of the rotary tables, too) */
#include "transformer.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "layer_stream.h"

enum { TEXT = TRANSFORMER_TEXT_ROWS };

/* --- weights ------------------------------------------------------------------------------------ */

static void load_stream(struct transformer_stream *ret, struct adapted_list *l, const struct transformer_config *c, struct weights *w,
                        const char *block, const char *const *part)
{
    int64_t h = c->hidden, mlp = c->mlp_hidden;
    char name[3][96];
    for (int n = 0; n < 3; n++)
        snprintf(name[n], sizeof name[n], "%s.attn.%s.weight", block, part[n]);
    ret->qkv = adapted_take_stack(l, w, (int64_t[]){h, h, h}, h, 3, (const char *[]){name[0], name[1], name[2]});
    ret->out = adapted_take(l, w, h, h, "%s.attn.%s.weight", block, part[3]);
    ret->norm_q = weights_vector(w, c->attention_head_dim, "%s.attn.%s.weight", block, part[4]);
    ret->norm_k = weights_vector(w, c->attention_head_dim, "%s.attn.%s.weight", block, part[5]);
    ret->ff_in = adapted_take(l, w, 2 * mlp, h, "%s.%s.linear_in.weight", block, part[6]);
    ret->ff_out = adapted_take(l, w, h, mlp, "%s.%s.linear_out.weight", block, part[6]);
}

static void load_double(struct transformer_double *ret, struct adapted_list *l, const struct transformer_config *c, struct weights *w,
                        int i)
{
    static const char *const image[] = {"to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k", "ff"};
    static const char *const text[] = {"add_q_proj",   "add_k_proj",   "add_v_proj", "to_add_out",
                                       "norm_added_q", "norm_added_k", "ff_context"};
    char block[48];
    snprintf(block, sizeof block, "transformer_blocks.%d", i);
    load_stream(&ret->image, l, c, w, block, image);
    load_stream(&ret->text, l, c, w, block, text);
}

static void load_single(struct transformer_single *ret, struct adapted_list *l, const struct transformer_config *c, struct weights *w,
                        int i)
{
    int64_t h = c->hidden, mlp = c->mlp_hidden;
    ret->in = adapted_take(l, w, 3 * h + 2 * mlp, h, "single_transformer_blocks.%d.attn.to_qkv_mlp_proj.weight", i);
    ret->out = adapted_take(l, w, h, h + mlp, "single_transformer_blocks.%d.attn.to_out.weight", i);
    ret->norm_q = weights_vector(w, c->attention_head_dim, "single_transformer_blocks.%d.attn.norm_q.weight", i);
    ret->norm_k = weights_vector(w, c->attention_head_dim, "single_transformer_blocks.%d.attn.norm_k.weight", i);
}

void transformer_load(struct transformer_weights *ret, const struct transformer_config *c, struct weights *w)
{
    struct adapted_list *l = &ret->linears;
    int64_t h = c->hidden;
    ret->doubles = calloc((size_t)c->num_layers + 1, sizeof *ret->doubles);
    ret->singles = calloc((size_t)c->num_single_layers + 1, sizeof *ret->singles);
    ret->streamed = calloc((size_t)(c->num_layers + c->num_single_layers) + 1, sizeof *ret->streamed);
    ret->is_streamed = w->is_streamed;
    if (!ret->doubles || !ret->singles || !ret->streamed) {
        w->failed = true;
        engine_error_set(&w->why, ENGINE_NO_MEMORY, "no memory for the list of blocks");
        return;
    }
    ret->x_embedder = adapted_take(l, w, h, c->in_channels, "x_embedder.weight");
    ret->context_embedder = adapted_take(l, w, h, c->joint_attention_dim, "context_embedder.weight");
    ret->time_in = adapted_take(l, w, h, c->timestep_guidance_channels,
                                  "time_guidance_embed.timestep_embedder.linear_1.weight");
    ret->time_out = adapted_take(l, w, h, h, "time_guidance_embed.timestep_embedder.linear_2.weight");
    ret->modulation_image = adapted_take(l, w, 6 * h, h, "double_stream_modulation_img.linear.weight");
    ret->modulation_text = adapted_take(l, w, 6 * h, h, "double_stream_modulation_txt.linear.weight");
    ret->modulation_single = adapted_take(l, w, 3 * h, h, "single_stream_modulation.linear.weight");
    for (int i = 0; i < c->num_layers + c->num_single_layers; i++) {
        weights_layer_begin(w);
        if (i < c->num_layers)
            load_double(&ret->doubles[i], l, c, w, i);
        else
            load_single(&ret->singles[i - c->num_layers], l, c, w, i - c->num_layers);
        ret->streamed[i] = weights_layer_end(w);
    }
    ret->norm_out = adapted_take(l, w, 2 * h, h, "norm_out.linear.weight");
    ret->proj_out = adapted_take(l, w, c->in_channels, h, "proj_out.weight");
}

void transformer_unload(struct transformer_weights *w)
{
    free(w->doubles);
    free(w->singles);
    free(w->streamed);
    adapted_done(&w->linears);
    *w = (struct transformer_weights){0};
}

/* --- once per schedule, prompt, shape ------------------------------------------------------------- */

void transformer_times(struct kern *k, const struct transformer_config *c, const struct transformer_weights *w,
                       enum tensor_dtype dtype, struct transformer_times *ret, const float *model_time, int steps)
{
    int64_t h = c->hidden;
    ret->temb = kern_temp(k, dtype, 2, (int64_t[]){steps, h});
    ret->image = kern_temp(k, dtype, 2, (int64_t[]){steps, 6 * h});
    ret->text = kern_temp(k, dtype, 2, (int64_t[]){steps, 6 * h});
    ret->single = kern_temp(k, dtype, 2, (int64_t[]){steps, 3 * h});
    ret->out = kern_temp(k, dtype, 2, (int64_t[]){steps, 2 * h});

    size_t mark = kern_mark(k);
    struct tensor waves = kern_temp(k, dtype, 2, (int64_t[]){steps, c->timestep_guidance_channels});
    struct tensor hidden = kern_temp(k, dtype, 2, (int64_t[]){steps, h});
    for (int i = 0; i < steps; i++)
        kern_timestep_embedding(k, tensor_slice(waves, 0, i, 1), model_time[i]);
    adapted_apply(k, hidden, waves, w->time_in);
    kern_silu(k, hidden, hidden);
    adapted_apply(k, ret->temb, hidden, w->time_out);
    kern_silu(k, hidden, ret->temb);
    adapted_apply(k, ret->image, hidden, w->modulation_image);
    adapted_apply(k, ret->text, hidden, w->modulation_text);
    adapted_apply(k, ret->single, hidden, w->modulation_single);
    adapted_apply(k, ret->out, hidden, w->norm_out);
    kern_rewind(k, mark);
}

void transformer_context(struct kern *k, const struct transformer_weights *w, struct tensor out, struct tensor embeds)
{
    adapted_apply(k, out, embeds, w->context_embedder);
}

/* One row of both tables; the number of values in it. */
static int64_t rope_row(const struct transformer_config *c, float *cos_row, float *sin_row, const double position[4])
{
    int64_t at = 0;
    for (int axis = 0; axis < 4; axis++) {
        int size = c->axes_dims_rope[axis];
        for (int j = 0; j < size / 2; j++, at++) {
            double angle = position[axis] / pow(c->rope_theta, 2.0 * j / size);
            cos_row[at] = (float)cos(angle);
            sin_row[at] = (float)sin(angle);
        }
    }
    return at;
}

void transformer_rope(const struct transformer_config *c, float *cos_table, float *sin_table, const struct transformer_grid *grids,
                      int count)
{
    int64_t at = 0;
    for (int row = 0; row < TEXT; row++)
        at += rope_row(c, cos_table + at, sin_table + at, (double[]){0, 0, 0, row});
    for (int i = 0; i < count; i++)
        for (int y = 0; y < grids[i].h; y++)
            for (int x = 0; x < grids[i].w; x++)
                at += rope_row(c, cos_table + at, sin_table + at, (double[]){grids[i].t, y, x, 0});
}

struct transformer_kv transformer_kv_temp(struct kern *k, const struct transformer_config *c, enum tensor_dtype dtype, int64_t rows)
{
    int64_t shape[4] = {c->num_layers + c->num_single_layers, rows, c->num_attention_heads, c->attention_head_dim};
    struct tensor keys = kern_temp(k, dtype, 4, shape);
    return (struct transformer_kv){keys, kern_temp(k, dtype, 4, shape)};
}

/* --- one step ----------------------------------------------------------------------------------------- */

struct transformer_state {             /* arena memory of one pass */
    int64_t batch, text_rows, image_rows, kv_rows; /* rows per image: 512 or 0, N + R, those of in->kv or 0 */
    int64_t tokens;                    /* N */
    struct tensor text, image;         /* [b * 512, h], [b * (N + R), h] */
    struct tensor joint;               /* [b, S, h] */
    struct layer_stream stream;        /* of the blocks */
};

static int64_t query_rows(const struct transformer_state *s)
{
    return s->text_rows + s->image_rows;
}

static int64_t key_rows(const struct transformer_state *s)
{
    return s->text_rows + s->kv_rows + s->image_rows;
}

struct stream_state {                  /* what differs between the two streams of a double block */
    struct tensor x;                   /* [b * rows, h] */
    int64_t rows, first, first_key;    /* of this stream; where it stands among queries and among keys */
    struct tensor modulation;          /* [1, 6h] */
};

struct double_state {                  /* rows = b * max(512, N + R) */
    struct tensor work;                /* [rows, h] */
    struct tensor qkv;                 /* [rows, 3h] */
    struct tensor q, k, v;             /* [b, queries or keys, heads, D] */
    struct tensor mixed;               /* [rows, h] */
    struct tensor ff;                  /* [rows, 6h] */
};

static struct tensor chunk(struct tensor modulation, int index, int64_t h)
{
    return tensor_slice(modulation, 1, index * h, h);
}

static struct tensor first_rows(struct tensor t, int64_t rows)
{
    return tensor_slice(t, 0, 0, rows);
}

/* [b * rows, width] seen as [b, rows, width] */
static struct tensor per_image(struct tensor t, int64_t batch)
{
    return tensor_shape(t, 3, (int64_t[]){batch, t.shape[0] / batch, t.shape[1]});
}

/* Turns the text and the image rows of queries (image_first = text rows) or keys; those of a transformer_kv are turned. */
static void rotate(struct kern *k, const struct transformer_state *s, const struct transformer_input *in, struct tensor x,
                   int64_t image_first)
{
    int64_t image_key = s->text_rows + s->kv_rows;
    if (s->text_rows)
        kern_rope(k, tensor_slice(x, 1, 0, s->text_rows), tensor_slice(in->cos, 0, 0, s->text_rows),
                  tensor_slice(in->sin, 0, 0, s->text_rows), KERN_ROPE_PAIRS);
    kern_rope(k, tensor_slice(x, 1, image_first, s->image_rows), tensor_slice(in->cos, 0, image_key, s->image_rows),
              tensor_slice(in->sin, 0, image_key, s->image_rows), KERN_ROPE_PAIRS);
}

static struct tensor kv_block(struct tensor kv, int block)
{
    return tensor_slice(kv, 0, block, 1); /* [1, R, heads, D] */
}

/* The references' keys and values of a block: into their place among those of the pass, and out of them to be kept. */
static void exchange_kv(struct kern *k, const struct transformer_state *s, const struct transformer_input *in, struct tensor key,
                        struct tensor value, int block)
{
    for (int64_t b = 0; s->kv_rows && b < s->batch; b++) {
        struct tensor keys = tensor_slice(key, 0, b, 1), values = tensor_slice(value, 0, b, 1);
        kern_copy(k, tensor_slice(keys, 1, s->text_rows, s->kv_rows), kv_block(in->kv[b]->k, block));
        kern_copy(k, tensor_slice(values, 1, s->text_rows, s->kv_rows), kv_block(in->kv[b]->v, block));
    }
    if (in->keep) {
        kern_copy(k, kv_block(in->keep->k, block), tensor_slice(key, 1, s->text_rows + s->kv_rows, s->image_rows));
        kern_copy(k, kv_block(in->keep->v, block), tensor_slice(value, 1, s->text_rows + s->kv_rows, s->image_rows));
    }
}

/* q, k, v of one stream, into its rows of the joint sequence */
static void double_project(struct kern *k, const struct transformer_config *c, const struct transformer_stream *w,
                           const struct stream_state *s, struct double_state *d, int64_t batch)
{
    int64_t h = c->hidden, dim = c->attention_head_dim, rows = batch * s->rows;
    struct tensor work = first_rows(d->work, rows), flat = first_rows(d->qkv, rows), qkv = per_image(flat, batch);

    kern_layer_norm_modulate(k, work, s->x, chunk(s->modulation, 1, h), chunk(s->modulation, 0, h), c->eps);
    adapted_apply(k, flat, work, w->qkv);
    kern_rms_norm(k, tensor_slice(d->q, 1, s->first, s->rows), tensor_split(tensor_slice(qkv, 2, 0, h), dim),
                  w->norm_q, c->eps, KERN_ROUND_ONCE);
    kern_rms_norm(k, tensor_slice(d->k, 1, s->first_key, s->rows), tensor_split(tensor_slice(qkv, 2, h, h), dim),
                  w->norm_k, c->eps, KERN_ROUND_ONCE);
    kern_copy(k, tensor_slice(d->v, 1, s->first_key, s->rows), tensor_split(tensor_slice(qkv, 2, 2 * h, h), dim));
}

/* x = x + gate * Wo attention(own queries, all keys) */
static void double_attend(struct kern *k, const struct peers *peers, const struct transformer_config *c,
                          const struct transformer_stream *w, const struct stream_state *s, struct double_state *d,
                          int64_t batch)
{
    int64_t h = c->hidden, dim = c->attention_head_dim, rows = batch * s->rows;
    struct tensor work = first_rows(d->work, rows), mixed = first_rows(d->mixed, rows);

    kern_attention(k, tensor_split(per_image(mixed, batch), dim), tensor_slice(d->q, 1, s->first, s->rows), d->k, d->v,
                   1.0f / sqrtf((float)dim), (struct kern_mask){0});
    adapted_apply(k, work, mixed, w->out);
    peers_sum(peers, k, work);
    kern_gated_add(k, s->x, chunk(s->modulation, 2, h), work);
}

/* x = x + gate * Wout (silu(a) * b), (a, b) = Win norm(x) */
static void double_mlp(struct kern *k, const struct peers *peers, const struct transformer_config *c,
                       const struct transformer_stream *w, const struct stream_state *s, struct double_state *d,
                       int64_t batch)
{
    int64_t h = c->hidden, mlp = c->mlp_hidden, rows = batch * s->rows;
    struct tensor work = first_rows(d->work, rows), ff = first_rows(d->ff, rows);
    struct tensor gate = tensor_slice(ff, 1, 0, mlp), up = tensor_slice(ff, 1, mlp, mlp);

    kern_layer_norm_modulate(k, work, s->x, chunk(s->modulation, 4, h), chunk(s->modulation, 3, h), c->eps);
    adapted_apply(k, ff, work, w->ff_in);
    kern_silu_mul(k, gate, gate, up);
    adapted_apply(k, work, gate, w->ff_out);
    peers_sum(peers, k, work);
    kern_gated_add(k, s->x, chunk(s->modulation, 5, h), work);
}

static void run_doubles(struct kern *k, const struct peers *peers, const struct transformer_config *c,
                        const struct transformer_weights *w, struct transformer_state *s,
                        const struct transformer_input *in)
{
    enum tensor_dtype dtype = s->image.dtype;
    int64_t h = c->hidden, batch = s->batch, heads = c->num_attention_heads, dim = c->attention_head_dim;
    int64_t most = batch * (s->image_rows > s->text_rows ? s->image_rows : s->text_rows);
    int64_t queries[4] = {batch, query_rows(s), heads, dim}, keys[4] = {batch, key_rows(s), heads, dim};
    struct stream_state text = {s->text, s->text_rows, 0, 0, tensor_slice(in->times->text, 0, in->step, 1)};
    struct stream_state image = {s->image, s->image_rows, s->text_rows, s->text_rows + s->kv_rows,
                                 tensor_slice(in->times->image, 0, in->step, 1)};
    bool has_text = s->text_rows > 0;
    size_t mark = kern_mark(k);
    struct double_state d = {
        .work = kern_temp(k, dtype, 2, (int64_t[]){most, h}),
        .qkv = kern_temp(k, dtype, 2, (int64_t[]){most, 3 * h}),
        .q = kern_temp(k, dtype, 4, queries),
        .k = kern_temp(k, dtype, 4, keys),
        .v = kern_temp(k, dtype, 4, keys),
        .mixed = kern_temp(k, dtype, 2, (int64_t[]){most, h}),
        .ff = kern_temp(k, dtype, 2, (int64_t[]){most, 2 * (int64_t)c->mlp_hidden}),
    };
    for (int i = 0; i < c->num_layers; i++) {
        const struct transformer_double *block = &w->doubles[i];
        layer_stream_need(&s->stream, i);
        if (has_text)
            double_project(k, c, &block->text, &text, &d, batch);
        double_project(k, c, &block->image, &image, &d, batch);
        rotate(k, s, in, d.q, image.first);
        rotate(k, s, in, d.k, image.first_key);
        exchange_kv(k, s, in, d.k, d.v, i);
        if (has_text)
            double_attend(k, peers, c, &block->text, &text, &d, batch);
        double_attend(k, peers, c, &block->image, &image, &d, batch);
        if (has_text)
            double_mlp(k, peers, c, &block->text, &text, &d, batch);
        double_mlp(k, peers, c, &block->image, &image, &d, batch);
    }
    kern_rewind(k, mark);
}

struct single_state {
    struct tensor work;  /* [b * S, h] */
    struct tensor in;    /* [b, S, 9h]: q, k, v, gate, up */
    struct tensor mixed; /* [b, S, 4h]: attention, mlp */
    struct tensor k, v;  /* [b, keys, heads, D] when a transformer_kv brings some; else they stay in `in` */
};

/* Moves keys or values of text and image rows apart, so that there is room for others between them. */
static void spread(struct kern *k, const struct transformer_state *s, struct tensor out, struct tensor x)
{
    kern_copy(k, tensor_slice(out, 1, 0, s->text_rows), tensor_slice(x, 1, 0, s->text_rows));
    kern_copy(k, tensor_slice(out, 1, s->text_rows + s->kv_rows, s->image_rows), tensor_slice(x, 1, s->text_rows, s->image_rows));
}

/* s = s + gate * W2 [attention ; silu(gate) * up], all from one product W1 norm(s) */
static void single_block(struct kern *k, const struct peers *peers, const struct transformer_config *c,
                         const struct transformer_single *w, struct single_state *t, const struct transformer_state *s,
                         struct tensor modulation, const struct transformer_input *in, int block)
{
    int64_t h = c->hidden, mlp = c->mlp_hidden, dim = c->attention_head_dim;
    struct tensor q = tensor_split(tensor_slice(t->in, 2, 0, h), dim);
    struct tensor key = tensor_split(tensor_slice(t->in, 2, h, h), dim), keys = key;
    struct tensor value = tensor_split(tensor_slice(t->in, 2, 2 * h, h), dim), values = value;
    struct tensor gate = tensor_slice(t->in, 2, 3 * h, mlp), up = tensor_slice(t->in, 2, 3 * h + mlp, mlp);
    struct tensor x = tensor_rows(s->joint);

    kern_layer_norm_modulate(k, t->work, x, chunk(modulation, 1, h), chunk(modulation, 0, h), c->eps);
    adapted_apply(k, tensor_rows(t->in), t->work, w->in);
    kern_rms_norm(k, q, q, w->norm_q, c->eps, KERN_ROUND_ONCE);
    kern_rms_norm(k, key, key, w->norm_k, c->eps, KERN_ROUND_ONCE);
    rotate(k, s, in, q, s->text_rows);
    rotate(k, s, in, key, s->text_rows);
    if (s->kv_rows) {
        keys = t->k, values = t->v;
        spread(k, s, keys, key);
        spread(k, s, values, value);
    }
    exchange_kv(k, s, in, keys, values, c->num_layers + block);
    kern_attention(k, tensor_split(tensor_slice(t->mixed, 2, 0, h), dim), q, keys, values, 1.0f / sqrtf((float)dim),
                   (struct kern_mask){0});
    kern_silu_mul(k, tensor_rows(tensor_slice(t->mixed, 2, h, mlp)), tensor_rows(gate), tensor_rows(up));
    adapted_apply(k, t->work, tensor_rows(t->mixed), w->out);
    peers_sum(peers, k, t->work);
    kern_gated_add(k, x, chunk(modulation, 2, h), t->work);
}

static void run_singles(struct kern *k, const struct peers *peers, const struct transformer_config *c,
                        const struct transformer_weights *w, struct transformer_state *s,
                        const struct transformer_input *in)
{
    enum tensor_dtype dtype = s->joint.dtype;
    int64_t h = c->hidden, mlp = c->mlp_hidden, rows = query_rows(s);
    int64_t keys[4] = {s->batch, key_rows(s), c->num_attention_heads, c->attention_head_dim};
    struct tensor modulation = tensor_slice(in->times->single, 0, in->step, 1);
    size_t mark = kern_mark(k);
    struct single_state single = {
        .work = kern_temp(k, dtype, 2, (int64_t[]){s->batch * rows, h}),
        .in = kern_temp(k, dtype, 3, (int64_t[]){s->batch, rows, 3 * h + 2 * mlp}),
        .mixed = kern_temp(k, dtype, 3, (int64_t[]){s->batch, rows, h + mlp}),
    };
    if (s->kv_rows) {
        single.k = kern_temp(k, dtype, 4, keys);
        single.v = kern_temp(k, dtype, 4, keys);
    }
    for (int i = 0; i < c->num_single_layers; i++) {
        layer_stream_need(&s->stream, c->num_layers + i);
        single_block(k, peers, c, &w->singles[i], &single, s, modulation, in, i);
    }
    kern_rewind(k, mark);
}

/* The image rows: tokens of the picture, those of its references behind them. */
static void embed_image(struct kern *k, const struct transformer_weights *w, struct transformer_state *s,
                        const struct transformer_input *in)
{
    size_t mark = kern_mark(k);
    struct tensor tokens = in->latents;
    int64_t channels = tokens.shape[2], references = s->image_rows - s->tokens;
    if (references) {
        tokens = kern_temp(k, tokens.dtype, 3, (int64_t[]){s->batch, s->image_rows, channels});
        kern_copy(k, tensor_slice(tokens, 1, 0, s->tokens), in->latents);
        for (int64_t b = 0; b < s->batch; b++)
            kern_copy(k, tensor_slice(tensor_slice(tokens, 0, b, 1), 1, s->tokens, references),
                      tensor_shape(in->references[b], 3, (int64_t[]){1, references, channels}));
    }
    adapted_apply(k, s->image, tensor_rows(tokens), w->x_embedder);
    kern_rewind(k, mark);
}

static void embed(struct kern *k, const struct transformer_weights *w, struct transformer_state *s,
                  const struct transformer_input *in)
{
    embed_image(k, w, s, in);
    for (int64_t b = 0; s->text_rows && b < s->batch; b++)
        kern_copy(k, tensor_slice(s->text, 0, b * TEXT, TEXT), in->context[b]);
}

static void join(struct kern *k, struct transformer_state *s)
{
    if (s->text_rows)
        kern_copy(k, tensor_slice(s->joint, 1, 0, s->text_rows), per_image(s->text, s->batch));
    kern_copy(k, tensor_slice(s->joint, 1, s->text_rows, s->image_rows), per_image(s->image, s->batch));
}

/* velocity = Wp norm(rows of the picture); here the order is scale, shift */
static void project_out(struct kern *k, const struct transformer_config *c, const struct transformer_weights *w,
                        struct transformer_state *s, struct tensor velocity, const struct transformer_input *in)
{
    struct tensor modulation = tensor_slice(in->times->out, 0, in->step, 1);
    struct tensor picture = first_rows(s->image, s->batch * s->tokens);
    kern_copy(k, per_image(picture, s->batch), tensor_slice(s->joint, 1, s->text_rows, s->tokens));
    kern_layer_norm_modulate(k, picture, picture, chunk(modulation, 0, c->hidden), chunk(modulation, 1, c->hidden), c->eps);
    adapted_apply(k, tensor_rows(velocity), picture, w->proj_out);
}

static struct transformer_state state_of(struct kern *k, const struct transformer_config *c, const struct transformer_input *in)
{
    enum tensor_dtype dtype = in->latents.dtype;
    int64_t batch = in->latents.shape[0], tokens = in->latents.shape[1], h = c->hidden;
    struct transformer_state s = {
        .batch = batch,
        .tokens = tokens,
        .text_rows = in->context ? TEXT : 0,
        .image_rows = tokens + (in->references ? in->references[0].shape[0] : 0),
        .kv_rows = in->kv ? in->kv[0]->k.shape[1] : 0,
    };
    assert(in->cos.shape[0] == key_rows(&s) && !(in->keep && batch > 1));
    if (s.text_rows)
        s.text = kern_temp(k, dtype, 2, (int64_t[]){batch * TEXT, h});
    s.image = kern_temp(k, dtype, 2, (int64_t[]){batch * s.image_rows, h});
    s.joint = kern_temp(k, dtype, 3, (int64_t[]){batch, query_rows(&s), h});
    return s;
}

void transformer_run(struct kern *k, const struct peers *peers, const struct transformer_config *c,
                     const struct transformer_weights *w, struct tensor velocity, const struct transformer_input *in)
{
    size_t mark = kern_mark(k);
    struct transformer_state s = state_of(k, c, in);
    layer_stream_begin(&s.stream, k, w->streamed, w->is_streamed ? c->num_layers + c->num_single_layers : 0);
    embed(k, w, &s, in);
    run_doubles(k, peers, c, w, &s, in);
    join(k, &s);
    run_singles(k, peers, c, w, &s, in);
    if (velocity.data)
        project_out(k, c, w, &s, velocity, in);
    kern_rewind(k, mark);
}
