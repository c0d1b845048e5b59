/* inject.cpp - faults by list; see inject.h for the grammar. */
#include "inject.h"

#include <unistd.h>

#include <cctype>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#include "device.h"
#include "ledger.h"
#include "settings.h"

namespace cudasim
{

struct Fault {
    std::string point;
    long n = 0, times = 1, seen = 0;
    long value = 0; /* error code, or milliseconds of `slow`, `long` and `hang` */
    int target = -1; /* device or rank; -1: any */
};

static std::mutex &mutex = *new std::mutex; /* guards faults */
static std::vector<Fault> &faults = *new std::vector<Fault>;
static thread_local cudaError_t last_error;

/* --- reading the list -------------------------------------------------------------------------------------------------- */

/* The points of inject.h in their order, then those that are no call of the program's. */
static const char *const names[] = {"malloc", "hostalloc", "launch", "copy", "sync", "stream", "event", "graph", "blas",
                                    "nccl",   "any",       "lost",   "kernel", "stuck", "long", "hang", "absent", "dead", "slow", "wrong"};

static const struct {
    const char *name;
    cudaError_t code;
} error_names[] = {
    {"cudaErrorMemoryAllocation", cudaErrorMemoryAllocation},
    {"cudaErrorLaunchFailure", cudaErrorLaunchFailure},
    {"cudaErrorLaunchTimeout", cudaErrorLaunchTimeout},
    {"cudaErrorLaunchOutOfResources", cudaErrorLaunchOutOfResources},
    {"cudaErrorIllegalAddress", cudaErrorIllegalAddress},
    {"cudaErrorECCUncorrectable", cudaErrorECCUncorrectable},
    {"cudaErrorDevicesUnavailable", cudaErrorDevicesUnavailable},
    {"cudaErrorInvalidValue", cudaErrorInvalidValue},
    {"cudaErrorUnknown", cudaErrorUnknown},
    {"cudaErrorHardwareStackError", cudaErrorHardwareStackError},
};

static bool is_name(const std::string &point)
{
    for (const char *name : names)
        if (point == name)
            return true;
    return false;
}

static bool read_number(const char **at, long *out)
{
    char *end;
    *out = strtol(*at, &end, 10);
    if (end == *at)
        return false;
    *at = end;
    return true;
}

static bool read_value(const char **at, bool is_ms, long *out)
{
    if (is_ms)
        return read_number(at, out);
    for (auto &e : error_names) {
        size_t length = strlen(e.name);
        if (!strncmp(*at, e.name, length) && !isalpha(static_cast<unsigned char>((*at)[length]))) {
            *out = e.code;
            *at += length;
            return true;
        }
    }
    return false;
}

static long default_value(const std::string &point)
{
    if (point == "malloc" || point == "hostalloc")
        return cudaErrorMemoryAllocation;
    if (point == "lost")
        return cudaErrorDevicesUnavailable;
    if (point == "kernel")
        return cudaErrorLaunchFailure;
    if (point == "launch")
        return cudaErrorLaunchOutOfResources;
    return cudaErrorUnknown;
}

static bool read_fault(const char **at, Fault *f, std::string *why)
{
    const char *colon = strchr(*at, ':');
    f->point = colon ? std::string(*at, colon - *at) : std::string(*at);
    if (!is_name(f->point)) {
        *why = "unknown point '" + f->point + "'; README.md lists them";
        return false;
    }
    *at = colon ? colon + 1 : *at + f->point.size();
    if (!colon || !read_number(at, &f->n) || f->n < 1) {
        *why = f->point + ": want a number from 1 after a colon";
        return false;
    }
    f->value = default_value(f->point);
    bool is_ms = f->point == "slow" || f->point == "long" || f->point == "hang";
    bool has_value = **at == '=';
    if (has_value && (++*at, !read_value(at, is_ms, &f->value))) {
        *why = f->point + ": want " + (is_ms ? "milliseconds" : "the name of a cudaError the simulator knows") + " after =";
        return false;
    }
    if (f->point == "slow")
        f->times = LONG_MAX;
    if (is_ms && !has_value) {
        *why = f->point + ": want " + f->point + ":N=MS";
        return false;
    }
    long target;
    if (**at == '@' && (++*at, read_number(at, &target)))
        f->target = static_cast<int>(target);
    if (**at == '*' && (++*at, !read_number(at, &f->times))) {
        *why = f->point + ": want a number after *";
        return false;
    }
    if (**at && **at != ',') {
        *why = std::string("cannot read '") + *at + "'";
        return false;
    }
    *at += **at == ',';
    return true;
}

bool inject_set(const std::string &list, std::string *why)
{
    std::vector<Fault> read;
    for (const char *at = list.c_str(); *at;) {
        Fault f;
        if (!read_fault(&at, &f, why))
            return false;
        read.push_back(f);
    }
    std::lock_guard<std::mutex> lock(mutex);
    faults = read;
    return true;
}

/* --- asking ------------------------------------------------------------------------------------------------------------- */

/* hit counts a call of the point for every fault of its name and target; true when one is due. */
static bool hit(const char *point, int target, long *value)
{
    bool is_due = false;
    for (Fault &f : faults) {
        if (f.point != point || (f.target >= 0 && f.target != target))
            continue;
        f.seen++;
        if (f.seen >= f.n && f.seen - f.n < f.times) {
            is_due = true;
            *value = f.value;
        }
    }
    return is_due;
}

static const char *point_name(Point point)
{
    return point == Point::OTHER ? "other" : names[static_cast<int>(point) - 1];
}

cudaError_t enter(Point point, const char *function)
{
    settings();
    Device *d = device_current();
    if (!d)
        return cudaErrorNoDevice;
    ledger_count_call();
    long code = 0, hang_ms = 0;
    bool is_lost, is_refused;
    {
        std::lock_guard<std::mutex> lock(mutex);
        hit("hang", d->index, &hang_ms);
        is_lost = hit("lost", d->index, &code);
        is_refused = !is_lost && (hit("any", d->index, &code) | hit(point_name(point), d->index, &code));
    }
    if (hang_ms)
        usleep(static_cast<useconds_t>(hang_ms) * 1000);
    if (is_lost)
        device_fail(d, static_cast<cudaError_t>(code),
                    "device " + std::to_string(d->index) + " was lost at " + function + " (injected)");
    if (d->failed)
        return static_cast<cudaError_t>(d->failed.load());
    if (is_refused) {
        error_note(std::string(function) + " failed (injected)");
        return static_cast<cudaError_t>(code);
    }
    return cudaSuccess;
}

KernelFault inject_kernel(int device)
{
    std::lock_guard<std::mutex> lock(mutex);
    long code = 0, delay_ms = 0;
    hit("long", device, &delay_ms);
    if (hit("kernel", device, &code))
        return {KernelFault::FAILS, static_cast<cudaError_t>(code), delay_ms};
    if (hit("stuck", device, &code))
        return {KernelFault::STUCK, cudaErrorLaunchTimeout, delay_ms};
    return {KernelFault::NONE, cudaSuccess, delay_ms};
}

RankFault inject_rank(int rank)
{
    std::lock_guard<std::mutex> lock(mutex);
    long value = 0;
    RankFault fault = {hit("dead", rank, &value), hit("wrong", rank, &value), 0};
    hit("slow", rank, &fault.delay_ms);
    return fault;
}

bool inject_absent(int rank)
{
    std::lock_guard<std::mutex> lock(mutex);
    long value = 0;
    return hit("absent", rank, &value);
}

/* --- the calling thread's last error ------------------------------------------------------------------------------------ */

cudaError_t refuse(cudaError_t code)
{
    if (code != cudaSuccess)
        last_error = code;
    return code;
}

cudaError_t refuse(cudaError_t code, const std::string &sentence)
{
    error_note(sentence);
    return refuse(code);
}

cudaError_t take_last_error()
{
    cudaError_t code = last_error;
    last_error = cudaSuccess;
    return code;
}

cudaError_t peek_last_error()
{
    return last_error;
}

} // namespace cudasim
