/* process.h - runs a program to its end and keeps what it said: inspecting a model, making a database's folder.
 *
 * Ctrl-C (lifecycle_stop_count) ends the program as well. */
#ifndef KILN_PROCESS_H
#define KILN_PROCESS_H

#include <stdbool.h>
#include <stddef.h>

/* process_run returns the status of waitpid, or -1 with why when the program could not be started. before (in the
 * child, NULL: nothing) runs as in lifecycle_child. The end of stdout and stderr together is in ret, at most
 * bytes - 1 of it. */
int process_run(char *const argv[], void (*before)(void *), void *context, char *ret, size_t bytes, char *why, size_t why_bytes);

/* process_last_line: the last line of text that is not blank; text is changed. */
char *process_last_line(char *text);

#endif
