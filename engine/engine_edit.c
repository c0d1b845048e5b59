/* engine_edit.c - reference images of a batch: pixels, prepared as diffusers does, to tokens. */
#include "engine_edit.h"

#include <stdlib.h>
#include <string.h>

/* --- requests ------------------------------------------------------------------------------------------- */

bool engine_edit_check(const struct engine_request *r, struct engine_error *why)
{
    struct reference_layout layout;
    if (r->reference_count < 0 || r->reference_count > ENGINE_REFERENCES_MAX)
        return engine_error_set(why, ENGINE_BAD_REQUEST, "%d reference images, accepted: up to %d", r->reference_count,
                                ENGINE_REFERENCES_MAX);
    for (int i = 0; i < r->reference_count; i++) {
        const struct engine_reference *one = &r->references[i];
        bool ok = one->rgb || engine_error_set(why, ENGINE_BAD_REQUEST, "no pixels");
        if (!ok || !reference_layout_of(&layout, one->width, one->height, why))
            return engine_error_at(why, "reference %d of %d", i + 1, r->reference_count);
    }
    return true;
}

bool engine_edit_check_mask(const struct engine_request *r, struct engine_error *why)
{
    const struct engine_reference *mask = r->mask;
    if (!r->reference_count)
        return engine_error_set(why, ENGINE_BAD_REQUEST, "mask: the image to be repainted is missing, the first reference");
    if (!mask->rgb)
        return engine_error_set(why, ENGINE_BAD_REQUEST, "mask: no pixels");
    if (mask->width < 1 || mask->height < 1 || mask->width > REFERENCE_SIDE_MAX || mask->height > REFERENCE_SIDE_MAX)
        return engine_error_set(why, ENGINE_BAD_REQUEST, "a mask of %dx%d, accepted: 1 to %d pixels a side", mask->width, mask->height,
                                REFERENCE_SIDE_MAX);
    if (!(r->strength > 0 && r->strength <= 1))
        return engine_error_set(why, ENGINE_BAD_REQUEST, "strength %g, accepted: more than 0, at most 1", r->strength);
    if (engine_edit_first_step(r) >= r->steps)
        return engine_error_set(why, ENGINE_BAD_REQUEST, "strength %g of %d steps is none", r->strength, r->steps);
    return true;
}

int engine_edit_first_step(const struct engine_request *r)
{
    double run = r->mask ? r->steps * r->strength : r->steps; /* in double and cut, as the reference counts */
    return run < r->steps ? (int)(r->steps - run) : 0;
}

static struct transformer_grid grid_of(const struct engine_request *r, int reference)
{
    struct reference_layout layout = {0};
    struct engine_error never; /* the request was checked */
    reference_layout_of(&layout, r->references[reference].width, r->references[reference].height, &never);
    return (struct transformer_grid){layout.height / REFERENCE_STEP, layout.width / REFERENCE_STEP, 10 + 10 * reference};
}

bool engine_edit_same(const struct engine_request *a, const struct engine_request *b)
{
    bool same = a->reference_count == b->reference_count && !a->mask == !b->mask && !(a->strength != b->strength);
    for (int i = 0; same && i < a->reference_count; i++) {
        struct transformer_grid one = grid_of(a, i), other = grid_of(b, i);
        same = one.h == other.h && one.w == other.w;
    }
    return same;
}

static bool is_same_picture(const struct engine_reference *a, const struct engine_reference *b)
{
    return a->width == b->width && a->height == b->height &&
           (a->rgb == b->rgb || memcmp(a->rgb, b->rgb, (size_t)a->width * (size_t)a->height * 3) == 0);
}

static bool is_same_list(const struct engine_request *a, const struct engine_request *b)
{
    bool same = a->reference_count == b->reference_count;
    for (int i = 0; same && i < a->reference_count; i++)
        same = is_same_picture(&a->references[i], &b->references[i]);
    return same;
}

void engine_edit_plan(struct engine_edit *e, const struct engine_request *requests, int count)
{
    *e = (struct engine_edit){.count = requests[0].reference_count, .has_mask = requests[0].mask != NULL};
    if (!e->count)
        return;
    for (int i = 0; i < e->count; i++) {
        e->grids[i] = grid_of(&requests[0], i);
        e->rows += (int64_t)e->grids[i].h * e->grids[i].w;
    }
    for (int i = 0; i < count; i++) {
        int list = 0;
        while (list < e->list_count && !is_same_list(&requests[i], &requests[e->first_of[list]]))
            list++;
        if (list == e->list_count)
            e->first_of[e->list_count++] = i;
        e->list_of[i] = list;
    }
}

