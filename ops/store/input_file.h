/* input_file.h - a file that a task's inputs name (task_inputs.h): read, hashed, decoded.
 *
 * sha256 is filled where it is empty; else the file must have it: a file that is not the one that was submitted would make
 * another picture than the row's. What is hashed is what is decoded: a file is read once. */
#ifndef KILN_INPUT_FILE_H
#define KILN_INPUT_FILE_H

#include <stdint.h>

#include "task_inputs.h"

#define INPUT_FILE_IMAGE_BYTES_MAX (512 << 20)

enum input_fault {
    INPUT_AWAY, /* cannot be read: it may be back, or be on another machine */
    INPUT_BAD,  /* it is there and is not what is wanted: it stays so */
};

/* input_file_image fills width and height, and gives the pixels (RGB8, the caller frees) unless ret_rgb is NULL.
 * input_file_adapter hashes only. False: fault, and a sentence that names the file. */
bool input_file_image(struct task_inputs_file *file, uint8_t **ret_rgb, enum input_fault *fault, char *why, size_t why_bytes);
bool input_file_adapter(struct task_inputs_file *file, enum input_fault *fault, char *why, size_t why_bytes);

#endif
