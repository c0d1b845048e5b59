/* adapters.h - the LoRA files a model was opened with, and their change of a weight.
 *
 * Adapters that hold for everything an engine renders are merged: when a weight of the transformer is loaded, in f32 and before
 * it is rounded to the compute precision, the changes of all files are added to it. This is the one place that all kinds
 * (LoRA, LoHa, LoKr, DoRA), key styles, number formats of the weight and devices pass. */
#ifndef KILN_ADAPTERS_H
#define KILN_ADAPTERS_H

#include "engine.h"
#include "model_config.h"

struct adapters;

/* adapters_open reads `count` files; none gives NULL, which the other functions accept. */
bool adapters_open(struct adapters **ret, const struct engine_adapter *list, int count, const struct transformer_config *c,
                   struct engine_error *why);
void adapters_close(struct adapters *a);

/* adapters_change: does any file change this tensor (diffusers name)? adapters_apply adds sum of strength * D to w [n, k],
 * contiguous f32; D of lora.h, each from the unchanged w. */
bool adapters_change(const struct adapters *a, const char *name);
bool adapters_apply(const struct adapters *a, const char *name, float *w, int64_t n, int64_t k, struct engine_error *why);

#endif
