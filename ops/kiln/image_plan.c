/* image_plan.c - the encoding under seeds and keys is written with lengths in front and fixed byte order, and begins
 * with its version: it must never change, or a campaign that is submitted again would be rendered again. */
#include "image_plan.h"

#include "digest.h"
#include "store_dir.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#define SIZE_DEFAULT 512

void image_plan_init(struct image_plan *p, const struct image_plan_defaults *defaults)
{
    *p = (struct image_plan){.defaults = *defaults};
}

void image_plan_done(struct image_plan *p)
{
    tally_done(&p->seen);
    json_text_done(&p->bytes);
    json_text_done(&p->inputs);
    json_text_done(&p->layout);
    json_text_done(&p->loras);
    json_text_done(&p->identity);
}

const char *image_plan_model(const struct image_plan *p, const struct prompt_row *row)
{
    return row->model ? row->model : p->defaults.model;
}

const char *image_plan_negative(const struct image_plan *p, const struct prompt_row *row)
{
    return row->negative ? row->negative : p->defaults.negative ? p->defaults.negative : "";
}

/* The row's, else the options', else what the first reference makes. */
static void picture_size(const struct image_plan *p, const struct prompt_row *row, const struct task_inputs *inputs, int *ret_width,
                         int *ret_height)
{
    int width = SIZE_DEFAULT, height = SIZE_DEFAULT;
    if (inputs->image_count)
        task_inputs_picture_size(inputs->images[0].width, inputs->images[0].height, &width, &height);
    *ret_width = row->width ? row->width : p->defaults.width ? p->defaults.width : width;
    *ret_height = row->height ? row->height : p->defaults.height ? p->defaults.height : height;
}

bool image_plan_check(const struct image_plan *p, const struct prompt_row *row, const struct task_inputs *inputs, char *why,
                      size_t why_bytes)
{
    int width, height;
    picture_size(p, row, inputs, &width, &height);
    if (!image_plan_model(p, row)) {
        snprintf(why, why_bytes, "the row names no model, and --model was not given (left out, it is the model that kiln is up with here, if that is one)");
        return false;
    }
    if (row->has_seed && row->seed > UINT64_MAX - (uint64_t)(p->defaults.variations - 1)) {
        snprintf(why, why_bytes, "seed %llu with %d variations goes beyond %llu", (unsigned long long)row->seed,
                 p->defaults.variations, (unsigned long long)UINT64_MAX);
        return false;
    }
    return prompt_file_size_ok(width, height, why, why_bytes);
}

/* --- the encoding ------------------------------------------------------------------------------------ */

static void put_number(struct json_text *t, uint64_t value)
{
    uint8_t raw[8];
    for (int i = 0; i < 8; i++)
        raw[i] = (uint8_t)(value >> (8 * i));
    json_text_add(t, raw, 8);
}

static void put_text(struct json_text *t, const char *s)
{
    size_t length = strlen(s);
    put_number(t, length);
    json_text_add(t, s, length);
}

static void put_double(struct json_text *t, double value)
{
    uint64_t bits = UINT64_C(0x7ff8000000000000); /* one NaN and one zero, whatever the machine had */
    if (value == 0)
        bits = 0;
    else if (!isnan(value))
        memcpy(&bits, &value, 8);
    put_number(t, bits);
}

static void put_settings(struct image_plan *p, const char *kind, const struct task_row *image)
{
    struct json_text *t = &p->bytes;
    json_text_clear(t);
    put_text(t, kind);
    put_text(t, image->prompt);
    put_text(t, image->negative);
    put_text(t, image->model);
    put_number(t, (uint64_t)image->width);
    put_number(t, (uint64_t)image->height);
    put_number(t, (uint64_t)image->steps);
    put_double(t, image->guidance);
    put_text(t, p->defaults.format);
    put_number(t, image->truncate);
    if (p->identity.length) /* without inputs the bytes are those of the first release */
        put_text(t, p->identity.data);
}

/* Counts what was put and says how often it was there before; -1: no memory. */
static int64_t count_bytes(struct image_plan *p)
{
    uint8_t hash[32];
    if (p->bytes.failed || !digest_bytes(p->bytes.data, p->bytes.length, hash))
        return -1;
    struct tally_slot *slot = tally_add(&p->seen, hash);
    return slot ? (int64_t)slot->count - 1 : -1;
}

