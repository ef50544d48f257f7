"""A node through its front door, on a fake hypervisor: what comes at once, late, or in the middle.

What every node answers is in its exam; here is what can happen to this one between two steps.
"""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.house import settings_of, until
from tests.support.nodes import a_wish

from sandyard.server.app.metrics import Metrics
from sandyard.server.app.node import open_node
from sandyard.server.core import ops
from sandyard.server.core.contracts.node import (
    MachineFact,
    MachineRef,
    MachineWish,
    Origin,
    Phase,
    VersionFact,
    Way,
)
from sandyard.server.core.egress import NO_RULES, NOTHING, Egress, Policy
from sandyard.server.core.errors import (
    ConflictError,
    InternalError,
    InvalidArgumentError,
    NoCapacityError,
    NotFoundError,
    UnavailableError,
)
from sandyard.server.core.ids import new_sandbox_id, new_uuid
from sandyard.server.core.node_ops import (
    DropStages,
    DropVersion,
    EnsureGone,
    EnsurePaused,
    EnsureRunning,
    EnsureSnapshot,
    FindRoom,
    KeepVersion,
    PrepareVersion,
    Report,
)
from sandyard.server.core.records import VersionAbout
from sandyard.server.core.shapes import Shape
from sandyard.server.core.wire import Channel, encode_frame
from sandyard.server.drivers.contract import Place
from sandyard.server.fakes.driver import Conduct, FakeDriver, FakeHost, FakeMachine
from sandyard.server.links.local import SystemClock
from sandyard.server.node.agent import AgentLink
from sandyard.server.node.machines.body import Body
from sandyard.server.node.machines.records import Record
from sandyard.server.node.machines.resident import Resident
from sandyard.server.node.node import Node
from sandyard.server.node.pressure import HELD
from sandyard.server.node.stock.goldens import Kind
from sandyard.server.tasks import in_thread


@dataclass
class Held:
    """A node, and the host that it works on."""

    node: Node
    host: FakeHost
    conduct: Conduct

    @property
    def machine(self) -> FakeMachine:
        """The only machine of the host."""
        (found,) = self.host.machines.values()
        return found

    async def facts(self) -> list[tuple[int, Phase]]:
        """Return what the node tells: incarnations and phases."""
        return [(one.incarnation, one.phase) for one in (await self.node.do(Report())).machines]

    async def run(self, wish: MachineWish, command: str) -> None:
        """Run a command."""
        where = MachineRef(self.node.node_id, wish.sandbox_id, wish.incarnation)
        async with self.node.open(where, ops.Execute(command, 5000)) as opened:
            assert await opened.stream.read(1000)

    async def paused(self) -> MachineWish:
        """Bring up a machine, pause it, and return the wish to have it go on."""
        wish = a_wish(new_sandbox_id())
        await self.node.do(EnsureRunning(wish))
        await self.run(wish, "remember me")
        await self.node.do(EnsurePaused(wish.sandbox_id, incarnation=1))
        return own(wish, 2)


def own(wish: MachineWish, incarnation: int) -> MachineWish:
    """Return the wish that a machine goes on as a later incarnation."""
    return replace(wish, incarnation=incarnation, origin=Origin.OWN)


@asynccontextmanager
async def a_node(
    home: Path,
    host: FakeHost | None = None,
    *,
    pool: int = 0,
    heartbeat_s: float = 5,
    **conduct: Any,
) -> AsyncIterator[Held]:
    """A node in a home; what it leaves running is ended unless the host is another's too."""
    held = FakeHost() if host is None else host
    driver = FakeDriver(held, Conduct(**conduct))
    async with open_node(
        settings_of(home, pool=pool, golden_machines=pool > 0, heartbeat_s=heartbeat_s),
        clock=SystemClock(),
        observer=Metrics(version="0"),
        on_change=lambda: None,
        drivers=[driver],
        fills_pool=pool > 0,
    ) as node:
        yield Held(node, held, driver.conduct)
    if host is None:
        end_all(held)


