/* fault_switch.c - one switch at a time, counted across threads. */
#include "fault_switch.h"

#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct { const char *name; enum fault_switch which; } names[] = {
    {"exit-after-stage", FAULT_EXIT_AFTER_STAGE},
    {"exit-before-publish", FAULT_EXIT_BEFORE_PUBLISH},
    {"hang", FAULT_HANG},
    {"oom", FAULT_OOM},
    {"bad-result", FAULT_BAD_RESULT},
    {"lose-device", FAULT_LOSE_DEVICE},
    {"slow-ms", FAULT_SLOW_MS},
};

static enum fault_switch switched = FAULT_NONE;
static int wanted = 1;
static atomic_int called;

bool fault_switch_read(const char *text, char *why, size_t why_bytes)
{
    if (!text || !*text)
        return true;
    size_t name_bytes = strcspn(text, ":");
    char *end = "";
    long number = text[name_bytes] ? strtol(text + name_bytes + 1, &end, 10) : 1;
    for (size_t i = 0; i < sizeof names / sizeof *names && !*end && number >= 0 && number <= 1000000; i++)
        if (strlen(names[i].name) == name_bytes && memcmp(names[i].name, text, name_bytes) == 0) {
            switched = names[i].which;
            wanted = (int)number;
            return true;
        }
    int used = snprintf(why, why_bytes, "KILN_FAULT='%s': want NAME or NAME:NUMBER, NAME one of", text);
    for (size_t i = 0; i < sizeof names / sizeof *names && used > 0 && (size_t)used < why_bytes; i++)
        used += snprintf(why + used, why_bytes - (size_t)used, " %s", names[i].name);
    return false;
}

bool fault_switch_is_due(enum fault_switch which)
{
    if (switched != which)
        return false;
    int number = atomic_fetch_add(&called, 1) + 1;
    return wanted == 0 || number == wanted;
}

int fault_switch_slow_ms(void)
{
    return switched == FAULT_SLOW_MS ? wanted : 0;
}

void fault_switch_die(void)
{
    kill(getpid(), SIGKILL);
    pause();
}
