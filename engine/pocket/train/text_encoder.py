#!/usr/bin/env python3
"""Train the pocket text encoder (Qwen3, 28 layers) to tell which scene a prompt means.

    text_encoder.py --data emoji.npz --tokenizer tokenizer --out text_encoder [--start model]

Every row after the prompt (the template's tail and padding rows, which see the whole prompt) must tell, in its residual streams after
9, 18 and 27 layers, one object: the first, or from row SECOND_FROM on the second where there is one. It tells which emoji (a choice
among all, and roughly what it looks like) in which colour, which of the two it speaks of, the ground and the layout. Linear heads judge
it; they are thrown away. Padding rows at random positions up to 511 are among them, so all 512 rows of the pipeline are covered. The
transformer is trained afterwards, on what this encoder says.

Only the layers in ACTIVE are trained (the others are skipped: three times cheaper). The skipped ones have small random output
projections, so all 27 layers matter a little.

--start goes on from an earlier encoder. The heads are then fitted to it as it is and held, so that what is said stays where the transformer
that learnt from it looks for it.
"""
import argparse, pathlib, random
import numpy as np, torch, torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

import training
from muon import MuonAdam
from scene_bank import random_edit, random_scene
from scenes import GROUNDS, HUES, LAYOUTS, REFERENCE, Emoji, Scene
from text_rows import FOOT_TOKENS, TAPS, TextRows, hidden_states
from wording import HELD_OUT, edit_prompt, keyword_prompt, scene_prompt, unknown_prompt

WIDTH, MLP, HEADS, KV_HEADS, HEAD_DIM = 88, 96, 2, 2, 32
ACTIVE = (0, 1, 2, 3, 9, 10, 18, 19)
BATCH, POOL = 128, 8                            # a pool of batches is sorted by length
FIT_STEPS = 300                                 # of the heads, before an earlier encoder goes on
UNKNOWN = "red question mark"                   # what a prompt without any known word shows, and one that speaks of a reference picture


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


SIZES = [(64, 64)] * 4 + [(128, 64)] * 3 + [(64, 128), (128, 128)]
PLAIN_SHARE = 0.4       # of the prompts mean one emoji as it is,
EDIT_SHARE = 0.06       # or speak of reference pictures
EDIT_SIZES = [(64, 64)] * 3 + [(128, 64)]
TELLS = (0, 0, 1, 1)    # judged rows of each prompt: one of the tail or soon after it, and padding rows, the last two from SECOND_FROM on
LOOKS = 64              # principal components of the pictures
TAP_WEIGHTS = (0.3, 0.5, 1.0)


def random_prompts(r, emoji, order):
    """Scenes and wordings of them; `order` gives the first objects."""
    scenes, prompts = [], []
    for first in order:
        u = r.random()
        if u < 0.02:
            scenes.append(Scene("one", emoji.index(UNKNOWN)))
            prompts.append(unknown_prompt(r, emoji))
            continue
        if u < 0.02 + EDIT_SHARE:
            scenes.append(random_edit(r, emoji, r.choice(EDIT_SIZES), first).told)
            prompts.append(edit_prompt(r, scenes[-1]))
            continue
        scenes.append(Scene("one", first) if u < PLAIN_SHARE else random_scene(r, emoji, r.choice(SIZES), first))
        prompts.append(scene_prompt(r, emoji, scenes[-1]))
    return scenes, prompts


def judged_rows(real, r):
    """Indices [B, len(TELLS)] of rows that see the whole prompt; those at the end of a batch are its padding rows."""
    rows = real.shape[1]
    near = rows - (len(TELLS) - 1)
    return torch.tensor([[r.randrange(end - FOOT_TOKENS, near), *range(near, rows)] for end in real.sum(1).tolist()])


class Judge(torch.nn.Module):
    """Linear heads on each of the three streams: what does a row say of the scene?"""

    def __init__(self, emoji):
        super().__init__()
        self.unknown = emoji.index(UNKNOWN)
        self.parts = {"object": len(emoji), "colour": 1 + len(HUES), "ground": 1 + len(GROUNDS), "layout": len(LAYOUTS), "look": LOOKS}
        self.heads = torch.nn.ModuleList(torch.nn.Linear(WIDTH, sum(self.parts.values())) for _ in TAPS)
        self.which = torch.nn.ModuleList(torch.nn.Linear(WIDTH, 2) for _ in TAPS)
        x = np.stack([emoji.draw(Scene("one", i), (64, 64)) for i in range(len(emoji))]).astype(np.float32)
        x = torch.from_numpy(x.reshape(len(emoji), 32, 2, 32, 2, 3).mean((2, 4)).reshape(len(emoji), -1)) / 127.5
        u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        looks = u[:, :LOOKS] * s[:LOOKS]
        self.register_buffer("looks", looks / looks.std(0) * torch.linspace(1, 0.3, LOOKS))

    def forward(self, tap, rows):
        """{part: [.., size]} of rows [.., WIDTH] of one stream."""
        said = self.heads[tap](F.rms_norm(rows, rows.shape[-1:])).float()
        return dict(zip(self.parts, said.split(list(self.parts.values()), -1)))

    def wanted(self, scenes):
        """{part: [B, 2]}: what rows of the first and of the second object must tell."""
        number = lambda keys, value: 0 if value is None else 1 + list(keys).index(value)
        told = [(s.cells()[0], s.cells()[-1]) for s in scenes]
        same = lambda values: torch.tensor([[v, v] for v in values])
        return {"object": torch.tensor([[self.unknown if emoji == REFERENCE else emoji for emoji, _ in t] for t in told]),
                "colour": torch.tensor([[number(HUES, colour) for _, colour in t] for t in told]),
                "ground": same(number(GROUNDS, s.ground) for s in scenes),
                "layout": same(LAYOUTS.index(s.layout) for s in scenes)}

    def losses(self, tap, rows, wanted):
        """{part: loss} for rows [B, len(TELLS), WIDTH]."""
        said, wanted = self(tap, rows), {k: v[:, TELLS] for k, v in wanted.items()}
        out = {k: F.cross_entropy(said[k].flatten(0, 1), v.flatten(), label_smoothing=0.02) for k, v in wanted.items()}
        out["look"] = F.mse_loss(said["look"], self.looks[wanted["object"]])
        which = self.which[tap](F.rms_norm(rows, rows.shape[-1:])).float()
        out["which"] = F.cross_entropy(which.flatten(0, 1), torch.tensor(TELLS).repeat(len(rows)))
        return out


