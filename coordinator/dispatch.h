/* dispatch.h - who gets what next. Pure: groups with ready tasks + workers with free credit -> wants. No clock, no list
 * of its own, no allocation: the same input gives the same wants, so that a table of cases tests it.
 *
 * 1. The highest priority that has something for this worker. Nothing below makes up for it.
 * 2. A (campaign, model) that has waited DISPATCH_STARVE_S or more, longest first: the limit of rule 3.
 * 3. The campaign that is owed most (deficit round robin in render-seconds), where a model the worker does not have
 *    loaded, or not with these adapters, must be owed DISPATCH_SWITCH_S more: a switch has to pay.
 *
 * A batch is of one group, at most what the worker takes at once, what was learnt to fit, and its free credit; when the
 * tasks left are counted, at most a fair share of them. Workers take one batch each in turn, idle ones first. */
#ifndef KILN_DISPATCH_H
#define KILN_DISPATCH_H

#include <stdbool.h>
#include <stdint.h>

#define DISPATCH_GROUPS_MAX 256
#define DISPATCH_WANTS_MAX 1024
#define DISPATCH_WORKERS_MAX 4096
#define DISPATCH_MODELS_MAX 64   /* of one worker */
#define DISPATCH_CAPS_MAX 16     /* learnt ones of one worker */
#define DISPATCH_PLENTY (-1)     /* tasks left: nobody counted, enough for everybody */
#define DISPATCH_SWITCH_S 30.0
#define DISPATCH_STARVE_S 60.0
#define DISPATCH_OWED_MAX_S 600.0 /* so much is a campaign owed at most: what it could not use for longer is forgotten */

struct dispatch_group {
    int64_t id;
    int campaign;          /* index into the campaigns of the view */
    int model;             /* names are numbers here; the caller's table */
    int64_t loras;         /* a number for its adapters; 0: none */
    int64_t pixels;
    int priority;
    bool is_commercial;    /* the campaign's declared use */
    int left;              /* tasks to claim, or DISPATCH_PLENTY */
    double image_s;        /* expected render-seconds of one image */
    double waited_s;       /* since its (campaign, model) was last given to anybody, or came up */
};
struct dispatch_campaign { int64_t id; double owed_s; };
struct dispatch_model { int model; bool is_non_commercial; };
struct dispatch_cap { int model; int64_t pixels; int cap; };
struct dispatch_worker {
    int free;              /* credit not used */
    int batch_max;
    int held;              /* idle workers come first */
    int model;             /* of its last batch; -1: none yet */
    int64_t loras;         /* the same */
    const struct dispatch_model *models; int model_count;
    const struct dispatch_cap *caps; int cap_count;
};
struct dispatch_view {
    const struct dispatch_group *groups; int group_count;
    const struct dispatch_campaign *campaigns; int campaign_count;
    const struct dispatch_worker *workers; int worker_count;
    int slots;             /* tasks to claim at most */
};
struct dispatch_want { int group, worker, count; }; /* indices into the view */

/* dispatch_plan writes at most max wants and returns their number. `is_hungry` (may be NULL): some worker
 * had room for a batch and found nothing. At most DISPATCH_GROUPS_MAX groups and as many campaigns. */
int dispatch_plan(const struct dispatch_view *view, struct dispatch_want *ret, int max, bool *is_hungry);

/* dispatch_batch: images of this shape the worker should get at once, whatever its free credit. */
int dispatch_batch(const struct dispatch_worker *w, int model, int64_t pixels);

/* dispatch_guess_s: expected render-seconds of an image of a shape nobody has rendered yet. */
double dispatch_guess_s(int64_t pixels, int steps);
/* dispatch_learn_s moves an estimate (0: none yet) towards what was measured. */
double dispatch_learn_s(double known_s, double measured_s);
/* dispatch_settle makes the most owed campaign owed 0 and no other less than -DISPATCH_OWED_MAX_S. */
void dispatch_settle(struct dispatch_campaign *campaigns, int count);

#endif
