/* product.h - the matrix product behind cublasLtMatmul, in f32, with a fixed order of summation. */
#ifndef CUDASIM_PRODUCT_H
#define CUDASIM_PRODUCT_H

#include <library_types.h>

#include <cstddef>
#include <cstdint>

namespace cudasim
{

/* A column-major matrix: element (r, c) is number c * stride + r. */
struct Matrix {
    const void *data;
    cudaDataType_t type;
    size_t stride;
    bool is_transposed;
};

size_t type_bytes(cudaDataType_t type); /* 0: not a type of this file */
float type_load(const void *data, cudaDataType_t type, size_t index);
void type_store(void *data, cudaDataType_t type, size_t index, float value);

/* product: out[c * m + r] = sum over i of op(a)(r, i) * op(b)(i, c), for i from 0 to k - 1 in `splits` runs that are
 * summed apart and then added, first to last. Each element's sum is in ascending order, whatever m and n are.
 * round_tf32: inputs are rounded to 10 bits of mantissa first. */
void product(float *out, const Matrix &a, const Matrix &b, size_t m, size_t n, size_t k, int splits, bool round_tf32);

} // namespace cudasim

#endif
