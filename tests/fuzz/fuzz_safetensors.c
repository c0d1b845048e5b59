/* fuzz_safetensors.c - any bytes are a file whose every tensor lies inside it, or refused with a sentence. */
#include "safetensors.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(bool condition)
{
    if (!condition)
        abort();
}

static uint64_t check_entry(const struct safetensors *s, const struct safetensors_entry *e, const uint8_t *data, size_t size)
{
    const uint8_t *from = e->data;
    uint64_t sum = 0;
    must(from >= data + 8 && from <= data + size && e->bytes <= (size_t)(data + size - from));
    must(e->rank >= 0 && e->rank <= SAFETENSORS_RANK_MAX);
    must(safetensors_find(s, e->name) == e && strlen(safetensors_dtype_name(e->dtype)) > 0);
    for (int i = 0; i < e->rank; i++)
        must(e->shape[i] >= 0);
    for (size_t i = 0; i < e->bytes; i++)
        sum += from[i];
    return sum;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct safetensors *s;
    struct engine_error why = {0};
    uint64_t bytes = 0, sum = 0;
    if (!safetensors_parse(&s, data, size, &why)) {
        must(why.text[0] && why.fault == ENGINE_BAD_MODEL);
        return 0;
    }
    for (size_t i = 0; i < safetensors_count(s); i++) {
        const struct safetensors_entry *e = safetensors_at(s, i);
        sum += check_entry(s, e, data, size);
        bytes += e->bytes;
    }
    must(bytes < size && sum <= 255 * bytes); /* they tile the data: none twice */
    safetensors_metadata(s, "format");
    safetensors_close(s);
    return 0;
}
