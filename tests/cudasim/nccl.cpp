/* nccl.cpp - the NCCL API over team.cpp. Operations go into streams; a group is collected in the calling thread.
 *
 * A communicator's handle is the program's; its team lives until its last operation has ended. ncclCommAbort ends the
 * operations of all ranks and frees the handle, as documented.
 *
 * A nonblocking one (ncclConfig_t) joins in the background, and connects there at its first operation, which only then enters its
 * stream: both calls return ncclInProgress, ncclCommGetAsyncError tells when they are done, and any other call before is refused. */
#include <nccl.h>

#include <unistd.h>

#include <functional>
#include <thread>

#include "device.h"
#include "inject.h"
#include "settings.h"
#include "stream.h"
#include "team.h"

using namespace cudasim;

struct ncclComm {
    std::shared_ptr<Team> team;
};

namespace
{

struct Operation {
    std::shared_ptr<Team> team;
    cudaStream_t stream;
    int device; /* the calling thread's: whose default stream 0 is */
    Part part;
};

thread_local int group_depth;
thread_local std::vector<Operation> group;

bool is_message(const Operation &o)
{
    return o.part.act == Act::SEND || o.part.act == Act::RECEIVE;
}

/* take_next: the first operation of the list; with a message, all of its communicator and stream, which run together. */
std::vector<Operation> take_next(std::vector<Operation> *list)
{
    std::vector<Operation> taken = {list->front()};
    list->erase(list->begin());
    if (!is_message(taken[0]))
        return taken;
    for (size_t i = 0; i < list->size();) {
        const Operation &o = (*list)[i];
        if (is_message(o) && o.team == taken[0].team && o.stream == taken[0].stream) {
            taken.push_back(o);
            list->erase(list->begin() + static_cast<long>(i));
        } else {
            i++;
        }
    }
    return taken;
}

std::shared_ptr<Work> work_of(const std::vector<Operation> &together)
{
    auto work = std::make_shared<Work>();
    work->kind = Work::COLLECTIVE;
    work->name = act_name(together[0].part.act);
    std::shared_ptr<Team> team = together[0].team;
    std::vector<Part> parts;
    for (const Operation &o : together) {
        parts.push_back(o.part);
        work->copy_bytes += team_payload(team.get(), o.part);
    }
    work->cost.bytes = static_cast<double>(work->copy_bytes);
    work->run = [team, parts] {
        team->running++;
        if (parts[0].act == Act::SEND || parts[0].act == Act::RECEIVE)
            team_exchange(team.get(), parts);
        else
            team_run(team.get(), parts[0]);
        team->running--;
    };
    return work;
}

/* With CUDASIM_SYNC a stream runs in its caller; one thread that drives several ranks in a group would wait for itself,
 * so there each rank's operations get a thread for the time of the call. */
ncclResult_t submit_all(std::vector<Operation> list)
{
    std::vector<std::thread> threads;
    cudaError_t first = cudaSuccess;
    int device = device_current_index();
    while (!list.empty()) {
        std::vector<Operation> together = take_next(&list);
        device_select(together[0].device);
        Stream *stream = stream_find(together[0].stream);
        std::shared_ptr<Work> work = work_of(together);
        if (settings().is_sync && !list.empty()) {
            int selected = together[0].device;
            threads.emplace_back([=] {
                device_select(selected);
                submit(stream, work);
            });
        } else if (cudaError_t e = submit(stream, work)) {
            first = first ? first : e;
        }
    }
    for (std::thread &t : threads)
        t.join();
    device_select(device);
    return first ? ncclUnhandledCudaError : ncclSuccess;
}

ncclResult_t refuse_nccl(ncclResult_t code, const std::string &sentence)
{
    error_note("nccl: " + sentence);
    return code;
}

ncclResult_t check_buffer(const char *name, const void *p, size_t bytes, const Team &team)
{
    if (!bytes)
        return ncclSuccess;
    Device *d = device_of(p);
    if (!d || d->index != team.device || !device_holds(d, p, bytes))
        return refuse_nccl(ncclInvalidArgument, std::string(name) + " of " + std::to_string(bytes) +
                                                    " bytes is not inside one allocation of device " +
                                                    std::to_string(team.device) + ": " + device_describe(p));
    return ncclSuccess;
}

/* in_background does it on a thread of its own; ncclCommAbort waits for that. */
ncclResult_t in_background(const std::shared_ptr<Team> &team, std::function<void()> work)
{
    team->is_in_progress = true;
    team->running++;
    std::thread([team, work] {
        device_select(team->device);
        work();
        team->is_in_progress = false;
        team->running--;
    }).detach();
    return ncclInProgress;
}

/* connect: long enough for a program that does not ask to be ahead of its operation. */
ncclResult_t connect(const Operation &operation)
{
    operation.team->is_connected = true;
    return in_background(operation.team, [operation] {
        usleep(2000);
        submit_all({operation});
    });
}

ncclResult_t add(ncclComm_t comm, cudaStream_t stream, const Part &part)
{
    if (enter(Point::NCCL, act_name(part.act)))
        return device_current() && !device_current()->failed ? ncclSystemError : ncclUnhandledCudaError;
    if (!comm || !comm->team)
        return refuse_nccl(ncclInvalidArgument, "no communicator");
    Team &team = *comm->team;
    size_t element = nccl_type_bytes(part.type);
    if (!element || part.reduce > ncclAvg || part.peer < 0 || part.peer >= team.rank_count)
        return refuse_nccl(ncclInvalidArgument, std::string(act_name(part.act)) + ": type " + std::to_string(part.type) +
                                                    ", operation " + std::to_string(part.reduce) + ", peer " +
                                                    std::to_string(part.peer));
    if (int error = team.error)
        return static_cast<ncclResult_t>(error);
    if (team.is_in_progress)
        return refuse_nccl(ncclInvalidUsage, std::string(act_name(part.act)) + " while another call is in progress");
    size_t bytes = part.count * element, all = bytes * static_cast<size_t>(team.rank_count);
    bool needs_in = part.act != Act::RECEIVE && !(part.act == Act::BROADCAST && team.rank != part.peer);
    bool needs_out = part.act != Act::SEND && !(part.act == Act::REDUCE && team.rank != part.peer);
    ncclResult_t r;
    if (needs_in && (r = check_buffer("the send buffer", part.in, part.act == Act::REDUCE_SCATTER ? all : bytes, team)))
        return r;
    if (needs_out && (r = check_buffer("the receive buffer", part.out, part.act == Act::ALL_GATHER ? all : bytes, team)))
        return r;
    Operation operation = {comm->team, stream, team.device, part};
    if (!group_depth && !team.is_connected)
        return connect(operation);
    if (!group_depth)
        return submit_all({operation});
    group.push_back(operation);
    return ncclSuccess;
}

} // namespace

