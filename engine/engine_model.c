/* engine_model.c - opens a model part by part; closes in reverse order.
 *
 * Weights are converted once into what the kernels want, or used where they are in the file when they are quantised. So
 * the files of transformer and text encoder stay mapped (the latter for the rows of its embedding table, too), and the
 * VAE's until its encoder is needed, so that it comes from the files whose other tensors are used, even if the folder has
 * changed since. */
#include "engine_model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "engine_plan.h"
#include "kern_cpu.h"
#include "kern_module.h"
#include "kern_plan.h"
#include "list_hash.h"
#include "model_parts.h"

double engine_model_now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

bool engine_model_sync(struct engine_model *m, struct engine_error *why)
{
    if (kern_sync(m->kern))
        return true;
    const char *text = kern_error(m->kern);
    return engine_error_set(why, kern_error_is_memory(text) ? ENGINE_NO_MEMORY : ENGINE_DEVICE, "%s", text);
}

/* --- opening ----------------------------------------------------------------------------------------------- */

/* Every rank gets the same number of each. */
static bool check_shares(const struct engine_model *m, struct engine_error *why)
{
    const struct transformer_config *t = &m->config.transformer;
    const struct text_encoder_config *x = &m->config.text;
    const struct { const char *what; int count; bool may_share; } units[] = {
        {"heads of the transformer", t->num_attention_heads, false}, {"values of the transformer's MLP", t->mlp_hidden, false},
        {"heads of the text encoder", x->num_attention_heads, false}, {"values of the text encoder's MLP", x->intermediate_size, false},
        {"key and value heads of the text encoder", x->num_key_value_heads, true},
    };
    int ranks = kern_shares(m->kern);
    for (size_t i = 0; i < sizeof units / sizeof units[0]; i++)
        if (units[i].count % ranks && !(units[i].may_share && shard_divides(units[i].count, ranks)))
            return engine_error_set(why, ENGINE_BAD_REQUEST, "a team of %d: %d %s; accepted: as many ranks as share them evenly", ranks,
                                    units[i].count, units[i].what);
    return true;
}

/* All ranks are there, before they ask how much memory is left: connections take some, too. */
static bool join(struct engine_model *m, struct engine_error *why)
{
    kern_most(m->kern, 0);
    kern_join(m->kern);
    return engine_model_sync(m, why);
}

static bool open_kern(struct engine_model *m, const struct engine_options *o, struct engine_error *why)
{
    char text[512];
    if (!o->device || strcmp(o->device, "cpu") == 0)
        m->kern = kern_cpu_open(&(struct kern_cpu_options){.threads = o->threads, .isa = o->isa, .member = o->member}, text, sizeof text);
    else
        m->kern = kern_module_open(o->device, &o->member, text, sizeof text);
    if (!m->kern)
        return engine_error_set(why, kern_error_is_memory(text) ? ENGINE_NO_MEMORY
                                     : kern_error_is_device(text) ? ENGINE_DEVICE : ENGINE_NO_DEVICE, "%s", text);
    m->pool = weights_pool_new(m->kern);
    m->contexts = context_cache_new(m->dtype, TRANSFORMER_TEXT_ROWS, m->config.transformer.hidden);
    if (!m->pool || !m->contexts)
        return engine_error_set(why, ENGINE_NO_MEMORY, "no memory for the model's lists");
    return join(m, why);
}

static bool open_tokenizer(struct engine_model *m, const char *dir, struct engine_error *why)
{
    if (!tokenizer_open(&m->tokenizer, dir, why))
        return false;
    if (tokenizer_vocab_size(m->tokenizer) > m->config.text.vocab_size)
        return engine_error_set(why, ENGINE_BAD_MODEL, "tokenizer: highest id %d, but the text encoder has %d embeddings",
                                tokenizer_vocab_size(m->tokenizer) - 1, m->config.text.vocab_size);
    return true;
}

static struct weights begin(struct engine_model *m, const struct weight_files *files, enum tensor_names_part part)
{
    return (struct weights){.kern = m->kern, .pool = m->pool, .files = files, .dtype = m->dtype,
                            .has_fp8_products = engine_precision_has_fp8(m->precision), .part = model_parts_name(part)};
}

