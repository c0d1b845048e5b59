"""The smallest model kiln accepts: random weights in the shapes of klein, for tests that need thousands of images.

Same files, tensors and code path as a real model; a picture is noise and takes some hundredths of a second. The same seed
gives the same bytes."""

import contextlib
import pathlib
import shutil
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/bench"))

import make_random_klein as maker  # noqa: E402

TOKENIZER = ROOT / "tests/golden/models/pocket/tokenizer"
HEAD, WIDTH, VOCAB, GROUPS = 8, 8, 1536, 4
SHAPES = {
    "BLOCK": 65537, "SHARD_BYTES": 1 << 30,
    "HIDDEN": HEAD, "DOUBLES": 1, "SINGLES": 1, "CONTEXT": 3 * WIDTH, "HEAD": HEAD,
    "WIDTH": WIDTH, "INNER": 8, "LAYERS": 27, "VOCAB": VOCAB, "QUERY": HEAD, "KEY": HEAD,
    "LEVELS": (GROUPS, GROUPS, GROUPS, GROUPS),
}
CONFIGS = {
    "transformer/config.json": {"attention_head_dim": HEAD, "num_attention_heads": 1, "num_layers": 1, "num_single_layers": 1,
                                "joint_attention_dim": 3 * WIDTH, "axes_dims_rope": [2, 2, 2, 2]},
    "text_encoder/config.json": {"hidden_size": WIDTH, "intermediate_size": 8, "num_hidden_layers": 27, "num_attention_heads": 1,
                                 "num_key_value_heads": 1, "head_dim": HEAD, "vocab_size": VOCAB, "bos_token_id": 1500,
                                 "eos_token_id": 1502},
    "vae/config.json": {"block_out_channels": [GROUPS] * 4, "norm_num_groups": GROUPS},
}


@contextlib.contextmanager
def shapes(**changes):
    """The maker's dimensions are those of this module, and the changes to them."""
    wanted = SHAPES | changes
    kept = {name: getattr(maker, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(maker, name, value)
        yield maker
    finally:
        for name, value in kept.items():
            setattr(maker, name, value)


def make(folder, seed=1, is_distilled=True):
    """Writes the model's folder and returns it. Not distilled: a base model, with guidance."""
    folder = pathlib.Path(folder)
    with shapes():
        values = maker.Values(seed)
        for part, tensors in (("vae", maker.vae()), ("transformer", maker.transformer())):
            maker.write_safetensors(folder / part / "diffusion_pytorch_model.safetensors", tensors, values)
        maker.write_shards(folder / "text_encoder", maker.text_encoder(), values)
    for name, config in maker.CONFIGS.items():
        own = {"is_distilled": is_distilled} if name == "model_index.json" else {}
        maker.write_json(folder / name, config | CONFIGS.get(name, {}) | own)
    shutil.copytree(TOKENIZER, folder / "tokenizer", dirs_exist_ok=True)
    return folder


if __name__ == "__main__":
    make(sys.argv[1])
