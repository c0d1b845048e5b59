/* elementwise.c - ops on one element at a time; every rounding a bf16 pipeline makes is a vec_round. */
#include "cpu_ops.h"

#include "vec.h"

enum shape_of_op { OP_SILU, OP_SILU_MUL, OP_ADD, OP_GATED_ADD, OP_GUIDE, OP_ADD_SCALED, OP_MIX, OP_COPY };

struct job {
    enum shape_of_op op;
    struct tensor out, a, b;
    const void *gate; /* by column; of OP_MIX by row */
    enum tensor_dtype gate_dtype;
    float scalar;
};

VEC_INLINE vf one(const struct job *j, vf a, vf b, int64_t r, int64_t i, int64_t n)
{
    enum tensor_dtype d = j->out.dtype;
    switch (j->op) {
    case OP_COPY:
        return a;
    case OP_SILU:
        return vec_silu(a);
    case OP_SILU_MUL:
        return vec_round(vec_silu(a), d) * b;
    case OP_ADD:
        return a + b;
    case OP_GATED_ADD:
        return a + vec_round(vec_load(j->gate, j->gate_dtype, i, n) * b, d);
    case OP_ADD_SCALED:
        return a + vec_round(vec_splat(j->scalar) * b, d);
    case OP_GUIDE: {
        vf difference = vec_round(a - b, d);
        return b + vec_round(vec_splat(j->scalar) * difference, d);
    }
    case OP_MIX: {
        vf share = vec_splat(vec_load(j->gate, j->gate_dtype, r, 1)[0]);
        return vec_round(vec_round(vec_splat(1) - share, d) * a, d) + vec_round(share * b, d);
    }
    }
    return a;
}

static void run(void *context, int64_t first, int64_t end)
{
    const struct job *j = context;
    int64_t width = j->out.shape[j->out.rank - 1];
    for (int64_t r = first; r < end; r++) {
        void *out = cpu_row(j->out, r);
        const void *a = cpu_row(j->a, r), *b = cpu_row(j->b, r);
        for (int64_t i = 0; i < width; i += VEC) {
            int64_t n = width - i;
            vf x = vec_load(a, j->a.dtype, i, n), y = vec_load(b, j->b.dtype, i, n);
            vec_store(out, j->out.dtype, i, n, one(j, x, y, r, i, n));
        }
    }
}

static void apply(struct kern *k, struct job *j)
{
    int64_t width = j->out.shape[j->out.rank - 1];
    if (width)
        cpu_rows(k, tensor_count(j->out) / width, width, run, j);
}

struct raw_copy {
    struct tensor out, x;
};

static void copy_bytes(void *context, int64_t first, int64_t end)
{
    const struct raw_copy *c = context;
    size_t bytes = (size_t)c->out.shape[c->out.rank - 1] * tensor_dtype_bytes(c->out.dtype);
    for (int64_t r = first; r < end; r++)
        memcpy(cpu_row(c->out, r), cpu_row(c->x, r), bytes);
}

void CPU_NAME(elementwise_copy)(struct kern *k, struct tensor out, struct tensor x)
{
    if (out.dtype == x.dtype) {
        int64_t width = out.shape[out.rank - 1];
        if (width)
            cpu_rows(k, tensor_count(out) / width, width, copy_bytes, &(struct raw_copy){out, x});
        return;
    }
    apply(k, &(struct job){.op = OP_COPY, .out = out, .a = x, .b = x});
}

void CPU_NAME(elementwise_silu)(struct kern *k, struct tensor out, struct tensor x)
{
    apply(k, &(struct job){.op = OP_SILU, .out = out, .a = x, .b = x});
}

void CPU_NAME(elementwise_silu_mul)(struct kern *k, struct tensor out, struct tensor gate, struct tensor up)
{
    apply(k, &(struct job){.op = OP_SILU_MUL, .out = out, .a = gate, .b = up});
}

void CPU_NAME(elementwise_add)(struct kern *k, struct tensor out, struct tensor a, struct tensor b)
{
    apply(k, &(struct job){.op = OP_ADD, .out = out, .a = a, .b = b});
}

void CPU_NAME(elementwise_gated_add)(struct kern *k, struct tensor x, struct tensor gate, struct tensor y)
{
    apply(k, &(struct job){.op = OP_GATED_ADD, .out = x, .a = x, .b = y, .gate = gate.data,
                           .gate_dtype = gate.dtype});
}

