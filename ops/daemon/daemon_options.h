/* daemon_options.h - command lines by getopt_long: the loop, the sentences, and the options that every daemon has.
 *
 *   enum { OPTION_BIND = DAEMON_OPTIONS_OWN, ... };
 *   static const struct option words[] = {{"bind", required_argument, NULL, OPTION_BIND}, ..., DAEMON_OPTIONS_WORDS};
 *   if (!daemon_options_read(&common, words, read_word, self, argc, argv, why, sizeof why)) ...
 *
 * Values of long options are DAEMON_OPTIONS_OWN and above, so that letters can be told from them. */
#ifndef KILN_DAEMON_OPTIONS_H
#define KILN_DAEMON_OPTIONS_H

#include <getopt.h>
#include <stdbool.h>
#include <stddef.h>

#include "log.h"

struct daemon_options {
    enum log_level log_level;
    const char *log_path;  /* NULL: stderr only */
    int metrics_port;      /* 0: any free one; -1: no page */
    bool wants_help, wants_version;
};

enum daemon_options_word {
    DAEMON_OPTIONS_LOG_LEVEL = 256,
    DAEMON_OPTIONS_LOG,
    DAEMON_OPTIONS_METRICS_PORT,
    DAEMON_OPTIONS_HELP,
    DAEMON_OPTIONS_VERSION,
    DAEMON_OPTIONS_OWN,
};

/* The end of a daemon's table, and of its --help. */
#define DAEMON_OPTIONS_WORDS                                             \
    {"log-level", required_argument, NULL, DAEMON_OPTIONS_LOG_LEVEL},    \
    {"log", required_argument, NULL, DAEMON_OPTIONS_LOG},                \
    {"metrics-port", required_argument, NULL, DAEMON_OPTIONS_METRICS_PORT}, \
    {"help", no_argument, NULL, DAEMON_OPTIONS_HELP},                    \
    {"version", no_argument, NULL, DAEMON_OPTIONS_VERSION},              \
    {NULL, 0, NULL, 0}
#define DAEMON_OPTIONS_USAGE                                             \
    "  --log-level L        debug, info (default), warn, error\n"        \
    "  --log FILE           log there as well\n"                         \
    "  --metrics-port P     Prometheus text on 127.0.0.1:P (0: any free port)\n" \
    "  --help, --version\n"

/* daemon_options_next is getopt_long with a sentence: '?' when a word is no option or has no value, and why names it; -1
 * at the end. Words that are no options come to the end of argv. letters: "" or "h". */
int daemon_options_next(int argc, char **argv, const char *letters, const struct option *words, char *why, size_t why_bytes);

/* daemon_options_read gives each word of the daemon's own to `read`, which refuses with a sentence, and takes the common
 * ones itself. It stops at --help and --version; then nothing else is complete. A word behind the options is refused. */
bool daemon_options_read(struct daemon_options *ret, const struct option *words,
                         bool (*read)(void *, int word, const char *text, char *why, size_t why_bytes), void *context, int argc,
                         char **argv, char *why, size_t why_bytes);

/* daemon_options_number: text is a whole number from least to most; name ("--batch") is for the sentence. */
bool daemon_options_number(const char *name, const char *text, long least, long most, int *ret, char *why, size_t why_bytes);

#endif
