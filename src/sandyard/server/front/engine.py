"""HTTP connections with limits: how many, how long a head may take, how slow a peer may be.

uvicorn keeps connections that this module closes: a client that never finishes a head, sends a body
byte by byte, or never reads its answer holds a connection for seconds. There are always fewer
connections than file descriptors, since the platform needs some for itself.
"""

import asyncio
import json
import logging
import re
import socket
import struct
import time
import urllib.parse
from asyncio.events import TimerHandle
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import httptools
from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from sandyard.server.core.contracts.node import ByteStream
from sandyard.server.core.errors import InternalError, SandyardError, UnavailableError
from sandyard.server.core.ids import new_request_id
from sandyard.server.core.sources import BySource, source_of
from sandyard.server.front.answer import TUNNEL
from sandyard.server.front.exchange import REQUEST_TRAILERS, BrokenOffError

log = logging.getLogger(__name__)

LINE_MAX = 16 * 1024
HEAD_MAX = 64 * 1024
HEADERS_MAX = 200
_SLOWEST = 1024  # bytes a second, in a body that comes
_SLOWEST_READER = 16 * 1024
_BODY_S, _SLOWEST_BODY = 60.0, 4096  # the whole of a body, on average
_PIPELINE_MAX = 8
_LINGERING_MAX = 64
_RESERVE = 8  # one in so many is for sources that are known
_KNOWN_S, _KNOWN_MAX = 3600.0, 10_000
_SLICE = 16 * 1024
_LINGER_S, _LINGER_MAX_S, _SLOWEST_LINGERER = 1.0, 20.0, 256 * 1024
_UNACKNOWLEDGED_S = 60.0
_RESET = struct.pack("ii", 1, 0)  # socket(7): on close, what is unsent is dropped
_PONGS_MAX = 512  # 127 bytes each, at most
_SOCKET_HEADERS_MAX, _SOCKET_LINE_MAX = 120, 8000  # what the library takes, and some less
_TUNNEL_MAX = 256 * 1024
_LEFTOVER_MAX = 256 * 1024 * 1024  # of a body whose answer was given before it was read
_LINE_END = re.compile(rb"[\r\n\0]")


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits in seconds: for a complete head, for a peer without progress, and between two
    checks."""

    head_s: float = 20.0
    still_s: float = 20.0
    look_s: float = 5.0


class CountedConnection(Protocol):
    """A connection as the gate counts it."""

    transport: asyncio.Transport

    @property
    def is_idle(self) -> bool:
        """Whether closing it loses nothing."""
        ...


class Gate:
    """Counts connections, in total and by source, and evicts some when full.

    A source is an IPv4 address or an IPv6 /64, which usually is one host. When full, the oldest
    connection without a request is closed, then one that is idle between requests. A share is
    reserved for sources that recently presented a valid credential. Every operation takes constant
    time.
    """

    def __init__(
        self,
        *,
        most: int,
        most_by_address: int,
        patience: ConnectionLimits | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most = most
        self.most_by_address = most_by_address
        self.patience = patience or ConnectionLimits()
        self.lingering = 0
        self.is_draining = False
        """Whether each connection is closed after its next answer: the server is being stopped."""
        self._now = now
        self._reserve = most // _RESERVE
        self._open: BySource[CountedConnection] = BySource()
        # In the order in which they came to be so.
        self._silent: dict[CountedConnection, None] = {}
        self._silent_of: dict[str, dict[CountedConnection, None]] = {}
        self._resting: dict[CountedConnection, None] = {}
        self._known: dict[str, float] = {}

    def enter(self, one: "CountedConnection", address: str) -> str | None:
        """Accept a new connection, evicting an idle one if necessary. Return None, or the refusal
        for the client."""
        source = source_of(address)
        if self._open.count(source) >= self.most_by_address and not self._evict_of(source):
            return (
                f"cannot take another connection: {self.most_by_address} are open from "
                f"{source}; keep fewer open, or set http.connections_per_address"
            )
        most = self.most if self._is_known(source) else self.most - self._reserve
        if len(self._open) >= most and not self._evict():
            return f"cannot take another connection: {most} are open; try again"
        self._open.add(one, source)
        self._silent[one] = None
        self._silent_of.setdefault(source, {})[one] = None
        return None

    def take_over(self, one: "CountedConnection", address: str) -> None:
        """Count an accepted connection under its new protocol."""
        self._open.add(one, source_of(address))

    def leave(self, one: "CountedConnection") -> None:
        """Stop counting a connection."""
        source = self._open.remove(one)
        if source is not None:
            self._forget_silence(one, source)
            self._resting.pop(one, None)

    def asked(self, one: "CountedConnection") -> None:
        """Note that a connection has sent a request's head."""
        if (source := self._open.source(one)) is not None:
            self._forget_silence(one, source)
            self._resting.pop(one, None)

    def answered(self, one: "CountedConnection", *, is_known: bool) -> None:
        """Note that a request was answered. `is_known` says that its credential was valid."""
        if (source := self._open.source(one)) is None:
            return
        self._resting.pop(one, None)
        self._resting[one] = None
        if is_known:
            self._known.pop(source, None)
            self._known[source] = self._now()
            if len(self._known) > _KNOWN_MAX:
                del self._known[next(iter(self._known))]

    def _is_known(self, source: str) -> bool:
        return self._now() - self._known.get(source, -_KNOWN_S) < _KNOWN_S

    def _evict_of(self, source: str) -> bool:
        silent = self._silent_of.get(source)
        if not silent:
            return False
        self._drop(next(iter(silent)))
        return True

    def _evict(self) -> bool:
        if self._silent:
            self._drop(next(iter(self._silent)))
            return True
        while self._resting:
            one = next(iter(self._resting))
            if one.is_idle:
                self._drop(one)
                return True
            del self._resting[one]  # it is back when its next request is answered
        return False

    def _drop(self, one: "CountedConnection") -> None:
        self.leave(one)
        one.transport.abort()

    def _forget_silence(self, one: "CountedConnection", source: str) -> None:
        if one in self._silent:
            del self._silent[one]
            silent = self._silent_of[source]
            del silent[one]
            if not silent:
                del self._silent_of[source]


