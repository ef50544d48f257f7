"""A request to a guest and its answer, in HTTP/1.1 as h11 speaks it: nothing of it is believed."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import h11
from starlette.types import Receive

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import ByteStream
from sandyard.server.core.errors import SandyardError
from sandyard.server.front.relay import PIECE
from sandyard.server.tasks import Pacer

_HEAD_MAX = 64 * 1024
_STILL_S = 120.0
_STATUSES = range(200, 600)
_EVENTS_A_SECOND, _EVENTS_BURST, _TURN = 20_000, 5_000, 500


REQUEST_TRAILERS = "sandyard.trailers"
"""The extension of a scope that is the list of a request's trailers, complete with its body."""


class GoneError(Exception):
    """The client has left."""


class HungUpError(Exception):
    """The guest closed the connection before it had answered."""


class BrokenOffError(Exception):
    """An answer that has begun cannot go on: the client's connection is to be reset."""


class Exchange:
    """One request and its answer, on a connection to a guest."""

    def __init__(self, there: ByteStream, clock: Clock) -> None:
        self.there = there
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_MAX)
        self._has_spoken = False
        self.trailers: list[tuple[bytes, bytes]] = []
        """What came after the body, once that was read."""
        self._pacer = Pacer(clock, per_second=_EVENTS_A_SECOND, burst=_EVENTS_BURST, turn=_TURN)
        self._clock = clock

    def send(self, event: Any) -> bytes:
        """Return the bytes of a part of the request."""
        return self._h11.send(event) or b""

    def piece(
        self, data: bytes, *, is_last: bool, trailers: Iterable[tuple[bytes, bytes]] = ()
    ) -> bytes:
        """Return the bytes of a piece of the request's body, and of trailers after the last.

        Raises:
            h11.LocalProtocolError: the answer is complete, and nothing more is taken.
        """
        found = self.send(h11.Data(data)) if data else b""
        return found + self.send(h11.EndOfMessage(headers=[*trailers])) if is_last else found

    def rest(self) -> tuple[bytes, bool]:
        """Return what came behind the head that changed the protocol."""
        return self._h11.trailing_data

    async def response(self) -> h11.Response | h11.InformationalResponse:
        """Return the head of the answer, or of the change to another protocol.

        Raises:
            HungUpError: it closed the connection instead.
            h11.RemoteProtocolError: what the guest says is no HTTP.
        """
        try:
            response: h11.Response = await self._response(or_continue=False)
        except h11.RemoteProtocolError as error:
            if not self._has_spoken:
                raise HungUpError from error
            raise
        return response

    async def early_response(self, limit_s: float) -> h11.Response | None:
        """Return the guest's answer to the head alone of a request that waits to be told to go on;
        None if it is, or if the guest says nothing to that.

        Raises: see `response`.
        """
        try:
            async with self._clock.timeout(limit_s):
                found = await self._response(or_continue=True)
        except TimeoutError:
            return None
        except h11.RemoteProtocolError as error:
            if not self._has_spoken:
                raise HungUpError from error
            raise
        return None if isinstance(found, h11.InformationalResponse) else found

    async def _response(self, *, or_continue: bool) -> Any:
        while True:
            event = await self._next()
            if isinstance(event, h11.Response):
                if event.status_code not in _STATUSES:
                    raise h11.RemoteProtocolError("it answered with a status that there is not")
                return event
            if isinstance(event, h11.InformationalResponse) and (
                event.status_code == 101 or (or_continue and event.status_code == 100)
            ):
                return event
            if isinstance(event, h11.ConnectionClosed):
                raise h11.RemoteProtocolError("it hung up without an answer")

    async def body(self) -> AsyncIterator[bytes]:
        """Yield the body of the answer as it comes."""
        while True:
            event = await self._next()
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                if isinstance(event, h11.EndOfMessage):
                    self.trailers = [(bytes(name), bytes(value)) for name, value in event.headers]
                return

    async def _next(self) -> Any:
        while (event := self._h11.next_event()) is h11.NEED_DATA:
            data = await self.there.read(PIECE)
            self._has_spoken = self._has_spoken or bool(data)
            self._h11.receive_data(data)
        if event is h11.PAUSED:  # it would say so again and again
            raise h11.RemoteProtocolError("it changed the protocol unasked")
        await self._pacer.step()
        return event


async def until_gone(receive: Receive) -> None:
    """Take what a client sends for nobody, until it leaves.

    Raises:
        GoneError: it has.
    """
    while (await receive())["type"] != "http.disconnect":
        pass
    raise GoneError


async def send_body(
    receive: Receive,
    exchange: Exchange,
    clock: Clock,
    *,
    has_body: bool,
    trailers: Callable[[], Iterable[tuple[bytes, bytes]]],
    sent: asyncio.Event,
) -> None:
    """Send the body of a request as it comes, and tell when the client leaves.

    `trailers` are asked for once all of the body has come. `sent` is set once all of it that will
    be is on its way: from then on an answer is due.

    Raises:
        GoneError: it has.
    """
    while True:
        if not has_body:
            sent.set()
        message = await receive()
        if message["type"] == "http.disconnect":
            raise GoneError
        if has_body:
            is_more = bool(message.get("more_body"))
            try:
                data = exchange.piece(
                    message.get("body") or b"",
                    is_last=not is_more,
                    trailers=() if is_more else trailers(),
                )
                # One that does not read on is not waited for for ever: meanwhile nobody would hear
                # that the client has left.
                async with clock.timeout(_STILL_S):
                    await exchange.there.write(data)
            except (h11.LocalProtocolError, SandyardError):
                is_more = False  # it wants no more of it; what it says to that still comes
            has_body = is_more
