/* read_ahead.h - a thread that has the kernel read weights which come later, so that the disk works while others are packed.
 *
 * Asking the kernel would be enough, but it lets who asks wait for the disk as soon as some megabytes are on their way. Nothing depends on it: what
 * has not been read when its turn comes is read then. */
#ifndef KILN_READ_AHEAD_H
#define KILN_READ_AHEAD_H

#include "weight_files.h"

struct read_ahead;
struct read_ahead *read_ahead_open(void);     /* NULL: no memory or no thread, so nothing is read ahead */
void read_ahead_close(struct read_ahead *a);  /* at once, whatever is still to be read; accepts NULL. Before the files are closed */

/* read_ahead_add: waits where READ_AHEAD_MAX are not begun yet; NULL: nothing happens. */
#define READ_AHEAD_MAX 32
void read_ahead_add(struct read_ahead *a, const struct weight *w);

#endif
