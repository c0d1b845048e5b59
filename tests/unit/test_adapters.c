/* test_adapters.c - several adapters change a weight together as each does alone, merged into it or beside it. If this breaks, a
 * second LoRA is computed from weights that the first has changed, its strength is lost, or a change is made twice or never. Whole pictures with adapters: test_golden. */
#include "adapters.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "adapted.h"
#include "kern_cpu.h"
#include "lora.h"

#define DATA "tests/unit/data/lora-"
static const struct transformer_config tiny = {.hidden = 16, .attention_head_dim = 16, .num_attention_heads = 1, .num_layers = 1,
                                               .num_single_layers = 1, .joint_attention_dim = 24, .in_channels = 8,
                                               .mlp_hidden = 48, .timestep_guidance_channels = 8};
static const char *const files[] = {DATA "peft.safetensors", DATA "raw.safetensors", DATA "bfl.safetensors", DATA "comfy.safetensors",
                                    DATA "kohya.safetensors", DATA "loha.safetensors", DATA "lokr.safetensors", DATA "dora.safetensors"};
#define FILES (int)(sizeof files / sizeof *files)

/* What runs beside the weight, added to it. */
static int add_beside(const struct adapters *a, const struct lora_target *of, float *to)
{
    int files_beside = 0;
    for (int i = 0; i < adapters_count(a); i++) {
        float scale;
        struct engine_error why;
        const struct lora_target *t = adapters_beside(a, i, of->name, &scale);
        if (!t)
            continue;
        float *down = malloc((size_t)(t->rank * t->k) * sizeof *down), *up = malloc((size_t)(t->n * t->rank) * sizeof *up);
        lora_down(down, t);
        assert_true(lora_up(up, t, &why));
        for (int64_t j = 0; j < t->n * t->k; j++)
            for (int64_t r = 0; r < t->rank; r++)
                to[j] += scale * up[j / t->k * t->rank + r] * down[r * t->k + j % t->k];
        free(down), free(up);
        files_beside++;
    }
    return files_beside;
}

static bool is_plain(const char *file)
{
    return !strstr(file, "loha") && !strstr(file, "lokr") && !strstr(file, "dora");
}

/* Checks every target of the first file; the number of those that both change. */
static int compare_pair(const struct engine_adapter pair[2])
{
    struct adapters *a;
    struct lora *l[2];
    struct engine_error why;
    int shared = 0;
    if (!adapters_open(&a, pair, 2, &tiny, &why) || !lora_open(&l[0], pair[0].file, &tiny, &why) ||
        !lora_open(&l[1], pair[1].file, &tiny, &why))
        fail_msg("%s", why.text);
    for (size_t i = 0; i < lora_count(l[0]); i++) {
        const struct lora_target *t[2] = {lora_at(l[0], i), lora_find(l[1], lora_at(l[0], i)->name)};
        size_t count = (size_t)(t[0]->n * t[0]->k);
        float *w = malloc(count * sizeof *w), *got = malloc(count * sizeof *got), *change[2];
        for (size_t j = 0; j < count; j++)
            got[j] = w[j] = sinf((float)(j + i)) / 4;
        for (int f = 0; f < 2; f++) {
            change[f] = calloc(count, sizeof *w);
            assert_true(!t[f] || lora_delta(change[f], t[f], w, &why));
        }
        assert_true(adapters_change(a, t[0]->name));
        int beside = (t[0] && is_plain(pair[0].file)) + (t[1] && is_plain(pair[1].file)); /* the kind decides, nothing else */
        bool is_merged = 1 + (t[1] != NULL) > beside;
        assert_int_equal(adapters_merge(a, t[0]->name), is_merged);
        assert_true(!is_merged || adapters_merge_any(a));
        if (is_merged)
            assert_true(adapters_apply(a, t[0]->name, got, t[0]->n, t[0]->k, &why));
        assert_int_equal(add_beside(a, t[0], got), beside);
        for (size_t j = 0; j < count; j++) {
            double want = (double)w[j] + (double)pair[0].strength * (double)change[0][j] + (double)pair[1].strength * (double)change[1][j];
            assert_true(fabs((double)got[j] - want) <= 1e-6 * (1 + fabs(want)));
        }
        shared += t[1] != NULL;
        free(w), free(got), free(change[0]), free(change[1]);
    }
    lora_close(l[0]);
    lora_close(l[1]);
    adapters_close(a);
    return shared;
}

static void two_adapters_change_a_weight_as_the_sum_of_both(void **state)
{
    (void)state;
    int shared = 0;
    for (int i = 0; i < FILES; i++)
        for (int j = 0; j < FILES; j++)
            shared += compare_pair((struct engine_adapter[2]){{files[i], 0.7f}, {files[j], -0.4f}});
    assert_true(shared > FILES);
}

static void without_adapters_nothing_changes(void **state)
{
    (void)state;
    struct adapters *a = (void *)1;
    struct engine_error why;
    assert_true(adapters_open(&a, NULL, 0, &tiny, &why));
    assert_null(a);
    assert_false(adapters_change(a, "x_embedder.weight"));
    adapters_close(a);
    assert_true(adapters_open(&a, &(struct engine_adapter){files[0], 1}, 1, &tiny, &why));
    assert_true(adapters_change(a, "x_embedder.weight"));
    assert_false(adapters_change(a, "no.such.weight"));
    assert_false(adapters_merge_any(a));
    adapters_close(a);
}

/* --- beside a linear -------------------------------------------------------------------------------------- */

enum { LINEAR_ROWS = 1100, LINEAR_N = 5, LINEAR_K = 7, LINEAR_RANK = 3 }; /* more rows than are changed at once */

