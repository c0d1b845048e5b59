/* attention.c - streaming softmax attention (Dao et al., FlashAttention, 2022): a task is a block of query rows of
 * one head; it walks over blocks of keys and keeps a running maximum, sum and output per row.
 *
 *   keys packed:   [b, kv head][key panel][cells of d][NR]       S = Q K^T is rows x panel
 *   values packed: [b, kv head][key block][d panel][cells of KEYS][NR]   O += P V
 *
 * P is rounded to the dtype of the values before the second product, as the fused kernels of torch do. The blocks
 * start at row 0 and key 0 always, so a row's bits depend on its inputs only. */
#include "cpu_ops.h"
#include "gemm.h"

#include <math.h>

#define KEYS 256             /* keys per block; a multiple of every NR */
#define ROWS (GEMM_MR * 16)  /* query rows per task */

struct job {
    struct kern *k;
    struct tensor out, q, key, value;
    float scale;
    struct kern_mask mask;
    int64_t rows, keys, heads, kv_heads, d, blocks, key_panels, key_blocks, d_cells, d_panels;
    uint32_t *packed_keys, *packed_values;
    enum tensor_dtype dtype;
};

static struct tensor head_of(struct tensor t, int64_t b, int64_t head)
{
    t = tensor_slice(tensor_slice(t, 0, b, 1), 2, head, 1);
    t.shape[0] = t.shape[1], t.stride[0] = t.stride[1];
    t.shape[1] = t.shape[3], t.stride[1] = 1;
    t.rank = 2;
    return t;
}

static void pack_keys(void *context, int64_t index, int thread)
{
    (void)thread;
    const struct job *j = context;
    int64_t panel = index % j->key_panels, head = index / j->key_panels;
    struct tensor keys = head_of(j->key, head / j->kv_heads, head % j->kv_heads);
    const void *rows[GEMM_NR];
    for (int i = 0; i < GEMM_NR; i++) {
        int64_t key = panel * GEMM_NR + i;
        rows[i] = key < j->keys ? cpu_row(keys, key) : NULL;
    }
    gemm_pack(j->packed_keys + index * j->d_cells * GEMM_NR, rows, GEMM_NR, j->d, j->dtype);
}

static void pack_values(void *context, int64_t index, int thread)
{
    (void)thread;
    const struct job *j = context;
    int64_t block = index % j->key_blocks, head = index / j->key_blocks, cells = gemm_cells(KEYS, j->dtype);
    struct tensor values = head_of(j->value, head / j->kv_heads, head % j->kv_heads);
    int64_t first = block * KEYS, count = j->keys - first < KEYS ? j->keys - first : KEYS;
    uint32_t *to = j->packed_values + index * j->d_panels * cells * GEMM_NR;
    for (int64_t p = 0; p < j->d_panels; p++, to += cells * GEMM_NR) {
        gemm_pack_kn(to, cpu_row(values, first), values.stride[0], count, p * GEMM_NR, j->d, j->dtype);
        int64_t used = gemm_cells(count, j->dtype);
        memset(to + used * GEMM_NR, 0, (size_t)((cells - used) * GEMM_NR) * 4);
    }
}

struct state { /* of one task, in its thread's scratch */
    uint32_t *q;      /* packed queries [tiles][d cells][MR] */
    float *scores;    /* [KEYS / NR][tiles][MR][NR] */
    void *p;          /* probabilities [ROWS][KEYS] in the dtype */
    uint32_t *packed; /* the same, packed [tiles][KEYS cells][MR] */
    float *sums;      /* output so far [d panels][tiles][MR][NR] */
    float *top, *total;
};

/* How many keys of this block query row r may see. */
static int64_t visible(const struct job *j, int64_t r, int64_t first, int64_t limit)
{
    int64_t end = j->mask.causal && r + 1 < limit ? r + 1 : limit;
    int64_t count = end - first;
    return count < 0 ? 0 : count < KEYS ? count : KEYS;
}

