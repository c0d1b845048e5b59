/* engine_plan.c - the model once more, on a backend that only counts (kern_plan.h): loading it gives the bytes of weights, and
 * a rehearsal of a batch, by the code that renders, the bytes of the arena. So no formula has to follow that code. */
#include "engine_plan.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine_batch.h"
#include "kern_plan.h"
#include "layer_stream.h"

#define EXPECTED_SIDE 1024
/* What the driver's allocator may add: it hands out pages. */
#define WITH_MARGIN(bytes) ((bytes) + (bytes) / 50)

struct engine_plan {
    struct engine_model model;  /* its tokenizer is the true model's, or NULL */
    size_t rest, text, once;    /* bytes of weights: none of the others; layers of the text encoder; transformer without its blocks */
    struct kern_layer **blocks; /* all of the transformer's, whether they wait or not */
    int block_count;
    bool is_merged;             /* adapters are in them */
    size_t encoder;             /* and the encoder of the VAE, for references */
    bool has_encoder;           /* without it they will be refused when it is asked for */
    size_t beside;              /* and what adapters have beside the linears: always on the device */
    struct engine_batch batch;
    struct engine_request expected[ENGINE_BATCH_MAX]; /* a batch that must fit; nobody reads the pixels of its references */
    struct engine_reference references[ENGINE_REFERENCES_MAX];
    char prompts[ENGINE_BATCH_MAX][8];
    int expected_count;
};

/* --- the model without memory -------------------------------------------------------------------------------- */

static struct weights begin(struct engine_plan *p, const struct weight_files *files, enum tensor_names_part part)
{
    return (struct weights){.kern = p->model.kern, .pool = p->model.pool, .files = files, .dtype = p->model.dtype,
                            .has_fp8_products = engine_precision_has_fp8(p->model.precision),
                            .part = model_parts_name(part), .waiting = INT_MAX};
}

static size_t layer_bytes(struct kern_layer *const *layers, int count)
{
    size_t bytes = 0;
    for (int i = 0; i < count; i++)
        bytes += kern_layer_bytes(layers[i]);
    return bytes;
}

/* In the place of the one that is there: what adapters are merged into is not quantised. */
static bool load_transformer(struct engine_plan *p, const struct weight_files *files, const struct adapters *a, struct engine_error *why)
{
    struct engine_model *m = &p->model;
    const struct transformer_config *c = &m->config.transformer;
    struct weights w = begin(p, files, TENSOR_NAMES_TRANSFORMER);
    size_t list = (size_t)p->block_count * sizeof *p->blocks;
    transformer_unload(&m->transformer);
    weights_pool_free(m->transformer_pool);
    memset(p->blocks, 0, list);
    p->is_merged = true; /* after a failure the next comes here again */
    size_t before = kern_plan_weights(m->kern);
    w.pool = m->transformer_pool = weights_pool_new(m->kern);
    if (!w.pool)
        return engine_error_set(why, ENGINE_NO_MEMORY, "no memory for the plan's lists");
    w.adapters = a;
    transformer_load(&m->transformer, c, &w);
    if (!weights_done(&w, why))
        return false;
    memcpy(p->blocks, m->transformer.streamed, list);
    p->once = kern_plan_weights(m->kern) - before;
    p->is_merged = adapters_merge_any(a);
    return true;
}

