"""Limits the TLS handshakes of a listener.

asyncio creates a connection's protocol only after the handshake, so limits enforced by a protocol
do not cover clients that never finish it, although each holds a file descriptor.
"""

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import cast

from typing_extensions import override

from sandyard.server.core.sources import BySource, source_of

log = logging.getLogger(__name__)

_MOST, _MOST_BY_SOURCE = 1024, 512


class Handshakes:
    """Performs the handshakes of one listener.

    At most 1024 are in progress at the same time, 512 per source. When the limit is reached, the
    oldest is aborted: a client that responds needs only milliseconds.
    """

    def __init__(self, tls: ssl.SSLContext, *, limit_s: float) -> None:
        self.tls = tls
        self.limit_s = limit_s
        self._pending: BySource[_Arriving] = BySource()

    def protocol(self, make: Callable[[], asyncio.Protocol]) -> asyncio.Protocol:
        """Return the protocol for an accepted connection.

        After the handshake, the protocol that `make` returns takes over.
        """
        return _Arriving(self, make)

    async def streams(
        self,
        take: Callable[[asyncio.StreamReader, asyncio.StreamWriter], None],
        address: str,
        port: int,
        *,
        limit: int,
    ) -> asyncio.Server:
        """Listen, and call `take` for each connection whose handshake is complete; see
        asyncio.start_server."""

        def stream() -> asyncio.Protocol:
            return asyncio.StreamReaderProtocol(asyncio.StreamReader(limit=limit), take)

        loop = asyncio.get_running_loop()
        return await loop.create_server(lambda: self.protocol(stream), address, port)

    def close(self) -> None:
        """Abort all handshakes in progress."""
        for one in list(self._pending):
            one.abort()

    def enter(self, one: "_Arriving", address: str) -> None:
        """Count a connection; abort the oldest one if the limit is reached."""
        source = source_of(address)
        if self._pending.count(source) >= _MOST_BY_SOURCE:
            next(self._pending.of(source)).abort()
        elif len(self._pending) >= _MOST:
            next(iter(self._pending)).abort()
        self._pending.add(one, source)

    def leave(self, one: "_Arriving") -> None:
        """Stop counting a connection; does nothing if it is not counted."""
        self._pending.remove(one)


class _Arriving(asyncio.Protocol):
    """A connection during its handshake."""

    def __init__(self, handshakes: Handshakes, make: Callable[[], asyncio.Protocol]) -> None:
        self._handshakes = handshakes
        self._make = make
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_aborted = False

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        self._handshakes.enter(self, peer[0] if peer else "unknown")
        self._task = asyncio.get_running_loop().create_task(self._arrive(self._transport))

    def abort(self) -> None:
        """Abort the connection."""
        self._is_aborted = True
        self._handshakes.leave(self)
        if self._transport is not None:
            self._transport.abort()

    async def _arrive(self, transport: asyncio.Transport) -> None:
        early, its = _Early(), self._handshakes
        try:
            tls = await asyncio.get_running_loop().start_tls(
                transport, early, its.tls, server_side=True, ssl_handshake_timeout=its.limit_s
            )
        except (OSError, ssl.SSLError):
            transport.abort()
            return
        finally:
            its.leave(self)
        if tls is None or self._is_aborted:  # None: it was closed meanwhile
            return
        try:
            early.hand_over(tls, self._make())
        except Exception:  # a fault of one connection's
            log.exception("unexpected error in a connection's first bytes; closing it")
            tls.abort()


class _Early(asyncio.Protocol):
    """Buffers data that arrives between the end of the handshake and the resumption of its task."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._is_over = self._is_lost = False

    @override
    def data_received(self, data: bytes) -> None:
        self._data += data

    @override
    def eof_received(self) -> None:
        """Do nothing: TLS closes the transport."""
        self._is_over = True

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True

    def hand_over(self, transport: asyncio.Transport, protocol: asyncio.Protocol) -> None:
        """Set the protocol of the connection, and pass the buffered data to it."""
        if self._is_lost:
            return
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if self._data:
            protocol.data_received(bytes(self._data))
        if self._is_over:
            protocol.eof_received()
            transport.close()
