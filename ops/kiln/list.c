/* list.c - status, images, failures, workers; pause, resume, cancel, retry.
 *
 * Rows come through a cursor and are printed as they come: a campaign of a million images needs no memory here. JSON
 * numbers are exact: seeds go up to 2^64 - 1. */
#include "list.h"

#include "json_text.h"
#include "progress.h"
#include "table.h"
#include "task_store.h"

#include <inttypes.h>
#include <math.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Members of an object, in order. */
static void open_object(struct json_text *t)
{
    json_text_clear(t);
    json_text_put(t, "{");
}

static void put_key(struct json_text *t, const char *key)
{
    json_text_format(t, "%s\"%s\":", t->length > 1 ? "," : "", key);
}

static void put_text(struct json_text *t, const char *key, const char *value)
{
    put_key(t, key);
    json_text_text(t, value);
}

static void put_int(struct json_text *t, const char *key, int64_t value)
{
    put_key(t, key);
    json_text_format(t, "%" PRId64, value);
}

static void put_u64(struct json_text *t, const char *key, uint64_t value)
{
    put_key(t, key);
    json_text_format(t, "%" PRIu64, value);
}

static void put_double(struct json_text *t, const char *key, double value)
{
    put_key(t, key);
    json_text_double(t, value);
}

/* Ends the object and prints it; false when nobody reads any more or there was no memory. */
static bool print_object(struct json_text *t)
{
    json_text_put(t, "}\n");
    return !t->failed && fputs(t->data, stdout) >= 0;
}

/* What all of these commands begin with: words, --json, the database. */
struct listing {
    struct command_call *call;
    struct task_store *store;
    struct json_text line;
    bool json;
    const char *name;
    struct campaign campaign; /* of `name` */
};

static int begin(struct listing *l, struct command_call *call, int words_min, int words_max)
{
    const char *words[1] = {NULL};
    int word_count;
    *l = (struct listing){.call = call};
    const struct command_option options[] = {{"json", COMMAND_FLAG, &l->json, 0, 0}};
    if (!command_parse(call, options, 1, words_max ? words : NULL, words_min, words_max, &word_count))
        return call->is_help ? -1 : command_code(call);
    l->name = word_count ? words[0] : NULL;
    return command_store(call, &l->store);
}

/* --help ends a command with code 0, which begin tells apart from going on by -1. */
static int begin_code(int code)
{
    return code < 0 ? COMMAND_DONE : code;
}

static void end(struct listing *l)
{
    json_text_done(&l->line);
    task_store_campaign_done(&l->campaign);
    task_store_close(l->store);
}

static int find_campaign(struct listing *l)
{
    struct pg_error why;
    bool found = false;
    if (!task_store_campaign_find(l->store, l->name, &l->campaign, &found, &why))
        return command_fault(l->call, &why);
    if (!found)
        return command_refuse(l->call, "there is no campaign '%s'; `kiln status` lists them", l->name);
    return COMMAND_DONE;
}

/* A full disk means the reader did not get everything. A pipe whose reader left (`| head`) had enough. */
static int close_output(struct listing *l, int code)
{
    struct pollfd reader = {.fd = STDOUT_FILENO, .events = POLLOUT};
    if (fflush(stdout) == 0 && !ferror(stdout))
        return code;
    if (poll(&reader, 1, 0) == 1 && (reader.revents & POLLERR))
        return code;
    return code == COMMAND_DONE ? command_say(l->call, COMMAND_FAILED, "not everything could be written to the output") : code;
}

/* --- status ------------------------------------------------------------------------------------------- */

static bool status_json(struct listing *l, const struct campaign *c)
{
    struct json_text *t = &l->line;
    open_object(t);
    put_text(t, "campaign", c->name);
    put_text(t, "state", c->state);
    put_int(t, "total", c->total);
    put_int(t, "ready", c->ready);
    put_int(t, "running", c->running);
    put_int(t, "done", c->done);
    put_int(t, "failed", c->failed);
    put_int(t, "cancelled", c->cancelled);
    put_double(t, "images_per_second", c->images_per_second);
    put_double(t, "eta_s", c->eta_s);
    return print_object(t);
}

