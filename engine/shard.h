/* shard.h - the part of a matrix that one rank of a team holds (engine-spec 10).
 *
 * A matrix is split by rows when each rank makes some of its outputs (heads, values of the MLP), and by columns when each has
 * some of its inputs; products of the latter are summed over the ranks. The axis is a row of pieces, each with units that stay
 * whole, and a rank has its share of every piece:
 *
 *   to_qkv_mlp_proj, rows, 2 ranks     | q: H heads of D | k: H heads of D | v | gate: 3h values | up: 3h values |
 *   of rank 1                              |  #######    |     #######     | ##|       ######### |     ######### |
 *
 * Where a piece has fewer units than there are ranks (key and value heads that several query heads read), ranks share one. */
#ifndef KILN_SHARD_H
#define KILN_SHARD_H

#include "quant.h"
#include "tensor.h"

struct shard_piece { int64_t units, size; }; /* size: rows or columns of a unit */

/* shard_divides: can so many units be given to so many ranks? shard_units: how many each gets. */
bool shard_divides(int64_t units, int ranks);
int64_t shard_units(int64_t units, int ranks);

enum shard_axis { SHARD_ROWS, SHARD_COLUMNS };
#define SHARD_PIECES_MAX 5
struct shard {
    enum shard_axis axis;
    int count;
    struct shard_range { int64_t first, count; } ranges[SHARD_PIECES_MAX]; /* along the axis */
};
struct shard shard_of(enum shard_axis axis, const struct shard_piece *pieces, int count, int rank, int ranks);
struct shard shard_whole(int64_t rows); /* of a matrix that is not split */
int64_t shard_whole_length(const struct shard_piece *pieces, int count);
int64_t shard_length(const struct shard *s); /* of the axis, in the part */

/* shard_copy: to = the part of `from` [n, k]; same dtype, host memory. */
void shard_copy(struct tensor to, struct tensor from, const struct shard *s);

/* shard_rows: the runs of a part by rows, out of those of the whole; how many. At most SHARD_PIECES_MAX times as many. */
int shard_rows(struct quant_run *ret, const struct quant_run *runs, int count, const struct shard *s);

/* shard_columns_bytes: what the part by columns of a run takes in its format; 0: a block of values would be cut, so that it must
 * be decoded. shard_columns makes it in `memory`, of that size; NULL: values are not there (a dry device). */
size_t shard_columns_bytes(const struct quant_run *run, const struct shard *s);
struct quant_run shard_columns(void *memory, const struct quant_run *run, const struct shard *s);

#endif
