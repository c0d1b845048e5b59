/* engine_batch.c - one batch: prompts to contexts, seeds to noise, references to tokens, steps, latents to pixels.
 *
 * The dump (engine_watch.dump) shows tensors under the names and in the layouts of tests/golden/README.md. While
 * someone dumps, prompts are encoded anew even if their context is known. */
#include "engine_batch.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "noise.h"

enum {
    ENCODE_GROUP = 4,         /* prompts encoded in one pass: a pass over one prompt already fills the machine */
    ENCODE_GROUP_STREAMED = 16, /* when its layers must come to the device for each pass */
    ROWS_PER_PASS = 8192,     /* transformer rows in one call, more only if one image has more */
    ROWS_PER_PASS_STREAMED = 16384,
    DECODE_PIXELS = 1 << 20,  /* picture pixels decoded in one pass, likewise */
    CHANNELS = 128,           /* of a latent token */
};

static bool is_dumping(const struct engine_batch *b)
{
    return b->watch && b->watch->dump;
}

static int group_size(int64_t limit, int64_t each)
{
    return (int)(limit / each > 1 ? limit / each : 1);
}

static int smaller(int a, int b)
{
    return a < b ? a : b;
}

/* --- dump ------------------------------------------------------------------------------------------- */

/* Shows x, or x with its axes in the order given by `axes` (channels last to channels first), from host memory. */
static void dump(struct engine_batch *b, const char *name, struct tensor x, const int *axes)
{
    struct tensor host = tensor_of(NULL, x.dtype, x.rank, x.shape);
    struct kern *k = b->model->kern;
    if (!is_dumping(b))
        return;
    char *plain = malloc(tensor_bytes(host)), *turned = malloc(tensor_bytes(host));
    if (plain && turned) {
        host.data = plain;
        kern_read(k, host, x);
        if (axes) {
            /* out[i0,i1,i2,i3] = in[..]: a permutation of the three axes behind the batch */
            int64_t n[4] = {x.shape[0], x.shape[axes[1]], x.shape[axes[2]], x.shape[axes[3]]};
            size_t bytes = tensor_dtype_bytes(x.dtype), at = 0;
            for (int64_t i0 = 0; i0 < n[0]; i0++)
                for (int64_t i1 = 0; i1 < n[1]; i1++)
                    for (int64_t i2 = 0; i2 < n[2]; i2++)
                        for (int64_t i3 = 0; i3 < n[3]; i3++, at++) {
                            int64_t from = i0 * host.stride[0] + i1 * host.stride[axes[1]] + i2 * host.stride[axes[2]] +
                                           i3 * host.stride[axes[3]];
                            memcpy(turned + at * bytes, plain + (size_t)from * bytes, bytes);
                        }
            host = tensor_of(turned, x.dtype, 4, n);
        }
        b->watch->dump(b->watch->context, name, host);
    }
    free(plain);
    free(turned);
}

static const int channels_first[4] = {0, 3, 1, 2};

static void dump_step(struct engine_batch *b, const char *name, int step, struct tensor x)
{
    char full[64];
    snprintf(full, sizeof full, "%s.%d", name, step);
    dump(b, full, x, NULL);
}

/* --- begin ------------------------------------------------------------------------------------------ */

static bool check_one_shape(const struct engine_request *r, int count, struct engine_error *why)
{
    for (int i = 1; i < count; i++) {
        if (r[i].width != r[0].width || r[i].height != r[0].height || r[i].steps != r[0].steps ||
            (r[i].guidance != r[0].guidance && !(isnan(r[i].guidance) && isnan(r[0].guidance))))
            return engine_error_set(why, ENGINE_BAD_REQUEST,
                                    "image %d of %d: %dx%d, %d steps, guidance %g, but the batch began with %dx%d, %d steps, "
                                    "guidance %g; a batch has one shape",
                                    i + 1, count, r[i].width, r[i].height, r[i].steps, (double)r[i].guidance, r[0].width,
                                    r[0].height, r[0].steps, (double)r[0].guidance);
        if (!engine_edit_same(&r[i], &r[0]))
            return engine_error_set(why, ENGINE_BAD_REQUEST,
                                    "image %d of %d: %d reference images, but the batch began with %d, or their sizes once they are "
                                    "cut, mask or strength differ; a batch has one shape",
                                    i + 1, count, r[i].reference_count, r[0].reference_count);
    }
    return true;
}

