/* command.c - the command line of every sub-command, read by one function: what a person typed is either
 * understood whole or refused with a sentence before anything is done. */
#include "command.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lifecycle.h"
#include "task_store.h"

#define OPTIONS_MAX 64 /* of one command, the three shared ones included */
#define WORD_MAX 64    /* longer words are like no other word */

/* --- sentences ------------------------------------------------------------------------------------------- */

/* A sentence is one line, and names of files that it quotes may hold anything: no control character goes to the terminal. */
static int say(const struct command_call *call, int code, const char *format, va_list args)
{
    char text[8192];
    vsnprintf(text, sizeof text, format, args);
    for (unsigned char *c = (unsigned char *)text; *c; c++)
        if (*c < 0x20 || *c == 0x7f)
            *c = '?';
    fprintf(stderr, "kiln %s: %s\n", call->command->name, text);
    return code;
}

int command_refuse(const struct command_call *call, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    say(call, COMMAND_REFUSED, format, args);
    va_end(args);
    return COMMAND_REFUSED;
}

int command_say(const struct command_call *call, int code, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    say(call, code, format, args);
    va_end(args);
    return code;
}

int command_fault(const struct command_call *call, const struct pg_error *why)
{
    /* A conflict that the store could not resolve by repeating passes by itself as well. */
    int code = why->fault == PG_REFUSED ? COMMAND_REFUSED : COMMAND_AWAY;
    size_t length = strcspn(why->text, "\n");
    return command_say(call, code, "%.*s", (int)length, why->text);
}

int command_code(const struct command_call *call)
{
    return call->is_help ? COMMAND_DONE : COMMAND_REFUSED;
}

/* --- the nearest word ------------------------------------------------------------------------------------ */

static int least(int a, int b)
{
    return a < b ? a : b;
}

/* How many letters must be added, taken away, changed, or swapped with their neighbour. */
static int distance(const char *a, const char *b)
{
    int rows[3][WORD_MAX + 1]; /* of the letter before the last, the last, this one */
    int length = (int)strlen(b);
    for (int k = 0; k <= length; k++)
        rows[0][k] = rows[1][k] = k;
    int *before = rows[0], *last = rows[1], *now = rows[2];
    for (int i = 1; a[i - 1]; i++) {
        now[0] = i;
        for (int k = 1; k <= length; k++) {
            now[k] = least(least(last[k] + 1, now[k - 1] + 1), last[k - 1] + (a[i - 1] != b[k - 1]));
            if (i > 1 && k > 1 && a[i - 1] == b[k - 2] && a[i - 2] == b[k - 1])
                now[k] = least(now[k], before[k - 2] + 1);
        }
        int *oldest = before;
        before = last;
        last = now;
        now = oldest;
    }
    return last[length];
}

/* A beginning counts as near ("fail" for "failures"), else about every third letter may be wrong. */
const char *command_nearest(const char *word, const char *const *candidates, int count)
{
    const char *best = NULL;
    int best_distance = 0;
    size_t length = strlen(word);
    if (length == 0 || length > WORD_MAX)
        return NULL;
    for (int i = 0; i < count; i++) {
        if (strlen(candidates[i]) > WORD_MAX)
            continue;
        bool begins = length >= 3 && strncmp(word, candidates[i], length) == 0;
        int d = begins ? 1 : distance(word, candidates[i]);
        if (d > 1 + (int)length / 4 || d >= (int)length || (best && d >= best_distance))
            continue;
        best = candidates[i];
        best_distance = d;
    }
    return best;
}

/* --- options --------------------------------------------------------------------------------------------- */

struct parse {
    struct command_call *call;
    struct command_option options[OPTIONS_MAX];
    bool is_given[OPTIONS_MAX];
    int option_count;
    int at; /* index into argv of the next word */
    bool wants_help;
};

