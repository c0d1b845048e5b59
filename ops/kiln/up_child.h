/* up_child.h - a program that `kiln up` supervises: its command line, its log, its pid file, its last words.
 *
 *   HOME/log/NAME.log   what it says, appended
 *   HOME/run/NAME.pid   who it is, written at each start, removed when it is stopped
 *
 * If the supervisor dies, the kernel sends the child its polite signal (PR_SET_PDEATHSIG): nothing runs on without
 * somebody who would start it again. */
#ifndef KILN_UP_CHILD_H
#define KILN_UP_CHILD_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include "home.h"
#include "lifecycle.h"

#define UP_CHILD_ARGS_MAX (2 * HOME_MODELS_MAX + 64)

struct up_user { /* whom a program runs as; name "": the caller */
    char name[64];
    unsigned uid, gid;
};

struct up_child {
    struct lifecycle_child process;
    char name[32], log[HOME_PATH_MAX], pid_file[HOME_PATH_MAX];
    char *argv[UP_CHILD_ARGS_MAX + 1];
    int argc;
    bool is_whole;      /* no argument was lost for lack of memory or room */
    int polite_signal;  /* asks it to end in its own time */
    pid_t supervisor;
    struct up_user user;
    int seen_starts;
    pid_t seen_pid;
    off_t log_from;     /* where the log of this life begins */
};

enum up_child_news { UP_CHILD_SAME, UP_CHILD_STARTED, UP_CHILD_DIED };

void up_child_init(struct up_child *c, const struct home *home, const char *name, int polite_signal);
void up_child_done(struct up_child *c); /* accepts {0} */
void up_child_arg(struct up_child *c, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* up_child_models: --model NAME=DIR for each that is served. */
void up_child_models(struct up_child *c, const struct home_config *config);
/* up_child_change gives another value to an option that has one already: it counts from the next start. */
void up_child_change(struct up_child *c, const char *option, const char *format, ...) __attribute__((format(printf, 3, 4)));
void up_child_run_as(struct up_child *c, const struct up_user *user);

void up_child_start(struct up_child *c);                 /* from now on it is wanted */
enum up_child_news up_child_step(struct up_child *c);    /* call often */
void up_child_signal(struct up_child *c, int signal);    /* and it is not wanted any more */
bool up_child_is_running(const struct up_child *c);
bool up_child_is_refused(const struct up_child *c);      /* it ended with code 2: the same again would not help */

/* up_child_death: "ended with code 2" or "was ended by signal 9". */
void up_child_death(const struct up_child *c, char *ret, size_t bytes);
/* up_child_last_words: the sentence this life ended with, from its log; "" when it said nothing. */
void up_child_last_words(const struct up_child *c, char *ret, size_t bytes);
/* up_child_sentence picks it from a line of a log: what stands behind why= or reason=, else the line. */
void up_child_sentence(const char *line, char *ret, size_t bytes);

/* up_child_become: in a forked child, before exec. False (errno) when it could not. */
bool up_child_become(const struct up_user *user, int death_signal, pid_t parent);

#endif
