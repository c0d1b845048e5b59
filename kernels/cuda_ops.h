/* cuda_ops.h - inside the CUDA backend: its stream, first error and memory, and the functions behind the op table.
 *
 * kern_cuda.c owns the device, cuda_weight.c the weights; the .cu files own kernels and start them with the helpers here. Everything an op does
 * is queued on one stream, in order, and the op returns at once: nothing waits but kern_sync, kern_read and
 * kern_has_nan. An op that needs memory takes it from the arena (kern_temp) and rewinds before it returns: the
 * stream's order makes that safe, for whoever gets the same memory next writes it later. */
#ifndef KILN_CUDA_OPS_H
#define KILN_CUDA_OPS_H

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "kern_ops.h"

/* cuda_stream makes the backend's device the calling thread's and returns the stream to queue on. */
cudaStream_t cuda_stream(const struct kern *k);

/* cuda_check keeps the first failure as a sentence: "no memory ..." when a later, smaller piece of work may succeed,
 * "device lost ..." or "device failed ..." when not. True when status is success. */
bool cuda_check(struct kern *k, cudaError_t status, const char *what);

/* cuda_sentence is what cuda_check says of a failure; from any thread. */
void cuda_sentence(const struct kern *k, cudaError_t status, const char *what, char *ret, size_t ret_bytes);

/* cuda_launched asks after each launch whether the device took it. */
bool cuda_launched(struct kern *k, const char *kernel);

/* cuda_wait: until what was queued is done, as long as the device gets on (cuda_progress.h); false after the error is kept. */
bool cuda_wait(struct kern *k, const char *what);

/* cuda_alloc is device memory for weights, 256-byte aligned; NULL after the error is kept. cuda_free accepts NULL. */
void *cuda_alloc(struct kern *k, size_t bytes);
void cuda_free(struct kern *k, void *data);
void cuda_count_weights(struct kern *k, int64_t bytes); /* so many more on the device, for kern_peak_bytes */

/* Host values on their way to the device go through pinned memory: cuda_stage gives up to CUDA_STAGE_BYTES of it (NULL
 * after a failure), cuda_send queues the copy of its first `bytes` to device memory. The caller's own memory may go
 * away as soon as it has been written into the stage. */
#define CUDA_STAGE_BYTES ((size_t)8 << 20)
void *cuda_stage(struct kern *k, size_t bytes);
void cuda_send(struct kern *k, void *to, size_t bytes);

/* cuda_progress_of: never NULL while operations are asked. */
struct cuda_progress *cuda_progress_of(const struct kern *k);

/* cuda_blas: the backend's cuBLASLt, NULL if it goes without. */
struct linear_blas *cuda_blas(const struct kern *k);

/* cuda_team: the backend's connection to the others of its team; NULL if it works alone. */
struct team_nccl *cuda_team(const struct kern *k);

/* cuda_layers_of: those of the backend, NULL as long as no layer was made; cuda_layers_needed opens them. */
struct cuda_layers *cuda_layers_of(const struct kern *k);
struct cuda_layers *cuda_layers_needed(struct kern *k);

/* cuda_graphs_of: those of the backend, NULL if it goes without. */
struct cuda_graphs *cuda_graphs_of(const struct kern *k);

/* --- the ops; their contracts are those of kern.h --------------------------------------------------- */

void elementwise_copy_cuda(struct kern *k, struct tensor out, struct tensor x);
void elementwise_silu_cuda(struct kern *k, struct tensor out, struct tensor x);
void elementwise_silu_mul_cuda(struct kern *k, struct tensor out, struct tensor gate, struct tensor up);
void elementwise_add_cuda(struct kern *k, struct tensor out, struct tensor a, struct tensor b);
void elementwise_gated_add_cuda(struct kern *k, struct tensor x, struct tensor gate, struct tensor y);
void elementwise_guide_cuda(struct kern *k, struct tensor out, struct tensor c, struct tensor u, float g);
void elementwise_add_scaled_cuda(struct kern *k, struct tensor x, struct tensor y, float s);
void elementwise_mix_cuda(struct kern *k, struct tensor out, struct tensor a, struct tensor b, struct tensor share);
/* elementwise_bad_cuda sets *bad (device memory, zero before) if any value is NaN or infinite. */
void elementwise_bad_cuda(struct kern *k, int32_t *bad, struct tensor x);
void elementwise_checksum_cuda(struct kern *k, struct tensor out, struct tensor x);
void norm_rms_cuda(struct kern *k, struct tensor out, struct tensor x, struct tensor weight, float eps,
                   enum kern_rounding rounding);
void norm_layer_modulate_cuda(struct kern *k, struct tensor out, struct tensor x, struct tensor scale,
                              struct tensor shift, float eps);
void norm_gated_add_cuda(struct kern *k, struct tensor out, struct tensor x, struct tensor gate, struct tensor y,
                         struct tensor scale, struct tensor shift, float eps);
void norm_group_cuda(struct kern *k, struct tensor out, struct tensor x, struct tensor weight, struct tensor bias,
                     int groups, float eps, bool silu);
void rope_rms_cuda(struct kern *k, struct tensor out, struct tensor x, struct tensor weight, float eps,
                   enum kern_rounding rounding, struct tensor cos, struct tensor sin, enum kern_rope_layout layout);
void resample_unpatchify_cuda(struct kern *k, struct tensor out, struct tensor tokens, struct tensor mean,
                              struct tensor std);
void resample_patchify_cuda(struct kern *k, struct tensor tokens, struct tensor x, struct tensor mean, struct tensor std);
void resample_upsample2_cuda(struct kern *k, struct tensor out, struct tensor x);
void resample_pixels_cuda(struct kern *k, struct tensor out, struct tensor x);
/* fp8_rows_cuda: rows of x divided by `scale`, or, with `scales` (device memory), each by its own that goes there, and rounded to e4m3.
 * q [rows, at least the width of x], contiguous, zeros behind: codes (U8, of bf16), or numbers of the dtype of x.
 * fp8_scale_cuda: out[r,:] = scales[r] * out[r,:], powers of two. */
void fp8_rows_cuda(struct kern *k, struct tensor q, float *scales, struct tensor x, float scale);
void fp8_scale_cuda(struct kern *k, struct tensor out, const float *scales);
void linear_apply_cuda(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w);
void conv_apply_cuda(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w, int stride,
                     int pad);
bool attention_open_cuda(struct kern *k); /* once per backend: asks for the shared memory of its kernels */
void attention_apply_cuda(struct kern *k, struct tensor out, struct tensor q, struct tensor key, struct tensor value,
                          float scale, struct kern_mask mask);

#ifdef __cplusplus
}
#endif

#endif
