"""Owned tasks: work in threads, work that must complete, and concurrent work.

`asyncio.to_thread` and `asyncio.shield` return at once when cancelled while their work continues.
Cleanup would then run concurrently with it, and a file that was just removed could reappear.
"""

import asyncio
import errno
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.errors import InternalError, NoCapacityError, SandyardError
from sandyard.server.core.limits import Rate

log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")
Work = Coroutine[object, object, object]


async def in_thread(work: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Run blocking work in a thread and return its result. If cancelled, wait for the work to end
    first."""
    call = functools.partial(work, *args, **kwargs)
    return await outcome_of(asyncio.get_running_loop().run_in_executor(None, call))


async def in_thread_of(
    threads: Executor, work: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs
) -> _T:
    """Run blocking work in one of `threads`. See `in_thread`, which uses the shared ones."""
    call = functools.partial(work, *args, **kwargs)
    return await outcome_of(asyncio.get_running_loop().run_in_executor(threads, call))


async def to_the_end(work: Coroutine[object, object, _T]) -> _T:
    """Run work that must not be cancelled and return its result. If cancelled, let it complete,
    then re-raise.

    Use it for cleanup and for work that must happen as a whole. Its waits need their own limits.
    """
    return await outcome_of(asyncio.get_running_loop().create_task(work))


async def outcome_of(doing: "asyncio.Future[_T]") -> _T:
    """Await the result of work in progress. If cancelled, let it finish first, then re-raise."""
    try:
        return await asyncio.shield(doing)
    except asyncio.CancelledError:
        while not doing.done():
            try:
                await asyncio.wait([doing])
            except asyncio.CancelledError:
                continue
        if not doing.cancelled():
            doing.exception()  # retrieved, so that asyncio does not report it
        raise


@asynccontextmanager
async def concurrently(work: Coroutine[object, object, _T]) -> AsyncIterator["asyncio.Task[_T]"]:
    """Run `work` concurrently with the block, which receives its task; cancel it when the block
    ends.

    An error of either cancels the other and is raised as it is, not in a group. If both fail, the
    block's error is raised.
    """
    failed: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(work)
            try:
                yield task
            except BaseException as error:
                failed = error
                raise
            finally:
                task.cancel()
    except BaseExceptionGroup as group:
        if failed is not None and not isinstance(failed, asyncio.CancelledError):
            raise failed from None
        raise group.exceptions[0] from group


@asynccontextmanager
async def beside(work: Coroutine[object, object, object]) -> AsyncIterator[None]:
    """Run `work` concurrently with the block, and wait for its end, whatever becomes of the block.

    Its waits need their own limits.
    """
    task = asyncio.get_running_loop().create_task(work)
    try:
        yield
    finally:
        await outcome_of(task)


async def attended(
    work: Coroutine[object, object, _T],
    look: Callable[[], Awaitable[object]],
    *,
    every_s: float,
    clock: Clock,
) -> _T:
    """Return the result of `work`, and call `look` periodically while it runs.

    If `look` fails, or the caller is cancelled, `work` is cancelled and awaited first.
    """
    task = asyncio.get_running_loop().create_task(work)
    try:
        while not task.done():
            try:
                async with clock.timeout(every_s):
                    await asyncio.wait([task])
            except TimeoutError:
                await look()
    except BaseException:
        task.cancel()
        await to_the_end(_ended(task))
        raise
    return task.result()


async def _ended(task: "asyncio.Task[_T]") -> None:
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # retrieved, so that asyncio does not report it


Task = asyncio.Task[SandyardError | None]
"""A task of a crew. Its result is the error it failed with, if it did."""


class Crew:
    """Owns background tasks: the one place where they fail. A failure is logged, is the result of
    the task, and affects no other.

    Use it as a context manager. At its end, running tasks are cancelled and awaited. Outside the
    block no task is started.
    """

    def __init__(self) -> None:
        self._group: asyncio.TaskGroup | None = None
        self._under_way: set[Task] = set()
        self._named: dict[str, Task] = {}

    async def __aenter__(self) -> Self:
        self._group = await asyncio.TaskGroup().__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        trouble: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        group, self._group = self._group, None
        for task in self._under_way:
            task.cancel()
        if group is not None:
            # The block's own error comes out as it is, not in a group.
            await group.__aexit__(None, None, None)

    @property
    def is_there(self) -> bool:
        """Whether tasks can be started."""
        return self._group is not None

    def start(
        self, work: Work, what: str, *, once: str | None = None, quietly: bool = False
    ) -> Task | None:
        """Start a task and return it, or None if the block has not begun or has ended.

        `what` is logged if it fails; with `quietly`, typed errors are not logged. Of tasks with
        the same `once`, one runs at a time; None if one is running.
        """
        if self._group is None or once in self._named:
            work.close()
            return None
        task = self._group.create_task(_kept(work, what, quietly=quietly))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        # A task that is cancelled before its first step never awaits its coroutine.
        task.add_done_callback(lambda _: work.close())
        if once is not None:
            self._named[once] = task
            task.add_done_callback(lambda _: self._named.pop(once, None))
        return task

    def is_at(self, once: str) -> bool:
        """Tell whether a task with this name is running."""
        return once in self._named


async def _kept(work: Work, what: str, *, quietly: bool) -> SandyardError | None:
    """Run work, log its failure and return it. Raised, it would end its owner's other work."""
    try:
        await work
    except SandyardError as error:
        log.log(logging.DEBUG if quietly else logging.WARNING, "%s: %s", what, error.message)
        return error
    except Exception as error:  # see above
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            log.warning("%s: %s", what, error)
            return NoCapacityError(
                "cannot do this: the host's disk is full, or takes no more files; free some space"
            )
        log.exception("unexpected error: %s", what)
        return InternalError(f"cannot carry this out: {error}")
    return None


class Pacer:
    """Keeps one connection from taking over the event loop with many tiny pieces.

    Other tasks get their turn after `turn` pieces. Beyond `per_second`, after a `burst`, the
    connection waits.
    """

    def __init__(self, clock: Clock, *, per_second: float, burst: float, turn: int) -> None:
        self._clock = clock
        self._rate = Rate(per_second=per_second, burst=burst)
        self._turn = turn
        self._count = 0

    async def step(self) -> None:
        """Count one piece, and return when the next may be taken."""
        self._count += 1
        wait_s = self._rate.spend(1, self._clock.monotonic())
        if wait_s > 0:
            await self._clock.sleep(wait_s)
        elif self._count % self._turn == 0:
            await asyncio.sleep(0)
