"""kiln-worker's sub-commands as a user runs them: render, tokenize, inspect, without database or coordinator.

If these break, nobody can try a model before building a farm, and a damaged model folder is found at night."""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ.get("KILN_BIN", ROOT / "build/release/bin"))
POCKET = ROOT / "engine/pocket/model"
TINY = ROOT / "tests/golden/models/pocket"


def worker(*words, stdin=None):
    return subprocess.run([BIN / "kiln-worker", *map(str, words)], input=stdin, capture_output=True, text=True, timeout=120)


def render(out, *words):
    run = worker("render", "--model", POCKET, "--size", "64x64", "--out", out, "--json", *words)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def pixels(path):
    return Image.open(path).convert("RGB").tobytes()


def test_a_picture_names_its_prompt_seed_and_making(tmp_path):
    (report,) = render(tmp_path / "heart.png", "--prompt", "red heart", "--seed", 7)
    data = (tmp_path / "heart.png").read_bytes()
    assert report["sha256"] == hashlib.sha256(data).hexdigest()
    picture = Image.open(tmp_path / "heart.png")
    assert picture.size == (64, 64)
    assert picture.text["parameters"].startswith("red heart\n") and "Seed: 7" in picture.text["parameters"]
    assert b"trainedAlgorithmicMedia" in data
    red, green, blue = picture.convert("RGB").getpixel((32, 30))
    assert red > 150 and green < 120 and blue < 120, "the middle of a red heart is red"


def test_the_same_row_gives_the_same_bytes_alone_in_a_batch_and_on_any_threads(tmp_path):
    render(tmp_path / "one.png", "--prompt", "pizza", "--seed", 5, "--threads", 1)
    render(tmp_path / "two.png", "--prompt", "pizza", "--seed", 5, "--threads", 2)
    render(tmp_path / "batch", "--prompt", "pizza", "--seed", 3, "--batch", 3)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert pixels(tmp_path / "one.png") == pixels(tmp_path / "batch" / "000003.png")
    assert pixels(tmp_path / "one.png") != pixels(tmp_path / "batch" / "000001.png")


@pytest.mark.parametrize("words, said", [
    (["--prompt", "x", "--seed", "1", "--size", "65x64"], "65"),
    (["--prompt", "x", "--seed", "1", "--size", "32x64"], "32"),
    (["--prompt", "x", "--seed", "1", "--size", "4096x4096"], "4096"),
    (["--prompt", "x", "--seed", "18446744073709551616", "--size", "64x64"], "18446744073709551616"),
    (["--prompt", "x", "--seed", "1", "--size", "64x64", "--steps", "0"], "0"),
    (["--prompt", "word " * 600, "--seed", "1", "--size", "64x64"], "512"),
    (["--prompt", "x", "--seed", "1", "--size", "64x64", "--device", "cudaX"], "--device 'cudaX', accepted: cpu, cuda, cuda:N"),
])
def test_what_cannot_be_rendered_is_refused_with_a_sentence(tmp_path, words, said):
    out = tmp_path / "no.png"
    run = worker("render", "--model", POCKET, "--out", out, *words)
    assert run.returncode == 2 and said in run.stderr and not out.exists(), run.stderr


def edit(out, *words):
    return worker("render", "--model", TINY, "--precision", "f32", "--prompt", "the same scene, but in winter", "--seed", 46, "--out", out, *words)


def test_reference_images_are_edited_as_the_reference_does(tmp_path):
    """The size of the first image, a second one, and a photo that lies on its side: JPEG with an orientation."""
    golden = ROOT / "tests/golden"
    two = golden / "edit-two"
    run = edit(tmp_path / "two.png", "--size", "80x64", "--image", two / "reference-0.png", "--image", two / "reference-1.png")
    assert run.returncode == 0, run.stderr
    want, got = (Image.open(p).convert("RGB").tobytes() for p in (two / "expected.png", tmp_path / "two.png"))
    assert len(want) == len(got) and sum(a != b for a, b in zip(want, got)) <= len(want) / 1000
    run = edit(tmp_path / "open.png", "--image", golden / "edit-size-from-reference/reference-0.png")
    assert run.returncode == 0 and Image.open(tmp_path / "open.png").size == (64, 96), run.stderr

    upright = Image.open(two / "reference-0.png").convert("RGB")
    lying, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6
    upright.save(tmp_path / "upright.webp", lossless=True)
    lying.save(tmp_path / "lying.webp", lossless=True, exif=exif)
    for name in ("upright", "lying"):
        assert edit(tmp_path / f"{name}.png", "--image", tmp_path / f"{name}.webp").returncode == 0
    assert pixels(tmp_path / "upright.png") == pixels(tmp_path / "lying.png")


