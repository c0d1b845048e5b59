/* gguf.h - reads GGUF files (versions 2 and 3), and believes nothing they say.
 *
 * A file is metadata (typed values under keys), a table of tensors, and their data. Checked at open: counts, text lengths,
 * types, alignment, products of sizes, offsets (each tensor where the one before ends, padded; none outside the file),
 * names and keys that occur twice. Refused with a sentence: number formats quant.h does not know, big-endian files, one
 * piece of a split file. Opening reads the head with pread and never touches the mapping.
 *
 * GGUF writes sizes fastest first; shapes here are slowest first, as everywhere in the engine: a linear is [out, in].
 * Where a converter had to reshape a tensor to fit blocks (`comfy.gguf.orig_shape.NAME`), `shape` is the original one and
 * `row_values` the row length that the blocks were made with. */
#ifndef KILN_GGUF_H
#define KILN_GGUF_H

#include "engine_error.h"
#include "quant.h"

#define GGUF_RANK_MAX 4

struct gguf_entry {
    const char *name;          /* owned by the file */
    enum quant_format format;
    int rank;                  /* 1 .. GGUF_RANK_MAX */
    int64_t shape[GGUF_RANK_MAX];
    int64_t row_values;        /* the data is [elements / row_values, row_values] in blocks */
    const void *data;          /* in the mapping; alignment not promised */
    size_t bytes;
    const char *file;          /* name of the file it is in */
    bool is_mapped;
};

struct gguf;

/* gguf_open_file maps a file. gguf_parse reads one from memory (for the fuzzer): data is borrowed. */
bool gguf_open_file(struct gguf **ret, const char *path, struct engine_error *why);
bool gguf_parse(struct gguf **ret, const void *data, size_t bytes, struct engine_error *why);
void gguf_close(struct gguf *g); /* accepts NULL */

size_t gguf_count(const struct gguf *g);
const struct gguf_entry *gguf_at(const struct gguf *g, size_t index); /* sorted by name */
const struct gguf_entry *gguf_find(const struct gguf *g, const char *name); /* or NULL */

/* Metadata. _has: is there such a key? The others give an error that names the key when it is absent or holds something
 * else: whole numbers of any width are read as one kind if they fit, a text is one without NUL in it. Texts live as long as
 * the file is open. */
bool gguf_has(const struct gguf *g, const char *key);
bool gguf_text(const struct gguf *g, const char **ret, const char *key, struct engine_error *why);
bool gguf_whole(const struct gguf *g, int64_t *ret, const char *key, struct engine_error *why);
bool gguf_number(const struct gguf *g, double *ret, const char *key, struct engine_error *why);
bool gguf_flag(const struct gguf *g, bool *ret, const char *key, struct engine_error *why);
bool gguf_wholes(const struct gguf *g, int64_t *ret, size_t capacity, size_t *ret_count, const char *key,
                 struct engine_error *why); /* an array of whole numbers */
const char *gguf_key(const struct gguf *g, size_t index); /* sorted; NULL behind the last */

#endif
