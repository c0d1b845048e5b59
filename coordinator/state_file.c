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

/* False: errno says why, also when it was the last bytes that did not fit. */
static bool write_whole(const char *path, const struct json_text *t)
{
    FILE *file = fopen(path, "we");
    if (!file)
        return false;
    bool ok = fwrite(t->data, 1, t->length, file) == t->length;
    int error = errno;
    if (fclose(file) != 0 && ok)
        return false;
    errno = error;
    return ok;
}

bool state_file_write(const char *path, const char *endpoint, int metrics_port, const char *database_state, char *why, size_t why_bytes)
{
    char beside[PATH_MAX];
    struct json_text t = {0};
    int length = snprintf(beside, sizeof beside, "%s.%ld.new", path, (long)getpid()), error = 0;
    compose(&t, endpoint, metrics_port, database_state);
    if (length < 0 || (size_t)length >= sizeof beside) {
        error = ENAMETOOLONG;
    } else if (t.failed) {
        error = ENOMEM;
    } else if (!write_whole(beside, &t) || rename(beside, path) != 0) {
        error = errno;
        unlink(beside);
    }
    if (error)
        snprintf(why, why_bytes, "state file %.512s: cannot write it: %s", path, strerror(error));
    json_text_done(&t);
    return !error;
}

void state_file_remove(const char *path)
{
    unlink(path);
}
