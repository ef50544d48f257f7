"""HTTP/1.1 between a guest and the hosts that its rules name: each request is judged by its Host.

Both ends are separate conversations (h11): what is ambiguous in one, such as a message with two
lengths, is refused or never repeated in the other.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import h11

from sandyard.server.core.egress import plain_name
from sandyard.server.egress.dial import DialError
from sandyard.server.egress.streams import Counter, Stream, linger, splice
from sandyard.server.tasks import concurrently

_HEADERS_S = 30.0
_IDLE_S = 900.0
"""How long nothing may pass, either way, before a request is given up: some answers take long."""
_KEPT_S = 1.0
"""How long an idle connection to a host is kept. Many hosts close theirs after 2 to 5 s, and a
request that meets the end is lost."""
_HEADERS_MAX = 64 * 1024
_HOST_MAX = 260
_REFUSED_METHODS = frozenset({b"CONNECT", b"TRACE", b"TRACK", b"PRI"})
_REASONS = {400: b"Bad Request", 403: b"Forbidden", 405: b"Method Not Allowed",
            421: b"Misdirected Request", 502: b"Bad Gateway"}  # fmt: skip
Headers = Sequence[tuple[bytes, bytes]]


class RefusedError(Exception):
    """A request that is answered here, with a status and a sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class Upstream:
    """A connection to one host, and its account."""

    def __init__(self, stream: Stream, counter: Counter) -> None:
        self.stream = stream
        self.counter = counter
        self.idle_since = 0.0

    def close(self) -> None:
        """Close it."""
        self.stream.connection.close()


Reach = Callable[[str], Awaitable[Upstream]]
"""Returns a connection to a host that may be reached; raises RefusedError or DialError."""
Adapt = Callable[[Headers], Headers]
"""Returns the headers that a host gets instead of a guest's; raises RefusedError."""


def unchanged(headers: Headers) -> Headers:
    """Return the guest's own headers; see Adapt."""
    return headers


class _Peer:
    """One end of a conversation."""

    def __init__(
        self,
        stream: Stream,
        role: type[h11.CLIENT] | type[h11.SERVER],
        first: bytes = b"",
    ) -> None:
        self.stream = stream
        self.speech = h11.Connection(role, max_incomplete_event_size=_HEADERS_MAX)
        self.received = 0
        self.sent = 0
        self.on_progress: Callable[[], None] = lambda: None
        if first:
            self._take(first)

    def _take(self, data: bytes) -> None:
        self.received += len(data)
        self.speech.receive_data(data)

    async def hear(self) -> object:
        """Return the next event.

        Raises:
            h11.RemoteProtocolError, OSError: there is none.
        """
        # One piece can have thousands of them, and others have their turn between.
        await asyncio.sleep(0)
        while (event := self.speech.next_event()) is h11.NEED_DATA:
            if self.speech.they_are_waiting_for_100_continue:
                # The other host is not asked first whether it wants the body.
                await self.say(h11.InformationalResponse(status_code=100, headers=[]))
            self._take(await self.stream.receive())
            self.on_progress()
        return event

    async def say(self, event: h11.Event) -> None:
        """Send an event."""
        data = self.speech.send(event)
        if data:
            self.sent += len(data)
            await self.stream.send(data)
            self.on_progress()


async def converse(
    guest: Stream, first: bytes, port: int, reach: Reach, adapt: Adapt = unchanged
) -> None:
    """Pass a guest's requests on until its connection ends; `first` was received before.

    Raises:
        OSError, TimeoutError: a connection broke or stood still.
    """
    peer = _Peer(guest, h11.SERVER, first)
    upstream: tuple[str, Upstream, _Peer] | None = None
    now = asyncio.get_running_loop().time
    try:
        while True:
            try:
                request = await _request_of(peer)
                if request is None:
                    return
                host = _host_of(request, port)
                if (
                    upstream is None
                    or upstream[0] != host
                    or now() - upstream[1].idle_since > _KEPT_S
                    or _has_ended(upstream[1])
                ):
                    if upstream is not None:
                        upstream[1].close()
                        upstream = None
                    reached = await reach(host)
                    upstream = (host, reached, _Peer(reached.stream, h11.CLIENT))
                headers = adapt(_passed_on(request))
            except h11.RemoteProtocolError as error:
                raise RefusedError(400, f"the request is malformed: {error}") from error
            except DialError as error:
                raise RefusedError(502, f"cannot reach the host: {error}") from error
            _, reached, other = upstream
            try:
                goes_on = await _exchange(peer, other, request, headers)
            finally:
                reached.counter.out, reached.counter.into = other.sent, other.received
                reached.idle_since = now()
            if not goes_on:
                await linger(guest)
                return
            if other.speech.our_state is h11.DONE and other.speech.their_state is h11.DONE:
                other.speech.start_next_cycle()
            else:
                reached.close()
                upstream = None
            peer.speech.start_next_cycle()
    except RefusedError as error:
        await _refuse(peer, error)
    except h11.ProtocolError:
        return
    finally:
        if upstream is not None:
            upstream[1].close()


