/* fuzz_gguf.c - any bytes are a GGUF file whose every tensor lies inside them, or refused with a sentence. */
#include "gguf.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint64_t sum_of(const void *data, size_t bytes)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < bytes; i++)
        sum += ((const uint8_t *)data)[i];
    return sum;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct gguf *g = NULL;
    struct engine_error why = {0};
    if (!gguf_parse(&g, data, size, &why)) {
        if (!why.text[0] || g)
            abort();
        return 0;
    }
    uint64_t sum = 0;
    for (size_t i = 0; i < gguf_count(g); i++) {
        const struct gguf_entry *e = gguf_at(g, i);
        sum += sum_of(e->data, e->bytes);
        if (gguf_find(g, e->name) != e)
            abort();
        /* What passed can be decoded. */
        struct quant_matrix m = {.format = e->format, .n = 1, .k = e->row_values, .data = e->data};
        float *row = e->row_values < 4096 ? malloc((size_t)e->row_values * sizeof *row) : NULL;
        if (row)
            quant_rows_f32(row, &m, 0, 1);
        free(row);
    }
    const char *key;
    for (size_t i = 0; (key = gguf_key(g, i)); i++) {
        const char *text;
        int64_t whole, list[16];
        double number;
        bool flag;
        size_t count;
        if (gguf_text(g, &text, key, &why))
            sum += strlen(text);
        if (gguf_wholes(g, list, 16, &count, key, &why))
            sum += sum_of(list, count * sizeof *list);
        sum += gguf_whole(g, &whole, key, &why) + gguf_number(g, &number, key, &why) + gguf_flag(g, &flag, key, &why);
    }
    if (sum == UINT64_MAX) /* keeps the reads */
        abort();
    gguf_close(g);
    return 0;
}
