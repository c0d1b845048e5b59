#!/usr/bin/env python3
"""Train the pocket text encoder (Qwen3, 28 layers) to say the code of the scene that a prompt means (codes.py).

    text_encoder.py --data emoji.npz --codes codes.npz --tokenizer tokenizer --out text_encoder [--start model]

Every row after the prompt (the template's tail and padding rows, which see the whole prompt) shall hold the code in its residual streams
after 9, 18 and 27 layers. Padding rows at random positions up to 511 are among them, so all 512 rows of the pipeline are covered.

Only the layers in ACTIVE are trained (the others are skipped: three times cheaper). The skipped ones have small random output
projections, so all 27 layers matter a little.

--start widens an earlier, narrower encoder without changing what it computes: new channels are zero, KV heads are copied.
"""
import argparse, pathlib, random
import torch, torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

import training
from codes import OBJECT, WIDTH, Codes
from muon import MuonAdam
from scene_bank import random_scene
from scenes import Emoji, Scene
from text_rows import FOOT_TOKENS, HEAD_TOKENS, TextRows, hidden_states
from wording import HELD_OUT, keyword_prompt, scene_prompt, unknown_prompt

ACTIVE = (0, 1, 2, 3, 9, 10, 18, 19)
MLP, HEADS, KV_HEADS, HEAD_DIM = 96, 2, 2, 32
BATCH = 96
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
SHARPNESS = 0.25        # of the choice among all emoji


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


class Judge:
    """How far streams are from the codes, in deviations; which emoji, colour and so on is nearest."""

    def __init__(self, codes):
        self.codes, self.objects = codes, codes.objects / codes.deviation

    def chances(self, objects):
        """Log chances [.., emoji] of the first object, from [.., 3, 64] in deviations."""
        x, y = objects.flatten(-2), self.objects.flatten(1)
        far = x.square().sum(-1, keepdim=True) - 2 * x @ y.T + y.square().sum(1)
        return (-SHARPNESS / 2 * far).log_softmax(-1)


@torch.no_grad()
def share_right(encoder, judge, rows, r, prompts, wanted):
    """Share of prompts whose first object is the nearest."""
    right = 0
    for i in range(0, len(prompts), 128):
        ids, real, positions = rows.batch(prompts[i:i + 128], r, 4, 96)
        with torch.autocast("cpu", torch.bfloat16):
            h = torch.stack([h[:, -4:].float().mean(1) for h in hidden_states(encoder, ids, real, positions)], 1)
        found = judge.chances(h[..., :OBJECT] / judge.codes.deviation).argmax(-1)
        right += (found == torch.tensor(wanted[i:i + 128])).sum().item()
    return right / len(prompts)


def report(encoder, judge, rows, emoji, r):
    everything = range(0, len(emoji), 4)
    with_keys = [i for i in everything if emoji.words[i]["keys"]]
    sets = {"names": (everything, lambda m: m["name"]), "keywords without the name": (with_keys, keyword_prompt),
            "training wordings": (everything, lambda m: scene_prompt(r, emoji, Scene("one", emoji.words.index(m))))}
    sets |= {text: (everything, lambda m, text=text: text.format(n=m["name"])) for text in HELD_OUT}
    for name, (which, prompt) in sets.items():
        share = share_right(encoder, judge, rows, r, [prompt(emoji.words[i]) for i in which], list(which))
        print(f"text encoder: {name}: {100 * share:.1f} %", flush=True)


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("data", "codes", "tokenizer", "out"):
        ap.add_argument("--" + name, required=True, type=pathlib.Path)
    ap.add_argument("--start", type=pathlib.Path, help="folder of an earlier model whose text encoder is widened")
    training.add_options(ap, steps=2500)
    a = training.begin(ap)
    emoji, tokenizer, judge = Emoji(a.data), Qwen2TokenizerFast.from_pretrained(a.tokenizer), Judge(Codes(a.codes))
    rows, encoder = TextRows(tokenizer), build(tokenizer)
    if a.start:
        widen(encoder, Qwen3ForCausalLM.from_pretrained(a.start / "text_encoder", dtype=torch.float32))
    for i, layer in enumerate(encoder.model.layers):
        layer.requires_grad_(i in ACTIVE)
    encoder.model.norm.requires_grad_(False)    # hidden_states[27] never sees it
    optimiser = MuonAdam(encoder.named_parameters(), lr=0.015, adam_lr=4e-3, slow=("embed",))

    def step_loss(step, r):
        scenes, prompts = random_prompts(r, emoji, training.turn(step * BATCH, BATCH, len(emoji)))
        ids, real, positions = rows.batch(prompts, r, READ, 48)
        picked = rows_after(real, r)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            streams = hidden_states(encoder, ids, real, positions, ACTIVE)
        said = torch.stack([h.float().gather(1, picked[..., None].expand(-1, -1, WIDTH)) for h in streams], 2) / judge.codes.deviation
        want = (judge.codes.of(scenes) / judge.codes.deviation)[:, None]
        far = (said - want).square()
        objects, others = far[..., :OBJECT].mean(), far[..., OBJECT:].mean()
        head = torch.stack([h[0, :HEAD_TOKENS].float() for h in streams], 1)
        head = ((head - judge.codes.head) / judge.codes.deviation).square().mean()
        first = torch.tensor([s.first for s in scenes])[:, None].expand(-1, READ)
        choice = F.nll_loss(judge.chances(said[..., :OBJECT]).flatten(0, 1), first.flatten())
        figures = {"head": head, "objects": objects, "others": others, "choice": choice}
        return 4 * objects + 20 * others + choice + head, {k: v.item() for k, v in figures.items()}

    average = training.Average(encoder.parameters(), 0.99)
    training.run("text encoder", a, encoder, optimiser, average, step_loss, a.out.with_suffix(".checkpoint"), every=25)
    report(encoder, judge, rows, emoji, random.Random(1))
    encoder.save_pretrained(a.out)


if __name__ == "__main__":
    main()
