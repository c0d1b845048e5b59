/* image_file.h - pixels and their record to PNG, JPEG or WebP bytes, and back (libspng, libjpeg-turbo, libwebp).
 *
 * The record is written so that other programs read it: A1111's `parameters` text, kiln's own JSON record (keyword
 * "kiln"), and XMP with IPTC DigitalSourceType trainedAlgorithmicMedia. PNG: iTXt; JPEG: EXIF UserComment + XMP APP1;
 * WebP: EXIF + XMP chunks. Nothing in it depends on when, where, by whom or at which attempt the image was
 * made: the same row gives the same bytes. */
#ifndef KILN_IMAGE_FILE_H
#define KILN_IMAGE_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum image_format { IMAGE_PNG, IMAGE_JPG, IMAGE_WEBP };

struct image_record {
    const char *prompt, *negative, *model, *digest, *licence, *precision, *software;
    const char *campaign;       /* or NULL */
    int width, height, steps;
    double guidance;
    uint64_t seed;
    bool truncated, is_marked;  /* is_marked: write the AI mark (default) */
};

bool image_format_of(const char *name, enum image_format *ret); /* "png" "jpg" "webp"; or by a path's extension */
const char *image_format_name(enum image_format f);
bool image_file_encode(void **ret, size_t *ret_bytes, enum image_format format, const uint8_t *rgb,
                       const struct image_record *record, char *why, size_t why_bytes);
/* image_file_decode reads pixels (RGB8) and, when ret_record_json is not NULL, kiln's record (malloc'ed, NULL if none). */
bool image_file_decode(uint8_t **ret_rgb, int *ret_width, int *ret_height, char **ret_record_json, const void *data,
                       size_t bytes, char *why, size_t why_bytes);

#endif
