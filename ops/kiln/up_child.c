/* up_child.c - lifecycle_child starts, reaps and waits; this file adds what people and `kiln down` need to see. */
#include "up_child.h"

#include <errno.h>
#include <grp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define WORDS_MAX 65536 /* of the log's end, in which the last sentence is looked for */

/* --- becoming the program ------------------------------------------------------------------------------------ */

bool up_child_become(const struct up_user *user, int death_signal, pid_t parent)
{
    if (*user->name &&
        (setgid(user->gid) != 0 || initgroups(user->name, user->gid) != 0 || setuid(user->uid) != 0 || chdir("/") != 0))
        return false;
    /* After the user has changed: the kernel forgets it there. */
    if (prctl(PR_SET_PDEATHSIG, death_signal) != 0)
        return false;
    errno = ESRCH;
    return getppid() == parent; /* it may have died before the line above */
}

static void before(void *context)
{
    struct up_child *c = context;
    if (up_child_become(&c->user, c->polite_signal, c->supervisor))
        return;
    dprintf(STDERR_FILENO, "kiln: %s cannot be started%s%s: %s\n", c->name, *c->user.name ? " as user " : "", c->user.name,
            strerror(errno));
    _exit(LIFECYCLE_REFUSED);
}

/* --- putting together ------------------------------------------------------------------------------------------ */

void up_child_init(struct up_child *c, const struct home *home, const char *name, int polite_signal)
{
    char relative[64];
    *c = (struct up_child){.polite_signal = polite_signal, .supervisor = getpid(), .is_whole = true};
    snprintf(c->name, sizeof c->name, "%s", name);
    snprintf(relative, sizeof relative, "log/%s.log", c->name);
    home_path(home, c->log, sizeof c->log, relative);
    snprintf(relative, sizeof relative, "run/%s.pid", c->name);
    home_path(home, c->pid_file, sizeof c->pid_file, relative);
    c->process = (struct lifecycle_child){.name = c->name, .argv = c->argv, .before = before, .context = c, .log_path = c->log};
}

void up_child_done(struct up_child *c)
{
    for (int i = 0; i < c->argc; i++)
        free(c->argv[i]);
    c->argc = 0;
}

void up_child_arg(struct up_child *c, const char *format, ...)
{
    char *arg = NULL;
    va_list args;
    va_start(args, format);
    bool ok = c->argc < UP_CHILD_ARGS_MAX && vasprintf(&arg, format, args) >= 0;
    va_end(args);
    if (ok)
        c->argv[c->argc++] = arg;
    c->is_whole = c->is_whole && ok;
}

void up_child_models(struct up_child *c, const struct home_config *config)
{
    for (int i = 0; i < config->model_count; i++) {
        up_child_arg(c, "--model");
        up_child_arg(c, "%s=%s", config->models[i].name, config->models[i].dir);
    }
}

void up_child_change(struct up_child *c, const char *option, const char *format, ...)
{
    char *value = NULL;
    int i = 0;
    va_list args;
    while (i + 1 < c->argc && strcmp(c->argv[i], option) != 0)
        i++;
    va_start(args, format);
    bool ok = i + 1 < c->argc && vasprintf(&value, format, args) >= 0;
    va_end(args);
    c->is_whole = c->is_whole && ok;
    if (ok) {
        free(c->argv[i + 1]);
        c->argv[i + 1] = value;
    }
}

void up_child_run_as(struct up_child *c, const struct up_user *user)
{
    c->user = *user;
}

/* --- living ------------------------------------------------------------------------------------------------------ */

/* Under another name first: a reader never finds half a number. */
static void write_pid(const struct up_child *c)
{
    char draft[HOME_PATH_MAX + 8];
    snprintf(draft, sizeof draft, "%s.new", c->pid_file);
    FILE *f = fopen(draft, "we");
    if (!f)
        return; /* the disk is full: `kiln down` works without, it only cannot clean up after a killed supervisor */
    bool ok = fprintf(f, "%ld\n", (long)c->process.pid) > 0;
    if (fclose(f) != 0 || !ok || rename(draft, c->pid_file) != 0)
        unlink(draft);
}

