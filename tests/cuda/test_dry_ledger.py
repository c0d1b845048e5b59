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
PEAKS = {"rtx4090": (330.3e12, 165.2e12, 82.6e12, 1008e9, 16e9 * 16 / 8 * 128 / 130)} # fp8, bf16, f32, bytes, bytes from the host
SIZES = ("512x512", "1024x1024", "1536x1536")
MARGIN = 1.02 # of a plan
OUTSIDE = 1.05 # times the least, of a step's bytes outside of products
LAUNCH_S, GRAPH_LAUNCH_S = 3.8e-6, 3.4e-6
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


def host_launches(lines):
    return sum(line["op"] == "graph_launch" or is_launch(line) and "graph" not in line for line in lines)


def is_product(line):
    return any(line["name"].lstrip("(").startswith(name) for name in PRODUCTS)


def is_fp8(line):
    return line["name"].startswith("cublasLtMatmul fp8")


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


def phase_s(lines):
    """each launch at its limit; copies from the host meanwhile"""
    fp8, bf16, f32, bandwidth, link = PEAKS["rtx4090"]
    launches = sum(max(line["flops"] / (fp8 if is_fp8(line) else bf16 if line["tensor_core"] else f32), line["bytes"] / bandwidth, GRAPH_LAUNCH_S if "graph" in line else LAUNCH_S)
                   for line in filter(is_launch, lines))
    return max(launches, sum(line["bytes"] for line in lines if line.get("name") == "HostToDevice") / link)


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

    def test_a_step_is_three_launches_of_the_host(self):
        for step in self.steps:
            asked = [line for line in step if line["op"] == "graph_launch" or is_launch(line) and "graph" not in line]
            self.assertEqual([line.get("name", line["op"]).split("<")[0].lstrip("(") for line in asked],
                             ["DeviceToDevice", "graph_launch", "elementwise_kernel"], "modulations of the step, the model, Euler")
            self.assertEqual(asked[1]["nodes"], sum(is_launch(line) and "graph" in line for line in step))
        self.assertEqual(len({line["graph"] for step in self.steps for line in step if "graph" in line}), 1, "one graph serves all")
        self.assertEqual(self.report["step_host_launches_max"], 3)
        self.assertEqual(self.phase("step")["host_launches"], 15)
        self.assertEqual(self.phase("prompt")["host_launches"], host_launches(next(lines for name, lines in self.phases if name == "prompt")))

    def test_layers_from_the_host_and_the_switch_go_without_graphs(self):
        for words, environment in ((("--placement", "streamed"), {}), ((), {"KILN_CUDA_GRAPHS": "off"})):
            report = render("rtx4090", POCKET, "--size", "64x64", *words, **environment)[1]
            self.assertEqual(report["step_host_launches_max"], report["step_launches_max"])
        code, _, said, _ = render("rtx4090", POCKET, "--size", "64x64", KILN_CUDA_GRAPHS="perhaps")
        self.assertEqual(code, 2)
        self.assertIn("KILN_CUDA_GRAPHS='perhaps', accepted: on, off", said)

    def test_inside_a_step_the_host_never_waits_copies_or_allocates(self):
        for number, step in enumerate(self.steps):
            waits = [i for i, line in enumerate(step) if line["op"] == "host_wait"]
            others = [line for line in step if line["op"] in ("malloc", "free", "memset") or line.get("name") in ("HostToDevice", "DeviceToHost")]
            self.assertEqual(waits, [len(step) - 1], f"the one wait ends step {number}")
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
        for report, phases in ((self.report, self.phases), render("rtx4090", POCKET, "--size", "64x64", "--placement", "streamed")[1::2]):
            seconds = sum(phase_s(lines) for name, lines in phases if name in ("prompt", "step", "decode"))
            self.assertAlmostEqual(report["computed_s"] / seconds, 1, places=9)

    def test_pictures_of_the_shape_that_was_planned_allocate_nothing_and_share_their_graphs(self):
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as prompts:
            prompts.write("a\nb\nc\nd\n")
            prompts.flush()
            done = subprocess.run([worker, "render", "--device", "dry:h100", "--model", POCKET, "--prompt-file", prompts.name, "--seed", "1",
                                   "--size", "256x256", "--trace", prompts.name + ".trace"], capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)
            trace = pathlib.Path(prompts.name + ".trace")
            pictures = trace.read_text().split('"name":"prompt"}')[1:]
            trace.unlink()
        self.assertEqual([p.count('"op":"malloc"') for p in pictures], [0, 0, 0, 0])
        graphs = [[json.loads(line)["graph"] for line in p.splitlines() if '"op":"graph_launch"' in line] for p in pictures]
        self.assertEqual([graphs[0]] * 4, graphs)
        self.assertEqual((len(graphs[0]), len(set(graphs[0]))), (5, 2), "four steps and the decoder")


