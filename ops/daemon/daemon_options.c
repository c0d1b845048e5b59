/* daemon_options.c - see daemon_options.h. getopt_long says what kind of mistake it met, but not in which word: of `-abc`
 * it has read a part only, and optind still stands at the word or already behind it. */
#include "daemon_options.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The word that getopt_long did not understand. Behind the last letter of a cluster it stands at the next word already. */
static const char *misread(char **argv)
{
    const char *last = argv[optind - 1];
    bool is_letter = optopt > 0 && optopt < DAEMON_OPTIONS_LOG_LEVEL;
    bool is_through = last[0] == '-' && last[1] != '-' && last[strlen(last) - 1] == (char)optopt;
    return is_letter && !is_through ? argv[optind] : last;
}

int daemon_options_next(int argc, char **argv, const char *letters, const struct option *words, char *why, size_t why_bytes)
{
    char wanted[16];
    snprintf(wanted, sizeof wanted, ":%s", letters);
    opterr = 0; /* one sentence, ours */
    int word = getopt_long(argc, argv, wanted, words, NULL);
    if (word == ':')
        snprintf(why, why_bytes, "%s needs a value", misread(argv));
    else if (word == '?')
        snprintf(why, why_bytes, "unknown option '%s'; see --help", misread(argv));
    return word == ':' ? '?' : word;
}

bool daemon_options_number(const char *name, const char *text, long least, long most, int *ret, char *why, size_t why_bytes)
{
    char *end;
    long value = strtol(text, &end, 10);
    if (!*text || *end || value < least || value > most) {
        snprintf(why, why_bytes, "%s '%s': want a number from %ld to %ld", name, text, least, most);
        return false;
    }
    *ret = (int)value;
    return true;
}

static bool read_common(struct daemon_options *o, int word, const char *text, char *why, size_t why_bytes)
{
    switch (word) {
    case DAEMON_OPTIONS_LOG_LEVEL:
        if (log_level_of(text, &o->log_level))
            return true;
        snprintf(why, why_bytes, "--log-level '%s': want debug, info, warn or error", text);
        return false;
    case DAEMON_OPTIONS_LOG: o->log_path = text; return true;
    case DAEMON_OPTIONS_METRICS_PORT: return daemon_options_number("--metrics-port", text, 0, 65535, &o->metrics_port, why, why_bytes);
    case DAEMON_OPTIONS_HELP: o->wants_help = true; return true;
    default: o->wants_version = true; return true;
    }
}

bool daemon_options_read(struct daemon_options *ret, const struct option *words,
                         bool (*read)(void *, int word, const char *text, char *why, size_t why_bytes), void *context, int argc,
                         char **argv, char *why, size_t why_bytes)
{
    *ret = (struct daemon_options){.log_level = LOG_INFO, .metrics_port = -1};
    optind = 0;
    for (int word; (word = daemon_options_next(argc, argv, "", words, why, why_bytes)) != -1;) {
        bool is_common = word < DAEMON_OPTIONS_OWN;
        if (word == '?' || !(is_common ? read_common(ret, word, optarg, why, why_bytes) : read(context, word, optarg, why, why_bytes)))
            return false;
        if (ret->wants_help || ret->wants_version)
            return true;
    }
    if (optind < argc)
        snprintf(why, why_bytes, "unknown word '%s'; see --help", argv[optind]);
    return optind == argc;
}
