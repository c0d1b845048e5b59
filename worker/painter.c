/* painter.c - check, render, split when it fails, hand over. */
#include "painter.h"

#include <inttypes.h>
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "fault_switch.h"
#include "image_file.h"
#include "inputs.h"
#include "log.h"
#include "need.h"
#include "store_dir.h"
#include "worker_metric.h"

/* What the tasks of a batch are made from. */
struct batch_inputs {
    const struct inputs *of[MSG_ITEMS_MAX]; /* as the tasks; NULL: failed, and its task with it */
    struct inputs loaded[MSG_ITEMS_MAX];    /* each different text once: many seeds of one edit share its pixels */
    const char *text[MSG_ITEMS_MAX];
    int count;
};

struct painter {
    struct painter_options options;
    struct mailbox batches;
    pthread_t thread;
    atomic_int state;
    struct engine_error why; /* written before state becomes PAINTER_FAILED */
    struct model_set models;
    struct batch_caps caps;
    struct batch_inputs inputs; /* of the batch that is painted */
    bool is_over;               /* a failure was the last: the device is lost, or the weights are others */
    /* seen by the I/O thread */
    atomic_uint_fast64_t step_counter, batch;
    atomic_uint step, steps;
    atomic_bool is_rendering;
};

/* Some tasks of one batch, rendered together. */
struct group {
    struct batch *batch;
    struct model *model;
    uint32_t count, index[ENGINE_BATCH_MAX];
    const struct inputs *const *inputs; /* as batch->assign->tasks */
};

/* --- outcomes -------------------------------------------------------------------------------------- */

static void fail_task(struct painter *p, struct batch *b, uint32_t index, const struct failure *f)
{
    p->is_over |= f->is_last;
    mailbox_put(p->options.outcomes, &batch_outcome_failed(b, index, f)->mail);
}

static void fail_group(struct painter *p, const struct group *g, const struct failure *f)
{
    for (uint32_t i = 0; i < g->count; i++)
        fail_task(p, g->batch, g->index[i], f);
}

static void fail_batch(struct painter *p, struct batch *b, const struct failure *f)
{
    for (uint32_t i = 0; i < b->assign->count; i++)
        fail_task(p, b, i, f);
}

/* --- one render ------------------------------------------------------------------------------------ */

struct watch { struct painter *p; const struct group *group; };

static bool watch_cancelled(void *context)
{
    const struct group *g = ((struct watch *)context)->group;
    for (uint32_t i = 0; i < g->count; i++)
        if (!batch_is_cancelled(g->batch, g->index[i]))
            return false;
    return true;
}

static void watch_step(void *context, int step, int steps)
{
    struct painter *p = ((struct watch *)context)->p;
    int slow_ms = fault_switch_slow_ms();
    atomic_fetch_add(&p->step_counter, 1);
    atomic_store(&p->step, (unsigned)step);
    atomic_store(&p->steps, (unsigned)steps);
    mailbox_wake(p->options.outcomes);
    if (slow_ms)
        clock_sleep_ms(slow_ms);
}

static void request_of(const struct group *g, uint32_t index, struct engine_request *ret)
{
    const struct msg_assign *a = g->batch->assign;
    const struct msg_task *t = &a->tasks[index];
    *ret = (struct engine_request){
        .prompt = t->prompt, .negative = t->negative, .width = (int)a->width, .height = (int)a->height,
        .steps = (int)a->steps, .guidance = (float)a->guidance, .seed = t->seed, .truncate = t->truncate,
    };
    inputs_into(g->inputs[index], ret);
    engine_team_defaults(g->model->engine, ret);
}

static bool fault_wanted(struct engine_error *why)
{
    if (fault_switch_is_due(FAULT_HANG))
        clock_sleep_ms(INT64_C(1) << 40);
    if (fault_switch_is_due(FAULT_OOM))
        return !engine_error_set(why, ENGINE_NO_MEMORY, "KILN_FAULT=oom");
    if (fault_switch_is_due(FAULT_BAD_RESULT))
        return !engine_error_set(why, ENGINE_BAD_RESULT, "KILN_FAULT=bad-result");
    if (fault_switch_is_due(FAULT_LOSE_DEVICE))
        return !engine_error_set(why, ENGINE_DEVICE, "KILN_FAULT=lose-device");
    return false;
}

