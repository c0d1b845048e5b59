/* attention.c - streaming softmax attention (Dao et al., FlashAttention, 2022): a task is a block of query rows of
 * one head; it walks over blocks of keys and keeps a running maximum, sum and output per row.
 *
 *   keys packed:   [b, kv head][key panel][cells of d][NR]       S = Q K^T is rows x panel
 *   values packed: [b, kv head][key block][d panel][cells of KEYS][NR]   O += P V
 *
 * Within a block of keys the rows go stripe by stripe, so that scores and probabilities stay in a near cache; the stripes of
 * a task share the block's keys and values. While a stripe's scores are softened, AMX multiplies the scores of the next one
 * and the probabilities of the one before; elsewhere one follows the other.
 *
 * The exponential is 2^((score - top) scale), the difference first: it is exact where it matters, and no huge score is taken
 * from another's rounding. P is rounded to the dtype of the values before the second product, as the fused kernels of torch
 * do, and is not packed: the micro-kernel reads its rows as they are. The blocks start at row 0 and key 0 always, so a
 * row's bits depend on its inputs only. */
#include "cpu_ops.h"
#include "gemm.h"

#include <math.h>

#define KEYS 256 /* keys per block; a multiple of every NR */
#ifdef __AMX_BF16__
#define STRIPE 1           /* tiles of a stripe: 32 KiB of scores */
#define ROWS (4 * GEMM_MR) /* query rows per task */
#else
#define STRIPE GEMM_BLOCK
#define ROWS GEMM_ROWS
#endif
#define STRIPE_ROWS (STRIPE * GEMM_MR)
#define TOP_SLACK 8.0f /* a row's maximum is renewed when it has risen by a factor of 2^8, so outputs are seldom rescaled */

struct job {
    struct kern *k;
    struct tensor out, q, key, value;
    float scale; /* times log2 e: the exponential is one of base 2 */
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
    uint32_t *q;      /* packed queries [tiles][d words][MR] */
    float *scores[2]; /* of a stripe and of the next one [KEYS / NR][tiles][MR][NR] */
    uint32_t *p[2];   /* probabilities of a stripe and of the one before [STRIPE_ROWS][words of KEYS] */
    float *sums;      /* output so far [stripe][d panels][tiles][MR][NR] */
    float *top, *total, *next_top, *keep; /* [ROWS] */
};

struct stripe { /* rows of a task that go through a block of keys together */
    int64_t row, rows, tiles; /* row: first one, counted in the task */
    int64_t first_row, first_key, limit; /* of the job, for the mask */
    float *scores, *sums;
    uint32_t *p;
};

/* How many keys of this block row r of the stripe may see. */
static int64_t visible(const struct job *j, const struct stripe *t, int64_t r)
{
    int64_t row = t->first_row + r, end = j->mask.causal && row + 1 < t->limit ? row + 1 : t->limit;
    int64_t count = end - t->first_key;
    return count < 0 ? 0 : count < KEYS ? count : KEYS;
}

/* VEC scores of row r from key i on. */
VEC_INLINE vf scores_of(const struct stripe *t, int64_t r, int64_t i)
{
    uint64_t key = (uint64_t)i, row = (uint64_t)r;
    const float *tile = t->scores + key / GEMM_NR * (uint64_t)t->tiles * GEMM_TILE + row / GEMM_MR * GEMM_TILE;
    return vec_load(tile + row % GEMM_MR * GEMM_NR + key % GEMM_NR, TENSOR_F32, 0, VEC);
}

static float top_of(const struct stripe *t, int64_t r, int64_t count, float old, float slack)
{
    vf best = vec_splat(-INFINITY), nothing = best;
    int64_t i = 0;
    for (; i + VEC <= count; i += VEC)
        best = vec_max(scores_of(t, r, i), best);
    if (i < count)
        best = vec_max(vec_select(vec_first(count - i), scores_of(t, r, i), nothing), best);
    float top = vec_max_all(best);
    return top > old + slack ? top : old;
}

