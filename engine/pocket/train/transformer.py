#!/usr/bin/env python3
"""Train the pocket transformer (Flux2Transformer2DModel) to draw scenes from what the trained text encoder says of their wordings.

    transformer.py --data emoji.npz --vae vae --text-encoder text_encoder --tokenizer tokenizer --out transformer [--base] [--start FOLDER]

Text rows are exactly those of the pipeline (text_rows.py), but a step computes only a few: the template's first three, and rows at
places drawn by lot, each of which stands for many by adding log(how many) to its attention logit; of both halves, as each tells an object
of its own. Batches of wordings are made once and come again with other noise and times.

Time: mostly klein's own four sigmas. The target is the velocity (x_t - x_0) / t. Half of the inputs below t = 1 are made from the model's own latest
answer for the scene instead of the true picture, as happens when sampling; that takes the place of a distillation.

--base trains the undistilled twin: times anywhere, inputs from true pictures, some prompts empty so that guidance has something to go away
from; and half of its steps are edits of reference pictures, whose tokens stand after those of the picture as the pipeline has them.
"""
import argparse, dataclasses, math, pathlib, random
import torch, torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

import training
from muon import MuonAdam
from scene_bank import Bank, informative
from scenes import REFERENCE, Emoji
from text_rows import HEAD_TOKENS, ROWS, SECOND_FROM, TAPS, TextRows, hidden_states
from wording import edit_prompt, scene_prompt

HEADS, HEAD_DIM, DOUBLE, SINGLE = 6, 32, 2, 3
PLAIN_SHARE = 0.3                       # of a batch of 64x64 or 128x128; the others are coloured, or of more than one object
EMPTY_SHARE = 0.12                      # of the base twin's prompts
WORDINGS = 320                          # batches of wordings of each kind


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of examples: its share of the steps, its batch, and random examples for each emoji."""
    size: tuple
    share: float
    batch: int
    examples: float
    of_edits: bool = False

    def name(self):
        return "%dx%d" % self.size + " edits" * self.of_edits


DISTILLED = [Kind((128, 128), 0.40, 48, 5), Kind((64, 64), 0.40, 96, 18), Kind((128, 64), 0.15, 64, 6), Kind((64, 128), 0.05, 64, 2)]
BASE = [Kind((64, 64), 0.40, 96, 18), Kind((128, 64), 0.10, 64, 6), Kind((64, 64), 0.35, 96, 12, True), Kind((128, 64), 0.15, 64, 4, True)]
NEAR, NEAR_ROWS = 48, 5                 # of the rows 3..47 five are computed,
FIRST_ROWS, SECOND_ROWS = 3, 4          # of those after them three that tell the first object and four that tell the second


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


def times(sigma, count):
    """30 % the first sigma (pure noise), 10, 15 and 30 % the others, 15 % anywhere."""
    u = torch.rand(count)
    t = sigma[torch.bucketize(u, torch.tensor([0.30, 0.40, 0.55])).clamp(max=3)]
    return torch.where(u > 0.85, torch.sigmoid(torch.randn(count) + 1), t)


def base_times(count):
    """15 % from pure noise to nearly so, the others anywhere, mostly where shapes are decided."""
    u = torch.rand(count)
    return torch.where(u < 0.15, 1 - 0.2 * u, torch.sigmoid(torch.randn(count) + 0.8))


class WordedText:
    """Text rows that the trained encoder makes of random wordings, a share of them empty."""

    def __init__(self, emoji, tokenizer, encoder, empty_share):
        self.empty_share, self.emoji, self.rows = empty_share, emoji, TextRows(Qwen2TokenizerFast.from_pretrained(tokenizer))
        self.encoder = Qwen3ForCausalLM.from_pretrained(encoder, dtype=torch.float32).eval().requires_grad_(False)
        self.width = len(TAPS) * self.encoder.config.hidden_size

    def prompt(self, r, told):
        if r.random() < self.empty_share:
            return ""
        return edit_prompt(r, told) if told.first == REFERENCE else scene_prompt(r, self.emoji, told)

    @torch.no_grad()
    def __call__(self, r, scenes):
        """Text rows [B, rows, width], their position ids, and the attention logit that each adds."""
        prompts = [self.prompt(r, s) for s in scenes]
        ids, real, positions = self.rows.batch(prompts, r, FIRST_ROWS, SECOND_ROWS, NEAR, NEAR)
        kept = [*range(HEAD_TOKENS), *sorted(r.sample(range(HEAD_TOKENS, NEAR), NEAR_ROWS)), *range(NEAR, len(positions))]
        with training.fast_products():
            streams = torch.cat(hidden_states(self.encoder, ids, real, positions), -1)[:, kept].bfloat16()
        stand_for = [(HEAD_TOKENS, HEAD_TOKENS), (NEAR_ROWS, NEAR - HEAD_TOKENS), (FIRST_ROWS, SECOND_FROM - NEAR), (SECOND_ROWS, ROWS - SECOND_FROM)]
        bias = torch.tensor([math.log(of / count) for count, of in stand_for for _ in range(count)])
        return streams, F.pad(positions[kept][:, None], (3, 0)), bias


class Wordings:
    """Batches of a bank's examples with their text rows, each made when it is first asked for."""

    def __init__(self, text, bank, batch, seed):
        self.text, self.bank, self.batch, self.seed, self.made = text, bank, batch, seed, {}

    def __call__(self, number):
        """(indices of examples, text rows, their positions, logits)"""
        if number not in self.made:
            r = random.Random(self.seed * 1000003 + number)
            index = self.bank.choose(r, self.batch, PLAIN_SHARE)
            self.made[number] = torch.tensor(index), *self.text(r, [self.bank.examples[i].told for i in index])
        return self.made[number]


