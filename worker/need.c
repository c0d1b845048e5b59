/* need.c - crash-only: the way out is the way of kill -9, which everything here survives. */
#include "need.h"

#include <stdlib.h>
#include <unistd.h>

#include "lifecycle.h"
#include "log.h"

void *need_memory(void *memory)
{
    if (memory)
        return memory;
    log_event(LOG_ERROR, "out_of_memory", "what=bookkeeping");
    _exit(LIFECYCLE_TEMPORARY);
}

void *need_zeroed(size_t count, size_t bytes)
{
    return need_memory(calloc(count ? count : 1, bytes));
}
