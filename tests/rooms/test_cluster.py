"""How hosts become nodes, say that they are there and are given up: registry, door and lease."""

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.support.clock import DrivenClock
from tests.support.nodes import FakeNode
from tests.support.papers import Desk
from tests.support.store import place_database

from sandyard.server.core.codec import encode
from sandyard.server.core.contracts.cluster import (
    Application,
    Beat,
    Grant,
    Hello,
    Identity,
    Joining,
    Welcome,
    trust_of,
)
from sandyard.server.core.contracts.node import VIEW_MAX, GoldenFact, NodeView, ShelfFact
from sandyard.server.core.contracts.store import Store, Turn
from sandyard.server.core.errors import (
    ConflictError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    SandyardError,
    UnauthenticatedError,
    UnavailableError,
)
from sandyard.server.core.ids import new_uuid
from sandyard.server.core.records import JoinedNode, NodeStart
from sandyard.server.links.identities import control_name, new_request
from sandyard.server.links.installation import (
    Installation,
    InstallationRegistrar,
    is_control_of,
)
from sandyard.server.links.local import LocalBus
from sandyard.server.links.nats.tokens import Key, Role
from sandyard.server.links.sql import open_store
from sandyard.server.links.tunnel.door import (
    DoorPresence,
    fingerprint_of,
    joined,
    opened_door,
)
from sandyard.server.links.tunnel.ends import Papers, context_of
from sandyard.server.node.membership import NodeMembership, Telling
from sandyard.server.service.fleet import LEASE_S, Fleet
from sandyard.server.service.roster import Roster
from sandyard.server.service.sandboxes.lifecycle import Lifecycle

START = NodeStart("boot-1", "host-a:/home", "0.1", "10.0.0.2", 8700)


def an_application() -> tuple[bytes, Application]:
    key, request = new_request()
    return key, Application(request.decode(), Key.new(Role.USER).name)


@dataclass
class Yard:
    """A control plane's registry with its door, and what a host would have of it."""

    folder: Path
    store: Store
    fleet: Fleet
    installation: Installation
    port: int
    clock: DrivenClock

    @property
    def authority(self) -> str:
        return self.installation.authority.certificate.decode()

    async def join(self, secret: str, **changes: Any) -> Identity:
        """Join by the door."""
        options: dict[str, Any] = {
            "fingerprint": fingerprint_of(self.authority),
            "may_be": is_control_of(self.installation.id),
            **changes,
        }
        joining = Joining(secret, "host", an_application()[1])
        identity, _ = await joined("127.0.0.1", self.port, joining, **options)
        return identity

    def presence(self, identity: Identity, key: bytes) -> DoorPresence:
        """Return how a node says by the door that it is there."""
        papers = Papers(*(self.folder / f"own.{one}" for one in ("crt", "key", "ca")))
        papers.certificate.write_text(identity.certificate)
        papers.key.write_bytes(key)
        papers.authority.write_text(identity.authority)
        presence = DoorPresence(
            lambda: context_of(papers, is_server=False), is_control_of(self.installation.id)
        )
        presence.doors = [("127.0.0.1", self.port)]
        return presence


@asynccontextmanager
async def a_door(yard: Yard, installation: Installation) -> AsyncIterator[int]:
    certificate, key = installation.control_papers("one", datetime.now(UTC))
    papers = Papers(*(yard.folder / f"control.{one}" for one in ("crt", "key", "ca")))
    papers.certificate.write_bytes(certificate)
    papers.key.write_bytes(key)
    papers.authority.write_bytes(installation.authority.certificate)
    tls = context_of(papers, is_server=True)
    tls.verify_mode = ssl.CERT_OPTIONAL
    async with opened_door(
        yard.fleet,
        address="127.0.0.1",
        port=0,
        tls=tls,
        authority=installation.authority.certificate.decode,
        node_of=installation.node_of,
    ) as port:
        yield port


