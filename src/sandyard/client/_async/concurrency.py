"""What the client does with tasks. `_sync.concurrency` has the same with threads."""

import asyncio
import time
from asyncio import Event, Lock, sleep
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import IO, Any, TypeVar

from sandyard.client.calls import Callbacks
from sandyard.client.errors import SandyardError

__all__ = [
    "Event", "Lock", "alongside", "begun", "call_back", "content_of", "finish", "pause", "sleep",
]  # fmt: skip
T = TypeVar("T")
_PIECE = 1024 * 1024
_BRIEFLY_S = 5.0
_ENDING: set[asyncio.Task[None]] = set()
"""Tasks that clean up, held here because asyncio keeps only weak references."""


async def call_back(callbacks: Callbacks) -> None:
    """Call the functions that are due, and await what coroutine functions return."""
    for waiting in callbacks.waiting():
        await waiting


async def pause(event: Event, seconds: float) -> None:
    """Return when an event is set, or after some seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


async def content_of(file: IO[bytes]) -> AsyncIterator[bytes]:
    """Yield a file's content as the body of a request."""
    while piece := file.read(_PIECE):
        yield piece


@asynccontextmanager
async def alongside(work: Callable[[Event], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Do some work while the block runs; it is given an event that is set at the end."""
    is_over = Event()
    task = asyncio.get_running_loop().create_task(work(is_over))
    try:
        yield
    finally:
        is_over.set()
        task.cancel()


async def begun(
    begin: Callable[[], Coroutine[Any, Any, T]], undo: Callable[[T], Awaitable[None]]
) -> T:
    """Return what `begin` returns. If the caller is cancelled meanwhile, undo it once it is there,
    since the server may have begun already."""
    beginning = asyncio.get_running_loop().create_task(begin())

    async def undone() -> None:
        await undo(await beginning)

    try:
        return await asyncio.shield(beginning)
    except asyncio.CancelledError:
        await finish(undone)
        raise


async def finish(
    work: Callable[[], Coroutine[Any, Any, None]], *, ignoring: type[SandyardError] = SandyardError
) -> None:
    """Run a cleanup in its own task, even while the caller is cancelled. Errors in `ignoring` are
    suppressed.

    anyio cancels every wait in a cancelled scope, so the task is awaited briefly, and continues
    after that.
    """
    doing = asyncio.get_running_loop().create_task(work())
    _ENDING.add(doing)
    doing.add_done_callback(_ENDING.discard)
    until: float | None = None
    while not doing.done() and (until is None or time.monotonic() < until):
        try:
            await asyncio.wait([doing], timeout=None if until is None else 0.1)
        except asyncio.CancelledError:
            until = until or time.monotonic() + _BRIEFLY_S
    if doing.done() and (error := doing.exception()) and not isinstance(error, ignoring):
        raise error
    if until is not None:
        raise asyncio.CancelledError
