/* weights.c - tensors by name into the backend's layout, checked for shape, dtype and NaN on the way.
 *
 * Matrices go to the backend as rows in the file: it decodes and packs them on all its threads, or keeps them where they
 * are if they are quantised. Only what adapters are merged into is decoded here first, since its sum is made in f32, and the few
 * matrices whose rows in a GGUF file are not their own; both are then weights like any other, in the compute dtype. */
#include "weights.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layer_stream.h"

struct weights_pool {
    struct kern *kern;
    struct kern_weight **packed;
    size_t packed_count;
    struct tensor *vectors; /* of the backend */
    size_t vector_count;
    void **memory;          /* of the host */
    size_t memory_count;
    struct kern_layer **layers;
    size_t layer_count;
};

struct weights_pool *weights_pool_new(struct kern *k)
{
    struct weights_pool *pool = calloc(1, sizeof *pool);
    if (pool)
        pool->kern = k;
    return pool;
}

void weights_pool_free(struct weights_pool *pool)
{
    if (!pool)
        return;
    for (size_t i = 0; i < pool->packed_count; i++)
        kern_weight_free(pool->kern, pool->packed[i]);
    for (size_t i = 0; i < pool->vector_count; i++)
        kern_release(pool->kern, pool->vectors[i]);
    for (size_t i = 0; i < pool->memory_count; i++)
        free(pool->memory[i]);
    for (size_t i = 0; i < pool->layer_count; i++)
        kern_layer_free(pool->kern, pool->layers[i]);
    free(pool->layers);
    free(pool->packed);
    free(pool->vectors);
    free(pool->memory);
    free(pool);
}

__attribute__((format(printf, 3, 4))) static void fail(struct weights *w, enum engine_fault fault, const char *format, ...)
{
    if (w->failed)
        return;
    char text[768];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    engine_error_set(&w->why, fault, "%s: %s", w->part, text);
    w->failed = true;
}

/* A place for one more at the end of a list of the pool, `bytes` each; NULL after the failure was kept. */
static void *place_in(struct weights *w, void *list, size_t *count, size_t bytes)
{
    void *grown, *old;
    memcpy(&old, list, sizeof old);
    grown = realloc(old, (*count + 1) * bytes);
    if (!grown) {
        fail(w, ENGINE_NO_MEMORY, "no memory for weights");
        return NULL;
    }
    memcpy(list, &grown, sizeof grown);
    return (char *)grown + (*count)++ * bytes;
}

/* keep: the pool owns what was made; where there is no place in its lists, it is freed. */
static bool keep_memory(struct weights *w, void *memory)
{
    void **place = place_in(w, &w->pool->memory, &w->pool->memory_count, sizeof *place);
    if (!place) {
        free(memory);
        return false;
    }
    *place = memory;
    return true;
}

/* What the backend could not do: not enough memory for it, or the device itself. */
static void fail_kern(struct weights *w)
{
    const char *text = *kern_error(w->kern) ? kern_error(w->kern) : "no memory for weights";
    fail(w, kern_error_is_memory(text) ? ENGINE_NO_MEMORY : ENGINE_DEVICE, "%s", text);
}

static struct tensor keep_vector(struct weights *w, struct tensor t)
{
    if (!t.data) {
        fail_kern(w);
        return (struct tensor){0};
    }
    struct tensor *place = place_in(w, &w->pool->vectors, &w->pool->vector_count, sizeof *place);
    if (!place) {
        kern_release(w->kern, t);
        return (struct tensor){0};
    }
    return *place = t;
}

static const struct kern_weight *keep_packed(struct weights *w, struct kern_weight *packed)
{
    if (!packed) {
        fail_kern(w);
        return NULL;
    }
    struct kern_weight **place = place_in(w, &w->pool->packed, &w->pool->packed_count, sizeof *place);
    if (!place) {
        kern_weight_free(w->kern, packed);
        return NULL;
    }
    return *place = packed;
}

/* --- finding and checking ------------------------------------------------------------------------------ */

static const char *shape_text(char *to, size_t bytes, int rank, const int64_t *shape)
{
    size_t used = (size_t)snprintf(to, bytes, "[");
    for (int i = 0; i < rank && used < bytes; i++)
        used += (size_t)snprintf(to + used, bytes - used, "%s%lld", i ? "," : "", (long long)shape[i]);
    if (used < bytes)
        snprintf(to + used, bytes - used, "]");
    return to;
}

