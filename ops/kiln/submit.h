/* submit.h - `kiln submit`: a file of prompts becomes a campaign, checked as a whole before anything is written.
 *
 * The file is read twice: the first pass checks every row (and asks the model's tokenizer for long ones), the second
 * streams rows to the database. Standard input goes to an unnamed temporary file first. Submitting again, after a
 * crash or an edit, adds what is missing. */
#ifndef KILN_SUBMIT_H
#define KILN_SUBMIT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "command.h"

extern const struct command submit_command;

/* The rules of words on the command line, each with a sentence. */
bool submit_campaign_ok(const char *name, char *why, size_t why_bytes);

#endif
