/* spool.c - records of finished images on disk, and the list of what is not yet acknowledged.
 *
 * A record is complete or not there: written under a name that is ignored at start, fsynced, renamed, and the
 * folder fsynced. Numbers of 64 bits are texts in it, because JSON readers elsewhere round them. */
#include "spool.h"

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define RECORD_VERSION 1
#define RECORD_BYTES_MAX 65536

/* --- entries --------------------------------------------------------------------------------------- */

void spool_entry_free(struct spool_entry *e)
{
    if (!e)
        return;
    free(e->out_dir);
    free(e->file);
    free(e->reason);
    free(e);
}

struct spool_entry *spool_entry_failed(uint64_t task, uint64_t token, const struct failure *failure)
{
    struct spool_entry *e = calloc(1, sizeof *e);
    if (!e)
        return NULL;
    e->task = task;
    e->token = token;
    e->kind = failure->kind;
    e->reason = strdup(failure->reason);
    e->wait_ms = SPOOL_WAIT_MS;
    if (e->reason)
        return e;
    spool_entry_free(e);
    return NULL;
}

struct spool_entry *spool_entry_result(uint64_t task, uint64_t token, const char *out_dir, const char *file)
{
    struct spool_entry *e = calloc(1, sizeof *e);
    if (!e)
        return NULL;
    e->task = task;
    e->token = token;
    e->is_result = true;
    e->wait_ms = SPOOL_WAIT_MS;
    e->out_dir = strdup(out_dir);
    e->file = strdup(file);
    if (e->out_dir && e->file)
        return e;
    spool_entry_free(e);
    return NULL;
}

/* --- a record and its JSON --------------------------------------------------------------------------- */

static json_t *text_of_u64(uint64_t value)
{
    char text[24];
    snprintf(text, sizeof text, "%" PRIu64, value);
    return json_string(text);
}

static json_t *record_of(const struct spool_entry *e)
{
    json_t *o = json_object();
    json_object_set_new(o, "version", json_integer(RECORD_VERSION));
    json_object_set_new(o, "task", text_of_u64(e->task));
    json_object_set_new(o, "token", text_of_u64(e->token));
    json_object_set_new(o, "out_dir", json_string(e->out_dir));
    json_object_set_new(o, "file", json_string(e->file));
    json_object_set_new(o, "sha256", json_string(e->sha256));
    json_object_set_new(o, "digest", json_string(e->digest));
    json_object_set_new(o, "bytes", text_of_u64(e->bytes));
    json_object_set_new(o, "seed", text_of_u64(e->seed));
    json_object_set_new(o, "width", json_integer(e->width));
    json_object_set_new(o, "height", json_integer(e->height));
    json_object_set_new(o, "steps", json_integer(e->steps));
    json_object_set_new(o, "guidance", isfinite(e->guidance) ? json_real(e->guidance) : json_null());
    json_object_set_new(o, "render_s", isfinite(e->render_s) ? json_real(e->render_s) : json_null());
    json_object_set_new(o, "truncated", json_boolean(e->truncated));
    return o;
}

static bool u64_of(const json_t *o, const char *key, uint64_t *ret)
{
    const char *text = json_string_value(json_object_get(o, key));
    char *end;
    if (!text || *text < '0' || *text > '9')
        return false;
    errno = 0;
    *ret = strtoull(text, &end, 10);
    return errno == 0 && !*end;
}

static bool u32_of(const json_t *o, const char *key, uint32_t *ret)
{
    const json_t *value = json_object_get(o, key);
    json_int_t number = json_integer_value(value);
    if (!json_is_integer(value) || number < 0 || number > UINT32_MAX)
        return false;
    *ret = (uint32_t)number;
    return true;
}

static bool real_of(const json_t *o, const char *key, double *ret)
{
    const json_t *value = json_object_get(o, key);
    *ret = json_is_null(value) ? (double)NAN : json_number_value(value);
    return json_is_null(value) || json_is_number(value);
}

static bool hex_of(const json_t *o, const char *key, char ret[65])
{
    const char *text = json_string_value(json_object_get(o, key));
    if (!text || strlen(text) != 64 || strspn(text, "0123456789abcdef") != 64)
        return false;
    memcpy(ret, text, 65);
    return true;
}

