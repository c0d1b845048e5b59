/* stream.cpp - streams as OS threads, events as points on timelines; see stream.h. */
#include "stream.h"

#include <unistd.h>

#include <algorithm>
#include <map>
#include <set>
#include <thread>

#include "device.h"
#include "graph.h"
#include "inject.h"
#include "settings.h"
#include "timer.h"

namespace cudasim
{

/* --- timelines -------------------------------------------------------------------------------------------------------- */

void Timeline::advance()
{
    std::lock_guard<std::mutex> lock(mutex);
    done++;
    moved.notify_all();
}

void Timeline::wait(uint64_t until)
{
    std::unique_lock<std::mutex> lock(mutex);
    moved.wait(lock, [&] { return done >= until; });
}

bool Timeline::has_reached(uint64_t point)
{
    std::lock_guard<std::mutex> lock(mutex);
    return done >= point;
}

/* --- stuck kernels ---------------------------------------------------------------------------------------------------- */

static std::mutex &stuck_mutex = *new std::mutex;
static std::condition_variable &stuck_released = *new std::condition_variable;
static uint64_t release_count;

void stream_release_stuck()
{
    std::lock_guard<std::mutex> lock(stuck_mutex);
    release_count++;
    stuck_released.notify_all();
}

/* be_stuck returns when somebody releases it or the time limit ends the device. */
static void be_stuck(Device *device, const Work &work)
{
    std::unique_lock<std::mutex> lock(stuck_mutex);
    uint64_t seen = release_count;
    int64_t limit = settings().kernel_limit_ms;
    auto is_released = [&] { return release_count != seen; };
    if (limit <= 0)
        stuck_released.wait(lock, is_released);
    else if (stuck_released.wait_for(lock, std::chrono::milliseconds(limit), is_released))
        return;
    device_fail(device, cudaErrorLaunchTimeout, work.name + " did not end (injected)");
}

/* --- running ---------------------------------------------------------------------------------------------------------- */

void run_work(Device *device, const Work &work)
{
    bool is_kernel = work.kind == Work::KERNEL || work.kind == Work::LIBRARY;
    bool is_order = work.kind == Work::RECORD || work.kind == Work::WAIT || work.kind == Work::HOST;
    if (device->failed && !is_order)
        return;
    if (is_kernel) {
        KernelFault fault = inject_kernel(device->index);
        if (fault.delay_ms)
            usleep(static_cast<useconds_t>(fault.delay_ms) * 1000);
        if (fault.kind == KernelFault::STUCK)
            be_stuck(device, work);
        if (fault.kind == KernelFault::FAILS)
            device_fail(device, fault.code, work.name + " failed on the device (injected)");
        if (fault.kind != KernelFault::NONE)
            return;
    }
    if (work.run && (is_order || !settings().is_dry))
        work.run();
}

static void stream_main(Stream *s)
{
    Device *device = device_at(s->device);
    device_select(s->device);
    for (;;) {
        std::shared_ptr<Work> work;
        {
            std::unique_lock<std::mutex> lock(s->mutex);
            s->has_work.wait(lock, [&] { return s->is_stopping || !s->queue.empty(); });
            if (s->queue.empty()) {
                s->has_ended = true;
                s->ended.notify_all();
                return;
            }
            work = std::move(s->queue.front());
            s->queue.pop_front();
        }
        run_work(device, *work);
        work.reset(); /* its arguments end before the host may see the work as done */
        s->timeline->advance();
    }
}

/* --- the set of streams ------------------------------------------------------------------------------------------------ */

static std::mutex &set_mutex = *new std::mutex; /* guards what follows */
static std::map<int, Stream *> &default_streams = *new std::map<int, Stream *>;
static std::set<Stream *> &created_streams = *new std::set<Stream *>;
static int last_id;

static Stream *make_stream(int device, bool is_blocking)
{
    Stream *s = new Stream();
    s->id = last_id++;
    s->device = device;
    s->is_blocking = is_blocking;
    s->timeline = std::make_shared<Timeline>();
    if (!settings().is_sync)
        std::thread(stream_main, s).detach();
    return s;
}

Stream *stream_find(cudaStream_t handle)
{
    if (handle && handle != cudaStreamLegacy && handle != cudaStreamPerThread)
        return handle;
    std::lock_guard<std::mutex> lock(set_mutex);
    Stream *&s = default_streams[device_current_index()];
    if (!s)
        s = make_stream(device_current_index(), true);
    return s;
}

static bool is_default(Stream *s)
{
    std::lock_guard<std::mutex> lock(set_mutex);
    auto found = default_streams.find(s->device);
    return found != default_streams.end() && found->second == s;
}

static std::vector<Stream *> streams_of(int device)
{
    std::lock_guard<std::mutex> lock(set_mutex);
    std::vector<Stream *> all;
    for (Stream *s : created_streams)
        if (s->device == device)
            all.push_back(s);
    auto found = default_streams.find(device);
    if (found != default_streams.end())
        all.push_back(found->second);
    return all;
}

/* push returns the point of the stream's timeline at which the work is done. */
static uint64_t push(Stream *s, std::shared_ptr<Work> work)
{
    std::unique_lock<std::mutex> lock(s->mutex);
    uint64_t point = ++s->issued;
    if (!settings().is_sync) {
        s->queue.push_back(std::move(work));
        s->has_work.notify_one();
        return point;
    }
    lock.unlock();
    run_work(device_at(s->device), *work);
    s->timeline->advance();
    return point;
}

static uint64_t issued_of(Stream *s)
{
    std::lock_guard<std::mutex> lock(s->mutex);
    return s->issued;
}

static void push_wait(Stream *s, Stream *other)
{
    auto wait = std::make_shared<Work>();
    std::shared_ptr<Timeline> timeline = other->timeline;
    uint64_t point = issued_of(other);
    if (timeline->has_reached(point))
        return;
    wait->kind = Work::WAIT;
    wait->run = [timeline, point] { timeline->wait(point); };
    push(s, wait);
}

/* The legacy default stream and streams without cudaStreamNonBlocking wait for each other. */
static void order_with_default(Stream *s)
{
    if (!s->is_blocking)
        return;
    bool is_legacy = is_default(s);
    for (Stream *other : streams_of(s->device))
        if (other != s && other->is_blocking && (is_legacy || is_default(other)))
            push_wait(s, other);
}

cudaError_t submit(Stream *s, std::shared_ptr<Work> work)
{
    if (std::shared_ptr<Capture> capture = capture_of(s))
        return capture_add(capture, s, std::move(work));
    double seconds = ledger_work(*work, s->device, s->id, 0);
    {
        std::lock_guard<std::mutex> lock(s->mutex);
        s->clock_s += seconds;
    }
    submit_uncounted(s, std::move(work));
    return cudaSuccess;
}

uint64_t submit_uncounted(Stream *s, std::shared_ptr<Work> work)
{
    order_with_default(s);
    return push(s, std::move(work));
}

void drain(Stream *s)
{
    s->timeline->wait(issued_of(s));
}

void drain_device(int device)
{
    for (Stream *s : streams_of(device))
        drain(s);
}

} // namespace cudasim

