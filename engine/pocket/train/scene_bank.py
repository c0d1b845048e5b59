"""Random examples - what a prompt tells, the reference pictures, what is to be drawn - and the bank of them that the transformer learns from."""
import dataclasses
import torch, torch.nn.functional as F

from scenes import GROUNDS, HUES, LAYOUTS, REFERENCE, Scene, may_be_coloured


@dataclasses.dataclass(frozen=True)
class Example:
    told: Scene
    shown: Scene
    references: tuple = ()      # scenes of 64x64


def random_scene(r, emoji, size, first=None):
    """A scene that fits the size. Single objects and grounds often have a colour of their own; two objects keep theirs."""
    layout = r.choice({(64, 64): ["one"], (128, 64): ["two", "left", "left", "left"], (64, 128): ["above"],
                       (128, 128): ["one"] * 4 + LAYOUTS[1:]}[size])
    first = r.randrange(len(emoji)) if first is None else first
    second = r.randrange(len(emoji)) if layout in ("left", "above") else None
    colour = layout == "one" and r.random() < 0.6 and may_be_coloured(emoji.words[first])
    ground = r.random() < (0.5 if layout == "one" else 0.2)
    return Scene(layout, first, r.choice(list(HUES)) if colour else None, second, r.choice(list(GROUNDS)) if ground else None)


def random_edit(r, emoji, size, first=None):
    """64x64: another colour or ground, or both, for one reference picture; 128x64: two of them beside each other."""
    first = r.randrange(len(emoji)) if first is None else first
    if size == (128, 64):
        second, ground = r.randrange(len(emoji)), r.choice(list(GROUNDS)) if r.random() < 0.2 else None
        return Example(Scene("left", REFERENCE, None, REFERENCE, ground), Scene("left", first, None, second, ground),
                       (Scene("one", first), Scene("one", second)))
    a_colour = lambda share: r.choice(list(HUES)) if r.random() < share and may_be_coloured(emoji.words[first]) else None
    a_ground = lambda share: r.choice(list(GROUNDS)) if r.random() < share else None
    before = Scene("one", first, a_colour(0.3), None, a_ground(0.3))
    colour = a_colour(0.6)
    ground = a_ground(0.3 if colour else 1)
    after = Scene("one", first, colour or before.first_colour, None, ground or before.ground)
    return Example(Scene("one", REFERENCE, colour, None, ground), after, (before,))


def examples(r, emoji, size, random_count, of_edits):
    """(examples, how many of them are plain): of squares each emoji as it is, then random scenes; or edits."""
    if of_edits:
        return [random_edit(r, emoji, size, k % len(emoji)) for k in range(random_count)], 0
    plain = [Scene("one", i) for i in range(len(emoji))] if size[0] == size[1] else []
    scenes = plain + [random_scene(r, emoji, size, k % len(emoji)) for k in range(random_count)]
    return [Example(s, s) for s in scenes], len(plain)


class Bank:
    """Examples of one size with their latents.

    Latents are kept as the 4 * RANK numbers of a token that carry information (`basis`, read off the VAE itself: post_quant_conv ignores
    everything orthogonal to it), those of reference pictures whole, as the pipeline gives them. `own` is the transformer's latest answer for
    an example, `known` says whether there is one.
    """

    def __init__(self, cache, r, emoji, vae, size, random_count, of_edits=False):
        self.size, self.tokens = size, (size[1] // 16, size[0] // 16)
        self.examples, self.plain = examples(r, emoji, size, random_count, of_edits)
        if not cache.exists():
            basis = informative(vae)[1]
            shown, pictures = [e.shown for e in self.examples], [s for e in self.examples for s in e.references]
            torch.save([encode(vae, emoji, shown, size) @ basis, encode(vae, emoji, pictures, (64, 64)).bfloat16()], cache)
        self.latents, references = torch.load(cache)
        self.reference_count = len(self.examples[-1].references)
        self.references = references.view(len(self.examples), 16 * self.reference_count, 128)
        self.variance = self.latents.var(0).mean()
        self.own, self.known = torch.zeros_like(self.latents, dtype=torch.bfloat16), torch.zeros(len(self.examples), dtype=torch.bool)

    def choose(self, r, count, plain_share):
        """Indices of examples, that share of them plain."""
        pick = lambda plain: r.randrange(self.plain) if plain else r.randrange(self.plain, len(self.examples))
        if self.plain in (0, len(self.examples)):
            return r.sample(range(len(self.examples)), count)
        return [pick(r.random() < plain_share) for _ in range(count)]

    def image_ids(self):
        """Position ids [1, tokens, 4] of the picture and of the reference pictures after it."""
        grid = lambda t, rows, columns: torch.cartesian_prod(torch.tensor([t]), torch.arange(rows), torch.arange(columns), torch.arange(1))
        return torch.cat([grid(0, *self.tokens), *[grid(10 * (k + 1), 4, 4) for k in range(self.reference_count)]])


def informative(vae):
    """(rank, basis [128, 4 * rank] with orthonormal columns) of the token channels that carry information."""
    w = vae.post_quant_conv.weight[:, :, 0, 0] * (vae.bn.running_var.view(32, 4).mean(1) + vae.bn.eps).sqrt()
    _, s, vt = torch.linalg.svd(w.detach())
    rank = int((s > 1e-3 * s[0]).sum())
    return rank, torch.kron(vt[:rank].T.contiguous(), torch.eye(4))


@torch.no_grad()
def encode(vae, emoji, scenes, size, at_once=32):
    """Latent tokens [scenes, tokens, 128] as the pipeline has them."""
    out = [torch.zeros(0, size[0] * size[1] // 256, 128)]
    for i in range(0, len(scenes), at_once):
        x = torch.stack([torch.from_numpy(emoji.draw(s, size)) for s in scenes[i:i + at_once]]).permute(0, 3, 1, 2).float() / 127.5 - 1
        z = F.pixel_unshuffle(vae.encode(x).latent_dist.mode(), 2)
        z = (z - vae.bn.running_mean[:, None, None]) / (vae.bn.running_var[:, None, None] + vae.bn.eps).sqrt()
        out.append(z.flatten(2).mT)
    return torch.cat(out)
