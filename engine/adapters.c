/* adapters.c - opens the files, tells which way each change goes, adds those that are merged. */
#include "adapters.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

struct adapters {
    int count;
    struct lora *files[ENGINE_ADAPTERS_MAX];
    float strength[ENGINE_ADAPTERS_MAX];
};

bool adapters_open(struct adapters **ret, const struct engine_adapter *list, int count, const struct transformer_config *c,
                   struct engine_error *why)
{
    *ret = NULL;
    if (count == 0)
        return true;
    if (count > ENGINE_ADAPTERS_MAX)
        return engine_error_set(why, ENGINE_BAD_REQUEST, "%d adapters, accepted: up to %d", count, ENGINE_ADAPTERS_MAX);
    struct adapters *a = calloc(1, sizeof *a);
    if (!a)
        return engine_error_set(why, ENGINE_NO_MEMORY, "no memory for adapters");
    for (int i = 0; i < count; i++) {
        bool ok = isfinite(list[i].strength) || engine_error_set(why, ENGINE_BAD_REQUEST, "a strength of %g, accepted: a number",
                                                                 (double)list[i].strength);
        if (!ok || !lora_open(&a->files[i], list[i].file, c, why)) {
            adapters_close(a);
            return engine_error_at(why, "adapter %s", list[i].file);
        }
        a->strength[i] = list[i].strength;
        a->count++;
    }
    *ret = a;
    return true;
}

void adapters_close(struct adapters *a)
{
    if (!a)
        return;
    for (int i = 0; i < a->count; i++)
        lora_close(a->files[i]);
    free(a);
}

int adapters_count(const struct adapters *a)
{
    return a ? a->count : 0;
}

bool adapters_change(const struct adapters *a, const char *name)
{
    for (int i = 0; i < adapters_count(a); i++)
        if (lora_find(a->files[i], name))
            return true;
    return false;
}

const struct lora_target *adapters_beside(const struct adapters *a, int index, const char *name, float *ret_scale)
{
    const struct lora_target *t = lora_find(a->files[index], name);
    if (!t || !lora_is_low_rank(t))
        return NULL;
    *ret_scale = (float)((double)a->strength[index] * (double)t->scale);
    return t;
}

static const struct lora_target *merged(const struct adapters *a, int index, const char *name)
{
    const struct lora_target *t = lora_find(a->files[index], name);
    return t && !lora_is_low_rank(t) ? t : NULL;
}

bool adapters_merge(const struct adapters *a, const char *name)
{
    for (int i = 0; i < adapters_count(a); i++)
        if (merged(a, i, name))
            return true;
    return false;
}

bool adapters_merge_any(const struct adapters *a)
{
    for (int i = 0; i < adapters_count(a); i++)
        for (size_t j = 0; j < lora_count(a->files[i]); j++)
            if (!lora_is_low_rank(lora_at(a->files[i], j)))
                return true;
    return false;
}

static void add(float *to, const float *x, float factor, size_t count)
{
    for (size_t i = 0; i < count; i++)
        to[i] += factor * x[i];
}

bool adapters_apply(const struct adapters *a, const char *name, float *w, int64_t n, int64_t k, struct engine_error *why)
{
    size_t count = (size_t)(n * k);
    float *sum = calloc(count, sizeof *sum), *change = malloc(count * sizeof *change);
    bool ok = (sum && change) || engine_error_set(why, ENGINE_NO_MEMORY, "no memory to merge adapters into '%s'", name);
    for (int i = 0; ok && i < a->count; i++) {
        const struct lora_target *t = merged(a, i, name);
        if (!t)
            continue;
        assert(t->n == n && t->k == k); /* lora_open compared them with the config, as the caller did with w */
        ok = lora_delta(change, t, w, why);
        if (ok)
            add(sum, change, a->strength[i], count);
    }
    if (ok)
        add(w, sum, 1, count);
    free(sum);
    free(change);
    return ok;
}
