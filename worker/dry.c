/* dry.c - sums of the ledger by phase, the least a step could move, and the report.
 *
 * A step's bytes outside of products (matrix products, attention) are compared with a least figure: one kernel between each
 * two products, which reads its inputs and writes its outputs once. Values for a row of width h, mlp = 3h:
 *
 *   to the first product of a block      read x, the branch before; write x, norm(x)     4h    (the very first: 2h)
 *   double: to attention                 read and write q, k                             4h
 *           to the mlp                   read x, the branch; write x, norm(x)            4h
 *           inside the mlp               read gate, up; write their product              9h
 *   single: to attention and its output  q, k as above; gate, up as above               13h
 *   to the velocity, picture rows only   read x, the branch; write norm(x)               3h
 *   Euler                                read latents, velocities; write latents */
#include "dry.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kern_dry.h"
#include "kern_module.h"
#include "model_parts.h"
#include "transformer.h"

struct total {
    int runs;
    struct kern_dry_sums sums;
};

struct dry {
    const struct kern_dry *ledger;
    enum dry_phase phase;
    struct total totals[DRY_PHASES];
    uint64_t launches_min, launches_max, host_launches_max; /* of a step */
    uint64_t late_allocations, late_stalls; /* in steps behind the first, which makes room for the shape */
};

static const char *const phase_names[DRY_PHASES] = {"load", "prompt", "step", "decode", "idle"};

bool dry_is(const char *device)
{
    return device && strncmp(device, "dry:", 4) == 0;
}

bool dry_open(struct dry **ret, const char *trace, char *why, size_t why_bytes)
{
    const struct kern_dry *ledger = kern_module_dry(why, why_bytes);
    if (!ledger)
        return false;
    if (trace && !ledger->trace(trace)) {
        snprintf(why, why_bytes, "--trace '%s': cannot be written", trace);
        return false;
    }
    struct dry *d = calloc(1, sizeof *d);
    if (!d) {
        snprintf(why, why_bytes, "no memory for the ledger");
        return false;
    }
    d->ledger = ledger;
    *ret = d;
    return true;
}

void dry_close(struct dry *d)
{
    if (d)
        d->ledger->trace(NULL);
    free(d);
}

/* --- phases ------------------------------------------------------------------------------------------------- */

static void add(struct kern_dry_sums *to, const struct kern_dry_sums *s)
{
    to->launches += s->launches;
    to->host_launches += s->host_launches;
    to->copies += s->copies;
    to->allocations += s->allocations;
    to->waits += s->waits;
    to->stalls += s->stalls;
    to->flops += s->flops;
    to->tensor_core_flops += s->tensor_core_flops;
    to->rank_sums += s->rank_sums;
    to->rank_sum_bytes += s->rank_sum_bytes;
    to->rank_sum_s += s->rank_sum_s;
    to->rank_sum_wait_s += s->rank_sum_wait_s;
    to->host_bytes += s->host_bytes;
    to->bytes += s->bytes;
    to->product_bytes += s->product_bytes;
    to->recode_bytes += s->recode_bytes;
    to->seconds += s->seconds;
}

static void count_step(struct dry *d, const struct kern_dry_sums *s)
{
    bool is_first = d->totals[DRY_STEP].runs == 0;
    d->launches_min = is_first || s->launches < d->launches_min ? s->launches : d->launches_min;
    d->launches_max = s->launches > d->launches_max ? s->launches : d->launches_max;
    d->host_launches_max = s->host_launches > d->host_launches_max ? s->host_launches : d->host_launches_max;
    d->late_allocations += is_first ? 0 : s->allocations;
    d->late_stalls += is_first ? 0 : s->stalls;
}

void dry_phase(struct dry *d, enum dry_phase phase)
{
    struct kern_dry_sums s = d->ledger->sums();
    if (d->phase == DRY_STEP)
        count_step(d, &s);
    add(&d->totals[d->phase].sums, &s);
    d->totals[d->phase].runs++;
    d->ledger->mark(phase_names[phase]);
    d->phase = phase;
}

/* --- the least a step could move ------------------------------------------------------------------------------ */

static double least_bytes(const struct transformer_config *c, const struct engine_request *r, int pictures, int passes,
                          size_t value_bytes)
{
    double picture = (double)(r->width / ENGINE_SIDE_MULTIPLE) * (r->height / ENGINE_SIDE_MULTIPLE);
    double rows = TRANSFORMER_TEXT_ROWS + picture, h = c->hidden, mlp = c->mlp_hidden, channels = c->in_channels;
    double doubles = c->num_layers, singles = c->num_single_layers;
    double to_block = 2 * h + 4 * h * (doubles - 1 + singles), to_attention = 4 * h * (doubles + singles);
    double in_block = (4 * h + 3 * mlp) * doubles + 3 * mlp * singles;
    double values = passes * (rows * (to_block + to_attention + in_block) + 3 * h * picture) + (passes + 2) * channels * picture;
    return pictures * values * (double)value_bytes;
}

/* --- the report ----------------------------------------------------------------------------------------------- */

