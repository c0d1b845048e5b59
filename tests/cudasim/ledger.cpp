/* ledger.cpp - counters, trace and report; see ledger.h.
 *
 * The trace has a line when an operation enters a stream, in the order of the host's calls, not of execution: the same
 * program gives the same trace every time, dry or not. */
#include "ledger.h"

#include <errno.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "count.h"
#include "device.h"
#include "inject.h"
#include "schedule.h"
#include "settings.h"
#include "stream.h"

namespace cudasim
{

static std::mutex &mutex = *new std::mutex; /* guards what follows */
static cudasim_counters totals;
static uint64_t waits_since_launch;
static double (*watcher)(const cudasim_launch *);
static FILE *trace_file;
static bool is_trace_read; /* CUDASIM_TRACE has been looked at */
static long open_things[static_cast<int>(Thing::THING_COUNT)];
static std::atomic<uint64_t> call_count;
static thread_local Cost pending_cost;

std::string json_text(const std::string &text)
{
    std::string out = "\"";
    for (unsigned char c : text) {
        char escaped[8];
        if (c == '"' || c == '\\') {
            out += '\\';
            out += static_cast<char>(c);
        } else if (c < 0x20) {
            snprintf(escaped, sizeof escaped, "\\u%04x", c);
            out += escaped;
        } else {
            out += static_cast<char>(c);
        }
    }
    return out + "\"";
}

/* --- the trace ------------------------------------------------------------------------------------------------------------ */

/* trace_out: the open trace or NULL. Under the mutex. */
static FILE *trace_out()
{
    if (!is_trace_read) {
        is_trace_read = true;
        const std::string &path = settings().trace;
        if (!path.empty() && !(trace_file = fopen(path.c_str(), "w")))
            settings_die("CUDASIM_TRACE=" + path + ": " + strerror(errno));
    }
    return trace_file;
}

static const char *kind_name(Work::Kind kind)
{
    switch (kind) {
    case Work::KERNEL:
        return "kernel";
    case Work::LIBRARY:
        return "library";
    case Work::COPY:
        return "copy";
    case Work::MEMSET:
        return "memset";
    case Work::COLLECTIVE:
        return "collective";
    case Work::HOST:
        return "host";
    case Work::RECORD:
        return "record";
    case Work::WAIT:
        break;
    }
    return "wait";
}

static void trace_work(FILE *out, const Work &work, int device, int stream_id, int graph_id)
{
    fprintf(out, "{\"op\":\"%s\",\"name\":%s,\"device\":%d,\"stream\":%d", kind_name(work.kind),
            json_text(work.name).c_str(), device, stream_id);
    if (graph_id)
        fprintf(out, ",\"graph\":%d", graph_id);
    if (work.kind == Work::KERNEL)
        fprintf(out, ",\"grid\":[%u,%u,%u],\"block\":[%u,%u,%u],\"shared\":%zu", work.grid.x, work.grid.y, work.grid.z,
                work.block.x, work.block.y, work.block.z, work.shared_bytes);
    if (work.kind != Work::HOST && work.kind != Work::RECORD && work.kind != Work::WAIT)
        fprintf(out, ",\"bytes\":%.0f,\"flops\":%.0f,\"tensor_core\":%s", work.cost.bytes, work.cost.flops,
                work.cost.is_tensor_core ? "true" : "false");
    fprintf(out, "}\n");
}

static bool trace_open(const char *path)
{
    FILE *f = path ? fopen(path, "w") : nullptr;
    if (path && !f)
        return false;
    std::lock_guard<std::mutex> lock(mutex);
    is_trace_read = true;
    if (trace_file)
        fclose(trace_file);
    trace_file = f;
    return true;
}

/* --- counting ------------------------------------------------------------------------------------------------------------- */

static double show(const Work &work, int graph_id)
{
    cudasim_launch launch = {work.name.c_str(), work.cost.bytes, work.cost.flops, work.kind == Work::LIBRARY,
                             work.cost.is_tensor_core, work.cost.is_fp8, work.kind == Work::COLLECTIVE, graph_id != 0};
    return watcher ? watcher(&launch) : 0;
}

static double count_copy(const Work &work, int graph_id)
{
    uint64_t bytes = static_cast<uint64_t>(work.copy_bytes);
    totals.copies++;
    if (work.copy_kind == cudaMemcpyHostToDevice)
        totals.host_to_device_bytes += bytes;
    else if (work.copy_kind == cudaMemcpyDeviceToHost)
        totals.device_to_host_bytes += bytes;
    else if (work.copy_kind == cudaMemcpyDeviceToDevice)
        totals.device_to_device_bytes += bytes;
    return work.copy_kind == cudaMemcpyDeviceToDevice ? show(work, graph_id) : 0;
}

static double count_launch(const Work &work, int graph_id)
{
    totals.launches++;
    totals.bytes += work.cost.bytes;
    totals.flops += work.cost.flops;
    if (work.cost.is_tensor_core)
        totals.tensor_core_flops += work.cost.flops;
    totals.host_stalls += waits_since_launch;
    waits_since_launch = 0;
    return show(work, graph_id);
}

double ledger_work(const Work &work, int device, int stream_id, int graph_id)
{
    std::lock_guard<std::mutex> lock(mutex);
    double seconds = 0;
    switch (work.kind) {
    case Work::LIBRARY:
        totals.library_calls++;
        [[fallthrough]];
    case Work::KERNEL:
        seconds = count_launch(work, graph_id);
        break;
    case Work::COPY:
        seconds = count_copy(work, graph_id);
        break;
    case Work::MEMSET:
        totals.memsets++;
        break;
    case Work::COLLECTIVE:
        totals.collectives++;
        totals.collective_bytes += static_cast<uint64_t>(work.copy_bytes);
        seconds = show(work, graph_id);
        break;
    default:
        break;
    }
    if (FILE *out = trace_out())
        trace_work(out, work, device, stream_id, graph_id);
    return seconds;
}

void ledger_count_call()
{
    call_count.fetch_add(1, std::memory_order_relaxed);
}

void ledger_host_wait(const char *function)
{
    std::lock_guard<std::mutex> lock(mutex);
    totals.host_waits++;
    waits_since_launch++;
    if (FILE *out = trace_out())
        fprintf(out, "{\"op\":\"host_wait\",\"name\":\"%s\",\"device\":%d}\n", function, device_current_index());
}

void ledger_allocation(int device, size_t bytes, bool is_free)
{
    std::lock_guard<std::mutex> lock(mutex);
    ++(is_free ? totals.frees : totals.allocations);
    if (FILE *out = trace_out())
        fprintf(out, "{\"op\":\"%s\",\"device\":%d,\"bytes\":%zu}\n", is_free ? "free" : "malloc", device, bytes);
}

void ledger_graph_launch(int device, int stream_id, int graph_id, size_t node_count)
{
    std::lock_guard<std::mutex> lock(mutex);
    totals.graph_launches++;
    if (FILE *out = trace_out())
        fprintf(out, "{\"op\":\"graph_launch\",\"device\":%d,\"stream\":%d,\"graph\":%d,\"nodes\":%zu}\n", device,
                stream_id, graph_id, node_count);
}

Cost ledger_take_cost()
{
    Cost cost = pending_cost;
    pending_cost = Cost();
    return cost;
}

void ledger_open(Thing thing)
{
    std::lock_guard<std::mutex> lock(mutex);
    open_things[static_cast<int>(thing)]++;
}

void ledger_close(Thing thing)
{
    std::lock_guard<std::mutex> lock(mutex);
    open_things[static_cast<int>(thing)]--;
}

/* --- leaks and the report -------------------------------------------------------------------------------------------------- */

static std::string find_leaks(size_t *count)
{
    static const char *const names[] = {"stream", "event",          "graph",       "instantiated graph", "pinned allocation",
                                        "library handle", "communicator"};
    std::string text;
    *count = 0;
    for (int i = 0; i < device_count(); i++) {
        Device *d = device_at(i);
        std::lock_guard<std::mutex> lock(d->mutex);
        for (auto &block : d->blocks) {
            ++*count;
            text += "device " + std::to_string(i) + ": " + std::to_string(block.second) + " bytes not freed\n";
        }
    }
    std::lock_guard<std::mutex> lock(mutex);
    for (int i = 0; i < static_cast<int>(Thing::THING_COUNT); i++)
        if (open_things[i]) {
            *count += static_cast<size_t>(open_things[i]);
            text += std::to_string(open_things[i]) + " " + names[i] + (open_things[i] > 1 ? "s" : "") + " not closed\n";
        }
    return text;
}

/* %p in the path becomes the process id, so that several processes may be told the same path. */
static std::string report_path()
{
    std::string path = settings().report;
    size_t at = path.find("%p");
    if (at != std::string::npos)
        path.replace(at, 2, std::to_string(getpid()));
    return path;
}

static void write_report(const std::string &leaks, size_t leak_count)
{
    FILE *out = fopen(report_path().c_str(), "w");
    if (!out) {
        fprintf(stderr, "cudasim: CUDASIM_REPORT=%s: %s\n", settings().report.c_str(), strerror(errno));
        return;
    }
    cudasim_counters c;
    cudasim_counters_read(&c);
    Rates rates = schedule_rates();
    fprintf(out, "{\"mode\":\"%s\",\"device\":\"%s\",\"devices\":[", settings().is_dry ? "dry" : "run",
            settings().profile->name);
    for (int i = 0; i < device_count(); i++) {
        cudasim_memory m;
        cudasim_memory_read(i, &m);
        fprintf(out, "%s{\"capacity_bytes\":%zu,\"peak_bytes\":%zu,\"used_bytes\":%zu}", i ? "," : "", m.capacity_bytes,
                m.peak_bytes, m.used_bytes);
    }
    fprintf(out, "],\"launches\":%lu,\"graph_launches\":%lu,\"library_calls\":%lu,\"collectives\":%lu,\"copies\":%lu,"
                 "\"memsets\":%lu,\"host_waits\":%lu,\"host_stalls\":%lu,\"allocations\":%lu,\"frees\":%lu,\"calls\":%lu,",
            c.launches, c.graph_launches, c.library_calls, c.collectives, c.copies, c.memsets, c.host_waits, c.host_stalls,
            c.allocations, c.frees, c.calls);
    fprintf(out, "\"host_to_device_bytes\":%lu,\"device_to_host_bytes\":%lu,\"device_to_device_bytes\":%lu,"
                 "\"collective_bytes\":%lu,\"bytes\":%.0f,\"flops\":%.0f,\"tensor_core_flops\":%.0f,",
            c.host_to_device_bytes, c.device_to_host_bytes, c.device_to_device_bytes, c.collective_bytes, c.bytes,
            c.flops, c.tensor_core_flops);
    fprintf(out, "\"cuda_threads\":%lu,\"fiber_switches\":%lu,\"warp_collectives\":%lu,", rates.threads, rates.switches,
            rates.collectives);
    fprintf(out, "\"kernels\":%s,\"error\":%s,\"leak_count\":%zu,\"leaks\":%s}\n", count_json().c_str(),
            json_text(error_text()).c_str(), leak_count, json_text(leaks).c_str());
    fclose(out);
}

/* At the very end, after the program's own exit handlers have closed what they close. */
__attribute__((destructor)) static void at_end()
{
    if (!call_count && !totals.launches) /* no device was ever touched: do not make one now */
        return;
    size_t leak_count;
    std::string leaks = find_leaks(&leak_count);
    {
        std::lock_guard<std::mutex> lock(mutex);
        if (trace_file)
            fflush(trace_file);
    }
    if (!settings().report.empty())
        write_report(leaks, leak_count);
    if (!leak_count || settings().leaks == Settings::Leaks::IGNORE)
        return;
    fprintf(stderr, "cudasim: left behind at the end of the process:\n%s", leaks.c_str());
    if (settings().leaks == Settings::Leaks::FAIL) {
        fflush(nullptr);
        _exit(23);
    }
}

} // namespace cudasim

