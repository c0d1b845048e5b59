/* task_inputs.c - the forms of a task's inputs. One writer for each form; the reader accepts what the writer writes, whoever wrote it:
 * the text comes back from a database and over the wire. */
#include "task_inputs.h"

#include <jansson.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SIDE_MAX 16384
#define PICTURE_PIXELS_MAX (1024 * 1024)
#define PICTURE_STEP 16

static bool refuse(char *why, size_t why_bytes, const char *format, ...) __attribute__((format(printf, 3, 4)));
static bool refuse(char *why, size_t why_bytes, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(why, why_bytes, format, args);
    va_end(args);
    return false;
}

void task_inputs_done(struct task_inputs *in)
{
    for (int i = 0; i < in->image_count; i++)
        free(in->images[i].path);
    for (int i = 0; i < in->lora_count; i++)
        free(in->loras[i].file.path);
    free(in->mask.path);
    *in = (struct task_inputs){0};
}

bool task_inputs_is_empty(const struct task_inputs *in)
{
    return !in->image_count && !in->lora_count && !in->mask.path && in->strength == 0;
}

bool task_inputs_ok(const struct task_inputs *in, char *why, size_t why_bytes)
{
    if (in->mask.path && !in->image_count)
        return refuse(why, why_bytes, "a mask without an image: give the image that is to be repainted");
    if (in->strength != 0 && !in->mask.path)
        return refuse(why, why_bytes, "a strength without a mask: klein takes an image as a reference and cannot begin with a part of its "
                                      "noise; give a mask of what is to be repainted, or leave the strength out");
    if (in->strength != 0 && !(in->strength > 0 && in->strength <= 1))
        return refuse(why, why_bytes, "strength %g: accepted is more than 0, at most 1", in->strength);
    return true;
}

/* *ret is written only if the whole text is a number. */
static bool read_number(const char *text, double *ret)
{
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || strspn(text, "0123456789.eE+-") != strlen(text))
        return false;
    *ret = value;
    return true;
}

bool task_inputs_read_strength(const char *text, double *ret, char *why, size_t why_bytes)
{
    return (read_number(text, ret) && *ret > 0 && *ret <= 1) ||
           refuse(why, why_bytes, "strength '%.40s': accepted is a number above 0, at most 1", text);
}

bool task_inputs_read_lora(const char *text, size_t *ret_length, double *ret_scale, char *why, size_t why_bytes)
{
    const char *colon = strrchr(text, ':');
    *ret_length = strlen(text);
    *ret_scale = 1;
    if (colon && read_number(colon + 1, ret_scale))
        *ret_length = (size_t)(colon - text);
    if (*ret_length == 0)
        return refuse(why, why_bytes, "lora '%.40s': accepted is FILE or FILE:SCALE", text);
    return fabs(*ret_scale) <= TASK_INPUTS_SCALE_MAX ||
           refuse(why, why_bytes, "lora '%.200s': accepted are scales from -%d to %d", text, TASK_INPUTS_SCALE_MAX, TASK_INPUTS_SCALE_MAX);
}

const char *task_inputs_name(const struct task_inputs_file *f)
{
    const char *slash = strrchr(f->path, '/');
    return slash ? slash + 1 : f->path;
}

void task_inputs_picture_size(int width, int height, int *ret_width, int *ret_height)
{
    if ((int64_t)width * height > PICTURE_PIXELS_MAX) {
        double scale = sqrt((double)PICTURE_PIXELS_MAX / (double)((int64_t)width * height));
        width = (int)(width * scale);
        height = (int)(height * scale);
    }
    *ret_width = width / PICTURE_STEP * PICTURE_STEP;
    *ret_height = height / PICTURE_STEP * PICTURE_STEP;
}

/* --- writing ------------------------------------------------------------------------------------------- */

static void put_number(struct json_text *t, const char *name, double value)
{
    json_text_format(t, ",\"%s\":", name);
    json_text_double(t, value);
}

/* One file of a text or (by name only) of a record, without the closing brace. */
static void put_file(struct json_text *t, const struct task_inputs_file *f, bool is_record)
{
    json_text_put(t, is_record ? "{\"name\":" : "{\"path\":");
    json_text_text(t, is_record ? task_inputs_name(f) : f->path);
    json_text_format(t, ",\"sha256\":\"%s\"", f->sha256);
    if (f->width && !is_record)
        json_text_format(t, ",\"width\":%d,\"height\":%d", f->width, f->height);
}

