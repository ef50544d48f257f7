"""A typed client of QEMU's monitor protocol (QMP); the library behind it has no types."""

import asyncio
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from qemu.qmp import Message, QMPClient, QMPError
from typing_extensions import override

from sandyard.server.core.errors import UnavailableError

_LIMIT_S = 10.0
_REFUSED_S = 2.0
_AGAIN_S = 0.005
_ENDING_EVENTS = ("SHUTDOWN", "GUEST_PANICKED")
_PEER = struct.Struct("3i")  # pid, uid, gid


class _Client(QMPClient):
    """Keeps only the first event about an end, because a guest can cause any number of others."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.ending: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @override
    async def _event_dispatch(self, msg: Message) -> None:
        if msg.get("event") in _ENDING_EVENTS and not self.ending.done():
            self.ending.set_result(str(msg["event"]))


class Monitor:
    """A connection to one QEMU process. Every call has a time limit."""

    def __init__(self, client: _Client) -> None:
        self._client = client

    @classmethod
    async def connect(cls, path: Path, *, pid: int) -> "Monitor":
        """Connect to the monitor of a process through a socket.

        Raises:
            UnavailableError: nothing listens there, or another process does.
        """
        until = asyncio.get_running_loop().time() + _REFUSED_S
        while True:
            client = _Client(path.parent.name)
            client.logger.setLevel("CRITICAL")
            try:
                async with asyncio.timeout(_LIMIT_S):
                    connected = await _connected(path, pid)
                    try:
                        await client.connect(connected)
                    except BaseException:
                        # The client closes it too, unless it was cancelled before it took it over.
                        connected.close()
                        raise
            except (QMPError, OSError, TimeoutError) as error:
                # QEMU creates the socket a moment before it listens on it.
                is_early = isinstance(error, ConnectionRefusedError)
                if not is_early or asyncio.get_running_loop().time() > until:
                    raise UnavailableError(f"cannot reach the monitor {path}: {error!r}") from error
                await asyncio.sleep(_AGAIN_S)
            else:
                return cls(client)

    async def call(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Run a command and return its result.

        Raises:
            UnavailableError: QEMU refused, has ended, or did not answer in time.
        """
        try:
            async with asyncio.timeout(_LIMIT_S):
                result: object = await self._client.execute(command, dict(arguments or {}))
        except (QMPError, OSError, TimeoutError) as error:
            raise UnavailableError(f"cannot carry out {command} in QEMU: {error!r}") from error
        return result

    async def status(self) -> str:
        """Return the machine's run state, such as `running`, `shutdown` or `io-error`."""
        result = await self.call("query-status")
        return str(result.get("status")) if isinstance(result, dict) else ""

    async def version(self) -> str:
        """Return the version of this QEMU, such as `10.0.2`."""
        result = await self.call("query-version")
        numbers = result.get("qemu") if isinstance(result, dict) else None
        if not isinstance(numbers, dict):
            return "unknown"
        return ".".join(str(numbers.get(name)) for name in ("major", "minor", "micro"))

    async def processors(self) -> list[int]:
        """Return the ids of the threads that run the guest's CPUs."""
        result = await self.call("query-cpus-fast")
        found = result if isinstance(result, list) else []
        return [int(one["thread-id"]) for one in found]

    async def migration(self) -> str:
        """Return the progress of restoring a saved state, such as `completed` or `failed`."""
        result = await self.call("query-migrate")
        return str(result.get("status")) if isinstance(result, dict) else ""

    async def ending(self) -> str:
        """Return the name of the event that says that the guest has ended."""
        return await asyncio.shield(self._client.ending)

    def found_ended(self, how: str) -> None:
        """Make `ending` return an end that no event announced."""
        if not self._client.ending.done():
            self._client.ending.set_result(how)

    async def close(self) -> None:
        """Close the connection; QEMU continues."""
        with suppress(QMPError, OSError, EOFError, TimeoutError):
            async with asyncio.timeout(_LIMIT_S):
                await self._client.disconnect()


async def _connected(path: Path, pid: int) -> socket.socket:
    """Return a connection to a socket on which that process listens.

    The socket is in a folder of the process's own, which could replace it by a link to another's.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        await asyncio.get_running_loop().sock_connect(made, str(path))
        peer = made.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        if _PEER.unpack(peer)[0] != pid:
            raise ConnectionAbortedError("another process listens there")
    except BaseException:
        made.close()
        raise
    return made
