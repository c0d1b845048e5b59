/* inputs.c - see inputs.h. A file is read once: what is hashed is what is decoded. */
#include "inputs.h"

#include <errno.h>
#include <fcntl.h>
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
    bool is_file = fstat(fd, &info) == 0 && S_ISREG(info.st_mode) && info.st_size > 0 && info.st_size <= INPUTS_IMAGE_BYTES_MAX;
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

/* A file that is away may be back, or be on another worker's machine; what is there and is no image stays none. */
static struct failure cannot_read(const char *path, int error)
{
    if (error == EINVAL)
        return failure_refuse("'%s': not a file of 1 byte to 512 MB", path);
    return failure_retry("'%s': cannot be read: %s", path, strerror(error));
}

static bool sha256_ok(struct task_inputs_file *file, const char *now, struct failure *f)
{
    if (!file->sha256[0])
        memcpy(file->sha256, now, sizeof file->sha256);
    if (strcmp(file->sha256, now) == 0)
        return true;
    *f = failure_refuse("'%s' has changed since it was submitted: its SHA-256 was %s and is %s; submit the row again for what the file "
                        "holds now", file->path, file->sha256, now);
    return false;
}

bool inputs_image(struct engine_reference *ret, struct task_inputs_file *file, struct failure *f)
{
    char why[256], now[65];
    size_t bytes;
    uint8_t *rgb = NULL;
    void *data = read_file(file->path, &bytes);
    if (!data) {
        *f = cannot_read(file->path, errno);
        return false;
    }
    bool ok = digest_of(data, bytes, now) && sha256_ok(file, now, f);
    if (ok && !image_file_decode(&rgb, &file->width, &file->height, NULL, data, bytes, why, sizeof why)) {
        *f = failure_refuse("'%s': %s", file->path, why);
        ok = false;
    }
    free(data);
    if (ok)
        *ret = (struct engine_reference){.width = file->width, .height = file->height, .rgb = rgb};
    return ok;
}

bool inputs_adapter(struct task_inputs_file *file, struct failure *f)
{
    char now[65], why[512];
    if (digest_file(file->path, now, NULL, why, sizeof why))
        return sha256_ok(file, now, f);
    *f = failure_retry("%s", why);
    return false;
}

bool inputs_load(struct inputs *ret, const char *text, struct failure *f)
{
    char why[512];
    *ret = (struct inputs){0};
    if (!*text)
        return true;
    if (!task_inputs_parse(&ret->told, text, why, sizeof why)) {
        *f = failure_refuse("%s", why);
        return false;
    }
    bool ok = true;
    for (int i = 0; ok && i < ret->told.image_count; i++)
        ok = inputs_image(&ret->images[i], &ret->told.images[i], f);
    ok = ok && (!ret->told.mask.path || inputs_image(&ret->mask, &ret->told.mask, f));
    if (!ok)
        inputs_done(ret);
    return ok;
}

void inputs_done(struct inputs *in)
{
    for (int i = 0; i < in->told.image_count; i++)
        free((void *)(uintptr_t)in->images[i].rgb);
    free((void *)(uintptr_t)in->mask.rgb);
    task_inputs_done(&in->told);
    *in = (struct inputs){0};
}

void inputs_into(const struct inputs *in, struct engine_request *request)
{
    request->references = in->images;
    request->reference_count = in->told.image_count;
    request->mask = in->mask.rgb ? &in->mask : NULL;
    request->strength = in->told.strength;
}
