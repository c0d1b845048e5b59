/* coordinator.c - the loop, and what begins and ends it. One thread does everything; the janitor's disk is another.
 *
 * The order of a round matters in two places. Messages are heard before anybody is called silent: a coordinator that was
 * stopped for a minute finds a minute of heartbeats waiting. And everything that waits is heard before a turn begins,
 * so that one commit serves all of it. */
#include "coordinator.h"

#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "clock.h"
#include "conversation.h"
#include "coordinator_metric.h"
#include "lifecycle.h"
#include "log.h"
#include "migrate.h"
#include "state_file.h"
#include "turn.h"

#define WAIT_MAX_MS 200
#define WAIT_WRITE_MS 2      /* link_wait looks at reading only */
#define WAIT_DISK_MS 20
#define STOP_MS 3000         /* for what has arrived, and only while the database answers */
#define LINGER_MS 500
#define REPORT_MS 200
#define MIGRATE_AGAIN_MS 1000

static atomic_bool is_ready;

static bool readyz(void *context)
{
    (void)context;
    return atomic_load(&is_ready);
}

/* Called in the thread of the disk. */
static void disk_done(const char *folder, const struct janitor_disk_file *file, const char *why)
{
    const struct coordinator_metric *metric = coordinator_metric_all();
    if (why) {
        log_event(LOG_WARN, "staged_failed", "folder=%s why=%s", log_quote(folder), log_quote(why));
        return;
    }
    bool is_published = file->verdict == JANITOR_DISK_PUBLISH;
    metric_add(is_published ? metric->published : metric->discarded, 1);
    log_event(LOG_INFO, is_published ? "staged_published" : "staged_discarded", "folder=%s task=%" PRIu64 " token=%" PRIu64, log_quote(folder), file->task, file->token);
}

/* --- the database's state -------------------------------------------------------------------------------------- */

static void write_state(struct coordinator *c)
{
    static const char *const name[] = {"connecting", "up", "away", "refused"};
    char why[1200];
    if (c->options.state_file &&
        !state_file_write(c->options.state_file, link_endpoint(c->link), c->metrics_port, name[c->database_state], why, sizeof why))
        log_event(LOG_WARN, "state_file_failed", "why=%s", log_quote(why));
}

static void database_is(struct coordinator *c, enum coordinator_database state, int64_t now_ms)
{
    if (c->database_state == state)
        return;
    c->database_state = state;
    atomic_store(&is_ready, state == DATABASE_UP);
    metric_set(coordinator_metric_all()->database_up, state == DATABASE_UP);
    if (state == DATABASE_UP) {
        log_event(LOG_INFO, c->was_up ? "database_back" : "database_up", "queued=%d", c->reports.result_count + c->reports.failure_count);
        janitor_database_back(&c->janitor, now_ms);
        c->is_offer_wanted = true;
        c->was_up = true;
    } else {
        log_event(state == DATABASE_REFUSED ? LOG_ERROR : LOG_WARN, state == DATABASE_REFUSED ? "database_refused" : "database_away",
                  "why=%s", log_quote(task_turn_why(c->database)));
    }
    write_state(c);
}

/* Refused before it was ever up: nothing here gets better by waiting. Later: somebody is at work on it. */
static void database_refused(struct coordinator *c, int64_t now_ms)
{
    database_is(c, DATABASE_REFUSED, now_ms);
    if (c->was_up)
        return;
    snprintf(c->why, sizeof c->why, "%s", task_turn_why(c->database));
    c->exit_code = LIFECYCLE_REFUSED;
    c->is_over = true;
}

/* --- the steps of a round -------------------------------------------------------------------------------------- */

static enum task_turn_state coordinator_turn(struct coordinator *c, int64_t now_ms)
{
    enum task_turn_state state = task_turn_poll(c->database);
    if (c->turn.is_running && state != TASK_TURN_BUSY && state != TASK_TURN_READY)
        turn_lost(c);
    switch (state) {
    case TASK_TURN_AWAY:
        database_is(c, DATABASE_AWAY, now_ms);
        break;
    case TASK_TURN_CONNECTING:
        if (c->database_state == DATABASE_UP)
            database_is(c, DATABASE_AWAY, now_ms);
        break;
    case TASK_TURN_REFUSED:
        database_refused(c, now_ms);
        break;
    case TASK_TURN_READY:
        turn_end(c, now_ms);
        state = TASK_TURN_IDLE;
        break;
    case TASK_TURN_IDLE:
    case TASK_TURN_BUSY:
        database_is(c, DATABASE_UP, now_ms);
        break;
    }
    if (task_turn_notified(c->database))
        c->is_offer_wanted = true;
    return state;
}

