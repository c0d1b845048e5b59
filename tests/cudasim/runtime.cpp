/* runtime.cpp - the rest of the CUDA runtime: devices, properties, peers, errors and versions. */
#include <cuda_runtime_api.h>

#include <cstring>

#include "device.h"
#include "inject.h"
#include "ledger.h"
#include "settings.h"
#include "stream.h"

using namespace cudasim;

static void fill_properties(struct cudaDeviceProp *out, const Device *d)
{
    const Profile *p = d->profile;
    memset(static_cast<void *>(out), 0, sizeof *out);
    snprintf(out->name, sizeof out->name, "%s (simulated)", p->full_name);
    memset(out->uuid.bytes, d->index + 1, sizeof out->uuid.bytes);
    out->totalGlobalMem = d->capacity_bytes;
    out->major = p->major;
    out->minor = p->minor;
    out->multiProcessorCount = p->sm_count;
    out->warpSize = 32;
    out->maxThreadsPerBlock = 1024;
    out->maxThreadsPerMultiProcessor = p->threads_per_sm;
    out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024;
    out->maxThreadsDim[2] = 64;
    out->maxGridSize[0] = 0x7fffffff;
    out->maxGridSize[1] = out->maxGridSize[2] = 65535;
    out->regsPerBlock = out->regsPerMultiprocessor = 65536;
    out->sharedMemPerBlock = 48 << 10;
    out->sharedMemPerBlockOptin = static_cast<size_t>(p->shared_optin_kb) << 10;
    out->sharedMemPerMultiprocessor = static_cast<size_t>(p->shared_sm_kb) << 10;
    out->reservedSharedMemPerBlock = 1024;
    out->l2CacheSize = p->l2_mb << 20;
    out->memoryBusWidth = p->bus_bits;
    out->totalConstMem = 64 << 10;
    out->asyncEngineCount = 2;
    out->concurrentKernels = 1;
    out->unifiedAddressing = 1;
    out->memoryPoolsSupported = 1;
    out->pciBusID = d->index + 1;
}

