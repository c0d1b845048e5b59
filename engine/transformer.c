/* transformer.c - double blocks with a text and an image stream, then single blocks on both joined.
 *
 * A pass over b images of I = N + R image rows. The residual stream x and queries, keys and values are laid out per image,
 * [b, S, ..], text first. What goes into a product is dense, [b * 512, h] and [b * I, h], so that every matrix product sees all
 * rows at once; norms and what is added do that move on their way. Keys and values have room for what a transformer_kv brings:
 *
 *   x, queries         text | image rows
 *   keys and values    text | kv | image rows          (rows of the rotary tables, too)
 *
 * A branch's result waits in the memory that the next norm fills: adding it and that norm are one operation (enter).
 *
 * In a team that result is a sum over the ranks. Its rows are cut in kern_sum_parts parts of about equal size, and one is summed while
 * the other is computed: the product that makes part 1 runs beside the sum of part 0, and that which part 0 goes into next beside the sum
 * of part 1.
 *
 *   double blocks      0: text and the first image rows | 1: the other image rows          single blocks      0: first half | 1: second half
 *
 * Only attention wants all rows at once. A row's bits do not depend on what it is computed with. */
#include "transformer.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "layer_stream.h"

enum { TEXT = TRANSFORMER_TEXT_ROWS };

/* --- weights ------------------------------------------------------------------------------------ */

static struct shard_piece heads_of(const struct transformer_config *c)
{
    return (struct shard_piece){c->num_attention_heads, c->attention_head_dim};
}

static void load_stream(struct transformer_stream *ret, struct adapted_list *l, const struct transformer_config *c, struct weights *w,
                        const char *block, const char *const *part)
{
    int64_t h = c->hidden;
    struct shard_piece heads = heads_of(c), mlp = {c->mlp_hidden, 1};
    char name[3][96];
    for (int n = 0; n < 3; n++)
        snprintf(name[n], sizeof name[n], "%s.attn.%s.weight", block, part[n]);
    ret->qkv = adapted_take_stack(l, w, (struct shard_piece[]){heads, heads, heads}, h, 3, (const char *[]){name[0], name[1], name[2]});
    ret->out = adapted_take_columns(l, w, h, &heads, 1, "%s.attn.%s.weight", block, part[3]);
    ret->norm_q = weights_vector(w, c->attention_head_dim, "%s.attn.%s.weight", block, part[4]);
    ret->norm_k = weights_vector(w, c->attention_head_dim, "%s.attn.%s.weight", block, part[5]);
    ret->ff_in = adapted_take_rows(l, w, (struct shard_piece[]){mlp, mlp}, 2, h, "%s.%s.linear_in.weight", block, part[6]);
    ret->ff_out = adapted_take_columns(l, w, h, &mlp, 1, "%s.%s.linear_out.weight", block, part[6]);
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
    int64_t h = c->hidden;
    struct shard_piece heads = heads_of(c), mlp = {c->mlp_hidden, 1};
    ret->in = adapted_take_rows(l, w, (struct shard_piece[]){heads, heads, heads, mlp, mlp}, 5, h,
                                "single_transformer_blocks.%d.attn.to_qkv_mlp_proj.weight", i);
    ret->out = adapted_take_columns(l, w, h, (struct shard_piece[]){heads, mlp}, 2, "single_transformer_blocks.%d.attn.to_out.weight", i);
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
    ret->is_streamed = w->waiting > 0;
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
        weights_layer_begin(w, i, c->num_layers + c->num_single_layers);
        if (i < c->num_layers)
            load_double(&ret->doubles[i], l, c, w, i);
        else
            load_single(&ret->singles[i - c->num_layers], l, c, w, i - c->num_layers);
        ret->streamed[i] = weights_layer_end(w);
    }
    ret->norm_out = adapted_take(l, w, 2 * h, h, "norm_out.linear.weight");
    ret->proj_out = adapted_take(l, w, c->in_channels, h, "proj_out.weight");
}

static void take_stream(struct weights *w, const struct transformer_stream *s)
{
    const struct adapted_linear *const linears[] = {s->qkv, s->out, s->ff_in, s->ff_out};
    for (int i = 0; i < 4; i++)
        weights_layer_take(w, linears[i]->weight);
}

