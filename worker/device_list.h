/* device_list.h - what --device says: one device, or those of a team (engine_team.h has the forms). */
#ifndef KILN_DEVICE_LIST_H
#define KILN_DEVICE_LIST_H

#include <sched.h>
#include <stdbool.h>
#include <stddef.h>

#include "kern_team.h"

struct device_list {
    int count; /* ranks */
    struct device_rank {
        char device[64]; /* as the engine takes it: "cpu", "cuda:1" */
        int node;        /* memory node whose cores it works on; -1: wherever the process may */
    } ranks[KERN_TEAM_MAX];
};

#define DEVICE_LIST_FORMS "cpu, cuda, cuda:N, or a team of up to 16: cuda:I,J.. (different GPUs), cpu:I,J.. (memory nodes)"
bool device_list_read(struct device_list *ret, const char *text, char *why, size_t why_bytes);

/* device_list_cores: those of a rank with a node: of the node's cores that the process may use, its share (one core at least).
 * False: there is no such node here. */
bool device_list_cores(const struct device_list *l, int rank, cpu_set_t *ret, char *why, size_t why_bytes);

#endif
