/* cuda_layer.c - a second stream copies a layer's weights to the device while the first computes with the layer before.
 *
 * Two events keep them apart. A seat is arena memory: whatever was queued before a fetch may still read it, so the copy
 * waits for `computed`, recorded behind that; and what is queued behind a use waits for the layer's `arrived`. With two
 * seats in turn, used as kern.h shows, copy and computation overlap:
 *
 *   computing   | use 0 | layer 0      | use 1 | layer 1      | use 2 |
 *   copying     0 ------|-> 1 ---------|       |-> 2 (seat of 0, which is done)
 *
 * A weight of a layer has a copy in pinned memory for life (kern_weight.host) and on the device a place that fetch gives it. */
#include "cuda_layer.h"

#include <assert.h>
#include <stdlib.h>

#include "cuda_progress.h"

#define ALIGN ((size_t)256)

struct cuda_layers {
    struct kern *kern;
    cudaStream_t stream;
    cudaEvent_t computed;
    struct layer *open; /* being made, or NULL */
    int fetched;        /* and not used */
};

struct layer {
    struct kern_layer layer;
    struct kern_weight **weights; /* not owned */
    int count;
    cudaEvent_t arrived;
};

struct cuda_layers *cuda_layers_open(struct kern *k)
{
    struct cuda_layers *l = calloc(1, sizeof *l);
    if (!l) {
        kern_ops_fail(k, "no memory for the list of layers");
        return NULL;
    }
    l->kern = k;
    cuda_stream(k); /* on the backend's device */
    if (cuda_check(k, cudaStreamCreateWithFlags(&l->stream, cudaStreamNonBlocking), "a second stream") &&
        cuda_check(k, cudaEventCreateWithFlags(&l->computed, cudaEventDisableTiming), "an event"))
        return l;
    cuda_layers_close(l);
    return NULL;
}

void cuda_layers_close(struct cuda_layers *l)
{
    if (!l)
        return;
    if (l->computed)
        cudaEventDestroy(l->computed);
    if (l->stream) {
        cudaStreamSynchronize(l->stream);
        cudaStreamDestroy(l->stream);
    }
    free(l);
}

bool cuda_layers_settle(struct cuda_layers *l)
{
    if (!l || !l->fetched)
        return true;
    l->fetched = 0;
    return cuda_check(l->kern, cudaStreamSynchronize(l->stream), "a layer's copy");
}

/* --- making ------------------------------------------------------------------------------------------------ */

bool cuda_layer_is_open(const struct kern *k)
{
    const struct cuda_layers *all = cuda_layers_of(k);
    return all && all->open;
}

struct kern_layer *cuda_layer_begin(struct kern *k)
{
    struct cuda_layers *all = cuda_layers_needed(k);
    if (!all)
        return NULL;
    assert(!all->open);
    struct layer *l = calloc(1, sizeof *l);
    if (!l) {
        kern_ops_fail(k, "no memory for a layer's description");
        return NULL;
    }
    cuda_stream(k);
    if (!cuda_check(k, cudaEventCreateWithFlags(&l->arrived, cudaEventDisableTiming), "an event")) {
        free(l);
        return NULL;
    }
    all->open = l;
    return &l->layer;
}

void cuda_layer_end(struct kern *k, struct kern_layer *layer)
{
    assert(&cuda_layers_of(k)->open->layer == layer);
    (void)layer;
    cuda_layers_of(k)->open = NULL;
}

/* What a weight takes of a seat. */
static size_t seat_bytes(const struct kern_weight *w)
{
    return (w->bytes + ALIGN - 1) / ALIGN * ALIGN;
}

void *cuda_layer_add(struct kern *k, struct kern_weight *w)
{
    struct layer *l = cuda_layers_of(k)->open;
    struct kern_weight **grown = realloc(l->weights, (size_t)(l->count + 1) * sizeof *grown);
    if (!grown) {
        kern_ops_fail(k, "no memory for the list of a layer's weights");
        return NULL;
    }
    l->weights = grown;
    cuda_stream(k);
    if (!cuda_check(k, cudaMallocHost(&w->host, w->bytes), "a weight's copy in pinned memory of the host"))
        return NULL;
    l->weights[l->count++] = w;
    l->layer.bytes += seat_bytes(w);
    return w->host;
}

void cuda_layer_forget(struct kern *k, struct kern_weight *w)
{
    if (!cuda_progress_is_stuck(cuda_progress_of(k)))
        cudaFreeHost(w->host);
}

void cuda_layer_free(struct kern *k, struct kern_layer *layer)
{
    struct layer *l = (struct layer *)layer;
    cuda_stream(k);
    cudaEventDestroy(l->arrived);
    free(l->weights);
    free(l);
}

/* --- moving ------------------------------------------------------------------------------------------------- */

void cuda_layer_fetch(struct kern *k, struct kern_layer *layer, struct tensor seat)
{
    struct cuda_layers *all = cuda_layers_of(k);
    struct layer *l = (struct layer *)layer;
    char *to = seat.data;
    bool ok = cuda_check(k, cudaEventRecord(all->computed, cuda_stream(k)), "a layer's copy") &&
              cuda_check(k, cudaStreamWaitEvent(all->stream, all->computed, 0), "a layer's copy");
    all->fetched++;
    for (int i = 0; ok && i < l->count; i++) {
        struct kern_weight *w = l->weights[i];
        w->data = to;
        ok = cuda_check(k, cudaMemcpyAsync(to, w->host, w->bytes, cudaMemcpyHostToDevice, all->stream), "a layer's copy");
        to += seat_bytes(w);
    }
    if (ok)
        cuda_check(k, cudaEventRecord(l->arrived, all->stream), "a layer's copy");
}

void cuda_layer_use(struct kern *k, struct kern_layer *layer)
{
    struct layer *l = (struct layer *)layer;
    if (cuda_check(k, cudaStreamWaitEvent(cuda_stream(k), l->arrived, 0), "a layer's arrival"))
        cuda_layers_of(k)->fetched--;
}
