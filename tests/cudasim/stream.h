/* stream.h - streams, events and what is put into them.
 *
 *   submit(stream, work) ──▶ capturing?  a node of the graph being captured (graph.h)
 *                        └─▶ the stream's queue, run by the stream's own OS thread (CUDASIM_SYNC=1: at once, here)
 *
 * So the host and every stream really run at the same time, and ThreadSanitizer sees only the order that the program
 * asked for: streams order their own work, events and synchronisation order the rest.
 * A Timeline counts the finished work of one stream; an event is a point on a timeline. */
#ifndef CUDASIM_STREAM_H
#define CUDASIM_STREAM_H

#include <cuda_runtime_api.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "ledger.h"

namespace cudasim
{

struct Device;
struct Capture; /* graph.h */

/* One operation. `run` may be called many times (graphs), at any time until the Work is gone; empty: nothing to do.
 * Only HOST, RECORD and WAIT run in dry mode. */
struct Work {
    enum Kind { KERNEL, LIBRARY, COPY, MEMSET, COLLECTIVE, HOST, RECORD, WAIT } kind;
    std::string name;
    std::function<void()> run;
    Cost cost;
    dim3 grid, block;
    size_t shared_bytes = 0;
    size_t copy_bytes = 0;
    cudaMemcpyKind copy_kind = cudaMemcpyDefault;
};

struct Timeline {
    std::mutex mutex;
    std::condition_variable moved;
    uint64_t done = 0;

    void advance();
    void wait(uint64_t until);
    bool has_reached(uint64_t point);
};

/* A point on a timeline, and when it was reached. */
struct Mark {
    std::shared_ptr<Timeline> timeline;
    uint64_t point = 0;
    double reached_ms = 0;
    double clock_s = 0; /* of the stream it was recorded in (cudasim_watch) */
};

} // namespace cudasim

struct CUstream_st {
    int id, device;
    bool is_blocking; /* waits for the legacy default stream and makes it wait */
    std::shared_ptr<cudasim::Timeline> timeline;

    std::mutex mutex; /* guards what follows */
    std::condition_variable has_work;
    std::deque<std::shared_ptr<cudasim::Work>> queue;
    uint64_t issued = 0;
    bool is_stopping = false, has_ended = false;
    std::condition_variable ended;
    std::shared_ptr<cudasim::Capture> capture; /* set while this stream is being captured */
    std::vector<int> tail;                     /* then: the nodes its next work depends on */
    double clock_s = 0;                        /* what its work took (cudasim_watch) */
};

struct CUevent_st {
    std::mutex mutex;
    bool has_timing;
    std::shared_ptr<cudasim::Mark> mark;       /* NULL: never recorded */
    std::shared_ptr<cudasim::Capture> capture; /* recorded in a capture: */
    std::vector<int> tail;
};

namespace cudasim
{

using Stream = CUstream_st;

/* stream_find: the stream a handle means: 0 is the calling thread's device's default stream. */
Stream *stream_find(cudaStream_t handle);

/* submit puts the work into the stream. An error: the capture it belongs to is broken. */
cudaError_t submit(Stream *stream, std::shared_ptr<Work> work);

/* submit_uncounted: not in the ledger and never captured; returns the point at which the work is done. */
uint64_t submit_uncounted(Stream *stream, std::shared_ptr<Work> work);

/* drain waits until all work the stream has now is done. */
void drain(Stream *stream);
void drain_device(int device);

/* run_work runs it on the device unless the device has failed, the work is dry, or a fault says otherwise. */
void run_work(Device *device, const Work &work);

/* Kernels that a fault made endless go on: the program is given up, or the device restored. */
void stream_release_stuck();

} // namespace cudasim

#endif
