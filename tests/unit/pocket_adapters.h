/* pocket_adapters.h - two adapters for the golden model "pocket" of kinds that make.py makes none of: a LoKr, which is merged, and a
 * plain one of the linear whose results are remembered for each prompt. */
#ifndef KILN_POCKET_ADAPTERS_H
#define KILN_POCKET_ADAPTERS_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <cmocka.h>

#include "safetensors.h"

static void pocket_adapters_pair(const char *path, const char *const names[2], const int64_t n[2], const int64_t k[2])
{
    static float values[2][64 * 96];
    struct safetensors_item items[2];
    struct engine_error why;
    for (int i = 0; i < 2; i++) {
        for (int64_t j = 0; j < n[i] * k[i]; j++)
            values[i][j] = (float)((j * 7 + i) % 13 - 6) / 32;
        items[i] = (struct safetensors_item){names[i], tensor_2d(values[i], TENSOR_F32, n[i], k[i])};
    }
    if (!safetensors_write(path, items, 2, &why))
        fail_msg("%s", why.text);
}

/* Files in `folder`; the paths are valid until the next call. */
struct pocket_adapters { const char *lokr, *context; };
static struct pocket_adapters pocket_adapters_make(const char *folder)
{
    static char lokr[512], context[512];
    snprintf(lokr, sizeof lokr, "%s/lokr.safetensors", folder);
    snprintf(context, sizeof context, "%s/context.safetensors", folder);
    pocket_adapters_pair(lokr, (const char *const[]){"lora_unet_double_blocks_0_img_attn_proj.lokr_w1", "lora_unet_double_blocks_0_img_attn_proj.lokr_w2"},
                         (int64_t[]){2, 32}, (int64_t[]){2, 32});
    pocket_adapters_pair(context, (const char *const[]){"transformer.context_embedder.lora_A.weight", "transformer.context_embedder.lora_B.weight"},
                         (int64_t[]){3, 64}, (int64_t[]){96, 3});
    return (struct pocket_adapters){lokr, context};
}

#endif