static void dump_schedule(struct engine_batch *b)
{
    struct schedule *s = &b->schedule;
    if (!is_dumping(b))
        return;
    b->watch->dump(b->watch->context, "sigmas", tensor_1d(s->sigma, TENSOR_F32, s->steps + 1));
    b->watch->dump(b->watch->context, "timesteps", tensor_1d(s->timestep, TENSOR_F32, s->steps));
}

static int64_t rows_of_image(const struct engine_batch *b)
{
    return TRANSFORMER_TEXT_ROWS + b->tokens + b->edit.rows;
}

static bool splits_passes(const struct engine_batch *b)
{
    return b->own_passes < b->passes;
}

static bool has_shares(const struct engine_batch *b)
{
    return kern_shares(b->model->kern) > 1;
}

/* The one place where it is decided how passes are run. Of two ranks that hold all weights each computes one; all else, prompts, noise,
 * guidance, is done by both. Else, on a device, the batch's plan has said what fits. In the host's memory nothing is planned: more rows
 * than a call should have would only take more memory, as products of half of them are already as fast. */
static void plan_passes(struct engine_batch *b)
{
    struct engine_model *m = b->model;
    bool has_two = !m->info.is_distilled && b->requests[0].guidance > 1, is_large = 2 * rows_of_image(b) > ROWS_PER_PASS;
    bool is_split = has_two && kern_ranks(m->kern) == 2 && !has_shares(b);
    enum engine_passes planned = m->passes ? m->passes : is_large ? ENGINE_PASSES_IN_TURN : ENGINE_PASSES_TOGETHER;
    m->info.passes = !has_two ? ENGINE_PASSES_ONE : is_split ? ENGINE_PASSES_SPLIT : planned;
    b->passes = has_two ? 2 : 1;
    b->own_passes = is_split ? 1 : b->passes;
    b->first_pass = is_split ? kern_rank(m->kern) : 0;
    b->passes_at_once = m->info.passes == ENGINE_PASSES_TOGETHER ? 2 : 1;
}

bool engine_batch_begin(struct engine_batch *b, struct engine_model *m, const struct engine_request *requests, int count,
                        const struct engine_watch *watch, struct engine_error *why)
{
    if (!check_one_shape(requests, count, why))
        return false;
    b->model = m;
    b->watch = watch;
    b->requests = requests;
    b->count = count;
    b->grid_h = requests[0].height / ENGINE_SIDE_MULTIPLE;
    b->grid_w = requests[0].width / ENGINE_SIDE_MULTIPLE;
    b->tokens = (int64_t)b->grid_h * b->grid_w;
    b->timing = (struct engine_timing){.load_s = m->load_s};
    b->prompt_count = 0;
    b->drawn = 0;
    engine_edit_plan(&b->edit, requests, count);
    plan_passes(b);
    b->has_kv = b->edit.count && engine_model_has_kv(m);
    b->first_step = engine_edit_first_step(&requests[0]);
    scheduler_plan(&b->schedule, requests[0].steps, (int)b->tokens);
    dump_schedule(b);
    return true;
}

/* --- prompts ------------------------------------------------------------------------------------------ */

/* Index of these ids among the batch's prompts; while dumping every prompt stands for itself. */
static int find_prompt(struct engine_batch *b, const int32_t *ids)
{
    for (int i = 0; i < b->prompt_count && !is_dumping(b); i++)
        if (memcmp(b->ids[i], ids, sizeof b->ids[i]) == 0)
            return i;
    return -1;
}