/* One row of a block: new maximum, probabilities, and what to multiply the output so far by. */
static float soften(const struct job *j, struct state *s, int64_t row, int64_t tiles, int64_t count)
{
    size_t bytes = tensor_dtype_bytes(j->dtype);
    char *p = (char *)s->p + (size_t)(row * KEYS) * bytes;
    const float *base = s->scores + row / GEMM_MR * GEMM_TILE + row % GEMM_MR * GEMM_NR;
    vf best = vec_splat(-INFINITY), scale = vec_splat(j->scale);
    for (int64_t i = 0; i < count; i += VEC) {
        vf v = vec_load(base + i / GEMM_NR * tiles * GEMM_TILE + i % GEMM_NR, TENSOR_F32, 0, VEC) * scale;
        for (int64_t t = count - i; t < VEC; t++)
            v[t] = -INFINITY;
        best = vec_max(v, best);
    }
    float old = s->top[row], top = vec_max_all(best);
    top = top > old ? top : old;
    float base_top = top == -INFINITY ? 0 : top;
    vf sum = {0}, shift = vec_splat(base_top);
    for (int64_t i = 0; i < KEYS; i += VEC) {
        vf v = {0};
        if (i < count) {
            v = vec_load(base + i / GEMM_NR * tiles * GEMM_TILE + i % GEMM_NR, TENSOR_F32, 0, VEC) * scale;
            v = vec_exp(v - shift);
            for (int64_t t = count - i; t < VEC; t++)
                v[t] = 0;
            sum += v;
        }
        vec_store(p, j->dtype, i, VEC, v);
    }
    float keep = old == -INFINITY ? 0 : vec_exp(vec_splat(old - base_top))[0];
    s->total[row] = s->total[row] * keep + vec_sum(sum);
    s->top[row] = top;
    return keep;
}

static void rescale(const struct job *j, struct state *s, int64_t row, int64_t tiles, float keep)
{
    if (keep == 1.0f)
        return;
    for (int64_t p = 0; p < j->d_panels; p++) {
        float *o = s->sums + p * tiles * GEMM_TILE + row / GEMM_MR * GEMM_TILE + row % GEMM_MR * GEMM_NR;
        for (int i = 0; i < GEMM_NR; i += VEC)
            vec_store(o, TENSOR_F32, i, VEC, vec_load(o, TENSOR_F32, i, VEC) * vec_splat(keep));
    }
}

static void key_block(const struct job *j, struct state *s, int64_t head, int64_t block, int64_t first_row,
                      int64_t count, int64_t tiles, int64_t limit)
{
    int64_t cells = gemm_cells(KEYS, j->dtype), panels = KEYS / GEMM_NR, first_panel = block * panels;
    size_t bytes = tensor_dtype_bytes(j->dtype);
    for (int64_t p = 0; p < panels && first_panel + p < j->key_panels; p++)
        gemm_panel(s->scores + p * tiles * GEMM_TILE, s->q, tiles, j->d_cells,
                   j->packed_keys + (head * j->key_panels + first_panel + p) * j->d_cells * GEMM_NR, j->dtype,
                   false);
    for (int64_t r = 0; r < count; r++) {
        int64_t seen = visible(j, first_row + r, block * KEYS, limit);
        rescale(j, s, r, tiles, soften(j, s, r, tiles, seen));
    }
    for (int64_t t = 0; t < tiles; t++) {
        const void *rows[GEMM_MR];
        for (int i = 0; i < GEMM_MR; i++) {
            int64_t r = t * GEMM_MR + i;
            rows[i] = r < count ? (char *)s->p + (size_t)(r * KEYS) * bytes : NULL;
        }
        gemm_pack(s->packed + t * cells * GEMM_MR, rows, GEMM_MR, KEYS, j->dtype);
    }
    const uint32_t *values = j->packed_values + (head * j->key_blocks + block) * j->d_panels * cells * GEMM_NR;
    for (int64_t p = 0; p < j->d_panels; p++)
        gemm_panel(s->sums + p * tiles * GEMM_TILE, s->packed, tiles, cells, values + p * cells * GEMM_NR, j->dtype,
                   true);
}

static void finish(const struct job *j, struct state *s, struct tensor out, int64_t first_row, int64_t count,
                   int64_t tiles)
{
    for (int64_t r = 0; r < count; r++) {
        vf inverse = vec_splat(s->total[r] > 0 ? 1.0f / s->total[r] : 0);
        void *to = cpu_row(out, first_row + r);
        for (int64_t i = 0; i < j->d; i += VEC) {
            const float *from = s->sums + i / GEMM_NR * tiles * GEMM_TILE + r / GEMM_MR * GEMM_TILE +
                                r % GEMM_MR * GEMM_NR + i % GEMM_NR;
            vec_store(to, j->out.dtype, i, j->d - i, vec_load(from, TENSOR_F32, 0, VEC) * inverse);
        }
    }
}

