/* watch.c - asks the database twice a second where a campaign stands, and draws the answer.
 *
 * Looking on changes nothing: Ctrl-C ends the looking, not the campaign, and a database that is away is waited for,
 * because the farm settles by itself when it returns. */
#include "watch.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "lifecycle.h"
#include "progress.h"
#include "task_store.h"

#define POLL_MS 500
#define WORKERS_EVERY_MS 2000
#define AWAY_MAX_MS (5 * 60 * 1000)
#define WORKER_FRESH_S 20 /* a worker heard in this time counts as there */

struct watch {
    struct command_call *call;
    const char *name;
    char uri[HOME_PATH_MAX];
    struct task_store *store;  /* NULL while the database is away */
    struct campaign campaign;  /* as last seen */
    int workers;               /* -1: not known */
    int64_t workers_at_ms, away_since_ms; /* away_since_ms 0: the database answers */
    struct pg_error fault;
    struct progress bar;
    char note[160];
};

/* --- asking ------------------------------------------------------------------------------------------------ */

static bool count_worker(void *context, const struct worker_row *r)
{
    int *count = context;
    *count += r->seen_s < WORKER_FRESH_S;
    return true;
}

static bool ask_workers(struct watch *w)
{
    int count = 0;
    if (w->workers >= 0 && clock_ms() - w->workers_at_ms < WORKERS_EVERY_MS)
        return true;
    if (!task_store_workers(w->store, count_worker, &count, &w->fault))
        return false;
    w->workers = count;
    w->workers_at_ms = clock_ms();
    return true;
}

static bool ask_campaign(struct watch *w, bool *ret_found)
{
    struct campaign now = {0};
    if (!task_store_campaign_find(w->store, w->name, &now, ret_found, &w->fault))
        return false;
    if (*ret_found) {
        task_store_campaign_done(&w->campaign);
        w->campaign = now;
    }
    return true;
}

enum asked { ASKED_ANSWERED, ASKED_MISSING, ASKED_AWAY, ASKED_REFUSED };

/* One look. A connection that failed is thrown away; the next look opens another. */
static enum asked ask(struct watch *w)
{
    bool is_found = false;
    bool ok = (w->store || task_store_open(&w->store, *w->uri ? w->uri : NULL, &w->fault)) && ask_campaign(w, &is_found) &&
              (!is_found || ask_workers(w));
    if (ok) {
        w->away_since_ms = 0;
        return is_found ? ASKED_ANSWERED : ASKED_MISSING;
    }
    task_store_close(w->store);
    w->store = NULL;
    if (w->fault.fault == PG_REFUSED)
        return ASKED_REFUSED;
    if (!w->away_since_ms)
        w->away_since_ms = clock_ms();
    return ASKED_AWAY;
}

/* --- showing ----------------------------------------------------------------------------------------------- */

static const char *note(struct watch *w)
{
    const struct campaign *c = &w->campaign;
    char away[32];
    w->note[0] = 0;
    if (w->away_since_ms) {
        progress_duration(away, sizeof away, (double)(clock_ms() - w->away_since_ms) / 1000);
        snprintf(w->note, sizeof w->note, "the database is away (%s), trying again", away);
    } else if (strcmp(c->state, "paused") == 0) {
        snprintf(w->note, sizeof w->note, "paused: `kiln resume %s`", w->name);
    } else if (strcmp(c->state, "cancelled") == 0) {
        snprintf(w->note, sizeof w->note, "cancelled");
    } else if (w->workers == 0 && c->ready + c->running > 0) {
        snprintf(w->note, sizeof w->note, "waiting for a worker");
    }
    return w->note[0] ? w->note : NULL;
}

static bool is_over(const struct campaign *c)
{
    return c->ready + c->running == 0;
}

