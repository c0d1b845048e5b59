/* cuda_simulator.c - functions by their names in the module. */
#include "cuda_simulator.h"

#include <dlfcn.h>
#include <stdlib.h>

struct cuda_simulator_calls cuda_simulator;

int cuda_simulator_find(void **state)
{
    (void)state;
    void *module = dlopen(getenv("KILN_CUDA_MODULE"), RTLD_NOW | RTLD_LOCAL);
    if (!module)
        return -1;
    *(void **)&cuda_simulator.fault = dlsym(module, "cudasim_fault");
    *(void **)&cuda_simulator.restore = dlsym(module, "cudasim_restore");
    *(void **)&cuda_simulator.leaks = dlsym(module, "cudasim_leaks");
    *(void **)&cuda_simulator.counters = dlsym(module, "cudasim_counters_read");
    *(void **)&cuda_simulator.counters_reset = dlsym(module, "cudasim_counters_reset");
    return cuda_simulator.fault && cuda_simulator.restore && cuda_simulator.leaks && cuda_simulator.counters && cuda_simulator.counters_reset
               ? 0 : -1;
}
