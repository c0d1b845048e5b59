/* schedule.cpp - runs the blocks of a kernel; see schedule.h.
 *
 * Deterministic: within a block the order of fibers follows from the order setting, the seed and the block's number
 * alone. Which OS thread takes a block is not determined, and may not matter.
 * Never instrumented by ThreadSanitizer: it tells it what orders memory instead: start and end of a kernel,
 * __syncthreads, __syncwarp. Shuffles and votes do not order memory. Blocks of one worker are told to be ordered,
 * because they reuse its shared memory; races between blocks are seen when two workers run them. */
#include "schedule.h"

#include <sys/mman.h>

#include <condition_variable>
#include <cstdarg>
#include <cstdlib>
#include <thread>

#include "settings.h"
#include "timer.h"

namespace cudasim
{

__thread Lane *current;
__thread Worker *this_worker;
bool copies_are_early;

static std::mutex &schedule_mutex = *new std::mutex; /* guards schedule and rates; never destroyed: workers outlive main */
static Schedule schedule;
static Rates rates;

/* --- the order of fibers -------------------------------------------------------------------------------------------- */

static __thread Schedule block_schedule; /* what this worker's block goes by; copied when a block starts */

Order block_order()
{
    return block_schedule.order;
}

static uint64_t next_random(Worker *w)
{
    w->random ^= w->random << 13;
    w->random ^= w->random >> 7;
    w->random ^= w->random << 17;
    return w->random;
}

static int pick_bit(Worker *w, Order order, uint32_t set)
{
    if (order == Order::FORWARD)
        return __builtin_ctz(set);
    if (order == Order::REVERSE)
        return 31 - __builtin_clz(set);
    for (unsigned skip = next_random(w) % static_cast<unsigned>(__builtin_popcount(set)); skip; skip--)
        set &= set - 1;
    return __builtin_ctz(set);
}

/* pick_warp: the same warp goes on as long as it can (random order apart), then the next one round. */
static int pick_warp(Worker *w, Order order)
{
    uint32_t ready = w->ready_warps;
    int warp = w->current_warp;
    if (order == Order::RANDOM)
        return pick_bit(w, order, ready);
    if (ready >> warp & 1)
        return warp;
    uint32_t later = warp < 31 ? ready & ~((2u << warp) - 1) : 0;
    return pick_bit(w, order, order == Order::FORWARD && later ? later : ready);
}

void make_ready(Worker *w, Thread *t)
{
    t->state = State::READY;
    w->warps[t->warp].ready |= 1u << t->lane;
    w->ready_warps |= 1u << t->warp;
}

void run_next(Context *from)
{
    Worker *w = this_worker;
    if (!w->ready_warps) {
        if (w->live_count)
            kernel_failed(w, ("deadlock in " + block_name(w) + ": " + block_states(w)).c_str());
        context_switch(from, &w->main);
        return;
    }
    Order order = block_schedule.order;
    int index = pick_warp(w, order);
    w->current_warp = index;
    Warp *warp = &w->warps[index];
    int lane = pick_bit(w, order, warp->ready);
    warp->ready &= ~(1u << lane);
    if (!warp->ready)
        w->ready_warps &= ~(1u << index);
    Thread *next = w->threads[index * WARP + lane];
    w->switch_count++;
    if (&next->context == from)
        return;
    current = next;
    context_switch(from, &next->context);
}

/* --- failures ------------------------------------------------------------------------------------------------------- */

static void record_failure(Kernel *k, cudaError_t code, const char *sentence)
{
    std::lock_guard<std::mutex> lock(k->mutex);
    if (k->has_failed.exchange(true))
        return;
    k->code = code;
    k->error = sentence;
}

void kernel_failed(Worker *w, const char *sentence)
{
    record_failure(w->kernel, cudaErrorLaunchFailure, sentence);
    w->is_aborted = true;
    w->ready_warps = 0;
}

void fail(Where where, const char *format, ...)
{
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    Worker *w = this_worker;
    Thread *t = this_thread();
    char place[512];
    snprintf(place, sizeof place, " at %s:%d in %s thread (%u,%u,%u)", where.file, where.line, block_name(w).c_str(),
             t->thread.x, t->thread.y, t->thread.z);
    kernel_failed(w, (std::string(text) + place).c_str());
    context_switch(&t->context, &w->main);
    abort(); /* a fiber of an aborted block is never resumed */
}

std::string block_name(const Worker *w)
{
    uint3 b = w->threads[0]->block;
    return std::string(w->kernel->launch->name) + " block (" + std::to_string(b.x) + "," + std::to_string(b.y) + "," +
           std::to_string(b.z) + ")";
}

static std::string state_text(const Thread *t)
{
    char text[512];
    switch (t->state) {
    case State::AT_BARRIER:
        snprintf(text, sizeof text, "at __syncthreads %s:%d", t->barrier_where.file, t->barrier_where.line);
        return text;
    case State::AT_COLLECTIVE:
        snprintf(text, sizeof text, "at warp collective %s:%d mask %08x", t->op->where.file, t->op->where.line,
                 t->op->mask);
        return text;
    case State::DONE:
        return "exited";
    case State::READY:
        break;
    }
    return "runnable";
}

std::string block_states(const Worker *w)
{
    enum { GROUPS_SHOWN = 6 };
    std::string text;
    int shown = 0;
    for (int i = 0; i < w->thread_count;) {
        std::string state = state_text(w->threads[i]);
        int end = i + 1;
        while (end < w->thread_count && state_text(w->threads[end]) == state)
            end++;
        if (shown++ == GROUPS_SHOWN)
            return text + "; ...";
        text += (text.empty() ? "threads " : "; threads ") + std::to_string(i) + "-" + std::to_string(end - 1) + " " +
                state;
        i = end;
    }
    return text;
}

/* --- __syncthreads -------------------------------------------------------------------------------------------------- */

static bool is_divergent(const Worker *w)
{
    if (w->live_count != w->thread_count)
        return true;
    Where first = w->threads[0]->barrier_where;
    for (int i = 0; i < w->thread_count; i++) {
        Where other = w->threads[i]->barrier_where;
        if (other.line != first.line || strcmp(other.file, first.file))
            return true;
    }
    return false;
}

static void release_barrier(Worker *w)
{
    if (is_divergent(w)) {
        kernel_failed(w, ("divergent __syncthreads in " + block_name(w) + ": " + block_states(w)).c_str());
        return;
    }
    for (int i = 0; i < w->warp_count; i++)
        count_warp_meeting(w, i, ~0u);
    int count = 0;
    for (int i = 0; i < w->thread_count; i++)
        count += w->threads[i]->barrier_predicate != 0;
    for (int i = 0; i < w->thread_count; i++) {
        Thread *t = w->threads[i];
        t->barrier_result = t->barrier_kind == Barrier::OR    ? count != 0
                            : t->barrier_kind == Barrier::AND ? count == w->thread_count
                                                              : count;
        make_ready(w, t);
    }
    w->arrived_count = 0;
    w->phase ^= 1;
}

int barrier(Where where, Barrier kind, int predicate)
{
    Worker *w = this_worker;
    Thread *t = this_thread();
    t->state = State::AT_BARRIER;
    t->barrier_where = where;
    t->barrier_kind = kind;
    t->barrier_predicate = predicate;
    void *order = &w->barrier_order[w->phase];
    order_before(order);
    if (++w->arrived_count == w->live_count)
        release_barrier(w);
    if (w->is_aborted)
        context_switch(&t->context, &w->main);
    run_next(&t->context);
    order_after(order);
    return t->barrier_result;
}

/* --- a CUDA thread's life ------------------------------------------------------------------------------------------- */

static void thread_exit(Worker *w, Thread *t)
{
    /* Copies it never waited for may land after everybody has read: so they do not land at all. */
    t->state = State::DONE;
    w->live_count--;
    w->warps[t->warp].live &= ~(1u << t->lane);
    order_before(&w->kernel->end_order);
    order_before(&w->done_order);
    if (w->live_count && w->arrived_count == w->live_count)
        release_barrier(w); /* which says that some have exited */
    warp_lane_left(w, t);
}

[[noreturn]] static void fiber_main()
{
    context_entered();
    for (;;) {
        Worker *w = this_worker;
        Thread *t = this_thread();
        order_after(&w->start_order);
        w->kernel->launch->run(w->kernel->launch->arguments);
        thread_exit(w, t);
        if (w->is_aborted)
            context_switch(&t->context, &w->main);
        else
            run_next(&t->context);
    }
}

/* --- blocks --------------------------------------------------------------------------------------------------------- */

/* prepare_shared: dynamic shared memory of exactly the size asked for, its end against a guard page (but for what
 * 128-byte alignment leaves), filled with a NaN pattern. */
static void prepare_shared(Worker *w, size_t bytes)
{
    constexpr size_t PAGE = 4096;
    w->shared = nullptr;
    if (!bytes)
        return;
    size_t needed = (bytes + PAGE - 1) / PAGE * PAGE;
    if (needed > w->shared_capacity) {
        if (w->shared_map) {
#ifdef __SANITIZE_ADDRESS__
            __asan_unpoison_memory_region(w->shared_map, w->shared_capacity); /* the addresses may be given to anybody */
#endif
            munmap(w->shared_map, w->shared_capacity + PAGE);
        }
        void *map = mmap(nullptr, needed + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (map == MAP_FAILED || mprotect(static_cast<char *>(map) + needed, PAGE, PROT_NONE))
            settings_die("no memory for a block's shared memory");
        w->shared_map = static_cast<unsigned char *>(map);
        w->shared_capacity = needed;
    }
    w->shared = w->shared_map + w->shared_capacity - ((bytes + 127) & ~size_t{127});
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(w->shared_map, w->shared_capacity);
    __asan_unpoison_memory_region(w->shared, bytes);
#endif
    memset(w->shared, 0xff, bytes);
}

static void prepare_threads(Worker *w, const Launch &launch, uint64_t block)
{
    dim3 size = launch.block, grid = launch.grid;
    int count = static_cast<int>(size.x * size.y * size.z);
    w->thread_count = w->live_count = count;
    w->warp_count = (count + WARP - 1) / WARP;
    while (static_cast<int>(w->threads.size()) < count) {
        Thread *t = new Thread();
        t->index = static_cast<int>(w->threads.size());
        t->warp = t->index / WARP;
        t->lane = t->index % WARP;
        t->worker = w;
        if (!context_start(&t->context, settings().stack_bytes, fiber_main))
            settings_die("no memory for the stack of a CUDA thread");
        w->threads.push_back(t);
    }
    uint3 id = make_uint3(static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
                          static_cast<unsigned>(block / grid.x / grid.y));
    for (int i = 0; i < count; i++) {
        Thread *t = w->threads[i];
        unsigned n = static_cast<unsigned>(i);
        t->thread = make_uint3(n % size.x, n / size.x % size.y, n / size.x / size.y);
        t->block = id;
        t->block_size = size;
        t->grid_size = grid;
        t->shared = w->shared;
        t->shared_bytes = static_cast<uint32_t>(launch.shared_bytes);
        t->copy_count = t->group_count = 0;
        t->op = nullptr;
        t->state = State::READY;
    }
    w->ready_warps = 0;
    for (int i = 0; i < w->warp_count; i++) {
        int lanes = count - i * WARP;
        w->warps[i].live = w->warps[i].ready = lanes >= WARP ? ~0u : (1u << lanes) - 1;
        w->warps[i].waiting = 0;
        w->ready_warps |= 1u << i;
    }
}

static void run_block(Worker *w, Kernel *k, uint64_t block)
{
    w->kernel = k;
    w->arrived_count = 0;
    w->is_aborted = false;
    w->trap_signal = 0;
    block_schedule = schedule_get();
    w->random = block_schedule.seed * 0x9E3779B97F4A7C15ull + block * 0xD1B54A32D192ED03ull + 1;
    prepare_shared(w, k->launch->shared_bytes);
    prepare_threads(w, *k->launch, block);
    w->current_warp = block_schedule.order == Order::REVERSE ? w->warp_count - 1 : 0;
    w->started_count += static_cast<uint64_t>(w->thread_count);

    w->block_start_ms = timer_ms();
    order_before(&w->start_order);
    run_next(&w->main);
    w->block_start_ms = 0;
    current = nullptr;
    count_block_end(w);

    if (w->trap_signal) {
        w->is_aborted = true;
        record_failure(k, trap_code(w), trap_sentence(w).c_str());
    }
    if (w->is_aborted) /* the fibers stand somewhere in the kernel: start them afresh next time */
        for (int i = 0; i < w->thread_count; i++) {
            context_abandon(&w->main, &w->threads[i]->context, &w->done_order, &k->end_order);
            context_start(&w->threads[i]->context, settings().stack_bytes, fiber_main);
        }
    order_after(&w->done_order);
}

/* --- workers: persistent OS threads, each with its fibers for ever -------------------------------------------------- */

struct Pool {
    std::mutex turn;  /* one kernel at a time */
    std::mutex mutex; /* guards what follows */
    std::condition_variable has_work, is_done;
    Kernel *kernel = nullptr;
    uint64_t generation = 0;
    int busy_count = 0, worker_count = 0;
};
static Pool *made_pool; /* NULL until this file's statics are made: count.cpp may be initialised before */
static Pool &pool = *(made_pool = new Pool);

static std::atomic<bool> is_one_worker{false};

void need_one_worker()
{
    is_one_worker = true;
    if (!made_pool)
        return;
    std::lock_guard<std::mutex> lock(pool.mutex);
    if (pool.worker_count > 1)
        settings_die("a module of kernels compiled for one worker was loaded after others had started");
}

static void work(Worker *w, Kernel *k)
{
    uint64_t block;
    while (!k->has_failed.load(std::memory_order_relaxed) && (block = k->next_block.fetch_add(1)) < k->block_count)
        run_block(w, k, block);
    std::lock_guard<std::mutex> lock(schedule_mutex);
    rates.threads += w->started_count;
    rates.switches += w->switch_count;
    rates.collectives += w->collective_count;
    w->started_count = w->switch_count = w->collective_count = 0;
}

static void worker_main()
{
    Worker *w = new Worker();
    this_worker = w;
    w->os_thread = pthread_self();
    context_adopt(&w->main);
    trap_install_thread(w);
    uint64_t seen = 0;
    for (;;) {
        Kernel *k;
        {
            std::unique_lock<std::mutex> lock(pool.mutex);
            pool.has_work.wait(lock, [&] { return pool.generation != seen; });
            seen = pool.generation;
            k = pool.kernel;
        }
        work(w, k);
        std::lock_guard<std::mutex> lock(pool.mutex);
        if (--pool.busy_count == 0)
            pool.is_done.notify_all();
    }
}

static void start_pool()
{
    static std::once_flag once;
    std::call_once(once, [] {
        std::lock_guard<std::mutex> lock(pool.mutex);
        pool.worker_count = is_one_worker ? 1 : settings().worker_count;
        for (int i = 0; i < pool.worker_count; i++)
            std::thread(worker_main).detach();
    });
}

cudaError_t run_kernel(const Launch &launch, std::string *error)
{
    start_pool();
    std::lock_guard<std::mutex> turn(pool.turn);
    Kernel k;
    k.launch = &launch;
    k.block_count = static_cast<uint64_t>(launch.grid.x) * launch.grid.y * launch.grid.z;
    {
        std::unique_lock<std::mutex> lock(pool.mutex);
        pool.kernel = &k;
        pool.generation++;
        pool.busy_count = pool.worker_count;
        pool.has_work.notify_all();
        pool.is_done.wait(lock, [] { return pool.busy_count == 0; });
    }
    order_after(&k.end_order);
    if (!k.has_failed)
        return cudaSuccess;
    *error = k.error;
    return k.code;
}

/* --- settings ------------------------------------------------------------------------------------------------------- */

bool schedule_parse(const char *text, Schedule *out)
{
    if (!strcmp(text, "fwd"))
        *out = {Order::FORWARD, 1};
    else if (!strcmp(text, "rev"))
        *out = {Order::REVERSE, 1};
    else if (!strncmp(text, "rand:", 5) && text[5]) {
        char *end;
        uint64_t seed = strtoull(text + 5, &end, 10);
        if (*end)
            return false;
        *out = {Order::RANDOM, seed * 2 + 1};
    } else {
        return false;
    }
    return true;
}

Schedule schedule_get()
{
    std::lock_guard<std::mutex> lock(schedule_mutex);
    return schedule;
}

void schedule_set(Schedule s)
{
    std::lock_guard<std::mutex> lock(schedule_mutex);
    schedule = s;
}

Rates schedule_rates()
{
    std::lock_guard<std::mutex> lock(schedule_mutex);
    return rates;
}

} // namespace cudasim
