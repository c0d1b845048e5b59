/* kern_cuda.c - the CUDA backend's host side: the device, the stream, the arena, values in and out, the first error.
 *
 * Everything is queued on one stream and nothing waits but sync, read and has_nan. So memory may be used again as soon as
 * the host says so: whoever writes it next is behind its last reader in the stream.
 *
 * Arena: a chain of blocks with one bump pointer over all; one block where what is needed was reserved. Where it was not, a
 * pass over a new shape adds blocks; when the pointer is back at 0 (between batches), several blocks become one of the size
 * that was needed, and from then on that shape allocates nothing. A block that cannot be had is "no memory"; what is there stays there.
 *
 *   block 0   |#########....|   block 1   |##########......|      # given out, in order; the tail of block 0 was too
 *   base 0                       base 9                             short for the next piece and is left out
 *
 * Staging: two pinned buffers, filled by the host (which converts) and copied by the stream in turn; the host waits for
 * a buffer only if the copy two turns ago is not done.
 *
 * Errors: a failed allocation is forgotten by CUDA and the backend goes on after kern_recover; every other failure stays,
 * for CUDA's own are sticky: the process opens the device again. A device that is stuck (cuda_progress.h) is left as it is, with all it
 * holds: whatever gives something back waits for it. */
#include "kern_cuda.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_graph.h"
#include "cuda_layer.h"
#include "cuda_progress.h"
#include "cuda_weight.h"
#include "linear_blas.h"
#include "team_nccl.h"

#define BLOCKS_MAX 64
#define BLOCK_BYTES_MIN ((size_t)32 << 20)
#define ALIGN 256

struct block {
    char *data;
    size_t bytes, base; /* base: the pointer's value where this block begins, if it is in use */
};

struct stage {
    char *host;
    cudaEvent_t sent;
};

struct cuda {
    struct kern kern;
    struct kern_ops ops;
    int device;
    cudaStream_t stream;
    char device_name[64];

    struct block blocks[BLOCKS_MAX];
    int block_count, block; /* block: the one in use */
    size_t used, peak;      /* without tails */

    struct stage stages[2];
    int stage;
    struct linear_blas *blas;
    struct cuda_layers *layers; /* NULL: none was made */
    struct cuda_graphs *graphs; /* NULL: none are made */
    struct team_nccl *team;     /* NULL: works alone */
    struct cuda_progress *progress;
    int32_t *flag; /* device memory of has_nan */
    size_t weight_bytes;
};

static struct cuda *cuda_of(const struct kern *k)
{
    return (struct cuda *)k;
}

/* --- errors -------------------------------------------------------------------------------------------- */

static bool is_lost(cudaError_t status)
{
    switch (status) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorECCUncorrectable:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorAssert:
    case cudaErrorDevicesUnavailable:
    case cudaErrorContained:
        return true;
    default:
        return false;
    }
}

void cuda_sentence(const struct kern *k, cudaError_t status, const char *what, char *ret, size_t ret_bytes)
{
    const char *name = cuda_of(k)->device_name;
    if (status == cudaErrorMemoryAllocation)
        snprintf(ret, ret_bytes, "no memory on %s for %s", name, what);
    else
        snprintf(ret, ret_bytes, "device %s: %s: %s: %s", is_lost(status) ? "lost" : "failed", name, what, cudaGetErrorString(status));
}

bool cuda_check(struct kern *k, cudaError_t status, const char *what)
{
    char why[sizeof k->error];
    if (status == cudaSuccess)
        return true;
    if (k->failed)
        return false;
    cudaGetLastError(); /* an error that does not stick is kept here, not there */
    cuda_sentence(k, status, what, why, sizeof why);
    kern_ops_fail(k, "%s", why);
    return false;
}

bool cuda_launched(struct kern *k, const char *kernel)
{
    if (!cuda_check(k, cudaGetLastError(), kernel))
        return false;
    cuda_progress_launched(cuda_of(k)->progress);
    return !k->failed;
}

