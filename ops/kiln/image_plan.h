/* image_plan.h - from a row of a prompt file to the images it asks for: settings, seed, content key, file name.
 *
 *   row + defaults -> settings                    what the row does not say, the options say
 *   seed given     -> seed + variation            two lines with one seed are two images with that seed
 *   no seed        -> low 32 bits of SHA-256(base seed, prompt, variation, occurrence)
 *   content key    -> first 16 bytes of SHA-256(prompt, negative, model, size, steps, guidance, seed, format, truncate,
 *                     inputs where there are any, occurrence): the database holds each key once
 *   no size given  -> that of the first reference image (task_inputs_picture_size), else 512 x 512
 *
 * occurrence: how many identical ones came before in this file. A line that stands twice gives two images with two
 * seeds; a line that is added, moved or taken away changes no image of another line. */
#ifndef KILN_IMAGE_PLAN_H
#define KILN_IMAGE_PLAN_H

#include "json_text.h"
#include "prompt_file.h"
#include "tally.h"
#include "task_inputs.h"
#include "task_store.h"

#define IMAGE_PLAN_SEEDS_MAX 10000

struct image_plan_defaults { /* texts are borrowed */
    const char *model, *negative, *format; /* model NULL: each row must name one; negative NULL: "" */
    int width, height, steps;              /* 0: the inputs' own; steps 0: the model's own */
    double guidance;                       /* NaN: the model's own */
    int variations;
    uint64_t base_seed;
    bool truncate;
};

struct image_plan { /* insides are the plan's */
    struct image_plan_defaults defaults;
    struct tally seen;
    struct json_text bytes;
    struct json_text inputs, layout, loras, identity; /* of the row */
    int row;
};

void image_plan_init(struct image_plan *p, const struct image_plan_defaults *defaults);
void image_plan_done(struct image_plan *p);

/* image_plan_check: may this row be rendered with these defaults and inputs? A sentence without a place when not. */
bool image_plan_check(const struct image_plan *p, const struct prompt_row *row, const struct task_inputs *inputs, char *why,
                      size_t why_bytes);
const char *image_plan_model(const struct image_plan *p, const struct prompt_row *row); /* NULL: nobody said */
const char *image_plan_negative(const struct image_plan *p, const struct prompt_row *row);

/* image_plan_row counts the row and calls `each` with every image of it, variation 0 first; false when `each` said
 * so, or (with why) when out of memory. The task_row is good during the call. */
bool image_plan_row(struct image_plan *p, const struct prompt_row *row, const struct task_inputs *inputs,
                    bool (*each)(void *, const struct task_row *), void *context, char *why, size_t why_bytes);

#endif