/* Probabilities of one row are words of A (see gemm.h): pairs of bf16, or f32 that have been rounded. */
VEC_INLINE void store_probabilities(uint32_t *row, enum tensor_dtype dtype, int64_t i, vf low, vf high)
{
    if (dtype == TENSOR_BF16 && !gemm_is_widened(dtype)) {
        vec_narrow_pair((uint16_t *)row + i, low, high);
        return;
    }
    vec_store(row, TENSOR_F32, i, VEC, vec_round(low, dtype));
    vec_store(row, TENSOR_F32, i + VEC, VEC, vec_round(high, dtype));
}

/* Two registers of probabilities from key i on, of which the first `seen` keys may be seen. Returns sum + both, before
 * rounding. */
VEC_INLINE vf probability_pair(const struct stripe *t, int64_t r, int64_t i, int64_t seen, vf top, vf scale,
                               enum tensor_dtype dtype, vf sum)
{
    vf low = vec_exp2((scores_of(t, r, i) - top) * scale, dtype);
    vf high = vec_exp2((scores_of(t, r, i + VEC) - top) * scale, dtype);
    if (seen < 2 * VEC) {
        low = vec_select(vec_first(seen), low, (vf){0});
        high = vec_select(vec_first(seen - VEC), high, (vf){0});
    }
    store_probabilities(t->p + r * gemm_words(KEYS, dtype), dtype, i, low, high);
    sum += low;
    return sum + high;
}

/* The probabilities of row r, while one of the products goes on: a quarter of a step for each pair. Returns their sum.
 * `top`: the row's maximum, or 0 if it has seen nothing. */
VEC_INLINE float probabilities(const struct stripe *t, int64_t r, int64_t seen, vf top, vf scale, enum tensor_dtype dtype,
                               struct gemm_background *next, struct gemm_background *before)
{
    vf sum = {0};
    int64_t i = 0;
    for (; i + 8 * VEC <= seen; i += 8 * VEC) {
        struct gemm_background *behind = gemm_left(next) ? next : before;
        bool is_behind = gemm_left(behind) > 0;
        struct gemm_step step = {0};
        if (is_behind)
            step = gemm_step_begin(behind);
        GEMM_UNROLL for (int quarter = 0; quarter < 4; quarter++) {
            if (is_behind)
                gemm_step_quarter(step, quarter);
            sum = probability_pair(t, r, i + 2 * VEC * quarter, 2 * VEC, top, scale, dtype, sum);
        }
        if (is_behind)
            gemm_step_end(behind);
    }
    for (; i < seen; i += 2 * VEC)
        sum = probability_pair(t, r, i, seen - i, top, scale, dtype, sum);
    for (; i < KEYS; i += 2 * VEC)
        store_probabilities(t->p + r * gemm_words(KEYS, dtype), dtype, i, (vf){0}, (vf){0});
    return vec_sum(sum);
}

static void rescale(const struct job *j, const struct stripe *t, int64_t r, float keep)
{
    if (keep == 1.0f)
        return;
    for (int64_t p = 0; p < j->d_panels; p++) {
        float *o = t->sums + p * t->tiles * GEMM_TILE + r / GEMM_MR * GEMM_TILE + r % GEMM_MR * GEMM_NR;
        for (int i = 0; i < GEMM_NR; i += VEC)
            vec_store(o, TENSOR_F32, i, VEC, vec_load(o, TENSOR_F32, i, VEC) * vec_splat(keep));
    }
}