/* On a dry device nothing is read: what is true of the pages stays true for who will read them. */
static void advise(const struct weights *w, const struct weight *e, enum safetensors_use use)
{
    if (!kern_is_dry(w->kern))
        weight_files_advise(e, use);
}

/* "transformer_blocks.9.ff.linear_in.weight" of "transformer_blocks.8.ff.linear_in.weight"; false of what is of no block. */
static bool name_in_next_block(char *to, size_t bytes, const char *name)
{
    size_t before = strcspn(name, "0123456789"), digits = strspn(name + before, "0123456789");
    if (before == 0 || name[before - 1] != '.' || name[before + digits] != '.')
        return false;
    return (size_t)snprintf(to, bytes, "%.*s%ld%s", (int)before, name, strtol(name + before, NULL, 10) + 1, name + before + digits) < bytes;
}

/* So that the disk works while this one is packed. A fault in the files is told when the tensor's turn comes. */
static void read_next(struct weights *w, const char *name)
{
    char next[sizeof ((struct weight *)0)->asked];
    struct weight e;
    struct engine_error why;
    if (!name_in_next_block(next, sizeof next, name) || !weight_files_find(w->files, &e, next, &why))
        return;
    w->ahead = w->ahead ? w->ahead : read_ahead_open();
    read_ahead_add(w->ahead, &e);
}

/* Reads all of it, but on a dry device. */
static bool is_finite(struct weights *w, const struct weight *e)
{
    if (kern_is_dry(w->kern))
        return true;
    read_next(w, e->asked);
    weight_files_advise(e, SAFETENSORS_NOW);
    return weight_files_is_finite(e);
}

static bool find(struct weights *w, struct weight *ret, const char *name, int rank, const int64_t *shape)
{
    struct engine_error why;
    char got[128], want[128];
    if (w->failed)
        return false;
    kern_beat(w->kern); /* a tensor may take seconds to read */
    if (!weight_files_find(w->files, ret, name, &why)) {
        fail(w, why.fault, "%s", why.text);
        return false;
    }
    if (ret->rank != rank || memcmp(ret->shape, shape, (size_t)rank * sizeof *shape) != 0) {
        fail(w, ENGINE_BAD_MODEL, "%s: tensor '%s': shape %s, want %s", ret->file, name,
             shape_text(got, sizeof got, ret->rank, ret->shape), shape_text(want, sizeof want, rank, shape));
        return false;
    }
    if (!is_finite(w, ret)) {
        fail(w, ENGINE_BAD_MODEL, "%s: tensor '%s' has NaN or infinite values", ret->file, ret->name);
        return false;
    }
    w->parameters += (uint64_t)weight_files_values(ret);
    return true;
}

/* The values as the file has them, or decoded to the compute dtype into *ret_memory, which the caller frees. */
static struct tensor view(struct weights *w, const struct weight *e, void **ret_memory)
{
    struct tensor t = weight_files_view(e);
    *ret_memory = NULL;
    if (t.data)
        return t;
    t = tensor_of(NULL, w->dtype, e->rank, e->shape);
    t.data = *ret_memory = malloc(tensor_bytes(t) + 1);
    if (!t.data)
        fail(w, ENGINE_NO_MEMORY, "no memory to convert '%s'", e->name);
    else if (!kern_is_dry(w->kern))
        weight_files_decode(t, e);
    return t;
}

/* The values of an entry in the compute dtype, in the backend's memory. */
static struct tensor upload(struct weights *w, const struct weight *e)
{
    void *converted;
    struct tensor source = view(w, e, &converted), t = {0};
    if (!w->failed)
        t = keep_vector(w, kern_upload(w->kern, w->dtype, source));
    free(converted);
    advise(w, e, SAFETENSORS_DONE);
    return t;
}

/* --- matrices, one or several by rows ---------------------------------------------------------------------------- */

static bool is_merged(const struct weights *w, const struct weight *e)
{
    return adapters_merge(w->adapters, e->asked);
}

#define RUNS_MAX (WEIGHTS_STACK_MAX * SHARD_PIECES_MAX * WEIGHT_FILES_RUNS_MAX)

/* A matrix of the files and what of it is taken. */
struct part {
    struct weight e;
    struct shard shard;
    void *copy; /* its columns in the file's format, or NULL */
};