static bool refuse_unknown(struct parse *p, const char *name, int length)
{
    const char *names[OPTIONS_MAX];
    char word[WORD_MAX + 1] = "";
    if (length <= WORD_MAX)
        snprintf(word, sizeof word, "%.*s", length, name);
    for (int i = 0; i < p->option_count; i++)
        names[i] = p->options[i].name;
    const char *near = command_nearest(word, names, p->option_count);
    if (near)
        command_refuse(p->call, "unknown option '--%.*s'; did you mean --%s?", length, name, near);
    else
        command_refuse(p->call, "unknown option '--%.*s'; see kiln %s --help", length, name, p->call->command->name);
    return false;
}

static bool read_number(struct parse *p, const struct command_option *o, const char *text)
{
    char *end = NULL;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    bool is_plain = *text == '-' || (*text >= '0' && *text <= '9'); /* no blanks, no '+' */
    if (!is_plain || end == text || *end || errno == ERANGE || value < o->min || value > o->max) {
        command_refuse(p->call, "--%s '%s': accepted is a whole number from %" PRId64 " to %" PRId64, o->name, text, o->min, o->max);
        return false;
    }
    *(int64_t *)o->value = value;
    return true;
}

static bool read_list(struct parse *p, const struct command_option *o, const char *text)
{
    struct command_list *list = o->value;
    if (list->count == COMMAND_LIST_MAX) {
        command_refuse(p->call, "--%s '%s': it may be given at most %d times", o->name, text, COMMAND_LIST_MAX);
        return false;
    }
    list->items[list->count++] = text;
    return true;
}

static bool read_value(struct parse *p, const struct command_option *o, const char *text)
{
    switch (o->kind) {
    case COMMAND_NUMBER: return read_number(p, o, text);
    case COMMAND_LIST: return read_list(p, o, text);
    case COMMAND_TEXT: *(const char **)o->value = text; return true;
    case COMMAND_FLAG: *(bool *)o->value = true; return true;
    }
    return false;
}

/* The value of an option: behind '=', or the next word. */
static const char *find_value(struct parse *p, const struct command_option *o, const char *equals)
{
    if (equals)
        return equals + 1;
    if (p->at == p->call->argc) {
        command_refuse(p->call, "--%s needs a value", o->name);
        return NULL;
    }
    const char *next = p->call->argv[p->at++];
    if (strncmp(next, "--", 2) == 0) { /* most often a value that was forgotten */
        command_refuse(p->call, "--%s needs a value, found '%s'; if that is the value, write --%s=%s", o->name, next, o->name, next);
        return NULL;
    }
    return next;
}

static bool read_option(struct parse *p, const char *word)
{
    const char *name = word + 2, *equals = strchr(name, '=');
    int length = equals ? (int)(equals - name) : (int)strlen(name), i = 0;
    while (i < p->option_count && (strncmp(p->options[i].name, name, (size_t)length) != 0 || p->options[i].name[length]))
        i++;
    if (i == p->option_count)
        return refuse_unknown(p, name, length);
    const struct command_option *o = &p->options[i];
    if (p->is_given[i] && o->kind != COMMAND_LIST && o->kind != COMMAND_FLAG) {
        command_refuse(p->call, "--%s was given twice", o->name);
        return false;
    }
    p->is_given[i] = true;
    if (o->kind == COMMAND_FLAG && equals) {
        command_refuse(p->call, "--%s takes no value, found '%s'", o->name, equals + 1);
        return false;
    }
    const char *value = o->kind == COMMAND_FLAG ? "" : find_value(p, o, equals);
    return value && read_value(p, o, value);
}

/* --- the command line as a whole ------------------------------------------------------------------------- */

static void print_help(const struct command_call *call)
{
    const struct command *c = call->command;
    printf("usage: kiln %s %s\n\n%c%s.\n", c->name, c->words, c->line[0] >= 'a' && c->line[0] <= 'z' ? c->line[0] - 32 : c->line[0],
           c->line + 1);
    if (*c->usage)
        printf("\n%s", c->usage);
    printf("\n  --home DIR       where kiln lives ($KILN_HOME, else $XDG_DATA_HOME/kiln; /var/lib/kiln for root)\n"
           "  --database URI   the database (libpq's environment, else what `kiln up` uses)\n"
           "\n"
           "Exit codes: 0 done, 1 some tasks failed, 2 refused, 75 the database or coordinator is away, 128+n by signal.\n");
}

