/* linear_blas.c - cuBLASLt, asked so that a row's bits do not depend on the other rows.
 *
 * The library's heuristic answers with another algorithm for another number of rows, and algorithms differ in their order
 * of summation. So it is asked once per weight, for ROWS_TYPICAL rows, and only an algorithm that sums k in one go is
 * taken (no split k, no reduction between blocks: those add in an order that depends on the shape); it must serve every
 * number of rows of rows_checked. A weight for which there is none is served by gpu_gemm.h. What is chosen depends on the
 * weight and the device alone. The workspace is one for all and of one size: products follow each other on one stream.
 *
 * In the library's column-major words: D [n x rows] = op(A) B, A = weight [depth x n] transposed, B = x [depth x rows]. FP8 takes just this
 * form. Its scales, of the weight and of all rows, are one number, and so the factor that every product has (alpha). */
#include "linear_blas.h"

#include <cublasLt.h>
#include <stdlib.h>
#include <string.h>

#define ROWS_TYPICAL 4096
#define ANSWERS 16
#define WORKSPACE_BYTES ((size_t)32 << 20)
#define ALIGNMENT 16u

static const int64_t rows_checked[] = {1, 8, 77, 512, ROWS_TYPICAL, 16384};

struct linear_blas {
    struct kern *kern;
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t product;
    cublasLtMatmulPreference_t wishes;
    void *workspace;
};

struct linear_blas_plan {
    struct linear_blas *blas;
    int64_t n, depth;
    cudaDataType_t type; /* of x and weight */
    cublasLtMatrixLayout_t weight;
    cublasLtMatmulAlgo_t algorithm;
};

/* --- opening -------------------------------------------------------------------------------------------- */