extern "C" {

cudaError_t cudaGetDeviceCount(int *count)
{
    settings();
    *count = device_count();
    return *count ? cudaSuccess : refuse(cudaErrorNoDevice, "cudaGetDeviceCount: CUDASIM_DEVICES is 0");
}

cudaError_t cudaSetDevice(int device)
{
    if (cudaError_t e = device_select(device))
        return refuse(e, "cudaSetDevice(" + std::to_string(device) + "): there are " + std::to_string(device_count()));
    ledger_count_call();
    return cudaSuccess; /* also for a failed device: what it holds must be given back */
}

cudaError_t cudaGetDevice(int *device)
{
    *device = device_current_index();
    return device_count() ? cudaSuccess : refuse(cudaErrorNoDevice);
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device)
{
    Device *d = device_at(device);
    if (!d)
        return refuse(cudaErrorInvalidDevice, "cudaGetDeviceProperties: no device " + std::to_string(device));
    fill_properties(properties, d);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device)
{
    Device *d = device_at(device);
    if (!d)
        return refuse(cudaErrorInvalidDevice, "cudaDeviceGetAttribute: no device " + std::to_string(device));
    const Profile *p = d->profile;
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
        *value = p->major;
        break;
    case cudaDevAttrComputeCapabilityMinor:
        *value = p->minor;
        break;
    case cudaDevAttrMultiProcessorCount:
        *value = p->sm_count;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
        *value = 48 << 10;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = p->shared_optin_kb << 10;
        break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        *value = p->shared_sm_kb << 10;
        break;
    case cudaDevAttrMaxThreadsPerBlock:
        *value = 1024;
        break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
        *value = p->threads_per_sm;
        break;
    case cudaDevAttrWarpSize:
        *value = 32;
        break;
    case cudaDevAttrClockRate:
        *value = p->clock_mhz * 1000;
        break;
    case cudaDevAttrMemoryClockRate:
        *value = p->memory_mhz * 1000;
        break;
    case cudaDevAttrGlobalMemoryBusWidth:
        *value = p->bus_bits;
        break;
    case cudaDevAttrL2CacheSize:
        *value = p->l2_mb << 20;
        break;
    case cudaDevAttrAsyncEngineCount:
        *value = 2;
        break;
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrMemoryPoolsSupported:
        *value = 1;
        break;
    case cudaDevAttrPciBusId:
        *value = d->index + 1;
        break;
    case cudaDevAttrPciDeviceId:
    case cudaDevAttrPciDomainId:
    case cudaDevAttrIntegrated:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrManagedMemory:
        *value = 0;
        break;
    default:
        return refuse(cudaErrorNotSupported, "cudaDeviceGetAttribute: attribute " + std::to_string(attribute) +
                                                 " is not simulated");
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int capacity, int device)
{
    if (!device_at(device))
        return refuse(cudaErrorInvalidDevice);
    snprintf(text, static_cast<size_t>(capacity), "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version)
{
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version)
{
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaSetDeviceFlags(unsigned)
{
    return cudaSuccess;
}

cudaError_t cudaDeviceSetLimit(enum cudaLimit, size_t)
{
    return cudaSuccess;
}

/* Kernels of one device may not touch another's memory without this on a GPU; here nothing checks that they asked. */
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer)
{
    if (!device_at(device) || !device_at(peer))
        return refuse(cudaErrorInvalidDevice);
    *can = device != peer;
    return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned)
{
    if (cudaError_t e = enter(Point::OTHER, "cudaDeviceEnablePeerAccess"))
        return refuse(e);
    return device_at(peer) && peer != device_current_index() ? cudaSuccess : refuse(cudaErrorInvalidDevice);
}

/* A real reset also frees everything; a program that relies on that is shown its leaks instead. */
cudaError_t cudaDeviceReset(void)
{
    ledger_count_call();
    if (!device_current())
        return refuse(cudaErrorNoDevice);
    drain_device(device_current_index());
    device_current()->failed = cudaSuccess;
    take_last_error();
    return cudaSuccess;
}

cudaError_t cudaGetLastError(void)
{
    cudaError_t e = take_last_error();
    Device *d = device_current();
    return e || !d ? e : static_cast<cudaError_t>(d->failed.load());
}

cudaError_t cudaPeekAtLastError(void)
{
    cudaError_t e = peek_last_error();
    Device *d = device_current();
    return e || !d ? e : static_cast<cudaError_t>(d->failed.load());
}

static const struct {
    cudaError_t code;
    const char *name, *text;
} error_texts[] = {
#define ENTRY(code, text) {code, #code, text}
    ENTRY(cudaSuccess, "no error"),
    ENTRY(cudaErrorInvalidValue, "invalid argument"),
    ENTRY(cudaErrorMemoryAllocation, "out of memory"),
    ENTRY(cudaErrorInitializationError, "initialization error"),
    ENTRY(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    ENTRY(cudaErrorInvalidPitchValue, "invalid pitch argument"),
    ENTRY(cudaErrorInvalidMemcpyDirection, "invalid copy direction for memcpy"),
    ENTRY(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version"),
    ENTRY(cudaErrorDevicesUnavailable, "CUDA-capable device(s) is/are busy or unavailable"),
    ENTRY(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    ENTRY(cudaErrorInvalidDevice, "invalid device ordinal"),
    ENTRY(cudaErrorECCUncorrectable, "uncorrectable ECC error encountered"),
    ENTRY(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    ENTRY(cudaErrorIllegalState, "the operation cannot be performed in the present state"),
    ENTRY(cudaErrorNotReady, "device not ready"),
    ENTRY(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    ENTRY(cudaErrorLaunchOutOfResources, "too many resources requested for launch"),
    ENTRY(cudaErrorLaunchTimeout, "the launch timed out and was terminated"),
    ENTRY(cudaErrorHostMemoryAlreadyRegistered, "part or all of the requested memory range is already mapped"),
    ENTRY(cudaErrorHostMemoryNotRegistered, "pointer does not correspond to a registered memory region"),
    ENTRY(cudaErrorHardwareStackError, "hardware stack error"),
    ENTRY(cudaErrorLaunchFailure, "unspecified launch failure"),
    ENTRY(cudaErrorNotSupported, "operation not supported"),
    ENTRY(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"),
    ENTRY(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture"),
    ENTRY(cudaErrorStreamCaptureMerge, "operation would result in a merge of separate capture sequences"),
    ENTRY(cudaErrorStreamCaptureUnmatched, "capture was not ended in the same stream as it began"),
    ENTRY(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"),
    ENTRY(cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream"),
    ENTRY(cudaErrorGraphExecUpdateFailure, "the graph update was not performed"),
    ENTRY(cudaErrorUnknown, "unknown error"),
#undef ENTRY
};

const char *cudaGetErrorName(cudaError_t code)
{
    for (auto &entry : error_texts)
        if (entry.code == code)
            return entry.name;
    return "unrecognized error code";
}

const char *cudaGetErrorString(cudaError_t code)
{
    for (auto &entry : error_texts)
        if (entry.code == code)
            return entry.text;
    return "unrecognized error code";
}

} /* extern "C" */
