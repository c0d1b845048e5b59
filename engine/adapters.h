/* adapters.h - the LoRA files an engine renders with, and the two ways in which they change a weight.
 *
 *   beside   LoRA whose factors are smaller than the weight (lora_is_low_rank): the weight stays as it is in its file, quantised
 *            or not, and the factors run beside it (adapted.h). Other files are other factors, loaded in no time.
 *   merged   the rest (LoHa, LoKr, DoRA): when a weight is loaded, in f32 and before it is rounded to the compute
 *            precision, the changes of all files are added to it. Other files are another weight, loaded anew.
 *
 * Both mean the same and round differently, so which of them it is depends on the file alone, tensor by tensor: never on how often
 * files change, or a picture would depend on what was rendered before it. This is the one place that all kinds, key styles, number
 * formats and devices pass. */
#ifndef KILN_ADAPTERS_H
#define KILN_ADAPTERS_H

#include "engine.h"
#include "lora.h"

struct adapters;

/* adapters_open reads `count` files; none gives NULL, which the other functions accept. */
bool adapters_open(struct adapters **ret, const struct engine_adapter *list, int count, const struct transformer_config *c,
                   struct engine_error *why);
void adapters_close(struct adapters *a);
int adapters_count(const struct adapters *a);

/* adapters_change: does any file change this tensor (diffusers name), either way? */
bool adapters_change(const struct adapters *a, const char *name);

/* adapters_beside: how file `index` changes this tensor beside it, and by how much of it: strength * scale. NULL: not so. */
const struct lora_target *adapters_beside(const struct adapters *a, int index, const char *name, float *ret_scale);

/* adapters_merge: has this tensor a change that must be merged? adapters_merge_any: has any? adapters_apply adds sum of
 * strength * D of these changes to w [n, k], contiguous f32; D of lora.h, each from the unchanged w. */
bool adapters_merge(const struct adapters *a, const char *name);
bool adapters_merge_any(const struct adapters *a);
bool adapters_apply(const struct adapters *a, const char *name, float *w, int64_t n, int64_t k, struct engine_error *why);

#endif
