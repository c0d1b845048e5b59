/* down.c - asks the supervisor and waits for it; what a killed supervisor left is ended here. */
#include "down.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "clock.h"
#include "leftover.h"
#include "lifecycle.h"
#include "progress.h"

#define PATIENCE_S 60 /* for workers without supervisor; they were told by the kernel */

static bool ask(pid_t pid, bool force)
{
    /* Two different signals: two of the same sort might arrive as one. */
    return kill(pid, SIGTERM) == 0 && (!force || kill(pid, SIGINT) == 0);
}

/* pid_file must name the file itself: the supervisor removes the name a moment before it ends, and holds its lock to the end. */
static int await(struct command_call *call, const char *pid_file, pid_t pid)
{
    struct progress bar;
    struct progress_now now = PROGRESS_UNKNOWN;
    const int64_t began_ms = clock_ms();
    int code = COMMAND_DONE;
    progress_begin(&bar, stderr, "kiln down", "s");
    now.note = "waiting for workers to finish their batch (--force does not wait)";
    now.per_second = 0;
    while (lifecycle_pid_alive(pid_file) == pid) {
        now.done = (clock_ms() - began_ms) / 1000;
        if (now.done >= 1)
            progress_update(&bar, &now);
        if (lifecycle_wait(50) > 0) {
            code = lifecycle_stop_code();
            break;
        }
    }
    progress_clear(&bar);
    if (code != COMMAND_DONE)
        command_say(call, code, "stopped waiting; kiln with pid %ld goes on stopping", (long)pid);
    return code;
}

static void tell(void *context, const char *sentence)
{
    struct command_call *call = context;
    fprintf(stderr, "kiln %s: %s\n", call->command->name, sentence);
}

static int down_run(struct command_call *call)
{
    bool force = false;
    char pid_file[HOME_PATH_MAX], why[HOME_PATH_MAX + 256];
    const struct command_option options[] = {{"force", COMMAND_FLAG, &force, 0, 0}};
    int word_count, count = 0;
    if (!command_parse(call, options, 1, NULL, 0, 0, &word_count))
        return command_code(call);
    if (!lifecycle_signals())
        return command_say(call, COMMAND_AWAY, "no signal handlers could be installed");
    home_path(&call->home, pid_file, sizeof pid_file, "run");
    if (access(pid_file, X_OK) != 0 && errno == EACCES) /* what runs there cannot be seen from here */
        return command_refuse(call, "%s is closed to this user: run kiln down as its owner", pid_file);
    home_path(&call->home, pid_file, sizeof pid_file, "run/kiln.pid");
    int pid_fd = open(pid_file, O_RDONLY | O_CLOEXEC), code = COMMAND_DONE;
    if (pid_fd >= 0)
        snprintf(pid_file, sizeof pid_file, "/proc/self/fd/%d", pid_fd);
    pid_t pid = pid_fd >= 0 ? lifecycle_pid_alive(pid_file) : 0;
    if (pid && !ask(pid, force) && errno != ESRCH)
        code = command_refuse(call, "kiln with pid %ld cannot be told to stop: %s", (long)pid, strerror(errno));
    else if (pid)
        code = await(call, pid_file, pid);
    if (pid_fd >= 0)
        close(pid_fd);
    if (code != COMMAND_DONE)
        return code;
    if (!leftover_stop(&call->home, force ? 0 : PATIENCE_S, tell, call, &count, why, sizeof why))
        return lifecycle_stop_count() ? lifecycle_stop_code() : command_refuse(call, "%s", why);
    if (pid || count)
        printf("kiln is down (%s)\n", call->home.dir);
    else
        printf("kiln was not running on %s\n", call->home.dir);
    return COMMAND_DONE;
}

const struct command down_command = {
    "down", "[--force]", "stop everything; workers finish their batch first",
    "  --force    do not wait for running batches: their images are rendered again later\n", down_run};
