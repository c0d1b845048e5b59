/* kern_module.h - backends that live in a module of their own, opened while the program runs. */
#ifndef KILN_KERN_MODULE_H
#define KILN_KERN_MODULE_H

#include "kern.h"

/* kern_module_open opens a device by name: "cuda" (the first), "cuda:N". The module is libkiln-cuda.so beside the
 * program, in ../lib of it, or where the loader looks; the environment variable KILN_CUDA_MODULE names another file.
 * NULL on failure, then why (a sentence, at most why_bytes) says what and what to do. */
struct kern *kern_module_open(const char *device, char *why, size_t why_bytes);

#endif
