/* engine_precision.c - the words for precisions, and what they mean. */
#include "engine_precision.h"

#include <string.h>

static const struct { const char *name; enum tensor_dtype dtype; bool has_fp8; } precisions[] = {
    [ENGINE_F32] = {"f32", TENSOR_F32, false},
    [ENGINE_BF16] = {"bf16", TENSOR_BF16, false},
    [ENGINE_FP8] = {"fp8", TENSOR_BF16, true},
    [ENGINE_FP8_F32] = {"fp8-f32", TENSOR_F32, true},
};

const char *engine_precision_name(enum engine_precision precision)
{
    return precisions[precision].name;
}

bool engine_precision_of(const char *name, enum engine_precision *ret)
{
    for (int i = ENGINE_F32; i <= ENGINE_FP8_F32; i++)
        if (strcmp(name, precisions[i].name) == 0) {
            *ret = (enum engine_precision)i;
            return true;
        }
    return false;
}

enum tensor_dtype engine_precision_dtype(enum engine_precision precision)
{
    return precisions[precision].dtype;
}

bool engine_precision_has_fp8(enum engine_precision precision)
{
    return precisions[precision].has_fp8;
}