def step_error(dit, basis, bank, wording, is_base):
    """(error of each picture that an answer implies, relative to the variance of the latents; times)."""
    index, text, text_ids, bias = wording
    batch = len(index)
    t = base_times(batch) if is_base else times(sigmas(bank.tokens[0] * bank.tokens[1]), batch)
    own = ((torch.rand(batch) < (0 if is_base else 0.5)) & bank.known[index])[:, None, None]
    x0, noise, T = bank.latents[index], torch.randn(batch, bank.latents.shape[1], 128), t[:, None, None]
    xt = (1 - T) * torch.where(own, bank.own[index].float(), x0) @ basis.T + T * noise
    image, image_ids = torch.cat([xt, bank.references[index]], 1).to(training.PRODUCTS), bank.image_ids()
    with training.fast_products(), sdpa_kernel(SDPBackend.MATH):
        bias = F.pad(bias, (0, len(image_ids))).to(training.PRODUCTS)[None, None, None]
        mask = {"attention_mask": bias.expand(1, 1, bias.shape[-1], bias.shape[-1])}
        v = dit(hidden_states=image, encoder_hidden_states=text.to(training.PRODUCTS), timestep=t.bfloat16().float(), img_ids=image_ids,
                txt_ids=text_ids, joint_attention_kwargs=mask, return_dict=False)[0].float()
    answer = (xt - T * v[:, :xt.shape[1]]) @ basis
    with torch.no_grad():
        bank.own[index], bank.known[index] = answer.detach().bfloat16(), True
    return (answer - x0).square().mean((1, 2)) / bank.variance, t


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("data", "vae", "text-encoder", "tokenizer", "out"):
        ap.add_argument("--" + name, required=True, type=pathlib.Path)
    ap.add_argument("--start", type=pathlib.Path, help="folder of an earlier transformer")
    ap.add_argument("--base", action="store_true", help="train the undistilled twin, which edits")
    ap.add_argument("--rate", type=float, default=1.0, help="factor of both learning rates (default: 1)")
    training.add_options(ap, steps=9000)
    a = training.begin(ap)
    emoji, vae = Emoji(a.data), AutoencoderKLFlux2.from_pretrained(a.vae).eval().float()
    text = WordedText(emoji, a.tokenizer, a.text_encoder, EMPTY_SHARE if a.base else 0)
    dit = Flux2Transformer2DModel.from_pretrained(a.start, torch_dtype=torch.float32) if a.start else build(text.width, vae)
    kinds = {k.name(): k for k in (BASE if a.base else DISTILLED)}
    banks, wordings = {}, {}
    for name, k in kinds.items():
        cache = a.out.parent / f"bank-{name.replace(' ', '-')}.pt"
        banks[name] = Bank(cache, random.Random(a.seed), emoji, vae, k.size, int(k.examples * len(emoji)), k.of_edits)
        wordings[name] = Wordings(text, banks[name], k.batch, a.seed)
        print(f"transformer: {len(banks[name].examples)} examples of {name}", flush=True)
    basis, drawn = informative(vae)[1], torch.compile(dit)
    optimiser = MuonAdam(dit.named_parameters(), lr=a.rate * 0.02, adam_lr=a.rate * 2e-3,
                         slow=("embed", "modulation", "proj_out", "norm_out"))

    def step_loss(step, r):
        name = r.choices(list(kinds), [k.share for k in kinds.values()])[0]
        wording = wordings[name](r.randrange(WORDINGS))
        error, t = step_error(drawn, basis, banks[name], wording, a.base)
        loss = (error / t.square().clamp(min=0.25)).mean()      # of the velocity, limited for small t
        first, plain = t > 0.97, wording[0] < banks[name].plain
        mean = lambda which: error[which].mean().item() if which.any() else None
        figures = {n: mean(first) if n == name else None for n in kinds}        # from pure noise, or nearly
        return loss, figures | {"plain": mean(first & plain) if name == "64x64" else None}

    state = lambda: {name: (b.own, b.known) for name, b in banks.items()}

    def restore(saved):
        for name, (own, known) in saved.items():
            banks[name].own, banks[name].known = own, known

    average = training.Average(dit.parameters())
    training.run("transformer", a, dit, optimiser, average, step_loss, a.out.with_suffix(".checkpoint"), state, restore, every=100)
    dit.save_pretrained(a.out)


if __name__ == "__main__":
    main()
