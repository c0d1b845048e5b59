"""Pause, resume, cancel, retry, failures, draining: what people do to a campaign while it runs.

If these lie, an operator at night makes it worse."""

import signal

import pytest

from farm import is_alive, text_of, wait_until

LONG = "word " * 600 + "\n"
SLOW = {"KILN_FAULT": "slow-ms:300"}  # each step takes 0.3 s longer


def test_a_paused_campaign_begins_nothing_new_and_goes_on_when_told(farm):
    """Pausing frees the machine for something urgent; nothing may be lost by it."""
    farm.submit("paused", text_of(60))
    farm.wait_some_done("paused")
    farm.run("pause", "paused")
    status = farm.wait_for("paused", running=0, state="paused")
    assert status["done"] < 60 and status["failed"] == 0
    assert status["done"] + status["ready"] == 60
    farm.submit("urgent", text_of(3, seed=5), "--wait")
    assert farm.status("paused")["done"] == status["done"], "others run, it does not"
    farm.run("pause", "paused", code=[0, 2])
    farm.run("resume", "paused")
    farm.wait_done("paused")
    farm.assert_whole("paused", 60)


def test_a_cancelled_campaign_stops_and_a_retry_brings_it_back(farm):
    """Cancel is not delete: what is rendered stays, the rest can still be had."""
    farm.submit("cancelled", text_of(80))
    farm.wait_some_done("cancelled")
    farm.run("cancel", "cancelled")
    status = farm.wait_for("cancelled", running=0, ready=0)
    assert status["state"] == "cancelled" and status["failed"] > 0 and status["done"] + status["failed"] == 80
    failures = farm.lines("failures", "cancelled")
    assert len(failures) == status["failed"] and {f["kind"] for f in failures} == {"cancelled"}
    farm.refuses("resume", "cancelled", said="retry")
    farm.refuses("submit", farm.file("more.txt", "one more\n"), "--campaign", "cancelled", "--size", "64x64", said="cancelled")
    farm.run("retry", "cancelled")
    farm.wait_done("cancelled")
    farm.assert_whole("cancelled", 80)


def test_a_prompt_too_long_that_slips_through_fails_by_itself(new_loose_farm):
    """Submitted where no tokenizer is at hand: the worker refuses that row once, for good, and its neighbours are rendered."""
    farm = new_loose_farm()
    farm.coordinator()
    farm.worker("w1")
    path = farm.file("long.txt", "fox\n" + LONG + "owl\n")
    run = farm.run("submit", path, "--campaign", "long", "--model", "speck", "--size", "64x64", "--steps", "1", "--wait", code=1)
    assert "1 failed" in run.stdout + run.stderr or farm.status("long")["failed"] == 1
    (failure,) = farm.lines("failures", "long")
    assert list(failure) == ["task", "campaign", "row", "variation", "prompt", "kind", "reason", "worker", "attempt"]
    assert failure["kind"] == "refuse" and "512" in failure["reason"] and failure["row"] == 2 and failure["attempt"] == 1
    assert farm.status("long")["done"] == 2
    farm.run("retry", "long")
    farm.wait_for("long", failed=1)
    assert farm.run("watch", "long", code=1)
    assert "clean" in farm.run("audit", "long").stdout


def test_a_poison_image_ends_as_failed_and_the_farm_goes_on(new_loose_farm):
    """One image that kills whatever renders it must not keep a farm busy for ever."""
    farm = new_loose_farm()
    farm.coordinator()
    farm.worker("w1", env={"KILN_FAULT": "bad-result:0"})
    farm.submit("poison", "fox\n")
    farm.wait_for("poison", limit_s=300, failed=1)
    (failure,) = farm.lines("failures", "poison")
    assert failure["kind"] == "retry" and failure["attempt"] == 5 and failure["reason"]
    farm.kill("w1", signal.SIGTERM)
    assert farm.wait_end("w1") == 0
    farm.worker("w2")
    farm.run("retry", "poison")
    farm.wait_done("poison")
    farm.assert_whole("poison", 1)