/* --- the API ------------------------------------------------------------------------------------------------------------ */

using namespace cudasim;

extern "C" {

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    if (cudaError_t e = enter(Point::STREAM, "cudaStreamCreateWithFlags"))
        return refuse(e);
    if (!stream || (flags & ~static_cast<unsigned>(cudaStreamNonBlocking)))
        return refuse(cudaErrorInvalidValue, "cudaStreamCreateWithFlags: bad flags");
    std::lock_guard<std::mutex> lock(set_mutex);
    last_id += last_id == 0; /* 0 is the first default stream's in traces */
    *stream = make_stream(device_current_index(), !(flags & cudaStreamNonBlocking));
    created_streams.insert(*stream);
    ledger_open(Thing::STREAM);
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream)
{
    return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int)
{
    return cudaStreamCreateWithFlags(stream, flags);
}

/* Real ones end when their work has; this one waits for it, which no program can tell. */
cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    ledger_count_call();
    {
        std::lock_guard<std::mutex> lock(set_mutex);
        if (!created_streams.erase(stream))
            return refuse(cudaErrorInvalidResourceHandle, "cudaStreamDestroy: not a stream");
    }
    drain(stream);
    if (!settings().is_sync) {
        std::unique_lock<std::mutex> lock(stream->mutex);
        stream->is_stopping = true;
        stream->has_work.notify_one();
        stream->ended.wait(lock, [&] { return stream->has_ended; });
    }
    ledger_close(Thing::STREAM);
    int device = stream->device;
    delete stream;
    return refuse(static_cast<cudaError_t>(device_at(device)->failed.load()));
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle)
{
    if (cudaError_t e = enter(Point::SYNC, "cudaStreamSynchronize"))
        return refuse(e);
    Stream *s = stream_find(handle);
    if (cudaError_t e = capture_forbids(s, "cudaStreamSynchronize"))
        return refuse(e);
    ledger_host_wait("cudaStreamSynchronize");
    drain(s);
    return refuse(static_cast<cudaError_t>(device_at(s->device)->failed.load()));
}

