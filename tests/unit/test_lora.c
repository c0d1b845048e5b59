/* test_lora.c - an adapter changes the weights its training changed, by the amount it was trained with, whatever program
 * wrote the file. A wrong scale is a weak or burnt picture, a wrong row order a ruined one, an ignored key a lie.
 *
 * data/lora-*.safetensors and what they mean are made by tests/golden/adapters.py, formulas there; the files under
 * golden/files by golden/make.py, what they mean by adapters.py as well. */
#include "lora.h"

#include <jansson.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "lora_shape.h"

static const struct transformer_config pocket = {.hidden = 64,
                                                 .attention_head_dim = 32,
                                                 .num_attention_heads = 2,
                                                 .num_layers = 2,
                                                 .num_single_layers = 3,
                                                 .joint_attention_dim = 96,
                                                 .in_channels = 128,
                                                 .mlp_hidden = 192,
                                                 .timestep_guidance_channels = 256};

static struct safetensors *expected;

static int open_expected(void **state)
{
    (void)state;
    struct engine_error why;
    return safetensors_open_file(&expected, "tests/unit/data/lora-expected.safetensors", &why) ? 0 : -1;
}

static int close_expected(void **state)
{
    (void)state;
    safetensors_close(expected);
    return 0;
}

static struct lora *open_lora(const char *name)
{
    char path[256];
    struct lora *l;
    struct engine_error why;
    snprintf(path, sizeof path, "tests/unit/data/lora-%s.safetensors", name);
    if (!lora_open(&l, path, &lora_shape, &why))
        fail_msg("%s", why.text);
    return l;
}

/* `kind`.TENSOR as f32, malloc'ed; NULL: no such. */
static float *values_of(const char *kind, const char *tensor, int64_t n, int64_t k)
{
    char name[300];
    snprintf(name, sizeof name, "%s.%s", kind, tensor);
    const struct safetensors_entry *e = safetensors_find(expected, name);
    if (!e)
        return NULL;
    assert_true(e->rank == 2 && e->shape[0] == n && e->shape[1] == k);
    float *values = malloc(e->bytes);
    memcpy(values, e->data, e->bytes);
    return values;
}

/* f32 sums of at most 64 products of numbers below 4, and for DoRA a base of a few units taken away again: 64 roundings
 * of 2^-24 relative to the largest term, 16, is 6e-5; what is off by a factor or a row is off by 1e-1. */
#define TOLERANCE 6e-5f

static size_t expect_deltas(const struct lora *l, const char *kind)
{
    for (size_t i = 0; i < lora_count(l); i++) {
        const struct lora_target *t = lora_at(l, i);
        struct engine_error why;
        float *want = values_of(kind, t->name, t->n, t->k), *base = values_of("base", t->name, t->n, t->k);
        if (!want)
            fail_msg("%s: '%s' was not to be changed", kind, t->name);
        float *got = malloc((size_t)(t->n * t->k) * sizeof *got);
        assert_true(lora_delta(got, t, lora_needs_base(t) ? base : NULL, &why));
        for (int64_t v = 0; v < t->n * t->k; v++)
            if (!(fabsf(got[v] - want[v]) <= TOLERANCE))
                fail_msg("%s: '%s': value %lld is %g, want %g", kind, t->name, (long long)v, (double)got[v],
                         (double)want[v]);
        free(got), free(base), free(want);
    }
    size_t wanted = 0;
    for (size_t i = 0; i < safetensors_count(expected); i++)
        wanted += strncmp(safetensors_at(expected, i)->name, kind, strlen(kind)) == 0;
    assert_int_equal(lora_count(l), wanted);
    return wanted;
}

static void the_same_adapter_in_five_styles_is_the_same_change(void **state)
{
    (void)state;
    static const char *const styles[] = {"peft", "raw", "bfl", "comfy", "kohya"};
    for (size_t i = 0; i < 5; i++) {
        struct lora *l = open_lora(styles[i]);
        assert_int_equal(expect_deltas(l, "plain"), 12);
        for (size_t t = 0; t < lora_count(l); t++) {
            assert_string_equal(lora_kind_name(lora_at(l, t)), "lora");
            assert_int_equal(lora_at(l, t)->rank, 3);
            assert_ptr_equal(lora_find(l, lora_at(l, t)->name), lora_at(l, t));
        }
        assert_null(lora_find(l, "proj_out.weight"));
        lora_close(l);
    }
}