struct figures {
    double step_outside, step_least;     /* bytes of all passes of a step; least 0: not known for what was asked */
    double step_recoding;                /* beside these: to decode weights and to round rows to e4m3 */
    double tensor_core_share;            /* of the FLOPs of all phases */
    double seconds;                      /* of all phases but loading */
    size_t peak;
    bool fits;
};

static double share(double part, double all)
{
    return all > 0 ? part / all : 0;
}

static struct figures figures_of(const struct dry *d, double least)
{
    struct figures f = {.step_least = least, .peak = d->ledger->peak_bytes()};
    struct kern_dry_sums all = {0};
    const struct total *step = &d->totals[DRY_STEP];
    for (int i = DRY_PROMPT; i < DRY_IDLE; i++)
        add(&all, &d->totals[i].sums);
    f.tensor_core_share = share(all.tensor_core_flops, all.flops);
    f.seconds = all.seconds;
    f.step_outside = step->runs ? (step->sums.bytes - step->sums.product_bytes - step->sums.recode_bytes) / step->runs : 0;
    f.step_recoding = step->runs ? step->sums.recode_bytes / step->runs : 0;
    f.fits = f.peak <= d->ledger->device()->memory_bytes;
    return f;
}

static json_t *phase_json(const struct total *t, const char *name)
{
    const struct kern_dry_sums *s = &t->sums;
    return json_pack("{s:s,s:i,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f}", "phase", name, "runs", t->runs, "launches",
                     (json_int_t)s->launches, "host_launches", (json_int_t)s->host_launches, "copies", (json_int_t)s->copies, "allocations",
                     (json_int_t)s->allocations, "waits", (json_int_t)s->waits, "stalls", (json_int_t)s->stalls, "rank_sums",
                     (json_int_t)s->rank_sums, "rank_sum_bytes", s->rank_sum_bytes, "rank_sum_s", s->rank_sum_s, "rank_sum_wait_s", s->rank_sum_wait_s, "flops", s->flops, "tensor_core_flops",
                     s->tensor_core_flops, "host_bytes", s->host_bytes, "bytes", s->bytes, "product_bytes", s->product_bytes,
                     "recode_bytes", s->recode_bytes, "computed_s", s->seconds);
}

static size_t plan_bytes(const struct engine_info *info)
{
    return info->other_bytes + info->model_bytes + info->arena_bytes;
}

static void print_json(const struct dry *d, const struct figures *f, const struct engine_info *info)
{
    const struct kern_dry_device *device = d->ledger->device();
    json_t *phases = json_array();
    for (int i = DRY_LOAD; i < DRY_IDLE; i++)
        json_array_append_new(phases, phase_json(&d->totals[i], phase_names[i]));
    json_t *report = json_pack("{s:s,s:s,s:f,s:f,s:f,s:s,s:I,s:I,s:s,s:s,s:I,s:I,s:I,s:b,s:f,s:f,s:f,s:f,s:f,s:I,s:I,s:I,s:I,s:I,s:o}", "kind", "computed, not measured",
                               "device", device->full_name, "bf16_flops", device->bf16_flops, "f32_flops", device->f32_flops, "memory_bytes_s",
                               device->memory_bytes_s, "family", info->family, "memory_bytes", (json_int_t)device->memory_bytes,
                               "context_bytes", (json_int_t)device->context_bytes, "placement", engine_placement_name(info->placement),
                               "passes", engine_placement_passes(info->passes), "other_bytes",
                               (json_int_t)info->other_bytes, "plan_bytes", (json_int_t)plan_bytes(info), "peak_bytes", (json_int_t)f->peak, "fits", f->fits,
                               "computed_s", f->seconds, "tensor_core_share", f->tensor_core_share, "step_bytes_outside_products",
                               f->step_outside, "step_bytes_outside_products_least", f->step_least, "step_bytes_recoding", f->step_recoding, "step_launches_min",
                               (json_int_t)d->launches_min, "step_launches_max", (json_int_t)d->launches_max, "step_host_launches_max",
                               (json_int_t)d->host_launches_max,
                               "step_late_allocations", (json_int_t)d->late_allocations, "step_late_stalls",
                               (json_int_t)d->late_stalls, "phases", phases);
    json_dumpf(report, stdout, JSON_COMPACT | JSON_REAL_PRECISION(15));
    putchar('\n');
    json_decref(report);
}

static void print_phases(const struct dry *d)
{
    printf("%-8s %5s %9s %9s %7s %6s %6s %7s %9s %9s %9s %11s\n", "each", "runs", "launches", "by host", "copies", "allocs", "waits", "stalls", "TFLOP",
           "GB", "from host", "computed ms");
    for (int i = DRY_LOAD; i < DRY_IDLE; i++) {
        const struct kern_dry_sums *s = &d->totals[i].sums;
        double n = d->totals[i].runs ? d->totals[i].runs : 1;
        printf("%-8s %5d %9.6g %9.6g %7.6g %6.6g %6.6g %7.6g %9.3f %9.3f %9.3f %11.3f\n", phase_names[i], d->totals[i].runs,
               (double)s->launches / n, (double)s->host_launches / n, (double)s->copies / n, (double)s->allocations / n, (double)s->waits / n,
               (double)s->stalls / n, s->flops / n / 1e12, s->bytes / n / 1e9,
               s->host_bytes / n / 1e9, 1e3 * s->seconds / n);
    }
}