def test_a_mask_repaints_as_the_reference_does(tmp_path):
    case = ROOT / "tests/golden/inpaint-f32"
    images = ["--image", case / "reference-0.png", "--image", case / "reference-1.png"]
    run = worker("render", "--model", TINY, "--precision", "f32", "--prompt", "a green disc instead of the stripes", "--seed", 49, *images,
                 "--mask", case / "mask.png", "--strength", "0.6", "--out", tmp_path / "new.png")
    assert run.returncode == 0, run.stderr
    want, got = (Image.open(p).convert("RGB").tobytes() for p in (case / "expected.png", tmp_path / "new.png"))
    assert len(want) == len(got) and sum(a != b for a, b in zip(want, got)) <= len(want) / 1000
    for words, said in [
        ([*images, "--strength", "0.6"], "--strength without --mask"),
        (["--mask", case / "mask.png"], "--mask without --image"),
        ([*images, "--mask", case / "mask.png", "--strength", "0"], "at most 1"),
        ([*images, "--mask", case / "mask.png", "--strength", "nan"], "at most 1"),
        ([*images, "--mask", case / "mask.png", "--strength", "1e-30"], "is none"),
        ([*images, "--mask", case / "mask.png", "--size", "64x64"], "96x64"),
        ([*images, "--mask", case / "no.png"], "--mask '"),
    ]:
        run = edit(tmp_path / "no.png", *words)
        assert run.returncode == 2 and said in run.stderr and not (tmp_path / "no.png").exists(), (words, run.stderr)


