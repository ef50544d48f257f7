"""Pause, resume, idle, the pool, golden machines, snapshots: through the API, on fake machines."""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.clock import AheadClock
from tests.support.door import SOON_S, door
from tests.support.events import read_events
from tests.support.folders import found_in
from tests.support.house import Yard, eventually, looked, open_yard, until
from tests.support.several import open_several

from sandyard.server.app.settings import Settings
from sandyard.server.core.contracts.store import Store, Transaction, Turn
from sandyard.server.core.errors import InternalError, UnavailableError
from sandyard.server.core.node_ops import EnsureGone, Report
from sandyard.server.core.ops import Op
from sandyard.server.core.records import Sandbox
from sandyard.server.core.states import Status
from sandyard.server.drivers.contract import End
from sandyard.server.fakes.driver import Conduct, FakeHost
from sandyard.server.node.agent import AgentLink
from sandyard.server.node.host.disks import free_mib, total_memory_mib
from sandyard.server.node.machines import process
from sandyard.server.node.node import Node
from sandyard.server.service.sandboxes import build
from sandyard.server.service.sandboxes.power import Waits
from sandyard.server.service.sandboxes.register import Register

KEY_LINE = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"


@pytest.fixture(params=["one", pytest.param("several", marks=pytest.mark.postgres)])
async def yard(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Yard]:
    """One machine; or three nodes, of which one is silent, and two servers, of which one dies."""
    opening = open_yard(tmp_path, saves=True) if request.param == "one" else open_several()
    async with opening as made:
        yield made


@pytest.fixture
async def pooled(tmp_path: Path) -> AsyncIterator[Yard]:
    async with open_yard(tmp_path, pool=2) as made:
        await eventually(lambda: pool_is(made, 2))
        # What is counted of them afterwards is of the test's own making.
        await eventually(lambda: has_every_golden(made))
        yield made


async def has_every_golden(yard: Yard) -> bool:
    templates = (await yard.client.get("/v1/templates")).json()["data"]
    return await metric(yard, "sandyard_goldens{") >= len(templates)


async def pool_is(yard: Yard, size: int) -> bool:
    found = [
        one.size
        for one in (await yard.house.node.do(Report())).shelves
        if one.template == "base-ubuntu"
    ]
    return found == [size]


async def status_is(yard: Yard, sandbox: Mapping[str, object], status: str) -> bool:
    return bool((await yard.get(sandbox))["status"] == status)


async def metric(yard: Yard, name: str) -> float:
    said = (await yard.client.get("/metrics")).text
    return sum(
        float(line.rpartition(" ")[2]) for line in said.splitlines() if line.startswith(name)
    )


async def is_used(yard: Yard, sandbox: Mapping[str, object]) -> bool:
    machines = (await yard.house.node.do(Report())).machines
    return any(one.is_used for one in machines if one.sandbox_id == sandbox["id"])


def golden_of(home: Path) -> Path:
    (found,) = (
        path.parent
        for path in home.glob("goldens/*/manifest.json")
        if '"template": "base-ubuntu"' in path.read_text()
    )
    return found


def shots(yard: Yard) -> list[Path]:
    """Return the folders of the snapshots that nodes keep."""
    return found_in(yard.home, "snapshots/*")


def record_of(home: Path, sandbox: Mapping[str, object]) -> Path:
    found = []
    for one in found_in(home, "machines/*/resident.json"):
        with suppress(FileNotFoundError):  # a machine of the pool may end meanwhile
            found += [one] if str(sandbox["id"]) in one.read_text() else []
    (record,) = found
    return record


# --- pause and resume ---------------------------------------------------------------------------


async def test_a_pause_gives_the_machine_back_and_a_resume_goes_on_where_it_stood(
    yard: Yard,
) -> None:
    box = await yard.create()
    await yard.execute(box, "remember the milk")
    for _ in range(3):
        paused = await yard.act(box, "pause")
        assert paused == {"id": box["id"], "status": "paused", "pausedAt": paused["pausedAt"]}
        assert paused["pausedAt"] is not None
        assert not [one for one in yard.host.machines.values() if one.remembers.get("word")]
        got = await yard.get(box)
        assert (got["status"], got["ip"]) == ("paused", None)
        resumed = await yard.act(box, "resume")
        assert resumed["status"] == "running"
        assert resumed["resumedAt"] is not None
        assert await yard.execute(box, "recall") == "the milk"
    async with yard.house.store.read() as tx:
        periods = await tx.usage.of_sandbox(str(box["id"]))
    query = {"event_type": "sandbox.resumed"}
    feed = (await yard.client.get("/v1/activity", params=query)).json()["data"]["events"]
    assert [one["title"] for one in feed] == ["Sandbox resumed"] * 3
    assert len(periods) == 4
    assert [one.ended_at is None for one in periods] == [False, False, False, True]


async def test_pause_and_resume_are_answered_at_once_when_there_is_nothing_to_do(
    yard: Yard,
) -> None:
    box = await yard.create()
    assert (await yard.act(box, "resume"))["status"] == "running"
    await yard.act(box, "pause")
    assert (await yard.act(box, "pause"))["status"] == "paused"
    # Otherwise another server may have done the work before the answer is read.
    yard.conduct.restore_delay_s = yard.conduct.save_delay_s = 2.0
    answer = await yard.client.post(f"/v1/sandboxes/{box['id']}/resume", params={"async": "true"})
    assert answer.status_code == 202
    assert answer.json()["data"]["status"] == "resuming"
    await eventually(lambda: status_is(yard, box, "running"))
    answer = await yard.client.post(f"/v1/sandboxes/{box['id']}/pause", params={"async": "true"})
    assert answer.status_code == 202
    assert answer.json()["data"]["status"] == "pausing"
    await eventually(lambda: status_is(yard, box, "paused"))


async def test_a_pause_that_fails_leaves_a_running_sandbox_that_says_why(yard: Yard) -> None:
    box = await yard.create()
    await yard.execute(box, "remember me")
    yard.conduct.has_room_to_save = False
    answer = await yard.client.post(f"/v1/sandboxes/{box['id']}/pause")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "no_capacity"
    assert "Retry-After" in answer.headers
    got = await yard.get(box)
    assert got["status"] == "running"
    assert got["statusReason"]["code"] == "no_capacity"  # type: ignore[index]
    assert await yard.execute(box, "recall") == "me"
    yard.conduct.has_room_to_save = True
    assert (await yard.act(box, "pause"))["status"] == "paused"


async def test_a_resume_that_fails_leaves_a_paused_sandbox_that_says_why(yard: Yard) -> None:
    box = await yard.create()
    await yard.execute(box, "remember me")
    await yard.act(box, "pause")
    yard.conduct.restores = False
    answer = await yard.client.post(f"/v1/sandboxes/{box['id']}/resume")
    assert answer.status_code == 503
    assert "told not to" in answer.json()["error"]["message"]
    got = await yard.get(box)
    assert got["status"] == "paused"
    assert got["statusReason"]["code"] == "resume_failed"  # type: ignore[index]
    yard.conduct.restores = True
    assert await yard.execute(box, "recall") == "me"


async def test_a_machine_that_cannot_be_woken_is_saved_again(yard: Yard) -> None:
    box = await yard.create()
    await yard.execute(box, "remember me")
    await yard.act(box, "pause")
    yard.conduct.wakes = False
    answer = await yard.client.post(f"/v1/sandboxes/{box['id']}/resume")
    assert answer.status_code == 503
    assert (await yard.get(box))["status"] == "paused"
    yard.conduct.wakes = True
    assert await yard.execute(box, "recall") == "me"


async def test_a_resume_that_fails_leaves_a_lost_sandbox_lost(yard: Yard) -> None:
    box = await yard.create()
    await yard.execute(box, "write kept")
    yard.machine_of(box).die()
    await eventually(lambda: status_is(yard, box, "error"))
    yard.conduct.starts = False
    answer = await yard.client.post(f"/v1/sandboxes/{box['id']}/resume")
    assert answer.status_code == 503
    assert "it is error as before" in answer.json()["error"]["message"]
    assert (await yard.get(box))["status"] == "error"
    yard.conduct.starts = True
    await yard.act(box, "resume")
    assert await yard.execute(box, "read") == "kept"


async def test_to_look_at_a_paused_sandbox_does_not_resume_it(yard: Yard) -> None:
    box = await yard.create()
    await yard.act(box, "pause")
    answer = await yard.client.get(f"/v1/sandboxes/{box['id']}/stats")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "invalid_state")
    assert (await yard.get(box))["status"] == "paused"


async def test_what_an_earlier_try_left_hinders_no_pause_or_resume(yard: Yard) -> None:
    box = await yard.create()
    await yard.execute(box, "remember me")
    body = record_of(yard.home, box).parent / "body-1"
    for _ in range(2):
        for left in ("spent", "saved.part"):
            (body / left).mkdir(exist_ok=True)
            (body / left / "device").write_text("old")
        await yard.act(box, "pause")
        assert await yard.execute(box, "recall") == "me"


async def test_an_end_that_comes_while_it_is_saved_is_noticed(yard: Yard) -> None:
    box = await yard.create()
    yard.conduct.save_delay_s = 0.3
    saving = asyncio.ensure_future(yard.client.post(f"/v1/sandboxes/{box['id']}/snapshots"))
    machine = yard.machine_of(box)
    await until(lambda: machine.is_saving)
    machine.die()
    await saving
    await eventually(lambda: status_is(yard, box, "error"))


