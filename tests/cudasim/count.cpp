/* count.cpp - what each warp's memory instructions would cost a GPU.
 *
 * The kernels need no change: they are compiled with -fsanitize=thread, which puts a call before every load and store,
 * and linked against the functions below in place of the sanitizer's. (A preset for this: `kiln-cuda-count`.)
 *
 * Lanes run one after the other, so the warp's request is put together afterwards: the n-th time lane 0 passed a place
 * in the code since the warp last met, and the n-th time the other lanes passed it. At a warp collective, a barrier and
 * the end of the block, requests are complete and are judged:
 *   shared memory   32 banks of 4 bytes. A request of 4 bytes a lane is one wavefront if no two lanes want different words
 *                   of one bank; 8 bytes: half-warps, 16 bytes: quarter-warps. More words of a bank: more wavefronts.
 *   device memory   sectors of 32 bytes the request touches, against the least that could hold its bytes.
 * Limits: lanes that diverge between two meetings are matched as if they had not; the CPU compiler's loads are counted,
 * which may be merged or split otherwise than nvcc's; memcpy is not seen; writable globals count as shared memory. */
#include "count.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <vector>

#include "device.h"
#include "ledger.h"
#include "schedule.h"

namespace cudasim
{

struct Access {
    const void *place; /* in the code */
    uintptr_t address;
    uint32_t bytes;
    bool is_write, is_shared;
};

struct Request {
    std::vector<Access> lanes; /* those that took part */
    std::vector<int> numbers;  /* which */
};

static std::mutex &mutex = *new std::mutex; /* guards totals */
using Places = std::map<const void *, cudasim_access>;
static std::map<std::string, Places> &totals = *new std::map<std::string, Places>;

/* One worker only (CUDASIM_ONE_WORKER), so its log needs no lock. */
static std::vector<Access> lane_log[WARPS_MAX][WARP];
static bool is_anything_logged;

/* --- which memory --------------------------------------------------------------------------------------------------------- */

struct Range {
    uintptr_t start, end;
};

static int add_writable(dl_phdr_info *info, size_t, void *data)
{
    for (int i = 0; i < info->dlpi_phnum; i++)
        if (info->dlpi_phdr[i].p_type == PT_LOAD && (info->dlpi_phdr[i].p_flags & PF_W)) {
            uintptr_t start = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
            static_cast<std::vector<Range> *>(data)->push_back({start, start + info->dlpi_phdr[i].p_memsz});
        }
    return 0;
}

/* With one worker, __shared__ variables are plain statics: in some module's writable segment. */
static bool is_static(uintptr_t address)
{
    static const std::vector<Range> ranges = [] {
        std::vector<Range> all;
        dl_iterate_phdr(add_writable, &all);
        return all;
    }();
    for (const Range &r : ranges)
        if (address >= r.start && address < r.end)
            return true;
    return false;
}

static void note(const void *place, const void *p, unsigned bytes, bool is_write)
{
    if (!current)
        return;
    Lane *lane = current;
    uintptr_t address = reinterpret_cast<uintptr_t>(p), shared = reinterpret_cast<uintptr_t>(lane->shared);
    bool is_shared = (shared && address - shared < lane->shared_bytes) || is_static(address);
    if (!is_shared && !device_of(p))
        return; /* the lane's own variables: registers, on a GPU */
    lane_log[lane->warp][lane->lane].push_back({place, address, bytes, is_write, is_shared});
    is_anything_logged = true;
}

/* --- judging -------------------------------------------------------------------------------------------------------------- */

static void judge_shared(const Request &r, cudasim_access *sum)
{
    uint32_t bytes = r.lanes[0].bytes;
    int lanes_a_phase = bytes <= 4 ? 32 : bytes <= 8 ? 16 : 8;
    sum->shared_requests++;
    for (int phase = 0; phase < WARP; phase += lanes_a_phase) {
        std::vector<uintptr_t> words[32];
        size_t most = 0;
        for (size_t i = 0; i < r.lanes.size(); i++) {
            if (r.numbers[i] < phase || r.numbers[i] >= phase + lanes_a_phase)
                continue;
            const Access &a = r.lanes[i];
            for (uintptr_t word = a.address / 4; word <= (a.address + a.bytes - 1) / 4; word++) {
                std::vector<uintptr_t> &bank = words[word % 32];
                if (std::find(bank.begin(), bank.end(), word) == bank.end())
                    bank.push_back(word);
                most = std::max(most, bank.size());
            }
        }
        sum->shared_wavefronts += most;
        sum->shared_ideal += most > 0;
    }
}

static void judge_global(const Request &r, cudasim_access *sum)
{
    std::vector<uintptr_t> sectors, words;
    uint64_t bytes = 0;
    for (const Access &a : r.lanes) {
        bytes += a.bytes;
        for (uintptr_t s = a.address / 32; s <= (a.address + a.bytes - 1) / 32; s++)
            sectors.push_back(s);
        for (uintptr_t byte = a.address; byte < a.address + a.bytes; byte++)
            words.push_back(byte);
    }
    auto count_distinct = [](std::vector<uintptr_t> &v) {
        std::sort(v.begin(), v.end());
        return static_cast<uint64_t>(std::unique(v.begin(), v.end()) - v.begin());
    };
    sum->global_requests++;
    sum->global_sectors += count_distinct(sectors);
    sum->global_ideal += (count_distinct(words) + 31) / 32;
    (r.lanes[0].is_write ? sum->written_bytes : sum->read_bytes) += bytes;
}

static void judge_warp(const Worker *w, int warp, uint32_t lanes)
{
    std::map<std::pair<const void *, int>, Request> requests;
    for (int lane = 0; lane < WARP; lane++) {
        if (!(lanes >> lane & 1))
            continue;
        std::map<const void *, int> passed;
        for (const Access &a : lane_log[warp][lane]) {
            Request &r = requests[{a.place, passed[a.place]++}];
            r.lanes.push_back(a);
            r.numbers.push_back(lane);
        }
        lane_log[warp][lane].clear();
    }
    if (requests.empty())
        return;
    std::lock_guard<std::mutex> lock(mutex);
    Places &places = totals[w->kernel->launch->name];
    for (auto &entry : requests) {
        cudasim_access *sum = &places[entry.first.first];
        if (entry.second.lanes[0].is_shared)
            judge_shared(entry.second, sum);
        else
            judge_global(entry.second, sum);
    }
}

void count_warp_meeting(const Worker *w, int warp, uint32_t lanes)
{
    if (is_anything_logged)
        judge_warp(w, warp, lanes);
}

void count_block_end(const Worker *w)
{
    if (!is_anything_logged)
        return;
    for (int warp = 0; warp < w->warp_count; warp++)
        judge_warp(w, warp, ~0u);
    is_anything_logged = false;
}

/* --- reading -------------------------------------------------------------------------------------------------------------- */

static void add(cudasim_access *sum, const cudasim_access &a)
{
    sum->shared_requests += a.shared_requests;
    sum->shared_wavefronts += a.shared_wavefronts;
    sum->shared_ideal += a.shared_ideal;
    sum->global_requests += a.global_requests;
    sum->global_sectors += a.global_sectors;
    sum->global_ideal += a.global_ideal;
    sum->read_bytes += a.read_bytes;
    sum->written_bytes += a.written_bytes;
}

bool count_read(const char *kernel, cudasim_access *access)
{
    std::lock_guard<std::mutex> lock(mutex);
    *access = cudasim_access();
    bool is_found = false;
    for (auto &entry : totals) {
        if (kernel && entry.first.find(kernel) == std::string::npos)
            continue;
        is_found = true;
        for (auto &place : entry.second)
            add(access, place.second);
    }
    return is_found;
}

static std::string access_json(const cudasim_access &a)
{
    char text[512];
    snprintf(text, sizeof text,
             "\"shared_requests\":%lu,\"shared_wavefronts\":%lu,\"shared_ideal\":%lu,\"global_requests\":%lu,"
             "\"global_sectors\":%lu,\"global_ideal\":%lu,\"read_bytes\":%lu,\"written_bytes\":%lu",
             a.shared_requests, a.shared_wavefronts, a.shared_ideal, a.global_requests, a.global_sectors, a.global_ideal,
             a.read_bytes, a.written_bytes);
    return text;
}

/* place_text: "module+0x123", for addr2line -e module 0x123. */
static std::string place_text(const void *place)
{
    Dl_info info;
    char text[512];
    if (!dladdr(place, &info) || !info.dli_fname)
        return "?";
    snprintf(text, sizeof text, "%s+0x%zx", info.dli_fname,
             static_cast<size_t>(static_cast<const char *>(place) - static_cast<const char *>(info.dli_fbase)) - 1);
    return text;
}

static uint64_t waste(const cudasim_access &a)
{
    return a.shared_wavefronts - a.shared_ideal + a.global_sectors - a.global_ideal;
}

static std::string kernel_json(const std::string &name, const Places &places)
{
    enum { WORST_SHOWN = 5 };
    cudasim_access sum = {};
    std::vector<std::pair<const void *, cudasim_access>> worst(places.begin(), places.end());
    for (auto &place : worst)
        add(&sum, place.second);
    std::sort(worst.begin(), worst.end(), [](auto &a, auto &b) { return waste(a.second) > waste(b.second); });
    std::string text = "{\"name\":" + json_text(name) + "," + access_json(sum) + ",\"worst\":[";
    for (size_t i = 0; i < worst.size() && i < WORST_SHOWN && waste(worst[i].second); i++)
        text += (i ? ",{\"at\":" : "{\"at\":") + json_text(place_text(worst[i].first)) + "," +
                access_json(worst[i].second) + "}";
    return text + "]}";
}

std::string count_json()
{
    std::lock_guard<std::mutex> lock(mutex);
    std::string text = "[";
    for (auto &entry : totals)
        text += (text.size() > 1 ? "," : "") + kernel_json(entry.first, entry.second);
    return text + "]";
}

} // namespace cudasim

