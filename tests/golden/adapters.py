#!/usr/bin/env python3
"""Adapters in every key style and kind, with the change of the weights they mean, for tests/unit/test_lora.c.

    python3 -m venv venv && venv/bin/pip install numpy==2.4.6 safetensors
    venv/bin/python adapters.py ../unit/data
    venv/bin/python adapters.py MADE/files/lora-*.safetensors > files/lora.json

The first makes small files. For a transformer of one double and one single block: hidden 16, context 24, 8 channels, 8 time channels, heads of 16.

lora-{peft,raw,bfl,comfy,kohya}.safetensors   one and the same low-rank adapter, rank 3, alpha 6
lora-{loha,lokr,dora}.safetensors             the other kinds
lora-expected.safetensors    `plain.TENSOR`, `loha.TENSOR` ..: the change of each weight, f32 of sums in f64, and
                             `base.TENSOR`: the weights that DoRA normalises. Names and row order are diffusers'.

Formulas: LoRA (Hu et al. 2021) W + alpha/r B A. LyCORIS (Yeh et al. 2024): LoHa alpha/r (a1 b1) o (a2 b2); LoKr
alpha/r kron(w1, w2), where two full factors have scale 1. DoRA (Liu et al. 2024, eq. 5): m (W + D) / |W + D|, norms over
the inputs of each output (peft; LyCORIS with wd_on_out) or over the outputs of each input (LyCORIS without).

The second sums up the adapters of the golden cases, for a test that has only some of these files: of the change of each
weight the norm, and the sum of its values times cos(0), cos(1), ..."""
import json
import pathlib
import re
import sys

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

H, RANK, ALPHA = 16, 3, 6.0
# module in BFL files: its parts in diffusers, rows of each, columns
MODULES = {
    "img_in": (["x_embedder"], H, 8),
    "double_blocks.0.img_attn.qkv": ([f"transformer_blocks.0.attn.to_{c}" for c in "qkv"], H, H),
    "double_blocks.0.txt_attn.qkv": ([f"transformer_blocks.0.attn.add_{c}_proj" for c in "qkv"], H, H),
    "double_blocks.0.txt_attn.proj": (["transformer_blocks.0.attn.to_add_out"], H, H),
    "double_blocks.0.img_mlp.0": (["transformer_blocks.0.ff.linear_in"], 6 * H, H),
    "single_blocks.0.linear1": (["single_transformer_blocks.0.attn.to_qkv_mlp_proj"], 9 * H, H),
    "single_blocks.0.linear2": (["single_transformer_blocks.0.attn.to_out"], H, 4 * H),
    "final_layer.adaLN_modulation.1": (["norm_out.linear"], 2 * H, H),
}
rng = np.random.default_rng(7)


def numbers(*shape):
    """Exact in bf16, so that every file can hold them; doubling keeps them exact."""
    return rng.normal(0, 0.3, shape).astype(ml_dtypes.bfloat16).astype(np.float32)


def ours(bfl_rows, module):
    """Rows in diffusers' order: the last modulation is (scale, shift) there and (shift, scale) in BFL."""
    return np.concatenate(np.split(bfl_rows, 2)[::-1]) if module.startswith("final") else bfl_rows


def parts(change, module):
    names, rows, _ = MODULES[module]
    return {f"{n}.weight": np.ascontiguousarray(ours(change[i * rows:(i + 1) * rows], module)) for i, n in enumerate(names)}


def put(expected, kind, module, change):
    expected |= {f"{kind}.{n}": v.astype(np.float32) for n, v in parts(change, module).items()}


def wide(*arrays):
    return [a.astype(np.float64) for a in arrays]


