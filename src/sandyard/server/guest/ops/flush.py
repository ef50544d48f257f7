"""FLUSH: writes the page cache to the disks, without starting a program, which takes longer."""

import asyncio
import contextlib
import os
import threading


class Flushes:
    """Flushes of one machine, one at a time: a file server that does not answer may block one for
    as long as it likes, and each takes a thread."""

    def __init__(self) -> None:
        self._latest: asyncio.Future[None] | None = None

    async def flush(self) -> None:
        """Return once everything that was written before is on the disks."""
        # One that is at work may miss what was just written. All that wait for it share the next.
        before = self._latest
        if before is not None:
            await asyncio.shield(before)
        if self._latest is None or self._latest is before:
            self._latest = self._begun()
        await asyncio.shield(self._latest)

    def _begun(self) -> "asyncio.Future[None]":
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def work() -> None:
            os.sync()
            with contextlib.suppress(RuntimeError):  # the agent has ended meanwhile
                loop.call_soon_threadsafe(done.set_result, None)

        threading.Thread(target=work, daemon=True).start()
        return done
