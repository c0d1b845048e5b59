/* janitor.c - see janitor.h. */
#include "janitor.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void janitor_init(struct janitor *j, const struct janitor_options *o, struct janitor_disk *disk, int64_t now_ms)
{
    *j = (struct janitor){.options = *o, .disk = disk};
    janitor_database_back(j, now_ms);
    j->round_ms = j->sweep_from_ms;
}

static void drop_folders(struct janitor *j)
{
    for (int i = 0; i < j->folder_count; i++)
        free(j->folders[i]);
    free(j->folders);
    j->folders = NULL;
    j->folder_count = j->folder = 0;
}

void janitor_done(struct janitor *j)
{
    drop_folders(j);
}

/* A worker notices after silent_ms that its coordinator is another one, and a few moments later it has said what it holds. */
void janitor_database_back(struct janitor *j, int64_t now_ms)
{
    j->back_ms = now_ms;
    j->sweep_from_ms = now_ms + j->options.silent_ms + 2 * j->options.heartbeat_ms;
}

/* --- leases ---------------------------------------------------------------------------------------------------- */

int janitor_sweep_pace_ms(const struct janitor *j)
{
    return j->options.lease_ms / 5 < JANITOR_SWEEP_MS ? j->options.lease_ms / 5 : JANITOR_SWEEP_MS;
}

int janitor_lease_ms(const struct janitor *j)
{
    return j->options.lease_ms - janitor_sweep_pace_ms(j);
}

static int64_t lease_due_ms(const struct janitor *j, const struct fleet_held *h)
{
    return h->extended_ms < j->back_ms ? 0 : h->extended_ms + j->options.lease_ms / 3;
}

int janitor_extend(const struct janitor *j, const struct fleet *f, int64_t now_ms, struct task_extend *ret, int max)
{
    int count = 0, soon_ms = j->options.lease_ms / 12;
    const struct fleet_held *h = fleet_lease_first(f);
    if (!h || lease_due_ms(j, h) > now_ms)
        return 0;
    for (; h && count < max && lease_due_ms(j, h) <= now_ms + soon_ms; h = h->lease_next)
        ret[count++] = (struct task_extend){h->task, h->token};
    return count;
}

bool janitor_may_sweep(const struct janitor *j, const struct fleet *f, int64_t now_ms)
{
    const struct fleet_held *oldest = fleet_lease_first(f);
    return now_ms >= j->sweep_from_ms && now_ms >= j->sweep_ms && (!oldest || oldest->extended_ms >= j->back_ms);
}

void janitor_swept(struct janitor *j, int64_t now_ms)
{
    j->sweep_ms = now_ms + janitor_sweep_pace_ms(j);
}

bool janitor_pings(struct janitor *j, int64_t now_ms)
{
    if (now_ms < j->ping_ms)
        return false;
    j->ping_ms = now_ms + j->options.heartbeat_ms;
    return true;
}

/* --- workers --------------------------------------------------------------------------------------------------- */

bool janitor_is_silent(const struct janitor *j, const struct fleet_worker *w, int64_t now_ms)
{
    return w->state != FLEET_SILENT && w->state != FLEET_GONE && now_ms - w->heard_ms > j->options.silent_ms;
}

bool janitor_is_forgotten(const struct fleet_worker *w, int64_t now_ms)
{
    return w->state == FLEET_SILENT && now_ms - w->heard_ms > JANITOR_FORGET_MS;
}

bool janitor_is_stuck(const struct janitor *j, const struct fleet_worker *w, int64_t now_ms)
{
    return w->state == FLEET_BUSY && now_ms - w->step_ms > j->options.stuck_ms;
}

static bool beat_is_due(const struct fleet_worker *w, int64_t now_ms)
{
    if (w->state == FLEET_GONE)
        return w->is_changed;
    return now_ms - w->beat_ms >= (w->is_changed ? JANITOR_BEAT_CHANGED_MS : JANITOR_BEAT_MS);
}

