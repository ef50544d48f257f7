"""What owners may do with sandboxes: the services on a fake node, time driven by hand."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.desk import Desk, member_of, open_desk, still, until

from sandyard.server.core.contracts.node import Connection, MachineFact, Phase
from sandyard.server.core.contracts.store import Transaction, Turn
from sandyard.server.core.egress import NO_RULES, Egress, Injection, Policy
from sandyard.server.core.errors import (
    AlreadyExistsError,
    ConflictError,
    DeadlineExceededError,
    InvalidArgumentError,
    NoCapacityError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)
from sandyard.server.core.ids import new_uuid
from sandyard.server.core.node_ops import EnsureRunning, Report
from sandyard.server.core.records import ActivityQuery, Sandbox, Snapshot
from sandyard.server.core.states import Event, Status
from sandyard.server.service.networks import Networks
from sandyard.server.service.repeats import Repeatable
from sandyard.server.service.sandboxes.change import Changes
from sandyard.server.service.sandboxes.create import NewSandbox


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with open_desk(tmp_path) as made:
        yield made


# --- create -------------------------------------------------------------------------------------


async def test_a_create_comes_up_on_its_node_as_it_was_asked_for(desk: Desk) -> None:
    box = await desk.create(name="Böx 1", tags=("a",), env={"A": "b"}, vcpus=1)
    assert (box.status, box.node_id, box.incarnation) == (Status.RUNNING, "fake", 1)
    assert box.ip == "10.0.0.1"
    assert box.started_at is not None
    assert desk.machine(box).remembers["hostname"] == "b-x-1"
    assert [one.event_type for one in await desk.feed(box)] == [
        "sandbox.created", "sandbox.running",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wish", "field"),
    [
        ({"template": "nonsense"}, "template"),
        ({"name": "sandbox-abcdefghijkl"}, "name"),
        ({"tags": ("x" * 65,)}, "tags"),
        ({"env": {"1A": "x"}}, "env"),
        ({"idle_timeout": -1}, "idle_timeout"),
        ({"metadata": {"a": "x" * 20_000}}, "metadata"),
        ({"metadata": {"a": float("nan")}}, "metadata"),
        ({"root_password": "short"}, "root_password"),
        ({"project_id": new_uuid()}, "project_id"),
        ({"project_id": "x"}, "project_id"),
        ({"memory": "lots"}, "resources.memory"),
        ({"ssh_keys": ["nobody's"]}, "ssh_keys"),
        ({"snapshot": new_uuid()}, "snapshot"),
    ],
)
async def test_what_cannot_be_is_refused_by_field_and_nothing_is_begun(
    desk: Desk, wish: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        await desk.create(**wish)
    assert caught.value.facts["field"] == field
    assert desk.node.machines == {}


async def test_a_taken_name_and_a_full_node_are_refused(desk: Desk) -> None:
    await desk.create(name="box")
    with pytest.raises(AlreadyExistsError):
        await desk.create(name="box")
    desk.node.room = 1
    with pytest.raises(NoCapacityError):
        await desk.create()


async def test_a_start_that_fails_says_why(desk: Desk) -> None:
    desk.node.refusal = InvalidArgumentError("cannot start: told not to")
    box = await desk.create()
    assert box.status is Status.FAILED
    assert box.reason is not None
    assert (box.reason.code, "told not to" in box.reason.message) == ("start_failed", True)


async def test_what_cannot_start_now_is_tried_again_and_given_up_in_the_end(desk: Desk) -> None:
    desk.node.refusal = UnavailableError("not now")
    wish = NewSandbox("base-minimal")
    box = await desk.services.creation.create(desk.actor, wish)
    await desk.drive(6)
    assert (await desk.until(box, Status.RUNNING)).incarnation == 1

    tries: list[float] = []

    async def refuse_for_ever(*_: object) -> None:
        tries.append(desk.clock.monotonic())
        raise UnavailableError("not now")

    desk.node.ensure_running = refuse_for_ever  # type: ignore[assignment,method-assign]
    late = await desk.services.creation.create(desk.actor, wish)
    await desk.drive(100)
    pauses_s = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert 5 < len(pauses_s) < 20  # every two seconds it would be 50
    assert max(pauses_s[:2]) < min(pauses_s[-2:]) < 20, pauses_s
    assert (await desk.get(late)).status is Status.CREATING
    await desk.drive(320, step=20)
    given_up = await desk.until(late, Status.FAILED)
    assert given_up.reason is not None
    assert given_up.reason.code == "unavailable"


async def test_a_repeated_request_makes_one_sandbox(desk: Desk) -> None:
    request = Repeatable("POST /v1/sandboxes", "key", b"{}")
    wish = NewSandbox("base-minimal")
    made = await asyncio.gather(
        *(desk.services.creation.create(desk.actor, wish, request=request) for _ in range(10))
    )
    assert len({one.id for one in made}) == 1


async def test_one_that_died_before_anybody_could_use_it_is_started_again(tmp_path: Path) -> None:
    """Its node brought it up, and the server that asked for it was gone by then."""
    async with open_desk(tmp_path) as desk:
        desk.node.gate.clear()
        box = await desk.services.creation.create(desk.actor, NewSandbox("base-minimal"))
        await until_asked(desk, "ensure_running")
        await desk.kill()
        nodes, clock = desk.nodes, desk.clock
    nodes["fake"].gate.set()
    await nodes["fake"].do(EnsureRunning(wish_for(box)))
    nodes["fake"].die(box.id)
    async with open_desk(tmp_path, nodes=nodes, clock=clock) as desk:
        again = await desk.until(box, Status.RUNNING)
        assert again.incarnation == 2


def wish_for(box: Sandbox) -> Any:
    from sandyard.server.service.reconcile.work import wish_of

    return wish_of(box)


async def until_asked(desk: Desk, what: str) -> None:
    async def asked() -> bool:
        return what in desk.node.asked

    await until(asked)


# --- who may ------------------------------------------------------------------------------------


async def test_others_see_nothing_of_it_and_a_member_not_another_members(desk: Desk) -> None:
    box = await desk.create(name="box")
    stranger = replace(desk.actor, org_id=new_uuid())
    for actor in (stranger, member_of(desk.actor, new_uuid())):
        for reference in (box.id, "box"):
            with pytest.raises(NotFoundError):
                await desk.services.sandboxes.get(actor, reference)
            with pytest.raises(NotFoundError):
                await desk.services.sandboxes.delete(actor, reference, wait=True)
        with pytest.raises(NotFoundError):
            await desk.execute(box, "x", actor)
    reader = replace(desk.actor, scopes=frozenset({"sandbox:read"}))
    with pytest.raises(PermissionDeniedError):
        await desk.execute(box, "x", reader)
    assert (await desk.services.sandboxes.get(reader, "box")).id == box.id


# --- pause and resume ---------------------------------------------------------------------------


async def test_however_many_pause_or_resume_there_is_one(desk: Desk) -> None:
    box, service = await desk.create(), desk.services.sandboxes
    await desk.execute(box, "remember me")
    for act, status in ((service.pause, Status.PAUSED), (service.resume, Status.RUNNING)):
        done = await asyncio.gather(*(act(desk.actor, box.id) for _ in range(8)))
        assert {one.status for one in done} == {status}
    assert desk.node.asked.count("ensure_paused") == 1
    assert desk.node.asked.count("ensure_running") == 2
    assert (await desk.get(box)).incarnation == 2
    assert (await desk.execute(box, "recall")).stdout == b"me"


async def test_a_pause_that_fails_leaves_it_running_and_says_why(desk: Desk) -> None:
    box = await desk.create()
    desk.node.refusal = NoCapacityError("the host's disk is full")
    with pytest.raises(NoCapacityError, match="it is running as before"):
        await desk.services.sandboxes.pause(desk.actor, box.id)
    found = await desk.get(box)
    assert found.reason is not None
    assert (found.status, found.reason.code) == (Status.RUNNING, "no_capacity")


async def test_a_resume_that_fails_leaves_it_paused(desk: Desk) -> None:
    box = await desk.create()
    await desk.services.sandboxes.pause(desk.actor, box.id)
    desk.node.refusal = UnavailableError("not now")
    with pytest.raises(UnavailableError, match="it is paused as before"):
        await desk.services.sandboxes.resume(desk.actor, box.id)
    assert (await desk.services.sandboxes.resume(desk.actor, box.id)).status is Status.RUNNING


async def test_what_always_changes_is_given_up_with_one_error(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pause, resume, change, delete and commands end alike: nobody is told of a success."""
    box = await desk.create()

    async def overtaken(*_: object, **__: object) -> None:
        return None

    monkeypatch.setattr(desk.control.lifecycle, "apply", overtaken)
    monkeypatch.setattr(desk.control.lifecycle, "change", overtaken)
    service = desk.services.sandboxes
    for work in (
        service.pause(desk.actor, box.id),
        service.delete(desk.actor, box.id, wait=True),
        service.change(desk.actor, box.id, Changes(tags=["x"])),
    ):
        with pytest.raises(UnavailableError, match="others change it all the time"):
            await work


