"""The tunnel between control planes and nodes, over real sockets with real certificates."""

import asyncio
import hashlib
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.support.house import until
from tests.support.papers import INSTALLATION, Desk

from sandyard.server.core import ops
from sandyard.server.core.contracts.node import ByteStream, MachineRef, Opened
from sandyard.server.core.errors import (
    ConflictError,
    InvalidArgumentError,
    MachineDeadError,
    NotFoundError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.links.identities import Authority, control_name, new_request, node_name
from sandyard.server.links.tunnel import client
from sandyard.server.links.tunnel.client import NodeAddress, Tunnels
from sandyard.server.links.tunnel.ends import context_of
from sandyard.server.links.tunnel.frames import (
    PIECE,
    WINDOW,
    BrokenError,
    FrameKind,
    Line,
    head,
    values_of,
)
from sandyard.server.links.tunnel.server import serving

CONTROL, NODE = control_name(INSTALLATION, "one"), node_name(INSTALLATION, "n")
WHERE = MachineRef("n", "sandbox-1", 1)
DIAL = ops.Dial(80)
_LIMIT_S = 20


@dataclass
class Guest:
    """What listens in a machine: an echo that stops taking when it is told to."""

    takes: asyncio.Event = field(default_factory=asyncio.Event)
    came: bytearray = field(default_factory=bytearray)
    to_say: bytes = b""
    trouble: SandyardError | None = None
    echoes: bool = True

    def __post_init__(self) -> None:
        self.takes.set()
        self._waiting: asyncio.Queue[bytes] = asyncio.Queue(2)

    async def read(self, limit: int) -> bytes:
        """See core.contracts.node.ByteStream.read."""
        if self.trouble is not None:
            raise self.trouble
        if self.to_say:
            piece, self.to_say = self.to_say[:limit], self.to_say[limit:]
            return piece
        return await self._waiting.get()

    async def write(self, data: bytes) -> None:
        """See core.contracts.node.ByteStream.write."""
        await self.takes.wait()
        self.came += data
        if self.echoes:
            await self._waiting.put(data)

    async def write_eof(self) -> None:
        """See core.contracts.node.ByteStream.write_eof."""
        await self._waiting.put(b"")


class Machines:
    """See core.contracts.node.NodeTunnel: each operation gets the guest that is next."""

    def __init__(self) -> None:
        self.guest = Guest()
        self.open_now = 0
        self.refusal: Exception | None = None
        self.at_the_end: SandyardError | None = None

    @asynccontextmanager
    async def open(
        self, machine: MachineRef, operation: ops.Operation[ops.AnswerT]
    ) -> AsyncIterator[Opened[ops.AnswerT]]:
        if self.refusal is not None:
            raise self.refusal
        assert machine == WHERE
        answer = ops.Done()
        self.open_now += 1
        try:
            stream: ByteStream = self.guest
            yield Opened(answer, stream)  # type: ignore[arg-type]  # a dial is answered so
            if self.at_the_end is not None:
                raise self.at_the_end
        finally:
            self.open_now -= 1


@dataclass
class Ends:
    """Both ends of a tunnel."""

    desk: Desk
    machines: Machines
    port: int
    tunnel: Tunnels
    connected: Callable[[], int]

    async def connect(self, tls: ssl.SSLContext | None) -> Line:
        """Connect by hand."""
        return Line(*await asyncio.open_connection("127.0.0.1", self.port, ssl=tls))

    @property
    def mine(self) -> ssl.SSLContext:
        """What a control plane connects with."""
        return self.desk.tls(CONTROL, is_server=False)


@asynccontextmanager
async def both(folder: Path, **options: int) -> AsyncIterator[Ends]:
    desk, machines, count = Desk.new(folder), Machines(), 0

    def may(name: str) -> bool:
        nonlocal count
        count += name == CONTROL
        return name == CONTROL

    async with AsyncExitStack() as held:
        port = await held.enter_async_context(
            serving(
                machines, address="127.0.0.1", port=0, may=may,
                tls=desk.tls(NODE, is_server=True), **options,
            )
        )  # fmt: skip
        places = {"n": NodeAddress("127.0.0.1", port, NODE)}
        tunnel = await held.enter_async_context(
            Tunnels(desk.tls(CONTROL, is_server=False), places.get)
        )
        yield Ends(desk, machines, port, tunnel, lambda: count)


@pytest.fixture
async def ends(tmp_path: Path) -> AsyncIterator[Ends]:
    async with both(tmp_path) as found:
        yield found


# --- bytes --------------------------------------------------------------------------------------


async def test_bytes_go_both_ways_at_once_and_come_as_they_were(ends: Ends) -> None:
    given, found = hashlib.sha256(), hashlib.sha256()
    pieces = [bytes((number % 251,)) * (1 + number * 7919 % (2 * PIECE)) for number in range(100)]

    async with asyncio.timeout(_LIMIT_S), ends.tunnel.open(WHERE, DIAL) as opened:

        async def send() -> None:
            for piece in pieces:
                given.update(piece)
                await opened.stream.write(piece)
            await opened.stream.write_eof()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(send())
            while data := await opened.stream.read(10_000):
                assert len(data) <= 10_000
                found.update(data)
        assert await opened.stream.read(1) == b""
    assert found.digest() == given.digest()


async def test_who_writes_and_reads_nothing_is_not_held_up_by_what_comes(ends: Ends) -> None:
    ends.machines.guest.echoes = False
    ends.machines.guest.to_say = bytes(10 * WINDOW)
    async with asyncio.timeout(_LIMIT_S), ends.tunnel.open(WHERE, DIAL) as opened:
        for _ in range(10):
            await opened.stream.write(bytes(WINDOW))
        await until(lambda: len(ends.machines.guest.came) == 10 * WINDOW)


async def test_neither_end_holds_more_than_a_window(ends: Ends) -> None:
    guest = ends.machines.guest
    guest.to_say = bytes(10 * WINDOW)
    guest.takes.clear()
    async with asyncio.timeout(_LIMIT_S), ends.tunnel.open(WHERE, DIAL) as opened:
        sending = asyncio.create_task(opened.stream.write(bytes(10 * WINDOW)))
        await until(lambda: len(guest.to_say) <= 9 * WINDOW)
        done, _ = await asyncio.wait([sending], timeout=0.3)
        assert not done
        assert len(guest.to_say) >= 9 * WINDOW - 2 * PIECE  # what was read, and waits for its turn
        sending.cancel()


async def test_who_leaves_is_heard_whatever_is_not_taken(ends: Ends) -> None:
    ends.machines.guest.takes.clear()
    async with asyncio.timeout(_LIMIT_S):
        async with ends.tunnel.open(WHERE, DIAL) as opened:
            await opened.stream.write(bytes(WINDOW))
            await until(lambda: ends.machines.open_now == 1)
        await until(lambda: ends.machines.open_now == 0)


async def test_a_connection_serves_one_operation_after_the_other(ends: Ends) -> None:
    async with asyncio.timeout(_LIMIT_S):
        for number in range(30):
            ends.machines.guest = Guest(to_say=bytes(1 + number * 40_000))
            async with ends.tunnel.open(WHERE, DIAL) as opened:
                await opened.stream.read(10)
                await opened.stream.write(b"x")
            await until(lambda: ends.machines.open_now == 0)
    assert ends.connected() <= 4


async def test_who_goes_on_with_what_is_over_disturbs_no_other(ends: Ends) -> None:
    async with asyncio.timeout(_LIMIT_S):
        async with ends.tunnel.open(WHERE, DIAL) as before:
            await before.stream.write(b"x")
        await until(lambda: ends.machines.open_now == 0)
        ends.machines.guest = Guest()
        async with ends.tunnel.open(WHERE, DIAL) as opened:
            for late in (before.stream.write(b"late"), before.stream.write_eof()):
                with pytest.raises(UnavailableError):
                    await late
            await opened.stream.write(b"mine")
            assert await opened.stream.read(100) == b"mine"
        assert ends.machines.guest.came == b"mine"


async def test_a_hundred_at_once(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_DIAL_S", _LIMIT_S)

    async def one(number: int) -> None:
        async with ends.tunnel.open(WHERE, DIAL) as opened:
            await opened.stream.write(b"%d" % number)

    ends.machines.guest.echoes = False
    async with asyncio.timeout(_LIMIT_S), asyncio.TaskGroup() as tasks:
        for number in range(100):
            tasks.create_task(one(number))
    await until(lambda: ends.machines.open_now == 0)


# --- what goes wrong ----------------------------------------------------------------------------


async def test_what_a_node_refuses_is_told_as_it_is_and_the_connection_goes_on(ends: Ends) -> None:
    async with asyncio.timeout(_LIMIT_S):
        for _ in range(5):
            ends.machines.refusal = ConflictError("it was paused", status="paused")
            with pytest.raises(ConflictError) as caught:
                async with ends.tunnel.open(WHERE, DIAL):
                    pass
            assert caught.value.facts == {"status": "paused"}
            assert caught.value.message == "it was paused"
            ends.machines.refusal = RuntimeError("a bug")
            with pytest.raises(SandyardError):
                async with ends.tunnel.open(WHERE, DIAL):
                    pass
            ends.machines.refusal = None
            async with ends.tunnel.open(WHERE, DIAL) as opened:
                await opened.stream.write(b"x")
                assert await opened.stream.read(1) == b"x"
    assert ends.connected() <= 6


async def test_what_goes_wrong_amidst_the_bytes_is_told_to_who_reads(ends: Ends) -> None:
    ends.machines.guest.trouble = MachineDeadError("the machine ended")
    async with asyncio.timeout(_LIMIT_S), ends.tunnel.open(WHERE, DIAL) as opened:
        with pytest.raises(ConflictError) as caught:
            while await opened.stream.read(1):
                pass
    assert caught.value.facts == {"status": "error"}
    ends.machines.guest = Guest()
    ends.machines.at_the_end = UnavailableError("too late for anybody")
    for _ in range(3):
        async with asyncio.timeout(_LIMIT_S), ends.tunnel.open(WHERE, DIAL) as opened:
            await opened.stream.write(b"x")


async def test_a_control_plane_that_breaks_off_leaves_nothing_open(ends: Ends) -> None:
    async def use() -> None:
        async with ends.tunnel.open(WHERE, DIAL) as opened:
            await opened.stream.read(1)

    async with asyncio.timeout(_LIMIT_S):
        task = asyncio.create_task(use())
        await until(lambda: ends.machines.open_now == 1)
        task.cancel()
        await until(lambda: ends.machines.open_now == 0)
        with suppress(asyncio.CancelledError):
            await task


async def test_a_node_that_is_gone_is_told_of(tmp_path: Path) -> None:
    async with AsyncExitStack() as held, asyncio.timeout(_LIMIT_S):
        ends = await held.enter_async_context(both(tmp_path))
        reading: list[SandyardError] = []

        async def use() -> None:
            try:
                async with ends.tunnel.open(WHERE, DIAL) as opened:
                    await opened.stream.read(1)
            except SandyardError as error:
                reading.append(error)

        task = asyncio.create_task(use())
        await until(lambda: ends.machines.open_now == 1)
        desk = ends.desk
        await held.aclose()
        await task
        assert isinstance(reading[0], UnavailableError)
        places = {"n": NodeAddress("127.0.0.1", ends.port, NODE)}
        async with Tunnels(desk.tls(CONTROL, is_server=False), places.get) as tunnel:
            for machine, kind in (
                (WHERE, UnavailableError),
                (replace(WHERE, node_id="x"), NotFoundError),
            ):
                with pytest.raises(kind):
                    async with tunnel.open(machine, DIAL):
                        pass


async def test_connections_that_died_while_nobody_used_them_are_not_used(tmp_path: Path) -> None:
    desk, machines = Desk.new(tmp_path), Machines()
    tls, places = desk.tls(NODE, is_server=True), dict[str, NodeAddress]()
    async with (
        asyncio.timeout(_LIMIT_S),
        Tunnels(desk.tls(CONTROL, is_server=False), places.get) as tunnel,
    ):
        for _ in range(3):  # a node that is started again, at another port
            async with serving(
                machines, address="127.0.0.1", port=0, tls=tls, may=lambda _: True
            ) as port:
                places["n"] = NodeAddress("127.0.0.1", port, NODE)
                async with tunnel.open(WHERE, DIAL) as opened:
                    await opened.stream.write(b"x")
                    assert await opened.stream.read(1) == b"x"


# --- who may ------------------------------------------------------------------------------------


async def test_nobody_gets_in_without_papers_of_the_installations_own(
    ends: Ends, tmp_path: Path
) -> None:
    other = Desk(tmp_path / "other", Authority.new("other", datetime.now(UTC)))
    other.folder.mkdir()
    forged = replace(other.papers(CONTROL), authority=ends.desk.papers(CONTROL).authority)
    node = ends.desk.tls(node_name(INSTALLATION, "m"), is_server=False)
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE
    past = ends.desk.tls(CONTROL, is_server=False, lasts=timedelta(minutes=-1))
    for tls in (context_of(forged, is_server=False), node, bare, past, None):
        with pytest.raises((BrokenError, OSError)):
            async with asyncio.timeout(_LIMIT_S):
                line = await ends.connect(tls)
                try:
                    await line.say(FrameKind.ASK, head({"v": 1}))
                    await line.hear()
                finally:
                    line.hang_up()
    assert ends.connected() == 0


async def test_a_control_plane_talks_to_the_node_that_it_means_alone(ends: Ends) -> None:
    places = {"n": NodeAddress("127.0.0.1", ends.port, node_name(INSTALLATION, "another"))}
    async with Tunnels(ends.mine, places.get) as tunnel, asyncio.timeout(_LIMIT_S):
        with pytest.raises(UnavailableError, match="not sandyard://test/node/another"):
            async with tunnel.open(WHERE, DIAL):
                pass


async def test_no_more_are_served_than_may_be(tmp_path: Path) -> None:
    async with both(tmp_path, most=2) as ends, asyncio.timeout(_LIMIT_S):
        lines = [await ends.connect(ends.mine) for _ in range(2)]
        for line in lines:
            await line.say(FrameKind.ASK, head({"v": 1, "op": "nothing"}))
            assert (await line.hear()).kind is FrameKind.REFUSE
        third = await ends.connect(ends.mine)
        with pytest.raises(BrokenError):
            await third.hear()
        for line in (*lines, third):
            line.hang_up()


@pytest.mark.parametrize(
    "said",
    [
        b"\xff" * 100,
        bytes((FrameKind.DATA, 0, 0, 0, 1, 1)),
        bytes((FrameKind.ASK,)) + (2**31).to_bytes(4, "big"),
        bytes((FrameKind.ASK, 0, 0, 0, 3)) + b"[1]",
        bytes((FrameKind.ASK, 0, 0, 0, 3)) + b"\xff\xff\xff",
        bytes((FrameKind.ASK, 0, 0, 0, 9)) + b"{}",
    ],
)
async def test_nonsense_is_hung_up_on_and_harms_nobody_else(ends: Ends, said: bytes) -> None:
    async with asyncio.timeout(_LIMIT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", ends.port, ssl=ends.mine)
        writer.write(said)
        if said.endswith(b"{}"):  # and no more comes of it
            await writer.drain()
            writer.transport.abort()
        with suppress(ConnectionError):
            assert await reader.read() == b""
        writer.transport.abort()
        async with ends.tunnel.open(WHERE, DIAL) as opened:
            await opened.stream.write(b"x")
            assert await opened.stream.read(1) == b"x"


async def test_who_sends_more_than_may_be_is_hung_up_on(ends: Ends) -> None:
    ends.machines.guest.takes.clear()
    async with asyncio.timeout(_LIMIT_S):
        line = await ends.connect(ends.mine)
        request = ops.request_of(DIAL, "")
        machine = {"nodeId": "n", "sandboxId": "sandbox-1", "incarnation": 1}
        asked = {"v": 1, "machine": machine, "op": request.op, "args": request.args}
        await line.say(FrameKind.ASK, head(asked))
        assert (await line.hear()).kind is FrameKind.ANSWER
        with pytest.raises(BrokenError):
            while True:
                await line.say(FrameKind.DATA, bytes(PIECE))
        line.hang_up()
        await until(lambda: ends.machines.open_now == 0)


async def test_what_is_asked_in_another_version_is_refused_in_words(ends: Ends) -> None:
    async with asyncio.timeout(_LIMIT_S):
        line = await ends.connect(ends.mine)
        machine = {"nodeId": "n", "sandboxId": "sandbox-1", "incarnation": 1}
        for asked, kind, words in (
            ({"v": 2}, "OtherVersionError", b"version 2 of the protocol"),
            ({"v": "x"}, "InvalidArgumentError", b"cannot read the request"),
            ({"v": 1, "op": "dial"}, "InvalidArgumentError", b"cannot read the request"),
            ({"v": 1, "machine": {}, "op": "x"}, "InvalidArgumentError", b"cannot read"),
            ({"v": 1, "machine": machine, "op": "x"}, "OtherVersionError", b"no operation 'x'"),
        ):
            await line.say(FrameKind.ASK, head(asked))
            said = await line.hear()
            assert said.kind is FrameKind.REFUSE
            assert words in said.payload
            assert values_of(said.payload)["kind"] == kind
            await line.say(FrameKind.LEAVE)
            assert (await line.hear()).kind is FrameKind.LEAVE
        line.hang_up()


async def test_a_request_says_nothing_that_is_believed(tmp_path: Path) -> None:
    authority = Authority.new("x", datetime.now(UTC))
    for nonsense in (b"", b"nonsense", authority.certificate, authority.key):
        with pytest.raises(InvalidArgumentError):
            authority.sign(nonsense, CONTROL, datetime.now(UTC), timedelta(hours=1))
    key, request = new_request()
    assert b"PRIVATE KEY" in key
    assert b"PRIVATE KEY" not in request
