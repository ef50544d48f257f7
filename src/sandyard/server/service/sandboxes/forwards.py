"""Forwarded connections: into a sandbox, and accepted by a sandbox."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import ByteStream
from sandyard.server.core.errors import (
    AgentError,
)
from sandyard.server.core.ops import Caller, Dial, Listen, Listening, Take
from sandyard.server.core.wire import Channel, printable
from sandyard.server.service.actor import Actor
from sandyard.server.service.sandboxes.frames import decoded, frames_of
from sandyard.server.service.sandboxes.reach import GuestStream, Reach
from sandyard.server.service.sandboxes.uses import Use

_PORTS = range(65536)
_HOST_MAX = 255
_SILENT_S = 400 * 86_400.0
_LISTEN = Use("ssh", "", "listen in", is_in_feed=False)


class Forwards:
    """Connects and listens in sandboxes."""

    def __init__(self, reach: Reach, clock: Clock) -> None:
        self._reach = reach
        self._clock = clock

    @asynccontextmanager
    async def dial(
        self, actor: Actor, sandbox_id: str, wish: Dial, use: Use
    ) -> AsyncIterator[ByteStream]:
        """Connect from a sandbox to an address.

        Raises:
            NotFoundError: nothing answers there.
            For the rest see `Reach.open`.
        """
        async with self._reach.open(actor, sandbox_id, wish, use) as reached:
            yield reached.stream

    @asynccontextmanager
    async def listen(
        self, actor: Actor, sandbox_id: str, wish: Listen
    ) -> AsyncIterator[tuple[Listening, AsyncIterator[Caller]]]:
        """Listen in a sandbox; yield the address and the accepted connections.

        Raises:
            ConflictError: it cannot listen there.
            For the rest see `Reach.open`.
        """
        async with self._reach.open(actor, sandbox_id, wish, _LISTEN) as reached:
            where = reached.answer
            if where.port not in _PORTS:
                raise AgentError()
            yield replace(where, path=printable(where.path)), self._callers(reached.stream)

    async def _callers(self, stream: GuestStream) -> AsyncIterator[Caller]:
        async for frame in frames_of(stream, self._clock, still_s=_SILENT_S):
            if frame.channel is Channel.STDOUT:
                caller = decoded(Caller, frame)
                if caller.port not in _PORTS:
                    raise AgentError()
                yield replace(caller, host=printable(caller.host[:_HOST_MAX]))

    @asynccontextmanager
    async def take(
        self, actor: Actor, sandbox_id: str, wish: Take, use: Use
    ) -> AsyncIterator[ByteStream]:
        """Open a connection that a sandbox accepted. See `dial`."""
        async with self._reach.open(actor, sandbox_id, wish, use) as reached:
            yield reached.stream
