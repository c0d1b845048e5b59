/* store_dir.c - staging, publishing and discarding of image files in a folder.
 *
 * Order is everything: data reaches the disk (fsync of file and folder) before the database may say "committed",
 * and the official name appears only after it said so. A staging name is never reused in place: the old
 * file is unlinked first, because where links are used to publish it may be the official file as well. */
#include "store_dir.h"

#include "digest.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define STAGING ".staging"
#define COMPARE_BYTES 65536

static enum store_fault fault_of(int error)
{
    switch (error) {
    case ENOSPC:
    case EDQUOT: return STORE_FULL;
    case EROFS: return STORE_READ_ONLY;
    case ENOENT:
    case ENOTDIR: return STORE_MISSING;
    case EACCES:
    case EPERM: return STORE_DENIED;
    case EEXIST: return STORE_EXISTS;
    default: return STORE_IO;
    }
}

static const char *advice_of(enum store_fault fault)
{
    switch (fault) {
    case STORE_FULL: return "; make room there, the work goes on by itself";
    case STORE_READ_ONLY: return "; the file system is mounted read-only";
    case STORE_MISSING: return "; the folder must exist and be mounted";
    case STORE_DENIED: return "; this user must be allowed to write there";
    default: return "";
    }
}

static bool refuse(struct store_error *why, int error, const char *path, const char *act)
{
    why->fault = fault_of(error);
    snprintf(why->text, sizeof why->text, "%s: cannot %s: %s%s", path, act, strerror(error), advice_of(why->fault));
    return false;
}

static bool staging_path(char *ret, size_t bytes, const char *out_dir, uint64_t task, uint64_t token, struct store_error *why)
{
    if ((size_t)snprintf(ret, bytes, "%s/" STAGING "/%" PRIu64 "-%" PRIu64, out_dir, task, token) < bytes)
        return true;
    return refuse(why, ENAMETOOLONG, out_dir, "use this folder");
}

static bool sync_folder(const char *path, struct store_error *why)
{
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return refuse(why, errno, path, "open the folder");
    /* Some network file systems cannot fsync a folder and say EINVAL; their rename is already durable. */
    bool ok = fsync(fd) == 0 || errno == EINVAL;
    int error = errno;
    close(fd);
    return ok || refuse(why, error, path, "fsync the folder");
}

/* --- prepare --------------------------------------------------------------------------------------- */

static bool make_parents(const char *path, struct store_error *why)
{
    char part[PATH_MAX];
    if ((size_t)snprintf(part, sizeof part, "%s", path) >= sizeof part)
        return refuse(why, ENAMETOOLONG, path, "use this folder");
    for (char *p = part + 1;; p++) {
        if (*p && *p != '/')
            continue;
        char kept = *p;
        *p = 0;
        if (mkdir(part, 0777) != 0 && errno != EEXIST) {
            /* A parent on a read-only or foreign file system answers EROFS or EACCES although it exists. */
            int error = errno;
            struct stat info;
            if (stat(part, &info) != 0)
                return refuse(why, error, part, "make the folder");
        }
        *p = kept;
        if (!kept)
            return true;
    }
}

bool store_dir_prepare(const char *out_dir, bool create, struct store_error *why)
{
    char staging[PATH_MAX];
    struct stat info;
    if ((size_t)snprintf(staging, sizeof staging, "%s/" STAGING, out_dir) >= sizeof staging)
        return refuse(why, ENAMETOOLONG, out_dir, "use this folder");
    if (create && !make_parents(out_dir, why))
        return false;
    if (stat(out_dir, &info) != 0)
        return refuse(why, errno, out_dir, "use the output folder");
    if (!S_ISDIR(info.st_mode))
        return refuse(why, ENOTDIR, out_dir, "use the output folder");
    if (faccessat(AT_FDCWD, out_dir, W_OK | X_OK, AT_EACCESS) != 0)
        return refuse(why, errno, out_dir, "write to the output folder");
    if (mkdir(staging, 0777) != 0 && errno != EEXIST)
        return refuse(why, errno, staging, "make the staging folder");
    if (stat(staging, &info) != 0 || !S_ISDIR(info.st_mode))
        return refuse(why, ENOTDIR, staging, "use the staging folder");
    if (faccessat(AT_FDCWD, staging, W_OK | X_OK, AT_EACCESS) != 0)
        return refuse(why, errno, staging, "write to the staging folder");
    return sync_folder(out_dir, why);
}

