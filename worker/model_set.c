/* model_set.c - opening, warming up, closing for memory, licences. */
#include "model_set.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "digest.h"
#include "inputs.h"
#include "log.h"
#include "weights_digest.h"

/* The first image pays for page faults, thread start and packed weights; a campaign's first should not. */
static bool warm_up(struct model *m, bool has_adapters, struct engine_error *why)
{
    struct engine_request r = {.prompt = "warm-up", .width = ENGINE_SIDE_MIN, .height = ENGINE_SIDE_MIN, .steps = 1, .guidance = NAN};
    struct engine_image image;
    engine_team_defaults(m->engine, &r);
    if (!engine_team_generate(m->engine, &r, 1, &image, NULL, why))
        return engine_error_at(why, has_adapters ? "warm-up image with the adapters" : "warm-up image");
    engine_image_done(&image);
    return true;
}

static void close_model(struct model *m)
{
    engine_team_close(m->engine);
    free(m->loras);
    m->engine = NULL;
    m->loras = NULL;
}

/* Closes the open model that was not used for longest, except keep. */
static bool close_one(struct model_set *s, const struct model *keep)
{
    struct model *oldest = NULL;
    for (int i = 0; i < s->count; i++) {
        struct model *m = &s->models[i];
        if (m != keep && m->engine && (!oldest || m->used < oldest->used))
            oldest = m;
    }
    if (!oldest)
        return false;
    log_event(LOG_INFO, "model_closed", "model=%s reason=memory", log_quote(oldest->name));
    close_model(oldest);
    return true;
}

static void log_placement(const struct model *m)
{
    char figures[ENGINE_PLACEMENT_FIGURES_MAX];
    engine_placement_figures(&m->info, figures);
    log_event(LOG_INFO, "model_placed", "model=%s %s", log_quote(m->name), figures);
}

void model_set_look(struct model *m)
{
    const struct engine_info *now = engine_team_info(m->engine);
    if (now->placement == m->info.placement && now->waiting_blocks == m->info.waiting_blocks)
        return;
    m->info.placement = now->placement; /* other threads may read the rest */
    m->info.waiting_blocks = now->waiting_blocks;
    m->info.passes = now->passes;
    m->info.model_bytes = now->model_bytes;
    m->info.arena_bytes = now->arena_bytes;
    log_placement(m);
}

static bool open_engine(struct model_set *s, struct model *m, const struct engine_adapter *adapters, int adapter_count,
                        struct engine_error *why)
{
    struct engine_options options = s->common;
    options.model_dir = m->dir, options.adapters = adapters, options.adapter_count = adapter_count;
    double start_s = clock_s();
    log_event(LOG_INFO, "model_opening", "model=%s dir=%s adapters=%d", log_quote(m->name), log_quote(m->dir), adapter_count);
    bool ok;
    do {
        ok = engine_team_open(&m->engine, &options, why);
        if (!ok)
            m->engine = NULL;
    } while (!ok && why->fault == ENGINE_NO_MEMORY && close_one(s, m));
    if (ok && !warm_up(m, adapter_count > 0, why)) {
        close_model(m);
        ok = false;
    }
    if (!ok)
        return engine_error_at(why, "model '%s' (%s)", m->name, m->dir);
    m->info = *engine_team_info(m->engine);
    log_event(LOG_INFO, "model_open", "model=%s family=%s licence=%s device=%s precision=%s seconds=%.1f", log_quote(m->name),
              m->info.family, log_quote(m->info.licence), log_quote(m->info.device), engine_precision_name(options.precision),
              clock_s() - start_s);
    if (engine_precision_has_fp8(options.precision) && !m->info.has_fp8_units)
        log_event(LOG_INFO, "model_without_fp8_units", "model=%s precision=%s device=%s: the same numbers are multiplied in wider units",
                  log_quote(m->name), engine_precision_name(options.precision), log_quote(m->info.device));
    if (*m->info.split)
        log_event(LOG_INFO, "model_split", "model=%s split=%s", log_quote(m->name), log_quote(m->info.split));
    if (m->info.device_bytes)
        log_placement(m);
    return true;
}

