/* home_dir.h - where kiln lives when no option says it: the rule that all programs share. */
#ifndef KILN_HOME_DIR_H
#define KILN_HOME_DIR_H

#include <stdbool.h>
#include <stddef.h>

/* home_dir_default: KILN_HOME; /var/lib/kiln for root; $XDG_DATA_HOME/kiln; ~/.local/share/kiln. As written: maybe with links, maybe
 * relative. False: nothing says where, or it does not fit. */
bool home_dir_default(char *ret, size_t bytes);

#endif
