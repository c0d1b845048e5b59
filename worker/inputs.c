/* inputs.c - see inputs.h. */
#include "inputs.h"

#include <stdlib.h>

#include "input_file.h"

#define INPUTS_REASON_MAX (TASK_INPUTS_PATH_MAX + 512)

static void fail(struct failure *f, enum input_fault fault, const char *why)
{
    *f = fault == INPUT_BAD ? failure_refuse("%s", why) : failure_retry("%s", why);
}

static bool read_image(struct engine_reference *ret, struct task_inputs_file *file, struct failure *f)
{
    char why[INPUTS_REASON_MAX];
    enum input_fault fault;
    uint8_t *rgb = NULL;
    if (!input_file_image(file, &rgb, &fault, why, sizeof why)) {
        fail(f, fault, why);
        return false;
    }
    *ret = (struct engine_reference){.width = file->width, .height = file->height, .rgb = rgb};
    return true;
}

/* Pixels of a file are 192 MB at most, those of a batch would be 8 GB: only what is looked at is kept. */
bool inputs_image(struct inputs *in, int index, struct failure *f)
{
    struct engine_error why;
    if (!read_image(&in->images[index], &in->told.images[index], f))
        return false;
    if (engine_reference_scale(&in->images[index], &why))
        return true;
    *f = failure_of_engine(&why);
    return false;
}

bool inputs_mask(struct inputs *in, struct failure *f)
{
    struct engine_error why;
    if (!read_image(&in->mask, &in->told.mask, f))
        return false;
    if (!in->told.image_count || engine_mask_scale(&in->mask, &in->images[0], &why))
        return true;
    *f = failure_of_engine(&why);
    return false;
}

bool inputs_adapter(struct task_inputs_file *file, struct failure *f)
{
    char why[INPUTS_REASON_MAX];
    enum input_fault fault;
    if (input_file_adapter(file, &fault, why, sizeof why))
        return true;
    fail(f, fault, why);
    return false;
}

bool inputs_load(struct inputs *ret, const char *text, struct failure *f)
{
    char why[512];
    *ret = (struct inputs){0};
    if (!*text)
        return true;
    if (!task_inputs_parse(&ret->told, text, why, sizeof why)) {
        *f = failure_refuse("%s", why);
        return false;
    }
    bool ok = true;
    for (int i = 0; ok && i < ret->told.image_count; i++)
        ok = inputs_image(ret, i, f);
    ok = ok && (!ret->told.mask.path || inputs_mask(ret, f));
    if (!ok)
        inputs_done(ret);
    return ok;
}

void inputs_done(struct inputs *in)
{
    for (int i = 0; i < in->told.image_count; i++)
        free((void *)(uintptr_t)in->images[i].rgb);
    free((void *)(uintptr_t)in->mask.rgb);
    task_inputs_done(&in->told);
    *in = (struct inputs){0};
}

void inputs_into(const struct inputs *in, struct engine_request *request)
{
    request->references = in->images;
    request->reference_count = in->told.image_count;
    request->mask = in->mask.rgb ? &in->mask : NULL;
    request->strength = in->told.strength;
}
