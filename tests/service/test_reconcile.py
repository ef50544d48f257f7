"""What the platform does by itself: idle, expiry, silence, several nodes and servers."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.support import desk as desks
from tests.support.clock import DrivenClock
from tests.support.desk import Desk, still, until
from tests.support.nodes import FakeNode, Machine, a_wish

from sandyard.server.core.contracts.node import MachineFact, Phase, TemplateFact
from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.errors import (
    ConflictError,
    DeadlineExceededError,
    InternalError,
    NoCapacityError,
    OtherVersionError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.core.ids import new_sandbox_id
from sandyard.server.core.node_ops import EnsureGone, EnsureRunning, ListTemplates, Report
from sandyard.server.core.records import Sandbox
from sandyard.server.core.shapes import Shape
from sandyard.server.core.states import Event, Status
from sandyard.server.service import placement
from sandyard.server.service.money.metering import BEAT
from sandyard.server.service.nodes import Nodes
from sandyard.server.service.sandboxes.create import NewSandbox

WISH = NewSandbox("base-minimal")


_tells = [False]


@pytest.fixture(autouse=True, params=[False, True], ids=["asked", "told"])
def nodes_tell(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether nodes say unasked what they have, as those on other hosts do."""
    monkeypatch.setattr(placement, "_LOT", 1)  # the best of all, which a test can tell
    _tells.append(request.param)
    yield request.param
    _tells.pop()


def open_desk(home: Path, **options: Any) -> AbstractAsyncContextManager[Desk]:
    return desks.open_desk(home, nodes_tell=_tells[-1], **options)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with open_desk(tmp_path) as made:
        yield made


# --- idle and expiry ----------------------------------------------------------------------------


async def test_what_nobody_uses_is_paused_and_says_so(desk: Desk) -> None:
    box = await desk.create(idle_timeout=60)
    never = await desk.create(idle_timeout=0)
    await desk.drive(50)
    assert (await desk.get(box)).status is Status.RUNNING
    await desk.drive(14)
    idle = await desk.until(box, Status.PAUSED)
    assert idle.reason is not None
    assert idle.reason.code == "idle"
    await desk.clock.oversleep(3600)
    await desk.drive(10)
    assert (await desk.get(never)).status is Status.RUNNING


async def test_a_command_under_way_is_a_use_however_long_it_takes(desk: Desk) -> None:
    box = await desk.create(idle_timeout=10)
    await desk.execute(box, "x")
    desk.machine(box).uses += 1  # through another server, of which this one knows nothing
    await desk.drive(60)
    assert (await desk.get(box)).status is Status.RUNNING
    desk.machine(box).uses -= 1
    await desk.drive(14)
    await desk.until(box, Status.PAUSED)


async def test_a_busy_processor_is_a_use_and_is_noted_as_one(desk: Desk) -> None:
    box = await desk.create(idle_timeout=10)
    desk.machine(box).busy_percent = 5.1
    await desk.drive(20)
    found = await desk.get(box)
    assert (found.status, found.last_activity_kind) == (Status.RUNNING, "cpu")
    desk.machine(box).busy_percent = 4.9
    await desk.drive(14)
    await desk.until(box, Status.PAUSED)


