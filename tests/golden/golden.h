/* golden.h - reads the cases of this folder and compares tensors with what diffusers computed. For tests. */
#ifndef KILN_GOLDEN_H
#define KILN_GOLDEN_H

#include <jansson.h>

#include "engine.h"
#include "safetensors.h"

#define GOLDEN_IMAGES_MAX 2
#define GOLDEN_ADAPTERS_MAX 2
#define GOLDEN_FOLDER "tests/golden" /* tests run at the root of the repository */

struct golden_case {
    char name[64];
    char folder[256];
    char model[64];                             /* "pocket" */
    enum engine_precision precision;
    int image_count;
    struct engine_request requests[GOLDEN_IMAGES_MAX]; /* texts are the JSON's */
    bool one_generator;                         /* the noise of the second image follows that of the first */
    const char *transformer_file;               /* "../files/bfl-fp8.safetensors" instead of the model's; or NULL; the JSON's */
    char vae[256];                              /* folder instead of the model's; "": none */
    int adapter_count;
    struct engine_adapter adapters[GOLDEN_ADAPTERS_MAX];
    char adapter_files[GOLDEN_ADAPTERS_MAX][256];
    json_t *json;
    struct safetensors *expected;
};

/* golden_list fills names of all cases, sorted; the number of them. */
int golden_list(char (*ret)[64], int max);

bool golden_open(struct golden_case *ret, const char *name, struct engine_error *why);
void golden_close(struct golden_case *c);

/* golden_model writes the path of a model's folder. Two are made in a temporary folder at the first call, and removed by
 * golden_remove_made: pocket-bf16 by rounding each value of pocket; like-9b, whose text encoder and transformer are drawn
 * from the seeds that make.py drew them from, and compared with the digests of files/like-9b.json. */
bool golden_model(char *ret, size_t ret_bytes, const char *model, struct engine_error *why);
void golden_remove_made(void);

/* golden_file writes the path of a file of a case. The single files of files/NAME.json are made from pocket-bf16 in a temporary folder: fused,
 * renamed, quantised, and each tensor compared with the digest of what the reference's script wrote. */
bool golden_file(char *ret, size_t ret_bytes, const char *file, struct engine_error *why);

/* golden_other_order: [largest, rms] that summing in another order changes in diffusers itself; false if not measured. */
bool golden_other_order(const struct golden_case *c, const char *tensor, double ret[2]);

/* Tensors seen through engine_watch.dump, copied. */
struct golden_dump {
    int count;
    struct { char name[64]; struct tensor value; } items[128];
};
void golden_keep(void *dump, const char *name, struct tensor value); /* an engine_watch.dump */
const struct tensor *golden_find(const struct golden_dump *d, const char *name);
void golden_dump_done(struct golden_dump *d);

/* golden_differ: largest and rms difference of `count` values, and the rms of the expected ones. */
struct golden_difference { double largest, rms, scale; };
struct golden_difference golden_differ(const float *got, const float *want, size_t count);

/* golden_row prints one row of the test's table and returns ok. golden_row_head prints the table's head. */
void golden_row_head(void);
bool golden_row(const char *name, const char *precision, const char *tensor, double largest, double rms, const char *bound,
                bool ok);

/* golden_floats: the values as floats, malloc'ed. */
float *golden_floats(struct tensor t);
float *golden_entry_floats(const struct safetensors_entry *e, size_t *ret_count);

#endif
