/* clock.h - time that only goes forward (CLOCK_MONOTONIC), and the one place that sleeps. */
#ifndef KILN_CLOCK_H
#define KILN_CLOCK_H

#include <stdint.h>

int64_t clock_ms(void);
double clock_s(void);
void clock_sleep_ms(int64_t ms);
uint64_t clock_boot_epoch(void); /* unique for this process: from the wall clock at the first call, never 0 */

#endif