@pytest.mark.parametrize("trouble", [InternalError("the namespace is gone"), ValueError("a bug")])
async def test_what_fails_beside_takes_nothing_along(
    yard: Yard, monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    box = await yard.create()
    asked: list[float] = []

    async def fails(self: AgentLink, limit_s: float) -> None:
        asked.append(limit_s)
        raise trouble

    with monkeypatch.context() as changed:
        changed.setattr(AgentLink, "open_spare", fails)
        for name in ("one", "two"):  # what moves a file ends its connection
            file = f"/v1/sandboxes/{box['id']}/files?path=/{name}"
            assert (await yard.client.put(file, content=b"x")).status_code in (200, 201)
    assert asked
    assert await yard.execute(box, "three") == "three"


async def test_exec_resumes_a_paused_sandbox_once_however_many_call(yard: Yard) -> None:
    box = await yard.create()
    await yard.act(box, "pause")
    before = await metric(yard, 'sandyard_machine_start_seconds_count{way="resume"}')
    said = await asyncio.gather(*(yard.execute(box, f"call {n}") for n in range(20)))
    assert said == [f"call {n}" for n in range(20)]
    after = await metric(yard, 'sandyard_machine_start_seconds_count{way="resume"}')
    assert after - before == 1


async def test_without_auto_resume_exec_is_refused(yard: Yard) -> None:
    box = await yard.create(autoResume=False)
    await yard.act(box, "pause")
    answer = await yard.client.post(f"/v1/sandboxes/{box['id']}/exec", json={"command": "x"})
    assert answer.status_code == 409
    assert answer.json()["error"]["details"] == {"field": "autoResume", "status": "paused"}
    assert "autoResume" in answer.json()["error"]["message"]


async def test_a_command_under_way_is_told_of_a_pause(yard: Yard) -> None:
    box = await yard.create()
    path = f"/v1/sandboxes/{box['id']}/exec"
    hanging = asyncio.ensure_future(yard.client.post(path, json={"command": "hang"}))
    await eventually(lambda: is_used(yard, box))
    await yard.act(box, "pause")
    answer = await asyncio.wait_for(hanging, 60)
    assert answer.status_code == 409
    assert answer.json()["error"]["details"] == {"status": "paused"}
    assert "paused meanwhile" in answer.json()["error"]["message"]


async def test_pause_of_what_does_not_run_is_refused(yard: Yard) -> None:
    yard.conduct.starts = False
    box = await yard.create()
    for action in ("pause", "resume", "touch", "snapshots", "fork"):
        answer = await yard.client.post(f"/v1/sandboxes/{box['id']}/{action}")
        assert answer.status_code == 409, action
        assert answer.json()["error"]["details"] == {"status": "failed"}


async def test_pause_resume_and_delete_racing_each_other_end_well(yard: Yard) -> None:
    yard.conduct.save_delay_s = 0.02
    boxes = [await yard.create() for _ in range(6)]

    async def play(box: Mapping[str, object], actions: str) -> None:
        for action in actions:
            path = f"/v1/sandboxes/{box['id']}"
            if action == "d":
                answer = await yard.client.delete(path)
                assert answer.status_code in (200, 404)
            else:
                path += {"p": "/pause", "r": "/resume"}[action]
                answer = await yard.client.post(path)
                assert answer.status_code in (200, 404, 409, 503), answer.text

    async with asyncio.TaskGroup() as tasks:
        for box in boxes[:3]:
            for actions in ("prprp", "rprp", "pprr"):
                tasks.create_task(play(box, actions))
        for box in boxes[3:]:
            for actions in ("prpr", "prd", "rpd"):
                tasks.create_task(play(box, actions))
    for box in boxes[:3]:
        await eventually(lambda box=box: settled(yard, box))  # type: ignore[misc]
        assert await yard.execute(box, "alive") == "alive"
        await yard.client.delete(f"/v1/sandboxes/{box['id']}")
    await eventually(lambda: nothing_left(yard))


async def settled(yard: Yard, box: Mapping[str, object]) -> bool:
    return (await yard.get(box))["status"] in ("running", "paused")


async def only_one_machine(yard: Yard) -> bool:
    return len(yard.host.machines) == 1


async def nothing_left(yard: Yard) -> bool:
    return not yard.host.machines and not (await yard.house.node.do(Report())).machines


@pytest.mark.parametrize("status", ["running", "paused", "pausing", "resuming", "error"])
async def test_a_delete_works_from_every_status(yard: Yard, status: str) -> None:
    box = await yard.create()
    path = f"/v1/sandboxes/{box['id']}"
    await eventually(lambda: only_one_machine(yard))  # the golden one is made
    if status in ("paused", "resuming"):
        await yard.act(box, "pause")
    if status == "pausing":
        yard.conduct.save_delay_s = 30
        await yard.client.post(f"{path}/pause", params={"async": "true"})
    if status == "resuming":
        yard.conduct.answers = False
        await yard.client.post(f"{path}/resume", params={"async": "true"})
    if status == "error":
        yard.machine_of(box).die()
    await eventually(lambda: status_is(yard, box, status))
    assert (await yard.client.delete(path)).status_code == 200
    await eventually(lambda: nothing_left(yard))


# --- errors, and back from them -----------------------------------------------------------------


async def test_a_lost_machine_is_booted_anew_from_its_disk(yard: Yard) -> None:
    box = await yard.create()
    await yard.execute(box, "write kept")
    await yard.execute(box, "remember lost")
    yard.machine_of(box).die()
    await eventually(lambda: status_is(yard, box, "error"))
    answer = await yard.client.post(f"/v1/sandboxes/{box['id']}/exec", json={"command": "x"})
    assert answer.status_code == 409
    resumed = await yard.act(box, "resume")
    assert resumed["status"] == "running"
    assert resumed["statusReason"]["code"] == "restarted_from_disk"
    assert await yard.execute(box, "read") == "kept"
    assert await yard.execute(box, "recall") == ""
    await asyncio.sleep(0)
    assert (await yard.get(box))["statusReason"]["code"] == "restarted_from_disk"  # type: ignore[index]


@pytest.mark.parametrize("harm", ["cut", "altered", "gone", "manifest", "disk"])
async def test_a_damaged_saved_state_is_an_error_that_keeps_the_disk(yard: Yard, harm: str) -> None:
    box = await yard.create()
    await yard.execute(box, "write kept")
    await yard.execute(box, "remember word")
    await yard.act(box, "pause")
    (saved,) = found_in(yard.home, "machines/*/body-1/saved")
    pages = saved / "pages"
    match harm:
        case "cut":
            pages.write_bytes(pages.read_bytes()[:-3])
        case "altered":
            # By itself it would start, and remember wrongly.
            assert '"word"' in pages.read_text()
            pages.write_text(pages.read_text().replace('"word"', '"worm"'))
        case "gone":
            pages.unlink()
        case "manifest":
            manifest = saved / "manifest.json"
            manifest.write_text(manifest.read_text().replace('"vcpus": 2', '"vcpus": 3'))
        case _:
            (saved.parent / "disk.ext4").write_text("kept, longer than it was")
    answer = await yard.client.post(f"/v1/sandboxes/{box['id']}/resume")
    got = await yard.get(box)
    assert got["status"] == "error", answer.text
    assert got["statusReason"]["code"] == "saved_state_unusable"  # type: ignore[index]
    assert (await yard.act(box, "resume"))["statusReason"]["code"] == "restarted_from_disk"
    assert (await yard.execute(box, "read")).startswith("kept")


async def test_a_state_of_another_hypervisor_version_waits_for_it(tmp_path: Path) -> None:
    async with open_yard(tmp_path, saves=True) as yard:
        box = await yard.create()
        await yard.execute(box, "write kept")
        kept = await yard.act(box, "snapshots")
        await yard.act(box, "pause")
    async with open_yard(tmp_path, saves=True, host=FakeHost(installed=["2"])) as yard:
        for _ in range(2):
            answer = await yard.client.post(f"/v1/sandboxes/{box['id']}/resume")
            assert answer.status_code == 409, answer.text
            got = await yard.get(box)
            assert got["status"] == "paused"
            assert "needs fake 1, and here is 2" in str(got["statusReason"])
        refused = await yard.client.post("/v1/sandboxes", json={"snapshot": kept["id"]})
        copy = refused.json()["data"]
        await eventually(lambda: status_is(yard, copy, "failed"))
        assert "needs fake 1" in str((await yard.get(copy))["statusReason"])
        # The old version is kept beside; what it resumes it saves again.
        yard.host.installed.append("1")
        for _ in range(2):
            await yard.act(box, "resume")
            assert await yard.execute(box, "read") == "kept"
            await yard.act(box, "pause")
        yard.host.installed.remove("1")
        await yard.act(box, "restart")
        await yard.act(box, "pause")
        await yard.act(box, "resume")


async def test_an_upgrade_of_the_hypervisor_is_noticed_while_the_server_runs(
    tmp_path: Path,
) -> None:
    async with open_yard(tmp_path, saves=True) as yard:
        old, older = await yard.create(), await yard.create()
        await yard.execute(old, "write kept")
        await yard.act(older, "pause")
        yard.host.installed[:] = ["2", "1"]
        new = await yard.create()
        # What runs is of the version that started it, whatever is installed meanwhile.
        snapshot = await yard.act(old, "snapshots")
        for one in (old, new):
            await yard.act(one, "pause")
        yard.host.installed.remove("1")
        await yard.act(new, "resume")
        for one in (old, older):
            answer = await yard.client.post(f"/v1/sandboxes/{one['id']}/resume")
            assert answer.status_code == 409, answer.text
            assert (await yard.get(one))["status"] == "paused"
        yard.host.installed.append("1")
        await yard.act(old, "resume")
        assert await yard.execute(old, "read") == "kept"
        copy = await yard.create(snapshot=snapshot["id"])
        assert await yard.execute(copy, "read") == "kept"


async def test_a_silent_agent_is_suspected_and_comes_back(tmp_path: Path) -> None:
    async with open_yard(tmp_path, saves=True, heartbeat_s=0.05) as yard:
        box = await yard.create()
        yard.conduct.answers = False
        await eventually(lambda: status_is(yard, box, "suspected_missing"))
        async with yard.house.store.read() as tx:
            assert (await tx.usage.of_sandbox(str(box["id"])))[0].ended_at is not None
        yard.conduct.answers = True
        await eventually(lambda: status_is(yard, box, "running"))
        assert await yard.execute(box, "back") == "back"


@pytest.mark.parametrize("status", ["paused", "running"])
async def test_a_record_that_cannot_be_read_gives_nothing_up(tmp_path: Path, status: str) -> None:
    host = FakeHost()
    async with open_yard(tmp_path, saves=True, host=host, keep=True) as yard:
        box = await yard.create()
        await yard.execute(box, "write kept")
        await yard.act(box, "pause")
        if status == "running":
            await yard.act(box, "resume")
    (record,) = (tmp_path / "machines").glob("*/resident.json")
    whole = record.read_bytes()
    record.write_bytes(whole[:40])
    async with open_yard(tmp_path, saves=True, host=host, keep=True) as yard:

        async def says_why() -> bool:
            return str(record) in str((await yard.get(box))["statusReason"])

        await eventually(says_why)
        assert (await yard.get(box))["status"] == ("paused" if status == "paused" else "error")
        answer = await yard.client.post(f"/v1/sandboxes/{box['id']}/resume")
        assert answer.status_code >= 400
        await eventually(says_why)
    record.write_bytes(whole)
    async with open_yard(tmp_path, saves=True, host=host) as yard:
        await yard.act(box, "resume")
        assert await yard.execute(box, "read") == "kept"


async def test_what_is_left_nowhere_is_orphaned(yard: Yard) -> None:
    box = await yard.create()
    await yard.act(box, "pause")
    await yard.house.node.do(EnsureGone(str(box["id"]), incarnation=9))
    await eventually(lambda: status_is(yard, box, "orphaned"))
    listed = (await yard.client.get("/v1/sandboxes")).json()["data"]
    assert listed == []
    assert (await yard.client.delete(f"/v1/sandboxes/{box['id']}")).status_code == 200


async def test_one_that_was_lost_can_be_deleted_when_its_name_is_anothers(yard: Yard) -> None:
    lost = await yard.create(name="web")
    await yard.act(lost, "pause")
    await yard.house.node.do(EnsureGone(str(lost["id"]), incarnation=9))
    await eventually(lambda: status_is(yard, lost, "orphaned"))
    other = await yard.create(name="web")
    assert (await yard.client.delete(f"/v1/sandboxes/{lost['id']}")).status_code == 200
    assert (await yard.client.get("/v1/sandboxes/web")).json()["data"]["id"] == other["id"]


# --- over a restart -----------------------------------------------------------------------------


async def test_running_and_paused_sandboxes_are_there_after_a_restart(tmp_path: Path) -> None:
    host = FakeHost()
    async with open_yard(tmp_path, host=host, saves=True, keep=True) as yard:
        running, paused = await yard.create(), await yard.create()
        await yard.execute(running, "remember r")
        await yard.execute(paused, "remember p")
        await yard.act(paused, "pause")
    assert [one for one in host.machines.values() if one.remembers.get("word") == "r"]
    async with open_yard(tmp_path, host=host, saves=True) as yard:
        assert await yard.execute(running, "recall") == "r"
        assert (await yard.get(paused))["status"] == "paused"
        assert await yard.execute(paused, "recall") == "p"


async def test_a_machine_held_still_by_a_dead_server_goes_on(tmp_path: Path) -> None:
    host = FakeHost()
    async with open_yard(tmp_path, host=host, saves=True, keep=True) as yard:
        box = await yard.create()
        await yard.machine_of(box).pause()
    async with open_yard(tmp_path, host=host, saves=True) as yard:
        assert await yard.execute(box, "on") == "on"


async def test_a_published_state_counts_even_if_the_record_does_not_say_so(
    tmp_path: Path,
) -> None:
    """As when the server is killed between the rename that publishes it and the record."""
    host = FakeHost()
    async with open_yard(tmp_path, host=host, saves=True, keep=True) as yard:
        box = await yard.create()
        await yard.execute(box, "remember me")
        record = record_of(tmp_path, box)
        running = record.read_text()
        await yard.act(box, "pause")
    record.write_text(running)
    async with open_yard(tmp_path, host=host, saves=True) as yard:
        assert await yard.execute(box, "recall") == "me"


async def test_what_a_broken_off_save_left_is_no_state(tmp_path: Path) -> None:
    host = FakeHost()
    async with open_yard(tmp_path, host=host, saves=True, keep=True) as yard:
        box = await yard.create()
        await yard.execute(box, "remember me")
    (body,) = tmp_path.glob("machines/*/body-1")
    (body / "saved.part").mkdir()
    (body / "saved.part/device").write_text("half")
    async with open_yard(tmp_path, host=host, saves=True) as yard:
        assert await yard.execute(box, "recall") == "me"
        await yard.act(box, "pause")
        assert await yard.execute(box, "recall") == "me"


async def test_a_machine_that_nobody_woke_is_woken_before_it_is_used(tmp_path: Path) -> None:
    """As when the server is killed after a restored machine ran on and before it was set right."""
    host = FakeHost()
    async with open_yard(tmp_path, host=host, saves=True, keep=True) as yard:
        box = await yard.create()
        await yard.execute(box, "remember me")
        yard.machine_of(box).remembers["woken"] = "no"
    record = record_of(tmp_path, box)
    record.write_text(json.dumps({**json.loads(record.read_text()), "is_awake": False}))
    async with open_yard(tmp_path, host=host, saves=True, keep=True, works=False) as yard:
        assert [one.phase for one in (await yard.house.node.do(Report())).machines] == ["waking"]
        answer = await yard.client.post(f"/v1/sandboxes/{box['id']}/exec", json={"command": "x"})
        assert answer.status_code == 409
        async with yard.house.store.write(Turn.ALONE) as tx:
            sandbox = await tx.sandboxes.find(str(box["id"]))
            assert sandbox is not None
            await tx.sandboxes.replace(replace(sandbox, status=Status.RESUMING))
            await tx.usage.close(sandbox.id, sandbox.updated_at)
    async with open_yard(tmp_path, host=host, saves=True) as yard:
        await eventually(lambda: status_is(yard, box, "running"))
        assert yard.machine_of(box).remembers["woken"] == "fully"
        assert await yard.execute(box, "recall") == "me"


# --- idle ---------------------------------------------------------------------------------------


async def test_an_idle_sandbox_is_paused_and_says_so(tmp_path: Path) -> None:
    clock = AheadClock()
    async with open_yard(tmp_path, saves=True, clock=clock) as yard:
        idle = await yard.create(idleTimeout=100)
        never = await yard.create(idleTimeout=0)
        used = await yard.create(idleTimeout=100)
        clock.ahead = timedelta(seconds=60)
        await yard.act(used, "touch")
        assert (await yard.get(used))["lastActivityKind"] == "touch"
        clock.ahead = timedelta(seconds=110)
        await eventually(lambda: status_is(yard, idle, "paused"))
        assert (await yard.get(idle))["statusReason"]["code"] == "idle"  # type: ignore[index]
        # Looking is no use of it, and what was touched is not idle yet.
        assert await status_is(yard, used, "running")
        assert await status_is(yard, never, "running")
        clock.ahead = timedelta(seconds=170)
        await eventually(lambda: status_is(yard, used, "paused"))
        assert await yard.execute(idle, "wakes up") == "wakes up"


async def test_what_keeps_a_processor_busy_is_not_idle(tmp_path: Path) -> None:
    clock = AheadClock()
    conduct = Conduct(recent_cpu_percent=5.1)
    async with open_yard(tmp_path, saves=True, clock=clock, conduct=conduct) as yard:
        box = await yard.create(idleTimeout=10)
        clock.ahead = timedelta(seconds=11)

        async def by_cpu() -> bool:
            return (await yard.get(box))["lastActivityKind"] == "cpu"

        await eventually(by_cpu)
        assert await status_is(yard, box, "running")
        conduct.recent_cpu_percent = 4.9
        clock.ahead = timedelta(seconds=25)
        await eventually(lambda: status_is(yard, box, "paused"))


async def test_a_command_that_takes_long_keeps_its_sandbox_up(tmp_path: Path) -> None:
    clock = AheadClock()
    async with open_yard(tmp_path, saves=True, clock=clock) as yard:
        box = await yard.create(idleTimeout=10)
        other = await yard.create(idleTimeout=10)
        path = f"/v1/sandboxes/{box['id']}/exec"
        hanging = asyncio.ensure_future(yard.client.post(path, json={"command": "hang"}))
        machine = yard.machine_of(box)
        await until(lambda: machine.executing == ["hang"])
        clock.ahead = timedelta(seconds=20)
        await eventually(lambda: status_is(yard, other, "paused"))
        assert await status_is(yard, box, "running")
        machine.die()
        await hanging


async def test_a_clock_that_jumps_back_pauses_nothing(tmp_path: Path) -> None:
    clock = AheadClock()
    async with open_yard(tmp_path, saves=True, clock=clock) as yard:
        box = await yard.create(idleTimeout=10)
        clock.ahead = timedelta(days=-300)
        await looked(yard)
        assert await status_is(yard, box, "running")
        assert await yard.execute(box, "then") == "then"
        await looked(yard)
        assert await status_is(yard, box, "running")
        await yard.act(box, "pause")
        assert await yard.execute(box, "still") == "still"
        async with yard.house.store.read() as tx:
            periods = await tx.usage.of_sandbox(str(box["id"]))
        assert all(one.ended_at is None or one.ended_at >= one.started_at for one in periods)


# --- changes ------------------------------------------------------------------------------------


async def test_a_sandbox_can_be_changed(yard: Yard) -> None:
    box = await yard.create(name="before", tags=["a"])
    path = f"/v1/sandboxes/{box['id']}"
    answer = await yard.client.patch(
        path,
        json={
            "name": "after", "tags": ["b", "c"], "idleTimeout": 7, "metadata": {"x": 1},
            "autoResume": False,
        },
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    got = (await yard.client.get("/v1/sandboxes/after")).json()["data"]
    assert (got["tags"], got["idleTimeout"], got["metadata"]) == (["b", "c"], 7, {"x": 1})
    assert got["autoResume"] is False
    assert got["status"] == "running"
    listed = (await yard.client.get("/v1/sandboxes", params={"tag": "b"})).json()["data"]
    assert [one["id"] for one in listed] == [box["id"]]
    nothing = dict.fromkeys(("name", "tags", "idleTimeout", "metadata", "projectId", "expiresIn"))
    for body in (nothing, {}):
        kept = (await yard.client.patch(path, json=body)).json()["data"]
        assert (kept["name"], kept["tags"], kept["idleTimeout"]) == ("after", ["b", "c"], 7)


async def test_the_end_of_a_sandbox_can_be_moved_and_taken_away(yard: Yard) -> None:
    box = await yard.create(expiresIn=3600)
    path = f"/v1/sandboxes/{box['id']}"
    moved = (await yard.client.patch(path, json={"expiresIn": 7200})).json()["data"]
    assert datetime.fromisoformat(moved["expiresAt"]) - datetime.now(UTC) > timedelta(seconds=7100)
    assert (await yard.client.patch(path, json={"expiresIn": 0})).json()["data"][
        "expiresAt"
    ] is None
    # How it ends can be changed too. While it is paused such a one has no end.
    changed = (await yard.client.patch(path, json={"expiresIn": 50})).json()["data"]
    assert changed["onExpiry"] == "destroy"
    changed = (await yard.client.patch(path, json={"onExpiry": "pause"})).json()["data"]
    assert changed["onExpiry"] == "pause"
    assert changed["expiresAt"] is not None
    await yard.client.post(f"{path}/pause")
    for body in ({}, {"expiresIn": 500}, {"onExpiry": "pause"}):
        assert (await yard.client.patch(path, json=body)).json()["data"]["expiresAt"] is None
    await yard.client.post(f"{path}/resume")
    resumed = (await yard.client.get(path)).json()["data"]
    assert datetime.fromisoformat(resumed["expiresAt"]) - datetime.now(UTC) > timedelta(seconds=450)
    await yard.client.post(f"{path}/pause")
    changed = (await yard.client.patch(path, json={"onExpiry": "destroy"})).json()["data"]
    assert datetime.fromisoformat(changed["expiresAt"]) - datetime.now(UTC) > timedelta(seconds=450)
    await yard.client.patch(path, json={"expiresIn": 1})

    async def is_gone() -> bool:
        return (await yard.client.get(path)).status_code == 404

    await eventually(is_gone)


async def test_a_sandbox_is_paused_at_its_end_if_that_is_asked_for(yard: Yard) -> None:
    box = await yard.create(expiresIn=1, onExpiry="pause", idleTimeout=0)
    assert box["onExpiry"] == "pause"
    path = f"/v1/sandboxes/{box['id']}"

    async def is_paused() -> bool:
        got = (await yard.client.get(path)).json()["data"]
        return (got["status"], got["expiresAt"]) == ("paused", None)

    await eventually(is_paused)
    assert (await yard.client.get(path)).json()["data"]["statusReason"]["code"] == "expired"
    (fork,) = (await yard.client.post(f"{path}/fork", json={})).json()["data"]
    assert (fork["expiresAt"], fork["onExpiry"]) == (None, "destroy")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"idleTimeout": -1}, "idleTimeout"),
        ({"onExpiry": "explode"}, "onExpiry"),
        ({"expiresIn": -1}, "expiresIn"),
        ({"name": "a/b"}, "name"),
        ({"name": ".."}, "name"),
        ({"tags": ["x" * 65]}, "tags"),
        ({"name": ""}, "name"),
        ({"projectId": "nowhere"}, "projectId"),
        ({"metadata": {"x": "y" * 20000}}, "metadata"),
    ],
)
async def test_a_change_that_cannot_be_is_refused_by_field(
    yard: Yard, body: dict[str, object], field: str
) -> None:
    box = await yard.create()
    answer = await yard.client.patch(f"/v1/sandboxes/{box['id']}", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["details"]["field"] == field


async def test_a_taken_name_is_refused(yard: Yard) -> None:
    await yard.create(name="one")
    two = await yard.create(name="two")
    answer = await yard.client.patch(f"/v1/sandboxes/{two['id']}", json={"name": "one"})
    assert answer.status_code == 409


# --- repeated requests --------------------------------------------------------------------------


async def test_fifty_creates_with_one_key_make_one_sandbox(yard: Yard) -> None:
    headers = {"Idempotency-Key": "0b0b2d9c-once"}
    body = {"env": {"SECRET": "hunter2"}}
    answers = await asyncio.gather(
        *(yard.client.post("/v1/sandboxes", json=body, headers=headers) for _ in range(50))
    )
    assert {one.status_code for one in answers} == {201}
    assert len({one.json()["data"]["id"] for one in answers}) == 1
    assert len((await yard.client.get("/v1/sandboxes")).json()["data"]) == 1
    other = await yard.client.post("/v1/sandboxes", json={"name": "x"}, headers=headers)
    assert other.status_code == 400
    assert other.json()["error"]["code"] == "idempotency_key_reused"
    again = await yard.client.post(
        "/v1/sandboxes",
        content=json.dumps(body, indent=3),
        headers={**headers, "Content-Type": "application/json"},
    )
    assert again.json()["data"]["id"] == answers[0].json()["data"]["id"]
    wrong = await yard.client.post("/v1/sandboxes", json=body, headers={"Idempotency-Key": " "})
    assert wrong.status_code == 400
    written = await yard.written()
    assert answers[0].json()["data"]["id"].encode() in written
    assert b"hunter2" not in written


async def test_a_key_is_one_organizations_and_lasts_a_day(tmp_path: Path) -> None:
    clock = AheadClock()
    async with open_yard(tmp_path, saves=True, clock=clock) as yard:
        headers = {"Idempotency-Key": "k"}
        first = await yard.client.post("/v1/sandboxes", json={}, headers=headers)
        async with yard.client_of(await yard.stranger()) as client:
            theirs = await client.post("/v1/sandboxes", json={}, headers=headers)
        assert theirs.status_code == 201
        assert theirs.json()["data"]["id"] != first.json()["data"]["id"]
        clock.ahead = timedelta(hours=24, seconds=1)
        later = await yard.client.post("/v1/sandboxes", json={}, headers=headers)
        assert later.json()["data"]["id"] != first.json()["data"]["id"]


# --- the pool -----------------------------------------------------------------------------------


async def test_a_create_takes_a_waiting_machine_and_runs_at_once(pooled: Yard) -> None:
    answer = await pooled.client.post(
        "/v1/sandboxes", json={"name": "mine", "env": {"A": "b"}, "idleTimeout": 5}
    )
    data = answer.json()["data"]
    assert data["status"] == "running"
    assert data["ip"]
    assert await pooled.execute(data, "hostname") == "mine"
    assert json.loads(await pooled.execute(data, "env")) == {"A": "b"}
    assert await metric(pooled, 'sandyard_pool_requests_total{result="hit"') == 1
    assert await metric(pooled, 'sandyard_machine_start_seconds_count{way="pool"}') == 1
    await eventually(lambda: pool_is(pooled, 2))
    await pooled.client.delete("/v1/sandboxes/mine")


async def test_a_larger_disk_comes_from_the_pool(pooled: Yard) -> None:
    larger = (
        await pooled.client.post("/v1/sandboxes", json={"resources": {"disk": "20GB"}})
    ).json()["data"]
    assert larger["status"] == "running"
    assert pooled.machine_of(larger).disk_mib == 20 * 1024


async def test_smaller_disks_come_from_a_golden_machine_of_their_own(pooled: Yard) -> None:
    goldens = await metric(pooled, "sandyard_goldens{")
    await pooled.create(resources={"disk": "2GB"})
    assert await metric(pooled, 'sandyard_machine_start_seconds_count{way="boot"}') == 1

    async def has_another() -> bool:
        return await metric(pooled, "sandyard_goldens{") > goldens

    await eventually(has_another)
    second = await pooled.create(resources={"disk": "3GB"})
    assert pooled.machine_of(second).disk_mib == 3 * 1024
    assert await metric(pooled, 'sandyard_machine_start_seconds_count{way="boot"}') == 1


async def test_an_empty_pool_restores_and_another_shape_boots(pooled: Yard) -> None:
    made = await asyncio.gather(*(pooled.create() for _ in range(6)))
    assert {one["status"] for one in made} == {"running"}
    ways = {
        way: await metric(pooled, f'sandyard_machine_start_seconds_count{{way="{way}"}}')
        for way in ("pool", "restore", "boot")
    }
    assert ways["pool"] >= 2
    assert ways["pool"] + ways["restore"] == 6
    goldens = await metric(pooled, "sandyard_goldens{")
    odd = await pooled.create(resources={"memory": "1GB"})
    assert odd["status"] == "running"
    assert await metric(pooled, 'sandyard_machine_start_seconds_count{way="boot"}') == 1

    async def has_golden() -> bool:
        return await metric(pooled, "sandyard_goldens{") > goldens

    await eventually(has_golden)
    await pooled.create(resources={"memory": "1GB"})
    assert await metric(pooled, 'sandyard_machine_start_seconds_count{way="boot"}') == 1


async def test_a_burst_of_a_new_shape_does_not_wait_for_a_boot_each(pooled: Yard) -> None:
    made = await asyncio.gather(*(pooled.create(resources={"memory": "3GB"}) for _ in range(20)))
    assert {one["status"] for one in made} == {"running"}
    boots = await metric(pooled, 'sandyard_machine_start_seconds_count{way="boot"}')
    restores = await metric(pooled, 'sandyard_machine_start_seconds_count{way="restore"}')
    # Those before the golden one, which waits for a turn as they do; the rest come from it.
    assert 1 <= boots <= 8
    assert restores >= 20 - boots


async def test_a_member_that_died_while_waiting_is_never_given_out(pooled: Yard) -> None:
    for machine in list(pooled.host.machines.values()):
        machine.die()
    box = await pooled.create()
    assert await pooled.execute(box, "alive") == "alive"


async def test_a_member_that_dies_between_claim_and_set_up_costs_no_create(
    tmp_path: Path,
) -> None:
    conduct = Conduct()
    async with open_yard(tmp_path, pool=2, conduct=conduct) as yard:
        await eventually(lambda: pool_is(yard, 2))
        conduct.dies_at_set_up = 2
        box = await yard.create()
        assert box["status"] == "running"
        assert await yard.execute(box, "alive") == "alive"
        await yard.client.delete(f"/v1/sandboxes/{box['id']}")


async def test_a_member_that_fails_is_counted_until_one_succeeds(tmp_path: Path) -> None:
    conduct = Conduct()
    async with open_yard(tmp_path, saves=True, pool=2, conduct=conduct) as yard:
        node = yard.house.node
        assert isinstance(node, Node)
        node._pool._limits = replace(node._pool._limits, demand_window_s=0.4)
        await eventually(lambda: has_waiting(yard, 2))
        conduct.dies_at_set_up = 10**6
        (shelf,) = (
            one for one in node._pool._shelves.values() if one.kind.template == "base-ubuntu"
        )
        for machine in list(yard.host.machines.values()):
            machine.die()
        await until(lambda: shelf.failures >= 3)
        assert max(one.failures for one in (await node.do(Report())).shelves) >= 3
        conduct.dies_at_set_up = 0
        await eventually(lambda: has_waiting(yard, 2))
        assert shelf.failures == 0


async def has_waiting(yard: Yard, count: int) -> bool:
    shelves = (await yard.house.node.do(Report())).shelves
    return all(one.size >= count for one in shelves)


async def test_a_pool_follows_its_template(pooled: Yard) -> None:
    before = set(pooled.host.machines)
    images = pooled.home / "images"
    new = images / "newer"
    new.mkdir()
    for path in (images / "fake").iterdir():
        (new / path.name).write_bytes(path.read_bytes())
    for state in (pooled.home / "templates").glob("*.json"):
        state.write_text(json.dumps({"digest": "newer"}))

    async def all_new() -> bool:
        return await pool_is(pooled, 2) and not before & set(pooled.host.machines)

    await eventually(all_new)


async def test_waiting_machines_give_way_to_somebody_who_asks(tmp_path: Path) -> None:
    share = 13_000 / total_memory_mib()  # two that wait take 8.2 GB of that
    shutil.copy(Settings().templates_dir / "base-ubuntu.toml", tmp_path)  # and nothing else waits
    async with open_yard(tmp_path, pool=2, memory_overcommit=share, templates_dir=tmp_path) as yard:
        await eventually(lambda: pool_is(yard, 2))
        # Where all that wait would not do, none of them ends.
        refused = await yard.client.post("/v1/sandboxes", json={"resources": {"memory": "64GB"}})
        assert refused.status_code == 503
        assert await pool_is(yard, 2)
        box = await yard.create(resources={"memory": "8GB"})
        assert box["status"] == "running"
        refused = await yard.client.post("/v1/sandboxes", json={"resources": {"memory": "8GB"}})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "no_capacity"
        assert "Retry-After" in refused.headers


async def test_waiting_machines_give_way_to_a_sandbox_that_needs_their_disk(tmp_path: Path) -> None:
    # Two that wait may use 28 GB of that.
    overcommit = max(0.1, 35_000 / free_mib(tmp_path))
    shutil.copy(Settings().templates_dir / "base-ubuntu.toml", tmp_path)
    async with open_yard(
        tmp_path, pool=2, disk_overcommit=overcommit, disk_reserve_mib=10**6, templates_dir=tmp_path
    ) as yard:
        await eventually(lambda: pool_is(yard, 2))
        box = await yard.create(resources={"memory": "8GB"})
        assert box["status"] == "running"


@contextmanager
def an_answer_lost(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> Iterator[Callable[[], bool]]:
    """Have a store not know of one write of an organization whether it came to pass, which it did.

    The first is number 1. Given to the block is whether that has been by now.
    """
    write = store.write
    count = 0

    @asynccontextmanager
    async def written(turn: Turn | str) -> AsyncIterator[Transaction]:
        nonlocal count
        async with write(turn) as tx:
            yield tx
        count += isinstance(turn, str)
        if isinstance(turn, str) and count == number:
            raise UnavailableError("it is not known whether it was written")

    with monkeypatch.context() as patched:
        patched.setattr(store, "write", written)
        yield lambda: count >= number


@pytest.mark.parametrize("wish", ["create", "delete", "pause", "resume"])
async def test_a_wish_of_which_nobody_knows_whether_it_was_written_is_worked_on_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wish: str
) -> None:
    async with open_yard(tmp_path, saves=True) as yard:
        box = await yard.create()
        if wish == "resume":
            (await yard.client.post(f"/v1/sandboxes/{box['id']}/pause")).raise_for_status()
        path, own = "/v1/sandboxes", f"/v1/sandboxes/{box['id']}"
        with an_answer_lost(yard.house.store, monkeypatch, 1) as was_lost:
            match wish:
                case "create":
                    answer = await yard.client.post(path, json={"name": "second"})
                    own = f"{path}/second"
                case "delete":
                    answer = await yard.client.delete(own)
                case _:
                    answer = await yard.client.post(f"{own}/{wish}")
            assert was_lost()
        assert answer.status_code == 503

        async def is_done() -> bool:
            now = await yard.client.get(own)
            if wish == "delete":
                return now.status_code == 404 and not yard.host.machines
            return bool(now.json()["data"]["status"] == {"pause": "paused"}.get(wish, "running"))

        # Sooner than the lease would run out under which it was written.
        await eventually(is_done, limit_s=20)


async def test_forks_of_which_nobody_knows_whether_they_were_written_run_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_yard(tmp_path, saves=True) as yard:
        box = await yard.create()
        ask = partial(
            yard.client.post, f"/v1/sandboxes/{box['id']}/fork",
            json={"count": 3}, headers={"Idempotency-Key": "forks"},
        )  # fmt: skip
        with an_answer_lost(yard.house.store, monkeypatch, 3) as was_lost:
            answer = await ask()
            assert was_lost()
        assert answer.status_code == 503

        async def all_run() -> bool:
            listed = (await yard.client.get("/v1/sandboxes")).json()["data"]
            return [one["status"] for one in listed] == ["running"] * 4

        await eventually(all_run, limit_s=20)
        # Asked again, it is told what was made the first time.
        again = (await ask()).json()["data"]
        assert len(again) == 3
        assert await all_run()


async def test_a_snapshot_of_which_nobody_knows_whether_it_was_written_is_whole_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_yard(tmp_path, saves=True) as yard:
        box = await yard.create()
        ask = partial(
            yard.client.post, f"/v1/sandboxes/{box['id']}/snapshots",
            json={"name": "kept"}, headers={"Idempotency-Key": "snapshot"},
        )  # fmt: skip
        with an_answer_lost(yard.house.store, monkeypatch, 3) as was_lost:
            answer = await ask()
            assert was_lost()
        assert answer.status_code == 503
        (listed,) = (await yard.client.get("/v1/snapshots")).json()["data"]
        assert listed["name"] == "kept"
        again = await ask()
        assert (again.status_code, again.json()["data"]["id"]) == (201, listed["id"])
        made = await yard.create(snapshot="kept")
        assert made["status"] == "running"
        # What is charged for it ends with it.
        gone = await yard.client.delete(f"/v1/snapshots/{listed['id']}")
        assert gone.status_code == 200
        async with yard.house.store.read() as tx:
            (period,) = await tx.storage.of("snapshot", listed["id"])
        assert period.ended_at is not None


# --- golden machines ----------------------------------------------------------------------------


async def test_golden_machines_of_odd_shapes_take_so_much_and_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def made(memory: str) -> bool:
        ready = [one.message for one in caplog.records if "golden machine is ready" in one.message]
        return any(f", {memory}" in one for one in ready)

    for bound, kept in ((2048, 2), (0, 0)):
        caplog.clear()
        home = tmp_path / str(bound)
        async with open_yard(home, pool=1, odd_goldens_mib=bound) as yard:
            await eventually(lambda yard=yard: pool_is(yard, 1))  # type: ignore[misc]
            await eventually(lambda yard=yard: has_every_golden(yard))  # type: ignore[misc]
            usual = await metric(yard, "sandyard_goldens{")
            for memory in ("300MB", "310MB"):
                await yard.create(resources={"memory": memory})
            await until(lambda: made("300 MB") and made("310 MB"))
            assert await metric(yard, "sandyard_goldens{") == usual + kept
            folders = [one for one in (home / "goldens").iterdir() if one.is_dir()]
            assert len(folders) == usual + kept


async def test_a_guest_that_is_rude_and_ends_is_watched_to_its_end(tmp_path: Path) -> None:
    async with open_yard(tmp_path, saves=True, heartbeat_s=0.05) as yard:
        box = await yard.create()
        yard.conduct.is_rude = True
        await eventually(lambda: status_is(yard, box, "suspected_missing"))
        yard.machine_of(box).die()
        await eventually(lambda: status_is(yard, box, "error"))


@pytest.mark.parametrize("harm", ["cut", "altered", "manifest", "empty"])
async def test_a_damaged_golden_is_replaced_and_never_served(tmp_path: Path, harm: str) -> None:
    async with open_yard(tmp_path, pool=1) as yard:
        await eventually(lambda: pool_is(yard, 1))
    golden = golden_of(tmp_path)
    memory = golden / "memory"
    match harm:
        case "cut":
            memory.write_bytes(memory.read_bytes()[:-3])
        case "altered":
            # By itself it would start.
            memory.write_text(json.dumps(json.loads(memory.read_text()) | {"word": "worm"}))
        case "manifest":
            path = golden / "manifest.json"
            path.write_text(path.read_text().replace('"vcpus": 2', '"vcpus": 3'))
        case _:
            for path in golden.iterdir():
                path.unlink()
    harmed = os.open(golden, os.O_RDONLY)  # for as long as it is open, no other is this inode
    try:
        async with open_yard(tmp_path, pool=1) as yard:
            await eventually(lambda: pool_is(yard, 1))
            box = await yard.create()
            assert await yard.execute(box, "fine") == "fine"
            assert golden_of(tmp_path).stat().st_ino != os.fstat(harmed).st_ino
    finally:
        os.close(harmed)


async def test_a_golden_that_is_damaged_while_in_use_is_replaced(pooled: Yard) -> None:
    golden = golden_of(pooled.home)
    (golden / "device").write_text("broken")
    made = await asyncio.gather(*(pooled.create() for _ in range(4)))
    assert {one["status"] for one in made} == {"running"}
    await eventually(lambda: pool_is(pooled, 2), limit_s=20)


async def test_a_whole_golden_is_used_again_and_one_of_another_version_is_not(
    tmp_path: Path,
) -> None:
    async with open_yard(tmp_path, pool=1) as yard:
        await eventually(lambda: pool_is(yard, 1))
    first = golden_of(tmp_path)
    made_at = (first / "manifest.json").stat().st_mtime_ns
    async with open_yard(tmp_path, pool=1) as yard:
        await eventually(lambda: pool_is(yard, 1))
        assert (first / "manifest.json").stat().st_mtime_ns == made_at
    async with open_yard(tmp_path, pool=1, host=FakeHost(installed=["2"])) as yard:
        await eventually(lambda: pool_is(yard, 1))
        assert golden_of(tmp_path) != first
        assert not first.exists()


async def test_a_golden_broken_off_is_swept(tmp_path: Path) -> None:
    part = tmp_path / "goldens/abc.part"
    part.mkdir(parents=True)
    (part / "device").write_text("half")
    async with open_yard(tmp_path, pool=1) as yard:
        await eventually(lambda: pool_is(yard, 1))
        assert not part.exists()


# --- snapshots and forks ------------------------------------------------------------------------


async def test_a_snapshot_is_made_listed_used_and_deleted(yard: Yard) -> None:
    box = await yard.create()
    await yard.execute(box, "remember then")
    made = await yard.act(box, "snapshots", name="first")
    assert (made["name"], made["status"], made["sandboxId"]) == ("first", "ready", box["id"])
    assert await yard.execute(box, "recall") == "then"
    await yard.execute(box, "remember now")
    listed = (await yard.client.get("/v1/snapshots")).json()["data"]
    assert [one["id"] for one in listed] == [made["id"]]
    assert (await yard.client.get("/v1/snapshots/first")).json()["data"] == made
    clone = await yard.create(snapshot="first", name="clone", env={"NEW": "1"})
    assert clone["template"] == "base-ubuntu"
    assert await yard.execute(clone, "recall") == "then"
    assert await yard.execute(clone, "hostname") == "clone"
    assert await yard.execute(box, "recall") == "now"
    assert (await yard.client.delete(f"/v1/snapshots/{made['id']}")).json()["data"] == {
        "id": made["id"], "deleted": True,
    }  # fmt: skip
    assert (await yard.client.delete("/v1/snapshots/first")).status_code == 404
    assert not shots(yard)
    # What was made from it lives on, also through a pause.
    await yard.act(clone, "pause")
    assert await yard.execute(clone, "recall") == "then"


async def test_a_paused_sandbox_can_be_saved_and_stays_paused(yard: Yard) -> None:
    box = await yard.create()
    await yard.execute(box, "remember it")
    await yard.act(box, "pause")
    made = await yard.act(box, "snapshots")
    assert (await yard.get(box))["status"] == "paused"
    clone = await yard.create(snapshot=made["id"])
    assert await yard.execute(clone, "recall") == "it"
    assert await yard.execute(box, "recall") == "it"


async def test_forks_begin_as_their_source_is(yard: Yard) -> None:
    box = await yard.create(name="source", tags=["t"], env={"A": "1"})
    await yard.execute(box, "remember all")
    forks = await yard.act(box, "fork", count=5)
    assert len({one["id"] for one in forks}) == 5
    for fork in forks:
        await eventually(lambda fork=fork: status_is(yard, fork, "running"))  # type: ignore[misc]
        assert fork["tags"] == ["t"]
        assert fork["name"] is None
        assert await yard.execute(fork, "recall") == "all"
        assert await yard.execute(fork, "hostname") == fork["id"]
    assert (await yard.client.get("/v1/snapshots")).json()["data"] == []
    for count in (0, 101):
        answer = await yard.client.post(f"/v1/sandboxes/{box['id']}/fork", json={"count": count})
        assert answer.status_code == 400


async def test_a_rollback_puts_everything_back(yard: Yard) -> None:
    box = await yard.create()
    await yard.execute(box, "remember before")
    await yard.execute(box, "write before")
    made = await yard.act(box, "snapshots")
    for status in ("running", "paused", "error"):
        await yard.execute(box, "remember after")
        await yard.execute(box, "write after")
        if status == "paused":
            await yard.act(box, "pause")
        if status == "error":
            yard.machine_of(box).die()
            await eventually(lambda: status_is(yard, box, "error"))
        back = await yard.act(box, "rollback", snapshotId=made["id"])
        feed = (await yard.client.get(f"/v1/sandboxes/{box['id']}/activity")).json()["data"]
        told = next(one for one in feed["events"] if one["eventType"] == "sandbox.rolled_back")
        assert told["attributes"]["snapshotId"] == made["id"]
        assert (told["actorType"], told["sandboxId"]) == ("api_key", box["id"])
        assert back["status"] == "running"
        assert await yard.execute(box, "recall") == "before"
        assert await yard.execute(box, "read") == "before"
    # From here on it has a life of its own again.
    await yard.execute(box, "remember later")
    await yard.act(box, "pause")
    assert await yard.execute(box, "recall") == "later"


async def test_a_rollback_that_fails_loses_nothing(yard: Yard) -> None:
    box = await yard.create()
    made = await yard.act(box, "snapshots")
    await yard.execute(box, "remember me")
    (device,) = found_in(yard.home, "snapshots/*/device")
    device.write_text("broken")
    path = f"/v1/sandboxes/{box['id']}/rollback"
    answer = await yard.client.post(path, json={"snapshotId": made["id"]})
    assert answer.status_code == 503, answer.text
    assert (await yard.get(box))["status"] == "paused"
    assert await yard.execute(box, "recall") == "me"


async def test_a_rollback_keeps_what_was_until_it_is_fit_to_be_used(yard: Yard) -> None:
    box = await yard.create()
    made = await yard.act(box, "snapshots")
    await yard.execute(box, "remember me")
    await yard.act(box, "pause")
    record = record_of(yard.home, box)
    before = record.read_text()
    path = f"/v1/sandboxes/{box['id']}/rollback"
    yard.conduct.wakes = False
    for _ in range(2):
        answer = await yard.client.post(path, json={"snapshotId": made["id"]})
        assert answer.status_code == 503
        assert json.loads(record.read_text())["body"] == json.loads(before)["body"]
        assert [one.name for one in record.parent.glob("body-*")] == ["body-1"]
    yard.conduct.wakes = True
    # What was broken off by a kill -9 is in the way of nothing.
    (record.parent / "body-4").mkdir()
    (record.parent / "body-4/disk.ext4").write_text("half")
    assert await yard.execute(box, "recall") == "me"
    await yard.act(box, "rollback", snapshotId=made["id"])
    assert await yard.execute(box, "recall") == ""
    assert len(list(record.parent.glob("body-*"))) == 1


async def test_a_snapshot_of_another_is_no_place_to_go_back_to(yard: Yard) -> None:
    one, two = await yard.create(), await yard.create()
    made = await yard.act(one, "snapshots")
    path = f"/v1/sandboxes/{two['id']}/rollback"
    for reference in (made["id"], "nowhere"):
        answer = await yard.client.post(path, json={"snapshotId": reference})
        assert answer.status_code == 400
        assert answer.json()["error"]["details"]["field"] == "snapshotId"


async def test_snapshots_are_their_organizations_own(yard: Yard) -> None:
    box = await yard.create()
    made = await yard.act(box, "snapshots", name="secret")
    async with yard.client_of(await yard.stranger()) as client:
        assert (await client.get("/v1/snapshots")).json()["data"] == []
        for reference in (made["id"], "secret"):
            assert (await client.get(f"/v1/snapshots/{reference}")).status_code == 404
            assert (await client.delete(f"/v1/snapshots/{reference}")).status_code == 404
            answer = await client.post("/v1/sandboxes", json={"snapshot": reference})
            assert answer.status_code == 400


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"resources": {"vcpus": 9}}, "resources.vcpus"),
        ({"resources": {"memory": "9GB"}}, "resources.memory"),
        ({"resources": {"disk": "1GB"}}, "resources.disk"),
        ({"template": "base-minimal"}, "template"),
    ],
)
async def test_a_snapshot_keeps_its_shape(yard: Yard, body: dict[str, object], field: str) -> None:
    box = await yard.create()
    made = await yard.act(box, "snapshots")
    answer = await yard.client.post("/v1/sandboxes", json={"snapshot": made["id"], **body})
    assert answer.status_code == 400
    assert answer.json()["error"]["details"]["field"] == field