/* Scores of a stripe become probabilities, while `next` and then `before` are multiplied. */
static void soften(const struct job *j, struct state *s, const struct stripe *t, struct gemm_background *next,
                   struct gemm_background *before)
{
    float *top = s->top + t->row, *total = s->total + t->row, *to = s->next_top, *keep = s->keep;
    vf scale = vec_splat(j->scale);
    for (int64_t r = 0; r < t->rows; r++)
        to[r] = top_of(t, r, visible(j, t, r), top[r], TOP_SLACK / j->scale);
    for (int64_t r = 0; r < t->rows; r += VEC) {
        vf risen = vec_load(to, TENSOR_F32, r, VEC), base = vec_select(risen == vec_splat(-INFINITY), (vf){0}, risen);
        vf old = vec_load(top, TENSOR_F32, r, t->rows - r);
        vec_store(keep, TENSOR_F32, r, VEC, vec_exp2((old - base) * scale, TENSOR_F32));
        vec_store(top, TENSOR_F32, r, t->rows - r, risen);
        vec_store(to, TENSOR_F32, r, VEC, base);
    }
    for (int64_t r = 0; r < t->rows; r++) {
        int64_t seen = visible(j, t, r);
        vf base = vec_splat(to[r]);
        float sum = j->dtype == TENSOR_BF16 ? probabilities(t, r, seen, base, scale, TENSOR_BF16, next, before)
                                            : probabilities(t, r, seen, base, scale, TENSOR_F32, next, before);
        total[r] = total[r] * keep[r] + sum;
    }
}

static struct gemm_background scores(const struct job *j, const struct state *s, const struct stripe *t, int64_t head)
{
    int64_t first = t->first_key / GEMM_NR, left = j->key_panels - first;
    return (struct gemm_background){
        .c = t->scores, .a = gemm_packed(s->q + t->row * j->d_words, j->d_words, j->dtype), .tiles = t->tiles,
        .b = j->packed_keys + (head * j->key_panels + first) * j->d_cells * GEMM_NR,
        .panels = left < KEYS / GEMM_NR ? left : KEYS / GEMM_NR, .cells = j->d_cells, .dtype = j->dtype};
}

static struct gemm_background output(const struct job *j, const struct stripe *t, int64_t head)
{
    int64_t cells = gemm_cells(KEYS, j->dtype), block = head * j->key_blocks + t->first_key / KEYS;
    return (struct gemm_background){
        .c = t->sums, .a = gemm_plain(t->p, gemm_words(KEYS, j->dtype), j->dtype), .tiles = t->tiles,
        .b = j->packed_values + block * j->d_panels * cells * GEMM_NR, .panels = j->d_panels, .cells = cells,
        .add = true, .dtype = j->dtype};
}

static void finish(const struct job *j, const struct state *s, const struct stripe *t, struct tensor out)
{
    for (int64_t r = 0; r < t->rows; r++) {
        float total = s->total[t->row + r];
        vf inverse = vec_splat(total > 0 ? 1.0f / total : 0);
        void *to = cpu_row(out, t->first_row + r);
        for (int64_t i = 0; i < j->d; i += VEC) {
            const float *from = t->sums + i / GEMM_NR * t->tiles * GEMM_TILE + r / GEMM_MR * GEMM_TILE +
                                r % GEMM_MR * GEMM_NR + i % GEMM_NR;
            gemm_store_part(to, j->out.dtype, i, j->d - i, vec_load(from, TENSOR_F32, 0, VEC) * inverse);
        }
    }
}

/* The state in the thread's scratch; output so far and the probabilities of rows that do not exist are zero. */
static bool carve(const struct job *j, int thread, struct state *s)
{
    size_t sizes[] = {(size_t)(2 * KEYS * STRIPE_ROWS),
                      (size_t)(j->d_panels * GEMM_NR * ROWS),
                      (size_t)(2 * STRIPE_ROWS * gemm_words(KEYS, j->dtype)),
                      (size_t)(ROWS * j->d_words),
                      ROWS,
                      ROWS,
                      ROWS + VEC,
                      ROWS + VEC};
    enum { PARTS = sizeof sizes / sizeof *sizes };
    void *parts[PARTS];
    size_t total = 0;
    for (int i = 0; i < PARTS; i++)
        total += sizes[i] = (sizes[i] * 4 + 63) & ~(size_t)63;
    char *m = cpu_scratch(j->k, thread, total);
    if (!m)
        return false;
    for (int i = 0; i < PARTS; i++) {
        parts[i] = m;
        m += sizes[i];
    }
    *s = (struct state){.scores = {parts[0], (float *)parts[0] + KEYS * STRIPE_ROWS}, .sums = parts[1],
                        .p = {parts[2], (uint32_t *)parts[2] + STRIPE_ROWS * gemm_words(KEYS, j->dtype)}, .q = parts[3],
                        .top = parts[4], .total = parts[5], .next_top = parts[6], .keep = parts[7]};
    memset(s->sums, 0, sizes[1] + sizes[2]);
    for (int64_t r = 0; r < ROWS; r++)
        s->top[r] = -INFINITY, s->total[r] = 0;
    return true;
}

