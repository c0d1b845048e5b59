/* test_weight_files.c - a model runs from every file format, or is refused with its sentence. If this breaks, a user with a
 * quantised file gets noise, or the picture of other weights.
 *
 * The table that main prints: {variant} x {file format}. A cell renders twice, from a file of random blocks of that format
 * and from an F32 file of the values that quant.h says they have (which test_quant holds against the reference): both
 * pictures must be equal to the byte (distilled in f32, base in bf16). Shapes and the other parts are those of the golden model pocket.
 *
 * With the argument quick, fewer cells. With a device: a few formats there in bf16, in layers that come from host memory; they are smaller than those of F32. */
#include "weight_files.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "engine_model.h"
#include "model_shape.h"
#include "model_variant.h"
#include "pocket_adapters.h"

#define POCKET "tests/golden/models/pocket"
#define TENSORS_MAX 1024

static char folder[64];
static const char *device;   /* NULL: the CPU */
static bool is_quick;        /* every format once, distilled and in f32 */
static size_t model_bytes;   /* of the last picture's engine, on a device with its own memory */

static uint32_t state = 1;
static uint8_t random_byte(void)
{
    state = state * 1664525u + 1013904223u;
    return (uint8_t)(state >> 24);
}

/* --- files ----------------------------------------------------------------------------------------------- */

struct made { /* one tensor of a file */
    char name[TENSOR_NAMES_BYTES_MAX];
    const char *dtype; /* safetensors' */
    enum quant_format format;
    int rank;
    int64_t shape[4];  /* as it stands in a safetensors header */
    int64_t n, k;      /* in values; n 0: no weight (a scale) */
    size_t bytes;
    uint8_t *data;
    float *values;     /* what they mean, [n, k] */
};

struct file {
    int count;
    struct made tensors[TENSORS_MAX];
};

static void file_done(struct file *f)
{
    for (int i = 0; i < f->count; i++) {
        free(f->tensors[i].data);
        free(f->tensors[i].values);
    }
    f->count = 0;
}

static struct made *add(struct file *f, const char *name, const char *dtype, int rank, const int64_t *shape, size_t bytes)
{
    assert_true(f->count < TENSORS_MAX);
    struct made *t = &f->tensors[f->count++];
    *t = (struct made){.dtype = dtype, .rank = rank, .bytes = bytes, .data = calloc(1, bytes + 1)};
    snprintf(t->name, sizeof t->name, "%s", name);
    for (int i = 0; i < rank; i++)
        t->shape[i] = shape[i];
    return t;
}

/* Random blocks whose f16 scales are small, so that values stay within 1. */
static void fill(uint8_t *data, enum quant_format format, size_t blocks)
{
    static const int16_t scales[QUANT_FORMAT_COUNT][2] = {
        [QUANT_F32] = {-1, -1}, [QUANT_F16] = {-1, -1}, [QUANT_BF16] = {-1, -1}, [QUANT_Q8_0] = {0, -1}, [QUANT_Q4_0] = {0, -1},
        [QUANT_Q4_1] = {0, 2}, [QUANT_Q5_0] = {0, -1}, [QUANT_Q5_1] = {0, 2}, [QUANT_Q2_K] = {80, 82}, [QUANT_Q3_K] = {108, -1},
        [QUANT_Q4_K] = {0, 2}, [QUANT_Q5_K] = {0, 2}, [QUANT_Q6_K] = {208, -1}, [QUANT_FP8_E4M3] = {-1, -1}, [QUANT_NVFP4] = {-1, -1}};
    int bytes = quant_info(format)->bytes;
    for (size_t b = 0; b < blocks; b++, data += bytes) {
        for (int i = 0; i < bytes; i++)
            data[i] = random_byte();
        for (int i = 0; i < 2; i++)
            if (scales[format][i] >= 0)
                data[scales[format][i]] = random_byte(), data[scales[format][i] + 1] = 0x0c;
        float value = ((float)random_byte() - 128) / 1024;
        if (format == QUANT_F32)
            memcpy(data, &value, 4);
        if (format == QUANT_BF16)
            memcpy(data, &(uint16_t){tensor_bf16_of(value)}, 2);
        if (format == QUANT_F16)
            data[1] = (uint8_t)((data[1] & 0x80) | 0x28); /* 2^-5 .. 2^-4 */
        if (format == QUANT_FP8_E4M3 && (*data & 0x7f) == 0x7f)
            *data = 0;
    }
}

static void add_scale(struct file *f, const char *weight, enum tensor_names_scale kind, float value)
{
    char name[TENSOR_NAMES_BYTES_MAX];
    assert_true(tensor_names_beside(name, weight, kind, 0));
    memcpy(add(f, name, "F32", 0, NULL, 4)->data, &value, 4);
}

