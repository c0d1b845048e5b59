/* engine_precision.h - what a model is computed in. It changes pixels, and so it is recorded in every image.
 *
 *   f32       everything
 *   bf16      weights and activations; sums in f32
 *   fp8       as bf16, but each linear whose weight is FP8 in its file multiplies in FP8: its rows are rounded to e4m3 (kern_linear). The
 *             same products are summed on every device; one without units for FP8 is not faster than in bf16
 *   fp8-f32   as f32, with the products of fp8: the reference for it */
#ifndef KILN_ENGINE_PRECISION_H
#define KILN_ENGINE_PRECISION_H

#include <stdbool.h>

#include "tensor.h"

enum engine_precision { ENGINE_F32, ENGINE_BF16, ENGINE_FP8, ENGINE_FP8_F32 };
#define ENGINE_PRECISION_WORDS "bf16, f32, fp8, fp8-f32"

const char *engine_precision_name(enum engine_precision precision);
bool engine_precision_of(const char *name, enum engine_precision *ret);
enum tensor_dtype engine_precision_dtype(enum engine_precision precision); /* of weights and activations */
bool engine_precision_has_fp8(enum engine_precision precision);

#endif
