/* test_adapters.c - several adapters change a weight together as each does alone. If this breaks, a second LoRA is computed
 * from weights that the first has changed, or its strength is lost. Whole pictures with adapters: test_golden. */
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

#include "lora.h"

#define DATA "tests/unit/data/lora-"
static const struct transformer_config tiny = {.hidden = 16, .attention_head_dim = 16, .num_attention_heads = 1, .num_layers = 1,
                                               .num_single_layers = 1, .joint_attention_dim = 24, .in_channels = 8,
                                               .mlp_hidden = 48, .timestep_guidance_channels = 8};
static const char *const files[] = {DATA "peft.safetensors", DATA "raw.safetensors", DATA "bfl.safetensors", DATA "comfy.safetensors",
                                    DATA "kohya.safetensors", DATA "loha.safetensors", DATA "lokr.safetensors", DATA "dora.safetensors"};
#define FILES (int)(sizeof files / sizeof *files)

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
        assert_true(adapters_apply(a, t[0]->name, got, t[0]->n, t[0]->k, &why));
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
    assert_false(adapters_change(a, "no.such.weight"));
    adapters_close(a);
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
        cmocka_unit_test(what_is_no_adapter_of_the_model_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
