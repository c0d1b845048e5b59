/* warp.cpp - warp collectives: each lane of the mask parks its WarpOp; the last to come does the work for all.
 *
 * Checked: all lanes of the mask bring the same operation and mask; a shuffle reads a lane that takes part; mma and
 * ldmatrix are executed by whole warps. A mask that names a lane which never comes is a deadlock, found by run_next.
 * Never instrumented by ThreadSanitizer. */
#include <cuda_fp8.h>

#include "schedule.h"

namespace cudasim
{

/* --- mma -------------------------------------------------------------------------------------------------------------
 * Fragments as in gpu.h (and the PTX ISA, mma.m16n8k16, mma.m16n8k32): a register holds `per` neighbours along k.
 * The sum over k runs in ascending order in f32; hardware sums in an order and width of its own, which is why results
 * of tensor cores are compared with a tolerance everywhere. */

static float from_bf16(uint32_t bits)
{
    bits <<= 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static float from_f16(uint32_t bits)
{
    __half_raw raw;
    raw.x = static_cast<unsigned short>(bits);
    return __half2float(__half(raw));
}

static float from_e4m3(uint32_t bits)
{
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(bits), __NV_E4M3)));
}

template <int bits, class Convert> static void multiply_warp(WarpOp *const *ops, Convert convert)
{
    constexpr int per = 32 / bits, depth = 8 * per;
    constexpr uint32_t low = bits == 8 ? 0xffu : 0xffffu;
    float a[depth][16], b[depth][8], d[16][8];
    for (int lane = 0; lane < WARP; lane++) {
        int group = lane / 4, column = lane % 4 * 2, k0 = lane % 4 * per;
        const uint32_t *ra = static_cast<const uint32_t *>(ops[lane]->in);
        const uint32_t *rb = static_cast<const uint32_t *>(ops[lane]->in2);
        const float *rd = static_cast<const float *>(ops[lane]->out);
        for (int e = 0; e < per; e++) {
            for (int r = 0; r < 4; r++)
                a[k0 + r / 2 * 4 * per + e][group + r % 2 * 8] = convert(ra[r] >> bits * e & low);
            for (int r = 0; r < 2; r++)
                b[k0 + r * 4 * per + e][group] = convert(rb[r] >> bits * e & low);
        }
        for (int r = 0; r < 4; r++)
            d[group + r / 2 * 8][column + r % 2] = rd[r];
    }
    for (int k = 0; k < depth; k++)
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 8; j++)
                d[i][j] += a[k][i] * b[k][j];
    for (int lane = 0; lane < WARP; lane++) {
        int group = lane / 4, column = lane % 4 * 2;
        float *rd = static_cast<float *>(ops[lane]->out);
        for (int r = 0; r < 4; r++)
            rd[r] = d[group + r / 2 * 8][column + r % 2];
    }
}

/* --- ldmatrix, shuffles, votes ------------------------------------------------------------------------------------------ */

static void load_tiles_warp(WarpOp *const *ops)
{
    bool trans = ops[0]->kind == Op::LDMATRIX_TRANS;
    for (int lane = 0; lane < WARP; lane++) {
        uint32_t *out = static_cast<uint32_t *>(ops[lane]->out);
        for (int tile = 0; tile < ops[0]->count; tile++) {
            int row = lane / 4, column = lane % 4 * 2;
            if (!trans) {
                out[tile] = static_cast<const uint32_t *>(ops[8 * tile + row]->in)[column / 2];
                continue;
            }
            uint32_t low = static_cast<const uint16_t *>(ops[8 * tile + column]->in)[row];
            uint32_t high = static_cast<const uint16_t *>(ops[8 * tile + column + 1]->in)[row];
            out[tile] = low | high << 16;
        }
    }
}

static int shuffle_source(const WarpOp *op, int lane)
{
    int base = lane & ~(op->width - 1), source = lane;
    switch (op->kind) {
    case Op::SHFL_INDEX:
        return base + (op->argument & (op->width - 1));
    case Op::SHFL_UP:
        source = lane - op->argument;
        return source < base ? lane : source;
    case Op::SHFL_DOWN:
        source = lane + op->argument;
        return source >= base + op->width ? lane : source;
    default:
        source = lane ^ op->argument;
        return source >= base + op->width ? lane : source;
    }
}

static void shuffle_warp(WarpOp *const *ops)
{
    for (int lane = 0; lane < WARP; lane++) {
        WarpOp *op = ops[lane];
        if (!op)
            continue;
        if (op->width < 1 || op->width > WARP || (op->width & (op->width - 1)))
            fail(op->where, "shuffle width %d is not a power of two up to 32", op->width);
        int source = shuffle_source(op, lane);
        if (source < 0 || source >= WARP || !ops[source])
            fail(op->where, "shuffle: lane %d reads lane %d, which is not in the mask %08x or has exited", lane, source,
                 op->mask);
        memcpy(op->out, ops[source]->in, op->bytes);
    }
}

static void vote_warp(WarpOp *const *ops, uint32_t present)
{
    uint32_t yes = 0;
    for (int lane = 0; lane < WARP; lane++)
        if (ops[lane] && ops[lane]->argument)
            yes |= 1u << lane;
    for (int lane = 0; lane < WARP; lane++)
        if (ops[lane])
            *static_cast<Vote *>(ops[lane]->out) = Vote{yes, present};
}