static void status_row(struct table *table, const struct campaign *c)
{
    char eta[32] = "-";
    if (isfinite(c->eta_s) && c->ready + c->running > 0)
        progress_duration(eta, sizeof eta, c->eta_s);
    table_cell(table, "%s", c->name);
    table_cell(table, "%s", c->state);
    table_cell(table, "%" PRId64, c->total);
    table_cell(table, "%" PRId64, c->ready);
    table_cell(table, "%" PRId64, c->running);
    table_cell(table, "%" PRId64, c->done);
    table_cell(table, "%" PRId64, c->failed - c->cancelled);
    table_cell(table, "%" PRId64, c->cancelled);
    if (isfinite(c->images_per_second))
        table_cell(table, "%.2f", c->images_per_second);
    else
        table_cell(table, "-");
    table_cell(table, "%s", eta);
}

static void status_print(struct listing *l, const struct campaign *campaigns, int count)
{
    struct table table;
    if (!l->json)
        table_begin(&table, "CAMPAIGN|STATE|TOTAL|READY|RUNNING|DONE|FAILED|CANCELLED|IMAGES/S|LEFT", "llrrrrrrrr");
    for (int i = 0; i < count; i++)
        if (!l->json)
            status_row(&table, &campaigns[i]);
        else if (!status_json(l, &campaigns[i]))
            break;
    if (!l->json)
        table_print(&table, stdout);
}

static int status_all(struct listing *l)
{
    struct campaign *campaigns = NULL;
    struct pg_error why;
    int count = 0;
    if (!task_store_campaigns(l->store, &campaigns, &count, &why))
        return command_fault(l->call, &why);
    if (count == 0 && !l->json)
        puts("no campaigns yet; `kiln submit FILE --campaign NAME` makes one");
    else
        status_print(l, campaigns, count);
    task_store_campaigns_free(campaigns, count);
    return COMMAND_DONE;
}

static int status_run(struct command_call *call)
{
    struct listing l;
    int code = begin(&l, call, 0, 1);
    if (code == COMMAND_DONE && l.name) {
        code = find_campaign(&l);
        if (code == COMMAND_DONE)
            status_print(&l, &l.campaign, 1);
    } else if (code == COMMAND_DONE) {
        code = status_all(&l);
    }
    code = close_output(&l, begin_code(code));
    end(&l);
    return code;
}

/* --- images ------------------------------------------------------------------------------------------- */

/* A member that the database holds as JSON; left out where there is none. */
static void put_object(struct json_text *t, const char *name, const char *json)
{
    if (!json)
        return;
    json_text_format(t, ",\"%s\":", name);
    json_text_put(t, json);
}

static bool image_json(void *context, const struct image_row *r)
{
    struct json_text *t = &((struct listing *)context)->line;
    open_object(t);
    put_u64(t, "task", r->task);
    put_text(t, "campaign", r->campaign);
    put_int(t, "row", r->row);
    put_int(t, "variation", r->variation);
    put_text(t, "path", r->path);
    put_text(t, "sha256", r->sha256);
    put_u64(t, "bytes", r->bytes);
    put_int(t, "width", r->width);
    put_int(t, "height", r->height);
    put_u64(t, "seed", r->seed);
    put_text(t, "prompt", r->prompt);
    put_text(t, "model", r->model);
    put_text(t, "worker", r->worker);
    put_int(t, "attempt", r->attempt);
    put_double(t, "render_s", r->render_s);
    put_object(t, "labels", r->labels_json);
    put_object(t, "inputs", r->inputs);
    return print_object(t);
}

static bool image_line(void *context, const struct image_row *r)
{
    char prompt[256];
    (void)context;
    table_shown(prompt, sizeof prompt, r->prompt, 60);
    return printf("%s  seed %" PRIu64 "  %dx%d  %s\n", r->path, r->seed, r->width, r->height, prompt) >= 0;
}

static int images_run(struct command_call *call)
{
    struct listing l;
    struct pg_error why;
    int code = begin(&l, call, 1, 1);
    if (code == COMMAND_DONE)
        code = find_campaign(&l);
    if (code == COMMAND_DONE && !task_store_images(l.store, l.name, l.json ? image_json : image_line, &l, &why) && !ferror(stdout))
        code = command_fault(call, &why);
    code = close_output(&l, begin_code(code));
    end(&l);
    return code;
}