static float small(int64_t i, int64_t seed)
{
    return (float)((i * 5 + seed * 3) % 9 - 4) / 4; /* sums of products are exact: only the roundings between remain */
}

static const struct kern_weight *matrix(struct kern *k, int64_t n, int64_t width, int64_t seed, float values[])
{
    for (int64_t i = 0; i < n * width; i++)
        values[i] = small(i, seed);
    return kern_weight_linear(k, TENSOR_BF16, tensor_2d(values, TENSOR_F32, n, width), (struct tensor){0});
}

static float rounded(float v)
{
    return tensor_f32_of(tensor_bf16_of(v));
}

static float product(const float *x, const float *w, int64_t width)
{
    float sum = 0;
    for (int64_t i = 0; i < width; i++)
        sum += x[i] * w[i];
    return rounded(sum);
}

/* As PEFT has it in bf16: result = result + lora_B(lora_A(x)) * scaling, after each adapter. */
static void adapters_beside_a_linear_round_as_peft_does(void **unused)
{
    (void)unused;
    static float x[LINEAR_ROWS * LINEAR_K], got[LINEAR_ROWS * LINEAR_N], w[LINEAR_N * LINEAR_K];
    static float down[2][LINEAR_RANK * LINEAR_K], up[2][LINEAR_N * LINEAR_RANK];
    static const int64_t first[2] = {0, 2}, rows[2] = {LINEAR_N, 3};
    static const float scale[2] = {0.7f, -0.4f};
    char text[256];
    struct kern *k = kern_cpu_open(&(struct kern_cpu_options){.threads = 2}, text, sizeof text);
    assert_non_null(k);
    struct adapted_change changes[2];
    struct adapted_linear l = {.weight = matrix(k, LINEAR_N, LINEAR_K, 1, w), .k = LINEAR_K, .changes = changes, .change_count = 2};
    for (int i = 0; i < 2; i++)
        changes[i] = (struct adapted_change){matrix(k, LINEAR_RANK, LINEAR_K, 2 + i, down[i]), matrix(k, rows[i], LINEAR_RANK, 5 + i, up[i]),
                                             scale[i], LINEAR_RANK, first[i], rows[i]};
    for (int64_t i = 0; i < LINEAR_ROWS * LINEAR_K; i++)
        x[i] = small(i, 8);
    struct tensor in = kern_temp(k, TENSOR_BF16, 2, (int64_t[]){LINEAR_ROWS, LINEAR_K}), out = kern_temp(k, TENSOR_BF16, 2, (int64_t[]){LINEAR_ROWS, LINEAR_N});
    size_t mark = kern_mark(k);
    kern_write(k, in, tensor_2d(x, TENSOR_F32, LINEAR_ROWS, LINEAR_K));
    adapted_apply(k, out, in, &l);
    kern_read(k, tensor_2d(got, TENSOR_F32, LINEAR_ROWS, LINEAR_N), out);
    assert_true(kern_sync(k));
    assert_int_equal(kern_mark(k), mark);
    for (int64_t r = 0; r < LINEAR_ROWS; r++)
        for (int64_t n = 0; n < LINEAR_N; n++) {
            float want = product(x + r * LINEAR_K, w + n * LINEAR_K, LINEAR_K);
            for (int i = 0; i < 2; i++) {
                float low[LINEAR_RANK];
                for (int64_t j = 0; j < LINEAR_RANK; j++)
                    low[j] = product(x + r * LINEAR_K, down[i] + j * LINEAR_K, LINEAR_K);
                if (n >= first[i] && n < first[i] + rows[i])
                    want = rounded(want + rounded(scale[i] * product(low, up[i] + (n - first[i]) * LINEAR_RANK, LINEAR_RANK)));
            }
            assert_true(got[r * LINEAR_N + n] == want);
        }
    for (int i = 0; i < 2; i++) {
        kern_weight_free(k, (struct kern_weight *)(uintptr_t)changes[i].down);
        kern_weight_free(k, (struct kern_weight *)(uintptr_t)changes[i].up);
    }
    kern_weight_free(k, (struct kern_weight *)(uintptr_t)l.weight);
    kern_rewind(k, 0);
    kern_close(k);
}

static void expect_refusal(const struct engine_adapter *list, int count, const char *says)
{
    struct adapters *a;
    struct engine_error why = {0};
    assert_false(adapters_open(&a, list, count, &tiny, &why));
    if (!strstr(why.text, says))
        fail_msg("'%s' does not say '%s'", why.text, says);
}

static void what_is_no_adapter_of_the_model_is_refused(void **state)
{
    (void)state;
    struct engine_adapter list[ENGINE_ADAPTERS_MAX + 1];
    for (int i = 0; i <= ENGINE_ADAPTERS_MAX; i++)
        list[i] = (struct engine_adapter){files[0], 1};
    expect_refusal(list, ENGINE_ADAPTERS_MAX + 1, "17 adapters, accepted: up to 16");
    list[1].strength = NAN;
    expect_refusal(list, 2, "a strength of nan, accepted: a number");
    list[1] = (struct engine_adapter){"tests/golden/files/lora-bfl.safetensors", 1}; /* of a wider model */
    expect_refusal(list, 2, "adapter tests/golden/files/lora-bfl.safetensors: ");
    list[0].file = "no/such/file";
    expect_refusal(list, 2, "no/such/file");
    list[0].file = "tests/golden/models/pocket/vae/diffusion_pytorch_model.safetensors";
    expect_refusal(list, 1, "bn.running_mean");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(two_adapters_change_a_weight_as_the_sum_of_both),
        cmocka_unit_test(without_adapters_nothing_changes),
        cmocka_unit_test(adapters_beside_a_linear_round_as_peft_does),
        cmocka_unit_test(what_is_no_adapter_of_the_model_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
