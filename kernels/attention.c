/* attention.c - streaming softmax attention (Dao et al., FlashAttention, 2022): a task is a block of query rows of
 * one head; it walks over blocks of keys and keeps a running maximum, sum and output per row.
 *
 *   keys packed:   [b, kv head][key panel][cells of d][NR]       S = Q K^T is rows x panel
 *   values packed: [b, kv head][key block][d panel][cells of KEYS][NR]   O += P V
 *
 * P is rounded to the dtype of the values before the second product, as the fused kernels of torch do, and is not
 * packed: the micro-kernel reads its rows as they are. The blocks start at row 0 and key 0 always, so a row's bits
 * depend on its inputs only. */
#include "cpu_ops.h"
#include "gemm.h"

#include <math.h>

#define KEYS 256        /* keys per block; a multiple of every NR */
#define ROWS GEMM_ROWS  /* query rows per task */

struct job {
    struct kern *k;
    struct tensor out, q, key, value;
    float scale;
    struct kern_mask mask;
    int64_t rows, keys, heads, kv_heads, d, blocks, key_panels, key_blocks, d_cells, d_words, d_panels;
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
    gemm_pack_columns(j->packed_keys + index * j->d_cells * GEMM_NR, rows, j->d, j->dtype);
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
    uint32_t *q;   /* packed queries [tiles][d words][MR] */
    float *scores; /* [KEYS / NR][tiles][MR][NR] */
    uint32_t *p;   /* probabilities [ROWS][words of KEYS] */
    float *sums;   /* output so far [d panels][tiles][MR][NR] */
    float *top, *total;
};

/* How many keys of this block query row r may see. */
static int64_t visible(const struct job *j, int64_t r, int64_t first, int64_t limit)
{
    int64_t end = j->mask.causal && r + 1 < limit ? r + 1 : limit;
    int64_t count = end - first;
    return count < 0 ? 0 : count < KEYS ? count : KEYS;
}

/* Probabilities of one row are words of A (see gemm.h): pairs of bf16, or f32 that have been rounded. */
VEC_INLINE void store_probabilities(uint32_t *row, enum tensor_dtype dtype, int64_t i, vf v)
{
    bool is_pairs = dtype == TENSOR_BF16 && gemm_words(KEYS, dtype) < KEYS;
    vec_store(row, is_pairs ? TENSOR_BF16 : TENSOR_F32, i, VEC, vec_round(v, dtype));
}

/* One row of a block: new maximum, probabilities, and what to multiply the output so far by. */
static float soften(const struct job *j, struct state *s, int64_t row, int64_t tiles, int64_t count)
{
    uint32_t *p = s->p + row * gemm_words(KEYS, j->dtype);
    const float *base = s->scores + row / GEMM_MR * GEMM_TILE + row % GEMM_MR * GEMM_NR;
    vf best = vec_splat(-INFINITY), scale = vec_splat(j->scale), nothing = best;
    for (int64_t i = 0; i < count; i += VEC) {
        vf v = vec_load(base + i / GEMM_NR * tiles * GEMM_TILE + i % GEMM_NR, TENSOR_F32, 0, VEC) * scale;
        best = vec_max(vec_select(vec_first(count - i), v, nothing), best);
    }
    float old = s->top[row], top = vec_max_all(best);
    top = top > old ? top : old;
    float base_top = top == -INFINITY ? 0 : top;
    vf sum = {0}, shift = vec_splat(base_top);
    for (int64_t i = 0; i < KEYS; i += VEC) {
        vf v = {0};
        if (i < count) {
            v = vec_load(base + i / GEMM_NR * tiles * GEMM_TILE + i % GEMM_NR, TENSOR_F32, 0, VEC) * scale;
            v = vec_select(vec_first(count - i), vec_exp(v - shift), (vf){0});
            sum += v;
        }
        store_probabilities(p, j->dtype, i, v);
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
    int64_t cells = gemm_cells(KEYS, j->dtype), words = gemm_words(KEYS, j->dtype), first = block * (KEYS / GEMM_NR);
    int64_t panels = j->key_panels - first < KEYS / GEMM_NR ? j->key_panels - first : KEYS / GEMM_NR;
    const uint32_t *keys = j->packed_keys + (head * j->key_panels + first) * j->d_cells * GEMM_NR;
    gemm_product(s->scores, gemm_packed(s->q, j->d_words, j->dtype), tiles, keys, panels, j->d_cells, j->dtype, false);
    for (int64_t r = 0; r < count; r++) {
        int64_t seen = visible(j, first_row + r, block * KEYS, limit);
        rescale(j, s, r, tiles, soften(j, s, r, tiles, seen));
    }
    const uint32_t *values = j->packed_values + (head * j->key_blocks + block) * j->d_panels * cells * GEMM_NR;
    gemm_product(s->sums, gemm_plain(s->p, words, j->dtype), tiles, values, j->d_panels, cells, j->dtype, true);
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

/* The state in the thread's scratch; output so far and the probabilities of rows that do not exist are zero. */
static bool carve(const struct job *j, int thread, int64_t tiles, struct state *s)
{
    size_t sizes[] = {(size_t)(KEYS / GEMM_NR * tiles * GEMM_TILE), (size_t)(j->d_panels * tiles * GEMM_TILE),
                      (size_t)(ROWS * gemm_words(KEYS, j->dtype)), (size_t)(tiles * j->d_words * GEMM_MR), ROWS, ROWS};
    void *parts[6];
    size_t total = 0;
    for (int i = 0; i < 6; i++)
        total += sizes[i] = (sizes[i] * 4 + 63) & ~(size_t)63;
    char *m = cpu_scratch(j->k, thread, total);
    if (!m)
        return false;
    for (int i = 0; i < 6; i++) {
        parts[i] = m;
        m += sizes[i];
    }
    *s = (struct state){.scores = parts[0], .sums = parts[1], .p = parts[2], .q = parts[3], .top = parts[4],
                        .total = parts[5]};
    memset(s->sums, 0, sizes[1] + sizes[2]);
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
        gemm_pack_rows(s.q + t * j->d_words * GEMM_MR, rows, j->d, j->dtype);
    }
    for (int64_t r = 0; r < ROWS; r++)
        s.top[r] = -INFINITY, s.total[r] = 0;
    int64_t limit = j->mask.key_count && j->mask.key_count[b] < j->keys ? j->mask.key_count[b] : j->keys;
    int64_t kv = b * j->kv_heads + head / (j->heads / j->kv_heads);
    int64_t last = j->mask.causal && first + count < limit ? first + count : limit;
    gemm_begin();
    for (int64_t kb = 0; kb * KEYS < last; kb++)
        key_block(j, &s, kv, kb, first, count, tiles, limit);
    gemm_end();
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
    j.d_words = gemm_words(j.d, j.dtype);
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
