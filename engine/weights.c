/* weights.c - tensors by name into the backend's layout, checked for shape, dtype and NaN on the way. */
#include "weights.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct weights_pool {
    struct kern *kern;
    struct kern_weight **packed;
    size_t packed_count;
    struct tensor *vectors; /* of the backend */
    size_t vector_count;
    void **memory;          /* of the host */
    size_t memory_count;
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

/* keep: the pool owns what was made; on no memory the maker still owns it. */
static bool keep_memory(struct weights *w, void *memory)
{
    void **grown = realloc(w->pool->memory, (w->pool->memory_count + 1) * sizeof *grown);
    if (!grown || !memory) {
        w->pool->memory = grown ? grown : w->pool->memory;
        free(memory);
        fail(w, ENGINE_NO_MEMORY, "no memory for weights");
        return false;
    }
    w->pool->memory = grown;
    grown[w->pool->memory_count++] = memory;
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
    struct tensor *grown = realloc(w->pool->vectors, (w->pool->vector_count + 1) * sizeof *grown);
    if (!grown) {
        kern_release(w->kern, t);
        fail(w, ENGINE_NO_MEMORY, "no memory for weights");
        return (struct tensor){0};
    }
    w->pool->vectors = grown;
    return grown[w->pool->vector_count++] = t;
}

