#!/usr/bin/env python3
"""Draw the model card's contact sheets through kiln's own engine.

    sheets.py [--model DIR] [--worker build/release/bin/kiln-worker] [--out DIR]

Random names, held-out wordings, colours, grounds, pairs, names and counts at 128x128 (by lot, none chosen), four seeds of one prompt, and
prompts as people type them.
"""
import argparse, pathlib, random, subprocess, tempfile
from PIL import Image, ImageDraw

from measure import HERE, ROOT, read_emoji
from scenes import GROUNDS, HUES, may_be_coloured
from wording import HELD_OUT, article, plural

SIDE, TEXT, COLUMNS = 96, 26, 8
FREE = ["a yellow banana", "my dog", "a fast red car", "wizard with a hat", "please draw a unicorn for my little sister", "OWL", "Pengiun", "an elefant",
        "a blue fox", "a cat left of a dog", "a happy face", "birthday party", "something to eat", "the quick brown fox jumps", "quantum chromodynamics", "asdfgh"]


def sheets(words):
    r = random.Random(11)
    names = [m["name"] for m in r.sample(words, 32)]
    yield "names", (64, 64), names
    yield "held-out", (64, 64), [t.format(n=m["name"]) for t in HELD_OUT for m in r.sample(words, 8)]
    coloured = [m["name"] for m in words if may_be_coloured(m)]
    yield "colours", (64, 64), [f"a {c} {n}" for n in r.sample(coloured, 4) for c in list(HUES)[:8]]
    yield "grounds", (64, 64), [f"{m['name']} on a {r.choice(list(GROUNDS))} background" for m in r.sample(words, 16)]
    yield "pairs", (128, 64), ["{} left of {}".format(*(article(n) + n for n in pair)) for pair in
                               [[m["name"] for m in r.sample(words, 2)] for _ in range(16)]]
    some = [m["name"] for m in r.sample(words, 24)]
    yield "large", (128, 128), some[:16] + [f"{c} {plural(n)}" for c, n in zip(["two", "three", "three", "four"], some[16:])] + \
        [f"{a} above {b}" for a, b in zip(some[20:22], some[22:])]
    yield "seeds", (64, 64), ["red apple"] * 4 + ["dragon"] * 4
    yield "free", (64, 64), FREE


def render(worker, model, size, prompts, folder):
    (folder / "prompts.txt").write_text("".join(p + "\n" for p in prompts), "utf-8")
    subprocess.run([worker, "render", "--model", model, "--prompt-file", folder / "prompts.txt", "--seed", "1", "--batch", "8",
                    "--size", "%dx%d" % size, "--out", folder / "out"], check=True, stdout=subprocess.DEVNULL)
    return [Image.open(folder / "out" / f"{i + 1:06d}.png").convert("RGB") for i in range(len(prompts))]


def label(draw, x, y, text, width):
    """Two lines of the default font at most."""
    lines, rest = [], text
    while rest and len(lines) < 2:
        n = len(rest)
        while draw.textlength(rest[:n]) > width:
            n -= 1
        cut = rest.rfind(" ", 0, n) if n < len(rest) and " " in rest[:n] else n
        lines.append(rest[:cut].strip())
        rest = rest[cut:]
    draw.multiline_text((x, y), "\n".join(lines), fill="black", spacing=1)


def sheet(pictures, prompts):
    wide = pictures[0].width // pictures[0].height
    side = max(SIDE, pictures[0].height)
    columns, width = COLUMNS // wide, side * wide
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * (width + 8), rows * (side + TEXT + 6)), "white")
    draw = ImageDraw.Draw(page)
    for i, (picture, prompt) in enumerate(zip(pictures, prompts)):
        x, y = i % columns * (width + 8) + 4, i // columns * (side + TEXT + 6)
        page.paste(picture.resize((width, side), Image.BICUBIC), (x, y))
        label(draw, x, y + side + 1, prompt, width)
    return page


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--model", default=HERE.parent / "model", type=pathlib.Path)
    ap.add_argument("--worker", default=ROOT / "build/release/bin/kiln-worker", type=pathlib.Path)
    ap.add_argument("--out", default=HERE.parent / "sheets", type=pathlib.Path)
    a = ap.parse_args()
    a.out.mkdir(exist_ok=True)
    for name, size, prompts in sheets(read_emoji()[0]):
        with tempfile.TemporaryDirectory() as folder:
            sheet(render(a.worker, a.model, size, prompts, pathlib.Path(folder)), prompts).save(a.out / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    main()
