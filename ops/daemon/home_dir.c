/* home_dir.c - a worker started by hand keeps its spool where `kiln up` on the same machine would look for it. */
#include "home_dir.h"

#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

bool home_dir_default(char *ret, size_t bytes)
{
    const char *home = getenv("KILN_HOME"), *data = getenv("XDG_DATA_HOME"), *user = getenv("HOME");
    const struct passwd *me = NULL;
    int used = -1;
    if (home && *home)
        used = snprintf(ret, bytes, "%s", home);
    else if (geteuid() == 0)
        used = snprintf(ret, bytes, "/var/lib/kiln");
    else if (data && *data)
        used = snprintf(ret, bytes, "%s/kiln", data);
    else if ((user && *user) || ((me = getpwuid(geteuid())) != NULL && (user = me->pw_dir) != NULL))
        used = snprintf(ret, bytes, "%s/.local/share/kiln", user);
    return used > 0 && (size_t)used < bytes;
}
