/* kern_module.h - backends that live in a module of their own, opened while the program runs. */
#ifndef KILN_KERN_MODULE_H
#define KILN_KERN_MODULE_H

#include "kern.h"
#include "kern_team.h"

/* kern_module_open opens a device by name: "cuda" (the first), "cuda:N", or "dry:NAME", which is none (kern_dry.h). The
 * module, libkiln-cuda.so or libkiln-dry.so, is beside the program, in ../lib of it, or where the loader looks; the
 * environment variable KILN_CUDA_MODULE or KILN_DRY_MODULE names another file. member: its place in a team, or NULL.
 * NULL on failure, then why (a sentence, at most why_bytes) says what and what to do. */
struct kern *kern_module_open(const char *device, const struct kern_member *member, char *why, size_t why_bytes);

/* kern_module_count: how many CUDA devices "cuda:N" may name, at least 1. 0 on failure, as above. */
int kern_module_count(char *why, size_t why_bytes);

/* kern_module_dry: the ledger of dry devices; it opens their module. NULL on failure, as above. */
struct kern_dry;
const struct kern_dry *kern_module_dry(char *why, size_t why_bytes);

#endif