def end_all(host: FakeHost) -> None:
    """End what lives on a host."""
    for one in list(host.machines.values()):
        one.die()
        one.close()


def as_killed(home: Path, target: Path) -> None:
    """Keep what is on disk at this moment, as a kill would leave it."""
    shutil.rmtree(target, ignore_errors=True)
    sockets = shutil.ignore_patterns("*.sock")
    shutil.copytree(home, target, ignore=sockets)


# --- at once ------------------------------------------------------------------------------------


async def test_what_starts_at_once_gets_no_more_than_there_is(tmp_path: Path) -> None:
    async with a_node(tmp_path, start_delay_s=0.05) as held:
        admission = held.node._admission
        admission._total_memory = lambda: 2 * (512 + 96)
        admission._available_memory = lambda: 10**6
        admission._margins = replace(admission._margins, memory_overcommit=1.0)
        wishes = [a_wish(new_sandbox_id()) for _ in range(8)]
        done = await asyncio.gather(
            *(held.node.do(EnsureRunning(one)) for one in wishes), return_exceptions=True
        )
        assert sum(isinstance(one, MachineFact) for one in done) == 2
        assert sum(isinstance(one, NoCapacityError) for one in done) == 6


async def test_one_from_the_pool_may_grow_its_disk_only_by_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_node(tmp_path) as held:
        node, admission = held.node, held.node._admission
        monkeypatch.setattr(node._pool, "has", lambda *_, **__: True)  # one waits
        usual = a_wish(new_sandbox_id()).shape
        left = admission.room().disk_mib
        assert await node.do(FindRoom("base-minimal", usual))
        with pytest.raises(NoCapacityError, match="disk is promised"):
            await node.do(FindRoom("base-minimal", replace(usual, disk_mib=left + 100_000)))
        # What it has already is no more, however little is left to promise.
        monkeypatch.setattr(admission, "_free_disk", lambda _: admission._margins.disk_floor_mib)
        image = node._means.images.current("base-minimal")
        assert image is not None
        kind = node._goldens.kind_of(image, "base-minimal", usual)
        assert await node.do(FindRoom("base-minimal", kind.shape))
        with pytest.raises(NoCapacityError, match="disk is promised"):
            await node.do(FindRoom("base-minimal", replace(kind.shape, disk_mib=kind.disk_mib + 1)))


async def test_a_resume_that_comes_twice_is_done_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_node(tmp_path) as held:
        wish = await held.paused()
        admission, gives_way = held.node._admission, asyncio.Event()
        check, asked = admission.check, 0

        def short_at_first(*args: Any, **kwargs: Any) -> None:
            nonlocal asked
            asked += 1
            if asked == 1:
                raise NoCapacityError("short")
            check(*args, **kwargs)

        async def give_way(memory_mib: int, disk_mib: int) -> bool:
            await gives_way.wait()
            return True

        monkeypatch.setattr(admission, "check", short_at_first)
        monkeypatch.setattr(held.node._pool, "give_way", give_way)
        both = [asyncio.create_task(held.node.do(EnsureRunning(wish)))]
        await until(lambda: asked == 1)
        both.append(asyncio.create_task(held.node.do(EnsureRunning(wish))))
        await asyncio.sleep(0)
        gives_way.set()
        first, second = await asyncio.gather(*both)
        assert first == second
        assert first.incarnation == 2
        assert asked == 2, "the second joined the first"


async def test_the_place_of_a_paused_machine_is_given_back_however_often_that_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_node(tmp_path) as held:
        network = held.node._means.network
        give_back, asked, given = network.give_back, 0, asyncio.Event()

        async def busy(place: Place) -> None:
            nonlocal asked
            asked += 1
            if asked < 3:
                raise InternalError("nft did not end in time")
            await give_back(place)
            given.set()

        monkeypatch.setattr(network, "give_back", busy)
        monkeypatch.setattr("sandyard.server.node.machines.process._GIVE_BACK_AGAIN_S", (0, 0, 0))
        wish = await held.paused()
        async with asyncio.timeout(10):
            await given.wait()
        assert (await held.node.do(EnsureRunning(wish))).phase is Phase.RUNNING


