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

/* The module in the program's folder or the lib/ next to it, if it is there. */
static bool find_beside_program(char *ret, size_t ret_bytes)
{
    static const char *const places[] = {"/" MODULE, "/../lib/" MODULE};
    ssize_t length = readlink("/proc/self/exe", ret, ret_bytes - sizeof "/../lib/" MODULE);
    if (length <= 0)
        return false;
    ret[length] = 0;
    char *slash = strrchr(ret, '/');
    for (size_t i = 0; slash && i < sizeof places / sizeof places[0]; i++) {
        strcpy(slash, places[i]);
        if (access(ret, F_OK) == 0)
            return true;
    }
    return false;
}

/* The file KILN_CUDA_MODULE names, else the one beside the program, else wherever the loader looks. */
static void *open_module(char *why, size_t why_bytes)
{
    char beside[4096];
    const char *file = getenv("KILN_CUDA_MODULE");
    if (!file || !*file)
        file = find_beside_program(beside, sizeof beside) ? beside : MODULE;
    void *module = dlopen(file, RTLD_NOW | RTLD_LOCAL);
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
    if (!fits(open ? dlsym(module, "kern_cuda_layout") : NULL, why, why_bytes))
        return NULL;
    return open(&options, why, why_bytes);
}
