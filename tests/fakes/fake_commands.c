/* fake_commands.c - the sub-commands of kiln-worker for a program with the fake engine: they need the real one. */
#include <stdio.h>

#include "devices.h"
#include "inspect.h"
#include "render.h"
#include "tokenize.h"

static int refuse(const char *name)
{
    fprintf(stderr, "%s: this program has a fake engine\n", name);
    return 2;
}

int render_main(int argc, char **argv)
{
    (void)argc;
    return refuse(argv[0]);
}

int tokenize_main(int argc, char **argv)
{
    (void)argc;
    return refuse(argv[0]);
}

int inspect_main(int argc, char **argv)
{
    (void)argc;
    return refuse(argv[0]);
}

int devices_main(int argc, char **argv)
{
    (void)argc;
    return refuse(argv[0]);
}
