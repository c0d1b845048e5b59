/* engine_placement.c - the words for placements, for what a team splits, and for passes. */
#include "engine_placement.h"

#include <stdio.h>
#include <string.h>

#include "engine.h"

static const char *const names[] = {"auto", "resident", "phases", "streamed"};
static const char *const passes_names[] = {"open", "one", "together", "in_turn", "split"};
static const char *const splits[] = {"auto", "weights", "passes"};

/* Index of a word; -1: it is none of them. */
static int find(const char *const *words, int count, const char *word)
{
    for (int i = 0; i < count; i++)
        if (strcmp(words[i], word) == 0)
            return i;
    return -1;
}

const char *engine_placement_name(enum engine_placement placement)
{
    return names[placement];
}

bool engine_placement_of(const char *name, enum engine_placement *ret)
{
    int at = find(names, ENGINE_STREAMED + 1, name);
    if (at >= 0)
        *ret = (enum engine_placement)at;
    return at >= 0;
}

bool engine_placement_split_of(const char *name, enum engine_split *ret)
{
    int at = find(splits, ENGINE_SPLIT_PASSES + 1, name);
    if (at >= 0)
        *ret = (enum engine_split)at;
    return at >= 0;
}

const char *engine_placement_passes(enum engine_passes passes)
{
    return passes_names[passes];
}

void engine_placement_figures(const struct engine_info *info, char ret[ENGINE_PLACEMENT_FIGURES_MAX])
{
    snprintf(ret, ENGINE_PLACEMENT_FIGURES_MAX, "placement=%s waiting_blocks=%d passes=%s model_bytes=%zu arena_bytes=%zu other_bytes=%zu device_bytes=%zu",
             engine_placement_name(info->placement), info->waiting_blocks, engine_placement_passes(info->passes), info->model_bytes,
             info->arena_bytes, info->other_bytes, info->device_bytes);
}