/* --- failures ----------------------------------------------------------------------------------------- */

static bool failure_json(void *context, const struct failure_row *r)
{
    struct json_text *t = &((struct listing *)context)->line;
    open_object(t);
    put_u64(t, "task", r->task);
    put_text(t, "campaign", r->campaign);
    put_int(t, "row", r->row);
    put_int(t, "variation", r->variation);
    put_text(t, "prompt", r->prompt);
    put_text(t, "kind", r->kind);
    put_text(t, "reason", r->reason);
    put_text(t, "worker", r->worker);
    put_int(t, "attempt", r->attempt);
    return print_object(t);
}

static bool failure_line(void *context, const struct failure_row *r)
{
    char prompt[256], reason[1024];
    (void)context;
    table_shown(prompt, sizeof prompt, r->prompt, 60);
    table_shown(reason, sizeof reason, r->reason, 300);
    return printf("row %d variation %d (task %" PRIu64 ", attempt %d, %s): %s\n    %s\n", r->row, r->variation, r->task, r->attempt,
                  r->kind, reason, prompt) >= 0;
}

static int failures_run(struct command_call *call)
{
    struct listing l;
    struct pg_error why;
    int code = begin(&l, call, 1, 1);
    if (code == COMMAND_DONE)
        code = find_campaign(&l);
    if (code == COMMAND_DONE && !task_store_failures(l.store, l.name, l.json ? failure_json : failure_line, &l, &why) && !ferror(stdout))
        code = command_fault(call, &why);
    if (code == COMMAND_DONE && !l.json && l.campaign.failed == 0)
        puts("no failures");
    code = close_output(&l, begin_code(code));
    end(&l);
    return code;
}

/* --- workers ------------------------------------------------------------------------------------------ */

struct workers {
    struct listing *listing;
    struct table table;
    int count;
};

static bool worker_json(void *context, const struct worker_row *r)
{
    struct json_text *t = &((struct workers *)context)->listing->line;
    open_object(t);
    put_text(t, "worker", r->name);
    put_text(t, "state", r->state);
    put_text(t, "device", r->device);
    put_text(t, "models", r->models);
    put_text(t, "host", r->host);
    put_u64(t, "boot_epoch", r->boot_epoch);
    put_int(t, "held", r->held);
    put_double(t, "seen_s", r->seen_s);
    put_int(t, "done", r->done);
    return print_object(t);
}

static bool worker_row(void *context, const struct worker_row *r)
{
    struct workers *w = context;
    char seen[32], models[128];
    w->count++;
    progress_duration(seen, sizeof seen, r->seen_s);
    table_shown(models, sizeof models, r->models ? r->models : "", 40);
    table_cell(&w->table, "%s", r->name);
    table_cell(&w->table, "%s", r->state);
    table_cell(&w->table, "%s", r->device ? r->device : "");
    table_cell(&w->table, "%s", models);
    table_cell(&w->table, "%d", r->held);
    table_cell(&w->table, "%" PRId64, r->done);
    table_cell(&w->table, "%s ago", seen);
    return true;
}

static int workers_run(struct command_call *call)
{
    struct listing l;
    struct pg_error why;
    struct workers w = {.listing = &l};
    int code = begin(&l, call, 0, 0);
    if (code == COMMAND_DONE) {
        table_begin(&w.table, "WORKER|STATE|DEVICE|MODELS|HELD|DONE|SEEN", "llllrrr");
        bool ok = task_store_workers(l.store, l.json ? worker_json : worker_row, &w, &why);
        if (!ok && !ferror(stdout))
            code = command_fault(call, &why);
        else if (!l.json && w.count == 0)
            puts("no workers; `kiln up --model NAME=DIR` starts some");
        else if (!l.json)
            table_print(&w.table, stdout);
        table_done(&w.table);
    }
    code = close_output(&l, begin_code(code));
    end(&l);
    return code;
}

/* --- state changes ------------------------------------------------------------------------------------ */

enum change { CHANGE_PAUSE, CHANGE_RESUME, CHANGE_CANCEL, CHANGE_RETRY };

