/* test_model_config.c - every dimension is read, bounded and named when it is wrong. If this breaks, another architecture
 * is rendered as noise, or an absurd number in a JSON file becomes an allocation.
 * Each case changes one key of a good file. */
#include "model_config.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>
#include <jansson.h>

#define POCKET "tests/golden/models/pocket"

#define INDEX MODEL_CONFIG_INDEX
#define TEXT MODEL_CONFIG_TEXT_ENCODER
#define TRANSFORMER MODEL_CONFIG_TRANSFORMER
#define VAE MODEL_CONFIG_VAE
#define SCHEDULER MODEL_CONFIG_SCHEDULER

static json_t *good(enum model_config_file file)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", POCKET, model_config_file_name(file));
    json_t *root = json_load_file(path, 0, NULL);
    assert_non_null(root);
    return root;
}

/* A good file with one key set to a JSON value, or without it when the value is NULL. */
static char *changed(enum model_config_file file, const char *key, const char *value)
{
    json_t *root = good(file);
    if (value) {
        json_t *v = json_loads(value, JSON_DECODE_ANY, NULL);
        assert_non_null(v);
        json_object_set_new(root, key, v);
    } else {
        json_object_del(root, key);
    }
    char *text = json_dumps(root, 0);
    json_decref(root);
    return text;
}

static void expect(enum model_config_file file, const char *key, const char *value, const char *says)
{
    struct model_config c, untouched;
    struct engine_error why = {0};
    char *text = changed(file, key, value);
    memset(&c, 0x5a, sizeof c);
    memset(&untouched, 0x5a, sizeof untouched);
    bool ok = model_config_parse(&c, file, text, strlen(text), &why);
    if (says && ok)
        fail_msg("%s: '%s' = %s was accepted", model_config_file_name(file), key, value ? value : "nothing");
    if (!says && !ok)
        fail_msg("%s: '%s' = %s: %s", model_config_file_name(file), key, value ? value : "nothing", why.text);
    if (says && (!strstr(why.text, says) || !strstr(why.text, model_config_file_name(file)) || why.fault != ENGINE_BAD_MODEL))
        fail_msg("'%s' does not say '%s' (%s = %s)", why.text, says, key, value ? value : "nothing");
    if (says)
        assert_memory_equal(&c, &untouched, sizeof c);
    free(text);
}

static void a_folder_gives_its_dimensions(void **state)
{
    (void)state;
    struct model_config c;
    struct engine_error why;
    assert_true(model_config_load(&c, POCKET, &why));
    assert_true(c.is_distilled);
    assert_string_equal(c.pipeline, "Flux2KleinPipeline");
    assert_int_equal(c.text.hidden_size, 32);
    assert_int_equal(c.text.num_attention_heads, 4);
    assert_int_equal(c.text.num_key_value_heads, 2);
    assert_int_equal(c.text.vocab_size, 1536);
    assert_int_equal(c.transformer.hidden, 64);
    assert_int_equal(c.transformer.mlp_hidden, 192);
    assert_int_equal(c.transformer.joint_attention_dim, 96);
    assert_int_equal(c.vae.decoder_block_out_channels[3], 24);
    assert_true(c.transformer.rope_theta == 2000 && c.text.rope_theta == 1000000);
    assert_string_equal(model_config_family(&c), "klein-custom");
    assert_string_equal(model_config_licence(&c), "unknown");
    assert_true(model_config_load(&c, "tests/golden/models/base", &why));
    assert_false(c.is_distilled); /* the key is absent */
    assert_true(model_config_load(&c, "tests/golden/models/kv", &why));
    assert_true(c.is_distilled);  /* by its pipeline */
}

static void family_and_licence_are_told_from_the_dimensions(void **state)
{
    (void)state;
    struct model_config c = {.transformer = {.hidden = 3072, .num_layers = 5, .num_single_layers = 20}};
    assert_string_equal(model_config_family(&c), "klein-4b");
    assert_string_equal(model_config_licence(&c), "Apache-2.0");
    c.transformer = (struct transformer_config){.hidden = 4096, .num_layers = 8, .num_single_layers = 24};
    assert_string_equal(model_config_family(&c), "klein-9b");
    assert_string_equal(model_config_licence(&c), "FLUX Non-Commercial");
    c.transformer.num_layers = 5;
    assert_string_equal(model_config_family(&c), "klein-custom");
}

static void another_architecture_is_refused_by_name(void **state)
{
    (void)state;
    expect(INDEX, "_class_name", "\"FluxPipeline\"", "'_class_name' is FluxPipeline, kiln renders Flux2KleinPipeline");
    expect(INDEX, "_class_name", NULL, "'_class_name' is missing");
    expect(INDEX, "_class_name", "7", "'_class_name' is missing");
    expect(INDEX, "_class_name", "\"Flux2KleinKVPipeline\"", NULL);
    expect(INDEX, "is_distilled", "\"yes\"", "'is_distilled' is neither true nor false");
    expect(INDEX, "is_distilled", "false", NULL);
    expect(TEXT, "model_type", "\"llama\"", "'model_type' is 'llama', kiln renders qwen3 only");
    expect(TEXT, "hidden_act", "\"gelu\"", "'hidden_act' is 'gelu'");
    expect(TRANSFORMER, "_class_name", "\"FluxTransformer2DModel\"", "kiln renders Flux2Transformer2DModel only");
    expect(VAE, "_class_name", "\"AutoencoderKL\"", "kiln renders AutoencoderKLFlux2 only");
    expect(SCHEDULER, "_class_name", "\"DDIMScheduler\"", "kiln renders FlowMatchEulerDiscreteScheduler only");
}

