/* janitor_disk.c - a slot for one job, a lock, a condition. The job's memory is the thread's while it is busy. */
#include "janitor_disk.h"

#include <assert.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "store_dir.h"

#define FOLDER_BYTES 4200
#define CLOSE_S 2

enum job { NOTHING, LIST, SETTLE, END };

struct janitor_disk {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    enum job job;              /* under the lock; all below is the thread's unless it is NOTHING */
    bool is_over;
    double age_s;
    janitor_disk_done done;
    char folder[FOLDER_BYTES];
    struct janitor_disk_file files[JANITOR_DISK_FILES_MAX];
    int count;
    bool is_whole;
};

static bool note_file(void *context, uint64_t task, uint64_t token, double age_s)
{
    struct janitor_disk *d = context;
    if (age_s < d->age_s)
        return true;
    d->is_whole = d->count < JANITOR_DISK_FILES_MAX;
    if (d->is_whole)
        d->files[d->count++] = (struct janitor_disk_file){.task = task, .token = token};
    return d->is_whole;
}

/* A folder that is not there has no staged files; one that cannot be read is somebody's to see. */
static void list(struct janitor_disk *d)
{
    struct store_error why = {0};
    d->count = 0;
    d->is_whole = true;
    if (!store_dir_staged(d->folder, note_file, d, &why) && why.fault != STORE_OK && why.fault != STORE_MISSING)
        d->done(d->folder, NULL, why.text);
}

static void settle(struct janitor_disk *d)
{
    for (int i = 0; i < d->count; i++) {
        struct janitor_disk_file *f = &d->files[i];
        struct store_error why = {0};
        bool ok = true;
        if (f->verdict == JANITOR_DISK_PUBLISH)
            ok = store_dir_publish(d->folder, f->task, f->token, f->file, &why);
        else if (f->verdict == JANITOR_DISK_DISCARD)
            ok = store_dir_discard(d->folder, f->task, f->token, &why);
        if (f->verdict != JANITOR_DISK_LEAVE)
            d->done(d->folder, f, ok ? NULL : why.text);
    }
}

static void *run(void *context)
{
    struct janitor_disk *d = context;
    pthread_mutex_lock(&d->lock);
    while (d->job != END) {
        enum job job = d->job;
        if (job == NOTHING) {
            pthread_cond_wait(&d->changed, &d->lock);
            continue;
        }
        pthread_mutex_unlock(&d->lock);
        if (job == LIST)
            list(d);
        else
            settle(d);
        pthread_mutex_lock(&d->lock);
        if (d->job == job)
            d->job = NOTHING;
    }
    d->is_over = true;
    pthread_cond_broadcast(&d->changed);
    pthread_mutex_unlock(&d->lock);
    return NULL;
}

bool janitor_disk_open(struct janitor_disk **ret, double age_s, janitor_disk_done done)
{
    struct janitor_disk *d = calloc(1, sizeof *d);
    if (!d)
        return false;
    d->age_s = age_s;
    d->done = done;
    pthread_condattr_t condition;
    pthread_mutex_init(&d->lock, NULL);
    pthread_condattr_init(&condition);
    pthread_condattr_setclock(&condition, CLOCK_MONOTONIC); /* a wall clock that is set ends no wait */
    pthread_cond_init(&d->changed, &condition);
    pthread_condattr_destroy(&condition);
    if (pthread_create(&d->thread, NULL, run, d) != 0) {
        free(d);
        return false;
    }
    *ret = d;
    return true;
}

void janitor_disk_close(struct janitor_disk *d)
{
    struct timespec until;
    int error = 0;
    if (!d)
        return;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += CLOSE_S;
    pthread_mutex_lock(&d->lock);
    d->job = END;
    pthread_cond_broadcast(&d->changed);
    while (!d->is_over && !error)
        error = pthread_cond_timedwait(&d->changed, &d->lock, &until);
    bool is_over = d->is_over;
    pthread_mutex_unlock(&d->lock);
    if (!is_over) {
        pthread_detach(d->thread); /* it still uses d */
        return;
    }
    pthread_join(d->thread, NULL);
    pthread_mutex_destroy(&d->lock);
    pthread_cond_destroy(&d->changed);
    free(d);
}

static void begin(struct janitor_disk *d, enum job job, const char *folder)
{
    pthread_mutex_lock(&d->lock);
    assert(d->job == NOTHING);
    snprintf(d->folder, sizeof d->folder, "%s", folder);
    d->job = job;
    pthread_cond_broadcast(&d->changed);
    pthread_mutex_unlock(&d->lock);
}

bool janitor_disk_is_busy(struct janitor_disk *d)
{
    pthread_mutex_lock(&d->lock);
    bool busy = d->job != NOTHING;
    pthread_mutex_unlock(&d->lock);
    return busy;
}

void janitor_disk_list(struct janitor_disk *d, const char *folder)
{
    begin(d, LIST, folder);
}

void janitor_disk_settle(struct janitor_disk *d, const char *folder, const struct janitor_disk_file *files, int count)
{
    assert(count <= JANITOR_DISK_FILES_MAX);
    assert(!janitor_disk_is_busy(d));
    memcpy(d->files, files, (size_t)count * sizeof *files);
    d->count = count;
    begin(d, SETTLE, folder);
}

int janitor_disk_files(struct janitor_disk *d, struct janitor_disk_file *ret, bool *is_whole)
{
    assert(!janitor_disk_is_busy(d));
    memcpy(ret, d->files, (size_t)d->count * sizeof *ret);
    *is_whole = d->is_whole;
    return d->count;
}
