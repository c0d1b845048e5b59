/* digest.c - SHA-256 over memory, files and model folders.
 *
 * The algorithm is fetched once for the process: fetching per call costs more than hashing a prompt. Files are
 * read in order and the kernel is told so; a model of 16 GB must not be slower than its disk. */
#include "digest.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define READ_BYTES (256u << 10) /* stays in a core's cache between the copy and the hash */

struct digest {
    EVP_MD_CTX *context;
    bool ok;
};

static pthread_once_t sha256_once = PTHREAD_ONCE_INIT;
static EVP_MD *sha256;

static void sha256_fetch(void)
{
    sha256 = EVP_MD_fetch(NULL, "SHA256", NULL);
}

struct digest *digest_new(void)
{
    pthread_once(&sha256_once, sha256_fetch);
    struct digest *d = malloc(sizeof *d);
    if (!d)
        return NULL;
    d->context = EVP_MD_CTX_new();
    d->ok = sha256 && d->context && EVP_DigestInit_ex(d->context, sha256, NULL) == 1;
    return d;
}

void digest_add(struct digest *d, const void *data, size_t bytes)
{
    if (d && d->ok && bytes)
        d->ok = EVP_DigestUpdate(d->context, data, bytes) == 1;
}

bool digest_done(struct digest *d, uint8_t ret[32])
{
    bool ok = d && d->ok && EVP_DigestFinal_ex(d->context, ret, NULL) == 1;
    if (!ok)
        memset(ret, 0, 32);
    if (d)
        EVP_MD_CTX_free(d->context);
    free(d);
    return ok;
}

void digest_hex(const uint8_t *bytes, size_t count, char *ret)
{
    static const char figures[] = "0123456789abcdef";
    for (size_t i = 0; i < count; i++) {
        ret[2 * i] = figures[bytes[i] >> 4];
        ret[2 * i + 1] = figures[bytes[i] & 15];
    }
    ret[2 * count] = 0;
}

bool digest_bytes(const void *data, size_t bytes, uint8_t ret[32])
{
    struct digest *d = digest_new();
    digest_add(d, data, bytes);
    return digest_done(d, ret);
}

bool digest_of(const void *data, size_t bytes, char ret_hex[65])
{
    uint8_t raw[32];
    bool ok = digest_bytes(data, bytes, raw);
    digest_hex(raw, 32, ret_hex);
    return ok;
}

static _Thread_local const atomic_bool *stop_flag;

void digest_stop_when(const atomic_bool *flag)
{
    stop_flag = flag;
}

/* Opens a regular file; anything else may hang, or never end. -1: a sentence. */
static int open_file(const char *path, char *why, size_t why_bytes)
{
    struct stat info;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe without a writer must not hang */
    if (fd < 0 || fstat(fd, &info) != 0)
        snprintf(why, why_bytes, "%s: cannot be read: %s", path, strerror(errno));
    else if (!S_ISREG(info.st_mode))
        snprintf(why, why_bytes, "%s: cannot be read: not a file", path);
    else
        return fd;
    if (fd >= 0)
        close(fd);
    return -1;
}

/* Feeds a whole file; `expected` (or -1) is the size that was promised, so that a file that grows or shrinks
 * while it is read is an error and not a digest of something that never existed. */
static bool add_file(struct digest *d, const char *path, int64_t expected, uint64_t *ret_bytes, char *why, size_t why_bytes)
{
    bool ok = false;
    uint64_t total = 0;
    char *buffer = malloc(READ_BYTES);
    int fd = open_file(path, why, why_bytes);
    if (fd < 0)
        goto done;
    if (!buffer) {
        snprintf(why, why_bytes, "%s: no memory to read it", path);
        goto done;
    }
    posix_fadvise(fd, 0, 0, POSIX_FADV_SEQUENTIAL);
    for (;;) {
        ssize_t got = read(fd, buffer, READ_BYTES);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0) {
            snprintf(why, why_bytes, "%s: cannot be read: %s", path, strerror(errno));
            goto done;
        }
        if (got == 0)
            break;
        if (stop_flag && atomic_load(stop_flag)) {
            snprintf(why, why_bytes, "%s: given up while it was hashed", path);
            goto done;
        }
        digest_add(d, buffer, (size_t)got);
        total += (uint64_t)got;
    }
    if (expected >= 0 && total != (uint64_t)expected) {
        snprintf(why, why_bytes, "%s: changed while it was read: %llu bytes, %lld were expected", path,
                 (unsigned long long)total, (long long)expected);
        goto done;
    }
    *ret_bytes = total;
    ok = true;
