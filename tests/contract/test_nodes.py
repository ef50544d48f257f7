"""The examination every node passes: Node itself, the fake of tests, and either behind a wire.

Wishes come twice, late, or after one that was sent later; whoever is overtaken changes nothing.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.house import eventually, settings_of
from tests.support.nats import nats_server
from tests.support.nodes import EncodedNode, FakeNode, a_wish, over_the_wire, told
from tests.support.papers import Desk

from sandyard.server.app.metrics import Metrics
from sandyard.server.app.node import open_node
from sandyard.server.core import errors, ops
from sandyard.server.core.collect import Collector
from sandyard.server.core.contracts.node import (
    GoldenFact,
    MachineFact,
    MachineRef,
    MachineWish,
    NodeControl,
    NodeReport,
    NodeTunnel,
    Origin,
    Phase,
    ShelfFact,
    TemplateStatus,
    Way,
)
from sandyard.server.core.egress import NO_RULES, Egress, Policy
from sandyard.server.core.errors import (
    Code,
    ConflictError,
    MachineDeadError,
    NoCapacityError,
    NotFoundError,
    SandyardError,
)
from sandyard.server.core.ids import new_sandbox_id, new_uuid
from sandyard.server.core.node_ops import (
    DropSnapshot,
    EnsureGone,
    EnsureNetwork,
    EnsurePaused,
    EnsureRunning,
    EnsureSnapshot,
    FindRoom,
    FindSnapshot,
    ListTemplates,
    ReadJournal,
    Report,
)
from sandyard.server.core.shapes import Shape
from sandyard.server.fakes.driver import ECHO_PORT, Conduct, FakeDriver, FakeHost
from sandyard.server.links.identities import control_name, node_name
from sandyard.server.links.local import SystemClock
from sandyard.server.links.nats import messages
from sandyard.server.links.nats.client import Inbox, RemoteNode
from sandyard.server.links.nats.link import linked
from sandyard.server.links.nats.server import answering
from sandyard.server.links.tunnel import frames
from sandyard.server.links.tunnel.client import NodeAddress, Tunnels
from sandyard.server.links.tunnel.server import serving


@dataclass
class Subject:
    """A node under examination, and how a test harms what is on it."""

    control: NodeControl
    tunnel: NodeTunnel
    die: Callable[[str], None]
    left: Callable[[], int]

    async def start(self, wish: MachineWish | None = None) -> MachineWish:
        """Bring up a machine and return what was wished."""
        wish = wish or a_wish(new_sandbox_id())
        await self.control.do(EnsureRunning(wish))
        return wish

    async def run(self, wish: MachineWish, command: str) -> str:
        """Run a command and return what it said."""
        where = MachineRef(self.control.node_id, wish.sandbox_id, wish.incarnation)
        collector = Collector(2**20)
        async with self.tunnel.open(where, ops.Execute(command, 5000)) as opened:
            assert opened.answer.pid > 0
            while (end := collector.feed(await opened.stream.read(65536))) is None:
                pass
        assert end.exit_code == 0
        return collector.stdout.decode()

    async def fact(self, wish: MachineWish) -> MachineFact | None:
        """Return what the node tells of a machine."""
        report = await self.control.do(Report())
        return next((one for one in report.machines if one.sandbox_id == wish.sandbox_id), None)

    async def phase(self, wish: MachineWish) -> Phase | None:
        """Return how far a machine has come, None if nothing of it is there."""
        fact = await self.fact(wish)
        return fact.phase if fact else None

    async def until_dead(self, wish: MachineWish) -> None:
        """End a machine, and return once its node knows."""
        self.die(wish.sandbox_id)
        async with asyncio.timeout(5):
            while await self.phase(wish) is not Phase.DEAD:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def a_node(home: Path) -> AsyncIterator[Subject]:
    host = FakeHost()
    driver = FakeDriver(host, Conduct())
    settings = settings_of(home, golden_machines=False, memory_overcommit=0.5)
    names: dict[str, str] = {}
    async with open_node(
        settings,
        clock=SystemClock(),
        observer=Metrics(version="0"),
        on_change=lambda: None,
        drivers=[driver],
    ) as node:

        def die(sandbox_id: str) -> None:
            for one in list(host.machines.values()):
                if one.remembers.get("hostname") == names.get(sandbox_id, "box"):
                    one.die()
                    one.close()

        yield Subject(node, node, die, lambda: len(host.machines))
    for one in list(host.machines.values()):
        one.die()
        one.close()
    await asyncio.sleep(0.01)


@asynccontextmanager
async def a_fake(home: Path) -> AsyncIterator[Subject]:
    node = FakeNode()
    yield Subject(node, node, node.die, lambda: len(node.machines))


def behind_a_wire(make: Any) -> Any:
    @asynccontextmanager
    async def made(home: Path) -> AsyncIterator[Subject]:
        async with make(home) as inner:
            link = EncodedNode(inner.control, inner.tunnel)
            yield replace(inner, control=link, tunnel=link)

    return made


def by_the_tunnel(make: Any) -> Any:
    @asynccontextmanager
    async def made(home: Path) -> AsyncIterator[Subject]:
        desk = Desk.new(home / "papers")
        control, name = control_name("test", "one"), node_name("test", "fake")
        async with (
            make(home) as inner,
            serving(
                inner.tunnel,
                address="127.0.0.1",
                port=0,
                tls=desk.tls(name, is_server=True),
                may=lambda who: who == control,
            ) as port,
            Tunnels(
                desk.tls(control, is_server=False), lambda _: NodeAddress("127.0.0.1", port, name)
            ) as tunnel,
        ):
            yield replace(inner, tunnel=tunnel)

    return made


def by_nats(make: Any) -> Any:
    @asynccontextmanager
    async def made(home: Path) -> AsyncIterator[Subject]:
        with nats_server(home / "nats") as server:
            async with make(home) as inner:
                node, control = server.node_link(inner.control.node_id), server.control_link()
                inbox = Inbox(control, "one")
                async with answering(inner.control, node), linked(node), linked(control):
                    async with asyncio.timeout(10):
                        await node.until_up()
                        await control.until_up()
                    remote = RemoteNode(control, inbox, inner.control.node_id)
                    yield replace(inner, control=remote)

    return made


SUBJECTS = {
    "node": a_node,
    "fake": a_fake,
    "node-behind-a-wire": behind_a_wire(a_node),
    "fake-behind-a-wire": behind_a_wire(a_fake),
    "node-by-the-tunnel": by_the_tunnel(a_node),
    "node-by-nats": by_nats(a_node),
}


@pytest.fixture(params=SUBJECTS)
async def subject(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Subject]:
    async with AsyncExitStack() as held:
        yield await held.enter_async_context(SUBJECTS[request.param](tmp_path))


def own(wish: MachineWish, incarnation: int) -> MachineWish:
    return replace(wish, incarnation=incarnation, origin=Origin.OWN)


async def paused(subject: Subject) -> MachineWish:
    wish = await subject.start()
    await subject.run(wish, "remember me")
    await subject.control.do(EnsurePaused(wish.sandbox_id, incarnation=1))
    return wish


# --- up -----------------------------------------------------------------------------------------


async def test_a_create_that_comes_twice_makes_one_machine(subject: Subject) -> None:
    wish = a_wish(new_sandbox_id())
    facts = await asyncio.gather(*(subject.control.do(EnsureRunning(wish)) for _ in range(5)))
    again = await subject.control.do(EnsureRunning(wish))
    assert {one.phase for one in (*facts, again)} == {Phase.RUNNING}
    assert again.sandbox_id == wish.sandbox_id
    assert again.ip
    assert again.driver
    assert subject.left() == 1
    assert await subject.run(wish, "hello") == "hello"


async def test_a_create_that_comes_late_wakes_nothing_that_was_paused_since(
    subject: Subject,
) -> None:
    wish = await paused(subject)
    with pytest.raises(ConflictError):
        await subject.control.do(EnsureRunning(wish))
    assert await subject.phase(wish) is Phase.PAUSED
    await subject.control.do(EnsureRunning(own(wish, 2)))
    assert await subject.run(own(wish, 2), "recall") == "me"


async def test_a_create_that_comes_late_takes_no_disk_from_one_that_died(subject: Subject) -> None:
    wish = await subject.start()
    await subject.until_dead(wish)
    with pytest.raises(ConflictError) as caught:
        await subject.control.do(EnsureRunning(wish))
    assert isinstance(caught.value, MachineDeadError)
    assert caught.value.facts["status"] == "error"
    assert await subject.phase(wish) is Phase.DEAD
    fact = await subject.control.do(EnsureRunning(own(wish, 2)))
    assert (fact.phase, fact.incarnation) == (Phase.RUNNING, 2)


async def test_a_create_that_comes_after_its_delete_makes_nothing(subject: Subject) -> None:
    done = await subject.start()
    await subject.control.do(EnsureGone(done.sandbox_id, incarnation=1))
    overtaken = a_wish(new_sandbox_id())
    await subject.control.do(EnsureGone(overtaken.sandbox_id, incarnation=1))
    for wish in (done, overtaken):
        with pytest.raises(ConflictError):
            await subject.control.do(EnsureRunning(wish))
        assert await subject.fact(wish) is None
    assert subject.left() == 0


async def test_a_later_create_takes_the_place_of_an_earlier(subject: Subject) -> None:
    wish = await subject.start()
    fact = await subject.control.do(EnsureRunning(replace(wish, incarnation=2)))
    assert (fact.phase, fact.incarnation) == (Phase.RUNNING, 2)
    assert subject.left() == 1
    with pytest.raises(ConflictError):
        await subject.control.do(EnsureRunning(wish))


async def test_a_template_or_snapshot_that_is_not_there_is_told(subject: Subject) -> None:
    for wish in (
        a_wish(new_sandbox_id(), template="nonsense"),
        a_wish(new_sandbox_id(), origin=Origin.SNAPSHOT, snapshot_id=new_uuid()),
        a_wish(new_sandbox_id(), origin=Origin.OWN),
    ):
        with pytest.raises(NotFoundError):
            await subject.control.do(EnsureRunning(wish))
        assert await subject.fact(wish) is None


# --- pause and resume ---------------------------------------------------------------------------


async def test_a_pause_and_a_resume_may_come_twice(subject: Subject) -> None:
    wish = await paused(subject)
    size = await subject.control.do(EnsurePaused(wish.sandbox_id, incarnation=1))
    assert size > 0
    for _ in range(2):
        fact = await subject.control.do(EnsureRunning(own(wish, 2)))
        assert (fact.phase, fact.incarnation) == (Phase.RUNNING, 2)
    assert await subject.run(own(wish, 2), "recall") == "me"


async def test_two_resumes_at_once_are_one(subject: Subject) -> None:
    wish = await paused(subject)
    await asyncio.gather(*(subject.control.do(EnsureRunning(own(wish, 2))) for _ in range(4)))
    assert subject.left() == 1
    assert await subject.run(own(wish, 2), "recall") == "me"


async def test_what_was_meant_for_an_earlier_incarnation_harms_no_later_one(
    subject: Subject,
) -> None:
    wish = await paused(subject)
    await subject.control.do(EnsureRunning(own(wish, 2)))
    with pytest.raises(NotFoundError):
        await subject.control.do(EnsurePaused(wish.sandbox_id, incarnation=1))
    with pytest.raises(ConflictError):
        await subject.control.do(EnsureRunning(wish))
    with pytest.raises(NotFoundError):
        await subject.control.do(
            EnsureSnapshot(new_uuid(), sandbox_id=wish.sandbox_id, incarnation=1)
        )
    await subject.control.do(EnsureGone(wish.sandbox_id, incarnation=1))
    assert await subject.run(own(wish, 2), "recall") == "me"


async def test_a_resume_that_comes_late_leaves_paused_what_was_paused_again(
    subject: Subject,
) -> None:
    wish = await paused(subject)
    await subject.control.do(EnsureRunning(own(wish, 2)))
    await subject.control.do(EnsurePaused(wish.sandbox_id, incarnation=2))
    with pytest.raises(ConflictError):
        await subject.control.do(EnsureRunning(own(wish, 2)))
    assert await subject.phase(wish) is Phase.PAUSED


async def test_what_was_asked_before_something_later_was_changes_nothing(subject: Subject) -> None:
    wish = await subject.start(a_wish(new_sandbox_id(), version=3))
    here: Any = {"sandbox_id": wish.sandbox_id, "incarnation": 1}
    await subject.control.do(EnsureRunning(replace(wish, version=5)))
    late: list[Callable[[], Awaitable[object]]] = [
        lambda: subject.control.do(EnsureRunning(replace(wish, version=4))),
        lambda: subject.control.do(EnsurePaused(**here, version=4)),
        lambda: subject.control.do(EnsureSnapshot(new_uuid(), **here, version=4)),
        lambda: subject.control.do(EnsureGone(**here, version=4)),
    ]
    for ask in late:
        with pytest.raises(ConflictError):
            await ask()
        assert await subject.phase(wish) is Phase.RUNNING
    fact = await subject.fact(wish)
    assert fact is not None
    assert fact.version == 5
    await subject.control.do(EnsureRunning(replace(wish, version=5)))  # it was asked last
    await subject.control.do(EnsurePaused(**here, version=6))
    for ask in late:
        with pytest.raises(ConflictError):
            await ask()
        assert await subject.phase(wish) is Phase.PAUSED
    assert (await subject.control.do(Report())).snapshots == ()
    await subject.control.do(EnsureGone(**here, version=7))
    with pytest.raises(ConflictError):
        await subject.control.do(EnsureRunning(replace(wish, incarnation=2, version=6)))
    assert await subject.phase(wish) is None


async def test_an_end_of_no_version_is_final(subject: Subject) -> None:
    wish = await subject.start(a_wish(new_sandbox_id(), version=9))
    await subject.control.do(EnsureGone(wish.sandbox_id, incarnation=1))
    for late in (replace(wish, version=10), replace(wish, incarnation=2, version=8)):
        with pytest.raises(ConflictError):
            await subject.control.do(EnsureRunning(late))
    assert await subject.phase(wish) is None


async def test_an_end_that_overtakes_its_start_leaves_nothing(subject: Subject) -> None:
    wish = a_wish(new_sandbox_id(), version=1)
    await asyncio.gather(
        subject.control.do(EnsureRunning(wish)),
        subject.control.do(EnsureGone(wish.sandbox_id, incarnation=1, version=2)),
        return_exceptions=True,
    )
    for late in (wish, replace(wish, incarnation=2)):
        with pytest.raises(ConflictError):
            await subject.control.do(EnsureRunning(late))
    assert subject.left() == 0


@pytest.mark.parametrize("seed", range(4))
async def test_wishes_that_come_again_whenever_they_like_harm_nothing(
    subject: Subject, seed: int
) -> None:
    random, wish = Random(seed), a_wish(new_sandbox_id(), version=1)

    def pause(incarnation: int, version: int) -> Callable[[], Awaitable[object]]:
        return lambda: subject.control.do(
            EnsurePaused(wish.sandbox_id, incarnation=incarnation, version=version)
        )

    def run(incarnation: int, version: int) -> Callable[[], Awaitable[object]]:
        this = replace(own(wish, incarnation), version=version)
        return lambda: subject.control.do(EnsureRunning(this))

    history: list[Callable[[], Awaitable[object]]] = [
        lambda: subject.control.do(EnsureRunning(wish)),
        pause(1, 2), run(2, 3), pause(2, 4), run(3, 5), run(3, 6), pause(3, 7), run(4, 8),
    ]  # fmt: skip
    for number, ask in enumerate(history):
        again = random.choices(history[: number + 1], k=5)
        await ask()
        if number == 0:
            await subject.run(wish, "remember me")
        for outcome in await asyncio.gather(*(one() for one in again), return_exceptions=True):
            assert not isinstance(outcome, BaseException) or isinstance(outcome, SandyardError)
        wanted = Phase.PAUSED if number in (1, 3, 6) else Phase.RUNNING
        assert await subject.phase(wish) is wanted
    assert subject.left() == 1
    assert await subject.run(own(wish, 4), "recall") == "me"


async def test_what_is_dead_or_unknown_is_not_paused(subject: Subject) -> None:
    wish = await subject.start()
    await subject.until_dead(wish)
    with pytest.raises(ConflictError) as caught:
        await subject.control.do(EnsurePaused(wish.sandbox_id, incarnation=1))
    assert isinstance(caught.value, MachineDeadError)
    assert caught.value.facts["status"] == "error"
    with pytest.raises(NotFoundError):
        await subject.control.do(EnsurePaused(new_sandbox_id(), incarnation=1))


# --- gone ---------------------------------------------------------------------------------------


async def test_whatever_it_is_it_can_be_made_gone_and_twice(subject: Subject) -> None:
    running, still, dead = await subject.start(), await paused(subject), await subject.start()
    # The dead one has a name of its own: it is found by it.
    await subject.control.do(EnsureGone(running.sandbox_id, incarnation=1))
    await subject.until_dead(dead)
    for wish in (running, still, dead):
        for _ in range(2):
            await subject.control.do(EnsureGone(wish.sandbox_id, incarnation=1))
        assert await subject.fact(wish) is None
    assert subject.left() == 0
    assert (await subject.control.do(Report())).machines == ()


# --- snapshots ----------------------------------------------------------------------------------


async def test_a_snapshot_is_made_once_and_machines_begin_from_it(subject: Subject) -> None:
    wish = await subject.start()
    await subject.run(wish, "remember me")
    shot = new_uuid()
    for _ in range(2):
        fact = await subject.control.do(
            EnsureSnapshot(shot, sandbox_id=wish.sandbox_id, incarnation=1)
        )
        assert fact.snapshot_id == shot
        assert fact.size_bytes > 0
        assert await subject.control.do(FindSnapshot(shot)) == fact
        assert fact.template == wish.template
        assert fact.shape is not None
    assert await subject.run(wish, "recall") == "me"
    assert (await subject.control.do(Report())).snapshots == (shot,)
    clone = a_wish(new_sandbox_id(), origin=Origin.SNAPSHOT, snapshot_id=shot, hostname="clone")
    await subject.start(clone)
    assert await subject.run(clone, "recall") == "me"
    for _ in range(2):
        await subject.control.do(DropSnapshot(shot))
    with pytest.raises(NotFoundError):
        await subject.control.do(FindSnapshot(shot))
    assert (await subject.control.do(Report())).snapshots == ()
    assert await subject.run(clone, "recall") == "me"


async def test_a_machine_is_put_back_to_a_snapshot(subject: Subject) -> None:
    wish, shot = await subject.start(), new_uuid()
    await subject.run(wish, "remember before")
    await subject.control.do(EnsureSnapshot(shot, sandbox_id=wish.sandbox_id, incarnation=1))
    await subject.run(wish, "remember after")
    await subject.control.do(EnsurePaused(wish.sandbox_id, incarnation=1))
    back = replace(wish, incarnation=2, origin=Origin.SNAPSHOT, snapshot_id=shot)
    fact = await subject.control.do(EnsureRunning(back))
    assert (fact.incarnation, fact.way) == (2, Way.SNAPSHOT)
    assert await subject.run(back, "recall") == "before"
    assert subject.left() == 1


# --- room, and what is told ---------------------------------------------------------------------


async def test_network_rules_come_with_a_machine_and_change_while_it_runs(
    subject: Subject,
) -> None:
    first, second = Policy(Egress.DENY, ("a.test",)), Policy(Egress.DENY, ("b.test",))
    wish = await subject.start(replace(a_wish(new_sandbox_id()), policy=first, version=3))
    control = subject.control

    async def digest() -> str:
        fact = await subject.fact(wish)
        assert fact is not None
        return fact.rules

    assert await digest() == first.digest
    await control.do(EnsureNetwork(wish.sandbox_id, incarnation=1, policy=second, version=5))
    assert await digest() == second.digest
    with pytest.raises(ConflictError):  # it was sent before, and came later
        await control.do(EnsureNetwork(wish.sandbox_id, incarnation=1, policy=first, version=4))
    assert await digest() == second.digest
    await control.do(EnsurePaused(wish.sandbox_id, incarnation=1, version=6))
    with pytest.raises(ConflictError):
        await control.do(EnsureNetwork(wish.sandbox_id, incarnation=1, policy=first, version=7))
    await control.do(
        EnsureRunning(replace(wish, incarnation=2, origin=Origin.OWN, policy=NO_RULES, version=8))
    )
    assert await digest() == ""
    with pytest.raises(NotFoundError):
        await control.do(EnsureNetwork(new_sandbox_id(), incarnation=1, policy=first))


async def test_a_sandbox_without_rules_has_an_empty_journal(subject: Subject) -> None:
    wish = await subject.start()
    assert await subject.control.do(ReadJournal(wish.sandbox_id)) == ()
    assert await subject.control.do(ReadJournal(wish.sandbox_id, since=5.0)) == ()
    with pytest.raises(NotFoundError):
        await subject.control.do(ReadJournal(new_sandbox_id()))


async def test_a_node_says_what_it_holds_and_what_it_could_take(subject: Subject) -> None:
    before = await subject.control.do(Report())
    wish = await subject.start()
    after = await subject.control.do(Report())
    assert after.node_id == subject.control.node_id
    assert "base-minimal" in after.templates
    assert after.memory_mib < before.memory_mib
    assert after.disk_mib > 0  # what is free on a real host is not only ours to say
    assert [one.sandbox_id for one in after.machines] == [wish.sandbox_id]
    facts = {one.slug: one for one in await subject.control.do(ListTemplates())}
    assert facts["base-minimal"].status is TemplateStatus.READY
    assert await subject.control.do(FindRoom("base-minimal", Shape(1, 128, 1024))) in (True, False)
    with pytest.raises(NoCapacityError):
        await subject.control.do(FindRoom("base-minimal", Shape(1, 65536, 1024), count=10**9))


# --- the tunnel ---------------------------------------------------------------------------------


def where(subject: Subject, wish: MachineWish, **changes: Any) -> MachineRef:
    return replace(
        MachineRef(subject.control.node_id, wish.sandbox_id, wish.incarnation), **changes
    )


async def test_bytes_pass_both_ways_and_an_end_is_handed_on(subject: Subject) -> None:
    wish = await subject.start()
    data = bytes(range(256)) * 2048
    async with subject.tunnel.open(where(subject, wish), ops.Dial(ECHO_PORT)) as opened:

        async def write() -> None:
            for start in range(0, len(data), 50_000):
                await opened.stream.write(data[start : start + 50_000])
            await opened.stream.write_eof()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(write())
            heard = bytearray()
            while piece := await opened.stream.read(10_000):
                assert len(piece) <= 10_000
                heard += piece
    assert bytes(heard) == data


async def test_a_port_where_nothing_listens_is_refused(subject: Subject) -> None:
    wish = await subject.start()
    with pytest.raises(NotFoundError, match="nothing listens"):
        async with subject.tunnel.open(where(subject, wish), ops.Dial(1)):
            pass


async def test_only_the_machine_that_is_meant_is_reached(subject: Subject) -> None:
    wish = await subject.start()
    for other in (
        where(subject, wish, incarnation=2),
        where(subject, wish, sandbox_id=new_sandbox_id()),
        where(subject, wish, node_id="another"),
    ):
        with pytest.raises(NotFoundError):
            async with subject.tunnel.open(other, ops.Hello()):
                pass
    await subject.control.do(EnsurePaused(wish.sandbox_id, incarnation=1))
    with pytest.raises(ConflictError):
        async with subject.tunnel.open(where(subject, wish), ops.Hello()):
            pass


async def test_who_uses_a_machine_is_told_of_its_pause_and_the_node_knows_of_the_use(
    subject: Subject,
) -> None:
    wish = await subject.start()
    async with subject.tunnel.open(where(subject, wish), ops.Stats()) as looked:
        fact = await subject.fact(wish)
        assert fact is not None
        assert not fact.is_used, "to be looked at is no use"
        assert looked.answer.uptime == 1.0
    with pytest.raises(ConflictError) as caught:
        async with subject.tunnel.open(where(subject, wish), ops.Execute("hang", 5000)) as opened:
            fact = await subject.fact(wish)
            assert fact is not None
            assert fact.is_used
            await subject.control.do(EnsurePaused(wish.sandbox_id, incarnation=1))
            while await opened.stream.read(1000):
                pass
    assert caught.value.facts["status"] == "paused"

    async def is_left() -> bool:
        fact = await subject.fact(wish)
        assert fact is not None
        return not fact.is_used

    await eventually(is_left)  # a node at the other end of a wire hears of it a moment later


# --- what crosses a wire ------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBER = st.integers(0, 2**40)
SHAPES = st.builds(Shape, NUMBER, NUMBER, NUMBER)
FACTS = st.builds(
    MachineFact, TEXT, NUMBER, st.sampled_from(Phase), st.booleans(), st.booleans(),
    st.none() | TEXT, st.none() | TEXT, st.none() | TEXT, st.none() | st.sampled_from(Way),
    TEXT, TEXT,
)  # fmt: skip
WISHES = st.builds(
    MachineWish, TEXT, NUMBER, TEXT, SHAPES, TEXT, TEXT, st.dictionaries(TEXT, TEXT, max_size=3),
    st.lists(TEXT, max_size=3).map(tuple), st.none() | TEXT, st.sampled_from(Origin),
    st.none() | TEXT,
)  # fmt: skip
REPORTS = st.builds(
    NodeReport, TEXT, st.lists(FACTS, max_size=3).map(tuple), st.lists(TEXT, max_size=2).map(tuple),
    st.lists(TEXT, max_size=2).map(tuple), st.lists(TEXT, max_size=2).map(tuple), st.booleans(),
    NUMBER, NUMBER,
    st.lists(st.builds(ShelfFact, TEXT, NUMBER, NUMBER, NUMBER, NUMBER, NUMBER), max_size=2).map(
        tuple
    ),
    NUMBER, st.lists(st.builds(GoldenFact, TEXT, NUMBER, NUMBER), max_size=2).map(tuple), NUMBER,
)  # fmt: skip


@given(WISHES | FACTS | REPORTS)
def test_wishes_facts_and_reports_come_through_whole(value: object) -> None:
    assert over_the_wire(type(value), value) == value


@pytest.mark.parametrize(
    "passed", [lambda error: messages.failed(messages.failure(error)["error"]),
               lambda error: frames.refused(frames.refusal(error)), told],
    ids=["bus", "tunnel", "fake"],
)  # fmt: skip
@pytest.mark.parametrize("code", Code)
def test_every_error_comes_through_as_what_it_was(
    code: Code, passed: Callable[[SandyardError], SandyardError]
) -> None:
    kinds = [one for one in vars(errors).values() if getattr(one, "code", None) is code]
    if code is Code.RATE_LIMITED:  # of the HTTP edge alone; no node says so
        return
    for kind in (one for one in kinds if isinstance(one, type)):
        error: SandyardError = kind("cannot: ünï", status="x", limit=3)
        heard = passed(error)
        assert (type(heard), heard.message, heard.facts) == (kind, error.message, error.facts)
