/* device_list.c - a word, a colon, numbers or names with commas; memory nodes as Linux lists them under /sys. */
#include "device_list.h"

#include <assert.h>
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static_assert(KERN_TEAM_MAX == 16, "DEVICE_LIST_FORMS says so");
#define NUMBER_MAX 63

/* The next item of a list with commas; false: it is empty or too long. */
static bool next_item(const char **at, char *ret, size_t ret_bytes)
{
    size_t length = strcspn(*at, ",");
    if (length == 0 || length >= ret_bytes)
        return false;
    memcpy(ret, *at, length);
    ret[length] = 0;
    *at += length;
    if (**at == 0)
        return true;
    ++*at;
    return **at != 0;
}

static bool is_number(const char *text, int *ret)
{
    if (strspn(text, "0123456789") != strlen(text) || strlen(text) > 2)
        return false;
    *ret = atoi(text);
    return *ret <= NUMBER_MAX;
}

static bool is_listed(const struct device_list *l, const char *device)
{
    for (int i = 0; i < l->count; i++)
        if (strcmp(l->ranks[i].device, device) == 0)
            return true;
    return false;
}

/* One more rank: kind "cpu:", "cuda:" or "dry:". */
static bool add(struct device_list *l, const char *kind, const char *item)
{
    struct device_rank r = {.node = -1};
    int number = -1;
    if (l->count == KERN_TEAM_MAX)
        return false;
    if (strcmp(kind, "dry:") != 0 && !is_number(item, &number))
        return false;
    snprintf(r.device, sizeof r.device, "%s%s", kind, item);
    bool is_twice = is_listed(l, r.device);
    if ((strcmp(kind, "cuda:") == 0 && is_twice) || (strcmp(kind, "dry:") == 0 && l->count && !is_twice))
        return false;
    if (strcmp(kind, "cpu:") == 0) {
        snprintf(r.device, sizeof r.device, "cpu");
        r.node = number;
    }
    l->ranks[l->count++] = r;
    return true;
}

static bool read_list(struct device_list *l, const char *text)
{
    static const char *const kinds[] = {"cpu:", "cuda:", "dry:"};
    char item[48];
    if (strcmp(text, "cpu") == 0 || strcmp(text, "cuda") == 0) {
        l->count = 1;
        snprintf(l->ranks[0].device, sizeof l->ranks[0].device, "%s", text);
        l->ranks[0].node = -1;
        return true;
    }
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        const char *at = text + strlen(kinds[i]);
        if (strncmp(text, kinds[i], strlen(kinds[i])) != 0)
            continue;
        do {
            if (!next_item(&at, item, sizeof item) || !add(l, kinds[i], item))
                return false;
        } while (*at);
        return true;
    }
    return false;
}

bool device_list_read(struct device_list *ret, const char *text, char *why, size_t why_bytes)
{
    *ret = (struct device_list){0};
    if (read_list(ret, text))
        return true;
    snprintf(why, why_bytes, "device '%s', accepted: " DEVICE_LIST_FORMS, text);
    return false;
}

/* --- memory nodes ------------------------------------------------------------------------------------------- */

/* "0-3,8-11" */
static bool read_cores(const char *text, cpu_set_t *ret)
{
    CPU_ZERO(ret);
    while (isdigit((unsigned char)*text)) {
        char *end;
        long first = strtol(text, &end, 10), last = first;
        if (*end == '-')
            last = strtol(end + 1, &end, 10);
        for (long i = first; i <= last && i < CPU_SETSIZE; i++)
            CPU_SET((size_t)i, ret);
        text = *end == ',' ? end + 1 : end;
    }
    return CPU_COUNT(ret) > 0;
}

static bool node_cores(int node, cpu_set_t *ret)
{
    char path[64], text[4096] = "";
    snprintf(path, sizeof path, "/sys/devices/system/node/node%d/cpulist", node);
    FILE *f = fopen(path, "r");
    bool ok = f && fgets(text, sizeof text, f) && read_cores(text, ret);
    if (f)
        fclose(f);
    return ok;
}

bool device_list_cores(const struct device_list *l, int rank, cpu_set_t *ret, char *why, size_t why_bytes)
{
    cpu_set_t may, all;
    int node = l->ranks[rank].node, sharers = 0, before = 0, seen = 0;
    if (!node_cores(node, &all)) {
        snprintf(why, why_bytes, "device cpu:%d: this machine has no memory node %d (see /sys/devices/system/node)", node, node);
        return false;
    }
    sched_getaffinity(0, sizeof may, &may);
    CPU_AND(&all, &all, &may);
    int count = CPU_COUNT(&all);
    if (count == 0) {
        snprintf(why, why_bytes, "device cpu:%d: this process may use no core of memory node %d", node, node);
        return false;
    }
    for (int i = 0; i < l->count; i++) {
        sharers += l->ranks[i].node == node;
        before += l->ranks[i].node == node && i < rank;
    }
    int first = count * before / sharers, end = count * (before + 1) / sharers;
    end = end > first ? end : first + 1; /* more ranks than cores: some share one */
    CPU_ZERO(ret);
    for (size_t i = 0; i < CPU_SETSIZE; i++)
        if (CPU_ISSET(i, &all) && seen++ >= first && seen <= end)
            CPU_SET(i, ret);
    return true;
}
