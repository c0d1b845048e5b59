"""The bundled model draws what its prompts say, through kiln's own engine: a sample of engine/pocket/train/measure.py.

If these break, the first picture that a stranger sees is wrong, and every other test renders something nobody can judge."""

import os
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORKER = pathlib.Path(os.environ.get("KILN_BIN", ROOT / "build/release/bin")) / "kiln-worker"
POCKET, BASE = ROOT / "engine/pocket/model", ROOT / "engine/pocket/base"
EVERY = 45  # 31 of the emoji

sys.path.insert(0, str(ROOT / "engine/pocket/train"))
import measure  # noqa: E402


@pytest.fixture(scope="module")
def emoji():
    return measure.read_emoji()


# What the model card promises of all emoji, less what so small a sample may miss by chance.
@pytest.mark.parametrize(
    "name,side,at_least",
    [
        ("names", 64, 0.9),
        ("held out: could you sketch {n}?", 64, 0.9),
        ("colour and name", 64, 0.6),
        ("A left of B, 128x64", 64, 0.9),
        ("three of A", 128, 0.8),
    ],
)
def test_most_prompts_give_the_emoji_they_name(emoji, tmp_path, name, side, at_least):
    words, tiles = emoji
    (wanted,) = [m for m in measure.measures(words, side, EVERY) if m.name == name]
    share, missed = wanted.share_right(wanted.render(WORKER, POCKET, tmp_path), wanted.references(tiles, words))
    assert share >= at_least, missed


def test_most_edits_by_the_base_twin_are_what_was_asked_for(emoji, tmp_path):
    """Another colour, another ground, two beside each other; of four pictures by the distilled model each, in 12 of the 50 steps to save time."""
    words, tiles = emoji
    right = count = 0
    for k, m in enumerate(measure.edit_measures(words, 400, WORKER, POCKET, tmp_path)):
        (tmp_path / str(k)).mkdir()
        share, _ = m.share_right(m.render(WORKER, BASE, tmp_path / str(k), "--steps", "12"), m.references(tiles, words))
        right, count = right + share * len(m.prompts), count + len(m.prompts)
    assert count >= 10 and right >= 0.6 * count


@pytest.mark.parametrize("folder", [POCKET, BASE])
def test_the_folder_stays_small(folder):
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 14_000_000
