/* tensor.h - a view of numbers: where they are, what they are, how they are laid out.
 *
 * A tensor never owns memory and is passed by value or const pointer. The last axis is always
 * contiguous (stride 1); the other strides are free, so that "columns 3h to 6h of every row" or
 * "head 5" is a view and not a copy. Nothing outside tensor.c and the kernels does pointer
 * arithmetic. Shape mistakes between engine and kernels are bugs, so they are asserted. */
#ifndef KILN_TENSOR_H
#define KILN_TENSOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TENSOR_RANK_MAX 4

enum tensor_dtype {
    TENSOR_F32,
    TENSOR_BF16, /* the upper 16 bits of an f32 */
    TENSOR_I32,
    TENSOR_U8,
};

struct tensor {
    void *data;
    enum tensor_dtype dtype;
    int rank;
    int64_t shape[TENSOR_RANK_MAX];
    int64_t stride[TENSOR_RANK_MAX]; /* in elements; stride[rank - 1] == 1 */
};

/* tensor_1d .. tensor_4d describe contiguous memory of the caller. */
struct tensor tensor_1d(void *data, enum tensor_dtype dtype, int64_t n0);
struct tensor tensor_2d(void *data, enum tensor_dtype dtype, int64_t n0, int64_t n1);
struct tensor tensor_3d(void *data, enum tensor_dtype dtype, int64_t n0, int64_t n1, int64_t n2);
struct tensor tensor_4d(void *data, enum tensor_dtype dtype, int64_t n0, int64_t n1, int64_t n2, int64_t n3);

/* tensor_of describes contiguous memory of any rank 1..4. */
struct tensor tensor_of(void *data, enum tensor_dtype dtype, int rank, const int64_t *shape);

/* tensor_slice is the part [first, first + count) of one axis. */
struct tensor tensor_slice(struct tensor t, int axis, int64_t first, int64_t count);

/* tensor_split sees [.., a * b] as [.., a, b]: width into heads x head size, for example. */
struct tensor tensor_split(struct tensor t, int64_t inner);

/* tensor_rows sees every leading axis as one: [.., width] -> [rows, width]. The leading axes must be
 * dense relative to each other (equal row stride). */
struct tensor tensor_rows(struct tensor t);

/* tensor_repeat sees a row [width] as every row of a tensor of this shape [.., width], to be read. */
struct tensor tensor_repeat(struct tensor row, int rank, const int64_t *shape);

/* tensor_shape sees a contiguous tensor under another shape with the same count. */
struct tensor tensor_shape(struct tensor t, int rank, const int64_t *shape);

int64_t tensor_count(struct tensor t);        /* elements */
size_t tensor_bytes(struct tensor t);         /* bytes of the elements, gaps not counted */
bool tensor_is_contiguous(struct tensor t);
bool tensor_same_shape(struct tensor a, struct tensor b);
size_t tensor_dtype_bytes(enum tensor_dtype dtype);
const char *tensor_dtype_name(enum tensor_dtype dtype); /* "f32", "bf16", "i32", "u8" */

/* tensor_convert: out = x, both in host memory; same shape, any strides, equal dtypes or f32 <-> bf16. */
void tensor_convert(struct tensor out, struct tensor x);

/* tensor_bf16_of rounds to nearest even, NaN stays NaN; tensor_f32_of is exact. */
static inline float tensor_f32_of(uint16_t b)
{
    union { uint32_t u; float f; } v = {.u = (uint32_t)b << 16};
    return v.f;
}
static inline uint16_t tensor_bf16_of(float f)
{
    union { float f; uint32_t u; } v = {.f = f};
    if ((v.u & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)((v.u >> 16) | 0x40u);
    return (uint16_t)((v.u + 0x7fffu + ((v.u >> 16) & 1u)) >> 16);
}

#endif
