"""Acceptance of the promises that cost nights: killing any process, restarting or stopping PostgreSQL changes time, never
the result.

KILN_CHAOS_ROWS   rows of PartiPrompts (1632: all)
KILN_AWAY_S       how long PostgreSQL is away (60)"""

import os
import random
import time

from farm import PARTI, metric, text_of, wait_until

ROWS = int(os.environ.get("KILN_CHAOS_ROWS", "1632"))
AWAY_S = float(os.environ.get("KILN_AWAY_S", "60"))
WORKERS = ["w1", "w2", "w3"]
RESTARTS = 5 if ROWS >= 1000 else 2  # a short run is over before the fifth
KILL_EVERY_S = 2


def parti(farm):
    """The first ROWS rows of PartiPrompts as a file of this farm."""
    lines = PARTI.read_text().splitlines(keepends=True)
    return farm.submit("parti", "".join(lines[:ROWS + 1]), suffix="tsv")


def open_farm(new_loose_farm, workers):
    farm = new_loose_farm(own_server=True)
    farm.coordinator("--staged-ms", "5000")
    summary = parti(farm)
    assert summary["added"] == ROWS
    for name in workers:
        farm.worker(name)
    return farm


def facts(images):
    return {(i["row"], i["variation"]): (i["sha256"], i["seed"], i["prompt"], os.path.basename(i["path"])) for i in images}


def kill_until_done(farm, limit_s):
    """kill -9 of a worker or the coordinator every 2 s, PostgreSQL restarted 5 times on the way; returns both counts."""
    choose, kills, restarts, until = random.Random(1), 0, 0, time.monotonic() + limit_s
    status = {"done": 0, "failed": 0}
    while status["done"] + status["failed"] < ROWS:
        assert time.monotonic() < until, f"after {limit_s} s: {status}"
        time.sleep(KILL_EVERY_S)
        victim = choose.choice([*WORKERS, "coordinator"])
        farm.kill(victim)
        farm.start_again(victim)
        kills += 1
        status = farm.status_or_none("parti") or status
        if restarts < RESTARTS and status["done"] >= (restarts + 1) * ROWS / (RESTARTS + 1):
            farm.pg("restart", "-m", "immediate")
            restarts += 1
    return kills, restarts


def test_a_night_of_kill_9_and_database_crashes_gives_the_same_images_as_a_quiet_one(new_loose_farm, record_property):
    """All PartiPrompts, 3 workers; every 2 s somebody dies, 5 times the database crashes. None lost, none doubled, none different."""
    quiet = open_farm(new_loose_farm, WORKERS[:2])
    began = time.monotonic()
    quiet.wait_done("parti", limit_s=900)
    quiet_s = time.monotonic() - began
    wanted = facts(quiet.assert_whole("parti", ROWS))
    for name in [*WORKERS[:2], "coordinator"]:
        quiet.kill(name)

    farm = open_farm(new_loose_farm, WORKERS)
    began = time.monotonic()
    kills, restarts = kill_until_done(farm, limit_s=1200)
    chaos_s = time.monotonic() - began
    record_property("quiet_s", round(quiet_s, 1))
    record_property("chaos_s", round(chaos_s, 1))
    record_property("kills", kills)
    assert restarts == RESTARTS
    wait_until(lambda: not farm.staged("parti"), "the janitor has cleared the staging folder", 120)
    assert facts(farm.assert_whole("parti", ROWS)) == wanted
    assert farm.lines("failures", "parti") == []
    print(f"{ROWS} images: quiet {quiet_s:.0f} s, with {kills} kills and {restarts} database crashes {chaos_s:.0f} s")


def test_a_database_that_is_away_costs_time_only(new_loose_farm):
    """Workers go on until their credit is used up, keep the results on disk, and all settles when it is back."""
    farm = new_loose_farm(own_server=True)
    farm.coordinator()
    for name in WORKERS[:2]:
        farm.worker(name, "--metrics-port", "0", batch=4, env={"KILN_FAULT": "slow-ms:100"})
    ports = {name: farm.metrics_port(name) for name in WORKERS[:2]}
    farm.submit("away", text_of(120))
    farm.wait_some_done("away", 10)
    farm.pg("stop", "-m", "immediate")
    away_until = time.monotonic() + AWAY_S
    farm.run("status", "away", code=75)

    def spooled(name):
        return len(list((farm.root / "spool" / name).glob("*.json")))

    def has_nothing_left(name):  # how much it held depends on the instant of the crash; at most its credit
        return metric(farm.page(ports[name]), "kiln_worker_held_images") == 0 and spooled(name) == metric(farm.page(ports[name]),
                                                                                                       "kiln_worker_spooled_results")
    wait_until(lambda: all(has_nothing_left(name) for name in WORKERS[:2]), "each worker has used up its credit and spooled it")
    kept = {name: spooled(name) for name in WORKERS[:2]}
    assert 0 < sum(kept.values()) <= 16, kept
    for name in [*WORKERS[:2], "coordinator"]:
        assert farm.process(name).poll() is None, f"{name} ended while the database was away"
    farm.kill("w1")  # what is spooled survives a crash too
    farm.start_again("w1")
    time.sleep(max(0, away_until - time.monotonic()))
    assert {name: spooled(name) for name in WORKERS[:2]} == kept, "nothing was thrown away, nothing more was taken"
    farm.pg("start")
    farm.wait_done("away")
    wait_until(lambda: not farm.staged("away"), "nothing stays staged")
    images = farm.assert_whole("away", 120)
    late = [i for i in images if i["attempt"] > 1]
    assert not late, f"{len(late)} images were rendered again although nobody lost them"


def test_a_coordinator_that_is_gone_is_waited_for(new_loose_farm):
    """Its machine is rebooted: workers keep what they hold, and tell the next one."""
    farm = new_loose_farm()
    farm.coordinator()
    farm.worker("w1", "--metrics-port", "0", batch=4, env={"KILN_FAULT": "slow-ms:100"})
    port = farm.metrics_port("w1")
    farm.submit("alone", text_of(40))
    farm.wait_some_done("alone", 4)
    farm.kill("coordinator")
    farm.wait_end("coordinator")
    wait_until(lambda: metric(farm.page(port), "kiln_worker_held_images") == 0, "the worker finished what it held")
    farm.start_again("coordinator")
    farm.wait_done("alone")
    images = farm.assert_whole("alone", 40)
    assert {i["attempt"] for i in images} == {1}, "what the worker held was not given to anybody again"


def test_two_coordinators_share_a_database_without_doubling_anything(new_loose_farm):
    """An old one that was thought dead, or one per room."""
    farm = new_loose_farm()
    farm.coordinator()
    first = farm.endpoint
    farm.worker("w1")
    farm.endpoint = f"ipc://{farm.root}/socket-2"
    argv, env, _ = farm.programs["coordinator"]
    second = [farm.endpoint if word == first else word for word in argv]
    second[second.index("--state-file") + 1] = str(farm.root / "coordinator-2.json")
    farm.start("coordinator-2", *second, env=env)
    farm.worker("w2")
    farm.submit("shared", text_of(80))
    farm.wait_some_done("shared", 10)
    farm.kill("coordinator")
    farm.wait_done("shared")
    images = farm.assert_whole("shared", 80)
    assert {i["worker"] for i in images} == {"w1", "w2"}
