/* fleet.c - lists by state, hash tables by name, by peer and by (task, token). Held tasks come from blocks that are kept:
 * twenty thousand a second come and go without touching the allocator. */
#include "fleet.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WORKER_BUCKETS 4096
#define HELD_BUCKETS_FIRST 4096 /* a power of two, doubled as it fills */
#define HELD_BLOCK 1024

struct held_block { struct held_block *next; struct fleet_held item[HELD_BLOCK]; };

struct fleet {
    struct fleet_worker *list[FLEET_STATES];
    int count[FLEET_STATES], worker_count;
    struct fleet_worker *by_name[WORKER_BUCKETS], *by_peer[WORKER_BUCKETS];
    struct fleet_held **by_task;
    uint64_t held_buckets;
    int held_count;
    struct held_block *blocks;
    struct fleet_held *spare, *lease_first, *lease_last;
    char *names[FLEET_NAMES_MAX];
    int name_count;
};

struct fleet *fleet_new(void)
{
    struct fleet *f = calloc(1, sizeof *f);
    if (!f)
        return NULL;
    f->held_buckets = HELD_BUCKETS_FIRST;
    f->by_task = calloc(f->held_buckets, sizeof(struct fleet_held *));
    if (f->by_task)
        return f;
    free(f);
    return NULL;
}

void fleet_free(struct fleet *f)
{
    if (!f)
        return;
    for (int s = 0; s < FLEET_STATES; s++)
        for (struct fleet_worker *w = f->list[s], *next; w; w = next) {
            next = w->next;
            free(w);
        }
    for (struct held_block *b = f->blocks, *next; b; b = next) {
        next = b->next;
        free(b);
    }
    for (int i = 0; i < f->name_count; i++)
        free(f->names[i]);
    free(f->by_task);
    free(f);
}

/* --- names ----------------------------------------------------------------------------------------------------- */

static unsigned bucket_of(const char *text)
{
    uint32_t hash = 2166136261u; /* FNV-1a */
    for (; *text; text++)
        hash = (hash ^ (unsigned char)*text) * 16777619u;
    return hash % WORKER_BUCKETS;
}

int fleet_name_find(const struct fleet *f, const char *model)
{
    for (int i = 0; i < f->name_count; i++)
        if (strcmp(f->names[i], model) == 0)
            return i;
    return -1;
}

int fleet_name_id(struct fleet *f, const char *model)
{
    int id = fleet_name_find(f, model);
    if (id >= 0)
        return id;
    if (f->name_count == FLEET_NAMES_MAX || !(f->names[f->name_count] = strdup(model)))
        return -1;
    return f->name_count++;
}

const char *fleet_state_name(enum fleet_state s)
{
    static const char *const name[FLEET_STATES] = {"greeting", "idle", "busy", "blocked", "draining", "silent", "gone"};
    return name[s];
}

int fleet_count(const struct fleet *f, enum fleet_state s)
{
    return f->count[s];
}

int fleet_held_count(const struct fleet *f)
{
    return f->held_count;
}

struct fleet_worker *fleet_first(const struct fleet *f, enum fleet_state s)
{
    return f->list[s];
}

struct fleet_worker *fleet_find(const struct fleet *f, const char *name)
{
    struct fleet_worker *w = f->by_name[bucket_of(name)];
    while (w && strcmp(w->name, name) != 0)
        w = w->next_name;
    return w;
}

struct fleet_worker *fleet_find_peer(const struct fleet *f, const char *peer)
{
    struct fleet_worker *w = f->by_peer[bucket_of(peer)];
    while (w && strcmp(w->peer, peer) != 0)
        w = w->next_peer;
    return w;
}

/* --- states ---------------------------------------------------------------------------------------------------- */

static void list_remove(struct fleet *f, struct fleet_worker *w)
{
    *(w->prev ? &w->prev->next : &f->list[w->state]) = w->next;
    if (w->next)
        w->next->prev = w->prev;
    f->count[w->state]--;
}

