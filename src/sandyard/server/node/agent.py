"""The connections to the agents. A connection carries one operation at a time, and every wait has a
limit.

The agent may be controlled by a hostile guest: core.wire limits its messages, and nothing here
trusts them.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

from typing_extensions import override

from sandyard.server.core.codec import CodecError, decode
from sandyard.server.core.collect import Collector
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import ByteStream, Opened
from sandyard.server.core.errors import (
    AgentError,
    ConflictError,
    InvalidArgumentError,
    OtherVersionError,
    UnavailableError,
    UnsupportedError,
)
from sandyard.server.core.ops import (
    AnswerT,
    Execute,
    FileEnd,
    Operation,
    answer_of,
    may_be_followed,
    request_of,
)
from sandyard.server.core.refusals import meaning_of
from sandyard.server.core.wire import (
    Answer,
    Channel,
    Decoder,
    LastFrame,
    Refusal,
    VersionError,
    WireError,
    encode_request,
    printable,
)

_READ = 128 * 1024
_GRACE_S = 5.0
_STILL_S = 60.0
_SPARE_S = 60.0  # well within the agent's limit for a first line
Dial = Callable[[float], Awaitable[socket.socket]]


class AgentStream(ByteStream):
    """See core.contracts.node.ByteStream. `last` receives what is read, if that matters."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        first: bytes,
        link: "AgentLink",
        last: LastFrame | None,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._first = first
        self._link = link
        self._last = last
        self.is_written = False

    @property
    def has_more(self) -> bool:
        """Whether received data has not been read yet."""
        return bool(self._first)

    @override
    async def read(self, limit: int) -> bytes:
        data = await self._read(limit)
        if self._last is not None:  # of an operation that ends with a frame
            self._last.feed(data)
        return data

    async def _read(self, limit: int) -> bytes:
        if self._first:
            data, self._first = self._first[:limit], self._first[limit:]
            return data
        try:
            data = await self._reader.read(limit)
        except OSError as error:
            raise self._gone() from error
        if not data and self._link.end is not None:
            raise self._gone()
        return data

    @override
    async def write(self, data: bytes) -> None:
        self.is_written = True
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise self._gone() from error

    @override
    async def write_eof(self) -> None:
        self.is_written = True
        with contextlib.suppress(OSError):
            self._writer.write_eof()

    def _gone(self) -> UnavailableError | ConflictError:
        return self._link.end or UnavailableError(
            "the connection to the agent of the sandbox broke"
        )


