/* model_check.c - runs the inspecting program and reads the one member that is asked for. */
#include "model_check.h"

#include <jansson.h>
#include <stdio.h>
#include <string.h>

#include "process.h"

#define REPORT_MAX 65536

bool model_check_read(const char *tool, const char *model_dir, const char *member, char *ret, size_t bytes, char *why, size_t why_bytes)
{
    char report[REPORT_MAX];
    char *const argv[] = {(char *)tool, "inspect", "--quick", "--json", "--model", (char *)model_dir, NULL};
    int status = process_run(argv, NULL, NULL, report, sizeof report, why, why_bytes);
    if (status == -1)
        return false;
    const char *last = process_last_line(report);
    json_t *root = status == 0 ? json_loads(last, 0, NULL) : NULL;
    const char *value = json_string_value(json_object_get(root, member));
    if (value)
        snprintf(ret, bytes, "%s", value);
    else
        snprintf(why, why_bytes, "the model's %s could not be read (%s inspect --model %s --json): %s", member, tool, model_dir,
                 status == 0 ? "it printed no JSON object that has it" : last);
    json_decref(root);
    return value != NULL;
}

bool model_check_is_commercial(const char *licence)
{
    return !strcasestr(licence, "non-commercial") && !strcasestr(licence, "noncommercial") && !strcasestr(licence, "non commercial");
}