/* A weight of n rows in `format`, or F32 when its size is no whole number of blocks; and what its values are. */
static void add_weight(struct file *f, const char *name, enum quant_format format, int rank, const int64_t *shape)
{
    static const char *const dtypes[QUANT_FORMAT_COUNT] = {[QUANT_F32] = "F32", [QUANT_F16] = "F16", [QUANT_BF16] = "BF16",
                                                           [QUANT_FP8_E4M3] = "F8_E4M3", [QUANT_NVFP4] = "U8"};
    int64_t n = rank == 2 ? shape[0] : 1, k = shape[rank - 1], values = quant_info(format)->values;
    if (rank == 1 || n * k % values || (format == QUANT_NVFP4 && k % 16))
        format = QUANT_F32, values = 1;
    int64_t width = k % values ? values : k; /* rows that a converter had to make longer */
    size_t bytes;
    assert_true(quant_bytes(&bytes, format, n * k / width, width));
    struct made *t = add(f, name, dtypes[format], rank, shape, bytes);
    t->format = format, t->n = n, t->k = k;
    fill(t->data, format, (size_t)(n * k / values));
    for (int64_t i = 0; rank == 1 && i < k; i++)
        ((float *)(void *)t->data)[i] += 1; /* a norm's weight */
    struct quant_matrix m = {.format = format, .n = n * k / width, .k = width, .data = t->data, .scale = 1.0f / 4096};
    if (format == QUANT_FP8_E4M3)
        add_scale(f, name, TENSOR_NAMES_WEIGHT_SCALE, m.scale);
    if (format == QUANT_NVFP4) {
        char beside[TENSOR_NAMES_BYTES_MAX];
        size_t scales;
        m.is_swizzled = true;
        t->shape[1] /= 2;
        assert_true(quant_block_scale_bytes(&scales, &m) && tensor_names_beside(beside, name, TENSOR_NAMES_WEIGHT_SCALE, 0));
        struct made *b = add(f, beside, "F8_E4M3", 1, (int64_t[]){(int64_t)scales}, scales);
        fill(b->data, QUANT_FP8_E4M3, scales);
        m.block_scales = b->data;
        add_scale(f, name, TENSOR_NAMES_WEIGHT_SCALE_2, m.scale);
    }
    t->values = malloc((size_t)(n * k) * sizeof *t->values);
    quant_rows_f32(t->values, &m, 0, m.n);
}

/* Every tensor of pocket's part under the names of a scheme, linears in `format`. */
static void make(struct file *f, enum tensor_names_part part, enum tensor_names_scheme scheme, const char *prefix,
                 enum quant_format format)
{
    struct tensor_names names = {part, scheme, prefix};
    struct safetensors *from;
    struct engine_error why;
    bool is_text = part == TENSOR_NAMES_TEXT_ENCODER;
    if (!safetensors_open(&from, is_text ? POCKET "/text_encoder" : POCKET "/transformer",
                          is_text ? "model" : "diffusion_pytorch_model", &why))
        fail_msg("%s", why.text);
    for (size_t i = 0; i < safetensors_count(from); i++) {
        const struct safetensors_entry *e = safetensors_at(from, i);
        struct tensor_names_place place;
        assert_true(tensor_names_in_file(&place, &names, e->name));
        int64_t shape[4] = {e->shape[0] * place.pieces, e->shape[1]};
        if (place.piece == 0)
            add_weight(f, place.name, format, e->rank, shape);
    }
    safetensors_close(from);
}