/* The adapters' files, when they are still those of the task. */
static bool list_adapters(const struct task_inputs *in, struct engine_adapter *ret, struct failure *f)
{
    for (int i = 0; i < in->lora_count; i++) {
        struct task_inputs_file file = in->loras[i].file;
        if (!inputs_adapter(&file, f))
            return false;
        ret[i] = (struct engine_adapter){file.path, (float)in->loras[i].scale};
    }
    return true;
}

static void remember_misfit(struct model *m, const char *loras, const struct engine_error *why)
{
    free(m->misfit);
    m->misfit = strdup(loras);
    snprintf(m->misfit_why, sizeof m->misfit_why, "%s", why->text);
}

/* Which of the two is to blame? What does not fit a model that was open before, or makes no picture with it, is the adapter,
 * everywhere. */
static struct failure failure_to_open(struct model *m, const struct task_inputs *in, const char *loras, const struct engine_error *why)
{
    if (!in->lora_count || (why->fault != ENGINE_BAD_MODEL && why->fault != ENGINE_BAD_RESULT))
        return failure_of_engine(why);
    remember_misfit(m, loras, why);
    return failure_refuse("%s", why->text);
}

/* In an open engine. Where a device has no room for them, the model is opened anew, with a placement that counts them. */
static bool adapt(struct model_set *s, struct model *m, const struct engine_adapter *adapters, int count, struct engine_error *why)
{
    double start_s = clock_s();
    bool ok;
    do
        ok = engine_team_adapt(m->engine, adapters, count, why);
    while (!ok && why->fault == ENGINE_NO_MEMORY && close_one(s, m));
    if (!ok && why->fault == ENGINE_NO_MEMORY) {
        close_model(m);
        return open_engine(s, m, adapters, count, why);
    }
    if (!ok)
        return engine_error_at(why, "model '%s' (%s)", m->name, m->dir);
    log_event(LOG_INFO, "adapters_changed", "model=%s adapters=%d seconds=%.3f", log_quote(m->name), count, clock_s() - start_s);
    return true;
}

/* The adapters are looked at before, so that one that is away changes nothing, and again behind it: one that was replaced between
 * is what was read, or is what did not fit. */
static bool change_to(struct model_set *s, struct model *m, const struct task_inputs *in, const char *loras, struct failure *f)
{
    struct engine_adapter adapters[TASK_INPUTS_LORAS_MAX];
    struct engine_error why = {0};
    if (!list_adapters(in, adapters, f))
        return false;
    free(m->loras);
    m->loras = NULL;
    bool ok = m->engine ? adapt(s, m, adapters, in->lora_count, &why) : open_engine(s, m, adapters, in->lora_count, &why);
    if (!model_set_is_unchanged(m)) {
        *f = model_set_changed(m);
        return false;
    }
    if (!list_adapters(in, adapters, f))
        return false;
    if (ok && (m->loras = strdup(loras)))
        return true;
    *f = ok ? failure_retry("no memory for the names of the adapters") : failure_to_open(m, in, loras, &why);
    return false;
}

bool model_set_open(struct model_set *s, struct model *m, const struct task_inputs *in, struct failure *f)
{
    struct json_text text = {0};
    json_text_put(&text, "");
    task_inputs_loras(&text, in);
    const char *loras = text.data ? text.data : "";
    bool is_misfit = m->misfit && strcmp(m->misfit, loras) == 0;
    bool ok = !is_misfit && m->engine && m->loras && strcmp(m->loras, loras) == 0;
    m->used = ++s->uses;
    if (is_misfit)
        *f = failure_refuse("%s", m->misfit_why);
    else if (!ok)
        ok = change_to(s, m, in, loras, f);
    json_text_done(&text);
    return ok;
}

bool model_set_blame(struct model *m, const struct engine_error *why, struct failure *f)
{
    struct engine_error warm = {0};
    if (why->fault != ENGINE_BAD_RESULT || !m->loras || !*m->loras || warm_up(m, true, &warm) || warm.fault != ENGINE_BAD_RESULT)
        return false;
    engine_error_at(&warm, "model '%s' (%s)", m->name, m->dir);
    remember_misfit(m, m->loras, &warm);
    *f = failure_refuse("%s", warm.text);
    return true;
}

