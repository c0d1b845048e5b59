/* team.h - the ranks behind an NCCL communicator, as threads or processes of one machine.
 *
 * All ranks map one segment of shared memory, which loses its name as soon as the last has joined: nothing is left behind
 * whoever dies. A collective goes through it in chunks: each rank writes its part, all meet, each reduces its share of
 * the chunk, all meet, all read. Sums run in rank order in f32 for 16-bit types: the same on every rank and every time.
 * Ranks first compare what they are about to do: a mismatch, which would hang or corrupt on a GPU, is an error here. */
#ifndef CUDASIM_TEAM_H
#define CUDASIM_TEAM_H

#include <nccl.h>

#include <atomic>
#include <memory>
#include <string>
#include <vector>

namespace cudasim
{

enum class Act : uint64_t { ALL_REDUCE = 1, ALL_GATHER, REDUCE_SCATTER, BROADCAST, REDUCE, SEND, RECEIVE };

struct Segment; /* team.cpp: the shared memory */

struct Team {
    Segment *segment = nullptr;
    size_t segment_bytes = 0;
    int rank = 0, rank_count = 0, device = 0;
    std::atomic<int> error{ncclSuccess};
    std::atomic<int> running{0}; /* operations of this rank that are under way */
    bool is_connected = true;    /* a nonblocking one does so at its first operation */
    std::atomic<bool> is_in_progress{false}; /* in the background */

    ~Team();
    bool is_over() const; /* aborted by anyone, or this rank has failed */
    void abort();
};

struct Part { /* one rank's side of an operation */
    Act act;
    const void *in;
    void *out;
    size_t count;
    ncclDataType_t type;
    ncclRedOp_t reduce;
    int peer; /* root, or the other side of a send */
};

/* team_enter makes this rank's side; NULL and why. team_join comes to the others and, if it `waits`, waits until all have; else an
 * error is kept in team->error. */
std::shared_ptr<Team> team_enter(const ncclUniqueId &id, int rank_count, int rank, ncclResult_t *why);
void team_join(Team *team, const ncclUniqueId &id, bool waits);
void team_make_id(ncclUniqueId *id);

/* team_run does the operation; a failure is kept in team->error. team_exchange: sends and receives of a group, which
 * make progress together. */
void team_run(Team *team, const Part &part);
void team_exchange(Team *team, const std::vector<Part> &parts);

size_t nccl_type_bytes(ncclDataType_t type); /* 0: not simulated */
size_t team_payload(const Team *team, const Part &part); /* bytes this rank gives or takes, the larger */
const char *act_name(Act act);

} // namespace cudasim

#endif
