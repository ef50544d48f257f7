"""A typed door to QEMU's monitor protocol (QMP); the library behind it has no types."""

import asyncio
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from qemu.qmp import Message, QMPClient, QMPError

from sandyard.server.core.errors import UnavailableError

_LIMIT_S = 10.0
_REFUSED_S = 2.0
_AGAIN_S = 0.005
_ENDING_EVENTS = ("SHUTDOWN", "GUEST_PANICKED")
_PEER = struct.Struct("3i")  # pid, uid, gid


class _Client(QMPClient):
    """Keeps one event, the first that tells of an end: a guest can cause any number of others."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.ending: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def _event_dispatch(self, msg: Message) -> None:
        if msg.get("event") in _ENDING_EVENTS and not self.ending.done():
            self.ending.set_result(str(msg["event"]))


class Monitor:
    """One connection to one QEMU. Every call has a limit."""

    def __init__(self, client: _Client) -> None:
        self._client = client

    @classmethod
    async def connect(cls, path: Path, *, pid: int) -> "Monitor":
        """Connect to the monitor of a process behind a socket.

        Raises:
            UnavailableError: nobody answers there, or another process.
        """
        until = asyncio.get_running_loop().time() + _REFUSED_S
        while True:
            client = _Client(path.parent.name)
            client.logger.setLevel("CRITICAL")
            try:
                async with asyncio.timeout(_LIMIT_S):
                    await client.connect(await _connected(path, pid))
            except (QMPError, OSError, TimeoutError) as error:
                # QEMU makes the socket a moment before it listens there.
                is_early = isinstance(error, ConnectionRefusedError)
                if not is_early or asyncio.get_running_loop().time() > until:
                    raise UnavailableError(f"cannot reach the monitor {path}: {error!r}") from error
                await asyncio.sleep(_AGAIN_S)
            else:
                return cls(client)

    async def call(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Carry out one command and return what it returned.

        Raises:
            UnavailableError: QEMU refused, is gone, or did not answer in time.
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

    async def processors(self) -> list[int]:
        """Return the ids of the threads that are the guest's processors."""
        result = await self.call("query-cpus-fast")
        found = result if isinstance(result, list) else []
        return [int(one["thread-id"]) for one in found]

    async def migration(self) -> str:
        """Return how far the loading of a saved state is: `completed`, `failed`, or under way."""
        result = await self.call("query-migrate")
        return str(result.get("status")) if isinstance(result, dict) else ""

    async def ending(self) -> str:
        """Return the name of the event that says the guest has come to its end."""
        return await asyncio.shield(self._client.ending)

    def found_ended(self, how: str) -> None:
        """Have `ending` return an end that no event tells of."""
        if not self._client.ending.done():
            self._client.ending.set_result(how)

    async def close(self) -> None:
        """Close the connection; QEMU lives on."""
        with suppress(QMPError, OSError, EOFError, TimeoutError):
            async with asyncio.timeout(_LIMIT_S):
                await self._client.disconnect()


async def _connected(path: Path, pid: int) -> socket.socket:
    """Return a connection to a socket on which that process listens.

    The socket lies in a folder of the process's own, which could put a link to another's there.
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
