/* kern_dry.h - a dry device: the host code of the CUDA backend runs for a GPU that is not there, and a ledger is kept.
 *
 * No kernel runs, no value is read and no page of device memory exists; what the host code allocates, launches, copies
 * and waits for is as ever, and each launch says how many bytes and FLOPs it costs. Memory beyond the device's is given
 * out all the same, so that the peak of what does not fit is known. Times are computed from the device's published peaks.
 *
 * The module libkiln-dry.so is a developer's tool: the simulator's build makes it (tests/cudasim/dry.cpp) and kern_module.c
 * opens it for "dry:NAME". One device in the life of a process; it may be one of a team (kern_member). */
#ifndef KILN_KERN_DRY_H
#define KILN_KERN_DRY_H

#include "kern.h"
#include "kern_team.h"

struct kern_dry_device {
    const char *name, *full_name;        /* "rtx4090", "NVIDIA GeForce RTX 4090" */
    double bf16_flops, fp8_flops, f32_flops; /* a second: tensor cores, dense, sums in f32; fp8 0: it has none; CUDA cores */
    double memory_bytes_s, link_bytes_s;             /* link: from the host */
    double launch_s, graph_launch_s;                 /* from one launch to the next at best; inside a graph */
    size_t memory_bytes, context_bytes;  /* context_bytes: what the driver is taken to keep of them */
    const char *source, *link_source, *launch_source;
};

/* What happened since the last mark. Launches are kernels, library calls and copies inside the device, those of graphs too;
 * host_launches what the host asked for, a graph being one; copies those between host and device. Seconds: each launch takes
 * the longest of FLOPs over peak, bytes over bandwidth, and launch_s (graph_launch_s in a graph); a sum of a team passes over the link
 * beside launches that do not wait for it; or all copies from the host over the link, if that takes longer than all this, beside
 * which they run. */
struct kern_dry_sums {
    uint64_t launches, host_launches, copies, allocations;
    uint64_t waits, stalls;              /* stalls: waits of the host with launches behind them, so that the device ran dry */
    double flops, tensor_core_flops;
    uint64_t rank_sums;                  /* of a team, one of whose devices this is */
    double rank_sum_bytes;
    double rank_sum_s, rank_sum_wait_s;  /* on the link; and that part of it in which nothing else ran */
    double host_bytes;                   /* that came from the host */
    double bytes, product_bytes;         /* of device memory; product_bytes: those of matrix products, convolutions, attention */
    double recode_bytes;                 /* and those that make one number format of another for products: decode weights, round rows to e4m3 */
    double seconds;
};

/* What the module shows, as the symbol kern_dry. */
struct kern_dry {
    struct kern *(*open)(const char *name, const struct kern_member *member, char *why, size_t why_bytes); /* name: a device's, without "dry:"; NAME:GB gives it so much memory */
    bool (*trace)(const char *path);     /* from now on a line of JSON for each operation; false: cannot be opened */
    void (*mark)(const char *phase);     /* begins a phase (the first, load, began with open): sums are 0 again, the trace gets a line with its name */
    struct kern_dry_sums (*sums)(void);
    size_t (*peak_bytes)(void);          /* of all allocations at once, with context_bytes */
    const struct kern_dry_device *(*device)(void); /* that was opened */
};

#endif
