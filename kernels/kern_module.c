/* kern_module.c - opens libkiln-cuda.so: a program without CUDA's libraries starts everywhere, and says in one sentence
 * what is missing when it is asked for a GPU. For a dry device, libkiln-dry.so: the same backend on the simulator.
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
#include "kern_dry.h"

#define DEVICES_MAX 64
#define FILE_BYTES_MAX 32

struct module {
    const char *file, *variable;
    const char *lacking, *remedy; /* of the sentence when it cannot be opened */
};

static const struct module cuda_module = {"libkiln-cuda.so", "KILN_CUDA_MODULE", "no CUDA device",
                                          "install it or render with --device cpu"};
static const struct module dry_module = {"libkiln-dry.so", "KILN_DRY_MODULE", "no dry device",
                                         "it is a developer's tool: cmake --preset sim && cmake --build --preset sim makes it, "
                                         "and build/sim/bin/kiln-worker, which finds it"};

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
static bool find_beside_program(const struct module *m, char *ret, size_t ret_bytes)
{
    static const char *const places[] = {"/", "/../lib/"};
    ssize_t length = readlink("/proc/self/exe", ret, ret_bytes - FILE_BYTES_MAX);
    if (length <= 0)
        return false;
    ret[length] = 0;
    char *slash = strrchr(ret, '/');
    for (size_t i = 0; slash && i < sizeof places / sizeof places[0]; i++) {
        snprintf(slash, FILE_BYTES_MAX, "%s%s", places[i], m->file);
        if (access(ret, F_OK) == 0)
            return true;
    }
    return false;
}

/* The file the variable names, else the one beside the program, else wherever the loader looks. */
static void *open_file(const struct module *m, char *why, size_t why_bytes)
{
    char beside[4096];
    const char *file = getenv(m->variable);
    if (!file || !*file)
        file = find_beside_program(m, beside, sizeof beside) ? beside : m->file;
    void *handle = dlopen(file, RTLD_NOW | RTLD_LOCAL);
    if (!handle)
        snprintf(why, why_bytes, "%s: the module that drives it cannot be opened (%s); %s", m->lacking, dlerror(), m->remedy);
    return handle;
}

/* Modules of another version have another table. */
static bool fits(const struct kern_cuda_layout *layout)
{
    return layout && strcmp(layout->version, KILN_VERSION) == 0 && layout->kern_bytes == sizeof(struct kern) &&
           layout->ops_bytes == sizeof(struct kern_ops) && layout->weight_bytes == sizeof(struct kern_weight);
}

/* What the module shows under this name. */
static void *open_symbol(const struct module *m, const char *name, char *why, size_t why_bytes)
{
    void *handle = open_file(m, why, why_bytes);
    if (!handle)
        return NULL;
    void *symbol = dlsym(handle, name);
    const struct kern_cuda_layout *layout = symbol ? dlsym(handle, "kern_cuda_layout") : NULL;
    if (fits(layout))
        return symbol;
    snprintf(why, why_bytes, "%s: the module %s is of version %s, this program of %s; install the same build of both", m->lacking,
             m->file, layout ? layout->version : "(unknown)", KILN_VERSION);
    return NULL;
}

const struct kern_dry *kern_module_dry(char *why, size_t why_bytes)
{
    return open_symbol(&dry_module, "kern_dry", why, why_bytes);
}

int kern_module_count(char *why, size_t why_bytes)
{
    int (*count)(char *, size_t);
    *(void **)&count = open_symbol(&cuda_module, "kern_cuda_count", why, why_bytes);
    return count ? count(why, why_bytes) : 0;
}

struct kern *kern_module_open(const char *device, const struct kern_member *member, char *why, size_t why_bytes)
{
    struct kern_cuda_options options = {.member = member ? *member : (struct kern_member){0}};
    if (strncmp(device, "dry:", 4) == 0) {
        const struct kern_dry *dry = kern_module_dry(why, why_bytes);
        return dry ? dry->open(device + 4, &options.member, why, why_bytes) : NULL;
    }
    if (!device_number(device, &options.device)) {
        snprintf(why, why_bytes, "device '%s', accepted: cpu, cuda, cuda:N, dry:NAME", device);
        return NULL;
    }
    struct kern *(*open)(const struct kern_cuda_options *, char *, size_t);
    *(void **)&open = open_symbol(&cuda_module, "kern_cuda_open", why, why_bytes);
    return open ? open(&options, why, why_bytes) : NULL;
}
