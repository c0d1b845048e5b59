#!/usr/bin/env python3
"""Small pictures with each EXIF orientation in each format, and how Pillow sets them upright, for tests/unit/test_image_file.c.

    python3 -m venv venv && venv/bin/pip install numpy==2.4.6 pillow==12.3.0
    venv/bin/python orientations.py > ../unit/data/orientations.json

Odd orientations are written little-endian, even ones big-endian; behind other tags, because readers that take the first
entry exist; PNG once with the chunk behind the pixels. The pixels are those of ImageOps.exif_transpose."""
import base64
import io
import json
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps

WIDTH, HEIGHT = 7, 4


def tiff(orientation):
    e = "<" if orientation % 2 else ">"
    entries = [(0x0100, 4, WIDTH), (0x0112, 3, orientation), (0x0128, 3, 2)]
    head = (b"II" if e == "<" else b"MM") + struct.pack(e + "HI", 42, 8) + struct.pack(e + "H", len(entries))
    for tag, kind, value in entries:
        head += struct.pack(e + "HHI", tag, kind, 1) + (struct.pack(e + "I", value) if kind == 4 else struct.pack(e + "HH", value, 0))
    return head + struct.pack(e + "I", 0)


def png_with_late_chunk(image, exif):
    out = io.BytesIO()
    image.save(out, "PNG")
    data = out.getvalue()
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    return data[:-12] + chunk + data[-12:]


def encoded(image, kind, orientation):
    exif, out = tiff(orientation), io.BytesIO()
    if kind == "png" and orientation == 6:
        return png_with_late_chunk(image, exif)
    image.save(out, {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[kind], exif=b"Exif\0\0" + exif,
               **{"png": {}, "jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}[kind])
    return out.getvalue()


rng = np.random.default_rng(3)
smooth = np.kron(rng.integers(40, 215, (1, 2, 3)), np.ones((HEIGHT, WIDTH, 1)))[:, ::2][:, :WIDTH]
picture = Image.fromarray((smooth + np.arange(HEIGHT).reshape(-1, 1, 1) * 9 + np.arange(WIDTH).reshape(1, -1, 1) * 4).clip(0, 255).astype(np.uint8), "RGB")
rows = []
for kind in ("png", "jpg", "webp"):
    for orientation in range(1, 9):
        data = encoded(picture, kind, orientation)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        rows.append({"format": kind, "orientation": orientation, "size": upright.size, "file": base64.b64encode(data).decode(),
                     "rgb": base64.b64encode(upright.tobytes()).decode()})
print("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]")