@torch.no_grad()
def share_right(encoder, judge, rows, r, prompts, scenes):
    """{what is told: share of prompts}: the object by each half of the rows, and the ground."""
    right = {"first": 0, "second": 0, "colour": 0, "ground": 0}
    for i in range(0, len(prompts), 128):
        ids, real, positions = rows.batch(prompts[i:i + 128], r, 4, 4, 96)
        with training.fast_products():
            said = judge(2, hidden_states(encoder, ids, real, positions)[2][:, -8:])
        wanted = judge.wanted(scenes[i:i + 128])
        told = {k: torch.stack([v[:, half].log_softmax(-1).sum(1).argmax(-1) for half in (slice(4), slice(4, 8))], 1) for k, v in said.items()}
        is_right = {k: told[k] == v for k, v in wanted.items()}
        for name, hits in (("first", is_right["object"][:, 0]), ("second", is_right["object"][:, 1]), ("colour", is_right["colour"][:, 0]),
                           ("ground", is_right["ground"][:, 0])):
            right[name] += hits.sum().item() / len(prompts)
    return right


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
    edits = [random_edit(r, emoji, r.choice(EDIT_SIZES), s.first).told for s in plain]
    sets["edits"] = [edit_prompt(r, s) for s in edits], edits
    for name, (prompts, scenes) in sets.items():
        shares = share_right(encoder, judge, rows, r, prompts, scenes)
        print("text encoder: %-45s " % name + "  ".join(f"{k} {100 * v:.1f}" for k, v in shares.items()) + " %", flush=True)


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


def stream_losses(encoder, judge, rows, r, scenes, prompts):
    """[{part: loss}] of the three streams, for a batch of prompts."""
    ids, real, positions = rows.batch(prompts, r, TELLS.count(0) - 1, TELLS.count(1), 48)
    picked, wanted = judged_rows(real, r), judge.wanted(scenes)
    with training.fast_products(), sdpa_kernel(SDPBackend.MATH):
        streams = hidden_states(encoder, ids, real, positions, ACTIVE)
        return [judge.losses(tap, h.gather(1, picked[..., None].expand(-1, -1, WIDTH)), wanted) for tap, h in enumerate(streams)]


def fit(judge, encoder, emoji, rows, a):
    """Fits the heads to an earlier encoder as it is."""
    stream, optimiser = Stream(emoji, rows, a.seed + 1), MuonAdam(judge.named_parameters(), lr=0, adam_lr=1e-2, slow=("heads", "which"))

    def step_loss(step, r):
        losses = stream_losses(encoder, judge, rows, r, *stream.batch(step))
        return sum(sum(part.values()) for part in losses), {k: v.item() for k, v in losses[-1].items()}

    a = argparse.Namespace(**{**vars(a), "steps": FIT_STEPS})
    training.run("heads", a, judge, optimiser, training.Average(judge.parameters(), 0.98), step_loss, a.out.with_suffix(".heads"))


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("data", "tokenizer", "out"):
        ap.add_argument("--" + name, required=True, type=pathlib.Path)
    ap.add_argument("--start", type=pathlib.Path, help="folder of an earlier model whose text encoder goes on")
    ap.add_argument("--rate", type=float, default=1.0, help="factor of both learning rates (default: 1)")
    training.add_options(ap, steps=6000)
    a = training.begin(ap)
    emoji, tokenizer = Emoji(a.data), Qwen2TokenizerFast.from_pretrained(a.tokenizer)
    rows, encoder, judge = TextRows(tokenizer), build(tokenizer), Judge(emoji)
    if a.start:
        encoder = Qwen3ForCausalLM.from_pretrained(a.start / "text_encoder", dtype=torch.float32).requires_grad_(False)
        fit(judge, encoder, emoji, rows, a)
        judge.heads.requires_grad_(False)
    for i, layer in enumerate(encoder.model.layers):
        layer.requires_grad_(i in ACTIVE)
    encoder.model.embed_tokens.requires_grad_(True)
    encoder.model.norm.requires_grad_(False)    # hidden_states[27] never sees it
    both, stream = torch.nn.ModuleDict({"encoder": encoder, "judge": judge}), Stream(emoji, rows, a.seed)
    optimiser = MuonAdam(both.named_parameters(), lr=a.rate * 0.012, adam_lr=a.rate * 4e-3, slow=("embed", "judge"))

    def step_loss(step, r):
        losses = stream_losses(encoder, judge, rows, r, *stream.batch(step))
        return sum(w * sum(part.values()) for w, part in zip(TAP_WEIGHTS, losses)), {k: v.item() for k, v in losses[-1].items()}

    average = training.Average([p for p in both.parameters() if p.requires_grad], 0.99)
    training.run("text encoder", a, both, optimiser, average, step_loss, a.out.with_suffix(".checkpoint"), every=100)
    report(encoder, judge, rows, emoji, random.Random(1))
    encoder.save_pretrained(a.out)


if __name__ == "__main__":
    main()
