/* kern_ops.h - what a backend is: a table of functions, one per op of kern.h. For backends only.
 *
 * kern.c has checked shapes and the sticky error before any of these is called. */
#ifndef KILN_KERN_OPS_H
#define KILN_KERN_OPS_H

#include "kern.h"
#include "kern_team.h"

struct kern_ops {
    void (*close)(struct kern *k);
    bool (*sync)(struct kern *k);
    struct tensor (*temp)(struct kern *k, enum tensor_dtype dtype, int rank, const int64_t *shape);
    size_t (*mark)(struct kern *k);
    void (*rewind)(struct kern *k, size_t mark);
    size_t (*peak_bytes)(const struct kern *k);
    bool (*memory)(struct kern *k, struct kern_space *ret); /* NULL with the next: the backend works in host memory */
    void (*reserve)(struct kern *k, size_t bytes);
    void (*graph)(struct kern *k, void (*work)(void *context), void *context); /* NULL: work is called, once */
    void (*write)(struct kern *k, struct tensor out, struct tensor host);
    void (*read)(struct kern *k, struct tensor host, struct tensor x);
    struct tensor (*upload)(struct kern *k, enum tensor_dtype dtype, struct tensor host);
    void (*release)(struct kern *k, struct tensor t);
    struct kern_weight *(*weight)(struct kern *k, enum tensor_dtype dtype, struct tensor w, struct tensor bias);
    struct kern_weight *(*weight_quant)(struct kern *k, enum tensor_dtype dtype, const struct quant_run *runs, int count);
    void (*weight_free)(struct kern *k, struct kern_weight *w);
    struct kern_layer *(*layer_begin)(struct kern *k); /* the six of layers: only with `memory` */
    void (*layer_take)(struct kern *k, struct kern_layer *l, struct kern_weight *w);
    void (*layer_end)(struct kern *k, struct kern_layer *l);
    void (*layer_free)(struct kern *k, struct kern_layer *l);
    void (*layer_fetch)(struct kern *k, struct kern_layer *l, struct tensor seat);
    void (*layer_use)(struct kern *k, struct kern_layer *l);
    bool (*join)(struct kern *k); /* all ranks are here and whole: makes their connection; NULL: there is none to make */
    void (*sum_ranks)(struct kern *k, struct tensor x, int slot); /* may end later: slot, below KERN_SUMS_MAX, is its name */
    void (*sum_end)(struct kern *k, int slot); /* what is asked from now on is done behind it; NULL: sums are made when asked */
    void (*checksum)(struct kern *k, struct tensor out, struct tensor x);
    void (*copy)(struct kern *k, struct tensor out, struct tensor x);
    void (*gather)(struct kern *k, struct tensor out, const struct quant_matrix *table, struct tensor ids);
    void (*linear)(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w);
    void (*conv2d)(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w, int stride,
                   int pad);
    void (*attention)(struct kern *k, struct tensor out, struct tensor q, struct tensor key, struct tensor value,
                      float scale, struct kern_mask mask);
    void (*rms_norm)(struct kern *k, struct tensor out, struct tensor x, struct tensor weight, float eps,
                     enum kern_rounding rounding);
    void (*layer_norm_modulate)(struct kern *k, struct tensor out, struct tensor x, struct tensor scale,
                                struct tensor shift, float eps);
    void (*gated_add_norm)(struct kern *k, struct tensor out, struct tensor x, struct tensor gate, struct tensor y,
                           struct tensor scale, struct tensor shift, float eps);
    void (*group_norm)(struct kern *k, struct tensor out, struct tensor x, struct tensor weight,
                       struct tensor bias, int groups, float eps, bool silu);
    void (*silu)(struct kern *k, struct tensor out, struct tensor x);
    void (*silu_mul)(struct kern *k, struct tensor out, struct tensor gate, struct tensor up);
    void (*add)(struct kern *k, struct tensor out, struct tensor a, struct tensor b);
    void (*gated_add)(struct kern *k, struct tensor x, struct tensor gate, struct tensor y);
    void (*add_scaled)(struct kern *k, struct tensor x, struct tensor y, float s); /* kern_euler, too */
    void (*rms_rope)(struct kern *k, struct tensor out, struct tensor x, struct tensor weight, float eps,
                     enum kern_rounding rounding, struct tensor cos, struct tensor sin, enum kern_rope_layout layout);
    void (*timestep_embedding)(struct kern *k, struct tensor out, float t);
    void (*guide)(struct kern *k, struct tensor out, struct tensor c, struct tensor u, float g);
    void (*mix)(struct kern *k, struct tensor out, struct tensor a, struct tensor b, struct tensor share);
    void (*unpatchify)(struct kern *k, struct tensor out, struct tensor tokens, struct tensor mean,
                       struct tensor std);
    void (*patchify)(struct kern *k, struct tensor tokens, struct tensor x, struct tensor mean, struct tensor std);
    void (*upsample2)(struct kern *k, struct tensor out, struct tensor x);
    void (*pixels)(struct kern *k, struct tensor out, struct tensor x);
    bool (*has_nan)(struct kern *k, struct tensor x);
};

