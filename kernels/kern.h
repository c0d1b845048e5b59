/* kern.h - every operation the models need, on one page, with its shapes.
 *
 * The engine calls these; kern.c checks shapes (assert: they are proven by the engine) and calls the
 * backend's table. kern_cpu.c is the first backend, CUDA the second; nothing in engine/ knows which.
 * Tensors carry their dtype, so each op serves f32 and bf16. In bf16 every op computes in f32 inside
 * and rounds where diffusers on torch 2.15 rounds; the comment of an op names each rounding point.
 *
 * Determinism: the value of an output row depends on its inputs only, never on the number of other
 * rows, the batch, the thread count or the position of the row in memory.
 *
 * Errors: the outside (memory, a device) can fail. The kern object keeps the first error and later
 * ops do nothing; the caller asks once, with kern_sync. */
#ifndef KILN_KERN_H
#define KILN_KERN_H

#include "quant.h"
#include "tensor.h"

struct kern;        /* a backend: its table, threads or stream, arena, first error */
struct kern_weight; /* a matrix or convolution kernel, in the layout the backend wants */
struct kern_layer;  /* weights that wait in host memory until they are needed */

/* kern_close releases the backend. Accepts NULL. Weights must have been freed before. */
void kern_close(struct kern *k);

/* kern_sync waits for everything asked so far; false if anything failed, then kern_error says what. */
bool kern_sync(struct kern *k);
/* kern_recover forgets an error that begins with "no memory" (or is another rank's, that may pass), so that a smaller piece of work may be tried; what was asked
 * since the error has not been done. False if another error is kept: a lost device stays lost until it is opened again. */
bool kern_recover(struct kern *k);
const char *kern_error(const struct kern *k);
bool kern_error_is_memory(const char *text); /* of kern_error, or of what a backend says that cannot open: less may be had */
bool kern_error_is_device(const char *text); /* it failed or was lost: opened again, it may work */
bool kern_is_dry(const struct kern *k); /* values are neither read nor computed (kern_dry.h): a caller need not have any */
bool kern_has_fp8(const struct kern *k); /* has units for products in FP8; else they are made of the same numbers in wider units */
const char *kern_name(const struct kern *k); /* "cpu avx512_bf16, 2 threads" */
size_t kern_peak_bytes(const struct kern *k); /* arena high-water mark + weights */

/* kern_memory: the room on the device; false, and nothing is written, if the backend works in the host's memory. */
struct kern_space {
    size_t all, available; /* of the device; available: not given out to this process or another */
    size_t arena;          /* what the arena has */
};
bool kern_memory(struct kern *k, struct kern_space *ret);

/* The arena. kern_temp gives uninitialised memory (64-byte aligned) that lives until kern_rewind to
 * an earlier mark. The arena grows at the first pass over a shape, unless that was reserved, and not after that. */
struct tensor kern_temp(struct kern *k, enum tensor_dtype dtype, int rank, const int64_t *shape);
size_t kern_mark(struct kern *k);
void kern_rewind(struct kern *k, size_t mark);
/* kern_reserve: the arena has at least so many bytes in one piece, and as long as that is enough it does not grow. Only where
 * there is kern_memory, and while nothing is given out. */
void kern_reserve(struct kern *k, size_t bytes);

/* kern_graph calls work(context), which asks k for operations (the last four parts of this page: linear algebra and what
 * follows, but kern_gather, kern_timestep_embedding and kern_has_nan; and kern_copy), takes arena memory and returns it. It may be
 * called several times and must ask the same each time. A backend may keep what is asked in the form of one launch: the same
 * work on the same tensors, that is, at the same addresses, is then begun at once (not where ranks hold shares). Values are the
 * same either way. */
void kern_graph(struct kern *k, void (*work)(void *context), void *context);

/* kern_write and kern_read move values between host memory and the backend's, converting dtype when
 * it differs (f32 <-> bf16; rounding to nearest even). Same shape, any strides. kern_read syncs. */
void kern_write(struct kern *k, struct tensor out, struct tensor host);
void kern_read(struct kern *k, struct tensor host, struct tensor x);

/* kern_upload copies host values, converted to `dtype`, into memory of the backend that lives until kern_release: vectors
 * of a model. data is NULL after a failure. kern_release takes only what kern_upload gave. */
struct tensor kern_upload(struct kern *k, enum tensor_dtype dtype, struct tensor host);
void kern_release(struct kern *k, struct tensor t);