extern "C" {

ncclResult_t ncclGetVersion(int *version)
{
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t result)
{
    static const char *const texts[] = {"no error",         "unhandled cuda error", "unhandled system error",
                                        "internal error",   "invalid argument",     "invalid usage",
                                        "remote process exited or there was a network error", "NCCL operation in progress"};
    return result >= 0 && result < 8 ? texts[result] : "unknown result code";
}

const char *ncclGetLastError(ncclComm_t)
{
    static thread_local std::string copy;
    copy = error_text();
    return copy.c_str();
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id)
{
    team_make_id(id);
    return ncclSuccess;
}

static ncclResult_t init_rank(ncclComm_t *comm, int rank_count, const ncclUniqueId &id, int rank, bool is_blocking)
{
    *comm = nullptr;
    if (enter(Point::NCCL, "ncclCommInitRank"))
        return ncclUnhandledCudaError;
    ncclResult_t result;
    std::shared_ptr<Team> team = team_enter(id, rank_count, rank, &result);
    if (team && is_blocking) {
        team_join(team.get(), id, group_depth == 0);
        result = static_cast<ncclResult_t>(team->error.load());
    } else if (team) {
        team->is_connected = false;
        result = in_background(team, [team, id] { team_join(team.get(), id, true); });
    }
    if (result && result != ncclInProgress)
        return refuse_nccl(result, "rank " + std::to_string(rank) + " of " + std::to_string(rank_count) + " could not join");
    *comm = new ncclComm{team};
    ledger_open(Thing::COMMUNICATOR);
    return result;
}

ncclResult_t ncclCommInitRank(ncclComm_t *comm, int rank_count, ncclUniqueId id, int rank)
{
    return init_rank(comm, rank_count, id, rank, true);
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int rank_count, ncclUniqueId id, int rank, ncclConfig_t *config)
{
    return init_rank(comm, rank_count, id, rank, !config || config->blocking != 0);
}

ncclResult_t ncclCommInitAll(ncclComm_t *comms, int count, const int *devices)
{
    ncclUniqueId id;
    team_make_id(&id);
    int device = device_current_index();
    ncclResult_t result = ncclSuccess;
    group_depth++;
    for (int i = 0; i < count && !result; i++)
        result = device_select(devices ? devices[i] : i) ? ncclInvalidArgument : ncclCommInitRank(&comms[i], count, id, i);
    group_depth--;
    device_select(device);
    return result;
}

static void release(ncclComm_t comm)
{
    delete comm;
    ledger_close(Thing::COMMUNICATOR);
}

ncclResult_t ncclCommFinalize(ncclComm_t comm)
{
    ledger_count_call();
    return comm ? ncclSuccess : ncclInvalidArgument;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm)
{
    ledger_count_call();
    if (comm)
        release(comm);
    return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm)
{
    ledger_count_call();
    if (!comm)
        return ncclInvalidArgument;
    comm->team->abort();
    while (comm->team->running)
        usleep(100);
    release(comm);
    return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error)
{
    if (!comm)
        return ncclInvalidArgument;
    bool is_in_progress = comm->team->is_in_progress; /* before its error, if it ends now */
    *error = static_cast<ncclResult_t>(comm->team->error.load());
    if (*error == ncclSuccess && is_in_progress)
        *error = ncclInProgress;
    if (*error == ncclSuccess && comm->team->is_over())
        *error = ncclRemoteError;
    return ncclSuccess;
}

ncclResult_t ncclCommCount(const ncclComm_t comm, int *count)
{
    *count = comm->team->rank_count;
    return ncclSuccess;
}

ncclResult_t ncclCommUserRank(const ncclComm_t comm, int *rank)
{
    *rank = comm->team->rank;
    return ncclSuccess;
}

ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int *device)
{
    *device = comm->team->device;
    return ncclSuccess;
}

