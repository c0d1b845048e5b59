/* quant.c - what is known of a format without decoding it: sizes, places of scales, which bytes are no numbers. The
 * decoders are in dequant.c. */
#include "dequant.h"

#include <assert.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define K_VALUES 256

static uint32_t read_u16(const uint8_t *p)
{
    return p[0] | (uint32_t)p[1] << 8;
}

static uint32_t read_u32(const uint8_t *p)
{
    return read_u16(p) | read_u16(p + 2) << 16;
}

/* --- the table ------------------------------------------------------------------------------------------- */

static const struct quant_traits formats[QUANT_FORMAT_COUNT] = {
    [QUANT_F32] = {"F32", 1, 4},
    [QUANT_F16] = {"F16", 1, 2},
    [QUANT_BF16] = {"BF16", 1, 2},
    [QUANT_Q8_0] = {"Q8_0", 32, 34},
    [QUANT_Q4_0] = {"Q4_0", 32, 18},
    [QUANT_Q4_1] = {"Q4_1", 32, 20},
    [QUANT_Q5_0] = {"Q5_0", 32, 22},
    [QUANT_Q5_1] = {"Q5_1", 32, 24},
    [QUANT_Q2_K] = {"Q2_K", K_VALUES, 84},
    [QUANT_Q3_K] = {"Q3_K", K_VALUES, 110},
    [QUANT_Q4_K] = {"Q4_K", K_VALUES, 144},
    [QUANT_Q5_K] = {"Q5_K", K_VALUES, 176},
    [QUANT_Q6_K] = {"Q6_K", K_VALUES, 210},
    [QUANT_FP8_E4M3] = {"FP8_E4M3", 1, 1},
    [QUANT_NVFP4] = {"NVFP4", 16, 8},
};

/* Where the f16 numbers of a block are that make all its values NaN or infinite; -1: none. */
static const int16_t scales_at[QUANT_FORMAT_COUNT][2] = {
    [QUANT_F32] = {-1, -1}, [QUANT_F16] = {0, -1},   [QUANT_BF16] = {-1, -1}, [QUANT_Q8_0] = {0, -1},
    [QUANT_Q4_0] = {0, -1}, [QUANT_Q4_1] = {0, 2},   [QUANT_Q5_0] = {0, -1},  [QUANT_Q5_1] = {0, 2},
    [QUANT_Q2_K] = {80, 82}, [QUANT_Q3_K] = {108, -1}, [QUANT_Q4_K] = {0, 2},   [QUANT_Q5_K] = {0, 2},
    [QUANT_Q6_K] = {208, -1}, [QUANT_FP8_E4M3] = {-1, -1}, [QUANT_NVFP4] = {-1, -1},
};

const struct quant_traits *quant_info(enum quant_format format)
{
    return &formats[format];
}

bool quant_find(enum quant_format *ret, const char *name)
{
    for (int i = 0; i < QUANT_FORMAT_COUNT; i++)
        if (strcmp(formats[i].name, name) == 0) {
            *ret = (enum quant_format)i;
            return true;
        }
    return false;
}

bool quant_bytes(size_t *ret, enum quant_format format, int64_t n, int64_t k)
{
    const struct quant_traits *f = &formats[format];
    size_t blocks;
    return n >= 0 && k >= 0 && k % f->values == 0 &&
           !__builtin_mul_overflow((size_t)n, (size_t)(k / f->values), &blocks) &&
           !__builtin_mul_overflow(blocks, (size_t)f->bytes, ret);
}

/* --- matrices -------------------------------------------------------------------------------------------- */

static int64_t round_up(int64_t n, int64_t step)
{
    return (n + step - 1) / step * step;
}

size_t quant_block_scale_at(const struct quant_matrix *m, int64_t row, int64_t block)
{
    int64_t columns = m->k / 16;
    if (!m->is_swizzled)
        return (size_t)(row * columns + block);
    int64_t tiles = round_up(columns, 4) / 4, tile = row / 128 * tiles + block / 4;
    return (size_t)(tile * 512 + row % 32 * 16 + row % 128 / 32 * 4 + block % 4);
}

bool quant_block_scale_bytes(size_t *ret, const struct quant_matrix *m)
{
    if (m->n < 0 || m->k < 0 || m->n > INT64_MAX - 128 || m->k % 16)
        return false;
    int64_t rows = m->is_swizzled ? round_up(m->n, 128) : m->n, columns = m->is_swizzled ? round_up(m->k / 16, 4) : m->k / 16;
    return !__builtin_mul_overflow((size_t)rows, (size_t)columns, ret);
}

__attribute__((format(printf, 3, 4))) static bool refuse(char *why, size_t why_bytes, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(why, why_bytes, format, args);
    va_end(args);
    return false;
}

bool quant_check(const struct quant_matrix *m, size_t data_bytes, size_t block_scale_bytes, char *why, size_t why_bytes)
{
    const struct quant_traits *f = &formats[m->format];
    size_t want;
    if (!quant_bytes(&want, m->format, m->n, m->k))
        return refuse(why, why_bytes, "[%lld,%lld] as %s: want rows of a whole number of %d values, and a size that memory "
                      "can have", (long long)m->n, (long long)m->k, f->name, f->values);
    if (data_bytes != want)
        return refuse(why, why_bytes, "%zu bytes, [%lld,%lld] as %s needs %zu", data_bytes, (long long)m->n, (long long)m->k,
                      f->name, want);
    bool has_scale = m->format == QUANT_FP8_E4M3 || m->format == QUANT_NVFP4;
    if (has_scale && !(isfinite(m->scale) && m->scale >= 0))
        return refuse(why, why_bytes, "%s with a scale of %g, want one that is finite and not negative", f->name,
                      (double)m->scale);
    if (m->format == QUANT_FP8_E4M3 && !(isfinite(m->input_scale) && m->input_scale >= 0))
        return refuse(why, why_bytes, "an input scale of %g, want one that is finite and not negative", (double)m->input_scale);
    if (m->format != QUANT_NVFP4)
        return true;
    if (!quant_block_scale_bytes(&want, m) || block_scale_bytes != want)
        return refuse(why, why_bytes, "%zu block scales, [%lld,%lld] as NVFP4%s needs %zu", block_scale_bytes, (long long)m->n,
                      (long long)m->k, m->is_swizzled ? " (swizzled)" : "", want);
    return true;
}