static void print_page(const struct dry *d, const struct figures *f, const struct engine_info *info)
{
    const struct kern_dry_device *device = d->ledger->device();
    const struct kern_dry_sums *step = &d->totals[DRY_STEP].sums;
    double n = d->totals[DRY_STEP].runs ? d->totals[DRY_STEP].runs : 1;
    printf("%s on %s: computed, not measured\n\n", info->family, device->full_name);
    print_phases(d);
    printf("\nsteps       %llu to %llu launches, at most %llu by the host, for which a graph is one; in all behind the first: %llu stalls,\n"
           "            %llu allocations. A stall is a wait of the host with launches behind it; the wait that ends a step, for progress\n"
           "            and cancelling, is none\n", (unsigned long long)d->launches_min, (unsigned long long)d->launches_max,
           (unsigned long long)d->host_launches_max, (unsigned long long)d->late_stalls, (unsigned long long)d->late_allocations);
    printf("FLOPs       %.2f %% on tensor cores\n", 100 * f->tensor_core_share);
    printf("bytes       %.3f GB a step outside of products and attention", f->step_outside / 1e9);
    if (f->step_least > 0)
        printf("; least %.3f GB (one kernel between each two products), %.2f times that", f->step_least / 1e9,
               f->step_outside / f->step_least);
    if (f->step_recoding > 0)
        printf("\n            %.3f GB a step to decode weights or round rows for products", f->step_recoding / 1e9);
    if (step->rank_sums)
        printf("\nteam        %.6g sums a step over the ranks, %.3f GB, %.1f ms on the link, %.1f of them with nothing to compute meanwhile;\n"
               "            what follows is one rank's", (double)step->rank_sums / n, step->rank_sum_bytes / n / 1e9, 1e3 * step->rank_sum_s / n,
               1e3 * step->rank_sum_wait_s / n);
    printf("\nmemory      peak %.2f GB with %.2f GB for the driver; planned %.2f GB, placement %s, passes of guidance %s; the device has %.2f GB: %s\n",
           (double)f->peak / 1e9, (double)device->context_bytes / 1e9, (double)plan_bytes(info) / 1e9,
           engine_placement_name(info->placement), engine_placement_passes(info->passes), (double)device->memory_bytes / 1e9, f->fits ? "fits" : "does not fit");
    printf("time        %.3f s without loading, at best: each launch as long as its FLOPs at the peak, its bytes at the bandwidth, or\n"
           "            %.1f us (%.1f in a graph), whichever is longest; or what comes from the host meanwhile over the link, if that takes\n"
           "            longer\n", f->seconds, 1e6 * device->launch_s, 1e6 * device->graph_launch_s);
    printf("peaks       bf16 %.1f, fp8 %.1f, f32 %.1f TFLOP/s (dense, sums in f32), %.0f GB/s, from the host %.1f GB/s\n"
           "            %s; link: %s; launch: %s\n", device->bf16_flops / 1e12, device->fp8_flops / 1e12, device->f32_flops / 1e12,
           device->memory_bytes_s / 1e9, device->link_bytes_s / 1e9, device->source, device->link_source, device->launch_source);
}

/* 0 with references or a mask, whose rows and copies the least figure does not know, and for a team. */
static bool least_of(double *ret, const struct engine_options *model, const struct engine_request *r, int pictures,
                     const struct engine_info *info, struct engine_error *why)
{
    struct model_parts parts;
    *ret = 0;
    if (r->reference_count || strchr(model->device, ','))
        return true;
    if (!model_parts_open(&parts, model, why))
        return false;
    int passes = info->passes == ENGINE_PASSES_ONE ? 1 : 2;
    *ret = least_bytes(&parts.config.transformer, r, pictures, passes, tensor_dtype_bytes(engine_precision_dtype(model->precision)));
    model_parts_close(&parts);
    return true;
}

bool dry_report(const struct dry *d, const struct engine_options *model, const struct engine_request *request, int pictures,
                const struct engine_info *info, bool is_json, char *why, size_t why_bytes)
{
    struct engine_error error;
    double least;
    if (!least_of(&least, model, request, pictures, info, &error)) {
        snprintf(why, why_bytes, "%s", error.text);
        return false;
    }
    struct figures f = figures_of(d, least);
    const struct kern_dry_device *device = d->ledger->device();
    if (is_json)
        print_json(d, &f, info);
    else
        print_page(d, &f, info);
    if (!f.fits)
        snprintf(why, why_bytes, "the model does not fit: %.2f GB at the peak (%.2f GB of them the driver's), %s has %.2f GB",
                 (double)f.peak / 1e9, (double)device->context_bytes / 1e9, device->full_name, (double)device->memory_bytes / 1e9);
    return f.fits;
}
