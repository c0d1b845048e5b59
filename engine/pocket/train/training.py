"""What the three trainings share: the loop with its schedule, seeds, progress lines and checkpoints.

Every step seeds its random sources with its own number, so a run that was killed goes on from its last checkpoint as if nothing had
happened: the same seed, step count and number of threads give the same weights.
"""
import os, random, time
import torch

# What products are computed in: bf16 where the CPU has it; elsewhere it is emulated, at a quarter of the speed of f32.
PRODUCTS = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else torch.float32


def fast_products():
    return torch.autocast("cpu", torch.bfloat16, enabled=PRODUCTS == torch.bfloat16)


class Average:
    """Exponential moving average of weights, slower as the training goes on."""

    def __init__(self, parameters, limit=0.998):
        self.parameters, self.limit = list(parameters), limit
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def follow(self, step):
        keep = min(self.limit, step / (step + 10))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - keep)

    @torch.no_grad()
    def install(self):
        for p, v in zip(self.parameters, self.values):
            p.copy_(v)


def add_options(ap, steps):
    """Options of every training program."""
    ap.add_argument("--steps", type=int, default=steps, help="default: %(default)s")
    ap.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    ap.add_argument("--seed", type=int, default=0)


def begin(ap):
    """Reads the command line; what comes next is a function of the seed and the number of threads."""
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    return a


def turn(start, count, of):
    """`count` numbers below `of` from place `start` on of an endless row of shuffles."""
    shuffle = lambda k: random.Random(k).sample(range(of), of)
    return (shuffle(start // of) + shuffle(start // of + 1))[start % of:][:count]


def warm_up_and_decay(step, steps, warm=100):
    """Linear to 1 in the first `warm` steps, then linear to nearly nothing."""
    return min(1, (step + 1) / warm) * max(1 - step / steps, 0.002)


def run(name, a, model, optimiser, average, step_loss, checkpoint, state=lambda: {}, restore=lambda s: None, every=100):
    """step_loss(step, random source) -> (loss, {figure: number}); the loop does the rest. `checkpoint` is the file to go on from."""
    start, spent = 0, 0.0
    if checkpoint.exists():
        c = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(c["model"]), optimiser.load_state_dict(c["optimiser"]), restore(c["state"])
        average.values, start, spent = c["average"], c["step"], c["seconds"]
        print(f"{name}: goes on from step {start}", flush=True)
    began = saved = shown = time.time()
    figures = []
    for step in range(start, a.steps):
        torch.manual_seed(a.seed * 1000003 + step)
        loss, f = step_loss(step, random.Random(a.seed * 1000003 + step))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step(warm_up_and_decay(step, a.steps))
        average.follow(step)
        figures.append({"loss": loss.item(), **f})
        if (step + 1) % every == 0 or step + 1 == a.steps or step == start + 4:
            mean = {k: [g[k] for g in figures if g.get(k) is not None] for k in figures[-1]}
            text = "  ".join(f"{k} {sum(v) / len(v):.4f}" for k, v in mean.items() if v)
            now = time.time()
            print(f"{name}: step {step + 1} of {a.steps}  {text}  {(now - shown) / len(figures):.2f} s a step  "
                  f"{(spent + now - began) / 60:.1f} min, {(now - began) / (step + 1 - start) * (a.steps - step - 1) / 60:.1f} left", flush=True)
            figures, shown = [], now
        if time.time() - saved > 120 or step + 1 == a.steps:
            part = checkpoint.with_suffix(".part")
            torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict(), "average": average.values, "state": state(),
                        "step": step + 1, "seconds": spent + time.time() - began}, part)
            part.rename(checkpoint)
            saved = time.time()
    average.install()
