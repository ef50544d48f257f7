"""Notifications that wake workers when data has changed."""

from contextlib import AbstractContextManager
from typing import Protocol


class Subscription(Protocol):
    """Hints on one topic since the subscription was made."""

    async def wait(self, limit_s: float) -> bool:
        """Return True at the next hint since the last wait, False at the limit."""
        ...


class Bus(Protocol):
    """Carries hints. A lost hint delays work until the next poll; no work is lost."""

    def hint(self, topic: str) -> None:
        """Wake the subscribers of `topic`; never blocks."""
        ...

    def subscribe(self, topic: str) -> AbstractContextManager[Subscription]:
        """Collect hints on `topic` during the block."""
        ...