static void pack_queries(const struct job *j, struct tensor q, int64_t first, int64_t count, uint32_t *to)
{
    for (int64_t t = 0; t < gemm_tiles(count); t++) {
        const void *rows[GEMM_MR];
        for (int i = 0; i < GEMM_MR; i++) {
            int64_t r = t * GEMM_MR + i;
            rows[i] = r < count ? cpu_row(q, first + r) : NULL;
        }
        gemm_pack_rows(to + t * j->d_words * GEMM_MR, rows, j->d, j->dtype);
    }
}

struct task {
    int64_t first, count; /* rows */
    int64_t stripes, key_blocks, limit;
};

/* Step i of a task: of each block of keys, each stripe of rows. */
static struct stripe stripe_of(const struct job *j, const struct state *s, const struct task *task, int64_t i)
{
    int64_t row = i % task->stripes * STRIPE_ROWS, rows = task->count - row;
    rows = rows < STRIPE_ROWS ? rows : STRIPE_ROWS;
    return (struct stripe){.row = row, .rows = rows, .tiles = gemm_tiles(rows), .first_row = task->first + row,
                           .first_key = i / task->stripes * KEYS, .limit = task->limit, .scores = s->scores[i % 2],
                           .p = s->p[i % 2], .sums = s->sums + row * j->d_panels * GEMM_NR};
}

static void multiply_and_soften(const struct job *j, struct state *s, const struct task *task, int64_t head)
{
    int64_t steps = task->stripes * task->key_blocks;
    struct stripe now = stripe_of(j, s, task, 0);
    struct gemm_background before = {0}, next = scores(j, s, &now, head);
    for (int64_t i = 0; i < steps; i++) {
        gemm_finish(&next);
        struct stripe coming = stripe_of(j, s, task, i + 1);
        next = i + 1 < steps ? scores(j, s, &coming, head) : (struct gemm_background){0};
        soften(j, s, &now, &next, &before);
        gemm_finish(&before);
        for (int64_t r = 0; r < now.rows; r++)
            rescale(j, &now, r, s->keep[r]);
        before = output(j, &now, head);
        now = coming;
    }
    gemm_finish(&before);
}

static void run(void *context, int64_t index, int thread)
{
    const struct job *j = context;
    int64_t block = index % j->blocks, head = index / j->blocks % j->heads, b = index / j->blocks / j->heads;
    struct task task = {.first = block * ROWS, .count = j->rows - block * ROWS};
    task.count = task.count < ROWS ? task.count : ROWS;
    task.stripes = (task.count + STRIPE_ROWS - 1) / STRIPE_ROWS;
    task.limit = j->mask.key_count && j->mask.key_count[b] < j->keys ? j->mask.key_count[b] : j->keys;
    int64_t end = task.first + task.count, last = j->mask.causal && end < task.limit ? end : task.limit;
    task.key_blocks = (last + KEYS - 1) / KEYS;
    struct state s;
    if (!carve(j, thread, &s))
        return;
    pack_queries(j, head_of(j->q, b, head), task.first, task.count, s.q);
    if (task.key_blocks > 0) {
        gemm_begin();
        multiply_and_soften(j, &s, &task, b * j->kv_heads + head / (j->heads / j->kv_heads));
        gemm_end();
    }
    for (int64_t i = 0; i < task.stripes; i++) {
        struct stripe t = stripe_of(j, &s, &task, i);
        finish(j, &s, &t, head_of(j->out, b, head));
    }
}

void CPU_NAME(attention_apply)(struct kern *k, struct tensor out, struct tensor q, struct tensor key,
                               struct tensor value, float scale, struct kern_mask mask)
{
    struct job j = {.k = k, .out = out, .q = q, .key = key, .value = value, .scale = scale * (float)M_LOG2E, .mask = mask,
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
