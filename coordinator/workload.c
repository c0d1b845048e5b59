/* workload.c - see workload.h. The list is small (256 groups at most) and looked through; only what grows is hashed. */
#include "workload.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static void drop_groups(struct workload *l)
{
    for (int i = 0; i < l->group_count; i++)
        free(l->groups[i].row.out_dir);
    l->group_count = 0;
}

void workload_done(struct workload *l)
{
    drop_groups(l);
}

/* Shape 0 stands for all that found no place: its cost is everybody's average. */
static int shape_of(struct workload *l, int model, int64_t pixels, int steps)
{
    for (int i = 1; i < l->shape_count; i++)
        if (l->shapes[i].model == model && l->shapes[i].pixels == pixels && l->shapes[i].steps == steps)
            return i;
    if (l->shape_count == 0)
        l->shape_count = 1;
    if (l->shape_count == WORKLOAD_SHAPES_MAX)
        return 0;
    l->shapes[l->shape_count] = (struct workload_shape){.model = model, .steps = steps, .pixels = pixels};
    return l->shape_count++;
}

void workload_measured(struct workload *l, int shape, double image_s)
{
    if (shape >= 0 && isfinite(image_s) && image_s >= 0)
        l->shapes[shape].image_s = dispatch_learn_s(l->shapes[shape].image_s, image_s);
}

static double image_s(const struct workload *l, const struct workload_group *g)
{
    double known_s = l->shapes[g->shape].image_s;
    return known_s > 0 ? known_s : dispatch_guess_s((int64_t)g->row.width * g->row.height, g->row.steps);
}

/* --- the offer ------------------------------------------------------------------------------------------------- */

/* What a campaign is owed survives from offer to offer; a new one begins with the most owed of the others, which is 0. */
static int campaign_of(struct workload *l, const struct dispatch_campaign *before, int before_count, int64_t id)
{
    for (int i = 0; i < l->campaign_count; i++)
        if (l->campaigns[i].id == id)
            return i;
    double owed_s = 0;
    for (int i = 0; i < before_count; i++)
        if (before[i].id == id)
            owed_s = before[i].owed_s;
    l->campaigns[l->campaign_count] = (struct dispatch_campaign){id, owed_s};
    return l->campaign_count++;
}

static struct workload_wait *wait_find(struct workload *l, int64_t campaign_id, int model)
{
    for (int i = 0; i < l->wait_count; i++)
        if (l->waits[i].campaign_id == campaign_id && l->waits[i].model == model)
            return &l->waits[i];
    return NULL;
}

static void forget_waits(struct workload *l)
{
    int kept = 0;
    for (int i = 0; i < l->wait_count; i++)
        if (l->waits[i].is_offered)
            l->waits[kept++] = l->waits[i];
    l->wait_count = kept;
}

/* Waits of pairs that are offered no more go first, so that there is a place for each pair of the new offer. */
static void note_waits(struct workload *l, int64_t now_ms)
{
    for (int i = 0; i < l->wait_count; i++)
        l->waits[i].is_offered = false;
    for (int i = 0; i < l->group_count; i++) {
        struct workload_wait *w = wait_find(l, l->groups[i].row.campaign_id, l->items[i].model);
        if (w)
            w->is_offered = true;
    }
    forget_waits(l);
    for (int i = 0; i < l->group_count; i++)
        if (!wait_find(l, l->groups[i].row.campaign_id, l->items[i].model))
            l->waits[l->wait_count++] = (struct workload_wait){.campaign_id = l->groups[i].row.campaign_id, .since_ms = now_ms,
                                                               .model = l->items[i].model, .is_offered = true};
}

