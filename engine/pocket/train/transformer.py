#!/usr/bin/env python3
"""Train the pocket transformer (Flux2Transformer2DModel) to draw scenes from their codes (codes.py), or from their wordings.

    transformer.py --data emoji.npz --codes codes.npz --vae vae --out transformer [--start FOLDER]
    transformer.py .. --text-encoder text_encoder --tokenizer tokenizer
    transformer.py .. --start FOLDER --plain --rate 0.2

Text rows: the template's first three, and two copies of the scene's code, each with noise, that stand for all others; or, with
--text-encoder, what the trained encoder says of random wordings, rows exactly as those of the pipeline (text_rows.py), of which only a few
padding rows are computed. A row stands for many by adding log(how many) to its attention logit.

Time: mostly klein's own four sigmas. The target is the velocity (x_t - x_0) / t. Half of the inputs below t = 1 are made from the model's own latest
answer for the scene instead of the true picture, as happens when sampling; that takes the place of a distillation.
"""
import argparse, math, pathlib, random
import torch, torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

import training
from codes import OBJECT, WIDTH, Codes
from muon import MuonAdam
from scene_bank import Bank, informative
from scenes import Emoji
from text_rows import HEAD_TOKENS, TAPS, TextRows, hidden_states
from wording import scene_prompt

HEADS, HEAD_DIM, DOUBLE, SINGLE = 6, 32, 2, 3
PLAIN_SHARE = 0.5                       # of a batch of 64x64 or 128x128; the others are coloured, or of more than one object
SHARES = {(128, 128): (0.60, 48), (64, 64): (0.22, 96), (128, 64): (0.13, 64), (64, 128): (0.05, 64)}      # of the steps, and batch
SCENES = {(128, 128): 4, (64, 64): 1.5, (128, 64): 1, (64, 128): 0.5}       # random scenes for each emoji
CODE_NOISE = 0.2                        # of a code's channels, in their deviations
EXTRA_ROWS = 3


def sigmas(tokens):
    """The four sigmas of a distilled sampling with so many image tokens."""
    mu10, mu200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    e = math.exp((mu10 - mu200) / -190 * 4 + mu200 + 200 * (mu10 - mu200) / 190)
    return torch.tensor([e / (e + 1 / s - 1) for s in (1, 0.75, 0.5, 0.25)])