static void list_add(struct fleet *f, struct fleet_worker *w)
{
    w->prev = NULL;
    w->next = f->list[w->state];
    if (w->next)
        w->next->prev = w;
    f->list[w->state] = w;
    f->count[w->state]++;
}

static bool may_move(enum fleet_state from, enum fleet_state to)
{
    if (to == FLEET_GREETING || to == FLEET_GONE)
        return true; /* a HELLO or a BYE comes when it comes */
    if (from == FLEET_GONE)
        return false;
    return true;
}

void fleet_move(struct fleet *f, struct fleet_worker *w, enum fleet_state to)
{
    assert(may_move(w->state, to));
    if (w->state == to)
        return;
    if (to == FLEET_SILENT)
        w->state_before = w->state;
    list_remove(f, w);
    w->state = to;
    list_add(f, w);
    w->is_changed = true;
}

void fleet_review(struct fleet *f, struct fleet_worker *w)
{
    if (w->state == FLEET_GREETING || w->state == FLEET_SILENT || w->state == FLEET_GONE)
        return;
    if (strncmp(w->said, "blocked", 7) == 0)
        fleet_move(f, w, FLEET_BLOCKED);
    else if (strncmp(w->said, "draining", 8) == 0)
        fleet_move(f, w, FLEET_DRAINING);
    else
        fleet_move(f, w, w->held_count > 0 ? FLEET_BUSY : FLEET_IDLE);
}

void fleet_heard(struct fleet *f, struct fleet_worker *w, int64_t now_ms)
{
    w->heard_ms = now_ms;
    if (w->state == FLEET_SILENT)
        fleet_move(f, w, w->state_before);
}

/* --- coming and going ------------------------------------------------------------------------------------------ */

static void peer_add(struct fleet *f, struct fleet_worker *w, const char *peer)
{
    snprintf(w->peer, sizeof w->peer, "%s", peer);
    struct fleet_worker **bucket = &f->by_peer[bucket_of(w->peer)];
    w->next_peer = *bucket;
    *bucket = w;
}

static void peer_remove(struct fleet *f, struct fleet_worker *w)
{
    struct fleet_worker **at = &f->by_peer[bucket_of(w->peer)];
    while (*at && *at != w)
        at = &(*at)->next_peer;
    if (*at)
        *at = w->next_peer;
}

static struct fleet_worker *worker_new(struct fleet *f, const char *name, char *why, size_t why_bytes)
{
    struct fleet_worker *w = f->worker_count < FLEET_WORKERS_MAX ? calloc(1, sizeof *w) : NULL;
    if (!w) {
        snprintf(why, why_bytes, f->worker_count < FLEET_WORKERS_MAX ? "out of memory for another worker"
                                                                     : "this coordinator has %d workers, which is all it takes", FLEET_WORKERS_MAX);
        return NULL;
    }
    snprintf(w->name, sizeof w->name, "%s", name);
    w->model = -1;
    w->next_name = f->by_name[bucket_of(name)];
    f->by_name[bucket_of(name)] = w;
    f->worker_count++;
    list_add(f, w);
    return w;
}

/* What a peer tells about itself is shown in tables: the names of its models, as far as they fit. */
static bool note_models(struct fleet *f, struct fleet_worker *w, const struct msg_hello *h, char *why, size_t why_bytes)
{
    size_t used = 0;
    struct dispatch_model models[DISPATCH_MODELS_MAX];
    static_assert(DISPATCH_MODELS_MAX >= MSG_MODELS_MAX, "every model of a HELLO has a place");
    for (uint32_t i = 0; i < h->model_count; i++) {
        models[i] = (struct dispatch_model){fleet_name_id(f, h->models[i].name), strcmp(h->models[i].licence, MSG_LICENCE_NON_COMMERCIAL) == 0};
        if (models[i].model < 0) {
            snprintf(why, why_bytes, "model '%s': this coordinator has heard %d names of models, which is all it takes", h->models[i].name, FLEET_NAMES_MAX);
            return false;
        }
    }
    if (!w)
        return true;
    memcpy(w->models, models, sizeof models[0] * h->model_count);
    w->model_count = (int)h->model_count;
    for (uint32_t i = 0; i < h->model_count; i++)
        snprintf(w->digests[i], sizeof w->digests[i], "%s", h->models[i].digest);
    w->models_text[0] = '\0';
    for (uint32_t i = 0; i < h->model_count && used < sizeof w->models_text; i++)
        used += (size_t)snprintf(w->models_text + used, sizeof w->models_text - used, "%s%s", i ? "," : "", h->models[i].name);
    return true;
}

