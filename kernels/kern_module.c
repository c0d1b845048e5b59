/* kern_module.c - opens libkiln-cuda.so: a program without CUDA's libraries starts everywhere, and says in one sentence
 * what is missing when it is asked for a GPU.
 *
 * A module stays open for the life of the process: CUDA's libraries cannot be unloaded safely. */
#include "kern_module.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kern_cuda.h"

#define MODULE "libkiln-cuda.so"
#define DEVICES_MAX 64

/* "cuda" or "cuda:N". */
static bool device_number(const char *text, int *ret)
{
    if (strncmp(text, "cuda", 4) != 0)
        return false;
    *ret = 0;
    if (text[4] == 0)
        return true;
    char *end;
    errno = 0;
    long number = strtol(text + 5, &end, 10);
    if (text[4] != ':' || text[5] < '0' || text[5] > '9' || *end || errno || number >= DEVICES_MAX)
        return false;
    *ret = (int)number;
    return true;
}

static void *open_beside_program(void)
{
    static const char *const places[] = {"/" MODULE, "/../lib/" MODULE};
    char program[4096];
    ssize_t length = readlink("/proc/self/exe", program, sizeof program - sizeof "/../lib/" MODULE);
    if (length <= 0)
        return NULL;
    program[length] = 0;
    char *slash = strrchr(program, '/');
    for (size_t i = 0; slash && i < sizeof places / sizeof places[0]; i++) {
        strcpy(slash, places[i]);
        if (access(program, F_OK) == 0)
            return dlopen(program, RTLD_NOW | RTLD_LOCAL);
    }
    return NULL;
}

static void *open_module(char *why, size_t why_bytes)
{
    const char *named = getenv("KILN_CUDA_MODULE");
    void *module = named && *named ? dlopen(named, RTLD_NOW | RTLD_LOCAL) : open_beside_program();
    if (!module && (!named || !*named) && !dlerror())
        module = dlopen(MODULE, RTLD_NOW | RTLD_LOCAL);
    if (!module)
        snprintf(why, why_bytes,
                 "no CUDA device: the module that drives it cannot be opened (%s); install it or render with --device cpu",
                 dlerror());
    return module;
}

/* Modules of another version have another table. */
static bool fits(const struct kern_cuda_layout *layout, char *why, size_t why_bytes)
{
    if (layout && strcmp(layout->version, KILN_VERSION) == 0 && layout->kern_bytes == sizeof(struct kern) &&
        layout->ops_bytes == sizeof(struct kern_ops) && layout->weight_bytes == sizeof(struct kern_weight))
        return true;
    snprintf(why, why_bytes, "no CUDA device: the module %s is of version %s, this program of %s; install the same build of both",
             MODULE, layout ? layout->version : "(unknown)", KILN_VERSION);
    return false;
}

struct kern *kern_module_open(const char *device, char *why, size_t why_bytes)
{
    struct kern_cuda_options options;
    if (!device_number(device, &options.device)) {
        snprintf(why, why_bytes, "device '%s', accepted: cpu, cuda, cuda:N", device);
        return NULL;
    }
    void *module = open_module(why, why_bytes);
    if (!module)
        return NULL;
    struct kern *(*open)(const struct kern_cuda_options *, char *, size_t);
    *(void **)&open = dlsym(module, "kern_cuda_open");
    if (!fits(dlsym(module, "kern_cuda_layout"), why, why_bytes) || !open)
        return NULL;
    return open(&options, why, why_bytes);
}
