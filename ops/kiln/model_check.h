/* model_check.h - what a model here is, as far as its rows must fit it; asked of `kiln-worker inspect --model DIR --json`. */
#ifndef KILN_MODEL_CHECK_H
#define KILN_MODEL_CHECK_H

#include <stdbool.h>
#include <stddef.h>

/* model_check_read: a member of the report, as the engine names it: "licence" ("Apache-2.0", "FLUX Non-Commercial", "unknown"),
 * "variant" ("distilled", "base"). */
bool model_check_read(const char *tool, const char *model_dir, const char *member, char *ret, size_t bytes, char *why, size_t why_bytes);
bool model_check_is_commercial(const char *licence); /* false only for those that say non-commercial */

#endif
