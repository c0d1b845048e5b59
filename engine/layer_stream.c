/* layer_stream.c - which layer sits where: layer i in seat i % 2, each seat as large as the largest layer. */
#include "layer_stream.h"

void layer_stream_begin(struct layer_stream *s, struct kern *k, struct kern_layer *const *layers, int count)
{
    size_t most = 0;
    *s = (struct layer_stream){.kern = k, .layers = layers, .count = count};
    if (!count)
        return;
    for (int i = 0; i < count; i++)
        most = kern_layer_bytes(layers[i]) > most ? kern_layer_bytes(layers[i]) : most;
    for (int i = 0; i < 2; i++)
        s->seats[i] = kern_temp(k, TENSOR_U8, 1, (int64_t[]){(int64_t)most});
    kern_layer_fetch(k, layers[0], s->seats[0]);
}

void layer_stream_need(struct layer_stream *s, int layer)
{
    int next = layer + 1;
    if (!s->count)
        return;
    kern_layer_use(s->kern, s->layers[layer]);
    if (next < s->count)
        kern_layer_fetch(s->kern, s->layers[next], s->seats[next % 2]);
}
