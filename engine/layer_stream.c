/* layer_stream.c - which layer waits, and which seat it gets: the layers that come take two seats in turn, each as large as the
 * largest of them. */
#include "layer_stream.h"

/* The bits of a number from the last to the first: 0, 1, 2, 3 .. in this order halve what is between those before. */
static unsigned turned(unsigned number)
{
    unsigned ret = 0;
    for (int bit = 0; bit < 16; bit++)
        ret |= (number >> bit & 1) << (15 - bit);
    return ret;
}

bool layer_stream_waits(int layer, int count, int waiting)
{
    int before = 0;
    for (int i = 0; i < count; i++)
        before += turned((unsigned)(count - 1 - i)) < turned((unsigned)(count - 1 - layer));
    return before < waiting;
}

/* The next layer that waits sets out, into the seat of the one before the last. */
static void fetch_next(struct layer_stream *s)
{
    while (s->next < s->count && !s->layers[s->next])
        s->next++;
    if (s->next == s->count)
        return;
    kern_layer_fetch(s->kern, s->layers[s->next++], s->seats[s->seat]);
    s->seat = !s->seat;
}

void layer_stream_begin(struct layer_stream *s, struct kern *k, struct kern_layer *const *layers, int count)
{
    size_t most = 0;
    int waiting = 0;
    *s = (struct layer_stream){.kern = k, .layers = layers, .count = count};
    for (int i = 0; i < count; i++) {
        size_t bytes = layers[i] ? kern_layer_bytes(layers[i]) : 0;
        waiting += layers[i] != NULL;
        most = bytes > most ? bytes : most;
    }
    for (int i = 0; i < 2 && i < waiting; i++)
        s->seats[i] = kern_temp(k, TENSOR_U8, 1, (int64_t[]){(int64_t)most});
    fetch_next(s);
}

void layer_stream_need(struct layer_stream *s, int layer)
{
    if (!s->count || !s->layers[layer])
        return;
    kern_layer_use(s->kern, s->layers[layer]);
    fetch_next(s);
}
