#!/usr/bin/env python3
"""Train the pocket text encoder (Qwen3, 28 layers) to tell which scene a prompt means.

    text_encoder.py --data emoji.npz --tokenizer tokenizer --out text_encoder [--start model]

Every row after the prompt (the template's tail and padding rows, which see the whole prompt) must tell, in its residual streams after
9, 18 and 27 layers: both objects (a choice among all emoji, and roughly what they look like), the first one's colour, the ground and
the layout. Linear heads judge it; they are thrown away. Padding rows at random positions up to 511 are among them, so all 512 rows of
the pipeline are covered. The transformer is trained afterwards, on what this encoder says.

Only the layers in ACTIVE are trained (the others are skipped: three times cheaper). The skipped ones have small random output
projections, so all 27 layers matter a little.

--start widens an earlier, narrower encoder without changing what it computes: new channels are zero, KV heads are copied.
"""
import argparse, pathlib, random
import numpy as np, torch, torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

import training
from muon import MuonAdam
from scene_bank import random_scene
from scenes import GROUNDS, HUES, LAYOUTS, Emoji, Scene
from text_rows import FOOT_TOKENS, TAPS, TextRows, hidden_states
from wording import HELD_OUT, keyword_prompt, scene_prompt, unknown_prompt

WIDTH, MLP, HEADS, KV_HEADS, HEAD_DIM = 88, 96, 2, 2, 32
ACTIVE = (0, 1, 2, 3, 9, 10, 18, 19)
BATCH, POOL = 128, 8                            # a pool of batches is sorted by length
UNKNOWN = "red question mark"                   # what a prompt without any known word shows


def build(tokenizer):
    encoder = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=28, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, tie_word_embeddings=True, rms_norm_eps=1e-6, max_position_embeddings=40960,
        rope_theta=1e6, attention_bias=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None))
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            if p.ndim == 2:
                idle = name.startswith("model.layers.") and int(name.split(".")[2]) not in ACTIVE
                out = "o_proj" in name or "down_proj" in name
                torch.nn.init.normal_(p, std=1.0 if "embed" in name else p.shape[1] ** -0.5 * ((0.1 if idle else 0.4) if out else 1))
    return encoder