@pytest.fixture
async def yard(tmp_path: Path) -> AsyncIterator[Yard]:
    clock = DrivenClock()
    place_database(tmp_path / "sandyard.db")
    installation = Installation.new(datetime.now(UTC))
    async with open_store(
        f"sqlite:///{tmp_path / 'sandyard.db'}", key=b"k" * 32, clock=clock
    ) as store:
        registrar = InstallationRegistrar(
            installation, ("tls://nats:4222",), lambda: datetime.now(UTC)
        )
        lifecycle = Lifecycle(store, LocalBus(clock), clock)
        fleet = Fleet(store, registrar, lifecycle, clock, door="control:8700")
        made = Yard(tmp_path, store, fleet, installation, 0, clock)
        async with a_door(made, installation) as port:
            made.port = port
            yield made


# --- joining ------------------------------------------------------------------------------------


async def test_a_host_joins_by_an_invite_that_is_good_once(yard: Yard) -> None:
    secret = await yard.fleet.invite()
    identity = await yard.join(secret)
    assert identity.authority == yard.authority
    assert identity.servers == ("tls://nats:4222",)
    (node,) = await yard.fleet.nodes()
    assert (node.id, node.name, node.epoch) == (identity.node_id, "host", 0)
    with pytest.raises(PermissionDeniedError, match="it was used"):
        await yard.join(secret)
    late = await yard.fleet.invite()
    yard.clock.time += timedelta(hours=1, seconds=1)
    with pytest.raises(PermissionDeniedError, match="over an hour old"):
        await yard.join(late)
    with pytest.raises(PermissionDeniedError):
        await yard.join("nonsense")
    assert len(await yard.fleet.nodes()) == 1


async def test_what_cannot_be_signed_uses_no_invite_up(yard: Yard) -> None:
    secret = await yard.fleet.invite()
    _, good = an_application()
    for bad in (
        replace(good, request="nonsense"), replace(good, key="nonsense"),
        replace(good, key=Key.new(Role.ACCOUNT).name),
    ):  # fmt: skip
        with pytest.raises(InvalidArgumentError):
            await yard.fleet.join(Joining(secret, "host", bad))
    await yard.fleet.join(Joining(secret, "host", good))


async def test_a_host_tells_its_secret_to_nobody_else(yard: Yard) -> None:
    secret = await yard.fleet.invite()
    with pytest.raises(UnauthenticatedError, match="not of the installation"):
        await yard.join(secret, fingerprint="0" * 64)
    with pytest.raises(UnauthenticatedError, match="no control plane"):
        await yard.join(secret, may_be=is_control_of("another"))
    other = Installation.new(datetime.now(UTC))
    async with a_door(yard, other) as port:
        yard.port = port
        with pytest.raises(UnauthenticatedError):
            await yard.join(secret)
    # One that shows the right authority's certificate, and has its own after it.
    both = replace(
        other,
        id=yard.installation.id,
        authority=replace(
            other.authority,
            certificate=yard.installation.authority.certificate + other.authority.certificate,
        ),
    )
    both_signs = replace(other, id=yard.installation.id)
    certificate, key = both_signs.control_papers("one", datetime.now(UTC))
    papers = Papers(*(yard.folder / f"evil.{one}" for one in ("crt", "key", "ca")))
    papers.certificate.write_bytes(certificate)
    papers.key.write_bytes(key)
    papers.authority.write_bytes(other.authority.certificate)
    tls = context_of(papers, is_server=True)
    tls.verify_mode = ssl.CERT_NONE
    async with opened_door(
        yard.fleet, address="127.0.0.1", port=0, tls=tls,
        authority=both.authority.certificate.decode, node_of=lambda _: None,
    ) as port:  # fmt: skip
        yard.port = port
        with pytest.raises(SandyardError, match="cannot"):
            await yard.join(secret)
    assert await yard.fleet.nodes() == []