static bool tokenise(struct engine_batch *b, int pass, int image, struct engine_error *why)
{
    const struct engine_request *r = &b->requests[image];
    const char *text = pass == 0 ? r->prompt : r->negative ? r->negative : "";
    int slot = b->prompt_count;
    bool is_truncated;
    if (!engine_model_ids(b->model, text, r->truncate, b->ids[slot], &b->token_count[slot], &is_truncated, why))
        return engine_error_at(why, pass == 0 ? "prompt" : "negative prompt");
    b->is_truncated[image] = is_truncated || (pass > 0 && b->is_truncated[image]);
    int known = find_prompt(b, b->ids[slot]);
    b->prompt_of[pass][image] = known >= 0 ? known : slot;
    if (known < 0)
        b->prompt_count++;
    return true;
}

static struct tensor context_of(struct engine_batch *b, int pass, int image)
{
    return tensor_rows(tensor_slice(b->contexts, 0, pass * b->count + image, 1));
}

/* The context of the first picture that has this prompt. */
static struct tensor context_of_prompt(struct engine_batch *b, int prompt)
{
    int at = 0;
    while (b->prompt_of[at / b->count][at % b->count] != prompt)
        at++;
    return context_of(b, at / b->count, at % b->count);
}

/* To the other pictures of each prompt. */
static void share_contexts(struct engine_batch *b)
{
    for (int pass = 0; pass < b->passes; pass++)
        for (int image = 0; image < b->count; image++) {
            struct tensor known = context_of_prompt(b, b->prompt_of[pass][image]), own = context_of(b, pass, image);
            if (own.data != known.data)
                kern_copy(b->model->kern, own, known);
        }
}

/* Encodes prompts todo[0 .. count) in one pass and keeps their contexts. */
static void encode(struct engine_batch *b, const int *todo, int count, struct tensor keep)
{
    struct engine_model *m = b->model;
    struct kern *k = m->kern;
    int64_t width = text_encoder_width(&m->config.text);
    int32_t ids[ENCODE_GROUP_STREAMED * ENGINE_TOKENS_MAX], token_count[ENCODE_GROUP_STREAMED];
    size_t mark = kern_mark(k);
    for (int i = 0; i < count; i++) {
        memcpy(ids + i * ENGINE_TOKENS_MAX, b->ids[todo[i]], sizeof b->ids[0]);
        token_count[i] = b->token_count[todo[i]];
    }
    int64_t rows = (int64_t)count * ENGINE_TOKENS_MAX;
    struct tensor embeds = kern_temp(k, m->dtype, 3, (int64_t[]){count, ENGINE_TOKENS_MAX, width});
    text_encoder_run(k, &m->config.text, &m->text, embeds, tensor_1d(ids, TENSOR_I32, rows), token_count);
    for (int i = 0; i < count; i++) {
        struct tensor one = tensor_rows(tensor_slice(embeds, 0, i, 1)), context = context_of_prompt(b, todo[i]);
        transformer_context(k, &m->transformer, context, one);
        struct tensor known = context_cache_add(m->contexts, b->ids[todo[i]]);
        if (known.data)
            kern_read(k, known, context);
        if (keep.data)
            kern_copy(k, tensor_rows(tensor_slice(keep, 0, todo[i], 1)), one);
    }
    kern_rewind(k, mark);
}

static void dump_prompts(struct engine_batch *b, struct tensor embeds)
{
    static const char *const ids_name[] = {"input_ids", "negative_input_ids"};
    static const char *const embeds_name[] = {"prompt_embeds", "negative_prompt_embeds"};
    for (int pass = 0; pass < b->passes; pass++) { /* tokenised pass after pass */
        b->watch->dump(b->watch->context, ids_name[pass],
                       tensor_2d(b->ids[pass * b->count], TENSOR_I32, b->count, ENGINE_TOKENS_MAX));
        dump(b, embeds_name[pass], tensor_slice(embeds, 0, pass * b->count, b->count), NULL);
    }
}

