/* dispatch.c - see dispatch.h for the rules, in their order. */
#include "dispatch.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define GUESS_S_PER_MPX_STEP 0.5 /* only compared with other guesses until the first image of the shape is back */
#define GUESS_STEPS 4
#define LEARN_WEIGHT 0.25

/* What this plan has given away so far; the view stays as it is. */
struct plan {
    const struct dispatch_view *view;
    int left[DISPATCH_GROUPS_MAX];
    double owed_s[DISPATCH_GROUPS_MAX]; /* by campaign */
    bool is_served[DISPATCH_GROUPS_MAX];
    int slots;
};
struct taker { int worker, free, held, model; int64_t loras; };

int dispatch_batch(const struct dispatch_worker *w, int model, int64_t pixels)
{
    int batch = w->batch_max;
    for (int i = 0; i < w->cap_count; i++)
        if (w->caps[i].model == model && w->caps[i].pixels == pixels && w->caps[i].cap < batch)
            batch = w->caps[i].cap;
    return batch;
}

double dispatch_guess_s(int64_t pixels, int steps)
{
    return GUESS_S_PER_MPX_STEP * (double)pixels / 1e6 * (steps > 0 ? steps : GUESS_STEPS);
}

double dispatch_learn_s(double known_s, double measured_s)
{
    return known_s > 0 ? known_s + LEARN_WEIGHT * (measured_s - known_s) : measured_s;
}

void dispatch_settle(struct dispatch_campaign *campaigns, int count)
{
    if (count == 0)
        return;
    double most_s = campaigns[0].owed_s;
    for (int i = 1; i < count; i++)
        if (campaigns[i].owed_s > most_s)
            most_s = campaigns[i].owed_s;
    for (int i = 0; i < count; i++) {
        campaigns[i].owed_s -= most_s;
        if (campaigns[i].owed_s < -DISPATCH_OWED_MAX_S)
            campaigns[i].owed_s = -DISPATCH_OWED_MAX_S;
    }
}

/* --- which group --------------------------------------------------------------------------------------------- */

static bool may_render(const struct dispatch_worker *w, const struct dispatch_group *g)
{
    for (int i = 0; i < w->model_count; i++)
        if (w->models[i].model == g->model)
            return !(g->is_commercial && w->models[i].is_non_commercial);
    return false;
}

/* A taker without room for a whole batch waits until it has: half batches would waste the device. */
static bool has_room(const struct plan *p, const struct taker *t, int group)
{
    const struct dispatch_worker *w = &p->view->workers[t->worker];
    const struct dispatch_group *g = &p->view->groups[group];
    return p->left[group] != 0 && t->free >= dispatch_batch(w, g->model, g->pixels) && may_render(w, g);
}

static bool is_starving(const struct plan *p, int group)
{
    return p->view->groups[group].waited_s >= DISPATCH_STARVE_S && !p->is_served[group];
}

static bool is_loaded(const struct taker *t, const struct dispatch_group *g)
{
    return g->model == t->model && g->loras == t->loras;
}

/* is_better: does this taker rather take group a than b? Both have the room; ties go to the earlier group. */
static bool is_better(const struct plan *p, const struct taker *t, int a, int b)
{
    const struct dispatch_group *ga = &p->view->groups[a], *gb = &p->view->groups[b];
    if (ga->priority != gb->priority)
        return ga->priority > gb->priority;
    if (is_starving(p, a) != is_starving(p, b))
        return is_starving(p, a);
    if (is_starving(p, a) && ga->waited_s != gb->waited_s)
        return ga->waited_s > gb->waited_s;
    double a_s = p->owed_s[ga->campaign], b_s = p->owed_s[gb->campaign];
    if (t->model >= 0) {
        a_s += is_loaded(t, ga) ? DISPATCH_SWITCH_S : 0;
        b_s += is_loaded(t, gb) ? DISPATCH_SWITCH_S : 0;
    }
    return a_s > b_s;
}

