"""`kiln up --device cuda`: a farm over two GPUs of the simulator (tests/cudasim), under kill -9 and with a device that is lost.

If this breaks, an owner of several GPUs has one that idles, or loses images when a card fails or hangs. The programs are those of KILN_BIN, the
GPUs are those of the module KILN_CUDA_MODULE names: step sim of ops/check."""

import json
import os
import pathlib
import subprocess

import pytest
from PIL import Image

import speck
from farm import BIN, POCKET, ROOT, environment, wait_until

pytestmark = pytest.mark.sim
TWO_GPUS = {"KILN_CUDA_MODULE": os.environ.get("KILN_CUDA_MODULE", ""), "CUDASIM_DEVICES": "2", "CUDASIM_THREADS": "1"}
PROMPTS, SEEDS = ["a fox", "an owl"], 8
SHARED = ROOT / "tests/golden/models/pocket" # small, and its heads are even, as those of the smallest are not


@pytest.fixture
def gpus(new_farm):
    """A home whose programs see two GPUs."""
    farm = new_farm()
    farm.variables = dict(TWO_GPUS)
    return farm


def kernels_of(farm, name, gpu, *argv, ends=None):
    """Kernels that ran on the GPU in a life of kiln-worker; ends: a word of its log, after which it is told to end."""
    trace, log = farm.root / f"{name}.trace", farm.root / f"{name}.log"
    with open(log, "wb") as out:
        process = subprocess.Popen([BIN / "kiln-worker", *map(str, argv)], stdout=out, stderr=out,
                                   env=environment(farm.home) | farm.variables | {"CUDASIM_TRACE": str(trace)})
    if ends:
        wait_until(lambda: ends in log.read_text() or process.poll() is not None, f"{name} says {ends}")
        process.terminate()
    assert process.wait(timeout=120) == 0, log.read_text()
    with open(trace) as lines:
        return sum(line["op"] in ("kernel", "library") and line["device"] == gpu for line in map(json.loads, lines) if "device" in line)


def kernels_before_loss(farm, device="cuda:0", gpu=0):
    """Kernels on one GPU of a worker's life up to its second or third batch: it opens its model, renders a batch, and half of another."""
    model = farm.model.split("=")[1]
    opened = kernels_of(farm, "opened", gpu, "--connect", f"ipc://{farm.root}/nobody", "--model", farm.model, "--device", device, "--batch", 2,
                        "--spool", farm.root / "spool", "--name", "opened", ends="model_open ")
    some = [kernels_of(farm, f"some-{count}", gpu, "render", "--model", model, "--prompt-file", farm.file(f"{count}.txt", "a fox\n" + "an owl\n" * count),
                       "--seed", 1, "--size", "64x64", "--steps", 1, "--device", device, "--out", farm.root / f"some-{count}") for count in (1, 0)]
    return opened + (some[0] - some[1]) * 3 // 2


def rows():
    return [(prompt, 100 + i) for i, prompt in enumerate(p for p in PROMPTS for _ in range(SEEDS))]


def rendered_alone(farm):
    """The pixels of every row, by one process on one GPU, without a farm."""
    prompts = farm.file("alone.txt", "".join(f"{prompt}\n" for prompt, _ in rows()))
    out = farm.root / "alone"
    run = subprocess.run([BIN / "kiln-worker", "render", "--model", farm.model.split("=")[1], "--prompt-file", prompts, "--seed", "100", "--size",
                          "64x64", "--steps", "1", "--batch", "3", "--device", "cuda:0", "--out", out], capture_output=True, text=True,
                         env=environment(farm.home) | farm.variables)
    assert run.returncode == 0, run.stderr
    return [pixels(path) for path in sorted(out.iterdir())]


def pixels(path):
    return Image.open(path).convert("RGB").tobytes()


@pytest.mark.parametrize("count, words, listed", [("2", [], ["cuda:0", "cuda:1"]), ("2", ["cuda:1"], ["cuda:1"]), ("2", ["cuda:1,0"], ["cuda:1", "cuda:0"]),
                                                  ("0", [], []),
                                                  ("1", ["cuda:1"], [])])