cudaError_t cudaStreamQuery(cudaStream_t handle)
{
    if (cudaError_t e = enter(Point::OTHER, "cudaStreamQuery"))
        return refuse(e);
    Stream *s = stream_find(handle);
    if (cudaError_t e = capture_forbids(s, "cudaStreamQuery"))
        return refuse(e);
    if (!s->timeline->has_reached(issued_of(s)))
        return refuse(cudaErrorNotReady);
    return refuse(static_cast<cudaError_t>(device_at(s->device)->failed.load()));
}

cudaError_t cudaStreamGetFlags(cudaStream_t handle, unsigned *flags)
{
    if (cudaError_t e = enter(Point::OTHER, "cudaStreamGetFlags"))
        return refuse(e);
    *flags = stream_find(handle)->is_blocking ? cudaStreamDefault : cudaStreamNonBlocking;
    return cudaSuccess;
}

cudaError_t cudaStreamGetDevice(cudaStream_t handle, int *device)
{
    if (cudaError_t e = enter(Point::OTHER, "cudaStreamGetDevice"))
        return refuse(e);
    *device = stream_find(handle)->device;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void)
{
    if (cudaError_t e = enter(Point::SYNC, "cudaDeviceSynchronize"))
        return refuse(e);
    if (cudaError_t e = capture_forbids(nullptr, "cudaDeviceSynchronize"))
        return refuse(e);
    ledger_host_wait("cudaDeviceSynchronize");
    drain_device(device_current_index());
    return refuse(static_cast<cudaError_t>(device_current()->failed.load()));
}

cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void *data)
{
    if (cudaError_t e = enter(Point::OTHER, "cudaLaunchHostFunc"))
        return refuse(e);
    auto work = std::make_shared<Work>();
    work->kind = Work::HOST;
    work->name = "host function";
    work->run = [function, data] { function(data); };
    return refuse(submit(stream_find(handle), work));
}