class GuardedProtocol(HttpToolsProtocol):
    """One connection. `gate` is set by `guarded`."""

    gate: ClassVar[Gate]
    is_tunnel: ClassVar[Callable[[Any], bool]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stage = "head"  # then "body", then "idle"
        self._since = 0.0
        self._head_bytes = 0
        self._headers = 0
        self._headers_bytes = 0
        self._body_bytes = self._body_bytes_before = 0
        self._between_bytes = 0
        self._waited_s = self._body_s = self._idle_s = 0.0
        self._stalled_s = 0.0
        self._unsent = 0
        self._has_resumed = False
        self._too_much: tuple[int, str, str] | None = None
        self._is_refused = False
        self._last: RequestResponseCycle | None = None
        self._lingered_s, self._came = 0.0, 0
        self._trailers: list[tuple[bytes, bytes]] = []
        self.app = partial(self._serve, self.app)
        self._is_upgraded = False
        self._look: TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no request is in progress and all answers are sent."""
        is_sent = not self.transport.get_write_buffer_size()
        return self._stage == "idle" and not self._is_answering and is_sent

    @property
    def _is_answering(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    # --- the connection -------------------------------------------------------------------------

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        self._look = self.loop.call_later(self.gate.patience.look_s, self._look_again)
        refusal = self.gate.enter(self, self.client[0] if self.client else "unknown")
        if refusal is not None:
            self._refuse(503, "unavailable", refusal)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.gate.leave(self)
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    @override
    def data_received(self, data: bytes) -> None:
        self._came += len(data)
        for start in range(0, len(data), _SLICE):
            if self._is_refused or self._is_upgraded or self.transport.is_closing():
                return
            self._take(data[start : start + _SLICE])

    def _take(self, piece: bytes) -> None:
        if self._stage == "idle":
            if not piece.strip(b"\r\n"):
                return  # line ends between requests are nothing (RFC 9112, 2.2)
            self._begin_head()
        if self._stage == "head":
            self._head_bytes += len(piece)
        body_before = self._body_bytes
        super().data_received(piece)
        # What stands between the pieces of a body, and after the last: sizes, trailers.
        is_body = self._stage != "body" or self._body_bytes != body_before
        self._between_bytes = 0 if is_body else self._between_bytes + len(piece)
        if self._between_bytes > HEAD_MAX + _SLICE:
            self._too_much = _LARGE_HEAD
        if self._too_much is None and self._stage == "head":
            if len(getattr(self, "url", b"")) > LINE_MAX:
                self._too_much = _LONG_LINE
            elif self._head_bytes > HEAD_MAX + _SLICE:
                self._too_much = _LARGE_HEAD
        if self._too_much is not None and not self._is_upgraded:
            self._refuse(*self._too_much)

    def _begin_head(self) -> None:
        self._stage, self._since = "head", self.loop.time()
        self._head_bytes = self._headers = self._headers_bytes = 0
        self._idle_s = 0.0

    @override
    def handle_websocket_upgrade(self) -> None:
        """Hand the connection to the protocol that speaks WebSocket."""
        if self._too_much is not None:
            return  # it is refused as any request that is too large
        if self._is_answering or self.pipeline:
            # What still answers would write into the socket, and never hear that it is gone.
            self._refuse(400, "bad_request", "cannot open a WebSocket while an answer is due")
            return
        if not self._has_path():
            self._refuse(400, "bad_request", "cannot read the request's target: it is not a URL")
            return
        is_tunnel = type(self).is_tunnel(self.scope)
        if not is_tunnel and (why := _no_handshake(self.scope, self.url)) is not None:
            self._refuse(400, "bad_request", f"cannot open a WebSocket: {why}")
            return
        self._is_upgraded = True
        self.gate.leave(self)
        if self._look is not None:
            self._look.cancel()
        if is_tunnel:
            self.connections.discard(self)
            tunnel = Tunnel(self.config.loaded_app, self.scope, self.gate, self.server_state)
            self.transport.set_protocol(tunnel)
            tunnel.begin(self.transport, self.loop)
            return
        super().handle_websocket_upgrade()

    def _has_path(self) -> bool:
        """Put the request's path into the scope, which uvicorn does for all but upgrades; return
        False if the target is not a URL."""
        try:
            asked = httptools.parse_url(self.url)
        except httptools.HttpParserError:
            return False
        if asked.path is None:
            return False
        self.scope["path"] = urllib.parse.unquote(asked.path.decode("latin-1"))
        self.scope["raw_path"], self.scope["query_string"] = asked.path, asked.query or b""
        return True

    # --- what the parser tells ------------------------------------------------------------------

    @override
    def on_message_begin(self) -> None:
        if self._stage != "head":
            self._begin_head()
        if len(self.pipeline) >= _PIPELINE_MAX:
            self._too_much = _LARGE_HEAD
        super().on_message_begin()

    @override
    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers += 1
        self._headers_bytes += len(name) + len(value) + 4
        if self._headers > HEADERS_MAX or self._headers_bytes + len(self.url) > HEAD_MAX:
            self._too_much = _LARGE_HEAD
        elif self._stage == "body":
            self._trailers.append((name.lower(), value))
        else:
            super().on_header(name, value)

    @override
    def on_headers_complete(self) -> None:
        if len(self.url) > LINE_MAX:
            self._too_much = _LONG_LINE
        # RFC 9112, 3.2.
        elif (hosts := self._hosts()) > 1:
            self._too_much = self._too_much or _SEVERAL_HOSTS
        elif self.parser.get_http_version() == "1.1" and hosts == 0:
            self._too_much = self._too_much or _NO_HOST
        if self.transport.is_closing():
            return  # the answer before was the last
        if self._too_much is None:
            self._trailers = []
            extensions: dict[str, Any] = {REQUEST_TRAILERS: self._trailers}
            self.scope["extensions"] = extensions | {"http.response.trailers": {}}
            super().on_headers_complete()
        # Not before: what cannot be read of a head is no part of the request before it.
        self._stage = "body"
        self.gate.asked(self)
        self._body_bytes = self._body_bytes_before = self._between_bytes = 0
        self._waited_s = self._body_s = 0.0

    def _hosts(self) -> int:
        return sum(name == b"host" for name, _ in self.headers)

    @override
    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._too_much is None:
            super().on_body(body)
        # Answered before it was read, say by a refusal: what still arrives is discarded.
        if self._body_bytes > _LEFTOVER_MAX and not self._is_answering:
            self.transport.abort()

    @override
    def on_message_complete(self) -> None:
        self._stage = "idle"
        if self._too_much is None:
            super().on_message_complete()
        if self._has_ended:
            self.transport.close()

    @property
    def _has_ended(self) -> bool:
        """Whether the last answer on this connection is complete."""
        return self._last is not None and self._last.response_complete

    @override
    def on_response_complete(self) -> None:
        if self._last is not None and self._last.response_complete:
            self.pipeline.clear()  # what came behind its last request is not answered
            self.cycle = self._last
        super().on_response_complete()
        state = self.scope.get("state", {})
        self.gate.answered(self, is_known=state.get("actor") is not None)
        if self._has_ended and self._stage == "body":
            # Closing with unread data causes a reset, which would discard the answer.
            self._end_writing()
        elif self._has_ended:
            self.transport.close()

    async def _serve(self, app: Any, scope: Any, receive: Any, send: Any) -> None:
        """Have the application answer a request. It may send trailers, or abort an answer that it
        has begun."""
        cycle: RequestResponseCycle = send.__self__
        has_trailers = False

        async def sends(message: Any) -> None:
            nonlocal has_trailers
            kind = message["type"]
            if kind == "http.response.trailers":
                if cycle.chunked_encoding and not cycle.disconnected:
                    self.transport.write(b"0\r\n" + _lines_of(message["headers"]) + b"\r\n")
                    cycle.chunked_encoding = False  # the end of it was just written
                await send({"type": "http.response.body"})
                return
            if kind == "http.response.body" and has_trailers:
                message = {**message, "more_body": True}
            if kind == "http.response.start" and self.gate.is_draining:
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)
            if kind == "http.response.start":
                has_trailers = bool(message.get("trailers"))
                if not cycle.keep_alive:
                    cycle.keep_alive = True  # it is closed here, once what comes was taken
                    self._last = cycle

        try:
            await app(scope, receive, sends)
        except BrokenOffError as error:
            cycle.disconnected = True
            if error.resets:
                self._reset_at_close()
            self.transport.abort()

    def _reset_at_close(self) -> None:
        """Have the connection end by a reset (RFC 9293, 3.5.3). Clients take an end in the middle
        of an answer for a server that errs, and a reset for one that is gone."""
        raw = self.transport.get_extra_info("socket")
        if raw is not None:
            with suppress(OSError):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)

    # --- who is slow ----------------------------------------------------------------------------

    @override
    def resume_writing(self) -> None:
        self._has_resumed = True
        super().resume_writing()

    def _look_again(self) -> None:
        patience = self.gate.patience
        self._look = self.loop.call_later(patience.look_s, self._look_again)
        unsent = self.transport.get_write_buffer_size()
        read = self._unsent - unsent
        is_moving = self._has_resumed or read >= _SLOWEST_READER * patience.look_s
        self._stalled_s = 0.0 if not unsent or is_moving else self._stalled_s + patience.look_s
        self._unsent, self._has_resumed = unsent, False
        if self._stalled_s > patience.still_s:
            self.transport.abort()
        elif self.flow.read_paused or (self._stage == "head" and self._is_answering):
            # The server is not reading, or an answer must be sent first: the client must not
            # be disconnected for that, and no answer lost.
            self._since = self.loop.time()
        elif self._stage == "head" and self.loop.time() - self._since > patience.head_s:
            self._refuse(408, "bad_request", "cannot wait longer for the rest of the request")
        elif self._stage == "body":
            self._look_at_body(patience)
        self._look_at_idleness(patience)

    def _look_at_body(self, patience: ConnectionLimits) -> None:
        if not self._is_answering:
            self._look_at_leftover(patience)
            return
        if self._last is not None:
            return  # it is answered already, and the body that it announced may never come
        came = self._body_bytes - self._body_bytes_before
        self._body_bytes_before = self._body_bytes
        is_moving = came >= _SLOWEST * patience.look_s
        self._waited_s = 0.0 if is_moving else self._waited_s + patience.look_s
        self._body_s += patience.look_s
        whole_s = _BODY_S + self._body_bytes / _SLOWEST_BODY
        if self._waited_s > patience.still_s or self._body_s > whole_s:
            self._refuse(408, "bad_request", "cannot wait longer for the rest of the body")

    def _look_at_leftover(self, patience: ConnectionLimits) -> None:
        """Limit how long the rest of a body is read after its answer was sent."""
        self._waited_s += patience.look_s
        if self._waited_s > patience.still_s:
            self.transport.abort()

    def _look_at_idleness(self, patience: ConnectionLimits) -> None:
        # uvicorn's own timer for that is gone where bytes came after an answer.
        self._idle_s = self._idle_s + patience.look_s if self.is_idle else 0.0
        if self._idle_s > self.timeout_keep_alive + patience.still_s:
            self.transport.close()

    # --- refusals -------------------------------------------------------------------------------

    @override
    def send_400_response(self, msg: str) -> None:
        del msg
        self._refuse(400, "bad_request", "cannot read the request: it is not HTTP/1.1")

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Refuse a request that no route will see, and close the connection."""
        if self._is_refused or self.transport.is_closing():
            return
        self._is_refused = True
        if self._has_ended:
            self.transport.abort()  # its last answer was given
            return
        if self._is_answering:
            if self.cycle.response_started or self.pipeline or self._stage != "body":
                # An answer is under way, or due first: another one in it would be taken for its.
                self.transport.close()
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        request_id = new_request_id()
        log.debug("refused a request before its route was known: %s (%s)", message, request_id)
        body = json.dumps(
            {"error": {"code": code, "message": message, "requestId": request_id}}
        ).encode()
        head = [
            STATUS_LINE[status],
            b"content-type: application/json\r\nconnection: close\r\n",
            b"retry-after: 2\r\n" if status == 503 else b"",
            b"x-request-id: %s\r\n" % request_id.encode(),
            b"content-length: %d\r\n\r\n" % len(body),
        ]
        if self.gate.lingering >= _LINGERING_MAX:
            self.transport.abort()
            return
        self.transport.write(b"".join(head) + body)
        self.gate.lingering += 1
        self._came = 0
        # Closing with unread data causes a reset, which would discard the answer.
        self._end_writing()
        self.loop.call_later(_LINGER_S, self._linger)

    def _end_writing(self) -> None:
        if self.transport.can_write_eof():
            with suppress(OSError):  # it has gone meanwhile
                self.transport.write_eof()

    def _linger(self) -> None:
        """Read and discard what still arrives, and close when it slows down."""
        self._lingered_s += _LINGER_S
        is_moving = self._came >= _SLOWEST_LINGERER * _LINGER_S
        if is_moving and self._lingered_s < _LINGER_MAX_S and not self.transport.is_closing():
            self._came = 0
            self.loop.call_later(_LINGER_S, self._linger)
            return
        self.gate.lingering -= 1
        self.transport.abort()


class GuardedSocket(WebSocketsSansIOProtocol):
    """A WebSocket, counted as any connection. A peer that stops reading is disconnected. `guarded`
    sets `gate`.

    uvicorn's pings are off: pongs are not read while a message waits for a process that does not
    read its input. Unacknowledged data reveals dead peers instead.
    """

    gate: ClassVar[Gate]
    is_idle = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unsent = self._pongs = 0
        self._stalled_s = 0.0
        self._has_resumed = False
        self._look: TimerHandle | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # There is room: it comes in the place of the request that asked for it.
        address = self.client[0] if self.client else "unknown"
        self.gate.take_over(self, address)
        if (connection := transport.get_extra_info("socket")) is not None:
            limit_ms = int(_UNACKNOWLEDGED_S * 1000)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_ms)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._look = self.loop.call_later(self.gate.patience.look_s, self._look_again)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.gate.leave(self)
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    @override
    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), _SLICE):
            if self.transport.is_closing():
                return
            super().data_received(data[start : start + _SLICE])
        if not self.handshake_initiated:
            # The whole head was given at once: the library has refused it, and uvicorn not noticed.
            self.transport.abort()

    @override
    def handle_ping(self) -> None:
        """Close the connection of a peer that sends pings and does not read the answers."""
        if not self.transport.get_write_buffer_size():
            self._pongs = 0
        self._pongs += 1
        if self._pongs > _PONGS_MAX:
            self.transport.abort()
        else:
            super().handle_ping()

    @override
    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body"):
            self.handshake_complete = True  # it was refused, which uvicorn would call an error

    @override
    def resume_writing(self) -> None:
        self._has_resumed = True
        self._pongs = 0
        super().resume_writing()

    def _look_again(self) -> None:
        patience = self.gate.patience
        self._look = self.loop.call_later(patience.look_s, self._look_again)
        unsent = self.transport.get_write_buffer_size()
        is_moving = self._has_resumed or self._unsent - unsent >= _SLOWEST_READER * patience.look_s
        self._stalled_s = 0.0 if not unsent or is_moving else self._stalled_s + patience.look_s
        self._unsent, self._has_resumed = unsent, False
        if self._stalled_s > patience.still_s:
            self.transport.abort()