@pytest.mark.parametrize("is_snapshot", [False, True])
async def test_a_machine_that_does_not_go_on_at_once_after_a_save_does_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_snapshot: bool
) -> None:
    async with a_node(tmp_path) as held:
        wish = a_wish(new_sandbox_id())
        await held.node.do(EnsureRunning(wish))
        machine: Any = held.node._owners.find(wish.sandbox_id).resident.process.machine
        resume, asked = machine.resume, 0

        async def later() -> None:
            nonlocal asked
            asked += 1
            if asked < 3:
                raise UnavailableError("it is still busy with the save")
            await resume()

        async def fails(*_: object) -> None:
            raise UnavailableError("the save takes too long")

        monkeypatch.setattr(machine, "resume", later)
        monkeypatch.setattr("sandyard.server.node.machines.saving._RESUME_AGAIN_S", (0.01,) * 9)
        if not is_snapshot:
            monkeypatch.setattr(machine, "save", fails)
        with pytest.raises(UnavailableError):
            if is_snapshot:
                await held.node.do(
                    EnsureSnapshot(new_uuid(), sandbox_id=wish.sandbox_id, incarnation=1)
                )
            else:
                await held.node.do(EnsurePaused(wish.sandbox_id, incarnation=1))
        await until(lambda: asked == 3)
        assert not await machine.is_paused()
        await held.run(wish, "hi")


async def test_a_machine_that_was_saved_meanwhile_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_node(tmp_path) as held:
        wish = a_wish(new_sandbox_id())
        await held.node.do(EnsureRunning(wish))
        resident = held.node._owners.find(wish.sandbox_id).resident
        machine: Any = resident.process.machine
        save, stop, looked, resumed = machine.save, machine.stop, asyncio.Event(), list[str]()

        async def fails(*_: object) -> None:
            raise UnavailableError("not now")

        async def stands() -> bool:
            looked.set()
            return True

        async def goes_on() -> None:
            if resident.is_saved:
                resumed.append("it went on, and was saved before")

        async def slowly() -> None:
            looked.clear()
            with suppress(TimeoutError):  # whoever would have it go on may look again
                async with asyncio.timeout(0.3):
                    await looked.wait()
            await stop()

        monkeypatch.setattr("sandyard.server.node.machines.saving._RESUME_AGAIN_S", (0.01,) * 99)
        for name in ("resume", "save"):
            monkeypatch.setattr(machine, name, fails)
        with pytest.raises(UnavailableError):
            await held.node.do(EnsurePaused(wish.sandbox_id, incarnation=1))
        new = {"resume": goes_on, "save": save, "stop": slowly, "is_paused": stands}
        for name, work in new.items():
            monkeypatch.setattr(machine, name, work)
        await held.node.do(EnsurePaused(wish.sandbox_id, incarnation=1))
        assert resumed == []


async def test_what_does_not_end_keeps_nobody_else_from_being_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = FakeHost()
    async with a_node(tmp_path, host) as held:
        dead, lives = a_wish(new_sandbox_id()), a_wish(new_sandbox_id())
        for wish in (dead, lives):
            await held.node.do(EnsureRunning(wish))
        resident = held.node._owners.find(dead.sandbox_id).resident
        # It was noted as dead, and then the process was killed before it was buried.
        await in_thread(held.node._means.records.write, replace(resident.record, phase=Phase.DEAD))

        async def stuck(*_: object, **__: object) -> None:
            raise UnavailableError("a process does not end")

    end = Resident.end
    monkeypatch.setattr(Resident, "end", stuck)
    async with a_node(tmp_path, host) as again:
        facts = {one.sandbox_id: one.phase for one in (await again.node.do(Report())).machines}
        assert facts == {dead.sandbox_id: Phase.DEAD, lives.sandbox_id: Phase.RUNNING}
        monkeypatch.setattr(Resident, "end", end)
    end_all(host)