class AgentLink:
    """The connections to one machine's agent."""

    def __init__(self, dial: Dial, token: str, clock: Clock) -> None:
        self._dial = dial
        self._clock = clock
        self._token = token
        self._spare: tuple[asyncio.StreamReader, asyncio.StreamWriter, float] | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._end: ConflictError | None = None
        self._is_closed = False

    @property
    def end(self) -> ConflictError | None:
        """The error for users of the link after `cut`, a new one each time."""
        end = self._end
        return None if end is None else type(end)(end.text, **end.facts)

    def use_token(self, token: str) -> None:
        """Use this token from now on: the agent has accepted it as its new one."""
        self._token = token

    def cut(self, end: ConflictError) -> None:
        """Close all connections because the machine no longer exists; `end` says why."""
        if self._end is None:
            self._end = end
        self._spare = None
        for writer in list(self._writers):
            writer.transport.abort()

    async def open_spare(self, limit_s: float) -> None:
        """Open a connection for the next operation; does nothing if that fails."""
        if self.lacks_spare:
            with contextlib.suppress(OSError, TimeoutError):
                async with self._clock.timeout(limit_s):
                    reader, writer = await self._connected(limit_s)
                self._keep(reader, writer)

    @property
    def lacks_spare(self) -> bool:
        """Whether there is no spare connection although one could be opened."""
        return self._spare is None and self._end is None and not self._is_closed

    def close(self) -> None:
        """Close the spare connection, and keep none from now on."""
        self._is_closed = True
        if self._spare is not None:
            self._forget(self._spare[1])
            self._spare = None

    async def _connected(self, dial_s: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        connection = await self._dial(dial_s)
        reader, writer = await asyncio.open_connection(sock=connection, limit=_READ)
        self._writers.add(writer)
        return reader, writer

    def _keep(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Keep a connection that is free again for the next operation."""
        if self.lacks_spare and not reader.at_eof() and not writer.is_closing():
            self._spare = (reader, writer, self._clock.monotonic())
        else:
            self._forget(writer)

    def _forget(self, writer: asyncio.StreamWriter) -> None:
        self._writers.discard(writer)
        writer.close()

    async def _taken(self, dial_s: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return the spare connection if it is still usable, else a new one."""
        spare, self._spare = self._spare, None
        if spare is not None:
            reader, writer, made_at = spare
            is_fresh = self._clock.monotonic() - made_at < _SPARE_S
            if is_fresh and not reader.at_eof() and not writer.is_closing():
                return reader, writer
            self._forget(writer)
        return await self._connected(dial_s)

    async def ask(
        self, operation: Operation[AnswerT], *, limit_s: float, dial_s: float | None = None
    ) -> AnswerT:
        """Run an operation that ends with its answer, and return the answer. See `open`."""
        async with self.open(operation, limit_s=limit_s, dial_s=dial_s) as opened:
            return opened.answer

    @asynccontextmanager
    async def open(
        self, operation: Operation[AnswerT], *, limit_s: float, dial_s: float | None = None
    ) -> AsyncIterator[Opened[AnswerT]]:
        """Open an operation; see core.contracts.node.NodeTunnel.open.

        `dial_s` is a tighter limit for the connection alone: to a guest that is still booting,
        connecting again is faster than TCP's retransmission.

        Raises:
            UnavailableError: the agent does not answer within the limit.
            ConflictError: the machine is dead.
            InvalidArgumentError: the agent refused; the message is its own.
            NotFoundError: what was asked of is not in the machine.
            UnsupportedError: the agent does not know the operation, or is too old or too new.
            AgentError: the agent does not accept the token, or violates the protocol.
        """
        again = may_be_followed(operation)
        async with contextlib.AsyncExitStack() as held:
            try:
                async with self._clock.timeout(limit_s):
                    reader, writer = await self._taken(dial_s or limit_s)
                    held.callback(self._forget, writer)
                    request = request_of(operation, self._token, again=again)
                    writer.write(encode_request(request))
                    await writer.drain()
                    decoder = Decoder()
                    reply = await _next_answer(reader, decoder)
                _refuse(reply, is_for_user=operation.asked_by_users)
                answer = answer_of(operation, reply.values)
            except VersionError as error:
                raise OtherVersionError(
                    f"cannot use the agent of the sandbox, which is of another version: {error}"
                ) from error
            except (WireError, CodecError) as error:
                raise AgentError from error
            except (OSError, TimeoutError, EOFError) as error:
                if self.end is not None:
                    raise self.end from error
                raise UnavailableError("the agent of the sandbox does not answer") from error
            last = LastFrame() if isinstance(operation, Execute) else None
            stream = AgentStream(reader, writer, decoder.take_raw(), self, last)
            yield Opened(answer, stream)
            is_over = last is None or last.is_whole
            if again and reply.again and is_over and not stream.has_more and not stream.is_written:
                held.pop_all()
                self._keep(reader, writer)


async def content_of(stream: ByteStream, clock: Clock) -> AsyncIterator[bytes]:
    """Yield the content of a file after `core.ops.Read` was accepted.

    Raises:
        SandyardError: it could not be read completely; see `core.refusals`.
        UnavailableError, ConflictError: the agent is silent, or the machine ended.
        AgentError: the agent violated the protocol.
    """
    decoder = Decoder()
    while True:
        try:
            async with clock.timeout(_STILL_S):
                data = await stream.read(_READ)
            decoder.feed(data or _broken_off())
            while (frame := decoder.take_frame()) is not None:
                if frame.channel is Channel.EXIT:
                    end = decode(FileEnd, json.loads(frame.payload))
                    if end.trouble is not None:
                        raise meaning_of(end.trouble.error, printable(end.trouble.message[:600]))
                    return
                if frame.payload:
                    yield frame.payload
        except TimeoutError as error:
            raise UnavailableError("the agent of the sandbox stopped responding") from error
        except (WireError, CodecError, ValueError, RecursionError) as error:
            raise AgentError from error


async def run_command(
    link: AgentLink,
    command: str,
    *,
    limit_s: float,
    clock: Clock,
    user: str = "root",
    cwd: str = "/",
    env: Mapping[str, str] | None = None,
) -> int:
    """Run a command in a machine, discard its output, and return its exit code.

    Raises: see `AgentLink.open`; UnavailableError also if it does not end within the limit.
    """
    collector = Collector()
    wish = Execute(command, int(limit_s * 1000), cwd=cwd, env=env or {}, user=user)
    try:
        async with (
            clock.timeout(limit_s + _GRACE_S),
            link.open(wish, limit_s=limit_s) as opened,
        ):
            while (end := collector.feed(await opened.stream.read(_READ) or _broken_off())) is None:
                pass
            return end.exit_code
    except TimeoutError as error:
        raise UnavailableError("the agent does not tell how a command ended") from error
    except WireError as error:
        raise AgentError from error


def _broken_off() -> bytes:
    raise UnavailableError("the agent broke off in the middle of a command")


def _refuse(answer: Answer, *, is_for_user: bool) -> None:
    """Raise the error for an agent's refusal.

    Its text is used only for requests of users (`is_for_user`): a guest must not influence its
    node's own operations.
    """
    match answer.error:
        case None:
            return
        case Refusal.UNAUTHORIZED:
            raise AgentError(
                "cannot use the agent of the sandbox: it does not accept its token; restart it"
            )
        case Refusal.UNSUPPORTED:
            raise UnsupportedError(answer.message or "the agent does not know the operation")
        case Refusal.BUSY:
            raise meaning_of(answer.error, answer.message if is_for_user else "")
        case _ if is_for_user:
            raise meaning_of(answer.error, answer.message)
        case _:
            raise InvalidArgumentError(answer.message or "the agent refused")


async def _next_answer(reader: asyncio.StreamReader, decoder: Decoder) -> Answer:
    while (answer := decoder.take_answer()) is None:
        data = await reader.read(_READ)
        if not data:
            raise EOFError
        decoder.feed(data)
    return answer