/* A pool of its own for what is loaded from here on. */
static bool new_pool(struct engine_model *m, struct weights *w, struct engine_error *why)
{
    w->pool = weights_pool_new(m->kern);
    return w->pool || engine_error_set(why, ENGINE_NO_MEMORY, "no memory for the model's lists");
}

static bool end(struct engine_model *m, struct weights *w, struct engine_error *why)
{
    m->info.parameters += w->parameters;
    return weights_done(w, why);
}

static bool load_vae(struct engine_model *m, struct model_parts *p, struct engine_error *why)
{
    struct weights w = begin(m, p->files[TENSOR_NAMES_VAE], TENSOR_NAMES_VAE);
    vae_load(&m->vae, &m->config.vae, &w);
    m->vae_files = p->files[TENSOR_NAMES_VAE];
    p->files[TENSOR_NAMES_VAE] = NULL;
    return end(m, &w, why);
}

struct tensor engine_model_checksums(struct engine_model *m, int64_t rows)
{
    return kern_ranks(m->kern) > 1 ? kern_temp(m->kern, TENSOR_I32, 1, &rows) : (struct tensor){0};
}

void engine_model_compare(struct engine_model *m, struct tensor checksums)
{
    struct kern *k = m->kern;
    struct tensor host = checksums;
    if (!checksums.data)
        return;
    host.data = calloc((size_t)tensor_count(host), sizeof(int32_t));
    if (!host.data) {
        kern_leave(k, "no memory for checksums");
        return;
    }
    kern_read(k, host, checksums);
    kern_agree(k, (int64_t)list_hash(host.data, tensor_count(host)), "a row of a step");
    free(host.data);
}

bool engine_model_has_kv(const struct engine_model *m)
{
    return strcmp(m->config.pipeline, "Flux2KleinKVPipeline") == 0;
}

bool engine_model_encoder(struct engine_model *m, struct engine_error *why)
{
    if (m->encoder_pool)
        return true;
    struct weights w = begin(m, m->vae_files, TENSOR_NAMES_VAE);
    if ((m->plan && !engine_plan_encoder(m->plan, m, why)) || !new_pool(m, &w, why))
        return false;
    vae_load_encoder(&m->encoder, &m->config.vae, &w);
    bool failed = !weights_done(&w, why);
    if (!failed)
        engine_error_set(why, ENGINE_NO_MEMORY, "another rank of the team has no room for it");
    if (kern_most(m->kern, failed) || !engine_model_sync(m, why)) { /* on all ranks of a team or on none */
        weights_pool_free(w.pool); /* nothing half loaded stays: the next call begins anew */
        m->encoder = (struct vae_encoder){0};
        return engine_error_at(why, "the encoder of the VAE, which reference images need");
    }
    m->encoder_pool = w.pool;
    weight_files_close(m->vae_files);
    m->vae_files = NULL;
    return true;
}

/* --- the transformer and its adapters ---------------------------------------------------------------------- */

bool engine_model_beside(struct engine_model *m, const struct adapters *a, struct engine_error *why)
{
    struct weights w = begin(m, NULL, TENSOR_NAMES_TRANSFORMER);
    adapted_set(&m->transformer.linears, NULL, &w);
    weights_pool_free(m->adapter_pool);
    m->adapter_pool = NULL;
    if (!new_pool(m, &w, why))
        return false;
    m->adapter_pool = w.pool;
    adapted_set(&m->transformer.linears, a, &w);
    return weights_done(&w, why);
}

static void unload_transformer(struct engine_model *m)
{
    transformer_unload(&m->transformer);
    weights_pool_free(m->adapter_pool);
    weights_pool_free(m->transformer_pool);
    m->adapter_pool = m->transformer_pool = NULL;
}

/* With what must be merged. */
static bool load_transformer(struct engine_model *m, const struct adapters *a, struct engine_error *why)
{
    struct weights w = begin(m, m->transformer_files, TENSOR_NAMES_TRANSFORMER);
    unload_transformer(m);
    if (!new_pool(m, &w, why))
        return false;
    m->transformer_pool = w.pool;
    w.adapters = a;
    w.waiting = m->info.waiting_blocks;
    transformer_load(&m->transformer, &m->config.transformer, &w);
    return end(m, &w, why);
}

