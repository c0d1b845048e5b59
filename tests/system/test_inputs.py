"""Campaigns whose rows name models, references, masks and adapters: each image is that of a single `render` with the same files.

If one of these breaks, an image is made from other files than its row says, or a farm mixes what must not be in one batch."""

import ctypes
import json
import os
import random
import re
import shutil
import struct
import subprocess
import threading

import numpy as np
from PIL import Image

import weight_formats as formats
from farm import BIN, ROOT, metric, sha256, wait_until

MODELS = {"tiny": ROOT / "tests/golden/models/pocket", "base": ROOT / "tests/golden/models/base", "kv": ROOT / "tests/golden/models/kv"}
TINY = MODELS["tiny"]
LORAS = ROOT / "tests/golden/files"


def picture(path, width, height, seed):
    """Noise in blocks: a file of its own for each seed."""
    rng = random.Random(seed)
    small = Image.frombytes("RGB", (8, 8), bytes(rng.randrange(256) for _ in range(192)))
    small.resize((width, height), Image.NEAREST).save(path)
    return path


def pixels(path):
    return Image.open(path).convert("RGB").tobytes()


def render(farm, row):
    """The same image by `kiln-worker render`."""
    out = farm.root / "single.png"
    words = ["--prompt", row["prompt"], "--seed", row["seed"], "--steps", 2, "--out", out]
    for image in row.get("image", []):
        words += ["--image", farm.root / image]
    for lora in row.get("lora", []):
        words += ["--lora", farm.root / lora]
    if "mask" in row:
        words += ["--mask", farm.root / row["mask"], "--strength", row.get("strength", 0.8)]
    if "width" in row:
        words += ["--size", f"{row['width']}x{row['height']}"]
    model = MODELS[row.get("model", "tiny")]
    subprocess.run([BIN / "kiln-worker", "render", "--model", model, *map(str, words)], check=True, capture_output=True)
    return pixels(out)


def prepared(new_loose_farm):
    farm = new_loose_farm(TINY, name="tiny")
    for i, (width, height) in enumerate([(64, 64), (96, 64), (64, 64)]):
        picture(farm.root / f"{i}.png", width, height, i)
    half = Image.new("L", (64, 64), 0)
    half.paste(255, (32, 0, 64, 64))
    half.save(farm.root / "mask.png")
    for name in ("lora-bfl", "lora-peft"):
        shutil.copy(LORAS / f"{name}.safetensors", farm.root)
    return farm


ROWS = [
    {"prompt": "fox", "seed": 1, "width": 64, "height": 64},
    {"prompt": "fox", "seed": 1, "image": ["0.png"]},
    {"prompt": "fox", "seed": 1, "image": ["1.png"]},
    {"prompt": "fox", "seed": 1, "image": ["2.png"]},
    {"prompt": "owl", "seed": 2, "image": ["0.png", "1.png"], "width": 64, "height": 96},
    {"prompt": "owl", "seed": 3, "image": ["0.png"], "mask": "mask.png", "strength": 0.5},
    {"prompt": "owl", "seed": 3, "image": ["0.png"], "mask": "mask.png"},
    {"prompt": "fox", "seed": 1, "width": 64, "height": 64, "lora": ["lora-bfl.safetensors"]},
    {"prompt": "owl", "seed": 4, "width": 64, "height": 64, "lora": ["lora-bfl.safetensors"]},
    {"prompt": "fox", "seed": 1, "width": 64, "height": 64, "lora": ["lora-peft.safetensors:-0.5", "lora-bfl.safetensors"]},
    {"prompt": "fox", "seed": 1, "image": ["2.png"], "lora": ["lora-bfl.safetensors:0.5"]},
    {"prompt": "owl", "seed": 1, "width": 64, "height": 64},
]