cudaStream_t cuda_stream(const struct kern *k)
{
    struct cuda *c = cuda_of(k);
    cudaSetDevice(c->device); /* it is a property of the calling thread */
    return c->stream;
}

bool cuda_wait(struct kern *k, const char *what)
{
    return cuda_progress_wait(cuda_of(k)->progress, NULL) && cuda_check(k, cudaStreamSynchronize(cuda_stream(k)), what);
}

static bool cuda_sync(struct kern *k)
{
    team_nccl_settle(cuda_of(k)->team);
    return cuda_wait(k, "the work queued before") && cuda_layers_settle(cuda_of(k)->layers);
}

struct cuda_progress *cuda_progress_of(const struct kern *k)
{
    return cuda_of(k)->progress;
}

static bool is_stuck(const struct cuda *c)
{
    return cuda_progress_is_stuck(c->progress);
}

struct linear_blas *cuda_blas(const struct kern *k)
{
    return cuda_of(k)->blas;
}

struct team_nccl *cuda_team(const struct kern *k)
{
    return cuda_of(k)->team;
}

struct cuda_layers *cuda_layers_of(const struct kern *k)
{
    return cuda_of(k)->layers;
}

struct cuda_layers *cuda_layers_needed(struct kern *k)
{
    struct cuda *c = cuda_of(k);
    if (!c->layers)
        c->layers = cuda_layers_open(k);
    return c->layers;
}

struct cuda_graphs *cuda_graphs_of(const struct kern *k)
{
    return cuda_of(k)->graphs;
}

static void cuda_graph(struct kern *k, void (*work)(void *context), void *context)
{
    struct cuda *c = cuda_of(k);
    if (c->graphs)
        cuda_graph_run(c->graphs, work, context);
    else
        work(context);
}

/* --- memory --------------------------------------------------------------------------------------------- */

/* Device memory; NULL after the error is kept, with the figures that help. */
static void *take(struct cuda *c, size_t bytes, const char *what)
{
    void *data = NULL;
    cudaSetDevice(c->device);
    cudaError_t status = cudaMalloc(&data, bytes);
    if (status == cudaSuccess)
        return data;
    if (status == cudaErrorMemoryAllocation) {
        size_t available = 0, all = 0;
        cudaGetLastError();
        cudaMemGetInfo(&available, &all);
        kern_ops_fail(&c->kern, "no memory: %s of %.1f MB; %s has %.1f MB left of %.1f", what, (double)bytes / 1e6,
                      c->device_name, (double)available / 1e6, (double)all / 1e6);
    } else {
        cuda_check(&c->kern, status, what);
    }
    return NULL;
}

void *cuda_alloc(struct kern *k, size_t bytes)
{
    struct cuda *c = cuda_of(k);
    void *data = take(c, bytes ? bytes : 1, "a weight");
    return data;
}

void cuda_free(struct kern *k, void *data)
{
    cudaSetDevice(cuda_of(k)->device);
    if (!is_stuck(cuda_of(k)))
        cudaFree(data);
}

void cuda_count_weights(struct kern *k, int64_t bytes)
{
    cuda_of(k)->weight_bytes += (size_t)bytes;
}

/* False: they may be in use for ever. */
static bool drop_blocks(struct cuda *c, int first)
{
    cuda_wait(&c->kern, "the work queued before");
    if (is_stuck(c))
        return false;
    if (first < c->block_count)
        cuda_graph_forget(c->graphs);
    for (int i = first; i < c->block_count; i++)
        cudaFree(c->blocks[i].data);
    c->block_count = first;
    return true;
}

/* Adds a block of at least `bytes` behind the one in use. Blocks behind it are too small and go; it is as large as they were
 * together, so that what they held fits into it the next time and no pass takes turns with another in dropping blocks. */
