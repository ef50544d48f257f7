"""Real servers that are killed in the middle of a pause, a start, a golden machine; a lost host."""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.disks import own_disk
from tests.support.ports import free_port
from tests.support.server import (
    NO_POOL,
    RealServer,
    counting,
    is_slow,
    read_filled,
    some,
    wait_until,
)

pytestmark = pytest.mark.machine

POOL = {"SANDYARD_POOL__FLOOR": "1", "SANDYARD_POOL__CEILING": "1"}
BOOTS = 'sandyard_machine_start_seconds_count{way="boot"}'
TICK = counting("/dev/shm/tick")


@pytest.fixture
def bare_server(hypervisor: dict[str, str]) -> Iterator[RealServer]:
    made = RealServer(free_port(), **hypervisor, **POOL)
    try:
        yield made
    finally:
        made.remove()


@pytest.fixture
def server(bare_server: RealServer) -> RealServer:
    if is_slow():
        bare_server.environment |= NO_POOL
    bare_server.share_goldens()
    return bare_server


def ticks(server: RealServer, box: object) -> int:
    return int(str(server.execute(box, read_filled("/dev/shm/tick"))["stdout"]))


def goes_on(server: RealServer, box: object, least: int) -> None:
    """The process that counted before counts on, from where it stood."""
    first = ticks(server, box)
    assert first >= least
    wait_until(lambda: ticks(server, box) > first, what="it ticks")


def ready(server: RealServer, what: str = "one waits") -> None:
    if server.environment["SANDYARD_POOL__CEILING"] != "0":
        wait_until(lambda: len(server.waiting()) == 1, limit_s=120, what=what)


def test_a_killed_server_loses_none_of_ten_sandboxes(server: RealServer) -> None:
    server.start()
    ready(server)
    running = [str(server.create()["id"]) for _ in range(3)]
    paused = [str(server.create()["id"]) for _ in range(2)]
    pausing = [str(server.create()["id"]) for _ in range(2)]
    doomed = str(server.create()["id"])
    for box in (*running, *paused, *pausing):
        server.execute(box, TICK)
    for box in paused:
        server.act(box, "pause")
    pids = {box: server.pid_of(box) for box in running}
    counts = {box: ticks(server, box) for box in (*running, *pausing)}
    # Of a shape of which there is no golden machine, but where a boot takes minutes.
    shape = {} if is_slow() else {"memory": "320MB"}
    starting = [str(server.create(wait=0, resources=shape)["id"]) for _ in range(2)]
    for box in pausing:
        server.client.post(f"/v1/sandboxes/{box}/pause", params={"async": "true"})
    server.client.delete(f"/v1/sandboxes/{doomed}", params={"async": "true"})
    server.kill()
    server.start()
    for box in running:
        assert server.pid_of(box) == pids[box]
        assert server.status(box) == "running"
        goes_on(server, box, counts[box])
    for box in paused:
        assert server.status(box) == "paused"
        goes_on(server, box, 1)
    for box in pausing:
        wait_until(lambda box=box: server.status(box) == "paused", what="the pause is finished")  # type: ignore[misc]
        goes_on(server, box, counts[box])
    for box in starting:
        wait_until(lambda box=box: server.status(box) == "running", limit_s=180)  # type: ignore[misc]
        assert server.execute(box, "echo fine")["stdout"] == "fine\n"
    wait_until(lambda: server.client.get(f"/v1/sandboxes/{doomed}").status_code == 404)
    assert server.machines() == {*running, *paused, *pausing, *starting}


