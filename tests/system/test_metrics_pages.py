"""The pages of coordinator and worker: promtool reads them, and the figures are those of the campaign.

A page that Prometheus cannot read, or a counter that does not count, is an alarm that never rings."""

import shutil
import subprocess
import urllib.error

import pytest

from farm import metric, text_of, wait_until


@pytest.fixture
def pages(new_loose_farm):
    farm = new_loose_farm(own_server=True)
    farm.coordinator()
    farm.worker("w1", "--metrics-port", "0")
    return farm, farm.state()["metrics_port"], farm.metrics_port("w1")


def check(page):
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed (Debian package prometheus)")
    run = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_pages_are_what_prometheus_reads_and_count_what_happened(pages):
    """Names, help, types, units; and the counters agree with the database."""
    farm, coordinator, worker = pages
    farm.submit("counted", "fox\n" + "word " * 600 + "\n" + text_of(10))
    farm.wait_done("counted")
    page, other = farm.page(coordinator), farm.page(worker)
    check(page)
    check(other)
    assert metric(page, "kiln_coordinator_committed_total") == 11
    assert metric(page, "kiln_coordinator_failures_total", kind="refuse") == 1
    assert metric(page, "kiln_coordinator_database_up") == 1
    assert metric(page, "kiln_coordinator_claim_to_commit_seconds_count") == 11
    assert metric(other, "kiln_worker_images_total") == 11
    assert metric(other, "kiln_worker_connected") == 1
    assert farm.page(coordinator, "/healthz") == "ok\n"


def test_readiness_follows_the_database_and_the_coordinator(pages):
    """A load balancer and systemd ask this; "ready" without a database sends people into errors."""
    farm, coordinator, worker = pages

    def ready(port):
        try:
            return farm.page(port, "/readyz") == "ready\n"
        except urllib.error.HTTPError as error:
            assert error.code == 503
            return False
    wait_until(lambda: ready(coordinator) and ready(worker), "both are ready")
    farm.pg("stop", "-m", "immediate")
    wait_until(lambda: not ready(coordinator), "the coordinator without a database is not ready")
    assert farm.page(coordinator, "/healthz") == "ok\n", "it is alive all the same"
    wait_until(lambda: metric(farm.page(coordinator), "kiln_coordinator_database_up") == 0, "the page says so too")
    farm.pg("start")
    wait_until(lambda: ready(coordinator), "ready again")
    farm.kill("coordinator")
    wait_until(lambda: not ready(worker), "a worker without a coordinator is not ready")


def test_a_page_on_a_taken_port_is_refused(pages):
    """Two programs with one port in their unit files."""
    farm, coordinator, _ = pages
    farm.worker("w2", "--metrics-port", str(coordinator))
    assert farm.wait_end("w2") == 2
    assert str(coordinator) in farm.log("w2")
