"""Work that is never left behind, in threads or in tasks.

`asyncio.to_thread` and `asyncio.shield` return at once when they are cancelled, and what they began
goes on: what cleans up after it would run beside it, and a file come back that was just removed.
"""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def in_thread(work: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Do blocking work in a thread and return its result; if cancelled, once the work has ended."""
    call = functools.partial(work, *args, **kwargs)
    return await _ended(asyncio.get_running_loop().run_in_executor(None, call))


async def to_the_end(work: Coroutine[object, object, _T]) -> _T:
    """Do work that must not be broken off and return its result; if cancelled, once it has ended.

    For what gives back, or must happen as a whole; all of its waits need limits of their own.
    """
    return await _ended(asyncio.get_running_loop().create_task(work))


async def _ended(doing: "asyncio.Future[_T]") -> _T:
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
async def beside(work: Coroutine[object, object, None]) -> AsyncIterator[None]:
    """Run `work` beside the block and cancel it at the block's end.

    An error of either ends the other and comes out as it is, not in a group; if both fail, the
    block's comes out.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(work)
            try:
                yield
            finally:
                task.cancel()
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from group
