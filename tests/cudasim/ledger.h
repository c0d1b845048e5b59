/* ledger.h - what happened: counters, the trace, and at the process's end the report and the leaks. */
#ifndef CUDASIM_LEDGER_H
#define CUDASIM_LEDGER_H

#include <cstddef>
#include <cstdint>
#include <string>

#include "cudasim_control.h"

namespace cudasim
{

struct Work; /* stream.h */

/* ledger_work: this operation entered a stream; graph_id 0: not from a graph. Returns the seconds it takes, as the watcher says. */
double ledger_work(const Work &work, int device, int stream_id, int graph_id);
void ledger_count_call();
void ledger_host_wait(const char *function);
void ledger_allocation(int device, size_t bytes, bool is_free);
void ledger_graph_launch(int device, int stream_id, int graph_id, size_t node_count);

/* The cost the calling thread declared for its next launch; taking it forgets it. */
struct Cost {
    double bytes = 0, flops = 0;
    bool is_tensor_core = false, is_fp8 = false;
};
Cost ledger_take_cost();

/* Things that must be given back: ledger_open counts one more, ledger_close one less. */
enum class Thing { STREAM, EVENT, GRAPH, GRAPH_EXEC, PINNED, HANDLE, COMMUNICATOR, THING_COUNT };
void ledger_open(Thing thing);
void ledger_close(Thing thing);

/* json_text: the text in quotes, escaped. */
std::string json_text(const std::string &text);

} // namespace cudasim

#endif