async def test_a_snapshot_that_cannot_be_made_leaves_nothing(yard: Yard) -> None:
    box = await yard.create()
    yard.conduct.has_room_to_save = False
    answer = await yard.client.post(f"/v1/sandboxes/{box['id']}/snapshots")
    assert answer.status_code == 503
    assert (await yard.client.get("/v1/snapshots")).json()["data"] == []
    assert not shots(yard)
    assert await yard.execute(box, "goes on") == "goes on"


async def test_a_snapshot_that_failed_can_be_asked_for_again_with_its_key(yard: Yard) -> None:
    box = await yard.create()
    path, key = f"/v1/sandboxes/{box['id']}/snapshots", {"Idempotency-Key": "k"}
    yard.conduct.has_room_to_save = False
    answer = await yard.client.post(path, json={"name": "n"}, headers=key)
    assert answer.status_code == 503
    yard.conduct.has_room_to_save = True
    asked = (yard.client.post(path, json={"name": "n"}, headers=key) for _ in range(5))
    answers = await asyncio.gather(*asked)
    assert {one.status_code for one in answers} == {201}
    assert len({one.json()["data"]["id"] for one in answers}) == 1


async def test_forks_are_called_as_they_are_asked_to_be(yard: Yard) -> None:
    box = await yard.create(name="source")
    fork = f"/v1/sandboxes/{box['id']}/fork"
    made = (await yard.client.post(fork, json={"name": "twin"})).json()["data"]
    assert [one["name"] for one in made] == ["twin"]
    made = (await yard.client.post(fork, json={"name": "some", "count": 2})).json()["data"]
    assert [one["name"] for one in made] == ["some-1", "some-2"]
    for name, count, status in (
        ("twin", 1, 409), ("some", 3, 409), ("a/b", 1, 400), ("x" * 62, 2, 400), ("", 1, 400),
    ):  # fmt: skip
        answer = await yard.client.post(fork, json={"name": name, "count": count})
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["details"]["field"] == "name"