void CPU_NAME(elementwise_add_scaled)(struct kern *k, struct tensor x, struct tensor y, float s)
{
    apply(k, &(struct job){.op = OP_ADD_SCALED, .out = x, .a = x, .b = y, .scalar = s});
}

void CPU_NAME(elementwise_guide)(struct kern *k, struct tensor out, struct tensor c, struct tensor u, float g)
{
    apply(k, &(struct job){.op = OP_GUIDE, .out = out, .a = c, .b = u, .scalar = g});
}

void CPU_NAME(elementwise_mix)(struct kern *k, struct tensor out, struct tensor a, struct tensor b, struct tensor share)
{
    apply(k, &(struct job){.op = OP_MIX, .out = out, .a = a, .b = b, .gate = share.data, .gate_dtype = share.dtype});
}

bool CPU_NAME(elementwise_has_nan)(struct kern *k, struct tensor x)
{
    (void)k;
    int64_t width = x.shape[x.rank - 1], rows = width ? tensor_count(x) / width : 0;
    for (int64_t r = 0; r < rows; r++) {
        const void *row = cpu_row(x, r);
        vi bad = {0};
        for (int64_t i = 0; i < width; i += VEC) {
            vu bits = (vu)vec_load(row, x.dtype, i, width - i);
            bad |= (vi)((bits & 0x7f800000u) == 0x7f800000u);
        }
        for (int i = 0; i < VEC; i++)
            if (bad[i])
                return true;
    }
    return false;
}

/* --- teams ------------------------------------------------------------------------------------------------- */

struct sum {
    struct tensor of[KERN_TEAM_MAX]; /* the same rows of all ranks, contiguous */
    int ranks;
};

static void sum_range(void *context, int64_t first, int64_t end)
{
    const struct sum *s = context;
    int64_t width = s->of[0].shape[1];
    for (int64_t r = first; r < end; r++)
        for (int64_t i = 0; i < width; i += VEC) {
            vf x = vec_load(cpu_row(s->of[0], r), s->of[0].dtype, i, width - i);
            for (int rank = 1; rank < s->ranks; rank++)
                x += vec_load(cpu_row(s->of[rank], r), s->of[rank].dtype, i, width - i);
            for (int rank = 0; rank < s->ranks; rank++)
                vec_store(cpu_row(s->of[rank], r), s->of[rank].dtype, i, width - i, x);
        }
}

/* Each rank sums its share of the rows of all and gives all the result. */
void CPU_NAME(elementwise_sum_ranks)(struct kern *k, struct tensor x, int slot)
{
    struct sum s = {.ranks = k->ranks};
    int64_t at[KERN_TEAM_MAX], width = x.shape[x.rank - 1], rows = width ? tensor_count(x) / width : 0;
    int64_t first = rows * k->rank / k->ranks, count = rows * (k->rank + 1) / k->ranks - first;
    (void)slot; /* it is over when this returns */
    if (!kern_ops_meet(k, (int64_t)(intptr_t)x.data, at))
        return;
    for (int rank = 0; rank < k->ranks; rank++)
        s.of[rank] = tensor_slice(tensor_2d((void *)(intptr_t)at[rank], x.dtype, rows, width), 0, first, count);
    if (width)
        cpu_rows(k, count, width, sum_range, &s);
    kern_ops_meet(k, 0, at);
}

struct checksum {
    struct tensor out, x;
};

static void checksum_range(void *context, int64_t first, int64_t end)
{
    const struct checksum *c = context;
    int64_t width = c->x.shape[1];
    for (int64_t r = first; r < end; r++) {
        uint32_t sum = 0;
        for (int64_t i = 0; i < width; i += VEC) {
            vu bits = (vu)vec_load(cpu_row(c->x, r), c->x.dtype, i, width - i); /* beyond the row: zeros */
            for (int lane = 0; lane < VEC; lane++)
                sum += (uint32_t)(2 * (i + lane) + 1) * bits[lane];
        }
        ((int32_t *)c->out.data)[r] = (int32_t)sum;
    }
}

void CPU_NAME(elementwise_checksum)(struct kern *k, struct tensor out, struct tensor x)
{
    cpu_rows(k, x.shape[0], x.shape[1], checksum_range, &(struct checksum){out, x});
}
