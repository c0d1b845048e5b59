#!/usr/bin/env python3
"""Train the pocket VAE (AutoencoderKLFlux2, narrow) and set the statistics of its latents.

    vae.py --data emoji.npz --out vae

Loss: L1, L1 of the gradients, and L1 at half and quarter size. Latents are normalised as in the pipeline and get noise before they are
decoded, so the decoder learns to shrug off the transformer's errors and all channels end up equally important.

The 32 latent channels carry RANK independent numbers, each written 32 / RANK times with alternating signs by quant_conv;
post_quant_conv averages the copies again. To the pipeline that is an ordinary latent, but the small transformer has 4 * RANK numbers to
find for each token instead of 128.
"""
import argparse, pathlib
import torch, torch.nn.functional as F
from diffusers import AutoencoderKLFlux2

import training
from muon import MuonAdam
from scene_bank import random_scene
from scenes import Emoji, Scene

RANK = 8
COPIES = torch.zeros(32, RANK)                              # [latent channel, number]
for k in range(32):
    COPIES[k, k // (32 // RANK)] = 1 - 2 * ((k // (32 // RANK) + k % (32 // RANK)) % 2)
NOISE = 0.2
BATCH = 8


def build():
    return AutoencoderKLFlux2(block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=8, sample_size=128)


def through(vae, x):
    """The picture after encoding, noise and decoding."""
    z = F.pixel_unshuffle(vae.quant_conv(vae.encoder(x))[:, :RANK], 2).float()
    mean, deviation = z.mean((0, 2, 3), keepdim=True), (z.var((0, 2, 3), keepdim=True) + 1e-4).sqrt()
    z = ((z - mean) / deviation + NOISE * torch.randn_like(z)) * deviation + mean
    z = torch.einsum("bchw,dc->bdhw", F.pixel_shuffle(z, 2), COPIES)
    return vae.decoder(vae.post_quant_conv(z.to(memory_format=torch.channels_last))).float()


def fold(vae):
    """Moves the copying into quant_conv and the averaging into post_quant_conv."""
    q, p = vae.quant_conv, vae.post_quant_conv
    with torch.no_grad():
        q.weight[:32] = torch.einsum("dc,cixy->dixy", COPIES, q.weight[:RANK].clone())
        q.bias[:32] = COPIES @ q.bias[:RANK].clone()
        p.weight.copy_(torch.einsum("oixy,ic->ocxy", p.weight, COPIES @ COPIES.T * RANK / 32))


def differences(x):
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def distance(y, x):
    loss = (y - x).abs().mean()
    for p, q in zip(differences(y), differences(x)):
        loss = loss + 0.5 * (p - q).abs().mean()
    for k in (2, 4):
        loss = loss + 0.25 * (F.avg_pool2d(y, k) - F.avg_pool2d(x, k)).abs().mean()
    return loss


def pictures(emoji, r, count):
    """64x64 parts of pictures of 128, and pictures of 64, in [-1, 1]."""
    out = []
    for _ in range(count):
        size = r.choice([(64, 64), (128, 128)])
        x = torch.from_numpy(emoji.draw(random_scene(r, emoji, size), size))
        if size == (128, 128):
            i, j = r.randint(0, 64), r.randint(0, 64)
            x = x[i:i + 64, j:j + 64]
        out.append(x)
    return (torch.stack(out).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def plain_pictures(emoji):
    for i in range(0, len(emoji), 32):
        x = [torch.from_numpy(emoji.draw(Scene("one", j), (128, 128))) for j in range(i, min(i + 32, len(emoji)))]
        yield torch.stack(x).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def set_statistics(vae, emoji):
    """The mean and variance of each latent channel over all emoji at 128x128; returns the mean PSNR of the reconstructions."""
    z, error = [], []
    for x in plain_pictures(emoji):
        latents = vae.encode(x).latent_dist.mode()
        z.append(F.pixel_unshuffle(latents, 2))
        error.append(((x - vae.decode(latents).sample.clamp(-1, 1)) / 2).square().mean((1, 2, 3)))
    z = torch.cat(z)
    vae.bn.running_mean.copy_(z.mean((0, 2, 3)))
    vae.bn.running_var.copy_(z.var((0, 2, 3)))
    return (-10 * torch.cat(error).log10()).mean().item()


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--data", required=True, type=pathlib.Path)
    ap.add_argument("--out", required=True, type=pathlib.Path)
    training.add_options(ap, steps=4000)
    a = training.begin(ap)
    emoji = Emoji(a.data)
    vae = build().to(memory_format=torch.channels_last)
    optimiser = MuonAdam(vae.named_parameters(), lr=0.02, adam_lr=2e-3, slow=("conv_in.", "conv_out.", "quant_conv"))

    def step_loss(step, r):
        x = pictures(emoji, r, BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            y = through(vae, x)
        return distance(y, x), {"L1": (y - x).abs().mean().item()}

    training.run("vae", a, vae, optimiser, training.Average(vae.parameters()), step_loss, a.out.with_suffix(".checkpoint"))
    vae.eval()
    fold(vae)
    print(f"vae: mean PSNR of all emoji at 128x128: {set_statistics(vae, emoji):.2f} dB")
    vae.save_pretrained(a.out)


if __name__ == "__main__":
    main()
