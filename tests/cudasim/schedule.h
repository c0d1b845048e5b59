/* schedule.h - blocks and warps of a running kernel; inside the scheduler (schedule.cpp, warp.cpp, trap.cpp) only,
 * except run_kernel.
 *
 *   launch ──▶ run_kernel ──▶ Kernel: blocks 0..n-1, taken by Workers, one OS thread each
 *                              Worker: one block at a time, a Thread (fiber) for each of its CUDA threads
 *
 * A Thread is READY, waits AT_BARRIER or AT_COLLECTIVE, or is DONE. It runs until it must wait; then the next ready one
 * runs, chosen by the order. When none is ready and some are not done, the block is deadlocked and the kernel fails. */
#ifndef CUDASIM_SCHEDULE_H
#define CUDASIM_SCHEDULE_H

#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#include "cudasim.h"
#include "fiber.h"

namespace cudasim
{

enum { WARP = 32, WARPS_MAX = 32, THREADS_MAX = 1024 };

enum class State : uint8_t { DONE, READY, AT_BARRIER, AT_COLLECTIVE };

struct Worker;

struct Thread : Lane { /* `current` points here: Lane must stay the first base */
    Context context;
    State state;
    Worker *worker;
    WarpOp *op; /* AT_COLLECTIVE */
    Where barrier_where;
    Barrier barrier_kind;
    int barrier_predicate, barrier_result;
};

struct Warp {
    uint32_t live, ready, waiting; /* a bit a lane; waiting: at a collective */
    char sync_order;               /* its address orders __syncwarp for ThreadSanitizer */
};

/* One launch, shared by the workers. */
struct Kernel {
    const Launch *launch;
    uint64_t block_count;
    std::atomic<uint64_t> next_block{0};
    std::atomic<bool> has_failed{false};
    std::mutex mutex; /* guards error, code */
    std::string error;
    cudaError_t code = cudaErrorLaunchFailure;
    char end_order; /* orders all threads before the end of the kernel */
};

struct Worker {
    std::vector<Thread *> threads;
    Context main; /* of the OS thread: where a block starts and ends */
    Kernel *kernel = nullptr;
    Warp warps[WARPS_MAX];
    uint32_t ready_warps;
    int thread_count, warp_count, live_count, arrived_count, current_warp;
    bool is_aborted; /* the block is given up: its fibers are never resumed */
    uint64_t random;
    int phase; /* of the barrier: two objects in turn, so that a fast thread does not meet a slow one's last barrier */
    char barrier_order[2], start_order, done_order;
    unsigned char *shared_map = nullptr;
    size_t shared_capacity = 0;
    unsigned char *shared = nullptr;
    volatile int trap_signal = 0; /* trap.cpp: the signal that ended the block, and its address */
    void *volatile trap_address = nullptr;
    std::atomic<double> block_start_ms{0}; /* 0: no block is running */
    pthread_t os_thread;
    uint64_t switch_count = 0, started_count = 0, collective_count = 0;
};

extern __thread Worker *this_worker;

/* run_kernel runs all blocks and returns when the last thread ended; launches of several streams take turns.
 * cudaSuccess, or the code and in *error the sentence. */
cudaError_t run_kernel(const Launch &launch, std::string *error);

struct Rates {
    uint64_t threads, switches, collectives;
};
Rates schedule_rates();

enum class Order : uint8_t { FORWARD, REVERSE, RANDOM };
struct Schedule {
    Order order;
    uint64_t seed;
};
Schedule schedule_get();
void schedule_set(Schedule schedule);
bool schedule_parse(const char *text, Schedule *schedule); /* "fwd", "rev", "rand:N" */

/* --- between schedule.cpp and warp.cpp ------------------------------------------------------------------------------ */

inline Thread *this_thread()
{
    return static_cast<Thread *>(current);
}
void make_ready(Worker *w, Thread *t);
void run_next(Context *from);                      /* leaves the calling fiber, which has said what it waits for */
void kernel_failed(Worker *w, const char *sentence); /* first failure of the kernel; the block is given up */
Order block_order();                               /* of the block that is running on this OS thread */
void warp_lane_left(Worker *w, Thread *t);         /* a lane exited: a collective may have waited for it only */
std::string block_states(const Worker *w);         /* "threads 0-39 at __syncthreads a.cu:7; threads 40-63 exited" */
std::string block_name(const Worker *w);           /* "rms_rows block (3,0,0)" */

/* --- count.cpp: where the requests of a warp's lanes are known to be complete ---------------------------------------- */

void count_warp_meeting(const Worker *w, int warp, uint32_t lanes);
void count_block_end(const Worker *w);

/* --- trap.cpp -------------------------------------------------------------------------------------------------------- */

void trap_install_thread(Worker *w);   /* once in each worker's OS thread */
[[noreturn]] void trap_watch(Worker *w);
std::string trap_sentence(Worker *w);  /* what the signal in w->trap_signal means */
cudaError_t trap_code(const Worker *w);

} // namespace cudasim

#endif
