"""Work in threads that is never left behind.

`asyncio.to_thread` returns at once when it is cancelled, and its thread goes on: what cleans up
after it would run beside it, and a file come back that was just removed.
"""

import asyncio
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def in_thread(work: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Do blocking work in a thread and return its result; if cancelled, once the work has ended."""
    call = functools.partial(work, *args, **kwargs)
    doing = asyncio.get_running_loop().run_in_executor(None, call)
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
