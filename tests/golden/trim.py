#!/usr/bin/env python3
"""Copies what make.py made, without what no test of this repository reads.

    trim.py MADE DEST

Left out of the models: the VAE's encoder, text layers from 27 on, the final norm and lm_head (nothing runs them), copies of the
tokenizer (links to pocket's), tokenizer.json, pocket-bf16 (the test rounds pocket, which gives the same values). Left out of the
cases: velocities and latents between the first and the last step, except in distilled-f32 (no measured error to hold them
against); attention masks; of prompt embeddings all but the first and last 24 rows; of the trace's rotary tables all but 32 rows.
Needs only the standard library."""
import json, os, pathlib, re, shutil, struct, sys

TABLES = ["noise", "schedule", "tokenizer"]
SCRIPTS = ["make.py", "weights.py", "tables.py", "plan.json"]
OTHER_CASES = ("edit-", "kv-one", "kv-two", "lora-", "single-")
WHOLE = "distilled-f32"
HEAD = 24


def read(path):
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    head = json.loads(raw[8:8 + size])
    meta = head.pop("__metadata__", None)
    return meta, {n: (e, raw[8 + size + e["data_offsets"][0]:8 + size + e["data_offsets"][1]]) for n, e in head.items()}


def write(path, meta, tensors):
    head, at, parts = ({"__metadata__": meta} if meta else {}), 0, []
    for name, (entry, data) in tensors.items():
        head[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [at, at + len(data)]}
        at += len(data)
        parts.append(data)
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def rows(tensor, first, count):
    """Rows of the second-last axis of a tensor whose leading axes are 1."""
    entry, data = tensor
    shape = list(entry["shape"])
    row = len(data) // shape[-2]
    shape[-2] = count
    return {"dtype": entry["dtype"], "shape": shape}, data[first * row:(first + count) * row]


def slim(tensors, steps, whole):
    """The tensors of a case that a test reads."""
    kept = {}
    for name, tensor in tensors.items():
        step = re.match(r"(velocity|velocity_uncond|latents)\.(\d+)$", name)
        last_only = step and step[1] == "latents"
        if step and not whole and int(step[2]) < steps - 1 and (last_only or int(step[2]) > 0):
            continue
        if name.endswith("attention_mask") or name == "txt_ids":
            continue
        if name.endswith("prompt_embeds"):
            kept[name + "_head"] = rows(tensor, 0, HEAD)
            kept[name + "_tail"] = rows(tensor, tensor[0]["shape"][-2] - HEAD, HEAD)
        elif name.startswith("rope.") and name.endswith(".txt"):
            kept[name] = rows(tensor, 0, 32)
        else:
            kept[name] = tensor
    return kept


def unused_weight(name):
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return name.startswith(("encoder.", "quant_conv", "lm_head", "model.norm")) or (layer and int(layer[1]) >= 27)


def copy_model(made, dest):
    for path in sorted(made.rglob("*")):
        to = dest / path.relative_to(made)
        if path.is_dir() or (path.parent.name == "tokenizer" and made.name != "pocket") or path.name == "tokenizer.json":
            continue
        to.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            meta, tensors = read(path)
            write(to, meta, {n: t for n, t in tensors.items() if not unused_weight(n)})
        elif path.name.endswith(".index.json"):
            index = json.loads(path.read_text())
            index["weight_map"] = {n: f for n, f in index["weight_map"].items() if not unused_weight(n)}
            to.write_text(json.dumps(index, indent=2) + "\n")
        else:
            shutil.copyfile(path, to)
    if made.name != "pocket" and not (dest / "tokenizer").exists():
        os.symlink("../pocket/tokenizer", dest / "tokenizer")


def copy_case(made, dest):
    dest.mkdir(parents=True, exist_ok=True)
    steps = json.loads((made / "case.json").read_text())["call"]["num_inference_steps"]
    for path in sorted(made.iterdir()):
        if path.suffix == ".safetensors":
            meta, tensors = read(path)
            write(dest / path.name, meta, slim(tensors, steps, made.name == WHOLE))
        else:
            shutil.copyfile(path, dest / path.name)


def main():
    made, dest = map(pathlib.Path, sys.argv[1:3])
    for name in SCRIPTS:
        shutil.copyfile(made / name, dest / name)
    for name in TABLES:
        shutil.copytree(made / name, dest / name, copy_function=shutil.copyfile, dirs_exist_ok=True)
    for model in ("pocket", "base", "kv", "like-9b"):
        copy_model(made / "models" / model, dest / "models" / model)
    for case in sorted(made.glob("*/case.json")):
        if not case.parent.name.startswith(OTHER_CASES):
            copy_case(case.parent, dest / case.parent.name)


main()