def test_what_is_no_reference_image_is_refused_with_its_name(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_text("")
    Image.new("RGB", (63, 200)).save(tmp_path / "narrow.png")
    Image.new("RGB", (64, 600)).save(tmp_path / "long.png")
    os.mkfifo(tmp_path / "pipe.png")
    good = ROOT / "tests/golden/edit-one/reference-0.png"
    for words, said in [
        (["--image", tmp_path / "none.png"], "none.png': cannot be read: No such file"),
        (["--image", good, "--image", tmp_path / "text.png"], "text.png'"),
        (["--image", tmp_path / "empty.png"], "empty.png'"),
        (["--image", tmp_path / "pipe.png"], "pipe.png'"),
        (["--image", tmp_path], "not a file"),
        (["--image", good, "--image", tmp_path / "narrow.png"], "reference 2 of 2"),
        (["--image", tmp_path / "long.png", "--size", "64x64"], "at most 8 times"),
        (["--image", good] * 11, "up to 10"),
        ([], "--size WxH is missing"),
    ]:
        run = edit(tmp_path / "no.png", *words)
        assert run.returncode == 2 and said in run.stderr and not (tmp_path / "no.png").exists(), (words, run.stderr)


def test_tokenize_speaks_json_lines():
    run = worker("tokenize", "--model", TINY, stdin='"a cat"\n"¡Hola, 世界!"\n')
    assert run.returncode == 0 and [type(i) for i in json.loads(run.stdout.splitlines()[0])][0] is int
    bad = worker("tokenize", "--model", TINY, stdin='"good"\n{"no": 1}\n')
    assert bad.returncode == 2 and "line 2" in bad.stderr


@pytest.mark.parametrize("command", ["tokenize", "inspect", "render"])
def test_a_word_that_is_no_option_is_named(command):
    """Also several letters behind one dash, of which getopt reads one at a time."""
    for words, wrong in ((["--model", TINY, "-abc"], "-abc"), (["-q", "--model", TINY], "-q"), (["--frobnicate"], "--frobnicate")):
        run = worker(command, *words)
        assert run.returncode == 2 and run.stderr == f"kiln-worker {command}: unknown option '{wrong}'; see --help\n", run.stderr
    assert worker(command, "--model").stderr == f"kiln-worker {command}: --model needs a value\n"


def test_inspect_tells_what_a_model_is_and_refuses_a_damaged_one(tmp_path):
    report = json.loads(worker("inspect", "--model", POCKET, "--json").stdout)
    assert report["variant"] == "distilled" and report["parameters"] == 6726988 and len(report["sha256"]) == 64
    assert [(mode, list(bytes)) for mode, bytes in report["gpu_bytes"].items()] == [(mode, ["resident", "phases", "streamed"]) for mode in ("image", "edit")]
    assert report["cpu_bytes"] == {mode: bytes["resident"] for mode, bytes in report["gpu_bytes"].items()}
    assert "on the CPU             1024x1024 image in bf16: 0." in worker("inspect", "--model", POCKET).stdout
    quick = json.loads(worker("inspect", "--model", POCKET, "--quick", "--json").stdout)
    assert quick == {k: v for k, v in report.items() if k != "sha256"}
    broken = tmp_path / "model"
    shutil.copytree(POCKET, broken)
    weights = broken / "transformer/diffusion_pytorch_model.safetensors"
    os.chmod(weights, 0o644)
    with open(weights, "r+b") as file:
        file.truncate(weights.stat().st_size - 1000)
    run = worker("inspect", "--model", broken, "--json")
    assert run.returncode == 2 and "transformer" in run.stderr
    gone = worker("inspect", "--model", tmp_path / "nothing")
    assert gone.returncode == 2 and "nothing" in gone.stderr


def test_a_picture_takes_the_memory_that_inspect_says(tmp_path):
    """Who has 16 GB asks before a night of work, not the kernel after it."""
    told = json.loads(worker("inspect", "--model", TINY, "--json").stdout)["cpu_bytes"]["image"]
    run = worker("render", "--model", TINY, "--prompt", "x", "--seed", 1, "--size", "1024x1024", "--steps", 1, "--json", "--out", tmp_path / "x.png")
    assert 0.95 * told < json.loads(run.stdout)["backend_bytes"] < 1.05 * told, run.stdout


@pytest.mark.parametrize("family, format, licence, linears, values, gib", [
    ("klein-4b", "bf16", "Apache-2.0", "BF16", 3_875_544_576 + 4_022_468_096, 16),
    ("klein-4b", "nvfp4", "Apache-2.0", "NVFP4", 3_875_544_576 + 4_022_468_096, 8),
    ("klein-4b", "Q4_K", "Apache-2.0", "Q4_K", 3_875_544_576 + 4_022_468_096, 8),
    ("klein-9b", "fp8", "FLUX Non-Commercial", "F8_E4M3", 9_078_581_248 + 8_190_735_360, 16),
])
def test_models_of_the_family_are_told_from_their_tensors_with_the_memory_they_take(tmp_path, family, format, licence, linears, values, gib):
    """Full shapes without a value in them, in a folder of any name. The memory is what they are promised to run in."""
    folder = tmp_path / "stuff"
    subprocess.run([sys.executable, ROOT / "tests/bench/hollow_klein.py", folder, "--family", family, "--format", format], check=True, capture_output=True)
    run = worker("inspect", "--quick", "--json", folder)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert (report["family"], report["licence"], report["variant"]) == (family, licence, "distilled")
    assert report["parameters"] == values + 84_046_372
    for part in report["parts"][:2]:
        assert max(part["dtypes"], key=part["dtypes"].get) == linears, part
    assert report["cpu_bytes"]["image"] < report["cpu_bytes"]["edit"] < gib * 2**30
    assert json.loads(worker("inspect", "--quick", "--json", "--base", folder).stdout)["variant"] == "base"


def test_parts_of_a_model_come_from_single_files_and_inspect_says_what_they_are(tmp_path):
    part = TINY / "transformer/diffusion_pytorch_model.safetensors"
    words = ["--model", TINY, "--prompt", "x", "--seed", 1, "--size", "64x64", "--steps", 1]
    whole, single = tmp_path / "whole.png", tmp_path / "single.png"
    assert worker("render", *words, "--out", whole).returncode == 0
    run = worker("render", *words, "--transformer", part, "--out", single, "--json")
    assert run.returncode == 0, run.stderr
    assert Image.open(whole).tobytes() == Image.open(single).tobytes()
    report = json.loads(worker("inspect", part, "--json").stdout)
    assert report["variant"] == "distilled" and report["parts"][0]["part"] == "transformer"
    assert report["sha256"] == hashlib.sha256(part.read_bytes()).hexdigest()
    unnamed = tmp_path / "x.safetensors"
    shutil.copy(part, unnamed)
    assert json.loads(worker("inspect", unnamed, "--json").stdout)["variant"] == "unknown"
    run = worker("render", *words, "--transformer", unnamed, "--out", single)
    assert run.returncode == 2 and "say which with --distilled or --base" in run.stderr
    assert worker("render", *words, "--transformer", unnamed, "--distilled", "--out", single).returncode == 0
    assert Image.open(whole).tobytes() == Image.open(single).tobytes()


def test_inspect_tells_what_a_single_file_is(tmp_path):
    """By its tensors and the config.json beside it; --base and --distilled are believed."""
    transformer, vae = (TINY / part / "diffusion_pytorch_model.safetensors" for part in ("transformer", "vae"))
    for words, expected in [([vae], {"family": "vae-custom"}), ([transformer], {"family": "klein-custom", "variant": "distilled"}),
                            ([transformer, "--base"], {"variant": "base"}), ([POCKET / "text_encoder/model.safetensors"], {"family": "qwen3-custom"})]:
        report = json.loads(worker("inspect", "--quick", "--json", *words).stdout)
        assert {k: report[k] for k in expected} == expected and "note" not in report, report
    text = tmp_path / "notes.txt"
    text.write_text("these are no weights, they are words\n")
    for words, said in [([vae, "--base"], "are for a transformer"), ([text], "notes.txt: not a safetensors file")]:
        run = worker("inspect", "--quick", *words)
        assert run.returncode == 2 and said in run.stderr and len(run.stderr.splitlines()) == 1, run.stderr


def test_parts_of_a_model_folder_may_be_links_to_files(tmp_path):
    """People have one file of weights and no wish to copy it; what its own name says counts, not the link's."""
    folder, file = tmp_path / "linked", tmp_path / "klein-of-mine.safetensors"
    folder.mkdir()
    shutil.copy(TINY / "transformer/diffusion_pytorch_model.safetensors", file)
    for part in ("tokenizer", "text_encoder", "vae"):
        (folder / part).symlink_to(TINY / part)
    (folder / "transformer.safetensors").symlink_to(file)
    words = ["--prompt", "x", "--seed", 1, "--size", "64x64", "--steps", 1]
    whole, linked = tmp_path / "whole.png", tmp_path / "linked.png"
    assert worker("render", "--model", TINY, *words, "--out", whole).returncode == 0
    run = worker("render", "--model", folder, *words, "--out", linked)
    assert run.returncode == 0, run.stderr
    assert Image.open(whole).tobytes() == Image.open(linked).tobytes()
    before = json.loads(worker("inspect", "--model", folder, "--json").stdout)
    assert before["variant"] == "distilled"
    (folder / "transformer.gguf").symlink_to(file)
    run = worker("render", "--model", folder, *words, "--out", linked)
    assert run.returncode == 2 and "one of the two is too many" in run.stderr
    (folder / "transformer.safetensors").unlink()
    after = json.loads(worker("inspect", "--model", folder, "--json").stdout)  # what a file is, its first bytes say
    assert after["variant"] == "distilled" and after["sha256"] != before["sha256"]
    elsewhere = ["inspect", "--model", folder, "--transformer", file, "--json"]
    own = json.loads(worker(*elsewhere).stdout)
    (folder / "transformer").symlink_to(TINY / "transformer")
    assert json.loads(worker(*elsewhere).stdout)["sha256"] == own["sha256"], "of the folder's part nothing is used"
    run = worker("render", "--model", folder, *words, "--out", linked)
    assert run.returncode == 2 and "one of the two is too many" in run.stderr
    (folder / "transformer").unlink()
    (folder / "transformer.gguf").unlink()
    run = worker("render", "--model", folder, *words, "--out", linked)
    assert run.returncode == 2 and "a model is a folder in the diffusers layout" in run.stderr
    (folder / "transformer.gguf").symlink_to(tmp_path / "gone.gguf")  # the sentence names the link, not a folder nobody spoke of
    run = worker("render", "--model", folder, *words, "--out", linked)
    assert run.returncode == 2 and "transformer.gguf: No such file" in run.stderr


def test_adapters_change_the_picture_by_their_scale_and_foreign_keys_are_listed(tmp_path):
    lora, out = ROOT / "tests/golden/files/lora-bfl.safetensors", tmp_path / "x.png"
    words = ["--model", TINY, "--prompt", "x", "--seed", 1, "--size", "64x64", "--steps", 1, "--precision", "f32", "--out", out]
    pictures = []
    for more in ([], ["--lora", f"{lora}:0"], ["--lora", lora], ["--lora", f"{lora}:0.5", "--lora", f"{lora}:0.5"]):
        run = worker("render", *words, *more)
        assert run.returncode == 0, run.stderr
        pictures.append(Image.open(out).tobytes())
    assert pictures[0] == pictures[1] != pictures[2]
    assert max(abs(a - b) for a, b in zip(pictures[2], pictures[3])) <= 1  # each half is added, and rounded, for itself
    run = worker("render", *words, "--lora", TINY / "vae/diffusion_pytorch_model.safetensors")
    assert run.returncode == 2 and "bn.running_mean" in run.stderr


def damaged(tmp_path, name, how):
    """A copy of the pocket model with one file damaged."""
    model = tmp_path / "model"
    shutil.copytree(POCKET, model)
    file = model / name
    os.chmod(file, 0o644)
    if how == "empty":
        file.write_bytes(b"")
    elif how == "half":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how == "huge":
        os.truncate(file, 10**11)
    else:
        file.unlink()
        if how == "folder":
            file.mkdir()
        elif how == "pipe":
            os.mkfifo(file)
        elif how == "loop":
            file.symlink_to(file.name)
    return model


@pytest.mark.parametrize("how", ["gone", "empty", "half", "huge", "folder", "pipe", "loop"])
@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json", "vae/diffusion_pytorch_model.safetensors",
                                  "text_encoder/model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt"])
