/* model_file.h - opens and reads the files of a model folder: regular files only, of bounded size; JSON of bounded
 * depth and number of values, because a parsed value takes ten times the memory of its text. */
#ifndef KILN_MODEL_FILE_H
#define KILN_MODEL_FILE_H

#include <jansson.h>
#include <stddef.h>

#include "engine_error.h"

#define MODEL_FILE_PATH_MAX 4096
#define MODEL_FILE_DEPTH_MAX 16

bool model_file_path(char ret[MODEL_FILE_PATH_MAX], const char *dir, const char *name, struct engine_error *why);

/* model_file_open never waits (a named pipe is refused); the caller closes the descriptor. */
bool model_file_open(int *ret_fd, size_t *ret_bytes, const char *path, struct engine_error *why);

/* model_file_at reads exactly `bytes` from `offset` on. */
bool model_file_at(int fd, void *to, size_t bytes, size_t offset, const char *path, struct engine_error *why);

/* model_file_read: the whole file and a NUL behind it; the caller frees. */
bool model_file_read(char **ret, size_t *ret_bytes, const char *path, size_t bytes_max, struct engine_error *why);

/* model_file_json parses one object; `name` is for messages. Twice the same key is an error. NULL with a reason. */
json_t *model_file_json(const char *text, size_t bytes, size_t values_max, const char *name, struct engine_error *why);

#endif