def plain(out, expected):
    files = {name: {} for name in ("peft", "raw", "bfl", "comfy", "kohya")}
    for module, (names, rows, columns) in MODULES.items():
        down, up = numbers(RANK, columns), numbers(rows * len(names), RANK)
        a, b = wide(down, up)
        put(expected, "plain", module, ALPHA / RANK * (b @ a))
        for i, name in enumerate(names):
            piece = np.ascontiguousarray(ours(up[i * rows:(i + 1) * rows], module))
            files["peft"] |= {f"transformer.{name}.lora_A.weight": down.astype(ml_dtypes.bfloat16), f"transformer.{name}.lora_B.weight": piece.astype(ml_dtypes.bfloat16)}
            files["raw"] |= {f"base_model.model.{name}.lora_A.weight": down.astype(np.float16), f"base_model.model.{name}.lora_B.weight": (2 * piece).astype(np.float16)}
        files["bfl"] |= {f"diffusion_model.{module}.lora_A.weight": down, f"diffusion_model.{module}.lora_B.weight": 2 * up}
        files["comfy"] |= {f"diffusion_model.{module}.lora_down.weight": down, f"diffusion_model.{module}.lora_up.weight": up,
                           f"diffusion_model.{module}.alpha": np.array(ALPHA, np.float32)}
        flat = "lora_unet_" + module.replace(".", "_")
        files["kohya"] |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": np.array([ALPHA], ml_dtypes.bfloat16)}
    meta = {"peft": {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": ALPHA, "transformer.alpha_pattern": {}})}}
    for name, tensors in files.items():
        save_file(tensors, out / f"lora-{name}.safetensors", metadata=meta.get(name))


def loha(out, expected):
    tensors = {}
    for module in ("double_blocks.0.img_attn.qkv", "final_layer.adaLN_modulation.1"):
        names, rows, columns = MODULES[module]
        rows *= len(names)
        f = {"w1_a": numbers(rows, 2), "w1_b": numbers(2, columns), "w2_a": numbers(rows, 2), "w2_b": numbers(2, columns)}
        a1, b1, a2, b2 = wide(*f.values())
        put(expected, "loha", module, 5 / 2 * (a1 @ b1) * (a2 @ b2))
        flat = "lycoris_" + module.replace(".", "_")
        tensors |= {f"{flat}.hada_{k}": v for k, v in f.items()} | {f"{flat}.alpha": np.array(5.0)}
    save_file(tensors, out / "lora-loha.safetensors")


def lokr(out, expected):
    tensors, rank, alpha = {}, 2, 3.0
    sides = {"double_blocks.0.img_attn.qkv": ((6, 4), (8, 4), "full", "low"), "double_blocks.0.txt_attn.proj": ((4, 2), (4, 8), "low", "full"),
             "single_blocks.0.linear2": ((2, 8), (8, 8), "low", "low"), "img_in": ((4, 4), (4, 2), "full", "full")}
    for module, (one, two, *forms) in sides.items():
        whole, prefix = [], "lora_unet_" + module.replace(".", "_")
        for i, (shape, form) in enumerate(zip((one, two), forms), 1):
            if form == "full":
                tensors[f"{prefix}.lokr_w{i}"] = numbers(*shape)
                whole.append(tensors[f"{prefix}.lokr_w{i}"].astype(np.float64))
            else:
                tensors[f"{prefix}.lokr_w{i}_a"], tensors[f"{prefix}.lokr_w{i}_b"] = numbers(shape[0], rank), numbers(rank, shape[1])
                whole.append(np.matmul(*wide(tensors[f"{prefix}.lokr_w{i}_a"], tensors[f"{prefix}.lokr_w{i}_b"])))
        tensors[f"{prefix}.alpha"] = np.array(alpha, np.float32)
        put(expected, "lokr", module, (1 if forms == ["full", "full"] else alpha / rank) * np.kron(*whole))
    save_file(tensors, out / "lora-lokr.safetensors")


def dora(out, expected):
    """Magnitudes by row under both names, one of them on a fused and one on a swapped module, and by column."""
    tensors = {}
    for module, key in (("double_blocks.0.img_attn.qkv", "dora_scale"), ("final_layer.adaLN_modulation.1", "lora_magnitude_vector.weight"),
                        ("single_blocks.0.linear2", "by column")):
        names, rows, columns = MODULES[module]
        rows *= len(names)
        base, down, up = rng.normal(0, 1, (rows, columns)).astype(np.float32), numbers(RANK, columns), numbers(rows, RANK)
        w, a, b = wide(base, down, up)
        changed, axis = w + 2 * b @ a, 0 if key == "by column" else 1
        norm = np.sqrt((changed ** 2).sum(axis, keepdims=True))
        m = (norm * rng.uniform(0.8, 1.2, norm.shape)).astype(np.float32)
        put(expected, "dora", module, m * changed / norm - w)
        put(expected, "base", module, w)
        tensors |= {f"diffusion_model.{module}.lora_down.weight": down, f"diffusion_model.{module}.lora_up.weight": up, f"diffusion_model.{module}.alpha": np.array(ALPHA, np.float32),
                    f"diffusion_model.{module}.{'dora_scale' if axis == 0 else key}": m if "dora" in key or axis == 0 else m[:, 0].copy()}
    save_file(tensors, out / "lora-dora.safetensors")


# BFL module of the golden files, and the diffusers modules it holds; a dot of the pattern is a '.' or a '_' of a key
GOLDEN = [(r"img_in", "x_embedder"), (r"final_layer.linear", "proj_out"), (r"(.*_modulation.*).lin", r"\1.linear"),
          (r"double_blocks.(\d).img_attn.qkv", *(rf"transformer_blocks.\1.attn.to_{c}" for c in "qkv")),
          (r"double_blocks.(\d).txt_attn.qkv", *(rf"transformer_blocks.\1.attn.add_{c}_proj" for c in "qkv")),
          (r"double_blocks.(\d).img_attn.proj", r"transformer_blocks.\1.attn.to_out.0"), (r"double_blocks.(\d).txt_attn.proj", r"transformer_blocks.\1.attn.to_add_out"),
          (r"double_blocks.(\d).img_mlp.0", r"transformer_blocks.\1.ff.linear_in"), (r"double_blocks.(\d).img_mlp.2", r"transformer_blocks.\1.ff.linear_out"),
          (r"double_blocks.(\d).txt_mlp.0", r"transformer_blocks.\1.ff_context.linear_in"), (r"double_blocks.(\d).txt_mlp.2", r"transformer_blocks.\1.ff_context.linear_out"),
          (r"single_blocks.(\d).linear1", r"single_transformer_blocks.\1.attn.to_qkv_mlp_proj"), (r"single_blocks.(\d).linear2", r"single_transformer_blocks.\1.attn.to_out")]


def golden_names(key):
    """The diffusers modules behind the key of a `down` factor."""
    module = re.sub(r"\.lora_(A|down)\.weight$", "", key)
    if module.startswith("transformer."):
        return [module.removeprefix("transformer.")]
    module = re.sub("^lora_unet_|^diffusion_model[.]", "", module)
    for pattern, *names in GOLDEN:
        if re.fullmatch(pattern, module):
            return [re.sub(pattern, n, module) for n in names]
    raise KeyError(key)


def summary(path):
    tensors, rows = load_file(path), {}
    with safe_open(path, "np") as f:
        meta = json.loads((f.metadata() or {}).get("lora_adapter_metadata", "{}"))
    for key in sorted(k for k in tensors if re.search(r"lora_(A|down)\.weight$", k)):
        a, b = wide(tensors[key], tensors[key.replace("lora_A", "lora_B").replace("lora_down", "lora_up")])
        alpha = tensors.get(re.sub(r"lora_(A|down)\.weight$", "alpha", key), meta.get("transformer.lora_alpha", len(a)))
        names = golden_names(key)
        for name, change in zip(names, np.split(float(alpha) / len(a) * (b @ a), len(names))):
            rows[name + ".weight"] = [float(np.sqrt((change ** 2).sum())), float((change.ravel() * np.cos(np.arange(change.size))).sum())]
    return rows


def main():
    if sys.argv[1].endswith(".safetensors"):
        lines = {pathlib.Path(p).name: summary(p) for p in sys.argv[1:]}
        print("{\n" + ",\n".join(f"{json.dumps(n)}: {json.dumps(r)}" for n, r in lines.items()) + "\n}")
        return
    out, expected = pathlib.Path(sys.argv[1]), {}
    for kind in (plain, loha, lokr, dora):
        kind(out, expected)
    save_file(expected, out / "lora-expected.safetensors")


main()
