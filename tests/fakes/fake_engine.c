/* fake_engine.c - engine.h without a model: for tests of what is around the engine.
 *
 * Pixels are a function of seed and prompt. A model folder needs one file, fake.json; "bad" in its name makes
 * engine_open fail, "nc" gives it the FLUX Non-Commercial licence. Words in a prompt choose what happens to it:
 *   refuse-me   engine_check refuses        nan-me    a batch with it ends in BAD_RESULT
 *   too-big     more than one image at a time finds no memory
 *   slow-me     each step takes 200 ms instead of 2 */
#include "engine.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct engine { struct engine_info info; };

static void sleep_ms(long ms)
{
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

bool engine_open(struct engine **ret, const struct engine_options *options, struct engine_error *why)
{
    if (strstr(options->model_dir, "bad"))
        return engine_error_set(why, ENGINE_BAD_MODEL, "open model: transformer: shape [1,2], want [3,4]");
    struct engine *e = calloc(1, sizeof *e);
    snprintf(e->info.family, sizeof e->info.family, "klein-custom");
    snprintf(e->info.licence, sizeof e->info.licence, "%s", strstr(options->model_dir, "nc") ? "FLUX Non-Commercial" : "Apache-2.0");
    snprintf(e->info.device, sizeof e->info.device, "cpu fake, 1 thread");
    e->info.is_distilled = true;
    *ret = e;
    return true;
}

void engine_close(struct engine *e)
{
    free(e);
}

bool engine_adapt(struct engine *e, const struct engine_adapter *adapters, int count, struct engine_error *why)
{
    (void)e, (void)adapters, (void)count, (void)why;
    return true;
}

bool engine_reference_scale(struct engine_reference *r, struct engine_error *why)
{
    (void)r, (void)why;
    return true;
}

bool engine_mask_scale(struct engine_reference *mask, const struct engine_reference *first, struct engine_error *why)
{
    (void)mask, (void)first, (void)why;
    return true;
}

void engine_request_defaults(const struct engine *e, struct engine_request *r)
{
    (void)e;
    if (r->steps == 0)
        r->steps = 4;
    if (isnan(r->guidance))
        r->guidance = 1;
}

bool engine_check(struct engine *e, const struct engine_request *r, struct engine_error *why)
{
    (void)e;
    if (strstr(r->prompt, "refuse-me"))
        return engine_error_set(why, ENGINE_BAD_REQUEST, "prompt: 600 tokens, at most 512");
    if (r->width < ENGINE_SIDE_MIN || r->width % ENGINE_SIDE_MULTIPLE || r->height < ENGINE_SIDE_MIN || r->height % ENGINE_SIDE_MULTIPLE)
        return engine_error_set(why, ENGINE_BAD_REQUEST, "size %dx%d: want multiples of 16, at least 64", r->width, r->height);
    return true;
}

static void paint(const struct engine_request *r, struct engine_image *image)
{
    *image = (struct engine_image){.width = r->width, .height = r->height, .seed = r->seed, .steps = r->steps, .guidance = r->guidance};
    size_t bytes = (size_t)r->width * (size_t)r->height * 3;
    uint32_t state = (uint32_t)r->seed;
    for (const char *p = r->prompt; *p; p++)
        state = state * 31 + (unsigned char)*p;
    image->rgb = malloc(bytes);
    for (size_t i = 0; i < bytes; i++)
        image->rgb[i] = (uint8_t)((state = state * 1664525 + 1013904223) >> 24);
}

bool engine_generate(struct engine *e, const struct engine_request *requests, int count, struct engine_image *images,
                     const struct engine_watch *watch, struct engine_error *why)
{
    bool is_slow = false;
    for (int i = 0; i < count; i++) {
        if (!engine_check(e, &requests[i], why))
            return false;
        is_slow = is_slow || strstr(requests[i].prompt, "slow-me");
        if (count > 1 && strstr(requests[i].prompt, "too-big"))
            return engine_error_set(why, ENGINE_NO_MEMORY, "batch of %d does not fit", count);
    }
    for (int step = 1; step <= requests[0].steps; step++) {
        if (watch && watch->cancelled && watch->cancelled(watch->context))
            return engine_error_set(why, ENGINE_CANCELLED, "cancelled");
        sleep_ms(is_slow ? 200 : 2);
        if (watch && watch->step)
            watch->step(watch->context, step, requests[0].steps);
    }
    for (int i = 0; i < count; i++)
        if (strstr(requests[i].prompt, "nan-me"))
            return engine_error_set(why, ENGINE_BAD_RESULT, "picture has NaN");
    for (int i = 0; i < count; i++)
        paint(&requests[i], &images[i]);
    return true;
}

void engine_image_done(struct engine_image *image)
{
    free(image->rgb);
    image->rgb = NULL;
}

const struct engine_info *engine_info(const struct engine *e)
{
    return &e->info;
}
