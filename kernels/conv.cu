/* conv.cu - conv.c on the device: a convolution is the matrix product of gpu_gemm.h whose rows are windows.
 *
 * Who does what: see gpu_gemm.h; a block makes 128 output pixels x 128 (or 32) output channels. Where the channels are
 *     no multiple of 8 (no real model), the picture is copied once with channels of zeros in between.
 * Shared memory: 48 KB (128 channels) or 30 KB.
 * Limit: FLOPs on tensor cores (f32: on CUDA cores). A 3x3 window of 512 channels reads each value 9 times, from the
 *     second-level cache 8 times of 9.
 * Expected, not measured: 60 to 65 % of the bf16 peak on sm_80 and 86, 65 to 70 % on sm_89, 35 to 40 % on sm_90 (which
 *     reaches its peak only with wgmma). */
#include "cuda_weight.h"
#include "gpu_gemm.h"

namespace {

template <typename T> gemm_window<T> window_of(const struct tensor &x, const struct tensor &out, const struct kern_weight *w,
                                               int stride, int pad)
{
    return {(const T *)x.data, (int)gpu_row_count(out), (int)x.shape[1], (int)x.shape[2], (int)x.shape[3], w->kh, w->kw,
            stride, pad, (int)out.shape[1], (int)out.shape[2]};
}

} // namespace

void conv_apply_cuda(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w, int stride, int pad)
{
    int64_t depth = cuda_weight_depth(w), inner = cuda_weight_inner(w);
    assert(gpu_row_count(out) < INT32_MAX && depth < INT32_MAX);
    if (tensor_count(out) == 0)
        return;
    if (w->dtype == TENSOR_F32) {
        gemm_run_f32(k, "conv2d f32", window_of<float>(x, out, w, stride, pad), w, depth, out, 1);
        return;
    }
    size_t mark = kern_mark(k);
    struct tensor rows = gemm_rows_cuda(k, tensor_rows(x), inner);
    if (!k->failed) {
        struct tensor picture = tensor_4d(rows.data, TENSOR_BF16, x.shape[0], x.shape[1], x.shape[2], inner);
        gemm_run_bf16(k, "conv2d", window_of<bf16>(picture, out, w, stride, pad), w, depth, out, 1);
    }
    kern_rewind(k, mark);
}
