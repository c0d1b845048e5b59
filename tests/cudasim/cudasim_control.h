/* cudasim_control.h - what a test or a ledger asks the simulator, in C. Everything else it does is the CUDA API.
 * All counters are since the process started or since cudasim_counters_reset. Thread-safe. */
#ifndef CUDASIM_CONTROL_H
#define CUDASIM_CONTROL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* cudasim_cost: the next launch of this host thread reads and writes `bytes` of device memory at least and computes
 * `flops`, on tensor cores or not. GPU_COST calls it. */
void cudasim_cost(double bytes, double flops, bool is_tensor_core);

struct cudasim_counters {
    uint64_t launches;          /* kernels that entered a stream, those replayed from graphs and library calls included */
    uint64_t graph_launches;    /* cudaGraphLaunch */
    uint64_t library_calls;     /* cublasLtMatmul among the launches */
    uint64_t collectives;       /* NCCL operations */
    uint64_t copies, memsets;   /* cudaMemcpy*, cudaMemset* */
    uint64_t host_waits;        /* calls in which the host waited for a device */
    uint64_t host_stalls;       /* those that a launch followed: the device had run dry */
    uint64_t allocations, frees; /* device memory */
    uint64_t calls;             /* of the whole API: what fault point `any` counts */
    uint64_t host_to_device_bytes, device_to_host_bytes, device_to_device_bytes;
    uint64_t collective_bytes;  /* payload this process's ranks gave to NCCL */
    double bytes;               /* declared by launches and known of library calls */
    double flops, tensor_core_flops;
};
void cudasim_counters_read(struct cudasim_counters *counters);
void cudasim_counters_reset(void);

struct cudasim_memory {
    size_t capacity_bytes, used_bytes, peak_bytes;
    size_t allocation_count;
};
/* cudasim_memory_read: false when there is no such device. */
bool cudasim_memory_read(int device, struct cudasim_memory *memory);
void cudasim_memory_reset_peak(int device);

/* cudasim_fault: a new list of faults instead of CUDASIM_FAULT's, counted from now; NULL or "": none. False when the
 * list cannot be read; then nothing changed. README.md has the grammar. */
bool cudasim_fault(const char *list);

/* cudasim_restore: lost or failed devices work again, as after a restart of the process; errors are forgotten. */
void cudasim_restore(void);

/* cudasim_order: "fwd", "rev" or "rand:N": the order of fibers, and of graph nodes without an edge between them. */
bool cudasim_order(const char *order);

/* cudasim_error: the sentence behind the last kernel failure or refused call, "" for none. The text is the calling
 * thread's copy, valid until its next call. */
const char *cudasim_error(void);

/* cudasim_leaks: what is still allocated or open, a line each, at most `capacity` bytes; returns how many. */
size_t cudasim_leaks(char *text, size_t capacity);

/* cudasim_trace: from now on every operation is a line of JSON in this file; NULL ends it. False: cannot be opened. */
bool cudasim_trace(const char *path);

/* cudasim_watch: from now on each launch, each copy inside a device and each collective is shown to `see` as it enters its stream, on the
 * thread that asked for it; NULL ends it. What `see` returns is how long it takes, in seconds: each stream has a clock of what its work
 * took, and a stream that waits for an event, or a node of a graph for others, is not before them. Other work takes no time. */
struct cudasim_launch {
    const char *name;           /* of the kernel or library call, or "DeviceToDevice"; valid during the call */
    double bytes, flops;
    bool is_library, is_tensor_core, is_fp8;
    bool is_collective;         /* bytes: payload */
    bool is_in_graph;           /* one of a graph that is launched as a whole */
};
void cudasim_watch(double (*see)(const struct cudasim_launch *launch));

/* cudasim_clock: that of the latest stream, which all streams have from now on. */
double cudasim_clock(void);

/* cudasim_mark writes {"op":"mark","name":name} to the trace: where a step begins. */
void cudasim_mark(const char *name);

/* --- counted builds (README.md: bank conflicts and coalescing) ------------------------------------------------------ */

struct cudasim_access {
    uint64_t shared_requests, shared_wavefronts, shared_ideal; /* wavefronts without conflicts */
    uint64_t global_requests, global_sectors, global_ideal;    /* sectors of 32 bytes; ideal: if none were half used */
    uint64_t read_bytes, written_bytes;                        /* of device memory, as requested by the lanes */
};
/* cudasim_access_read: sums over all launches of the kernel whose name contains this text; NULL: of all. False: no
 * counted kernel of that name ran. */
bool cudasim_access_read(const char *kernel, struct cudasim_access *access);

#ifdef __cplusplus
}
#endif
#endif
