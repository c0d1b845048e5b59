/* device.h - the fake devices: what they say they are, their memory, their health.
 *
 * Memory of a device is a range of addresses of its own, reserved at start and never reused for anything else, so an
 * address says which device it belongs to. Pages exist only inside live allocations; each allocation ends (but for
 * 256-byte alignment) at a page that cannot be touched. In dry mode no page exists: only addresses and sums.
 * Health: a device that failed answers every later call with the same error, as a CUDA context does. */
#ifndef CUDASIM_DEVICE_H
#define CUDASIM_DEVICE_H

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <map>
#include <mutex>
#include <string>

namespace cudasim
{

/* From the vendor's data sheets and the CUDA C++ programming guide's table of compute capabilities. */
struct Profile {
    const char *name, *full_name;
    int major, minor;
    int memory_mb;
    int sm_count;
    int shared_optin_kb, shared_sm_kb; /* a block may ask for; an SM has */
    int l2_mb;
    int threads_per_sm;
    int clock_mhz, memory_mhz, bus_bits;
};
const Profile *device_profile(const char *name); /* NULL: unknown */
std::string device_profile_names();

struct Device {
    int index;
    const Profile *profile;
    size_t capacity_bytes;
    char *base;
    size_t range_bytes;
    std::atomic<int> failed{cudaSuccess}; /* sticky */

    std::mutex mutex; /* guards what follows */
    size_t used_bytes, peak_bytes;
    std::map<size_t, size_t> blocks; /* offset: bytes asked for */
    std::map<size_t, size_t> holes;  /* offset: bytes of address space */
};

int device_count();
Device *device_at(int index);   /* NULL: no such device */
Device *device_current();       /* of the calling thread; NULL: there is none at all */
int device_current_index();
cudaError_t device_select(int index);
Device *device_of(const void *address); /* whose memory it is; NULL: not a device's */

/* device_allocate: NULL when the device has not that much left. */
void *device_allocate(Device *d, size_t bytes);
bool device_release(Device *d, void *p, size_t *ret_bytes); /* false: not the start of an allocation */

/* device_holds: does the whole range lie in one live allocation? */
bool device_holds(Device *d, const void *p, size_t bytes);

/* device_describe: "16 bytes past the end of 4096 bytes of device 0", for messages. */
std::string device_describe(const void *address);

/* device_fail makes the device answer `code` from now on; the sentence is for cudasim_error. */
void device_fail(Device *d, cudaError_t code, const std::string &sentence);
void device_restore_all();

/* The sentence behind the last failure. */
void error_note(const std::string &sentence);
std::string error_text();

} // namespace cudasim

#endif