static bool add_block(struct cuda *c, size_t bytes)
{
    if (cuda_graph_is_capturing(c->graphs)) { /* what goes away may still be in use, and the capture forbids to wait */
        kern_ops_fail(&c->kern, "no memory: the arena cannot grow while a graph is made");
        return false;
    }
    int at = c->block_count ? c->block + 1 : 0;
    size_t want = bytes, dropped = 0;
    for (int i = at; i < c->block_count; i++)
        dropped += c->blocks[i].bytes;
    if (dropped > want)
        want = dropped;
    if (at < c->block_count && !drop_blocks(c, at))
        return false;
    if (at == BLOCKS_MAX) {
        kern_ops_fail(&c->kern, "no memory: the arena has %d blocks", BLOCKS_MAX);
        return false;
    }
    char *data = take(c, want, "temporary memory");
    if (!data)
        return false;
    c->blocks[at] = (struct block){data, want, c->used};
    c->block_count = at + 1;
    return true;
}

/* Several blocks become one, as large as was needed at most. */
static bool join_blocks(struct cuda *c)
{
    if (!drop_blocks(c, 0))
        return false;
    c->block = 0;
    return add_block(c, c->peak);
}

/* A block for what was not reserved: more is likely to follow. */
static bool grow(struct cuda *c, size_t bytes)
{
    return add_block(c, bytes > BLOCK_BYTES_MIN ? bytes : BLOCK_BYTES_MIN);
}

/* Makes a block with room for `bytes` the one in use. */
static bool make_room(struct cuda *c, size_t bytes)
{
    bool is_capturing = cuda_graph_is_capturing(c->graphs);
    if (c->used == 0 && c->block_count > 1 && !is_capturing && !join_blocks(c))
        return false;
    if (c->block_count == 0 && !grow(c, bytes))
        return false;
    struct block *b = &c->blocks[c->block];
    if (c->used - b->base + bytes <= b->bytes)
        return true;
    if (c->block + 1 == c->block_count || c->blocks[c->block + 1].bytes < bytes) {
        if (!grow(c, bytes))
            return false;
    }
    c->block++;
    c->blocks[c->block].base = c->used;
    return true;
}

static struct tensor cuda_temp(struct kern *k, enum tensor_dtype dtype, int rank, const int64_t *shape)
{
    struct cuda *c = cuda_of(k);
    struct tensor t = tensor_of(NULL, dtype, rank, shape);
    size_t bytes = (tensor_bytes(t) + ALIGN - 1) & ~(size_t)(ALIGN - 1);
    if (bytes == 0)
        bytes = ALIGN;
    if (!make_room(c, bytes))
        return t;
    struct block *b = &c->blocks[c->block];
    t.data = b->data + (c->used - b->base);
    c->used += bytes;
    if (c->used > c->peak)
        c->peak = c->used;
    return t;
}

static size_t cuda_mark(struct kern *k)
{
    return cuda_of(k)->used;
}

static void cuda_rewind(struct kern *k, size_t mark)
{
    struct cuda *c = cuda_of(k);
    assert(mark <= c->used);
    c->used = mark;
    while (c->block > 0 && c->blocks[c->block].base >= mark)
        c->block--;
}

static bool cuda_memory(struct kern *k, struct kern_space *ret)
{
    struct cuda *c = cuda_of(k);
    size_t available, all, arena = 0;
    cudaSetDevice(c->device);
    if (!cuda_check(k, cudaMemGetInfo(&available, &all), "asking for the memory"))
        return false;
    for (int i = 0; i < c->block_count; i++)
        arena += c->blocks[i].bytes;
    *ret = (struct kern_space){.all = all, .available = available, .arena = arena};
    return true;
}

static void cuda_reserve(struct kern *k, size_t bytes)
{
    struct cuda *c = cuda_of(k);
    assert(c->used == 0);
    if (c->block_count == 1 && c->blocks[0].bytes >= bytes)
        return;
    size_t before = c->peak;
    c->peak = bytes > before ? bytes : before;
    if (!join_blocks(c))
        c->peak = before; /* less may be asked for next */
}

