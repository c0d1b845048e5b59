/* tensor_names.h - what the tensors of a model are called in the files people have.
 *
 * The engine asks by one set of names: those of the diffusers folder (transformer, VAE) and of transformers (text
 * encoder). Other files call the same numbers otherwise, store some of them fused, in another order or with two axes of 1
 * behind. This is data: tables of name pairs, and pure functions that read them in both directions.
 *
 *   part          scheme       names like                                             from
 *   transformer   DIFFUSERS    transformer_blocks.0.attn.to_q.weight                  the engine's own
 *                 BFL          double_blocks.0.img_attn.qkv.weight                    root single files, ComfyUI, GGUF
 *   text encoder  DIFFUSERS    model.layers.0.self_attn.q_proj.weight                 transformers, ComfyUI
 *                 BARE         layers.0.self_attn.q_proj.weight                       saved without its head
 *                 LLAMA        blk.0.attn_q.weight                                    llama.cpp GGUF
 *   VAE           DIFFUSERS    decoder.up_blocks.0.resnets.0.conv1.weight             the engine's own
 *                 BFL          decoder.up.3.block.0.conv1.weight                      "ae" files (up levels count backwards)
 *
 * Each scheme may stand behind a prefix ("model.diffusion_model."). Sources: engine-spec 2.3 to 2.6, 2.9. The one trap:
 * BFL keeps (shift, scale) in the last modulation where diffusers keeps (scale, shift): TENSOR_NAMES_SWAP_HALVES. q and k
 * of Qwen3 are not permuted in GGUF: its rotary embedding has the same halves in both. */
#ifndef KILN_TENSOR_NAMES_H
#define KILN_TENSOR_NAMES_H

#include "model_config.h"

#define TENSOR_NAMES_BYTES_MAX 256
#define TENSOR_NAMES_PIECES_MAX 3

enum tensor_names_part { TENSOR_NAMES_TRANSFORMER, TENSOR_NAMES_TEXT_ENCODER, TENSOR_NAMES_VAE };
enum tensor_names_scheme { TENSOR_NAMES_DIFFUSERS, TENSOR_NAMES_BFL, TENSOR_NAMES_BARE, TENSOR_NAMES_LLAMA };

/* How a part is named in a file. */
struct tensor_names {
    enum tensor_names_part part;
    enum tensor_names_scheme scheme;
    const char *prefix; /* "" or a known one; never freed */
};

enum tensor_names_change {
    TENSOR_NAMES_AS_IS,
    TENSOR_NAMES_SWAP_HALVES, /* rows [b; a] in one are [a; b] in the other */
    TENSOR_NAMES_SQUEEZE,     /* [n, k, 1, 1] in the file is [n, k] for the engine */
};

/* Where a tensor is: rows [piece * n, (piece + 1) * n) of `pieces` equal parts of a file tensor, then `change`.
 * Read the other way round: which tensor these rows of the file tensor are. */
struct tensor_names_place {
    char name[TENSOR_NAMES_BYTES_MAX];
    int piece, pieces;
    enum tensor_names_change change;
};

/* tensor_names_detect looks for one tensor that every file of a part has, under every scheme and known prefix; false when
 * there is none. `has` answers whether the files have a tensor of this name. */
typedef bool tensor_names_has(const void *files, const char *name);
bool tensor_names_detect(struct tensor_names *ret, enum tensor_names_part part, tensor_names_has *has, const void *files);

/* tensor_names_in_file: where is the tensor the engine calls `asked`? False: no tensor of this part has such a name. */
bool tensor_names_in_file(struct tensor_names_place *ret, const struct tensor_names *names, const char *asked);

/* tensor_names_of_file: which tensors does a file tensor hold? Gives how many (3 for fused q, k, v); 0: none known. */
int tensor_names_of_file(struct tensor_names_place ret[TENSOR_NAMES_PIECES_MAX], const struct tensor_names *names,
                         const char *file_name);

/* tensor_names_linears does the same for the module names of adapters, which have no ".weight" and come in either scheme:
 * "double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn.to_q"; is_flat: with '_' for every '.'. Linears only. */
int tensor_names_linears(struct tensor_names_place ret[TENSOR_NAMES_PIECES_MAX], const char *module, bool is_flat);

/* tensor_names_shape: rank and shape of a transformer tensor by its diffusers name; rank 0: no tensor of this model. */
int tensor_names_shape(int64_t shape[2], const struct transformer_config *config, const char *name);

/* Beside NAME.weight a quantised file keeps scales, under several spellings. Gives the name for spelling 0, 1, ..;
 * false behind the last. `weight` ends in ".weight". */
enum tensor_names_scale {
    TENSOR_NAMES_WEIGHT_SCALE,   /* fp8: the tensor's scale; nvfp4: the block scales */
    TENSOR_NAMES_WEIGHT_SCALE_2, /* nvfp4: the tensor's scale */
    TENSOR_NAMES_INPUT_SCALE,
    TENSOR_NAMES_COLUMN_SCALE,   /* what each column of the inputs is multiplied by before */
    TENSOR_NAMES_QUANT_NOTE,     /* u8 text: JSON that names the format */
};
bool tensor_names_beside(char ret[TENSOR_NAMES_BYTES_MAX], const char *weight, enum tensor_names_scale kind, int spelling);

#endif
