"""Muon (orthogonalised momentum) for matrices and convolution kernels, AdamW for everything else."""
import torch

from training import PRODUCTS


def orthogonalise(g, steps=5):
    """Newton-Schulz iteration on a batch [n, rows, columns] of matrices."""
    x = g.to(PRODUCTS)
    turned = x.shape[-2] > x.shape[-1]
    if turned:
        x = x.mT
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(PRODUCTS)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return (x.mT if turned else x).float()


class MuonAdam:
    """lr: the step of Muon (spectral); adam_lr: that of AdamW. Parameters with a part of `slow` in their name always use AdamW."""

    def __init__(self, named, lr, adam_lr, slow=(), momentum=0.95):
        named = [(n, p) for n, p in named if p.requires_grad]
        fast = [p for n, p in named if p.ndim >= 2 and not any(s in n for s in slow)]
        self.groups = {}
        for p in fast:
            self.groups.setdefault((p.shape[0], p.numel() // p.shape[0]), []).append(p)
        self.buffers = [torch.zeros(len(ps), *shape) for shape, ps in self.groups.items()]
        ids = {id(p) for p in fast}
        self.rest = [p for _, p in named if id(p) not in ids]
        self.adam = torch.optim.AdamW(self.rest, lr=adam_lr, betas=(0.9, 0.99), weight_decay=0.0, foreach=True)
        self.lr, self.adam_lr, self.momentum = lr, adam_lr, momentum

    def zero_grad(self):
        for p in [p for ps in self.groups.values() for p in ps] + self.rest:
            p.grad = None

    @torch.no_grad()
    def step(self, factor):
        """factor scales both learning rates (the schedule)."""
        torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
        for (shape, ps), buffer in zip(self.groups.items(), self.buffers):
            g = torch.stack([p.grad.reshape(shape) for p in ps])
            buffer.lerp_(g, 1 - self.momentum)
            update = orthogonalise(g.lerp_(buffer, self.momentum))
            size = factor * self.lr * max(1, shape[0] / shape[1]) ** 0.5
            torch._foreach_add_(ps, [u.reshape(p.shape) for u, p in zip(update, ps)], alpha=-size)
        self.adam.param_groups[0]["lr"] = factor * self.adam_lr
        self.adam.step()

    def state_dict(self):
        return {"buffers": self.buffers, "adam": self.adam.state_dict()}

    def load_state_dict(self, state):
        self.buffers = state["buffers"]
        self.adam.load_state_dict(state["adam"])
