"""The link to the agents: one connection an operation, every wait with a limit.

What an agent says is written by a hostile guest: core.wire bounds it, and nothing here trusts it.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

from sandyard.server.core.contracts import Opened
from sandyard.server.core.errors import (
    ConflictError,
    InternalError,
    InvalidArgumentError,
    UnavailableError,
)
from sandyard.server.core.wire import Answer, Decoder, Op, Request, WireError, encode_request

_READ = 128 * 1024
Dial = Callable[[float], Awaitable[socket.socket]]


class AgentStream:
    """See core.contracts.ByteStream."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        first: bytes,
        is_dead: Callable[[], bool],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._first = first
        self._is_dead = is_dead

    async def read(self, limit: int) -> bytes:
        """See core.contracts.ByteStream.read."""
        if self._first:
            data, self._first = self._first[:limit], self._first[limit:]
            return data
        try:
            data = await self._reader.read(limit)
        except OSError as error:
            raise self._gone() from error
        if not data and self._is_dead():
            raise self._gone()
        return data

    async def write(self, data: bytes) -> None:
        """See core.contracts.ByteStream.write."""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise self._gone() from error

    async def write_eof(self) -> None:
        """See core.contracts.ByteStream.write_eof."""
        with contextlib.suppress(OSError):
            self._writer.write_eof()

    def _gone(self) -> UnavailableError | ConflictError:
        if self._is_dead():
            return ConflictError("the machine of the sandbox ended meanwhile", status="error")
        return UnavailableError("the connection to the agent of the sandbox broke")


class AgentLink:
    """The way to one machine's agent."""

    def __init__(self, dial: Dial, token: str) -> None:
        self._dial = dial
        self.token = token
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_dead = False

    def cut(self) -> None:
        """Break every connection off: the machine is dead, and its end of them says nothing."""
        self._is_dead = True
        for writer in list(self._writers):
            writer.transport.abort()

    async def ask(
        self,
        op: Op,
        args: Mapping[str, object] | None = None,
        *,
        limit_s: float,
        dial_s: float | None = None,
    ) -> Mapping[str, object]:
        """Carry out an operation that ends with its answer, and return that. See `open`."""
        async with self.open(op, args or {}, limit_s=limit_s, dial_s=dial_s) as opened:
            return opened.values

    @asynccontextmanager
    async def open(
        self,
        op: Op,
        args: Mapping[str, object],
        *,
        limit_s: float,
        dial_s: float | None = None,
    ) -> AsyncIterator[Opened]:
        """Open an operation; see core.contracts.NodeTunnel.open.

        `dial_s` is a tighter limit for the connection alone: to a guest that is still booting,
        asking anew is faster than waiting for TCP to.

        Raises:
            UnavailableError: the agent does not answer within the limit.
            ConflictError: the machine is dead.
            InvalidArgumentError: the agent refused; the message is its own.
            InternalError: the agent does not accept the token, or speaks another protocol.
        """
        async with contextlib.AsyncExitStack() as held:
            try:
                async with asyncio.timeout(limit_s):
                    connection = await self._dial(dial_s or limit_s)
                    reader, writer = await asyncio.open_connection(sock=connection, limit=_READ)
                    held.callback(writer.close)
                    self._writers.add(writer)
                    held.callback(self._writers.discard, writer)
                    writer.write(encode_request(Request(op, self.token, dict(args))))
                    await writer.drain()
                    decoder = Decoder()
                    answer = await _next_answer(reader, decoder)
            except WireError as error:
                raise InternalError(f"cannot understand the agent: {error}") from error
            except (OSError, TimeoutError, EOFError) as error:
                if self._is_dead:
                    raise ConflictError(
                        "the machine of the sandbox ended meanwhile", status="error"
                    ) from error
                raise UnavailableError("the agent of the sandbox does not answer") from error
            if answer.error == "unauthorized":
                raise InternalError("cannot use the agent: it does not accept the token")
            if answer.error is not None:
                raise InvalidArgumentError(answer.message or "the agent refused")
            stream = AgentStream(reader, writer, decoder.take_raw(), lambda: self._is_dead)
            yield Opened(values=answer.values, stream=stream)


async def _next_answer(reader: asyncio.StreamReader, decoder: Decoder) -> Answer:
    while (answer := decoder.take_answer()) is None:
        data = await reader.read(_READ)
        if not data:
            raise EOFError
        decoder.feed(data)
    return answer
