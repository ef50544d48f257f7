"""Bytes between two ends of connections, plain or through TLS."""

import asyncio
import socket
import ssl
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

_PIECE = 64 * 1024
_KEEPALIVE_S, _PROBE_S, _PROBES = 60, 15, 4
_LINGER_S = 10.0
_FAREWELL_S = 5.0


class Counter:
    """How many bytes passed, out of the sandbox and into it."""

    def __init__(self) -> None:
        self.out = 0
        self.into = 0


class Stream(Protocol):
    """One end of a connection."""

    connection: socket.socket

    async def receive(self) -> bytes:
        """Return some bytes, or none at the end.

        Raises:
            OSError: the connection broke.
        """
        ...

    async def send(self, data: bytes) -> None:
        """Send bytes.

        Raises:
            OSError: the connection broke.
        """
        ...

    async def finish(self) -> None:
        """Send no more, and tell the other end so if it is still there."""
        ...


class PlainStream:
    """See Stream."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    async def receive(self) -> bytes:
        """See Stream.receive."""
        # What is there already is returned without a wait: others have their turn between.
        await asyncio.sleep(0)
        return await asyncio.get_running_loop().sock_recv(self.connection, _PIECE)

    async def send(self, data: bytes) -> None:
        """See Stream.send."""
        await asyncio.get_running_loop().sock_sendall(self.connection, data)

    async def finish(self) -> None:
        """See Stream.finish."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)


class TlsStream:
    """See Stream. Without a `host` it is the server's end. `first` was received before."""

    def __init__(
        self,
        connection: socket.socket,
        context: ssl.SSLContext,
        *,
        host: str | None = None,
        first: bytes = b"",
    ) -> None:
        self.connection = connection
        self._received, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._received, self._to_send, server_side=host is None, server_hostname=host
        )
        self._received.write(first)
        self._sending = asyncio.Lock()

    async def shake_hands(self) -> None:
        """Return once the other end is known to be who it says.

        Raises:
            ssl.SSLError: it is not, or does not accept this end.
            OSError: the connection broke.
        """
        try:
            await self._do(self._tls.do_handshake)
        finally:
            with suppress(OSError):  # also the reason for a refusal
                await self._flush()

    async def receive(self) -> bytes:
        """See Stream.receive."""
        await asyncio.sleep(0)
        try:
            return await self._do(lambda: self._tls.read(_PIECE))
        except ssl.SSLZeroReturnError:
            return b""

    async def send(self, data: bytes) -> None:
        """See Stream.send."""
        self._tls.write(data)
        await self._flush()

    async def finish(self) -> None:
        """See Stream.finish."""
        with suppress(OSError, TimeoutError):
            with suppress(ssl.SSLError):  # the peer has not sent its close_notify
                self._tls.unwrap()
            async with asyncio.timeout(_FAREWELL_S):
                await self._flush()
            self.connection.shutdown(socket.SHUT_WR)

    async def _do(self, what: Callable[[], object]) -> bytes:
        while True:
            try:
                done = what()
            except ssl.SSLWantReadError:
                # Who is sending already sends this, too: not to wait for them lets both ends read
                # while neither can send.
                if not self._sending.locked():
                    await self._flush()
                await asyncio.sleep(0)
                data = await asyncio.get_running_loop().sock_recv(self.connection, _PIECE)
                if data:
                    self._received.write(data)
                else:
                    self._received.write_eof()
            else:
                return done if isinstance(done, bytes) else b""

    async def _flush(self) -> None:
        # What is encrypted first must be sent first.
        async with self._sending:
            while data := self._to_send.read():
                await asyncio.get_running_loop().sock_sendall(self.connection, data)


async def splice(guest: Stream, upstream: Stream, counter: Counter, *, first: bytes = b"") -> None:
    """Pass bytes both ways until both have ended; `first` was received from the guest before.

    Raises:
        OSError: a connection broke.
    """
    if first:
        await upstream.send(first)
        counter.out += len(first)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_pump(guest, upstream, counter, is_out=True))
        tasks.create_task(_pump(upstream, guest, counter, is_out=False))


async def _pump(source: Stream, target: Stream, counter: Counter, *, is_out: bool) -> None:
    # Not into a buffer of its own: most connections wait, and there may be hundreds.
    while piece := await source.receive():
        await target.send(piece)
        if is_out:
            counter.out += len(piece)
        else:
            counter.into += len(piece)
    await target.finish()


async def linger(guest: Stream) -> None:
    """Send no more, and read what still comes until the guest has ended, or for some time: a
    connection that is closed before all was read is reset, and what was last sent is lost."""
    await guest.finish()
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            while await asyncio.get_running_loop().sock_recv(guest.connection, _PIECE):
                await asyncio.sleep(0)


def prepare(connection: socket.socket) -> None:
    """Have a connection's other end checked while nothing passes, and send small pieces at once."""
    connection.setblocking(False)
    with suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)


def reset(connection: socket.socket) -> None:
    """Close a connection by a reset, so that the other end does not wait."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
