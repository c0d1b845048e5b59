/* weights.h - takes tensors out of a part's files by name, checks shape and values, converts once.
 *
 * A `weights` is one part (text encoder, transformer, VAE) being loaded: the first missing tensor or
 * wrong shape is kept, later calls do nothing and return empty values, weights_done says how it went -
 * so a model's loading function is a list of names and shapes. NaN or infinite values are an error that
 * names the tensor. What was taken belongs to the kern / the pool and is freed by weights_pool_free.
 * For a dry device (kern_is_dry) names and shapes are checked, values are not read. */
#ifndef KILN_WEIGHTS_H
#define KILN_WEIGHTS_H

#include <stdarg.h>
#include <stdio.h>

#include "adapters.h"
#include "kern.h"
#include "read_ahead.h"
#include "shard.h"
#include "weight_files.h"

struct weights_pool; /* owns everything loaded for one model */
struct weights_pool *weights_pool_new(struct kern *k);
void weights_pool_free(struct weights_pool *pool); /* accepts NULL */

struct weights {
    struct kern *kern;
    struct weights_pool *pool;
    const struct weight_files *files;
    const struct adapters *adapters; /* merged into what is taken, as far as they must be; NULL: none are */
    enum tensor_dtype dtype;  /* compute dtype everything is converted to */
    bool has_fp8_products;    /* of matrices that are FP8 in the file and stay so (kern_linear) */
    const char *part;         /* "transformer", for messages */
    int waiting;              /* of the layers so many stay in host memory until they are needed (layer_stream_waits) */
    struct read_ahead *ahead; /* of what comes next; weights_done ends it */
    bool failed;
    uint64_t parameters;      /* counted as they are taken */
    struct kern_layer *layer; /* being taken, or NULL */
    struct engine_error why;
};

/* Names are printf-style: weights_linear(w, n, k, "transformer_blocks.%d.attn.to_q.weight", i). WEIGHTS_NAME makes `name` of
 * `format` and what follows it in a function's arguments. */
#define WEIGHTS_NAME(name, format)                                                                                     \
    char name[256];                                                                                                    \
    do {                                                                                                               \
        va_list args;                                                                                                  \
        va_start(args, format);                                                                                        \
        vsnprintf(name, sizeof name, format, args);                                                                    \
        va_end(args);                                                                                                  \
    } while (0)
const struct kern_weight *weights_linear(struct weights *w, int64_t n, int64_t k, const char *name, ...)
    __attribute__((format(printf, 4, 5)));
/* Matrices that are quantised in the file may stay there, so `files` must stay open as long as the pool lives.
 * Of a matrix that a team shares, this rank's part (shard.h): weights_linear_rows takes [sum of pieces, k], weights_linear_columns
 * [n, sum of pieces]. weights_linear_stack joins matrices of equal width by rows into one GEMM (q, k, v): a piece is a tensor,
 * names[count], at most 3. */
#define WEIGHTS_STACK_MAX 3
const struct kern_weight *weights_linear_rows(struct weights *w, const struct shard_piece *pieces, int count, int64_t k,
                                              const char *name, ...) __attribute__((format(printf, 5, 6)));
const struct kern_weight *weights_linear_columns(struct weights *w, int64_t n, const struct shard_piece *pieces, int count,
                                                 const char *name, ...) __attribute__((format(printf, 5, 6)));
struct shard weights_shard(const struct weights *w, enum shard_axis axis, const struct shard_piece *pieces, int count); /* this rank's */
const struct kern_weight *weights_linear_stack(struct weights *w, const struct shard_piece *pieces, int64_t k, int count,
                                               const char *const *names);
/* weights_matrix keeps a matrix [n, k] that comes from elsewhere: contiguous f32 in host memory. */
const struct kern_weight *weights_matrix(struct weights *w, struct tensor values);
/* with_bias variants take NAME.weight and NAME.bias; conv is [out, in, size, size]. */
const struct kern_weight *weights_linear_bias(struct weights *w, int64_t n, int64_t k, const char *name, ...)
    __attribute__((format(printf, 4, 5)));
const struct kern_weight *weights_conv_bias(struct weights *w, int64_t out, int64_t in, int size, const char *name, ...)
    __attribute__((format(printf, 5, 6)));
/* weights_vector: a 1-D tensor in the compute dtype. weights_table: a [n, k] matrix in host memory
 * for kern_gather (embedding), in the mapping of the file; n is 0 after a failure. */
struct tensor weights_vector(struct weights *w, int64_t n, const char *name, ...) __attribute__((format(printf, 3, 4)));
struct quant_matrix weights_table(struct weights *w, int64_t n, int64_t k, const char *name, ...)
    __attribute__((format(printf, 4, 5)));
/* What is taken between the two is layer `layer` of `count`: one that waits (kern_layer_begin) belongs to the pool, else NULL.
 * weights_layer_take moves a matrix of the pool that is on the device into it; without a layer, or after a failure, not. */
void weights_layer_begin(struct weights *w, int layer, int count);
void weights_layer_take(struct weights *w, const struct kern_weight *matrix);
struct kern_layer *weights_layer_end(struct weights *w);
bool weights_done(struct weights *w, struct engine_error *why);

#endif
