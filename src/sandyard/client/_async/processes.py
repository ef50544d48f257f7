"""Processes of a sandbox, which keep running when the client disconnects."""

from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Unpack
from urllib.parse import unquote

from sandyard.client import calls
from sandyard.client._async.concurrency import Event, pause
from sandyard.client._async.transport import AsyncTransport
from sandyard.client.errors import ConflictError, ConnectionFailedError, SandyardError
from sandyard.client.models import Exited, ProcessEvent, ProcessInfo
from sandyard.client.options import ProcessOptions, listing_options
from sandyard.client.streams import Following


class AsyncProcess:
    """One process of a sandbox, by pid or tag."""

    def __init__(self, transport: AsyncTransport, path: str) -> None:
        self._transport = transport
        self._path = path

    @property
    def path(self) -> str:
        """Its path in the HTTP API."""
        return self._path

    @property
    def name(self) -> str:
        """Its pid, or the tag that it was looked up by."""
        return unquote(self._path.rpartition("/")[2])

    @property
    def pid(self) -> int | None:
        """Its pid. None if it was looked up by tag: then `info().pid`."""
        return int(self.name) if self.name.isdecimal() else None

    async def info(self) -> ProcessInfo:
        """Return its state."""
        return await self._transport.send(calls.process(self._path))

    def events(self, offset: int = 0) -> AsyncIterator[ProcessEvent]:
        """Yield its output from an offset on, and finally its exit.

        A broken connection is reopened without gaps or repetition.

        Raises:
            ApiError: the process does not exist, or its sandbox was paused or deleted.
            ConnectionFailedError: the server is unreachable for two minutes.
        """
        return self._transport.follow(Following(self._path, offset))

    async def wait(self) -> Exited:
        """Wait until it has ended."""
        async for event in self.events((await self.info()).raw["outputBytes"]):
            if isinstance(event, Exited):
                return event
        raise ConnectionFailedError("the server did not tell the end of the process")

    async def feed(self, data: bytes | memoryview) -> int:
        """Write as much input as it accepts within five seconds, and return how many bytes that
        was."""
        return await self._transport.send(calls.feed(self._path, memoryview(data)))

    async def write(self, data: bytes | str) -> None:
        """Write to its input, and return when everything is written."""
        left = memoryview(data.encode() if isinstance(data, str) else data)
        while left:
            left = left[await self.feed(left) :]

    async def pour(self, data: bytes | str) -> None:
        """Write the whole input of a process that has none yet, and close it. Connections may break
        meanwhile. If the process ends or closes its input, the rest is not written."""
        await self.pour_until(data, Event())

    async def pour_until(self, data: bytes | str, is_enough: Event) -> None:
        """`pour` until `is_enough` is set."""
        pouring = calls.Pouring(self._path, data)
        with suppress(SandyardError):
            while not pouring.is_done and not is_enough.is_set():
                try:
                    pouring.took(await self._transport.send(pouring.call()))
                except SandyardError as error:
                    await pause(is_enough, pouring.pause_s(error))

    async def close_stdin(self) -> None:
        """Close its input."""
        await self._transport.send(calls.close_stdin(self._path))

    async def signal(self, signal: str | int = "SIGTERM", *, everything: bool = False) -> None:
        """Send a signal to it, or to it and everything it has started."""
        await self._transport.send(calls.signal(self._path, signal, everything=everything))

    async def kill(self) -> None:
        """End it and everything it has started, by force. One that has ended is no error."""
        with suppress(ConflictError):
            await self.signal("SIGKILL", everything=True)

    async def resize(self, columns: int, rows: int) -> None:
        """Change the size of its terminal."""
        await self._transport.send(calls.resize(self._path, columns, rows))


class AsyncProcesses:
    """The processes of one sandbox."""

    def __init__(self, transport: AsyncTransport, sandbox_path: str) -> None:
        self._transport = transport
        self._path = f"{sandbox_path}/processes"

    @listing_options
    async def start(
        self,
        command: str | Sequence[str],
        *,
        idempotency_key: str | None = None,
        **options: Unpack[ProcessOptions],
    ) -> AsyncProcess:
        """Start a process. A string is a shell command line, a sequence is a program and its
        arguments.

        See `ProcessOptions` for the options. Repeating a call with the same `idempotency_key` and
        options within 24 hours returns the first process.
        """
        call = calls.start(self._path, command, idempotency_key, options)
        pid = await self._transport.send(call)
        return self.get(pid)

    def get(self, process: int | str) -> AsyncProcess:
        """Return a process by pid or tag. Whether it exists is checked on first use."""
        return AsyncProcess(self._transport, calls.part_of(self._path, process))

    async def list(self) -> list[ProcessInfo]:
        """Return the processes, oldest first. Ended ones are listed for ten minutes."""
        return await self._transport.send(calls.processes(self._path))