static void write_safetensors(const struct file *f, const char *path, const char *metadata)
{
    static char head[200000];
    int used = snprintf(head, sizeof head, "{");
    uint64_t at = 0;
    if (metadata)
        used += snprintf(head + used, sizeof head - (size_t)used, "\"__metadata__\":{\"_quantization_metadata\":\"%s\"},", metadata);
    for (int i = 0; i < f->count; i++, at += f->tensors[i - 1].bytes) {
        const struct made *t = &f->tensors[i];
        used += snprintf(head + used, sizeof head - (size_t)used, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[", i ? "," : "", t->name, t->dtype);
        for (int a = 0; a < t->rank; a++)
            used += snprintf(head + used, sizeof head - (size_t)used, a ? ",%lld" : "%lld", (long long)t->shape[a]);
        used += snprintf(head + used, sizeof head - (size_t)used, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)at,
                         (unsigned long long)(at + t->bytes));
    }
    used += snprintf(head + used, sizeof head - (size_t)used, "}");
    FILE *out = fopen(path, "wb");
    fwrite(&(uint64_t){(uint64_t)used}, 8, 1, out);
    fwrite(head, 1, (size_t)used, out);
    for (int i = 0; i < f->count; i++)
        fwrite(f->tensors[i].data, 1, f->tensors[i].bytes, out);
    fclose(out);
}

static void put(FILE *out, uint64_t value, int bytes)
{
    fwrite(&value, 1, (size_t)bytes, out); /* little-endian, as the machine */
}

static void put_text(FILE *out, const char *text)
{
    put(out, strlen(text), 8);
    fwrite(text, 1, strlen(text), out);
}

static void write_gguf(const struct file *f, const char *path, const char *architecture)
{
    static const uint32_t types[QUANT_FORMAT_COUNT] = {[QUANT_F32] = 0, [QUANT_F16] = 1, [QUANT_BF16] = 30, [QUANT_Q4_0] = 2,
        [QUANT_Q4_1] = 3, [QUANT_Q5_0] = 6, [QUANT_Q5_1] = 7, [QUANT_Q8_0] = 8, [QUANT_Q2_K] = 10, [QUANT_Q3_K] = 11,
        [QUANT_Q4_K] = 12, [QUANT_Q5_K] = 13, [QUANT_Q6_K] = 14};
    uint64_t reshaped = 0, at = 0;
    for (int i = 0; i < f->count; i++)
        reshaped += f->tensors[i].k % quant_info(f->tensors[i].format)->values != 0;
    FILE *out = fopen(path, "wb");
    fwrite("GGUF", 1, 4, out);
    put(out, 3, 4), put(out, (uint64_t)f->count, 8), put(out, 1 + reshaped, 8);
    put_text(out, "general.architecture"), put(out, 8, 4), put_text(out, architecture);
    for (int i = 0; i < f->count; i++) {
        const struct made *t = &f->tensors[i];
        char key[400];
        if (t->k % quant_info(t->format)->values == 0)
            continue;
        snprintf(key, sizeof key, "comfy.gguf.orig_shape.%s", t->name);
        put_text(out, key), put(out, 9, 4), put(out, 5, 4), put(out, 2, 8), put(out, (uint64_t)t->n, 4), put(out, (uint64_t)t->k, 4);
    }
    for (int i = 0; i < f->count; i++) {
        const struct made *t = &f->tensors[i];
        int64_t values = quant_info(t->format)->values, width = t->k % values ? values : t->k;
        put_text(out, t->name), put(out, (uint64_t)t->rank, 4), put(out, (uint64_t)width, 8);
        if (t->rank == 2)
            put(out, (uint64_t)(t->n * t->k / width), 8);
        put(out, types[t->format], 4), put(out, at, 8);
        at += (t->bytes + 31) / 32 * 32;
    }
    while (ftell(out) % 32)
        fputc(0, out);
    for (int i = 0; i < f->count; i++) {
        fwrite(f->tensors[i].data, 1, f->tensors[i].bytes, out);
        while (ftell(out) % 32)
            fputc(0, out);
    }
    fclose(out);
}

/* The same weights in F32. */
static void write_meaning(const struct file *f, const char *path)
{
    static struct file plain;
    for (int i = 0; i < f->count; i++) {
        const struct made *t = &f->tensors[i];
        if (!t->values)
            continue;
        int64_t shape[2] = {t->rank == 2 ? t->n : t->k, t->k};
        size_t bytes = (size_t)(t->n * t->k) * 4;
        memcpy(add(&plain, t->name, "F32", t->rank, shape, bytes)->data, t->values, bytes);
    }
    write_safetensors(&plain, path, NULL);
    file_done(&plain);
}

static const char *path_of(const char *name)
{
    static char paths[4][160];
    static int next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    return path;
}

/* --- cells ----------------------------------------------------------------------------------------------- */

static bool picture(struct engine_image *ret, const struct engine_options *o, struct engine_error *why)
{
    struct engine *e;
    struct engine_request r = {.prompt = "a fox", .width = 64, .height = 64, .steps = 1, .guidance = 3, .seed = 1};
    if (!engine_open(&e, o, why))
        return false;
    engine_request_defaults(e, &r);
    bool ok = engine_generate(e, &r, 1, ret, NULL, why);
    model_bytes = engine_info(e)->model_bytes;
    engine_close(e);
    return ok;
}

static void print_cell(const char *variant, const char *part, const char *format, const char *outcome)
{
    print_message("| %-9s | %-12s | %-28s | %s\n", variant, part, format, outcome);
}

static void expect_equal(struct engine_options quantised, struct engine_options plain, const char *part, const char *format)
{
    for (enum engine_variant v = ENGINE_DISTILLED; v <= (device || is_quick ? ENGINE_DISTILLED : ENGINE_BASE); v++) {
        struct engine_image got, want;
        struct engine_error why;
        size_t bytes = 0;
        quantised.variant = plain.variant = v;
        quantised.precision = plain.precision = v == ENGINE_BASE || device ? ENGINE_BF16 : ENGINE_F32;
        quantised.device = plain.device = device;
        quantised.placement = device ? ENGINE_STREAMED : ENGINE_PLACEMENT_AUTO;
        if (!picture(&got, &quantised, &why) || (bytes = model_bytes, !picture(&want, &plain, &why)))
            fail_msg("%s, %s: %s", part, format, why.text);
        assert_true(!device || bytes < model_bytes);
        assert_memory_equal(got.rgb, want.rgb, 64 * 64 * 3);
        engine_image_done(&got);
        engine_image_done(&want);
        print_cell(v == ENGINE_BASE ? "base" : "distilled", part, format, "runs");
    }
}

static void every_format_of_a_transformer_runs(void **unused)
{
    (void)unused;
    static struct file f;
    for (enum quant_format format = 0; format < QUANT_FORMAT_COUNT; format++)
        for (int is_gguf = 0; is_gguf < 2; is_gguf++) {
            bool is_plain = format <= QUANT_BF16, only_safetensors = format >= QUANT_FP8_E4M3;
            char text[64];
            if ((!is_plain && only_safetensors == is_gguf) || (device && format != QUANT_Q6_K && format != QUANT_FP8_E4M3))
                continue;
            make(&f, TENSOR_NAMES_TRANSFORMER, is_plain && !is_gguf ? TENSOR_NAMES_DIFFUSERS : TENSOR_NAMES_BFL,
                 is_gguf ? "" : "model.diffusion_model.", format);
            const char *path = path_of(is_gguf ? "x.gguf" : "x.safetensors"), *plain = path_of("plain.safetensors");
            if (is_gguf)
                write_gguf(&f, path, "flux");
            else
                write_safetensors(&f, path, NULL);
            write_meaning(&f, plain);
            file_done(&f);
            snprintf(text, sizeof text, "%s %s", is_gguf ? "GGUF" : "safetensors", quant_info(format)->name);
            expect_equal((struct engine_options){.model_dir = POCKET, .transformer = path},
                         (struct engine_options){.model_dir = POCKET, .transformer = plain}, "transformer", text);
        }
}

/* Matrices of the transformer that are as in the file. */
static int kept_with(struct engine_options o, const char *adapter)
{
    struct engine_model m;
    struct engine_error why;
    struct engine_adapter one = {adapter, 0.75f};
    int kept = 0;
    o.adapters = &one;
    o.adapter_count = adapter != NULL;
    o.precision = ENGINE_BF16;
    o.variant = ENGINE_DISTILLED;
    if (!engine_model_open(&m, &o, &why))
        fail_msg("%s", why.text);
    for (int i = 0; i < m.transformer.linears.count; i++)
        kept += kern_weight_is_kept(m.transformer.linears.linears[i]->weight);
    engine_model_close(&m);
    return kept;
}

/* What runs beside a weight leaves it as it is; what is merged into it is summed in f32 and rounded once, and its neighbours stay. */
static void adapters_leave_quantised_weights_alone_if_they_can(void **unused)
{
    (void)unused;
    static struct file f;
    struct pocket_adapters own = pocket_adapters_make(folder);
    const char *path = path_of("x.safetensors"), *plain = path_of("plain.safetensors");
    const struct engine_options quantised = {.model_dir = POCKET, .transformer = path}, meaning = {.model_dir = POCKET, .transformer = plain};
    const char *const files[] = {"tests/golden/files/lora-peft.safetensors", own.lokr};
    make(&f, TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_BFL, "", QUANT_FP8_E4M3);
    write_safetensors(&f, path, NULL);
    write_meaning(&f, plain);
    file_done(&f);
    for (int i = 0; i < 2; i++) {
        const struct engine_adapter adapter = {files[i], 0.75f};
        struct engine_options one = quantised, other = meaning;
        one.adapters = other.adapters = &adapter;
        one.adapter_count = other.adapter_count = 1;
        expect_equal(one, other, "transformer", i ? "FP8_E4M3 with a LoKr" : "FP8_E4M3 with an adapter");
    }
    int all = kept_with(quantised, NULL);
    assert_true(all > 20);
    assert_int_equal(kept_with(quantised, files[0]), all);
    assert_int_equal(kept_with(quantised, files[1]), all - 1);
}

/* A matrix [64, 64] that is decoded for a LoKr takes twice its codes of the device, and the plan knows of it. */
static void what_an_adapter_is_merged_into_is_planned_without_codes(void **unused)
{
    (void)unused;
    enum { MORE = 64 * 64 };
    static struct file f;
    struct engine *e;
    struct engine_error why;
    const char *path = path_of("x.safetensors");
    struct engine_adapter lokr = {pocket_adapters_make(folder).lokr, 0.75f};
    struct engine_options o = {.model_dir = POCKET, .transformer = path, .variant = ENGINE_DISTILLED, .precision = ENGINE_BF16, .device = device};
    make(&f, TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_BFL, "", QUANT_FP8_E4M3);
    write_safetensors(&f, path, NULL);
    file_done(&f);
    if (!engine_open(&e, &o, &why))
        fail_msg("%s", why.text);
    size_t plain = engine_info(e)->model_bytes;
    assert_true(engine_adapt(e, &lokr, 1, &why));
    assert_int_equal(engine_info(e)->model_bytes, plain + MORE);
    assert_true(engine_adapt(e, NULL, 0, &why));
    assert_int_equal(engine_info(e)->model_bytes, plain);
    engine_close(e);
    o.adapters = &lokr, o.adapter_count = 1;
    if (!engine_open(&e, &o, &why))
        fail_msg("%s", why.text);
    assert_int_equal(engine_info(e)->model_bytes, plain + MORE);
    engine_close(e);
}

/* Pictures of the pocket model with the transformer of a file, `count` of them from `first` on in one batch. */
static void batch_of(struct engine *e, int first, int count, struct engine_image *images)
{
    static const char *const prompts[] = {"a fox", "two red boxes", ""};
    struct engine_request requests[3];
    struct engine_error why;
    for (int i = 0; i < count; i++) {
        requests[i] = (struct engine_request){.prompt = prompts[first + i], .width = 64, .height = 64, .steps = 2, .seed = (uint64_t)(first + i)};
        engine_request_defaults(e, &requests[i]);
    }
    if (!engine_generate(e, requests, count, images, NULL, &why))
        fail_msg("%s", why.text);
}

static struct engine *open_file_in(const char *path, enum engine_precision precision)
{
    struct engine *e;
    struct engine_error why;
    struct engine_options o = {.model_dir = POCKET, .transformer = path, .variant = ENGINE_DISTILLED, .precision = precision, .device = device};
    if (!engine_open(&e, &o, &why))
        fail_msg("%s", why.text);
    return e;
}

/* Near the picture of bf16 and not the same, and the same in any batch: rows without an input_scale have scales of their own. Near: a
 * fifth of the 15 levels that lie between f32 and bf16 on average (tests/golden/README.md); 0.59 were seen. */
static void products_in_fp8_are_a_precision_of_their_own(void **unused)
{
    (void)unused;
    static struct file f;
    const char *path = path_of("x.safetensors");
    make(&f, TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_BFL, "", QUANT_FP8_E4M3);
    write_safetensors(&f, path, NULL);
    file_done(&f);
    struct engine *fp8 = open_file_in(path, ENGINE_FP8), *bf16 = open_file_in(path, ENGINE_BF16);
    struct engine_image together[3], alone, plain[3];
    double levels = 0;
    batch_of(fp8, 0, 3, together);
    batch_of(bf16, 0, 3, plain);
    for (int i = 0; i < 3; i++) {
        batch_of(fp8, i, 1, &alone);
        assert_memory_equal(alone.rgb, together[i].rgb, 64 * 64 * 3);
        for (int j = 0; j < 64 * 64 * 3; j++)
            levels += abs(together[i].rgb[j] - plain[i].rgb[j]) / (3.0 * 64 * 64 * 3);
        engine_image_done(&alone);
        engine_image_done(&together[i]);
        engine_image_done(&plain[i]);
    }
    engine_close(fp8);
    engine_close(bf16);
    print_message("products in FP8 change pictures by a mean of %.2f levels\n", levels);
    assert_true(levels > 0 && levels < 3);
}

static struct made *tensor(struct file *f, const char *name)
{
    for (int i = 0; i < f->count; i++)
        if (strcmp(f->tensors[i].name, name) == 0)
            return &f->tensors[i];
    fail_msg("no tensor %s", name);
    return NULL;
}

static void add_note(struct file *f, const char *layer, const char *text)
{
    char name[TENSOR_NAMES_BYTES_MAX];
    snprintf(name, sizeof name, "%s.comfy_quant", layer);
    size_t bytes = strlen(text);
    memcpy(add(f, name, "U8", 1, (int64_t[]){(int64_t)bytes}, bytes)->data, text, bytes);
}

static struct engine_image in_fp8(const struct file *f, const char *metadata)
{
    const char *path = path_of("x.safetensors");
    struct engine_image image;
    write_safetensors(f, path, metadata);
    struct engine *e = open_file_in(path, ENGINE_FP8);
    batch_of(e, 0, 1, &image);
    engine_close(e);
    return image;
}

/* What a file says of all its layers in FP8 but the first: that they multiply in full precision. */
static void keep_all_but_one(struct file *f, char *metadata, size_t bytes)
{
    int used = snprintf(metadata, bytes, "{\\\"layers\\\":{"), weights = f->count;
    for (int i = 0, seen = 0; i < weights; i++) {
        const struct made *t = &f->tensors[i];
        if (t->format != QUANT_FP8_E4M3 || !t->n || seen++ == 0)
            continue;
        int length = (int)strlen(t->name) - (int)strlen(".weight");
        used += snprintf(metadata + used, bytes - (size_t)used, "%s\\\"%.*s\\\":{\\\"format\\\":\\\"float8_e4m3fn\\\",\\\"full_precision_matrix_mult\\\":true}",
                         seen > 2 ? "," : "", length, t->name);
        char layer[TENSOR_NAMES_BYTES_MAX];
        snprintf(layer, sizeof layer, "%.*s", length, t->name);
        add_note(f, layer, "{\"format\": \"float8_e4m3fn\", \"full_precision_matrix_mult\": true}");
    }
    snprintf(metadata + used, bytes - (size_t)used, "}}");
}

/* A layer that its file keeps to full precision is, in precision fp8, the matrix of its values: who made the file found that rounding
 * its inputs shows. */
static void a_layer_kept_in_full_precision_has_no_products_in_fp8(void **unused)
{
    (void)unused;
    static char metadata[16384];
    static struct file f;
    make(&f, TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_BFL, "", QUANT_FP8_E4M3);
    int count = f.count;
    struct engine_image without = in_fp8(&f, NULL);
    keep_all_but_one(&f, metadata, sizeof metadata);
    assert_true(f.count > count + 10);
    struct engine_image by_note = in_fp8(&f, NULL);
    while (f.count > count)
        free(f.tensors[--f.count].data);
    struct engine_image by_metadata = in_fp8(&f, metadata);
    for (int i = 0, seen = 0; i < f.count; i++) { /* the same values in F32 */
        struct made *t = &f.tensors[i];
        if (t->format != QUANT_FP8_E4M3 || !t->n || seen++ == 0)
            continue;
        t->bytes = (size_t)(t->n * t->k) * sizeof *t->values, t->dtype = "F32";
        t->data = realloc(t->data, t->bytes);
        memcpy(t->data, t->values, t->bytes);
    }
    struct engine_image meant = in_fp8(&f, NULL);
    assert_memory_equal(by_metadata.rgb, meant.rgb, 64 * 64 * 3);
    assert_memory_equal(by_note.rgb, meant.rgb, 64 * 64 * 3);
    assert_memory_not_equal(without.rgb, meant.rgb, 64 * 64 * 3);
    engine_image_done(&without);
    engine_image_done(&by_metadata);
    engine_image_done(&by_note);
    engine_image_done(&meant);
    file_done(&f);
}

static void a_text_encoder_runs_under_every_scheme(void **unused)
{
    (void)unused;
    static const struct { enum tensor_names_scheme scheme; const char *prefix; enum quant_format format; const char *text; } cases[] = {
        {TENSOR_NAMES_DIFFUSERS, "", QUANT_F16, "safetensors F16"},
        {TENSOR_NAMES_BARE, "", QUANT_FP8_E4M3, "safetensors FP8_E4M3"},
        {TENSOR_NAMES_DIFFUSERS, "text_encoders.qwen3_4b.transformer.", QUANT_NVFP4, "safetensors NVFP4"},
        {TENSOR_NAMES_LLAMA, "", QUANT_Q8_0, "GGUF Q8_0"},
        {TENSOR_NAMES_LLAMA, "", QUANT_Q6_K, "GGUF Q6_K"},
        {TENSOR_NAMES_LLAMA, "", QUANT_BF16, "GGUF BF16"},
    };
    static struct file f;
    for (size_t i = device ? 2 : 0; i < (device ? 3 : sizeof cases / sizeof *cases); i++) {
        bool is_gguf = cases[i].scheme == TENSOR_NAMES_LLAMA;
        make(&f, TENSOR_NAMES_TEXT_ENCODER, cases[i].scheme, cases[i].prefix, cases[i].format);
        const char *path = path_of(is_gguf ? "t.gguf" : "t.safetensors"), *plain = path_of("plain.safetensors");
        if (is_gguf)
            write_gguf(&f, path, "qwen3");
        else
            write_safetensors(&f, path, NULL);
        write_meaning(&f, plain);
        file_done(&f);
        expect_equal((struct engine_options){.model_dir = POCKET, .text_encoder = path},
                     (struct engine_options){.model_dir = POCKET, .text_encoder = plain}, "text_encoder", cases[i].text);
    }
}

/* --- refusals ------------------------------------------------------------------------------------------------ */

static void expect_refusal(struct engine_options o, const char *part, const char *format, const char *says)
{
    struct engine_image image;
    struct engine_error why = {0};
    assert_false(picture(&image, &o, &why));
    assert_int_equal(why.fault, ENGINE_BAD_MODEL);
    if (!strstr(why.text, says))
        fail_msg("'%s' does not say '%s'", why.text, says);
    print_cell("-", part, format, says);
}

/* A transformer of pocket with one thing changed. */
static void refuse_changed(enum quant_format format, void (*change)(struct file *f), const char *metadata, const char *text, const char *says)
{
    static struct file f;
    make(&f, TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_BFL, "", format);
    if (change)
        change(&f);
    const char *path = path_of("x.safetensors");
    write_safetensors(&f, path, metadata);
    file_done(&f);
    expect_refusal((struct engine_options){.model_dir = POCKET, .transformer = path, .variant = ENGINE_DISTILLED}, "transformer", text, says);
}

static void to_e5m2(struct file *f) { tensor(f, "double_blocks.0.img_attn.proj.weight")->dtype = "F8_E5M2"; }
static void to_i8(struct file *f) { tensor(f, "double_blocks.0.img_attn.proj.weight")->dtype = "I8"; }
static void to_u8(struct file *f) { tensor(f, "double_blocks.0.img_attn.proj.weight")->dtype = "U8"; }
static void to_nan(struct file *f) { tensor(f, "double_blocks.1.img_attn.proj.weight")->data[7] = 0x7f; }
static void to_flux1(struct file *f) { struct made *t = tensor(f, "img_in.weight"); t->shape[0] *= 2, t->shape[1] /= 2; }
static void to_bad_scale(struct file *f) { memcpy(tensor(f, "single_blocks.0.linear1.weight_scale")->data, "\0\0\xc0\x7f", 4); }
static void to_no_input(struct file *f) { memset(add(f, "single_blocks.0.linear1.input_scale", "F32", 0, NULL, 4)->data, 0, 4); }
static void to_row_scales(struct file *f)
{
    struct made *t = tensor(f, "single_blocks.0.linear1.weight_scale");
    t->rank = 1, t->shape[0] = 576, t->bytes = 576 * 4;
    t->data = realloc(t->data, t->bytes);
    memset(t->data, 0, t->bytes);
}
static void to_awq(struct file *f) { add(f, "single_blocks.0.linear1.pre_quant_scale", "F32", 1, (int64_t[]){64}, 256); }
static void to_rotated(struct file *f) { add_note(f, "single_blocks.0.linear1", "{\"format\":\"float8_e4m3fn\",\"convrot\":true}"); }
static void to_unsure(struct file *f) { add_note(f, "single_blocks.0.linear1", "{\"format\":\"float8_e4m3fn\",\"full_precision_matrix_mult\":1}"); }
static void to_full_precision(struct file *f) { add(f, "scaled_fp8", "F8_E4M3", 1, (int64_t[]){2}, 2); }
static void to_dev(struct file *f) { add(f, "guidance_in.in_layer.weight", "F32", 1, (int64_t[]){1}, 4); }
static void to_missing(struct file *f) { snprintf(tensor(f, "double_blocks.0.img_attn.qkv.weight")->name, 40, "other.weight"); }

static void what_is_not_understood_is_refused_with_its_sentence(void **unused)
{
    (void)unused;
    static const char mx[] = "{\\\"layers\\\":{\\\"single_blocks.0.linear1\\\":{\\\"format\\\":\\\"mxfp8\\\"}}}";
    static const char wrong[] = "{\\\"layers\\\":{\\\"single_blocks.0.linear1\\\":{\\\"format\\\":\\\"nvfp4\\\"}}}";
    static struct file f;
    refuse_changed(QUANT_FP8_E4M3, to_e5m2, NULL, "safetensors F8_E5M2", "dtype F8_E5M2, accepted: F32, BF16, F16, F8_E4M3, NVFP4");
    refuse_changed(QUANT_FP8_E4M3, to_i8, NULL, "safetensors I8", "dtype I8, accepted: F32, BF16, F16, F8_E4M3, NVFP4");
    refuse_changed(QUANT_FP8_E4M3, to_u8, NULL, "safetensors U8 without scales", "dtype U8, accepted: NVFP4");
    refuse_changed(QUANT_FP8_E4M3, to_nan, NULL, "fp8 with NaN", "has NaN or infinite values");
    refuse_changed(QUANT_FP8_E4M3, to_bad_scale, NULL, "fp8, scale NaN", "FP8_E4M3 with a scale of nan");
    refuse_changed(QUANT_FP8_E4M3, to_no_input, NULL, "fp8, inputs divided by 0", "a scale of 0, want one that is positive");
    refuse_changed(QUANT_FP8_E4M3, to_row_scales, NULL, "fp8, scales per row", "a scale of several values; accepted: one");
    refuse_changed(QUANT_FP8_E4M3, NULL, mx, "fp8 that says mxfp8", "its metadata calls it 'mxfp8', what stands there is FP8_E4M3");
    refuse_changed(QUANT_FP8_E4M3, NULL, wrong, "fp8 that says nvfp4", "its metadata calls it 'nvfp4', what stands there is FP8_E4M3");
    refuse_changed(QUANT_FP8_E4M3, NULL, "[", "metadata that is no JSON", "'_quantization_metadata': not valid JSON");
    refuse_changed(QUANT_FP8_E4M3, to_awq, NULL, "fp8, inputs scaled by columns", "inputs scaled by columns (AWQ) are not accepted");
    refuse_changed(QUANT_FP8_E4M3, to_rotated, NULL, "fp8, inputs rotated", "its metadata has 'convrot', accepted: 'format', a name, and");
    refuse_changed(QUANT_FP8_E4M3, to_unsure, NULL, "fp8, precision 1", "its metadata has 'full_precision_matrix_mult', accepted: 'format'");
    refuse_changed(QUANT_BF16, to_flux1, NULL, "FLUX.1", "tensor 'img_in.weight' has 64 along axis 1, accepted: 128 to 128");
    refuse_changed(QUANT_BF16, to_dev, NULL, "FLUX.2 [dev]", "is an embedding of the guidance, which the klein family does not have");
    refuse_changed(QUANT_BF16, to_missing, NULL, "a tensor missing", "tensor 'double_blocks.0.img_attn.qkv.weight' is missing");
    expect_refusal((struct engine_options){.model_dir = POCKET, .transformer = "tests/golden/files/lora-bfl.safetensors", .variant = ENGINE_BASE},
                   "transformer", "a LoRA", "has no tensors of a FLUX.2 transformer under any known name");
    expect_refusal((struct engine_options){.model_dir = POCKET, .vae = "tests/golden/files/lora-bfl.safetensors"},
                   "vae", "a LoRA", "has no tensors of a FLUX.2 VAE under any known name");
    expect_refusal((struct engine_options){.model_dir = POCKET, .precision = ENGINE_FP8}, "transformer", "bf16, products in FP8",
                   "precision fp8: neither the transformer nor the text encoder has a matrix in FP8 (F8_E4M3); accepted: bf16, f32");
    make(&f, TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_BFL, "", QUANT_FP8_E4M3);
    to_full_precision(&f);
    write_safetensors(&f, path_of("x.safetensors"), NULL);
    file_done(&f);
    expect_refusal((struct engine_options){.model_dir = POCKET, .transformer = path_of("x.safetensors"), .variant = ENGINE_DISTILLED, .precision = ENGINE_FP8},
                   "transformer", "fp8, all in full precision", "has a matrix in FP8 (F8_E4M3) that its file does not keep in full precision");
    expect_refusal((struct engine_options){.transformer = "x"}, "text_encoder", "not given", "no files for the text_encoder: give a model folder");
    make(&f, TENSOR_NAMES_TEXT_ENCODER, TENSOR_NAMES_LLAMA, "", QUANT_Q8_0);
    write_gguf(&f, path_of("l.gguf"), "llama");
    file_done(&f);
    expect_refusal((struct engine_options){.model_dir = POCKET, .text_encoder = path_of("l.gguf")}, "text_encoder", "GGUF of llama",
                   "'general.architecture' is 'llama', the text encoder of this family is qwen3");
}

static void variants_are_told_by_name_or_index_or_asked_for(void **unused)
{
    (void)unused;
    static const struct { const char *name; int told, is_distilled, is_kv; } names[] = {
        {"flux-2-klein-4b-Q4_K_M.gguf", 1, 1, 0}, {"flux-2-klein-base-4b.safetensors", 1, 0, 0}, {"flux-2-klein-9b-kv-fp8.safetensors", 1, 1, 1},
        {"Klein_Base_9B.safetensors", 1, 0, 0},   {"my-distilled.gguf", 1, 1, 0},               {"model.safetensors", 0, 0, 0},
        {"database.safetensors", 0, 0, 0},        {"base-distilled.gguf", 0, 0, 0},
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        struct model_variant v = {0};
        assert_int_equal(model_variant_of_name(&v, names[i].name), names[i].told);
        if (names[i].told)
            assert_true(v.is_distilled == names[i].is_distilled && v.is_kv == names[i].is_kv);
    }
    static struct file f;
    make(&f, TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_BFL, "", QUANT_BF16);
    write_safetensors(&f, path_of("unnamed.safetensors"), NULL);
    write_safetensors(&f, path_of("klein-base.safetensors"), NULL);
    file_done(&f);
    struct model_variant v;
    struct engine_error why;
    expect_refusal((struct engine_options){.model_dir = POCKET, .transformer = path_of("unnamed.safetensors")}, "transformer",
                   "variant untold", "say which with --distilled or --base");
    assert_true(model_variant_tell(&v, path_of("klein-base.safetensors"), NULL, &why) && !v.is_distilled);
    assert_true(model_variant_tell(&v, POCKET "/transformer/diffusion_pytorch_model.safetensors", NULL, &why) && v.is_distilled);
    assert_true(model_variant_tell(&v, "tests/golden/models/base/transformer", NULL, &why) && !v.is_distilled);
    assert_true(model_variant_tell(&v, "tests/golden/models/kv/transformer", NULL, &why) && v.is_kv);
    assert_int_equal(symlink("/dev/null", path_of("model_index.json")), 0); /* no index: not a regular file */
    assert_false(model_variant_tell(&v, path_of("unnamed.safetensors"), NULL, &why));
    unlink(path_of("model_index.json"));
    FILE *index = fopen(path_of("model_index.json"), "w");
    fputs("{\"_class_name\":\"Flux2KleinPipeline\",\"is_distilled\":true}", index);
    fclose(index);
    assert_true(model_variant_tell(&v, path_of("unnamed.safetensors"), NULL, &why) && v.is_distilled);
    assert_false(model_variant_tell(&v, path_of("klein-base.safetensors"), NULL, &why)); /* name and index disagree */
    assert_non_null(strstr(why.text, "Its name says one, the model_index.json beside it the other"));
}

static const char *said_sha256;
static bool say_sha256(const char *path, char ret[65])
{
    (void)path;
    snprintf(ret, 65, "%s", said_sha256);
    return true;
}

/* Files of the published sizes, of nothing but a hole. Distilled and base weights in bf16 differ in nothing that a header shows. */
static void published_files_are_told_by_hash_and_by_size_where_nothing_denies_it(void **unused)
{
    (void)unused;
    static const char distilled_4b[] = "ec3d4e733a771f61c052fb4856c48b336c55eaf2c65487c2a1faeb9bbda7a343";
    static const char base_4b[] = "9c5fed22b76baea749d88fc2abe3ad53245e7b21a0d353a762665eea00043b92";
    static const char fp8_4b[] = "97ed34fe0567e436200f2faee3939b88f2b5d99f8af2a4dc16532c4245c0ccb6";
    static const struct { off_t bytes; const char *name, *sha256; int told, is_distilled, is_kv; } cases[] = {
        {7751105712, "a.safetensors", distilled_4b, 1, 1, 0},
        {7751105712, "b.safetensors", base_4b, 1, 0, 0},
        {7751105712, "klein-base-of-mine.safetensors", distilled_4b, 1, 1, 0}, /* renamed: its bytes are what it is */
        {7751105712, "c.safetensors", fp8_4b + 1, 0, 0, 0},                    /* somebody's own */
        {7751105712, "klein-base-d.safetensors", fp8_4b + 1, 1, 0, 0},
        {7751105712, "e.safetensors", NULL, 0, 0, 0},                          /* nobody hashes */
        {9818935984, "f.safetensors", NULL, 1, 1, 1},
        {4070624520, "g.safetensors", NULL, 1, 1, 0},
        {4070624520, "klein-base-h.safetensors", fp8_4b + 1, 1, 0, 0},         /* as large as the distilled one, and is not it */
        {4070624520, "klein-base-i.safetensors", fp8_4b, 1, 1, 0},
    };
    unlink(path_of("model_index.json"));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct model_variant v = {0};
        struct engine_error why;
        const char *path = path_of(cases[i].name);
        FILE *f = fopen(path, "w");
        assert_non_null(f);
        assert_int_equal(ftruncate(fileno(f), cases[i].bytes), 0);
        fclose(f);
        said_sha256 = cases[i].sha256;
        bool is_told = model_variant_tell(&v, path, said_sha256 ? say_sha256 : NULL, &why);
        unlink(path);
        if (is_told != cases[i].told || (is_told && (v.is_distilled != cases[i].is_distilled || v.is_kv != cases[i].is_kv)))
            fail_msg("%s of %lld bytes: told %d, distilled %d, kv %d", cases[i].name, (long long)cases[i].bytes, is_told, v.is_distilled, v.is_kv);
    }
}