/* kern_weight_linear converts a [n, k] matrix (row = one output) into the backend's layout; stored
 * in `dtype` (the compute dtype). bias: [n] in `dtype`, or a tensor with data NULL. Both are host memory and may
 * go away afterwards. NULL on no memory.
 * kern_weight_conv does the same for [out, in, kh, kw]. */
struct kern_weight *kern_weight_linear(struct kern *k, enum tensor_dtype dtype, struct tensor w, struct tensor bias);
struct kern_weight *kern_weight_conv(struct kern *k, enum tensor_dtype dtype, struct tensor w, struct tensor bias);
/* kern_weight_quant makes a matrix of rows as a file has them: runs of equal width, one behind the other. A backend may keep
 * the file's form and decode at every product, where that is smaller than `dtype`: a device copies it, the CPU leaves it where it
 * is; then the memory of the runs must outlive the weight, and kern_weight_is_kept says so. The values are those of
 * quant_rows_*, to the bit, but for matrices with products in FP8 (quant_matrix, kern_linear). */
struct kern_weight *kern_weight_quant(struct kern *k, enum tensor_dtype dtype, const struct quant_run *runs, int count);
bool kern_weight_is_kept(const struct kern_weight *w);
void kern_weight_free(struct kern *k, struct kern_weight *w);
size_t kern_weight_bytes(const struct kern_weight *w); /* of a kept one: the file's */

/* Layers, where there is kern_memory. Weights made between kern_layer_begin and kern_layer_end (vectors and biases are not
 * meant) stay in host memory. kern_layer_fetch begins to bring them into a seat, arena memory of kern_layer_bytes at least,
 * as soon as all that was asked before is done; kern_layer_use lets what is asked from then on wait for them. So with two
 * seats in turn one layer comes while the other computes:
 *
 *   fetch 0;  for each i:  use i;  fetch i + 1 into the other seat;  compute with i
 *
 * A layer that was fetched is used once; weights are valid until their seat is fetched into or rewound. Weights and layer
 * are freed in any order. kern_layer_begin gives NULL after a failure.
 *
 * kern_layer_take moves a weight that was made on the device into the layer being made, and gives the device's memory back.
 * Syncs. After a failure the weight is where it was, if the device is not lost. */
struct kern_layer *kern_layer_begin(struct kern *k);
void kern_layer_take(struct kern *k, struct kern_layer *l, struct kern_weight *w);
void kern_layer_end(struct kern *k, struct kern_layer *l);
void kern_layer_free(struct kern *k, struct kern_layer *l);
size_t kern_layer_bytes(const struct kern_layer *l);
void kern_layer_fetch(struct kern *k, struct kern_layer *l, struct tensor seat);
void kern_layer_use(struct kern *k, struct kern_layer *l);

/* --- teams -------------------------------------------------------------------------------------------
 *
 * Backends that hold one model together, each driven by a thread of its own (kern_team.h). All are asked the same in the same
 * order; what is not a share of a matrix has the same bits on all. Who works alone is rank 0 of 1: then there is nothing to do,
 * and what is told is heard. */
int kern_rank(const struct kern *k);
int kern_ranks(const struct kern *k);
/* kern_hold_whole, before weights are made: from now on every rank holds all of each matrix, or its share again. Of one that is
 * held whole there is share 0 of 1, and no sum: ranks may be asked different products. */
void kern_hold_whole(struct kern *k, bool is_whole);
int kern_share(const struct kern *k);
int kern_shares(const struct kern *k);
/* kern_join waits for all ranks and makes a team whole that was broken. It comes before each piece of work, as a failure of
 * one rank ends that of all. False: kern_error says why. */
bool kern_join(struct kern *k);
/* kern_leave: this rank cannot go on, for a reason of its caller's. The others' operations fail, and what they wait for ends. */
void kern_leave(struct kern *k, const char *why);
/* kern_beat: this rank is busy with what is no operation: the others go on waiting for it (kern_team.h). */
void kern_beat(struct kern *k);
/* kern_most: the largest of the ranks' numbers; this one's own after a failure. The device is not waited for. */
int64_t kern_most(struct kern *k, int64_t number);
/* kern_agree: an error if a number differs between ranks. */
void kern_agree(struct kern *k, int64_t number, const char *what);
/* kern_sum_ranks: x = sum over all ranks of what each made with its shares, from rank 0 on in f32, one rounding; the same bits on
 * all. x: contiguous
 *
 * kern_sum_begin and kern_sum_end are that in two: what is asked between them may run meanwhile and leaves x alone. Sums end in the order
 * in which they began, up to KERN_SUMS_MAX are under way. kern_sum_parts: into how many parts a sum is best cut, so that one is under
 * way while the next is computed; 1 where nothing runs meanwhile. kern_weight_is_decoded: each product with the weight decodes all of it
 * first, which so many parts would do so many times. */