static void watch_worker(struct coordinator *c, struct fleet_worker *w, int64_t now_ms)
{
    if (!c->is_deaf && !c->is_stopping && janitor_is_silent(&c->janitor, w, now_ms)) {
        conversation_lose(c, w, now_ms);
    } else if (janitor_is_forgotten(w, now_ms)) {
        fleet_move(c->fleet, w, FLEET_GONE);
    } else if (w->state == FLEET_GONE) {
        if (w->pins == 0 && !w->is_changed)
            fleet_forget(c->fleet, w);
    } else if (!w->is_stuck && janitor_is_stuck(&c->janitor, w, now_ms)) {
        w->is_stuck = true;
        metric_add(coordinator_metric_all()->stuck, 1);
        log_event(LOG_WARN, "worker_stuck", "worker=%s step_counter=%" PRIu64 " for_ms=%" PRId64 " held=%d", log_quote(w->name), w->step_counter,
                  now_ms - w->step_ms, w->held_count);
    }
}

static void coordinator_sweep(struct coordinator *c, int64_t now_ms)
{
    if (c->report_ms <= now_ms)
        for (enum fleet_state s = 0; s < FLEET_STATES; s++)
            for (struct fleet_worker *w = fleet_first(c->fleet, s), *next; w; w = next) {
                next = w->next;
                watch_worker(c, w, now_ms);
            }
    if (janitor_pings(&c->janitor, now_ms))
        conversation_ping(c);
    janitor_step(&c->janitor, now_ms);
}

static void coordinator_assign(struct coordinator *c, enum task_turn_state state, int64_t now_ms)
{
    if (state == TASK_TURN_IDLE)
        turn_begin(c, now_ms);
}

static void coordinator_report(struct coordinator *c, int64_t now_ms)
{
    const struct coordinator_metric *metric = coordinator_metric_all();
    if (now_ms < c->report_ms)
        return;
    c->report_ms = now_ms + REPORT_MS;
    for (enum fleet_state s = 0; s < FLEET_STATES; s++)
        metric_set(metric->workers[s], fleet_count(c->fleet, s));
    metric_set(metric->held, fleet_held_count(c->fleet));
    metric_set(metric->offered_groups, workload_open_groups(&c->workload));
    metric_set(metric->queued, c->reports.result_count + c->reports.failure_count);
}

/* --- stopping -------------------------------------------------------------------------------------------------- */

static bool is_settled(const struct coordinator *c)
{
    return !c->turn.is_running && c->reports.result_count + c->reports.failure_count == 0;
}

/* What had arrived when the signal came is settled; workers go on without us. */
static void coordinator_stop(struct coordinator *c, int64_t now_ms)
{
    int signals = lifecycle_stop_count();
    if (signals > 1) {
        log_event(LOG_WARN, "leaving_now", "queued=%d", c->reports.result_count + c->reports.failure_count);
        c->exit_code = lifecycle_stop_code();
        c->is_over = true;
    } else if (signals == 1 && !c->is_stopping) {
        c->is_stopping = true;
        c->stop_until_ms = now_ms + STOP_MS;
        lifecycle_notify("STOPPING=1");
        log_event(LOG_INFO, "stopping", "held=%d queued=%d", fleet_held_count(c->fleet), c->reports.result_count + c->reports.failure_count);
        conversation_hear(c, now_ms);
    }
    if (c->is_stopping && (is_settled(c) || c->database_state != DATABASE_UP || now_ms >= c->stop_until_ms))
        c->is_over = true;
}

/* --- the loop -------------------------------------------------------------------------------------------------- */