/* Beside the weights: up (down x), instead of (W + delta) x. */
static void factors_beside_the_weights_are_the_same_change(void **state)
{
    (void)state;
    static const char *const styles[] = {"peft", "bfl", "kohya"};
    for (size_t s = 0; s < 3; s++) {
        struct lora *l = open_lora(styles[s]);
        for (size_t i = 0; i < lora_count(l); i++) {
            const struct lora_target *t = lora_at(l, i);
            struct engine_error why;
            assert_true(lora_is_low_rank(t));
            float *down = malloc((size_t)(t->rank * t->k) * 4), *up = malloc((size_t)(t->n * t->rank) * 4);
            float *want = values_of("plain", t->name, t->n, t->k);
            lora_down(down, t);
            assert_true(lora_up(up, t, &why));
            for (int64_t n = 0; n < t->n; n++)
                for (int64_t k = 0; k < t->k; k++) {
                    float sum = 0;
                    for (int64_t r = 0; r < t->rank; r++)
                        sum += up[n * t->rank + r] * down[r * t->k + k];
                    assert_true(fabsf(t->scale * sum - want[n * t->k + k]) <= TOLERANCE);
                }
            free(down), free(up), free(want);
        }
        lora_close(l);
    }
}

static void other_kinds_follow_their_formulas(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        size_t targets;
    } kinds[] = {{"loha", 4}, {"lokr", 6}, {"dora", 5}};
    for (size_t i = 0; i < 3; i++) {
        struct lora *l = open_lora(kinds[i].name);
        assert_int_equal(expect_deltas(l, kinds[i].name), kinds[i].targets);
        for (size_t t = 0; t < lora_count(l); t++) {
            assert_string_equal(lora_kind_name(lora_at(l, t)), kinds[i].name);
            assert_false(lora_is_low_rank(lora_at(l, t)));
            assert_int_equal(lora_needs_base(lora_at(l, t)), i == 2);
        }
        lora_close(l);
    }
}

static void golden_adapters_change_what_diffusers_changed(void **state)
{
    (void)state;
    json_error_t at;
    json_t *golden = json_load_file("tests/golden/files/lora.json", 0, &at), *targets, *row;
    const char *file, *name;
    int files = 0;
    assert_non_null(golden);
    json_object_foreach(golden, file, targets)
    {
        char path[256];
        struct lora *l;
        struct engine_error why;
        snprintf(path, sizeof path, "tests/golden/files/%s", file);
        if (access(path, R_OK) != 0) /* some are made by make.py only */
            continue;
        files++;
        if (!lora_open(&l, path, &pocket, &why))
            fail_msg("%s", why.text);
        assert_int_equal(lora_count(l), json_object_size(targets));
        json_object_foreach(targets, name, row)
        {
            const struct lora_target *t = lora_find(l, name);
            if (!t)
                fail_msg("%s: '%s' is not changed", file, name);
            float *delta = malloc((size_t)(t->n * t->k) * sizeof *delta);
            double squares = 0, wave = 0;
            assert_true(lora_delta(delta, t, NULL, &why));
            for (int64_t v = 0; v < t->n * t->k; v++) {
                squares += (double)delta[v] * (double)delta[v];
                wave += (double)delta[v] * cos((double)v); /* changes with every order of rows or columns */
            }
            double size = sqrt(squares), want = json_number_value(json_array_get(row, 0));
            if (fabs(size - want) > 1e-6 * want ||
                fabs(wave - json_number_value(json_array_get(row, 1))) > 1e-6 * want * 128)
                fail_msg("%s: '%s': size %.9g and wave %.9g, want %.9g and %.9g", file, name, size, wave, want,
                         json_number_value(json_array_get(row, 1)));
            free(delta);
        }
        lora_close(l);
    }
    assert_true(files >= 1);
    json_decref(golden);
}

/* --- files made here ----------------------------------------------------------------------------------------- */

struct file {
    struct safetensors_item items[16];
    char names[16][128];
    float *values[16];
    size_t count;
    const char *metadata; /* lora_adapter_metadata */
};

