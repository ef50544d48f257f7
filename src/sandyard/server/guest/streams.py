"""Non-blocking reads and writes of the agent's pipes and sockets."""

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import sys
import termios

from sandyard.server.core import wire
from sandyard.server.core.codec import encode

CHUNK = 64 * 1024


class Reader:
    """Reads a pipe; after `finish`, what is in the pipe by then is the end."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._waiter: asyncio.Future[None] | None = None
        self._left: int | None = None
        self._is_closed = False

    async def read(self, limit: int) -> bytes:
        """Return up to `limit` bytes, or none at the end."""
        while self._left != 0:
            try:
                wanted = limit if self._left is None else min(limit, self._left)
                data = os.read(self._descriptor, wanted)
            except BlockingIOError:
                await self._readable()
                continue
            except OSError as error:
                if error.errno != errno.EIO:  # a terminal whose other end is closed
                    raise
                return b""
            if self._left is not None:
                self._left -= len(data)
            return data
        return b""

    async def read_all(self, limit: int) -> bytes:
        """Return everything up to the end, truncated at `limit`."""
        result = bytearray()
        while data := await self.read(CHUNK):
            result += data[: limit - len(result)]
        return bytes(result)

    def abandon(self) -> None:
        """Stop reading: `read` returns the end."""
        self._left = 0
        if self._waiter is not None:
            _resolve(self._waiter)

    def finish(self) -> None:
        """Read no further than what is there: only background jobs hold the pipe now."""
        if self._is_closed:
            return
        size = fcntl.ioctl(self._descriptor, termios.FIONREAD, b"\0\0\0\0")
        self._left = int.from_bytes(size, sys.byteorder)
        if self._waiter is not None:
            _resolve(self._waiter)

    def drain_to_nowhere(self) -> None:
        """Keep reading for a background job, which must not be ended by its own output."""
        if self._is_closed:
            return
        loop = asyncio.get_running_loop()

        def is_at_end() -> bool:
            try:
                return not os.read(self._descriptor, CHUNK)
            except BlockingIOError:
                return False
            except OSError:
                return True

        def drain() -> None:
            if is_at_end():
                loop.remove_reader(self._descriptor)
                self.close()

        if is_at_end():  # as usual, unless there is a background job
            self.close()
        else:
            loop.add_reader(self._descriptor, drain)

    def close(self) -> None:
        """Close the pipe; may be repeated."""
        if not self._is_closed:
            self._is_closed = True
            os.close(self._descriptor)

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = waiter = loop.create_future()
        loop.add_reader(self._descriptor, _resolve, waiter)
        try:
            await waiter
        finally:
            loop.remove_reader(self._descriptor)


async def receive(connection: socket.socket) -> bytes:
    """Return the next received bytes.

    Raises:
        ConnectionResetError: the connection has ended.
    """
    data = await asyncio.get_running_loop().sock_recv(connection, CHUNK)
    if not data:
        raise ConnectionResetError
    return data


async def answer(connection: socket.socket, value: object, *, again: bool = False) -> None:
    """Send the first line of an accepted operation; see core.wire for `again`."""
    line = wire.encode_answer(wire.Answer(encode(value), again=again))
    await asyncio.get_running_loop().sock_sendall(connection, line)


async def refuse(connection: socket.socket, code: wire.Refusal, message: str) -> None:
    """Send the first line of a refused operation."""
    line = wire.encode_answer(wire.Answer({}, error=code.value, message=message))
    await asyncio.get_running_loop().sock_sendall(connection, line)


async def copy(source: socket.socket, sink: socket.socket) -> None:
    """Copy from one socket to another until either ends, and pass the end on."""
    loop = asyncio.get_running_loop()
    how = socket.SHUT_WR
    try:
        while data := await loop.sock_recv(source, CHUNK):
            await loop.sock_sendall(sink, data)
    except OSError:
        # Broken, not ended: nothing arrives from it either, so the other direction ends, too.
        how = socket.SHUT_RDWR
        with contextlib.suppress(OSError):
            source.shutdown(how)
    with contextlib.suppress(OSError):
        sink.shutdown(how)


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
