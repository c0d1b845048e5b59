/* engine_error.h - what went wrong, as a kind for programs and a sentence for people.
 *
 * The innermost function writes the cause with engine_error_set; each level above puts its context in
 * front with engine_error_at, so the text that arrives is a path to the cause:
 *   open model: transformer: shard 2 of 4: tensor 'x.weight': shape [3072,64], want [3072,128] */
#ifndef KILN_ENGINE_ERROR_H
#define KILN_ENGINE_ERROR_H

#include <stdbool.h>

enum engine_fault {
    ENGINE_OK,
    ENGINE_BAD_REQUEST, /* the prompt, size, steps .. is not acceptable: never retry */
    ENGINE_BAD_MODEL,   /* the files are missing, damaged or of another architecture */
    ENGINE_NO_MEMORY,
    ENGINE_IO,          /* reading failed: may work later */
    ENGINE_DEVICE,      /* the device failed or was lost: opened again, by another process, it may work */
    ENGINE_NO_DEVICE,   /* there is none of that name, or what it needs is not installed */
    ENGINE_CANCELLED,
    ENGINE_BAD_RESULT,  /* NaN or infinity in the picture */
};

struct engine_error {
    enum engine_fault fault;
    char text[1024];
};

/* Both return false, so that a caller can `return engine_error_set(..)`. Text too long ends in "...". */
bool engine_error_set(struct engine_error *why, enum engine_fault fault, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
bool engine_error_at(struct engine_error *why, const char *format, ...) __attribute__((format(printf, 2, 3)));
const char *engine_error_fault(enum engine_fault fault); /* "bad_request", .. */

#endif
