#!/usr/bin/env python3
"""Measure the pocket model through kiln's own engine: which of all emoji is nearest to what was drawn?

    measure.py [--model DIR] [--worker build/release/bin/kiln-worker] [--every N] [--only SET ...] [--size 128 64] [--edits BASE]

A picture (or a cell of it) and every emoji are averaged to 16x16 pixels; the nearest in plain L2 must be the one the prompt asked for. For
colours, all emoji in all colours are compared, and both must be right. Needs numpy, Pillow and a built kiln-worker; the small pictures
of all emoji are ../pictures.png, their names ../words.json (data.py wrote both). --edits asks the base twin for edits of the model's own pictures
of names.
"""
import argparse, json, pathlib, random, subprocess, sys, tempfile
import numpy as np
from PIL import Image

from scenes import CELLS, GROUNDS, HUES, may_be_coloured, recolour
from wording import HELD_OUT, article, keyword_prompt, plural

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SIDE = 16


def read_emoji():
    """(words of each emoji, RGBA pictures [n, 16, 16, 4])."""
    words = json.loads((HERE.parent / "words.json").read_text("utf-8"))
    sheet = np.asarray(Image.open(HERE.parent / "pictures.png"))
    tiles = sheet.reshape(sheet.shape[0] // SIDE, SIDE, -1, SIDE, 4).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 4)
    return words, tiles[:len(words)]


def on(ground, rgba):
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + np.array(ground, np.float32) * (1 - alpha)


def averaged(picture):
    k = picture.shape[0] // SIDE
    return picture.reshape(SIDE, k, SIDE, k, 3).mean((1, 3))


class References:
    """Every emoji, as it is or in every colour, on one ground."""

    def __init__(self, tiles, words, ground=(255, 255, 255), colours=False):
        self.keys = [(i, None) for i in range(len(tiles))]
        pictures = [on(ground, t) for t in tiles]
        if colours:
            for i, t in enumerate(tiles):
                for c in HUES if may_be_coloured(words[i]) else []:
                    self.keys.append((i, c))
                    pictures.append(on(ground, recolour(t, c)))
        self.flat = np.stack(pictures).reshape(len(pictures), -1).astype(np.float32)
        self.square = (self.flat ** 2).sum(1)

    def nearest(self, cell):
        x = averaged(cell.astype(np.float32)).reshape(-1)
        return self.keys[int((self.square - 2 * self.flat @ x).argmin())]


class Measure:
    """A named set: prompts, with reference pictures or not, and what each cell of the picture must be nearest to."""

    def __init__(self, name, size, layout="one", colours=False, ground=None, prompts=()):
        self.name, self.size, self.layout, self.colours, self.ground = name, size, layout, colours, ground
        self.prompts, self.wanted, self.images = [], [], []
        for prompt in prompts:
            self.add(prompt)

    def add(self, prompt, *cells, images=()):
        self.prompts.append(prompt)
        self.images.append(images)
        self.wanted.append([c if isinstance(c, tuple) else (c, None) for c in cells])

    def render(self, worker, model, folder, *options):
        """The pictures, which stay in the folder's `out`; options: of kiln-worker render."""
        out = folder / "out"
        out.mkdir(exist_ok=True)
        begin = [worker, "render", "--model", model, "--size", "%dx%d" % self.size, *options]
        files = [out / f"{i + 1:06d}.png" for i in range(len(self.prompts))]
        if any(self.images):
            for i, (prompt, images) in enumerate(zip(self.prompts, self.images)):
                references = [word for image in images for word in ("--image", image)]
                subprocess.run([*begin, "--prompt", prompt, *references, "--seed", str(1000 + i), "--out", files[i]], check=True, stdout=subprocess.DEVNULL)
        else:
            (folder / "prompts.txt").write_text("".join(p + "\n" for p in self.prompts), "utf-8")
            subprocess.run([*begin, "--prompt-file", folder / "prompts.txt", "--seed", "1000", "--batch", "8", "--out", out], check=True,
                           stdout=subprocess.DEVNULL)
        return [np.asarray(Image.open(f).convert("RGB")) for f in files]

    def references(self, tiles, words):
        return References(tiles, words, GROUNDS[self.ground] if self.ground else (255, 255, 255), self.colours)

    def share_right(self, pictures, references):
        side = 128 if self.layout == "one" and self.size == (128, 128) else 64
        right, missed = 0, []
        for prompt, wanted, picture in zip(self.prompts, self.wanted, pictures):
            corners = CELLS[self.size][self.layout]
            found = [references.nearest(picture[y:y + side, x:x + side]) for x, y in corners]
            right += found == wanted
            if found != wanted:
                missed.append((prompt, found))
        return right / len(self.prompts), missed


def measures(words, side, every):
    """All sets at 64x64 or 128x128 (pairs also at 128x64, beside 64x64)."""
    r, square, some = random.Random(5), (side, side), list(range(0, len(words), every))
    names = Measure("names", square)
    keys, bare_keys = Measure("keywords as the CLDR lists them", square), Measure("keywords without the name", square)
    coloured = Measure("colour and name", square, colours=True)
    grounds = [Measure(f"on a {g} background", square, ground=g) for g in list(GROUNDS)[::3]]
    for i in some:
        m = words[i]
        names.add(m["name"], i)
        if m["keys"]:
            keys.add(", ".join(sorted([m["name"], *m["keys"]])), i)
            bare_keys.add(keyword_prompt(m), i)
        if may_be_coloured(m):
            colour = r.choice(list(HUES))
            coloured.add(f"a {colour} {m['name']}", (i, colour))
        g = r.choice(grounds)
        g.add(f"{m['name']} on a {g.ground} background", i)
    held_out = []
    for text in HELD_OUT:
        held_out.append(Measure("held out: " + text, square))
        for i in some:
            held_out[-1].add(text.format(n=words[i]["name"]), i)
    pair_size = (128, 64) if side == 64 else square
    left = Measure("A left of B, %dx%d" % pair_size, pair_size, "left")
    for i in some:
        j = r.randrange(len(words))
        a, b = words[i]["name"], words[j]["name"]
        left.add(f"{article(a)}{a} left of {article(b)}{b}", i, j)
    out = [names, *held_out, keys, bare_keys, coloured, *grounds, left]
    if side == 128:
        above, three = Measure("A above B", square, "above"), Measure("three of A", square, "three")
        for i in some:
            j = r.randrange(len(words))
            above.add(f"{words[i]['name']} above {words[j]['name']}", i, j)
            three.add(f"three {plural(words[i]['name'])}", i, i, i)
        out += [above, three]
    return [m for m in out if m.prompts]


def edit_measures(words, every, worker, model, folder):
    """Another colour, another ground, two pictures beside each other; the reference pictures are the model's own, of names."""
    r, some = random.Random(6), list(range(0, len(words), every))
    names = Measure("names", (64, 64))
    for i in some:
        names.add(words[i]["name"], i)
    names.render(worker, model, folder)
    picture = {i: folder / "out" / f"{k + 1:06d}.png" for k, i in enumerate(some)}
    colour, ground, two = (Measure("edit: " + text, size, layout, colours, on) for text, size, layout, colours, on in
                           (("another colour", (64, 64), "one", True, None), ("on a blue background", (64, 64), "one", False, "blue"),
                            ("two beside each other", (128, 64), "left", False, None)))
    for i in some:
        c, j = r.choice(list(HUES)), r.choice(some)
        if may_be_coloured(words[i]):
            colour.add(f"make it {c}", (i, c), images=[picture[i]])
        ground.add("put it on a blue background", i, images=[picture[i]])
        two.add("put them beside each other", i, j, images=[picture[i], picture[j]])
    return [colour, ground, two]


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--model", default=HERE.parent / "model", type=pathlib.Path)
    ap.add_argument("--worker", default=ROOT / "build/release/bin/kiln-worker", type=pathlib.Path)
    ap.add_argument("--every", type=int, default=1, help="use every Nth emoji (default: all)")
    ap.add_argument("--only", nargs="*", default=[""], help="sets whose name begins so")
    ap.add_argument("--size", type=int, nargs="*", default=[128, 64], choices=(64, 128))
    ap.add_argument("--edits", metavar="BASE", type=pathlib.Path, help="edits by this base twin instead")
    ap.add_argument("--misses", action="store_true", help="print what was drawn wrong")
    a = ap.parse_args()
    words, tiles = read_emoji()
    with tempfile.TemporaryDirectory() as folder:
        here, drawn_by = pathlib.Path(folder), a.edits or a.model
        sets = edit_measures(words, a.every, a.worker, a.model, here) if a.edits else [m for side in a.size for m in measures(words, side, a.every)]
        for k, m in enumerate(m for m in sets if m.name.startswith(tuple(a.only))):
            (here / str(k)).mkdir()
            pictures = m.render(a.worker, drawn_by, here / str(k))
            share, missed = m.share_right(pictures, m.references(tiles, words))
            print("%dx%d  %-44s %5.1f %% of %d" % (*m.size, m.name, 100 * share, len(pictures)), flush=True)
            for prompt, found in missed if a.misses else []:
                print("    " + prompt + " -> " + ", ".join((f"{c} " if c else "") + words[i]["name"] for i, c in found))


if __name__ == "__main__":
    sys.exit(main())
