/* layer_stream.h - the layers of a model that wait in host memory, coming to the device one after the other, once per pass.
 *
 *   layer_stream_begin(&s, k, layers, count);     -- seats in the arena; the first layer that waits sets out
 *   for each layer i:  layer_stream_need(&s, i);  -- what is asked now finds layer i; if it came, the next that waits sets out
 *
 * A layer that is on the device all the time is NULL in the list. So a copy has the time of all layers up to the next that waits.
 * The seats are the caller's arena memory: it rewinds. */
#ifndef KILN_LAYER_STREAM_H
#define KILN_LAYER_STREAM_H

#include "kern.h"

struct layer_stream {
    struct kern *kern;
    struct kern_layer *const *layers;
    int count, next; /* next: of the list, to set out */
    int seat;        /* for it */
    struct tensor seats[2];
};

void layer_stream_begin(struct layer_stream *s, struct kern *k, struct kern_layer *const *layers, int count);
void layer_stream_need(struct layer_stream *s, int layer); /* 0, 1 .. count - 1, each once */

/* layer_stream_waits: does a layer wait in host memory, if so many of `count` do? They are spread evenly, the last layer being the
 * first to wait; if more do, these still do. */
bool layer_stream_waits(int layer, int count, int waiting);

#endif
