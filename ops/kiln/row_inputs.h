/* row_inputs.h - from the files a row names to a task's inputs: where they are, what they hold.
 *
 *   row, else the option of that name          image, mask, strength, lora: each by itself
 *   relative names of a row                    beside the prompt file; of an option, of standard input: here
 *   each different file                        is read once, hashed and (an image) decoded, however many rows name it
 *
 * 56 bytes for each different file; no pixels are kept. */
#ifndef KILN_ROW_INPUTS_H
#define KILN_ROW_INPUTS_H

#include "prompt_file.h"
#include "tally.h"
#include "task_inputs.h"

struct row_inputs { /* start from {0}; insides are the module's, but for options */
    struct prompt_inputs options;
    char *folder;              /* of the prompt file; NULL: here */
    struct tally known;
    struct row_inputs_file { uint8_t sha256[32]; int width, height; } *files;
    size_t count, room;
};

/* row_inputs_begin: title is the prompt file's path, NULL when it has none. Options are borrowed. */
bool row_inputs_begin(struct row_inputs *r, const char *title, const struct prompt_inputs *options);
void row_inputs_done(struct row_inputs *r);

/* row_inputs_of: ret is the caller's to end with task_inputs_done. False: a sentence without a place. */
bool row_inputs_of(struct row_inputs *r, const struct prompt_row *row, struct task_inputs *ret, char *why, size_t why_bytes);

#endif