static bool render(struct painter *p, const struct group *g, struct engine_image *images, struct engine_error *why)
{
    struct engine_request requests[ENGINE_BATCH_MAX];
    struct watch context = {p, g};
    struct engine_watch watch = {.context = &context, .cancelled = watch_cancelled, .step = watch_step};
    for (uint32_t i = 0; i < g->count; i++)
        request_of(g, g->index[i], &requests[i]);
    atomic_fetch_add(&p->step_counter, 1);
    bool ok = !fault_wanted(why) && engine_team_generate(g->model->engine, requests, (int)g->count, images, &watch, why);
    model_set_look(g->model);
    return ok;
}

static void hand_over(struct painter *p, const struct group *g, struct engine_image *images, double render_s)
{
    struct failure cancelled = failure_released("cancelled");
    for (uint32_t i = 0; i < g->count; i++) {
        if (batch_is_cancelled(g->batch, g->index[i])) {
            engine_image_done(&images[i]);
            fail_task(p, g->batch, g->index[i], &cancelled);
        } else {
            writer_image(p->options.writer, g->batch, g->index[i], &images[i], g->model->digest, g->model->info.licence,
                         render_s / g->count);
        }
    }
}

/* --- when it fails: smaller, single, or given back ------------------------------------------------------ */

static void paint_group(struct painter *p, const struct group *g);

static void paint_in_parts(struct painter *p, const struct group *g, uint32_t part)
{
    for (uint32_t start = 0; start < g->count; start += part) {
        struct group some = {.batch = g->batch, .model = g->model, .inputs = g->inputs};
        for (uint32_t i = start; i < g->count && i < start + part; i++)
            some.index[some.count++] = g->index[i];
        paint_group(p, &some);
    }
}

static void paint_failed(struct painter *p, const struct group *g, const struct engine_error *why)
{
    const struct msg_assign *a = g->batch->assign;
    struct failure f = failure_of_engine(why);
    log_event(LOG_WARN, "render_failed", "batch=%" PRIu64 " count=%" PRIu32 " fault=%s why=%s", a->batch, g->count,
              engine_error_fault(why->fault), log_quote(why->text));
    if (model_set_blame(g->model, why, &f)) {
        fail_group(p, g, &f);
        return;
    }
    if (g->count > 1 && why->fault == ENGINE_NO_MEMORY) {
        int cap = batch_caps_lower(&p->caps, a->model, a->width, a->height, (int)g->count);
        log_event(LOG_WARN, "batch_cap_lowered", "model=%s size=%" PRIu32 "x%" PRIu32 " cap=%d", log_quote(a->model),
                  a->width, a->height, cap);
        paint_in_parts(p, g, (uint32_t)cap);
        return;
    }
    if (g->count > 1 && failure_is_of_one(why->fault)) {
        paint_in_parts(p, g, 1);
        return;
    }
    fail_group(p, g, &f);
}

static void without_cancelled(struct painter *p, const struct group *g, struct group *ret)
{
    struct failure cancelled = failure_released("cancelled");
    *ret = (struct group){.batch = g->batch, .model = g->model, .inputs = g->inputs};
    for (uint32_t i = 0; i < g->count; i++) {
        if (batch_is_cancelled(g->batch, g->index[i]))
            fail_task(p, g->batch, g->index[i], &cancelled);
        else
            ret->index[ret->count++] = g->index[i];
    }
}

/* Which images were rendered together, and what they share: an image that looks wrong leads to its neighbours. */
static void log_rendered(const struct group *g, double render_s)
{
    const struct msg_assign *a = g->batch->assign;
    const struct task_inputs *told = &g->inputs[g->index[0]]->told;
    char tasks[ENGINE_BATCH_MAX * 21 + 1]; /* 20 digits and a comma */
    int used = 0;
    for (uint32_t i = 0; i < g->count; i++)
        used += snprintf(tasks + used, sizeof tasks - (size_t)used, i ? ",%" PRIu64 : "%" PRIu64, a->tasks[g->index[i]].task);
    log_event(LOG_INFO, "rendered", "batch=%" PRIu64 " campaign=%s model=%s size=%" PRIu32 "x%" PRIu32 " references=%d adapters=%d count=%" PRIu32
              " seconds=%.3f tasks=%s", a->batch, log_quote(a->campaign), log_quote(a->model), a->width, a->height, told->image_count,
              told->lora_count, g->count, render_s, tasks);
}

