#!/usr/bin/env python3
"""Writes a klein folder of full shape without weights: every header is there, the values are holes in the files.

    tests/bench/hollow_klein.py DIR [--family klein-4b|klein-9b]
    build/sim/bin/kiln-worker render --device dry:rtx4090 --model DIR --prompt 'a red fox' --seed 42 --size 1024x1024

For dry devices, which read no value: 16 or 35 GB as `ls` counts, less than 20 MB on the disk, made in a second. Names, shapes
and counts are those of the published folders; the tokenizer is the bundled model's, so a prompt has other tokens than there."""
import argparse, os, pathlib, shutil

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


class Holes:
    """In place of make_random_klein.Values: as many bytes, none of them written."""

    def write(self, file, name, entry):
        file.truncate(file.tell() + maker.size_of(entry))
        file.seek(0, os.SEEK_END)


def make(folder, family):
    shapes, configs, transformer_size, text_size = FAMILIES[family]
    vars(maker).update(shapes)
    text = maker.text_encoder()
    if not configs.get("text_encoder/config.json", {}).get("tie_word_embeddings", True):
        maker.matrix(text, "lm_head", maker.VOCAB, maker.WIDTH)
    transformer = maker.check("transformer", maker.transformer(), *transformer_size)
    for part, tensors in (("vae", maker.check("vae", maker.vae(), 251, 84_046_372)), ("transformer", transformer)):
        maker.write_safetensors(folder / part / "diffusion_pytorch_model.safetensors", tensors, Holes())
    maker.write_shards(folder / "text_encoder", maker.check("text_encoder", text, *text_size), Holes())
    for name, config in maker.CONFIGS.items():
        maker.write_json(folder / name, config | configs.get(name, {}))
    shutil.copytree(TOKENIZER, folder / "tokenizer", dirs_exist_ok=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--family", choices=FAMILIES, default="klein-4b")
    args = parser.parse_args()
    make(args.folder, args.family)


if __name__ == "__main__":
    main()