async def test_a_sandbox_in_error_comes_back_from_its_disk(desk: Desk) -> None:
    box = await desk.create()
    desk.node.die(box.id)
    await desk.drive(4)
    broken = await desk.until(box, Status.ERROR)
    assert broken.reason is not None
    assert broken.reason.code == "machine_died"
    back = await desk.services.sandboxes.resume(desk.actor, box.id)
    assert (back.status, back.incarnation) == (Status.RUNNING, 2)
    assert desk.machine(box).remembers["way"] == "restart"


# --- delete -------------------------------------------------------------------------------------


async def test_a_destroyed_sandbox_keeps_no_secrets(desk: Desk) -> None:
    literal = Policy(inject=(Injection("a.test", {"Authorization": "Bearer literal"}),))
    box = await desk.create(env={"KEY": "secret"}, root_password="long enough", network=literal)
    assert box.root_password_hash is not None
    await desk.services.sandboxes.delete(desk.actor, box.id, wait=True)
    gone = await desk.get(box)
    assert (gone.status, gone.env, gone.root_password_hash) == (Status.DESTROYED, {}, None)
    assert gone.network == literal.bare or gone.network.inject == literal.bare.inject


@pytest.mark.parametrize("how", ["running", "paused", "creating", "error", "failed"])
async def test_a_delete_works_from_every_status(desk: Desk, how: str) -> None:
    service = desk.services.sandboxes
    if how == "creating":
        desk.node.gate.clear()
        box = await desk.services.creation.create(desk.actor, NewSandbox("base-minimal"))
        await until_asked(desk, "ensure_running")
        deleting = asyncio.ensure_future(service.delete(desk.actor, box.id, wait=True))
        await desk.until(box, Status.DESTROYING, Status.DESTROYED)
        desk.node.gate.set()
        await deleting
    else:
        if how == "failed":
            desk.node.refusal = InvalidArgumentError("no")
        box = await desk.create()
        if how == "paused":
            await service.pause(desk.actor, box.id)
        if how == "error":
            desk.node.die(box.id)
            await desk.drive(4)
        await service.delete(desk.actor, box.id, wait=True)
    assert (await desk.get(box)).status is Status.DESTROYED
    await desk.drive(6)
    assert desk.node.machines == {}
    with pytest.raises(NotFoundError):
        await service.delete(desk.actor, box.id, wait=True)