static bool load(struct engine_plan *p, const struct model_parts *parts, const struct adapters *a, struct engine_error *why)
{
    struct engine_model *m = &p->model;
    struct engine_error ignored;
    struct weights vae = begin(p, parts->files[TENSOR_NAMES_VAE], TENSOR_NAMES_VAE), encoder = vae;
    struct weights text = begin(p, parts->files[TENSOR_NAMES_TEXT_ENCODER], TENSOR_NAMES_TEXT_ENCODER);
    vae_load(&m->vae, &m->config.vae, &vae);
    text_encoder_load(&m->text, &m->config.text, &text);
    if (!weights_done(&vae, why) || !weights_done(&text, why))
        return false;
    p->rest = kern_plan_weights(m->kern);
    p->text = layer_bytes(m->text.streamed, TEXT_ENCODER_LAYERS);
    if (!load_transformer(p, parts->files[TENSOR_NAMES_TRANSFORMER], a, why))
        return false;
    size_t before = kern_plan_weights(m->kern);
    encoder.pool = m->encoder_pool;
    vae_load_encoder(&m->encoder, &m->config.vae, &encoder);
    p->has_encoder = weights_done(&encoder, &ignored);
    p->encoder = kern_plan_weights(m->kern) - before;
    return true;
}

/* The adapters of the model without memory are these. */
static bool put_beside(struct engine_plan *p, const struct adapters *a, struct engine_error *why)
{
    size_t before = kern_plan_weights(p->model.kern);
    bool ok = engine_model_beside(&p->model, a, why);
    p->beside = kern_plan_weights(p->model.kern) - before;
    return ok;
}

bool engine_plan_open(struct engine_plan **ret, const struct engine_model *m, const struct model_parts *parts, const struct adapters *a,
                      struct engine_error *why)
{
    struct engine_plan *p = calloc(1, sizeof *p);
    struct kern *k = kern_plan_open(kern_rank(m->kern), kern_ranks(m->kern), kern_has_fp8(m->kern));
    if (!p || !k) {
        free(p);
        kern_close(k);
        return engine_error_set(why, ENGINE_NO_MEMORY, "no memory for the plan of a model");
    }
    kern_hold_whole(k, kern_shares(m->kern) < kern_ranks(m->kern));
    p->model = (struct engine_model){.config = m->config, .precision = m->precision, .dtype = m->dtype, .kern = k,
                                     .tokenizer = m->tokenizer, .pool = weights_pool_new(k), .encoder_pool = weights_pool_new(k)};
    p->model.info.is_distilled = m->config.is_distilled;
    p->block_count = m->config.transformer.num_layers + m->config.transformer.num_single_layers;
    p->blocks = calloc((size_t)p->block_count + 1, sizeof *p->blocks);
    bool ok = (p->model.pool && p->model.encoder_pool && p->blocks) || engine_error_set(why, ENGINE_NO_MEMORY, "no memory for the plan's lists");
    if (ok && load(p, parts, a, why) && put_beside(p, a, why)) {
        *ret = p;
        return true;
    }
    engine_plan_close(p);
    return false;
}

void engine_plan_close(struct engine_plan *p)
{
    if (!p)
        return;
    p->model.tokenizer = NULL;
    engine_model_close(&p->model);
    free(p->blocks);
    free(p);
}

/* --- what a batch needs --------------------------------------------------------------------------------------- */

/* Every step takes the same. */
static bool rehearse(struct engine_plan *p, const struct engine_request *requests, int count, struct engine_error *why)
{
    struct engine_batch *b = &p->batch;
    uint8_t *nowhere[ENGINE_BATCH_MAX] = {0};
    return engine_batch_begin(b, &p->model, requests, count, NULL, why) && engine_batch_prompts(b, why) &&
           engine_batch_noise(b, why) && engine_batch_references(b, why) && engine_batch_step(b, b->first_step, why) &&
           engine_batch_decode(b, nowhere, why);
}

/* What is tried one after the other, from what takes most to what takes least. With one pass a stage in turn is the one before it.
 *
 *   0, 1                resident, passes together and in turn
 *   2, 3                phases, likewise
 *   4 .. 3 + blocks     streamed with 1, 2 .. all blocks waiting, passes together
 *   4 + blocks          streamed with all blocks waiting, passes in turn */
static int stage_of(enum engine_placement placement, int waiting)
{
    return placement == ENGINE_STREAMED ? 3 + waiting : placement == ENGINE_PHASES ? 2 : 0;
}

