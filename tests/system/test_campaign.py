"""A campaign from a file of prompts to a folder of images and rows, as people type it.

What breaks here breaks for everybody: the file formats, the JSON that scripts read, the files other programs open."""

import json
import os
import re
import signal
import subprocess

import pytest
from PIL import Image

from farm import BIN, PARTI, environment, sha256

STATUS_KEYS = ["campaign", "state", "total", "ready", "running", "done", "failed", "cancelled", "images_per_second", "eta_s"]
IMAGE_KEYS = ["task", "campaign", "row", "variation", "path", "sha256", "bytes", "width", "height", "seed", "prompt", "model", "worker",
              "attempt", "render_s"]

FORMATS = {
    "txt": ("# a comment\nred heart\n\n  blue star  \ngreen \"leaf\"\n", ["red heart", "blue star", "green \"leaf\""]),
    "csv": ("Prompt,SEED,steps,mood\n\"red, heart\",7,2,calm\n\"two\nlines \"\"quoted\"\"\",,,\n", ["red, heart", "two\nlines \"quoted\""]),
    "tsv": ("prompt\tseed\twidth\theight\nred heart\t18446744073709551615\t80\t64\n\"G I\" painted\t\t\t\n", ["red heart", "\"G I\" painted"]),
    "jsonl": ('{"prompt":"red heart","seed":18446744073709551615,"mood":{"deep":[1,2]}}\n{"prompt":"ж 世界 🦊"}\n', ["red heart", "ж 世界 🦊"]),
}


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_prompt_file_becomes_its_images(farm, suffix):
    """A format read wrongly renders a night of wrong pictures."""
    text, wanted = FORMATS[suffix]
    summary = farm.submit(f"as-{suffix}", text, "--wait", suffix=suffix)
    assert summary == {"campaign": f"as-{suffix}", "added": len(wanted), "present": 0, "total": len(wanted)}
    images = farm.assert_whole(f"as-{suffix}", len(wanted))
    assert [i["prompt"] for i in images] == wanted
    if suffix == "csv":
        assert images[0]["seed"] == 7
    if suffix == "tsv":
        assert (images[0]["width"], images[0]["height"], images[0]["seed"]) == (80, 64, 2**64 - 1)
        assert (images[1]["width"], images[1]["height"]) == (64, 64)
    if suffix == "jsonl":
        assert images[0]["seed"] == 2**64 - 1


def test_standard_input_is_a_file_too(farm):
    """Pipelines end in `kiln submit -`."""
    run = farm.run("submit", "-", "--campaign", "piped", "--size", "64x64", "--steps", "1", "--wait", "--json", stdin="fox\nowl\n")
    assert json.loads(run.stdout.splitlines()[0])["added"] == 2
    assert [i["prompt"] for i in farm.assert_whole("piped", 2)] == ["fox", "owl"]


def test_parti_prompts_are_taken_as_they_come(farm):
    """The file people try first: 1,632 rows, quotes as text, three columns that travel as labels."""
    run = farm.run("submit", PARTI, "--campaign", "parti", "--size", "64x64", "--steps", "1", "--dry-run", "--json")
    assert json.loads(run.stdout)["rows"] == 1632


def test_status_and_images_have_the_promised_shape(farm):
    """Scripts and dashboards read these keys; one renamed breaks them all silently."""
    farm.submit("shape", "fox\nowl\n", "--seeds", "2", "--seed", "5", "--wait")
    status = farm.status("shape")
    assert list(status) == STATUS_KEYS
    assert status["campaign"] == "shape" and status["state"] == "done"
    assert {k: status[k] for k in STATUS_KEYS[2:8]} == {"total": 4, "ready": 0, "running": 0, "done": 4, "failed": 0, "cancelled": 0}
    assert any(line["campaign"] == "shape" for line in farm.lines("status"))
    images = farm.images("shape")
    for image in images:
        assert list(image) == IMAGE_KEYS
        assert re.fullmatch("[0-9a-f]{64}", image["sha256"]) and sha256(image["path"]) == image["sha256"]
        assert image["model"] == "speck" and image["attempt"] == 1 and image["render_s"] > 0 and image["worker"]
    assert [(i["row"], i["variation"]) for i in images] == [(1, 0), (1, 1), (2, 0), (2, 1)], "rows count from 1, as people do"
    assert len({i["seed"] for i in images}) == 4, "each variation has a seed of its own"
    assert farm.lines("failures", "shape") == []


def test_a_png_tells_its_own_story(farm):
    """An image that left its folder must still say how it was made, and that a machine made it."""
    farm.submit("story", '{"prompt":"red heart","seed":42}\n', "--wait", suffix="jsonl")
    (image,) = farm.images("story")
    picture = Image.open(image["path"])
    assert picture.format == "PNG" and picture.size == (64, 64)
    parameters = picture.text["parameters"]
    assert parameters.startswith("red heart\n") and "Seed: 42" in parameters and "Size: 64x64" in parameters and "Steps: 1" in parameters
    record = json.loads(picture.text["kiln"])
    assert record["prompt"] == "red heart" and record["seed"] == 42 and record["campaign"] == "story" and record["model"] == "speck"
    assert "trainedAlgorithmicMedia" in picture.text["XML:com.adobe.xmp"]