struct fleet_worker *fleet_hello(struct fleet *f, const struct msg_hello *h, const char *peer, int64_t now_ms, char *why, size_t why_bytes)
{
    struct fleet_worker *w = fleet_find(f, h->worker);
    if (!note_models(f, NULL, h, why, why_bytes) || (!w && !(w = worker_new(f, h->worker, why, why_bytes))))
        return NULL;
    peer_remove(f, w);
    peer_add(f, w, peer);
    note_models(f, w, h, why, why_bytes);
    snprintf(w->device, sizeof w->device, "%s", h->device);
    snprintf(w->host, sizeof w->host, "%s", h->host);
    w->is_new_process = w->boot_epoch != h->boot_epoch;
    w->boot_epoch = h->boot_epoch;
    w->pid = h->pid;
    w->session++;
    w->credit = w->batch_max = 0;
    w->returning = 0;
    w->pause_ms = 0;
    w->heard_ms = w->step_ms = now_ms;
    w->step_counter = 0;
    w->is_stuck = false;
    w->said[0] = '\0';
    w->is_changed = true;
    if (w->is_new_process) { /* another process: nothing loaded, maybe another device */
        w->model = -1;
        w->cap_count = w->next_cap = 0;
    }
    for (struct fleet_held *held = w->held, *next; held; held = next) {
        next = held->next;
        fleet_count_held(held, false);
        held->is_before = !held->is_reported;
        if (w->is_new_process)
            fleet_lease_leave(f, held);
        if (held->is_lost && !held->is_reported)
            fleet_drop(f, held);
    }
    fleet_move(f, w, FLEET_GREETING);
    return w;
}

void fleet_forget(struct fleet *f, struct fleet_worker *w)
{
    assert(w->state == FLEET_GONE);
    assert(w->pins == 0);
    while (w->held)
        fleet_drop(f, w->held);
    struct fleet_worker **at = &f->by_name[bucket_of(w->name)];
    while (*at != w)
        at = &(*at)->next_name;
    *at = w->next_name;
    peer_remove(f, w);
    list_remove(f, w);
    f->worker_count--;
    free(w);
}

int fleet_free_credit(const struct fleet_worker *w)
{
    if (w->state != FLEET_IDLE && w->state != FLEET_BUSY)
        return 0;
    int64_t left = (int64_t)w->credit - (w->unacked - w->returning);
    return left > 0 ? (left < 1 << 20 ? (int)left : 1 << 20) : 0;
}

void fleet_cap(struct fleet_worker *w, int model, int64_t pixels, int cap)
{
    for (int i = 0; i < w->cap_count; i++)
        if (w->caps[i].model == model && w->caps[i].pixels == pixels) {
            w->caps[i].cap = cap;
            return;
        }
    w->caps[w->next_cap] = (struct dispatch_cap){model, pixels, cap};
    w->next_cap = (w->next_cap + 1) % DISPATCH_CAPS_MAX;
    if (w->cap_count < DISPATCH_CAPS_MAX)
        w->cap_count++;
}

/* --- held tasks ------------------------------------------------------------------------------------------------ */

static uint64_t held_bucket(const struct fleet *f, uint64_t task, uint64_t token)
{
    uint64_t x = (task ^ (token << 40)) * 0x9e3779b97f4a7c15u;
    return (x ^ x >> 32) & (f->held_buckets - 1);
}

