/* weight_files.h - one part of a model as named tensors, whatever files it comes in.
 *
 * A part (transformer, text encoder, VAE) is a folder of the diffusers layout or one file, safetensors or GGUF, under any
 * of the name schemes and prefixes of tensor_names.h. It is asked by the engine's names; an answer says where the values
 * are and in which number format, never copies them. Nothing is assumed about which tensors are quantised: each says so
 * itself, by its dtype and the scales beside it, and what the file's metadata says about it must agree:
 *
 *   F32 F16 BF16, GGUF's formats   the tensor alone
 *   FP8_E4M3                       F8_E4M3 and weight_scale or scale_weight, one value (none: a scale of 1); for products in
 *                                  FP8 input_scale or scale_input, one value (none: each row has its own)
 *   NVFP4                          U8 [n, k/2], block scales F8_E4M3 in tiles, weight_scale_2
 *
 * Metadata that says full_precision_matrix_mult of a layer is heeded: its values are those of the file, and its products are never in
 * FP8, whatever the precision. Refused with a sentence that names file and tensor: other dtypes, scales per row, inputs scaled by
 * columns, formats that metadata calls otherwise, and metadata that says more than this.
 * The values of a fused file tensor are a run of its rows; the halves of one are swapped when the scheme says so. */
#ifndef KILN_WEIGHT_FILES_H
#define KILN_WEIGHT_FILES_H

#include "gguf.h"
#include "quant.h"
#include "safetensors.h"
#include "tensor_names.h"

struct weight_files;

/* A tensor of the engine. Everything pointed at lives as long as the files are open. */
struct weight {
    char asked[TENSOR_NAMES_BYTES_MAX]; /* the engine's name */
    const char *file, *name;    /* where it is, and what it is called there */
    int rank;
    int64_t shape[4];           /* the engine's */
    struct quant_matrix matrix; /* the file tensor as rows; its width need not be the last axis. has_fp8_products: it may have */
    int64_t first, rows;        /* the rows of `matrix` that are this tensor */
    bool swap_halves;           /* they are [b; a] of the engine's [a; b] */
    bool is_mapped;
};

/* weight_files_open takes a file, or a folder with the part's usual file or shards. weight_files_parse reads one file from
 * memory, either format: data is borrowed. Neither asks whether the part's tensors are there: see weight_files_is_part. */
bool weight_files_open(struct weight_files **ret, enum tensor_names_part part, const char *path, struct engine_error *why);
bool weight_files_parse(struct weight_files **ret, enum tensor_names_part part, const void *data, size_t bytes,
                        struct engine_error *why);
void weight_files_close(struct weight_files *f); /* accepts NULL */

/* weight_files_is_part: was a name scheme of the part recognised? Without one the engine's own names are looked up. */
bool weight_files_is_part(const struct weight_files *f);
const char *weight_files_path(const struct weight_files *f);
const struct gguf *weight_files_gguf(const struct weight_files *f); /* for its metadata; NULL: safetensors */

bool weight_files_has(const struct weight_files *f, const char *name);
bool weight_files_find(const struct weight_files *f, struct weight *ret, const char *name, struct engine_error *why);

/* weight_files_list: what stands in the files, in their order, for inspection; false behind the last. Scales and notes
 * that belong to a weight count no parameters. */
struct weight_line {
    const char *name;
    const char *format;      /* "BF16", "Q4_K", "NVFP4", "I64" .. */
    uint64_t parameters, bytes;
    bool is_used;            /* a picture from text needs it */
    uint64_t kept_bytes;     /* that the CPU reads it where it is: quantised, with its block scales; 0: it converts */
    bool has_fp8_products;   /* where the precision asks for them */
};
bool weight_files_list(const struct weight_files *f, size_t index, struct weight_line *ret);

int64_t weight_files_values(const struct weight *w);      /* values */
bool weight_files_is_finite(const struct weight *w);     /* no value is NaN or infinite */

/* weight_files_view: the values as they stand in the file, when they are F32 or BF16 in the engine's order; data NULL otherwise.
 * weight_files_decode fills `to`, contiguous, of the weight's count of values, F32 or BF16 (rounded to nearest even). */
struct tensor weight_files_view(const struct weight *w);
void weight_files_decode(struct tensor to, const struct weight *w);

/* weight_files_runs: the rows of a matrix as its file has them, in the engine's order; how many runs that are, or 0 if a row
 * of the file is not one of the matrix. */
#define WEIGHT_FILES_RUNS_MAX 2
int weight_files_runs(const struct weight *w, struct quant_run ret[WEIGHT_FILES_RUNS_MAX]);

/* weight_files_advise: see safetensors_advise. */
void weight_files_advise(const struct weight *w, enum safetensors_use use);

#endif