async def test_a_delete_that_cannot_be_done_yet_says_so_and_is_done_later(desk: Desk) -> None:
    box = await desk.create()
    desk.node.is_silent = True
    deleting = asyncio.ensure_future(desk.services.sandboxes.delete(desk.actor, box.id, wait=True))
    await desk.until(box, Status.DESTROYING)
    await desk.drive(62)
    assert (await deleting).status is Status.DESTROYING
    desk.node.is_silent = False
    await desk.drive(6)
    await desk.until(box, Status.DESTROYED)


# --- the one door -------------------------------------------------------------------------------


async def test_a_command_resumes_what_is_paused_and_is_noted(desk: Desk) -> None:
    box = await desk.create()
    await desk.services.sandboxes.pause(desk.actor, box.id)
    desk.clock.time += timedelta(seconds=30)
    assert (await desk.execute(box, "hello")).stdout == b"hello"
    found = await desk.get(box)
    assert found.last_activity_kind == "exec"
    assert found.last_activity_at is not None
    assert desk.clock.now() - found.last_activity_at < timedelta(seconds=1)
    line = next(one for one in await desk.feed(box) if one.event_type == "sandbox.exec")
    assert (line.title, line.actor_user_id) == ("Command run", desk.actor.user_id)


async def test_without_auto_resume_it_is_refused_and_nothing_is_started(desk: Desk) -> None:
    box = await desk.create(auto_resume=False)
    await desk.services.sandboxes.pause(desk.actor, box.id)
    with pytest.raises(ConflictError, match="auto_resume is off"):
        await desk.execute(box, "hello")
    assert desk.machine(box).phase is Phase.PAUSED