static struct spool_entry *entry_of(const json_t *o)
{
    uint64_t task, token;
    const char *out_dir = json_string_value(json_object_get(o, "out_dir"));
    const char *file = json_string_value(json_object_get(o, "file"));
    if (json_integer_value(json_object_get(o, "version")) != RECORD_VERSION || !out_dir || !file ||
        strlen(out_dir) > MSG_PATH_MAX || strlen(file) > 255 || !u64_of(o, "task", &task) || !u64_of(o, "token", &token))
        return NULL;
    struct spool_entry *e = spool_entry_result(task, token, out_dir, file);
    if (!e)
        return NULL;
    e->truncated = json_is_true(json_object_get(o, "truncated"));
    if (u64_of(o, "bytes", &e->bytes) && u64_of(o, "seed", &e->seed) && u32_of(o, "width", &e->width) &&
        u32_of(o, "height", &e->height) && u32_of(o, "steps", &e->steps) && real_of(o, "guidance", &e->guidance) &&
        real_of(o, "render_s", &e->render_s) && hex_of(o, "sha256", e->sha256) && hex_of(o, "digest", e->digest))
        return e;
    spool_entry_free(e);
    return NULL;
}

/* --- files ----------------------------------------------------------------------------------------- */

static void record_path(char ret[PATH_MAX], const char *dir, uint64_t task, uint64_t token, const char *ending)
{
    snprintf(ret, PATH_MAX, "%s/%" PRIu64 "-%" PRIu64 "%s", dir, task, token, ending);
}

static bool sync_dir(const char *dir)
{
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return false;
    bool ok = fsync(fd) == 0 || errno == EINVAL;
    close(fd);
    return ok;
}

static bool write_synced(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0)
        return false;
    size_t left = strlen(text);
    ssize_t put = 0;
    while (left > 0 && (put = write(fd, text, left)) > 0) {
        text += put;
        left -= (size_t)put;
    }
    bool ok = left == 0 && fsync(fd) == 0;
    int error = errno;
    ok = close(fd) == 0 && ok;
    if (!ok)
        errno = error;
    return ok;
}

bool spool_save(const char *dir, const struct spool_entry *e, char *why, size_t why_bytes)
{
    char path[PATH_MAX], half[PATH_MAX];
    record_path(path, dir, e->task, e->token, ".json");
    record_path(half, dir, e->task, e->token, ".part");
    json_t *record = record_of(e);
    char *text = record ? json_dumps(record, JSON_INDENT(1)) : NULL;
    json_decref(record);
    errno = ENOMEM;
    bool ok = text && write_synced(half, text) && rename(half, path) == 0 && sync_dir(dir);
    if (!ok) {
        snprintf(why, why_bytes, "%s: cannot write the spool record: %s", path, strerror(errno));
        unlink(half);
    }
    free(text);
    return ok;
}

bool spool_forget(const char *dir, uint64_t task, uint64_t token, char *why, size_t why_bytes)
{
    char path[PATH_MAX];
    record_path(path, dir, task, token, ".json");
    if (unlink(path) == 0 || errno == ENOENT)
        return true;
    snprintf(why, why_bytes, "%s: cannot remove the spool record: %s", path, strerror(errno));
    return false;
}

static bool ends_with(const char *text, const char *ending)
{
    size_t a = strlen(text), b = strlen(ending);
    return a >= b && strcmp(text + a - b, ending) == 0;
}

static struct spool_entry *load_record(const char *path)
{
    struct stat info;
    if (stat(path, &info) != 0 || !S_ISREG(info.st_mode) || info.st_size > RECORD_BYTES_MAX) /* opening a FIFO would wait for ever */
        return NULL;
    json_t *o = json_load_file(path, JSON_REJECT_DUPLICATES, NULL);
    struct spool_entry *e = o ? entry_of(o) : NULL;
    json_decref(o);
    return e;
}

