/* need.h - memory for small things. Without it this process can promise nothing: it logs and dies, its supervisor
 * starts it again, and the spool keeps what was finished. Big things (pixels, files) are asked for where
 * their failure has a meaning. */
#ifndef KILN_NEED_H
#define KILN_NEED_H

#include <stddef.h>

void *need_memory(void *memory); /* returns it, unless it is NULL */
void *need_zeroed(size_t count, size_t bytes);

#endif
