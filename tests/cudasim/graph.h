/* graph.h - capture of streams into graphs, and their replay.
 *
 * A node is a Work and the nodes it depends on. A replay is one piece of work of its stream, which runs the nodes one
 * after the other in an order the edges allow: the order of capture (fwd), its contrary (rev), or a random one, as
 * CUDASIM_ORDER says. So a missing edge shows as a wrong result in some order; ThreadSanitizer does not see it, because
 * nodes do not run at the same time. */
#ifndef CUDASIM_GRAPH_H
#define CUDASIM_GRAPH_H

#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "stream.h"

namespace cudasim
{

struct Node {
    std::shared_ptr<Work> work;
    std::vector<int> after;
};

struct Capture {
    std::mutex mutex; /* guards what follows */
    std::vector<Node> nodes;
    std::set<Stream *> members;
    Stream *origin;
    cudaStreamCaptureMode mode;
    std::thread::id thread;
    bool is_broken = false; /* something that cannot be captured happened; found again at the end */
};

/* capture_of: the capture the stream is part of, or NULL. */
std::shared_ptr<Capture> capture_of(Stream *stream);

/* capture_add adds the work after the stream's tail. */
cudaError_t capture_add(const std::shared_ptr<Capture> &capture, Stream *stream, std::shared_ptr<Work> work);

/* capture_forbids: may this call be made while captures are under way? It waits for the stream (NULL: for more than a
 * stream, or changes memory). If not, the capture is broken. */
cudaError_t capture_forbids(Stream *stream, const char *function);
cudaError_t capture_forbids_event(cudaEvent_t event, const char *function);

/* capture_wait: the stream's part of cudaStreamWaitEvent, when a capture is involved. */
cudaError_t capture_wait(Stream *stream, cudaEvent_t event, bool *is_captured);

} // namespace cudasim

#endif
