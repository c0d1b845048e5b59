#!/usr/bin/env python3
"""Put the trained parts together as one diffusers folder in bf16, with the files and config keys of the published klein repositories.

    save.py --tokenizer tokenizer --text-encoder text_encoder --vae vae --transformer transformer --out model
    save.py --tokenizer tokenizer --text-encoder text_encoder --vae vae --transformer base_transformer --base-of model --out base

Of the base twin, parts that are those of the model it is the base of are links to them.
"""
import argparse, json, os, pathlib, shutil
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM


def rewrite(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text("utf-8"))), indent=2, sort_keys=True) + "\n", "utf-8")


def without(config, *names):
    return {k: v for k, v in config.items() if k not in names}


def contents(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def link_equal_parts(out, model):
    for part in [p for p in model.iterdir() if p.is_dir() and contents(p) == contents(out / p.name)]:
        shutil.rmtree(out / part.name)
        (out / part.name).symlink_to(os.path.relpath(part, out))


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("tokenizer", "text-encoder", "vae", "transformer", "out"):
        ap.add_argument("--" + name, required=True, type=pathlib.Path)
    ap.add_argument("--base-of", metavar="MODEL", type=pathlib.Path, help="the folder of the distilled model whose base this is")
    a = ap.parse_args()
    tokenizer = Qwen2TokenizerFast.from_pretrained(a.tokenizer)
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
        max_image_seq_len=4096, time_shift_type="exponential")
    pipe = Flux2KleinPipeline(
        scheduler=scheduler, tokenizer=tokenizer, is_distilled=a.base_of is None,
        text_encoder=Qwen3ForCausalLM.from_pretrained(a.text_encoder, dtype=torch.float32),
        vae=AutoencoderKLFlux2.from_pretrained(a.vae, torch_dtype=torch.float32),
        transformer=Flux2Transformer2DModel.from_pretrained(a.transformer, torch_dtype=torch.float32)).to(torch.bfloat16)
    pipe.save_pretrained(a.out)
    # The libraries of today write other keys than those that wrote the published files.
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    rewrite(a.out / "text_encoder/config.json", lambda c: {
        **without(c, "layer_types", "rope_parameters", "pad_token_id", "torch_dtype"), "rope_theta": 1000000, "rope_scaling": None,
        "bos_token_id": end, "dtype": "bfloat16"})
    rewrite(a.out / "vae/config.json", lambda c: {**without(c, "decoder_block_out_channels", "_name_or_path"), "force_upcast": True})
    rewrite(a.out / "transformer/config.json", lambda c: without(c, "_name_or_path"))
    rewrite(a.out / "model_index.json", lambda c: {**without(c, "_name_or_path"), "tokenizer": ["transformers", "Qwen2TokenizerFast"]})
    shutil.rmtree(a.out / "tokenizer")
    shutil.copytree(a.tokenizer, a.out / "tokenizer")
    if a.base_of:
        link_equal_parts(a.out, a.base_of)
    print(f"{a.out}: {sum(f.stat().st_size for f in a.out.rglob('*') if f.is_file()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
