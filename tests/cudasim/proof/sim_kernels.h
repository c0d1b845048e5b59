/* sim_kernels.h - the kernels by which the simulator is proven, each with its host function.
 *
 * Three are correct and of the kinds a model needs: a reduction by shuffles, a tiled product in static shared memory,
 * attention with cp.async, ldmatrix and mma. sim_broken.cu has one deliberate bug in each kernel. */
#ifndef SIM_KERNELS_H
#define SIM_KERNELS_H

#include <cuda_runtime_api.h>
#include <stdint.h>

/* y[r,c] = x[r,c] * w[c] / sqrt(mean_c(x[r,c]^2) + eps)   x, y bf16 [rows, columns], w f32; columns % 8 == 0 */
cudaError_t sim_rms_norm(const uint16_t *x, const float *w, uint16_t *y, int rows, int columns, float eps,
                         cudaStream_t stream);

/* c[m,n] = a[m,k] b[k,n], f32, row-major. `has_bug`: without the second barrier of the loop. */
cudaError_t sim_gemm(const float *a, const float *b, float *c, int m, int n, int k, bool has_bug, cudaStream_t stream);

/* o = softmax(q k^T scale) v per head   q, o bf16 [heads, queries, 128], k, v bf16 [heads, keys, 128]
 * `has_bug`: waits for one group of copies too few. */
cudaError_t sim_flash(const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *o, int heads, int queries,
                      int keys, bool is_causal, float scale, bool has_bug, cudaStream_t stream);

/* --- sim_broken.cu: `x` has 64 floats ------------------------------------------------------------------------------- */

enum sim_bug {
    SIM_DIVERGENT_BARRIER,  /* half the block waits at another line */
    SIM_EXITED_BARRIER,     /* some threads have returned */
    SIM_EXITED_LANE,        /* a shuffle reads a lane that has returned */
    SIM_HALF_WARP,          /* the mask names lanes that never come */
    SIM_OTHER_MASK,         /* lanes disagree about the mask */
    SIM_MISSING_BARRIER,    /* one warp reads what another has not written yet */
    SIM_MISSING_SYNCWARP,   /* the same between lanes */
    SIM_BLOCK_RACE,         /* two blocks add to one address without atomics */
    SIM_STREAM_RACE,        /* another stream is expected to write x meanwhile */
    SIM_DYNAMIC_OVERFLOW,   /* beyond dynamic shared memory */
    SIM_STATIC_OVERFLOW,    /* beyond a static shared array */
    SIM_DEVICE_OVERFLOW,    /* beyond an allocation */
    SIM_USE_AFTER_FREE,     /* x was given back */
    SIM_UNWRITTEN_SHARED,   /* shared memory nobody wrote */
    SIM_UNWAITED_COPY,      /* cp.async read before the wait */
    SIM_MISALIGNED_TILE,    /* ldmatrix of an odd address */
    SIM_STACK_OVERFLOW,
    SIM_ENDLESS_LOOP,       /* waits for a value nobody writes */
    SIM_BUG_COUNT
};
cudaError_t sim_broken(enum sim_bug bug, float *x, cudaStream_t stream);
extern const char *const sim_bug_names[SIM_BUG_COUNT];

/* --- sim_probe.cu: what the other tests launch ------------------------------------------------------------------------- */

/* x[i] += value for i < count */
cudaError_t sim_add(float *x, float value, int count, cudaStream_t stream);
/* y[i] = x[i * stride] for i < count: 32 lanes touch 32 * stride floats */
cudaError_t sim_gather(float *y, const float *x, int stride, int count, cudaStream_t stream);
/* Transposes a 32 x 32 tile of floats through shared memory whose rows have 32 + padding floats. */
cudaError_t sim_transpose(float *y, const float *x, int padding, cudaStream_t stream);
/* One warp: d += a b; fragments [32 lanes][registers] as gpu.h describes them. kind 0 bf16, 1 f16, 2 e4m3 */
cudaError_t sim_mma(float *d, const uint32_t *a, const uint32_t *b, int kind, cudaStream_t stream);
/* One warp: out[lane][tiles] = ldmatrix of rows [32][8] 16-bit values */
cudaError_t sim_ldmatrix(uint32_t *out, const uint16_t *rows, int tiles, bool trans, cudaStream_t stream);
/* One warp: out[lane] of a collective; see sim_probe.cu */
enum sim_collective { SIM_SHFL, SIM_SHFL_UP, SIM_SHFL_DOWN, SIM_SHFL_XOR, SIM_BALLOT, SIM_ANY, SIM_ALL, SIM_WIDTH_8 };
cudaError_t sim_collect(int *out, enum sim_collective kind, int argument, cudaStream_t stream);
/* One block of 96 threads: out[0] = or, [1] = and, [2] = count of (thread < limit) */
cudaError_t sim_vote_block(int *out, int limit, cudaStream_t stream);
/* x[0] += 1 from every thread, atomically */
cudaError_t sim_count_threads(int *x, int blocks, int threads, cudaStream_t stream);
/* A launch with any shape, doing nothing. */
cudaError_t sim_nothing(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream);

/* --- rates, for README.md ------------------------------------------------------------------------------------------ */
enum sim_rate { SIM_RATE_ELEMENTS, SIM_RATE_BARRIERS, SIM_RATE_SHUFFLES, SIM_RATE_MMA };
cudaError_t sim_rate_run(enum sim_rate rate, float *x, int count, cudaStream_t stream);

#endif
