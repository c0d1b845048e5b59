/* cuda_graph.c - a list of what was asked, and the graph that does it.
 *
 * Work is called with a table of operations that do nothing but write down what they are asked: which operation, each
 * tensor's address, shape and strides, each weight, each number. That takes some tens of microseconds for a step. If a
 * graph was made from the same list, it is launched. Else work is called again while the stream is captured, and what was
 * captured is kept beside the list. So nobody has to promise that two steps are alike, and no list is too short: an argument
 * that a launch depends on is in it, because operations have no others.
 *
 * Addresses. The arena is one bump pointer, so the same calls of kern_temp give the same addresses as long as its blocks
 * stay; kern_reserve sees to that. Where they do not, all graphs are forgotten (cuda_graph_forget), and the lists differ. They
 * are forgotten when a weight is freed or leaves the device, too: another may be given its place.
 *
 * Memory is taken while the list is written, so that the arena has grown before anything is captured: during a capture it
 * may not. What an operation takes for itself is seen only then: the capture fails, the work is done without a graph, and the
 * next time there is room.
 *
 * Failures. Whatever goes wrong while a graph is made, nothing has been done yet: the error is forgotten and the work is done
 * operation by operation, which says again what is truly wrong. A device that refuses REFUSALS_MAX captures is not asked
 * again. A graph that cannot be launched is an error like that of any launch.
 *
 * Layers that come from the host (cuda_layer.c) are not captured: the link decides there how long a step takes. */
#include "cuda_graph.h"

#include <assert.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_progress.h"

#define GRAPHS_MAX 64 /* a batch's groups have one each */
#define REFUSALS_MAX 3

struct list {
    char *bytes;
    size_t used, capacity;
};

struct graph {
    struct list list;
    cudaGraphExec_t exec;
    uint64_t last_use;
};

struct cuda_graphs {
    struct kern *kern;
    const struct kern_ops *table; /* the operations that do something */
    struct kern_ops writing;      /* those that write down */
    struct list list;
    bool is_refused;              /* what is being written down cannot be captured */
    bool is_capturing;
    int refusals;
    struct graph graphs[GRAPHS_MAX];
    int count;
    uint64_t uses;
};

/* --- writing down ----------------------------------------------------------------------------------------- */

static void note(struct kern *k, const void *data, size_t bytes)
{
    struct cuda_graphs *g = cuda_graphs_of(k);
    struct list *l = &g->list;
    if (l->used + bytes > l->capacity) {
        size_t capacity = 2 * (l->used + bytes);
        char *grown = realloc(l->bytes, capacity);
        if (!grown) {
            g->is_refused = true;
            return;
        }
        l->bytes = grown, l->capacity = capacity;
    }
    memcpy(l->bytes + l->used, data, bytes);
    l->used += bytes;
}

static void note_tensor(struct kern *k, const struct tensor *t)
{
    int head[2] = {(int)t->dtype, t->rank};
    note(k, &t->data, sizeof t->data);
    note(k, head, sizeof head);
    note(k, t->shape, (size_t)t->rank * sizeof *t->shape);
    note(k, t->stride, (size_t)t->rank * sizeof *t->stride);
}

/* An operation is named by its place in the table. */
#define NOTE(k, op, ...)                                                                                               \
    do {                                                                                                               \
        const struct tensor tensors[] = {__VA_ARGS__};                                                                 \
        note_op(k, offsetof(struct kern_ops, op), tensors, (int)(sizeof tensors / sizeof *tensors));                   \
    } while (0)

static void note_op(struct kern *k, size_t op, const struct tensor *tensors, int count)
{
    note(k, &op, sizeof op);
    for (int i = 0; i < count; i++)
        note_tensor(k, &tensors[i]);
}

static void note_number(struct kern *k, double number)
{
    note(k, &number, sizeof number);
}

/* A weight is the same as long as it lives and stays where it is. */
static void note_weight(struct kern *k, const struct kern_weight *w)
{
    const void *addresses[] = {w, w->data};
    note(k, addresses, sizeof addresses);
}

static void write_copy(struct kern *k, struct tensor out, struct tensor x)
{
    NOTE(k, copy, out, x);
}

static void write_linear(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w)
{
    NOTE(k, linear, out, x);
    note_weight(k, w);
}

static void write_conv2d(struct kern *k, struct tensor out, struct tensor x, const struct kern_weight *w, int stride, int pad)
{
    NOTE(k, conv2d, out, x);
    note_weight(k, w);
    note_number(k, stride);
    note_number(k, pad);
}

/* Counts of keys come from the host's memory. */
static void write_attention(struct kern *k, struct tensor out, struct tensor q, struct tensor key, struct tensor value, float scale,
                            struct kern_mask mask)
{
    NOTE(k, attention, out, q, key, value);
    note_number(k, scale);
    note_number(k, mask.causal);
    cuda_graphs_of(k)->is_refused |= mask.key_count != NULL;
}