async def test_what_is_paused_between_the_look_and_the_opening_is_resumed(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = await desk.create()

    async def pause_once(*args: Any, **kwargs: Any) -> bool:
        monkeypatch.undo()
        assert await note(*args, **kwargs)
        await desk.services.sandboxes.pause(desk.actor, box.id)
        return True

    reach = desk.services.commands._reach
    note = reach._note
    monkeypatch.setattr(reach, "_note", pause_once)
    assert (await desk.execute(box, "hello")).stdout == b"hello"
    assert desk.node.asked.count("open") == 2
    assert (await desk.get(box)).incarnation == 2


async def test_a_use_that_is_noted_once_a_pause_has_begun_comes_after_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = await desk.create(idle_timeout=10)
    reach = desk.services.commands._reach
    note, go_on = reach._note, asyncio.Event()

    async def late(*args: Any, **kwargs: Any) -> bool:
        monkeypatch.undo()
        await go_on.wait()
        return await note(*args, **kwargs)

    monkeypatch.setattr(reach, "_note", late)
    using = asyncio.create_task(desk.execute(box, "hello"))
    await desk.drive(14)
    assert (await desk.get(box)).status is Status.PAUSED
    go_on.set()
    assert (await using).stdout == b"hello"
    since = desk.node.asked[desk.node.asked.index("ensure_paused") :]
    assert since.count("open") == 1, "nothing was tried in a machine about to be saved"


async def test_a_command_does_not_wait_for_its_entry_in_the_feed(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = await desk.create()
    before = desk.node.asked.count("open")
    notes, written = desk.services.commands._reach._notes, 0
    write, go_on = notes._store.write, asyncio.Event()

    @asynccontextmanager
    async def late(turn: Turn) -> AsyncIterator[Transaction]:
        nonlocal written
        written += 1
        await go_on.wait()
        async with write(turn) as tx:
            yield tx

    monkeypatch.setattr(notes, "_store", SimpleNamespace(write=late))
    using = [asyncio.create_task(desk.execute(box, "hello")) for _ in range(9)]
    await until(lambda: returned(desk.node.asked.count("open") - before == 9))
    go_on.set()
    assert {(await one).stdout for one in using} == {b"hello"}
    assert written <= 2  # that of the first, and that of all others
    lines = [one for one in await desk.feed(box) if one.event_type == "sandbox.exec"]
    assert len(lines) == 9


async def test_a_use_that_cannot_be_recorded_goes_on(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    box = await desk.create()

    @asynccontextmanager
    async def away(turn: Turn) -> AsyncIterator[Transaction]:
        raise UnavailableError("the database does not answer")
        yield

    notes = desk.services.commands._reach._notes
    monkeypatch.setattr(notes, "_store", SimpleNamespace(write=away))
    assert (await desk.execute(box, "hello")).stdout == b"hello"
    assert "uses of sandboxes are not recorded (1): the database does not answer" in caplog.text


async def returned(value: bool) -> bool:
    return value


async def test_a_command_under_way_is_told_that_its_sandbox_was_paused(desk: Desk) -> None:
    box = await desk.create()
    running = asyncio.ensure_future(desk.execute(box, "hang"))
    await until(lambda: is_used(desk, box))
    await desk.services.sandboxes.pause(desk.actor, box.id)
    with pytest.raises(ConflictError, match="paused meanwhile") as caught:
        await running
    assert caught.value.facts == {"status": "paused"}


async def is_used(desk: Desk, box: Sandbox) -> bool:
    return bool(desk.machine(box).uses)


async def test_an_agent_that_never_tells_the_end_is_given_up(desk: Desk) -> None:
    box = await desk.create()
    running = asyncio.ensure_future(desk.execute(box, "hang"))
    await until(lambda: is_used(desk, box))
    await desk.drive(26, step=5)
    with pytest.raises(DeadlineExceededError):
        await running


async def test_to_look_at_figures_is_no_use(desk: Desk) -> None:
    box = await desk.create()
    before = (await desk.get(box)).last_activity_at
    desk.clock.time += timedelta(seconds=30)
    _, figures = await desk.services.sandboxes.stats(desk.actor, box.id)
    assert figures.uptime == 1.0
    assert (await desk.get(box)).last_activity_at == before
    await desk.services.sandboxes.pause(desk.actor, box.id)
    with pytest.raises(ConflictError):
        await desk.services.sandboxes.stats(desk.actor, box.id)
    assert desk.machine(box).phase is Phase.PAUSED


# --- change -------------------------------------------------------------------------------------


async def test_what_is_left_out_of_a_change_stays(desk: Desk) -> None:
    box = await desk.create(name="a", tags=("x",), metadata={"k": 1})
    service = desk.services.sandboxes
    changed = await service.change(desk.actor, box.id, Changes(idle_timeout=7))
    assert (changed.name, changed.tags, changed.metadata) == ("a", ("x",), {"k": 1})
    assert changed.idle_timeout_s == 7
    assert (await service.change(desk.actor, box.id, Changes())).version == changed.version


async def test_a_touch_counts_and_keeps_nothing_running_that_is_not(desk: Desk) -> None:
    box = await desk.create()
    desk.clock.time += timedelta(seconds=9)
    touched = await desk.services.sandboxes.touch(desk.actor, box.id)
    assert touched.last_activity_at is not None
    assert desk.clock.now() - touched.last_activity_at < timedelta(seconds=1)
    await desk.services.sandboxes.pause(desk.actor, box.id)
    with pytest.raises(ConflictError):
        await desk.services.sandboxes.touch(desk.actor, box.id)


# --- snapshots ----------------------------------------------------------------------------------


async def test_a_snapshot_is_where_its_sandbox_is_and_so_is_what_comes_from_it(desk: Desk) -> None:
    box = await desk.create()
    await desk.execute(box, "remember me")
    shot = await desk.services.snapshots.create(desk.actor, box.id, "s")
    assert (shot.is_ready, shot.node_id, shot.size_bytes > 0) == (True, "fake", True)
    clone = await desk.create(template=None, snapshot="s")
    assert (await desk.execute(clone, "recall")).stdout == b"me"
    with pytest.raises(InvalidArgumentError):
        await desk.create(snapshot="s", vcpus=8, template=None)


async def test_a_snapshot_being_made_is_held_however_long_it_takes(desk: Desk) -> None:
    box = await desk.create()
    desk.node.gate.clear()
    making = asyncio.ensure_future(desk.services.snapshots.create(desk.actor, box.id, "s"))
    await until_asked(desk, "ensure_snapshot")
    await desk.drive(120, step=5)
    with pytest.raises(ConflictError, match="being made"):
        await desk.services.snapshots.delete(desk.actor, "s")
    desk.node.gate.set()
    assert (await making).is_ready


async def test_a_snapshot_whose_maker_died_is_removed_and_its_name_is_free(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        box = await desk.create()
        desk.node.gate.clear()
        request = Repeatable("POST /snapshots", "key", b"{}")
        making = asyncio.ensure_future(
            desk.services.snapshots.create(desk.actor, box.id, "s", request=request)
        )
        await until_asked(desk, "ensure_snapshot")

        async def leave_it(*_: object, **__: object) -> None:
            """As a killed server does: nothing is given back."""

        desk.services.snapshots._forget = leave_it  # type: ignore[method-assign]
        making.cancel()
        await asyncio.wait([making])
        desk.node.gate.set()
        await desk.drive(45, step=5)
        made = await desk.services.snapshots.create(desk.actor, box.id, "s", request=request)
        assert made.is_ready
        await desk.drive(6)
        assert list(desk.node.snapshots) == [made.id]


async def test_forks_begin_where_their_source_is_each_for_itself(desk: Desk) -> None:
    box = await desk.create()
    await desk.execute(box, "remember me")
    request = Repeatable("POST /fork", "key", b"{}")
    made = await asyncio.gather(
        *(desk.services.snapshots.fork(desk.actor, box.id, 3, request=request) for _ in range(3))
    )
    assert len({one.id for forks in made for one in forks}) == 3
    for fork in made[0]:
        await desk.until(fork, Status.RUNNING)
        assert (await desk.execute(fork, "recall")).stdout == b"me"
    await desk.drive(30, step=5)
    assert desk.node.snapshots == {}, "the hidden one goes once all are up"


async def test_a_rollback_puts_it_back_and_a_failed_one_leaves_what_was(desk: Desk) -> None:
    box, snapshots = await desk.create(), desk.services.snapshots
    await desk.execute(box, "remember before")
    await snapshots.create(desk.actor, box.id, "s")
    await desk.execute(box, "remember after")
    desk.node.refusal = None
    back = await snapshots.roll_back(desk.actor, box.id, "s")
    assert (back.status, (await desk.execute(box, "recall")).stdout) == (Status.RUNNING, b"before")
    await desk.services.sandboxes.pause(desk.actor, box.id)
    desk.node.refusal = UnavailableError("not now")
    with pytest.raises(UnavailableError, match="it is paused as before"):
        await snapshots.roll_back(desk.actor, box.id, "s")
    assert (await desk.execute(box, "recall")).stdout == b"before"


async def test_a_rollback_that_takes_long_or_is_met_by_a_change_is_told_as_done(
    desk: Desk,
) -> None:
    box, snapshots = await desk.create(), desk.services.snapshots
    await snapshots.create(desk.actor, box.id, "s")
    for seconds in (0, 52):
        await desk.services.sandboxes.pause(desk.actor, box.id)
        desk.node.gate.clear()
        going = asyncio.create_task(snapshots.roll_back(desk.actor, box.id, "s"))
        await desk.until(box, Status.RESUMING)
        if seconds == 0:
            await desk.services.sandboxes.change(desk.actor, box.id, Changes(tags=["a"]))
        await desk.drive(seconds)
        desk.node.gate.set()
        await desk.drive(6)
        assert (await going).status is Status.RUNNING


async def test_a_rollback_that_takes_longer_than_who_asks_waits_is_done_all_the_same(
    desk: Desk,
) -> None:
    box, snapshots = await desk.create(), desk.services.snapshots
    await snapshots.create(desk.actor, box.id, "s")
    desk.node.gate.clear()
    going = asyncio.create_task(snapshots.roll_back(desk.actor, box.id, "s"))
    await desk.until(box, Status.RESUMING)
    await desk.drive(62)
    with pytest.raises(DeadlineExceededError, match="still resuming; ask again"):
        await going
    desk.node.gate.set()
    await desk.drive(6)
    assert (await desk.get(box)).status is Status.RUNNING


async def test_a_rollback_whose_pause_takes_too_long_says_so(desk: Desk) -> None:
    box, snapshots = await desk.create(), desk.services.snapshots
    await snapshots.create(desk.actor, box.id, "s")
    with _pauses_held(desk):
        going = asyncio.create_task(snapshots.roll_back(desk.actor, box.id, "s"))
        await desk.until(box, Status.PAUSING)
        await desk.drive(62)
        with pytest.raises(DeadlineExceededError, match=r"back yet.*being paused; ask again"):
            await going
    await desk.until(box, Status.PAUSED)
    assert (await snapshots.roll_back(desk.actor, box.id, "s")).status is Status.RUNNING


@contextmanager
def _pauses_held(desk: Desk) -> Iterator[None]:
    """Have pauses wait until the block is left."""
    gate, pause = asyncio.Event(), desk.node.ensure_paused

    async def held(*names: Any, **options: Any) -> int:
        await gate.wait()
        return await pause(*names, **options)

    desk.node.ensure_paused = held  # type: ignore[method-assign]
    try:
        yield
    finally:
        gate.set()
        desk.node.ensure_paused = pause  # type: ignore[method-assign]


async def test_who_asks_again_for_what_takes_long_is_told_so_within_a_minute(desk: Desk) -> None:
    box, snapshots = await desk.create(), desk.services.snapshots
    request = Repeatable("POST /snapshots", "key", b"{}")
    desk.node.gate.clear()
    first = asyncio.create_task(snapshots.create(desk.actor, box.id, "n", request=request))
    await until_asked(desk, "ensure_snapshot")
    again = asyncio.create_task(snapshots.create(desk.actor, box.id, "n", request=request))
    await desk.drive(62)
    with pytest.raises(UnavailableError, match="still under way; ask again"):
        await again
    desk.node.gate.set()
    assert (await first).is_ready
    assert await snapshots.create(desk.actor, box.id, "n", request=request) == await first


async def _begun_elsewhere(
    desk: Desk, box: Sandbox, request: Repeatable, *, lives_s: int
) -> Snapshot:
    """Have a snapshot begun by a server that is dead, and is believed alive for a while."""
    snapshots = desk.services.snapshots
    begun = snapshots._new(desk.actor, await desk.get(box), name="n", is_hidden=False)
    begun = replace(begun, held_until=desk.clock.now() + timedelta(seconds=lives_s))
    async with desk.control.store.write(Turn.ALONE) as tx:
        await tx.snapshots.insert(begun)
        await snapshots._repeats.note(tx, desk.actor, request, (begun.id,))
    return begun


@pytest.mark.parametrize("is_fork", [False, True])
async def test_all_that_a_snapshot_waits_for_is_waited_for_within_one_minute(
    desk: Desk, *, is_fork: bool
) -> None:
    """Another server that was asked the same and died, and then a pause of the sandbox."""
    box, snapshots = await desk.create(), desk.services.snapshots
    request = Repeatable("POST /snapshots", "key", b"{}")
    await _begun_elsewhere(desk, box, request, lives_s=40)
    with _pauses_held(desk):
        pausing = asyncio.create_task(desk.services.sandboxes.pause(desk.actor, box.id, wait=False))
        await desk.until(box, Status.PAUSING)
        asking: asyncio.Task[object] = asyncio.create_task(
            snapshots.fork(desk.actor, box.id, 1, request=request)
            if is_fork
            else snapshots.create(desk.actor, box.id, "n", request=request)
        )
        await desk.drive(62)
        with pytest.raises(DeadlineExceededError, match="still pausing; ask again"):
            await asking
    await pausing


async def test_a_rollback_does_not_take_a_resume_for_itself(desk: Desk) -> None:
    box, snapshots = await desk.create(), desk.services.snapshots
    await snapshots.create(desk.actor, box.id, "s")
    await desk.services.sandboxes.pause(desk.actor, box.id)
    desk.node.gate.clear()
    resuming = asyncio.create_task(desk.services.sandboxes.resume(desk.actor, box.id))
    await desk.until(box, Status.RESUMING)
    with pytest.raises(ConflictError, match="resuming"):
        await snapshots.roll_back(desk.actor, box.id, "s")
    desk.node.gate.set()
    await resuming


async def test_a_repeated_fork_is_answered_also_where_it_could_not_be_made_now(
    desk: Desk,
) -> None:
    box, snapshots = await desk.create(), desk.services.snapshots
    desk.node.room = 3
    request = Repeatable("POST /fork", "key", b"{}")
    made = await snapshots.fork(desk.actor, box.id, 2, request=request)
    for fork in made:
        await desk.until(fork, Status.RUNNING)
    for _ in range(2):
        again = await snapshots.fork(desk.actor, box.id, 2, request=request)
        assert [one.id for one in again] == [one.id for one in made]
        desk.node.die(box.id)
        await desk.drive(4)
        assert (await desk.get(box)).status is Status.ERROR


async def test_forks_noted_without_their_snapshot_are_found_again(desk: Desk) -> None:
    box, snapshots = await desk.create(), desk.services.snapshots
    request = Repeatable("POST /fork", "key", b"{}")
    (made,) = await snapshots.fork(desk.actor, box.id, 1, request=request)
    repeats = snapshots._repeats
    async with desk.control.store.write(Turn.ALONE) as tx:
        ids = await repeats.made_before(tx, desk.actor, request)
        assert ids is not None
        assert ids[1:] == (made.id,)
        await repeats.forget(tx, desk.actor, request, ids)
        await repeats.note(tx, desk.actor, request, (made.id,))
    (again,) = await snapshots.fork(desk.actor, box.id, 1, request=request)
    assert again.id == made.id


async def test_a_request_whose_server_was_killed_is_done_by_its_peer(desk: Desk) -> None:
    box, snapshots = await desk.create(), desk.services.snapshots
    request = Repeatable("POST /snapshots", "key", b"{}")
    begun = await _begun_elsewhere(desk, box, request, lives_s=3)
    asking = asyncio.create_task(snapshots.create(desk.actor, box.id, "n", request=request))
    await desk.drive(4, step=0.5)
    made = await asking
    assert made.is_ready
    assert made.id != begun.id
    await desk.drive(20)
    assert (await snapshots.get(desk.actor, "n")).id == made.id
    with pytest.raises(ConflictError, match="deleted meanwhile"):
        async with desk.control.store.write(Turn.ALONE) as tx:
            await snapshots._complete(tx, begun, 1)


async def test_a_snapshot_of_a_silent_node_is_deleted_and_its_files_go_later(desk: Desk) -> None:
    box, snapshots = await desk.create(), desk.services.snapshots
    made = await snapshots.create(desk.actor, box.id, None)
    desk.node.is_silent = True
    await snapshots.delete(desk.actor, made.id)
    assert list(desk.node.snapshots) == [made.id]
    desk.node.is_silent = False
    await desk.drive(6)
    assert desk.node.snapshots == {}


# --- events out of place ------------------------------------------------------------------------


async def test_what_is_deleted_while_it_is_changed_is_not_found(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    box, sandboxes = await desk.create(), desk.services.sandboxes
    change = desk.control.lifecycle.change

    async def too_late(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.undo()
        await sandboxes.delete(desk.actor, box.id, wait=True)
        return await change(*args, **kwargs)

    monkeypatch.setattr(desk.control.lifecycle, "change", too_late)
    with pytest.raises(NotFoundError):
        await sandboxes.change(desk.actor, box.id, Changes(tags=["x"]))
    assert "sandbox.updated" not in {one.event_type for one in await desk.feed(box)}


async def test_an_answer_that_is_lost_is_found_in_the_report(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = await desk.create(idle_timeout=0)
    await desk.services.sandboxes.pause(desk.actor, box.id)
    ensure_running, node = desk.node.ensure_running, desk.node

    async def loses_it(asked: EnsureRunning) -> MachineFact:
        monkeypatch.undo()
        await ensure_running(asked)
        raise UnavailableError("the connection to the node broke")

    monkeypatch.setattr(node, "ensure_running", loses_it)
    assert (await desk.services.sandboxes.resume(desk.actor, box.id)).status is Status.RUNNING


async def test_a_late_answer_of_an_earlier_version_changes_nothing(desk: Desk) -> None:
    box = await desk.create()
    await desk.services.sandboxes.change(desk.actor, box.id, Changes(tags=["x"]))
    assert await desk.control.lifecycle.apply(box, Event.BROKE) is None
    assert (await desk.get(box)).status is Status.RUNNING


async def test_output_waits_for_room_and_is_cut_where_none_comes(desk: Desk) -> None:
    box = await desk.create()
    room = desk.services.commands.room
    all_of_it = room.free
    half = all_of_it // 2
    assert await room.take(half, "one")
    assert await room.take(half, "another")
    running = asyncio.create_task(desk.execute(box, "x" * 200_000))
    await still()
    assert not running.done()
    await desk.drive(11)
    cut = await running
    assert (cut.truncated, cut.exit_code) == (True, 0)
    assert 0 < len(cut.stdout) < 200_000
    cut.release()
    room.give_back(half, "one")
    room.give_back(half, "another")
    whole = await desk.execute(box, "x" * 200_000)
    assert (whole.truncated, len(whole.stdout)) == (False, 200_000)
    assert room.free < all_of_it
    whole.release()
    assert room.free == all_of_it


# --- network rules ------------------------------------------------------------------------------

FIRST, SECOND = Policy(Egress.DENY, ("a.test",)), Policy(Egress.DENY, ("b.test",))


def rules_of(desk: Desk, box: Sandbox) -> Policy:
    found: Policy = desk.machine(box).policy
    return found


async def test_network_rules_are_with_a_machine_from_its_start(desk: Desk) -> None:
    box = await desk.create(network=Policy(Egress.DENY, ("A.test.", "1.2.3.4", "a.test")))
    assert box.network == Policy(Egress.DENY, ("a.test", "1.2.3.4/32"))
    assert rules_of(desk, box) == box.network
    sandboxes = desk.services.sandboxes
    await sandboxes.change(desk.actor, box.id, Changes(network=FIRST))
    assert rules_of(desk, box) == FIRST
    with pytest.raises(InvalidArgumentError):
        await sandboxes.change(desk.actor, box.id, Changes(network=Policy(allow=("*",))))
    assert (await desk.get(box)).network == FIRST
    # While it is paused they are stored, and in force when it runs again.
    await sandboxes.pause(desk.actor, box.id)
    await sandboxes.change(desk.actor, box.id, Changes(network=SECOND))
    assert rules_of(desk, box) == FIRST
    await sandboxes.resume(desk.actor, box.id)
    assert rules_of(desk, box) == SECOND
    await sandboxes.change(desk.actor, box.id, Changes(network=NO_RULES))
    assert rules_of(desk, box) == NO_RULES


INJECTED = Policy(Egress.DENY, ("a.test",), inject=(Injection("a.test", {"X-Key": "k ${token}"}),))


def headers_of(desk: Desk, box: Sandbox) -> list[tuple[str, str | None]]:
    held = desk.machine(box).credentials
    return [] if held is None else [(one.host, one.value) for one in held.headers]


async def test_secrets_go_to_the_node_with_the_rules_and_again_when_they_change(
    desk: Desk,
) -> None:
    secrets = desk.services.secrets
    with pytest.raises(InvalidArgumentError, match="there is no secret TOKEN"):
        await desk.create(network=INJECTED)
    made = await secrets.add(desk.actor, name="Token", value="first-7", hosts=["A.test."])
    assert (made.name, made.hosts) == ("TOKEN", ("a.test",))
    assert "first-7" not in repr(made)
    box = await desk.create(network=INJECTED)
    policy = rules_of(desk, box)
    assert policy.inject == (Injection("a.test"),), "the texts stay here"
    assert headers_of(desk, box) == [("a.test", "k first-7")]
    [fork] = await desk.services.snapshots.fork(desk.actor, box.id, 1)
    fork = await desk.until(fork, Status.RUNNING)
    await secrets.replace(desk.actor, "TOKEN", value="two", hosts=None)
    assert headers_of(desk, box) == headers_of(desk, fork) == [("a.test", "k two")]
    assert rules_of(desk, box).stamp != policy.stamp
    # One that is for other hosts is for this one no longer.
    await secrets.replace(desk.actor, "TOKEN", value=None, hosts=["b.test"])
    assert headers_of(desk, box) == [("a.test", None)]
    with pytest.raises(InvalidArgumentError, match=r"is for b\.test, and not for a\.test"):
        await desk.create(network=INJECTED)
    await secrets.replace(desk.actor, "TOKEN", value="three", hosts=["a.test"])
    # A paused one reads them when it runs again.
    await desk.services.sandboxes.pause(desk.actor, box.id)
    await secrets.replace(desk.actor, "TOKEN", value="four", hosts=None)
    await desk.services.sandboxes.resume(desk.actor, box.id)
    assert headers_of(desk, box) == [("a.test", "k four")]
    # A node that lost them is given them again.
    desk.machine(box).credentials = None
    await desk.drive(30)
    assert headers_of(desk, box) == [("a.test", "k four")]
    # One that could not be told is told later.
    desk.node.is_silent = True
    await secrets.delete(desk.actor, "token")
    desk.node.is_silent = False
    await desk.drive(60)
    assert headers_of(desk, box) == [("a.test", None)]
    await desk.services.sandboxes.change(desk.actor, box.id, Changes(network=FIRST))
    assert headers_of(desk, box) == []


async def test_secrets_are_used_by_those_who_may(desk: Desk) -> None:
    await desk.services.secrets.add(desk.actor, name="TOKEN", value="one", hosts=["a.test"])
    may_not = replace(desk.actor, scopes=frozenset({"sandbox:*", "secret:read"}))
    with pytest.raises(PermissionDeniedError, match="secret:use"):
        await desk.services.creation.create(may_not, NewSandbox("base-minimal", network=INJECTED))
    box = await desk.create()
    with pytest.raises(PermissionDeniedError, match="secret:use"):
        await desk.services.sandboxes.change(may_not, box.id, Changes(network=INJECTED))
    for work in (
        desk.services.secrets.add(may_not, name="A", value="b", hosts=["a.test"]),
        desk.services.secrets.replace(may_not, "TOKEN", value="b", hosts=None),
        desk.services.secrets.delete(may_not, "TOKEN"),
    ):
        with pytest.raises(PermissionDeniedError):
            await work
    # Rules that come with something else need the scope, too.
    injects = await desk.create(network=INJECTED)
    shot = await desk.services.snapshots.create(desk.actor, injects.id, None)
    with pytest.raises(PermissionDeniedError, match="secret:use"):
        await desk.services.creation.create(may_not, NewSandbox(None, snapshot=shot.id))
    with pytest.raises(PermissionDeniedError, match="secret:use"):
        await desk.services.snapshots.fork(may_not, injects.id, 1)
    wish = NewSandbox(None, snapshot=shot.id, network=NO_RULES)
    assert (await desk.services.creation.create(may_not, wish)).network == NO_RULES
    stranger = replace(desk.actor, org_id=new_uuid())
    assert await desk.services.secrets.every(stranger) == []
    with pytest.raises(NotFoundError):
        await desk.services.secrets.replace(stranger, "TOKEN", value="b", hosts=None)


async def test_what_was_refused_and_used_is_told(desk: Desk) -> None:
    secrets, journals = desk.services.secrets, desk.services.journals
    await secrets.add(desk.actor, name="TOKEN", value="one", hosts=["a.test"])
    box = await desk.create(network=INJECTED)
    now = desk.clock.now().timestamp()
    desk.node.journal = [
        Connection(now + 1, "refused", "egress", "b.test", port=53),
        Connection(now + 2, "refused", "egress", "b.test", port=53),
        Connection(now + 3, "allowed", "a.test", "a.test", "1.2.3.4", 443, secrets=("TOKEN",)),
    ]
    for _ in range(2):
        await journals.look()
    [secret] = await secrets.every(desk.actor)
    assert secret.last_used_at == datetime.fromtimestamp(now + 3, UTC)

    async def told() -> list[object]:
        query = ActivityQuery(
            box.org_id, limit=300, matches={"event_type": "sandbox.network_refused"}
        )
        async with desk.control.store.read() as tx:
            return [one.attributes["name"] for one in await tx.activity.page(query)]

    assert await told() == ["b.test"], "once in an hour"
    journals._read.clear()
    journals._noted.clear()
    await journals.look()
    assert await told() == ["b.test"], "after a restart, too"
    desk.node.journal += [
        Connection(now + 10, "refused", "egress", f"{number}.test") for number in range(200)
    ]
    await journals.look()
    assert len(await told()) == 100, "a guest may make up any number of names"
    desk.node.journal.append(Connection(now + 4000, "refused", "egress", "b.test"))
    await journals.look()
    assert (await told()).count("b.test") == 2


async def test_forks_and_sandboxes_from_snapshots_inherit_network_rules(desk: Desk) -> None:
    box = await desk.create(network=FIRST)
    snapshot = await desk.services.snapshots.create(desk.actor, box.id, None)
    await desk.services.sandboxes.change(desk.actor, box.id, Changes(network=SECOND))
    [fork] = await desk.services.snapshots.fork(desk.actor, box.id, 1)
    assert fork.network == SECOND
    assert rules_of(desk, await desk.until(fork, Status.RUNNING)) == SECOND
    other = await desk.create(template=None, snapshot=snapshot.id)
    assert other.network == FIRST
    free = await desk.create(template=None, snapshot=snapshot.id, network=NO_RULES)
    assert free.network == NO_RULES
    # Going back to a snapshot brings no old rules back.
    await desk.services.snapshots.roll_back(desk.actor, box.id, snapshot.id)
    back = await desk.until(box, Status.RUNNING)
    assert (back.network, rules_of(desk, back)) == (SECOND, SECOND)


async def test_rules_that_cannot_be_enforced_yet_are_in_the_end(desk: Desk) -> None:
    box = await desk.create()
    desk.node.is_silent = True
    with pytest.raises(UnavailableError, match="stored, but not in force yet"):
        await desk.services.sandboxes.change(desk.actor, box.id, Changes(network=FIRST))
    assert rules_of(desk, box) == NO_RULES
    desk.node.is_silent = False
    await desk.drive(30)
    assert (await desk.get(box)).network == FIRST
    assert rules_of(desk, box) == FIRST


async def test_rules_without_their_credentials_close_the_network(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = await desk.create()

    async def fails(*_: object) -> None:
        raise UnavailableError("the database does not answer")

    inspected = Policy(inspect=("a.test",))
    with monkeypatch.context() as broken:
        broken.setattr(Networks, "credentials_of", fails)
        with pytest.raises(UnavailableError, match="stored, but not in force yet"):
            await desk.services.sandboxes.change(desk.actor, box.id, Changes(network=inspected))
        assert rules_of(desk, box) == Policy(egress=Egress.DENY)
        await desk.drive(30)
        assert rules_of(desk, box) == Policy(egress=Egress.DENY)
        assert desk.node.asked.count("ensure_network") == 1, "once is enough"
    await desk.drive(30)
    assert rules_of(desk, box).inspect == inspected.inspect


async def test_a_guest_whose_agent_is_silent_gets_new_rules_all_the_same(desk: Desk) -> None:
    box = await desk.create()
    desk.machine(box).is_silent = True
    await desk.drive(30)
    assert (await desk.get(box)).status is Status.SUSPECTED_MISSING
    await desk.services.sandboxes.change(desk.actor, box.id, Changes(network=FIRST))
    assert rules_of(desk, box) == FIRST
    desk.machine(box).policy = NO_RULES  # as after a failure on the node
    await desk.drive(30)
    assert rules_of(desk, box) == FIRST


async def test_a_node_of_an_earlier_version_starts_nothing_that_has_rules(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = desk.node.report

    async def earlier(asked: Report) -> Any:
        return replace(await report(asked), enforces_rules=False)

    monkeypatch.setattr(desk.node, "report", earlier)
    made = await desk.services.creation.create(
        desk.actor, NewSandbox("base-minimal", network=FIRST)
    )
    await desk.drive(5)
    assert made.id not in desk.node.machines
    assert (await desk.create()).status is Status.RUNNING


async def test_rules_that_change_during_a_start_are_those_of_its_end(desk: Desk) -> None:
    desk.node.gate.clear()
    made = await desk.services.creation.create(
        desk.actor, NewSandbox("base-minimal", network=FIRST)
    )
    changing = asyncio.create_task(
        desk.services.sandboxes.change(desk.actor, made.id, Changes(network=SECOND))
    )
    await still()
    desk.node.gate.set()
    await desk.drive(5)
    assert (await changing).network == SECOND
    assert rules_of(desk, made) == SECOND


async def test_the_journal_of_a_paused_sandbox_is_read_to_its_end(desk: Desk) -> None:
    box = await desk.create(network=FIRST)
    journals = desk.services.journals
    await desk.services.sandboxes.pause(desk.actor, box.id)
    for _ in range(3):
        await journals.look()
    read = desk.node.asked.count("connections")
    await journals.look()
    assert desk.node.asked.count("connections") == read
    await desk.services.sandboxes.resume(desk.actor, box.id)
    await journals.look()
    assert desk.node.asked.count("connections") == read + 1


async def test_the_journal_is_told_to_its_owner_alone(desk: Desk) -> None:
    box = await desk.create(network=FIRST)
    desk.node.journal = [
        Connection(float(number), "refused", "egress", "b.test", port=53) for number in range(1200)
    ]
    sandboxes = desk.services.sandboxes
    latest = await sandboxes.connections(desk.actor, box.id)
    assert [latest[0].time, latest[-1].time, len(latest)] == [200.0, 1199.0, 1000]
    later = await sandboxes.connections(desk.actor, box.id, since=10.0)
    assert [later[0].time, len(later)] == [11.0, 1000]
    following = sandboxes.follow_connections(desk.actor, box.id)
    assert len(await anext(following)) == 1000
    coming = asyncio.ensure_future(anext(following))
    desk.node.journal.append(Connection(2000.0, "allowed"))
    await desk.drive(2)
    assert [one.time for one in await coming] == [2000.0]
    stranger = replace(desk.actor, org_id=new_uuid(), user_id=new_uuid())
    with pytest.raises(NotFoundError):
        await sandboxes.connections(stranger, box.id)
    with pytest.raises(NotFoundError):
        await sandboxes.change(stranger, box.id, Changes(network=NO_RULES))
