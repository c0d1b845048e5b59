/* fault_switch.h - failures on demand, for tests and drills: KILN_FAULT=NAME[:N], off unless the variable is set.
 *
 *   exit-after-stage[:N]     dies (SIGKILL) when the Nth image is staged and spooled, before RESULT
 *   exit-before-publish[:N]  dies when the Nth image was committed, before its file is published
 *   hang[:N]                 the Nth render never ends
 *   oom[:N]                  the Nth render finds no memory
 *   bad-result[:N]           the Nth render gives NaN
 *   lose-device[:N]          the Nth render loses its device
 *   slow-ms:N                every step takes N ms longer
 * N is 1 unless given; 0 means every time. */
#ifndef KILN_FAULT_SWITCH_H
#define KILN_FAULT_SWITCH_H

#include <stdbool.h>
#include <stddef.h>

enum fault_switch {
    FAULT_NONE,
    FAULT_EXIT_AFTER_STAGE,
    FAULT_EXIT_BEFORE_PUBLISH,
    FAULT_HANG,
    FAULT_OOM,
    FAULT_BAD_RESULT,
    FAULT_LOSE_DEVICE,
    FAULT_SLOW_MS,
};

/* fault_switch_read takes KILN_FAULT's value (NULL: none). False: no such switch, why lists them. */
bool fault_switch_read(const char *text, char *why, size_t why_bytes);
bool fault_switch_is_due(enum fault_switch which); /* counts the calls; true at the Nth */
int fault_switch_slow_ms(void);
void fault_switch_die(void); /* as kill -9 would */

#endif