class Refusals(unittest.TestCase):
    def test_what_does_not_fit_is_refused_with_the_numbers(self):
        words = ("--size", "256x256", "--placement", "resident")
        whole = render("rtx4090", POCKET, *words)[1]
        need = whole["plan_bytes"] - whole["other_bytes"]
        enough = (int(whole["other_bytes"] + need * MARGIN) >> 20) + 1
        code, report, said, phases = render("rtx4090", POCKET, *words, CUDASIM_VRAM_MB=str(enough - 2))
        self.assertEqual((code, report), (2, None))
        self.assertIn(f"does not fit: resident {need / 1e9:.2f} GB", said)
        self.assertIn(f"left of {(enough - 2 << 20) / 1e9:.2f}", said)
        self.assertLess(sum(line["op"] == "malloc" for _, lines in phases for line in lines), 5, "nothing was loaded")
        self.assertEqual(render("rtx4090", POCKET, *words, CUDASIM_VRAM_MB=str(enough))[0], 0)

    def test_an_unknown_device_is_answered_with_the_known_ones(self):
        code, _, said, _ = render("gtx1080", POCKET, "--size", "256x256")
        self.assertEqual(code, 2)
        self.assertIn("dry:h100 dry:rtx4090 dry:rtx3090 dry:rtx4070ti", said)

    def test_options_that_need_values_or_a_ledger_are_refused(self):
        for words, want in ((["--dump", "x.safetensors"], "no values"), (["--device", "cpu", "--out", "x.png"], "--trace needs")):
            code, _, said, _ = render("h100", POCKET, "--size", "256x256", *words)
            self.assertEqual(code, 2)
            self.assertIn(want, said)


QUANTISED = {"klein-9b-fp8": ("klein-9b", "fp8"), "klein-4b-nvfp4": ("klein-4b", "nvfp4"), "klein-4b-q4": ("klein-4b", "Q4_K")}


