/* tokenize.c - `kiln-worker tokenize`: one JSON string a line in, one JSON array of ids (or a count) a line out.
 *
 * Output is flushed whenever input pauses at a line end, so another program may talk to it line by line. */
#include "tokenize.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon_options.h"
#include "lifecycle.h"
#include "tokenizer.h"

static const char usage_text[] =
    "usage: kiln-worker tokenize --model DIR [--raw] [--count]\n"
    "\n"
    "Reads one JSON string a line from standard input, writes one JSON array of token ids a line.\n"
    "\n"
    "  --model DIR   model folder (diffusers layout)\n"
    "  --raw         the text alone, without the chat template around it\n"
    "  --count       the number of ids instead of the ids\n"
    "  --help, --version\n"
    "\n"
    "Exit: 0 done, 2 refused (the sentence names the line).\n";

struct job {
    struct tokenizer *tokenizer;
    bool is_raw, is_count;
};

static int refuse(const char *text)
{
    fprintf(stderr, "kiln-worker tokenize: %s\n", text);
    return LIFECYCLE_REFUSED;
}

static void print_ids(const int32_t *ids, size_t count)
{
    putchar('[');
    for (size_t i = 0; i < count; i++)
        printf(i ? ", %d" : "%d", ids[i]);
    puts("]");
}

static bool one_line(const struct job *j, const char *line, size_t bytes, struct engine_error *why)
{
    json_error_t at;
    json_t *value = json_loadb(line, bytes, JSON_DECODE_ANY | JSON_ALLOW_NUL, &at);
    if (!json_is_string(value)) {
        json_decref(value);
        return engine_error_set(why, ENGINE_BAD_REQUEST, "not a JSON string: %s", value ? "another value" : at.text);
    }
    int32_t *ids;
    size_t count;
    const char *text = json_string_value(value);
    size_t length = json_string_length(value);
    bool ok = j->is_raw ? tokenizer_encode(j->tokenizer, text, length, &ids, &count, why)
                        : tokenizer_encode_chat(j->tokenizer, text, length, &ids, &count, why);
    if (ok) {
        if (j->is_count)
            printf("%zu\n", count);
        else
            print_ids(ids, count);
        free(ids);
    }
    json_decref(value);
    return ok;
}

static int all_lines(const struct job *j)
{
    char *line = NULL;
    size_t room = 0;
    ssize_t bytes;
    int code = LIFECYCLE_DONE;
    for (unsigned long number = 1; code == LIFECYCLE_DONE && (bytes = getline(&line, &room, stdin)) >= 0; number++) {
        struct engine_error why;
        if (one_line(j, line, (size_t)bytes, &why)) {
            fflush(stdout);
            continue;
        }
        engine_error_at(&why, "line %lu", number);
        code = refuse(why.text);
    }
    free(line);
    return code;
}

int tokenize_main(int argc, char **argv)
{
    enum { MODEL = DAEMON_OPTIONS_OWN, RAW, COUNT };
    static const struct option options[] = {{"model", required_argument, NULL, MODEL}, {"raw", no_argument, NULL, RAW},
                                            {"count", no_argument, NULL, COUNT}, {"help", no_argument, NULL, DAEMON_OPTIONS_HELP},
                                            {"version", no_argument, NULL, DAEMON_OPTIONS_VERSION}, {0}};
    struct job j = {0};
    char reason[300];
    const char *model = NULL;
    for (int word; (word = daemon_options_next(argc, argv, "h", options, reason, sizeof reason)) != -1;) {
        switch (word) {
        case MODEL: model = optarg; break;
        case RAW: j.is_raw = true; break;
        case COUNT: j.is_count = true; break;
        case 'h':
        case DAEMON_OPTIONS_HELP:
            fputs(usage_text, stdout);
            return LIFECYCLE_DONE;
        case DAEMON_OPTIONS_VERSION:
            puts("kiln-worker " KILN_VERSION);
            return LIFECYCLE_DONE;
        default: return refuse(reason);
        }
    }
    if (!model || optind < argc)
        return refuse(model ? "takes options only; text comes from standard input" : "--model DIR is needed");
    char dir[4096];
    struct engine_error why;
    snprintf(dir, sizeof dir, "%s/tokenizer", model);
    if (!tokenizer_open(&j.tokenizer, dir, &why))
        return refuse(why.text);
    int code = all_lines(&j);
    tokenizer_close(j.tokenizer);
    return code;
}
