/* memory.cpp - cudaMalloc, cudaMemcpy and their kin.
 *
 * Copies are stricter than a GPU's: the kind must fit both pointers, and a range must lie in one allocation. Copies
 * from and to pageable memory behave as documented: the source is read before the call returns, a target is written
 * before it returns; so only pinned memory can race with the host, and does. */
#include <sys/mman.h>

#include <cstring>
#include <map>

#include "device.h"
#include "graph.h"
#include "inject.h"
#include "settings.h"
#include "stream.h"

using namespace cudasim;

namespace cudasim
{

/* --- pinned memory ---------------------------------------------------------------------------------------------------- */

struct Pinned {
    size_t bytes;
    bool is_ours; /* cudaHostAlloc, else cudaHostRegister */
};
static std::mutex &pinned_mutex = *new std::mutex;
static std::map<char *, Pinned> &pinned = *new std::map<char *, Pinned>;

static constexpr size_t PAGE = 4096;

static size_t pages(size_t bytes)
{
    return (bytes + PAGE - 1) / PAGE * PAGE;
}

static bool is_pinned(const void *p)
{
    std::lock_guard<std::mutex> lock(pinned_mutex);
    auto after = pinned.upper_bound(static_cast<char *>(const_cast<void *>(p)));
    if (after == pinned.begin())
        return false;
    auto block = std::prev(after);
    return static_cast<const char *>(p) < block->first + block->second.bytes;
}

static cudaError_t pinned_allocate(void **out, size_t bytes)
{
    *out = nullptr;
    if (!bytes)
        return cudaSuccess;
    /* The last page cannot be touched. */
    void *map = mmap(nullptr, pages(bytes) + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                     -1, 0);
    if (map == MAP_FAILED)
        return cudaErrorMemoryAllocation;
    mprotect(static_cast<char *>(map) + pages(bytes), PAGE, PROT_NONE);
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned[static_cast<char *>(map)] = Pinned{bytes, true};
    ledger_open(Thing::PINNED);
    *out = map;
    return cudaSuccess;
}

/* --- copies ----------------------------------------------------------------------------------------------------------- */

static const char *kind_text(cudaMemcpyKind kind)
{
    static const char *const names[] = {"HostToHost", "HostToDevice", "DeviceToHost", "DeviceToDevice", "Default"};
    return names[kind];
}

/* check_side: is the pointer on the side the kind says, and the range inside one allocation? */
static cudaError_t check_side(const char *side, const void *p, size_t bytes, bool is_any, bool wants_device, cudaMemcpyKind kind)
{
    Device *d = device_of(p);
    if (!is_any && wants_device != (d != nullptr))
        return refuse(cudaErrorInvalidMemcpyDirection, std::string("cudaMemcpy") + kind_text(kind) + ": the " + side +
                                                           (d ? " is device memory" : " is not device memory"));
    if (d && !device_holds(d, p, bytes))
        return refuse(cudaErrorInvalidValue, std::string("cudaMemcpy of ") + std::to_string(bytes) + " bytes: the " + side +
                                                 " is not inside one allocation: " + device_describe(p));
    return cudaSuccess;
}

static cudaError_t check_sides(const void *to, size_t to_bytes, const void *from, size_t from_bytes, cudaMemcpyKind kind)
{
    if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault)
        return refuse(cudaErrorInvalidMemcpyDirection);
    bool is_any = kind == cudaMemcpyDefault;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    if (cudaError_t e = check_side("source", from, from_bytes, is_any, from_device, kind))
        return e;
    return check_side("target", to, to_bytes, is_any, to_device, kind);
}

static cudaMemcpyKind actual_kind(const void *to, const void *from)
{
    bool to_device = device_of(to) != nullptr, from_device = device_of(from) != nullptr;
    return to_device ? (from_device ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice)
                     : (from_device ? cudaMemcpyDeviceToHost : cudaMemcpyHostToHost);
}

/* A copy of `rows` rows; a plain copy has one. */
struct Copy {
    char *to;
    const char *from;
    size_t width, rows, to_pitch, from_pitch;
};

static void do_copy(const Copy &c)
{
    for (size_t r = 0; r < c.rows; r++)
        memmove(c.to + r * c.to_pitch, c.from + r * c.from_pitch, c.width);
}

static size_t extent(size_t pitch, size_t width, size_t rows)
{
    return (rows - 1) * pitch + width;
}

static std::shared_ptr<Work> copy_work(const Copy &c, cudaMemcpyKind kind)
{
    auto work = std::make_shared<Work>();
    work->kind = Work::COPY;
    work->name = kind_text(kind);
    work->copy_kind = kind;
    work->copy_bytes = c.width * c.rows;
    double sides = kind == cudaMemcpyDeviceToDevice ? 2 : 1;
    work->cost.bytes = sides * static_cast<double>(work->copy_bytes);
    work->run = [c] { do_copy(c); };
    return work;
}

/* A dry device has no values to give: the host gets zeros. */
static void fill_dry(const Copy &c)
{
    for (size_t r = 0; r < c.rows; r++)
        memset(c.to + r * c.to_pitch, 0, c.width);
}

