#!/usr/bin/env python3
"""Times diffusers' Flux2KleinPipeline on the CPU part by part, as `kiln-worker render --json` does: JSON lines.

    run_diffusers.py MODEL_DIR [--size 256 512] [--steps 4] [--runs 2] [--threads 2]

The pipeline is loaded once, in bf16; then every size is run --runs times. The first run of a size pays for pages that were not
touched yet. README.md says what must be installed."""
import argparse
import json
import os
import resource
import time

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("model")
options.add_argument("--size", type=int, nargs="+", default=[256, 512])
options.add_argument("--steps", type=int, default=4)
options.add_argument("--runs", type=int, default=2)
options.add_argument("--threads", type=int, default=os.cpu_count())
options.add_argument("--prompt", default="a red fox sitting in fresh snow, morning light")
options = options.parse_args()

began = time.monotonic()
import torch  # noqa: E402
from diffusers import Flux2KleinPipeline  # noqa: E402

torch.set_num_threads(options.threads)
torch.set_grad_enabled(False)
imported = time.monotonic()
pipe = Flux2KleinPipeline.from_pretrained(options.model, torch_dtype=torch.bfloat16)
pipe.set_progress_bar_config(disable=True)
steps = []
clock = [0.0]
pipe.transformer.register_forward_pre_hook(lambda *_: clock.__setitem__(0, time.monotonic()))
pipe.transformer.register_forward_hook(lambda *_: steps.append(time.monotonic() - clock[0]))
print(json.dumps({"import_s": round(imported - began, 2), "load_s": round(time.monotonic() - imported, 2), "torch": torch.__version__,
                  "threads": options.threads, "cpu": torch.backends.cpu.get_cpu_capability()}), flush=True)
for size in options.size:
    for run in range(options.runs):
        steps.clear()
        times = [time.monotonic()]
        embeds = pipe.encode_prompt(prompt=options.prompt)[0]
        times.append(time.monotonic())
        latents = pipe(prompt_embeds=embeds, height=size, width=size, num_inference_steps=options.steps, guidance_scale=1.0,
                       generator=torch.Generator().manual_seed(42), output_type="latent").images
        times.append(time.monotonic())
        pipe.image_processor.postprocess(pipe.vae.decode(latents, return_dict=False)[0], output_type="pil")
        times.append(time.monotonic())
        parts = dict(zip(("encode_s", "denoise_s", "decode_s"), (round(b - a, 2) for a, b in zip(times, times[1:]))))
        print(json.dumps({"size": size, "run": run, **parts, "total_s": round(times[-1] - times[0], 2),
                          "step_s": [round(s, 2) for s in steps], "max_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)}),
              flush=True)
