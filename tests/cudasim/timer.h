/* timer.h - the time that events, limits and time-outs go by. */
#ifndef CUDASIM_TIMER_H
#define CUDASIM_TIMER_H

#include <time.h>

namespace cudasim
{

/* timer_ms: milliseconds since some moment in the past; never goes back. */
inline double timer_ms()
{
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<double>(t.tv_sec) * 1e3 + static_cast<double>(t.tv_nsec) / 1e6;
}

} // namespace cudasim

#endif
