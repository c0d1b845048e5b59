/* painter.h - the thread that owns the engine: batches in, pixels to the writer, failures to the I/O thread.
 *
 * It opens the models first. Then it takes one batch after the other; the next is already in its mailbox when one
 * ends, because the coordinator was told a credit of two batches. One bad request never fails its neighbours:
 * each is checked alone before, and a batch that fails in a way one of them may have caused is rendered singly. */
#ifndef KILN_PAINTER_H
#define KILN_PAINTER_H

#include "batch.h"
#include "model_set.h"
#include "writer.h"

enum painter_state { PAINTER_LOADING, PAINTER_READY, PAINTER_FAILED };

struct painter_options {
    const struct model_source *sources; /* borrowed */
    int source_count;
    struct engine_options engine; /* what all of them are opened with */
    int batch_max;
    struct mailbox *outcomes; /* woken when the state changes */
    struct writer *writer;
};

struct painter;

bool painter_open(struct painter **ret, const struct painter_options *options, char *why, size_t why_bytes);
void painter_close(struct painter *p); /* waits for what is rendered; batches not begun must have been taken back */

enum painter_state painter_state(const struct painter *p);
const struct engine_error *painter_why(const struct painter *p); /* after PAINTER_FAILED */
const struct model_set *painter_models(const struct painter *p); /* after PAINTER_READY */

void painter_give(struct painter *p, struct batch *b);
struct batch *painter_take_back(struct painter *p);            /* one not begun, newest last; NULL: none */

/* What it is doing, for heartbeats: each is one atomic, read from the I/O thread. */
struct painter_view { uint64_t step_counter, batch; uint32_t step, steps; bool is_rendering; };
struct painter_view painter_look(const struct painter *p);

#endif