#define KERN_SUMS_MAX 4
void kern_sum_ranks(struct kern *k, struct tensor x);
void kern_sum_begin(struct kern *k, struct tensor x);
void kern_sum_end(struct kern *k, struct tensor x);
int kern_sum_parts(const struct kern *k);
bool kern_weight_is_decoded(const struct kern_weight *w);
/* kern_exchange_ranks: x [ranks * n, ..], contiguous, of which each rank made part kern_rank: then all have all, to the bit. It moves
 * what a sum of x does. minus_zero [width of x]: of -0, which added to a value leaves its bits. */
void kern_exchange_ranks(struct kern *k, struct tensor x, struct tensor minus_zero);
/* kern_checksum: out[r] = sum over c of (2c + 1) * bits of x[r,c], modulo 2^32: with kern_agree it shows whether what should
 * be the same on all ranks is.   x [rows, width] any strides, out [rows] i32, contiguous */
void kern_checksum(struct kern *k, struct tensor out, struct tensor x);

/* --- moving ------------------------------------------------------------------------------------ */

/* kern_copy: out = x; same shape, any strides, dtype converted. */
void kern_copy(struct kern *k, struct tensor out, struct tensor x);
/* kern_gather: out[r,:] = table[ids[r],:]   table [vocab, width], ids [rows] i32 (checked by caller). Both are host memory:
 * a table of embeddings is as large as several layers and a prompt needs few of its rows, so it stays in the file, in
 * whatever form it has there. */
void kern_gather(struct kern *k, struct tensor out, const struct quant_matrix *table, struct tensor ids);

/* --- linear algebra ---------------------------------------------------------------------------- */

/* kern_linear: out[r,n] = sum_k x[r,k] * w[n,k] (+ bias[n]); f32 sums, one rounding.
 * x [rows, k], out [rows, n]; both may be column slices of wider rows.
 *
 * A matrix with products in FP8 has instead, c[n,k] being its codes as they are:
 *   q[r,k] = x[r,k] / s[r] to the nearest e4m3, ties to even; 448 where it is larger
 *   out[r,n] = (sum_k q[r,k] * c[n,k]) * (scale * s[r]); f32 sums, one rounding
 *   s[r] = the matrix's input_scale, or, where that is 0, quant_row_scale of the row */
void kern_linear(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w);

/* kern_conv2d: 2-D convolution, channels last. x [b, h, w, in], out [b, h', w', out]; zero padding `pad` at the top and at
 * the left. h' and w' are those of the same padding at the bottom and right, or of one pixel more there (stride 2 and no
 * padding halves an even picture that way). f32 sums, bias added in f32, one rounding. */
void kern_conv2d(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w, int stride, int pad);

struct kern_mask {
    bool causal;            /* key j is visible to query i only if j <= i */
    const int32_t *key_count; /* per batch: keys at and beyond this are hidden; NULL: all visible.
                                 Host memory. */
};
/* kern_attention: softmax(q k^T * scale) v per head, scale > 0, streaming, f32 inside, one rounding of the result.
 * q, out [b, rows, heads, d]   key, value [b, keys, kv_heads, d]   head g reads kv head g / (heads / kv_heads) */
void kern_attention(struct kern *k, struct tensor out, struct tensor q, struct tensor key, struct tensor value,
                    float scale, struct kern_mask mask);

/* --- norms ------------------------------------------------------------------------------------- */

enum kern_rounding {
    KERN_ROUND_ONCE,          /* torch.nn.RMSNorm: times the weight in f32, one rounding */
    KERN_ROUND_BEFORE_WEIGHT, /* Qwen3: round, then times the weight, round */
};
/* kern_rms_norm: out = x * weight / sqrt(mean(x^2) + eps) over the last axis; f32 sums.
 * x, out [.., width] any strides on the outer axes; weight [width]. out may be x. */
void kern_rms_norm(struct kern *k, struct tensor out, struct tensor x, struct tensor weight, float eps,
                   enum kern_rounding rounding);
/* kern_layer_norm_modulate: out = (1 + scale) * layer_norm(x) + shift; no affine, f32 statistics.
 * bf16: layer_norm rounded, 1 + scale rounded, product rounded, sum rounded.
 * x, out [.., width]   scale, shift [width] */
void kern_layer_norm_modulate(struct kern *k, struct tensor out, struct tensor x, struct tensor scale,
                              struct tensor shift, float eps);
