"""The control plane's side of the tunnel: a pool of connections, each carrying one operation at a
time."""

import asyncio
import logging
import ssl
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Self

from typing_extensions import override

from sandyard.server.core.codec import CodecError, encode
from sandyard.server.core.contracts.node import MachineRef, NodeTunnel, Opened
from sandyard.server.core.errors import NotFoundError, SandyardError, UnavailableError
from sandyard.server.core.ops import AnswerT, Operation, answer_of, request_of
from sandyard.server.links.tunnel.ends import name_of, watch_over
from sandyard.server.links.tunnel.exchange import TunnelExchange
from sandyard.server.links.tunnel.frames import (
    PIECE,
    VERSIONS,
    BrokenError,
    FrameKind,
    Line,
    head,
    refused,
    values_of,
)
from sandyard.server.tasks import Crew, concurrently

log = logging.getLogger(__name__)

_DIAL_S = 5.0
_ANSWER_S = 60.0
_LEAVE_S = 5.0
_AHEAD, _IDLE_MAX = 2, 16
_LEFT = "an operation could not be left in an orderly way"
_NOT_AHEAD = "no connection to a node is kept ready"


@dataclass(frozen=True)
class NodeAddress:
    """The address of a node, and the name in its certificate."""

    host: str
    port: int
    name: str


class Tunnels(NodeTunnel):
    """See core.contracts.node.NodeTunnel: to whichever node is meant. Use it as a block.

    `place_of` returns where a node is now, None if that is unknown.
    """

    def __init__(self, tls: ssl.SSLContext, place_of: Callable[[str], NodeAddress | None]) -> None:
        self._tls = tls
        self._place_of = place_of
        self._idle: defaultdict[NodeAddress, deque[Line]] = defaultdict(deque)
        self._crew = Crew()

    async def __aenter__(self) -> Self:
        await self._crew.__aenter__()
        return self

    async def __aexit__(self, *trouble: object) -> None:
        await self._crew.__aexit__(None, None, None)
        for lines in self._idle.values():
            for line in lines:
                line.hang_up()
        self._idle.clear()

    @asynccontextmanager
    @override
    async def open(
        self, machine: MachineRef, operation: Operation[AnswerT]
    ) -> AsyncIterator[Opened[AnswerT]]:
        place = self._place_of(machine.node_id)
        if place is None:
            raise NotFoundError("cannot do this: the sandbox's node is unknown")
        line = await self._line_to(place)
        is_left = False
        try:
            answer = await self._asked(line, machine, operation)
            exchange = TunnelExchange(line)
            try:
                async with concurrently(_heard(exchange)):
                    yield Opened(answer, exchange)
            finally:
                exchange.end()  # `run` does so, but where it was cancelled before it began
            is_left = True
        except SandyardError:
            is_left = line.is_open
            raise
        finally:
            if not is_left or not self._crew.start(self._left(place, line), _LEFT, quietly=True):
                line.hang_up()

    async def reach(self, node_id: str) -> None:
        """Return once a connection to a node is established; see `open`.

        Raises:
            UnavailableError: it does not answer, or is another node.
        """
        place = self._place_of(node_id)
        if place is None:
            raise UnavailableError("cannot reach the node: its address is unknown")
        self._keep(place, await self._dialled(place))

    async def _asked(
        self, line: Line, machine: MachineRef, operation: Operation[AnswerT]
    ) -> AnswerT:
        """Return a node's answer.

        Raises:
            SandyardError: the node refused.
            UnavailableError: it does not answer.
        """
        request = request_of(operation, "")
        asked = VERSIONS.head | {
            "machine": encode(machine), "op": request.op, "args": request.args,
        }  # fmt: skip
        try:
            async with asyncio.timeout(_ANSWER_S):
                await line.say(FrameKind.ASK, head(asked))
                frame = await line.hear()
            if frame.kind is FrameKind.REFUSE:
                raise refused(frame.payload)
            if frame.kind is not FrameKind.ANSWER:
                raise BrokenError("expected an answer")
            return answer_of(operation, values_of(frame.payload))
        except (BrokenError, CodecError, TimeoutError) as error:
            line.hang_up()
            raise UnavailableError("the node does not answer") from error

    # --- connections ------------------------------------------------------------------------

    async def _line_to(self, place: NodeAddress) -> Line:
        for other in [one for one in self._idle if one.name == place.name and one != place]:
            for line in self._idle.pop(other):  # the node was there before it moved
                line.hang_up()
        idle = self._idle[place]
        while idle:
            line = idle.pop()
            if line.is_open:
                self._keep_ahead(place)
                return line
            line.hang_up()
        line = await self._dialled(place)
        self._keep_ahead(place)
        return line

    async def _dialled(self, place: NodeAddress) -> Line:
        """Connect to a node.

        Raises:
            UnavailableError: it does not answer, or is another node.
        """
        try:
            async with asyncio.timeout(_DIAL_S):
                reader, writer = await asyncio.open_connection(
                    place.host, place.port, ssl=self._tls, limit=2 * PIECE
                )
        except (OSError, TimeoutError) as error:
            raise UnavailableError(
                f"cannot reach the node at {place.host}:{place.port}: {str(error) or 'no answer'}"
            ) from error
        line = Line(reader, writer)
        try:
            name = name_of(writer.get_extra_info("ssl_object"))
            if name != place.name:
                raise UnavailableError(
                    f"cannot use {place.host}:{place.port}: {name} is there, not {place.name}"
                )
            watch_over(writer)
        except BaseException:
            line.hang_up()
            raise
        return line

    def _keep_ahead(self, place: NodeAddress) -> None:
        """Keep one or two idle connections ready for the next operations."""
        if len(self._idle[place]) < _AHEAD:
            self._crew.start(self._ahead(place), _NOT_AHEAD, once=str(place), quietly=True)

    async def _ahead(self, place: NodeAddress) -> None:
        while len(self._idle[place]) < _AHEAD:
            self._keep(place, await self._dialled(place))

    def _keep(self, place: NodeAddress, line: Line) -> None:
        idle = self._idle[place]
        if self._crew.is_there and len(idle) < _IDLE_MAX and line.is_open:
            idle.append(line)
        else:
            line.hang_up()

    async def _left(self, place: NodeAddress, line: Line) -> None:
        """End an operation, and keep its connection for the next one."""
        try:
            with suppress(BrokenError, TimeoutError):
                async with asyncio.timeout(_LEAVE_S):
                    await line.say(FrameKind.LEAVE)
                    while (await line.hear()).kind is not FrameKind.LEAVE:
                        pass
                self._keep(place, line)
                return
            line.hang_up()
        except BaseException:
            line.hang_up()
            raise


async def _heard(exchange: TunnelExchange) -> None:
    """Receive bytes; when the connection ends, notify the reader."""
    with suppress(BrokenError):
        await exchange.run()
