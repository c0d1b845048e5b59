/* task_inputs.h - what an image is made from besides its prompt: reference images, a mask, LoRA adapters.
 *
 * `kiln submit` reads the files once and writes them down; the database and the coordinator carry the text; the worker reads it
 * back, and takes a file only when its SHA-256 is still the one that was submitted. A task without any has no text.
 *
 *   text      {"images":[{"path","sha256","width","height"}],"mask":{..},"strength":S,"loras":[{"path","sha256","scale"}]}
 *   layout    what pictures of one batch must have in common: sizes of the references, mask, strength
 *   loras     the adapters: what weights the pictures of a batch share
 *   identity  what the picture depends on: hashes and numbers, no paths. Part of the content key.
 *   record    what the image file says about itself: names, hashes and numbers */
#ifndef KILN_TASK_INPUTS_H
#define KILN_TASK_INPUTS_H

#include <stdbool.h>
#include <stddef.h>

#include "json_text.h"

#define TASK_INPUTS_IMAGES_MAX 10
#define TASK_INPUTS_LORAS_MAX 16
#define TASK_INPUTS_TEXT_MAX (160u << 10) /* 27 paths of 4 KiB; those with many escapes may be more, which is refused */
#define TASK_INPUTS_PATH_MAX 4096
#define TASK_INPUTS_SCALE_MAX 100

struct task_inputs_file {
    char *path;          /* absolute, owned; NULL: none */
    char sha256[65];
    int width, height;   /* of an image, upright */
};
struct task_inputs_lora { struct task_inputs_file file; double scale; };

struct task_inputs { /* start from {0} */
    int image_count, lora_count;
    struct task_inputs_file images[TASK_INPUTS_IMAGES_MAX]; /* in the order in which the prompt may speak of them */
    struct task_inputs_file mask;
    double strength;     /* with a mask: above 0, at most 1; 0: the engine's default */
    struct task_inputs_lora loras[TASK_INPUTS_LORAS_MAX];
};

void task_inputs_done(struct task_inputs *in);
bool task_inputs_is_empty(const struct task_inputs *in);

/* task_inputs_ok: do the parts go together? A mask needs an image, a strength a mask. */
bool task_inputs_ok(const struct task_inputs *in, char *why, size_t why_bytes);

/* The words people write. A strength is more than 0, at most 1; a double, because the reference counts steps * strength in
 * double, and 5 * 0.8 is 4. A LoRA is FILE or FILE:SCALE: what stands behind the last colon is a scale when it is a number, -100
 * to 100; 1 without one. *ret_length is that of FILE. */
bool task_inputs_read_strength(const char *text, double *ret, char *why, size_t why_bytes);
bool task_inputs_read_lora(const char *text, size_t *ret_length, double *ret_scale, char *why, size_t why_bytes);

/* task_inputs_parse reads a text that task_inputs_text wrote; anything else is refused with a sentence and *ret is empty. */
bool task_inputs_parse(struct task_inputs *ret, const char *text, char *why, size_t why_bytes);

/* Each appends to t; nothing when there is nothing to say. */
void task_inputs_text(struct json_text *t, const struct task_inputs *in);
void task_inputs_layout(struct json_text *t, const struct task_inputs *in);
void task_inputs_loras(struct json_text *t, const struct task_inputs *in);
bool task_inputs_same_loras(const struct task_inputs *a, const struct task_inputs *b);
void task_inputs_identity(struct json_text *t, const struct task_inputs *in);
void task_inputs_record(struct json_text *t, const struct task_inputs *in);

/* task_inputs_picture_size: the size of a picture that is made from a first reference of this size when nobody gives one:
 * at most 1024 x 1024 pixels, multiples of 16 (engine-spec 8.1; the engine's own rule is engine_reference_size). */
void task_inputs_picture_size(int width, int height, int *ret_width, int *ret_height);

const char *task_inputs_name(const struct task_inputs_file *f); /* the path's last part */

#endif