static size_t cuda_peak_bytes(const struct kern *k)
{
    return cuda_of(k)->peak + cuda_of(k)->weight_bytes;
}

/* --- values in and out ------------------------------------------------------------------------------------ */

void *cuda_stage(struct kern *k, size_t bytes)
{
    struct cuda *c = cuda_of(k);
    assert(bytes <= CUDA_STAGE_BYTES);
    if (k->failed)
        return NULL;
    kern_ops_beat(k);
    cudaSetDevice(c->device);
    struct stage *s = &c->stages[c->stage];
    bool is_sent = cuda_progress_wait(c->progress, s->sent) && cuda_check(k, cudaEventSynchronize(s->sent), "the copy before");
    return is_sent ? s->host : NULL;
}

void cuda_send(struct kern *k, void *to, size_t bytes)
{
    struct cuda *c = cuda_of(k);
    struct stage *s = &c->stages[c->stage];
    cudaStream_t stream = cuda_stream(k);
    if (cuda_check(k, cudaMemcpyAsync(to, s->host, bytes, cudaMemcpyHostToDevice, stream), "a copy to the device") &&
        cuda_check(k, cudaEventRecord(s->sent, stream), "a copy to the device"))
        c->stage = !c->stage;
}

static void *row_at(struct tensor t, int64_t r)
{
    int64_t offset = 0;
    for (int a = t.rank - 2; a >= 0; a--) {
        offset += r % t.shape[a] * t.stride[a];
        r /= t.shape[a];
    }
    return (char *)t.data + (size_t)offset * tensor_dtype_bytes(t.dtype);
}

/* The elements [first, first + count) of a host tensor of any strides, to or from contiguous memory in `dtype`. */
static void move_host(struct tensor host, int64_t first, int64_t count, char *memory, enum tensor_dtype dtype, bool is_read)
{
    int64_t width = host.shape[host.rank - 1];
    while (count > 0) {
        int64_t column = first % width, n = width - column < count ? width - column : count;
        char *at = (char *)row_at(host, first / width) + (size_t)column * tensor_dtype_bytes(host.dtype);
        struct tensor here = tensor_1d(at, host.dtype, n), there = tensor_1d(memory, dtype, n);
        tensor_convert(is_read ? here : there, is_read ? there : here);
        memory += (size_t)n * tensor_dtype_bytes(dtype);
        first += n, count -= n;
    }
}

/* Host values into contiguous device memory, a stage at a time. */
static void send_host(struct kern *k, void *to, enum tensor_dtype dtype, struct tensor host)
{
    size_t size = tensor_dtype_bytes(dtype);
    int64_t all = tensor_count(host), step = (int64_t)(CUDA_STAGE_BYTES / size);
    for (int64_t first = 0; first < all; first += step) {
        int64_t count = all - first < step ? all - first : step;
        char *stage = cuda_stage(k, (size_t)count * size);
        if (!stage)
            return;
        if (!k->is_dry)
            move_host(host, first, count, stage, dtype, false);
        cuda_send(k, (char *)to + (size_t)first * size, (size_t)count * size);
    }
}

static void cuda_write(struct kern *k, struct tensor out, struct tensor host)
{
    size_t mark = kern_mark(k);
    struct tensor dense = tensor_is_contiguous(out) ? out : kern_temp(k, out.dtype, out.rank, out.shape);
    if (!k->failed)
        send_host(k, dense.data, out.dtype, host);
    if (!k->failed && dense.data != out.data)
        elementwise_copy_cuda(k, out, dense);
    kern_rewind(k, mark);
}