/* --- meeting ------------------------------------------------------------------------------------------------------------ */

static const char *op_name(Op kind)
{
    static const char *const names[] = {"__syncwarp",     "vote",       "__shfl_sync", "__shfl_up_sync",
                                        "__shfl_down_sync", "__shfl_xor_sync", "ldmatrix",    "ldmatrix.trans",
                                        "mma bf16",       "mma f16",    "mma e4m3"};
    return names[static_cast<int>(kind)];
}

/* gather_ops: the ops of the lanes that take part; fails when they do not fit together. */
static WarpOp *gather_ops(Worker *w, int warp, uint32_t present, WarpOp **ops)
{
    WarpOp *first = nullptr;
    for (int lane = 0; lane < WARP; lane++) {
        ops[lane] = present >> lane & 1 ? w->threads[warp * WARP + lane]->op : nullptr;
        WarpOp *op = ops[lane];
        if (!op)
            continue;
        if (!first)
            first = op;
        if (op->kind != first->kind || op->mask != first->mask)
            fail(op->where, "warp collectives do not match: lane %d calls %s with mask %08x, an earlier lane %s with mask "
                            "%08x at %s:%d",
                 lane, op_name(op->kind), op->mask, op_name(first->kind), first->mask, first->where.file,
                 first->where.line);
    }
    return first;
}

/* check_others: does a lane wait for one of these with another mask? Lanes 0-15 naming all 32 while 16-31 name themselves
 * only is a bug that one order of lanes would hide. (A lane may legally wait for one that first meets others; kernels
 * that need that are refused.) */
static void check_others(Worker *w, int warp, uint32_t present, const WarpOp *first)
{
    for (uint32_t lanes = w->warps[warp].waiting & ~present; lanes; lanes &= lanes - 1) {
        int lane = __builtin_ctz(lanes);
        const WarpOp *op = w->threads[warp * WARP + lane]->op;
        if (op->mask & present)
            fail(op->where, "warp collectives do not match: lane %d waits with mask %08x, lanes %08x meet with mask %08x at "
                            "%s:%d",
                 lane, op->mask, present, first->mask, first->where.file, first->where.line);
    }
}

static void execute(Worker *w, int warp, uint32_t present)
{
    WarpOp *ops[WARP];
    WarpOp *first = gather_ops(w, warp, present, ops);
    check_others(w, warp, present, first);
    w->collective_count++;
    switch (first->kind) {
    case Op::SYNC:
        return;
    case Op::BALLOT:
        vote_warp(ops, present);
        return;
    case Op::SHFL_INDEX:
    case Op::SHFL_UP:
    case Op::SHFL_DOWN:
    case Op::SHFL_XOR:
        shuffle_warp(ops);
        return;
    default:
        break;
    }
    if (present != 0xffffffffu)
        fail(first->where, "%s by a part of a warp: lanes %08x", op_name(first->kind), present);
    switch (first->kind) {
    case Op::MMA_BF16:
        multiply_warp<16>(ops, from_bf16);
        return;
    case Op::MMA_F16:
        multiply_warp<16>(ops, from_f16);
        return;
    case Op::MMA_E4M3:
        multiply_warp<8>(ops, from_e4m3);
        return;
    default:
        load_tiles_warp(ops);
    }
}

/* try_execute: true when all living lanes of the mask have come; then they are ready again (`self` just goes on). */
static bool try_execute(Worker *w, int index, uint32_t mask, Thread *self)
{
    Warp *warp = &w->warps[index];
    uint32_t present = mask & warp->live;
    if (!present || (warp->waiting & present) != present)
        return false;
    count_warp_meeting(w, index, present);
    execute(w, index, present);
    warp->waiting &= ~present;
    for (uint32_t lanes = present; lanes; lanes &= lanes - 1) {
        Thread *t = w->threads[index * WARP + __builtin_ctz(lanes)];
        if (t == self)
            t->state = State::READY;
        else
            make_ready(w, t);
    }
    return true;
}

void warp_collective(WarpOp *op)
{
    Worker *w = this_worker;
    Thread *t = this_thread();
    Warp *warp = &w->warps[t->warp];
    if (!(op->mask >> t->lane & 1))
        fail(op->where, "%s: lane %d is not in its own mask %08x", op_name(op->kind), t->lane, op->mask);
    t->op = op;
    t->state = State::AT_COLLECTIVE;
    warp->waiting |= 1u << t->lane;
    if (op->kind == Op::SYNC)
        order_before(&warp->sync_order);
    if (!try_execute(w, t->warp, op->mask, t)) {
        run_next(&t->context);
    } else if (block_order() == Order::RANDOM) { /* else the last lane would always go on first */
        make_ready(w, t);
        run_next(&t->context);
    }
    if (op->kind == Op::SYNC)
        order_after(&warp->sync_order);
}

void warp_lane_left(Worker *w, Thread *t)
{
    Warp *warp = &w->warps[t->warp];
    for (uint32_t lanes = warp->waiting; lanes; lanes &= lanes - 1) {
        Thread *other = w->threads[t->warp * WARP + __builtin_ctz(lanes)];
        if (try_execute(w, t->warp, other->op->mask, nullptr))
            return;
    }
}

} // namespace cudasim