static cudaError_t copy_async(const Copy &c, cudaMemcpyKind kind, cudaStream_t handle, const char *function, bool waits)
{
    if (cudaError_t e = enter(Point::COPY, function))
        return refuse(e);
    if (!c.width || !c.rows)
        return cudaSuccess;
    if (c.to_pitch < c.width || c.from_pitch < c.width)
        return refuse(cudaErrorInvalidPitchValue, std::string(function) + ": a pitch is smaller than the width");
    size_t to_bytes = extent(c.to_pitch, c.width, c.rows), from_bytes = extent(c.from_pitch, c.width, c.rows);
    if (cudaError_t e = check_sides(c.to, to_bytes, c.from, from_bytes, kind))
        return e;
    Stream *s = stream_find(handle);
    if (waits)
        if (cudaError_t e = capture_forbids(nullptr, function))
            return refuse(e);
    kind = actual_kind(c.to, c.from);
    std::shared_ptr<Work> work = copy_work(c, kind);
    bool is_captured;
    {
        std::lock_guard<std::mutex> lock(s->mutex);
        is_captured = s->capture != nullptr;
    }
    if (settings().is_dry && kind == cudaMemcpyDeviceToHost)
        fill_dry(c);
    if (!is_captured && !settings().is_dry && kind == cudaMemcpyHostToDevice && !is_pinned(c.from)) {
        auto staged = std::make_shared<std::string>(c.from, from_bytes);
        work->run = [c, staged] {
            Copy from_staged = c;
            from_staged.from = staged->data();
            do_copy(from_staged);
        };
    }
    if (cudaError_t e = submit(s, work))
        return refuse(e);
    bool is_pageable_target = !device_of(c.to) && !is_pinned(c.to) && !is_captured;
    if (!waits && !is_pageable_target)
        return cudaSuccess;
    ledger_host_wait(function);
    drain(s);
    return refuse(static_cast<cudaError_t>(device_at(s->device)->failed.load()));
}

static Copy plain(void *to, const void *from, size_t bytes)
{
    return Copy{static_cast<char *>(to), static_cast<const char *>(from), bytes, 1, bytes, bytes};
}

static cudaError_t set_async(void *to, int value, size_t pitch, size_t width, size_t rows, cudaStream_t handle,
                             const char *function)
{
    if (cudaError_t e = enter(Point::COPY, function))
        return refuse(e);
    if (!width || !rows)
        return cudaSuccess;
    Device *d = device_of(to);
    if (pitch < width || !d || !device_holds(d, to, extent(pitch, width, rows)))
        return refuse(cudaErrorInvalidValue, std::string(function) + ": not inside one allocation: " + device_describe(to));
    auto work = std::make_shared<Work>();
    work->kind = Work::MEMSET;
    work->name = "memset";
    work->cost.bytes = static_cast<double>(width * rows);
    work->run = [=] {
        for (size_t r = 0; r < rows; r++)
            memset(static_cast<char *>(to) + r * pitch, value, width);
    };
    return refuse(submit(stream_find(handle), work));
}

static cudaError_t free_now(void *p)
{
    Device *d = device_of(p);
    size_t bytes;
    if (!d || !device_release(d, p, &bytes))
        return refuse(cudaErrorInvalidValue, "cudaFree: not the start of an allocation: " + device_describe(p));
    ledger_allocation(d->index, bytes, true);
    return refuse(static_cast<cudaError_t>(d->failed.load()));
}

} // namespace cudasim

extern "C" {

cudaError_t cudaMalloc(void **out, size_t bytes)
{
    *out = nullptr;
    if (cudaError_t e = enter(Point::MALLOC, "cudaMalloc"))
        return refuse(e);
    if (cudaError_t e = capture_forbids(nullptr, "cudaMalloc"))
        return refuse(e);
    if (!bytes)
        return cudaSuccess;
    Device *d = device_current();
    *out = device_allocate(d, bytes);
    if (!*out)
        return refuse(cudaErrorMemoryAllocation, "cudaMalloc of " + std::to_string(bytes) + " bytes: device " +
                                                     std::to_string(d->index) + " has " + std::to_string(d->used_bytes) +
                                                     " of " + std::to_string(d->capacity_bytes) + " in use");
    ledger_allocation(d->index, bytes, false);
    return cudaSuccess;
}

/* Releases even on a failed device, so that what a program forgets to release is what the leak report shows. */
cudaError_t cudaFree(void *p)
{
    ledger_count_call();
    if (!p)
        return cudaSuccess;
    if (cudaError_t e = capture_forbids(nullptr, "cudaFree"))
        return refuse(e);
    if (Device *d = device_of(p))
        drain_device(d->index);
    return free_now(p);
}

cudaError_t cudaMallocAsync(void **out, size_t bytes, cudaStream_t)
{
    return cudaMalloc(out, bytes);
}

cudaError_t cudaFreeAsync(void *p, cudaStream_t stream)
{
    ledger_count_call();
    if (!p)
        return cudaSuccess;
    drain(stream_find(stream));
    return free_now(p);
}

cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned)
{
    *out = nullptr;
    if (cudaError_t e = enter(Point::HOSTALLOC, "cudaHostAlloc"))
        return refuse(e);
    return refuse(pinned_allocate(out, bytes));
}