/* Without memory for a wider table the old one goes on, only slower. */
static void widen(struct fleet *f)
{
    uint64_t before = f->held_buckets;
    struct fleet_held **wide = calloc(2 * before, sizeof(struct fleet_held *)), **old = f->by_task;
    if (!wide)
        return;
    f->by_task = wide;
    f->held_buckets = 2 * before;
    for (uint64_t i = 0; i < before; i++)
        for (struct fleet_held *h = old[i], *next; h; h = next) {
            next = h->next_hash;
            struct fleet_held **bucket = &wide[held_bucket(f, h->task, h->token)];
            h->next_hash = *bucket;
            *bucket = h;
        }
    free(old);
}

static struct fleet_held *held_take(struct fleet *f)
{
    if (!f->spare) {
        struct held_block *b = malloc(sizeof *b);
        if (!b)
            return NULL;
        b->next = f->blocks;
        f->blocks = b;
        for (int i = 0; i < HELD_BLOCK; i++) {
            b->item[i].next = f->spare;
            f->spare = &b->item[i];
        }
    }
    struct fleet_held *h = f->spare;
    f->spare = h->next;
    return h;
}

static void lease_join(struct fleet *f, struct fleet_held *h, bool at_front)
{
    h->is_leased = true;
    h->lease_prev = at_front ? NULL : f->lease_last;
    h->lease_next = at_front ? f->lease_first : NULL;
    *(h->lease_prev ? &h->lease_prev->lease_next : &f->lease_first) = h;
    *(h->lease_next ? &h->lease_next->lease_prev : &f->lease_last) = h;
}

void fleet_lease_leave(struct fleet *f, struct fleet_held *h)
{
    if (!h->is_leased)
        return;
    h->is_leased = false;
    *(h->lease_prev ? &h->lease_prev->lease_next : &f->lease_first) = h->lease_next;
    *(h->lease_next ? &h->lease_next->lease_prev : &f->lease_last) = h->lease_prev;
}

void fleet_lease_enter(struct fleet *f, struct fleet_held *h)
{
    h->extended_ms = 0;
    fleet_lease_leave(f, h);
    lease_join(f, h, true);
}

struct fleet_held *fleet_lease_first(const struct fleet *f)
{
    return f->lease_first;
}

void fleet_lease_renewed(struct fleet *f, struct fleet_held *h, int64_t now_ms)
{
    h->extended_ms = now_ms;
    if (!h->is_leased)
        return;
    fleet_lease_leave(f, h);
    lease_join(f, h, false);
}

struct fleet_held *fleet_hold(struct fleet *f, struct fleet_worker *w, uint64_t task, uint64_t token, int64_t extended_ms)
{
    if ((uint64_t)f->held_count >= f->held_buckets)
        widen(f);
    struct fleet_held *h = held_take(f);
    if (!h)
        return NULL;
    struct fleet_held **bucket = &f->by_task[held_bucket(f, task, token)];
    *h = (struct fleet_held){.task = task, .token = token, .worker = w, .shape = -1, .extended_ms = extended_ms, .next_hash = *bucket, .next = w->held};
    *bucket = h;
    if (h->next)
        h->next->prev = h;
    w->held = h;
    w->held_count++;
    f->held_count++;
    lease_join(f, h, extended_ms == 0);
    return h;
}

struct fleet_held *fleet_held_find(const struct fleet *f, uint64_t task, uint64_t token)
{
    struct fleet_held *h = f->by_task[held_bucket(f, task, token)];
    while (h && (h->task != task || h->token != token))
        h = h->next_hash;
    return h;
}

void fleet_count_held(struct fleet_held *h, bool is_counted)
{
    h->worker->unacked += is_counted - h->is_counted;
    h->is_counted = is_counted;
}

void fleet_drop(struct fleet *f, struct fleet_held *h)
{
    struct fleet_worker *w = h->worker;
    struct fleet_held **at = &f->by_task[held_bucket(f, h->task, h->token)];
    while (*at != h)
        at = &(*at)->next_hash;
    *at = h->next_hash;
    *(h->prev ? &h->prev->next : &w->held) = h->next;
    if (h->next)
        h->next->prev = h->prev;
    fleet_lease_leave(f, h);
    fleet_count_held(h, false);
    w->held_count--;
    f->held_count--;
    h->next = f->spare;
    f->spare = h;
}
