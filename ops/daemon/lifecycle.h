/* lifecycle.h - being a well-mannered process: signals, pid files, systemd's word, supervised children. */
#ifndef KILN_LIFECYCLE_H
#define KILN_LIFECYCLE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/* Exit codes, of every program here. */
enum lifecycle_exit {
    LIFECYCLE_DONE = 0,
    LIFECYCLE_FAILED = 1,       /* some tasks, some pictures */
    LIFECYCLE_REFUSED = 2,      /* usage or input: trying again gives the same */
    LIFECYCLE_TEMPORARY = 75,   /* something is away: trying again may help (EX_TEMPFAIL of sysexits.h) */
    LIFECYCLE_NO_PROGRAM = 127, /* of a child: it could not be executed, as in a shell */
    LIFECYCLE_BY_SIGNAL = 128,  /* + the signal's number */
};

/* lifecycle_signals: SIGTERM and SIGINT are counted (first: drain, second: leave now); SIGPIPE ignored. */
bool lifecycle_signals(void);
int lifecycle_stop_count(void);
int lifecycle_stop_signal(void);  /* the first: SIGTERM or SIGINT; 0: none came */
int lifecycle_stop_code(void);    /* the exit code that names it */
int lifecycle_fd(void);           /* readable when a signal came (for poll) */
/* lifecycle_wait sleeps until a signal comes, but no longer than ms; how many have come. The turn of a loop that watches
 * something without a descriptor: the next turn sleeps again, whatever came. */
int lifecycle_wait(int ms);

/* lifecycle_files lets this process open as many files as the system permits it, and says how many; 0: not known. Shells start with
 * 1024, which is as many workers as one coordinator is to serve, and libzmq ends the process when it cannot accept one more. */
uint64_t lifecycle_files(void);

/* lifecycle_pid_file writes the pid and holds a lock on the file until the process ends; false when another process
 * holds it (why names its pid). lifecycle_pid_alive: who holds it, or 0. */
bool lifecycle_pid_file(const char *path, char *why, unsigned long why_bytes);
pid_t lifecycle_pid_alive(const char *path);
void lifecycle_notify(const char *state); /* sd_notify datagram, if NOTIFY_SOCKET is set: "READY=1" */

/* A child that is started again with backoff when it dies (1 s, 2, 4 .. 30; back to 1 after a minute of life). */
struct lifecycle_child {
    const char *name;
    char *const *argv;
    void (*before)(void *);   /* in the child, before exec: become another user, ...; NULL: nothing */
    void *context;
    const char *log_path;     /* stdout and stderr go there, appended; NULL: inherited */
    pid_t pid;                /* 0: not running */
    int64_t started_ms, start_at_ms;
    int backoff_ms, starts;
    int last_status;          /* of waitpid */
    bool is_wanted;
};
void lifecycle_child_step(struct lifecycle_child *c); /* start, reap or wait; call often */
void lifecycle_child_stop(struct lifecycle_child *c, int signal);

#endif
