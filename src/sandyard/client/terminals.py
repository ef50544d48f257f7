"""Terminals in a sandbox, whose output is passed to a function."""

import asyncio
import inspect
import threading
from collections.abc import Callable
from contextlib import suppress

from sandyard.client.errors import ConflictError
from sandyard.client.models import Exited, Printed
from sandyard.client.processes import AsyncProcess, Process

Shown = Callable[[bytes], object]
SHELL = "if [ -x /bin/bash ]; then exec /bin/bash -l; else exec /bin/sh -l; fi"
"""A login shell of those that there are."""


class Terminal:
    """A program on a terminal. `on_output` receives what it prints, in a thread of its own."""

    def __init__(self, process: Process, on_output: Shown) -> None:
        self.process = process
        self._exited: Exited | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(on_output,), daemon=True)
        self._thread.start()

    def write(self, data: bytes | str) -> None:
        """Type something."""
        self.process.write(data)

    def resize(self, columns: int, rows: int) -> None:
        """Change its size."""
        self.process.resize(columns, rows)

    def kill(self) -> None:
        """End the program and everything it has started."""
        self.process.kill()

    def wait(self, timeout_s: float | None = None) -> Exited:
        """Return how the program ended, once it has and all output was passed on.

        Raises:
            TimeoutError: it has not ended in time.
            SandyardError: its sandbox was paused or deleted, or `on_output` raised.
        """
        self._thread.join(timeout_s)
        if self._error is not None:
            raise self._error
        if self._exited is None:
            raise TimeoutError(f"the program did not end within {timeout_s} seconds")
        return self._exited

    def _run(self, on_output: Shown) -> None:
        try:
            for event in self.process.events():
                match event:
                    case Printed(data=data):
                        on_output(data)
                    case Exited():
                        self._exited = event
                    case _:
                        pass
        except Exception as error:  # noqa: BLE001 - `wait` raises it
            self._error = error


class AsyncTerminal:
    """See `Terminal`. `on_output` may be a coroutine function; it is called in a task."""

    def __init__(self, process: AsyncProcess, on_output: Shown) -> None:
        self.process = process
        self._task = asyncio.get_running_loop().create_task(self._run(on_output))
        # An error is raised by `wait`; without one, asyncio must not report it.
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def write(self, data: bytes | str) -> None:
        """See `Terminal.write`."""
        await self.process.write(data)

    async def resize(self, columns: int, rows: int) -> None:
        """See `Terminal.resize`."""
        await self.process.resize(columns, rows)

    async def kill(self) -> None:
        """See `Terminal.kill`."""
        with suppress(ConflictError):
            await self.process.kill()

    async def wait(self, timeout_s: float | None = None) -> Exited:
        """See `Terminal.wait`."""
        async with asyncio.timeout(timeout_s):
            return await asyncio.shield(self._task)

    async def _run(self, on_output: Shown) -> Exited:
        exited: Exited | None = None
        async for event in self.process.events():
            match event:
                case Printed(data=data):
                    said = on_output(data)
                    if inspect.isawaitable(said):
                        await said
                case Exited():
                    exited = event
                case _:
                    pass
        assert exited is not None  # otherwise the events would have raised
        return exited
