"""Scenes: what a picture shows, and how it is drawn from the emoji.

A scene is one to four objects in fixed cells on a plain ground. An object may be recoloured. Objects are drawn in two sizes only, 128 and
64 pixels, always on the grid of 16-pixel image tokens: a 64-pixel object is the same 4x4 tokens in every picture it is part of.

    size       layouts
    64x64      one
    128x64     two, left (A left of B)
    64x128     above (A above B)
    128x128    one (at 128 pixels), two, three, four, left, above (at 64 pixels)

An edit is a scene whose objects are what its reference pictures show.
"""
import dataclasses, json
import numpy as np

from wording import COLOURS, HELD_OUT_WORDS

LAYOUTS = ["one", "two", "three", "four", "left", "above"]
COUNT_OF = {"one": 1, "two": 2, "three": 3, "four": 4, "left": 2, "above": 2}
CELLS = {  # (width, height): {layout: top left corners of the cells, x and y}
    (64, 64): {"one": [(0, 0)]},
    (128, 64): {"two": [(0, 0), (64, 0)], "left": [(0, 0), (64, 0)]},
    (64, 128): {"above": [(0, 0), (0, 64)]},
    (128, 128): {"one": [(0, 0)], "two": [(0, 32), (64, 32)], "three": [(32, 0), (0, 64), (64, 64)],
                 "four": [(0, 0), (64, 0), (0, 64), (64, 64)], "left": [(0, 32), (64, 32)], "above": [(32, 0), (32, 64)]},
}
HUES = {"red": 0.0, "orange": 0.075, "yellow": 0.145, "green": 0.33, "blue": 0.60, "purple": 0.77, "pink": 0.91, "brown": 0.06,
        "black": None, "white": None}
GROUNDS = {"red": (229, 57, 53), "orange": (251, 140, 0), "yellow": (253, 216, 53), "green": (67, 160, 71), "blue": (30, 136, 229),
           "purple": (142, 36, 170), "pink": (244, 143, 177), "brown": (121, 85, 72), "black": (20, 20, 20), "grey": (158, 158, 158)}


REFERENCE = -1              # in the place of an emoji: what a reference picture shows


def may_be_coloured(words):
    """Emoji whose name says a colour keep it."""
    return not any(w in COLOURS for w in words["name"].lower().replace("-", " ").split())


@dataclasses.dataclass(frozen=True)
class Scene:
    layout: str                 # one of LAYOUTS
    first: int                  # index of the emoji, or REFERENCE; in "two" to "four" it is in every cell
    first_colour: str = None    # a key of HUES, or None: as it is
    second: int = None          # of "left" (the right one) and "above" (the lower one); REFERENCE: the second reference picture's
    ground: str = None          # a key of GROUNDS, or None: white

    def is_plain(self):
        return self == Scene("one", self.first)

    def cells(self):
        """(emoji, colour) of each cell."""
        a = self.first, self.first_colour
        return [a] * COUNT_OF[self.layout] if self.second is None else [a, (self.second, None)]


def to_hsv(rgb):
    high, low = rgb.max(-1), rgb.min(-1)
    span = high - low + 1e-6
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    hue = np.where(high == r, (g - b) / span % 6, np.where(high == g, (b - r) / span + 2, (r - g) / span + 4)) / 6
    return hue, span / (high + 1e-6), high


def from_hsv(hue, saturation, value):
    k = (np.array([5, 3, 1]) + hue[..., None] * 6) % 6
    return (value * 1.0)[..., None] * (1 - saturation[..., None] * np.clip(np.minimum(k, 4 - k), 0, 1))


def recolour(rgba, colour):
    """The object in another colour: its own main hue turned to the wanted one, its grey parts tinted."""
    rgb, alpha = rgba[..., :3].astype(np.float32) / 255, rgba[..., 3:]
    hue, saturation, value = to_hsv(rgb)
    if colour in ("black", "white"):
        grey = rgb @ np.array([0.3, 0.59, 0.11], np.float32)
        grey = 0.06 + 0.5 * grey ** 1.5 if colour == "black" else 0.62 + 0.38 * grey
        out = np.repeat(grey[..., None], 3, -1)
    else:
        weight = saturation * value * (alpha[..., 0] > 128)
        turn = np.exp(2j * np.pi * hue)
        main = np.angle((turn * weight).sum() + 1e-9) / (2 * np.pi)
        away = (hue - main + 0.5) % 1 - 0.5                       # hues near the main one stay near the wanted one
        grey = saturation < 0.25
        pale = grey & (value > 0.92) & (weight.sum() > 0.2 * (alpha[..., 0] > 128).sum())
        new_hue = (HUES[colour] + np.where(grey, 0, 0.35 * away)) % 1
        new_saturation = np.where(pale, saturation, np.maximum(saturation, 0.6))
        new_value = np.where(grey & ~pale, 0.25 + 0.7 * value, value)
        if colour == "brown":
            new_value, new_saturation = new_value * 0.62, np.where(pale, saturation, np.maximum(new_saturation, 0.65))
        if colour == "pink":
            new_saturation = np.where(pale, saturation, np.clip(new_saturation * 0.7, 0.35, 0.6))
        out = from_hsv(new_hue, new_saturation, new_value)
    return np.concatenate([(np.clip(out, 0, 1) * 255).round().astype(np.uint8), alpha], -1)


def halve(rgba):
    """Half size, by averaging premultiplied colours."""
    x = rgba.astype(np.float32)
    x[..., :3] *= x[..., 3:] / 255
    x = x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2, 4).mean((1, 3))
    x[..., :3] = np.where(x[..., 3:] > 0, x[..., :3] * 255 / np.maximum(x[..., 3:], 1e-3), 0)
    return np.clip(x.round(), 0, 255).astype(np.uint8)


class Emoji:
    """The data of data.py, and drawing."""

    def __init__(self, path):
        data = np.load(path)
        words = json.loads(str(data["words"]))
        self.rgba, self.words, self.filler = data["rgba"], words["emoji"], words["filler"]
        self.vocabulary = sorted({w for m in self.words for t in [m["name"], *m["keys"]] for w in t.lower().split()
                                  if w.isalpha() and len(w) > 2} - HELD_OUT_WORDS - set(COLOURS))
        seen = set()
        for m in self.words:
            keys = tuple(sorted(m["keys"]))
            m["keys_of_another"] = keys in seen
            seen.add(keys)

    def __len__(self):
        return len(self.words)

    def index(self, name):
        return next(i for i, m in enumerate(self.words) if m["name"] == name)

    def sprite(self, emoji, colour, side):
        x = self.rgba[emoji] if colour is None else recolour(self.rgba[emoji], colour)
        return halve(x) if side == 64 else x

    def draw(self, scene, size):
        """uint8 [height, width, 3]."""
        width, height = size
        page = np.empty((height, width, 3), np.float32)
        page[:] = GROUNDS[scene.ground] if scene.ground else (255, 255, 255)
        corners = CELLS[size][scene.layout]
        side = 128 if size == (128, 128) and scene.layout == "one" else 64
        for (x, y), (emoji, colour) in zip(corners, scene.cells()):
            s = self.sprite(emoji, colour, side).astype(np.float32)
            alpha = s[..., 3:] / 255
            part = page[y:y + side, x:x + side]
            part[:] = part * (1 - alpha) + s[..., :3] * alpha
        return page.round().astype(np.uint8)
