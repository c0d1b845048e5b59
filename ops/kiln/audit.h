/* audit.h - `kiln audit`: do rows agree with each other, and with the files on disk? */
#ifndef KILN_AUDIT_H
#define KILN_AUDIT_H

#include "command.h"

extern const struct command audit_command;

/* audit_is_ours: does this name look like one of store_dir_file_name's ("...-0a1b2c3d.png")? */
bool audit_is_ours(const char *file);

#endif
