"""A farm of real processes for one test: programs, database, folders, and the questions tests ask.

    Farm        as a user has it: `kiln up` on a home of its own, everything supervised
    LooseFarm   a coordinator, workers and a PostgreSQL that the test itself starts, kills and starts again

Everything lives in one folder under /tmp, which the postgres user can reach; close() ends what runs and removes it.
Nothing waits for a fixed time: tests wait for conditions, with limits that only a broken program reaches."""

import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ.get("KILN_BIN", ROOT / "build/release/bin"))
PG_SERVER = ROOT / "tests/sql/pg_server"
PARTI = ROOT / "tests/system/data/PartiPrompts.tsv"
POCKET = ROOT / "engine/pocket/model"
PATIENCE_S = 180


def wait_until(condition, what, limit_s=PATIENCE_S, pause_s=0.1):
    """Returns the condition's first true value; a failed assertion that says what was waited for. what: a text, or a function
    that makes it at the end, when it says how far things came."""
    until = time.monotonic() + limit_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < until, f"after {limit_s} s still not: {what() if callable(what) else what}"
        time.sleep(pause_s)


def sha256(path):
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def is_alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def environment(home):
    """What programs of a test see: nothing of the caller's database, nothing of the caller's farm."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "KILN_"))}
    return kept | {"KILN_HOME": str(home)}


class Base:
    """What both kinds share: a folder, `kiln` commands and their answers."""

    alive = []  # farms whose logs a failed test shows

    def __init__(self):
        self.root = pathlib.Path(tempfile.mkdtemp(prefix="kiln-sys-", dir="/tmp"))
        self.root.chmod(0o755)
        self.home = self.root / "home"
        self.words = []
        self.variables = {}  # of the environment, for all programs
        Base.alive.append(self)

    # --- commands

    def run(self, *words, stdin=None, code=0, limit_s=PATIENCE_S):
        """Runs `kiln WORDS`. code: the exit code that is right, or a list of them, or None for any."""
        run = subprocess.run([BIN / "kiln", *map(str, words), *self.words], input=stdin, capture_output=True,
                             env=environment(self.home) | self.variables, timeout=limit_s, text=not isinstance(stdin, bytes), cwd=self.root)
        if isinstance(stdin, bytes):
            run.stdout, run.stderr = run.stdout.decode(), run.stderr.decode()
        codes = code if isinstance(code, list) else [code]
        assert code is None or run.returncode in codes, \
            f"kiln {' '.join(map(str, words))}: exit code {run.returncode}, want {code}\n{run.stdout}{run.stderr}"
        return run

    def lines(self, *words, **how):
        return [json.loads(line) for line in self.run(*words, "--json", **how).stdout.splitlines()]

    def refuses(self, *words, said, stdin=None):
        """The command ends with code 2, nothing on stdout and one sentence on stderr that has every part of `said`."""
        run = self.run(*words, code=2, stdin=stdin)
        assert run.stdout == "", run.stdout
        for part in [said] if isinstance(said, str) else said:
            assert part in run.stderr, f"'{part}' is not in: {run.stderr}"
        assert len(run.stderr.strip().splitlines()) == 1, run.stderr
        return run.stderr

    def file(self, name, content):
        path = self.root / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def submit(self, name, content, *words, suffix="txt", code=0):
        """Submits text as a file; small and quick unless words say otherwise. Returns the summary."""
        path = self.file(f"{name}.{suffix}", content)
        size = [] if "--size" in words else ["--size", "64x64"]
        steps = [] if "--steps" in words else ["--steps", "1"]
        run = self.run("submit", path, "--campaign", name, *size, *steps, *words, "--json", code=code)
        return json.loads(run.stdout.splitlines()[0]) if run.stdout else None

    # --- answers

    def status(self, name):
        (line,) = self.lines("status", name)
        return line

    def status_or_none(self, name):
        """As status; None while the database is away."""
        run = self.run("status", name, "--json", code=[0, 75])
        return json.loads(run.stdout) if run.returncode == 0 else None

    def wait_for(self, name, limit_s=PATIENCE_S, **wanted):
        def reached():
            status = self.status_or_none(name)
            return status if status and all(status[k] == v for k, v in wanted.items()) else None
        return wait_until(reached, lambda: f"campaign {name} is {wanted}, but {self.run('status', name, code=None).stdout}", limit_s)

    def wait_done(self, name, limit_s=PATIENCE_S):
        def finished():
            status = self.status_or_none(name)
            return status if status and status["total"] and status["done"] + status["failed"] == status["total"] else None
        return wait_until(finished, lambda: f"campaign {name} is finished, but {self.run('status', name, code=None).stdout}", limit_s)

    def wait_some_done(self, name, count=1, limit_s=PATIENCE_S):
        return wait_until(lambda: (self.status_or_none(name) or {"done": -1})["done"] >= count, f"{count} images of {name}", limit_s, 0.03)

    def images(self, name):
        return self.lines("images", name)

    def folder(self, name):
        return self.home / "images" / name

    def files(self, name):
        return sorted(p.name for p in self.folder(name).iterdir() if not p.name.startswith("."))

    def staged(self, name):
        folder = self.folder(name) / ".staging"
        return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []

    def assert_whole(self, name, total):
        """Every promise about a finished campaign: counters, rows, files, hashes, audit. A file gets its official name a moment
        after the commit, which is waited for."""
        status = self.status(name)
        assert (status["total"], status["done"], status["failed"], status["ready"], status["running"]) == (total, total, 0, 0, 0)
        images = self.images(name)
        assert len(images) == total
        assert len({i["path"] for i in images}) == len({i["task"] for i in images}) == total
        wait_until(lambda: all(os.path.exists(i["path"]) for i in images), "every file has its official name")
        for image in images:
            assert sha256(image["path"]) == image["sha256"], image
            assert os.path.getsize(image["path"]) == image["bytes"], image
        folders = {os.path.dirname(i["path"]) for i in images}
        on_disk = {os.path.join(f, n) for f in folders for n in os.listdir(f) if not n.startswith(".")}
        assert on_disk == {i["path"] for i in images}
        audit = self.run("audit", name)
        assert "clean" in audit.stdout, audit.stdout
        return images

    # --- when a test fails

    def show(self):
        """The ends of all logs of this farm."""
        text = []
        for log in sorted(self.root.rglob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-40:]
            text.append(f"--- {log} ---\n" + "\n".join(lines))
        return "\n".join(text)

    def forget(self):
        Base.alive.remove(self)
        subprocess.run(f"umount -q {self.root}/disk* 2>/dev/null", shell=True)
        shutil.rmtree(self.root, ignore_errors=True)


class Farm(Base):
    """`kiln up` on a home of its own."""

    def __init__(self, model, name="speck"):
        super().__init__()
        self.model = f"{name}={model}"

    def up(self, *words, code=0):
        return self.run("up", "--model", self.model, "--detach", *words, code=code)

    def down(self, *words, code=0):
        return self.run("down", *words, code=code)

    def pid(self, name):
        return int((self.home / "run" / f"{name}.pid").read_text())

    def pid_or_0(self, name):
        try:
            return self.pid(name)
        except (OSError, ValueError):
            return 0

    def kill(self, name, number=signal.SIGKILL):
        """kill -9 is heard a moment later: until then the process holds its locks."""
        pid = self.pid(name)
        os.kill(pid, number)
        if number == signal.SIGKILL:
            wait_until(lambda: not is_alive(pid), f"{name} is dead", pause_s=0.01)
        return pid

    def wait_back(self, name, old_pid):
        """Until the supervisor has started it again."""
        def again():
            pid = self.pid_or_0(name)
            return pid if pid and pid != old_pid and is_alive(pid) else 0
        return wait_until(again, f"{name} was started again")

    def log(self, name):
        return (self.home / "log" / f"{name}.log").read_text(errors="replace")

    def close(self):
        try:
            self.run("down", code=None, limit_s=60)
        except subprocess.TimeoutExpired:
            pass
        for pid_file in (self.home / "run").glob("*.pid"):  # what `kiln down` did not end
            pid = self.pid_or_0(pid_file.stem)
            if pid and is_alive(pid) and str(self.home) in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace"):
                os.kill(pid, signal.SIGKILL)
        self.forget()


class Server:
    """A PostgreSQL by tests/sql/pg_server; each farm gets a database of its own in it."""

    def __init__(self):
        self.root = pathlib.Path(tempfile.mkdtemp(prefix="kiln-sys-pg-", dir="/tmp"))
        self.root.chmod(0o755)
        self.uri = self.control("start", "--owner", str(os.getpid()))
        self.count = 0

    def control(self, verb, *words):
        run = subprocess.run([PG_SERVER, verb, self.root / "cluster", *words], capture_output=True, text=True, timeout=PATIENCE_S,
                             env=environment(self.root))
        assert run.returncode == 0, f"pg_server {verb}: {run.stdout}{run.stderr}"
        return run.stdout.strip().splitlines()[-1] if run.stdout.strip() else ""

    def make_database(self):
        import psycopg
        self.count += 1
        name = f"farm_{self.count}"
        with psycopg.connect(self.uri, autocommit=True) as connection:
            connection.execute(f"create database {name}")
        return self.uri.replace(":///kiln?", f":///{name}?")

    def close(self):
        self.control("drop")
        shutil.rmtree(self.root, ignore_errors=True)


class LooseFarm(Base):
    """Programs without a supervisor: the test decides what runs, what dies and what comes back."""

    def __init__(self, model, server, name="speck", own_server=False):
        super().__init__()
        self.model = f"{name}={model}"
        self.server = Server() if own_server else server
        self.is_owner = own_server
        self.endpoint = f"ipc://{self.root}/socket"
        self.state_file = self.root / "coordinator.json"
        self.programs = {}  # name: (argv, environment, Popen)
        self.database = self.server.make_database()
        self.words = ["--database", self.database]

    # --- PostgreSQL

    def pg(self, verb, *words):
        """start, stop, restart; of a server that is this farm's alone."""
        assert self.is_owner, "this server is shared: make the farm with own_server=True"
        self.server.control(verb, *words)

    def sql(self, text, *values):
        import psycopg
        with psycopg.connect(self.database, autocommit=True, options="-c search_path=kiln") as connection:
            cursor = connection.execute(text, values or None)
            return cursor.fetchall() if cursor.description else None

    # --- programs

    def start(self, name, *argv, env=None):
        log = open(self.root / f"{name}.log", "ab")
        argv = [str(word) for word in argv]
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                   env=environment(self.home) | self.variables | (env or {}), cwd=self.root)
        log.close()
        self.programs[name] = (argv, env, process)
        return process

    def start_again(self, name):
        argv, env, process = self.programs[name]
        process.wait(timeout=PATIENCE_S)
        return self.start(name, *argv, env=env)

    def process(self, name):
        return self.programs[name][2]

    def coordinator(self, *words, wait=True, env=None):
        self.state_file.unlink(missing_ok=True)
        process = self.start("coordinator", BIN / "kiln-coordinator", "--bind", self.endpoint, "--database", self.database, "--migrate",
                             "--state-file", self.state_file, "--metrics-port", "0", *words, env=env)
        if wait:
            wait_until(lambda: self.state().get("database_state") == "up", "the coordinator has its database")
        return process

    def state(self):
        return json.loads(self.state_file.read_text()) if self.state_file.exists() else {}

    def worker(self, name, *words, env=None, threads=1, batch=4):
        return self.start(name, BIN / "kiln-worker", "--connect", self.endpoint, "--model", self.model, "--name", name,
                          "--spool", self.root / "spool", "--threads", threads, "--batch", batch, *words, env=env)

    def kill(self, name, number=signal.SIGKILL):
        self.process(name).send_signal(number)

    def wait_end(self, name):
        """Its exit code; -n for a signal."""
        return self.process(name).wait(timeout=PATIENCE_S)

    def log(self, name):
        return (self.root / f"{name}.log").read_text(errors="replace")

    def metrics_port(self, name):
        """Of a worker that was started with --metrics-port 0."""
        return int(wait_until(lambda: re.search(r"http://127\.0\.0\.1:(\d+)/metrics", self.log(name)), f"{name} names its page")[1])

    def page(self, port, path="/metrics"):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return answer.read().decode()

    def submit(self, name, content, *words, **how):
        model = [] if "--model" in words else ["--model", self.model.split("=")[0]]
        return super().submit(name, content, *model, *words, **how)

    def close(self):
        for _, _, process in self.programs.values():
            if process.poll() is None:
                process.kill()
                process.wait()
        if self.is_owner:
            self.server.close()
        self.forget()


def prompts(count, seed=0):
    """So many different prompts, the same for the same seed."""
    draw = random.Random(seed)
    words = "red blue old quiet tall broken paper glass fox lamp river tower garden winter morning letter horse boat".split()
    return [f"{i} {' '.join(draw.sample(words, 4))}" for i in range(count)]


def text_of(count, seed=0):
    return "\n".join(prompts(count, seed)) + "\n"


def metric(page, name, **labels):
    """The value of a series on a metrics page; None when it is not there."""
    wanted = {f'{k}="{v}"' for k, v in labels.items()}
    for line in page.splitlines():
        found = re.match(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$", line)
        if found and found[1] == name and wanted <= set((found[2] or "").split(",")):
            return float(found[3])
    return None
