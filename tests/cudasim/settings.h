/* settings.h - the environment, read once. What cannot be read ends the process with a sentence: a simulator that
 * guesses what a test wanted proves nothing. */
#ifndef CUDASIM_SETTINGS_H
#define CUDASIM_SETTINGS_H

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace cudasim
{

struct Profile; /* device.h */

struct Settings {
    int device_count;
    const Profile *profile;
    std::vector<size_t> vram_bytes; /* per device */
    size_t context_bytes;           /* of each device, taken before the first allocation */
    bool is_dry;                    /* executes no kernel, copy or library call */
    bool is_overbooked;             /* a dry device gives out more memory than it has */
    bool is_sync;                   /* streams run in the caller */
    int worker_count;
    size_t stack_bytes;
    size_t fill_bytes; /* new device memory is filled with a NaN pattern up to this size */
    int64_t kernel_limit_ms; /* 0: none */
    int64_t nccl_timeout_ms;
    std::string trace, report;
    enum class Leaks { IGNORE, REPORT, FAIL } leaks;
};

const Settings &settings();

/* settings_die prints "cudasim: sentence" and ends the process. */
[[noreturn]] void settings_die(const std::string &sentence);

} // namespace cudasim

#endif
