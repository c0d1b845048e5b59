/* gather.c - rows of a table by index: token embeddings. */
#include "cpu_ops.h"

#include "vec.h"

struct job {
    struct tensor out, table;
    const int32_t *ids;
};

static void run(void *context, int64_t first, int64_t end)
{
    const struct job *j = context;
    int64_t width = j->out.shape[1];
    for (int64_t r = first; r < end; r++) {
        const void *row = cpu_row(j->table, j->ids[r]);
        void *out = cpu_row(j->out, r);
        for (int64_t i = 0; i < width; i += VEC)
            vec_store(out, j->out.dtype, i, width - i, vec_load(row, j->table.dtype, i, width - i));
    }
}

void CPU_NAME(gather_rows)(struct kern *k, struct tensor out, struct tensor table, struct tensor ids)
{
    struct job j = {out, table, ids.data};
    cpu_rows(k, out.shape[0], out.shape[1], run, &j);
}
