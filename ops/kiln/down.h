/* down.h - `kiln down`: workers finish their batch, then the coordinator and PostgreSQL end. */
#ifndef KILN_DOWN_H
#define KILN_DOWN_H

#include "command.h"

extern const struct command down_command;

#endif