async def test_forks_with_one_key_save_their_source_once(yard: Yard) -> None:
    box = await yard.create()
    path, key = f"/v1/sandboxes/{box['id']}/fork", {"Idempotency-Key": "k"}
    yard.conduct.save_delay_s = 0.05
    asked = (yard.client.post(path, json={"count": 2}, headers=key) for _ in range(5))
    answers = await asyncio.gather(*asked)
    assert {one.status_code for one in answers} == {201}
    assert len({one["id"] for answer in answers for one in answer.json()["data"]}) == 2
    assert len(shots(yard)) == 1


async def test_the_list_of_snapshots_goes_on_page_by_page(yard: Yard) -> None:
    box = await yard.create()
    made = [(await yard.act(box, "snapshots"))["id"] for _ in range(3)]
    found: list[str] = []
    cursor = None
    while cursor is not None or not found:
        params = {"limit": 1, **({"cursor": cursor} if cursor else {})}
        answer = await yard.client.get("/v1/snapshots", params=params)
        assert answer.status_code == 200, answer.text
        found += [one["id"] for one in answer.json()["data"]]
        cursor = answer.json()["meta"]["nextCursor"]
    assert found == made[::-1]


async def test_a_paused_sandbox_can_be_saved_while_it_is_resumed(yard: Yard) -> None:
    box = await yard.create()
    for _ in range(5):
        await yard.act(box, "pause")
        _, answer = await asyncio.gather(
            yard.execute(box, "x"), yard.client.post(f"/v1/sandboxes/{box['id']}/snapshots")
        )
        assert answer.status_code == 201, answer.text