async def test_a_create_does_not_outlive_its_delete_nor_pass_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_node(tmp_path) as held:
        drivers, gate = held.node._means.drivers, asyncio.Event()
        choose, asked = drivers.choose, 0

        async def slow(image: Any) -> Any:
            nonlocal asked
            asked += 1
            await gate.wait()
            return await choose(image)

        monkeypatch.setattr(drivers, "choose", slow)
        wish = a_wish(new_sandbox_id())
        late = asyncio.create_task(held.node.do(EnsureRunning(wish)))
        await until(lambda: asked == 1)
        await held.node.do(EnsureGone(wish.sandbox_id, incarnation=1))
        gate.set()
        with pytest.raises(ConflictError):
            await late
        assert not held.host.machines
        gate.clear()
        wish = a_wish(new_sandbox_id())
        both = [
            asyncio.create_task(held.node.do(EnsureRunning(replace(wish, incarnation=one))))
            for one in (1, 2)
        ]
        await until(lambda: asked == 2)
        gate.set()
        for incarnation, done in enumerate(await asyncio.gather(*both, return_exceptions=True), 1):
            assert isinstance(done, ConflictError) or done.incarnation == incarnation  # type: ignore[union-attr]  # or it failed in another way


async def test_however_many_have_it_removed_all_are_told_that_it_is(tmp_path: Path) -> None:
    async with a_node(tmp_path) as held:
        wish = a_wish(new_sandbox_id())
        await held.node.do(EnsureRunning(wish))
        gone = [held.node.do(EnsureGone(wish.sandbox_id, incarnation=1)) for _ in range(5)]
        await asyncio.gather(*gone)
        assert await held.facts() == []


async def test_a_removal_spares_a_later_incarnation_that_begins_meanwhile(tmp_path: Path) -> None:
    async with a_node(tmp_path, save_delay_s=5) as held:
        wish, later = a_wish(new_sandbox_id()), list[asyncio.Task[MachineFact]]()
        await held.node.do(EnsureRunning(wish))
        machine, owner = held.machine, held.node._owners.find(wish.sandbox_id)
        pausing = asyncio.create_task(held.node.do(EnsurePaused(wish.sandbox_id, incarnation=1)))
        await until(lambda: machine.is_saving)
        assert owner._job is not None
        second = held.node.do(EnsureRunning(replace(wish, incarnation=2)))
        owner._job.task.add_done_callback(lambda _: later.append(asyncio.create_task(second)))
        await held.node.do(EnsureGone(wish.sandbox_id, incarnation=1))
        with pytest.raises(ConflictError):
            await pausing
        assert (await later[0]).incarnation == 2
        assert await held.facts() == [(2, Phase.RUNNING)]


# --- held -----------------------------------------------------------------------------------------


async def test_a_machine_that_is_held_says_why_and_what_it_said_before_comes_back(
    tmp_path: Path,
) -> None:
    host = FakeHost()
    async with a_node(tmp_path, host) as held:
        wish = a_wish(new_sandbox_id())
        await held.node.do(EnsureRunning(wish))
        wish = replace(wish, incarnation=2, origin=Origin.DISK)
        await held.node.do(EnsureRunning(wish))
        owner = held.node._owners.find(wish.sandbox_id)

        async def reason() -> str:
            (fact,) = (await held.node.do(Report())).machines
            assert fact.phase is Phase.RUNNING
            return fact.reason_code

        assert await reason() == "restarted_from_disk"
        await owner.hold(HELD)
        assert (owner.phase, await reason()) == (Phase.HELD, "host_disk_full")
        for refused in (
            held.node.do(EnsurePaused(wish.sandbox_id, incarnation=2)),
            held.node.do(EnsureSnapshot(new_uuid(), sandbox_id=wish.sandbox_id, incarnation=2)),
        ):
            with pytest.raises(NoCapacityError, match="disk is nearly full"):
                await refused
        assert held.machine.is_held
        # What a node believed lost is taken over as it stands.
        await held.node.do(EnsureRunning(own(wish, 3)))
        assert (owner.incarnation, owner.phase) == (3, Phase.HELD)
    # Another process decides anew: it lets the machine run.
    async with a_node(tmp_path, host) as again:
        assert await again.facts() == [(3, Phase.RUNNING)]
        await until(lambda: not again.machine.is_held)
        (fact,) = (await again.node.do(Report())).machines
        assert fact.reason_code == "restarted_from_disk"
    end_all(host)