async def test_strangers_at_the_door_get_nothing_and_take_no_room(
    yard: Yard, caplog: pytest.LogCaptureFixture
) -> None:
    secret = await yard.fleet.invite()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    writers = []
    for payload in (
        b"GET / HTTP/1.0\r\n\r\n", b"\x01\x00\x00\x00\x04null", b"\x01\xff\xff\xff\xff",
        b'\x01\x00\x00\x00\x0d{"op":"beat"}', b'\x01\x00\x00\x00\x02{}',
        b"\x01" + (2**20).to_bytes(4, "big") + b"x" * 2**17,
    ):  # fmt: skip
        reader, writer = await asyncio.open_connection("127.0.0.1", yard.port, ssl=tls)
        writer.write(payload)
        answer = b""
        with suppress(OSError):
            async with asyncio.timeout(10):
                answer = await reader.read(4096)
        assert b"certificate" not in answer
        writers.append(writer)
    for _ in range(80):
        _, writer = await asyncio.open_connection("127.0.0.1", yard.port, ssl=tls)
        writers.append(writer)
    for writer in writers:
        writer.transport.abort()
    async with asyncio.timeout(20):
        while True:
            try:
                await yard.join(secret)
                break
            except UnavailableError:  # until it has seen that the strangers left
                await asyncio.sleep(0.05)
    assert "unexpected error" not in caplog.text


# --- being there --------------------------------------------------------------------------------


async def test_a_node_says_by_the_door_that_it_is_there(yard: Yard) -> None:
    key, application = an_application()
    identity = await yard.fleet.join(Joining(await yard.fleet.invite(), "host", application))
    presence = yard.presence(identity, key)
    # Who it is stands in its certificate, whatever it says.
    welcome = await presence.hello("another", Hello(START, application))
    assert (welcome.epoch, welcome.identity.node_id) == (1, identity.node_id)
    assert (await presence.beat("another", Beat(1))).door == "control:8700"
    with pytest.raises(ConflictError):
        await presence.beat(identity.node_id, Beat(0))
    for epoch in (-1, 2**31, 2**63 - 1):
        with pytest.raises(InvalidArgumentError):
            await presence.beat(identity.node_id, Beat(epoch))
    # With more of everything than a message has room for.
    large = NodeView(
        templates=("base-minimal",),
        shelves=tuple(ShelfFact(f"t{n}@{n:024x}", 1, n, 1024, 1, 1) for n in range(180)),
        goldens=tuple(GoldenFact(f"t{n}@{n:024x}", 1, n) for n in range(100)),
        versions=frozenset(f"{n:016x}" for n in range(3000)),
    )
    await presence.beat(identity.node_id, Beat(1, large.within(VIEW_MAX)))
    assert len(json.dumps(encode(Beat(1, large.within(VIEW_MAX))))) < 2**16
    good = presence.doors[0]

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    async with silent:
        presence.doors = [("127.0.0.1", silent.sockets[0].getsockname()[1]), good]
        await presence.beat(identity.node_id, Beat(1))
        assert presence.doors[0] == good  # whoever answers is asked first from then on
        presence.doors = presence.doors[1:]
        with pytest.raises(UnavailableError):
            await presence.beat(identity.node_id, Beat(1))
    presence.doors = [good]
    for bad in (
        replace(START, port=0), replace(START, port=70000), replace(START, host="x" * 10_000)
    ):  # fmt: skip
        with pytest.raises(InvalidArgumentError):
            await presence.hello(identity.node_id, Hello(bad, application))
    yard.clock.time += timedelta(seconds=LEASE_S + 1)
    await yard.fleet.forget("host")
    for say in (
        presence.beat(identity.node_id, Beat(1)),
        presence.hello(identity.node_id, Hello(START, application)),
    ):
        with pytest.raises(NotFoundError):
            await say


