/* gather.c - rows of a table by index: token embeddings. */
#include "cpu_ops.h"
#include "dequant.h"

struct job {
    struct tensor out;
    const struct quant_matrix *table;
    const int32_t *ids;
};

static void run(void *context, int64_t first, int64_t end)
{
    const struct job *j = context;
    for (int64_t r = first; r < end; r++)
        CPU_NAME(dequant_rows)(cpu_row(j->out, r), j->out.dtype, 0, j->table, j->ids[r], 1, 0, j->table->k);
}

void CPU_NAME(gather_rows)(struct kern *k, struct tensor out, const struct quant_matrix *table, struct tensor ids)
{
    struct job j = {out, table, ids.data};
    cpu_rows(k, out.shape[0], out.shape[1], run, &j);
}
