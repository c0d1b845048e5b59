/* engine.c - open, check, generate, close: the steps in order, nothing else. */
#include "engine.h"

#include <math.h>
#include <stdlib.h>

#include "engine_batch.h"
#include "engine_edit.h"
#include "engine_model.h"
#include "engine_plan.h"

struct engine {
    struct engine_model model;
    struct engine_batch batch; /* of the call that runs; kept here so that no call allocates it */
};

static bool check_size(const struct engine_request *r, struct engine_error *why)
{
    const char *wrong = NULL;
    if (r->width < ENGINE_SIDE_MIN || r->height < ENGINE_SIDE_MIN)
        wrong = "a side is below 64";
    else if (r->width % ENGINE_SIDE_MULTIPLE || r->height % ENGINE_SIDE_MULTIPLE)
        wrong = "a side is not a multiple of 16";
    else if ((int64_t)r->width * r->height > ENGINE_PIXELS_MAX)
        wrong = "more than 4194304 pixels";
    if (!wrong)
        return true;
    return engine_error_set(why, ENGINE_BAD_REQUEST,
                            "size %dx%d: %s; accepted: multiples of %d, at least %d, at most %d pixels in all", r->width,
                            r->height, wrong, ENGINE_SIDE_MULTIPLE, ENGINE_SIDE_MIN, ENGINE_PIXELS_MAX);
}

/* The batch that a model is opened for. */
static bool check_planned(const struct engine_options *o, struct engine_error *why)
{
    struct engine_request r = {.width = o->plan_width, .height = o->plan_height, .references = o->plan_references,
                               .reference_count = o->plan_reference_count};
    return engine_edit_check(&r, why) && ((!r.width && !r.height) || check_size(&r, why));
}

bool engine_open(struct engine **ret, const struct engine_options *options, struct engine_error *why)
{
    if (!check_planned(options, why))
        return false;
    struct engine *e = calloc(1, sizeof *e);
    if (!e)
        return engine_error_set(why, ENGINE_NO_MEMORY, "no memory for an engine");
    if (!engine_model_open(&e->model, options, why)) {
        free(e);
        return false;
    }
    *ret = e;
    return true;
}

bool engine_fits(const struct engine_options *options, int ranks, size_t memory, bool *ret, size_t *ret_bytes, struct engine_error *why)
{
    return engine_model_fits(options, ranks, memory, ret, ret_bytes, why);
}

void engine_close(struct engine *e)
{
    if (!e)
        return;
    engine_model_close(&e->model);
    free(e);
}

/* All ranks of a team end so by themselves: nobody waits for this one. */
static bool is_of_all_ranks(enum engine_fault fault)
{
    return fault == ENGINE_BAD_REQUEST || fault == ENGINE_CANCELLED;
}

/* Behind a piece of work that failed. What was too large says nothing about the next. */
static void give_up(struct engine *e, const struct engine_error *why)
{
    if (!is_of_all_ranks(why->fault))
        kern_leave(e->model.kern, why->text);
    kern_recover(e->model.kern);
}

/* All ranks of a team are here, whole. */
static bool join(struct engine *e, struct engine_error *why)
{
    kern_join(e->model.kern);
    return engine_model_sync(&e->model, why);
}

/* All ranks of a team have come as far. */
static bool have_all(struct engine *e, struct engine_error *why)
{
    kern_most(e->model.kern, 0);
    return engine_model_sync(&e->model, why);
}

bool engine_adapt(struct engine *e, const struct engine_adapter *adapters, int count, struct engine_error *why)
{
    if (join(e, why) && engine_model_adapt(&e->model, adapters, count, why) && have_all(e, why))
        return true;
    e->model.is_adapted = false; /* on all ranks or on none: else one would wait for others that render nothing */
    give_up(e, why);
    return false;
}

const struct engine_info *engine_info(const struct engine *e)
{
    return &e->model.info;
}

bool engine_needs(struct engine_needs *ret, const struct engine_options *options, struct engine_error *why)
{
    return engine_model_needs(ret, options, why);
}

void engine_request_defaults(const struct engine *e, struct engine_request *r)
{
    bool is_distilled = e->model.info.is_distilled;
    if (r->steps == 0)
        r->steps = is_distilled ? 4 : 50;
    if (isnan(r->guidance) || is_distilled)
        r->guidance = is_distilled ? 1.0f : 4.0f;
    if (r->mask && r->strength == 0)
        r->strength = 0.8;
    struct engine_error why; /* a reference that cannot be used is for engine_check to refuse */
    if (!r->width && !r->height && r->reference_count > 0 && r->references[0].rgb)
        engine_reference_size(r->references[0].width, r->references[0].height, &r->width, &r->height, &why);
}