@pytest.mark.parametrize(
    "moments",
    [
        (("pause", 0.04), ("resume", 0.04)),
        pytest.param(
            (("pause", 0.01), ("pause", 0.04), ("pause", 0.1), ("resume", 0.04), ("resume", 0.1)),
            marks=pytest.mark.long,
        ),
    ],
    ids=["two", "five"],
)
def test_killed_at_any_moment_of_a_pause_or_resume_it_is_one_or_the_other(
    server: RealServer, moments: tuple[tuple[str, float], ...]
) -> None:
    server.start()
    ready(server)
    box = str(server.create()["id"])
    server.execute(box, f"head -c {some(9_000_000)} /dev/urandom > /dev/shm/f; " + TICK)
    server.execute(box, "sha256sum /dev/shm/f > /dev/shm/sum")
    count = ticks(server, box)
    for action, after_s in moments:
        if action == "pause":
            server.act(box, "resume")
        else:
            server.act(box, "pause")
        server.client.post(f"/v1/sandboxes/{box}/{action}", params={"async": "true"})
        time.sleep(after_s)  # the moment of the kill is what is tried here
        server.kill()
        server.start()
        wait_until(lambda: server.status(box) in ("running", "paused"), what=f"{action} {after_s}")
        goes_on(server, box, count)
        count = ticks(server, box)
        assert server.execute(box, "sha256sum -c /dev/shm/sum")["exitCode"] == 0
        (folder,) = server.folder_of(box).glob("body-*")
        assert {one.name for one in folder.iterdir()} <= {"disk.ext4", "memory"}


def test_killed_at_any_moment_of_making_a_golden_there_is_a_whole_one_in_the_end(
    bare_server: RealServer,
) -> None:
    server = bare_server
    server.start()
    for after_s in (1.0, 6.0):
        time.sleep(after_s)  # booting, then about to be saved
        server.kill()
        server.start()
    wait_until(lambda: (server.home / "goldens").is_dir(), limit_s=180)
    wait_until(
        lambda: any("part" in one.name for one in (server.home / "goldens").iterdir())
        or bool(server.waiting()),
        limit_s=180, what="it is being saved",
    )  # fmt: skip
    server.kill()
    server.start()
    ready(server)
    assert [one.name.endswith(".part") for one in (server.home / "goldens").iterdir()] == [False]
    box = server.create(wait=60 if is_slow() else 0)
    assert box["status"] == "running"
    assert server.execute(box["id"], "echo fine")["stdout"] == "fine\n"


