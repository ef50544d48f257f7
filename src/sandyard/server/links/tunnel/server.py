"""The node's side of the tunnel: opens operations for control planes and carries their bytes."""

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from sandyard.server.core import copies, ops
from sandyard.server.core.codec import CodecError, decode, encode
from sandyard.server.core.contracts.node import MachineRef, NodeTunnel, Opened
from sandyard.server.core.errors import (
    InternalError,
    InvalidArgumentError,
    OtherVersionError,
    SandyardError,
)
from sandyard.server.core.wire import VersionError, WireError
from sandyard.server.links.tunnel.ends import name_of, watch_over
from sandyard.server.links.tunnel.exchange import TunnelExchange
from sandyard.server.links.tunnel.frames import (
    PIECE,
    VERSIONS,
    BrokenError,
    FrameKind,
    Line,
    head,
    refusal,
    values_of,
)
from sandyard.server.links.tunnel.handshakes import Handshakes
from sandyard.server.tasks import Crew, concurrently

log = logging.getLogger(__name__)

_FIRST_S = 20.0
_LIMIT = 2 * PIECE


@dataclass(frozen=True)
class TunnelRequest:
    """A request of a control plane."""

    machine: MachineRef
    operation: ops.Operation[Any]


@asynccontextmanager
async def serving(
    tunnel: NodeTunnel,
    *,
    address: str,
    port: int,
    tls: ssl.SSLContext,
    may: Callable[[str], bool],
    most: int = 1000,
) -> AsyncIterator[int]:
    """Serve a node's machines to control planes, and yield the port; all connections are closed at
    the end.

    `may` tells whether a peer with a name (see `ends.name_of`) has access; other peers are
    disconnected. At most `most` connections are served at the same time.
    """
    lines: set[Line] = set()
    async with Crew() as crew:

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            line = Line(reader, writer)
            if len(lines) >= most or not _may(writer, may):
                line.hang_up()
                return
            lines.add(line)
            try:
                watch_over(writer)
                with suppress(BrokenError):
                    while True:
                        await _one(tunnel, line)
            finally:
                lines.discard(line)
                line.hang_up()

        def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if crew.start(serve(reader, writer), "a connection of the tunnel failed") is None:
                writer.transport.abort()

        handshakes = Handshakes(tls, limit_s=_FIRST_S)
        server = await handshakes.streams(take, address, port, limit=_LIMIT)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            handshakes.close()
            for line in lines:
                line.hang_up()


def _may(writer: asyncio.StreamWriter, may: Callable[[str], bool]) -> bool:
    tls = writer.get_extra_info("ssl_object")
    peer = writer.get_extra_info("peername")
    try:
        name = name_of(tls)
    except SandyardError as error:
        log.warning("disconnected %s: %s", peer, error.message)
        return False
    if not may(name):
        log.warning("disconnected %s: %s may not use this tunnel", peer, name)
        return False
    return True


async def _one(tunnel: NodeTunnel, line: Line) -> None:
    """Serve one operation to its end.

    Raises:
        BrokenError: the connection cannot be used any more.
    """
    asked = await line.hear()
    if asked.kind is not FrameKind.ASK:
        raise BrokenError("the request is empty")
    is_left = False
    try:
        ask = _asked(asked.payload)
        async with tunnel.open(ask.machine, ask.operation) as opened:
            await line.say(FrameKind.ANSWER, head(encode(opened.answer)))
            exchange = TunnelExchange(line)
            # It ends when the control plane leaves, whatever is left to send.
            async with concurrently(_carry(opened, exchange)):
                await exchange.run()
                is_left = True
    except BrokenError:
        raise
    except Exception as error:  # answered as an error; other requests continue
        failure = error
        if not isinstance(failure, SandyardError):
            log.exception("unexpected error in an operation of the tunnel")
            failure = InternalError(f"cannot carry out the request: {error}")
        if not is_left:
            await line.say(FrameKind.REFUSE, refusal(failure))
            await _until_left(line)
    await line.say(FrameKind.LEAVE)


def _asked(payload: bytes) -> TunnelRequest:
    """Return the request.

    Raises:
        InvalidArgumentError: it is malformed.
        OtherVersionError: it is of a version, or an operation, that this node does not know.
    """
    values = values_of(payload)
    try:
        VERSIONS.check(values)
        return TunnelRequest(
            decode(MachineRef, values.get("machine")),
            copies.operation_of(str(values.get("op")), values.get("args") or {}),
        )
    except (VersionError, ops.UnknownOperationError) as error:
        raise OtherVersionError(
            f"cannot do this on the sandbox's node, which has another version: {error}"
        ) from error
    except (CodecError, WireError) as error:
        raise InvalidArgumentError(f"cannot read the request: {error}") from error


async def _until_left(line: Line) -> None:
    while (await line.hear()).kind is not FrameKind.LEAVE:
        pass


async def _carry(opened: Opened[Any], exchange: TunnelExchange) -> None:
    """Carry bytes in both directions until both have ended, or report an error to the other
    side."""

    async def up() -> None:
        while data := await exchange.read(PIECE):
            await opened.stream.write(data)
        await opened.stream.write_eof()

    async def down() -> None:
        while data := await opened.stream.read(PIECE):
            await exchange.write(data)
        await exchange.write_eof()

    async def reporting_errors(carry: Callable[[], Coroutine[object, object, None]]) -> None:
        try:
            await carry()
        except SandyardError as error:
            with suppress(SandyardError):
                await exchange.refuse(error)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(reporting_errors(up))
        tasks.create_task(reporting_errors(down))
