/* engine_placement.c - the words for placements. */
#include "engine_placement.h"

#include <stdio.h>
#include <string.h>

#include "engine.h"

static const char *const names[] = {"auto", "resident", "phases", "streamed"};

const char *engine_placement_name(enum engine_placement placement)
{
    return names[placement];
}

bool engine_placement_of(const char *name, enum engine_placement *ret)
{
    for (int i = ENGINE_PLACEMENT_AUTO; i <= ENGINE_STREAMED; i++)
        if (strcmp(name, names[i]) == 0) {
            *ret = (enum engine_placement)i;
            return true;
        }
    return false;
}

void engine_placement_figures(const struct engine_info *info, char ret[ENGINE_PLACEMENT_FIGURES_MAX])
{
    snprintf(ret, ENGINE_PLACEMENT_FIGURES_MAX, "placement=%s waiting_blocks=%d model_bytes=%zu arena_bytes=%zu other_bytes=%zu device_bytes=%zu",
             engine_placement_name(info->placement), info->waiting_blocks, info->model_bytes, info->arena_bytes, info->other_bytes, info->device_bytes);
}
