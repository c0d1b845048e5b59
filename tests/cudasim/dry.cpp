/* dry.cpp - kernels/kern_dry.h: the product's backend on the simulator in dry mode, and the time a GPU would need at best.
 *
 * Peaks are what the vendor publishes: dense, sums in f32. A real kernel reaches a part of them (its file says which part
 * is expected), so the times are a lower bound of the device's work, not a forecast. */
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

#include "cudasim_control.h"
#include "device.h"

extern "C" {
#include "kern_cuda.h"
#include "kern_dry.h"
}

namespace
{

constexpr size_t CONTEXT_MB = 500; /* a driver takes 300 to 500 */
constexpr double LAUNCH_S = 3.8e-6, GRAPH_LAUNCH_S = 3.4e-6;
const char *const LAUNCH_SOURCE = "NVIDIA, Getting Started with CUDA Graphs: short kernels on one stream, 3.8 us each, in a graph 3.4";
const char *const ADA = "NVIDIA Ada GPU architecture white paper";

constexpr double PCIE4 = 16 * 16e9 * 128 / 130 / 8, PCIE5 = 2 * PCIE4; /* 16 lanes, 128b/130b */
const char *const LINK_SOURCE = "16 lanes of PCI Express 4.0 (H100: 5.0)";

const struct kern_dry_device devices[] = {
    {"h100", "", 989.4e12, 1978.9e12, 66.9e12, 3.35e12, PCIE5, LAUNCH_S, GRAPH_LAUNCH_S, 0, 0, "NVIDIA H100 (SXM5) data sheet", LINK_SOURCE, LAUNCH_SOURCE},
    {"rtx4090", "", 165.2e12, 330.3e12, 82.6e12, 1008e9, PCIE4, LAUNCH_S, GRAPH_LAUNCH_S, 0, 0, ADA, LINK_SOURCE, LAUNCH_SOURCE},
    {"rtx3090", "", 71.0e12, 0, 35.6e12, 936e9, PCIE4, LAUNCH_S, GRAPH_LAUNCH_S, 0, 0, "NVIDIA Ampere GA102 GPU architecture white paper", LINK_SOURCE,
     LAUNCH_SOURCE},
    {"rtx4070ti", "", 80.2e12, 160.4e12, 40.1e12, 504e9, PCIE4, LAUNCH_S, GRAPH_LAUNCH_S, 0, 0,
     "60 SMs at 2.61 GHz with the rates of an SM in the Ada white paper; 504 GB/s: NVIDIA's product page", LINK_SOURCE, LAUNCH_SOURCE},
};

std::mutex &mutex = *new std::mutex; /* guards what follows */
struct kern_dry_device chosen;
std::string &chosen_by = *new std::string; /* the word that named it */
struct kern_dry_sums seen; /* launches and what they cost */
uint64_t device_copies;
double launch_s, clock_s; /* what all launches took; the clock at the mark */

/* Matrix products, convolutions and attention; the rest moves and adds rows. */
bool is_product(const cudasim_launch *l)
{
    static const char *const kernels[] = {"gemm_", "flash_", "wide_", "plain_"};
    bool found = l->is_library;
    for (const char *name : kernels)
        found = found || strstr(l->name, name);
    return found;
}

bool is_recoding(const cudasim_launch *l)
{
    return strstr(l->name, "dequant_") || strstr(l->name, "fp8_");
}

double see(const cudasim_launch *l)
{
    std::lock_guard<std::mutex> lock(mutex);
    if (l->is_collective)
        return l->bytes / chosen.link_bytes_s; /* two ranks send each other all of it, at once */
    double peak = l->is_fp8 && chosen.fp8_flops > 0 ? chosen.fp8_flops : l->is_tensor_core ? chosen.bf16_flops : chosen.f32_flops;
    double compute = l->flops / peak, memory = l->bytes / chosen.memory_bytes_s;
    double longer = compute > memory ? compute : memory;
    double least = l->is_in_graph ? chosen.graph_launch_s : chosen.launch_s;
    seen.launches++;
    seen.host_launches += !l->is_in_graph;
    device_copies += !strcmp(l->name, "DeviceToDevice");
    seen.flops += l->flops;
    seen.tensor_core_flops += l->is_tensor_core ? l->flops : 0;
    seen.bytes += l->bytes;
    seen.product_bytes += is_product(l) ? l->bytes : 0;
    seen.recode_bytes += is_recoding(l) ? l->bytes : 0;
    launch_s += std::max(longer, least);
    return std::max(longer, least);
}

/* NAME or NAME:GB; gb 0: the device's own memory. */
const struct kern_dry_device *find(const std::string &word, int *gb)
{
    size_t colon = word.find(':');
    char *end = nullptr;
    *gb = 0;
    if (colon != std::string::npos) {
        long value = strtol(word.c_str() + colon + 1, &end, 10);
        if (*end || value < 1 || value > 1024)
            return nullptr;
        *gb = static_cast<int>(value);
    }
    for (const struct kern_dry_device &d : devices)
        if (word.substr(0, colon) == d.name)
            return &d;
    return nullptr;
}

bool refuse(char *why, size_t why_bytes, const char *name)
{
    int used = snprintf(why, why_bytes, "dry device '%s', accepted:", name);
    for (const struct kern_dry_device &d : devices)
        if (used > 0 && static_cast<size_t>(used) < why_bytes)
            used += snprintf(why + used, why_bytes - static_cast<size_t>(used), " dry:%s", d.name);
    if (used > 0 && static_cast<size_t>(used) < why_bytes)
        snprintf(why + used, why_bytes - static_cast<size_t>(used), ", or with another memory, 1 to 1024 GB: dry:%s:16", devices[0].name);
    return false;
}

/* The simulator reads its environment at its first use, once. */
bool choose(const char *name, char *why, size_t why_bytes)
{
    int gb;
    const struct kern_dry_device *d = find(name, &gb);
    if (!d)
        return refuse(why, why_bytes, name);
    if (chosen.name) {
        snprintf(why, why_bytes, "dry device '%s': this process has %s already", name, chosen_by.c_str());
        return false;
    }
    setenv("CUDASIM_MODE", "dry", 1);
    setenv("CUDASIM_OVERBOOK", "1", 1);
    setenv("CUDASIM_DEVICE", d->name, 1);
    if (gb)
        setenv("CUDASIM_VRAM_MB", std::to_string(gb * 1024).c_str(), 1);
    setenv("CUDASIM_CONTEXT_MB", std::to_string(CONTEXT_MB).c_str(), 0);
    const cudasim::Device *device = cudasim::device_at(0);
    chosen = *d;
    chosen_by = name;
    chosen.full_name = device->profile->full_name;
    chosen.memory_bytes = device->capacity_bytes;
    chosen.context_bytes = device->used_bytes;
    cudasim_watch(see);
    cudasim_mark("load");
    return true;
}

struct kern *open_device(const char *name, const struct kern_member *member, char *why, size_t why_bytes)
{
    if (chosen_by != name && !choose(name, why, why_bytes))
        return nullptr;
    struct kern_cuda_options options = {0, *member, true};
    return kern_cuda_open(&options, why, why_bytes);
}

void mark(const char *phase)
{
    cudasim_mark(phase);
    cudasim_counters_reset();
    double clock = cudasim_clock();
    std::lock_guard<std::mutex> lock(mutex);
    seen = {};
    device_copies = 0;
    launch_s = 0;
    clock_s = clock;
}

struct kern_dry_sums sums()
{
    cudasim_counters c;
    cudasim_counters_read(&c);
    double clock = cudasim_clock();
    std::lock_guard<std::mutex> lock(mutex);
    struct kern_dry_sums s = seen;
    s.host_launches += c.graph_launches;
    s.copies = c.copies - device_copies;
    s.allocations = c.allocations;
    s.rank_sums = c.collectives;
    s.rank_sum_bytes = static_cast<double>(c.collective_bytes);
    s.seconds = clock - clock_s;
    s.rank_sum_s = s.rank_sum_bytes / chosen.link_bytes_s;
    s.rank_sum_wait_s = s.seconds - launch_s;
    s.host_bytes = static_cast<double>(c.host_to_device_bytes);
    s.seconds = std::max(s.seconds, s.host_bytes / chosen.link_bytes_s);
    s.waits = c.host_waits;
    s.stalls = c.host_stalls;
    return s;
}

size_t peak_bytes()
{
    cudasim_memory memory;
    return cudasim_memory_read(0, &memory) ? memory.peak_bytes : 0;
}

const struct kern_dry_device *device()
{
    return &chosen;
}

} // namespace

extern "C" __attribute__((visibility("default"))) const struct kern_dry kern_dry;
const struct kern_dry kern_dry = {open_device, cudasim_trace, mark, sums, peak_bytes, device};
