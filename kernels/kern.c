/* kern.c - checks each op's shapes, then calls the backend's table; after the first error ops do nothing. */
#include "kern_ops.h"

#include <assert.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static bool is_float(struct tensor t)
{
    return t.dtype == TENSOR_F32 || t.dtype == TENSOR_BF16;
}

/* False: there is an earlier one. */
static bool keep_error(struct kern *k, const char *format, va_list args)
{
    if (k->failed)
        return false;
    vsnprintf(k->error, sizeof k->error, format, args);
    k->failed = true;
    return true;
}

void kern_ops_fail(struct kern *k, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    if (keep_error(k, format, args) && k->team)
        kern_team_break(k->team, k->rank, k->error);
    va_end(args);
}

void kern_ops_suspect(struct kern *k, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    if (keep_error(k, format, args) && k->team)
        kern_team_suspect(k->team, k->rank, k->error);
    va_end(args);
}

bool kern_ops_follow(struct kern *k)
{
    char why[sizeof k->error];
    if (!k->failed && kern_team_why(k->team, why, sizeof why, NULL)) {
        memcpy(k->error, why, sizeof why);
        k->failed = true;
    }
    return false;
}

/* --- teams ------------------------------------------------------------------------------------------------- */

#define PASSING "team interrupted" /* how a reason begins that says nothing about the backends */

void kern_ops_member(struct kern *k, const struct kern_member *member)
{
    k->team = member->team;
    k->rank = member->team ? member->rank : 0;
    k->ranks = member->team ? kern_team_ranks(member->team) : member->ranks > 1 ? member->ranks : 1;
}

bool kern_ops_meet(struct kern *k, int64_t number, int64_t ret[KERN_TEAM_MAX])
{
    return kern_team_meet(k->team, k->rank, number, ret) || kern_ops_follow(k);
}

int kern_rank(const struct kern *k)
{
    return k->rank;
}

int kern_ranks(const struct kern *k)
{
    return k->ranks;
}

void kern_hold_whole(struct kern *k, bool is_whole)
{
    k->is_whole = is_whole;
}

int kern_share(const struct kern *k)
{
    return k->is_whole ? 0 : k->rank;
}

int kern_shares(const struct kern *k)
{
    return k->is_whole ? 1 : k->ranks;
}

bool kern_join(struct kern *k)
{
    if (k->failed)
        return false;
    if (k->team && !kern_team_mend(k->team, k->rank))
        kern_ops_suspect(k, "device failed: a rank of the team did not come back");
    return !k->failed && (k->ranks == 1 || !k->ops->join || k->ops->join(k));
}

void kern_leave(struct kern *k, const char *why)
{
    char text[256];
    snprintf(text, sizeof text, PASSING ": %s", why);
    if (k->team)
        kern_team_break(k->team, k->rank, text);
}

void kern_beat(struct kern *k)
{
    kern_ops_beat(k);
}

int64_t kern_most(struct kern *k, int64_t number)
{
    int64_t all[KERN_TEAM_MAX], most = number;
    if (k->failed || !k->team || !kern_ops_meet(k, number, all))
        return number;
    for (int i = 0; i < k->ranks; i++)
        most = all[i] > most ? all[i] : most;
    return most;
}

void kern_agree(struct kern *k, int64_t number, const char *what)
{
    int64_t all[KERN_TEAM_MAX];
    if (k->failed || !k->team || !kern_ops_meet(k, number, all))
        return;
    for (int i = 0; i < k->ranks; i++)
        if (all[i] != all[0])
            kern_ops_fail(k, "device failed: %s differs between ranks of the team: one of them computes wrongly", what);
}

/* Of so many ranks; of one there is none. */
static void begin_sum(struct kern *k, struct tensor x, int ranks)
{
    int slot = (int)(k->sums_begun % KERN_SUMS_MAX);
    assert(tensor_is_contiguous(x) && is_float(x));
    assert(k->sums_begun - k->sums_ended < KERN_SUMS_MAX);
    k->sums[slot] = x.data;
    k->sums_begun++;
    if (!k->failed && ranks > 1)
        k->ops->sum_ranks(k, x, slot);
}

static void end_sum(struct kern *k, struct tensor x, int ranks)
{
    int slot = (int)(k->sums_ended % KERN_SUMS_MAX);
    assert(k->sums_begun != k->sums_ended);
    assert(k->sums[slot] == x.data);
    (void)x;
    k->sums_ended++;
    if (!k->failed && ranks > 1 && k->ops->sum_end)
        k->ops->sum_end(k, slot);
}