/* Through the stage in use, which is then not in flight: each piece is waited for. */
static void cuda_read(struct kern *k, struct tensor host, struct tensor x)
{
    size_t mark = kern_mark(k), size = tensor_dtype_bytes(x.dtype);
    struct tensor dense = tensor_is_contiguous(x) ? x : kern_temp(k, x.dtype, x.rank, x.shape);
    if (!k->failed && dense.data != x.data)
        elementwise_copy_cuda(k, dense, x);
    int64_t all = tensor_count(x), step = (int64_t)(CUDA_STAGE_BYTES / size);
    for (int64_t first = 0; first < all && !k->failed; first += step) {
        int64_t count = all - first < step ? all - first : step;
        char *stage = cuda_stage(k, (size_t)count * size);
        if (stage && cuda_check(k, cudaMemcpyAsync(stage, (char *)dense.data + (size_t)first * size, (size_t)count * size,
                                                   cudaMemcpyDeviceToHost, cuda_stream(k)), "a copy to the host") &&
            cuda_sync(k))
            move_host(host, first, count, stage, x.dtype, true);
    }
    kern_rewind(k, mark);
}

static struct tensor cuda_upload(struct kern *k, enum tensor_dtype dtype, struct tensor host)
{
    struct tensor t = tensor_of(NULL, dtype, host.rank, host.shape);
    t.data = cuda_alloc(k, tensor_bytes(t));
    if (t.data)
        send_host(k, t.data, dtype, host);
    if (k->failed) {
        cuda_free(k, t.data);
        t.data = NULL;
        return t;
    }
    cuda_count_weights(k, (int64_t)tensor_bytes(t));
    return t;
}

static void cuda_release(struct kern *k, struct tensor t)
{
    cuda_count_weights(k, -(int64_t)tensor_bytes(t));
    cuda_free(k, t.data);
}

/* The host picks the rows: a table is as large as several layers, and few of its rows are ever asked for. */
static void cuda_gather(struct kern *k, struct tensor out, const struct quant_matrix *table, struct tensor ids)
{
    size_t mark = kern_mark(k), row_bytes = (size_t)out.shape[1] * tensor_dtype_bytes(out.dtype);
    struct tensor dense = tensor_is_contiguous(out) ? out : kern_temp(k, out.dtype, 2, out.shape);
    int64_t rows = out.shape[0], step = (int64_t)(CUDA_STAGE_BYTES / row_bytes);
    if (step == 0)
        kern_ops_fail(k, "a table's row of %zu bytes, accepted: up to %zu", row_bytes, CUDA_STAGE_BYTES);
    for (int64_t first = 0; first < rows && !k->failed; first += step) {
        int64_t count = rows - first < step ? rows - first : step;
        char *stage = cuda_stage(k, (size_t)count * row_bytes);
        if (!stage)
            break;
        for (int64_t r = 0; r < count && !k->is_dry; r++)
            quant_rows(stage + (size_t)r * row_bytes, out.dtype, table, ((const int32_t *)ids.data)[first + r], 1);
        cuda_send(k, (char *)dense.data + (size_t)first * row_bytes, (size_t)count * row_bytes);
    }
    if (!k->failed && dense.data != out.data)
        elementwise_copy_cuda(k, out, dense);
    kern_rewind(k, mark);
}

/* A few hundred values once per step: the host computes them with the functions of the definition. */
static void cuda_timestep_embedding(struct kern *k, struct tensor out, float t)
{
    int64_t half = out.shape[1] / 2;
    size_t size = tensor_dtype_bytes(out.dtype);
    char *stage = cuda_stage(k, (size_t)out.shape[1] * size);
    if (!stage)
        return;
    for (int64_t i = 0; i < half; i++) {
        float angle = t * kern_ops_frequency(i, half), wave[2] = {cosf(angle), sinf(angle)};
        for (int part = 0; part < 2; part++)
            tensor_convert(tensor_1d(stage + (size_t)(part * half + i) * size, out.dtype, 1),
                           tensor_1d(&wave[part], TENSOR_F32, 1));
    }
    cuda_send(k, out.data, (size_t)out.shape[1] * size);
}