void engine_model_forget(struct engine_model *m)
{
    if (!m->contexts)
        return;
    context_cache_free(m->contexts);
    m->contexts = context_cache_new(m->dtype, TRANSFORMER_TEXT_ROWS, m->config.transformer.hidden);
}

static bool adapt(struct engine_model *m, const struct adapters *a, struct engine_error *why)
{
    bool is_merged = adapters_merge_any(a), is_context_adapted = adapters_change(a, "context_embedder.weight");
    bool is_loaded = m->transformer_pool && !m->is_merged && !is_merged;
    m->is_adapted = false;
    if (m->is_context_adapted || is_context_adapted)
        engine_model_forget(m); /* contexts are remembered as the transformer's first linear made them */
    m->is_context_adapted = is_context_adapted;
    if (!is_loaded && !load_transformer(m, a, why)) {
        unload_transformer(m); /* half of it is none */
        return false;
    }
    m->is_merged = is_merged;
    m->is_adapted = engine_model_beside(m, a, why);
    return m->is_adapted;
}

bool engine_model_adapt(struct engine_model *m, const struct engine_adapter *list, int count, struct engine_error *why)
{
    struct adapters *a;
    uint64_t parameters = m->info.parameters;
    m->is_adapted = false;
    if (!adapters_open(&a, list, count, &m->config.transformer, why))
        return false;
    bool ok = (!m->plan || (engine_model_beside(m, NULL, why) && engine_plan_adapt(m->plan, m, a, why))) && adapt(m, a, why);
    adapters_close(a);
    m->info.parameters = parameters; /* they were counted when the model was opened */
    if (!ok)
        kern_recover(m->kern); /* adapters that were too large say nothing about others */
    return ok;
}

static bool load_first(struct engine_model *m, struct model_parts *p, const struct adapters *a, struct engine_error *why)
{
    m->transformer_files = p->files[TENSOR_NAMES_TRANSFORMER];
    p->files[TENSOR_NAMES_TRANSFORMER] = NULL;
    return adapt(m, a, why);
}

static bool load_text_encoder(struct engine_model *m, struct model_parts *p, struct engine_error *why)
{
    struct weights w = begin(m, p->files[TENSOR_NAMES_TEXT_ENCODER], TENSOR_NAMES_TEXT_ENCODER);
    m->text_files = p->files[TENSOR_NAMES_TEXT_ENCODER];
    p->files[TENSOR_NAMES_TEXT_ENCODER] = NULL;
    w.waiting = m->info.placement == ENGINE_RESIDENT ? 0 : TEXT_ENCODER_LAYERS;
    if (!new_pool(m, &w, why))
        return false;
    m->text_pool = w.pool;
    text_encoder_load(&m->text, &m->config.text, &w);
    return end(m, &w, why);
}

bool engine_model_wait(struct engine_model *m, int blocks, struct engine_error *why)
{
    struct weights text = begin(m, NULL, TENSOR_NAMES_TEXT_ENCODER), transformer = begin(m, NULL, TENSOR_NAMES_TRANSFORMER);
    text.pool = m->text_pool, text.waiting = TEXT_ENCODER_LAYERS;
    transformer.pool = m->transformer_pool, transformer.waiting = blocks;
    m->info.placement = blocks ? ENGINE_STREAMED : ENGINE_PHASES;
    m->info.waiting_blocks = blocks;
    text_encoder_wait(&m->text, &text);
    if (!text.failed && m->transformer_pool) /* else it will be loaded so */
        transformer_wait(&m->transformer, &m->config.transformer, &transformer);
    return (weights_done(&text, why) && weights_done(&transformer, why)) || engine_error_at(why, "moving weights to host memory");
}

/* Of this machine's memory, which the ranks have together. */
static size_t host_memory_of_rank(const struct engine_model *m)
{
    return (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE) / (size_t)kern_ranks(m->kern);
}

static bool say_split(struct engine_model *m, const char *text)
{
    snprintf(m->info.split, sizeof m->info.split, "%s", text);
    return true;
}

