/* transformer.h - the FLUX.2 transformer: latents, text and a time in, velocity out (engine-spec 5).
 *
 * What depends on less than everything is computed apart, once: modulations on the time only
 * (transformer_times, all steps in one go), the context on the prompt only (transformer_context), the rotary
 * tables on the shape only (transformer_rope). transformer_run does the rest, for a batch at one step.
 *
 * Reference images are tokens like those of the picture, R in all, at other positions. Either they stand behind the
 * picture's at every step, or (klein-9b-kv) a run over the references alone keeps their keys and values in a transformer_kv,
 * and the steps find those between text and picture.
 *
 * Of a team each rank has its heads and its part of every MLP; the ranks' sums make rows whole: once for both streams of a
 * double block after attention and after the MLP, once for a single block. Shapes below are those of a rank alone.
 *
 * h = hidden, D = attention_head_dim, N = tokens of the picture, S = rows of a sequence: text, then image rows. */
#ifndef KILN_TRANSFORMER_H
#define KILN_TRANSFORMER_H

#include "adapted.h"
#include "model_config.h"

#define TRANSFORMER_TEXT_ROWS 512

struct transformer_stream {              /* one of the two streams of a double block */
    const struct adapted_linear *qkv;    /* [3h, h] */
    const struct adapted_linear *out;    /* [h, h] */
    const struct adapted_linear *ff_in;  /* [6h, h]: gate, up */
    const struct adapted_linear *ff_out; /* [h, 3h] */
    struct tensor norm_q, norm_k;        /* [D] */
};
struct transformer_double {
    struct transformer_stream image, text;
};
struct transformer_single {
    const struct adapted_linear *in;     /* [9h, h]: q, k, v, gate, up */
    const struct adapted_linear *out;    /* [h, 4h]: attention, mlp */
    struct tensor norm_q, norm_k;        /* [D] */
};

struct transformer_weights {
    const struct adapted_linear *x_embedder;         /* [h, 128] */
    const struct adapted_linear *context_embedder;   /* [h, joint_attention_dim] */
    const struct adapted_linear *time_in, *time_out; /* [h, 256], [h, h] */
    const struct adapted_linear *modulation_image, *modulation_text; /* [6h, h] */
    const struct adapted_linear *modulation_single;  /* [3h, h] */
    const struct adapted_linear *norm_out;           /* [2h, h]: scale, shift */
    const struct adapted_linear *proj_out;           /* [128, h] */
    struct transformer_double *doubles;              /* [num_layers] */
    struct transformer_single *singles;              /* [num_single_layers] */
    struct adapted_list linears;                     /* all of these */
    struct kern_layer **streamed;                    /* [num_layers + num_single_layers]: their matrices; NULL: on the device */
    bool is_streamed;                                /* some wait in host memory */
};

/* transformer_load names what is taken (weights_done tells how it went) and allocates the lists; adapted_set gives adapters to
 * the linears. transformer_unload frees the lists and accepts a zeroed struct. */
void transformer_load(struct transformer_weights *ret, const struct transformer_config *c, struct weights *w);
void transformer_unload(struct transformer_weights *w);

/* transformer_wait moves matrices into host memory until w->waiting blocks are there; w has the pool of them. After a failure, which
 * w keeps, some have moved. */
void transformer_wait(struct transformer_weights *t, const struct transformer_config *c, struct weights *w);

/* A row per step; every block of a kind uses the same modulation. */
struct transformer_times {
    struct tensor all;         /* [steps, 17h]: the four below beside each other */
    struct tensor image, text; /* [steps, 6h]: shift, scale, gate of attention; shift, scale, gate of the MLP */
    struct tensor single;      /* [steps, 3h]: shift, scale, gate */
    struct tensor out;         /* [steps, 2h]: scale, shift */
    struct tensor temb;        /* [steps, h] */
};
/* transformer_times fills arena memory: model_time[i] is what the time embedding sees at step i. */
void transformer_times(struct kern *k, const struct transformer_config *c, const struct transformer_weights *w,
                       enum tensor_dtype dtype, struct transformer_times *ret, const float *model_time, int steps);
/* transformer_times_at: one row as a view, temb left out. transformer_times_temp: arena memory for one row, whichever will be
 * copied to its `all`: what a step computes with is then at one place at every step. */
struct transformer_times transformer_times_at(const struct transformer_times *times, int step);
struct transformer_times transformer_times_temp(struct kern *k, const struct transformer_config *c, enum tensor_dtype dtype);

/* transformer_context: out [rows, h] = embeds [rows, joint_attention_dim] through the context embedder. */
void transformer_context(struct kern *k, const struct transformer_weights *w, struct tensor out, struct tensor embeds);

/* A picture of h x w tokens in a sequence: the one that is made has t 0, reference n has 10 + 10 n. */
struct transformer_grid {
    int h, w, t;
};
/* transformer_rope fills host tables cos, sin [512 + sum of h * w, D / 2]: text row j turns by (0,0,0,j), then for each
 * picture its token (r, c) by (t,r,c,0). Angles in double, as in the reference. */
void transformer_rope(const struct transformer_config *c, float *cos, float *sin, const struct transformer_grid *grids, int count);

/* Keys (normalised and rotated) and values of the references of one picture, by block: double blocks first. */
struct transformer_kv {
    struct tensor k, v;            /* [blocks, R, heads, D] */
};
/* transformer_kv_temp: arena memory for R = rows tokens. */
struct transformer_kv transformer_kv_temp(struct kern *k, const struct transformer_config *c, enum tensor_dtype dtype, int64_t rows);

struct transformer_input {
    struct tensor latents;         /* [b, N, 128] */
    const struct tensor *context;  /* b of [512, h], may repeat; NULL: a sequence without text */
    const struct tensor *references; /* b of [R, 128], may repeat: behind the picture's tokens; NULL: none */
    const struct transformer_kv *const *kv; /* b of them, may repeat: between text and picture; NULL: none */
    struct transformer_kv *keep;   /* b = 1: gets keys and values of all image rows; or NULL */
    struct tensor cos, sin;        /* f32 on the device, [rows, D / 2]: text, kv, image rows */
    struct transformer_times times; /* of one row */
    struct tensor checksums;       /* i32 [2 * b * S]: gets those of all rows behind the last block and of what it adds to them, the
                                      same on all ranks; or data NULL */
};
/* transformer_run: velocity [b, N, 128], or data NULL when only `keep` is wanted. Rows of one image do not depend on the
 * other images. */
void transformer_run(struct kern *k, const struct transformer_config *c,
                     const struct transformer_weights *w, struct tensor velocity, const struct transformer_input *in);

#endif
