/* state_file.c - written beside and renamed, so that nobody reads half of it. */
#include "state_file.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "json_text.h"

static void compose(struct json_text *t, const char *endpoint, int metrics_port, const char *database_state)
{
    json_text_format(t, "{\"pid\":%ld,\"endpoint\":", (long)getpid());
    json_text_text(t, endpoint);
    json_text_put(t, ",\"metrics_port\":");
    if (metrics_port < 0)
        json_text_put(t, "null");
    else
        json_text_format(t, "%d", metrics_port);
    json_text_put(t, ",\"database_state\":");
    json_text_text(t, database_state);
    json_text_put(t, "}\n");
}

bool state_file_write(const char *path, const char *endpoint, int metrics_port, const char *database_state, char *why, size_t why_bytes)
{
    char beside[PATH_MAX];
    struct json_text t = {0};
    bool ok = (size_t)snprintf(beside, sizeof beside, "%s.%ld.new", path, (long)getpid()) < sizeof beside;
    compose(&t, endpoint, metrics_port, database_state);
    FILE *file = ok && !t.failed ? fopen(beside, "we") : NULL;
    ok = file && fwrite(t.data, 1, t.length, file) == t.length;
    if (file && fclose(file) != 0)
        ok = false;
    if (!ok || rename(beside, path) != 0) {
        snprintf(why, why_bytes, "state file %s: cannot write it: %s", path, strerror(errno));
        if (file)
            unlink(beside);
        ok = false;
    }
    json_text_done(&t);
    return ok;
}

void state_file_remove(const char *path)
{
    unlink(path);
}