@torch.no_grad()
def widen(encoder, old):
    """Writes the old encoder into the wider one: the same function on the old channels, zero on the new ones."""
    narrow, state = old.config.hidden_size, dict(old.named_parameters())
    for name, p in encoder.named_parameters():
        o = state[name].float()
        if "k_proj" in name or "v_proj" in name:
            o = o.repeat(p.shape[0] // o.shape[0], 1)
        if "layernorm" in name:                 # the mean square is over more channels now
            p.fill_((narrow / WIDTH) ** 0.5)
            p[:narrow] = o * (narrow / WIDTH) ** 0.5
        elif p.ndim == 2 and ("o_proj" in name or "down_proj" in name):
            p.zero_()
            p[:o.shape[0], :o.shape[1]] = o
        elif p.ndim == 2:
            if "embed" in name:
                p.zero_()
            else:
                p.mul_(0.3)
            p[:o.shape[0], :o.shape[1]] = o
        elif p.shape == o.shape:
            p.copy_(o)


SIZES = [(64, 64)] * 5 + [(128, 64), (128, 64), (64, 128)]
READ = 3                # rows of each prompt that are judged in a step, drawn by lot
LOOKS = 64              # principal components of the pictures
TAP_WEIGHTS = (0.3, 0.5, 1.0)


def random_prompts(r, emoji, order):
    """Scenes and wordings of them: about half of the scenes are one emoji as it is; `order` gives the first objects."""
    scenes, prompts = [], []
    for first in order:
        u = r.random()
        if u < 0.02:
            scenes.append(Scene("one", emoji.index(UNKNOWN)))
            prompts.append(unknown_prompt(r, emoji))
            continue
        scenes.append(Scene("one", first) if u < 0.5 else random_scene(r, emoji, r.choice(SIZES), first))
        prompts.append(scene_prompt(r, emoji, scenes[-1]))
    return scenes, prompts


def rows_after(real, r):
    """Indices [B, READ] of rows that see the whole prompt."""
    ends = real.sum(1).tolist()
    return torch.tensor([r.sample(range(end - FOOT_TOKENS, real.shape[1]), READ) for end in ends])


class Judge(torch.nn.Module):
    """Linear heads on each of the three streams: what does a row say of the scene?"""

    def __init__(self, emoji):
        super().__init__()
        self.parts = {"first": len(emoji), "second": len(emoji) + 1, "colour": 1 + len(HUES), "ground": 1 + len(GROUNDS),
                      "layout": len(LAYOUTS), "look": LOOKS, "second_look": LOOKS}
        self.heads = torch.nn.ModuleList(torch.nn.Linear(WIDTH, sum(self.parts.values())) for _ in TAPS)
        x = np.stack([emoji.draw(Scene("one", i), (64, 64)) for i in range(len(emoji))]).astype(np.float32)
        x = torch.from_numpy(x.reshape(len(emoji), 32, 2, 32, 2, 3).mean((2, 4)).reshape(len(emoji), -1)) / 127.5
        u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        looks = u[:, :LOOKS] * s[:LOOKS]
        looks = looks / looks.std(0) * torch.linspace(1, 0.3, LOOKS)
        self.register_buffer("looks", torch.cat([looks, torch.zeros(1, LOOKS)]))

    def forward(self, tap, rows):
        """{part: [.., size]} of rows [.., WIDTH] of one stream."""
        said = self.heads[tap](F.rms_norm(rows, rows.shape[-1:])).float()
        return dict(zip(self.parts, said.split(list(self.parts.values()), -1)))

    def wanted(self, scenes):
        """{part: [B]}; there is no second object where all cells show the first."""
        number = lambda keys, value: 0 if value is None else 1 + list(keys).index(value)
        none = self.parts["first"]
        return {"first": torch.tensor([s.first for s in scenes]),
                "second": torch.tensor([none if s.second is None else s.second for s in scenes]),
                "colour": torch.tensor([number(HUES, s.first_colour) for s in scenes]),
                "ground": torch.tensor([number(GROUNDS, s.ground) for s in scenes]),
                "layout": torch.tensor([LAYOUTS.index(s.layout) for s in scenes])}

    def losses(self, tap, rows, wanted):
        """{part: loss} for rows [B, READ, WIDTH]."""
        said = self(tap, rows)
        repeat = lambda x: x[:, None].expand(-1, rows.shape[1]).flatten()
        out = {k: F.cross_entropy(said[k].flatten(0, 1), repeat(v), label_smoothing=0.02) for k, v in wanted.items()}
        out["look"] = (F.mse_loss(said["look"], self.looks[wanted["first"]][:, None].expand_as(said["look"]))
                       + 0.5 * F.mse_loss(said["second_look"], self.looks[wanted["second"]][:, None].expand_as(said["look"])))
        return out


@torch.no_grad()
def share_right(encoder, judge, rows, r, prompts, scenes):
    """Shares of prompts whose first object, second object, colour and ground are told right."""
    right = torch.zeros(4)
    for i in range(0, len(prompts), 128):
        ids, real, positions = rows.batch(prompts[i:i + 128], r, 4, 96)
        with torch.autocast("cpu", torch.bfloat16):
            said = judge(2, hidden_states(encoder, ids, real, positions)[2][:, -4:])
        wanted = judge.wanted(scenes[i:i + 128])
        right += torch.stack([(said[k].log_softmax(-1).sum(1).argmax(-1) == wanted[k]).sum() for k in ("first", "second", "colour", "ground")])
    return (right / len(prompts)).tolist()


def report(encoder, judge, rows, emoji, r, every=4):
    plain = [Scene("one", i) for i in range(0, len(emoji), every)]
    sets = {"names": ([emoji.words[s.first]["name"] for s in plain], plain)}
    with_keys = [s for s in plain if emoji.words[s.first]["keys"]]
    sets["keywords without the name"] = [keyword_prompt(emoji.words[s.first]) for s in with_keys], with_keys
    for text in HELD_OUT:
        sets[text] = [text.format(n=emoji.words[s.first]["name"]) for s in plain], plain
    for size in ((64, 64), (128, 64)):
        scenes = [random_scene(r, emoji, size, s.first) for s in plain]
        sets["training wordings %dx%d" % size] = [scene_prompt(r, emoji, s) for s in scenes], scenes
    for name, (prompts, scenes) in sets.items():
        shares = share_right(encoder, judge, rows, r, prompts, scenes)
        print("text encoder: %-45s first %.1f  second %.1f  colour %.1f  ground %.1f %%" % (name, *(100 * s for s in shares)), flush=True)


class Stream:
    """Endless batches of prompts; those of a pool are of like length, so that few rows are padding."""

    def __init__(self, emoji, rows, seed):
        self.emoji, self.rows, self.seed, self.number, self.pool = emoji, rows, seed, None, None

    def batch(self, step):
        """(scenes, prompts) of a step: a function of the seed and the step."""
        number, place = divmod(step, POOL)
        if number != self.number:
            r, count = random.Random(self.seed * 1000003 + number), POOL * BATCH
            scenes, prompts = random_prompts(r, self.emoji, training.turn(number * count, count, len(self.emoji)))
            order = sorted(range(count), key=lambda i: len(prompts[i]))
            batches = [order[i:i + BATCH] for i in range(0, count, BATCH)]
            r.shuffle(batches)
            self.number, self.pool = number, [([scenes[i] for i in b], [prompts[i] for i in b]) for b in batches]
        return self.pool[place]


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("data", "tokenizer", "out"):
        ap.add_argument("--" + name, required=True, type=pathlib.Path)
    ap.add_argument("--start", type=pathlib.Path, help="folder of an earlier model whose text encoder is widened")
    training.add_options(ap, steps=6000)
    a = training.begin(ap)
    emoji, tokenizer = Emoji(a.data), Qwen2TokenizerFast.from_pretrained(a.tokenizer)
    rows, encoder, judge = TextRows(tokenizer), build(tokenizer), Judge(emoji)
    if a.start:
        widen(encoder, Qwen3ForCausalLM.from_pretrained(a.start / "text_encoder", dtype=torch.float32))
    for i, layer in enumerate(encoder.model.layers):
        layer.requires_grad_(i in ACTIVE)
    encoder.model.norm.requires_grad_(False)    # hidden_states[27] never sees it
    both, stream = torch.nn.ModuleDict({"encoder": encoder, "judge": judge}), Stream(emoji, rows, a.seed)
    optimiser = MuonAdam(both.named_parameters(), lr=0.012, adam_lr=4e-3, slow=("embed", "judge"))

    def step_loss(step, r):
        scenes, prompts = stream.batch(step)
        ids, real, positions = rows.batch(prompts, r, READ, 48)
        picked, wanted = rows_after(real, r), judge.wanted(scenes)
        total, figures = 0, {}
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            streams = hidden_states(encoder, ids, real, positions, ACTIVE)
            for tap, (weight, h) in enumerate(zip(TAP_WEIGHTS, streams)):
                figures = judge.losses(tap, h.gather(1, picked[..., None].expand(-1, -1, WIDTH)), wanted)
                total = total + weight * sum(figures.values())
        return total, {k: v.item() for k, v in figures.items()}

    average = training.Average([p for p in both.parameters() if p.requires_grad], 0.99)
    training.run("text encoder", a, both, optimiser, average, step_loss, a.out.with_suffix(".checkpoint"), every=100)
    report(encoder, judge, rows, emoji, random.Random(1))
    encoder.save_pretrained(a.out)


if __name__ == "__main__":
    main()
