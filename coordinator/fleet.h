/* fleet.h - the workers and what each of them holds.
 *
 *   greeting ──READY──▶ idle ⇄ busy          idle, busy, blocked, draining: heard, leases are extended
 *      ▲                 ⇅     ⇅
 *   HELLO          blocked   draining
 *      any of these ──nothing heard──▶ silent ──heard again──▶ where it was
 *      any of these ──BYE, forgotten──▶ gone
 *
 * A state is a list; fleet_move is the only function that puts a worker into one. A held task is found by (task, token)
 * at once, whoever has it, and stands in the fleet's line of leases, the longest unextended first. */
#ifndef KILN_FLEET_H
#define KILN_FLEET_H

#include <stdbool.h>
#include <stdint.h>

#include "dispatch.h"
#include "msg.h"

#define FLEET_WORKERS_MAX DISPATCH_WORKERS_MAX
#define FLEET_NAMES_MAX 4096 /* different model names */
#define FLEET_PEER_MAX 256

enum fleet_state { FLEET_GREETING, FLEET_IDLE, FLEET_BUSY, FLEET_BLOCKED, FLEET_DRAINING, FLEET_SILENT, FLEET_GONE, FLEET_STATES };

struct fleet_worker;
struct fleet_held {
    uint64_t task, token;
    struct fleet_worker *worker;
    int shape;               /* the caller's number of model, pixels and steps; -1: unknown */
    int batch_size;          /* of the batch it was sent in */
    double since_s;          /* claimed */
    int64_t extended_ms;     /* when its lease was last known to be new */
    bool is_counted;         /* against the credit: assigned in this session */
    bool is_before;          /* assigned before the last HELLO: READY will say whether it is still there */
    bool is_reported;        /* the worker has said what became of it; it leaves when that is answered */
    bool is_lost;            /* given back because the worker was silent; stands here until the worker speaks of it */
    struct fleet_held *next_hash, *next, *prev, *lease_next, *lease_prev;
    bool is_leased;          /* stands in the line of leases */
};

struct fleet_worker {
    char name[MSG_NAME_MAX + 1], peer[FLEET_PEER_MAX], device[MSG_NAME_MAX + 1], host[256], models_text[512];
    char said[MSG_REASON_MAX + 1]; /* state in its last heartbeat */
    uint64_t boot_epoch;
    uint32_t pid;
    enum fleet_state state, state_before; /* before it fell silent */
    unsigned session;        /* counts HELLOs */
    bool is_new_process;     /* the last HELLO had another boot epoch than the one before */
    uint32_t credit, batch_max;
    int held_count;          /* in its list */
    int unacked;             /* of those, counted against the credit */
    int returning;           /* of those, reported and in the running turn */
    int pins;                /* turns and queues that point here: it may be gone, but not forgotten */
    int64_t heard_ms, step_ms; /* last heard; last time its step counter moved or it held nothing */
    uint64_t step_counter;
    bool is_stuck;
    int model;               /* of its last batch, -1 none */
    int64_t loras;           /* the same, a number; 0: none */
    struct dispatch_model models[DISPATCH_MODELS_MAX]; int model_count;
    char digests[DISPATCH_MODELS_MAX][65]; /* of the models' weights */
    struct dispatch_cap caps[DISPATCH_CAPS_MAX]; int cap_count, next_cap;
    int64_t pause_ms;        /* nothing is assigned before: the last ASSIGN could not be delivered */
    int64_t beat_ms;         /* when the database was last told about it */
    bool is_changed;         /* since then */
    int mark;                /* scratch of the caller */
    struct fleet_held *held;
    struct fleet_worker *next, *prev, *next_name, *next_peer;
};

struct fleet;
struct fleet *fleet_new(void); /* NULL: no memory */
void fleet_free(struct fleet *f);

int fleet_name_id(struct fleet *f, const char *model);         /* a number for a model's name; -1: too many names */
int fleet_name_find(const struct fleet *f, const char *model); /* -1: nobody has named it yet */
const char *fleet_state_name(enum fleet_state s);      /* "idle" */
int fleet_count(const struct fleet *f, enum fleet_state s);
int fleet_held_count(const struct fleet *f);
struct fleet_worker *fleet_first(const struct fleet *f, enum fleet_state s); /* then ->next */
struct fleet_worker *fleet_find(const struct fleet *f, const char *name);
struct fleet_worker *fleet_find_peer(const struct fleet *f, const char *peer);

/* fleet_hello makes or renews a worker: session + 1, state greeting, what it holds is from before; of another process it
 * is not extended until READY names it. NULL: the fleet is
 * full or out of memory, why says which. The caller has decided that this process may have the name. */
struct fleet_worker *fleet_hello(struct fleet *f, const struct msg_hello *h, const char *peer, int64_t now_ms, char *why, size_t why_bytes);
void fleet_heard(struct fleet *f, struct fleet_worker *w, int64_t now_ms); /* a silent one goes back to where it was */
void fleet_move(struct fleet *f, struct fleet_worker *w, enum fleet_state to);
/* fleet_review moves a worker between idle, busy, blocked and draining by what it holds and says. */
void fleet_review(struct fleet *f, struct fleet_worker *w);
void fleet_forget(struct fleet *f, struct fleet_worker *w); /* a gone one without pins; its held tasks go with it */
int fleet_free_credit(const struct fleet_worker *w);    /* once the running turn is answered; 0 unless idle or busy */
void fleet_cap(struct fleet_worker *w, int model, int64_t pixels, int cap); /* learnt: at most so many at once */

/* fleet_hold notes a task; NULL: out of memory. extended_ms 0: its lease should be extended at once. */
struct fleet_held *fleet_hold(struct fleet *f, struct fleet_worker *w, uint64_t task, uint64_t token, int64_t extended_ms);
struct fleet_held *fleet_held_find(const struct fleet *f, uint64_t task, uint64_t token);
void fleet_count_held(struct fleet_held *h, bool is_counted);
void fleet_drop(struct fleet *f, struct fleet_held *h);
/* The line of leases: who reported, was lost or was cancelled does not stand in it. */
struct fleet_held *fleet_lease_first(const struct fleet *f);
void fleet_lease_renewed(struct fleet *f, struct fleet_held *h, int64_t now_ms); /* to the end of the line */
void fleet_lease_leave(struct fleet *f, struct fleet_held *h);
void fleet_lease_enter(struct fleet *f, struct fleet_held *h); /* at the front: due at once */

#endif