static int choose_group(const struct plan *p, const struct taker *t)
{
    int best = -1;
    for (int g = 0; g < p->view->group_count; g++)
        if (has_room(p, t, g) && (best < 0 || is_better(p, t, g, best)))
            best = g;
    return best;
}

/* --- how many ------------------------------------------------------------------------------------------------ */

/* Takers from `from` on that could take this group too share what is left of it. */
static int fair_share(const struct plan *p, const struct taker *takers, int taker_count, int from, int group)
{
    int others = 0;
    for (int i = from + 1; i < taker_count; i++)
        others += has_room(p, &takers[i], group);
    return (p->left[group] + others) / (others + 1);
}

static int batch_size(const struct plan *p, const struct taker *takers, int taker_count, int at, int group)
{
    const struct dispatch_group *g = &p->view->groups[group];
    int count = dispatch_batch(&p->view->workers[takers[at].worker], g->model, g->pixels);
    if (p->left[group] != DISPATCH_PLENTY) {
        int share = fair_share(p, takers, taker_count, at, group);
        count = share < count ? share : count;
    }
    return count < p->slots ? count : p->slots;
}

static void give(struct plan *p, struct taker *t, int group, int count)
{
    const struct dispatch_group *groups = p->view->groups, *g = &groups[group];
    t->free -= count;
    t->model = g->model;
    t->loras = g->loras;
    p->slots -= count;
    if (p->left[group] != DISPATCH_PLENTY)
        p->left[group] -= count;
    p->owed_s[g->campaign] -= count * g->image_s;
    for (int i = 0; i < p->view->group_count; i++)
        if (groups[i].campaign == g->campaign && groups[i].model == g->model)
            p->is_served[i] = true;
}

/* --- the plan ------------------------------------------------------------------------------------------------ */

static int by_held(const void *a, const void *b)
{
    const struct taker *x = a, *y = b;
    if (x->held != y->held)
        return x->held < y->held ? -1 : 1;
    return x->worker < y->worker ? -1 : 1;
}

static int list_takers(const struct dispatch_view *view, struct taker *ret)
{
    int count = 0;
    for (int i = 0; i < view->worker_count; i++)
        if (view->workers[i].free > 0 && view->workers[i].batch_max > 0)
            ret[count++] = (struct taker){i, view->workers[i].free, view->workers[i].held, view->workers[i].model,
                                           view->workers[i].loras};
    qsort(ret, (size_t)count, sizeof *ret, by_held);
    return count;
}

static bool has_room_for_any(const struct dispatch_view *view, const struct taker *t)
{
    return t->free >= view->workers[t->worker].batch_max;
}

int dispatch_plan(const struct dispatch_view *view, struct dispatch_want *ret, int max, bool *is_hungry)
{
    struct taker takers[DISPATCH_WORKERS_MAX];
    struct plan p = {.view = view, .slots = view->slots};
    int want_count = 0, given;
    assert(view->group_count <= DISPATCH_GROUPS_MAX);
    assert(view->campaign_count <= DISPATCH_GROUPS_MAX);
    assert(view->worker_count <= DISPATCH_WORKERS_MAX);
    int taker_count = list_takers(view, takers);
    for (int i = 0; i < view->group_count; i++)
        p.left[i] = view->groups[i].left;
    for (int i = 0; i < view->campaign_count; i++)
        p.owed_s[i] = view->campaigns[i].owed_s;
    do {
        given = 0;
        for (int i = 0; i < taker_count && p.slots > 0 && want_count < max; i++) {
            int group = takers[i].free > 0 ? choose_group(&p, &takers[i]) : -1;
            if (group < 0)
                continue;
            int count = batch_size(&p, takers, taker_count, i, group);
            ret[want_count++] = (struct dispatch_want){group, takers[i].worker, count};
            give(&p, &takers[i], group, count);
            given++;
        }
    } while (given > 0);
    if (is_hungry) {
        *is_hungry = false;
        for (int i = 0; i < taker_count && p.slots > 0; i++)
            *is_hungry = *is_hungry || has_room_for_any(view, &takers[i]);
    }
    return want_count;
}
