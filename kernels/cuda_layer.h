/* cuda_layer.h - inside the CUDA backend: weights that wait in pinned host memory and come to the device layer by layer. */
#ifndef KILN_CUDA_LAYER_H
#define KILN_CUDA_LAYER_H

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "kern_ops.h"

struct cuda_layers; /* of a backend: the stream that copies, the layer being made */

struct cuda_layers *cuda_layers_open(struct kern *k); /* NULL after the error is kept */
void cuda_layers_close(struct cuda_layers *l);        /* accepts NULL; layers must have been freed before */

/* cuda_layers_settle waits for copies that nobody has waited for, because an error came between. */
bool cuda_layers_settle(struct cuda_layers *l);

/* cuda_layer_is_open: a weight that is made now belongs to a layer. cuda_layer_add takes it in and gives pinned memory for
 * its values, NULL after the error is kept; cuda_layer_forget gives that memory back with the weight. */
bool cuda_layer_is_open(const struct kern *k);
void *cuda_layer_add(struct kern *k, struct kern_weight *w);
void cuda_layer_forget(struct kern *k, struct kern_weight *w);

/* The ops; their contracts are those of kern.h. */
struct kern_layer *cuda_layer_begin(struct kern *k);
void cuda_layer_end(struct kern *k, struct kern_layer *l);
void cuda_layer_free(struct kern *k, struct kern_layer *l);
void cuda_layer_fetch(struct kern *k, struct kern_layer *l, struct tensor seat);
void cuda_layer_use(struct kern *k, struct kern_layer *l);

#ifdef __cplusplus
}
#endif

#endif