/* --- what the instrumentation calls ----------------------------------------------------------------------------------------- */

#ifndef CUDASIM_TSAN

using cudasim::note;

extern "C" {

#define ACCESS(bytes)                                                                                                  \
    void __tsan_read##bytes(void *p)                                                                                   \
    {                                                                                                                  \
        note(__builtin_return_address(0), p, bytes, false);                                                            \
    }                                                                                                                  \
    void __tsan_write##bytes(void *p)                                                                                  \
    {                                                                                                                  \
        note(__builtin_return_address(0), p, bytes, true);                                                             \
    }                                                                                                                  \
    void __tsan_unaligned_read##bytes(void *p)                                                                         \
    {                                                                                                                  \
        note(__builtin_return_address(0), p, bytes, false);                                                            \
    }                                                                                                                  \
    void __tsan_unaligned_write##bytes(void *p)                                                                        \
    {                                                                                                                  \
        note(__builtin_return_address(0), p, bytes, true);                                                             \
    }                                                                                                                  \
    void __tsan_volatile_read##bytes(void *p)                                                                          \
    {                                                                                                                  \
        note(__builtin_return_address(0), p, bytes, false);                                                            \
    }                                                                                                                  \
    void __tsan_volatile_write##bytes(void *p)                                                                         \
    {                                                                                                                  \
        note(__builtin_return_address(0), p, bytes, true);                                                             \
    }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)