bool engine_batch_prompts(struct engine_batch *b, struct engine_error *why)
{
    struct engine_model *m = b->model;
    struct kern *k = m->kern;
    for (int pass = 0; pass < b->passes; pass++)
        for (int image = 0; image < b->count; image++)
            if (!tokenise(b, pass, image, why))
                return b->count == 1 ? false : engine_error_at(why, "image %d of %d", image + 1, b->count);

    double start = engine_model_now_s();
    int todo[ENGINE_BATCH_PROMPTS_MAX], todo_count = 0;
    b->contexts = kern_temp(k, m->dtype, 3, (int64_t[]){b->passes * b->count, TRANSFORMER_TEXT_ROWS, m->config.transformer.hidden});
    for (int i = 0; i < b->prompt_count; i++) {
        struct tensor known;
        bool is_new = is_dumping(b) || !context_cache_find(m->contexts, b->ids[i], &known);
        if (kern_most(k, is_new)) /* forgotten by one rank of a team, encoded by all */
            todo[todo_count++] = i;
        else
            kern_write(k, context_of_prompt(b, i), known);
    }
    size_t mark = kern_mark(k);
    struct tensor keep = {0};
    if (is_dumping(b))
        keep = kern_temp(k, m->dtype, 3, (int64_t[]){b->prompt_count, ENGINE_TOKENS_MAX, text_encoder_width(&m->config.text)});
    int group = m->text.is_streamed ? ENCODE_GROUP_STREAMED : ENCODE_GROUP;
    for (int i = 0; i < todo_count; i += group)
        encode(b, todo + i, smaller(group, todo_count - i), keep);
    share_contexts(b);
    if (!engine_model_sync(m, why)) {
        engine_model_forget(m); /* among them are contexts that were never computed */
        return false;
    }
    if (is_dumping(b))
        dump_prompts(b, keep);
    kern_rewind(k, mark);
    b->timing.encode_s = todo_count ? engine_model_now_s() - start : 0;
    return true;
}

/* --- noise and tables ------------------------------------------------------------------------------- */

/* The reference draws [128, h/16, w/16]; a token is a column of that. */
static bool draw(struct engine_batch *b, int image, struct engine_error *why)
{
    const struct engine_request *r = &b->requests[image];
    int64_t channels = b->latents.shape[2], tokens = b->tokens;
    size_t count = (size_t)(channels * tokens);
    float *drawn = malloc(count * sizeof *drawn), *packed = malloc(count * sizeof *packed);
    if (!drawn || !packed) {
        free(drawn);
        free(packed);
        return engine_error_set(why, ENGINE_NO_MEMORY, "no memory for the noise of %lld tokens", (long long)tokens);
    }
    bool is_dry = kern_is_dry(b->model->kern);
    if (r->noise)
        memcpy(drawn, r->noise->data, count * sizeof *drawn);
    else if (!is_dry)
        noise_fill(drawn, count, r->seed);
    for (int64_t t = 0; t < tokens && !is_dry; t++)
        for (int64_t c = 0; c < channels; c++)
            packed[t * channels + c] = drawn[c * tokens + t];
    kern_write(b->model->kern, tensor_slice(b->latents, 0, image, 1), tensor_3d(packed, TENSOR_F32, 1, tokens, channels));
    free(drawn);
    free(packed);
    return true;
}

/* The noise of the images before `end` that have none yet. */
static bool draw_until(struct engine_batch *b, int end, struct engine_error *why)
{
    for (; b->drawn < smaller(end, b->count); b->drawn++)
        if (!draw(b, b->drawn, why))
            return false;
    return true;
}

