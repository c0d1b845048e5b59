#!/usr/bin/env python3
"""The code between text and picture: text_encoder.py learns to say it, transformer.py learns to draw it, both at the same time.

    codes.py --data emoji.npz --out codes.npz [--start model]

A scene's code is what the text encoder's three streams (after 9, 18 and 27 layers) shall hold in every row after the prompt:

    channels 0..63    the first object: a vector of its own for each emoji and stream
    64..67  68..71    its colour, the ground's colour
    72..73            the layout
    74..87            the second object: a fixed projection of its own vectors

The template's first rows, which see no prompt, have a constant code (`head`).

The vectors are random; with --start they are what an earlier model's encoder says of the emoji's bare name, so that its transformer, too,
keeps what it knows.
"""
import argparse, pathlib, random
import numpy as np, torch
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

from scenes import GROUNDS, HUES, Emoji
from text_rows import HEAD_TOKENS, TAPS, TextRows, hidden_states

OBJECT, COLOUR, SECOND = 64, 4, 14
WIDTH = OBJECT + 2 * COLOUR + 2 + SECOND
LAYOUT = {"one": (0, 0), "two": (1, 0), "left": (1, 0), "above": (0, 1), "three": (1, 1), "four": (-1, 1)}
LOUD = 2.0          # of colours and layout, beside objects of about 1


@torch.no_grad()
def said_of_names(model, emoji):
    """What an earlier model's encoder holds: [emoji, 3, 64] in the padding rows after each bare name, [HEAD_TOKENS, 3, 64] in the
    template's first rows, which see no prompt."""
    encoder = Qwen3ForCausalLM.from_pretrained(model / "text_encoder", dtype=torch.float32).eval()
    rows, out = TextRows(Qwen2TokenizerFast.from_pretrained(model / "tokenizer")), []
    for i in range(0, len(emoji), 64):
        ids, real, positions = rows.batch([m["name"] for m in emoji.words[i:i + 64]], random.Random(0), 8, 64)
        streams = hidden_states(encoder, ids, real, positions)
        out.append(torch.stack([h[:, -8:].mean(1) for h in streams], 1))
        head = torch.stack(streams, 2)[0, :HEAD_TOKENS]
    return torch.cat(out), head


class Codes:
    """Codes of scenes, [3, WIDTH] each; `deviation` [3, 1] is the scale of a stream's channels over all emoji."""

    def __init__(self, path):
        data = np.load(path)
        self.objects = torch.from_numpy(data["objects"])
        self.head = torch.nn.functional.pad(torch.from_numpy(data["head"]), (0, WIDTH - OBJECT))
        self.deviation = self.objects.std(0).mean(-1, keepdim=True)
        g = torch.Generator().manual_seed(7)
        plain = (self.objects - self.objects.mean(0)) / self.deviation
        second = plain.flatten(1) @ torch.randn(len(TAPS) * OBJECT, SECOND, generator=g)
        self.second = torch.cat([second / second.std(0), torch.zeros(1, SECOND)])
        direction = lambda n: torch.nn.functional.normalize(torch.randn(n, COLOUR, generator=g), dim=1)
        spread = lambda n: torch.cat([torch.zeros(1, COLOUR), LOUD * direction(n)])
        self.colours, self.grounds = spread(len(HUES)), spread(len(GROUNDS))

    def of(self, scenes):
        """[B, 3, WIDTH]"""
        number = lambda keys, value: 0 if value is None else 1 + list(keys).index(value)
        first = torch.tensor([s.first for s in scenes])
        extra = torch.cat([
            self.colours[[number(HUES, s.first_colour) for s in scenes]], self.grounds[[number(GROUNDS, s.ground) for s in scenes]],
            LOUD * torch.tensor([LAYOUT[s.layout] for s in scenes], dtype=torch.float32),
            self.second[[-1 if s.layout == "one" else s.cells()[-1][0] for s in scenes]]], 1)
        return torch.cat([self.objects[first], extra[:, None] * self.deviation], 2)


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--data", required=True, type=pathlib.Path)
    ap.add_argument("--out", required=True, type=pathlib.Path)
    ap.add_argument("--start", type=pathlib.Path, help="folder of an earlier model")
    a = ap.parse_args()
    torch.manual_seed(0)
    emoji = Emoji(a.data)
    drawn_by_lot = lambda n: torch.randn(n, len(TAPS), OBJECT)
    objects, head = said_of_names(a.start, emoji) if a.start else (drawn_by_lot(len(emoji)), drawn_by_lot(HEAD_TOKENS))
    np.savez_compressed(a.out, objects=objects.numpy(), head=head.numpy())


if __name__ == "__main__":
    main()