void kern_sum_begin(struct kern *k, struct tensor x)
{
    begin_sum(k, x, kern_shares(k));
}

void kern_sum_end(struct kern *k, struct tensor x)
{
    end_sum(k, x, kern_shares(k));
}

void kern_sum_ranks(struct kern *k, struct tensor x)
{
    kern_sum_begin(k, x);
    kern_sum_end(k, x);
}

int kern_sum_parts(const struct kern *k)
{
    return kern_shares(k) > 1 && k->ops->sum_end ? 2 : 1;
}

bool kern_weight_is_decoded(const struct kern_weight *w)
{
    return w->decoded_bytes > 0;
}

void kern_exchange_ranks(struct kern *k, struct tensor x, struct tensor minus_zero)
{
    assert(tensor_is_contiguous(x) && is_float(x) && x.shape[0] % k->ranks == 0);
    int64_t part = x.shape[0] / k->ranks;
    for (int rank = 0; rank < k->ranks; rank++) {
        struct tensor theirs = tensor_slice(x, 0, rank * part, part);
        if (rank != k->rank)
            kern_copy(k, theirs, tensor_repeat(minus_zero, theirs.rank, theirs.shape));
    }
    begin_sum(k, x, k->ranks);
    end_sum(k, x, k->ranks);
}

void kern_checksum(struct kern *k, struct tensor out, struct tensor x)
{
    assert(x.rank == 2 && out.rank == 1 && out.dtype == TENSOR_I32 && out.shape[0] == x.shape[0] && is_float(x));
    if (!k->failed)
        k->ops->checksum(k, out, x);
}

/* --- life --------------------------------------------------------------------------------------------------- */

void kern_close(struct kern *k)
{
    if (k)
        k->ops->close(k);
}

bool kern_sync(struct kern *k)
{
    if (k->failed || !k->ops->sync(k))
        return false;
    bool is_broken = k->team && kern_team_is_broken(k->team); /* then what was waited for may not have been done */
    return !is_broken || kern_ops_follow(k);
}

bool kern_error_is_memory(const char *text)
{
    return strncmp(text, "no memory", 9) == 0; /* how the backends begin it */
}

bool kern_error_is_device(const char *text)
{
    return strncmp(text, "device ", 7) == 0;
}

bool kern_recover(struct kern *k)
{
    if (k->failed && !kern_error_is_memory(k->error) && strncmp(k->error, PASSING, strlen(PASSING)) != 0)
        return false;
    k->failed = false;
    return k->ops->sync(k);
}

const char *kern_error(const struct kern *k)
{
    return k->failed ? k->error : "";
}

bool kern_is_dry(const struct kern *k)
{
    return k->is_dry;
}

bool kern_has_fp8(const struct kern *k)
{
    return k->has_fp8;
}

const char *kern_name(const struct kern *k)
{
    return k->name;
}

size_t kern_peak_bytes(const struct kern *k)
{
    return k->ops->peak_bytes(k);
}

bool kern_memory(struct kern *k, struct kern_space *ret)
{
    return k->ops->memory && k->ops->memory(k, ret);
}

void kern_reserve(struct kern *k, size_t bytes)
{
    if (!k->failed)
        k->ops->reserve(k, bytes);
}

struct tensor kern_temp(struct kern *k, enum tensor_dtype dtype, int rank, const int64_t *shape)
{
    if (k->failed)
        return tensor_of(NULL, dtype, rank, shape);
    return k->ops->temp(k, dtype, rank, shape);
}

size_t kern_mark(struct kern *k)
{
    return k->ops->mark(k);
}

void kern_rewind(struct kern *k, size_t mark)
{
    k->ops->rewind(k, mark);
}

void kern_graph(struct kern *k, void (*work)(void *context), void *context)
{
    if (k->failed)
        return;
    if (k->ops->graph && kern_shares(k) == 1) /* sums of a team are looked after one by one */
        k->ops->graph(k, work, context);
    else
        work(context);
}

void kern_write(struct kern *k, struct tensor out, struct tensor host)
{
    assert(tensor_same_shape(out, host));
    if (!k->failed)
        k->ops->write(k, out, host);
}

void kern_read(struct kern *k, struct tensor host, struct tensor x)
{
    assert(tensor_same_shape(host, x));
    if (!k->failed)
        k->ops->read(k, host, x);
}

