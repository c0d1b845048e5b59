#!/usr/bin/env python3
"""Does kiln draw what diffusers draws? The same folders, prompts, reference pictures and seeds, both in f32: no channel of a pixel may differ by
more than 1.

    check_diffusers.py [--model DIR] [--base DIR] [--worker build/release/bin/kiln-worker]

Needs the packages of requirements.txt; not part of the project's check, whose goldens hold diffusers' own numbers.
"""
import argparse, pathlib, subprocess, sys, tempfile
import numpy as np, torch
from diffusers import Flux2KleinPipeline
from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent
CASES = [("fox", (64, 64), ()), ("a blue umbrella", (64, 64), ()), ("a cat left of a dog", (128, 64), ()), ("pizza", (128, 128), ())]
BASE_CASES = [("fox", (64, 64), ()), ("make it blue", (64, 64), (0,)), ("put them beside each other", (128, 64), (0, 1))]  # edits of those before


def differences(worker, model, steps, cases, folder):
    """Draws each case with both; kiln's picture k is FOLDER/k.png."""
    pipe = Flux2KleinPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for seed, (prompt, (width, height), of) in enumerate(cases):
        images = [folder / f"{k}.png" for k in of]
        references = [word for image in images for word in ("--image", image)]
        subprocess.run([worker, "render", "--model", model, "--prompt", prompt, "--seed", str(seed), "--size", f"{width}x{height}",
                        "--steps", str(steps), "--precision", "f32", "--out", folder / f"{seed}.png", *references],
                       check=True, stdout=subprocess.DEVNULL)
        ours = np.asarray(Image.open(folder / f"{seed}.png").convert("RGB")).astype(int)
        theirs = np.asarray(pipe(prompt=prompt, image=[Image.open(i) for i in images] or None, width=width, height=height, num_inference_steps=steps,
                                 generator=torch.Generator().manual_seed(seed)).images[0]).astype(int)
        difference = np.abs(ours - theirs).max()
        print(f"{model.name}: {prompt}, seed {seed}, {width}x{height}: differ by at most {difference} of 255", flush=True)
        yield difference


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--model", default=HERE.parent / "model", type=pathlib.Path)
    ap.add_argument("--base", type=pathlib.Path, help="folder of the base twin, to be compared, too, and its edits")
    ap.add_argument("--worker", default=HERE.parents[2] / "build/release/bin/kiln-worker", type=pathlib.Path)
    a = ap.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        here = pathlib.Path(folder)
        found = [*differences(a.worker, a.model, 4, CASES, here), *(differences(a.worker, a.base, 50, BASE_CASES, here) if a.base else ())]
    return 1 if max(found) > 1 else 0


if __name__ == "__main__":
    sys.exit(main())
