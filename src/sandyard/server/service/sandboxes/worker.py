"""Who does the reconciler's work at once, for a request that has just wished it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from sandyard.server.core.contracts.store import Hold
from sandyard.server.core.errors import UnavailableError
from sandyard.server.core.records import Claim


class Worker(Protocol):
    """Takes up what has just been wished, under a lease that was written with the wish."""

    def hold(self) -> Hold:
        """Return a lease to write together with a wish."""
        ...

    async def take_up(self, claim: Claim, *, limit_s: float) -> None:
        """Work on it now; return when done, or at the limit, beyond which the work goes on."""
        ...

    def let_go(self, sandbox_id: str, hold: Hold) -> None:
        """Give a lease back soon, if it was written: nobody works under it."""
        ...


@contextmanager
def holding(worker: Worker, *sandbox_ids: str) -> Iterator[Hold]:
    """Lend a lease to write in the block together with a wish for each of these.

    Where that ends so that nobody knows whether it was written, the lease is let go: whoever looks
    for work next finds the wishes, instead of when the lease has run out.
    """
    hold = worker.hold()
    try:
        yield hold
    except (UnavailableError, asyncio.CancelledError):
        for sandbox_id in sandbox_ids:
            worker.let_go(sandbox_id, hold)
        raise