static void dimensions_are_told_from_tensors(void **unused)
{
    (void)unused;
    struct engine_error why;
    struct model_config told = {0}, read;
    struct weight_files *f;
    assert_true(model_config_load(&read, POCKET, &why));
    assert_true(weight_files_open(&f, TENSOR_NAMES_TRANSFORMER, POCKET "/transformer", &why));
    assert_true(model_shape_transformer(&told.transformer, f, &why));
    assert_memory_equal(&told.transformer, &read.transformer, sizeof read.transformer);
    weight_files_close(f);
    assert_true(weight_files_open(&f, TENSOR_NAMES_TEXT_ENCODER, POCKET "/text_encoder", &why));
    assert_true(model_shape_text_encoder(&told.text, f, &why));
    told.text.num_hidden_layers = read.text.num_hidden_layers; /* unused layers are not kept here */
    assert_memory_equal(&told.text, &read.text, sizeof read.text);
    weight_files_close(f);
    assert_true(weight_files_open(&f, TENSOR_NAMES_VAE, POCKET "/vae", &why));
    assert_false(model_shape_vae(&told.vae, f, &why));
    assert_non_null(strstr(why.text, "needs its config.json beside the file"));
    weight_files_close(f);
}

static int make_folder(void **unused)
{
    (void)unused;
    snprintf(folder, sizeof folder, "/tmp/kiln-weights.XXXXXX");
    return mkdtemp(folder) ? 0 : 1;
}

