#!/usr/bin/env python3
"""The ledger of a dry device against counts made here: from the trace, line by line, and from the model's dimensions.

    tests/cuda/test_dry_ledger.py build/sim/bin/kiln-worker

If this breaks, the table of memory, launches and times for GPUs that nobody here has is wrong, and a host wait, an allocation or a
launch may slip into every step of every picture unseen."""
import json, os, pathlib, resource, subprocess, sys, tempfile, unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/bench"))
import hollow_klein  # noqa: E402

POCKET = ROOT / "engine/pocket/model"
TEXT = 512
PRODUCTS = ("cublasLt", "gemm_", "flash_", "wide_", "plain_")
PEAKS = {"rtx4090": (165.2e12, 82.6e12, 1008e9), "h100": (989.4e12, 66.9e12, 3.35e12)} # bf16, f32, bytes
LAUNCH_S = 3.8e-6
worker = None


def render(device, model, *words, **environment):
    """(exit code, report or None, sentences on stderr, trace as phases [(name, lines)])"""
    with tempfile.TemporaryDirectory() as folder:
        trace = pathlib.Path(folder, "trace")
        done = subprocess.run([worker, "render", "--device", "dry:" + device, "--model", model, "--prompt", "a red fox", "--seed", "1",
                               "--trace", trace, "--json", *words], capture_output=True, text=True, env=os.environ | environment)
        phases = [("open", [])]
        for line in trace.read_text().splitlines() if trace.exists() else []:
            line = json.loads(line)
            if line["op"] == "mark":
                phases.append((line["name"], []))
            else:
                phases[-1][1].append(line)
        return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr, phases


def is_launch(line):
    return line["op"] in ("kernel", "library") or line.get("name") == "DeviceToDevice"


def is_product(line):
    return any(line["name"].lstrip("(").startswith(name) for name in PRODUCTS)


def dimensions(model):
    c = json.loads(pathlib.Path(model, "transformer/config.json").read_text())
    h = c["num_attention_heads"] * c["attention_head_dim"]
    return h, c["num_layers"], c["num_single_layers"], c["in_channels"]


def step_flops(model, pixels):
    """Each row meets 13 h^2 weights in a block of either kind; each pair of rows costs 4 h; tokens come in and go out."""
    h, doubles, singles, channels = dimensions(model)
    picture = pixels // 256
    rows = TEXT + picture
    return (doubles + singles) * (26 * h * h * rows + 4 * h * rows * rows) + 2 * 2 * channels * h * picture


def least_bytes(model, pixels):
    """bf16, one kernel between each two products; counted block by block."""
    h, doubles, singles, channels = dimensions(model)
    picture = pixels // 256
    rows = TEXT + picture
    values = 0
    for block in range(doubles + singles):
        values += rows * (2 * h if block == 0 else 4 * h)   # norm(x), and x += the branch before
        values += rows * 4 * h                              # q, k
        values += rows * 3 * 3 * h                          # gate, up, their product
        values += rows * 4 * h if block < doubles else 0    # x += attention, norm(x)
    return 2 * (values + picture * (3 * h + 3 * channels))