static void put(struct file *f, const char *name, int64_t n, int64_t k)
{
    snprintf(f->names[f->count], sizeof f->names[0], "%s", name);
    float *values = f->values[f->count] = calloc((size_t)(n * k), sizeof *values);
    for (int64_t i = 0; i < n * k; i++)
        values[i] = (float)(i % 7) - 3;
    f->items[f->count] = (struct safetensors_item){f->names[f->count], tensor_2d(values, TENSOR_F32, n, k)};
    f->count++;
}

static void put_pair(struct file *f, const char *module, int64_t n, int64_t k)
{
    char name[128];
    snprintf(name, sizeof name, "%s.lora_A.weight", module);
    put(f, name, 2, k);
    snprintf(name, sizeof name, "%s.lora_B.weight", module);
    put(f, name, n, 2);
}

static void put_scalar(struct file *f, const char *name, float value)
{
    put(f, name, 1, 1);
    f->values[f->count - 1][0] = value;
    f->items[f->count - 1].value = tensor_1d(f->values[f->count - 1], TENSOR_F32, 1);
}

/* safetensors_write knows no metadata: it is put into the header here. */
static void add_metadata(const char *path, const char *text)
{
    static uint8_t data[1 << 16];
    FILE *f = fopen(path, "rb");
    size_t bytes = fread(data, 1, sizeof data, f);
    fclose(f);
    uint64_t head;
    memcpy(&head, data, 8);
    json_t *root = json_loadb((char *)data + 8, head, 0, NULL);
    json_object_set_new(root, "__metadata__", json_pack("{s:s}", "lora_adapter_metadata", text));
    char *json = json_dumps(root, JSON_COMPACT);
    uint64_t length = strlen(json);
    f = fopen(path, "wb");
    fwrite(&length, 8, 1, f);
    fwrite(json, 1, length, f);
    fwrite(data + 8 + head, 1, bytes - 8 - head, f);
    fclose(f);
    free(json);
    json_decref(root);
}

static bool open_made(struct lora **ret, struct file *f, struct engine_error *why)
{
    char path[] = "/tmp/kiln-lora-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    assert_true(safetensors_write(path, f->items, f->count, why));
    if (f->metadata)
        add_metadata(path, f->metadata);
    bool ok = lora_open(ret, path, &lora_shape, why);
    unlink(path);
    for (size_t i = 0; i < f->count; i++)
        free(f->values[i]);
    *f = (struct file){0};
    return ok;
}

/* Factors that have more values than the weight would take more memory beside it than in it. */
static void a_rank_that_is_not_low_is_told(void **state)
{
    (void)state;
    static const struct { int64_t rank; bool is_low; } cases[] = {{5, true}, {6, false}, {40, false}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct file f = {0};
        struct lora *l;
        struct engine_error why;
        put(&f, "transformer.proj_out.lora_A.weight", cases[i].rank, 16), put(&f, "transformer.proj_out.lora_B.weight", 8, cases[i].rank);
        assert_true(open_made(&l, &f, &why));
        assert_int_equal(lora_is_low_rank(lora_at(l, 0)), cases[i].is_low); /* rank * (8 + 16) values of 8 * 16 */
        lora_close(l);
    }
}

static void expect_refused(struct file *f, const char *word)
{
    struct lora *l = NULL;
    struct engine_error why = {0};
    if (open_made(&l, f, &why))
        fail_msg("accepted, want a refusal that says '%s'", word);
    if (!strstr(why.text, word) || why.fault != ENGINE_BAD_MODEL)
        fail_msg("'%s' does not say '%s'", why.text, word);
}

static void keys_that_match_nothing_are_listed(void **state)
{
    (void)state;
    struct file f = {0};
    put_pair(&f, "transformer.transformer_blocks.0.attn.to_q", 16, 16);
    put_pair(&f, "lora_te_text_model_encoder_layers_0_mlp_fc1", 16, 16);
    put_pair(&f, "transformer.transformer_blocks.7.attn.to_q", 16, 16); /* a block this model does not have */
    put(&f, "transformer.transformer_blocks.0.attn.to_q.diff", 16, 16);
    put(&f, "transformer.transformer_blocks.0.attn.norm_q.alpha", 1, 1);
    expect_refused(&f, "6 of 8 keys match no linear of the transformer: "
                       "'lora_te_text_model_encoder_layers_0_mlp_fc1.lora_A.weight', ");
    put_pair(&f, "transformer.transformer_blocks.0.attn.to_q", 16, 16);
    put(&f, "unrelated", 1, 1);
    expect_refused(&f, "1 of 3 keys match no linear of the transformer: 'unrelated'");
    expect_refused(&f, "no tensors");
}