static void paint_group(struct painter *p, const struct group *all)
{
    struct group wanted;
    struct engine_image images[ENGINE_BATCH_MAX];
    struct engine_error why = {0};
    without_cancelled(p, all, &wanted);
    if (wanted.count == 0)
        return;
    double start_s = clock_s();
    bool ok = render(p, &wanted, images, &why);
    if (!model_set_is_unchanged(wanted.model)) { /* whatever was rendered may be of other weights than its digest says */
        struct failure f = model_set_changed(wanted.model);
        for (uint32_t i = 0; ok && i < wanted.count; i++)
            engine_image_done(&images[i]);
        fail_group(p, &wanted, &f);
        return;
    }
    if (!ok) {
        paint_failed(p, &wanted, &why);
        return;
    }
    double render_s = clock_s() - start_s;
    metric_observe(worker_metric_all()->batch_size, wanted.count);
    metric_observe(worker_metric_all()->render_seconds, render_s);
    log_rendered(&wanted, render_s);
    hand_over(p, &wanted, images, render_s);
}

/* --- a batch ---------------------------------------------------------------------------------------- */

/* What can be said of the whole batch before the model is asked. */
static bool batch_ok(const struct msg_assign *a, struct failure *f)
{
    enum image_format format;
    if (a->width > IMAGE_FILE_SIDE_MAX || a->height > IMAGE_FILE_SIDE_MAX || a->steps > ENGINE_STEPS_MAX)
        *f = failure_refuse("size %" PRIu32 "x%" PRIu32 ", %" PRIu32 " steps: at most %d a side and %d steps", a->width,
                            a->height, a->steps, IMAGE_FILE_SIDE_MAX, ENGINE_STEPS_MAX);
    else if (a->out_dir[0] != '/')
        *f = failure_refuse("output '%s': this worker writes to absolute folder names only", a->out_dir);
    else if (!image_file_format_of(a->format, &format))
        *f = failure_refuse("format '%s' is not png, jpg or webp", a->format);
    else
        return true;
    return false;
}

static struct model *model_for(struct painter *p, const struct msg_assign *a, const struct task_inputs *shared, struct failure *f)
{
    char text[512];
    struct model *m = model_set_find(&p->models, a->model);
    if (!m) {
        *f = failure_retry("model '%s' is not on this worker", a->model);
        return NULL;
    }
    if (!model_set_allows(m, a->use, text, sizeof text)) {
        *f = failure_refuse("%s", text);
        return NULL;
    }
    return model_set_open(&p->models, m, shared, f) ? m : NULL;
}

static bool task_ok(const struct group *g, uint32_t index, struct failure *f)
{
    struct engine_request r;
    struct engine_error why = {0};
    const char *file = g->batch->assign->tasks[index].file;
    if (!store_dir_file_ok(file)) {
        *f = failure_refuse("file name '%s': no '/', no leading '.', printable, at most 255 bytes", file);
        return false;
    }
    request_of(g, index, &r);
    if (engine_team_check(g->model->engine, &r, &why))
        return true;
    *f = failure_of_engine(&why);
    return false;
}

/* --- inputs -------------------------------------------------------------------------------------------- */

static const struct inputs *inputs_of(struct batch_inputs *all, const char *text, struct failure *f)
{
    for (int i = 0; i < all->count; i++)
        if (strcmp(all->text[i], text) == 0)
            return &all->loaded[i];
    if (!inputs_load(&all->loaded[all->count], text, f))
        return NULL;
    all->text[all->count] = text;
    return &all->loaded[all->count++];
}

/* The first that could be loaded; its adapters are those of the whole batch. NULL: none could. */
static const struct inputs *load_inputs(struct painter *p, struct batch *b, struct batch_inputs *all)
{
    const struct inputs *first = NULL;
    for (uint32_t i = 0; i < b->assign->count; i++) {
        struct failure f;
        all->of[i] = inputs_of(all, b->assign->tasks[i].inputs, &f);
        if (all->of[i] && first && !task_inputs_same_loras(&all->of[i]->told, &first->told)) {
            f = failure_retry("the batch mixes adapters");
            all->of[i] = NULL;
        }
        if (!all->of[i])
            fail_task(p, b, i, &f);
        first = first ? first : all->of[i];
    }
    return first;
}

