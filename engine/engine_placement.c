/* engine_placement.c - the words for placements. */
#include "engine_placement.h"

#include <string.h>

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
