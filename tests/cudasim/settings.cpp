/* settings.cpp - reads CUDASIM_*; README.md lists them. */
#include "settings.h"

#include <unistd.h>

#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>

#include "device.h"
#include "inject.h"
#include "schedule.h"

namespace cudasim
{

void settings_die(const std::string &sentence)
{
    fprintf(stderr, "cudasim: %s\n", sentence.c_str());
    fflush(nullptr);
    _exit(2);
}

static const char *text_of(const char *name)
{
    const char *value = getenv(name);
    return value && *value ? value : nullptr;
}

static int64_t number_of(const char *name, int64_t otherwise, int64_t low, int64_t high)
{
    const char *value = text_of(name);
    if (!value)
        return otherwise;
    char *end;
    long long n = strtoll(value, &end, 10);
    if (*end || n < low || n > high)
        settings_die(std::string(name) + "=" + value + ": want a number from " + std::to_string(low) + " to " +
                     std::to_string(high));
    return n;
}

/* CUDASIM_VRAM_MB: one number for all devices, or one for each with commas between. */
static std::vector<size_t> vram_of(int device_count, const Profile *profile)
{
    std::vector<size_t> bytes;
    const char *value = text_of("CUDASIM_VRAM_MB");
    for (const char *at = value; at;) {
        char *end;
        long long mb = strtoll(at, &end, 10);
        if (mb < 1 || mb > (1 << 20) || (*end && *end != ','))
            settings_die(std::string("CUDASIM_VRAM_MB=") + value + ": want megabytes, one number or one for each device");
        bytes.push_back(static_cast<size_t>(mb) << 20);
        at = *end ? end + 1 : nullptr;
    }
    if (bytes.empty())
        bytes.push_back(static_cast<size_t>(profile->memory_mb) << 20);
    if (bytes.size() == 1)
        bytes.resize(device_count, bytes[0]);
    if (bytes.size() != static_cast<size_t>(device_count))
        settings_die("CUDASIM_VRAM_MB names " + std::to_string(bytes.size()) + " devices, CUDASIM_DEVICES " +
                     std::to_string(device_count));
    return bytes;
}

static Settings::Leaks leaks_of()
{
    const char *value = text_of("CUDASIM_LEAKS");
    if (!value || !strcmp(value, "ignore"))
        return Settings::Leaks::IGNORE;
    if (!strcmp(value, "report"))
        return Settings::Leaks::REPORT;
    if (!strcmp(value, "fail"))
        return Settings::Leaks::FAIL;
    settings_die(std::string("CUDASIM_LEAKS=") + value + ": want ignore, report or fail");
}

static Settings *read_settings()
{
    Settings *s = new Settings();
    s->device_count = static_cast<int>(number_of("CUDASIM_DEVICES", 1, 0, 16));
    const char *name = text_of("CUDASIM_DEVICE");
    s->profile = device_profile(name ? name : "a100");
    if (!s->profile)
        settings_die(std::string("CUDASIM_DEVICE=") + name + ": want one of " + device_profile_names());
    s->vram_bytes = vram_of(s->device_count, s->profile);
    s->context_bytes = static_cast<size_t>(number_of("CUDASIM_CONTEXT_MB", 0, 0, 1 << 16)) << 20;
    const char *mode = text_of("CUDASIM_MODE");
    if (mode && strcmp(mode, "dry") && strcmp(mode, "run"))
        settings_die(std::string("CUDASIM_MODE=") + mode + ": want run or dry");
    s->is_dry = mode && !strcmp(mode, "dry");
    s->is_overbooked = number_of("CUDASIM_OVERBOOK", 0, 0, 1) != 0;
    if (s->is_overbooked && !s->is_dry)
        settings_die("CUDASIM_OVERBOOK=1 needs CUDASIM_MODE=dry");
    s->is_sync = number_of("CUDASIM_SYNC", 0, 0, 1) != 0;
    unsigned cores = std::thread::hardware_concurrency();
    s->worker_count = static_cast<int>(number_of("CUDASIM_THREADS", cores < 1 ? 1 : cores > 8 ? 8 : cores, 1, 64));
#ifdef CUDASIM_ONE_WORKER
    s->worker_count = 1;
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(CUDASIM_TSAN)
    s->stack_bytes = 256 << 10;
#else
    s->stack_bytes = 64 << 10;
#endif
    s->stack_bytes =
        static_cast<size_t>(number_of("CUDASIM_STACK_KB", static_cast<int64_t>(s->stack_bytes >> 10), 16, 65536)) << 10;
    s->fill_bytes = static_cast<size_t>(number_of("CUDASIM_FILL_MB", 64, 0, 1 << 20)) << 20;
    s->kernel_limit_ms = number_of("CUDASIM_KERNEL_LIMIT_MS", 0, 0, INT_MAX);
    s->nccl_timeout_ms = number_of("CUDASIM_NCCL_TIMEOUT_MS", 30000, 1, INT_MAX);
    copies_are_early = number_of("CUDASIM_CPASYNC_EARLY", 0, 0, 1) != 0;
    Schedule schedule = {Order::FORWARD, 1};
    const char *order = text_of("CUDASIM_ORDER");
    if (order && !schedule_parse(order, &schedule))
        settings_die(std::string("CUDASIM_ORDER=") + order + ": want fwd, rev or rand:N");
    schedule_set(schedule);
    const char *faults = text_of("CUDASIM_FAULT");
    std::string why;
    if (faults && !inject_set(faults, &why))
        settings_die(std::string("CUDASIM_FAULT=") + faults + ": " + why);
    s->trace = text_of("CUDASIM_TRACE") ? text_of("CUDASIM_TRACE") : "";
    s->report = text_of("CUDASIM_REPORT") ? text_of("CUDASIM_REPORT") : "";
    s->leaks = leaks_of();
    return s;
}

const Settings &settings()
{
    static Settings *s = read_settings();
    return *s;
}

} // namespace cudasim