@pytest.mark.parametrize("suffix, name", [("jpg", "JPEG"), ("webp", "WEBP")])
def test_other_formats_keep_the_story(farm, suffix, name):
    """--format must not cost the record."""
    farm.submit(f"in-{suffix}", "red heart\n", "--format", suffix, "--wait")
    (image,) = farm.assert_whole(f"in-{suffix}", 1)
    assert image["path"].endswith("." + suffix)
    picture = Image.open(image["path"])
    assert picture.format == name and picture.size == (64, 64)
    picture.load()
    data = open(image["path"], "rb").read()
    assert b"trainedAlgorithmicMedia" in data and f'"seed":{image["seed"]}'.encode() in data.replace(b" ", b"")
    exif = picture.getexif().get_ifd(0x8769).get(0x9286, b"")
    assert "red heart" in exif.replace(b"\0", b"").decode(errors="replace") if isinstance(exif, bytes) else "red heart" in exif


def test_names_and_variations_name_the_files(farm):
    """People find their image by the name they gave it."""
    farm.submit("named", '{"prompt":"fox","name":"the-fox"}\n{"prompt":"owl"}\n', "--seeds", "2", "--wait", suffix="jsonl")
    names = farm.files("named")
    assert sum(n.startswith("the-fox") for n in names) == 2 and sum(n.startswith("000002") for n in names) == 2, names


def test_watch_ends_with_the_campaign(farm):
    """`kiln watch` is what scripts wait with."""
    farm.submit("watched", "\n".join(f"bird {i}" for i in range(20)) + "\n")
    run = farm.run("watch", "watched")
    assert farm.status("watched")["state"] == "done"
    assert "20" in run.stdout + run.stderr
    farm.run("watch", "nobody", code=2)


def test_what_does_not_exist_is_refused_with_its_name(farm):
    """A typo must not look like an empty campaign."""
    for words in (["status"], ["images"], ["failures"], ["pause"], ["resume"], ["cancel"], ["retry"], ["audit"]):
        assert "no-such" in farm.refuses(*words, "no-such", said="no-such")
    assert farm.run("stauts", code=2).stderr.count("status") >= 1, "the nearest command is named"


def test_every_program_has_help_and_version(farm):
    """The first thing a stranger types."""
    commands = "up down submit watch status images failures pause resume cancel retry workers audit".split()
    overview = farm.run("--help").stdout
    for command in commands:
        assert command in overview
        assert farm.run(command, "--help").stdout.startswith(f"usage: kiln {command}")
    assert "0." in farm.run("--version").stdout


def test_workers_are_listed(farm):
    """Who works, on what, how much."""
    workers = farm.lines("workers")
    assert len(workers) == 2
    for worker in workers:
        assert set(worker) == {"worker", "state", "device", "models", "host", "boot_epoch", "held", "seen_s", "done"}
        assert "cpu" in worker["device"] and "speck" in worker["models"] and worker["seen_s"] < 60


def test_audit_finds_what_is_missing_damaged_or_nobodys(farm):
    """An audit that always says clean is worse than none."""
    farm.submit("audited", "fox\nowl\nbear\n", "--wait")
    images = farm.assert_whole("audited", 3)
    kept = {i["path"]: open(i["path"], "rb").read() for i in images}
    first, second, third = kept
    os.unlink(first)
    with open(second, "r+b") as file:  # one bit, the size stays
        file.seek(len(kept[second]) // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    stranger = os.path.join(os.path.dirname(third), "000009-0a1b2c3d.png")
    with open(stranger, "wb") as file:
        file.write(b"nobody's")
    found = {line["check"]: line for line in farm.lines("audit", "audited", code=1)}
    for check, path in (("image_file_missing", first), ("image_file_damaged", second), ("file_without_row", stranger)):
        assert found[check]["violations"] == 1 and path in found[check]["examples"][0], found[check]
    assert sum(line["violations"] for line in found.values()) == 3, "nothing else is blamed"
    os.unlink(stranger)
    os.rename(third, third + ".away")
    os.symlink(third, third)  # a loop: it cannot be looked at, which is not to say that it is gone
    assert farm.lines("audit", "audited", "--repair", code=1)[-1] == {"rendered_again": 2}
    os.replace(third + ".away", third)
    os.unlink(second + ".damaged")  # kept for whoever wants to know
    farm.wait_done("audited")
    again = farm.assert_whole("audited", 3)
    assert {i["path"]: i["sha256"] for i in again} == {i["path"]: i["sha256"] for i in images}, "an image is a function of its row"


def test_ctrl_c_leaves_the_watching_not_the_work(farm):
    """People look on for a while and go home."""
    farm.submit("left", "\n".join(f"bird {i}" for i in range(60)) + "\n")
    watching = subprocess.Popen([BIN / "kiln", "watch", "left"], env=environment(farm.home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    farm.wait_some_done("left")
    watching.send_signal(signal.SIGINT)
    assert watching.wait(timeout=30) == 128 + signal.SIGINT
    watching.stdout.close()
    farm.wait_done("left")
    farm.assert_whole("left", 60)