static void load_one(struct spool *s, const char *name, int *bad_count)
{
    char path[PATH_MAX], aside[PATH_MAX];
    if ((size_t)snprintf(path, sizeof path, "%s/%s", s->dir, name) >= sizeof path)
        return;
    if (ends_with(name, ".part")) {
        unlink(path); /* RESULT was never sent for it; the staged file is the janitor's */
        return;
    }
    if (!ends_with(name, ".json"))
        return;
    struct spool_entry *e = load_record(path);
    if (e) {
        spool_add(s, e);
        return;
    }
    (*bad_count)++;
    if ((size_t)snprintf(aside, sizeof aside, "%s.bad", path) < sizeof aside && rename(path, aside) != 0)
        unlink(path);
}

static bool make_dirs(const char *dir)
{
    char part[PATH_MAX];
    if ((size_t)snprintf(part, sizeof part, "%s", dir) >= sizeof part) {
        errno = ENAMETOOLONG;
        return false;
    }
    for (char *p = part + 1; *p; p++)
        if (*p == '/') {
            *p = 0;
            mkdir(part, 0777); /* what matters is the last one */
            *p = '/';
        }
    return mkdir(part, 0777) == 0 || errno == EEXIST;
}

bool spool_prepare(const char *dir, char *why, size_t why_bytes)
{
    if (make_dirs(dir) && access(dir, R_OK | W_OK | X_OK) == 0)
        return true;
    snprintf(why, why_bytes, "spool folder %s: %s; name another with --spool", dir, strerror(errno));
    return false;
}

bool spool_open(struct spool *s, const char *dir, int *ret_bad_count, char *why, size_t why_bytes)
{
    memset(s, 0, sizeof *s);
    *ret_bad_count = 0;
    if (!spool_prepare(dir, why, why_bytes))
        return false;
    s->dir = strdup(dir);
    DIR *folder = s->dir ? opendir(dir) : NULL;
    if (!folder) {
        snprintf(why, why_bytes, "spool folder %s: %s", dir, strerror(errno));
        spool_done(s);
        return false;
    }
    for (struct dirent *d; (d = readdir(folder));)
        load_one(s, d->d_name, ret_bad_count);
    closedir(folder);
    return true;
}

void spool_done(struct spool *s)
{
    while (s->first) {
        struct spool_entry *e = s->first;
        spool_remove(s, e);
        spool_entry_free(e);
    }
    free(s->dir);
    s->dir = NULL;
}

/* --- the list -------------------------------------------------------------------------------------- */

static struct spool_entry *entry_after(const struct spool_entry *e)
{
    return (struct spool_entry *)(void *)e->mail.next;
}

void spool_add(struct spool *s, struct spool_entry *e)
{
    e->mail.next = NULL;
    if (s->last)
        s->last->mail.next = &e->mail;
    else
        s->first = e;
    s->last = e;
    s->count++;
    s->result_count += e->is_result;
}

struct spool_entry *spool_find(const struct spool *s, uint64_t task, uint64_t token)
{
    for (struct spool_entry *e = s->first; e; e = entry_after(e))
        if (e->task == task && e->token == token)
            return e;
    return NULL;
}

void spool_remove(struct spool *s, struct spool_entry *e)
{
    struct spool_entry *before = NULL, *at = s->first;
    while (at && at != e) {
        before = at;
        at = entry_after(at);
    }
    assert(at);
    if (before)
        before->mail.next = e->mail.next;
    else
        s->first = entry_after(e);
    if (s->last == e)
        s->last = before;
    e->mail.next = NULL;
    s->count--;
    s->result_count -= e->is_result;
}

uint32_t spool_due(const struct spool *s, bool results, int64_t now_ms, struct spool_entry **ret, uint32_t max)
{
    uint32_t count = 0;
    for (struct spool_entry *e = s->first; e && count < max; e = entry_after(e))
        if (e->is_result == results && !e->is_settling && e->due_ms <= now_ms)
            ret[count++] = e;
    return count;
}

void spool_said(struct spool_entry *e, int64_t now_ms)
{
    e->due_ms = now_ms + e->wait_ms;
    e->wait_ms = 2 * e->wait_ms < SPOOL_WAIT_MAX_MS ? 2 * e->wait_ms : SPOOL_WAIT_MAX_MS;
}

void spool_hurry(struct spool *s, int64_t now_ms)
{
    for (struct spool_entry *e = s->first; e; e = entry_after(e)) {
        e->due_ms = now_ms;
        e->wait_ms = SPOOL_WAIT_MS;
    }
}