/* Passes where all ranks can hold the whole; adapters come and go. */
static bool split_as_fits(struct engine_model *m, const struct engine_options *o, const struct model_parts *parts, struct engine_error *why)
{
    struct kern_space space;
    struct engine_plan *plan = NULL;
    bool has_own = kern_memory(m->kern, &space), is_resident = o->placement == ENGINE_RESIDENT || !has_own, fits = false;
    size_t all = has_own ? space.all : host_memory_of_rank(m), bytes = 0;
    kern_hold_whole(m->kern, true);
    bool ok = engine_plan_open(&plan, m, parts, NULL, why) && engine_plan_fits(plan, is_resident, all, &fits, &bytes, why);
    engine_plan_close(plan);
    if (!ok)
        return false;
    fits = !kern_most(m->kern, !fits);
    kern_hold_whole(m->kern, fits);
    snprintf(m->info.split, sizeof m->info.split, "%s, because all of the model and a picture of 1024x1024 take %.2f GB, and %s has %.2f",
             fits ? "passes" : "weights", (double)bytes / 1e9, fits ? "each rank" : "a rank", (double)all / 1e9);
    return true;
}

/* What a team splits. A picture depends on it, to the bit; so it does not depend on what else happens to be in memory. */
static bool split(struct engine_model *m, const struct engine_options *o, const struct model_parts *parts, struct engine_error *why)
{
    int ranks = kern_ranks(m->kern);
    bool is_distilled = m->config.is_distilled;
    if (o->split == ENGINE_SPLIT_PASSES && (ranks != 2 || is_distilled))
        return engine_error_set(why, ENGINE_BAD_REQUEST,
                                "split passes: a %s model on %d rank%s; accepted: a base model, whose guidance has two passes, on a team of two",
                                is_distilled ? "distilled" : "base", ranks, ranks == 1 ? "" : "s");
    if (ranks == 1)
        return true;
    if (o->split == ENGINE_SPLIT_WEIGHTS)
        return say_split(m, "weights, because it was asked for");
    if (is_distilled)
        return say_split(m, "weights, because a distilled model has one pass");
    if (ranks != 2)
        return say_split(m, "weights, because the team is not of two");
    if (o->split == ENGINE_SPLIT_AUTO)
        return split_as_fits(m, o, parts, why);
    kern_hold_whole(m->kern, true);
    return say_split(m, "passes, because it was asked for");
}

/* Where the weights go, before any is loaded. */
static bool place(struct engine_model *m, const struct engine_options *o, const struct model_parts *parts, const struct adapters *a,
                  struct engine_error *why)
{
    struct kern_space space;
    struct engine_plan_need need;
    m->info.placement = ENGINE_RESIDENT;
    m->may_move = o->placement == ENGINE_PLACEMENT_AUTO;
    if (!kern_memory(m->kern, &space)) {
        if (o->placement <= ENGINE_RESIDENT)
            return true;
        return engine_error_set(why, ENGINE_BAD_REQUEST, "placement %s: %s works in the memory where the weights are; accepted: auto, resident",
                                engine_placement_name(o->placement), kern_name(m->kern));
    }
    if (!engine_plan_open(&m->plan, m, parts, a, why) || !engine_plan_choose(m->plan, m->kern, o, &need, why))
        return false;
    m->info.placement = need.placement;
    m->info.waiting_blocks = need.waiting;
    m->info.passes = need.passes;
    m->info.model_bytes = need.weights;
    m->info.arena_bytes = need.arena;
    m->info.other_bytes = space.all - space.available;
    m->info.device_bytes = space.all;
    kern_reserve(m->kern, need.arena);
    return engine_model_sync(m, why);
}

/* Counts matrices in FP8, and those whose file does not keep their products in full precision. */
static void count_fp8(const struct weight_files *f, int *ret_matrices, int *ret_products)
{
    struct weight_line line;
    for (size_t i = 0; weight_files_list(f, i, &line); i++)
        if (line.is_used && line.kept_bytes && strcmp(line.format, "F8_E4M3") == 0) {
            (*ret_matrices)++;
            *ret_products += line.has_fp8_products;
        }
}

