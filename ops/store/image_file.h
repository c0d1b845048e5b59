/* image_file.h - pixels and their record to PNG, JPEG or WebP bytes, and back (libspng, libjpeg-turbo, libwebp).
 *
 * The record is written so that other programs read it: A1111's `parameters` text, kiln's own JSON record (keyword
 * "kiln"), and XMP with IPTC DigitalSourceType trainedAlgorithmicMedia. Nothing in it depends on when, where, by
 * whom or at which attempt the image was made: the same row gives the same bytes.
 *
 *           pixels                     parameters           kiln's record             AI mark
 *   PNG     exact                      text "parameters"    text "kiln"               text "XML:com.adobe.xmp"
 *   JPEG    quality 95, 4:4:4          EXIF UserComment     APP4 segments "kiln\0"    APP1 XMP
 *   WebP    exact (lossless)           EXIF UserComment     chunk "KILN"              chunk "XMP "
 *
 * PNG texts are tEXt when plain ASCII and iTXt (UTF-8) when not: every reader knows the first, and only the second
 * may hold the rest. A JPEG segment ends at 64 KiB: a `parameters` text beyond that (a prompt of more than about
 * 32,000 characters) is left out of a JPEG, never cut; kiln's record always has all of it. */
#ifndef KILN_IMAGE_FILE_H
#define KILN_IMAGE_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define IMAGE_FILE_SIDE_MAX 16384
#define IMAGE_FILE_PIXELS_MAX (64u << 20)

enum image_format { IMAGE_PNG, IMAGE_JPG, IMAGE_WEBP };

struct image_record { /* texts are UTF-8; NULL is "" */
    const char *prompt, *negative, *model, *digest, *licence, *precision, *software;
    const char *campaign;       /* or NULL */
    const char *inputs;         /* a JSON object (task_inputs_record), or NULL */
    int width, height, steps;
    double guidance;
    uint64_t seed;
    bool truncated, is_marked;  /* is_marked: write the AI mark (default) */
};

bool image_file_format_of(const char *name, enum image_format *ret); /* "png" "jpg" "webp"; or by a path's extension */
const char *image_file_format_name(enum image_format f);
bool image_file_encode(void **ret, size_t *ret_bytes, enum image_format format, const uint8_t *rgb,
                       const struct image_record *record, char *why, size_t why_bytes);
/* image_file_decode reads pixels (RGB8, alpha dropped, upright: turned as the EXIF orientation says) and, when
 * ret_record_json is not NULL, kiln's record (malloc'ed, NULL if none).
 * Any bytes may be given: damaged and oversized images are refused (IMAGE_FILE_SIDE_MAX, IMAGE_FILE_PIXELS_MAX). */
bool image_file_decode(uint8_t **ret_rgb, int *ret_width, int *ret_height, char **ret_record_json, const void *data,
                       size_t bytes, char *why, size_t why_bytes);

#endif
