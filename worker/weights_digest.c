/* weights_digest.c - the list: "model HEX\n", "transformer HEX\n" .. "adapter STRENGTH HEX\n" for what is given, in this order. */
#include "weights_digest.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "digest.h"

bool weights_digest_file(const char *path, char ret_hex[65])
{
    char why[512];
    uint64_t bytes;
    return digest_file(path, ret_hex, &bytes, why, sizeof why);
}

static bool digest_path(const char *path, char ret_hex[65], char *why, size_t why_bytes)
{
    struct stat st;
    uint64_t bytes;
    if (stat(path, &st) == 0 && S_ISDIR(st.st_mode))
        return digest_model(path, ret_hex, why, why_bytes);
    return digest_file(path, ret_hex, &bytes, why, why_bytes);
}

bool weights_digest_of(const struct engine_options *o, const char *const *adapters_hex, char ret_hex[65], char *why, size_t why_bytes)
{
    const struct { const char *name, *path; } given[] = {{"transformer", o->transformer}, {"text_encoder", o->text_encoder},
                                                         {"vae", o->vae}, {"tokenizer", o->tokenizer}};
    const char *parts[sizeof given / sizeof *given + 1] = {NULL};
    char list[4096], hex[65];
    size_t used = 0, part_count = 0;
    for (size_t i = 0; i < sizeof given / sizeof *given; i++)
        if (given[i].path)
            parts[part_count++] = given[i].name;
    if (o->model_dir && !digest_model_without(o->model_dir, parts, hex, why, why_bytes))
        return false;
    if (o->model_dir && !part_count && !o->adapter_count) {
        memcpy(ret_hex, hex, sizeof hex);
        return true;
    }
    if (o->model_dir)
        used = (size_t)snprintf(list, sizeof list, "model %s\n", hex);
    for (size_t i = 0; i < sizeof given / sizeof *given; i++) {
        if (!given[i].path)
            continue;
        if (!digest_path(given[i].path, hex, why, why_bytes))
            return false;
        used += (size_t)snprintf(list + used, sizeof list - used, "%s %s\n", given[i].name, hex);
    }
    for (int i = 0; i < o->adapter_count; i++)
        used += (size_t)snprintf(list + used, sizeof list - used, "adapter %.9g %s\n", (double)o->adapters[i].strength, adapters_hex[i]);
    if (digest_of(list, used, ret_hex))
        return true;
    snprintf(why, why_bytes, "no memory to hash");
    return false;
}

/* --- beside other work --------------------------------------------------------------------------------------- */

static void *run(void *context)
{
    struct weights_digest_task *t = context;
    digest_stop_when(&t->stop);
    t->ok = weights_digest_of(t->options, t->adapters_hex, t->hex, t->why, sizeof t->why);
    return NULL;
}

bool weights_digest_begin(struct weights_digest_task *t, const struct engine_options *o, const char *const *adapters_hex, char *why,
                          size_t why_bytes)
{
    *t = (struct weights_digest_task){.options = o, .adapters_hex = adapters_hex};
    int error = pthread_create(&t->thread, NULL, run, t);
    if (error)
        snprintf(why, why_bytes, "no thread to hash the weights: %s", strerror(error));
    return error == 0;
}

bool weights_digest_end(struct weights_digest_task *t, char ret_hex[65], char *why, size_t why_bytes)
{
    pthread_join(t->thread, NULL);
    if (t->ok)
        memcpy(ret_hex, t->hex, sizeof t->hex);
    else
        snprintf(why, why_bytes, "%s", t->why);
    return t->ok;
}

void weights_digest_drop(struct weights_digest_task *t)
{
    atomic_store(&t->stop, true);
    pthread_join(t->thread, NULL);
}