static int last_stage(const struct engine_plan *p)
{
    return 4 + p->block_count;
}

/* With the same weights on the device. */
static int last_stage_there(const struct engine_plan *p, int stage)
{
    return stage < 4 ? stage | 1 : stage + 1 == last_stage(p) ? stage + 1 : stage;
}

static enum engine_placement placement_in(int stage)
{
    return stage < 2 ? ENGINE_RESIDENT : stage < 4 ? ENGINE_PHASES : ENGINE_STREAMED;
}

static int waiting_in(const struct engine_plan *p, int stage)
{
    int waiting = stage < 4 ? 0 : stage - 3;
    return waiting > p->block_count ? p->block_count : waiting;
}

static bool is_in_turn(const struct engine_plan *p, int stage)
{
    return stage == 1 || stage == 3 || stage == last_stage(p);
}

/* Weights on the device in a stage. */
static size_t weights_in(const struct engine_plan *p, int stage)
{
    size_t bytes = p->rest + p->once + p->beside + (placement_in(stage) == ENGINE_RESIDENT ? p->text : 0);
    int waiting = waiting_in(p, stage);
    for (int i = 0; i < p->block_count; i++)
        bytes += !p->blocks[i] || layer_stream_waits(i, p->block_count, waiting) ? 0 : kern_layer_bytes(p->blocks[i]);
    return bytes;
}

static void set_stage(struct engine_plan *p, int stage)
{
    struct engine_model *m = &p->model;
    int waiting = waiting_in(p, stage);
    m->passes = is_in_turn(p, stage) ? ENGINE_PASSES_IN_TURN : ENGINE_PASSES_TOGETHER;
    m->text.is_streamed = placement_in(stage) != ENGINE_RESIDENT;
    m->transformer.is_streamed = waiting > 0;
    for (int i = 0; i < p->block_count; i++)
        m->transformer.streamed[i] = layer_stream_waits(i, p->block_count, waiting) ? p->blocks[i] : NULL;
}

static bool need(struct engine_plan *p, int stage, const struct engine_request *requests, int count, struct engine_plan_need *ret,
                 struct engine_error *why)
{
    struct kern *k = p->model.kern;
    set_stage(p, stage);
    bool ok = rehearse(p, requests, count, why);
    kern_rewind(k, 0);
    ret->placement = placement_in(stage);
    ret->waiting = waiting_in(p, stage);
    ret->passes = p->model.info.passes;
    ret->arena = kern_plan_arena(k);
    ret->weights = weights_in(p, stage) + (requests[0].reference_count ? p->encoder : 0);
    return ok;
}

static double gb(size_t bytes)
{
    return (double)bytes / 1e9;
}

/* Different prompts, the dearer case. */
static void expect(struct engine_plan *p, const struct engine_options *o)
{
    static const uint8_t nothing;
    int count = o->plan_count ? o->plan_count : 1, width = o->plan_width, height = o->plan_height;
    struct engine_error never; /* the references were checked */
    if (!width && o->plan_reference_count)
        engine_reference_size(o->plan_references[0].width, o->plan_references[0].height, &width, &height, &never);
    for (int i = 0; i < o->plan_reference_count; i++)
        p->references[i] = (struct engine_reference){o->plan_references[i].width, o->plan_references[i].height, &nothing};
    for (int i = 0; i < count; i++) {
        snprintf(p->prompts[i], sizeof p->prompts[i], "%d", i);
        p->expected[i] = (struct engine_request){.prompt = p->prompts[i], .width = width ? width : EXPECTED_SIDE,
                                                 .height = height ? height : EXPECTED_SIDE, .steps = 4,
                                                 .guidance = p->model.info.is_distilled ? 1 : 4,
                                                 .references = p->references,
                                                 .reference_count = p->has_encoder ? o->plan_reference_count : 0};
    }
    p->expected_count = count;
}

