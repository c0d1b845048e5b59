#!/usr/bin/env python3
"""Writes a klein folder of full shape without weights: every header is there, the values are holes in the files.

    tests/bench/hollow_klein.py DIR [--family klein-4b|klein-9b] [--format bf16|fp8|nvfp4|Q8_0|Q4_K]
    build/sim/bin/kiln-worker render --device dry:rtx4090 --model DIR --prompt 'a red fox' --seed 42 --size 1024x1024

For dry devices, which read no value: 16 or 35 GB as `ls` counts, less than 20 MB on the disk, made in a second. Names, shapes
and counts are those of the published folders; the tokenizer is the bundled model's, so a prompt has other tokens than there.
With a format other than bf16 the linears of the blocks are in it, in both models; Q8_0 and Q4_K are GGUF files in place of the
parts' folders."""
import argparse, math, os, pathlib, shutil, struct

import make_random_klein as maker

TOKENIZER = pathlib.Path(__file__).resolve().parents[2] / "engine/pocket/model/tokenizer"

# shapes by the names of make_random_klein.py; configs that differ; (tensors, values) of transformer and text encoder
FAMILIES = {
    "klein-4b": ({}, {}, (169, 3_875_544_576), (398, 4_022_468_096)),
    "klein-9b": ({"HIDDEN": 4096, "DOUBLES": 8, "SINGLES": 24, "CONTEXT": 12288, "WIDTH": 4096, "INNER": 12288},
                 {"transformer/config.json": {"num_attention_heads": 32, "num_layers": 8, "num_single_layers": 24,
                                              "joint_attention_dim": 12288},
                  "text_encoder/config.json": {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}},
                 (233, 9_078_581_248), (399, 8_190_735_360)),
}


GGUF = {"Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144)} # type, values and bytes of a block
GGUF_F32, GGUF_BF16 = (0, 1, 4), (30, 1, 2)
GGUF_ALIGN = 32
FORMATS = ("bf16", "fp8", "nvfp4", *GGUF)


def hole(file, size):
    file.truncate(file.tell() + size)
    file.seek(0, os.SEEK_END)


class Holes:
    """In place of make_random_klein.Values: as many bytes, none of them written but scales, which are looked at."""

    def write(self, file, name, entry):
        if maker.dtype_of(entry) == "F32" and entry[0] == ():
            file.write(struct.pack("<f", entry[1]))
        else:
            hole(file, maker.size_of(entry))


def write_gguf(path, tensors, format):
    """Version 3 without metadata: a list of names, extents from the inside out, types and places, then the values."""
    head, at = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), 0), 0
    for name, (shape, *_) in tensors.items():
        is_block = len(shape) == 2 and ("blocks." in name or "layers." in name)
        number, values, size = GGUF[format] if is_block else GGUF_BF16 if len(shape) == 2 else GGUF_F32
        head += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", number, at)
        at += -(-math.prod(shape) // values * size // GGUF_ALIGN) * GGUF_ALIGN
    with open(path, "wb") as file:
        file.write(head + b"\0" * (-len(head) % GGUF_ALIGN))
        hole(file, at)


def write_quantised(folder, parts, format):
    for part, tensors in parts.items():
        if format in GGUF:
            write_gguf(folder / f"{part}.gguf", tensors, format)
        else:
            maker.write_safetensors(folder / f"{part}.safetensors", maker.quantised(tensors, format), Holes())


def make(folder, family, format="bf16"):
    shapes, configs, transformer_size, text_size = FAMILIES[family]
    vars(maker).update(shapes)
    text = maker.text_encoder()
    if not configs.get("text_encoder/config.json", {}).get("tie_word_embeddings", True):
        maker.matrix(text, "lm_head", maker.VOCAB, maker.WIDTH)
    transformer = maker.check("transformer", maker.transformer(), *transformer_size)
    text = maker.check("text_encoder", text, *text_size)
    maker.write_safetensors(folder / "vae/diffusion_pytorch_model.safetensors", maker.check("vae", maker.vae(), 251, 84_046_372), Holes())
    if format == "bf16":
        maker.write_safetensors(folder / "transformer/diffusion_pytorch_model.safetensors", transformer, Holes())
        maker.write_shards(folder / "text_encoder", text, Holes())
    else:
        write_quantised(folder, {"transformer": transformer, "text_encoder": text}, format)
    for name, config in maker.CONFIGS.items():
        if format == "bf16" or name.split("/")[0] not in ("transformer", "text_encoder"): # a file's dimensions are told from its tensors
            maker.write_json(folder / name, config | configs.get(name, {}))
    shutil.copytree(TOKENIZER, folder / "tokenizer", dirs_exist_ok=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--family", choices=FAMILIES, default="klein-4b")
    parser.add_argument("--format", choices=FORMATS, default="bf16")
    args = parser.parse_args()
    make(args.folder, args.family, args.format)


if __name__ == "__main__":
    main()