struct tensor kern_upload(struct kern *k, enum tensor_dtype dtype, struct tensor host)
{
    assert(is_float(host) && (dtype == TENSOR_F32 || dtype == TENSOR_BF16));
    if (k->failed)
        return tensor_of(NULL, dtype, host.rank, host.shape);
    kern_ops_beat(k);
    return k->ops->upload(k, dtype, host);
}

void kern_release(struct kern *k, struct tensor t)
{
    if (t.data)
        k->ops->release(k, t);
}

struct kern_weight *kern_weight_linear(struct kern *k, enum tensor_dtype dtype, struct tensor w,
                                       struct tensor bias)
{
    assert(w.rank == 2 && is_float(w));
    assert(!bias.data || (bias.rank == 1 && bias.shape[0] == w.shape[0]));
    kern_ops_beat(k);
    return k->failed ? NULL : k->ops->weight(k, dtype, w, bias);
}

struct kern_weight *kern_weight_conv(struct kern *k, enum tensor_dtype dtype, struct tensor w, struct tensor bias)
{
    assert(w.rank == 4 && is_float(w));
    assert(!bias.data || (bias.rank == 1 && bias.shape[0] == w.shape[0]));
    return k->failed ? NULL : k->ops->weight(k, dtype, w, bias);
}

struct kern_weight *kern_weight_quant(struct kern *k, enum tensor_dtype dtype, const struct quant_run *runs, int count)
{
    for (int i = 0; i < count; i++) {
        assert(runs[i].matrix.k == runs[0].matrix.k);
        assert(runs[i].first >= 0 && runs[i].count >= 0 && runs[i].first + runs[i].count <= runs[i].matrix.n);
        assert(!runs[i].matrix.has_fp8_products || runs[i].matrix.format == QUANT_FP8_E4M3);
    }
    kern_ops_beat(k);
    return k->failed ? NULL : k->ops->weight_quant(k, dtype, runs, count);
}

bool kern_weight_is_kept(const struct kern_weight *w)
{
    return w->runs != NULL;
}

void kern_weight_free(struct kern *k, struct kern_weight *w)
{
    if (w)
        k->ops->weight_free(k, w);
}

size_t kern_weight_bytes(const struct kern_weight *w)
{
    return w->bytes;
}

struct kern_layer *kern_layer_begin(struct kern *k)
{
    return k->failed ? NULL : k->ops->layer_begin(k);
}

void kern_layer_take(struct kern *k, struct kern_layer *l, struct kern_weight *w)
{
    if (!k->failed)
        k->ops->layer_take(k, l, w);
}

void kern_layer_end(struct kern *k, struct kern_layer *l)
{
    if (l)
        k->ops->layer_end(k, l);
}

void kern_layer_free(struct kern *k, struct kern_layer *l)
{
    if (l)
        k->ops->layer_free(k, l);
}

size_t kern_layer_bytes(const struct kern_layer *l)
{
    return l->bytes;
}

void kern_layer_fetch(struct kern *k, struct kern_layer *l, struct tensor seat)
{
    if (k->failed)
        return;
    assert(tensor_is_contiguous(seat) && tensor_bytes(seat) >= l->bytes);
    k->ops->layer_fetch(k, l, seat);
}

void kern_layer_use(struct kern *k, struct kern_layer *l)
{
    if (!k->failed)
        k->ops->layer_use(k, l);
}

void kern_copy(struct kern *k, struct tensor out, struct tensor x)
{
    assert(tensor_same_shape(out, x));
    if (!k->failed)
        k->ops->copy(k, out, x);
}

void kern_gather(struct kern *k, struct tensor out, const struct quant_matrix *table, struct tensor ids)
{
    assert(out.rank == 2 && ids.rank == 1 && ids.dtype == TENSOR_I32);
    assert(out.shape[0] == ids.shape[0] && out.shape[1] == table->k);
    if (!k->failed)
        k->ops->gather(k, out, table, ids);
}

void kern_linear(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w)
{
    if (k->failed)
        return;
    assert(out.rank == 2 && x.rank == 2 && w->rank == 2);
    assert(x.shape[1] == w->k && out.shape[1] == w->n && out.shape[0] == x.shape[0]);
    assert(x.dtype == w->dtype && is_float(out));
    k->flops += 2.0 * (double)tensor_count(out) * (double)w->k;
    k->ops->linear(k, out, x, w);
}

