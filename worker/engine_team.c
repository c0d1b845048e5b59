/* engine_team.c - a thread for each rank but the first, that does what it is told: open, generate, close.
 *
 * Ranks that compute on cores of a memory node are bound to them while they do, the first one, too: the helpers of its backend
 * are threads it starts and inherit that, and memory is taken where it is first touched. */
#include "engine_team.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "device_list.h"

#define RETURN_MS 2000 /* beyond the patience of the team: then a rank will not come back */
#define LOOK_MS 100

enum order { REST, OPEN, ADAPT, CHECK, GENERATE, LEAVE };

struct rank {
    struct engine_team *team;
    struct engine_options options;
    bool is_bound;
    cpu_set_t cores;
    pthread_t thread;
    bool has_thread;
    enum order order; /* under the team's lock; REST: done */
    struct engine *engine;
    bool ok;
    struct engine_error why;
};

struct engine_team {
    struct kern_team *kern;  /* NULL: one rank */
    int count;
    struct rank ranks[KERN_TEAM_MAX];
    bool is_stuck;           /* a rank never came back: nothing it uses may be freed */
    struct engine_info info;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    const struct engine_adapter *adapters; /* of the order */
    int adapter_count;
    const struct engine_request *requests;
    int request_count;
    struct engine_watch watch;             /* of the ranks behind the first */
};

/* --- one rank ----------------------------------------------------------------------------------------------- */

static void ignore(void *context, const char *name, struct tensor value)
{
    (void)context, (void)name, (void)value;
}

static bool obey(struct rank *r, enum order order, struct engine_image *images, const struct engine_watch *watch)
{
    struct engine_team *t = r->team;
    cpu_set_t before;
    bool ok = true;
    if (r->is_bound) {
        sched_getaffinity(0, sizeof before, &before);
        sched_setaffinity(0, sizeof r->cores, &r->cores);
    }
    if (order == OPEN)
        ok = engine_open(&r->engine, &r->options, &r->why);
    else if (order == ADAPT)
        ok = engine_adapt(r->engine, t->adapters, t->adapter_count, &r->why);
    else if (order == CHECK)
        ok = engine_check(r->engine, t->requests, &r->why);
    else if (order == GENERATE)
        ok = engine_generate(r->engine, t->requests, t->request_count, images, watch, &r->why);
    else
        engine_close(r->engine);
    if (r->is_bound)
        sched_setaffinity(0, sizeof before, &before);
    return ok;
}

static void *rank_main(void *argument)
{
    struct rank *r = argument;
    struct engine_team *t = r->team;
    enum order order;
    do {
        pthread_mutex_lock(&t->lock);
        while (r->order == REST)
            pthread_cond_wait(&t->changed, &t->lock);
        order = r->order;
        pthread_mutex_unlock(&t->lock);
        bool ok = obey(r, order, NULL, &t->watch);
        pthread_mutex_lock(&t->lock);
        r->ok = ok;
        r->order = REST;
        pthread_cond_broadcast(&t->changed);
        pthread_mutex_unlock(&t->lock);
    } while (order != LEAVE);
    return NULL;
}

/* --- all of them ---------------------------------------------------------------------------------------------- */

static void tell(struct engine_team *t, enum order order)
{
    pthread_mutex_lock(&t->lock);
    for (int i = 1; i < t->count; i++)
        if (t->ranks[i].has_thread) {
            t->ranks[i].order = order;
            kern_team_beat(t->kern, i);
        }
    pthread_cond_broadcast(&t->changed);
    pthread_mutex_unlock(&t->lock);
}

/* The one of those at work that gave the last sign of life, or -1: the others may wait for it. */
static int least_silent(const struct engine_team *t)
{
    int found = -1;
    for (int i = 1; i < t->count; i++)
        if (t->ranks[i].order != REST && (found < 0 || kern_team_silent_ms(t->kern, i) < kern_team_silent_ms(t->kern, found)))
            found = i;
    return found;
}

/* Whatever the order: opening a model may take minutes, but who works gives signs of life. A rank that gives none breaks the team, so
 * that what it waits for ends; if it does not come back then, it never will. */
static void await(struct engine_team *t)
{
    struct timespec until;
    int64_t waited_ms = 0;
    int rank;
    pthread_mutex_lock(&t->lock);
    while ((rank = least_silent(t)) >= 0 && !t->is_stuck) {
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += LOOK_MS * 1000000L;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        if (pthread_cond_timedwait(&t->changed, &t->lock, &until) == 0)
            continue;
        waited_ms += LOOK_MS;
        int64_t silent_ms = kern_team_silent_ms(t->kern, rank);
        if (silent_ms > KERN_TEAM_PATIENCE_MS)
            kern_team_break_silent(t->kern, rank);
        t->is_stuck = silent_ms > KERN_TEAM_PATIENCE_MS + RETURN_MS && waited_ms > RETURN_MS;
    }
    pthread_mutex_unlock(&t->lock);
}

/* The error of the one who failed first; the others' are its echoes. */
static bool verdict(struct engine_team *t, struct engine_error *why)
{
    char text[256];
    int first = -1, breaker;
    if (t->is_stuck)
        return engine_error_set(why, ENGINE_DEVICE, "device failed: a rank of the team did not come back");
    for (int i = t->count - 1; i >= 0; i--)
        if (!t->ranks[i].ok)
            first = i;
    if (first < 0)
        return true;
    if (t->kern && kern_team_why(t->kern, text, sizeof text, &breaker) && !t->ranks[breaker].ok)
        first = breaker;
    *why = t->ranks[first].why;
    return false;
}

