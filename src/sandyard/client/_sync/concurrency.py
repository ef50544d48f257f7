"""What the client does with threads. `_async.concurrency` has the same with tasks."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Lock
from time import sleep
from typing import IO, TypeVar

from sandyard.client.calls import Callbacks
from sandyard.client.errors import SandyardError

__all__ = [
    "Event", "Lock", "alongside", "begun", "call_back", "content_of", "finish", "pause", "sleep",
]  # fmt: skip
T = TypeVar("T")


def call_back(callbacks: Callbacks) -> None:
    """Call the functions that are due.

    Raises:
        TypeError: one is a coroutine function.
    """
    callbacks.call()


def pause(event: Event, seconds: float) -> None:
    """Return when an event is set, or after some seconds."""
    event.wait(seconds)


def content_of(file: IO[bytes]) -> IO[bytes]:
    """Return a file as the body of a request."""
    return file


@contextmanager
def alongside(work: Callable[[Event], None]) -> Iterator[None]:
    """Do some work in a thread while the block runs; it is given an event that is set at the
    end."""
    is_over = Event()
    threading.Thread(target=work, args=(is_over,), daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def begun(begin: Callable[[], T], undo: Callable[[T], None]) -> T:
    """Return what `begin` returns. There is no cancellation, so nothing is undone."""
    return begin()


def finish(work: Callable[[], None], *, ignoring: type[SandyardError] = SandyardError) -> None:
    """Run a cleanup. Errors in `ignoring` are suppressed."""
    with suppress(ignoring):
        work()
