/* mailbox.c - a list, a lock, a condition, and an eventfd for the thread that sleeps in poll. */
#include "mailbox.h"

#include <assert.h>
#include <stdint.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

bool mailbox_init(struct mailbox *m, bool has_fd)
{
    pthread_condattr_t attributes;
    m->first = m->last = NULL;
    m->is_closed = false;
    m->event_fd = has_fd ? eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK) : -1;
    if (has_fd && m->event_fd < 0)
        return false;
    pthread_mutex_init(&m->lock, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC); /* waits survive a set clock */
    pthread_cond_init(&m->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    return true;
}

void mailbox_done(struct mailbox *m)
{
    assert(!m->first);
    pthread_cond_destroy(&m->changed);
    pthread_mutex_destroy(&m->lock);
    if (m->event_fd >= 0)
        close(m->event_fd);
}

void mailbox_put(struct mailbox *m, struct mail *item)
{
    item->next = NULL;
    pthread_mutex_lock(&m->lock);
    if (m->last)
        m->last->next = item;
    else
        m->first = item;
    m->last = item;
    pthread_cond_signal(&m->changed);
    pthread_mutex_unlock(&m->lock);
    mailbox_wake(m);
}

static struct mail *take_first(struct mailbox *m)
{
    struct mail *item = m->first;
    if (!item)
        return NULL;
    m->first = item->next;
    if (!m->first)
        m->last = NULL;
    item->next = NULL;
    return item;
}

void *mailbox_take(struct mailbox *m)
{
    pthread_mutex_lock(&m->lock);
    struct mail *item = take_first(m);
    pthread_mutex_unlock(&m->lock);
    return item;
}

static struct timespec time_after(int timeout_ms)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_sec += timeout_ms / 1000;
    t.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
    if (t.tv_nsec >= 1000000000) {
        t.tv_sec++;
        t.tv_nsec -= 1000000000;
    }
    return t;
}

void *mailbox_wait(struct mailbox *m, int timeout_ms)
{
    struct timespec until = time_after(timeout_ms < 0 ? 0 : timeout_ms);
    int error = 0;
    pthread_mutex_lock(&m->lock);
    while (!m->first && !m->is_closed && error == 0)
        error = timeout_ms < 0 ? pthread_cond_wait(&m->changed, &m->lock)
                               : pthread_cond_timedwait(&m->changed, &m->lock, &until);
    struct mail *item = take_first(m);
    pthread_mutex_unlock(&m->lock);
    return item;
}

void mailbox_close(struct mailbox *m)
{
    pthread_mutex_lock(&m->lock);
    m->is_closed = true;
    pthread_cond_broadcast(&m->changed);
    pthread_mutex_unlock(&m->lock);
}

bool mailbox_is_closed(struct mailbox *m)
{
    pthread_mutex_lock(&m->lock);
    bool is_closed = m->is_closed;
    pthread_mutex_unlock(&m->lock);
    return is_closed;
}

void mailbox_wake(struct mailbox *m)
{
    uint64_t one = 1;
    if (m->event_fd >= 0 && write(m->event_fd, &one, sizeof one) < 0) {
        /* The counter is at its end: then the file descriptor is readable anyway. */
    }
}

void mailbox_calm(struct mailbox *m)
{
    uint64_t count;
    if (m->event_fd >= 0 && read(m->event_fd, &count, sizeof count) < 0) {
        /* Nothing was put since: fine. */
    }
}