static bool apply(struct task_store *store, enum change change, const char *name, int64_t *ret_count, struct pg_error *why)
{
    switch (change) {
    case CHANGE_PAUSE: return task_store_pause(store, name, why);
    case CHANGE_RESUME: return task_store_resume(store, name, why);
    case CHANGE_CANCEL: return task_store_cancel(store, name, ret_count, why);
    default: return task_store_retry(store, name, ret_count, why);
    }
}

/* state: of the campaign before the change. */
static void tell_change(struct listing *l, enum change change, const char *state, int64_t count)
{
    bool is_over = change == CHANGE_RESUME && strcmp(state, "done") == 0;
    static const char *const sentences[] = {
        "campaign %s is paused: what is running ends, nothing new begins\n",
        "campaign %s goes on\n",
        "campaign %s is cancelled: %" PRId64 " task%s taken out\n",
        "campaign %s: %" PRId64 " task%s ready again\n",
    };
    static const char *const states[] = {"paused", "active", "cancelled", "active"};
    struct json_text *t = &l->line;
    if (!l->json && is_over)
        printf("campaign %s is done: there is nothing left to go on with\n", l->name);
    else if (!l->json)
        printf(sentences[change], l->name, count, count == 1 ? "" : "s");
    if (!l->json)
        return;
    open_object(t);
    put_text(t, "campaign", l->name);
    put_text(t, "state", is_over ? "done" : states[change]);
    if (change == CHANGE_CANCEL || change == CHANGE_RETRY)
        put_int(t, "tasks", count);
    print_object(t);
}

static int change_run(struct command_call *call, enum change change)
{
    struct listing l;
    struct pg_error why;
    int64_t count = 0;
    int code = begin(&l, call, 1, 1);
    if (code == COMMAND_DONE)
        code = find_campaign(&l);
    if (code == COMMAND_DONE && !apply(l.store, change, l.name, &count, &why))
        code = command_fault(call, &why);
    else if (code == COMMAND_DONE)
        tell_change(&l, change, l.campaign.state, count);
    code = close_output(&l, begin_code(code));
    end(&l);
    return code;
}

static int pause_run(struct command_call *call)
{
    return change_run(call, CHANGE_PAUSE);
}

static int resume_run(struct command_call *call)
{
    return change_run(call, CHANGE_RESUME);
}

static int cancel_run(struct command_call *call)
{
    return change_run(call, CHANGE_CANCEL);
}

static int retry_run(struct command_call *call)
{
    return change_run(call, CHANGE_RETRY);
}

/* --- the table ---------------------------------------------------------------------------------------- */

const struct command list_status_command = {
    "status", "[NAME] [--json]", "counters and rates of campaigns",
    "  --json   {\"campaign\",\"state\",\"total\",\"ready\",\"running\",\"done\",\"failed\",\"cancelled\",\"images_per_second\",\"eta_s\"};\n"
    "           failed counts the cancelled, too\n", status_run};
const struct command list_images_command = {
    "images", "NAME [--json]", "what was rendered: file, seed, prompt",
    "  --json   {\"task\",\"campaign\",\"row\",\"variation\",\"path\",\"sha256\",\"bytes\",\"width\",\"height\",\"seed\",\"prompt\",\n"
    "            \"model\",\"worker\",\"attempt\",\"render_s\"}, and \"labels\" and\n"
    "            \"inputs\" where there are any; in the order of the rows. render_s: a batch's time, shared by its images\n", images_run};
const struct command list_failures_command = {
    "failures", "NAME [--json]", "what failed, and why",
    "  --json   {\"task\",\"campaign\",\"row\",\"variation\",\"prompt\",\"kind\",\"reason\",\"worker\",\"attempt\"}\n", failures_run};
const struct command list_workers_command = {
    "workers", "[--json]", "who is working, on what",
    "  --json   {\"worker\",\"state\",\"device\",\"models\",\"host\",\"boot_epoch\",\"held\",\"seen_s\",\"done\"}\n", workers_run};
const struct command list_pause_command = {"pause", "NAME [--json]", "no new images are begun", "", pause_run};
const struct command list_resume_command = {"resume", "NAME [--json]", "a paused campaign goes on", "", resume_run};
const struct command list_cancel_command = {"cancel", "NAME [--json]", "take out what is not rendered yet", "", cancel_run};
const struct command list_retry_command = {"retry", "NAME [--json]", "failed images become ready again", "", retry_run};