static void write_rms_norm(struct kern *k, struct tensor out, struct tensor x, struct tensor weight, float eps,
                           enum kern_rounding rounding)
{
    NOTE(k, rms_norm, out, x, weight);
    note_number(k, eps);
    note_number(k, rounding);
}

static void write_layer_norm_modulate(struct kern *k, struct tensor out, struct tensor x, struct tensor scale, struct tensor shift,
                                      float eps)
{
    NOTE(k, layer_norm_modulate, out, x, scale, shift);
    note_number(k, eps);
}

static void write_gated_add_norm(struct kern *k, struct tensor out, struct tensor x, struct tensor gate, struct tensor y,
                                 struct tensor scale, struct tensor shift, float eps)
{
    NOTE(k, gated_add_norm, out, x, gate, y, scale, shift);
    note_number(k, eps);
}

static void write_group_norm(struct kern *k, struct tensor out, struct tensor x, struct tensor weight, struct tensor bias,
                             int groups, float eps, bool silu)
{
    NOTE(k, group_norm, out, x, weight, bias);
    note_number(k, groups);
    note_number(k, eps);
    note_number(k, silu);
}

static void write_silu(struct kern *k, struct tensor out, struct tensor x)
{
    NOTE(k, silu, out, x);
}

static void write_silu_mul(struct kern *k, struct tensor out, struct tensor gate, struct tensor up)
{
    NOTE(k, silu_mul, out, gate, up);
}

static void write_add(struct kern *k, struct tensor out, struct tensor a, struct tensor b)
{
    NOTE(k, add, out, a, b);
}

static void write_gated_add(struct kern *k, struct tensor x, struct tensor gate, struct tensor y)
{
    NOTE(k, gated_add, x, gate, y);
}

static void write_rms_rope(struct kern *k, struct tensor out, struct tensor x, struct tensor weight, float eps,
                           enum kern_rounding rounding, struct tensor cos, struct tensor sin, enum kern_rope_layout layout)
{
    NOTE(k, rms_rope, out, x, weight, cos, sin);
    note_number(k, eps);
    note_number(k, rounding);
    note_number(k, layout);
}

static void write_guide(struct kern *k, struct tensor out, struct tensor c, struct tensor u, float g)
{
    NOTE(k, guide, out, c, u);
    note_number(k, g);
}

static void write_add_scaled(struct kern *k, struct tensor x, struct tensor y, float s)
{
    NOTE(k, add_scaled, x, y);
    note_number(k, s);
}

static void write_mix(struct kern *k, struct tensor out, struct tensor a, struct tensor b, struct tensor share)
{
    NOTE(k, mix, out, a, b, share);
}

static void write_unpatchify(struct kern *k, struct tensor out, struct tensor tokens, struct tensor mean, struct tensor std)
{
    NOTE(k, unpatchify, out, tokens, mean, std);
}

static void write_patchify(struct kern *k, struct tensor tokens, struct tensor x, struct tensor mean, struct tensor std)
{
    NOTE(k, patchify, tokens, x, mean, std);
}

static void write_upsample2(struct kern *k, struct tensor out, struct tensor x)
{
    NOTE(k, upsample2, out, x);
}

static void write_pixels(struct kern *k, struct tensor out, struct tensor x)
{
    NOTE(k, pixels, out, x);
}

static void refuse_fetch(struct kern *k, struct kern_layer *l, struct tensor seat)
{
    (void)l, (void)seat;
    cuda_graphs_of(k)->is_refused = true;
}

static void refuse_use(struct kern *k, struct kern_layer *l)
{
    (void)l;
    cuda_graphs_of(k)->is_refused = true;
}

/* The arena is the real one; what kern_graph does not allow is not there. */
static struct kern_ops writing_table(const struct kern_ops *real)
{
    return (struct kern_ops){
        .temp = real->temp,
        .mark = real->mark,
        .rewind = real->rewind,
        .layer_fetch = refuse_fetch,
        .layer_use = refuse_use,
        .copy = write_copy,
        .linear = write_linear,
        .conv2d = write_conv2d,
        .attention = write_attention,
        .rms_norm = write_rms_norm,
        .layer_norm_modulate = write_layer_norm_modulate,
        .gated_add_norm = write_gated_add_norm,
        .group_norm = write_group_norm,
        .silu = write_silu,
        .silu_mul = write_silu_mul,
        .add = write_add,
        .gated_add = write_gated_add,
        .rms_rope = write_rms_rope,
        .guide = write_guide,
        .add_scaled = write_add_scaled,
        .mix = write_mix,
        .unpatchify = write_unpatchify,
        .patchify = write_patchify,
        .upsample2 = write_upsample2,
        .pixels = write_pixels,
    };
}

