"""Every variant in every file format and every mode: a cell renders what its file means, or is refused with a sentence.

The picture of a quantised file must be, to the byte, that of a plain f32 file with the decoded values: noise that looks like a
picture is how a wrong nibble order shows, which is not at all. The table is printed (pytest -s)."""

import json
import subprocess

import numpy as np
import pytest
from PIL import Image

import weight_formats as formats
import speck  # finds what is in tests/bench
import hollow_klein
from farm import BIN

VARIANTS = {"distilled": {"is_distilled": True}, "base": {"is_distilled": None}, "kv": {"_class_name": "Flux2KleinKVPipeline"}}
WIDE = {"HIDDEN": 256, "HEAD": 128}                                             # K-quants come in blocks of 256
WIDE_TEXT = {"WIDTH": 256, "QUERY": 256, "KEY": 128, "INNER": 256, "HEAD": 128}
MODES = ["text", "edit", "two", "inpaint", "lora", "negative"]
TEXT_NUMBERS = {"qwen3.attention.head_count": 2, "qwen3.attention.head_count_kv": 1, "qwen3.attention.key_length": 128,
                "qwen3.block_count": 27, "qwen3.embedding_length": 256, "qwen3.feed_forward_length": 256,
                "qwen3.rope.freq_base": 1e6, "qwen3.attention.layer_norm_rms_epsilon": 1e-6}


def write_index(folder, changes):
    index = json.loads((folder / "model_index.json").read_text()) | changes
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if v is not None}))


def linked(model, folder, parts):
    """A model folder of links, but for what a test writes itself."""
    folder.mkdir(parents=True)
    for part in parts:
        (folder / part).symlink_to(model / part)
    (folder / "model_index.json").write_bytes((model / "model_index.json").read_bytes())
    return folder


def render(model, out, *words):
    run = subprocess.run([BIN / "kiln-worker", "render", "--model", model, "--prompt", "a red fox", "--seed", "3", "--size", "64x64", "--steps", "1",
                          "--threads", "1", "--out", out, *map(str, words)], capture_output=True, text=True)
    if run.returncode == 0:
        return Image.open(out).convert("RGB").tobytes()
    assert run.returncode == 2 and len(run.stderr.strip().splitlines()) == 1, f"{run.returncode}: {run.stderr}"
    return run.stderr.strip()


@pytest.fixture(scope="module")
def material(model, tmp_path_factory):
    """The pictures, the adapter, and the plain values of a transformer with wide blocks."""
    root = tmp_path_factory.mktemp("matrix")
    for i, size in enumerate([(64, 64), (80, 64)]):
        Image.frombytes("RGB", size, bytes(formats.random_of(f"picture {i}").integers(0, 256, size[0] * size[1] * 3, dtype=np.uint8))).save(
            root / f"{i}.png")
    Image.frombytes("L", (64, 64), bytes(255 * (i % 64 > 31) for i in range(64 * 64))).save(root / "mask.png")
    with speck.shapes(**WIDE) as maker:
        state = formats.plain(maker.transformer())
    name = "transformer.transformer_blocks.0.attn.to_q.lora_"
    formats.write_safetensors(root / "lora.safetensors", {
        f"{name}{half}.weight": formats.as_bf16(formats.random_of(half).normal(0, 0.3, shape).astype(np.float32))
        for half, shape in (("A", (4, 256)), ("B", (256, 4)))})
    return root, model, state


def words_of(mode, root):
    return {"text": [], "edit": ["--image", root / "0.png"], "two": ["--image", root / "0.png", "--image", root / "1.png"],
            "inpaint": ["--image", root / "0.png", "--mask", root / "mask.png"], "lora": ["--lora", root / "lora.safetensors"],
            "negative": ["--negative", "blurry", "--guidance", "3"]}[mode]


def make_transformer(path, state, kind):
    """path without ending. Returns the values that the file means, under its own names."""
    if kind in formats.GGUF:
        return formats.make_gguf(path.with_suffix(".gguf"), formats.bfl(state), kind, "flux", {})
    return formats.make_safetensors(path.with_suffix(".safetensors"), formats.bfl(state), kind)


KINDS = formats.SAFETENSORS + formats.GGUF


