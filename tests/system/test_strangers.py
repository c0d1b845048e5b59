"""What belongs to somebody else: another farm's records and files, another campaign's folder, other weights under our name.

None of it may end up as an image of ours, and nothing of ours in its place."""

import os
import shutil
import signal
import socket

from farm import BIN, sha256, text_of, wait_until


def test_a_spooled_image_of_a_database_before_this_one_is_not_taken_for_ours(new_loose_farm):
    """The database was made anew, the spool was not: its image of the old task 1 must not become the new task 1."""
    farm = new_loose_farm()
    farm.coordinator()
    farm.worker("w1", env={"KILN_FAULT": "exit-after-stage"}, batch=1)
    farm.submit("before", text_of(4, seed=1))
    assert farm.wait_end("w1") == -signal.SIGKILL
    assert list((farm.root / "spool" / "w1").glob("*.json"))
    farm.kill("coordinator", signal.SIGTERM)
    farm.wait_end("coordinator")
    farm.database = farm.server.make_database()
    farm.words = ["--database", farm.database]
    farm.coordinator()
    farm.submit("after", text_of(2, seed=2))
    farm.worker("w2", env={"KILN_FAULT": "hang"}, batch=1)  # both tasks are held, with the tokens they had before
    wait_until(lambda: farm.status("after")["running"] == 2, "both tasks are held")
    farm.worker("w1", batch=1)
    wait_until(lambda: "stale task=" in farm.log("w1"), "the record was settled")
    assert farm.status("after")["done"] == 0
    farm.kill("w2")
    farm.wait_done("after")
    farm.assert_whole("after", 2)


def test_two_farms_may_write_into_one_folder(new_loose_farm):
    """Staged files are named by task and token; the janitor of one must not take away what the other is about to publish."""
    farms = [new_loose_farm(), new_loose_farm()]
    folder = farms[0].root / "shared"
    for number, farm in enumerate(farms):
        farm.coordinator("--staged-ms", "100")
        farm.worker("w1", batch=2)
        farm.submit(f"farm-{number}", text_of(40, seed=number), "--out", folder)
    for number, farm in enumerate(farms):
        farm.wait_done(f"farm-{number}")
        images = farm.images(f"farm-{number}")
        assert len(images) == 40
        wait_until(lambda: all(os.path.exists(i["path"]) for i in images), "all files are published")
        assert all(sha256(i["path"]) == i["sha256"] for i in images)


def test_two_campaigns_in_one_folder_cannot_have_files_of_one_name(new_loose_farm):
    """The same prompts have the same file names: the second campaign would be done without its files. Others may share it."""
    farm = new_loose_farm()
    farm.coordinator()
    farm.worker("w1")
    folder = farm.root / "pictures"
    farm.submit("one", text_of(5), "--out", folder)
    path = farm.file("two.txt", text_of(5))
    (farm.root / "link").symlink_to(folder)
    for name in (folder, farm.root / "link", f"{folder}/../pictures/"):
        farm.refuses("submit", path, "--campaign", "two", "--model", "speck", "--size", "64x64", "--steps", "1", "--out", name,
                     said=["want one file name", "writes to the same folder", "--out"])
    assert farm.status("two")["total"] == 0
    farm.submit("one", text_of(5), "--out", folder)
    farm.submit("three", text_of(5, seed=3), "--out", folder)
    for name in ("one", "three"):
        farm.wait_done(name)
    wait_until(lambda: len(os.listdir(folder)) == 11, "ten images and the staging folder")
    assert "clean" in farm.run("audit").stdout


def weights_of(model):
    return model / "transformer" / "diffusion_pytorch_model.safetensors"


def with_other_weights(model, folder):
    """A copy of the model whose last weights differ."""
    shutil.copytree(model, folder)
    file = weights_of(folder)
    data = bytearray(file.read_bytes())
    data[-4000::2] = bytes(b ^ 0x15 for b in data[-4000::2])
    file.write_bytes(data)
    return folder


