/* resample.cu - resample.c on the device: unpatchify and patchify, upsampling, pixels. (The time sinusoid is 256 values per step; the
 * host computes them with the definition's own functions and sends them: kern_cuda.c.)
 *
 * Who does what: unpatchify and patchify one token channel per thread, upsampling 16 bytes of an output pixel per thread, pixels one
 *     value per thread. No shared memory.
 * Limit: bytes. Upsampling reads a quarter of what it writes. Unpatchify writes single values 4 pixels apart; it moves
 *     0.5 MB once per image, so nothing is gained by a tile.
 * Expected, not measured: upsampling 80 % of the memory bandwidth on sm_80, 89 and 90. */
#include "gpu_rows.h"

#define THREADS 256

namespace {

template <typename T>
__global__ void __launch_bounds__(THREADS) unpatchify_kernel(gpu_rows<T> out, gpu_rows<const T> tokens, const T *mean,
                                                             const T *std, uint32_t count, uint32_t wide, uint32_t grid_h,
                                                             uint32_t grid_w)
{
    uint32_t index = blockIdx.x * THREADS + threadIdx.x;
    if (index >= count)
        return;
    uint32_t token = index / wide, channel = index % wide;
    uint32_t x = token % grid_w, y = token / grid_w % grid_h, b = token / grid_w / grid_h;
    float v = gpu_float(tokens.at(token)[channel]);
    v = gpu_round<T>(v * gpu_float(std[channel])) + gpu_float(mean[channel]);
    uint32_t row = 2 * y + channel % 4 / 2, column = 2 * x + channel % 2;
    out.at((b * 2 * grid_h + row) * 2 * grid_w + column)[channel / 4] = gpu_of<T>(v);
}

template <typename T> void unpatchify(struct kern *k, const struct tensor &out, const struct tensor &tokens,
                                      const struct tensor &mean, const struct tensor &std)
{
    uint32_t wide = (uint32_t)tokens.shape[2], count = (uint32_t)tensor_count(tokens);
    GPU_COST(2.0 * count * sizeof(T), 2.0 * count, false);
    GPU_LAUNCH((unpatchify_kernel<T>), dim3(gpu_blocks(count, THREADS)), dim3(THREADS), 0, cuda_stream(k),
           gpu_rows_of<T>(out), gpu_rows_of<const T>(tokens), (const T *)mean.data, (const T *)std.data, count, wide,
           (uint32_t)out.shape[1] / 2, (uint32_t)out.shape[2] / 2);
    cuda_launched(k, "unpatchify");
}

template <typename T>
__global__ void __launch_bounds__(THREADS) patchify_kernel(gpu_rows<T> tokens, gpu_rows<const T> picture, const T *mean,
                                                           const T *std, uint32_t count, uint32_t wide, uint32_t grid_h,
                                                           uint32_t grid_w)
{
    uint32_t index = blockIdx.x * THREADS + threadIdx.x;
    if (index >= count)
        return;
    uint32_t token = index / wide, channel = index % wide;
    uint32_t x = token % grid_w, y = token / grid_w % grid_h, b = token / grid_w / grid_h;
    uint32_t row = 2 * y + channel % 4 / 2, column = 2 * x + channel % 2;
    float v = gpu_float(picture.at((b * 2 * grid_h + row) * 2 * grid_w + column)[channel / 4]);
    v = gpu_round<T>(v - gpu_float(mean[channel])) / gpu_float(std[channel]);
    tokens.at(token)[channel] = gpu_of<T>(v);
}

template <typename T> void patchify(struct kern *k, const struct tensor &tokens, const struct tensor &x,
                                    const struct tensor &mean, const struct tensor &std)
{
    uint32_t wide = (uint32_t)tokens.shape[2], count = (uint32_t)tensor_count(tokens);
    GPU_COST(2.0 * count * sizeof(T), 2.0 * count, false);
    GPU_LAUNCH((patchify_kernel<T>), dim3(gpu_blocks(count, THREADS)), dim3(THREADS), 0, cuda_stream(k),
           gpu_rows_of<T>(tokens), gpu_rows_of<const T>(x), (const T *)mean.data, (const T *)std.data, count, wide,
           (uint32_t)x.shape[1] / 2, (uint32_t)x.shape[2] / 2);
    cuda_launched(k, "patchify");
}

/* W: one access, whatever the values are. */
template <typename W>
__global__ void __launch_bounds__(THREADS) upsample_kernel(gpu_rows<char> out, gpu_rows<const char> x, uint32_t count,
                                                           uint32_t chunks, uint32_t height, uint32_t width)
{
    uint32_t index = blockIdx.x * THREADS + threadIdx.x;
    if (index >= count)
        return;
    uint32_t pixel = index / chunks, at = index % chunks * (uint32_t)sizeof(W);
    uint32_t column = pixel % width, row = pixel / width % height, b = pixel / width / height;
    uint32_t from = (b * (height / 2) + row / 2) * (width / 2) + column / 2;
    *reinterpret_cast<W *>(out.at(pixel) + at) = *reinterpret_cast<const W *>(x.at(from) + at);
}

/* out, x: as bytes. */
template <typename W> void upsample(struct kern *k, const struct tensor &out, const struct tensor &x)
{
    uint32_t chunks = (uint32_t)(out.shape[3] / (int64_t)sizeof(W));
    uint32_t count = (uint32_t)gpu_row_count(out) * chunks, height = (uint32_t)out.shape[1], width = (uint32_t)out.shape[2];
    GPU_COST(1.25 * count * sizeof(W), 0.0, false);
    GPU_LAUNCH((upsample_kernel<W>), dim3(gpu_blocks(count, THREADS)), dim3(THREADS), 0, cuda_stream(k),
           gpu_rows_of<char>(out), gpu_rows_of<const char>(x), count, chunks, height, width);
    cuda_launched(k, "upsample2");
}

template <typename T>
__global__ void __launch_bounds__(THREADS) pixels_kernel(gpu_rows<uint8_t> out, gpu_rows<const T> x, uint32_t count,
                                                         uint32_t width)
{
    uint32_t index = blockIdx.x * THREADS + threadIdx.x;
    if (index >= count)
        return;
    float v = gpu_round<T>(gpu_round<T>(0.5f * gpu_float(x.at(index / width)[index % width])) + 0.5f);
    v = v > 0 ? v < 1 ? v : 1 : 0;
    out.at(index / width)[index % width] = (uint8_t)rintf(v * 255.0f);
}

template <typename T> void pixels(struct kern *k, const struct tensor &out, const struct tensor &x)
{
    uint32_t count = (uint32_t)tensor_count(x);
    GPU_COST((1.0 + sizeof(T)) * count, 4.0 * count, false);
    GPU_LAUNCH((pixels_kernel<T>), dim3(gpu_blocks(count, THREADS)), dim3(THREADS), 0, cuda_stream(k),
           gpu_rows_of<uint8_t>(out), gpu_rows_of<const T>(x), count, (uint32_t)x.shape[x.rank - 1]);
    cuda_launched(k, "pixels");
}

} // namespace

