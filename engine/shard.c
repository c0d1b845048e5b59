/* shard.c - who has which rows and columns, and blocks of columns moved together. */
#include "shard.h"

#include <assert.h>
#include <string.h>

bool shard_divides(int64_t units, int ranks)
{
    return units % ranks == 0 || ranks % units == 0;
}

int64_t shard_units(int64_t units, int ranks)
{
    return units > ranks ? units / ranks : 1;
}

struct shard shard_of(enum shard_axis axis, const struct shard_piece *pieces, int count, int rank, int ranks)
{
    struct shard s = {.axis = axis, .count = count};
    int64_t at = 0;
    assert(count <= SHARD_PIECES_MAX);
    for (int i = 0; i < count; i++) {
        int64_t first_unit = pieces[i].units * rank / ranks;
        s.ranges[i] = (struct shard_range){at + first_unit * pieces[i].size, shard_units(pieces[i].units, ranks) * pieces[i].size};
        at += pieces[i].units * pieces[i].size;
    }
    return s;
}

struct shard shard_whole(int64_t rows)
{
    return shard_of(SHARD_ROWS, &(struct shard_piece){rows, 1}, 1, 0, 1);
}

int64_t shard_whole_length(const struct shard_piece *pieces, int count)
{
    int64_t length = 0;
    for (int i = 0; i < count; i++)
        length += pieces[i].units * pieces[i].size;
    return length;
}

int64_t shard_length(const struct shard *s)
{
    int64_t length = 0;
    for (int i = 0; i < s->count; i++)
        length += s->ranges[i].count;
    return length;
}

void shard_copy(struct tensor to, struct tensor from, const struct shard *s)
{
    int64_t at = 0;
    for (int i = 0; i < s->count; at += s->ranges[i++].count)
        tensor_convert(tensor_slice(to, s->axis, at, s->ranges[i].count),
                       tensor_slice(from, s->axis, s->ranges[i].first, s->ranges[i].count));
}

int shard_rows(struct quant_run *ret, const struct quant_run *runs, int count, const struct shard *s)
{
    int made = 0;
    for (int i = 0; i < s->count; i++) {
        int64_t first = s->ranges[i].first, end = first + s->ranges[i].count, at = 0; /* at: of the run in the whole */
        for (int r = 0; r < count; at += runs[r++].count) {
            int64_t low = first > at ? first : at, high = end < at + runs[r].count ? end : at + runs[r].count;
            if (low < high)
                ret[made++] = (struct quant_run){runs[r].matrix, runs[r].first + low - at, high - low};
        }
    }
    return made;
}

static int64_t row_blocks(const struct quant_matrix *m, const struct shard *s)
{
    return shard_length(s) / quant_info(m->format)->values;
}

static size_t row_bytes(const struct quant_matrix *m, const struct shard *s)
{
    return (size_t)row_blocks(m, s) * (size_t)quant_info(m->format)->bytes;
}

size_t shard_columns_bytes(const struct quant_run *run, const struct shard *s)
{
    int values = quant_info(run->matrix.format)->values;
    for (int i = 0; i < s->count; i++)
        if (s->ranges[i].first % values || s->ranges[i].count % values)
            return 0;
    struct quant_run part = {.matrix = run->matrix, .count = run->count};
    part.matrix.k = shard_length(s);
    return quant_run_bytes(&part);
}

static void copy_row(char *to, const struct quant_matrix *m, int64_t row, const struct shard *s)
{
    const struct quant_traits *t = quant_info(m->format);
    size_t block = (size_t)t->bytes;
    const char *from = (const char *)m->data + (size_t)row * (size_t)(m->k / t->values) * block;
    for (int i = 0; i < s->count; i++) {
        size_t bytes = (size_t)(s->ranges[i].count / t->values) * block;
        memcpy(to, from + (size_t)(s->ranges[i].first / t->values) * block, bytes);
        to += bytes;
    }
}

static void copy_scales(uint8_t *to, const struct quant_matrix *m, int64_t row, const struct shard *s)
{
    int values = quant_info(m->format)->values;
    for (int i = 0; i < s->count; i++)
        for (int64_t b = 0; b < s->ranges[i].count / values; b++)
            *to++ = m->block_scales[quant_block_scale_at(m, row, s->ranges[i].first / values + b)];
}

struct quant_run shard_columns(void *memory, const struct quant_run *run, const struct shard *s)
{
    const struct quant_matrix *m = &run->matrix;
    struct quant_run part = {.matrix = *m, .count = run->count};
    size_t each = row_bytes(m, s), scales = (size_t)row_blocks(m, s);
    bool has_scales = m->format == QUANT_NVFP4;
    uint8_t *block_scales = memory ? (uint8_t *)memory + (size_t)run->count * each : NULL;
    part.matrix.n = run->count;
    part.matrix.k = shard_length(s);
    part.matrix.data = memory;
    part.matrix.block_scales = has_scales ? block_scales : NULL;
    part.matrix.is_swizzled = false;
    for (int64_t r = 0; memory && r < run->count; r++) {
        copy_row((char *)memory + (size_t)r * each, m, run->first + r, s);
        if (has_scales)
            copy_scales(block_scales + (size_t)r * scales, m, run->first + r, s);
    }
    return part;
}
