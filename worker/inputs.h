/* inputs.h - the files behind a task's inputs (task_inputs.h): read, checked against their SHA-256, decoded.
 *
 * A file that is not the one that was submitted is refused, never rendered: the picture would not be the row's. */
#ifndef KILN_INPUTS_H
#define KILN_INPUTS_H

#include "engine.h"
#include "failure.h"
#include "task_inputs.h"

struct inputs { /* start from {0} */
    struct task_inputs told;
    struct engine_reference images[TASK_INPUTS_IMAGES_MAX], mask; /* pixels, owned, as large as they are seen; told.image_count of them */
};

/* inputs_load reads what a task's text names; "" is nothing. False: f says what that means for the task. */
bool inputs_load(struct inputs *ret, const char *text, struct failure *f);
void inputs_done(struct inputs *in);

/* One file each (input_file.h), of those that in->told names. A mask comes after the images. */
bool inputs_image(struct inputs *in, int index, struct failure *f);
bool inputs_mask(struct inputs *in, struct failure *f);
bool inputs_adapter(struct task_inputs_file *file, struct failure *f);

/* inputs_into points a request at what was loaded; the request borrows it. */
void inputs_into(const struct inputs *in, struct engine_request *request);

#endif