bool engine_reference_size(int width, int height, int *ret_width, int *ret_height, struct engine_error *why)
{
    struct reference_layout layout;
    if (!reference_layout_of(&layout, width, height, why))
        return false;
    *ret_width = layout.width;
    *ret_height = layout.height;
    return true;
}

/* Pixels that are malloc'ed, in another size. */
static bool resize(struct engine_reference *r, int width, int height, struct engine_error *why)
{
    uint8_t *rgb;
    if (!reference_resize(&rgb, width, height, r->rgb, r->width, r->height))
        return engine_error_set(why, ENGINE_NO_MEMORY, "no memory for an image of %dx%d", r->width, r->height);
    free((void *)(uintptr_t)r->rgb);
    *r = (struct engine_reference){.width = width, .height = height, .rgb = rgb};
    return true;
}

bool engine_reference_scale(struct engine_reference *r, struct engine_error *why)
{
    struct reference_layout l;
    if (!reference_layout_of(&l, r->width, r->height, why) || (l.scaled_width == r->width && l.scaled_height == r->height))
        return true;
    return resize(r, l.scaled_width, l.scaled_height, why);
}

bool engine_mask_scale(struct engine_reference *mask, const struct engine_reference *first, struct engine_error *why)
{
    int width, height;
    bool is_usable = mask->width <= REFERENCE_SIDE_MAX && mask->height <= REFERENCE_SIDE_MAX;
    if (!is_usable || !engine_reference_size(first->width, first->height, &width, &height, why))
        return true;
    return resize(mask, width, height, why);
}

static bool check_guidance(const struct engine *e, const struct engine_request *r, struct engine_error *why)
{
    bool is_negative = r->negative && *r->negative;
    if (e->model.info.is_distilled && is_negative)
        return engine_error_set(why, ENGINE_BAD_REQUEST,
                                "negative prompt: this model is distilled and cannot use one; leave it out or take a base model");
    if (e->model.info.is_distilled)
        return true;
    if (!(r->guidance >= 0 && r->guidance <= 100))
        return engine_error_set(why, ENGINE_BAD_REQUEST, "guidance %g: accepted: 0 to 100", (double)r->guidance);
    if (is_negative && r->guidance <= 1)
        return engine_error_set(why, ENGINE_BAD_REQUEST,
                                "negative prompt: without effect at guidance %g; leave it out or take a guidance above 1",
                                (double)r->guidance);
    return true;
}

static bool check_mask(const struct engine *e, const struct engine_request *r, struct engine_error *why)
{
    int width, height;
    if (!r->mask && r->strength != 0)
        return engine_error_set(why, ENGINE_BAD_REQUEST,
                                "strength %g without a mask: klein takes a reference as it is and cannot begin with a part of its noise; "
                                "give a mask or leave the strength out", r->strength);
    if (!r->mask)
        return true;
    if (engine_model_has_kv(&e->model))
        return engine_error_set(why, ENGINE_BAD_REQUEST, "mask: a KV model cannot inpaint; take another klein");
    if (!engine_edit_check_mask(r, why))
        return false;
    if (!engine_reference_size(r->references[0].width, r->references[0].height, &width, &height, why))
        return false;
    if (r->width != width || r->height != height)
        return engine_error_set(why, ENGINE_BAD_REQUEST,
                                "size %dx%d: with a mask the picture has the size of the first reference, %dx%d", r->width, r->height,
                                width, height);
    return true;
}

static bool check_prompts(const struct engine *e, const struct engine_request *r, struct engine_error *why)
{
    int32_t ids[ENGINE_TOKENS_MAX], count;
    bool is_truncated;
    if (!r->prompt)
        return engine_error_set(why, ENGINE_BAD_REQUEST, "no prompt; the empty text is accepted");
    if (!engine_model_ids(&e->model, r->prompt, r->truncate, ids, &count, &is_truncated, why))
        return engine_error_at(why, "prompt");
    if (r->negative && !engine_model_ids(&e->model, r->negative, r->truncate, ids, &count, &is_truncated, why))
        return engine_error_at(why, "negative prompt");
    return true;
}

/* Everything but the prompts, which the batch tokenises anyway. */
static bool check_settings(const struct engine *e, const struct engine_request *r, struct engine_error *why)
{
    if (!engine_edit_check(r, why) || !check_size(r, why))
        return false;
    if (r->steps < 1 || r->steps > ENGINE_STEPS_MAX)
        return engine_error_set(why, ENGINE_BAD_REQUEST, "steps %d: accepted: 1 to %d", r->steps, ENGINE_STEPS_MAX);
    return check_guidance(e, r, why) && check_mask(e, r, why);
}

