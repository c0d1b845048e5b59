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

static struct transformer_grid grid_of(const struct engine_request *r, int reference)
{
    struct reference_layout layout = {0};
    struct engine_error never; /* the request was checked */
    reference_layout_of(&layout, r->references[reference].width, r->references[reference].height, &never);
    return (struct transformer_grid){layout.height / REFERENCE_STEP, layout.width / REFERENCE_STEP, 10 + 10 * reference};
}

bool engine_edit_same(const struct engine_request *a, const struct engine_request *b)
{
    bool same = a->reference_count == b->reference_count;
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
    *e = (struct engine_edit){.count = requests[0].reference_count};
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

/* The prepared pixels as [1, h, w, 3] from -1 to 1 on the backend, in arena memory. */
static bool upload(struct tensor *ret, struct engine_model *m, const struct engine_reference *reference, struct engine_error *why)
{
    struct reference_layout layout;
    uint8_t *rgb;
    if (!reference_prepare(&rgb, &layout, reference->rgb, 3, reference->width, reference->height, why))
        return false;
    size_t count = (size_t)layout.width * (size_t)layout.height * 3;
    float *values = malloc(count * sizeof *values);
    if (!values) {
        free(rgb);
        return engine_error_set(why, ENGINE_NO_MEMORY, "no memory for %dx%d pixels", layout.width, layout.height);
    }
    for (size_t i = 0; i < count; i++)
        values[i] = reference_value(rgb[i]);
    free(rgb);
    int64_t shape[4] = {1, layout.height, layout.width, 3};
    *ret = kern_temp(m->kern, m->dtype, 4, shape);
    kern_write(m->kern, *ret, tensor_of(values, TENSOR_F32, 4, shape));
    free(values);
    return true;
}

/* One reference into its rows of the tokens of its list. */
static bool encode(struct engine_model *m, const struct engine_reference *reference, struct tensor tokens, struct tensor *ret_latent,
                   struct engine_error *why)
{
    struct tensor image;
    if (!upload(&image, m, reference, why))
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
        if (!encode(m, &r->references[i], tensor_slice(e->tokens[list], 0, row, rows), &latent, why) || !engine_model_sync(m, why))
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
                      const struct transformer_times *times, int step)
{
    for (int list = 0; list < e->list_count; list++) {
        e->kv[list] = transformer_kv_temp(m->kern, &m->config.transformer, m->dtype, e->rows);
        struct transformer_input in = {
            .latents = tensor_shape(e->tokens[list], 3, (int64_t[]){1, e->rows, e->tokens[list].shape[1]}),
            .keep = &e->kv[list],
            .cos = cos, .sin = sin, .times = times, .step = step,
        };
        transformer_run(m->kern, &m->peers, &m->config.transformer, &m->transformer, (struct tensor){0}, &in);
    }
}
