/* team.cpp - see team.h. */
#include "team.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>
#include <cstdio>
#include <cstring>

#include "device.h"
#include "inject.h"
#include "settings.h"
#include "timer.h"

namespace cudasim
{

enum { RANKS_MAX = 16 };
static constexpr size_t CHUNK = 1 << 20, MESSAGE = 1 << 18;

struct Signature { /* what must be the same on all ranks */
    uint64_t act, count, type, reduce, root;
};

struct Mailbox {
    std::atomic<uint32_t> is_full;
    uint32_t bytes;
};

/* Zeroed by the kernel when it is created. After it: a chunk for each rank, one for the result, a message for each pair. */
struct Segment {
    std::atomic<uint32_t> joined, aborted, arrived, generation;
    Signature signatures[RANKS_MAX];
    Mailbox boxes[RANKS_MAX][RANKS_MAX];
};

static constexpr size_t HEAD = (sizeof(Segment) + 4095) & ~size_t{4095};

static size_t bytes_of(int rank_count)
{
    size_t n = static_cast<size_t>(rank_count);
    return HEAD + (n + 1) * CHUNK + n * n * MESSAGE;
}

static char *slot(const Team *t, int rank)
{
    return reinterpret_cast<char *>(t->segment) + HEAD + static_cast<size_t>(rank) * CHUNK;
}

static char *result_of(const Team *t)
{
    return slot(t, t->rank_count);
}

static char *message(const Team *t, int from, int to)
{
    return slot(t, t->rank_count + 1) + static_cast<size_t>(from * t->rank_count + to) * MESSAGE;
}

/* --- waiting ------------------------------------------------------------------------------------------------------------ */

static void wait_while(std::atomic<uint32_t> *word, uint32_t value, int ms)
{
    timespec t = {ms / 1000, ms % 1000 * 1000000L};
    syscall(SYS_futex, word, FUTEX_WAIT, value, &t, nullptr, 0);
}

static void wake_all(std::atomic<uint32_t> *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

/* A real rank waits for ever for a dead one; CUDASIM_NCCL_TIMEOUT_MS ends it with ncclRemoteError. */
static bool is_late(double start)
{
    return timer_ms() - start > static_cast<double>(settings().nccl_timeout_ms);
}

static void set_error(Team *t, ncclResult_t error, const std::string &sentence)
{
    int none = ncclSuccess;
    if (t->error.compare_exchange_strong(none, error))
        error_note("rank " + std::to_string(t->rank) + ": " + sentence);
}

bool Team::is_over() const
{
    return segment->aborted.load() || error.load() != ncclSuccess;
}

void Team::abort()
{
    segment->aborted = 1;
    wake_all(&segment->generation);
}

Team::~Team()
{
    if (segment)
        munmap(segment, segment_bytes);
}

/* meet returns when all ranks have come; false: the team is over. */
static bool meet(Team *t)
{
    Segment *s = t->segment;
    uint32_t generation = s->generation.load();
    if (s->arrived.fetch_add(1) + 1 == static_cast<uint32_t>(t->rank_count)) {
        s->arrived = 0;
        s->generation.fetch_add(1);
        wake_all(&s->generation);
        return true;
    }
    double start = timer_ms();
    while (s->generation.load() == generation) {
        if (t->is_over())
            return false;
        if (is_late(start)) {
            set_error(t, ncclRemoteError, "another rank did not come to a collective in time");
            t->abort();
            return false;
        }
        wait_while(&s->generation, generation, 50);
    }
    return !t->is_over();
}

/* --- joining ------------------------------------------------------------------------------------------------------------ */

void team_make_id(ncclUniqueId *id)
{
    static std::atomic<int> number;
    timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "/cudasim-%d-%d-%lx", getpid(), number++, t.tv_nsec);
}

static Segment *map_segment(const char *name, size_t bytes)
{
    int fd = shm_open(name, O_RDWR | O_CREAT, 0600);
    if (fd < 0)
        return nullptr;
    void *map = MAP_FAILED;
    if (ftruncate(fd, static_cast<off_t>(bytes)) == 0)
        map = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    return map == MAP_FAILED ? nullptr : static_cast<Segment *>(map);
}

std::shared_ptr<Team> team_enter(const ncclUniqueId &id, int rank_count, int rank, ncclResult_t *why)
{
    *why = ncclInvalidArgument;
    if (rank_count < 1 || rank_count > RANKS_MAX || rank < 0 || rank >= rank_count || id.internal[0] != '/')
        return nullptr;
    auto t = std::make_shared<Team>();
    t->rank = rank;
    t->rank_count = rank_count;
    t->device = device_current_index();
    t->segment_bytes = bytes_of(rank_count);
    *why = ncclSystemError;
    t->segment = map_segment(id.internal, t->segment_bytes);
    if (!t->segment)
        return nullptr;
    *why = ncclSuccess;
    return t;
}

/* Whoever sees that not all will come takes the name away; that may be several. */
void team_join(Team *t, const ncclUniqueId &id, bool waits)
{
    uint32_t all = static_cast<uint32_t>(t->rank_count);
    if (!inject_absent(t->rank) && t->segment->joined.fetch_add(1) + 1 == all)
        shm_unlink(id.internal);
    for (double start = timer_ms(); waits && t->segment->joined.load() < all; usleep(200)) {
        if (is_late(start))
            set_error(t, ncclRemoteError, "another rank did not come to the communicator in time");
        if (t->is_over()) {
            shm_unlink(id.internal);
            return;
        }
    }
}

/* --- arithmetic --------------------------------------------------------------------------------------------------------- */

size_t nccl_type_bytes(ncclDataType_t type)
{
    switch (type) {
    case ncclInt8:
    case ncclUint8:
        return 1;
    case ncclFloat16:
    case ncclBfloat16:
        return 2;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32:
        return 4;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64:
        return 8;
    default:
        return 0;
    }
}

template <class T> static T combine(T a, T b, ncclRedOp_t op)
{
    switch (op) {
    case ncclMax:
        return a > b ? a : b;
    case ncclMin:
        return a < b ? a : b;
    case ncclProd:
        return static_cast<T>(a * b);
    default:
        return static_cast<T>(a + b);
    }
}

/* reduce elements first..end-1 of the chunk: Stored in memory, Sum while adding. */
template <class Stored, class Sum, class Load, class Store>
static void reduce_range(const Team *t, size_t first, size_t end, ncclRedOp_t op, Load load, Store store)
{
    for (size_t i = first; i < end; i++) {
        Sum sum = load(reinterpret_cast<const Stored *>(slot(t, 0))[i]);
        for (int rank = 1; rank < t->rank_count; rank++)
            sum = combine<Sum>(sum, load(reinterpret_cast<const Stored *>(slot(t, rank))[i]), op);
        if (op == ncclAvg)
            sum = static_cast<Sum>(sum / static_cast<Sum>(t->rank_count));
        reinterpret_cast<Stored *>(result_of(t))[i] = store(sum);
    }
}

template <class T> static void reduce_plain(const Team *t, size_t first, size_t end, ncclRedOp_t op)
{
    reduce_range<T, T>(t, first, end, op, [](T x) { return x; }, [](T x) { return x; });
}

static void reduce_chunk(const Team *t, size_t first, size_t end, ncclDataType_t type, ncclRedOp_t op)
{
    switch (type) {
    case ncclFloat32:
        return reduce_plain<float>(t, first, end, op);
    case ncclFloat64:
        return reduce_plain<double>(t, first, end, op);
    case ncclInt8:
        return reduce_plain<int8_t>(t, first, end, op);
    case ncclUint8:
        return reduce_plain<uint8_t>(t, first, end, op);
    case ncclInt32:
        return reduce_plain<int32_t>(t, first, end, op);
    case ncclUint32:
        return reduce_plain<uint32_t>(t, first, end, op);
    case ncclInt64:
        return reduce_plain<int64_t>(t, first, end, op);
    case ncclUint64:
        return reduce_plain<uint64_t>(t, first, end, op);
    case ncclBfloat16:
        return reduce_range<__nv_bfloat16, float>(
            t, first, end, op, [](__nv_bfloat16 x) { return __bfloat162float(x); },
            [](float x) { return __float2bfloat16(x); });
    default:
        return reduce_range<__half, float>(
            t, first, end, op, [](__half x) { return __half2float(x); }, [](float x) { return __float2half(x); });
    }
}

/* --- collectives -------------------------------------------------------------------------------------------------------- */

const char *act_name(Act act)
{
    static const char *const names[] = {"?",         "ncclAllReduce", "ncclAllGather", "ncclReduceScatter",
                                        "ncclBroadcast", "ncclReduce",    "ncclSend",      "ncclRecv"};
    return names[static_cast<int>(act)];
}

size_t team_payload(const Team *t, const Part &p)
{
    bool is_wide = p.act == Act::ALL_GATHER || p.act == Act::REDUCE_SCATTER;
    return p.count * nccl_type_bytes(p.type) * static_cast<size_t>(is_wide ? t->rank_count : 1);
}

static std::string signature_text(const Signature &s)
{
    return std::string(act_name(static_cast<Act>(s.act))) + " of " + std::to_string(s.count) + " elements of type " +
           std::to_string(s.type) + ", root " + std::to_string(s.root);
}

/* agree: do all ranks call the same? */
static bool agree(Team *t, const Part &p)
{
    Segment *s = t->segment;
    s->signatures[t->rank] = {static_cast<uint64_t>(p.act), p.count, static_cast<uint64_t>(p.type),
                              static_cast<uint64_t>(p.reduce), static_cast<uint64_t>(p.peer)};
    if (!meet(t))
        return false;
    const Signature &mine = s->signatures[t->rank];
    for (int rank = 0; rank < t->rank_count; rank++)
        if (memcmp(&s->signatures[rank], &mine, sizeof mine)) {
            set_error(t, ncclInvalidUsage, "calls " + signature_text(mine) + ", rank " + std::to_string(rank) + " " +
                                               signature_text(s->signatures[rank]));
            return false;
        }
    return true;
}

static bool gather_chunks(Team *t, const Part &p, size_t element)
{
    size_t step = CHUNK / element;
    const char *in = static_cast<const char *>(p.in);
    char *out = static_cast<char *>(p.out);
    for (size_t i = 0; i < p.count; i += step) {
        size_t n = p.count - i < step ? p.count - i : step;
        if (p.act == Act::ALL_GATHER || t->rank == p.peer)
            memcpy(slot(t, t->rank), in + i * element, n * element);
        if (!meet(t))
            return false;
        if (p.act == Act::BROADCAST)
            memcpy(out + i * element, slot(t, p.peer), n * element);
        for (int rank = 0; p.act == Act::ALL_GATHER && rank < t->rank_count; rank++)
            memcpy(out + (static_cast<size_t>(rank) * p.count + i) * element, slot(t, rank), n * element);
        if (!meet(t))
            return false;
    }
    return true;
}

/* copy_scattered: what of elements start..start+n-1 belongs to this rank. */
static void copy_scattered(const Team *t, const Part &p, size_t start, size_t n, size_t element)
{
    size_t low = p.count * static_cast<size_t>(t->rank), high = low + p.count;
    size_t first = start > low ? start : low, end = start + n < high ? start + n : high;
    if (first < end)
        memcpy(static_cast<char *>(p.out) + (first - low) * element, result_of(t) + (first - start) * element,
               (end - first) * element);
}

static bool reduce_chunks(Team *t, const Part &p, size_t element)
{
    size_t ranks = static_cast<size_t>(t->rank_count), me = static_cast<size_t>(t->rank), step = CHUNK / element;
    size_t total = p.act == Act::REDUCE_SCATTER ? p.count * ranks : p.count;
    for (size_t i = 0; i < total; i += step) {
        size_t n = total - i < step ? total - i : step, share = (n + ranks - 1) / ranks;
        size_t first = share * me < n ? share * me : n, end = first + share < n ? first + share : n;
        memcpy(slot(t, t->rank), static_cast<const char *>(p.in) + i * element, n * element);
        if (!meet(t))
            return false;
        reduce_chunk(t, first, end, p.type, p.reduce);
        if (!meet(t))
            return false;
        if (p.act == Act::ALL_REDUCE || (p.act == Act::REDUCE && t->rank == p.peer))
            memcpy(static_cast<char *>(p.out) + i * element, result_of(t), n * element);
        else if (p.act == Act::REDUCE_SCATTER)
            copy_scattered(t, p, i, n, element);
    }
    return true;
}

/* suffer: false when this rank is to stop answering. */
static bool suffer(Team *t, const RankFault &fault)
{
    if (fault.delay_ms)
        usleep(static_cast<useconds_t>(fault.delay_ms) * 1000);
    if (!fault.is_dead)
        return true;
    while (!t->segment->aborted.load())
        usleep(1000);
    return false;
}

void team_run(Team *t, const Part &p)
{
    if (t->is_over())
        return;
    RankFault fault = inject_rank(t->rank);
    if (!suffer(t, fault) || !agree(t, p))
        return;
    size_t element = nccl_type_bytes(p.type);
    bool is_gather = p.act == Act::ALL_GATHER || p.act == Act::BROADCAST;
    bool is_done = is_gather ? gather_chunks(t, p, element) : reduce_chunks(t, p, element);
    is_done = is_done && meet(t); /* nobody writes for the next operation before all have read this one's */
    if (is_done && fault.is_wrong && p.count && p.out)
        static_cast<unsigned char *>(p.out)[element - 1] ^= 0x40; /* an exponent bit of the first element */
}

/* --- messages ----------------------------------------------------------------------------------------------------------- */

/* One step of a send or receive; false: it has to wait for the other side. */
static bool move(Team *t, const Part &p, size_t *done)
{
    bool is_send = p.act == Act::SEND;
    int from = is_send ? t->rank : p.peer, to = is_send ? p.peer : t->rank;
    size_t total = p.count * nccl_type_bytes(p.type);
    Mailbox *box = &t->segment->boxes[from][to];
    if (is_send == (box->is_full.load() != 0))
        return false;
    if (is_send) {
        size_t n = total - *done < MESSAGE ? total - *done : MESSAGE;
        memcpy(message(t, from, to), static_cast<const char *>(p.in) + *done, n);
        box->bytes = static_cast<uint32_t>(n);
        *done += n;
    } else if (box->bytes > total - *done) {
        set_error(t, ncclInvalidUsage, "receives fewer bytes than rank " + std::to_string(from) + " sends");
    } else {
        memcpy(static_cast<char *>(p.out) + *done, message(t, from, to), box->bytes);
        *done += box->bytes;
    }
    box->is_full = is_send;
    return true;
}

void team_exchange(Team *t, const std::vector<Part> &parts)
{
    if (t->is_over() || !suffer(t, inject_rank(t->rank)))
        return;
    std::vector<size_t> done(parts.size(), 0);
    double last_move = timer_ms();
    for (;;) {
        bool has_moved = false, has_ended = true;
        for (size_t i = 0; i < parts.size(); i++) {
            size_t total = parts[i].count * nccl_type_bytes(parts[i].type);
            if (done[i] >= total)
                continue;
            has_ended = false;
            bool is_first = true; /* messages between two ranks keep their order */
            for (size_t j = 0; j < i; j++)
                if (parts[j].act == parts[i].act && parts[j].peer == parts[i].peer &&
                    done[j] < parts[j].count * nccl_type_bytes(parts[j].type))
                    is_first = false;
            has_moved |= is_first && move(t, parts[i], &done[i]);
        }
        if (has_ended || t->is_over())
            return;
        if (has_moved) {
            last_move = timer_ms();
        } else if (is_late(last_move)) {
            set_error(t, ncclRemoteError, "another rank did not send or receive in time");
            t->abort();
        } else {
            usleep(20);
        }
    }
}

} // namespace cudasim