/* Nobody shall take pictures of bf16 for those of FP8. */
static bool check_precision(enum engine_precision precision, const struct model_parts *p, struct engine_error *why)
{
    int matrices = 0, products = 0;
    if (!engine_precision_has_fp8(precision))
        return true;
    count_fp8(p->files[TENSOR_NAMES_TRANSFORMER], &matrices, &products);
    count_fp8(p->files[TENSOR_NAMES_TEXT_ENCODER], &matrices, &products);
    return products > 0 ||
           engine_error_set(why, ENGINE_BAD_MODEL, "precision %s: neither the transformer nor the text encoder has a matrix in FP8 (F8_E4M3)%s; "
                            "accepted: bf16, f32, or files that have", engine_precision_name(precision),
                            matrices ? " that its file does not keep in full precision (full_precision_matrix_mult)" : "");
}

static void describe(struct engine_model *m)
{
    m->info.is_distilled = m->config.is_distilled;
    snprintf(m->info.family, sizeof m->info.family, "%s", model_config_family(&m->config));
    snprintf(m->info.licence, sizeof m->info.licence, "%s", model_config_licence(&m->config));
    m->info.has_fp8_units = kern_has_fp8(m->kern);
    snprintf(m->info.device, sizeof m->info.device, "%s", kern_name(m->kern));
}

bool engine_model_open(struct engine_model *ret, const struct engine_options *o, struct engine_error *why)
{
    double start = engine_model_now_s();
    struct engine_model m = {.precision = o->precision};
    m.dtype = engine_precision_dtype(o->precision);
    struct model_parts parts = {0};
    bool ok = model_parts_open(&parts, o, why) && check_precision(o->precision, &parts, why);
    struct adapters *adapters = NULL;
    m.config = parts.config;
    ok = ok && adapters_open(&adapters, o->adapters, o->adapter_count, &m.config.transformer, why) && open_kern(&m, o, why) &&
         open_tokenizer(&m, parts.tokenizer_dir, why) && split(&m, o, &parts, why) && check_shares(&m, why) &&
         place(&m, o, &parts, adapters, why) && load_vae(&m, &parts, why) && load_first(&m, &parts, adapters, why) &&
         load_text_encoder(&m, &parts, why) && engine_model_sync(&m, why);
    adapters_close(adapters);
    model_parts_close(&parts);
    if (!ok) {
        if (o->member.team && !(m.kern && *kern_error(m.kern))) /* else it knows */
            kern_team_break(o->member.team, o->member.rank, why->text);
        engine_model_close(&m);
        return engine_error_at(why, "open model %s", o->model_dir ? o->model_dir : o->transformer ? o->transformer : "of parts");
    }
    describe(&m);
    m.load_s = engine_model_now_s() - start;
    *ret = m;
    return true;
}

/* --- counting ----------------------------------------------------------------------------------------------- */

/* One rank's share of a model, on a backend that only counts. Whatever comes of it, end_count follows. */
static bool begin_count(struct engine_model *m, struct model_parts *parts, const struct engine_options *o, int ranks, struct engine_error *why)
{
    *m = (struct engine_model){.precision = o->precision, .dtype = engine_precision_dtype(o->precision), .kern = kern_plan_open(0, ranks, false)};
    *parts = (struct model_parts){0};
    if (!m->kern)
        return engine_error_set(why, ENGINE_NO_MEMORY, "no memory for the plan of a model");
    if (!model_parts_open(parts, o, why))
        return false;
    m->config = parts->config;
    return true;
}

static void end_count(struct engine_model *m, struct model_parts *parts)
{
    model_parts_close(parts);
    engine_model_close(m);
}

bool engine_model_fits(const struct engine_options *o, int ranks, size_t memory, bool *ret, size_t *ret_bytes, struct engine_error *why)
{
    struct engine_model m;
    struct model_parts parts;
    struct engine_error uneven;
    bool ok = begin_count(&m, &parts, o, ranks, why);
    *ret = ok && check_shares(&m, &uneven);
    *ret_bytes = 0;
    if (*ret)
        ok = engine_plan_open(&m.plan, &m, &parts, NULL, why) && engine_plan_fits(m.plan, o->placement == ENGINE_RESIDENT, memory, ret, ret_bytes, why);
    end_count(&m, &parts);
    return ok || engine_error_at(why, "model %s", o->model_dir ? o->model_dir : "of parts");
}

bool engine_model_needs(struct engine_needs *ret, const struct engine_options *o, struct engine_error *why)
{
    struct engine_model m;
    struct model_parts parts;
    bool ok = begin_count(&m, &parts, o, 1, why) && engine_plan_open(&m.plan, &m, &parts, NULL, why) &&
              engine_plan_least(m.plan, false, ret->image, why) && engine_plan_least(m.plan, true, ret->edit, why);
    end_count(&m, &parts);
    return ok;
}

