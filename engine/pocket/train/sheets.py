#!/usr/bin/env python3
"""Draw the model card's contact sheets through kiln's own engine.

    sheets.py [--model DIR] [--base DIR] [--worker build/release/bin/kiln-worker] [--out DIR]

Random names, held-out wordings, colours, grounds, pairs, names and counts at 128x128 (by lot, none chosen), four seeds of one prompt,
prompts as people type them. With --base: names by the base twin, and its edits of the model's pictures of names.
"""
import argparse, pathlib, random, tempfile
from PIL import Image, ImageDraw

from measure import HERE, ROOT, Measure, read_emoji
from scenes import GROUNDS, HUES, may_be_coloured
from wording import HELD_OUT, article, plural

SIDE, TEXT, COLUMNS = 96, 26, 8
FREE = ["a yellow banana", "my dog", "a fast red car", "wizard with a hat", "please draw a unicorn for my little sister", "OWL", "Pengiun", "an elefant",
        "a blue fox", "a cat left of a dog", "a happy face", "birthday party", "something to eat", "the quick brown fox jumps", "quantum chromodynamics", "asdfgh"]


def sheets(words):
    r = random.Random(11)
    names = [m["name"] for m in r.sample(words, 32)]
    yield Measure("names", (64, 64), prompts=names)
    yield Measure("held-out", (64, 64), prompts=[t.format(n=m["name"]) for t in HELD_OUT for m in r.sample(words, 8)])
    coloured = [m["name"] for m in words if may_be_coloured(m)]
    yield Measure("colours", (64, 64), prompts=[f"a {c} {n}" for n in r.sample(coloured, 4) for c in list(HUES)[:8]])
    yield Measure("grounds", (64, 64), prompts=[f"{m['name']} on a {r.choice(list(GROUNDS))} background" for m in r.sample(words, 16)])
    yield Measure("pairs", (128, 64), prompts=["{} left of {}".format(*(article(n) + n for n in pair)) for pair in
                                               [[m["name"] for m in r.sample(words, 2)] for _ in range(16)]])
    some = [m["name"] for m in r.sample(words, 24)]
    counts = [f"{c} {plural(n)}" for c, n in zip(["two", "three", "three", "four"], some[16:])]
    yield Measure("large", (128, 128), prompts=some[:16] + counts + [f"{a} above {b}" for a, b in zip(some[20:22], some[22:])])
    yield Measure("seeds", (64, 64), prompts=["red apple"] * 4 + ["dragon"] * 4)
    yield Measure("free", (64, 64), prompts=FREE)


def render(measure, worker, model, folder):
    """Pictures that stay in FOLDER/NAME/out."""
    (folder / measure.name).mkdir()
    return measure.render(worker, model, folder / measure.name)


def base_sheets(words, worker, model, base, folder):
    """Names by the base twin, and what it makes of the model's pictures: (sheet's name, pictures, labels)."""
    r = random.Random(12)
    few = Measure("base", (64, 64), prompts=[m["name"] for m in r.sample(words, 16)])
    yield few.name, render(few, worker, base, folder), few.prompts
    names = Measure("names", (64, 64), prompts=[m["name"] for m in r.sample([m for m in words if may_be_coloured(m)], 10)])
    before = render(names, worker, model, folder)
    files = [folder / "names/out" / f"{i + 1:06d}.png" for i in range(len(before))]
    edited, together = Measure("edits", (64, 64)), Measure("together", (128, 64))
    for file in files:
        for text in ("make it {c}", "put it on a {g} background", "make it {c} on a {g} background"):
            edited.add(text.format(c=r.choice(list(HUES)), g=r.choice(list(GROUNDS))), images=[file])
    for k in range(0, len(files), 2):
        together.add("put them beside each other", images=files[k:k + 2])
    after = render(edited, worker, base, folder)
    rows = [([x, *after[3 * i:3 * i + 3]], [n, *edited.prompts[3 * i:3 * i + 3]]) for i, (x, n) in enumerate(zip(before, names.prompts))]
    yield "edits", [p for pictures, _ in rows for p in pictures], [t for _, labels in rows for t in labels]
    pairs = ["%s and %s: " % tuple(names.prompts[k:k + 2]) + together.prompts[0] for k in range(0, len(files), 2)]
    yield "together", render(together, worker, base, folder), pairs


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
    pictures = [Image.fromarray(p) for p in pictures]
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
    ap.add_argument("--base", type=pathlib.Path, help="folder of the base twin: its sheets instead")
    ap.add_argument("--worker", default=ROOT / "build/release/bin/kiln-worker", type=pathlib.Path)
    ap.add_argument("--out", default=HERE.parent / "sheets", type=pathlib.Path)
    a = ap.parse_args()
    a.out.mkdir(exist_ok=True)
    words = read_emoji()[0]
    with tempfile.TemporaryDirectory() as folder:
        here = pathlib.Path(folder)
        drawn = base_sheets(words, a.worker, a.model, a.base, here) if a.base else \
            ((m.name, render(m, a.worker, a.model, here), m.prompts) for m in sheets(words))
        for name, pictures, prompts in drawn:
            sheet(pictures, prompts).save(a.out / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    main()
