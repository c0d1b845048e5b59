/* watch.h - looks on while a campaign is rendered; `kiln watch NAME` and `kiln submit --wait`. */
#ifndef KILN_WATCH_H
#define KILN_WATCH_H

#include <stdio.h>

#include "command.h"

extern const struct command watch_command;

/* watch_campaign returns when the campaign has nothing left to do: 0 all done, 1 some failed or it was cancelled, 2 no
 * such campaign, 75 the database stayed away, 130 after Ctrl-C (the campaign goes on). Progress goes to out. */
int watch_campaign(struct command_call *call, const char *name, FILE *out);

#endif