async def test_what_adopted_machines_use_is_counted_at_once(tmp_path: Path) -> None:
    host = FakeHost()
    async with a_node(tmp_path, host) as held:
        await held.node.do(EnsureRunning(a_wish(new_sandbox_id())))
        held.machine.spec.disk.write_bytes(bytes(30 * 2**20))
    async with a_node(tmp_path, host) as again:
        (owner,) = again.node._owners.all()
        left = owner.promise.disk_mib - again.node._ledger.totals().disk_left_mib
        assert left == owner.used_mib >= 30
    end_all(host)


# --- out of place -------------------------------------------------------------------------------


async def test_nothing_is_opened_in_a_later_incarnation_than_was_meant(tmp_path: Path) -> None:
    async with a_node(tmp_path) as held:
        wish = await held.paused()
        await held.node.do(EnsureRunning(wish))
        with pytest.raises(NotFoundError):
            await held.run(replace(wish, incarnation=1), "write harm")
        await held.run(wish, "write well")
        assert held.machine.spec.disk.read_text() == "well"


async def test_a_pause_whose_machine_dies_meanwhile_has_failed(tmp_path: Path) -> None:
    async with a_node(tmp_path, save_delay_s=0.1) as held:
        wish = a_wish(new_sandbox_id())
        await held.node.do(EnsureRunning(wish))
        machine = held.machine
        pausing = asyncio.create_task(held.node.do(EnsurePaused(wish.sandbox_id, incarnation=1)))
        await until(lambda: machine.is_saving)
        machine.die()
        machine.close()
        with pytest.raises((UnavailableError, ConflictError)):
            await pausing
        async with asyncio.timeout(5):
            while await held.facts() != [(1, Phase.DEAD)]:
                await asyncio.sleep(0.01)


async def test_what_failed_before_is_not_told_to_who_asks_for_what_is_there(
    tmp_path: Path,
) -> None:
    async with a_node(tmp_path) as held:
        wish = a_wish(new_sandbox_id())
        await held.node.do(EnsureRunning(wish))
        held.conduct.has_room_to_save = False
        with pytest.raises(NoCapacityError):
            await held.node.do(EnsurePaused(wish.sandbox_id, incarnation=1))
        assert (await held.node.do(EnsureRunning(wish))).phase is Phase.RUNNING


async def test_a_disk_that_is_full_while_a_machine_is_held_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_node(tmp_path) as held:
        wish = a_wish(new_sandbox_id())
        await held.node.do(EnsureRunning(wish))

        async def full() -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(held.machine, "pause", full)
        with pytest.raises(NoCapacityError, match="disk is full"):
            await held.node.do(EnsurePaused(wish.sandbox_id, incarnation=1))
        assert await held.facts() == [(1, Phase.RUNNING)]


async def test_a_machine_of_the_pool_goes_whole_though_nobody_waits_for_that(
    tmp_path: Path,
) -> None:
    async with a_node(tmp_path, pool=2) as held:
        pool = held.node._pool
        await until(lambda: any(pool.facts()) and all(o.size == o.target for o in pool.facts()))
        pool._has_room = lambda shape: False  # nothing more is made
        making_way = asyncio.create_task(pool.give_way(512, 0))
        await asyncio.sleep(0)
        making_way.cancel()
        await asyncio.wait([making_way])
        known = len(held.node._ledger.everyone)  # there are no others
        await until(lambda: len(held.host.machines) == known)
        assert len(held.node._means.network.in_use) == known  # type: ignore[attr-defined]  # the fake tells