static void fail_loaded(struct painter *p, struct batch *b, const struct batch_inputs *all, const struct failure *f)
{
    for (uint32_t i = 0; i < b->assign->count; i++)
        if (all->of[i])
            fail_task(p, b, i, f);
}

/* A batch may be larger than what fits at once: it is rendered in groups of the shape's cap. */
static void paint_loaded(struct painter *p, struct group *g)
{
    const struct msg_assign *a = g->batch->assign;
    struct failure f;
    for (uint32_t i = 0; i < a->count; i++) {
        if (g->inputs[i] && task_ok(g, i, &f))
            g->index[g->count++] = i;
        else if (g->inputs[i])
            fail_task(p, g->batch, i, &f);
        uint32_t cap = (uint32_t)batch_caps_of(&p->caps, a->model, a->width, a->height);
        if (g->count >= cap || (i + 1 == a->count && g->count > 0)) {
            paint_group(p, g);
            g->count = 0;
        }
    }
}

static void paint_batch(struct painter *p, struct batch *b)
{
    struct batch_inputs *all = &p->inputs;
    struct failure f;
    struct group g = {.batch = b, .inputs = all->of};
    if (p->is_over) { /* an attempt would cost its tasks one for nothing */
        f = failure_released("device lost or model changed");
        fail_batch(p, b, &f);
        return;
    }
    if (!batch_ok(b->assign, &f)) {
        fail_batch(p, b, &f);
        return;
    }
    const struct inputs *first = load_inputs(p, b, all);
    if (first && (g.model = model_for(p, b->assign, &first->told, &f)))
        paint_loaded(p, &g);
    else if (first)
        fail_loaded(p, b, all, &f);
    while (all->count > 0)
        inputs_done(&all->loaded[--all->count]);
}

/* --- the thread ------------------------------------------------------------------------------------ */

static void change_state(struct painter *p, enum painter_state state)
{
    atomic_store(&p->state, state);
    mailbox_wake(p->options.outcomes);
}

static void *painter_main(void *context)
{
    struct painter *p = context;
    if (!model_set_prepare(&p->models, p->options.sources, p->options.source_count, &p->options.engine, &p->why)) {
        change_state(p, PAINTER_FAILED);
        return NULL;
    }
    change_state(p, PAINTER_READY);
    for (struct batch *b; (b = mailbox_wait(&p->batches, -1));) {
        atomic_store(&p->batch, b->assign->batch);
        atomic_store(&p->step, 0);
        atomic_store(&p->is_rendering, true);
        paint_batch(p, b);
        atomic_store(&p->is_rendering, false);
        mailbox_put(p->options.outcomes, &batch_outcome_over(b)->mail);
    }
    return NULL;
}

bool painter_open(struct painter **ret, const struct painter_options *options, char *why, size_t why_bytes)
{
    struct painter *p = need_zeroed(1, sizeof *p);
    p->options = *options;
    p->caps.most = options->batch_max;
    mailbox_init(&p->batches, false);
    int error = pthread_create(&p->thread, NULL, painter_main, p);
    if (error) {
        snprintf(why, why_bytes, "cannot start the engine thread: %s", strerror(error));
        mailbox_done(&p->batches);
        free(p);
        return false;
    }
    *ret = p;
    return true;
}

void painter_close(struct painter *p)
{
    if (!p)
        return;
    mailbox_close(&p->batches);
    pthread_join(p->thread, NULL);
    model_set_close(&p->models);
    mailbox_done(&p->batches);
    free(p);
}

enum painter_state painter_state(const struct painter *p)
{
    return (enum painter_state)atomic_load(&p->state);
}

const struct engine_error *painter_why(const struct painter *p)
{
    return &p->why;
}

const struct model_set *painter_models(const struct painter *p)
{
    return &p->models;
}

void painter_give(struct painter *p, struct batch *b)
{
    mailbox_put(&p->batches, &b->mail);
}

struct batch *painter_take_back(struct painter *p)
{
    return mailbox_take(&p->batches);
}

struct painter_view painter_look(const struct painter *p)
{
    return (struct painter_view){
        .step_counter = atomic_load(&p->step_counter),
        .batch = atomic_load(&p->batch),
        .step = atomic_load(&p->step),
        .steps = atomic_load(&p->steps),
        .is_rendering = atomic_load(&p->is_rendering),
    };
}