/* --- events ---------------------------------------------------------------------------------------------------------------- */

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags)
{
    if (cudaError_t e = enter(Point::EVENT, "cudaEventCreateWithFlags"))
        return refuse(e);
    *event = new CUevent_st();
    (*event)->has_timing = !(flags & cudaEventDisableTiming);
    ledger_open(Thing::EVENT);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event)
{
    return cudaEventCreateWithFlags(event, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    ledger_count_call();
    if (!event)
        return refuse(cudaErrorInvalidResourceHandle, "cudaEventDestroy: no event");
    delete event;
    ledger_close(Thing::EVENT);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle)
{
    if (cudaError_t e = enter(Point::EVENT, "cudaEventRecord"))
        return refuse(e);
    Stream *s = stream_find(handle);
    double clock_s;
    {
        std::lock_guard<std::mutex> lock(s->mutex);
        std::lock_guard<std::mutex> event_lock(event->mutex);
        event->capture = s->capture;
        event->tail = s->tail;
        if (s->capture)
            return cudaSuccess;
        clock_s = s->clock_s;
    }
    auto mark = std::make_shared<Mark>();
    mark->clock_s = clock_s;
    auto work = std::make_shared<Work>();
    work->kind = Work::RECORD;
    work->name = "event";
    work->run = [mark] { mark->reached_ms = timer_ms(); };
    mark->timeline = s->timeline;
    ledger_work(*work, s->device, s->id, 0);
    mark->point = submit_uncounted(s, work);
    std::lock_guard<std::mutex> lock(event->mutex);
    event->mark = mark;
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned)
{
    return cudaEventRecord(event, stream);
}

static std::shared_ptr<Mark> mark_of(cudaEvent_t event)
{
    std::lock_guard<std::mutex> lock(event->mutex);
    return event->mark;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    if (cudaError_t e = enter(Point::SYNC, "cudaEventSynchronize"))
        return refuse(e);
    if (cudaError_t e = capture_forbids_event(event, "cudaEventSynchronize"))
        return refuse(e);
    ledger_host_wait("cudaEventSynchronize");
    if (std::shared_ptr<Mark> mark = mark_of(event))
        mark->timeline->wait(mark->point);
    return refuse(static_cast<cudaError_t>(device_current()->failed.load()));
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    if (cudaError_t e = enter(Point::OTHER, "cudaEventQuery"))
        return refuse(e);
    if (cudaError_t e = capture_forbids_event(event, "cudaEventQuery"))
        return refuse(e);
    std::shared_ptr<Mark> mark = mark_of(event);
    return !mark || mark->timeline->has_reached(mark->point) ? cudaSuccess : refuse(cudaErrorNotReady); /* cudaGetLastError has it, too */
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end)
{
    if (cudaError_t e = enter(Point::OTHER, "cudaEventElapsedTime"))
        return refuse(e);
    std::shared_ptr<Mark> a = mark_of(start), b = mark_of(end);
    if (!a || !b || !start->has_timing || !end->has_timing)
        return refuse(cudaErrorInvalidResourceHandle, "cudaEventElapsedTime: an event was not recorded or has no timing");
    if (!a->timeline->has_reached(a->point) || !b->timeline->has_reached(b->point))
        return refuse(cudaErrorNotReady);
    *ms = static_cast<float>(b->reached_ms - a->reached_ms);
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned)
{
    if (cudaError_t e = enter(Point::EVENT, "cudaStreamWaitEvent"))
        return refuse(e);
    Stream *s = stream_find(handle);
    bool is_captured;
    cudaError_t captured = capture_wait(s, event, &is_captured);
    if (is_captured || captured)
        return refuse(captured);
    std::shared_ptr<Mark> mark = mark_of(event);
    if (!mark)
        return cudaSuccess;
    auto work = std::make_shared<Work>();
    work->kind = Work::WAIT;
    work->name = "event";
    work->run = [mark] { mark->timeline->wait(mark->point); };
    {
        std::lock_guard<std::mutex> lock(s->mutex);
        s->clock_s = std::max(s->clock_s, mark->clock_s);
    }
    return refuse(submit(s, work));
}

double cudasim_clock(void)
{
    std::vector<Stream *> all;
    for (int device = 0; device < settings().device_count; device++)
        for (Stream *s : streams_of(device))
            all.push_back(s);
    double latest = 0;
    for (Stream *s : all) {
        std::lock_guard<std::mutex> lock(s->mutex);
        latest = std::max(latest, s->clock_s);
    }
    for (Stream *s : all) {
        std::lock_guard<std::mutex> lock(s->mutex);
        s->clock_s = latest;
    }
    return latest;
}

} /* extern "C" */