def build(text_width, vae):
    dit = Flux2Transformer2DModel(
        in_channels=128, num_layers=DOUBLE, num_single_layers=SINGLE, attention_head_dim=HEAD_DIM, num_attention_heads=HEADS,
        joint_attention_dim=text_width, axes_dims_rope=(HEAD_DIM // 4,) * 4, guidance_embeds=False)
    h = dit.inner_dim
    with torch.no_grad():
        for name, p in dit.named_parameters():
            if p.ndim == 2:
                torch.nn.init.normal_(p, std=p.shape[1] ** -0.5 * (0.5 if "out" in name and "blocks" in name else 1))
        # Starts as v = x_t, which is right for "no idea what the picture is", inside the informative channels only.
        rank, basis = informative(vae)
        q = torch.linalg.qr(torch.randn(h, 4 * rank))[0] * (h / (4 * rank)) ** 0.5
        dit.x_embedder.weight.copy_(q @ basis.T)
        dit.proj_out.weight.copy_(basis @ q.T * (4 * rank / h))
        # Modulation: no shift, no scale, every gate 0.3, whatever the time is.
        s = F.silu(dit.time_guidance_embed(torch.tensor([1000.0, 970.0, 900.0, 700.0, 500.0]), None)).mean(0)
        for m in (dit.double_stream_modulation_img, dit.double_stream_modulation_txt, dit.single_stream_modulation):
            w = m.linear.weight.zero_()
            for gate in range(2, w.shape[0] // h, 3):
                w[gate * h:(gate + 1) * h] = 0.3 * s / s.square().sum()
        dit.norm_out.linear.weight.zero_()
    return dit


def widened(dit, text_width):
    """The same transformer for a wider text stream: the weights of the new channels of each tap are zero."""
    if dit.config.joint_attention_dim == text_width:
        return dit
    wide = Flux2Transformer2DModel.from_config({**dit.config, "joint_attention_dim": text_width})
    state, old = dit.state_dict(), dit.config.joint_attention_dim // len(TAPS)
    w = torch.zeros(dit.inner_dim, len(TAPS), text_width // len(TAPS))
    w[:, :, :old] = state["context_embedder.weight"].view(dit.inner_dim, len(TAPS), old)
    state["context_embedder.weight"] = w.flatten(1)
    wide.load_state_dict(state)
    return wide


def times(sigma, count):
    """30 % the first sigma (pure noise), 10, 15 and 30 % the others, 15 % anywhere."""
    u = torch.rand(count)
    t = sigma[torch.bucketize(u, torch.tensor([0.30, 0.40, 0.55])).clamp(max=3)]
    return torch.where(u > 0.85, torch.sigmoid(torch.randn(count) + 1), t)


class CodeText:
    """Text rows that are the codes themselves, or only their first `width` channels."""

    def __init__(self, codes, width=WIDTH):
        self.codes, self.width = codes, width

    def __call__(self, r, scenes):
        """Text rows [B, rows, 3 * width], their position ids, and the attention logit that each adds."""
        code = self.codes.of(scenes)[:, None].expand(-1, 2, -1, -1)
        rows = torch.cat([self.codes.head.expand(len(scenes), -1, -1, -1), code], 1)
        rows = rows + CODE_NOISE * self.codes.deviation * torch.randn(rows.shape)
        positions = torch.tensor([*range(HEAD_TOKENS), *sorted(r.sample(range(16, 512), 2))])
        bias = torch.tensor([0.0] * HEAD_TOKENS + [math.log((512 - HEAD_TOKENS) / 2)] * 2)
        return rows[..., :self.width].flatten(2).bfloat16(), F.pad(positions[:, None], (3, 0)), bias


class WordedText:
    """Text rows that the trained encoder makes of random wordings."""

    def __init__(self, emoji, tokenizer, encoder):
        self.emoji, self.rows = emoji, TextRows(Qwen2TokenizerFast.from_pretrained(tokenizer))
        self.encoder = Qwen3ForCausalLM.from_pretrained(encoder, dtype=torch.float32).eval().requires_grad_(False)
        self.width = self.encoder.config.hidden_size

    @torch.no_grad()
    def __call__(self, r, scenes):
        ids, real, positions = self.rows.batch([scene_prompt(r, self.emoji, s) for s in scenes], r, EXTRA_ROWS, 48)
        streams = torch.cat(hidden_states(self.encoder, ids, real, positions), -1).bfloat16()
        bias = torch.zeros(len(positions))
        bias[-EXTRA_ROWS:] = math.log((512 - len(positions) + EXTRA_ROWS) / EXTRA_ROWS)
        return streams, F.pad(positions[:, None], (3, 0)), bias


class Task:
    """One training step: scenes, their text, noise, and the error of the picture that the answer implies."""

    def __init__(self, text, vae):
        self.text, self.basis = text, informative(vae)[1]

    def error(self, dit, r, bank, batch):
        """(error of each sample, relative to the variance of the latents; times)."""
        index = torch.tensor(bank.choose(r, batch, PLAIN_SHARE))
        t = times(sigmas(bank.tokens[0] * bank.tokens[1]), batch)
        own = ((torch.rand(batch) < 0.5) & bank.known[index])[:, None, None]
        x0, noise, T = bank.latents[index], torch.randn(batch, bank.latents.shape[1], 128), t[:, None, None]
        xt = (1 - T) * torch.where(own, bank.own[index].float(), x0) @ self.basis.T + T * noise
        image_ids = torch.cartesian_prod(torch.arange(1), *map(torch.arange, bank.tokens), torch.arange(1))
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            text, text_ids, bias = self.text(r, [bank.scenes[i] for i in index])
            bias = F.pad(bias, (0, len(image_ids))).bfloat16()[None, None, None]
            mask = {"attention_mask": bias.expand(1, 1, bias.shape[-1], bias.shape[-1])}
            v = dit(hidden_states=xt.bfloat16(), encoder_hidden_states=text, timestep=t.bfloat16().float(), img_ids=image_ids,
                    txt_ids=text_ids, joint_attention_kwargs=mask, return_dict=False)[0].float()
        answer = (xt - T * v) @ self.basis
        with torch.no_grad():
            bank.own[index], bank.known[index] = answer.detach().bfloat16(), True
        return (answer - x0).square().mean((1, 2)) / bank.variance, t


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("data", "codes", "vae", "out"):
        ap.add_argument("--" + name, required=True, type=pathlib.Path)
    for name in ("start", "text-encoder", "tokenizer"):
        ap.add_argument("--" + name, type=pathlib.Path)
    ap.add_argument("--small", action="store_true", help="without 128x128")
    ap.add_argument("--plain", action="store_true", help="only emoji as they are, at 64x64; the text has the channels of the object only")
    ap.add_argument("--rate", type=float, default=1.0, help="factor of both learning rates (default: 1)")
    training.add_options(ap, steps=3000)
    a = training.begin(ap)
    emoji, vae = Emoji(a.data), AutoencoderKLFlux2.from_pretrained(a.vae).eval().float()
    text = WordedText(emoji, a.tokenizer, a.text_encoder) if a.text_encoder else CodeText(Codes(a.codes), OBJECT if a.plain else WIDTH)
    width = len(TAPS) * text.width
    old = Flux2Transformer2DModel.from_pretrained(a.start, torch_dtype=torch.float32) if a.start else None
    dit = widened(old, width) if old else build(width, vae)
    sizes = {s: v for s, v in SHARES.items() if s != (128, 128) or not a.small}
    if a.plain:
        sizes = {(64, 64): (1, 96)}
    banks = {}
    for size in sizes:
        cache = a.out.parent / ("bank-%dx%d%s.pt" % (*size, "-plain" if a.plain else ""))
        banks[size] = Bank(cache, random.Random(a.seed), emoji, vae, size, 0 if a.plain else int(SCENES[size] * len(emoji)))
        print(f"transformer: {len(banks[size].scenes)} scenes of {size[0]}x{size[1]}", flush=True)
    task = Task(text, vae)
    optimiser = MuonAdam(dit.named_parameters(), lr=a.rate * 0.02, adam_lr=a.rate * 2e-3,
                         slow=("embed", "modulation", "proj_out", "norm_out"))

    def step_loss(step, r):
        size = r.choices(list(sizes), [share for share, _ in sizes.values()])[0]
        error, t = task.error(dit, r, banks[size], sizes[size][1])
        loss = (error / t.square().clamp(min=0.25)).mean()      # of the velocity, limited for small t
        first = error[t > 0.99].mean().item()                   # from pure noise
        return loss, {"%dx%d" % s: first if s == size else None for s in sizes}

    state = lambda: {s: (b.own, b.known) for s, b in banks.items()}

    def restore(saved):
        for size, (own, known) in saved.items():
            banks[size].own, banks[size].known = own, known

    average = training.Average(dit.parameters())
    training.run("transformer", a, dit, optimiser, average, step_loss, a.out.with_suffix(".checkpoint"), state, restore, every=50)
    dit.save_pretrained(a.out)


if __name__ == "__main__":
    main()