struct kern {
    const struct kern_ops *ops;
    bool failed, is_dry, has_fp8;
    struct kern_team *team; /* NULL: works alone, or counts for a team that is not there */
    int rank, ranks;
    bool is_whole;          /* every rank holds all of each matrix */
    const void *sums[KERN_SUMS_MAX]; /* what is summed, by slot */
    unsigned sums_begun, sums_ended;
    double flops;           /* asked for in products, since the backend set it to 0 */
    char name[96];
    char error[256];
};

struct kern_weight {
    enum tensor_dtype dtype; /* of the stored values */
    int rank;                /* 2: matrix, 4: convolution */
    int64_t n, k;            /* outputs; inputs (in * kh * kw for a convolution, ordered kh, kw, in) */
    int64_t in;
    int kh, kw;
    size_t bytes;
    size_t decoded_bytes; /* of one that a device with its own memory keeps quantised: what a product decodes; else 0 */
    void *data;   /* the backend's layout; NULL: kept as in the file */
    struct quant_run *runs; /* of a kept one */
    int run_count;
    float *bias;  /* [n] or NULL */
    void *owner;  /* the backend's */
    void *host;   /* of a weight in a layer: its values in host memory, in the backend's layout; else NULL */
};

struct kern_layer {
    size_t bytes; /* of a seat */
};

/* kern_ops_in_fp8: a device multiplies this run in its units for FP8, whose rows are 16 bytes long or a multiple. Else it decodes it. */
static inline bool kern_ops_in_fp8(const struct kern *k, enum tensor_dtype dtype, const struct quant_run *r)
{
    return k->has_fp8 && r->matrix.has_fp8_products && dtype == TENSOR_BF16 && r->count % 16 == 0 && r->matrix.k % 16 == 0;
}

/* kern_ops_frequency: exp(-ln(10000) i / half) as torch's exp on a CPU rounds it. That is to the nearest value but for two of
 * the 128, which lie almost in the middle and come out one unit higher; at time 1000 that unit is 6e-5 of a wave. */
float kern_ops_frequency(int64_t i, int64_t half);

/* kern_ops_member makes a backend that is opened a member. kern_ops_beat is its sign of life: it works. */
void kern_ops_member(struct kern *k, const struct kern_member *member);
static inline void kern_ops_beat(struct kern *k)
{
    if (k->team)
        kern_team_beat(k->team, k->rank);
}

/* kern_ops_meet: kern_team_meet; where that fails, so does the backend, for the team's reason. */
bool kern_ops_meet(struct kern *k, int64_t number, int64_t ret[KERN_TEAM_MAX]);

/* kern_ops_fail keeps the first error, and breaks the team. kern_ops_suspect: an error that another rank's may explain.
 * kern_ops_follow: the team is broken, and its reason is this backend's; false. */
void kern_ops_fail(struct kern *k, const char *format, ...) __attribute__((format(printf, 2, 3)));
void kern_ops_suspect(struct kern *k, const char *format, ...) __attribute__((format(printf, 2, 3)));
bool kern_ops_follow(struct kern *k);

#endif