static bool set_wishes(struct linear_blas *b)
{
    static const cublasLtMatmulPreferenceAttributes_t alignments[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    size_t workspace = WORKSPACE_BYTES;
    uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_NONE, alignment = ALIGNMENT;
    int32_t transposed = CUBLAS_OP_T;
    if (cublasLtMatmulDescCreate(&b->product, CUBLAS_COMPUTE_32F, CUDA_R_32F) || cublasLtMatmulPreferenceCreate(&b->wishes) ||
        cublasLtMatmulDescSetAttribute(b->product, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed) ||
        cublasLtMatmulPreferenceSetAttribute(b->wishes, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace) ||
        cublasLtMatmulPreferenceSetAttribute(b->wishes, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes, sizeof schemes))
        return false;
    for (int i = 0; i < 4; i++)
        if (cublasLtMatmulPreferenceSetAttribute(b->wishes, alignments[i], &alignment, sizeof alignment))
            return false;
    return true;
}

struct linear_blas *linear_blas_open(struct kern *k)
{
    const char *choice = getenv("KILN_CUDA_GEMM");
    if (choice && strcmp(choice, "own") == 0)
        return NULL;
    if (choice && *choice && strcmp(choice, "cublas") != 0) {
        kern_ops_fail(k, "KILN_CUDA_GEMM='%s', accepted: cublas, own", choice);
        return NULL;
    }
    struct linear_blas *b = calloc(1, sizeof *b);
    if (!b) {
        kern_ops_fail(k, "no memory for cuBLASLt's description");
        return NULL;
    }
    b->kern = k;
    cublasStatus_t status = cublasLtCreate(&b->handle);
    if (status != CUBLAS_STATUS_SUCCESS || !set_wishes(b)) {
        kern_ops_fail(k, "%s: cuBLASLt cannot be set up (status %d)",
                      status == CUBLAS_STATUS_ALLOC_FAILED ? "no memory" : "device failed", (int)status);
        linear_blas_close(b);
        return NULL;
    }
    b->workspace = cuda_alloc(k, WORKSPACE_BYTES);
    if (!b->workspace) {
        linear_blas_close(b);
        return NULL;
    }
    return b;
}

void linear_blas_close(struct linear_blas *b)
{
    if (!b)
        return;
    if (b->workspace)
        cuda_free(b->kern, b->workspace);
    if (b->wishes)
        cublasLtMatmulPreferenceDestroy(b->wishes);
    if (b->product)
        cublasLtMatmulDescDestroy(b->product);
    if (b->handle)
        cublasLtDestroy(b->handle);
    free(b);
}

/* --- choosing --------------------------------------------------------------------------------------------- */

struct layouts {
    cublasLtMatrixLayout_t x, out;
};

static void layouts_done(struct layouts *l)
{
    if (l->x)
        cublasLtMatrixLayoutDestroy(l->x);
    if (l->out)
        cublasLtMatrixLayoutDestroy(l->out);
}

static bool layouts_init(struct layouts *l, const struct linear_blas_plan *p, int64_t rows, int64_t x_stride, int64_t out_stride)
{
    *l = (struct layouts){0};
    if (cublasLtMatrixLayoutCreate(&l->x, p->type, (uint64_t)p->depth, (uint64_t)rows, x_stride) == CUBLAS_STATUS_SUCCESS &&
        cublasLtMatrixLayoutCreate(&l->out, CUDA_R_16BF, (uint64_t)p->n, (uint64_t)rows, out_stride) == CUBLAS_STATUS_SUCCESS)
        return true;
    layouts_done(l);
    return false;
}

static bool serves(const struct linear_blas_plan *p, const cublasLtMatmulAlgo_t *a, int64_t rows)
{
    struct layouts l;
    cublasLtMatmulHeuristicResult_t result;
    if (!layouts_init(&l, p, rows, p->depth, p->n))
        return false;
    bool ok = cublasLtMatmulAlgoCheck(p->blas->handle, p->blas->product, p->weight, l.x, l.out, l.out, a, &result) ==
                  CUBLAS_STATUS_SUCCESS &&
              result.workspaceSize <= WORKSPACE_BYTES;
    layouts_done(&l);
    return ok;
}

static bool sums_in_one_go(const cublasLtMatmulAlgo_t *a)
{
    int32_t splits = 0;
    uint32_t scheme = 0;
    size_t written;
    if (cublasLtMatmulAlgoConfigGetAttribute(a, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &splits, sizeof splits, &written) ||
        cublasLtMatmulAlgoConfigGetAttribute(a, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &scheme, sizeof scheme, &written))
        return false;
    return splits <= 1 && scheme == CUBLASLT_REDUCTION_SCHEME_NONE;
}

/* False: no algorithm fits, or the library failed, which is kept in the kern. */
static bool choose(struct linear_blas_plan *p)
{
    struct linear_blas *b = p->blas;
    struct layouts l;
    cublasLtMatmulHeuristicResult_t answers[ANSWERS];
    int count = 0;
    if (!layouts_init(&l, p, ROWS_TYPICAL, p->depth, p->n))
        return false;
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(b->handle, b->product, p->weight, l.x, l.out, l.out, b->wishes,
                                                           ANSWERS, answers, &count);
    layouts_done(&l);
    if (status != CUBLAS_STATUS_SUCCESS && status != CUBLAS_STATUS_NOT_SUPPORTED)
        kern_ops_fail(b->kern, "device failed: cuBLASLt names no algorithm (status %d)", (int)status);
    for (int i = 0; status == CUBLAS_STATUS_SUCCESS && i < count; i++) {
        bool ok = answers[i].state == CUBLAS_STATUS_SUCCESS && sums_in_one_go(&answers[i].algo);
        for (size_t r = 0; ok && r < sizeof rows_checked / sizeof rows_checked[0]; r++)
            ok = serves(p, &answers[i].algo, rows_checked[r]);
        if (ok) {
            p->algorithm = answers[i].algo;
            return true;
        }
    }
    return false;
}

struct linear_blas_plan *linear_blas_plan_new(struct linear_blas *b, int64_t n, int64_t depth, bool is_fp8)
{
    if (!b || n % 8)
        return NULL;
    struct linear_blas_plan *p = calloc(1, sizeof *p);
    if (!p) {
        kern_ops_fail(b->kern, "no memory for the plan of a product");
        return NULL;
    }
    *p = (struct linear_blas_plan){.blas = b, .n = n, .depth = depth, .type = is_fp8 ? CUDA_R_8F_E4M3 : CUDA_R_16BF};
    cuda_stream(b->kern); /* the library asks about the thread's device */
    if (cublasLtMatrixLayoutCreate(&p->weight, p->type, (uint64_t)depth, (uint64_t)n, depth) == CUBLAS_STATUS_SUCCESS &&
        choose(p))
        return p;
    linear_blas_plan_free(p);
    return NULL;
}

void linear_blas_plan_free(struct linear_blas_plan *p)
{
    if (!p)
        return;
    if (p->weight)
        cublasLtMatrixLayoutDestroy(p->weight);
    free(p);
}

bool linear_blas_is_fp8(const struct linear_blas_plan *p)
{
    return p && p->type == CUDA_R_8F_E4M3;
}

/* --- multiplying ------------------------------------------------------------------------------------------- */

void linear_blas_apply(struct kern *k, const struct linear_blas_plan *p, struct tensor out, struct tensor x, const void *weight, float scale)
{
    const float zero = 0;
    struct linear_blas *b = p->blas;
    struct layouts l;
    cudaStream_t stream = cuda_stream(k);
    if (!layouts_init(&l, p, x.shape[0], x.stride[0], out.stride[0])) {
        kern_ops_fail(k, "no memory for the layout of a product");
        return;
    }
    cublasStatus_t status = cublasLtMatmul(b->handle, b->product, &scale, weight, p->weight, x.data, l.x, &zero, out.data, l.out,
                                           out.data, l.out, &p->algorithm, b->workspace, WORKSPACE_BYTES, stream);
    layouts_done(&l);
    if (status == CUBLAS_STATUS_SUCCESS)
        return;
    if (!cuda_check(k, cudaGetLastError(), "a product by cuBLASLt"))
        return;
    /* Another algorithm would give other bits than for other numbers of rows. */
    kern_ops_fail(k, "device failed: cuBLASLt refuses a product of %lld rows, %lld to %lld wide (status %d); KILN_CUDA_GEMM=own goes without it",
                  (long long)x.shape[0], (long long)p->depth, (long long)p->n, (int)status);
}