static const struct kern_weight *keep_packed(struct weights *w, struct kern_weight *packed)
{
    if (!packed) {
        fail_kern(w);
        return NULL;
    }
    struct kern_weight **grown = realloc(w->pool->packed, (w->pool->packed_count + 1) * sizeof *grown);
    if (!grown) {
        kern_weight_free(w->kern, packed);
        fail(w, ENGINE_NO_MEMORY, "no memory for weights");
        return NULL;
    }
    w->pool->packed = grown;
    return grown[w->pool->packed_count++] = packed;
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

static bool has_bad_f32(const uint8_t *data, size_t count)
{
    uint32_t bad = 0;
    for (size_t i = 0; i < count; i++) {
        uint32_t u;
        memcpy(&u, data + 4 * i, 4);
        bad |= (u & 0x7f800000u) == 0x7f800000u;
    }
    return bad;
}

static bool has_bad_16(const uint8_t *data, size_t count, uint16_t exponent)
{
    uint16_t bad = 0;
    for (size_t i = 0; i < count; i++) {
        uint16_t u;
        memcpy(&u, data + 2 * i, 2);
        bad |= (u & exponent) == exponent;
    }
    return bad;
}

static bool is_finite(const struct safetensors_entry *e)
{
    switch (e->dtype) {
    case SAFETENSORS_F32:
        return !has_bad_f32(e->data, e->bytes / 4);
    case SAFETENSORS_BF16:
        return !has_bad_16(e->data, e->bytes / 2, 0x7f80);
    default:
        return !has_bad_16(e->data, e->bytes / 2, 0x7c00);
    }
}

static const struct safetensors_entry *find(struct weights *w, const char *name, int rank, const int64_t *shape)
{
    if (w->failed)
        return NULL;
    const struct safetensors_entry *e = safetensors_find(w->files, name);
    if (!e) {
        fail(w, ENGINE_BAD_MODEL, "tensor '%s' is missing", name);
        return NULL;
    }
    char got[128], want[128];
    if (e->rank != rank || memcmp(e->shape, shape, (size_t)rank * sizeof *shape) != 0) {
        fail(w, ENGINE_BAD_MODEL, "%s: tensor '%s': shape %s, want %s", e->file, name,
             shape_text(got, sizeof got, e->rank, e->shape), shape_text(want, sizeof want, rank, shape));
        return NULL;
    }
    if (e->dtype != SAFETENSORS_F32 && e->dtype != SAFETENSORS_BF16 && e->dtype != SAFETENSORS_F16) {
        fail(w, ENGINE_BAD_MODEL, "%s: tensor '%s': dtype %s, accepted: F32, BF16, F16", e->file, name,
             safetensors_dtype_name(e->dtype));
        return NULL;
    }
    if (!is_finite(e)) {
        fail(w, ENGINE_BAD_MODEL, "%s: tensor '%s' has NaN or infinite values", e->file, name);
        return NULL;
    }
    w->parameters += e->bytes / (e->dtype == SAFETENSORS_F32 ? 4 : 2);
    return e;
}

static float f32_of_f16(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ffu;
    if (exponent == 0) {
        float tiny = (float)mantissa * 0x1p-24f;
        return sign ? -tiny : tiny;
    }
    union { uint32_t u; float f; } v = {.u = sign | (exponent + 112) << 23 | mantissa << 13};
    return v.f;
}

/* A view of a file's values; F16 is converted to f32 into *ret_memory, which the caller frees. */
static struct tensor view(struct weights *w, const struct safetensors_entry *e, void **ret_memory)
{
    *ret_memory = NULL;
    if (e->dtype == SAFETENSORS_F32)
        return tensor_of((void *)e->data, TENSOR_F32, e->rank, e->shape);
    if (e->dtype == SAFETENSORS_BF16)
        return tensor_of((void *)e->data, TENSOR_BF16, e->rank, e->shape);
    size_t count = e->bytes / 2;
    float *values = malloc(count * sizeof *values);
    if (!values) {
        fail(w, ENGINE_NO_MEMORY, "no memory to convert '%s'", e->name);
        return (struct tensor){0};
    }
    for (size_t i = 0; i < count; i++) {
        uint16_t h;
        memcpy(&h, (const uint8_t *)e->data + 2 * i, 2);
        values[i] = f32_of_f16(h);
    }
    *ret_memory = values;
    return tensor_of(values, TENSOR_F32, e->rank, e->shape);
}

/* The values of an entry in the compute dtype, in the backend's memory. */
static struct tensor upload(struct weights *w, const struct safetensors_entry *e)
{
    void *converted;
    struct tensor source = view(w, e, &converted), t = {0};
    if (!w->failed)
        t = keep_vector(w, kern_upload(w->kern, w->dtype, source));
    free(converted);
    safetensors_advise(e, SAFETENSORS_DONE);
    return t;
}

/* --- taking ------------------------------------------------------------------------------------------------ */

#define NAME_OF(name, format)                                                                                          \
    char name[256];                                                                                                    \
    do {                                                                                                               \
        va_list args;                                                                                                  \
        va_start(args, format);                                                                                        \
        vsnprintf(name, sizeof name, format, args);                                                                    \
        va_end(args);                                                                                                  \
    } while (0)

/* The values of an entry in the compute dtype, in host memory the caller frees. */
static struct tensor host_copy(struct weights *w, const struct safetensors_entry *e)
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

/* What was copied out of a file need not stay in memory: a model is held once, not twice. */
static const struct kern_weight *pack(struct weights *w, const struct safetensors_entry *e,
                                      const struct safetensors_entry *bias)
{
    if (!e || w->failed)
        return NULL;
    void *converted;
    struct tensor source = view(w, e, &converted);
    struct tensor rounded = bias ? host_copy(w, bias) : (struct tensor){0};
    const struct kern_weight *packed = NULL;
    if (!w->failed)
        packed = keep_packed(w, e->rank == 4 ? kern_weight_conv(w->kern, w->dtype, source, rounded)
                                             : kern_weight_linear(w->kern, w->dtype, source, rounded));
    free(converted);
    free(rounded.data);
    safetensors_advise(e, SAFETENSORS_DONE);
    return packed;
}

const struct kern_weight *weights_linear(struct weights *w, int64_t n, int64_t k, const char *format, ...)
{
    NAME_OF(name, format);
    return pack(w, find(w, name, 2, (int64_t[]){n, k}), NULL);
}

/* bf16 files stay bf16: the backend rounds, where it is faster than here. */
static enum tensor_dtype stack_dtype(const struct safetensors_entry *const *parts, int count)
{
    for (int i = 0; i < count; i++)
        if (parts[i]->dtype != SAFETENSORS_BF16)
            return TENSOR_F32;
    return TENSOR_BF16;
}

/* One after the other into one matrix; all are known to be there, so that its size is that of real data. */
static void join(struct weights *w, struct tensor all, const struct safetensors_entry *const *parts, int count)
{
    int64_t at = 0;
    for (int i = 0; i < count && !w->failed; i++) {
        void *converted;
        struct tensor source = view(w, parts[i], &converted);
        if (!w->failed)
            tensor_convert(tensor_slice(all, 0, at, parts[i]->shape[0]), source);
        free(converted);
        safetensors_advise(parts[i], SAFETENSORS_DONE);
        at += parts[i]->shape[0];
    }
}

const struct kern_weight *weights_linear_stack(struct weights *w, const int64_t *n, int64_t k, int count,
                                               const char *const *names)
{
    const struct safetensors_entry *parts[WEIGHTS_STACK_MAX];
    int64_t total = 0;
    assert(count <= WEIGHTS_STACK_MAX);
    for (int i = 0; i < count; i++) {
        parts[i] = find(w, names[i], 2, (int64_t[]){n[i], k});
        total += n[i];
    }
    if (w->failed)
        return NULL;
    struct tensor all = tensor_2d(NULL, stack_dtype(parts, count), total, k);
    all.data = malloc(tensor_bytes(all));
    if (!all.data) {
        fail(w, ENGINE_NO_MEMORY, "no memory to join '%s' with its neighbours", names[0]);
        return NULL;
    }
    join(w, all, parts, count);
    const struct kern_weight *packed =
        w->failed ? NULL : keep_packed(w, kern_weight_linear(w->kern, w->dtype, all, (struct tensor){0}));
    free(all.data);
    return packed;
}

static const struct safetensors_entry *bias_of(struct weights *w, int64_t n, const char *name)
{
    char full[300];
    snprintf(full, sizeof full, "%s.bias", name);
    return find(w, full, 1, (int64_t[]){n});
}

static const struct safetensors_entry *weight_of(struct weights *w, const char *name, int rank, const int64_t *shape)
{
    char full[300];
    snprintf(full, sizeof full, "%s.weight", name);
    return find(w, full, rank, shape);
}

const struct kern_weight *weights_linear_bias(struct weights *w, int64_t n, int64_t k, const char *format, ...)
{
    NAME_OF(name, format);
    const struct safetensors_entry *e = weight_of(w, name, 2, (int64_t[]){n, k});
    return pack(w, e, bias_of(w, n, name));
}

const struct kern_weight *weights_conv_bias(struct weights *w, int64_t out, int64_t in, int size, const char *format, ...)
{
    NAME_OF(name, format);
    const struct safetensors_entry *e = weight_of(w, name, 4, (int64_t[]){out, in, size, size});
    return pack(w, e, bias_of(w, out, name));
}

struct tensor weights_vector(struct weights *w, int64_t n, const char *format, ...)
{
    NAME_OF(name, format);
    const struct safetensors_entry *e = find(w, name, 1, (int64_t[]){n});
    return e ? upload(w, e) : (struct tensor){0};
}

struct tensor weights_table(struct weights *w, int64_t n, int64_t k, const char *format, ...)
{
    NAME_OF(name, format);
    const struct safetensors_entry *e = find(w, name, 2, (int64_t[]){n, k});
    if (!e)
        return (struct tensor){0};
    void *converted;
    struct tensor t = view(w, e, &converted);
    if (converted && !keep_memory(w, converted))
        return (struct tensor){0};
    safetensors_advise(e, SAFETENSORS_ROWS); /* the check for NaN read all of it; a prompt reads some rows */
    return t;
}

bool weights_done(struct weights *w, struct engine_error *why)
{
    if (!w->failed && !kern_sync(w->kern))
        fail_kern(w);
    if (w->failed)
        *why = w->why;
    return !w->failed;
}