/* A sixteenth stays with the driver and whoever draws the screen. */
bool engine_plan_fits(struct engine_plan *p, bool is_resident, size_t all, bool *ret, size_t *ret_bytes, struct engine_error *why)
{
    struct engine_plan_need n;
    expect(p, &(struct engine_options){0});
    if (!need(p, stage_of(is_resident ? ENGINE_RESIDENT : ENGINE_PHASES, 0), p->expected, 1, &n, why))
        return false;
    *ret_bytes = WITH_MARGIN(n.weights + n.arena);
    *ret = *ret_bytes <= all - all / 16;
    return true;
}

/* This rank of a team has room and another has not, which leaves with its own figures: those are told. */
static bool follow(struct kern *k, struct engine_error *why)
{
    kern_most(k, 0);
    return engine_error_set(why, ENGINE_NO_MEMORY, "%s", kern_error(k));
}

/* Whoever asks for a placement by its name gets all of it: with streamed, all blocks wait. */
bool engine_plan_choose(struct engine_plan *p, struct kern *k, const struct engine_options *o, struct engine_plan_need *ret,
                        struct engine_error *why)
{
    char figures[256] = "";
    struct kern_space space;
    bool fits = false;
    int first = stage_of(o->placement, p->block_count), last = last_stage_there(p, first);
    expect(p, o);
    if (!kern_memory(k, &space))
        return engine_error_set(why, ENGINE_DEVICE, "%s", kern_error(k));
    if (o->placement == ENGINE_PLACEMENT_AUTO)
        first = 0, last = last_stage(p);
    for (int stage = first; stage <= last; stage++) {
        size_t used = strlen(figures);
        if (!need(p, stage, p->expected, p->expected_count, ret, why))
            return false;
        fits = WITH_MARGIN(ret->weights + ret->arena) <= space.available;
        if (!kern_most(k, !fits)) /* on all ranks of a team */
            return true;
        if (is_in_turn(p, stage)) /* the least of its placement */
            snprintf(figures + used, sizeof figures - used, "%s%s %.2f GB (%.2f of weights)", used ? ", " : "",
                     engine_placement_name(ret->placement), gb(ret->weights + ret->arena), gb(ret->weights));
    }
    if (fits)
        return follow(k, why);
    return engine_error_set(why, ENGINE_NO_MEMORY,
                            "no memory: the model with a batch of %d at %dx%d does not fit: %s needed; %s has %.2f GB left of %.2f",
                            p->expected_count, p->expected[0].width, p->expected[0].height, figures, kern_name(k), gb(space.available), gb(space.all));
}

/* With passes in turn and all blocks waiting, where these are the placement's to choose. */
bool engine_plan_least(struct engine_plan *p, bool has_reference, size_t ret[ENGINE_STREAMED + 1], struct engine_error *why)
{
    const struct engine_reference reference = {.width = EXPECTED_SIDE, .height = EXPECTED_SIDE};
    struct engine_plan_need n;
    expect(p, &(struct engine_options){.plan_references = &reference, .plan_reference_count = has_reference});
    for (enum engine_placement placement = ENGINE_RESIDENT; placement <= ENGINE_STREAMED; placement++) {
        if (!need(p, last_stage_there(p, stage_of(placement, p->block_count)), p->expected, 1, &n, why))
            return false;
        ret[placement] = has_reference && !p->has_encoder ? 0 : WITH_MARGIN(n.weights + n.arena);
    }
    return true;
}

/* Is there room on the device for the arena and for weights that are coming, with what would be given up for it? */
static bool has_own_room(const struct kern_space *s, const struct engine_plan_need *n, size_t coming, size_t given_up)
{
    return n->arena + coming <= s->available + s->arena + given_up;
}

/* On those of all ranks of a team. */
static bool has_room(struct kern *k, const struct kern_space *s, const struct engine_plan_need *n, size_t coming, size_t given_up)
{
    return !kern_most(k, !has_own_room(s, n, coming, given_up));
}