def test_every_row_is_the_image_that_render_makes_from_the_same_files(new_loose_farm):
    """Acceptance: sizes, references, masks and adapters that change from row to row, in one campaign, on two workers."""
    farm = prepared(new_loose_farm)
    farm.coordinator()
    for name in ("w1", "w2"):
        farm.worker(name)
    path = farm.file("edits.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    farm.run("submit", path, "--campaign", "edits", "--model", "tiny", "--steps", "2", "--wait")
    images = {i["row"] - 1: i for i in farm.assert_whole("edits", len(ROWS))}
    seen = [pixels(images[i]["path"]) for i in range(len(ROWS))]
    for i, row in enumerate(ROWS):
        assert seen[i] == render(farm, row), f"row {i + 1}: {row}"
    assert len(set(seen)) == len(ROWS)
    for name in ("w1", "w2"):
        assert farm.log(name).count("model_opening") == 1, "adapters come and go in an open model"
    assert sum(farm.log(name).count("adapters_changed") for name in ("w1", "w2")) >= 3
    told = images[10]["inputs"]
    assert told["images"][0]["sha256"] == sha256(farm.root / "2.png") and told["loras"][0]["scale"] == 0.5
    assert "inputs" not in images[0]
    record = Image.open(images[5]["path"]).text
    assert sha256(farm.root / "mask.png") in json.dumps(record) and str(farm.root) not in json.dumps(record)
    again = json.loads(farm.run("submit", path, "--campaign", "edits", "--model", "tiny", "--steps", "2", "--json").stdout)
    assert (again["added"], again["present"]) == (0, len(ROWS))


# What may be in one batch: rows of a line differ in prompt, seed and pixels, lines in model, size, adapters or how their references are seen.
SMALL, WIDE = {"width": 64, "height": 64}, {"width": 96, "height": 64}
BFL, PEFT, BASE = "lora-bfl.safetensors", "lora-peft.safetensors", "lora-base.safetensors"
SHAPES = [
    {"model": "tiny", **SMALL},
    {"model": "tiny", **WIDE},
    {"model": "tiny", **SMALL, "lora": [BFL]},
    {"model": "tiny", **SMALL, "lora": [BFL + ":0.5", PEFT]},
    {"model": "tiny", **SMALL, "image": ["0.png"]},
    {"model": "tiny", **SMALL, "image": ["1.png"], "lora": [BFL]},
    {"model": "base", **SMALL},
    {"model": "base", **SMALL, "lora": [BASE]},
    {"model": "base", **WIDE, "image": ["1.png", "0.png"], "lora": [BASE]},
    {"model": "kv", **SMALL},
    {"model": "kv", **SMALL, "image": ["0.png"]},
]
OF_WORKER = {"w1": ["tiny", "base"], "w2": ["base", "kv"], "w3": ["tiny", "base", "kv"]}


def lora_for_base(path):
    formats.write_safetensors(path, {
        f"transformer.transformer_blocks.0.attn.to_q.lora_{half}.weight":
            formats.as_bf16(formats.random_of(half).normal(0, 0.3, shape).astype(np.float32)) for half, shape in (("A", (4, 128)), ("B", (128, 4)))})


def batches_of(log):
    """What a worker rendered together: (model, "WxH", references, adapters) and the tasks."""
    line = r" rendered .*model=(\S+) size=(\S+) references=(\d+) adapters=(\d+) count=(\d+) .*tasks=([\d,]+)"
    found = [((m[1], m[2], int(m[3]), int(m[4])), [int(t) for t in m[6].split(",")], int(m[5])) for m in re.finditer(line, log)]
    assert all(len(tasks) == count for _, tasks, count in found)
    return [(shared, tasks) for shared, tasks, _ in found]


def test_a_campaign_of_several_models_has_batches_of_one_model_and_one_shape(new_loose_farm):
    """Model, size, adapters and references change from row to row, and no worker has quite the models of another. Rows that could
    not be of one batch stand next to each other in the file."""
    farm = prepared(new_loose_farm)
    lora_for_base(farm.root / BASE)
    farm.coordinator()
    rows = []
    for turn in range(4):
        for i, shape in enumerate(SHAPES):
            row = shape | {"prompt": f"fox {turn}", "seed": 100 * i + turn}
            if turn % 2 and shape.get("image") == ["0.png"]:
                row["image"] = ["2.png"]  # other pixels, seen at the same size
            rows.append(row)
    for name, models in OF_WORKER.items():
        words = [w for model in models[1:] for w in ("--model", f"{model}={MODELS[model]}")]
        farm.model = f"{models[0]}={MODELS[models[0]]}"
        farm.worker(name, *words, "--metrics-port", "0", env={"KILN_FAULT": "slow-ms:30"}, batch=3)
    wait_until(lambda: all(" ready " in farm.log(name) for name in OF_WORKER), "the workers are ready")
    path = farm.file("mixed.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    farm.run("submit", path, "--campaign", "mixed", "--steps", "2", "--wait")
    images = farm.assert_whole("mixed", len(rows))

    row_of = {image["task"]: image["row"] - 1 for image in images}
    together = [tasks for name in OF_WORKER for _, tasks in batches_of(farm.log(name))]
    assert sorted(task for tasks in together for task in tasks) == sorted(row_of), "each image was rendered once"
    assert sum(len(tasks) > 1 for tasks in together) >= len(SHAPES), f"batches of several: {together}"
    for name, models in OF_WORKER.items():
        batches = batches_of(farm.log(name))
        assert batches, f"{name} rendered nothing"
        for shared, tasks in batches:
            shapes = {row_of[task] % len(SHAPES) for task in tasks}
            assert len(shapes) == 1, f"{name} rendered rows of {[SHAPES[s] for s in shapes]} together"
            shape = SHAPES[shapes.pop()]
            assert shape["model"] in models
            assert shared == (shape["model"], f"{shape['width']}x{shape['height']}", len(shape.get("image", [])), len(shape.get("lora", [])))
        page = farm.page(farm.metrics_port(name))
        assert metric(page, "kiln_worker_batch_images_count") == len(batches)
        assert metric(page, "kiln_worker_batch_images_sum") == sum(len(tasks) for _, tasks in batches)
        assert farm.log(name).count("model_opening") == len(models), "models stay open"

    seen = {}
    for image in images:
        row = rows[image["row"] - 1]
        assert image["model"] == row["model"] and (image["width"], image["height"]) == (row["width"], row["height"])
        seen[image["path"]] = pixels(image["path"])
        assert seen[image["path"]] == render(farm, row), f"row {image['row']}: {row}"
    assert len(set(seen.values())) == len(rows)


def test_options_are_for_rows_that_name_no_file_of_their_own(new_loose_farm):
    """A thousand prompts and one reference: nobody wants a column for that."""
    farm = prepared(new_loose_farm)
    farm.coordinator()
    farm.worker("w1")
    (farm.root / "sub").mkdir()
    shutil.copy(farm.root / "1.png", farm.root / "sub/own.png")
    path = farm.file("sub/some.csv", "prompt,seed,image\nfox,1,\nfox,1,own.png\n")
    farm.run("submit", path, "--campaign", "some", "--model", "tiny", "--steps", "2", "--image", "2.png", "--lora", "lora-bfl.safetensors:0.5", "--wait")
    images = farm.assert_whole("some", 2)
    for image, file in zip(images, ["2.png", "1.png"]):
        row = {"prompt": "fox", "seed": 1, "image": [file], "lora": ["lora-bfl.safetensors:0.5"]}
        assert pixels(image["path"]) == render(farm, row)
    assert (images[1]["width"], images[1]["height"]) == (96, 64)


def test_a_file_that_changed_is_refused_and_one_that_is_away_is_waited_for(new_loose_farm):
    """The row says what its image is made from; another picture under its key would be a lie."""
    farm = prepared(new_loose_farm)
    farm.coordinator()
    path = farm.file("late.csv", "prompt,seed,image\nfox,1,0.png\nfox,2,1.png\nfox,3,2.png\n")
    farm.run("submit", path, "--campaign", "late", "--model", "tiny", "--steps", "2")
    picture(farm.root / "0.png", 64, 64, 77)
    (farm.root / "1.png").rename(farm.root / "away.png")
    farm.worker("w1")
    farm.wait_for("late", done=1, failed=1)
    (failure,) = farm.lines("failures", "late")
    assert failure["kind"] == "refuse" and "has changed since it was submitted" in failure["reason"] and "0.png" in failure["reason"]
    (farm.root / "away.png").rename(farm.root / "1.png")
    farm.wait_for("late", done=2, failed=1)
    again = json.loads(farm.run("submit", path, "--campaign", "late", "--model", "tiny", "--steps", "2", "--json").stdout)
    assert (again["added"], again["present"]) == (1, 2)
    farm.wait_for("late", done=3, failed=1)


def test_an_adapter_that_does_not_fit_fails_its_rows_and_no_other(new_loose_farm):
    """And costs no opening of the model."""
    farm = prepared(new_loose_farm)
    farm.coordinator()
    shutil.copy(TINY / "vae/diffusion_pytorch_model.safetensors", farm.root / "vae.safetensors")
    rows = [{"prompt": f"{i}", **({"lora": "vae.safetensors"} if i % 2 else {})} for i in range(12)]
    farm.submit("mixed", "".join(json.dumps(row) + "\n" for row in rows), "--model", "tiny", suffix="jsonl")
    farm.worker("w1")
    farm.wait_for("mixed", done=6, failed=6)
    assert {f["kind"] for f in farm.lines("failures", "mixed")} == {"refuse"}
    assert farm.log("w1").count("model_opening model=tiny") == 1


def with_values(path, other, value):
    """A BF16 adapter of the same tensors, all values the same."""
    data = path.read_bytes()
    body = 8 + int.from_bytes(data[:8], "little")
    other.write_bytes(data[:body] + struct.pack("<f", value)[2:] * ((len(data) - body) // 2))
    return other


def test_an_adapter_that_makes_no_picture_is_found_once(new_loose_farm):
    """Attempts of many rows would take the night."""
    farm = prepared(new_loose_farm)
    farm.coordinator()
    with_values(farm.root / "lora-bfl.safetensors", farm.root / "hot.safetensors", 1e15)
    rows = [{"prompt": f"{i}", **({"lora": "hot.safetensors"} if i % 2 else {})} for i in range(12)]
    farm.submit("hot", "".join(json.dumps(row) + "\n" for row in rows), suffix="jsonl")
    farm.worker("w1")
    farm.wait_for("hot", done=6, failed=6)
    failures = farm.lines("failures", "hot")
    assert {f["kind"] for f in failures} == {"refuse"} and "adapters" in failures[0]["reason"] and "NaN" in failures[0]["reason"]
    assert farm.log("w1").count("model_opening model=tiny") == 1 and farm.log("w1").count("render_failed") <= 2


def test_a_model_that_changed_is_not_blamed_on_the_adapter(new_loose_farm):
    """The rows would be refused for good, for what the worker's own files have come to."""
    farm = prepared(new_loose_farm)
    mine = farm.root / "mine"
    shutil.copytree(TINY, mine)
    farm.model = f"tiny={mine}"
    farm.coordinator()
    farm.worker("w1")
    farm.submit("before", "fox\n")
    farm.wait_done("before")
    weights = mine / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    farm.submit("after", "fox\nowl\n", "--lora", farm.root / "lora-bfl.safetensors")
    assert farm.wait_end("w1") == 75
    assert farm.log("w1").count("model_changed") == 1
    shutil.copy(TINY / "vae/diffusion_pytorch_model.safetensors", weights)
    farm.start_again("w1")
    farm.wait_done("after")
    farm.assert_whole("after", 2)


class SwapOnClose(threading.Thread):
    """Puts another file in the place of `path` when somebody has read it for the first time."""

    def __init__(self, path, other):
        super().__init__(daemon=True)
        self.path, self.other, self.libc = path, other, ctypes.CDLL(None)
        self.fd = self.libc.inotify_init()
        self.libc.inotify_add_watch(self.fd, bytes(path), 0x10)  # IN_CLOSE_NOWRITE

    def run(self):
        os.read(self.fd, 4096)
        os.rename(self.other, self.path)
        os.close(self.fd)


def of_high_rank(path, rank):
    """An adapter of zeros that takes a while to hash."""
    sides = {"lora_A": [rank, 128], "lora_B": [64, rank]}
    tensors, at = {}, 0
    for side, shape in sides.items():
        tensors[f"transformer.x_embedder.{side}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + 4 * shape[0] * shape[1]]}
        at += 4 * shape[0] * shape[1]
    head = json.dumps(tensors).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(at))
    return path


def test_an_adapter_that_is_replaced_behind_its_check_makes_no_picture(new_loose_farm):
    """It is hashed, then opened: what is opened must be what was hashed. Between the two the other adapter is hashed."""
    farm = prepared(new_loose_farm)
    farm.coordinator()
    lora, other = farm.root / "lora-bfl.safetensors", farm.root / "lora-peft.safetensors"
    farm.submit("swap", "fox\n", "--lora", lora, "--lora", of_high_rank(farm.root / "high.safetensors", 60000))
    swap = SwapOnClose(lora, other)
    swap.start()
    farm.worker("w1")
    farm.wait_done("swap")
    swap.join()
    (failure,) = farm.lines("failures", "swap")
    assert failure["kind"] == "refuse" and "has changed since it was submitted" in failure["reason"]


def test_bad_inputs_are_refused_by_line(new_loose_farm):
    """Before anything is in the queue."""
    farm = prepared(new_loose_farm)
    farm.coordinator()
    farm.file("text.png", "no picture")
    for content, said in [
        ("prompt,image\nfox,none.png\n", ["bad.csv:2", "none.png", "No such file"]),
        ("prompt,image\nfox,0.png\nfox,text.png\n", ["bad.csv:3", "text.png"]),
        ("prompt,mask\nfox,mask.png\n", ["bad.csv:2", "a mask without an image"]),
        ("prompt,image,strength\nfox,0.png,0.5\n", ["bad.csv:2", "a strength without a mask"]),
        ("prompt,lora\nfox,none.safetensors:0.5\n", ["bad.csv:2", "none.safetensors"]),
        ("prompt,image\nfox,.\n", ["bad.csv:2", "not a file"]),
    ]:
        farm.refuses("submit", farm.file("bad.csv", content), "--campaign", "bad", "--model", "tiny", said=said)
    farm.run("status", "bad", code=2)
    good = farm.file("good.txt", "fox\n")
    farm.refuses("submit", good, "--campaign", "bad", "--model", "tiny", "--strength", "0.5", said=["good.txt:1", "a strength without a mask"])
    farm.refuses("submit", good, "--campaign", "bad", "--model", "tiny", "--strength", "2", said=["2", "at most 1"])
    farm.refuses("submit", good, "--campaign", "bad", "--model", "tiny", "--lora", "x:500", said=["x:500", "100"])