void resample_unpatchify_cuda(struct kern *k, struct tensor out, struct tensor tokens, struct tensor mean,
                              struct tensor std)
{
    assert(out.dtype == tokens.dtype && mean.dtype == tokens.dtype && std.dtype == tokens.dtype);
    assert(tensor_count(tokens) < (int64_t)1 << 32);
    if (tensor_count(tokens) == 0)
        return;
    if (tokens.dtype == TENSOR_F32)
        unpatchify<float>(k, out, tokens, mean, std);
    else
        unpatchify<bf16>(k, out, tokens, mean, std);
}

void resample_patchify_cuda(struct kern *k, struct tensor tokens, struct tensor x, struct tensor mean, struct tensor std)
{
    assert(tokens.dtype == x.dtype && mean.dtype == x.dtype && std.dtype == x.dtype);
    assert(tensor_count(tokens) < (int64_t)1 << 32);
    if (tensor_count(tokens) == 0)
        return;
    if (x.dtype == TENSOR_F32)
        patchify<float>(k, tokens, x, mean, std);
    else
        patchify<bf16>(k, tokens, x, mean, std);
}

void resample_upsample2_cuda(struct kern *k, struct tensor out, struct tensor x)
{
    size_t size = tensor_dtype_bytes(out.dtype);
    assert(tensor_count(out) < (int64_t)1 << 32);
    if (tensor_count(out) == 0)
        return;
    struct tensor to = gpu_bytes_of(out), from = gpu_bytes_of(x);
    if (gpu_is_vector(to) && gpu_is_vector(from))
        upsample<uint4>(k, to, from);
    else if (size == 4)
        upsample<uint32_t>(k, to, from);
    else if (size == 2)
        upsample<uint16_t>(k, to, from);
    else
        upsample<uint8_t>(k, to, from);
}

void resample_pixels_cuda(struct kern *k, struct tensor out, struct tensor x)
{
    assert(tensor_count(x) < (int64_t)1 << 32);
    if (tensor_count(x) == 0)
        return;
    if (x.dtype == TENSOR_F32)
        pixels<float>(k, out, x);
    else
        pixels<bf16>(k, out, x);
}
