/* fuzz_weight_files.c - any bytes are a part's file whose every tensor can be found, checked and decoded, or refused with a
 * sentence: names, scales and notes beside weights, fused and swapped rows, dimensions told from shapes. */
#include "model_shape.h"
#include "weight_files.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define VALUES_MAX 65536

static void look_at(const struct weight_files *f, const char *name)
{
    struct weight w;
    struct engine_error why = {0};
    if (!weight_files_find(f, &w, name, &why)) {
        if (!why.text[0])
            abort();
        return;
    }
    if (w.rank < 0 || w.rank > 4 || w.first < 0 || w.first + w.rows > w.matrix.n || strcmp(w.asked, name) != 0)
        abort();
    int64_t count = weight_files_values(&w);
    if (count > VALUES_MAX || w.rank == 0)
        return;
    bool is_finite = weight_files_is_finite(&w);
    struct tensor t = tensor_1d(malloc((size_t)count * 4 + 1), TENSOR_F32, count);
    weight_files_decode(t, &w);
    for (int64_t i = 0; is_finite && i < count; i++)
        if (((float *)t.data)[i] - ((float *)t.data)[i] != 0) /* NaN and infinity are told before a weight is used */
            abort();
    t.dtype = TENSOR_BF16;
    weight_files_decode(t, &w);
    free(t.data);
}

static void look_at_part(enum tensor_names_part part, const uint8_t *data, size_t size)
{
    static const struct tensor_names_place nothing;
    struct weight_files *f = NULL;
    struct engine_error why = {0};
    struct weight_line line;
    struct model_config c;
    if (!weight_files_parse(&f, part, data, size, &why)) {
        if (!why.text[0] || f)
            abort();
        return;
    }
    for (size_t i = 0; weight_files_list(f, i, &line); i++) {
        struct tensor_names_place ours[TENSOR_NAMES_PIECES_MAX] = {nothing};
        look_at(f, line.name);
        for (int scheme = 0; scheme < 4; scheme++) {
            struct tensor_names names = {part, (enum tensor_names_scheme)scheme, ""};
            int count = tensor_names_of_file(ours, &names, line.name);
            for (int p = 0; p < count; p++)
                look_at(f, ours[p].name);
        }
    }
    bool ok = part == TENSOR_NAMES_TRANSFORMER    ? model_shape_transformer(&c.transformer, f, &why)
              : part == TENSOR_NAMES_TEXT_ENCODER ? model_shape_text_encoder(&c.text, f, &why)
                                                  : model_shape_vae(&c.vae, f, &why);
    if (!ok && !why.text[0])
        abort();
    weight_files_close(f);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    for (int part = 0; part < 3; part++)
        look_at_part((enum tensor_names_part)part, data, size);
    return 0;
}
