"""`ops/gpu-check`, what the owner of a real GPU runs first, on the simulator. If this breaks, the first thing that owner sees is a
traceback, or a report that says "passed" of what did not run."""

import json
import os
import signal
import subprocess

import pytest

from farm import ROOT

pytestmark = pytest.mark.sim


def gpu_check(report, *words, **variables):
    return subprocess.run([ROOT / "ops/gpu-check", "--report", report, *words], capture_output=True, text=True, env=os.environ | variables)


def test_it_runs_to_its_report_on_the_simulator_and_says_so(tmp_path):
    run = gpu_check(tmp_path, "--simulator", "--short", CUDASIM_DEVICE="rtx4090")
    assert run.returncode == 0, run.stdout + run.stderr
    report, text = json.loads((tmp_path / "report.json").read_text()), (tmp_path / "report.txt").read_text()
    assert report["is_whole"] and "NOT WHOLE" not in text
    assert report["is_simulation"] and "THIS IS A SIMULATION" in text.splitlines()[0] and "THIS IS A SIMULATION" in run.stdout
    assert report["counts"]["fail"] == 0 and report["counts"]["pass"] >= 20
    assert {line["section"] for line in report["lines"]} == {"devices", "ops", "golden", "memory", "speed", "team"}
    for line in report["lines"]:
        assert f"{line['status']:9} {line['name']}" in text
        assert line["status"] != "skipped" or line["note"], "what is skipped has its reason"
    shares = {line["name"]: line["share"] for line in report["lines"] if line["section"] == "speed"}
    assert len(shares) > 30 and all(share is not None for share in shares.values()), "the peaks of an RTX 4090 are known"


def test_the_report_of_a_run_that_was_ended_has_what_was_found_and_says_so(tmp_path):
    """Hours may have gone into it."""
    run = subprocess.Popen([ROOT / "ops/gpu-check", "--report", tmp_path, "--simulator", "--short"], stdout=subprocess.PIPE, text=True, start_new_session=True)
    said = []
    for line in run.stdout:
        said.append(line)
        if line.startswith("  pass") and "== ops against the CPU\n" in said:
            break
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    report, text = json.loads((tmp_path / "report.json").read_text()), (tmp_path / "report.txt").read_text()
    assert not report["is_whole"] and "NOT WHOLE" in text.splitlines()[0]
    assert {line["section"] for line in report["lines"]} == {"devices", "ops"}


def test_what_fails_is_told_and_ends_with_code_1(tmp_path):
    run = gpu_check(tmp_path, "--simulator", "--short", CUDASIM_DEVICES="0")
    assert run.returncode == 1, run.stdout + run.stderr
    (line,) = json.loads((tmp_path / "report.json").read_text())["lines"]
    assert line["section"] == "devices" and line["status"] == "fail" and "no CUDA device" in line["note"]


@pytest.mark.parametrize("words, variables, said", [
    (["--simulator"], {"KILN_CUDA_MODULE": "/nowhere/module.so"}, "KILN_CUDA_MODULE=/nowhere/module.so: no such file"),
    (["--simulator"], {"KILN_BIN": "/nowhere/bin"}, "KILN_BIN=/nowhere/bin: no /nowhere/bin/kiln-worker, no "),
    (["--simulator", "--model", "/nowhere"], {}, "--model '/nowhere': no such folder"),
    (["--simulator", "--size", "big"], {}, "--size 'big': accepted is WxH"),
])
def test_what_it_cannot_begin_with_is_refused_with_a_sentence(tmp_path, words, variables, said):
    run = gpu_check(tmp_path, *words, **variables)
    assert run.returncode == 2 and said in run.stderr and not list(tmp_path.iterdir()), run.stderr