static int remove_folder(void **unused)
{
    (void)unused;
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", folder);
    return system(command);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest on_a_device[] = {
        cmocka_unit_test(every_format_of_a_transformer_runs),
        cmocka_unit_test(what_an_adapter_is_merged_into_is_planned_without_codes),
        cmocka_unit_test(products_in_fp8_are_a_precision_of_their_own),
        cmocka_unit_test(a_layer_kept_in_full_precision_has_no_products_in_fp8),
        cmocka_unit_test(a_text_encoder_runs_under_every_scheme),
    };
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(dimensions_are_told_from_tensors),
        cmocka_unit_test(every_format_of_a_transformer_runs),
        cmocka_unit_test(adapters_leave_quantised_weights_alone_if_they_can),
        cmocka_unit_test(products_in_fp8_are_a_precision_of_their_own),
        cmocka_unit_test(a_layer_kept_in_full_precision_has_no_products_in_fp8),
        cmocka_unit_test(a_text_encoder_runs_under_every_scheme),
        cmocka_unit_test(what_is_not_understood_is_refused_with_its_sentence),
        cmocka_unit_test(variants_are_told_by_name_or_index_or_asked_for),
        cmocka_unit_test(published_files_are_told_by_hash_and_by_size_where_nothing_denies_it),
    };
    is_quick = argc > 1 && strcmp(argv[1], "quick") == 0;
    device = argc > 1 && !is_quick ? argv[1] : NULL;
    return device ? cmocka_run_group_tests(on_a_device, make_folder, remove_folder)
                  : cmocka_run_group_tests(tests, make_folder, remove_folder);
}
