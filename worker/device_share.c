/* device_share.c - the rule, and the sentence that says which part of it held. */
#include "device_share.h"

#include <assert.h>
#include <stdio.h>

static double gb(size_t bytes)
{
    return (double)bytes / 1e9;
}

/* The one that needs most decides. */
static const struct device_share_model *largest(const struct device_share_model *models, int count)
{
    const struct device_share_model *ret = &models[0];
    for (int i = 1; i < count; i++)
        if (models[i].one_bytes > ret->one_bytes)
            ret = &models[i];
    return ret;
}

/* The first that two cannot share, or whose share does not fit; NULL: there is none. */
static const struct device_share_model *without_team(const struct device_share_model *models, int count)
{
    for (int i = 0; i < count; i++)
        if (!models[i].fits_team)
            return &models[i];
    return NULL;
}

static void say_no_team(const struct device_share_model *m, double memory, char *ret, size_t bytes)
{
    if (!m->team_bytes)
        snprintf(ret, bytes, "two GPUs cannot share %s evenly", m->name);
    else
        snprintf(ret, bytes, "a share of %s needs %.1f GB of %.1f, too", m->name, gb(m->team_bytes), memory);
}

bool device_share_is_teams(int gpus, size_t memory_bytes, bool prefers_latency, const struct device_share_model *models, int count,
                           char *why, size_t why_bytes)
{
    assert(gpus >= 1 && count >= 1);
    const struct device_share_model *m = largest(models, count), *lone = without_team(models, count);
    double memory = gb(memory_bytes);
    const char *s = gpus == 1 ? "" : "s", *teams = gpus == 2 ? "" : "s";
    char no_team[256];
    if (gpus % 2)
        snprintf(why, why_bytes, "%d renderer%s, because %d GPU%s no pair%s", gpus, s, gpus, gpus == 1 ? " is" : "s are", s);
    else if (!lone && prefers_latency)
        snprintf(why, why_bytes, "%d team%s of two, because latency is preferred", gpus / 2, teams);
    else if (m->fits_one)
        snprintf(why, why_bytes, "%d renderers, because %s needs %.1f GB of %.1f", gpus, m->name, gb(m->one_bytes), memory);
    else if (!lone)
        snprintf(why, why_bytes, "%d team%s of two, because %s needs %.1f GB of %.1f alone and %.1f as a share", gpus / 2, teams, m->name,
                 gb(m->one_bytes), memory, gb(m->team_bytes));
    else {
        say_no_team(lone, memory, no_team, sizeof no_team);
        snprintf(why, why_bytes, "%d renderers that bring what does not fit at each step, because %s needs %.1f GB of %.1f, and %s", gpus, m->name,
                 gb(m->one_bytes), memory, no_team);
    }
    return gpus % 2 == 0 && !lone && (prefers_latency || !m->fits_one);
}