async def test_somebody_who_comes_at_the_very_moment_keeps_it_up(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = await desk.create(idle_timeout=10)
    apply = desk.control.lifecycle.apply
    came = asyncio.Event()

    async def used_meanwhile(sandbox: Sandbox, event: Event, **changes: object) -> object:
        done = await apply(sandbox, event, **changes)  # type: ignore[arg-type]
        if event is Event.PAUSE:
            came.set()
            monkeypatch.undo()
            async with desk.control.store.write(Turn.ALONE) as tx:
                await tx.activity.touch(box.id, at=desk.clock.now(), kind="exec")
        return done

    monkeypatch.setattr(desk.control.lifecycle, "apply", used_meanwhile)
    await desk.drive(12)
    async with asyncio.timeout(20):
        await came.wait()
    await desk.until(box, Status.RUNNING)
    assert "ensure_paused" not in desk.node.asked


async def test_the_end_that_was_set_comes(desk: Desk) -> None:
    box = await desk.create(expires_in=30, idle_timeout=0)
    await desk.drive(28)
    assert (await desk.get(box)).status is Status.RUNNING
    await desk.drive(6)
    await desk.until(box, Status.DESTROYED)
    assert desk.node.machines == {}


async def test_one_that_is_paused_at_its_end_has_another_whenever_it_is_resumed(desk: Desk) -> None:
    box = await desk.create(expires_in=60, pauses_at_end=True, idle_timeout=0)
    first = box.expires_at
    assert first is not None
    desk.machine(box).uses = 1  # also where it is in use
    await desk.drive(56)
    assert (await desk.get(box)).status is Status.RUNNING
    await desk.drive(10)
    paused = await desk.until(box, Status.PAUSED)
    assert paused.expires_at is None
    assert paused.reason is not None
    assert paused.reason.code == "expired"
    await desk.clock.oversleep(600)
    await desk.drive(10)
    assert (await desk.get(box)).status is Status.PAUSED
    # A use resumes it, as after any pause, and begins its time anew.
    desk.machine(box).uses = 0
    await desk.execute(box, "true")
    again = await desk.get(box)
    assert (again.status, again.reason) == (Status.RUNNING, None)
    assert again.expires_at is not None
    assert timedelta(seconds=50) < again.expires_at - desk.clock.now() <= timedelta(seconds=60)
    # A pause by somebody takes the end away as well.
    await desk.services.sandboxes.pause(desk.actor, box.id)
    assert (await desk.get(box)).expires_at is None
    await desk.services.sandboxes.delete(desk.actor, box.id, wait=False)


@pytest.mark.parametrize("keeps_memory", [True, False])
async def test_a_pause_at_the_end_may_leave_only_the_disk(desk: Desk, keeps_memory: bool) -> None:
    box = await desk.create(
        expires_in=60, pauses_at_end=True, idle_timeout=0, keeps_memory=keeps_memory
    )
    await desk.drive(70)
    await desk.until(box, Status.PAUSED)
    again = await desk.services.sandboxes.resume(desk.actor, box.id)
    boots = again.from_disk_incarnation == again.incarnation
    assert (again.status, boots) == (Status.RUNNING, not keeps_memory)
    # Its owner's pauses keep the memory, also after one that was to leave only the disk failed.
    desk.node.refusal = NoCapacityError("the disk is full")
    with pytest.raises(NoCapacityError):
        await desk.services.sandboxes.pause(desk.actor, box.id, keeps_memory=False)
    await desk.services.sandboxes.pause(desk.actor, box.id)
    last = await desk.services.sandboxes.resume(desk.actor, box.id)
    assert last.from_disk_incarnation != last.incarnation
    # One that leaves only the disk counts until the sandbox has started.
    await desk.services.sandboxes.pause(desk.actor, box.id, keeps_memory=False)
    desk.node.refusal = NoCapacityError("the host's memory is used")
    with pytest.raises(NoCapacityError):
        await desk.services.sandboxes.resume(desk.actor, box.id)
    booted = await desk.services.sandboxes.resume(desk.actor, box.id)
    assert booted.from_disk_incarnation == booted.incarnation


async def test_a_pause_at_the_end_that_fails_is_tried_again_after_a_while(desk: Desk) -> None:
    box = await desk.create(expires_in=30, pauses_at_end=True, idle_timeout=0)
    desk.node.refusal = NoCapacityError("the disk is full")
    await desk.drive(40)
    await desk.until(box, Status.RUNNING)
    assert desk.node.asked.count("ensure_paused") == 1
    await desk.drive(70)
    await desk.until(box, Status.PAUSED)
    assert desk.node.asked.count("ensure_paused") == 2


async def test_nothing_that_is_paused_at_its_end_is_deleted_whatever_becomes_of_it(
    three: Desk,
) -> None:
    ends = {"expires_in": 60, "pauses_at_end": True, "idle_timeout": 0}
    dead, silent = await three.create(**ends), await three.create(**ends)
    three.nodes[str(dead.node_id)].die(dead.id)
    await three.drive(4)
    broken = await three.until(dead, Status.ERROR)
    assert broken.expires_at is None
    away = three.nodes[str(silent.node_id)]
    away.is_silent = True
    await three.drive(200, step=10)
    assert (await three.get(silent)).status is Status.SUSPECTED_MISSING
    away.is_silent = False
    await three.drive(80, step=5)
    await three.until(silent, Status.PAUSED)
    assert (await three.get(dead)).status is Status.ERROR


async def test_a_host_short_of_memory_has_the_one_used_least_lately_paused(desk: Desk) -> None:
    boxes = []
    for _ in range(3):
        boxes.append(await desk.create(idle_timeout=0))
        desk.clock.time += timedelta(seconds=5)
    desk.machine(boxes[0]).uses = 1
    desk.node.is_short_of_memory = True
    await desk.drive(2)
    paused = await desk.until(boxes[1], Status.PAUSED)
    desk.node.is_short_of_memory = False
    assert paused.reason is not None
    assert paused.reason.code == "host_memory_low"
    assert (await desk.get(boxes[0])).status is Status.RUNNING
    assert (await desk.get(boxes[2])).status is Status.RUNNING


async def test_a_host_short_of_memory_is_relieved_of_one_after_the_other(desk: Desk) -> None:
    boxes = [await desk.create(idle_timeout=0) for _ in range(4)]
    saving, ensure_paused = asyncio.Event(), desk.node.ensure_paused

    async def slowly(*args: Any, **more: Any) -> int:
        await saving.wait()
        return await ensure_paused(*args, **more)

    desk.node.ensure_paused = slowly  # type: ignore[method-assign]
    desk.node.is_short_of_memory = True
    await desk.drive(10)
    found = [(await desk.get(one)).status for one in boxes]
    assert sorted(found) == [Status.PAUSING, *[Status.RUNNING] * 3]
    desk.node.is_short_of_memory = False
    saving.set()
    await desk.until(boxes[found.index(Status.PAUSING)], Status.PAUSED)
    await desk.drive(4)
    assert [(await desk.get(one)).status for one in boxes].count(Status.RUNNING) == 3


# --- silence ------------------------------------------------------------------------------------


async def test_a_silent_agent_is_suspected_and_paused_after_an_hour(desk: Desk) -> None:
    box = await desk.create(idle_timeout=0)
    desk.machine(box).is_silent = True
    await desk.drive(4)
    suspected = await desk.until(box, Status.SUSPECTED_MISSING)
    assert suspected.reason is not None
    assert suspected.reason.code == "agent_silent"
    desk.machine(box).is_silent = False
    await desk.drive(4)
    await desk.until(box, Status.RUNNING)
    desk.machine(box).is_silent = True
    await desk.drive(4)
    await desk.clock.oversleep(3700)
    await desk.drive(10)
    await desk.until(box, Status.PAUSED)


async def test_a_machine_that_died_while_nobody_looked_is_not_charged_for(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        box = await desk.create(idle_timeout=0)
        await desk.drive(10)
        await desk.kill()
        nodes, clock, last = desk.nodes, desk.clock, desk.clock.now()
    nodes["fake"].die(box.id)
    clock.time += timedelta(hours=3)
    async with open_desk(tmp_path, nodes=nodes, clock=clock) as desk:
        await desk.until(box, Status.ERROR)
        async with desk.control.store.read() as tx:
            (period,) = await tx.usage.of_sandbox(box.id)
    assert period.ended_at is not None
    assert timedelta() <= last - period.ended_at < timedelta(seconds=10)


async def test_a_machine_that_died_in_the_moment_nobody_looked_is_not_charged_for(
    tmp_path: Path,
) -> None:
    async with open_desk(tmp_path) as desk:
        box = await desk.create(idle_timeout=0)
        await desk.drive(10)
        await desk.kill()
        nodes, clock, last = desk.nodes, desk.clock, desk.clock.now()
        async with desk.control.store.write(Turn.ALONE) as tx:
            await tx.facts.note(BEAT, last)
    nodes["fake"].die(box.id)
    clock.time += timedelta(seconds=5)  # which is too short for the node to have been missed
    async with open_desk(tmp_path, nodes=nodes, clock=clock) as desk:
        await desk.until(box, Status.ERROR)
        async with desk.control.store.read() as tx:
            (period,) = await tx.usage.of_sandbox(box.id)
    assert period.ended_at == last


# --- what nobody wants --------------------------------------------------------------------------


async def test_what_was_removed_goes_from_its_node_at_the_second_look(desk: Desk) -> None:
    box = await desk.create(idle_timeout=0)
    shot = await desk.services.snapshots.create(desk.actor, box.id, None)
    await desk.services.snapshots.delete(desk.actor, shot.id)
    await desk.services.sandboxes.delete(desk.actor, box.id, wait=False)
    await desk.until(box, Status.DESTROYED)
    # Both are there again: they come late, from a start and a save that were under way.
    desk.node.machines[box.id] = Machine(1, Phase.RUNNING, {})
    desk.node.snapshots[shot.id] = {}
    await desk.drive(2)
    assert box.id in desk.node.machines
    await desk.drive(4)
    assert desk.node.machines == {}
    assert desk.node.snapshots == {}
    async with desk.control.store.read() as tx:
        assert (await tx.snapshots.removed("fake")).keys() == {shot.id}
    await desk.clock.oversleep(4000)
    await desk.drive(10)
    async with desk.control.store.read() as tx:
        assert not await tx.snapshots.removed("fake")


async def test_what_the_database_does_not_know_is_kept_and_logged_once(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    """It may have been made after the backup that the database was restored from."""
    desk.back_up()
    box = await desk.create(idle_timeout=0)
    shot = await desk.services.snapshots.create(desk.actor, box.id, None)
    forked = await desk.services.snapshots.fork(desk.actor, box.id, 2)
    desk.restore()
    await desk.drive(60)
    assert desk.node.machines.keys() == {one.id for one in (box, *forked)}
    assert shot.id in desk.node.snapshots
    said = [one for one in caplog.messages if "newer than the database" in one]
    assert sum("3 machines" in one and "sandbox-" in one for one in said) == 1
    assert sum(shot.id in one for one in said) == 1
    assert len(said) == 2


async def test_what_is_kept_keeps_nothing_else_from_being_removed(desk: Desk) -> None:
    box = await desk.create(idle_timeout=0)
    for number in range(2000):
        desk.node.machines[f"sandbox-{number:012}"] = Machine(1, Phase.RUNNING, {})
    await desk.drive(10)
    await desk.services.sandboxes.delete(desk.actor, box.id, wait=False)
    await desk.until(box, Status.DESTROYED)
    desk.node.machines[box.id] = Machine(1, Phase.RUNNING, {})
    for _ in range(20):  # until all is looked at, whatever the node says of changes
        if box.id in desk.node.machines:
            await desk.drive(20, step=20)
    assert box.id not in desk.node.machines
    assert len(desk.node.machines) == 2000


async def test_a_row_that_is_older_than_its_machine_does_not_remove_it(desk: Desk) -> None:
    """A sandbox that moved from node to node is elsewhere by the backup, and here since."""
    box = await desk.create(idle_timeout=0)
    async with desk.control.store.write(Turn.ALONE) as tx:
        found = await tx.sandboxes.find(box.id)
        assert found is not None
        moved = await tx.sandboxes.replace(replace(found, node_id="elsewhere"))
        assert moved is not None
    desk.node.shown(box.id, moved.version + 1)
    await desk.drive(20)
    assert box.id in desk.node.machines
    desk.node.shown(box.id, moved.version)
    await desk.drive(6)
    assert desk.node.machines == {}


async def test_what_is_left_nowhere_is_orphaned_at_the_second_look(desk: Desk) -> None:
    box = await desk.create()
    await desk.services.sandboxes.pause(desk.actor, box.id)
    desk.node.machines.clear()
    await desk.drive(6)
    await desk.until(box, Status.ORPHANED)


# --- several nodes ------------------------------------------------------------------------------


@pytest.fixture
async def three(tmp_path: Path) -> AsyncIterator[Desk]:
    nodes = {one: FakeNode(one) for one in ("a", "b", "c")}
    async with open_desk(tmp_path, nodes=nodes) as made:
        yield made


async def test_a_create_goes_where_its_template_and_most_room_are(three: Desk) -> None:
    three.nodes["a"].room, three.nodes["b"].room, three.nodes["c"].room = 3, 9, 30
    three.nodes["c"].templates_ready = ("other",)
    await three.drive(4)
    assert (await three.create()).node_id == "b"
    assert (await three.create(template="other")).node_id == "c"
    # What was reported is a hint; the node has the last word.
    three.nodes["b"].room = 0
    assert (await three.create()).node_id == "a"
    three.nodes["a"].room = 0
    with pytest.raises(NoCapacityError):
        await three.create()


@pytest.mark.parametrize(
    "failure",
    [InternalError("the hypervisor did not come up"), DeadlineExceededError("no agent in time")],
)
async def test_a_node_whose_starts_fail_is_asked_last_for_minutes(
    three: Desk, failure: SandyardError
) -> None:
    best, *others = sorted(three.nodes.values(), key=lambda one: one.room, reverse=True)
    best.refusal = failure
    moved = await three.create(idle_timeout=0)
    assert (moved.status, moved.incarnation) == (Status.RUNNING, 2)
    await three.drive(12)  # what was reported is no hint any more
    for _ in range(2):
        await three.create(idle_timeout=0)
    assert best.machines == {}
    await three.clock.oversleep(180)
    await three.drive(10)
    await three.create(idle_timeout=0)
    assert len(best.machines) == 1
    assert sum(len(one.machines) for one in others) == 3


async def test_what_fails_where_no_other_has_room_has_failed_at_once_and_says_why(
    three: Desk,
) -> None:
    best, *others = sorted(three.nodes.values(), key=lambda one: one.room, reverse=True)
    await three.drive(4)
    for one in others:
        one.room = 0
    best.refusal = InternalError("the hypervisor did not come up")
    broken = await three.create(idle_timeout=0)
    assert (broken.status, broken.incarnation) == (Status.FAILED, 1)
    assert broken.reason is not None
    assert broken.reason.message == "the hypervisor did not come up"
    # What may be otherwise soon is tried again where it is, and waits for nobody else.
    best.refusal = DeadlineExceededError("no agent in time")
    again = await three.create(idle_timeout=0)
    assert (again.status, again.node_id, again.incarnation) == (Status.RUNNING, best.node_id, 1)


async def test_many_ends_that_wait_are_taken_up_one_after_the_other(desk: Desk) -> None:
    box = await desk.create(idle_timeout=0)
    async with desk.control.store.write(box.org_id) as tx:
        for _ in range(200):
            left = replace(box, id=new_sandbox_id(), status=Status.DESTROYING, version=1)
            await tx.sandboxes.insert(left)
    await desk.drive(4)
    async with desk.control.store.read() as tx:
        assert await tx.sandboxes.on_node("fake", frozenset({Status.DESTROYING})) == []


async def test_of_a_template_that_nodes_tell_otherwise_most_decide_and_then_the_smaller(
    three: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = dict.fromkeys(three.nodes, Shape(1, 512, 1024))
    templates = FakeNode.templates

    async def as_told(node: FakeNode, asked: ListTemplates) -> tuple[TemplateFact, ...]:
        found = await templates(node, asked)
        return tuple(replace(one, defaults=told[node.node_id]) for one in found)

    monkeypatch.setattr(FakeNode, "templates", as_told)
    told["a"] = Shape(32, 65536, 512_000)
    assert (await three.services.templates.shipped.ready("base-minimal")).defaults == told["b"]
    await three.drive(4)
    told["b"] = told["a"]
    assert (await three.services.templates.shipped.ready("base-minimal")).defaults == told["a"]
    await three.drive(4)
    three.nodes["c"].templates_ready = ()
    told["b"] = Shape(1, 256, 1024)
    assert (await three.services.templates.shipped.ready("base-minimal")).defaults == told["b"]


async def test_what_a_node_is_too_old_for_is_started_by_another(three: Desk) -> None:
    async def refuses(*_: object, **__: object) -> Any:
        raise OtherVersionError("this node does not know it")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("a", "b"):
            patch.setattr(three.nodes[name], "ensure_running", refuses)
        boxes = [await three.create(idle_timeout=0) for _ in range(4)]
        assert {(one.status, one.node_id) for one in boxes} == {(Status.RUNNING, "c")}
        patch.setattr(three.nodes["c"], "ensure_running", refuses)
        waiting = await three.services.creation.create(three.actor, WISH)
        await three.drive(12)
        assert (await three.get(waiting)).status is Status.CREATING
    await three.drive(20)  # they were updated
    assert (await three.get(waiting)).status is Status.RUNNING


async def test_what_two_nodes_cannot_start_has_failed(three: Desk) -> None:
    for one in three.nodes.values():
        one.refusal = InternalError("the hypervisor did not come up")
    broken = await three.create(idle_timeout=0)
    assert broken.status is Status.FAILED
    assert sum(one.refusal is None for one in three.nodes.values()) == 2
    assert not any(one.machines for one in three.nodes.values())


async def test_snapshots_and_forks_stay_where_their_source_is(three: Desk) -> None:
    three.nodes["b"].room = 2000
    await three.drive(4)
    box = await three.create()
    assert box.node_id == "b"
    three.nodes["b"].room = 5
    await three.drive(4)
    await three.services.snapshots.create(three.actor, box.id, "s")
    forks = await three.services.snapshots.fork(three.actor, box.id, 2)
    clone = await three.create(template=None, snapshot="s")
    for one in (*forks, clone):
        assert (await three.until(one, Status.RUNNING)).node_id == "b"
    three.nodes["b"].room = 0
    with pytest.raises(NoCapacityError):
        await three.services.snapshots.fork(three.actor, box.id, 1)


async def test_one_silent_node_costs_nobody_else_anything(three: Desk) -> None:
    three.nodes["a"].room = 2000
    await three.drive(4)
    lost = await three.create(idle_timeout=0)
    three.nodes["a"].is_silent = True
    await three.drive(2)  # its lease lasts four
    assert (await three.get(lost)).status is Status.RUNNING, "a moment's silence is no trouble"
    other = await three.create(idle_timeout=30)
    assert other.node_id != "a"
    await three.drive(20)
    suspected = await three.until(lost, Status.SUSPECTED_MISSING)
    assert suspected.reason is not None
    assert suspected.reason.code == "node_silent"
    assert (await three.get(other)).status is Status.RUNNING
    await three.drive(16)
    await three.until(other, Status.PAUSED)
    three.nodes["a"].is_silent = False
    await three.drive(4)
    await three.until(lost, Status.RUNNING)


async def test_a_node_that_hangs_is_as_one_that_is_silent(three: Desk) -> None:
    three.nodes["a"].room = 2000
    await three.drive(4)
    lost = await three.create(idle_timeout=0)

    async def hang(_: Report) -> None:
        await asyncio.Event().wait()

    three.nodes["a"].report = hang  # type: ignore[assignment,method-assign]
    await three.drive(40)
    await three.until(lost, Status.SUSPECTED_MISSING)
    creating = asyncio.ensure_future(three.create())
    await three.drive(6)
    assert (await creating).node_id != "a"


async def test_a_start_on_a_node_that_falls_silent_goes_to_another(three: Desk) -> None:
    three.nodes["a"].room = 2000
    await three.drive(4)
    three.nodes["a"].gate.clear()
    box = await three.services.creation.create(three.actor, WISH)
    assert box.node_id == "a"
    await until(lambda: asked(three.nodes["a"], "ensure_running"))
    three.nodes["a"].is_silent = True
    three.nodes["a"].gate.set()
    moved = await three.until(box, Status.RUNNING)
    assert moved.node_id in ("b", "c")
    assert moved.incarnation == 2
    statuses = sorted(one.status for one in await three.feed(box))
    assert statuses == ["creating", "creating", "pending", "running"]


async def asked(node: FakeNode, what: str) -> bool:
    return what in node.asked


async def test_what_a_node_brought_up_although_it_was_given_up_goes_when_it_answers(
    three: Desk,
) -> None:
    three.nodes["a"].room = 2000
    await three.drive(4)
    three.nodes["a"].refusal = UnavailableError("no answer")
    box = await three.services.creation.create(three.actor, WISH)
    three.nodes["a"].is_silent = True
    moved = await three.until(box, Status.RUNNING)
    assert moved.node_id != "a"
    three.nodes["a"].is_silent = False
    three.nodes["a"].refusal = None
    await three.nodes["a"].do(EnsureRunning(a_wish(box.id, 1)))
    await three.drive(8)
    assert three.nodes["a"].machines == {}
    assert three.machine(box).phase is Phase.RUNNING
    assert (await three.get(box)).status is Status.RUNNING


async def test_where_no_node_can_take_it_it_waits_until_one_can(three: Desk) -> None:
    for name in ("b", "c"):
        three.nodes[name].templates_ready = ()
    await three.drive(4)
    three.nodes["a"].gate.clear()
    box = await three.services.creation.create(three.actor, WISH)
    await until(lambda: asked(three.nodes["a"], "ensure_running"))
    three.nodes["a"].is_silent = True
    three.nodes["a"].gate.set()
    await three.drive(6)
    assert (await three.get(box)).status is Status.CREATING
    three.nodes["c"].templates_ready = ("base-minimal",)
    await three.drive(8)
    assert (await three.until(box, Status.RUNNING)).node_id == "c"


# --- several servers ----------------------------------------------------------------------------


async def test_what_a_killed_server_was_at_work_on_is_taken_up_by_its_peer(tmp_path: Path) -> None:
    clock, node = DrivenClock(), FakeNode()
    nodes = {"fake": node}
    async with AsyncExitStack() as held:
        first = await held.enter_async_context(
            open_desk(tmp_path, nodes=nodes, clock=clock, server_id="one")
        )
        second = await held.enter_async_context(
            open_desk(tmp_path, nodes=nodes, clock=clock, server_id="two")
        )
        node.gate.clear()
        box = await first.services.creation.create(first.actor, WISH)
        await until(lambda: asked(node, "ensure_running"))
        await first.kill()
        node.gate.set()
        await second.drive(10)
        # Its lease is another's until it runs out: a peer takes nothing from a living server.
        assert (await second.get(box)).status is Status.CREATING
        await second.drive(26)
        assert (await second.until(box, Status.RUNNING)).incarnation == 1
        assert len(node.machines) == 1


async def test_a_server_that_starts_again_takes_up_its_own_and_leaves_its_peers_alone(
    tmp_path: Path,
) -> None:
    clock, node = DrivenClock(), FakeNode()
    nodes = {"fake": node}
    node.gate.clear()
    boxes = {}
    for server_id in ("one", "two"):
        async with open_desk(tmp_path, nodes=nodes, clock=clock, server_id=server_id) as desk:
            boxes[server_id] = await desk.services.creation.create(desk.actor, WISH)
            await still()
    node.gate.set()
    async with open_desk(tmp_path, nodes=nodes, clock=clock, server_id="one") as desk:
        await desk.until(boxes["one"], Status.RUNNING)
        assert (await desk.get(boxes["two"])).status is Status.CREATING
        await desk.drive(36)
        await desk.until(boxes["two"], Status.RUNNING)


async def test_two_servers_look_at_one_node_and_do_everything_once(tmp_path: Path) -> None:
    clock, node = DrivenClock(), FakeNode()
    nodes = {"fake": node}
    async with AsyncExitStack() as held:
        desks = [
            await held.enter_async_context(
                open_desk(tmp_path, nodes=nodes, clock=clock, server_id=one)
            )
            for one in ("one", "two")
        ]
        boxes = [await desk.create(idle_timeout=20) for desk in desks for _ in range(3)]
        await desks[0].drive(24)
        for box in boxes:
            await desks[0].until(box, Status.PAUSED)
        assert node.asked.count("ensure_paused") == len(boxes)
        for box in boxes:
            feed = [one.event_type for one in await desks[1].feed(box)]
            assert feed.count("sandbox.paused") == 1


async def test_a_start_that_its_node_refuses_goes_to_another_at_a_pace(
    three: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = three.nodes.values()
    for other in others:
        other.room = 5
    asked = 0

    async def refuses(_: EnsureRunning) -> MachineFact:
        nonlocal asked
        asked += 1
        raise NoCapacityError("cannot place one more machine: all slots are in use")

    monkeypatch.setattr(first, "ensure_running", refuses)
    box = await three.create()
    assert (box.status, asked) == (Status.RUNNING, 1)
    assert box.node_id != first.node_id
    for other in others:
        monkeypatch.setattr(other, "ensure_running", refuses)
    asked = 0
    wish = NewSandbox("base-minimal", expires_in=400)
    waiting = await three.services.creation.create(three.actor, wish)
    await three.drive(20)
    assert 2 <= asked <= 30, "it is paced, wherever it goes"
    await three.clock.oversleep(320)
    await three.drive(10)
    assert (await three.get(waiting)).status is Status.FAILED
    await three.clock.oversleep(100)
    await three.drive(10)
    assert (await three.get(waiting)).status is Status.DESTROYED, "its end comes"


async def test_a_start_that_its_node_takes_for_overtaken_is_given_up_in_time(desk: Desk) -> None:
    async def refuses(*_: object, **__: object) -> Any:
        raise ConflictError("this was overtaken by what came later")

    desk.node.ensure_running = refuses  # type: ignore[method-assign]
    box = await desk.services.creation.create(desk.actor, NewSandbox("base-minimal"))
    await desk.drive(20)
    assert (await desk.get(box)).status is Status.CREATING
    await desk.clock.oversleep(700)
    await desk.drive(10)
    failed = await desk.until(box, Status.FAILED)
    assert failed.reason is not None
    assert "overtaken" in failed.reason.message


async def test_a_node_that_hangs_in_whatever_it_is_asked_blocks_nobody(
    three: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_ = three.nodes.values()

    async def hangs(*_: object, **__: object) -> Any:
        await asyncio.Event().wait()

    for name in ("templates", "find_room", "report", "ensure_running", "ensure_paused"):
        monkeypatch.setattr(first, name, hangs)
    creating = asyncio.create_task(
        three.services.creation.create(three.actor, NewSandbox("base-minimal"))
    )
    await three.drive(60, step=5)
    assert (await three.get(await creating)).status is Status.RUNNING


async def test_a_start_on_a_node_that_comes_to_hang_goes_to_another(
    three: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_ = three.nodes.values()

    async def hangs(*_: object, **__: object) -> Any:
        monkeypatch.setattr(first, "report", hangs)
        await asyncio.Event().wait()

    monkeypatch.setattr(first, "ensure_running", hangs)
    made = await three.services.creation.create(three.actor, NewSandbox("base-minimal"))
    assert made.node_id == first.node_id
    await three.drive(60, step=5)
    now = await three.get(made)
    assert now.status is Status.RUNNING
    assert now.node_id != first.node_id


async def test_nobody_pays_for_what_a_node_did_while_it_was_not_heard_of(tmp_path: Path) -> None:
    node, clock = FakeNode(), DrivenClock()
    async with open_desk(tmp_path, nodes={"fake": node}, clock=clock) as desk:
        box = await desk.create(idle_timeout=0)
        await desk.drive(10)
    clock.time += timedelta(hours=5)
    node.is_silent = True
    async with open_desk(tmp_path, nodes={"fake": node}, clock=clock) as desk:
        await desk.drive(20)
        assert (await desk.get(box)).status is Status.SUSPECTED_MISSING
        async with desk.control.store.read() as tx:
            (period,) = await tx.usage.of_sandbox(box.id)
        assert period.ended_at is not None
        assert period.ended_at - period.started_at < timedelta(seconds=30)


async def test_a_node_never_heard_of_is_silent_too(tmp_path: Path) -> None:
    nodes = {"a": FakeNode("a"), "b": FakeNode("b")}
    nodes["b"].is_silent = True
    async with open_desk(tmp_path, nodes=nodes) as desk:
        box = await desk.create(idle_timeout=0)
        there = replace(box, id=new_sandbox_id(), node_id="b")
        async with desk.control.store.write(Turn.ALONE) as tx:
            await tx.sandboxes.insert(there)
        await desk.drive(20)
        assert (await desk.get(there)).status is Status.SUSPECTED_MISSING
        assert (await desk.get(box)).status is Status.RUNNING


async def test_where_the_database_went_back_sandboxes_can_be_paused_resumed_and_deleted(
    desk: Desk,
) -> None:
    up, saved, gone = [await desk.create(idle_timeout=0) for _ in range(3)]
    desk.back_up()
    sandboxes = desk.services.sandboxes
    for box in (up, saved):
        await sandboxes.pause(desk.actor, box.id)
        await sandboxes.resume(desk.actor, box.id)
    await sandboxes.pause(desk.actor, saved.id)
    await sandboxes.delete(desk.actor, gone.id, wait=False)
    await desk.until(gone, Status.DESTROYED)
    desk.restore()
    shown = {one.sandbox_id: one.version for one in (await desk.node.do(Report())).machines}
    for box in (up, saved):
        assert (await desk.get(box)).version < shown[box.id]
    await desk.drive(4)
    assert (await desk.until(up, Status.RUNNING)).version >= shown[up.id]
    await desk.until(saved, Status.PAUSED)
    broken = await desk.until(gone, Status.ERROR)
    assert broken.reason is not None
    assert broken.reason.code == "machine_lost"
    await sandboxes.pause(desk.actor, up.id)
    for box in (up, saved):
        await sandboxes.resume(desk.actor, box.id)
        await desk.until(box, Status.RUNNING)
    for box in (up, saved, gone):
        await sandboxes.delete(desk.actor, box.id, wait=False)
        await desk.until(box, Status.DESTROYED)
    assert desk.node.machines == {}


async def test_what_went_back_can_be_deleted_before_anybody_compared_it(desk: Desk) -> None:
    box = await desk.create(idle_timeout=0)
    desk.back_up()
    await desk.services.sandboxes.pause(desk.actor, box.id)
    desk.restore()
    await desk.services.sandboxes.delete(desk.actor, box.id, wait=False)
    await desk.until(box, Status.DESTROYED)
    assert desk.node.machines == {}


async def test_a_node_cannot_have_a_row_believe_anything(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    box = await desk.create(idle_timeout=0)
    desk.node.shown(box.id, 2**40)
    await desk.drive(4)
    assert (await desk.get(box)).version < 100
    assert "reports a newer row version" in caplog.text
    # Neither step by step: there is an end to it before the database has no room for more.
    async with desk.control.store.write(box.org_id) as tx:
        near = await tx.sandboxes.catch_up(await desk.get(box), version=2**30 - 5, incarnation=1)
    assert near
    caplog.clear()
    desk.node.shown(box.id, 2**30 + 5)
    await desk.drive(4)
    assert (await desk.get(box)).version <= 2**30
    assert "reports a newer row version" in caplog.text
    other = await desk.create(idle_timeout=0)
    desk.node.machines[other.id].incarnation = 2**40
    desk.node.shown(other.id, (await desk.get(other)).version + 5)
    caplog.clear()
    await desk.drive(4)
    assert (await desk.get(other)).incarnation < 100
    assert "reports a newer row version" in caplog.text


async def test_a_fork_of_what_was_booted_anew_goes_on_from_its_own_memory(desk: Desk) -> None:
    services = desk.services
    box = await desk.create(idle_timeout=0)
    await services.sandboxes.restart(desk.actor, box.id)
    assert (await desk.until(box, Status.RUNNING)).from_disk_incarnation == 2
    (fork,) = await services.snapshots.fork(desk.actor, box.id, 1)
    await desk.until(fork, Status.RUNNING)
    desk.machine(fork).remembers["so far"] = "all"
    await services.sandboxes.pause(desk.actor, fork.id)
    await services.sandboxes.resume(desk.actor, fork.id)
    again = await desk.until(fork, Status.RUNNING)
    assert again.incarnation == 2
    assert desk.machine(fork).remembers["so far"] == "all"


async def test_nothing_is_resumed_on_a_node_that_is_lost(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = await desk.create(idle_timeout=0)
    await desk.services.sandboxes.pause(desk.actor, box.id)

    async def is_away(_: Nodes, node_id: str | None) -> bool:
        return node_id == "fake"

    with monkeypatch.context() as away:
        away.setattr(Nodes, "is_still_lost", is_away)
        for ask in (desk.services.sandboxes.resume, desk.services.sandboxes.restart):
            with pytest.raises(UnavailableError, match="ask again when that is back"):
                await ask(desk.actor, box.id)
        with pytest.raises(UnavailableError, match="ask again when that is back"):
            await desk.execute(box, "true")
    assert (await desk.get(box)).status is Status.PAUSED
    await desk.services.sandboxes.resume(desk.actor, box.id)
    await desk.until(box, Status.RUNNING)


async def test_a_snapshot_is_there_for_as_long_as_a_sandbox_is_made_from_it(desk: Desk) -> None:
    box = await desk.create(idle_timeout=0)
    snapshot = await desk.services.snapshots.create(desk.actor, box.id, "s")
    desk.node.gate.clear()
    wish = NewSandbox(template=None, snapshot="s")
    clone = await desk.services.creation.create(desk.actor, wish)
    with pytest.raises(ConflictError, match="ask again once that runs"):
        await desk.services.snapshots.delete(desk.actor, snapshot.id)
    desk.node.gate.set()
    await desk.until(clone, Status.RUNNING)
    await desk.services.snapshots.delete(desk.actor, snapshot.id)


async def test_what_a_node_says_of_sizes_is_believed_as_far_as_it_can_be(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    for told, believed in ((-(10**15), 0), (10**15, (512 + 1024 + 64) * 2**20), (7, 7)):
        monkeypatch.setattr("tests.support.nodes.SIZE", told)
        box = await desk.create(idle_timeout=0)
        await desk.services.snapshots.create(desk.actor, box.id, None)
        await desk.services.sandboxes.pause(desk.actor, box.id)
        async with desk.control.store.read() as tx:
            saved = await tx.sandboxes.find(box.id)
            (snapshot,) = await tx.snapshots.on_node("fake")
        assert saved is not None
        assert saved.saved_bytes == snapshot.size_bytes == believed
        await desk.services.snapshots.delete(desk.actor, snapshot.id)


async def test_what_cannot_end_keeps_nothing_from_starting(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hangs(_: EnsureGone) -> None:
        await asyncio.Event().wait()

    boxes = [await desk.create(idle_timeout=0) for _ in range(70)]
    monkeypatch.setattr(desk.node, "ensure_gone", hangs)
    for box in boxes:
        await desk.services.sandboxes.delete(desk.actor, box.id, wait=False)
    await desk.drive(4)
    # As a server leaves it that was killed.
    started = replace(boxes[0], id=new_sandbox_id(), name=None, status=Status.CREATING, version=1)
    async with desk.control.store.write(started.org_id) as tx:
        await tx.sandboxes.insert(started)
    await desk.drive(4)
    await desk.until(started, Status.RUNNING)


async def test_a_node_that_invents_machines_keeps_nobody_busy(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = await desk.create(idle_timeout=0)
    waiting = 0

    async def hangs(_: EnsureGone) -> None:
        nonlocal waiting
        waiting += 1
        await asyncio.Event().wait()

    monkeypatch.setattr(desk.node, "ensure_gone", hangs)
    for number in range(3000):
        desk.node.machines[f"sandbox-{number:012}"] = Machine(1, Phase.RUNNING, {})
    async with desk.control.store.write(Turn.ALONE) as tx:
        for number in range(500):  # that it may know of from before
            gone = replace(box, id=f"sandbox-{number:012}", status=Status.DESTROYED)
            await tx.sandboxes.insert(gone)
    await desk.drive(20)
    assert 0 < waiting <= 100
    assert (await desk.get(box)).status is Status.RUNNING


async def test_a_machine_that_runs_under_a_paused_sandbox_is_saved_at_the_second_look(
    desk: Desk,
) -> None:
    box = await desk.create(idle_timeout=0)
    await desk.services.sandboxes.pause(desk.actor, box.id)
    desk.node.machines[box.id].phase = Phase.RUNNING
    await desk.drive(6)
    assert desk.node.machines[box.id].phase is Phase.PAUSED


async def test_a_pause_for_idleness_does_not_begin_where_the_node_does_not_answer(
    desk: Desk,
) -> None:
    box = await desk.create(idle_timeout=10)
    await desk.drive(8)
    desk.node.is_silent = True
    await desk.drive(6)
    assert (await desk.get(box)).status in (Status.RUNNING, Status.SUSPECTED_MISSING)
    assert "ensure_paused" not in desk.node.asked


async def test_a_look_that_fails_in_a_way_nobody_foresaw_is_not_the_last(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = 0

    def fails() -> Any:
        nonlocal failed
        failed += 1
        raise ValueError("a bug")

    with monkeypatch.context() as broken:
        broken.setattr(desk.control.store, "read", fails)
        await desk.drive(6)
    assert failed >= 4, "both kinds of look went on"
    box = await desk.create(idle_timeout=10)
    await desk.drive(14)
    await desk.until(box, Status.PAUSED)


# --- what nodes say unasked ---------------------------------------------------------------------


async def test_a_node_that_says_that_nothing_is_new_is_not_asked(
    desk: Desk, nodes_tell: bool
) -> None:
    box = await desk.create(idle_timeout=0)
    await desk.drive(10)
    before = desk.node.asked.count("report")
    await desk.drive(60)
    asked = desk.node.asked.count("report") - before
    assert asked < 15 if nodes_tell else asked == 30, asked
    await desk.drive(300, step=20)
    assert desk.node.asked.count("report") > before, "it is asked once in a while"
    desk.node.die(box.id)
    await desk.drive(4)
    await desk.until(box, Status.ERROR)


async def test_what_only_time_brings_comes_although_nothing_is_new(desk: Desk) -> None:
    ends, rests = await desk.create(expires_in=60), await desk.create(idle_timeout=90)
    await desk.drive(56)
    assert (await desk.get(ends)).status is Status.RUNNING
    await desk.drive(6)
    await desk.until(ends, Status.DESTROYED)
    await desk.drive(20)
    await desk.services.sandboxes.touch(desk.actor, rests.id)
    await desk.drive(70)
    assert (await desk.get(rests)).status is Status.RUNNING
    await desk.drive(30)
    await desk.until(rests, Status.PAUSED)


async def test_what_is_written_of_a_node_is_seen_although_it_says_nothing_new(desk: Desk) -> None:
    box = await desk.create(idle_timeout=0)
    await desk.drive(10)
    there = replace(box, id=new_sandbox_id(), name=None)
    async with desk.control.store.write(Turn.ALONE) as tx:
        await tx.sandboxes.insert(there)
    await desk.drive(4)
    await desk.until(there, Status.ERROR)
