"""Machines of low priority: their hypervisors yield the CPUs to all others."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from sandyard.server.drivers.processes import DetachedProcess, set_nice

_NICE = 10
# A create and its first commands take a tenth of a second here, and several times that on a slow
# host.
_HOLD_S = 0.3
_HOLD_MAX_S = 1.0


class Entry:
    """One machine in the background; its driver adds the hypervisor."""

    def __init__(self, *, is_held: bool) -> None:
        self._is_held = is_held
        self._process: DetachedProcess | None = None

    def add(self, process: DetachedProcess) -> None:
        """Add the machine's hypervisor, which has just been started."""
        set_nice(process.pid, _NICE)
        self._process = process
        self.hold(is_held=self._is_held)

    def hold(self, *, is_held: bool) -> None:
        """Stop the hypervisor, or let it run."""
        self._is_held = is_held
        if self._process is not None:
            self._process.send(signal.SIGSTOP if is_held else signal.SIGCONT)


class Background:
    """The hypervisors of machines that are made ahead.

    A nice value does not keep them from delaying a create: an idle CPU runs them all the same, and
    a create then finds it busy and its caches cold. So they are stopped (SIGSTOP) while a create is
    served. After a hold they run at least as long as it lasted, so they progress under any load.
    """

    def __init__(self) -> None:
        self._entries: set[Entry] = set()
        self._calm = asyncio.Event()
        self._calm.set()
        self._release: asyncio.TimerHandle | None = None
        self._held_since = self._next_hold = 0.0

    @contextmanager
    def entry(self) -> Iterator[Entry]:
        """Yield an entry for one machine, which runs freely after the block."""
        entry = Entry(is_held=not self._calm.is_set())
        self._entries.add(entry)
        try:
            yield entry
        finally:
            self._entries.remove(entry)
            entry.hold(is_held=False)

    def hold(self) -> None:
        """Stop all of them for 0.3 s from now; a hold that is extended lasts at most 1 s."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._release is not None:
            self._release.cancel()
        elif now < self._next_hold:
            return
        else:
            self._held_since = now
            self._calm.clear()
            for entry in self._entries:
                entry.hold(is_held=True)
        at = min(now + _HOLD_S, self._held_since + _HOLD_MAX_S)
        self._release = loop.call_at(at, self.resume)

    def resume(self) -> None:
        """End a hold."""
        if self._release is None:
            return
        self._release.cancel()
        self._release = None
        self._next_hold = 2 * asyncio.get_running_loop().time() - self._held_since
        for entry in self._entries:
            entry.hold(is_held=False)
        self._calm.set()

    async def calm(self) -> None:
        """Return once there is no hold."""
        await self._calm.wait()