async def test_files_of_snapshots_that_the_store_does_not_know_are_kept(tmp_path: Path) -> None:
    stray = tmp_path / "snapshots/6a1f4b0e-6a35-4a0e-8c5b-0d2f9c9f1c11"
    stray.mkdir(parents=True)
    async with open_yard(tmp_path, saves=True) as yard:
        for _ in range(3):
            await looked(yard)
    assert stray.exists()


# --- restarts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["running", "paused", "error", "suspected_missing"])
async def test_a_restart_boots_from_the_disk_whatever_the_state(yard: Yard, state: str) -> None:
    box = await yard.create()
    await yard.execute(box, "write kept")
    await yard.execute(box, "remember lost")
    match state:
        case "paused":
            await yard.act(box, "pause")
        case "error":
            yard.machine_of(box).die()
            await eventually(lambda: status_is(yard, box, "error"))
        case "suspected_missing":
            async with yard.house.store.write(Turn.ALONE) as tx:
                row = await tx.sandboxes.find(str(box["id"]))
                assert row is not None
                await tx.sandboxes.replace(replace(row, status=Status.SUSPECTED_MISSING))
                await tx.usage.close(row.id, datetime.now(UTC))
        case _:
            pass
    restarted = await yard.act(box, "restart")
    assert restarted["status"] == "running"
    assert restarted["statusReason"]["code"] == "restarted_from_disk"
    assert await yard.execute(box, "read") == "kept"
    assert await yard.execute(box, "recall") == ""
    got = await yard.get(box)
    assert (got["status"], got["pausedAt"]) == ("running", None)
    async with yard.house.store.read() as tx:
        periods = await tx.usage.of_sandbox(str(box["id"]))
    assert sum(one.ended_at is None for one in periods) == 1
    # And it lives on as any other.
    await yard.execute(box, "remember again")
    await yard.act(box, "pause")
    assert await yard.execute(box, "recall") == "again"