static bool cuda_has_nan(struct kern *k, struct tensor x)
{
    struct cuda *c = cuda_of(k);
    cudaStream_t stream = cuda_stream(k);
    if (!cuda_check(k, cudaMemsetAsync(c->flag, 0, sizeof *c->flag, stream), "has_nan"))
        return false;
    elementwise_bad_cuda(k, c->flag, x);
    int32_t *bad = cuda_stage(k, sizeof *bad);
    if (!bad || !cuda_check(k, cudaMemcpyAsync(bad, c->flag, sizeof *bad, cudaMemcpyDeviceToHost, stream), "has_nan") ||
        !cuda_sync(k))
        return false;
    return *bad != 0;
}

/* --- life --------------------------------------------------------------------------------------------------- */

static void cuda_close(struct kern *k)
{
    struct cuda *c = cuda_of(k);
    cudaSetDevice(c->device);
    if (c->stream)
        cuda_wait(k, "the work queued before");
    if (is_stuck(c)) { /* the process is to end */
        team_nccl_leave(c->team);
        return;
    }
    team_nccl_close(c->team);
    cuda_graph_close(c->graphs);
    c->graphs = NULL;
    drop_blocks(c, 0);
    for (int i = 0; i < 2; i++) {
        if (c->stages[i].sent)
            cudaEventDestroy(c->stages[i].sent);
        cudaFreeHost(c->stages[i].host);
    }
    cuda_layers_close(c->layers);
    linear_blas_close(c->blas);
    cuda_progress_close(c->progress);
    c->progress = NULL;
    cudaFree(c->flag);
    if (c->stream)
        cudaStreamDestroy(c->stream);
    free(c);
}

static const struct kern_ops cuda_table = {
    .close = cuda_close,
    .sync = cuda_sync,
    .temp = cuda_temp,
    .mark = cuda_mark,
    .rewind = cuda_rewind,
    .peak_bytes = cuda_peak_bytes,
    .memory = cuda_memory,
    .reserve = cuda_reserve,
    .graph = cuda_graph,
    .write = cuda_write,
    .read = cuda_read,
    .upload = cuda_upload,
    .release = cuda_release,
    .weight = cuda_weight_new,
    .weight_quant = cuda_weight_quant,
    .weight_free = cuda_weight_free,
    .layer_begin = cuda_layer_begin,
    .layer_take = cuda_weight_take,
    .layer_end = cuda_layer_end,
    .layer_free = cuda_layer_free,
    .layer_fetch = cuda_layer_fetch,
    .layer_use = cuda_layer_use,
    .join = team_nccl_join,
    .sum_ranks = team_nccl_sum,
    .sum_end = team_nccl_sum_end,
    .checksum = elementwise_checksum_cuda,
    .copy = elementwise_copy_cuda,
    .gather = cuda_gather,
    .linear = linear_apply_cuda,
    .conv2d = conv_apply_cuda,
    .attention = attention_apply_cuda,
    .rms_norm = norm_rms_cuda,
    .layer_norm_modulate = norm_layer_modulate_cuda,
    .gated_add_norm = norm_gated_add_cuda,
    .group_norm = norm_group_cuda,
    .silu = elementwise_silu_cuda,
    .silu_mul = elementwise_silu_mul_cuda,
    .add = elementwise_add_cuda,
    .gated_add = elementwise_gated_add_cuda,
    .add_scaled = elementwise_add_scaled_cuda,
    .rms_rope = rope_rms_cuda,
    .timestep_embedding = cuda_timestep_embedding,
    .guide = elementwise_guide_cuda,
    .mix = elementwise_mix_cuda,
    .unpatchify = resample_unpatchify_cuda,
    .patchify = resample_patchify_cuda,
    .upsample2 = resample_upsample2_cuda,
    .pixels = resample_pixels_cuda,
    .has_nan = cuda_has_nan,
};

__attribute__((visibility("default"))) int kern_cuda_count(char *why, size_t why_bytes)
{
    int count = 0; /* untouched on failure */
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaSuccess && count > 0)
        return count;
    cudaGetLastError();
    snprintf(why, why_bytes, "no CUDA device: %s; install the NVIDIA driver or render with --device cpu",
             status == cudaSuccess ? "the driver lists none" : cudaGetErrorString(status));
    return 0;
}

