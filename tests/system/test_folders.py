"""Output folders that are full, read-only or gone: work stops, says so, and goes on when there is room.

A full disk at night must not turn a thousand tasks into failures, nor leave half a file under an official name."""

import os
import subprocess

import pytest

from farm import text_of, wait_until


@pytest.fixture
def disk(new_loose_farm):
    """A farm with a small file system of its own, and how to change it."""
    farm = new_loose_farm()
    folder = farm.root / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "kiln-test", folder], capture_output=True).returncode != 0:
        pytest.skip("a small file system cannot be mounted here; root may")
    yield farm, folder, lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    subprocess.run(["umount", "-l", folder], check=True)


def blocked(farm):
    return [w for w in farm.lines("workers") if "blocked" in w["state"]]


def assert_goes_on(farm, name, folder, total):
    farm.wait_done(name)
    assert farm.status(name)["failed"] == 0
    wait_until(lambda: len([f for f in os.listdir(folder) if not f.startswith(".")]) == total, "all files are published")
    wait_until(lambda: not blocked(farm), "no worker says blocked any more")
    farm.assert_whole(name, total)


def test_a_full_disk_stops_the_work_and_room_lets_it_go_on(disk):
    """ENOSPC: no task fails, no half file appears, the state names the folder."""
    farm, folder, remount = disk
    farm.coordinator()
    farm.worker("w1")
    farm.submit("full", text_of(24), "--out", str(folder / "images"))
    (worker,) = wait_until(lambda: blocked(farm), "the worker says that it is blocked")
    assert "no space" in worker["state"] and str(folder) in worker["state"]
    status = farm.status("full")
    assert status["failed"] == 0 and status["done"] < 24
    assert "blocked" in farm.log("w1")
    remount("size=8m")
    assert_goes_on(farm, "full", folder / "images", 24)
    assert "unblocked" in farm.log("w1")


def test_a_read_only_disk_stops_the_work_until_it_is_writable(disk):
    """A file system that the kernel remounted after an error."""
    farm, folder, remount = disk
    remount("size=8m")
    farm.coordinator()
    farm.submit("frozen", text_of(12), "--out", str(folder / "images"))
    remount("ro")
    farm.worker("w1")
    (worker,) = wait_until(lambda: blocked(farm), "the worker says that it is blocked")
    assert "read-only" in worker["state"]
    farm.refuses("submit", farm.file("x.txt", "fox\n"), "--campaign", "other", "--model", "speck", "--size", "64x64", "--out",
                 str(folder / "other"), said=["Read-only", str(folder / "other")])
    remount("rw,size=8m")
    assert_goes_on(farm, "frozen", folder / "images", 12)


def test_a_folder_that_is_not_mounted_any_more_stops_only_its_own_campaign(new_loose_farm):
    """A parent that is missing is a disk that is not there: making it anew would write under the mount point."""
    farm = new_loose_farm()
    farm.coordinator()
    share, away = farm.root / "share", farm.root / "away"
    share.mkdir()
    farm.submit("remote", text_of(12), "--out", str(share / "images"))
    share.rename(away)
    farm.worker("w1")
    (worker,) = wait_until(lambda: blocked(farm), "the worker says that it is blocked")
    assert "missing" in worker["state"]
    assert not share.exists()
    away.rename(share)
    assert_goes_on(farm, "remote", share / "images", 12)


def test_an_output_folder_that_cannot_be_made_is_refused_at_submit(new_loose_farm):
    """Before a night is spent on it."""
    farm = new_loose_farm()
    farm.coordinator()
    path = farm.file("p.txt", "fox\n")
    words = ["submit", path, "--campaign", "nowhere", "--model", "speck", "--size", "64x64", "--out"]
    farm.refuses(*words, str(farm.root / "a" / "b"), said=str(farm.root / "a" / "b"))
    farm.refuses(*words, str(path), said=str(path))
    farm.run("status", "nowhere", code=2)


def test_a_foreign_file_is_never_overwritten(new_loose_farm):
    """Somebody's own picture in the folder, by chance of the same name."""
    farm = new_loose_farm()
    farm.coordinator("--staged-ms", "2000")
    farm.submit("mine", "fox\n")
    (file,) = [row[0] for row in farm.sql("select file from task")]
    target = farm.folder("mine") / file
    target.write_bytes(b"somebody's own picture")
    farm.worker("w1")
    farm.wait_done("mine")
    wait_until(lambda: "publish_failed" in farm.log("w1"), "the worker says that the name is taken")
    assert target.read_bytes() == b"somebody's own picture"
    assert farm.run("audit", "mine", code=1).stdout, "the audit shows it"
    target.unlink()
    wait_until(lambda: target.exists() and target.stat().st_size > 100, "published when the name is free")
    farm.assert_whole("mine", 1)
