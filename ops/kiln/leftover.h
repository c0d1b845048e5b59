/* leftover.h - programs of this home that outlived their supervisor: found by their pid files, ended in order.
 *
 * A pid is believed only if its command line is that of our program with a path of this home in it: numbers are used again. */
#ifndef KILN_LEFTOVER_H
#define KILN_LEFTOVER_H

#include <stdbool.h>
#include <stddef.h>

#include "home.h"

/* leftover_stop waits for workers, then the coordinator, then PostgreSQL to end, and helps where it takes too long.
 * The kernel has told them already (up_child.h): a worker has patience_s seconds to finish its batch before it is
 * told again, which makes it leave at once. tell(context, sentence) says what is waited for. *ret_count: how many there were. False with
 * why when one cannot be ended, or when a stop signal came. */
bool leftover_stop(const struct home *home, int patience_s, void (*tell)(void *, const char *), void *context, int *ret_count,
                   char *why, size_t why_bytes);

#endif