static void what_the_engine_does_not_do_is_refused(void **state)
{
    (void)state;
    static const struct { enum model_config_file file; const char *key, *value, *says; } cases[] = {
        {TEXT, "rope_scaling", "{\"type\":\"yarn\"}", "'rope_scaling' is set"},
        {TEXT, "attention_bias", "true", "'attention_bias' is set"},
        {TEXT, "use_sliding_window", "true", "'use_sliding_window' is set"},
        {TRANSFORMER, "guidance_embeds", "true", "'guidance_embeds' is set"},
        {TRANSFORMER, "out_channels", "64", "'out_channels' is set"},
        {TRANSFORMER, "patch_size", "2", "accepted: 1 to 1"},
        {VAE, "use_post_quant_conv", "false", "'use_post_quant_conv' is off"},
        {VAE, "mid_block_add_attention", "false", "'mid_block_add_attention' is off"},
        {SCHEDULER, "use_karras_sigmas", "true", "'use_karras_sigmas' is set"},
        {SCHEDULER, "use_dynamic_shifting", "false", "'use_dynamic_shifting' is off"},
        {SCHEDULER, "time_shift_type", "\"linear\"", "'time_shift_type'"},
        {SCHEDULER, "shift_terminal", "0.1", "'shift_terminal' is set"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        expect(cases[i].file, cases[i].key, cases[i].value, cases[i].says);
}

/* Every number: missing, of another type, one below and one above what is accepted, absurd. */
static void every_number_is_bounded(void **state)
{
    (void)state;
    static const struct { enum model_config_file file; const char *key, *below, *above; bool is_real; } numbers[] = {
        {TEXT, "hidden_size", "7", "16385", false},
        {TEXT, "intermediate_size", "7", "65537", false},
        {TEXT, "num_hidden_layers", "26", "257", false},
        {TEXT, "num_attention_heads", "0", "257", false},
        {TEXT, "num_key_value_heads", "0", "257", false},
        {TEXT, "head_dim", "7", "513", false},
        {TEXT, "vocab_size", "255", "4000001", false},
        {TEXT, "rms_norm_eps", "0", "1", true},
        {TEXT, "rope_theta", "0.5", "1e13", true},
        {TRANSFORMER, "num_attention_heads", "0", "257", false},
        {TRANSFORMER, "attention_head_dim", "7", "513", false},
        {TRANSFORMER, "num_layers", "0", "257", false},
        {TRANSFORMER, "num_single_layers", "0", "257", false},
        {TRANSFORMER, "joint_attention_dim", "23", "65537", false},
        {TRANSFORMER, "in_channels", "64", "129", false},
        {TRANSFORMER, "mlp_ratio", "0.25", "17", true},
        {TRANSFORMER, "rope_theta", "-1", "1e300", true},
        {TRANSFORMER, "eps", "-1e-6", "0.5", true},
        {TRANSFORMER, "timestep_guidance_channels", "1", "4097", false},
        {VAE, "latent_channels", "16", "64", false},
        {VAE, "layers_per_block", "0", "8", false},
        {VAE, "norm_num_groups", "0", "257", false},
        {VAE, "batch_norm_eps", "-1", "1", true},
        {VAE, "in_channels", "1", "4", false},
        {VAE, "out_channels", "1", "4", false},
        {SCHEDULER, "num_train_timesteps", "999", "1001", false},
    };
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        char says[128];
        snprintf(says, sizeof says, "'%s' is missing", numbers[i].key);
        expect(numbers[i].file, numbers[i].key, NULL, says);
        snprintf(says, sizeof says, "'%s' is something else, want a %s", numbers[i].key, numbers[i].is_real ? "number" : "whole number");
        expect(numbers[i].file, numbers[i].key, "\"12\"", says);
        expect(numbers[i].file, numbers[i].key, "null", says);
        if (!numbers[i].is_real)
            expect(numbers[i].file, numbers[i].key, "16.0", says);
        snprintf(says, sizeof says, "'%s' is ", numbers[i].key);
        expect(numbers[i].file, numbers[i].key, numbers[i].below, says);
        expect(numbers[i].file, numbers[i].key, numbers[i].above, says);
        expect(numbers[i].file, numbers[i].key, "-9223372036854775808", says);
        expect(numbers[i].file, numbers[i].key, "9223372036854775807", says);
    }
}

static void dimensions_must_fit_each_other(void **state)
{
    (void)state;
    expect(TEXT, "num_key_value_heads", "3", "4 heads are no multiple of 3 key-value heads");
    expect(TEXT, "head_dim", "17", "want an even number");
    expect(TRANSFORMER, "axes_dims_rope", "[8,8,8]", "not a list of 4 numbers");
    expect(TRANSFORMER, "axes_dims_rope", "[8,8,8,6]", "sums to 30, the head size is 32");
    expect(TRANSFORMER, "axes_dims_rope", "[7,9,8,8]", "odd number");
    expect(TRANSFORMER, "axes_dims_rope", "[-8,16,16,8]", "'axes_dims_rope' is -8");
    expect(TRANSFORMER, "axes_dims_rope", "[0,8,8,16]", NULL);
    expect(TRANSFORMER, "mlp_ratio", "0.501", "no whole number");
    expect(TRANSFORMER, "timestep_guidance_channels", "33", "odd");
    expect(VAE, "block_out_channels", "[8,16,24]", "not a list of 4 numbers");
    expect(VAE, "block_out_channels", "[8,16,24,1000000]", "accepted: 4 to 4096");
    expect(VAE, "norm_num_groups", "3", "channels are no multiple of 3 groups");
    expect(VAE, "decoder_block_out_channels", "[4,8,8,8]", NULL);
    expect(VAE, "decoder_block_out_channels", "null", NULL);
    expect(VAE, "decoder_block_out_channels", "\"wide\"", "not a list");
}

static void what_is_no_json_object_is_refused(void **state)
{
    (void)state;
    static const char *const texts[] = {"", "[]", "null", "{", "{\"a\":1,\"a\":2}", "{\"a\":\"\xff\"}", "\xef\xbb\xbf{}", "{}x"};
    struct model_config c;
    for (enum model_config_file file = 0; file < MODEL_CONFIG_FILES; file++) {
        for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
            struct engine_error why = {0};
            assert_false(model_config_parse(&c, file, texts[i], strlen(texts[i]), &why));
            assert_int_equal(why.fault, ENGINE_BAD_MODEL);
            assert_non_null(strstr(why.text, model_config_file_name(file)));
        }
        static char deep[100000], many[100000] = "{\"a\":[";
        struct engine_error why;
        memset(deep, '[', sizeof deep);
        assert_false(model_config_parse(&c, file, deep, sizeof deep, &why));
        assert_non_null(strstr(why.text, "nested deeper than the accepted 16"));
        memset(many + 6, ',', sizeof many - 6);
        assert_false(model_config_parse(&c, file, many, sizeof many, &why));
        assert_non_null(strstr(why.text, "JSON values, accepted: at most"));
    }
}