async def _request_of(guest: _Peer) -> h11.Request | None:
    """Return the next request, or None if there is none."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_HEADERS_S):
            event = await guest.hear()
            return event if isinstance(event, h11.Request) else None
    return None


def _has_ended(upstream: Upstream) -> bool:
    """Tell whether an idle connection is closed, or has unexpected data."""
    try:
        upstream.stream.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _host_of(request: h11.Request, port: int) -> str:
    """Return the host that a request is for, in its plain form.

    Raises:
        RefusedError: it has none, or more than one could be meant.
    """
    if request.method.upper() in _REFUSED_METHODS:
        raise RefusedError(405, "this method is not passed on")
    if not (request.target.startswith(b"/") or request.target == b"*"):
        raise RefusedError(400, "the target of a request is a path here")
    # h11 limits the headers that are incomplete, and these may have come in one piece.
    if sum(len(name) + len(value) for name, value in request.headers) > _HEADERS_MAX:
        raise RefusedError(400, "the headers of the request are too long")
    names = [name for name, _ in request.headers]
    if b"content-length" in names and b"transfer-encoding" in names:
        raise RefusedError(400, "the request has two lengths")
    hosts = [value for name, value in request.headers if name == b"host"]
    if len(hosts) != 1:
        raise RefusedError(400, "the request names no host")
    host = hosts[0].decode("latin-1")
    if not host.isascii():
        raise RefusedError(400, "the Host of the request is not ASCII")
    text = host.removesuffix(f":{port}")
    # What is no name is refused like a name that no rule has.
    return plain_name(text) or text[:_HOST_MAX]


def _passed_on(request: h11.Request) -> Headers:
    return [
        (name, value)
        for name, value in request.headers.raw_items()
        if not _leads_to_http2(name.lower(), value)
    ]


async def _exchange(guest: _Peer, host: _Peer, request: h11.Request, headers: Headers) -> bool:
    """Pass one request on, and its response back; tell whether the guest may send another."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_IDLE_S) as limit:

            def go_on() -> None:
                with suppress(RuntimeError):  # it has just expired
                    limit.reschedule(loop.time() + _IDLE_S)

            guest.on_progress = host.on_progress = go_on
            await host.say(
                h11.Request(method=request.method, target=request.target, headers=list(headers))
            )
            async with concurrently(_send_body(guest, host)):
                switched = await _send_response(host, guest)
    except h11.RemoteProtocolError as error:
        if guest.speech.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            is_its = guest.speech.their_state is h11.ERROR
            status, whose = (400, "the request") if is_its else (502, "the host's response")
            raise RefusedError(status, f"{whose} is malformed: {error}") from error
        raise
    except OSError as error:
        if guest.speech.our_state is h11.SEND_RESPONSE:
            raise RefusedError(502, "the connection to the host broke, or stood still") from error
        raise
    finally:
        guest.on_progress = host.on_progress = lambda: None
    if switched:
        for data, target in ((guest, host), (host, guest)):
            rest = data.speech.trailing_data[0]
            if rest:
                await target.stream.send(rest)
        passed = Counter()
        try:
            await splice(guest.stream, host.stream, passed)
        finally:
            host.sent += passed.out
            host.received += passed.into
        return False
    return (guest.speech.our_state, guest.speech.their_state) == (h11.DONE, h11.DONE)


def _leads_to_http2(name: bytes, value: bytes) -> bool:
    """Tell whether a header asks for HTTP/2 (RFC 7540, 3.2), whose requests are not read here."""
    return name == b"http2-settings" or (name == b"upgrade" and b"h2c" in value.lower())


async def _send_body(guest: _Peer, host: _Peer) -> None:
    while isinstance(event := await guest.hear(), h11.Data | h11.EndOfMessage):
        with suppress(OSError):  # it reads no more, and its response tells why
            # Without trailers: headers that a host is given are not set anew there.
            await host.say(event if isinstance(event, h11.Data) else h11.EndOfMessage())
        if isinstance(event, h11.EndOfMessage):
            return


async def _send_response(host: _Peer, guest: _Peer) -> bool:
    """Pass a response back; tell whether it changes the protocol."""
    while True:
        event = await host.hear()
        if isinstance(event, h11.InformationalResponse | h11.Response):
            # Rebuilt, because the host may use HTTP/1.0.
            await guest.say(
                type(event)(
                    status_code=event.status_code,
                    reason=event.reason,
                    headers=event.headers.raw_items(),
                )
            )
        elif isinstance(event, h11.Data | h11.EndOfMessage):
            await guest.say(event)
        if isinstance(event, h11.InformationalResponse) and event.status_code == 101:
            return True
        if isinstance(event, h11.EndOfMessage):
            return False
        if event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
            raise RefusedError(502, "the host ended the connection")


async def _refuse(guest: _Peer, error: RefusedError) -> None:
    """Answer a request here, if that is still possible."""
    text = f"Sandyard: {error.text}\n".encode()
    with suppress(OSError, TimeoutError, h11.ProtocolError):
        async with asyncio.timeout(_HEADERS_S):
            await guest.say(
                h11.Response(
                    status_code=error.status,
                    reason=_REASONS.get(error.status, b""),
                    headers=[
                        ("Content-Type", "text/plain; charset=utf-8"),
                        ("Content-Length", str(len(text))), ("Connection", "close"),
                    ],
                )
            )  # fmt: skip
            await guest.say(h11.Data(data=text))
            await guest.say(h11.EndOfMessage())
            await linger(guest.stream)
