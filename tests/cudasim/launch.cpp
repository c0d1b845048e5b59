/* launch.cpp - a kernel launch: checked as a driver would, then put into its stream. */
#include <map>
#include <mutex>

#include "cudasim.h"
#include "device.h"
#include "inject.h"
#include "schedule.h"
#include "stream.h"

namespace cudasim
{

static std::mutex &mutex = *new std::mutex; /* guards shared_limits */
static std::map<const void *, int> &shared_limits = *new std::map<const void *, int>; /* cudaFuncSetAttribute */

enum { SHARED_DEFAULT = 48 << 10, GRID_YZ_MAX = 65535, BLOCK_Z_MAX = 64 };

static int shared_limit(const void *function)
{
    std::lock_guard<std::mutex> lock(mutex);
    auto found = shared_limits.find(function);
    return found == shared_limits.end() ? static_cast<int>(SHARED_DEFAULT) : found->second;
}

static cudaError_t check_shape(const Launch &l)
{
    uint64_t threads = static_cast<uint64_t>(l.block.x) * l.block.y * l.block.z;
    std::string name = l.name;
    if (threads < 1 || threads > THREADS_MAX || l.block.z > BLOCK_Z_MAX)
        return refuse(cudaErrorInvalidConfiguration, name + ": a block of " + std::to_string(threads) + " threads");
    if (!l.grid.x || !l.grid.y || !l.grid.z || l.grid.x > 0x7fffffffu || l.grid.y > GRID_YZ_MAX || l.grid.z > GRID_YZ_MAX)
        return refuse(cudaErrorInvalidConfiguration, name + ": a grid of " + std::to_string(l.grid.x) + " x " +
                                                         std::to_string(l.grid.y) + " x " + std::to_string(l.grid.z));
    int limit = shared_limit(l.function);
    if (l.shared_bytes > static_cast<size_t>(limit))
        return refuse(cudaErrorInvalidValue, name + ": " + std::to_string(l.shared_bytes) +
                                                 " bytes of dynamic shared memory, its limit is " + std::to_string(limit) +
                                                 " (cudaFuncAttributeMaxDynamicSharedMemorySize)");
    return cudaSuccess;
}

void check_copy(Where where, const void *to, const void *from)
{
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
        fail(where, "cp.async: %p or %p is not 16-byte aligned", to, from);
    if (device_of(to))
        fail(where, "cp.async: the target is device memory, not shared memory");
    if (from && !device_of(from))
        fail(where, "cp.async: the source is not device memory");
}

void launch(const Launch &l)
{
    std::shared_ptr<void> arguments(l.arguments, l.release);
    Cost cost = ledger_take_cost();
    cudaError_t e = enter(Point::LAUNCH, l.name);
    if (e || (e = check_shape(l))) {
        refuse(e);
        return;
    }
    Stream *s = stream_find(l.stream);
    auto work = std::make_shared<Work>();
    work->kind = Work::KERNEL;
    work->name = l.name;
    work->grid = l.grid;
    work->block = l.block;
    work->shared_bytes = l.shared_bytes;
    work->cost = cost;
    Device *device = device_at(s->device);
    work->run = [l, arguments, device] {
        std::string error;
        if (cudaError_t code = run_kernel(l, &error))
            device_fail(device, code, error);
    };
    refuse(submit(s, work));
}

} // namespace cudasim

using namespace cudasim;

extern "C" {

cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value)
{
    if (cudaError_t e = enter(Point::OTHER, "cudaFuncSetAttribute"))
        return refuse(e);
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
        return cudaSuccess; /* carve-outs and the like change speed only */
    int most = device_current()->profile->shared_optin_kb << 10;
    if (value < 0 || value > most)
        return refuse(cudaErrorInvalidValue, "cudaFuncSetAttribute: " + std::to_string(value) +
                                                 " bytes of dynamic shared memory, the device has " + std::to_string(most));
    std::lock_guard<std::mutex> lock(mutex);
    shared_limits[function] = value;
    return cudaSuccess;
}

/* Registers and local memory are nvcc's to say: 0 here. */
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function)
{
    if (cudaError_t e = enter(Point::OTHER, "cudaFuncGetAttributes"))
        return refuse(e);
    *attributes = cudaFuncAttributes();
    attributes->maxThreadsPerBlock = THREADS_MAX;
    attributes->maxDynamicSharedSizeBytes = shared_limit(function);
    attributes->binaryVersion = attributes->ptxVersion =
        device_current()->profile->major * 10 + device_current()->profile->minor;
    return cudaSuccess;
}

/* By threads and shared memory alone: registers are not known here. */
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *, int block_size, size_t shared_bytes)
{
    if (cudaError_t e = enter(Point::OTHER, "cudaOccupancyMaxActiveBlocksPerMultiprocessor"))
        return refuse(e);
    const Profile *p = device_current()->profile;
    int by_threads = block_size > 0 ? p->threads_per_sm / block_size : 0;
    int by_shared = static_cast<int>((static_cast<size_t>(p->shared_sm_kb) << 10) / (shared_bytes + 1024));
    *blocks = by_threads < by_shared ? by_threads : by_shared;
    return cudaSuccess;
}

} /* extern "C" */
