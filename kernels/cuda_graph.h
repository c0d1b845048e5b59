/* cuda_graph.h - inside the CUDA backend: work that was asked before, with the same addresses, is one launch. */
#ifndef KILN_CUDA_GRAPH_H
#define KILN_CUDA_GRAPH_H

#include "kern_ops.h"

struct cuda_graphs; /* of a backend */

/* cuda_graph_open: `table` is the backend's and outlives the graphs. NULL: it goes without (KILN_CUDA_GRAPHS=off), or the
 * error is kept. cuda_graph_close accepts NULL; nothing may be queued any more. */
struct cuda_graphs *cuda_graph_open(struct kern *k, const struct kern_ops *table);
void cuda_graph_close(struct cuda_graphs *g);

/* cuda_graph_forget: memory of the arena or a weight goes away, and with it what graphs work on. Accepts NULL. */
void cuda_graph_forget(struct cuda_graphs *g);

/* cuda_graph_is_capturing: what is queued now is not done now, and the arena may not grow. Accepts NULL. */
bool cuda_graph_is_capturing(const struct cuda_graphs *g);

/* cuda_graph_run is kern_graph, by graphs. */
void cuda_graph_run(struct cuda_graphs *g, void (*work)(void *context), void *context);

#endif
