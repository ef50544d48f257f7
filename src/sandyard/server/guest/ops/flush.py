"""FLUSH: writes the page cache to the disks, without starting a program, which takes longer."""

import asyncio
import contextlib
import os
import threading

from sandyard.server.guest.patience import patient

_LIMIT_S = 60.0


class Flushes:
    """Runs sync(2) in a thread, one call at a time: if a file server does not answer, a call blocks
    until it does."""

    def __init__(self) -> None:
        self._latest: asyncio.Future[None] | None = None

    async def flush(self) -> None:
        """Return once everything that was written before is on the disks.

        Raises:
            TimeoutError: that takes over a minute.
        """
        async with asyncio.timeout(patient(_LIMIT_S)):
            # A call in progress may miss what was just written. Those that wait share the next one.
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
