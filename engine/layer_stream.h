/* layer_stream.h - the layers of a model that wait in host memory, coming to the device one after the other, once per pass.
 *
 *   layer_stream_begin(&s, k, layers, count);     -- two seats in the arena; the first layer sets out
 *   for each layer i:  layer_stream_need(&s, i);  -- what is asked now finds layer i; layer i + 1 sets out
 *
 * The seats are the caller's arena memory: it rewinds. With count 0 (all weights are on the device) nothing happens. */
#ifndef KILN_LAYER_STREAM_H
#define KILN_LAYER_STREAM_H

#include "kern.h"

struct layer_stream {
    struct kern *kern;
    struct kern_layer *const *layers;
    int count;
    struct tensor seats[2];
};

void layer_stream_begin(struct layer_stream *s, struct kern *k, struct kern_layer *const *layers, int count);
void layer_stream_need(struct layer_stream *s, int layer); /* 0, 1 .. count - 1, each once */

#endif