static void modules_are_found_under_every_prefix(void **state)
{
    (void)state;
    static const char *const modules[] = {"transformer.transformer_blocks.0.attn.to_q",
                                          "diffusion_model.transformer_blocks.0.attn.to_q",
                                          "base_model.model.transformer_blocks.0.attn.to_q",
                                          "transformer_blocks.0.attn.to_q",
                                          "base_model.model.transformer.transformer_blocks.0.attn.to_q",
                                          "model.diffusion_model.transformer_blocks.0.attn.to_q",
                                          "lora_unet_transformer_blocks_0_attn_to_q",
                                          "lora_transformer_transformer_blocks_0_attn_to_q",
                                          "lycoris_transformer_blocks_0_attn_to_q",
                                          "diffusion_model.sformer_blocks.0.attn.to_q"};
    struct file f = {0};
    struct lora *l;
    struct engine_error why;
    for (size_t i = 0; i < sizeof modules / sizeof *modules; i++) {
        put_pair(&f, modules[i], 16, 16);
        if (!open_made(&l, &f, &why))
            fail_msg("%s", why.text);
        assert_int_equal(lora_count(l), 1);
        assert_string_equal(lora_at(l, 0)->name, "transformer_blocks.0.attn.to_q.weight");
        assert_true(lora_at(l, 0)->scale == 1);
        lora_close(l);
    }
    put_pair(&f, "diffusion_model.le_transformer_blocks.0.attn.to_out", 16, 64);
    assert_true(open_made(&l, &f, &why));
    assert_string_equal(lora_at(l, 0)->name, "single_transformer_blocks.0.attn.to_out.weight");
    lora_close(l);
}