void kern_conv2d(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w, int stride,
                 int pad)
{
    if (k->failed)
        return;
    assert(out.rank == 4 && x.rank == 4 && w->rank == 4 && x.dtype == w->dtype);
    assert(tensor_is_contiguous(x) && tensor_is_contiguous(out));
    assert(x.shape[3] == w->in && out.shape[3] == w->n && out.shape[0] == x.shape[0]);
    for (int axis = 1; axis <= 2; axis++) {
        int64_t reach = x.shape[axis] + 2 * pad - (axis == 1 ? w->kh : w->kw);
        assert(out.shape[axis] == reach / stride + 1 || out.shape[axis] == (reach + 1) / stride + 1);
    }
    k->flops += 2.0 * (double)tensor_count(out) * (double)w->k;
    k->ops->conv2d(k, out, x, w, stride, pad);
}

void kern_attention(struct kern *k, struct tensor out, struct tensor q, struct tensor key, struct tensor value,
                    float scale, struct kern_mask mask)
{
    if (k->failed)
        return;
    assert(q.rank == 4 && key.rank == 4 && value.rank == 4 && tensor_same_shape(out, q));
    assert(tensor_same_shape(key, value) && key.shape[0] == q.shape[0] && key.shape[3] == q.shape[3]);
    assert(q.shape[2] % key.shape[2] == 0 && q.dtype == key.dtype && q.dtype == value.dtype);
    assert(scale > 0);
    k->flops += 4.0 * (double)tensor_count(q) * (double)key.shape[1];
    k->ops->attention(k, out, q, key, value, scale, mask);
}

void kern_rms_norm(struct kern *k, struct tensor out, struct tensor x, struct tensor weight, float eps,
                   enum kern_rounding rounding)
{
    assert(tensor_same_shape(out, x) && weight.rank == 1 && weight.shape[0] == x.shape[x.rank - 1]);
    if (!k->failed)
        k->ops->rms_norm(k, out, x, weight, eps, rounding);
}

void kern_layer_norm_modulate(struct kern *k, struct tensor out, struct tensor x, struct tensor scale,
                              struct tensor shift, float eps)
{
    int64_t width = x.shape[x.rank - 1];
    assert(tensor_same_shape(out, x) && tensor_count(scale) == width && tensor_count(shift) == width);
    if (!k->failed)
        k->ops->layer_norm_modulate(k, out, x, scale, shift, eps);
}

void kern_gated_add_norm(struct kern *k, struct tensor out, struct tensor x, struct tensor gate, struct tensor y,
                         struct tensor scale, struct tensor shift, float eps)
{
    int64_t width = x.shape[x.rank - 1];
    assert(tensor_same_shape(out, x) && tensor_same_shape(y, x) && tensor_count(gate) == width);
    assert(tensor_count(scale) == width && tensor_count(shift) == width);
    if (!k->failed)
        k->ops->gated_add_norm(k, out, x, gate, y, scale, shift, eps);
}

void kern_group_norm(struct kern *k, struct tensor out, struct tensor x, struct tensor weight, struct tensor bias,
                     int groups, float eps, bool silu)
{
    assert(tensor_same_shape(out, x) && x.rank == 4 && x.shape[3] % groups == 0);
    assert(tensor_is_contiguous(x) && tensor_is_contiguous(out));
    assert(weight.shape[0] == x.shape[3] && bias.shape[0] == x.shape[3]);
    if (!k->failed)
        k->ops->group_norm(k, out, x, weight, bias, groups, eps, silu);
}

void kern_silu(struct kern *k, struct tensor out, struct tensor x)
{
    assert(tensor_same_shape(out, x));
    if (!k->failed)
        k->ops->silu(k, out, x);
}

void kern_silu_mul(struct kern *k, struct tensor out, struct tensor gate, struct tensor up)
{
    assert(tensor_same_shape(out, gate) && tensor_same_shape(out, up));
    if (!k->failed)
        k->ops->silu_mul(k, out, gate, up);
}

void kern_add(struct kern *k, struct tensor out, struct tensor a, struct tensor b)
{
    assert(tensor_same_shape(out, a) && tensor_same_shape(out, b));
    if (!k->failed)
        k->ops->add(k, out, a, b);
}

void kern_gated_add(struct kern *k, struct tensor x, struct tensor gate, struct tensor y)
{
    assert(tensor_same_shape(x, y) && tensor_count(gate) == x.shape[x.rank - 1]);
    if (!k->failed)
        k->ops->gated_add(k, x, gate, y);
}

