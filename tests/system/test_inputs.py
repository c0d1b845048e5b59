"""Campaigns whose rows name references, masks and adapters: each image is that of a single `render` with the same files.

If one of these breaks, an image is made from other files than its row says, or a farm mixes what must not be in one batch."""

import ctypes
import json
import os
import random
import shutil
import struct
import subprocess
import threading

from PIL import Image

from farm import BIN, ROOT, sha256

TINY = ROOT / "tests/golden/models/pocket"
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
    subprocess.run([BIN / "kiln-worker", "render", "--model", TINY, *map(str, words)], check=True, capture_output=True)
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
