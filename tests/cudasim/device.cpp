/* device.cpp - profiles, address ranges and allocations; see device.h. */
#include "device.h"

#include <sys/mman.h>

#include <cstring>
#include <vector>

#include "settings.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace cudasim
{

static constexpr size_t PAGE = 4096, ALIGN = 256, OVERBOOKED_RANGE = size_t{1} << 40;

static const Profile profiles[] = {
    {"a100", "NVIDIA A100-SXM4-80GB", 8, 0, 81920, 108, 163, 164, 40, 2048, 1410, 1593, 5120},
    {"rtx3090", "NVIDIA GeForce RTX 3090", 8, 6, 24576, 82, 99, 100, 6, 1536, 1695, 9751, 384},
    {"rtx4090", "NVIDIA GeForce RTX 4090", 8, 9, 24576, 128, 99, 100, 72, 1536, 2520, 10501, 384},
    {"rtx4070ti", "NVIDIA GeForce RTX 4070 Ti", 8, 9, 12288, 60, 99, 100, 48, 1536, 2610, 10501, 192},
    {"h100", "NVIDIA H100 80GB HBM3", 9, 0, 81920, 132, 227, 228, 50, 2048, 1980, 2619, 5120},
    {"rtx5090", "NVIDIA GeForce RTX 5090", 12, 0, 32768, 170, 99, 100, 96, 1536, 2407, 14001, 512},
};

const Profile *device_profile(const char *name)
{
    for (const Profile &p : profiles)
        if (!strcmp(p.name, name))
            return &p;
    return nullptr;
}

std::string device_profile_names()
{
    std::string names;
    for (const Profile &p : profiles)
        names += (names.empty() ? "" : ", ") + std::string(p.name);
    return names;
}

/* --- the set of devices -------------------------------------------------------------------------------------------- */

/* Twice the capacity of addresses: guard pages and holes between allocations need room. */
static Device *make_device(int index)
{
    Device *d = new Device();
    d->index = index;
    d->profile = settings().profile;
    d->capacity_bytes = settings().vram_bytes[index];
    d->used_bytes = d->peak_bytes = settings().context_bytes;
    d->range_bytes = settings().is_overbooked ? OVERBOOKED_RANGE : 2 * d->capacity_bytes + (size_t{64} << 20);
    void *map = mmap(nullptr, d->range_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED)
        settings_die("no address space for device " + std::to_string(index));
    d->base = static_cast<char *>(map);
    d->holes[0] = d->range_bytes;
    return d;
}

static const std::vector<Device *> &devices()
{
    static const std::vector<Device *> *all = [] {
        auto *v = new std::vector<Device *>();
        for (int i = 0; i < settings().device_count; i++)
            v->push_back(make_device(i));
        return v;
    }();
    return *all;
}

static thread_local int selected;

int device_count()
{
    return static_cast<int>(devices().size());
}

Device *device_at(int index)
{
    return index >= 0 && index < device_count() ? devices()[index] : nullptr;
}

Device *device_current()
{
    return device_at(selected);
}

int device_current_index()
{
    return selected;
}

cudaError_t device_select(int index)
{
    if (!device_at(index))
        return device_count() ? cudaErrorInvalidDevice : cudaErrorNoDevice;
    selected = index;
    return cudaSuccess;
}

Device *device_of(const void *address)
{
    const char *p = static_cast<const char *>(address);
    for (Device *d : devices())
        if (p >= d->base && p < d->base + d->range_bytes)
            return d;
    return nullptr;
}

/* --- memory -------------------------------------------------------------------------------------------------------- */

static size_t round_up(size_t n, size_t unit)
{
    return (n + unit - 1) / unit * unit;
}

static size_t span_of(size_t bytes)
{
    return round_up(round_up(bytes, ALIGN), PAGE) + PAGE; /* and the page that cannot be touched */
}

/* The allocation ends at the guard page, so the first bytes of its first page are not its own. */
static size_t lead_of(size_t bytes)
{
    return span_of(bytes) - PAGE - round_up(bytes, ALIGN);
}

static void open_pages(char *start, size_t bytes)
{
    if (settings().is_dry)
        return;
    size_t span = span_of(bytes), lead = lead_of(bytes);
    if (mprotect(start, span - PAGE, PROT_READ | PROT_WRITE))
        settings_die("no memory for an allocation on a device");
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(start, span);
    __asan_unpoison_memory_region(start + lead, bytes); /* before the fill: an allocation given back left it poisoned */
#endif
    if (bytes <= settings().fill_bytes)
        memset(start + lead, 0xff, bytes);
}

static void close_pages(char *start, size_t bytes)
{
    if (settings().is_dry)
        return;
    size_t span = span_of(bytes);
    if (mmap(start, span, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
        settings_die("cannot give back an allocation of a device");
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(start, span);
#endif
}

void *device_allocate(Device *d, size_t bytes)
{
    std::lock_guard<std::mutex> lock(d->mutex);
    size_t charge = round_up(bytes, 512);
    bool is_too_much = charge > d->capacity_bytes || d->used_bytes > d->capacity_bytes - charge;
    if (charge < bytes || (is_too_much && !settings().is_overbooked))
        return nullptr;
    size_t span = span_of(bytes);
    for (auto hole = d->holes.begin(); hole != d->holes.end(); ++hole) {
        if (hole->second < span)
            continue;
        size_t offset = hole->first, left = hole->second - span;
        d->holes.erase(hole);
        if (left)
            d->holes[offset + span] = left;
        open_pages(d->base + offset, bytes);
        d->blocks[offset + lead_of(bytes)] = bytes;
        d->used_bytes += charge;
        if (d->used_bytes > d->peak_bytes)
            d->peak_bytes = d->used_bytes;
        return d->base + offset + lead_of(bytes);
    }
    return nullptr;
}

static void add_hole(Device *d, size_t offset, size_t span)
{
    auto next = d->holes.upper_bound(offset);
    if (next != d->holes.end() && next->first == offset + span) {
        span += next->second;
        next = d->holes.erase(next);
    }
    if (next != d->holes.begin()) {
        auto before = std::prev(next);
        if (before->first + before->second == offset) {
            before->second += span;
            return;
        }
    }
    d->holes[offset] = span;
}

bool device_release(Device *d, void *p, size_t *ret_bytes)
{
    std::lock_guard<std::mutex> lock(d->mutex);
    auto block = d->blocks.find(static_cast<size_t>(static_cast<char *>(p) - d->base));
    if (block == d->blocks.end())
        return false;
    size_t bytes = block->second, offset = block->first - lead_of(bytes);
    d->blocks.erase(block);
    close_pages(d->base + offset, bytes);
    d->used_bytes -= round_up(bytes, 512);
    add_hole(d, offset, span_of(bytes));
    *ret_bytes = bytes;
    return true;
}

bool device_holds(Device *d, const void *p, size_t bytes)
{
    std::lock_guard<std::mutex> lock(d->mutex);
    size_t offset = static_cast<size_t>(static_cast<const char *>(p) - d->base);
    auto block = d->blocks.upper_bound(offset);
    if (block == d->blocks.begin())
        return false;
    --block;
    return bytes <= block->second && offset - block->first <= block->second - bytes;
}

std::string device_describe(const void *address)
{
    char text[160];
    Device *d = device_of(address);
    if (!d) {
        snprintf(text, sizeof text, "%p, which is not device memory", address);
        return text;
    }
    std::lock_guard<std::mutex> lock(d->mutex);
    size_t offset = static_cast<size_t>(static_cast<const char *>(address) - d->base);
    auto after = d->blocks.upper_bound(offset);
    size_t before_bytes = SIZE_MAX, after_bytes = SIZE_MAX;
    if (after != d->blocks.end())
        after_bytes = after->first - offset;
    if (after != d->blocks.begin())
        before_bytes = offset - std::prev(after)->first - std::prev(after)->second;
    if (before_bytes <= after_bytes && before_bytes < (1 << 20))
        snprintf(text, sizeof text, "%zu bytes past the end of an allocation of %zu bytes on device %d", before_bytes,
                 std::prev(after)->second, d->index);
    else if (after_bytes < (1 << 20))
        snprintf(text, sizeof text, "%zu bytes before an allocation of %zu bytes on device %d", after_bytes,
                 after->second, d->index);
    else
        snprintf(text, sizeof text, "%p, in no allocation of device %d (freed?)", address, d->index);
    return text;
}

/* --- health -------------------------------------------------------------------------------------------------------- */

static std::mutex &error_mutex = *new std::mutex;
static std::string &last_sentence = *new std::string;

void error_note(const std::string &sentence)
{
    std::lock_guard<std::mutex> lock(error_mutex);
    last_sentence = sentence;
}

std::string error_text()
{
    std::lock_guard<std::mutex> lock(error_mutex);
    return last_sentence;
}

void device_fail(Device *d, cudaError_t code, const std::string &sentence)
{
    int healthy = cudaSuccess;
    if (d->failed.compare_exchange_strong(healthy, code))
        error_note(sentence);
}

void device_restore_all()
{
    for (Device *d : devices())
        d->failed = cudaSuccess;
    error_note("");
}

} // namespace cudasim