def test_sigterm_lets_a_worker_finish_and_gives_back_the_rest(new_loose_farm):
    """A node that is rebooted for updates must cost nothing: no attempt, no picture, no waiting for a lease."""
    farm = new_loose_farm()
    farm.coordinator()
    farm.worker("w1", env=SLOW, batch=2)
    farm.submit("drained", text_of(12))
    farm.wait_some_done("drained", 2)
    farm.kill("w1", signal.SIGTERM)
    assert farm.wait_end("w1") == 0
    status = farm.wait_for("drained", limit_s=10, running=0)
    assert 2 <= status["done"] < 12
    farm.worker("w2")
    farm.wait_done("drained")
    images = farm.assert_whole("drained", 12)
    assert {i["attempt"] for i in images} == {1}, "what was given back was no attempt"


def test_a_second_signal_leaves_at_once_and_loses_only_time(new_loose_farm):
    """An operator in a hurry."""
    farm = new_loose_farm()
    farm.coordinator()
    farm.worker("w1", env={"KILN_FAULT": "slow-ms:10000"}, batch=2)
    farm.submit("hurried", text_of(6))
    farm.wait_some_done("hurried")  # so the next batch has begun, and the first signal lets it finish
    farm.kill("w1", signal.SIGTERM)
    wait_until(lambda: "drain" in farm.log("w1"), "the worker heard the first signal")
    assert is_alive(farm.process("w1").pid)
    farm.kill("w1", signal.SIGTERM)
    assert farm.wait_end("w1") == 128 + signal.SIGTERM
    farm.wait_for("hurried", limit_s=30, running=0)
    farm.worker("w2")
    farm.wait_done("hurried")
    farm.assert_whole("hurried", 6)


def test_a_hung_worker_does_not_keep_its_tasks(new_loose_farm):
    """SIGSTOP, a machine that swaps, a cable pulled: silence must end in another attempt, and the late one must not double it."""
    farm = new_loose_farm()
    farm.coordinator("--silent-ms", "2000", "--heartbeat-ms", "500")
    farm.worker("w1", env=SLOW)
    farm.submit("hung", text_of(10))
    farm.wait_for("hung", running=8)
    farm.kill("w1", signal.SIGSTOP)
    farm.worker("w2")
    farm.wait_done("hung")
    farm.kill("w1", signal.SIGCONT)
    farm.submit("after", text_of(4, seed=3))
    farm.wait_done("after")
    wait_until(lambda: not farm.staged("hung"), "the late results are cleared away")
    farm.assert_whole("hung", 10)


@pytest.mark.parametrize("fault", ["exit-after-stage:3", "exit-before-publish:3"])
def test_a_worker_that_dies_at_the_worst_line_settles_when_it_is_back(new_loose_farm, fault):
    """Between file and row: staged but not reported, committed but not published."""
    farm = new_loose_farm()
    farm.coordinator()
    farm.worker("w1", env={"KILN_FAULT": fault})
    farm.submit("worst", text_of(12))
    assert farm.wait_end("w1") == -signal.SIGKILL
    farm.worker("w1")
    farm.wait_done("worst")
    wait_until(lambda: len(farm.files("worst")) == 12 and not farm.staged("worst"), "all files are published")
    farm.assert_whole("worst", 12)


def test_priority_goes_first(new_loose_farm):
    """--priority is for the picture the customer waits for."""
    farm = new_loose_farm()
    farm.coordinator()
    farm.submit("low", text_of(30), "--priority", "-5")
    farm.submit("high", text_of(8, seed=4), "--priority", "5")
    farm.worker("w1", batch=2)
    farm.wait_for("high", done=8)
    assert farm.status("low")["done"] < 30
    farm.wait_done("low")
    farm.assert_whole("low", 30)
