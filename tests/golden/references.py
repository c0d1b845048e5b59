#!/usr/bin/env python3
"""What Pillow makes of reference images the way diffusers asks it to, for tests/unit/test_reference.c.

    python3 -m venv venv && venv/bin/pip install numpy==2.4.6 pillow==12.3.0
    venv/bin/python references.py resize/*.png > resize/pillow.json

First the files given (resize.json has the same for some of them, from diffusers itself), then images of noise that the test
makes as well, of sizes that are awkward: extreme shapes, one side unchanged, enlarged. Pillow 13 resizes the columns of
tall images first when that is less work, which gives other bytes for one size below (400x3001); versions up to 12 and kiln
always begin with the rows, and so did the Pillow behind resize.json."""
import hashlib
import json
import math
import pathlib
import sys

import numpy as np
from PIL import Image

SIZES = [(1025, 1024), (1024, 1025), (3001, 400), (400, 3001), (1500, 1500), (2900, 363), (64, 512), (1031, 130), (2048, 2048), (1449, 725)]
RESIZES = [((100, 70), (41, 70)), ((100, 70), (100, 29)), ((31, 17), (64, 90)), ((5, 3), (1, 1)), ((300, 2), (7, 2)), ((1, 1), (9, 4))]


def noise(width, height):
    i = np.arange(width * height * 3, dtype=np.uint64)
    x = (i * 2654435761) & 0xFFFFFFFF
    x ^= x >> 15
    x = (x * 2246822519) & 0xFFFFFFFF
    return Image.fromarray((x >> 24).astype(np.uint8).reshape(height, width, 3), "RGB")


def digest(image):
    return hashlib.sha256(np.asarray(image).tobytes()).hexdigest()


def prepared(image):
    image = image.convert("RGB")
    row, (w, h) = {"size": image.size}, image.size
    if w * h > 1024 * 1024:
        scale = math.sqrt(1024 * 1024 / (w * h))
        image = image.resize((int(w * scale), int(h * scale)), Image.Resampling.LANCZOS)
    w, h = (v - v % 16 for v in image.size)
    left, top = (image.size[0] - w) // 2, (image.size[1] - h) // 2
    return row | {"scaled": image.size, "crop": [left, top, w, h], "sha256": digest(image.crop((left, top, left + w, top + h)))}


rows = {"files": [{"file": pathlib.Path(p).name} | prepared(Image.open(p)) for p in sys.argv[1:]],
        "noise": [prepared(noise(*size)) for size in SIZES],
        "resizes": [{"from": a, "to": b, "sha256": digest(noise(*a).resize(b, Image.Resampling.LANCZOS))} for a, b in RESIZES]}
print("{\n" + ",\n".join(f'"{k}": [\n' + ",\n".join(map(json.dumps, v)) + "\n]" for k, v in rows.items()) + "\n}")
