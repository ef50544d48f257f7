"""Terminals in a sandbox, whose output is passed to a function."""

import asyncio
import inspect
from collections.abc import Callable
from contextlib import suppress

from sandyard.client._async.processes import AsyncProcess
from sandyard.client.errors import ConflictError
from sandyard.client.models import Exited, Printed


class AsyncTerminal:
    """A program on a terminal. `on_output` receives what it prints, in a task of its own; it may
    be a coroutine function."""

    def __init__(self, process: AsyncProcess, on_output: Callable[[bytes], object]) -> None:
        self.process = process
        self._task = asyncio.get_running_loop().create_task(self._run(on_output))
        # An error is raised by `wait`; without one, asyncio must not report it.
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def write(self, data: bytes | str) -> None:
        """Type something."""
        await self.process.write(data)

    async def resize(self, columns: int, rows: int) -> None:
        """Change its size."""
        await self.process.resize(columns, rows)

    async def kill(self) -> None:
        """End the program and everything it has started."""
        with suppress(ConflictError):
            await self.process.kill()

    async def wait(self, timeout_s: float | None = None) -> Exited:
        """Return how the program ended, once it has and all output was passed on.

        Raises:
            TimeoutError: it has not ended in time.
            SandyardError: its sandbox was paused or deleted, or `on_output` raised.
        """
        async with asyncio.timeout(timeout_s):
            return await asyncio.shield(self._task)

    async def _run(self, on_output: Callable[[bytes], object]) -> Exited:
        exited: Exited | None = None
        async for event in self.process.events():
            match event:
                case Printed(data=data):
                    result = on_output(data)
                    if inspect.isawaitable(result):
                        await result
                case Exited():
                    exited = event
                case _:
                    pass
        assert exited is not None  # otherwise the events would have raised
        return exited
