/* graph.cpp - CUDA graphs; see graph.h. What a backend needs: capture, instantiate, launch, update, destroy. */
#include "graph.h"

#include <algorithm>
#include <atomic>

#include "device.h"
#include "inject.h"
#include "schedule.h"

using namespace cudasim;

struct CUgraph_st {
    std::vector<Node> nodes;
};

struct CUgraphExec_st {
    int id;
    std::mutex mutex;
    std::shared_ptr<const std::vector<Node>> nodes; /* a replay under way keeps what it was given */
};

namespace cudasim
{

static std::mutex &captures_mutex = *new std::mutex; /* guards captures */
static std::set<std::shared_ptr<Capture>> &captures = *new std::set<std::shared_ptr<Capture>>;

std::shared_ptr<Capture> capture_of(Stream *s)
{
    std::lock_guard<std::mutex> lock(s->mutex);
    return s->capture;
}

cudaError_t capture_add(const std::shared_ptr<Capture> &c, Stream *s, std::shared_ptr<Work> work)
{
    std::lock_guard<std::mutex> lock(c->mutex);
    if (c->is_broken)
        return cudaErrorStreamCaptureInvalidated;
    std::lock_guard<std::mutex> stream_lock(s->mutex);
    c->nodes.push_back(Node{std::move(work), s->tail});
    s->tail = {static_cast<int>(c->nodes.size()) - 1};
    return cudaSuccess;
}

static cudaError_t break_capture(const std::shared_ptr<Capture> &c, const char *function)
{
    std::lock_guard<std::mutex> lock(c->mutex);
    c->is_broken = true;
    error_note(std::string(function) + " during a stream capture");
    return cudaErrorStreamCaptureUnsupported;
}

cudaError_t capture_forbids(Stream *s, const char *function)
{
    if (s) {
        std::shared_ptr<Capture> c = capture_of(s);
        return c ? break_capture(c, function) : cudaSuccess;
    }
    std::lock_guard<std::mutex> lock(captures_mutex);
    for (const std::shared_ptr<Capture> &c : captures)
        if (c->mode == cudaStreamCaptureModeGlobal ||
            (c->mode == cudaStreamCaptureModeThreadLocal && c->thread == std::this_thread::get_id()))
            return break_capture(c, function);
    return cudaSuccess;
}

cudaError_t capture_forbids_event(cudaEvent_t event, const char *function)
{
    std::shared_ptr<Capture> c;
    {
        std::lock_guard<std::mutex> lock(event->mutex);
        c = event->capture;
    }
    return c ? break_capture(c, function) : cudaSuccess;
}

cudaError_t capture_wait(Stream *s, cudaEvent_t event, bool *is_captured)
{
    std::shared_ptr<Capture> of_event, of_stream = capture_of(s);
    std::vector<int> tail;
    {
        std::lock_guard<std::mutex> lock(event->mutex);
        of_event = event->capture;
        tail = event->tail;
    }
    *is_captured = of_event || of_stream;
    if (!*is_captured)
        return cudaSuccess;
    if (!of_event) {
        break_capture(of_stream, "cudaStreamWaitEvent for an event outside");
        return cudaErrorStreamCaptureIsolation;
    }
    if (of_stream && of_stream != of_event)
        return cudaErrorStreamCaptureMerge;
    std::lock_guard<std::mutex> lock(of_event->mutex);
    if (of_event->members.empty()) /* that capture has ended */
        return cudaErrorStreamCaptureIsolation;
    std::lock_guard<std::mutex> stream_lock(s->mutex);
    s->capture = of_event;
    of_event->members.insert(s);
    for (int node : tail)
        if (std::find(s->tail.begin(), s->tail.end(), node) == s->tail.end())
            s->tail.push_back(node);
    return cudaSuccess;
}

/* all_joined: has every node a way to the origin's tail? */
static bool all_joined(const Capture &c, const std::vector<int> &tail)
{
    std::vector<bool> is_reached(c.nodes.size());
    for (int node : tail)
        is_reached[node] = true;
    for (size_t i = c.nodes.size(); i-- > 0;) { /* edges point to earlier nodes only */
        if (!is_reached[i])
            return false;
        for (int before : c.nodes[i].after)
            is_reached[before] = true;
    }
    return true;
}

static cudaError_t end_capture(const std::shared_ptr<Capture> &c, Stream *origin, cudaGraph_t *graph)
{
    {
        std::lock_guard<std::mutex> lock(captures_mutex);
        captures.erase(c);
    }
    std::lock_guard<std::mutex> lock(c->mutex);
    std::vector<int> tail = origin->tail;
    for (Stream *member : c->members) {
        std::lock_guard<std::mutex> stream_lock(member->mutex);
        member->capture = nullptr;
        member->tail.clear();
    }
    c->members.clear();
    if (c->is_broken)
        return cudaErrorStreamCaptureInvalidated;
    if (!all_joined(*c, tail)) {
        error_note("cudaStreamEndCapture: work of another stream was not joined by an event");
        return cudaErrorStreamCaptureUnjoined;
    }
    *graph = new CUgraph_st();
    (*graph)->nodes = c->nodes;
    ledger_open(Thing::GRAPH);
    return cudaSuccess;
}

/* replay_order: positions of the nodes in the order they run. */
static std::vector<int> replay_order(const std::vector<Node> &nodes, Schedule schedule)
{
    std::vector<int> order, waiting_for(nodes.size()), ready;
    std::vector<std::vector<int>> next(nodes.size());
    for (size_t i = 0; i < nodes.size(); i++) {
        waiting_for[i] = static_cast<int>(nodes[i].after.size());
        for (int before : nodes[i].after)
            next[before].push_back(static_cast<int>(i));
        if (!waiting_for[i])
            ready.push_back(static_cast<int>(i));
    }
    uint64_t random = schedule.seed;
    while (!ready.empty()) {
        auto pick = schedule.order == Order::FORWARD ? std::min_element(ready.begin(), ready.end())
                                                     : std::max_element(ready.begin(), ready.end());
        if (schedule.order == Order::RANDOM) {
            random = random * 6364136223846793005ull + 1442695040888963407ull;
            pick = ready.begin() + static_cast<long>((random >> 33) % ready.size());
        }
        int node = *pick;
        ready.erase(pick);
        order.push_back(node);
        for (int later : next[node])
            if (--waiting_for[later] == 0)
                ready.push_back(later);
    }
    return order;
}

/* Nodes come after those they wait for. */
static void count_nodes(Stream *s, int id, const std::vector<Node> &nodes)
{
    std::lock_guard<std::mutex> lock(s->mutex);
    double begun_s = s->clock_s;
    std::vector<double> ended_s;
    for (const Node &node : nodes) {
        double from_s = begun_s;
        for (int before : node.after)
            from_s = std::max(from_s, ended_s[static_cast<size_t>(before)]);
        ended_s.push_back(from_s + ledger_work(*node.work, s->device, s->id, id));
        s->clock_s = std::max(s->clock_s, ended_s.back());
    }
}

static void launch_graph(Stream *s, int id, std::shared_ptr<const std::vector<Node>> nodes)
{
    ledger_graph_launch(s->device, s->id, id, nodes->size());
    count_nodes(s, id, *nodes);
    auto work = std::make_shared<Work>();
    work->kind = Work::HOST; /* the nodes decide for themselves whether they run */
    work->name = "graph";
    Device *device = device_at(s->device);
    work->run = [nodes, device] {
        for (int i : replay_order(*nodes, schedule_get()))
            run_work(device, *(*nodes)[i].work);
    };
    submit_uncounted(s, work);
}

} // namespace cudasim