/* --- pixels to tokens ------------------------------------------------------------------------------------ */

/* The prepared pixels as [1, h, w, 3] from -1 to 1 on the backend, in arena memory. An image that is repainted is fitted, not cut. */
static bool upload(struct tensor *ret, struct engine_model *m, const struct engine_reference *reference, bool is_repainted,
                   struct engine_error *why)
{
    struct reference_layout layout;
    uint8_t *rgb = NULL;
    if (!reference_layout_of(&layout, reference->width, reference->height, why))
        return false;
    bool ok = kern_is_dry(m->kern) || (is_repainted ? reference_fit : reference_prepare)(&rgb, &layout, reference->rgb, reference->width,
                                                                                         reference->height);
    size_t count = (size_t)layout.width * (size_t)layout.height * 3;
    float *values = ok ? malloc(count * sizeof *values) : NULL;
    if (!values) {
        free(rgb);
        return engine_error_set(why, ENGINE_NO_MEMORY, "no memory for %dx%d pixels", layout.width, layout.height);
    }
    for (size_t i = 0; rgb && i < count; i++)
        values[i] = reference_value(rgb[i]);
    free(rgb);
    int64_t shape[4] = {1, layout.height, layout.width, 3};
    *ret = kern_temp(m->kern, m->dtype, 4, shape);
    kern_write(m->kern, *ret, tensor_of(values, TENSOR_F32, 4, shape));
    free(values);
    return true;
}

/* One reference into its rows of the tokens of its list. */
static bool encode(struct engine_model *m, const struct engine_reference *reference, bool is_repainted, struct tensor tokens,
                   struct tensor *ret_latent, struct engine_error *why)
{
    struct tensor image;
    if (!upload(&image, m, reference, is_repainted, why))
        return false;
    int64_t latent[4] = {1, image.shape[1] / VAE_SCALE, image.shape[2] / VAE_SCALE, m->config.vae.latent_channels};
    *ret_latent = kern_temp(m->kern, m->dtype, 4, latent);
    vae_encode(m->kern, &m->config.vae, &m->encoder, *ret_latent, image);
    vae_tokens(m->kern, &m->vae, tensor_shape(tokens, 3, (int64_t[]){1, tokens.shape[0], tokens.shape[1]}), *ret_latent);
    return true;
}

static bool encode_list(struct engine_edit *e, struct engine_model *m, const struct engine_request *r, int list,
                        void (*shown)(void *context, int reference, struct tensor latent), void *context, struct engine_error *why)
{
    int64_t row = 0;
    for (int i = 0; i < e->count; i++) {
        int64_t rows = (int64_t)e->grids[i].h * e->grids[i].w;
        size_t mark = kern_mark(m->kern);
        struct tensor latent;
        struct tensor tokens = tensor_slice(e->tokens[list], 0, row, rows);
        if (!encode(m, &r->references[i], e->has_mask && i == 0, tokens, &latent, why) || !engine_model_sync(m, why))
            return engine_error_at(why, "reference %d of %d", i + 1, e->count);
        if (shown && list == 0)
            shown(context, i, latent);
        kern_rewind(m->kern, mark);
        row += rows;
    }
    return true;
}

bool engine_edit_encode(struct engine_edit *e, struct engine_model *m, const struct engine_request *requests,
                        void (*shown)(void *context, int reference, struct tensor latent), void *context,
                        struct engine_error *why)
{
    if (e->count && !engine_model_encoder(m, why))
        return false;
    for (int list = 0; list < e->list_count; list++) {
        e->tokens[list] = kern_temp(m->kern, m->dtype, 2, (int64_t[]){e->rows, m->config.transformer.in_channels});
        if (!encode_list(e, m, &requests[e->first_of[list]], list, shown, context, why))
            return false;
    }
    return true;
}