def test_devices_lists_what_a_worker_can_use(gpus, count, words, listed):
    run = subprocess.run([BIN / "kiln-worker", "devices", "--json", *words], capture_output=True, text=True,
                         env=environment(gpus.home) | gpus.variables | {"CUDASIM_DEVICES": count})
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["device"] for line in lines] == listed and run.returncode == (0 if listed else 2), run.stderr
    assert all(line["memory_bytes"] >= line["available_bytes"] > 0 for line in lines)
    assert listed or run.stderr.startswith("kiln-worker devices: no CUDA device")


def test_a_campaign_over_two_gpus_survives_kill_9_and_a_device_that_is_lost(gpus):
    """A worker a GPU; the first is killed twice, the second has an uncorrectable memory error in every life, and its device is gone. Each picture is that of a single render."""
    farm = gpus
    farm.variables["CUDASIM_FAULT"] = f"kernel:{kernels_before_loss(farm)}=cudaErrorECCUncorrectable@1"
    up = farm.up("--device", "cuda", "--batch", "2", "--placement", "resident")
    assert "2 workers on cuda:0, cuda:1" in up.stdout and "  device    2 renderers, because " in up.stdout
    assert ' device choice="2 renderers, because ' in farm.log("kiln")
    assert sorted(w["device"].split()[0] for w in farm.lines("workers")) == ["cuda:0", "cuda:1"]
    farm.submit("gpus", "prompt,seed\n" + "".join(f"{prompt},{seed}\n" for prompt, seed in rows()), suffix="csv")
    for done in (1, 8):
        farm.wait_some_done("gpus", done)
        farm.wait_back("worker-1", farm.kill("worker-1"))
    farm.wait_done("gpus")
    images = farm.assert_whole("gpus", len(rows()))
    assert {i["worker"] for i in images} == {"worker-1", "worker-2"}
    assert "device lost" in farm.log("worker-2") and "device lost" not in farm.log("worker-1")
    assert farm.log("worker-2").count(" started ") > 1, "the supervisor starts it again"
    assert [(i["prompt"], i["seed"]) for i in images] == [(prompt, seed) for prompt, seed in rows()]
    assert [pixels(i["path"]) for i in images] == rendered_alone(farm)


def test_a_gpu_that_hangs_is_given_up_and_its_worker_started_again(gpus):
    """A kernel never ends, in every life of the worker, in its second batch. Its images are rendered by the next life, which begins later each time."""
    farm = gpus
    farm.variables |= {"CUDASIM_FAULT": f"stuck:{kernels_before_loss(farm)}@0", "KILN_CUDA_PATIENCE_S": "5"}
    farm.up("--device", "cuda:0", "--batch", "2", "--placement", "resident")
    farm.submit("hangs", "a fox\n", "--seeds", 6)
    farm.wait_done("hangs")
    farm.assert_whole("hangs", 6)
    assert "a kernel hangs" in farm.log("worker-1") and farm.log("worker-1").count(" started ") > 1


def test_a_team_that_splits_passes_ends_when_one_of_its_gpus_hangs(new_loose_farm, tmp_path):
    """In its pass of the first picture, whose prompt is known from the warm-up, with a farm's patience. The task goes back with the reason,
    and the next worker renders it."""
    farm = new_loose_farm(speck.make(tmp_path / "base", is_distilled=False), name="base")
    farm.variables = TWO_GPUS
    team = ["--device", "cuda:0,1"]
    opened = kernels_of(farm, "opened", 1, "--connect", f"ipc://{farm.root}/nobody", "--model", farm.model, *team, "--batch", 1, "--spool",
                        farm.root / "spool", "--name", "opened", ends="model_hashed ")
    farm.coordinator()
    farm.submit("passes", "warm-up\n")
    farm.worker("hangs", *team, threads=2, batch=1, env={"CUDASIM_FAULT": f"stuck:{opened + 30}@1"})
    assert farm.wait_end("hangs") == 75
    assert "passes, because" in farm.log("hangs")
    (failed,) = [line for line in farm.log("coordinator").splitlines() if " task_failed " in line]
    assert "kind=retry" in failed and "device failed: cuda:1 " in failed and "the team has waited" in failed and "a kernel hangs" in failed
    assert farm.status("passes")["failed"] == 0
    farm.worker("well", *team, threads=2, batch=1)
    farm.wait_done("passes")
    assert [i["worker"] for i in farm.assert_whole("passes", 1)] == ["well"]


