/* input_file.c - see input_file.h. */
#include "input_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "digest.h"
#include "image_file.h"

/* The bytes of a regular file; NULL and errno, EINVAL for what is none or too large. */
static void *read_file(const char *path, size_t *ret_bytes)
{
    struct stat info;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not hang */
    if (fd < 0)
        return NULL;
    bool is_file = fstat(fd, &info) == 0 && S_ISREG(info.st_mode) && info.st_size > 0 && info.st_size <= INPUT_FILE_IMAGE_BYTES_MAX;
    char *data = is_file ? malloc((size_t)info.st_size) : NULL;
    errno = is_file ? ENOMEM : EINVAL;
    size_t at = 0;
    for (ssize_t n = 1; data && n && at < (size_t)info.st_size;) {
        n = read(fd, data + at, (size_t)info.st_size - at);
        if (n < 0 && errno != EINTR) {
            free(data);
            data = NULL;
        }
        at += n > 0 ? (size_t)n : 0;
        n = n < 0 ? 1 : n;
    }
    int error = errno;
    close(fd);
    errno = error;
    *ret_bytes = at;
    return data;
}

static bool cannot_read(const char *path, int error, enum input_fault *fault, char *why, size_t why_bytes)
{
    *fault = error == EINVAL ? INPUT_BAD : INPUT_AWAY;
    if (error == EINVAL)
        snprintf(why, why_bytes, "'%s': not a file of 1 byte to %d MB", path, INPUT_FILE_IMAGE_BYTES_MAX >> 20);
    else
        snprintf(why, why_bytes, "'%s': cannot be read: %s", path, strerror(error));
    return false;
}

static bool sha256_ok(struct task_inputs_file *file, const char *now, enum input_fault *fault, char *why, size_t why_bytes)
{
    if (!file->sha256[0])
        memcpy(file->sha256, now, sizeof file->sha256);
    if (strcmp(file->sha256, now) == 0)
        return true;
    *fault = INPUT_BAD;
    snprintf(why, why_bytes, "'%s' has changed since it was submitted: its SHA-256 was %s and is %s; submit the row again for what the "
             "file holds now", file->path, file->sha256, now);
    return false;
}

static bool decode(struct task_inputs_file *file, const void *data, size_t bytes, uint8_t **ret_rgb, enum input_fault *fault, char *why,
                   size_t why_bytes)
{
    char what[256];
    uint8_t *rgb = NULL;
    if (!image_file_decode(&rgb, &file->width, &file->height, NULL, data, bytes, what, sizeof what)) {
        *fault = INPUT_BAD;
        snprintf(why, why_bytes, "'%s': %s", file->path, what);
        return false;
    }
    if (ret_rgb)
        *ret_rgb = rgb;
    else
        free(rgb);
    return true;
}

bool input_file_image(struct task_inputs_file *file, uint8_t **ret_rgb, enum input_fault *fault, char *why, size_t why_bytes)
{
    char now[65];
    size_t bytes;
    void *data = read_file(file->path, &bytes);
    if (!data)
        return cannot_read(file->path, errno, fault, why, why_bytes);
    bool ok = digest_of(data, bytes, now) && sha256_ok(file, now, fault, why, why_bytes) &&
              decode(file, data, bytes, ret_rgb, fault, why, why_bytes);
    free(data);
    return ok;
}

bool input_file_adapter(struct task_inputs_file *file, enum input_fault *fault, char *why, size_t why_bytes)
{
    char now[65];
    *fault = INPUT_AWAY;
    return digest_file(file->path, now, NULL, why, why_bytes) && sha256_ok(file, now, fault, why, why_bytes);
}
