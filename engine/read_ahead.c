/* read_ahead.c - a ring of weights, which one thread fills and another empties. */
#include "read_ahead.h"

#include <pthread.h>
#include <stdlib.h>

struct read_ahead {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct weight ring[READ_AHEAD_MAX];
    size_t added, begun; /* modulo READ_AHEAD_MAX where it is */
    bool is_ending;
};

static bool take(struct read_ahead *a, struct weight *ret)
{
    pthread_mutex_lock(&a->lock);
    while (a->added == a->begun && !a->is_ending)
        pthread_cond_wait(&a->changed, &a->lock);
    bool is_ending = a->is_ending;
    if (!is_ending)
        *ret = a->ring[a->begun++ % READ_AHEAD_MAX];
    pthread_cond_signal(&a->changed);
    pthread_mutex_unlock(&a->lock);
    return !is_ending;
}

static void *run(void *context)
{
    struct weight w;
    while (take(context, &w))
        weight_files_advise(&w, SAFETENSORS_SOON);
    return NULL;
}

struct read_ahead *read_ahead_open(void)
{
    struct read_ahead *a = calloc(1, sizeof *a);
    if (!a)
        return NULL;
    pthread_mutex_init(&a->lock, NULL);
    pthread_cond_init(&a->changed, NULL);
    if (pthread_create(&a->thread, NULL, run, a) == 0)
        return a;
    pthread_cond_destroy(&a->changed);
    pthread_mutex_destroy(&a->lock);
    free(a);
    return NULL;
}

void read_ahead_add(struct read_ahead *a, const struct weight *w)
{
    if (!a)
        return;
    pthread_mutex_lock(&a->lock);
    while (a->added - a->begun == READ_AHEAD_MAX)
        pthread_cond_wait(&a->changed, &a->lock);
    a->ring[a->added++ % READ_AHEAD_MAX] = *w;
    pthread_cond_signal(&a->changed);
    pthread_mutex_unlock(&a->lock);
}

void read_ahead_close(struct read_ahead *a)
{
    if (!a)
        return;
    pthread_mutex_lock(&a->lock);
    a->is_ending = true;
    pthread_cond_signal(&a->changed);
    pthread_mutex_unlock(&a->lock);
    pthread_join(a->thread, NULL);
    pthread_cond_destroy(&a->changed);
    pthread_mutex_destroy(&a->lock);
    free(a);
}