/* Images in one step. As many with passes in turn, which then take half the memory. */
static int step_size(const struct engine_batch *b)
{
    int64_t rows = b->model->transformer.is_streamed ? ROWS_PER_PASS_STREAMED : ROWS_PER_PASS;
    return is_dumping(b) ? b->count : group_size(rows, b->own_passes * rows_of_image(b));
}

static void plan_times(struct engine_batch *b)
{
    struct engine_model *m = b->model;
    float time[ENGINE_STEPS_MAX + 1];
    for (int i = 0; i < b->schedule.steps; i++)
        time[i] = scheduler_model_time(&b->schedule, i, m->precision);
    time[b->schedule.steps] = 0;
    transformer_times(m->kern, &m->config.transformer, &m->transformer, m->dtype, &b->times, time,
                      b->schedule.steps + (b->has_kv ? 1 : 0));
    b->now = transformer_times_temp(m->kern, &m->config.transformer, m->dtype);
}

/* For kern_exchange_ranks. */
static void plan_minus_zero(struct engine_batch *b)
{
    float minus_zero[CHANNELS];
    int64_t channels = b->latents.shape[2];
    assert(channels == CHANNELS);
    for (int i = 0; i < CHANNELS; i++)
        minus_zero[i] = -0.0f;
    b->minus_zero = kern_temp(b->model->kern, b->model->dtype, 1, &channels);
    kern_write(b->model->kern, b->minus_zero, tensor_1d(minus_zero, TENSOR_F32, channels));
}

/* The tables of keys: references stand behind the picture, or as keys and values between text and picture. */
static bool plan_rope(struct engine_batch *b, struct engine_error *why)
{
    struct engine_model *m = b->model;
    int64_t half = m->config.transformer.attention_head_dim / 2;
    struct transformer_grid grids[ENGINE_REFERENCES_MAX + 1];
    int at = b->has_kv ? 0 : 1;
    memcpy(grids + at, b->edit.grids, (size_t)b->edit.count * sizeof *grids);
    grids[b->has_kv ? b->edit.count : 0] = (struct transformer_grid){b->grid_h, b->grid_w, 0};
    if (!engine_model_rope(m, grids, b->edit.count + 1, why))
        return false;
    b->cos = kern_temp(m->kern, TENSOR_F32, 2, (int64_t[]){m->rope.rows, half});
    b->sin = kern_temp(m->kern, TENSOR_F32, 2, (int64_t[]){m->rope.rows, half});
    kern_write(m->kern, b->cos, tensor_2d(m->rope.cos, TENSOR_F32, m->rope.rows, half));
    kern_write(m->kern, b->sin, tensor_2d(m->rope.sin, TENSOR_F32, m->rope.rows, half));
    return true;
}

bool engine_batch_noise(struct engine_batch *b, struct engine_error *why)
{
    struct engine_model *m = b->model;
    struct kern *k = m->kern;
    int64_t channels = m->config.transformer.in_channels;
    if (!plan_rope(b, why))
        return false;
    b->latents = kern_temp(k, m->dtype, 3, (int64_t[]){b->count, b->tokens, channels});
    if (!draw_until(b, b->edit.has_mask ? b->count : step_size(b), why)) /* masks are begun with all of it */
        return false;
    plan_times(b);
    if (splits_passes(b))
        plan_minus_zero(b);
    if (!engine_model_sync(m, why))
        return false;
    dump(b, "noise", tensor_shape(b->latents, 4, (int64_t[]){b->count, b->grid_h, b->grid_w, channels}), channels_first);
    return true;
}

/* --- references ---------------------------------------------------------------------------------------- */

static void dump_latent(void *context, int reference, struct tensor latent)
{
    char name[32];
    snprintf(name, sizeof name, "ref_latent.%d", reference);
    dump(context, name, latent, channels_first);
}

