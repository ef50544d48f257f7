"""What carries hints between those who write and those who work."""

from contextlib import AbstractContextManager
from typing import Protocol


class Subscription(Protocol):
    """Hints on one topic since the subscription was made."""

    async def wait(self, limit_s: float) -> bool:
        """Return True once a hint has come that was not waited for before, False at the limit."""
        ...


class Bus(Protocol):
    """Carries hints that something is worth a look. Losing one costs a moment, never a sandbox."""

    def hint(self, topic: str) -> None:
        """Wake the subscribers of `topic`; never blocks."""
        ...

    def subscribe(self, topic: str) -> AbstractContextManager[Subscription]:
        """Collect hints on `topic` until the block is left."""
        ...