static bool is_whole(const struct part *p)
{
    return shard_length(&p->shard) == p->e.shape[p->shard.axis];
}

/* Columns are moved together into memory of their own; 0: they cannot be, or the failure was kept. */
static int columns_of(struct weights *w, struct part *p, const struct quant_run *runs, int count, struct quant_run *ret)
{
    size_t bytes[WEIGHT_FILES_RUNS_MAX], total = 0;
    for (int i = 0; i < count; i++) {
        bytes[i] = shard_columns_bytes(&runs[i], &p->shard);
        if (!bytes[i])
            return 0;
        total += bytes[i];
    }
    char *to = kern_is_dry(w->kern) ? NULL : malloc(total);
    if (!to && !kern_is_dry(w->kern)) {
        fail(w, ENGINE_NO_MEMORY, "no memory for a part of '%s'", p->e.name);
        return 0;
    }
    p->copy = to;
    for (int i = 0; i < count; to += to ? bytes[i] : 0, i++)
        ret[i] = shard_columns(to, &runs[i], &p->shard);
    return count;
}

/* The runs of all parts; 0: the kernels cannot read them where they are. */
static int runs_of(struct weights *w, struct part *parts, int count, struct quant_run *ret)
{
    int runs = 0;
    for (int i = 0; i < count; i++) {
        struct quant_run whole[WEIGHT_FILES_RUNS_MAX];
        int of_part = is_merged(w, &parts[i].e) ? 0 : weight_files_runs(&parts[i].e, whole);
        if (is_whole(&parts[i]))
            memcpy(ret + runs, whole, (size_t)of_part * sizeof *whole);
        else if (parts[i].shard.axis == SHARD_COLUMNS)
            of_part = of_part ? columns_of(w, &parts[i], whole, of_part, ret + runs) : 0;
        else
            of_part = shard_rows(ret + runs, whole, of_part, &parts[i].shard);
        if (of_part == 0)
            return 0;
        runs += of_part;
    }
    return runs;
}

/* `to` [n, k], contiguous, gets the weight and the changes that are merged into it: that in f32, rounded once when it is whole. */
static void decode(struct weights *w, struct tensor to, const struct weight *e)
{
    struct engine_error why;
    if (kern_is_dry(w->kern))
        return;
    weight_files_decode(to, e);
    if (is_merged(w, e) && !adapters_apply(w->adapters, e->asked, to.data, e->shape[0], e->shape[1], &why))
        fail(w, why.fault, "%s", why.text);
}

/* The same for a part, through the whole: changes by adapters look at all of it. */
static void decode_part(struct weights *w, struct tensor to, const struct part *p)
{
    if (is_whole(p)) {
        decode(w, to, &p->e);
        return;
    }
    struct tensor whole = tensor_2d(NULL, to.dtype, p->e.shape[0], p->e.shape[1]);
    whole.data = malloc(tensor_bytes(whole));
    if (!whole.data) {
        fail(w, ENGINE_NO_MEMORY, "no memory to convert '%s'", p->e.name);
        return;
    }
    decode(w, whole, &p->e);
    if (!kern_is_dry(w->kern))
        shard_copy(to, whole, &p->shard);
    free(whole.data);
}

static int64_t part_side(const struct part *p, enum shard_axis axis)
{
    return p->shard.axis == axis ? shard_length(&p->shard) : p->e.shape[axis];
}

/* One after the other into one matrix; all are known to be there, so that its size is that of real data. */
static struct kern_weight *pack_decoded(struct weights *w, const struct part *parts, int count)
{
    enum tensor_dtype dtype = w->dtype;
    int64_t total = 0, at = 0;
    for (int i = 0; i < count; i++) {
        total += part_side(&parts[i], SHARD_ROWS);
        dtype = is_merged(w, &parts[i].e) ? TENSOR_F32 : dtype;
    }
    struct tensor all = tensor_2d(NULL, dtype, total, part_side(parts, SHARD_COLUMNS));
    all.data = malloc(tensor_bytes(all));
    if (!all.data) {
        fail(w, ENGINE_NO_MEMORY, "no memory to convert '%s'", parts[0].e.name);
        return NULL;
    }
    for (int i = 0; i < count; at += part_side(&parts[i++], SHARD_ROWS))
        decode_part(w, tensor_slice(all, 0, at, part_side(&parts[i], SHARD_ROWS)), &parts[i]);
    struct kern_weight *packed = w->failed ? NULL : kern_weight_linear(w->kern, w->dtype, all, (struct tensor){0});
    free(all.data);
    return packed;
}

