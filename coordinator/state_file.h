/* state_file.h - what other programs of this machine want to know of a running coordinator, as one JSON object in a file:
 * {"pid":1,"endpoint":"tcp://127.0.0.1:5555","metrics_port":9100,"database_state":"up"}. Replaced as a whole. */
#ifndef KILN_STATE_FILE_H
#define KILN_STATE_FILE_H

#include <stdbool.h>
#include <stddef.h>

/* metrics_port -1: none (null). database_state: connecting, up, away or refused. */
bool state_file_write(const char *path, const char *endpoint, int metrics_port, const char *database_state, char *why, size_t why_bytes);
void state_file_remove(const char *path);

#endif