class Pocket(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.code, cls.report, cls.said, cls.phases = render("rtx4090", POCKET, "--size", "256x320", "--steps", "5")
        assert cls.code == 0, cls.said
        cls.steps = [lines for name, lines in cls.phases if name == "step"]

    def phase(self, name):
        return next(p for p in self.report["phases"] if p["phase"] == name)

    def test_every_step_launches_the_same(self):
        shapes = [[(line["name"], line.get("grid"), line["bytes"]) for line in step if is_launch(line)] for step in self.steps]
        self.assertEqual(len(shapes), 5)
        for shape in shapes[1:]:
            self.assertEqual(shape, shapes[0])
        self.assertEqual({self.report["step_launches_min"], self.report["step_launches_max"]}, {len(shapes[0])})
        self.assertEqual(self.phase("step")["launches"], 5 * len(shapes[0]))

    def test_inside_a_step_the_host_never_waits_copies_or_allocates(self):
        for number, step in enumerate(self.steps):
            waits = [i for i, line in enumerate(step) if line["op"] == "host_wait"]
            others = [line for line in step if line["op"] in ("malloc", "free", "memset") or line.get("name") in ("HostToDevice", "DeviceToHost")]
            if number > 0: # the first may make room for the shape
                self.assertEqual(waits, [len(step) - 1], "the one wait ends the step")
                self.assertEqual(others, [])
        self.assertEqual((self.report["step_late_allocations"], self.report["step_late_stalls"]), (0, 0))

    def test_flops_are_those_of_the_formula(self):
        want = step_flops(POCKET, 256 * 320)
        for step in self.steps:
            self.assertEqual(sum(line["flops"] for line in step if is_launch(line) and line["tensor_core"]), want)
        self.assertEqual(self.phase("step")["tensor_core_flops"], 5 * want)

    def test_nothing_but_products_is_on_tensor_cores(self):
        for name, lines in self.phases:
            for line in filter(is_launch, lines):
                self.assertEqual(line["tensor_core"], is_product(line), line["name"])

    def test_bytes_outside_products_are_counted_and_compared_with_the_least(self):
        outside = sum(line["bytes"] for line in self.steps[0] if is_launch(line) and not is_product(line))
        self.assertEqual(self.report["step_bytes_outside_products"], outside)
        self.assertEqual(self.report["step_bytes_outside_products_least"], least_bytes(POCKET, 256 * 320))
        self.assertGreater(outside, least_bytes(POCKET, 256 * 320))

    def test_the_peak_is_what_was_allocated(self):
        used = peak = self.report["context_bytes"]
        for _, lines in self.phases:
            for line in lines:
                charge = (line.get("bytes", 0) + 511) // 512 * 512
                used += charge if line["op"] == "malloc" else -charge if line["op"] == "free" else 0
                peak = max(peak, used)
        self.assertEqual(self.report["peak_bytes"], peak)
        self.assertEqual(used, self.report["context_bytes"], "all of it was given back")

    def test_times_follow_from_the_trace_and_the_peaks(self):
        bf16, f32, bandwidth = PEAKS["rtx4090"]
        seconds = 0
        for name, lines in self.phases:
            for line in filter(is_launch, lines if name in ("prompt", "step", "decode") else []):
                seconds += max(line["flops"] / (bf16 if line["tensor_core"] else f32), line["bytes"] / bandwidth, LAUNCH_S)
        self.assertAlmostEqual(self.report["computed_s"] / seconds, 1, places=9)

    def test_a_second_picture_of_the_shape_allocates_at_most_one_block(self):
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as prompts:
            prompts.write("a\nb\nc\nd\n")
            prompts.flush()
            done = subprocess.run([worker, "render", "--device", "dry:h100", "--model", POCKET, "--prompt-file", prompts.name, "--seed", "1",
                                   "--size", "256x256", "--trace", prompts.name + ".trace"], capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)
            trace = pathlib.Path(prompts.name + ".trace")
            pictures = trace.read_text().split('"name":"prompt"}')[1:]
            trace.unlink()
        self.assertEqual([p.count('"op":"malloc"') for p in pictures[2:]], [0, 0])
        self.assertLessEqual(pictures[1].count('"op":"malloc"'), 1)


class Refusals(unittest.TestCase):
    def test_what_does_not_fit_is_refused_with_the_numbers(self):
        code, report, said, _ = render("rtx4090", POCKET, "--size", "256x256", CUDASIM_VRAM_MB="540")
        self.assertEqual(code, 2)
        self.assertFalse(report["fits"])
        self.assertGreater(report["peak_bytes"], 540 << 20)
        self.assertIn(f"does not fit: {report['peak_bytes'] / 1e9:.2f} GB", said)
        self.assertIn("has 0.57 GB", said)
        enough = (report["peak_bytes"] >> 20) + 1
        self.assertEqual(render("rtx4090", POCKET, "--size", "256x256", CUDASIM_VRAM_MB=str(enough))[0], 0)

    def test_an_unknown_device_is_answered_with_the_known_ones(self):
        code, _, said, _ = render("gtx1080", POCKET, "--size", "256x256")
        self.assertEqual(code, 2)
        self.assertIn("dry:h100 dry:rtx4090 dry:rtx3090 dry:rtx4070ti", said)

    def test_options_that_need_values_or_a_ledger_are_refused(self):
        for words, want in ((["--dump", "x.safetensors"], "no values"), (["--device", "cpu", "--out", "x.png"], "--trace needs")):
            code, _, said, _ = render("h100", POCKET, "--size", "256x256", *words)
            self.assertEqual(code, 2)
            self.assertIn(want, said)


class FullSize(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        for family in hollow_klein.FAMILIES: # in a process of their own: the shapes are globals there
            subprocess.run([ROOT / "tests/bench/hollow_klein.py", pathlib.Path(cls.folder.name, family), "--family", family], check=True,
                           stdout=subprocess.DEVNULL)

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def look(self, device, family, size="1024x1024"):
        return render(device, pathlib.Path(self.folder.name, family), "--size", size)

    def test_flops_are_those_of_the_formula(self):
        for family in hollow_klein.FAMILIES:
            code, report, said, _ = self.look("h100", family)
            self.assertEqual(code, 0, said)
            step = next(p for p in report["phases"] if p["phase"] == "step")
            self.assertEqual(step["tensor_core_flops"], 4 * step_flops(pathlib.Path(self.folder.name, family), 1024 * 1024))
            self.assertGreater(report["tensor_core_share"], 0.999)

    def test_behind_the_first_step_nothing_is_allocated_and_nothing_stalls(self):
        for family in hollow_klein.FAMILIES:
            for size in ("512x512", "1024x1024", "1536x1536"):
                report = self.look("h100", family, size)[1]
                self.assertEqual((report["step_late_allocations"], report["step_late_stalls"]), (0, 0), (family, size))

    def test_a_prompt_takes_few_copies(self):
        report = self.look("h100", "klein-4b")[1] # a copy waits for the one two before it
        self.assertLess(next(p for p in report["phases"] if p["phase"] == "prompt")["copies"], 20)

    def test_what_fits_where(self):
        for device, family, fits in (("rtx4090", "klein-4b", True), ("rtx4070ti", "klein-4b", False), ("rtx4090", "klein-9b", False)):
            code, report, said, _ = self.look(device, family)
            self.assertEqual((code, report["fits"]), (0 if fits else 2, fits), said)

    def test_weights_take_no_memory_of_this_machine(self):
        self.look("h100", "klein-9b", "1536x1536")
        self.assertLess(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, 300 << 10, "KB")


if __name__ == "__main__":
    worker = str(pathlib.Path(sys.argv.pop(1)).resolve())
    unittest.main(verbosity=2)
