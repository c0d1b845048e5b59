/* model_file.c - one way to open, read and parse what stands in a model folder. */
#include "model_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

bool model_file_path(char ret[MODEL_FILE_PATH_MAX], const char *dir, const char *name, struct engine_error *why)
{
    if (snprintf(ret, MODEL_FILE_PATH_MAX, "%s/%s", dir, name) < MODEL_FILE_PATH_MAX)
        return true;
    return engine_error_set(why, ENGINE_BAD_MODEL, "%.80s..: the path has %zu bytes, accepted: less than %d", dir,
                            strlen(dir) + 1 + strlen(name), MODEL_FILE_PATH_MAX);
}

/* What stays so until somebody changes the folder, and what may work later by itself (descriptors, network, disk). */
static bool cannot(struct engine_error *why, const char *path)
{
    bool stays = errno == ENOENT || errno == ENOTDIR || errno == EACCES || errno == ELOOP || errno == ENAMETOOLONG;
    return engine_error_set(why, stays ? ENGINE_BAD_MODEL : ENGINE_IO, "%s: %s", path, strerror(errno));
}

bool model_file_open(int *ret_fd, size_t *ret_bytes, const char *path, struct engine_error *why)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return cannot(why, path);
    bool ok = fstat(fd, &st) == 0 || cannot(why, path);
    if (ok && !S_ISREG(st.st_mode))
        ok = engine_error_set(why, ENGINE_BAD_MODEL, "%s: %s, want a regular file", path,
                              S_ISDIR(st.st_mode) ? "a folder" : "a pipe, socket or device");
    if (!ok) {
        close(fd);
        return false;
    }
    *ret_fd = fd;
    *ret_bytes = (size_t)st.st_size;
    return true;
}

bool model_file_at(int fd, void *to, size_t bytes, size_t offset, const char *path, struct engine_error *why)
{
    for (size_t done = 0; done < bytes;) {
        ssize_t got = pread(fd, (char *)to + done, bytes - done, (off_t)(offset + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return cannot(why, path);
        if (got == 0)
            return engine_error_set(why, ENGINE_IO, "%s: became shorter while it was read", path);
        done += (size_t)got;
    }
    return true;
}

bool model_file_read(char **ret, size_t *ret_bytes, const char *path, size_t bytes_max, struct engine_error *why)
{
    int fd;
    size_t bytes;
    if (!model_file_open(&fd, &bytes, path, why))
        return false;
    char *text = NULL;
    bool ok = bytes <= bytes_max || engine_error_set(why, ENGINE_BAD_MODEL, "%s: %zu bytes, accepted: at most %zu", path,
                                                     bytes, bytes_max);
    if (ok && !(text = malloc(bytes + 1)))
        ok = engine_error_set(why, ENGINE_NO_MEMORY, "no memory to read %s (%zu bytes)", path, bytes);
    ok = ok && model_file_at(fd, text, bytes, 0, path, why);
    close(fd);
    if (!ok) {
        free(text);
        return false;
    }
    text[bytes] = 0;
    *ret = text;
    *ret_bytes = bytes;
    return true;
}

/* Counts brackets and commas outside of strings: never less than the number of values. */
static bool check_bounds(const char *text, size_t bytes, size_t values_max, const char *name, struct engine_error *why)
{
    size_t values = 0;
    int depth = 0;
    bool is_string = false;
    for (size_t i = 0; i < bytes; i++) {
        char c = text[i];
        if (is_string) {
            i += c == '\\';
            is_string = c != '"';
            continue;
        }
        is_string = c == '"';
        values += c == ',' || c == '[' || c == '{';
        depth += (c == '[' || c == '{') - (c == ']' || c == '}');
        if (depth > MODEL_FILE_DEPTH_MAX)
            return engine_error_set(why, ENGINE_BAD_MODEL, "%s: JSON nested deeper than the accepted %d levels", name,
                                    MODEL_FILE_DEPTH_MAX);
    }
    return values <= values_max || engine_error_set(why, ENGINE_BAD_MODEL, "%s: %zu JSON values, accepted: at most %zu",
                                                    name, values, values_max);
}

json_t *model_file_json(const char *text, size_t bytes, size_t values_max, const char *name, struct engine_error *why)
{
    json_error_t at;
    if (!check_bounds(text, bytes, values_max, name, why))
        return NULL;
    json_t *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &at);
    if (!root) {
        engine_error_set(why, ENGINE_BAD_MODEL, "%s: not valid JSON: %s (line %d, byte %d)", name, at.text, at.line,
                         at.position);
    } else if (!json_is_object(root)) {
        engine_error_set(why, ENGINE_BAD_MODEL, "%s: not a JSON object", name);
        json_decref(root);
        root = NULL;
    }
    return root;
}
