/* adapted.c - linears with their names, factors by these names, and the one place where both are applied. */
#include "adapted.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Rows that are computed at once: as much memory as up (down x) may take, 57 MB for the widest linear of klein-4B. */
#define ROWS_AT_ONCE 1024

static void no_memory(struct weights *w)
{
    if (w->failed)
        return;
    engine_error_set(&w->why, ENGINE_NO_MEMORY, "%s: no memory for adapters", w->part);
    w->failed = true;
}

/* --- the linears ----------------------------------------------------------------------------------------- */

static struct adapted_linear *add(struct adapted_list *l, struct weights *w)
{
    struct adapted_linear **grown = realloc(l->linears, (size_t)(l->count + 1) * sizeof *grown);
    struct adapted_linear *one = calloc(1, sizeof *one);
    if (grown)
        l->linears = grown;
    if (!grown || !one) {
        free(one);
        no_memory(w);
        return NULL;
    }
    return l->linears[l->count++] = one;
}

static void add_part(struct adapted_linear *one, const char *name, int64_t n, struct shard shard)
{
    struct adapted_part *p = &one->parts[one->part_count++];
    snprintf(p->name, sizeof p->name, "%s", name);
    p->n = n;
    p->shard = shard;
}

/* A linear of one tensor. */
static const struct adapted_linear *take(struct adapted_list *l, struct weights *w, const char *name, int64_t n, int64_t k,
                                         struct shard shard, const struct kern_weight *weight)
{
    struct adapted_linear *one = weight ? add(l, w) : NULL;
    if (!one)
        return NULL;
    one->k = k;
    one->weight = weight;
    add_part(one, name, n, shard);
    return one;
}

const struct adapted_linear *adapted_take(struct adapted_list *l, struct weights *w, int64_t n, int64_t k, const char *format, ...)
{
    WEIGHTS_NAME(name, format);
    return take(l, w, name, n, k, shard_whole(n), weights_linear(w, n, k, "%s", name));
}

const struct adapted_linear *adapted_take_rows(struct adapted_list *l, struct weights *w, const struct shard_piece *pieces, int count,
                                               int64_t k, const char *format, ...)
{
    WEIGHTS_NAME(name, format);
    return take(l, w, name, shard_whole_length(pieces, count), k, weights_shard(w, SHARD_ROWS, pieces, count),
                weights_linear_rows(w, pieces, count, k, "%s", name));
}

const struct adapted_linear *adapted_take_columns(struct adapted_list *l, struct weights *w, int64_t n, const struct shard_piece *pieces,
                                                  int count, const char *format, ...)
{
    WEIGHTS_NAME(name, format);
    return take(l, w, name, n, shard_whole_length(pieces, count), weights_shard(w, SHARD_COLUMNS, pieces, count),
                weights_linear_columns(w, n, pieces, count, "%s", name));
}

const struct adapted_linear *adapted_take_stack(struct adapted_list *l, struct weights *w, const struct shard_piece *pieces, int64_t k,
                                                int count, const char *const *names)
{
    const struct kern_weight *weight = weights_linear_stack(w, pieces, k, count, names);
    struct adapted_linear *one = weight ? add(l, w) : NULL;
    if (!one)
        return NULL;
    one->k = k;
    one->weight = weight;
    for (int i = 0; i < count; i++)
        add_part(one, names[i], shard_whole_length(&pieces[i], 1), weights_shard(w, SHARD_ROWS, &pieces[i], 1));
    return one;
}

static void drop_changes(struct adapted_list *l)
{
    for (int i = 0; i < l->count; i++) {
        free(l->linears[i]->changes);
        l->linears[i]->changes = NULL;
        l->linears[i]->change_count = 0;
    }
}

void adapted_done(struct adapted_list *l)
{
    drop_changes(l);
    for (int i = 0; i < l->count; i++)
        free(l->linears[i]);
    free(l->linears);
    *l = (struct adapted_list){0};
}

/* --- their adapters -------------------------------------------------------------------------------------- */

static struct tensor new_matrix(struct weights *w, int64_t n, int64_t k)
{
    struct tensor t = tensor_2d(malloc((size_t)(n * k) * sizeof(float)), TENSOR_F32, n, k);
    if (!t.data)
        no_memory(w);
    return t;
}

