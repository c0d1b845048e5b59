/* licence_check.h - what the model's licence says about its use; asked of `kiln-worker inspect --model DIR --json`. */
#ifndef KILN_LICENCE_CHECK_H
#define KILN_LICENCE_CHECK_H

#include <stdbool.h>
#include <stddef.h>

/* licence_check_read: the licence as the engine names it ("Apache-2.0", "FLUX Non-Commercial", "unknown"). */
bool licence_check_read(const char *tool, const char *model_dir, char *ret, size_t bytes, char *why, size_t why_bytes);
bool licence_check_is_commercial(const char *licence); /* false only for those that say non-commercial */

#endif
