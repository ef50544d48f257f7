"""A request to a guest and its answer, in HTTP/1.1 by h11. The guest is not trusted."""

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
    """The client has disconnected."""


class HungUpError(Exception):
    """The guest closed the connection before it answered."""


class BrokenOffError(Exception):
    """An answer in progress cannot continue; end the client's connection, if it `resets` by a
    reset."""

    def __init__(self, *, resets: bool = False) -> None:
        super().__init__("an answer cannot continue")
        self.resets = resets


class GuestExchange:
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
            h11.LocalProtocolError: the answer is complete, and no more is accepted.
        """
        found = self.send(h11.Data(data)) if data else b""
        return found + self.send(h11.EndOfMessage(headers=[*trailers])) if is_last else found

    def rest(self) -> tuple[bytes, bool]:
        """Return the bytes that followed the head of a protocol switch."""
        return self._h11.trailing_data

    async def response(self) -> h11.Response | h11.InformationalResponse:
        """Return the head of the answer, or of the switch to another protocol.

        Raises:
            HungUpError: the guest closed the connection instead.
            h11.RemoteProtocolError: the guest does not speak HTTP.
        """
        try:
            response: h11.Response = await self._response(or_continue=False)
        except h11.RemoteProtocolError as error:
            if not self._has_spoken:
                raise HungUpError from error
            raise
        return response

    async def early_response(self, limit_s: float) -> h11.Response | None:
        """Return the guest's answer to the head of a request with `Expect: 100-continue`. Return
        None if it asks for the body, or is silent for `limit_s`.

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
        """Yield the answer's body as it arrives."""
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
    """Discard what a client sends until it disconnects.

    Raises:
        GoneError: it has disconnected.
    """
    while (await receive())["type"] != "http.disconnect":
        pass
    raise GoneError


async def send_body(
    receive: Receive,
    exchange: GuestExchange,
    clock: Clock,
    *,
    has_body: bool,
    trailers: Callable[[], Iterable[tuple[bytes, bytes]]],
    sent: asyncio.Event,
) -> None:
    """Send a request's body as it arrives, and notice when the client disconnects.

    `trailers` is called once the whole body has arrived. `sent` is set once no more of the request
    will be sent: from then on the answer is due.

    Raises:
        GoneError: the client has disconnected.
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
                # The wait for a guest that does not read is limited: meanwhile nothing notices
                # that the client has disconnected.
                async with clock.timeout(_STILL_S):
                    await exchange.there.write(data)
            except (h11.LocalProtocolError, SandyardError):
                is_more = False  # it wants no more of it; what it says to that still comes
            has_body = is_more
