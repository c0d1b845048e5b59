#!/usr/bin/env python3
"""Prints the tables of kernels/README.md: klein-4B and 9B in bf16, from files in fp8, and with products in fp8 on GPUs, computed by dry runs,
beside published times.

    cmake --preset sim && cmake --build --preset sim && tests/bench/dry_table.py [build/sim/bin/kiln-worker]

One picture, 4 steps. The model folders are hollow_klein.py's, in a temporary place. Seconds."""
import itertools, json, pathlib, subprocess, sys, tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
FAMILIES, SIZES = ("klein-4b", "klein-9b"), (512, 1024, 1536)
FORMATS = {"": ("bf16", "bf16"), " fp8": ("fp8", "bf16"), " fp8 x fp8": ("fp8", "fp8")} # of the files, of products
PLACEMENTS = {"resident": "", "phases": " p", "streamed": " s"} # with the mark of the table
MEMORIES = (6, 8, 12, 16, 24)
DEVICES = {"h100": "H100", "rtx4090": "RTX 4090", "rtx3090": "RTX 3090", "rtx4070ti": "RTX 4070 Ti"}
# seconds a picture, as published by others; how they were measured (text encoder, decoder, number format) is not said there
PUBLISHED = {
    ("h100", "klein-4b", 1024): 0.57,
    ("rtx4090", "klein-4b", 1024): 1.2, ("rtx4090", "klein-9b", 1024): 1.8,
    ("rtx4090", "klein-4b", 1536): 2.8, ("rtx4090", "klein-9b", 1536): 4.2,
    ("rtx3090", "klein-4b", 1024): 2.1, ("rtx3090", "klein-9b", 1024): 3.4,
    ("rtx4070ti", "klein-4b", 1024): 3.2,
}


def ledger(worker, folder, device, size, *words):
    done = subprocess.run([worker, "render", "--device", "dry:" + device, "--model", folder, "--prompt", "a red fox", "--seed", "1",
                           "--size", f"{size}x{size}", "--json", *words], capture_output=True, text=True)
    if not done.stdout:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def model_line(model, size, placed):
    any_report = placed["resident"]
    step = next(p for p in any_report["phases"] if p["phase"] == "step")
    outside, least = any_report["step_bytes_outside_products"], any_report["step_bytes_outside_products_least"]
    cells = [model, f"{size}²", " / ".join(f"{placed[p]['peak_bytes'] / 1e9:.1f}" for p in PLACEMENTS),
             f"{any_report['step_launches_max']} / {any_report['step_host_launches_max']}",
             f"{any_report['step_late_stalls']} / {any_report['step_late_allocations']}", f"{step['flops'] / step['runs'] / 1e12:.2f}",
             f"{100 * any_report['tensor_core_share']:.2f}", f"{outside / 1e9:.1f} / {least / 1e9:.1f} = {outside / least:.2f}", f"{any_report['step_bytes_recoding'] / 1e9:.1f}"]
    return "| " + " | ".join(cells) + " |"


def time_line(model, size, reports):
    cells = []
    for device, report in reports.items():
        published = PUBLISHED.get((device, model, size))
        cells.append(f"{report['computed_s']:.3f}" + PLACEMENTS[report["placement"]] + (f" ({published:g})" if published else ""))
    return f"| {model} | {size}² | " + " | ".join(cells) + " |"


def fit_line(worker, folder, model, size, precision):
    cells = []
    for gb in MEMORIES:
        report = ledger(worker, folder, f"rtx4090:{gb}", size, *precision)
        cells.append(f"{report['placement']} {report['peak_bytes'] / 1e9:.1f}")
    return f"| {model} | {size}² | " + " | ".join(cells) + " |"


def main():
    worker = sys.argv[1] if len(sys.argv) > 1 else ROOT / "build/sim/bin/kiln-worker"
    models, fits, times = [], [], []
    with tempfile.TemporaryDirectory() as place:
        for family, (mark, (format, products)) in itertools.product(FAMILIES, FORMATS.items()):
            model, folder, precision = family + mark, pathlib.Path(place, family + format), ("--precision", products)
            subprocess.run([ROOT / "tests/bench/hollow_klein.py", folder, "--family", family, "--format", format], check=True,
                           stdout=subprocess.DEVNULL)
            for size in SIZES:
                reports = {device: ledger(worker, folder, device, size, *precision) for device in DEVICES}
                placed = {p: ledger(worker, folder, "h100", size, "--placement", p, *precision) for p in PLACEMENTS}
                models.append(model_line(model, size, placed))
                fits.append(fit_line(worker, folder, model, size, precision))
                times.append(time_line(model, size, reports))
    print("| model | size | peak GB: resident / phases / streamed | launches a step / by the host | stalls / allocations behind the first step | TFLOP a step | % on tensor cores | "
          "GB a step outside products / least | to decode or round |\n" + "| --- " * 9 + "|\n" + "\n".join(models) + "\n")
    print("| placement, peak GB | size | " + " | ".join(f"{gb} GB" for gb in MEMORIES) + " |\n" + "| --- " * (2 + len(MEMORIES)) + "|\n" +
          "\n".join(fits) + "\n")
    print("| s a picture, computed (published) | size | " + " | ".join(DEVICES.values()) + " |\n" + "| --- " * 6 + "|\n" + "\n".join(times))


if __name__ == "__main__":
    main()
