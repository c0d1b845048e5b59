/* reference.c - reference images to what the VAE sees.
 *
 * Resampling as Pillow does it (src/libImaging/Resample.c), for a target of `out` samples from `in`:
 *   scale = in / out, f = max(scale, 1), reach = 3 f
 *   centre of x = (x + 1/2) scale; window [trunc(centre - reach + 1/2), trunc(centre + reach + 1/2)) inside the image
 *   weight of k = L((k - centre + 1/2) / f), L(u) = sinc(u) sinc(u / 3) for -3 <= u < 3; divided by their sum in double
 *   fixed point: weight * 2^22, rounded half away from zero; a sample: (2^21 + sum of weight * byte) >> 22, clamped
 * A pass whose size does not change is left out: it would copy (every weight but one is 0). */
#include "reference.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define LOBES 3.0
#define WEIGHT_BITS 22
#define HALF (1 << (WEIGHT_BITS - 1))

/* --- sizes ------------------------------------------------------------------------------------------------- */

bool reference_layout_of(struct reference_layout *ret, int width, int height, struct engine_error *why)
{
    if (width < REFERENCE_SIDE_MIN || height < REFERENCE_SIDE_MIN || width > REFERENCE_SIDE_MAX ||
        height > REFERENCE_SIDE_MAX)
        return engine_error_set(why, ENGINE_BAD_REQUEST, "a reference image of %dx%d, accepted: %d to %d pixels a side",
                                width, height, REFERENCE_SIDE_MIN, REFERENCE_SIDE_MAX);
    if (width > REFERENCE_ASPECT_MAX * height || height > REFERENCE_ASPECT_MAX * width)
        return engine_error_set(why, ENGINE_BAD_REQUEST,
                                "a reference image of %dx%d, accepted: one side at most %d times the other", width,
                                height, REFERENCE_ASPECT_MAX);
    struct reference_layout l = {.scaled_width = width, .scaled_height = height};
    if ((int64_t)width * height > REFERENCE_PIXELS_MAX) {
        double scale = sqrt((double)REFERENCE_PIXELS_MAX / (double)((int64_t)width * height));
        l.scaled_width = (int)(width * scale);
        l.scaled_height = (int)(height * scale);
    }
    l.width = l.scaled_width / REFERENCE_STEP * REFERENCE_STEP;
    l.height = l.scaled_height / REFERENCE_STEP * REFERENCE_STEP;
    l.left = (l.scaled_width - l.width) / 2;
    l.top = (l.scaled_height - l.height) / 2;
    *ret = l;
    return true;
}

/* --- resampling -------------------------------------------------------------------------------------------- */

/* For each output sample the first input sample and count weights, `span` apart. */
struct taps {
    int out, span;
    int *first, *count;
    int32_t *weights;
};

static double lanczos(double u)
{
    if (!(u >= -LOBES && u < LOBES))
        return 0;
    if (u == 0)
        return 1;
    double x = u * M_PI, y = u / LOBES * M_PI;
    return sin(x) / x * (sin(y) / y);
}

static void set_taps(struct taps *t, int x, int in, double scale, double *weights)
{
    double stretch = scale > 1 ? scale : 1, reach = LOBES * stretch, centre = (x + 0.5) * scale, sum = 0;
    int first = (int)(centre - reach + 0.5), end = (int)(centre + reach + 0.5);
    first = first < 0 ? 0 : first;
    end = end > in ? in : end;
    for (int k = first; k < end; k++)
        sum += weights[k - first] = lanczos((k - centre + 0.5) * (1.0 / stretch));
    for (int k = 0; k < end - first; k++) {
        double w = (sum != 0 ? weights[k] / sum : weights[k]) * (1 << WEIGHT_BITS);
        t->weights[x * t->span + k] = (int32_t)(w < 0 ? w - 0.5 : w + 0.5);
    }
    t->first[x] = first;
    t->count[x] = end - first;
}

static void taps_free(struct taps *t)
{
    free(t->first);
    free(t->count);
    free(t->weights);
}

static bool taps_make(struct taps *t, int out, int in)
{
    double scale = (double)in / out;
    *t = (struct taps){.out = out, .span = 2 * (int)ceil(LOBES * (scale > 1 ? scale : 1)) + 1};
    t->first = malloc((size_t)out * sizeof *t->first);
    t->count = malloc((size_t)out * sizeof *t->count);
    t->weights = malloc((size_t)out * (size_t)t->span * sizeof *t->weights);
    double *weights = malloc((size_t)t->span * sizeof *weights);
    bool ok = t->first && t->count && t->weights && weights;
    for (int x = 0; ok && x < out; x++)
        set_taps(t, x, in, scale, weights);
    free(weights);
    if (!ok)
        taps_free(t);
    return ok;
}

static uint8_t byte_of(int32_t sum)
{
    int32_t v = sum >> WEIGHT_BITS;
    return (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v);
}