@pytest.mark.parametrize("kind", KINDS)
def test_a_transformer_of_every_format_renders_what_it_means_in_every_mode(material, tmp_path, kind):
    """{distilled, base, kv} x {format} x {mode}."""
    root, model, state = material
    file = linked(model, tmp_path / "file", ["tokenizer", "text_encoder", "vae"])
    means = linked(model, tmp_path / "means", ["tokenizer", "text_encoder", "vae"])
    decoded = make_transformer(file / "transformer", state, kind)
    formats.write_safetensors(means / "transformer.safetensors", {name: formats.as_f32(v) for name, v in decoded.items()})
    for variant, index in VARIANTS.items():
        for folder in (file, means):
            write_index(folder, {"is_distilled": None, "_class_name": "Flux2KleinPipeline"} | index)
        seen = {mode: render(file, tmp_path / "x.png", *words_of(mode, root)) for mode in MODES}
        print(f"{kind:6} {variant:10}", "  ".join(f"{mode}: {'ok' if isinstance(seen[mode], bytes) else seen[mode]}" for mode in MODES))
        assert seen["text"] == render(means, tmp_path / "y.png"), f"{kind} {variant}: other values than the file's"
        assert np.frombuffer(seen["text"], np.uint8).std() > 5
        assert seen["lora"] == render(means, tmp_path / "y.png", *words_of("lora", root)), f"{kind} {variant} with an adapter"
        expect(seen, variant)


REFUSED = {"distilled": {"negative": "is distilled"}, "base": {}, "kv": {"negative": "is distilled", "inpaint": "KV"}}


def expect(seen, variant):
    """Each mode makes a picture of its own, but for those that the variant does not have."""
    refused = {mode: said for mode, said in seen.items() if isinstance(said, str)}
    assert len(set(seen.values())) == len(MODES)
    assert refused.keys() == REFUSED[variant].keys(), refused
    assert all(REFUSED[variant][mode] in said for mode, said in refused.items()), refused


def test_products_in_fp8_are_asked_for_and_recorded(material, tmp_path):
    """Another picture than bf16's, whose record says so; of files without FP8 there is none."""
    _, model, state = material
    pictures = {}
    for kind, precision in (("fp8", "bf16"), ("fp8", "fp8"), ("bf16", "fp8")):
        folder = tmp_path / kind
        if not folder.exists():
            make_transformer(linked(model, folder, ["tokenizer", "text_encoder", "vae"]) / "transformer", state, kind)
            write_index(folder, {"is_distilled": True})
        out = tmp_path / "x.png"
        run = subprocess.run([BIN / "kiln-worker", "render", "--model", folder, "--prompt", "a red fox", "--seed", "3", "--size", "64x64",
                              "--precision", precision, "--json", "--out", out], capture_output=True, text=True)
        if kind == "bf16":
            assert run.returncode == 2 and "has a matrix in FP8 (F8_E4M3); accepted: bf16, f32" in run.stderr
            continue
        assert run.returncode == 0, run.stderr
        assert json.loads(run.stdout)["precision"] == precision
        assert f'"precision":"{precision}"' in Image.open(out).text["kiln"]
        assert ("has no units for FP8" in run.stderr) == (precision == "fp8")
        pictures[precision] = Image.open(out).convert("RGB").tobytes()
    assert pictures["bf16"] != pictures["fp8"]


def test_names_of_the_folder_and_of_single_files_mean_the_same(material, tmp_path):
    """One set of values, under the names of diffusers and of the published single files."""
    _, model, state = material
    folder = linked(model, tmp_path / "folder", ["tokenizer", "text_encoder", "vae", "scheduler"])
    single = linked(model, tmp_path / "single", ["tokenizer", "text_encoder", "vae"])
    formats.make_safetensors(folder / "transformer/diffusion_pytorch_model.safetensors", state, "bf16")
    config = json.loads((model / "transformer/config.json").read_text()) | {
        "attention_head_dim": 128, "num_attention_heads": 2, "axes_dims_rope": [32, 32, 32, 32]}
    (folder / "transformer/config.json").write_text(json.dumps(config))
    make_transformer(single / "transformer", state, "bf16")
    assert isinstance(render(folder, tmp_path / "x.png"), bytes)
    assert render(folder, tmp_path / "x.png") == render(single, tmp_path / "y.png")


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_encoder_of_every_format_means_its_values(model, tmp_path, kind):
    """safetensors under the names of transformers, GGUF under those of llama.cpp."""
    with speck.shapes(**WIDE_TEXT) as maker:
        text = formats.plain(maker.text_encoder())
    with speck.shapes(CONTEXT=3 * 256) as maker:
        transformer = formats.plain(maker.transformer())
    pictures = []
    for name in ("file", "means"):
        folder = linked(model, tmp_path / name, ["tokenizer", "vae"])
        formats.make_safetensors(folder / "transformer.safetensors", formats.bfl(transformer), "bf16")
        path = folder / "text_encoder"
        if name == "means":
            decoded = {here: values[there] for here, there in zip(text, formats.llama(text))} if kind in formats.GGUF else values
            formats.write_safetensors(path.with_suffix(".safetensors"), {n: formats.as_f32(v) for n, v in decoded.items()})
        elif kind in formats.GGUF:
            values = formats.make_gguf(path.with_suffix(".gguf"), formats.llama(text), kind, "qwen3", TEXT_NUMBERS)
        else:
            values = formats.make_safetensors(path.with_suffix(".safetensors"), text, kind)
        pictures.append(render(folder, tmp_path / f"{name}.png"))
    assert isinstance(pictures[0], bytes), pictures[0]
    assert pictures[0] == pictures[1]


