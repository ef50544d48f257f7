"""Machines that a restored database does not know: kept, saved, adopted, deleted."""

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.support.desk import Desk, open_desk
from tests.support.nodes import Machine

from sandyard.server.core.contracts.node import Phase, SnapshotFact
from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.egress import NO_RULES, NOTHING, Egress, Injection, Policy
from sandyard.server.core.errors import (
    ConflictError,
    DamagedError,
    NoCapacityError,
    NotFoundError,
    OtherVersionError,
    UnavailableError,
)
from sandyard.server.core.ids import new_uuid
from sandyard.server.core.node_ops import EnsurePaused, FindMachine, FindSnapshot
from sandyard.server.core.records import (
    Mount,
    Quarantined,
    Sandbox,
    Snapshot,
    Template,
    TemplateVersion,
    VersionAbout,
)
from sandyard.server.core.shapes import Shape
from sandyard.server.core.states import Status
from sandyard.server.service.people.administration import Administration


@pytest.fixture(params=[False, True], ids=["asked", "told"])
async def desk(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Desk]:
    async with open_desk(tmp_path, nodes_tell=request.param) as made:
        yield made


def admin_of(desk: Desk) -> Administration:
    sign_up: Any = None
    return Administration(store=desk.control.store, clock=desk.clock, sign_up=sign_up, plans={})


async def strangers(desk: Desk, count: int) -> list[Sandbox]:
    """Return sandboxes that the database has forgotten."""
    desk.back_up()
    made = [await desk.create(idle_timeout=0) for _ in range(count)]
    desk.restore()
    await desk.drive(30)
    return made


async def names_of(desk: Desk) -> tuple[str, str]:
    async with desk.control.store.read() as tx:
        (organization,) = await tx.organizations.every()
        ((user, _), *_) = await tx.users.members(organization.id)
    return organization.slug, user.email


async def quarantined(desk: Desk) -> list[Quarantined]:
    return await admin_of(desk).quarantine()


async def test_an_adopted_sandbox_keeps_its_rules_and_mounts(desk: Desk) -> None:
    owned = await desk.services.workspaces.create(desk.actor, "W")
    mounts = (Mount(owned.workspace.id, "/workspace"),)
    rules = Policy(
        Egress.DENY, ("a.test", "b.test"), inject=(Injection("b.test", {"X": "literal"}),)
    )
    desk.back_up()
    box = await desk.create(idle_timeout=0, network=rules, mounts=mounts)
    newer = await desk.services.workspaces.create(desk.actor, "newer")
    other = await desk.create(idle_timeout=0, mounts=(Mount(newer.workspace.id, "/workspace"),))
    desk.restore()
    await desk.drive(30)
    adopted = await admin_of(desk).adopt(box.id, *await names_of(desk))
    assert isinstance(adopted, Sandbox)
    assert (adopted.network.egress, adopted.network.allow) == (rules.egress, rules.allow)
    assert (adopted.network.inspect, adopted.network.inject) == (("b.test",), ())
    assert adopted.mounts == mounts
    assert adopted.reason is not None
    assert "headers" in adopted.reason.message
    _, using = await desk.services.workspaces.mounting(desk.actor, owned.workspace.id)
    assert [one.id for one in using] == [box.id]
    await desk.services.sandboxes.resume(desk.actor, box.id)
    assert desk.machine(box).policy.allow == rules.allow
    adopted = await admin_of(desk).adopt(other.id, *await names_of(desk))
    assert isinstance(adopted, Sandbox)
    assert (adopted.mounts, adopted.network) == ((), NO_RULES)
    assert adopted.reason is not None
    assert "1 of its workspaces" in adopted.reason.message


async def test_an_adopted_sandbox_keeps_its_desktop(desk: Desk) -> None:
    org_id, now = desk.actor.org_id, desk.clock.now()
    about = VersionAbout("mine", "Linux", "desktop", Shape(1, 512, 1024))
    digest = "d" * 24
    version = TemplateVersion(org_id, "mine", 1, digest, "r" * 64, 9, about, {}, new_uuid(), now)
    async with desk.control.store.write(org_id) as tx:
        await tx.templates.put(Template(org_id, "mine", "Mine", "", now, now, {"latest": 1}, 1))
        await tx.versions.add(version)
    desk.node.templates_ready = (*desk.node.templates_ready, f"mine@{digest}")
    await desk.drive(30)  # until it is known what the node has
    desk.back_up()
    box = await desk.create(idle_timeout=0, template="mine")
    desk.restore()
    await desk.drive(30)
    adopted = await admin_of(desk).adopt(box.id, *await names_of(desk))
    assert isinstance(adopted, Sandbox)
    assert adopted.has_desktop


