/* blas_lt.cpp - cublasLtMatmul and what belongs to it, over product.cpp.
 *
 * Stricter than the library where a mistake would only be slow or lucky there: every operand must lie inside one
 * allocation of the stream's device, also in dry mode; 16-byte alignment unless the preferences allowed less.
 * As the library, and on purpose: the heuristic's first answer depends on the shape, n included, and its algorithms
 * differ in their order of summation. So a program whose results may not depend on the batch is seen to choose its
 * algorithm once per weight, or not to.
 *
 *   algorithm 0   one sum over k            no workspace
 *   algorithm 1   two sums, added           m * n * 8 bytes of workspace; needs k >= 256
 *   algorithm 2   four sums, added          m * n * 16 bytes of workspace; needs k >= 1024
 * The heuristic prefers more sums when there are few results (m * n small) and the workspace allows it. */
#include <cublasLt.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "device.h"
#include "inject.h"
#include "product.h"
#include "stream.h"

using namespace cudasim;

namespace
{

struct Operation {
    int32_t compute, scale_type;
    int32_t pointer_mode = CUBLASLT_POINTER_MODE_HOST;
    int32_t trans_a = CUBLAS_OP_N, trans_b = CUBLAS_OP_N;
    uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    const void *bias = nullptr;
    int32_t bias_type = -1;
    int64_t bias_stride = 0;
    const float *a_scale = nullptr, *b_scale = nullptr, *d_scale = nullptr;
    int32_t a_mode = CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F, b_mode = CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F;
    int8_t fast_accumulation = 0;
    int32_t sm_count_target = 0;
};

struct Layout {
    int32_t type;
    uint64_t rows, columns;
    int64_t stride;
    int32_t order = CUBLASLT_ORDER_COL;
    int32_t batch_count = 1;
    int64_t batch_stride = 0;
};

struct Preference {
    uint64_t workspace_bytes = 0;
    uint32_t alignment[4] = {256, 256, 256, 256}; /* a, b, c, d */
    uint32_t search_mode = 0, reduction_mask = ~0u;
    float waves = 0;
    uint64_t implementations = ~uint64_t{0};
};

/* What cublasLtMatmulAlgo_t holds. A copy of it may be kept as long as the program likes. */
struct Algorithm {
    uint32_t magic;
    int32_t id;
    int32_t a_type, b_type, c_type, d_type, compute;
    uint32_t alignment;
};
static_assert(sizeof(Algorithm) <= sizeof(cublasLtMatmulAlgo_t), "an algorithm fits the library's struct");
constexpr uint32_t MAGIC = 0x6b73616cu;
enum { ALGORITHM_COUNT = 3 };

struct Problem {
    Operation op;
    Layout a, b, c, d;
    uint64_t m, n, k;
};

cublasStatus_t no(cublasStatus_t status, const std::string &sentence)
{
    error_note("cublasLtMatmul: " + sentence);
    return status;
}

bool is_fp8(int32_t type)
{
    return type == CUDA_R_8F_E4M3 || type == CUDA_R_8F_E5M2;
}

size_t bytes_of(int32_t type)
{
    return type_bytes(static_cast<cudaDataType_t>(type));
}

std::string shape_text(const Problem &p)
{
    return "m " + std::to_string(p.m) + ", n " + std::to_string(p.n) + ", k " + std::to_string(p.k);
}

/* --- what is supported ------------------------------------------------------------------------------------------------- */

cublasStatus_t check_types(const Problem &p)
{
    int compute = p.op.compute;
    if (p.op.scale_type != CUDA_R_32F ||
        (compute != CUBLAS_COMPUTE_32F && compute != CUBLAS_COMPUTE_32F_FAST_TF32 && compute != CUBLAS_COMPUTE_32F_PEDANTIC))
        return no(CUBLAS_STATUS_NOT_SUPPORTED, "the simulator computes in f32 (or tf32) with f32 scales only");
    for (int32_t type : {p.a.type, p.b.type, p.c.type, p.d.type})
        if (!bytes_of(type))
            return no(CUBLAS_STATUS_NOT_SUPPORTED, "a data type that is not simulated: " + std::to_string(type));
    if (!is_fp8(p.a.type) && !is_fp8(p.b.type)) {
        bool is_ok = p.a.type == p.b.type && p.c.type == p.d.type && (p.d.type == p.a.type || p.d.type == CUDA_R_32F);
        return is_ok ? CUBLAS_STATUS_SUCCESS
                     : no(CUBLAS_STATUS_NOT_SUPPORTED, "a and b must have one type, d the same or f32, c as d");
    }
    const Profile *profile = device_current()->profile;
    if (profile->major * 10 + profile->minor < 89)
        return no(CUBLAS_STATUS_NOT_SUPPORTED, std::string("fp8 needs compute capability 8.9, ") + profile->name + " has " +
                                                   std::to_string(profile->major) + "." + std::to_string(profile->minor));
    if (!is_fp8(p.a.type) || !is_fp8(p.b.type) || (p.a.type == CUDA_R_8F_E5M2 && p.b.type == CUDA_R_8F_E5M2))
        return no(CUBLAS_STATUS_NOT_SUPPORTED, "fp8: both a and b, and at most one of them e5m2");
    if (p.op.trans_a != CUBLAS_OP_T || p.op.trans_b != CUBLAS_OP_N)
        return no(CUBLAS_STATUS_NOT_SUPPORTED, "fp8: a transposed, b not");
    if (p.m % 16 || p.k % 16)
        return no(CUBLAS_STATUS_NOT_SUPPORTED, "fp8: m and k must be multiples of 16: " + shape_text(p));
    if (is_fp8(p.c.type) || (!is_fp8(p.d.type) && p.c.type != p.d.type))
        return no(CUBLAS_STATUS_NOT_SUPPORTED, "fp8: c must be bf16, f16 or f32, and as d unless that is fp8");
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t check_scales(const Problem &p)
{
    for (int32_t mode : {p.op.a_mode, p.op.b_mode}) {
        if (mode == CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F)
            continue;
        if (mode != CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F || device_current()->profile->major != 9)
            return no(CUBLAS_STATUS_NOT_SUPPORTED, "scale mode " + std::to_string(mode) +
                                                       ": scalars everywhere, outer vectors on compute capability 9.0");
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t check_layout(const char *name, const Layout &l)
{
    if (l.order != CUBLASLT_ORDER_COL)
        return no(CUBLAS_STATUS_NOT_SUPPORTED, std::string(name) + ": the simulator knows column-major order only");
    if (l.stride < static_cast<int64_t>(l.rows) || !l.rows || !l.columns || l.batch_count < 1)
        return no(CUBLAS_STATUS_INVALID_VALUE, std::string(name) + ": " + std::to_string(l.rows) + " rows, " +
                                                   std::to_string(l.columns) + " columns, leading dimension " +
                                                   std::to_string(l.stride));
    if (bytes_of(l.type) < 4 && is_fp8(l.type) && l.stride % 16)
        return no(CUBLAS_STATUS_NOT_SUPPORTED, std::string(name) + ": fp8 wants leading dimensions of whole 16 bytes");
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t check_epilogue(const Problem &p)
{
    uint32_t known = CUBLASLT_EPILOGUE_RELU | CUBLASLT_EPILOGUE_BIAS | CUBLASLT_EPILOGUE_GELU;
    uint32_t e = p.op.epilogue;
    if (e != CUBLASLT_EPILOGUE_DEFAULT && ((e & ~known) || (e & CUBLASLT_EPILOGUE_RELU && e & CUBLASLT_EPILOGUE_GELU)))
        return no(CUBLAS_STATUS_NOT_SUPPORTED, "epilogue " + std::to_string(e) + " is not simulated");
    if (e == (CUBLASLT_EPILOGUE_DEFAULT | CUBLASLT_EPILOGUE_BIAS))
        return no(CUBLAS_STATUS_INVALID_VALUE, "epilogue 5");
    if (p.op.bias_type >= 0 && !bytes_of(p.op.bias_type))
        return no(CUBLAS_STATUS_NOT_SUPPORTED, "bias type " + std::to_string(p.op.bias_type));
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t make_problem(Problem *p, const Operation *op, const Layout *a, const Layout *b, const Layout *c,
                            const Layout *d)
{
    if (!op || !a || !b || !c || !d)
        return CUBLAS_STATUS_INVALID_VALUE;
    *p = {*op, *a, *b, *c, *d, 0, 0, 0};
    p->m = op->trans_a == CUBLAS_OP_N ? a->rows : a->columns;
    p->k = op->trans_a == CUBLAS_OP_N ? a->columns : a->rows;
    p->n = op->trans_b == CUBLAS_OP_N ? b->columns : b->rows;
    uint64_t k = op->trans_b == CUBLAS_OP_N ? b->rows : b->columns;
    if (k != p->k || d->rows != p->m || d->columns != p->n || c->rows != p->m || c->columns != p->n)
        return no(CUBLAS_STATUS_INVALID_VALUE, "shapes do not fit: " + shape_text(*p) + ", b has k " + std::to_string(k) +
                                                   ", d is " + std::to_string(d->rows) + " x " + std::to_string(d->columns));
    if (a->batch_count != d->batch_count || b->batch_count != d->batch_count || c->batch_count != d->batch_count)
        return no(CUBLAS_STATUS_INVALID_VALUE, "batch counts differ");
    cublasStatus_t s;
    if ((s = check_layout("a", p->a)) || (s = check_layout("b", p->b)) || (s = check_layout("c", p->c)) ||
        (s = check_layout("d", p->d)) || (s = check_types(*p)) || (s = check_scales(*p)) || (s = check_epilogue(*p)))
        return s;
    return CUBLAS_STATUS_SUCCESS;
}

/* --- algorithms --------------------------------------------------------------------------------------------------------- */

int splits_of(int id)
{
    return 1 << id;
}

size_t workspace_of(const Problem &p, int id)
{
    return id ? p.m * p.n * 4 * static_cast<size_t>(splits_of(id)) : 0;
}

bool can_run(const Problem &p, int id)
{
    static const uint64_t least_k[ALGORITHM_COUNT] = {0, 256, 1024};
    return id >= 0 && id < ALGORITHM_COUNT && p.k >= least_k[id];
}

Algorithm make_algorithm(const Problem &p, int id, uint32_t alignment)
{
    return {MAGIC, id, p.a.type, p.b.type, p.c.type, p.d.type, p.op.compute, alignment};
}

/* preferred: best first. Few results leave most of a GPU idle, so k is split. */
std::vector<int> preferred(const Problem &p)
{
    if (p.m * p.n * static_cast<uint64_t>(p.d.batch_count) <= 128 * 128)
        return {2, 1, 0};
    if (p.m * p.n * static_cast<uint64_t>(p.d.batch_count) <= 512 * 512)
        return {1, 0, 2};
    return {0, 1, 2};
}

bool fits(const Algorithm &algorithm, const Problem &p)
{
    return algorithm.magic == MAGIC && algorithm.a_type == p.a.type && algorithm.b_type == p.b.type &&
           algorithm.c_type == p.c.type && algorithm.d_type == p.d.type && algorithm.compute == p.op.compute &&
           can_run(p, algorithm.id);
}

/* --- running ------------------------------------------------------------------------------------------------------------ */

struct Operands {
    const char *a, *b, *c;
    char *d;
    float alpha, beta;
    const float *alpha_at, *beta_at; /* device pointer mode */
};

size_t layout_bytes(const Layout &l)
{
    int64_t elements = (l.batch_count - 1) * l.batch_stride + (static_cast<int64_t>(l.columns) - 1) * l.stride +
                       static_cast<int64_t>(l.rows);
    return static_cast<size_t>(elements) * bytes_of(l.type);
}

cublasStatus_t check_memory(const char *name, const void *p, size_t bytes, uint32_t alignment, int device)
{
    if (reinterpret_cast<uintptr_t>(p) % alignment)
        return no(CUBLAS_STATUS_NOT_SUPPORTED, std::string(name) + " is not aligned to " + std::to_string(alignment) +
                                                   " bytes (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_*)");
    Device *d = device_of(p);
    if (!d || d->index != device || !device_holds(d, p, bytes))
        return no(CUBLAS_STATUS_INVALID_VALUE, std::string(name) + " of " + std::to_string(bytes) +
                                                   " bytes is not inside one allocation of device " +
                                                   std::to_string(device) + ": " + device_describe(p));
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t check_operands(const Problem &p, const Operands &o, bool has_c, uint32_t alignment, int device)
{
    cublasStatus_t s;
    if ((s = check_memory("a", o.a, layout_bytes(p.a), alignment, device)) ||
        (s = check_memory("b", o.b, layout_bytes(p.b), alignment, device)) ||
        (s = check_memory("d", o.d, layout_bytes(p.d), alignment, device)) ||
        (has_c && (s = check_memory("c", o.c, layout_bytes(p.c), alignment, device))))
        return s;
    if (p.op.epilogue & CUBLASLT_EPILOGUE_BIAS) {
        size_t bytes = bytes_of(p.op.bias_type >= 0 ? p.op.bias_type : p.d.type);
        if ((s = check_memory("bias", p.op.bias, p.m * bytes, static_cast<uint32_t>(bytes), device)))
            return s;
    }
    bool a_outer = p.op.a_mode == CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    bool b_outer = p.op.b_mode == CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    if ((p.op.a_scale && (s = check_memory("a's scale", p.op.a_scale, a_outer ? p.m * 4 : 4, 4, device))) ||
        (p.op.b_scale && (s = check_memory("b's scale", p.op.b_scale, b_outer ? p.n * 4 : 4, 4, device))) ||
        (p.op.d_scale && (s = check_memory("d's scale", p.op.d_scale, 4, 4, device))))
        return s;
    return CUBLAS_STATUS_SUCCESS;
}

/* GELU as the library documents it: by tanh. */
float gelu(float x)
{
    return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

float finish(const Problem &p, float x, uint64_t row, size_t batch)
{
    const Operation &op = p.op;
    if (op.epilogue & CUBLASLT_EPILOGUE_BIAS)
        x += type_load(op.bias, static_cast<cudaDataType_t>(op.bias_type >= 0 ? op.bias_type : p.d.type),
                       row + batch * static_cast<size_t>(op.bias_stride));
    if (op.epilogue & CUBLASLT_EPILOGUE_GELU)
        x = gelu(x);
    if (op.epilogue & CUBLASLT_EPILOGUE_RELU)
        x = x > 0 ? x : 0;
    return x;
}

void multiply_batch(const Problem &p, const Operands &o, int splits, size_t batch)
{
    auto at = [batch](const char *base, const Layout &l) {
        return base + static_cast<int64_t>(batch) * l.batch_stride * static_cast<int64_t>(bytes_of(l.type));
    };
    Matrix a = {at(o.a, p.a), static_cast<cudaDataType_t>(p.a.type), static_cast<size_t>(p.a.stride),
                p.op.trans_a != CUBLAS_OP_N};
    Matrix b = {at(o.b, p.b), static_cast<cudaDataType_t>(p.b.type), static_cast<size_t>(p.b.stride),
                p.op.trans_b != CUBLAS_OP_N};
    std::vector<float> sums(p.m * p.n);
    product(sums.data(), a, b, p.m, p.n, p.k, splits, p.op.compute == CUBLAS_COMPUTE_32F_FAST_TF32);

    const char *c = o.c ? at(o.c, p.c) : nullptr;
    char *d = const_cast<char *>(at(o.d, p.d));
    float alpha = o.alpha_at ? *o.alpha_at : o.alpha, beta = o.beta_at ? *o.beta_at : o.beta;
    bool a_outer = p.op.a_mode == CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    bool b_outer = p.op.b_mode == CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    for (uint64_t col = 0; col < p.n; col++)
        for (uint64_t row = 0; row < p.m; row++) {
            float x = alpha * sums[col * p.m + row];
            if (p.op.a_scale)
                x *= p.op.a_scale[a_outer ? row : 0];
            if (p.op.b_scale)
                x *= p.op.b_scale[b_outer ? col : 0];
            if (beta != 0)
                x += beta * type_load(c, static_cast<cudaDataType_t>(p.c.type), col * static_cast<size_t>(p.c.stride) + row);
            x = finish(p, x, row, batch);
            if (p.op.d_scale)
                x *= *p.op.d_scale;
            type_store(d, static_cast<cudaDataType_t>(p.d.type), col * static_cast<size_t>(p.d.stride) + row, x);
        }
}

std::shared_ptr<Work> matmul_work(const Problem &p, const Operands &o, int id)
{
    auto work = std::make_shared<Work>();
    work->kind = Work::LIBRARY;
    double batch = p.d.batch_count, m = static_cast<double>(p.m), n = static_cast<double>(p.n), k = static_cast<double>(p.k);
    static const char *const names[] = {"f32", "f16", "bf16", "fp8"};
    int name = p.a.type == CUDA_R_32F ? 0 : p.a.type == CUDA_R_16F ? 1 : p.a.type == CUDA_R_16BF ? 2 : 3;
    work->name = std::string("cublasLtMatmul ") + names[name] + " " + std::to_string(p.m) + "x" + std::to_string(p.n) + "x" +
                 std::to_string(p.k) + (p.d.batch_count > 1 ? " x" + std::to_string(p.d.batch_count) : "");
    work->cost.flops = 2 * m * n * k * batch;
    double c_bytes = o.c && o.beta != 0 ? m * n * static_cast<double>(bytes_of(p.c.type)) : 0;
    work->cost.bytes = batch * (m * k * static_cast<double>(bytes_of(p.a.type)) + k * n * static_cast<double>(bytes_of(p.b.type)) +
                                m * n * static_cast<double>(bytes_of(p.d.type)) + c_bytes);
    work->cost.is_tensor_core = p.a.type != CUDA_R_32F || p.op.compute == CUBLAS_COMPUTE_32F_FAST_TF32;
    work->cost.is_fp8 = is_fp8(p.a.type);
    work->run = [p, o, id] {
        for (size_t batch_index = 0; batch_index < static_cast<size_t>(p.d.batch_count); batch_index++)
            multiply_batch(p, o, splits_of(id), batch_index);
    };
    return work;
}

/* enter as a library call: what cublas makes of a device's error. */
cublasStatus_t enter_library(const char *function)
{
    cudaError_t e = enter(Point::BLAS, function);
    if (!e)
        return CUBLAS_STATUS_SUCCESS;
    Device *d = device_current();
    return d && !d->failed ? CUBLAS_STATUS_INTERNAL_ERROR : d ? CUBLAS_STATUS_EXECUTION_FAILED : CUBLAS_STATUS_NOT_INITIALIZED;
}

template <class T> cublasStatus_t copy_attribute(T *to, const void *from, size_t bytes)
{
    if (!from || bytes != sizeof *to)
        return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(static_cast<void *>(to), from, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

} // namespace

extern "C" {

size_t cublasLtGetVersion(void)
{
    return CUBLAS_VER_MAJOR * 10000 + CUBLAS_VER_MINOR * 100 + CUBLAS_VER_PATCH;
}

const char *cublasLtGetStatusString(cublasStatus_t status)
{
    switch (status) {
    case CUBLAS_STATUS_SUCCESS:
        return "the operation completed successfully";
    case CUBLAS_STATUS_NOT_INITIALIZED:
        return "the library was not initialized";
    case CUBLAS_STATUS_ALLOC_FAILED:
        return "the resource allocation failed";
    case CUBLAS_STATUS_INVALID_VALUE:
        return "an invalid value was used as an argument";
    case CUBLAS_STATUS_EXECUTION_FAILED:
        return "the function failed to launch on the GPU";
    case CUBLAS_STATUS_INTERNAL_ERROR:
        return "an internal operation failed";
    case CUBLAS_STATUS_NOT_SUPPORTED:
        return "the functionality is not supported";
    default:
        return "unknown error";
    }
}

const char *cublasLtGetStatusName(cublasStatus_t status)
{
    return cublasLtGetStatusString(status);
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle)
{
    if (cublasStatus_t s = enter_library("cublasLtCreate"))
        return s;
    *handle = reinterpret_cast<cublasLtHandle_t>(new int(0));
    ledger_open(Thing::HANDLE);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle)
{
    ledger_count_call();
    delete reinterpret_cast<int *>(handle);
    ledger_close(Thing::HANDLE);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *desc, cublasComputeType_t compute, cudaDataType_t scale_type)
{
    Operation *op = new Operation();
    op->compute = compute;
    op->scale_type = scale_type;
    *desc = reinterpret_cast<cublasLtMatmulDesc_t>(op);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc)
{
    delete reinterpret_cast<Operation *>(desc);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute,
                                              const void *value, size_t bytes)
{
    Operation *op = reinterpret_cast<Operation *>(desc);
    switch (attribute) {
    case CUBLASLT_MATMUL_DESC_POINTER_MODE:
        if (cublasStatus_t s = copy_attribute(&op->pointer_mode, value, bytes))
            return s;
        return op->pointer_mode <= CUBLASLT_POINTER_MODE_DEVICE ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
    case CUBLASLT_MATMUL_DESC_TRANSA:
        return copy_attribute(&op->trans_a, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB:
        return copy_attribute(&op->trans_b, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
        return copy_attribute(&op->epilogue, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
        return copy_attribute(&op->bias, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE:
        return copy_attribute(&op->bias_type, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE:
        return copy_attribute(&op->bias_stride, value, bytes);
    case CUBLASLT_MATMUL_DESC_A_SCALE_POINTER:
        return copy_attribute(&op->a_scale, value, bytes);
    case CUBLASLT_MATMUL_DESC_B_SCALE_POINTER:
        return copy_attribute(&op->b_scale, value, bytes);
    case CUBLASLT_MATMUL_DESC_D_SCALE_POINTER:
        return copy_attribute(&op->d_scale, value, bytes);
    case CUBLASLT_MATMUL_DESC_A_SCALE_MODE:
        return copy_attribute(&op->a_mode, value, bytes);
    case CUBLASLT_MATMUL_DESC_B_SCALE_MODE:
        return copy_attribute(&op->b_mode, value, bytes);
    case CUBLASLT_MATMUL_DESC_FAST_ACCUM:
        return copy_attribute(&op->fast_accumulation, value, bytes);
    case CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET:
        return copy_attribute(&op->sm_count_target, value, bytes);
    default:
        return no(CUBLAS_STATUS_NOT_SUPPORTED, "attribute " + std::to_string(attribute) + " of an operation is not simulated");
    }
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type, uint64_t rows, uint64_t columns,
                                          int64_t stride)
{
    Layout *l = new Layout();
    l->type = type;
    l->rows = rows;
    l->columns = columns;
    l->stride = stride;
    *layout = reinterpret_cast<cublasLtMatrixLayout_t>(l);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout)
{
    delete reinterpret_cast<Layout *>(layout);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t attribute,
                                                const void *value, size_t bytes)
{
    Layout *l = reinterpret_cast<Layout *>(layout);
    switch (attribute) {
    case CUBLASLT_MATRIX_LAYOUT_TYPE:
        return copy_attribute(&l->type, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_ORDER:
        return copy_attribute(&l->order, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_ROWS:
        return copy_attribute(&l->rows, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_COLS:
        return copy_attribute(&l->columns, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_LD:
        return copy_attribute(&l->stride, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT:
        return copy_attribute(&l->batch_count, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET:
        return copy_attribute(&l->batch_stride, value, bytes);
    default:
        return no(CUBLAS_STATUS_NOT_SUPPORTED, "attribute " + std::to_string(attribute) + " of a layout is not simulated");
    }
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference)
{
    *preference = reinterpret_cast<cublasLtMatmulPreference_t>(new Preference());
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference)
{
    delete reinterpret_cast<Preference *>(preference);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, const void *value,
                                                    size_t bytes)
{
    Preference *p = reinterpret_cast<Preference *>(preference);
    switch (attribute) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
        return copy_attribute(&p->workspace_bytes, value, bytes);
    case CUBLASLT_MATMUL_PREF_SEARCH_MODE:
        return copy_attribute(&p->search_mode, value, bytes);
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK:
        return copy_attribute(&p->reduction_mask, value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
        return copy_attribute(&p->alignment[0], value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
        return copy_attribute(&p->alignment[1], value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES:
        return copy_attribute(&p->alignment[2], value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES:
        return copy_attribute(&p->alignment[3], value, bytes);
    case CUBLASLT_MATMUL_PREF_MAX_WAVES_COUNT:
        return copy_attribute(&p->waves, value, bytes);
    case CUBLASLT_MATMUL_PREF_IMPL_MASK:
        return copy_attribute(&p->implementations, value, bytes);
    default:
        return no(CUBLAS_STATUS_NOT_SUPPORTED, "preference " + std::to_string(attribute) + " is not simulated");
    }
}

/* Reduction scheme mask 0 forbids split sums, as the library's documentation says. */
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
                                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t results[], int *found)
{
    *found = 0;
    if (cublasStatus_t s = enter_library("cublasLtMatmulAlgoGetHeuristic"))
        return s;
    Problem p;
    if (cublasStatus_t s = make_problem(&p, reinterpret_cast<Operation *>(desc), reinterpret_cast<Layout *>(a),
                                        reinterpret_cast<Layout *>(b), reinterpret_cast<Layout *>(c),
                                        reinterpret_cast<Layout *>(d)))
        return s;
    const Preference *pref = reinterpret_cast<Preference *>(preference);
    uint32_t alignment = 16;
    for (uint32_t promised : pref->alignment)
        alignment = promised < alignment ? promised : alignment;
    for (int id : preferred(p)) {
        size_t workspace = workspace_of(p, id);
        if (*found >= wanted || !can_run(p, id) || workspace > pref->workspace_bytes || (id && !pref->reduction_mask))
            continue;
        cublasLtMatmulHeuristicResult_t *r = &results[(*found)++];
        *r = cublasLtMatmulHeuristicResult_t();
        Algorithm algorithm = make_algorithm(p, id, alignment);
        memcpy(&r->algo, &algorithm, sizeof algorithm);
        r->workspaceSize = workspace;
        r->wavesCount = 1.0f;
        r->state = CUBLAS_STATUS_SUCCESS;
    }
    return *found ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

cublasStatus_t cublasLtMatmulAlgoGetIds(cublasLtHandle_t, cublasComputeType_t, cudaDataType_t, cudaDataType_t, cudaDataType_t,
                                        cudaDataType_t, cudaDataType_t, int wanted, int ids[], int *found)
{
    *found = wanted < ALGORITHM_COUNT ? wanted : static_cast<int>(ALGORITHM_COUNT);
    for (int i = 0; i < *found; i++)
        ids[i] = i;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoInit(cublasLtHandle_t, cublasComputeType_t compute, cudaDataType_t, cudaDataType_t a,
                                      cudaDataType_t b, cudaDataType_t c, cudaDataType_t d, int id, cublasLtMatmulAlgo_t *algo)
{
    if (id < 0 || id >= ALGORITHM_COUNT)
        return no(CUBLAS_STATUS_INVALID_VALUE, "no algorithm " + std::to_string(id));
    Algorithm algorithm = {MAGIC, id, a, b, c, d, compute, 16};
    *algo = cublasLtMatmulAlgo_t();
    memcpy(algo, &algorithm, sizeof algorithm);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
                                       cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                       const cublasLtMatmulAlgo_t *algo, cublasLtMatmulHeuristicResult_t *result)
{
    Problem p;
    if (cublasStatus_t s = make_problem(&p, reinterpret_cast<Operation *>(desc), reinterpret_cast<Layout *>(a),
                                        reinterpret_cast<Layout *>(b), reinterpret_cast<Layout *>(c),
                                        reinterpret_cast<Layout *>(d)))
        return s;
    Algorithm algorithm;
    memcpy(&algorithm, algo, sizeof algorithm);
    if (!fits(algorithm, p))
        return no(CUBLAS_STATUS_NOT_SUPPORTED, "the algorithm does not fit these types or this k");
    *result = cublasLtMatmulHeuristicResult_t();
    result->algo = *algo;
    result->workspaceSize = workspace_of(p, algorithm.id);
    result->wavesCount = 1.0f;
    result->state = CUBLAS_STATUS_SUCCESS;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t *algo,
                                                    cublasLtMatmulAlgoConfigAttributes_t attribute, void *value, size_t bytes,
                                                    size_t *written)
{
    Algorithm algorithm;
    memcpy(&algorithm, algo, sizeof algorithm);
    int32_t answer = attribute == CUBLASLT_ALGO_CONFIG_ID ? algorithm.id
                     : attribute == CUBLASLT_ALGO_CONFIG_SPLITK_NUM ? splits_of(algorithm.id) : 0;
    if (algorithm.magic != MAGIC || bytes < 4)
        return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(value, &answer, 4);
    if (written)
        *written = 4;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void *alpha, const void *a,
                              cublasLtMatrixLayout_t a_layout, const void *b, cublasLtMatrixLayout_t b_layout,
                              const void *beta, const void *c, cublasLtMatrixLayout_t c_layout, void *d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t *algo, void *workspace,
                              size_t workspace_bytes, cudaStream_t handle_stream)
{
    if (cublasStatus_t s = enter_library("cublasLtMatmul"))
        return s;
    Problem p;
    if (cublasStatus_t s = make_problem(&p, reinterpret_cast<Operation *>(desc), reinterpret_cast<Layout *>(a_layout),
                                        reinterpret_cast<Layout *>(b_layout), reinterpret_cast<Layout *>(c_layout),
                                        reinterpret_cast<Layout *>(d_layout)))
        return s;
    if (!handle || !alpha || !beta)
        return CUBLAS_STATUS_INVALID_VALUE;
    Stream *stream = stream_find(handle_stream);
    Algorithm algorithm = make_algorithm(p, 0, 16);
    if (algo)
        memcpy(&algorithm, algo, sizeof algorithm);
    else /* as the library: the heuristic's first that fits the workspace */
        for (int id : preferred(p))
            if (can_run(p, id) && workspace_of(p, id) <= workspace_bytes) {
                algorithm.id = id;
                break;
            }
    if (!fits(algorithm, p))
        return no(CUBLAS_STATUS_NOT_SUPPORTED, "the algorithm does not fit these types or this k: " + shape_text(p));
    size_t needed = workspace_of(p, algorithm.id);
    if (needed > workspace_bytes)
        return no(CUBLAS_STATUS_INVALID_VALUE, "workspace of " + std::to_string(workspace_bytes) + " bytes, the algorithm needs " +
                                                   std::to_string(needed));
    if (needed)
        if (cublasStatus_t s = check_memory("workspace", workspace, needed, 16, stream->device))
            return s;

    bool is_host = p.op.pointer_mode == CUBLASLT_POINTER_MODE_HOST;
    const float *alpha_at = static_cast<const float *>(alpha), *beta_at = static_cast<const float *>(beta);
    Operands o = {static_cast<const char *>(a), static_cast<const char *>(b), static_cast<const char *>(c),
                  static_cast<char *>(d), is_host ? *alpha_at : 0, is_host ? *beta_at : 1,
                  is_host ? nullptr : alpha_at, is_host ? nullptr : beta_at};
    bool has_c = o.beta != 0;
    uint32_t alignment = is_fp8(p.a.type) ? 16 : algorithm.alignment;
    if (cublasStatus_t s = check_operands(p, o, has_c, alignment, stream->device))
        return s;
    return submit(stream, matmul_work(p, o, algorithm.id)) ? CUBLAS_STATUS_EXECUTION_FAILED : CUBLAS_STATUS_SUCCESS;
}

} /* extern "C" */