/* The order on all ranks; rank 0's here. */
static bool all(struct engine_team *t, enum order order, struct engine_image *images, const struct engine_watch *watch,
                struct engine_error *why)
{
    if (t->is_stuck) {
        t->ranks[0].ok = false; /* nothing was done, and there are no images */
        return verdict(t, why);
    }
    tell(t, order);
    t->ranks[0].ok = obey(&t->ranks[0], order, images, watch);
    await(t);
    return verdict(t, why);
}

/* --- opening -------------------------------------------------------------------------------------------------- */

static bool share_threads(const struct engine_options *o, const struct device_list *l, int rank, int *ret, struct engine_error *why)
{
    *ret = 0;
    if (!o->threads)
        return true;
    if (o->threads < l->count)
        return engine_error_set(why, ENGINE_BAD_REQUEST, "%d threads for a team of %d: accepted: at least one each", o->threads, l->count);
    *ret = o->threads * (rank + 1) / l->count - o->threads * rank / l->count;
    return true;
}

/* A dry device counts for all of its kind. */
static int present(const struct device_list *l)
{
    return strncmp(l->ranks[0].device, "dry:", 4) == 0 ? 1 : l->count;
}

static bool seat(struct engine_team *t, const struct engine_options *o, const struct device_list *l, struct engine_error *why)
{
    char text[256];
    for (int i = 0; i < present(l); i++) {
        struct rank *r = &t->ranks[i];
        r->team = t;
        r->options = *o;
        r->options.member = (struct kern_member){t->kern, i, l->count};
        r->is_bound = l->ranks[i].node >= 0;
        r->options.device = strdup(l->ranks[i].device);
        t->count++;
        if (!r->options.device)
            return engine_error_set(why, ENGINE_NO_MEMORY, "no memory for a team");
        if (r->is_bound && !device_list_cores(l, i, &r->cores, text, sizeof text))
            return engine_error_set(why, ENGINE_BAD_REQUEST, "%s", text);
        if (!share_threads(o, l, i, &r->options.threads, why))
            return false;
    }
    return true;
}

static bool start(struct engine_team *t, struct engine_error *why)
{
    for (int i = 1; i < t->count; i++) {
        struct rank *r = &t->ranks[i];
        if (pthread_create(&r->thread, NULL, rank_main, r) != 0)
            return engine_error_set(why, ENGINE_NO_MEMORY, "could start %d of %d ranks", i, t->count);
        r->has_thread = true;
    }
    return true;
}

bool engine_team_open(struct engine_team **ret, const struct engine_options *o, struct engine_error *why)
{
    struct device_list list;
    char text[256];
    if (!device_list_read(&list, o->device ? o->device : "cpu", text, sizeof text))
        return engine_error_set(why, ENGINE_BAD_REQUEST, "%s", text);
    struct engine_team *t = calloc(1, sizeof *t);
    if (!t)
        return engine_error_set(why, ENGINE_NO_MEMORY, "no memory for a team");
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->changed, NULL);
    t->kern = present(&list) > 1 ? kern_team_open(list.count, KERN_TEAM_PATIENCE_MS) : NULL;
    bool ok = (present(&list) == 1 || t->kern) || engine_error_set(why, ENGINE_NO_MEMORY, "no memory for a team");
    if (ok && seat(t, o, &list, why) && start(t, why) && all(t, OPEN, NULL, NULL, why)) {
        *ret = t;
        return true;
    }
    engine_team_close(t);
    return false;
}

void engine_team_close(struct engine_team *t)
{
    if (!t || t->is_stuck)
        return;
    tell(t, LEAVE);
    if (t->count)
        obey(&t->ranks[0], LEAVE, NULL, NULL);
    await(t);
    if (t->is_stuck)
        return;
    for (int i = 0; i < t->count; i++) {
        if (t->ranks[i].has_thread)
            pthread_join(t->ranks[i].thread, NULL);
        free((void *)(uintptr_t)t->ranks[i].options.device);
    }
    kern_team_close(t->kern);
    pthread_cond_destroy(&t->changed);
    pthread_mutex_destroy(&t->lock);
    free(t);
}

/* --- use -------------------------------------------------------------------------------------------------------- */

bool engine_team_adapt(struct engine_team *t, const struct engine_adapter *adapters, int count, struct engine_error *why)
{
    t->adapters = adapters;
    t->adapter_count = count;
    return all(t, ADAPT, NULL, NULL, why);
}

void engine_team_defaults(const struct engine_team *t, struct engine_request *r)
{
    engine_request_defaults(t->ranks[0].engine, r);
}

bool engine_team_check(struct engine_team *t, const struct engine_request *r, struct engine_error *why)
{
    t->requests = r; /* all ranks: what references need is loaded, if all have room */
    return all(t, CHECK, NULL, NULL, why);
}

bool engine_team_generate(struct engine_team *t, const struct engine_request *requests, int count, struct engine_image *images,
                          const struct engine_watch *watch, struct engine_error *why)
{
    t->requests = requests;
    t->request_count = count;
    t->watch = (struct engine_watch){.dump = watch && watch->dump ? ignore : NULL};
    if (all(t, GENERATE, images, watch, why))
        return true;
    for (int i = 0; i < count && t->ranks[0].ok; i++)
        engine_image_done(&images[i]);
    return false;
}

const struct engine_info *engine_team_info(struct engine_team *t)
{
    t->info = *engine_info(t->ranks[0].engine);
    if (t->count > 1)
        snprintf(t->info.device, sizeof t->info.device, "%d x %.57s", t->count, engine_info(t->ranks[0].engine)->device);
    return &t->info;
}