static void put_object(struct json_text *t, const struct task_inputs *in, bool is_record)
{
    const char *comma = "";
    if (task_inputs_is_empty(in))
        return;
    json_text_put(t, "{");
    if (in->image_count) {
        json_text_put(t, "\"images\":[");
        for (int i = 0; i < in->image_count; i++) {
            json_text_put(t, i ? "," : "");
            put_file(t, &in->images[i], is_record);
            json_text_put(t, "}");
        }
        json_text_put(t, "]");
        comma = ",";
    }
    if (in->mask.path) {
        json_text_format(t, "%s\"mask\":", comma);
        put_file(t, &in->mask, is_record);
        json_text_put(t, "}");
    }
    if (in->strength != 0)
        put_number(t, "strength", in->strength);
    if (in->lora_count) {
        json_text_format(t, "%s\"loras\":[", comma);
        for (int i = 0; i < in->lora_count; i++) {
            json_text_put(t, i ? "," : "");
            put_file(t, &in->loras[i].file, is_record);
            put_number(t, "scale", in->loras[i].scale);
            json_text_put(t, "}");
        }
        json_text_put(t, "]");
    }
    json_text_put(t, "}");
}

void task_inputs_text(struct json_text *t, const struct task_inputs *in)
{
    put_object(t, in, false);
}

void task_inputs_record(struct json_text *t, const struct task_inputs *in)
{
    put_object(t, in, true);
}

void task_inputs_layout(struct json_text *t, const struct task_inputs *in)
{
    for (int i = 0; i < in->image_count; i++)
        json_text_format(t, "%s%dx%d", i ? " " : "", in->images[i].width, in->images[i].height);
    if (in->mask.path)
        json_text_put(t, " mask ");
    if (in->strength != 0)
        json_text_double(t, in->strength);
}

void task_inputs_loras(struct json_text *t, const struct task_inputs *in)
{
    for (int i = 0; i < in->lora_count; i++) {
        json_text_format(t, "%s%s:", i ? " " : "", in->loras[i].file.sha256);
        json_text_double(t, in->loras[i].scale);
    }
}

bool task_inputs_same_loras(const struct task_inputs *a, const struct task_inputs *b)
{
    bool same = a->lora_count == b->lora_count;
    for (int i = 0; same && i < a->lora_count; i++)
        same = strcmp(a->loras[i].file.sha256, b->loras[i].file.sha256) == 0 && a->loras[i].scale == b->loras[i].scale;
    return same;
}

void task_inputs_identity(struct json_text *t, const struct task_inputs *in)
{
    if (task_inputs_is_empty(in))
        return;
    json_text_put(t, "inputs 1");
    for (int i = 0; i < in->image_count; i++)
        json_text_format(t, " image %s", in->images[i].sha256);
    if (in->mask.path)
        json_text_format(t, " mask %s", in->mask.sha256);
    if (in->strength != 0) {
        json_text_put(t, " strength ");
        json_text_double(t, in->strength);
    }
    json_text_put(t, " loras ");
    task_inputs_loras(t, in);
}

/* --- reading ------------------------------------------------------------------------------------------- */

static bool is_sha256(const char *text)
{
    return text && strlen(text) == 64 && strspn(text, "0123456789abcdef") == 64;
}

static bool read_side(const json_t *value, int *ret)
{
    json_int_t side = json_integer_value(value);
    *ret = (int)side;
    return json_is_integer(value) && side >= 1 && side <= SIDE_MAX;
}

/* A file's object; what is missing in it is what `why` names. */
static bool read_file(struct task_inputs_file *ret, const json_t *object, bool is_image, char *why, size_t why_bytes)
{
    const char *path = json_string_value(json_object_get(object, "path")), *sha256 = json_string_value(json_object_get(object, "sha256"));
    if (!path || path[0] != '/' || strlen(path) > TASK_INPUTS_PATH_MAX)
        return refuse(why, why_bytes, "'path' is no absolute path of at most %d bytes", TASK_INPUTS_PATH_MAX);
    if (!is_sha256(sha256))
        return refuse(why, why_bytes, "'sha256' of %.200s is not 64 hexadecimal digits", path);
    if (is_image && (!read_side(json_object_get(object, "width"), &ret->width) || !read_side(json_object_get(object, "height"), &ret->height)))
        return refuse(why, why_bytes, "width and height of %.200s are not 1 to %d", path, SIDE_MAX);
    ret->path = strdup(path);
    memcpy(ret->sha256, sha256, sizeof ret->sha256);
    return ret->path || refuse(why, why_bytes, "no memory");
}