def test_two_gpus_are_two_renderers_or_a_team_and_it_says_why(gpus):
    """A renderer each where the model fits one; a team where only its share does, or where latency is preferred."""
    farm = gpus
    farm.model = f"pocket={POCKET}"

    def laid(*words, **variables):
        run = subprocess.run([BIN / "kiln-worker", "devices", "--json", "--model", farm.model, *words], capture_output=True, text=True,
                             env=environment(farm.home) | farm.variables | variables)
        lines = [json.loads(line) for line in run.stdout.splitlines()]
        assert run.returncode == 0 and len({line["why"] for line in lines}) == 1, run.stderr
        return [line["device"] for line in lines], lines[0]["why"]

    def gb(text):
        return float(text.split(" GB")[0].split()[-1])

    devices, why = laid()
    assert devices == ["cuda:0", "cuda:1"] and why.startswith("2 renderers, because pocket needs ")
    assert laid("--prefer", "latency") == (["cuda:0,1"], "1 team of two, because latency is preferred")
    farm.model = f"{'m' * 128}={POCKET}"
    assert laid()[0] == devices, "a name as long as workers take them"
    farm.model = f"pocket={POCKET}"
    assert laid("--prefer", "latency", CUDASIM_DEVICES="1") == (["cuda:0"], "1 renderer, because 1 GPU is no pair")
    for memory in range(int(gb(why) * 16 / 15 * 1000), int(gb(why) * 400), -10): # 1/16 is left to the driver
        devices, short = laid(CUDASIM_VRAM_MB=str(memory))
        if devices != ["cuda:0", "cuda:1"]:
            break
    assert devices == ["cuda:0,1"] and short.startswith(f"1 team of two, because pocket needs {gb(why):.1f} GB of"), short
    assert "accepted are throughput, latency, with --device cuda" in farm.up("--prefer", "latency", code=2).stderr


def test_two_gpus_share_a_model_and_neither_kill_9_nor_a_lost_device_loses_anything(gpus):
    """One worker, its process is killed once, and its second GPU is lost in its second or third picture of every life. A picture of a team is that of a
    team, whoever renders it."""
    farm = gpus
    farm.model = f"pocket={SHARED}"
    farm.variables["CUDASIM_FAULT"] = f"kernel:{kernels_before_loss(farm, 'cuda:0,1', gpu=1)}=cudaErrorECCUncorrectable@1"
    up = farm.up("--device", "cuda", "--prefer", "latency", "--batch", "1")
    assert "1 worker on cuda:0,1" in up.stdout
    assert ' device choice="1 team of two, because latency is preferred"' in farm.log("kiln")
    farm.submit("team", "prompt,seed\nfox,1\nowl,2\nfire,3\n", "--model", "pocket", suffix="csv")
    farm.wait_some_done("team")
    farm.wait_back("worker-1", farm.kill("worker-1"))
    farm.wait_done("team")
    images = farm.assert_whole("team", 3)
    assert "device lost" in farm.log("worker-1")
    del farm.variables["CUDASIM_FAULT"]
    out = farm.root / "owl.png"
    run = subprocess.run([BIN / "kiln-worker", "render", "--model", SHARED, "--prompt", "owl", "--seed", "2", "--size", "64x64", "--steps", "1",
                          "--device", "cuda:0,1", "--out", out], capture_output=True, text=True, env=environment(farm.home) | farm.variables)
    assert run.returncode == 0, run.stderr
    assert pixels(next(i["path"] for i in images if i["prompt"] == "owl")) == pixels(out)
