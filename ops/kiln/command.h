/* command.h - what a sub-command of kiln is, and what all of them share: options, sentences, exit codes.
 *
 *   static int status_run(struct command_call *call)
 *   {
 *       const char *name = NULL;
 *       bool json = false;
 *       const struct command_option options[] = {{"json", COMMAND_FLAG, &json, 0, 0}};
 *       const char *words[1];
 *       int word_count;
 *       if (!command_parse(call, options, 1, words, 0, 1, &word_count))
 *           return command_code(call);          -- it has said why on stderr, or answered --help
 *       struct task_store *store;
 *       int code = command_store(call, &store); -- opens the database this home uses
 *       if (code != COMMAND_DONE)
 *           return code;
 *       ...
 *   }
 *   const struct command status_command = {"status", "[NAME]", "counters and rates", status_usage, status_run};
 *
 * --home DIR, --database URI and --help are understood by command_parse in every command, so call->home is valid
 * after it. kiln_main.c holds the table of commands. */
#ifndef KILN_COMMAND_H
#define KILN_COMMAND_H

#include <stdbool.h>
#include <stdint.h>

#include "home.h"
#include "lifecycle.h"
#include "pg.h"

enum command_exit {
    COMMAND_DONE = LIFECYCLE_DONE,
    COMMAND_FAILED = LIFECYCLE_FAILED,
    COMMAND_REFUSED = LIFECYCLE_REFUSED,
    COMMAND_AWAY = LIFECYCLE_TEMPORARY, /* the database or the coordinator */
};

struct command_call;
struct command {
    const char *name;   /* "status" */
    const char *words;  /* "[NAME] [--json]", for the first line of --help */
    const char *line;   /* one line for `kiln --help` */
    const char *usage;  /* the rest of `kiln NAME --help`: options, examples; "" is fine */
    int (*run)(struct command_call *call); /* returns the exit code */
};
struct command_call {
    const struct command *command;
    const char *home_option;  /* --home or NULL */
    const char *database;     /* --database or NULL; command_store resolves it */
    struct home home;         /* valid after command_parse */
    int argc;
    char **argv;              /* what follows the command's name */
    bool is_help;             /* --help was answered: command_parse returned false and the exit code is 0 */
};

enum command_kind {
    COMMAND_FLAG,   /* bool: present */
    COMMAND_TEXT,   /* const char *: last one wins is not allowed; twice is refused */
    COMMAND_NUMBER, /* int64_t within [min, max] */
    COMMAND_LIST,   /* struct command_list: may be given many times */
};
#define COMMAND_LIST_MAX 64
struct command_list { int count; const char *items[COMMAND_LIST_MAX]; };
struct command_option { const char *name; enum command_kind kind; void *value; int64_t min, max; };

/* command_parse takes "--name value" and "--name=value", "--" ends options, "-" is a word. False: a sentence is on
 * stderr (or the help on stdout) and the caller returns command_code(call). words has room for words_max. */
bool command_parse(struct command_call *call, const struct command_option *options, int option_count,
                   const char **words, int words_min, int words_max, int *ret_word_count);
int command_code(const struct command_call *call); /* after command_parse said false: 0 for --help, else 2 */

/* command_refuse prints "kiln status: sentence" on stderr and returns COMMAND_REFUSED. */
int command_refuse(const struct command_call *call, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* command_say: the same with the exit code the caller means. */
int command_say(const struct command_call *call, int code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* command_fault prints a database error and returns 75 when the database is away, else 2. */
int command_fault(const struct command_call *call, const struct pg_error *why);

/* command_store opens the task store of --database, libpq's environment, or the home's database, in this order.
 * COMMAND_DONE, or the exit code after a sentence ("kiln is not running on ..."). */
struct task_store;
int command_store(struct command_call *call, struct task_store **ret);

/* command_nearest returns the candidate that looks most like word, or NULL when none is near. */
const char *command_nearest(const char *word, const char *const *candidates, int count);

#endif