static void begin(struct parse *p, struct command_call *call, const struct command_option *options, int option_count)
{
    *p = (struct parse){.call = call, .option_count = option_count};
    for (int i = 0; i < option_count; i++)
        p->options[i] = options[i];
    p->options[p->option_count++] = (struct command_option){"home", COMMAND_TEXT, &call->home_option, 0, 0};
    p->options[p->option_count++] = (struct command_option){"database", COMMAND_TEXT, &call->database, 0, 0};
    p->options[p->option_count++] = (struct command_option){"help", COMMAND_FLAG, &p->wants_help, 0, 0};
}

static bool refuse_words(struct parse *p, const char *word)
{
    if (word)
        command_refuse(p->call, "'%s' is one word too many; usage: kiln %s %s", word, p->call->command->name, p->call->command->words);
    else
        command_refuse(p->call, "a word is missing; usage: kiln %s %s", p->call->command->name, p->call->command->words);
    return false;
}

bool command_parse(struct command_call *call, const struct command_option *options, int option_count,
                   const char **words, int words_min, int words_max, int *ret_word_count)
{
    struct parse p;
    char why[HOME_PATH_MAX + 256];
    int word_count = 0;
    bool is_ended = false; /* "--" was seen */
    if (option_count > OPTIONS_MAX - 3) {
        command_refuse(call, "%d options are more than the %d a command may have", option_count, OPTIONS_MAX - 3);
        return false;
    }
    begin(&p, call, options, option_count);
    while (p.at < call->argc && !p.wants_help) {
        const char *word = call->argv[p.at++];
        if (!is_ended && strcmp(word, "--") == 0) {
            is_ended = true;
        } else if (!is_ended && strcmp(word, "-h") == 0) {
            p.wants_help = true;
        } else if (!is_ended && strncmp(word, "--", 2) == 0) {
            if (!read_option(&p, word))
                return false;
        } else if (!is_ended && word[0] == '-' && word[1]) {
            command_refuse(call, "unknown option '%s'; options are long ones, as --home; see kiln %s --help", word, call->command->name);
            return false;
        } else if (word_count == words_max) {
            return refuse_words(&p, word);
        } else {
            words[word_count++] = word;
        }
    }
    if (p.wants_help) {
        print_help(call);
        call->is_help = true;
        return false;
    }
    if (word_count < words_min)
        return refuse_words(&p, NULL);
    if (!home_open(&call->home, call->home_option, why, sizeof why)) {
        command_refuse(call, "%s", why);
        return false;
    }
    *ret_word_count = word_count;
    return true;
}

/* --- the database ---------------------------------------------------------------------------------------- */

/* Of the private database one can say more than that nobody answers. */
static bool is_down(const struct command_call *call, const char *uri)
{
    char private_uri[HOME_PATH_MAX], pid_file[HOME_PATH_MAX];
    home_private_uri(&call->home, private_uri, sizeof private_uri);
    home_path(&call->home, pid_file, sizeof pid_file, "run/kiln.pid");
    return strcmp(uri, private_uri) == 0 && lifecycle_pid_alive(pid_file) == 0;
}

int command_store(struct command_call *call, struct task_store **ret)
{
    char uri[HOME_PATH_MAX], why[HOME_PATH_MAX + 256];
    struct pg_error fault;
    if (!home_database(&call->home, call->database, uri, sizeof uri, why, sizeof why))
        return command_refuse(call, "%s", why);
    if (task_store_open(ret, *uri ? uri : NULL, &fault))
        return COMMAND_DONE;
    if (fault.fault == PG_AWAY && is_down(call, uri))
        return command_say(call, COMMAND_AWAY, "kiln is not running on %s: start it with `kiln up`", call->home.dir);
    return command_fault(call, &fault);
}