class FullSize(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        for name, (family, format) in ({f: (f, "bf16") for f in hollow_klein.FAMILIES} | QUANTISED).items():
            subprocess.run([ROOT / "tests/bench/hollow_klein.py", pathlib.Path(cls.folder.name, name), "--family", family, "--format", format],
                           check=True, stdout=subprocess.DEVNULL) # in a process of their own: the shapes are globals there

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def block_values(self, family):
        h, doubles, singles, _ = dimensions(pathlib.Path(self.folder.name, family))
        return (doubles * 26 + singles * 13) * h * h

    def look(self, device, family, size="1024x1024", *words):
        return render(device, pathlib.Path(self.folder.name, family), "--size", size, *words)

    def test_flops_are_those_of_the_formula(self):
        for family in hollow_klein.FAMILIES:
            code, report, said, _ = self.look("h100", family)
            self.assertEqual(code, 0, said)
            step = next(p for p in report["phases"] if p["phase"] == "step")
            self.assertEqual(step["tensor_core_flops"], 4 * step_flops(pathlib.Path(self.folder.name, family), 1024 * 1024))
            self.assertGreater(report["tensor_core_share"], 0.999)

    def test_the_peak_is_what_was_planned_and_steps_neither_allocate_nor_stall(self):
        for family in hollow_klein.FAMILIES:
            for size in SIZES:
                for placement in ("resident", "phases", "streamed"):
                    report = self.look("h100", family, size, "--placement", placement)[1]
                    steps = next(p for p in report["phases"] if p["phase"] == "step")
                    what = family, size, placement
                    self.assertEqual(report["placement"], placement)
                    self.assertEqual((steps["allocations"], report["step_late_stalls"]), (0, 0), what)
                    self.assertLessEqual(report["step_bytes_outside_products"], OUTSIDE * report["step_bytes_outside_products_least"], what)
                    self.assertLessEqual(report["peak_bytes"], MARGIN * report["plan_bytes"], what)
                    self.assertGreaterEqual(report["peak_bytes"], report["plan_bytes"] / MARGIN, what)

    def test_quantised_weights_are_planned_as_they_are(self):
        for name in QUANTISED:
            for placement, device, precision in (("resident", "h100", "bf16"), ("phases", "h100", "bf16"), ("streamed", "h100", "bf16"),
                                                 ("resident", "h100", "fp8"), ("resident", "rtx3090:80", "fp8"), ("streamed", "h100", "fp8")):
                if precision == "fp8" and not name.endswith("fp8"):
                    continue
                report = self.look(device, name, "1024x1024", "--placement", placement, "--precision", precision)[1]
                self.assertEqual((report["placement"], report["step_late_allocations"]), (placement, 0))
                self.assertLessEqual(report["peak_bytes"], MARGIN * report["plan_bytes"], (name, placement, device, precision))
                self.assertGreaterEqual(report["peak_bytes"], report["plan_bytes"] / MARGIN, (name, placement, device, precision))

    def test_inspect_tells_what_the_plan_needs(self):
        for name in ("klein-4b", "klein-9b-fp8"):
            told = json.loads(subprocess.run([worker, "inspect", "--quick", "--json", pathlib.Path(self.folder.name, name)], capture_output=True,
                                             text=True, check=True).stdout)["gpu_bytes"]
            for placement in ("resident", "phases", "streamed"):
                report = self.look("h100", name, "1024x1024", "--placement", placement)[1]
                self.assertAlmostEqual(told["image"][placement], MARGIN * (report["plan_bytes"] - report["other_bytes"]), delta=2)
                self.assertGreater(told["edit"][placement], told["image"][placement])

    def test_decoding_reads_each_code_once_a_step_and_writes_bf16(self):
        reports = [self.look("h100", name, "1024x1024")[1] for name in ("klein-9b", "klein-9b-fp8")]
        self.assertEqual([r["step_bytes_recoding"] for r in reports], [0, (1 + 2) * self.block_values("klein-9b")])
        self.assertEqual(*(r["step_bytes_outside_products"] for r in reports))

    def test_products_in_fp8_are_counted_at_their_rate_and_decode_nothing(self):
        model = pathlib.Path(self.folder.name, "klein-9b-fp8")
        h, doubles, singles, _ = dimensions(pathlib.Path(self.folder.name, "klein-9b"))
        rows, values = TEXT + 4096, self.block_values("klein-9b")
        rounded = rows * h * (6 * doubles + 5 * singles) # a step's rows before products: qkv, out, mlp in 3 h, its end 3 h; h, 4 h
        _, report, said, phases = self.look("rtx4090", model, "1024x1024", "--precision", "fp8")
        self.assertNotIn("FP8", said)
        self.assertEqual(report["step_bytes_recoding"], (2 + 1) * rounded)
        steps = [[line for line in lines if is_launch(line)] for name, lines in phases if name == "step"]
        self.assertEqual(sum(line["flops"] for line in steps[0] if is_fp8(line)), (doubles + singles) * 26 * h * h * rows)
        self.assertAlmostEqual(report["computed_s"] / sum(phase_s(lines) for name, lines in phases if name in ("prompt", "step", "decode")), 1, places=9)
        _, report, said, phases = self.look("rtx3090:80", model, "1024x1024", "--precision", "fp8") # it has no units for FP8
        self.assertIn("has no units for FP8; the same numbers are multiplied in wider ones", said)
        self.assertEqual(report["step_bytes_recoding"], (2 + 2) * rounded + (1 + 2) * values)
        self.assertFalse(any(is_fp8(line) for _, lines in phases for line in lines if "name" in line))

    def test_a_team_of_two_halves_the_work_and_sums_what_the_plan_says(self):
        """engine-spec 10: bytes a step of klein at 1024x1024; both streams of a double block in one sum, each sum in two parts, so that it runs
        beside products. 9B in bf16 fits two cards of 12 GB."""
        planned = {"klein-4b": (849346560, 2 * (2 * 5 + 20)), "klein-9b": (1509949440, 2 * (2 * 8 + 24))}
        for family, (sum_bytes, sums) in planned.items():
            folder = pathlib.Path(self.folder.name, family)
            code, report, said, _ = self.look("rtx4070ti:12,rtx4070ti:12", family)
            self.assertEqual(code, 0, said)
            phases = {p["phase"]: p for p in report["phases"]}
            step, io = phases["step"], 2 * 2 * dimensions(folder)[3] * dimensions(folder)[0] * 4096
            self.assertEqual((step["rank_sums"], step["rank_sum_bytes"]), (4 * sums, 4 * sum_bytes))
            self.assertAlmostEqual(step["rank_sum_s"], step["rank_sum_bytes"] / 31.5e9, delta=1e-3)
            self.assertLess(step["rank_sum_wait_s"], 0.1 * step["rank_sum_s"])
            self.assertEqual(step["tensor_core_flops"], 4 * ((step_flops(folder, 1024 * 1024) - io) / 2 + io))
            self.assertEqual((step["allocations"], report["step_late_stalls"]), (0, 0))
            self.assertEqual(report["placement"], "resident" if family == "klein-4b" else "phases")
            self.assertTrue(report["fits"])
            self.assertLessEqual(report["peak_bytes"], MARGIN * report["plan_bytes"])
        prompt = phases["prompt"]
        self.assertEqual((prompt["rank_sums"], prompt["rank_sum_bytes"]), (2 * 2 * 27, 226492416)) # in parts, beside products
        self.assertLess(prompt["rank_sum_wait_s"], 0.3 * prompt["rank_sum_s"])
        _, _, _, ledger = self.look("rtx4090:24,rtx4090:24", "klein-9b-fp8") # here each part would decode the matrices again
        self.assertEqual(sum(line["op"] == "collective" for name, lines in ledger if name == "prompt" for line in lines), 2 * 27)

    def test_two_cards_are_two_renderers_where_the_model_fits_one_and_a_team_where_its_share_does(self):
        laid = {}
        for family in ("klein-4b", "klein-9b", "klein-9b-fp8"):
            for memory in (8, 12, 16, 24):
                done = subprocess.run([worker, "devices", "--json", f"dry:rtx4090:{memory},rtx4090:{memory}", "--model",
                                       f"{family}={pathlib.Path(self.folder.name, family)}"], capture_output=True, text=True)
                self.assertEqual(done.returncode, 0, done.stderr)
                why = json.loads(done.stdout.splitlines()[0])["why"]
                self.assertRegex(why, f"because {family} needs [0-9.]+ GB of {memory * 1.073741824:.1f}")
                laid[family, memory] = "team" if "team" in why else "streamed" if "bring" in why else "renderers"
        self.assertEqual([[laid[family, memory] for memory in (8, 12, 16, 24)] for family in ("klein-4b", "klein-9b", "klein-9b-fp8")],
                         [["team", "renderers", "renderers", "renderers"], ["streamed", "team", "team", "renderers"],
                          ["team", "renderers", "renderers", "renderers"]])

    def test_a_base_model_has_a_pass_on_each_of_two_cards_that_hold_it(self):
        """Then the two velocities are all that is moved, 2 MiB a step; else the weights are split, and both passes are summed."""
        for family, memory, split in (("klein-4b", 12, "passes"), ("klein-9b", 24, "passes"), ("klein-9b", 12, "weights")):
            folder = pathlib.Path(self.folder.name, family)
            code, report, said, _ = self.look(f"rtx4090:{memory},rtx4090:{memory}", family, "1024x1024", "--base", "--transformer",
                                              folder / "transformer", "--steps", "3")
            self.assertEqual(code, 0, said)
            self.assertIn(f"split={split}, because all of the model", said)
            step = next(p for p in report["phases"] if p["phase"] == "step")
            self.assertEqual(report["placement"], "phases")
            self.assertLessEqual(report["peak_bytes"], MARGIN * report["plan_bytes"])
            self.assertEqual((step["allocations"], report["step_late_stalls"]), (0, 0))
            self.assertEqual(step["rank_sum_bytes"], 3 * (2 * 4096 * 128 * 2 if split == "passes" else 2 * 1509949440))
            if split == "passes":
                self.assertEqual((step["rank_sums"], step["tensor_core_flops"]), (3, 3 * step_flops(folder, 1024 * 1024)))

    def test_a_batch_is_planned_as_well(self):
        for placement in ("resident", "phases", "streamed"):
            report = self.look("h100", "klein-4b", "1024x1024", "--placement", placement, "--batch", "8")[1]
            self.assertLessEqual(report["peak_bytes"], MARGIN * report["plan_bytes"])
            self.assertGreaterEqual(report["peak_bytes"], report["plan_bytes"] / MARGIN)

    def test_noise_is_drawn_while_the_pictures_before_are_computed(self):
        phases = self.look("h100", "klein-4b", "1024x1024", "--batch", "3")[3] # groups of one picture
        steps = [[line["op"] if line["op"] == "graph_launch" else line["name"] for line in lines
                  if line["op"] == "graph_launch" or line.get("name") == "HostToDevice"] for name, lines in phases if name == "step"]
        self.assertEqual(steps[0], ["graph_launch", "HostToDevice"] * 2 + ["graph_launch"])
        self.assertEqual(steps[1:], [["graph_launch"] * 3] * 3)

    def test_a_prompt_takes_few_copies(self):
        report = self.look("h100", "klein-4b")[1] # a copy waits for the one two before it
        self.assertLess(next(p for p in report["phases"] if p["phase"] == "prompt")["copies"], 20)

    def test_references_are_planned_as_well(self):
        reference = ROOT / "tests/golden/edit-two/reference-0.png"
        for placement in ("resident", "streamed"):
            report = self.look("h100", "klein-4b", "1024x1024", "--placement", placement, "--image", reference, "--image", reference)[1]
            self.assertLessEqual(report["peak_bytes"], MARGIN * report["plan_bytes"])
            self.assertGreaterEqual(report["peak_bytes"], report["plan_bytes"] / MARGIN)

    def test_what_fits_where(self):
        for device, family, size, placement in (
                ("rtx4090:16", "klein-4b", "1024x1024", "resident"), ("rtx4070ti", "klein-4b", "1024x1024", "phases"),
                ("rtx4090", "klein-4b", "1536x1536", "resident"), ("rtx4090:16", "klein-4b", "1536x1536", "phases"),
                ("rtx4070ti", "klein-4b", "1536x1536", "phases"), ("rtx4090", "klein-9b", "1024x1024", "phases"),
                ("rtx4090", "klein-9b", "1536x1536", "phases"), ("rtx4090:16", "klein-9b", "1024x1024", "streamed"),
                ("rtx4070ti", "klein-9b", "1536x1536", "streamed"), ("h100", "klein-9b", "1536x1536", "resident"),
                ("rtx4090:16", "klein-9b-fp8", "1024x1024", "resident"), ("rtx4070ti", "klein-9b-fp8", "1024x1024", "phases"),
                ("rtx4090", "klein-9b-fp8", "1536x1536", "resident"), ("rtx4090:8", "klein-4b-nvfp4", "1024x1024", "resident"),
                ("rtx4090:8", "klein-4b-q4", "1024x1024", "resident")):
            code, report, said, _ = self.look(device, family, size)
            self.assertEqual((code, report["fits"], report["placement"]), (0, True, placement), (device, family, size, said))
            self.assertLessEqual(report["plan_bytes"], report["memory_bytes"])
        code, report, said, _ = self.look("rtx4090:2", "klein-9b")
        self.assertEqual((code, report), (2, None))
        self.assertRegex(said, r"resident \S+ GB .* phases \S+ GB .* streamed \S+ GB .* left of 2.15")

    def test_the_text_encoder_comes_once_for_a_batch_of_prompts(self):
        model, came = pathlib.Path(self.folder.name, "klein-4b"), []
        for count in (1, 16):
            with tempfile.NamedTemporaryFile("w", suffix=".txt") as prompts:
                prompts.write("".join(f"prompt {i}\n" for i in range(count)))
                prompts.flush()
                done = subprocess.run([worker, "render", "--device", "dry:rtx4070ti", "--model", model, "--prompt-file", prompts.name, "--seed", "1",
                                       "--size", "512x512", "--batch", "16", "--json"], capture_output=True, text=True)
            report = json.loads(done.stdout)
            self.assertEqual(report["placement"], "phases")
            came.append(next(p for p in report["phases"] if p["phase"] == "prompt")["host_bytes"])
        self.assertLess(came[1], 1.03 * came[0]) # embeddings of tokens, noise

    def test_layers_come_from_the_host_once_a_pass(self):
        streamed = self.look("h100", "klein-9b", "1024x1024", "--placement", "streamed")[1]
        resident = self.look("h100", "klein-9b", "1024x1024", "--placement", "resident")[1]
        came = {p["phase"]: p["host_bytes"] for p in streamed["phases"]}
        self.assertEqual(came["step"], 4 * 2 * self.block_values("klein-9b"))
        text, more = came["prompt"], resident["plan_bytes"] - streamed["plan_bytes"]
        self.assertAlmostEqual((text + came["step"] / 4 - more) / more, 0, delta=0.06) # less the seats in the arena
        coded = self.look("h100", "klein-9b-fp8", "1024x1024", "--placement", "streamed")[1]
        self.assertEqual(next(p for p in coded["phases"] if p["phase"] == "step")["host_bytes"], 4 * self.block_values("klein-9b"))

    def test_passes_of_guidance_run_in_turn_where_they_do_not_fit_together(self):
        distilled, base = (pathlib.Path(self.folder.name, name) for name in ("klein-4b", "klein-4b-base"))
        base.mkdir()
        for part in distilled.iterdir():
            (base / part.name).symlink_to(part)
        (base / "model_index.json").unlink()
        (base / "model_index.json").write_text((distilled / "model_index.json").read_text().replace('"is_distilled": true', '"is_distilled": false'))
        reports = [render("rtx4090", base, "--size", "1024x1024", "--steps", "4", "--placement", "streamed", CUDASIM_VRAM_MB=mb)[1]
                   for mb in ("4000", "2650")]
        self.assertEqual([(r["placement"], r["passes"]) for r in reports], [("streamed", "together"), ("streamed", "in_turn")])
        steps = [next(p for p in r["phases"] if p["phase"] == "step") for r in reports]
        self.assertEqual([s["host_bytes"] for s in steps], [4 * 2 * self.block_values("klein-4b"), 2 * 4 * 2 * self.block_values("klein-4b")])
        for report, step in zip(reports, steps):
            self.assertEqual(step["tensor_core_flops"], 2 * 4 * step_flops(distilled, 1024 * 1024))
            self.assertEqual((step["allocations"], report["step_late_stalls"]), (0, 0))
            self.assertLessEqual(report["peak_bytes"], MARGIN * report["plan_bytes"])
        self.assertLess(reports[1]["plan_bytes"], reports[0]["plan_bytes"])
        self.assertEqual(self.look("h100", "klein-4b")[1]["passes"], "one")

    def test_blocks_that_fit_stay_on_the_device(self):
        bytes_of_all, came = 2 * self.block_values("klein-9b"), []
        for device in ("rtx4090:8", "rtx4090:12", "rtx4090:16"):
            report = self.look(device, "klein-9b", "1024x1024")[1]
            self.assertEqual((report["placement"], report["step_late_allocations"]), ("streamed", 0))
            self.assertLessEqual(report["peak_bytes"], report["memory_bytes"])
            self.assertLessEqual(report["peak_bytes"], MARGIN * report["plan_bytes"])
            came.append(next(p for p in report["phases"] if p["phase"] == "step")["host_bytes"] / 4)
            self.assertAlmostEqual((report["memory_bytes"] - report["plan_bytes"]) / 1e9, 0.3, delta=0.7) # a block takes 0.4 to 0.9
        self.assertLess(came[0], 0.85 * bytes_of_all)
        self.assertLess(came[2], 0.3 * bytes_of_all)
        self.assertLess(came[1], came[0])

    def test_weights_take_no_memory_of_this_machine(self):
        self.look("h100", "klein-9b", "1536x1536")
        self.assertLess(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, 300 << 10, "KB")


if __name__ == "__main__":
    worker = str(pathlib.Path(sys.argv.pop(1)).resolve())
    unittest.main(verbosity=2)