/* What a KV model keeps of the first block of each kind. */
static void dump_kv(struct engine_batch *b)
{
    const struct transformer_kv *kv = &b->edit.kv[0];
    int64_t single = b->model->config.transformer.num_layers;
    dump(b, "kv.double.0.k", tensor_slice(kv->k, 0, 0, 1), NULL);
    dump(b, "kv.double.0.v", tensor_slice(kv->v, 0, 0, 1), NULL);
    dump(b, "kv.single.0.k", tensor_slice(kv->k, 0, single, 1), NULL);
    dump(b, "kv.single.0.v", tensor_slice(kv->v, 0, single, 1), NULL);
}

bool engine_batch_references(struct engine_batch *b, struct engine_error *why)
{
    struct engine_edit *e = &b->edit;
    double start = engine_model_now_s();
    if (!e->count)
        return true;
    if (!engine_edit_encode(e, b->model, b->requests, is_dumping(b) ? dump_latent : NULL, b, why))
        return false;
    dump(b, "ref_tokens", tensor_shape(e->tokens[0], 3, (int64_t[]){1, e->rows, e->tokens[0].shape[1]}), NULL);
    if (b->has_kv)
        engine_edit_keep(e, b->model, tensor_slice(b->cos, 0, TRANSFORMER_TEXT_ROWS, e->rows),
                         tensor_slice(b->sin, 0, TRANSFORMER_TEXT_ROWS, e->rows), transformer_times_at(&b->times, b->schedule.steps));
    if (!engine_model_sync(b->model, why))
        return engine_error_at(why, "references");
    if (b->has_kv)
        dump_kv(b);
    if (e->has_mask && !engine_edit_mask(e, b->model, b->requests, b->latents, &b->schedule, b->first_step, why))
        return engine_error_at(why, "mask");
    if (e->has_mask)
        dump(b, "latents.start", b->latents, NULL);
    b->timing.encode_s += engine_model_now_s() - start;
    return true;
}

/* --- steps -------------------------------------------------------------------------------------------- */

struct group {
    struct engine_batch *b;
    int first, count;          /* images */
    struct tensor velocities;  /* [passes * count, N, 128], pass after pass */
    struct tensor checksums;   /* [2 * passes * count * S], pass after pass; or data NULL */
};

/* What belongs to passes first .. first + passes_at_once of a list of as much for each pass. */
static struct tensor of_passes(const struct engine_batch *b, struct tensor all, int first)
{
    int64_t each = all.shape[0] / b->passes;
    return all.data ? tensor_slice(all, 0, first * each, b->passes_at_once * each) : all;
}

/* Passes first .. first + passes_at_once over the same latents, in one call. */
static void run_passes(struct group *g, int first)
{
    struct engine_batch *b = g->b;
    struct engine_model *m = b->model;
    struct kern *k = m->kern;
    struct tensor latents = tensor_slice(b->latents, 0, g->first, g->count), model_latents = latents;
    struct tensor contexts[ENGINE_BATCH_PROMPTS_MAX], references[ENGINE_BATCH_PROMPTS_MAX];
    const struct transformer_kv *kv[ENGINE_BATCH_PROMPTS_MAX];
    struct tensor velocities = of_passes(b, g->velocities, first);
    size_t mark = kern_mark(k);
    if (b->passes_at_once > 1)
        model_latents = kern_temp(k, m->dtype, 3, velocities.shape);
    for (int pass = 0; pass < b->passes_at_once; pass++) {
        if (b->passes_at_once > 1)
            kern_copy(k, tensor_slice(model_latents, 0, pass * g->count, g->count), latents);
        for (int i = 0; i < g->count; i++) {
            int list = b->edit.list_of[g->first + i], at = pass * g->count + i;
            contexts[at] = context_of(b, first + pass, g->first + i);
            references[at] = b->edit.tokens[list];
            kv[at] = &b->edit.kv[list];
        }
    }
    struct transformer_input in = {.latents = model_latents, .context = contexts, .cos = b->cos, .sin = b->sin,
                                   .references = b->edit.count && !b->has_kv ? references : NULL, .kv = b->has_kv ? kv : NULL,
                                   .times = b->now, .checksums = of_passes(b, g->checksums, first)};
    transformer_run(k, &m->config.transformer, &m->transformer, velocities, &in);
    kern_rewind(k, mark);
}