/* --- cudasim_control.h ------------------------------------------------------------------------------------------------------ */

using namespace cudasim;

extern "C" {

void cudasim_cost(double bytes, double flops, bool is_tensor_core)
{
    pending_cost.bytes = bytes;
    pending_cost.flops = flops;
    pending_cost.is_tensor_core = is_tensor_core;
}

void cudasim_counters_read(struct cudasim_counters *counters)
{
    std::lock_guard<std::mutex> lock(mutex);
    *counters = totals;
    counters->calls = call_count;
}

void cudasim_counters_reset(void)
{
    std::lock_guard<std::mutex> lock(mutex);
    totals = cudasim_counters();
    waits_since_launch = 0;
    call_count = 0;
}

bool cudasim_memory_read(int device, struct cudasim_memory *memory)
{
    Device *d = device_at(device);
    if (!d)
        return false;
    std::lock_guard<std::mutex> lock(d->mutex);
    *memory = {d->capacity_bytes, d->used_bytes, d->peak_bytes, d->blocks.size()};
    return true;
}

void cudasim_memory_reset_peak(int device)
{
    Device *d = device_at(device);
    if (!d)
        return;
    std::lock_guard<std::mutex> lock(d->mutex);
    d->peak_bytes = d->used_bytes;
}

bool cudasim_fault(const char *list)
{
    std::string why;
    settings();
    return inject_set(list ? list : "", &why);
}

void cudasim_restore(void)
{
    stream_release_stuck();
    device_restore_all();
}

bool cudasim_order(const char *order)
{
    Schedule schedule;
    settings();
    if (!schedule_parse(order, &schedule))
        return false;
    schedule_set(schedule);
    return true;
}

const char *cudasim_error(void)
{
    static thread_local std::string copy;
    copy = error_text();
    return copy.c_str();
}

size_t cudasim_leaks(char *text, size_t capacity)
{
    size_t count;
    std::string leaks = find_leaks(&count);
    if (capacity)
        snprintf(text, capacity, "%s", leaks.c_str());
    return count;
}

bool cudasim_trace(const char *path)
{
    return trace_open(path);
}

void cudasim_watch(double (*see)(const struct cudasim_launch *launch))
{
    std::lock_guard<std::mutex> lock(mutex);
    watcher = see;
}

void cudasim_mark(const char *name)
{
    std::lock_guard<std::mutex> lock(mutex);
    if (FILE *out = trace_out())
        fprintf(out, "{\"op\":\"mark\",\"name\":%s}\n", json_text(name).c_str());
}

bool cudasim_access_read(const char *kernel, struct cudasim_access *access)
{
    return count_read(kernel, access);
}

} /* extern "C" */