async def one_that_waits(held: Held) -> tuple[Kind, AgentLink]:
    """Return what the pool has, and the link to it, once a connection is ready."""
    found: list[tuple[Kind, AgentLink]] = []

    def is_ready() -> bool:
        shelves = held.node._pool._shelves
        links = [(kind, one.guest.link) for kind in shelves for one in shelves[kind].members]
        found[:] = [(kind, link) for kind, link in links if link is not None]
        return bool(found) and found[0][1]._spare is not None

    await until(is_ready)
    return found[0]


async def test_who_takes_a_machine_of_the_pool_finds_a_connection_to_it_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_node(tmp_path, pool=1) as held:
        kind, _ = await one_that_waits(held)
        wish = a_wish(new_sandbox_id(), template=kind.template, shape=kind.shape)

        async def fail(*_: object, **__: object) -> None:
            raise OSError("nobody is to be asked for a connection now")

        with monkeypatch.context() as cut_off:
            cut_off.setattr(held.node._means.network, "dial", fail)
            fact = await held.node.do(EnsureRunning(wish))
        assert (fact.phase, fact.way) == (Phase.RUNNING, Way.POOL)


async def test_a_machine_of_the_pool_has_another_connection_ready_after_each_beat(
    tmp_path: Path,
) -> None:
    async with a_node(tmp_path, pool=1, heartbeat_s=0.05) as held:
        _, link = await one_that_waits(held)
        made: set[float] = set()

        def has_been_replaced_twice() -> bool:
            if link._spare is not None:
                made.add(link._spare[2])
            return len(made) > 2

        await until(has_been_replaced_twice)


async def test_where_there_is_no_room_for_a_golden_machine_nobody_spins(tmp_path: Path) -> None:
    async with a_node(tmp_path, pool=1) as held:
        pool, looked = held.node._pool, 0
        held.node._goldens._has_room = lambda shape: False
        held.node._goldens._known.clear()
        look = pool._look

        async def counted(crew: Any) -> None:
            nonlocal looked
            looked += 1
            await look(crew)

        pool._look = counted  # type: ignore[method-assign]  # to count
        pool.nudge()
        await until(lambda: looked >= 1)
        for _ in range(2000):
            await asyncio.sleep(0)
        assert looked < 20


# --- killed in the middle -----------------------------------------------------------------------


async def test_a_resume_that_a_kill_broke_off_is_done_when_it_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, left, host = tmp_path / "h", tmp_path / "k", FakeHost()
    withdraw: Callable[[Body], Any] = Body.withdraw
    async with a_node(home, host) as held:
        wish = await held.paused()

        async def killed_here(body: Body) -> None:
            as_killed(home, left)
            await withdraw(body)

        monkeypatch.setattr(Body, "withdraw", killed_here)
        await held.node.do(EnsureRunning(wish))
        monkeypatch.undo()
    end_all(host)
    async with a_node(left, host) as held:
        assert await held.facts() == [(1, Phase.PAUSED)]
        assert (await held.node.do(EnsureRunning(wish))).way is Way.RESUME
        await held.run(wish, "recall")
    end_all(host)


async def test_a_node_that_was_killed_still_knows_what_it_was_asked_last(tmp_path: Path) -> None:
    home, left, host = tmp_path / "h", tmp_path / "k", FakeHost()
    async with a_node(home, host) as held:
        wish = await held.paused()
        await held.node.do(EnsureRunning(replace(wish, version=3)))
        await held.node.do(EnsurePaused(wish.sandbox_id, incarnation=2, version=4))
        as_killed(home, left)
    async with a_node(left, host) as held:
        late = replace(wish, incarnation=3, version=3)
        with pytest.raises(ConflictError):
            await held.node.do(EnsureRunning(late))
        assert await held.facts() == [(2, Phase.PAUSED)]
        await held.node.do(EnsureRunning(replace(late, version=5)))
    end_all(host)