/* A row of `out` pixels from a row of pixels. */
static void resample_row(uint8_t *to, const uint8_t *from, const struct taps *t)
{
    for (int x = 0; x < t->out; x++) {
        const int32_t *w = t->weights + x * t->span;
        const uint8_t *p = from + (size_t)t->first[x] * 3;
        int32_t sum[3] = {HALF, HALF, HALF};
        for (int k = 0; k < t->count[x]; k++, p += 3)
            for (int c = 0; c < 3; c++)
                sum[c] += w[k] * p[c];
        for (int c = 0; c < 3; c++)
            *to++ = byte_of(sum[c]);
    }
}

static uint8_t *resize_rows(const uint8_t *rgb, int width, int height, int to_width)
{
    struct taps t;
    uint8_t *to = malloc((size_t)to_width * (size_t)height * 3);
    if (!to || !taps_make(&t, to_width, width)) {
        free(to);
        return NULL;
    }
    for (int y = 0; y < height; y++)
        resample_row(to + (size_t)y * (size_t)to_width * 3, rgb + (size_t)y * (size_t)width * 3, &t);
    taps_free(&t);
    return to;
}

/* Whole rows are added up, so that memory is read in order. */
static uint8_t *resize_columns(const uint8_t *rgb, int width, int height, int to_height)
{
    struct taps t;
    size_t row = (size_t)width * 3;
    uint8_t *to = malloc((size_t)to_height * row);
    int32_t *sums = malloc(row * sizeof *sums);
    if (!to || !sums || !taps_make(&t, to_height, height)) {
        free(to);
        free(sums);
        return NULL;
    }
    for (int y = 0; y < to_height; y++) {
        for (size_t i = 0; i < row; i++)
            sums[i] = HALF;
        for (int k = 0; k < t.count[y]; k++) {
            const uint8_t *from = rgb + (size_t)(t.first[y] + k) * row;
            int32_t w = t.weights[y * t.span + k];
            for (size_t i = 0; i < row; i++)
                sums[i] += w * from[i];
        }
        for (size_t i = 0; i < row; i++)
            to[(size_t)y * row + i] = byte_of(sums[i]);
    }
    free(sums);
    taps_free(&t);
    return to;
}

static uint8_t *copy_of(const uint8_t *rgb, int width, int height)
{
    size_t bytes = (size_t)width * (size_t)height * 3;
    uint8_t *copy = malloc(bytes);
    if (copy)
        memcpy(copy, rgb, bytes);
    return copy;
}

bool reference_resize(uint8_t **ret, int to_width, int to_height, const uint8_t *rgb, int width, int height)
{
    assert(to_width > 0 && to_height > 0 && width > 0 && height > 0);
    uint8_t *wide = to_width == width ? copy_of(rgb, width, height) : resize_rows(rgb, width, height, to_width);
    if (wide && to_height != height) {
        uint8_t *done = resize_columns(wide, to_width, height, to_height);
        free(wide);
        wide = done;
    }
    if (wide)
        *ret = wide;
    return wide != NULL;
}

/* --- all of it ----------------------------------------------------------------------------------------------- */

static void crop(uint8_t *rgb, const struct reference_layout *l)
{
    for (int y = 0; y < l->height; y++) /* towards the front: rows never overtake what they are read from */
        memmove(rgb + (size_t)y * (size_t)l->width * 3,
                rgb + ((size_t)(l->top + y) * (size_t)l->scaled_width + (size_t)l->left) * 3, (size_t)l->width * 3);
}

bool reference_prepare(uint8_t **ret, const struct reference_layout *l, const uint8_t *rgb, int width, int height)
{
    if (!reference_resize(ret, l->scaled_width, l->scaled_height, rgb, width, height))
        return false;
    crop(*ret, l);
    return true;
}

bool reference_fit(uint8_t **ret, const struct reference_layout *l, const uint8_t *rgb, int width, int height)
{
    uint8_t *scaled;
    if (!reference_resize(&scaled, l->scaled_width, l->scaled_height, rgb, width, height))
        return false;
    bool ok = reference_resize(ret, l->width, l->height, scaled, l->scaled_width, l->scaled_height);
    free(scaled);
    return ok;
}

/* Is the pixel to be repainted? Grey as Pillow weighs it, in 16 bits. */
static bool is_white(const uint8_t *p)
{
    return (p[0] * 19595 + p[1] * 38470 + p[2] * 7471 + 0x8000) >> 16 >= 128;
}

bool reference_mask(float *ret, int width, int height, const uint8_t *rgb, int mask_width, int mask_height, struct engine_error *why)
{
    uint8_t *mask;
    int step = REFERENCE_STEP, middle = REFERENCE_STEP / 2;
    if (!reference_resize(&mask, width, height, rgb, mask_width, mask_height))
        return engine_error_set(why, ENGINE_NO_MEMORY, "no memory for a mask of %dx%d", mask_width, mask_height);
    for (int y = 0; y < height / step; y++)
        for (int x = 0; x < width / step; x++) {
            const uint8_t *p = mask + ((size_t)(y * step + middle) * (size_t)width + (size_t)(x * step + middle)) * 3;
            const uint8_t *above = p - (size_t)width * 3;
            *ret++ = 0.25f * (float)(is_white(above - 3) + is_white(above) + is_white(p - 3) + is_white(p));
        }
    free(mask);
    return true;
}