/* False: no graph for this. */
static bool write_down(struct cuda_graphs *g, void (*work)(void *context), void *context)
{
    struct kern *k = g->kern;
    size_t mark = kern_mark(k);
    g->list.used = 0;
    g->is_refused = false;
    k->ops = &g->writing;
    work(context);
    k->ops = g->table;
    assert(kern_mark(k) == mark);
    (void)mark;
    return !k->failed && !g->is_refused;
}

/* --- graphs ---------------------------------------------------------------------------------------------------- */

static void drop(struct graph *graph)
{
    if (graph->exec)
        cudaGraphExecDestroy(graph->exec);
    free(graph->list.bytes);
    *graph = (struct graph){0};
}

static struct graph *find(struct cuda_graphs *g)
{
    for (int i = 0; i < g->count; i++)
        if (g->graphs[i].list.used == g->list.used && memcmp(g->graphs[i].list.bytes, g->list.bytes, g->list.used) == 0)
            return &g->graphs[i];
    return NULL;
}

/* A free place, or that of the graph that has not been used for longest. */
static struct graph *place(struct cuda_graphs *g)
{
    struct graph *oldest = &g->graphs[0];
    if (g->count < GRAPHS_MAX)
        return &g->graphs[g->count++];
    for (int i = 1; i < GRAPHS_MAX; i++)
        oldest = g->graphs[i].last_use < oldest->last_use ? &g->graphs[i] : oldest;
    drop(oldest);
    return oldest;
}

/* What work asks, instantiated; NULL: something was refused, and the error says what. */
static cudaGraphExec_t capture(struct cuda_graphs *g, void (*work)(void *context), void *context)
{
    struct kern *k = g->kern;
    cudaStream_t stream = cuda_stream(k);
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    if (!cuda_check(k, cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "a capture"))
        return NULL;
    g->is_capturing = true;
    work(context);
    g->is_capturing = false;
    cudaError_t ended = cudaStreamEndCapture(stream, &graph); /* whatever happened: the stream must go on */
    if (!k->failed && cuda_check(k, ended, "a capture") && !cuda_check(k, cudaGraphInstantiate(&exec, graph, 0), "a graph"))
        exec = NULL;
    if (graph)
        cudaGraphDestroy(graph);
    return exec;
}

/* Makes the graph of the list; NULL: it cannot be had, and nothing was done. */
static struct graph *make(struct cuda_graphs *g, void (*work)(void *context), void *context)
{
    struct kern *k = g->kern;
    size_t mark = kern_mark(k);
    cudaGraphExec_t exec = capture(g, work, context);
    if (!exec) {
        kern_rewind(k, mark);
        k->failed = false;
        cudaGetLastError();
        g->refusals++;
        return NULL;
    }
    struct graph *made = place(g);
    *made = (struct graph){.list = g->list, .exec = exec};
    g->list = (struct list){0};
    return made;
}

static void launch(struct cuda_graphs *g, struct graph *graph)
{
    graph->last_use = ++g->uses;
    if (cuda_check(g->kern, cudaGraphLaunch(graph->exec, cuda_stream(g->kern)), "a graph"))
        cuda_progress_mark(cuda_progress_of(g->kern));
}

void cuda_graph_run(struct cuda_graphs *g, void (*work)(void *context), void *context)
{
    struct kern *k = g->kern;
    struct graph *graph = NULL;
    double before = k->flops;
    bool is_listed = g->refusals < REFUSALS_MAX && write_down(g, work, context);
    double with_work = k->flops;
    if (is_listed && !(graph = find(g)))
        graph = make(g, work, context);
    k->flops = graph ? with_work : before; /* however often it was called */
    if (graph)
        launch(g, graph);
    else if (!k->failed)
        work(context);
}

/* --- life -------------------------------------------------------------------------------------------------------- */

struct cuda_graphs *cuda_graph_open(struct kern *k, const struct kern_ops *table)
{
    const char *choice = getenv("KILN_CUDA_GRAPHS");
    if (choice && strcmp(choice, "off") == 0)
        return NULL;
    if (choice && *choice && strcmp(choice, "on") != 0) {
        kern_ops_fail(k, "KILN_CUDA_GRAPHS='%s', accepted: on, off", choice);
        return NULL;
    }
    struct cuda_graphs *g = calloc(1, sizeof *g);
    if (!g) {
        kern_ops_fail(k, "no memory for the list of graphs");
        return NULL;
    }
    g->kern = k;
    g->table = table;
    g->writing = writing_table(table);
    return g;
}

void cuda_graph_forget(struct cuda_graphs *g)
{
    if (!g || cuda_progress_is_stuck(cuda_progress_of(g->kern)))
        return;
    for (int i = 0; i < g->count; i++)
        drop(&g->graphs[i]);
    g->count = 0;
}

void cuda_graph_close(struct cuda_graphs *g)
{
    if (!g)
        return;
    cuda_graph_forget(g);
    free(g->list.bytes);
    free(g);
}

bool cuda_graph_is_capturing(const struct cuda_graphs *g)
{
    return g && g->is_capturing;
}