/* What references need is loaded; a lack of memory for it is not the next request's. */
static bool check_encoder(struct engine *e, struct engine_error *why)
{
    if (e->model.encoder_pool || (join(e, why) && engine_model_encoder(&e->model, why)))
        return true;
    give_up(e, why);
    return false;
}

bool engine_check(struct engine *e, const struct engine_request *r, struct engine_error *why)
{
    return check_settings(e, r, why) && check_prompts(e, r, why) && (!r->reference_count || check_encoder(e, why));
}

static bool check_adapted(const struct engine *e, struct engine_error *why)
{
    return e->model.is_adapted || engine_error_set(why, ENGINE_BAD_MODEL, "the last change of adapters failed; change them again");
}

static bool check_batch(struct engine *e, const struct engine_request *requests, int count, struct engine_error *why)
{
    if (count < 1 || count > ENGINE_BATCH_MAX)
        return engine_error_set(why, ENGINE_BAD_REQUEST, "batch of %d images: accepted: 1 to %d", count, ENGINE_BATCH_MAX);
    for (int i = 0; i < count; i++) {
        bool ok = requests[i].prompt || engine_error_set(why, ENGINE_BAD_REQUEST, "no prompt; the empty text is accepted");
        if (!ok || !check_settings(e, &requests[i], why))
            return count == 1 ? false : engine_error_at(why, "image %d of %d", i + 1, count);
    }
    return true;
}

static void images_done(struct engine_image *images, int count)
{
    for (int i = 0; i < count; i++)
        engine_image_done(&images[i]);
}

static bool images_init(struct engine_image *images, const struct engine_request *requests, int count, bool is_distilled,
                        struct engine_error *why)
{
    for (int i = 0; i < count; i++) {
        const struct engine_request *r = &requests[i];
        images[i] = (struct engine_image){.width = r->width, .height = r->height, .seed = r->seed, .steps = r->steps,
                                          .guidance = is_distilled ? 1.0f : r->guidance};
        images[i].rgb = malloc((size_t)r->width * (size_t)r->height * 3);
        if (!images[i].rgb) {
            images_done(images, i);
            return engine_error_set(why, ENGINE_NO_MEMORY, "no memory for the pixels of %d images", count);
        }
    }
    return true;
}

/* Refuses what does not fit before anything is done. */
static bool make_room(struct engine *e, const struct engine_request *requests, int count, struct engine_error *why)
{
    struct engine_model *m = &e->model;
    if (!m->plan)
        return true;
    return (!requests[0].reference_count || engine_model_encoder(m, why)) && engine_plan_reserve(m->plan, m, requests, count, why);
}

static bool run(struct engine *e, const struct engine_request *requests, int count, struct engine_image *images,
                const struct engine_watch *watch, struct engine_error *why)
{
    struct engine_batch *b = &e->batch;
    uint8_t *rgb[ENGINE_BATCH_MAX];
    for (int i = 0; i < count; i++)
        rgb[i] = images ? images[i].rgb : NULL;
    if (!engine_batch_begin(b, &e->model, requests, count, watch, why) || !engine_batch_prompts(b, why) ||
        !engine_batch_noise(b, why) || !engine_batch_references(b, why))
        return false;
    for (int step = b->first_step; step < requests[0].steps; step++)
        if (!engine_batch_step(b, step, why))
            return false;
    return engine_batch_decode(b, rgb, why);
}

static bool join_and_run(struct engine *e, const struct engine_request *requests, int count, struct engine_image *images,
                         const struct engine_watch *watch, struct engine_error *why)
{
    struct kern *k = e->model.kern;
    size_t mark = kern_mark(k);
    bool has_images = join(e, why) && (!images || images_init(images, requests, count, e->model.info.is_distilled, why));
    bool ok = has_images && make_room(e, requests, count, why) && run(e, requests, count, images, watch, why);
    kern_rewind(k, mark);
    if (!ok && has_images && images)
        images_done(images, count);
    if (!ok)
        give_up(e, why);
    return ok;
}

bool engine_generate(struct engine *e, const struct engine_request *requests, int count, struct engine_image *images,
                     const struct engine_watch *watch, struct engine_error *why)
{
    if (kern_rank(e->model.kern) > 0)
        images = NULL;
    if (!check_adapted(e, why) || !check_batch(e, requests, count, why) || !join_and_run(e, requests, count, images, watch, why))
        return false;
    for (int i = 0; images && i < count; i++) {
        images[i].truncated = e->batch.is_truncated[i];
        images[i].timing = e->batch.timing;
    }
    return true;
}

void engine_image_done(struct engine_image *image)
{
    free(image->rgb);
    image->rgb = NULL;
}
