/* norm.cu - norm.c on the device: RMS, layer norm with modulation (and what is added before), group norm with SiLU.
 *
 * Who does what: a row of up to 1024 values belongs to a warp, four rows to a block; a longer row to a block
 *     of 256 threads. A thread takes 16 bytes at a time, threads next to each other, and reads the row again for each
 *     pass: it is in the first-level cache by then, or, where a branch was added to it, in shared memory, each thread's
 *     part written by itself. Group norm is three launches: sums per chunk of pixels and group,
 *     their total in chunk order as scale and shift per channel, and one pass that applies them.
 * Shared memory: one float per warp; the row where something is added (6 KB for 3072 bf16); group norm two doubles per
 *     thread and channel of its vector (32 KB bf16).
 * Limit: bytes. RMS and layer norm read and write each value once, with a branch twice; group norm reads twice and writes once.
 * Expected, not measured: 80 to 90 % of the memory bandwidth on sm_80, 89 and 90 for rows of 3072 and more.
 *
 * The order of a sum depends on the width alone (pixels for group norm), so a row's bits do not depend on the others. */
#include "gpu_rows.h"

#define ROW_THREADS 256
#define WARP_ROWS 4           /* rows in a block when each has one warp */
#define WARP_WIDTH_MAX 1024
#define ADD_WIDTH_MAX 12288   /* 48 KB of f32 */