void transformer_wait(struct transformer_weights *t, const struct transformer_config *c, struct weights *w)
{
    int count = c->num_layers + c->num_single_layers;
    t->is_streamed = w->waiting > 0;
    for (int i = 0; i < count; i++) {
        if (t->streamed[i])
            continue;
        weights_layer_begin(w, i, count);
        if (i < c->num_layers) {
            take_stream(w, &t->doubles[i].image);
            take_stream(w, &t->doubles[i].text);
        } else {
            weights_layer_take(w, t->singles[i - c->num_layers].in->weight);
            weights_layer_take(w, t->singles[i - c->num_layers].out->weight);
        }
        t->streamed[i] = weights_layer_end(w);
    }
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

enum { TIMES = 6 + 6 + 3 + 2 };

static struct transformer_times times_of(struct tensor all, int64_t h)
{
    return (struct transformer_times){.all = all, .image = tensor_slice(all, 1, 0, 6 * h), .text = tensor_slice(all, 1, 6 * h, 6 * h),
                                      .single = tensor_slice(all, 1, 12 * h, 3 * h), .out = tensor_slice(all, 1, 15 * h, 2 * h)};
}

struct transformer_times transformer_times_at(const struct transformer_times *times, int step)
{
    return times_of(tensor_slice(times->all, 0, step, 1), times->all.shape[1] / TIMES);
}

struct transformer_times transformer_times_temp(struct kern *k, const struct transformer_config *c, enum tensor_dtype dtype)
{
    return times_of(kern_temp(k, dtype, 2, (int64_t[]){1, TIMES * (int64_t)c->hidden}), c->hidden);
}

void transformer_times(struct kern *k, const struct transformer_config *c, const struct transformer_weights *w,
                       enum tensor_dtype dtype, struct transformer_times *ret, const float *model_time, int steps)
{
    int64_t h = c->hidden;
    *ret = times_of(kern_temp(k, dtype, 2, (int64_t[]){steps, TIMES * h}), h);
    ret->temb = kern_temp(k, dtype, 2, (int64_t[]){steps, h});

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
    int64_t heads = shard_units(c->num_attention_heads, kern_shares(k));
    int64_t shape[4] = {c->num_layers + c->num_single_layers, rows, heads, c->attention_head_dim};
    struct tensor keys = kern_temp(k, dtype, 4, shape);
    return (struct transformer_kv){keys, kern_temp(k, dtype, 4, shape)};
}

/* --- one step ----------------------------------------------------------------------------------------- */

struct transformer_state {             /* arena memory of one pass */
    int64_t batch, text_rows, image_rows, kv_rows; /* rows per image: 512 or 0, N + R, those of in->kv or 0 */
    int64_t tokens;                    /* N */
    int64_t heads, attention, mlp;     /* this rank's: heads, D times as many, values of the MLP: its shares of h / D, h, 3h */
    struct tensor x;                   /* [b, S, h] */
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

struct piece {                         /* rows of one stream of the double blocks */
    bool is_text;
    struct tensor x;                   /* [b, rows, h] */
    struct tensor work;                /* [b * rows, h]: norm(x) on its way into a product, then what the branch gave */
    int64_t rows, first, first_key;    /* where they stand among queries and among keys */
    struct tensor modulation;          /* [1, 6h] */
};

enum { PARTS_MAX = 2, PIECES_MAX = 2 };

struct double_part {                   /* what is summed at once */
    struct piece pieces[PIECES_MAX];   /* text before image */
    int count;
    struct tensor work;                /* that of all pieces, which stand one behind the other */
};

struct double_state {                  /* rows: of the largest piece; h, 3h: this rank's share */
    struct double_part parts[PARTS_MAX];
    int part_count;
    struct tensor qkv;                 /* [rows, 3h] */
    struct tensor q, k, v;             /* [b, queries or keys, heads, D] */
    struct tensor mixed;               /* [rows, h] */
    struct tensor ff;                  /* [rows, 2 * 3h] */
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

/* work = norm(x), modulated; x first gets the branch that waits in work, times gate (data NULL: none waits). */
static void enter(struct kern *k, const struct transformer_config *c, struct tensor work, struct tensor x, struct tensor gate,
                  struct tensor scale, struct tensor shift)
{
    struct tensor rows = per_image(work, x.shape[0]);
    if (gate.data)
        kern_gated_add_norm(k, rows, x, gate, rows, scale, shift, c->eps);
    else
        kern_layer_norm_modulate(k, rows, x, scale, shift, c->eps);
}

/* out = x normalised and turned, from row `first` of the rotary tables on */
static void turn(struct kern *k, const struct transformer_config *c, const struct transformer_input *in, struct tensor out,
                 struct tensor x, struct tensor weight, int64_t first)
{
    kern_rms_rope(k, out, x, weight, c->eps, KERN_ROUND_ONCE, tensor_slice(in->cos, 0, first, x.shape[1]),
                  tensor_slice(in->sin, 0, first, x.shape[1]), KERN_ROPE_PAIRS);
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
                           const struct transformer_input *in, const struct piece *s, struct double_state *d, bool is_first)
{
    int64_t h = c->hidden, own = d->mixed.shape[1], dim = c->attention_head_dim;
    struct tensor flat = first_rows(d->qkv, s->work.shape[0]), qkv = per_image(flat, s->x.shape[0]);
    struct tensor gate = is_first ? (struct tensor){0} : chunk(s->modulation, 5, h);

    enter(k, c, s->work, s->x, gate, chunk(s->modulation, 1, h), chunk(s->modulation, 0, h));
    adapted_apply(k, flat, s->work, w->qkv);
    turn(k, c, in, tensor_slice(d->q, 1, s->first, s->rows), tensor_split(tensor_slice(qkv, 2, 0, own), dim), w->norm_q,
         s->first_key);
    turn(k, c, in, tensor_slice(d->k, 1, s->first_key, s->rows), tensor_split(tensor_slice(qkv, 2, own, own), dim), w->norm_k,
         s->first_key);
    kern_copy(k, tensor_slice(d->v, 1, s->first_key, s->rows), tensor_split(tensor_slice(qkv, 2, 2 * own, own), dim));
}

/* the branch Wo attention(own queries, all keys), as far as this rank's heads go; to be added by gate 2 */
static void double_attend(struct kern *k, const struct transformer_config *c,
                          const struct transformer_stream *w, const struct piece *s, struct double_state *d)
{
    int64_t dim = c->attention_head_dim;
    struct tensor mixed = first_rows(d->mixed, s->work.shape[0]);

    kern_attention(k, tensor_split(per_image(mixed, s->x.shape[0]), dim), tensor_slice(d->q, 1, s->first, s->rows), d->k, d->v,
                   1.0f / sqrtf((float)dim), (struct kern_mask){0});
    adapted_apply(k, s->work, mixed, w->out);
}

/* the branch Wout (silu(a) * b), (a, b) = Win norm(x), likewise; to be added by gate 5 */
static void double_mlp(struct kern *k, const struct transformer_config *c,
                       const struct transformer_stream *w, const struct piece *s, struct double_state *d)
{
    int64_t h = c->hidden, mlp = d->ff.shape[1] / 2;
    struct tensor ff = first_rows(d->ff, s->work.shape[0]);
    struct tensor gate = tensor_slice(ff, 1, 0, mlp), up = tensor_slice(ff, 1, mlp, mlp);

    enter(k, c, s->work, s->x, chunk(s->modulation, 2, h), chunk(s->modulation, 4, h), chunk(s->modulation, 3, h));
    adapted_apply(k, ff, s->work, w->ff_in);
    kern_silu_mul(k, gate, gate, up);
    adapted_apply(k, s->work, gate, w->ff_out);
}

static const struct transformer_stream *stream_of(const struct transformer_double *w, const struct piece *s)
{
    return s->is_text ? &w->text : &w->image;
}

static void double_block(struct kern *k, const struct transformer_config *c, const struct transformer_double *w,
                         const struct transformer_state *s, const struct transformer_input *in, struct double_state *d, int block)
{
    const struct double_part *end = d->parts + d->part_count;
    for (const struct double_part *p = d->parts; p < end; p++) {
        if (block)
            kern_sum_end(k, p->work);
        for (int i = 0; i < p->count; i++)
            double_project(k, c, stream_of(w, &p->pieces[i]), in, &p->pieces[i], d, block == 0);
    }
    exchange_kv(k, s, in, d->k, d->v, block);
    for (const struct double_part *p = d->parts; p < end; p++) {
        for (int i = 0; i < p->count; i++)
            double_attend(k, c, stream_of(w, &p->pieces[i]), &p->pieces[i], d);
        kern_sum_begin(k, p->work);
    }
    for (const struct double_part *p = d->parts; p < end; p++) {
        kern_sum_end(k, p->work);
        for (int i = 0; i < p->count; i++)
            double_mlp(k, c, stream_of(w, &p->pieces[i]), &p->pieces[i], d);
        kern_sum_begin(k, p->work);
    }
}

/* The branch that the last of the double blocks left. */
static void leave(struct kern *k, const struct transformer_config *c, const struct double_part *p)
{
    kern_sum_end(k, p->work);
    for (int i = 0; i < p->count; i++) {
        const struct piece *s = &p->pieces[i];
        kern_gated_add(k, s->x, chunk(s->modulation, 5, c->hidden), per_image(s->work, s->x.shape[0]));
    }
}

/* Rows of a stream, if there are any, as the next piece of a part. */
static void add_piece(struct double_part *p, const struct transformer_state *s, const struct transformer_input *in, struct tensor work,
                      bool is_text, int64_t first, int64_t rows)
{
    if (rows)
        p->pieces[p->count++] = (struct piece){
            .is_text = is_text,
            .x = tensor_slice(s->x, 1, first, rows),
            .work = tensor_slice(work, 0, s->batch * first, s->batch * rows),
            .rows = rows,
            .first = first,
            .first_key = is_text ? first : first + s->kv_rows,
            .modulation = is_text ? in->times.text : in->times.image,
        };
}

/* The last part has its share of the rows if the image has so many. */
static void cut_doubles(struct kern *k, struct double_state *d, const struct transformer_state *s, const struct transformer_input *in,
                        struct tensor work)
{
    int64_t rows = query_rows(s), half = kern_sum_parts(k) > 1 ? rows / 2 : 0;
    int64_t last = half < s->image_rows ? half : s->image_rows;
    add_piece(&d->parts[0], s, in, work, true, 0, s->text_rows);
    add_piece(&d->parts[0], s, in, work, false, s->text_rows, s->image_rows - last);
    add_piece(&d->parts[1], s, in, work, false, rows - last, last);
    d->parts[0].work = tensor_slice(work, 0, 0, s->batch * (rows - last));
    d->parts[1].work = tensor_slice(work, 0, s->batch * (rows - last), s->batch * last);
    d->part_count = last ? 2 : 1;
}

/* Rows of the largest piece, of all images. */
static int64_t most_rows(const struct double_state *d)
{
    int64_t most = 0;
    for (int p = 0; p < d->part_count; p++)
        for (int i = 0; i < d->parts[p].count; i++)
            most = d->parts[p].pieces[i].work.shape[0] > most ? d->parts[p].pieces[i].work.shape[0] : most;
    return most;
}

static void run_doubles(struct kern *k, const struct transformer_config *c, const struct transformer_weights *w,
                        struct transformer_state *s, const struct transformer_input *in)
{
    enum tensor_dtype dtype = s->x.dtype;
    int64_t queries[4] = {s->batch, query_rows(s), s->heads, c->attention_head_dim};
    int64_t keys[4] = {s->batch, key_rows(s), s->heads, c->attention_head_dim};
    size_t mark = kern_mark(k);
    struct double_state d = {0};
    cut_doubles(k, &d, s, in, kern_temp(k, dtype, 2, (int64_t[]){s->batch * query_rows(s), c->hidden}));
    int64_t most = most_rows(&d);
    d.qkv = kern_temp(k, dtype, 2, (int64_t[]){most, 3 * s->attention});
    d.q = kern_temp(k, dtype, 4, queries);
    d.k = kern_temp(k, dtype, 4, keys);
    d.v = kern_temp(k, dtype, 4, keys);
    d.mixed = kern_temp(k, dtype, 2, (int64_t[]){most, s->attention});
    d.ff = kern_temp(k, dtype, 2, (int64_t[]){most, 2 * s->mlp});
    for (int i = 0; i < c->num_layers; i++) {
        layer_stream_need(&s->stream, i);
        double_block(k, c, &w->doubles[i], s, in, &d, i);
    }
    for (int p = 0; p < d.part_count; p++)
        leave(k, c, &d.parts[p]);
    kern_rewind(k, mark);
}

/* A part of [b, S, ..]: of several images some, of one some of its rows. */
static struct tensor part_of(struct tensor t, int part, int parts)
{
    int axis = t.shape[0] > 1 ? 0 : 1;
    int64_t first = t.shape[axis] * part / parts;
    return tensor_slice(t, axis, first, t.shape[axis] * (part + 1) / parts - first);
}

struct single_state {
    int parts;
    struct tensor work;  /* [b * S, h]: norm(x), then what the block gave */
    struct tensor in;    /* [b, S, 9h]: q, k, v, gate, up; this rank's share of each */
    struct tensor mixed; /* [b, S, 4h]: attention, mlp; likewise */
    struct tensor k, v;  /* [b, keys, heads, D] when a transformer_kv brings some; else they stay in `in` */
};

/* Values of text and image rows apart, so that there is room for others between them. */
static void spread(struct kern *k, const struct transformer_state *s, struct tensor out, struct tensor x)
{
    kern_copy(k, tensor_slice(out, 1, 0, s->text_rows), tensor_slice(x, 1, 0, s->text_rows));
    kern_copy(k, tensor_slice(out, 1, s->text_rows + s->kv_rows, s->image_rows), tensor_slice(x, 1, s->text_rows, s->image_rows));
}

/* Queries or keys of text and image rows, which out has from out_image on. Where a transformer_kv has rows of the rotary tables
 * between the two, they are turned apart. */
static void turn_joint(struct kern *k, const struct transformer_config *c, const struct transformer_state *s,
                       const struct transformer_input *in, struct tensor out, int64_t out_image, struct tensor x, struct tensor weight)
{
    int64_t apart = s->kv_rows ? s->text_rows : 0, rows = query_rows(s) - apart;
    if (apart)
        turn(k, c, in, tensor_slice(out, 1, 0, apart), tensor_slice(x, 1, 0, apart), weight, 0);
    turn(k, c, in, tensor_slice(out, 1, apart ? out_image : 0, rows), tensor_slice(x, 1, apart, rows), weight, apart + s->kv_rows);
}

/* W2 [attention ; silu(gate) * up], all from one product W1 norm(x), to be added by gate 2 */
static void single_block(struct kern *k, const struct transformer_config *c,
                         const struct transformer_single *w, struct single_state *t, const struct transformer_state *s,
                         struct tensor modulation, const struct transformer_input *in, int block)
{
    int64_t h = c->hidden, own = s->attention, mlp = s->mlp, dim = c->attention_head_dim;
    struct tensor q = tensor_split(tensor_slice(t->in, 2, 0, own), dim);
    struct tensor key = tensor_split(tensor_slice(t->in, 2, own, own), dim), keys = s->kv_rows ? t->k : key;
    struct tensor value = tensor_split(tensor_slice(t->in, 2, 2 * own, own), dim), values = s->kv_rows ? t->v : value;
    struct tensor gate = tensor_slice(t->in, 2, 3 * own, mlp), up = tensor_slice(t->in, 2, 3 * own + mlp, mlp);
    struct tensor before = block ? chunk(modulation, 2, h) : (struct tensor){0}, joint = per_image(t->work, s->batch);

    for (int p = 0; p < t->parts; p++) {
        struct tensor work = tensor_rows(part_of(joint, p, t->parts));
        if (block)
            kern_sum_end(k, work);
        enter(k, c, work, part_of(s->x, p, t->parts), before, chunk(modulation, 1, h), chunk(modulation, 0, h));
        adapted_apply(k, tensor_rows(part_of(t->in, p, t->parts)), work, w->in);
    }
    turn_joint(k, c, s, in, q, s->text_rows, q, w->norm_q);
    turn_joint(k, c, s, in, keys, s->text_rows + s->kv_rows, key, w->norm_k);
    if (s->kv_rows)
        spread(k, s, values, value);
    exchange_kv(k, s, in, keys, values, c->num_layers + block);
    kern_attention(k, tensor_split(tensor_slice(t->mixed, 2, 0, own), dim), q, keys, values, 1.0f / sqrtf((float)dim),
                   (struct kern_mask){0});
    kern_silu_mul(k, tensor_rows(tensor_slice(t->mixed, 2, own, mlp)), tensor_rows(gate), tensor_rows(up));
    for (int p = 0; p < t->parts; p++) {
        struct tensor work = tensor_rows(part_of(joint, p, t->parts));
        adapted_apply(k, work, tensor_rows(part_of(t->mixed, p, t->parts)), w->out);
        kern_sum_begin(k, work);
    }
}

/* velocity = Wp norm(x), rows of the picture, which get the branch of the last block first; here the order is scale, shift */
static void project_out(struct kern *k, const struct transformer_config *c, const struct transformer_weights *w,
                        const struct transformer_state *s, struct tensor work, struct tensor gate, struct tensor velocity,
                        const struct transformer_input *in)
{
    int64_t h = c->hidden;
    struct tensor modulation = in->times.out, picture = kern_temp(k, s->x.dtype, 3, (int64_t[]){s->batch, s->tokens, h});
    kern_gated_add_norm(k, picture, tensor_slice(s->x, 1, s->text_rows, s->tokens), gate,
                        tensor_slice(per_image(work, s->batch), 1, s->text_rows, s->tokens), chunk(modulation, 0, h),
                        chunk(modulation, 1, h), c->eps);
    adapted_apply(k, tensor_rows(velocity), tensor_rows(picture), w->proj_out);
}

static void run_singles(struct kern *k, const struct transformer_config *c,
                        const struct transformer_weights *w, struct transformer_state *s, struct tensor velocity,
                        const struct transformer_input *in)
{
    enum tensor_dtype dtype = s->x.dtype;
    int64_t h = c->hidden, rows = query_rows(s);
    int64_t keys[4] = {s->batch, key_rows(s), s->heads, c->attention_head_dim};
    struct tensor modulation = in->times.single;
    size_t mark = kern_mark(k);
    struct single_state single = {
        .parts = kern_sum_parts(k),
        .work = kern_temp(k, dtype, 2, (int64_t[]){s->batch * rows, h}),
        .in = kern_temp(k, dtype, 3, (int64_t[]){s->batch, rows, 3 * s->attention + 2 * s->mlp}),
        .mixed = kern_temp(k, dtype, 3, (int64_t[]){s->batch, rows, s->attention + s->mlp}),
    };
    if (s->kv_rows) {
        single.k = kern_temp(k, dtype, 4, keys);
        single.v = kern_temp(k, dtype, 4, keys);
    }
    for (int i = 0; i < c->num_single_layers; i++) {
        layer_stream_need(&s->stream, c->num_layers + i);
        single_block(k, c, &w->singles[i], &single, s, modulation, in, i);
    }
    for (int p = 0; p < single.parts; p++)
        kern_sum_end(k, tensor_rows(part_of(per_image(single.work, s->batch), p, single.parts)));
    if (in->checksums.data) {
        kern_checksum(k, tensor_slice(in->checksums, 0, 0, s->batch * rows), tensor_rows(s->x));
        kern_checksum(k, tensor_slice(in->checksums, 0, s->batch * rows, s->batch * rows), single.work);
    }
    if (velocity.data)
        project_out(k, c, w, s, single.work, chunk(modulation, 2, h), velocity, in);
    kern_rewind(k, mark);
}

/* Rows of one image, of x. */
static struct tensor rows_of(const struct transformer_state *s, int64_t image, int64_t first, int64_t rows)
{
    return tensor_rows(tensor_slice(tensor_slice(s->x, 0, image, 1), 1, first, rows));
}

/* The image rows: tokens of the picture, those of its references behind them. */
static void embed(struct kern *k, const struct transformer_weights *w, struct transformer_state *s,
                  const struct transformer_input *in)
{
    for (int64_t b = 0; b < s->batch; b++) {
        if (s->text_rows)
            kern_copy(k, rows_of(s, b, 0, TEXT), in->context[b]);
        adapted_apply(k, rows_of(s, b, s->text_rows, s->tokens), tensor_rows(tensor_slice(in->latents, 0, b, 1)), w->x_embedder);
        if (in->references)
            adapted_apply(k, rows_of(s, b, s->text_rows + s->tokens, s->image_rows - s->tokens), in->references[b], w->x_embedder);
    }
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
        .heads = shard_units(c->num_attention_heads, kern_shares(k)),
        .mlp = shard_units(c->mlp_hidden, kern_shares(k)),
    };
    s.attention = s.heads * c->attention_head_dim;
    assert(in->cos.shape[0] == key_rows(&s) && !(in->keep && batch > 1));
    s.x = kern_temp(k, dtype, 3, (int64_t[]){batch, query_rows(&s), h});
    return s;
}

void transformer_run(struct kern *k, const struct transformer_config *c,
                     const struct transformer_weights *w, struct tensor velocity, const struct transformer_input *in)
{
    size_t mark = kern_mark(k);
    struct transformer_state s = state_of(k, c, in);
    layer_stream_begin(&s.stream, k, w->streamed, w->is_streamed ? c->num_layers + c->num_single_layers : 0);
    embed(k, w, &s, in);
    run_doubles(k, c, w, &s, in);
    run_singles(k, c, w, &s, velocity, in);
    kern_rewind(k, mark);
}
