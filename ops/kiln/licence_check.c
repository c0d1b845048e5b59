/* licence_check.c - runs the inspecting program and reads the one member that is asked for. */
#include "licence_check.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define REPORT_MAX 65536

extern char **environ;

/* Runs `tool inspect --model DIR --json`; its output (at most bytes - 1) or false with a reason. */
static bool run(const char *tool, const char *model_dir, char *ret, size_t bytes, char *why, size_t why_bytes)
{
    char *const argv[] = {(char *)tool, "inspect", "--model", (char *)model_dir, "--quick", "--json", NULL};
    posix_spawn_file_actions_t actions;
    pid_t pid;
    int pipes[2], status = 0;
    size_t used = 0;
    if (pipe2(pipes, O_CLOEXEC) != 0) {
        snprintf(why, why_bytes, "%s", strerror(errno));
        return false;
    }
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, pipes[1], 1);
    int error = posix_spawn(&pid, tool, &actions, NULL, argv, environ);
    posix_spawn_file_actions_destroy(&actions);
    close(pipes[1]);
    while (!error) {
        char rest[4096]; /* what does not fit is read away, so that the program ends */
        ssize_t got = used + 1 < bytes ? read(pipes[0], ret + used, bytes - 1 - used) : read(pipes[0], rest, sizeof rest);
        if (got == 0)
            break;
        if (got < 0 && errno != EINTR)
            break;
        if (got > 0 && used + 1 < bytes)
            used += (size_t)got;
    }
    close(pipes[0]);
    ret[used] = 0;
    if (error) {
        snprintf(why, why_bytes, "%s", strerror(error));
        return false;
    }
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    if (status != 0)
        snprintf(why, why_bytes, "it ended with code %d", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    return status == 0;
}

bool licence_check_read(const char *tool, const char *model_dir, char *ret, size_t bytes, char *why, size_t why_bytes)
{
    static char report[REPORT_MAX];
    char reason[128] = "it printed no JSON object with a licence";
    bool ok = run(tool, model_dir, report, sizeof report, reason, sizeof reason);
    json_t *root = ok ? json_loads(report, 0, NULL) : NULL;
    const char *licence = json_string_value(json_object_get(root, "licence"));
    if (licence)
        snprintf(ret, bytes, "%s", licence);
    else
        snprintf(why, why_bytes, "the model's licence could not be read (%s inspect --model %s --json): %s", tool, model_dir, reason);
    json_decref(root);
    return licence != NULL;
}

bool licence_check_is_commercial(const char *licence)
{
    return !strcasestr(licence, "non-commercial") && !strcasestr(licence, "noncommercial") && !strcasestr(licence, "non commercial");
}
