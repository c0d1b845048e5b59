/* fuzz_lora.c - any bytes are an adapter whose changes can be computed, or refused with a sentence. */
#include "lora.h"

#include <stdlib.h>
#include <string.h>

#include "../unit/lora_shape.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct lora *l = NULL;
    struct engine_error why = {0};
    if (!lora_parse(&l, data, size, &lora_shape, &why)) {
        if (!why.text[0] || l)
            abort();
        return 0;
    }
    for (size_t i = 0; i < lora_count(l); i++) {
        const struct lora_target *t = lora_at(l, i);
        float *delta = malloc((size_t)(t->n * t->k) * sizeof *delta),
              *base = calloc((size_t)(t->n * t->k), sizeof *base);
        if (!lora_delta(delta, t, lora_needs_base(t) ? base : NULL, &why) || lora_find(l, t->name) != t)
            abort();
        if (lora_is_low_rank(t)) {
            float *down = malloc((size_t)(t->rank * t->k) * sizeof *down),
                  *up = malloc((size_t)(t->n * t->rank) * sizeof *up);
            lora_down(down, t);
            if (!lora_up(up, t, &why))
                abort();
            free(down);
            free(up);
        }
        free(base);
        free(delta);
    }
    lora_close(l);
    return 0;
}