/* A factor, or this rank's part of it. values: freed here. */
static const struct kern_weight *keep_factor(struct weights *w, struct tensor values, enum shard_axis axis, const struct shard *s)
{
    const struct kern_weight *kept = NULL;
    struct tensor part = values;
    if (!w->failed && s->axis == axis && shard_length(s) != values.shape[axis]) {
        part = axis == SHARD_ROWS ? new_matrix(w, shard_length(s), values.shape[1]) : new_matrix(w, values.shape[0], shard_length(s));
        if (part.data)
            shard_copy(part, values, s);
    }
    if (!w->failed)
        kept = weights_matrix(w, part);
    if (part.data != values.data)
        free(part.data);
    free(values.data);
    return kept;
}

static const struct kern_weight *take_down(struct weights *w, const struct lora_target *t, const struct shard *s)
{
    struct tensor values = new_matrix(w, t->rank, t->k);
    if (values.data)
        lora_down(values.data, t);
    return keep_factor(w, values, SHARD_COLUMNS, s);
}

static const struct kern_weight *take_up(struct weights *w, const struct lora_target *t, const struct shard *s)
{
    struct engine_error why;
    struct tensor values = new_matrix(w, t->n, t->rank);
    if (values.data && !lora_up(values.data, t, &why))
        no_memory(w);
    return keep_factor(w, values, SHARD_ROWS, s);
}

/* Rows of the output that a part has here. */
static int64_t part_rows(const struct adapted_part *p)
{
    return p->shard.axis == SHARD_ROWS ? shard_length(&p->shard) : p->n;
}

static void add_change(struct adapted_linear *one, struct weights *w, const struct lora_target *t, float scale, const struct adapted_part *p,
                       int64_t first)
{
    struct adapted_change *grown = realloc(one->changes, (size_t)(one->change_count + 1) * sizeof *grown);
    if (!grown) {
        no_memory(w);
        return;
    }
    one->changes = grown;
    struct adapted_change change = {.down = take_down(w, t, &p->shard), .up = take_up(w, t, &p->shard), .scale = scale, .rank = t->rank,
                                    .first = first, .rows = part_rows(p)};
    if (!w->failed)
        one->changes[one->change_count++] = change;
}

static void set_one(struct adapted_linear *one, const struct adapters *a, struct weights *w)
{
    int64_t first = 0;
    for (int part = 0; part < one->part_count; first += part_rows(&one->parts[part++]))
        for (int i = 0; i < adapters_count(a) && !w->failed; i++) {
            const struct adapted_part *p = &one->parts[part];
            float scale;
            const struct lora_target *t = adapters_beside(a, i, p->name, &scale);
            if (!t)
                continue;
            assert(t->n == p->n && t->k == one->k); /* lora_open compared them with the config */
            add_change(one, w, t, scale, p, first);
        }
}

void adapted_set(struct adapted_list *l, const struct adapters *a, struct weights *w)
{
    drop_changes(l);
    for (int i = 0; i < l->count; i++)
        set_one(l->linears[i], a, w);
    if (w->failed)
        drop_changes(l);
}

/* --- applied --------------------------------------------------------------------------------------------- */

static void apply_change(struct kern *k, struct tensor out, struct tensor x, const struct adapted_change *c)
{
    size_t mark = kern_mark(k);
    struct tensor low = kern_temp(k, x.dtype, 2, (int64_t[]){x.shape[0], c->rank});
    struct tensor high = kern_temp(k, out.dtype, 2, out.shape);
    kern_linear(k, low, x, c->down);
    kern_linear(k, high, low, c->up);
    kern_add_scaled(k, out, high, c->scale);
    kern_rewind(k, mark);
}

void adapted_apply(struct kern *k, struct tensor out, struct tensor x, const struct adapted_linear *l)
{
    kern_linear(k, out, x, l->weight);
    for (int i = 0; i < l->change_count; i++) {
        const struct adapted_change *c = &l->changes[i];
        struct tensor columns = tensor_slice(out, 1, c->first, c->rows);
        for (int64_t at = 0; at < x.shape[0]; at += ROWS_AT_ONCE) {
            int64_t rows = x.shape[0] - at < ROWS_AT_ONCE ? x.shape[0] - at : ROWS_AT_ONCE;
            apply_change(k, tensor_slice(columns, 0, at, rows), tensor_slice(x, 0, at, rows), c);
        }
    }
}