/* --- life --------------------------------------------------------------------------------------------------- */

void engine_model_close(struct engine_model *m)
{
    free(m->rope.cos);
    free(m->rope.sin);
    engine_plan_close(m->plan);
    unload_transformer(m);
    weights_pool_free(m->encoder_pool);
    weights_pool_free(m->text_pool);
    weights_pool_free(m->pool);
    weight_files_close(m->vae_files);
    weight_files_close(m->text_files);
    weight_files_close(m->transformer_files);
    context_cache_free(m->contexts);
    tokenizer_close(m->tokenizer);
    if (m->kern)
        kern_close(m->kern);
    *m = (struct engine_model){0};
}

/* Where a model is only counted its vocabulary, which takes longer to read than all else, is not asked: prompts that differ must differ, and
 * a picture takes the same whatever they say. */
static void ids_for_counting(const char *prompt, int32_t ids[ENGINE_TOKENS_MAX])
{
    memset(ids, 0, ENGINE_TOKENS_MAX * sizeof *ids);
    for (int i = 0; i < ENGINE_TOKENS_MAX && prompt[i]; i++)
        ids[i] = (unsigned char)prompt[i];
}

bool engine_model_ids(const struct engine_model *m, const char *prompt, bool truncate, int32_t ids[ENGINE_TOKENS_MAX],
                      int32_t *ret_count, bool *ret_truncated, struct engine_error *why)
{
    int32_t *all;
    size_t count;
    if (!m->tokenizer) {
        ids_for_counting(prompt, ids);
        *ret_count = ENGINE_TOKENS_MAX;
        *ret_truncated = false;
        return true;
    }
    if (!tokenizer_encode_chat(m->tokenizer, prompt, strlen(prompt), &all, &count, why))
        return false;
    if (count > ENGINE_TOKENS_MAX && !truncate) {
        free(all);
        return engine_error_set(why, ENGINE_BAD_REQUEST,
                                "%zu tokens with the chat template, accepted: up to %d; shorten it or ask to truncate", count,
                                ENGINE_TOKENS_MAX);
    }
    *ret_truncated = count > ENGINE_TOKENS_MAX;
    *ret_count = *ret_truncated ? ENGINE_TOKENS_MAX : (int32_t)count;
    memcpy(ids, all, (size_t)*ret_count * sizeof *ids);
    for (int i = *ret_count; i < ENGINE_TOKENS_MAX; i++)
        ids[i] = tokenizer_pad_id(m->tokenizer);
    free(all);
    return true;
}

static bool is_rope_of(const struct engine_rope *r, const struct transformer_grid *grids, int count)
{
    bool same = r->cos && r->count == count;
    for (int i = 0; same && i < count; i++)
        same = r->grids[i].h == grids[i].h && r->grids[i].w == grids[i].w && r->grids[i].t == grids[i].t;
    return same;
}

bool engine_model_rope(struct engine_model *m, const struct transformer_grid *grids, int count, struct engine_error *why)
{
    struct engine_rope *r = &m->rope;
    if (is_rope_of(r, grids, count))
        return true;
    int64_t rows = TRANSFORMER_TEXT_ROWS;
    for (int i = 0; i < count; i++)
        rows += (int64_t)grids[i].h * grids[i].w;
    size_t bytes = (size_t)rows * (size_t)m->config.transformer.attention_head_dim / 2 * sizeof(float);
    free(r->cos);
    free(r->sin);
    *r = (struct engine_rope){.count = count, .rows = rows, .cos = malloc(bytes), .sin = malloc(bytes)};
    if (!r->cos || !r->sin) {
        free(r->cos);
        free(r->sin);
        *r = (struct engine_rope){0};
        return engine_error_set(why, ENGINE_NO_MEMORY, "no memory for rotary tables of %lld rows", (long long)rows);
    }
    memcpy(r->grids, grids, (size_t)count * sizeof *grids);
    if (!kern_is_dry(m->kern))
        transformer_rope(&m->config.transformer, r->cos, r->sin, grids, count);
    return true;
}
