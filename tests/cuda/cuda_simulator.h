/* cuda_simulator.h - what tests ask the simulator besides CUDA's API (cudasim_control.h), through the module that the backend opens. */
#ifndef CUDA_SIMULATOR_H
#define CUDA_SIMULATOR_H

#include "cudasim_control.h"

struct cuda_simulator_calls {
    bool (*fault)(const char *list);
    void (*restore)(void);
    size_t (*leaks)(char *text, size_t capacity);
    void (*counters)(struct cudasim_counters *counters);
    void (*counters_reset)(void);
};
extern struct cuda_simulator_calls cuda_simulator;

/* cuda_simulator_find fills it; a cmocka group fixture. Fails where KILN_CUDA_MODULE names no module of the simulator's. */
int cuda_simulator_find(void **state);

#endif