size_t quant_row_bytes(const struct quant_matrix *m)
{
    const struct quant_traits *f = &formats[m->format];
    return (size_t)(m->k / f->values) * (size_t)f->bytes;
}

size_t quant_row_scales(const struct quant_matrix *m)
{
    return m->format == QUANT_NVFP4 ? (size_t)(m->k / 16) : 0;
}

const uint8_t *quant_row(const struct quant_matrix *m, int64_t row)
{
    return (const uint8_t *)m->data + (size_t)row * quant_row_bytes(m);
}

void quant_rows(void *to, enum tensor_dtype dtype, const struct quant_matrix *m, int64_t first, int64_t count)
{
    assert(first >= 0 && count >= 0 && first + count <= m->n);
    CPU_NAME(dequant_rows)(to, dtype, m->k, m, first, count, 0, m->k);
}

void quant_rows_f32(float *to, const struct quant_matrix *m, int64_t first, int64_t count)
{
    quant_rows(to, TENSOR_F32, m, first, count);
}

void quant_rows_bf16(uint16_t *to, const struct quant_matrix *m, int64_t first, int64_t count)
{
    quant_rows(to, TENSOR_BF16, m, first, count);
}

/* --- runs and codes -------------------------------------------------------------------------------------- */

bool quant_is_small(enum quant_format format)
{
    return formats[format].bytes < 2 * formats[format].values;
}

bool quant_runs_are_small(const struct quant_run *runs, int count)
{
    for (int i = 0; i < count; i++)
        if (quant_is_small(runs[i].matrix.format))
            return true;
    return false;
}

bool quant_runs_have_fp8(const struct quant_run *runs, int count)
{
    for (int i = 0; i < count; i++)
        if (runs[i].matrix.has_fp8_products)
            return true;
    return false;
}

size_t quant_run_bytes(const struct quant_run *r)
{
    return (size_t)r->count * (quant_row_bytes(&r->matrix) + quant_row_scales(&r->matrix));
}

static size_t placed(size_t bytes)
{
    return (bytes + QUANT_PLACE_ALIGN - 1) / QUANT_PLACE_ALIGN * QUANT_PLACE_ALIGN;
}

struct quant_place quant_place_of(const struct quant_run *r, size_t begin)
{
    struct quant_place p = {.data = placed(begin)};
    p.scales = placed(p.data + (size_t)r->count * quant_row_bytes(&r->matrix));
    p.end = p.scales + (size_t)r->count * quant_row_scales(&r->matrix);
    return p;
}

size_t quant_code_count(const struct quant_matrix *m)
{
    if (m->format == QUANT_FP8_E4M3)
        return 128;
    return m->format == QUANT_NVFP4 && !m->low_first ? 256 * 8 : 0;
}

void quant_codes(uint16_t *to, const struct quant_matrix *m)
{
    for (size_t i = 0; i < quant_code_count(m); i++) {
        float value = quant_f32_of_e4m3((uint8_t)(m->format == QUANT_NVFP4 ? i / 8 : i)) * m->scale;
        to[i] = tensor_bf16_of(m->format == QUANT_NVFP4 ? quant_f32_of_e2m1((uint8_t)(i % 8)) * value : value);
    }
}

/* --- finite? ----------------------------------------------------------------------------------------------- */

static bool has_bad_f16(const uint8_t *p)
{
    return (read_u16(p) & 0x7c00) == 0x7c00;
}

static bool block_is_finite(enum quant_format format, const uint8_t *b)
{
    switch (format) {
    case QUANT_F32:
        return (read_u32(b) & 0x7f800000u) != 0x7f800000u;
    case QUANT_BF16:
        return (read_u16(b) & 0x7f80) != 0x7f80;
    case QUANT_FP8_E4M3:
        return (*b & 0x7f) != 0x7f;
    case QUANT_NVFP4:
        return true; /* its block scale is looked at by the caller */
    default:
        return !has_bad_f16(b + scales_at[format][0]) &&
               (scales_at[format][1] < 0 || !has_bad_f16(b + scales_at[format][1]));
    }
}

/* FP8 and NVFP4 overflow f32 only through the tensor's scale: 448 * 6 times it must stay finite. */
static bool scale_is_finite(const struct quant_matrix *m)
{
    return (m->format != QUANT_FP8_E4M3 && m->format != QUANT_NVFP4) || isfinite(m->scale * 448 * 6);
}

bool quant_is_finite(const struct quant_matrix *m, int64_t first, int64_t count)
{
    assert(first >= 0 && count >= 0 && first + count <= m->n);
    const struct quant_traits *f = &formats[m->format];
    bool ok = scale_is_finite(m);
    for (int64_t row = first; ok && row < first + count; row++) {
        const uint8_t *data = quant_row(m, row);
        for (int64_t block = 0; ok && block < m->k / f->values; block++, data += f->bytes) {
            ok = block_is_finite(m->format, data);
            if (m->format == QUANT_NVFP4)
                ok = (m->block_scales[quant_block_scale_at(m, row, block)] & 0x7f) != 0x7f;
        }
    }
    return ok;
}