static bool carve(const struct job *j, int thread, int64_t tiles, struct state *s)
{
    int64_t cells = gemm_cells(KEYS, j->dtype);
    size_t q = (size_t)(tiles * j->d_cells * GEMM_MR) * 4, scores = (size_t)(KEYS / GEMM_NR * tiles * GEMM_TILE) * 4;
    size_t p = (size_t)ROWS * KEYS * tensor_dtype_bytes(j->dtype), packed = (size_t)(tiles * cells * GEMM_MR) * 4;
    size_t sums = (size_t)(j->d_panels * tiles * GEMM_TILE) * 4, row = (size_t)ROWS * 4;
    size_t sizes[] = {scores, sums, p, q, packed, row, row}, total = 0;
    for (int i = 0; i < 7; i++)
        total += sizes[i] = (sizes[i] + 63) & ~(size_t)63;
    char *m = cpu_scratch(j->k, thread, total);
    if (!m)
        return false;
    void *parts[7];
    for (int i = 0; i < 7; i++) {
        parts[i] = m;
        m += sizes[i];
    }
    *s = (struct state){.scores = parts[0], .sums = parts[1], .p = parts[2], .q = parts[3], .packed = parts[4],
                        .top = parts[5], .total = parts[6]};
    memset(s->sums, 0, sizes[1]);
    return true;
}

static void run(void *context, int64_t index, int thread)
{
    const struct job *j = context;
    int64_t block = index % j->blocks, head = index / j->blocks % j->heads, b = index / j->blocks / j->heads;
    int64_t first = block * ROWS, count = j->rows - first < ROWS ? j->rows - first : ROWS;
    int64_t tiles = gemm_tiles(count);
    struct state s;
    if (!carve(j, thread, tiles, &s))
        return;
    struct tensor q = head_of(j->q, b, head);
    for (int64_t t = 0; t < tiles; t++) {
        const void *rows[GEMM_MR];
        for (int i = 0; i < GEMM_MR; i++) {
            int64_t r = t * GEMM_MR + i;
            rows[i] = r < count ? cpu_row(q, first + r) : NULL;
        }
        gemm_pack(s.q + t * j->d_cells * GEMM_MR, rows, GEMM_MR, j->d, j->dtype);
    }
    for (int64_t r = 0; r < ROWS; r++)
        s.top[r] = -INFINITY, s.total[r] = 0;
    int64_t limit = j->mask.key_count && j->mask.key_count[b] < j->keys ? j->mask.key_count[b] : j->keys;
    int64_t kv = b * j->kv_heads + head / (j->heads / j->kv_heads);
    int64_t last = j->mask.causal && first + count < limit ? first + count : limit;
    for (int64_t kb = 0; kb * KEYS < last; kb++)
        key_block(j, &s, kv, kb, first, count, tiles, limit);
    finish(j, &s, head_of(j->out, b, head), first, count, tiles);
}

void CPU_NAME(attention_apply)(struct kern *k, struct tensor out, struct tensor q, struct tensor key,
                               struct tensor value, float scale, struct kern_mask mask)
{
    struct job j = {.k = k, .out = out, .q = q, .key = key, .value = value, .scale = scale, .mask = mask,
                    .rows = q.shape[1], .keys = key.shape[1], .heads = q.shape[2], .kv_heads = key.shape[2],
                    .d = q.shape[3], .dtype = q.dtype};
    int64_t batch = q.shape[0];
    j.blocks = (j.rows + ROWS - 1) / ROWS;
    j.key_panels = gemm_panels(j.keys);
    j.key_blocks = (j.keys + KEYS - 1) / KEYS;
    j.d_cells = gemm_cells(j.d, j.dtype);
    j.d_panels = gemm_panels(j.d);
    int64_t kv = batch * j.kv_heads, cells = gemm_cells(KEYS, j.dtype);
    size_t mark = kern_mark(k);
    j.packed_keys = kern_temp(k, TENSOR_F32, 1, (int64_t[]){kv * j.key_panels * j.d_cells * GEMM_NR}).data;
    j.packed_values =
        kern_temp(k, TENSOR_F32, 1, (int64_t[]){kv * j.key_blocks * j.d_panels * cells * GEMM_NR}).data;
    if (!k->failed) {
        cpu_for(k, kv * j.key_panels, pack_keys, &j);
        cpu_for(k, kv * j.key_blocks, pack_values, &j);
        cpu_for(k, batch * j.heads * j.blocks, run, &j);
    }
    kern_rewind(k, mark);
}