bool workload_offer(struct workload *l, struct fleet *f, const struct task_group *offer, int count, int64_t now_ms)
{
    struct dispatch_campaign before[DISPATCH_GROUPS_MAX];
    int before_count = l->campaign_count;
    memcpy(before, l->campaigns, sizeof before);
    drop_groups(l);
    l->campaign_count = 0;
    l->is_stale = false;
    static_assert(TASK_STORE_GROUPS_MAX <= DISPATCH_GROUPS_MAX, "every group of an offer has a place");
    for (int i = 0; i < count; i++) {
        int model = fleet_name_id(f, offer[i].model);
        int64_t pixels = (int64_t)offer[i].width * offer[i].height;
        char *out_dir = strdup(offer[i].out_dir);
        if (!out_dir) {
            drop_groups(l); /* nothing to do until the next offer */
            return false;
        }
        struct workload_group *g = &l->groups[l->group_count];
        *g = (struct workload_group){offer[i], shape_of(l, model, pixels, offer[i].steps)};
        g->row.out_dir = out_dir;
        l->items[l->group_count++] = (struct dispatch_group){
            .id = offer[i].id, .campaign = campaign_of(l, before, before_count, offer[i].campaign_id), .model = model, .loras = offer[i].loras,
            .pixels = pixels, .priority = offer[i].priority, .is_commercial = strcmp(offer[i].use, "commercial") == 0,
            .left = offer[i].ready >= TASK_STORE_SEEN_MAX ? DISPATCH_PLENTY : offer[i].ready};
    }
    note_waits(l, now_ms);
    dispatch_settle(l->campaigns, l->campaign_count);
    return true;
}

int workload_open_groups(const struct workload *l)
{
    int count = 0;
    for (int i = 0; i < l->group_count; i++)
        count += l->items[i].left != 0;
    return count;
}

/* --- the plan -------------------------------------------------------------------------------------------------- */

static int list_takers(struct workload *l, const struct fleet *f, int64_t now_ms)
{
    static const enum fleet_state states[] = {FLEET_IDLE, FLEET_BUSY};
    int count = 0;
    for (int s = 0; s < 2; s++)
        for (struct fleet_worker *w = fleet_first(f, states[s]); w; w = w->next) {
            int free_credit = fleet_free_credit(w);
            if (free_credit == 0 || w->pause_ms > now_ms)
                continue;
            l->taker_of[count] = w;
            l->takers[count++] = (struct dispatch_worker){
                .free = free_credit, .batch_max = (int)w->batch_max, .held = w->unacked - w->returning, .model = w->model, .loras = w->loras,
                .models = w->models, .model_count = w->model_count, .caps = w->caps, .cap_count = w->cap_count};
        }
    return count;
}

int workload_plan(struct workload *l, const struct fleet *f, int64_t now_ms, int slots, struct dispatch_want *ret, int max, bool *is_hungry)
{
    int taker_count = list_takers(l, f, now_ms);
    for (int i = 0; i < l->group_count; i++) {
        l->items[i].image_s = image_s(l, &l->groups[i]);
        l->items[i].waited_s = (double)(now_ms - wait_find(l, l->groups[i].row.campaign_id, l->items[i].model)->since_ms) / 1000;
    }
    struct dispatch_view view = {.groups = l->items, .group_count = l->group_count, .campaigns = l->campaigns,
                                 .campaign_count = l->campaign_count, .workers = l->takers, .worker_count = taker_count, .slots = slots};
    return dispatch_plan(&view, ret, max, is_hungry);
}

void workload_given(struct workload *l, int group, int wanted, int got, int64_t now_ms)
{
    struct dispatch_group *g = &l->items[group];
    if (got > 0) {
        wait_find(l, l->groups[group].row.campaign_id, g->model)->since_ms = now_ms;
        l->campaigns[g->campaign].owed_s -= got * image_s(l, &l->groups[group]);
        dispatch_settle(l->campaigns, l->campaign_count);
    }
    if (g->left != DISPATCH_PLENTY)
        g->left -= got < g->left ? got : g->left;
    if (got < wanted)
        g->left = 0;
    if (g->left == 0)
        l->is_stale = true;
}
