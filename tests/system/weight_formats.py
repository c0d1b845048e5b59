"""Transformers and text encoders in every number format people have, beside a folder with the same values in f32.

A file is made of random blocks (not of quantised weights: no package writes all of the formats), and decoded by the package
gguf, fp8 and nvfp4 by their definition (engine-spec 2.8). The folder with the decoded values is what the file means."""

import json
import math
import re
import struct
import sys
import zlib

import gguf
import numpy as np

from farm import ROOT

sys.path.insert(0, str(ROOT / "tests/golden"))

from bfl_names import bfl_state  # noqa: E402
from nvfp4 import code_values, swizzled  # noqa: E402

GGUF = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
SAFETENSORS = ["f32", "f16", "bf16", "fp8", "nvfp4", "mixed"]  # mixed: layer by layer one of the last three, each with its note
SCALE_AT = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2],
            "Q5_K": [0, 2], "Q6_K": [208]}


def e4m3_table():
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, (codes & 7).astype(np.float64)
    values = np.where(exponent == 0, mantissa / 8 * 2.0 ** -6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    return np.where(codes & 128, -values, values).astype(np.float32)  # codes 127 and 255 are NaN and never drawn


E4M3 = e4m3_table()


def bf16_bits(values):
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def rounded(values):
    return (bf16_bits(values).astype(np.uint32) << 16).view(np.float32)


def random_of(name):
    return np.random.default_rng(zlib.crc32(name.encode()))


# --- the plain values of a model ------------------------------------------------------------------------------------------


def plain(tensors):
    """bf16 values in f32 arrays, of the shapes and spreads that the maker of random models says."""
    state = {}
    for name, (shape, mean, std) in tensors.items():
        state[name] = (np.zeros((), np.int64) if mean is None
                       else rounded(random_of(name).normal(mean, std, shape).astype(np.float32)))
    return state


def is_linear(name, values):
    """What published files quantise: matrices inside the blocks."""
    return values.ndim == 2 and ("_blocks." in name or ".layers." in name or "blk." in name) and "norm" not in name


# --- formats: (stored bytes, decoded values) -------------------------------------------------------------------------------


def ggml(kind, name, shape):
    """Random blocks whose values spread like 1 / sqrt(columns)."""
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = random_of(name)
    blocks = rng.integers(0, 256, (math.prod(shape) // values, size), dtype=np.uint8)
    scale = 1.0
    for turn in range(2):
        for at in SCALE_AT[kind]:
            drawn = (scale * (1 + rng.random(len(blocks)) / 4)).astype(np.float16)
            blocks[:, at:at + 2] = drawn.view(np.uint8).reshape(-1, 2)
        decoded = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]).astype(np.float32)
        if turn == 0:
            scale = 1 / math.sqrt(shape[1]) / float(np.sqrt(np.mean(decoded.astype(np.float64) ** 2)))
    return blocks.reshape(shape[0], -1), decoded.reshape(shape)


def fp8(name, shape):
    codes = random_of(name).integers(0, 112, shape, dtype=np.uint8) | random_of(name + "-").integers(0, 2, shape, dtype=np.uint8) << 7
    scale = np.float32(1 / math.sqrt(shape[1]) / np.sqrt(np.mean(E4M3[codes].astype(np.float64) ** 2)))
    return codes, scale, E4M3[codes] * scale


def nvfp4(name, shape):
    rng = random_of(name)
    data = rng.integers(0, 256, (shape[0], shape[1] // 2), dtype=np.uint8)
    scales = rng.integers(40, 80, (shape[0], shape[1] // 16), dtype=np.uint8)
    values = code_values(data)
    spread = values * np.repeat(E4M3[scales], 16, 1)
    scale = np.float32(1 / math.sqrt(shape[1]) / np.sqrt(np.mean(spread.astype(np.float64) ** 2)))
    return data, swizzled(scales), scale, values * np.repeat(scale * E4M3[scales], 16, 1)


# --- files ------------------------------------------------------------------------------------------------------------------


def write_safetensors(path, tensors):
    """tensors: name: (dtype, shape, bytes)."""
    head, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, data) in tensors.items():
        head[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, data in tensors.values():
            file.write(data)


def as_f32(values):
    return ("I64", (), values.tobytes()) if values.dtype == np.int64 else ("F32", values.shape, values.tobytes())


def as_bf16(values):
    return ("I64", (), values.tobytes()) if values.dtype == np.int64 else ("BF16", values.shape, bf16_bits(values).tobytes())


def as_f16(values):
    return ("F16", values.shape, values.astype(np.float16).tobytes())


def note(name, text):
    """What stands behind it keeps its alignment: writers of the format sort by the size of the numbers."""
    text = text.ljust(-(-len(text) // 8) * 8)
    return {name.removesuffix("weight") + "comfy_quant": ("U8", (len(text),), text.encode())}


def make_safetensors(path, state, kinds):
    """Writes the file and returns the values it means."""
    out, means = {}, {}
    for name, values in state.items():
        kind = ["bf16", "fp8", "nvfp4"][zlib.crc32(name.encode()) % 3] if kinds == "mixed" else kinds
        means[name] = values
        if kinds == "mixed" and kind != "bf16" and is_linear(name, values):
            out |= note(name, json.dumps({"format": {"fp8": "float8_e4m3fn", "nvfp4": "nvfp4"}[kind]}))
        if kind == "f32":
            out[name] = as_f32(values)
        elif kind == "f16" and values.dtype != np.int64:
            means[name] = values.astype(np.float16).astype(np.float32)
            out[name] = as_f16(values)
        elif kind == "fp8" and is_linear(name, values):
            codes, scale, means[name] = fp8(name, values.shape)
            out[name] = ("F8_E4M3", values.shape, codes.tobytes())
            out[name.removesuffix("weight") + "weight_scale"] = ("F32", (), scale.tobytes())
        elif kind == "nvfp4" and is_linear(name, values):
            data, scales, scale, means[name] = nvfp4(name, values.shape)
            out[name] = ("U8", data.shape, data.tobytes())
            out[name.removesuffix("weight") + "weight_scale"] = ("F8_E4M3", scales.shape, scales.tobytes())
            out[name.removesuffix("weight") + "weight_scale_2"] = ("F32", (), scale.tobytes())
        else:
            out[name] = as_bf16(values)
    write_safetensors(path, out)
    return means


def make_gguf(path, state, kind, architecture, numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer, means = gguf.GGUFWriter(path, architecture), {}
    for key, value in numbers.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for name, values in state.items():
        means[name] = values
        if not is_linear(name, values) or kind == "F32":
            writer.add_tensor(name, values)
        elif kind == "F16":
            means[name] = values.astype(np.float16).astype(np.float32)
            writer.add_tensor(name, values.astype(np.float16))
        elif kind == "BF16":
            writer.add_tensor(name, bf16_bits(values).view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            blocks, means[name] = ggml(kind, name, values.shape)
            writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    return means


def bfl(state):
    return bfl_state(state, np.concatenate)


LLAMA = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def llama(state):
    out = {}
    for name, values in state.items():
        _, rest = name.split(".", 1)
        if rest.startswith("layers."):
            _, layer, module = rest.split(".", 2)
            out[f"blk.{layer}.{LLAMA[module.removesuffix('.weight')]}.weight"] = values
        else:
            out[{"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[rest]] = values
    return out


VAE = [(r"(en|de)coder\.mid_block\.resnets\.0", r"\1coder.mid.block_1"), (r"(en|de)coder\.mid_block\.resnets\.1", r"\1coder.mid.block_2"),
       (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"), (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
       (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"), (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
       (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}"),
       (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
       (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"), ("conv_shortcut", "nin_shortcut"),
       ("conv_norm_out", "norm_out"), (r"^quant_conv", "encoder.quant_conv"), (r"^post_quant_conv", "decoder.post_quant_conv")]


def bfl_vae(state):
    """As "ae" files have it: up levels counted from the picture's side, matrices of the attention as convolutions."""
    out = {}
    for name, values in state.items():
        theirs = name
        for pattern, other in VAE:
            theirs = re.sub(pattern, other, theirs)
        out[theirs] = values[..., None, None] if ".attn_1." in theirs and values.ndim == 2 else values
    return out
