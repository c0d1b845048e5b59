"""An image is a function of its row: batch, threads, worker, place in the file and repetition change nothing.

If one of these breaks, a seed means nothing any more, and an edited file renders everything anew."""

import json
import os
import subprocess

import pytest
from PIL import Image

from farm import BIN, POCKET, prompts, sha256


def pixels(path):
    return Image.open(path).convert("RGB").tobytes()


def test_the_same_row_gives_the_same_pixels_alone_in_a_batch_on_any_threads_and_from_render(new_loose_farm):
    """Acceptance: --batch 1 and inside --batch 3, 1 and 2 threads, `render` and a campaign."""
    farm = new_loose_farm(POCKET, name="pocket")
    rows = [{"prompt": p, "seed": 100 + i} for i, p in enumerate(["red heart", "pizza", "blue star"])]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    farm.coordinator()
    seen = {}
    for batch, threads in ((1, 1), (3, 2), (3, 1)):
        name = f"b{batch}t{threads}"
        farm.submit(name, text, "--steps", "2", suffix="jsonl")
        farm.worker(name, batch=batch, threads=threads)
        farm.wait_done(name)
        seen[name] = {i["row"] - 1: pixels(i["path"]) for i in farm.assert_whole(name, 3)}
        farm.kill(name, 15)
        assert farm.wait_end(name) == 0
    for i, row in enumerate(rows):
        out = farm.root / f"render-{i}.png"
        subprocess.run([BIN / "kiln-worker", "render", "--model", POCKET, "--prompt", row["prompt"], "--seed", str(row["seed"]), "--size",
                        "64x64", "--steps", "2", "--threads", "2", "--out", out], check=True, capture_output=True)
        assert seen["b1t1"][i] == seen["b3t2"][i] == seen["b3t1"][i] == pixels(out)
    assert len(set(seen["b1t1"].values())) == 3


def test_a_model_folder_of_links_serves_a_farm(new_farm, tmp_path):
    """Single files work in campaigns as in `render`."""
    folder = tmp_path / "linked"
    folder.mkdir()
    for part in ("tokenizer", "vae", "model_index.json"):
        (folder / part).symlink_to(POCKET / part)
    (weights,) = (POCKET / "text_encoder").glob("*.safetensors")
    (folder / "text_encoder.safetensors").symlink_to(weights)
    (folder / "transformer.safetensors").symlink_to(POCKET / "transformer/diffusion_pytorch_model.safetensors")
    pictures = []
    for model in (folder, POCKET):
        farm = new_farm(model, name="pocket")
        farm.up("--workers", "1")
        farm.submit("linked", "red heart\n", "--wait")
        pictures.append(pixels(farm.assert_whole("linked", 1)[0]["path"]))
        farm.down()
    assert pictures[0] == pictures[1]


def facts(farm, name):
    """What must not change: file, bytes, time of writing."""
    return {i["path"]: (i["sha256"], sha256(i["path"]), os.stat(i["path"]).st_mtime_ns, i["seed"]) for i in farm.images(name)}


def test_submitting_again_adds_nothing_and_inserted_lines_add_only_themselves(farm):
    """Acceptance: the same file twice adds nothing; 10 lines in the middle add 10, the others keep their bytes."""
    lines = prompts(30)
    text = lambda some: "\n".join(some) + "\n"
    assert farm.submit("edited", text(lines), "--wait")["added"] == 30
    before = facts(farm, "edited")
    again = farm.submit("edited", text(lines), "--wait")
    assert (again["added"], again["present"]) == (0, 30)
    assert facts(farm, "edited") == before
    grown = lines[:15] + [f"new {p}" for p in prompts(10, seed=9)] + lines[15:]
    more = farm.submit("edited", text(grown), "--wait")
    assert (more["added"], more["present"]) == (10, 30)
    after = facts(farm, "edited")
    assert len(after) == 40 and {p: after[p] for p in before} == before
    farm.assert_whole("edited", 40)
    moved = farm.submit("edited", text(reversed(grown)), "--wait")
    assert (moved["added"], moved["present"]) == (0, 40)


def test_a_line_that_stands_twice_is_two_images_and_changes_no_other(farm):
    """Both are wanted: the second has its own seed, and neither depends on where the lines stand."""
    farm.submit("once", "fox\nowl\n", "--wait")
    farm.submit("twice", "owl\nfox\nfox\n", "--wait")
    once = {i["prompt"]: i["seed"] for i in farm.images("once")}
    twice = [(i["prompt"], i["seed"]) for i in farm.assert_whole("twice", 3)]
    assert ("fox", once["fox"]) in twice and ("owl", once["owl"]) in twice
    assert len({seed for _, seed in twice}) == 3


def test_an_existing_campaign_keeps_its_settings(farm):
    """Half of a campaign in another format or folder is not what anybody meant."""
    farm.submit("kept", "fox\n", "--wait")
    path = farm.file("kept.txt", "fox\nowl\n")
    farm.refuses("submit", path, "--campaign", "kept", "--size", "64x64", "--steps", "1", "--format", "jpg", said=["kept", "png", "jpg"])
    farm.refuses("submit", path, "--campaign", "kept", "--size", "64x64", "--steps", "1", "--seed", "9", said=["kept", "9"])
    assert farm.status("kept")["total"] == 1


@pytest.mark.parametrize("seeds", [1, 3])
def test_variations_are_the_same_whoever_asks_first(farm, seeds):
    """--seeds 3 after --seeds 1 adds two images and keeps the first."""
    farm.submit("varied", "fox\n", "--seeds", str(seeds), "--wait")
    images = farm.images("varied")
    assert len(images) == seeds
    if seeds == 3:
        assert farm.status("varied")["total"] == 3