/* What the backend keeps as it is in the file stays mapped, or is the pool's if it is a copy; of all else a model has one copy, the packed
 * one. */
static void settle_part(struct weights *w, struct part *p, bool is_kept)
{
    if (!is_kept || p->copy)
        advise(w, &p->e, SAFETENSORS_DONE);
    if (p->copy && is_kept)
        keep_memory(w, p->copy);
    else
        free(p->copy);
}

static const struct kern_weight *pack(struct weights *w, struct part *parts, int count)
{
    struct quant_run runs[RUNS_MAX];
    int run_count = runs_of(w, parts, count, runs);
    struct kern_weight *packed = NULL;
    for (int i = 0; i < run_count; i++)
        runs[i].matrix.has_fp8_products = w->has_fp8_products && runs[i].matrix.has_fp8_products;
    if (run_count)
        packed = kern_weight_quant(w->kern, w->dtype, runs, run_count);
    else if (!w->failed)
        packed = pack_decoded(w, parts, count);
    const struct kern_weight *kept = w->failed ? NULL : keep_packed(w, packed);
    for (int i = 0; i < count; i++)
        settle_part(w, &parts[i], kept && kern_weight_is_kept(kept));
    return w->failed ? NULL : kept;
}

const struct kern_weight *weights_matrix(struct weights *w, struct tensor values)
{
    return w->failed ? NULL : keep_packed(w, kern_weight_linear(w->kern, w->dtype, values, (struct tensor){0}));
}

const struct kern_weight *weights_linear(struct weights *w, int64_t n, int64_t k, const char *format, ...)
{
    WEIGHTS_NAME(name, format);
    struct part p = {.shard = shard_whole(n)};
    return find(w, &p.e, name, 2, (int64_t[]){n, k}) ? pack(w, &p, 1) : NULL;
}

struct shard weights_shard(const struct weights *w, enum shard_axis axis, const struct shard_piece *pieces, int count)
{
    return shard_of(axis, pieces, count, kern_share(w->kern), kern_shares(w->kern));
}

const struct kern_weight *weights_linear_rows(struct weights *w, const struct shard_piece *pieces, int count, int64_t k,
                                              const char *format, ...)
{
    WEIGHTS_NAME(name, format);
    struct part p = {.shard = weights_shard(w, SHARD_ROWS, pieces, count)};
    return find(w, &p.e, name, 2, (int64_t[]){shard_whole_length(pieces, count), k}) ? pack(w, &p, 1) : NULL;
}

const struct kern_weight *weights_linear_columns(struct weights *w, int64_t n, const struct shard_piece *pieces, int count,
                                                 const char *format, ...)
{
    WEIGHTS_NAME(name, format);
    struct part p = {.shard = weights_shard(w, SHARD_COLUMNS, pieces, count)};
    return find(w, &p.e, name, 2, (int64_t[]){n, shard_whole_length(pieces, count)}) ? pack(w, &p, 1) : NULL;
}

const struct kern_weight *weights_linear_stack(struct weights *w, const struct shard_piece *pieces, int64_t k, int count,
                                               const char *const *names)
{
    struct part parts[WEIGHTS_STACK_MAX] = {0};
    assert(count <= WEIGHTS_STACK_MAX);
    for (int i = 0; i < count; i++) {
        parts[i].shard = weights_shard(w, SHARD_ROWS, &pieces[i], 1);
        if (!find(w, &parts[i].e, names[i], 2, (int64_t[]){shard_whole_length(&pieces[i], 1), k}))
            return NULL;
    }
    return pack(w, parts, count);
}

/* --- with a bias ---------------------------------------------------------------------------------------------------- */

/* The values of an entry in the compute dtype, in host memory the caller frees. */
static struct tensor host_copy(struct weights *w, const struct weight *e)
{
    void *converted;
    struct tensor source = view(w, e, &converted), t = tensor_of(NULL, w->dtype, e->rank, e->shape);
    if (!w->failed)
        t.data = malloc(tensor_bytes(t));
    if (t.data)
        tensor_convert(t, source);
    else
        fail(w, ENGINE_NO_MEMORY, "no memory to convert '%s'", e->name);
    free(converted);
    return t;
}