static bool look_at(struct model *m, struct engine_error *why)
{
    char text[512];
    return digest_model_look(m->dir, m->look, text, sizeof text) ||
           engine_error_set(why, ENGINE_BAD_MODEL, "model '%s': %s", m->name, text);
}

/* Opens the model while it is hashed; what cannot be opened is not worth reading whole. A look before both tells when files change
 * between them. */
static bool open_and_hash(struct model_set *s, struct model *m, struct engine_error *why)
{
    struct engine_options options = {.model_dir = m->dir};
    struct weights_digest_task hashing;
    char text[512];
    double start_s = clock_s();
    log_event(LOG_INFO, "model_hashing", "model=%s dir=%s", log_quote(m->name), log_quote(m->dir));
    if (!weights_digest_begin(&hashing, &options, NULL, text, sizeof text))
        return engine_error_set(why, ENGINE_NO_MEMORY, "model '%s': %s", m->name, text);
    if (!open_engine(s, m, NULL, 0, why) || !(m->loras = strdup(""))) {
        weights_digest_drop(&hashing);
        return m->engine ? engine_error_set(why, ENGINE_NO_MEMORY, "model '%s': no memory", m->name) : false;
    }
    if (!weights_digest_end(&hashing, m->digest, text, sizeof text))
        return engine_error_set(why, ENGINE_BAD_MODEL, "model '%s': %s", m->name, text);
    log_event(LOG_INFO, "model_hashed", "model=%s digest=%s seconds=%.1f", log_quote(m->name), m->digest, clock_s() - start_s);
    return true;
}

bool model_set_prepare(struct model_set *s, const struct model_source *sources, int count,
                       const struct engine_options *common, struct engine_error *why)
{
    memset(s, 0, sizeof *s);
    s->common = *common;
    s->common.sha256 = weights_digest_file;
    for (int i = 0; i < count; i++) {
        struct model *m = &s->models[i];
        snprintf(m->name, sizeof m->name, "%s", sources[i].name);
        m->dir = sources[i].dir;
        s->count++;
        m->used = ++s->uses;
        if (!look_at(m, why) || !open_and_hash(s, m, why))
            return false;
    }
    return true;
}

void model_set_close(struct model_set *s)
{
    for (int i = 0; i < s->count; i++) {
        close_model(&s->models[i]);
        free(s->models[i].misfit);
    }
}

struct model *model_set_find(struct model_set *s, const char *name)
{
    for (int i = 0; i < s->count; i++)
        if (strcmp(s->models[i].name, name) == 0)
            return &s->models[i];
    return NULL;
}

void model_set_describe(const struct model_set *s, struct msg_hello *ret)
{
    ret->device = s->count ? s->models[0].info.device : "";
    ret->precision = engine_precision_name(s->common.precision);
    ret->model_count = (uint32_t)s->count;
    for (int i = 0; i < s->count; i++) {
        const struct model *m = &s->models[i];
        ret->models[i] = (struct msg_model){.name = m->name, .digest = m->digest, .family = m->info.family,
                                            .licence = m->info.licence, .is_distilled = m->info.is_distilled};
    }
}

bool model_set_is_unchanged(const struct model *m)
{
    char now[65], ignored[512];
    return !digest_model_look(m->dir, now, ignored, sizeof ignored) || strcmp(now, m->look) == 0;
}

struct failure model_set_changed(const struct model *m)
{
    struct failure f = failure_released("model '%s': its files in %s changed while they were in use", m->name, m->dir);
    f.is_last = true;
    log_event(LOG_WARN, "model_changed", "model=%s dir=%s", log_quote(m->name), log_quote(m->dir));
    return f;
}

bool model_set_allows(const struct model *m, const char *use, char *why, size_t why_bytes)
{
    if (strcmp(use, "commercial") != 0 || strcmp(m->info.licence, MSG_LICENCE_NON_COMMERCIAL) != 0)
        return true;
    snprintf(why, why_bytes,
             "model '%s' is licensed %s and the campaign declares commercial use; use a model that allows it "
             "(klein-4b is Apache-2.0) or declare --use non-commercial",
             m->name, m->info.licence);
    return false;
}