async def test_a_node_that_is_there_is_not_forgotten(yard: Yard) -> None:
    _, application = an_application()
    identity = await yard.fleet.join(Joining(await yard.fleet.invite(), "host", application))
    await yard.fleet.hello(identity.node_id, Hello(START, application))
    with pytest.raises(ConflictError, match="it is online"):
        await yard.fleet.forget("host")
    with pytest.raises(NotFoundError):
        await yard.fleet.drain("nobody", is_draining=True)
    secret = await yard.fleet.invite()
    with pytest.raises(ConflictError, match="another node has this name"):
        await yard.fleet.join(Joining(secret, "host", application))
    await yard.fleet.join(Joining(secret, "other", application))
    # Versions before took two of one name.
    async with yard.store.write(Turn.ALONE) as tx:
        await tx.joined_nodes.add(JoinedNode(new_uuid(), "host", yard.clock.now()))
    with pytest.raises(ConflictError, match="name it by its id"):
        await yard.fleet.drain("host", is_draining=True)
    await yard.fleet.drain(identity.node_id, is_draining=True)
    with pytest.raises(ConflictError, match="not lost"):
        await yard.fleet.confirm_off(identity.node_id)


# --- given up -----------------------------------------------------------------------------------


@asynccontextmanager
async def a_roster(
    yard: Yard,
    can_hear: Callable[[], bool] = lambda: True,
    elapsed: Callable[[], float] | None = None,
) -> AsyncIterator[Roster]:
    roster = Roster(yard.store, yard.clock, can_hear=can_hear, elapsed=elapsed)
    await roster.refresh()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(roster.run())
        yield roster
        running.cancel()


async def drive(
    clock: DrivenClock, seconds: float, beat: Callable[[], Awaitable[object]] | None = None
) -> None:
    """Let time pass, with a beat each second if there is one."""
    passed, step = 0.0, 0.4
    while passed < seconds:
        if beat is not None:
            await beat()
        await clock.advance(step)
        await asyncio.sleep(0.005)
        passed += step


async def a_node(yard: Yard) -> str:
    _, application = an_application()
    identity = await yard.fleet.join(Joining(await yard.fleet.invite(), "host", application))
    await yard.fleet.hello(identity.node_id, Hello(START, application))
    return identity.node_id


async def lost(yard: Yard) -> bool:
    (node,) = await yard.fleet.nodes()
    return node.lost_at is not None


async def until_lost(yard: Yard) -> None:
    """Let time pass until the node is given up: a busy host's looks are long, and count anew."""
    async with asyncio.timeout(30):
        while not await lost(yard):
            await drive(yard.clock, 1)


async def test_whoever_is_silent_is_given_up_and_is_back_with_the_next_beat(yard: Yard) -> None:
    async with a_roster(yard) as roster:
        node_id = await a_node(yard)
        await drive(yard.clock, 3)
        assert roster.takes_new(node_id)
        await until_lost(yard)
        await drive(yard.clock, 1)
        assert roster.is_lost(node_id)
        assert await roster.is_still_lost(node_id)
        assert not roster.takes_new(node_id)
        await yard.fleet.beat(node_id, Beat(1))
        assert roster.is_lost(node_id)  # as of its last look, and an owner may know better
        assert not await roster.is_still_lost(node_id)
        await drive(yard.clock, 1)
        assert roster.takes_new(node_id)


async def test_what_a_node_says_of_itself_is_heard_of_its_latest_process_alone(yard: Yard) -> None:
    async with a_roster(yard) as roster:
        node_id = await a_node(yard)
        await drive(yard.clock, 1)
        assert roster.last_heartbeat(node_id) is None

        def says(generation: int, epoch: int = 1) -> int | None:
            """Say something, and return what is believed then."""
            roster.hear(node_id, Beat(epoch, NodeView(generation=generation)))
            told = roster.last_heartbeat(node_id)
            return None if told is None else told.view.generation

        assert says(7, epoch=0) is None
        assert says(8, epoch=2) is None
        assert says(3) == 3
        assert says(4) == 3, "it says something all the time"
        await yard.clock.advance(0.5)
        assert says(2) == 3, "it came late"
        assert says(4) == 4
        roster.hear("nobody", Beat(1, NodeView()))
        assert roster.last_heartbeat("nobody") is None
        await yard.clock.advance(3.5)
        assert roster.last_heartbeat(node_id) is None, "that was long ago"