extern "C" {

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode mode)
{
    if (cudaError_t e = enter(Point::GRAPH, "cudaStreamBeginCapture"))
        return refuse(e);
    if (!handle || handle == cudaStreamLegacy)
        return refuse(cudaErrorStreamCaptureUnsupported, "cudaStreamBeginCapture: the default stream cannot be captured");
    if (capture_of(handle))
        return refuse(cudaErrorIllegalState, "cudaStreamBeginCapture: a capture is under way on this stream");
    auto c = std::make_shared<Capture>();
    c->origin = handle;
    c->mode = mode;
    c->thread = std::this_thread::get_id();
    c->members.insert(handle);
    {
        std::lock_guard<std::mutex> lock(handle->mutex);
        handle->capture = c;
        handle->tail.clear();
    }
    std::lock_guard<std::mutex> lock(captures_mutex);
    captures.insert(c);
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *graph)
{
    *graph = nullptr;
    cudaError_t refused = enter(Point::GRAPH, "cudaStreamEndCapture");
    std::shared_ptr<Capture> c = handle ? capture_of(handle) : nullptr;
    if (!c)
        return refuse(refused ? refused : cudaErrorIllegalState);
    if (c->origin != handle)
        return refuse(cudaErrorStreamCaptureUnmatched, "cudaStreamEndCapture: the capture began on another stream");
    if (refused)
        break_capture(c, "an injected fault");
    cudaError_t e = end_capture(c, handle, graph);
    return refuse(refused ? refused : e);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus *status)
{
    std::shared_ptr<Capture> c = capture_of(stream_find(handle));
    *status = !c ? cudaStreamCaptureStatusNone
                 : c->is_broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode)
{
    static thread_local cudaStreamCaptureMode current_mode = cudaStreamCaptureModeGlobal;
    std::swap(*mode, current_mode);
    return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count)
{
    if (nodes)
        return refuse(cudaErrorNotSupported, "cudaGraphGetNodes: the simulator gives the number only");
    *count = graph->nodes.size();
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long)
{
    if (cudaError_t e = enter(Point::GRAPH, "cudaGraphInstantiate"))
        return refuse(e);
    static std::atomic<int> last_id;
    *exec = new CUgraphExec_st();
    (*exec)->id = ++last_id;
    (*exec)->nodes = std::make_shared<const std::vector<Node>>(graph->nodes);
    ledger_open(Thing::GRAPH_EXEC);
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags)
{
    return cudaGraphInstantiate(exec, graph, flags);
}

