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

const struct adapted_linear *adapted_take_stack(struct adapted_list *l, struct weights *w, const int64_t *n, int64_t k, int count,
                                                const char *const *names)
{
    struct adapted_linear *one = w->failed ? NULL : add(l, w);
    if (!one)
        return NULL;
    one->k = k;
    one->part_count = count;
    for (int i = 0; i < count; i++) {
        snprintf(one->parts[i].name, sizeof one->parts[i].name, "%s", names[i]);
        one->parts[i].rows = n[i];
    }
    one->weight = weights_linear_stack(w, n, k, count, names);
    return one->weight ? one : NULL;
}

const struct adapted_linear *adapted_take(struct adapted_list *l, struct weights *w, int64_t n, int64_t k, const char *format, ...)
{
    char name[96];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    return adapted_take_stack(l, w, &n, k, 1, (const char *[]){name});
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

static const struct kern_weight *take_down(struct weights *w, const struct lora_target *t)
{
    struct tensor values = tensor_2d(malloc((size_t)(t->rank * t->k) * sizeof(float)), TENSOR_F32, t->rank, t->k);
    const struct kern_weight *down = NULL;
    if (!values.data)
        no_memory(w);
    else {
        lora_down(values.data, t);
        down = weights_matrix(w, values);
    }
    free(values.data);
    return down;
}

static const struct kern_weight *take_up(struct weights *w, const struct lora_target *t)
{
    struct engine_error why;
    struct tensor values = tensor_2d(malloc((size_t)(t->n * t->rank) * sizeof(float)), TENSOR_F32, t->n, t->rank);
    const struct kern_weight *up = NULL;
    if (!values.data || !lora_up(values.data, t, &why))
        no_memory(w);
    else
        up = weights_matrix(w, values);
    free(values.data);
    return up;
}

static void add_change(struct adapted_linear *one, struct weights *w, const struct lora_target *t, float scale, int64_t first)
{
    struct adapted_change *grown = realloc(one->changes, (size_t)(one->change_count + 1) * sizeof *grown);
    if (!grown) {
        no_memory(w);
        return;
    }
    one->changes = grown;
    struct adapted_change change = {.down = take_down(w, t), .up = take_up(w, t), .scale = scale, .rank = t->rank, .first = first, .rows = t->n};
    if (!w->failed)
        one->changes[one->change_count++] = change;
}

static void set_one(struct adapted_linear *one, const struct adapters *a, struct weights *w)
{
    int64_t first = 0;
    for (int part = 0; part < one->part_count; first += one->parts[part++].rows)
        for (int i = 0; i < adapters_count(a) && !w->failed; i++) {
            float scale;
            const struct lora_target *t = adapters_beside(a, i, one->parts[part].name, &scale);
            if (!t)
                continue;
            assert(t->n == one->parts[part].rows && t->k == one->k); /* lora_open compared them with the config */
            add_change(one, w, t, scale, first);
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