void up_child_start(struct up_child *c)
{
    c->process.is_wanted = c->is_whole;
}

enum up_child_news up_child_step(struct up_child *c)
{
    struct stat info;
    off_t log_bytes = stat(c->log, &info) == 0 ? info.st_size : 0;
    lifecycle_child_step(&c->process);
    if (c->process.starts != c->seen_starts) {
        c->seen_starts = c->process.starts;
        c->seen_pid = c->process.pid;
        c->log_from = log_bytes;
        write_pid(c);
        return UP_CHILD_STARTED;
    }
    if (!c->seen_pid || c->process.pid)
        return UP_CHILD_SAME;
    c->seen_pid = 0;
    unlink(c->pid_file);
    return UP_CHILD_DIED;
}

void up_child_signal(struct up_child *c, int number)
{
    lifecycle_child_stop(&c->process, number);
}

bool up_child_is_running(const struct up_child *c)
{
    return c->process.pid != 0;
}

/* --- last words -------------------------------------------------------------------------------------------------- */

bool up_child_is_refused(const struct up_child *c)
{
    return !c->process.pid && c->process.starts > 0 && WIFEXITED(c->process.last_status) &&
           WEXITSTATUS(c->process.last_status) == LIFECYCLE_REFUSED;
}

void up_child_death(const struct up_child *c, char *ret, size_t bytes)
{
    int status = c->process.last_status;
    if (WIFSIGNALED(status))
        snprintf(ret, bytes, "was ended by signal %d", WTERMSIG(status));
    else if (WEXITSTATUS(status) == LIFECYCLE_NO_PROGRAM)
        snprintf(ret, bytes, "could not be started (%s)", c->argv[0]);
    else
        snprintf(ret, bytes, "ended with code %d", WEXITSTATUS(status));
}

/* Logs of kiln's programs are `time level program event key=value`; what is quoted is a JSON string. */
void up_child_sentence(const char *line, char *ret, size_t bytes)
{
    const char *from = strstr(line, " why=");
    if (!from)
        from = strstr(line, " reason=");
    if (!from) {
        snprintf(ret, bytes, "%s", line);
        return;
    }
    from = strchr(from, '=') + 1;
    bool is_quoted = *from == '"';
    size_t used = 0;
    for (from += is_quoted; *from && used + 1 < bytes && *from != (is_quoted ? '"' : ' '); from++) {
        if (is_quoted && *from == '\\' && from[1])
            from++;
        ret[used++] = *from;
    }
    ret[used] = 0;
}

/* Of the lines of one life the last of the gravest. */
static int gravity(const char *line)
{
    if (strncmp(line, "kiln", 4) == 0 || strstr(line, " error ") || strstr(line, "FATAL:") || strstr(line, "PANIC:"))
        return 3;
    if (strstr(line, " warn "))
        return 2;
    return *line ? 1 : 0;
}

void up_child_last_words(const struct up_child *c, char *ret, size_t bytes)
{
    char text[WORDS_MAX];
    struct stat info;
    ret[0] = 0;
    FILE *f = fopen(c->log, "re");
    if (!f)
        return;
    off_t from = c->log_from;
    if (fstat(fileno(f), &info) == 0 && info.st_size - from > WORDS_MAX - 1)
        from = info.st_size - (WORDS_MAX - 1);
    size_t length = fseeko(f, from, SEEK_SET) == 0 ? fread(text, 1, sizeof text - 1, f) : 0;
    fclose(f);
    text[length] = 0;
    /* Who was killed said nothing about it: what it last did is no reason. */
    const int least = WIFSIGNALED(c->process.last_status) ? 3 : 1;
    char *rest = NULL, *best = NULL;
    for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest))
        if (gravity(line) >= least && (!best || gravity(line) >= gravity(best)))
            best = line;
    if (best)
        up_child_sentence(best, ret, bytes);
}
