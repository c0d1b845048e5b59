#!/usr/bin/env python3
"""Does kiln draw what diffusers draws? The same folder, prompts and seeds, both in f32: no channel of a pixel may differ by more than 1.

    check_diffusers.py [--model DIR] [--worker build/release/bin/kiln-worker]

Needs the packages of requirements.txt; not part of the project's check, whose goldens hold diffusers' own numbers.
"""
import argparse, pathlib, subprocess, sys, tempfile
import numpy as np, torch
from diffusers import Flux2KleinPipeline
from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent
CASES = [("fox", (64, 64)), ("a blue umbrella", (64, 64)), ("a cat left of a dog", (128, 64)), ("pizza", (128, 128))]


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--model", default=HERE.parent / "model", type=pathlib.Path)
    ap.add_argument("--worker", default=HERE.parents[2] / "build/release/bin/kiln-worker", type=pathlib.Path)
    a = ap.parse_args()
    pipe = Flux2KleinPipeline.from_pretrained(a.model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    worst = 0
    with tempfile.TemporaryDirectory() as folder:
        for seed, (prompt, (width, height)) in enumerate(CASES):
            subprocess.run([a.worker, "render", "--model", a.model, "--prompt", prompt, "--seed", str(seed), "--size", f"{width}x{height}",
                            "--precision", "f32", "--out", f"{folder}/k.png"], check=True, stdout=subprocess.DEVNULL)
            ours = np.asarray(Image.open(f"{folder}/k.png").convert("RGB")).astype(int)
            theirs = np.asarray(pipe(prompt=prompt, width=width, height=height, num_inference_steps=4,
                                     generator=torch.Generator().manual_seed(seed)).images[0]).astype(int)
            difference = np.abs(ours - theirs).max()
            worst = max(worst, difference)
            print(f"{prompt}, seed {seed}, {width}x{height}: differ by at most {difference} of 255", flush=True)
    return 1 if worst > 1 else 0


if __name__ == "__main__":
    sys.exit(main())
