#!/usr/bin/env python3
"""Copies what make.py made, without what no test of this repository reads.

    trim.py MADE DEST

Left out of the models: the VAE's encoder where no case has a reference image, text layers from 27 on, the final norm and lm_head
(nothing runs them), copies of the tokenizer (links to pocket's), tokenizer.json, pocket-bf16 (the test rounds pocket, which gives
the same values), the weights of like-9b's text encoder and transformer (the test draws them again: of each file the seed, the
digest of its values and their shapes are written to files/like-9b.json). Left out of the cases: velocities and latents between the first and the last step, except in distilled-f32 (no
measured error to hold them against); attention masks; of prompt embeddings all but the first and last 24 rows; of the trace
what depends on more than the schedule or the shape, and of its rotary tables all but 32 rows of text. And where other cases show the same: the decoder's floats (the PNG and its input stay), the noise
(a function of the seed), the last latents (the decoder's input says the same), in cases with reference images the prompt's embeddings,
and in most of them each reference's latents and what a KV model keeps. Of cases with another VAE the velocities, what it gets and what it makes.
Needs only the standard library."""
import hashlib, json, os, pathlib, re, shutil, struct, sys

TABLES = ["noise", "schedule", "tokenizer"]
SCRIPTS = ["make.py", "weights.py", "tables.py", "plan.json"]
TRANSFORMER_ONLY = ("lora-", "single-")
VAE_ONLY = ("small-decoder-",)
LORA = ("peft", "peft-alpha", "bfl", "kohya")
QUANTISED = ("bfl-nvfp4.safetensors", "bfl-mixed.gguf")
EDITS = ("edit-", "kv-one", "kv-two", "inpaint-")
EDIT_INSIDE = ("edit-one", "edit-bf16", "kv-one", "inpaint-f32", "small-decoder-edit")
EDITED_MODELS = ("pocket", "base", "kv")
DRAWN = {"like-9b": {"text_encoder": "text", "transformer": "transformer"}}  # parts, and what their seeds begin with
WHOLE_ENDS = ("distilled-f32", "distilled-bf16")
TRACED = ("temb", "double_stream_modulation_", "single_stream_modulation", "rope.")
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


def slim(tensors, steps, case):
    """The tensors of a case that a test reads."""
    kept, whole, whole_ends = {}, case == WHOLE, case in WHOLE_ENDS
    for name, tensor in tensors.items():
        if case.startswith(EDITS + TRANSFORMER_ONLY + VAE_ONLY) and "prompt_embeds" in name:
            continue
        if case not in EDIT_INSIDE and name.startswith(("ref_latent.", "kv.")):
            continue
        if case == "inpaint-bf16" and name == "ref_tokens":  # measured on a CPU without AVX-512, where the other order of the
            continue                                          # encoder is half as far away; edit-bf16 holds the encoder in bf16
        step = re.match(r"(velocity|velocity_uncond|latents)\.(\d+)$", name)
        last_only = step and step[1] == "latents"
        if step and not whole and int(step[2]) < steps - 1 and (last_only or int(step[2]) > 0):
            continue
        if name.endswith("attention_mask") or name in ("txt_ids", "ref_ids"):
            continue
        if not whole_ends and (last_only or name == "noise" or (name == "image" and not case.startswith(VAE_ONLY))):
            continue
        if name.endswith("prompt_embeds"):
            kept[name + "_head"] = rows(tensor, 0, HEAD)
            kept[name + "_tail"] = rows(tensor, tensor[0]["shape"][-2] - HEAD, HEAD)
        elif name.startswith("rope.") and name.endswith(".txt"):
            kept[name] = rows(tensor, 0, 32)
        else:
            kept[name] = tensor
    return kept


def unused_weight(name, model):
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if name.startswith(("encoder.", "quant_conv")):
        return model not in EDITED_MODELS
    return name.startswith(("lm_head", "model.norm")) or (layer and int(layer[1]) >= 27)


def write_drawn(path, rows):
    """A line a file, so that a change of one shows."""
    path.write_text("{\n" + ",\n".join(f"{json.dumps(n)}: {json.dumps(r, separators=(',', ':'))}" for n, r in rows.items()) + "\n}\n")


def copy_model(made, dest, seed):
    drawn = {}
    for path in sorted(made.rglob("*")):
        to = dest / path.relative_to(made)
        if path.is_dir() or (path.parent.name == "tokenizer" and made.name != "pocket") or path.name == "tokenizer.json":
            continue
        to.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            meta, tensors = read(path)
            tensors = {n: t for n, t in tensors.items() if not unused_weight(n, made.name)}
            part = DRAWN.get(made.name, {}).get(path.parent.name)
            if not part:
                write(to, meta, tensors)
                continue
            drawn[str(path.relative_to(made))] = {"seed": f"{part}{seed}", "sha256": hashlib.sha256(b"".join(d for _, d in tensors.values())).hexdigest(),
                                                  "shapes": {n: e["shape"] for n, (e, _) in tensors.items()}}
        elif path.name.endswith(".index.json"):
            index = json.loads(path.read_text())
            index["weight_map"] = {n: f for n, f in index["weight_map"].items() if not unused_weight(n, made.name)}
            to.write_text(json.dumps(index, indent=2) + "\n")
        else:
            shutil.copyfile(path, to)
    if made.name != "pocket" and not (dest / "tokenizer").exists():
        os.symlink("../pocket/tokenizer", dest / "tokenizer")
    if drawn:
        write_drawn(dest.parents[1] / "files" / f"{made.name}.json", drawn)


def link_if_known(path, to, known):
    """A picture that several cases take is kept once; the others are links to it."""
    first = known.setdefault(path.read_bytes(), to)
    to.unlink(missing_ok=True)
    if first == to:
        shutil.copyfile(path, to)
    else:
        os.symlink(f"../{first.parent.name}/{first.name}", to)


def copy_case(made, dest, known):
    dest.mkdir(parents=True, exist_ok=True)
    for path in sorted(made.iterdir()):
        if path.name.startswith(("reference-", "mask")):
            link_if_known(path, dest / path.name, known)
        elif path.suffix == ".safetensors":
            meta, tensors = read(path)
            if path.name == "trace.safetensors":
                tensors = {n: t for n, t in tensors.items() if n.startswith(TRACED)}
            steps = sum(name.startswith("velocity.") for name in tensors)
            write(dest / path.name, meta, slim(tensors, steps, made.name))
        else:
            shutil.copyfile(path, dest / path.name)


def main():
    made, dest = map(pathlib.Path, sys.argv[1:3])
    for name in SCRIPTS:
        shutil.copyfile(made / name, dest / name)
    for name in TABLES:
        shutil.copytree(made / name, dest / name, copy_function=shutil.copyfile, dirs_exist_ok=True)
    plan = json.loads((made / "plan.json").read_text())
    for model in ("pocket", "base", "kv", "like-9b"):
        copy_model(made / "models" / model, dest / "models" / model, plan["models"][model]["seed"])
    known = {}
    for name in LORA:
        shutil.copyfile(made / "files" / f"lora-{name}.safetensors", dest / "files" / f"lora-{name}.safetensors")
    for name in QUANTISED:
        shutil.copyfile(made / "files" / name, dest / "files" / name)
    shutil.copytree(made / "files/small-decoder", dest / "files/small-decoder", copy_function=shutil.copyfile, dirs_exist_ok=True)
    for case in sorted(made.glob("*/case.json")):
        copy_case(case.parent, dest / case.parent.name, known)


main()
