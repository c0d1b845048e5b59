"""`kiln up` and `kiln down`: one command starts everything, what dies comes back, stopping loses nothing.

If this breaks, the two commands of the README do not work, or a farm cannot be stopped, or a second one eats the first."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

import pytest

from farm import BIN, environment, is_alive, text_of, wait_until

PROGRAMS = ["kiln", "postgres", "coordinator", "worker-1"]


def test_up_starts_everything_and_down_ends_everything(new_farm):
    """Nothing stays behind: no process, no lock that keeps the next `kiln up` out."""
    farm = new_farm()
    farm.up()
    pids = [farm.pid(name) for name in PROGRAMS]
    assert all(is_alive(pid) for pid in pids)
    assert farm.lines("workers")[0]["models"]
    farm.down()
    wait_until(lambda: not any(is_alive(pid) for pid in pids), "all programs ended", 30)
    farm.run("status", code=75)
    farm.down(code=[0, 2])


def test_an_up_that_was_killed_while_it_made_the_database_is_simply_repeated(new_farm):
    """The initdb of the one before is still ending, and throws away what it made, when the next one begins."""
    farm = new_farm()
    for number in range(4):
        up = subprocess.Popen([BIN / "kiln", "up", "--model", farm.model], env=environment(farm.home), stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
        parts = ["", "PG_VERSION", "global/pg_control", "base/4"]  # as they appear
        wait_until(lambda: list(farm.home.glob("postgres.new*/" + parts[number])), "initdb has come so far", pause_s=0.005)
        up.kill()
        up.wait()
    farm.up()
    farm.submit("first", "fox\n", "--wait")
    farm.assert_whole("first", 1)
    farm.down()
    farm.up()
    assert not list(farm.home.glob("postgres.new*"))


def test_a_second_up_on_the_same_home_is_refused(farm):
    """Two supervisors of one database would each start what the other stops."""
    pid = farm.pid("kiln")
    run = farm.up(code=2)
    assert "already running" in run.stderr and str(pid) in run.stderr
    assert farm.pid("kiln") == pid and is_alive(pid)
    farm.submit("still", "fox\n", "--wait")


def test_down_and_up_again_resumes(new_farm):
    """The end of a working day."""
    farm = new_farm()
    farm.up()
    farm.submit("resumed", text_of(60))
    farm.wait_some_done("resumed", 5)
    farm.down()
    farm.up("--workers", "2")
    farm.wait_done("resumed")
    images = farm.assert_whole("resumed", 60)
    assert {i["attempt"] for i in images} == {1}, "what was given back was no attempt"


@pytest.mark.parametrize("victim", PROGRAMS[1:])
def test_what_is_killed_is_started_again_and_the_campaign_ends_clean(new_farm, victim):
    """kill -9 of each program, once, in mid-campaign; nobody is there to help."""
    farm = new_farm()
    farm.up("--workers", "2", "--threads", "1")
    farm.submit("killed", text_of(60))
    farm.wait_some_done("killed", 5)
    old = farm.kill(victim)
    farm.wait_back(victim, old)
    farm.wait_done("killed")
    wait_until(lambda: not farm.staged("killed"), "nothing stays staged")
    farm.assert_whole("killed", 60)


def test_a_killed_supervisor_takes_its_programs_along_and_up_starts_anew(new_farm):
    """kill -9 of `kiln up` itself: nothing runs on unwatched, nothing is lost."""
    farm = new_farm()
    farm.up("--workers", "2", "--threads", "1")
    farm.submit("orphaned", text_of(60))
    farm.wait_some_done("orphaned", 5)
    pids = [farm.pid(name) for name in [*PROGRAMS, "worker-2"]]
    farm.kill("kiln")
    farm.up("--workers", "2", "--threads", "1")
    assert not any(is_alive(pid) for pid in pids), "the old programs are gone when the new ones work"
    farm.wait_done("orphaned")
    wait_until(lambda: not farm.staged("orphaned"), "nothing stays staged")
    farm.assert_whole("orphaned", 60)


def test_ctrl_c_is_down(new_farm):
    """The farm in a terminal: one Ctrl-C, and everything ends in order."""
    farm = new_farm()
    with open(farm.root / "up.log", "wb") as log:
        process = subprocess.Popen([BIN / "kiln", "up", "--model", farm.model], env=environment(farm.home), stdin=subprocess.DEVNULL,
                                   stdout=log, stderr=log)
    wait_until(lambda: farm.run("workers", "--json", code=None).stdout, "a worker is there")
    pids = [farm.pid(name) for name in PROGRAMS]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) in (0, 130)
    wait_until(lambda: not any(is_alive(pid) for pid in pids), "all programs ended", 30)


def cpu_s(pid):
    """What a process has computed so far, in seconds."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_third_signal_does_not_make_the_supervisor_spin(new_farm):
    """An impatient Ctrl-C, Ctrl-C, Ctrl-C while a worker does not end: the supervisor waits for it, it does not burn a core."""
    farm = new_farm()
    farm.up()
    supervisor, worker = farm.pid("kiln"), farm.pid("worker-1")
    os.kill(worker, signal.SIGSTOP)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(supervisor, number)
        wait_until(lambda: {signal.SIGINT: "stopping", signal.SIGTERM: "forced"}[number] in farm.log("kiln"), "the signal was heard")
    os.kill(supervisor, signal.SIGINT)
    before = cpu_s(supervisor)
    time.sleep(2)  # what it does in a stretch of time is what is asked here
    spent = cpu_s(supervisor) - before
    os.kill(worker, signal.SIGCONT)
    wait_until(lambda: not is_alive(supervisor), "everything ended", 60)
    assert spent < 0.5, f"{spent} s of CPU in 2 s of waiting"


