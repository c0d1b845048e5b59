/* row_inputs.c - see row_inputs.h. A file is known by its real path: two names of one file are one file. */
#include "row_inputs.h"

#include "digest.h"
#include "input_file.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool row_inputs_begin(struct row_inputs *r, const char *title, const struct prompt_inputs *options)
{
    const char *slash = title ? strrchr(title, '/') : NULL;
    *r = (struct row_inputs){.options = *options};
    if (slash)
        r->folder = strndup(title, (size_t)(slash - title) + 1);
    return !slash || r->folder;
}

void row_inputs_done(struct row_inputs *r)
{
    tally_done(&r->known);
    free(r->files);
    free(r->folder);
    *r = (struct row_inputs){0};
}

/* The real path of what stands in `folder` (NULL: here); the caller frees. */
static char *real_path(const char *folder, const char *name)
{
    char path[PATH_MAX];
    int length = snprintf(path, sizeof path, "%s%s", folder && name[0] != '/' ? folder : "", name);
    if (length < (int)sizeof path)
        return realpath(path, NULL);
    errno = ENAMETOOLONG;
    return NULL;
}

/* Reads a file that was not seen before. */
static bool read_file(struct row_inputs_file *ret, struct task_inputs_file *file, bool is_image, char *why, size_t why_bytes)
{
    enum input_fault fault;
    if (!(is_image ? input_file_image(file, NULL, &fault, why, why_bytes) : input_file_adapter(file, &fault, why, why_bytes)))
        return false;
    *ret = (struct row_inputs_file){.width = file->width, .height = file->height};
    for (int i = 0; i < 32; i++)
        sscanf(file->sha256 + 2 * i, "%2hhx", &ret->sha256[i]);
    return true;
}

static bool no_memory(char *why, size_t why_bytes)
{
    snprintf(why, why_bytes, "no memory for what its files hold");
    return false;
}

/* Hash and size of the file at file->path, from memory when it was read before. */
static bool look_up(struct row_inputs *r, struct task_inputs_file *file, bool is_image, char *why, size_t why_bytes)
{
    char name[PATH_MAX + 1];
    uint8_t key[32];
    int length = snprintf(name, sizeof name, "%c%s", is_image ? 'i' : 'l', file->path); /* one file may serve as both */
    struct tally_slot *slot = digest_bytes(name, (size_t)length, key) ? tally_add(&r->known, key) : NULL;
    if (!slot)
        return no_memory(why, why_bytes);
    if (slot->mark == 0) {
        struct row_inputs_file found, *grown = r->files;
        if (!read_file(&found, file, is_image, why, why_bytes))
            return false;
        if (r->count == r->room)
            grown = realloc(r->files, (r->room = r->room ? 2 * r->room : 64) * sizeof *r->files);
        if (!grown)
            return no_memory(why, why_bytes);
        r->files = grown;
        r->files[r->count++] = found;
        slot->mark = (uint32_t)r->count;
    }
    const struct row_inputs_file *known = &r->files[slot->mark - 1];
    digest_hex(known->sha256, 32, file->sha256);
    file->width = known->width;
    file->height = known->height;
    return true;
}

/* One file of a task; `what` names the column in the sentence. */
static bool find_file(struct row_inputs *r, struct task_inputs_file *ret, const char *what, const char *folder, const char *name, char *why,
                      size_t why_bytes)
{
    char text[PATH_MAX + 600];
    ret->path = real_path(folder, name);
    if (!ret->path) {
        snprintf(why, why_bytes, "%s '%.200s': cannot be read: %s", what, name, strerror(errno));
        return false;
    }
    if (json_text_utf8_fault(ret->path, strlen(ret->path)) != strlen(ret->path)) { /* a link or a folder above it */
        snprintf(why, why_bytes, "%s '%.200s': its real path is no UTF-8 text", what, name);
        return false;
    }
    if (look_up(r, ret, strcmp(what, "lora") != 0, text, sizeof text))
        return true;
    snprintf(why, why_bytes, "%s %s", what, text);
    return false;
}

static bool find_lora(struct row_inputs *r, struct task_inputs_lora *ret, const char *folder, const char *word, char *why, size_t why_bytes)
{
    char name[PATH_MAX];
    size_t length;
    if (!task_inputs_read_lora(word, &length, &ret->scale, why, why_bytes))
        return false;
    if (length >= sizeof name) {
        snprintf(why, why_bytes, "lora '%.200s': %s", word, strerror(ENAMETOOLONG));
        return false;
    }
    snprintf(name, sizeof name, "%.*s", (int)length, word);
    return find_file(r, &ret->file, "lora", folder, name, why, why_bytes);
}

/* The database and the wire take a text of so many bytes. */
static bool text_fits(const struct task_inputs *in, char *why, size_t why_bytes)
{
    struct json_text text = {0};
    task_inputs_text(&text, in);
    bool ok = !text.failed && text.length <= TASK_INPUTS_TEXT_MAX;
    if (text.failed)
        no_memory(why, why_bytes);
    else if (!ok)
        snprintf(why, why_bytes, "the paths of its files are %zu bytes as JSON: accepted are at most %u", text.length, TASK_INPUTS_TEXT_MAX);
    json_text_done(&text);
    return ok;
}

bool row_inputs_of(struct row_inputs *r, const struct prompt_row *row, struct task_inputs *ret, char *why, size_t why_bytes)
{
    const struct prompt_inputs *in = &row->inputs, *o = &r->options;
    const struct prompt_inputs *images = in->image_count ? in : o, *masks = in->mask ? in : o, *loras = in->lora_count ? in : o;
    bool ok = true;
    *ret = (struct task_inputs){.strength = in->strength != 0 ? in->strength : o->strength};
    for (int i = 0; ok && i < images->image_count; ret->image_count = ++i)
        ok = find_file(r, &ret->images[i], "image", images == in ? r->folder : NULL, images->images[i], why, why_bytes);
    if (ok && masks->mask)
        ok = find_file(r, &ret->mask, "mask", masks == in ? r->folder : NULL, masks->mask, why, why_bytes);
    for (int i = 0; ok && i < loras->lora_count; ret->lora_count = ++i)
        ok = find_lora(r, &ret->loras[i], loras == in ? r->folder : NULL, loras->loras[i], why, why_bytes);
    if (ok && task_inputs_ok(ret, why, why_bytes) && text_fits(ret, why, why_bytes))
        return true;
    task_inputs_done(ret);
    return false;
}
