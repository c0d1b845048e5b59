/* leftover.c - see leftover.h. Workers end first, because a coordinator that answers lets them end sooner; PostgreSQL
 * last, because the coordinator still writes. */
#include "leftover.h"

#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#include "clock.h"
#include "lifecycle.h"

#define TOLD_S 20        /* after the polite signal */
#define KILLED_S 10      /* after SIGKILL, which only a process stuck in the kernel survives */
#define POSTGRES_S 120   /* a fast shutdown writes a checkpoint */

/* Ends: what to send, and how long to wait for it. */
struct step { int signal, seconds; };

struct leftover {
    const struct home *home;
    void (*tell)(void *, const char *);
    void *context;
    int count;
    char *why;
    size_t why_bytes;
};

static pid_t read_pid(const char *path)
{
    long pid = 0;
    FILE *f = fopen(path, "re");
    if (!f)
        return 0;
    if (fscanf(f, "%ld", &pid) != 1 || pid <= 1)
        pid = 0;
    fclose(f);
    return (pid_t)pid;
}

/* Is pid a `program` that works on this home? A zombie has no command line: it has ended. */
static bool is_ours(const struct home *home, pid_t pid, const char *program)
{
    char path[64], line[65536], inside[HOME_PATH_MAX];
    snprintf(path, sizeof path, "/proc/%ld/cmdline", (long)pid);
    FILE *f = fopen(path, "re");
    if (!f)
        return false;
    size_t length = fread(line, 1, sizeof line - 1, f);
    fclose(f);
    line[length] = 0;
    const char *slash = strrchr(line, '/');
    if (length == 0 || strcmp(slash ? slash + 1 : line, program) != 0)
        return false;
    home_path(home, inside, sizeof inside, "");
    for (size_t at = strlen(line) + 1; at < length; at += strlen(line + at) + 1)
        if (strstr(line + at, inside))
            return true;
    return false;
}

static bool fail(struct leftover *l, const char *program, pid_t pid, const char *reason)
{
    snprintf(l->why, l->why_bytes, "%s with pid %ld of an earlier run %s", program, (long)pid, reason);
    return false;
}

/* Waits until it is gone; true when it is. */
static bool await(struct leftover *l, pid_t pid, const char *program, int seconds)
{
    const int64_t until_ms = clock_ms() + 1000 * (int64_t)seconds;
    while (is_ours(l->home, pid, program)) {
        if (clock_ms() >= until_ms || lifecycle_stop_count() > 0)
            return false;
        lifecycle_wait(50);
    }
    return true;
}

static bool stop(struct leftover *l, const char *pid_file, const char *program, const struct step *steps)
{
    char path[HOME_PATH_MAX], sentence[HOME_PATH_MAX];
    home_path(l->home, path, sizeof path, pid_file);
    pid_t pid = read_pid(path);
    if (!pid || !is_ours(l->home, pid, program)) {
        if (strncmp(pid_file, "run/", 4) == 0)
            unlink(path);
        return true;
    }
    l->count++;
    snprintf(sentence, sizeof sentence, "waiting for %s with pid %ld of an earlier run to end", program, (long)pid);
    l->tell(l->context, sentence);
    for (; steps->seconds; steps++) {
        if (steps->signal && kill(pid, steps->signal) != 0 && errno != ESRCH)
            return fail(l, program, pid, strerror(errno));
        if (await(l, pid, program, steps->seconds)) {
            if (strncmp(pid_file, "run/", 4) == 0)
                unlink(path);
            return true;
        }
        if (lifecycle_stop_count() > 0)
            return fail(l, program, pid, "is still ending");
    }
    return fail(l, program, pid, "does not end, even by SIGKILL");
}

static bool stop_workers(struct leftover *l, const struct step *steps)
{
    char path[HOME_PATH_MAX], pid_file[320];
    bool ok = true;
    home_path(l->home, path, sizeof path, "run");
    DIR *dir = opendir(path);
    for (struct dirent *e; dir && ok && (e = readdir(dir));) {
        size_t length = strlen(e->d_name);
        if (length < 12 || strncmp(e->d_name, "worker-", 7) != 0 || strcmp(e->d_name + length - 4, ".pid") != 0)
            continue;
        snprintf(pid_file, sizeof pid_file, "run/%s", e->d_name);
        ok = stop(l, pid_file, "kiln-worker", steps);
    }
    if (dir)
        closedir(dir);
    return ok;
}

bool leftover_stop(const struct home *home, int patience_s, void (*tell)(void *, const char *), void *context, int *ret_count,
                   char *why, size_t why_bytes)
{
    struct leftover l = {.home = home, .tell = tell, .context = context, .why = why, .why_bytes = why_bytes};
    const struct step patient[] = {{0, patience_s}, {SIGTERM, TOLD_S}, {SIGTERM, TOLD_S}, {SIGKILL, KILLED_S}, {0, 0}};
    const struct step polite[] = {{SIGTERM, TOLD_S}, {SIGKILL, KILLED_S}, {0, 0}};
    const struct step fast[] = {{SIGINT, POSTGRES_S}, {SIGQUIT, TOLD_S}, {SIGKILL, KILLED_S}, {0, 0}};
    bool ok = stop_workers(&l, patience_s > 0 ? patient : patient + 1) && stop(&l, "run/coordinator.pid", "kiln-coordinator", polite) &&
              stop(&l, "run/postgres.pid", "postgres", fast) && stop(&l, "postgres/postmaster.pid", "postgres", fast);
    *ret_count = l.count;
    return ok;
}
