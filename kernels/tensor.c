/* tensor.c - views; the only place outside the kernels that computes addresses. */
#include "tensor.h"

#include <assert.h>
#include <string.h>

struct tensor tensor_of(void *data, enum tensor_dtype dtype, int rank, const int64_t *shape)
{
    assert(rank >= 1 && rank <= TENSOR_RANK_MAX);
    struct tensor t = {.data = data, .dtype = dtype, .rank = rank};
    int64_t stride = 1;
    for (int a = rank - 1; a >= 0; a--) {
        assert(shape[a] >= 0);
        t.shape[a] = shape[a];
        t.stride[a] = stride;
        stride *= shape[a];
    }
    return t;
}

struct tensor tensor_1d(void *data, enum tensor_dtype dtype, int64_t n0)
{
    return tensor_of(data, dtype, 1, (int64_t[]){n0});
}

struct tensor tensor_2d(void *data, enum tensor_dtype dtype, int64_t n0, int64_t n1)
{
    return tensor_of(data, dtype, 2, (int64_t[]){n0, n1});
}

struct tensor tensor_3d(void *data, enum tensor_dtype dtype, int64_t n0, int64_t n1, int64_t n2)
{
    return tensor_of(data, dtype, 3, (int64_t[]){n0, n1, n2});
}

struct tensor tensor_4d(void *data, enum tensor_dtype dtype, int64_t n0, int64_t n1, int64_t n2,
                        int64_t n3)
{
    return tensor_of(data, dtype, 4, (int64_t[]){n0, n1, n2, n3});
}

struct tensor tensor_slice(struct tensor t, int axis, int64_t first, int64_t count)
{
    assert(axis >= 0 && axis < t.rank);
    assert(first >= 0 && count >= 0 && first + count <= t.shape[axis]);
    if (t.data)
        t.data = (char *)t.data + (size_t)(first * t.stride[axis]) * tensor_dtype_bytes(t.dtype);
    t.shape[axis] = count;
    return t;
}

struct tensor tensor_split(struct tensor t, int64_t inner)
{
    assert(t.rank < TENSOR_RANK_MAX);
    int a = t.rank - 1;
    assert(inner > 0 && t.shape[a] % inner == 0);
    t.shape[a + 1] = inner;
    t.stride[a + 1] = 1;
    t.shape[a] /= inner;
    t.stride[a] = inner;
    t.rank++;
    return t;
}

struct tensor tensor_rows(struct tensor t)
{
    if (t.rank == 1)
        return tensor_of(t.data, t.dtype, 2, (int64_t[]){1, t.shape[0]});
    int64_t rows = t.shape[t.rank - 2];
    for (int a = t.rank - 3; a >= 0; a--) {
        assert(t.shape[a] == 1 || t.stride[a] == t.stride[a + 1] * t.shape[a + 1]);
        rows *= t.shape[a];
    }
    struct tensor r = tensor_of(t.data, t.dtype, 2, (int64_t[]){rows, t.shape[t.rank - 1]});
    r.stride[0] = t.stride[t.rank - 2];
    return r;
}

struct tensor tensor_repeat(struct tensor row, int rank, const int64_t *shape)
{
    struct tensor t = tensor_of(row.data, row.dtype, rank, shape);
    assert(row.rank == 1);
    assert(row.shape[0] == shape[rank - 1]);
    for (int a = 0; a < rank - 1; a++)
        t.stride[a] = 0;
    return t;
}

struct tensor tensor_shape(struct tensor t, int rank, const int64_t *shape)
{
    assert(tensor_is_contiguous(t));
    struct tensor r = tensor_of(t.data, t.dtype, rank, shape);
    assert(tensor_count(r) == tensor_count(t));
    return r;
}

int64_t tensor_count(struct tensor t)
{
    int64_t count = 1;
    for (int a = 0; a < t.rank; a++)
        count *= t.shape[a];
    return count;
}

size_t tensor_bytes(struct tensor t)
{
    return (size_t)tensor_count(t) * tensor_dtype_bytes(t.dtype);
}

bool tensor_is_contiguous(struct tensor t)
{
    int64_t stride = 1;
    for (int a = t.rank - 1; a >= 0; a--) {
        if (t.shape[a] != 1 && t.stride[a] != stride)
            return false;
        stride *= t.shape[a];
    }
    return true;
}

bool tensor_same_shape(struct tensor a, struct tensor b)
{
    if (a.rank != b.rank)
        return false;
    for (int i = 0; i < a.rank; i++)
        if (a.shape[i] != b.shape[i])
            return false;
    return true;
}

/* `from` may be a file's mapping, which promises no alignment. */
static void convert_row(void *to, enum tensor_dtype to_dtype, const void *from, enum tensor_dtype dtype, int64_t count)
{
    if (to_dtype == dtype) {
        memcpy(to, from, (size_t)count * tensor_dtype_bytes(dtype));
    } else if (dtype == TENSOR_F32) {
        assert(to_dtype == TENSOR_BF16);
        for (int64_t i = 0; i < count; i++) {
            float value;
            memcpy(&value, (const char *)from + 4 * i, 4);
            ((uint16_t *)to)[i] = tensor_bf16_of(value);
        }
    } else {
        assert(dtype == TENSOR_BF16 && to_dtype == TENSOR_F32);
        for (int64_t i = 0; i < count; i++) {
            uint16_t value;
            memcpy(&value, (const char *)from + 2 * i, 2);
            ((float *)to)[i] = tensor_f32_of(value);
        }
    }
}

void tensor_convert(struct tensor out, struct tensor x)
{
    int64_t width = x.shape[x.rank - 1], rows = width ? tensor_count(x) / width : 0;
    size_t out_size = tensor_dtype_bytes(out.dtype), size = tensor_dtype_bytes(x.dtype);
    assert(tensor_same_shape(out, x));
    for (int64_t r = 0; r < rows; r++) {
        int64_t to = 0, from = 0, rest = r;
        for (int a = x.rank - 2; a >= 0; a--) {
            to += rest % x.shape[a] * out.stride[a];
            from += rest % x.shape[a] * x.stride[a];
            rest /= x.shape[a];
        }
        convert_row((char *)out.data + (size_t)to * out_size, out.dtype, (char *)x.data + (size_t)from * size, x.dtype, width);
    }
}

size_t tensor_dtype_bytes(enum tensor_dtype dtype)
{
    switch (dtype) {
    case TENSOR_F32:
    case TENSOR_I32:
        return 4;
    case TENSOR_BF16:
        return 2;
    case TENSOR_U8:
        return 1;
    }
    assert(!"a dtype of the enum");
    return 0;
}

const char *tensor_dtype_name(enum tensor_dtype dtype)
{
    static const char *const names[] = {"f32", "bf16", "i32", "u8"};
    return names[dtype];
}
