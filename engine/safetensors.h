/* safetensors.h - reads .safetensors files, one or a sharded set, and believes nothing they say.
 *
 * Files are mapped read-only. Everything in engine-spec 2.7 is checked at open: header size, JSON,
 * dtypes, offsets without holes or overlap, sizes against the file, duplicate names, shard index. Opening
 * reads the headers with pread and never touches a mapping, so that a file cut short meanwhile is an error;
 * whoever cuts a model's file while its values are being loaded ends the process (SIGBUS). */
#ifndef KILN_SAFETENSORS_H
#define KILN_SAFETENSORS_H

#include "engine_error.h"
#include "tensor.h"

enum safetensors_dtype { /* what a file can hold */
    SAFETENSORS_BOOL, SAFETENSORS_U8, SAFETENSORS_I8, SAFETENSORS_F8_E5M2, SAFETENSORS_F8_E4M3,
    SAFETENSORS_I16, SAFETENSORS_U16, SAFETENSORS_F16, SAFETENSORS_BF16,
    SAFETENSORS_I32, SAFETENSORS_U32, SAFETENSORS_F32, SAFETENSORS_F64, SAFETENSORS_I64, SAFETENSORS_U64,
};

struct safetensors_entry {
    const char *name;             /* owned by the set */
    enum safetensors_dtype dtype;
    int rank;                     /* 0: a scalar; at most SAFETENSORS_RANK_MAX */
    int64_t shape[8];
    const void *data;             /* in the mapping; alignment not promised */
    size_t bytes;
    const char *file;             /* name of the file it is in */
    bool is_mapped;               /* data is a file mapping: may be dropped and read again */
};
#define SAFETENSORS_RANK_MAX 8

struct safetensors;

/* safetensors_open opens DIR/STEM.safetensors or the set named by DIR/STEM.safetensors.index.json
 * ("model", "diffusion_pytorch_model"). safetensors_open_file opens one file by path.
 * safetensors_parse reads a header from memory (for the fuzzer): data is borrowed. */
bool safetensors_open(struct safetensors **ret, const char *dir, const char *stem, struct engine_error *why);
bool safetensors_open_file(struct safetensors **ret, const char *path, struct engine_error *why);
bool safetensors_parse(struct safetensors **ret, const void *data, size_t bytes, struct engine_error *why);
void safetensors_close(struct safetensors *s); /* accepts NULL */

size_t safetensors_count(const struct safetensors *s);
const struct safetensors_entry *safetensors_at(const struct safetensors *s, size_t index); /* sorted by name */
const struct safetensors_entry *safetensors_find(const struct safetensors *s, const char *name); /* or NULL */
const char *safetensors_metadata(const struct safetensors *s, const char *key); /* or NULL */
const char *safetensors_dtype_name(enum safetensors_dtype dtype); /* "BF16" */

/* safetensors_advise says how an entry's data will be used from now on, so that memory holds what is needed: SOON has the kernel begin to
 * read them and does not wait, NOW brings its pages at once and not one by one, DONE lets them go (reading them again works), ROWS lets them
 * go and turns reading ahead off. */
enum safetensors_use { SAFETENSORS_SOON, SAFETENSORS_NOW, SAFETENSORS_DONE, SAFETENSORS_ROWS };
void safetensors_advise(const struct safetensors_entry *e, enum safetensors_use use);

/* safetensors_write writes one file (render --dump, tests). Values are copied as they are. */
struct safetensors_item { const char *name; struct tensor value; };
bool safetensors_write(const char *path, const struct safetensors_item *items, size_t count, struct engine_error *why);

#endif