namespace {

/* The sum over the `THREADS` threads of a row, the same in each of them. */
template <int THREADS> __device__ __forceinline__ float row_sum(float v, float *part)
{
    v = gpu_warp_sum(v);
    if constexpr (THREADS > 32) {
        constexpr int warps = THREADS / 32;
        __syncthreads(); /* the sum before this one has been read */
        if (threadIdx.x % 32 == 0)
            part[threadIdx.x / 32] = v;
        __syncthreads();
        v = 0;
#pragma unroll
        for (int i = 0; i < warps; i++)
            v += part[i];
    }
    return v;
}

/* Which row a thread works on, and its place in the row. */
template <int THREADS> __device__ __forceinline__ uint32_t row_of(int *lane)
{
    *lane = (int)threadIdx.x % THREADS;
    return THREADS == 32 ? blockIdx.x * WARP_ROWS + threadIdx.x / 32 : blockIdx.x;
}

template <typename T, int N, int THREADS>
__global__ void __launch_bounds__(THREADS == 32 ? 32 * WARP_ROWS : THREADS)
    rms_kernel(gpu_rows<T> out, gpu_rows<const T> x, const T *weight, uint32_t rows, int width, float eps, bool round_first)
{
    __shared__ float part[ROW_THREADS / 32];
    int lane;
    uint32_t r = row_of<THREADS>(&lane);
    if (r >= rows) /* a whole warp at once, and blocks of one row have none */
        return;
    const T *from = x.at(r);
    T *to = out.at(r);
    float sum = 0, v[N], w[N];
    for (int i = lane * N; i < width; i += THREADS * N) {
        gpu_load<N>(v, from + i);
#pragma unroll
        for (int j = 0; j < N; j++)
            sum += v[j] * v[j];
    }
    float scale = 1.0f / sqrtf(row_sum<THREADS>(sum, part) / (float)width + eps);
    for (int i = lane * N; i < width; i += THREADS * N) {
        gpu_load<N>(v, from + i);
        gpu_load<N>(w, weight + i);
#pragma unroll
        for (int j = 0; j < N; j++)
            v[j] = (round_first ? gpu_round<T>(v[j] * scale) : v[j] * scale) * w[j];
        gpu_store<N>(to + i, v);
    }
}

template <typename T> struct branch {
    gpu_rows<T> x; /* gets what is added */
    gpu_rows<const T> y;
    const T *gate;
};

/* x + gate * y of the thread's part of row r, into x and into `held`. */
template <typename T, int N, int THREADS>
__device__ __forceinline__ void add_row(T *held, const struct branch<T> &b, uint32_t r, int lane, int width)
{
    T *x = b.x.at(r);
    const T *y = b.y.at(r);
    float v[N], u[N], g[N];
    for (int i = lane * N; i < width; i += THREADS * N) {
        gpu_load<N>(v, x + i);
        gpu_load<N>(u, y + i);
        gpu_load<N>(g, b.gate + i);
#pragma unroll
        for (int j = 0; j < N; j++)
            v[j] += gpu_round<T>(g[j] * u[j]);
        gpu_store<N>(x + i, v);
        gpu_store<N>(held + i, v);
    }
}

template <typename T, int N, int THREADS, bool ADDS>
__global__ void __launch_bounds__(THREADS == 32 ? 32 * WARP_ROWS : THREADS)
    layer_kernel(gpu_rows<T> out, gpu_rows<const T> x, struct branch<T> added, const T *scale, const T *shift, uint32_t rows,
                 int width, float eps)
{
    GPU_SHARED(T, shared); /* [rows of the block][width], where something is added */
    __shared__ float part[ROW_THREADS / 32];
    int lane;
    uint32_t r = row_of<THREADS>(&lane);
    if (r >= rows)
        return;
    const T *from = x.at(r);
    T *to = out.at(r);
    if constexpr (ADDS) {
        T *held = shared + threadIdx.x / THREADS * width;
        add_row<T, N, THREADS>(held, added, r, lane, width);
        from = held;
    }
    float sum = 0, squares = 0, v[N], a[N], b[N];
    for (int i = lane * N; i < width; i += THREADS * N) {
        gpu_load<N>(v, from + i);
#pragma unroll
        for (int j = 0; j < N; j++)
            sum += v[j];
    }
    float mean = row_sum<THREADS>(sum, part) / (float)width;
    for (int i = lane * N; i < width; i += THREADS * N) {
        gpu_load<N>(v, from + i);
#pragma unroll
        for (int j = 0; j < N; j++)
            squares += (v[j] - mean) * (v[j] - mean);
    }
    float rstd = 1.0f / sqrtf(row_sum<THREADS>(squares, part) / (float)width + eps);
    for (int i = lane * N; i < width; i += THREADS * N) {
        gpu_load<N>(v, from + i);
        gpu_load<N>(a, scale + i);
        gpu_load<N>(b, shift + i);
#pragma unroll
        for (int j = 0; j < N; j++)
            v[j] = gpu_round<T>(gpu_round<T>(1.0f + a[j]) * gpu_round<T>((v[j] - mean) * rstd)) + b[j];
        gpu_store<N>(to + i, v);
    }
}

struct row_job {
    struct tensor out, x, a, b; /* a: weight or scale, b: shift */
    float eps;
    bool is_layer, round_first;
    struct tensor gate, y; /* y.data NULL: nothing is added to x */
};

template <typename T, int N, int THREADS> void rows_run(struct kern *k, const struct row_job &j)
{
    uint32_t rows = (uint32_t)gpu_row_count(j.x);
    int width = (int)j.x.shape[j.x.rank - 1];
    dim3 grid(THREADS == 32 ? gpu_blocks(rows, WARP_ROWS) : rows);
    dim3 block(THREADS == 32 ? 32 * WARP_ROWS : THREADS);
    gpu_rows<T> out = gpu_rows_of<T>(j.out);
    gpu_rows<const T> x = gpu_rows_of<const T>(j.x);
    const T *a = (const T *)j.a.data, *b = (const T *)j.b.data;
    struct branch<T> added = {gpu_rows_of<T>(j.x), gpu_rows_of<const T>(j.y), (const T *)j.gate.data};
    size_t held = (size_t)(THREADS == 32 ? WARP_ROWS : 1) * width * sizeof(T);
    GPU_COST((j.y.data ? 4.0 : 2.0) * rows * width * sizeof(T), (double)rows * width * (j.y.data ? 10 : j.is_layer ? 8 : 4), false);
    if (j.y.data)
        GPU_LAUNCH((layer_kernel<T, N, THREADS, true>), grid, block, held, cuda_stream(k), out, x, added, a, b, rows, width, j.eps);
    else if (j.is_layer)
        GPU_LAUNCH((layer_kernel<T, N, THREADS, false>), grid, block, 0, cuda_stream(k), out, x, added, a, b, rows, width, j.eps);
    else
        GPU_LAUNCH((rms_kernel<T, N, THREADS>), grid, block, 0, cuda_stream(k), out, x, a, rows, width, j.eps, j.round_first);
    cuda_launched(k, j.is_layer ? "layer_norm" : "rms_norm");
}

template <typename T, int N> void rows_width(struct kern *k, const struct row_job &j)
{
    if (j.x.shape[j.x.rank - 1] <= WARP_WIDTH_MAX)
        rows_run<T, N, 32>(k, j);
    else
        rows_run<T, N, ROW_THREADS>(k, j);
}

void rows_apply(struct kern *k, const struct row_job &j)
{
    assert(j.out.dtype == j.x.dtype && j.a.dtype == j.x.dtype && (!j.b.data || j.b.dtype == j.x.dtype));
    if (tensor_count(j.x) == 0)
        return;
    bool vector = gpu_is_vector(j.out) && gpu_is_vector(j.x) && (uintptr_t)j.a.data % 16 == 0 &&
                  (uintptr_t)j.b.data % 16 == 0 && (!j.y.data || (gpu_is_vector(j.y) && (uintptr_t)j.gate.data % 16 == 0));
    size_t width = (size_t)j.x.shape[j.x.rank - 1];
    if (j.y.data && width > ADD_WIDTH_MAX) {
        kern_ops_fail(k, "gated_add_norm: %zu wide, accepted on this device: up to %d", width, ADD_WIDTH_MAX);
        return;
    }
    if (j.x.dtype == TENSOR_F32)
        vector ? rows_width<float, 4>(k, j) : rows_width<float, 1>(k, j);
    else
        vector ? rows_width<bf16, 8>(k, j) : rows_width<bf16, 1>(k, j);
}

/* --- group norm --------------------------------------------------------------------------------------- */

#define GROUP_THREADS 256
#define GROUP_CHUNK 1024 /* pixels whose sums one block makes */
#define GROUP_STEP 64    /* pixels summed in f32 before the sum goes on in double, as in norm.c */

/* sums [batch][chunks][groups][2]: of the values and their squares. A thread takes N channels of every `lanes`-th pixel,
 * so that a block reads whole pixels; then a thread per group adds its channels, lane after lane. */
template <typename T, int N>
__global__ void __launch_bounds__(GROUP_THREADS) group_sums_kernel(double *sums, const T *x, int64_t pixels, int channels,
                                                                   int groups)
{
    GPU_SHARED(double, shared); /* [2][lanes][channels] */
    int64_t first = (int64_t)blockIdx.x * GROUP_CHUNK;
    int tid = threadIdx.x, vectors = channels / N, size = channels / groups;
    int lanes = vectors < GROUP_THREADS ? GROUP_THREADS / vectors : 1, lane = vectors < GROUP_THREADS ? tid / vectors : 0;
    int count = (int)(pixels - first < GROUP_CHUNK ? pixels - first : GROUP_CHUNK);
    for (int vector = tid - lane * vectors; lane < lanes && vector < vectors; vector += GROUP_THREADS) {
        const T *from = x + (blockIdx.y * pixels + first) * channels + vector * N;
        double sum[N] = {}, square[N] = {};
        for (int pixel = lane; pixel < count;) {
            float s[N] = {}, q[N] = {}, v[N];
            for (int i = 0; i < GROUP_STEP && pixel < count; i++, pixel += lanes) {
                gpu_load<N>(v, from + (int64_t)pixel * channels);
#pragma unroll
                for (int j = 0; j < N; j++) {
                    s[j] += v[j];
                    q[j] += v[j] * v[j];
                }
            }
#pragma unroll
            for (int j = 0; j < N; j++) {
                sum[j] += (double)s[j];
                square[j] += (double)q[j];
            }
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
            shared[lane * channels + vector * N + j] = sum[j];
            shared[(lanes + lane) * channels + vector * N + j] = square[j];
        }
    }
    __syncthreads();
    for (int group = tid; group < groups; group += GROUP_THREADS) {
        double sum = 0, square = 0;
        for (int l = 0; l < lanes; l++)
            for (int c = group * size; c < (group + 1) * size; c++) {
                sum += shared[l * channels + c];
                square += shared[(lanes + l) * channels + c];
            }
        double *to = sums + (((int64_t)blockIdx.y * gridDim.x + blockIdx.x) * groups + group) * 2;
        to[0] = sum, to[1] = square;
    }
}

/* One thread per channel: the totals of its group, then what a value is multiplied by and what is added. */
template <typename T>
__global__ void __launch_bounds__(GROUP_THREADS) group_scale_kernel(float *scale, float *shift, const double *sums,
                                                                    const T *weight, const T *bias, int64_t pixels,
                                                                    int chunks, int channels, int groups, float eps)
{
    int channel = blockIdx.x * GROUP_THREADS + threadIdx.x, b = blockIdx.y;
    if (channel >= channels)
        return;
    int size = channels / groups, group = channel / size;
    double sum = 0, square = 0, count = (double)(pixels * size);
    for (int chunk = 0; chunk < chunks; chunk++) {
        const double *s = sums + (((int64_t)b * chunks + chunk) * groups + group) * 2;
        sum += s[0];
        square += s[1];
    }
    double mean = sum / count, variance = square / count - mean * mean;
    double rstd = 1.0 / sqrt((variance > 0 ? variance : 0) + (double)eps), w = (double)gpu_float(weight[channel]);
    scale[(int64_t)b * channels + channel] = (float)(w * rstd);
    shift[(int64_t)b * channels + channel] = (float)((double)gpu_float(bias[channel]) - mean * w * rstd);
}

template <typename T, int N>
__global__ void __launch_bounds__(GROUP_THREADS) group_apply_kernel(T *out, const T *x, const float *scale,
                                                                    const float *shift, int64_t pixels, int channels,
                                                                    bool silu)
{
    uint32_t index = blockIdx.x * GROUP_THREADS + threadIdx.x, chunks = (uint32_t)channels / N;
    if (index >= pixels * chunks)
        return;
    uint32_t channel = index % chunks * N;
    int64_t at = (blockIdx.y * pixels + index / chunks) * channels + channel;
    const float *a = scale + (int64_t)blockIdx.y * channels + channel;
    const float *b = shift + (int64_t)blockIdx.y * channels + channel;
    float v[N];
    gpu_load<N>(v, x + at);
#pragma unroll
    for (int i = 0; i < N; i++) {
        v[i] = v[i] * a[i] + b[i];
        if (silu)
            v[i] = gpu_silu(gpu_round<T>(v[i]));
    }
    gpu_store<N>(out + at, v);
}

struct group_job {
    struct tensor out, x, weight, bias;
    int groups;
    float eps;
    bool silu;
};

template <typename T, int N> void group_apply(struct kern *k, const struct group_job &j, const float *scale, const float *shift)
{
    int64_t batch = j.x.shape[0], pixels = j.x.shape[1] * j.x.shape[2];
    int channels = (int)j.x.shape[3];
    assert(pixels * channels < (int64_t)1 << 32);
    dim3 grid(gpu_blocks(pixels * (channels / N), GROUP_THREADS), (uint32_t)batch);
    GPU_COST(2.0 * tensor_count(j.x) * sizeof(T), 4.0 * tensor_count(j.x), false);
    GPU_LAUNCH((group_apply_kernel<T, N>), grid, dim3(GROUP_THREADS), 0, cuda_stream(k), (T *)j.out.data, (const T *)j.x.data,
           scale, shift, pixels, channels, j.silu);
    cuda_launched(k, "group_norm");
}

template <typename T, int N> void group_sums(struct kern *k, const struct group_job &j, double *sums, int chunks)
{
    int64_t batch = j.x.shape[0], pixels = j.x.shape[1] * j.x.shape[2];
    int channels = (int)j.x.shape[3], vectors = channels / N, lanes = vectors < GROUP_THREADS ? GROUP_THREADS / vectors : 1;
    size_t shared = (size_t)(2 * lanes * channels) * sizeof(double);
    if (shared > 48 << 10) {
        kern_ops_fail(k, "group_norm: %d channels, accepted on this device: up to %d", channels, (48 << 10) / 16);
        return;
    }
    GPU_COST(1.0 * tensor_count(j.x) * sizeof(T), 3.0 * tensor_count(j.x), false);
    GPU_LAUNCH((group_sums_kernel<T, N>), dim3((uint32_t)chunks, (uint32_t)batch), dim3(GROUP_THREADS), shared, cuda_stream(k),
               sums, (const T *)j.x.data, pixels, channels, j.groups);
    cuda_launched(k, "group_norm sums");
}

template <typename T, int N> void group_run(struct kern *k, const struct group_job &j)
{
    int64_t batch = j.x.shape[0], pixels = j.x.shape[1] * j.x.shape[2];
    int channels = (int)j.x.shape[3], chunks = (int)((pixels + GROUP_CHUNK - 1) / GROUP_CHUNK);
    int64_t doubles = batch * chunks * j.groups * 2, floats = batch * channels * 2, words = doubles * 2;
    size_t mark = kern_mark(k);
    double *sums = (double *)kern_temp(k, TENSOR_F32, 1, &words).data;
    float *scale = (float *)kern_temp(k, TENSOR_F32, 1, &floats).data;
    if (!k->failed)
        group_sums<T, N>(k, j, sums, chunks);
    if (!k->failed) {
        float *shift = scale + batch * channels;
        GPU_COST(8.0 * doubles + 4.0 * floats, 2.0 * doubles, false);
        GPU_LAUNCH((group_scale_kernel<T>), dim3(gpu_blocks(channels, GROUP_THREADS), (uint32_t)batch),
                   dim3(GROUP_THREADS), 0, cuda_stream(k), scale, shift, (const double *)sums, (const T *)j.weight.data,
                   (const T *)j.bias.data, pixels, chunks, channels, j.groups, j.eps);
        cuda_launched(k, "group_norm scale");
        group_apply<T, N>(k, j, scale, shift);
    }
    kern_rewind(k, mark);
}

template <typename T> void group_vector(struct kern *k, const struct group_job &j)
{
    if (gpu_is_vector(j.out) && gpu_is_vector(j.x))
        group_run<T, gpu_vector<T>>(k, j);
    else
        group_run<T, 1>(k, j);
}

} // namespace

