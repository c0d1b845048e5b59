/* up.h - `kiln up`: database, coordinator, workers, and the process that keeps them running. */
#ifndef KILN_UP_H
#define KILN_UP_H

#include "command.h"

extern const struct command up_command;

#endif
