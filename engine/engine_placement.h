/* engine_placement.h - where weights are kept on a device with its own memory; engine_plan.h says what each placement means. */
#ifndef KILN_ENGINE_PLACEMENT_H
#define KILN_ENGINE_PLACEMENT_H

#include <stdbool.h>

enum engine_placement {
    ENGINE_PLACEMENT_AUTO, /* the first of the others that fits */
    ENGINE_RESIDENT,
    ENGINE_PHASES,
    ENGINE_STREAMED,
};
const char *engine_placement_name(enum engine_placement placement); /* "auto", "resident", "phases", "streamed" */
bool engine_placement_of(const char *name, enum engine_placement *ret);

#endif
