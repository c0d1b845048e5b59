/* kern_cuda.h - the CUDA backend: one device, one stream. Built as the module libkiln-cuda.so, which kern_module.c opens
 * while the program runs, so that a program without CUDA's libraries starts everywhere. */
#ifndef KILN_KERN_CUDA_H
#define KILN_KERN_CUDA_H

#include "kern_ops.h"

struct kern_cuda_options {
    int device; /* as the CUDA runtime counts, after CUDA_VISIBLE_DEVICES */
    struct kern_member member; /* in a team */
    bool is_dry; /* see kern_is_dry: nothing is converted on its way to the device */
};

/* kern_cuda_open takes the device. NULL on failure, then why (a sentence, at most why_bytes) says what. The device needs
 * compute capability 8.0 and the sm_80 feature set: bf16 tensor cores, cp.async, 99 KB of shared memory in a block. */
struct kern *kern_cuda_open(const struct kern_cuda_options *options, char *why, size_t why_bytes);

/* kern_cuda_count: how many devices there are, at least 1; 0 when there is none or no driver, then why says what to do. */
int kern_cuda_count(char *why, size_t why_bytes);

/* What the module was built against. A module of another version is refused: the table would not fit. */
struct kern_cuda_layout {
    char version[16];
    size_t kern_bytes, ops_bytes, weight_bytes;
};
extern const struct kern_cuda_layout kern_cuda_layout;

#endif
