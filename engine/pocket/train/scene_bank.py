"""Random scenes, and the bank of encoded scenes that the transformer learns from."""
import torch, torch.nn.functional as F

from scenes import GROUNDS, HUES, LAYOUTS, Scene, may_be_coloured


def random_scene(r, emoji, size, first=None):
    """A scene that fits the size. Single objects and grounds often have a colour of their own; two objects keep theirs."""
    layout = r.choice({(64, 64): ["one"], (128, 64): ["two", "left", "left", "left"], (64, 128): ["above"],
                       (128, 128): ["one"] * 4 + LAYOUTS[1:]}[size])
    first = r.randrange(len(emoji)) if first is None else first
    second = r.randrange(len(emoji)) if layout in ("left", "above") else None
    colour = layout == "one" and r.random() < 0.6 and may_be_coloured(emoji.words[first])
    ground = r.random() < (0.5 if layout == "one" else 0.2)
    return Scene(layout, first, r.choice(list(HUES)) if colour else None, second, r.choice(list(GROUNDS)) if ground else None)


class Bank:
    """Scenes of one size with their latents: of squares each emoji as it is (`plain` of them), then random scenes.

    Latents are kept as the 4 * RANK numbers of a token that carry information (`basis`, read off the VAE itself: post_quant_conv ignores
    everything orthogonal to it). `own` is the transformer's latest answer for a scene, `known` says whether there is one.
    """

    def __init__(self, cache, r, emoji, vae, size, random_count):
        self.size, self.tokens = size, (size[1] // 16, size[0] // 16)
        self.scenes = [Scene("one", i) for i in range(len(emoji))] if size[0] == size[1] else []
        self.plain = len(self.scenes)
        self.scenes += [random_scene(r, emoji, size, k % len(emoji)) for k in range(random_count)]
        if not cache.exists():
            basis = informative(vae)[1]
            torch.save(torch.cat([encode(vae, emoji, self.scenes[i:i + 32], size) @ basis for i in range(0, len(self.scenes), 32)]), cache)
        self.latents = torch.load(cache)
        self.variance = self.latents.var(0).mean()
        self.own, self.known = torch.zeros_like(self.latents, dtype=torch.bfloat16), torch.zeros(len(self.scenes), dtype=torch.bool)

    def choose(self, r, count, plain_share):
        """Indices of scenes, that share of them plain."""
        pick = lambda plain: r.randrange(self.plain) if plain else r.randrange(self.plain, len(self.scenes))
        if self.plain in (0, len(self.scenes)):
            return r.sample(range(len(self.scenes)), count)
        return [pick(r.random() < plain_share) for _ in range(count)]


def informative(vae):
    """(rank, basis [128, 4 * rank] with orthonormal columns) of the token channels that carry information."""
    w = vae.post_quant_conv.weight[:, :, 0, 0] * (vae.bn.running_var.view(32, 4).mean(1) + vae.bn.eps).sqrt()
    _, s, vt = torch.linalg.svd(w.detach())
    rank = int((s > 1e-3 * s[0]).sum())
    return rank, torch.kron(vt[:rank].T.contiguous(), torch.eye(4))


@torch.no_grad()
def encode(vae, emoji, scenes, size):
    """Latent tokens [B, tokens, 128] as the pipeline has them."""
    x = torch.stack([torch.from_numpy(emoji.draw(s, size)) for s in scenes]).permute(0, 3, 1, 2).float() / 127.5 - 1
    z = F.pixel_unshuffle(vae.encode(x).latent_dist.mode(), 2)
    z = (z - vae.bn.running_mean[:, None, None]) / (vae.bn.running_var[:, None, None] + vae.bn.eps).sqrt()
    return z.flatten(2).mT