def test_a_damaged_model_is_refused_by_the_name_of_the_file(tmp_path, name, how):
    model = damaged(tmp_path, name, how)
    command = ["tokenize", "--model", model] if "tokenizer" in name else ["inspect", "--model", model, "--quick"]
    for words in (command, ["render", "--model", model, "--prompt", "x", "--seed", 1, "--size", "64x64", "--out", tmp_path / "x.png"]):
        run = worker(*words, stdin='"a"\n')
        assert run.returncode == 2, (words[0], run.stderr)
        assert pathlib.Path(name).name in run.stderr and run.stderr.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


def rewrite(path, change):
    """The header of a .safetensors file as `change` leaves it, and its data."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, values = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    change(header, values)
    text = json.dumps(header).encode()
    os.chmod(path, 0o644)
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)


def a_nan(header, values):
    at = header["proj_out.weight"]["data_offsets"][0]
    values[at : at + 4] = b"\xff" * 4


@pytest.mark.parametrize("change, said", [
    (a_nan, "'proj_out.weight' has NaN or infinite values"),
    (lambda header, _: header["proj_out.weight"].update(shape=[192, 128]), "shape [192,128], want [128,192]"),
    (lambda header, _: header["proj_out.weight"].update(dtype="I16"), "dtype I16, accepted: F32, BF16, F16"),
    (lambda header, _: header.update(other=header.pop("proj_out.weight")), "'proj_out.weight' is missing"),
    (lambda header, _: header["proj_out.weight"].update(data_offsets=[0, 49152]), "overlaps"),
    (lambda header, _: header["proj_out.weight"].update(shape=[2**62, 2**62]), "not usable"),
    (lambda _, values: values.extend(b"more"), "4 bytes at the end belong to no tensor"),
])
def test_lying_weights_are_refused_by_the_name_of_the_tensor(tmp_path, change, said):
    model = tmp_path / "model"
    shutil.copytree(POCKET, model)
    rewrite(model / "transformer/diffusion_pytorch_model.safetensors", change)
    run = worker("render", "--model", model, "--prompt", "x", "--seed", 1, "--size", "64x64", "--out", tmp_path / "x.png")
    assert run.returncode == 2 and said in run.stderr, run.stderr


def test_a_variance_below_zero_is_refused_and_not_drawn(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(POCKET, model)

    def negative(header, values):
        end = header["bn.running_var"]["data_offsets"][1]
        values[end - 1] |= 0x80  # the sign of the last one, whatever the dtype

    rewrite(model / "vae/diffusion_pytorch_model.safetensors", negative)
    run = worker("render", "--model", model, "--prompt", "x", "--seed", 1, "--size", "64x64", "--out", tmp_path / "x.png")
    assert run.returncode == 2 and "'bn.running_var' has the variance -" in run.stderr, run.stderr


def test_without_a_gpu_devices_says_so_and_what_to_do():
    forms = "accepted: cuda, cuda:N, cuda:I,J.. (different GPUs)\n"
    for words, said in [([], ["no CUDA device", "install it"]), (["cuda:0"], ["no CUDA device"]), (["gpu"], [forms]), (["cuda:"], ["'cuda:'", forms]),
                        (["cuda:0,0"], [forms]), (["cuda", "cuda"], ["accepted: cuda, cuda:N"])]:
        run = subprocess.run([BIN / "kiln-worker", "devices", "--json", *words], capture_output=True, text=True, timeout=120,
                             env={"KILN_CUDA_MODULE": "/nowhere/libkiln-cuda.so"})
        assert run.returncode == 2 and run.stdout == "" and all(part in run.stderr for part in said), run.stderr