async def test_a_restart_that_a_kill_broke_off_is_done_when_it_is_asked_again(
    tmp_path: Path,
) -> None:
    home, left, host = tmp_path / "h", tmp_path / "k", FakeHost()
    async with a_node(home, host) as held:
        wish = a_wish(new_sandbox_id())
        await held.node.do(EnsureRunning(wish))
        end_all(host)
        async with asyncio.timeout(5):
            while await held.facts() != [(1, Phase.DEAD)]:
                await asyncio.sleep(0.01)
        held.conduct.is_ready = False
        starting = asyncio.create_task(held.node.do(EnsureRunning(own(wish, 2))))
        (record,) = home.glob("machines/*/resident.json")
        await until(lambda: json.loads(record.read_text())["handle"] is not None)
        as_killed(home, left)
        await held.node.do(EnsureGone(wish.sandbox_id, incarnation=2))
        with pytest.raises(ConflictError):
            await starting
    async with a_node(left, host) as held:
        assert await held.facts() == [(1, Phase.DEAD)]
        (record,) = left.glob("machines/*/resident.json")
        assert json.loads(record.read_text())["handle"] is None
        assert (await held.node.do(EnsureRunning(own(wish, 2)))).way is Way.RESTART
    end_all(host)


async def test_a_machine_that_dies_before_anybody_woke_it_is_dead(tmp_path: Path) -> None:
    home, host = tmp_path / "h", FakeHost()
    async with a_node(home, host) as held:
        await held.node.do(EnsureRunning(a_wish(new_sandbox_id())))
    (record,) = home.glob("machines/*/resident.json")
    record.write_text(json.dumps({**json.loads(record.read_text()), "phase": "waking"}))
    async with a_node(home, host) as held:
        assert await held.facts() == [(1, Phase.WAKING)]
        end_all(host)
        async with asyncio.timeout(10):
            while await held.facts() != [(1, Phase.DEAD)]:
                await asyncio.sleep(0.01)


# --- versions of users' templates -----------------------------------------------------------------

ROOT = bytes(1024) + b"\xe2\xe1\xf5\xe0" + b"root" * 5000


async def write(held: Held, wish: MachineWish, path: bytes, data: bytes) -> None:
    """Write a file in a machine."""
    where = MachineRef(held.node.node_id, wish.sandbox_id, wish.incarnation)
    async with held.node.open(where, ops.Write(path)) as opened:
        for piece in (data, b""):
            await opened.stream.write(encode_frame(Channel.STDIN, piece))
        assert b"count" in await opened.stream.read(10_000)


@pytest.mark.parametrize("rules", [None, Policy(Egress.DENY, ("a.test",))], ids=["none", "own"])
async def test_what_a_version_starts_obeys_the_rules_of_its_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rules: Policy | None
) -> None:
    expected = NOTHING if rules is None else rules
    about = VersionAbout(
        "mine", "Alpine", "headless", Shape(1, 512, 1024), ready="true", network=rules
    )
    seen: list[Policy] = []
    async with a_node(tmp_path, pool=1) as held:
        node, wish = held.node, a_wish(new_sandbox_id())
        network = node._means.network
        restrict = network.restrict

        async def noted(place: Place, policy: Policy, **how: Any) -> None:
            seen.append(policy)
            await restrict(place, policy, **how)

        await node.do(EnsureRunning(wish))
        await write(held, wish, b"/root.erofs", ROOT)
        fact = await node.do(KeepVersion(wish.sandbox_id, 1, "/root.erofs", about, 10**6))
        monkeypatch.setattr(network, "restrict", noted)
        await node.do(PrepareVersion(fact.name))
        assert expected in seen, "the golden machine"
        others = [
            replace(a_wish(new_sandbox_id()), template=fact.name, shape=about.defaults)
            for _ in range(5)
        ]
        for one in others:
            await node.do(EnsureRunning(one))

        def waiting() -> list[Resident]:
            shelves = node._pool._shelves.values()
            return [one for two in shelves if "@" in two.kind.template for one in two.members]

        await until(lambda: bool(waiting()))
        assert [one.record.policy for one in waiting()] == [expected]
        (target,) = (one.target for one in node._pool.facts() if one.template == fact.name)
        assert target == 1, "however many were requested"
        claimed = replace(others[0], sandbox_id=new_sandbox_id())
        started = await node.do(EnsureRunning(claimed))
        assert started.way is Way.POOL
        assert NO_RULES in seen, "the sandbox's own"
        shipped = [one.record.policy for two in node._pool._shelves.values()
                   for one in two.members if "@" not in two.kind.template]  # fmt: skip
        assert set(shipped) <= {NO_RULES}
        for one in (wish, *others, claimed):
            await node.do(EnsureGone(one.sandbox_id, incarnation=one.incarnation))