def damage(golden: Path, harm: str) -> None:
    memory, manifest = golden / "memory", golden / "manifest.json"
    if harm == "cut":
        os.truncate(memory, memory.stat().st_size // 2)
    elif harm == "altered":
        with memory.open("r+b") as file:
            file.seek(20_000_000)
            file.write(b"x" * 4096)
    else:
        manifest.write_text(manifest.read_text().replace('"vcpus": 1', '"vcpus": 4'))


@pytest.mark.parametrize(
    "harm", ["altered", *(pytest.param(one, marks=pytest.mark.long) for one in ("cut", "manifest"))]
)
def test_a_damaged_golden_is_replaced_and_never_served(server: RealServer, harm: str) -> None:
    server.start()
    ready(server)
    boots = server.metric(BOOTS)
    # While the server runs: what was looked at at its start is looked at again at each clone.
    for golden in (server.home / "goldens").iterdir():
        damage(golden, harm)
    if harm == "manifest":
        server.stop()
        server.start()
        boots = 0
    made = [server.create()["id"] for _ in range(3)]
    sums = [server.execute(box, "sha256sum /usr/bin/bash") for box in made]
    assert [one["exitCode"] for one in sums] == [0, 0, 0]
    assert len({str(one["stdout"]) for one in sums}) == 1
    ready(server, "a new one serves")
    assert server.metric(BOOTS) >= boots + 1


def test_after_a_restart_of_the_host_disks_are_there_and_paused_memory_too(
    server: RealServer,
) -> None:
    server.start()
    ready(server)
    lost, saved = str(server.create()["id"]), str(server.create()["id"])
    for box in (lost, saved):
        server.execute(box, TICK)
        server.execute(box, "echo kept > /workspace/f; sync; echo gone > /dev/shm/f")
    count = ticks(server, saved)
    server.act(saved, "pause")
    server.kill()
    for record in server.records():
        if record["handle"]:
            os.kill(record["handle"]["pid"], signal.SIGKILL)
            record["handle"]["boot"] = "another"
            path = server.home / "machines" / record["id"] / "resident.json"
            path.write_text(json.dumps(record))
    server.start()
    wait_until(lambda: server.status(lost) == "error", limit_s=10)
    assert server.get(lost)["statusReason"]["code"] == "machine_lost"  # type: ignore[index]
    assert lost in [one["id"] for one in server.client.get("/v1/sandboxes").json()["data"]]
    back = server.act(lost, "resume")
    assert back["statusReason"]["code"] == "restarted_from_disk"
    said = server.execute(lost, "cat /workspace/f; ls /dev/shm")["stdout"]
    assert said == "kept\n"
    goes_on(server, saved, count)
    assert server.execute(saved, "cat /workspace/f /dev/shm/f")["stdout"] == "kept\ngone\n"


def test_a_full_disk_refuses_a_pause_and_the_machine_runs_on(
    server: RealServer, tmp_path: Path
) -> None:
    machines = server.home / "machines"
    machines.mkdir(mode=0o711)
    with own_disk(machines, tmp_path / "disk", size_mib=900):
        server.environment["SANDYARD_NODE__DISK_FLOOR_MIB"] = "1"
        server.environment["SANDYARD_POOL__CEILING"] = "0"
        server.start()
        box = str(server.create()["id"])
        # The golden machine that follows a first boot takes room here while it is made.
        wait_until(lambda: server.metric("sandyard_goldens{") >= 1, limit_s=60)
        wait_until(lambda: server.machines() == {box} and len(server.folders()) == 1)
        server.execute(box, TICK)
        count = ticks(server, box)
        room = os.statvfs(machines)
        fill = machines / "fill"
        os.posix_fallocate(
            os.open(fill, os.O_WRONLY | os.O_CREAT), 0,
            room.f_bavail * room.f_frsize - 3_000_000,
        )  # fmt: skip
        for _ in range(2):
            refused = server.client.post(f"/v1/sandboxes/{box}/pause")
            assert refused.status_code == 503, refused.text
            assert refused.json()["error"]["code"] == "no_capacity", refused.text
            assert server.status(box) == "running"
            goes_on(server, box, count)
        os.truncate(fill, 0)
        server.act(box, "pause")
        goes_on(server, box, count)
        server.delete(box)
        fill.unlink()
        server.stop()
        server.run("stop", "--all")
        assert not server.folders()


def test_a_lost_home_comes_back_with_paused_sandboxes_snapshots_and_workspaces(
    server: RealServer, tmp_path: Path
) -> None:
    server.start()
    word, file = tmp_path / "word", tmp_path / "b"
    word.write_text("correct horse\n")
    made = server.client.post("/v1/workspaces", json={"name": "Work"}).json()["data"]["id"]
    server.client.post(
        f"/v1/workspaces/{made}/upload", files={"file": ("kept", b"kept")}
    ).raise_for_status()
    box = server.create(mounts=[{"workspaceId": made, "path": "/workspace/work"}])["id"]
    server.execute(box, TICK)
    server.execute(box, "echo precious > /root/kept; cat /workspace/work/kept; sync")
    least = ticks(server, box)
    snapshot = server.act(box, "snapshots", name="then")["id"]
    server.act(box, "pause")
    said = server.run(
        "backup", file, "--include", "paused", "--include", "snapshots",
        "--include", "workspaces", "--passphrase-file", word,
    ).stdout  # fmt: skip
    assert "copying 2 paused machines and snapshots" in said
    server.stop()
    for one in server.home.iterdir():  # the disk is lost; whoever has the key still has it
        if one.name != "xdg":
            shutil.rmtree(one) if one.is_dir() else one.unlink()
    server.environment["SANDYARD_NODE__IMAGES_DIR"] = str(server.home / "images")
    server.run("restore", file, "--passphrase-file", word)
    server.start()
    assert server.status(box) == "paused"
    server.act(box, "resume")
    goes_on(server, box, least)
    assert server.execute(box, "cat /root/kept")["stdout"] == "precious\n"
    # Its files are others than those that the guest knew.
    done = server.execute(box, "cd /workspace/work && cat kept && echo more > more")
    assert done["stdout"] == "kept", done
    answer = server.client.get(f"/v1/workspaces/{made}/direct", params={"id": "/kept"})
    assert answer.content == b"kept"
    again = server.client.post("/v1/sandboxes", params={"wait": 60}, json={"snapshot": snapshot})
    assert again.status_code == 201, again.text
    server.wait_running(again.json()["data"]["id"])
    goes_on(server, again.json()["data"]["id"], least)