async def test_a_sandbox_whose_rules_are_not_known_is_adopted_without_a_network(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuses(_: FindMachine) -> None:
        raise OtherVersionError("the node is of an earlier version")

    monkeypatch.setattr(desk.node, "find_machine", refuses)
    (box,) = await strangers(desk, 1)
    adopted = await admin_of(desk).adopt(box.id, *await names_of(desk))
    assert isinstance(adopted, Sandbox)
    assert adopted.network == NOTHING
    assert adopted.reason is not None
    assert "reaches nothing" in adopted.reason.message


async def test_a_stranger_is_saved_kept_and_adopted(desk: Desk) -> None:
    box, other = await strangers(desk, 2)
    assert {one.phase for one in desk.node.machines.values()} == {Phase.PAUSED}
    found = await quarantined(desk)
    assert {one.id for one in found} == {box.id, other.id}
    assert {one.phase for one in found} == {"paused"}
    slug, email = await names_of(desk)
    adopted = await admin_of(desk).adopt(box.id, slug, email)
    assert isinstance(adopted, Sandbox)
    assert (adopted.status, adopted.shape) == (Status.PAUSED, found[0].shape)
    with pytest.raises(NotFoundError):
        await admin_of(desk).adopt(box.id, slug, email)
    await desk.drive(30)
    desk.node.machines[box.id].remembers["word"] = "kept"
    back = await desk.services.sandboxes.resume(desk.actor, box.id)
    assert back.status is Status.RUNNING
    assert desk.node.machines[box.id].remembers["word"] == "kept"
    await desk.services.sandboxes.delete(desk.actor, box.id, wait=False)
    await desk.until(back, Status.DESTROYED)
    assert desk.node.machines.keys() == {other.id}
    assert [one.id for one in await quarantined(desk)] == [other.id]


async def test_a_stranger_is_deleted_when_an_operator_says_so(desk: Desk) -> None:
    box, other = await strangers(desk, 2)
    await admin_of(desk).condemn(box.id)
    with pytest.raises(NotFoundError):
        await admin_of(desk).condemn("sandbox-000000000000")
    await desk.drive(400, step=20)
    assert desk.node.machines.keys() == {other.id}
    assert [one.id for one in await quarantined(desk)] == [other.id]


async def test_a_strangers_time_comes_to_an_end(desk: Desk) -> None:
    (box,) = await strangers(desk, 1)
    await desk.clock.oversleep(timedelta(days=6.9).total_seconds())
    await desk.drive(400, step=20)
    assert desk.node.machines.keys() == {box.id}
    await desk.clock.oversleep(timedelta(days=0.2).total_seconds())
    await desk.drive(400, step=20)
    assert desk.node.machines == {}
    assert await quarantined(desk) == []


async def test_a_stranger_whose_row_comes_back_is_none_any_more(desk: Desk) -> None:
    """As when the wrong backup was restored first."""
    older, newer = desk.home / "older.db", desk.home / "newer.db"
    desk._copy(desk.home / "sandyard.db", older)
    box = await desk.create(idle_timeout=0)
    desk._copy(desk.home / "sandyard.db", newer)
    desk._copy(older, desk.home / "sandyard.db")
    await desk.drive(30)
    assert [one.id for one in await quarantined(desk)] == [box.id]
    desk._copy(newer, desk.home / "sandyard.db")
    await desk.drive(30)
    assert await quarantined(desk) == []
    assert (await desk.get(box)).status is Status.PAUSED
    assert (await desk.services.sandboxes.resume(desk.actor, box.id)).status is Status.RUNNING


async def test_a_stranger_that_cannot_be_saved_runs_on_and_is_not_adopted(
    desk: Desk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(_: EnsurePaused) -> int:
        raise NoCapacityError("the host's disk is full")

    monkeypatch.setattr(desk.node, "ensure_paused", full)
    (box,) = await strangers(desk, 1)
    assert desk.node.machines[box.id].phase is Phase.RUNNING
    assert sum("cannot save a machine in quarantine" in one for one in caplog.messages) == 1
    with pytest.raises(ConflictError, match="has to be saved first"):
        await admin_of(desk).adopt(box.id, *await names_of(desk))


async def test_a_thousand_strangers_are_saved_a_few_at_a_time(desk: Desk) -> None:
    for number in range(1000):
        desk.node.machines[f"sandbox-{number:012}"] = Machine(1, Phase.RUNNING, {})
    desk.node.asked.clear()
    await desk.drive(20)
    assert 0 < desk.node.asked.count("ensure_paused") <= 40
    box = await desk.create(idle_timeout=0)
    assert (await desk.get(box)).status is Status.RUNNING
    assert len(await quarantined(desk)) == 1000


async def test_what_was_said_of_an_earlier_machine_does_not_hold_for_a_later_one(
    desk: Desk,
) -> None:
    (box,) = await strangers(desk, 1)
    machine = desk.node.machines.pop(box.id)
    async with desk.control.store.write(Turn.ALONE) as tx:
        await tx.quarantine.condemn(box.id)
    machine.incarnation += 1
    desk.node.machines[box.id] = machine
    await desk.drive(400, step=20)
    assert desk.node.machines.keys() == {box.id}
    (found,) = await quarantined(desk)
    assert (found.incarnation, found.is_unwanted) == (machine.incarnation, False)


async def snapshot_strangers(desk: Desk, count: int) -> tuple[Sandbox, list[str]]:
    """Return a sandbox that the database knows, and snapshots that it has forgotten."""
    box = await desk.create(idle_timeout=0)
    desk.back_up()
    made = [
        (await desk.services.snapshots.create(desk.actor, box.id, name=f"s-{number}")).id
        for number in range(count)
    ]
    desk.restore()
    await desk.drive(60)
    return box, made


async def test_a_snapshot_without_a_row_is_kept_adopted_and_used(desk: Desk) -> None:
    box, (kept, deleted) = await snapshot_strangers(desk, 2)
    found = {one.id: one for one in await quarantined(desk)}
    assert found.keys() == {kept, deleted}
    assert {(one.kind, one.phase, one.size_bytes > 0) for one in found.values()} == {
        ("snapshot", "saved", True)
    }
    slug, email = await names_of(desk)
    adopted = await admin_of(desk).adopt(kept, slug, email)
    assert (adopted.id, adopted.shape) == (kept, found[kept].shape)
    await admin_of(desk).condemn(deleted)
    with pytest.raises(ConflictError, match="being deleted"):
        await admin_of(desk).adopt(deleted, slug, email)
    await desk.drive(400, step=20)
    assert desk.node.snapshots.keys() == {kept}
    assert await quarantined(desk) == []
    (listed,) = await desk.services.snapshots.page(desk.actor, limit=10, after=None)
    assert listed.id == kept
    new = await desk.create(snapshot=kept, template=None)
    assert (new.status, new.template) == (Status.RUNNING, box.template)
    await desk.services.snapshots.delete(desk.actor, kept)
    await desk.drive(400, step=20)
    assert not desk.node.snapshots


async def test_a_snapshots_time_in_quarantine_comes_to_an_end(desk: Desk) -> None:
    await snapshot_strangers(desk, 30)
    await desk.drive(400, step=20)
    assert len(await quarantined(desk)) == 30
    await desk.clock.oversleep(timedelta(days=6.9).total_seconds())
    await desk.drive(400, step=20)
    assert len(desk.node.snapshots) == 30
    await desk.clock.oversleep(timedelta(days=0.2).total_seconds())
    await desk.drive(800, step=20)
    assert not desk.node.snapshots
    assert await quarantined(desk) == []


async def test_a_snapshot_that_cannot_be_read_is_kept_and_can_be_deleted(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def damaged(_: FindSnapshot) -> SnapshotFact:
        raise DamagedError("cannot use what was saved: its manifest was altered")

    monkeypatch.setattr(desk.node, "find_snapshot", damaged)
    _, (one,) = await snapshot_strangers(desk, 1)
    with pytest.raises(ConflictError, match="cannot be read"):
        await admin_of(desk).adopt(one, *await names_of(desk))
    await admin_of(desk).condemn(one)
    await desk.drive(400, step=20)
    assert not desk.node.snapshots


async def test_a_snapshot_that_cannot_be_asked_for_now_is_asked_for_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = desk.node.find_snapshot, list[str]()

    async def slow(wanted: FindSnapshot) -> SnapshotFact:
        asked.append(wanted.snapshot_id)
        if len(asked) < 4:
            raise UnavailableError("the node does not answer")
        return await real(wanted)

    monkeypatch.setattr(desk.node, "find_snapshot", slow)
    _, (one,) = await snapshot_strangers(desk, 1)
    await desk.drive(400, step=20)
    (found,) = await quarantined(desk)
    assert (found.id, found.template, len(asked)) == (one, "base-minimal", 4)
    made = await admin_of(desk).adopt(one, *await names_of(desk))
    async with desk.control.store.read() as tx:
        (period,) = await tx.storage.of("snapshot", one)
        assert (period.size_bytes, period.ended_at) == (found.size_bytes, None)
    assert isinstance(made, Snapshot)
    assert made.os == "debian"