ncclResult_t ncclGroupStart(void)
{
    group_depth++;
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd(void)
{
    if (!group_depth)
        return refuse_nccl(ncclInvalidUsage, "ncclGroupEnd without ncclGroupStart");
    if (--group_depth)
        return ncclSuccess;
    std::vector<Operation> operations;
    operations.swap(group);
    return submit_all(operations);
}

ncclResult_t ncclAllReduce(const void *in, void *out, size_t count, ncclDataType_t type, ncclRedOp_t reduce, ncclComm_t comm,
                           cudaStream_t stream)
{
    return add(comm, stream, {Act::ALL_REDUCE, in, out, count, type, reduce, 0});
}

ncclResult_t ncclReduce(const void *in, void *out, size_t count, ncclDataType_t type, ncclRedOp_t reduce, int root,
                        ncclComm_t comm, cudaStream_t stream)
{
    return add(comm, stream, {Act::REDUCE, in, out, count, type, reduce, root});
}

ncclResult_t ncclBroadcast(const void *in, void *out, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream)
{
    return add(comm, stream, {Act::BROADCAST, in, out, count, type, ncclSum, root});
}

ncclResult_t ncclBcast(void *data, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream)
{
    return ncclBroadcast(data, data, count, type, root, comm, stream);
}

ncclResult_t ncclAllGather(const void *in, void *out, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream)
{
    return add(comm, stream, {Act::ALL_GATHER, in, out, count, type, ncclSum, 0});
}

ncclResult_t ncclReduceScatter(const void *in, void *out, size_t count, ncclDataType_t type, ncclRedOp_t reduce,
                               ncclComm_t comm, cudaStream_t stream)
{
    return add(comm, stream, {Act::REDUCE_SCATTER, in, out, count, type, reduce, 0});
}

ncclResult_t ncclSend(const void *in, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream)
{
    return add(comm, stream, {Act::SEND, in, nullptr, count, type, ncclSum, peer});
}

ncclResult_t ncclRecv(void *out, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream)
{
    return add(comm, stream, {Act::RECEIVE, nullptr, out, count, type, ncclSum, peer});
}

} /* extern "C" */