/* --- stage ----------------------------------------------------------------------------------------- */

static int write_all(int fd, const uint8_t *data, size_t bytes)
{
    while (bytes > 0) {
        ssize_t put = write(fd, data, bytes);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            return errno;
        data += put;
        bytes -= (size_t)put;
    }
    return 0;
}

bool store_dir_stage(const char *out_dir, uint64_t task, uint64_t token, const void *data, size_t bytes,
                     char ret_sha256[65], struct store_error *why)
{
    char path[PATH_MAX], staging[PATH_MAX], sha256[65];
    if (!staging_path(path, sizeof path, out_dir, task, token, why))
        return false;
    snprintf(staging, sizeof staging, "%.*s/" STAGING, (int)strlen(out_dir), out_dir);
    if (!digest_of(data, bytes, sha256))
        return refuse(why, ENOMEM, path, "compute SHA-256");
    if (unlink(path) != 0 && errno != ENOENT)
        return refuse(why, errno, path, "replace the staged file");
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0)
        return refuse(why, errno, path, "create the staged file");
    int error = write_all(fd, data, bytes);
    if (!error && fsync(fd) != 0)
        error = errno;
    if (close(fd) != 0 && !error) /* a quota on a network file system may speak up only now */
        error = errno;
    if (error) {
        unlink(path);
        return refuse(why, error, path, "write the staged file");
    }
    if (!sync_folder(staging, why)) {
        unlink(path);
        return false;
    }
    memcpy(ret_sha256, sha256, sizeof sha256);
    return true;
}

/* --- publish --------------------------------------------------------------------------------------- */

int store_dir_move(const char *from, const char *to)
{
    if (renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE) == 0)
        return 0;
    if (errno != EINVAL && errno != ENOSYS)
        return errno;
    if (link(from, to) != 0) /* NFS has no RENAME_NOREPLACE; a link does not replace either */
        return errno;
    unlink(from);
    return 0;
}

static bool same_content(const char *a, const char *b)
{
    static const size_t half = COMPARE_BYTES;
    bool same = false;
    char *buffer = malloc(2 * half);
    FILE *fa = fopen(a, "rbe"), *fb = fopen(b, "rbe");
    if (buffer && fa && fb) {
        size_t na, nb;
        do {
            na = fread(buffer, 1, half, fa);
            nb = fread(buffer + half, 1, half, fb);
            same = na == nb && memcmp(buffer, buffer + half, na) == 0 && !ferror(fa) && !ferror(fb);
        } while (same && na > 0);
    }
    if (fa)
        fclose(fa);
    if (fb)
        fclose(fb);
    free(buffer);
    return same;
}

bool store_dir_publish(const char *out_dir, uint64_t task, uint64_t token, const char *file, struct store_error *why)
{
    char staged[PATH_MAX], official[PATH_MAX];
    if (!store_dir_file_ok(file)) {
        why->fault = STORE_DENIED;
        snprintf(why->text, sizeof why->text, "%s: a file name must be plain: no '/', no leading '.', printable", out_dir);
        return false;
    }
    if (!staging_path(staged, sizeof staged, out_dir, task, token, why))
        return false;
    if ((size_t)snprintf(official, sizeof official, "%s/%s", out_dir, file) >= sizeof official)
        return refuse(why, ENAMETOOLONG, out_dir, "use this folder");
    int error = store_dir_move(staged, official);
    if (error == 0)
        return sync_folder(out_dir, why);
    if (error == ENOENT) {
        /* Nothing staged: either it was published before, which is what was asked for, or it is lost. */
        if (access(official, F_OK) == 0)
            return sync_folder(out_dir, why);
        return refuse(why, ENOENT, staged, "publish the staged file");
    }
    if (error == EEXIST && same_content(staged, official)) {
        unlink(staged);
        return sync_folder(out_dir, why);
    }
    if (error == EEXIST)
        return refuse(why, EEXIST, official, "publish: another file with other content has this name");
    return refuse(why, error, official, "publish the file");
}