static struct progress_now state_now(struct watch *w)
{
    const struct campaign *c = &w->campaign;
    struct progress_now now = PROGRESS_UNKNOWN;
    now.done = c->done;
    now.total = c->total;
    now.failed = c->failed - c->cancelled;
    /* The database knows the rate of all workers; nothing is computed from how long this program looks on. */
    now.per_second = is_over(c) || !isfinite(c->images_per_second) ? 0 : c->images_per_second;
    now.left_s = is_over(c) || !isfinite(c->eta_s) ? -1 : c->eta_s;
    now.workers = is_over(c) || w->away_since_ms ? -1 : w->workers;
    now.note = note(w);
    return now;
}

static int verdict(struct watch *w)
{
    const struct campaign *c = &w->campaign;
    struct progress_now now = state_now(w);
    progress_end(&w->bar, &now);
    if (strcmp(c->state, "cancelled") == 0)
        return command_say(w->call, COMMAND_FAILED, "campaign %s is cancelled: %" PRId64 " of %" PRId64 " images were rendered", w->name,
                           c->done, c->total);
    if (c->failed > 0)
        return command_say(w->call, COMMAND_FAILED, "campaign %s: %" PRId64 " of %" PRId64 " images failed; `kiln failures %s` says why",
                           w->name, c->failed, c->total, w->name);
    return COMMAND_DONE;
}

/* --- looking on -------------------------------------------------------------------------------------------- */

static int interrupted(struct watch *w)
{
    struct progress_now now = state_now(w);
    progress_end(&w->bar, &now);
    return command_say(w->call, lifecycle_stop_code(), "stopped looking; campaign %s goes on (`kiln watch %s`, `kiln cancel %s`)",
                       w->name, w->name, w->name);
}

static int look_on(struct watch *w)
{
    for (;;) {
        enum asked asked = ask(w);
        if (asked == ASKED_MISSING || asked == ASKED_REFUSED) {
            progress_clear(&w->bar);
            return asked == ASKED_REFUSED ? command_fault(w->call, &w->fault)
                   : command_refuse(w->call, "there is no campaign '%s'; `kiln status` lists them", w->name);
        }
        if (asked == ASKED_ANSWERED && is_over(&w->campaign))
            return verdict(w);
        if (asked == ASKED_AWAY && clock_ms() - w->away_since_ms > AWAY_MAX_MS) {
            progress_clear(&w->bar);
            return command_say(w->call, COMMAND_AWAY, "the database stayed away for 5 minutes (%s); the farm goes on when it is back",
                               w->fault.text);
        }
        struct progress_now now = state_now(w);
        progress_update(&w->bar, &now);
        if (lifecycle_wait(POLL_MS) > 0)
            return interrupted(w);
    }
}

int watch_campaign(struct command_call *call, const char *name, FILE *out)
{
    char why[HOME_PATH_MAX + 256];
    struct watch w = {.call = call, .name = name, .workers = -1};
    if (!home_database(&call->home, call->database, w.uri, sizeof w.uri, why, sizeof why))
        return command_refuse(call, "%s", why);
    int code = command_store(call, &w.store); /* at the beginning, away means that kiln is not running */
    if (code != COMMAND_DONE)
        return code;
    if (lifecycle_signals()) {
        progress_begin(&w.bar, out, name, "images");
        code = look_on(&w);
    } else {
        code = command_say(call, COMMAND_AWAY, "no signal handlers could be installed");
    }
    task_store_campaign_done(&w.campaign);
    task_store_close(w.store);
    return code;
}

static int watch_run(struct command_call *call)
{
    const char *name = NULL;
    int word_count;
    if (!command_parse(call, NULL, 0, &name, 1, 1, &word_count))
        return command_code(call);
    return watch_campaign(call, name, stdout);
}

const struct command watch_command = {
    "watch", "NAME", "progress, images/s, time left, workers, failures",
    "  Stays until nothing is left to do: 0 all done, 1 some failed or cancelled. Ctrl-C ends the looking only.\n", watch_run};