async def test_without_nats_nobody_is_given_up_nor_at_once_after_it(yard: Yard) -> None:
    hears = False
    async with a_roster(yard, lambda: hears):
        node_id = await a_node(yard)
        await drive(yard.clock, 30)
        assert not await lost(yard)
        hears = True
        await drive(yard.clock, 4)
        assert not await lost(yard)
        await yard.fleet.beat(node_id, Beat(1))
        await drive(yard.clock, 3)
        assert not await lost(yard)
        await until_lost(yard)


async def test_whoever_stood_still_gives_nobody_up_for_that(yard: Yard) -> None:
    still = 0.0
    async with a_roster(yard, elapsed=lambda: yard.clock.monotonic() + still):
        node_id = await a_node(yard)
        await drive(yard.clock, 8, beat=lambda: yard.fleet.beat(node_id, Beat(1)))
        still = 60.0  # nothing ran meanwhile
        yard.clock.time += timedelta(seconds=60)
        await drive(yard.clock, 4)
        assert not await lost(yard)
        await yard.fleet.beat(node_id, Beat(1))
        await drive(yard.clock, 3)
        assert not await lost(yard)


async def test_what_waited_for_a_control_plane_that_stood_still_gives_no_node_a_lease(
    yard: Yard,
) -> None:
    still = 0.0
    async with a_roster(yard, elapsed=lambda: yard.clock.monotonic() + still) as roster:
        node_id = await a_node(yard)
        _, application = an_application()
        fleet = Fleet(
            yard.store, InstallationRegistrar(yard.installation, (), lambda: datetime.now(UTC)),
            Lifecycle(yard.store, LocalBus(yard.clock), yard.clock), yard.clock,
            hears_late=roster.hears_late,
        )  # fmt: skip
        await drive(yard.clock, 2, beat=lambda: fleet.beat(node_id, Beat(1)))
        # It stands still, and another gives the node up; then it reads what was said before that.
        still = 60.0
        yard.clock.time += timedelta(seconds=60)
        async with yard.store.write(Turn.SHARED) as tx:
            assert await tx.joined_nodes.lose(grace=timedelta()) == [node_id]
        for _ in range(3):
            with pytest.raises(UnavailableError, match="was suspended"):
                await fleet.beat(node_id, Beat(1))
            with pytest.raises(UnavailableError, match="was suspended"):
                await fleet.hello(node_id, Hello(START, application))
            await drive(yard.clock, 0.2)
        assert await lost(yard)
        # What is said from then on is of now.
        await drive(yard.clock, 2)
        await fleet.beat(node_id, Beat(1))
        assert not await lost(yard)


# --- the node's own count -----------------------------------------------------------------------


class Presences:
    """A way to a control plane that a test opens and closes."""

    def __init__(self, clock: DrivenClock) -> None:
        self.trouble: SandyardError | None = None
        self.said: list[str] = []
        self.takes_s = 0.0
        self.authority = self.trusted_by_beats = "a"
        self.reads_views = True
        self._clock = clock

    async def hello(self, node_id: str, hello: Hello) -> Welcome:
        await self._say("hello")
        identity = Identity(node_id, "i", "c", self.authority, "n", "t")
        return Welcome(1, LEASE_S, identity, "door:1")

    async def beat(self, node_id: str, beat: Beat) -> Grant:
        await self._say("beat")
        if beat.view is not None and not self.reads_views:
            raise InvalidArgumentError("it cannot be read")
        return Grant(LEASE_S, "door:2", trust_of(self.trusted_by_beats, "", "n"))

    async def _say(self, word: str) -> None:
        self.said.append(word)
        if self.takes_s:
            await self._clock.sleep(self.takes_s)
        if self.trouble is not None:
            raise self.trouble