async def test_a_restart_of_what_has_no_disk_yet_or_any_more_is_refused(yard: Yard) -> None:
    yard.conduct.starts = False
    box = (await yard.client.post("/v1/sandboxes", json={})).json()["data"]
    await eventually(lambda: status_is(yard, box, "failed"))
    answer = await yard.client.post(f"/v1/sandboxes/{box['id']}/restart")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "invalid_state")


async def test_a_restart_that_fails_leaves_the_disk_and_can_be_tried_again(yard: Yard) -> None:
    box = await yard.create()
    await yard.execute(box, "write kept")
    yard.conduct.starts = False
    answer = await yard.client.post(f"/v1/sandboxes/{box['id']}/restart")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert (await yard.get(box))["status"] == "error"
    yard.conduct.starts = True
    await yard.act(box, "restart")
    assert await yard.execute(box, "read") == "kept"


async def test_who_asks_for_a_restart_waits_no_longer_than_they_were_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "Waits", lambda: Waits(start_s=0.2))
    waited: list[float] = []
    wait_for = Register.wait_for

    async def noted(self: Register, *args: Any, limit_s: float) -> Sandbox:
        waited.append(limit_s)
        return await wait_for(self, *args, limit_s=limit_s)

    async with open_yard(tmp_path, saves=True) as yard:
        box = await yard.create()
        yard.conduct.start_delay_s = 30
        monkeypatch.setattr(Register, "wait_for", noted)
        answer = await yard.client.post(f"/v1/sandboxes/{box['id']}/restart")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert "ask again" in answer.json()["error"]["message"]
        # It was waited for while it was worked on; that is over, and nothing is added to it.
        assert waited == [0.0]
        answer = await yard.client.post(f"/v1/sandboxes/{box['id']}/exec", json={"command": "x"})
        assert (answer.status_code, len(waited)) == (503, 2)
        assert waited[1] <= 0.2
        monkeypatch.undo()
        yard.conduct.start_delay_s = 0.0
        await yard.client.delete(f"/v1/sandboxes/{box['id']}")