bool store_dir_discard(const char *out_dir, uint64_t task, uint64_t token, struct store_error *why)
{
    char path[PATH_MAX];
    if (!staging_path(path, sizeof path, out_dir, task, token, why))
        return false;
    if (unlink(path) == 0 || errno == ENOENT || errno == ENOTDIR)
        return true;
    return refuse(why, errno, path, "remove the staged file");
}

/* --- what is staged -------------------------------------------------------------------------------- */

/* Reads a decimal without sign, spaces or leading zeros: what staging_path writes, nothing else. */
static bool read_number(const char **at, uint64_t *ret)
{
    const char *p = *at;
    uint64_t value = 0;
    if (!isdigit((unsigned char)*p) || (*p == '0' && isdigit((unsigned char)p[1])))
        return false;
    for (; isdigit((unsigned char)*p); p++)
        if (__builtin_mul_overflow(value, 10, &value) || __builtin_add_overflow(value, (uint64_t)(*p - '0'), &value))
            return false;
    *at = p;
    *ret = value;
    return true;
}

static bool staged_name(const char *name, uint64_t *ret_task, uint64_t *ret_token)
{
    return read_number(&name, ret_task) && *name++ == '-' && read_number(&name, ret_token) && !*name;
}

bool store_dir_staged(const char *out_dir, bool (*each)(void *, uint64_t task, uint64_t token, double age_s), void *context,
                      struct store_error *why)
{
    char path[PATH_MAX];
    if ((size_t)snprintf(path, sizeof path, "%s/" STAGING, out_dir) >= sizeof path)
        return refuse(why, ENAMETOOLONG, out_dir, "use this folder");
    DIR *folder = opendir(path);
    if (!folder && errno == ENOENT && access(out_dir, F_OK) == 0)
        return true; /* nothing was ever staged here */
    if (!folder)
        return refuse(why, errno, path, "list the staged files");
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    bool go_on = true;
    for (struct dirent *e; go_on && (e = readdir(folder));) {
        uint64_t task, token;
        struct stat info;
        if (!staged_name(e->d_name, &task, &token) || fstatat(dirfd(folder), e->d_name, &info, AT_SYMLINK_NOFOLLOW) != 0)
            continue; /* not ours, or published a moment ago */
        double age_s = (double)(now.tv_sec - info.st_mtim.tv_sec) + 1e-9 * (double)(now.tv_nsec - info.st_mtim.tv_nsec);
        go_on = each(context, task, token, age_s < 0 ? 0 : age_s);
    }
    closedir(folder);
    return true;
}

/* --- names ----------------------------------------------------------------------------------------- */

void store_dir_file_name(char *ret, size_t bytes, const char *name, int row, int variation, int variations,
                         const uint8_t key[16], const char *format)
{
    char stem[128], part[16] = "", hex[9];
    if (name && *name)
        snprintf(stem, sizeof stem, "%s", name);
    else
        snprintf(stem, sizeof stem, "%06d", row);
    if (variations > 1)
        snprintf(part, sizeof part, "-%02d", variation);
    digest_hex(key, 4, hex);
    snprintf(ret, bytes, "%s%s-%s.%s", stem, part, hex, format);
}

bool store_dir_file_ok(const char *file)
{
    if (!file || !*file || *file == '.' || strlen(file) > NAME_MAX)
        return false;
    for (const unsigned char *p = (const unsigned char *)file; *p; p++)
        if (*p == '/' || *p < 0x20 || *p == 0x7f)
            return false;
    return true;
}