void norm_rms_cuda(struct kern *k, struct tensor out, struct tensor x, struct tensor weight, float eps,
                   enum kern_rounding rounding)
{
    rows_apply(k, {out, x, weight, {}, eps, false, rounding == KERN_ROUND_BEFORE_WEIGHT, {}, {}});
}

void norm_layer_modulate_cuda(struct kern *k, struct tensor out, struct tensor x, struct tensor scale,
                              struct tensor shift, float eps)
{
    rows_apply(k, {out, x, scale, shift, eps, true, false, {}, {}});
}

void norm_gated_add_cuda(struct kern *k, struct tensor out, struct tensor x, struct tensor gate, struct tensor y,
                         struct tensor scale, struct tensor shift, float eps)
{
    rows_apply(k, {out, x, scale, shift, eps, true, false, gate, y});
}

void norm_group_cuda(struct kern *k, struct tensor out, struct tensor x, struct tensor weight, struct tensor bias,
                     int groups, float eps, bool silu)
{
    assert(out.dtype == x.dtype && weight.dtype == x.dtype && bias.dtype == x.dtype);
    if (tensor_count(x) == 0)
        return;
    if (x.dtype == TENSOR_F32)
        group_vector<float>(k, {out, x, weight, bias, groups, eps, silu});
    else
        group_vector<bf16>(k, {out, x, weight, bias, groups, eps, silu});
}
