/* reference.h - from the pixels of a reference image to the pixels the VAE sees, equal to diffusers in every byte.
 *
 *   1. alpha is dropped (not blended), by who decodes the file: diffusers' load_image converts to RGB that way, before anything else
 *   2. above 1024 x 1024 pixels: s = sqrt(2^20 / (w h)), resized to floor(w s) x floor(h s) with Lanczos of 3 lobes
 *   3. centre crop to multiples of 16, the odd pixel stays at the right and at the bottom
 *   4. reference_value: the number in [-1, 1] that a byte becomes
 *
 * Accepted are images of at least 64 pixels a side, at most 8 times as long as wide (engine-spec 8.1). The resampling is
 * Pillow's for 8-bit images: horizontal pass first, rounded to bytes between the passes, weights in fixed point with 22
 * bits - so the result is exact, on every machine, and independent of threads. (Up to version 12; Pillow 13 begins with the
 * columns of some tall images, which changes a few levels.)
 *
 * The pixels come upright: who decodes files applies the EXIF orientation, as diffusers' load_image does. */
#ifndef KILN_REFERENCE_H
#define KILN_REFERENCE_H

#include "engine_error.h"

#include <stddef.h>
#include <stdint.h>

#define REFERENCE_SIDE_MIN 64
#define REFERENCE_SIDE_MAX 16384
#define REFERENCE_ASPECT_MAX 8
#define REFERENCE_PIXELS_MAX (1024 * 1024)
#define REFERENCE_STEP 16

/* What happens to an image of a given size. */
struct reference_layout {
    int scaled_width, scaled_height; /* after step 2; the given size when nothing is resized */
    int left, top, width, height;    /* the crop: what the VAE sees */
};
/* What step 2 leaves of an image is an image with the same crop: not resized again, and accepted, since floor(1024 sqrt(8)) = 2896 is
 * 8 times floor(1024 / sqrt(8)) = 362. */
bool reference_layout_of(struct reference_layout *ret, int width, int height, struct engine_error *why);

/* reference_prepare does steps 2 and 3. rgb: height rows of width pixels, of this layout. *ret is layout->height rows of
 * layout->width pixels, malloc'ed. False: no memory. */
bool reference_prepare(uint8_t **ret, const struct reference_layout *layout, const uint8_t *rgb, int width, int height);

/* reference_fit is for the image that is repainted: step 2, then resized to the size of the crop instead of cut. */
bool reference_fit(uint8_t **ret, const struct reference_layout *layout, const uint8_t *rgb, int width, int height);

/* reference_mask: one value per token of 16 x 16 pixels, [height / 16 * width / 16], of a mask of any size in RGB: resized to
 * width x height, grey, 1 from level 128 on and else 0; a token's value is the mean of its four middle pixels, as bilinear
 * interpolation has it. */
bool reference_mask(float *ret, int width, int height, const uint8_t *rgb, int mask_width, int mask_height, struct engine_error *why);

/* reference_resize is step 2 for RGB pixels and any target size: *ret is malloc'ed. False: no memory. */
bool reference_resize(uint8_t **ret, int to_width, int to_height, const uint8_t *rgb, int width, int height);

/* 2 (v / 255) - 1, each operation rounded to f32 as torch does it. */
static inline float reference_value(uint8_t v)
{
    float unit = (float)v / 255.0f;
    return 2.0f * unit - 1.0f; /* the product is exact */
}

#endif