int janitor_beat(struct fleet *f, int64_t now_ms, struct task_beat *ret, struct fleet_worker **ret_workers, int max)
{
    int count = 0;
    for (enum fleet_state s = 0; s < FLEET_STATES; s++)
        for (struct fleet_worker *w = fleet_first(f, s); w && count < max; w = w->next) {
            if (s == FLEET_SILENT && !w->is_changed)
                continue; /* its row says since when */
            if (!beat_is_due(w, now_ms))
                continue;
            w->beat_ms = now_ms;
            w->is_changed = false;
            ret_workers[count] = w;
            ret[count++] = (struct task_beat){.worker = w->name, .boot_epoch = w->boot_epoch, .device = w->device, .models = w->models_text,
                                              .state = s == FLEET_BLOCKED ? w->said : fleet_state_name(s), .held = w->held_count, .host = w->host};
        }
    return count;
}

/* --- staged files ---------------------------------------------------------------------------------------------- */

static void rest(struct janitor *j, int64_t now_ms)
{
    drop_folders(j);
    j->round = JANITOR_RESTS;
    j->round_ms = now_ms + j->options.staged_ms;
}

static void begin_list(struct janitor *j, int64_t now_ms)
{
    if (j->folder == j->folder_count) {
        rest(j, now_ms);
        return;
    }
    j->round = JANITOR_LISTS;
    janitor_disk_list(j->disk, j->folders[j->folder]);
}

static void take_list(struct janitor *j, int64_t now_ms)
{
    j->file_count = janitor_disk_files(j->disk, j->files, &j->is_whole);
    for (int i = 0; i < j->file_count; i++)
        j->asked[i] = (struct task_extend){j->files[i].task, j->files[i].token};
    j->round = JANITOR_NEEDS_VERDICTS;
    if (j->file_count == 0) {
        j->folder++;
        begin_list(j, now_ms);
    }
}

/* A list that was cut goes on with the same folder, unless nothing of it could be settled: then the rest waits too. */
static void take_settled(struct janitor *j, int64_t now_ms)
{
    int settled = 0;
    for (int i = 0; i < j->file_count; i++)
        settled += j->files[i].verdict != JANITOR_DISK_LEAVE;
    if (j->is_whole || settled == 0)
        j->folder++;
    begin_list(j, now_ms);
}

void janitor_step(struct janitor *j, int64_t now_ms)
{
    if (!j->disk || janitor_disk_is_busy(j->disk))
        return;
    if (j->round == JANITOR_RESTS && now_ms >= j->round_ms)
        j->round = JANITOR_NEEDS_FOLDERS;
    else if (j->round == JANITOR_LISTS)
        take_list(j, now_ms);
    else if (j->round == JANITOR_SETTLES)
        take_settled(j, now_ms);
}

bool janitor_take_folders(struct janitor *j, const char *const *folders, int count)
{
    drop_folders(j);
    j->folders = calloc((size_t)count + 1, sizeof *j->folders);
    for (int i = 0; j->folders && i < count && (j->folders[i] = strdup(folders[i])); i++)
        j->folder_count++;
    j->round = JANITOR_SETTLES; /* of nothing: the next step begins with the first folder */
    j->file_count = 0;
    j->is_whole = false;
    j->folder = -1;
    return j->folder_count == count;
}

void janitor_take_verdicts(struct janitor *j, const char *state, const char *const *file)
{
    for (int i = 0; i < j->file_count; i++) {
        struct janitor_disk_file *f = &j->files[i];
        f->verdict = state[i] == 'c' ? JANITOR_DISK_PUBLISH : state[i] == 's' ? JANITOR_DISK_DISCARD : JANITOR_DISK_LEAVE;
        snprintf(f->file, sizeof f->file, "%s", file[i] ? file[i] : "");
    }
    j->round = JANITOR_SETTLES;
    janitor_disk_settle(j->disk, j->folders[j->folder], j->files, j->file_count);
}

/* --- when ------------------------------------------------------------------------------------------------------ */

static int64_t sooner(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

int64_t janitor_next_ms(const struct janitor *j, const struct fleet *f)
{
    const struct fleet_held *oldest = fleet_lease_first(f);
    int64_t next_ms = sooner(j->ping_ms, j->sweep_ms > j->sweep_from_ms ? j->sweep_ms : j->sweep_from_ms);
    if (oldest)
        next_ms = sooner(next_ms, lease_due_ms(j, oldest));
    return next_ms;
}