/* The device's name; false with a sentence when it is none or too old. */
static bool look_at_device(struct cuda *c, char *why, size_t why_bytes)
{
    int count = kern_cuda_count(why, why_bytes);
    if (count == 0)
        return false;
    if (c->device < 0 || c->device >= count) {
        snprintf(why, why_bytes, "no CUDA device %d: this machine has %d, counted from 0", c->device, count);
        return false;
    }
    struct cudaDeviceProp p;
    cudaError_t status = cudaGetDeviceProperties(&p, c->device);
    if (status != cudaSuccess) {
        snprintf(why, why_bytes, "no CUDA device %d: %s", c->device, cudaGetErrorString(status));
        return false;
    }
    if (p.major < 8) {
        snprintf(why, why_bytes, "no usable CUDA device: %s has compute capability %d.%d, needed: 8.0 or more", p.name,
                 p.major, p.minor);
        return false;
    }
    snprintf(c->device_name, sizeof c->device_name, "cuda:%d (%.40s)", c->device, p.name);
    snprintf(c->kern.name, sizeof c->kern.name, "%s, sm_%d%d", c->device_name, p.major, p.minor);
    c->kern.has_fp8 = 10 * p.major + p.minor >= 89;
    return true;
}

/* Stream, pinned memory, events, kernels' shared memory. The first failure is in the kern. */
static bool set_up(struct cuda *c)
{
    struct kern *k = &c->kern;
    cudaGetLastError(); /* what this thread did before is not ours */
    bool ok = cuda_check(k, cudaSetDevice(c->device), "taking the device") &&
              cuda_check(k, cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking), "a stream");
    for (int i = 0; i < 2 && ok; i++)
        ok = cuda_check(k, cudaMallocHost((void **)&c->stages[i].host, CUDA_STAGE_BYTES), "pinned memory") &&
             cuda_check(k, cudaEventCreateWithFlags(&c->stages[i].sent, cudaEventDisableTiming), "an event");
    c->progress = ok ? cuda_progress_open(k) : NULL;
    if (!c->progress)
        return false;
    c->flag = take(c, sizeof *c->flag, "a flag");
    if (!c->flag || !attention_open_cuda(k))
        return false;
    c->blas = linear_blas_open(k);
    k->has_fp8 = k->has_fp8 && c->blas; /* only the library multiplies by these units */
    c->graphs = k->failed ? NULL : cuda_graph_open(k, &c->ops);
    if (!k->failed && k->ranks > 1)
        c->team = team_nccl_open(k);
    return !k->failed;
}

__attribute__((visibility("default"))) struct kern *kern_cuda_open(const struct kern_cuda_options *options, char *why,
                                                                   size_t why_bytes)
{
    struct cuda *c = calloc(1, sizeof *c);
    if (!c) {
        snprintf(why, why_bytes, "no memory for the CUDA backend");
        return NULL;
    }
    c->device = options->device;
    kern_ops_member(&c->kern, &options->member);
    c->ops = cuda_table;
    c->kern.ops = &c->ops;
    c->kern.is_dry = options->is_dry;
    bool is_team = c->kern.ranks <= TEAM_NCCL_RANKS;
    if (!is_team)
        snprintf(why, why_bytes, "a team of %d GPUs, accepted: %d", c->kern.ranks, TEAM_NCCL_RANKS);
    if (!is_team || !look_at_device(c, why, why_bytes)) {
        free(c);
        return NULL;
    }
    if (!set_up(c)) {
        snprintf(why, why_bytes, "%s", c->kern.error);
        cuda_close(&c->kern);
        return NULL;
    }
    return &c->kern;
}

__attribute__((visibility("default"))) const struct kern_cuda_layout kern_cuda_layout = {
    .version = KILN_VERSION,
    .kern_bytes = sizeof(struct kern),
    .ops_bytes = sizeof(struct kern_ops),
    .weight_bytes = sizeof(struct kern_weight),
};