@asynccontextmanager
async def a_membership(
    clock: DrivenClock, *ways: Presences, telling: Telling | None = None
) -> AsyncIterator[tuple[NodeMembership, "asyncio.Task[None]", list[str]]]:
    doors: list[str] = []
    membership = NodeMembership(
        new_uuid(), ways, hello=lambda: Hello(START, an_application()[1]),
        keep=lambda _: None, know=doors.append, clock=clock, boot_time=clock.monotonic,
        telling=telling,
    )  # fmt: skip
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(_kept(membership))
        yield membership, running, doors
        running.cancel()


async def _kept(membership: NodeMembership) -> None:
    try:
        await membership.run()
    except SandyardError as error:
        logging.getLogger(__name__).warning("it ended: %s", error.message)


async def test_a_view_that_cannot_be_read_costs_no_lease(tmp_path: Path) -> None:
    clock, telling = DrivenClock(), Telling()
    telling.of(FakeNode())
    way = Presences(clock)
    way.reads_views = False
    async with a_membership(clock, way, telling=telling) as (membership, _, _):
        await drive(clock, LEASE_S + 2)
        assert membership.has_lease


async def test_a_node_counts_its_lease_from_before_it_asked(tmp_path: Path) -> None:
    clock = DrivenClock()
    way = Presences(clock)
    async with a_membership(clock, way) as (membership, _, doors):
        with pytest.raises(UnavailableError, match="no lease"):
            membership.check()
        await drive(clock, 2)
        membership.check()
        assert way.said[0] == "hello"
        assert way.said.count("hello") == 1
        assert {"door:1", "door:2"} <= set(doors)
        way.takes_s = LEASE_S + 0.5  # what comes so late is over when it comes
        await drive(clock, 8)
        assert not membership.has_lease
        way.takes_s = 0
        await drive(clock, 6)
        assert membership.has_lease
        way.trouble = UnavailableError("nobody answers")
        await drive(clock, LEASE_S + 1)
        assert not membership.has_lease


async def test_a_node_asks_for_papers_of_another_authority_once_a_beat() -> None:
    clock = DrivenClock()
    way = Presences(clock)
    async with a_membership(clock, way):
        await drive(clock, 3)
        assert way.said.count("hello") == 1
        way.trusted_by_beats = "b"  # of a control plane that knows it before the other does
        way.said.clear()
        await drive(clock, 10)
        assert 3 <= way.said.count("hello") <= 11
        way.authority = "b"
        await drive(clock, 3)
        way.said.clear()
        await drive(clock, 10)
        assert "hello" not in way.said


async def test_where_the_first_way_is_closed_the_second_serves(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = DrivenClock()
    first, second = Presences(clock), Presences(clock)
    async with a_membership(clock, first, second) as (membership, _, _):
        await drive(clock, 2)
        assert second.said == []
        first.trouble = UnavailableError("nobody answers")
        await drive(clock, 10)
        assert membership.has_lease
        assert "beat" in second.said
        assert "by another way" in caplog.text


@pytest.mark.parametrize("trouble", [ConflictError("a later one"), NotFoundError("forgotten")])
async def test_a_process_that_is_the_node_no_more_ends(trouble: SandyardError) -> None:
    clock = DrivenClock()
    way = Presences(clock)
    async with a_membership(clock, way) as (_, running, _):
        await drive(clock, 3)
        way.trouble = trouble
        await drive(clock, 2)
        assert running.done()


async def test_one_that_is_refused_at_its_start_tries_for_a_while(yard: Yard) -> None:
    clock = DrivenClock()
    way = Presences(clock)
    way.trouble = ConflictError("another lives")
    async with a_membership(clock, way) as (membership, running, _):
        await drive(clock, 4)
        assert not running.done()
        way.trouble = None
        await drive(clock, 2)
        assert membership.has_lease


def test_certificates_tell_nodes_from_control_planes(tmp_path: Path) -> None:
    installation = Installation.new(datetime.now(UTC))
    assert Installation.of(installation.values()) == installation
    name = control_name(installation.id, "one")
    assert installation.is_control(name)
    assert installation.node_of(name) is None
    assert not installation.is_control(control_name("another", "one"))
    assert Desk.new(tmp_path / "papers").authority.certificate != installation.nats.certificate
