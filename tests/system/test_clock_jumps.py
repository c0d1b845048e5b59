"""Clocks that are wrong, or jump: the database's clock decides about leases, everybody else's only paces himself.

A machine without time service, a summer that ends, a virtual machine that was asleep: none may cost an attempt."""

import pathlib
import signal

import pytest

from farm import text_of, wait_until

LIBRARY = next(iter(sorted(pathlib.Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="libfaketime is not installed (Debian package faketime)")


def clock(farm, name, offset):
    """The environment of a program whose wall clock follows a file."""
    path = farm.root / f"{name}.clock"
    path.write_text(offset)
    # Files keep their times: a clock that jumps does not touch the disk, and the worker watches the times of its weights.
    return {"LD_PRELOAD": str(LIBRARY), "FAKETIME_TIMESTAMP_FILE": str(path), "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1"}


def days(text):
    """The days of a log's lines, in order, each once."""
    found = []
    for line in text.splitlines():
        if line[:10] not in found and line[4:5] == "-":
            found.append(line[:10])
    return found


def test_wrong_and_jumping_clocks_cost_nothing(new_loose_farm):
    """The coordinator lives in the day before yesterday, a worker in next week, and in mid-campaign both jump."""
    farm = new_loose_farm()
    farm.coordinator(env=clock(farm, "coordinator", "-2d"))
    farm.worker("w1", env=clock(farm, "w1", "+7d") | {"KILN_FAULT": "slow-ms:100"})
    farm.worker("w2", env={"KILN_FAULT": "slow-ms:100"})
    farm.submit("clocks", text_of(60))
    farm.wait_some_done("clocks", 10)
    (farm.root / "w1.clock").write_text("-30d")
    (farm.root / "coordinator.clock").write_text("+30d")
    farm.wait_done("clocks")
    images = farm.assert_whole("clocks", 60)
    assert {i["attempt"] for i in images} == {1}, "no lease was taken for expired"
    assert {i["worker"] for i in images} == {"w1", "w2"}
    farm.kill("w1", signal.SIGTERM)  # both say something at the end, with their new date
    assert farm.wait_end("w1") == 0
    for name in ("coordinator", "w1"):
        wait_until(lambda: len(days(farm.log(name))) >= 2, f"{name}'s clock jumped (or the test proves nothing)", 30)