cudaError_t cudaMallocHost(void **out, size_t bytes)
{
    return cudaHostAlloc(out, bytes, cudaHostAllocDefault);
}

cudaError_t cudaFreeHost(void *p)
{
    ledger_count_call();
    if (!p)
        return cudaSuccess;
    for (int i = 0; i < device_count(); i++)
        drain_device(i);
    std::lock_guard<std::mutex> lock(pinned_mutex);
    auto block = pinned.find(static_cast<char *>(p));
    if (block == pinned.end() || !block->second.is_ours)
        return refuse(cudaErrorInvalidValue, "cudaFreeHost: not memory of cudaHostAlloc");
    munmap(p, pages(block->second.bytes) + PAGE);
    pinned.erase(block);
    ledger_close(Thing::PINNED);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *p, size_t bytes, unsigned)
{
    if (cudaError_t e = enter(Point::HOSTALLOC, "cudaHostRegister"))
        return refuse(e);
    std::lock_guard<std::mutex> lock(pinned_mutex);
    if (!p || !bytes)
        return refuse(cudaErrorInvalidValue, "cudaHostRegister: nothing to register");
    if (pinned.count(static_cast<char *>(p)))
        return refuse(cudaErrorHostMemoryAlreadyRegistered, "cudaHostRegister: registered already");
    pinned[static_cast<char *>(p)] = Pinned{bytes, false};
    ledger_open(Thing::PINNED);
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *p)
{
    ledger_count_call();
    for (int i = 0; i < device_count(); i++)
        drain_device(i);
    std::lock_guard<std::mutex> lock(pinned_mutex);
    auto block = pinned.find(static_cast<char *>(p));
    if (block == pinned.end() || block->second.is_ours)
        return refuse(cudaErrorHostMemoryNotRegistered, "cudaHostUnregister: not registered");
    pinned.erase(block);
    ledger_close(Thing::PINNED);
    return cudaSuccess;
}

/* Kernels cannot reach host memory here: a program that wants mapped memory is told so. */
cudaError_t cudaHostGetDevicePointer(void **out, void *, unsigned)
{
    *out = nullptr;
    return refuse(cudaErrorNotSupported, "cudaHostGetDevicePointer: mapped host memory is not simulated");
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *p)
{
    if (cudaError_t e = enter(Point::OTHER, "cudaPointerGetAttributes"))
        return refuse(e);
    *attributes = cudaPointerAttributes();
    Device *d = device_of(p);
    attributes->device = d ? d->index : -1;
    attributes->type = d ? cudaMemoryTypeDevice : is_pinned(p) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    attributes->devicePointer = d ? const_cast<void *>(p) : nullptr;
    attributes->hostPointer = d ? nullptr : const_cast<void *>(p);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes)
{
    if (cudaError_t e = enter(Point::OTHER, "cudaMemGetInfo"))
        return refuse(e);
    Device *d = device_current();
    std::lock_guard<std::mutex> lock(d->mutex);
    *total_bytes = d->capacity_bytes;
    *free_bytes = d->used_bytes < d->capacity_bytes ? d->capacity_bytes - d->used_bytes : 0;
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    return copy_async(plain(to, from, bytes), kind, stream, "cudaMemcpyAsync", false);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind)
{
    return copy_async(plain(to, from, bytes), kind, nullptr, "cudaMemcpy", true);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t rows,
                              enum cudaMemcpyKind kind, cudaStream_t stream)
{
    Copy c = {static_cast<char *>(to), static_cast<const char *>(from), width, rows, to_pitch, from_pitch};
    return copy_async(c, kind, stream, "cudaMemcpy2DAsync", false);
}

cudaError_t cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t rows,
                         enum cudaMemcpyKind kind)
{
    Copy c = {static_cast<char *>(to), static_cast<const char *>(from), width, rows, to_pitch, from_pitch};
    return copy_async(c, kind, nullptr, "cudaMemcpy2D", true);
}

cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes,
                                cudaStream_t stream)
{
    Device *a = device_of(to), *b = device_of(from);
    if ((a && a->index != to_device) || (b && b->index != from_device))
        return refuse(cudaErrorInvalidValue, "cudaMemcpyPeerAsync: the memory is another device's");
    return copy_async(plain(to, from, bytes), cudaMemcpyDeviceToDevice, stream, "cudaMemcpyPeerAsync", false);
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream)
{
    return set_async(to, value, bytes, bytes, 1, stream, "cudaMemsetAsync");
}

cudaError_t cudaMemset(void *to, int value, size_t bytes)
{
    return set_async(to, value, bytes, bytes, 1, nullptr, "cudaMemset");
}

cudaError_t cudaMemset2DAsync(void *to, size_t pitch, int value, size_t width, size_t rows, cudaStream_t stream)
{
    return set_async(to, value, pitch, width, rows, stream, "cudaMemset2DAsync");
}

} /* extern "C" */
