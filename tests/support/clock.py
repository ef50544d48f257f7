"""Clocks that a test moves: one by hand alone, one that is ahead of the host's."""

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from typing import Any
from weakref import WeakKeyDictionary

from sandyard.server.links.local import SystemClock

START = datetime(2026, 5, 6, 10, 0, 0, tzinfo=UTC)
_TURNS = 30
_THREADS_S = 10.0


class AheadClock(SystemClock):
    """The host's clock, with its wall time ahead by as much as a test says."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def now(self) -> datetime:
        return datetime.now(UTC) + self.ahead


class DrivenClock:
    """A clock that stands until it is driven: whoever sleeps wakes when its time is reached.

    `time` is the wall's, which may be set by itself, as an operator does.
    """

    def __init__(self, time: datetime = START) -> None:
        self.time = time
        self._elapsed = 0.0
        self._numbers = itertools.count()
        self._due: list[tuple[float, int, Callable[[], object]]] = []

    def now(self) -> datetime:
        """Return the time, each time a microsecond later: what was written first sorts first."""
        self.time += timedelta(microseconds=1)
        return self.time

    def monotonic(self) -> float:
        """See core.contracts.clock.Clock.monotonic."""
        return self._elapsed

    async def sleep(self, seconds: float) -> None:
        """See core.contracts.clock.Clock.sleep."""
        woken = asyncio.Event()
        self._at(seconds, woken.set)
        await woken.wait()

    def timeout(self, seconds: float) -> AbstractAsyncContextManager[object]:
        """See core.contracts.clock.Clock.timeout."""
        limit = asyncio.timeout(None)

        def over() -> None:
            with contextlib.suppress(RuntimeError):  # the block was left long ago
                limit.reschedule(asyncio.get_running_loop().time())

        self._at(seconds, over)
        return limit

    def _at(self, seconds: float, act: Callable[[], object]) -> None:
        heapq.heappush(self._due, (self._elapsed + seconds, next(self._numbers), act))

    async def advance(self, seconds: float) -> None:
        """Let so much time pass, waking each sleeper at its own time and letting it act."""
        until = self._elapsed + seconds
        await turn()
        while self._due and self._due[0][0] <= until:
            due, _, act = heapq.heappop(self._due)
            self._move_to(max(due, self._elapsed))
            act()
            await turn()
        self._move_to(until)
        await turn()

    async def oversleep(self, seconds: float) -> None:
        """Let so much time pass at once, as on a host that was suspended; all due wake at its end.

        Hours take no longer than a moment, for what is done every second is done once.
        """
        self._move_to(self._elapsed + seconds)
        await self.advance(0)

    def _move_to(self, elapsed: float) -> None:
        self.time += timedelta(seconds=elapsed - self._elapsed)
        self._elapsed = elapsed


class _Threads(ThreadPoolExecutor):
    """The threads of a loop, and how many calls have not returned to it."""

    def __init__(self) -> None:
        super().__init__()
        self.at_work = 0

    def submit(self, work: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a call in a thread. Called in the loop's thread only."""
        loop = asyncio.get_running_loop()
        doing = super().submit(work, *args, **kwargs)
        self.at_work += 1
        doing.add_done_callback(lambda _: self._back(loop))
        return doing

    def _back(self, loop: asyncio.AbstractEventLoop) -> None:
        # After the loop closed, nobody counts any more.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._less)

    def _less(self) -> None:
        self.at_work -= 1


_THREADS: WeakKeyDictionary[asyncio.AbstractEventLoop, _Threads] = WeakKeyDictionary()


def count_threads() -> None:
    """Count the calls that the running loop hands to threads, for `turn` to wait for them."""
    loop = asyncio.get_running_loop()
    if loop not in _THREADS:
        loop.set_default_executor(_THREADS.setdefault(loop, _Threads()))


def are_threads_at_work() -> bool:
    """Tell whether a call handed to a thread has not returned to the running loop."""
    threads = _THREADS.get(asyncio.get_running_loop())
    return threads is not None and threads.at_work > 0


async def turn() -> None:
    """Let everything that can run do so, including counted calls in threads.

    A thread is waited for in real time, up to a limit: a driven clock that moved on while a commit
    was still at work would let leases and timeouts end that could not end on a quick host.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + _THREADS_S
    turns = 0
    while turns < _TURNS:
        await asyncio.sleep(0)
        turns += 1
        if are_threads_at_work() and loop.time() < until:
            turns = _TURNS // 2  # what came back from a thread still has its turns
            await asyncio.sleep(0.0002)