@pytest.mark.parametrize("can_switch_off", [True, False])
async def test_a_reboot_is_a_restart_and_a_poweroff_is_told(
    yard: Yard, can_switch_off: bool
) -> None:
    yard.conduct.can_switch_off = can_switch_off
    box = await yard.create()
    await yard.execute(box, "write kept")
    await yard.execute(box, "remember lost")
    await yard.client.post(f"/v1/sandboxes/{box['id']}/exec", json={"command": "reboot"})

    async def is_back() -> bool:
        got: Any = await yard.get(box)
        reason = got["statusReason"]
        return got["status"] == "running" and (reason or {}).get("code") == "restarted_from_disk"

    await eventually(is_back)
    assert await yard.execute(box, "read") == "kept"
    await yard.client.post(f"/v1/sandboxes/{box['id']}/exec", json={"command": "poweroff"})
    await eventually(lambda: status_is(yard, box, "error"))
    got: Any = await yard.get(box)
    assert got["statusReason"]["code"] == "powered_off"
    await yard.act(box, "resume")
    assert await yard.execute(box, "read") == "kept"


async def test_a_restart_waits_for_the_clean_end_of_a_guest_that_cannot_switch_off(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_SHUT_DOWN_S", 1000.0)  # it is seen, not waited for in vain
    yard.conduct.can_switch_off = False
    box = await yard.create()
    machine = yard.machine_of(box)
    await yard.act(box, "restart")
    assert "/busybox poweroff" in machine.executing[-1]


async def test_a_guest_that_only_seems_to_have_halted_lives(yard: Yard) -> None:
    box = await yard.create()
    machine, looks = yard.machine_of(box), 0

    async def stall() -> End:
        nonlocal looks
        looks += 1
        return End("powered_off", "it says so, and is idle")

    machine.stall = stall  # type: ignore[method-assign]
    await until(lambda: looks > 1)  # who takes the first for the end looks no more
    assert (await yard.get(box))["status"] == "running"
    assert await yard.execute(box, "hi") == "hi"


async def test_a_silent_agent_at_a_resume_costs_no_memory(yard: Yard) -> None:
    box = await yard.create()
    await yard.execute(box, "remember it")
    await yard.act(box, "pause")
    yard.conduct.mute_wakes = 2
    answer = await yard.client.post(f"/v1/sandboxes/{box['id']}/resume")
    assert answer.status_code == 503
    assert "it is paused as before" in answer.json()["error"]["message"]
    assert (await yard.get(box))["status"] == "paused"
    assert (await yard.act(box, "resume"))["statusReason"] is None
    assert await yard.execute(box, "recall") == "it"


@pytest.mark.parametrize("writes", [False, True], ids=["untouched", "written"])
async def test_a_machine_that_dies_before_it_is_woken_is_paused_if_its_disk_allows(
    yard: Yard, *, writes: bool
) -> None:
    box = await yard.create()
    await yard.execute(box, "remember it")
    await yard.act(box, "pause")
    yard.conduct.answers = False
    resuming = asyncio.create_task(yard.client.post(f"/v1/sandboxes/{box['id']}/resume"))
    body = record_of(yard.home, box).parent / "body-1"
    await until(lambda: (body / "spent").exists() and not yard.machine_of(box).is_held)
    if writes:
        (body / "disk.ext4").write_text("written since")
    yard.machine_of(box).die()
    assert (await resuming).status_code == 503
    yard.conduct.answers = True
    if writes:
        await eventually(lambda: status_is(yard, box, "error"))
        return
    await eventually(lambda: status_is(yard, box, "paused"))
    assert (await yard.act(box, "resume"))["statusReason"] is None
    assert await yard.execute(box, "recall") == "it"


async def test_a_pause_has_the_guest_write_its_files_to_its_disk(yard: Yard) -> None:
    for unknown, expected in ((frozenset[Op](), Op.FLUSH), (frozenset({Op.FLUSH}), Op.EXEC)):
        yard.conduct.unknown = unknown
        box = await yard.create()
        machine = yard.machine_of(box)
        machine.asked.clear()
        await yard.act(box, "pause")
        assert [one for one in machine.asked if one in (Op.FLUSH, Op.EXEC)][-1] is expected
        assert (await yard.act(box, "resume"))["statusReason"] is None


async def test_one_silence_at_a_resume_costs_no_memory(yard: Yard) -> None:
    box = await yard.create()
    await yard.execute(box, "remember it")
    await yard.act(box, "pause")
    yard.conduct.mute_wakes = 1
    resumed = await yard.act(box, "resume")
    assert resumed["statusReason"] is None
    assert await yard.execute(box, "recall") == "it"


# --- logs, and who may log in ---------------------------------------------------------------------


async def test_the_console_is_told_also_of_what_never_came_up(yard: Yard) -> None:
    box = await yard.create()

    async def says(one: Mapping[str, object], words: str) -> bool:
        answer = await yard.client.get(f"/v1/sandboxes/{one['id']}/logs")
        return words in answer.json()["data"]["console"]

    await eventually(lambda: says(box, "tick"))
    yard.conduct.is_ready = False
    failed = (await yard.client.post("/v1/sandboxes", json={"resources": {"vcpus": 7}})).json()
    await eventually(lambda: says(failed["data"], "tick"))

    async def has_failed() -> bool:
        for machine in list(yard.host.machines.values()):
            # On another node, where there is one, it is tried once more.
            if machine.remembers.get("hostname") is None and await says(failed["data"], "tick"):
                machine.die()
        return await status_is(yard, failed["data"], "failed")

    await eventually(has_failed)
    assert await says(failed["data"], "tick")
    async with yard.client_of(await yard.stranger()) as stranger:
        answer = await stranger.get(f"/v1/sandboxes/{box['id']}/logs")
        assert answer.status_code == 404


async def test_what_opens_a_snapshots_source_opens_no_sandbox_made_of_it(yard: Yard) -> None:
    box = await yard.create(rootPassword="correct horse", sshKeys=[KEY_LINE])
    snapshot = (await yard.act(box, "snapshots"))["id"]
    other = await yard.create(snapshot=snapshot, sshKeys=[])
    assert other["sshAuthMethod"] == "none"
    assert yard.machine_of(other).remembers["replaces_access"] == "yes"
    # One that goes back to its own snapshot keeps its own.
    await yard.act(box, "rollback", snapshotId=snapshot)
    assert yard.machine_of(box).remembers["replaces_access"] == "no"


async def test_the_feed_names_the_key_that_acted_and_tells_of_a_command(yard: Yard) -> None:
    made = (await yard.client.post("/v1/api-keys", json={"name": "busy"})).json()["data"]
    box = await yard.create()
    async with yard.client_of(made["key"]) as client:
        body = {"command": "s3cret", "user": "root", "timeout": 1234}
        await client.post(f"/v1/sandboxes/{box['id']}/exec", json=body)
    feed = (await yard.client.get(f"/v1/sandboxes/{box['id']}/activity")).json()["data"]["events"]
    run = next(one for one in feed if one["eventType"] == "sandbox.exec")
    assert run["attributes"] == {
        "apiKeyId": made["id"], "user": "root", "cwd": "/workspace", "timeoutMs": 1234,
    }  # fmt: skip
    assert "s3cret" not in str(feed)


async def test_an_address_is_of_one_run_and_a_hostname_of_one_start(yard: Yard) -> None:
    box = await yard.create(name="before")
    assert box["ip"]
    await yard.act(box, "pause")
    assert (await yard.get(box))["ip"] is None
    await yard.act(box, "resume")
    assert (await yard.get(box))["ip"]
    await yard.client.patch(f"/v1/sandboxes/{box['id']}", json={"name": "after"})
    assert await yard.execute(box, "hostname") == "before"
    await yard.act(box, "restart")
    assert await yard.execute(box, "hostname") == "after"


async def test_a_sandbox_tells_whoever_follows_it_what_becomes_of_it(tmp_path: Path) -> None:
    async with door(tmp_path, saves=True) as opened:
        yard = opened.yard
        box = await yard.create()
        url = f"http://127.0.0.1:{opened.port}/v1/sandboxes/{box['id']}/events"
        headers = {"Authorization": f"Bearer {yard.key}"}
        said = ""
        async with (
            httpx.AsyncClient(timeout=SOON_S, headers=headers) as client,
            client.stream("GET", url) as answer,
        ):
            pieces = answer.aiter_text()
            for action, word in (("pause", '"paused"'), ("resume", '"running"')):
                await yard.act(box, action)
                begin = len(said)
                while word not in said[begin:]:
                    said += await anext(pieces)
            await yard.client.delete(f"/v1/sandboxes/{box['id']}")
            said += "".join([one async for one in pieces])
        heard = read_events(said)
        statuses = [one[2]["status"] for one in heard]
        assert {one[0] for one in heard} == {"status"}
        assert statuses[0] == "running"
        assert statuses[-1] == "destroyed"
        assert [one for one in statuses if one in ("paused", "running")] == [
            "running", "paused", "running",
        ]  # fmt: skip
        assert heard[0][2]["id"] == box["id"]


async def test_sandboxes_are_listed_by_what_is_known_of_them(yard: Yard) -> None:
    one = await yard.create(name="Red-1", metadata={"team": {"name": "red"}, "n": 1, "l": [1, 2]})
    two = await yard.create(name="red-2", metadata={"team": {"name": "red", "x": 5}, "n": True})
    three = await yard.create(metadata={"team": "red"})

    async def listed(**query: str) -> list[object]:
        answer = await yard.client.get("/v1/sandboxes", params=query)
        assert answer.status_code == 200, answer.text
        return [box["id"] for box in answer.json()["data"]]

    assert await listed(name_prefix="red") == [two["id"]]
    assert await listed(name_prefix="Red-") == [one["id"]]
    assert await listed(name_prefix="%") == []
    beside = [box["id"] for box in (three, two, one) if box["nodeId"] == two["nodeId"]]
    assert await listed(node_id=str(two["nodeId"])) == beside
    assert await listed(node_id="another") == []
    for metadata, found in (
        ('{"team": {"name": "red"}}', [two, one]), ('{"n": 1}', [one]), ('{"n": true}', [two]),
        ('{"team": {"name": "red"}, "n": 1}', [one]), ('{"l": [2]}', [one]), ('{"x": 5}', []),
        ('{"team": {"name": "re"}}', []),
    ):  # fmt: skip
        assert await listed(metadata=metadata) == [box["id"] for box in found], metadata
    assert len(await listed(metadata="{}")) == 3
    for wrong in ("", "x", "[]", '"x"'):
        answer = await yard.client.get("/v1/sandboxes", params={"metadata": wrong})
        assert answer.json()["error"]["details"]["field"] == "metadata"


async def test_a_name_is_removed_by_clients_that_mean_null(yard: Yard) -> None:
    box = await yard.create(name="mine")
    path = f"/v1/sandboxes/{box['id']}"
    kept = await yard.client.patch(path, json={"name": None, "tags": ["t"]})
    assert kept.json()["data"]["name"] == "mine"
    strict = {"Sandyard-Strict": "1"}
    cleared = await yard.client.patch(path, json={"name": None}, headers=strict)
    assert (cleared.json()["data"]["name"], cleared.json()["data"]["tags"]) == (None, ["t"])
    assert (await yard.create(name="mine"))["name"] == "mine"
    named = await yard.client.patch(path, json={"name": "other"}, headers=strict)
    assert named.json()["data"]["name"] == "other"