done:
    if (fd >= 0)
        close(fd);
    free(buffer);
    return ok;
}

static bool finish_hex(struct digest *d, bool ok, char ret_hex[65], char *why, size_t why_bytes)
{
    uint8_t raw[32];
    bool hashed = digest_done(d, raw);
    if (ok && !hashed)
        snprintf(why, why_bytes, "no memory to compute SHA-256");
    if (ok && hashed)
        digest_hex(raw, 32, ret_hex);
    return ok && hashed;
}

/* `expected`: see add_file. */
static bool hash_file(const char *path, int64_t expected, char ret_hex[65], uint64_t *ret_bytes, char *why, size_t why_bytes)
{
    struct digest *d = digest_new();
    return finish_hex(d, add_file(d, path, expected, ret_bytes, why, why_bytes), ret_hex, why, why_bytes);
}

bool digest_file(const char *path, char ret_hex[65], uint64_t *ret_bytes, char *why, size_t why_bytes)
{
    uint64_t bytes = 0;
    bool ok = hash_file(path, -1, ret_hex, &bytes, why, why_bytes);
    if (ok && ret_bytes)
        *ret_bytes = bytes;
    return ok;
}

/* --- a model folder ------------------------------------------------------------------------------- */

struct model_file {
    char *name; /* from the model folder on */
    struct stat info;
    char hex[65];
};

struct file_list {
    struct model_file *files;
    size_t count, room;
};

static bool list_add(struct file_list *list, const char *name, const struct stat *info)
{
    if (list->count == list->room) {
        size_t room = list->room ? 2 * list->room : 64;
        struct model_file *grown = realloc(list->files, room * sizeof *grown);
        if (!grown)
            return false;
        list->files = grown;
        list->room = room;
    }
    list->files[list->count] = (struct model_file){.name = strdup(name), .info = *info};
    return list->files[list->count++].name != NULL;
}

static bool is_weight_file(const char *name)
{
    static const char *const endings[] = {".json", ".txt", ".safetensors", ".gguf"};
    size_t length = strlen(name);
    for (size_t i = 0; i < sizeof endings / sizeof *endings; i++) {
        size_t tail = strlen(endings[i]);
        if (length > tail && strcmp(name + length - tail, endings[i]) == 0)
            return true;
    }
    return false;
}

static const char *const nothing[] = {NULL};

/* NAME, or NAME.ending, is one of these. */
static bool is_of(const char *name, const char *const *parts)
{
    for (; *parts; parts++) {
        size_t length = strlen(*parts);
        if (strncmp(name, *parts, length) == 0 && (!name[length] || name[length] == '.'))
            return true;
    }
    return false;
}

/* Collects the files of DIR/part; part "" is the model folder itself, whose folders are the parts. stat follows
 * links: model caches link every file. */