def test_weights_that_are_written_over_under_way_give_no_image_of_the_old_name(new_loose_farm, model):
    """Weights are mapped: images after the change would carry a digest that is not theirs."""
    mine, other = model.parent / "in-use", with_other_weights(model, model.parent / "other")
    shutil.copytree(model, mine)
    farm = new_loose_farm(mine)
    farm.coordinator()
    farm.worker("w1", batch=1, env={"KILN_FAULT": "slow-ms:30"})
    farm.submit("c", text_of(60))
    farm.wait_some_done("c", 3)
    with open(weights_of(mine), "r+b") as file:
        file.write(weights_of(other).read_bytes())
    assert farm.wait_end("w1") == 75
    assert "model_changed" in farm.log("w1")
    with open(weights_of(mine), "r+b") as file:
        file.write(weights_of(model).read_bytes())
    farm.start_again("w1")
    farm.wait_done("c")
    farm.assert_whole("c", 60)
    assert len(farm.sql("select distinct digest from image")) == 1


def test_weights_that_are_cut_under_way_end_the_worker_with_a_sentence(new_loose_farm, model):
    """A page of a mapped file that is not there any more is SIGBUS, in the middle of a multiplication."""
    mine = model.parent / "cut"
    shutil.copytree(model, mine)
    farm = new_loose_farm(mine)
    farm.coordinator()
    farm.worker("w1", batch=1, env={"KILN_FAULT": "slow-ms:30"})
    farm.submit("c", text_of(20))
    farm.wait_some_done("c", 2)
    for file in mine.rglob("*.safetensors"):
        os.truncate(file, 10)
    assert farm.wait_end("w1") == 75
    assert "model_changed" in farm.log("w1") or "could not be read while it was in use" in farm.log("w1")
    farm.start_again("w1")
    assert farm.wait_end("w1") == 2
    shutil.rmtree(mine)
    shutil.copytree(model, mine)
    farm.start_again("w1")
    farm.wait_done("c")
    farm.assert_whole("c", 20)


def test_other_weights_under_the_same_name_are_not_let_in(new_loose_farm, model):
    """A campaign would be rendered by two models, picture by picture, by whoever was free."""
    farm = new_loose_farm()
    farm.coordinator()
    farm.worker("w1", batch=1)
    wait_until(lambda: "welcome" in farm.log("w1"), "the first worker is welcome")
    first, farm.model = farm.model, f"speck={with_other_weights(model, farm.root / 'speck')}"
    farm.worker("w2", batch=1)
    wait_until(lambda: "other weights" in farm.log("w2"), "the second worker is told why not")
    farm.model = first
    farm.submit("c", text_of(20))
    farm.wait_done("c")
    farm.assert_whole("c", 20)
    assert farm.sql("select count(distinct digest), count(distinct worker) from image") == [(1, 1)]
    farm.kill("w1", signal.SIGTERM)
    wait_until(lambda: "welcome coordinator" in farm.log("w2"), "let in when the other one has left")


def test_more_connections_than_a_shell_permits_files_do_not_end_the_coordinator(new_loose_farm):
    """libzmq ends the process when it cannot accept one more; the usual soft limit is as many as a big farm has workers."""
    farm = new_loose_farm()
    farm.start("coordinator", "bash", "-c", 'ulimit -Sn 48; exec "$@"', "bash", BIN / "kiln-coordinator", "--bind", farm.endpoint, "--database",
               farm.database, "--migrate", "--state-file", farm.state_file, "--metrics-port", "0")
    wait_until(lambda: farm.state().get("database_state") == "up", "the coordinator has its database")
    strangers = []
    for _ in range(100):
        strangers.append(socket.socket(socket.AF_UNIX))
        strangers[-1].connect(str(farm.root / "socket"))
    farm.worker("w1")
    farm.submit("c", text_of(10))
    farm.wait_done("c")
    farm.assert_whole("c", 10)
    assert farm.process("coordinator").poll() is None
    for stranger in strangers:
        stranger.close()