class Tunnel(asyncio.Protocol, ByteStream):
    """A connection that switches protocol: the application gets its bytes as a `stream`, in a scope
    of type TUNNEL.

    It is counted as any connection, and a peer that stops reading is disconnected.
    """

    is_idle = False

    def __init__(self, app: Any, scope: Any, gate: Gate, state: Any) -> None:
        self._app = app
        self._scope = scope
        self._gate = gate
        self._state = state
        self._came: asyncio.Queue[bytes] = asyncio.Queue()
        self._waiting = 0
        self._has_ended = self._is_lost = False
        self._can_write = asyncio.Event()
        self._can_write.set()
        self._unsent = 0
        self._stalled_s = 0.0
        self._has_resumed = False
        self._look: TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop
        self.transport: asyncio.Transport

    def begin(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        """Take over a connection after its request head."""
        self.transport, self._loop = transport, loop
        address = (self._scope.get("client") or ("unknown", 0))[0]
        self._gate.take_over(self, address)
        if (connection := transport.get_extra_info("socket")) is not None:
            limit_ms = int(_UNACKNOWLEDGED_S * 1000)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_ms)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._state.connections.add(self)
        self._look = loop.call_later(self._gate.patience.look_s, self._look_again)
        self._task = loop.create_task(self._serve())
        self._state.tasks.add(self._task)
        self._task.add_done_callback(self._state.tasks.discard)

    async def _serve(self) -> None:
        scope = {**self._scope, "type": TUNNEL, "stream": self}
        try:
            await self._app(scope, _nothing, _nothing)
        except (OSError, SandyardError, BrokenOffError):
            self.transport.abort()
        finally:
            self.transport.close()

    def shutdown(self) -> None:
        """Close the connection; uvicorn calls this when the server ends."""
        self.transport.close()

    # --- asyncio.Protocol -------------------------------------------------------------------

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._gate.leave(self)
        self._state.connections.discard(self)
        if self._look is not None:
            self._look.cancel()
        self._is_lost = True
        self._came.put_nowait(b"")
        self._can_write.set()
        if self._task is not None:
            self._task.cancel()

    @override
    def data_received(self, data: bytes) -> None:
        self._waiting += len(data)
        self._came.put_nowait(data)
        if self._waiting > _TUNNEL_MAX:
            self.transport.pause_reading()

    @override
    def eof_received(self) -> bool:
        self._came.put_nowait(b"")
        return True

    @override
    def pause_writing(self) -> None:
        self._can_write.clear()

    @override
    def resume_writing(self) -> None:
        self._has_resumed = True
        self._can_write.set()

    def _look_again(self) -> None:
        patience = self._gate.patience
        self._look = self._loop.call_later(patience.look_s, self._look_again)
        unsent = self.transport.get_write_buffer_size()
        is_moving = self._has_resumed or self._unsent - unsent >= _SLOWEST_READER * patience.look_s
        self._stalled_s = 0.0 if not unsent or is_moving else self._stalled_s + patience.look_s
        self._unsent, self._has_resumed = unsent, False
        if self._stalled_s > patience.still_s:
            self.transport.abort()

    # --- core.contracts.node.ByteStream -----------------------------------------------------

    @override
    async def read(self, limit: int) -> bytes:
        """Return a piece as it arrived, whatever its size."""
        del limit
        if self._has_ended:
            return b""
        data = await self._came.get()
        self._has_ended = not data
        self._waiting -= len(data)
        if self._waiting <= _TUNNEL_MAX // 2 and not self.transport.is_closing():
            self.transport.resume_reading()
        return data

    @override
    async def write(self, data: bytes) -> None:
        if self._is_lost or self.transport.is_closing():
            raise UnavailableError("the client has left")
        self.transport.write(data)
        await self._can_write.wait()

    @override
    async def write_eof(self) -> None:
        if not self.transport.can_write_eof():
            self.transport.close()  # TLS has no half of it
            return
        with suppress(OSError, RuntimeError):
            self.transport.write_eof()