/* Same nodes of the same kinds with the same edges: their arguments are replaced. Else the caller instantiates anew. */
cudaError_t cudaGraphExecUpdate(cudaGraphExec_t exec, cudaGraph_t graph, cudaGraphExecUpdateResultInfo *result)
{
    if (cudaError_t e = enter(Point::GRAPH, "cudaGraphExecUpdate"))
        return refuse(e);
    std::lock_guard<std::mutex> lock(exec->mutex);
    *result = cudaGraphExecUpdateResultInfo();
    bool is_same = exec->nodes->size() == graph->nodes.size();
    for (size_t i = 0; is_same && i < graph->nodes.size(); i++) {
        const Node &a = (*exec->nodes)[i], &b = graph->nodes[i];
        is_same = a.work->kind == b.work->kind && a.after == b.after;
    }
    if (!is_same) {
        result->result = cudaGraphExecUpdateErrorTopologyChanged;
        return refuse(cudaErrorGraphExecUpdateFailure, "cudaGraphExecUpdate: the graphs differ in nodes or edges");
    }
    exec->nodes = std::make_shared<const std::vector<Node>>(graph->nodes);
    result->result = cudaGraphExecUpdateSuccess;
    return cudaSuccess;
}

cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t)
{
    return refuse(enter(Point::GRAPH, "cudaGraphUpload"));
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t handle)
{
    if (cudaError_t e = enter(Point::LAUNCH, "cudaGraphLaunch"))
        return refuse(e);
    Stream *s = stream_find(handle);
    if (std::shared_ptr<Capture> c = capture_of(s))
        return refuse(break_capture(c, "cudaGraphLaunch (child graphs are not simulated)"));
    std::shared_ptr<const std::vector<Node>> nodes;
    {
        std::lock_guard<std::mutex> lock(exec->mutex);
        nodes = exec->nodes;
    }
    launch_graph(s, exec->id, nodes);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    ledger_count_call();
    if (!graph)
        return refuse(cudaErrorInvalidValue, "cudaGraphDestroy: no graph");
    delete graph;
    ledger_close(Thing::GRAPH);
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    ledger_count_call();
    if (!exec)
        return refuse(cudaErrorInvalidValue, "cudaGraphExecDestroy: no graph");
    delete exec;
    ledger_close(Thing::GRAPH_EXEC);
    return cudaSuccess;
}

} /* extern "C" */
