"""Fixtures: the smallest model once, a farm that tests share, farms of a test's own. A failed test shows the
ends of all logs."""

import pytest

import speck
from farm import Base, Farm, LooseFarm, Server


def pytest_configure(config):
    config.addinivalue_line("markers", "sim: needs the simulator's module (KILN_CUDA_MODULE); step sim of ops/check")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.failed:
        for farm in Base.alive:
            report.sections.append((f"logs of {farm.root}", farm.show()))


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The smallest model: a picture takes some hundredths of a second."""
    folder = tmp_path_factory.mktemp("model") / "speck"
    return speck.make(folder)


@pytest.fixture(scope="session")
def farm(model):
    """A farm that tests share, each with campaigns of its own, whose names no other test has."""
    shared = Farm(model)
    try:
        shared.up("--workers", "2", "--threads", "1")
        yield shared
    finally:
        shared.close()


@pytest.fixture(scope="session")
def server():
    """A PostgreSQL for all tests that leave it alone."""
    shared = Server()
    yield shared
    shared.close()


@pytest.fixture
def new_farm(model):
    """A function that makes homes; `kiln up` is the test's to call."""
    made = []

    def make(chosen=model, **how):
        made.append(Farm(chosen, **how))
        return made[-1]

    yield make
    for farm in made:
        farm.close()


@pytest.fixture
def new_loose_farm(model, server):
    """A function that makes a database and a folder; the programs are the test's to start. own_server=True: a PostgreSQL that
    the test may stop."""
    made = []

    def make(chosen=model, **how):
        made.append(LooseFarm(chosen, server, **how))
        return made[-1]

    yield make
    for farm in made:
        farm.close()