/* Every pass of this rank: the same at every step, but for the values in b->now. */
static void predict(void *context)
{
    struct group *g = context;
    const struct engine_batch *b = g->b;
    for (int pass = 0; pass < b->own_passes; pass += b->passes_at_once)
        run_passes(g, b->first_pass + pass);
}

/* From the velocities of this rank's passes: latents at the next sigma. */
static void advance(const struct group *g, struct tensor latents, int step)
{
    struct engine_batch *b = g->b;
    struct kern *k = b->model->kern;
    struct tensor guided = g->velocities;
    if (splits_passes(b))
        kern_exchange_ranks(k, g->velocities, b->minus_zero);
    if (b->passes > 1) {
        guided = kern_temp(k, latents.dtype, 3, latents.shape);
        kern_guide(k, guided, tensor_slice(g->velocities, 0, 0, g->count), tensor_slice(g->velocities, 0, g->count, g->count),
                   b->requests[0].guidance);
    }
    kern_euler(k, latents, guided, b->schedule.sigma[step + 1] - b->schedule.sigma[step]);
    if (b->edit.has_mask)
        engine_edit_blend(&b->edit, b->model, latents, g->first, step);
}

/* Of what must be the same on all ranks. Where they have shares that is all rows of the transformer, those of the text, too: what went
 * wrong in any of them spreads to the others through attention, and then it is the same on all. Else it is the latents. */
static struct tensor checksums_of(struct engine_batch *b, int count)
{
    int64_t rows = TRANSFORMER_TEXT_ROWS + b->tokens + (b->has_kv ? 0 : b->edit.rows);
    return engine_model_checksums(b->model, has_shares(b) ? 2 * b->passes * count * rows : count * b->tokens);
}

/* One step of images [first, first + count). */
static void step_group(struct engine_batch *b, int step, int first, int count)
{
    static const char *const names[] = {"velocity", "velocity_uncond"};
    struct engine_model *m = b->model;
    struct kern *k = m->kern;
    struct tensor latents = tensor_slice(b->latents, 0, first, count);
    size_t mark = kern_mark(k);
    struct tensor checksums = checksums_of(b, count);
    struct group g = {b, first, count, kern_temp(k, m->dtype, 3, (int64_t[]){b->passes * count, b->tokens, latents.shape[2]}),
                      has_shares(b) ? checksums : (struct tensor){0}};
    kern_graph(k, predict, &g);
    advance(&g, latents, step);
    if (checksums.data && !has_shares(b))
        kern_checksum(k, checksums, tensor_rows(latents));
    engine_model_compare(m, checksums); /* behind all else, so that the device does not run dry meanwhile */
    for (int pass = 0; pass < b->passes; pass++)
        dump_step(b, names[pass], step - b->first_step, tensor_slice(g.velocities, 0, pass * count, count));
    kern_rewind(k, mark);
}

/* Some rank's caller says so: that of the first. */
static bool is_cancelled(const struct engine_batch *b)
{
    return kern_most(b->model->kern, b->watch && b->watch->cancelled && b->watch->cancelled(b->watch->context));
}