/* kern_gated_add_norm: kern_gated_add(x, gate, y), then kern_layer_norm_modulate(out, x, scale, shift, eps), to the bit; a
 * device reads and writes x once. x, y, out [.., width]   gate, scale, shift [width]. out may be y. */
void kern_gated_add_norm(struct kern *k, struct tensor out, struct tensor x, struct tensor gate, struct tensor y,
                         struct tensor scale, struct tensor shift, float eps);
/* kern_group_norm: per sample and group of channels; then SiLU if asked (norm rounded, silu rounded).
 * x, out [b, h, w, c]   weight, bias [c] */
void kern_group_norm(struct kern *k, struct tensor out, struct tensor x, struct tensor weight, struct tensor bias,
                     int groups, float eps, bool silu);

/* --- element by element (out may be an input) ------------------------------------------------------ */

void kern_silu(struct kern *k, struct tensor out, struct tensor x);                        /* one rounding */
void kern_silu_mul(struct kern *k, struct tensor out, struct tensor gate, struct tensor up); /* silu rounded, product rounded */
void kern_add(struct kern *k, struct tensor out, struct tensor a, struct tensor b);
/* kern_gated_add: x = x + gate * y; product rounded, sum rounded. x, y [.., width], gate [width] */
void kern_gated_add(struct kern *k, struct tensor x, struct tensor gate, struct tensor y);
/* kern_add_scaled: x = x + s * y; product rounded, sum rounded, s as it is. Any strides on the outer axes. */
void kern_add_scaled(struct kern *k, struct tensor x, struct tensor y, float s);

enum kern_rope_layout {
    KERN_ROPE_HALVES, /* Qwen3: pairs (j, j + d/2); cos and sin rounded to the dtype, both products
                         and the sum rounded */
    KERN_ROPE_PAIRS,  /* FLUX.2: pairs (2j, 2j + 1); all in f32, one rounding */
};
/* kern_rms_rope: kern_rms_norm over d with its roundings, then turned by cos, sin [rows, d/2] f32.
 * x, out [b, rows, heads, d]   weight [d]. out may be x. */
void kern_rms_rope(struct kern *k, struct tensor out, struct tensor x, struct tensor weight, float eps,
                   enum kern_rounding rounding, struct tensor cos, struct tensor sin, enum kern_rope_layout layout);

/* --- sampling and image ends ------------------------------------------------------------------------ */

/* kern_timestep_embedding: out[0..127] = cos(t f_i), out[128..255] = sin(t f_i), f_i = exp(-ln(10000) i / 128),
 * f32 products (engine-spec 5.1), f_i as torch rounds them. out [1, channels] */
void kern_timestep_embedding(struct kern *k, struct tensor out, float t);
/* kern_guide: out = u + g * (c - u); in bf16 each of the three operations rounds. */
void kern_guide(struct kern *k, struct tensor out, struct tensor c, struct tensor u, float g);
/* kern_euler: x = x + dt * v, as kern_add_scaled with dt rounded to the dtype of x. */
void kern_euler(struct kern *k, struct tensor x, struct tensor v, float dt);
/* kern_mix: out = (1 - share) * a + share * b, one share per row; 1 - share, both products and the sum round. share is of the
 * dtype of the others. out, a, b [rows, width], share [rows] */
void kern_mix(struct kern *k, struct tensor out, struct tensor a, struct tensor b, struct tensor share);
/* kern_unpatchify: tokens [b, h * w, 4c] -> out [b, 2h, 2w, c], token channel 4 ch + 2 (row parity) +
 * (column parity); each value first times std[4c] plus mean[4c], rounded after each. */
void kern_unpatchify(struct kern *k, struct tensor out, struct tensor tokens, struct tensor mean, struct tensor std);
/* kern_patchify: the way back: x [b, 2h, 2w, c] -> tokens [b, h * w, 4c]; each value first minus mean[4c], then divided by
 * std[4c], rounded after each. x may be a slice of the channels of a wider picture. */
void kern_patchify(struct kern *k, struct tensor tokens, struct tensor x, struct tensor mean, struct tensor std);
/* kern_upsample2: nearest neighbour. x [b, h, w, c] -> out [b, 2h, 2w, c] */
void kern_upsample2(struct kern *k, struct tensor out, struct tensor x);
/* kern_pixels: u8 = round_half_even(255 * clamp(0.5 x + 0.5, 0, 1)); in bf16 0.5x and the sum round. x, out [b, h, w, 3] */
void kern_pixels(struct kern *k, struct tensor out, struct tensor x);
/* kern_has_nan: true if any value is NaN or infinite. Syncs. */
bool kern_has_nan(struct kern *k, struct tensor x);

#endif