/* Decoded at load, whatever the format: these are the VAE's, 84 million values at most. */
static const struct kern_weight *pack_biased(struct weights *w, const struct weight *e, const struct weight *bias)
{
    void *converted;
    struct tensor source = view(w, e, &converted);
    struct tensor rounded = host_copy(w, bias);
    const struct kern_weight *packed = NULL;
    if (!w->failed)
        packed = keep_packed(w, e->rank == 4 ? kern_weight_conv(w->kern, w->dtype, source, rounded)
                                             : kern_weight_linear(w->kern, w->dtype, source, rounded));
    free(converted);
    free(rounded.data);
    advise(w, e, SAFETENSORS_DONE);
    return packed;
}

/* NAME.weight and NAME.bias in one. */
static const struct kern_weight *pack_bias(struct weights *w, const char *name, int rank, const int64_t *shape)
{
    char full[300];
    struct weight e, bias;
    snprintf(full, sizeof full, "%s.weight", name);
    if (!find(w, &e, full, rank, shape))
        return NULL;
    snprintf(full, sizeof full, "%s.bias", name);
    return find(w, &bias, full, 1, shape) ? pack_biased(w, &e, &bias) : NULL;
}

const struct kern_weight *weights_linear_bias(struct weights *w, int64_t n, int64_t k, const char *format, ...)
{
    WEIGHTS_NAME(name, format);
    return pack_bias(w, name, 2, (int64_t[]){n, k});
}

const struct kern_weight *weights_conv_bias(struct weights *w, int64_t out, int64_t in, int size, const char *format, ...)
{
    WEIGHTS_NAME(name, format);
    return pack_bias(w, name, 4, (int64_t[]){out, in, size, size});
}

struct tensor weights_vector(struct weights *w, int64_t n, const char *format, ...)
{
    WEIGHTS_NAME(name, format);
    struct weight e;
    return find(w, &e, name, 1, (int64_t[]){n}) ? upload(w, &e) : (struct tensor){0};
}

/* As it is in the file, if its rows are those of the table; else decoded. */
struct quant_matrix weights_table(struct weights *w, int64_t n, int64_t k, const char *format, ...)
{
    WEIGHTS_NAME(name, format);
    struct weight e;
    struct quant_run runs[WEIGHT_FILES_RUNS_MAX];
    if (!find(w, &e, name, 2, (int64_t[]){n, k}))
        return (struct quant_matrix){0};
    if (weight_files_runs(&e, runs) == 1 && runs[0].count == runs[0].matrix.n) {
        advise(w, &e, SAFETENSORS_ROWS); /* the check for NaN read all of it; a prompt reads some rows */
        return e.matrix;
    }
    void *converted;
    struct tensor t = view(w, &e, &converted);
    if (w->failed || (converted && !keep_memory(w, converted)))
        return (struct quant_matrix){0};
    return (struct quant_matrix){.format = t.dtype == TENSOR_F32 ? QUANT_F32 : QUANT_BF16, .n = n, .k = k, .data = t.data};
}

/* The place in the pool comes first: what a layer has taken is nowhere else. */
void weights_layer_begin(struct weights *w, int layer, int count)
{
    if (w->failed || !layer_stream_waits(layer, count, w->waiting))
        return;
    struct kern_layer **place = place_in(w, &w->pool->layers, &w->pool->layer_count, sizeof *place);
    if (!place)
        return;
    *place = w->layer = kern_layer_begin(w->kern);
    if (!w->layer)
        fail_kern(w);
}

void weights_layer_take(struct weights *w, const struct kern_weight *matrix)
{
    if (w->failed || !w->layer)
        return;
    kern_layer_take(w->kern, w->layer, (struct kern_weight *)matrix); /* the pool's own, and its values stay what they are */
    if (*kern_error(w->kern))
        fail_kern(w);
}

struct kern_layer *weights_layer_end(struct weights *w)
{
    struct kern_layer *l = w->layer;
    w->layer = NULL;
    kern_layer_end(w->kern, l);
    return l;
}

bool weights_done(struct weights *w, struct engine_error *why)
{
    read_ahead_close(w->ahead);
    w->ahead = NULL;
    if (!w->failed && !kern_sync(w->kern))
        fail_kern(w);
    if (w->failed)
        *why = w->why;
    return !w->failed;
}