void kern_add_scaled(struct kern *k, struct tensor x, struct tensor y, float s)
{
    assert(tensor_same_shape(x, y));
    if (!k->failed)
        k->ops->add_scaled(k, x, y, s);
}

void kern_rms_rope(struct kern *k, struct tensor out, struct tensor x, struct tensor weight, float eps,
                   enum kern_rounding rounding, struct tensor cos, struct tensor sin, enum kern_rope_layout layout)
{
    assert(x.rank == 4 && x.shape[3] % 2 == 0 && tensor_same_shape(out, x) && weight.shape[0] == x.shape[3]);
    assert(tensor_same_shape(cos, sin) && cos.dtype == TENSOR_F32 && sin.dtype == TENSOR_F32);
    assert(cos.rank == 2 && cos.shape[0] == x.shape[1] && cos.shape[1] == x.shape[3] / 2);
    if (!k->failed)
        k->ops->rms_rope(k, out, x, weight, eps, rounding, cos, sin, layout);
}

float kern_ops_frequency(int64_t i, int64_t half)
{
    float frequency = (float)exp((double)(-9.210340371976184f * (float)i / (float)half));
    return half == 128 && (i == 12 || i == 106) ? nextafterf(frequency, 1) : frequency;
}

void kern_timestep_embedding(struct kern *k, struct tensor out, float t)
{
    assert(out.rank == 2 && out.shape[0] == 1 && out.shape[1] % 2 == 0);
    if (!k->failed)
        k->ops->timestep_embedding(k, out, t);
}

void kern_guide(struct kern *k, struct tensor out, struct tensor c, struct tensor u, float g)
{
    assert(tensor_same_shape(out, c) && tensor_same_shape(out, u));
    if (!k->failed)
        k->ops->guide(k, out, c, u, g);
}

void kern_euler(struct kern *k, struct tensor x, struct tensor v, float dt)
{
    kern_add_scaled(k, x, v, x.dtype == TENSOR_BF16 ? tensor_f32_of(tensor_bf16_of(dt)) : dt);
}

void kern_mix(struct kern *k, struct tensor out, struct tensor a, struct tensor b, struct tensor share)
{
    assert(tensor_same_shape(out, a) && tensor_same_shape(out, b) && out.rank == 2 && share.rank == 1);
    assert(share.shape[0] == out.shape[0] && share.dtype == out.dtype && a.dtype == out.dtype && b.dtype == out.dtype);
    if (!k->failed)
        k->ops->mix(k, out, a, b, share);
}

void kern_unpatchify(struct kern *k, struct tensor out, struct tensor tokens, struct tensor mean, struct tensor std)
{
    assert(out.rank == 4 && tokens.rank == 3 && tokens.shape[0] == out.shape[0]);
    assert(tokens.shape[2] == 4 * out.shape[3] && 4 * tokens.shape[1] == out.shape[1] * out.shape[2]);
    assert(mean.shape[0] == tokens.shape[2] && std.shape[0] == tokens.shape[2]);
    if (!k->failed)
        k->ops->unpatchify(k, out, tokens, mean, std);
}

void kern_patchify(struct kern *k, struct tensor tokens, struct tensor x, struct tensor mean, struct tensor std)
{
    assert(x.rank == 4 && tokens.rank == 3 && tokens.shape[0] == x.shape[0] && tokens.dtype == x.dtype);
    assert(tokens.shape[2] == 4 * x.shape[3] && 4 * tokens.shape[1] == x.shape[1] * x.shape[2] && x.shape[2] % 2 == 0);
    assert(mean.shape[0] == tokens.shape[2] && std.shape[0] == tokens.shape[2]);
    if (!k->failed)
        k->ops->patchify(k, tokens, x, mean, std);
}

void kern_upsample2(struct kern *k, struct tensor out, struct tensor x)
{
    assert(out.rank == 4 && x.rank == 4 && out.shape[1] == 2 * x.shape[1] && out.shape[2] == 2 * x.shape[2]);
    assert(out.shape[0] == x.shape[0] && out.shape[3] == x.shape[3] && out.dtype == x.dtype);
    if (!k->failed)
        k->ops->upsample2(k, out, x);
}

void kern_pixels(struct kern *k, struct tensor out, struct tensor x)
{
    assert(tensor_same_shape(out, x) && out.dtype == TENSOR_U8);
    if (!k->failed)
        k->ops->pixels(k, out, x);
}

bool kern_has_nan(struct kern *k, struct tensor x)
{
    return !k->failed && k->ops->has_nan(k, x);
}