static void scale_is_alpha_over_rank_as_the_file_says(void **state)
{
    (void)state;
    static const struct {
        const char *metadata;
        float alpha; /* 0: no tensor */
        double scale;
    } cases[] = {
        {NULL, 0, 1},
        {NULL, 1, 0.5},
        {"{\"transformer.lora_alpha\": 8, \"transformer.r\": 2}", 0, 4},
        {"{\"lora_alpha\": 8, \"r\": 2}", 0, 4},
        {"{\"lora_alpha\": 8, \"r\": 2}", 1, 0.5}, /* the tensor wins */
        {"{\"lora_alpha\": 8, \"alpha_pattern\": {\"attn.to_q\": 16}}", 0, 8},
        {"{\"lora_alpha\": 8, \"alpha_pattern\": {\"to_k\": 16, \"o_q\": 3}}", 0, 4},
        {"{\"lora_alpha\": 8, \"alpha_pattern\": {\"^transformer_blocks.0.attn.to_q\": 5}}", 0, 2.5},
        {"{\"lora_alpha\": 8, \"r\": 64, \"rank_pattern\": {\"to_q\": 2}}", 0, 4},
        {"{\"lora_alpha\": 8, \"use_rslora\": true}", 0, 5.656854249492381},
        {"{}", 0, 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct file f = {.metadata = cases[i].metadata};
        struct lora *l;
        struct engine_error why;
        put_pair(&f, "transformer.transformer_blocks.0.attn.to_q", 16, 16);
        if (cases[i].alpha != 0)
            put_scalar(&f, "transformer.transformer_blocks.0.attn.to_q.alpha", cases[i].alpha);
        if (!open_made(&l, &f, &why))
            fail_msg("%s", why.text);
        assert_true(lora_at(l, 0)->scale == (float)cases[i].scale);
        lora_close(l);
    }
    static const struct {
        const char *metadata, *word;
    } bad[] = {
        {"[]", "not a JSON object"},
        {"{", "lora_adapter_metadata: not valid JSON"},
        {"{\"r\": 4}", "rank 2, lora_adapter_metadata says 4"},
        {"{\"lora_alpha\": \"8\"}", "is no number"},
        {"{\"alpha_pattern\": {\".*to_q\": 8}}", "not regular expressions"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct file f = {.metadata = bad[i].metadata};
        put_pair(&f, "transformer.transformer_blocks.0.attn.to_q", 16, 16);
        expect_refused(&f, bad[i].word);
    }
}

static void files_that_make_no_sense_are_refused(void **state)
{
    (void)state;
    struct file f = {0};
    put(&f, "transformer.proj_out.lora_A.weight", 2, 16);
    expect_refused(&f, "factors are missing (lora needs 2)");
    put_pair(&f, "transformer.proj_out", 16, 16);
    expect_refused(
        &f, "'transformer.proj_out.lora_B.weight': shape [16,2], want [8,2]; is it an adapter of another model?");
    put_pair(&f, "transformer.proj_out", 8, 17);
    expect_refused(&f, "shape [2,17], want [any,16]");
    put(&f, "transformer.proj_out.lora_A.weight", 2, 16), put(&f, "transformer.proj_out.lora_B.weight", 8, 3);
    expect_refused(&f, "shape [8,3], want [8,2]");
    put_pair(&f, "transformer.proj_out", 8, 16), put(&f, "transformer.proj_out.lora_down.weight", 2, 16);
    expect_refused(&f, "another such factor");
    put_pair(&f, "transformer.proj_out", 8, 16), put(&f, "transformer.proj_out.lokr_w1", 2, 2);
    expect_refused(&f, "of another kind");
    put_pair(&f, "transformer.proj_out", 8, 16), put_pair(&f, "diffusion_model.final_layer.linear", 8, 16);
    expect_refused(&f, "two modules change 'proj_out.weight'");
    put_scalar(&f, "transformer.proj_out.alpha", 1);
    expect_refused(&f, "alpha or magnitude without factors");
    put_pair(&f, "transformer.proj_out", 8, 16), put(&f, "transformer.proj_out.alpha", 2, 1);
    expect_refused(&f, "not one finite number");
    put_pair(&f, "transformer.proj_out", 8, 16), put_scalar(&f, "transformer.proj_out.alpha", NAN);
    expect_refused(&f, "'transformer.proj_out.alpha'");
    put_pair(&f, "transformer.proj_out", 8, 16);
    f.values[1][5] = INFINITY;
    expect_refused(&f, "'transformer.proj_out.lora_B.weight' has NaN or infinite values");
    put_pair(&f, "transformer.proj_out", 8, 16);
    f.items[0].value.dtype = TENSOR_I32;
    expect_refused(&f, "dtype I32, accepted: F32, BF16, F16");
    put(&f, "transformer.proj_out.lokr_w1", 2, 4), put(&f, "transformer.proj_out.lokr_w2", 4, 8);
    expect_refused(&f, "[2,4] x [4,8] is not [8,16]");
    put(&f, "transformer.proj_out.lokr_w1", 2, 4), put(&f, "transformer.proj_out.lokr_w2_a", 4, 1);
    expect_refused(&f, "want lokr_w2, or its _a and _b");
    put(&f, "transformer.proj_out.hada_w1_a", 8, 2), put(&f, "transformer.proj_out.hada_w1_b", 2, 16);
    expect_refused(&f, "factors are missing (loha needs 4)");
    put_pair(&f, "transformer.proj_out", 8, 16), put(&f, "transformer.proj_out.dora_scale", 4, 1);
    expect_refused(&f, "shape [4,1], want [8], [8,1] or [1,16]");
    put_pair(&f, "diffusion_model.double_blocks.0.img_attn.qkv", 48, 16);
    put(&f, "diffusion_model.double_blocks.0.img_attn.qkv.dora_scale", 1, 16);
    expect_refused(&f, "each column of a fused module");
    struct lora *l;
    struct engine_error why;
    assert_false(lora_open(&l, "/nonexistent.safetensors", &lora_shape, &why));
    assert_int_equal(why.fault, ENGINE_BAD_MODEL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_same_adapter_in_five_styles_is_the_same_change),
        cmocka_unit_test(factors_beside_the_weights_are_the_same_change),
        cmocka_unit_test(a_rank_that_is_not_low_is_told),
        cmocka_unit_test(other_kinds_follow_their_formulas),
        cmocka_unit_test(golden_adapters_change_what_diffusers_changed),
        cmocka_unit_test(keys_that_match_nothing_are_listed),
        cmocka_unit_test(modules_are_found_under_every_prefix),
        cmocka_unit_test(scale_is_alpha_over_rank_as_the_file_says),
        cmocka_unit_test(files_that_make_no_sense_are_refused),
    };
    return cmocka_run_group_tests(tests, open_expected, close_expected);
}