def test_a_vae_of_every_kind_means_its_values(material, tmp_path):
    """{full, small decoder} x {F32, BF16, F16} x {names of diffusers, of "ae" files} x {text, edit}, each as one file without a config,
    beside a folder that says its widths. The small decoder is published with the full encoder."""
    root, model, _ = material
    parts = ["tokenizer", "text_encoder", "transformer", "scheduler"]
    with speck.shapes(LEVELS=(64, 64, 64, 64)) as maker:
        full = formats.plain(maker.vae())
    with speck.shapes(LEVELS=(32, 32, 32, 32)) as maker:
        narrow = formats.plain(maker.vae())
    seen = set()
    for decoder in ("full", "small"):
        state = full if decoder == "full" else full | {name: v for name, v in narrow.items() if name.startswith("decoder.")}
        config = json.loads((model / "vae/config.json").read_text()) | {"block_out_channels": [64] * 4, "norm_num_groups": 32}
        for kind in ("f32", "bf16", "f16"):
            means = linked(model, tmp_path / f"{decoder}-{kind}", parts)
            decoded = formats.make_safetensors(tmp_path / "diffusers.safetensors", state, kind)
            formats.write_safetensors(means / "vae/diffusion_pytorch_model.safetensors", {n: formats.as_f32(v) for n, v in decoded.items()})
            (means / "vae/config.json").write_text(json.dumps(config | ({} if decoder == "full" else {"decoder_block_out_channels": [32] * 4})))
            formats.make_safetensors(tmp_path / "bfl.safetensors", formats.bfl_vae(state), kind)
            for mode in ("text", "edit"):
                wanted = render(means, tmp_path / "x.png", *words_of(mode, root))
                assert isinstance(wanted, bytes) and np.frombuffer(wanted, np.uint8).std() > 5, wanted
                for names in ("diffusers", "bfl"):
                    file = tmp_path / f"{names}.safetensors"
                    assert render(model, tmp_path / "y.png", "--vae", file, *words_of(mode, root)) == wanted, f"{decoder} {kind} {names} {mode}"
                    print(f"vae {decoder:5} {kind:5} {names:10} {mode}: ok")
                seen.add(wanted)
    assert len(seen) >= 4, "two decoders, two modes"


def test_published_vaes_are_known_by_their_widths(tmp_path):
    """The licence is that of the widths; a VAE of other widths is somebody's own."""
    with speck.shapes(LEVELS=(128, 256, 512, 512)) as maker:
        full = maker.vae()
    with speck.shapes(LEVELS=(96, 192, 384, 384)) as maker:
        narrow = maker.vae()
    small = full | {name: entry for name, entry in narrow.items() if name.startswith("decoder.")}
    for tensors, family, licence, parameters in [(full, "flux2-vae", "Apache-2.0", 84046372), (small, "flux2-vae-small-decoder", "Apache-2.0", 62373348),
                                                (narrow, "vae-custom", "unknown", None)]:
        file = tmp_path / "vae.safetensors"
        maker.write_safetensors(file, tensors, hollow_klein.Holes())
        run = subprocess.run([BIN / "kiln-worker", "inspect", "--quick", "--json", file], capture_output=True, text=True, check=True)
        report = json.loads(run.stdout)
        assert (report["family"], report["licence"]) == (family, licence)
        assert parameters is None or report["parameters"] == parameters, report["parameters"]