static int64_t sooner(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t wake_ms(struct coordinator *c, int64_t now_ms)
{
    int64_t wake = sooner(now_ms + WAIT_MAX_MS, c->report_ms);
    int64_t janitor_ms = janitor_next_ms(&c->janitor, c->fleet);
    if (c->is_deaf)
        return now_ms;
    if (c->janitor.disk && janitor_disk_is_busy(c->janitor.disk))
        wake = sooner(wake, now_ms + WAIT_DISK_MS);
    if (task_turn_wants_write(c->database))
        wake = sooner(wake, now_ms + WAIT_WRITE_MS);
    if (c->database_state != DATABASE_UP)
        return sooner(wake, now_ms + task_turn_retry_ms(c->database) + WAIT_WRITE_MS);
    if (c->turn.is_running)
        return wake; /* its answer wakes us */
    if (!c->is_stopping)
        wake = sooner(wake, turn_offer_ms(c));
    return sooner(wake, janitor_ms > now_ms ? janitor_ms : now_ms + 1);
}

static void coordinator_sleep(struct coordinator *c)
{
    int extra[2], count = 0, fd = task_turn_fd(c->database);
    int64_t now_ms = clock_ms(), wake = wake_ms(c, now_ms);
    extra[count++] = lifecycle_fd();
    if (fd >= 0)
        extra[count++] = fd;
    if (c->is_stopping && !c->turn.is_running)
        return; /* messages that are not heard any more would wake us at once anyway */
    link_wait(c->link, extra, count, wake > now_ms ? (int)(wake - now_ms) : 0);
}

static void coordinator_round(struct coordinator *c)
{
    int64_t now_ms = clock_ms();
    if (!c->is_stopping)
        conversation_hear(c, now_ms);
    enum task_turn_state state = coordinator_turn(c, now_ms);
    coordinator_sweep(c, now_ms);
    coordinator_assign(c, state, now_ms);
    coordinator_report(c, now_ms);
    coordinator_stop(c, now_ms);
}

/* --- begin and end --------------------------------------------------------------------------------------------- */

/* The address stands already, so that a port in use is said at once; workers that come now are answered a little later. */
static bool migrate(struct coordinator *c)
{
    struct pg_error error;
    int from, to;
    bool is_said = false;
    while (!migrate_run(c->options.database, &from, &to, &error)) {
        if (error.fault == PG_REFUSED) {
            snprintf(c->why, sizeof c->why, "%s", error.text);
            c->exit_code = LIFECYCLE_REFUSED;
            return false;
        }
        if (!is_said)
            log_event(LOG_WARN, "database_away", "while=migrating why=%s", log_quote(error.text));
        is_said = true;
        if (lifecycle_stop_count() > 0 || lifecycle_wait(MIGRATE_AGAIN_MS) > 0)
            return false;
    }
    if (from != to)
        log_event(LOG_INFO, "migrated", "from=%d to=%d", from, to);
    return true;
}

static bool open_metrics(struct coordinator *c)
{
    uint16_t port;
    coordinator_metric_all();
    c->metrics_port = -1;
    if (c->options.metrics_port < 0)
        return true;
    if (!metric_serve((uint16_t)c->options.metrics_port, readyz, NULL, &port, c->why, sizeof c->why))
        return false;
    c->metrics_port = port;
    log_event(LOG_INFO, "metrics", "url=http://127.0.0.1:%d/metrics", c->metrics_port);
    return true;
}

static bool coordinator_open(struct coordinator *c)
{
    struct janitor_disk *disk = NULL;
    struct pg_error error;
    if (!link_bind(&c->link, c->options.endpoint, c->why, sizeof c->why) || !open_metrics(c))
        return false;
    log_event(LOG_INFO, "bound", "endpoint=%s", link_endpoint(c->link));
    c->fleet = fleet_new();
    if (!c->fleet || !report_open(&c->reports) || !janitor_disk_open(&disk, c->options.pace.staged_ms / 1000.0, disk_done)) {
        snprintf(c->why, sizeof c->why, "out of memory or threads");
        return false;
    }
    janitor_init(&c->janitor, &c->options.pace, disk, clock_ms());
    if (!task_turn_open(&c->database, c->options.database, &error)) {
        snprintf(c->why, sizeof c->why, "%s", error.text);
        return false;
    }
    return !c->options.state_file ||
           state_file_write(c->options.state_file, link_endpoint(c->link), c->metrics_port, "connecting", c->why, sizeof c->why);
}

static void coordinator_close(struct coordinator *c)
{
    if (c->options.state_file && c->exit_code == 0)
        state_file_remove(c->options.state_file);
    link_close(&c->link, LINGER_MS);
    metric_stop();
    janitor_disk_close(c->janitor.disk);
    janitor_done(&c->janitor);
    task_turn_close(c->database);
    workload_done(&c->workload);
    report_close(&c->reports);
    fleet_free(c->fleet);
}

int coordinator_run(const struct coordinator_options *options, char *why, size_t why_bytes)
{
    static struct coordinator c;
    c = (struct coordinator){.options = *options};
    if (!coordinator_open(&c))
        c.exit_code = LIFECYCLE_REFUSED;
    else if (!options->must_migrate || migrate(&c)) {
        lifecycle_notify("READY=1");
        while (!c.is_over) {
            coordinator_round(&c);
            if (!c.is_over)
                coordinator_sleep(&c);
        }
    }
    snprintf(why, why_bytes, "%s", c.why);
    coordinator_close(&c);
    return c.exit_code;
}