void engine_edit_keep(struct engine_edit *e, struct engine_model *m, struct tensor cos, struct tensor sin,
                      struct transformer_times times)
{
    for (int list = 0; list < e->list_count; list++) {
        e->kv[list] = transformer_kv_temp(m->kern, &m->config.transformer, m->dtype, e->rows);
        struct transformer_input in = {
            .latents = tensor_shape(e->tokens[list], 3, (int64_t[]){1, e->rows, e->tokens[list].shape[1]}),
            .keep = &e->kv[list],
            .cos = cos, .sin = sin, .times = times,
        };
        size_t mark = kern_mark(m->kern);
        in.checksums = engine_model_checksums(m, 2 * e->rows);
        transformer_run(m->kern, &m->config.transformer, &m->transformer, (struct tensor){0}, &in);
        engine_model_compare(m, in.checksums);
        kern_rewind(m->kern, mark);
    }
}

/* --- inpainting --------------------------------------------------------------------------------------------- */

static struct tensor picture_of(struct tensor latents, int64_t i) /* [N, 128] */
{
    return tensor_rows(tensor_slice(latents, 0, i, 1));
}

static struct tensor shares_of(struct tensor shares, int64_t row) /* [N] */
{
    return tensor_shape(tensor_slice(shares, 0, row, 1), 1, (int64_t[]){shares.shape[1]});
}

/* The first reference of a picture, noised to a sigma of the schedule. */
static void renoise(struct engine_edit *e, struct engine_model *m, struct tensor out, int picture, int at)
{
    struct tensor image = tensor_slice(e->tokens[e->list_of[picture]], 0, 0, out.shape[0]);
    kern_mix(m->kern, out, image, picture_of(e->noise, picture), shares_of(e->sigma, at));
}

/* Masks and sigmas, from host memory of as many values as the larger of the two. */
static bool upload_shares(struct engine_edit *e, struct engine_model *m, const struct engine_request *requests,
                          const struct schedule *schedule, float *values, struct engine_error *why)
{
    int64_t batch = e->noise.shape[0], tokens = e->noise.shape[1];
    for (int64_t i = 0; i < batch; i++) {
        const struct engine_request *r = &requests[i];
        if (!reference_mask(values + i * tokens, r->width, r->height, r->mask->rgb, r->mask->width, r->mask->height, why))
            return false;
    }
    kern_write(m->kern, e->mask, tensor_2d(values, TENSOR_F32, batch, tokens));
    for (int64_t i = 0; i <= schedule->steps; i++)
        for (int64_t t = 0; t < tokens; t++)
            values[i * tokens + t] = schedule->sigma[i];
    kern_write(m->kern, e->sigma, tensor_2d(values, TENSOR_F32, schedule->steps + 1, tokens));
    return true;
}

bool engine_edit_mask(struct engine_edit *e, struct engine_model *m, const struct engine_request *requests, struct tensor latents,
                      const struct schedule *schedule, int first_step, struct engine_error *why)
{
    int64_t batch = latents.shape[0], tokens = latents.shape[1], sigmas = schedule->steps + 1, most = batch > sigmas ? batch : sigmas;
    float *values = malloc((size_t)(most * tokens) * sizeof *values);
    if (!values)
        return engine_error_set(why, ENGINE_NO_MEMORY, "no memory for masks of %lld tokens", (long long)tokens);
    e->noise = kern_temp(m->kern, m->dtype, 3, latents.shape);
    e->mask = kern_temp(m->kern, m->dtype, 2, (int64_t[]){batch, tokens});
    e->sigma = kern_temp(m->kern, m->dtype, 2, (int64_t[]){sigmas, tokens});
    kern_copy(m->kern, e->noise, latents);
    bool ok = upload_shares(e, m, requests, schedule, values, why) && engine_model_sync(m, why);
    free(values);
    for (int i = 0; ok && i < batch; i++)
        renoise(e, m, picture_of(latents, i), i, first_step);
    return ok;
}

void engine_edit_blend(struct engine_edit *e, struct engine_model *m, struct tensor latents, int first, int step)
{
    size_t mark = kern_mark(m->kern);
    struct tensor kept = kern_temp(m->kern, m->dtype, 2, (int64_t[]){latents.shape[1], latents.shape[2]});
    for (int i = 0; i < latents.shape[0]; i++) {
        struct tensor picture = picture_of(latents, i);
        renoise(e, m, kept, first + i, step + 1); /* after the last step sigma is 0: the image itself */
        kern_mix(m->kern, picture, kept, picture, shares_of(e->mask, first + i));
    }
    kern_rewind(m->kern, mark);
}