void __tsan_read_range(void *p, unsigned long bytes)
{
    note(__builtin_return_address(0), p, static_cast<unsigned>(bytes), false);
}
void __tsan_write_range(void *p, unsigned long bytes)
{
    note(__builtin_return_address(0), p, static_cast<unsigned>(bytes), true);
}
void __tsan_init(void)
{
}
void __tsan_func_entry(void *)
{
}
void __tsan_func_exit(void *)
{
}
void __tsan_vptr_update(void **p, void *value)
{
    *p = value;
}
void __tsan_vptr_read(void **)
{
}
void __tsan_atomic_thread_fence(int)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* An atomic is one write of its lane; that conflicting atomics of a warp take turns is not counted. */
#define ATOMICS(bits, type)                                                                                            \
    type __tsan_atomic##bits##_load(const volatile type *p, int)                                                       \
    {                                                                                                                  \
        return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                                   \
    }                                                                                                                  \
    void __tsan_atomic##bits##_store(volatile type *p, type v, int)                                                    \
    {                                                                                                                  \
        __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                                      \
    }                                                                                                                  \
    type __tsan_atomic##bits##_exchange(volatile type *p, type v, int)                                                 \
    {                                                                                                                  \
        return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                            \
    }                                                                                                                  \
    type __tsan_atomic##bits##_fetch_add(volatile type *p, type v, int)                                                \
    {                                                                                                                  \
        return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                             \
    }                                                                                                                  \
    type __tsan_atomic##bits##_fetch_sub(volatile type *p, type v, int)                                                \
    {                                                                                                                  \
        return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                                             \
    }                                                                                                                  \
    int __tsan_atomic##bits##_compare_exchange_strong(volatile type *p, type *expected, type v, int, int)              \
    {                                                                                                                  \
        note(__builtin_return_address(0), const_cast<type *>(p), sizeof *p, true);                                     \
        return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                 \
    }                                                                                                                  \
    int __tsan_atomic##bits##_compare_exchange_weak(volatile type *p, type *expected, type v, int, int)                \
    {                                                                                                                  \
        note(__builtin_return_address(0), const_cast<type *>(p), sizeof *p, true);                                     \
        return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                 \
    }
ATOMICS(8, uint8_t)
ATOMICS(16, uint16_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)

} /* extern "C" */

#endif
