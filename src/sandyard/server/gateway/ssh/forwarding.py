"""Forwarded SSH connections: made by the sandbox, or accepted by it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol

import asyncssh
from typing_extensions import override

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import ByteStream
from sandyard.server.core.errors import SandyardError, UnsupportedError
from sandyard.server.core.ops import Caller, Dial, Listen, Take
from sandyard.server.core.wire import printable
from sandyard.server.front.relay import relay
from sandyard.server.service.actor import Actor
from sandyard.server.service.sandboxes.forwards import Forwards
from sandyard.server.service.sandboxes.uses import Use
from sandyard.server.tasks import concurrently

USE = Use("ssh", "", "log in to", is_in_feed=False)
WINDOW, PACKET = 2 * 1024 * 1024, 32 * 1024
CHANNEL_S = 30.0
"""For so long a client may take to open a channel."""
_CALLERS_MAX = 64


class Holder(Protocol):
    """A logged-in client's connection, as its forwards see it."""

    @property
    def connection(self) -> asyncssh.SSHServerConnection:
        """The connection."""
        ...

    @property
    def forwards(self) -> Forwards:
        """The service that connects and listens in sandboxes."""
        ...

    @property
    def clock(self) -> Clock:
        """The clock."""
        ...

    async def of(self) -> tuple[Actor, str]:
        """Return the actor and the sandbox's id."""
        ...

    async def until_over(self) -> None:
        """Return once it has ended."""
        ...

    def give_place(self) -> None:
        """Release one channel."""
        ...


class Forward:
    """A connection that the sandbox makes for the client."""

    def __init__(self, client: Holder, wish: Dial) -> None:
        self._client = client
        self._wish = wish
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._channel: asyncio.Future[ChannelStream] = asyncio.get_running_loop().create_future()

    async def take_channel(self, reader: Any, writer: Any) -> None:
        """Accept the channel that asyncssh has opened."""
        if self._channel.done():
            writer.close()  # it came too late
        else:
            self._channel.set_result(ChannelStream(reader, writer))

    async def serve(self) -> None:
        """Connect, set `opened`, and relay until both ends are closed."""
        client = self._client
        try:
            async with (
                _reported_to(self.opened),
                concurrently(client.until_over()) as over,
                concurrently(self._serve()) as serving,
            ):
                await asyncio.wait([over, serving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            client.give_place()
            if self._channel.done():
                self._channel.result().close()
            self._channel.cancel()

    async def _serve(self) -> None:
        client = self._client
        actor, sandbox_id = await client.of()
        async with client.forwards.dial(actor, sandbox_id, self._wish, USE) as there:
            self.opened.set_result(None)
            await asyncio.wait([self._channel], timeout=CHANNEL_S)
            if self._channel.done():
                await _carry(self._channel.result(), there)


class Listener(asyncssh.SSHListener):
    """A port or socket in the sandbox whose connections are forwarded to the client.

    Like sshd, a port without a host accepts connections from the sandbox itself only.
    """

    def __init__(self, client: Holder, wish: Listen) -> None:
        super().__init__()
        self._client = client
        self._wish = wish
        self._port = wish.port
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._is_closed = asyncio.Event()

    async def serve(self) -> None:
        """Have the sandbox listen, set `opened`, and forward connections."""
        client = self._client
        try:
            async with (
                _reported_to(self.opened),
                concurrently(client.until_over()) as over,
                concurrently(self._is_closed.wait()) as closed,
                concurrently(self._serve()) as serving,
            ):
                waiting: list[asyncio.Task[Any]] = [over, closed, serving]
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            client.give_place()

    async def _serve(self) -> None:
        client, wish = self._client, self._wish
        actor, sandbox_id = await client.of()
        async with client.forwards.listen(actor, sandbox_id, wish) as (where, callers):
            if where.path != printable(wish.path or ""):
                raise UnsupportedError(
                    "cannot listen on a socket: the agent of the sandbox is too old; restart it"
                )
            self._port = where.port
            connection = client.connection

            async def answer(caller: Caller) -> None:
                async with client.clock.timeout(CHANNEL_S):
                    if wish.path is not None:
                        reader, writer = await connection.open_unix_connection(wish.path)
                    else:
                        reader, writer = await connection.open_connection(
                            wish.host or "localhost", wish.port or where.port,
                            caller.host or "127.0.0.1", caller.port,
                        )  # fmt: skip
                await take(client, actor, sandbox_id, caller, reader, writer)

            self.opened.set_result(None)
            await answer_all(callers, answer)

    @override
    def get_port(self) -> int:
        return self._port

    @override
    def close(self) -> None:
        self._is_closed.set()

    @override
    async def wait_closed(self) -> None:
        pass


class ChannelStream(ByteStream):
    """A channel as a stream. See core.contracts.node.ByteStream."""

    def __init__(self, reader: Any, writer: Any) -> None:
        self._reader = reader
        self._writer = writer

    @override
    async def read(self, limit: int) -> bytes:
        data: bytes = await self._reader.read(limit)
        return data

    @override
    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    @override
    async def write_eof(self) -> None:
        with suppress(OSError):
            self._writer.write_eof()

    def close(self) -> None:
        """Close it."""
        self._writer.close()


@asynccontextmanager
async def _reported_to(opened: "asyncio.Future[None]") -> AsyncIterator[None]:
    """Set a future to the error that kept something from opening."""
    try:
        yield
    except SandyardError as error:
        if opened.done():
            raise
        opened.set_exception(error)
    finally:
        opened.cancel()


async def _carry(one: ByteStream, other: ByteStream) -> None:
    """Relay until either side fails, which ends the relay."""
    with suppress(SandyardError, OSError, asyncssh.Error):
        await relay(one, other)


async def take(
    client: Holder, actor: Actor, sandbox_id: str, caller: Caller, reader: Any, writer: Any
) -> None:
    """Relay between a connection that the sandbox accepted and a channel to the client."""
    try:
        taking = client.forwards.take(actor, sandbox_id, Take(caller.number), USE)
        async with taking as there:
            await _carry(ChannelStream(reader, writer), there)
    finally:
        writer.close()


async def answer_all(
    callers: AsyncIterator[Caller], answer: Callable[[Caller], Awaitable[None]]
) -> None:
    """Forward accepted connections, a limited number concurrently. A failed one does not affect the
    others."""
    room = asyncio.Semaphore(_CALLERS_MAX)

    async def answer_one(caller: Caller) -> None:
        try:
            with suppress(SandyardError, OSError, TimeoutError, ValueError, asyncssh.Error):
                await answer(caller)
        finally:
            room.release()

    async with asyncio.TaskGroup() as tasks:
        with suppress(
            SandyardError
        ):  # the sandbox ended: operations in progress get the error, too
            async for caller in callers:
                await room.acquire()
                tasks.create_task(answer_one(caller))
