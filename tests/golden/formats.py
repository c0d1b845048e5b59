#!/usr/bin/env python3
"""Vectors for the number formats of weight files: random blocks and what they mean, for tests/unit/test_quant.c.

    python3 -m venv venv && venv/bin/pip install numpy==2.4.6 gguf==0.19.0 ml_dtypes==0.6.0 safetensors
    venv/bin/python formats.py ../unit/data

formats.safetensors:
Tensors: NAME.blocks u8 [rows, bytes], NAME.values f32 [rows, k] for each format. GGUF formats are decoded by the package
gguf; their f16 scales are drawn finite, all other bits are free, so every code occurs with every scale. fp8 and nvfp4 have
no such package: numpy on the codes of ml_dtypes, in the order value * (tensor scale * block scale), with the block scales
stored in tiles as engine-spec 2.8 says (130 rows and 80 values: more than one tile in both directions, both padded).

sample.gguf, for test_gguf.c: values of every type and tensors of a few formats, written by the package gguf."""
import pathlib
import sys

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from nvfp4 import swizzled

ROWS, K = 2, 512
SCALES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q2_K": [80, 82], "Q3_K": [108],
          "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "F16": [0], "BF16": [], "F32": []}


def gguf_format(rng, name, offsets):
    kind = gguf.GGMLQuantizationType[name]
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (ROWS * K // values, size), dtype=np.uint8)
    for at in offsets:
        scale = rng.normal(0, 0.02, len(blocks)).astype(np.float16)
        scale[0] = np.float16(3e-7)  # subnormal
        blocks[:, at:at + 2] = scale.view(np.uint8).reshape(-1, 2)
    if name in ("BF16", "F32"):
        numbers = rng.normal(0, 1, ROWS * K).astype(np.float32)
        blocks = (numbers.view(np.uint32) >> 16).astype(np.uint16) if name == "BF16" else numbers
    blocks = blocks.view(np.uint8).reshape(ROWS, -1)
    return {f"{name}.blocks": blocks, f"{name}.values": gguf.quants.dequantize(blocks, kind).astype(np.float32).reshape(ROWS, K)}


def fp8(rng):
    codes = rng.integers(0, 256, (ROWS, K), dtype=np.uint8)
    codes[(codes & 127) == 127] = 0
    scale = np.float32(0.00123)
    return {"FP8_E4M3.blocks": codes, "FP8_E4M3.scale": np.array([scale]),
            "FP8_E4M3.values": codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale}


def nvfp4(rng):
    n, k = 130, 80
    data = rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
    scales = rng.integers(1, 127, (n, k // 16), dtype=np.uint8)  # positive, no NaN
    codes = np.stack([data >> 4, data & 15], -1).reshape(n, k)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    tensor_scale = np.float32(0.00077)
    total = tensor_scale * scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return {"NVFP4.blocks": data, "NVFP4.block_scales": scales, "NVFP4.block_scales_swizzled": swizzled(scales),
            "NVFP4.scale": np.array([tensor_scale]), "NVFP4.values": values * np.repeat(total, 16, 1)}


def sample(path, rng):
    w = gguf.GGUFWriter(path, "flux")
    w.add_uint8("test.u8", 200), w.add_int8("test.i8", -7), w.add_uint16("test.u16", 60000), w.add_int16("test.i16", -30000)
    w.add_uint32("test.u32", 4000000000), w.add_int32("test.i32", -5), w.add_uint64("test.u64", 2 ** 63), w.add_int64("test.i64", -2 ** 62)
    w.add_float32("test.f32", 0.5), w.add_float64("test.f64", 0.1), w.add_bool("test.yes", True), w.add_bool("test.no", False)
    w.add_string("test.text", "F\u00fcchse")
    w.add_array("test.texts", ["a", "", "ccc"]), w.add_array("test.numbers", [3, 1, 2])
    w.add_array("comfy.gguf.orig_shape.reshaped.weight", [6, 128])
    numbers = rng.normal(0, 1, (3, 64)).astype(np.float32)
    w.add_tensor("plain.weight", numbers)
    w.add_tensor("half.weight", numbers.astype(np.float16))
    w.add_tensor("small.weight", gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    w.add_tensor("reshaped.weight", np.zeros((3, 144), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    w.add_tensor("norm.scale", numbers[0, :5].copy())
    w.add_tensor("conv.weight", numbers[:, :54].reshape(2, 3, 3, 9).copy())
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file()
    w.close()
    save_file({"plain": numbers}, path.with_suffix(".safetensors"))


def main():
    rng = np.random.default_rng(20)
    folder = pathlib.Path(sys.argv[1])
    out = {}
    for name, offsets in SCALES.items():
        out |= gguf_format(rng, name, offsets)
    out |= fp8(rng) | nvfp4(rng)
    codes = np.arange(256, dtype=np.uint8)
    out["e4m3"] = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    out["e2m1"] = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    save_file(out, folder / "formats.safetensors")
    sample(folder / "sample.gguf", rng)


main()