bool engine_batch_step(struct engine_batch *b, int step, struct engine_error *why)
{
    int group = step_size(b);
    int made = step - b->first_step, steps = b->schedule.steps - b->first_step;
    double start = engine_model_now_s();
    if (is_cancelled(b))
        return engine_error_set(why, ENGINE_CANCELLED, "cancelled before step %d of %d", made + 1, steps);
    kern_copy(b->model->kern, b->now.all, transformer_times_at(&b->times, step).all);
    for (int first = 0; first < b->count; first += group) {
        step_group(b, step, first, smaller(group, b->count - first));
        if (!draw_until(b, first + 2 * group, why)) /* on the host, while a device computes */
            return false;
    }
    if (!engine_model_sync(b->model, why))
        return engine_error_at(why, "step %d of %d", made + 1, steps);
    dump_step(b, "latents", made, b->latents);
    b->timing.denoise_s += engine_model_now_s() - start;
    if (b->watch && b->watch->step)
        b->watch->step(b->watch->context, made + 1, steps);
    return true;
}

/* --- picture ------------------------------------------------------------------------------------------ */

static bool check_picture(struct engine_batch *b, int image, struct tensor picture, struct engine_error *why)
{
    if (!kern_has_nan(b->model->kern, picture))
        return true;
    return engine_error_set(why, ENGINE_BAD_RESULT, "image %d of %d (seed %llu): NaN or infinity in the picture", image + 1,
                            b->count, (unsigned long long)b->requests[image].seed);
}

struct decoding {
    struct engine_model *model;
    struct tensor tokens, latents; /* [count, N, 128], [count, 2 * grid_h, 2 * grid_w, channels] */
    struct tensor image, pixels;   /* [count, h, w, 3] */
};

/* The same for every batch of a shape. */
static void decode(void *context)
{
    const struct decoding *d = context;
    struct engine_model *m = d->model;
    vae_latents(m->kern, &m->vae, d->latents, d->tokens);
    vae_decode(m->kern, &m->config.vae, &m->vae, d->image, d->latents);
    kern_pixels(m->kern, d->pixels, d->image);
}

static bool decode_group(struct engine_batch *b, int first, int count, uint8_t *const *rgb, struct engine_error *why)
{
    struct engine_model *m = b->model;
    struct kern *k = m->kern;
    int64_t height = b->requests[0].height, width = b->requests[0].width;
    int64_t latent[4] = {count, 2 * b->grid_h, 2 * b->grid_w, m->config.vae.latent_channels};
    int64_t picture[4] = {count, height, width, 3};
    struct decoding d = {m, tensor_slice(b->latents, 0, first, count), kern_temp(k, m->dtype, 4, latent),
                         kern_temp(k, m->dtype, 4, picture), kern_temp(k, TENSOR_U8, 4, picture)};
    kern_graph(k, decode, &d);
    if (!engine_model_sync(m, why))
        return engine_error_at(why, "decode");
    dump(b, "vae_latents", d.latents, channels_first);
    dump(b, "image", d.image, channels_first);
    for (int i = 0; i < count; i++) {
        if (!check_picture(b, first + i, tensor_slice(d.image, 0, i, 1), why))
            return false;
        kern_read(k, tensor_4d(rgb[first + i], TENSOR_U8, 1, height, width, 3), tensor_slice(d.pixels, 0, i, 1));
    }
    return true;
}

bool engine_batch_decode(struct engine_batch *b, uint8_t *const *rgb, struct engine_error *why)
{
    struct kern *k = b->model->kern;
    double start = engine_model_now_s();
    if (kern_rank(b->model->kern) > 0)
        return true; /* the first rank's picture is the team's */
    int64_t pixels = (int64_t)b->requests[0].width * b->requests[0].height;
    int group = is_dumping(b) ? b->count : group_size(DECODE_PIXELS, pixels);
    for (int first = 0; first < b->count; first += group) {
        size_t mark = kern_mark(k);
        if (!decode_group(b, first, smaller(group, b->count - first), rgb, why))
            return false;
        kern_rewind(k, mark);
    }
    b->timing.decode_s = engine_model_now_s() - start;
    b->timing.peak_bytes = kern_peak_bytes(k);
    b->timing.remembered_bytes = context_cache_bytes(b->model->contexts);
    return true;
}