/* --- folders ------------------------------------------------------------------------------------------------ */

static char dir[64];

static void write_config(enum model_config_file file, const char *text)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", dir, model_config_file_name(file));
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

static void expect_load(const char *says)
{
    struct model_config c;
    struct engine_error why = {0};
    bool ok = model_config_load(&c, dir, &why);
    if (ok != !says || (says && !strstr(why.text, says)))
        fail_msg("'%s' does not say '%s'", why.text, says ? says : "nothing");
}

static void a_folder_is_refused_by_the_file_that_is_wrong(void **state)
{
    (void)state;
    char path[256];
    snprintf(dir, sizeof dir, "/tmp/kiln-config.XXXXXX");
    assert_non_null(mkdtemp(dir));
    expect_load("a model is a folder in the diffusers layout");
    for (enum model_config_file file = 0; file < MODEL_CONFIG_FILES; file++) {
        char *text = changed(file, "_none", NULL);
        snprintf(path, sizeof path, "%s/%.*s", dir, (int)strcspn(model_config_file_name(file), "/"), model_config_file_name(file));
        if (file)
            mkdir(path, 0755);
        write_config(file, text);
        free(text);
        expect_load(file < 4 ? model_config_file_name(file + 1) : NULL);
    }
    char *narrow = changed(TRANSFORMER, "joint_attention_dim", "99");
    write_config(TRANSFORMER, narrow);
    free(narrow);
    expect_load("'joint_attention_dim' is 99, but 3 hidden states of the text encoder are 96 wide");
    write_config(VAE, "");
    snprintf(path, sizeof path, "%s/%s", dir, model_config_file_name(SCHEDULER));
    unlink(path);
    mkdir(path, 0755);
    expect_load("vae/config.json: not valid JSON");
    snprintf(path, sizeof path, "rm -rf %s", dir);
    assert_int_equal(system(path), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_folder_gives_its_dimensions),
        cmocka_unit_test(family_and_licence_are_told_from_the_dimensions),
        cmocka_unit_test(another_architecture_is_refused_by_name),
        cmocka_unit_test(what_the_engine_does_not_do_is_refused),
        cmocka_unit_test(every_number_is_bounded),
        cmocka_unit_test(dimensions_must_fit_each_other),
        cmocka_unit_test(what_is_no_json_object_is_refused),
        cmocka_unit_test(a_folder_is_refused_by_the_file_that_is_wrong),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