async def test_a_file_of_a_machine_becomes_a_version_that_others_start_from(tmp_path: Path) -> None:
    shape = Shape(1, 512, 1024)
    about = VersionAbout("mine", "Alpine", "headless", shape, {"A": "1"}, build_id="b")
    async with a_node(tmp_path) as held:
        node, wish = held.node, a_wish(new_sandbox_id())
        await node.do(EnsureRunning(wish))
        await write(held, wish, b"/root.erofs", ROOT)
        await write(held, wish, b"/other", b"no file system")

        async def keep(path: str, size_max: int) -> VersionFact:
            return await node.do(KeepVersion(wish.sandbox_id, 1, path, about, size_max))

        with pytest.raises(NotFoundError):
            await keep(path="/absent", size_max=10**6)
        for path, size_max in (("/other", 10**6), ("/root.erofs", 100)):
            with pytest.raises(InvalidArgumentError):
                await keep(path=path, size_max=size_max)
        assert (await node.do(Report())).versions == ()
        fact = await keep(path="/root.erofs", size_max=10**6)
        assert fact == await keep(path="/root.erofs", size_max=10**6)
        assert fact.size_bytes == len(ROOT)
        report = await node.do(Report())
        assert report.versions == (fact.name,)
        assert report.view().has(fact.name)
        assert not report.view().has("mine@0")
        await node.do(PrepareVersion(fact.name))
        with pytest.raises(NotFoundError):
            await node.do(PrepareVersion("mine@0"))

        other = replace(a_wish(new_sandbox_id()), template=fact.name, shape=about.defaults)
        await node.do(EnsureRunning(other))
        await node.do(DropStages("another", but=()))
        await node.do(DropStages("b", but=(fact.name,)))
        assert (await node.do(Report())).versions == (fact.name,)
        await node.do(DropStages("b", but=()))
        await node.do(DropVersion(fact.name))
        assert (await node.do(Report())).versions == ()
        with pytest.raises(NotFoundError):
            await node.do(EnsureRunning(replace(other, sandbox_id=new_sandbox_id())))
        # What was started of it goes on, and over a pause.
        await node.do(EnsurePaused(other.sandbox_id, incarnation=1))
        await node.do(EnsureRunning(replace(own(other, 2))))
        for one in (wish, replace(other, incarnation=2)):
            await node.do(EnsureGone(one.sandbox_id, incarnation=one.incarnation))
        await node.do(DropVersion(fact.name))
        assert list((tmp_path / "versions/images").iterdir()) == []


async def test_a_machine_whose_record_cannot_be_written_at_last_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_node(tmp_path) as held:
        write = held.node._means.records.write

        def full(record: Record, *, syncs: bool = True) -> None:
            if record.phase is Phase.RUNNING:
                raise OSError(28, "No space left on device")
            write(record, syncs=syncs)

        wish = a_wish(new_sandbox_id())
        with monkeypatch.context() as patch:
            patch.setattr(held.node._means.records, "write", full)
            with pytest.raises(NoCapacityError, match="disk is full"):
                await held.node.do(EnsureRunning(wish))
        assert (await held.facts(), held.host.machines) == ([], {})
        assert (await held.node.do(EnsureRunning(wish))).phase is Phase.RUNNING
        assert [one.phase for one in held.node._means.records.all()] == [Phase.RUNNING]