static uint64_t derived_seed(struct image_plan *p, const struct task_row *image, int64_t occurrence)
{
    uint8_t hash[32];
    json_text_clear(&p->bytes);
    put_text(&p->bytes, "kiln seed 1");
    put_number(&p->bytes, p->defaults.base_seed);
    put_text(&p->bytes, image->prompt);
    put_number(&p->bytes, (uint64_t)image->variation);
    put_number(&p->bytes, (uint64_t)occurrence);
    digest_bytes(p->bytes.data, p->bytes.length, hash);
    return (uint64_t)hash[0] | (uint64_t)hash[1] << 8 | (uint64_t)hash[2] << 16 | (uint64_t)hash[3] << 24;
}

static bool content_key(struct image_plan *p, struct task_row *image, int64_t occurrence)
{
    uint8_t hash[32];
    put_settings(p, "kiln image 1", image);
    put_number(&p->bytes, image->seed);
    put_number(&p->bytes, (uint64_t)occurrence);
    if (p->bytes.failed || !digest_bytes(p->bytes.data, p->bytes.length, hash))
        return false;
    memcpy(image->content_key, hash, sizeof image->content_key);
    return true;
}

/* --- a row ------------------------------------------------------------------------------------------- */

static bool write_inputs(struct image_plan *p, const struct task_inputs *inputs)
{
    json_text_clear(&p->inputs);
    json_text_clear(&p->layout);
    json_text_clear(&p->loras);
    json_text_clear(&p->identity);
    task_inputs_text(&p->inputs, inputs);
    task_inputs_layout(&p->layout, inputs);
    task_inputs_loras(&p->loras, inputs);
    task_inputs_identity(&p->identity, inputs);
    return !p->inputs.failed && !p->layout.failed && !p->loras.failed && !p->identity.failed;
}

static struct task_row settings_of(const struct image_plan *p, const struct prompt_row *row, const struct task_inputs *inputs)
{
    const struct image_plan_defaults *d = &p->defaults;
    int width, height;
    picture_size(p, row, inputs, &width, &height);
    return (struct task_row){
        .prompt = row->prompt,
        .negative = image_plan_negative(p, row),
        .model = image_plan_model(p, row),
        .name = row->name,
        .labels_json = row->labels_json,
        .row = p->row,
        .inputs = p->inputs.length ? p->inputs.data : NULL,
        .layout = p->layout.length ? p->layout.data : NULL,
        .loras = p->loras.length ? p->loras.data : NULL,
        .width = width,
        .height = height,
        .steps = row->steps ? row->steps : d->steps,
        .guidance = isnan(row->guidance) ? d->guidance : row->guidance,
        .truncate = d->truncate,
    };
}

/* Seed and occurrence of one variation. A given seed counts images, a derived one counts rows: the seeds of all
 * variations follow from it. */
static bool give_seed(struct image_plan *p, const struct prompt_row *row, struct task_row *image, int64_t *occurrence)
{
    if (row->has_seed) {
        image->seed = row->seed + (uint64_t)image->variation;
        put_settings(p, "given", image);
        put_number(&p->bytes, image->seed);
        *occurrence = count_bytes(p);
    } else {
        if (image->variation == 0) {
            put_settings(p, "derived", image);
            *occurrence = count_bytes(p);
        }
        image->seed = derived_seed(p, image, *occurrence);
    }
    return *occurrence >= 0 && !p->bytes.failed;
}

bool image_plan_row(struct image_plan *p, const struct prompt_row *row, const struct task_inputs *inputs,
                    bool (*each)(void *, const struct task_row *), void *context, char *why, size_t why_bytes)
{
    char file[256];
    int64_t occurrence = 0;
    if (p->row == INT_MAX) {
        snprintf(why, why_bytes, "more than %d rows", INT_MAX);
        return false;
    }
    p->row++;
    if (!write_inputs(p, inputs)) {
        snprintf(why, why_bytes, "no memory for what it is made from");
        return false;
    }
    struct task_row image = settings_of(p, row, inputs);
    image.file = file;
    for (int variation = 0; variation < p->defaults.variations; variation++) {
        image.variation = variation;
        if (!give_seed(p, row, &image, &occurrence) || !content_key(p, &image, occurrence)) {
            snprintf(why, why_bytes, "no memory for the content keys");
            return false;
        }
        store_dir_file_name(file, sizeof file, image.name, image.row, variation, p->defaults.variations, image.content_key,
                            p->defaults.format);
        if (!each(context, &image))
            return false;
    }
    return true;
}