/* Runs passes in turn or moves weights to host memory, as few as make room, if that may be done; *n and *space follow. */
static bool make_room(struct engine_plan *p, struct engine_model *m, const struct engine_request *requests, int count, size_t coming,
                      struct engine_plan_need *n, struct kern_space *space, struct engine_error *why)
{
    struct engine_plan_need moved = *n;
    int stage = stage_of(m->info.placement, m->info.waiting_blocks), there = last_stage_there(p, stage);
    int last = m->may_move ? last_stage(p) : there;
    while (!has_room(m->kern, space, &moved, coming, n->weights - moved.weights)) {
        if (++stage > last)
            return true; /* no stage has */
        if (!need(p, stage, requests, count, &moved, why))
            return false;
        if (stage <= there)
            *n = moved;
    }
    if (stage <= there)
        return true;
    if (!engine_model_wait(m, moved.waiting, why))
        return false;
    m->info.model_bytes -= n->weights - moved.weights;
    *n = moved;
    return kern_memory(m->kern, space) || engine_model_sync(m, why);
}

/* Room for a batch and for weights that are coming. */
static bool reserve(struct engine_plan *p, struct engine_model *m, const struct engine_request *requests, int count, size_t coming,
                    struct engine_error *why)
{
    char adapters[64] = "";
    struct engine_plan_need n;
    struct kern_space space;
    if (!kern_memory(m->kern, &space))
        return engine_model_sync(m, why); /* says why not */
    if (!need(p, stage_of(m->info.placement, m->info.waiting_blocks), requests, count, &n, why) ||
        !make_room(p, m, requests, count, coming, &n, &space, why))
        return false;
    if (coming)
        snprintf(adapters, sizeof adapters, " and the adapters, which take %.3f", gb(coming));
    if (!has_room(m->kern, &space, &n, coming, 0)) {
        if (has_own_room(&space, &n, coming, 0))
            return follow(m->kern, why);
        return engine_error_set(why, ENGINE_NO_MEMORY,
                                "no memory: a batch of %d at %dx%d needs %.2f GB beside the weights%s; %s has %.2f left for it of %.2f, "
                                "with placement %s", count, requests[0].width, requests[0].height, gb(n.arena), adapters, kern_name(m->kern),
                                gb(space.available + space.arena), gb(space.all), engine_placement_name(m->info.placement));
    }
    m->passes = n.passes;
    m->info.arena_bytes = n.arena > m->info.arena_bytes ? n.arena : m->info.arena_bytes;
    kern_reserve(m->kern, n.arena);
    return engine_model_sync(m, why);
}

bool engine_plan_reserve(struct engine_plan *p, struct engine_model *m, const struct engine_request *requests, int count,
                         struct engine_error *why)
{
    return reserve(p, m, requests, count, 0, why);
}

bool engine_plan_encoder(struct engine_plan *p, struct engine_model *m, struct engine_error *why)
{
    struct engine_plan_need n;
    struct kern_space space;
    if (!kern_memory(m->kern, &space))
        return engine_model_sync(m, why);
    return need(p, stage_of(m->info.placement, m->info.waiting_blocks), p->expected, p->expected_count, &n, why) &&
           make_room(p, m, p->expected, p->expected_count, p->encoder, &n, &space, why);
}

bool engine_plan_adapt(struct engine_plan *p, struct engine_model *m, const struct adapters *a, struct engine_error *why)
{
    int stage = stage_of(m->info.placement, m->info.waiting_blocks);
    size_t kept = weights_in(p, stage) - p->beside; /* the others are gone */
    m->info.model_bytes -= p->beside;
    bool ok = ((!p->is_merged && !adapters_merge_any(a)) || load_transformer(p, m->transformer_files, a, why)) && put_beside(p, a, why);
    if (!ok)
        return false;
    size_t now = weights_in(p, stage);
    m->info.model_bytes += now - kept;
    return reserve(p, m, p->expected, p->expected_count, now > kept ? now - kept : 0, why);
}
