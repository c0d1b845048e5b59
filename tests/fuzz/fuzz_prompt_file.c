/* fuzz_prompt_file.c - any bytes are rows within the rules, or refused with a sentence. First byte: the format. */
#include "prompt_file.h"

#include "json_text.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(bool condition)
{
    if (!condition)
        abort();
}

static void check_text(const char *text)
{
    must(json_text_utf8_fault(text, strlen(text)) == strlen(text));
}

static void check_inputs(const struct prompt_inputs *in)
{
    must(in->image_count >= 0 && in->image_count <= TASK_INPUTS_IMAGES_MAX && in->lora_count >= 0 && in->lora_count <= TASK_INPUTS_LORAS_MAX);
    for (int i = 0; i < in->image_count; i++)
        must(*in->images[i] != 0);
    for (int i = 0; i < in->lora_count; i++)
        must(*in->loras[i] != 0);
    must(!in->mask || *in->mask);
    must(in->strength >= 0 && in->strength <= 1);
}

static void check_row(const struct prompt_row *row, int64_t last_line)
{
    char why[256];
    uint64_t seed;
    must(row->line > last_line);
    must(row->prompt && *row->prompt && strlen(row->prompt) <= PROMPT_FILE_PROMPT_MAX);
    check_text(row->prompt);
    if (row->negative)
        check_text(row->negative);
    must(row->width == 0 || row->height == 0 || prompt_file_size_ok(row->width, row->height, why, sizeof why));
    must(row->width >= 0 && row->width % 16 == 0 && row->height >= 0 && row->height % 16 == 0);
    must(row->steps >= 0 && row->steps <= PROMPT_FILE_STEPS_MAX);
    must(isnan(row->guidance) || (row->guidance >= 0 && row->guidance <= PROMPT_FILE_GUIDANCE_MAX));
    must(!row->name || (strlen(row->name) <= PROMPT_FILE_NAME_MAX && row->name[0] != '.' && !strchr(row->name, '/')));
    must(!prompt_file_read_seed("18446744073709551616", &seed, why, sizeof why));
    check_inputs(&row->inputs);
    if (row->labels_json) {
        json_t *labels = json_loads(row->labels_json, 0, NULL);
        must(json_is_object(labels));
        json_decref(labels);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct prompt_file *f;
    struct prompt_row row;
    char why[1400] = "";
    int64_t last_line = 0;
    enum prompt_next next;
    if (size < 1)
        return 0;
    if (!prompt_file_open_memory(&f, data + 1, size - 1, "fuzz", (enum prompt_format)(data[0] % 5), why, sizeof why)) {
        must(why[0] != 0);
        return 0;
    }
    while ((next = prompt_file_next(f, &row, why, sizeof why)) == PROMPT_ROW || next == PROMPT_WRONG) {
        must(next == PROMPT_ROW || why[0] != 0);
        why[0] = 0;
        if (next == PROMPT_WRONG)
            continue;
        check_row(&row, last_line);
        last_line = row.line;
    }
    must(next == PROMPT_END || why[0] != 0);
    prompt_file_close(f);
    return 0;
}
