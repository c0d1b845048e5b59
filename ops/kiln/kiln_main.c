/* kiln_main.c - `kiln COMMAND`: the table of commands, and what stands before a command. */
#include <stdio.h>
#include <string.h>

#include "audit.h"
#include "command.h"
#include "down.h"
#include "list.h"
#include "submit.h"
#include "up.h"
#include "watch.h"

static const struct command *const commands[] = {
    &up_command,           &down_command,         &submit_command,      &list_status_command, &watch_command,
    &list_images_command,  &list_failures_command, &list_pause_command, &list_resume_command, &list_cancel_command,
    &list_retry_command,   &list_workers_command, &audit_command,
};
#define COMMAND_COUNT ((int)(sizeof commands / sizeof *commands))

static int print_help(FILE *out, int code)
{
    fprintf(out, "usage: kiln COMMAND ...      renders image campaigns\n\n");
    for (int i = 0; i < COMMAND_COUNT; i++)
        fprintf(out, "  %-9s %s\n", commands[i]->name, commands[i]->line);
    fprintf(out, "\n"
                 "  kiln COMMAND --help says more; kiln --version.\n"
                 "  KILN_HOME is where everything lives; --home DIR and --database URI are understood by every command.\n"
                 "\n"
                 "Exit codes: 0 done, 1 some tasks failed, 2 refused, 75 the database or coordinator is away, 128+n by signal.\n");
    return code;
}

static int refuse(const char *word)
{
    const char *names[COMMAND_COUNT];
    for (int i = 0; i < COMMAND_COUNT; i++)
        names[i] = commands[i]->name;
    const char *near = command_nearest(word, names, COMMAND_COUNT);
    if (near)
        fprintf(stderr, "kiln: unknown command '%s'; did you mean '%s'?\n", word, near);
    else
        fprintf(stderr, "kiln: unknown command '%s'; `kiln --help` lists them\n", word);
    return COMMAND_REFUSED;
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return print_help(stderr, COMMAND_REFUSED);
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "help") == 0)
        return print_help(stdout, COMMAND_DONE);
    if (strcmp(argv[1], "--version") == 0) {
        printf("kiln %s\n", KILN_VERSION);
        return COMMAND_DONE;
    }
    for (int i = 0; i < COMMAND_COUNT; i++)
        if (strcmp(argv[1], commands[i]->name) == 0) {
            struct command_call call = {.command = commands[i], .argc = argc - 2, .argv = argv + 2};
            return commands[i]->run(&call);
        }
    return refuse(argv[1]);
}
