/* list.h - the commands that look at campaigns and change their state: each is one question to the database.
 *
 * --json prints an object a line, in the order of the file; without it, tables for people. */
#ifndef KILN_LIST_H
#define KILN_LIST_H

#include "command.h"

extern const struct command list_status_command, list_images_command, list_failures_command, list_workers_command,
    list_pause_command, list_resume_command, list_cancel_command, list_retry_command;

#endif