def _lines_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return headers in wire format, without those that contain line breaks."""
    return b"".join(
        b"%s: %s\r\n" % (name, value)
        for name, value in headers
        if not _LINE_END.search(name + value)
    )


async def _nothing(*_: object) -> Any:
    """Stand in for ASGI's receive and send, which a tunnel does not use."""
    raise InternalError("a tunnel has no messages")


_LONG_LINE = (414, "uri_too_long", f"cannot take an address of over {LINE_MAX // 1024} KiB")
_NO_HOST = (400, "bad_request", "cannot serve a request of HTTP/1.1 without a Host header")
_SEVERAL_HOSTS = (400, "bad_request", "cannot serve a request with several Host headers")
_LARGE_HEAD = (
    431,
    "headers_too_large",
    f"cannot take over {HEAD_MAX // 1024} KiB of headers, or over {HEADERS_MAX} of them",
)


def _no_handshake(scope: Any, url: bytes) -> str | None:
    """Return why a request is not a WebSocket handshake (RFC 6455, 4.2.1), or None if it is."""
    headers: dict[bytes, bytes] = dict(scope["headers"])
    if scope["method"] != "GET":
        return "it is asked for by GET"
    if headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers:
        return "its request has no body"
    if headers.get(b"sec-websocket-version") != b"13":
        return "send Sec-WebSocket-Version: 13"
    if len(headers.get(b"sec-websocket-key", b"").strip()) != 24:
        return "send a Sec-WebSocket-Key"
    lines = [len(name) + len(value) for name, value in scope["headers"]]
    if len(lines) > _SOCKET_HEADERS_MAX or max([len(url), *lines]) > _SOCKET_LINE_MAX:
        return f"it has over {_SOCKET_HEADERS_MAX} headers, or one of over {_SOCKET_LINE_MAX} bytes"
    return None


def guarded(
    gate: Gate, is_tunnel: Callable[[Any], bool]
) -> tuple[type[asyncio.Protocol], type[asyncio.Protocol]]:
    """Return the protocols for HTTP and WebSocket connections that a gate counts.

    An upgrade request whose scope satisfies `is_tunnel` is passed to the application as a tunnel.
    """
    kinds = (GuardedProtocol, GuardedSocket)
    own = {"gate": gate, "is_tunnel": staticmethod(is_tunnel)}
    made = [type(f"Counted{kind.__name__}", (kind,), own) for kind in kinds]
    return made[0], made[1]