def test_a_port_that_is_taken_is_named(new_farm):
    """The other program has it; ours must say which port, and leave nothing running."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        farm = new_farm()
        run = farm.up("--bind", f"tcp://127.0.0.1:{port}", code=2)
        assert str(port) in run.stderr
        wait_until(lambda: not farm.pid_or_0("kiln") or not is_alive(farm.pid_or_0("kiln")), "nothing stays behind", 30)
        run = farm.up("--metrics-port", str(port), code=2)
        assert str(port) in run.stderr
    farm.up()
    farm.submit("free", "fox\n", "--wait")


def test_an_endpoint_that_others_could_reach_is_refused(new_farm):
    """Until there are keys, nobody but this machine may talk to the coordinator."""
    farm = new_farm()
    run = farm.up("--bind", "tcp://0.0.0.0:5555", code=2)
    assert "0.0.0.0" in run.stderr


def test_a_model_that_cannot_be_used_is_refused_before_anything_starts(new_farm, model, tmp_path):
    """A damaged folder must not become a worker that dies again and again."""
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = broken / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    farm = new_farm(broken)
    run = farm.up(code=2)
    assert "broken" in run.stderr and "transformer" in run.stderr
    assert not farm.pid_or_0("kiln") or not is_alive(farm.pid_or_0("kiln"))


def test_a_database_of_a_newer_kiln_is_refused(new_loose_farm):
    """An old program on a new schema would write what the new one does not expect."""
    farm = new_loose_farm()
    farm.coordinator()
    farm.kill("coordinator")
    farm.wait_end("coordinator")
    farm.sql("insert into schema_version (version, name) values (999, 'of the future')")
    assert "999" in farm.refuses("status", said="999")
    farm.coordinator(wait=False)
    assert farm.wait_end("coordinator") == 2
    assert "999" in farm.log("coordinator")


def test_the_home_is_closed_to_others(farm):
    """Whoever reaches the private PostgreSQL's socket is trusted by it."""
    run = os.stat(farm.home / "run")
    assert run.st_mode & 0o007 == 0, oct(run.st_mode)
    data = os.stat(farm.home / "postgres")
    assert data.st_mode & 0o007 == 0, oct(data.st_mode)


def test_status_while_nothing_runs_says_what_to_do(new_farm):
    """75 is temporary: a script waits; the sentence names the command."""
    farm = new_farm()
    run = farm.run("status", code=75)
    assert "kiln up" in run.stderr
    began = time.monotonic()
    farm.run("submit", farm.file("p.txt", "fox\n"), "--campaign", "x", "--model", "speck", "--size", "64x64", code=75)
    assert time.monotonic() - began < 60