static bool list_part(struct file_list *list, const char *dir, const char *part, const char *const *without, char *why, size_t why_bytes)
{
    char path[4096], name[1024];
    bool ok = true;
    snprintf(path, sizeof path, "%s/%s", dir, part);
    DIR *folder = opendir(path);
    if (!folder) {
        snprintf(why, why_bytes, "%s: cannot be opened as a model folder: %s", path, strerror(errno));
        return false;
    }
    for (struct dirent *e; ok && (e = readdir(folder));) {
        struct stat info;
        if (e->d_name[0] == '.' || is_of(e->d_name, without))
            continue;
        if ((size_t)snprintf(name, sizeof name, "%s%s%s", part, *part ? "/" : "", e->d_name) >= sizeof name ||
            (size_t)snprintf(path, sizeof path, "%s/%s", dir, name) >= sizeof path) {
            snprintf(why, why_bytes, "%s/%s: a file's path is too long", dir, part);
            ok = false;
        } else if (stat(path, &info) != 0) {
            snprintf(why, why_bytes, "%s: %s", path, strerror(errno));
            ok = false;
        } else if (S_ISDIR(info.st_mode) && !*part) {
            ok = list_part(list, dir, e->d_name, nothing, why, why_bytes);
        } else if (S_ISREG(info.st_mode) && is_weight_file(e->d_name) && strchr(name, '\n')) {
            snprintf(why, why_bytes, "%s: '%s': a file of a model has no line break in its name", dir, name);
            ok = false;
        } else if (S_ISREG(info.st_mode) && is_weight_file(e->d_name) && !list_add(list, name, &info)) {
            snprintf(why, why_bytes, "no memory to list %s", dir);
            ok = false;
        }
    }
    closedir(folder);
    return ok;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct model_file *)a)->name, ((const struct model_file *)b)->name);
}

/* All files of the digest, in its order. */
static bool list_model(struct file_list *list, const char *model_dir, const char *const *without, char *why, size_t why_bytes)
{
    if (!list_part(list, model_dir, "", without, why, why_bytes))
        return false;
    if (list->count == 0) {
        snprintf(why, why_bytes, "%s: no .json, .txt, .safetensors or .gguf file in it: not a model folder", model_dir);
        return false;
    }
    qsort(list->files, list->count, sizeof *list->files, by_name);
    return true;
}

static void list_done(struct file_list *list)
{
    for (size_t i = 0; i < list->count; i++)
        free(list->files[i].name);
    free(list->files);
}

/* The last name first: that is about the order in which an engine beside it opens the parts (VAE, transformer, text encoder), so that
 * what one of them has read from the disk is still in memory when the other wants it. */
static bool hash_list(struct file_list *list, const char *dir, char *why, size_t why_bytes)
{
    char path[4096];
    bool ok = true;
    for (size_t i = list->count; ok && i-- > 0;) {
        struct model_file *f = &list->files[i];
        uint64_t bytes;
        snprintf(path, sizeof path, "%s/%s", dir, f->name);
        ok = hash_file(path, f->info.st_size, f->hex, &bytes, why, why_bytes);
    }
    return ok;
}

/* A line for each file, as sha256sum prints it; without content, what tells that it is still the same file takes the hash's place. */
static void add_line(struct digest *d, const struct model_file *f, bool with_content)
{
    char line[2048];
    const struct stat *i = &f->info;
    int length = with_content ? snprintf(line, sizeof line, "%s  %s\n", f->hex, f->name)
                              : snprintf(line, sizeof line, "%lld %llu %lld.%09ld  %s\n", (long long)i->st_size, (unsigned long long)i->st_ino,
                                         (long long)i->st_mtim.tv_sec, i->st_mtim.tv_nsec, f->name);
    digest_add(d, line, (size_t)length);
}

static bool digest_folder(const char *model_dir, const char *const *without, bool with_content, char ret_hex[65], char *why, size_t why_bytes)
{
    struct file_list list = {0};
    struct digest *d = digest_new();
    bool ok = list_model(&list, model_dir, without, why, why_bytes) && (!with_content || hash_list(&list, model_dir, why, why_bytes));
    for (size_t i = 0; ok && i < list.count; i++)
        add_line(d, &list.files[i], with_content);
    ok = finish_hex(d, ok, ret_hex, why, why_bytes);
    list_done(&list);
    return ok;
}

bool digest_model(const char *model_dir, char ret_hex[65], char *why, size_t why_bytes)
{
    return digest_folder(model_dir, nothing, true, ret_hex, why, why_bytes);
}

bool digest_model_without(const char *model_dir, const char *const *parts, char ret_hex[65], char *why, size_t why_bytes)
{
    return digest_folder(model_dir, parts, true, ret_hex, why, why_bytes);
}

bool digest_model_look(const char *model_dir, char ret_hex[65], char *why, size_t why_bytes)
{
    return digest_folder(model_dir, nothing, false, ret_hex, why, why_bytes);
}