static bool read_images(struct task_inputs *in, const json_t *list, char *why, size_t why_bytes)
{
    size_t count = json_array_size(list);
    if (!list)
        return true;
    if (!json_is_array(list) || count < 1 || count > TASK_INPUTS_IMAGES_MAX)
        return refuse(why, why_bytes, "'images' is no list of 1 to %d", TASK_INPUTS_IMAGES_MAX);
    for (size_t i = 0; i < count; i++, in->image_count++)
        if (!read_file(&in->images[i], json_array_get(list, i), true, why, why_bytes))
            return false;
    return true;
}

static bool read_loras(struct task_inputs *in, const json_t *list, char *why, size_t why_bytes)
{
    size_t count = json_array_size(list);
    if (!list)
        return true;
    if (!json_is_array(list) || count < 1 || count > TASK_INPUTS_LORAS_MAX)
        return refuse(why, why_bytes, "'loras' is no list of 1 to %d", TASK_INPUTS_LORAS_MAX);
    for (size_t i = 0; i < count; i++, in->lora_count++) {
        const json_t *item = json_array_get(list, i), *scale = json_object_get(item, "scale");
        if (!json_is_number(scale) || !(fabs(json_number_value(scale)) <= TASK_INPUTS_SCALE_MAX))
            return refuse(why, why_bytes, "'scale' is no number from -%d to %d", TASK_INPUTS_SCALE_MAX, TASK_INPUTS_SCALE_MAX);
        in->loras[i].scale = json_number_value(scale);
        if (!read_file(&in->loras[i].file, item, false, why, why_bytes))
            return false;
    }
    return true;
}

static bool read_object(struct task_inputs *in, const json_t *root, char *why, size_t why_bytes)
{
    static const char *const known[] = {"images", "mask", "strength", "loras"};
    const json_t *mask = json_object_get(root, "mask"), *strength = json_object_get(root, "strength");
    const char *name;
    json_t *value;
    if (!json_is_object(root))
        return refuse(why, why_bytes, "no JSON object");
    json_object_foreach((json_t *)(uintptr_t)root, name, value) {
        bool is_known = false;
        for (size_t i = 0; i < sizeof known / sizeof *known; i++)
            is_known = is_known || strcmp(name, known[i]) == 0;
        if (!is_known) /* a newer kiln: what it says must not be left out of the picture */
            return refuse(why, why_bytes, "'%.60s' is not known to this version of kiln", name);
    }
    if (strength && !json_is_number(strength))
        return refuse(why, why_bytes, "'strength' is no number");
    in->strength = json_number_value(strength);
    return read_images(in, json_object_get(root, "images"), why, why_bytes) &&
           (!mask || read_file(&in->mask, mask, true, why, why_bytes)) && read_loras(in, json_object_get(root, "loras"), why, why_bytes) &&
           task_inputs_ok(in, why, why_bytes);
}

bool task_inputs_parse(struct task_inputs *ret, const char *text, char *why, size_t why_bytes)
{
    char said[400];
    json_error_t fault;
    *ret = (struct task_inputs){0};
    if (strlen(text) > TASK_INPUTS_TEXT_MAX)
        return refuse(why, why_bytes, "inputs: %zu bytes, accepted are at most %u", strlen(text), TASK_INPUTS_TEXT_MAX);
    json_t *root = json_loads(text, JSON_REJECT_DUPLICATES, &fault);
    if (!root)
        return refuse(why, why_bytes, "inputs: %s", fault.text);
    bool ok = read_object(ret, root, said, sizeof said);
    json_decref(root);
    if (ok)
        return true;
    task_inputs_done(ret);
    return refuse(why, why_bytes, "inputs: %s", said);
}
