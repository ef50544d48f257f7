"""Work that is never left behind: in threads, to its end, or beside other work.

`asyncio.to_thread` and `asyncio.shield` return at once when they are cancelled, and what they began
goes on: what cleans up after it would run beside it, and a file come back that was just removed.
"""

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.errors import SandyardError
from sandyard.server.core.limits import Rate

log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")
Work = Coroutine[object, object, object]


async def in_thread(work: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Do blocking work in a thread and return its result; if cancelled, once the work has ended."""
    call = functools.partial(work, *args, **kwargs)
    return await outcome_of(asyncio.get_running_loop().run_in_executor(None, call))


async def in_thread_of(
    threads: Executor, work: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs
) -> _T:
    """Do blocking work in one of `threads`; see `in_thread`, whose threads are everybody's."""
    call = functools.partial(work, *args, **kwargs)
    return await outcome_of(asyncio.get_running_loop().run_in_executor(threads, call))


async def to_the_end(work: Coroutine[object, object, _T]) -> _T:
    """Do work that must not be broken off and return its result; if cancelled, once it has ended.

    For what gives back, or must happen as a whole; all of its waits need limits of their own.
    """
    return await outcome_of(asyncio.get_running_loop().create_task(work))


async def outcome_of(doing: "asyncio.Future[_T]") -> _T:
    """Return what is under way comes to; if cancelled, once it has ended, which goes on."""
    try:
        return await asyncio.shield(doing)
    except asyncio.CancelledError:
        while not doing.done():
            try:
                await asyncio.wait([doing])
            except asyncio.CancelledError:
                continue
        if not doing.cancelled():
            doing.exception()  # looked at: nobody else will
        raise


@asynccontextmanager
async def beside(work: Coroutine[object, object, _T]) -> AsyncIterator["asyncio.Task[_T]"]:
    """Run `work` beside the block, which is given its task, and cancel it at the block's end.

    An error of either ends the other and comes out as it is, not in a group; if both fail, the
    block's comes out.
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


class Crew:
    """Owns the tasks that nobody waits for: how one fails is logged, and takes nothing else along.

    Use it as a block. What is under way when the block is left is cancelled and waited for; before
    and after the block nothing is begun.
    """

    def __init__(self) -> None:
        self._group: asyncio.TaskGroup | None = None
        self._under_way: set[asyncio.Task[None]] = set()
        self._named: dict[str, asyncio.Task[None]] = {}

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
        """Whether work is taken on."""
        return self._group is not None

    def start(
        self, work: Work, what: str, *, once: str | None = None, quietly: bool = False
    ) -> "asyncio.Task[None] | None":
        """Begin work and return its task; None, and nothing is begun, where there is no block.

        `what` is a sentence for the log if it fails; an intended failure is not worth one where it
        is done `quietly`. Of what is named by `once` there is one at a time: None if it is at work.
        """
        if self._group is None or once in self._named:
            work.close()
            return None
        task = self._group.create_task(_kept(work, what, quietly=quietly))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        # Cancelled before its first step, a task never touches the work that it was to do.
        task.add_done_callback(lambda _: work.close())
        if once is not None:
            self._named[once] = task
            task.add_done_callback(lambda _: self._named.pop(once, None))
        return task

    def is_at(self, once: str) -> bool:
        """Tell whether the work of that name is under way."""
        return once in self._named


async def _kept(work: Work, what: str, *, quietly: bool) -> None:
    """Do work; raised further, its failure would end all that its owner does besides."""
    try:
        await work
    except SandyardError as error:
        log.log(logging.DEBUG if quietly else logging.WARNING, "%s: %s", what, error.message)
    except Exception:  # see above
        log.exception("%s, in a way that nobody foresaw", what)


class Pacer:
    """Keeps one connection from taking the event loop with many tiny pieces.

    After `turn` pieces other tasks get their turn; beyond `per_second`, after a `burst`, the
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
